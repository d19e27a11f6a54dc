//! SHA-256 digests: of bytes, of a file, of a stream.
//!
//! A digest is written as 64 lowercase hexadecimal digits everywhere: in messages, in JSON, in metadata. Only that spelling is
//! read back, so that two equal digests are equal strings too.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;
use thiserror::Error;

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digest of everything that `reader` yields. One piece of 1 MiB is read while the one before is hashed.
    ///
    /// # Errors
    /// Whatever `reader` fails with.
    pub fn of_reader(mut reader: impl Read + Send) -> io::Result<Self> {
        // Inside of rayon's threads at once, rather than on the way to them for each piece.
        rayon::scope(|_| {
            let mut hasher = Hasher::new();
            let (mut hashed, mut read) = (vec![0; PIECE], vec![0; PIECE]);
            let mut length = read_some(&mut reader, &mut read)?;
            while length > 0 {
                std::mem::swap(&mut hashed, &mut read);
                let (next, ()) = rayon::join(
                    || read_some(&mut reader, &mut read),
                    || hasher.update(&hashed[..length]),
                );
                length = next?;
            }
            Ok(hasher.finish())
        })
    }

    /// The digest of the file at `path`, as it is while it is read.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::of_reader(File::open(path)?)
    }

    /// The 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sha256({self})")
    }
}

impl FromStr for Sha256 {
    type Err = DigestParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 64 {
            return Err(DigestParseError::Length { found: text.len() });
        }
        if let Some(found) = text.chars().find(|c| !matches!(c, '0'..='9' | 'a'..='f')) {
            return Err(DigestParseError::Digit { found });
        }
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest)
            .map_err(|_| DigestParseError::Length { found: text.len() })?;
        Ok(Self(digest))
    }
}

impl Serialize for Sha256 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a text is not a SHA-256 digest.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DigestParseError {
    /// Not 64 characters long.
    #[error("a SHA-256 digest has 64 hexadecimal digits, and this has {found} bytes")]
    Length {
        /// The length in bytes.
        found: usize,
    },
    /// A character that is not a lowercase hexadecimal digit.
    #[error("a SHA-256 digest has lowercase hexadecimal digits, and this has {found:?}")]
    Digit {
        /// The first such character.
        found: char,
    },
}

/// A digest in the making.
#[derive(Clone, Debug, Default)]
pub struct Hasher(sha2::Sha256);

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `bytes` to what is hashed.
    pub fn update(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks(FETCHED) {
            fetch(bytes);
            self.0.update(bytes);
        }
    }

    /// The digest of everything added.
    pub fn finish(self) -> Sha256 {
        Sha256(self.0.finalize().into())
    }
}

/// How much of `piece` was filled; nothing at the end.
fn read_some(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Reads a byte of every cache line of `bytes`, so that all of them are on their way before the first is needed.
///
/// A hash goes through memory so slowly that the processor does not fetch far ahead of it, and then waits for every line.
fn fetch(bytes: &[u8]) {
    let lines = bytes.iter().step_by(CACHE_LINE);
    std::hint::black_box(lines.fold(0, |seen, byte| seen ^ byte));
}

/// Bytes fetched at once: as many lines as a core has requests under way, and a multiple of the hash's block.
const FETCHED: usize = 1 << 10;

/// The usual length of a line. Where lines are longer, some are asked for twice, which costs nothing.
const CACHE_LINE: usize = 64;

/// Bytes read at once: large enough that the system call costs nothing beside the hash.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-4's example, "abc".
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn agrees_with_the_standard_example_however_the_bytes_arrive() {
        assert_eq!(Sha256::of(b"abc").to_string(), ABC);
        let mut hasher = Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.finish().to_string(), ABC);
        assert_eq!(Sha256::of_reader(&b"abc"[..]).unwrap().to_string(), ABC);
    }

    #[test]
    fn hashes_a_file_longer_than_one_piece() {
        let bytes = vec![7; PIECE + 3];
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(Sha256::of_file(file.path()).unwrap(), Sha256::of(&bytes));
    }

    #[test]
    fn reads_back_only_what_it_writes() {
        assert_eq!(ABC.parse::<Sha256>().unwrap(), Sha256::of(b"abc"));
        assert_eq!(
            ABC[1..].parse::<Sha256>(),
            Err(DigestParseError::Length { found: 63 })
        );
        assert_eq!(
            ABC.to_uppercase().parse::<Sha256>(),
            Err(DigestParseError::Digit { found: 'B' })
        );
        let json = serde_json::to_string(&Sha256::of(b"abc")).unwrap();
        assert_eq!(json, format!("\"{ABC}\""));
        assert_eq!(
            serde_json::from_str::<Sha256>(&json).unwrap(),
            Sha256::of(b"abc")
        );
    }
}
