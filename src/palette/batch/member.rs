//! One layer of a batch.

use tch::{Device, Kind, Tensor};

use super::kernels;
use crate::palette::DkmLayer;

/// One layer of a batch: a weight with what the network sees of it and what AdamW keeps, contiguous, of one type and device.
pub struct Member<'a> {
    pub layer: &'a mut DkmLayer,
    pub weight: &'a Tensor,
    /// Written to.
    pub soft: &'a Tensor,
    /// The moving means of gradients and of their squares.
    pub moments: [&'a Tensor; 2],
}

impl Member<'_> {
    /// Whether a batch on CUDA can take it.
    pub fn fits(&self) -> bool {
        let [exp_avg, exp_avg_sq] = self.moments;
        let of_a_kind = [self.soft, exp_avg, exp_avg_sq].into_iter().all(|tensor| {
            tensor.kind() == self.weight.kind()
                && tensor.device() == self.weight.device()
                && tensor.numel() == self.weight.numel()
                && tensor.is_contiguous()
        });
        of_a_kind
            && matches!(self.weight.device(), Device::Cuda(_))
            && matches!(self.weight.kind(), Kind::Float | Kind::BFloat16)
            && self.weight.is_contiguous()
            && self.layer.is_for_batches()
    }

    pub(super) fn addresses(&self) -> kernels::Layer {
        let [weight, soft, exp_avg, exp_avg_sq] = self.identity().map(|address| address as u64);
        let brain = u64::from(self.weight.kind() == Kind::BFloat16);
        kernels::Layer { weight, soft, exp_avg, exp_avg_sq, brain }
    }

    pub(super) fn identity(&self) -> Identity {
        let [exp_avg, exp_avg_sq] = self.moments;
        [self.weight, self.soft, exp_avg, exp_avg_sq].map(|tensor| tensor.data_ptr() as usize)
    }
}

/// Which memory a member has.
pub(super) type Identity = [usize; 4];

/// What a layer's gradient came to.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The sum of the squares of ∂L/∂w; 0 without a gradient.
    pub square: f64,
    /// Mean squared error of the weights if palettes were made of the new entries now.
    pub hard_error: f64,
}
