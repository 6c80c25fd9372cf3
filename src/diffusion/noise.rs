//! Where the noise of pictures comes from: a function of seed and picture, not of how many are drawn together.

use std::ops::Range;

use tch::Tensor;

use crate::torch::random::{Purpose, generator, normal};

/// Where the noise comes from: what a picture begins with, and what some samplers add at each step.
#[derive(Debug)]
pub enum Noise {
    /// Picture i is drawn from the i-th stream of this seed: the same on every device, however many are drawn.
    Seed(u64),
    /// Picture i is the first of the i-th seed.
    Seeds(Vec<u64>),
    /// Initial noise of unit variance `[N, C, h, w]`; what is added later comes from the seed, as for [`Self::Seed`].
    Latents(Tensor, u64),
}

impl Noise {
    /// Seed and number of a picture.
    fn source(&self, picture: usize) -> (u64, u64) {
        match self {
            Self::Seed(seed) | Self::Latents(_, seed) => (*seed, picture as u64),
            Self::Seeds(seeds) => (seeds.get(picture).copied().unwrap_or_default(), 0),
        }
    }

    /// What pictures of `shape` begin with, `[pictures, …]` fp32 on the CPU; not for given latents.
    pub fn initial(&self, pictures: usize, shape: &[i64]) -> Tensor {
        let one = |picture: usize| {
            let (seed, picture) = self.source(picture);
            normal(&mut generator(seed, Purpose::Picture, picture), shape)
        };
        Tensor::stack(&(0..pictures).map(one).collect::<Vec<_>>(), 0)
    }

    /// The noise number `draw` that a sampler adds to these pictures: `[pictures, …]`, shaped like `like` and where it is.
    pub fn added(&self, pictures: Range<usize>, draw: usize, like: &Tensor) -> Tensor {
        let shape = &like.size()[1..];
        let one = |picture: usize| {
            let (seed, picture) = self.source(picture);
            normal(&mut generator(seed, Purpose::Sampler, picture << 20 | draw as u64), shape)
        };
        Tensor::stack(&pictures.map(one).collect::<Vec<_>>(), 0).to_device(like.device())
    }
}
