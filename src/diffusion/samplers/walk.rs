//! What a sampler is: the part that `sampler` and each of the samplers' files share.

use anyhow::Result;
use tch::Tensor;

/// The network as a sampler sees it: the (already scaled) latents and the timestep, which may be fractional, to the
/// network's output, guidance included.
pub type Model<'m> = dyn FnMut(&Tensor, f64) -> Result<Tensor> + 'm;

/// Fresh noise of unit variance, shaped like the latents, by the number of the draw (0, 1, …): the same number is the
/// same noise. A sampler that adds noise asks for each number once.
pub type Draws<'d> = dyn FnMut(usize) -> Result<Tensor> + 'd;

/// Where a sampler evaluates the network, how large it wants the noise, and its walk.
pub(super) trait Walk {
    /// The timesteps in the order in which the network is asked; a sampler may ask more often than there are steps.
    fn timesteps(&self) -> Vec<f64>;
    /// What noise of unit variance is multiplied by.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }
    /// From the scaled noise to x₀.
    fn walk(&self, x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor>;
}
