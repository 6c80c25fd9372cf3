//! `palettist verify`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Kind, Tensor};

use super::doctor::memory;
use super::model::{ModelArgs, about_autoencoder, about_loras, about_noise, given};
use super::{ClosedPipe, Mistakes, Usage, print};
use crate::coreml::components::{Attended, Part};
use crate::coreml::exporting::nbits::{Nbits, forms};
use crate::coreml::format::metadata::{PALETTES, VERSION};
use crate::coreml::prompt::Prompt;
use crate::coreml::reading::{Chain, Chunk, Precision};
use crate::coreml::verifying::layers::Recording;
use crate::coreml::verifying::parameters::{self, Held};
use crate::coreml::verifying::{
    Report, Settings, UnetInputs, part_of, verify_one_input, verify_safety_checker, verify_text_encoder, verify_unet,
};
use crate::networks::autoencoder::{decode, encode};
use crate::networks::safety_checker::safety_checker;
use crate::networks::text_encoder::text_encoder;
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::Tensors;
use crate::palette::post_training::palettize;
use crate::palette::{Form, PalettizedCheckpoint};
use crate::pipeline::drawing::unet_weights;
use crate::pipeline::text_to_image;
use crate::source::{Model, ModelOptions};

/// Reads packages back from disk, compiled or not, checks them, runs them, and compares them with the network
#[derive(clap::Args)]
pub struct Args {
    /// .mlpackage and .mlmodelc folders; of a UNet in chunks the first, which takes the other along
    #[arg(required = true, value_name = "PACKAGE")]
    packages: Vec<PathBuf>,
    /// The model that the packages were made of, a diffusers folder, a single file or a run; without it they are only checked
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    #[command(flatten)]
    model_options: ModelOptions,
    /// The palettized checkpoint that was exported
    #[arg(long, requires = "against")]
    palettes: Option<PathBuf>,
    /// The subject that was exported on these palettes
    #[arg(long, requires = "against", value_name = "SUBJECT")]
    subject: Option<PathBuf>,
    /// The palettes that were made on the way into the packages: what `export` was told
    #[arg(long, requires = "against", value_name = "N")]
    quantize_nbits: Option<Nbits>,
    /// Fails below this PSNR (dB), in fp32 or in fp16 arithmetic, and where a parameter is not the model's or, with
    /// palettes, not theirs
    #[arg(long, default_value_t = 35.0, requires = "against")]
    min_psnr: f64,
    /// Compares every layer too, and shows where the error grows
    #[arg(long, requires = "against")]
    layers: bool,
}

pub fn run(args: Args) -> Result<()> {
    if let Some(option) = given(&args.model_options).filter(|_| args.against.is_none()) {
        return Err(Usage(format!("{option} is about the model of --against, which is not given")).into());
    }
    if args.min_psnr.is_nan() {
        return Err(Usage("--min-psnr is not a valid number".into()).into());
    }
    let options = args.model_options.clone();
    let open = |model| {
        let opened = ModelArgs { model, options }.open(args.palettes.as_deref())?;
        anyhow::Ok(opened.with_subject(args.subject.as_deref())?)
    };
    let opened = args.against.clone().map(open).transpose()?;
    if let Some(opened) = &opened {
        text_to_image::fit(&opened.model)?;
        refuse_unused(&args, &opened.model)?;
    }
    let checkpoint = match &opened {
        Some(opened) => opened.checkpoint()?,
        None => None,
    };
    let model = opened.map(|opened| opened.model);
    let (mut verified, mut failed, mut misused) = (0, Vec::new(), true);
    for path in &args.packages {
        // The first half takes it along.
        if Half::of(path).is_some_and(|half| half.second && args.packages.contains(&half.other)) {
            continue;
        }
        verified += 1;
        match one(path, model.as_ref(), checkpoint.as_ref(), &args) {
            Ok(faults) => {
                misused &= faults.is_empty();
                failed.extend(faults.into_iter().map(|fault| (path, fault)));
            }
            Err(error) if error.is::<ClosedPipe>() => return Err(error),
            Err(error) => {
                misused &= error.is::<Usage>();
                failed.push((path, format!("{error:#}").lines().next().unwrap_or_default().to_owned()));
            }
        }
    }
    if verified > 1 {
        let mut bad: Vec<&Path> = failed.iter().map(|(path, _)| path.as_path()).collect();
        bad.dedup();
        let what = if model.is_some() { "agree with the model" } else { "are sound" };
        print(format_args!("{} of {verified} packages {what}", verified - bad.len()))?;
    }
    if failed.is_empty() {
        return Ok(());
    }
    let named = |(path, fault): (&PathBuf, String)| {
        let path = path.display().to_string();
        if fault.contains(&path) { fault } else { format!("{path}: {fault}") }
    };
    let faults: Vec<String> = failed.into_iter().map(named).collect();
    Err(if misused { Usage(faults.join("\n")).into() } else { Mistakes(faults).into() })
}

