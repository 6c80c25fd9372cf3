//! One step of all layers.

use anyhow::{Context, Result, ensure};
use tch::Tensor;

use super::kernels::{Pass, Passes, Step};
use super::layout::Layout;
use super::member::{Found, Member};
use crate::palette::AdamWStep;

/// The kernels of one device, and the layers that they work on.
pub struct Batch {
    passes: Passes,
    layout: Option<Layout>,
    /// The gradients of the current step, one for each layer in the batch.
    gradients: Vec<Option<Tensor>>,
}

impl Batch {
    /// On CUDA device `index`, untested ([`tested`](super::tested)); with so many `blocks` in each launch, of which any number
    /// gives the same results, or as many as suit the device.
    ///
    /// # Errors
    /// The kernels cannot be had.
    pub fn with_blocks(index: usize, blocks: Option<u32>) -> Result<Self> {
        Ok(Self { passes: Passes::load(index, blocks)?, layout: None, gradients: Vec::new() })
    }

    /// From here on nothing is taken to be as the last step left it: weights have changed since, or others are in their place.
    pub fn forget(&mut self) {
        self.layout = None;
        self.gradients.clear();
    }

    /// Writes the soft weight of each of `members` at ρ = `rho`, and moves its entries, `iterations` times; says which were
    /// taken. Those that were not have weights too far apart for the codes of batches, and stay as they are. All
    /// [fit](Member::fits). Weights must be as the last [`Self::step`] left them, or [forgotten](Self::forget).
    ///
    /// # Errors
    /// A weight is not finite; names the layer. The device is out of memory.
    pub fn begin(&mut self, members: &mut [Member], rho: f64, iterations: usize) -> Result<Vec<bool>> {
        let _guard = tch::no_grad_guard();
        ensure!(iterations >= 1, "at least one iteration is needed");
        if members.is_empty() {
            self.forget();
            return Ok(Vec::new());
        }
        self.gradients.clear();
        let mut layout = self.layout.take().filter(|layout| layout.is_of(members, iterations));
        if layout.as_ref().map_or(Ok(false), Layout::is_outgrown)? {
            layout = None;
        }
        let mut kept = match layout {
            Some(mut layout) => layout.follow(members, rho, &self.passes)?.then_some(layout),
            None => None,
        };
        let layout = match &mut kept {
            Some(layout) => layout,
            None => kept.insert(Layout::new(members, rho, iterations, &self.passes)?),
        };
        if !layout.of_layers.is_empty() {
            layout.set_temperatures(members, rho)?;
            let plan = layout.plan();
            // SAFETY: `plan` is of the layout's tables and the members' tensors, which live.
            unsafe {
                self.passes.launch(Pass::Cluster, &plan)?;
                self.passes.launch(Pass::LookUp, &plan)?;
            }
        }
        let taken = layout.taken.clone();
        self.layout = kept;
        Ok(taken)
    }

    /// Takes ∂L/∂ŵ of each layer that was taken (contiguous, as its weight), or none where nothing of the loss depends on it.
    /// Waits for the device.
    ///
    /// # Errors
    /// One does not fit its layer.
    pub fn gradient(&mut self, upstream: Vec<Option<Tensor>>) -> Result<Vec<Found>> {
        let _guard = tch::no_grad_guard();
        let layout = self.layout.as_mut().context("no step has begun")?;
        if layout.of_layers.is_empty() {
            return Ok(Vec::new());
        }
        layout.set_gradients(&upstream)?;
        self.gradients = upstream;
        // Until the step has counted them.
        layout.counted = false;
        let plan = layout.plan();
        // SAFETY: as in `begin`; gradients live in `self.gradients`.
        unsafe {
            for pass in [Pass::GradientExtent, Pass::AddUp, Pass::WayBack] {
                self.passes.launch(pass, &plan)?;
            }
        }
        let (squares, errors) = layout.status()?;
        let found = layout.of_layers.iter().zip(&self.gradients).map(|(&(from, to), gradient)| Found {
            square: if gradient.is_some() { squares[from..to].iter().sum() } else { 0.0 },
            hard_error: errors[from..to].iter().sum::<f64>() / (to - from).max(1) as f64,
        });
        Ok(found.collect())
    }

    /// Takes AdamW's step in each layer that has a gradient; with each step, the key of the random bits by which bf16 is
    /// rounded ([`stochastic`](crate::torch::rounding::stochastic)).
    ///
    /// # Errors
    /// There are not as many as layers that were taken.
    pub fn step(&mut self, steps: &[(AdamWStep, u32)]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(layout) = self.layout.as_mut().filter(|layout| !layout.of_layers.is_empty()) else { return Ok(()) };
        let steps: Vec<Step> = steps.iter().map(|(step, key)| Step::new(step, *key)).collect();
        layout.set_steps(&steps)?;
        // SAFETY: as in `gradient`.
        unsafe { self.passes.launch(Pass::CombineAndStep, &layout.plan())? };
        layout.counted = true;
        // The memory goes to others in the order of the stream, which is after the kernel.
        self.gradients.clear();
        Ok(())
    }
}
