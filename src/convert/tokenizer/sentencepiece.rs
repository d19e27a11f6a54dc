//! The pieces of SentencePiece's `tokenizer.model`.
//!
//! The file is a `ModelProto` in Protocol Buffers' wire format: fields, each a number and a type in one varint, then its value. Only field 1,
//! which there is one of for each piece, is read; the others are stepped over.
//!
//! Source: sentencepiece, `src/sentencepiece_model.proto`, and the wire format at <https://protobuf.dev/programming-guides/encoding/>.

use thiserror::Error;

/// A piece of text with an id: its place in the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// The higher, the sooner it is made.
    pub(super) score: f32,
    pub(super) kind: Kind,
}

/// What a piece is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Why a file is not SentencePiece's.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PiecesError {
    /// A field that goes on behind the end.
    #[error("it ends in the middle of a field")]
    Truncated,
    /// A varint of more than 64 bits.
    #[error("a number has more than 64 bits")]
    LongNumber,
    /// A field of a type that is not in use.
    #[error("a field has the wire type {found}, which there is not")]
    WireType {
        /// The type.
        found: u64,
    },
    /// A field whose value is not of the type that it should be.
    #[error("field {field} of a piece has the wire type {found}")]
    PieceField {
        /// Which field.
        field: u64,
        /// The type of its value.
        found: u64,
    },
    /// A piece whose text is not UTF-8.
    #[error("the text of piece {piece} is not UTF-8")]
    NotText {
        /// Which piece.
        piece: usize,
        /// Where it goes wrong.
        source: std::str::Utf8Error,
    },
    /// A piece of a kind that is not known.
    #[error("piece {piece} is of kind {found}, which there is not")]
    Kind {
        /// Which piece.
        piece: usize,
        /// What it says.
        found: u64,
    },
    /// No piece at all.
    #[error("it holds no pieces")]
    Empty,
}

/// All pieces, in the order of their ids.
///
/// # Errors
/// [`PiecesError`] for the first thing that is wrong.
pub(super) fn pieces(mut file: &[u8]) -> Result<Vec<Piece>, PiecesError> {
    let mut pieces = Vec::new();
    while !file.is_empty() {
        if let (1, Field::Bytes(bytes)) = field(&mut file)? {
            pieces.push(piece(bytes, pieces.len())?);
        }
    }
    if pieces.is_empty() {
        return Err(PiecesError::Empty);
    }
    Ok(pieces)
}

fn piece(mut bytes: &[u8], piece: usize) -> Result<Piece, PiecesError> {
    let mut text = "";
    let mut score = 0.0;
    let mut kind = Kind::Normal;
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, Field::Bytes(found)) => {
                text = std::str::from_utf8(found)
                    .map_err(|source| PiecesError::NotText { piece, source })?;
            }
            (2, Field::Word(bits)) => score = f32::from_bits(bits),
            (3, Field::Varint(found)) => {
                kind = match found {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    _ => return Err(PiecesError::Kind { piece, found }),
                };
            }
            (number @ 1..=3, value) => {
                return Err(PiecesError::PieceField {
                    field: number,
                    found: value.wire_type(),
                });
            }
            _ => {}
        }
    }
    Ok(Piece {
        text: text.to_owned(),
        score,
        kind,
    })
}

/// A field's value, by its wire type.
enum Field<'a> {
    Varint(u64),
    LongWord,
    Bytes(&'a [u8]),
    Word(u32),
}

impl Field<'_> {
    fn wire_type(&self) -> u64 {
        match self {
            Self::Varint(_) => 0,
            Self::LongWord => 1,
            Self::Bytes(_) => 2,
            Self::Word(_) => 5,
        }
    }
}

/// Takes the next field off `rest`: its number and value.
fn field<'a>(rest: &mut &'a [u8]) -> Result<(u64, Field<'a>), PiecesError> {
    let tag = varint(rest)?;
    let value = match tag & 7 {
        0 => Field::Varint(varint(rest)?),
        1 => {
            take(rest, 8)?;
            Field::LongWord
        }
        2 => {
            let length = usize::try_from(varint(rest)?).map_err(|_| PiecesError::Truncated)?;
            Field::Bytes(take(rest, length)?)
        }
        5 => {
            let bytes = take(rest, 4)?.try_into();
            Field::Word(u32::from_le_bytes(
                bytes.map_err(|_| PiecesError::Truncated)?,
            ))
        }
        found => return Err(PiecesError::WireType { found }),
    };
    Ok((tag >> 3, value))
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], PiecesError> {
    let (taken, left) = rest
        .split_at_checked(length)
        .ok_or(PiecesError::Truncated)?;
    *rest = left;
    Ok(taken)
}

/// Seven bits in each byte, the lowest first; the eighth says that there are more.
fn varint(rest: &mut &[u8]) -> Result<u64, PiecesError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, left) = rest.split_first().ok_or(PiecesError::Truncated)?;
        *rest = left;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return Err(PiecesError::LongNumber);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(PiecesError::LongNumber)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 1 (a piece) with text `ab`, score -1.5 and kind 6; a trainer's field to step over; a piece of the text `c` alone.
    const MODEL: &[u8] =
        b"\x0a\x0b\x0a\x02ab\x15\x00\x00\xc0\xbf\x18\x06\x12\x02xy\x0a\x03\x0a\x01c";

    #[test]
    fn pieces_come_with_score_and_kind_or_their_defaults() {
        let piece = |text: &str, score, kind| Piece {
            text: text.to_owned(),
            score,
            kind,
        };
        assert_eq!(
            pieces(MODEL).unwrap(),
            [piece("ab", -1.5, Kind::Byte), piece("c", 0.0, Kind::Normal)]
        );
    }

    #[test]
    fn a_file_cut_anywhere_within_a_field_is_refused() {
        for length in 1..MODEL.len() {
            let whole_fields = [13, 17].contains(&length);
            assert_eq!(pieces(&MODEL[..length]).is_ok(), whole_fields, "{length}");
        }
    }

    #[test]
    fn what_is_no_model_is_told_apart() {
        let error = |bytes: &[u8]| pieces(bytes).unwrap_err();
        assert!(matches!(error(b""), PiecesError::Empty));
        assert!(matches!(error(b"\x0b"), PiecesError::WireType { found: 3 }));
        assert!(matches!(
            error(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
            PiecesError::LongNumber
        ));
        assert!(matches!(
            error(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
            PiecesError::Truncated
        ));
        assert!(matches!(
            error(b"\x0a\x03\x0a\x01\xff"),
            PiecesError::NotText { piece: 0, .. }
        ));
        assert!(matches!(
            error(b"\x0a\x02\x18\x07"),
            PiecesError::Kind { piece: 0, found: 7 }
        ));
        assert!(matches!(
            error(b"\x0a\x02\x08\x07"),
            PiecesError::PieceField { field: 1, found: 0 }
        ));
    }
}
