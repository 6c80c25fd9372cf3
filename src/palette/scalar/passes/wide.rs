//! The passes with AVX-512. Pointers move in steps of 16 within their slices; what is left over is done one by one with
//! the same rounding. A code, being 16 bits wide, cannot point past a table of `CODES`.

use std::arch::x86_64::*;

use super::super::code::{ByCode, Code};
use super::adamw::{AdamWStep, MomentsMut};
use super::lanes::{Floats, load, store};
use super::stored::Stored;

const LANES: usize = 16;

pub fn available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
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

/// Of as many as fit into vectors; says how many these are.
///
/// # Safety
/// AVX-512 F and VL must be there.
#[target_feature(enable = "avx512f,avx512vl")]
pub unsafe fn add_up_pairs<W: Stored>(weights: &[W], code: Code, gradient: &[W], sums: &mut ByCode<[f32; 2]>) -> usize {
    /// Elements.
    const AHEAD: usize = 512;
    assert_eq!(weights.len(), gradient.len());
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    let whole = weights.len() / LANES * LANES;
    // Each value beside its square: both are added at once. The last one is read with what follows it.
    let mut pairs = [0f32; 2 * LANES + 2];
    let mut at = [0u16; LANES];
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 ≤ the length of both; a code points into the table.
        unsafe {
            // The processor fetches ahead by itself, but not across pages of 4 KB.
            _mm_prefetch::<_MM_HINT_T0>(weights.as_ptr().wrapping_add(i + AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(gradient.as_ptr().wrapping_add(i + AHEAD).cast());
            let values = W::load(gradient.as_ptr().add(i));
            let squares = _mm512_mul_ps(values, values);
            _mm512_storeu_ps(pairs.as_mut_ptr(), _mm512_permutex2var_ps(values, low, squares));
            _mm512_storeu_ps(pairs.as_mut_ptr().add(LANES), _mm512_permutex2var_ps(values, high, squares));
            _mm256_storeu_si256(at.as_mut_ptr().cast(), codes(weights.as_ptr().add(i), code));
            for (lane, &code) in at.iter().enumerate() {
                // A row is aligned to its four-byte numbers only, which these two of all eight-byte moves allow.
                let row: *mut __m128i = sums.as_mut_ptr().add(code as usize).cast();
                let pair = _mm_loadu_ps(pairs.as_ptr().add(2 * lane));
                let sum = _mm_add_ps(_mm_castsi128_ps(_mm_loadl_epi64(row)), pair);
                _mm_storel_epi64(row, _mm_castps_si128(sum));
            }
        }
    }
    whole
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
        // SAFETY: a code points into the table; rows may be aligned to four bytes only, which is all the same to a gather.
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
    moments: &mut MomentsMut,
    step: &AdamWStep,
) -> usize {
    let MomentsMut { exp_avg, exp_avg_sq } = moments;
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
            let value = gradient.as_mut_ptr().add(i);
            let (slope, offset) = lines(codes(weights.as_ptr().add(i), code), table);
            let product = _mm512_mul_ps(W::load(value), slope);
            W::store(value, _mm512_add_ps(product, offset), false);
        }
    }
    for i in whole..weights.len() {
        let [slope, offset] = table[code_of(weights[i], code)];
        gradient[i] = W::of_f32(slope * gradient[i].to_f32() + offset);
    }
}
