//! AdamW (Loshchilov and Hutter 2019, algorithm 2) on plain tensors, so that its state can be saved and restored.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::config::Optimizer;
use crate::palette::AdamWStep;
use crate::torch::rounding::stochastic;
use crate::torch::{Arg, call};

/// The constants of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// One parameter with its moments; all of one shape.
pub struct Moments {
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Steps that these moments have seen: the bias correction's exponent. A scalar tensor, as libtorch wants it.
    pub step: Tensor,
}

impl Moments {
    pub fn zeros_like(parameter: &Tensor) -> Self {
        Self {
            exp_avg: parameter.zeros_like(),
            exp_avg_sq: parameter.zeros_like(),
            step: Tensor::zeros([], (Kind::Float, parameter.device())),
        }
    }
}

impl AdamW {
    /// What `[train.optimizer]` asks for.
    pub fn of(settings: &Optimizer) -> Self {
        let [beta1, beta2] = settings.betas;
        Self { beta1, beta2, eps: settings.eps, weight_decay: settings.weight_decay }
    }

    /// Counts a step of `moments` and gives the numbers of it, for a layer that takes its own
    /// ([`DkmLayer::step`](crate::palette::DkmLayer::step)) with a gradient that is multiplied by `factor`.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn count(&self, moments: &Moments, lr: f64, factor: f64) -> Result<AdamWStep> {
        let _guard = tch::no_grad_guard();
        let count = moments.step.shallow_clone().g_add_scalar_(1.0).f_double_value(&[])?;
        Ok(AdamWStep {
            factor: factor as f32,
            decay: (1.0 - lr * self.weight_decay) as f32,
            rate_of_mean: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rate_of_square: (1.0 - self.beta2) as f32,
            size: (lr / (1.0 - self.beta1.powf(count))) as f32,
            root: (1.0 / (1.0 - self.beta2.powf(count)).sqrt()) as f32,
            eps: self.eps as f32,
        })
    }

    /// [`Self::step`] of one parameter in bf16, its moments too: computed in f32, then rounded at random ([`stochastic`]),
    /// without which small updates would be lost. `key` says which random bits.
    ///
    /// # Errors
    /// libtorch's message, when shapes or types differ.
    pub fn step_bf16(&self, parameter: &Tensor, gradient: &Tensor, moments: &Moments, lr: f64, key: u32) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let wide = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
        let computed = wide(parameter)?;
        let widened = Moments {
            exp_avg: wide(&moments.exp_avg)?,
            exp_avg_sq: wide(&moments.exp_avg_sq)?,
            step: moments.step.shallow_clone(),
        };
        self.step(&[&computed], &[&wide(gradient)?], &[&widened], lr)?;
        let pairs =
            [(computed, parameter), (widened.exp_avg, &moments.exp_avg), (widened.exp_avg_sq, &moments.exp_avg_sq)];
        for (place, (from, to)) in pairs.into_iter().enumerate() {
            stochastic(&from, &mut to.shallow_clone(), key.wrapping_add(place as u32))?;
        }
        Ok(())
    }

    /// Updates `parameters` in place by libtorch's fused kernel.
    ///
    /// # Errors
    /// libtorch's message, when shapes or types differ.
    pub fn step(&self, parameters: &[&Tensor], gradients: &[&Tensor], moments: &[&Moments], lr: f64) -> Result<()> {
        if parameters.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        for moments in moments {
            let _ = moments.step.shallow_clone().g_add_scalar_(1.0);
        }
        // Those of a batch of palettes are the host's.
        let device = parameters[0].device();
        let steps: Vec<Tensor> = moments.iter().map(|m| m.step.f_to_device(device)).collect::<Result<_, _>>()?;
        let steps: Vec<&Tensor> = steps.iter().collect();
        let exp_avgs: Vec<&Tensor> = moments.iter().map(|m| &m.exp_avg).collect();
        let exp_avg_sqs: Vec<&Tensor> = moments.iter().map(|m| &m.exp_avg_sq).collect();
        call(
            "aten::_fused_adamw_",
            "",
            &[
                Arg::Tensors(parameters),
                Arg::Tensors(gradients),
                Arg::Tensors(&exp_avgs),
                Arg::Tensors(&exp_avg_sqs),
                Arg::Tensors(&[]),
                Arg::Tensors(&steps),
                Arg::Double(lr),
                Arg::Double(self.beta1),
                Arg::Double(self.beta2),
                Arg::Double(self.weight_decay),
                Arg::Double(self.eps),
                Arg::Bool(false),
                Arg::Bool(false),
                Arg::None,
                Arg::None,
            ],
        )?;
        Ok(())
    }
}

