//! What the commands say of models that are not what they take, of other people's folders and files, and what they make of
//! options about the model.

mod common;

use common::copy_folder;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use palettist::files::{TensorFile, write_safetensors};
use palettist::source::{Component, Model, copy_model};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");

/// A folder with a copy of the tiny pipeline, `model`, pictures and a config `run.toml` that names both.
struct Work {
    folder: tempfile::TempDir,
}

impl Work {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(Path::new(MODEL), &folder.path().join("model"));
        for (shade, name) in ["pictures/a", "pictures/b", "others/a", "others/b"].iter().enumerate() {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let picture = image::RgbImage::from_pixel(32, 32, image::Rgb([50 * shade as u8; 3]));
            picture.save(path.with_extension("png")).unwrap();
            fs::write(path.with_extension("txt"), "a cat").unwrap();
        }
        let config = "name = \"try\"\n[data]\nresolution = 32\ntrain_data_dir = \"pictures\"\nvalidation_data_dir = \"others\"\n\
                      [train]\nmax_train_steps = 1\n[model]\npretrained_model_name_or_path = \"model\"\n";
        fs::write(folder.path().join("run.toml"), config).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sets a key of a JSON file of the model.
    fn set(&self, file: &str, key: &str, value: Value) {
        let path = self.path("model").join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json[key] = value;
        fs::write(path, json.to_string()).unwrap();
    }

