//! `palettist generate`: pictures from a model and a prompt.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::doctor::memory;
use super::model::ModelArgs;
use super::train::stop_on_interrupt;
use super::{Interrupted, Usage, print};
use crate::diffusion::{Noise, SamplerChoice, SamplerKind};
use crate::files::{TensorFile, write_safetensors};
use crate::pipeline::{Pipeline, Request};
use crate::report::{Progress, pictures};
use crate::source::Model;
use crate::terminal::{note, warn};
use crate::train::{Stopped, go_on};

/// Draw pictures from a prompt.
///
/// One picture is written to OUT.png; several to OUT-0.png, OUT-1.png, … Picture i depends on the seed and on i only,
/// not on how many are drawn. Files that are there are replaced. Pictures are written as they are done: Ctrl-C keeps them.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,

    /// What to draw.
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,

    /// What to stay away from [default: nothing; zeros where the model's index says so, as Stable Diffusion XL's does].
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub negative_prompt: String,

    /// Where the picture goes.
    #[arg(short, long, value_name = "OUT.png")]
    pub output: PathBuf,

    /// A palettized checkpoint, in place of the weights of the model's UNet.
    #[arg(long, value_name = "PALETTES")]
    pub palettes: Option<PathBuf>,

    /// What a run with palettize.palettes learnt on these palettes, to put onto them (NAME.subject.safetensors).
    #[arg(long, value_name = "SUBJECT")]
    pub subject: Option<PathBuf>,

    /// Steps of the sampler.
    #[arg(long, value_name = "N", default_value_t = 25)]
    pub steps: usize,

    /// How strongly the prompt rules; 1 or less switches guidance off [default: 7.5, and 5 for Stable Diffusion XL].
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

    /// How many pictures [default: 1, or as many as there are latents].
    #[arg(long, value_name = "N")]
    pub num_images: Option<usize>,

    /// Initial noise of unit variance, in place of the seed's: the tensor `latents` [N, 4, height/8, width/8].
    #[arg(long, value_name = "IN.safetensors")]
    pub latents: Option<PathBuf>,

    /// Write the final latents, before the VAE, as the tensor `latents`.
    #[arg(long, value_name = "OUT.safetensors")]
    pub save_latents: Option<PathBuf>,

    /// How many pictures go through the UNet together; less takes less memory.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub batch_size: usize,

    /// Where to compute: auto (a GPU that CUDA finds, else the CPU), cpu, cuda or mps.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub device: Device,

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
    text.parse().map_err(|_| anyhow!("a seed is a whole number of at least 0"))
}

fn precision(name: &str) -> Result<Kind> {
    match name {
        "fp32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        "fp16" => Ok(Kind::Half),
        _ => bail!("there are fp32, bf16 and fp16"),
    }
}

/// Refuses names that no result of this kind has.
fn check_output(path: &Path, ending: &str) -> Result<()> {
    let fits = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(ending));
    ensure!(fits, "{}: the name should end in .{ending}", path.display());
    ensure!(!path.is_dir(), "{} is a folder; give the name of a file", path.display());
    Ok(())
}

/// `OUT.png`, or `OUT-2.png` for the third of several.
fn numbered(output: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return output.to_owned();
    }
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = output.extension().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!("{stem}-{index}.{extension}"))
}

fn read_latents(path: &Path) -> Result<Tensor> {
    let file = TensorFile::open(path)?;
    ensure!(
        file.names().iter().any(|name| name == "latents"),
        "{} has no tensor `latents`; it has: {}",
        path.display(),
        file.names().join(", ")
    );
    let latents = file.tensor("latents")?.to_kind(Kind::Float);
    ensure!(latents.isfinite().all().int64_value(&[]) != 0, "{}: `latents` are not all finite", path.display());
    Ok(latents)
}

/// What can be checked on the command line alone.
fn check(args: &Args) -> Result<()> {
    check_output(&args.output, "png")?;
    if let Some(path) = &args.save_latents {
        check_output(path, "safetensors")?;
    }
    if let Some(scale) = args.guidance_scale.filter(|scale| !scale.is_finite()) {
        bail!("--guidance-scale {scale} is no number");
    }
    ensure!(args.num_images != Some(0), "--num-images 0: at least one picture is needed");
    ensure!(args.steps > 0, "--steps 0: at least one step is needed");
    ensure!(args.batch_size > 0, "--batch-size 0: at least one picture goes through the UNet at a time");
    if let Some(scale) = args.guidance_scale.filter(|&scale| scale <= 1.0 && !args.negative_prompt.is_empty()) {
        bail!("--negative-prompt has no effect with --guidance-scale {scale}: 1 or less switches guidance off");
    }
    Ok(())
}

/// What can be checked once the model's configuration is known: the size of pictures and the number of steps.
fn check_with(args: &Args, model: &Model, request: &Request) -> Result<()> {
    let factor = model.autoencoder_config()?.factor();
    for (name, side) in [("height", args.height), ("width", args.width)] {
        let Some(side) = side else { continue };
        if side < 1 || side % factor != 0 {
            return Err(Usage(format!("--{name} {side} is not a multiple of {factor}")).into());
        }
        if side > LARGEST_SIDE {
            return Err(Usage(format!("--{name} {side} is more than {LARGEST_SIDE}, the most that is drawn")).into());
        }
    }
    // What the decoder reads and writes at full size: less than all that it takes.
    if let (Some((height, width)), Some((memory, _))) = (request.size, memory().filter(|_| args.device == Device::Cpu))
    {
        let channels = model.autoencoder_config()?.block_out_channels.first().copied().unwrap_or(1);
        let needed = 8 * channels as u64 * height as u64 * width as u64;
        if needed > memory {
            let (needed, memory) = (super::size(needed), super::size(memory));
            let message =
                format!("{height} × {width} pixels (height × width) take {needed} at least, of {memory} here");
            return Err(Usage(message).into());
        }
    }
    if let (Noise::Latents(latents, _), Some((height, width))) = (&request.noise, request.size)
        && let [_, _, h, w] = latents.size()[..]
        && (height, width) != (h * factor, w * factor)
    {
        let message = format!(
            "--height and --width ask for {height} × {width} pixels, and the latents are for {} × {} pixels (height × width)",
            h * factor,
            w * factor
        );
        return Err(Usage(message).into());
    }
    Ok(())
}

