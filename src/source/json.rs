//! Reading the small JSON files of a model folder.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Reads a JSON file.
///
/// # Errors
/// One line with the file, and the line and column where it stops being JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))
}

/// The same, `None` when there is no such file.
pub fn read_json_if_there(path: &Path) -> Result<Option<Value>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        _ => read_json(path).map(Some),
    }
}
