//! Writes a model of random weights, to try sizes where a real one can't be had:
//! `cargo run --example random_model -- CONFIGS OUT`.
//!
//! CONFIGS is a diffusers folder of which only the small files are needed (`unet/config.json` and so on, tokenizer,
//! scheduler); OUT gets them with random fp16 weights of the usual scale: 1/√fan_in for layers, 1 ± 0.1 for norms.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use palettist::ops::{Initial, Parameter, Weights};
use palettist::source::{Model, write_component};
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to] = arguments.as_slice() else { anyhow::bail!("usage: random_model CONFIGS OUT") };
    let model = Model::open(from)?;
    let to = Path::new(to);
    ensure!(!to.exists(), "{} exists already", to.display());
    tch::manual_seed(1);
    for component in model.components() {
        let parameters = model.parameters(component)?;
        let weights: Weights = parameters.iter().map(|p| (p.name.clone(), random(p))).collect();
        let folder = to.join(component.folder());
        write_component(&folder, component, &model.config_json(component)?, &weights, Kind::Half)?;
        let count: usize = weights.values().map(Tensor::numel).sum();
        println!("{}: {:.1} M parameters", folder.display(), count as f64 / 1e6);
    }
    let tokenizers = if model.is_xl() { &["tokenizer", "tokenizer_2"][..] } else { &["tokenizer"] };
    for folder in tokenizers.iter().chain(&["scheduler"]) {
        std::fs::create_dir_all(to.join(folder))?;
        for entry in std::fs::read_dir(model.path().join(folder)).with_context(|| folder.to_owned())? {
            let path = entry?.path();
            // Written anew rather than copied: the source may be read-only.
            std::fs::write(to.join(folder).join(path.file_name().unwrap_or_default()), std::fs::read(&path)?)?;
        }
    }
    let index = model.path().join("model_index.json");
    std::fs::write(to.join("model_index.json"), std::fs::read(index)?)?;
    Ok(())
}

fn random(parameter: &Parameter) -> Tensor {
    let shape = parameter.shape.as_slice();
    let (mean, deviation) = match parameter.initial {
        Initial::Constant(value) => (value, 0.1),
        Initial::Normal(deviation) => (0.0, deviation),
        Initial::Uniform { fan_in } => (0.0, 1.0 / (fan_in as f64).sqrt()),
    };
    (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * deviation + mean).to_kind(Kind::Half)
}
