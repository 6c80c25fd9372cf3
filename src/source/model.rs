//! A model on disk, a diffusers folder or a single file: its configurations, and its weights under today's names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use tch::{Device, Kind};

use super::files::{TensorFile, write_bytes};
use super::json::{read_json, read_json_if_there};
use super::single_file::SingleFile;
use super::stored::{Origin, Place, Stored};
use super::{Component, SwiftTokenizer, Tokenizer, folder, hub, names, tokenizer};
use crate::diffusion::parse_config;
use crate::networks::autoencoder::AutoencoderConfig;
use crate::networks::safety_checker::SafetyCheckerConfig;
use crate::networks::text_encoder::TextEncoderConfig;
use crate::networks::unet::UnetConfig;
use crate::ops::{Parameter, Weights};

/// A Stable Diffusion model on disk.
#[derive(Clone)]
pub struct Model {
    name: String,
    form: Form,
    /// Of Stable Diffusion XL, with two text encoders.
    is_xl: bool,
}

#[derive(Clone)]
enum Form {
    /// A diffusers folder.
    Folder(PathBuf),
    /// A single-file checkpoint.
    File(Arc<SingleFile>),
}

/// The folder of a text encoder's tokenizer.
fn tokenizer_folder(text_encoder: Component) -> &'static str {
    if text_encoder == Component::TextEncoder2 { "tokenizer_2" } else { "tokenizer" }
}

impl Model {
    /// Finds `model`: a diffusers folder, a single-file checkpoint, or the hub id (`owner/name`) of a folder in the local
    /// Hugging Face cache. Nothing is downloaded, no weight is read. What a single file does not tell and had to be
    /// assumed is said on standard error.
    ///
    /// # Errors
    /// One line that says what was expected.
    pub fn open(model: &str) -> Result<Self> {
        let path = Path::new(model);
        let named = |part: Option<&std::ffi::OsStr>| part.map_or("model".into(), |name| name.to_string_lossy().into());
        if path.is_file() {
            let file = SingleFile::open(path);
            let file = match path.extension() {
                Some(extension) if extension == "safetensors" => file?,
                _ => file.context("a diffusers folder or a single-file checkpoint (.safetensors) is expected")?,
            };
            let is_xl = file.is_xl();
            return Ok(Self { name: named(path.file_stem()), form: Form::File(Arc::new(file)), is_xl });
        }
        if path.is_dir() {
            let is_xl = folder::check(path)?;
            // `.` and `..` have no name of their own.
            let name = match path.file_name() {
                Some(name) => named(Some(name)),
                None => named(path.canonicalize()?.file_name()),
            };
            return Ok(Self { name, form: Form::Folder(path.to_owned()), is_xl });
        }
        let is_file_name = path.extension().is_some_and(|extension| extension == "safetensors" || extension == "ckpt");
        if hub::is_id(model) && !is_file_name {
            let folder = hub::cached(model).ok_or_else(|| {
                anyhow!(
                    "there is no folder {model}, and no model of that name in the local Hugging Face cache; if it is a hub \
                     id, fetch it with: hf download {model} --exclude '*.ckpt' '*.bin'"
                )
            })?;
            let is_xl = folder::check(&folder).with_context(|| format!("the cached snapshot of {model}"))?;
            return Ok(Self { name: model.to_owned(), form: Form::Folder(folder), is_xl });
        }
        bail!(
            "{model} does not exist; a diffusers folder is expected (one with unet/, vae/, text_encoder/, tokenizer/), \
             or a single-file checkpoint (.safetensors)"
        )
    }

    /// What to call it: its hub id, or the name of its folder or file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The diffusers folder, or the file.
    pub fn path(&self) -> &Path {
        match &self.form {
            Form::Folder(folder) => folder,
            Form::File(file) => file.path(),
        }
    }

    /// Whether it is a Stable Diffusion XL: two text encoders, and a UNet that is told sizes.
    pub fn is_xl(&self) -> bool {
        self.is_xl
    }

    /// The networks that a model of its kind has.
    pub fn components(&self) -> impl Iterator<Item = Component> + use<> {
        let is_xl = self.is_xl;
        Component::ALL.into_iter().filter(move |component| is_xl || *component != Component::TextEncoder2)
    }