/// What is wrong with one package, beside the model where there is one; the report goes to standard output.
fn one(
    path: &Path,
    model: Option<&Model>,
    palettes: Option<&PalettizedCheckpoint>,
    args: &Args,
) -> Result<Vec<String>> {
    if path.is_file() && path.extension() == Some("safetensors".as_ref()) {
        let message = "is not a .mlpackage or .mlmodelc folder; `palettist inspect` tells what a checkpoint holds";
        return Err(Usage(format!("{} {message}", path.display())).into());
    }
    print(path.display())?;
    let half = Half::of(path);
    let missing = half.as_ref().filter(|half| !half.other.exists());
    let missing =
        missing.map(|half| anyhow!("{}: its other half is missing: {}", path.display(), half.other.display()));
    let Some(model) = model else {
        // A second half with the first: whether they belong together.
        let first = half.as_ref().filter(|half| half.second && half.other.exists()).map(|half| &half.other);
        let chain = Chain::open(first.map_or(path, PathBuf::as_path))?;
        for package in chain.packages().iter().filter(|package| first.is_none() || package.path() == path) {
            package.check_values()?;
            print(format_args!(
                "  sound: specification version {}, {} operations",
                package.specification_version(),
                package.operation_counts().values().sum::<usize>()
            ))?;
        }
        return missing.map_or(Ok(Vec::new()), Err);
    };
    missing.map_or(Ok(()), Err)?;
    if let Some(first) = half.filter(|half| half.second).map(|half| half.other) {
        let message = format!("{} goes with {}: verify that", path.display(), first.display());
        return Err(Usage(message).into());
    }
    let nbits = args.quantize_nbits.clone().unwrap_or_default();
    let report = against(path, model, palettes, &nbits, args.layers)?;
    print(format!("{report}").trim_end())?;
    let (single, half) = (report.least(Precision::Float32), report.least(Precision::Float16));
    let mut faults = Vec::new();
    let least = single.min(half);
    if half == f64::NEG_INFINITY && single.is_finite() {
        faults.push("in fp16, values pass what it holds, 65504, and become infinite; --layers shows where".to_owned());
    } else if !least.is_finite() && least != f64::INFINITY {
        faults.push("its outputs are not finite: they cannot be compared; --layers shows where".to_owned());
    } else if least < args.min_psnr {
        faults.push(format!("{least:.1} dB, less than {}", args.min_psnr));
    }
    faults.extend(report.parameters.filter(|found| !found.others.is_empty()).map(|found| found.to_string()));
    Ok(faults)
}

/// Refuses a package whose palettes are not those that the command line names. Where it names none, what to ask for is
/// returned. Those of other converters, which are nobody's here, are compared by what they compute.
///
/// # Errors
/// [`Usage`], with what to give instead.
fn check_palettes(package: &Chain, part: Part, form: Option<Form>, checkpoint: bool) -> Result<Option<String>> {
    let first = package.packages().first().context("there is no package")?;
    let about = &first.metadata().user_defined;
    let weights = package.weights()?;
    let found = weights.iter().filter_map(|weight| weight.palettes).map(|palettes| palettes.bits).max();
    let (Some(bits), true) = (found, about.contains_key(VERSION)) else { return Ok(None) };
    let made_here = about.contains_key(PALETTES);
    let wanted = format!("--quantize-nbits {part}={bits}");
    let message = match (made_here, form) {
        (true, None) if checkpoint => format!("its palettes are not those of --palettes but of {wanted}: give that"),
        (true, None) => format!("this package holds palettes: give {wanted}"),
        (true, Some(form)) if form.bits != bits => {
            format!("its palettes have {bits} bits, and --quantize-nbits says {}: give {wanted}", form.bits)
        }
        (false, None) if !checkpoint => {
            format!("this package holds palettes: give --palettes FILE or {wanted}, whichever it was exported with")
        }
        (false, Some(_)) => "its palettes are those of a checkpoint: give --palettes FILE".to_owned(),
        _ => return Ok(None),
    };
    let message = format!("{}: {message}", package.path().display());
    if form.is_none() && !checkpoint { Ok(Some(message)) } else { Err(Usage(message).into()) }
}

