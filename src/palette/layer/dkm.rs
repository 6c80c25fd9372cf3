//! The palette of one layer while it is learnt: one table of numbers, or one for each group of channels, of numbers or of
//! vectors, with or without a scale for each channel.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::backward::{Gradient, Group, OwnStep, SoftenRows};
use super::frozen::Frozen;
use super::rounding::Rounding;
use super::rows::Rows;
use super::saved::saved;
use super::start::{best, points_of, scales_to_try, spacing_of};
use crate::ops::Weights;
use crate::palette::forms::check_form;
use crate::palette::scalar::{check, nearest, soften_counted};
use crate::palette::vector::{SoftenVectors, nearest_vectors};
use crate::palette::{AdamWStep, Code, Form, Histogram, Palette, kmeans};

/// With fewer points for each entry the soft weight is as good as the weight; its gradient is taken to be the weight's own.
/// The exact one is that on average; but where a few weights alone decide where an entry lies, each that comes between two
/// entries moves both by many times what it moves itself, and that once more in each iteration: 10⁵ times and more.
const FEW_POINTS: f64 = 5.0;

/// Weights for each entry from which on there may be as many steps of a code as weights.
const MANY: f64 = 16.0;

/// Entries of a layer among those of its [batch](crate::palette::batch), f64 `[G · K]`, each table ascending.
#[derive(Debug)]
struct Moved(Tensor);

impl Clone for Moved {
    /// Others, which no batch moves.
    fn clone(&self) -> Self {
        Self(self.0.copy())
    }
}

/// The palette of one layer while it is learnt. K = 2^bits entries of d weights for each of its G groups of channels.
#[derive(Clone, Debug)]
pub struct DkmLayer {
    /// The parameter's diffusers name.
    pub name: String,
    pub form: Form,
    rows: Rows,
    /// `[G, K, d]`; each step starts from those that the last one left. Of a layer in a batch those with which it came in:
    /// [`Self::entries`] has them as they are now.
    pub centroids: Vec<f64>,
    /// Where a batch moves them.
    moved: Option<Moved>,
    /// Mean squared error, a weight, of the best table of each group's weights as training began: the unit of temperature.
    pub kmeans_mse: Vec<f64>,
    /// For each group, a 32nd of the median squared distance between neighbouring entries then: what the error of the
    /// k-means is at least in a group of so many weights that their values are everywhere between.
    spacing: Vec<f64>,
    /// Mean square of the rows then.
    pub power: f64,
    /// Which groups the last step saw through a coarser code than asked for. It is found anew, this makes it quicker.
    coarser: Vec<bool>,
    /// Of the groups whose weights the last step of the optimizer counted as it moved them.
    counted: Vec<Option<Histogram>>,
    /// The step that the layer is to take itself.
    own: Option<OwnStep>,
}

impl DkmLayer {
    /// Starts at the best palette of `weight` (f32 or bf16) without training.
    ///
    /// # Errors
    /// When a weight is not finite or beyond the range of f16, or `form` is not one for it; names the layer.
    pub fn new(name: &str, form: Form, weight: &Tensor) -> Result<Self> {
        let named = || format!("parameter {name}");
        let _guard = tch::no_grad_guard();
        let weight = weight.f_detach()?.f_to_kind(Kind::Float)?;
        if !form.per_channel_scale {
            return Self::start(name, form, &weight, &[]).with_context(named);
        }
        // They are kept: what training moves is the table.
        let mut tried = Vec::new();
        for scales in scales_to_try(&weight, form).with_context(named)? {
            let layer = Self::start(name, form, &weight, &scales).with_context(named)?;
            let dense = layer.hard(&weight)?.tensor(Kind::Float, weight.device())?;
            let error = dense.f_sub(&weight)?.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?;
            tried.push((error, layer));
        }
        let best = tried.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        Ok(best.context("there are no scales to try")?.1)
    }

