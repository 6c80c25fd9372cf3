//! `palettist export`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::{Device, Kind};

use super::model::{ModelArgs, Opened, about_autoencoder, about_loras, about_noise};
use super::{Usage, check_output, must_be_new, print};
use crate::config::LONGEST_NAME;
use crate::coreml::bundle::{Bundle, InTheWay, holds_bundle};
use crate::coreml::components::Part;
use crate::coreml::components::cost::Cost;
use crate::coreml::components::unet::{LARGEST_LATENTS, UnetOptions, takes_latents};
use crate::coreml::exporting::plan::{OwnPalettes, TooOld};
use crate::coreml::exporting::{Asked, Nbits, Plan};
use crate::coreml::format::place::Occupied;
use crate::coreml::strangers::of_another_model;
use crate::coreml::{AttentionImplementation, DeploymentTarget, PackageMetadata};
use crate::pipeline::drawing::{check_shapes, unet_weights};
use crate::pipeline::text_to_image;
use crate::source::{Component, Model, copy_model};
use crate::terminal::{Copying, Progress, tell, warn};
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
    /// What a run with palettize.palettes learnt on these palettes, to put onto them (NAME.subject.safetensors)
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<PathBuf>,
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
    /// Also makes the folder Resources that Apple's Swift package reads, Mochi Diffusion too, of packages that are compiled
    /// here; all networks if none are named. The script compile.sh compiles them with Apple's compiler, on a Mac
    #[arg(long)]
    bundle_resources_for_swift_cli: bool,
    /// How the UNet's attention is computed: ORIGINAL for the GPU (the default), SPLIT_EINSUM or SPLIT_EINSUM_V2 (512 queries
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
            ("--subject", self.subject.is_some(), UnetOfAny),
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

fn refusal(occupied: &Occupied) -> Usage {
    let hint = if matches!(occupied, Occupied::Other(_)) { "" } else { ": --overwrite replaces it" };
    Usage(format!("{occupied}{hint}"))
}

/// What is in the way of a package is the command line's mistake, whether it was there before or another export wrote it
/// while this one worked.
fn as_usage(error: anyhow::Error) -> anyhow::Error {
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
    let opened = args.model.open(args.palettes.as_deref())?.with_subject(args.subject.as_deref())?;
    if nbits.names(Part::Unet) && opened.palettes.is_some() {
        let message = "--quantize-nbits unet=…: the UNet of this run has palettes already";
        return Err(Usage(message.into()).into());
    }
    // One network may be exported by itself; those that are there must make one model.
    text_to_image::fit(&opened.model)?;
    if args.format == "diffusers" { diffusers(&args, &opened) } else { packages(&args, &opened, parts, nbits) }
}

/// A diffusers folder.
fn diffusers(args: &Args, opened: &Opened) -> Result<()> {
    let model = &opened.model;
    if let Some(option) = args.given(|about| about != About::UnetOfAny) {
        return Err(Usage(format!("{option}: for Core ML packages, not for --format diffusers")).into());
    }
    must_be_new(&args.output)?;
    check_not_the_models(&args.output, model)?;
    check_output(&args.output)?;
    model.check_small_files()?;
    let checkpoint = opened.checkpoint()?;
    let weights = unet_weights(model, checkpoint.as_ref(), Kind::Half, Device::Cpu)?;
    copy_model(model, &args.output, &[(Component::Unet, &weights)], Kind::Half)?;
    print(args.output.display())
}

