//! Text to image against diffusers' `StableDiffusionPipeline` on a tiny random model (`tests/oracle/pipeline.py`), and
//! the command.

mod common;

use common::copy_folder;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use palettist::cli::generate;
use palettist::diffusion::{Noise, SamplerKind};
use palettist::files::{TensorFile, write_safetensors};
use palettist::palette::{Palette, PalettizedCheckpoint};
use palettist::pipeline::{Pipeline, Request};
use palettist::report::pictures;
use palettist::source::{Component, Model};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipeline").join(name)
}

fn model_path() -> String {
    fixture("model").display().to_string()
}

fn pipeline() -> Pipeline {
    let model = Model::open(&model_path()).expect("the model");
    Pipeline::load(&model, None, Kind::Float, Device::Cpu).expect("the pipeline")
}

fn expected(name: &str) -> Tensor {
    tensor("expected.safetensors", name)
}

fn tensor(file: &str, name: &str) -> Tensor {
    TensorFile::open(&fixture(file)).and_then(|file| file.tensor(name)).expect("a fixture")
}

fn prompts() -> (String, String) {
    let text = std::fs::read_to_string(fixture("prompts.json")).expect("the prompts");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let text = |key: &str| json[key].as_str().expect("a text").to_owned();
    (text("prompt"), text("negative_prompt"))
}

fn request(sampler: Option<SamplerKind>) -> Request {
    let (prompt, negative_prompt) = prompts();
    Request {
        prompt,
        negative_prompt,
        sampler,
        noise: Noise::Latents(expected("noise"), 0),
        images: 2,
        ..Request::default()
    }
}

/// |a − b| / |b|, in the Euclidean norm.
fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((a - &b).norm() / b.norm()).double_value(&[])
}

#[test]
fn latents_are_those_of_diffusers() {
    let mut pipeline = pipeline();
    for prediction in ["epsilon", "v_prediction"] {
        pipeline.scheduler_config["prediction_type"] = json!(prediction);
        for name in ["ddim", "pndm", "euler", "dpmpp_2m"] {
            let kind = name.parse().expect("a sampler");
            let drawn = pipeline.generate(&request(Some(kind)), &mut |_, _| Ok(())).expect("latents");
            let error = relative_error(&drawn.latents, &expected(&format!("{name}.{prediction}")));
            println!("{name} {prediction}: relative error {error:.1e}");
            assert!(error < 1e-4, "{name} {prediction}: relative error {error:e}");
        }
    }
}

