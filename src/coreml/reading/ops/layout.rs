//! The same elements in another arrangement: reshaping, joining, splitting, padding.

use anyhow::{Context, Result, bail, ensure};
use tch::{Kind, Tensor};

use super::checks::{floats, within};
use super::convolution::last_axis_first;
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{TensorType, axis_of};

pub fn infer(call: &Call) -> Result<TensorType> {
    match call.kind {
        "reshape" => infer_reshape(call),
        "transpose" => {
            let x = call.kind("x")?;
            let perm = permutation(call)?;
            x.with_shape(perm.into_iter().map(|axis| x.shape[axis as usize]).collect())
        }
        "expand_dims" => {
            let x = call.kind("x")?;
            let axes = new_axes(call)?;
            let mut shape = x.shape.clone();
            for axis in axes {
                shape.insert(axis, 1);
            }
            x.with_shape(shape)
        }
        "squeeze" => {
            let x = call.kind("x")?;
            // Without axes, every axis of size 1 goes.
            let axes = if call.has("axes") { call.axes("axes", x)? } else { Vec::new() };
            ensure!(axes.iter().all(|&axis| x.shape[axis as usize] == 1), "squeeze of {x} on axes {axes:?}");
            let gone = |axis: usize| if call.has("axes") { axes.contains(&(axis as i64)) } else { x.shape[axis] == 1 };
            x.with_shape((0..x.rank()).filter(|&axis| !gone(axis)).map(|axis| x.shape[axis]).collect())
        }
        "concat" => infer_concat(call),
        "stack" => {
            let kinds = call.kinds("values")?;
            let first = kinds.first().context("stack of nothing")?;
            ensure!(kinds.iter().all(|kind| kind == first), "stack of values of different types");
            let axis = axis_of(call.int("axis")?, first.rank() + 1)?;
            let mut shape = first.shape.clone();
            shape.insert(axis, kinds.len() as i64);
            first.with_shape(shape)
        }
        _ => infer_pad(call),
    }
}

pub fn run(call: &Call) -> Result<Tensor> {
    match call.kind {
        "transpose" => Ok(call.tensor("x")?.f_permute(permutation(call)?)?),
        // Where only the shape changes, the inferred one says all.
        "reshape" | "expand_dims" | "squeeze" => Ok(call.tensor("x")?.f_reshape(infer(call)?.shape)?),
        "concat" => {
            let (values, axis) = (call.tensors("values")?, call.int("axis")?);
            if values.iter().all(|value| value.dim() == 0) {
                return Ok(Tensor::f_stack(&values, 0)?);
            }
            if !call.boolean("interleave")? {
                return Ok(Tensor::f_cat(&values, axis)?);
            }
            let axis = call.kinds("values")?[0].axis(axis)? as i64;
            Ok(Tensor::f_stack(&values, axis + 1)?.f_flatten(axis, axis + 1)?)
        }
        "stack" => Ok(Tensor::f_stack(&call.tensors("values")?, call.int("axis")?)?),
        _ => run_pad(call),
    }
}

fn infer_reshape(call: &Call) -> Result<TensorType> {
    let x = call.kind("x")?;
    let wanted = call.ints("shape")?;
    let mut shape = wanted.clone();
    for (axis, size) in shape.iter_mut().enumerate() {
        if *size == 0 {
            ensure!(wanted.len() == x.rank(), "reshape of {x} to {wanted:?}: 0 needs equal ranks");
            *size = x.shape[axis];
        }
    }
    if let Some(unknown) = shape.iter().position(|&size| size == -1) {
        shape[unknown] = 1;
        let known = x.with_shape(shape.clone())?.elements();
        ensure!(x.elements().is_multiple_of(known), "reshape of {x} to {wanted:?}");
        shape[unknown] = (x.elements() / known) as i64;
    }
    let reshaped = x.with_shape(shape)?;
    ensure!(reshaped.elements() == x.elements(), "reshape of {x} to {wanted:?}");
    Ok(reshaped)
}

/// `perm`, each axis once, counted from the front.
fn permutation(call: &Call) -> Result<Vec<i64>> {
    let x = call.kind("x")?;
    let perm = call.ints_of("perm", x.rank())?;
    let perm = perm.into_iter().map(|axis| Ok(x.axis(axis)? as i64)).collect::<Result<Vec<_>>>()?;
    let all = (0..x.rank() as i64).all(|axis| perm.contains(&axis));
    ensure!(all, "perm {perm:?} is not a permutation of the axes of {x}");
    Ok(perm)
}

/// Axes of the result that `expand_dims` makes, ascending.
fn new_axes(call: &Call) -> Result<Vec<usize>> {
    let (x, axes) = (call.kind("x")?, call.ints("axes")?);
    let rank = x.rank() + axes.len();
    let mut axes = axes.into_iter().map(|axis| axis_of(axis, rank)).collect::<Result<Vec<_>>>()?;
    axes.sort_unstable();
    ensure!(axes.windows(2).all(|pair| pair[0] < pair[1]), "expand_dims names an axis twice");
    Ok(axes)
}

