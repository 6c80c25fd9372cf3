//! Random numbers as functions of (seed, stream): the same on every device, at every thread count, in every process, and
//! after a resumed run. No generator state is kept anywhere: an example's noise is asked for by the example's position in
//! the run, so that it does not matter how examples are grouped into batches.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

/// What a stream of random numbers is for: streams of different purposes never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial values of a network trained from scratch.
    Initial = 1,
    /// Noise added to latents.
    Noise = 2,
    /// Timesteps of training.
    Timesteps = 3,
    /// Draws from the autoencoder's posterior.
    Posterior = 4,
    /// Dropped captions, flips, crops.
    Augment = 5,
    /// Noise and timesteps of validation.
    Validation = 6,
    /// Initial noise of pictures.
    Picture = 7,
    /// Order of the data.
    Order = 8,
    /// Crops of pictures.
    Crop = 9,
    /// Of master weights in bf16.
    Rounding = 10,
    /// Noise that samplers add between their steps.
    Sampler = 11,
    /// Prompts drawn again, for intervals.
    Resample = 12,
}

/// The generator of the `index`-th stream of a purpose.
pub fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(((purpose as u64) << 56) | (index & ((1 << 56) - 1)));
    generator
}

/// Uniform in [0, 1), 53 bits.
pub fn uniform(generator: &mut impl Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal values of this shape, fp32 on the CPU (Box and Muller, 1958).
pub fn normal(generator: &mut impl Rng, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 − u is in (0, 1]: its logarithm is finite.
        let radius = (-2.0 * (1.0 - uniform(generator)).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform(generator)).sin_cos();
        values.push((radius * cos) as f32);
        values.push((radius * sin) as f32);
    }
    Tensor::from_slice(&values[..count]).view(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_values_have_unit_variance_and_streams_differ() {
        let a = normal(&mut generator(1, Purpose::Noise, 0), &[100, 1001]);
        let b = normal(&mut generator(1, Purpose::Noise, 1), &[100, 1001]);
        let again = normal(&mut generator(1, Purpose::Noise, 0), &[100, 1001]);
        assert!(a.equal(&again));
        assert!(a.mean(tch::Kind::Float).double_value(&[]).abs() < 0.01);
        assert!((a.std(true).double_value(&[]) - 1.0).abs() < 0.01);
        assert!((&a * &b).mean(tch::Kind::Float).double_value(&[]).abs() < 0.01);
    }
}
