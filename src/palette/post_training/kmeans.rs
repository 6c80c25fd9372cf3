//! The nearest table of numbers to f16 values: exact one-dimensional k-means.

use anyhow::{Result, ensure};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::bins::Bins;
pub use super::intervals::means;
use crate::palette::scalar::CODES;
use crate::palette::{Histogram, Palette};
use crate::torch::slices::piece;

/// A palette and how near it is.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Of one table, entries ascend; where there are fewer distinct values than entries the largest is repeated.
    pub palette: Palette,
    /// Mean squared error of the palette, entries rounded to f16.
    pub error: f64,
    /// Mean square of the values.
    pub power: f64,
}

/// The palette of 2^`bits` entries that is nearest to `values` (row-major, of `shape`).
///
/// # Errors
/// When a value is infinite or not a number, or the arguments do not fit each other.
pub fn fit(values: &[f16], shape: &[i64], bits: u32) -> Result<Fit> {
    let histogram = Histogram::of_halves(values)?;
    let entries = entries(&histogram, bits);
    with_entries(values, shape, bits, &histogram, entries)
}

/// The palette of 2^`bits` entries with the least sum of `importance · (value − entry)²`: the importance of each value is
/// finite and not negative; where all are 0, all are alike. [`Fit::error`] is the plain mean squared error.
///
/// # Errors
/// As [`fit`], and for an importance that is none.
pub fn fit_weighted(values: &[f16], importance: &[f32], shape: &[i64], bits: u32) -> Result<Fit> {
    ensure!(importance.len() == values.len(), "{} values have {} importances", values.len(), importance.len());
    let bad = importance.iter().filter(|importance| !(importance.is_finite() && **importance >= 0.0)).count();
    ensure!(bad == 0, "{bad} importances are negative, infinite or not numbers");
    let histogram = Histogram::of_halves(values)?;
    let mut by_code = vec![0f64; CODES];
    for (value, &importance) in values.iter().zip(importance) {
        by_code[value.to_bits() as usize] += f64::from(importance);
    }
    // A value that nothing depends on pulls no entry; it takes the nearest.
    let important = histogram.bins.iter().zip(histogram.values()).map(|(&bin, value)| (value, by_code[bin as usize]));
    let (values_of, weights): (Vec<f64>, Vec<f64>) = important.filter(|(_, weight)| *weight > 0.0).unzip();
    let entries = match values_of.is_empty() {
        true => entries(&histogram, bits),
        false => halves(Bins { values: values_of, weights }.entries(1 << bits)),
    };
    with_entries(values, shape, bits, &histogram, entries)
}

fn with_entries(values: &[f16], shape: &[i64], bits: u32, histogram: &Histogram, entries: Vec<f16>) -> Result<Fit> {
    let wide: Vec<f64> = entries.iter().map(|e| e.to_f64()).collect();
    let (error, power) = (histogram.error(&wide), histogram.error(&[0.0]));
    let indices = nearest(values, histogram, &wide);
    Ok(Fit { palette: Palette::new(bits, shape.to_vec(), indices, entries)?, error, power })
}

/// The best table of 2^`bits` entries for `values`, and the index of each value in it.
///
/// # Errors
/// When a value is infinite or not a number.
pub fn table(values: &[f16], bits: u32) -> Result<(Vec<f16>, Vec<u8>)> {
    let histogram = Histogram::of_halves(values)?;
    let entries = entries(&histogram, bits);
    let wide: Vec<f64> = entries.iter().map(|e| e.to_f64()).collect();
    let indices = nearest(values, &histogram, &wide);
    Ok((entries, indices))
}

/// The 2^`bits` entries of the best table, ascending, rounded to f16.
pub fn entries(histogram: &Histogram, bits: u32) -> Vec<f16> {
    halves(Bins::from(histogram).entries(1 << bits))
}

fn halves(entries: Vec<f64>) -> Vec<f16> {
    entries.into_iter().map(f16::from_f64).collect()
}

/// The index of the nearest of `entries` (ascending) for each of `values`, which `histogram` is of.
fn nearest(values: &[f16], histogram: &Histogram, entries: &[f64]) -> Vec<u8> {
    let table = Bins::from(histogram).nearest(entries);
    let codes: &[u16] = values.reinterpret_cast();
    let mut indices = vec![0u8; codes.len()];
    let size = piece(codes.len());
    indices.par_chunks_mut(size).zip(codes.par_chunks(size)).for_each(|(indices, codes)| {
        indices.iter_mut().zip(codes).for_each(|(index, &code)| *index = table[code as usize]);
    });
    indices
}
