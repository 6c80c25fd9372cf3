//! The weights of a compiled model: the package's own files, byte by byte.
//!
//! They are often gigabytes, so they are shared with the package where the disk can: as a copy that takes no room until one of
//! the two changes (a reflink: APFS, Btrfs, XFS, bcachefs), else as one file under two names (a hard link). That is safe with
//! what Palettist does: it never changes a file in its place, it writes anew and renames. Where neither is to be had, the
//! bytes are copied.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::source::Source;
use crate::coreml::format::proto::{BindingKind, Operation, Value, ValueKind};

/// What the names of files of weights begin with in a program.
const PREFIX: &str = "@model_path/weights/";

/// How a compiled model came by its weights. Of several files, the one that shares least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shared {
    /// There are none.
    #[default]
    None,
    /// A copy that takes no room until it, or the package's file, is changed.
    Reflink,
    /// One file under two names.
    HardLink,
    /// A copy.
    Copy,
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no weights",
            Self::Reflink => "weights shared with the package (reflink)",
            Self::HardLink => {
                "weights are the package's own file under a second name (hard link): do not edit it in place"
            }
            Self::Copy => "weights copied",
        })
    }
}

/// Checks that the files are there that the program refers to, and reach as far.
pub fn check(source: &Source, files: &[PathBuf]) -> Result<()> {
    let mut wanted: BTreeSet<(&str, u64)> = BTreeSet::new();
    for function in source.program.functions.values() {
        for operation in function.block_specializations.values().flat_map(|block| &block.operations) {
            for value in values(operation) {
                if let Some(ValueKind::BlobFile(place)) = &value.kind {
                    wanted.insert((&place.file_name, place.offset));
                }
            }
        }
    }
    for (name, offset) in wanted {
        let Some(name) = name.strip_prefix(PREFIX) else { bail!("the file of weights {name:?} is not in {PREFIX}") };
        let named = |path: &&PathBuf| path.file_name().is_some_and(|found| found == name);
        let Some(file) = files.iter().find(named) else { bail!("its file of weights {name:?} is missing") };
        let length = fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?.len();
        ensure!(offset < length, "a value lies at {offset} in {}, which has {length} bytes", file.display());
    }
    Ok(())
}

fn values(operation: &Operation) -> impl Iterator<Item = &Value> {
    let bindings = operation.inputs.values().flat_map(|argument| &argument.arguments);
    let in_place = bindings.filter_map(|binding| match &binding.binding {
        Some(BindingKind::Value(value)) => Some(value),
        _ => None,
    });
    operation.attributes.values().chain(in_place)
}

/// Puts `files` into the new folder `folder`. `progress` hears how many bytes of how many are copied.
pub fn share(files: &[PathBuf], folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Shared> {
    if files.is_empty() {
        return Ok(Shared::None);
    }
    fs::create_dir(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let lengths = files.iter().map(|file| Ok(fs::metadata(file)?.len())).collect::<Result<Vec<u64>>>()?;
    let (mut done, total) = (0, lengths.iter().sum());
    let mut least = Shared::None;
    for (file, length) in files.iter().zip(lengths) {
        let to = folder.join(file.file_name().context("a file of weights has no name")?);
        let how = if reflink(file, &to) {
            Shared::Reflink
        } else if may_be_linked(file, folder) && fs::hard_link(file, &to).is_ok() {
            Shared::HardLink
        } else {
            copy(file, &to, &mut |bytes| progress(done + bytes, total))
                .with_context(|| format!("cannot copy {} to {}", file.display(), to.display()))?;
            Shared::Copy
        };
        done += length;
        least = least.max(how);
    }
    Ok(least)
}

/// Whether a file may have a second name in `folder`, which this process made: where it has the owner and the mode that all
/// files of a compiled model get, since these are the file's and not the name's.
fn may_be_linked(file: &Path, folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(file), Ok(folder)) = (fs::metadata(file), fs::metadata(folder)) else { return false };
    file.uid() == folder.uid() && file.mode() & 0o7777 == 0o644
}

fn copy(from: &Path, to: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let (mut from, mut out) = (File::open(from)?, File::create_new(to)?);
    let mut part = vec![0; 1 << 22];
    let mut copied = 0;
    loop {
        let read = from.read(&mut part)?;
        if read == 0 {
            return Ok(());
        }
        out.write_all(&part[..read])?;
        copied += read as u64;
        progress(copied);
    }
}

/// Whether `to` is now a copy of `from` that takes no room; where it is not, nothing is there.
#[cfg(target_os = "linux")]
fn reflink(from: &Path, to: &Path) -> bool {
    let Ok(source) = File::open(from) else { return false };
    let Ok(made) = File::create_new(to) else { return false };
    let done = rustix::fs::ioctl_ficlone(&made, &source).is_ok();
    if !done {
        drop(made);
        let _ = fs::remove_file(to);
    }
    done
}

#[cfg(target_vendor = "apple")]
fn reflink(from: &Path, to: &Path) -> bool {
    let Ok(source) = File::open(from) else { return false };
    rustix::fs::fclonefileat(&source, rustix::fs::CWD, to, rustix::fs::CloneFlags::empty()).is_ok()
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn reflink(_from: &Path, _to: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that only its owner may read is not made readable for others, nor one that nobody may write writable.
    #[test]
    fn modes_of_the_packages_files_stay() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("weight.bin");
        fs::write(&file, b"weights").unwrap();
        for (mode, may) in [(0o644, true), (0o600, false), (0o444, false), (0o755, false)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(may_be_linked(&file, folder.path()), may, "{mode:o}");
        }
    }

    #[test]
    fn weights_are_shared_and_else_copied() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("weight.bin");
        let bytes: Vec<u8> = (0..5_000_000u32).map(|number| (number % 251) as u8).collect();
        fs::write(&file, &bytes).unwrap();
        let to = folder.path().join("weights");
        let how = share(std::slice::from_ref(&file), &to, &mut |_, _| {}).unwrap();
        assert!(how == Shared::Reflink || how == Shared::HardLink, "{how}");
        assert!(fs::read(to.join("weight.bin")).unwrap() == bytes);
        let (copied, mut heard) = (folder.path().join("copied"), Vec::new());
        copy(&file, &copied, &mut |done| heard.push(done)).unwrap();
        assert!(fs::read(&copied).unwrap() == bytes && heard == [1 << 22, 5_000_000]);
        assert_eq!(share(&[], &folder.path().join("none"), &mut |_, _| {}).unwrap(), Shared::None);
        assert!(!folder.path().join("none").exists());
    }
}
