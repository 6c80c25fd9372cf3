//! Reading the small JSON files of a model folder.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::known::known_otherwise;

/// The largest of them, a tokenizer's, have a few million bytes.
const LONGEST: u64 = 100 << 20;

/// Reads a small text file.
///
/// # Errors
/// One line with the file: it cannot be read, is no file, or is far too long.
pub fn read_text(path: &Path) -> Result<String> {
    let shown = path.display();
    let found = path.metadata().with_context(|| format!("cannot read {shown}"))?;
    if !found.is_file() {
        bail!("cannot read {shown}: it is not a file");
    }
    if found.len() > LONGEST {
        bail!("{shown} has {} bytes; no file of its kind has more than {LONGEST}", found.len());
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))
}

/// Reads a JSON file.
///
/// # Errors
/// One line with the file, and the line and column where it stops being JSON, or what it is instead.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| not_json(path, &text, error.into()))
}

/// What is said of a file that should be JSON.
pub fn not_json(path: &Path, text: &str, error: anyhow::Error) -> anyhow::Error {
    let json = text.trim_start().starts_with(['{', '[']);
    match known_otherwise(text.as_bytes()).filter(|_| !json) {
        Some(what) => anyhow!("{} is {what}", path.display()),
        None => error.context(format!("{} is not JSON", path.display())),
    }
}

/// The same, `None` when there is no such file.
pub fn read_json_if_there(path: &Path) -> Result<Option<Value>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        _ => read_json(path).map(Some),
    }
}
