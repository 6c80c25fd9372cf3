//! Types and values as the text of a program has them.
//!
//! Integers are decimal, floats as C's `%a` of the value as a double, so that no bit is lost. A scalar is `tensor<fp16, []>` in
//! `program(1.0)` and `fp16` in `program(1.3)`.

use std::fmt::Write;

use anyhow::{Context, Result, bail, ensure};

use super::unsupported::unsupported;
use crate::coreml::format::proto::{
    DimensionKind, ImmediateKind, TensorElements, TensorType, TensorValue, Value, ValueKind, ValueType, ValueTypeKind,
    data_type,
};

/// The two forms of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `program(1.0)`, up to specification version 8.
    One,
    /// `program(1.3)`, specification version 9.
    OneThree,
}

impl Dialect {
    pub fn of(specification_version: i32) -> Self {
        if specification_version < 9 { Self::One } else { Self::OneThree }
    }

    /// The type of a scalar.
    pub fn scalar(self, name: &str) -> String {
        match self {
            Self::One => format!("tensor<{name}, []>"),
            Self::OneThree => name.to_owned(),
        }
    }
}

/// Element types: the number in the model, the name in the text, the name in `metadata.json`, and the bits of an element
/// where they are packed.
const TYPES: [(i32, &str, &str, u32); 20] = [
    (data_type::BOOL, "bool", "Bool", 0),
    (data_type::STRING, "string", "String", 0),
    (data_type::FLOAT16, "fp16", "Float16", 16),
    (data_type::FLOAT32, "fp32", "Float32", 32),
    (data_type::FLOAT64, "fp64", "Float64", 64),
    (data_type::BFLOAT16, "bf16", "BFloat16", 16),
    (data_type::INT8, "int8", "Int8", 8),
    (data_type::INT16, "int16", "Int16", 16),
    (data_type::INT32, "int32", "Int32", 32),
    (data_type::INT64, "int64", "Int64", 64),
    (data_type::INT4, "int4", "Int4", 4),
    (data_type::UINT8, "uint8", "UInt8", 8),
    (data_type::UINT16, "uint16", "UInt16", 16),
    (data_type::UINT32, "uint32", "UInt32", 32),
    (data_type::UINT64, "uint64", "UInt64", 64),
    (data_type::UINT4, "uint4", "UInt4", 4),
    (data_type::UINT2, "uint2", "UInt2", 2),
    (data_type::UINT1, "uint1", "UInt1", 1),
    (data_type::UINT6, "uint6", "UInt6", 6),
    (data_type::UINT3, "uint3", "UInt3", 3),
];

fn row(number: i32) -> Result<&'static (i32, &'static str, &'static str, u32)> {
    match TYPES.iter().find(|row| row.0 == number) {
        Some(row) => Ok(row),
        None => unsupported(&format!("an element type has the number {number}")),
    }
}

/// `Float16` for the number of an element type.
pub fn title(number: i32) -> Result<&'static str> {
    Ok(row(number)?.2)
}

/// The tensor type that a value or parameter has.
pub fn tensor_type(kind: Option<&ValueType>) -> Result<&TensorType> {
    let Some(ValueTypeKind::Tensor(tensor)) = kind.and_then(|kind| kind.kind.as_ref()) else {
        return unsupported("a value is a list, a tuple, a dictionary or a state");
    };
    ensure!(
        usize::try_from(tensor.rank) == Ok(tensor.dimensions.len()),
        "a type says rank {} and lists {} dimensions",
        tensor.rank,
        tensor.dimensions.len()
    );
    if !tensor.attributes.is_empty() {
        unsupported("a type has attributes")?;
    }
    Ok(tensor)
}

/// A type, `tensor<fp16, [1, 4]>`.
pub fn print_type(tensor: &TensorType, dialect: Dialect, out: &mut String) -> Result<()> {
    let name = row(tensor.data_type)?.1;
    if tensor.dimensions.is_empty() {
        out.push_str(&dialect.scalar(name));
        return Ok(());
    }
    write!(out, "tensor<{name}, [")?;
    for (place, dimension) in tensor.dimensions.iter().enumerate() {
        if place > 0 {
            out.push_str(", ");
        }
        match &dimension.dimension {
            Some(DimensionKind::Constant(constant)) => write!(out, "{}", constant.size)?,
            Some(DimensionKind::Unknown(unknown)) if !unknown.variadic => out.push('?'),
            _ => unsupported("the number of a type's dimensions is not fixed")?,
        }
    }
    out.push_str("]>");
    Ok(())
}

