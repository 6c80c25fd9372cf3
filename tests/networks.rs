//! The networks against diffusers' and transformers' own: outputs made by `tests/oracle/networks.py`, from weights and
//! inputs that both sides compute from their names; and their parameters against those of the real models.

mod common;

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use common::shared;
use palettist::files::TensorFile;
use palettist::networks::autoencoder::{AutoencoderConfig, decode, encode};
use palettist::networks::safety_checker::{SafetyCheckerConfig, safety_checker};
use palettist::networks::text_encoder::{TextEncoderConfig, text_encoder};
use palettist::networks::unet::{Added, Condition, UnetConfig, unet};
use palettist::ops::{Parameter, Tensors, Weights};
use serde_json::Value;
use tch::{Kind, Tensor};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/networks")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Numbers in −1…1 that depend on `name` only: SplitMix64 from its FNV-1a hash, as in the Python script.
fn uniform(name: &str, shape: &[i64]) -> Vec<f64> {
    let start = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    (1..=shape.iter().product::<i64>() as u64)
        .map(|i| {
            let z = start.wrapping_add(0x9E37_79B9_7F4A_7C15u64.wrapping_mul(i));
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0
        })
        .collect()
}

fn tensor(values: impl IntoIterator<Item = f64>, shape: &[i64]) -> Tensor {
    Tensor::from_slice(&values.into_iter().map(|v| v as f32).collect::<Vec<_>>()).view(shape)
}

fn weights(parameters: &[Parameter]) -> Weights {
    let weight = |p: &Parameter| {
        let values = uniform(&p.name, &p.shape).into_iter();
        if p.shape.len() == 1 {
            let base = if p.name.ends_with("weight") { 1.0 } else { 0.0 };
            tensor(values.map(|v| base + 0.5 * v), &p.shape)
        } else if p.name.contains("embedding") && !p.name.contains("time") {
            tensor(values, &p.shape)
        } else {
            let scale = (3.0 / p.shape[1..].iter().product::<i64>() as f64).sqrt();
            tensor(values.map(|v| v * scale), &p.shape)
        }
    };
    parameters.iter().map(|p| (p.name.clone(), weight(p))).collect()
}

fn given(name: &str, shape: &[i64]) -> Tensor {
    tensor(uniform(name, shape), shape) * 3f64.sqrt()
}

fn integers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()
}

fn ids(case: &Value) -> Tensor {
    let shape = integers(&case["ids"]);
    let vocabulary = case["vocab"].as_f64().unwrap();
    let mut ids: Vec<i64> = uniform(case["name"].as_str().unwrap(), &shape)
        .into_iter()
        .map(|u| ((u + 1.0) / 2.0 * vocabulary) as i64)
        .collect();
    for (row, end) in ids.chunks_mut(shape[1] as usize).zip(integers(&case["ends"])) {
        row[end as usize..].fill(case["end"].as_i64().unwrap());
    }
    Tensor::from_slice(&ids).view(shape.as_slice())
}

/// ‖a − b‖ / ‖b‖
fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    f64::try_from((a - &b).norm() / b.norm()).unwrap()
}

/// Runs every case whose name starts with `kind`; `run` gives the outputs with their names.
fn agrees<N: std::fmt::Display>(kind: &str, run: impl Fn(&Value) -> Vec<(N, Tensor)>) {
    let _guard = tch::no_grad_guard();
    let expected = TensorFile::open(&fixtures().join("outputs.safetensors")).unwrap();
    let cases = json(&fixtures().join("cases.json"));
    let mut count = 0;
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        if !name.starts_with(kind) {
            continue;
        }
        for (output, tensor) in run(case) {
            let error = relative_error(&tensor, &expected.tensor(&format!("{name}.{output}")).unwrap());
            eprintln!("{name}.{output}: {error:.1e}");
            assert!(error <= 1e-5, "{name}.{output} differs by {error:e}");
            count += 1;
        }
    }
    assert!(count >= 6, "only {count} outputs were compared");
}

