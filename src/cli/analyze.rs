//! `palettist analyze`: how sensitive each layer is, and from that the best bits for each within a budget: a recipe.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use tch::{Device, Kind};

use super::model::ModelArgs;
use super::train::{SAVING, stop_on_interrupt};
use super::{MEASURED, Usage, drawing, grouped, is_of_data, load_config, must_be_new, print, size, warn_of_unused};
use crate::config::{Config, DeploymentTarget, matches_glob, recipe_text};
use crate::files;
use crate::ops::Parameter;
use crate::palette::allocate::{Allocation, Choice, allocate};
use crate::palette::{BITS, Form};
use crate::source::Component;
use crate::terminal::{Progress, duration, note};
use crate::train::evaluate::{Evaluation, snr};
use crate::train::sensitivity::{Effect, Measurements, Sensitivity, measure};

/// Noised pictures that the signal-to-noise ratio is measured on. It has no noise of its own to average away: only pictures
/// and timesteps differ.
const SAMPLES: usize = 16;
/// Keys of [palettize] that say how palettes are trained, not what they are.
const UNUSED: [&str; 7] = [
    "palettize.n_bits",
    "palettize.kmeans_max_iter",
    "palettize.temperature_start",
    "palettize.temperature_end",
    "palettize.freeze_fraction",
    "palettize.reestimate_norms_and_biases",
    "palettize.palette_learning_rate",
];
/// Measurements are kept in this file beside the recipe.
const MEASUREMENTS: &str = "measurements.jsonl";

/// Measures how sensitive each layer is to its palette and writes a recipe: the best bits for each within a budget
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The config whose validation split, resolution, overrides and deployment target are taken
    #[arg(long)]
    config: PathBuf,
    /// Changes to the config: palettize.weight_threshold=0
    #[arg(value_name = "key=value")]
    overrides: Vec<String>,
    /// The recipe to write, RECIPE.toml; measurements.jsonl beside it keeps what was measured, for this and other recipes
    #[arg(short, long, value_name = "RECIPE")]
    output: PathBuf,
    /// The budget: bits per palettized weight on average, palettes included
    #[arg(long, value_name = "B", group = "target", value_parser = finite)]
    target_bits: Option<f64>,
    /// The budget: megabytes (10^6 bytes) of all weights of the UNet, those in fp16 included
    #[arg(long, value_name = "M", group = "target", value_parser = finite)]
    target_megabytes: Option<f64>,
    /// Candidate bit widths; default: all that the config's export.min_deployment_target holds
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = |text: &str| text.trim().parse::<u32>())]
    bits: Vec<u32>,
    /// What counts: the mean squared difference of the output (snr), or the rise of the validation loss, which takes many
    /// more samples
    #[arg(long, default_value = "snr", value_parser = ["snr", "loss"])]
    measure: String,
    /// Noised pictures to measure on; default: 16 for snr, the config's validation batches for loss
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Fixes the bits of these layers and leaves them out of the search: --keep conv_in.weight=8 (16 for fp16). Overrides of
    /// the config count too
    #[arg(long, value_name = "PATTERN=BITS")]
    keep: Vec<String>,
    /// cpu, cuda or auto
    #[arg(long, default_value = "auto", value_parser = drawing::device)]
    device: Device,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.output.extension().is_none_or(|extension| extension != "toml") {
        return Err(Usage(format!("{} should end in .toml", args.output.display())).into());
    }
    must_be_new(&args.output)?;
    let config = load_config(&args.config, &args.overrides)?;
    warn_of_unused(&args.overrides, "analyze", |key| {
        let palettes = key.starts_with("palettize.") && !UNUSED.contains(&key);
        let package = ["export.coreml", "export.min_deployment_target"].contains(&key);
        MEASURED.contains(&key) || is_of_data(key) || palettes || package
    });
    let candidates = candidates(&args.bits, &config)?;
    let keep = args.keep.iter().map(|text| pin(text, &config)).collect::<Result<Vec<_>>>()?;
    let device = args.device;
    let opened = args.model.clone().open_by(&config, None)?;
    opened.note_values("what is measured is palettes of these");
    let model = opened.model;
    let parameters = model.parameters(Component::Unet)?;
    let plan = Plan::new(&config, &keep, &candidates, &parameters)?;
    let budget = plan.budget(args.target_bits, args.target_megabytes)?;
    let most: u64 =
        plan.layers.iter().map(|layer| layer.forms.iter().map(|form| layer.bytes(form)).max().unwrap_or(0)).sum();
    if budget > most {
        note(format_args!(
            "the budget is more than the largest palettes take, {:.3} bits a palettized weight: it decides nothing",
            most as f64 * 8.0 / plan.elements().max(1) as f64
        ));
    }

    stop_on_interrupt(SAVING)?;
    let by_loss = args.measure == "loss";
    let samples = args.samples.map(|samples| samples as usize).or((!by_loss).then_some(SAMPLES));
    let evaluation = Evaluation::open(&config, &model, samples, device)?;
    let weights = model.weights(Component::Unet, Kind::Float, device)?;
    let start = Instant::now();
    let mut sensitivity = Sensitivity::new(&evaluation, weights)?;
    // The float model's own answers, which each palette's are compared with.
    let pass = start.elapsed().as_secs_f64();
    let path = args.output.with_file_name(MEASUREMENTS);
    let effects = plan.measure(&mut sensitivity, &config.palettize.form(BITS[0]), &path, pass)?;

    let float = sensitivity.float.loss;
    let damage = |effect: &Effect| if by_loss { effect.loss - float } else { effect.mse };
    let allocation = plan.allocate(&effects, damage, budget)?;
    let power = sensitivity.float.power();
    let together = sensitivity.together(&plan.chosen(&allocation))?;
    let outcome =
        Outcome { plan: &plan, effects: &effects, allocation: &allocation, damage: &damage, float, power, together };
    files::write_bytes(&args.output, outcome.recipe(&args, evaluation.examples()).as_bytes())?;
    if args.json {
        return print(outcome.json(&args, evaluation.examples()));
    }
    for line in outcome.lines(evaluation.examples()) {
        print(line)?;
    }
    let recipe = args.output.display();
    print(format_args!(
        "wrote {recipe}; to use it: palettist palettize MODEL --recipe {recipe}, or recipe = \"{recipe}\" in the [palettize] of a config"
    ))
}

