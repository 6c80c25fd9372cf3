//! Tables whose entries are multiplied by scales: one an output channel, or one a table of 8-bit integers.
//!
//! The weights w of a block b (a channel, or the whole group) are looked up as s_b · e_j, and s and e are sought that
//! make Σ_b Σ_i (w_i − s_b e_j(i))² least. In turn: with s fixed, that is the k-means of w / s with weights s²; with
//! assignments fixed, s_b = Σ w e / Σ e². Both lower the error, so it converges, to a place that depends on where scales
//! start. They start from power means of their block: from its root mean square, which suits few bits and heavy tails,
//! up to its largest weight, which suits many bits (and is all that coremltools knows). The best goes on.

use anyhow::Result;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::bins::{Bins, places};
use super::group::{Group, SMALLEST, finite, integers, stored_unit, whole};
use crate::palette::{Form, Histogram, LutDtype};

/// Powers of the means that scales start from; and one scale for all, with which they are no worse than none.
const STARTS: [Option<f64>; 4] = [Some(2.0), Some(4.0), Some(f64::INFINITY), None];
/// Rounds of fitting entries and scales in turn: of each start, and of the best; and the part of the error by which a
/// round must lower it.
const FIRST_ROUNDS: usize = 1;
const ROUNDS: usize = 6;
const TOLERANCE: f64 = 1e-4;
/// Entries up to which every round finds the best ones; beyond, it moves those of the last round to their means.
const EXACT: usize = 16;
/// The smallest that has all 11 bits.
const NORMAL: f64 = 1.0 / (1 << 14) as f64;
/// Where all scales are below, they share their smallness with the entries.
const SMALL_SCALES: f64 = 1.0 / (1 << 11) as f64;

/// The table of a group of `values` that are `blocks` equal blocks with a scale each.
///
/// # Errors
/// When a value is infinite or not a number.
pub(super) fn scaled(values: &[f16], blocks: usize, form: &Form) -> Result<Group> {
    if blocks == 1 {
        return integral(values, form.bits);
    }
    let mut wide = vec![0f32; values.len()];
    values.convert_to_f32_slice(&mut wide);
    let starts = STARTS.iter().map(|&power| {
        let mut start = Alternation::new(&wide, blocks, power);
        start.run(form, FIRST_ROUNDS);
        start
    });
    let best = starts.min_by(|a, b| a.error.total_cmp(&b.error));
    let Some(mut best) = best else { return Ok(Group::default()) };
    best.run(form, ROUNDS);
    if form.lut_dtype == LutDtype::F16 {
        best.share_smallness();
    }
    let entries: Vec<f16> = best.entries.iter().map(|&entry| finite(entry)).collect();
    let scales: Vec<f16> = best.scales.iter().map(|&scale| in_range(scale, &entries)).collect();
    let mut indices = vec![0; values.len()];
    let length = best.length;
    values
        .par_chunks(length)
        .zip(indices.par_chunks_mut(length))
        .zip(&scales)
        .for_each(|((values, indices), &scale)| look_up(values, &entries, scale, indices));
    Ok(Group { entries, scales, indices })
}

/// One table of integers with one scale.
fn integral(values: &[f16], bits: u32) -> Result<Group> {
    let bins = Bins::from(&Histogram::of_halves(values)?);
    let mut entries = bins.entries(1 << bits);
    let unit = wholes(&bins, &mut entries, SMALLEST, stored_unit);
    let entries: Vec<f16> = entries.into_iter().map(f16::from_f64).collect();
    let unit = in_range(unit, &entries);
    let mut indices = vec![0; values.len()];
    look_up(values, &entries, unit, &mut indices);
    Ok(Group { entries, scales: vec![unit], indices })
}

/// Assigns each weight to the nearest of the products, as they are rounded.
fn look_up(values: &[f16], entries: &[f16], scale: f16, indices: &mut [u8]) {
    let table: Vec<f16> = entries.iter().map(|e| f16::from_f32(e.to_f32() * scale.to_f32())).collect();
    places(values, &table, indices);
}

/// A table and scales, on their way.
struct Alternation<'v> {
    values: &'v [f32],
    /// Of a block.
    length: usize,
    /// Ascending; integers from -127 to 127 where the form wants them.
    entries: Vec<f64>,
    scales: Vec<f64>,
    error: f64,
}

impl<'v> Alternation<'v> {
    fn new(values: &'v [f32], blocks: usize, power: Option<f64>) -> Self {
        let length = (values.len() / blocks).max(1);
        let mut scales: Vec<f64> = match power {
            Some(power) => values.par_chunks(length).map(|values| power_mean(values, power)).collect(),
            None => vec![power_mean(values, 2.0); blocks],
        };
        scales.resize(blocks, 1.0);
        Self { values, length, entries: Vec::new(), scales, error: f64::INFINITY }
    }