    /// Runs the program; (exit code, standard output, standard error).
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
        let output = command.args(arguments).current_dir(self.folder.path()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    /// What cannot be used.
    fn says(&self, arguments: &[&str], words: &[&str]) {
        self.ends(arguments, 1, words);
    }

    fn ends(&self, arguments: &[&str], expected: i32, words: &[&str]) {
        let (code, _, error) = self.run(arguments);
        assert_eq!(code, expected, "{arguments:?}: {error}");
        for word in words {
            assert!(error.contains(word), "{arguments:?}: `{word}` is not in: {error}");
        }
        assert!(!error.contains("internal error"), "{arguments:?}: {error}");
    }

    /// Every command that needs a text-to-image model refuses it in these words.
    fn all_say(&self, words: &[&str]) {
        for arguments in [
            &["check", "run.toml"][..],
            &["train", "run.toml"],
            &["analyze", "model", "--config", "run.toml", "-o", "recipe.toml", "--target-bits", "4"],
            &["evaluate", "model", "--config", "run.toml"],
            &["palettize", "model", "-o", "c.palettes.safetensors", "--bits", "2", "--calibrate", "run.toml"],
            &["generate", "model", "--prompt", "a", "-o", "a.png"],
        ] {
            self.says(arguments, words);
        }
        for written in ["recipe.toml", "c.palettes.safetensors", "a.png", "runs/try/model"] {
            assert!(!self.path(written).exists(), "{written}");
        }
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn models_that_are_not_text_to_image_are_refused_in_one_way() {
    let work = Work::new();
    for (channels, kind) in [(9, "an inpainting model"), (8, "InstructPix2Pix"), (5, "a depth-to-image model")] {
        // With weights of that shape: the channels are what is wrong.
        let path = work.path("model/unet/diffusion_pytorch_model.safetensors");
        let file = TensorFile::open(&Path::new(MODEL).join("unet/diffusion_pytorch_model.safetensors")).unwrap();
        let tensors: Vec<(String, Tensor)> = file
            .names()
            .into_iter()
            .map(|name| {
                let tensor = file.tensor(&name).unwrap();
                let wide = name == "conv_in.weight";
                let tensor = if wide { tensor.repeat([1, 3, 1, 1]).narrow(1, 0, channels) } else { tensor };
                (name, tensor)
            })
            .collect();
        let list = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&path, list, None, &Default::default()).unwrap();
        work.set("unet/config.json", "in_channels", json!(channels));
        work.all_say(&["model: the UNet takes", &format!("takes {channels} channels"), kind]);
    }
    // Palettes of such a UNet's weights are as good as any other's.
    let (code, _, error) = work.run(&["palettize", "model", "-o", "a.palettes.safetensors", "--bits", "2"]);
    assert_eq!(code, 0, "{error}");
}

#[test]
fn networks_that_do_not_fit_are_refused_by_all_commands() {
    let work = Work::new();
    work.set("text_encoder/config.json", "hidden_size", json!(16));
    let words = ["`cross_attention_dim` is 8", "`hidden_size` 16"];
    work.all_say(&words);
    work.says(&["export", "model", "-o", "out"], &words);
    work.says(&["export", "model", "-o", "folder", "--format", "diffusers"], &words);
    work.says(&["verify", "a.mlpackage", "--against", "model"], &words);
    assert!(!work.path("out").exists() && !work.path("folder").exists());
}

#[test]
fn a_configuration_that_is_not_supported_is_named_once_by_all_commands() {
    let work = Work::new();
    work.set("vae/config.json", "latents_mean", json!([0.1, 0.1, 0.1, 0.1]));
    let words = "model/vae/config.json: AutoencoderKL: config.json has `latents_mean`";
    work.all_say(&[words]);
    for arguments in [&["export", "model", "-o", "e"][..], &["verify", "e", "--against", "model"]] {
        let (code, _, error) = work.run(arguments);
        assert!(code == 1 && error.starts_with(&format!("error: {words}")), "{arguments:?}: {error}");
    }
}

#[test]
fn schedules_that_are_not_supported_are_refused_by_all_commands() {
    let work = Work::new();
    let cases = [
        ("prediction_type", json!("sample"), &["`prediction_type`", "sample"][..]),
        (
            "rescale_betas_zero_snr",
            json!(true),
            &["rescale_betas_zero_snr", "epsilon", "--prediction-type v_prediction"],
        ),
        ("num_train_timesteps", json!(1_000_000_000_000_000i64), &["`num_train_timesteps`", "100000"]),
    ];
    for (key, value, words) in cases {
        let scheduler = work.path("model/scheduler/scheduler_config.json");
        let before = fs::read(&scheduler).unwrap();
        work.set("scheduler/scheduler_config.json", key, value);
        work.all_say(words);
        work.says(&["export", "model", "-o", "out"], words);
        fs::write(scheduler, before).unwrap();
    }
}

#[test]
fn what_a_run_could_not_draw_or_palettize_is_refused_before_it_begins() {
    let both = |work: &Work, overrides: &[&str], code: i32, words: &[&str]| {
        for command in ["check", "train"] {
            work.ends(&[&[command, "run.toml"][..], overrides].concat(), code, words);
        }
    };
    let work = Work::new();
    let drawing = ["sample.prompts=[\"a cat\"]", "sample.sample_every_n_steps=1"];
    work.set("scheduler/scheduler_config.json", "timestep_spacing", json!("weird"));
    both(&work, &drawing, 1, &["timestep_spacing", "weird", "sample.sample_steps"]);
    // What the config asks of the model ends as what is wrong in it by itself.
    both(&Work::new(), &["palettize.weight_threshold=100000000"], 2, &["no layer of the UNet would get a palette"]);
    let unmatched = "palettize.overrides=[{match=\"no.such.*\", skip=true}]";
    both(&Work::new(), &[unmatched], 2, &["match = \"no.such.*\" is not a weight of this UNet"]);
    let steps = ["sample.prompts=[\"a cat\"]", "sample.sample_every_n_steps=1", "sample.sample_steps=1000"];
    let work = Work::new();
    work.set("scheduler/scheduler_config.json", "num_train_timesteps", json!(500));
    both(&work, &steps, 2, &["sample.sample_steps = 1000", "500"]);
    if !tch::Cuda::is_available() {
        both(&Work::new(), &["train.device=cuda"], 2, &["`train.device` is \"cuda\", but libtorch finds no CUDA GPU"]);
    }
    let work = Work::new();
    work.set("vae/config.json", "scaling_factor", json!(0.0));
    work.all_say(&["`scaling_factor`: 0", "must be above 0"]);
}

/// diffusers takes a null for a value and fails on it, or computes something else: it is not the default.
#[test]
fn nulls_are_no_defaults() {
    for (file, key, words) in [
        ("scheduler/scheduler_config.json", "beta_start", "`beta_start` is null"),
        ("unet/config.json", "norm_num_groups", "`norm_num_groups`: null"),
        ("vae/config.json", "scaling_factor", "`scaling_factor`: null"),
        ("text_encoder/config.json", "num_hidden_layers", "`num_hidden_layers`: null"),
    ] {
        let work = Work::new();
        work.set(file, key, Value::Null);
        work.all_say(&[words, "the key left out"].map(|word| match word {
            "the key left out" if file != "scheduler/scheduler_config.json" => "or no such key",
            word => word,
        }));
    }
}

/// A model that was saved as a pipeline for something else draws from texts if its UNet does, and that is said.
#[test]
fn other_pipelines_are_named() {
    let work = Work::new();
    let named = "model was saved as a StableDiffusionInpaintPipeline: its UNet, autoencoder and text encoders are used";
    let check = ["check", "run.toml", "--no-estimate"];
    assert!(!work.run(&check).2.contains("was saved as"));
    work.set("model_index.json", "_class_name", json!("StableDiffusionInpaintPipeline"));
    let (code, _, error) = work.run(&check);
    assert!(code == 0 && error.matches(named).count() == 1, "{error}");
    let (code, _, error) = work.run(&["export", "model", "-o", "out", "--component", "text_encoder"]);
    assert!(code == 0 && error.contains(named), "{error}");
    work.set("model_index.json", "_class_name", json!(["mine", "Pipeline"]));
    assert!(work.run(&check).2.contains("was saved as a [\"mine\",\"Pipeline\"]"));
    work.set("model_index.json", "_class_name", json!("StableDiffusionXLPipeline"));
    let (_, _, error) = work.run(&check);
    assert!(
        error.contains(
            "names StableDiffusionXLPipeline, but one text encoder: it is taken as a Stable Diffusion 1 or 2"
        )
    );
}

/// Of a whole file and shards, and of several variants, one is taken, and it is said which.
#[test]
fn the_file_that_is_taken_of_several_is_told() {
    let work = Work::new();
    let unet = work.path("model/unet");
    let whole = unet.join("diffusion_pytorch_model.safetensors");
    let export = |to: &str| {
        let (code, _, error) = work.run(&["export", "model", "-o", to]);
        assert_eq!(code, 0, "{error}");
        error
    };
    assert!(!export("a").contains("holds"));
    for name in ["fp16", "ema"] {
        fs::copy(&whole, unet.join(format!("diffusion_pytorch_model.{name}.safetensors"))).unwrap();
    }
    assert!(!export("b").contains("holds"), "full precision beside its variants");
    let index = json!({"weight_map": {"conv_in.weight": "shard.safetensors"}}).to_string();
    fs::write(unet.join("diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
    fs::copy(&whole, unet.join("shard.safetensors")).unwrap();
    let said = "holds diffusion_pytorch_model.safetensors.index.json and diffusion_pytorch_model.safetensors: the first is used";
    assert!(export("c").contains(said));
    fs::remove_file(unet.join("diffusion_pytorch_model.safetensors.index.json")).unwrap();
    fs::remove_file(&whole).unwrap();
    let said =
        "holds diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.ema.safetensors: the first is used";
    assert!(export("d").contains(said));
}

/// A tokenizer that is missing is one mistake.
#[test]
fn a_tokenizer_that_is_missing_is_told_once() {
    let work = Work::new();
    fs::remove_dir_all(work.path("model/tokenizer")).unwrap();
    let (code, _, error) = work.run(&["check", "run.toml", "--no-estimate"]);
    assert!(code == 1 && error.matches("tokenizer").count() >= 1 && error.lines().count() == 1, "{error}");
}

#[test]
fn options_about_the_model_are_honoured() {
    let work = Work::new();
    let scheduler = |folder: &str| json_of(&work.path(folder).join("scheduler/scheduler_config.json"));
    let export = |to: &str, options: &[&str]| {
        let arguments = [&["export", "model", "-o", to, "--format", "diffusers"][..], options].concat();
        let (code, _, error) = work.run(&arguments);
        assert_eq!(code, 0, "{error}");
    };
    export("plain", &[]);
    assert_eq!(scheduler("plain")["prediction_type"], "epsilon");
    export("v", &["--prediction-type", "v_prediction", "--rescale-betas-zero-snr", "true"]);
    assert_eq!(scheduler("v")["prediction_type"], "v_prediction");
    assert_eq!(scheduler("v")["rescale_betas_zero_snr"], true);
    assert_eq!(scheduler("v")["_class_name"], scheduler("plain")["_class_name"]);

    // The loss is another for another target; the config's keys and the flags are one and the same.
    let loss = |options: &[&str]| {
        let arguments =
            [&["evaluate", "model", "--config", "run.toml", "--json", "--device", "cpu"][..], options].concat();
        let (code, out, error) = work.run(&arguments);
        assert_eq!(code, 0, "{error}");
        serde_json::from_str::<Value>(&out).unwrap()["float"].as_f64().unwrap()
    };
    let (epsilon, v) = (loss(&[]), loss(&["--prediction-type", "v_prediction"]));
    assert!((epsilon - v).abs() > 1e-3, "{epsilon} {v}");

    // What the config says of the model holds where no option does; said once.
    assert_eq!(loss(&["model.prediction_type=v_prediction"]), v);
    let by_option = loss(&["--prediction-type", "epsilon", "model.prediction_type=v_prediction"]);
    assert_eq!(by_option, epsilon);

    let train = |name: &str, overrides: &[&str]| {
        let name = format!("name={name}");
        let (code, _, error) =
            work.run(&[&["train", "run.toml", &name, "export.coreml=false"][..], overrides].concat());
        assert_eq!(code, 0, "{error}");
    };
    train("kept", &[]);
    train("said", &["model.prediction_type=v_prediction", "model.rescale_betas_zero_snr=true", "model.vae=v/vae"]);
    assert_eq!(scheduler("runs/kept/model")["prediction_type"], "epsilon");
    assert_eq!(scheduler("runs/said/model")["prediction_type"], "v_prediction");
    assert_eq!(scheduler("runs/said/model")["rescale_betas_zero_snr"], true);

    work.ends(
        &["generate", "model", "--revision", "main", "--prompt", "a", "-o", "a.png"],
        2,
        &["on this disk", "main"],
    );
    // A scheduler that does not know the key gives way, in the index too.
    work.set("scheduler/scheduler_config.json", "_class_name", json!("PNDMScheduler"));
    work.set("model_index.json", "scheduler", json!(["diffusers", "PNDMScheduler"]));
    export("pndm", &["--prediction-type", "v_prediction", "--rescale-betas-zero-snr", "true"]);
    assert_eq!(scheduler("pndm")["_class_name"], "DDIMScheduler");
    assert_eq!(json_of(&work.path("pndm/model_index.json"))["scheduler"], json!(["diffusers", "DDIMScheduler"]));

    // Without an effect they are refused.
    for (arguments, option) in [
        (&["verify", "a.mlpackage", "--vae", "x"][..], "--vae"),
        (&["export", "model", "-o", "out", "--vae", "v"], "--vae"),
        (
            &["export", "model", "-o", "out", "--component", "vae_decoder", "--prediction-type", "epsilon"],
            "--prediction-type",
        ),
        (&["palettize", "model", "-o", "a.palettes.safetensors", "--bits", "2", "--vae", "v"], "--vae"),
    ] {
        let (code, _, error) = work.run(arguments);
        assert!(code == 2 && error.contains(option), "{arguments:?}: {error}");
    }
}

#[test]
fn a_terminal_gets_no_escape_codes_from_files() {
    let work = Work::new();
    let path = work.path("a.safetensors");
    let tensor = Tensor::zeros([1], (Kind::Half, Device::Cpu));
    let name = "model.diffusion_model.\x1b[31mred\x07.weight";
    write_safetensors(&path, [(name, &tensor), ("x\x1b]0;title\x07", &tensor)], None, &Default::default()).unwrap();
    work.set("unet/config.json", "act_fn", json!("\x1b[2Jrelu"));
    for arguments in [
        &["inspect", "a.safetensors"][..],
        &["generate", "a.safetensors", "--prompt", "a", "-o", "a.png"],
        &["check", "run.toml"],
        &["generate", "no\x1b[31m/such", "--prompt", "a", "-o", "a.png"],
    ] {
        let (_, out, error) = work.run(arguments);
        assert!(!(out.clone() + &error).contains(['\x1b', '\x07']), "{arguments:?}: {out}{error}");
        assert!((out + &error).contains("\\u001b"), "{arguments:?}");
    }
}

#[test]
fn absurd_configurations_are_refused_at_once() {
    let cases = [
        ("text_encoder/config.json", "num_hidden_layers", json!(16_000_000)),
        ("text_encoder/config.json", "hidden_size", json!(1i64 << 40)),
        ("unet/config.json", "block_out_channels", json!(vec![8; 70])),
        ("unet/config.json", "down_block_types", json!(vec!["DownBlock2D"; 70])),
        ("unet/config.json", "layers_per_block", json!(16_000_000)),
        ("unet/config.json", "transformer_layers_per_block", json!(16_000_000)),
        ("vae/config.json", "layers_per_block", json!(16_000_000)),
        ("vae/config.json", "latent_channels", json!(i64::MAX)),
    ];
    for (file, key, value) in cases {
        let work = Work::new();
        work.set(file, key, value);
        let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
        let mut child = command.args(["check", "run.toml"]).current_dir(work.folder.path());
        child = child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        let mut child = child.spawn().unwrap();
        // Far longer than reading takes, far shorter than declaring what they ask for.
        let mut waited = 0;
        while child.try_wait().unwrap().is_none() {
            waited += 1;
            assert!(waited < 600, "{file}: {key} is not refused");
            std::thread::sleep(Duration::from_millis(100));
        }
        let error = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert!(error.contains(key) && error.lines().all(|line| line.len() < 1000), "{key}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_out_of_a_models_folder_is_refused_before_the_work() {
    let work = Work::new();
    fs::write(work.path("secret"), "secret").unwrap();
    std::os::unix::fs::symlink(work.path("secret"), work.path("model/tokenizer/notes.txt")).unwrap();
    let words = ["notes.txt is a link to", "out of the model's folder"];
    work.says(&["check", "run.toml"], &words);
    work.says(&["train", "run.toml"], &words);
    work.says(&["export", "model", "-o", "copy", "--format", "diffusers"], &words);
    assert!(!work.path("copy").exists());
}

#[test]
fn a_copy_of_a_pipeline_with_other_parts_is_one_that_diffusers_loads() {
    let work = Work::new();
    let copied = |name: &str| {
        let to = work.path(name);
        copy_model(&Model::open(work.path("model").to_str().unwrap()).unwrap(), &to, &[], Kind::Half).unwrap();
        let index = json_of(&to.join("model_index.json"));
        // Whatever the index names is there.
        for (part, value) in index.as_object().unwrap() {
            if value.as_array().is_some_and(|pair| pair[0].is_string()) {
                assert!(to.join(part).is_dir(), "{part}");
            }
        }
        index
    };
    // A depth pipeline without its estimator: a plain one.
    let index = "model_index.json";
    work.set(index, "_class_name", json!("StableDiffusionDepth2ImgPipeline"));
    work.set(index, "depth_estimator", json!(["transformers", "DPTForDepthEstimation"]));
    work.set(index, "feature_extractor", json!(["transformers", "DPTImageProcessor"]));
    let plain = copied("plain");
    assert_eq!(plain["_class_name"], "StableDiffusionPipeline");
    assert_eq!((plain.get("depth_estimator"), &plain["feature_extractor"]), (None, &json!([null, null])));
    // With them: as it was, and they are there.
    for (part, file) in [("depth_estimator", "config.json"), ("feature_extractor", "preprocessor_config.json")] {
        fs::create_dir(work.path("model").join(part)).unwrap();
        fs::write(work.path("model").join(part).join(file), "{}").unwrap();
    }
    let whole = copied("whole");
    assert_eq!(whole["_class_name"], "StableDiffusionDepth2ImgPipeline");
    assert_eq!(whole["depth_estimator"], json!(["transformers", "DPTForDepthEstimation"]));
    assert!(work.path("whole/feature_extractor/preprocessor_config.json").is_file());
    // A name that would lead out of the copy.
    work.set(index, "../outside", json!(["diffusers", "ControlNetModel"]));
    fs::create_dir(work.path("outside")).unwrap();
    let refused =
        copy_model(&Model::open(work.path("model").to_str().unwrap()).unwrap(), &work.path("c"), &[], Kind::Half);
    assert!(format!("{:#}", refused.unwrap_err()).contains("`../outside`"));
    assert!(!work.path("c").exists());
    work.set(index, "../outside", Value::Null);
    // A ControlNet's pipeline without the safety checker that its index names.
    work.set(index, "_class_name", json!("StableDiffusionControlNetPipeline"));
    work.set(index, "depth_estimator", Value::Null);
    work.set(index, "controlnet", json!(["diffusers", "ControlNetModel"]));
    work.set(index, "safety_checker", json!(["stable_diffusion", "StableDiffusionSafetyChecker"]));
    fs::create_dir(work.path("model/controlnet")).unwrap();
    fs::write(work.path("model/controlnet/config.json"), "{}").unwrap();
    let control = copied("control");
    assert_eq!(control["_class_name"], "StableDiffusionControlNetPipeline");
    assert_eq!(control["safety_checker"], json!([null, null]));
    assert!(work.path("control/controlnet/config.json").is_file());
}

#[test]
fn folders_that_are_no_model_are_named_for_what_they_are() {
    let work = Work::new();
    let folder = work.path("other");
    fs::create_dir(&folder).unwrap();
    for (config, words) in [
        (r#"{"_class_name": "ControlNetModel"}"#, "goes with a model"),
        (r#"{"_class_name": "AutoencoderKL"}"#, "--vae"),
        (r#"{"architectures": ["CLIPTextModel"]}"#, "give the folder above it"),
        (r#"{"_class_name": "FluxTransformer2DModel"}"#, "is not supported"),
    ] {
        fs::write(folder.join("config.json"), config).unwrap();
        work.says(&["generate", "other", "--prompt", "a", "-o", "a.png"], &["other is not a diffusers folder", words]);
    }
    fs::write(folder.join("config.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    work.says(&["generate", "other", "--prompt", "a", "-o", "a.png"], &["config.json is a Git LFS pointer"]);
    // What a LoRA that was not merged leaves.
    let path = work.path("model/unet/diffusion_pytorch_model.safetensors");
    let model = Model::open(MODEL).unwrap().weights(Component::Unet, Kind::Half, Device::Cpu).unwrap();
    let renamed: Vec<(String, &Tensor)> = model
        .iter()
        .map(|(name, tensor)| (name.replace("attn1.to_q.weight", "attn1.to_q.base_layer.weight"), tensor))
        .collect();
    let list = renamed.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    write_safetensors(&path, list, None, &Default::default()).unwrap();
    work.says(&["check", "run.toml"], &["base_layer", "fuse_lora"]);
}

#[test]
fn a_pickle_in_a_folder_gets_advice_that_keeps_all_parts() {
    let work = Work::new();
    fs::rename(work.path("model/text_encoder/model.safetensors"), work.path("model/text_encoder/pytorch_model.bin"))
        .unwrap();
    work.says(&["check", "run.toml"], &["pytorch_model.bin is a pickle", "import DiffusionPipeline"]);
}
