//! The elements of a value in a program's text, stored as a package stores those of their type.

use anyhow::{Result, bail, ensure};

use super::number::{integer, real};
use super::words::{Word, Words, shown};
use crate::coreml::format::proto::{
    DimensionKind, RepeatedBools, RepeatedBytes, RepeatedDoubles, RepeatedFloats, RepeatedInts, RepeatedLongInts,
    RepeatedStrings, TensorElements, TensorType, TensorValue, data_type,
};

/// The elements of a value, in as many brackets as its type has dimensions.
pub fn elements(words: &mut Words, kind: &TensorType) -> Result<TensorValue> {
    let mut sizes = Vec::new();
    for dimension in &kind.dimensions {
        let Some(DimensionKind::Constant(constant)) = &dimension.dimension else { bail!("a value has no fixed size") };
        sizes.push(constant.size);
    }
    let mut store = Store::of(kind.data_type)?;
    nested(words, &sizes, &mut store)?;
    Ok(TensorValue { value: Some(store.finish()) })
}

/// Takes the elements of a tensor of these sizes. As many as are there are taken, so that a size costs nothing by itself; no
/// more levels than a type may have dimensions.
fn nested(words: &mut Words, sizes: &[u64], store: &mut Store) -> Result<()> {
    let Some((&size, inner)) = sizes.split_first() else { return store.push(words.take()?) };
    words.expect('[')?;
    let mut count = 0u64;
    while words.peek() != Word::Sign(']') {
        if count > 0 {
            words.expect(',')?;
        }
        nested(words, inner, store)?;
        count += 1;
    }
    words.expect(']')?;
    ensure!(count == size, "{count} elements in brackets, the type says {size}");
    Ok(())
}

/// Elements as a package stores those of their type.
struct Store {
    data_type: i32,
    elements: TensorElements,
    /// Bits that do not fill a byte yet, the first lowest, and how many they are.
    bits: u32,
    pending: u32,
}

impl Store {
    fn of(data_type: i32) -> Result<Self> {
        let elements = match data_type {
            data_type::BOOL => TensorElements::Bools(RepeatedBools::default()),
            data_type::STRING => TensorElements::Strings(RepeatedStrings::default()),
            data_type::FLOAT32 => TensorElements::Floats(RepeatedFloats::default()),
            data_type::FLOAT64 => TensorElements::Doubles(RepeatedDoubles::default()),
            data_type::INT16 | data_type::UINT16 | data_type::INT32 => TensorElements::Ints(RepeatedInts::default()),
            data_type::INT64 | data_type::UINT64 => TensorElements::LongInts(RepeatedLongInts::default()),
            _ => TensorElements::Bytes(RepeatedBytes::default()),
        };
        Ok(Self { data_type, elements, bits: 0, pending: 0 })
    }

    fn push(&mut self, word: Word) -> Result<()> {
        let kind = self.data_type;
        match &mut self.elements {
            TensorElements::Bools(list) => match word {
                Word::Name("true") => list.values.push(true),
                Word::Name("false") => list.values.push(false),
                other => bail!("true or false is expected, there is {}", shown(other)),
            },
            TensorElements::Strings(list) => match word {
                Word::Text(text) => list.values.push(text.to_owned()),
                other => bail!("a text is expected, there is {}", shown(other)),
            },
            TensorElements::Floats(list) => {
                let value = real_of(word)?;
                ensure!(f64::from(value as f32) == value, "{value} is not a value of fp32");
                list.values.push(value as f32);
            }
            TensorElements::Doubles(list) => list.values.push(real_of(word)?),
            TensorElements::Ints(list) => {
                let range = match kind {
                    data_type::INT16 => -0x8000..0x8000,
                    data_type::UINT16 => 0..0x1_0000,
                    _ => i128::from(i32::MIN)..i128::from(i32::MAX) + 1,
                };
                list.values.push(integer_of(word, range)? as i32);
            }
            TensorElements::LongInts(list) => {
                let range = match kind {
                    data_type::UINT64 => 0..1 << 64,
                    _ => i128::from(i64::MIN)..i128::from(i64::MAX) + 1,
                };
                list.values.push(integer_of(word, range)? as i64);
            }
            TensorElements::Bytes(list) => match kind {
                data_type::FLOAT16 => {
                    let value = real_of(word)?;
                    let half = half::f16::from_f64(value);
                    ensure!(half.to_f64() == value, "{value} is not a value of fp16");
                    list.values.extend(half.to_le_bytes());
                }
                data_type::BFLOAT16 => {
                    let value = real_of(word)?;
                    let half = half::bf16::from_f64(value);
                    ensure!(half.to_f64() == value, "{value} is not a value of bf16");
                    list.values.extend(half.to_le_bytes());
                }
                data_type::INT8 => list.values.push(integer_of(word, -128..128)? as u8),
                data_type::UINT8 => list.values.push(integer_of(word, 0..256)? as u8),
                data_type::UINT32 => {
                    list.values.extend((integer_of(word, 0..1 << 32)? as u32).to_le_bytes());
                }
                _ => {
                    let (width, range) = match kind {
                        data_type::INT4 => (4, -8..8),
                        data_type::UINT1 => (1, 0..2),
                        data_type::UINT2 => (2, 0..4),
                        data_type::UINT3 => (3, 0..8),
                        data_type::UINT4 => (4, 0..16),
                        data_type::UINT6 => (6, 0..64),
                        other => bail!("elements of the type {other} are not read"),
                    };
                    let value = integer_of(word, range)? as u32 & ((1 << width) - 1);
                    self.bits |= value << self.pending;
                    self.pending += width;
                    if self.pending >= 8 {
                        list.values.push(self.bits as u8);
                        self.bits >>= 8;
                        self.pending -= 8;
                    }
                }
            },
        }
        Ok(())
    }

    fn finish(mut self) -> TensorElements {
        if let (TensorElements::Bytes(list), 1..) = (&mut self.elements, self.pending) {
            list.values.push(self.bits as u8);
        }
        self.elements
    }
}

fn real_of(word: Word) -> Result<f64> {
    match word {
        Word::Number(text) | Word::Name(text) => real(text),
        other => bail!("a float is expected, there is {}", shown(other)),
    }
}

fn integer_of(word: Word, range: std::ops::Range<i128>) -> Result<i128> {
    let Word::Number(text) = word else { bail!("an integer is expected, there is {}", shown(word)) };
    let value = integer(text)?;
    ensure!(range.contains(&value), "{value} is not a value of this type");
    Ok(value)
}