    /// At the best palette of the rows that these scales make.
    fn start(name: &str, form: Form, weight: &Tensor, scales: &[f64]) -> Result<Self> {
        let rows = Rows::new(&form, &weight.size(), scales, weight.device())?;
        let laid_out = rows.of_weight(weight)?;
        if form.cluster_dim > 1 {
            let palette = best(weight, form)?;
            let dense = rows.of_weight(&palette.tensor(Kind::Float, weight.device())?)?;
            let mean = |squares: Tensor, dim: Option<i64>| squares.f_mean_dim(dim, false, Kind::Double);
            let errors = mean(laid_out.f_sub(&dense)?.f_square()?, Some(1))?;
            let kmeans_mse = Vec::<f64>::try_from(errors.f_to_device(Device::Cpu)?)?;
            let power = laid_out.f_square()?.f_mean(Kind::Double)?.f_double_value(&[])?;
            let centroids = palette.entries.iter().map(|e| e.to_f64()).collect();
            return Ok(Self::with(name, form, rows, centroids, kmeans_mse, None, power));
        }
        let (mut centroids, mut kmeans_mse, mut power) = (Vec::new(), Vec::new(), 0.0);
        for group in 0..rows.groups() {
            let histogram = Histogram::of(&laid_out.f_get(group as i64)?, Code::F16, false)?;
            let best: Vec<f64> = kmeans::entries(&histogram, form.bits).iter().map(|e| e.to_f64()).collect();
            kmeans_mse.push(histogram.error(&best));
            power += histogram.error(&[0.0]) / rows.groups() as f64;
            centroids.extend(best);
        }
        Ok(Self::with(name, form, rows, centroids, kmeans_mse, None, power))
    }

    /// Without `spacing` it is that of the `centroids`.
    fn with(
        name: &str,
        form: Form,
        rows: Rows,
        centroids: Vec<f64>,
        kmeans_mse: Vec<f64>,
        spacing: Option<Vec<f64>>,
        power: f64,
    ) -> Self {
        let of_tables =
            || centroids.chunks(form.table()).map(|table| spacing_of(table, form.cluster_dim) / 32.0).collect();
        let spacing = spacing.unwrap_or_else(of_tables);
        let (coarser, counted) = (vec![false; rows.groups()], vec![None; rows.groups()]);
        let (name, moved, own) = (name.to_string(), None, None);
        Self { name, form, rows, centroids, moved, kmeans_mse, spacing, power, coarser, counted, own }
    }

    /// The code through which the weights of a group are seen at ρ = `rho`: its step is at most an eighth of ρ · √MSE of the
    /// k-means. Neighbouring entries are some √(12 MSE) apart; attention passes from one to the other as a logistic function
    /// of scale τ / 2(c₂ − c₁), which is a 24th of ρ times that distance: more than a step. Of up to four entries, which
    /// make few bins anyway, steps are half as large, which trains a little better (docs/recipe.md). A group of few weights
    /// gets about as many bins as it has weights: steps of that size where they are small beside the distance of entries,
    /// and otherwise f16, which has a bin for each weight (steps as large as that distance would make gradients that are
    /// 10⁵ times too large). Where f16 has only its coarse smallest numbers, bins are more.
    pub fn code(&self, group: usize, rho: f64) -> Code {
        /// The least normal number of f16.
        const LEAST: f64 = 6.103_515_625e-5;
        let weights = self.rows.shape().iter().product::<i64>() as f64 / self.rows.groups().max(1) as f64;
        let few = 4.0 * self.power.sqrt() / weights.max(1.0);
        let part = if self.form.bits <= 2 { 16.0 } else { 8.0 };
        let wanted = rho * self.unit(group).sqrt() / part;
        match wanted < few && weights < MANY * f64::from(1 << self.form.bits) {
            true if self.power.sqrt() < LEAST => Code::fixed(wanted),
            true => Code::F16,
            false => Code::fixed(wanted.max(few)),
        }
    }

