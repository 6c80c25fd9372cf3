//! The operations, family by family. Each has two halves that stand together: `infer`, the types of its outputs from
//! the types and parameters of its inputs (which refuses whatever cannot be run, before anything is allocated), and
//! `run`, the tensors.
//!
//! Every float is computed in 32 bits; the evaluator rounds. Semantics are those of MIL as coremltools documents them.

mod algebra;
mod convolution;
mod counted;
mod layout;
mod normalize;
mod pick;
mod pointwise;
mod resize;
#[cfg(test)]
mod tests;

use anyhow::{Result, bail, ensure};
use tch::Tensor;

use super::call::Call;
use super::types::TensorType;

pub use counted::most;

/// Types of the outputs.
///
/// # Errors
/// When the inputs do not fit the operation.
pub fn infer(call: &Call) -> Result<Vec<TensorType>> {
    let types = match call.kind {
        "shape" => vec![counted::infer_shape(call)?],
        "non_zero" => vec![counted::infer_non_zero(call)?],
        "tile" => vec![counted::infer_tile(call)?],
        "scatter_nd" => vec![pick::infer_scatter_nd(call)?],
        "conv" => vec![convolution::infer(call)?],
        "conv_transpose" => vec![convolution::infer_transposed(call)?],
        "linear" => vec![algebra::infer_linear(call)?],
        "matmul" => vec![algebra::infer_matmul(call)?],
        "einsum" => vec![algebra::infer_einsum(call)?],
        "scaled_dot_product_attention" => vec![algebra::infer_attention(call)?],
        "softmax" | "layer_norm" | "batch_norm" | "instance_norm" => vec![normalize::infer(call)?],
        "reduce_mean" | "reduce_sum" | "reduce_max" | "reduce_min" | "reduce_l2_norm" => {
            vec![normalize::infer_reduce(call)?]
        }
        "reduce_argmax" => vec![normalize::infer_argmax(call)?],
        "split" => layout::infer_split(call)?,
        "reshape" | "transpose" | "expand_dims" | "squeeze" | "concat" | "stack" | "pad" => vec![layout::infer(call)?],
        "slice_by_index" | "slice_by_size" => vec![pick::infer_slice(call)?],
        "gather" => vec![pick::infer_gather(call)?],
        "gather_nd" => vec![pick::infer_gather_nd(call)?],
        "upsample_nearest_neighbor" | "upsample_bilinear" => vec![resize::infer(call)?],
        _ => return Ok(vec![counted::carried(call, pointwise::infer(call)?)?]),
    };
    counted::check(call)?;
    Ok(types)
}

/// Tensors of the outputs of a call that [`infer`] has accepted.
///
/// # Errors
/// libtorch's, and indices out of range.
pub fn run(call: &Call) -> Result<Vec<Tensor>> {
    Ok(match call.kind {
        "shape" => vec![counted::run_shape(call)?],
        "non_zero" => vec![call.tensor("x")?.f_nonzero()?],
        "tile" => vec![counted::run_tile(call)?],
        "scatter_nd" => vec![pick::run_scatter_nd(call)?],
        "conv" => vec![convolution::run(call)?],
        "conv_transpose" => vec![convolution::run_transposed(call)?],
        "linear" => vec![algebra::run_linear(call)?],
        "matmul" => vec![algebra::run_matmul(call)?],
        "einsum" => vec![algebra::run_einsum(call)?],
        "scaled_dot_product_attention" => vec![algebra::run_attention(call)?],
        "softmax" | "layer_norm" | "batch_norm" | "instance_norm" => vec![normalize::run(call)?],
        "reduce_mean" | "reduce_sum" | "reduce_max" | "reduce_min" | "reduce_l2_norm" => {
            vec![normalize::run_reduce(call)?]
        }
        "reduce_argmax" => vec![normalize::run_argmax(call)?],
        "split" => layout::run_split(call)?,
        "reshape" | "transpose" | "expand_dims" | "squeeze" | "concat" | "stack" | "pad" => vec![layout::run(call)?],
        "slice_by_index" | "slice_by_size" => vec![pick::run_slice(call)?],
        "gather" => vec![pick::run_gather(call)?],
        "gather_nd" => vec![pick::run_gather_nd(call)?],
        "upsample_nearest_neighbor" | "upsample_bilinear" => vec![resize::run(call)?],
        _ => vec![pointwise::run(call)?],
    })
}

/// Numpy's broadcasting of two shapes.
fn broadcast(a: &[i64], b: &[i64]) -> Result<Vec<i64>> {
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
fn floats(call: &Call, names: &[&str]) -> Result<()> {
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
fn vector(call: &Call, name: &str, size: i64) -> Result<()> {
    match call.kind_if_any(name)? {
        Some(kind) if kind.shape != [size] => bail!("input {name} must have the shape [{size}], it is {kind}"),
        _ => Ok(()),
    }
}

/// Sizes, strides and the like: from `least` to 2^24, so that sums and products of a few of them fit easily.
fn within(name: &str, values: &[i64], least: i64) -> Result<()> {
    match values.iter().find(|&&value| !(least..=1 << 24).contains(&value)) {
        Some(value) => bail!("parameter {name} has the value {value}"),
        None => Ok(()),
    }
}
