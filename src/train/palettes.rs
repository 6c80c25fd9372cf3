//! The clustering between a master weight and the weight that the network sees: soft while assignments learn
//! ([`DkmLayer`]), then fixed ([`Frozen`]), and soft again in a run that is made longer.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::ops::Weights;
use crate::palette::batch::{Found, Member};
use crate::palette::{AdamWStep, DkmLayer, Form, Frozen, Gradient, Palette, PalettizedFile, SoftenRows};

/// The palettes whose assignments stay, where a run learns on some.
///
/// # Errors
/// The file can't be read.
pub fn file_of_palettes(config: &Config) -> Result<Option<PalettizedFile>> {
    let path = config.palettize.palettes.as_deref().filter(|_| config.palettize.enabled);
    path.map(PalettizedFile::open).transpose().context("palettize.palettes")
}

/// A palette as a checkpoint has it, for a weight on `device`: its assignments stay.
///
/// # Errors
/// libtorch's (no memory, no such device).
pub fn fixed(name: &str, palette: &Palette, device: Device) -> Result<(LayerPalette, Tensor)> {
    let frozen = Frozen::of(name, palette, device)?;
    let entries = frozen.entries.shallow_clone();
    let network = Tensor::f_empty(palette.shape.as_slice(), (Kind::Float, device))?;
    // No master weight is known that it could be compared with.
    Ok((LayerPalette { phase: Phase::Frozen(frozen, None), iterations: 0, network, relative_error: 0.0 }, entries))
}

enum Phase {
    Soft(DkmLayer),
    Frozen(Frozen, Option<Thaw>),
}

/// What fixed assignments need to become soft again.
struct Thaw {
    /// As it was when they were fixed.
    layer: DkmLayer,
    /// The master weight then, less the palette's value: in its type and shape.
    residual: Tensor,
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
    /// Whether a batch made it, which takes its gradient.
    pub of_batch: bool,
}

impl Seen {
    /// A parameter without palette: itself.
    pub fn plain(value: &Tensor) -> Self {
        Self { leaf: value.detach(), soften: None, of_batch: false }
    }
}

