//! What runs on a CUDA device, tried on a stand-in for one (tests/stand_in): whole runs agree with those on the CPU, no
//! host code touches what lies on the device, no operator gets tensors of both.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::runs::{ROOT, config, contents, succeed, text, wait_for};
use common::stand_in::{on_stand_in, report};
use palettist::files::TensorFile;
use palettist::palette::PalettizedCheckpoint;
use serde_json::Value;
use tch::Kind;

/// The lines of a run's log.
fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("logs/metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Launches of our own kernels by the last program in `folder`, and how often they were compiled.
fn launches(folder: &Path) -> (i64, i64) {
    let report = report(folder);
    let by_name = report["by_name"].as_object().unwrap();
    let kernels = by_name.iter().filter(|(name, _)| name.starts_with("kernel::"));
    let number = |count: &Value| count["number"].as_i64().unwrap();
    (kernels.map(|(_, count)| number(count)).sum(), by_name.get("compiled").map_or(0, number))
}

/// Trains on the CPU and on the device: every number of the log and every weight of the result agree.
fn trains_alike(changes: &[&str], tolerance: f64) {
    trains_alike_in(changes, tolerance, &[]);
}

/// [`trains_alike`] in an environment; gives what the run on the device said, and its [`launches`].
fn trains_alike_in(changes: &[&str], tolerance: f64, variables: &[(&str, &str)]) -> (String, (i64, i64)) {
    let mut said = (String::new(), (0, 0));
    let folder = tempfile::tempdir().unwrap();
    let path = config(folder.path());
    let path = path.to_str().unwrap();
    let common = ["train.max_train_steps=4", "sample.sample_every_n_steps=4", "validation.every_n_steps=4"];
    for device in ["cpu", "cuda"] {
        let own = [format!("output_dir={device}"), format!("train.device={device}")];
        let own = own.iter().map(String::as_str);
        let arguments: Vec<&str> =
            ["train", path].into_iter().chain(own).chain(common).chain(changes.iter().copied()).collect();
        let output = on_stand_in(folder.path(), &arguments).envs(variables.iter().copied()).output().unwrap();
        said = (text(&output.stderr), launches(folder.path()));
        succeed(output);
        let used = report(folder.path())["operators"]["number"].as_i64().unwrap();
        assert_eq!(used > 0, device == "cuda", "{used} operators on the device");
    }
    let [cpu, cuda] = ["cpu", "cuda"].map(|device| folder.path().join(device));
    let logs = [metrics(&cpu), metrics(&cuda)];
    assert_eq!(logs[0].len(), logs[1].len());
    for (before, now) in logs[0].iter().zip(&logs[1]) {
        let [before, now] = [before, now].map(|line| line.as_object().unwrap());
        assert!(before.keys().eq(now.keys()), "{before:?} {now:?}");
        for (name, value) in before {
            let (expected, found) = (value.as_f64().unwrap(), now[name].as_f64().unwrap());
            let limit = tolerance * expected.abs().max(1e-3);
            assert!((expected - found).abs() <= limit, "{changes:?}: {name} is {expected}, on the device {found}");
        }
    }
    for part in ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"] {
        let [cpu, cuda] = [&cpu, &cuda].map(|run| TensorFile::open(&run.join("model").join(part)).unwrap());
        for name in cpu.names() {
            let [expected, found] = [&cpu, &cuda].map(|file| file.tensor(&name).unwrap().to_kind(Kind::Double));
            let distance = (&expected - &found).norm().double_value(&[]);
            let size = expected.norm().double_value(&[]);
            assert!(distance <= 10.0 * tolerance * size + 1e-6, "{changes:?}: {name} is {distance} off, of {size}");
        }
    }
    said
}

#[test]
fn palettes_of_numbers_are_trained_alike() {
    let (said, (launched, _)) = trains_alike_in(&[], 1e-4, &[]);
    assert!(launched > 0 && !said.contains("operators"), "{launched} launches: {said}");
    trains_alike(&["palettize.granularity=per_grouped_channel", "palettize.group_size=8", "palettize.n_bits=4"], 1e-4);
    trains_alike(&["palettize.lut_dtype=i8", "palettize.enable_per_channel_scale=true"], 1e-4);
}

/// Where kernels of our own cannot be had, or are wrong on the card, libtorch's operators do the same, and a line says why.
#[test]
fn operators_stand_in_for_kernels() {
    for (variable, why) in [
        ("STAND_IN_NO_KERNELS", "NVRTC cannot compile kernels.cu: kernels.cu(1): error: not today (stand-in)"),
        ("STAND_IN_WRONG_KERNELS", "the kernels are wrong on this card: step 1: the soft weight is off by"),
    ] {
        let (said, _) = trains_alike_in(&["palettize.n_bits=4"], 1e-4, &[(variable, "1")]);
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("libtorch's operators")).collect();
        assert!(lines.len() == 1 && lines[0].contains(why), "{said}");
    }
}

