//! Puts packages in their places, so that a process that is killed at any time loses none.
//!
//! Packages are written in a hidden folder beside their places. When all of them are whole and on the disk, the moves that
//! are to be made are written down there, and then made: a process that is killed in between leaves the list, and the next
//! one that writes to the same place [finishes](recover) it. Where the system can exchange two names, a package is at its
//! place at every instant.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::files::beside::{
    MOVES, OLD, PART, beside, folder_of, held_leftovers, hold, missing_folders, remove_empty, remove_leftovers,
};
use crate::files::rename::{exchange, rename_new};
use crate::files::{flush_renames, settle, write_bytes};

/// What is at the place of a package and stays there.
#[derive(Debug, thiserror::Error)]
pub enum Occupied {
    #[error("{} exists already and is left as it is", .0.display())]
    Package(PathBuf),
    /// Which was not there when writing began.
    #[error("{} was written by another export meanwhile and is left as it is", .0.display())]
    Meanwhile(PathBuf),
    #[error("{} exists and is not a Core ML package: it is left as it is", .0.display())]
    Other(PathBuf),
}

/// Whether a package is at `path` that `write_package` would replace.
///
/// # Errors
/// What is there must not be replaced: anything but a package, and a package too where `overwrite` is not given.
pub fn replaces(path: &Path, overwrite: bool) -> Result<bool, Occupied> {
    match fs::symlink_metadata(path) {
        Err(_) => Ok(false),
        Ok(_) if !path.join("Manifest.json").is_file() => Err(Occupied::Other(path.to_owned())),
        Ok(_) if !overwrite => Err(Occupied::Package(path.to_owned())),
        Ok(_) => Ok(true),
    }
}

/// What is to be done with the packages in a folder; names of files.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Moves {
    new: Vec<New>,
    /// What goes when the new ones are there.
    gone: Vec<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
struct New {
    name: PathBuf,
    /// That of its folder, which tells it from what it replaces; 0 where there are none.
    inode: u64,
}

/// A move that was made, from here to there.
enum Made {
    Renamed(PathBuf, PathBuf),
    Exchanged(PathBuf, PathBuf),
}

/// A hidden folder in which packages become whole; it goes when it is dropped, with all that is still in it.
pub struct Aside {
    path: PathBuf,
    /// Where its packages go.
    folder: PathBuf,
    /// Folders that were made for it.
    made: Vec<PathBuf>,
    held: Option<File>,
}

impl Aside {
    /// One beside the package `of`, of whose former ones nothing is left.
    ///
    /// # Errors
    /// When it cannot be made; those of [`recover`].
    pub fn of(of: &Path) -> Result<Self> {
        recover(of)?;
        let folder = folder_of(of).to_owned();
        let (made, path) = (missing_folders(&folder), beside(of, PART));
        let create = || fs::create_dir_all(&folder).and_then(|()| fs::create_dir(&path));
        create().map_err(|error| {
            remove_empty(&made);
            anyhow::Error::from(error).context(format!("cannot create {}", path.display()))
        })?;
        let held = hold(&path);
        Ok(Self { path, folder, made, held })
    }

    /// Where the package that goes to `place` is to be written.
    pub fn place_of(&self, place: &Path) -> PathBuf {
        self.path.join(place.file_name().unwrap_or_default())
    }

    /// Moves the packages to their `places`, and takes away those at `superseded`, where they are packages; all of it or
    /// nothing. Without `overwrite`, nothing may be there.
    ///
    /// # Errors
    /// Those of [`replaces`]; when files cannot be moved.
    pub fn put_in_place(self, places: &[PathBuf], superseded: &[PathBuf], overwrite: bool) -> Result<()> {
        for place in places {
            let ready = self.place_of(place);
            settle(&ready).with_context(|| format!("cannot write {}", place.display()))?;
        }
        let name = |path: &PathBuf| PathBuf::from(path.file_name().unwrap_or_default());
        let new = places.iter().map(|place| New { name: name(place), inode: inode(&self.place_of(place)) });
        let mut moves = Moves { new: new.collect(), gone: Vec::new() };
        for place in places.iter().chain(superseded) {
            let there = replaces(place, overwrite)?;
            if there && superseded.contains(place) {
                moves.gone.push(name(place));
            }
        }
        let list = self.path.join(MOVES);
        write_bytes(&list, &serde_json::to_vec(&moves)?)?;
        carry_out(&self.path, &self.folder, &moves, overwrite)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // With its list it is for the next process to finish.
        if !self.path.join(MOVES).exists() {
            let _ = fs::remove_dir_all(&self.path);
        }
        self.held = None;
        remove_empty(&self.made);
    }
}

