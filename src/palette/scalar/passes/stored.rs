//! What master weights may be stored as.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::lanes;
use crate::torch::slices::Element;

/// Codes are made a block at a time, in the first-level cache.
pub const BLOCK: usize = 1024;

/// What master weights, and with them soft weights and gradients, are stored as: f32, or bf16, which is read exactly and
/// written to nearest, ties to even.
pub trait Stored: Element {
    /// The values of at most [`BLOCK`] elements, in `buffer` if they must be put somewhere.
    fn floats<'a>(block: &'a [Self], buffer: &'a mut [f32; BLOCK]) -> &'a [f32];
    fn to_f32(self) -> f32;
    fn of_f32(value: f32) -> Self;

    /// 16 of them.
    ///
    /// # Safety
    /// They are readable at `from`; AVX-512 F and VL are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self) -> lanes::Floats;

    /// Writes 16 of them, past the caches if `streamed`.
    ///
    /// # Safety
    /// They are writable at `to`, a multiple of the size of all 16 if `streamed`; AVX-512 F and VL are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store(to: *mut Self, values: lanes::Floats, streamed: bool);
}

impl Stored for f32 {
    fn floats<'a>(block: &'a [Self], _: &'a mut [f32; BLOCK]) -> &'a [f32] {
        block
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self) -> lanes::Floats {
        // SAFETY: the caller's promise.
        unsafe { lanes::load(from) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(to: *mut Self, values: lanes::Floats, streamed: bool) {
        // SAFETY: the caller's promise.
        unsafe { lanes::store(to, values, streamed) }
    }
}

impl Stored for bf16 {
    fn floats<'a>(block: &'a [Self], buffer: &'a mut [f32; BLOCK]) -> &'a [f32] {
        let floats = &mut buffer[..block.len()];
        floats.iter_mut().zip(block).for_each(|(float, value)| *float = value.to_f32());
        floats
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // `half`'s own looks for numbers that aren't any, which a shift keeps as they are.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self) -> lanes::Floats {
        // SAFETY: the caller's promise.
        unsafe { lanes::load_brain(from.cast()) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(to: *mut Self, values: lanes::Floats, streamed: bool) {
        // SAFETY: the caller's promise.
        unsafe { lanes::store_brain(to.cast(), values, streamed) }
    }
}

/// Calls a function of [`Stored`] for what its first argument, a tensor, holds.
macro_rules! by_type {
    ($function:ident $([$n:ident])? ($weight:expr $(, $more:expr)*)) => {{
        let weight = $weight;
        match weight.f_kind()? {
            tch::Kind::BFloat16 => $function::<half::bf16 $(, $n)?>(weight $(, $more)*)?,
            _ => $function::<f32 $(, $n)?>(weight $(, $more)*)?,
        }
    }};
}
pub(crate) use by_type;
