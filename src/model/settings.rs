//! The settings of a `config.json` as they stand there, with typed access.
//!
//! In: a JSON object and the values that its family gives to settings that are left out. Out: numbers, flags and texts, or the
//! refusal of a value of the wrong kind. Nothing here knows what a setting means.

use serde_json::{Map, Value};

use super::config::ConfigError;

/// Settings by name, and what those stand at that are not given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings<'a> {
    given: &'a Map<String, Value>,
    defaults: &'static [(&'static str, f64)],
}

impl<'a> Settings<'a> {
    /// Settings without any defaults.
    pub(crate) fn of(given: &'a Map<String, Value>) -> Self {
        Self {
            given,
            defaults: &[],
        }
    }

    /// The same settings with `defaults` for those that are absent. One that is `null` has no value.
    pub(crate) fn with_defaults(self, defaults: &'static [(&'static str, f64)]) -> Self {
        Self { defaults, ..self }
    }

    /// Names and values, those that are `null`, `false` or empty left out: such a setting asks for nothing.
    pub(crate) fn active(self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let idle = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(members) => members.is_empty(),
            Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
        };
        self.given
            .iter()
            .filter(move |(_, value)| !idle(value))
            .map(|(name, value)| (name.as_str(), value))
    }

    /// The value of a setting, if it has one.
    pub(crate) fn value(self, setting: &str) -> Option<&'a Value> {
        self.given.get(setting).filter(|value| !value.is_null())
    }

    pub(crate) fn text(self, setting: &'static str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(setting, "a string", Value::as_str)
    }

    pub(crate) fn object(
        self,
        setting: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        self.typed(setting, "an object", Value::as_object)
    }

    /// A number that is finite in f32 too, in which all of them are used.
    pub(crate) fn number(self, setting: &'static str) -> Result<Option<f64>, ConfigError> {
        let given = self.typed(setting, "a number that f32 holds", |value| {
            value.as_f64().filter(|&x| narrowed(x).is_finite())
        })?;
        Ok(given.or_else(|| self.default(setting)))
    }

    /// A number above 0, in f32 too.
    pub(crate) fn positive(self, setting: &'static str) -> Result<Option<f64>, ConfigError> {
        let given = self.typed(setting, "a number above 0 that f32 holds", |value| {
            let fits = |&x: &f64| narrowed(x) > 0.0 && narrowed(x).is_finite();
            value.as_f64().filter(fits)
        })?;
        Ok(given.or_else(|| self.default(setting)))
    }

    /// A flag that is off when it is not given.
    pub(crate) fn flag(self, setting: &'static str) -> Result<bool, ConfigError> {
        Ok(self.optional_flag(setting)?.unwrap_or(false))
    }

    pub(crate) fn optional_flag(self, setting: &'static str) -> Result<Option<bool>, ConfigError> {
        self.typed(setting, "true or false", Value::as_bool)
    }

    /// A size of at least 1 and below 2^31, so that products of two fit u64 everywhere.
    pub(crate) fn size(self, setting: &'static str) -> Result<Option<usize>, ConfigError> {
        let given = self.typed(setting, "a whole number from 1 to 2147483647", |value| {
            let size = value.as_u64().filter(|size| (1..1 << 31).contains(size))?;
            usize::try_from(size).ok()
        })?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the defaults of sizes are whole numbers below 2^31"
        )]
        let default = || self.default(setting).map(|size| size as usize);
        Ok(given.or_else(default))
    }

    /// As [`Self::size`], of a setting that must have a value.
    pub(crate) fn needed_size(self, setting: &'static str) -> Result<usize, ConfigError> {
        self.size(setting)?.ok_or(ConfigError::Missing { setting })
    }

    /// A list of whole numbers from 0 on.
    pub(crate) fn indices(self, setting: &'static str) -> Result<Vec<usize>, ConfigError> {
        let list = self.list(setting, "a list of whole numbers", |value| {
            value.as_u64().and_then(|index| usize::try_from(index).ok())
        })?;
        Ok(list.unwrap_or_default())
    }

    /// A list of numbers that are finite in f32 too.
    pub(crate) fn numbers(self, setting: &'static str) -> Result<Option<Vec<f64>>, ConfigError> {
        self.list(setting, "a list of numbers that f32 holds", |value| {
            value.as_f64().filter(|&x| narrowed(x).is_finite())
        })
    }

    /// A list of strings.
    pub(crate) fn texts(self, setting: &'static str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        self.list(setting, "a list of strings", Value::as_str)
    }

    fn list<T>(
        self,
        setting: &'static str,
        wanted: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        self.typed(setting, wanted, |value| {
            value.as_array()?.iter().map(&read).collect()
        })
    }

    /// What a setting that is absent stands at.
    fn default(self, setting: &str) -> Option<f64> {
        let absent = !self.given.contains_key(setting);
        let known = self.defaults.iter().find(|(name, _)| *name == setting);
        known.filter(|_| absent).map(|&(_, value)| value)
    }

    fn typed<T>(
        self,
        setting: &'static str,
        wanted: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.value(setting)
            .map(|value| {
                read(value).ok_or_else(|| ConfigError::Kind {
                    setting,
                    found: value.to_string(),
                    wanted,
                })
            })
            .transpose()
    }
}

/// A setting as the f32 that the arithmetic runs in.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is what PyTorch does with these constants"
)]
pub(crate) fn narrowed(x: f64) -> f32 {
    x as f32
}
