//! `palettist demo`: the whole path on the small base, what `make demo` runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use image::RgbImage;
use tch::{Device, Kind};

use super::{Interrupted, Usage, load_config, print, train, verify};
use crate::config::Config;
use crate::coreml::exporting::Nbits;
use crate::coreml::reading::Precision;
use crate::diffusion::Noise;
use crate::ops::Weights;
use crate::palette::checkpoint::SOURCE_MODEL;
use crate::palette::{PalettizedCheckpoint, post_training};
use crate::pipeline::{Pipeline, Request};
use crate::report::{Progress, pictures};
use crate::source::{Component, Model};
use crate::train::evaluate::Evaluation;
use crate::train::{Ended, Resume, go_on};

/// The whole path on the small base: trains palettes of 2, of mixed and of 4 bits, exports, verifies, compares
#[derive(clap::Args)]
pub struct Args {
    /// The folder with the project's configs/, datasets/ and examples/
    #[arg(long, default_value = ".")]
    project: PathBuf,
}

/// What the picture shows, a column each. All six combinations are among those that the base was trained on.
const PROMPTS: [&str; 6] = [
    "a red mushroom on the grass",
    "a blue boat at sea",
    "a yellow house in the snow",
    "a purple umbrella at the beach",
    "a green cactus in the desert",
    "an orange cat at night",
];

/// The configs that are trained, and what their rows are called.
const TRAINED: [(&str, &str); 3] =
    [("demo-2bit", "2 bits"), ("demo-mixed", "2.1 bits, mixed"), ("demo-4bit", "4.1 bits, mixed")];

/// One row of the table and of the picture.
struct Row {
    name: String,
    weights: Weights,
    loss: f64,
}

pub fn run(args: Args) -> Result<()> {
    std::env::set_current_dir(&args.project)
        .map_err(|error| Usage(format!("--project {}: cannot go there: {error}", args.project.display())))?;
    train::stop_on_interrupt(train::SAVING)?;
    let mut trained = Vec::new();
    for (name, bits) in TRAINED {
        let path = PathBuf::from(format!("configs/{name}.toml"));
        if !path.is_file() {
            let message =
                format!("{} is not here: run the demo in the project's folder, or pass --project", path.display());
            return Err(Usage(message).into());
        }
        let config = load_config(&path, &[])?;
        crate::terminal::tell(format_args!("\n{bits}: training into {}", config.output_dir.display()));
        if crate::train::run(&config, &Resume::Auto)? == Ended::Stopped {
            return Err(Interrupted("stopped after saving; run the same command to resume".into()).into());
        }
        let palettes = config.output_dir.join(format!("{}.palettes.safetensors", config.name));
        trained.push((bits, PalettizedCheckpoint::read(&palettes)?, config));
    }
    let (_, _, config) = trained.last().context("no configs")?;
    let model = Model::open_with(&config.model.pretrained_model_name_or_path, &config.model.options())?;

    crate::terminal::tell(format_args!("\nmeasuring"));
    let evaluation = Evaluation::open(config, &model, None, Device::Cpu)?;
    let float = model.weights(Component::Unet, Kind::Float, Device::Cpu)?;
    let mut rows = vec![row("float".into(), float, &evaluation)?];
    for (bits, checkpoint, _) in &trained {
        let plain = post_training(&model, checkpoint)?;
        rows.push(row(format!("post-training, {bits}"), plain.weights(Kind::Float, Device::Cpu)?, &evaluation)?);
        rows.push(row(format!("trained, {bits}"), checkpoint.weights(Kind::Float, Device::Cpu)?, &evaluation)?);
    }
    table(&rows, evaluation.examples())?;
    for (_, checkpoint, config) in &trained {
        package(config, &model, checkpoint)?;
    }
    let picture = Path::new("runs/demo.png");
    let names: Vec<String> = rows.iter().map(|row| row.name.clone()).collect();
    draw(&model, rows, picture)?;
    print(format_args!(
        "\n{}: rows are {};\ncolumns are {}",
        picture.display(),
        names.join("; "),
        PROMPTS.map(|prompt| format!("\"{prompt}\"")).join(", ")
    ))
}

fn row(name: String, weights: Weights, evaluation: &Evaluation) -> Result<Row> {
    let loss = evaluation.measure(&weights)?.loss;
    Ok(Row { name, weights, loss })
}

/// The best palettes without training, of the same form in each layer as those of `trained`.
fn post_training(model: &Model, trained: &PalettizedCheckpoint) -> Result<PalettizedCheckpoint> {
    let chosen = trained.palettes.iter().map(|(name, palette)| (name.clone(), palette.form)).collect();
    let weights = model.weights(Component::Unet, Kind::Half, Device::Cpu)?;
    let metadata = [(SOURCE_MODEL.to_owned(), model.path().display().to_string())].into();
    post_training::palettize(weights.into_iter().map(Ok), &chosen, Weights::new(), metadata, &|_| {})
}

/// Losses, and how much of what post-training lost came back.
fn table(rows: &[Row], examples: usize) -> Result<()> {
    let float = rows[0].loss;
    print(format_args!(
        "\nvalidation denoising loss, {examples} noised pictures, the same noise and timesteps for all"
    ))?;
    for row in rows {
        print(format_args!("  {:31} {:.6}  {:+8.2} %", row.name, row.loss, 100.0 * (row.loss / float - 1.0)))?;
    }
    for pair in rows[1..].chunks(2) {
        let recovered = (pair[0].loss - pair[1].loss) / (pair[0].loss - float);
        print(format_args!("  {} recovers {:.1} % of what {} lost", pair[1].name, 100.0 * recovered, pair[0].name))?;
    }
    Ok(())
}

/// Reads the exported package back and compares it with the trained network.
fn package(config: &Config, model: &Model, checkpoint: &PalettizedCheckpoint) -> Result<()> {
    let folder = config.output_dir.join("coreml");
    for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
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

fn draw(model: &Model, rows: Vec<Row>, path: &Path) -> Result<()> {
    let mut pipeline = Pipeline::load(model, None, Kind::Float, Device::Cpu)?;
    let total = rows.len() * PROMPTS.len();
    let mut bar = Progress::new("drawing", 0, total as u64).counting("picture");
    let mut sheet: Vec<Vec<RgbImage>> = Vec::new();
    for row in rows {
        pipeline.unet = row.weights;
        let mut line = Vec::new();
        for (seed, prompt) in PROMPTS.iter().enumerate() {
            let request = Request {
                prompt: (*prompt).to_owned(),
                guidance_scale: 4.0,
                noise: Noise::Seed(seed as u64),
                ..Request::default()
            };
            let output = pipeline.generate(&request, &mut |_, _| go_on())?;
            line.push(pictures::from_tensor(&output.images.get(0))?);
            bar.update((sheet.len() * PROMPTS.len() + line.len()) as u64, &[]);
        }
        sheet.push(line);
    }
    bar.finish();
    pictures::write_png(path, &pictures::sheet(&sheet, 4))
}
