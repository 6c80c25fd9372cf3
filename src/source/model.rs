//! A diffusers folder: its configurations, and its weights under today's names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use tch::{Device, Kind};

use super::files::{TensorFile, is_floating};
use super::json::{read_json, read_json_if_there};
use super::{Component, Tokenizer, hub, names};
use crate::diffusion::parse_config;
use crate::networks::autoencoder::AutoencoderConfig;
use crate::networks::text_encoder::TextEncoderConfig;
use crate::networks::unet::UnetConfig;
use crate::ops::{Parameter, Weights};

/// A Stable Diffusion model on disk.
#[derive(Clone, Debug)]
pub struct Model {
    /// The diffusers folder.
    pub folder: PathBuf,
}

impl Model {
    /// Finds `model`: a diffusers folder, or the hub id (`owner/name`) of one in the local Hugging Face cache.
    /// Nothing is downloaded, no weight is read.
    ///
    /// # Errors
    /// One line that says what was expected.
    pub fn open(model: &str) -> Result<Self> {
        let path = Path::new(model);
        if path.is_file() {
            bail!(
                "{model} is a single file; only diffusers folders are read today; make one with: python -c \"from \
                 diffusers import StableDiffusionPipeline as P; P.from_single_file('{model}').save_pretrained('FOLDER')\""
            );
        }
        if path.is_dir() {
            return Self::in_folder(path);
        }
        if hub::is_id(model) {
            let folder = hub::cached(model).ok_or_else(|| {
                anyhow!(
                    "{model} is neither a folder nor in the local Hugging Face cache; fetch it with: hf download {model} \
                     --exclude '*.ckpt' '*.bin'"
                )
            })?;
            return Self::in_folder(&folder).with_context(|| format!("the cached snapshot of {model}"));
        }
        bail!(
            "{model} does not exist; a diffusers folder is expected (one with unet/, vae/, text_encoder/, tokenizer/)"
        )
    }

    fn in_folder(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        if let Some(index) = read_json_if_there(&folder.join("model_index.json"))? {
            let class = index.get("_class_name").and_then(Value::as_str).unwrap_or("a class it does not name");
            let uses = |part: &str| index.pointer(&format!("/{part}/1")).is_some_and(Value::is_string);
            if !uses("unet") {
                bail!("{shown}/model_index.json is of {class}, which has no `unet`: not a Stable Diffusion 1 or 2");
            }
            if uses("text_encoder_2") {
                bail!("{shown}/model_index.json is of {class}, with a `text_encoder_2`: not a Stable Diffusion 1 or 2");
            }
        } else if !folder.join("unet").is_dir() {
            let hint = match folder.join("config.json").is_file() {
                true => " (it looks like one component: give the folder above it)",
                false => "",
            };
            bail!("{shown} is not a diffusers folder: it has neither model_index.json nor unet/{hint}");
        }
        Ok(Self { folder: folder.to_owned() })
    }

    /// The folder of a component.
    pub fn component_folder(&self, component: Component) -> PathBuf {
        self.folder.join(component.folder())
    }

    /// The component's `config.json` as it stands.
    pub fn config_json(&self, component: Component) -> Result<Value> {
        let folder = self.component_folder(component);
        if !folder.is_dir() {
            bail!(
                "{} has no {}: the folder {} is missing",
                self.folder.display(),
                component.title(),
                component.folder()
            );
        }
        read_json(&folder.join("config.json"))
    }

    fn config<T>(&self, component: Component, parse: impl FnOnce(&Value) -> Result<T>) -> Result<T> {
        let json = self.config_json(component)?;
        parse(&json).with_context(|| self.component_folder(component).join("config.json").display().to_string())
    }

    /// `unet/config.json`.
    pub fn unet_config(&self) -> Result<UnetConfig> {
        self.config(Component::Unet, UnetConfig::from_json)
    }

    /// `vae/config.json`.
    pub fn autoencoder_config(&self) -> Result<AutoencoderConfig> {
        self.config(Component::Autoencoder, AutoencoderConfig::from_json)
    }

