//! Blocks of bins and their attention to a few entries of a palette: the arithmetic under [`super::clustering`].
//!
//! Bins come in blocks of [`LANES`], so that the compiler makes vectors of them, as wide as the caller that this is
//! inlined into may use. Only additions, multiplications and divisions of f64, without fused ones: all widths give the
//! same bits.

use std::ops::Range;

/// Bins in a block.
pub const LANES: usize = super::histogram::BLOCK;

/// Logits further than this below the largest of their row count as minus infinity: e⁻³⁸ is 3e-17.
pub const FLOOR: f64 = 38.0;

/// One number for each bin of a block.
pub type Lanes = [f64; LANES];

/// Consecutive bins that see the same entries of a palette. Lanes past `len` repeat the last bin, with no weights.
pub struct Block<'a> {
    /// The first bin.
    pub start: usize,
    pub len: usize,
    pub values: Lanes,
    pub counts: Lanes,
    pub entries: Range<usize>,
    /// One row for each of `entries`.
    pub attention: &'a mut [Lanes],
}

impl Block<'_> {
    /// Each entry that the block sees, with the attention to it.
    #[inline(always)]
    pub fn seen(&self) -> impl Iterator<Item = (usize, &Lanes)> {
        self.entries.clone().zip(self.attention.iter())
    }

    /// Σ_j a_bj · `of`(j, u_b)
    #[inline(always)]
    pub fn mean(&self, of: impl Fn(usize, f64) -> f64) -> Lanes {
        let mut mean = [0.0; LANES];
        for (j, attention) in self.seen() {
            for lane in 0..LANES {
                mean[lane] += attention[lane] * of(j, self.values[lane]);
            }
        }
        mean
    }

    /// The block's part of a number for each bin; zero in the lanes past its end.
    #[inline(always)]
    pub fn pick(&self, of_bins: &[f64]) -> Lanes {
        let mut lanes = [0.0; LANES];
        lanes[..self.len].copy_from_slice(&of_bins[self.start..self.start + self.len]);
        lanes
    }
}

/// Of all lanes, in a fixed order that vectors can follow.
#[inline(always)]
pub fn sum(lanes: &Lanes) -> f64 {
    let mut sums = [0.0; 8];
    for part in lanes.chunks_exact(8) {
        for lane in 0..8 {
            sums[lane] += part[lane];
        }
    }
    ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))
}

/// a_bj = softmax_j(−(u_b − c_j)² / τ) for the bins `values` and the `entries` of their window, one row of
/// `attention` for each entry. Of the window, `near` is the entry that is nearest to every bin of the block.
#[inline(always)]
pub fn attend(values: &Lanes, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
    let scale = 1.0 / tau;
    let nearest = entries[near];
    let mut norm = [1.0; LANES];
    for (j, (row, &entry)) in attention.iter_mut().zip(entries).enumerate() {
        if j == near {
            continue; // e⁰
        }
        // (u − c_near)² − (u − c_j)² without cancellation.
        let (width, middle) = (nearest - entry, nearest + entry);
        for lane in 0..LANES {
            row[lane] = exp((middle - 2.0 * values[lane]) * width * scale);
            norm[lane] += row[lane];
        }
    }
    for sum in &mut norm {
        *sum = 1.0 / *sum;
    }
    for (j, row) in attention.iter_mut().enumerate().take(entries.len()) {
        for lane in 0..LANES {
            row[lane] = if j == near { norm[lane] } else { row[lane] * norm[lane] };
        }
    }
}

/// [`attend`] for bins that are evenly spaced, `step` apart from `first` on: the attention to an entry, beside that to
/// another, is a geometric progression then, and takes one multiplication a bin rather than an exponential. `near` is the
/// entry that is nearest to the first bin; the others must be [near enough](is_tame).
#[inline(always)]
pub fn attend_evenly(first: f64, step: f64, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
    /// Entries whose exponentials are taken at once.
    const FEW: usize = 4;
    if entries.len() == 1 {
        attention[0] = [1.0; LANES];
        return;
    }
    let scale = 1.0 / tau;
    let nearest = entries[near];
    let mut norm = [0.0; LANES];
    for (entries, rows) in entries.chunks(FEW).zip(attention.chunks_mut(FEW)) {
        // The progressions' first terms, then their ratios.
        let mut powers = [0.0; 2 * FEW];
        for (j, &entry) in entries.iter().enumerate() {
            let width = (nearest - entry) * scale;
            powers[j] = (nearest + entry - 2.0 * first) * width;
            powers[FEW + j] = -2.0 * step * width;
        }
        for power in &mut powers {
            *power = exp(*power);
        }
        for (j, row) in rows.iter_mut().enumerate().take(entries.len()) {
            let mut ratio = powers[FEW + j];
            row[0] = powers[j];
            let mut known = 1;
            while known < LANES {
                let (terms, next) = row.split_at_mut(known);
                for lane in 0..known {
                    next[lane] = terms[lane] * ratio;
                }
                ratio *= ratio;
                known *= 2;
            }
            for lane in 0..LANES {
                norm[lane] += row[lane];
            }
        }
    }
    for sum in &mut norm {
        *sum = 1.0 / *sum;
    }
    for row in attention.iter_mut().take(entries.len()) {
        for lane in 0..LANES {
            row[lane] *= norm[lane];
        }
    }
}

