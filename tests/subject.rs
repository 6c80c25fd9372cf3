//! A subject at few bits: who teaches, about which pictures, in one stage or two.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::copy_folder;
use common::runs::{ROOT, contents, ends, hidden, program, run, succeed, text, wait_for};
use palettist::files::TensorFile;

/// A config that teaches the small model the mascot; class pictures are of the user's own.
fn config(folder: &Path) -> PathBuf {
    let class = folder.join("class");
    fs::create_dir_all(&class).unwrap();
    for name in ["0001.png", "0002.png"] {
        fs::copy(Path::new(ROOT).join("datasets/sketchbook/train").join(name), class.join(name)).unwrap();
    }
    let path = folder.join("subject.toml");
    let text = format!(
        r#"name = "subject"
output_dir = "run"
[model]
pretrained_model_name_or_path = "{ROOT}/tests/fixtures/pipeline/model"
[data]
resolution = 32
[data.dreambooth]
instance_data_dir = "{ROOT}/datasets/mascot"
instance_prompt = "a sks cat"
class_data_dir = "class"
class_prompt = "a cat"
num_class_images = 2
prior_loss_weight = 0.5
[train]
mode = "dreambooth"
train_text_encoder = true
max_train_steps = 6
train_batch_size = 2
learning_rate = 1e-3
device = "cpu"
[palettize]
n_bits = 2
weight_threshold = 100
freeze_fraction = 0.4
[distill]
enabled = true
[sample]
sample_every_n_steps = 0
[checkpoint]
checkpointing_steps = 2
[logging]
log_every = 1
[export]
coreml = false
"#
    );
    fs::write(&path, text).unwrap();
    path
}

const UNET: &str = "model/unet/diffusion_pytorch_model.safetensors";
const TEXT: &str = "model/text_encoder/model.safetensors";
const TWO_STAGES: [&str; 3] =
    ["distill.teacher=personalized", "distill.personalize_steps=4", "distill.personalize_learning_rate=2e-3"];

fn train(folder: &Path, changes: &[&str]) -> String {
    let config = config(folder);
    let output = run(folder, &[&["train", config.to_str().unwrap()], changes].concat());
    let told = text(&output.stderr);
    succeed(output);
    told
}

