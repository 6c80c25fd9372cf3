//! Along axes: softmax, normalisations in their inference form, reductions.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use super::checks::{floats, vector};
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{DataType, TensorType};

pub fn infer(call: &Call) -> Result<TensorType> {
    floats(call, &["x", "mean", "variance", "gamma", "beta", "epsilon"])?;
    let x = call.kind("x")?;
    match call.kind {
        "softmax" => {
            x.axis(call.int("axis")?)?;
        }
        "layer_norm" => {
            let axes = call.axes("axes", x)?;
            ensure!(!axes.is_empty(), "layer_norm over no axes");
            let wanted: Vec<i64> = axes.iter().map(|&axis| x.shape[axis as usize]).collect();
            for name in ["gamma", "beta"] {
                if let Some(kind) = call.kind_if_any(name)? {
                    ensure!(kind.shape == wanted, "input {name} must have the shape {wanted:?}, it is {kind}");
                }
            }
        }
        _ => {
            let ranks = if call.kind == "batch_norm" { 3..=5 } else { 3..=4 };
            ensure!(ranks.contains(&x.rank()), "{} of {x}: its rank must be {ranks:?}", call.kind);
            for name in ["mean", "variance", "gamma", "beta"] {
                vector(call, name, x.shape[1])?;
            }
        }
    }
    if call.has("epsilon") {
        ensure!(call.real("epsilon")? >= 0.0, "epsilon is negative");
    }
    Ok(x.clone())
}

pub fn run(call: &Call) -> Result<Tensor> {
    let (x, kind) = (call.tensor("x")?, call.kind("x")?);
    if call.kind == "softmax" {
        return Ok(x.f_softmax(call.int("axis")?, None::<Kind>)?);
    }
    let epsilon = call.real("epsilon")?;
    // Axes that are normalised over, and those along which the scale varies.
    let spatial: Vec<i64> = (2..kind.rank() as i64).collect();
    let (over, along) = match call.kind {
        "layer_norm" => (call.axes("axes", kind)?, call.axes("axes", kind)?),
        _ => (spatial, vec![1]),
    };
    let shape: Vec<i64> =
        (0..kind.rank()).map(|axis| if along.contains(&(axis as i64)) { kind.shape[axis] } else { 1 }).collect();
    let (centred, variance) = if call.kind == "batch_norm" {
        let mean = call.tensor("mean")?.f_reshape(&shape)?;
        (x.f_sub(&mean)?, call.tensor("variance")?.f_reshape(&shape)?)
    } else {
        let centred = x.f_sub(&x.f_mean_dim(&over[..], true, None::<Kind>)?)?;
        let variance = centred.f_square()?.f_mean_dim(&over[..], true, None::<Kind>)?;
        (centred, variance)
    };
    let mut y = centred.f_div(&variance.f_add_scalar(epsilon)?.f_sqrt()?)?;
    if let Some(gamma) = call.tensor_if_any("gamma")? {
        y = y.f_mul(&gamma.f_reshape(&shape)?)?;
    }
    if let Some(beta) = call.tensor_if_any("beta")? {
        y = y.f_add(&beta.f_reshape(&shape)?)?;
    }
    Ok(y)
}

/// `shape` without `axes`, or with ones in their place.
fn reduced(shape: &[i64], axes: &[i64], keep: bool) -> Vec<i64> {
    let gone = |axis: usize| axes.contains(&(axis as i64));
    let sizes = shape.iter().enumerate();
    sizes.filter(|(axis, _)| keep || !gone(*axis)).map(|(axis, &size)| if gone(axis) { 1 } else { size }).collect()
}

pub fn infer_reduce(call: &Call) -> Result<TensorType> {
    let x = call.kind("x")?;
    let whole = x.data_type == DataType::Int32 && !["reduce_mean", "reduce_l2_norm"].contains(&call.kind);
    ensure!(x.data_type.is_float() || whole, "{} of {x}", call.kind);
    let axes = call.axes("axes", x)?;
    ensure!(!axes.is_empty() || x.rank() == 0, "{} over no axes", call.kind);
    x.with_shape(reduced(&x.shape, &axes, call.boolean("keep_dims")?))
}

pub fn run_reduce(call: &Call) -> Result<Tensor> {
    let (x, keep) = (call.tensor("x")?, call.boolean("keep_dims")?);
    let axes = call.axes("axes", call.kind("x")?)?;
    let axes = &axes[..];
    Ok(match call.kind {
        "reduce_mean" => x.f_mean_dim(axes, keep, None::<Kind>),
        "reduce_sum" => x.f_sum_dim_intlist(axes, keep, None::<Kind>),
        "reduce_l2_norm" => x.f_norm_scalaropt_dim(2, axes, keep),
        "reduce_max" => x.f_amax(axes, keep),
        "reduce_min" => x.f_amin(axes, keep),
        kind => bail!("{kind} cannot be run"),
    }?)
}

/// Where the largest is, INT32.
pub fn infer_argmax(call: &Call) -> Result<TensorType> {
    let x = call.kind("x")?;
    ensure!(x.data_type.is_float() || x.data_type == DataType::Int32, "reduce_argmax of {x}");
    if call.has("output_dtype") {
        let output = call.text("output_dtype")?;
        ensure!(output == "int32", "reduce_argmax to {output:?} is not supported");
    }
    let axis = x.axis(call.int("axis")?)? as i64;
    TensorType::new(DataType::Int32, reduced(&x.shape, &[axis], call.boolean("keep_dims")?))
}

pub fn run_argmax(call: &Call) -> Result<Tensor> {
    Ok(call.tensor("x")?.f_argmax(call.int("axis")?, call.boolean("keep_dims")?)?)
}
