//! The real binary: what it prints, its exit codes, and what it leaves alone.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::copy_folder;
use common::shared;
use image::{Rgb, RgbImage};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");

fn palettist(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs the program in `folder`; (exit code, standard output, standard error).
fn run(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = palettist(folder, arguments);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Runs what must fail with `code`, without a Rust trace and without results; its standard error.
fn fails(folder: &Path, arguments: &[&str], code: i32) -> String {
    let (found, out, error) = run(folder, arguments);
    assert_eq!(found, code, "{arguments:?}: {error}");
    assert!(error.starts_with("error: "), "{error}");
    assert!(!error.contains("panicked") && !error.contains("stack backtrace"), "{error}");
    assert!(!out.contains("no problems"), "{out}");
    error
}

/// A folder with a model, captioned pictures and a config that names them.
struct Work {
    folder: tempfile::TempDir,
}

impl Work {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pictures = folder.path().join("pictures");
        std::fs::create_dir(&pictures).unwrap();
        for (i, thing) in ["cat", "dog", "house"].iter().enumerate() {
            RgbImage::from_pixel(40, 32, Rgb([90 * i as u8, 20, 200])).save(pictures.join(format!("{i}.png"))).unwrap();
            std::fs::write(pictures.join(format!("{i}.txt")), format!("a {thing}\n")).unwrap();
        }
        let config = format!(
            "name = \"try\"\n\n[model]\npretrained_model_name_or_path = '{MODEL}'\n\n[data]\nresolution = 32\n\
             train_data_dir = \"pictures\"\n\n[train]\nmax_train_steps = 6\n"
        );
        std::fs::write(folder.path().join("run.toml"), config).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn add_to_config(&self, text: &str) {
        let path = self.path("run.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, config + text).unwrap();
    }

    fn check(&self, code: i32) -> String {
        fails(self.folder.path(), &["check", "run.toml", "--no-estimate"], code)
    }
}

#[test]
fn check_tells_what_a_run_would_do_and_writes_nothing() {
    let work = Work::new();
    let (code, out, error) = run(work.folder.path(), &["check", "run.toml", "train.train_batch_size=2"]);
    assert_eq!(code, 0, "{error}");
    for expected in [
        "UNet: 51 364 weights, learns",
        "3 pictures in pictures",
        "1.png: \"a dog\"",
        "6 steps × 1 accumulated × 2 in a batch = 12 pictures",
        "3 pictures per epoch: 4.0 epochs",
        "10 of 4 bits",
        "about ",
        "6 steps of ",
        "encoding what is not cached yet: ",
        "no problems found; to train: palettist train run.toml train.train_batch_size=2\n",
    ] {
        assert!(out.contains(expected), "{expected:?} is not in\n{out}");
    }
    let names = || {
        let mut names: Vec<_> =
            std::fs::read_dir(work.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["pictures", "run.toml"]);
    let (code, out, _) = run(work.folder.path(), &["check", "run.toml", "--no-estimate"]);
    assert!(code == 0 && !out.contains(" steps of "), "{out}");
    assert_eq!(names(), ["pictures", "run.toml"]);
}

#[test]
fn captions_that_will_be_cut_are_counted() {
    let work = Work::new();
    std::fs::write(work.path("pictures/0.txt"), "a cat, ".repeat(30)).unwrap();
    std::fs::write(work.path("pictures/2.txt"), "a house, ".repeat(40)).unwrap();
    let (code, out, error) = run(work.folder.path(), &["check", "run.toml"]);
    assert_eq!(code, 0, "{error}");
    let warning = out.lines().find(|line| line.contains("warning: ")).unwrap_or_else(|| panic!("{out}"));
    assert!(warning.contains("2 captions are longer than 77 tokens") && warning.contains("2.png, "), "{warning}");
    // Exactly 77 is not too many: each `!` is a token, with start and end.
    for name in ["0", "2"] {
        std::fs::write(work.path(&format!("pictures/{name}.txt")), "! ".repeat(75)).unwrap();
    }
    let (_, out, _) = run(work.folder.path(), &["check", "run.toml"]);
    assert!(!out.contains("warning: "), "{out}");
}

#[test]
fn a_misspelt_key_names_the_nearest_and_its_line() {
    let work = Work::new();
    work.add_to_config("learning_rte = 1e-6\nmax_grad_norm = \"1\"\n");
    assert_eq!(
        work.check(2),
        "error: run.toml:12:1: unknown key `learning_rte` in [train]; did you mean `learning_rate`?\n\
         error: run.toml:13:1: `train.max_grad_norm`: is string \"1\", expected a number\n"
    );
}

#[test]
fn layers_that_are_kept_twice_and_budgets_that_decide_nothing_are_told() {
    let work = Work::new();
    let analyze = ["analyze", MODEL, "--config", "run.toml", "-o", "r.toml"];
    let kept = ["--target-bits", "4", "--keep", "conv_in.weight=4", "--keep", "conv_*=8"];
    let error = fails(work.folder.path(), &[&analyze[..], &kept].concat(), 2);
    assert!(error.contains("--keep conv_in.weight: has no effect, because later ones replace it"), "{error}");
    // Before the pictures to measure on are missed.
    let (code, _, error) = run(work.folder.path(), &[&analyze[..], &["--target-bits", "15"]].concat());
    assert!(code == 2 && error.contains("the budget is more than the largest palettes take"), "{error}");
}

#[test]
fn help_tells_the_exit_codes() {
    let (code, out, _) = run(Path::new("."), &["--help"]);
    assert_eq!(code, 0);
    for line in ["0    done", "1    the work failed", "2    the command line or the config", "130  stopped by Ctrl-C"] {
        assert!(out.contains(line), "{out}");
    }
}

#[test]
fn all_mistakes_in_the_data_are_told_at_once() {
    let work = Work::new();
    std::fs::remove_file(work.path("pictures/0.png")).unwrap();
    std::fs::remove_file(work.path("pictures/1.txt")).unwrap();
    work.add_to_config(
        "\n[checkpoint]\ncheckpointing_steps = 3\n[[palettize.overrides]]\nmatch = \"no.such.*\"\nskip = true\n",
    );
    std::fs::create_dir_all(work.path("runs/try")).unwrap();
    std::fs::write(work.path("runs/try/thesis.txt"), "mine").unwrap();
    let error = work.check(2);
    for expected in ["pictures/0.txt", "pictures/1.png", "no.such.*", "runs/try exists and is not a run"] {
        assert!(error.contains(expected), "{expected:?} is not in\n{error}");
    }
    assert!(error.lines().all(|line| line.starts_with("error: ")), "{error}");
    assert_eq!(std::fs::read_to_string(work.path("runs/try/thesis.txt")).unwrap(), "mine");
}

#[test]
fn a_truncated_picture_is_named() {
    let work = Work::new();
    let bytes = std::fs::read(work.path("pictures/2.png")).unwrap();
    std::fs::write(work.path("pictures/2.png"), &bytes[..bytes.len() / 2]).unwrap();
    assert!(work.check(1).contains("pictures/2.png"));
}

#[test]
fn a_missing_folder_of_pictures_and_a_missing_model_are_both_named() {
    let work = Work::new();
    let arguments =
        ["check", "run.toml", "data.train_data_dir=no/pictures", "model.pretrained_model_name_or_path=no/such/model"];
    let error = fails(work.folder.path(), &arguments, 1);
    assert!(error.contains("no/pictures") && error.contains("no/such/model"), "{error}");
}

#[test]
fn a_unet_of_an_unsupported_kind_is_named_with_key_and_value() {
    let work = Work::new();
    let model = work.path("model");
    copy_folder(Path::new(MODEL), &model);
    let config = model.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("\"DownBlock2D\"", "\"AlienBlock2D\"");
    assert!(text.contains("AlienBlock2D"), "the fixture has a DownBlock2D");
    std::fs::write(config, text).unwrap();
    let error = fails(work.folder.path(), &["check", "run.toml", "model.pretrained_model_name_or_path=model"], 1);
    assert!(error.contains("down_block_types") && error.contains("AlienBlock2D"), "{error}");
}

#[test]
fn init_writes_what_check_can_read_and_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (code, out, _) = run(folder.path(), &["init"]);
    assert_eq!(code, 0);
    let names: Vec<&str> = out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert!(names.contains(&"dreambooth-2bit") && names.contains(&"finetune-4bit"), "{out}");
    for name in names {
        let (code, _, error) = run(folder.path(), &["init", name]);
        assert_eq!(code, 0, "{error}");
        // The model and the pictures are not there, and that is all that is wrong.
        let error = fails(folder.path(), &["check", &format!("{name}.toml")], 1);
        assert!(error.contains("models/"), "{error}");
    }
    // Editors find the schema beside the config; one that somebody else wrote is left alone, and not named.
    let schema = folder.path().join("palettist.schema.json");
    let file = folder.path().join("dreambooth-2bit.toml");
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("#:schema ./palettist.schema.json\n# "));
    let (_, printed, _) = run(folder.path(), &["schema"]);
    assert_eq!(std::fs::read_to_string(&schema).unwrap(), printed);
    std::fs::write(&schema, "{}").unwrap();
    assert_eq!(run(folder.path(), &["init", "finetune-2bit", "-o", "x.toml"]).0, 0);
    assert_eq!(std::fs::read_to_string(&schema).unwrap(), "{}");
    assert!(std::fs::read_to_string(folder.path().join("x.toml")).unwrap().starts_with("# Fine-tuning"));
    std::fs::write(&file, "mine").unwrap();
    assert!(fails(folder.path(), &["init", "dreambooth-2bit"], 2).contains("exists already"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    assert!(fails(folder.path(), &["init", "dreambooth-3bit"], 2).contains("did you mean dreambooth-"));
}

#[test]
fn wrong_command_lines_exit_with_2() {
    let folder = tempfile::tempdir().unwrap();
    assert!(fails(folder.path(), &["chek", "x"], 2).contains("check"));
    assert!(fails(folder.path(), &["check"], 2).contains("<CONFIG>"));
    assert!(fails(folder.path(), &["check", "no.toml"], 2).contains("no.toml"));
    let palettize = |more: &[&str]| {
        let all = ["palettize", MODEL, "-o", "x.palettes.safetensors"].iter().chain(more).copied().collect::<Vec<_>>();
        fails(folder.path(), &all, 2)
    };
    assert!(palettize(&["--bits", "5"]).contains("--bits is 5, but a palette has 1, 2, 3, 4, 6 or 8 bits"));
    assert!(palettize(&["--bits", "2", "--group-size", "4"]).contains("--granularity per_grouped_channel"));
    let grouped = ["--bits", "2", "--granularity", "per_grouped_channel", "--group-size"];
    assert!(
        palettize(&[&grouped[..], &["0"]].concat()).contains("--group-size is 0, but a group has at least one channel")
    );
    let missing = palettize(&[]);
    assert!(missing.contains("--bits <N>") && missing.contains("--recipe <FILE>"), "{missing}");
    let misnamed = fails(folder.path(), &["palettize", MODEL, "-o", "p4.safetensors", "--bits", "4"], 2);
    assert!(misnamed.contains("p4.safetensors should end in .palettes.safetensors"), "{misnamed}");
    assert!(palettize(&["--bits", "2", "--cluster-dim", "3"]).contains("--cluster-dim is 3"));
    assert!(palettize(&["--bits", "2", "--group-axis", "1"]).contains("--group-axis is 1, but there are no groups"));
    assert!(palettize(&["--bits", "2", "--lut-dtype", "u8"]).contains("i8"));
    for side in ["--latent-h", "--latent-w"] {
        let error = fails(folder.path(), &["export", MODEL, "-o", "x", side, "-3"], 2);
        assert!(error.contains("--latent-h and --latent-w are from 1 to 4096"), "{error}");
    }
    // A number like another: what is wrong is the package.
    assert!(fails(folder.path(), &["verify", "no.mlpackage", "--min-psnr", "-5"], 2).contains("--against <MODEL>"));
    // Flags without effect, and devices that there are not.
    assert!(palettize(&["--bits", "2", "--device", "cpu"]).contains("--device goes with --calibrate"));
    assert!(palettize(&["--bits", "2", "--device", "nonsense"]).contains("auto, cpu, cuda and mps"));
    assert!(
        palettize(&["--bits", "2", "--calibration-samples", "9"]).contains("--calibration-samples goes with --cal")
    );
    assert!(palettize(&["--bits", "2", "--group-axis", "0"]).contains("--group-axis goes with --granularity"));
    let refused = |arguments: &[&str], expected: &str| {
        let error = fails(folder.path(), arguments, 2);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    };
    refused(&["init", "-o", "x.toml"], "--output x.toml: of which recipe?");
    refused(&["evaluate", MODEL, "--config", "no.toml"], "no.toml: can't be read");
    refused(&["evaluate", MODEL, "--config", "no.toml", "--device", "tpu"], "auto, cpu, cuda and mps");
    refused(&["demo", "--project", "nowhere"], "--project nowhere");
    refused(
        &["export", MODEL, "-o", "x", "--component", "text_encoder", "--latent-h", "8"],
        "--latent-h has no effect",
    );
    refused(&["export", MODEL, "-o", "x", "--component", "text_encoder_2"], "--component text_encoder_2: ");
    assert!(!folder.path().join("x").exists());
    let scaled = ["--bits", "2", "--cluster-dim", "2", "--per-channel-scale"];
    assert!(palettize(&scaled).contains("--per-channel-scale goes only with"));
    assert!(palettize(&[&grouped[..], &["7"]].concat()).contains("no weight fits; "));
    let (code, out, _) = run(folder.path(), &["--help"]);
    assert!(code == 0 && out.contains("palettize"), "{out}");
}

#[test]
fn palettize_writes_a_checkpoint_that_inspect_reads() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["palettize", MODEL, "-o", "x.palettes.safetensors", "--bits", "2"];
    let (code, out, error) = run(folder.path(), &arguments);
    assert_eq!(code, 0, "{error}");
    let said = "26 496 of 51 364 weights in palettes, 10 tensors, at 2.024 bits each with palettes counted";
    assert!(out.contains(said), "{out}");
    let all = out.lines().find(|line| line.contains("bits a weight")).unwrap().to_owned();
    let before = std::fs::read(folder.path().join("x.palettes.safetensors")).unwrap();
    assert!(fails(folder.path(), &arguments, 2).contains("exists already"));
    assert_eq!(std::fs::read(folder.path().join("x.palettes.safetensors")).unwrap(), before);

    let (code, out, error) = run(folder.path(), &["inspect", "--json", "x.palettes.safetensors"]);
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((json["weights"].as_u64(), json["palettized_weights"].as_u64()), (Some(51_364), Some(26_496)));
    // 2 bits a weight, and 10 palettes of 4 fp16 values.
    assert_eq!(json["palettized_bits"], 2 * 26_496 + 10 * 4 * 16);
    assert_eq!(json["bits"].as_u64(), Some(2 * 26_496 + 640 + 16 * (51_364 - 26_496)));
    assert_eq!(json["file_bytes"], before.len());
    let (_, out, _) = run(folder.path(), &["inspect", "x.palettes.safetensors"]);
    assert!(out.contains(said) && out.contains(&all), "{all} is not in {out}");
}

/// Every form from the command line to a verified package, and back to plain weights.
#[test]
fn palettes_of_every_form_go_through() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let ok = |arguments: &[&str]| {
        let (code, out, error) = run(at, arguments);
        assert_eq!(code, 0, "{arguments:?}: {error}");
        out
    };
    let grouped = ["--granularity", "per_grouped_channel", "--group-size", "8"];
    let forms: [(&str, Vec<&str>, &str); 4] = [
        ("inputs", [&["--bits", "3", "--group-axis", "1"], &grouped[..]].concat(), "3-bit palettes × 2"),
        ("vectors", vec!["--bits", "4", "--cluster-dim", "2"], "4-bit palette of 2"),
        ("scaled", vec!["--bits", "2", "--per-channel-scale"], "2-bit palette, scaled"),
        ("bytes", [&["--bits", "4", "--lut-dtype", "i8"], &grouped[..]].concat(), "4-bit palettes × 2, int8"),
    ];
    for (name, flags, kind) in forms {
        let palettes = format!("{name}.palettes.safetensors");
        let made = ok(&[&["palettize", MODEL, "-o", &palettes, "--weight-threshold", "100"], &flags[..]].concat());
        // Four channels go in and out of the network: such a weight has no groups of 8.
        let misfit = "conv_out.weight stays fp16: its 4 output channels do not divide into groups of 8";
        assert_eq!(made.contains(misfit), name == "bytes", "{made}");
        let about: serde_json::Value = serde_json::from_str(&ok(&["inspect", "--json", &palettes])).unwrap();
        let tensors = about["tensors"].as_array().unwrap();
        assert!(tensors.iter().any(|tensor| tensor["type"] == kind), "{tensors:?}");
        let recipe = about["metadata"]["recipe"].as_str().unwrap();
        assert!(flags.chunks(2).all(|flag| recipe.contains(&flag.join(" "))), "{recipe}");
        let package = ok(&["export", MODEL, "--palettes", &palettes, "-o", name, "--model-version", "tiny"]);
        let verified = ok(&["verify", package.trim(), "--against", MODEL, "--palettes", &palettes]);
        assert!(verified.contains("specification version 9"), "{verified}");
    }
    let last = "bytes.palettes.safetensors";
    let refused = ["export", MODEL, "--palettes", last, "-o", "old", "--min-deployment-target", "iOS17"];
    let error = fails(at, &refused, 2);
    assert!(error.contains("iOS17 does not hold palettes for groups of channels, as of "), "{error}");
    assert!(!at.join("old").exists());
    // The same network, its weights written out.
    let plain = ["export", MODEL, "--palettes", last, "-o", "diffusers", "--format", "diffusers"];
    ok(&plain);
    assert!(fails(at, &plain, 2).contains("diffusers exists already"));
    let package = "bytes/Stable_Diffusion_version_tiny_unet.mlpackage";
    ok(&["verify", package, "--against", "diffusers"]);
    // Plain palettes go to the first system that has any.
    ok(&["palettize", MODEL, "-o", "plain.palettes.safetensors", "--bits", "6"]);
    ok(&["export", MODEL, "--palettes", "plain.palettes.safetensors", "-o", "plain", "--model-version", "tiny"]);
    let package = "plain/Stable_Diffusion_version_tiny_unet.mlpackage";
    assert!(ok(&["verify", package]).contains("specification version 7"));
}

/// In a package each channel has a palette of its own: larger than the checkpoint, than fp16 even.
#[test]
fn what_scales_of_channels_cost_in_a_package_is_told() {
    let work = Work::new();
    let at = work.folder.path();
    let ok = |arguments: &[&str]| {
        let (code, out, error) = run(at, arguments);
        assert_eq!(code, 0, "{arguments:?}: {error}");
        (out, error)
    };
    let palettes = "x.palettes.safetensors";
    let (out, error) = ok(&["palettize", MODEL, "-o", palettes, "--bits", "8", "--per-channel-scale"]);
    let note = out
        .lines()
        .find(|line| line.starts_with("in a Core ML package palettes take "))
        .unwrap_or_else(|| panic!("{out}"));
    let warning = "10 of 10 palettized tensors take more in a Core ML package than as fp16, ";
    assert!(error.contains(warning) && error.contains("no scales of channels, take less"), "{error}");
    let (package, error) = ok(&["export", MODEL, "--palettes", palettes, "-o", "coreml"]);
    assert!(error.contains(note) && error.contains(warning), "{error}");
    let about: serde_json::Value = serde_json::from_str(&ok(&["inspect", "--json", package.trim()]).0).unwrap();
    let each = about["palettized_bits"].as_f64().unwrap() / about["palettized_weights"].as_f64().unwrap();
    assert!(note.contains(&format!(" {each:.3} bits each, not ")), "{note}: {each}");
    let scaled = ["palettize.n_bits=8", "palettize.enable_per_channel_scale=true"];
    let (out, _) = ok(&[&["check", "run.toml"], &scaled[..]].concat());
    assert!(out.contains(note) && out.contains(warning), "{out}");
    // Without scales there is nothing to tell.
    let (out, error) = ok(&["palettize", MODEL, "-o", "plain.palettes.safetensors", "--bits", "8"]);
    assert!(!out.contains("Core ML") && !error.contains("warning: "), "{out}{error}");
}

/// Not told after an hour of work.
#[test]
fn a_bundle_without_a_tokenizer_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(Path::new(MODEL), &model);
    std::fs::remove_dir_all(model.join("tokenizer")).unwrap();
    let error = fails(folder.path(), &["export", "model", "-o", "coreml", "--bundle-resources-for-swift-cli"], 1);
    assert!(error.contains("model/tokenizer has no tokenizer"), "{error}");
    assert!(!folder.path().join("coreml").exists());
}

#[test]
fn verify_of_a_checkpoint_names_inspect() {
    let file = Path::new(MODEL).join("unet/diffusion_pytorch_model.safetensors");
    let error = fails(Path::new("."), &["verify", file.to_str().unwrap()], 2);
    assert!(error.contains("is not a .mlpackage or .mlmodelc folder; `palettist inspect` tells what"), "{error}");
}

/// A package that coremltools wrote.
#[test]
fn inspect_reads_packages() {
    let Some(package) = shared("coreml_packages/unet_pal2_ios16.mlpackage") else { return };
    let folder = package.parent().unwrap();
    let (code, out, error) = run(folder, &["inspect", "--json", package.to_str().unwrap()]);
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["kind"], "Core ML package");
    let (weights, bits) = (json["palettized_weights"].as_f64().unwrap(), json["palettized_bits"].as_f64().unwrap());
    assert!(weights > 0.0 && bits / weights > 2.0 && bits / weights < 2.2, "{bits} bits of {weights} weights");
    let (_, out, _) = run(folder, &["inspect", package.to_str().unwrap()]);
    assert!(out.contains("2-bit palette") && out.contains("input sample"), "{out}");
}

