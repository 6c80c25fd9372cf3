//! `palettist generate`: pictures from a model and a prompt.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::drawing::{DrawingArgs, device};
use super::model::ModelArgs;
use super::train::stop_on_interrupt;
use super::{Interrupted, Usage, print};
use crate::config::SamplePrompt;
use crate::diffusion::Noise;
use crate::files::{TensorFile, check_writable, write_safetensors};
use crate::pipeline::{Pipeline, Request};
use crate::report::pictures;
use crate::source::Model;
use crate::terminal::{Progress, note};
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

    /// Where the picture goes.
    #[arg(short, long, value_name = "OUT.png")]
    pub output: PathBuf,

    /// A palettized checkpoint, in place of the weights of the model's UNet.
    #[arg(long, value_name = "PALETTES")]
    pub palettes: Option<PathBuf>,

    /// What a run with palettize.palettes learnt on these palettes, to put onto them (NAME.subject.safetensors).
    #[arg(long, value_name = "SUBJECT")]
    pub subject: Option<PathBuf>,

    #[command(flatten)]
    pub drawing: DrawingArgs,

    /// How many pictures [default: 1, or as many as there are latents].
    #[arg(long, value_name = "N")]
    pub num_images: Option<usize>,

    /// Initial noise of unit variance, in place of the seed's: the tensor `latents` [N, 4, height/8, width/8].
    #[arg(long, value_name = "IN.safetensors")]
    pub latents: Option<PathBuf>,

    /// Write the final latents, before the VAE, as the tensor `latents`.
    #[arg(long, value_name = "OUT.safetensors")]
    pub save_latents: Option<PathBuf>,

    /// Where to compute: auto (a GPU that CUDA finds, else the CPU), cpu, cuda or mps.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub device: Device,
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
    /// As many tensors are named of a file that is another's.
    const NAMED: usize = 5;
    let file = TensorFile::open(path)?;
    let names = file.names();
    if !names.iter().any(|name| name == "latents") {
        let more = names.len().saturating_sub(NAMED);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        let some = names[..names.len() - more].join(", ");
        bail!("{} has no tensor `latents`; it has: {some}{rest}", path.display());
    }
    let latents = file.tensor("latents")?.to_kind(Kind::Float);
    ensure!(latents.isfinite().all().int64_value(&[]) != 0, "{}: `latents` are not all finite", path.display());
    Ok(latents)
}

/// What can be checked on the command line alone.
fn check(args: &Args) -> Result<()> {
    args.drawing.check()?;
    check_output(&args.output, "png")?;
    if let Some(path) = &args.save_latents {
        check_output(path, "safetensors")?;
    }
    ensure!(args.num_images != Some(0), "--num-images 0: at least one picture is needed");
    Ok(())
}

/// What can be checked once the model's configuration is known: the size of pictures and the number of steps.
fn check_with(args: &Args, model: &Model, request: &Request) -> Result<()> {
    args.drawing.check_sides(model, request.size, args.device)?;
    let factor = model.autoencoder_config()?.factor();
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
        None => (Noise::Seed(args.drawing.seed.unwrap_or(0)), args.num_images.unwrap_or(1)),
        Some(path) => {
            let latents = read_latents(path)?;
            let count = latents.size().first().map_or(0, |&n| n as usize);
            let asked = args.num_images.unwrap_or(count);
            if asked != count {
                let message = format!("{} holds latents for {count}, and --num-images is {asked}", path.display());
                return Err(Usage(message).into());
            }
            (Noise::Latents(latents, args.drawing.seed.unwrap_or(0)), count)
        }
    };
    Ok(Request { prompt: args.prompt.clone(), noise, images, ..args.drawing.request() })
}

/// Draws and writes; says on standard output what went where.
pub fn run(args: Args) -> Result<()> {
    check(&args).map_err(|error| Usage(format!("{error:#}")))?;
    if SamplePrompt::parse(&args.prompt).is_ok_and(|read| read.prompt != args.prompt.trim()) {
        note(
            "flags within --prompt (as kohya's --n, --w, --s) are drawn as words: they are read in sample.prompts and in \
             `evaluate --prompts`; here there are --negative-prompt, --width, --steps and so on",
        );
    }
    let mut request = request(&args)?;
    let opened = args.model.open(args.palettes.as_deref())?.with_subject(args.subject.as_deref())?;
    if args.drawing.height.is_some() || args.drawing.width.is_some() {
        let factor = opened.model.autoencoder_config()?.factor();
        let own = match &request.noise {
            Noise::Seed(_) | Noise::Seeds(_) => [opened.model.unet_config()?.sample_size; 2],
            Noise::Latents(latents, _) => [2, 3].map(|axis| latents.size().get(axis).copied().unwrap_or(0)),
        };
        request.size = args.drawing.size((own[0] * factor, own[1] * factor));
    }
    check_with(&args, &opened.model, &request)?;
    let pipeline = Pipeline::load(&opened.model, opened.checkpoint()?.as_ref(), args.drawing.precision, args.device)?;
    let kind = args.drawing.complete(&mut request, &pipeline)?;
    if args.drawing.seed.is_some() && args.latents.is_some() && !kind.adds_noise() {
        let message = format!("--seed has no effect with --latents: the sampler `{kind}` adds no noise of its own");
        return Err(Usage(message).into());
    }

    // Before the work, so that a folder that cannot be written does not cost it.
    for path in [Some(&args.output), args.save_latents.as_ref()].into_iter().flatten() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        check_writable(folder)?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
    }

    args.drawing.say_sampler(&pipeline, &request);
    stop_on_interrupt("stopping; pictures that are finished are kept")?;
    draw(&args, &pipeline, &request)
}

/// Draws, and writes each batch as soon as it is done.
fn draw(args: &Args, pipeline: &Pipeline, request: &Request) -> Result<()> {
    let bar: RefCell<Option<Progress>> = RefCell::new(None);
    let mut latents = Vec::new();
    let mut written = 0;
    let drawn = pipeline.generate_batches(
        request,
        &mut |done, total| {
            bar.borrow_mut()
                .get_or_insert_with(|| Progress::new("drawing", 0, total as u64).counting("evaluation"))
                .update(done as u64, &[]);
            go_on()
        },
        &mut |batch| {
            for picture in batch.images.unbind(0) {
                let path = numbered(&args.output, written, request.images);
                pictures::write_png(&path, &pictures::from_tensor(&picture)?)?;
                match &*bar.borrow() {
                    Some(bar) => bar.aside(|| print(path.display()))?,
                    None => print(path.display())?,
                }
                written += 1;
            }
            latents.push(batch.latents);
            Ok(())
        },
    );
    if let Some(bar) = bar.into_inner() {
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
