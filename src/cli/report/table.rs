//! Results as people read them: labels and values in two columns, and lists in several.

use std::fmt;

/// Lines of a result, laid out when shown.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Table {
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Heading(String),
    Row(String, String),
    List(Vec<Vec<String>>),
}

impl Table {
    pub(in crate::cli) fn new() -> Self {
        Self::default()
    }

    /// A line by itself.
    pub(in crate::cli) fn heading(&mut self, text: impl Into<String>) {
        self.parts.push(Part::Heading(text.into()));
    }

    /// A label and what belongs to it.
    pub(in crate::cli) fn row(&mut self, label: impl Into<String>, value: impl Into<String>) {
        self.parts.push(Part::Row(label.into(), value.into()));
    }

    /// Lines of several columns, the first line with their names.
    pub(in crate::cli) fn list(&mut self, lines: Vec<Vec<String>>) {
        self.parts.push(Part::List(lines));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = self.parts.iter().filter_map(|part| match part {
            Part::Row(label, _) => Some(width(label)),
            _ => None,
        });
        let label_width = labels.max().unwrap_or(0);
        for part in &self.parts {
            match part {
                Part::Heading(text) => writeln!(f, "{text}")?,
                Part::Row(label, value) => {
                    let space = label_width - width(label) + 2;
                    writeln!(f, "  {label}{:space$}{value}", "")?;
                }
                Part::List(lines) => list(f, lines)?,
            }
        }
        Ok(())
    }
}

/// Columns as wide as their widest cell; the last is not padded.
fn list(f: &mut fmt::Formatter<'_>, lines: &[Vec<String>]) -> fmt::Result {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    for line in lines {
        let mut text = String::from(" ");
        for (cell, wanted) in line.iter().zip(&widths) {
            let space = wanted - width(cell);
            text.push_str(&format!(" {cell}{:space$} ", ""));
        }
        writeln!(f, "{}", text.trim_end())?;
    }
    Ok(())
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// A share from 0 to 1 as a bar of at most `length` characters, in eighths of one.
pub(in crate::cli) fn bar(share: f64, length: u32) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * f64::from(length) * 8.0).round();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 8 * length"
    )]
    let eighths = eighths as usize;
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

/// A share as a percentage.
pub(in crate::cli) fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_by_eighths_and_stay_in_their_length() {
        assert_eq!(bar(0.0, 10), "");
        assert_eq!(bar(1.0, 3), "███");
        assert_eq!(bar(7.0, 3), "███");
        assert_eq!(bar(0.5, 3), "█▌");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new();
        table.heading("title");
        table.row("a", "1");
        table.row("long", "2");
        table.list(vec![
            vec!["x".into(), "y".into()],
            vec!["wide".into(), "z".into()],
        ]);
        assert_eq!(
            table.to_string(),
            "title\n  a     1\n  long  2\n  x     y\n  wide  z\n"
        );
    }
}