#[test]
fn unets_agree_with_diffusers() {
    agrees("unet", |case| {
        let config = UnetConfig::from_json(&case["config"]).unwrap();
        let weights = weights(&config.parameters());
        let sample = given("sample", &integers(&case["sample"]));
        let timesteps = Tensor::from_slice(&integers(&case["timesteps"]));
        let context = given("context", &integers(&case["context"]));
        let time_ids = case.get("time_ids").map(|rows| {
            let rows: Vec<Tensor> =
                rows.as_array().unwrap().iter().map(|row| Tensor::from_slice(&integers(row))).collect();
            Tensor::stack(&rows, 0)
        });
        let text_embeds = case.get("text_embeds").map(|shape| given("text_embeds", &integers(shape)));
        let added = text_embeds.as_ref().zip(time_ids.as_ref());
        let added = added.map(|(text_embeds, time_ids)| Added { text_embeds, time_ids });
        let shapes: Vec<Vec<i64>> =
            case.get("residuals").map_or(vec![], |shapes| shapes.as_array().unwrap().iter().map(integers).collect());
        if let (Some(shape), [batch, _, height, width]) = (shapes.first(), &sample.size()[..]) {
            assert_eq!(shape[0], *batch);
            assert_eq!(shapes, config.residual_shapes(*batch, *height, *width));
        }
        let residuals: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, shape)| given(&format!("residual_{i}"), shape)).collect();
        let condition = Condition { context: &context, added, residuals: &residuals };
        let features = RefCell::new(Vec::new());
        let output =
            unet(&mut Tensors::new(&weights).keeping_features(&features), &config, &sample, &timesteps, condition);
        let shown = features.into_inner().into_iter().enumerate();
        let shown = shown.filter(|_| case.get("features").is_some()).map(|(i, x)| (format!("feature_{i}"), x));
        let outputs: Vec<_> = shown.chain([("output".to_owned(), output)]).collect();
        assert_eq!(outputs.len() as u64, 1 + case.get("features").map_or(0, |count| count.as_u64().unwrap()));
        outputs
    });
}

#[test]
fn autoencoders_agree_with_diffusers() {
    agrees("vae", |case| {
        let config = AutoencoderConfig::from_json(&case["config"]).unwrap();
        let weights = weights(&config.parameters());
        let mut ops = Tensors::new(&weights);
        let moments = encode(&mut ops, &config, &given("image", &integers(&case["image"])));
        let image = decode(&mut ops, &config, &given("latents", &integers(&case["latents"])));
        vec![("moments", moments), ("image", image)]
    });
}

#[test]
fn text_encoders_agree_with_transformers() {
    agrees("text", |case| {
        let config = TextEncoderConfig::from_json(&case["config"]).unwrap();
        let weights = weights(&config.parameters());
        let output = text_encoder(&mut Tensors::new(&weights), &config, &ids(case));
        vec![
            ("last_hidden_state", output.last_hidden_state),
            ("penultimate", output.penultimate),
            ("pooled", output.pooled),
        ]
    });
}

#[test]
fn safety_checkers_agree_with_diffusers() {
    let inputs = |case: &Value| {
        let adjustment = Tensor::from_slice(&[case["adjustment"].as_f64().unwrap() as f32]);
        (given("picture", &integers(&case["picture"])), given("images", &integers(&case["images"])), adjustment)
    };
    agrees("safety", |case| {
        let config = SafetyCheckerConfig::from_json(&case["config"]).unwrap();
        let mut weights = weights(&config.parameters());
        let (picture, images, adjustment) = inputs(case);
        let output = safety_checker(&mut Tensors::new(&weights), &config, &picture, &images, &adjustment);
        // What nothing is held against stays as it is.
        let high = Tensor::full([17], 2.0, (Kind::Float, tch::Device::Cpu));
        weights.insert("concept_embeds_weights".into(), high);
        let kept = safety_checker(&mut Tensors::new(&weights), &config, &picture, &images, &adjustment);
        assert_eq!((kept.filtered, f64::try_from(kept.held_back.sum(Kind::Double)).unwrap()), (images.copy(), 0.0));
        vec![("removed", images - output.filtered), ("held_back", output.held_back), ("scores", output.scores)]
    });
}

#[test]
fn parameters_of_the_real_models_are_those_of_diffusers() {
    let Some(configs) = shared("sd_configs") else { return };
    for model in ["sd15", "sd15-inpainting", "sd21-base", "sd21-768-v", "sdxl-base-1.0"] {
        let folder = configs.join(model);
        let known = json(&folder.join("diffusers_keys_shapes.json"));
        let config = |part: &str| json(&folder.join(part).join("config.json"));
        let mut networks = vec![
            ("unet", UnetConfig::from_json(&config("unet")).unwrap().parameters()),
            ("vae", AutoencoderConfig::from_json(&config("vae")).unwrap().parameters()),
            ("text_encoder", TextEncoderConfig::from_json(&config("text_encoder")).unwrap().parameters()),
        ];
        if known.get("text_encoder_2").is_some() {
            let config = TextEncoderConfig::from_json(&config("text_encoder_2")).unwrap();
            networks.push(("text_encoder_2", config.parameters()));
        }
        for (part, parameters) in networks {
            let known = known[part].as_object().unwrap();
            let mut names: Vec<_> = parameters.iter().map(|p| p.name.as_str()).collect();
            names.sort();
            let mut expected: Vec<_> = known.keys().map(String::as_str).collect();
            expected.sort();
            assert_eq!(names, expected, "{model}/{part}");
            for p in &parameters {
                assert_eq!(p.shape, integers(&known[&p.name]), "{model}/{part}: {}", p.name);
            }
        }
    }
}

