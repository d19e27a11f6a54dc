//! A file that is hashed as it is written.
//!
//! In: the bytes of a new file, in order: a few at a time, or, of a large file, in [`Block`]s, which a thread of the file's own
//! writes while the caller makes the next. Out: the file's length and digest, once all of it is on the disk.
//!
//! Blocks go past the page cache where the file system lets them (`O_DIRECT`): the kernel copies nothing, the flush at the end
//! has nothing left to do, and gigabytes of output push nothing else out of memory. Whoever reads the file next reads it
//! from the disk.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::{OutputError, WrittenFile};
use crate::digest::Hasher;

/// A new file that is hashed as it is written.
#[derive(Debug)]
pub struct HashedFile {
    file: File,
    hasher: Hasher,
    bytes: u64,
    /// Where the next block begins: behind all that were handed out.
    next_block: u64,
    /// Of a file that is written in blocks.
    writer: Option<Writer>,
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
            next_block: 0,
            writer: None,
            name,
            output,
        }
    }

    /// Appends `bytes`. Unbuffered: meant for large pieces.
    ///
    /// # Errors
    /// When they, or blocks before them, cannot be written.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        self.settle()?;
        self.file
            .write_all(bytes)
            .map_err(|error| OutputError::new(&self.output, error))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.next_block = self.bytes;
        Ok(())
    }

    /// Room for the next `length` bytes of the file, at most `capacity`, which is the same for all blocks of a file. Waits while
    /// three are in use.
    ///
    /// # Errors
    /// When an earlier block could not be written.
    pub(crate) fn block(&mut self, length: usize, capacity: usize) -> Result<Block, OutputError> {
        if self.writer.is_none() {
            let writer = Writer::start(&self.file, self.bytes)
                .map_err(|error| OutputError::new(&self.output, error))?;
            self.writer = Some(writer);
        }
        let room = self.writer.as_mut().and_then(|it| it.room(capacity));
        let Some(room) = room else {
            return Err(self.failed());
        };
        let block = Block::new(room, self.next_block, length);
        self.next_block += length as u64;
        Ok(block)
    }

    /// Hashes the bytes of `block`, which comes after those hashed before.
    pub(crate) fn hash_block(&mut self, block: &Block) {
        self.hasher.update(block.bytes());
    }

    /// Appends `block`, which is hashed. It is written in the background.
    ///
    /// # Errors
    /// When an earlier one could not be written.
    pub(crate) fn write_block(&mut self, block: Block) -> Result<(), OutputError> {
        self.bytes += block.length as u64;
        match &self.writer {
            Some(writer) if writer.write(block) => Ok(()),
            _ => Err(self.failed()),
        }
    }

    /// Waits until every block is written.
    ///
    /// # Errors
    /// When one could not be.
    pub(crate) fn settle(&mut self) -> Result<(), OutputError> {
        self.writer
            .take()
            .map_or(Ok(()), |mut writer| writer.finish())
            .map_err(|error| OutputError::new(&self.output, error))
    }

    /// What was hashed so far, so that a digest of other bytes with the same beginning need not begin again.
    pub(crate) fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    /// Flushes the file to the disk and tells what is in it.
    ///
    /// # Errors
    /// When a block could not be written, or flushing fails.
    pub fn finish(mut self) -> Result<WrittenFile, OutputError> {
        self.settle()?;
        self.file
            .sync_all()
            .map_err(|error| OutputError::new(&self.output, error))?;
        Ok(WrittenFile {
            name: self.name,
            bytes: self.bytes,
            sha256: self.hasher.finish(),
        })
    }

    /// Why the writer takes no more blocks.
    fn failed(&mut self) -> OutputError {
        match self.settle() {
            Err(error) => error,
            Ok(()) => OutputError::new(&self.output, io::Error::other("it is written no more")),
        }
    }
}

/// Room for some bytes of a file, which begins in memory as far from a sector's start as it will in the file.
#[derive(Debug)]
pub(crate) struct Block {
    room: Vec<u8>,
    /// Where the first sector begins in `room`.
    aligned: usize,
    /// Bytes of the first sector that belong to the block before.
    lead: usize,
    length: usize,
}