/// The common L2 norm of gradients.
pub fn norm(gradients: &[&Tensor]) -> f64 {
    let _guard = tch::no_grad_guard();
    if gradients.is_empty() {
        return 0.0;
    }
    // Summed in f32, also of bf16.
    let norms: Vec<Tensor> = gradients.iter().map(|g| g.norm_scalaropt_dtype(2.0, Kind::Float)).collect();
    Tensor::stack(&norms, 0).norm().double_value(&[])
}

/// What gradients of a common `norm` are multiplied by so that it is at most `max_norm`, as
/// `torch.nn.utils.clip_grad_norm_` does: at most 1, and 1 where `max_norm` is 0.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random::{Purpose, generator, normal};

    #[test]
    fn fused_step_equals_the_formula() {
        let draw = |i| normal(&mut generator(5, Purpose::Initial, i), &[37, 5]);
        let (parameter, expected) = (draw(0), draw(0));
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.05 };
        let moments = Moments::zeros_like(&parameter);
        let (mut m, mut v, lr) = (expected.zeros_like(), expected.zeros_like(), 0.01);
        let mut expected = expected;
        for t in 1..=4 {
            let gradient = draw(t);
            adamw.step(&[&parameter], &[&gradient], &[&moments], lr).unwrap();
            m = m * 0.9 + &gradient * 0.1;
            v = v * 0.99 + gradient.square() * 0.01;
            let (m_hat, v_hat) = (&m / (1.0 - 0.9f64.powi(t as i32)), &v / (1.0 - 0.99f64.powi(t as i32)));
            expected = &expected * (1.0 - lr * 0.05) - m_hat / (v_hat.sqrt() + 1e-8) * lr;
        }
        let error = (&parameter - &expected).abs().max().double_value(&[]);
        assert!(error < 1e-6, "{error}");
    }

    /// Nearest rounding would leave every weight where it is.
    #[test]
    fn small_steps_in_bf16_add_up_as_in_f32() {
        let (rate, steps) = (1e-4, 300);
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let start = Tensor::ones([100, 100], (Kind::Float, tch::Device::Cpu));
        let (exact, brain) = (start.copy(), start.to_kind(Kind::BFloat16));
        let (moments, rough) = (Moments::zeros_like(&exact), Moments::zeros_like(&brain));
        for step in 0..steps {
            let gradient = normal(&mut generator(6, Purpose::Initial, step), &[100, 100]) * 0.3 + 1.0;
            let in_brain = gradient.to_kind(Kind::BFloat16);
            adamw.step(&[&exact], &[&gradient], &[&moments], rate).unwrap();
            adamw.step_bf16(&brain, &in_brain, &rough, rate, 1000 * step as u32).unwrap();
        }
        let mean = |tensor: &Tensor| tensor.mean(Kind::Double).double_value(&[]);
        let (went, expected) = (mean(&brain) - 1.0, mean(&exact) - 1.0);
        assert!((went / expected - 1.0).abs() < 0.03, "{went:e} for {expected:e}");
        let (square, expected) = (mean(&rough.exp_avg_sq), mean(&moments.exp_avg_sq));
        assert!((square / expected - 1.0).abs() < 0.03, "{square:e} for {expected:e}");
        assert_eq!(rough.step.double_value(&[]), steps as f64);
    }

    #[test]
    fn clipping_keeps_small_gradients_and_scales_large_ones() {
        let (a, b) = (Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[4f32]));
        assert_eq!((norm(&[&a, &b]), norm(&[])), (5.0, 0.0));
        assert_eq!((clip_factor(5.0, 10.0), clip_factor(5.0, 0.0)), (1.0, 1.0));
        assert!((clip_factor(5.0, 1.0) - 0.2).abs() < 1e-6);
    }
}
