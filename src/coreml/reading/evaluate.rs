//! Runs a program with tensors, as Core ML would on a processor that computes in 32 or in 16 bits.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::call::Operand;
use super::check::call;
use super::constexpr::Constants;
use super::package::Package;
use super::program::{Argument, Operation};
use super::types::{DataType, TensorType};
use super::{ops, signature};

/// How floats are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In 32 bits throughout: the error is that of the stored weights alone.
    Float32,
    /// Every result that the program declares FLOAT16 is rounded to half and back, as on a processor that
    /// accumulates in 32 bits and stores 16.
    Float16,
}

/// Runs a package. `inputs` are tensors by name in the shapes that [`Package::inputs`] declares, all on one device,
/// where everything is computed; what a FLOAT16 input cannot hold is rounded away first. Values are freed after
/// their last use, and weights are decoded when they are needed. Results are 32-bit floats (or integers) by name.
///
/// # Errors
/// On inputs that do not fit, and in an operation, which is named.
pub fn evaluate(
    package: &Package,
    inputs: &BTreeMap<String, Tensor>,
    precision: Precision,
) -> Result<BTreeMap<String, Tensor>> {
    evaluate_watched(package, inputs, precision, &mut |_, _| Ok(()))
}

/// [`evaluate`], with someone looking on: `watch` hears the name of each layer with parameters, as they are called in
/// the network with `_` for `.`, and what it gives, in the order of the program. A layer's value is that of the last
/// operation that takes one of its parameters, which are known by the names that Palettist and Apple's converter give
/// them.
///
/// # Errors
/// Those of [`evaluate`], and what `watch` returns.
pub fn evaluate_watched(
    package: &Package,
    inputs: &BTreeMap<String, Tensor>,
    precision: Precision,
    watch: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
) -> Result<BTreeMap<String, Tensor>> {
    let _no_gradients = tch::no_grad_guard();
    let device = inputs.values().next().map_or(Device::Cpu, Tensor::device);
    let mut evaluator =
        Evaluator { package, constants: package.constants(), precision, device, values: feed(package, inputs)? };
    let (last_uses, layers) = (last_uses(package), layers(package));
    for operation in &package.program.operations {
        if operation.is_const() || operation.is_constexpr() {
            continue;
        }
        evaluator.step(operation).with_context(|| format!("{}: {}", package.path().display(), operation.place()))?;
        if let (Some(layer), [output, ..]) = (layers.get(&operation.number), &operation.outputs[..])
            && let Some(value) = evaluator.values.get(output.name.as_str())
        {
            watch(layer, value)?;
        }
        for name in last_uses.get(&operation.number).into_iter().flatten() {
            evaluator.values.remove(*name);
        }
    }
    let outputs = package.outputs().iter().map(|output| {
        let value = evaluator.values.get(output.name.as_str()).context("an output was not computed")?;
        Ok((output.name.clone(), value.shallow_clone()))
    });
    outputs.collect()
}

/// The most bytes that the values of a run take at once: inputs, results and decoded constants, four bytes an element,
/// each from its first to its last use. What libtorch takes within an operation comes on top.
pub fn peak_bytes(package: &Package) -> u64 {
    let bytes = |name: &str| package.checked.kinds.get(name).map_or(0, |kind| 4 * kind.elements());
    let last_uses = last_uses(package);
    let mut live: HashSet<&str> = package.inputs().iter().map(|input| input.name.as_str()).collect();
    let mut now: u64 = live.iter().map(|name| bytes(name)).sum();
    let mut most = now;
    for operation in package.program.operations.iter().filter(|op| !op.is_const() && !op.is_constexpr()) {
        let read = operation.inputs.values().flatten().filter_map(|argument| match argument {
            Argument::Name(name) => Some(name.as_str()),
            Argument::Value(_) => None,
        });
        for name in read.chain(operation.outputs.iter().map(|output| output.name.as_str())) {
            if live.insert(name) {
                now = now.saturating_add(bytes(name));
            }
        }
        most = most.max(now);
        for name in last_uses.get(&operation.number).into_iter().flatten() {
            if live.remove(name) {
                now = now.saturating_sub(bytes(name));
            }
        }
    }
    most
}

/// The layers whose value an operation gives, by its number.
fn layers(package: &Package) -> HashMap<usize, &str> {
    let mut last: HashMap<&str, usize> = HashMap::new();
    for operation in package.program.operations.iter().filter(|op| !op.is_const() && !op.is_constexpr()) {
        for argument in operation.inputs.values().flatten() {
            if let Argument::Name(name) = argument
                && let Some(layer) = layer_of_parameter(name)
            {
                last.insert(layer, operation.number);
            }
        }
    }
    last.into_iter().map(|(layer, number)| (number, layer)).collect()
}