/// The bits that a layer may be given.
fn candidates(asked: &[u32], config: &Config) -> Result<Vec<u32>> {
    let mut bits = match asked {
        [] => BITS.into_iter().filter(|&bits| check_bits(bits, config).is_ok()).collect(),
        asked => asked.to_vec(),
    };
    for &n in &bits {
        check_bits(n, config).map_err(|message| Usage(format!("--bits {n}: {message}")))?;
    }
    bits.sort_unstable();
    bits.dedup();
    Ok(bits)
}

/// A number of the command line that is one, and not infinite.
fn finite(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| "is not a valid number".to_owned())
}

/// Whether the package that the config writes could hold palettes of so many bits.
fn check_bits(bits: u32, config: &Config) -> Result<(), String> {
    if !BITS.contains(&bits) {
        return Err("a palette has 1, 2, 3, 4, 6 or 8 bits".into());
    }
    let old = config.export.coreml && config.export.min_deployment_target != DeploymentTarget::Ios18;
    match config.palettize.form(bits).needs_ios18() {
        Some(what) if old => Err(format!("{what} need export.min_deployment_target=iOS18 (or export.coreml=false)")),
        _ => Ok(()),
    }
}

/// A `PATTERN=BITS`; `None` for fp16.
fn pin(text: &str, config: &Config) -> Result<(String, Option<u32>)> {
    let wrong = |message: String| Usage(format!("--keep {text}: {message}"));
    let (pattern, bits) = text.rsplit_once('=').ok_or_else(|| wrong("is not of the form PATTERN=BITS".into()))?;
    match bits.trim().parse() {
        Ok(16) => Ok((pattern.to_owned(), None)),
        Ok(n) if !BITS.contains(&n) => Err(wrong("a palette has 1, 2, 3, 4, 6 or 8 bits (16: fp16)".into()).into()),
        Ok(n) => check_bits(n, config).map(|()| (pattern.to_owned(), Some(n))).map_err(|m| wrong(m).into()),
        Err(_) => Err(wrong(format!("{bits} is not a valid number of bits")).into()),
    }
}

