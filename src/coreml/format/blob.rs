//! Writes `weights/weight.bin`: MIL blob storage, version 2.
//!
//! A header of 64 bytes (count of blobs, version), then for each blob 64 bytes of metadata and its data; all three
//! start at multiples of 64, integers are little endian. A value in a program refers to the offset of the metadata,
//! not of the data. Blobs are written as they come, so that a model never lies in memory whole; equal ones are
//! written once.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// Header, metadata and data start at multiples of this.
const ALIGNMENT: u64 = 64;
/// First word of every metadata record.
const SENTINEL: u32 = 0xDEAD_BEEF;
/// Version of the format.
const VERSION: u32 = 2;

/// Element types as weight.bin numbers them (not as MIL does).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum BlobType {
    Float16 = 1,
    Float32 = 2,
    UInt8 = 3,
    Int8 = 4,
    /// The types below one byte (from iOS 18 on) are bit-packed, least significant bit first.
    UInt1 = 9,
    UInt2 = 10,
    UInt4 = 11,
    UInt3 = 12,
    UInt6 = 13,
}

impl BlobType {
    const ALL: [Self; 9] = [
        Self::Float16,
        Self::Float32,
        Self::UInt8,
        Self::Int8,
        Self::UInt1,
        Self::UInt2,
        Self::UInt4,
        Self::UInt3,
        Self::UInt6,
    ];

    /// The type of this number in a record.
    pub fn numbered(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Bits of one element.
    pub fn bits(self) -> u64 {
        match self {
            Self::Float32 => 32,
            Self::Float16 => 16,
            Self::UInt8 | Self::Int8 => 8,
            Self::UInt1 => 1,
            Self::UInt2 => 2,
            Self::UInt3 => 3,
            Self::UInt4 => 4,
            Self::UInt6 => 6,
        }
    }
}

/// Appends blobs to a file.
pub struct BlobWriter<W> {
    out: W,
    length: u64,
    count: u32,
    written: HashMap<[u8; 32], u64>,
    content: Sha256,
}

impl<W: Write + Seek> BlobWriter<W> {
    /// Starts a file at the beginning of `out`.
    pub fn new(mut out: W) -> Result<Self> {
        out.write_all(&[0; ALIGNMENT as usize]).context("cannot write the header of weight.bin")?;
        Ok(Self { out, length: ALIGNMENT, count: 0, written: HashMap::new(), content: Sha256::new() })
    }

    /// Writes `count` elements and returns the offset by which a program refers to them. Equal blobs share one.
    ///
    /// # Errors
    /// When `bytes` are not as many as `count` elements take, or they cannot be written.
    pub fn add(&mut self, kind: BlobType, count: usize, bytes: &[u8]) -> Result<u64> {
        let bits = count as u64 * kind.bits();
        ensure!(
            bytes.len() as u64 == bits.div_ceil(8),
            "{count} elements of type {kind:?} take {} bytes, not {}",
            bits.div_ceil(8),
            bytes.len()
        );
        let mut hash = Sha256::new();
        hash.update((kind as u32).to_le_bytes());
        hash.update((count as u64).to_le_bytes());
        hash.update(bytes);
        let hash: [u8; 32] = hash.finalize().into();
        if let Some(&offset) = self.written.get(&hash) {
            return Ok(offset);
        }
        self.content.update(hash);

        let offset = self.length.next_multiple_of(ALIGNMENT);
        let data = offset + ALIGNMENT;
        let padding_bits = match kind.bits() {
            0..8 => 8 * bytes.len() as u64 - bits,
            _ => 0,
        };
        let mut record = vec![0; (offset - self.length) as usize];
        record.extend(SENTINEL.to_le_bytes());
        record.extend((kind as u32).to_le_bytes());
        record.extend((bytes.len() as u64).to_le_bytes());
        record.extend(data.to_le_bytes());
        record.extend(padding_bits.to_le_bytes());
        record.resize((data - self.length) as usize, 0);
        self.out.write_all(&record).context("cannot write weight.bin")?;
        self.out.write_all(bytes).context("cannot write weight.bin")?;
        self.length = data + bytes.len() as u64;
        self.count = self.count.checked_add(1).context("weight.bin holds at most 2^32 blobs")?;
        self.written.insert(hash, offset);
        Ok(offset)
    }