/// A value with its type, `tensor<int32, [2]>([1, 2])`, in the package's file of weights or in place.
pub fn print_value(value: &Value, dialect: Dialect, out: &mut String) -> Result<()> {
    let kind = tensor_type(value.r#type.as_ref())?;
    print_type(kind, dialect, out)?;
    out.push('(');
    match &value.kind {
        Some(ValueKind::BlobFile(place)) => {
            write!(out, "BLOBFILE(path = {}(", dialect.scalar("string"))?;
            print_text(&place.file_name, out)?;
            write!(out, "), offset = {}({}))", dialect.scalar("uint64"), place.offset)?;
        }
        Some(ValueKind::Immediate(immediate)) => match &immediate.value {
            Some(ImmediateKind::Tensor(tensor)) => print_elements(tensor, kind, out)?,
            _ => unsupported("a value is a list, a tuple or a dictionary")?,
        },
        None => bail!("a value has neither elements nor a place"),
    }
    out.push(')');
    Ok(())
}

/// A text in quotation marks.
pub fn print_text(text: &str, out: &mut String) -> Result<()> {
    if text.contains(['"', '\\']) || text.chars().any(char::is_control) {
        unsupported(&format!("the text {:.80} has characters that would have to be escaped", format!("{text:?}")))?;
    }
    write!(out, "\"{text}\"")?;
    Ok(())
}

/// One element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Element<'a> {
    Real(f64),
    Integer(i128),
    Truth(bool),
    Text(&'a str),
}

impl Element<'_> {
    fn print(self, out: &mut String) -> Result<()> {
        match self {
            Self::Real(value) => print_real(value, out)?,
            Self::Integer(value) => write!(out, "{value}")?,
            Self::Truth(value) => write!(out, "{value}")?,
            Self::Text(text) => print_text(text, out)?,
        }
        Ok(())
    }
}

/// The elements of a value in place, which its type says how to read.
pub struct Elements<'a> {
    stored: &'a TensorElements,
    data_type: i32,
    bits: u32,
    pub count: usize,
}

impl<'a> Elements<'a> {
    pub fn of(tensor: &'a TensorValue, kind: &TensorType) -> Result<Self> {
        let (_, name, _, bits) = *row(kind.data_type)?;
        let stored = tensor.value.as_ref().context("a value has no elements")?;
        let is_float = matches!(name, "fp16" | "bf16" | "fp32" | "fp64");
        let is_integer = !is_float && bits > 0;
        let (fits, found) = match stored {
            TensorElements::Floats(list) => (name == "fp32", list.values.len()),
            TensorElements::Doubles(list) => (name == "fp64", list.values.len()),
            TensorElements::Ints(list) => (is_integer, list.values.len()),
            TensorElements::LongInts(list) => (is_integer, list.values.len()),
            TensorElements::Bools(list) => (name == "bool", list.values.len()),
            TensorElements::Strings(list) => (name == "string", list.values.len()),
            TensorElements::Bytes(list) => (bits > 0, list.values.len()),
        };
        ensure!(fits, "a value of {name} is stored as another type");
        let mut count = 1u64;
        for size in sizes(kind)? {
            count =
                count.checked_mul(size).filter(|count| *count < 1 << 40).context("a value has too many elements")?;
        }
        let wanted = match stored {
            TensorElements::Bytes(_) => (count * u64::from(bits)).div_ceil(8),
            _ => count,
        };
        ensure!(found as u64 == wanted, "a value of {count} elements of {name} is stored as {found}, not {wanted}");
        Ok(Self { stored, data_type: kind.data_type, bits, count: count as usize })
    }

    /// The element at a place below [`Self::count`].
    pub fn at(&self, place: usize) -> Element<'a> {
        match self.stored {
            TensorElements::Floats(list) => Element::Real(f64::from(list.values[place])),
            TensorElements::Doubles(list) => Element::Real(list.values[place]),
            TensorElements::Ints(list) => Element::Integer(self.wrapped(i128::from(list.values[place]))),
            TensorElements::LongInts(list) => Element::Integer(self.wrapped(i128::from(list.values[place]))),
            TensorElements::Bools(list) => Element::Truth(list.values[place]),
            TensorElements::Strings(list) => Element::Text(&list.values[place]),
            TensorElements::Bytes(list) => self.unpacked(&list.values, place),
        }
    }

    /// Unsigned numbers stand in signed fields by their bits.
    fn wrapped(&self, value: i128) -> i128 {
        let unsigned = matches!(
            self.data_type,
            data_type::UINT1
                | data_type::UINT2
                | data_type::UINT3
                | data_type::UINT4
                | data_type::UINT6
                | data_type::UINT8
                | data_type::UINT16
                | data_type::UINT32
                | data_type::UINT64
        );
        if unsigned && value < 0 { value & ((1 << self.bits) - 1) } else { value }
    }

    fn unpacked(&self, bytes: &[u8], place: usize) -> Element<'a> {
        let first = place * self.bits as usize;
        let last = (first + self.bits as usize).div_ceil(8);
        let bits = bytes[first / 8..last].iter().rev().fold(0u128, |bits, &byte| bits << 8 | u128::from(byte));
        let bits = (bits >> (first % 8)) & ((1 << self.bits) - 1);
        match self.data_type {
            data_type::FLOAT16 => Element::Real(half::f16::from_bits(bits as u16).to_f64()),
            data_type::BFLOAT16 => Element::Real(half::bf16::from_bits(bits as u16).to_f64()),
            data_type::FLOAT32 => Element::Real(f64::from(f32::from_bits(bits as u32))),
            data_type::FLOAT64 => Element::Real(f64::from_bits(bits as u64)),
            data_type::INT4 | data_type::INT8 | data_type::INT16 | data_type::INT32 | data_type::INT64 => {
                let sign = 1i128 << (self.bits - 1);
                Element::Integer((bits as i128 ^ sign) - sign)
            }
            _ => Element::Integer(bits as i128),
        }
    }
}

