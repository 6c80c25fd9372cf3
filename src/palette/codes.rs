//! Weights seen through a 16-bit code: how many there are of each code, a value looked up for each, sums for each.
//!
//! These are the only passes that touch every weight; what happens between them happens on at most 65,536 bins. Each
//! splits its tensor into pieces that depend on its size alone and merges them in order, so that results do not depend
//! on the number of threads.

use anyhow::{Result, ensure};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::torch::slices;

/// How many values a 16-bit code has.
pub const CODES: usize = 1 << 16;

/// Codes are made a block at a time, in the first-level cache.
const BLOCK: usize = 1024;

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

    fn is_finite(self, code: u16) -> bool {
        match self {
            Code::Bf16 => bf16::from_bits(code).is_finite(),
            Code::F16 => f16::from_bits(code).is_finite(),
        }
    }

    /// All codes of finite values, ascending by value (-0 before 0).
    fn ascending(self) -> impl Iterator<Item = u16> {
        (0x8000..=0xFFFFu16).rev().chain(0..=0x7FFF).filter(move |&code| self.is_finite(code))
    }

    fn kind(self) -> Kind {
        match self {
            Code::Bf16 => Kind::BFloat16,
            Code::F16 => Kind::Half,
        }
    }

    /// Codes of `values`, at most [`BLOCK`] of them.
    #[inline]
    fn encode<'b>(self, values: &[f32], buffer: &'b mut [f16; BLOCK]) -> &'b [u16] {
        let buffer = &mut buffer[..values.len()];
        match self {
            Code::F16 => buffer.convert_from_f32_slice(values),
            Code::Bf16 => {
                let codes: &mut [u16] = buffer.reinterpret_cast_mut();
                for (code, value) in codes.iter_mut().zip(values) {
                    let bits = value.to_bits();
                    // To nearest even. A NaN may come out as an infinity: both are refused alike.
                    let infinite = bits & 0x7F80_0000 == 0x7F80_0000;
                    let rounded = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
                    *code = if infinite { 0x7F80 } else { rounded };
                }
            }
        }
        buffer.reinterpret_cast()
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
        let pieces: Vec<Vec<u32>> = values
            .par_chunks(piece(values.len()))
            .map(|piece| {
                let mut counts = vec![0u32; CODES];
                piece.iter().for_each(|&code| counts[code as usize] += 1);
                counts
            })
            .collect();
        Self::merge(Code::F16, &pieces)
    }

    /// Of a tensor of f32 on any device.
    ///
    /// # Errors
    /// When a value is infinite, not a number, or beyond what the code can hold.
    pub fn of(weight: &Tensor, code: Code) -> Result<Self> {
        if weight.device() != Device::Cpu {
            return Self::merge(code, &[operators::counts(weight, code)?]);
        }
        let weight = weight.f_contiguous()?;
        let values = slices::floats(&weight)?;
        let pieces: Vec<Vec<u32>> = values
            .par_chunks(piece(values.len()))
            .map(|piece| {
                let mut counts = vec![0u32; CODES];
                let mut buffer = [f16::ZERO; BLOCK];
                for block in piece.chunks(BLOCK) {
                    code.encode(block, &mut buffer).iter().for_each(|&code| counts[code as usize] += 1);
                }
                counts
            })
            .collect();
        Self::merge(code, &pieces)
    }

    fn merge(code: Code, pieces: &[Vec<u32>]) -> Result<Self> {
        let count = |code: u16| pieces.iter().map(|piece| piece[code as usize]).sum::<u32>();
        let bad: u64 = (0..=0xFFFF).filter(|&c| !code.is_finite(c)).map(|c| count(c) as u64).sum();
        ensure!(bad == 0, "{bad} of its values are infinite, not numbers, or beyond the range of {code:?}");
        let (bins, counts) = code.ascending().map(|code| (code, count(code))).filter(|&(_, n)| n > 0).unzip();
        Ok(Self { code, bins, counts })
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

/// For each element of `weight` (f32) the value of its code in `table` (by code): a new tensor of its shape.
pub fn gather(weight: &Tensor, code: Code, table: &[f32]) -> Result<Tensor> {
    if weight.device() != Device::Cpu {
        return operators::gather(weight, code, table);
    }
    let weight = weight.f_contiguous()?;
    let mut result = Tensor::f_empty(weight.size(), (Kind::Float, Device::Cpu))?;
    let (from, to) = (slices::floats(&weight)?, slices::floats_mut(&mut result)?);
    let size = piece(from.len());
    to.par_chunks_mut(size).zip(from.par_chunks(size)).for_each(|(to, from)| {
        let mut buffer = [f16::ZERO; BLOCK];
        for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
            for (to, &code) in to.iter_mut().zip(code.encode(from, &mut buffer)) {
                *to = table[code as usize];
            }
        }
    });
    Ok(result)
}

