//! Differentiable k-means of a weight tensor, with one table of numbers.
//!
//! A master weight w becomes a soft weight ŵ with [`soften`]; the network runs on ŵ as a leaf, and
//! [`Soften::backward`] turns ∂L/∂ŵ into ∂L/∂w. Both take a few passes over the weights ([`super::codes`]) around a
//! clustering of their bins ([`super::clustering`]): time and memory do not grow with weights × entries.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::clustering::{Clustering, Lines};
use super::code::Code;
use super::codes;
use super::histogram::Histogram;

/// What the backward pass of one [`soften`] needs: the weight itself (shared, not copied) and the clustering.
#[derive(Debug)]
pub struct Soften {
    weight: Tensor,
    clustering: Clustering,
}

/// Writes the soft weight of `weight` (f32 or bf16, any shape, any device) to `soft` (contiguous, of the same type, shape
/// and device), for `centroids` at the temperature `tau`; returns the centroids after `iterations` updates, and what the
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
    let histogram = Histogram::of(&weight, code, false)?;
    soften_counted(weight, histogram, centroids, tau, iterations, soft)
}

/// [`soften`] of a `weight` whose `histogram` is known.
pub fn soften_counted(
    weight: Tensor,
    histogram: Histogram,
    centroids: &[f64],
    tau: f64,
    iterations: usize,
    soft: &mut Tensor,
) -> Result<(Vec<f64>, Soften)> {
    let clustering = Clustering::cluster(histogram, centroids, tau, iterations)?;
    codes::look_up(&weight, clustering.histogram(), &clustering.soft_values(), soft)?;
    Ok((clustering.entries(), Soften { weight, clustering }))
}

/// Whether `other` has the type, shape and device of `weight`, which is one that can be softened.
pub fn check(weight: &Tensor, other: &Tensor) -> Result<()> {
    let kind = weight.f_kind()?;
    ensure!(matches!(kind, Kind::Float | Kind::BFloat16), "a weight to soften is Float or BFloat16, not {kind:?}");
    ensure!(
        other.f_kind()? == kind
            && other.size() == weight.size()
            && other.device() == weight.device()
            && other.is_contiguous(),
        "a soft weight or gradient ({other:?}) does not fit its weight ({weight:?})"
    );
    Ok(())
}

impl Soften {
    /// Turns `gradient` from ∂L/∂ŵ into ∂L/∂w, in place: contiguous, of the weight's type and shape, on its device.
    ///
    /// # Errors
    /// When `gradient` has another shape or type, or is on another device.
    pub fn backward(&self, gradient: &mut Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let (lines, _) = self.lines::<1>(gradient)?;
        codes::combine(&self.weight, self.clustering.histogram(), &lines, gradient)
    }

    /// What makes ∂L/∂w of `gradient`, ∂L/∂ŵ; and the sums over each bin of the first N powers of that.
    ///
    /// # Errors
    /// As [`Self::backward`].
    pub fn lines<const N: usize>(&self, gradient: &Tensor) -> Result<(Lines, Vec<[f64; N]>)>
    where
        [f32; N]: Default,
    {
        check(&self.weight, gradient)?;
        let sums = codes::add_up::<N>(&self.weight, gradient, self.clustering.histogram())?;
        let upstream: Vec<f64> = sums.iter().map(|sum| sum[0]).collect();
        Ok((self.clustering.backward(&upstream), sums))
    }

    /// The histogram of the weight.
    pub fn into_histogram(self) -> Histogram {
        self.clustering.into_histogram()
    }

    /// Mean squared error of the weights if palettes were made of the new centroids now.
    pub fn hard_error(&self) -> f64 {
        self.clustering.hard_error()
    }
}
