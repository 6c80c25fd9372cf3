//! Some of the elements: slices, gathers and, the other way, scattering.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{DataType, TensorType};

/// What is taken along one axis: `count` elements from `first`, `stride` apart.
#[derive(Debug, PartialEq)]
struct Range {
    first: i64,
    count: i64,
    stride: i64,
    /// The axis disappears.
    squeezed: bool,
}

/// Python's `range(size)[begin:end:stride]`.
fn python_slice(begin: Option<i64>, end: Option<i64>, stride: i64, size: i64) -> (i64, i64) {
    let (low, high) = if stride > 0 { (0, size) } else { (-1, size - 1) };
    let clamp = |at: i64| if at < 0 { at.saturating_add(size).max(low) } else { at.min(high) };
    let first = begin.map_or(if stride > 0 { low } else { high }, clamp);
    let last = end.map_or(if stride > 0 { high } else { low }, clamp);
    let distance = if stride > 0 { last - first } else { first - last };
    // `unsigned_abs`: the stride may be the smallest integer.
    (first, if distance <= 0 { 0 } else { (distance as u64).div_ceil(stride.unsigned_abs()) as i64 })
}

fn ranges(call: &Call) -> Result<Vec<Range>> {
    let x = call.kind("x")?;
    let rank = x.rank();
    let begin = call.ints_of("begin", rank)?;
    if call.kind == "slice_by_size" {
        let sizes = call.ints_of("size", rank)?;
        return (0..rank)
            .map(|axis| {
                let size = x.shape[axis];
                let first = if begin[axis] < 0 { begin[axis] + size } else { begin[axis] };
                let count = if sizes[axis] == -1 { size - first } else { sizes[axis] };
                ensure!(
                    (0..size).contains(&first) && (1..=size - first).contains(&count),
                    "{count} elements from {first} are not in axis {axis} of {x}"
                );
                Ok(Range { first, count, stride: 1, squeezed: false })
            })
            .collect();
    }
    let end = call.ints_of("end", rank)?;
    let strides = if call.has("stride") { call.ints_of("stride", rank)? } else { vec![1; rank] };
    let masks = [call.mask("begin_mask", rank)?, call.mask("end_mask", rank)?, call.mask("squeeze_mask", rank)?];
    (0..rank)
        .map(|axis| {
            let size = x.shape[axis];
            if masks[2][axis] {
                let first = if begin[axis] < 0 { begin[axis] + size } else { begin[axis] };
                ensure!((0..size).contains(&first), "index {} is not in axis {axis} of {x}", begin[axis]);
                return Ok(Range { first, count: 1, stride: 1, squeezed: true });
            }
            ensure!(strides[axis] != 0, "stride 0 on axis {axis}");
            let (from, to) = ((!masks[0][axis]).then_some(begin[axis]), (!masks[1][axis]).then_some(end[axis]));
            let (first, count) = python_slice(from, to, strides[axis], size);
            ensure!(count > 0, "the slice of axis {axis} of {x} is empty");
            Ok(Range { first, count, stride: strides[axis], squeezed: false })
        })
        .collect()
}

pub fn infer_slice(call: &Call) -> Result<TensorType> {
    let kept = ranges(call)?.into_iter().filter(|range| !range.squeezed);
    call.kind("x")?.with_shape(kept.map(|range| range.count).collect())
}

pub fn run_slice(call: &Call) -> Result<Tensor> {
    let mut x = call.tensor("x")?.shallow_clone();
    for (axis, Range { first, count, stride, .. }) in ranges(call)?.into_iter().enumerate() {
        let axis = axis as i64;
        x = if stride > 0 {
            x.f_slice(axis, first, first + (count - 1) * stride + 1, stride)?
        } else {
            let index: Vec<i64> = (0..count).map(|number| first + number * stride).collect();
            x.f_index_select(axis, &Tensor::f_from_slice(&index)?.f_to_device(x.device())?)?
        };
    }
    Ok(x.f_reshape(infer_slice(call)?.shape)?)
}

fn check_indices<'a>(call: &'a Call) -> Result<&'a TensorType> {
    use DataType::*;
    let indices = call.kind("indices")?;
    let since = match indices.data_type {
        Int32 => 0,
        Int16 | Uint16 => 7,
        Int8 | Uint8 => 8,
        _ => bail!("indices are {indices}"),
    };
    ensure!(call.specification_version >= since, "indices of {indices} need specification version {since}");
    if call.has("batch_dims") {
        ensure!(call.int("batch_dims")? == 0, "{} with batch_dims is not supported", call.kind);
    }
    if call.has("validate_indices") {
        call.boolean("validate_indices")?;
    }
    Ok(indices)
}

/// Indices into an axis of `size` as 64-bit integers from 0; negative ones count from the end before iOS 17.
fn positions(call: &Call, indices: &Tensor, size: i64) -> Result<Tensor> {
    let indices = indices.f_to_kind(Kind::Int64)?;
    let least = if call.specification_version < 8 { -size } else { 0 };
    let (low, high) = (indices.f_min()?.f_int64_value(&[])?, indices.f_max()?.f_int64_value(&[])?);
    ensure!(
        low >= least && high < size,
        "indices from {low} to {high} into {size} elements{}",
        if low < 0 && least == 0 { " (negative ones are not allowed from iOS 17 on)" } else { "" }
    );
    Ok(indices.f_remainder(size)?)
}

