//! The operations, family by family. Each has two halves that stand together: `infer`, the types of its outputs from
//! the types and parameters of its inputs (which refuses whatever cannot be run, before anything is allocated), and
//! `run`, the tensors.
//!
//! Every float is computed in 32 bits; the evaluator rounds. Semantics are those of MIL as coremltools documents them.

mod algebra;
mod checks;
mod convolution;
mod counted;
mod layout;
mod normalize;
mod pick;
mod pointwise;
mod resize;
#[cfg(test)]
mod tests;

use anyhow::Result;
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
