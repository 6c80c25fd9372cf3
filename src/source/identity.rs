//! Which model this is, by its content: the same wherever it lies, another after any training.

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::{Component, Model};
use crate::files::hex;

/// A hash, in hexadecimal, of what the model draws with: the configurations and weights of its networks, and its scheduler.
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
    hash.update(serde_json::to_string(&model.scheduler_config()?)?);
    Ok(hex(&hash.finalize()))
}

/// The identifier of a model's weights, which its packages carry: the same for all networks of a model, another for another
/// model of the same name. It is that of the model's own networks, whatever options replace, and of those that can be read.
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

/// Adds a network's configuration and weights to a hash.
fn network(model: &Model, component: Component, hash: &mut Sha256) -> Result<()> {
    hash.update(serde_json::to_string(&model.config_json(component)?)?);
    model.stored(component)?.identify(hash)
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