/// What is left of a package is named for what it lacks, by itself and in a folder.
#[test]
fn a_package_without_a_part_is_named_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let (code, out, error) = run(at, &["export", MODEL, "-o", "x"]);
    assert_eq!(code, 0, "{error}");
    let package = out.trim().to_owned();
    let aside = |file: &str| {
        let path = at.join(&package).join(file);
        std::fs::rename(&path, at.join("aside")).unwrap();
        for what in [package.as_str(), "x"] {
            let said = fails(at, &["inspect", what], 1);
            assert!(said.contains(&format!("is not a sound Core ML package: {file} is missing")), "{said}");
        }
        let said = fails(at, &["verify", &package], 1);
        assert!(said.contains(&format!("{file} is missing")), "{said}");
        std::fs::rename(at.join("aside"), path).unwrap();
    };
    aside("Manifest.json");
    aside("Data/com.apple.CoreML/model.mlmodel");
    // Under another name, too.
    std::fs::rename(at.join(&package), at.join("renamed")).unwrap();
    std::fs::remove_file(at.join("renamed/Manifest.json")).unwrap();
    assert!(fails(at, &["inspect", "renamed"], 1).contains("Manifest.json is missing"));
}

/// A model's folder, one of its networks' and a run's: what they are, and the files in them.
#[test]
fn inspect_of_a_folder_tells_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let (code, out, _) = run(folder.path(), &["inspect", MODEL]);
    assert_eq!(code, 0);
    assert!(out.contains(": model folder, StableDiffusionPipeline, "), "{out}");
    assert!(out.contains("unet/diffusion_pytorch_model.safetensors: ") && out.contains("text_encoder/"), "{out}");
    let (_, out, _) = run(folder.path(), &["inspect", &format!("{MODEL}/unet")]);
    assert!(out.contains(": network folder, UNet2DConditionModel, "), "{out}");
    let said = fails(folder.path(), &["inspect", "."], 1);
    assert!(said.contains("holds no .safetensors file and no Core ML package"), "{said}");
}

