//! Modules as an adapter's config names them: by the ends of their paths, or by regular expressions of Python's.
//!
//! In: the texts of the config, compiled once. Out: whether a module is meant. The rules are those of PEFT 0.21.2,
//! `get_pattern_key` in `utils/other.py` and `check_target_module_exists` in `tuners/tuners_utils.py`.

use fancy_regex::Regex;

use super::PeftError;

/// A regular expression of a config.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    field: &'static str,
    text: String,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    /// The text is the end of a path, in which a dot stands for any character.
    Plain,
    Compiled(Regex),
}

impl Pattern {
    /// `text` for the end of a path, from a dot on. A config may have one for each module, so plain ones are not compiled.
    pub(super) fn of_end(field: &'static str, text: &str) -> Result<Self, PeftError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        match text.chars().all(is_plain) {
            true => Ok(Self {
                field,
                text: text.to_owned(),
                rule: Rule::Plain,
            }),
            false => Self::compiled(field, text, &format!(r"^(.*\.)?({text})$")),
        }
    }

    /// `text` for a whole path.
    pub(super) fn of_whole(field: &'static str, text: &str) -> Result<Self, PeftError> {
        Self::compiled(field, text, &format!("^(?:{text})$"))
    }

    /// `text` for what comes before a block's number.
    pub(super) fn before_number(field: &'static str, text: &str) -> Result<Self, PeftError> {
        let anchored = format!(r"^(?:(?:^|.*?\.){text}\.(?P<idx>\d+)\.)");
        Self::compiled(field, text, &anchored)
    }

    fn compiled(field: &'static str, text: &str, anchored: &str) -> Result<Self, PeftError> {
        match Regex::new(anchored) {
            Ok(regex) => Ok(Self {
                field,
                text: text.to_owned(),
                rule: Rule::Compiled(regex),
            }),
            Err(source) => Err(PeftError::Pattern {
                field,
                pattern: text.to_owned(),
                source: Box::new(source),
            }),
        }
    }

    /// Whether `path` matches.
    ///
    /// # Errors
    /// When that takes too long to find out.
    pub(super) fn matches(&self, path: &str) -> Result<bool, PeftError> {
        match &self.rule {
            Rule::Plain => Ok(is_end(&self.text, path)),
            Rule::Compiled(regex) => regex.is_match(path).map_err(|source| self.failed(source)),
        }
    }

    /// The block's number that follows in `path`; nothing where the pattern does not match.
    ///
    /// # Errors
    /// When that takes too long to find out.
    fn number_in(&self, path: &str) -> Result<Option<Option<u64>>, PeftError> {
        let Rule::Compiled(regex) = &self.rule else {
            return Ok(None);
        };
        let found = regex.captures(path).map_err(|source| self.failed(source))?;
        Ok(found.map(|found| found.name("idx").and_then(|it| it.as_str().parse().ok())))
    }

    fn failed(&self, source: fancy_regex::Error) -> PeftError {
        PeftError::Pattern {
            field: self.field,
            pattern: self.text.clone(),
            source: Box::new(source),
        }
    }
}

/// Whether `path` ends in `text`, from a dot on, where a dot of `text` stands for any character.
fn is_end(text: &str, path: &str) -> bool {
    // The text is ASCII, but its dots may stand for longer characters.
    let start = path
        .char_indices()
        .rev()
        .nth(text.len().saturating_sub(1))
        .map_or(0, |(start, _)| start);
    let start = if text.is_empty() { path.len() } else { start };
    let end = &path[start..];
    let alike = |(wanted, found): (char, char)| wanted == found || (wanted == '.' && found != '\n');
    end.chars().count() == text.len()
        && text.chars().zip(end.chars()).all(alike)
        && (start == 0 || path[..start].ends_with('.'))
}

/// Some modules of a model.
#[derive(Clone, Debug)]
pub(super) enum Modules {
    /// By their paths or the ends of these.
    Named(Vec<String>),
    /// By their whole paths.
    Matching(Pattern),
    /// Every linear one, or those of an expression that only Python knows: which, the base or the file has to say.
    Unknown,
}

