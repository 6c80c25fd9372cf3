//! Whether the kernels do on this card what the passes of the CPU do, on a few thousand weights.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::engine::Batch;
use super::member::Member;
use crate::palette::layer::Gradient;
use crate::palette::{AdamWStep, DkmLayer, Form};
use crate::torch::random::{Purpose, generator, normal};

const RHO: f64 = 0.4;
const ITERATIONS: usize = 3;
const STEP: AdamWStep = AdamWStep {
    factor: 0.7,
    decay: 0.999,
    rate_of_mean: 0.1,
    beta2: 0.99,
    rate_of_square: 0.01,
    size: 0.01,
    root: 10.0,
    eps: 1e-8,
};

/// A layer with its tensors: weight, soft weight, AdamW's two moments, gradient.
struct Side {
    layer: DkmLayer,
    tensors: [Tensor; 5],
}

/// A batch on CUDA device `index`, whose kernels have shown that they compute there what the CPU does.
///
/// # Errors
/// The kernels cannot be had, or are wrong there.
pub fn tested(index: usize) -> Result<Batch> {
    let mut batch = Batch::with_blocks(index, None)?;
    agree(&mut batch, Device::Cuda(index)).context("the kernels are wrong on this card")?;
    batch.forget();
    Ok(batch)
}

/// Two steps of some layers on both.
fn agree(batch: &mut Batch, device: Device) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let plain = Form::per_tensor(2);
    let grouped = Form { group_size: Some(16), bits: 4, ..plain };
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for (place, (form, shape)) in [(plain, [64, 50]), (grouped, [48, 40])].into_iter().enumerate() {
        let draw = |i: u64| normal(&mut generator(16, Purpose::Initial, 2 * i + place as u64), &shape);
        let (weight, gradient) = (draw(0) * 0.05, draw(1) * 1e-3);
        let layer = DkmLayer::new("test", form, &weight)?;
        let tensors = || {
            let zeros = || weight.f_zeros_like();
            anyhow::Ok([weight.copy(), zeros()?, zeros()?, zeros()?, gradient.copy()])
        };
        let [a, b, c, d, e] = tensors()?.map(|tensor| tensor.f_to_device(device));
        there.push(Side {
            layer: DkmLayer::new("test", form, &weight.f_to_device(device)?)?,
            tensors: [a?, b?, c?, d?, e?],
        });
        here.push(Side { layer, tensors: tensors()? });
    }
    for step in 1..=2 {
        let expected = here.iter_mut().map(on_the_cpu).collect::<Result<Vec<f64>>>()?;
        let found = on_the_card(batch, &mut there)?;
        for (expected, found) in expected.iter().zip(&found) {
            let off = (found / expected - 1.0).abs();
            ensure!(off < 1e-5, "step {step}: the square of the gradient is {found:e}, and {expected:e} is expected");
        }
        for (here, there) in here.iter().zip(&there) {
            let parts = ["weight", "soft weight", "mean of gradients", "mean of squares"];
            for ((expected, found), part) in here.tensors.iter().zip(&there.tensors).zip(parts) {
                let found = found.f_to_device(Device::Cpu)?;
                let off = (&found - expected).f_norm()?.f_double_value(&[])? / expected.f_norm()?.f_double_value(&[])?;
                ensure!(off < 1e-5, "step {step}: the {part} is off by {off:e} of its size");
            }
        }
    }
    Ok(())
}

fn on_the_cpu(side: &mut Side) -> Result<f64> {
    let [weight, soft, exp_avg, exp_avg_sq, gradient] = &mut side.tensors;
    let softened = side.layer.soften(weight, RHO, ITERATIONS, None, soft)?;
    let square = match side.layer.gradient(softened, gradient.copy())? {
        Gradient::Own { square } => square,
        Gradient::Whole(whole) => whole.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?,
    };
    side.layer.step(weight, [exp_avg, exp_avg_sq], &STEP)?;
    Ok(square)
}

fn on_the_card(batch: &mut Batch, sides: &mut [Side]) -> Result<Vec<f64>> {
    let gradients = sides.iter().map(|side| Some(side.tensors[4].shallow_clone())).collect();
    let mut members: Vec<Member> = sides
        .iter_mut()
        .map(|side| {
            let [weight, soft, exp_avg, exp_avg_sq, _] = &side.tensors;
            Member { layer: &mut side.layer, weight, soft, moments: [exp_avg, exp_avg_sq] }
        })
        .collect();
    let taken = batch.begin(&mut members, RHO, ITERATIONS)?;
    ensure!(taken.iter().all(|&taken| taken), "a layer was not taken");
    let squares = batch.gradient(gradients)?.iter().map(|found| found.square).collect();
    batch.step(&vec![(STEP, 0); sides.len()])?;
    Ok(squares)
}