    /// τ of a group = ρ · the error of its k-means: with it attention is as soft in every layer, whatever the scale of
    /// its weights. A group of few values has hardly any error, and would have attention so sharp that a weight that
    /// comes between two entries gets a gradient of any size: the distance of entries is the least that counts. A group of
    /// one value gets a small positive one.
    pub fn temperature(&self, group: usize, rho: f64) -> f64 {
        (rho * self.unit(group)).max(1e-8 * self.power).max(1e-20)
    }

    /// Points of a group for each entry that it has.
    fn points_per_entry(&self) -> f64 {
        let points = self.rows.shape().iter().product::<i64>() as f64 / self.form.cluster_dim as f64;
        points / self.rows.groups().max(1) as f64 / f64::from(1 << self.form.bits)
    }

    /// The unit of a group's temperature.
    fn unit(&self, group: usize) -> f64 {
        self.kmeans_mse[group].max(self.spacing[group])
    }

    /// Mean squared error of the rows over their mean square, before training.
    pub fn relative_error(&self) -> f64 {
        let mean = self.kmeans_mse.iter().sum::<f64>() / self.kmeans_mse.len().max(1) as f64;
        mean / self.power.max(f64::MIN_POSITIVE)
    }

    /// Groups of channels with a table each.
    pub fn groups(&self) -> usize {
        self.rows.groups()
    }

    /// Whether its form and size are for a [batch](crate::palette::batch): numbers, weights in the order of the tensor, and so
    /// many of them that [`Self::code`] is fixed point at every ρ.
    pub(in crate::palette) fn is_for_batches(&self) -> bool {
        self.form.cluster_dim == 1 && self.rows.are_plain() && self.points_per_entry() >= MANY.max(FEW_POINTS)
    }

    /// The entries as they are now.
    ///
    /// # Errors
    /// An error of the device where a batch has them.
    pub fn entries(&self) -> Result<Vec<f64>> {
        match &self.moved {
            Some(Moved(entries)) => Ok(Vec::try_from(entries.f_to_device(Device::Cpu)?)?),
            None => Ok(self.centroids.clone()),
        }
    }