/// Finishes what killed processes left of writing to `place`: moves that were written down are made, and what was not yet
/// whole goes. What another process is writing is left alone.
///
/// # Errors
/// When files cannot be moved.
pub fn recover(place: &Path) -> Result<()> {
    for (aside, held) in held_leftovers(place, PART) {
        if let Some(moves) = fs::read(aside.join(MOVES)).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            carry_out(&aside, folder_of(place), &moves, true)
                .with_context(|| format!("cannot finish what an export left in {}", aside.display()))?;
        }
        let _ = fs::remove_dir_all(&aside);
        drop(held);
    }
    // Before there were lists, a package lay aside while its successor came.
    for (old, _held) in held_leftovers(place, OLD) {
        if old.join("Manifest.json").is_file() && rename_new(&old, place).is_ok() {
            break;
        }
    }
    remove_leftovers(place, OLD);
    Ok(())
}

/// Makes the moves, or those of them that are not made yet, and removes their list; after an error all are taken back. The
/// list stays where that fails too, for the next process.
fn carry_out(aside: &Path, folder: &Path, moves: &Moves, overwrite: bool) -> Result<()> {
    let mut made = Vec::new();
    let result = make(aside, folder, moves, overwrite, &mut made);
    if result.is_err() {
        for step in made.iter().rev() {
            let (undone, to) = match step {
                Made::Renamed(from, to) => (fs::rename(to, from), from),
                Made::Exchanged(ready, place) => (exchange(ready, place).map(drop), place),
            };
            undone.with_context(|| format!("cannot put back {}", to.display()))?;
        }
    }
    flush_renames(folder);
    let list = aside.join(MOVES);
    fs::remove_file(&list).with_context(|| format!("cannot remove {}", list.display()))?;
    result
}

fn make(aside: &Path, folder: &Path, moves: &Moves, overwrite: bool, made: &mut Vec<Made>) -> Result<()> {
    let rename = |made: &mut Vec<Made>, from: &Path, to: &Path| -> Result<()> {
        rename_new(from, to).with_context(|| format!("cannot write {}", to.display()))?;
        made.push(Made::Renamed(from.to_owned(), to.to_owned()));
        Ok(())
    };
    for New { name, inode: own } in &moves.new {
        let (ready, place, old) = (aside.join(name), folder.join(name), beside(&aside.join(name), OLD));
        if (*own != 0 && inode(&place) == *own) || (!ready.exists() && place.exists()) {
            continue;
        }
        if !overwrite || !replaces(&place, true)? {
            rename(made, &ready, &place)?;
        } else if exchange(&ready, &place).with_context(|| format!("cannot replace {}", place.display()))? {
            made.push(Made::Exchanged(ready, place));
        } else {
            rename(made, &place, &old)?;
            rename(made, &ready, &place)?;
        }
    }
    for name in &moves.gone {
        let (place, old) = (folder.join(name), beside(&aside.join(name), OLD));
        match replaces(&place, true) {
            Ok(true) => rename(made, &place, &old)?,
            // It is gone, or something else is there now.
            _ => continue,
        }
    }
    Ok(())
}

/// The number of a folder; 0 where there is none.
fn inode(path: &Path) -> u64 {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        fs::symlink_metadata(path).map_or(0, |found| found.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        0
    }
}

