//! Constants of a program: where their bytes lie, checked when the package is opened, and their elements, decoded
//! when they are wanted.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use tch::{Device, Tensor};

use super::blob::{Blob, BlobFile};
use super::types::{DataType, TensorType};
use crate::coreml::format::proto::{self, ImmediateKind, TensorElements, ValueKind};

/// What blob file names in a program begin with.
const PREFIX: &str = "@model_path/weights/";

/// The blob files of a package, by their name in its weights folder.
pub type Blobs = BTreeMap<String, BlobFile>;

/// A typed value in the package. Its size on disk agrees with its type.
#[derive(Debug)]
pub struct Constant {
    pub kind: TensorType,
    stored: Stored,
}

#[derive(Debug)]
enum Stored {
    Blob { file: String, record: u64, blob: Blob },
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// Decoded elements, row-major, with their type.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub kind: TensorType,
    pub elements: Elements,
}

/// Elements in the width they are computed in.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// 16- and 32-bit floats.
    Floats(Vec<f32>),
    /// Unsigned integers of at most 8 bits, unpacked.
    Small(Vec<u8>),
    /// All other integers.
    Ints(Vec<i64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// How many floats are no numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotFinite {
    pub nan: u64,
    /// ∞
    pub above: u64,
    /// −∞
    pub below: u64,
}

impl NotFinite {
    fn count(&mut self, value: f32) {
        self.nan += u64::from(value.is_nan());
        self.above += u64::from(value == f32::INFINITY);
        self.below += u64::from(value == f32::NEG_INFINITY);
    }

