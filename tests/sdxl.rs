//! Stable Diffusion XL: loading, pictures against diffusers' `StableDiffusionXLPipeline` on a tiny random model
//! (`tests/oracle/sdxl.py`), palettes and training.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::checker;
use palettist::coreml::reading::{Feature, Package, Precision, evaluate, psnr};
use palettist::diffusion::{Noise, SamplerKind};
use palettist::files::TensorFile;
use palettist::networks::text_encoder::TextEncoderConfig;
use palettist::networks::unet::{Added, Condition, unet};
use palettist::ops::Tensors;
use palettist::pipeline::{Pipeline, Request};
use palettist::report::pictures;
use palettist::source::{Component, Model, copy_model};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn fixture(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/fixtures/sdxl").join(name)
}

fn model() -> Model {
    Model::open(fixture("model").to_str().unwrap()).unwrap()
}

fn pipeline(kind: Kind) -> Pipeline {
    Pipeline::load(&model(), None, kind, Device::Cpu).unwrap()
}

fn expected(name: &str) -> Tensor {
    TensorFile::open(&fixture("expected.safetensors")).unwrap().tensor(name).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// |a − b| / |b|, in the Euclidean norm.
fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((a - &b).norm() / b.norm()).double_value(&[])
}

/// A copy of the fixture that a test may change.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in fs::read_dir(fixture("model")).unwrap().flatten() {
        let to = folder.path().join(part.file_name());
        if part.path().is_file() {
            fs::copy(part.path(), to).unwrap();
            continue;
        }
        fs::create_dir(&to).unwrap();
        for file in fs::read_dir(part.path()).unwrap().flatten() {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    folder
}

fn palettist(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
    command.env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1");
    command.args(arguments).current_dir(folder).output().unwrap()
}

fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = palettist(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn both_text_encoders_and_tokenizers_are_read() {
    let model = model();
    assert!(model.is_xl() && model.zeros_for_empty_prompt().unwrap());
    assert!(model.components().eq(Component::ALL));
    let ids = |component| model.tokenizer_of(component).unwrap().encode("a red cat");
    let (first, second) = (ids(Component::TextEncoder), ids(Component::TextEncoder2));
    // The second tokenizer fills up with "!", the token of id 0.
    let end = first[4];
    assert_eq!((first[5], &second[..6], second[76]), (end, &[&first[..5], &[0]].concat()[..], 0));
    let configs = [Component::TextEncoder, Component::TextEncoder2].map(|c| model.text_encoder_config_of(c).unwrap());
    assert_eq!(configs.map(|config: TextEncoderConfig| config.projection), [None, Some(10)]);
}

#[test]
fn latents_and_pictures_are_those_of_diffusers() {
    let pipeline = pipeline(Kind::Float);
    assert_eq!((pipeline.own_sampler().kind, pipeline.own_size()), (SamplerKind::Euler, (64, 64)));
    let prompts = json(&fixture("prompts.json"));
    let text = |key: &str| prompts[key].as_str().unwrap().to_owned();
    let request = || Request {
        prompt: text("prompt"),
        negative_prompt: text("negative_prompt"),
        steps: 12,
        guidance_scale: pipeline.own_guidance_scale(),
        noise: Noise::Latents(expected("noise"), 0),
        images: 2,
        ..Request::default()
    };
    let draw = |request: Request| pipeline.generate(&request, &mut |_, _| Ok(())).unwrap();
    for (name, request) in [
        ("dpmpp_2m", Request { sampler: Some(SamplerKind::DpmppTwoM), ..request() }),
        ("without_negative", Request { negative_prompt: String::new(), ..request() }),
        ("unguided", Request { guidance_scale: 1.0, ..request() }),
        ("euler", request()),
    ] {
        let error = relative_error(&draw(request).latents, &expected(name));
        println!("{name}: relative error {error:.1e}");
        assert!(error < 1e-4, "{name}: relative error {error:e}");
    }
    let drawn = draw(Request { batch: 1, ..request() });
    for (image, wanted) in drawn.images.unbind(0).iter().zip(expected("pictures").unbind(0)) {
        let rgb = pictures::from_tensor(image).unwrap().into_raw();
        let wanted = Vec::<u8>::try_from(wanted.contiguous().flatten(0, -1)).unwrap();
        assert_eq!(rgb.len(), wanted.len());
        let off = rgb.iter().zip(&wanted).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(off <= Some(1), "{off:?} levels off");
    }
}

#[test]
fn an_autoencoder_that_overflows_in_fp16_decodes_in_fp32() {
    let (mut half, float) = (pipeline(Kind::Half), pipeline(Kind::Float));
    assert!(half.autoencoder_config.force_upcast);
    // The fixture's weights are fp16: nothing else differs.
    let latents = expected("euler");
    let wanted = float.decode(&latents).unwrap();
    assert!(relative_error(&half.decode(&latents).unwrap(), &wanted) < 1e-6);
    half.autoencoder_config.force_upcast = false;
    assert!(relative_error(&half.decode(&latents).unwrap(), &wanted) > 1e-5);
}

#[test]
fn a_written_folder_is_the_same_model() {
    let (model, folder) = (model(), tempfile::tempdir().unwrap());
    let to = folder.path().join("copy");
    copy_model(&model, &to, &[], Kind::Half).unwrap();
    let index = json(&to.join("model_index.json"));
    assert_eq!(index["_class_name"], "StableDiffusionXLPipeline");
    assert_eq!(index["text_encoder_2"][1], "CLIPTextModelWithProjection");
    assert!(index.get("requires_safety_checker").is_none(), "diffusers' pipeline takes no such argument");
    assert_eq!(json(&to.join("text_encoder_2/config.json"))["dtype"], "float32");
    let written = Model::open(to.to_str().unwrap()).unwrap();
    for component in Component::ALL {
        let read = |model: &Model| model.weights(component, Kind::Half, Device::Cpu).unwrap();
        let (a, b) = (read(&model), read(&written));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "{component:?}");
    }
    let encode = |model: &Model| model.tokenizer_of(Component::TextEncoder2).unwrap().encode("a red cat, a dog!");
    assert_eq!(encode(&model), encode(&written));
}

