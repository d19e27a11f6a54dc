//! Which judge: as the command line names it, and opened.
//!
//! In: `keyword`, `keyword:LIST`, `seqcls:DIR`, `generate:DIR` or `endpoint`, and settings. Out: a [`Judge`], or what is wrong with them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use panacea_formats::nearest;
use thiserror::Error;

use super::classifier::{MAX_LENGTH, SequenceClassifier};
use super::generative::{GenerativeJudge, GenerativeModel};
use super::keyword::{KeywordJudge, KeywordList};
use super::template::JudgeTemplate;
use super::{Judge, JudgeError};
use crate::eval::answer::Answerer;

/// A kind of judge, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JudgeChoice {
    /// Phrases of refusals.
    Keyword(KeywordList),
    /// A classifier in a checkpoint directory.
    SequenceClassifier(PathBuf),
    /// A model that answers with its verdict, in a checkpoint directory or a GGUF file.
    Generative(PathBuf),
    /// The same, behind a server.
    Endpoint,
}

impl Default for JudgeChoice {
    fn default() -> Self {
        Self::Keyword(KeywordList::default())
    }
}

/// What can be said of a judge besides which one it is. Nothing of it has to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JudgeSettings {
    /// How an exchange becomes the text that it is given.
    pub template: Option<JudgeTemplate>,
    /// The probability above which a classifier's label counts; 0.5 without it.
    pub threshold: Option<Threshold>,
    /// Tokens of a classifier's text at most; 256 without it.
    pub max_length: Option<usize>,
}

impl JudgeChoice {
    /// The checkpoint that judges, where it is read here.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::SequenceClassifier(path) | Self::Generative(path) => Some(path),
            Self::Keyword(_) | Self::Endpoint => None,
        }
    }

    /// Opens the judge. `endpoint` is who answers for [`Self::Endpoint`]; its answers are read, whatever model it is.
    ///
    /// # Errors
    /// [`JudgeError`] when a file is missing or refused, a setting has no effect on this judge, or there is no `endpoint` where one is needed.
    pub fn open<'a>(
        &self,
        settings: &JudgeSettings,
        endpoint: Option<Box<dyn Answerer + 'a>>,
    ) -> Result<Box<dyn Judge + 'a>, JudgeError> {
        self.check(settings)?;
        let template = settings.template.clone();
        Ok(match self {
            Self::Keyword(list) => Box::new(KeywordJudge::new(*list)),
            Self::SequenceClassifier(path) => Box::new(SequenceClassifier::open(
                path,
                template,
                settings.threshold.unwrap_or_default(),
                settings.max_length.unwrap_or(MAX_LENGTH),
            )?),
            Self::Generative(path) => Box::new(GenerativeModel::open(path, template)?),
            Self::Endpoint => {
                let answerer = endpoint.ok_or(JudgeError::NoEndpoint)?;
                Box::new(GenerativeJudge::new(answerer, template))
            }
        })
    }

    /// Refuses the first setting that would be passed over.
    fn check(&self, settings: &JudgeSettings) -> Result<(), JudgeError> {
        let classifies = matches!(self, Self::SequenceClassifier(_));
        let reads = !matches!(self, Self::Keyword(_));
        for (setting, given, taken) in [
            (JudgeSetting::Template, settings.template.is_some(), reads),
            (
                JudgeSetting::Threshold,
                settings.threshold.is_some(),
                classifies,
            ),
            (
                JudgeSetting::MaxLength,
                settings.max_length.is_some(),
                classifies,
            ),
        ] {
            if given && !taken {
                return Err(JudgeError::NoEffect {
                    setting,
                    judge: self.clone(),
                });
            }
        }
        Ok(())
    }
}

/// `name`, and the beginning of the digest of a template that it is not its own.
pub(super) fn with_template(name: String, template: Option<&JudgeTemplate>) -> String {
    match template {
        None => name,
        Some(template) => {
            let digest = template.sha256().to_string();
            format!("{name} template={}", &digest[..12])
        }
    }
}

