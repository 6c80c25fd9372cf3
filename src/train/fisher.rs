//! How much the loss minds each weight: the diagonal of the empirical Fisher information, the sum over samples of
//! (∂L/∂w)². Near a minimum of the loss it stands for the Hessian's, so that Σ F (w − ŵ)² is, to second order and up to a
//! factor, what a palette ŵ costs: palettes that make it smallest are better than the nearest ones (SqueezeLLM, Kim et al.
//! 2023, arXiv:2306.07629, section 4.1; coremltools' sensitive k-means).

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use super::evaluate::Evaluation;
use crate::networks::unet::unet;
use crate::ops::{Tensors, Weights};
use crate::torch::gradient;

/// The information of each weight in `names`, fp32 on the CPU, of its shape. `weights` are fp32; the samples of `evaluation`
/// go through one at a time, because a batch's gradient is a mean, whose square is another thing. `progress` is told how
/// many have.
///
/// # Errors
/// A name that is not among the weights; gradients that are not finite; [`super::Stopped`].
pub fn fisher(
    evaluation: &Evaluation,
    mut weights: Weights,
    names: &[String],
    progress: &mut dyn FnMut(usize),
) -> Result<Weights> {
    let mut leaves = Vec::with_capacity(names.len());
    for name in names {
        let weight = weights.get_mut(name).with_context(|| format!("the UNet has no {name}"))?;
        *weight = weight.detach().set_requires_grad(true);
        leaves.push(weight.shallow_clone());
    }
    let mut sums: Vec<Tensor> = leaves.iter().map(|leaf| leaf.detach().zeros_like()).collect();
    let mut done = 0;
    evaluation.inputs(1, &mut |input, config| {
        // The blocks run twice, so that the largest networks fit.
        let mut ops = Tensors::new(&weights).recomputing(true);
        let output = unet(&mut ops, config, &input.noised, &input.timesteps, input.told.condition());
        let loss = (output - &input.target).square().mean(Kind::Float);
        let variables: Vec<&Tensor> = leaves.iter().collect();
        let gradients = gradient::of(&loss, &loss.ones_like(), &variables)?;
        let _guard = tch::no_grad_guard();
        for (sum, gradient) in sums.iter_mut().zip(gradients) {
            // None: the loss does not depend on it.
            if let Some(gradient) = gradient {
                let _ = sum.addcmul_(&gradient, &gradient);
            }
        }
        done += 1;
        progress(done);
        Ok(())
    })?;
    let mut information = Weights::new();
    for (name, sum) in names.iter().zip(sums) {
        let sum = sum.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        ensure!(sum.isfinite().all().int64_value(&[]) == 1, "the gradient of {name} is not finite");
        information.insert(name.clone(), sum);
    }
    Ok(information)
}