/// Every file is told, whatever the others are, and of each what it is; what a terminal would obey is written out.
#[test]
fn inspect_goes_through_all_files() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, tensors: &str| {
        let mut header = format!("{{{tensors}}}");
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 72]].concat();
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    let tensor = |name: &str, kind: &str| {
        format!("\"{name}\": {{\"dtype\": \"{kind}\", \"shape\": [1, 9, 8 ], \"data_offsets\": [0, 72]}}")
    };
    write("fp8.safetensors", &tensor("model.diffusion_model.input_blocks.0.0.weight", "F8_E4M3"));
    write("peft.safetensors", &tensor("down_blocks.0.to_q.base_layer.weight", "U8"));
    write("lora.safetensors", &tensor("unet.to_q.lora_A.weight", "U8"));
    write("control.safetensors", &tensor("controlnet_cond_embedding.conv_in.weight", "U8"));
    write("evil.safetensors", &tensor("a\\u001b[2Jb\\nc\\u009bd", "U8"));
    std::fs::write(folder.path().join("bad.safetensors"), "no").unwrap();
    let names = ["fp8", "bad", "peft", "lora", "control", "evil"].map(|name| format!("{name}.safetensors"));
    let arguments: Vec<&str> = ["inspect"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let (code, out, err) = run(folder.path(), &arguments);
    assert_eq!(code, 1);
    assert!(err.contains("bad.safetensors is not a safetensors file") && err.lines().count() == 1, "{err}");
    for said in [
        "fp8.safetensors: safetensors, a UNet alone, in the original layout under model.diffusion_model., 9 input channels",
        "f8_e4m3",
        "a network as PEFT saves it",
        "lora.safetensors: safetensors, a LoRA, ",
        "a ControlNet",
        r"a\u001b[2Jb\nc\u009bd",
    ] {
        assert!(out.contains(said), "{said}: {out}");
    }
    assert!(!out.contains('\u{1b}') && !out.contains('\u{9b}'), "{out}");
}

