//! Which model this is, by its content: the same wherever it lies, another after any training.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::stored::{both_ends, identify};
use super::{Component, Model};
use crate::files::hex;
use crate::ops::Weights;

/// The names that [`goes_with`] gives.
pub const TEXT_ENCODERS: &str = "text_encoders";
pub const PREDICTION: &str = "prediction_type";

/// A hash, in hexadecimal, of what the model draws with: the configurations and weights of its networks, its scheduler and
/// its tokenizer.
/// Of each tensor the two ends are read, which takes a fraction of a second.
///
/// # Errors
/// A part of the model cannot be read.
pub fn identity(model: &Model) -> Result<String> {
    let mut hash = Sha256::new();
    for component in model.components().filter(|component| *component != Component::SafetyChecker) {
        hash.update(component.folder());
        network(model, component, &mut hash)?;
    }
    hash.update(described(&model.scheduler_config()?));
    model.tokenizer_for_swift()?.files.iter().for_each(|(_, text)| hash.update(text));
    Ok(hex(&hash.finalize()))
}

/// The identifier of a model's weights, which its packages carry: the same for all networks of a model, another for another
/// model of the same name. It is that of the model's own networks with the LoRAs that are merged in, whatever else
/// options replace, and of those that can be read.
pub fn model_id(model: &Model) -> String {
    let mut hash = Sha256::new();
    let model = model.without_options();
    for component in model.components().filter(|component| model.has(*component)) {
        let mut own = Sha256::new();
        if network(&model, component, &mut own).is_ok() {
            hash.update(component.folder());
            hash.update(own.finalize());
        }
    }
    hex(&hash.finalize()[..16])
}

/// The identifier of the autoencoder that a model is used with, which the packages of its two halves carry; empty where it
/// cannot be read.
pub fn autoencoder_id(model: &Model) -> String {
    let mut hash = Sha256::new();
    match network(model, Component::Autoencoder, &mut hash) {
        Ok(()) => hex(&hash.finalize()[..16]),
        Err(_) => String::new(),
    }
}

/// What the UNet of a model was trained to go with, by names that palettes of it keep among their metadata: the text encoders
/// by their content, and what it predicts. `learned` has the weights of networks that are to take the place of the model's.
///
/// # Errors
/// A part of the model cannot be read.
pub fn goes_with(model: &Model, learned: &BTreeMap<Component, Weights>) -> Result<BTreeMap<String, String>> {
    let mut hash = Sha256::new();
    // A file may hold a UNet alone: whatever text encoders it is put with are its own.
    let text_encoders: Vec<Component> = model.text_encoders().filter(|component| model.has(*component)).collect();
    for component in &text_encoders {
        match learned.get(component) {
            None => network(model, *component, &mut hash)?,
            Some(weights) => {
                hash.update(described(&model.config_json(*component)?));
                for (name, weight) in weights.iter().collect::<BTreeMap<_, _>>() {
                    identify(&mut hash, name, &weight.size(), both_ends(weight)?)?;
                }
            }
        }
    }
    let scheduler = model.scheduler_config()?;
    let prediction = scheduler.get("prediction_type").and_then(Value::as_str).unwrap_or("epsilon");
    let mut found = BTreeMap::from([(PREDICTION.to_owned(), prediction.to_owned())]);
    if !text_encoders.is_empty() {
        found.insert(TEXT_ENCODERS.to_owned(), hex(&hash.finalize()[..16]));
    }
    Ok(found)
}

/// Adds a network's configuration and weights to a hash.
fn network(model: &Model, component: Component, hash: &mut Sha256) -> Result<()> {
    hash.update(described(&model.config_json(component)?));
    model.stored(component)?.identify(hash)
}

/// A configuration as text, without what says who wrote it and where it came from.
pub fn described(json: &Value) -> String {
    let mut json = json.clone();
    if let Some(object) = json.as_object_mut() {
        for key in ["_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype"] {
            object.remove(key);
        }
    }
    json.to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::{Device, Kind};

    use super::*;
    use crate::source::write::copy_model;

    #[test]
    fn a_model_is_known_wherever_it_lies_and_another_after_a_change() {
        let original = Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pipeline/model")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let copy = |name: &str, change: &dyn Fn(&mut crate::ops::Weights)| {
            let mut weights = original.weights(Component::Unet, Kind::Float, Device::Cpu).unwrap();
            change(&mut weights);
            let to = folder.path().join(name);
            copy_model(&original, Path::new(&to), &[(Component::Unet, &weights)], Kind::Float).unwrap();
            identity(&Model::open(to.to_str().unwrap()).unwrap()).unwrap()
        };
        let one = copy("one", &|_| {});
        assert_eq!(copy("two", &|_| {}), one);
        // Saved by another version of the tools, in another type (of values that fp16 holds).
        let mut halves = original.weights(Component::Unet, Kind::Half, Device::Cpu).unwrap();
        let saved = |name: &str, weights: &crate::ops::Weights, kind| {
            let to = folder.path().join(name);
            copy_model(&original, &to, &[(Component::Unet, weights)], kind).unwrap();
            let config = to.join("unet/config.json");
            let text = std::fs::read_to_string(&config).unwrap();
            std::fs::write(&config, text.replacen('{', "{\"_name_or_path\": \"elsewhere\",", 1)).unwrap();
            model_id(&Model::open(to.to_str().unwrap()).unwrap())
        };
        let half = saved("half", &halves, Kind::Half);
        halves.values_mut().for_each(|weight| *weight = weight.to_kind(Kind::Float));
        assert_eq!(saved("float", &halves, Kind::Float), half);
        let changed = copy("three", &|weights| {
            let bias = weights.get_mut("conv_out.bias").unwrap();
            *bias = &*bias + 0.01;
        });
        assert_ne!(changed, one);
        let scheduler = folder.path().join("two/scheduler/scheduler_config.json");
        let text = std::fs::read_to_string(&scheduler).unwrap().replace("epsilon", "v_prediction");
        let text = text.replacen('{', "{\"rescale_betas_zero_snr\": true,", 1);
        std::fs::write(&scheduler, text).unwrap();
        let two = Model::open(folder.path().join("two").to_str().unwrap()).unwrap();
        assert_ne!(identity(&two).unwrap(), one);
    }
}
