//! A converted checkpoint that is planned, and its writing.

use panacea_formats::{Checkpoint, Dtype, Observer, OutputError};

use super::ConvertError;
use super::write::{Planned, stream};

/// The files that a checkpoint becomes on the other side.
#[derive(Debug)]
pub struct Conversion<'c> {
    pub(super) checkpoint: &'c Checkpoint,
    pub(super) weights: Vec<PlannedFile<'c>>,
    /// Files that are no weights, by name, with their contents.
    pub(super) texts: Vec<(String, String)>,
    /// What the checkpoint says and the output cannot, in words: programs that read it compute without it.
    pub losses: Vec<String>,
    /// How many tensors belong to other towers than the decoder of text, and are left out.
    pub left_out: usize,
}

/// A file of weights.
#[derive(Debug)]
pub(super) struct PlannedFile<'c> {
    pub(super) name: String,
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<Planned<'c>>,
    /// Where each tensor begins in the file.
    pub(super) places: Vec<usize>,
    pub(super) length: usize,
}

impl Conversion<'_> {
    /// The files of weights, with how long each will be.
    pub fn weights(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.weights
            .iter()
            .map(|file| (file.name.as_str(), file.length as u64))
    }

    /// Files that are no weights, by name, with their contents.
    pub fn texts(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        let texts = self.texts.iter();
        texts.map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// Names, types and shapes, outermost dimension first, file after file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let tensors = self.weights.iter().flat_map(|file| &file.tensors);
        tensors.map(|it| (it.name.as_str(), it.dtype, it.shape.as_slice()))
    }

    /// How many bytes all files together will have.
    pub fn bytes(&self) -> u64 {
        let texts = self.texts.iter().map(|(_, text)| text.len() as u64);
        self.weights().map(|(_, length)| length).chain(texts).sum()
    }

    /// Hands the bytes of file number `file` of [`Self::weights`] to `write`, piece by piece.
    ///
    /// # Errors
    /// When a value cannot be held by its type, the source changed, or `write` fails.
    pub fn write(
        &self,
        file: usize,
        observer: &impl Observer,
        mut write: impl FnMut(&[u8]) -> Result<(), OutputError> + Send,
    ) -> Result<(), ConvertError> {
        let Some(file) = self.weights.get(file) else {
            return Ok(());
        };
        write(&file.header)?;
        stream(file, self.checkpoint, observer, &mut write)?;
        self.checkpoint.check_unchanged()?;
        Ok(())
    }
}

/// Divides `items` of some bytes each into groups, in order, each filled as far as it goes. An item that is longer than `most` is alone.
pub(super) fn divided<T>(
    items: impl IntoIterator<Item = T>,
    most: Option<u64>,
    bytes: impl Fn(&T) -> usize,
) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut filled = 0_u64;
    for item in items {
        let length = bytes(&item) as u64;
        match groups.last_mut() {
            Some(group) if most.is_none_or(|most| filled.saturating_add(length) <= most) => {
                filled += length;
                group.push(item);
            }
            _ => {
                filled = length;
                groups.push(vec![item]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_filled_in_order_and_what_is_too_long_is_alone() {
        let cut = |most| divided([3, 4, 9, 1, 1], most, |&it| it);
        assert_eq!(cut(None), [[3, 4, 9, 1, 1]]);
        assert_eq!(cut(Some(7)), [vec![3, 4], vec![9], vec![1, 1]]);
        assert_eq!(cut(Some(0)), [[3], [4], [9], [1], [1]]);
        assert!(divided([0; 0], Some(1), |&it| it).is_empty());
    }
}
