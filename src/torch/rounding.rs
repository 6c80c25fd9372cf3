//! Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551, section 3): to the number of bf16 above or below, with
//! probabilities that make the mean the value itself.
//!
//! An update of 1e-6 to a weight of bf16, which has 8 bits, would be lost to nearest rounding every time. Random bits are
//! a hash of the element's place, so that a resumed run and every device round alike.

use anyhow::Result;
use half::bf16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::slices;

/// Shifts and multipliers of a hash of 32 bits (C. Wellons, "lowbias32", 2018): x ^= x >> s; x *= m; at the end x ^= x >> 16.
const ROUNDS: [(u32, u32); 2] = [(16, 0x7FEB_352D), (15, 0x846C_A68B)];
/// 2³² over the golden ratio: neighbouring places are far apart.
const SPREAD: u32 = 0x9E37_79B9;

/// Writes `from` (f32), rounded at random, to `to` (contiguous bf16 of its shape and device). The same `key` draws the same
/// bits. Infinities and what is no number stay what they are.
///
/// # Errors
/// When types, shapes or devices differ.
pub fn stochastic(from: &Tensor, to: &mut Tensor, key: u32) -> Result<()> {
    if from.device() != Device::Cpu {
        to.f_copy_(&by_operators(from, key)?)?;
        return Ok(());
    }
    /// Elements a thread takes at once.
    const PIECE: usize = 1 << 16;
    let from = from.f_contiguous()?;
    // SAFETY: rounding is plain Rust: no operator runs meanwhile.
    let (from, mut to) = unsafe { (slices::elements::<f32>(&from)?, slices::elements_mut::<bf16>(to)?) };
    anyhow::ensure!(from.len() == to.len(), "{} values do not fit {} places", from.len(), to.len());
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).enumerate().for_each(|(piece, (to, from))| {
        for (i, (to, from)) in to.iter_mut().zip(from).enumerate() {
            let random = hash((piece * PIECE + i) as u32, key) & 0xFFFF;
            let random = if from.is_finite() { random } else { 0 };
            *to = bf16::from_bits((from.to_bits().wrapping_add(random) >> 16) as u16);
        }
    });
    Ok(())
}

#[inline(always)]
fn hash(place: u32, key: u32) -> u32 {
    let mut x = place.wrapping_mul(SPREAD) ^ key;
    for (shift, multiplier) in ROUNDS {
        x = (x ^ (x >> shift)).wrapping_mul(multiplier);
    }
    x ^ (x >> 16)
}

/// The same with libtorch's operators, whose integers have signs.
fn by_operators(from: &Tensor, key: u32) -> Result<Tensor> {
    let signed = |bits: u32| i64::from(bits as i32);
    let shifted = |x: &Tensor, by: u32| -> Result<Tensor> {
        let moved = x.f_bitwise_right_shift_tensor_scalar(i64::from(by))?;
        Ok(moved.f_bitwise_and(signed(u32::MAX >> by))?)
    };
    let places = Tensor::f_arange(from.numel() as i64, (Kind::Int, from.device()))?;
    let mut x = places.f_mul_scalar(signed(SPREAD))?.f_bitwise_xor(signed(key))?;
    for (shift, multiplier) in ROUNDS {
        x = x.f_bitwise_xor_tensor(&shifted(&x, shift)?)?.f_mul_scalar(signed(multiplier))?;
    }
    let random = x.f_bitwise_xor_tensor(&shifted(&x, 16)?)?.f_bitwise_and(0xFFFFi64)?;
    let from = from.f_contiguous()?;
    let finite = from.f_isfinite()?.f_view(-1)?.f_to_kind(Kind::Int)?;
    let bits = from.f_view_dtype(Kind::Int)?.f_view(-1)?.f_add(&random.f_mul(&finite)?)?;
    let upper = bits.f_bitwise_right_shift_tensor_scalar(16i64)?.f_to_kind(Kind::Int16)?;
    Ok(upper.f_view_dtype(Kind::BFloat16)?.f_view(from.size().as_slice())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(from: &Tensor, key: u32) -> Tensor {
        let mut to = from.to_kind(Kind::BFloat16);
        stochastic(from, &mut to, key).unwrap();
        to
    }

    #[test]
    fn the_mean_of_many_is_the_value() {
        // A quarter of the way from 1 to the next number of bf16, 1 + 2⁻⁷; the same below zero.
        let value = 1.0 + 0.25 * 2f64.powi(-7);
        for sign in [1.0, -1.0] {
            let from = Tensor::full([400, 500], sign * value, (Kind::Float, Device::Cpu));
            let to = rounded(&from, 7).to_kind(Kind::Double);
            let off = to.mean(Kind::Double).double_value(&[]) - sign * value;
            // The standard deviation of the mean is 2⁻⁷ · √(3/16) / √200,000.
            assert!(off.abs() < 4.0 * 7.6e-6, "{off:e}");
            let up = to.eq(sign).logical_not().to_kind(Kind::Double);
            // Neighbours are drawn independently: a quarter of a quarter of the pairs are both up.
            let pairs = (up.narrow(1, 0, 499) * up.narrow(1, 1, 499)).mean(Kind::Double).double_value(&[]);
            assert!((pairs - 0.0625).abs() < 0.003, "{pairs}");
            // Those of another key are others.
            let both = (up * rounded(&from, 8).eq(sign).logical_not()).mean(Kind::Double).double_value(&[]);
            assert!((both - 0.0625).abs() < 0.003, "{both}");
        }
    }

    #[test]
    fn operators_and_the_loop_agree_and_numbers_of_bf16_stay() {
        tch::manual_seed(4);
        let odd = [0.0, -0.0, 1e-41, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65504.0, -1.5];
        let from = Tensor::cat(&[Tensor::randn([70_001], (Kind::Float, Device::Cpu)), Tensor::from_slice(&odd)], 0);
        for key in [0, 1, 0xDEAD_BEEF] {
            let bits = |tensor: Tensor| tensor.view_dtype(Kind::Int16);
            assert!(bits(rounded(&from, key)).equal(&bits(by_operators(&from, key).unwrap())));
        }
        let exact = from.to_kind(Kind::BFloat16).to_kind(Kind::Float).narrow(0, 0, 70_001);
        assert!(rounded(&exact, 3).to_kind(Kind::Float).equal(&exact));
    }
}
