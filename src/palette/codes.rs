//! Weights seen through a 16-bit code: how many there are of each code, a value looked up for each, sums for each.
//!
//! These are the only passes that touch every weight (`passes`); what happens between them happens on at most
//! 65,536 bins. Each splits its tensor into pieces that depend on its size alone and merges them in order, so that
//! results do not depend on the number of threads.

use std::ops::Range;

use anyhow::{Result, ensure};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

pub use super::code::{CODES, Code};
use super::passes::{self, AdamWStep, ByCode, MomentsMut, Stored};
use super::{operators, scratch};
use crate::torch::slices;

/// Neighbouring codes of fixed point that a histogram has all or none of.
pub const BLOCK: usize = 32;

/// Calls a function of [`Stored`] for what its first argument, a tensor, holds.
macro_rules! by_type {
    ($function:ident $([$n:ident])? ($weight:expr $(, $more:expr)*)) => {{
        let weight = $weight;
        match weight.f_kind()? {
            Kind::BFloat16 => $function::<bf16 $(, $n)?>(weight $(, $more)*)?,
            _ => $function::<f32 $(, $n)?>(weight $(, $more)*)?,
        }
    }};
}

/// How many weights have each code, ascending by value: of f16 only codes that occur; of fixed point whole blocks of
/// [`BLOCK`] codes, each with one at least that does.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    pub code: Code,
    pub bins: Vec<u16>,
    pub counts: Vec<u32>,
}

impl Histogram {
    /// Of f16 values, by their own code.
    ///
    /// # Errors
    /// When one is infinite or not a number.
    pub fn of_halves(values: &[f16]) -> Result<Self> {
        let values: &[u16] = values.reinterpret_cast();
        let pieces = values.par_chunks(piece(values.len())).map(|piece| {
            let mut counts = scratch::zeros();
            piece.iter().for_each(|&code| counts[code as usize] += 1);
            counts
        });
        Self::merge(Code::F16, pieces.collect())
    }

    /// Of a tensor of f32 or bf16 on any device. Where `code` is fixed point with too small a range, a coarser one takes
    /// its place, or f16 where that would be much coarser; `likely` if that is to be expected, which spares a vain count.
    ///
    /// # Errors
    /// When a value is infinite, not a number, or beyond what f16 can hold.
    pub fn of(weight: &Tensor, code: Code, likely: bool) -> Result<Self> {
        let counted = (!likely).then(|| Self::count(weight, code));
        match counted {
            Some(counted) if counted.is_ok() || code == Code::F16 || weight.numel() == 0 => counted,
            _ => Self::count(weight, code.holding(largest(weight)?)),
        }
    }

    fn count(weight: &Tensor, code: Code) -> Result<Self> {
        if weight.device() != Device::Cpu {
            return Self::merge(code, vec![operators::counts(weight, code)?]);
        }
        fn pieces<W: Stored>(weight: &Tensor, code: Code) -> Result<Vec<Box<ByCode<u32>>>> {
            let values = slices::elements::<W>(weight)?;
            let pieces = values.par_chunks(piece(values.len())).map(|piece| {
                let mut counts = scratch::zeros();
                passes::count(piece, code, &mut counts);
                counts
            });
            Ok(pieces.collect())
        }
        Self::merge(code, by_type!(pieces(&weight.f_contiguous()?, code)))
    }