impl Modules {
    /// Those that a text names: an expression for whole paths.
    pub(super) fn of_text(field: &'static str, text: &str) -> Self {
        match Pattern::of_whole(field, text) {
            Ok(pattern) if !text.eq_ignore_ascii_case(ALL_LINEAR) => Self::Matching(pattern),
            _ => Self::Unknown,
        }
    }
}

/// What stands for every linear module but the head.
const ALL_LINEAR: &str = "all-linear";

/// Whether PEFT would adapt a module by a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selected {
    /// It would.
    Yes,
    /// It would leave the module out.
    No,
    /// That depends on the base, or on a regular expression that only Python knows.
    Unknown,
}

/// The modules that a config selects.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub(super) targets: Modules,
    pub(super) excluded: Modules,
    /// Of the modules that are named by the ends of their paths, only those of these blocks; all where empty.
    pub(super) layers: Vec<u64>,
    /// What comes before a block's number; where empty, any name.
    pub(super) layers_patterns: Vec<Pattern>,
}

impl Selection {
    /// Whether the module at `path` is selected.
    ///
    /// # Errors
    /// When a pattern takes too long.
    pub(super) fn selects(&self, path: &str) -> Result<Selected, PeftError> {
        let excluded = match &self.excluded {
            Modules::Named(names) => is_named(names, path),
            Modules::Matching(pattern) => pattern.matches(path)?,
            Modules::Unknown => false,
        };
        let targeted = match &self.targets {
            _ if excluded => false,
            Modules::Unknown => return Ok(Selected::Unknown),
            Modules::Matching(pattern) => pattern.matches(path)?,
            Modules::Named(names) if names.iter().any(|name| name == path) => true,
            Modules::Named(names) => is_named(names, path) && self.is_in_layers(path)?,
        };
        Ok(match (targeted, &self.excluded) {
            (true, Modules::Unknown) => Selected::Unknown,
            (true, _) => Selected::Yes,
            (false, _) => Selected::No,
        })
    }

    /// Whether `path` is in one of the blocks that are left in.
    fn is_in_layers(&self, path: &str) -> Result<bool, PeftError> {
        if self.layers.is_empty() {
            return Ok(true);
        }
        let listed = |layer: Option<u64>| layer.is_some_and(|it| self.layers.contains(&it));
        if self.layers_patterns.is_empty() {
            // The first part that is a number, after at least two others and before another.
            let parts: Vec<&str> = path.split('.').collect();
            let inner = parts
                .get(2..parts.len().saturating_sub(1))
                .unwrap_or_default();
            let number =
                |part: &&&str| !part.is_empty() && part.bytes().all(|it| it.is_ascii_digit());
            return Ok(listed(
                inner.iter().find(number).and_then(|it| it.parse().ok()),
            ));
        }
        for pattern in &self.layers_patterns {
            if let Some(number) = pattern.number_in(path)? {
                return Ok(listed(number));
            }
        }
        Ok(false)
    }
}

fn is_named(names: &[String], path: &str) -> bool {
    names.iter().any(|name| {
        path.strip_suffix(name.as_str())
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_end_matches_as_its_regular_expression_does() {
        let texts = ["v_proj", "a.v_proj", "z.v", ".", "a..b", "", "v-1", "é"];
        let paths = [
            "v_proj",
            "a.v_proj",
            "b.a.v_proj",
            "xv_proj",
            "a.xv_proj",
            "azv_proj",
            "zxv",
            "a.zxv",
            "zzzv",
            "z.v",
            "é",
            "a.é",
            "aéb",
            "a.xyb",
            "axyb",
            "",
            ".",
            "a.",
            "v-1",
            "q.v-1",
            "zév",
            "b.zév",
            "z\nv",
        ];
        for text in texts {
            let regex = Pattern::compiled("f", text, &format!(r"^(.*\.)?({text})$")).unwrap();
            let plain = Pattern::of_end("f", text).unwrap();
            for path in paths {
                assert_eq!(
                    plain.matches(path).unwrap(),
                    regex.matches(path).unwrap(),
                    "{text:?} {path:?}"
                );
            }
        }
    }
}
