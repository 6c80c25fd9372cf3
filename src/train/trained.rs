//! What learns: the master weights of one or more networks with their optimizer's moments and, for the palettized
//! ones, the clustering between the master weight and the weight that the network sees.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use rand::Rng;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::optimizer::{AdamW, Moments, clip_factor, norm};
use super::palettes::{self, LayerPalette, Seen};
use super::together::Together;
use crate::config::{Palettize, Train};
use crate::files::TensorFile;
use crate::ops::{Parameter, Weights};
use crate::palette::{AdamWStep, Form, Gradient, Palette};
use crate::source::Component;

/// What the numbers of a run have become, before advice is added.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Diverged(pub String);

/// Each network's weights.
pub type Networks = BTreeMap<Component, Weights>;

/// One parameter that learns.
pub struct Slot {
    pub component: Component,
    pub name: String,
    /// What the optimizer moves: the master weight, fp32 or bf16, or the palette's entries (fp32) once assignments are
    /// frozen.
    value: Tensor,
    moments: Moments,
    pub palette: Option<LayerPalette>,
    /// That of the palette that it has, or gets from a saved state.
    form: Option<Form>,
}

/// Palettes of the UNet whose assignments stay, by name; none where palettes are learnt.
pub type Fixed = BTreeMap<String, Palette>;

impl Slot {
    /// Whether it is a bias or of a norm.
    pub fn is_bias_or_norm(&self) -> bool {
        self.palette.is_none() && self.value.dim() == 1
    }

    /// Unique over all networks: `unet/conv_in.weight`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.component.folder(), self.name)
    }
}

/// All parameters that learn, and the moving average of them.
pub struct Trained {
    pub slots: Vec<Slot>,
    /// In the order of the slots, fp32.
    average: Option<Vec<Tensor>>,
    /// Of k-means in each step.
    iterations: usize,
    device: Device,
    together: Together,
}

/// What one optimizer step works on: the weights that the networks see, leaves that gradients are taken from, each of the
/// type of its master weight.
pub struct Step {
    pub networks: Networks,
    seen: Vec<Seen>,
}

impl Trained {
    /// Takes the `parameters` of each network out of its fp32 weights. `palettize` says which of the UNet's get palettes, but
    /// where some are `fixed`, of which no weights are given; `train` whether master weights are bf16 and whether there is an
    /// average. Of a `resumed` run nothing is clustered: its palettes come with [`Trained::restore`].
    ///
    /// # Errors
    /// A palette that can't be made of a weight (not finite); [`super::Stopped`].
    pub fn new(
        networks: Vec<(Component, Weights, Vec<Parameter>)>,
        (palettize, fixed): (&Palettize, &Fixed),
        train: &Train,
        device: Device,
        resumed: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let total: usize = networks.iter().map(|(_, _, parameters)| parameters.len()).sum();
        let mut slots = Vec::with_capacity(total);
        let iterations = palettize.kmeans_max_iter;
        for (component, mut weights, parameters) in networks {
            let mut forms = BTreeMap::new();
            if component == Component::Unet && fixed.is_empty() {
                forms = palettize.chosen(&parameters).forms;
            }
            for parameter in parameters {
                super::stop::go_on()?;
                if let Some(palette) = fixed.get(&parameter.name).filter(|_| component == Component::Unet) {
                    let form = Some(palette.form);
                    let (palette, value) = match resumed {
                        // Of the weight's shape, by which the state is read.
                        true => (None, Tensor::f_empty(parameter.shape.as_slice(), (Kind::Float, device))?),
                        false => {
                            let (palette, entries) = palettes::fixed(&parameter.name, palette, device)?;
                            (Some(palette), entries)
                        }
                    };
                    let moments = Moments::zeros_like(&value);
                    slots.push(Slot { component, name: parameter.name, value, moments, palette, form });
                    progress(slots.len(), total);
                    continue;
                }
                let weight = weights.remove(&parameter.name);
                let weight = weight.with_context(|| format!("{} has no {}", component.title(), parameter.name))?;
                let kind = if train.is_bf16(&parameter.shape) { Kind::BFloat16 } else { Kind::Float };
                let value = weight.to_kind(kind).to_device(device).contiguous();
                let form = forms.remove(&parameter.name);
                let start = |form| LayerPalette::start(&parameter.name, form, iterations, &value);
                let palette = form.filter(|_| !resumed).map(start).transpose()?;
                let moments = Moments::zeros_like(&value);
                slots.push(Slot { component, name: parameter.name, value, moments, palette, form });
                progress(slots.len(), total);
            }
        }
        let copy = |slot: &Slot| slot.value.f_to_dtype(Kind::Float, false, true);
        let average = if train.use_ema { Some(slots.iter().map(copy).collect::<Result<_, _>>()?) } else { None };
        Ok(Self { slots, average, iterations, device, together: Together::Untried })
    }