    /// Fits entries and scales in turn, until that no longer helps.
    fn run(&mut self, form: &Form, rounds: usize) {
        let count = 1usize << form.bits;
        for _ in 0..rounds {
            let (codes, bins) = Bins::of_scaled(self.values, self.length, &self.scales);
            let (mut entries, mut scales) = (self.entries.clone(), self.scales.clone());
            if entries.is_empty() || count <= EXACT {
                entries = bins.entries(count);
            } else {
                move_to_means(&bins, &mut entries);
            }
            // What each code of w / s is looked up as.
            let mut table = bins.nearest(&entries);
            if form.lut_dtype == LutDtype::I8 {
                // Scales in this unit are to be numbers of f16, the largest at least.
                let largest = scales.iter().copied().fold(0.0, f64::max);
                let reach = largest * entries.iter().fold(0.0, |most: f64, entry| most.max(entry.abs()));
                let unit = wholes(&bins, &mut entries, least_scale(reach) / largest, |unit| unit);
                scales.iter_mut().for_each(|scale| *scale *= unit);
                let products: Vec<f64> = entries.iter().map(|entry| entry * unit).collect();
                table = bins.nearest(&products);
            }
            let table: Vec<f32> = table.into_iter().map(|place| entries[place as usize] as f32).collect();
            let blocks = self.values.par_chunks(self.length).zip(codes.par_chunks(self.length));
            let errors: Vec<f64> = blocks
                .zip(scales.par_iter_mut())
                .map(|((values, codes), scale)| best_scale(values, codes, &table, scale))
                .collect();
            let error: f64 = errors.iter().sum();
            let helped = error < self.error * (1.0 - TOLERANCE);
            if error < self.error {
                (self.entries, self.scales, self.error) = (entries, scales, error);
            }
            if !helped {
                break;
            }
        }
    }

    /// Moves a power of two from scales that f16 would hold with few bits to entries, so that neither is that small.
    fn share_smallness(&mut self) {
        let largest = self.scales.iter().copied().fold(0.0, f64::max);
        if largest < SMALL_SCALES {
            let factor = (largest.max(SMALLEST).log2() / 2.0).round().exp2();
            self.scales.iter_mut().for_each(|scale| *scale /= factor);
            self.entries.iter_mut().for_each(|entry| *entry *= factor);
        }
    }
}

/// The least scale of integers for weights up to `reach`: where f16 has few bits for scales so small, what rounding them
/// loses is to be no more than what rounding entries loses.
fn least_scale(reach: f64) -> f64 {
    // Below that integers reach as far as f16's smallest numbers do.
    let few = (127.0 * SMALLEST..127.0 * NORMAL).contains(&reach);
    if few { (SMALLEST * reach).sqrt().min(NORMAL) } else { SMALLEST }
}

/// (mean of |w|^power)^(1/power). For a block of zeros, of which any entry makes nearly zeros then, and which takes no part
/// in what the others' entries are, the smallest.
fn power_mean(values: &[f32], power: f64) -> f64 {
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    if largest == 0.0 {
        return SMALLEST;
    }
    let mean =
        |part: fn(f32) -> f32| values.iter().map(|v| f64::from(part(v / largest))).sum::<f64>() / values.len() as f64;
    f64::from(largest)
        * match power {
            2.0 => mean(|part| part * part).sqrt(),
            4.0 => mean(|part| part.powi(4)).sqrt().sqrt(),
            _ => 1.0,
        }
}

/// A scale as it is stored: not 0, and so that no entry times it is infinite.
fn in_range(scale: f64, entries: &[f16]) -> f16 {
    let largest = entries.iter().map(|e| e.to_f32().abs()).fold(0.0, f32::max);
    let mut scale = finite(scale).max(f16::from_bits(1));
    while !f16::from_f32(largest * scale.to_f32()).is_finite() {
        scale = f16::from_bits(scale.to_bits() - 1);
    }
    scale
}

/// One of Lloyd's iterations.
fn move_to_means(bins: &Bins, entries: &mut [f64]) {
    let members = bins.members(entries);
    for (entry, (weight, sum)) in entries.iter_mut().zip(members) {
        if weight > 0.0 {
            *entry = sum / weight;
        }
    }
    entries.sort_by(f64::total_cmp);
}

/// Makes `scale` the best one for what the `codes` of the values look up in `table`; returns the squared error that is
/// left.
fn best_scale(values: &[f32], codes: &[u16], table: &[f32], scale: &mut f64) -> f64 {
    let (mut ww, mut we, mut ee) = (0.0, 0.0, 0.0);
    for (values, codes) in values.chunks(64).zip(codes.chunks(64)) {
        let mut sums = [0f32; 3];
        for (&value, &code) in values.iter().zip(codes) {
            let entry = table[code as usize];
            sums[0] += value * value;
            sums[1] += value * entry;
            sums[2] += entry * entry;
        }
        (ww, we, ee) = (ww + f64::from(sums[0]), we + f64::from(sums[1]), ee + f64::from(sums[2]));
    }
    if we > 0.0 && ee > 0.0 {
        *scale = we / ee;
    }
    (ww - 2.0 * *scale * we + *scale * *scale * ee).max(0.0)
}

/// Rounds `entries` (ascending) to integers of 8 bits in the unit that is best for them and not below `least`, of those that
/// `stored` makes of any, and moves these to where the members of each want them. Returns the unit.
fn wholes(bins: &Bins, entries: &mut [f64], least: f64, stored: impl Fn(f64) -> f64) -> f64 {
    let weights: Vec<f64> = bins.members(entries).into_iter().map(|(weight, _)| weight).collect();
    let unit = integers(entries, &weights, least, stored);
    let round = |value: f64| whole(value, unit);
    entries.iter_mut().for_each(|entry| *entry = round(*entry));
    for _ in 0..4 {
        let table: Vec<f64> = entries.iter().map(|e| e * unit).collect();
        let before = entries.to_vec();
        for (entry, (weight, sum)) in entries.iter_mut().zip(bins.members(&table)) {
            if weight > 0.0 {
                *entry = round(sum / weight);
            }
        }
        entries.sort_by(f64::total_cmp);
        if before == entries {
            break;
        }
    }
    unit
}