/// Core ML packages.
fn packages(args: &Args, opened: &Opened, parts: Option<Vec<Part>>, nbits: Nbits) -> Result<()> {
    let model = &opened.model;
    // Packages are written a weight at a time; so are weights and palettes read.
    give_back_large_memory();
    let checkpoint = opened.palettized()?;
    let own = checkpoint.as_ref().map(|checkpoint| {
        let needs_ios18 = checkpoint.needs_ios18().map(|(name, what)| (name.to_owned(), what));
        OwnPalettes { needs_ios18 }
    });
    let asked = Asked {
        parts,
        nbits: nbits.clone(),
        bundle: args.bundle_resources_for_swift_cli,
        attention: args.attention_implementation.unwrap_or_default(),
        target: args.min_deployment_target,
        latents: Some(args.latents(opened)?),
        batch_one: args.unet_batch_one,
        controlnet: args.unet_support_controlnet,
        chunk: args.chunk_unet,
        overwrite: args.overwrite,
    };
    let plan =
        Plan::new(model, &asked, own.as_ref(), &args.output, args.metadata(opened)?).map_err(|error| {
            match error.downcast_ref::<TooOld>() {
                Some(too_old) => Usage(format!("{too_old}: --min-deployment-target iOS18")).into(),
                None => error,
            }
        })?;
    args.check_effects(&plan, &nbits)?;
    check_output(&args.output)?;
    check_places(&plan)?;
    if let Some(checkpoint) = &checkpoint {
        check_shapes(model, &checkpoint.shapes())?;
    }
    let bundle = plan.bundle();
    bundle.map_or(Ok(()), |bundle| bundle.check()).map_err(|occupied| Usage(occupied.to_string()))?;
    if let Some(checkpoint) = &checkpoint {
        let cost = Cost::of(checkpoint.palettes());
        [cost.note(), cost.warning()].into_iter().flatten().for_each(tell);
    }
    plan.warnings()?.into_iter().for_each(warn);
    for &part in &plan.parts {
        if plan.stays_dense(part)? {
            print(format_args!("{part} stays as it is: it computes in fp32, and palettes are fp16"))?;
        }
        let mut bar = Progress::new("exporting", 0, part.parameters(model)?.len() as u64).counting("tensor");
        let mut progress = |done: usize, _: usize| bar.update(done as u64, &[]);
        let written = match &checkpoint {
            Some(checkpoint) if part == Part::Unet => plan.write(part, checkpoint, &mut progress),
            _ => plan.write(part, &model.stored(part.component())?, &mut progress),
        };
        let written = written.map_err(as_usage)?;
        bar.finish();
        written.iter().try_for_each(|path| print(path.display()))?;
    }
    match bundle {
        Some(bundle) => write_bundle(&bundle, model)?,
        None if holds_bundle(&args.output) => warn(format_args!(
            "compile.sh and Resources in {} are of what was there before; --bundle-resources-for-swift-cli writes \
             them for the packages that are there now, with --overwrite those too that are compiled already",
            args.output.display()
        )),
        None => {}
    }
    Ok(())
}

impl Args {
    /// Height and width of the latents: as given, else those of a run's own packages, else those that the UNet was made for.
    fn latents(&self, opened: &Opened) -> Result<(i64, i64)> {
        let defaults = UnetOptions::new(&opened.model.unet_config()?);
        let own = opened.latents().unwrap_or((defaults.height, defaults.width));
        let (height, width) = (self.latent_h.unwrap_or(own.0), self.latent_w.unwrap_or(own.1));
        if !takes_latents(height, width) {
            return Err(Usage(format!("--latent-h and --latent-w are from 1 to {LARGEST_LATENTS}")).into());
        }
        Ok((height, width))
    }

    /// What the packages say of themselves.
    fn metadata(&self, opened: &Opened) -> Result<PackageMetadata, Usage> {
        let name = self.model_version.as_deref().unwrap_or(opened.model.name());
        if name.trim().is_empty() {
            return Err(Usage("--model-version is empty: packages are named after it".into()));
        }
        if name.len() > LONGEST_NAME {
            let length = name.len();
            return Err(Usage(format!(
                "--model-version: a name of {length} bytes; {LONGEST_NAME} at most, because packages are named after it"
            )));
        }
        // Folders are named after it too, among them one in a user's home.
        if name.split(['/', '\\']).any(|part| [".", ".."].contains(&part)) || name.ends_with('/') {
            return Err(Usage(format!("--model-version \"{name}\" is a path; a name such as owner/name is expected")));
        }
        if name.chars().any(char::is_control) {
            return Err(Usage(format!("{name:?} has control characters: --model-version takes a name without")));
        }
        Ok(opened.metadata(Some(name)))
    }

