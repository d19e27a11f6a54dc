//! A file that is hashed as it is written, and on its way to the disk before it ends.
//!
//! In: pieces of a new file, in order. Out: its length and digest, once all of it is on the disk. A large file is flushed behind
//! the writer, by a thread that mostly waits for the disk, so that the flush at the end has little left to do.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use super::{OutputError, WrittenFile};
use crate::digest::Hasher;

/// A new file that is hashed as it is written.
#[derive(Debug)]
pub struct HashedFile {
    file: File,
    hasher: Hasher,
    bytes: u64,
    /// How much of it the flusher was told of.
    told: u64,
    /// Of a large file.
    flusher: Option<Flusher>,
    name: String,
    /// Names the output in errors.
    output: PathBuf,
}

impl HashedFile {
    pub(super) fn new(file: File, name: String, output: PathBuf) -> Self {
        Self {
            file,
            hasher: Hasher::new(),
            bytes: 0,
            told: 0,
            flusher: None,
            name,
            output,
        }
    }

    /// Appends `bytes`. Unbuffered: meant for large pieces.
    ///
    /// # Errors
    /// When they cannot be written, or earlier ones did not reach the disk.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        let written = write(&mut self.file, &[bytes]);
        self.hasher.update(bytes);
        self.advance(written)
    }

    /// Appends `pieces` one after the other, hashing them on one of rayon's threads while another writes.
    ///
    /// # Errors
    /// As [`HashedFile::write_all`].
    pub fn write_pieces(&mut self, pieces: &[&[u8]]) -> Result<(), OutputError> {
        let (file, hasher) = (&mut self.file, &mut self.hasher);
        let (written, ()) = rayon::join(
            || write(file, pieces),
            || pieces.iter().for_each(|piece| hasher.update(piece)),
        );
        self.advance(written)
    }

    /// What was hashed so far, so that a digest of other bytes with the same beginning need not begin again.
    pub(crate) fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    /// Flushes the file to the disk and tells what is in it.
    ///
    /// # Errors
    /// When flushing fails.
    pub fn finish(mut self) -> Result<WrittenFile, OutputError> {
        let flushed = self.flusher.take().map_or(Ok(()), Flusher::finish);
        flushed
            .and_then(|()| self.file.sync_all())
            .map_err(|error| OutputError::new(&self.output, error))?;
        Ok(WrittenFile {
            name: self.name,
            bytes: self.bytes,
            sha256: self.hasher.finish(),
        })
    }

    /// Takes in how the writing of some bytes went, and has a large file flushed from time to time.
    fn advance(&mut self, written: io::Result<u64>) -> Result<(), OutputError> {
        written
            .and_then(|bytes| {
                self.bytes += bytes;
                match self.bytes - self.told >= FLUSHED_EVERY {
                    true => self.flush_behind(),
                    false => Ok(()),
                }
            })
            .map_err(|error| OutputError::new(&self.output, error))
    }

    fn flush_behind(&mut self) -> io::Result<()> {
        self.told = self.bytes;
        let flusher = match self.flusher.take() {
            Some(flusher) => Some(flusher),
            // Without the thread the file is merely flushed later.
            None => Flusher::start(&self.file).ok(),
        };
        self.flusher = flusher.map(Flusher::flush).transpose()?;
        Ok(())
    }
}

/// Returns how many bytes there were.
fn write(file: &mut File, pieces: &[&[u8]]) -> io::Result<u64> {
    let mut bytes = 0;
    for piece in pieces {
        file.write_all(piece)?;
        bytes += piece.len() as u64;
    }
    Ok(bytes)
}

/// A thread that flushes a file whenever it is told to.
///
/// An error of the disk is told once to each open file, and the thread shares the writer's: what it is told must not be lost.
#[derive(Debug)]
struct Flusher {
    due: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (due, requests) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("flush".to_owned())
            .spawn(move || requests.iter().try_for_each(|()| file.sync_data()))?;
        Ok(Self { due, thread })
    }

    /// Asks for a flush of what was written until now, and waits for nothing.
    ///
    /// # Errors
    /// When an earlier one failed.
    fn flush(self) -> io::Result<Self> {
        match self.due.try_send(()) {
            // One that is due already will do.
            Ok(()) | Err(TrySendError::Full(())) => Ok(self),
            Err(TrySendError::Disconnected(())) => {
                self.finish()?;
                Err(io::Error::other("the file is flushed no more"))
            }
        }
    }

    /// Waits for the flushes that were asked for.
    fn finish(self) -> io::Result<()> {
        drop(self.due);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Bytes after which a file is flushed: so many that a disk's own flush costs little beside them, and so few that little is left
/// at the end.
const FLUSHED_EVERY: u64 = 128 << 20;