/// Whether an error is that something is there already.
pub fn is_taken(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
    kinds.into_iter().any(|kind| matches!(kind, ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with packages that are told apart by a text.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }
        fn make(&self, name: impl AsRef<Path>, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("Manifest.json"), text).unwrap();
        }
        fn text(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.path(name).join("Manifest.json")).ok()
        }
        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.0.path()).unwrap();
            let mut names: Vec<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn packages_are_put_in_place_all_or_none() {
        let folder = Folder::new();
        for name in ["first", "second", "whole"] {
            folder.make(name, "old");
        }
        let places = [folder.path("first"), folder.path("second")];
        let superseded = [folder.path("whole"), folder.path("never")];
        let ready = |names: &[&str]| {
            let aside = Aside::of(&folder.path("whole")).unwrap();
            names.iter().for_each(|name| folder.make(aside.place_of(Path::new(name)), "new"));
            aside
        };
        assert!(ready(&["first"]).put_in_place(&places, &superseded, true).is_err(), "the second is not ready");
        assert!(ready(&["first", "second"]).put_in_place(&places, &superseded, false).is_err());
        for name in ["first", "second", "whole"] {
            assert_eq!(folder.text(name).as_deref(), Some("old"), "{name}");
        }
        assert_eq!(folder.names(), ["first", "second", "whole"]);
        ready(&["first", "second"]).put_in_place(&places, &superseded, true).unwrap();
        assert_eq!(folder.names(), ["first", "second"]);
        assert!(folder.text("first").as_deref() == Some("new") && folder.text("second").as_deref() == Some("new"));
        let aside = Aside::of(&folder.path("deep/new")).unwrap();
        drop(aside);
        assert_eq!(folder.names(), ["first", "second"]);
    }

    /// Stops after each number of moves, whichever way they are made, as if it were killed there.
    #[test]
    fn what_a_killed_process_began_is_finished() {
        for (exchanged, steps) in [(false, 5), (true, 3)] {
            for stop in 0..=steps {
                let folder = Folder::new();
                ["first", "second", "whole"].iter().for_each(|name| folder.make(name, "old"));
                let aside = folder.path(".whole.1-0.part");
                ["first", "second"].iter().for_each(|name| folder.make(aside.join(name), "new"));
                let new = ["first", "second"].map(|name| New { name: name.into(), inode: inode(&aside.join(name)) });
                let moves = Moves { new: new.into(), gone: vec!["whole".into()] };
                fs::write(aside.join(MOVES), serde_json::to_vec(&moves).unwrap()).unwrap();
                let mut left = stop;
                let mut step = |run: &dyn Fn()| {
                    if left > 0 {
                        left -= 1;
                        run();
                    }
                };
                for name in ["first", "second"] {
                    let (ready, place) = (aside.join(name), folder.path(name));
                    if exchanged {
                        step(&|| assert!(exchange(&ready, &place).unwrap()));
                    } else {
                        step(&|| fs::rename(&place, aside.join(format!("old {name}"))).unwrap());
                        step(&|| fs::rename(&ready, &place).unwrap());
                    }
                }
                step(&|| fs::rename(folder.path("whole"), aside.join("old whole")).unwrap());
                recover(&folder.path("whole")).unwrap();
                assert_eq!(folder.names(), ["first", "second"], "{stop} {exchanged}");
                for name in ["first", "second"] {
                    assert_eq!(folder.text(name).as_deref(), Some("new"), "{name} {stop} {exchanged}");
                }
            }
        }
    }

    #[test]
    fn what_was_not_ready_goes_and_what_lay_aside_comes_back() {
        let folder = Folder::new();
        folder.make(".a.1-0.part/a", "half");
        folder.make(".a.1-1.old", "old");
        folder.make(".b.1-1.old", "older");
        folder.make("b", "new");
        recover(&folder.path("a")).unwrap();
        recover(&folder.path("b")).unwrap();
        assert_eq!(folder.names(), ["a", "b"]);
        assert_eq!((folder.text("a").as_deref(), folder.text("b").as_deref()), (Some("old"), Some("new")));
    }
}