fn infer_concat(call: &Call) -> Result<TensorType> {
    let kinds = call.kinds("values")?;
    let first = *kinds.first().context("concat of nothing")?;
    if first.rank() == 0 {
        // Scalars make a vector.
        axis_of(call.int("axis")?, 1)?;
        ensure!(kinds.iter().all(|kind| *kind == first), "concat of a scalar and something else");
        return first.with_shape(vec![kinds.len() as i64]);
    }
    let axis = first.axis(call.int("axis")?)?;
    let others = |kind: &TensorType| {
        let mut shape = kind.shape.clone();
        shape[axis] = 0;
        shape
    };
    let interleave = call.boolean("interleave")?;
    let mut total = 0i64;
    for kind in &kinds {
        ensure!(
            kind.data_type == first.data_type && kind.rank() == first.rank() && others(kind) == others(first),
            "concat of {first} and {kind} on axis {axis}"
        );
        ensure!(!interleave || *kind == first, "interleaved concat of {first} and {kind}");
        total = total.checked_add(kind.shape[axis]).context("too many elements")?;
    }
    let mut shape = first.shape.clone();
    shape[axis] = total;
    first.with_shape(shape)
}

/// The axis and the sizes of the parts.
fn parts(call: &Call) -> Result<(usize, Vec<i64>)> {
    let x = call.kind("x")?;
    let axis = x.axis(call.int("axis")?)?;
    let size = x.shape[axis];
    let sizes = if call.has("split_sizes") {
        call.ints("split_sizes")?
    } else {
        let count = call.int("num_splits").context("split needs num_splits or split_sizes")?;
        ensure!((1..=1 << 16).contains(&count) && size % count == 0, "split of {size} in {count} equal parts");
        vec![size / count; count as usize]
    };
    let total = sizes.iter().try_fold(0i64, |total, &part| if part < 1 { None } else { total.checked_add(part) });
    ensure!(total == Some(size), "split of {size} in parts of {sizes:?}");
    Ok((axis, sizes))
}

pub fn infer_split(call: &Call) -> Result<Vec<TensorType>> {
    let x = call.kind("x")?;
    let (axis, sizes) = parts(call)?;
    let part = |size| {
        let mut shape = x.shape.clone();
        shape[axis] = size;
        x.with_shape(shape)
    };
    sizes.into_iter().map(part).collect()
}

pub fn run_split(call: &Call) -> Result<Vec<Tensor>> {
    let (axis, sizes) = parts(call)?;
    Ok(call.tensor("x")?.f_split_with_sizes(sizes, axis as i64)?)
}

/// Elements before and after each of the last axes, the first such axis first.
fn padding(call: &Call) -> Result<Vec<(i64, i64)>> {
    let (x, pad) = (call.kind("x")?, call.ints("pad")?);
    within("pad", &pad, 0)?;
    ensure!(pad.len().is_multiple_of(2) && pad.len() / 2 <= x.rank(), "{} values pad {x}", pad.len());
    Ok(pad.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

fn infer_pad(call: &Call) -> Result<TensorType> {
    floats(call, &["x", "constant_val"])?;
    let (x, padding, mode) = (call.kind("x")?, padding(call)?, call.text("mode")?);
    call.real("constant_val")?;
    let mut shape = x.shape.clone();
    let front = x.rank() - padding.len();
    for (axis, (before, after)) in padding.into_iter().enumerate() {
        let size = x.shape[front + axis];
        match mode {
            "constant" | "replicate" => {}
            "reflect" => ensure!(before < size && after < size, "reflection of {size} elements by {before}, {after}"),
            _ => bail!("unknown pad mode {mode:?}"),
        }
        shape[front + axis] = size + before + after;
    }
    x.with_shape(shape)
}

fn run_pad(call: &Call) -> Result<Tensor> {
    let (padding, mode) = (padding(call)?, call.text("mode")?);
    let mut x = call.tensor("x")?.shallow_clone();
    if mode == "constant" {
        return Ok(x.f_pad(last_axis_first(&padding), "constant", call.real("constant_val")?)?);
    }
    // One axis at a time, since libtorch reflects only the last ones. Positions outside come from inside.
    let front = call.kind("x")?.rank() - padding.len();
    for (axis, &(before, after)) in padding.iter().enumerate() {
        let size = call.kind("x")?.shape[front + axis];
        let inside = |at: i64| match mode {
            "reflect" if at < 0 => -at,
            "reflect" if at >= size => 2 * (size - 1) - at,
            _ => at.clamp(0, size - 1),
        };
        let index: Vec<i64> = (-before..size + after).map(inside).collect();
        let index = Tensor::f_from_slice(&index)?.f_to_kind(Kind::Int64)?.f_to_device(x.device())?;
        x = x.f_index_select((front + axis) as i64, &index)?;
    }
    Ok(x)
}