/// The parameter that a constant holds, as both Palettist and Apple's converter name it: `conv_in_weight` of
/// `conv_in_weight_to_fp16_palettized`. Apple's has the name of the network before those of a text encoder.
pub fn parameter_of(constant: &str) -> &str {
    let name = constant.strip_suffix("_palettized").unwrap_or(constant);
    let name = name.strip_suffix("_to_fp16").unwrap_or(name);
    name.strip_prefix("text_encoder_").unwrap_or(name)
}

/// `conv_in` of `conv_in_weight_to_fp16_palettized`, and the like.
fn layer_of_parameter(name: &str) -> Option<&str> {
    let name = parameter_of(name);
    name.strip_suffix("_weight").or_else(|| name.strip_suffix("_bias"))
}

/// Values that no operation after the given one looks at; outputs of the program are looked at to the end.
fn last_uses(package: &Package) -> HashMap<usize, Vec<&str>> {
    let mut last: HashMap<&str, usize> = HashMap::new();
    for operation in &package.program.operations {
        let read = operation.inputs.values().flatten().filter_map(|argument| match argument {
            Argument::Name(name) => Some(name),
            Argument::Value(_) => None,
        });
        // A result that is never read goes at once.
        for name in read.chain(operation.outputs.iter().map(|output| &output.name)) {
            last.insert(name, operation.number);
        }
    }
    for output in package.outputs() {
        last.remove(output.name.as_str());
    }
    let mut by_operation: HashMap<usize, Vec<&str>> = HashMap::new();
    for (name, number) in last {
        by_operation.entry(number).or_default().push(name);
    }
    by_operation
}

fn feed<'a>(package: &'a Package, inputs: &BTreeMap<String, Tensor>) -> Result<HashMap<&'a str, Tensor>> {
    for name in inputs.keys() {
        let known = package.inputs().iter().any(|input| input.name == *name);
        ensure!(known, "{} has no input {name}", package.path().display());
    }
    let fed = package.inputs().iter().map(|input| {
        let name = input.name.as_str();
        let given = inputs.get(name).with_context(|| format!("input {name}, {}, is missing", input.kind))?;
        // A scalar is handed over as a vector of one element.
        let given =
            if input.kind.rank() == 0 && given.size() == [1] { given.f_squeeze()? } else { given.shallow_clone() };
        ensure!(
            given.size() == input.kind.shape,
            "input {name} must be {}, its shape is {:?}",
            input.kind,
            given.size()
        );
        let numbers = if input.kind.data_type.is_float() {
            let numbers = given.f_to_kind(Kind::Float)?;
            if input.kind.data_type == DataType::Float16 { round_to_half(&numbers)? } else { numbers }
        } else {
            let numbers = given.f_to_kind(Kind::Int)?;
            let whole = !given.is_floating_point() || bool::try_from(numbers.f_eq_tensor(&given)?.f_all()?)?;
            ensure!(whole, "input {name} must be {}, it has fractions", input.kind);
            numbers
        };
        Ok((name, numbers))
    });
    fed.collect()
}

struct Evaluator<'a> {
    package: &'a Package,
    constants: Constants<'a>,
    precision: Precision,
    device: Device,
    values: HashMap<&'a str, Tensor>,
}

impl<'a> Evaluator<'a> {
    fn step(&mut self, operation: &'a Operation) -> Result<()> {
        let package = self.package;
        let mut call = call(operation, package.specification_version(), &package.checked)?;
        let signature = signature::inputs(&operation.kind).context("the operation is not known")?;
        for input in signature.iter().filter(|input| input.operand || input.computed) {
            let (Some(bound), Some(operands)) = (operation.inputs.get(input.name), call.inputs.get_mut(input.name))
            else {
                continue;
            };
            let literal = |operand: &Operand| !input.operand && operand.literal.is_some();
            for (argument, operand) in bound.iter().zip(operands).filter(|(_, operand)| !literal(operand)) {
                operand.tensor = Some(self.tensor(argument)?);
            }
        }
        let results = ops::run(&call)?;
        drop(call);
        ensure!(results.len() == operation.outputs.len(), "{} results were computed", results.len());
        for (output, result) in operation.outputs.iter().zip(results) {
            let kind = package.checked.kinds.get(&output.name).context("a result has no type")?;
            let result = finish(result, kind, self.precision)?;
            self.values.insert(&output.name, result);
        }
        Ok(())
    }

