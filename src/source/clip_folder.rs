//! The folder of a whole CLIP as transformers saves it: `config.json`, `model.safetensors`, a tokenizer, and how pictures
//! are made ready.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::{Device, Kind};

use super::stored::{Origin, Place, Stored};
use super::{Network, Tokenizer, folder, hub, names};
use crate::files::TensorFile;
use crate::files::json::{read_json, read_json_if_there};
use crate::networks::clip_model::ClipConfig;
use crate::ops::Weights;

/// What transformers calls the file on how pictures are made ready: alone, and (since version 5) with the rest of the
/// processor, under this key.
const PREPROCESSORS: [(&str, Option<&str>); 2] =
    [("preprocessor_config.json", None), ("processor_config.json", Some("image_processor"))];

/// A CLIP on disk.
pub struct ClipFolder {
    path: PathBuf,
    pub config: ClipConfig,
    stored: Stored,
}

impl ClipFolder {
    /// Finds `clip`, a folder or the hub id (`owner/name` or `owner/name@revision`) of one in the local Hugging Face cache,
    /// and checks its configuration and the names, shapes and types of its tensors. No weight is read.
    ///
    /// # Errors
    /// One line that says what was expected, or what it is instead.
    pub fn open(clip: &str) -> Result<Self> {
        let path = Path::new(clip);
        if path.is_dir() {
            return Self::of(path);
        }
        ensure!(
            !path.exists(),
            "{clip} is a file; the folder of a CLIP is expected, with config.json and model.safetensors"
        );
        let (id, revision) = hub::split(clip);
        if hub::is_id(id)
            && let Some(snapshot) = hub::cached(id, revision, |snapshot| Self::of(snapshot).map(drop))?
        {
            return Self::of(&snapshot).with_context(|| format!("the cached snapshot of {clip}"));
        }
        bail!(
            "the CLIP {clip} does not exist; a folder that transformers saved a CLIPModel in is expected, or the id of one \
             in the local Hugging Face cache"
        )
    }

    fn of(path: &Path) -> Result<Self> {
        let shown = path.display();
        if let Some(what) = other_folder(path) {
            bail!("{shown} {what}; the folder of a CLIP (transformers' CLIPModel) is expected");
        }
        let json_path = path.join("config.json");
        let json = read_json(&json_path)?;
        if let Some(what) = other_model(&json) {
            bail!("{shown} {what}: a CLIPModel of transformers is expected, as openai/clip-vit-large-patch14 is one");
        }
        let config = ClipConfig::from_json(&json).with_context(|| json_path.display().to_string())?;
        let stored = stored(path, &config)?;
        Ok(Self { path: path.to_owned(), config, stored })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All its parameters, converted to `kind`, on `device`.
    ///
    /// # Errors
    /// A file is damaged; the device has no memory left.
    pub fn weights(&self, kind: Kind, device: Device) -> Result<Weights> {
        self.stored.read(kind, device)
    }

    /// Its tokenizer, checked against the network that reads its ids.
    ///
    /// # Errors
    /// It is missing or damaged, or has more tokens than the network knows.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::open(&self.path)?.fitting(&self.config.text, &self.path)
    }

    /// How pictures are made ready: transformers' configuration of an image processor, and the file that has it.
    ///
    /// # Errors
    /// There is none, or it is not JSON.
    pub fn preprocessor(&self) -> Result<(PathBuf, Value)> {
        for (name, within) in PREPROCESSORS {
            let path = self.path.join(name);
            let Some(json) = read_json_if_there(&path)? else { continue };
            match within.map_or(Some(&json), |key| json.get(key)) {
                Some(found) => return Ok((path, found.clone())),
                None => continue,
            }
        }
        bail!(
            "{} has no {}, which says how pictures are made ready for it: copy it from where the CLIP comes from",
            self.path.display(),
            PREPROCESSORS[0].0
        )
    }
}

/// Where the parameters of a CLIP lie.
fn stored(path: &Path, config: &ClipConfig) -> Result<Stored> {
    let files = folder::weight_files(path, Network::Clip)?;
    let files = files.iter().map(|path| TensorFile::open(path).map(Arc::new)).collect::<Result<Vec<_>>>()?;
    let mut places = Vec::new();
    for (file, tensors) in files.iter().enumerate() {
        for tensor in tensors.unscaled_names() {
            let parameter = names::today(Network::Clip, &tensor);
            places.extend(parameter.map(|parameter| Place { parameter, file, tensor, part: None, transposed: false }));
        }
    }
    Stored::new(Network::Clip, Origin::ConfigJson, &config.parameters(), files, places)
}

/// What a folder without a CLIP's `config.json` is.
fn other_folder(path: &Path) -> Option<&'static str> {
    let others = [
        ("model_index.json", "is a diffusers folder, a model that draws"),
        ("open_clip_config.json", "has the files of OpenCLIP's own layout, without those of transformers"),
    ];
    if path.join("config.json").is_file() {
        return None;
    }
    let other = others.into_iter().find(|(name, _)| path.join(name).is_file());
    Some(other.map_or("has no config.json", |(_, what)| what))
}

/// What a model is that is not a CLIP, by its `config.json`.
fn other_model(json: &Value) -> Option<String> {
    let class = json.pointer("/architectures/0").and_then(Value::as_str);
    let kind = json.get("model_type").and_then(Value::as_str);
    let named = || match (class, kind) {
        (Some(class), _) => format!("a {class}"),
        (None, Some(kind)) => format!("of `model_type` \"{kind}\""),
        (None, None) => "of a kind that its config.json does not name".to_owned(),
    };
    match (kind, class) {
        (Some("clip_text_model" | "clip_vision_model"), _) => Some(format!("is {}, half of a CLIP", named())),
        (Some("clip"), None | Some("CLIPModel")) => None,
        // Others keep a configuration of both halves, and the weights of one.
        (Some("clip"), Some(_)) => Some(format!("is {}, not a whole CLIP", named())),
        _ => Some(format!("is {}, not a CLIP", named())),
    }
}
