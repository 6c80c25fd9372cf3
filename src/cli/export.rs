//! `palettist export`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::{Device, Kind};

use super::model::ModelArgs;
use super::nbits::{Nbits, forms};
use super::{Usage, must_be_new, print};
use crate::coreml::AttentionImplementation;
use crate::coreml::DeploymentTarget;
use crate::coreml::PackageMetadata;
use crate::coreml::bundle::{Bundle, InTheWay, holds_bundle, of_another_model, of_other_weights};
use crate::coreml::components::apple::{misfits, takes_safety_checker};
use crate::coreml::components::cost::Cost;
use crate::coreml::components::unet::{LARGEST_LATENTS, UnetOptions, export_unet, takes_latents};
use crate::coreml::components::{
    Attended, Part, autoencoder_numbers, export_safety_checker, export_text_encoder, export_vae_decoder,
    export_vae_encoder,
};
use crate::coreml::format::metadata::PALETTES;
use crate::coreml::format::place::{Occupied, recover, replaces};
use crate::coreml::prompt::{Prompt, prompt_tokens};
use crate::coreml::writing::chunk::{chunk_paths, export_in_chunks};
use crate::coreml::writing::interface::{Destination, Weighted};
use crate::coreml::writing::lowering::velocity::Velocity;
use crate::coreml::writing::weights::{PostTraining, WeightSource};
use crate::palette::checkpoint::PalettizedFile;
use crate::pipeline::drawing::{check_shapes, unet_weights};
use crate::pipeline::text_to_image;
use crate::report::Progress;
use crate::source::{Component, Model, copy_model};
use crate::terminal::shell_word;
use crate::terminal::{tell, warn};
use crate::torch::give_back_large_memory;

/// Writes Core ML packages, or a diffusers folder
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write into (Core ML), or to make (diffusers)
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// A palettized checkpoint to put in place of the model's weights
    #[arg(long)]
    palettes: Option<PathBuf>,
    /// coreml: packages; diffusers: a folder with the palettes' values in plain fp16 weights
    #[arg(long, default_value = "coreml", value_parser = ["coreml", "diffusers"])]
    format: String,
    /// Which networks, with commas between: unet (the default), text_encoder, text_encoder_2 (of Stable Diffusion XL),
    /// vae_decoder, vae_encoder, safety_checker; or all that the model has, the safety checker only for 512×512 pixels,
    /// the one size at which Apple's programs can use it
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    component: Vec<String>,
    /// Palettes of N bits for the weights as they are, without training: N for every network that is exported, or NAME=N
    /// with commas between, as in unet=4,text_encoder=6. Embeddings stay fp16
    #[arg(long, value_name = "N")]
    quantize_nbits: Option<Nbits>,
    /// Also makes the folder Resources that Apple's Swift package reads, Mochi Diffusion too; all networks if none are
    /// named. Compiling takes a Mac: elsewhere a script to run there is written
    #[arg(long)]
    bundle_resources_for_swift_cli: bool,
    /// How the UNet's attention is spelt: ORIGINAL for the GPU (the default), SPLIT_EINSUM or SPLIT_EINSUM_V2 (512 queries
    /// at a time: phones, large pictures) for the Neural Engine
    #[arg(long, value_enum, value_name = "ORIGINAL|SPLIT_EINSUM|SPLIT_EINSUM_V2", hide_possible_values = true)]
    attention_implementation: Option<AttentionImplementation>,
    /// iOS16, iOS17, iOS18, or macOS13, macOS14, macOS15; the first that holds the palettes if not given
    #[arg(long, value_enum, value_name = "TARGET", ignore_case = true, hide_possible_values = true)]
    min_deployment_target: Option<DeploymentTarget>,
    /// Height of the latents, an eighth of the picture's; the model's own if not given, a run's as its config has it
    #[arg(long)]
    latent_h: Option<i64>,
    /// Width of the latents
    #[arg(long)]
    latent_w: Option<i64>,
    /// A batch of one: two calls a step for classifier-free guidance, less memory
    #[arg(long)]
    unet_batch_one: bool,
    /// A UNet that takes what ControlNets add (the package `control-unet`)
    #[arg(long)]
    unet_support_controlnet: bool,
    /// The UNet in two packages of half the bytes each, for phones
    #[arg(long)]
    chunk_unet: bool,
    /// Replaces packages that are there already, each once its successor is written, and what a bundle's folder holds
    #[arg(long)]
    overwrite: bool,
    /// The model's name in the package: a hub id, say; the folder's or file's own if not given
    #[arg(long, value_name = "NAME")]
    model_version: Option<String>,
}

