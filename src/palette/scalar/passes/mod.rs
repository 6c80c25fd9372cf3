//! The passes over the weights, on plain slices: count codes, look values up, add a gradient up by code, and combine,
//! alone or with a step of AdamW that counts codes for the next.
//!
//! Everything else about clustering happens on at most 65,536 bins, so these are what a training step pays for every
//! weight: 32 bytes of memory traffic (half of that in bf16) and a few instructions. With AVX-512 (found at run time)
//! codes are made and tables are read sixteen weights at a time; elsewhere plain loops do the same. Both give the same
//! bits.

mod adamw;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod stored;
#[cfg(target_arch = "x86_64")]
mod wide;

use half::f16;
use half::slice::HalfFloatSliceExt;

pub use self::adamw::{AdamWStep, MomentsMut};
use self::stored::BLOCK;
pub use self::stored::Stored;
pub(crate) use self::stored::by_type;
use super::code::{ByCode, Code, fixed_code};

/// Adds to `counts` how many of `weights` have each code.
pub fn count<W: Stored>(weights: &[W], code: Code, counts: &mut ByCode<u32>) {
    for block in weights.chunks(BLOCK) {
        with_codes(block, code, |codes| codes.iter().for_each(|&code| counts[code as usize] += 1));
    }
}

/// The largest magnitude; what is not a number is passed over.
pub fn largest<W: Stored>(weights: &[W]) -> f32 {
    let (blocks, rest) = weights.as_chunks::<64>();
    let mut most = [0.0f32; 64];
    for block in blocks {
        most.iter_mut().zip(block).for_each(|(most, value)| *most = most.max(value.to_f32().abs()));
    }
    let rest = rest.iter().map(|value| value.to_f32().abs());
    most.into_iter().chain(rest).fold(0.0, f32::max)
}

/// Writes to `to` the `table`'s value of each weight's code. `to` is as long as `weights`.
pub fn look_up<W: Stored>(weights: &[W], code: Code, table: &ByCode<f32>, to: &mut [W]) {
    assert_eq!(weights.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if wide::available() {
        // SAFETY: the features that the function needs are there.
        return unsafe { wide::look_up(weights, code, table, to) };
    }
    for (block, to) in weights.chunks(BLOCK).zip(to.chunks_mut(BLOCK)) {
        with_codes(block, code, |codes| {
            to.iter_mut().zip(codes).for_each(|(to, &code)| *to = W::of_f32(table[code as usize]));
        });
    }
}

/// Adds to `sums`, by the code of each weight, its element of `gradient`, which is as long as `weights`, and where there is
/// place the square of that.
pub fn add_up<W: Stored, const N: usize>(weights: &[W], code: Code, gradient: &[W], sums: &mut ByCode<[f32; N]>) {
    assert_eq!(weights.len(), gradient.len());
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    let done = match (sums as &mut dyn std::any::Any).downcast_mut() {
        // SAFETY: the features that the function needs are there.
        Some(sums) if wide::available() => unsafe { wide::add_up_pairs(weights, code, gradient, sums) },
        _ => done,
    };
    for (block, gradient) in weights[done..].chunks(BLOCK).zip(gradient[done..].chunks(BLOCK)) {
        with_codes(block, code, |codes| {
            for (&code, value) in codes.iter().zip(gradient) {
                let mut power = 1.0;
                for sum in &mut sums[code as usize] {
                    power *= value.to_f32();
                    *sum += power;
                }
            }
        });
    }
}

/// `gradient ← slope · gradient + offset`, with the \[slope, offset\] of each weight's code.
pub fn combine<W: Stored>(weights: &[W], code: Code, table: &ByCode<[f32; 2]>, gradient: &mut [W]) {
    assert_eq!(weights.len(), gradient.len());
    #[cfg(target_arch = "x86_64")]
    if wide::available() {
        // SAFETY: the features that the function needs are there.
        return unsafe { wide::combine(weights, code, table, gradient) };
    }
    for (block, gradient) in weights.chunks(BLOCK).zip(gradient.chunks_mut(BLOCK)) {
        with_codes(block, code, |codes| {
            for (value, &code) in gradient.iter_mut().zip(codes) {
                let [slope, offset] = table[code as usize];
                *value = W::of_f32(slope * value.to_f32() + offset);
            }
        });
    }
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
    let moments = moments.map(|(exp_avg, exp_avg_sq)| MomentsMut { exp_avg, exp_avg_sq });
    for ((weights, gradient), moments) in weights.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).zip(moments) {
        step_block(weights, code, table, gradient, moments, step);
        // While they are in the first-level cache.
        count(weights, code, counts);
    }
}

