//! Differentiable k-means of a weight tensor: one scalar palette, softened for training.
//!
//! A master weight w becomes a soft weight ŵ with [`soften`]; the network runs on ŵ as a leaf, and
//! [`Soften::backward`] turns ∂L/∂ŵ into ∂L/∂w. Both take a few passes over the weights ([`super::codes`]) around a
//! clustering of their bins ([`super::table`]): time and memory do not grow with weights × entries.

use anyhow::{Context, Result, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::codes::{self, Code, Histogram};
use super::table::Table;
use super::{Frozen, Palette, first_of_equals, kmeans, midpoints, piece};
use crate::ops::Weights;
use crate::torch::slices;

/// How often entries are updated in one step (coremltools' default).
pub const ITERATIONS: usize = 3;

/// What the backward pass of one [`soften`] needs: the weight itself (shared, not copied) and the table.
#[derive(Debug)]
pub struct Soften {
    weight: Tensor,
    table: Table,
}

/// Writes the soft weight of `weight` (f32, any shape, any device) to `soft` (contiguous f32 of the same shape and
/// device), for `centroids` at the temperature `tau`; returns the centroids after `iterations` updates, and what the
/// backward pass needs. Weights are seen through `code`; `weight` must not change before the backward pass.
///
/// # Errors
/// When a weight is not finite, or not within the range of `code`; when an argument is out of its range.
pub fn soften(
    weight: &Tensor,
    centroids: &[f64],
    tau: f64,
    iterations: usize,
    code: Code,
    soft: &mut Tensor,
) -> Result<(Vec<f64>, Soften)> {
    let _guard = tch::no_grad_guard();
    let weight = weight.f_detach()?;
    check(&weight, soft)?;
    let histogram = Histogram::of(&weight, code)?;
    let table = Table::cluster(histogram, centroids, tau, iterations)?;
    codes::look_up(&weight, table.histogram(), &table.soft_values(), soft)?;
    Ok((table.entries(), Soften { weight, table }))
}

fn check(weight: &Tensor, other: &Tensor) -> Result<()> {
    for tensor in [weight, other] {
        let kind = tensor.f_kind()?;
        ensure!(kind == Kind::Float, "a weight to soften is Float, not {kind:?}");
    }
    ensure!(
        other.size() == weight.size() && other.device() == weight.device() && other.is_contiguous(),
        "a soft weight or gradient of shape {:?} on {:?} does not fit a weight of shape {:?} on {:?}",
        other.size(),
        other.device(),
        weight.size(),
        weight.device()
    );
    Ok(())
}

impl Soften {
    /// Turns `gradient` from ∂L/∂ŵ into ∂L/∂w, in place: contiguous f32 of the weight's shape, on its device.
    ///
    /// # Errors
    /// When `gradient` has another shape or kind, or is on another device.
    pub fn backward(&self, gradient: &mut Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Self { weight, table } = self;
        check(weight, gradient)?;
        let histogram = table.histogram();
        let lines = table.backward(&codes::add_up(weight, gradient, histogram)?);
        codes::combine(weight, histogram, &lines, gradient)
    }

    /// Mean squared error of the weights if palettes were made of the new centroids now.
    pub fn hard_error(&self) -> f64 {
        self.table.hard_error()
    }
}

/// The palette of one layer while it is learnt.
#[derive(Clone, Debug, PartialEq)]
pub struct DkmLayer {
    /// The parameter's diffusers name.
    pub name: String,
    pub bits: u32,
    /// 2^bits entries; each step starts from those that the last one left.
    pub centroids: Vec<f64>,
    /// Mean squared error of the best palette of the weights that training began with: the unit of temperature.
    pub kmeans_mse: f64,
    /// Mean square of those weights.
    pub power: f64,
}

impl DkmLayer {
    /// Starts at the exact k-means of `weight` (f32).
    ///
    /// # Errors
    /// When a weight is not finite or beyond the range of f16; names the layer.
    pub fn new(name: &str, bits: u32, weight: &Tensor) -> Result<Self> {
        ensure!(super::BITS.contains(&bits), "parameter {name}: a palette has 1, 2, 3, 4, 6 or 8 bits, not {bits}");
        let weight = weight.f_detach()?.f_to_kind(Kind::Float)?;
        let histogram = Histogram::of(&weight, Code::F16).with_context(|| format!("parameter {name}"))?;
        let centroids: Vec<f64> = kmeans::entries(&histogram, bits).iter().map(|e| e.to_f64()).collect();
        let (kmeans_mse, power) = (histogram.error(&centroids), histogram.error(&[0.0]));
        Ok(Self { name: name.to_string(), bits, centroids, kmeans_mse, power })
    }

    /// τ = ρ · the error of k-means: with it attention is as soft in every layer, whatever the scale of its weights.
    /// A layer that a palette holds exactly gets a small positive one.
    pub fn temperature(&self, rho: f64) -> f64 {
        (rho * self.kmeans_mse).max(1e-8 * self.power).max(1e-20)
    }

    /// [`soften`] at ρ = `rho` into `soft`; keeps the new centroids.
    ///
    /// # Errors
    /// As [`soften`]; names the layer.
    pub fn soften(
        &mut self,
        weight: &Tensor,
        rho: f64,
        iterations: usize,
        code: Code,
        soft: &mut Tensor,
    ) -> Result<Soften> {
        let (centroids, state) = soften(weight, &self.centroids, self.temperature(rho), iterations, code, soft)
            .with_context(|| format!("parameter {}", self.name))?;
        self.centroids = centroids;
        Ok(state)
    }

    /// The palette of the current centroids, rounded to f16, ascending: each weight (f32) takes its nearest.
    ///
    /// # Errors
    /// When a weight or a centroid is not finite; names the layer.
    pub fn hard(&self, weight: &Tensor) -> Result<Palette> {
        let make = || {
            let mut entries: Vec<f16> = self.centroids.iter().map(|&c| f16::from_f64(c)).collect();
            entries.sort_by(f16::total_cmp);
            Palette::new(self.bits, weight.size(), nearest(weight, &entries)?, entries)
        };
        make().with_context(|| format!("parameter {}", self.name))
    }

    /// The assignments of [`Self::hard`], held from now on, with its entries to be trained.
    ///
    /// # Errors
    /// As [`Self::hard`].
    pub fn freeze(&self, weight: &Tensor) -> Result<Frozen> {
        Frozen::new(&self.name, &self.hard(weight)?, weight.device())
    }

    /// All of the state, as tensors named after the layer.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        vec![
            (format!("{}.centroids", self.name), Tensor::from_slice(&self.centroids)),
            (format!("{}.kmeans", self.name), Tensor::from_slice(&[self.kmeans_mse, self.power])),
        ]
    }

    /// The layer whose [`Self::tensors`] are among `tensors`, bit for bit.
    ///
    /// # Errors
    /// When one is missing or not as expected; names it.
    pub fn restore(name: &str, bits: u32, tensors: &Weights) -> Result<Self> {
        let get = |part: &str, length: usize| -> Result<Vec<f64>> {
            let key = format!("{name}.{part}");
            let tensor = tensors.get(&key).with_context(|| format!("the saved state lacks `{key}`"))?;
            ensure!(
                tensor.f_kind()? == Kind::Double && tensor.size() == [length as i64],
                "`{key}` in the saved state is {:?} of shape {:?}, and Double of shape [{length}] is expected",
                tensor.f_kind()?,
                tensor.size()
            );
            Ok(Vec::<f64>::try_from(tensor.f_to_device(Device::Cpu)?)?)
        };
        ensure!(super::BITS.contains(&bits), "parameter {name}: a palette has 1, 2, 3, 4, 6 or 8 bits, not {bits}");
        let centroids = get("centroids", 1 << bits)?;
        let unit = get("kmeans", 2)?;
        Ok(Self { name: name.to_string(), bits, centroids, kmeans_mse: unit[0], power: unit[1] })
    }
}

/// The index of the nearest of `entries` (ascending) for each element of `weight`; of two equally near, the lower.
fn nearest(weight: &Tensor, entries: &[f16]) -> Result<Vec<u8>> {
    let weight = weight.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    let values = slices::floats(&weight)?;
    let entries: Vec<f64> = entries.iter().map(|e| e.to_f64()).collect();
    let (midpoints, firsts) = (midpoints(&entries), first_of_equals(&entries));
    let mut indices = vec![0u8; values.len()];
    let size = piece(values.len());
    let finite = indices
        .par_chunks_mut(size)
        .zip(values.par_chunks(size))
        .map(|(indices, values)| {
            let mut finite = true;
            for (index, &value) in indices.iter_mut().zip(values) {
                finite &= value.is_finite();
                *index = firsts[midpoints.partition_point(|&m| m < value as f64)];
            }
            finite
        })
        .reduce(|| true, |a, b| a && b);
    ensure!(finite, "some of its values are infinite or not numbers");
    Ok(indices)
}
