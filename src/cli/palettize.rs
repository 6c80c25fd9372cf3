//! `palettist palettize`: post-training palettes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result};
use tch::{Device, Kind};

use super::drawing::device;
use super::inspect::Contents;
use super::model::{ModelArgs, about_autoencoder, about_noise};
use super::{Usage, load_config, must_be_new, print, size};
use crate::config::{Config, Recipe};
use crate::ops::Weights;
use crate::palette::checkpoint::{RECIPE, SOURCE_MODEL};
use crate::palette::post_training::{self, Chosen, Layer, WEIGHT_THRESHOLD};
use crate::palette::{BITS, Form, LutDtype};
use crate::source::lora::LORAS;
use crate::source::{Component, Model, goes_with};
use crate::terminal::Progress;
use crate::train::evaluate::Evaluation;
use crate::train::fisher::fisher;

/// Palettizes a model as it is, without training: the optimal k-means of each layer's weights
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("how many bits").required(true))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The palettized checkpoint to write, OUT.palettes.safetensors
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// 1, 2, 3, 4, 6 or 8: a palette has 2^N entries
    #[arg(long, value_name = "N", group = "how many bits")]
    bits: Option<u32>,
    /// Bits for each layer, as `palettist analyze` writes them; what it does not name stays fp16
    #[arg(long, value_name = "FILE", group = "how many bits", conflicts_with = "weight_threshold")]
    recipe: Option<PathBuf>,
    /// What shares a palette: per_tensor, or per_grouped_channel
    #[arg(long, default_value = "per_tensor", value_parser = ["per_tensor", "per_grouped_channel"])]
    granularity: String,
    /// Channels that share a palette, with per_grouped_channel
    #[arg(long, value_name = "C")]
    group_size: Option<usize>,
    /// Which channels are grouped, and along which the weights of an entry lie: 0 output (the default), 1 input
    #[arg(long, value_name = "AXIS")]
    group_axis: Option<usize>,
    /// Weights that an entry holds: 1, 2 or 4
    #[arg(long, value_name = "D", default_value_t = 1)]
    cluster_dim: usize,
    /// Multiplies each output channel by a number of its own; in a Core ML package each channel then has a palette of its
    /// own, which takes more
    #[arg(long)]
    per_channel_scale: bool,
    /// What an entry is stored as: f16, or i8 with a scale
    #[arg(long, default_value = "f16", value_parser = ["f16", "i8"])]
    lut_dtype: String,
    /// Weights with no more elements than this stay fp16
    #[arg(long, default_value_t = WEIGHT_THRESHOLD, value_parser = clap::value_parser!(i64).range(0..))]
    weight_threshold: i64,
    /// Weights k-means by gradient sensitivity (Fisher information): by the squares of each weight's gradients on the
    /// pictures that this config trains on. On the project's small base it took 4 and
    /// 2.5 % off the loss that 3 and 4 bits cost, and added 7 % at 2 bits
    #[arg(long, value_name = "CONFIG")]
    calibrate: Option<PathBuf>,
    /// Noised pictures for --calibrate [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    calibration_samples: Option<u32>,
    /// Where --calibrate computes: cpu, cuda or auto (the default)
    #[arg(long, value_parser = device)]
    device: Option<Device>,
    /// What is palettized
    #[arg(long, default_value = "unet", value_parser = ["unet"])]
    component: String,
}

/// The form that the flags ask for.
fn form(args: &Args) -> Result<Form, Usage> {
    let group_size = match (args.granularity.as_str(), args.group_size) {
        ("per_tensor", None) => None,
        ("per_tensor", Some(_)) => {
            return Err(Usage("--group-size goes with --granularity per_grouped_channel".into()));
        }
        (_, size) => Some(size.unwrap_or(Form::GROUP_SIZE)),
    };
    let form = Form {
        bits: args.bits.unwrap_or(BITS[0]),
        group_size,
        axis: args.group_axis.unwrap_or(0),
        cluster_dim: args.cluster_dim,
        per_channel_scale: args.per_channel_scale,
        lut_dtype: if args.lut_dtype == "i8" { LutDtype::I8 } else { LutDtype::F16 },
    };
    match form.problem() {
        None if args.group_axis.is_some() && form.group_size.is_none() && form.cluster_dim == 1 => {
            let message = "--group-axis goes with --granularity per_grouped_channel or --cluster-dim 2 or 4";
            Err(Usage(message.into()))
        }
        None => Ok(form),
        Some(("axis", message)) => Err(Usage(format!("--group-axis {message}"))),
        Some((field, message)) => Err(Usage(format!("--{} {message}", field.replace('_', "-")))),
    }
}

/// Noised pictures that `--calibrate` looks at.
fn samples(args: &Args) -> u32 {
    args.calibration_samples.unwrap_or(128)
}

/// The command that does the same again.
fn command(form: &Form, args: &Args) -> String {
    let mut command = match &args.recipe {
        Some(path) => format!("palettize --recipe {}", path.display()),
        None => format!("palettize --bits {}", form.bits),
    };
    let mut flag = |text: String| command += &format!(" --{text}");
    match form.group_size {
        None => flag("granularity per_tensor".into()),
        Some(size) => flag(format!("granularity per_grouped_channel --group-size {size}")),
    }
    if form.axis != 0 {
        flag(format!("group-axis {}", form.axis));
    }
    if form.cluster_dim != 1 {
        flag(format!("cluster-dim {}", form.cluster_dim));
    }
    if form.per_channel_scale {
        flag("per-channel-scale".into());
    }
    if form.lut_dtype == LutDtype::I8 {
        flag("lut-dtype i8".into());
    }
    if let Some(path) = &args.calibrate {
        flag(format!("calibrate {} --calibration-samples {}", path.display(), samples(args)));
    }
    if args.recipe.is_none() {
        flag(format!("weight-threshold {}", args.weight_threshold));
    }
    command
}

