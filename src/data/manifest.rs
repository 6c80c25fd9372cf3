//! What a run learned from, by content: each picture's name in its folder, the hash of its bytes, its caption. Two
//! manifests tell what changed between them, wherever the folders lie and however their paths are written.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Sample;
use super::listing::listed;
use crate::files::hex;

/// The pictures of a data set, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Manifest {
    pub pictures: Vec<Picture>,
}

/// One picture of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// [`Sample::name`].
    pub name: String,
    /// SHA-256 of the file's bytes, in hexadecimal.
    pub sha256: String,
    pub caption: String,
    /// Whether it shows the class rather than the subject.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_class: bool,
    /// How often an epoch has it.
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub repeats: usize,
}

/// [`Picture::sha256`] of a file of these bytes.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn once() -> usize {
    1
}

fn is_once(repeats: &usize) -> bool {
    *repeats == 1
}

impl Manifest {
    /// Reads every picture of `samples`, on all cores.
    ///
    /// # Errors
    /// A picture cannot be read (named).
    pub fn of(samples: &[Sample]) -> Result<Self> {
        let picture = |sample: &Sample| {
            let bytes =
                fs::read(&sample.path).with_context(|| format!("cannot read the picture {}", sample.path.display()))?;
            Ok(Picture {
                name: sample.name.clone(),
                sha256: sha256(&bytes),
                caption: sample.caption.clone(),
                is_class: sample.is_class,
                repeats: sample.repeats,
            })
        };
        Ok(Self { pictures: samples.par_iter().map(picture).collect::<Result<_>>()? })
    }

    /// What is different in `now`, one line for each kind of change: pictures that were added, removed, edited or
    /// renamed, captions and repeats that changed. Empty when the two are the same set.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        [false, true].into_iter().flat_map(|is_class| changes(&self.named(is_class), &now.named(is_class))).collect()
    }

    /// The pictures of the subject or of the class, by name.
    fn named(&self, is_class: bool) -> BTreeMap<&str, &Picture> {
        let of_kind = self.pictures.iter().filter(|picture| picture.is_class == is_class);
        of_kind.map(|picture| (picture.name.as_str(), picture)).collect()
    }
}

fn changes(before: &BTreeMap<&str, &Picture>, now: &BTreeMap<&str, &Picture>) -> Vec<String> {
    let kind = match before.values().chain(now.values()).next() {
        Some(picture) if picture.is_class => "class picture",
        _ => "picture",
    };
    let only = |these: &BTreeMap<&str, &Picture>, others: &BTreeMap<&str, &Picture>| -> Vec<Picture> {
        these.values().filter(|picture| !others.contains_key(picture.name.as_str())).map(|p| (*p).clone()).collect()
    };
    let (mut removed, mut added) = (only(before, now), only(now, before));
    let mut renamed = Vec::new();
    // A picture that went under one name and came under another was renamed.
    let mut came: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for picture in added.iter().rev() {
        came.entry(picture.sha256.clone()).or_default().push(picture.name.clone());
    }
    removed.retain(|old| match came.get_mut(&old.sha256).and_then(Vec::pop) {
        Some(new) => {
            renamed.push((old.clone(), new));
            false
        }
        None => true,
    });
    let new_names: std::collections::BTreeSet<&String> = renamed.iter().map(|(_, new)| new).collect();
    added.retain(|picture| !new_names.contains(&picture.name));

    let mut edited = Vec::new();
    let mut recaptioned = Vec::new();
    let mut repeated = Vec::new();
    let both = before.values().filter_map(|old| now.get(old.name.as_str()).map(|new| (*old, *new)));
    let moved = renamed.iter().filter_map(|(old, new)| now.get(new.as_str()).map(|new| (old, *new)));
    for (old, new) in both.chain(moved) {
        if old.sha256 != new.sha256 {
            edited.push(new.name.clone());
        }
        if old.caption != new.caption {
            recaptioned.push(format!("{} (\"{}\" is now \"{}\")", new.name, short(&old.caption), short(&new.caption)));
        }
        if old.repeats != new.repeats {
            repeated.push(format!("{} ({} times, now {})", new.name, old.repeats, new.repeats));
        }
    }
    let names = |pictures: Vec<Picture>| pictures.into_iter().map(|picture| picture.name).collect::<Vec<_>>();
    let renamed = renamed.into_iter().map(|(old, new)| format!("{} is now {new}", old.name)).collect();
    [
        (names(added), kind.to_owned(), "added"),
        (names(removed), kind.to_owned(), "removed"),
        (edited, kind.to_owned(), "edited"),
        (renamed, kind.to_owned(), "renamed"),
        (recaptioned, format!("caption of {kind}s"), "changed"),
        (repeated, format!("repeat count of {kind}s"), "changed"),
    ]
    .into_iter()
    .filter(|(names, ..)| !names.is_empty())
    .map(|(names, what, done)| line(&names, &what, done))
    .collect()
}

