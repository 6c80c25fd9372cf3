//! The loops over the weights of a tensor, on plain slices: count codes, look values up, add a gradient up by code, and
//! combine, alone or with a step of AdamW that counts codes for the next.
//!
//! Everything else about clustering happens on at most 65,536 bins, so these are what a training step pays for every
//! weight: 32 bytes of memory traffic (half of that in bf16) and a few instructions. Weights pass a block at a time
//! through f32 in the first-level cache, whatever they are stored as; of each block the codes come first, then what is
//! done by code. The compiler makes vectors of these short loops, as wide as the [level](crate::palette::Level) in use has them.

use half::slice::HalfBitsSliceExt;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::code::{ByCode, Code, fixed_code};
use crate::palette::level::vectorized;
use crate::torch::slices::Element;

/// Weights that pass at once: in the first-level cache.
const BLOCK: usize = 1024;

/// Numbers of a block.
type Floats = [f32; BLOCK];
/// Their codes.
type Codes = [u16; BLOCK];

/// What master weights, and with them soft weights and gradients, are stored as: f32, or bf16, which is read exactly and
/// written to nearest, ties to even.
pub trait Master: Element {
    /// `to` is as long as `from`.
    fn read(from: &[Self], to: &mut [f32]);
    /// `to` is as long as `from`.
    fn write(from: &[f32], to: &mut [Self]);
}

impl Master for f32 {
    #[inline(always)]
    fn read(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn write(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl Master for bf16 {
    #[inline(always)]
    fn read(from: &[Self], to: &mut [f32]) {
        // `half`'s own looks for numbers that aren't any, which a shift keeps as they are.
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
    #[inline(always)]
    fn write(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
            // What is no number stays none.
            let none = bits >> 16 | 0x40;
            *to = bf16::from_bits(if bits & 0x7FFF_FFFF > 0x7F80_0000 { none } else { nearest } as u16);
        }
    }
}

/// Calls a function of [`Master`] for what its first argument, a tensor, holds.
macro_rules! by_type {
    ($function:ident $([$n:ident])? ($weight:expr $(, $more:expr)*)) => {{
        let weight = $weight;
        match weight.f_kind()? {
            tch::Kind::BFloat16 => $function::<half::bf16 $(, $n)?>(weight $(, $more)*)?,
            _ => $function::<f32 $(, $n)?>(weight $(, $more)*)?,
        }
    }};
}
pub(super) use by_type;

/// The codes of a block of weights, whose numbers are left in `floats`.
#[inline(always)]
fn encode<'c, W: Master>(weights: &[W], code: Code, floats: &mut Floats, codes: &'c mut Codes) -> &'c [u16] {
    let (floats, codes) = (&mut floats[..weights.len()], &mut codes[..weights.len()]);
    W::read(weights, floats);
    match code {
        Code::F16 => codes.reinterpret_cast_mut::<f16>().convert_from_f32_slice(floats),
        Code::Fixed { step } => {
            let scale = 1.0 / step;
            codes.iter_mut().zip(floats).for_each(|(code, value)| *code = fixed_code(*value * scale));
        }
    }
    codes
}

/// Adds to `counts` how many of `weights` have each code.
pub fn count<W: Master>(weights: &[W], code: Code, counts: &mut ByCode<u32>) {
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut codes) = ([0.0; BLOCK], [0; BLOCK]);
            for block in weights.chunks(BLOCK) {
                let codes = encode(block, code, &mut floats, &mut codes);
                codes.iter().for_each(|&code| counts[code as usize] += 1);
            }
        },
    );
}

/// The largest magnitude; what is not a number is passed over.
pub fn largest<W: Master>(weights: &[W]) -> f32 {
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut most) = ([0.0; BLOCK], [0.0f32; 64]);
            for block in weights.chunks(BLOCK) {
                let floats = &mut floats[..block.len()];
                W::read(block, floats);
                for floats in floats.chunks(most.len()) {
                    most.iter_mut().zip(floats).for_each(|(most, value)| *most = most.max(value.abs()));
                }
            }
            most.into_iter().fold(0.0, f32::max)
        },
    )
}

