//! A model on disk, a diffusers folder or a single file: its configurations, and its weights under today's names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use tch::{Device, Kind};

use super::ldm::Layout;
use super::lora::{Changes, Lora, Modules, Target};
use super::misused::Misused;
use super::options::ModelOptions;
use super::single_file::SingleFile;
use super::stored::{Origin, Place, Stored};
use super::vae::Vae;
use super::{Component, SwiftTokenizer, Tokenizer, folder, hub, parts, tokenizer};
use crate::diffusion::{config_text, parse_config};
use crate::files::json::{not_json, read_json, read_json_if_there, read_text};
use crate::files::{TensorFile, write_bytes};
use crate::networks::autoencoder::AutoencoderConfig;
use crate::networks::safety_checker::SafetyCheckerConfig;
use crate::networks::text_encoder::TextEncoderConfig;
use crate::networks::unet::UnetConfig;
use crate::ops::{Parameter, Weights};
use crate::terminal::note_once;

/// A Stable Diffusion model on disk.
#[derive(Clone)]
pub struct Model {
    name: String,
    form: Form,
    /// Of Stable Diffusion XL, with two text encoders.
    is_xl: bool,
    /// In place of its own autoencoder.
    vae: Option<Vae>,
    /// Merged into its weights, in this order.
    loras: Vec<Arc<Lora>>,
    options: ModelOptions,
}

#[derive(Clone)]
enum Form {
    /// A diffusers folder.
    Folder(PathBuf),
    /// A single-file checkpoint.
    File(Arc<SingleFile>),
}

/// Where a component's configuration and weights are.
enum At<'m> {
    Folder(PathBuf),
    File(&'m Arc<SingleFile>),
}

/// The folder of a text encoder's tokenizer.
fn tokenizer_folder(text_encoder: Component) -> &'static str {
    if text_encoder == Component::TextEncoder2 { "tokenizer_2" } else { "tokenizer" }
}

impl Model {
    /// [`Model::open_with`] without options.
    ///
    /// # Errors
    /// As there.
    pub fn open(model: &str) -> Result<Self> {
        Self::open_with(model, &ModelOptions::default())
    }

    /// Finds `model`: a diffusers folder, a single-file checkpoint, or the hub id (`owner/name` or `owner/name@revision`)
    /// of a folder in the local Hugging Face cache. Nothing is downloaded, no weight is read. What a single file does not
    /// tell and had to be assumed is said on standard error.
    ///
    /// # Errors
    /// One line that says what was expected.
    pub fn open_with(model: &str, options: &ModelOptions) -> Result<Self> {
        let (name, form, is_xl) = Self::find(model, options)?;
        if let Form::Folder(folder) = &form {
            folder::other_pipeline(folder, is_xl)?.iter().for_each(note_once);
        }
        let mut model = Self { name, form, is_xl, vae: None, loras: Vec::new(), options: options.clone() };
        if let Some(vae) = &options.vae {
            let own = model.has(Component::Autoencoder).then(|| model.autoencoder_config().ok()).flatten();
            model.vae = Some(Vae::open(vae, is_xl, own.map(|own| own.scaling_factor))?);
        }
        if !options.loras.is_empty() {
            let target = model.target()?;
            let open = |lora| Lora::open(lora, &target).map(Arc::new);
            model.loras = options.loras.iter().map(open).collect::<Result<_>>()?;
        }
        let name = model.name.clone();
        Ok(model.named(&name))
    }

    /// What LoRAs find of it.
    fn target(&self) -> Result<Target> {
        let parts = std::iter::once(Component::Unet).chain(self.text_encoders());
        let networks = parts.filter(|component| self.has(*component));
        let networks = networks.map(|component| Ok(Modules::new(component, &self.parameters(component)?)));
        Ok(Target {
            shown: self.path().display().to_string(),
            is_xl: self.is_xl,
            text_width: self.unet_config()?.cross_attention_dim,
            networks: networks.collect::<Result<_>>()?,
        })
    }