/// The model's own sampler, whatever class wrote the file.
#[test]
fn latents_of_the_models_own_scheduler_are_those_of_diffusers() {
    let mut pipeline = pipeline();
    let config = pipeline.scheduler_config.clone();
    for (class, kind) in [
        ("LMSDiscreteScheduler", "lms"),
        ("HeunDiscreteScheduler", "heun"),
        ("KDPM2DiscreteScheduler", "dpm_2"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("DPMSolverMultistepScheduler+use_karras_sigmas", "dpmpp_2m_karras"),
        ("UniPCMultistepScheduler", "unipc"),
    ] {
        for prediction in ["epsilon", "v_prediction"] {
            let mut keys = class.split('+');
            pipeline.scheduler_config = config.clone();
            pipeline.scheduler_config["_class_name"] = json!(keys.next());
            pipeline.scheduler_config["prediction_type"] = json!(prediction);
            keys.for_each(|key| pipeline.scheduler_config[key] = json!(true));
            let own = pipeline.own_sampler();
            assert_eq!((own.kind.name(), own.warning), (kind, None));
            let drawn = pipeline.generate(&request(None), &mut |_, _| Ok(())).expect("latents");
            let error =
                relative_error(&drawn.latents, &tensor("samplers.safetensors", &format!("{class}.{prediction}")));
            println!("{class} {prediction}: relative error {error:.1e}");
            assert!(error < 1e-4, "{class} {prediction}: relative error {error:e}");
        }
    }
}

#[test]
fn added_noise_depends_on_seed_and_picture_only() {
    let pipeline = pipeline();
    for name in ["ddpm", "euler_a", "dpm_2_a", "dpmpp_2m_sde_karras", "dpmpp_sde", "lcm"] {
        let draw = |noise: Noise, images: usize, batch: usize| {
            let sampler = Some(name.parse().expect("a sampler"));
            let request = Request { steps: 4, noise, images, batch, size: Some((32, 32)), ..request(sampler) };
            pipeline.generate(&request, &mut |_, _| Ok(())).expect("latents").latents
        };
        let together = draw(Noise::Seed(3), 3, 3);
        assert!(relative_error(&draw(Noise::Seed(3), 3, 1), &together) < 1e-4, "{name}: batch");
        assert!(relative_error(&draw(Noise::Seed(3), 2, 2), &together.narrow(0, 0, 2)) < 1e-4, "{name}: number");
        let seeds = draw(Noise::Seeds(vec![8, 3]), 2, 2);
        assert!(relative_error(&seeds.narrow(0, 1, 1), &together.narrow(0, 0, 1)) < 1e-4, "{name}: seeds");
        assert!(relative_error(&seeds.narrow(0, 0, 1), &together.narrow(0, 0, 1)) > 1e-2, "{name}: another seed");
        // The same beginning, other noise on the way.
        let same = |seed: u64| draw(Noise::Latents(expected("noise").narrow(2, 0, 4).narrow(3, 0, 4), seed), 2, 2);
        assert!(relative_error(&same(1), &same(2)) > 1e-2, "{name}: the seed of the added noise");
    }
}

#[test]
fn pictures_are_those_of_diffusers_and_do_not_depend_on_the_batch() {
    let pipeline = pipeline();
    assert_eq!(pipeline.own_sampler().kind, SamplerKind::Pndm);
    let mut calls = Vec::new();
    let one_by_one = Request { batch: 1, ..request(None) };
    let drawn = pipeline
        .generate(&one_by_one, &mut |done, total| {
            calls.push((done, total));
            Ok(())
        })
        .expect("pictures");
    assert_eq!(calls, (0..=52).map(|done| (done, 52)).collect::<Vec<_>>(), "26 evaluations for each of 2 pictures");
    for (image, wanted) in drawn.images.unbind(0).iter().zip(expected("pictures").unbind(0)) {
        let rgb = pictures::from_tensor(image).expect("a picture").into_raw();
        let wanted = Vec::<u8>::try_from(wanted.contiguous().flatten(0, -1)).expect("bytes");
        assert_eq!(rgb.len(), wanted.len());
        let off = rgb.iter().zip(&wanted).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(off <= Some(1), "{off:?} levels off");
    }
    let unguided = Request { guidance_scale: 1.0, ..request(None) };
    let drawn = pipeline.generate(&unguided, &mut |_, _| Ok(())).expect("pictures");
    let error = relative_error(&drawn.latents, &expected("unguided"));
    assert!(error < 1e-4, "without guidance: relative error {error:e}");
}

/// The command line as clap reads it.
#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: generate::Args,
}

fn run(arguments: &[&str]) -> anyhow::Result<()> {
    let line = CommandLine::try_parse_from([&["generate"], arguments].concat())?;
    generate::run(line.args)
}

#[test]
fn the_command_writes_pictures_and_latents() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (prompt, negative) = prompts();
    write_safetensors(Path::new(&path("in.safetensors")), [("latents", &expected("noise"))], None, &Default::default())
        .expect("the noise");
    run(&[
        &model_path(),
        "--prompt",
        &prompt,
        "--negative-prompt",
        &negative,
        "-o",
        &path("out.png"),
        "--scheduler",
        "euler",
        "--latents",
        &path("in.safetensors"),
        "--save-latents",
        &path("out.safetensors"),
        "--device",
        "cpu",
    ]) // fmt: skip
    .expect("pictures");
    let latents =
        TensorFile::open(Path::new(&path("out.safetensors"))).and_then(|f| f.tensor("latents")).expect("latents");
    assert!(relative_error(&latents, &expected("euler.epsilon")) < 1e-4);
    for name in ["out-0.png", "out-1.png"] {
        let picture = image::open(path(name)).expect("a picture");
        assert_eq!((picture.width(), picture.height()), (48, 64));
    }
    // The seed's first picture does not depend on how many are drawn.
    let common = ["--prompt", &prompt, "--steps", "2", "--width", "32", "--seed", "5", "--device", "cpu"];
    run(&[&[model_path().as_str(), "-o", &path("two.png"), "--num-images", "2"], &common[..]].concat()).expect("two");
    run(&[&[model_path().as_str(), "-o", &path("new/one.png")], &common[..]].concat()).expect("one");
    let one = image::open(path("new/one.png")).expect("a picture").to_rgb8();
    assert_eq!(one.dimensions(), (32, 64));
    let two = image::open(path("two-0.png")).expect("a picture").to_rgb8();
    let off = one.as_raw().iter().zip(two.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(off <= Some(1), "{off:?} levels off");
    assert_ne!(two.as_raw(), image::open(path("two-1.png")).expect("a picture").to_rgb8().as_raw());
}

