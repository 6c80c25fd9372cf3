//! Autoencoders that learn (`train.component = "autoencoder"`), by the real program.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::runs::{ROOT, bare_pictures, contents, ends, run, succeed};
use palettist::files::TensorFile;
use serde_json::Value;
use tch::Tensor;

/// A config for the autoencoder of the fixtures' tiny model, on pictures without captions.
fn config(folder: &Path) {
    bare_pictures(folder);
    let text = format!(
        r#"name = "tiny"
output_dir = "run"
[model]
pretrained_model_name_or_path = "{ROOT}/tests/fixtures/pipeline/model"
[data]
resolution = 32
train_data_dir = "pictures"
[train]
component = "autoencoder"
max_train_steps = 4
train_batch_size = 2
learning_rate = 1e-3
device = "cpu"
[palettize]
enabled = false
[checkpoint]
checkpointing_steps = 2
[export]
coreml = false
"#
    );
    fs::write(folder.join("tiny.toml"), text).unwrap();
}

/// Trains into a folder of this name; the autoencoder that comes out.
fn trained(folder: &Path, name: &str, changes: &[&str]) -> BTreeMap<String, Tensor> {
    let out = format!("output_dir={name}");
    let arguments = [&["train", "tiny.toml", out.as_str()][..], changes].concat();
    ends(folder, &arguments, 0, "");
    weights(&folder.join(name).join("model"))
}

/// Of the autoencoder in a model's folder.
fn weights(model: &Path) -> BTreeMap<String, Tensor> {
    let file = TensorFile::open(&model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect()
}

#[test]
fn all_of_it_learns_or_its_decoder_alone() {
    let folder = tempfile::tempdir().unwrap();
    config(folder.path());
    let before = weights(&Path::new(ROOT).join("tests/fixtures/pipeline/model"));
    let scaling = |model: &Path| {
        let config: Value = serde_json::from_slice(&fs::read(model.join("vae/config.json")).unwrap()).unwrap();
        config["scaling_factor"].clone()
    };
    let kept = scaling(&Path::new(ROOT).join("tests/fixtures/pipeline/model"));
    let changed = |weights: &BTreeMap<String, Tensor>, part: &str| -> (usize, usize) {
        let of_part: Vec<_> = weights.iter().filter(|(name, _)| name.starts_with(part)).collect();
        let changed = of_part.iter().filter(|(name, value)| !value.equal(&before[*name].to_kind(value.kind()))).count();
        (changed, of_part.len())
    };
    let whole = trained(folder.path(), "whole", &[]);
    let (encoder, decoder) = (changed(&whole, "encoder."), changed(&whole, "decoder."));
    assert!(encoder.0 * 10 > encoder.1 * 9 && decoder.0 * 10 > decoder.1 * 9, "{encoder:?} {decoder:?}");
    assert_ne!(scaling(&folder.path().join("whole/model")), kept);

    let alone = ["train.autoencoder.decoder_only=true", "train.autoencoder.latent_noise=0.3"];
    let half = trained(folder.path(), "half", &alone);
    assert_eq!([changed(&half, "encoder.").0, changed(&half, "quant_conv.").0], [0, 0]);
    let (decoder, quant) = (changed(&half, "decoder."), changed(&half, "post_quant_conv."));
    assert!(decoder.0 * 10 > decoder.1 * 9 && quant.0 == quant.1, "{decoder:?} {quant:?}");
    // Latents are what they were, so a UNet is told the same of them.
    assert_eq!(scaling(&folder.path().join("half/model")), kept);

    // Noise is drawn anew for each step, and makes another decoder.
    let quiet = trained(folder.path(), "quiet", &alone[..1]);
    assert!(!quiet["decoder.conv_in.weight"].equal(&half["decoder.conv_in.weight"]));
}

#[test]
fn a_decoder_that_resumes_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    config(folder.path());
    let alone = ["train.autoencoder.decoder_only=true", "train.autoencoder.latent_noise=0.3"];
    trained(folder.path(), "once", &alone);
    // The same steps, the last two of them resumed.
    trained(folder.path(), "twice", &alone);
    fs::remove_dir_all(folder.path().join("twice/checkpoints/step-000004")).unwrap();
    fs::remove_dir_all(folder.path().join("twice/model")).unwrap();
    fs::remove_file(folder.path().join("twice/finished.json")).unwrap();
    let out = ["train", "tiny.toml", "output_dir=twice"];
    ends(folder.path(), &[&out[..], &alone].concat(), 0, "");
    let model = |name: &str| contents(&folder.path().join(name).join("model"));
    assert!(model("once") == model("twice"));
    let state =
        |name: &str| TensorFile::open(&folder.path().join(name).join("checkpoints/step-000004/state.safetensors"));
    let (once, twice) = (state("once").unwrap(), state("twice").unwrap());
    for name in once.names() {
        assert!(once.tensor(&name).unwrap().equal(&twice.tensor(&name).unwrap()), "{name}");
    }
}

#[test]
fn check_says_what_learns_and_what_has_no_effect() {
    let folder = tempfile::tempdir().unwrap();
    config(folder.path());
    let check =
        |changes: &[&str]| run(folder.path(), &[&["check", "tiny.toml", "--no-estimate"][..], changes].concat());
    let told = succeed(check(&["train.autoencoder.decoder_only=true", "train.autoencoder.latent_noise=0.3"]));
    assert!(told.contains("the decoder alone learns: latents stay as they are"), "{told}");
    assert!(told.contains("latents get noise of up to 0.3 of their deviation"), "{told}");
    ends(
        folder.path(),
        &["check", "tiny.toml", "train.autoencoder.decoder_only=true", "model.train_from_scratch=true"],
        2,
        "`train.autoencoder.decoder_only` is true, but with model.train_from_scratch = true there is no encoder yet",
    );
    let told = succeed(check(&["train.autoencoder.decoder_only=true", "train.autoencoder.kl_weight=1"]));
    let expected = "`train.autoencoder.kl_weight` has no effect: the encoder does not learn";
    assert!(told.contains(expected), "{told}");
}