/// The sizes of a value's dimensions, all known.
fn sizes(kind: &TensorType) -> Result<Vec<u64>> {
    let size = |dimension: &crate::coreml::format::proto::Dimension| match &dimension.dimension {
        Some(DimensionKind::Constant(constant)) => Ok(constant.size),
        _ => bail!("the size of a value is not known"),
    };
    kind.dimensions.iter().map(size).collect()
}

fn print_elements(tensor: &TensorValue, kind: &TensorType, out: &mut String) -> Result<()> {
    let elements = Elements::of(tensor, kind)?;
    let sizes = sizes(kind)?;
    if elements.count == 0 {
        ensure!(sizes.len() == 1, "a value has a dimension without elements");
        out.push_str("[]");
        return Ok(());
    }
    // How many elements each level of brackets holds.
    let mut spans: Vec<usize> = Vec::new();
    for &size in sizes.iter().rev() {
        spans.push(spans.last().copied().unwrap_or(1) * size as usize);
    }
    for place in 0..elements.count {
        if place > 0 {
            out.push_str(", ");
        }
        (0..spans.iter().filter(|span| place % **span == 0).count()).for_each(|_| out.push('['));
        elements.at(place).print(out)?;
        (0..spans.iter().filter(|span| (place + 1) % **span == 0).count()).for_each(|_| out.push(']'));
    }
    Ok(())
}

/// As C's `%a`: `0x1.8p-3`.
fn print_real(value: f64, out: &mut String) -> Result<()> {
    if value.is_nan() {
        unsupported("it holds a value that is not a number")?;
    }
    if value.is_sign_negative() {
        out.push('-');
    }
    if value.is_infinite() {
        out.push_str("inf");
        return Ok(());
    }
    if value == 0.0 {
        out.push_str("0x0p+0");
        return Ok(());
    }
    let bits = value.to_bits();
    let (mut exponent, mut fraction) = ((bits >> 52 & 0x7ff) as i32 - 1023, bits & ((1 << 52) - 1));
    if exponent == -1023 {
        // A subnormal double: the first bit that is set is the one before the point.
        let shift = fraction.leading_zeros() - 11;
        exponent = -1022 - shift as i32;
        fraction = (fraction << shift) & ((1 << 52) - 1);
    }
    out.push_str("0x1");
    if fraction != 0 {
        let digits = format!("{fraction:013x}");
        write!(out, ".{}", digits.trim_end_matches('0'))?;
    }
    write!(out, "p{exponent:+}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reals_are_printed_as_c_prints_them() {
        let cases = [
            (1.0, "0x1p+0"),
            (-1.0, "-0x1p+0"),
            (0.0, "0x0p+0"),
            (-0.0, "-0x0p+0"),
            (0.1875, "0x1.8p-3"),
            (f64::from(half::f16::from_bits(1)), "0x1p-24"),
            (f64::from(half::f16::from_bits(0x2a)), "0x1.5p-19"),
            (f64::from(f32::from_bits(1)), "0x1p-149"),
            (65504.0, "0x1.ffcp+15"),
            (f64::from(0.1f32), "0x1.99999ap-4"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::from_bits(1), "0x1p-1074"),
        ];
        for (value, text) in cases {
            let mut out = String::new();
            print_real(value, &mut out).unwrap();
            assert_eq!(out, text);
        }
        assert!(print_real(f64::NAN, &mut String::new()).is_err());
    }

    #[test]
    fn the_table_has_no_number_or_name_twice() {
        for (place, row) in TYPES.iter().enumerate() {
            assert!(TYPES[..place].iter().all(|other| other.0 != row.0 && other.1 != row.1 && other.2 != row.2));
        }
    }
}
