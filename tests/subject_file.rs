//! A subject as a small file: learnt on palettes whose assignments stay, put onto them by `--subject`.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::runs::{ROOT, config, ends, program, run, succeed, wait_for};
use palettist::files::TensorFile;
use palettist::palette::PalettizedCheckpoint;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pipeline/model");
const QUIET: [&str; 5] = [
    "palettize.palettes=base.palettes.safetensors",
    "train.train_text_encoder=false",
    "sample.sample_every_n_steps=0",
    "distill.enabled=false",
    "train.learning_rate=1e-2",
];

fn palettized(folder: &Path, name: &str, bits: &str) {
    let threshold = ["--weight-threshold", "100"];
    succeed(run(folder, &[&["palettize", MODEL, "-o", name, "--bits", bits], &threshold[..]].concat()));
}

#[test]
fn a_subject_is_learnt_on_palettes_and_put_onto_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let path = config(at);
    let path = path.to_str().unwrap();
    let base = "base.palettes.safetensors";
    palettized(at, base, "2");
    let arguments = [&["train", path], &QUIET[..]].concat();
    let checked = succeed(run(at, &[&["check", path, "--no-estimate"], &QUIET[..]].concat()));
    assert!(checked.contains("of 2 bits"), "{checked}");
    let told = ends(at, &arguments, 0, "wrote what was learnt, for --subject: run/tiny.subject.safetensors");
    assert!(told.contains("palettize.palettes says which weights are palettes"), "{told}");

    // Entries, biases and norms have moved, and nothing else.
    let [before, after] =
        [base, "run/tiny.palettes.safetensors"].map(|file| PalettizedCheckpoint::read(&at.join(file)).unwrap());
    assert_eq!(before.palettes.len(), after.palettes.len());
    for (name, palette) in &before.palettes {
        let learnt = &after.palettes[name];
        assert_eq!((&palette.indices, &palette.scales), (&learnt.indices, &learnt.scales), "{name}");
        assert_ne!(palette.entries, learnt.entries, "{name}");
    }
    let (mut moved, mut kept) = (0, 0);
    for (name, tensor) in &before.dense {
        let same = tensor.equal(&after.dense[name]);
        assert!(same || tensor.dim() == 1, "{name}");
        *(if same { &mut kept } else { &mut moved }) += 1;
    }
    assert!(moved > before.dense.len() / 2 && kept > 0, "{moved} moved, {kept} kept");
    let subject = "run/tiny.subject.safetensors";
    let size = |file: &str| fs::metadata(at.join(file)).unwrap().len();
    assert!(size(subject) < size(base), "{} and {}", size(subject), size(base));
    let names = TensorFile::open(&at.join(subject)).unwrap().names();
    assert!(names.iter().all(|name| !name.ends_with(".indices")), "{names:?}");

    // On the base it is the network that was trained.
    let draw = |model: &str, more: &[&str], to: &str| {
        let drawn = ["generate", model, "--prompt", "a cat", "-o", to, "--steps", "2", "--device", "cpu"];
        succeed(run(at, &[&drawn[..], more].concat()));
        fs::read(at.join(to)).unwrap()
    };
    let trained = draw("run", &[], "run.png");
    assert!(draw(MODEL, &["--palettes", base, "--subject", subject], "subject.png") == trained);
    assert!(draw(MODEL, &["--palettes", base], "base.png") != trained);
    let put = ["--palettes", base, "--subject", subject];
    succeed(run(at, &[&["export", MODEL, "-o", "out"], &put[..]].concat()));
    let package = fs::read_dir(at.join("out")).unwrap().next().unwrap().unwrap().path();
    let package = package.to_str().unwrap();
    succeed(run(at, &[&["verify", package, "--against", MODEL, "--min-psnr", "50"], &put[..]].concat()));
    // Parameters are compared to the last bit.
    let other = run(at, &["verify", package, "--against", MODEL, "--palettes", base]);
    assert_eq!(other.status.code(), Some(1));

    // Another base, and what is none.
    palettized(at, "other.palettes.safetensors", "4");
    let drawn = ["generate", MODEL, "--prompt", "a cat", "-o", "no.png", "--steps", "1", "--subject", subject];
    let refused =
        "the subject run/tiny.subject.safetensors was learnt on other palettes than other.palettes.safetensors";
    ends(at, &[&drawn[..], &["--palettes", "other.palettes.safetensors"]].concat(), 1, refused);
    ends(at, &drawn, 2, "--subject goes onto the palettes that it was learnt on");
    let none = [&drawn[..8], &["--palettes", base, "--subject", base]].concat();
    ends(at, &none, 1, "base.palettes.safetensors is not a subject");
    // The same palettes elsewhere are the same base; others are another run.
    fs::rename(at.join(base), at.join("moved.palettes.safetensors")).unwrap();
    let again = |palettes: &'static str| {
        let mut arguments = arguments.clone();
        arguments[2] = palettes;
        arguments.push("train.max_train_steps=13");
        arguments
    };
    let path_of = ["palettize.palettes=other.palettes.safetensors", "palettize.palettes=moved.palettes.safetensors"];
    ends(at, &again(path_of[0]), 2, "the model is another: its palettes changed");
    ends(at, &again(path_of[1]), 0, "resuming from ");
}

#[test]
fn a_subject_of_a_killed_run_is_that_of_one_that_was_not() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&whole, &broken] {
        let folder = folder.path();
        let base = ["palettize", MODEL, "-o", "base.palettes.safetensors", "--bits", "2", "--weight-threshold", "100"];
        succeed(run(folder, &[&base[..], &["--granularity", "per_grouped_channel", "--group-size", "8"]].concat()));
    }
    // One config for both, so that what is said of the run is the same.
    let path = config(whole.path());
    let arguments = [&["train", path.to_str().unwrap(), "export.coreml=false"], &QUIET[..]].concat();
    succeed(run(whole.path(), &arguments));
    for step in ["step-000004", "step-000010"] {
        let mut child = program(broken.path(), &arguments).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, step, || broken.path().join("run/checkpoints").join(step).is_dir());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    ends(broken.path(), &arguments, 0, "resuming from ");
    for file in ["tiny.subject.safetensors", "tiny.palettes.safetensors"] {
        let [a, b] = [&whole, &broken].map(|folder| fs::read(folder.path().join("run").join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
}

#[test]
fn what_does_not_go_with_fixed_palettes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let path = config(at);
    let path = path.to_str().unwrap();
    palettized(at, "base.palettes.safetensors", "3");
    let on = "palettize.palettes=base.palettes.safetensors";
    ends(at, &["check", path, on], 2, "`train.train_text_encoder` can't be true with palettize.palettes");
    let plain = [on, "train.train_text_encoder=false"];
    let two = "distill.teacher=personalized";
    ends(at, &[&["check", path, two], &plain[..]].concat(), 2, "`distill.teacher` can't be \"personalized\" with");
    for command in ["check", "train"] {
        ends(
            at,
            &[&[command, path], &plain[..]].concat(),
            2,
            "has palettes of 3 bits; set export.min_deployment_target",
        );
        let gone = ["palettize.palettes=gone", "train.train_text_encoder=false"];
        ends(at, &[&[command, path], &gone[..]].concat(), 1, "palettize.palettes: ");
    }
    let xl = format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/sdxl/model");
    ends(at, &[&["train", path, &xl], &plain[..]].concat(), 1, "the palettes do not fit the model");
}