    /// [`Self::entries`], ascending in each table.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub(in crate::palette) fn ascending_entries(&self) -> Result<Vec<f64>> {
        let mut entries = self.entries()?;
        entries.chunks_mut(self.form.table()).for_each(|table| table.sort_by(f64::total_cmp));
        Ok(entries)
    }

    /// From here on a batch moves the entries, in this memory.
    pub(in crate::palette) fn moved_to(&mut self, entries: Tensor) {
        self.moved = Some(Moved(entries));
    }

    /// Whether a batch moves the entries.
    pub(in crate::palette) fn has_moved(&self) -> bool {
        self.moved.is_some()
    }

    /// Takes the entries back from the batch that moves them, if one does.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn take_back(&mut self) -> Result<()> {
        self.centroids = self.entries()?;
        self.moved = None;
        Ok(())
    }

    /// [`soften`](fn@crate::palette::soften) at ρ = `rho` into `soft`; keeps the new centroids. Numbers are seen through `code`, or where there is none
    /// through that of [`Self::code`]; vectors as they are.
    ///
    /// # Errors
    /// As [`soften`](fn@crate::palette::soften); names the layer.
    pub fn soften(
        &mut self,
        weight: &Tensor,
        rho: f64,
        iterations: usize,
        code: Option<Code>,
        soft: &mut Tensor,
    ) -> Result<SoftenRows> {
        let mut softened = || {
            let _guard = tch::no_grad_guard();
            check(weight, soft)?;
            self.take_back()?;
            let rows = self.rows.of_weight(&weight.f_detach()?)?;
            let rows = if self.form.cluster_dim == 1 { rows } else { rows.f_to_kind(Kind::Float)? };
            let kind = rows.f_kind()?;
            // The same memory as `soft`, or some of its own.
            let plain = self.rows.are_plain() && kind == soft.f_kind()?;
            let softened = if plain { soft.f_view(rows.size().as_slice())? } else { rows.f_empty_like()? };
            let (table, inner) = (self.form.table(), self.rows.inner());
            let points_per_entry = self.points_per_entry();
            let mut groups = Vec::with_capacity(self.rows.groups());
            for group in 0..self.rows.groups() {
                let (row, mut soft) = (rows.f_get(group as i64)?, softened.f_get(group as i64)?);
                if points_per_entry <= 1.0 {
                    // An entry for each: attention comes to the same as τ goes to 0.
                    let points = points_of(&row, inner, self.form.cluster_dim)?;
                    self.centroids[group * table..][..points.len()].copy_from_slice(&points);
                    // Those that are left over are the last point's.
                    let (of_points, rest) = self.centroids[group * table..][..table].split_at_mut(points.len());
                    let last = of_points.len().saturating_sub(self.form.cluster_dim);
                    let last = of_points[last..].iter().copied().cycle();
                    rest.iter_mut().zip(last).for_each(|(entry, last)| *entry = last);
                    soft.f_copy_(&row)?;
                    groups.push(Group::Straight { hard_error: 0.0 });
                    continue;
                }
                let (tau, code) = (self.temperature(group, rho), code.unwrap_or_else(|| self.code(group, rho)));
                let entries = &mut self.centroids[group * table..][..table];
                let (new, state) = match self.form.cluster_dim {
                    1 => {
                        // Counted through another code than this, they are counted again.
                        let counted = self.counted[group].take().filter(|histogram| histogram.code == code);
                        let counted = counted.map_or_else(|| Histogram::of(&row, code, self.coarser[group]), Ok);
                        let histogram = counted?;
                        self.coarser[group] = histogram.code != code;
                        let (new, state) = soften_counted(row, histogram, entries, tau, iterations, &mut soft)?;
                        let straight = points_per_entry < FEW_POINTS;
                        let hard_error = if straight { state.hard_error() } else { 0.0 };
                        (new, if straight { Group::Straight { hard_error } } else { Group::One(state) })
                    }
                    2 => SoftenVectors::new(row, inner, entries, tau, iterations, &mut soft)
                        .map(|(new, state)| (new, Group::Two(state)))?,
                    _ => SoftenVectors::new(row, inner, entries, tau, iterations, &mut soft)
                        .map(|(new, state)| (new, Group::Four(state)))?,
                };
                entries.copy_from_slice(&new);
                groups.push(state);
            }
            if !plain {
                soft.f_copy_(&self.rows.weight(&softened)?)?;
            }
            anyhow::Ok(SoftenRows { rows: self.rows.clone(), kind, groups })
        };
        softened().with_context(|| format!("parameter {}", self.name))
    }

    /// From `upstream`, ∂L/∂ŵ of what [`Self::soften`] made, which is used up, to ∂L/∂w: whole, or kept for
    /// [`Self::step`].
    ///
    /// # Errors
    /// When `upstream` has another shape or type, or is on another device.
    pub fn gradient(&mut self, softened: SoftenRows, upstream: Tensor) -> Result<Gradient> {
        let (gradient, own) = softened.gradient(upstream)?;
        self.own = own;
        Ok(gradient)
    }

    /// Takes a `step` of AdamW with the gradient that [`Self::gradient`] kept ([`Gradient::Own`]); without one nothing
    /// happens. It moves `weight`, the master weight that was softened, and `moments`, the moving means of gradients and of
    /// their squares; all contiguous f32. The next [`Self::soften`] must be of the weight as this leaves it: weights are
    /// counted on the way.
    ///
    /// # Errors
    /// When one of them has another shape or type.
    pub fn step(&mut self, weight: &Tensor, moments: [&Tensor; 2], step: &AdamWStep) -> Result<()> {
        if let Some(own) = self.own.take() {
            self.counted = own.take(weight, moments, step)?;
        }
        Ok(())
    }

    /// The palette of the current centroids as it would be stored, each table of numbers ascending: each weight (f32 or bf16)
    /// takes its nearest.
    ///
    /// # Errors
    /// When a weight or a centroid is not finite; names the layer.
    pub fn hard(&self, weight: &Tensor) -> Result<Palette> {
        self.freeze(weight)?.palette()
    }

    /// The assignments of [`Self::hard`], held from now on, with its entries to be trained.
    ///
    /// # Errors
    /// As [`Self::hard`].
    pub fn freeze(&self, weight: &Tensor) -> Result<Frozen> {
        let make = || {
            let _guard = tch::no_grad_guard();
            let rows = self.rows.of_weight(&weight.f_detach()?.f_to_kind(Kind::Float)?)?;
            let mut entries = self.entries()?;
            let (table, inner) = (self.form.table(), self.rows.inner());
            if self.form.cluster_dim == 1 {
                entries.chunks_mut(table).for_each(|table| table.sort_by(f64::total_cmp));
            }
            let rounding = Rounding::new(&self.form, &entries, &self.rows.scales()?);
            let mut indices = Vec::with_capacity(rows.numel());
            for (group, table) in rounding.values(&entries).chunks(table).enumerate() {
                let row = rows.f_get(group as i64)?.f_to_device(Device::Cpu)?;
                indices.extend(match self.form.cluster_dim {
                    1 => nearest(&row, table)?,
                    2 => nearest_vectors::<2>(&row, inner, table)?,
                    _ => nearest_vectors::<4>(&row, inner, table)?,
                });
            }
            Frozen::new(&self.name, self.form, self.rows.clone(), rounding, &indices, &entries, weight.device())
        };
        make().with_context(|| format!("parameter {}", self.name))
    }

    /// All of the state, as tensors named after the layer.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let named = |part: &str, values: &[f64]| (format!("{}.{part}", self.name), Tensor::from_slice(values));
        let unit: Vec<f64> = self.kmeans_mse.iter().copied().chain([self.power]).collect();
        let scales = self.rows.scales().unwrap_or_default();
        let mut tensors =
            vec![named("centroids", &self.entries()?), named("kmeans", &unit), named("spacing", &self.spacing)];
        if !scales.is_empty() {
            tensors.push(named("scales", &scales));
        }
        Ok(tensors)
    }

    /// The layer of `shape` whose [`Self::tensors`] are among `tensors`, bit for bit, on `device`.
    ///
    /// # Errors
    /// When one is missing or not as expected; names it.
    pub fn restore(name: &str, form: Form, shape: &[i64], tensors: &Weights, device: Device) -> Result<Self> {
        check_form(&form, shape).with_context(|| format!("parameter {name}"))?;
        let groups = form.groups(shape);
        let centroids = saved(tensors, name, "centroids", groups * form.table())?;
        let unit = saved(tensors, name, "kmeans", groups + 1)?;
        let scales =
            if form.per_channel_scale { saved(tensors, name, "scales", shape[0] as usize)? } else { Vec::new() };
        let rows = Rows::new(&form, shape, &scales, device)?;
        let (kmeans_mse, power) = (unit[..groups].to_vec(), unit[groups]);
        // Runs of earlier versions go on as they began.
        let spacing = match tensors.contains_key(&format!("{name}.spacing")) {
            true => saved(tensors, name, "spacing", groups)?,
            false => vec![0.0; groups],
        };
        Ok(Self::with(name, form, rows, centroids, kmeans_mse, Some(spacing), power))
    }
}

