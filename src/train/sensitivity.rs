//! How much each layer minds its palette: what the network's output and loss become with that layer alone as the
//! optimal post-training palette of so many bits, all others float. What `analyze` measures and recipes are made from.
//!
//! Two numbers come out of one forward pass over the same noised pictures. `loss` is the denoising loss, as `evaluate`
//! has it: its rise is what counts in the end, but a difference of two means over noise, so that what small layers
//! add drowns in few samples. `mse` is the mean squared difference y − y₀ from the float network's own output y₀, whose
//! noise is the same and cancels. The two belong together: the loss rises by E|y − y₀|² + 2 E(y − y₀)(y₀ − target), and
//! the second term is 0 in expectation for a network that has learned all that can be known, E(target | input) = y₀.
//! So `mse` is the rise of the loss without its noise, and few pictures suffice.
//!
//! Errors of different layers add up as long as they are small and independent; how far that holds for a whole recipe is
//! measured too ([`Sensitivity::together`]).

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::evaluate::{Evaluation, Measured};
use crate::data::{Key, network_key};
use crate::ops::Weights;
use crate::palette::{Form, Palette, fit};
use crate::torch::slices;

/// What some palettes do to a network.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Mean squared difference of the output from the float network's.
    pub mse: f64,
    /// The denoising loss.
    pub loss: f64,
}

/// A float network, and what it answers to some noised pictures.
pub struct Sensitivity<'a> {
    evaluation: &'a Evaluation,
    /// fp32.
    weights: Weights,
    /// What it answers.
    pub float: Measured,
}

impl<'a> Sensitivity<'a> {
    /// Runs the network of these fp32 weights once.
    ///
    /// # Errors
    /// Its outputs are not finite; [`super::Stopped`].
    pub fn new(evaluation: &'a Evaluation, weights: Weights) -> Result<Self> {
        let float = evaluation.measure(&weights)?;
        if !(float.loss.is_finite() && float.power() > 0.0) {
            bail!("the float model's output is not finite, or nothing but zeros: there is nothing to measure against");
        }
        Ok(Self { evaluation, weights, float })
    }

    /// The key of the network, what goes into it, and how palettes of this form (its bits do not matter) are made:
    /// measurements under one key belong together.
    ///
    /// # Errors
    /// libtorch's.
    pub fn key(&self, form: &Form) -> Result<Key> {
        let network = network_key(self.evaluation.unet(), &self.weights)?;
        let palettes = format!("sensitivity 1: {:?}", Form { bits: 0, ..*form });
        Ok(Key::of(&[palettes.as_bytes(), network.bytes(), self.evaluation.key()?.bytes()]))
    }

    /// The palettes of the layer `name`, one of each form.
    ///
    /// # Errors
    /// There is no such layer, its weights are beyond f16, or a form does not fit.
    pub fn palettes(&self, name: &str, forms: &[Form]) -> Result<Vec<Palette>> {
        let weight = self.weights.get(name).with_context(|| format!("the UNet has no {name}"))?;
        let halves = weight.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
        let shape = halves.size();
        // SAFETY: k-means is plain Rust: no operator runs meanwhile.
        let values = unsafe { slices::elements(&halves) }?;
        let values: &[half::f16] = &values;
        let fit = |form| Ok(fit(values, &shape, form)?.palette);
        let palettes: Result<Vec<Palette>> = forms.par_iter().map(fit).collect();
        palettes.with_context(|| format!("parameter {name}"))
    }

    /// What the palette of one layer does, all others float.
    ///
    /// # Errors
    /// libtorch's; outputs that are not finite; [`super::Stopped`].
    pub fn alone(&mut self, name: &str, palette: &Palette) -> Result<Effect> {
        let weight = self.weights.get_mut(name).with_context(|| format!("the UNet has no {name}"))?;
        let changed = palette.tensor(Kind::Float, weight.device())?;
        let float = std::mem::replace(weight, changed);
        let effect = self.effect().with_context(|| format!("with a palette for {name}"));
        // Whatever happened: the network is float again.
        self.weights.insert(name.to_owned(), float);
        effect
    }

