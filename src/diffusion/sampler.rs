//! Samplers: the walk from noise to latents.
//!
//! Each is configured from a model's `scheduler_config.json` as diffusers' `from_config` does it: a sampler reads
//! the keys that it knows, and keys that are missing take that sampler's own default, whichever scheduler wrote the
//! file. A sampler is a list of timesteps, made once, and a walk along it by index; it keeps no state between walks.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::ddim::Ddim;
use super::dpm_solver::DpmSolver;
use super::euler::Euler;
use super::pndm::Pndm;
use super::settings::Settings;

/// The network as a sampler sees it: the (already scaled) latents and the timestep, which may be fractional, to the
/// network's output, guidance included.
pub type Model<'m> = dyn FnMut(&Tensor, f64) -> Result<Tensor> + 'm;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// Song et al. 2020, with η = 0; diffusers' `DDIMScheduler`.
    Ddim,
    /// Liu et al. 2022; diffusers' `PNDMScheduler`.
    Pndm,
    /// Karras et al. 2022, algorithm 2 without churn; diffusers' `EulerDiscreteScheduler`.
    Euler,
    /// Lu et al. 2022b, DPM-Solver++(2M); diffusers' `DPMSolverMultistepScheduler`.
    DpmppTwoM,
}

impl SamplerKind {
    /// All, by the names of the command line.
    pub const NAMES: [(&str, Self); 4] =
        [("ddim", Self::Ddim), ("pndm", Self::Pndm), ("euler", Self::Euler), ("dpmpp_2m", Self::DpmppTwoM)];

    /// The sampler of the class that wrote `scheduler_config.json`, if it is one of these.
    pub fn of_class(class: &str) -> Option<Self> {
        match class {
            "DDIMScheduler" => Some(Self::Ddim),
            "PNDMScheduler" => Some(Self::Pndm),
            "EulerDiscreteScheduler" => Some(Self::Euler),
            "DPMSolverMultistepScheduler" => Some(Self::DpmppTwoM),
            _ => None,
        }
    }
}

impl FromStr for SamplerKind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, kind)) => Ok(*kind),
            None => bail!("`{name}` is no sampler; there are {}", Self::NAMES.map(|(known, _)| known).join(", ")),
        }
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (name, _) = Self::NAMES.iter().find(|(_, kind)| kind == self).unwrap_or(&Self::NAMES[0]);
        f.write_str(name)
    }
}

/// What each sampler is: where it evaluates the network, how large it wants the noise, and its walk.
pub(super) trait Walk {
    /// The timesteps in the order in which the network is asked; a sampler may ask more often than there are steps.
    fn timesteps(&self) -> Vec<f64>;
    /// What noise of unit variance is multiplied by.
    fn init_noise_sigma(&self) -> f64;
    /// From the scaled noise to x₀.
    fn walk(&self, x: Tensor, model: &mut Model) -> Result<Tensor>;
}

/// A sampler with its timesteps.
pub struct Sampler {
    walk: Box<dyn Walk>,
}

impl Sampler {
    /// # Errors
    /// Keys of the wrong type, what is not supported (key and value), a number of steps that the schedule cannot do.
    pub fn new(kind: SamplerKind, config: &Value, steps: usize) -> Result<Self> {
        let settings = Settings::new(config)?;
        let class = settings.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        if class.contains("FlowMatch") || class.contains("EDM") {
            bail!("scheduler_config.json: `_class_name` is {class}, a schedule that Palettist does not support");
        }
        let most = settings.integer("num_train_timesteps", 1000, 1)?;
        let steps = steps as i64;
        if steps < 1 || steps > most {
            bail!("{steps} steps: the schedule of this model takes 1 to {most}");
        }
        let walk: Box<dyn Walk> = match kind {
            SamplerKind::Ddim => Box::new(Ddim::new(settings, steps)?),
            SamplerKind::Pndm => Box::new(Pndm::new(settings, steps)?),
            SamplerKind::Euler => Box::new(Euler::new(settings, steps)?),
            SamplerKind::DpmppTwoM => Box::new(DpmSolver::new(settings, steps)?),
        };
        Ok(Self { walk })
    }

    /// The timesteps in the order in which [`Self::run`] asks the network.
    pub fn timesteps(&self) -> Vec<f64> {
        self.walk.timesteps()
    }

    /// From `noise` of unit variance `[B, …]` to x₀ of the same shape, in fp32, without gradients.
    ///
    /// # Errors
    /// Those of the network.
    pub fn run(&self, noise: &Tensor, model: &mut Model) -> Result<Tensor> {
        tch::no_grad(|| {
            let x = noise.to_kind(Kind::Float) * self.walk.init_noise_sigma();
            self.walk.walk(x, &mut |x, t| Ok(model(x, t)?.to_kind(Kind::Float)))
        })
    }
}

/// [`Sampler::new`] and [`Sampler::run`] in one.
pub fn sample(kind: SamplerKind, config: &Value, steps: usize, noise: &Tensor, model: &mut Model) -> Result<Tensor> {
    Sampler::new(kind, config, steps)?.run(noise, model)
}