/// A layer that gets a palette.
struct Layer {
    name: String,
    shape: Vec<i64>,
    /// What it may have; one form where it is not up to the recipe.
    forms: Vec<Form>,
    /// Whether it is not.
    kept: bool,
}

impl Layer {
    fn elements(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64
    }

    /// Of its palette.
    fn bytes(&self, form: &Form) -> u64 {
        form.stored_bits(&self.shape).div_ceil(8)
    }
}

/// What is to be decided.
struct Plan {
    layers: Vec<Layer>,
    /// Layers that stay fp16 because the user says so.
    kept_dense: Vec<String>,
    /// Of all that stays fp16.
    dense_bytes: u64,
}

impl Plan {
    fn new(
        config: &Config,
        keep: &[(String, Option<u32>)],
        candidates: &[u32],
        parameters: &[Parameter],
    ) -> Result<Self> {
        if config.palettize.recipe.is_some() {
            let message = "the config takes its bits from palettize.recipe; take that line out to make another recipe";
            return Err(Usage(message.into()).into());
        }
        if let Some((pattern, _)) = keep.iter().find(|(pattern, _)| {
            parameters.iter().all(|parameter| !parameter.palettizable || !matches_glob(pattern, &parameter.name))
        }) {
            return Err(Usage(format!(
                "--keep {pattern}: is not the weight of a convolution or linear layer of this UNet"
            ))
            .into());
        }
        // Of several that match a layer the last holds.
        let names = || parameters.iter().filter(|parameter| parameter.palettizable).map(|parameter| &parameter.name);
        let holds = |place: usize, name: &str| {
            matches_glob(&keep[place].0, name) && !keep[place + 1..].iter().any(|(later, _)| matches_glob(later, name))
        };
        if let Some(place) = (0..keep.len()).find(|&place| !names().any(|name| holds(place, name))) {
            let message = format!("--keep {}: has no effect, because later ones replace it", keep[place].0);
            return Err(Usage(message).into());
        }
        let mut plan = Self { layers: Vec::new(), kept_dense: Vec::new(), dense_bytes: 0 };
        for Parameter { name, shape, palettizable, .. } in parameters {
            let elements = shape.iter().product::<i64>() as u64;
            let flag = keep.iter().rev().find(|(pattern, _)| matches_glob(pattern, name)).map(|(_, bits)| *bits);
            let exception = config.palettize.exception(name).map(|e| e.n_bits.filter(|_| !e.skip));
            let large = elements > config.palettize.weight_threshold as u64;
            let (bits, kept) = match (palettizable, flag.or(exception)) {
                (true, Some(Some(bits))) => (vec![bits], true),
                (true, None) if large => (candidates.to_vec(), false),
                (true, Some(None)) => {
                    plan.kept_dense.push(name.clone());
                    (Vec::new(), true)
                }
                _ => (Vec::new(), false),
            };
            // A form that does not fit leaves a layer dense.
            let forms: Vec<Form> =
                bits.iter().map(|&n| config.palettize.form(n)).filter(|form| form.misfit(shape).is_none()).collect();
            match forms.is_empty() {
                false => plan.layers.push(Layer { name: name.clone(), shape: shape.clone(), forms, kept }),
                true => plan.dense_bytes += 2 * elements,
            }
        }
        if plan.layers.is_empty() {
            return Err(Usage("no layer is large enough for a palette (palettize.weight_threshold)".into()).into());
        }
        Ok(plan)
    }

    fn elements(&self) -> u64 {
        self.layers.iter().map(Layer::elements).sum()
    }