/// Writes to `to` the `table`'s value of each weight's code. `to` is as long as `weights`.
pub fn look_up<W: Master>(weights: &[W], code: Code, table: &ByCode<f32>, to: &mut [W]) {
    assert_eq!(weights.len(), to.len());
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut codes) = ([0.0; BLOCK], [0; BLOCK]);
            for (block, to) in weights.chunks(BLOCK).zip(to.chunks_mut(BLOCK)) {
                let codes = encode(block, code, &mut floats, &mut codes);
                floats.iter_mut().zip(codes).for_each(|(value, &code)| *value = table[code as usize]);
                W::write(&floats[..block.len()], to);
            }
        },
    );
}

/// Adds to `sums`, by the code of each weight, the first N powers of its element of `gradient`, which is as long as
/// `weights`.
pub fn add_up<W: Master, const N: usize>(weights: &[W], code: Code, gradient: &[W], sums: &mut ByCode<[f32; N]>) {
    assert_eq!(weights.len(), gradient.len());
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut codes, mut powers) = ([0.0; BLOCK], [0; BLOCK], [[0.0; N]; BLOCK]);
            for (block, gradient) in weights.chunks(BLOCK).zip(gradient.chunks(BLOCK)) {
                let codes = encode(block, code, &mut floats, &mut codes);
                W::read(gradient, &mut floats[..block.len()]);
                for (powers, &value) in powers.iter_mut().zip(&floats) {
                    let mut power = 1.0;
                    for to in powers {
                        power *= value;
                        *to = power;
                    }
                }
                for (&code, powers) in codes.iter().zip(&powers) {
                    let sums = &mut sums[code as usize];
                    (0..N).for_each(|n| sums[n] += powers[n]);
                }
            }
        },
    );
}

/// `gradient ← slope · gradient + offset`, with the \[slope, offset\] of each weight's code.
pub fn combine<W: Master>(weights: &[W], code: Code, table: &ByCode<[f32; 2]>, gradient: &mut [W]) {
    assert_eq!(weights.len(), gradient.len());
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut codes) = ([0.0; BLOCK], [0; BLOCK]);
            for (block, gradient) in weights.chunks(BLOCK).zip(gradient.chunks_mut(BLOCK)) {
                let codes = encode(block, code, &mut floats, &mut codes);
                let floats = &mut floats[..block.len()];
                W::read(gradient, floats);
                for (value, &code) in floats.iter_mut().zip(codes) {
                    let [slope, offset] = table[code as usize];
                    *value = slope * *value + offset;
                }
                W::write(floats, gradient);
            }
        },
    );
}

/// One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in the form of libtorch's fused kernel.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// The gradient is multiplied by it: of clipping.
    pub factor: f32,
    /// 1 − lr · weight decay
    pub decay: f32,
    /// 1 − β₁
    pub rate_of_mean: f32,
    /// β₂
    pub beta2: f32,
    /// 1 − β₂
    pub rate_of_square: f32,
    /// lr / (1 − β₁ᵗ)
    pub size: f32,
    /// 1 / √(1 − β₂ᵗ)
    pub root: f32,
    pub eps: f32,
}

impl AdamWStep {
    /// Of a weight that does not learn; nothing reads it.
    pub const NONE: Self = Self {
        factor: 0.0,
        decay: 1.0,
        rate_of_mean: 0.0,
        beta2: 1.0,
        rate_of_square: 0.0,
        size: 0.0,
        root: 1.0,
        eps: 1.0,
    };
}

/// What AdamW keeps of some weights: the moving means of gradients and of their squares.
pub struct MomentsMut<'a> {
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
}