impl LayerPalette {
    /// The palette of one parameter at the k-means of its weight.
    ///
    /// # Errors
    /// The weight is not finite.
    pub fn start(name: &str, form: Form, iterations: usize, weight: &Tensor) -> Result<Self> {
        let layer = DkmLayer::new(name, form, weight)?;
        let relative_error = layer.relative_error();
        Ok(Self { phase: Phase::Soft(layer), iterations, network: weight.empty_like(), relative_error })
    }

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
            Phase::Frozen(frozen, _) => {
                frozen.dense(&mut self.network)?;
                None
            }
        };
        Ok(Seen { leaf: self.network.detach(), soften, of_batch: false })
    }

    /// What a [batch](crate::palette::batch) works on, where one can take the layer.
    pub fn member<'a>(&'a mut self, value: &'a Tensor, moments: [&'a Tensor; 2]) -> Option<Member<'a>> {
        let Phase::Soft(layer) = &mut self.phase else { return None };
        let member = Member { layer, weight: value, soft: &self.network, moments };
        member.fits().then_some(member)
    }

    /// What the network sees where a batch has written it.
    pub fn seen_of_batch(&self) -> Seen {
        Seen { leaf: self.network.detach(), soften: None, of_batch: true }
    }

    /// Takes note of what a batch found.
    pub fn note(&mut self, found: Found) {
        if let Phase::Soft(layer) = &self.phase {
            self.relative_error = found.hard_error / layer.power.max(f64::MIN_POSITIVE);
        }
    }

    /// From the gradient of what the network saw, which is used up, to that of what the optimizer moves.
    ///
    /// # Errors
    /// Shapes differ.
    pub fn gradient(&mut self, seen: Seen, upstream: Tensor) -> Result<Gradient> {
        match (&mut self.phase, seen.soften) {
            (Phase::Frozen(frozen, _), _) => Ok(Gradient::Whole(frozen.gradient(&upstream)?)),
            // In the memory of the gradient itself, which is autograd's own and ours now.
            (Phase::Soft(layer), Some(soften)) => layer.gradient(soften, upstream),
            (Phase::Soft(_), None) => Ok(Gradient::Whole(upstream)),
        }
    }

    /// Takes the layer's own step where its gradient is [`Gradient::Own`] ([`DkmLayer::step`]).
    ///
    /// # Errors
    /// Shapes or types differ.
    pub fn step(&mut self, value: &Tensor, moments: [&Tensor; 2], step: &AdamWStep) -> Result<()> {
        match &mut self.phase {
            Phase::Soft(layer) => layer.step(value, moments, step),
            Phase::Frozen(..) => Ok(()),
        }
    }

    /// Fixes the assignments; gives the entries, which the optimizer then moves in place. `None` when they were fixed.
    ///
    /// # Errors
    /// The master weight is not finite.
    pub fn freeze(&mut self, value: &Tensor) -> Result<Option<Tensor>> {
        let Phase::Soft(layer) = &mut self.phase else { return Ok(None) };
        layer.take_back()?;
        let frozen = layer.freeze(value)?;
        let entries = frozen.entries.shallow_clone();
        let _guard = tch::no_grad_guard();
        let mut dense = value.f_empty_like()?;
        frozen.dense(&mut dense)?;
        let thaw = Thaw { layer: layer.clone(), residual: value.f_detach()?.f_sub(&dense)? };
        self.phase = Phase::Frozen(frozen, Some(thaw));
        Ok(Some(entries))
    }

    /// Lets assignments learn again; gives the master weight, which the optimizer then moves: what the palette has become,
    /// and each weight as far from it as it was when assignments were fixed. `None` when they were not fixed.
    ///
    /// # Errors
    /// The state does not hold what that takes: it is of an older version.
    pub fn thaw(&mut self) -> Result<Option<Tensor>> {
        let Phase::Frozen(frozen, thaw) = &mut self.phase else { return Ok(None) };
        let Some(Thaw { mut layer, residual }) = thaw.take() else {
            anyhow::bail!(
                "parameter {}: the checkpoint is of an older version, which kept nothing to let fixed assignments learn \
                 again with; resume from one before they were fixed, or set another `output_dir`",
                frozen.name
            );
        };
        let _guard = tch::no_grad_guard();
        let mut dense = residual.f_empty_like()?;
        frozen.dense(&mut dense)?;
        layer.centroids = Vec::try_from(frozen.entries.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?;
        self.phase = Phase::Soft(layer);
        Ok(Some(dense.f_add(&residual)?))
    }

    /// The palette as it would ship now.
    ///
    /// # Errors
    /// Weights or entries are not finite.
    pub fn hard(&self, value: &Tensor) -> Result<Palette> {
        match &self.phase {
            Phase::Soft(layer) => layer.hard(value),
            Phase::Frozen(frozen, _) => frozen.palette(),
        }
    }

    /// The state beside the slot's own value.
    ///
    /// # Errors
    /// An error of the device that has it.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let (name, mut tensors) = match &self.phase {
            Phase::Soft(layer) => (&layer.name, layer.tensors()?),
            Phase::Frozen(frozen, thaw) => {
                let mut tensors = frozen.tensors();
                if let Some(Thaw { layer, residual }) = thaw {
                    // Scales are the same in both.
                    let soft = layer.tensors()?.into_iter();
                    let scales = format!("{}.scales", layer.name);
                    tensors.extend(soft.filter(|(name, _)| *name != scales));
                    tensors.push((format!("{}.residual", layer.name), residual.shallow_clone()));
                }
                (&frozen.name, tensors)
            }
        };
        tensors.push((format!("{name}.error"), Tensor::from_slice(&[self.relative_error])));
        Ok(tensors)
    }

    /// The palette of which [`LayerPalette::tensors`] gave what is `saved`, with whether its assignments were fixed: of a
    /// parameter like `weight`, which is not read. With fixed assignments the entries too, as [`LayerPalette::freeze`].
    ///
    /// # Errors
    /// A tensor is missing or of another shape.
    pub fn restored(
        name: &str,
        form: Form,
        iterations: usize,
        weight: &Tensor,
        (tensors, frozen): (&Weights, bool),
    ) -> Result<(Self, Option<Tensor>)> {
        let (network, shape, device) = (weight.empty_like(), weight.size(), weight.device());
        // Older versions kept none: it is not known.
        let mut relative_error = f64::NAN;
        if let Some(error) = tensors.get(&format!("{name}.error")) {
            ensure!(error.size() == [1], "`{name}.error` in the saved state is not one number");
            relative_error = error.f_double_value(&[0])?;
        }
        let of_phase = |phase, network| Self { phase, iterations, network, relative_error };
        if !frozen {
            let layer = DkmLayer::restore(name, form, &shape, tensors, device)?;
            return Ok((of_phase(Phase::Soft(layer), network), None));
        }
        let thaw = match tensors.get(&format!("{name}.residual")) {
            None => None,
            Some(residual) => {
                ensure!(
                    residual.size() == shape && residual.f_kind()? == network.f_kind()?,
                    "`{name}.residual` in the saved state is not of the weight's shape and type"
                );
                let layer = DkmLayer::restore(name, form, &shape, tensors, device)?;
                Some(Thaw { layer, residual: residual.f_to_device(device)? })
            }
        };
        let frozen = Frozen::restore(name, form, &shape, tensors, device)?;
        let entries = frozen.entries.shallow_clone();
        Ok((of_phase(Phase::Frozen(frozen, thaw), network), Some(entries)))
    }
}
