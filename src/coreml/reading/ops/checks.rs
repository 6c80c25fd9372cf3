//! What several families ask of their inputs.

use anyhow::{Result, bail, ensure};

use super::super::call::Call;
use super::super::types::TensorType;

/// Numpy's broadcasting of two shapes.
pub(super) fn broadcast(a: &[i64], b: &[i64]) -> Result<Vec<i64>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[i64], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| match (size(a, axis), size(b, axis)) {
            (a, b) if a == b || b == 1 => Ok(a),
            (1, b) => Ok(b),
            _ => bail!("shapes {a:?} and {b:?} do not broadcast"),
        })
        .collect()
}

/// Floats everywhere; before iOS 17 (specification version 8) all of one type. Absent inputs are fine.
pub(super) fn floats(call: &Call, names: &[&str]) -> Result<()> {
    let mut first: Option<&TensorType> = None;
    for name in names {
        let Some(kind) = call.kind_if_any(name)? else { continue };
        ensure!(kind.data_type.is_float(), "input {name} must be a float, it is {kind}");
        let first = *first.get_or_insert(kind);
        ensure!(
            call.specification_version >= 8 || first.data_type == kind.data_type,
            "inputs {} and {name} have the types {} and {}; before specification version 8 they must be one",
            names[0],
            first.data_type,
            kind.data_type
        );
    }
    Ok(())
}

/// A vector of `size` elements, where the input is there.
pub(super) fn vector(call: &Call, name: &str, size: i64) -> Result<()> {
    match call.kind_if_any(name)? {
        Some(kind) if kind.shape != [size] => bail!("input {name} must have the shape [{size}], it is {kind}"),
        _ => Ok(()),
    }
}

/// Sizes, strides and the like: from `least` to 2^24, so that sums and products of a few of them fit easily.
pub(super) fn within(name: &str, values: &[i64], least: i64) -> Result<()> {
    match values.iter().find(|&&value| !(least..=1 << 24).contains(&value)) {
        Some(value) => bail!("parameter {name} has the value {value}"),
        None => Ok(()),
    }
}
