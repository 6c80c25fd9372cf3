//! Differentiable k-means of a weight whose palette holds vectors: [`soften`](fn@crate::palette::soften) for entries of D weights.
//!
//! On the CPU points are sorted into cells ([`super::cells`]), forward and again backward: in between only each point's
//! cell is kept, a byte. Elsewhere libtorch's operators compute the same (`operators`).

use anyhow::{Context, Result, ensure};
use tch::{Device, Tensor};

use super::cells::{Frame, Sorted, Vector};
use super::clustering::Clustering;
use super::operators::Operators;
use super::passes::Points;
use crate::torch::slices;

/// What the backward pass needs: the weight itself (shared, not copied), the cells of its points, and the clustering.
#[derive(Debug)]
pub struct SoftenVectors<const D: usize> {
    weight: Tensor,
    frame: Frame<D>,
    tau: f64,
    /// Empty on devices other than the CPU.
    labels: Vec<u8>,
    clustering: Clustering<D>,
}

impl<const D: usize> SoftenVectors<D> {
    /// Writes the soft weight of `weight` (contiguous f32) to `soft` (the same shape and device), for `centroids`
    /// (`[K, D]`) at the temperature `tau`; returns the centroids after `iterations` updates too. The numbers of a point
    /// are `inner` weights apart, and `inner` points follow each other.
    ///
    /// # Errors
    /// When a weight is not finite; when an argument is out of its range.
    pub fn new(
        weight: Tensor,
        inner: usize,
        centroids: &[f64],
        tau: f64,
        iterations: usize,
        soft: &mut Tensor,
    ) -> Result<(Vec<f64>, Self)> {
        ensure!(centroids.iter().all(|c| c.is_finite()), "an entry of the palette is not a finite number");
        ensure!(tau > 0.0 && tau.is_finite(), "the temperature must be positive: {tau}");
        let origins: Vec<Vector<D>> = centroids.chunks_exact(D).map(|c| std::array::from_fn(|d| c[d])).collect();
        ensure!(
            inner > 0 && weight.numel().is_multiple_of(D * inner),
            "{} weights are no vectors of {D}",
            weight.numel()
        );
        let frame = Frame { inner, scale: (std::f64::consts::LOG2_E / tau).sqrt(), origins };
        let (labels, clustering);
        if weight.device() == Device::Cpu {
            // SAFETY: no operator runs while points are sorted and clustered, in plain Rust.
            let values = unsafe { slices::elements::<f32>(&weight) }?;
            labels = frame.labels(&values).context("some of its values are infinite or not numbers")?;
            let mut points = Points { frame: &frame, pieces: frame.sort(&values, &labels) };
            points.pieces.iter_mut().for_each(Sorted::make_room);
            clustering = Clustering::cluster(&mut points, frame.origins.clone(), iterations)?;
            let unit = (1.0 / frame.scale) as f32;
            // SAFETY: as above.
            let mut soft = unsafe { slices::elements_mut::<f32>(soft) }?;
            frame.put_down(&points.pieces, &mut soft, |label, d, value| {
                (frame.origins[label][d] + f64::from(value * unit)) as f32
            });
        } else {
            labels = Vec::new();
            let finite = weight.f_isfinite()?.f_all()?.int64_value(&[]) == 1;
            ensure!(finite, "some of its values are infinite or not numbers");
            let mut points = Operators::new(&weight, inner, tau)?;
            clustering = Clustering::cluster(&mut points, frame.origins.clone(), iterations)?;
            soft.f_copy_(&points.carried()?)?;
        }
        let centroids = clustering.entries().iter().flatten().copied().collect();
        Ok((centroids, Self { weight, frame, tau, labels, clustering }))
    }

