//! The packages beside the UNet: what they declare, and what they compute, through the command line.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::checker;
use palettist::coreml::components::Part;
use palettist::coreml::components::apple::misfits;
use palettist::coreml::components::unet::UnetOptions;
use palettist::coreml::reading::{Feature, Package};
use palettist::source::Model;
use serde_json::json;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base");

/// Runs the program, which must succeed; its standard output.
fn palettist(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Exports, and returns the packages in the order in which they were written.
fn export(model: &str, folder: &Path, more: &[&str]) -> Vec<PathBuf> {
    let arguments = [&["export", model, "-o", folder.to_str().unwrap()], more].concat();
    palettist(&arguments).lines().map(PathBuf::from).collect()
}

fn declared(features: &[Feature]) -> Vec<String> {
    features.iter().map(|feature| format!("{} {}", feature.name, feature.kind)).collect()
}

/// The tables of what Apple's programs read, for a model of 8×8 latents, and a text encoder of width 8.
#[test]
fn packages_keep_the_contract_and_compute_what_the_networks_compute() {
    let tables: [(&str, &[&str], &[&str]); 4] = [
        (
            "unet",
            &["sample FLOAT16[2, 4, 16, 16]", "timestep FLOAT16[2]", "encoder_hidden_states FLOAT16[2, 8, 1, 77]"],
            &["noise_pred FLOAT32[2, 4, 16, 16]"],
        ),
        (
            "text_encoder",
            &["input_ids FLOAT32[1, 77]"],
            &["last_hidden_state FLOAT32[1, 77, 8]", "pooled_outputs FLOAT32[1, 8]"],
        ),
        ("vae_decoder", &["z FLOAT16[1, 4, 16, 16]"], &["image FLOAT32[1, 3, 128, 128]"]),
        ("vae_encoder", &["x FLOAT16[1, 3, 128, 128]"], &["latent FLOAT32[1, 8, 16, 16]"]),
    ];
    for target in ["iOS16", "iOS17", "iOS18"] {
        let folder = tempfile::tempdir().unwrap();
        let flags = ["--component", "all", "--min-deployment-target", target, "--model-version", "someone/tiny"];
        let packages = export(MODEL, folder.path(), &flags);
        assert_eq!(packages.len(), tables.len());
        for (path, (component, inputs, outputs)) in packages.iter().zip(&tables) {
            let name = format!("Stable_Diffusion_version_someone_tiny_{component}.mlpackage");
            assert_eq!(path.file_name().unwrap(), &*name);
            let package = Package::open(path).unwrap();
            assert_eq!(declared(package.inputs()), *inputs, "{component}");
            assert_eq!(declared(package.outputs()), *outputs, "{component}");
        }
        for path in packages {
            let said = palettist(&["verify", path.to_str().unwrap(), "--against", MODEL, "--min-psnr", "60"]);
            let rows: Vec<&str> = said.lines().filter(|line| line.ends_with(" dB")).collect();
            eprintln!("{said}");
            assert!(!rows.is_empty(), "{said}");
            for row in rows {
                let words: Vec<&str> = row.split_whitespace().collect();
                let single: f64 = words[words.len() - 4].parse().unwrap();
                assert!(single > 100.0, "{row}");
            }
        }
    }
}

/// The base's encoder has values of 300 and more, whose squares fp16 does not hold: its norms must. Where it lost them was
/// first seen by comparing layers.
#[test]
fn an_encoder_of_large_values_holds_in_fp16() {
    let folder = tempfile::tempdir().unwrap();
    let packages = export(BASE, folder.path(), &["--component", "vae_encoder,vae_decoder"]);
    let [decoder, encoder] = packages.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>()[..] else {
        panic!()
    };
    let said = palettist(&["verify", decoder, encoder, "--against", BASE, "--layers", "--min-psnr", "60"]);
    assert!(said.contains("55 of 55 layers compared"), "{said}");
    assert!(said.contains("39 of 39 layers compared"), "{said}");
}

/// One bit of one index, which moves the outputs by less than palettes do.
#[test]
fn a_damaged_weight_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let packages = export(BASE, folder.path(), &["--component", "vae_decoder", "--quantize-nbits", "4"]);
    let package = packages[0].to_str().unwrap();
    let told = ["verify", package, "--against", BASE, "--min-psnr", "10", "--quantize-nbits", "4"];
    assert!(palettist(&told).contains("all 110 parameters are the network's, to the last bit\n"));
    let path = packages[0].join("Data/com.apple.CoreML/weights/weight.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x04;
    std::fs::write(&path, bytes).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(told).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("1 of 110 parameters are not the network's: decoder."), "{said}");
}