    /// Refuses options that have no effect on what is written.
    fn check_effects(&self, plan: &Plan, nbits: &Nbits) -> Result<(), Usage> {
        let (model, parts) = (plan.model, &plan.parts);
        let of_text = |part: &Part| matches!(part, Part::TextEncoder | Part::TextEncoder2);
        if let Some(option) = self.given(|about| about == About::SizedPackage).filter(|_| parts.iter().all(of_text)) {
            return Err(Usage(format!("{option} has no effect: text encoders see no latents")));
        }
        let of_unet = |about| matches!(about, About::UnetPackage | About::UnetOfAny);
        if let Some(option) = self.given(of_unet).filter(|_| !parts.contains(&Part::Unet)) {
            return Err(Usage(format!("{option} is about the UNet, which --component leaves out")));
        }
        let has_autoencoder = parts.iter().any(|part| matches!(part, Part::VaeDecoder | Part::VaeEncoder));
        let given = &self.model.options;
        let idle = about_autoencoder(given).filter(|_| !has_autoencoder);
        let changed = parts.iter().any(|part| *part == Part::Unet || of_text(part));
        let idle = idle.or(about_loras(given).filter(|_| !changed));
        if let Some(option) = idle.or(about_noise(given).filter(|_| !parts.contains(&Part::Unet))) {
            return Err(Usage(format!("{option} is about a network that --component leaves out")));
        }
        if let Some(part) = Part::of(model).into_iter().find(|part| nbits.names(*part) && !parts.contains(part)) {
            return Err(Usage(format!("--quantize-nbits {0}=…: --component leaves {0} out", part.name())));
        }
        if self.quantize_nbits.is_some() && !parts.iter().any(|&part| plan.palettizes(part)) {
            let message = "--quantize-nbits has nothing to palettize: the UNet's palettes are those of --palettes, and \
                           --component names no other network";
            return Err(Usage(message.into()));
        }
        Ok(())
    }
}

/// Refuses a folder that is the model's, or lies in it.
fn check_not_the_models(folder: &Path, model: &Model) -> Result<()> {
    let message = "is the model's own folder: choose another one";
    if is_the_models(folder, model.path()) {
        return Err(Usage(format!("{} {message}", folder.display())).into());
    }
    Ok(())
}

/// Looks at the folder and at what is in it, before the work, not after an hour of it.
fn check_places(plan: &Plan) -> Result<()> {
    let (model, folder) = (plan.model, &plan.folder);
    check_not_the_models(folder, model)?;
    if let Some(other) = of_another_model(folder, &plan.metadata, &Part::of(model)).filter(|_| plan.bundle().is_some())
    {
        let message = "is of another model, and Resources holds one: choose another folder";
        return Err(Usage(format!("{} {message}", other.display())).into());
    }
    if let Some(message) = plan.of_other_weights() {
        if plan.bundle().is_some() {
            let advice = "choose another folder, or export all of the model with --component all --overwrite";
            return Err(Usage(format!("{message}; {advice}")).into());
        }
        warn(message);
    }
    for &part in &plan.parts {
        plan.check_place(part).map_err(as_usage)?;
        // A network that the model does not have is the command line's mistake.
        model.check(part.component()).map_err(|error| match Part::of(model).contains(&part) {
            true => error,
            false => Usage(format!("--component {}: {error:#}", part.name())).into(),
        })?;
    }
    Ok(())
}

/// Makes the bundle around the packages that are there now, and says what it lacks.
fn write_bundle(bundle: &Bundle, model: &Model) -> Result<()> {
    let mut copying = Copying::default();
    let made = bundle.write(&mut |done, total| copying.hear(done, total)).map_err(|error| {
        match error.downcast_ref::<InTheWay>() {
            Some(occupied) => Usage(occupied.to_string()).into(),
            None => error,
        }
    })?;
    made.compiled.iter().try_for_each(|(place, _)| print(place.display()))?;
    print(made.resources.display())?;
    bundle.missing(model).iter().chain(&made.notes()).try_for_each(print)
}

/// Whether a folder is a model's own, or that of one of its networks.
fn is_the_models(folder: &Path, model: &Path) -> bool {
    // A folder that is yet to be made lies in the nearest one that is there.
    let there = folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder);
    let (Ok(folder), Ok(model), made) = (there.canonicalize(), model.canonicalize(), there == folder) else {
        return false;
    };
    (made && folder == model) || (folder.starts_with(&model) && folder.join("config.json").is_file())
}