/// What an option has an effect on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Packages, whatever they hold.
    Packages,
    /// The UNet's package.
    UnetPackage,
    /// The UNet, in a package or not.
    UnetOfAny,
    /// Packages of networks that see latents or pictures: all but the text encoders.
    SizedPackage,
}

impl Args {
    /// The first option that was given of those about this: what would have no effect is refused.
    fn given(&self, about: impl Fn(About) -> bool) -> Option<&'static str> {
        use About::{Packages, SizedPackage, UnetOfAny, UnetPackage};
        // A bundle's script tells it the app, whether the UNet's package is of this call or was there.
        let of_attention = if self.bundle_resources_for_swift_cli { Packages } else { UnetPackage };
        let options = [
            ("--palettes", self.palettes.is_some(), UnetOfAny),
            ("--component", !self.component.is_empty(), Packages),
            ("--quantize-nbits", self.quantize_nbits.is_some(), Packages),
            ("--bundle-resources-for-swift-cli", self.bundle_resources_for_swift_cli, Packages),
            ("--attention-implementation", self.attention_implementation.is_some(), of_attention),
            ("--min-deployment-target", self.min_deployment_target.is_some(), Packages),
            ("--latent-h", self.latent_h.is_some(), SizedPackage),
            ("--latent-w", self.latent_w.is_some(), SizedPackage),
            ("--unet-batch-one", self.unet_batch_one, UnetPackage),
            ("--unet-support-controlnet", self.unet_support_controlnet, UnetPackage),
            ("--chunk-unet", self.chunk_unet, UnetPackage),
            ("--overwrite", self.overwrite, Packages),
            ("--model-version", self.model_version.is_some(), Packages),
        ];
        options.into_iter().find(|&(_, given, of)| given && about(of)).map(|(option, ..)| option)
    }
}

/// What `--component` asks for, each once and in the order in which packages are written; `None` for all.
fn parts(names: &[String], bundled: bool) -> Result<Option<Vec<Part>>, Usage> {
    if names.is_empty() {
        return Ok((!bundled).then(|| vec![Part::Unet]));
    }
    let (all, names): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| name.trim() == "all");
    let mut parts = Vec::new();
    for name in names {
        parts.push(name.parse::<Part>().map_err(|error| Usage(format!("--component: {error}, or all")))?);
    }
    parts.sort();
    parts.dedup();
    Ok(all.is_empty().then_some(parts))
}

/// All that a model has; the safety checker only where Apple's programs can use it.
fn all(model: &Model, height: i64, width: i64) -> Result<Vec<Part>> {
    let fits = takes_safety_checker(model, height, width)?;
    Ok(Part::of(model).into_iter().filter(|part| fits || *part != Part::SafetyChecker).collect())
}

/// Refuses a place where something is that is not to be replaced.
fn may_be_written(path: &Path, overwrite: bool) -> Result<(), Usage> {
    replaces(path, overwrite).map(drop).map_err(|occupied| refusal(&occupied))
}

fn refusal(occupied: &Occupied) -> Usage {
    let hint = if matches!(occupied, Occupied::Other(_)) { "" } else { ": --overwrite replaces it" };
    Usage(format!("{occupied}{hint}"))
}

/// What another export wrote while this one worked is in the way as what was there before.
fn refused_late(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<Occupied>() {
        Some(occupied) => refusal(occupied).into(),
        None => error,
    }
}

