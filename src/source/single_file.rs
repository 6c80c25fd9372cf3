//! Single-file checkpoints: Stable Diffusion 1, 2 and XL in one `.safetensors` file with latent-diffusion's names.
//!
//! Opening one reads its header alone. Its tensors' shapes tell its configurations ([`inferred`]), its text encoder tells
//! which tokenizer it takes, and [`evidence`](super::evidence) what it predicts. A file may hold one network alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::alone::Meaning;
use super::clip::{self, Clip};
use super::evidence::noise;
use super::inferred::{self, Noise, Shapes, Version};
use super::ldm::{Layout, OPEN_CLIP};
use super::lora::is_of_lora;
use super::options::ModelOptions;
use super::stored::{Origin, Place, Stored, stranger};
use super::{Component, Tokenizer};
use crate::files::TensorFile;
use crate::ops::Parameter;
use crate::terminal::note;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A single-file checkpoint.
pub struct SingleFile {
    file: Arc<TensorFile>,
    places: BTreeMap<Component, Vec<Place>>,
    /// The one network that it holds, if it is not a whole checkpoint.
    alone: Option<Component>,
    version: Version,
    noise: Noise,
    /// Of an autoencoder alone: what the model that it is for multiplies latents by, where that is known.
    scaling_factor: Option<f64>,
}

/// Whether a UNet with these parameters is that of a Stable Diffusion XL.
fn is_xl_unet(unet: &[Place]) -> bool {
    unet.iter().any(|place| place.parameter.starts_with("add_embedding."))
}

impl SingleFile {
    /// Reads the header of `path`. What had to be assumed about the model, and what of the file is not used, is said on
    /// standard error.
    ///
    /// # Errors
    /// One line: damaged, a pickle, another kind of model (named), without a UNet, with a tensor (named) within a network
    /// that is nothing that Stable Diffusion 1, 2 or XL has there.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        let file = Arc::new(TensorFile::open(path)?);
        let (shown, names) = (path.display(), file.names());
        if let Some(other) = other_kind(&file, &names) {
            bail!("{shown} is {other}; a single file is one of Stable Diffusion 1, 2 or XL here");
        }
        let (places, alone) = found(&file, &names)?;
        let Some(unet) = places.get(&Component::Unet) else {
            match alone == Some(Component::Autoencoder) {
                true => bail!("{shown} is an autoencoder alone; give the model, and this with --vae or model.vae"),
                false => bail!("{shown} has no UNet: no tensor's name begins with `model.diffusion_model.`"),
            }
        };
        let linear = |place: &Place| place.tensor.ends_with(".proj_in.weight") && rank(&file, &place.tensor) == 2;
        let version = match places.get(&Component::TextEncoder) {
            _ if is_xl_unet(unet) => Version::Xl,
            Some(text) if text.iter().any(|place| place.tensor.starts_with(OPEN_CLIP)) => Version::Two,
            // Without a text encoder the UNet tells: only that of Stable Diffusion 2 has linear projections.
            None if unet.iter().any(linear) => Version::Two,
            _ => Version::One,
        };
        let noise = noise(&file, version, options)?;
        Ok(Self { file, places, alone, version, noise, scaling_factor: None })
    }

    /// The autoencoder of the file `path`, which may hold nothing else, to go with a model that is a Stable Diffusion XL or
    /// not and whose own autoencoder multiplies latents by `scaling_factor`: a file of an autoencoder alone does not tell.
    ///
    /// # Errors
    /// As [`SingleFile::open`]; without an autoencoder.
    pub fn open_autoencoder(path: &Path, is_xl: bool, scaling_factor: Option<f64>) -> Result<Self> {
        let file = Arc::new(TensorFile::open(path)?);
        let (mut places, alone) = found(&file, &file.names())?;
        // Of a whole checkpoint the UNet tells.
        let (is_xl, scaling_factor) = match places.get(&Component::Unet) {
            Some(unet) => (is_xl_unet(unet), None),
            None => (is_xl, scaling_factor),
        };
        places.retain(|component, _| *component == Component::Autoencoder);
        if places.is_empty() {
            bail!(
                "{} has no autoencoder: no tensor's name begins with `first_stage_model.`, `encoder.` or `decoder.`",
                path.display()
            );
        }
        let version = if is_xl { Version::Xl } else { Version::One };
        Ok(Self { file, places, alone, version, noise: Noise::default(), scaling_factor })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The component's `config.json` as the shapes tell it.
    pub fn config_json(&self, component: Component) -> Result<Value> {
        let places = self.places(component)?;
        let shapes = places.iter().map(|place| (place.parameter.clone(), place.shape(component.into(), &self.file)));
        let shapes = Shapes(shapes.collect());
        let config = match component {
            Component::Unet => inferred::unet(&shapes, self.version, self.noise.prediction),
            Component::TextEncoder => inferred::text_encoder(&shapes, self.version),
            Component::TextEncoder2 => inferred::second_text_encoder(&shapes),
            Component::Autoencoder => inferred::autoencoder(&shapes, self.version, self.scaling_factor),
            Component::SafetyChecker => bail!("single files have no safety checker"),
        };
        config.with_context(|| self.path().display().to_string())
    }

    /// `scheduler_config.json`.
    pub fn scheduler_config(&self) -> Value {
        inferred::scheduler(self.version, self.noise)
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
        let positions = self.text_positions(text_encoder)?;
        Clip::new()?.files(self.padding(text_encoder), positions)
    }

    fn text_positions(&self, text_encoder: Component) -> Result<i64> {
        let config = self.config_json(text_encoder)?;
        config["max_position_embeddings"].as_i64().context("a text encoder without positions")
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
        Stored::new(component.into(), Origin::OtherTensors, parameters, vec![self.file.clone()], places)
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
            match self.alone {
                Some(Component::Unet) => bail!(
                    "{shown} holds a UNet alone, and text encoder and autoencoder are needed here too; put it into a copy of its base model's \
                     diffusers folder, as {}/{}",
                    Component::Unet.folder(),
                    Component::Unet.weight_file()
                ),
                _ => bail!("{shown} has no {title} (no tensor's name begins with `{prefix}`), which is needed here"),
            }
        };
        Ok(places)
    }
}