#[test]
fn a_truncated_safetensors_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(MODEL).join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(source).unwrap();
    std::fs::write(folder.path().join("half.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let error = fails(folder.path(), &["inspect", "half.safetensors"], 1);
    assert!(error.contains("half.safetensors") && error.lines().count() == 1, "{error}");
}

#[test]
fn doctor_knows_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let (code, out, error) = run(folder.path(), &["doctor", "--json"]);
    assert_eq!(code, 0, "{error}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(json["libtorch"].as_str().unwrap().starts_with("2."), "{out}");
    assert!(json["devices"].as_array().unwrap().iter().any(|device| device["device"] == "cpu"), "{out}");
    assert!(json["disk_free_bytes"].as_u64().unwrap() > 0, "{out}");
}

/// `palettist init dreambooth-2bit -o - | head -1`
#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
        .args(["init", "dreambooth-2bit", "-o", "-"])
        .current_dir(folder.path())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()));
}

/// What is warned of is told once, by `check` among its lines, by others on standard error; and a wrong config ends with 2.
#[test]
fn keys_without_effect_are_told_by_every_command() {
    let work = Work::new();
    let at = work.folder.path();
    work.add_to_config("lr_scheduler = \"cosine\"\nlr_power = 2.0\ntrain_batch_size = 1\n[validation]\nseed = 1\n");
    let power = "warning: run.toml:13:1: `train.lr_power` has no effect: it is for train.lr_scheduler = \"polynomial\"";
    let (code, out, error) =
        run(at, &["check", "run.toml", "--no-estimate", "palettize.enabled=false", "palettize.n_bits=2"]);
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(out.matches(power).count(), 1, "{out}");
    let palettes =
        "warning: `palettize.n_bits=2` on the command line: `palettize.n_bits` has no effect: there are no palettes";
    assert_eq!(out.matches(palettes).count(), 1, "{out}");
    assert!(out.contains("no problems found"), "{out}");

    let refused = fails_with(at, &["evaluate", MODEL, "--config", "run.toml", "train.max_train_steps=20"], 2);
    assert_eq!(refused.matches(power).count(), 1, "{refused}");
    let unused = "warning: `train.max_train_steps=20` on the command line has no effect on `evaluate`";
    assert!(refused.contains(unused), "{refused}");
    assert!(refused.contains("error: the config: `data.validation_data_dir` is missing"), "{refused}");
    let error = fails(at, &["check", "run.toml", "distill.lambda_sd=2"], 2);
    assert!(error.contains("`distill.lambda_sd` has no effect: the float model does not teach"), "{error}");
    let error = fails_with(at, &["train", "run.toml", "--resume", "nowhere"], 2);
    assert!(error.contains("--resume nowhere: does not exist"), "{error}");
}

