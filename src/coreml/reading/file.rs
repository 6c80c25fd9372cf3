//! Files of a folder that nobody vouches for.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// A file of at most `limit` bytes that is no link.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>> {
        ensure!(fs::symlink_metadata(path)?.is_file(), "it is not a regular file");
        let file = fs::File::open(path)?;
        ensure!(file.metadata()?.len() <= limit, "it has more than {limit} bytes");
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}
