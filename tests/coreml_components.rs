//! The packages beside the UNet: what they declare, and what they compute, through the command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use palettist::coreml::read::{Feature, Package};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");

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

#[test]
fn components_are_named_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let only = export(MODEL, folder.path(), &["--component", "vae_encoder,text_encoder", "--latent-h", "3"]);
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
    assert!(!folder.path().join(name("unet")).exists());
}
