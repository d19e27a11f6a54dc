//! Two renames that the standard library lacks: one that never replaces, and one that swaps.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// Moves `from` to `to` unless something is there.
///
/// # Errors
/// `AlreadyExists` when something is there.
pub(super) fn without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(error) if is_unsupported(error) => without_replacing_in_two_steps(from, to),
        result => Ok(result?),
    }
}

/// Moves `from` to `to`, which exists. A file is simply replaced. A directory is swapped: what was at `to` is then at `from`.
///
/// # Errors
/// When renaming fails. Both are then where they were.
pub(super) fn replacing(from: &Path, to: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(from)?.is_dir() {
        return fs::rename(from, to);
    }
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
        Err(error) if is_unsupported(error) => replacing_in_three_steps(from, to),
        result => Ok(result?),
    }
}

/// Whether the kernel or the file system does not know the flag.
fn is_unsupported(error: Errno) -> bool {
    [Errno::INVAL, Errno::NOSYS, Errno::NOTSUP, Errno::OPNOTSUPP].contains(&error)
}

/// Not atomic for a directory: another process may create `to` between the steps; an empty directory made then is replaced.
fn without_replacing_in_two_steps(from: &Path, to: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(from)?.is_dir() && fs::hard_link(from, to).is_ok() {
        return fs::remove_file(from);
    }
    match fs::symlink_metadata(to) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::rename(from, to),
        Err(error) => Err(error),
    }
}

/// Not atomic: `to` is absent between the second and the third step.
fn replacing_in_three_steps(from: &Path, to: &Path) -> io::Result<()> {
    let mut aside = from.as_os_str().to_owned();
    aside.push(".replaced");
    let aside = Path::new(&aside);
    without_replacing_in_two_steps(to, aside)?;
    if let Err(error) = fs::rename(from, to) {
        fs::rename(aside, to)?;
        return Err(error);
    }
    fs::rename(aside, from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(path: &Path, content: &str) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("content"), content).unwrap();
    }

    #[test]
    fn every_way_of_not_replacing_leaves_both_as_they_were() {
        for rename in [without_replacing, without_replacing_in_two_steps] {
            let root = tempfile::tempdir().unwrap();
            let (from, to) = (root.path().join("from"), root.path().join("to"));
            fs::write(&from, "new").unwrap();
            fs::write(&to, "old").unwrap();
            assert_eq!(
                rename(&from, &to).unwrap_err().kind(),
                io::ErrorKind::AlreadyExists
            );
            assert_eq!(fs::read(&to).unwrap(), b"old");
            assert_eq!(fs::read(&from).unwrap(), b"new");
            fs::remove_file(&to).unwrap();
            rename(&from, &to).unwrap();
            assert_eq!(fs::read(&to).unwrap(), b"new");
            assert!(!from.exists());

            let (from, to) = (root.path().join("a"), root.path().join("b"));
            directory(&from, "new");
            directory(&to, "old");
            assert_eq!(
                rename(&from, &to).unwrap_err().kind(),
                io::ErrorKind::AlreadyExists
            );
            assert_eq!(fs::read(to.join("content")).unwrap(), b"old");
        }
    }

    #[test]
    fn every_way_of_replacing_a_directory_swaps_it() {
        for rename in [replacing, replacing_in_three_steps] {
            let root = tempfile::tempdir().unwrap();
            let (from, to) = (root.path().join("from"), root.path().join("to"));
            directory(&from, "new");
            directory(&to, "old");
            rename(&from, &to).unwrap();
            assert_eq!(fs::read(to.join("content")).unwrap(), b"new");
            assert_eq!(fs::read(from.join("content")).unwrap(), b"old");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
        }
    }
}
