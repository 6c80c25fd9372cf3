//! The noise schedule that a model was trained with.
//!
//! Symbols, as in Ho et al. 2020 (DDPM): β_t the variance added at step t, α_t = 1 − β_t, ᾱ_t = Π α (here
//! `alphas_cumprod`), x₀ clean latents, ε ~ N(0, 1), x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε. A network predicts ε, or
//! v = √ᾱ_t ε − √(1 − ᾱ_t) x₀ (Salimans & Ho 2022). The table is computed in fp32 with libtorch, as diffusers does,
//! so that it is the same to the bit.

use std::ops::{Div, Mul};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::settings::Settings;

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise ε.
    Epsilon,
    /// The velocity v.
    VPrediction,
}

/// `clip_sample` and `clip_sample_range`: x₀ is held within ± this.
#[derive(Clone, Copy)]
pub(super) struct Clip(Option<f64>);

impl Clip {
    /// As the configuration says; where it does not, on or off as the sampler's `default`, within ±1.
    ///
    /// # Errors
    /// A value of another type.
    pub fn read(settings: Settings, default: bool) -> Result<Self> {
        let on = settings.truth("clip_sample", default)?;
        Ok(Self(if on { Some(settings.number("clip_sample_range", 1.0)?) } else { None }))
    }

    pub fn is_on(self) -> bool {
        self.0.is_some()
    }

    pub fn apply(self, x0: Tensor) -> Tensor {
        match self.0 {
            Some(range) => x0.clamp(-range, range),
            None => x0,
        }
    }
}

impl Prediction {
    /// `prediction_type`, which is `epsilon` where a file does not say.
    pub(crate) fn from_settings(settings: Settings) -> Result<Self> {
        settings.choice(
            "prediction_type",
            Self::Epsilon,
            &[("epsilon", Self::Epsilon), ("v_prediction", Self::VPrediction)],
        )
    }

    /// x₀ as the network's `output` at x = α x₀ + s ε implies it. α and s are numbers, or tensors of one a row.
    pub fn x0<A>(self, x: &Tensor, output: &Tensor, alpha: A, s: A) -> Tensor
    where
        A: Copy,
        Tensor: Div<A, Output = Tensor>,
        for<'t> &'t Tensor: Mul<A, Output = Tensor>,
    {
        match self {
            Self::Epsilon => (x - output * s) / alpha,
            Self::VPrediction => x * alpha - output * s,
        }
    }

    /// ε as the network's `output` at x = α x₀ + s ε implies it.
    pub fn noise<A>(self, x: &Tensor, output: &Tensor, alpha: A, s: A) -> Tensor
    where
        A: Copy,
        for<'t> &'t Tensor: Mul<A, Output = Tensor>,
    {
        match self {
            Self::Epsilon => output.shallow_clone(),
            Self::VPrediction => output * alpha + x * s,
        }
    }
}

/// How much of x₀ and of ε there is in x_t, for each training timestep t.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    /// ᾱ_t for t = 0, 1, …
    pub alphas_cumprod: Vec<f64>,
    /// What the network predicts.
    pub prediction: Prediction,
}

/// Defaults of the betas that differ between diffusers' scheduler classes.
#[derive(Clone, Copy)]
pub(crate) struct BetaDefaults {
    start: f64,
    end: f64,
    schedule: BetaSchedule,
}

#[derive(Clone, Copy)]
enum BetaSchedule {
    Linear,
    ScaledLinear,
    SquaredCosine,
}

impl BetaDefaults {
    /// Most classes'.
    pub(crate) const USUAL: Self = Self { start: 0.0001, end: 0.02, schedule: BetaSchedule::Linear };
    /// Those of the classes that k-diffusion's samplers of second order became.
    pub(crate) const STABLE_DIFFUSION: Self = Self { start: 0.00085, end: 0.012, ..Self::USUAL };
    /// Those of the classes for models distilled to few steps.
    pub(crate) const LATENT_CONSISTENCY: Self = Self { schedule: BetaSchedule::ScaledLinear, ..Self::STABLE_DIFFUSION };

    pub(crate) fn of_class(class: &str) -> Result<Self> {
        Ok(match class {
            "DPMSolverSDEScheduler"
            | "HeunDiscreteScheduler"
            | "KDPM2DiscreteScheduler"
            | "KDPM2AncestralDiscreteScheduler" => Self::STABLE_DIFFUSION,
            "LCMScheduler" | "TCDScheduler" => Self::LATENT_CONSISTENCY,
            _ if class.contains("FlowMatch") || class.contains("EDM") => {
                bail!("scheduler_config.json: `_class_name` is {class}, a schedule that Palettist does not support")
            }
            _ => Self::USUAL,
        })
    }