#[test]
fn palettes_stand_in_place_of_the_unet() {
    let model = Model::open(&model_path()).expect("the model");
    let mut checkpoint = PalettizedCheckpoint::default();
    let weights = model.weights(Component::Unet, Kind::Half, Device::Cpu).expect("weights");
    for (name, tensor) in weights {
        if name == "conv_out.weight" {
            // A palette of two values: the output is then another.
            let entries = vec![half::f16::from_f32(-0.1), half::f16::from_f32(0.1)];
            let indices = Vec::<u8>::try_from(tensor.gt(0.0).to_kind(Kind::Uint8).flatten(0, -1)).expect("bytes");
            let palette = Palette::new(1, tensor.size(), indices, entries).expect("a palette");
            checkpoint.palettes.insert(name, palette);
        } else {
            checkpoint.dense.insert(name, tensor);
        }
    }
    let wanted = {
        let mut pipeline = pipeline();
        let sign = pipeline.unet["conv_out.weight"].gt(0.0).to_kind(Kind::Float);
        let values = half::f16::from_f32(0.1).to_f64();
        pipeline.unet.insert("conv_out.weight".into(), sign * (2.0 * values) - values);
        pipeline.generate(&request(None), &mut |_, _| Ok(())).expect("latents").latents
    };
    let palettized = Pipeline::load(&model, Some(&checkpoint), Kind::Float, Device::Cpu).expect("a pipeline");
    let drawn = palettized.generate(&request(None), &mut |_, _| Ok(())).expect("latents");
    assert!(relative_error(&drawn.latents, &wanted) < 1e-5);
    assert!(relative_error(&drawn.latents, &expected("pndm.epsilon")) > 1e-2);

    let _conv_in = checkpoint.dense.remove("conv_in.bias");
    let error = Pipeline::load(&model, Some(&checkpoint), Kind::Float, Device::Cpu).err().expect("an error");
    assert!(format!("{error:#}").contains("conv_in.bias"), "{error:#}");
}