    fn merge(code: Code, mut pieces: Vec<Box<ByCode<u32>>>) -> Result<Self> {
        let mut counts = pieces.pop().unwrap_or_else(scratch::zeros);
        for mut piece in pieces {
            counts.iter_mut().zip(piece.iter_mut()).for_each(|(sum, count)| *sum += std::mem::take(count));
            scratch::put_back_zeros(piece);
        }
        /// Blocks of the codes of finite positive numbers of f16, and where those of negative ones begin.
        const FINITE: usize = 0x7C00 / BLOCK;
        const MINUS: usize = CODES / 2 / BLOCK;
        let of = |blocks: Range<usize>| &counts[blocks.start * BLOCK..blocks.end * BLOCK];
        let bad: u64 = match code {
            Code::F16 => of(FINITE..MINUS).iter().chain(of(MINUS + FINITE..2 * MINUS)).map(|&n| u64::from(n)).sum(),
            Code::Fixed { .. } => u64::from(counts[0]) + u64::from(counts[CODES - 1]),
        };
        ensure!(
            bad == 0,
            "{bad} of its values are infinite{}",
            if code == Code::F16 { ", not numbers, or beyond the range of f16" } else { " or not numbers" }
        );
        let mut histogram = Self { code, bins: Vec::with_capacity(1 << 12), counts: Vec::with_capacity(1 << 12) };
        match code {
            // Ascending by value: negative codes backwards, -0 before 0.
            Code::F16 => {
                (MINUS..MINUS + FINITE).rev().for_each(|block| histogram.take(&mut counts, block, true));
                (0..FINITE).for_each(|block| histogram.take(&mut counts, block, false));
            }
            Code::Fixed { .. } => (0..2 * MINUS).for_each(|block| histogram.take(&mut counts, block, false)),
        }
        scratch::put_back_zeros(counts);
        Ok(histogram)
    }

    /// Moves a block of `counts` to the end, leaving zeros there.
    fn take(&mut self, counts: &mut ByCode<u32>, block: usize, backwards: bool) {
        let first = block * BLOCK;
        let counts = &mut counts[first..first + BLOCK];
        // Without a branch for each: most blocks are empty.
        if counts.iter().fold(0, |all, n| all | n) == 0 {
            return;
        }
        if matches!(self.code, Code::Fixed { .. }) {
            self.bins.extend((first..first + BLOCK).map(|code| code as u16));
            self.counts.extend_from_slice(counts);
        } else {
            for place in 0..BLOCK {
                let place = if backwards { BLOCK - 1 - place } else { place };
                if counts[place] > 0 {
                    self.bins.push((first + place) as u16);
                    self.counts.push(counts[place]);
                }
            }
        }
        counts.fill(0);
    }

    /// How many weights there are.
    pub fn total(&self) -> f64 {
        self.counts.iter().map(|&n| n as f64).sum()
    }

    /// The value of each bin.
    pub fn values(&self) -> Vec<f64> {
        self.bins.iter().map(|&bin| self.code.value(bin)).collect()
    }

    /// Mean squared distance of the weights to the nearest of `entries` (ascending); 0 without weights.
    pub fn error(&self, entries: &[f64]) -> f64 {
        self.error_of(&self.values(), entries)
    }

    /// [`Self::error`], for those who have the `values` of the bins.
    pub fn error_of(&self, values: &[f64], entries: &[f64]) -> f64 {
        let (mut sum, mut near) = (0.0, 0);
        for (&value, &n) in values.iter().zip(&self.counts) {
            while near + 1 < entries.len() && (value - entries[near + 1]).abs() <= (value - entries[near]).abs() {
                near += 1;
            }
            sum += n as f64 * entries.get(near).map_or(0.0, |e| (value - e).powi(2));
        }
        if self.bins.is_empty() { 0.0 } else { sum / self.total() }
    }
}

/// The largest magnitude in a tensor of f32 or bf16 on any device; of numbers only, and 0 without any.
fn largest(weight: &Tensor) -> Result<f32> {
    if weight.device() != Device::Cpu {
        let magnitudes = weight.f_abs()?.f_nan_to_num(0.0, None, None)?;
        return Ok(if weight.numel() == 0 { 0.0 } else { magnitudes.f_max()?.f_double_value(&[])? as f32 });
    }
    fn among<W: Stored>(weight: &Tensor) -> Result<f32> {
        let values = slices::elements::<W>(weight)?;
        Ok(values.par_chunks(piece(values.len())).map(passes::largest).reduce(|| 0.0, f32::max))
    }
    Ok(by_type!(among(&weight.f_contiguous()?)))
}

