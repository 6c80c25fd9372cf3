//! Files and folders that are either whole or not there.
//!
//! Everything this program writes is written beside its destination, flushed to the disk and renamed: a reader, a
//! killed run or a full disk never meets half a file. Files are world-readable (mode 644), as other tools expect.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::beside::{
    NEW, OLD, PART, beside, create, folder_of, hold, leftovers, missing_folders, remove_empty, remove_leftovers, tidy,
};

/// Calls `write` with a temporary path beside `path`, then moves what it wrote (a file or a folder) to `path`.
/// A file that exists there is replaced; a folder that exists there is not.
///
/// # Errors
/// What `write` returned, or one line when the disk is full or the folder cannot be written. Nothing is left over.
pub fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    path.file_name().with_context(|| format!("`{}` does not name a file", path.display()))?;
    let (folder, part) = (folder_of(path), beside(path, PART));
    let made = missing_folders(folder);
    let written = fs::create_dir_all(folder)
        .with_context(|| format!("cannot create the folder {}", folder.display()))
        .and_then(|()| write(&part))
        .and_then(|()| settle(&part).with_context(|| format!("cannot write {}", path.display())))
        .and_then(|()| fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display())));
    if let Err(error) = written {
        // Whichever of the two it is; if neither can be removed, the error that matters is still the first one.
        let _ = fs::remove_file(&part).or_else(|_| fs::remove_dir_all(&part));
        remove_empty(&made);
        return Err(at_place(error, path));
    }
    flush_renames(folder);
    Ok(())
}

/// A rename lasts once the folder is flushed; a file system that cannot do that is no reason to fail.
pub fn flush_renames(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Writes a file through [`write_atomically`], held while it is written, so that nobody takes it for a leftover.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_file(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let mut held = None;
    write_atomically(path, |part| {
        let file = create(part).with_context(|| format!("cannot write {}", path.display()))?;
        write(held.insert(file))
    })
}

/// Writes `bytes` to `path` through [`write_file`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |mut file| file.write_all(bytes).with_context(|| format!("cannot write {}", path.display())))
}

/// Writes a new folder through [`write_atomically`], held while it is written. `write` fills the folder that it is given.
///
/// # Errors
/// As [`write_atomically`]; a folder is at `path` already.
pub fn write_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    remove_leftovers(path, PART);
    let mut held = None;
    let written = write_atomically(path, |part| {
        fs::create_dir(part).with_context(|| format!("cannot create {}", path.display()))?;
        held = hold(part);
        write(part)
    });
    drop(held);
    written
}

/// As [`write_folder`], and replaces a folder that is there: the new one is whole on the disk before two renames put it in
/// the place of the old. A process that is killed between them leaves both beside, and `beside::tidy` puts one back. Where
/// `path` is a link to a folder, that folder is replaced, and the link stays.
///
/// # Errors
/// As [`write_folder`]; the old folder is there then.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let target = path.is_symlink().then(|| path.canonicalize().ok()).flatten();
    let path = target.as_deref().unwrap_or(path);
    let ours = leftovers(folder_of(path)).into_iter().any(|(_, place, _)| place.file_name() == path.file_name());
    if ours {
        tidy(folder_of(path));
    }
    if !path.exists() {
        return write_folder(path, write);
    }
    let (new, old) = (beside(path, NEW), beside(path, OLD));
    write_folder(&new, write).map_err(|error| at_place(error, path))?;
    let context = || format!("cannot replace {}", path.display());
    fs::rename(path, &old).with_context(context)?;
    if let Err(error) = fs::rename(&new, path) {
        fs::rename(&old, path).with_context(|| format!("cannot put back {}", path.display()))?;
        return Err(error).with_context(context);
    }
    flush_renames(folder_of(path));
    fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))
}

/// A disk or a quota is full. Of nested writes the outermost names its path: the inner ones are temporary.
#[derive(Debug, thiserror::Error)]
#[error("no space left for {}: nothing was written; free some space there and run again", path.display())]
struct NoSpace {
    path: PathBuf,
}

/// What went wrong with a file that was to become `path`, told of `path` where the disk is full.
pub fn at_place(error: anyhow::Error, path: &Path) -> anyhow::Error {
    if is_full_disk(&error) { NoSpace { path: path.to_owned() }.into() } else { error }
}

/// Whether an error comes, at the bottom, from a disk or a quota that is full.
pub fn is_full_disk(error: &anyhow::Error) -> bool {
    error.is::<NoSpace>()
        || error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            )
        })
}

/// Removes a file, or a folder: out of sight first, so that half of one is never taken for a whole.
///
/// # Errors
/// It can't be moved or removed.
pub fn remove(path: &Path) -> Result<()> {
    let context = || format!("cannot remove {}", path.display());
    if !path.is_dir() {
        return fs::remove_file(path).with_context(context);
    }
    let aside = beside(path, PART);
    fs::rename(path, &aside).with_context(context)?;
    fs::remove_dir_all(&aside).with_context(context)
}

/// Flushes to the disk and makes readable for everybody, a folder with all that is in it.
pub(crate) fn settle(path: &Path) -> io::Result<()> {
    // What a link names is somebody else's.
    if path.is_symlink() {
        return Ok(());
    }
    let folder = path.is_dir();
    if folder {
        for entry in fs::read_dir(path)? {
            settle(&entry?.path())?;
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(if folder { 0o755 } else { 0o644 }))?;
    }
    if folder { Ok(()) } else { File::open(path)?.sync_all() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_full_disk_is_one_line_and_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        write_bytes(&path, b"old").unwrap();
        let error = write_atomically(&path, |part| {
            fs::write(part, b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull)).context("cannot write")
        })
        .unwrap_err();
        assert!(format!("{error:#}").starts_with("no space left for "), "{error:#}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names_in(folder.path()), ["weights.safetensors"]);

        // A file within a folder that is itself written beside its place: the message names the place.
        let model = folder.path().join("model");
        let error = write_atomically(&model, |part| {
            write_atomically(&part.join("unet/a"), |_| Err(io::Error::from(io::ErrorKind::StorageFull).into()))
        })
        .unwrap_err();
        let message = format!("{error:#}");
        assert!(message.starts_with(&format!("no space left for {}:", model.display())), "{message}");
        assert_eq!(names_in(folder.path()), ["weights.safetensors"]);
    }

    #[test]
    fn a_folder_is_moved_whole_and_never_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let make = |part: &Path| {
            fs::create_dir(part)?;
            fs::write(part.join("config.json"), b"{}").context("config.json")
        };
        write_atomically(&path, make).unwrap();
        assert_eq!(names_in(&path), ["config.json"]);
        assert!(write_atomically(&path, make).is_err());
        assert_eq!(names_in(folder.path()), ["model"]);
    }

    #[test]
    #[cfg(unix)]
    fn files_are_readable_by_everybody() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_bytes(&path, b"values").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }
}
