//! Text to image against diffusers' `StableDiffusionPipeline` on a tiny random model (`tests/oracle/pipeline.py`), and
//! the command.

use std::path::{Path, PathBuf};

use clap::Parser;
use palettist::cli::generate;
use palettist::diffusion::{Noise, Pipeline, Request, SamplerKind};
use palettist::palette::{Palette, PalettizedCheckpoint};
use palettist::report::pictures;
use palettist::source::files::{TensorFile, write_safetensors};
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
    TensorFile::open(&fixture("expected.safetensors")).and_then(|file| file.tensor(name)).expect("a fixture")
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
        noise: Noise::Latents(expected("noise")),
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
        for (name, kind) in SamplerKind::NAMES {
            let drawn = pipeline.generate(&request(Some(kind)), &mut |_, _| Ok(())).expect("latents");
            let error = relative_error(&drawn.latents, &expected(&format!("{name}.{prediction}")));
            println!("{name} {prediction}: relative error {error:.1e}");
            assert!(error < 1e-4, "{name} {prediction}: relative error {error:e}");
        }
    }
}

#[test]
fn pictures_are_those_of_diffusers_and_do_not_depend_on_the_batch() {
    let pipeline = pipeline();
    assert_eq!(pipeline.own_sampler(), SamplerKind::Pndm);
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
        (&["--scheduler", "heun"], "dpmpp_2m"),
        (&["--device", "tpu"], "auto, cpu, cuda and mps"),
        (&["--precision", "int8"], "fp32, bf16 and fp16"),
        (&["--guidance-scale", "nan"], "--guidance-scale"),
        (&["--palettes", "missing.palettes.safetensors"], "missing.palettes.safetensors"),
        (&["--latents", &path("missing.safetensors")], "missing.safetensors"),
        (&["--latents", &path("cut.safetensors")], "cut.safetensors"),
        (&["--latents", &path("other.safetensors")], "it has: noise"),
        (&["--latents", &path("flat.safetensors")], "[4, 8, 6]"),
        (&["--latents", &path("nan.safetensors")], "not all finite"),
        (&["--latents", &path("good.safetensors"), "--num-images", "3"], "latents for 2"),
        (&["--latents", &path("good.safetensors"), "--height", "128"], "64 × 48 pixels"),
        (&["--save-latents", &path("out.pt")], ".safetensors"),
        (&["--save-latents", &path("cut.safetensors/out.safetensors")], "cannot create the folder"),
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