/// What is asked for.
fn request(args: &Args) -> Result<Request> {
    let (noise, images) = match &args.latents {
        None => (Noise::Seed(args.seed.unwrap_or(0)), args.num_images.unwrap_or(1)),
        Some(path) => {
            let latents = read_latents(path)?;
            let count = latents.size().first().map_or(0, |&n| n as usize);
            let asked = args.num_images.unwrap_or(count);
            if asked != count {
                let message = format!("{} holds latents for {count}, and --num-images is {asked}", path.display());
                return Err(Usage(message).into());
            }
            (Noise::Latents(latents, args.seed.unwrap_or(0)), count)
        }
    };
    Ok(Request {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        steps: args.steps,
        sampler: args.scheduler.0,
        noise,
        images,
        batch: args.batch_size,
        ..Request::default()
    })
}

/// Draws and writes; says on standard output what went where.
pub fn run(args: Args) -> Result<()> {
    check(&args).map_err(|error| Usage(format!("{error:#}")))?;
    let mut request = request(&args)?;
    let opened = args.model.open(args.palettes.as_deref())?.with_subject(args.subject.as_deref())?;
    if args.height.is_some() || args.width.is_some() {
        let factor = opened.model.autoencoder_config()?.factor();
        let (height, width) = match &request.noise {
            Noise::Seed(_) | Noise::Seeds(_) => {
                let side = opened.model.unet_config()?.sample_size * factor;
                (side, side)
            }
            Noise::Latents(latents, _) => {
                let side = |axis| latents.size().get(axis).copied().unwrap_or(0) * factor;
                (side(2), side(3))
            }
        };
        request.size = Some((args.height.unwrap_or(height), args.width.unwrap_or(width)));
    }
    check_with(&args, &opened.model, &request)?;
    let pipeline = Pipeline::load(&opened.model, opened.checkpoint()?.as_ref(), args.precision, args.device)?;
    request.guidance_scale = args.guidance_scale.unwrap_or_else(|| pipeline.own_guidance_scale());
    // A number of steps that the schedule cannot do is the command line's.
    let kind = match (pipeline.sampler(request.sampler, request.steps), pipeline.sampler(request.sampler, 1)) {
        (Ok((kind, _)), _) => kind,
        (Err(error), Ok(_)) => return Err(Usage(format!("--steps {}: {error:#}", args.steps)).into()),
        (Err(error), Err(_)) => return Err(error),
    };
    if args.seed.is_some() && args.latents.is_some() && !kind.adds_noise() {
        let message = format!("--seed has no effect with --latents: the sampler `{kind}` adds no noise of its own");
        return Err(Usage(message).into());
    }

    // Before the work, so that a folder that cannot be made does not cost it.
    for path in [Some(&args.output), args.save_latents.as_ref()].into_iter().flatten() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
    }

    say_sampler(&args, &pipeline, &request);
    stop_on_interrupt("stopping; pictures that are finished are kept")?;
    draw(&args, &pipeline, &request)
}

/// Says on standard error what is surprising about the sampler.
fn say_sampler(args: &Args, pipeline: &Pipeline, request: &Request) {
    let kind = request.sampler.unwrap_or_else(|| {
        let own = pipeline.own_sampler();
        if let Some(warning) = own.warning {
            warn(warning);
        }
        own.kind
    });
    if kind == SamplerKind::Lcm && args.guidance_scale.is_none() {
        note(format_args!(
            "models for the sampler `lcm` are made for --guidance-scale 1 to 2 and --steps 4 to 8; {} and {} are used",
            request.guidance_scale, request.steps
        ));
    }
}

/// Draws, and writes each batch as soon as it is done.
fn draw(args: &Args, pipeline: &Pipeline, request: &Request) -> Result<()> {
    let mut bar: Option<Progress> = None;
    let mut latents = Vec::new();
    let mut written = 0;
    let drawn = pipeline.generate_batches(
        request,
        &mut |done, total| {
            bar.get_or_insert_with(|| Progress::new("drawing", 0, total as u64).counting("evaluation"))
                .update(done as u64, &[]);
            go_on()
        },
        &mut |batch| {
            for picture in batch.images.unbind(0) {
                let path = numbered(&args.output, written, request.images);
                pictures::write_png(&path, &pictures::from_tensor(&picture)?)?;
                print(path.display())?;
                written += 1;
            }
            latents.push(batch.latents);
            Ok(())
        },
    );
    if let Some(bar) = bar {
        bar.finish();
    }
    if let Some(path) = &args.save_latents
        && !latents.is_empty()
    {
        write_safetensors(path, [("latents", &Tensor::cat(&latents, 0))], None, &Default::default())
            .context("the final latents")?;
        print(path.display())?;
    }
    match drawn {
        Err(error) if error.is::<Stopped>() => {
            Err(Interrupted(format!("stopped; {written} of {} pictures are written", request.images)).into())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_pictures_are_numbered() {
        assert_eq!(numbered(Path::new("a/b.c.png"), 0, 1), Path::new("a/b.c.png"));
        assert_eq!(numbered(Path::new("a/b.c.png"), 2, 3), Path::new("a/b.c-2.png"));
    }
}
