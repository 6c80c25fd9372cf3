//! How many weights have each 16-bit code: all that clustering needs to know of a tensor.

use std::ops::Range;

use anyhow::{Result, ensure};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use tch::{Device, Tensor};

use super::code::{ByCode, CODES, Code};
use super::passes::{self, Master, by_type};
use super::{operators, scratch};
use crate::torch::slices::{self, piece};

/// Neighbouring codes of fixed point that a histogram has all or none of.
pub const BLOCK: usize = 32;

/// How many weights have each code, ascending by value: of f16 only codes that occur; of fixed point whole blocks of
/// 32 neighbouring codes, each with one at least that does.
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
        /// Below this many values sorting them is faster than a table of all codes.
        const FEW: usize = 1 << 13;
        let values: &[u16] = values.reinterpret_cast();
        if values.len() < FEW {
            // By the inverse of [`ascending_halves`].
            let rank = |&code: &u16| if code & 0x8000 == 0 { code | 0x8000 } else { !code };
            let mut sorted = values.to_vec();
            sorted.sort_unstable_by_key(rank);
            refuse_bad(sorted.iter().filter(|&&code| code & 0x7C00 == 0x7C00).count() as u64, Code::F16)?;
            let equal = sorted.chunk_by(|a, b| a == b);
            let (bins, counts) = equal.map(|equal| (equal[0], equal.len() as u32)).unzip();
            return Ok(Self { code: Code::F16, bins, counts });
        }
        let pieces = values.par_chunks(piece(values.len())).map(|piece| {
            let mut counts = scratch::zeros();
            piece.iter().for_each(|&code| counts[code as usize] += 1);
            counts
        });
        Self::merge(Code::F16, pieces.collect(), values.len())
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
            return Self::merge(code, vec![operators::counts(weight, code)?], weight.numel());
        }
        fn pieces<W: Master>(weight: &Tensor, code: Code) -> Result<Vec<Box<ByCode<u32>>>> {
            // SAFETY: they are counted in plain Rust: no operator runs meanwhile.
            let values = unsafe { slices::elements::<W>(weight) }?;
            let pieces = values.par_chunks(piece(values.len())).map(|piece| {
                let mut counts = scratch::zeros();
                passes::count(piece, code, &mut counts);
                counts
            });
            Ok(pieces.collect())
        }
        Self::merge(code, by_type!(pieces(&weight.f_contiguous()?, code)), weight.numel())
    }

    /// Of the counts of some pieces, which are used up; `total` is how many values they are of.
    ///
    /// # Errors
    /// When one of the codes stands for what it does not hold.
    pub(super) fn merge(code: Code, mut pieces: Vec<Box<ByCode<u32>>>, total: usize) -> Result<Self> {
        /// Blocks of the codes of finite positive numbers of f16, and where those of negative ones begin; of fixed point,
        /// where those of positive ones do.
        const FINITE: usize = 0x7C00 / BLOCK;
        const MIDDLE: usize = CODES / 2 / BLOCK;
        let mut counts = pieces.pop().unwrap_or_else(scratch::zeros);
        // Of fixed point from the middle outwards, until all are found: weights are around zero, and most blocks are empty.
        let (mut reach, mut found) = (0, 0);
        while reach < MIDDLE && (found < total || code == Code::F16) {
            for block in [MIDDLE - 1 - reach, MIDDLE + reach] {
                let block = block * BLOCK..(block + 1) * BLOCK;
                for piece in &mut pieces {
                    let both = counts[block.clone()].iter_mut().zip(&mut piece[block.clone()]);
                    both.for_each(|(sum, count)| *sum += std::mem::take(count));
                }
                found += counts[block].iter().map(|&n| n as usize).sum::<usize>();
            }
            reach += 1;
        }
        debug_assert_eq!(found, total);
        pieces.into_iter().for_each(scratch::put_back_zeros);
        let of = |blocks: Range<usize>| &counts[blocks.start * BLOCK..blocks.end * BLOCK];
        let bad: u64 = match code {
            Code::F16 => of(FINITE..MIDDLE).iter().chain(of(MIDDLE + FINITE..2 * MIDDLE)).map(|&n| u64::from(n)).sum(),
            Code::Fixed { .. } => u64::from(counts[0]) + u64::from(counts[CODES - 1]),
        };
        refuse_bad(bad, code)?;
        let mut histogram = Self { code, bins: Vec::with_capacity(1 << 12), counts: Vec::with_capacity(1 << 12) };
        match code {
            // Ascending by value: negative codes backwards, -0 before 0.
            Code::F16 => {
                (MIDDLE..MIDDLE + FINITE).rev().for_each(|block| histogram.take(&mut counts, block, true));
                (0..FINITE).for_each(|block| histogram.take(&mut counts, block, false));
            }
            Code::Fixed { .. } => {
                (MIDDLE - reach..MIDDLE + reach).for_each(|block| histogram.take(&mut counts, block, false));
            }
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
        let (mut sum, mut from) = (0.0, 0);
        for (near, &entry) in entries.iter().enumerate() {
            let to = match entries.get(near + 1) {
                Some(next) => from + values[from..].partition_point(|v| (v - entry).abs() < (v - next).abs()),
                None => values.len(),
            };
            let squares = |value: f64, n: u32| f64::from(n) * (value - entry).powi(2);
            let ((eights, rest), (counts, others)) =
                (values[from..to].as_chunks::<8>(), self.counts[from..to].as_chunks::<8>());
            let mut sums = [0.0; 8];
            for (values, counts) in eights.iter().zip(counts) {
                (0..8).for_each(|lane| sums[lane] += squares(values[lane], counts[lane]));
            }
            let rest = rest.iter().zip(others).map(|(&value, &n)| squares(value, n));
            sum += sums.into_iter().chain(rest).sum::<f64>();
            from = to;
        }
        if self.bins.is_empty() { 0.0 } else { sum / self.total() }
    }
}

