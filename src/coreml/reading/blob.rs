//! `weight.bin`: MIL blob storage, version 2, read with bounded memory and no trust.
//!
//! ```text
//! header, 64 bytes     u32 count | u32 version = 2 | 7 × u64 = 0
//! record, 64 bytes     u32 0xDEADBEEF | u32 type | u64 bytes | u64 offset of the data | u64 padding bits | 4 × u64 = 0
//! data                 then zeros up to the next multiple of 64
//! ```
//!
//! All is little endian. Records follow each other, so a file is walked from the first to the last: whatever is
//! between them must be zero, and nothing may be left over. Data is read only when asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::types::DataType;

const ALIGNMENT: u64 = 64;
const SENTINEL: u32 = 0xDEAD_BEEF;

/// One stored value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    pub data_type: DataType,
    /// Where its data begins.
    pub offset: u64,
    pub bytes: u64,
    pub elements: u64,
}

/// A blob file whose records have all been checked against its length.
#[derive(Debug)]
pub struct BlobFile {
    file: File,
    length: u64,
    /// By the offset of the record, which is what programs refer to.
    blobs: BTreeMap<u64, Blob>,
}

impl BlobFile {
    /// Opens and walks a file. Before specification version 9 only 16- and 32-bit floats and bytes may be stored.
    ///
    /// # Errors
    /// On the first record that breaks a rule, with its offset.
    pub fn open(path: &Path, specification_version: i32) -> Result<Self> {
        let walk = || -> Result<Self> {
            let file = File::open(path)?;
            let length = file.metadata()?.len();
            let mut opened = Self { file, length, blobs: BTreeMap::new() };
            opened.walk(specification_version)?;
            Ok(opened)
        };
        walk().with_context(|| format!("bad blob file {}", path.display()))
    }

    fn walk(&mut self, specification_version: i32) -> Result<()> {
        ensure!(self.length >= ALIGNMENT, "it has {} bytes, fewer than its header", self.length);
        let header = self.bytes(0, ALIGNMENT)?;
        let (count, version) = (u32_at(&header, 0), u32_at(&header, 4));
        ensure!(version == 2, "storage version is {version}, not 2");
        ensure!(header[8..].iter().all(|&byte| byte == 0), "reserved bytes of the header are not zero");
        let (mut record, mut end) = (ALIGNMENT, ALIGNMENT);
        for number in 0..count {
            // The gap is shorter than the alignment, so this reads little, and it is inside the file or an error.
            ensure!(
                self.bytes(end, record - end)?.iter().all(|&byte| byte == 0),
                "bytes before the record at {record} are not zero"
            );
            let blob = self
                .record(record, specification_version)
                .with_context(|| format!("record {number} of {count}, at {record}"))?;
            self.blobs.insert(record, blob);
            // No overflow: the data lies inside the file.
            end = blob.offset + blob.bytes;
            record = end.next_multiple_of(ALIGNMENT);
        }
        let rest = self.length - end;
        ensure!(
            rest < ALIGNMENT && self.bytes(end, rest)?.iter().all(|&byte| byte == 0),
            "{rest} bytes follow the last of the {count} blobs that the header declares"
        );
        Ok(())
    }

    fn record(&self, at: u64, specification_version: i32) -> Result<Blob> {
        let record = self.bytes(at, ALIGNMENT)?;
        let sentinel = u32_at(&record, 0);
        ensure!(sentinel == SENTINEL, "sentinel is {sentinel:#010x}, not {SENTINEL:#010x}");
        let number = u32_at(&record, 4);
        let Some(data_type) = DataType::from_blob(number) else { bail!("data type {number} is unknown") };
        if specification_version < 9 {
            use DataType::*;
            ensure!(
                matches!(data_type, Float16 | Float32 | Int8 | Uint8),
                "{data_type} in a blob needs specification version 9, the model has {specification_version}"
            );
        }
        let (bytes, offset, padding) = (u64_at(&record, 8), u64_at(&record, 16), u64_at(&record, 24));
        ensure!(offset == at + ALIGNMENT, "its data begins at {offset}, not right after it");
        let end = offset.checked_add(bytes).filter(|&end| end <= self.length);
        let Some(end) = end else { bail!("{bytes} bytes at {offset} pass the end of the file, {}", self.length) };
        ensure!(record[32..].iter().all(|&byte| byte == 0), "reserved bytes are not zero");
        let width = u64::from(data_type.bits());
        ensure!(padding < 8 && (width < 8 || padding == 0), "{padding} padding bits for {data_type}");
        // No overflow: a file has fewer than 2^60 bytes.
        let bits = (bytes * 8).checked_sub(padding).unwrap_or(1);
        ensure!(
            bytes > 0 && bits.is_multiple_of(width),
            "{bytes} bytes with {padding} padding bits are not a whole number of {data_type}"
        );
        if padding > 0 {
            let last = self.bytes(end - 1, 1)?[0];
            ensure!(last >> (8 - padding) == 0, "padding bits are not zero");
        }
        Ok(Blob { data_type, offset, bytes, elements: bits / width })
    }

