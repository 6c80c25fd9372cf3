//! Where something is written before it is whole: a hidden sibling of its place, `.NAME.PROCESS-COUNT.KIND`.
//!
//! A process that is killed leaves such siblings. While one writes a folder or a file it [holds](hold) it locked, and the
//! system unlocks it however the process ends: so what can be locked is nobody's any more, and the next process that
//! writes to the same place [removes](remove_leftovers) it, or [tidies](tidy) the whole folder. A process id tells less:
//! on a shared disk or in a container it is another machine's.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What is being written.
pub const PART: &str = "part";
/// What is being replaced.
pub const OLD: &str = "old";
/// What replaces it: whole.
pub const NEW: &str = "new";
/// What is about to be cut in pieces.
pub const WHOLE: &str = "whole";
/// A list in a folder that a killed process left, of moves that it began: whoever writes to the same place finishes them.
pub const MOVES: &str = "moves.json";

/// A hidden path beside `path` that no other call gives.
pub fn beside(path: &Path, kind: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{count}.{kind}", std::process::id()))
}

/// Keeps other processes from taking a folder or file for a leftover until what is returned is dropped. Where there are no
/// locks, none is returned, and no process takes anything for a leftover.
pub fn hold(path: &Path) -> Option<File> {
    File::open(path).ok().filter(|file| file.try_lock().is_ok())
}

/// Creates the file `part`, and holds it as [`hold`] does.
///
/// # Errors
/// The system's.
pub fn create(part: &Path) -> io::Result<File> {
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(part)?;
        // Between the two another process may take it for a leftover, and remove it.
        if !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && part.exists() {
            return Ok(file);
        }
        std::thread::yield_now();
    }
}

/// Of a name that [`beside`] gives, the name that it stands beside, and the kind.
fn parsed(found: &str) -> Option<(&str, &str)> {
    let (rest, kind) = found.strip_prefix('.')?.rsplit_once('.')?;
    let (name, process) = rest.rsplit_once('.')?;
    let ours = !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    (ours && [PART, OLD, NEW, WHOLE].contains(&kind)).then_some((name, kind))
}

/// What killed processes left in `folder`: each with the path that it stands beside, and its kind. What a process that
/// lives holds is not among it, nor what is to be finished ([`MOVES`]).
pub fn leftovers(folder: &Path) -> Vec<(PathBuf, PathBuf, String)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let found = entry.file_name();
            let (name, kind) = parsed(found.to_str()?)?;
            let is_ours = entry.file_type().is_ok_and(|kind| kind.is_dir() || kind.is_file());
            let is_to_be_finished = entry.path().join(MOVES).exists();
            (is_ours && !is_to_be_finished && hold(&entry.path()).is_some())
                .then(|| (entry.path(), folder.join(name), kind.to_owned()))
        })
        .collect();
    // What is new comes first: it is put in place rather than the old.
    found.sort_by(|(a, _, kind), (b, _, other)| (kind, a).cmp(&(other, b)));
    found
}

/// Removes what killed processes left in `folder`, unless it is all that there is of what was being replaced: that is put
/// back, the new one where it is whole. What cannot be removed stays: it is in nobody's way.
pub fn tidy(folder: &Path) {
    for (found, place, kind) in leftovers(folder) {
        let replacing = kind == OLD || kind == NEW;
        if replacing && !place.exists() && fs::rename(&found, &place).is_ok() {
            continue;
        }
        remove(&found);
    }
}

/// Removes a leftover.
fn remove(found: &Path) {
    // Held while it is removed, so that a second process does not begin to.
    if let Some(held) = hold(found) {
        let _ = if found.is_dir() { fs::remove_dir_all(found) } else { fs::remove_file(found) };
        drop(held);
    }
}

/// Removes what killed processes left of this kind [beside](beside) `path`. What cannot be removed stays: it is in nobody's
/// way.
pub fn remove_leftovers(path: &Path, kind: &str) {
    for (found, place, of_kind) in leftovers(folder_of(path)) {
        if of_kind == kind && place.file_name() == path.file_name() {
            remove(&found);
        }
    }
}

/// The folders of this kind that killed processes left [beside](beside) `path`, those with a list of [`MOVES`] too, each held
/// while what is returned with it lives, so that a second process does not take it too.
pub fn held_leftovers(path: &Path, kind: &str) -> Vec<(PathBuf, File)> {
    let entries = fs::read_dir(folder_of(path)).into_iter().flatten().flatten();
    let taken = entries.filter_map(|entry| {
        let found = entry.file_name();
        let (name, of_kind) = parsed(found.to_str()?)?;
        let is_wanted = of_kind == kind && path.file_name() == Some(name.as_ref());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        (is_wanted && is_folder).then(|| hold(&entry.path()).map(|held| (entry.path(), held)))?
    });
    taken.collect()
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
    fn a_folder_is_tidied_and_what_was_being_replaced_is_put_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in [".model.1-0.new", ".model.1-1.old", ".a.png.7-3.part", ".coreml.9-9.old", "coreml"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("name"), name).unwrap();
        }
        fs::write(path(".report.html.1-2.part"), "half").unwrap();
        let held = create(&path(".live.json.1-2.part")).unwrap();
        fs::write(path(".mine.part"), "mine").unwrap();
        tidy(folder.path());
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [".live.json.1-2.part", ".mine.part", "coreml", "model"]);
        assert_eq!(fs::read_to_string(path("model/name")).unwrap(), ".model.1-0.new");
        drop(held);
        tidy(folder.path());
        assert!(!path(".live.json.1-2.part").exists());
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
