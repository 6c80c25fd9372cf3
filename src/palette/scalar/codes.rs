//! Weights seen through a 16-bit code: a value looked up for each, sums for each code, gradients and steps by code.
//!
//! These passes, and the one that counts ([`super::histogram`]), are the only ones that touch every weight (`passes`); what
//! happens between them happens on at most 65,536 bins. Each splits its tensor into pieces that depend on its size alone
//! and merges them in order, so that results do not depend on the number of threads.

use anyhow::Result;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::code::{ByCode, Code};
use super::histogram::Histogram;
use super::passes::{self, AdamWStep, Master, MomentsMut, by_type};
use super::{operators, scratch};
use crate::torch::slices::{self, piece};

/// Writes to `to` (contiguous, of the weight's type, shape and device) for each element of `weight` (f32 or bf16) the value of its
/// code. `values` are those of the bins of `histogram`, which is the weight's.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn look_up(weight: &Tensor, histogram: &Histogram, values: &[f64], to: &mut Tensor) -> Result<()> {
    let code = histogram.code;
    let table = scratch::filled(&histogram.bins, values.iter().map(|&value| value as f32));
    if weight.device() != Device::Cpu {
        to.f_copy_(&operators::look_up(weight, code, &table)?)?;
    } else {
        fn on_cpu<W: Master>(weight: &Tensor, code: Code, table: &ByCode<f32>, to: &mut Tensor) -> Result<()> {
            // SAFETY: the kernel is plain Rust: no operator runs until these slices are gone.
            let (from, mut to) = unsafe { (slices::elements::<W>(weight)?, slices::elements_mut(to)?) };
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
    fn pieces<W: Master, const N: usize>(weight: &Tensor, code: Code, gradient: &Tensor) -> Result<Pieces<N>>
    where
        [f32; N]: Default,
    {
        // SAFETY: the kernel is plain Rust: no operator runs until these slices are gone.
        let (weights, gradient) = unsafe { (slices::elements::<W>(weight)?, slices::elements(gradient)?) };
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
    scratch::filled(&histogram.bins, lines.iter().map(|&(slope, offset)| [slope as f32, offset as f32]))
}

/// As [`combine`], but what it would write goes into a `step` of AdamW at once, which moves `weight` and `moments`, the
/// moving means of gradients and of their squares (all contiguous f32 on the CPU). On the way moved weights are counted,
/// through the same code: none where they do not fit it any more.
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
) -> Result<Option<Histogram>> {
    let (code, table) = (histogram.code, table_of(histogram, lines));
    let gradient = gradient.f_contiguous()?;
    let total = weight.numel();
    let [exp_avg, exp_avg_sq] = moments;
    // SAFETY: the kernel is plain Rust: no operator runs until these slices are gone.
    let (mut weights, gradient, mut exp_avg, mut exp_avg_sq) = unsafe {
        (
            slices::elements_mut(weight)?,
            slices::elements(&gradient)?,
            slices::elements_mut(exp_avg)?,
            slices::elements_mut(exp_avg_sq)?,
        )
    };
    let size = piece(total);
    let (exp_avg, exp_avg_sq) = (exp_avg.par_chunks_mut(size), exp_avg_sq.par_chunks_mut(size));
    let pieces = weights.par_chunks_mut(size).zip(gradient.par_chunks(size)).zip(exp_avg.zip(exp_avg_sq));
    let pieces = pieces.map(|((weights, gradient), (exp_avg, exp_avg_sq))| {
        let mut counts = scratch::zeros();
        let moments = MomentsMut { exp_avg, exp_avg_sq };
        passes::combine_and_step(weights, code, &table, gradient, moments, step, &mut counts);
        counts
    });
    let counted = Histogram::merge(code, pieces.collect(), total);
    scratch::put_back(table);
    Ok(counted.ok())
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
        fn on_cpu<W: Master>(weight: &Tensor, code: Code, table: &Lines, gradient: &mut Tensor) -> Result<()> {
            // SAFETY: the kernel is plain Rust: no operator runs until these slices are gone.
            let (weights, mut gradient) = unsafe { (slices::elements::<W>(weight)?, slices::elements_mut(gradient)?) };
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
            assert_eq!(
                Histogram::merge(code, vec![operators::counts(&weight, code).unwrap()], 300_007).unwrap(),
                histogram
            );
            assert_eq!((histogram.code, histogram.total()), (code, 300_007.0));

            // Rounding by libtorch, then the value of each code.
            let mut ours = Tensor::empty_like(&weight);
            look_up(&weight, &histogram, &histogram.values(), &mut ours).unwrap();
            let rounded = match code {
                Code::F16 => weight.to_kind(Kind::Half).to_kind(Kind::Float),
                Code::Fixed { step } => (&weight / f64::from(step)).round() * f64::from(step),
            };
            assert!(ours.equal(&rounded));
            let table = scratch::filled(&histogram.bins, histogram.values().into_iter().map(|v| v as f32));
            assert!(ours.equal(&operators::look_up(&weight, code, &table).unwrap()));

            // bf16 is seen as what it is.
            let (brain, wide) = (weight.to_kind(Kind::BFloat16), weight.to_kind(Kind::BFloat16).to_kind(Kind::Float));
            let seen = Histogram::of(&brain, code, false).unwrap();
            assert_eq!(seen, Histogram::of(&wide, code, false).unwrap());
            assert_eq!(seen, Histogram::merge(code, vec![operators::counts(&brain, code).unwrap()], 300_007).unwrap());

            let ours = add_up::<1>(&weight, &gradient, &histogram).unwrap().as_flattened().to_vec();
            let theirs = operators::add_up(&weight, &gradient, code).unwrap();
            assert!(histogram.bins.iter().zip(&ours).all(|(&bin, sum)| (sum - theirs[bin as usize]).abs() < 1e-3));
            let total = gradient.sum(Kind::Double).double_value(&[]);
            assert!((ours.iter().sum::<f64>() - total).abs() < 1e-6 * 300_000f64.sqrt());

            let lines: Vec<(f64, f64)> =
                (0..histogram.bins.len()).map(|i| ((i as f64).sin(), (i as f64).cos())).collect();
            let (mut ours, mut theirs) = (gradient.copy(), gradient.copy());
            combine(&weight, &histogram, &lines, &mut ours).unwrap();
            let table = scratch::filled(&histogram.bins, lines.iter().map(|&(a, b)| [a as f32, b as f32]));
            operators::combine(&weight, code, &table, &mut theirs).unwrap();
            assert!((ours - theirs).abs().max().double_value(&[]) < 1e-5);
        }
    }
}
