//! Samplers: the walk from noise to latents.
//!
//! Each is configured from a model's `scheduler_config.json` as diffusers' `from_config` does it: a sampler reads
//! the keys that it knows, and keys that are missing take that sampler's own default, whichever scheduler wrote the
//! file. A sampler is a list of timesteps, made once, and a walk along it by index; it keeps no state between walks.
//! Those that add noise ask for it by number ([`Draws`]), so that a walk is a function of its inputs.

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::ddim::Ddim;
use super::ddpm::Ddpm;
use super::dpm_sde::DpmSde;
use super::dpm_singlestep::DpmSinglestep;
use super::dpm_solver::DpmSolver;
use super::dpm_two::DpmTwo;
use super::euler::Euler;
use super::euler_ancestral::EulerAncestral;
use super::heun::Heun;
use super::kinds::SamplerKind;
use super::lcm::Lcm;
use super::lms::Lms;
use super::pndm::Pndm;
use super::unipc::UniPc;
use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::BetaDefaults;
use crate::diffusion::settings::{Settings, Unsupported};

/// A sampler with its timesteps.
pub struct Sampler {
    walk: Box<dyn Walk>,
}

impl Sampler {
    /// A sampler with the options of the model's file.
    ///
    /// # Errors
    /// Keys of the wrong type, what is not supported (key and value), a number of steps that the schedule cannot do.
    pub fn new(kind: SamplerKind, config: &Value, steps: usize) -> Result<Self> {
        use SamplerKind as S;
        let settings = Settings::new(config)?;
        let class = settings.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        let _known_schedule = BetaDefaults::of_class(class)?;
        let most = settings.integer("num_train_timesteps", 1000, 1)?;
        let steps = steps as i64;
        if steps < 1 || steps > most {
            bail!("{steps} steps: the schedule of this model takes 1 to {most}");
        }
        let walk: Box<dyn Walk> = match kind {
            S::Ddim => Box::new(Ddim::new(settings, steps)?),
            S::Ddpm => Box::new(Ddpm::new(settings, steps)?),
            S::Pndm => Box::new(Pndm::new(settings, steps)?),
            S::Lms => Box::new(Lms::new(settings, steps)?),
            S::Euler => Box::new(Euler::new(settings, steps)?),
            S::EulerAncestral => Box::new(EulerAncestral::new(settings, steps)?),
            S::Heun => Box::new(Heun::new(settings, steps)?),
            S::DpmTwo => Box::new(DpmTwo::new(settings, steps, false)?),
            S::DpmTwoAncestral => Box::new(DpmTwo::new(settings, steps, true)?),
            S::DpmppTwoM | S::DpmppTwoMKarras | S::DpmppTwoMSde | S::DpmppTwoMSdeKarras => {
                Box::new(DpmSolver::new(settings, steps)?)
            }
            S::DpmppTwoS => Box::new(DpmSinglestep::new(settings, steps)?),
            S::DpmppSde | S::DpmppSdeKarras => Box::new(DpmSde::new(settings, steps)?),
            S::UniPc => Box::new(UniPc::new(settings, steps)?),
            S::Lcm => Box::new(Lcm::new(settings, steps)?),
        };
        Ok(Self { walk })
    }

    /// A sampler that was asked for by name: the options that are part of its name are not the file's.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn named(kind: SamplerKind, config: &Value, steps: usize) -> Result<Self> {
        Self::new(kind, &kind.applied_to(config), steps)
    }

    /// The timesteps in the order in which [`Self::run`] asks the network; some samplers ask twice for a step.
    pub fn timesteps(&self) -> Vec<f64> {
        self.walk.timesteps()
    }

    /// From `noise` of unit variance `[B, …]` to x₀ of the same shape, in fp32, without gradients.
    ///
    /// # Errors
    /// Those of the network.
    pub fn run(&self, noise: &Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        tch::no_grad(|| {
            let x = noise.to_kind(Kind::Float) * self.walk.init_noise_sigma();
            self.walk.walk(x, &mut |x, t| Ok(model(x, t)?.to_kind(Kind::Float)), draws)
        })
    }
}