    /// The blob whose record lies at `offset`.
    pub fn blob(&self, offset: u64) -> Result<Blob> {
        match self.blobs.get(&offset) {
            Some(blob) => Ok(*blob),
            None => bail!("no blob's record lies at offset {offset} ({} blobs in the file)", self.blobs.len()),
        }
    }

    /// The data of a blob.
    pub fn read(&self, blob: &Blob) -> Result<Vec<u8>> {
        self.bytes(blob.offset, blob.bytes)
    }

    /// Gives `see` the data of a blob, a part of whole elements at a time.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_parts(&self, blob: &Blob, mut see: impl FnMut(&[u8])) -> Result<()> {
        const PART: u64 = 1 << 20;
        let (mut at, end) = (blob.offset, blob.offset + blob.bytes);
        let mut part = vec![0; PART.min(blob.bytes) as usize];
        while at < end {
            part.truncate((end - at) as usize);
            self.file.read_exact_at(&mut part, at)?;
            see(&part);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Length of the whole file in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Reads inside the file; allocates nothing for a range that is not.
    fn bytes(&self, offset: u64, count: u64) -> Result<Vec<u8>> {
        ensure!(
            offset.checked_add(count).is_some_and(|end| end <= self.length),
            "{count} bytes at {offset} pass the end of the file, {}",
            self.length
        );
        let mut bytes = vec![0; usize::try_from(count)?];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file of coreml-format, section 6: one blob of three 4-bit values.
    fn golden() -> Vec<u8> {
        let mut file = vec![0; 130];
        file[..8].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        file[64..72].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde, 0x0b, 0, 0, 0]);
        (file[72], file[80], file[88]) = (2, 128, 4);
        file[128..].copy_from_slice(&[0x21, 0x03]);
        file
    }

    fn open(bytes: &[u8], version: i32) -> Result<BlobFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weight.bin");
        std::fs::write(&path, bytes).unwrap();
        BlobFile::open(&path, version)
    }

    #[test]
    fn apples_golden_file() {
        let file = open(&golden(), 9).unwrap();
        let blob = file.blob(64).unwrap();
        assert_eq!(blob, Blob { data_type: DataType::Uint4, offset: 128, bytes: 2, elements: 3 });
        assert_eq!(file.read(&blob).unwrap(), [0x21, 0x03]);
        assert!(file.blob(128).is_err());
        assert!(open(&golden(), 7).is_err(), "sub-byte blobs are new in version 9");
    }

    #[test]
    fn every_bit_outside_the_data_matters() {
        for bit in 0..128 * 8 {
            let mut file = golden();
            file[bit / 8] ^= 1 << (bit % 8);
            // A few single-bit changes give another valid file (another type of the same width, one element less);
            // the program's declared type finds those. All others must be refused here.
            if let Ok(file) = open(&file, 9) {
                let blob = file.blob(64).unwrap();
                assert_ne!((blob.data_type, blob.elements), (DataType::Uint4, 3), "bit {bit}");
            }
        }
        for length in 0..130 {
            assert!(open(&golden()[..length], 9).is_err(), "cut to {length}");
        }
        assert!(open(&[golden(), vec![0; 64]].concat(), 9).is_err());
        assert!(open(&[golden(), vec![1]].concat(), 9).is_err());
    }
}
