//! One step of AdamW, as numbers that are the same for all weights.

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
