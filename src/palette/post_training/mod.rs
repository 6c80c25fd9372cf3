//! Palettes for a trained network, without training: k-means on each layer by itself.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | [`fit`](fit()) | the nearest palette of any form to a weight |
//! | [`kmeans`] | the nearest table of numbers |
//! | `intervals` | exact k-means of numbers in ascending order |
//! | `scaled` | tables that scales multiply: of channels, of 8-bit integers |
//! | `vectors` | k-means of vectors |
//! | `bins` | weighted numbers: those of a histogram, or numbers over a scale |
//! | `group` | the palette of one group, and how numbers are rounded to what is stored |
//! | [`allocate`](mod@allocate) | how many bits each layer gets within a budget |

pub mod allocate;
mod bins;
mod fit;
mod group;
mod intervals;
pub mod kmeans;
mod scaled;
mod vectors;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

pub use self::fit::fit;
use crate::ops::{Parameter, Weights};
use crate::palette::{Form, Palette, PalettizedCheckpoint};
use crate::torch::slices;

/// A weight with no more elements than this stays dense, unless told otherwise (coremltools' default).
pub const WEIGHT_THRESHOLD: i64 = 2048;

/// What became of one layer.
#[derive(Clone, Debug)]
pub struct Layer {
    pub name: String,
    pub elements: usize,
    pub form: Form,
    /// Squared error of the palette over the sum of squares of the weight; 0 for a weight of zeros.
    pub relative_error: f64,
}

/// What is to become of a network's parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    /// How those that become palettes do, by name.
    pub forms: BTreeMap<String, Form>,
    /// Those that are large enough and stay dense, with the reason ([`Form::misfit`]).
    pub misfits: Vec<(String, String)>,
}

/// Which parameters become palettes of this form: weights of conv and linear layers with more than `weight_threshold`
/// elements that it fits.
pub fn chosen(parameters: &[Parameter], form: Form, weight_threshold: i64) -> Chosen {
    chosen_by(parameters, |p| (p.shape.iter().product::<i64>() > weight_threshold).then_some(form))
}

/// Which parameters become palettes: weights of conv and linear layers that `wanted` has a form for, where that fits.
pub fn chosen_by(parameters: &[Parameter], wanted: impl Fn(&Parameter) -> Option<Form>) -> Chosen {
    let mut chosen = Chosen::default();
    for parameter in parameters.iter().filter(|parameter| parameter.palettizable) {
        let Some(form) = wanted(parameter) else { continue };
        match form.misfit(&parameter.shape) {
            None => drop(chosen.forms.insert(parameter.name.clone(), form)),
            Some(reason) => chosen.misfits.push((parameter.name.clone(), reason)),
        }
    }
    chosen
}

/// Makes palettes of the parameters `chosen` (name → form) of `weights` and keeps all others in f16, two layers or so
/// in memory at a time beside the result when `weights` reads lazily. `progress` is told of each layer that is done,
/// from several threads and in no fixed order. Where `importance` has a tensor for a parameter (fp32 on the CPU, of its shape),
/// its palette is the one with the least error weighted by it ([`kmeans::fit_weighted`]).
///
/// # Errors
/// The first of `weights` that could not be read; a parameter that is chosen and missing, there twice, or not finite
/// in f16; a form that is none, or does not fit.
pub fn palettize(
    weights: impl Iterator<Item = Result<(String, Tensor)>> + Send,
    chosen: &BTreeMap<String, Form>,
    mut importance: Weights,
    metadata: BTreeMap<String, String>,
    progress: &(dyn Fn(&Layer) + Sync),
) -> Result<PalettizedCheckpoint> {
    enum Part {
        Palette(Palette),
        Dense(Tensor),
    }
    let weights = weights.map(|item| {
        let (name, tensor) = item?;
        let importance = importance.remove(&name);
        Ok((name, tensor, importance))
    });
    let parts: Vec<(String, Part)> = weights
        .par_bridge()
        .map(|item: Result<(String, Tensor, Option<Tensor>)>| {
            let (name, tensor, importance) = item?;
            let made = || -> Result<Part> {
                let _guard = tch::no_grad_guard();
                let halves = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
                // SAFETY: a tensor that nobody writes to: `halves` is the weight's own memory at most.
                let values = unsafe { slices::elements::<f16>(&halves) }?;
                let Some(form) = chosen.get(&name) else {
                    let bad = values.iter().filter(|value| !value.is_finite()).count();
                    ensure!(bad == 0, "{bad} of its values are infinite, not numbers, or beyond the range of f16");
                    drop(values);
                    return Ok(Part::Dense(halves));
                };
                let fit = match &importance {
                    None => fit(&values, &halves.size(), form)?,
                    Some(importance) => {
                        ensure!(form.is_per_tensor(), "importance is known for one table of fp16 numbers only");
                        // SAFETY: as above.
                        let importance = unsafe { slices::elements::<f32>(importance) }?;
                        kmeans::fit_weighted(&values, &importance, &halves.size(), form.bits)?
                    }
                };
                let relative_error = if fit.power > 0.0 { fit.error / fit.power } else { 0.0 };
                progress(&Layer { name: name.clone(), elements: values.len(), form: *form, relative_error });
                Ok(Part::Palette(fit.palette))
            };
            let part = made().with_context(|| format!("parameter {name}"))?;
            Ok((name, part))
        })
        .collect::<Result<_>>()?;

    let mut checkpoint = PalettizedCheckpoint { metadata, ..Default::default() };
    for (name, part) in parts {
        let twice = match part {
            Part::Palette(palette) => checkpoint.palettes.insert(name.clone(), palette).is_some(),
            Part::Dense(tensor) => checkpoint.dense.insert(name.clone(), tensor).is_some(),
        };
        ensure!(!twice, "parameter {name} is there twice");
    }
    if let Some(name) = chosen.keys().find(|name| !checkpoint.palettes.contains_key(*name)) {
        bail!("parameter {name} is to become a palette and is not among the weights");
    }
    Ok(checkpoint)
}