impl Block {
    fn new(room: Vec<u8>, offset: u64, length: usize) -> Self {
        // Exact for bytes. Were it not, direct output would be refused and the block written as any other.
        let aligned = room.as_ptr().align_offset(SECTOR).min(SECTOR);
        #[expect(clippy::cast_possible_truncation, reason = "less than a sector")]
        let lead = (offset % SECTOR as u64) as usize;
        Self {
            room,
            aligned,
            lead,
            length,
        }
    }

    /// The block's bytes, zero or those of an earlier block until they are written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.room[self.aligned + self.lead..][..self.length]
    }

    /// The block's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.room[self.aligned + self.lead..][..self.length]
    }

    /// The sectors that `tail`, which ends the block before, and this block fill, and what is left of them.
    fn sectors(&mut self, tail: &[u8]) -> (&[u8], &[u8]) {
        self.room[self.aligned..][..tail.len()].copy_from_slice(tail);
        let bytes = &self.room[self.aligned..][..tail.len() + self.length];
        bytes.split_at(bytes.len() - bytes.len() % SECTOR)
    }
}

/// A thread that writes blocks. Dropping it waits for those that it has, so that nothing grows while it is deleted.
#[derive(Debug)]
struct Writer {
    /// Nothing when it was finished.
    full: Option<Sender<Block>>,
    empty: Receiver<Block>,
    /// How many blocks there are.
    blocks: usize,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Writer {
    /// Writes to `file` from `offset` on, where it ends.
    fn start(file: &File, offset: u64) -> io::Result<Self> {
        let file = Output::new(file.try_clone()?, offset);
        let (full, to_write) = channel();
        let (written, empty) = channel();
        let thread = thread::Builder::new()
            .name("write".to_owned())
            .spawn(move || file.write_blocks(&to_write, &written))?;
        Ok(Self {
            full: Some(full),
            empty,
            blocks: 0,
            thread: Some(thread),
        })
    }

    /// Room for a block, of one that was written if there are enough; nothing when the thread has failed.
    fn room(&mut self, capacity: usize) -> Option<Vec<u8>> {
        // A sector for the bytes of the block before, and one to begin at a sector's start.
        let needed = capacity + 2 * SECTOR;
        if self.blocks < BLOCKS {
            self.blocks += 1;
            return Some(vec![0; needed]);
        }
        let mut room = self.empty.recv().ok()?.room;
        if room.len() < needed {
            room = vec![0; needed];
        }
        Some(room)
    }

    /// Whether `block` will be written unless the disk refuses it; not when it refused an earlier one.
    fn write(&self, block: Block) -> bool {
        self.full
            .as_ref()
            .is_some_and(|full| full.send(block).is_ok())
    }

    /// Waits until everything is written.
    fn finish(&mut self) -> io::Result<()> {
        self.full = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(written)) => written,
            Some(Err(_)) => Err(io::Error::other("the thread that writes it has panicked")),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // An output that is dropped is deleted, whatever became of it.
        let _ = self.finish();
    }
}

/// A file as its writer sees it.
struct Output {
    file: File,
    direct: bool,
    /// The end of the last block, which fills no sector.
    tail: Vec<u8>,
}

impl Output {
    fn new(file: File, offset: u64) -> Self {
        // From the middle of a sector on nothing can be written directly.
        let direct = offset.is_multiple_of(SECTOR as u64) && direct::set(&file, true).is_ok();
        Self {
            file,
            direct,
            tail: Vec::with_capacity(SECTOR),
        }
    }

    fn write_blocks(mut self, blocks: &Receiver<Block>, written: &Sender<Block>) -> io::Result<()> {
        for mut block in blocks {
            if self.direct {
                let (sectors, rest) = block.sectors(&self.tail);
                self.direct = write_directly(&mut self.file, sectors)?;
                self.tail.clear();
                self.tail.extend_from_slice(rest);
                if !self.direct {
                    self.write_tail()?;
                }
            } else {
                self.file.write_all(block.bytes())?;
            }
            // Nobody wants it back after the last one.
            let _ = written.send(block);
        }
        self.write_tail()
    }