impl FromStr for JudgeChoice {
    type Err = UnknownJudge;

    fn from_str(text: &str) -> Result<Self, UnknownJudge> {
        let (kind, rest) = match text.split_once(':') {
            Some((kind, rest)) => (kind, Some(rest)),
            None => (text, None),
        };
        let path = |rest: Option<&str>| match rest.filter(|path| !path.is_empty()) {
            Some(path) => Ok(PathBuf::from(path)),
            None => Err(UnknownJudge::NoPath {
                kind: kind.to_owned(),
            }),
        };
        match (kind, rest) {
            ("keyword", None) => Ok(Self::default()),
            ("keyword", Some(name)) => match KeywordList::named(name) {
                Some(list) => Ok(Self::Keyword(list)),
                None => Err(UnknownJudge::List {
                    nearest: nearest(name, KeywordList::ALL.map(KeywordList::name)),
                    found: name.to_owned(),
                }),
            },
            ("seqcls", rest) => path(rest).map(Self::SequenceClassifier),
            ("generate", rest) => path(rest).map(Self::Generative),
            ("endpoint", None) => Ok(Self::Endpoint),
            _ => Err(UnknownJudge::Kind {
                nearest: nearest(kind, KINDS),
                found: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for JudgeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keyword(list) => write!(f, "keyword:{list}"),
            Self::SequenceClassifier(path) => write!(f, "seqcls:{}", path.display()),
            Self::Generative(path) => write!(f, "generate:{}", path.display()),
            Self::Endpoint => f.write_str("endpoint"),
        }
    }
}

const KINDS: [&str; 4] = ["keyword", "seqcls", "generate", "endpoint"];

/// Not the name of a judge.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnknownJudge {
    /// No kind of judge.
    #[error(
        "`{}` is no judge; known are `keyword[:LIST]`, `seqcls:DIR`, `generate:DIR` and `endpoint`{}",
        panacea_formats::shown(found),
        meant(*nearest)
    )]
    Kind {
        /// What was given.
        found: String,
        /// The kind that is spelled almost so.
        nearest: Option<&'static str>,
    },
    /// No list of phrases.
    #[error(
        "`{}` is no list of the keyword judge; known are {}{}",
        panacea_formats::shown(found),
        KeywordList::ALL.map(|list| format!("`{list}`")).join(", "),
        meant(*nearest)
    )]
    List {
        /// What was given.
        found: String,
        /// The list that is spelled almost so.
        nearest: Option<&'static str>,
    },
    /// A judge in a checkpoint, without the checkpoint.
    #[error("the judge `{kind}` needs a checkpoint: `{kind}:DIR`")]
    NoPath {
        /// Which one.
        kind: String,
    },
}

fn meant(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

/// One of [`JudgeSettings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JudgeSetting {
    /// [`JudgeSettings::template`].
    Template,
    /// [`JudgeSettings::threshold`].
    Threshold,
    /// [`JudgeSettings::max_length`].
    MaxLength,
}

impl fmt::Display for JudgeSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Template => "template",
            Self::Threshold => "threshold",
            Self::MaxLength => "maximum length",
        })
    }
}

/// A probability that a label has to be above: at least 0, below 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Threshold(f64);

impl Threshold {
    /// `value` as a threshold, if it is one.
    ///
    /// # Errors
    /// [`ThresholdError`] when it is not from 0 up to, but not, 1.
    pub fn new(value: f64) -> Result<Self, ThresholdError> {
        match (0.0..1.0).contains(&value) {
            true => Ok(Self(value)),
            false => Err(ThresholdError {
                found: value.to_string(),
            }),
        }
    }

    /// The probability.
    pub fn value(self) -> f64 {
        self.0
    }
}

impl Default for Threshold {
    /// Panacea's.
    fn default() -> Self {
        Self(0.5)
    }
}