    /// Turns `gradient` from ∂L/∂ŵ into ∂L/∂w, in place: contiguous f32 of the weight's shape, on its device.
    ///
    /// # Errors
    /// libtorch's (no memory), or when `gradient` has another kind.
    pub fn backward(&self, gradient: &mut Tensor) -> Result<()> {
        let Self { weight, frame, tau, labels, clustering } = self;
        if weight.device() != Device::Cpu {
            let mut points = Operators::new(weight, frame.inner, *tau)?;
            points.carry(gradient)?;
            clustering.backward(&mut points)?;
            gradient.f_copy_(&points.carried()?)?;
            return Ok(());
        }
        // SAFETY: no operator runs while points are sorted and gradients computed, in plain Rust.
        let (values, mut gradient) =
            unsafe { (slices::elements::<f32>(weight)?, slices::elements_mut::<f32>(gradient)?) };
        let mut points = Points { frame, pieces: frame.sort(&values, labels) };
        ensure!(
            gradient.len() == values.len(),
            "a gradient of {} numbers is none of {} weights",
            gradient.len(),
            values.len()
        );
        frame.carry(&mut points.pieces, &gradient);
        clustering.backward(&mut points)?;
        frame.put_down(&points.pieces, &mut gradient, |_, _, value| value);
        Ok(())
    }

    /// Mean squared error of the weights if palettes were made of the new centroids now.
    pub fn hard_error(&self) -> f64 {
        self.clustering.hard_error / self.weight.numel().max(1) as f64
    }
}

/// The index of the nearest of `entries` (`[K, D]`) for each vector of `row`, whose numbers are `inner` apart.
pub fn nearest_vectors<const D: usize>(row: &Tensor, inner: usize, entries: &[f64]) -> Result<Vec<u8>> {
    let origins = entries.chunks_exact(D).map(|entry| std::array::from_fn(|d| entry[d])).collect();
    // SAFETY: the nearest are found in plain Rust: no operator runs meanwhile.
    let values = unsafe { slices::elements::<f32>(row) }?;
    let labels = Frame::<D> { inner, scale: 1.0, origins }.labels(&values);
    labels.context("some of its values are infinite or not numbers")
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// What other devices compute with operators is what the CPU computes without.
    #[test]
    fn operators_and_kernels_agree() {
        agree::<2>(16, 24, 30);
        agree::<4>(256, 96, 77);
    }

    fn agree<const D: usize>(entries: usize, channels: i64, inner: i64) {
        let float = (Kind::Float, Device::Cpu);
        let wave = |step: f64| (Tensor::arange(channels * inner, float) * step).sin().view([channels, inner]);
        let weight = wave(0.7) * 0.02 + wave(1.3) * 0.01;
        let gradient = wave(2.1);
        let centroids: Vec<f64> = (0..entries * D).map(|i| 0.02 * (i as f64 * 1.7).sin()).collect();
        let mut soft = weight.empty_like();
        let (ours, state) =
            SoftenVectors::<D>::new(weight.shallow_clone(), inner as usize, &centroids, 4e-5, 3, &mut soft).unwrap();

        let mut operators = Operators::<D>::new(&weight, inner as usize, 4e-5).unwrap();
        let start = centroids.chunks_exact(D).map(|c| std::array::from_fn(|d| c[d])).collect();
        let clustering = Clustering::cluster(&mut operators, start, 3).unwrap();
        let near = |a: &Tensor, b: &Tensor| ((a - b).norm() / b.norm()).double_value(&[]);
        assert!(near(&soft, &operators.carried().unwrap()) < 1e-5);
        let theirs: Vec<f64> = clustering.entries().iter().flatten().copied().collect();
        // An entry that no point is near follows logits of −40 and more, of which f32 loses 40 · 2⁻²⁴ on either side: the
        // largest part of this distance, and another one on another processor (1.1e-5 was seen).
        assert!(near(&Tensor::from_slice(&ours), &Tensor::from_slice(&theirs)) < 3e-5);
        let error = clustering.hard_error / (channels * inner) as f64;
        assert!((state.hard_error() / error - 1.0).abs() < 1e-4, "{} is not {error}", state.hard_error());

        let mut through = gradient.copy();
        state.backward(&mut through).unwrap();
        operators.carry(&gradient).unwrap();
        clustering.backward(&mut operators).unwrap();
        let error = near(&through, &operators.carried().unwrap());
        assert!(error < 1e-4, "{error}");
    }
}
