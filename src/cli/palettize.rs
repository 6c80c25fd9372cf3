//! `palettist palettize`: post-training palettes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result};
use tch::{Device, Kind};

use super::{Usage, grouped, must_be_new, print, size};
use crate::palette::checkpoint::{RECIPE, SOURCE_MODEL};
use crate::palette::post_training::{self, Layer, WEIGHT_THRESHOLD};
use crate::report::Progress;
use crate::source::{Component, Model};

/// Palettizes a model as it is, without training: the optimal k-means of each layer's weights
#[derive(clap::Args)]
pub struct Args {
    /// A diffusers folder, or a hub id in the local cache
    model: String,
    /// The palettized checkpoint to write, OUT.palettes.safetensors
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// 1, 2, 4, 6 or 8: a palette has 2^N values
    #[arg(long, value_name = "N", value_parser = bits)]
    bits: u32,
    /// What shares a palette
    #[arg(long, default_value = "per_tensor", value_parser = granularity)]
    granularity: String,
    /// Weights with no more elements than this stay fp16
    #[arg(long, default_value_t = WEIGHT_THRESHOLD, value_parser = clap::value_parser!(i64).range(0..))]
    weight_threshold: i64,
    /// What is palettized
    #[arg(long, default_value = "unet", value_parser = ["unet"])]
    component: String,
}

fn bits(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|n| crate::palette::BITS.contains(n)).ok_or_else(|| "use 1, 2, 4, 6 or 8".to_string())
}

fn granularity(text: &str) -> Result<String, String> {
    match text {
        "per_tensor" => Ok(text.to_string()),
        "per_grouped_channel" => Err("this version makes one palette a tensor: per_tensor".to_string()),
        _ => Err("use per_tensor".to_string()),
    }
}

pub fn run(args: Args) -> Result<()> {
    if args.output.extension().is_none_or(|extension| extension != "safetensors") {
        return Err(Usage(format!("{} should end in .palettes.safetensors", args.output.display())).into());
    }
    must_be_new(&args.output)?;
    let model = Model::open(&args.model)?;
    let parameters = model.parameters(Component::Unet)?;
    let chosen = post_training::chosen(&parameters, args.bits, args.weight_threshold);
    if chosen.is_empty() {
        let message = format!("no weight has more than {} elements: nothing to palettize", args.weight_threshold);
        return Err(Usage(message).into());
    }
    let weights = model.weights(Component::Unet, Kind::Half, Device::Cpu)?;
    let Args { granularity, weight_threshold, bits, .. } = &args;
    let recipe = format!("palettize --bits {bits} --granularity {granularity} --weight-threshold {weight_threshold}");
    let metadata = BTreeMap::from([(SOURCE_MODEL.to_string(), args.model.clone()), (RECIPE.to_string(), recipe)]);

    let done = Mutex::new((Progress::new("palettizing", 0, chosen.len() as u64).counting("layer"), Vec::new()));
    let note = |layer: &Layer| {
        // A poisoned lock means that another thread panicked: that is what will be reported.
        let Ok(mut done) = done.lock() else { return };
        done.1.push(layer.clone());
        let count = done.1.len() as u64;
        done.0.update(count, &[]);
    };
    let checkpoint = post_training::palettize(weights.into_iter().map(Ok), &chosen, metadata, &note)
        .with_context(|| format!("palettizing the UNet of {}", args.model))?;
    let (progress, layers) = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    progress.finish();
    checkpoint.write(&args.output)?;

    let total: u64 = parameters.iter().map(|p| p.shape.iter().product::<i64>() as u64).sum();
    let elements: u64 = layers.iter().map(|layer| layer.elements as u64).sum();
    let error = layers.iter().map(|l| l.relative_error * l.elements as f64).sum::<f64>() / elements.max(1) as f64;
    print(format_args!(
        "{} of {} weights in {} palettes of {} values; relative squared error {error:.4}, by layer up to {:.4}",
        grouped(elements),
        grouped(total),
        layers.len(),
        1 << args.bits,
        layers.iter().map(|layer| layer.relative_error).fold(0.0, f64::max)
    ))?;
    let bytes = args.output.metadata().with_context(|| args.output.display().to_string())?.len();
    print(format_args!(
        "wrote {}: {}, {:.3} bits a weight; {} as fp16",
        args.output.display(),
        size(bytes),
        bytes as f64 * 8.0 / total as f64,
        size(total * 2)
    ))
}
