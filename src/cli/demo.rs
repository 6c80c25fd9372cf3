//! `palettist demo`: the whole path on the small base, what `make demo` runs: a subject learnt at two bits, exported, verified,
//! and drawn where it never was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use image::RgbImage;
use tch::{Device, Kind};

use super::{Interrupted, Usage, load_config, print, train, verify};
use crate::config::Config;
use crate::coreml::exporting::Nbits;
use crate::coreml::reading::Precision;
use crate::diffusion::Noise;
use crate::judge::{Choices, Clip, JudgedPrompt, Metric, read_labels, read_prompts, right};
use crate::ops::Weights;
use crate::palette::checkpoint::SOURCE_MODEL;
use crate::palette::{PalettizedCheckpoint, post_training};
use crate::pipeline::{Pipeline, Request};
use crate::report::pictures;
use crate::source::{Component, Model};
use crate::terminal::{Progress, tell};
use crate::train::evaluate::Evaluation;
use crate::train::{Ended, Resume, go_on};

/// The whole path on the small base: learns a subject, at two bits, exports, verifies, and draws it beside float's
#[derive(clap::Args)]
pub struct Args {
    /// The folder with the project's configs/, datasets/ and examples/
    #[arg(long, default_value = ".")]
    project: PathBuf,
}

/// What is trained, in two stages: the subject in float, then palettes.
const CONFIG: &str = "configs/demo.toml";
/// A small CLIP that knows the drawn world (`make judge`).
const JUDGE: &str = "examples/judge";
/// What the judge chooses among.
const LABELS: &str = "examples/judge/labels.json";
/// What is drawn, with labels of what it is to show.
const PROMPTS: &str = "configs/demo-prompts.jsonl";
/// Pictures of each prompt that are judged; the first is shown.
const IMAGES: usize = 4;
/// How many prompts, the first ones, are shown.
const SHOWN: usize = 6;
const GUIDANCE: f64 = 4.0;
const PICTURE: &str = "runs/demo.png";

/// A row of the table and of the picture.
struct Row {
    name: &'static str,
    pipeline: Pipeline,
    loss: f64,
    /// What each picture has right, by what its prompt asks for.
    scores: Vec<(Asked, BTreeMap<Metric, f64>)>,
    shown: Vec<RgbImage>,
}

/// What a prompt asks for, by its labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    /// The subject, at a place where it was never drawn.
    Subject,
    /// Another of its class.
    Class,
    /// Something else.
    Other,
}

impl Asked {
    fn of(prompt: &JudgedPrompt, subject: &str) -> Self {
        match prompt.labels.get("subject") {
            Some(named) if subject.ends_with(named.as_str()) && named.contains(' ') => Self::Subject,
            Some(_) => Self::Class,
            None => Self::Other,
        }
    }
}

/// A column of the table: how often a label is right, in pictures of which kind (all where there is none).
struct Column {
    title: &'static str,
    label: &'static str,
    of: Option<Asked>,
}

const COLUMNS: [Column; 5] = [
    Column { title: "subject", label: "subject", of: Some(Asked::Subject) },
    Column { title: "class", label: "subject", of: Some(Asked::Class) },
    Column { title: "thing", label: "thing", of: Some(Asked::Other) },
    Column { title: "color", label: "color", of: Some(Asked::Other) },
    Column { title: "place", label: "place", of: None },
];

impl Column {
    /// What the pictures of a row have of it, 0 or 100 each.
    fn values(&self, row: &Row) -> Vec<f64> {
        let of = row.scores.iter().filter(|(asked, _)| self.of.is_none_or(|of| of == *asked));
        of.filter_map(|(_, right)| right.get(&Metric::Right(self.label.to_owned()))).copied().collect()
    }
}

pub fn run(args: Args) -> Result<()> {
    std::env::set_current_dir(&args.project)
        .map_err(|error| Usage(format!("--project {}: cannot go there: {error}", args.project.display())))?;
    if let Some(missing) = [CONFIG, JUDGE, PROMPTS].into_iter().find(|path| !Path::new(path).exists()) {
        let message = format!("{missing} is not here: run the demo in the project's folder, or pass --project");
        return Err(Usage(message).into());
    }
    train::stop_on_interrupt(train::SAVING)?;
    let config = load_config(Path::new(CONFIG), &[])?;
    if crate::train::run(&config, &Resume::Auto)? == Ended::Stopped {
        return Err(Interrupted("stopped after saving; run the same command to resume".into()).into());
    }

    tell(format_args!("\nmeasuring"));
    let prompts = read_prompts(Path::new(PROMPTS))?;
    let trained = Model::open_with(&config.output_dir.join("model").display().to_string(), &config.model.options())?;
    let checkpoint =
        PalettizedCheckpoint::read(&config.output_dir.join(format!("{}.palettes.safetensors", config.name)))?;
    let mut rows = rows(&config, &trained, &checkpoint)?;
    judge(&config, &prompts, &mut rows)?;
    table(&rows)?;
    package(&config, &trained, &checkpoint)?;
    let sheet: Vec<Vec<RgbImage>> = rows.iter().map(|row| row.shown.clone()).collect();
    pictures::write_png(Path::new(PICTURE), &pictures::sheet(&sheet, 4))?;
    print(format_args!(
        "\n{PICTURE}: rows are {};\ncolumns are {}",
        rows.iter().map(|row| row.name).collect::<Vec<_>>().join("; "),
        prompts.iter().take(SHOWN).map(|prompt| format!("\"{}\"", prompt.drawn.prompt)).collect::<Vec<_>>().join(", ")
    ))
}

