//! One file of weights, whichever format it has.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::digest::Sha256;
use crate::error::FormatError;
use crate::gguf::GgufFile;
use crate::safetensors::SafetensorsFile;
use crate::tensor::TensorView;

/// A file of named tensors, open and checked.
#[derive(Debug)]
#[non_exhaustive]
pub enum WeightsFile {
    /// In GGUF.
    Gguf(GgufFile),
    /// In safetensors.
    Safetensors(SafetensorsFile),
}

impl WeightsFile {
    /// Opens `path` as GGUF if it is called `.gguf` or begins as such a file does, else as safetensors, whose first bytes cannot be these: they
    /// would be a header's length far above what is read.
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let is_called_so = path.extension().and_then(OsStr::to_str) == Some("gguf");
        match is_called_so || begins_as_gguf(path) {
            true => GgufFile::open(path).map(Self::Gguf),
            false => SafetensorsFile::open(path).map(Self::Safetensors),
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(file) => file.path(),
            Self::Safetensors(file) => file.path(),
        }
    }

    /// The length of the whole file in bytes.
    pub fn length(&self) -> usize {
        self.file_bytes().len()
    }

    /// The whole file.
    pub fn file_bytes(&self) -> &[u8] {
        match self {
            Self::Gguf(file) => file.file_bytes(),
            Self::Safetensors(file) => file.file_bytes(),
        }
    }

    /// Everything before the tensors' bytes, as stored.
    pub fn header_bytes(&self) -> &[u8] {
        match self {
            Self::Gguf(file) => file.header_bytes(),
            Self::Safetensors(file) => file.header_bytes(),
        }
    }

    /// The tensors of known element types, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.placed_tensors().map(|(_, tensor)| tensor)
    }

    /// [`Self::tensors`], each with the place in the file where its bytes start.
    pub(crate) fn placed_tensors(&self) -> impl Iterator<Item = (usize, TensorView<'_>)> {
        let (gguf, safetensors) = match self {
            Self::Gguf(file) => (Some(file.tensors()), None),
            Self::Safetensors(file) => (None, Some(file.tensors())),
        };
        let of_gguf = gguf.into_iter().flatten();
        let of_gguf = of_gguf.filter_map(|tensor| Some((tensor.offset, tensor.view()?)));
        let first = self.header_bytes().len();
        let of_safetensors = safetensors.into_iter().flatten();
        of_gguf.chain(of_safetensors.scan(first, |next, tensor| {
            let offset = *next;
            *next += tensor.bytes.len();
            Some((offset, tensor))
        }))
    }

    /// The tensor called `name`, if its element type is known.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        match self {
            Self::Gguf(file) => file.tensor(name)?.view(),
            Self::Safetensors(file) => file.tensor(name),
        }
    }

    /// The digest of the whole file. Costs one pass over it.
    pub fn digest(&self) -> Sha256 {
        Sha256::of(self.file_bytes())
    }

    /// Whether the file still has the length it was opened with.
    ///
    /// # Errors
    /// When it has another.
    pub fn check_unchanged(&self) -> Result<(), FormatError> {
        match self {
            Self::Gguf(file) => file.check_unchanged(),
            Self::Safetensors(file) => file.check_unchanged(),
        }
    }

    /// Gives the file's pages back to the system, as [`SafetensorsFile::release`] does.
    pub fn release(&self) {
        match self {
            Self::Gguf(file) => file.release(),
            Self::Safetensors(file) => file.release(),
        }
    }
}

/// Whether the file begins with GGUF's magic number. One that cannot be read does not; whoever opens it says why.
fn begins_as_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"GGUF"
}
