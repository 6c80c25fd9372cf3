//! What a run minimises: the seam between the loop and the networks.

use anyhow::Result;
use tch::Tensor;

use super::trained::Networks;

/// A loss with the parts to be logged.
pub struct Loss {
    /// Scalar, with gradient.
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
    /// The loss of micro-step `index` (step · accumulation + place), a function of the seed and that number alone.
    ///
    /// # Errors
    /// The data of this batch can't be read.
    fn loss(&mut self, networks: &Networks, index: u64) -> Result<Loss>;

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