/// The base, the float model that learned the subject, that one with palettes without training, and with trained ones.
fn rows(config: &Config, trained: &Model, checkpoint: &PalettizedCheckpoint) -> Result<Vec<Row>> {
    let personalized = config.first_stage().context("a config of two stages")?.output_dir.join("model");
    let open = |path: &str| Model::open_with(path, &config.model.options());
    let base = open(&config.model.pretrained_model_name_or_path)?;
    let float = open(&personalized.display().to_string())?;
    let plain = post_training(&float, checkpoint)?;
    [
        ("base", &base, None),
        ("float", &float, None),
        ("post-training, 2.1 bits", &float, Some(&plain)),
        ("trained, 2.1 bits", trained, Some(checkpoint)),
    ]
    .into_iter()
    .map(|(name, model, palettes)| {
        let pipeline = Pipeline::load(model, palettes, Kind::Float, Device::Cpu)?;
        let loss = Evaluation::open(config, model, None, Device::Cpu)?.measure(&pipeline.unet)?.loss;
        Ok(Row { name, pipeline, loss, scores: Vec::new(), shown: Vec::new() })
    })
    .collect()
}

/// The best palettes without training, of the same form in each layer as those of `trained`.
fn post_training(model: &Model, trained: &PalettizedCheckpoint) -> Result<PalettizedCheckpoint> {
    let chosen = trained.palettes.iter().map(|(name, palette)| (name.clone(), palette.form)).collect();
    let weights = model.weights(Component::Unet, Kind::Half, Device::Cpu)?;
    let metadata = [(SOURCE_MODEL.to_owned(), model.path().display().to_string())].into();
    post_training::palettize(weights.into_iter().map(Ok), &chosen, Weights::new(), metadata, &|_| {})
}

/// Draws every prompt with every model, from the same noise, and asks the judge what the pictures show.
fn judge(config: &Config, prompts: &[JudgedPrompt], rows: &mut [Row]) -> Result<()> {
    let clip = Clip::open(JUDGE, Device::Cpu)?;
    let choices = Choices::new(&clip, prompts, &read_labels(Path::new(LABELS))?)?;
    let subject = instance_prompt(config);
    let total = rows.len() * prompts.len() * IMAGES;
    let mut bar = Progress::new("drawing", 0, total as u64).counting("picture");
    let mut drawn = 0;
    for row in rows {
        for (index, prompt) in prompts.iter().enumerate() {
            let seeds = (index * IMAGES..(index + 1) * IMAGES).map(|seed| seed as u64).collect();
            let request = Request {
                prompt: prompt.drawn.prompt.clone(),
                guidance_scale: GUIDANCE,
                noise: Noise::Seeds(seeds),
                images: IMAGES,
                ..Request::default()
            };
            let output = row.pipeline.generate(&request, &mut |_, _| go_on())?;
            let images: Vec<RgbImage> =
                output.images.unbind(0).iter().map(pictures::from_tensor).collect::<Result<_>>()?;
            let shown = choices.shown(&clip.pictures(&images.iter().collect::<Vec<_>>())?);
            let asked = Asked::of(prompt, subject);
            row.scores.extend(shown.iter().map(|shown| (asked, right(shown, &prompt.labels))));
            if index < SHOWN {
                row.shown.extend(images.into_iter().next());
            }
            drawn += IMAGES as u64;
            bar.update(drawn, &[]);
        }
    }
    bar.finish();
    Ok(())
}

fn instance_prompt(config: &Config) -> &str {
    config.data.dreambooth.as_ref().map_or("", |dreambooth| dreambooth.instance_prompt.as_str())
}

/// How often the pictures show what was asked for, and the loss.
fn table(rows: &[Row]) -> Result<()> {
    let counts = |row: &Row| COLUMNS.map(|column| format!("{} of \"{}\"", column.values(row).len(), column.title));
    let counts = rows.first().map(counts).unwrap_or_default().join(", ");
    print(format_args!(
        "\nhow many of the pictures are right, %, by the judge in {JUDGE}, from the same noise ({counts});\n\
         loss: the denoising loss on pictures that were not trained on, none of the subject"
    ))?;
    let heads: String = COLUMNS.iter().map(|column| format!("{:>9}", column.title)).collect();
    print(format_args!("  {:26}{heads}{:>11}", "", "loss"))?;
    for row in rows {
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let cells: String = COLUMNS.iter().map(|column| format!("{:>9.0}", mean(column.values(row)))).collect();
        print(format_args!("  {:26}{cells}{:>11.6}", row.name, row.loss))?;
    }
    Ok(())
}

/// Reads the exported packages back and compares them with the networks that were trained.
fn package(config: &Config, model: &Model, checkpoint: &PalettizedCheckpoint) -> Result<()> {
    let folder = config.output_dir.join("coreml");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    for path in paths {
        if path.extension().is_some_and(|extension| extension == "mlpackage") {
            let report = verify::against(&path, model, Some(checkpoint), &Nbits::default(), false)?;
            print(format_args!("\n{}\n{}", path.display(), format!("{report}").trim_end()))?;
            let least = report.least(Precision::Float32).min(report.least(Precision::Float16));
            if least.is_nan() || least < 35.0 {
                bail!("{} differs from the trained network: {least:.1} dB", path.display());
            }
        }
    }
    Ok(())
}
