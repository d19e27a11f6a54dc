//! Keys and values: bytes in, [`Metadata`] out.
//!
//! The bytes are walked twice. First without keeping anything but where keys are, which shows that every length and count is true
//! and no key comes twice; then values are built. So a claim that turns out false behind a million values has cost no memory for
//! them, and what is allocated in the end is what is there.

use super::cursor::{Cursor, Reading};
use super::error::GgufError;
use super::value::{Array, Metadata, Value, ValueType};

/// Most arrays around a value. llama.cpp reads no array in an array at all, gguf-py any.
pub const MAX_ARRAY_DEPTH: usize = 8;

/// The fewest bytes of a key with its value: the key's length, one byte of it, the value's type, one byte of it.
pub(super) const LEAST_PAIR: usize = 8 + 1 + 4 + 1;

/// Reads `count` keys and values, of which it is known that they could fit.
pub(super) fn metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<Metadata, GgufError> {
    check(cursor.clone(), count)?;
    let mut pairs = Vec::with_capacity(count);
    for _ in 0..count {
        cursor.place = Reading::Header;
        let key = cursor.text()?;
        cursor.place = Reading::Key(key);
        let value_type = value_type(cursor)?;
        pairs.push((Box::from(key), value(cursor, value_type)?));
    }
    cursor.place = Reading::Header;
    Ok(Metadata::of_distinct(pairs))
}

/// Whether `count` pairs follow, all of them within the file, with no key twice.
fn check(mut cursor: Cursor<'_>, count: usize) -> Result<(), GgufError> {
    let mut keys = Vec::with_capacity(count);
    for _ in 0..count {
        cursor.place = Reading::Header;
        let key_at = cursor.clone();
        let key = cursor.text()?;
        if key.is_empty() {
            return Err(GgufError::EmptyKey {
                offset: key_at.at(),
            });
        }
        keys.push(key_at.at());
        cursor.place = Reading::Key(key);
        let value_type = value_type(&mut cursor)?;
        skip(&mut cursor, value_type, 0)?;
    }
    // Offsets, not texts: half the memory.
    let key = |at: usize| cursor.reread(at).text();
    keys.sort_unstable_by(|&a, &b| key(a).ok().cmp(&key(b).ok()));
    for pair in keys.windows(2) {
        let (one, other) = (key(pair[0])?, key(pair[1])?);
        if one == other {
            return Err(GgufError::DuplicateKey {
                key: one.to_owned(),
            });
        }
    }
    Ok(())
}

fn value_type(cursor: &mut Cursor<'_>) -> Result<ValueType, GgufError> {
    let found = cursor.u32()?;
    ValueType::numbered(found).ok_or_else(|| GgufError::UnknownValueType {
        place: cursor.place(),
        found,
    })
}

/// Moves behind a value that is inside of `depth` arrays.
fn skip(cursor: &mut Cursor<'_>, value_type: ValueType, depth: usize) -> Result<(), GgufError> {
    match value_type {
        ValueType::Text => cursor.text_bytes().map(drop),
        ValueType::Array if depth == MAX_ARRAY_DEPTH => Err(GgufError::TooDeep {
            place: cursor.place(),
        }),
        ValueType::Array => {
            let (elements, count) = array_head(cursor)?;
            match elements {
                ValueType::Text | ValueType::Array => {
                    (0..count).try_for_each(|_| skip(cursor, elements, depth + 1))
                }
                // No overflow: so many bytes remain at least.
                number => cursor.take((count * number.least_bytes()) as u64).map(drop),
            }
        }
        number => cursor.take(number.least_bytes() as u64).map(drop),
    }
}

/// The type of an array's elements, and how many there are; at least their shortest forms fit in the file.
fn array_head(cursor: &mut Cursor<'_>) -> Result<(ValueType, usize), GgufError> {
    let elements = value_type(cursor)?;
    let count = cursor.count("elements", elements.least_bytes())?;
    Ok((elements, count))
}

/// A value that was skipped before.
fn value(cursor: &mut Cursor<'_>, value_type: ValueType) -> Result<Value, GgufError> {
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array()?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array()?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array()?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array()?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(cursor.array()?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array()?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array()?)),
        ValueType::Bool => Value::Bool(truth(cursor)?),
        ValueType::Text => Value::Text(cursor.text()?.to_owned()),
        ValueType::Array => Value::Array(array(cursor)?),
        ValueType::U64 => Value::U64(u64::from_le_bytes(cursor.array()?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array()?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array()?)),
    })
}

/// An array that was skipped before, so that its depth and count are right.
fn array(cursor: &mut Cursor<'_>) -> Result<Array, GgufError> {
    let (elements, count) = array_head(cursor)?;
    Ok(match elements {
        ValueType::U8 => Array::U8(numbers(cursor, count, u8::from_le_bytes)?),
        ValueType::I8 => Array::I8(numbers(cursor, count, i8::from_le_bytes)?),
        ValueType::U16 => Array::U16(numbers(cursor, count, u16::from_le_bytes)?),
        ValueType::I16 => Array::I16(numbers(cursor, count, i16::from_le_bytes)?),
        ValueType::U32 => Array::U32(numbers(cursor, count, u32::from_le_bytes)?),
        ValueType::I32 => Array::I32(numbers(cursor, count, i32::from_le_bytes)?),
        ValueType::F32 => Array::F32(numbers(cursor, count, f32::from_le_bytes)?),
        ValueType::Bool => Array::Bool(each(cursor, count, truth)?),
        ValueType::Text => Array::Text(each(cursor, count, |cursor| {
            cursor.text().map(str::to_owned)
        })?),
        ValueType::Array => Array::Array(each(cursor, count, array)?),
        ValueType::U64 => Array::U64(numbers(cursor, count, u64::from_le_bytes)?),
        ValueType::I64 => Array::I64(numbers(cursor, count, i64::from_le_bytes)?),
        ValueType::F64 => Array::F64(numbers(cursor, count, f64::from_le_bytes)?),
    })
}

/// `count` numbers of `N` bytes, which are known to follow.
fn numbers<const N: usize, T>(
    cursor: &mut Cursor<'_>,
    count: usize,
    number: fn([u8; N]) -> T,
) -> Result<Vec<T>, GgufError> {
    let bytes = cursor.take((count * N) as u64)?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| number(bytes))
        .collect())
}

/// `count` values, which are known to follow.
fn each<'a, T>(
    cursor: &mut Cursor<'a>,
    count: usize,
    one: impl Fn(&mut Cursor<'a>) -> Result<T, GgufError>,
) -> Result<Vec<T>, GgufError> {
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(one(cursor)?);
    }
    Ok(values)
}

/// A truth value. llama.cpp takes every byte but 0 as true; written again, it would be another byte.
fn truth(cursor: &mut Cursor<'_>) -> Result<bool, GgufError> {
    match cursor.array()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [found] => Err(GgufError::NoTruthValue {
            place: cursor.place(),
            found,
        }),
    }
}