    /// Writes them into a configuration where it has none.
    pub(crate) fn fill(self, config: &mut Value) {
        let schedule = match self.schedule {
            BetaSchedule::Linear => "linear",
            BetaSchedule::ScaledLinear => "scaled_linear",
            BetaSchedule::SquaredCosine => "squaredcos_cap_v2",
        };
        for (key, value) in
            [("beta_start", json!(self.start)), ("beta_end", json!(self.end)), ("beta_schedule", json!(schedule))]
        {
            if config.get(key).is_none() {
                config[key] = value;
            }
        }
    }
}

/// The most `num_train_timesteps`. Stable Diffusion has 1000; a table for 10¹⁵ fits nowhere.
pub const MOST_TIMESTEPS: i64 = 100_000;

/// `num_train_timesteps`
fn timesteps(settings: Settings) -> Result<i64> {
    let steps = settings.integer("num_train_timesteps", 1000, 1)?;
    if steps > MOST_TIMESTEPS {
        bail!("scheduler_config.json: `num_train_timesteps` is {steps}; more than {MOST_TIMESTEPS} are not supported");
    }
    Ok(steps)
}

/// ᾱ_t as fp32 numbers. `rescale` applies `rescale_betas_zero_snr` where the file asks for it.
pub(crate) fn alphas_cumprod(settings: Settings, defaults: BetaDefaults, rescale: bool) -> Result<Vec<f64>> {
    let steps = timesteps(settings)?;
    let start = settings.number("beta_start", defaults.start)?;
    let end = settings.number("beta_end", defaults.end)?;
    let float = (Kind::Float, Device::Cpu);
    let betas = match settings.numbers("trained_betas")? {
        Some(betas) if betas.len() as i64 == steps => Tensor::from_slice(&betas).to_kind(Kind::Float),
        Some(betas) => bail!(
            "scheduler_config.json: `trained_betas` has {} numbers and `num_train_timesteps` is {steps}; they should agree",
            betas.len()
        ),
        None => {
            let schedule = settings.choice(
                "beta_schedule",
                defaults.schedule,
                &[
                    ("linear", BetaSchedule::Linear),
                    ("scaled_linear", BetaSchedule::ScaledLinear),
                    ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
                ],
            )?;
            match schedule {
                BetaSchedule::Linear => Tensor::linspace(start, end, steps, float),
                BetaSchedule::ScaledLinear => Tensor::linspace(start.sqrt(), end.sqrt(), steps, float).square(),
                BetaSchedule::SquaredCosine => squared_cosine_betas(steps),
            }
        }
    };
    if betas.isfinite().all().int64_value(&[]) == 0
        || betas.lt(0.0).logical_or(&betas.gt(1.0)).any().int64_value(&[]) != 0
    {
        bail!("scheduler_config.json: its betas leave the range from 0 to 1; check `beta_start` and `beta_end`");
    }
    let rescale = rescale && settings.truth("rescale_betas_zero_snr", false)?;
    let betas = if rescale { zero_terminal_snr(&betas) } else { betas };
    let table = (1f64 - betas).cumprod(0, None::<Kind>).to_kind(Kind::Double);
    Ok(Vec::<f64>::try_from(table)?)
}