    /// Bytes that the palettized layers may take.
    fn budget(&self, bits: Option<f64>, megabytes: Option<f64>) -> Result<u64> {
        let elements = self.elements() as f64;
        let least: u64 =
            self.layers.iter().map(|layer| layer.forms.iter().map(|form| layer.bytes(form)).min().unwrap_or(0)).sum();
        // Rounded up to what can be typed.
        let (budget, message) = match (bits, megabytes) {
            (Some(bits), _) => {
                let floor = (least as f64 * 8.0 / elements * 1000.0).ceil() / 1000.0;
                (
                    bits * elements / 8.0,
                    format!("--target-bits {bits}: the smallest palettes take {floor} bits per weight"),
                )
            }
            (None, megabytes) => {
                let megabytes = megabytes.unwrap_or(0.0);
                let floor = ((least + self.dense_bytes) as f64 / 1e4).ceil() / 100.0;
                let message = format!(
                    "--target-megabytes {megabytes}: with the smallest palettes the UNet takes {floor} MB, {:.2} of them \
                     in fp16",
                    self.dense_bytes as f64 / 1e6
                );
                (megabytes * 1e6 - self.dense_bytes as f64, message)
            }
        };
        if budget >= least as f64 { Ok(budget as u64) } else { Err(Usage(message).into()) }
    }

    /// The effect of each layer alone at each of its bits; `form` is what they have in common, `pass` the seconds that one
    /// measurement takes.
    fn measure(&self, sensitivity: &mut Sensitivity, form: &Form, path: &Path, pass: f64) -> Result<Effects> {
        let wanted: BTreeMap<String, Vec<Form>> =
            self.layers.iter().map(|layer| (layer.name.clone(), layer.forms.clone())).collect();
        let all: Vec<(String, u32)> =
            wanted.iter().flat_map(|(name, forms)| forms.iter().map(move |form| (name.clone(), form.bits))).collect();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create the folder {}", folder.display()))?;
        }
        let mut measurements = Measurements::open(path, &sensitivity.key(form)?)?;
        let known = all.iter().filter(|(name, bits)| measurements.get(name, *bits).is_some()).count();
        let mut bar = Progress::new("measuring", known as u64, all.len() as u64).counting("palette");
        if known > 0 {
            bar.say(&format!("{known} of {} measurements are in {} already", all.len(), path.display()));
        }
        let left = all.len() - known;
        bar.say(&format!("{left} measurements of {pass:.2} s each: about {}", duration(left as f64 * pass)));
        measure(sensitivity, &wanted, &mut measurements, &mut |done| bar.update(done as u64, &[]))?;
        bar.finish();
        let effect = |(name, bits): (String, u32)| {
            let effect = measurements.get(&name, bits).with_context(|| format!("{name} was not measured"))?;
            Ok(((name, bits), effect))
        };
        all.into_iter().map(effect).collect()
    }

    fn allocate(&self, effects: &Effects, damage: impl Fn(&Effect) -> f64, budget: u64) -> Result<Allocation> {
        let choice = |layer: &Layer, form: &Form| Choice {
            bytes: layer.bytes(form),
            damage: damage(&effects[&(layer.name.clone(), form.bits)]),
        };
        let table: Vec<Vec<Choice>> =
            self.layers.iter().map(|layer| layer.forms.iter().map(|form| choice(layer, form)).collect()).collect();
        allocate(&table, budget)?.context("the budget is too small for any palettes")
    }

    fn chosen(&self, allocation: &Allocation) -> BTreeMap<String, Form> {
        let chosen = self.layers.iter().zip(&allocation.choices);
        chosen.map(|(layer, &choice)| (layer.name.clone(), layer.forms[choice])).collect()
    }
}

/// Of each layer at each number of bits.
type Effects = BTreeMap<(String, u32), Effect>;

/// What came out.
struct Outcome<'a> {
    plan: &'a Plan,
    effects: &'a Effects,
    allocation: &'a Allocation,
    damage: &'a dyn Fn(&Effect) -> f64,
    /// The float model's loss.
    float: f64,
    /// Mean square of the float model's output.
    power: f64,
    together: Effect,
}

