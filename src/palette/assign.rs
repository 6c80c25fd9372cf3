//! The hard assignment of a layer's weights to the entries of its palette.

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::cells::Frame;
use super::{first_of_equals, midpoints, piece};
use crate::torch::slices;

/// The index of the nearest of `entries` (`[K, D]`) for each vector of `row`, whose numbers are `inner` apart.
pub fn nearest_vectors<const D: usize>(row: &Tensor, inner: usize, entries: &[f64]) -> Result<Vec<u8>> {
    let origins = entries.chunks_exact(D).map(|entry| std::array::from_fn(|d| entry[d])).collect();
    // SAFETY: the nearest are found in plain Rust: no operator runs meanwhile.
    let values = unsafe { slices::elements::<f32>(row) }?;
    let labels = Frame::<D> { inner, scale: 1.0, origins }.labels(&values);
    labels.context("some of its values are infinite or not numbers")
}

/// The index of the nearest of `entries` (ascending) for each element of `weight`; of two equally near, the lower.
pub fn nearest(weight: &Tensor, entries: &[f64]) -> Result<Vec<u8>> {
    let weight = weight.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    // SAFETY: as in `nearest_vectors`.
    let values = unsafe { slices::elements::<f32>(&weight) }?;
    let (midpoints, firsts) = (midpoints(entries), first_of_equals(entries));
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
