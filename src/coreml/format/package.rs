//! Writes the folder that is an `.mlpackage`: `Manifest.json`, `model.mlmodel` and `weights/weight.bin`.
//!
//! Identifiers come from what the package holds, so that equal models give equal bytes.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::blob::BlobWriter;
use super::place::{Aside, Occupied, is_taken, recover, replaces};
use super::proto::Model;
use crate::files::{at_place, hex};

/// Who the two items of a package are written by, as Core ML's tools have it.
const AUTHOR: &str = "com.apple.CoreML";

/// The weights of a package while they are written.
pub type WeightFile = BlobWriter<BufWriter<File>>;

/// Where the chunks of the package `whole` go.
pub fn chunk_paths(whole: &Path) -> [PathBuf; 2] {
    let stem = whole.file_stem().unwrap_or_default().to_string_lossy();
    ["chunk1", "chunk2"].map(|chunk| whole.with_file_name(format!("{stem}_{chunk}.mlpackage")))
}

/// Writes a package to `path`: beside it first, then moved, so that it is there whole or not at all, and what it replaces
/// until it is. With `overwrite`, chunks of it go too: programs would take those. What killed processes left of the same
/// package is finished or removed.
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
    recover(path)?;
    replaces(path, overwrite)?;
    let chunks = if overwrite { chunk_paths(path).to_vec() } else { Vec::new() };
    let write = || -> Result<()> {
        let aside = Aside::of(path)?;
        write_into(&aside.place_of(path), build)?;
        aside.put_in_place(&[path.to_owned()], &chunks, overwrite)
    };
    write().map_err(|error| meanwhile(at_place(error, path), path))
}

/// The error as it is, or [`Occupied::Meanwhile`] where it is that a package came to `path` while another was written.
fn meanwhile(error: anyhow::Error, path: &Path) -> anyhow::Error {
    let taken = is_taken(&error) || matches!(error.downcast_ref(), Some(Occupied::Package(_)));
    match replaces(path, false) {
        Err(Occupied::Package(path)) if taken => Occupied::Meanwhile(path).into(),
        _ => error,
    }
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
    let hex = hex(&bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}