    /// Completes the header. Returns the file and a digest of all that was written.
    pub fn finish(mut self) -> Result<(W, [u8; 32])> {
        let mut header = self.count.to_le_bytes().to_vec();
        header.extend(VERSION.to_le_bytes());
        self.out
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.out.write_all(&header))
            .and_then(|()| self.out.flush())
            .context("cannot write the header of weight.bin")?;
        Ok((self.out, self.content.finalize().into()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::palette::packing::pack;

    fn file(blobs: &[(BlobType, usize, &[u8])]) -> (Vec<u8>, Vec<u64>) {
        let mut writer = BlobWriter::new(Cursor::new(Vec::new())).unwrap();
        let offsets = blobs.iter().map(|&(kind, count, bytes)| writer.add(kind, count, bytes).unwrap()).collect();
        (writer.finish().unwrap().0.into_inner(), offsets)
    }

    /// The file that Apple's own writer makes of the 4-bit values 1, 2, 3.
    #[test]
    fn a_file_of_three_nibbles_is_apples() {
        let mut expected = vec![0; 128];
        expected[..8].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        expected[64..72].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde, 11, 0, 0, 0]);
        expected[72] = 2;
        expected[80] = 0x80;
        expected[88] = 4;
        expected.extend([0x21, 0x03]);
        assert_eq!(file(&[(BlobType::UInt4, 3, &pack(&[1, 2, 3], 4))]).0, expected);
    }

    /// Bits and padding as Apple's own writer makes them.
    #[test]
    fn small_indices_are_packed_as_apples() {
        let cases = [
            (BlobType::UInt1, &[1, 0, 1, 1, 0, 0, 0, 1, 1][..], &[0x8D, 0x01][..], 7),
            (BlobType::UInt2, &[0, 3, 2, 1, 3], &[0x6C, 0x03], 6),
            (BlobType::UInt3, &[1, 2, 3, 4, 5, 6, 7, 0, 5], &[0xD1, 0x58, 0x1F, 0x05], 5),
            (BlobType::UInt4, &[1, 2, 3], &[0x21, 0x03], 4),
            (BlobType::UInt6, &[1, 2, 3, 63, 32], &[0x81, 0x30, 0xFC, 0x20], 2),
        ];
        for (kind, values, bytes, padding) in cases {
            let packed = pack(values, kind.bits() as u32);
            assert_eq!(packed, bytes, "{kind:?}");
            let (file, _) = file(&[(kind, values.len(), &packed)]);
            assert_eq!((&file[128..], file[88]), (bytes, padding), "{kind:?}");
        }
    }

    #[test]
    fn blobs_are_aligned_and_equal_ones_are_written_once() {
        let (file, offsets) = file(&[
            (BlobType::UInt8, 3, &[1, 2, 3]),
            (BlobType::Float16, 2, &[1, 2, 3, 4]),
            (BlobType::UInt8, 3, &[1, 2, 3]),
            // The same bytes as another type are another blob.
            (BlobType::UInt8, 4, &[1, 2, 3, 4]),
        ]);
        assert_eq!(offsets, [64, 192, 64, 320]);
        assert_eq!(file.len(), 320 + 64 + 4);
        assert_eq!(file[..8], [3, 0, 0, 0, 2, 0, 0, 0]);
        // The data lies 64 bytes behind its metadata, as the metadata says.
        assert_eq!((file[192 + 16], &file[256..260]), (0, &[1, 2, 3, 4][..]));
        assert_eq!(u64::from_le_bytes(file[192 + 16..192 + 24].try_into().unwrap()), 256);
    }

    #[test]
    fn a_wrong_number_of_bytes_is_refused() {
        let mut writer = BlobWriter::new(Cursor::new(Vec::new())).unwrap();
        let error = writer.add(BlobType::Float16, 2, &[0; 3]).unwrap_err();
        assert_eq!(error.to_string(), "2 elements of type Float16 take 4 bytes, not 3");
    }
}
