//! Weighted numbers and their one-dimensional k-means: those of a [`Histogram`], or numbers over a scale.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use rayon::prelude::*;

use super::intervals;
use crate::palette::Histogram;
use crate::palette::scalar::{CODES, ascending_halves, first_of_equals, midpoints};

/// Numbers that are converted and compared at a time.
const BLOCK: usize = 256;
/// Parts into which the numbers of a table are split, for threads.
const PARTS: usize = 8;

/// Distinct numbers, ascending, each with the weight of all that are equal to it.
#[derive(Debug, Default)]
pub struct Bins {
    pub values: Vec<f64>,
    pub weights: Vec<f64>,
}

impl From<&Histogram> for Bins {
    fn from(histogram: &Histogram) -> Self {
        Self { values: histogram.values(), weights: histogram.counts.iter().map(|&n| f64::from(n)).collect() }
    }
}

impl Bins {
    /// Of `values` over the scale of their block, with the squared scale as weight; and the f16 code of each. Blocks have
    /// `length` values.
    pub fn of_scaled(values: &[f32], length: usize, scales: &[f64]) -> (Vec<u16>, Self) {
        let mut codes = vec![0u16; values.len()];
        let blocks = scales.len().div_ceil(PARTS).max((1 << 18) / length.max(1)).max(1);
        let parts: Vec<Vec<f64>> = values
            .par_chunks(blocks * length)
            .zip(codes.par_chunks_mut(blocks * length))
            .zip(scales.par_chunks(blocks))
            .map(|((values, codes), scales)| {
                let mut table = vec![0f64; CODES];
                let mut scaled = [0f32; BLOCK];
                for ((values, codes), &scale) in values.chunks(length).zip(codes.chunks_mut(length)).zip(scales) {
                    let (inverse, weight) = ((1.0 / scale) as f32, scale * scale);
                    for (values, codes) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)) {
                        let scaled = &mut scaled[..values.len()];
                        let limit = f16::MAX.to_f32();
                        scaled.iter_mut().zip(values).for_each(|(x, v)| *x = (v * inverse).clamp(-limit, limit));
                        codes.reinterpret_cast_mut::<f16>().convert_from_f32_slice(scaled);
                        codes.iter().for_each(|&code| table[code as usize] += weight);
                    }
                }
                table
            })
            .collect();
        let mut bins = Self::default();
        for code in ascending_halves() {
            let weight: f64 = parts.iter().map(|table| table[code as usize]).sum();
            if weight > 0.0 {
                bins.values.push(f16::from_bits(code).to_f64());
                bins.weights.push(weight);
            }
        }
        (codes, bins)
    }

    /// The `count` numbers that are nearest to these by weighted squared error, ascending; where there are fewer
    /// distinct ones, the largest repeated.
    pub fn entries(&self, count: usize) -> Vec<f64> {
        let mut entries = intervals::means(&self.values, &self.weights, count);
        entries.resize(count, entries.last().copied().unwrap_or(0.0));
        entries
    }

    /// By code, which of `entries` (ascending) is nearest to the value; for codes that do not occur, any.
    pub fn nearest(&self, entries: &[f64]) -> Vec<u8> {
        let mut table = vec![0; CODES];
        self.walk(entries, |bin, place| table[f16::from_f64(self.values[bin]).to_bits() as usize] = place as u8);
        table
    }

    /// Weight of the members of each of `entries` (ascending), and sum of weight × value.
    pub fn members(&self, entries: &[f64]) -> Vec<(f64, f64)> {
        let mut members = vec![(0.0, 0.0); entries.len()];
        self.walk(entries, |bin, place| {
            let (weight, sum) = &mut members[place];
            *weight += self.weights[bin];
            *sum += self.weights[bin] * self.values[bin];
        });
        members
    }

    /// Calls `each` with every bin and the place of its nearest entry; of equal entries, that of the first.
    fn walk(&self, entries: &[f64], mut each: impl FnMut(usize, usize)) {
        let (middles, firsts) = (midpoints(entries), first_of_equals(entries));
        let mut near = 0;
        for (bin, &value) in self.values.iter().enumerate() {
            while near < middles.len() && middles[near] < value {
                near += 1;
            }
            each(bin, firsts[near] as usize);
        }
    }
}