pub fn run(args: Args) -> Result<()> {
    let parts = parts(&args.component, args.bundle_resources_for_swift_cli)?;
    let nbits = args.quantize_nbits.clone().unwrap_or_default();
    if nbits.names(Part::Unet) && args.palettes.is_some() {
        return Err(Usage("--quantize-nbits unet=… and --palettes are both for the UNet: one of them".into()).into());
    }
    let opened = args.model.open(args.palettes.as_deref())?;
    if nbits.names(Part::Unet) && opened.palettes.is_some() {
        let message = "--quantize-nbits unet=…: the UNet of this run has palettes already";
        return Err(Usage(message.into()).into());
    }
    let model = &opened.model;
    // One network may be exported by itself; those that are there must make one model.
    text_to_image::fit(model)?;
    if args.format == "diffusers" {
        if let Some(option) = args.given(|about| about != About::UnetOfAny) {
            return Err(Usage(format!("{option}: for Core ML packages, not for --format diffusers")).into());
        }
        must_be_new(&args.output)?;
        model.check_small_files()?;
        let checkpoint = opened.checkpoint()?;
        let weights = unet_weights(model, checkpoint.as_ref(), Kind::Half, Device::Cpu)?;
        copy_model(model, &args.output, &[(Component::Unet, &weights)], Kind::Half)?;
        return print(args.output.display());
    }
    // Packages are written a weight at a time; so are weights and palettes read.
    give_back_large_memory();
    let checkpoint = opened.palettes.as_deref().map(PalettizedFile::open).transpose()?;
    let config = model.unet_config()?;
    let defaults = UnetOptions::new(&config);
    let own = opened.latents().unwrap_or((defaults.height, defaults.width));
    let (height, width) = (args.latent_h.unwrap_or(own.0), args.latent_w.unwrap_or(own.1));
    if !takes_latents(height, width) {
        return Err(Usage(format!("--latent-h and --latent-w are from 1 to {LARGEST_LATENTS}")).into());
    }
    let parts = parts.map_or_else(|| all(model, height, width), Ok)?;
    let of_text = |part: &Part| matches!(part, Part::TextEncoder | Part::TextEncoder2);
    if let Some(option) = args.given(|about| about == About::SizedPackage).filter(|_| parts.iter().all(of_text)) {
        return Err(Usage(format!("{option} has no effect: text encoders see no latents")).into());
    }
    let of_unet = |about| matches!(about, About::UnetPackage | About::UnetOfAny);
    if let Some(option) = args.given(of_unet).filter(|_| !parts.contains(&Part::Unet)) {
        return Err(Usage(format!("{option} is about the UNet, which --component leaves out")).into());
    }
    let has_autoencoder = parts.iter().any(|part| matches!(part, Part::VaeDecoder | Part::VaeEncoder));
    let given = &args.model.options;
    let idle = given.about_autoencoder().filter(|_| !has_autoencoder);
    if let Some(option) = idle.or(given.about_noise().filter(|_| !parts.contains(&Part::Unet))) {
        return Err(Usage(format!("{option} is about a network that --component leaves out")).into());
    }
    if let Some(part) = Part::of(model).into_iter().find(|part| nbits.names(*part) && !parts.contains(part)) {
        let message = format!("--quantize-nbits {0}=…: --component leaves {0} out", part.name());
        return Err(Usage(message).into());
    }
    let palettized = |part: Part| part == Part::Unet && checkpoint.is_some();
    if args.quantize_nbits.is_some() && !parts.iter().any(|&part| nbits.of(part).is_some() && !palettized(part)) {
        let message = "--quantize-nbits has nothing to palettize: the UNet's palettes are those of --palettes, and \
                       --component names no other network";
        return Err(Usage(message.into()).into());
    }
    let small = parts.iter().find_map(|&part| {
        let form = nbits.of(part).filter(|_| !palettized(part))?;
        Some((part.name(), form.needs_ios18()?))
    });
    let lowest = checkpoint.as_ref().and_then(PalettizedFile::needs_ios18).or(small);
    let target = match (args.min_deployment_target, lowest) {
        (Some(target), Some((name, what))) if target != DeploymentTarget::Ios18 => {
            let message = format!("{target} does not hold {what}, as of {name}: --min-deployment-target iOS18");
            return Err(Usage(message).into());
        }
        (Some(target), _) => target,
        (None, Some(_)) => DeploymentTarget::Ios18,
        (None, None) => DeploymentTarget::Ios16,
    };
    let schedule = text_to_image::schedule(model)?;
    let options = UnetOptions {
        batch: if args.unet_batch_one { 1 } else { 2 },
        height,
        width,
        tokens: prompt_tokens(model)?,
        target,
        attention: args.attention_implementation.unwrap_or_default(),
        controlnet: args.unet_support_controlnet,
        velocity: Velocity::of(&schedule),
        overwrite: args.overwrite,
    };
    let name = args.model_version.clone().unwrap_or_else(|| model.name().to_owned());
    if name.trim().is_empty() {
        return Err(Usage("--model-version is empty: packages are named after it".into()).into());
    }
    if name.chars().any(char::is_control) {
        return Err(Usage(format!("{name:?} has control characters: --model-version takes a name without")).into());
    }
    let metadata = opened.metadata(Some(&name));
    let component = |part: Part| if part == Part::Unet { options.component() } else { part.name() };
    let path = |part: Part| args.output.join(metadata.package_name(component(part)));
    // Before the work, not after an hour of it.
    if is_the_models(&args.output, model.path()) {
        let message = "is the model's own folder: choose another one";
        return Err(Usage(format!("{} {message}", args.output.display())).into());
    }
    if let Some(other) =
        of_another_model(&args.output, &metadata, &Part::of(model)).filter(|_| args.bundle_resources_for_swift_cli)
    {
        let message = "is of another model, and Resources holds one: choose another folder";
        return Err(Usage(format!("{} {message}", other.display())).into());
    }
    let replaced: Vec<PathBuf> = parts
        .iter()
        .flat_map(|&part| {
            let chunks = chunk_paths(&path(part));
            std::iter::once(path(part)).chain(chunks.into_iter().filter(move |_| part == Part::Unet))
        })
        .collect();
    if let Some(other) = of_other_weights(&args.output, &metadata, &replaced) {
        let message = format!("{} is of another model of this name: its weights are not those of", other.display());
        let message = format!("{message} {}", model.path().display());
        if args.bundle_resources_for_swift_cli {
            let advice = "choose another folder, or export all of the model with --component all --overwrite";
            return Err(Usage(format!("{message}; {advice}")).into());
        }
        warn(message);
    }
    for part in &parts {
        let whole = path(*part);
        // A UNet is there whole or in chunks, not both: programs would take the chunks, however old.
        let chunks = chunk_paths(&whole);
        let places = std::iter::once(&whole).chain(chunks.iter().filter(|_| *part == Part::Unet));
        places.into_iter().try_for_each(|path| {
            recover(path)?;
            anyhow::Ok(may_be_written(path, args.overwrite)?)
        })?;
        // A network that the model does not have is the command line's mistake.
        model.check(part.component()).map_err(|error| match Part::of(model).contains(part) {
            true => error,
            false => Usage(format!("--component {}: {error:#}", part.name())).into(),
        })?;
    }
    if let Some(checkpoint) = &checkpoint {
        check_shapes(model, &checkpoint.shapes())?;
    }
    let tokenizer = args.bundle_resources_for_swift_cli.then(|| model.tokenizer_for_swift()).transpose()?;
    let written: Vec<String> = parts.iter().map(|part| component(*part).to_owned()).collect();
    let bundle = tokenizer.as_ref().map(|tokenizer| Bundle {
        folder: &args.output,
        metadata: &metadata,
        attention: options.attention,
        tokenizer: &tokenizer.files,
        written: &written,
        overwrite: args.overwrite,
    });
    bundle.map_or(Ok(()), |bundle| bundle.check()).map_err(|occupied| Usage(occupied.to_string()))?;
    if let Some(checkpoint) = &checkpoint {
        let cost = Cost::of(checkpoint.palettes());
        [cost.note(), cost.warning()].into_iter().flatten().for_each(tell);
    }
    for misfit in misfits(model, &parts, &options)? {
        warn(misfit);
    }
    if let Some(tokens) = tokenizer.as_ref().map(|tokenizer| tokenizer.unreachable.as_slice()).filter(|t| !t.is_empty())
    {
        warn(format_args!(
            "Apple's programs take words apart by merges.txt and never make the added tokens {}, which vocab.json \
             holds: prompts with them will not draw what they should there",
            named(tokens)
        ));
    }
    for part in parts {
        let job = Job { model, part, unet: &options, metadata: &metadata };
        let form = nbits.of_model(part, model)?;
        if form.is_none() && nbits.of(part).is_some() {
            print(format_args!("{part} stays as it is: it computes in fp32, and palettes are fp16"))?;
        }
        let export = |folder: &Path| match (&checkpoint, form) {
            (Some(checkpoint), _) if part == Part::Unet => job.export(checkpoint, folder),
            (_, None) => job.export(&model.stored(part.component())?, folder),
            (_, Some(form)) => {
                let source = model.stored(part.component())?;
                let forms = forms(&part.parameters(model)?, form);
                let mut metadata = metadata.clone();
                let how = format!("post-training k-means, {} bits", form.bits);
                metadata.user_defined.insert(PALETTES.to_owned(), how);
                Job { metadata: &metadata, ..job }.export(&PostTraining { source: &source, forms }, folder)
            }
        };
        if part == Part::Unet && args.chunk_unet {
            for path in export_in_chunks(&path(part), options.overwrite, export).map_err(refused_late)? {
                print(path.display())?;
            }
        } else {
            print(export(&args.output).map_err(refused_late)?.display())?;
        }
    }
    if let Some(bundle) = bundle {
        let made = bundle.write().map_err(|error| match error.downcast_ref::<InTheWay>() {
            Some(occupied) => Usage(occupied.to_string()).into(),
            None => error,
        })?;
        print(made.resources.display())?;
        bundle.missing(model).iter().try_for_each(print)?;
        if !made.compiled {
            print(format_args!(
                "this is no Mac: to compile the packages into it, on one: sh {}",
                shell_word(&made.script.to_string_lossy())
            ))?;
        }
    }
    if !args.bundle_resources_for_swift_cli && holds_bundle(&args.output) {
        warn(format_args!(
            "compile.sh and Resources in {} are of what was there before; --bundle-resources-for-swift-cli makes \
             them anew",
            args.output.display()
        ));
    }
    Ok(())
}