#[test]
fn bad_input_gets_one_line_and_writes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let flat = Tensor::zeros([4, 8, 6], (Kind::Float, Device::Cpu));
    let nan = Tensor::full([1, 4, 8, 6], f64::NAN, (Kind::Float, Device::Cpu));
    for (file, name, tensor) in [
        ("other.safetensors", "noise", &expected("noise")),
        ("good.safetensors", "latents", &expected("noise")),
        ("flat.safetensors", "latents", &flat),
        ("nan.safetensors", "latents", &nan),
    ] {
        write_safetensors(Path::new(&path(file)), [(name, tensor)], None, &Default::default()).expect("a file");
    }
    std::fs::write(path("cut.safetensors"), b"\x40\0\0\0\0\0\0\0{").expect("a file");
    let (model, out) = (model_path(), path("out.png"));
    for (arguments, part) in [
        (&["--height", "60"][..], "multiple of 8"),
        (&["--steps", "0"], "--steps 0"),
        (&["--steps", "2000"], "1 to 1000"),
        (&["--num-images", "0"], "--num-images 0"),
        (&["--scheduler", "deis"], "dpmpp_2m"),
        (&["--device", "tpu"], "auto, cpu, cuda and mps"),
        (&["--precision", "int8"], "fp32, bf16 and fp16"),
        (&["--guidance-scale", "nan"], "--guidance-scale"),
        (&["--palettes", "missing.palettes.safetensors"], "missing.palettes.safetensors"),
        (&["--latents", &path("missing.safetensors")], "missing.safetensors"),
        (&["--latents", &path("cut.safetensors")], "cut.safetensors"),
        (&["--latents", &path("other.safetensors")], "it has: noise"),
        (&["--latents", &format!("{model}/unet/diffusion_pytorch_model.safetensors")], " more"),
        (&["--latents", &path("flat.safetensors")], "[4, 8, 6]"),
        (&["--latents", &path("nan.safetensors")], "not all finite"),
        (&["--latents", &path("good.safetensors"), "--num-images", "3"], "latents for 2"),
        (&["--latents", &path("good.safetensors"), "--height", "128"], "64 × 48 pixels"),
        (&["--save-latents", &path("out.pt")], ".safetensors"),
        (&["--save-latents", &path("cut.safetensors/out.safetensors")], "cannot be written"),
    ] {
        let line = [&[model.as_str(), "--prompt", "a fox", "-o", &out], arguments].concat();
        let error = run(&line).expect_err(part);
        let message = format!("{error:#}");
        assert!(message.contains(part), "{arguments:?}: `{message}` should speak of {part}");
        assert!(!Path::new(&out).exists(), "{arguments:?} wrote a picture");
    }
    let message =
        run(&[&model_path(), "--prompt", "a fox", "-o", &path("out.jpeg")]).expect_err("an error").to_string();
    assert!(message.contains(".png"), "{message}");
    let message = run(&["nowhere/at/all", "--prompt", "a fox", "-o", &out]).expect_err("an error").to_string();
    assert!(message.contains("nowhere/at/all"), "{message}");
}