/// Rows of `x` along `axis`: its shape with the axis replaced by the shape of the indices.
pub fn infer_gather(call: &Call) -> Result<TensorType> {
    let (x, indices) = (call.kind("x")?, check_indices(call)?);
    let axis = x.axis(call.int("axis")?)?;
    x.with_shape([&x.shape[..axis], &indices.shape[..], &x.shape[axis + 1..]].concat())
}

pub fn run_gather(call: &Call) -> Result<Tensor> {
    let x = call.kind("x")?;
    let axis = x.axis(call.int("axis")?)?;
    let positions = positions(call, call.tensor("indices")?, x.shape[axis])?.f_flatten(0, -1)?;
    Ok(call.tensor("x")?.f_index_select(axis as i64, &positions)?.f_reshape(infer_gather(call)?.shape)?)
}

/// indices `[…, k]` into the first `k` axes of `x` → `[…, rest of x]`
pub fn infer_gather_nd(call: &Call) -> Result<TensorType> {
    let (x, indices) = (call.kind("x")?, check_indices(call)?);
    let Some((&depth, front)) = indices.shape.split_last() else { bail!("indices of gather_nd are a scalar") };
    ensure!(depth as usize <= x.rank(), "gather_nd of {x} by indices {indices}");
    x.with_shape([front, &x.shape[depth as usize..]].concat())
}

pub fn run_gather_nd(call: &Call) -> Result<Tensor> {
    let (x, indices) = (call.kind("x")?, call.tensor("indices")?);
    let columns = (0..call.kind("indices")?.shape.last().copied().unwrap_or(0))
        .map(|column| Ok(Some(positions(call, &indices.f_select(-1, column)?, x.shape[column as usize])?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(call.tensor("x")?.f_index(&columns)?)
}

/// `data` with `updates` `[…, rest of data]` at indices `[…, k]` into its first `k` axes.
pub fn infer_scatter_nd(call: &Call) -> Result<TensorType> {
    let (data, indices, updates) = (call.kind("data")?, check_indices(call)?, call.kind("updates")?);
    ensure!(indices.data_type == DataType::Int32, "indices of scatter_nd are {indices}");
    ensure!(data.data_type.is_float() || data.data_type == DataType::Int32, "scatter_nd of {data}");
    ensure!(!data.varying && ["update", "add"].contains(&call.text("mode")?), "this scatter_nd is not supported");
    let fits = indices.shape.split_last().is_some_and(|(&depth, front)| {
        let rest = data.shape.get(depth as usize..);
        // How many varying ones there are is compared when they are there.
        let first = usize::from(indices.varying && !front.is_empty());
        rest.is_some_and(|rest| {
            let wanted = [front, rest].concat();
            updates.rank() == wanted.len() && updates.shape[first..] == wanted[first..]
        })
    });
    ensure!(
        fits && indices.varying == updates.varying && updates.data_type == data.data_type,
        "scatter_nd of {updates} at {indices} into {data}"
    );
    Ok(data.clone())
}

pub fn run_scatter_nd(call: &Call) -> Result<Tensor> {
    let (data, indices, updates) = (call.tensor("data")?, call.tensor("indices")?, call.tensor("updates")?);
    let (size, of_updates) = (indices.size(), updates.size());
    let Some((&depth, front)) = size.split_last() else { bail!("indices of scatter_nd are a scalar") };
    ensure!(of_updates.starts_with(front), "scatter_nd of updates {of_updates:?} at indices {size:?}");
    if indices.numel() == 0 {
        return Ok(data.shallow_clone());
    }
    let columns = (0..depth)
        .map(|column| Ok(Some(positions(call, &indices.f_select(-1, column)?, data.size()[column as usize])?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(data.f_index_put(&columns, updates, call.text("mode")? == "add")?)
}

#[cfg(test)]
mod tests {
    use super::python_slice;

    #[test]
    fn slices_are_pythons() {
        // [list(range(7))[b:e:s]] gives (first, len) in Python
        assert_eq!(python_slice(Some(2), Some(5), 1, 7), (2, 3));
        assert_eq!(python_slice(Some(-3), None, 1, 7), (4, 3));
        assert_eq!(python_slice(None, Some(-1), 2, 7), (0, 3));
        assert_eq!(python_slice(None, None, -2, 7), (6, 4));
        assert_eq!(python_slice(Some(5), Some(1), -3, 7), (5, 2));
        assert_eq!(python_slice(Some(9), Some(-99), -1, 7), (6, 7));
        assert_eq!(python_slice(Some(4), Some(4), 1, 7).1, 0);
        assert_eq!(python_slice(Some(0), Some(1), i64::MIN, 7).1, 0);
    }
}
