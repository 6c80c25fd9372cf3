//! What a run minimises: the seam between the loop and the networks.

use std::ops::Range;

use anyhow::Result;
use tch::Tensor;

use super::trained::Networks;

/// Examples that one forward pass takes: rows of one batch of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The number of the batch (step · accumulation + place).
    pub batch: u64,
    /// Which of its rows, of `train_batch_size`.
    pub rows: Range<u64>,
}

impl Part {
    /// All rows of a batch of `size`.
    pub fn whole(batch: u64, size: usize) -> Self {
        Self { batch, rows: 0..size as u64 }
    }

    /// Where its examples stand in the run, which batches of `size` follow one another in.
    pub fn positions(&self, size: usize) -> Range<u64> {
        let first = self.batch * size as u64;
        first + self.rows.start..first + self.rows.end
    }
}

/// A loss with the parts to be logged.
pub struct Loss {
    /// Scalar, the mean over the examples, with gradient.
    pub total: Tensor,
    pub parts: Vec<(&'static str, Tensor)>,
}

/// How the latents of an autoencoder are spread over the data.
pub struct Latents {
    /// Of each channel, `[C]`, fp32 on the CPU.
    pub mean: Tensor,
    /// The standard deviation of all of them about the means of their channels.
    pub deviation: f64,
}

/// One kind of training.
pub trait Objective {
    /// The mean loss of some examples. Everything random about an example is a function of the seed and its position.
    ///
    /// # Errors
    /// The data of this batch can't be read.
    fn loss(&mut self, networks: &Networks, part: &Part) -> Result<Loss>;

    /// Whether the parameter of this name learns. One that does not is never given to the optimizer.
    fn learns(&self, _parameter: &str) -> bool {
        true
    }

    /// The loss on pictures that are never trained on, with noise and timesteps that never change; `None` without any.
    ///
    /// # Errors
    /// As [`Objective::loss`].
    fn validate(&mut self, networks: &Networks) -> Result<Option<f64>>;

    /// Pictures that show how far the run is, `[3, H, W]` in 0…1.
    ///
    /// # Errors
    /// A prompt can't be drawn.
    fn pictures(&mut self, networks: &Networks) -> Result<Vec<Tensor>>;

    /// The autoencoder's latents over the data, when its encoder is what learns.
    ///
    /// # Errors
    /// As [`Objective::loss`].
    fn latents(&mut self, _networks: &Networks) -> Result<Option<Latents>> {
        Ok(None)
    }
}
