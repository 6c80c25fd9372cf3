//! How pictures are drawn: the options that `generate` and `evaluate` share.

use anyhow::{Result, anyhow, bail};
use tch::{Device, Kind};

use super::Usage;
use super::doctor::memory;
use crate::diffusion::{SamplerChoice, SamplerKind};
use crate::pipeline::{Pipeline, Request};
use crate::source::Model;
use crate::terminal::{note, warn};

/// Options of the sampler, to be flattened into a command's `Args`.
#[derive(Clone, Debug, clap::Args)]
pub struct DrawingArgs {
    /// What to stay away from [default: nothing; zeros where the model's index says so, as Stable Diffusion XL's does].
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub negative_prompt: String,

    /// Steps of the sampler.
    #[arg(long, value_name = "N", default_value_t = 25)]
    pub steps: usize,

    /// Classifier-free guidance scale; 1 or less switches guidance off [default: 7.5, and 5 for Stable Diffusion XL].
    #[arg(long, value_name = "S")]
    pub guidance_scale: Option<f64>,

    /// The sampler: auto (that of the model's own scheduler), ddim, ddpm, pndm, lms, euler, euler_a, heun, dpm_2, dpm_2_a,
    /// dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, dpmpp_2m_sde_karras, dpmpp_2s, dpmpp_sde, dpmpp_sde_karras, unipc or lcm;
    /// names as "DPM++ 2M Karras" and diffusers' classes are understood too.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub scheduler: SamplerChoice,

    /// Seed of the noise: the initial one, and that which some samplers add at each step [default: 0].
    #[arg(long, value_name = "N", value_parser = seed)]
    pub seed: Option<u64>,

    /// Height of the picture in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<i64>,

    /// Width of the picture in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<i64>,

    /// How many pictures go through the UNet together; less takes less memory.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub batch_size: usize,

    /// The type that the networks compute in: fp32, bf16 or fp16.
    #[arg(long, value_name = "TYPE", default_value = "fp32", value_parser = precision)]
    pub precision: Kind,
}

/// The device that a name means on this machine.
pub fn device(name: &str) -> Result<Device> {
    let cuda = tch::Cuda::is_available();
    match name {
        "auto" if cuda => Ok(Device::Cuda(0)),
        "auto" | "cpu" => Ok(Device::Cpu),
        "cuda" if cuda => Ok(Device::Cuda(0)),
        "cuda" => bail!("libtorch finds no CUDA device here; `palettist doctor` says what there is"),
        "mps" if tch::utils::has_mps() => Ok(Device::Mps),
        "mps" => bail!("libtorch finds no Metal device here; `palettist doctor` says what there is"),
        _ => bail!("there are auto, cpu, cuda and mps"),
    }
}

/// Height and width of a picture, px, as in a config.
const LARGEST_SIDE: i64 = 8192;

fn seed(text: &str) -> Result<u64> {
    text.parse().map_err(|_| anyhow!("a seed is a whole number from 0 to {}", u64::MAX))
}

fn precision(name: &str) -> Result<Kind> {
    match name {
        "fp32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        "fp16" => Ok(Kind::Half),
        _ => bail!("there are fp32, bf16 and fp16"),
    }
}

impl DrawingArgs {
    /// What can be checked on the command line alone.
    ///
    /// # Errors
    /// [`Usage`]: a number out of range, options that undo each other.
    pub fn check(&self) -> Result<(), Usage> {
        let wrong = |message: String| Err(Usage(message));
        if let Some(scale) = self.guidance_scale.filter(|scale| !scale.is_finite()) {
            return wrong(format!("--guidance-scale {scale} is not a valid number"));
        }
        if self.steps == 0 {
            return wrong("--steps 0: at least one step is needed".to_owned());
        }
        if self.batch_size == 0 {
            return wrong("--batch-size 0: at least one picture goes through the UNet at a time".to_owned());
        }
        if let Some(scale) = self.guidance_scale.filter(|&scale| scale <= 1.0 && !self.negative_prompt.is_empty()) {
            return wrong(format!(
                "--negative-prompt has no effect with --guidance-scale {scale}: 1 or less switches guidance off"
            ));
        }
        Ok(())
    }

