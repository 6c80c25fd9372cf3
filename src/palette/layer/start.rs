//! Where the palette of a layer starts before it is trained: entries, scales of channels, and how far entries are apart.

use anyhow::{Result, ensure};
use half::f16;
use tch::{Device, Kind, Tensor};

use crate::palette::{Form, LutDtype, Palette, fit};
use crate::torch::slices;

/// The best palette without training, its entries in f16.
pub fn best(weight: &Tensor, form: Form) -> Result<Palette> {
    let halves = weight.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
    // SAFETY: k-means is plain Rust: no operator runs meanwhile.
    let values = unsafe { slices::elements(&halves) }?;
    Ok(fit(&values, &weight.size(), &Form { lut_dtype: LutDtype::F16, ..form })?.palette)
}

/// Scales of channels, of which the best are to be found by trying: those of the best palette, and one for all, with which
/// scales are at least no worse than none.
pub fn scales_to_try(weight: &Tensor, form: Form) -> Result<[Vec<f64>; 2]> {
    let scales = at_least_a_part(best(weight, form)?.scales.iter().map(|scale| scale.to_f64()).collect());
    let power = weight.f_square()?.f_mean(Kind::Double)?.f_double_value(&[])?;
    // A power of two: entries lose nothing.
    let one = if power > 0.0 { (power.sqrt().log2() / 2.0).round().exp2() } else { 1.0 };
    let one = vec![f16::from_f64(one).to_f64(); scales.len()];
    Ok([scales, one])
}

/// Scales of channels, those of nearly dead ones raised to a 16th of the median, and a 1024th of the largest: the gradient through the entries that all
/// channels share is divided by a channel's scale, and would be all that there is in one of zeros.
fn at_least_a_part(mut scales: Vec<f64>) -> Vec<f64> {
    /// What a channel of zeros has is the smallest number of f16; the next one.
    const LEAST: f64 = 2.0 / (1 << 24) as f64;
    let mut alive: Vec<f64> = scales.iter().copied().filter(|&scale| scale >= LEAST).collect();
    alive.sort_by(f64::total_cmp);
    let (median, largest) = (alive.get(alive.len() / 2), alive.last());
    let least = median.zip(largest).map(|(median, largest)| (median / 16.0).max(largest / 1024.0));
    let least = least.map_or(1.0, |least| f16::from_f64(least).to_f64().max(LEAST));
    scales.iter_mut().for_each(|scale| *scale = scale.max(least));
    scales
}

/// The median of the squared distances from each of `entries` (`[K, dim]`) to the nearest that differs; 0 where none does.
pub fn spacing_of(entries: &[f64], dim: usize) -> f64 {
    let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let mut distinct: Vec<&[f64]> = entries.chunks(dim).collect();
    distinct.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    distinct.dedup();
    let nearest = |(place, entry): (usize, &&[f64])| {
        let others = distinct.iter().enumerate().filter(|(other, _)| *other != place);
        others.map(|(_, other)| square(entry, other)).min_by(f64::total_cmp)
    };
    let mut nearest: Vec<f64> = distinct.iter().enumerate().filter_map(nearest).collect();
    nearest.sort_by(f64::total_cmp);
    nearest.get(nearest.len() / 2).copied().unwrap_or(0.0)
}

/// The points of a row, whose numbers are `inner` apart, `dim` each; numbers ascending.
///
/// # Errors
/// When one is not finite, or beyond the range of f16.
pub fn points_of(row: &Tensor, inner: usize, dim: usize) -> Result<Vec<f64>> {
    let row = row.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_contiguous()?;
    let mut values = Vec::<f64>::try_from(&row.f_view(-1)?)?;
    ensure!(values.iter().all(|value| value.is_finite()), "some of its values are infinite or not numbers");
    let bad = values.iter().filter(|value| !f16::from_f64(**value).is_finite()).count();
    ensure!(bad == 0, "{bad} of its values are beyond the range of f16");
    if dim == 1 {
        values.sort_by(f64::total_cmp);
        return Ok(values);
    }
    let blocks = values.chunks_exact(dim * inner);
    Ok(blocks.flat_map(|block| (0..inner).flat_map(move |i| (0..dim).map(move |d| block[d * inner + i]))).collect())
}
