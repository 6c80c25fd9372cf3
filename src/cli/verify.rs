//! `palettist verify`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use tch::{Device, Kind, Tensor};

use super::doctor::memory;
use super::model::ModelArgs;
use super::nbits::{Nbits, forms};
use super::{Mistakes, Usage, print};
use crate::coreml::components::{Attended, Part};
use crate::coreml::layers::Recording;
use crate::coreml::parameters::Held;
use crate::coreml::read::{Chain, Precision};
use crate::coreml::verify::{
    Report, Settings, UnetInputs, part_of, verify_one_input, verify_safety_checker, verify_text_encoder, verify_unet,
};
use crate::diffusion::NoiseSchedule;
use crate::diffusion::pipeline::unet_weights;
use crate::networks::autoencoder::{decode, encode};
use crate::networks::safety_checker::safety_checker;
use crate::networks::text_encoder::text_encoder;
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::Tensors;
use crate::palette::PalettizedCheckpoint;
use crate::palette::post_training::palettize;
use crate::source::{Component, Model};

/// Reads packages back from disk, checks them, runs them, and compares them with the network
#[derive(clap::Args)]
pub struct Args {
    /// .mlpackage folders; of a UNet in chunks the first, which takes the others along
    #[arg(required = true, value_name = "PACKAGE")]
    packages: Vec<PathBuf>,
    /// The model that the packages were made of, a diffusers folder, a single file or a run; without it they are only checked
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    /// The palettized checkpoint that was exported
    #[arg(long, requires = "against")]
    palettes: Option<PathBuf>,
    /// The palettes that were made on the way into the packages: what `export` was told
    #[arg(long, requires = "against", value_name = "N")]
    quantize_nbits: Option<Nbits>,
    /// Less than this many dB, in either arithmetic, is a failure, as are parameters that are not the model's or, where
    /// palettes are given, not theirs
    #[arg(long, default_value_t = 35.0, allow_negative_numbers = true, requires = "against")]
    min_psnr: f64,
    /// Compares every layer too, and shows where the error grows
    #[arg(long, requires = "against")]
    layers: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.min_psnr.is_nan() {
        return Err(Usage("--min-psnr is no number".into()).into());
    }
    if let Some(path) =
        args.packages.iter().find(|path| path.is_file() && path.extension() == Some("safetensors".as_ref()))
    {
        let message = "is not a .mlpackage folder; `palettist inspect` tells what a checkpoint holds";
        return Err(Usage(format!("{} {message}", path.display())).into());
    }
    let opened = args.against.map(|model| ModelArgs { model }.open(args.palettes.as_deref())).transpose()?;
    let checkpoint = match &opened {
        Some(opened) => opened.checkpoint()?,
        None => None,
    };
    let model = opened.map(|opened| opened.model);
    let nbits = args.quantize_nbits.clone().unwrap_or_default();
    let mut failed = Vec::new();
    for path in &args.packages {
        let half = Half::of(path);
        // The first takes it along.
        if half.as_ref().is_some_and(|half| half.second && args.packages.contains(&half.other)) {
            continue;
        }
        print(path.display())?;
        let missing = half.as_ref().filter(|half| !half.other.exists());
        let missing =
            missing.map(|half| anyhow!("{}: its other half is missing: {}", path.display(), half.other.display()));
        let Some(model) = &model else {
            // A second half with the first: whether they belong together.
            let first = half.as_ref().filter(|half| half.second && half.other.exists()).map(|half| &half.other);
            let chain = Chain::open(first.unwrap_or(path))?;
            for package in chain.packages().iter().filter(|package| first.is_none() || package.path() == path) {
                package.check_values()?;
                print(format_args!(
                    "  sound: specification version {}, {} operations",
                    package.specification_version(),
                    package.operation_counts().values().sum::<usize>()
                ))?;
            }
            missing.map_or(Ok(()), Err)?;
            continue;
        };
        missing.map_or(Ok(()), Err)?;
        if let Some(first) = half.filter(|half| half.second).map(|half| half.other) {
            let message = format!("{} goes with {}: verify that", path.display(), first.display());
            return Err(Usage(message).into());
        }
        let report = against(path, model, checkpoint.as_ref(), &nbits, args.layers)?;
        print(format!("{report}").trim_end())?;
        let (single, half) = (report.least(Precision::Float32), report.least(Precision::Float16));
        let mut fault = |what: String| failed.push(format!("{}: {what}", path.display()));
        if single.min(half).is_nan() || single.min(half) < args.min_psnr {
            fault(format!("{:.1} dB, less than {}", single.min(half), args.min_psnr));
        }
        if half == f64::NEG_INFINITY && single.is_finite() {
            fault("values pass what fp16 holds, 65504; --layers shows where".to_owned());
        }
        if let Some(parameters) = report.parameters.filter(|parameters| !parameters.others.is_empty()) {
            fault(parameters.to_string());
        }
    }
    if !failed.is_empty() {
        return Err(Mistakes(failed).into());
    }
    Ok(())
}