#[test]
fn scheduler_files_with_infinities_are_read() {
    let folder = tempfile::tempdir().expect("a folder");
    for part in ["unet", "scheduler"] {
        std::fs::create_dir(folder.path().join(part)).expect("a folder");
    }
    let file = folder.path().join("scheduler/scheduler_config.json");
    std::fs::write(&file, r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#)
        .expect("a file");
    let model = Model::open(&folder.path().display().to_string()).expect("a model");
    let config = model.scheduler_config().expect("a configuration");
    palettist::diffusion::Sampler::new(SamplerKind::DpmppTwoM, &config, 5).expect("a sampler");
    std::fs::write(&file, "{").expect("a file");
    let message = format!("{:#}", model.scheduler_config().expect_err("an error"));
    assert!(message.contains("scheduler_config.json is not JSON"), "{message}");
}

/// The tiny model with another scheduler, and its standard error and exit code when it draws.
fn draw_with(scheduler: Value, arguments: &[&str]) -> (i32, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    copy_folder(&fixture("model"), &model);
    set_scheduler(&model, &scheduler);
    let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
        .args(["generate", "model", "--prompt", "a fox", "-o", "out.png", "--steps", "3", "--device", "cpu"])
        .args(["--width", "32", "--height", "32"])
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .expect("the program");
    (output.status.code().expect("a code"), String::from_utf8(output.stderr).expect("text"))
}

/// Gives a model another scheduler, in its index too.
fn set_scheduler(model: &Path, scheduler: &Value) {
    std::fs::write(model.join("scheduler/scheduler_config.json"), scheduler.to_string()).expect("a file");
    let index = model.join("model_index.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&index).expect("an index")).expect("JSON");
    json["scheduler"] = json!(["diffusers", scheduler["_class_name"]]);
    std::fs::write(index, json.to_string()).expect("a file");
}

/// Where the index and the scheduler's own file name two classes, diffusers makes the first.
#[test]
fn the_scheduler_is_the_one_that_the_index_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    copy_folder(&fixture("model"), &model);
    let other = scheduler("DDIMScheduler", json!({}));
    std::fs::write(model.join("scheduler/scheduler_config.json"), other.to_string()).expect("a file");
    let opened = Model::open(&model.display().to_string()).expect("a model");
    assert_eq!(opened.scheduler_config().expect("a configuration")["_class_name"], "PNDMScheduler");
    let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
        .args([
            "generate", "model", "--prompt", "a", "-o", "out.png", "--steps", "2", "--width", "32", "--height", "32",
        ])
        .current_dir(folder.path())
        .output()
        .expect("the program");
    let told = String::from_utf8(output.stderr).expect("text");
    let expected = "note: model: model_index.json names the scheduler \"PNDMScheduler\" and scheduler_config.json \
                    \"DDIMScheduler\": the first is used, as diffusers does";
    assert!(output.status.success() && told.matches(expected).count() == 1, "{told}");
}

/// An autoencoder that is damaged or overflows writes no black picture.
#[test]
fn a_picture_that_is_not_finite_is_not_written() {
    let mut pipeline = pipeline();
    let bias = pipeline.autoencoder.get_mut("decoder.conv_in.bias").expect("a bias");
    let _ = bias.get(0).fill_(f64::INFINITY);
    let request = Request { steps: 1, ..request(None) };
    let error = pipeline.generate(&request, &mut |_, _| Ok(())).map(drop).expect_err("an error").to_string();
    assert!(error.contains("the picture is not finite: the autoencoder's `decoder.conv_in.bias` holds"), "{error}");
    let weights = &mut pipeline.text_encoders[0].weights;
    let bias = weights.get_mut("text_model.encoder.layers.0.mlp.fc2.bias").expect("a bias");
    let sound = bias.copy();
    let _ = bias.get(0).fill_(f64::INFINITY);
    let error = pipeline.generate(&request, &mut |_, _| Ok(())).map(drop).expect_err("an error").to_string();
    assert!(
        error.contains("the latents are not finite: the text encoder's `text_model.encoder.layers.0.mlp.fc2.bias`"),
        "{error}"
    );
    let weights = &mut pipeline.text_encoders[0].weights;
    weights.insert("text_model.encoder.layers.0.mlp.fc2.bias".to_owned(), sound);
    let bias = pipeline.unet.get_mut("mid_block.resnets.0.conv1.bias").expect("a bias");
    let _ = bias.get(0).fill_(f64::NAN);
    let error = pipeline.generate(&request, &mut |_, _| Ok(())).map(drop).expect_err("an error").to_string();
    assert!(error.contains("the latents are not finite: the UNet's `mid_block.resnets.0.conv1.bias` holds"), "{error}");
}

fn scheduler(class: &str, added: Value) -> Value {
    let text = std::fs::read_to_string(fixture("model/scheduler/scheduler_config.json")).expect("the scheduler");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["_class_name"] = json!(class);
    for (key, value) in added.as_object().expect("keys") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn schedulers_that_are_there_draw_and_others_are_named() {
    let (code, error) = draw_with(scheduler("LCMScheduler", json!({"original_inference_steps": 50})), &[]);
    assert!(code == 0 && error.contains("note: models for the sampler `lcm`") && !error.contains("warning"), "{error}");
    let (code, error) = draw_with(scheduler("LCMScheduler", json!({})), &["--guidance-scale", "1.5"]);
    assert!(code == 0 && !error.contains("note:"), "{error}");
    let (code, error) = draw_with(scheduler("TCDScheduler", json!({})), &[]);
    assert_eq!(code, 0, "{error}");
    assert_eq!(error.matches("warning: ").count(), 1, "{error}");
    assert!(error.contains("TCDScheduler, is not in this version; the sampler `ddim` is used instead"), "{error}");
    let thresholding = scheduler("UniPCMultistepScheduler", json!({"thresholding": true}));
    let (code, error) = draw_with(thresholding.clone(), &[]);
    assert!(code == 0 && error.contains("warning: ") && error.contains("`thresholding` is true"), "{error}");
    // Asked for by name, an option that is not there is an error.
    let (code, error) = draw_with(thresholding, &["--scheduler", "unipc"]);
    assert!(code == 1 && error.contains("error: ") && error.contains("thresholding"), "{error}");
    let (code, error) = draw_with(scheduler("TCDScheduler", json!({})), &["--scheduler", "Euler a"]);
    assert!(code == 0 && !error.contains("warning"), "{error}");
    let (code, error) = draw_with(scheduler("PNDMScheduler", json!({})), &["--scheduler", "deis"]);
    assert!(code == 2 && error.contains("euler_a") && error.contains("`auto`"), "{error}");
}

#[test]
fn check_names_the_sampler_that_a_runs_pictures_get() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    copy_folder(&fixture("model"), &path("model"));
    set_scheduler(&path("model"), &scheduler("TCDScheduler", json!({})));
    std::fs::create_dir(path("pictures")).expect("a folder");
    image::RgbImage::new(64, 64).save(path("pictures/a.png")).expect("a picture");
    std::fs::write(path("pictures/a.txt"), "a fox").expect("a caption");
    let config = "name = \"try\"\nmodel.pretrained_model_name_or_path = \"model\"\ndata.train_data_dir = \"pictures\"\n\
                  data.resolution = 64\nsample.prompts = [\"a fox\"]\n";
    std::fs::write(path("run.toml"), config).expect("a config");
    for (added, warns) in [("sample.sample_every_n_steps=5", true), ("sample.sampler=euler_a", false)] {
        let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
            .args(["check", "run.toml", added])
            .current_dir(folder.path())
            .output()
            .expect("the program");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text.contains("TCDScheduler, is not in this version"), warns, "{text}");
    }
}