    /// Counts those among packed floats of 16 or 32 bits.
    fn count_packed(&mut self, bytes: &[u8], data_type: DataType) {
        if data_type == DataType::Float16 {
            // The exponent alone tells, and nearly always that there are none: this is as fast as reading is.
            const EXPONENT: u16 = 0x7c00;
            let bits = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            if bits().filter(|bits| bits & EXPONENT == EXPONENT).count() > 0 {
                bits().for_each(|bits| self.count(half::f16::from_bits(bits).to_f32()));
            }
        } else {
            bytes.chunks_exact(4).for_each(|b| self.count(f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }
}

impl Constant {
    /// Checks a value of the file: known type, the storage that belongs to the type, the right number of elements.
    pub fn from_proto(value: proto::Value, blobs: &Blobs) -> Result<Self> {
        let kind = TensorType::from_proto(value.r#type.as_ref())?;
        ensure!(value.doc_string.is_empty(), "a value has a docString");
        let stored = match value.kind {
            Some(ValueKind::BlobFile(place)) => stored_blob(&place, &kind, blobs)?,
            Some(ValueKind::Immediate(proto::ImmediateValue { value: Some(ImmediateKind::Tensor(tensor)) })) => {
                stored_immediate(tensor, &kind)?
            }
            Some(ValueKind::Immediate(_)) => bail!("an immediate value is not a tensor"),
            None => bail!("a value has neither an immediate nor a blob"),
        };
        Ok(Self { kind, stored })
    }

    /// Where its blob lies (file and record), which tells shared blobs apart; `None` for an immediate.
    pub fn blob(&self) -> Option<(&str, u64)> {
        match &self.stored {
            Stored::Blob { file, record, .. } => Some((file, *record)),
            _ => None,
        }
    }

    /// How many of its elements are not finite, floats that they are.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn not_finite(&self, blobs: &Blobs) -> Result<NotFinite> {
        let mut found = NotFinite::default();
        match &self.stored {
            Stored::Blob { file, blob, .. } => {
                let file = blobs.get(file).with_context(|| format!("no blob file {file}"))?;
                file.read_parts(blob, |part| found.count_packed(part, self.kind.data_type))?;
            }
            Stored::Bytes(bytes) => found.count_packed(bytes, self.kind.data_type),
            Stored::Floats(floats) => floats.iter().for_each(|&value| found.count(value)),
            Stored::Ints(_) | Stored::Bools(_) | Stored::Strings(_) => {}
        }
        Ok(found)
    }

    /// Decodes the elements.
    ///
    /// # Errors
    /// When the file cannot be read, and on NaN.
    pub fn decode(&self, blobs: &Blobs) -> Result<Array> {
        let elements = match &self.stored {
            Stored::Blob { file, blob, .. } => {
                let file = blobs.get(file).with_context(|| format!("no blob file {file}"))?;
                elements_of(&file.read(blob)?, &self.kind)?
            }
            Stored::Bytes(bytes) => elements_of(bytes, &self.kind)?,
            Stored::Floats(floats) => Elements::Floats(floats.clone()),
            Stored::Ints(ints) => Elements::Ints(ints.iter().map(|&v| i64::from(v)).collect()),
            Stored::Bools(bools) => Elements::Bools(bools.clone()),
            Stored::Strings(strings) => Elements::Strings(strings.clone()),
        };
        if let Elements::Floats(floats) = &elements {
            let nans = floats.iter().filter(|v| v.is_nan()).count();
            ensure!(nans == 0, "{nans} of {} values are NaN", floats.len());
        }
        Ok(Array { kind: self.kind.clone(), elements })
    }
}

fn stored_blob(place: &proto::BlobFileValue, kind: &TensorType, blobs: &Blobs) -> Result<Stored> {
    let Some(name) = place.file_name.strip_prefix(PREFIX) else {
        bail!("blob file name {:?} does not begin with {PREFIX}", place.file_name);
    };
    // Only names listed in the weights folder are known, so a name cannot lead out of it.
    let Some(file) = blobs.get(name) else { bail!("blob file {:?} is not in the package", place.file_name) };
    let blob = file.blob(place.offset)?;
    ensure!(
        blob.data_type == kind.data_type && blob.elements == kind.elements(),
        "declared {kind}, but the blob at {} holds {} values of {}",
        place.offset,
        blob.elements,
        blob.data_type
    );
    Ok(Stored::Blob { file: name.to_string(), record: place.offset, blob })
}

fn stored_immediate(tensor: proto::TensorValue, kind: &TensorType) -> Result<Stored> {
    use DataType::*;
    let (stored, found, wanted) = match (tensor.value, kind.data_type) {
        (Some(TensorElements::Floats(list)), Float32) => (Stored::Floats(list.values), "floats", kind.elements()),
        (Some(TensorElements::Ints(list)), Int32 | Int16 | Uint16) => {
            let fits = |v: &i32| match kind.data_type {
                Int16 => i16::try_from(*v).is_ok(),
                Uint16 => u16::try_from(*v).is_ok(),
                _ => true,
            };
            ensure!(list.values.iter().all(fits), "values do not fit {}", kind.data_type);
            (Stored::Ints(list.values), "ints", kind.elements())
        }
        (Some(TensorElements::Bools(list)), Bool) => (Stored::Bools(list.values), "bools", kind.elements()),
        (Some(TensorElements::Strings(list)), String) => (Stored::Strings(list.values), "strings", kind.elements()),
        (
            Some(TensorElements::Bytes(list)),
            Float16 | Int8 | Uint32 | Int4 | Uint1 | Uint2 | Uint3 | Uint4 | Uint6 | Uint8,
        ) => (Stored::Bytes(list.values), "bytes", kind.packed_bytes()),
        (None, _) => bail!("an immediate {kind} has no elements"),
        _ => bail!("an immediate of {} is stored in the field of another type", kind.data_type),
    };
    let count = match &stored {
        Stored::Floats(list) => list.len(),
        Stored::Ints(list) => list.len(),
        Stored::Bools(list) => list.len(),
        Stored::Strings(list) => list.len(),
        Stored::Bytes(list) => list.len(),
        Stored::Blob { .. } => unreachable!("an immediate is not a blob"),
    };
    ensure!(count as u64 == wanted, "an immediate {kind} needs {wanted} {found}, the file has {count}");
    Ok(stored)
}

/// Elements of `kind` from packed little-endian bytes, of which there are exactly enough.
fn elements_of(bytes: &[u8], kind: &TensorType) -> Result<Elements> {
    use DataType::*;
    ensure!(bytes.len() as u64 == kind.packed_bytes(), "{} bytes do not hold {kind}", bytes.len());
    let count = usize::try_from(kind.elements())?;
    let pair = |b: &[u8]| [b[0], b[1]];
    let quad = |b: &[u8]| [b[0], b[1], b[2], b[3]];
    Ok(match kind.data_type {
        Float16 => {
            Elements::Floats(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes(pair(b)).to_f32()).collect())
        }
        Float32 => Elements::Floats(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(quad(b))).collect()),
        Uint1 | Uint2 | Uint3 | Uint4 | Uint6 | Uint8 => Elements::Small(unpack(bytes, kind.data_type.bits(), count)),
        Int4 => {
            let signed = |v: u8| (i64::from(v) ^ 8) - 8;
            Elements::Ints(unpack(bytes, 4, count).into_iter().map(signed).collect())
        }
        Int8 => Elements::Ints(bytes.iter().map(|&b| i64::from(b as i8)).collect()),
        Int16 => Elements::Ints(bytes.chunks_exact(2).map(|b| i64::from(i16::from_le_bytes(pair(b)))).collect()),
        Uint16 => Elements::Ints(bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes(pair(b)))).collect()),
        Int32 => Elements::Ints(bytes.chunks_exact(4).map(|b| i64::from(i32::from_le_bytes(quad(b)))).collect()),
        Uint32 => Elements::Ints(bytes.chunks_exact(4).map(|b| i64::from(u32::from_le_bytes(quad(b)))).collect()),
        Bool | String => bail!("{} is never stored as bytes", kind.data_type),
    })
}

