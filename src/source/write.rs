//! Writing diffusers folders that diffusers itself loads.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{Component, Model, parts};
use crate::files::{write_bytes, write_folder, write_safetensors};
use crate::ops::Weights;
use crate::terminal::note;

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
    write_safetensors(&folder.join(component.weight_file()), tensors, Some(kind), &metadata)?;
    Ok(())
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
/// where given, else those of `from`, all as `kind`. Safety checker and feature extractor of a plain pipeline are not
/// copied: the index says so, and diffusers then runs without. Other parts of other pipelines are, as they are.
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
    let (index, others) = index(from)?;
    if let Some(folder) = from.folder() {
        others.iter().try_for_each(|name| parts::copy(folder, name, part))?;
    }
    let index = serde_json::to_string_pretty(&index)? + "\n";
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

/// `model_index.json` of the copy, and the other parts of the pipeline, which are copied as they are.
///
/// diffusers runs a plain pipeline without safety checker, feature extractor and image encoder: there the index says so and
/// they are not copied. A pipeline of another class needs all parts of its index. Where their folders are there they are
/// copied; where one is not, such a class cannot be loaded, and the copy is a plain pipeline of the networks that it has.
fn index(from: &Model) -> Result<(Value, Vec<String>)> {
    const PLAIN: [&str; 6] = [
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ];
    let mut index = from.index()?.unwrap_or_else(|| json!({}));
    let index_object = index.as_object_mut().context("model_index.json is not an object")?;
    let scheduler = from.scheduler_config()?.get("_class_name").cloned().unwrap_or_else(|| json!("PNDMScheduler"));
    let plain = if from.is_xl() { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    let mut entries = vec![
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
    for (key, value) in &entries {
        let entry = index_object.entry(*key).or_insert_with(|| value.clone());
        // A pipeline may be without a part that a copy has: null, null.
        if !is_part(entry) || (*key == "scheduler" && from.changes_scheduler()) {
            *entry = value.clone();
        }
    }
    let others: Vec<String> = index_object
        .iter()
        .filter(|(key, value)| is_part(value) && entries.iter().all(|(own, _)| own != key))
        .map(|(key, _)| key.clone())
        .collect();
    // They become names of folders.
    if let Some(name) = others.iter().find(|name| !is_plain_name(name)) {
        bail!("{}/model_index.json has the part `{name}`, which is not the name of a folder", from.path().display());
    }
    let class = index_object.get("_class_name").and_then(Value::as_str).unwrap_or(plain).to_owned();
    let (there, missing): (Vec<String>, Vec<String>) =
        others.iter().cloned().partition(|name| from.folder().is_some_and(|folder| folder.join(name).is_dir()));
    // Pipelines run without these, the feature extractor where it is the safety checker's.
    let checks = others.iter().any(|name| name == "safety_checker");
    let optional =
        |name: &str| name == "safety_checker" || name == "image_encoder" || (name == "feature_extractor" && checks);
    let is_plain = PLAIN.contains(&class.as_str());
    if !is_plain && missing.iter().all(|name| optional(name)) {
        for name in missing {
            index_object.insert(name, json!([null, null]));
        }
        return Ok((index, there));
    }
    if !is_plain {
        note(format_args!(
            "{} is of {class} and lacks {}: the copy is a {plain}",
            from.path().display(),
            missing.join(", ")
        ));
        index_object.insert("_class_name".into(), json!(plain));
    } else {
        index_object.insert("_class_name".into(), json!(class));
    }
    for key in others.iter().map(String::as_str).chain(["feature_extractor", "image_encoder"]) {
        index_object.insert(key.into(), json!([null, null]));
    }
    // A plain pipeline takes no others; a null one of another name would be a stranger to it.
    index_object.retain(|key, value| is_known_to_plain(key) || !(is_part(value) || is_null_part(value)));
    if !from.is_xl() {
        index_object.insert("safety_checker".into(), json!([null, null]));
        index_object.insert("requires_safety_checker".into(), json!(false));
    }
    Ok((index, Vec::new()))
}

fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(only)), None) if only == name)
}

/// Whether an entry of an index is a part: library and class.
fn is_part(value: &Value) -> bool {
    value.as_array().is_some_and(|pair| pair.len() == 2 && pair.iter().all(Value::is_string))
}

fn is_null_part(value: &Value) -> bool {
    value.as_array().is_some_and(|pair| pair.len() == 2 && pair.iter().all(Value::is_null))
}

fn is_known_to_plain(key: &str) -> bool {
    [
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "unet",
        "vae",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    .contains(&key)
}