    /// What the palettes of all these layers do together. One weight at a time gives way to its palette, so
    /// that no second network is in memory.
    ///
    /// # Errors
    /// As [`Sensitivity::alone`] and [`Sensitivity::palettes`].
    pub fn together(mut self, forms: &BTreeMap<String, Form>) -> Result<Effect> {
        for (name, &form) in forms {
            super::stop::go_on()?;
            for palette in self.palettes(name, &[form])? {
                let device = self.weights[name].device();
                self.weights.insert(name.clone(), palette.tensor(Kind::Float, device)?);
            }
        }
        self.effect()
    }

    /// Of the weights as they are now.
    fn effect(&self) -> Result<Effect> {
        let measured = self.evaluation.measure(&self.weights)?;
        let effect = Effect { mse: measured.difference(&self.float), loss: measured.loss };
        if !(effect.mse.is_finite() && effect.loss.is_finite()) {
            bail!("the network's output is not finite");
        }
        Ok(effect)
    }
}

/// Measurements in a file of one JSON object a line, each under its key: what was measured once is read again, what belongs
/// to another model or other pictures is left alone.
pub struct Measurements {
    file: File,
    key: String,
    known: HashMap<(String, u32), Effect>,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Row {
    key: String,
    layer: String,
    bits: u32,
    #[serde(flatten)]
    effect: Effect,
}

impl Measurements {
    /// Opens the file at `path`, or begins it, for measurements under `key`.
    ///
    /// # Errors
    /// It can't be read or written; a line of it (named) is no measurement. A last line without its end, of a program that
    /// was killed, is none and dropped.
    pub fn open(path: &Path, key: &Key) -> Result<Self> {
        let shown = path.display();
        let key = key.to_string();
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("can't read {shown}")),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut known = HashMap::new();
        for (number, line) in text[..whole].lines().enumerate() {
            let row: Row = serde_json::from_str(line)
                .ok()
                .filter(|row: &Row| row.effect.mse.is_finite() && row.effect.loss.is_finite())
                .with_context(|| {
                    format!("{shown}:{}: is not a measurement; delete that line, or the file", number + 1)
                })?;
            if row.key == key {
                known.insert((row.layer, row.bits), row.effect);
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("can't write {shown}"))?;
        if whole < text.len() {
            file.set_len(whole as u64).with_context(|| format!("can't write {shown}"))?;
        }
        Ok(Self { file, key, known })
    }

    /// What was measured of a layer.
    pub fn get(&self, layer: &str, bits: u32) -> Option<Effect> {
        self.known.get(&(layer.to_owned(), bits)).copied()
    }

    /// Writes a measurement.
    ///
    /// # Errors
    /// The disk is full.
    pub fn add(&mut self, layer: &str, bits: u32, effect: Effect) -> Result<()> {
        let row = Row { key: self.key.clone(), layer: layer.to_owned(), bits, effect };
        // In one piece, so that a program that is killed, or another that appends, leaves lines whole.
        let line = serde_json::to_string(&row)? + "\n";
        self.file.write_all(line.as_bytes()).context("writing a measurement")?;
        self.known.insert((layer.to_owned(), bits), effect);
        Ok(())
    }
}

/// Measures each of `layers` (name → forms to try, which differ in bits) alone; what `measurements` knows is not measured
/// again. `progress` is told how many of all are known.
///
/// # Errors
/// Those of [`Sensitivity::alone`]; [`super::Stopped`], with what was measured kept.
pub fn measure(
    sensitivity: &mut Sensitivity,
    layers: &BTreeMap<String, Vec<Form>>,
    measurements: &mut Measurements,
    progress: &mut dyn FnMut(usize),
) -> Result<()> {
    let left = |measurements: &Measurements, name: &str, forms: &[Form]| -> Vec<Form> {
        forms.iter().copied().filter(|form| measurements.get(name, form.bits).is_none()).collect()
    };
    let total: usize = layers.values().map(Vec::len).sum();
    let unknown: usize = layers.iter().map(|(name, forms)| left(measurements, name, forms).len()).sum();
    let mut known = total - unknown;
    for (name, forms) in layers {
        let forms = left(measurements, name, forms);
        if forms.is_empty() {
            continue;
        }
        super::stop::go_on()?;
        for palette in sensitivity.palettes(name, &forms)? {
            let effect = sensitivity.alone(name, &palette)?;
            measurements.add(name, palette.form.bits, effect)?;
            known += 1;
            progress(known);
        }
    }
    Ok(())
}