/// Standard error of what must fail with `code`, after warnings.
fn fails_with(folder: &Path, arguments: &[&str], code: i32) -> String {
    let (found, _, error) = run(folder, arguments);
    assert_eq!(found, code, "{arguments:?}: {error}");
    error
}

#[test]
fn check_tells_how_flags_of_prompts_are_understood() {
    let work = Work::new();
    work.add_to_config(
        "[sample]\nsample_every_n_steps = 2\nprompts = [\"a cat\", \"a well-fed dog --n blurry --w 48 --h 32 --d 7 --l 5 --s 9\"]\n",
    );
    std::fs::create_dir(work.path("others")).unwrap();
    for i in 0..3 {
        let other = concat!(env!("CARGO_MANIFEST_DIR"), "/datasets/sketchbook/validation/000");
        std::fs::copy(format!("{other}{i}.png"), work.path(&format!("others/{i}.png"))).unwrap();
        std::fs::write(work.path(&format!("others/{i}.txt")), "a thing").unwrap();
    }
    let (code, out, error) =
        run(work.folder.path(), &["check", "run.toml", "--no-estimate", "data.validation_data_dir=others"]);
    assert_eq!(code, 0, "{error}");
    let told = "samples    \"a well-fed dog\", without \"blurry\", 48×32 px, seed 7, guidance 5, 9 steps";
    assert!(out.lines().any(|line| line == told), "{out}");
    // No heading runs into its text.
    assert!(out.contains("validation 3 pictures in others"), "{out}");
}