fn bytes(folder: &Path, file: &str) -> Vec<u8> {
    fs::read(folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Both commands say the same of the losses, and of a teacher that has never seen the subject.
#[test]
fn what_is_asked_of_the_losses_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let path = config(at);
    let path = path.to_str().unwrap();
    let short = ["train.max_train_steps=1", "distill.lambda_kd_feat=0.01"];
    let told = |command: &str, changes: &[&str]| {
        let extra: &[&str] = if command == "check" { &["--no-estimate"] } else { &[] };
        let output = run(at, &[&[command, path], extra, &short, changes].concat());
        let told = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{told}");
        told
    };
    let lines = |told: &str| -> Vec<String> {
        let found = told.lines().filter_map(|line| Some(line[line.find("loss/")?..].to_owned()));
        found.filter(|line| line.contains(" compares ")).collect()
    };
    let by_default = [
        "loss/denoise compares what the UNet predicts with the noise that was added, on the subject's pictures, told \
         \"a sks cat\"; weight 1.0",
        "loss/prior compares what the UNet predicts with the noise that was added, on pictures of the class, told \"a cat\"; \
         weight 0.5",
        "loss/distill compares what the UNet predicts with what the base predicts, on pictures of the class, told \"a cat\"; \
         weight 1.0",
        "loss/features compares what the UNet's blocks give with what those of the base give, on pictures of the class, told \
         \"a cat\"; weight 0.01",
    ];
    for (number, changes) in
        [vec![], vec!["distill.on=all"], vec!["data.dreambooth.prior_source=base"], vec!["distill.enabled=false"]]
            .into_iter()
            .enumerate()
    {
        let checked = told("check", &changes);
        let output = format!("output_dir=run-{number}");
        let trained = told("train", &[&changes[..], &[output.as_str()]].concat());
        assert_eq!(lines(&checked), lines(&trained), "{changes:?}");
        if number == 0 {
            assert_eq!(lines(&checked), by_default);
        }
        let warned = "warning: `distill.on=all` on the command line: `distill.on` is \"all\", and the teacher is the base, which \
                      has never seen the subject";
        assert_eq!([&checked, &trained].map(|told| told.contains(warned)), [number == 1; 2], "{checked}{trained}");
        // Each is logged under that name.
        let metrics = fs::read_to_string(at.join(format!("run-{number}/logs/metrics.jsonl"))).unwrap();
        let names = lines(&checked);
        let names = names.iter().map(|line| line.split(' ').next().unwrap());
        assert!(names.clone().all(|name| metrics.contains(&format!("\"{name}\""))), "{metrics}");
        assert_eq!(metrics.matches("\"loss/").count(), names.count(), "{metrics}");
    }
    let without = "distill.on = \"class\"), and there is none";
    ends(at, &["check", path, "data.dreambooth.with_prior_preservation=false"], 2, without);
}

/// The prior by the base's own answers takes no picture of the class.
#[test]
fn the_base_answers_for_the_class_without_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let path = config(at);
    fs::remove_dir_all(at.join("class")).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("class_data_dir = \"class\"\n", "").replace("num_class_images = 2\n", "")).unwrap();
    let path = path.to_str().unwrap();
    ends(at, &["check", path], 2, "`data.dreambooth.class_data_dir` is missing");
    let changes = ["data.dreambooth.prior_source=base", "distill.enabled=false", "train.max_train_steps=2"];
    let checked = succeed(run(at, &[&["check", path, "--no-estimate"], &changes[..]].concat()));
    assert!(checked.contains("= 4 pictures, each once more as one of the class"), "{checked}");
    assert!(checked.contains("for a frozen model that is asked"), "{checked}");
    ends(
        at,
        &[&["train", path], &changes[..]].concat(),
        0,
        "loss/prior compares what the UNet predicts with what the base",
    );
    assert!(!at.join("class").exists());
    let metrics = fs::read_to_string(at.join("run/logs/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    // Palettes alone set the student apart from the base at the first step.
    assert!(first["loss/prior"].as_f64().unwrap() > 0.0, "{first}");
    // In float it is the base at the first step, up to fp16.
    let float = ["palettize.enabled=false", "output_dir=float", "train.max_train_steps=1"];
    ends(at, &[&["train", path], &changes[..2], &float].concat(), 0, "");
    let metrics = fs::read_to_string(at.join("float/logs/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert!(first["loss/prior"].as_f64().unwrap() < 1e-5, "{first}");
}

/// Two stages are two runs: the first in float, the second from its model, taught by it.
#[test]
fn two_stages_are_as_two_runs() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let told = train(at, &[&TWO_STAGES[..], &["train.stop_text_encoder_training=6"]].concat());
    assert!(told.contains("stage 1 of 2: learning in float, 4 steps, in run/personalized"), "{told}");
    assert!(told.contains("stage 2 of 2: 6 steps from the model in run/personalized"), "{told}");
    assert!(told.contains("training 10/10"), "the bar counts both: {told}");
    assert!(told.contains("with what the model of the first stage predicts, on the subject's pictures"), "{told}");
    assert!(!at.join("run/personalized/checkpoints/step-000004").exists());

    // The text encoder learns in all of the first stage, and in two steps of the second.
    let float = ["palettize.enabled=false", "distill.enabled=false", "train.max_train_steps=4", "output_dir=float"];
    train(at, &[&float[..], &["train.learning_rate=2e-3", "train.text_encoder_lr=5e-4"]].concat());
    let second = ["model.pretrained_model_name_or_path=float", "distill.on=all", "output_dir=second"];
    // A run writes the autoencoder in fp16, and latents would differ a little.
    let vae = format!("model.vae={ROOT}/tests/fixtures/pipeline/model/vae");
    train(at, &[&second[..], &["train.stop_text_encoder_training=2", &vae]].concat());
    for file in [UNET, TEXT] {
        assert!(bytes(at, &format!("run/personalized/{file}")) == bytes(at, &format!("float/{file}")), "{file}");
        assert!(bytes(at, &format!("run/{file}")) == bytes(at, &format!("second/{file}")), "{file}");
        assert!(bytes(at, &format!("run/{file}")) != bytes(at, &format!("run/personalized/{file}")), "{file}");
    }
    // A path as teacher: the same model by another way, but for where the student starts.
    let by_path = ["distill.teacher=float", "output_dir=by-path", "train.stop_text_encoder_training=2"];
    let told = train(at, &by_path);
    assert!(told.contains("with what the teacher float predicts, on the subject's pictures"), "{told}");
    assert!(bytes(at, &format!("by-path/{UNET}")) != bytes(at, &format!("second/{UNET}")));

    // Stopped within the first stage, it stays as it is in the second.
    train(at, &[&TWO_STAGES[..], &["train.stop_text_encoder_training=3", "output_dir=early"]].concat());
    let [first, last] = ["early/personalized", "early"].map(|run| bytes(at, &format!("{run}/{TEXT}")));
    assert!(first == last && first != bytes(at, &format!("float/{TEXT}")));

    // A run of two stages is finished when both are, and its first stage is a model too.
    let again = train(at, &[&TWO_STAGES[..], &["train.stop_text_encoder_training=6"]].concat());
    assert!(again.contains("run is finished (6 steps)"), "{again}");
    let drawn =
        ["generate", "run/personalized", "--prompt", "a cat", "-o", "cat.png", "--steps", "1", "--device", "cpu"];
    succeed(run(at, &drawn));
    let longer = [&TWO_STAGES[..], &["train.stop_text_encoder_training=6", "distill.personalize_steps=5"]].concat();
    let path = config(at);
    let refused = "`distill.personalize_steps` was 4 and is now 5";
    ends(at, &[&["train", path.to_str().unwrap()], &longer[..]].concat(), 2, refused);
    // More steps of the second stage go on from where it was.
    let longer = [&TWO_STAGES[..], &["train.stop_text_encoder_training=6", "train.max_train_steps=7"]].concat();
    assert!(train(at, &longer).contains("resuming from "));
    // Another teacher is another run.
    let other = [
        "distill.teacher=second",
        "output_dir=by-path",
        "train.stop_text_encoder_training=2",
        "train.max_train_steps=7",
    ];
    let refused = "the model is another: its teacher's ";
    ends(at, &[&["train", path.to_str().unwrap()], &other[..]].concat(), 2, refused);
    // The same one elsewhere is not.
    fs::rename(at.join("float"), at.join("moved")).unwrap();
    let moved = [
        "distill.teacher=moved",
        "output_dir=by-path",
        "train.stop_text_encoder_training=2",
        "train.max_train_steps=7",
    ];
    assert!(train(at, &moved).contains("resuming from "));
}

/// What a run leaves, but for event files (which have times in them) and checkpoints.
fn made(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let passing = |path: &Path| {
        let path = path.to_string_lossy();
        path.contains("events.out") || path.contains("checkpoints") || path.ends_with("train.lock")
    };
    contents(run).into_iter().filter(|(path, _)| !passing(path)).collect()
}

#[test]
fn two_stages_killed_anywhere_end_with_the_same_bytes() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    train(whole.path(), &TWO_STAGES);
    let path = config(broken.path());
    let arguments = [&["train", path.to_str().unwrap()], &TWO_STAGES[..]].concat();
    for place in [
        "run/config.resolved.toml",
        "run/personalized/checkpoints/step-000002",
        "run/personalized/checkpoints/step-000004",
        "run/personalized/model",
        "run/personalized/finished.json",
        "run/checkpoints/step-000002",
        "run/checkpoints/step-000004",
        "run/model",
    ] {
        let mut child = program(broken.path(), &arguments).stderr(Stdio::null()).spawn().unwrap();
        let there = broken.path().join(place);
        // It may be over before the next look.
        while !there.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    succeed(run(broken.path(), &arguments));
    let [expected, found] = [&whole, &broken].map(|folder| made(&folder.path().join("run")));
    let names = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for ((path, found), (_, expected)) in found.iter().zip(&expected) {
        assert!(found == expected, "{} differs", path.display());
    }
    assert_eq!(hidden(&broken.path().join("run")), Vec::<PathBuf>::new());
    // Ctrl-C in the first stage saves it.
    let stopped = tempfile::tempdir().unwrap();
    let path = config(stopped.path());
    let many = ["distill.teacher=personalized", "distill.personalize_steps=5000"];
    let arguments = [&["train", path.to_str().unwrap()], &many[..]].concat();
    let mut child = program(stopped.path(), &arguments).stderr(Stdio::piped()).spawn().unwrap();
    let first = stopped.path().join("run/personalized/checkpoints/step-000002");
    wait_for(&mut child, "a checkpoint of the first stage", || first.is_dir());
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the same command resumes"), "{}", text(&output.stderr));
    assert!(!stopped.path().join("run/checkpoints").exists());
}

#[test]
fn a_teacher_of_another_kind_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let path = config(at);
    let path = path.to_str().unwrap();
    let other = at.join("other");
    copy_folder(&Path::new(ROOT).join("tests/fixtures/pipeline/model"), &other);
    let json = fs::read_to_string(other.join("scheduler/scheduler_config.json")).unwrap();
    let velocity = json.replacen('{', "{\n  \"prediction_type\": \"v_prediction\",", 1);
    fs::write(other.join("scheduler/scheduler_config.json"), velocity).unwrap();
    for command in ["check", "train"] {
        for (teacher, code, expected) in [
            ("other", 2, "distill.teacher = \"other\" is of another architecture than "),
            ("personalised", 1, "distill.teacher = \"personalised\" (neither \"base\" nor \"personalized\")"),
        ] {
            let told = ends(at, &[command, path, &format!("distill.teacher={teacher}")], code, expected);
            assert!(told.lines().filter(|line| line.contains("distill.teacher")).count() == 1, "{told}");
        }
    }
    assert!(!at.join("run/checkpoints").exists());
    let same = format!("distill.teacher={ROOT}/tests/fixtures/pipeline/model");
    let warned = "warning: the UNet of distill.teacher is that of the base";
    ends(at, &["train", path, &same, "train.max_train_steps=1"], 0, warned);
    assert!(TensorFile::open(&at.join("run").join(UNET)).is_ok());
}
