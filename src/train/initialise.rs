//! Initial values of a network that is trained from scratch: PyTorch's own, as functions of the seed and the
//! parameter's name, so that adding a layer does not change the others. One exception: the last layer of every residual
//! branch starts at zero (Goyal et al. 2017, 5.1; `zero_module` of Dhariwal and Nichol 2021), so that a new network
//! begins as its shortcuts. Without it the branches' noise drowns what the shortcuts carry, colours first.

use tch::Tensor;

use crate::ops::{Initial, Parameter, Weights};
use crate::torch::random::{Purpose, generator, normal, uniform};

/// Random fp32 weights on the CPU.
pub fn initialise(parameters: &[Parameter], seed: u64) -> Weights {
    parameters.iter().map(|parameter| (parameter.name.clone(), initial(parameter, seed))).collect()
}

/// The last layers of residual branches: of residual blocks, of the UNet's transformers, of the autoencoder's attention.
fn ends_a_branch(name: &str) -> bool {
    let layer = name.trim_end_matches(".weight").trim_end_matches(".bias");
    layer.ends_with(".conv2") || layer.ends_with(".proj_out") || layer.ends_with("mid_block.attentions.0.to_out.0")
}

fn initial(parameter: &Parameter, seed: u64) -> Tensor {
    let shape = parameter.shape.as_slice();
    let options = (tch::Kind::Float, tch::Device::Cpu);
    if ends_a_branch(&parameter.name) {
        return Tensor::zeros(shape, options);
    }
    let mut generator = generator(seed, Purpose::Initial, name_hash(&parameter.name));
    match parameter.initial {
        Initial::Constant(value) => Tensor::full(shape, value, options),
        Initial::Normal(deviation) => normal(&mut generator, shape) * deviation,
        Initial::Uniform { fan_in } => {
            let bound = 1.0 / (fan_in as f64).sqrt();
            let count = shape.iter().product::<i64>() as usize;
            let values: Vec<f32> = (0..count).map(|_| (bound * (2.0 * uniform(&mut generator) - 1.0)) as f32).collect();
            Tensor::from_slice(&values).view(shape)
        }
    }
}

/// FNV-1a: stable between versions of Rust, unlike the standard library's hasher.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_declared_distribution_and_the_name() {
        let parameter =
            |name: &str, initial| Parameter { name: name.into(), shape: vec![64, 100], initial, palettizable: true };
        let uniform = initial(&parameter("a", Initial::Uniform { fan_in: 100 }), 3);
        assert!(uniform.abs().max().double_value(&[]) <= 0.1);
        assert!((uniform.std(true).double_value(&[]) - 0.1 / 3f64.sqrt()).abs() < 2e-3);
        assert!(!uniform.equal(&initial(&parameter("b", Initial::Uniform { fan_in: 100 }), 3)));
        assert!(uniform.equal(&initial(&parameter("a", Initial::Uniform { fan_in: 100 }), 3)));
        let zero = initial(&parameter("encoder.mid_block.resnets.0.conv2.weight", Initial::Uniform { fan_in: 100 }), 3);
        assert_eq!(zero.abs().max().double_value(&[]), 0.0);
        let normal = initial(&parameter("a", Initial::Normal(0.02)), 3);
        assert!((normal.std(true).double_value(&[]) - 0.02).abs() < 1e-3);
    }
}
