//! Where something is written before it is whole: a hidden sibling of its place, `.NAME.PROCESS-COUNT.KIND`.
//!
//! A process that is killed leaves such siblings. While one writes a folder it [holds](hold) it locked, and the system
//! unlocks it however the process ends: so what can be locked is nobody's any more, and the next process that writes to
//! the same place [removes](remove_leftovers) it. A process id tells less: on a shared disk or in a container it is
//! another machine's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What is being written.
pub const PART: &str = "part";
/// What is being replaced.
pub const OLD: &str = "old";
/// What is about to be cut in pieces.
pub const WHOLE: &str = "whole";

/// A hidden path beside `path` that no other call gives.
pub fn beside(path: &Path, kind: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{count}.{kind}", std::process::id()))
}

/// Keeps other processes from taking a folder for a leftover until what is returned is dropped. Where there are no locks,
/// none is returned, and no process takes anything for a leftover.
pub fn hold(folder: &Path) -> Option<File> {
    File::open(folder).ok().filter(|folder| folder.try_lock().is_ok())
}

/// Removes the folders of this kind that killed processes left [beside](beside) `path`. What cannot be removed stays: it is
/// in nobody's way.
pub fn remove_leftovers(path: &Path, kind: &str) {
    for (leftover, _held) in leftovers(path, kind) {
        let _ = fs::remove_dir_all(leftover);
    }
}

/// The folders of this kind that killed processes left [beside](beside) `path`, each held while what is returned with it
/// lives, so that a second process does not take it too.
pub fn leftovers(path: &Path, kind: &str) -> Vec<(PathBuf, File)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Ok(entries) = fs::read_dir(folder_of(path)) else { return Vec::new() };
    let mut found_all = Vec::new();
    for entry in entries.flatten() {
        let found = entry.file_name();
        let process = found.to_str().and_then(|found| {
            let rest = found.strip_prefix('.')?.strip_prefix(&*name)?.strip_prefix('.')?;
            rest.strip_suffix(kind)?.strip_suffix('.')
        });
        let ours = process.is_some_and(|process| process.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-'));
        if ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found_all.extend(hold(&entry.path()).map(|held| (entry.path(), held)));
        }
    }
    found_all
}

/// `folder` and those above it, the lowest first, that are not there yet.
pub fn missing_folders(folder: &Path) -> Vec<PathBuf> {
    let missing = folder.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
    missing.map(Path::to_owned).collect()
}

/// Removes those of the folders that are there and empty, in this order.
pub fn remove_empty(folders: &[PathBuf]) {
    for folder in folders {
        // One that is not empty is in use.
        let _ = fs::remove_dir(folder);
    }
}

/// The folder that a path lies in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_of_the_same_name_go_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.mlpackage");
        let stays = [
            ".a.mlpackage.1-0.old",
            ".a.mlpackage.mine.part",
            ".b.mlpackage.1-0.part",
            "a.mlpackage",
            "a.mlpackage.1-0.part",
        ];
        for name in stays.iter().chain(&[".a.mlpackage.1-0.part", ".a.mlpackage.77.part"]) {
            fs::create_dir_all(folder.path().join(name).join("within")).unwrap();
        }
        let live = beside(&path, PART);
        fs::create_dir(&live).unwrap();
        let left = || {
            let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
            let mut names: Vec<PathBuf> = names.filter(|path| *path != live).collect();
            names.sort();
            names
        };
        let expected = stays.map(|name| folder.path().join(name));
        let held = hold(&live);
        assert!(held.is_some());
        remove_leftovers(&path, PART);
        assert_eq!(left(), expected);
        assert!(live.exists());
        drop(held);
        remove_leftovers(&path, PART);
        assert!(!live.exists());
        assert_eq!(left(), expected);
    }

    #[test]
    fn folders_that_were_made_for_nothing_go() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b");
        let made = missing_folders(&deep);
        assert_eq!(made, [deep.clone(), folder.path().join("a")]);
        assert!(missing_folders(Path::new("a/b")).len() == 2 && missing_folders(folder.path()).is_empty());
        fs::create_dir_all(&deep).unwrap();
        fs::write(folder.path().join("a/file"), b"mine").unwrap();
        remove_empty(&made);
        assert!(folder.path().join("a/file").exists() && !deep.exists());
        fs::remove_file(folder.path().join("a/file")).unwrap();
        remove_empty(&made);
        assert!(folder.path().exists() && !folder.path().join("a").exists());
    }
}