/// Whether the progressions of [`attend_evenly`] stay within what floats can hold, for entries at most `furthest` from the
/// one that is nearest to the first bin.
#[inline]
pub fn is_tame(step: f64, furthest: f64, tau: f64) -> bool {
    // So much an exponent changes from the first bin to the last.
    2.0 * LANES as f64 * step * furthest / tau < 600.0
}

/// eˣ to 5e-16; below −700 as at −700, and not for x > 700.
///
/// x = k·ln 2 + r with |r| ≤ ln 2 / 2, and the series of eʳ up to r¹³/13!, whose next term is 4e-18.
#[inline(always)]
fn exp(x: f64) -> f64 {
    /// Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f64 = 6755399441055744.0; // 1.5 · 2⁵²
    /// 1/n!
    const SERIES: [f64; 14] = [
        1.0,
        1.0,
        1.0 / 2.0,
        1.0 / 6.0,
        1.0 / 24.0,
        1.0 / 120.0,
        1.0 / 720.0,
        1.0 / 5040.0,
        1.0 / 40320.0,
        1.0 / 362880.0,
        1.0 / 3628800.0,
        1.0 / 39916800.0,
        1.0 / 479001600.0,
        1.0 / 6227020800.0,
    ];
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8; // its last bits are zero: k · LN_2_HIGH is exact
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let x = if x < -700.0 { -700.0 } else { x };
    let rounded = x * std::f64::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    // Pairs, then pairs of pairs (Estrin): few steps wait for another.
    let pair = |n: usize| SERIES[n] + SERIES[n + 1] * r;
    let r2 = r * r;
    let r4 = r2 * r2;
    let low = (pair(0) + pair(2) * r2) + (pair(4) + pair(6) * r2) * r4;
    let high = (pair(8) + pair(10) * r2) + pair(12) * r4;
    let series = low + high * (r4 * r4);
    // 2ᵏ by its exponent bits.
    let power = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1023 << 52));
    series * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_standard_librarys() {
        for i in 0..200_000 {
            let x = -(i as f64) * 0.00351 + 1e-9;
            let (ours, theirs) = (exp(x), x.max(-700.0).exp());
            assert!((ours - theirs).abs() <= 5e-16 * theirs, "e^{x}: {ours:e}, {theirs:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e6), exp(-700.0));
    }

    #[test]
    fn progressions_are_the_softmax() {
        let entries = [-0.3, 0.1, 0.1, 0.48, 1.2];
        for (step, tau) in [(0.002, 0.05), (0.02, 0.05), (1e-4, 3e-3)] {
            let first = 0.2;
            let mut ours = [[0.0; LANES]; 5];
            assert!(is_tame(step, 1.2 - 0.1, tau));
            attend_evenly(first, step, &entries, 1, tau, &mut ours);
            for (j, row) in ours.iter().enumerate() {
                for (lane, attention) in row.iter().enumerate() {
                    let u = first + step * lane as f64;
                    let raw = entries.map(|c| (-(u - c) * (u - c) / tau).exp());
                    let expected = raw[j] / raw.iter().sum::<f64>();
                    assert!((attention - expected).abs() < 1e-13, "{step} {tau} {lane} {j}");
                }
            }
        }
        assert!(!is_tame(0.02, 1.1, 2e-3));
    }

    #[test]
    fn attention_is_the_softmax() {
        let values: Lanes = std::array::from_fn(|i| 0.4 + i as f64 * 0.005);
        let (entries, tau) = ([-0.3, 0.1, 0.48, 1.2], 0.05);
        let mut ours = [[0.0; LANES]; 4];
        attend(&values, &entries, 2, tau, &mut ours);
        for (lane, u) in values.iter().enumerate() {
            let raw = entries.map(|c| (-(u - c) * (u - c) / tau).exp());
            let norm: f64 = raw.iter().sum();
            for j in 0..4 {
                assert!((ours[j][lane] - raw[j] / norm).abs() < 1e-15);
            }
        }
    }
}
