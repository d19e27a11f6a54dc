//! Signed texts as JSON: read in one way only, written in one way only.
//!
//! In: the bytes of a manifest, a signature or its payload. Out: a value, after it is known that no object names a key twice; JSON
//! leaves open which one counts, so such a text could mean one thing here and another elsewhere. The other way round, [`pretty`]
//! gives a value the same bytes whatever order it was built in.

use panacea_formats::json::{JsonError, parse_strict};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A text that is JSON without repeated keys.
pub(super) struct Text<'a> {
    text: &'a str,
    /// What it says.
    pub(super) value: Value,
}

impl<'a> Text<'a> {
    /// Reads `bytes`.
    ///
    /// # Errors
    /// When they are not one JSON text in UTF-8, repeat a key, or nest more than 127 deep.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, JsonError> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            // JSON is UTF-8, so its own reader finds the place.
            Err(_) => serde_json::from_slice(bytes)?,
        };
        let value = parse_strict(text)?;
        Ok(Self { text, value })
    }

    /// The text as a `T`; fields that `T` does not have are passed over.
    ///
    /// # Errors
    /// When a field is missing or of the wrong kind, with its place.
    pub(super) fn decode<T: DeserializeOwned>(&self) -> Result<T, JsonError> {
        // From the text rather than the value: a value no longer knows where it stood.
        Ok(serde_json::from_str(self.text)?)
    }
}

/// `value` indented by two spaces, keys sorted by their bytes, a newline at the end.
pub(crate) fn pretty(value: &Value) -> String {
    format!("{:#}\n", sorted(value))
}

/// `value` with the entries of every object inserted in order of their keys.
///
/// serde_json sorts maps by itself unless some crate in the build turns on its `preserve_order`; signed bytes must not depend on that.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|&(key, _)| key);
            Value::Object(
                entries
                    .into_iter()
                    .map(|(key, value)| (key.clone(), sorted(value)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        leaf => leaf.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_key_named_twice_even_where_nobody_looks() {
        #[derive(serde::Deserialize)]
        struct Wanted {
            a: u8,
        }
        let read = |text: &'static str| Text::parse(text.as_bytes());
        let wanted: Wanted = read(r#"{"a":1,"b":[{"x":1,"y":2}]}"#)
            .unwrap()
            .decode()
            .unwrap();
        assert_eq!(wanted.a, 1);
        assert!(read(r#"{"a":1,"b":[{"x":1,"x":1}]}"#).is_err());
        assert!(read(r#"{"a":1,"\u0061":1}"#).is_err());
    }

    #[test]
    fn refuses_what_is_not_one_text_in_utf_8() {
        for bytes in [
            &b"{} {}"[..],
            b"",
            b"\xff",
            b"{\"a\":\"\xff\"}",
            b"\xef\xbb\xbf{}",
        ] {
            assert!(Text::parse(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn says_where_a_field_is_wrong() {
        let text = Text::parse(b"{\n\"a\": -1}").unwrap();
        let problem = text.decode::<std::collections::BTreeMap<String, u8>>();
        let problem = problem.unwrap_err().to_string();
        assert!(problem.ends_with("at line 2 column 7"), "{problem}");
    }

    #[test]
    fn writes_keys_in_the_order_of_their_bytes() {
        let text = r#"{"b":{"é":1,"z":2,"Z":3},"a":[{"y":0,"x":1.5}]}"#;
        let text = pretty(&Text::parse(text.as_bytes()).unwrap().value);
        let expected = "{\n  \"a\": [\n    {\n      \"x\": 1.5,\n      \"y\": 0\n    }\n  ],\n  \
                        \"b\": {\n    \"Z\": 3,\n    \"z\": 2,\n    \"é\": 1\n  }\n}\n";
        assert_eq!(text, expected);
    }
}