/// All codes of f16 in the order of their values, -0 before 0.
pub fn ascending_halves() -> impl Iterator<Item = u16> {
    (0x8000..=0xFFFF).rev().chain(0..0x8000)
}

/// Refuses weights of which `bad` have codes that stand for what they do not hold.
fn refuse_bad(bad: u64, code: Code) -> Result<()> {
    let beyond = if code == Code::F16 { ", not numbers, or beyond the range of f16" } else { " or not numbers" };
    ensure!(bad == 0, "{bad} of its values are infinite{beyond}");
    Ok(())
}

/// The largest magnitude in a tensor of f32 or bf16 on any device; of numbers only, and 0 without any.
fn largest(weight: &Tensor) -> Result<f32> {
    if weight.device() != Device::Cpu {
        let magnitudes = weight.f_abs()?.f_nan_to_num(0.0, None, None)?;
        return Ok(if weight.numel() == 0 { 0.0 } else { magnitudes.f_max()?.f_double_value(&[])? as f32 });
    }
    fn among<W: Master>(weight: &Tensor) -> Result<f32> {
        // SAFETY: plain Rust looks at them: no operator runs meanwhile.
        let values = unsafe { slices::elements::<W>(weight) }?;
        Ok(values.par_chunks(piece(values.len())).map(passes::largest).reduce(|| 0.0, f32::max))
    }
    Ok(by_type!(among(&weight.f_contiguous()?)))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn halves_are_counted_in_the_order_of_their_values() {
        let ascending: Vec<f16> = ascending_halves().map(f16::from_bits).filter(|value| value.is_finite()).collect();
        assert_eq!(ascending.len(), 63_488);
        assert!(ascending.windows(2).all(|pair| pair[0] <= pair[1]));
        // Few are sorted, many are counted.
        let few: Vec<f16> =
            (0..8_000u32).map(|i| f16::from_bits((i * 40_503 % 0x7C00) as u16 | (i as u16) << 15)).collect();
        let many = [&few[..], &few].concat();
        let (sorted, counted) = (Histogram::of_halves(&few).unwrap(), Histogram::of_halves(&many).unwrap());
        assert_eq!(sorted.bins, counted.bins);
        assert!(sorted.counts.iter().zip(&counted.counts).all(|(few, many)| 2 * few == *many));
        for bad in [f16::NAN, f16::INFINITY] {
            let told = [[&few[..], &[bad]].concat(), [&many[..], &[bad]].concat()]
                .map(|values| Histogram::of_halves(&values).unwrap_err().to_string());
            assert_eq!(told[0], told[1]);
            assert!(told[0].starts_with("1 of its values"), "{}", told[0]);
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
