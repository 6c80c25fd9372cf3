//! Single-file checkpoints: files in latent-diffusion's layout, made here of random diffusers weights by the inverse of
//! the names, give the same models as folders; the architectures of the real ones are read from sparse files.

#[path = "../common/mod.rs"]
mod common;
mod layout;
mod people;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::shared;
use palettist::files::write_safetensors;
use palettist::networks::autoencoder::AutoencoderConfig;
use palettist::networks::text_encoder::TextEncoderConfig;
use palettist::networks::unet::UnetConfig;
use palettist::ops::Weights;
use palettist::pipeline::{Pipeline, Request};
use palettist::source::{Component, Model, Tokenizer, copy_model};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use layout::{ldm, ldm_unet, random_weights, small, sparse_file};

const CPU: Device = Device::Cpu;

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn open(path: &Path) -> Model {
    Model::open(path.to_str().unwrap()).unwrap()
}

/// One line that names what it is about.
fn assert_says<T>(result: anyhow::Result<T>, words: &[&str]) {
    let message = format!("{:#}", result.map(drop).expect_err("it should be refused"));
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

fn write(path: &Path, tensors: &BTreeMap<String, Tensor>, metadata: &[(&str, &str)]) {
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    write_safetensors(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None, &metadata).unwrap();
}

/// A small single file in a folder of its own, with the weights that it is made of.
fn single_file(version: u8) -> (tempfile::TempDir, PathBuf, BTreeMap<String, Tensor>, [Weights; 3]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    let weights = random_weights(&small(version));
    let tensors = ldm(version, &weights);
    write(&path, &tensors, &[("modelspec.prediction_type", "epsilon")]);
    (folder, path, tensors, weights)
}

fn assert_same(model: &Model, weights: &[Weights; 3]) {
    for (component, wanted) in model.components().zip(weights) {
        let found = model.weights(component, Kind::Half, CPU).unwrap();
        assert_eq!(found.len(), wanted.len());
        for (name, tensor) in wanted {
            assert!(found[name].equal(tensor), "{name}");
        }
    }
}

#[test]
fn a_single_file_is_the_same_model_as_the_folder_written_from_it() {
    let _guard = tch::no_grad_guard();
    for version in [1, 2] {
        let (folder, path, _, weights) = single_file(version);
        let model = open(&path);
        assert_eq!(model.name(), "small");
        assert_same(&model, &weights);
        let [unet, text, autoencoder] = small(version);
        assert_eq!(model.text_encoder_config().unwrap(), TextEncoderConfig::from_json(&text).unwrap());
        assert_eq!(model.autoencoder_config().unwrap(), AutoencoderConfig::from_json(&autoencoder).unwrap());
        assert_eq!(model.unet_config().unwrap(), UnetConfig::from_json(&unet).unwrap());

        let to = folder.path().join("diffusers");
        copy_model(&model, &to, &[], Kind::Half).unwrap();
        let copy = open(&to);
        assert_same(&copy, &weights);
        for component in model.components() {
            let mut config = model.config_json(component).unwrap();
            if component == Component::TextEncoder {
                config["torch_dtype"] = json!("float32");
            }
            assert_eq!(copy.config_json(component).unwrap(), config);
        }
        assert_eq!(copy.scheduler_config().unwrap(), model.scheduler_config().unwrap());

        let request =
            Request { prompt: "a Red fox, 2 dogs".into(), steps: 2, size: Some((32, 48)), ..Request::default() };
        let draw = |model: &Model| {
            let pipeline = Pipeline::load(model, None, Kind::Float, CPU).unwrap();
            pipeline.generate(&request, &mut |_, _| Ok(())).unwrap().images
        };
        let (from_file, from_folder) = (draw(&model), draw(&copy));
        assert!(from_file.equal(&from_folder) && from_file.std(false).double_value(&[]) > 0.0);
    }
}

#[test]
fn old_and_new_writers_names_are_read() {
    let (_folder, path, tensors, weights) = single_file(1);
    // Text encoder without `text_model.`, as before transformers 4; attention of the autoencoder as linear layers under
    // today's names, as newer converters write it.
    let renamed = tensors.iter().map(|(name, tensor)| {
        let name = name.replace("transformer.text_model.", "transformer.");
        match name.split_once("mid.attn_1.") {
            Some((front, layer)) if !layer.starts_with("norm") => {
                let layer = layer.replace("proj_out", "out.0");
                let linear =
                    if tensor.dim() == 4 { tensor.squeeze_dim(3).squeeze_dim(2) } else { tensor.shallow_clone() };
                (format!("{front}mid.attn_1.to_{layer}"), linear)
            }
            _ => (name, tensor.shallow_clone()),
        }
    });
    write(&path, &renamed.collect(), &[]);
    assert_same(&open(&path), &weights);
}

#[test]
fn what_is_damaged_missing_or_strange_gets_one_line() {
    let (folder, path, tensors, _) = single_file(1);
    let at = |path: &Path| Model::open(path.to_str().unwrap());
    let broken = folder.path().join("broken.safetensors");
    let changed = |change: &dyn Fn(&mut BTreeMap<String, Tensor>), metadata: &[(&str, &str)]| {
        let mut tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        write(&broken, &tensors, metadata);
        at(&broken)
    };
    let bytes = fs::read(&path).unwrap();
    fs::write(&broken, &bytes[..bytes.len() - 1000]).unwrap();
    assert_says(at(&broken), &["broken.safetensors", "promises"]);
    for (name, start) in
        [("a.ckpt", &b"PK\x03\x04\0\0\0\0\x08\x08"[..]), ("b.ckpt", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9")]
    {
        let pickle = folder.path().join(name);
        fs::write(&pickle, start).unwrap();
        // Long enough that its first bytes, read as the length of a header, are within the file.
        File::options().write(true).open(&pickle).unwrap().set_len(80 << 20).unwrap();
        assert_says(at(&pickle), &[name, "pickle", "never read"]);
    }
    assert_says(at(&folder.path().join("none.safetensors")), &["none.safetensors does not exist"]);
    assert_says(Model::open("models/none.safetensors"), &["does not exist"]);

    let one = || Tensor::zeros([1], (Kind::Half, CPU));
    let strange = |name: &str| changed(&|tensors| drop(tensors.insert(name.into(), one())), &[]);
    assert_says(strange("model.diffusion_model.strange.weight"), &["`model.diffusion_model.strange.weight`"]);
    // Outside the networks: nothing that anybody reads.
    strange("something").unwrap().check(Component::Unet).unwrap();
    for (name, kind) in [
        ("conditioner.embedders.0.model.ln_final.bias", "a Stable Diffusion XL refiner"),
        ("model.diffusion_model.joint_blocks.0.x", "a Stable Diffusion 3"),
        ("double_blocks.0.img_attn.proj.bias", "a Flux"),
        ("control_model.time_embed.0.bias", "a ControlNet"),
        ("lora_unet_down.alpha", "a LoRA"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.lora_down.weight", "a LoRA beside its weights"),
        ("depth_model.model.pretrained.cls_token", "a depth-to-image model"),
        ("edm_mean", "an EDM noise schedule"),
        ("edm_vpred.sigma_max", "an EDM noise schedule"),
    ] {
        assert_says(strange(name), &["broken.safetensors", kind, "Stable Diffusion 1, 2 or XL"]);
    }
    assert_says(changed(&|_| (), &[("palettist.palettes", "1")]), &["palettized checkpoint", "--palettes"]);
    assert_says(changed(&|_| (), &[("modelspec.prediction_type", "x0")]), &["modelspec.prediction_type", "x0"]);

    let without = |prefix: &str| changed(&|tensors| tensors.retain(|name, _| !name.starts_with(prefix)), &[]);
    assert_says(without("model.diffusion_model."), &["no UNet", "model.diffusion_model."]);
    let model = without("model.diffusion_model.middle_block.0.in_layers.2.weight").unwrap();
    assert_says(model.check(Component::Unet), &["broken.safetensors", "mid_block.resnets.0.conv1.weight", "missing"]);
    let model = without("model.diffusion_model.input_blocks.0.0.weight").unwrap();
    assert_says(model.unet_config(), &["broken.safetensors", "conv_in.weight", "missing"]);
    for (prefix, title, component) in [
        ("cond_stage_model.", "text encoder", Component::TextEncoder),
        ("first_stage_model.", "autoencoder", Component::Autoencoder),
    ] {
        let model = without(prefix).unwrap();
        model.weights(Component::Unet, Kind::Half, CPU).unwrap();
        assert_says(model.config_json(component), &["broken.safetensors has no", title, prefix]);
        assert_says(model.check(component), &[title, "needed here"]);
    }
    let name = "model.diffusion_model.middle_block.0.in_layers.2.weight";
    let model = changed(&|tensors| drop(tensors.insert(name.into(), one())), &[]).unwrap();
    assert_says(model.check(Component::Unet), &[name, "[1]", "[64, 64, 3, 3]"]);
    let name = "cond_stage_model.transformer.text_model.strange";
    assert_says(strange(name), &["broken.safetensors", name]);

    // Projections that are not three of a kind.
    let (_folder, path, mut tensors, _) = single_file(2);
    let name = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight";
    for shape in [&[193i64, 64][..], &[]] {
        tensors.insert(name.into(), Tensor::zeros(shape, (Kind::Half, CPU)));
        write(&path, &tensors, &[("modelspec.prediction_type", "v")]);
        assert_says(open(&path).check(Component::TextEncoder), &[name, "[64, 64] for each of its parts"]);
    }
}

/// What the real configuration says, the inferred one says too.
fn assert_says_what(real: &Value, inferred: &Value) {
    for (key, value) in real.as_object().unwrap() {
        let bookkeeping = key.starts_with('_') && key != "_class_name" || key == "transformers_version";
        if !bookkeeping {
            assert_eq!(inferred.get(key).unwrap_or(&Value::Null), value, "{key}");
        }
    }
}

#[test]
fn real_architectures_have_their_real_configurations() {
    let Some(configs) = shared("sd_configs") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.safetensors");
    for (model, keys, step, metadata) in [
        ("sd15", "sd15", Some(470_000), json!({})),
        ("sd14", "sd15", None, json!({})),
        ("sd21-base", "sd21-base", Some(875_000), json!({})),
        ("sd21-768-v", "sd21-base", Some(140_000), json!({})),
        ("sd21-768-v", "sd21-base", None, json!({})),
        ("sd21-768-v", "sd21-base", Some(875_000), json!({ "modelspec.prediction_type": "v" })),
        ("sd21-base", "sd21-base", None, json!({ "modelspec.prediction_type": "epsilon" })),
    ] {
        let keys = read(&configs.join(keys).join("ldm_key_map.json"));
        let shape = |entry: &Value| serde_json::from_value(entry["shape"].clone()).unwrap();
        let shapes = keys.as_object().unwrap().iter().map(|(name, entry)| (name.clone(), shape(entry))).collect();
        sparse_file(&path, &shapes, step, metadata);
        let single = open(&path);
        for component in single.components() {
            single.check(component).unwrap();
            let real = read(&configs.join(model).join(component.folder()).join("config.json"));
            assert_says_what(&real, &single.config_json(component).unwrap());
        }
        let real = |name: &str| read(&configs.join(model).join(name).join("config.json"));
        assert_eq!(single.unet_config().unwrap(), UnetConfig::from_json(&real("unet")).unwrap());
        assert_eq!(single.autoencoder_config().unwrap(), AutoencoderConfig::from_json(&real("vae")).unwrap());
        assert_eq!(single.text_encoder_config().unwrap(), TextEncoderConfig::from_json(&real("text_encoder")).unwrap());
        let mut scheduler = single.scheduler_config().unwrap();
        if model.starts_with("sd1") {
            assert_eq!(scheduler.as_object_mut().unwrap().remove("prediction_type"), Some(json!("epsilon")));
        }
        assert_says_what(&read(&configs.join(model).join("scheduler/scheduler_config.json")), &scheduler);
    }

    let keys = read(&configs.join("sdxl-base-1.0/ldm_key_map.json"));
    let shape = |entry: &Value| serde_json::from_value(entry["shape"].clone()).unwrap();
    let mut shapes: BTreeMap<String, Vec<i64>> =
        keys.as_object().unwrap().iter().map(|(name, entry)| (name.clone(), shape(entry))).collect();
    sparse_file(&path, &shapes, None, json!({}));
    let single = open(&path);
    assert!(single.is_xl());
    let real = |name: &str| read(&configs.join("sdxl-base-1.0").join(name).join("config.json"));
    for component in single.components() {
        single.check(component).unwrap();
    }
    assert_eq!(single.unet_config().unwrap(), UnetConfig::from_json(&real("unet")).unwrap());
    assert_eq!(single.autoencoder_config().unwrap(), AutoencoderConfig::from_json(&real("vae")).unwrap());
    for component in single.text_encoders() {
        assert_says_what(&real(component.folder()), &with_type(single.config_json(component).unwrap(), "float16"));
    }
    let scheduler = single.scheduler_config().unwrap();
    for key in ["_class_name", "timestep_spacing", "prediction_type", "beta_start", "beta_end", "beta_schedule"] {
        assert_eq!(scheduler[key], read(&configs.join("sdxl-base-1.0/scheduler/scheduler_config.json"))[key], "{key}");
    }
    shapes.insert("v_pred".into(), vec![0]);
    sparse_file(&path, &shapes, None, json!({}));
    assert_eq!(open(&path).scheduler_config().unwrap()["prediction_type"], "v_prediction");
    shapes.retain(|name, _| !name.starts_with("conditioner.embedders.0."));
    shapes.insert("conditioner.embedders.0.model.ln_final.bias".into(), vec![1]);
    sparse_file(&path, &shapes, None, json!({}));
    assert_says(Model::open(path.to_str().unwrap()), &["sparse.safetensors is a Stable Diffusion XL refiner"]);
}

/// With the type that the weights of the published one have.
fn with_type(mut config: Value, kind: &str) -> Value {
    config["torch_dtype"] = kind.into();
    config
}

#[test]
fn cut_down_unets_have_their_real_configurations() {
    let Some(configs) = shared("sd_configs") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.safetensors");
    for (family, metadata) in [
        ("unet_config", json!({})),
        ("unet_config_v2-base", json!({ "modelspec.prediction_type": "epsilon" })),
        ("unet_config_v2", json!({ "modelspec.prediction_type": "v" })),
    ] {
        for size in ["bk_base", "bk_small", "bk_tiny"] {
            let real = UnetConfig::from_json(&read(&configs.join(format!("bk-sdm/{family}/{size}.json")))).unwrap();
            let layers: Vec<usize> = real.down_transformers.iter().map(Vec::len).collect();
            let shapes = real.parameters().into_iter().map(|p| {
                // With attention in the block, the upsampling is the third of its parts.
                let name = ldm_unet(&p.name, &layers);
                let attends = |up: &str| real.up_attention[up.parse::<usize>().unwrap()];
                let third = p.name.contains("upsamplers") && attends(p.name.split('.').nth(1).unwrap());
                (if third { name.replace(".1.conv.", ".2.conv.") } else { name }, p.shape)
            });
            sparse_file(&path, &shapes.collect(), None, metadata.clone());
            assert_eq!(open(&path).unet_config().unwrap(), real, "{family} {size}");
            open(&path).check(Component::Unet).unwrap();
        }
    }
}

#[test]
fn the_built_in_tokenizer_gives_the_golden_ids_and_its_files_are_clips() {
    let Some(clip) = shared("clip_tokenizer") else { return };
    let integers = |value: &Value| value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect::<Vec<_>>();
    let first = Tokenizer::clip("<|endoftext|>").unwrap();
    assert_eq!((first.vocabulary_size(), first.length()), (49408, 77));
    let golden = read(&clip.join("golden_transformers.json"));
    assert!(golden.as_array().unwrap().len() >= 30);
    for case in golden.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(first.encode(text), integers(&case["ids77"]), "{text}");
    }

    // The folder that is written is that of Stable Diffusion 2, and read back it is the same tokenizer.
    let (folder, path, _, _) = single_file(2);
    let to = folder.path().join("diffusers");
    copy_model(&open(&path), &to, &[], Kind::Half).unwrap();
    assert_eq!(read(&to.join("tokenizer/vocab.json")), read(&clip.join("vocab.json")));
    let same = |name: &str| fs::read(to.join("tokenizer").join(name)).unwrap() == fs::read(clip.join(name)).unwrap();
    assert!(same("merges.txt"));
    let (second, written) = (open(&path).tokenizer().unwrap(), Tokenizer::open(&to.join("tokenizer")).unwrap());
    let real = tempfile::tempdir().unwrap();
    for (from, name) in [
        (clip.clone(), "vocab.json"),
        (clip.clone(), "merges.txt"),
        (clip.join("../sd_configs/sd21-base/tokenizer"), "tokenizer_config.json"),
        (clip.join("../sd_configs/sd21-base/tokenizer"), "special_tokens_map.json"),
    ] {
        fs::copy(from.join(name), real.path().join(name)).unwrap();
    }
    let real = Tokenizer::open(real.path()).unwrap();
    for case in golden.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(second.encode(text), real.encode(text), "{text}");
        assert_eq!(second.encode(text), written.encode(text), "{text}");
    }
    assert_eq!(second.encode("a")[2..5], [49407, 0, 0]);
}

/// Runs the program; (exit code, standard output, standard error).
fn palettist(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).current_dir(folder).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_commands_take_a_single_file() {
    let (folder, path, tensors, _) = single_file(2);
    write(&path, &tensors, &[]);
    let folder = folder.path();
    fs::create_dir(folder.join("pictures")).unwrap();
    for name in ["0", "1"] {
        image::RgbImage::new(32, 32).save(folder.join(format!("pictures/{name}.png"))).unwrap();
        fs::write(folder.join(format!("pictures/{name}.txt")), "a fox").unwrap();
    }
    fs::create_dir(folder.join("validation")).unwrap();
    image::RgbImage::new(32, 33).save(folder.join("validation/0.png")).unwrap();
    fs::write(folder.join("validation/0.txt"), "a fox").unwrap();
    let config = "name = \"try\"\n[model]\npretrained_model_name_or_path = \"small.safetensors\"\n[data]\nresolution = 32\n\
                  train_data_dir = \"pictures\"\nvalidation_data_dir = \"validation\"\n[train]\nmax_train_steps = 1\n";
    fs::write(folder.join("run.toml"), config).unwrap();
    let all: [(&[&str], &str); 8] = [
        (&["check", "run.toml"], "no problems found"),
        (&["palettize", "small.safetensors", "-o", "p.palettes.safetensors", "--bits", "2"], "wrote p.palettes"),
        (
            &[
                "export",
                "small.safetensors",
                "--palettes",
                "p.palettes.safetensors",
                "-o",
                "coreml",
                "--latent-h",
                "8",
                "--latent-w",
                "8",
            ],
            "version_small_unet",
        ),
        (
            &[
                "verify",
                "coreml/Stable_Diffusion_version_small_unet.mlpackage",
                "--against",
                "small.safetensors",
                "--palettes",
                "p.palettes.safetensors",
            ],
            "dB",
        ),
        (&["export", "small.safetensors", "-o", "folder", "--format", "diffusers"], "folder"),
        (
            &[
                "generate",
                "small.safetensors",
                "--prompt",
                "a",
                "-o",
                "o.png",
                "--steps",
                "1",
                "--height",
                "32",
                "--width",
                "32",
            ],
            "o.png",
        ),
        (&["evaluate", "small.safetensors", "--config", "run.toml", "--device", "cpu"], "validation loss"),
        (&["inspect", "small.safetensors"], "model.diffusion_model.input_blocks.0.0.weight"),
    ];
    for (arguments, expected) in all {
        let (code, out, error) = palettist(folder, arguments);
        assert_eq!(code, 0, "{arguments:?}: {error}");
        assert!(out.contains(expected), "{arguments:?}: {expected:?} is not in\n{out}");
        let told = error.matches("v_prediction at 768 pixels is assumed").count();
        assert_eq!(told, usize::from(arguments[0] != "inspect"), "{arguments:?}: {error}");
    }
    assert!(open(&folder.join("folder")).unet_config().unwrap().sample_size == 96);
    let (code, _, error) = palettist(folder, &["generate", "p.palettes.safetensors", "--prompt", "a", "-o", "x.png"]);
    assert_eq!((code, error.lines().count()), (1, 1), "{error}");
    assert!(error.contains("--palettes"), "{error}");
}