/// [`combine_and_step`] of at most [`BLOCK`] weights, which counts nothing.
fn step_block(
    weights: &mut [f32],
    code: Code,
    table: &ByCode<[f32; 2]>,
    gradient: &[f32],
    mut moments: MomentsMut,
    step: &AdamWStep,
) {
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    let done = if wide::available() {
        // SAFETY: the features that the function needs are there; the slices are of one length.
        unsafe { wide::combine_and_step(weights, code, table, gradient, &mut moments, step) }
    } else {
        done
    };
    let MomentsMut { exp_avg, exp_avg_sq } = &mut moments;
    let mut codes = [0; BLOCK];
    with_codes(&weights[done..], code, |rest| codes[done..weights.len()].copy_from_slice(rest));
    for i in done..weights.len() {
        let [slope, offset] = table[codes[i] as usize];
        let gradient = (slope * gradient[i] + offset) * step.factor;
        exp_avg[i] += (gradient - exp_avg[i]) * step.rate_of_mean;
        exp_avg_sq[i] = exp_avg_sq[i] * step.beta2 + gradient * gradient * step.rate_of_square;
        let away = exp_avg[i] * step.size / (exp_avg_sq[i].sqrt() * step.root + step.eps);
        weights[i] = weights[i] * step.decay - away;
    }
}

/// Calls `then` with the codes of at most [`BLOCK`] weights.
#[inline]
fn with_codes<W: Stored>(block: &[W], code: Code, then: impl FnOnce(&[u16])) {
    let mut buffer = [f16::ZERO; BLOCK];
    let buffer = &mut buffer[..block.len()];
    #[cfg(target_arch = "x86_64")]
    if wide::available() {
        // SAFETY: the features that the function needs are there.
        unsafe { wide::encode(block, code, buffer.reinterpret_cast_mut()) };
        return then(buffer.reinterpret_cast());
    }
    let mut floats = [0.0; BLOCK];
    let block = W::floats(block, &mut floats);
    match code {
        Code::F16 => buffer.convert_from_f32_slice(block),
        Code::Fixed { step } => {
            let codes: &mut [u16] = buffer.reinterpret_cast_mut();
            let scale = 1.0 / step;
            codes.iter_mut().zip(block).for_each(|(code, value)| *code = fixed_code(value * scale));
        }
    }
    then(buffer.reinterpret_cast());
}

#[cfg(test)]
mod tests {
    use super::super::code::CODES;
    use super::*;

    /// Wide and plain codes are those of the `half` crate, and of plain rounding; ties and odd lengths included.
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
            Code::Fixed { .. } if v / step >= 2f32.powi(31) => 0,
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

    /// Vectors, and what is left over of them, compute the same bits; and these are AdamW's.
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
        assert_eq!(all, stepped(1));
        assert_eq!(all, stepped(50));
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

    /// Rows of two f32 are aligned to four bytes: sums by code are right also where none begins at a multiple of eight.
    #[test]
    fn rows_need_not_be_aligned_to_eight_bytes() {
        let (weights, gradient) = (vec![0.5f32; 100], vec![3.0f32; 100]);
        let mut memory = vec![0f32; 2 * CODES + 1];
        for first in [0, 1] {
            let rows = memory[first..first + 2 * CODES].as_chunks_mut::<2>().0;
            let rows: &mut ByCode<[f32; 2]> = rows.try_into().unwrap();
            rows.fill([0.0; 2]);
            add_up(&weights, Code::F16, &gradient, rows);
            assert_eq!(rows[Code::F16.of(0.5) as usize], [300.0, 900.0]);
            let mut combined = gradient.clone();
            combine(&weights, Code::F16, rows, &mut combined);
            assert_eq!(combined, [1800.0; 100]);
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
