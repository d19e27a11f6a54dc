//! Lists of four-byte numbers, in memory or as a file stores them, read alike.

use std::ops::Range;

/// A list of four-byte numbers: a slice, or little-endian bytes of a file at any address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Numbers<'a, T> {
    Memory(&'a [T]),
    Stored(&'a [[u8; 4]]),
}

/// A number that is stored in four bytes.
pub(super) trait FourBytes: Copy {
    fn read(bytes: [u8; 4]) -> Self;
    fn bytes(self) -> [u8; 4];
}

impl FourBytes for f32 {
    fn read(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }

    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl FourBytes for u32 {
    fn read(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }

    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl<'a, T> From<&'a [T]> for Numbers<'a, T> {
    fn from(numbers: &'a [T]) -> Self {
        Self::Memory(numbers)
    }
}

impl<T: FourBytes> Numbers<'_, T> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(numbers) => numbers.len(),
            Self::Stored(bytes) => bytes.len(),
        }
    }

    pub(super) fn number(&self, place: usize) -> T {
        match self {
            Self::Memory(numbers) => numbers[place],
            Self::Stored(bytes) => T::read(bytes[place]),
        }
    }

    /// Appends the bytes of the numbers in `range`.
    pub(super) fn append_to(&self, range: Range<usize>, out: &mut Vec<u8>) {
        match self {
            Self::Memory(numbers) => out.extend(numbers[range].iter().flat_map(|it| it.bytes())),
            Self::Stored(bytes) => out.extend_from_slice(bytes[range].as_flattened()),
        }
    }
}

impl Numbers<'_, f32> {
    pub(super) fn copy_to(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::Memory(numbers) => out.copy_from_slice(&numbers[start..][..out.len()]),
            Self::Stored(bytes) => {
                for (out, &bytes) in out.iter_mut().zip(&bytes[start..]) {
                    *out = f32::from_le_bytes(bytes);
                }
            }
        }
    }

    /// Adds `factor` times the numbers from `start` to `out`.
    pub(super) fn add_to(&self, start: usize, factor: f32, out: &mut [f32]) {
        match self {
            Self::Memory(numbers) => {
                for (out, &number) in out.iter_mut().zip(&numbers[start..]) {
                    *out += factor * number;
                }
            }
            Self::Stored(bytes) => {
                for (out, &bytes) in out.iter_mut().zip(&bytes[start..]) {
                    *out += factor * f32::from_le_bytes(bytes);
                }
            }
        }
    }

    pub(super) fn to_vec(self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.len()];
        self.copy_to(0, &mut numbers);
        numbers
    }

    pub(super) fn first_not_finite(&self) -> Option<usize> {
        match self {
            Self::Memory(numbers) => numbers.iter().position(|number| !number.is_finite()),
            Self::Stored(bytes) => bytes
                .iter()
                .position(|&bytes| !f32::from_le_bytes(bytes).is_finite()),
        }
    }
}

impl Numbers<'_, u32> {
    /// The place of the first index of `element` or more, in a list that ascends.
    pub(super) fn first_from(&self, element: usize) -> usize {
        match self {
            Self::Memory(indices) => indices.partition_point(|&index| (index as usize) < element),
            Self::Stored(bytes) => {
                bytes.partition_point(|&bytes| (u32::from_le_bytes(bytes) as usize) < element)
            }
        }
    }

    /// The first place at which the list does not ascend strictly, or leaves a tensor of `elements`.
    pub(super) fn misplaced(&self, elements: usize) -> Option<Misplaced> {
        let mut before = None;
        (0..self.len()).find_map(|place| {
            let index = self.number(place);
            let after = before.replace(index);
            let sound = after.is_none_or(|after| after < index) && (index as usize) < elements;
            (!sound).then_some(Misplaced {
                place,
                index,
                after,
            })
        })
    }
}

/// An index that cannot stand where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Misplaced {
    pub(super) place: usize,
    pub(super) index: u32,
    /// The one before it.
    pub(super) after: Option<u32>,
}
