//! `palettist export`.

use std::path::PathBuf;

use anyhow::Result;
use tch::{Device, Kind};

use super::{Usage, print};
use crate::coreml::attention::AttentionImplementation;
use crate::coreml::export::{PackageMetadata, UnetOptions, export_unet};
use crate::coreml::program::Target;
use crate::diffusion::pipeline::{check_palettes, unet_weights};
use crate::palette::PalettizedCheckpoint;
use crate::report::Progress;
use crate::source::{Component, Model, copy_model};

/// Writes Core ML packages, or a diffusers folder
#[derive(clap::Args)]
pub struct Args {
    /// A diffusers folder, a single-file checkpoint (.safetensors), or a hub id in the local cache
    model: String,
    /// The folder to write into (Core ML), or to make (diffusers)
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// A palettized checkpoint to put in place of the model's weights
    #[arg(long)]
    palettes: Option<PathBuf>,
    /// coreml: packages; diffusers: a folder with the palettes' values in plain fp16 weights
    #[arg(long, default_value = "coreml", value_parser = ["coreml", "diffusers"])]
    format: String,
    /// Which networks (this version writes the UNet)
    #[arg(long, default_value = "unet", value_parser = ["unet"])]
    component: String,
    /// How attention is spelt: ORIGINAL for the GPU, SPLIT_EINSUM or SPLIT_EINSUM_V2 (512 queries at a time: phones, large
    /// pictures) for the Neural Engine
    #[arg(long, default_value_t, value_name = "ORIGINAL|SPLIT_EINSUM|SPLIT_EINSUM_V2")]
    attention_implementation: AttentionImplementation,
    /// iOS16, iOS17, iOS18, or macOS13, macOS14, macOS15; the first that holds the palettes if not given
    #[arg(long, value_name = "TARGET")]
    min_deployment_target: Option<Target>,
    /// Height of the latents, an eighth of the picture's; the model's own if not given
    #[arg(long)]
    latent_h: Option<i64>,
    /// Width of the latents
    #[arg(long)]
    latent_w: Option<i64>,
    /// A batch of one: two calls a step for classifier-free guidance, less memory
    #[arg(long)]
    unet_batch_one: bool,
    /// The model's name in the package: a hub id, say; the folder's or file's own if not given
    #[arg(long, value_name = "NAME")]
    model_version: Option<String>,
}

pub fn run(args: Args) -> Result<()> {
    let model = Model::open(&args.model)?;
    let checkpoint = args.palettes.as_deref().map(PalettizedCheckpoint::read).transpose()?;
    if args.format == "diffusers" {
        let weights = unet_weights(&model, checkpoint.as_ref(), Kind::Half, Device::Cpu)?;
        copy_model(&model, &args.output, &[(Component::Unet, &weights)], Kind::Half)?;
        return print(args.output.display());
    }
    let lowest = checkpoint.as_ref().and_then(PalettizedCheckpoint::needs_ios18);
    let target = match (args.min_deployment_target, lowest) {
        (Some(target), Some((name, what))) if target != Target::Ios18 => {
            let message = format!("{target} does not hold {what}, as of {name}: --min-deployment-target iOS18");
            return Err(Usage(message).into());
        }
        (Some(target), _) => target,
        (None, Some(_)) => Target::Ios18,
        (None, None) => Target::Ios16,
    };
    let config = model.unet_config()?;
    let defaults = UnetOptions::new(&config);
    let options = UnetOptions {
        batch: if args.unet_batch_one { 1 } else { 2 },
        height: args.latent_h.unwrap_or(defaults.height),
        width: args.latent_w.unwrap_or(defaults.width),
        target,
        attention: args.attention_implementation,
        ..defaults
    };
    if options.height < 1 || options.width < 1 {
        return Err(Usage("--latent-h and --latent-w are at least 1".into()).into());
    }
    let name = args.model_version.unwrap_or_else(|| model.name().to_owned());
    let metadata = PackageMetadata::of_folder(&name, model.path());
    let mut bar = Progress::new("exporting", 0, config.parameters().len() as u64).counting("tensor");
    let mut told = |done: usize, _: usize| bar.update(done as u64, &[]);
    let path = match &checkpoint {
        Some(checkpoint) => {
            check_palettes(&model, checkpoint)?;
            export_unet(&config, checkpoint, &options, &metadata, &args.output, &mut told)?
        }
        None => {
            let weights = model.weights(Component::Unet, Kind::Half, Device::Cpu)?;
            export_unet(&config, &weights, &options, &metadata, &args.output, &mut told)?
        }
    };
    bar.finish();
    print(path.display())
}