/// For each of `values` which of `entries` (ascending) is nearest; of equals the first.
pub fn places(values: &[f16], entries: &[f16], places: &mut [u8]) {
    let wide: Vec<f64> = entries.iter().map(|e| e.to_f64()).collect();
    // Halfway between two numbers of f16, in f32: exact.
    let middles: Vec<f32> = midpoints(&wide).into_iter().map(|middle| middle as f32).collect();
    let firsts = first_of_equals(&wide);
    let size = values.len().div_ceil(PARTS).max(1 << 18);
    values.par_chunks(size).zip(places.par_chunks_mut(size)).for_each(|(values, places)| {
        let mut wide = [0f32; BLOCK];
        for (values, places) in values.chunks(BLOCK).zip(places.chunks_mut(BLOCK)) {
            let wide = &mut wide[..values.len()];
            values.convert_to_f32_slice(wide);
            if middles.len() < 64 {
                // All at once, without branches: the compiler makes vectors of it.
                let mut below = [0u32; BLOCK];
                for middle in &middles {
                    below.iter_mut().zip(wide.iter()).for_each(|(below, value)| *below += u32::from(middle < value));
                }
                places.iter_mut().zip(below).for_each(|(place, below)| *place = firsts[below as usize]);
            } else {
                let below = |value: &f32| middles.partition_point(|middle| middle < value);
                places.iter_mut().zip(wide.iter()).for_each(|(place, value)| *place = firsts[below(value)]);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_numbers_weigh_the_square_of_their_scale() {
        let code = |i: u32| (i * 40_503 % 0x7C00) as u16 | (i as u16 & 1) << 15;
        let values: Vec<f16> = (0..20_000).map(|i| f16::from_bits(code(i))).collect();
        let counted = Bins::from(&Histogram::of_halves(&values).unwrap());
        let mut wide = vec![0f32; values.len()];
        values.convert_to_f32_slice(&mut wide);
        let (codes, scaled) = Bins::of_scaled(&wide, 10_000, &[1.0, 1.0]);
        assert_eq!((&scaled.values, &scaled.weights), (&counted.values, &counted.weights));
        assert!(codes.iter().zip(&values).all(|(&code, value)| code == value.to_bits()));
        // Twice the scale is half the value, at four times the weight.
        let (_, scaled) = Bins::of_scaled(&[4.0, 3.0, 3.0, -6.0], 2, &[1.0, 2.0]);
        assert_eq!((scaled.values, scaled.weights), (vec![-3.0, 1.5, 3.0, 4.0], vec![4.0, 4.0, 1.0, 1.0]));
    }

    /// 0 and -0 are two codes of one value, of which weights may have either alone.
    #[test]
    fn minus_zero_has_the_nearest_entry() {
        let entries = [-1.0, 0.0, 1.0];
        for zero in [0.0, -0.0] {
            let values = [-1.0, zero, 1.0].map(f16::from_f64);
            let table = Bins::from(&Histogram::of_halves(&values).unwrap()).nearest(&entries);
            assert_eq!(values.map(|value| table[value.to_bits() as usize]), [0, 1, 2], "{zero:?}");
        }
    }

    #[test]
    fn the_nearest_entry_is_found_by_code_and_by_value() {
        let values: Vec<f16> = (0..3000).map(|i| f16::from_f32((i as f32 * 0.7).sin())).collect();
        let bins = Bins::from(&Histogram::of_halves(&values).unwrap());
        for count in [1, 4, 16, 256] {
            let entries = bins.entries(count);
            let members = bins.members(&entries);
            let mean = |(weight, sum): (f64, f64)| sum / weight;
            assert!(members.iter().zip(&entries).all(|(&m, e)| (mean(m) - e).abs() < 1e-9));
            let rounded: Vec<f16> = entries.iter().map(|&e| f16::from_f64(e)).collect();
            let wide: Vec<f64> = rounded.iter().map(|e| e.to_f64()).collect();
            let (by_code, mut by_value) = (bins.nearest(&wide), vec![0; values.len()]);
            places(&values, &rounded, &mut by_value);
            assert!(values.iter().zip(&by_value).all(|(value, &place)| by_code[value.to_bits() as usize] == place));
            let away = |value: &f16, entry: &f64| (value.to_f64() - entry).abs();
            assert!(
                values
                    .iter()
                    .zip(&by_value)
                    .all(|(v, &place)| { wide.iter().all(|e| away(v, &wide[place as usize]) <= away(v, e)) })
            );
        }
    }
}