/// The sampler that a model came with.
#[derive(Debug)]
pub struct Own {
    pub kind: SamplerKind,
    /// The model's configuration; where [`Self::warning`] says that another sampler is used, what that one needs.
    pub config: Value,
    /// Which sampler is used instead of the model's, and why.
    pub warning: Option<String>,
}

impl Own {
    /// The sampler of a `scheduler_config.json`: that of its class, or DDIM with the model's betas and prediction type
    /// and a warning where the class, or an option that it sets, is not supported.
    pub fn of(config: &Value) -> Self {
        let class = config.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        let reason = match SamplerKind::of_class(class) {
            None if class.is_empty() => "the model's scheduler_config.json names no class".to_owned(),
            None => format!("the model's scheduler, {class}, is not in this version"),
            // Any number of steps that all schedules can do: what else is wrong is an error when it is used.
            Some(kind) => match Sampler::new(kind, config, 10) {
                // Where even DDIM cannot, that error is the one to see.
                Err(error)
                    if error.is::<Unsupported>()
                        && Sampler::new(SamplerKind::Ddim, &plain(config, class), 10).is_ok() =>
                {
                    format!("the model's scheduler is {class}, and in {error}")
                }
                _ => return Self { kind: kind.with_options(config), config: config.clone(), warning: None },
            },
        };
        let kind = SamplerKind::Ddim;
        let config = plain(config, class);
        let warning = format!("{reason}; the sampler `{kind}` is used instead");
        Self { kind, config, warning: Some(warning) }
    }
}

/// What DDIM needs of another scheduler's configuration, with that class's defaults.
fn plain(config: &Value, class: &str) -> Value {
    let mut plain = json!({"_class_name": class, "clip_sample": false});
    for key in [
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
    ] {
        if let Some(value) = config.get(key) {
            plain[key] = value.clone();
        }
    }
    if let Ok(defaults) = BetaDefaults::of_class(class) {
        defaults.fill(&mut plain);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedulers_that_are_not_there_are_replaced_and_said() {
        let base = json!({"_class_name": "TCDScheduler", "prediction_type": "v_prediction"});
        let own = Own::of(&base);
        let warning = own.warning.unwrap();
        assert!(warning.contains("TCDScheduler") && warning.contains("`ddim`"), "{warning}");
        // TCD's own betas, and no clipping, which DDIM would do.
        assert_eq!((&own.config["beta_schedule"], &own.config["beta_end"]), (&json!("scaled_linear"), &json!(0.012)));
        assert_eq!(
            (&own.config["clip_sample"], &own.config["prediction_type"]),
            (&json!(false), &json!("v_prediction"))
        );
        Sampler::new(own.kind, &own.config, 25).unwrap();
    }

    #[test]
    fn options_that_are_not_there_are_said_and_others_are_errors() {
        let config = |key: &str, value: Value| json!({"_class_name": "DPMSolverMultistepScheduler", key: value});
        for (key, value) in [
            ("thresholding", json!(true)),
            ("use_flow_sigmas", json!(true)),
            ("algorithm_type", json!("new")),
            ("solver_order", json!(7)),
        ] {
            let own = Own::of(&config(key, value));
            let warning = own.warning.expect(key);
            assert!(warning.contains(key) && warning.contains("`ddim`"), "{warning}");
            Sampler::new(own.kind, &own.config, 25).unwrap();
        }
        for (key, value) in [("beta_start", json!("no number")), ("prediction_type", json!("sample"))] {
            let own = Own::of(&config(key, value));
            assert!(own.warning.is_none());
            assert!(Sampler::new(own.kind, &own.config, 25).is_err());
        }
    }
}