/// Writes to `to` (contiguous, of the weight's type, shape and device) for each element of `weight` (f32 or bf16) the value of its
/// code. `values` are those of the bins of `histogram`, which is the weight's.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn look_up(weight: &Tensor, histogram: &Histogram, values: &[f64], to: &mut Tensor) -> Result<()> {
    let code = histogram.code;
    let table = scratch::filled(histogram, values.iter().map(|&value| value as f32));
    if weight.device() != Device::Cpu {
        to.f_copy_(&operators::look_up(weight, code, &table)?)?;
    } else {
        fn on_cpu<W: Stored>(weight: &Tensor, code: Code, table: &ByCode<f32>, to: &mut Tensor) -> Result<()> {
            let (from, to) = (slices::elements::<W>(weight)?, slices::elements_mut(to)?);
            let size = piece(from.len());
            let pieces = to.par_chunks_mut(size).zip(from.par_chunks(size));
            pieces.for_each(|(to, from)| passes::look_up(from, code, table, to));
            Ok(())
        }
        by_type!(on_cpu(&weight.f_contiguous()?, code, &table, to));
    }
    scratch::put_back(table);
    Ok(())
}

/// Sums of `gradient` (the type and shape of `weight`, f32 or bf16) over the weights of each bin of `histogram`, which is the
/// weight's: the first N of those of its powers.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn add_up<const N: usize>(weight: &Tensor, gradient: &Tensor, histogram: &Histogram) -> Result<Vec<[f64; N]>>
where
    [f32; N]: Default,
{
    let code = histogram.code;
    let mut sums = vec![[0.0; N]; histogram.bins.len()];
    if weight.device() != Device::Cpu {
        let gradient = gradient.f_to_kind(Kind::Float)?;
        for power in 0..N {
            let values =
                if power == 0 { gradient.shallow_clone() } else { gradient.f_pow_tensor_scalar(power as i64 + 1)? };
            let totals = operators::add_up(weight, &values, code)?;
            histogram.bins.iter().zip(&mut sums).for_each(|(&bin, sum)| sum[power] = totals[bin as usize]);
        }
        return Ok(sums);
    }
    type Pieces<const N: usize> = Vec<Box<ByCode<[f32; N]>>>;
    fn pieces<W: Stored, const N: usize>(weight: &Tensor, code: Code, gradient: &Tensor) -> Result<Pieces<N>>
    where
        [f32; N]: Default,
    {
        let (weights, gradient) = (slices::elements::<W>(weight)?, slices::elements(gradient)?);
        let size = piece(weights.len());
        let pieces = weights.par_chunks(size).zip(gradient.par_chunks(size)).map(|(weights, gradient)| {
            let mut sums = scratch::zeros();
            passes::add_up(weights, code, gradient, &mut sums);
            sums
        });
        Ok(pieces.collect())
    }
    for mut piece in by_type!(pieces[N](&weight.f_contiguous()?, code, &gradient.f_contiguous()?)) {
        // Other codes than the histogram's have no weights.
        for (sum, &bin) in sums.iter_mut().zip(&histogram.bins) {
            let part = std::mem::take(&mut piece[bin as usize]);
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
        }
        scratch::put_back_zeros(piece);
    }
    Ok(sums)
}

/// [slope, offset] of each code that weights have.
fn table_of(histogram: &Histogram, lines: &[(f64, f64)]) -> Box<ByCode<[f32; 2]>> {
    scratch::filled(histogram, lines.iter().map(|&(slope, offset)| [slope as f32, offset as f32]))
}

