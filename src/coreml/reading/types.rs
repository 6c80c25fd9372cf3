//! Element types and tensor types of MIL, as the reader believes them after checking.

use std::fmt;

use anyhow::{Result, bail, ensure};

use crate::coreml::format::proto;

/// Most elements that a value of a program may have, so that sizes in bits and bytes do not overflow. The attention scores
/// of Stable Diffusion 1 at 1152 pixels are 2^33, and those of the largest latents that are exported 2^52. Whether there is
/// memory for them is another question, asked before a program is run.
pub const MAX_ELEMENTS: u64 = 1 << 56;

/// Element types that occur in Stable Diffusion packages. Others of the format (64-bit, bfloat16, float8) are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DataType {
    Bool,
    String,
    Float16,
    Float32,
    Int4,
    Int8,
    Int16,
    Int32,
    Uint1,
    Uint2,
    Uint3,
    Uint4,
    Uint6,
    Uint8,
    Uint16,
    Uint32,
}

use DataType::*;

/// Type, its number in `model.mlmodel`, its number in `weight.bin` (0: never there), bits an element, name.
const TYPES: [(DataType, i32, u32, u32, &str); 16] = [
    (Bool, 1, 0, 8, "BOOL"),
    (String, 2, 0, 0, "STRING"),
    (Float16, 10, 1, 16, "FLOAT16"),
    (Float32, 11, 2, 32, "FLOAT32"),
    (Int4, 25, 8, 4, "INT4"),
    (Int8, 21, 4, 8, "INT8"),
    (Int16, 22, 6, 16, "INT16"),
    (Int32, 23, 14, 32, "INT32"),
    (Uint1, 37, 9, 1, "UINT1"),
    (Uint2, 36, 10, 2, "UINT2"),
    (Uint3, 39, 12, 3, "UINT3"),
    (Uint4, 35, 11, 4, "UINT4"),
    (Uint6, 38, 13, 6, "UINT6"),
    (Uint8, 31, 3, 8, "UINT8"),
    (Uint16, 32, 7, 16, "UINT16"),
    (Uint32, 33, 15, 32, "UINT32"),
];

impl DataType {
    /// From the enumeration of `model.mlmodel`.
    pub fn from_mil(number: i32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    /// From the other enumeration, that of `weight.bin`.
    pub fn from_blob(number: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.2 == number && number != 0).map(|row| row.0)
    }

    fn row(self) -> &'static (DataType, i32, u32, u32, &'static str) {
        // The table has one row for each variant, in their order.
        &TYPES[self as usize]
    }

    /// Bits an element takes when packed; 0 for strings.
    pub fn bits(self) -> u32 {
        self.row().3
    }

    pub fn is_float(self) -> bool {
        matches!(self, Float16 | Float32)
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().4)
    }
}

/// Element type and shape; every dimension is at least 1 and their product at most `MAX_ELEMENTS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    pub data_type: DataType,
    pub shape: Vec<i64>,
    /// How long the first dimension is, is known when the program runs; `shape` has the most that it can be.
    pub varying: bool,
}

