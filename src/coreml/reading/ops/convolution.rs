//! Convolutions over 1 to 3 spatial axes, and their transposes.

use anyhow::{Result, bail, ensure};
use tch::Tensor;

use super::checks::{floats, vector, within};
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::TensorType;

/// Parameters of a convolution over `strides.len()` spatial axes.
struct Convolution {
    strides: Vec<i64>,
    dilations: Vec<i64>,
    groups: i64,
    /// Zeros before and after each axis.
    padding: Vec<(i64, i64)>,
}

impl Convolution {
    fn of(call: &Call) -> Result<Self> {
        floats(call, &["x", "weight", "bias"])?;
        let (x, weight) = (call.kind("x")?, call.kind("weight")?);
        ensure!(
            (3..=5).contains(&x.rank()) && weight.rank() == x.rank(),
            "convolution of {x} by a weight {weight}: they need the same rank, 3 to 5"
        );
        let axes = x.rank() - 2;
        let (strides, dilations) = (call.ints_of("strides", axes)?, call.ints_of("dilations", axes)?);
        let (pad, groups) = (call.ints_of("pad", 2 * axes)?, call.int("groups")?);
        within("strides", &strides, 1)?;
        within("dilations", &dilations, 1)?;
        within("pad", &pad, 0)?;
        within("groups", &[groups], 1)?;
        within("weight's shape", &weight.shape, 1)?;
        within("x's shape", &x.shape, 1)?;
        let kind = call.text("pad_type")?;
        let padding = (0..axes)
            .map(|axis| {
                let (size, kernel, stride) = (x.shape[axis + 2], weight.shape[axis + 2], strides[axis]);
                let total = (size.div_ceil_i64(stride) - 1) * stride + (kernel - 1) * dilations[axis] + 1 - size;
                let (less, more) = (total.max(0) / 2, total.max(0) - total.max(0) / 2);
                Ok(match kind {
                    "valid" => (0, 0),
                    "custom" => (pad[2 * axis], pad[2 * axis + 1]),
                    "same" => (less, more),
                    "same_lower" if call.specification_version >= 7 => (more, less),
                    _ => bail!("pad_type {kind:?} is not known in this specification version"),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { strides, dilations, groups, padding })
    }
}

trait DivCeil {
    fn div_ceil_i64(self, by: i64) -> i64;
}

impl DivCeil for i64 {
    /// For positive numbers.
    fn div_ceil_i64(self, by: i64) -> i64 {
        (self + by - 1) / by
    }
}

/// x `[n, in, …]`, weight `[out, in/groups, …]` → `[n, out, …]`
pub fn infer(call: &Call) -> Result<TensorType> {
    let convolution = Convolution::of(call)?;
    let (x, weight) = (call.kind("x")?, call.kind("weight")?);
    let (out, groups) = (weight.shape[0], convolution.groups);
    ensure!(
        weight.shape[1] * groups == x.shape[1] && out % groups == 0,
        "convolution of {x} by a weight {weight} in {groups} groups"
    );
    vector(call, "bias", out)?;
    let mut shape = vec![x.shape[0], out];
    for axis in 0..convolution.strides.len() {
        let (before, after) = convolution.padding[axis];
        let reach = (weight.shape[axis + 2] - 1) * convolution.dilations[axis] + 1;
        let room = x.shape[axis + 2] + before + after - reach;
        ensure!(room >= 0, "the kernel of {weight} is larger than the padded {x}");
        shape.push(room / convolution.strides[axis] + 1);
    }
    x.with_shape(shape)
}

pub fn run(call: &Call) -> Result<Tensor> {
    let Convolution { strides, dilations, groups, padding } = Convolution::of(call)?;
    let (x, weight, bias) = (call.tensor("x")?, call.tensor("weight")?, call.tensor_if_any("bias")?);
    let even = padding.iter().all(|(before, after)| before == after);
    let x = if even { x.shallow_clone() } else { x.f_constant_pad_nd(last_axis_first(&padding))? };
    let pad: Vec<i64> = padding.iter().map(|(before, _)| if even { *before } else { 0 }).collect();
    Ok(match strides.len() {
        1 => x.f_conv1d(weight, bias, strides, pad, dilations, groups),
        2 => x.f_conv2d(weight, bias, strides, pad, dilations, groups),
        _ => x.f_conv3d(weight, bias, strides, pad, dilations, groups),
    }?)
}

/// Pairs of padding in the order that libtorch wants.
pub fn last_axis_first(padding: &[(i64, i64)]) -> Vec<i64> {
    padding.iter().rev().flat_map(|&(before, after)| [before, after]).collect()
}

/// Spatial sizes before and after padding is taken off.
fn transposed_sizes(call: &Call, convolution: &Convolution) -> Result<(Vec<i64>, Vec<i64>)> {
    let (x, weight) = (call.kind("x")?, call.kind("weight")?);
    ensure!(
        matches!(call.text("pad_type")?, "valid" | "custom"),
        "conv_transpose with pad_type {:?} is not supported",
        call.text("pad_type")?
    );
    let axes = convolution.strides.len();
    let full: Vec<i64> = (0..axes)
        .map(|axis| {
            let reach = (weight.shape[axis + 2] - 1) * convolution.dilations[axis] + 1;
            (x.shape[axis + 2] - 1) * convolution.strides[axis] + reach
        })
        .collect();
    let wanted = if call.has("output_shape") {
        let shape = call.ints_of("output_shape", axes + 2)?;
        within("output_shape", &shape, 1)?;
        shape[2..].to_vec()
    } else {
        full.iter().zip(&convolution.padding).map(|(size, (before, after))| size - before - after).collect()
    };
    Ok((full, wanted))
}

/// x `[n, in, …]`, weight `[in, out/groups, …]` → `[n, out, …]`
pub fn infer_transposed(call: &Call) -> Result<TensorType> {
    let convolution = Convolution::of(call)?;
    let (x, weight) = (call.kind("x")?, call.kind("weight")?);
    let out = weight.shape[1] * convolution.groups;
    ensure!(
        weight.shape[0] == x.shape[1] && x.shape[1] % convolution.groups == 0,
        "conv_transpose of {x} by a weight {weight} in {} groups",
        convolution.groups
    );
    vector(call, "bias", out)?;
    let (full, wanted) = transposed_sizes(call, &convolution)?;
    let inside = full.iter().zip(&convolution.padding).all(|(size, (before, _))| before < size);
    ensure!(inside, "conv_transpose with a pad of {:?} leaves nothing of {full:?}", convolution.padding);
    // What is computed before cropping counts too.
    x.with_shape([&[x.shape[0], out], &full[..]].concat())?;
    x.with_shape([&[x.shape[0], out], &wanted[..]].concat())
}

pub fn run_transposed(call: &Call) -> Result<Tensor> {
    let convolution = Convolution::of(call)?;
    let (full, wanted) = transposed_sizes(call, &convolution)?;
    let Convolution { strides, dilations, groups, padding } = convolution;
    let (x, weight, bias) = (call.tensor("x")?, call.tensor("weight")?, call.tensor_if_any("bias")?);
    let none = vec![0; strides.len()];
    let mut y = match strides.len() {
        1 => x.f_conv_transpose1d(weight, bias, strides, &none, &none, groups, dilations),
        2 => x.f_conv_transpose2d(weight, bias, strides, &none, &none, groups, dilations),
        _ => x.f_conv_transpose3d(weight, bias, strides, &none, &none, groups, dilations),
    }?;
    for (axis, &(before, _)) in padding.iter().enumerate() {
        // An output shape may reach past what was computed; there it is zero.
        let computed = wanted[axis].min(full[axis] - before);
        y = y.f_narrow(axis as i64 + 2, before, computed)?;
        if wanted[axis] > computed {
            let mut pad = vec![(0, 0); padding.len()];
            pad[axis].1 = wanted[axis] - computed;
            y = y.f_constant_pad_nd(last_axis_first(&pad))?;
        }
    }
    Ok(y)
}