/// [`combine`], of which the result goes into a step of AdamW instead of memory; adds to `counts` how many weights have each
/// code then. All slices are as long as `weights`.
pub fn combine_and_step(
    weights: &mut [f32],
    code: Code,
    table: &ByCode<[f32; 2]>,
    gradient: &[f32],
    moments: MomentsMut,
    step: &AdamWStep,
    counts: &mut ByCode<u32>,
) {
    let MomentsMut { exp_avg, exp_avg_sq } = moments;
    for length in [gradient.len(), exp_avg.len(), exp_avg_sq.len()] {
        assert_eq!(length, weights.len());
    }
    let moments = exp_avg.chunks_mut(BLOCK).zip(exp_avg_sq.chunks_mut(BLOCK));
    vectorized(
        #[inline(always)]
        || {
            let (mut floats, mut codes, mut lines) = ([0.0; BLOCK], [0; BLOCK], [[0.0; 2]; BLOCK]);
            for ((weights, gradient), (exp_avg, exp_avg_sq)) in
                weights.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).zip(moments)
            {
                let found = encode(weights, code, &mut floats, &mut codes);
                lines.iter_mut().zip(found).for_each(|(line, &code)| *line = table[code as usize]);
                let (both, lines) = (exp_avg.iter_mut().zip(exp_avg_sq), lines.iter().zip(gradient));
                for ((weight, (exp_avg, exp_avg_sq)), ([slope, offset], gradient)) in
                    weights.iter_mut().zip(both).zip(lines)
                {
                    let gradient = (slope * gradient + offset) * step.factor;
                    *exp_avg += (gradient - *exp_avg) * step.rate_of_mean;
                    *exp_avg_sq = *exp_avg_sq * step.beta2 + gradient * gradient * step.rate_of_square;
                    let away = *exp_avg * step.size / (exp_avg_sq.sqrt() * step.root + step.eps);
                    *weight = *weight * step.decay - away;
                }
                // While they are in the first-level cache.
                let codes = encode(weights, code, &mut floats, &mut codes);
                codes.iter().for_each(|&code| counts[code as usize] += 1);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::code::CODES;
    use super::*;
    use crate::palette::Level;

    /// Codes are those of the `half` crate, and of plain rounding; ties and odd lengths included.
    #[test]
    fn codes_are_the_nearest() {
        let step = 2f32.powi(-17);
        let mut values: Vec<f32> = (0..70_001).map(|i| ((i * 7919) as f32 * 1e-3).sin() * 0.03).collect();
        let halfway = |bits: i32, odd: i32| 1.0 + odd as f32 * 0.5f32.powi(bits + 1);
        values.extend([halfway(10, 1), -halfway(10, 3), 0.0, -0.0, 1e-7, 3e-8, 65504.0, 1e-41, -1e-44, 1e6]);
        values.extend([0.5 * step, -0.5 * step, 1.5 * step, -2.5 * step, 32766.0 * step, 32767.0 * step, -1e30, 1e30]);
        values.extend([f32::INFINITY, f32::NEG_INFINITY]);
        let by_hand = |code: Code, v: f32| match code {
            Code::F16 => f16::from_f32(v).to_bits(),
            Code::Fixed { .. } => ((v / step).round_ties_even().clamp(-32768.0, 32767.0) + 32768.0) as u16,
        };
        for code in [Code::F16, Code::Fixed { step }] {
            let mut table = vec![0f32; CODES];
            (0..CODES).for_each(|c| table[c] = c as f32);
            let table: &ByCode<f32> = table.as_slice().try_into().unwrap();
            let mut found = vec![0f32; values.len()];
            look_up(&values, code, table, &mut found);
            for (&value, found) in values.iter().zip(&found) {
                assert_eq!(*found as u16, by_hand(code, value), "{value} by {code:?}");
                assert_eq!(code.of(value), by_hand(code, value), "{value} by {code:?}");
            }
            let mut counts = vec![0u32; CODES];
            count(&values, code, counts.as_mut_slice().try_into().unwrap());
            assert_eq!(counts.iter().sum::<u32>() as usize, values.len());
            assert!(values.iter().all(|&v| counts[by_hand(code, v) as usize] > 0));
            // What is no number has a code that is refused.
            let mut found = [0f32];
            look_up(&[f32::NAN], code, table, &mut found);
            let found = found[0] as u16;
            assert!(if code == Code::F16 { found & 0x7C00 == 0x7C00 } else { found == 0 });
        }
        assert_eq!(fixed_code(f32::NAN), 0);
    }

    /// However many weights there are at once, and at every level, the bits are the same; and these are AdamW's.
    #[test]
    fn a_step_is_the_same_for_many_and_for_few() {
        let wave = |scale: f32| (0..2_005).map(move |i| ((i * 37) as f32).sin() * scale).collect::<Vec<f32>>();
        let (weights, gradient, exp_avg) = (wave(0.3), wave(0.01), wave(0.002));
        let exp_avg_sq: Vec<f32> = wave(1e-3).iter().map(|value| value * value).collect();
        let code = Code::Fixed { step: 2f32.powi(-6) };
        let mut table = vec![[0f32; 2]; CODES];
        (0..CODES).for_each(|code| table[code] = [1.0 + (code % 7) as f32 * 0.1, 1e-4 * (code % 5) as f32]);
        let table: &ByCode<[f32; 2]> = table.as_slice().try_into().unwrap();
        let (beta1, beta2, lr, t) = (0.9, 0.99, 1e-3, 3);
        let step = AdamWStep {
            factor: 0.5,
            decay: 1.0 - lr * 0.01,
            rate_of_mean: 1.0 - beta1,
            beta2,
            rate_of_square: 1.0 - beta2,
            size: lr / (1.0 - beta1.powi(t)),
            root: 1.0 / (1.0 - beta2.powi(t)).sqrt(),
            eps: 1e-8,
        };
        let stepped = |at_once: usize| {
            let mut all = [weights.clone(), exp_avg.clone(), exp_avg_sq.clone()];
            let [weights, exp_avg, exp_avg_sq] = &mut all;
            let mut counts: Box<ByCode<u32>> = vec![0; CODES].try_into().unwrap();
            for start in (0..weights.len()).step_by(at_once) {
                let range = start..weights.len().min(start + at_once);
                let moments =
                    MomentsMut { exp_avg: &mut exp_avg[range.clone()], exp_avg_sq: &mut exp_avg_sq[range.clone()] };
                combine_and_step(
                    &mut weights[range.clone()],
                    code,
                    table,
                    &gradient[range],
                    moments,
                    &step,
                    &mut counts,
                );
            }
            let mut recounted = vec![0u32; CODES];
            count(weights, code, recounted.as_mut_slice().try_into().unwrap());
            assert_eq!(counts.as_slice(), recounted);
            all
        };
        let all = stepped(2_005);
        for level in Level::available() {
            level.force();
            [2_005, 1, 50].into_iter().for_each(|at_once| assert_eq!(all, stepped(at_once), "{level}"));
        }
        for i in 0..weights.len() {
            let [slope, offset] = table[code.of(weights[i]) as usize];
            let g = f64::from(slope * gradient[i] + offset) * 0.5;
            let m = 0.9 * f64::from(exp_avg[i]) + 0.1 * g;
            let v = 0.99 * f64::from(exp_avg_sq[i]) + 0.01 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.99f64.powi(t)));
            let w = f64::from(weights[i]) * (1.0 - 1e-3 * 0.01) - 1e-3 * m_hat / (v_hat.sqrt() + 1e-8);
            for (found, expected) in all.iter().map(|of| f64::from(of[i])).zip([w, m, v]) {
                assert!((found - expected).abs() < 1e-6 * expected.abs() + 1e-9, "{i}: {found:e} {expected:e}");
            }
        }
    }

    /// bf16 is rounded to nearest, ties to even, as the `half` crate does; what is no number stays none.
    #[test]
    fn bf16_is_written_as_half_writes_it() {
        let mut values: Vec<f32> = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        values.extend([
            1.0,
            f32::from_bits(0x3F80_8000),
            f32::from_bits(0x3F81_8000),
            f32::NAN,
            f32::INFINITY,
            f32::MAX,
            -0.0,
        ]);
        let mut found = vec![bf16::ZERO; values.len()];
        bf16::write(&values, &mut found);
        for (value, found) in values.iter().zip(found) {
            assert_eq!(found.to_bits(), bf16::from_f32(*value).to_bits(), "{value}");
        }
    }

    #[test]
    fn sums_and_combinations_are_by_code() {
        let weights: Vec<f32> = (0..1_234).map(|i| (i % 5) as f32 - 2.0).collect();
        let gradient: Vec<f32> = (0..1_234).map(|i| i as f32).collect();
        for code in [Code::F16, Code::Fixed { step: 0.25 }] {
            let mut sums = vec![[0f32; 2]; CODES];
            add_up(&weights, code, &gradient, sums.as_mut_slice().try_into().unwrap());
            let mut table = vec![[0f32; 2]; CODES];
            for value in -2i32..=2 {
                let at = code.of(value as f32) as usize;
                let of_code = || (0..1_234).filter(|i| i % 5 - 2 == value);
                assert_eq!(sums[at][0], of_code().sum::<i32>() as f32);
                let squares = of_code().map(|i| (i * i) as f64).sum::<f64>();
                assert!((f64::from(sums[at][1]) / squares - 1.0).abs() < 1e-6);
                table[at] = [value as f32, 10.0];
            }
            let mut combined = gradient.clone();
            combine(&weights, code, table.as_slice().try_into().unwrap(), &mut combined);
            for ((c, w), g) in combined.iter().zip(&weights).zip(&gradient) {
                assert_eq!(*c, w * g + 10.0);
            }
        }
    }
}