/// The Fisher information of the weights that become palettes.
fn calibrated(config: &Config, args: &Args, model: &Model, forms: &BTreeMap<String, Form>) -> Result<Weights> {
    if let Some(form) = forms.values().find(|form| !form.is_per_tensor()) {
        let what = form.needs_ios18().unwrap_or("such palettes");
        return Err(Usage(format!("--calibrate goes with one table of fp16 numbers a weight, not with {what}")).into());
    }
    let device = args.device.map_or_else(|| device("auto"), Ok)?;
    super::train::stop_on_interrupt(super::train::SAVING)?;
    let samples = samples(args) as usize;
    let evaluation = Evaluation::of_training(config, model, samples, device)?;
    let names: Vec<String> = forms.keys().cloned().collect();
    let mut bar = Progress::new("calibrating", 0, samples as u64).counting("picture");
    let weights = model.weights(Component::Unet, Kind::Float, device)?;
    let importance = fisher(&evaluation, weights, &names, &mut |done| bar.update(done as u64, &[]))?;
    bar.finish();
    Ok(importance)
}

pub fn run(args: Args) -> Result<()> {
    if !args.output.to_string_lossy().ends_with(".palettes.safetensors") {
        return Err(Usage(format!("{} should end in .palettes.safetensors", args.output.display())).into());
    }
    let form = form(&args)?;
    for (option, given) in
        [("--device", args.device.is_some()), ("--calibration-samples", args.calibration_samples.is_some())]
    {
        if given && args.calibrate.is_none() {
            return Err(Usage(format!("{option} goes with --calibrate, and without it has no effect")).into());
        }
    }
    must_be_new(&args.output)?;
    let options = &args.model.options;
    if let Some(option) = about_autoencoder(options).or(about_noise(options)).filter(|_| args.calibrate.is_none()) {
        return Err(Usage(format!("{option} has no effect on the UNet's weights without --calibrate")).into());
    }
    let config = args.calibrate.as_deref().map(|path| load_config(path, &[])).transpose()?;
    let opened = match &config {
        Some(config) => args.model.clone().open_by(config, None)?,
        None => args.model.open(None)?,
    };
    opened.note_values("palettes are made of these");
    let model = opened.model;
    let parameters = model.parameters(Component::Unet)?;
    let Chosen { forms, misfits } = match &args.recipe {
        Some(path) => {
            let recipe = Recipe::read(path)?;
            recipe.check(&parameters)?;
            let bits = recipe.bits();
            post_training::chosen_by(&parameters, |p| Some(Form { bits: *bits.get(&p.name)?, ..form }))
        }
        None => post_training::chosen(&parameters, form, args.weight_threshold),
    };
    if forms.is_empty() {
        let message = match (misfits.first(), &args.recipe) {
            (Some((name, reason)), _) => format!("nothing to palettize: no weight fits; {name}: {reason}"),
            (None, Some(path)) => format!("nothing to palettize: {} leaves every layer fp16", path.display()),
            (None, None) => format!("nothing to palettize: no weight has more than {} elements", args.weight_threshold),
        };
        return Err(Usage(message).into());
    }
    let importance = match &config {
        Some(config) => calibrated(config, &args, &model, &forms)?,
        None => Weights::new(),
    };
    // A weight at a time, so that only palettes are in memory.
    let stored = model.stored(Component::Unet)?;
    let weights = stored.names().map(|name| Ok((name.to_owned(), stored.tensor(name, Kind::Half, Device::Cpu)?)));
    let recipe = command(&form, &args);
    let mut metadata = goes_with(&model, &BTreeMap::new())?;
    metadata.extend([(SOURCE_MODEL.to_string(), args.model.model.clone()), (RECIPE.to_string(), recipe)]);
    metadata.extend(model.loras_text().map(|loras| (LORAS.to_owned(), loras)));

    let done = Mutex::new((Progress::new("palettizing", 0, forms.len() as u64).counting("layer"), Vec::new()));
    let note = |layer: &Layer| {
        // A poisoned lock means that another thread panicked: that is what will be reported.
        let Ok(mut done) = done.lock() else { return };
        done.1.push(layer.clone());
        let count = done.1.len() as u64;
        done.0.update(count, &[]);
    };
    let checkpoint = post_training::palettize(weights, &forms, importance, metadata, &note)
        .with_context(|| format!("palettizing the UNet of {}", args.model.model))?;
    let (progress, layers) = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    progress.finish();
    checkpoint.write(&args.output)?;

    for (name, reason) in &misfits {
        print(format_args!("{name} stays fp16: {reason}"))?;
    }
    let elements: usize = layers.iter().map(|layer| layer.elements).sum();
    print(format_args!(
        "relative squared error {:.4}, by layer up to {:.4}",
        layers.iter().map(|l| l.relative_error * l.elements as f64).sum::<f64>() / elements.max(1) as f64,
        layers.iter().map(|layer| layer.relative_error).fold(0.0, f64::max)
    ))?;
    let bytes = args.output.metadata().with_context(|| args.output.display().to_string())?.len();
    Contents::palettized(&checkpoint, bytes).print_sums()?;
    print(format_args!("wrote {}: {} on disk", args.output.display(), size(bytes)))
}