/// Compares a package with the network of `model` that it holds; `palettes` are in place of the UNet's weights, else
/// those that `nbits` asks for. With `layers`, every layer is compared too.
pub fn against(
    path: &Path,
    model: &Model,
    palettes: Option<&PalettizedCheckpoint>,
    nbits: &Nbits,
    layers: bool,
) -> Result<Report> {
    let package = Chain::open(path)?;
    let recording = Recording::default();
    let watch = |name: &str, value: &Tensor| recording.watch(name, value);
    let mut settings = Settings {
        memory: memory().map(|(_, free)| free),
        recording: layers.then_some(&recording),
        ..Settings::default()
    };
    let tensors = |weights| if layers { Tensors::new(weights).watched(&watch) } else { Tensors::new(weights) };
    let mut part = part_of(&package)?;
    if part == Part::TextEncoder && model.is_xl() {
        // Two networks have these inputs and outputs; the first output has as many channels as one of them.
        let channels = package.outputs().first().and_then(|output| output.kind.shape.last());
        if channels == Some(&model.text_encoder_config_of(Component::TextEncoder2)?.hidden_size) {
            part = Part::TextEncoder2;
        }
    }
    let (form, parameters) = (nbits.of_model(part, model)?, part.parameters(model)?);
    let palettized = form.is_some() || (part == Part::Unet && palettes.is_some());
    let held = |weights| Some(Held { weights, parameters: parameters.len(), palettized });
    let own = || match form {
        None => model.weights(part.component(), Kind::Float, Device::Cpu),
        Some(form) => {
            let stored = model.stored(part.component())?;
            let tensors =
                parameters.iter().map(|p| Ok((p.name.clone(), stored.tensor(&p.name, Kind::Half, Device::Cpu)?)));
            palettize(tensors, &forms(&parameters, form), Default::default(), BTreeMap::new(), &|_| ())?
                .weights(Kind::Float, Device::Cpu)
        }
    };
    let named = |outputs: Vec<(&str, Tensor)>| Ok(outputs.into_iter().map(|(name, x)| (name.to_owned(), x)).collect());
    match part {
        Part::Unet => {
            let config = model.unet_config()?;
            let weights = match palettes {
                Some(_) => unet_weights(model, palettes, Kind::Float, Device::Cpu)?,
                None => own()?,
            };
            settings.held = held(&weights);
            // A package predicts the noise, whatever the network does.
            let schedule = NoiseSchedule::from_config(&model.scheduler_config()?)?;
            settings.timesteps.iter_mut().for_each(|t| *t = (*t).min(schedule.timesteps() - 1));
            let mut network = |given: &UnetInputs| {
                takes(&config, given)?;
                let output = unet(&mut tensors(&weights), &config, &given.sample, &given.timestep, given.condition());
                Ok(schedule.predicted_noise(&given.sample, &output, &given.timestep.to_kind(Kind::Int64)))
            };
            verify_unet(&package, &mut network, &settings)
        }
        Part::TextEncoder | Part::TextEncoder2 => {
            let config = model.text_encoder_config_of(part.component())?;
            let weights = own()?;
            settings.held = held(&weights);
            let end = if config.eos_token_id == 2 { config.vocab_size - 1 } else { config.eos_token_id };
            let mut network = |ids: &Tensor| {
                named(Attended::of(model).outputs(text_encoder(&mut tensors(&weights), &config, ids)).into())
            };
            verify_text_encoder(&package, (config.vocab_size, end), &mut network, &settings)
        }
        Part::VaeDecoder | Part::VaeEncoder => {
            let config = model.autoencoder_config()?;
            let weights = own()?;
            settings.held = held(&weights);
            let mut network = |x: &Tensor| {
                let mut ops = tensors(&weights);
                named(match part {
                    Part::VaeDecoder => vec![("image", decode(&mut ops, &config, x))],
                    _ => vec![("latent", encode(&mut ops, &config, x))],
                })
            };
            verify_one_input(&package, &mut network, &settings)
        }
        Part::SafetyChecker => {
            let config = model.safety_checker_config()?;
            let weights = own()?;
            settings.held = held(&weights);
            let mut network = |[picture, images, adjustment]: &[Tensor; 3]| {
                let output = safety_checker(&mut tensors(&weights), &config, picture, images, adjustment);
                named(vec![
                    ("filtered_images", output.filtered),
                    ("has_nsfw_concepts", output.held_back),
                    ("concept_scores", output.scores),
                ])
            };
            verify_safety_checker(&package, &mut network, &settings)
        }
    }
}

/// Refuses what a package is given and a UNet cannot be: then it is a package of another model.
///
/// # Errors
/// The first input of another width or number, with both.
fn takes(config: &UnetConfig, given: &UnetInputs) -> Result<()> {
    let size = given.sample.size();
    let text_width = |added: &[Tensor; 2]| added[0].size()[1];
    for (what, package, model) in [
        ("channels of `sample`", Some(size[1]), Some(config.in_channels)),
        ("channels of `encoder_hidden_states`", Some(given.context.size()[2]), Some(config.cross_attention_dim)),
        ("channels of `text_embeds`", given.added.as_ref().map(text_width), config.addition.map(|a| a.text_width)),
    ] {
        if package != model {
            let told = |number: Option<i64>| number.map_or("none".to_owned(), |number| number.to_string());
            let (package, model) = (told(package), told(model));
            bail!("it is a package of another model: {what}: {package} in the package, {model} in the model's UNet");
        }
    }
    let residuals: Vec<Vec<i64>> = given.residuals.iter().map(Tensor::size).collect();
    if !residuals.is_empty() && residuals != config.residual_shapes(size[0], size[2], size[3]) {
        bail!("it is a package of another model: the residuals of a ControlNet have other shapes");
    }
    Ok(())
}

/// A path that is, by its name, that of one of a UNet's two chunks.
struct Half {
    second: bool,
    /// Where the other one is, if it is anywhere.
    other: PathBuf,
}

impl Half {
    fn of(path: &Path) -> Option<Self> {
        const ENDINGS: [&str; 2] = ["_chunk1.mlpackage", "_chunk2.mlpackage"];
        let name = path.file_name()?.to_str()?;
        let second = name.ends_with(ENDINGS[1]);
        let stem = name.strip_suffix(ENDINGS[usize::from(second)])?;
        Some(Self { second, other: path.with_file_name(format!("{stem}{}", ENDINGS[usize::from(!second)])) })
    }
}
