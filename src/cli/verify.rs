//! `palettist verify`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tch::{Device, Kind};

use super::print;
use crate::coreml::read::{Package, Precision};
use crate::coreml::verify::{Report, Settings, verify_unet};
use crate::diffusion::pipeline::unet_weights;
use crate::networks::unet::unet;
use crate::ops::Tensors;
use crate::palette::PalettizedCheckpoint;
use crate::source::Model;

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

/// Compares a package with the network of `model`, palettes in place.
pub fn against(path: &Path, model: &Model, palettes: Option<&PalettizedCheckpoint>) -> Result<Report> {
    let config = model.unet_config()?;
    let weights = unet_weights(model, palettes, Kind::Float, Device::Cpu)?;
    let mut network = |sample: &tch::Tensor, timestep: &tch::Tensor, context: &tch::Tensor| {
        Ok(unet(&mut Tensors::new(&weights), &config, sample, timestep, context))
    };
    verify_unet(path, &mut network, &Settings::default())
}
