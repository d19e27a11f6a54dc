//! A place in a file that moves on only as far as the file goes.

use super::error::{GgufError, Place};

/// Where reading stands, and what is being read there.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    /// Never behind the end.
    at: usize,
    /// For errors.
    pub(super) place: Reading<'a>,
}

/// What is being read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reading<'a> {
    Header,
    Key(&'a str),
    Tensor(&'a str),
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self {
            file,
            at: 0,
            place: Reading::Header,
        }
    }

    /// The offset in the file.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The same file from the offset `at` on, where this cursor was before.
    pub(super) fn reread(&self, at: usize) -> Self {
        Self {
            at: at.min(self.at),
            ..self.clone()
        }
    }

    pub(super) fn remaining(&self) -> usize {
        self.file.len() - self.at
    }

    /// What is being read, to keep in an error.
    pub(super) fn place(&self) -> Place {
        match self.place {
            Reading::Header => Place::Header,
            Reading::Key(key) => Place::Key(key.to_owned()),
            Reading::Tensor(name) => Place::Tensor(name.to_owned()),
        }
    }

    /// The next `length` bytes.
    pub(super) fn take(&mut self, length: u64) -> Result<&'a [u8], GgufError> {
        let taken = usize::try_from(length)
            .ok()
            .and_then(|length| self.file[self.at..].get(..length));
        let Some(taken) = taken else {
            return Err(GgufError::PastEnd {
                place: self.place(),
                offset: self.at,
                needed: length,
                remaining: self.remaining(),
            });
        };
        self.at += taken.len();
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things that take at least `least_bytes` each, as many as can still follow.
    pub(super) fn count(
        &mut self,
        things: &'static str,
        least_bytes: usize,
    ) -> Result<usize, GgufError> {
        let claimed = self.u64()?;
        self.fits(claimed, things, least_bytes)
    }

    /// `claimed`, if so many things of at least `least_bytes` can still follow.
    pub(super) fn fits(
        &self,
        claimed: u64,
        things: &'static str,
        least_bytes: usize,
    ) -> Result<usize, GgufError> {
        usize::try_from(claimed)
            .ok()
            .filter(|&count| count <= self.remaining() / least_bytes)
            .ok_or_else(|| GgufError::CountPastEnd {
                place: self.place(),
                things,
                claimed,
                remaining: self.remaining(),
            })
    }

    /// A text behind its length, not yet known to be one.
    pub(super) fn text_bytes(&mut self) -> Result<&'a [u8], GgufError> {
        let length = self.u64()?;
        self.take(length)
    }

    /// A text behind its length.
    pub(super) fn text(&mut self) -> Result<&'a str, GgufError> {
        let bytes = self.text_bytes()?;
        std::str::from_utf8(bytes).map_err(|error| GgufError::NotUtf8 {
            place: self.place(),
            offset: self.at - bytes.len() + error.valid_up_to(),
        })
    }
}