    /// Its text encoders, one or two.
    pub fn text_encoders(&self) -> impl Iterator<Item = Component> + use<> {
        self.components().filter(|part| matches!(part, Component::TextEncoder | Component::TextEncoder2))
    }

    /// Whether an empty negative prompt stands for zeros rather than for the encoded empty text, as
    /// `force_zeros_for_empty_prompt` of `model_index.json` has it; diffusers' default for Stable Diffusion XL.
    pub fn zeros_for_empty_prompt(&self) -> Result<bool> {
        let index = self.index()?.unwrap_or_default();
        Ok(self.is_xl && index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(true))
    }

    /// The component's `config.json` as it stands, or as a single file's shapes tell it.
    pub fn config_json(&self, component: Component) -> Result<Value> {
        let model = match &self.form {
            Form::Folder(folder) => folder,
            Form::File(file) => return file.config_json(component),
        };
        let folder = model.join(component.folder());
        if !folder.is_dir() {
            bail!("{} has no {}: the folder {} is missing", model.display(), component.title(), component.folder());
        }
        read_json(&folder.join("config.json"))
    }

    fn config<T>(&self, component: Component, parse: impl FnOnce(&Value) -> Result<T>) -> Result<T> {
        let json = self.config_json(component)?;
        parse(&json).with_context(|| match &self.form {
            Form::Folder(folder) => folder.join(component.folder()).join("config.json").display().to_string(),
            Form::File(file) => format!("{}, by the shapes of its tensors", file.path().display()),
        })
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
        self.text_encoder_config_of(Component::TextEncoder)
    }

    /// `config.json` of one of the [`Model::text_encoders`].
    pub fn text_encoder_config_of(&self, component: Component) -> Result<TextEncoderConfig> {
        self.config(component, TextEncoderConfig::from_json)
    }

    /// `safety_checker/config.json`.
    pub fn safety_checker_config(&self) -> Result<SafetyCheckerConfig> {
        self.config(Component::SafetyChecker, SafetyCheckerConfig::from_json)
    }

    /// Whether it has the component at all.
    pub fn has(&self, component: Component) -> bool {
        match &self.form {
            Form::Folder(folder) => folder.join(component.folder()).join("config.json").is_file(),
            Form::File(file) => file.config_json(component).is_ok(),
        }
    }

    /// `scheduler/scheduler_config.json`, in which diffusers writes infinities that JSON does not have.
    pub fn scheduler_config(&self) -> Result<Value> {
        let path = match &self.form {
            Form::Folder(folder) => folder.join("scheduler/scheduler_config.json"),
            Form::File(file) => return Ok(file.scheduler_config()),
        };
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        parse_config(&text).with_context(|| format!("{} is not JSON", path.display()))
    }

    /// `model_index.json`, where there is one.
    pub(super) fn index(&self) -> Result<Option<Value>> {
        match &self.form {
            Form::Folder(folder) => read_json_if_there(&folder.join("model_index.json")),
            Form::File(_) => Ok(None),
        }
    }

    /// Writes the folders `tokenizer`, `tokenizer_2` where there are two, and `scheduler` of a diffusers model into `to`.
    pub(super) fn write_small_folders(&self, to: &Path) -> Result<()> {
        match &self.form {
            Form::Folder(folder) => self
                .text_encoders()
                .map(tokenizer_folder)
                .chain(["scheduler"])
                .try_for_each(|name| folder::copy_small_files(&folder.join(name), &to.join(name))),
            Form::File(file) => {
                let scheduler = serde_json::to_string_pretty(&file.scheduler_config())? + "\n";
                write_bytes(&to.join("scheduler/scheduler_config.json"), scheduler.as_bytes())?;
                self.text_encoders().try_for_each(|component| {
                    let folder = to.join(tokenizer_folder(component));
                    let mut files = file.tokenizer_files(component)?.into_iter();
                    files.try_for_each(|(name, text)| write_bytes(&folder.join(name), text.as_bytes()))
                })
            }
        }
    }