impl Outcome<'_> {
    fn average_bits(&self) -> f64 {
        self.allocation.bytes as f64 * 8.0 / self.plan.elements() as f64
    }

    fn bytes(&self) -> u64 {
        self.allocation.bytes + self.plan.dense_bytes
    }

    /// What each layer alone costs, added up.
    fn predicted(&self) -> f64 {
        self.float + self.allocation.damage
    }

    fn snr(&self, mse: f64) -> f64 {
        snr(self.power, mse)
    }

    /// (layer, its bits, its damage)
    fn layers(&self) -> impl Iterator<Item = (&Layer, u32, f64)> {
        self.plan.layers.iter().zip(&self.allocation.choices).map(|(layer, &choice)| {
            let bits = layer.forms[choice].bits;
            (layer, bits, (self.damage)(&self.effects[&(layer.name.clone(), bits)]))
        })
    }

    fn lines(&self, samples: usize) -> Vec<String> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        self.layers().for_each(|(_, bits, _)| *counts.entry(bits).or_default() += 1);
        let counts: Vec<String> = counts.iter().map(|(bits, count)| format!("{count} of {bits} bits")).collect();
        let Effect { mse, loss } = self.together;
        vec![
            format!("palettes   {}", counts.join(", ")),
            format!(
                "size       {:.3} bits a palettized weight, palettes counted; the UNet: {}",
                self.average_bits(),
                size(self.bytes())
            ),
            format!("loss       {:.6} float, over {samples} noised pictures", self.float),
            format!("           {:.6} predicted: the sum of each layer's rise", self.predicted()),
            format!("           {loss:.6} measured, all palettes in place; output SNR {:.2} dB", self.snr(mse)),
        ]
    }

    fn recipe(&self, args: &Args, samples: usize) -> String {
        let target = match (args.target_bits, args.target_megabytes) {
            (Some(bits), _) => format!("--target-bits {bits}"),
            (None, megabytes) => format!("--target-megabytes {}", megabytes.unwrap_or(0.0)),
        };
        let mut header = vec![
            "Bits of each layer's palette, by `palettist analyze`.".to_string(),
            format!("model: {}", args.model.model),
            format!(
                "target: {target}; measure: {} on {samples} noised pictures of {}",
                args.measure,
                args.config.display()
            ),
        ];
        header.extend(self.lines(samples));
        header.push(
            "To be edited freely: 1, 2, 3 (from iOS 18 on), 4, 6 or 8 bits; 16, or no line, leaves a layer fp16."
                .into(),
        );
        header.push("Behind each: its weights, and what it alone adds to the loss.".into());
        let mut layers: Vec<(String, Option<u32>, String)> = self
            .layers()
            .map(|(layer, bits, damage)| {
                let kept = if layer.kept { ", kept" } else { "" };
                (layer.name.clone(), Some(bits), format!("{} {damage:+.2e}{kept}", grouped(layer.elements())))
            })
            .collect();
        layers.extend(self.plan.kept_dense.iter().map(|name| (name.clone(), None, "kept".to_string())));
        recipe_text(&header, &layers)
    }

    fn json(&self, args: &Args, samples: usize) -> serde_json::Value {
        let layers: Vec<serde_json::Value> = self
            .layers()
            .map(|(layer, bits, damage)| {
                let measured: Vec<serde_json::Value> = layer
                    .forms
                    .iter()
                    .map(|form| {
                        let Effect { mse, loss } = self.effects[&(layer.name.clone(), form.bits)];
                        json!({ "bits": form.bits, "bytes": layer.bytes(form), "mse": mse, "loss": loss })
                    })
                    .collect();
                json!({ "name": layer.name, "weights": layer.elements(), "bits": bits, "damage": damage,
                        "kept": layer.kept, "measured": measured })
            })
            .collect();
        json!({
            "recipe": args.output.display().to_string(),
            "measure": args.measure,
            "samples": samples,
            "average_bits": self.average_bits(),
            "bytes": self.bytes(),
            "float_loss": self.float,
            "predicted_loss": self.predicted(),
            "measured_loss": self.together.loss,
            "measured_snr_db": self.snr(self.together.mse),
            "layers": layers,
        })
    }
}
