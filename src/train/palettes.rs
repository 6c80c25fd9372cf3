//! The clustering between a master weight and the weight that the network sees: soft while assignments learn
//! ([`DkmLayer`]), then fixed ([`Frozen`]).

use anyhow::Result;
use tch::{Device, Tensor};

use crate::config::Palettize;
use crate::ops::{Parameter, Weights};
use crate::palette::{DkmLayer, Frozen, Gradient, Histogram, Palette, SoftenRows};

/// Starts the palette of one parameter at the k-means of its weight; `None` where `[palettize]` leaves it in fp16.
///
/// # Errors
/// The weight is not finite.
pub fn layer(settings: &Palettize, parameter: &Parameter, weight: &Tensor) -> Result<Option<LayerPalette>> {
    let form = settings.form_of(&parameter.name, &parameter.shape).filter(|_| parameter.palettizable);
    let Some(form) = form else { return Ok(None) };
    let layer = DkmLayer::new(&parameter.name, form, weight)?;
    let start = layer.relative_error();
    Ok(Some(LayerPalette {
        phase: Phase::Soft(layer),
        iterations: settings.kmeans_max_iter,
        network: weight.empty_like(),
        relative_error: start,
    }))
}

enum Phase {
    Soft(DkmLayer),
    Frozen(Frozen),
}

/// One layer's palette during training.
pub struct LayerPalette {
    phase: Phase,
    iterations: usize,
    /// What the network sees, of the master's type: written anew in each step, in the same memory.
    network: Tensor,
    /// Squared error of the hard palette over the sum of squares of the master weight, as of the last step.
    pub relative_error: f64,
}

/// What the network sees of one parameter in one step.
pub struct Seen {
    /// Of the master's type; its gradient is asked for.
    pub leaf: Tensor,
    soften: Option<SoftenRows>,
}

impl Seen {
    /// A parameter without palette: itself.
    pub fn plain(value: &Tensor) -> Self {
        Self { leaf: value.detach(), soften: None }
    }
}

impl LayerPalette {
    /// The weight that the network sees at ρ = `temperature`; moves the centroids.
    ///
    /// # Errors
    /// The master weight is not finite.
    pub fn seen(&mut self, value: &Tensor, temperature: f64) -> Result<Seen> {
        let soften = match &mut self.phase {
            Phase::Soft(layer) => {
                let soften = layer.soften(value, temperature, self.iterations, None, &mut self.network)?;
                self.relative_error = soften.hard_error() / layer.power.max(f64::MIN_POSITIVE);
                Some(soften)
            }
            Phase::Frozen(frozen) => {
                frozen.dense(&mut self.network)?;
                None
            }
        };
        Ok(Seen { leaf: self.network.detach(), soften })
    }

    /// From the gradient of what the network saw, which is used up, to that of what the optimizer moves.
    ///
    /// # Errors
    /// Shapes differ.
    pub fn gradient(&self, seen: Seen, upstream: Tensor) -> Result<Gradient> {
        match (&self.phase, seen.soften) {
            (Phase::Frozen(frozen), _) => Ok(Gradient::Whole(frozen.gradient(&upstream)?)),
            // In the memory of the gradient itself, which is autograd's own and ours now.
            (Phase::Soft(_), Some(soften)) => soften.gradient(upstream),
            (Phase::Soft(_), None) => Ok(Gradient::Whole(upstream)),
        }
    }

    /// What the optimizer counted as it moved the master weight, for the next step.
    pub fn keep(&mut self, counted: Vec<Option<Histogram>>) {
        if let Phase::Soft(layer) = &mut self.phase {
            layer.keep(counted);
        }
    }

    /// Fixes the assignments; gives the entries, which the optimizer then moves in place. `None` when they were fixed.
    ///
    /// # Errors
    /// The master weight is not finite.
    pub fn freeze(&mut self, value: &Tensor) -> Result<Option<Tensor>> {
        let Phase::Soft(layer) = &self.phase else { return Ok(None) };
        let frozen = layer.freeze(value)?;
        let entries = frozen.entries.shallow_clone();
        self.phase = Phase::Frozen(frozen);
        Ok(Some(entries))
    }

    /// The palette as it would ship now.
    ///
    /// # Errors
    /// Weights or entries are not finite.
    pub fn hard(&self, value: &Tensor) -> Result<Palette> {
        match &self.phase {
            Phase::Soft(layer) => layer.hard(value),
            Phase::Frozen(frozen) => frozen.palette(),
        }
    }

    /// The state beside the slot's own value.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        match &self.phase {
            Phase::Soft(layer) => layer.tensors(),
            Phase::Frozen(frozen) => frozen.tensors(),
        }
    }

    /// Puts back what [`LayerPalette::tensors`] gave. With fixed assignments it gives the entries, as
    /// [`LayerPalette::freeze`].
    ///
    /// # Errors
    /// A tensor is missing or of another shape.
    pub fn restore(&mut self, tensors: &Weights, frozen: bool, device: Device) -> Result<Option<Tensor>> {
        let (name, form) = match &self.phase {
            Phase::Soft(layer) => (layer.name.clone(), layer.form),
            Phase::Frozen(frozen) => (frozen.name.clone(), frozen.form),
        };
        let shape = self.network.size();
        if !frozen {
            self.phase = Phase::Soft(DkmLayer::restore(&name, form, &shape, tensors, device)?);
            return Ok(None);
        }
        let frozen = Frozen::restore(&name, form, &shape, tensors, device)?;
        let entries = frozen.entries.shallow_clone();
        self.phase = Phase::Frozen(frozen);
        Ok(Some(entries))
    }
}
