//! Writing diffusers folders that diffusers itself loads.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::files::{write_bytes, write_folder, write_safetensors};
use super::{Component, Model};
use crate::ops::Weights;

/// Writes `folder/config.json` and the component's weight file, its weights as `kind`.
///
/// # Errors
/// One line when the disk is full or the folder cannot be written.
pub fn write_component(
    folder: &Path,
    component: Component,
    config: &Value,
    weights: &Weights,
    kind: Kind,
) -> Result<()> {
    let text = serde_json::to_string_pretty(config)? + "\n";
    write_bytes(&folder.join("config.json"), text.as_bytes())?;
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let tensors = weights.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_safetensors(&folder.join(component.weight_file()), tensors, Some(kind), &metadata)
}

/// Writes a whole model to the new folder `to`: see [`fill_model`].
///
/// # Errors
/// `to` exists; a component of `from` cannot be read; the disk is full. Nothing is left over.
pub fn copy_model(from: &Model, to: &Path, replace: &[(Component, &Weights)], kind: Kind) -> Result<()> {
    if to.exists() {
        bail!("{} exists already; nothing was written", to.display());
    }
    write_folder(to, |part| fill_model(from, part, replace, kind))
}

/// Writes a whole model into the folder `part`: configurations, tokenizer and scheduler of `from`, the weights of `replace`
/// where given, else those of `from`, all as `kind`. The safety checker and feature extractor are not copied: the index
/// says so, and diffusers then runs without.
///
/// # Errors
/// A component of `from` cannot be read; the disk is full.
pub fn fill_model(from: &Model, part: &Path, replace: &[(Component, &Weights)], kind: Kind) -> Result<()> {
    for component in from.components() {
        let read;
        let weights = match replace.iter().find(|(replaced, _)| *replaced == component) {
            Some((_, weights)) => *weights,
            None => {
                read = from.weights(component, kind, Device::Cpu)?;
                &read
            }
        };
        let config = loaded_as_fp32(component, from.config_json(component)?);
        write_component(&part.join(component.folder()), component, &config, weights, kind)?;
    }
    from.write_small_folders(part)?;
    let index = serde_json::to_string_pretty(&index(from)?)? + "\n";
    write_bytes(&part.join("model_index.json"), index.as_bytes())
}

/// transformers 5 loads a text encoder as the type that its config.json names, while diffusers loads everything else as
/// fp32 unless it is told otherwise: with fp32 here the two agree, whatever the files hold.
fn loaded_as_fp32(component: Component, mut config: Value) -> Value {
    let is_text = matches!(component, Component::TextEncoder | Component::TextEncoder2);
    if let (true, Some(config)) = (is_text, config.as_object_mut()) {
        // `dtype` since transformers 5.
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = config.get_mut(key) {
                *value = json!("float32");
            }
        }
    }
    config
}

/// The model's own index without what is not copied; that of a plain Stable Diffusion of its kind when it has none.
fn index(from: &Model) -> Result<Value> {
    let mut index = from.index()?.unwrap_or_else(|| json!({}));
    let scheduler = from.scheduler_config()?.get("_class_name").cloned().unwrap_or_else(|| json!("PNDMScheduler"));
    let class = if from.is_xl() { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    let mut entries = vec![
        ("_class_name", json!(class)),
        ("scheduler", json!(["diffusers", scheduler])),
        ("text_encoder", json!(["transformers", "CLIPTextModel"])),
        ("tokenizer", json!(["transformers", "CLIPTokenizer"])),
        ("unet", json!(["diffusers", "UNet2DConditionModel"])),
        ("vae", json!(["diffusers", "AutoencoderKL"])),
    ];
    if from.is_xl() {
        entries.push(("text_encoder_2", json!(["transformers", "CLIPTextModelWithProjection"])));
        entries.push(("tokenizer_2", json!(["transformers", "CLIPTokenizer"])));
    }
    let index_object = index.as_object_mut().context("model_index.json is not an object")?;
    for (key, value) in entries {
        index_object.entry(key).or_insert(value);
    }
    for key in ["feature_extractor", "image_encoder"] {
        index_object.insert(key.into(), json!([null, null]));
    }
    if !from.is_xl() {
        index_object.insert("safety_checker".into(), json!([null, null]));
        index_object.insert("requires_safety_checker".into(), json!(false));
    }
    Ok(index)
}