    /// The tokenizer of the first text encoder, see [`Model::tokenizer_of`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer_of(Component::TextEncoder)
    }

    /// [`Model::tokenizer_of`], but none where a folder has no tokenizer for it.
    pub fn tokenizer_if_there(&self, component: Component) -> Result<Option<Tokenizer>> {
        let missing = |folder: &Path| !folder.join(tokenizer_folder(component)).is_dir();
        match &self.form {
            Form::Folder(folder) if missing(folder) => Ok(None),
            _ => self.tokenizer_of(component).map(Some),
        }
    }

    /// The tokenizer of one of the [`Model::text_encoders`], checked against the network that reads its ids.
    pub fn tokenizer_of(&self, component: Component) -> Result<Tokenizer> {
        let (tokenizer, place) = match &self.form {
            Form::Folder(folder) => {
                let folder = folder.join(tokenizer_folder(component));
                (Tokenizer::open(&folder)?, folder)
            }
            Form::File(file) => (file.tokenizer(component)?, file.path().to_owned()),
        };
        let config = self.text_encoder_config_of(component)?;
        if tokenizer.vocabulary_size() > config.vocab_size || tokenizer.length() as i64 > config.positions {
            bail!(
                "{}: {} tokens of texts of {}, but the text encoder knows {} (`vocab_size`) and reads {} \
                 (`max_position_embeddings`)",
                place.display(),
                tokenizer.vocabulary_size(),
                tokenizer.length(),
                config.vocab_size,
                config.positions
            );
        }
        Ok(tokenizer)
    }

    /// The tokenizer for Apple's Swift package, which has one for all text encoders.
    pub fn tokenizer_for_swift(&self) -> Result<SwiftTokenizer> {
        match &self.form {
            Form::Folder(folder) => {
                let mut first = tokenizer::for_swift(&folder.join(tokenizer_folder(Component::TextEncoder)))?;
                // What only the second one knows.
                let known: Vec<String> = self.tokenizer()?.added().map(|(token, _)| token.to_owned()).collect();
                if let (true, Some(second)) = (self.is_xl, self.tokenizer_if_there(Component::TextEncoder2)?) {
                    let others =
                        second.added().map(|(token, _)| token).filter(|token| known.iter().all(|k| k != token));
                    first.unreachable.extend(others.map(str::to_owned));
                }
                Ok(first)
            }
            Form::File(file) => {
                let [vocabulary, merges, ..] = file.tokenizer_files(Component::TextEncoder)?;
                Ok(SwiftTokenizer { files: [vocabulary, merges], unreachable: Vec::new() })
            }
        }
    }

    /// The parameters that the component's configuration asks for.
    pub fn parameters(&self, component: Component) -> Result<Vec<Parameter>> {
        Ok(match component {
            Component::Unet => self.unet_config()?.parameters(),
            Component::Autoencoder => self.autoencoder_config()?.parameters(),
            Component::TextEncoder | Component::TextEncoder2 => self.text_encoder_config_of(component)?.parameters(),
            Component::SafetyChecker => self.safety_checker_config()?.parameters(),
        })
    }

    /// The weights of a component under today's names, converted to `kind` on `device`: all that its configuration
    /// asks for, and nothing else.
    ///
    /// # Errors
    /// One line naming tensor and file: missing, unexpected, of another shape, not floating-point; a damaged file; only
    /// pickles; a single file without this component.
    pub fn weights(&self, component: Component, kind: Kind, device: Device) -> Result<Weights> {
        self.stored(component)?.read(kind, device)
    }

    /// Checks names, shapes and types of a component's files against its configuration without reading a weight.
    pub fn check(&self, component: Component) -> Result<()> {
        self.stored(component).map(|_| ())
    }

    /// Where the component's weights lie, checked as [`Model::weights`] does: to read one at a time.
    pub fn stored(&self, component: Component) -> Result<Stored> {
        let parameters = self.parameters(component)?;
        let folder = match &self.form {
            Form::Folder(folder) => folder.join(component.folder()),
            Form::File(file) => return file.stored(component, &parameters),
        };
        let files = folder::weight_files(&folder, component)?;
        let files = files.iter().map(|path| TensorFile::open(path).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let mut places = Vec::new();
        for (file, tensors) in files.iter().enumerate() {
            for tensor in tensors.names() {
                let parameter = names::today(component, &tensor);
                places.extend(parameter.map(|parameter| Place {
                    parameter,
                    file,
                    tensor,
                    part: None,
                    transposed: false,
                }));
            }
        }
        Stored::new(component, Origin::ConfigJson, &parameters, files, places)
    }
}