    /// Writes what fills no sector, as any other bytes.
    fn write_tail(&mut self) -> io::Result<()> {
        if self.direct {
            direct::set(&self.file, false)?;
            self.direct = false;
        }
        self.file.write_all(&std::mem::take(&mut self.tail))
    }
}

/// Writes `sectors` to `file`, which is in direct mode, and says whether it still is: some file systems take the mode and refuse
/// the bytes, and a full one can stop in the middle of a sector.
fn write_directly(file: &mut File, mut sectors: &[u8]) -> io::Result<bool> {
    while !sectors.is_empty() {
        match file.write(sectors) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => sectors = &sectors[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                direct::set(file, false)?;
                file.write_all(sectors)?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(target_os = "linux")]
mod direct {
    use std::fs::File;
    use std::io;

    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

    /// Has `file` written past the page cache, or not.
    pub(super) fn set(file: &File, direct: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(file)?;
        flags.set(OFlags::DIRECT, direct);
        Ok(fcntl_setfl(file, flags)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod direct {
    use std::fs::File;
    use std::io;

    pub(super) fn set(_: &File, direct: bool) -> io::Result<()> {
        match direct {
            true => Err(io::ErrorKind::Unsupported.into()),
            false => Ok(()),
        }
    }
}

/// What memory, offsets and lengths of direct output are multiples of: the largest sector in use.
const SECTOR: usize = 4096;

/// Blocks of a file: one is made, one hashed and one written at the same time.
const BLOCKS: usize = 3;

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::path::Path;

    use super::*;
    use crate::digest::Sha256;

    fn new(path: &Path) -> HashedFile {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .unwrap();
        HashedFile::new(file, "f".to_owned(), path.to_owned())
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        (0..length).map(|_| next()).collect()
    }

    /// Blocks of these lengths, with a few bytes written otherwise before and after them.
    fn written(before: usize, lengths: &[usize], after: usize) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let bytes = noise(before + lengths.iter().sum::<usize>() + after);
        let mut file = new(&path);
        file.write_all(&bytes[..before]).unwrap();
        let capacity = lengths.iter().copied().max().unwrap_or(0);
        let mut begin = before;
        for &length in lengths {
            let mut block = file.block(length, capacity).unwrap();
            block.bytes_mut().copy_from_slice(&bytes[begin..][..length]);
            file.hash_block(&block);
            file.write_block(block).unwrap();
            begin += length;
        }
        file.write_all(&bytes[begin..]).unwrap();
        let told = file.finish().unwrap();
        assert!(fs::read(&path).unwrap() == bytes, "{before} {lengths:?}");
        let found = (told.bytes, told.sha256);
        assert_eq!(found, (bytes.len() as u64, Sha256::of(&bytes)));
    }

    #[test]
    fn blocks_of_any_length_end_up_one_after_the_other() {
        for before in [0, 1, SECTOR, SECTOR + 1] {
            for lengths in [
                &[][..],
                &[1],
                &[SECTOR - 1, 1, SECTOR + 1],
                &[3 * SECTOR, 5, 7, 2 * SECTOR - 12, 0, 9],
                &[100, 200, 300, 400, 500, 600, 9000, 10],
            ] {
                for after in [0, 1, SECTOR] {
                    written(before, lengths, after);
                }
            }
        }
    }

    #[test]
    fn what_direct_output_refuses_is_written_as_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let bytes = noise(2 * SECTOR + 3);
        let mut file = File::create(&path).unwrap();
        let _ = direct::set(&file, true);
        // An address and a length that are no multiples of a sector.
        let begin = 1 + bytes.as_ptr().align_offset(2);
        write_directly(&mut file, &bytes[begin..]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), &bytes[begin..]);
    }

    #[test]
    fn a_failure_of_the_writer_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        fs::write(&path, b"").unwrap();
        // Opened to be read, so that every write fails.
        let file = File::open(&path).unwrap();
        let mut file = HashedFile::new(file, "f".to_owned(), path);
        let mut result = Ok(());
        for _ in 0..=BLOCKS {
            result = file
                .block(SECTOR, SECTOR)
                .and_then(|block| file.write_block(block));
            if result.is_err() {
                break;
            }
        }
        let error = result.unwrap_err();
        assert!(error.is_environment());
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(reason.contains("Bad file descriptor"), "{reason}");
    }
}
