//! The file of a LoRA, read without a model: its tensors by layer and part, checked for values that nothing could be made of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::adapter::Adapters;
use super::keys::{Layout, Part, key, stranger};
use super::place;
use crate::files::{TensorFile, is_floating};

/// The tensors of a layer: their names by part.
pub type Parts = BTreeMap<Part, String>;

/// The file of a LoRA.
pub struct LoraFile {
    pub tensors: Arc<TensorFile>,
    pub layouts: BTreeSet<Layout>,
    /// By the layer's name in the file.
    pub layers: BTreeMap<String, Parts>,
    pub adapters: Adapters,
    /// Tensors that hold nothing but zeros.
    pub zeros: BTreeSet<String>,
}

impl LoraFile {
    /// Finds the LoRA `path` and reads all of its tensors once.
    ///
    /// # Errors
    /// One line with file and tensor: it does not exist, is a pickle, is empty, has a tensor that no LoRA has, has one twice,
    /// or one that holds whole numbers or values that are not finite.
    pub fn open(path: &str) -> Result<Self> {
        let tensors = TensorFile::open(&place::find(path)?)?;
        let (mut layers, mut layouts, mut zeros) = (BTreeMap::<String, Parts>::new(), BTreeSet::new(), BTreeSet::new());
        let shown = tensors.path().display().to_string();
        let names = tensors.names();
        ensure!(!names.is_empty(), "{shown} is empty: it has no tensors, and so nothing to merge");
        let is_lora = names.iter().any(|name| key(name).is_some());
        for name in names {
            let Some(found) = key(&name) else {
                ensure!(is_lora, "{shown} is not a LoRA: it has `{name}`{}", stranger(&name));
                bail!("{shown}: the tensor `{name}` cannot be merged: it has a name{}", stranger(&name));
            };
            let kind = tensors.kind(&name)?;
            let number = [Part::Alpha, Part::Scalar].contains(&found.part);
            if !is_floating(kind) && !number {
                bail!("{shown}: tensor `{name}` holds {kind:?} numbers; floating-point ones are expected");
            }
            let tensor = tensors.tensor(&name)?.f_to_kind(Kind::Float)?;
            ensure!(!number || tensor.numel() == 1, "{shown}: tensor `{name}` has {:?}, not one number", tensor.size());
            if !finite(&tensor)? {
                bail!(
                    "{shown}: tensor `{name}` holds values that are not finite (NaN or infinite): the LoRA is damaged"
                );
            }
            if tensor.f_count_nonzero(None)?.f_int64_value(&[])? == 0 {
                zeros.insert(name.clone());
            }
            layouts.insert(found.layout);
            if let Some(other) = layers.entry(found.module).or_default().insert(found.part, name.clone()) {
                bail!("{shown}: `{name}` and `{other}` are the same part of one layer");
            }
        }
        let adapters = Adapters::of(tensors.path(), &tensors.metadata())?;
        if layouts.len() > 1 {
            // α's name is kohya's in everybody's files.
            let alone = layers.values().all(|parts| {
                parts.iter().all(|(part, name)| {
                    *part == Part::Alpha || key(name).is_some_and(|key| key.layout != Layout::Kohya)
                })
            });
            if alone {
                layouts.remove(&Layout::Kohya);
            }
        }
        Ok(Self { tensors: Arc::new(tensors), layouts, layers, adapters, zeros })
    }

    pub fn path(&self) -> &Path {
        self.tensors.path()
    }

    /// Reads a tensor as fp32.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.tensors.tensor(name)?.f_to_kind(Kind::Float)?)
    }

    pub fn shape(&self, name: &str) -> Vec<i64> {
        self.tensors.shape(name).unwrap_or_default()
    }

    /// The number that a part of a layer is.
    pub fn number(&self, parts: &Parts, part: Part) -> Result<Option<f64>> {
        let read = |name: &String| Ok(self.tensor(name)?.f_view([-1])?.f_double_value(&[0])?);
        parts.get(&part).map(read).transpose()
    }

    /// The classes in which cloneofsimo's tools looked for the layers of `network`, as the header has them.
    pub fn targets(&self, network: &str) -> Result<Vec<String>> {
        let usual: &[&str] =
            if network == "unet" { &["CrossAttention", "Attention", "GEGLU"] } else { &["CLIPAttention"] };
        let Some(text) = self.tensors.metadata().remove(network) else {
            return Ok(usual.iter().map(|class| class.to_string()).collect());
        };
        let list: Option<Vec<String>> = serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|json| json.as_array()?.iter().map(|class| class.as_str().map(str::to_owned)).collect());
        list.with_context(|| format!("{}: `{network}` of its header is not a list of classes", self.path().display()))
    }

    /// What it is called: the name of its file, or of its folder where that is the same for all.
    pub fn name(&self) -> String {
        let path = self.path();
        let generic = |stem: &str| ["pytorch_lora_weights", "adapter_model"].contains(&stem);
        let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let folder =
            || path.canonicalize().ok().and_then(|path| path.parent().map(PathBuf::from)).as_deref().and_then(stem);
        let own = stem(path).filter(|stem| !generic(stem));
        own.or_else(folder).unwrap_or_else(|| "lora".to_owned())
    }
}

/// Whether no value is NaN or infinite.
pub fn finite(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