#[test]
fn the_real_bk_sdm_unets_have_their_published_sizes() {
    let Some(configs) = shared("sd_configs") else { return };
    // Kim et al. 2023, table 1: 0.58, 0.49 and 0.33 billion parameters (SD 1 and SD 2 alike to these digits).
    for folder in ["unet_config", "unet_config_v2", "unet_config_v2-base"] {
        for (size, published) in [("base", 0.58), ("small", 0.49), ("tiny", 0.33)] {
            let path = configs.join(format!("bk-sdm/{folder}/bk_{size}.json"));
            let parameters = UnetConfig::from_json(&json(&path)).unwrap().parameters();
            let count: i64 = parameters.iter().map(|p| p.shape.iter().product::<i64>()).sum();
            let billions = count as f64 / 1e9;
            assert!((billions - published).abs() < 0.0101, "{folder}/{size}: {billions:.3} billion");
        }
    }
}

/// SSD-1B (Gupta et al. 2024, "Progressive Knowledge Distillation Of Stable Diffusion XL Using Layer Level Loss"): 1.3
/// billion parameters, of SDXL's 2.6.
#[test]
fn the_real_ssd_1b_has_its_published_size() {
    let Some(configs) = shared("sd_configs") else { return };
    let mut config = json(&configs.join("sdxl-base-1.0/unet/config.json"));
    config["transformer_layers_per_block"] = serde_json::json!([0, [2, 2], [4, 4]]);
    config["reverse_transformer_layers_per_block"] = serde_json::json!([[4, 4, 10], [2, 1, 1], 0]);
    config["mid_block_type"] = "UNetMidBlock2D".into();
    let parameters = UnetConfig::from_json(&config).unwrap().parameters();
    let billions = parameters.iter().map(|p| p.shape.iter().product::<i64>()).sum::<i64>() as f64 / 1e9;
    assert!((billions - 1.3).abs() < 0.05, "{billions}");
}

#[test]
fn unsupported_configurations_are_refused_by_key_and_value() {
    let cases = json(&fixtures().join("cases.json"));
    let config =
        |name: &str| cases.as_array().unwrap().iter().find(|case| case["name"] == name).unwrap()["config"].clone();
    let with = |name: &str, key: &str, value: Value| {
        let mut config = config(name);
        config[key] = value;
        config
    };
    let unets = [
        ("addition_embed_type", Value::from("text_image")),
        ("addition_time_embed_dim", Value::from(256)),
        ("resnet_time_scale_shift", Value::from("scale_shift")),
        ("act_fn", Value::from("gelu")),
        ("norm_num_groups", Value::from(5)),
        ("cross_attention_dim", Value::from(-3)),
        ("mid_block_type", Value::from("UNetMidBlock2DSimpleCrossAttn")),
        ("transformer_layers_per_block", serde_json::json!([1, 1, [1, 1]])),
        ("transformer_layers_per_block", serde_json::json!([1, 1, [1, 1, 1], 1])),
        ("transformer_layers_per_block", serde_json::json!([1, -1, 1, 1])),
        ("transformer_layers_per_block", Value::Null),
        ("reverse_transformer_layers_per_block", serde_json::json!([[1, 1], 1, 1, 1])),
    ];
    for (key, value) in unets {
        let message = format!("{:#}", UnetConfig::from_json(&with("unet_sd1", key, value.clone())).unwrap_err());
        assert!(message.contains(key) && message.contains(&value.to_string()), "{message}");
    }
    let uneven = with("unet_sd1", "transformer_layers_per_block", serde_json::json!([1, [1, 2], 1, 1]));
    let message = format!("{:#}", UnetConfig::from_json(&uneven).unwrap_err());
    assert!(message.contains("needs `reverse_transformer_layers_per_block` too"), "{message}");
    let narrow = with("unet_sdxl", "projection_class_embeddings_input_dim", 48.into());
    let message = format!("{:#}", UnetConfig::from_json(&narrow).unwrap_err());
    assert!(message.contains("`projection_class_embeddings_input_dim`: 48"), "{message}");
    let error = TextEncoderConfig::from_json(&with("text_sd1", "hidden_act", "relu".into())).unwrap_err();
    assert!(format!("{error:#}").contains("`hidden_act`: \"relu\""), "{error:#}");
    let error = AutoencoderConfig::from_json(&with("vae", "latents_mean", vec![0].into())).unwrap_err();
    assert!(format!("{error:#}").contains("`latents_mean`: [0]"), "{error:#}");
}