impl TensorType {
    /// # Errors
    /// On an empty dimension or too many elements.
    pub fn new(data_type: DataType, shape: Vec<i64>) -> Result<Self> {
        let made = Self { data_type, shape, varying: false };
        let mut product = 1u64;
        for &size in &made.shape {
            ensure!(size >= 1, "{made} has a dimension without elements");
            product = match product.checked_mul(size as u64) {
                Some(product) if product <= MAX_ELEMENTS => product,
                _ => bail!("{made} has more than {MAX_ELEMENTS} elements"),
            };
        }
        ensure!(made.shape.len() <= 16, "{made} has more than 16 dimensions");
        Ok(made)
    }

    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Product of the shape; 1 for a scalar.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }

    /// Bytes of the elements when packed without gaps.
    pub fn packed_bytes(&self) -> u64 {
        (self.elements() * u64::from(self.data_type.bits())).div_ceil(8)
    }

    /// The same element type with another shape.
    pub fn with_shape(&self, shape: Vec<i64>) -> Result<Self> {
        Self::new(self.data_type, shape)
    }

    /// The same, of at most so many elements: how many is known when the program runs.
    pub fn at_most(self) -> Self {
        Self { varying: true, ..self }
    }

    /// Whether a program may declare a result of the type `inferred` as this. The most that a varying dimension can be
    /// is not declared.
    pub fn declares(&self, inferred: &Self) -> bool {
        let first = usize::from(self.varying && inferred.varying);
        (self.data_type, self.rank(), self.varying) == (inferred.data_type, inferred.rank(), inferred.varying)
            && self.shape[first..] == inferred.shape[first..]
    }

    /// `axis` counted from the front; negative ones count from the back.
    pub fn axis(&self, axis: i64) -> Result<usize> {
        axis_of(axis, self.rank())
    }

    /// From the file; only tensors of known shape.
    pub(super) fn from_proto(declared: Option<&proto::ValueType>) -> Result<Self> {
        let kind = Self::of_result(declared)?;
        ensure!(!kind.varying, "a dimension has no fixed size; flexible shapes are not read");
        Ok(kind)
    }

    /// The same, for results of operations, of which the first dimension may be unknown.
    pub(super) fn of_result(declared: Option<&proto::ValueType>) -> Result<Self> {
        use proto::{DimensionKind, ValueTypeKind};
        let Some(ValueTypeKind::Tensor(tensor)) = declared.and_then(|declared| declared.kind.as_ref()) else {
            bail!("a type is not a tensor type (lists, tuples, dictionaries and states are not supported)");
        };
        let Some(data_type) = DataType::from_mil(tensor.data_type) else {
            bail!("MIL data type {} is unknown or not supported", tensor.data_type);
        };
        ensure!(
            usize::try_from(tensor.rank) == Ok(tensor.dimensions.len()),
            "a tensor type says rank {} and lists {} dimensions",
            tensor.rank,
            tensor.dimensions.len()
        );
        ensure!(tensor.attributes.is_empty(), "a tensor type has attributes");
        let mut varying = false;
        let shape = tensor
            .dimensions
            .iter()
            .enumerate()
            .map(|(axis, dimension)| match &dimension.dimension {
                Some(DimensionKind::Constant(constant)) => match i64::try_from(constant.size) {
                    Ok(size) => Ok(size),
                    Err(_) => bail!("a dimension has size {}", constant.size),
                },
                Some(DimensionKind::Unknown(unknown)) => {
                    let first = axis == 0 && !unknown.variadic;
                    ensure!(first, "a dimension but the first has no fixed size; flexible shapes are not read");
                    varying = true;
                    Ok(1)
                }
                None => bail!("a dimension is neither constant nor unknown"),
            })
            .collect::<Result<_>>()?;
        Ok(Self { varying, ..Self::new(data_type, shape)? })
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (true, [_, rest @ ..]) = (self.varying, &self.shape[..]) {
            let rest: Vec<_> = rest.iter().map(|size| format!(", {size}")).collect();
            return write!(f, "{}[?{}]", self.data_type, rest.concat());
        }
        write!(f, "{}{:?}", self.data_type, self.shape)
    }
}

/// `axis` of a tensor of `rank`, counted from the front.
pub fn axis_of(axis: i64, rank: usize) -> Result<usize> {
    let rank = rank as i64;
    ensure!((-rank..rank).contains(&axis), "axis {axis} does not exist in rank {rank}");
    Ok(if axis < 0 { axis + rank } else { axis } as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants() {
        for row in TYPES {
            assert_eq!(row.0.row().0, row.0);
            assert_eq!(DataType::from_mil(row.1), Some(row.0));
            assert_eq!(DataType::from_blob(row.2), (row.2 != 0).then_some(row.0));
        }
    }

    #[test]
    fn how_many_there_can_be_is_not_declared() {
        let kind = |shape: &[i64]| TensorType::new(Int32, shape.to_vec()).unwrap();
        assert!(kind(&[1, 4]).at_most().declares(&kind(&[9, 4]).at_most()));
        assert!(!kind(&[1, 4]).at_most().declares(&kind(&[9, 3]).at_most()));
        assert!(!kind(&[9, 4]).declares(&kind(&[9, 4]).at_most()) && !kind(&[9, 4]).at_most().declares(&kind(&[9, 4])));
        assert_eq!(kind(&[9, 4]).at_most().to_string(), "INT32[?, 4]");
    }

    #[test]
    fn sizes_are_bounded_before_anything_is_multiplied() {
        assert!(TensorType::new(Float16, vec![1 << 40, 1 << 40]).is_err());
        assert!(TensorType::new(Float16, vec![4, 0]).is_err());
        assert!(TensorType::new(Float16, vec![-1]).is_err());
        let packed = TensorType::new(Uint3, vec![3, 3]).unwrap();
        assert_eq!((packed.elements(), packed.packed_bytes()), (9, 4));
        assert!(axis_of(-3, 2).is_err());
        assert_eq!(axis_of(-1, 2).unwrap(), 1);
    }
}
