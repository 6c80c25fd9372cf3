//! Weights seen through a 16-bit code: how many there are of each code, a value looked up for each, sums for each.
//!
//! These are the only passes that touch every weight (`passes`); what happens between them happens on at most
//! 65,536 bins. Each splits its tensor into pieces that depend on its size alone and merges them in order, so that
//! results do not depend on the number of threads.

use anyhow::{Result, ensure};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::passes::{self, ByCode};
use crate::torch::slices;

/// How many values a 16-bit code has.
pub const CODES: usize = 1 << 16;

/// Which 16-bit number stands for a weight; both round to nearest, ties to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// 8 bits of exponent, 7 of fraction: some 4,000 bins on a trained layer, enough at 1 and 2 bits.
    Bf16,
    /// 5 bits of exponent, 10 of fraction: some 20,000 bins.
    F16,
}

impl Code {
    /// The value that a code stands for.
    pub fn value(self, code: u16) -> f64 {
        match self {
            Code::Bf16 => bf16::from_bits(code).to_f64(),
            Code::F16 => f16::from_bits(code).to_f64(),
        }
    }

    /// The code of a value.
    pub fn of(self, value: f32) -> u16 {
        match self {
            Code::Bf16 => bf16::from_f32(value).to_bits(),
            Code::F16 => f16::from_f32(value).to_bits(),
        }
    }

    /// The code of infinity: those below it are of finite positive values, ascending; with the sign, 0x8000, of
    /// negative ones.
    const fn infinity(self) -> usize {
        match self {
            Code::Bf16 => 0x7F80,
            Code::F16 => 0x7C00,
        }
    }

    fn kind(self) -> Kind {
        match self {
            Code::Bf16 => Kind::BFloat16,
            Code::F16 => Kind::Half,
        }
    }
}

/// How many weights have each code; only codes that occur, ascending by value.
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
            let mut counts = scratch::take::<u32>();
            piece.iter().for_each(|&code| counts[code as usize] += 1);
            counts
        });
        Self::merge(Code::F16, pieces.collect())
    }

    /// Of a tensor of f32 on any device.
    ///
    /// # Errors
    /// When a value is infinite, not a number, or beyond what the code can hold.
    pub fn of(weight: &Tensor, code: Code) -> Result<Self> {
        if weight.device() != Device::Cpu {
            return Self::merge(code, vec![operators::counts(weight, code)?]);
        }
        let weight = weight.f_contiguous()?;
        let values = slices::floats(&weight)?;
        let pieces = values.par_chunks(piece(values.len())).map(|piece| {
            let mut counts = scratch::take::<u32>();
            passes::count(piece, code, &mut counts);
            counts
        });
        Self::merge(code, pieces.collect())
    }

    fn merge(code: Code, mut pieces: Vec<Box<ByCode<u32>>>) -> Result<Self> {
        let mut counts = pieces.pop().unwrap_or_else(scratch::take);
        for piece in pieces {
            counts.iter_mut().zip(piece.iter()).for_each(|(sum, count)| *sum += count);
            scratch::put_back(piece);
        }
        let (positive, negative) = counts.split_at(CODES / 2);
        let ((positive, above), (negative, below)) =
            (positive.split_at(code.infinity()), negative.split_at(code.infinity()));
        let bad: u64 = above.iter().chain(below).map(|&n| n as u64).sum();
        ensure!(bad == 0, "{bad} of its values are infinite, not numbers, or beyond the range of {code:?}");
        let mut histogram = Self { code, bins: Vec::with_capacity(1 << 15), counts: Vec::with_capacity(1 << 15) };
        // Ascending by value: negative codes backwards, -0 before 0.
        for (bin, &count) in negative.iter().enumerate().rev().filter(|(_, n)| **n > 0) {
            histogram.bins.push((CODES / 2 + bin) as u16);
            histogram.counts.push(count);
        }
        for (bin, &count) in positive.iter().enumerate().filter(|(_, n)| **n > 0) {
            histogram.bins.push(bin as u16);
            histogram.counts.push(count);
        }
        scratch::put_back(counts);
        Ok(histogram)
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
        let (mut sum, mut near) = (0.0, 0);
        for (&bin, &n) in self.bins.iter().zip(&self.counts) {
            let value = self.code.value(bin);
            while near + 1 < entries.len() && (value - entries[near + 1]).abs() <= (value - entries[near]).abs() {
                near += 1;
            }
            sum += n as f64 * entries.get(near).map_or(0.0, |e| (value - e).powi(2));
        }
        if self.bins.is_empty() { 0.0 } else { sum / self.total() }
    }
}

