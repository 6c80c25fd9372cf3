//! Single-file checkpoints: Stable Diffusion 1, 2 and XL in one `.safetensors` file with latent-diffusion's names.
//!
//! Opening one reads its header alone. Its tensors' shapes tell its configurations ([`inferred`]), its text encoder tells
//! which tokenizer it takes; what it predicts may stand in its metadata, and is assumed where it does not.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::Kind;

use super::clip::{self, Clip};
use super::files::TensorFile;
use super::inferred::{self, Prediction, Shapes, Version};
use super::ldm::{Layout, Meaning, OPEN_CLIP};
use super::stored::{Origin, Place, Stored};
use super::{Component, Tokenizer};
use crate::ops::Parameter;

/// A single-file checkpoint.
pub struct SingleFile {
    file: Arc<TensorFile>,
    places: BTreeMap<Component, Vec<Place>>,
    version: Version,
    prediction: Prediction,
}

impl SingleFile {
    /// Reads the header of `path`. What had to be assumed about the model is said on standard error.
    ///
    /// # Errors
    /// One line: damaged, a pickle, another kind of model (named), without a UNet, with a tensor (named) that is nothing
    /// that Stable Diffusion 1, 2 or XL has.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(TensorFile::open(path)?);
        let shown = path.display();
        let names = file.names();
        if let Some(other) = other_kind(&file, &names) {
            bail!("{shown} is {other}; a single file is one of Stable Diffusion 1, 2 or XL here");
        }
        let layout = Layout::of(names.iter().map(String::as_str));
        let mut places: BTreeMap<Component, Vec<Place>> = BTreeMap::new();
        for tensor in &names {
            let (component, parameters, transposed) = match layout.meaning(tensor) {
                Some(Meaning::Parameter(component, name)) => (component, vec![name], false),
                Some(Meaning::Parameters(component, names)) => (component, names, false),
                Some(Meaning::Transposed(component, name)) => (component, vec![name], rank(&file, tensor) == 2),
                Some(Meaning::Nothing) => continue,
                None => {
                    bail!("{shown} has the tensor `{tensor}`, which is nothing that Stable Diffusion 1, 2 or XL has")
                }
            };
            let parts = parameters.len() as i64;
            for (part, parameter) in (0..).zip(parameters) {
                let part = (parts > 1).then_some((part, parts));
                let tensor = tensor.clone();
                places.entry(component).or_default().push(Place { parameter, file: 0, tensor, part, transposed });
            }
        }
        let Some(unet) = places.get(&Component::Unet) else {
            bail!("{shown} has no UNet: no tensor's name begins with `model.diffusion_model.`");
        };
        let linear = |place: &Place| place.tensor.ends_with(".proj_in.weight") && rank(&file, &place.tensor) == 2;
        let version = match places.get(&Component::TextEncoder) {
            _ if unet.iter().any(|place| place.parameter.starts_with("add_embedding.")) => Version::Xl,
            Some(text) if text.iter().any(|place| place.tensor.starts_with(OPEN_CLIP)) => Version::Two,
            // Without a text encoder the UNet tells: only that of Stable Diffusion 2 has linear projections.
            None if unet.iter().any(linear) => Version::Two,
            _ => Version::One,
        };
        let prediction = prediction(&file, version)?;
        Ok(Self { file, places, version, prediction })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The component's `config.json` as the shapes tell it.
    pub fn config_json(&self, component: Component) -> Result<Value> {
        let places = self.places(component)?;
        let shapes = places.iter().map(|place| (place.parameter.clone(), place.shape(component, &self.file)));
        let shapes = Shapes(shapes.collect());
        let config = match component {
            Component::Unet => inferred::unet(&shapes, self.version, self.prediction),
            Component::TextEncoder => inferred::text_encoder(&shapes, self.version),
            Component::TextEncoder2 => inferred::second_text_encoder(&shapes),
            Component::Autoencoder => inferred::autoencoder(&shapes, self.version),
            Component::SafetyChecker => bail!("single files have no safety checker"),
        };
        config.with_context(|| self.path().display().to_string())
    }

    /// `scheduler_config.json`.
    pub fn scheduler_config(&self) -> Value {
        inferred::scheduler(self.version, self.prediction)
    }

    /// Whether it is a Stable Diffusion XL.
    pub fn is_xl(&self) -> bool {
        self.version == Version::Xl
    }

    /// CLIP's own tokenizer, which every Stable Diffusion has, as this text encoder takes it.
    pub fn tokenizer(&self, text_encoder: Component) -> Result<Tokenizer> {
        Tokenizer::clip(self.padding(text_encoder))
    }

