//! Transcripts of the program as a user meets it: the README's, and those in `tests/cmd`.
//!
//! A transcript is Markdown. Each of its `console` blocks runs in one shell directory, in which [`Sandbox`] has laid out a checkpoint
//! and data. In a block,
//!
//! - `$ command` runs in `sh`, with the program on the path; what it writes to stdout and stderr follows, as one text;
//! - `? 3` before the next command is its exit code, where that is not 0;
//! - `[..]` stands for any characters of a line, and a line `...` for any lines.
//!
//! With `UPDATE_TRANSCRIPTS=1` in the environment, files that differ are rewritten with what was found, with `[..]` for digests, times
//! and temporary paths; read the difference before keeping it.
//!
//! A README shows real output, so it has no wildcards: there, a digest stands for any digest and a number for any within a tenth of
//! it, since another processor rounds otherwise.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;
use std::path::{Path, PathBuf};

use sandbox::{Sandbox, is_root};

#[test]
fn every_transcript_is_what_the_program_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> = fs::read_dir(root.join("tests/cmd"))
        .expect("the transcripts")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|it| it == "md"))
        .collect();
    files.push(root.join("README.md"));
    files.sort();
    let update = std::env::var_os("UPDATE_TRANSCRIPTS").is_some();
    let mut differing = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a transcript");
        if text.contains("<!-- not as root -->") && is_root() {
            // Root may write anywhere, so there would be no refusal.
            continue;
        }
        let sandbox = Sandbox::new();
        let chance = match file.ends_with("README.md") {
            true => Chance::Kept,
            false => Chance::Wildcards,
        };
        let (found, differences) = run(&text, &sandbox, chance);
        if differences.is_empty() {
            continue;
        }
        if update {
            fs::write(&file, found).expect("the transcript is writable");
        }
        differing.push(format!("{}:\n{}", file.display(), differences.join("\n")));
    }
    assert!(differing.is_empty(), "{}", differing.join("\n\n"));
}

/// A command with what is to come of it.
#[derive(Default)]
struct Step {
    command: String,
    code: i32,
    output: Vec<String>,
}

/// Runs the blocks of `text`; gives the text with what was found, and what differs.
fn run(text: &str, sandbox: &Sandbox, chance: Chance) -> (String, Vec<String>) {
    let mut found = String::new();
    let mut differences = Vec::new();
    let mut block: Option<Vec<Step>> = None;
    for line in text.lines() {
        match (&mut block, line) {
            (None, "```console") => {
                found.push_str("```console\n");
                block = Some(Vec::new());
            }
            (None, _) => {
                found.push_str(line);
                found.push('\n');
            }
            (Some(steps), "```") => {
                for step in steps.drain(..) {
                    let difference = check(&step, sandbox, chance, &mut found);
                    differences.extend(difference);
                }
                found.push_str("```\n");
                block = None;
            }
            (Some(steps), _) => {
                if let Some(command) = line.strip_prefix("$ ") {
                    steps.push(Step {
                        command: command.to_owned(),
                        ..Step::default()
                    });
                } else if let Some(step) = steps.last_mut() {
                    match line.strip_prefix("? ") {
                        Some(code) => step.code = code.parse().expect("an exit code"),
                        None => step.output.push(line.to_owned()),
                    }
                }
            }
        }
    }
    (found, differences)
}

/// What becomes of digests and times when a transcript is rewritten.
#[derive(Clone, Copy)]
enum Chance {
    Kept,
    Wildcards,
}

fn check(step: &Step, sandbox: &Sandbox, chance: Chance, found: &mut String) -> Option<String> {
    let (code, output) = sandbox.shell(&step.command);
    let lines: Vec<&str> = output.lines().map(str::trim_end).collect();
    let expected: Vec<&str> = step.output.iter().map(String::as_str).collect();
    found.push_str(&format!("$ {}\n", step.command));
    if code != 0 {
        found.push_str(&format!("? {code}\n"));
    }
    if code == step.code && matches(&expected, &lines) {
        for line in expected {
            found.push_str(line);
            found.push('\n');
        }
        return None;
    }
    for line in &lines {
        match chance {
            Chance::Kept => found.push_str(line),
            Chance::Wildcards => found.push_str(&sandbox.without_chance(line)),
        }
        found.push('\n');
    }
    Some(format!(
        "$ {}\nexpected {}:\n{}\nfound {code}:\n{}",
        step.command,
        step.code,
        expected.join("\n"),
        lines.join("\n")
    ))
}

/// Whether `lines` are as `expected` has them, where `...` is any number of lines.
fn matches(expected: &[&str], lines: &[&str]) -> bool {
    match expected {
        [] => lines.is_empty(),
        ["...", rest @ ..] => (0..=lines.len()).any(|skipped| matches(rest, &lines[skipped..])),
        [first, rest @ ..] => lines.split_first().is_some_and(|(line, lines)| {
            (line_matches(first, line) || nearly(first, line)) && matches(rest, lines)
        }),
    }
}

/// Whether two lines are the same but for digests, and numbers that are near each other.
fn nearly(expected: &str, line: &str) -> bool {
    let words = |line: &str| -> Vec<String> {
        line.split_whitespace()
            .map(|word| word.trim_matches([',', '(', ')', '%']).to_owned())
            .collect()
    };
    let (expected, found) = (words(expected), words(line));
    let is_digest = |word: &str| word.len() == 64 && word.bytes().all(|it| it.is_ascii_hexdigit());
    expected.len() == found.len()
        && expected.iter().zip(&found).all(|(expected, found)| {
            match (expected.parse::<f64>(), found.parse::<f64>()) {
                (Ok(expected), Ok(found)) => (expected - found).abs() <= 0.1 * expected.abs(),
                _ => expected == found || is_digest(expected) && is_digest(found),
            }
        })
}

/// Whether `line` is as `expected` has it, where `[..]` is any number of characters.
fn line_matches(expected: &str, line: &str) -> bool {
    let mut parts = expected.split("[..]");
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    for (place, part) in parts.iter().enumerate() {
        if place + 1 == parts.len() {
            return rest.ends_with(part);
        }
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.is_empty()
}

#[test]
fn wildcards_match_what_they_should_and_no_more() {
    assert!(line_matches("a [..] c", "a b c"));
    assert!(line_matches("[..]", ""));
    assert!(!line_matches("a [..] c", "a b d"));
    assert!(!line_matches("a", "ab"));
    assert!(line_matches("x[..]y[..]z", "x1y2z"));
    assert!(nearly("norm 1.00 (5.0%)", "norm  1.05 (5.2%)"));
    assert!(!nearly("norm 1.00", "norm 1.20"));
    assert!(!nearly("norm 1.00", "norm"));
    assert!(!nearly("norm a", "norm b"));
    assert!(matches(&["a", "...", "c"], &["a", "b", "b", "c"]));
    assert!(matches(&["...", "c"], &["c"]));
    assert!(!matches(&["a", "..."], &["b"]));
    assert!(!matches(&["a"], &["a", "b"]));
}