/// β from ᾱ(s) = cos²((s + 0.008) / 1.008 · π/2), at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
fn squared_cosine_betas(steps: i64) -> Tensor {
    let alpha_bar = |s: f64| ((s + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
    let betas: Vec<f64> = (0..steps)
        .map(|i| (1.0 - alpha_bar((i + 1) as f64 / steps as f64) / alpha_bar(i as f64 / steps as f64)).min(0.999))
        .collect();
    Tensor::from_slice(&betas).to_kind(Kind::Float)
}

/// Rescales β so that √ᾱ of the last step is 0 and of the first as it was (Lin et al. 2023, algorithm 1).
fn zero_terminal_snr(betas: &Tensor) -> Tensor {
    let root = (1f64 - betas).cumprod(0, None::<Kind>).sqrt();
    let (first, last) = (root.narrow(0, 0, 1), root.narrow(0, -1, 1));
    let alphas_bar = ((&root - &last) * (&first / (&first - &last))).square();
    let steps = alphas_bar.size()[0];
    let ratios = alphas_bar.narrow(0, 1, steps - 1) / alphas_bar.narrow(0, 0, steps - 1);
    1.0 - Tensor::cat(&[alphas_bar.narrow(0, 0, 1), ratios], 0)
}

impl NoiseSchedule {
    /// Reads a `scheduler_config.json`; missing keys take the defaults of the class that `_class_name` names.
    ///
    /// # Errors
    /// Keys of the wrong type, and schedules or prediction types that are not supported, with key and value.
    pub fn from_config(config: &Value) -> Result<Self> {
        let settings = Settings::new(config)?;
        let class = settings.get("_class_name").and_then(Value::as_str).unwrap_or("DDPMScheduler");
        Ok(Self {
            alphas_cumprod: alphas_cumprod(settings, BetaDefaults::of_class(class)?, true)?,
            prediction: Prediction::from_settings(settings)?,
        })
    }

    /// The number of training timesteps.
    pub fn timesteps(&self) -> i64 {
        self.alphas_cumprod.len() as i64
    }

    /// √ᾱ and √(1 − ᾱ) of `timesteps` `[B]`, shaped to multiply `like` `[B, …]`, of its kind and on its device.
    fn amplitudes(&self, timesteps: &Tensor, like: &Tensor) -> (Tensor, Tensor) {
        let mut shape = vec![1; like.dim()];
        shape[0] = timesteps.size()[0];
        let table = Tensor::from_slice(&self.alphas_cumprod);
        let pick = |values: Tensor| {
            values
                .sqrt()
                .to_kind(like.kind())
                .to_device(like.device())
                .index_select(0, &timesteps.to_device(like.device()))
                .view(shape.as_slice())
        };
        (pick(table.shallow_clone()), pick(1.0 - &table))
    }

    /// x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε. `x0`, `noise` `[B, …]`; `timesteps` `[B]` int64, each below [`Self::timesteps`].
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Tensor {
        let (signal, spread) = self.amplitudes(timesteps, x0);
        signal * x0 + spread * noise
    }

    /// What the network should answer on [`Self::add_noise`]'s x_t: ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x₀.
    pub fn target(&self, x0: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Tensor {
        match self.prediction {
            Prediction::Epsilon => noise.shallow_clone(),
            Prediction::VPrediction => {
                let (signal, spread) = self.amplitudes(timesteps, x0);
                signal * noise - spread * x0
            }
        }
    }

    /// x₀ as the network's `output` at x_t implies it.
    pub fn predicted_x0(&self, xt: &Tensor, output: &Tensor, timesteps: &Tensor) -> Tensor {
        let (signal, spread) = self.amplitudes(timesteps, xt);
        self.prediction.x0(xt, output, &signal, &spread)
    }

    /// ε as the network's `output` at x_t implies it.
    pub fn predicted_noise(&self, xt: &Tensor, output: &Tensor, timesteps: &Tensor) -> Tensor {
        let (signal, spread) = self.amplitudes(timesteps, xt);
        self.prediction.noise(xt, output, &signal, &spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(prediction: &str) -> NoiseSchedule {
        let config = json!({"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "prediction_type": prediction});
        NoiseSchedule::from_config(&config).unwrap()
    }

    #[test]
    fn the_target_is_what_gives_back_x0_and_noise() {
        let x0 = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([2, 2, 3]) / 5.0;
        let noise = x0.cos();
        let timesteps = Tensor::from_slice(&[17i64, 993]);
        for prediction in ["epsilon", "v_prediction"] {
            let schedule = schedule(prediction);
            let xt = schedule.add_noise(&x0, &noise, &timesteps);
            let output = schedule.target(&x0, &noise, &timesteps);
            for (got, want) in [
                (schedule.predicted_x0(&xt, &output, &timesteps), &x0),
                (schedule.predicted_noise(&xt, &output, &timesteps), &noise),
            ] {
                assert!((got - want).abs().max().double_value(&[]) < 1e-4, "{prediction}");
            }
        }
    }

    #[test]
    fn a_rescaled_schedule_is_that_of_diffusers() {
        // DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        //               rescale_betas_zero_snr=True).alphas_cumprod[[0, 1, 250, 500, 750, 998, 999]]
        let config = json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": true});
        let schedule = NoiseSchedule::from_config(&config).unwrap();
        let expected: [(usize, f64); 7] = [
            (0, 0.999149978),
            (1, 0.998233497),
            (250, 0.65245676),
            (500, 0.241018638),
            (750, 0.03279908),
            (998, 1.96796336e-07),
            (999, 0.0),
        ];
        for (t, alpha) in expected {
            assert!((schedule.alphas_cumprod[t] - alpha).abs() < 1e-6, "{t}: {}", schedule.alphas_cumprod[t]);
        }
        assert_eq!(schedule.alphas_cumprod[999], 0.0);
    }

    #[test]
    fn unsupported_schedules_are_refused_by_name() {
        for (key, value) in [
            ("beta_schedule", json!("exponential")),
            ("prediction_type", json!("sample")),
            ("num_train_timesteps", json!(0)),
            ("num_train_timesteps", json!(1_000_000_000_000_000i64)),
            ("_class_name", json!("FlowMatchEulerDiscreteScheduler")),
            ("beta_end", json!(3)),
        ] {
            let error = NoiseSchedule::from_config(&json!({key: value})).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