/// Sums of `upstream` (f32, the shape of `weight`) over the weights of each bin of `histogram`, which is the weight's.
pub fn sums(weight: &Tensor, upstream: &Tensor, histogram: &Histogram) -> Result<Vec<f64>> {
    let code = histogram.code;
    if weight.device() != Device::Cpu {
        let totals = operators::sums(weight, upstream, code)?;
        return Ok(histogram.bins.iter().map(|&bin| totals[bin as usize]).collect());
    }
    let (weight, upstream) = (weight.f_contiguous()?, upstream.f_contiguous()?);
    let (weights, upstream) = (slices::floats(&weight)?, slices::floats(&upstream)?);
    let size = piece(weights.len());
    let pieces: Vec<Vec<f64>> = weights
        .par_chunks(size)
        .zip(upstream.par_chunks(size))
        .map(|(weights, upstream)| {
            let mut totals = vec![0f64; CODES];
            let mut buffer = [f16::ZERO; BLOCK];
            for (weights, upstream) in weights.chunks(BLOCK).zip(upstream.chunks(BLOCK)) {
                for (&code, &value) in code.encode(weights, &mut buffer).iter().zip(upstream) {
                    totals[code as usize] += value as f64;
                }
            }
            totals
        })
        .collect();
    Ok(histogram.bins.iter().map(|&bin| pieces.iter().map(|piece| piece[bin as usize]).sum()).collect())
}

/// `slope · upstream + offset` for each element of `weight`, with the (slope, offset) of its code in `table`: a new
/// tensor of its shape.
pub fn combine(weight: &Tensor, upstream: &Tensor, code: Code, table: &[(f32, f32)]) -> Result<Tensor> {
    if weight.device() != Device::Cpu {
        return operators::combine(weight, upstream, code, table);
    }
    let (weight, upstream) = (weight.f_contiguous()?, upstream.f_contiguous()?);
    let mut result = Tensor::f_empty(weight.size(), (Kind::Float, Device::Cpu))?;
    let (weights, upstream) = (slices::floats(&weight)?, slices::floats(&upstream)?);
    let to = slices::floats_mut(&mut result)?;
    let size = piece(weights.len());
    to.par_chunks_mut(size).zip(weights.par_chunks(size)).zip(upstream.par_chunks(size)).for_each(
        |((to, weights), upstream)| {
            let mut buffer = [f16::ZERO; BLOCK];
            for ((to, weights), upstream) in to.chunks_mut(BLOCK).zip(weights.chunks(BLOCK)).zip(upstream.chunks(BLOCK))
            {
                let codes = code.encode(weights, &mut buffer);
                for ((to, &code), &value) in to.iter_mut().zip(codes).zip(upstream) {
                    let (slope, offset) = table[code as usize];
                    *to = slope * value + offset;
                }
            }
        },
    );
    Ok(result)
}

/// Size of the pieces of a tensor: at most 16, and none below 2^18 elements but the last.
pub(crate) fn piece(elements: usize) -> usize {
    elements.div_ceil(16).max(1 << 18)
}