impl PartialEq for DkmLayer {
    /// Of what is saved.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.form == other.form
            && self.entries().ok() == other.entries().ok()
            && self.kmeans_mse == other.kmeans_mse
            && self.spacing == other.spacing
            && self.power == other.power
            && self.rows.scales().ok() == other.rows.scales().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random::{Purpose, generator, normal};
    use crate::train::optimizer::{AdamW, Moments};

    /// A step with a gradient that is never written down is one with the gradient that would be.
    #[test]
    fn a_layers_own_step_is_one_with_the_whole_gradient() {
        let plain = Form::per_tensor(2);
        let grouped = Form { group_size: Some(4), bits: 4, ..plain };
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.05 };
        let own = |gradient| if let Gradient::Own { square } = gradient { square } else { panic!("it is whole") };
        let take_step = |layer: &mut DkmLayer, weight: &Tensor, moments: &Moments, factor: f64| {
            let constants = adamw.count(moments, 1e-3, factor).unwrap();
            layer.step(weight, [&moments.exp_avg, &moments.exp_avg_sq], &constants).unwrap();
        };
        // The last is large enough for several pieces.
        for (form, shape) in [(plain, [12, 20]), (grouped, [16, 80]), (plain, [700, 900])] {
            let draw = |i| normal(&mut generator(8, Purpose::Initial, i), &shape);
            let start = draw(0) * 0.05;
            let mut layers = [(); 2].map(|()| DkmLayer::new("layer", form, &start).unwrap());
            let weights = [start.copy(), start.copy()];
            let moments = [Moments::zeros_like(&start), Moments::zeros_like(&start)];
            for step in 1..4 {
                let upstream = draw(step) * 0.01;
                let mut states = layers
                    .iter_mut()
                    .zip(&weights)
                    .map(|(layer, weight)| layer.soften(weight, 0.5, 3, None, &mut weight.empty_like()).unwrap());
                let (first, second) = (states.next().unwrap(), states.next().unwrap());
                let mut whole = upstream.copy();
                first.backward(&mut whole).unwrap();
                let square_of = own(layers[1].gradient(second, upstream).unwrap());
                let square = whole.square().sum(Kind::Double).double_value(&[]);
                assert!((square_of / square - 1.0).abs() < 1e-5, "{square_of} {square}");
                let factor = 0.3;
                adamw.step(&[&weights[0]], &[&(whole * factor)], &[&moments[0]], 1e-3).unwrap();
                take_step(&mut layers[1], &weights[1], &moments[1], factor);
                for (group, bins) in layers[1].counted.iter().enumerate() {
                    let row = weights[1].view([layers[1].counted.len() as i64, -1]).get(group as i64);
                    assert_eq!(*bins, Some(Histogram::of(&row, layers[1].code(group, 0.5), false).unwrap()));
                }
            }
            let pairs = [
                (&weights[0], &weights[1]),
                (&moments[0].exp_avg, &moments[1].exp_avg),
                (&moments[0].exp_avg_sq, &moments[1].exp_avg_sq),
            ];
            for (expected, found) in pairs {
                let error = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
                assert!(error < 1e-6, "{form:?}: {error:e}");
            }
            assert_eq!(moments[1].step.double_value(&[]), 3.0);

            // Through another code, or where a weight has left the code's range, they are counted anew.
            let soft_is_as_if_counted_anew = |layer: &mut DkmLayer, rho: f64| {
                let mut fresh = layer.clone();
                fresh.counted.fill(None);
                let [expected, found] = [&mut fresh, layer].map(|layer| {
                    let mut soft = start.empty_like();
                    (layer.soften(&weights[1], rho, 3, None, &mut soft).unwrap(), soft)
                });
                assert!(found.1.equal(&expected.1));
                found.0
            };
            let state = soft_is_as_if_counted_anew(&mut layers[1], 0.05);
            own(layers[1].gradient(state, draw(4) * 0.01).unwrap());
            let _ = weights[1].view(-1).get(5).fill_(50.0);
            take_step(&mut layers[1], &weights[1], &moments[1], 1.0);
            assert_eq!(layers[1].counted.iter().filter(|counted| counted.is_none()).count(), 1);
            soft_is_as_if_counted_anew(&mut layers[1], 0.05);
            let _ = weights[1].view(-1).get(5).fill_(0.01);

            // What is no number is found out before it is too late.
            for bad in [f64::NAN, f64::INFINITY] {
                let upstream = draw(4);
                let _ = upstream.view(-1).get(5).fill_(bad);
                let state = layers[1].soften(&weights[1], 0.5, 3, None, &mut start.empty_like()).unwrap();
                assert!(!own(layers[1].gradient(state, upstream).unwrap()).is_finite());
            }
        }
    }
}