/// Writes to `to` (contiguous f32 of the weight's shape and device) for each element of `weight` (f32) the value of its
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
        let weight = weight.f_contiguous()?;
        let (from, to) = (slices::floats(&weight)?, slices::floats_mut(to)?);
        let size = piece(from.len());
        to.par_chunks_mut(size)
            .zip(from.par_chunks(size))
            .for_each(|(to, from)| passes::look_up(from, code, &table, to));
    }
    scratch::put_back(table);
    Ok(())
}

/// Sums of `gradient` (f32, the shape of `weight`) over the weights of each bin of `histogram`, which is the weight's.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn add_up(weight: &Tensor, gradient: &Tensor, histogram: &Histogram) -> Result<Vec<f64>> {
    let code = histogram.code;
    if weight.device() != Device::Cpu {
        let totals = operators::add_up(weight, gradient, code)?;
        return Ok(histogram.bins.iter().map(|&bin| totals[bin as usize]).collect());
    }
    let (weight, gradient) = (weight.f_contiguous()?, gradient.f_contiguous()?);
    let (weights, gradient) = (slices::floats(&weight)?, slices::floats(&gradient)?);
    let size = piece(weights.len());
    let pieces: Vec<Box<ByCode<f32>>> = weights
        .par_chunks(size)
        .zip(gradient.par_chunks(size))
        .map(|(weights, gradient)| {
            let mut sums = scratch::take();
            passes::add_up(weights, code, gradient, &mut sums);
            sums
        })
        .collect();
    let sum = |&bin: &u16| pieces.iter().map(|piece| piece[bin as usize] as f64).sum();
    let sums = histogram.bins.iter().map(sum).collect();
    pieces.into_iter().for_each(scratch::put_back);
    Ok(sums)
}

/// `gradient ← slope · gradient + offset` for each element of `weight`, by the (slope, offset) of each bin of
/// `histogram`, which is the weight's. `gradient` is contiguous f32 of the weight's shape and device.
///
/// # Errors
/// libtorch's, for tensors of other kinds.
pub fn combine(weight: &Tensor, histogram: &Histogram, lines: &[(f64, f64)], gradient: &mut Tensor) -> Result<()> {
    let code = histogram.code;
    let table = scratch::filled(histogram, lines.iter().map(|&(slope, offset)| [slope as f32, offset as f32]));
    if weight.device() != Device::Cpu {
        operators::combine(weight, code, &table, gradient)?;
    } else {
        let weight = weight.f_contiguous()?;
        let (weights, gradient) = (slices::floats(&weight)?, slices::floats_mut(gradient)?);
        let size = piece(weights.len());
        gradient
            .par_chunks_mut(size)
            .zip(weights.par_chunks(size))
            .for_each(|(gradient, weights)| passes::combine(weights, code, &table, gradient));
    }
    scratch::put_back(table);
    Ok(())
}

/// Tables by code are 256 KiB and more: they are kept for the next layer, since fresh memory costs more than what is
/// done with it on a small one.
mod scratch {
    use std::any::Any;
    use std::cell::RefCell;

    use super::*;

    thread_local! {
        static KEPT: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
    }

    /// As many as a thread keeps: of a large layer each piece has its own.
    const MOST: usize = 20;

    /// A table with what a former user left in it.
    fn any<T: Copy + Default + 'static>() -> Box<ByCode<T>> {
        let kept = KEPT.with_borrow_mut(|kept| {
            let place = kept.iter().position(|table| table.is::<ByCode<T>>())?;
            kept.swap_remove(place).downcast().ok()
        });
        kept.unwrap_or_else(|| vec![T::default(); CODES].try_into().ok().expect("as long as the array"))
    }

    /// A table of zeros.
    pub fn take<T: Copy + Default + 'static>() -> Box<ByCode<T>> {
        let mut table = any();
        table.fill(T::default());
        table
    }

    /// A table with these values at the bins of `histogram`, and anything elsewhere.
    pub fn filled<T: Copy + Default + 'static>(
        histogram: &Histogram,
        values: impl Iterator<Item = T>,
    ) -> Box<ByCode<T>> {
        let mut table = any();
        for (&bin, value) in histogram.bins.iter().zip(values) {
            table[bin as usize] = value;
        }
        table
    }

    pub fn put_back<T: 'static>(table: Box<ByCode<T>>) {
        KEPT.with_borrow_mut(|kept| {
            if kept.len() < MOST {
                kept.push(table);
            }
        });
    }
}