fn rank(file: &TensorFile, name: &str) -> usize {
    file.shape(name).map_or(0, |shape| shape.len())
}

/// Where the tensors of each network lie.
type Places = BTreeMap<Component, Vec<Place>>;

/// Where each component's parameters lie, and which network the file holds alone. What lies beside the networks is told
/// of in a line.
fn found(file: &TensorFile, names: &[String]) -> Result<(Places, Option<Component>)> {
    let layout = Layout::of(names.iter().map(String::as_str));
    let mut places: BTreeMap<Component, Vec<Place>> = BTreeMap::new();
    let mut beside = Vec::new();
    for tensor in names {
        let (component, parameters, transposed) = match layout.meaning(tensor) {
            Some(Meaning::Parameter(component, name)) => (component, vec![name], false),
            Some(Meaning::Parameters(component, names)) => (component, names, false),
            Some(Meaning::Transposed(component, name)) => (component, vec![name], rank(file, tensor) == 2),
            Some(Meaning::Nothing) => continue,
            Some(Meaning::Beside) => {
                beside.push(tensor.as_str());
                continue;
            }
            None => bail!(
                "{} has the tensor `{tensor}`, which is nothing that Stable Diffusion 1, 2 or XL has{}",
                file.path().display(),
                stranger(tensor)
            ),
        };
        let parts = parameters.len() as i64;
        for (part, parameter) in (0..).zip(parameters) {
            let part = (parts > 1).then_some((part, parts));
            let tensor = tensor.clone();
            places.entry(component).or_default().push(Place { parameter, file: 0, tensor, part, transposed });
        }
    }
    if !beside.is_empty() && !places.is_empty() {
        note(format_args!("{}: not used, because no network has it: {}", file.path().display(), grouped(&beside)));
    }
    let alone = places.keys().next().copied().filter(|_| places.len() == 1);
    Ok((places, alone))
}

/// Names, those of one first part together: `model_ema.…` (686 tensors), `logit_scale`.
fn grouped(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in names {
        groups.entry(name.split('.').next().unwrap_or_default()).or_default().push(name);
    }
    let mut list: Vec<String> = groups
        .iter()
        .take(SHOWN)
        .map(|(first, names)| match names[..] {
            [name] => format!("`{name}`"),
            _ => format!("`{first}.…` ({} tensors)", names.len()),
        })
        .collect();
    if groups.len() > SHOWN {
        list.push(format!("and {} more", groups.len() - SHOWN));
    }
    list.join(", ")
}

/// What a file is that is no Stable Diffusion 1, 2 or XL.
fn other_kind(file: &TensorFile, names: &[String]) -> Option<&'static str> {
    let starts = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    // With the prefix of whole checkpoints or without.
    let unet = |prefix: &str| starts(prefix) || starts(&format!("model.diffusion_model.{prefix}"));
    let has = |name: &str| file.shape(name).is_some();
    let within = |part: &str| names.iter().any(|name| name.contains(part));
    let whole = starts("model.diffusion_model.") || starts("input_blocks.") || starts("down_blocks.");
    let lora = starts("lora_") || names.iter().any(|name| is_of_lora(name));
    // Not LoRAs of which every tensor has the name of a model's layer, as PEFT and diffusers write them.
    let whole_model = whole && names.iter().any(|name| !name.starts_with("lora_") && !is_of_lora(name));
    let kinds = [
        (file.metadata().contains_key("palettist.palettes"), "a palettized checkpoint, which --palettes takes"),
        (unet("joint_blocks."), "a Stable Diffusion 3"),
        (unet("double_blocks.") || unet("single_blocks."), "a Flux"),
        (starts("conditioner.embedders.0.model."), "a Stable Diffusion XL refiner"),
        (has("model.diffusion_model.label_emb.weight"), "a Stable Diffusion x4 upscaler"),
        (starts("embedder.model."), "a Stable Diffusion 2 unCLIP"),
        (starts("depth_model."), "a depth-to-image model (Stable Diffusion 2 depth)"),
        (
            has("edm_mean") || has("edm_std") || has("edm_vpred.sigma_max") || has("edm_vpred.sigma_min"),
            "a model with an EDM noise schedule (Playground 2.5, CosXL)",
        ),
        (starts("control_model.") || starts("controlnet_"), "a ControlNet"),
        (
            starts("motion_modules.") || within("temporal_transformer") || within("time_stack."),
            "a model of moving pictures",
        ),
        (lora && whole_model, "a model with a LoRA beside its weights, not merged into them (merge it first)"),
        (lora, "a LoRA, not a model: give the model, and this with --lora, or under [[model.loras]] of a config"),
        (starts("text_model.") && !whole, "a text encoder alone (give the folder of the whole model)"),
        (starts("emb_params") || has("clip_l") || has("clip_g"), "a textual inversion, not a model"),
    ];
    kinds.into_iter().find_map(|(is, what)| is.then_some(what))
}