    /// `text_encoder/config.json`.
    pub fn text_encoder_config(&self) -> Result<TextEncoderConfig> {
        self.config(Component::TextEncoder, TextEncoderConfig::from_json)
    }

    /// `scheduler/scheduler_config.json`, in which diffusers writes infinities that JSON does not have.
    pub fn scheduler_config(&self) -> Result<Value> {
        let path = self.folder.join("scheduler/scheduler_config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        parse_config(&text).with_context(|| format!("{} is not JSON", path.display()))
    }

    /// The tokenizer, checked against the text encoder that reads its ids.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let folder = self.folder.join("tokenizer");
        let tokenizer = Tokenizer::open(&folder)?;
        let config = self.text_encoder_config()?;
        if tokenizer.vocabulary_size() > config.vocab_size || tokenizer.length() as i64 > config.positions {
            bail!(
                "{}: {} tokens of texts of {}, but the text encoder knows {} (`vocab_size`) and reads {} \
                 (`max_position_embeddings`)",
                folder.display(),
                tokenizer.vocabulary_size(),
                tokenizer.length(),
                config.vocab_size,
                config.positions
            );
        }
        Ok(tokenizer)
    }

    /// The parameters that the component's configuration asks for.
    pub fn parameters(&self, component: Component) -> Result<Vec<Parameter>> {
        Ok(match component {
            Component::Unet => self.unet_config()?.parameters(),
            Component::Autoencoder => self.autoencoder_config()?.parameters(),
            Component::TextEncoder => self.text_encoder_config()?.parameters(),
        })
    }

    /// The weights of a component under today's names, converted to `kind` on `device`: all that its configuration
    /// asks for, and nothing else.
    ///
    /// # Errors
    /// One line naming tensor and file: missing, unexpected, of another shape, not floating-point; a damaged file; only
    /// pickles.
    pub fn weights(&self, component: Component, kind: Kind, device: Device) -> Result<Weights> {
        let stored = self.stored(component)?;
        let mut weights = HashMap::with_capacity(stored.tensors.len());
        for (name, place) in &stored.tensors {
            let file = &stored.files[place.file];
            let tensor = file.tensor(&place.name)?;
            let tensor = tensor
                .f_view(place.shape.as_slice())
                .and_then(|tensor| tensor.f_to_kind(kind))
                .and_then(|tensor| tensor.f_to_device(device))
                .with_context(|| format!("{}: tensor `{}`", file.path().display(), place.name))?;
            weights.insert(name.clone(), tensor);
        }
        Ok(weights)
    }

    /// Checks names, shapes and types of a component's files against its configuration without reading a weight.
    pub fn check(&self, component: Component) -> Result<()> {
        self.stored(component).map(|_| ())
    }

    fn stored(&self, component: Component) -> Result<Stored> {
        let parameters = self.parameters(component)?;
        let files = weight_files(&self.component_folder(component), component)?;
        let files = files.iter().map(|path| TensorFile::open(path)).collect::<Result<Vec<_>>>()?;
        Stored::new(component, &parameters, files)
    }
}

/// Where each parameter of a component lies.
struct Stored {
    files: Vec<TensorFile>,
    tensors: HashMap<String, Place>,
}

struct Place {
    file: usize,
    name: String,
    shape: Vec<i64>,
}