impl FromStr for Threshold {
    type Err = ThresholdError;

    fn from_str(text: &str) -> Result<Self, ThresholdError> {
        let wrong = |_| ThresholdError {
            found: text.to_owned(),
        };
        Self::new(text.parse().map_err(wrong)?)
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Not a threshold.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{found}` is no threshold: a number from 0 on and below 1 belongs there")]
pub struct ThresholdError {
    found: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in [
            "keyword:panacea",
            "keyword:gcg",
            "keyword:harmbench",
            "keyword:refusal-direction",
            "keyword:heretic",
            "seqcls:./beaver-dam",
            "generate:C:/guard",
            "endpoint",
        ] {
            assert_eq!(text.parse::<JudgeChoice>().unwrap().to_string(), text);
        }
        assert_eq!("keyword".parse(), Ok(JudgeChoice::default()));
        assert_eq!(
            "generate:C:/guard".parse(),
            Ok(JudgeChoice::Generative("C:/guard".into()))
        );
    }

    #[test]
    fn what_is_no_judge_is_told_which_there_are() {
        for (text, words) in [
            (
                "keywords",
                "`keywords` is no judge; known are `keyword[:LIST]`, `seqcls:DIR`, `generate:DIR` and `endpoint`; did you mean `keyword`?",
            ),
            (
                "llama-guard",
                "`llama-guard` is no judge; known are `keyword[:LIST]`, `seqcls:DIR`, `generate:DIR` and `endpoint`",
            ),
            (
                "endpoint:8080",
                "`endpoint:8080` is no judge; known are `keyword[:LIST]`, `seqcls:DIR`, `generate:DIR` and `endpoint`; did you mean `endpoint`?",
            ),
            (
                "keyword:heretics",
                "`heretics` is no list of the keyword judge; known are `panacea`, `gcg`, `harmbench`, `refusal-direction`, `heretic`; did you mean `heretic`?",
            ),
            (
                "seqcls",
                "the judge `seqcls` needs a checkpoint: `seqcls:DIR`",
            ),
            (
                "generate:",
                "the judge `generate` needs a checkpoint: `generate:DIR`",
            ),
        ] {
            assert_eq!(text.parse::<JudgeChoice>().unwrap_err().to_string(), words);
        }
    }

    #[test]
    fn thresholds_are_probabilities_that_something_can_be_above() {
        assert_eq!("0".parse::<Threshold>().unwrap().value(), 0.0);
        assert_eq!("0.999".parse::<Threshold>().unwrap().to_string(), "0.999");
        for text in ["1", "-0.1", "NaN", "inf", "half"] {
            let error = text.parse::<Threshold>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{text}`")));
        }
    }

    #[test]
    fn a_setting_that_a_judge_does_not_look_at_is_refused() {
        let settings = JudgeSettings {
            threshold: Some(Threshold::default()),
            ..JudgeSettings::default()
        };
        let open = |choice: &str, settings: &JudgeSettings| {
            let choice: JudgeChoice = choice.parse().unwrap();
            choice.open(settings, None).err().map(|it| it.to_string())
        };
        assert_eq!(
            open("keyword:gcg", &settings).unwrap(),
            "the threshold has no effect on the judge `keyword:gcg`"
        );
        assert_eq!(
            open("generate:guard", &settings).unwrap(),
            "the threshold has no effect on the judge `generate:guard`"
        );
        let settings = JudgeSettings {
            template: Some("{answer}".parse().unwrap()),
            ..JudgeSettings::default()
        };
        assert_eq!(
            open("keyword", &settings).unwrap(),
            "the template has no effect on the judge `keyword:panacea`"
        );
        assert_eq!(
            open("endpoint", &settings).unwrap(),
            "the judge `endpoint` needs a server to ask"
        );
        assert_eq!(open("keyword", &JudgeSettings::default()), None);
    }
}