/// Refuses palettes that none of the packages has, and options about a network that none of them is.
fn refuse_unused(args: &Args, model: &Model) -> Result<(), Usage> {
    let nbits = args.quantize_nbits.clone().unwrap_or_default();
    if args.palettes.is_some() && nbits.names(Part::Unet) {
        return Err(Usage("--quantize-nbits unet=… and --palettes are both for the UNet: one of them".into()));
    }
    let (of_autoencoder, of_noise) = (about_autoencoder(&args.model_options), about_noise(&args.model_options));
    let of_loras = about_loras(&args.model_options);
    let about_model = of_autoencoder.or(of_noise).or(of_loras);
    if args.palettes.is_none() && args.quantize_nbits.is_none() && about_model.is_none() {
        return Ok(());
    }
    // What is wrong with a package is told when it is verified.
    let parts: Result<Vec<Part>> = args.packages.iter().map(|path| part_of(&Chain::open(path)?, model)).collect();
    let Ok(parts) = parts else { return Ok(()) };
    let has_autoencoder = parts.iter().any(|part| matches!(part, Part::VaeDecoder | Part::VaeEncoder));
    if let Some(option) = of_autoencoder.filter(|_| !has_autoencoder) {
        return Err(Usage(format!("{option} has no effect: none of the packages is an autoencoder's")));
    }
    let changed = parts.iter().any(|part| matches!(part, Part::Unet | Part::TextEncoder | Part::TextEncoder2));
    if let Some(option) = of_loras.filter(|_| !changed) {
        return Err(Usage(format!("{option} has no effect: none of the packages is a UNet or a text encoder")));
    }
    if let Some(option) = of_noise.filter(|_| !parts.contains(&Part::Unet)) {
        return Err(Usage(format!("{option} has no effect: none of the packages is a UNet")));
    }
    if args.palettes.is_some() && !parts.contains(&Part::Unet) {
        return Err(Usage("--palettes has no effect: none of the packages is a UNet".into()));
    }
    let free = |part: &Part| nbits.of(*part).is_some() && !(*part == Part::Unet && args.palettes.is_some());
    if args.quantize_nbits.is_some() && !parts.iter().any(free) {
        let message = match args.palettes {
            Some(_) => "--quantize-nbits has no effect: the UNet's palettes are those of --palettes",
            None => "--quantize-nbits has no effect: it names none of the packages' networks",
        };
        return Err(Usage(message.into()));
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
    let part = part_of(&package, model)?;
    let (form, own_parameters) = (nbits.of_model(part, model)?, part.parameters(model)?);
    let checkpoint = part == Part::Unet && palettes.is_some();
    let asked = check_palettes(&package, part, form.filter(|_| !checkpoint), checkpoint)?;
    let palettized = form.is_some() || checkpoint || asked.is_some();
    let held = |weights| {
        let held = Held { weights, parameters: own_parameters.len(), palettized };
        // A model may have the values of the palettes itself, as a run's `model/` does.
        match &asked {
            Some(message) if !parameters::compare(&package, held)?.others.is_empty() => {
                Err(Usage(message.clone()).into())
            }
            _ => Ok::<_, anyhow::Error>(Some(held)),
        }
    };
    let own = || match form {
        None => model.weights(part.component(), Kind::Float, Device::Cpu),
        Some(form) => {
            let stored = model.stored(part.component())?;
            let tensors =
                own_parameters.iter().map(|p| Ok((p.name.clone(), stored.tensor(&p.name, Kind::Half, Device::Cpu)?)));
            palettize(tensors, &forms(&own_parameters, form), Default::default(), BTreeMap::new(), &|_| ())?
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
            settings.held = held(&weights)?;
            // A package predicts the noise, whatever the network does.
            let schedule = text_to_image::schedule(model)?;
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
            settings.held = held(&weights)?;
            let prompt = Prompt::of(model, part.component())?;
            let mut network = |ids: &Tensor| {
                named(Attended::of(model).outputs(text_encoder(&mut tensors(&weights), &config, ids)).into())
            };
            verify_text_encoder(&package, &config, &prompt, &mut network, &settings)
        }
        Part::VaeDecoder | Part::VaeEncoder => {
            let config = model.autoencoder_config()?;
            let weights = own()?;
            settings.held = held(&weights)?;
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
            settings.held = held(&weights)?;
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

/// One of a UNet's two chunks.
struct Half {
    second: bool,
    /// Where the other one is, if it is anywhere.
    other: PathBuf,
}

impl Half {
    fn of(path: &Path) -> Option<Self> {
        let chunk = Chunk::of(path)?;
        Some(Self { second: chunk.number == 2, other: chunk.path(3 - chunk.number) })
    }
}
