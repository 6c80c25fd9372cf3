//! CRC-32 (IEEE 802.3) of files: whether what is read is what was written.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use crc32fast::Hasher;

/// Passes on what is written to it, and sums it up.
pub struct Summing<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Summing<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Hasher::new() }
    }

    /// The CRC-32 of what was written so far.
    pub fn sum(&self) -> u32 {
        self.hasher.clone().finalize()
    }
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The CRC-32 of a file; `read` is told how many bytes were read, now and then.
///
/// # Errors
/// It can't be read.
pub fn crc32(path: &Path, mut read: impl FnMut(u64)) -> io::Result<u32> {
    let (mut file, mut hasher) = (File::open(path)?, Hasher::new());
    let mut piece = vec![0; 1 << 22];
    let mut total = 0;
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize()),
            count => {
                hasher.update(&piece[..count]);
                total += count as u64;
                read(total);
            }
        }
    }
}
