//! Values of which it is known when the program runs how many there are: the places that `non_zero` finds, and what is
//! made to go with them, by repeating it as often as their `shape` says. How many there can be at most is known before,
//! and bounds what is allocated.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use super::checks::within;
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{DataType, TensorType};

/// Besides what is computed element by element, only these operations know of such values.
pub fn check(call: &Call) -> Result<()> {
    if ["shape", "scatter_nd"].contains(&call.kind) {
        return Ok(());
    }
    let varying = call.inputs.iter().find(|(_, bound)| bound.iter().any(|operand| operand.kind.varying));
    ensure!(varying.is_none(), "{} of a value of unknown size is not supported", call.kind);
    Ok(())
}

/// The type of what is computed element by element: of unknown size where an operand is. All such operands must then be
/// alike, and the others the same for each of their elements.
pub fn carried(call: &Call, inferred: TensorType) -> Result<TensorType> {
    let operands = || call.inputs.values().flatten().map(|operand| operand.kind);
    let Some(varying) = operands().find(|kind| kind.varying) else { return Ok(inferred) };
    for kind in operands() {
        let repeated = kind.rank() < varying.rank() || (kind.rank() == varying.rank() && kind.shape[0] == 1);
        let fits = if kind.varying { kind.shape == varying.shape } else { repeated };
        ensure!(fits, "{} of {varying} and {kind}", call.kind);
    }
    Ok(inferred.at_most())
}

/// The most that the results can be where they are integers computed from shapes; those are never negative.
pub fn most(call: &Call) -> Option<i64> {
    match call.kind {
        "shape" => call.kind("x").ok()?.shape.iter().max().copied(),
        // The same numbers in another arrangement.
        "slice_by_index" | "slice_by_size" | "squeeze" | "expand_dims" | "reshape" | "identity" => call.most("x"),
        "concat" => call.most("values"),
        "cast" => call.most("x").filter(|_| call.text("dtype").is_ok_and(|dtype| dtype == "int32")),
        _ => None,
    }
}

pub fn infer_shape(call: &Call) -> Result<TensorType> {
    TensorType::new(DataType::Int32, vec![call.kind("x")?.rank() as i64])
}

pub fn run_shape(call: &Call) -> Result<Tensor> {
    let x = call.tensor("x")?;
    Ok(Tensor::f_from_slice(&x.size())?.f_to_kind(Kind::Int)?.f_to_device(x.device())?)
}

/// The indices of every element that is not 0, a row for each: `[?, rank]`.
pub fn infer_non_zero(call: &Call) -> Result<TensorType> {
    let x = call.kind("x")?;
    ensure!(x.rank() > 0 && x.data_type != DataType::String, "non_zero of {x}");
    let most = i64::try_from(x.elements())?;
    Ok(TensorType::new(DataType::Int32, vec![most, x.rank() as i64])?.at_most())
}

pub fn infer_tile(call: &Call) -> Result<TensorType> {
    let x = call.kind("x")?;
    if call.is_computed("reps")? {
        let most = call.most("reps").context("reps is computed, and not from shapes")?;
        ensure!(
            x.rank() == 1 && call.kind("reps")?.shape == [1],
            "computed reps of {x}, only a vector's are supported"
        );
        let elements = x.shape[0].checked_mul(most).context("too many elements")?;
        return Ok(x.with_shape(vec![elements])?.at_most());
    }
    let reps = call.ints_of("reps", x.rank())?;
    ensure!(x.rank() > 0, "tile of a scalar");
    within("reps", &reps, 1)?;
    let sizes = x.shape.iter().zip(reps).map(|(size, times)| size.checked_mul(times).context("too many elements"));
    x.with_shape(sizes.collect::<Result<_>>()?)
}

pub fn run_tile(call: &Call) -> Result<Tensor> {
    let reps = match call.is_computed("reps")? {
        true => {
            let most = call.most("reps").context("reps is computed, and not from shapes")?;
            let times = call.tensor("reps")?.f_int64_value(&[0])?;
            ensure!((0..=most).contains(&times), "reps is {times}, it was to be at most {most}");
            vec![times]
        }
        false => call.ints("reps")?,
    };
    Ok(call.tensor("x")?.f_tile(reps)?)
}
