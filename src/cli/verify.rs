//! `palettist verify`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::print;
use crate::coreml::components::{Attended, Part};
use crate::coreml::read::{Package, Precision};
use crate::coreml::verify::{Report, Settings, part_of, verify_one_input, verify_text_encoder, verify_unet};
use crate::diffusion::pipeline::unet_weights;
use crate::networks::autoencoder::{decode, encode};
use crate::networks::text_encoder::text_encoder;
use crate::networks::unet::unet;
use crate::ops::Tensors;
use crate::palette::PalettizedCheckpoint;
use crate::source::{Component, Model};

/// Reads packages back from disk, checks them, runs them, and compares them with the network
#[derive(clap::Args)]
pub struct Args {
    /// .mlpackage folders
    #[arg(required = true, value_name = "PACKAGE")]
    packages: Vec<PathBuf>,
    /// The model that the packages were made of, a diffusers folder or single file; without it they are only checked
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    /// The palettized checkpoint that was exported
    #[arg(long, requires = "against")]
    palettes: Option<PathBuf>,
    /// Less than this many dB, in either arithmetic, is a failure
    #[arg(long, default_value_t = 35.0)]
    min_psnr: f64,
}

pub fn run(args: Args) -> Result<()> {
    let mut failed = Vec::new();
    for path in &args.packages {
        print(path.display())?;
        let Some(model) = &args.against else {
            let package = Package::open(path)?;
            print(format_args!(
                "  sound: specification version {}, {} operations",
                package.specification_version(),
                package.operation_counts().values().sum::<usize>()
            ))?;
            continue;
        };
        let model = Model::open(model)?;
        let checkpoint = args.palettes.as_deref().map(PalettizedCheckpoint::read).transpose()?;
        let report = against(path, &model, checkpoint.as_ref())?;
        print(format!("{report}").trim_end())?;
        let least = report.least(Precision::Float32).min(report.least(Precision::Float16));
        // A NaN is a failure too.
        if least.is_nan() || least < args.min_psnr {
            failed.push(format!("{}: {least:.1} dB", path.display()));
        }
    }
    if !failed.is_empty() {
        bail!("less than {} dB: {}", args.min_psnr, failed.join(", "));
    }
    Ok(())
}

/// Compares a package with the network of `model` that it holds; `palettes` are in place of the UNet's weights.
pub fn against(path: &Path, model: &Model, palettes: Option<&PalettizedCheckpoint>) -> Result<Report> {
    let package = Package::open(path)?;
    let settings = Settings::default();
    let mut part = part_of(&package)?;
    if part == Part::TextEncoder && model.is_xl() {
        // Two networks have these inputs and outputs; the first output has as many channels as one of them.
        let channels = package.outputs().first().and_then(|output| output.kind.shape.last());
        if channels == Some(&model.text_encoder_config_of(Component::TextEncoder2)?.hidden_size) {
            part = Part::TextEncoder2;
        }
    }
    let own = |component| model.weights(component, Kind::Float, Device::Cpu);
    let named = |outputs: Vec<(&str, Tensor)>| Ok(outputs.into_iter().map(|(name, x)| (name.to_owned(), x)).collect());
    match part {
        Part::Unet => {
            let config = model.unet_config()?;
            let weights = unet_weights(model, palettes, Kind::Float, Device::Cpu)?;
            let mut network = |sample: &Tensor, timestep: &Tensor, context: &Tensor| {
                Ok(unet(&mut Tensors::new(&weights), &config, sample, timestep, context))
            };
            verify_unet(path, &mut network, &settings)
        }
        Part::TextEncoder | Part::TextEncoder2 => {
            let config = model.text_encoder_config_of(part.component())?;
            let weights = own(part.component())?;
            let end = if config.eos_token_id == 2 { config.vocab_size - 1 } else { config.eos_token_id };
            let mut network = |ids: &Tensor| {
                named(Attended::of(model).outputs(text_encoder(&mut Tensors::new(&weights), &config, ids)).into())
            };
            verify_text_encoder(&package, (config.vocab_size, end), &mut network, &settings)
        }
        Part::VaeDecoder | Part::VaeEncoder => {
            let config = model.autoencoder_config()?;
            let weights = own(part.component())?;
            let mut network = |x: &Tensor| {
                let mut ops = Tensors::new(&weights);
                named(match part {
                    Part::VaeDecoder => vec![("image", decode(&mut ops, &config, x))],
                    _ => vec![("latent", encode(&mut ops, &config, x))],
                })
            };
            verify_one_input(&package, &mut network, &settings)
        }
    }
}