#[test]
fn models_that_do_not_fit_together_are_refused() {
    let says = |folder: &Path, words: &[&str]| {
        let loaded = Model::open(folder.to_str().unwrap())
            .and_then(|model| Pipeline::load(&model, None, Kind::Float, Device::Cpu));
        let message = format!("{:#}", loaded.map(drop).expect_err("it should be refused"));
        assert!(!message.contains('\n') && words.iter().all(|word| message.contains(word)), "{message}");
    };
    let change = |folder: &Path, file: &str, change: &dyn Fn(&mut Value)| {
        let mut value = json(&folder.join(file));
        change(&mut value);
        fs::write(folder.join(file), value.to_string()).unwrap();
    };
    let folder = copy();
    change(folder.path(), "model_index.json", &|index| index["text_encoder"] = serde_json::json!([null, null]));
    says(folder.path(), &["refiner"]);
    // An index that knows one text encoder only, with the UNet of two.
    change(folder.path(), "model_index.json", &|index| {
        index["text_encoder"] = serde_json::json!(["transformers", "CLIPTextModel"]);
        index["text_encoder_2"] = Value::Null;
    });
    says(folder.path(), &["`cross_attention_dim` is 20", "`hidden_size` 8"]);
    let folder = copy();
    change(folder.path(), "unet/config.json", &|config| {
        config["projection_class_embeddings_input_dim"] = 60.into();
    });
    says(folder.path(), &["summed up in 12 numbers", "gives 10", "`projection_dim`"]);
    let folder = copy();
    fs::remove_dir_all(folder.path().join("tokenizer_2")).unwrap();
    says(folder.path(), &["tokenizer_2"]);
}

/// A config for the tiny model on six of the project's pictures.
fn config(folder: &Path) -> String {
    for i in 0..8 {
        let pictures = folder.join(if i < 6 { "pictures" } else { "validation" });
        fs::create_dir_all(&pictures).unwrap();
        let name = format!("{i:04}.png");
        fs::copy(Path::new(ROOT).join("datasets/sketchbook/train").join(&name), pictures.join(&name)).unwrap();
        fs::write(pictures.join(format!("{i:04}.txt")), format!("a red cat {i}")).unwrap();
    }
    let text = format!(
        r#"name = "tiny"
output_dir = "run"
[model]
pretrained_model_name_or_path = "{ROOT}/tests/fixtures/sdxl/model"
[data]
resolution = 64
train_data_dir = "pictures"
validation_data_dir = "validation"
caption_dropout_rate = 0.2
flip_aug = true
[train]
max_train_steps = 4
train_batch_size = 2
learning_rate = 1e-3
gradient_checkpointing = true
device = "cpu"
[palettize]
n_bits = 4
weight_threshold = 100
[distill]
enabled = true
[sample]
sample_every_n_steps = 4
prompts = ["a red cat"]
sample_steps = 2
[logging]
log_every = 1
[validation]
every_n_steps = 4
batches = 1
"#
    );
    fs::write(folder.join("tiny.toml"), text).unwrap();
    "tiny.toml".to_owned()
}