/// As [`combine`], but what it would write goes into a `step` of AdamW at once, which moves `weight` and `moments`, the
/// moving means of gradients and of their squares (all contiguous f32 on the CPU).
///
/// # Errors
/// For other tensors.
pub fn combine_and_step(
    weight: &mut Tensor,
    histogram: &Histogram,
    lines: &[(f64, f64)],
    gradient: &Tensor,
    moments: [&mut Tensor; 2],
    step: &AdamWStep,
) -> Result<()> {
    let (code, table) = (histogram.code, table_of(histogram, lines));
    let gradient = gradient.f_contiguous()?;
    let (weights, gradient) = (slices::elements_mut(weight)?, slices::elements(&gradient)?);
    let [exp_avg, exp_avg_sq] = moments.map(slices::elements_mut);
    let size = piece(weights.len());
    let (exp_avg, exp_avg_sq) = (exp_avg?.par_chunks_mut(size), exp_avg_sq?.par_chunks_mut(size));
    let pieces = weights.par_chunks_mut(size).zip(gradient.par_chunks(size)).zip(exp_avg.zip(exp_avg_sq));
    pieces.for_each(|((weights, gradient), (exp_avg, exp_avg_sq))| {
        passes::combine_and_step(weights, code, &table, gradient, MomentsMut { exp_avg, exp_avg_sq }, step);
    });
    scratch::put_back(table);
    Ok(())
}

/// `gradient ← slope · gradient + offset` for each element of `weight`, by the (slope, offset) of each bin of
/// `histogram`, which is the weight's. `gradient` is contiguous, of the weight's type (f32 or bf16), shape and device.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn combine(weight: &Tensor, histogram: &Histogram, lines: &[(f64, f64)], gradient: &mut Tensor) -> Result<()> {
    let (code, table) = (histogram.code, table_of(histogram, lines));
    if weight.device() != Device::Cpu {
        operators::combine(weight, code, &table, gradient)?;
    } else {
        type Lines = ByCode<[f32; 2]>;
        fn on_cpu<W: Stored>(weight: &Tensor, code: Code, table: &Lines, gradient: &mut Tensor) -> Result<()> {
            let (weights, gradient) = (slices::elements::<W>(weight)?, slices::elements_mut(gradient)?);
            let size = piece(weights.len());
            let pieces = gradient.par_chunks_mut(size).zip(weights.par_chunks(size));
            pieces.for_each(|(gradient, weights)| passes::combine(weights, code, table, gradient));
            Ok(())
        }
        by_type!(on_cpu(&weight.f_contiguous()?, code, &table, gradient));
    }
    scratch::put_back(table);
    Ok(())
}

