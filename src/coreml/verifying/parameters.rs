//! Whether a package holds the very parameters of the network that it is compared with: a byte that is damaged may move
//! the outputs by less than palettes do.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::coreml::reading::{Chain, DataType, Package, parameter_of};
use crate::ops::Weights;

/// How many of those that differ are named.
const NAMED: usize = 5;

/// What a package should hold.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    /// What the network computes with.
    pub weights: &'a Weights,
    /// How many parameters the network has; `weights` may have others beside them.
    pub parameters: usize,
    /// Whether these are the values of the palettes that the package was made with.
    pub palettized: bool,
}

/// What [`compare`] found; prints as a line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    /// How many the network has.
    pub of: usize,
    /// How many were compared: those that the package has under the network's names.
    pub compared: usize,
    /// How many are palettized in the package, and not in the network: what they compute is compared, no more.
    pub palettized: usize,
    /// Those of them whose values are not the network's, with the largest difference over the largest value.
    pub others: Vec<(String, f64)>,
}

impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, compared, palettized, others } = self;
        if compared + palettized == 0 {
            return write!(f, "no constant has the name of one of the network's parameters: only outputs are compared");
        }
        if others.is_empty() {
            // Another converter folds some into others.
            let rest = of.saturating_sub(compared + palettized);
            let all = match (rest, palettized) {
                (0, 0) => "all",
                (0, _) => "all other",
                _ => "those",
            };
            if *palettized > 0 {
                write!(f, "{palettized} parameters are palettized here and not in the network; ")?;
            }
            write!(f, "{all} {compared} parameters are the network's, to the last bit")?;
            if rest > 0 {
                write!(f, "; {rest} of {of} have other names there, and are compared by what they compute")?;
            }
            return Ok(());
        }
        write!(f, "{} of {compared} parameters are not the network's:", others.len())?;
        for (place, (name, difference)) in others.iter().take(NAMED).enumerate() {
            let comma = if place > 0 { "," } else { "" };
            write!(f, "{comma} {name} by {difference:.1e} of its largest")?;
        }
        if others.len() > NAMED { write!(f, ", …") } else { Ok(()) }
    }
}

/// Compares the constants of `package` that have the name of one of the network's weights with it, as the package stores
/// it: in fp16 mostly. Apple's converter names them alike. Where weights are not [palettized](Held::palettized), constants
/// that are stay out of it.
///
/// # Errors
/// When a constant has another number of values than the parameter, or cannot be decoded; when weights are of palettes,
/// the package holds none, and its values are others; libtorch's.
pub fn compare(package: &Chain, held: Held<'_>) -> Result<Parameters> {
    let Held { weights, parameters, palettized } = held;
    let names: HashMap<String, &str> = weights.keys().map(|name| (name.replace('.', "_"), name.as_str())).collect();
    let mut found = Parameters { of: parameters, ..Parameters::default() };
    let mut plain = true;
    for package in package.packages() {
        for constant in package.weights()? {
            let Some(&name) = names.get(parameter_of(&constant.name)) else { continue };
            let mut weight = weights[name].shallow_clone();
            // A text encoder for texts that are shorter than they could be has only their positions.
            if let ([rows, width], [1, channels, 1, tokens]) = (&weight.size()[..], &constant.shape[..])
                && (width, tokens < rows) == (channels, true)
            {
                weight = weight.f_narrow(0, 0, *tokens)?;
            }
            let elements = weight.numel() as u64;
            ensure!(
                constant.elements == elements,
                "it is a package of another model: `{name}` has {} values in the package, {elements} in the model",
                constant.elements
            );
            plain &= constant.palettes.is_none();
            if constant.palettes.is_some() && !palettized {
                found.palettized += 1;
                continue;
            }
            found.compared += 1;
            let difference = difference(package, &constant.name, constant.data_type, &weight)?;
            found.others.extend((difference != 0.0).then(|| (name.to_owned(), difference)));
        }
    }
    ensure!(
        !(palettized && plain) || found.others.is_empty(),
        "{} holds no palettes: it was exported without --palettes and --quantize-nbits",
        package.path().display()
    );
    Ok(found)
}

/// The largest difference over the largest value.
fn difference(package: &Package, constant: &str, kind: DataType, weight: &Tensor) -> Result<f64> {
    let stored = package.weight(constant)?.f_reshape(-1)?;
    let weight = weight.f_to_device(Device::Cpu)?;
    let weight =
        if kind == DataType::Float16 { weight.f_to_kind(Kind::Half)? } else { weight }.f_to_kind(Kind::Float)?;
    let largest = weight.f_abs()?.f_max()?.f_double_value(&[])?.max(f64::MIN_POSITIVE);
    let from = |weight: &Tensor| -> Result<f64> {
        Ok(stored.f_sub(&weight.f_reshape(-1)?)?.f_abs()?.f_max()?.f_double_value(&[])? / largest)
    };
    let as_it_is = from(&weight)?;
    // Channels come before places, in a table of positions too.
    if as_it_is > 0.0 && weight.dim() == 2 { Ok(as_it_is.min(from(&weight.f_transpose(0, 1)?)?)) } else { Ok(as_it_is) }
}