impl Stored {
    fn new(component: Component, parameters: &[Parameter], files: Vec<TensorFile>) -> Result<Self> {
        let wanted: HashMap<&str, &Parameter> = parameters.iter().map(|p| (p.name.as_str(), p)).collect();
        let title = component.title();
        let mut tensors: HashMap<String, Place> = HashMap::with_capacity(wanted.len());
        for (index, file) in files.iter().enumerate() {
            let shown = file.path().display();
            for name in file.names() {
                let Some(today) = names::today(component, &name) else { continue };
                let Some(parameter) = wanted.get(today.as_str()) else {
                    bail!("{shown} has the tensor `{name}`, which the {title} of this config.json does not have");
                };
                let kind = file.kind(&name)?;
                if !is_floating(kind) {
                    bail!("{shown}: tensor `{name}` holds {kind:?} numbers; quantized weights are not supported");
                }
                let shape = names::today_shape(component, &today, &file.shape(&name).unwrap_or_default());
                if shape != parameter.shape {
                    let expected = &parameter.shape;
                    bail!("{shown}: tensor `{name}` has the shape {shape:?}; this config.json asks for {expected:?}");
                }
                if let Some(other) = tensors.insert(today, Place { file: index, name: name.clone(), shape }) {
                    let first = files[other.file].path().display();
                    bail!("{shown}: tensor `{name}` is there twice, also as `{}` in {first}", other.name);
                }
            }
        }
        let missing: Vec<_> = parameters.iter().filter(|p| !tensors.contains_key(&p.name)).collect();
        if let (Some(first), Some(file)) = (missing.first(), files.first()) {
            let more = match missing.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            bail!("{}: the tensor `{}`{more} of the {title} is missing", file.path().display(), first.name);
        }
        Ok(Self { files, tensors })
    }
}

/// The safetensors files of a component: one, or the shards of an index. Full precision comes before variants, as
/// diffusers has it.
fn weight_files(folder: &Path, component: Component) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    found.sort();
    let stems = match component {
        Component::TextEncoder => ["model", "diffusion_pytorch_model"],
        _ => ["diffusion_pytorch_model", "model"],
    };
    for stem in stems {
        // `stem.safetensors`, `stem.fp16.safetensors`, any other variant; an index in the place of each.
        let middle = |name: &str, ending: &str| -> Option<String> {
            let middle = name.strip_prefix(stem)?.strip_suffix(ending)?;
            (middle.is_empty() || middle.starts_with('.')).then(|| middle.to_owned())
        };
        let mut candidates: Vec<(u8, bool, &String)> = Vec::new();
        for name in &found {
            // The variant of an index stands before `.safetensors` or, from older diffusers, before `.json`.
            let index = middle(name, ".safetensors.index.json").or_else(|| {
                let variant = middle(name, ".json")?.strip_prefix(".safetensors.index")?.to_owned();
                (!variant.is_empty()).then_some(variant)
            });
            let (variant, sharded) = match (middle(name, ".safetensors"), index) {
                (Some(variant), _) if !variant.contains("-of-") => (variant, false),
                (_, Some(variant)) => (variant, true),
                _ => continue,
            };
            let rank = match variant.as_str() {
                "" => 0,
                ".fp32" => 1,
                ".bf16" => 2,
                ".fp16" => 3,
                _ => 4,
            };
            candidates.push((rank, sharded, name));
        }
        candidates.sort();
        if let Some((_, sharded, name)) = candidates.first() {
            let path = folder.join(name);
            return if *sharded { shards(&path) } else { Ok(vec![path]) };
        }
    }
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|ending| name.ends_with(ending));
    if let Some(name) = found.iter().find(pickle) {
        bail!(
            "{} is a pickle, which can run code and is never read; convert the model once with: python -c \"from \
             diffusers import StableDiffusionPipeline as P; P.from_pretrained('MODEL').save_pretrained('FOLDER')\"",
            folder.join(name).display()
        );
    }
    bail!("{} holds no weights: {}.safetensors is expected", folder.display(), stems[0])
}

/// The files that an index names, each once.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("{} has no `weight_map`", index.display()))?;
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in map {
        // A shard lies beside its index; a name that leads elsewhere is not followed.
        let name = file.as_str().filter(|name| name.ends_with(".safetensors") && !name.contains(['/', '\\']));
        let name = name.with_context(|| format!("{}: tensor `{tensor}` is in {file}, not a shard", index.display()))?;
        files.insert(folder.join(name));
    }
    if let Some(missing) = files.iter().find(|path| !path.is_file()) {
        bail!("{} is missing; {} names it", missing.display(), index.display());
    }
    Ok(files.into_iter().collect())
}
