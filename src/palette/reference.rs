//! Differentiable k-means as the paper has it (Cho et al. 2021, arXiv 2108.12659, section 3): every weight looks at every
//! entry. This is the definition; the fast code ([`super::clustering`], `vector`) is compared with it.
//!
//! ```text
//! a_ij = softmax_j(−|x_i − c_j|² / τ)     c_j ← Σ_i a_ij x_i / Σ_i a_ij     (T times)
//! f_i = Σ_j a_ij c_j
//! ```
//!
//! x_i: the weights, `[N, D]`, D = 1 for palettes of numbers; c_j: the entries, `[K, D]`; τ: the temperature; f_i: the soft
//! weights. With plain operators, so that autograd knows the way back; time and memory grow with N × K.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

/// The soft weights and the entries after `iterations` updates of `entries` (`[K, D]`) by `weights` (`[N, D]`), both f64.
/// Entries must not depend on weights for the gradient to be that of training, which starts from them as constants.
///
/// # Errors
/// When shapes do not fit, or libtorch's (no memory).
pub fn dkm(weights: &Tensor, entries: &Tensor, tau: f64, iterations: usize) -> Result<(Tensor, Tensor)> {
    ensure!(iterations >= 1, "at least one iteration is needed");
    let mut c = entries.shallow_clone();
    let mut log_a = Tensor::new();
    for _ in 0..iterations {
        // [N, 1, D] − [1, K, D], squared and summed: [N, K]
        let squares = weights.f_unsqueeze(1)?.f_sub(&c.f_unsqueeze(0)?)?.f_square()?;
        let distances = squares.f_sum_dim_intlist(-1i64, false, Kind::Double)?;
        log_a = (-distances / tau).f_log_softmax(1, Kind::Double)?;
        // a_ij / Σ_i a_ij is a softmax too, over the weights: it is there where all a_ij of an entry are too small for floats.
        c = log_a.f_softmax(0, Kind::Double)?.f_transpose(0, 1)?.f_matmul(weights)?;
    }
    Ok((log_a.f_exp()?.f_matmul(&c)?, c))
}