/// Size of the pieces of a tensor: at most 16, and none below 2^18 elements but the last. A multiple of 16, so that
/// pieces of a tensor whose memory is aligned are aligned.
pub(crate) fn piece(elements: usize) -> usize {
    elements.div_ceil(16).next_multiple_of(16).max(1 << 18)
}

/// The same passes through libtorch's operators, for devices other than the CPU.
mod operators {
    use super::*;

    /// The code of each element: `[elements]` Int.
    fn codes(weight: &Tensor, code: Code) -> Result<Tensor> {
        let bits = weight.f_to_kind(code.kind())?.f_contiguous()?.f_view_dtype(Kind::Int16)?;
        Ok(bits.f_to_kind(Kind::Int)?.f_bitwise_and(0xFFFFi64)?.f_view(-1)?)
    }

    fn by_code<T: Copy + Default + 'static>(values: impl Iterator<Item = T>) -> Box<ByCode<T>> {
        values.collect::<Vec<T>>().try_into().ok().expect("one for each code")
    }

    pub fn counts(weight: &Tensor, code: Code) -> Result<Box<ByCode<u32>>> {
        let counts = codes(weight, code)?.f_bincount(None::<&Tensor>, CODES as i64)?;
        Ok(by_code(Vec::<i64>::try_from(counts.f_to_device(Device::Cpu)?)?.into_iter().map(|n| n as u32)))
    }

    pub fn look_up(weight: &Tensor, code: Code, table: &ByCode<f32>) -> Result<Tensor> {
        let table = Tensor::f_from_slice(table)?.f_to_device(weight.device())?;
        Ok(table.f_index_select(0, &codes(weight, code)?)?.f_view(weight.size().as_slice())?)
    }

    pub fn add_up(weight: &Tensor, gradient: &Tensor, code: Code) -> Result<Vec<f64>> {
        let totals = codes(weight, code)?.f_bincount(Some(&gradient.f_reshape(-1)?), CODES as i64)?;
        Ok(Vec::<f64>::try_from(totals.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?)?)
    }

    pub fn combine(weight: &Tensor, code: Code, table: &ByCode<[f32; 2]>, gradient: &mut Tensor) -> Result<()> {
        let (slopes, offsets) = (by_code(table.iter().map(|row| row[0])), by_code(table.iter().map(|row| row[1])));
        let _ = gradient.f_mul_(&look_up(weight, code, &slopes)?)?;
        let _ = gradient.f_add_(&look_up(weight, code, &offsets)?)?;
        Ok(())
    }
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
        // Halfway between two numbers of bf16 (7 bits of fraction), then of f16 (10).
        let halfway = |bits: i32, odd: i32| 1.0 + odd as f32 * 0.5f32.powi(bits + 1);
        let ties =
            Tensor::from_slice(&[halfway(7, 1), halfway(7, 3), halfway(10, 1), -halfway(10, 3), 0.0, -0.0, 1e-7]);
        let weight = Tensor::cat(&[Tensor::randn([300_000], float), ties], 0);
        let gradient = Tensor::randn_like(&weight);
        for code in [Code::Bf16, Code::F16] {
            let histogram = Histogram::of(&weight, code).unwrap();
            assert_eq!(Histogram::merge(code, vec![operators::counts(&weight, code).unwrap()]).unwrap(), histogram);
            assert_eq!(histogram.total(), 300_007.0);

            // Rounding by libtorch, then the value of each code.
            let mut ours = Tensor::empty_like(&weight);
            look_up(&weight, &histogram, &histogram.values(), &mut ours).unwrap();
            assert!(ours.equal(&weight.to_kind(code.kind()).to_kind(Kind::Float)));
            let table = scratch::filled(&histogram, histogram.values().into_iter().map(|v| v as f32));
            assert!(ours.equal(&operators::look_up(&weight, code, &table).unwrap()));

            let ours = add_up(&weight, &gradient, &histogram).unwrap();
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
}