    /// Names and contents of the files of the tokenizer's folder that a diffusers model would have.
    pub fn tokenizer_files(&self, text_encoder: Component) -> Result<[(&'static str, String); 4]> {
        Clip::new()?.files(self.padding(text_encoder))
    }

    fn padding(&self, text_encoder: Component) -> &'static str {
        // OpenCLIP fills up with the token of id 0, OpenAI's CLIP with the end.
        match (self.version, text_encoder) {
            (Version::Two, _) | (_, Component::TextEncoder2) => clip::EXCLAMATION_MARK,
            _ => clip::END,
        }
    }

    /// Where the parameters of a component lie.
    pub fn stored(&self, component: Component, parameters: &[Parameter]) -> Result<Stored> {
        let places = self.places(component)?.iter().cloned();
        Stored::new(component, Origin::OtherTensors, parameters, vec![self.file.clone()], places)
    }

    fn places(&self, component: Component) -> Result<&[Place]> {
        let Some(places) = self.places.get(&component) else {
            let (shown, title, prefix) = (
                self.path().display(),
                component.title(),
                match component {
                    Component::Unet => "model.diffusion_model.",
                    Component::TextEncoder if self.is_xl() => "conditioner.embedders.0.",
                    Component::TextEncoder => "cond_stage_model.",
                    Component::TextEncoder2 => "conditioner.embedders.1.",
                    Component::Autoencoder => "first_stage_model.",
                    Component::SafetyChecker => "safety_checker.",
                },
            );
            bail!("{shown} has no {title} (no tensor's name begins with `{prefix}`), which is needed here");
        };
        Ok(places)
    }
}

fn rank(file: &TensorFile, name: &str) -> usize {
    file.shape(name).map_or(0, |shape| shape.len())
}

/// What the UNet predicts: what the metadata say (modelspec, which kohya's scripts and others write); else the noise in
/// Stable Diffusion 1, and in XL without the tensor `v_pred`; in 2, as diffusers' `from_single_file` decides, the noise
/// after the 875,000 steps of 2-base and the velocity otherwise.
fn prediction(file: &TensorFile, version: Version) -> Result<Prediction> {
    const KEY: &str = "modelspec.prediction_type";
    let shown = file.path().display();
    match file.metadata().get(KEY).map(String::as_str) {
        Some("epsilon") => return Ok(Prediction::Epsilon),
        Some("v" | "v_prediction") => return Ok(Prediction::Velocity),
        Some(other) => {
            bail!("{shown}: its metadata has `{KEY}`: \"{other}\", which is not supported (epsilon or v is)")
        }
        None if version == Version::Xl && file.shape("v_pred").is_some() => return Ok(Prediction::Velocity),
        None if version != Version::Two => return Ok(Prediction::Epsilon),
        None => {}
    }
    let steps = match file.shape("global_step") {
        Some(shape) if shape.iter().product::<i64>() == 1 => {
            Some(file.tensor("global_step")?.f_to_kind(Kind::Int64)?.f_view([1])?.f_int64_value(&[0])?)
        }
        _ => None,
    };
    let (prediction, assumed, other, size) = match steps {
        Some(875_000) => (Prediction::Epsilon, "epsilon", "v", 512),
        _ => (Prediction::Velocity, "v_prediction", "epsilon", 768),
    };
    eprintln!(
        "note: {shown} is a Stable Diffusion 2 and does not say what it predicts; {assumed} at {size} pixels is assumed \
         (`global_step` is {}), as diffusers does; where that is wrong its metadata should have `{KEY}`: \"{other}\"",
        steps.map_or("not there".to_owned(), |steps| steps.to_string())
    );
    Ok(prediction)
}

/// What a file is that is no Stable Diffusion 1, 2 or XL.
fn other_kind(file: &TensorFile, names: &[String]) -> Option<&'static str> {
    let starts = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    // With the prefix of whole checkpoints or without.
    let unet = |prefix: &str| starts(prefix) || starts(&format!("model.diffusion_model.{prefix}"));
    let has = |name: &str| file.shape(name).is_some();
    let kinds = [
        (file.metadata().contains_key("palettist.palettes"), "a palettized checkpoint, which --palettes takes"),
        (unet("joint_blocks."), "a Stable Diffusion 3"),
        (unet("double_blocks.") || unet("single_blocks."), "a Flux"),
        (starts("conditioner.embedders.0.model."), "a Stable Diffusion XL refiner"),
        (has("model.diffusion_model.label_emb.weight"), "a Stable Diffusion x4 upscaler"),
        (starts("embedder.model."), "a Stable Diffusion 2 unCLIP"),
        (starts("control_model."), "a ControlNet"),
        (starts("lora_") || names.iter().any(|name| name.contains(".lora_")), "a LoRA, not a model"),
        (starts("encoder.down") || starts("decoder.up"), "an autoencoder alone"),
        (starts("down_blocks.") || starts("text_model."), "one component of a diffusers folder (give the folder)"),
    ];
    kinds.into_iter().find_map(|(is, what)| is.then_some(what))
}