/// The same passes through libtorch's operators, for devices other than the CPU.
mod operators {
    use super::*;

    /// The code of each element: `[elements]` Int.
    fn codes(weight: &Tensor, code: Code) -> Result<Tensor> {
        let bits = weight.f_to_kind(code.kind())?.f_contiguous()?.f_view_dtype(Kind::Int16)?;
        Ok(bits.f_to_kind(Kind::Int)?.f_bitwise_and(0xFFFFi64)?.f_view(-1)?)
    }

    fn look_up(codes: &Tensor, table: &[f32], shape: &[i64]) -> Result<Tensor> {
        let table = Tensor::f_from_slice(table)?.f_to_device(codes.device())?;
        Ok(table.f_index_select(0, codes)?.f_view(shape)?)
    }

    pub fn counts(weight: &Tensor, code: Code) -> Result<Vec<u32>> {
        let counts = codes(weight, code)?.f_bincount(None::<&Tensor>, CODES as i64)?;
        Ok(Vec::<i64>::try_from(counts.f_to_device(Device::Cpu)?)?.iter().map(|&n| n as u32).collect())
    }

    pub fn gather(weight: &Tensor, code: Code, table: &[f32]) -> Result<Tensor> {
        look_up(&codes(weight, code)?, table, &weight.size())
    }

    pub fn sums(weight: &Tensor, upstream: &Tensor, code: Code) -> Result<Vec<f64>> {
        let totals = codes(weight, code)?.f_bincount(Some(&upstream.f_reshape(-1)?), CODES as i64)?;
        Ok(Vec::<f64>::try_from(totals.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?)?)
    }

    pub fn combine(weight: &Tensor, upstream: &Tensor, code: Code, table: &[(f32, f32)]) -> Result<Tensor> {
        let (codes, shape) = (codes(weight, code)?, weight.size());
        let (slopes, offsets): (Vec<f32>, Vec<f32>) = table.iter().copied().unzip();
        Ok(look_up(&codes, &offsets, &shape)?.f_addcmul(&look_up(&codes, &slopes, &shape)?, upstream)?)
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
        let upstream = Tensor::randn_like(&weight);
        for code in [Code::Bf16, Code::F16] {
            let histogram = Histogram::of(&weight, code).unwrap();
            assert_eq!(Histogram::merge(code, &[operators::counts(&weight, code).unwrap()]).unwrap(), histogram);
            assert_eq!(histogram.total(), 300_007.0);

            let table: Vec<f32> = (0..CODES).map(|i| (i as f32).sin()).collect();
            let ours = gather(&weight, code, &table).unwrap();
            assert!(ours.equal(&operators::gather(&weight, code, &table).unwrap()));
            // Rounding by libtorch, then the value of each code.
            let values: Vec<f32> = (0..=0xFFFF).map(|c| code.value(c) as f32).collect();
            let rounded = weight.to_kind(code.kind()).to_kind(Kind::Float);
            assert!(gather(&weight, code, &values).unwrap().equal(&rounded));

            let ours = sums(&weight, &upstream, &histogram).unwrap();
            let theirs = operators::sums(&weight, &upstream, code).unwrap();
            assert!(histogram.bins.iter().zip(&ours).all(|(&bin, sum)| (sum - theirs[bin as usize]).abs() < 1e-3));
            let total = upstream.sum(Kind::Double).double_value(&[]);
            assert!((ours.iter().sum::<f64>() - total).abs() < 1e-6 * 300_000f64.sqrt());

            let rows: Vec<(f32, f32)> = (0..CODES).map(|i| ((i as f32).sin(), (i as f32).cos())).collect();
            let ours = combine(&weight, &upstream, code, &rows).unwrap();
            let theirs = operators::combine(&weight, &upstream, code, &rows).unwrap();
            assert!((ours - theirs).abs().max().double_value(&[]) < 1e-5);
        }
    }
}
