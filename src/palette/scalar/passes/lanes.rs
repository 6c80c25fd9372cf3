//! Sixteen weights at a time with AVX-512: how they are read and written.

use std::arch::x86_64::*;

/// 16 of them.
pub type Floats = __m512;

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
    unsafe { if streamed { _mm256_stream_si256(to.cast(), halves) } else { _mm256_storeu_si256(to.cast(), halves) } }
}
