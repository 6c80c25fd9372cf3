//! The passes over the weights, on plain slices: count codes, look values up, add a gradient up by code, and combine, alone
//! or with a step of AdamW.
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

/// Adds to `sums`, by the code of each weight, its element of `gradient`, which is as long as `weights`, and where there is
/// place the square of that.
pub fn add_up<W: Stored, const N: usize>(weights: &[W], code: Code, gradient: &[W], sums: &mut ByCode<[f32; N]>) {
    assert_eq!(weights.len(), gradient.len());
    for (block, gradient) in weights.chunks(BLOCK).zip(gradient.chunks(BLOCK)) {
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

/// What AdamW keeps of some weights: the moving means of gradients and of their squares.
pub struct MomentsMut<'a> {
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
}

/// [`combine`], of which the result goes into a step of AdamW instead of memory. All slices are as long as `weights`.
pub fn combine_and_step(
    weights: &mut [f32],
    code: Code,
    table: &ByCode<[f32; 2]>,
    gradient: &[f32],
    moments: MomentsMut,
    step: &AdamWStep,
) {
    let MomentsMut { exp_avg, exp_avg_sq } = moments;
    for length in [gradient.len(), exp_avg.len(), exp_avg_sq.len()] {
        assert_eq!(length, weights.len());
    }
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    let done = if wide::available() {
        // SAFETY: the features that the function needs are there; the slices are of one length.
        unsafe { wide::combine_and_step(weights, code, table, gradient, exp_avg, exp_avg_sq, step) }
    } else {
        done
    };
    let mut codes = [0; BLOCK];
    for start in (done..weights.len()).step_by(BLOCK) {
        let end = weights.len().min(start + BLOCK);
        let codes = &mut codes[..end - start];
        with_codes(&weights[start..end], code, |of_block| codes.copy_from_slice(of_block));
        for (i, &mut code) in (start..end).zip(codes) {
            let [slope, offset] = table[code as usize];
            let gradient = (slope * gradient[i] + offset) * step.factor;
            exp_avg[i] += (gradient - exp_avg[i]) * step.rate_of_mean;
            exp_avg_sq[i] = exp_avg_sq[i] * step.beta2 + gradient * gradient * step.rate_of_square;
            let away = exp_avg[i] * step.size / (exp_avg_sq[i].sqrt() * step.root + step.eps);
            weights[i] = weights[i] * step.decay - away;
        }
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

    use super::{AdamWStep, ByCode, Code, Stored};

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
        codes_of(unsafe { W::load(weights) }, code)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn codes_of(values: Floats, code: Code) -> __m256i {
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

    /// Slope and offset of each code.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn lines(codes: __m256i, table: &ByCode<[f32; 2]>) -> (Floats, Floats) {
        let slopes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let offsets = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        // Each row of the table is fetched as one number of 64 bits.
        let fetch = |half| {
            let at = _mm256_cvtepu16_epi32(half);
            // SAFETY: a code points into the table.
            _mm512_castpd_ps(unsafe { _mm512_i32gather_pd::<8>(at, table.as_ptr().cast()) })
        };
        let (low, high) = (fetch(_mm256_castsi256_si128(codes)), fetch(_mm256_extracti128_si256::<1>(codes)));
        (_mm512_permutex2var_ps(low, slopes, high), _mm512_permutex2var_ps(low, offsets, high))
    }

    /// Of as many as fit into vectors; says how many these are.
    ///
    /// # Safety
    /// AVX-512 F and VL must be there; all slices are as long as `weights`.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn combine_and_step(
        weights: &mut [f32],
        code: Code,
        table: &ByCode<[f32; 2]>,
        gradient: &[f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        step: &AdamWStep,
    ) -> usize {
        let all = |value: f32| _mm512_set1_ps(value);
        let (factor, decay, eps) = (all(step.factor), all(step.decay), all(step.eps));
        let (rate_of_mean, beta2, rate_of_square) = (all(step.rate_of_mean), all(step.beta2), all(step.rate_of_square));
        let (size, root) = (all(step.size), all(step.root));
        let whole = weights.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            // SAFETY: i + 16 ≤ the length of all.
            unsafe {
                let (at, mean_at, square_at) =
                    (weights.as_mut_ptr().add(i), exp_avg.as_mut_ptr().add(i), exp_avg_sq.as_mut_ptr().add(i));
                let weight = load(at);
                let (slope, offset) = lines(codes_of(weight, code), table);
                let gradient = _mm512_add_ps(_mm512_mul_ps(slope, load(gradient.as_ptr().add(i))), offset);
                let gradient = _mm512_mul_ps(gradient, factor);
                let mean = load(mean_at);
                let mean = _mm512_add_ps(mean, _mm512_mul_ps(_mm512_sub_ps(gradient, mean), rate_of_mean));
                let square = _mm512_mul_ps(_mm512_mul_ps(gradient, gradient), rate_of_square);
                let square = _mm512_add_ps(_mm512_mul_ps(load(square_at), beta2), square);
                let below = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(square), root), eps);
                let away = _mm512_div_ps(_mm512_mul_ps(mean, size), below);
                store(mean_at, mean, false);
                store(square_at, square, false);
                store(at, _mm512_sub_ps(_mm512_mul_ps(weight, decay), away), false);
            }
        }
        whole
    }

    /// # Safety
    /// AVX-512 F and VL must be there.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn combine<W: Stored>(weights: &[W], code: Code, table: &ByCode<[f32; 2]>, gradient: &mut [W]) {
        assert_eq!(weights.len(), gradient.len());
        let whole = weights.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            // SAFETY: i + 16 ≤ the length of both.
            unsafe {
                let (slope, offset) = lines(codes(weights.as_ptr().add(i), code), table);
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
            for start in (0..weights.len()).step_by(at_once) {
                let range = start..weights.len().min(start + at_once);
                let moments =
                    MomentsMut { exp_avg: &mut exp_avg[range.clone()], exp_avg_sq: &mut exp_avg_sq[range.clone()] };
                combine_and_step(&mut weights[range.clone()], code, table, &gradient[range], moments, &step);
            }
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
