//! JSON that two readers cannot read differently, and JSON whose bytes depend on its content alone.
//!
//! In: the bytes of a manifest, a signature or its payload. Out: a value, or a refusal; JSON lets an object name a key twice and
//! leaves open which one counts, so a signed text with such an object could mean one thing here and another elsewhere. The other
//! way round, [`canonical`] and [`pretty`] sort keys by their UTF-8 bytes, whatever order the value was built in.

use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Reads one JSON text; an object that names a key twice, at any depth, is refused.
///
/// Arrays and objects nest at most 127 deep (serde_json's own limit), so hostile nesting cannot exhaust the stack.
///
/// # Errors
/// When `bytes` is not one JSON text in UTF-8, or an object in it names a key twice.
pub(super) fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = UniqueKeys.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// `value` without spaces, keys sorted by their bytes.
pub(super) fn canonical(value: &Value) -> String {
    sorted(value).to_string()
}

/// `value` indented by two spaces, keys sorted by their bytes, a newline at the end.
pub(super) fn pretty(value: &Value) -> String {
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

/// Builds a [`Value`], refusing repeated keys on the way.
#[derive(Clone, Copy)]
struct UniqueKeys;

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format_args!("key `{key}` appears twice")));
            }
            object.insert(key, entries.next_value_seed(self)?);
        }
        Ok(object.into())
    }
}

/// Reads `value` as a `T`, once its keys are known to be unique.
pub(super) fn decode<T: for<'de> Deserialize<'de>>(value: Value) -> serde_json::Result<T> {
    serde_json::from_value(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_key_named_twice_at_any_depth() {
        let problem = parse(br#"{"a":1,"a":1}"#).unwrap_err().to_string();
        assert!(problem.starts_with("key `a` appears twice"), "{problem}");
        let deep = parse(br#"[{"b":{"a":1,"c":2,"\u0061":3}}]"#);
        assert!(deep.unwrap_err().to_string().starts_with("key `a`"));
    }

    #[test]
    fn reads_every_kind_of_value() {
        let text = br#"{"a":[null,true,-1,18446744073709551615,0.5,"x\n"],"b":{}}"#;
        assert_eq!(
            parse(text).unwrap(),
            serde_json::from_slice::<Value>(text).unwrap()
        );
    }

    #[test]
    fn refuses_a_second_text_and_bottomless_nesting() {
        assert!(parse(b"{} {}").is_err());
        assert!(parse(b"").is_err());
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn writes_keys_in_the_order_of_their_bytes() {
        let value = parse(r#"{"b":{"é":1,"z":2,"Z":3},"a":[{"y":0,"x":1.5}]}"#.as_bytes()).unwrap();
        assert_eq!(
            canonical(&value),
            r#"{"a":[{"x":1.5,"y":0}],"b":{"Z":3,"z":2,"é":1}}"#
        );
        assert!(pretty(&value).starts_with("{\n  \"a\": [\n    {\n      \"x\": 1.5,"));
        assert!(pretty(&value).ends_with("}\n"));
    }
}
