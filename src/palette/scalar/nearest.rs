//! Which of a few entries is nearest to a number.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::torch::slices::{self, piece};

/// Between each entry (ascending) and the next. The nearest entry to a value is that at the number of midpoints below
/// it; of two equally near, the lower.
pub fn midpoints(entries: &[f64]) -> Vec<f64> {
    entries.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect()
}

/// For each entry (ascending) the index of the first that equals it, so that of equal entries one only is used.
pub fn first_of_equals(entries: &[f64]) -> Vec<u8> {
    entries.iter().map(|entry| entries.partition_point(|e| e < entry) as u8).collect()
}

/// The index of the nearest of `entries` (ascending) for each element of `weight`; of two equally near, the lower.
pub fn nearest(weight: &Tensor, entries: &[f64]) -> Result<Vec<u8>> {
    let weight = weight.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    // SAFETY: the nearest are found in plain Rust: no operator runs meanwhile.
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