    /// What can be checked once the model's configuration is known: the size of pictures, which is `size` where one is asked
    /// for.
    ///
    /// # Errors
    /// [`Usage`]: a side that its autoencoder cannot make; more pixels than this machine holds; whatever is wrong with that.
    pub fn check_sides(&self, model: &Model, size: Option<(i64, i64)>, device: Device) -> Result<()> {
        let autoencoder = model.autoencoder_config()?;
        let factor = autoencoder.factor();
        for (name, side) in [("height", self.height), ("width", self.width)] {
            let Some(side) = side else { continue };
            if side < factor {
                return Err(Usage(format!("--{name} {side} is less than {factor}, the least that is drawn")).into());
            }
            if side % factor != 0 {
                return Err(Usage(format!("--{name} {side} is not a multiple of {factor}")).into());
            }
            if side > LARGEST_SIDE {
                return Err(
                    Usage(format!("--{name} {side} is more than {LARGEST_SIDE}, the most that is drawn")).into()
                );
            }
        }
        // What the decoder reads and writes at full size: less than all that it takes.
        if let (Some((height, width)), Some((memory, _))) = (size, memory().filter(|_| device == Device::Cpu)) {
            let channels = autoencoder.block_out_channels.first().copied().unwrap_or(1);
            let needed = 8 * channels as u64 * height as u64 * width as u64;
            if needed > memory {
                let (needed, memory) = (super::size(needed), super::size(memory));
                let message =
                    format!("{height} × {width} pixels (height × width) take {needed} at least, of {memory} here");
                return Err(Usage(message).into());
            }
        }
        Ok(())
    }

    /// Height and width of the pictures, where either is given; the other one is that of `own`.
    pub fn size(&self, (height, width): (i64, i64)) -> Option<(i64, i64)> {
        (self.height.is_some() || self.width.is_some())
            .then(|| (self.height.unwrap_or(height), self.width.unwrap_or(width)))
    }

    /// What these options ask for. Prompt, noise and size are the command's; the guidance is known with
    /// [`Self::complete`].
    pub fn request(&self) -> Request {
        Request {
            negative_prompt: self.negative_prompt.clone(),
            steps: self.steps,
            sampler: self.scheduler.0,
            batch: self.batch_size,
            ..Request::default()
        }
    }

    /// Sets the guidance of `request`, and checks that the model's sampler can do its steps; returns that sampler.
    ///
    /// # Errors
    /// [`Usage`] for a number of steps that the schedule cannot do; a sampler that the model's schedule does not go with.
    pub fn complete(&self, request: &mut Request, pipeline: &Pipeline) -> Result<SamplerKind> {
        request.guidance_scale = self.guidance_scale.unwrap_or_else(|| pipeline.own_guidance_scale());
        // A number of steps that the schedule cannot do is the command line's.
        match (pipeline.sampler(request.sampler, request.steps), pipeline.sampler(request.sampler, 1)) {
            (Ok((kind, _)), _) => Ok(kind),
            (Err(error), Ok(_)) => Err(Usage(format!("--steps {}: {error:#}", self.steps)).into()),
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Says on standard error what is surprising about the sampler of a completed request.
    pub fn say_sampler(&self, pipeline: &Pipeline, request: &Request) {
        let kind = request.sampler.unwrap_or_else(|| {
            let own = pipeline.own_sampler();
            if let Some(warning) = own.warning {
                warn(warning);
            }
            own.kind
        });
        if kind == SamplerKind::Lcm && self.guidance_scale.is_none() {
            note(format_args!(
                "models for the sampler `lcm` are made for --guidance-scale 1 to 2 and --steps 4 to 8; {} and {} are used",
                request.guidance_scale, request.steps
            ));
        }
    }
}