/// The first `count` integers of `bits` ≤ 8 bits in a stream that begins at the least significant bit of byte 0.
/// `bytes` must hold them.
pub fn unpack(bytes: &[u8], bits: u32, count: usize) -> Vec<u8> {
    if bits == 8 {
        return bytes[..count].to_vec();
    }
    let mask = (1u8 << bits) - 1;
    if 8 % bits == 0 {
        let per_byte = (8 / bits) as usize;
        let mut unpacked = vec![0; count];
        let part = |byte: u8, n: u32| byte.checked_shr(n * bits).unwrap_or(0) & mask;
        // What each byte unpacks to, by table and in parallel: this runs over hundreds of millions of weights.
        let table: Vec<[u8; 8]> = (0..=u8::MAX).map(|byte| [0, 1, 2, 3, 4, 5, 6, 7].map(|n| part(byte, n))).collect();
        const BYTES: usize = 1 << 16;
        unpacked.par_chunks_mut(BYTES * per_byte).zip(bytes.par_chunks(BYTES)).for_each(|(unpacked, bytes)| {
            for (elements, &byte) in unpacked.chunks_mut(per_byte).zip(bytes) {
                elements.copy_from_slice(&table[usize::from(byte)][..elements.len()]);
            }
        });
        return unpacked;
    }
    // 3 and 6 bits straddle bytes.
    (0..count)
        .map(|number| {
            let first = number * bits as usize;
            let low = u16::from(bytes[first / 8]);
            let high = u16::from(bytes.get(first / 8 + 1).copied().unwrap_or(0));
            ((high << 8 | low) >> (first % 8)) as u8 & mask
        })
        .collect()
}

impl Array {
    /// As integers; `None` for other types.
    pub fn ints(&self) -> Option<Vec<i64>> {
        match &self.elements {
            Elements::Ints(list) => Some(list.clone()),
            Elements::Small(list) => Some(list.iter().map(|&v| i64::from(v)).collect()),
            _ => None,
        }
    }

    /// As real numbers; `None` for truth values and strings.
    pub fn reals(&self) -> Option<Vec<f64>> {
        match &self.elements {
            Elements::Floats(list) => Some(list.iter().map(|&v| f64::from(v)).collect()),
            _ => self.ints().map(|list| list.into_iter().map(|v| v as f64).collect()),
        }
    }

    /// As 32-bit floats, in place where they are.
    pub fn into_floats(self) -> Result<Vec<f32>> {
        match self.elements {
            Elements::Floats(list) => Ok(list),
            Elements::Small(list) => Ok(list.into_iter().map(f32::from).collect()),
            Elements::Ints(list) => Ok(list.into_iter().map(|v| v as f32).collect()),
            _ => bail!("{} holds no numbers", self.kind),
        }
    }

    /// As a tensor of its shape: floats as 32-bit floats, integers in their width (unsigned 16 bits as 32).
    pub fn tensor(&self, device: Device) -> Result<Tensor> {
        use DataType::*;
        let flat = match &self.elements {
            Elements::Floats(list) => Tensor::f_from_slice(list)?,
            Elements::Small(list) => Tensor::f_from_slice(list)?,
            Elements::Ints(list) => {
                let kind = match self.kind.data_type {
                    Int8 => tch::Kind::Int8,
                    Int16 => tch::Kind::Int16,
                    Int32 | Uint16 => tch::Kind::Int,
                    _ => bail!("values of {} cannot be used by an operation", self.kind.data_type),
                };
                Tensor::f_from_slice(list)?.f_to_kind(kind)?
            }
            Elements::Bools(list) => Tensor::f_from_slice(list)?,
            Elements::Strings(_) => bail!("a string is not a tensor"),
        };
        Ok(flat.f_reshape(&self.kind.shape)?.f_to_device(device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apples_golden_vectors() {
        assert_eq!(unpack(&[0x8D, 0x01], 1, 9), [1, 0, 1, 1, 0, 0, 0, 1, 1]);
        assert_eq!(unpack(&[0x6C, 0x03], 2, 5), [0, 3, 2, 1, 3]);
        assert_eq!(unpack(&[0xD1, 0x58, 0x1F, 0x05], 3, 9), [1, 2, 3, 4, 5, 6, 7, 0, 5]);
        assert_eq!(unpack(&[0x21, 0x03], 4, 3), [1, 2, 3]);
        assert_eq!(unpack(&[0x81, 0x30, 0xFC, 0x20], 6, 5), [1, 2, 3, 63, 32]);
        let int4 = TensorType::new(DataType::Int4, vec![3]).unwrap();
        assert_eq!(elements_of(&[0x78, 0x0F], &int4).unwrap(), Elements::Ints(vec![-8, 7, -1]));
        let half = TensorType::new(DataType::Float16, vec![]).unwrap();
        assert_eq!(elements_of(&[0xA8, 0x00], &half).unwrap(), Elements::Floats(vec![1.001_358e-5]));
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let values = [0.0, f32::MAX, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY];
        let expected = NotFinite { nan: 1, above: 1, below: 2 };
        let mut single = NotFinite::default();
        single.count_packed(&values.map(f32::to_le_bytes).concat(), DataType::Float32);
        assert_eq!(single, expected);
        let mut half = NotFinite::default();
        let largest = values.map(|value| if value == f32::MAX { half::f16::MAX } else { half::f16::from_f32(value) });
        half.count_packed(&largest.map(half::f16::to_le_bytes).concat(), DataType::Float16);
        assert_eq!(half, expected);
    }
}
