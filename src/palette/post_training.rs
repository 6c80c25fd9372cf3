//! Palettes for a trained network, without training: k-means on each layer by itself.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{BITS, Palette, PalettizedCheckpoint, kmeans};
use crate::ops::Parameter;
use crate::torch::slices;

/// A weight with no more elements than this stays dense, unless told otherwise (coremltools' default).
pub const WEIGHT_THRESHOLD: i64 = 2048;

/// What became of one layer.
#[derive(Clone, Debug)]
pub struct Layer {
    pub name: String,
    pub elements: usize,
    pub bits: u32,
    /// Squared error of the palette over the sum of squares of the weight; 0 for a weight of zeros.
    pub relative_error: f64,
}

/// Which parameters become palettes, and of how many bits: weights of conv and linear layers with more than
/// `weight_threshold` elements.
pub fn chosen(parameters: &[Parameter], bits: u32, weight_threshold: i64) -> BTreeMap<String, u32> {
    let large = |p: &&Parameter| p.palettizable && p.shape.iter().product::<i64>() > weight_threshold;
    parameters.iter().filter(large).map(|p| (p.name.clone(), bits)).collect()
}

/// Makes palettes of the parameters `chosen` (name → bits) of `weights` and keeps all others in f16, two layers or so
/// in memory at a time beside the result when `weights` reads lazily. `progress` is told of each layer that is done,
/// from several threads and in no fixed order.
///
/// # Errors
/// The first of `weights` that could not be read; a parameter that is chosen and missing, there twice, or not finite
/// in f16; bits that a palette cannot have.
pub fn palettize(
    weights: impl Iterator<Item = Result<(String, Tensor)>> + Send,
    chosen: &BTreeMap<String, u32>,
    metadata: BTreeMap<String, String>,
    progress: &(dyn Fn(&Layer) + Sync),
) -> Result<PalettizedCheckpoint> {
    if let Some((name, bits)) = chosen.iter().find(|(_, bits)| !BITS.contains(bits)) {
        bail!("parameter {name}: a palette has 1, 2, 3, 4, 6 or 8 bits, not {bits}");
    }
    enum Part {
        Palette(Palette),
        Dense(Tensor),
    }
    let parts: Vec<(String, Part)> = weights
        .par_bridge()
        .map(|item| {
            let (name, tensor) = item?;
            let made = || -> Result<Part> {
                let _guard = tch::no_grad_guard();
                let halves = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
                let values = slices::halves(&halves)?;
                let Some(&bits) = chosen.get(&name) else {
                    let bad = values.iter().filter(|value| !value.is_finite()).count();
                    ensure!(bad == 0, "{bad} of its values are infinite, not numbers, or beyond the range of f16");
                    return Ok(Part::Dense(halves));
                };
                let fit = kmeans::fit(values, &halves.size(), bits)?;
                let relative_error = if fit.power > 0.0 { fit.error / fit.power } else { 0.0 };
                progress(&Layer { name: name.clone(), elements: values.len(), bits, relative_error });
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
