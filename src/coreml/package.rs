//! Writes the folder that is an `.mlpackage`: `Manifest.json`, `model.mlmodel` and `weights/weight.bin`.
//!
//! Identifiers come from what the package holds, so that equal models give equal bytes.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::blob::BlobWriter;
use super::proto::Model;
use crate::source::beside::{OLD, PART, beside, folder_of, hold, remove_leftovers};
use crate::source::files::{flush_renames, write_atomically};

/// Who the two items of a package are written by, as Core ML's tools have it.
const AUTHOR: &str = "com.apple.CoreML";

/// The weights of a package while they are written.
pub type WeightFile = BlobWriter<BufWriter<File>>;

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

/// Whether a package is at `path` that [`write_package`] would replace.
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

/// Writes a package to `path`: beside it first, then renamed, so that it is there whole or not at all. What killed
/// processes left of the same package is removed.
///
/// `build` writes the weights and returns the model with the digest of [`BlobWriter::finish`].
///
/// # Errors
/// Those of [`replaces`], or [`Occupied::Meanwhile`]; what `build` returned; when the files cannot be written.
pub fn write_package(
    path: &Path,
    overwrite: bool,
    build: impl FnOnce(WeightFile) -> Result<(Model, [u8; 32])>,
) -> Result<()> {
    replaces(path, overwrite)?;
    let mut old = None;
    remove_leftovers(path, PART);
    let mut held = None;
    let written = write_atomically(path, |part| {
        fs::create_dir(part).with_context(|| format!("cannot create {}", part.display()))?;
        held = hold(part);
        write_into(part, build)?;
        if overwrite && replaces(path, overwrite)? {
            let old = old.insert(beside(path, OLD));
            fs::rename(path, old).with_context(|| format!("cannot replace {}", path.display()))?;
        }
        Ok(())
    })
    .map_err(|error| meanwhile(error, path));
    drop(held);
    if let Some(old) = old.filter(|old| old.exists()) {
        match written {
            Ok(()) => fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?,
            Err(_) => fs::rename(&old, path).with_context(|| format!("cannot put back {}", path.display()))?,
        }
    }
    if written.is_ok() {
        // Not before: of a process that was killed while it replaced a package these may be all that there is of it.
        remove_leftovers(path, OLD);
    }
    written
}

/// The error as it is, or [`Occupied::Meanwhile`] where it is that a package came to `path` while another was written.
fn meanwhile(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    let full = kinds.into_iter().any(|kind| matches!(kind, ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists));
    match replaces(path, false) {
        Err(Occupied::Package(path)) if full => Occupied::Meanwhile(path).into(),
        _ => error,
    }
}

/// Puts packages that lie ready, each at the first path of a pair, to their places, the second, where they replace what is
/// there; `superseded` goes too. All of it happens or none, and a process that is killed meanwhile was within a few renames.
///
/// # Errors
/// When files cannot be moved.
pub fn put_in_place(ready: &[[PathBuf; 2]], superseded: &[PathBuf]) -> Result<()> {
    let (mut moves, mut old) = (Vec::new(), Vec::new());
    for path in superseded.iter().chain(ready.iter().map(|[_, place]| place)).filter(|path| path.exists()) {
        let aside = beside(path, OLD);
        old.push(aside.clone());
        moves.push([path.clone(), aside]);
    }
    moves.extend(ready.iter().cloned());
    for (done, [from, to]) in moves.iter().enumerate() {
        if let Err(error) = fs::rename(from, to) {
            for [from, to] in moves[..done].iter().rev() {
                fs::rename(to, from).with_context(|| format!("cannot put back {}", from.display()))?;
            }
            return Err(error).with_context(|| format!("cannot write {}", to.display()));
        }
    }
    if let Some([_, place]) = ready.first() {
        flush_renames(folder_of(place));
    }
    for path in old {
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    ready.iter().for_each(|[_, place]| remove_leftovers(place, OLD));
    Ok(())
}

fn write_into(package: &Path, build: impl FnOnce(WeightFile) -> Result<(Model, [u8; 32])>) -> Result<()> {
    let data = package.join("Data").join(AUTHOR);
    let weights = data.join("weights");
    fs::create_dir_all(&weights).with_context(|| format!("cannot create {}", weights.display()))?;
    let file = File::create(weights.join("weight.bin")).context("cannot create weight.bin")?;
    let (model, digest) = build(BlobWriter::new(BufWriter::with_capacity(1 << 20, file))?)?;
    let model = model.encode_to_vec();
    fs::write(data.join("model.mlmodel"), &model).context("cannot write model.mlmodel")?;

    let model_id = identifier("model", &[&model, &digest]);
    let manifest = json!({
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            (model_id.clone()): item("model.mlmodel", "CoreML Model Specification"),
            (identifier("weights", &[&model, &digest])): item("weights", "CoreML Model Weights"),
        },
        "rootModelIdentifier": model_id,
    });
    let text = format!("{manifest:#}\n");
    fs::write(package.join("Manifest.json"), text).context("cannot write Manifest.json")
}

fn item(name: &str, description: &str) -> serde_json::Value {
    json!({ "author": AUTHOR, "description": description, "name": name, "path": format!("{AUTHOR}/{name}") })
}

/// A UUID of version 8 (RFC 9562: the bits are the application's own) made of what the package holds.
fn identifier(item: &str, content: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    hash.update(item);
    for part in content {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut bytes: Vec<u8> = hash.finalize()[..16].to_vec();
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_put_in_place_all_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let make = |name: &str, text: &str| {
            fs::create_dir_all(path(name)).unwrap();
            fs::write(path(name).join("text"), text).unwrap();
        };
        let text = |name: &str| fs::read_to_string(path(name).join("text")).ok();
        let names = || fs::read_dir(folder.path()).unwrap().count();
        make("first", "old");
        make("second", "old");
        make("whole", "old");
        make("ready1", "new");
        let ready = [[path("ready1"), path("first")], [path("ready2"), path("second")]];
        assert!(put_in_place(&ready, &[path("whole")]).is_err(), "the second is not ready");
        for name in ["first", "second", "whole"] {
            assert_eq!(text(name).as_deref(), Some("old"), "{name}");
        }
        assert_eq!((text("ready1").as_deref(), names()), (Some("new"), 4));
        make("ready2", "new");
        put_in_place(&ready, &[path("whole"), path("never")]).unwrap();
        assert_eq!((text("first").as_deref(), text("second").as_deref(), names()), (Some("new"), Some("new"), 2));
    }
}