    /// Lets a batch soften the palettes that it can take; says of each slot whether it did.
    fn begin_together(&mut self, temperature: f64) -> Result<Vec<bool>> {
        let mut taken = vec![false; self.slots.len()];
        let (mut places, mut members) = (Vec::new(), Vec::new());
        for (place, slot) in self.slots.iter_mut().enumerate() {
            let Moments { exp_avg, exp_avg_sq, .. } = &slot.moments;
            let palette = slot.palette.as_mut();
            if let Some(member) = palette.and_then(|palette| palette.member(&slot.value, [exp_avg, exp_avg_sq])) {
                places.push(place);
                members.push(member);
            }
        }
        let of_members = self.together.begin(&mut members, temperature, self.iterations)?;
        places.into_iter().zip(of_members).for_each(|(place, one)| taken[place] = one);
        Ok(taken)
    }

    /// Lets the batch step its layers, of which only some have `moved`; the numbers of a step are those of `count`.
    fn step_together(
        &mut self,
        of_batch: &[usize],
        moved: &[bool],
        count: impl Fn(&Slot, usize) -> Result<AdamWStep>,
        keys: &[u32],
    ) -> Result<()> {
        let mut steps = Vec::with_capacity(of_batch.len());
        for &place in of_batch {
            let slot = &mut self.slots[place];
            // Counted on the host, which so need not wait for the device.
            slot.moments.step = slot.moments.step.f_to_device(Device::Cpu)?;
            let step = if moved[place] { count(slot, place)? } else { AdamWStep::NONE };
            steps.push((step, keys[place]));
        }
        self.together.step(&steps)
    }

    /// The weights of this step. `temperature` is ρ (see [`LayerPalette`]). Parameters for which `learns` is false take no
    /// gradient.
    ///
    /// # Errors
    /// Clustering failed, because weights are not finite.
    pub fn begin(&mut self, temperature: f64, learns: impl Fn(&Slot) -> bool) -> Result<Step> {
        let taken = self.begin_together(temperature)?;
        // Layers side by side: most of a network's layers are too small to be worth threads of their own.
        let clustered: Vec<Result<Seen>> = self
            .slots
            .par_iter_mut()
            .zip(taken)
            .map(|(slot, taken)| match &mut slot.palette {
                Some(palette) if taken => Ok(palette.seen_of_batch()),
                Some(palette) => palette.seen(&slot.value, temperature),
                None => Ok(Seen::plain(&slot.value)),
            })
            .collect();
        let mut networks = Networks::new();
        let mut seen = Vec::with_capacity(self.slots.len());
        for (slot, one) in self.slots.iter().zip(clustered) {
            let mut one = one?;
            one.leaf = one.leaf.set_requires_grad(learns(slot));
            networks.entry(slot.component).or_default().insert(slot.name.clone(), one.leaf.shallow_clone());
            seen.push(one);
        }
        Ok(Step { networks, seen })
    }