    /// Its name and form, and whether it is a Stable Diffusion XL.
    fn find(model: &str, options: &ModelOptions) -> Result<(String, Form, bool)> {
        let path = Path::new(model);
        let named = |part: Option<&std::ffi::OsStr>| part.map_or("model".into(), |name| name.to_string_lossy().into());
        let (is_file, is_dir) = (path.is_file(), path.is_dir());
        if let Some(revision) = options.revision.as_ref().filter(|_| is_file || is_dir) {
            let message = "is on this disk, and the revision";
            return Err(
                Misused(format!("{model} {message} {revision} is one of a hub id (owner/name): leave it out")).into()
            );
        }
        if is_file {
            let file = SingleFile::open(path, options);
            let file = match path.extension() {
                Some(extension) if extension == "safetensors" => file?,
                _ => file.context("a diffusers folder or a single-file checkpoint (.safetensors) is expected")?,
            };
            let is_xl = file.is_xl();
            return Ok((named(path.file_stem()), Form::File(Arc::new(file)), is_xl));
        }
        if is_dir {
            let is_xl = folder::check(path)?;
            // `.` and `..` have no name of their own.
            let name = match path.file_name() {
                Some(name) => named(Some(name)),
                None => named(path.canonicalize()?.file_name()),
            };
            return Ok((name, Form::Folder(path.to_owned()), is_xl));
        }
        let (id, within) = hub::split(model);
        let is_file_name = path.extension().is_some_and(|extension| extension == "safetensors" || extension == "ckpt");
        if hub::is_id(id) && !is_file_name {
            let revision = match (within, &options.revision) {
                (Some(within), Some(revision)) if within != revision => {
                    let message =
                        format!("{model} names one revision, and {revision} is given as another: leave one out");
                    return Err(Misused(message).into());
                }
                (within, revision) => within.or(revision.as_deref()),
            };
            let folder = hub::cached(id, revision, folder::check_whole)?.ok_or_else(|| {
                let fetched = revision.map_or(String::new(), |revision| format!(" --revision {revision}"));
                anyhow!(
                    "there is no folder {model}, and no model of that name in the local Hugging Face cache; if it is a hub \
                     id, fetch it with: hf download {id}{fetched} --exclude '*.ckpt' '*.bin'"
                )
            })?;
            let is_xl = folder::check(&folder).with_context(|| format!("the cached snapshot of {model}"))?;
            return Ok((id.to_owned(), Form::Folder(folder), is_xl));
        }
        bail!(
            "{model} does not exist; a diffusers folder is expected (one with unet/, vae/, text_encoder/, tokenizer/), \
             or a single-file checkpoint (.safetensors)"
        )
    }

    /// What to call it: its hub id, or the name of its folder or file; followed by the names of the LoRAs that are merged in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether options overrule what its scheduler's configuration says.
    pub fn scheduler_is_overruled(&self) -> bool {
        self.options.change_scheduler()
    }

    /// The model as its own files have it, but for the LoRAs that are merged in: these change its weights.
    pub fn without_options(&self) -> Self {
        Self { vae: None, options: ModelOptions::default(), ..self.clone() }
    }

    /// The same model, called `name`, and after its LoRAs.
    pub fn named(self, name: &str) -> Self {
        let suffixes = self.loras.iter().map(|lora| lora.suffix());
        Self { name: std::iter::once(name.to_owned()).chain(suffixes).collect(), ..self }
    }

    /// The LoRAs that are merged into its weights, with their weights, for what is made of it to say; `None` without any.
    pub fn loras_text(&self) -> Option<String> {
        let all: Vec<String> = self.loras.iter().map(|lora| lora.label()).filter(|label| !label.is_empty()).collect();
        (!all.is_empty()).then(|| all.join(", "))
    }

    /// The LoRAs that are merged into its weights.
    pub fn loras(&self) -> &[Arc<Lora>] {
        &self.loras
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
        let folder = match self.place(component) {
            At::Folder(folder) => folder,
            At::File(file) => return file.config_json(component),
        };
        if !folder.is_dir() {
            let (model, folder) = (self.path().display(), component.folder());
            bail!("{model} has no {}: the folder {folder} is missing", component.title());
        }
        read_json(&folder.join("config.json"))
    }