#[test]
fn verify_and_generate_refuse_what_has_no_effect() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let (code, out, error) = run(at, &["export", MODEL, "-o", "x", "--quantize-nbits", "8", "--model-version", "tiny"]);
    assert_eq!(code, 0, "{error}");
    let (package, palettes) = (out.trim().to_owned(), "x.palettes.safetensors");
    assert_eq!(run(at, &["palettize", MODEL, "-o", palettes, "--bits", "8"]).0, 0);
    let verify = ["verify", &package, "--against", MODEL];
    for (more, expected) in [
        (
            vec!["--palettes", palettes, "--quantize-nbits", "8"],
            "--quantize-nbits has no effect: the UNet's palettes are",
        ),
        (vec!["--palettes", palettes, "--quantize-nbits", "unet=8"], "are both for the UNet: one of them"),
        (vec!["--quantize-nbits", "vae_decoder=8"], "--quantize-nbits has no effect: it names none"),
        (
            vec!["--quantize-nbits", "8", "--vae", MODEL],
            "--vae has no effect: none of the packages is an autoencoder's",
        ),
    ] {
        let error = fails(at, &[&verify[..], &more[..]].concat(), 2);
        assert!(error.contains(expected), "{error}");
    }
    let (code, out, error) = run(at, &["export", MODEL, "-o", "y", "--component", "vae_decoder"]);
    assert_eq!(code, 0, "{error}");
    let error = fails(at, &["verify", out.trim(), "--against", MODEL, "--prediction-type", "epsilon"], 2);
    assert!(error.contains("--prediction-type has no effect: none of the packages is a UNet"), "{error}");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pipeline/model");
    let drawn = ["generate", model, "--prompt", "a", "-o", "b.png", "--steps", "1", "--save-latents", "x.safetensors"];
    assert_eq!(run(at, &drawn).0, 0);
    let generate = ["generate", model, "--prompt", "a", "-o", "a.png"];
    for (more, expected) in [
        (vec!["--batch-size", "0"], "--batch-size 0"),
        (
            vec!["--seed", "1", "--latents", "x.safetensors", "--scheduler", "ddim"],
            "--seed has no effect with --latents",
        ),
        (vec!["--height", "60"], "--height 60 is not a multiple of"),
        (vec!["--width", "1000000"], "--width 1000000 is more than 8192, the most that is drawn"),
        (vec!["--seed", "-1"], "a seed is a whole number from 0 to"),
        (vec!["--steps", "-3"], "invalid value '-3' for '--steps"),
        (vec!["--steps", "2000"], "--steps 2000: "),
        (vec!["--scheduler", "deis"], "`deis` is not a sampler"),
        (vec!["--device", "tpu"], "auto, cpu, cuda and mps"),
        (vec!["--guidance-scale", "1", "--negative-prompt", "b"], "--negative-prompt has no effect"),
    ] {
        let error = fails(at, &[&generate[..], &more[..]].concat(), 2);
        assert!(error.contains(expected), "{error}");
    }
    assert!(!at.join("a.png").exists());
}
