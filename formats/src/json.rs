//! JSON that two parties must read alike: one spelling for writing, and no repeated keys when reading.
//!
//! *Canonical* here means: keys sorted by their bytes, no white space, everything else as `serde_json` writes it. The same value
//! has the same bytes, whatever order a map happened to have.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::error::shown;

/// The canonical spelling of `value`.
pub fn canonical(value: &Value) -> String {
    let mut out = String::new();
    write_canonical(value, &mut out);
    out
}

fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            // Sorted here, because the map's own order depends on a cargo feature that any dependency can switch on.
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort_unstable();
            out.push('{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

/// Reads `text` as one JSON value, in any spelling, refusing an object that has a key twice, at any depth.
///
/// # Errors
/// When `text` is not JSON, repeats a key, or nests deeper than `serde_json` allows (128).
pub fn parse_strict(text: &str) -> Result<Value, JsonError> {
    Ok(serde_json::from_str::<Strict>(text)?.0)
}

/// Why a text is not the JSON that was expected, with the place. Cut to a length that can be shown.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{reason} at line {line} column {column}")]
pub struct JsonError {
    reason: String,
    line: usize,
    column: usize,
}

impl From<serde_json::Error> for JsonError {
    fn from(error: serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        let message = error.to_string();
        let place = format!(" at line {line} column {column}");
        // `shown`, because serde quotes the value that it met, however long.
        let reason = shown(message.strip_suffix(&place).unwrap_or(&message)).to_string();
        Self {
            reason,
            line,
            column,
        }
    }
}

/// A value whose objects were seen to have no repeated keys.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(serde::de::Error::custom(format!(
                    "the key `{}` comes twice",
                    shown(&key)
                )));
            }
            let Strict(value) = map.next_value()?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_text_sorts_keys_at_every_depth_and_has_no_spaces() {
        let value =
            parse_strict(r#" { "b" : [ { "z": 1, "a": -0.5e-6 } ], "a\n": null, "é": "é" } "#)
                .unwrap();
        let text = canonical(&value);
        assert_eq!(text, r#"{"a\n":null,"b":[{"a":-5e-7,"z":1}],"é":"é"}"#);
        assert_eq!(parse_strict(&text).unwrap(), value);
    }

    #[test]
    fn a_repeated_key_is_refused_at_any_depth_with_its_place() {
        let error = parse_strict("{\"a\":\n[{\"b\":1,\"b\":1}]}").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the key `b` comes twice at line 2 column 11"
        );
        assert!(parse_strict(r#"{"a":1,"a":2}"#).is_err());
        assert!(parse_strict(r#"[{"a":1},{"a":2}]"#).is_ok());
    }

    #[test]
    fn hostile_depth_and_length_end_in_a_short_error() {
        assert!(parse_strict(&"[".repeat(100_000)).is_err());
        let long = format!("{{\"{}\":1,\"{0}\":1}}", "x".repeat(100_000));
        assert!(parse_strict(&long).unwrap_err().to_string().len() < 300);
    }
}
