//! What a file says of itself as one part of several: `NAME-00001-of-00003.gguf` and so on, as gguf-py and llama.cpp's `gguf-split`
//! write them.

use super::error::GgufError;
use super::value::{Metadata, Value};

/// The key of a part's number, from 0, as u16.
pub const SPLIT_NUMBER: &str = "split.no";

/// The key of how many parts there are, as u16.
pub const SPLIT_COUNT: &str = "split.count";

/// The key of how many tensors all parts have together, as i32.
pub const SPLIT_TENSORS: &str = "split.tensors.count";

/// One part of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// From 0; below `count`.
    pub number: u16,
    /// Parts; at least 2.
    pub count: u16,
    /// Tensors in all parts together, by what the file says.
    pub tensors: i32,
}

impl Split {
    /// What `metadata` says. Nothing without `split.count`, or where that is 1, or 0, which is what `gguf-split --merge` leaves
    /// behind; the other keys are not looked at then, as llama.cpp does not.
    ///
    /// # Errors
    /// When a key of several parts is missing or of another type, or the number is none of so many.
    pub fn of(metadata: &Metadata) -> Result<Option<Self>, GgufError> {
        let count = match metadata.value(SPLIT_COUNT) {
            None | Some(Value::U16(0 | 1)) => return Ok(None),
            Some(&Value::U16(count)) => count,
            Some(other) => return Err(wrong_type(SPLIT_COUNT, "u16", other)),
        };
        let number = match metadata.value(SPLIT_NUMBER) {
            None => return Err(GgufError::NoSplitKey { key: SPLIT_NUMBER }),
            Some(&Value::U16(number)) if number < count => number,
            Some(&Value::U16(number)) => return Err(GgufError::SplitNumber { number, count }),
            Some(other) => return Err(wrong_type(SPLIT_NUMBER, "u16", other)),
        };
        let tensors = match metadata.value(SPLIT_TENSORS) {
            None => return Err(GgufError::NoSplitKey { key: SPLIT_TENSORS }),
            Some(&Value::I32(tensors)) => tensors,
            Some(other) => return Err(wrong_type(SPLIT_TENSORS, "i32", other)),
        };
        Ok(Some(Self {
            number,
            count,
            tensors,
        }))
    }

    /// What all parts' names have before their number, if `file_name` is the name of this part.
    pub fn stem<'a>(&self, file_name: &'a str) -> Option<&'a str> {
        file_name
            .strip_suffix(&self.suffix(self.number))
            .filter(|stem| !stem.is_empty())
    }

    /// The name of part `number`, from 0, behind the `stem`.
    pub fn file_name(&self, stem: &str, number: u16) -> String {
        format!("{stem}{}", self.suffix(number))
    }

    /// Names count from 1.
    fn suffix(&self, number: u16) -> String {
        format!("-{:05}-of-{:05}.gguf", u32::from(number) + 1, self.count)
    }
}

fn wrong_type(key: &'static str, wanted: &'static str, found: &Value) -> GgufError {
    GgufError::WrongType {
        key,
        wanted,
        found: found.type_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&str, Value)]) -> Metadata {
        let mut metadata = Metadata::default();
        for (key, value) in pairs {
            metadata.set(*key, value.clone());
        }
        metadata
    }

    #[test]
    fn a_part_says_its_number_and_how_many_there_are() {
        let part = |number, count| {
            let pairs = [
                (SPLIT_NUMBER, Value::U16(number)),
                (SPLIT_COUNT, Value::U16(count)),
                (SPLIT_TENSORS, Value::I32(7)),
            ];
            Split::of(&metadata(&pairs))
        };
        let split = part(1, 3).unwrap().unwrap();
        assert_eq!((split.number, split.count, split.tensors), (1, 3, 7));
        assert_eq!(split.stem("m-00002-of-00003.gguf"), Some("m"));
        assert_eq!(split.file_name("m", 0), "m-00001-of-00003.gguf");
        for other in [
            "m-00001-of-00003.gguf",
            "m-2-of-3.gguf",
            "-00002-of-00003.gguf",
            "m.gguf",
        ] {
            assert_eq!(split.stem(other), None, "{other}");
        }
        for one_file in [0, 1] {
            assert_eq!(part(9, one_file).unwrap(), None);
        }
        assert!(part(65_533, 65_535).is_ok() && part(65_534, 65_535).is_ok());
        assert!(matches!(
            part(65_535, 65_535),
            Err(GgufError::SplitNumber { .. })
        ));
    }

    #[test]
    fn keys_that_are_missing_or_of_other_types_are_refused() {
        let all = [
            (SPLIT_NUMBER, Value::U16(0)),
            (SPLIT_COUNT, Value::U16(2)),
            (SPLIT_TENSORS, Value::I32(7)),
        ];
        for place in 0..3 {
            let mut pairs = all.clone();
            pairs[place].1 = Value::U32(2);
            let error = Split::of(&metadata(&pairs)).unwrap_err();
            assert!(matches!(error, GgufError::WrongType { key, .. } if key == pairs[place].0));
        }
        for (without, key) in [([1, 2], SPLIT_NUMBER), ([0, 1], SPLIT_TENSORS)] {
            let error = Split::of(&metadata(&without.map(|i| all[i].clone()))).unwrap_err();
            assert!(matches!(error, GgufError::NoSplitKey { key: found } if found == key));
        }
        assert_eq!(Split::of(&metadata(&[all[0].clone()])).unwrap(), None);
    }
}
