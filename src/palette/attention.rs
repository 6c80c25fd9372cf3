//! The attention of a few bins to a few entries of a palette: the arithmetic under [`super::table`].
//!
//! Bins come in blocks of [`LANES`], so that the compiler makes vectors of them: the widest that the processor has are
//! found at run time. Only additions, multiplications and divisions of f64, without fused ones: all widths give the
//! same bits.

/// Bins in a block.
pub const LANES: usize = 32;

/// One number for each bin of a block.
pub type Lanes = [f64; LANES];

/// a_bj = softmax_j(−(u_b − c_j)² / τ) for the bins `values` and the `entries` of their window, one row of
/// `attention` for each entry. Of the window, `near` is the entry that is nearest to every bin of the block.
pub fn attend(values: &Lanes, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there.
            return unsafe { attend_avx512(values, entries, near, tau, attention) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there.
            return unsafe { attend_avx2(values, entries, near, tau, attention) };
        }
    }
    attend_any(values, entries, near, tau, attention);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn attend_avx512(values: &Lanes, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
    attend_any(values, entries, near, tau, attention);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn attend_avx2(values: &Lanes, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
    attend_any(values, entries, near, tau, attention);
}

#[inline(always)]
fn attend_any(values: &Lanes, entries: &[f64], near: usize, tau: f64, attention: &mut [Lanes]) {
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
    let norm = norm.map(|sum| 1.0 / sum);
    for (j, row) in attention.iter_mut().enumerate().take(entries.len()) {
        for lane in 0..LANES {
            row[lane] = if j == near { norm[lane] } else { row[lane] * norm[lane] };
        }
    }
}

/// eˣ for x ≤ 0 (a little above for rounding), to 3e-16; below −700 as at −700.
///
/// x = k·ln 2 + r with |r| ≤ ln 2 / 2, and the series of eʳ up to r¹³/13!, whose next term is 4e-18.
#[inline(always)]
fn exp(x: f64) -> f64 {
    /// Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f64 = 6755399441055744.0; // 1.5 · 2⁵²
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8; // its last bits are zero: k · LN_2_HIGH is exact
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let x = if x < -700.0 { -700.0 } else { x };
    let rounded = x * std::f64::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    let mut series = 1.0 / 6227020800.0;
    for factorial in
        [479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0]
    {
        series = series * r + 1.0 / factorial;
    }
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
            assert!((ours - theirs).abs() <= 4e-16 * theirs, "e^{x}: {ours:e}, {theirs:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e6), exp(-700.0));
    }

    /// Every width of vectors gives the bits of plain code, and attention is the softmax.
    #[test]
    fn attention_is_the_softmax_at_every_width() {
        let values: Lanes = std::array::from_fn(|i| 0.4 + i as f64 * 0.005);
        let (entries, tau) = ([-0.3, 0.1, 0.48, 1.2], 0.05);
        let (mut ours, mut plain) = ([[0.0; LANES]; 4], [[0.0; LANES]; 4]);
        attend(&values, &entries, 2, tau, &mut ours);
        attend_any(&values, &entries, 2, tau, &mut plain);
        assert_eq!(ours, plain);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            let mut narrow = [[0.0; LANES]; 4];
            // SAFETY: the feature is there.
            unsafe { attend_avx2(&values, &entries, 2, tau, &mut narrow) };
            assert_eq!(narrow, plain);
        }
        for (lane, u) in values.iter().enumerate() {
            let raw = entries.map(|c| (-(u - c) * (u - c) / tau).exp());
            let norm: f64 = raw.iter().sum();
            for j in 0..4 {
                assert!((ours[j][lane] - raw[j] / norm).abs() < 1e-15);
            }
        }
    }
}
