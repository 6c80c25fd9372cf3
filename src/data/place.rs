//! Folders are what they are, not how their paths are written: two paths are compared by where they lead, through links,
//! `.` and `..`, in the case that the file system has, also where the last parts are not there yet.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

/// Where a path leads: the canonical path of as much of it as exists, then the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    canonical: PathBuf,
}

/// As many as Linux follows.
const MOST_LINKS: usize = 40;

impl Place {
    /// Finds where `path` leads.
    ///
    /// # Errors
    /// There is no current folder.
    pub fn of(path: &Path) -> Result<Self> {
        Self::through(path, MOST_LINKS)
    }

    /// [`Place::of`], following at most so many links to what is not there.
    fn through(path: &Path, links: usize) -> Result<Self> {
        let absolute = std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))?;
        let mut canonical = PathBuf::new();
        for part in absolute.components() {
            match part {
                // What is there was resolved, so its parent is the part before it.
                Component::ParentDir => drop(canonical.pop()),
                Component::CurDir => {}
                part => {
                    canonical.push(part);
                    if let Ok(found) = canonical.canonicalize() {
                        canonical = found;
                    } else if let Some(target) = canonical.read_link().ok().filter(|_| links > 0) {
                        // A link to what is not there yet.
                        canonical.pop();
                        canonical = Self::through(&canonical.join(target), links - 1)?.canonical;
                    }
                }
            }
        }
        Ok(Self { canonical })
    }

    /// The path without links, `.` and `..`.
    pub fn path(&self) -> &Path {
        &self.canonical
    }

    /// Whether the two are one.
    pub fn is(&self, other: &Self) -> bool {
        same(&self.canonical, &other.canonical)
    }

    /// Whether this is `other` or lies below it.
    pub fn is_within(&self, other: &Self) -> bool {
        self.canonical.ancestors().any(|above| same(above, &other.canonical))
    }
}

/// Whether two canonical paths are one folder: by the file system's own numbers where it is there (a folder may be mounted
/// twice, and letters may differ in case), else by name.
fn same(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(a), Ok(b)) = (a.metadata(), b.metadata()) {
            return (a.dev(), a.ino()) == (b.dev(), b.ino());
        }
    }
    a == b
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn places_are_compared_by_where_they_lead() {
        let root = tempfile::tempdir().unwrap();
        let path = |inner: &str| root.path().join(inner);
        fs::create_dir_all(path("a/b")).unwrap();
        fs::create_dir_all(path("ab")).unwrap();
        let place = |inner: &str| Place::of(&path(inner)).unwrap();
        for (one, other) in [("a", "a/"), ("a", "./a"), ("a", "ab/../a"), ("a/b", "a/./b/"), ("new/x", "a/../new/x")] {
            assert!(place(one).is(&place(other)), "{one} and {other}");
        }
        assert!(place("a/b").is_within(&place("a")) && place("a").is_within(&place("a")));
        assert!(place("a/not/yet").is_within(&place("a")) && place("a/not/yet").is_within(&place("a/not")));
        assert!(!place("a").is_within(&place("a/b")) && !place("ab").is_within(&place("a")));
        #[cfg(unix)]
        {
            let link = |to: &str, from: &str| std::os::unix::fs::symlink(path(to), path(from)).unwrap();
            link("a/b", "link");
            link("a/later", "dangling");
            link("ring2", "ring1");
            link("ring1", "ring2");
            assert!(place("link").is(&place("a/b")) && place("link/new").is_within(&place("a")));
            assert!(place("link/..").is(&place("a")), "`..` of a link is its target's parent");
            // Links in a circle lead nowhere, but come to an end.
            assert!(!place("ring1").is(&place("a")));
            assert!(place("dangling").is(&place("a/later")) && place("dangling").is_within(&place("a")));
        }
    }
}
