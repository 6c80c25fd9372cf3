//! Renames that the standard library lacks: two names exchanged at once, and never onto what is there.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Exchanges what two names stand for, so that both are there at every instant; false where the system, or this disk,
/// cannot do that, and then nothing is done.
///
/// # Errors
/// One of them is not there, or the folder cannot be written.
pub fn exchange(first: &Path, second: &Path) -> io::Result<bool> {
    with_flags(first, second, Flags::Exchange)
}

/// Renames `from` to `to`, and never replaces what is there, be it a link or an empty folder.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] where something is; the system's.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    if with_flags(from, to, Flags::New)? {
        return Ok(());
    }
    if fs::symlink_metadata(to).is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

enum Flags {
    Exchange,
    New,
}

/// Whether it was done; false where it cannot be.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn with_flags(from: &Path, to: &Path, flags: Flags) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    let flags = match flags {
        Flags::Exchange => RenameFlags::EXCHANGE,
        Flags::New => RenameFlags::NOREPLACE,
    };
    match renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn with_flags(_from: &Path, _to: &Path, _flags: Flags) -> io::Result<bool> {
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_exchanged_and_never_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let text = |name: &str| fs::read_to_string(path(name)).unwrap();
        fs::write(path("a"), "1").unwrap();
        fs::write(path("b"), "2").unwrap();
        if exchange(&path("a"), &path("b")).unwrap() {
            assert_eq!((text("a"), text("b")), ("2".into(), "1".into()));
        }
        assert!(exchange(&path("a"), &path("none")).is_err() || !cfg!(target_os = "linux"));
        fs::create_dir(path("empty")).unwrap();
        for to in ["b", "empty"] {
            assert_eq!(rename_new(&path("a"), &path(to)).unwrap_err().kind(), ErrorKind::AlreadyExists, "{to}");
        }
        rename_new(&path("a"), &path("c")).unwrap();
        assert!(path("c").exists() && !path("a").exists());
    }
}
