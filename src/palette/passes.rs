//! The four passes over the weights, on plain slices: count codes, look values up, add a gradient up by code, combine.
//!
//! Everything else about clustering happens on at most 65,536 bins, so these are what a training step pays for every
//! weight: 32 bytes of memory traffic (half of that in bf16) and a few instructions. With AVX-512 (found at run time) codes are made and tables
//! are read sixteen weights at a time; elsewhere plain loops do the same. Both give the same bits.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::codes::{CODES, Code};
use crate::torch::slices::Element;

/// Codes are made a block at a time, in the first-level cache.
const BLOCK: usize = 1024;

/// One value for every code.
pub type ByCode<T> = [T; CODES];

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
    unsafe fn load(from: *const Self) -> wide::Floats;

    /// Writes 16 of them, past the caches if `streamed`.
    ///
    /// # Safety
    /// They are writable at `to`, a multiple of the size of all 16 if `streamed`; AVX-512 F and VL are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store(to: *mut Self, values: wide::Floats, streamed: bool);
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
    unsafe fn load(from: *const Self) -> wide::Floats {
        // SAFETY: the caller's promise.
        unsafe { wide::load(from) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(to: *mut Self, values: wide::Floats, streamed: bool) {
        // SAFETY: the caller's promise.
        unsafe { wide::store(to, values, streamed) }
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
    unsafe fn load(from: *const Self) -> wide::Floats {
        // SAFETY: the caller's promise.
        unsafe { wide::load_brain(from.cast()) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(to: *mut Self, values: wide::Floats, streamed: bool) {
        // SAFETY: the caller's promise.
        unsafe { wide::store_brain(to.cast(), values, streamed) }
    }
}

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

/// Adds to `sums`, by the code of each weight, its element of `gradient`, which is as long as `weights`.
pub fn add_up<W: Stored>(weights: &[W], code: Code, gradient: &[W], sums: &mut ByCode<f32>) {
    assert_eq!(weights.len(), gradient.len());
    for (block, gradient) in weights.chunks(BLOCK).zip(gradient.chunks(BLOCK)) {
        with_codes(block, code, |codes| {
            codes.iter().zip(gradient).for_each(|(&code, value)| sums[code as usize] += value.to_f32());
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

/// Of a weight in steps: to nearest, ties to even. What is no number or does not fit comes out as the first code or the
/// last, which no weight has.
#[inline]
pub fn fixed_code(steps: f32) -> u16 {
    let rounded = steps.round_ties_even();
    // As the processor converts: what no i32 holds is the least of them.
    let whole = if rounded < 2f32.powi(31) { rounded as i32 } else { i32::MIN };
    (whole.clamp(i16::MIN.into(), i16::MAX.into()) + 0x8000) as u16
}

/// The same with AVX-512. Pointers move in steps of 16 within their slices; what is left over is done one by one with
/// the same rounding. A code, being 16 bits wide, cannot point past a table of [`CODES`].
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    use super::{ByCode, Code, Stored};

    const LANES: usize = 16;

    /// 16 of them.
    pub type Floats = __m512;

    pub fn available() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
    }

    /// # Safety
    /// 16 floats are readable at `from`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn load(from: *const f32) -> Floats {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    /// # Safety
    /// 16 floats are writable at `to`, a multiple of 64 if `streamed`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn store(to: *mut f32, values: Floats, streamed: bool) {
        // SAFETY: the caller's promise.
        unsafe { if streamed { _mm512_stream_ps(to, values) } else { _mm512_storeu_ps(to, values) } }
    }

    /// # Safety
    /// 16 numbers of bf16 are readable at `from`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn load_brain(from: *const u16) -> Floats {
        // SAFETY: the caller's promise.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }

    /// # Safety
    /// 16 numbers of bf16 are writable at `to`, a multiple of 32 if `streamed`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn store_brain(to: *mut u16, values: Floats, streamed: bool) {
        let bits = _mm512_castps_si512(values);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        // What is no number stays none.
        let none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        let kept = _mm512_mask_or_epi32(nearest, none, bits, _mm512_set1_epi32(0x0040_0000));
        let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(kept));
        // SAFETY: the caller's promise.
        unsafe {
            if streamed { _mm256_stream_si256(to.cast(), halves) } else { _mm256_storeu_si256(to.cast(), halves) }
        }
    }

    /// The codes of 16 weights.
    ///
    /// # Safety
    /// 16 are readable at `weights`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn codes<W: Stored>(weights: *const W, code: Code) -> __m256i {
        // SAFETY: the caller's promise.
        let values = unsafe { W::load(weights) };
        match code {
            Code::F16 => _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(values),
            Code::Fixed { step } => {
                let whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(1.0 / step)));
                _mm256_xor_si256(_mm512_cvtsepi32_epi16(whole), _mm256_set1_epi16(i16::MIN))
            }
        }
    }

    /// The code of one weight, for the ends of slices.
    #[target_feature(enable = "avx512f,avx512vl")]
    fn code_of<W: Stored>(weight: W, code: Code) -> usize {
        let block = [weight; LANES];
        // SAFETY: 16 are there.
        _mm256_extract_epi16::<0>(unsafe { codes(block.as_ptr(), code) }) as u16 as usize
    }

    /// # Safety
    /// AVX-512 F and VL must be there.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn encode<W: Stored>(weights: &[W], code: Code, to: &mut [u16]) {
        assert_eq!(weights.len(), to.len());
        let whole = weights.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            // SAFETY: i + 16 ≤ the length of both.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().add(i).cast(), codes(weights.as_ptr().add(i), code)) };
        }
        for i in whole..weights.len() {
            to[i] = code_of(weights[i], code) as u16;
        }
    }

    /// # Safety
    /// AVX-512 F and VL must be there.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn look_up<W: Stored>(weights: &[W], code: Code, table: &ByCode<f32>, to: &mut [W]) {
        assert_eq!(weights.len(), to.len());
        // Past the caches when nobody will find it there, so that the old content of the lines need not be read first.
        const STREAM_FROM: usize = 1 << 17;
        let streamed = to.len() >= STREAM_FROM && (to.as_ptr() as usize).is_multiple_of(64);
        let whole = weights.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            // SAFETY: i + 16 ≤ the length of both; a streaming store is aligned, 64 bytes or 32 a step.
            unsafe {
                let at = _mm512_cvtepu16_epi32(codes(weights.as_ptr().add(i), code));
                let values = _mm512_i32gather_ps::<4>(at, table.as_ptr());
                W::store(to.as_mut_ptr().add(i), values, streamed);
            }
        }
        _mm_sfence();
        for i in whole..weights.len() {
            to[i] = W::of_f32(table[code_of(weights[i], code)]);
        }
    }

    /// # Safety
    /// AVX-512 F and VL must be there.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn combine<W: Stored>(weights: &[W], code: Code, table: &ByCode<[f32; 2]>, gradient: &mut [W]) {
        assert_eq!(weights.len(), gradient.len());
        let slopes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let offsets = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        let whole = weights.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            // SAFETY: i + 16 ≤ the length of both.
            unsafe {
                let codes = codes(weights.as_ptr().add(i), code);
                // Each row of the table is fetched as one number of 64 bits.
                let fetch = |half| {
                    let at = _mm256_cvtepu16_epi32(half);
                    _mm512_castpd_ps(_mm512_i32gather_pd::<8>(at, table.as_ptr().cast()))
                };
                let (low, high) = (fetch(_mm256_castsi256_si128(codes)), fetch(_mm256_extracti128_si256::<1>(codes)));
                let slope = _mm512_permutex2var_ps(low, slopes, high);
                let offset = _mm512_permutex2var_ps(low, offsets, high);
                let value = gradient.as_mut_ptr().add(i);
                let product = _mm512_mul_ps(W::load(value), slope);
                W::store(value, _mm512_add_ps(product, offset), false);
            }
        }
        for i in whole..weights.len() {
            let [slope, offset] = table[code_of(weights[i], code)];
            gradient[i] = W::of_f32(slope * gradient[i].to_f32() + offset);
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn sums_and_combinations_are_by_code() {
        let weights: Vec<f32> = (0..1_234).map(|i| (i % 5) as f32 - 2.0).collect();
        let gradient: Vec<f32> = (0..1_234).map(|i| i as f32).collect();
        for code in [Code::F16, Code::Fixed { step: 0.25 }] {
            let mut sums = vec![0f32; CODES];
            add_up(&weights, code, &gradient, sums.as_mut_slice().try_into().unwrap());
            let mut table = vec![[0f32; 2]; CODES];
            for value in -2i32..=2 {
                let at = code.of(value as f32) as usize;
                assert_eq!(sums[at], (0..1_234).filter(|i| i % 5 - 2 == value).sum::<i32>() as f32);
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