/// Whether a folder is a model's own, or that of one of its networks.
fn is_the_models(folder: &Path, model: &Path) -> bool {
    let (Ok(folder), Ok(model)) = (folder.canonicalize(), model.canonicalize()) else { return false };
    folder == model || (folder.starts_with(&model) && folder.join("config.json").is_file())
}

/// The first few of some names.
fn named(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// One package to write.
#[derive(Clone, Copy)]
struct Job<'a> {
    model: &'a Model,
    part: Part,
    /// Sizes and target, which all packages share.
    unet: &'a UnetOptions,
    metadata: &'a PackageMetadata,
}

impl Job<'_> {
    fn export(&self, weights: &dyn WeightSource, folder: &Path) -> Result<PathBuf> {
        let Self { model, part, unet, metadata } = *self;
        let parameters = part.parameters(model)?.len();
        let mut bar = Progress::new("exporting", 0, parameters as u64).counting("tensor");
        let mut progress = |done: usize, _: usize| bar.update(done as u64, &[]);
        let size = (unet.height, unet.width);
        let destination = Destination { folder, target: unet.target, overwrite: unet.overwrite, metadata };
        let path = if part == Part::Unet {
            export_unet(&model.unet_config()?, weights, unet, metadata, folder, &mut progress)?
        } else {
            let weighted = Weighted { weights, parameters, progress: &mut progress };
            match part {
                Part::VaeDecoder | Part::VaeEncoder => {
                    let write = if part == Part::VaeDecoder { export_vae_decoder } else { export_vae_encoder };
                    let numbers = autoencoder_numbers(part, model)?;
                    write(&model.autoencoder_config()?, numbers, size, weighted, destination)?
                }
                Part::SafetyChecker => {
                    let factor = model.autoencoder_config()?.factor();
                    let size = (factor * size.0, factor * size.1);
                    export_safety_checker(&model.safety_checker_config()?, size, weighted, destination)?
                }
                _ => {
                    let config = model.text_encoder_config_of(part.component())?;
                    let prompt = Prompt::of(model, part.component())?;
                    export_text_encoder(part, Attended::of(model), &prompt, &config, weighted, destination)?
                }
            }
        };
        bar.finish();
        Ok(path)
    }
}