#[test]
fn every_scheduler_of_the_file_draws() {
    let mut pipeline = pipeline();
    for class in [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
    ] {
        for added in [
            json!({}),
            json!({"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
        ] {
            pipeline.scheduler_config = scheduler(class, added);
            assert_eq!(pipeline.own_sampler().warning, None, "{class}");
            let request = Request { steps: 5, images: 1, noise: Noise::Seed(1), size: Some((32, 32)), ..request(None) };
            let mut calls = (0, 0);
            let count = &mut |done: usize, total: usize| {
                calls = (done, total);
                Ok(())
            };
            let drawn = pipeline.generate(&request, count).unwrap_or_else(|error| panic!("{class}: {error:#}"));
            assert!(drawn.latents.abs().max().double_value(&[]) < 1e3, "{class}");
            let twice = ["Heun", "KDPM2", "SDEScheduler"].iter().any(|part| class.contains(part));
            let evaluations = if class.starts_with("PNDM") {
                6
            } else if twice {
                9
            } else {
                5
            };
            assert_eq!(calls, (evaluations, evaluations), "{class}");
        }
    }
}

#[test]
fn guidance_that_overflows_is_named() {
    let pipeline = pipeline();
    let draw = |guidance_scale: f64| {
        let request = Request { guidance_scale, steps: 1, ..request(None) };
        pipeline.generate(&request, &mut |_, _| Ok(())).map(drop)
    };
    let error = draw(1e300).unwrap_err().to_string();
    assert!(error.contains("not finite: the guidance scale 1") && error.contains("is too large"), "{error}");
    draw(20.0).unwrap();
}

#[test]
fn finished_pictures_survive_an_interrupt() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model_path();
    let mut child = Command::new(env!("CARGO_BIN_EXE_palettist"))
        .args(["generate", &model, "--prompt", "a fox", "-o", "out.png", "--steps", "20", "--device", "cpu"])
        .args(["--num-images", "2000", "--batch-size", "2", "--save-latents", "latents.safetensors"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program");
    while !folder.path().join("out-1.png").exists() {
        assert!(child.try_wait().expect("a state").is_none(), "ended before a picture");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill").success());
    let output = child.wait_with_output().expect("an end");
    let error = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(130), "{error}");
    let pictures = std::fs::read_dir(folder.path()).expect("a folder").flatten();
    let pictures = pictures.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "png")).count();
    assert!(pictures.is_multiple_of(2) && pictures < 2000, "{pictures}");
    assert!(error.contains(&format!("stopped; {pictures} of 2000 pictures are written")), "{error}");
    // Not a terminal: plain lines.
    assert!(error.contains("drawing 0/21000 "), "{error}");
    let file = TensorFile::open(&folder.path().join("latents.safetensors")).expect("the latents");
    assert_eq!(file.tensor("latents").expect("latents").size()[0], pictures as i64);
    assert_eq!(String::from_utf8(output.stdout).expect("text").lines().count(), pictures + 1);
}