/// Size of the pieces of a tensor: at most 16, and none below 2^18 elements but the last. A multiple of 16, so that
/// pieces of a tensor whose memory is aligned are aligned.
pub(crate) fn piece(elements: usize) -> usize {
    elements.div_ceil(16).next_multiple_of(16).max(1 << 18)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What other devices compute with operators is what the CPU computes without.
    #[test]
    fn operators_and_kernels_agree() {
        tch::manual_seed(2);
        // More than one piece, and values where rounding to a code ties.
        let float = (Kind::Float, Device::Cpu);
        let step = 2f32.powi(-12);
        // Halfway between two numbers of f16 (10 bits of fraction), and of fixed point.
        let halfway = |odd: i32| 1.0 + odd as f32 * 0.5f32.powi(11);
        let ties = Tensor::from_slice(&[halfway(1), -halfway(3), 0.0, -0.0, 1e-7, 1.5 * step, 2.5 * step]);
        let weight = Tensor::cat(&[Tensor::randn([300_000], float), ties], 0);
        let gradient = Tensor::randn_like(&weight);
        for code in [Code::Fixed { step }, Code::F16] {
            let histogram = Histogram::of(&weight, code, false).unwrap();
            assert_eq!(Histogram::merge(code, vec![operators::counts(&weight, code).unwrap()]).unwrap(), histogram);
            assert_eq!((histogram.code, histogram.total()), (code, 300_007.0));

            // Rounding by libtorch, then the value of each code.
            let mut ours = Tensor::empty_like(&weight);
            look_up(&weight, &histogram, &histogram.values(), &mut ours).unwrap();
            let rounded = match code {
                Code::F16 => weight.to_kind(Kind::Half).to_kind(Kind::Float),
                Code::Fixed { step } => (&weight / f64::from(step)).round() * f64::from(step),
            };
            assert!(ours.equal(&rounded));
            let table = scratch::filled(&histogram, histogram.values().into_iter().map(|v| v as f32));
            assert!(ours.equal(&operators::look_up(&weight, code, &table).unwrap()));

            // bf16 is seen as what it is.
            let (brain, wide) = (weight.to_kind(Kind::BFloat16), weight.to_kind(Kind::BFloat16).to_kind(Kind::Float));
            let seen = Histogram::of(&brain, code, false).unwrap();
            assert_eq!(seen, Histogram::of(&wide, code, false).unwrap());
            assert_eq!(seen, Histogram::merge(code, vec![operators::counts(&brain, code).unwrap()]).unwrap());

            let ours = add_up::<1>(&weight, &gradient, &histogram).unwrap().as_flattened().to_vec();
            let theirs = operators::add_up(&weight, &gradient, code).unwrap();
            assert!(histogram.bins.iter().zip(&ours).all(|(&bin, sum)| (sum - theirs[bin as usize]).abs() < 1e-3));
            let total = gradient.sum(Kind::Double).double_value(&[]);
            assert!((ours.iter().sum::<f64>() - total).abs() < 1e-6 * 300_000f64.sqrt());

            let lines: Vec<(f64, f64)> =
                (0..histogram.bins.len()).map(|i| ((i as f64).sin(), (i as f64).cos())).collect();
            let (mut ours, mut theirs) = (gradient.copy(), gradient.copy());
            combine(&weight, &histogram, &lines, &mut ours).unwrap();
            let table = scratch::filled(&histogram, lines.iter().map(|&(a, b)| [a as f32, b as f32]));
            operators::combine(&weight, code, &table, &mut theirs).unwrap();
            assert!((ours - theirs).abs().max().double_value(&[]) < 1e-5);
        }
    }

    /// Where a step is too fine for the largest weight it grows, and where it would grow by much f16 takes its place; what
    /// is refused leaves nothing behind for the next.
    #[test]
    fn large_weights_make_the_step_coarser() {
        let float = (Kind::Float, Device::Cpu);
        let code = Code::fixed(0.0005);
        assert_eq!(code, Code::Fixed { step: 2f32.powi(-11) });
        let of = |most: f64| {
            let weight = Tensor::cat(&[Tensor::randn([5000], float), Tensor::from_slice(&[most as f32])], 0);
            let counted = Histogram::of(&weight, code, false);
            // Expected or not, it is the same.
            match (&counted, Histogram::of(&weight, code, true)) {
                (Ok(counted), Ok(expected)) => assert_eq!(*counted, expected),
                (counted, expected) => assert!(counted.is_err() && expected.is_err()),
            }
            counted
        };
        for (most, expected) in [
            (4.0, code),
            (15.99, code),
            (32_766.5 / 2048.0, code),
            (32_766.502 / 2048.0, Code::Fixed { step: 2f32.powi(-10) }),
            (-16.5, Code::Fixed { step: 2f32.powi(-10) }),
            (200.0, Code::Fixed { step: 2f32.powi(-7) }),
            (300.0, Code::F16),
        ] {
            let histogram = of(most).unwrap();
            assert_eq!((histogram.code, histogram.total()), (expected, 5001.0), "{most}");
        }
        for bad in [1e5, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            let message = of(bad).unwrap_err().to_string();
            assert!(message.starts_with("1 of its values"), "{message}");
        }
        assert_eq!(of(1.0).unwrap().total(), 5001.0);
        assert_eq!(Histogram::of(&Tensor::zeros([0], float), code, true).unwrap().bins, [0u16; 0]);
    }
}