#[test]
fn it_trains_and_palettizes() {
    let folder = tempfile::tempdir().unwrap();
    let (path, config) = (folder.path(), config(folder.path()));
    let checked = succeed(path, &["check", &config]);
    assert!(checked.contains("second text encoder") && checked.contains("no problems found"), "{checked}");
    succeed(path, &["train", &config]);
    let metrics = fs::read_to_string(path.join("run/logs/metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap().get("loss")?.as_f64()).collect();
    assert!(losses.len() == 4 && losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{metrics}");
    let trained = Model::open(path.join("run/model").to_str().unwrap()).unwrap();
    assert!(trained.is_xl());
    let package = Package::open(&path.join("run/coreml/Stable_Diffusion_version_tiny_unet.mlpackage")).unwrap();
    assert!(package.weights().unwrap().iter().any(|weight| weight.palettes.is_some()));
    let [before, after] = [&model(), &trained].map(|m| m.weights(Component::Unet, Kind::Float, Device::Cpu).unwrap());
    // What only Stable Diffusion XL has learns too.
    for name in ["add_embedding.linear_1.bias", "down_blocks.2.attentions.0.transformer_blocks.1.norm1.weight"] {
        assert!(!before[name].equal(&after[name]), "{name}");
    }

    let model = fixture("model").display().to_string();
    let palettes = "ptq.palettes.safetensors";
    succeed(path, &["palettize", &model, "-o", palettes, "--bits", "2", "--weight-threshold", "100"]);
    let export =
        ["export", &model, "--palettes", palettes, "-o", "coreml", "--attention-implementation", "SPLIT_EINSUM"];
    let chunks = succeed(path, &[&export[..], &["--chunk-unet"]].concat());
    let mut verify = vec!["verify"];
    verify.extend(chunks.lines());
    assert_eq!(verify.len(), 3, "{chunks}");
    let verified = succeed(path, &[&verify[..], &["--against", &model, "--palettes", palettes]].concat());
    assert!(verified.contains("timestep 981"), "{verified}");
    let arguments = ["evaluate", &model, "--config", &config, "--device", "cpu", "--json", "--palettes", palettes];
    let report: Value = serde_json::from_str(&succeed(path, &arguments)).unwrap();
    let [float, palettized] = ["float", "palettized"].map(|which| report[which].as_f64().unwrap());
    assert!(float.is_finite() && (palettized - float).abs() > 1e-6, "{report}");
}

/// The name and the type of each input or output.
fn declared(features: &[Feature]) -> Vec<String> {
    features.iter().map(|feature| format!("{} {}", feature.name, feature.kind)).collect()
}

#[test]
fn its_unets_package_keeps_the_contract_and_computes_what_the_network_does() {
    let folder = tempfile::tempdir().unwrap();
    let model_path = fixture("model").display().to_string();
    for target in ["iOS16", "iOS18"] {
        let out = folder.path().join(target);
        let arguments = ["export", &model_path, "-o", out.to_str().unwrap(), "--min-deployment-target", target];
        let said = succeed(folder.path(), &arguments);
        let package = Package::open(Path::new(said.trim())).unwrap();
        let inputs = [
            "sample FLOAT16[2, 4, 8, 8]",
            "timestep FLOAT16[2]",
            "encoder_hidden_states FLOAT16[2, 20, 1, 77]",
            "time_ids FLOAT16[2, 6]",
            "text_embeds FLOAT16[2, 10]",
        ];
        assert_eq!(declared(package.inputs()), inputs);
        assert_eq!(declared(package.outputs()), ["noise_pred FLOAT32[2, 4, 8, 8]"]);
        check_independently(said.trim());
        let verified = succeed(folder.path(), &["verify", said.trim(), "--against", &model_path, "--min-psnr", "50"]);
        assert!(verified.contains("timestep 981"), "{verified}");

        let (model, _guard) = (model(), tch::no_grad_guard());
        let (config, weights) =
            (model.unet_config().unwrap(), model.weights(Component::Unet, Kind::Float, Device::Cpu).unwrap());
        tch::manual_seed(3);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Half, Device::Cpu)).to_kind(Kind::Float);
        let (sample, context, text) = (random(&[2, 4, 8, 8]), random(&[2, 77, 20]), random(&[2, 10]));
        let sizes = Tensor::from_slice(&[1024f32, 1024., 0., 0., 1024., 1024., 333., 500., 17., 256., 512., 640.]);
        let sizes = sizes.view([2, 6]);
        for timestep in [1.0, 501.0, 981.0] {
            let timesteps = Tensor::full([2], timestep, (Kind::Float, Device::Cpu));
            let added = Some(Added { text_embeds: &text, time_ids: &sizes });
            let condition = Condition { added, ..Condition::from(&context) };
            let wanted = unet(&mut Tensors::new(&weights), &config, &sample, &timesteps, condition);
            let given = [
                ("sample", sample.shallow_clone()),
                ("timestep", timesteps),
                ("encoder_hidden_states", context.transpose(1, 2).unsqueeze(2)),
                ("time_ids", sizes.shallow_clone()),
                ("text_embeds", text.shallow_clone()),
            ];
            let given = given.map(|(name, tensor)| (name.to_owned(), tensor)).into();
            let [single, half] = [Precision::Float32, Precision::Float16]
                .map(|precision| psnr(&wanted, &evaluate(&package, &given, precision).unwrap()["noise_pred"]));
            println!("{target}, timestep {timestep}: {single:.1} dB, {half:.1} dB in 16 bits");
            assert!(single > 100.0 && half > 50.0, "{target}, timestep {timestep}: {single} dB, {half} dB");
        }
    }
}

/// Has the independent checker validate a package, where there is one: its structure, coremltools' loader, the types that
/// it infers.
fn check_independently(package: &str) {
    let Some((python, tools)) = checker() else { return };
    let checked = Command::new(python).arg(tools.join("mlpackage_eval.py")).arg(package).output().unwrap();
    assert!(checked.status.success(), "{package}: {}", String::from_utf8_lossy(&checked.stdout));
}

/// The other packages: those of the contract's tables. Its autoencoder takes and computes fp32, but for the decoder of
/// one that does not overflow in fp16.
#[test]
fn its_other_packages_keep_the_contract_and_compute_what_the_networks_do() {
    let folder = copy();
    let path = folder.path().to_str().unwrap().to_owned();
    let tables = |numbers: &str| {
        [
            (
                "text_encoder",
                ["input_ids FLOAT32[1, 77]".to_owned()],
                vec!["hidden_embeds FLOAT32[1, 77, 8]", "pooled_outputs FLOAT32[1, 8]"],
            ),
            (
                "text_encoder_2",
                ["input_ids FLOAT32[1, 77]".to_owned()],
                vec!["hidden_embeds FLOAT32[1, 77, 12]", "pooled_outputs FLOAT32[1, 10]"],
            ),
            ("vae_decoder", [format!("z {numbers}[1, 4, 8, 8]")], vec!["image FLOAT32[1, 3, 64, 64]"]),
            ("vae_encoder", ["x FLOAT32[1, 3, 64, 64]".to_owned()], vec!["latent FLOAT32[1, 8, 8, 8]"]),
        ]
    };
    for (numbers, target) in [("FLOAT32", "iOS16"), ("FLOAT16", "iOS18")] {
        if numbers == "FLOAT16" {
            let file = folder.path().join("vae/config.json");
            let mut config = json(&file);
            config["force_upcast"] = false.into();
            fs::write(file, config.to_string()).unwrap();
        }
        let (out, tables) = (folder.path().join(numbers), tables(numbers));
        let names = tables.each_ref().map(|(name, ..)| *name).join(",");
        let flags = ["--component", &names, "--min-deployment-target", target];
        let said = succeed(folder.path(), &[&["export", &path, "-o", out.to_str().unwrap()][..], &flags].concat());
        assert_eq!(said.lines().count(), tables.len());
        for (package, (component, inputs, outputs)) in said.lines().zip(tables) {
            assert!(package.ends_with(&format!("_{component}.mlpackage")), "{package}");
            let read = Package::open(Path::new(package)).unwrap();
            assert_eq!(
                (declared(read.inputs()), declared(read.outputs())),
                (inputs.into(), outputs.iter().map(|s| s.to_string()).collect())
            );
            let said = succeed(folder.path(), &["verify", package, "--against", &path, "--min-psnr", "50"]);
            println!("{said}");
            let rows: Vec<&str> = said.lines().filter(|line| line.ends_with(" dB")).collect();
            assert!(!rows.is_empty(), "{said}");
            for row in rows {
                let words: Vec<&str> = row.split_whitespace().rev().collect();
                let [half, single] = [words[1], words[3]].map(|number| number.parse::<f64>().unwrap());
                assert!(single > 100.0, "{row}");
                // In fp32 there is nothing to round to 16 bits.
                assert!(half >= single - 0.1 || !inputs_are_single(&read) || component.starts_with("text"), "{row}");
            }
            check_independently(package);
        }
    }
}

fn inputs_are_single(package: &Package) -> bool {
    declared(package.inputs()).iter().all(|input| input.contains("FLOAT32"))
}

#[test]
fn training_its_text_encoders_is_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    for command in ["check", "train"] {
        let output = palettist(folder.path(), &[command, &config, "train.train_text_encoder=true"]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && message.contains("train.train_text_encoder = true"),
            "{command}: {message}"
        );
        assert!(message.contains("Stable Diffusion XL"), "{command}: {message}");
    }
    assert!(!folder.path().join("run/cache").exists() && !folder.path().join("run/checkpoints").exists());
}