#[test]
fn components_are_named_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let only = export(MODEL, folder.path(), &["--component", "vae_encoder, text_encoder", "--latent-h", "3"]);
    let names: Vec<_> = only.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    let name = |part: &str| format!("Stable_Diffusion_version_pipeline_{part}.mlpackage");
    assert_eq!(names, [name("text_encoder"), name("vae_encoder")]);
    assert_eq!(declared(Package::open(&only[1]).unwrap().inputs()), ["x FLOAT16[1, 3, 24, 128]"]);

    let refused = |more: &[&str]| {
        let arguments = [&["export", MODEL, "-o", folder.path().to_str().unwrap()], more].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused(&["--component", "unet,vae"]);
    assert!(said.contains("unknown component `vae`: unet, text_encoder"), "{said}");
    // Said before anything is written.
    let said = refused(&["--component", "all"]);
    assert!(said.contains("text_encoder.mlpackage exists already"), "{said}");
    // What would have no effect is not passed over.
    let said = refused(&["--component", "vae_decoder", "--unet-batch-one"]);
    assert!(said.contains("--unet-batch-one is about the UNet"), "{said}");
    let said = refused(&["--component", "vae_decoder", "--attention-implementation", "ORIGINAL"]);
    assert!(said.contains("--attention-implementation is about the UNet"), "{said}");
    let said = refused(&["--format", "diffusers", "--attention-implementation", "ORIGINAL"]);
    assert!(said.contains("--attention-implementation: for Core ML packages"), "{said}");
    let said = refused(&["--quantize-nbits", "unet=4,vae_decoder=6"]);
    assert!(said.contains("--component leaves vae_decoder out"), "{said}");
    let said = refused(&["--format", "diffusers", "--quantize-nbits", "4"]);
    assert!(said.contains("--quantize-nbits: for Core ML packages"), "{said}");
    let palettes = folder.path().join("x.palettes.safetensors");
    let palettes = palettes.to_str().unwrap();
    palettist(&["palettize", MODEL, "-o", palettes, "--bits", "4"]);
    let said = refused(&["--palettes", palettes, "--quantize-nbits", "4"]);
    assert!(said.contains("--quantize-nbits has nothing to palettize"), "{said}");
    let said = refused(&["--model-version", "two\nlines"]);
    assert!(said.contains(r#""two\nlines" has control characters"#), "{said}");
    std::fs::create_dir(folder.path().join("Stable_Diffusion_version_another_unet.mlpackage")).unwrap();
    let said = refused(&["--bundle-resources-for-swift-cli", "--component", "vae_decoder"]);
    assert!(said.contains("another_unet.mlpackage is of another model"), "{said}");
    let said = refused(&["--latent-w", "99999"]);
    assert!(said.contains("from 1 to 4096"), "{said}");
    assert!(!folder.path().join(name("unet")).exists());
}

/// Each where it matters for what is exported, and nothing of models that are as Apple's.
#[test]
fn what_apples_programs_cannot_use_is_told() {
    use Part::{SafetyChecker, TextEncoder, Unet, VaeDecoder, VaeEncoder};
    let open = |path: &Path| Model::open(path.to_str().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let changed = |file: &str, changes: serde_json::Value| {
        for part in ["unet", "vae", "scheduler"] {
            std::fs::create_dir_all(folder.path().join(part)).unwrap();
            for entry in std::fs::read_dir(Path::new(MODEL).join(part)).unwrap().flatten() {
                std::fs::copy(entry.path(), folder.path().join(part).join(entry.file_name())).unwrap();
            }
        }
        let path = folder.path().join(file);
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        std::fs::write(path, config.to_string()).unwrap();
        open(folder.path())
    };
    let options =
        |model: &Model| UnetOptions { height: 64, width: 64, ..UnetOptions::new(&model.unet_config().unwrap()) };
    let misfits = |model: &Model, parts: &[Part]| misfits(model, parts, &options(model)).unwrap();
    let fits = |model: &Model| misfits(model, &Part::of(model)).is_empty();
    for model in [MODEL, concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sdxl/model")] {
        assert!(fits(&open(Path::new(model))), "{model}");
    }
    let (unet, vae) = ("unet/config.json", "vae/config.json");
    let small = json!({
        "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    });
    let rest = [SafetyChecker, TextEncoder];
    let halves = [VaeEncoder, VaeDecoder];
    let cases = [
        (unet, json!({ "in_channels": 9 }), &[Unet][..], "takes 9 channels and gives 4, as one for inpainting does;"),
        (unet, json!({ "in_channels": 16, "out_channels": 16 }), &[Unet], "takes 16 channels and gives 16; Apple's"),
        ("scheduler/scheduler_config.json", json!({ "beta_schedule": "linear" }), &[Unet], "the noise schedule"),
        (vae, json!({ "latent_channels": 16 }), &halves, "latents of the autoencoder have 16 channels"),
        (vae, json!({ "scaling_factor": 0.3 }), &halves, "`scaling_factor` is 0.3, and Apple's programs divide"),
        (vae, small, &halves, "makes pictures 2 times as large as latents"),
    ];
    for (file, changes, affected, said) in cases {
        let model = changed(file, changes);
        for part in [Unet, VaeEncoder, VaeDecoder] {
            let lines = misfits(&model, &[part]);
            let told = matches!(&lines[..], [line] if line.contains(said));
            assert!(if affected.contains(&part) { told } else { lines.is_empty() }, "{part}: {lines:?}");
        }
    }
    // Pictures of 128 pixels now.
    let lines = misfits(&open(folder.path()), &rest);
    assert!(matches!(&lines[..], [line] if line.contains("is for pictures of 128×128 pixels")), "{lines:?}");

    const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base");
    let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
        .args(["export", BASE, "--component", "vae_decoder", "-o", folder.path().to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("warning: the autoencoder's `scaling_factor` is"), "{said}");
}

/// What Ctrl-C leaves is in the way of no second try.
#[test]
fn an_export_that_was_cut_off_is_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let arguments = ["export", MODEL, "-o", folder.path().to_str().unwrap(), "--chunk-unet"];
    let more = ["--component", "unet,vae_encoder"];
    let packages = ["unet_chunk1", "unet_chunk2", "vae_encoder"]
        .map(|part| format!("Stable_Diffusion_version_pipeline_{part}.mlpackage"));
    let left = || {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    palettist(&[&arguments[..], &more].concat());
    let before = std::fs::read(place(&packages[2]).join("Manifest.json")).unwrap();
    let leftovers = [
        ".Stable_Diffusion_version_pipeline_unet.mlpackage.999-0.part".to_owned(),
        format!(".{}.999-2.old", packages[0]),
        format!(".{}.999-3.old", packages[2]),
        ".Stable_Diffusion_version_pipeline_unet.mlpackage.999-1.whole".to_owned(),
    ];
    for name in &leftovers {
        std::fs::create_dir_all(place(name).join("Data")).unwrap();
    }
    std::fs::write(place(&packages[2]).join("Manifest.json"), "{").unwrap();
    std::fs::remove_dir_all(place(&packages[1])).unwrap();

    let refused = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_palettist"))
            .args(arguments)
            .args(["--component", "unet"])
            .args(more)
            .output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused(&[]);
    assert!(
        said.contains("_unet_chunk1.mlpackage exists already") && said.contains("--overwrite replaces it"),
        "{said}"
    );
    palettist(&[&arguments[..], &more, &["--overwrite"]].concat());
    assert_eq!(left(), packages);
    assert_eq!(std::fs::read(place(&packages[2]).join("Manifest.json")).unwrap(), before);

    // What is no package is nobody's to replace.
    std::fs::remove_file(place(&packages[1]).join("Manifest.json")).unwrap();
    let said = refused(&["--overwrite"]);
    assert!(said.contains("_unet_chunk2.mlpackage exists and is not a Core ML package"), "{said}");
    assert!(place(&packages[1]).join("Data").is_dir());
}

/// Whichever comes later, and however late: what the other wrote is in its way.
#[test]
fn two_exports_into_one_folder_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["export", MODEL, "-o", folder.path().to_str().unwrap(), "--component", "all"];
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let outputs = [start(), start()].map(|process| process.wait_with_output().unwrap());
    for output in outputs.iter().filter(|output| !output.status.success()) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.trim_end().ends_with("is left as it is: --overwrite replaces it"), "{said}");
    }
    assert!(std::fs::read_dir(folder.path()).unwrap().all(|entry| Package::open(&entry.unwrap().path()).is_ok()));
    palettist(&[&arguments[..], &["--overwrite"]].concat());
}

/// A UNet's package beside another model is told in a line, whatever it is that does not fit.
#[test]
fn packages_of_other_models_are_told() {
    const ROOT: &str = env!("CARGO_MANIFEST_DIR");
    let folder = tempfile::tempdir().unwrap();
    let packages = export(BASE, folder.path(), &["--component", "unet"]);
    let package = packages[0].to_str().unwrap();
    for (model, what) in [
        ("tests/fixtures/pipeline/model", "`conv_in.bias` has 64 values in the package, 8 in the model"),
        ("tests/fixtures/sdxl/model", "its UNet is none of Stable Diffusion XL"),
    ] {
        let model = format!("{ROOT}/{model}");
        let arguments = ["verify", package, "--against", &model];
        let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("a package of another model") && said.contains(what), "{said}");
        assert!(!said.contains("internal error"), "{said}");
    }
}

/// diffusers and transformers compute what the packages compute, run by an independent evaluator.
#[test]
fn packages_agree_with_diffusers() {
    let Some((python, tools)) = checker() else { return };
    let folder = tempfile::tempdir().unwrap();
    let oracle = |arguments: &[&Path]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/components.py");
        let output = Command::new(&python).arg(script).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    oracle(&[Path::new("make"), folder.path()]);
    let verified = |package: &Path, model: &Path| {
        let said = palettist(&["verify", package.to_str().unwrap(), "--against", model.to_str().unwrap()]);
        eprintln!("{said}");
    };
    let models = [("sd1", "iOS16"), ("sd1", "iOS18"), ("sd2v", "iOS16"), ("sd2v", "iOS17"), ("bk", "iOS16")];
    for (model, target) in models {
        let model = folder.path().join(model);
        let checker = if model.join("model/safety_checker").is_dir() { ",safety_checker" } else { "" };
        let parts = format!("unet,text_encoder,vae_decoder,vae_encoder{checker}");
        let flags = ["--component", &parts, "--min-deployment-target", target, "--model-version", "tiny"];
        let (model, folder) = (model.join("model"), model.join(format!("coreml {target}")));
        for package in export(model.to_str().unwrap(), &folder, &flags) {
            verified(&package, &model);
        }
    }
    let said = oracle(&[Path::new("check"), folder.path(), &tools]);
    let results: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let results = results.as_object().unwrap();
    assert_eq!(results.len(), 22);
    for (package, result) in results {
        eprintln!("{package}: {}", result["ports"]);
        assert_eq!(result["issues"], serde_json::json!([]), "{package}");
        for (row, psnr) in result["rows"].as_object().unwrap() {
            let psnr = psnr.as_f64().unwrap();
            eprintln!("    {row}: {psnr:.1} dB");
            assert!(psnr >= if row.ends_with("fp32") { 90.0 } else { 55.0 }, "{package}, {row}: {psnr:.1} dB");
        }
    }
}

#[test]
fn post_training_palettes_are_those_of_the_network_that_is_compared() {
    let folder = tempfile::tempdir().unwrap();
    let bits = ["--quantize-nbits", "6,text_encoder=2"];
    let packages = export(BASE, folder.path(), &[&["--component", "text_encoder,vae_decoder"], &bits[..]].concat());
    for (path, least) in packages.iter().zip([2.0, 6.0]) {
        let path = path.to_str().unwrap();
        let said = palettist(&[&["verify", path, "--against", BASE, "--min-psnr", "50"], &bits[..]].concat());
        eprintln!("{said}");
        // Bits of an index, and a little for tables and for weights too small for one.
        let each: f64 =
            said.split(" bits a weight").next().unwrap().split_whitespace().last().unwrap().parse().unwrap();
        assert!((least..least + 0.5).contains(&each), "{said}");
    }
    let package = Package::open(&packages[0]).unwrap();
    let weights = package.weights().unwrap();
    let palettized: Vec<&str> = weights.iter().filter(|w| w.palettes.is_some()).map(|w| w.name.as_str()).collect();
    assert!(!palettized.is_empty());
    assert!(palettized.iter().all(|name| !name.contains("embedding") && !name.contains("mask")), "{palettized:?}");
}

#[test]
fn a_bundle_holds_the_tokenizer_as_swift_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("my app");
    let said = palettist(&["export", MODEL, "-o", output.to_str().unwrap(), "--bundle-resources-for-swift-cli"]);
    if cfg!(target_os = "macos") {
        return;
    }
    let command = format!("sh '{}'", output.join("compile.sh").display());
    assert!(said.contains(&command) && !said.contains("missing"), "{said}");
    let resources = output.join("Resources");
    // All of it, compiled: what an app takes as it is.
    let mut names: Vec<_> =
        std::fs::read_dir(&resources).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let compiled = ["TextEncoder", "Unet", "VAEDecoder", "VAEEncoder"].map(|name| format!("{name}.mlmodelc"));
    for name in &compiled {
        assert!(names.contains(name), "{names:?}");
        Package::open(&resources.join(name)).unwrap().check_values().unwrap();
        assert!(said.contains(&resources.join(name).display().to_string()), "{said}");
    }
    assert!(said.contains("no device has loaded one of these yet"), "{said}");
    let paths = compiled.map(|name| resources.join(name).display().to_string());
    let arguments: Vec<&str> = paths.iter().map(String::as_str).collect();
    let verified = palettist(&[&["verify"], &arguments[..], &["--against", MODEL]].concat());
    assert!(verified.contains("4 of 4 packages agree with the model"), "{verified}");
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    let own = Path::new(MODEL).join("tokenizer");
    let tokens = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let vocabulary = tokens(&read(resources.join("vocab.json")));
    let whole = tokens(&read(own.join("tokenizer.json")));
    assert_eq!(vocabulary, whole["model"]["vocab"]);
    assert!(vocabulary["<|startoftext|>"].is_u64() && vocabulary["<|endoftext|>"].is_u64());
    // Ranks are numbers of lines; the last one counts only if it ends.
    let merges = read(resources.join("merges.txt"));
    assert!(merges.ends_with('\n'));
    let pairs: Vec<&str> = merges.lines().filter(|line| !line.starts_with('#')).collect();
    let expected = whole["model"]["merges"].as_array().unwrap();
    assert_eq!(pairs.len(), expected.len());
    for (pair, expected) in pairs.iter().zip(expected) {
        let expected = expected.as_array().map_or_else(
            || expected.as_str().unwrap().to_owned(),
            |pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        );
        assert_eq!(*pair, expected);
    }
}