/// What was compiled is kept for the next run; what is damaged there is compiled again.
#[test]
fn kernels_are_compiled_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = config(folder.path());
    let few = ["train.max_train_steps=1", "sample.sample_every_n_steps=0", "validation.every_n_steps=0"];
    let arguments = [&["train", path.to_str().unwrap(), "train.device=cuda"][..], &few].concat();
    let trained = |output: &str| {
        let output = format!("output_dir={output}");
        let arguments = [&arguments[..], &[&output]].concat();
        succeed(on_stand_in(folder.path(), &arguments).output().unwrap());
        let (launched, compiled) = launches(folder.path());
        assert!(launched > 0);
        compiled
    };
    assert_eq!([trained("first"), trained("second")], [1, 0]);
    let kept = fs::read_dir(folder.path().join("cache/palettist/kernels")).unwrap();
    for file in kept.map(|entry| entry.unwrap().path()) {
        fs::write(file, "half of").unwrap();
    }
    assert_eq!([trained("third"), trained("fourth")], [1, 0]);
}

#[test]
fn palettes_of_vectors_are_trained_alike() {
    trains_alike(&["palettize.cluster_dim=2", "palettize.n_bits=4"], 1e-4);
}

#[test]
fn weights_without_palettes_are_trained_alike() {
    let plain = ["palettize.enabled=false", "palettize.n_bits=2", "distill.enabled=false", "train.use_ema=true"];
    // Biases of keys have no gradient but rounding, of which AdamW makes whole steps.
    trains_alike(&plain, 1e-4);
    trains_alike(&["train.gradient_checkpointing=false", "distill.lambda_kd_feat=0.1", "train.min_snr_gamma=5"], 1e-4);
}

#[test]
fn lower_precisions_are_trained_alike() {
    trains_alike(&["train.mixed_precision=bf16"], 2e-2);
    trains_alike(&["train.mixed_precision=bf16", "train.full_bf16=true"], 2e-2);
}

/// A run on the device that is killed and resumed there ends with the same bytes.
#[test]
fn a_run_on_the_device_resumes_to_the_same_bytes() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = config(whole.path());
    let arguments = ["train", path.to_str().unwrap(), "train.device=cuda", "sample.sample_every_n_steps=0"];
    succeed(on_stand_in(whole.path(), &arguments).output().unwrap());
    let mut child = on_stand_in(broken.path(), &arguments).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&mut child, "step 6", || broken.path().join("run/checkpoints/step-000006").is_dir());
    child.kill().unwrap();
    child.wait().unwrap();
    succeed(on_stand_in(broken.path(), &arguments).output().unwrap());
    let [a, b] = [&whole, &broken].map(|folder| contents(&folder.path().join("run/model")));
    assert!(a == b, "the resumed run differs");
}

/// Commands that compute without training: the same figures and, to a grey level, the same picture.
#[test]
fn other_commands_compute_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = config(folder.path());
    let (path, model) = (path.to_str().unwrap(), format!("{ROOT}/tests/fixtures/pipeline/model"));
    let both = |arguments: &[&str]| {
        ["cpu", "cuda"].map(|device| {
            let output =
                format!("{device}.{}", if arguments[0] == "generate" { "png" } else { "palettes.safetensors" });
            let named = if arguments[0] == "evaluate" { vec![] } else { vec!["-o", &output] };
            let arguments = [&[arguments[0], &model], &arguments[1..], &["--device", device], &named].concat();
            let told = succeed(on_stand_in(folder.path(), &arguments).output().unwrap());
            let used = report(folder.path())["operators"]["number"].as_i64().unwrap();
            assert_eq!(used > 0, device == "cuda", "{arguments:?}: {used} operators on the device");
            (told, folder.path().join(output))
        })
    };
    let [cpu, cuda] = both(&["evaluate", "--config", path, "--json"]);
    let [cpu, cuda] = [cpu.0, cuda.0].map(|told| serde_json::from_str::<Value>(&told).unwrap());
    let (expected, found) = (cpu["float"].as_f64().unwrap(), cuda["float"].as_f64().unwrap());
    assert!((expected - found).abs() < 1e-5 * expected, "{expected} {found}");

    let drawn = both(&["generate", "--prompt", "a cat", "--steps", "3", "--width", "32", "--height", "32"]);
    let [cpu, cuda] = drawn.map(|(_, path)| image::open(path).unwrap().to_rgb8());
    assert!(cpu.iter().zip(cuda.iter()).all(|(a, b)| a.abs_diff(*b) <= 1));

    let fitted = both(&["palettize", "--bits", "2", "--calibrate", path, "--calibration-samples", "4"]);
    let [cpu, cuda] = fitted.map(|(_, path)| PalettizedCheckpoint::read(&path).unwrap());
    for (name, palette) in &cpu.palettes {
        for (a, b) in palette.entries.iter().zip(&cuda.palettes[name].entries) {
            assert!((a.to_f32() - b.to_f32()).abs() <= 1e-3 * a.to_f32().abs() + 1e-5, "{name}: {a} {b}");
        }
    }
}

/// The host never touches memory of the device: the stand-in would end the program.
#[test]
fn the_host_keeps_out_of_the_devices_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = config(folder.path());
    let few = ["train.max_train_steps=1", "sample.sample_every_n_steps=0", "validation.every_n_steps=0"];
    let arguments = [&["train", path.to_str().unwrap(), "train.device=cuda"][..], &few].concat();
    succeed(on_stand_in(folder.path(), &arguments).env("STAND_IN_FENCE", "1").output().unwrap());
}

/// Out of memory is told in a line, with what to do.
#[test]
fn a_full_device_is_told_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = config(folder.path());
    let output = on_stand_in(folder.path(), &["train", path.to_str().unwrap(), "train.device=cuda"])
        .env("STAND_IN_LIMIT", "1500000")
        .output()
        .unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("out of memory") && !told.contains("frame #") && !told.contains("internal error"), "{told}");
}