    /// The tensor of an operand; constants are decoded when they are first looked at.
    fn tensor(&mut self, argument: &'a Argument) -> Result<Tensor> {
        let name = match argument {
            Argument::Name(name) => name.as_str(),
            Argument::Value(constant) => return constant.decode(&self.package.blobs)?.tensor(self.device),
        };
        if let Some(value) = self.values.get(name) {
            return Ok(value.shallow_clone());
        }
        let value = self.constants.array(name)?.tensor(self.device)?;
        self.values.insert(name, value.shallow_clone());
        Ok(value)
    }
}

/// Brings a result into the form that its declared type has here, and compares the shapes.
fn finish(result: Tensor, declared: &TensorType, precision: Precision) -> Result<Tensor> {
    let mut size = result.size();
    if let (true, [count, ..], [most, ..]) = (declared.varying, &mut size[..], &declared.shape[..]) {
        *count = (*count).max(*most);
    }
    ensure!(size == declared.shape, "declared {declared}, computed a shape {:?}", result.size());
    let wanted = match declared.data_type {
        DataType::Float16 | DataType::Float32 => Kind::Float,
        DataType::Bool => Kind::Bool,
        DataType::Int8 => Kind::Int8,
        DataType::Uint8 => Kind::Uint8,
        DataType::Int16 => Kind::Int16,
        DataType::Int32 | DataType::Uint16 => Kind::Int,
        _ => bail!("declared {declared}, which cannot be computed"),
    };
    ensure!(
        result.is_floating_point() == (wanted == Kind::Float)
            && (result.kind() == Kind::Bool) == (wanted == Kind::Bool),
        "declared {declared}, computed {:?}",
        result.kind()
    );
    let result = if result.kind() == wanted { result } else { result.f_to_kind(wanted)? };
    if precision == Precision::Float16 && declared.data_type == DataType::Float16 {
        return round_to_half(&result);
    }
    Ok(result)
}

fn round_to_half(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?)
}

/// Peak signal to noise ratio in decibels, `20 log10(max |reference| / RMSE)`, as Apple's converter reports it;
/// infinite where both are equal, minus infinity where `got` is not finite or has another shape.
pub fn psnr(reference: &Tensor, got: &Tensor) -> f64 {
    let ratio = || -> Result<f64, tch::TchError> {
        let (reference, got) = (reference.f_to_kind(Kind::Double)?, got.f_to_kind(Kind::Double)?);
        if reference.size() != got.size() || !bool::try_from(got.f_isfinite()?.f_all()?)? {
            return Ok(f64::NEG_INFINITY);
        }
        let error =
            f64::try_from((&got.f_to_device(reference.device())? - &reference).f_square()?.f_mean(Kind::Double)?)?;
        let peak = f64::try_from(reference.f_abs()?.f_max()?)?;
        Ok(if error == 0.0 { f64::INFINITY } else { 20.0 * peak.log10() - 10.0 * error.log10() })
    };
    ratio().unwrap_or(f64::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_their_parameters() {
        assert_eq!(layer_of_parameter("conv_in_weight_to_fp16_palettized"), Some("conv_in"));
        assert_eq!(layer_of_parameter("conv_in_bias_to_fp16"), Some("conv_in"));
        assert_eq!(layer_of_parameter("conv_in_weight"), Some("conv_in"));
        assert_eq!(
            layer_of_parameter("text_encoder_text_model_final_layer_norm_bias_to_fp16"),
            Some("text_model_final_layer_norm")
        );
        assert_eq!(layer_of_parameter("time_frequencies"), None);
    }

    #[test]
    fn psnr_is_apples() {
        let reference = Tensor::from_slice(&[0.0f32, -2.0, 1.0, 1.0]);
        // RMSE 0.1, peak 2
        let got = Tensor::from_slice(&[0.1f32, -1.9, 1.1, 0.9]);
        assert!((psnr(&reference, &got) - 20.0 * 20f64.log10()).abs() < 1e-4);
        assert_eq!(psnr(&reference, &reference), f64::INFINITY);
        assert_eq!(psnr(&reference, &Tensor::from_slice(&[f32::NAN, 0.0, 0.0, 0.0])), f64::NEG_INFINITY);
        assert_eq!(psnr(&reference, &Tensor::from_slice(&[0.0f32])), f64::NEG_INFINITY);
    }
}