    /// Takes the gradients of `step`, maps them to what the optimizer moves, clips and applies them. Returns the norm of
    /// the gradient before clipping. `random` is drawn from where master weights in bf16 are rounded.
    ///
    /// # Errors
    /// The gradient is not finite: nothing was changed then.
    pub fn apply(
        &mut self,
        step: Step,
        adamw: &AdamW,
        max_norm: f64,
        random: &mut impl Rng,
        rate: impl Fn(&Slot) -> f64,
    ) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let Step { networks, seen } = step;
        // So that each leaf goes as soon as its gradient is taken.
        drop(networks);
        let of_batch: Vec<usize> = (0..seen.len()).filter(|&place| seen[place].of_batch).collect();
        let upstream = of_batch.iter().map(|&place| {
            let gradient = seen[place].leaf.grad();
            gradient.defined().then(|| gradient.f_contiguous()).transpose()
        });
        let upstream: Vec<Option<Tensor>> = upstream.collect::<Result<_, _>>()?;
        let learns: Vec<bool> = upstream.iter().map(Option::is_some).collect();
        let gradients: Vec<Option<Gradient>> = self
            .slots
            .par_iter_mut()
            .zip(seen)
            .map(|(slot, seen)| {
                if seen.of_batch {
                    return Ok(None);
                }
                let gradient = seen.leaf.grad();
                let mapped = gradient.defined().then(|| match &mut slot.palette {
                    Some(palette) => palette.gradient(seen, gradient),
                    None => Ok(Gradient::Whole(gradient)),
                });
                mapped.transpose()
            })
            .collect::<Result<_>>()?;
        let (mut whole, mut square) = (Vec::new(), 0.0);
        for gradient in gradients.iter().flatten() {
            match gradient {
                Gradient::Whole(gradient) => whole.push(gradient),
                Gradient::Own { square: of_layer } => square += of_layer,
            }
        }
        for (&place, found) in of_batch.iter().zip(self.together.gradient(upstream)?) {
            square += found.square;
            if let Some(palette) = &mut self.slots[place].palette {
                palette.note(found);
            }
        }
        let norm = norm(&whole).hypot(square.sqrt());
        if !norm.is_finite() {
            return Err(Diverged(format!("the gradient is not finite (its norm is {norm})")).into());
        }
        let factor = clip_factor(norm, max_norm);
        let rates: Vec<f64> = self.slots.iter().map(rate).collect();
        let own: Vec<bool> = gradients.iter().map(|gradient| matches!(gradient, Some(Gradient::Own { .. }))).collect();
        let mut moved: Vec<bool> = gradients.iter().map(Option::is_some).collect();
        of_batch.iter().zip(learns).for_each(|(&place, learns)| moved[place] = learns);
        // In the order of the slots, whoever steps them.
        let mut key = |(slot, moved): (&Slot, &bool)| match *moved && slot.value.kind() == Kind::BFloat16 {
            true => random.next_u32(),
            false => 0,
        };
        let keys: Vec<u32> = self.slots.iter().zip(&moved).map(&mut key).collect();
        self.step_whole(gradients, adamw, &rates, factor, &keys)?;
        self.step_together(&of_batch, &moved, |slot, place| adamw.count(&slot.moments, rates[place], factor), &keys)?;
        let together = self.slots.par_iter_mut().zip(rates).zip(own);
        together.try_for_each(|((slot, rate), own)| match &mut slot.palette {
            Some(palette) if own => {
                let Moments { exp_avg, exp_avg_sq, .. } = &slot.moments;
                palette.step(&slot.value, [exp_avg, exp_avg_sq], &adamw.count(&slot.moments, rate, factor)?)
            }
            _ => Ok(()),
        })?;
        Ok(norm)
    }

    /// Steps with the gradients that are whole, multiplied by `factor`.
    fn step_whole(
        &self,
        gradients: Vec<Option<Gradient>>,
        adamw: &AdamW,
        rates: &[f64],
        factor: f64,
        keys: &[u32],
    ) -> Result<()> {
        let mut groups: Vec<(f64, Vec<(&Slot, Tensor)>)> = Vec::new();
        for (((slot, gradient), &rate), &key) in self.slots.iter().zip(gradients).zip(rates).zip(keys) {
            let Some(Gradient::Whole(mut gradient)) = gradient else { continue };
            if factor < 1.0 {
                let _ = gradient.f_mul_scalar_(factor)?;
            }
            if slot.value.kind() == Kind::BFloat16 {
                adamw.step_bf16(&slot.value, &gradient, &slot.moments, rate, key)?;
                continue;
            }
            match groups.iter_mut().find(|(of_group, _)| *of_group == rate) {
                Some((_, group)) => group.push((slot, gradient)),
                None => groups.push((rate, vec![(slot, gradient)])),
            }
        }
        for (rate, group) in groups {
            let values: Vec<&Tensor> = group.iter().map(|(slot, _)| &slot.value).collect();
            let moments: Vec<&Moments> = group.iter().map(|(slot, _)| &slot.moments).collect();
            let gradients: Vec<&Tensor> = group.iter().map(|(_, gradient)| gradient).collect();
            adamw.step(&values, &gradients, &moments, rate)?;
        }
        Ok(())
    }

    /// Moves the average towards the weights: `average ← decay·average + (1 − decay)·weight`.
    pub fn update_average(&mut self, decay: f64) {
        let _guard = tch::no_grad_guard();
        if let Some(averages) = &mut self.average {
            for (average, slot) in averages.iter_mut().zip(&self.slots) {
                let _ = average.lerp_(&slot.value.to_kind(Kind::Float), 1.0 - decay);
            }
        }
    }

    /// Fixes the assignments: from here on only the entries of palettes learn, with fresh moments.
    ///
    /// # Errors
    /// Weights that are not finite.
    pub fn freeze_palettes(&mut self) -> Result<()> {
        self.together.forget();
        for slot in &mut self.slots {
            if let Some(palette) = &mut slot.palette
                && let Some(entries) = palette.freeze(&slot.value)?
            {
                slot.moments = Moments::zeros_like(&entries);
                slot.value = entries;
            }
        }
        Ok(())
    }

    /// Lets assignments learn again, with fresh moments.
    ///
    /// # Errors
    /// The state is of a version that kept nothing to do that with.
    pub fn thaw_palettes(&mut self) -> Result<()> {
        self.together.forget();
        for slot in &mut self.slots {
            if let Some(palette) = &mut slot.palette
                && let Some(value) = palette.thaw()?
            {
                slot.moments = Moments::zeros_like(&value);
                slot.value = value;
            }
        }
        Ok(())
    }

    /// What of the state no run can continue from and no file can hold: values that are not finite, weights beyond fp16.
    pub fn fault(&self) -> Option<String> {
        let _guard = tch::no_grad_guard();
        let largest = |tensor: &Tensor| {
            let extremes = [tensor.f_max(), tensor.f_min()];
            // Not a number if one of them is not; nothing in a tensor without elements.
            extremes
                .into_iter()
                .flatten()
                .map(|x| x.double_value(&[]).abs())
                .fold(0.0, |a, b| if a > b { a } else { b })
        };
        self.slots.iter().find_map(|slot| {
            let (size, title) = (largest(&slot.value), slot.component.title());
            if !size.is_finite() {
                return Some(format!("the {title}'s `{}` is not finite any more", slot.name));
            }
            if size > f64::from(super::identity::LARGEST) {
                let most = super::identity::LARGEST;
                return Some(format!(
                    "the {title}'s `{}` has grown to {size:.3e}, beyond {most}, the most that fp16 holds",
                    slot.name
                ));
            }
            let moments = [&slot.moments.exp_avg, &slot.moments.exp_avg_sq];
            let finite = moments.into_iter().all(|moment| largest(moment).is_finite());
            (!finite)
                .then(|| format!("the optimizer's moments of the {title}'s `{}` are not finite any more", slot.name))
        })
    }

    /// The weights as they would ship now, fp16: palettes hard, the average where there is one; and the UNet's palettes, by
    /// name.
    ///
    /// # Errors
    /// Weights that are not finite.
    pub fn shipped(&self) -> Result<(Networks, BTreeMap<String, Palette>)> {
        let _guard = tch::no_grad_guard();
        let (mut networks, mut palettes) = (Networks::new(), BTreeMap::new());
        for (index, slot) in self.slots.iter().enumerate() {
            let value = self.average.as_ref().map_or(&slot.value, |average| &average[index]);
            let weight = match &slot.palette {
                Some(palette) => {
                    let palette = palette.hard(&slot.value)?;
                    let weight = palette.tensor(Kind::Half, self.device)?;
                    palettes.insert(slot.name.clone(), palette);
                    weight
                }
                None => value.to_kind(Kind::Half),
            };
            networks.entry(slot.component).or_default().insert(slot.name.clone(), weight);
        }
        Ok((networks, palettes))
    }

    /// Everything that a resumed run needs, as tensors by name.
    ///
    /// # Errors
    /// An error of the device that has it.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let key = slot.key();
            tensors.insert(format!("value/{key}"), slot.value.shallow_clone());
            tensors.insert(format!("exp_avg/{key}"), slot.moments.exp_avg.shallow_clone());
            tensors.insert(format!("exp_avg_sq/{key}"), slot.moments.exp_avg_sq.shallow_clone());
            tensors.insert(format!("step/{key}"), slot.moments.step.shallow_clone());
            if let Some(average) = &self.average {
                tensors.insert(format!("average/{key}"), average[index].shallow_clone());
            }
            if let Some(palette) = &slot.palette {
                let named = palette.tensors()?.into_iter();
                tensors.extend(named.map(|(name, tensor)| (format!("palette/{name}"), tensor)));
            }
        }
        Ok(tensors)
    }

    /// Puts back what [`Trained::state`] gave, a tensor at a time. `frozen` says whether assignments were fixed by then.
    ///
    /// # Errors
    /// A tensor is missing or has another shape: the state is another run's. A damaged file.
    pub fn restore(&mut self, file: &TensorFile, frozen: bool) -> Result<()> {
        self.together.forget();
        let device = self.device;
        let names = file.names();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let key = slot.key();
            let take = |part: &str, shape: &[i64]| {
                let name = format!("{part}/{key}");
                let found = file.shape(&name).with_context(|| format!("it has no {name}"))?;
                if found != shape {
                    bail!("its {name} has the shape {found:?}, the model's {shape:?}");
                }
                anyhow::Ok(file.tensor(&name)?.to_device(device))
            };
            let entries = match slot.form {
                Some(form) => {
                    // `palette/NAME.entries` and so on; a name that is the beginning of another's brings that one's too.
                    let prefix = format!("palette/{}", slot.name);
                    let own = names.iter().filter(|name| name.starts_with(&prefix));
                    let tensors: Result<Weights> =
                        own.map(|name| Ok((name["palette/".len()..].to_owned(), file.tensor(name)?))).collect();
                    let saved = (&tensors?, frozen);
                    let (palette, entries) =
                        LayerPalette::restored(&slot.name, form, self.iterations, &slot.value, saved)?;
                    slot.palette = Some(palette);
                    entries
                }
                None => None,
            };
            slot.value = match entries {
                Some(entries) => entries,
                None => take("value", &slot.value.size())?,
            };
            let shape = slot.value.size();
            slot.moments = Moments {
                exp_avg: take("exp_avg", &shape)?,
                exp_avg_sq: take("exp_avg_sq", &shape)?,
                step: take("step", &[])?,
            };
            if let Some(average) = &mut self.average {
                average[index] = take("average", &shape)?;
            }
        }
        Ok(())
    }

    /// Mean over layers of the palettes' relative squared error; 0 without palettes.
    pub fn palette_error(&self) -> f64 {
        let errors: Vec<f64> =
            self.slots.iter().filter_map(|slot| Some(slot.palette.as_ref()?.relative_error)).collect();
        errors.iter().sum::<f64>() / errors.len().max(1) as f64
    }
}