    /// Where a component is.
    fn place(&self, component: Component) -> At<'_> {
        match (&self.vae, &self.form) {
            (Some(Vae::Folder(folder)), _) if component == Component::Autoencoder => At::Folder(folder.clone()),
            (Some(Vae::File(file)), _) if component == Component::Autoencoder => At::File(file),
            (_, Form::Folder(folder)) => At::Folder(folder.join(component.folder())),
            (_, Form::File(file)) => At::File(file),
        }
    }

    /// The configuration of the model's own autoencoder, where another is used in its place.
    pub fn own_autoencoder_config(&self) -> Option<Result<AutoencoderConfig>> {
        self.vae.as_ref()?;
        let own = Self { vae: None, ..self.clone() };
        own.has(Component::Autoencoder).then(|| own.autoencoder_config())
    }

    fn config<T>(&self, component: Component, parse: impl FnOnce(&Value) -> Result<T>) -> Result<T> {
        let json = self.config_json(component)?;
        parse(&json).with_context(|| match self.place(component) {
            At::Folder(folder) => folder.join("config.json").display().to_string(),
            At::File(file) => format!("{}, by the shapes of its tensors", file.path().display()),
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
        match self.place(component) {
            At::Folder(folder) => folder.join("config.json").is_file(),
            At::File(file) => file.config_json(component).is_ok(),
        }
    }

    /// `scheduler/scheduler_config.json`, in which diffusers writes infinities that JSON does not have; with what the
    /// options overrule.
    pub fn scheduler_config(&self) -> Result<Value> {
        let config = match &self.form {
            Form::Folder(folder) => {
                let path = folder.join("scheduler/scheduler_config.json");
                if !path.exists() {
                    bail!(
                        "{} has no scheduler, which says how noise is mixed in: {} is missing",
                        folder.display(),
                        path.display()
                    );
                }
                let text = read_text(&path)?;
                let config = parse_config(&text).map_err(|error| not_json(&path, &text, error))?;
                self.of_the_index(config)?
            }
            Form::File(file) => file.scheduler_config(),
        };
        Ok(self.options.scheduler(config))
    }

    /// A scheduler's configuration with the class that `model_index.json` names, which diffusers makes, whichever class wrote
    /// the file.
    fn of_the_index(&self, mut config: Value) -> Result<Value> {
        let index = self.index()?.unwrap_or_default();
        let (Some(class), Some(keys)) = (index.pointer("/scheduler/1"), config.as_object_mut()) else {
            return Ok(config);
        };
        if class.is_string()
            && keys.get("_class_name") != Some(class)
            && let Some(other) = keys.insert("_class_name".into(), class.clone())
        {
            note_once(format_args!(
                "{}: model_index.json names the scheduler {class} and scheduler_config.json {other}: the first is used, as \
                 diffusers does",
                self.path().display()
            ));
        }
        Ok(config)
    }

    /// `model_index.json`, where there is one.
    pub(super) fn index(&self) -> Result<Option<Value>> {
        match &self.form {
            Form::Folder(folder) => read_json_if_there(&folder.join("model_index.json")),
            Form::File(_) => Ok(None),
        }
    }

    /// The small folders of a diffusers model that a copy takes over: tokenizers and scheduler.
    fn small_folders(&self) -> impl Iterator<Item = &'static str> {
        self.text_encoders().map(tokenizer_folder).chain(["scheduler"])
    }

    /// Checks that [`copy_model`](super::copy_model) may copy what it copies as it is: no link there leads out of the
    /// model's folder.
    ///
    /// # Errors
    /// A link that does, named; a folder that is missing.
    pub fn check_small_files(&self) -> Result<()> {
        let Form::Folder(folder) = &self.form else { return Ok(()) };
        self.small_folders().try_for_each(|name| parts::files_of(folder, name).map(drop))
    }

    /// Writes the folders `tokenizer`, `tokenizer_2` where there are two, and `scheduler` of a diffusers model into `to`.
    pub(super) fn write_small_folders(&self, to: &Path) -> Result<()> {
        match &self.form {
            Form::Folder(folder) => self.small_folders().try_for_each(|name| parts::copy(folder, name, to))?,
            Form::File(file) => self.text_encoders().try_for_each(|component| {
                let folder = to.join(tokenizer_folder(component));
                let mut files = file.tokenizer_files(component)?.into_iter();
                files.try_for_each(|(name, text)| write_bytes(&folder.join(name), text.as_bytes()))
            })?,
        }
        if matches!(self.form, Form::File(_)) || self.options.change_scheduler() {
            let scheduler = config_text(&self.scheduler_config()?);
            write_bytes(&to.join("scheduler/scheduler_config.json"), scheduler.as_bytes())?;
        }
        Ok(())
    }

    /// Whether its scheduler's configuration is not the file's.
    pub(super) fn changes_scheduler(&self) -> bool {
        self.options.change_scheduler()
    }

    /// Its diffusers folder, if it is one.
    pub(super) fn folder(&self) -> Option<&Path> {
        match &self.form {
            Form::Folder(folder) => Some(folder),
            Form::File(_) => None,
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
        tokenizer.fitting(&self.text_encoder_config_of(component)?, &place)
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

    /// Where the component's weights lie, checked as [`Model::weights`] does: to read one at a time, LoRAs merged in.
    pub fn stored(&self, component: Component) -> Result<Stored> {
        Ok(self.own_stored(component)?.with_changes(Changes::new(&self.loras, component)))
    }

    /// Where the component's weights lie, as the model's own files have them, without LoRAs.
    fn own_stored(&self, component: Component) -> Result<Stored> {
        let parameters = self.parameters(component)?;
        let folder = match self.place(component) {
            At::Folder(folder) => folder,
            At::File(file) => return file.stored(component, &parameters),
        };
        let files = folder::weight_files(&folder, component.into())?;
        let files = files.iter().map(|path| TensorFile::open(path).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = files.iter().flat_map(|file| file.names()).collect();
        // A file in latent-diffusion's names does as well.
        let layout = Layout::of(names.iter().map(String::as_str));
        let mut places = Vec::new();
        for (file, tensors) in files.iter().enumerate() {
            for tensor in tensors.unscaled_names() {
                let parameter = layout.renamed(component, &tensor);
                places.extend(parameter.map(|parameter| Place {
                    parameter,
                    file,
                    tensor,
                    part: None,
                    transposed: false,
                }));
            }
        }
        Stored::new(component.into(), Origin::ConfigJson, &parameters, files, places)
    }
}