/// `5 pictures were added: a.jpg, b.jpg, c.jpg and 2 more`
fn line(names: &[String], what: &str, done: &str) -> String {
    let count = names.len();
    let what = match what.split_once(' ') {
        _ if count == 1 => what.to_owned(),
        Some((first, rest)) if rest.starts_with("of ") || rest.starts_with("count") => {
            format!("{first}s {rest}").replace("repeats count", "repeat counts")
        }
        _ => format!("{what}s"),
    };
    let (were, listed) = (if count == 1 { "was" } else { "were" }, listed(names));
    format!("{count} {what} {were} {done}: {listed}")
}

/// At most 60 characters of a caption.
fn short(caption: &str) -> String {
    match caption.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &caption[..end]),
        None => caption.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn samples(folder: &Path, pictures: &[(&str, &str, &str)]) -> Vec<Sample> {
        let sample = |(name, content, caption): &(&str, &str, &str)| {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            Sample { caption: (*caption).into(), ..Sample::new(folder, Path::new(name)) }
        };
        pictures.iter().map(sample).collect()
    }

    #[test]
    fn a_manifest_tells_what_changed_and_does_not_mind_where_the_folder_lies() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let set = [("a.png", "1", "a dog"), ("b.png", "2", "a cat"), ("in/c.png", "3", "")];
        let before = Manifest::of(&samples(here.path(), &set)).unwrap();
        let moved = Manifest::of(&samples(there.path(), &set)).unwrap();
        assert_eq!(before, moved);
        assert_eq!(before.changes(&moved), [""; 0]);
        let read: Manifest = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        assert_eq!(read, before);

        let other = tempfile::tempdir().unwrap();
        let now = [
            ("a.png", "1", "a big dog"),
            ("d.png", "2", "a cat"),
            ("e.png", "5", "x"),
            ("f.png", "6", "x"),
            ("g.png", "7", "x"),
            ("h.png", "8", "x"),
            ("in/c.png", "33", ""),
        ];
        let now = Manifest::of(&samples(other.path(), &now)).unwrap();
        let expected = [
            "4 pictures were added: e.png, f.png, g.png and 1 more",
            "1 picture was edited: in/c.png",
            "1 picture was renamed: b.png is now d.png",
            "1 caption of pictures was changed: a.png (\"a dog\" is now \"a big dog\")",
        ];
        assert_eq!(before.changes(&now), expected);
        assert_eq!(now.changes(&before)[0], "4 pictures were removed: e.png, f.png, g.png and 1 more");

        let mut class = before.clone();
        for picture in &mut class.pictures {
            (picture.is_class, picture.caption) = (true, "a dog".into());
        }
        let mut fewer = class.clone();
        fewer.pictures.truncate(1);
        fewer.pictures[0].repeats = 10;
        assert_eq!(
            class.changes(&fewer),
            [
                "2 class pictures were removed: b.png, in/c.png",
                "1 repeat count of class pictures was changed: a.png (1 times, now 10)"
            ]
        );
        for picture in &mut class.pictures[..2] {
            picture.caption.clear();
        }
        fewer = class.clone();
        fewer.pictures[0].caption = "x".into();
        fewer.pictures[1].caption = "y".into();
        assert!(class.changes(&fewer)[0].starts_with("2 captions of class pictures were changed: a.png (\"\" is now"));
    }

    #[test]
    fn one_name_in_two_unicode_forms_is_one_picture() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str| Manifest::of(&samples(folder.path(), &[(name, "1", "x")])).unwrap();
        assert_eq!(of("caf\u{e9}.png"), of("cafe\u{301}.png"));
    }
}
