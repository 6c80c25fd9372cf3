//! What the program does with one input of each fuzzed kind. Refusing it is fine; a panic, a signal, minutes or gigabytes are
//! not. The targets in `targets/` and the plain test `tests/fuzzed.rs` both call these.

use std::fs;
use std::path::{Component as Part, Path};

use palettist::config;
use palettist::coreml::reading::{Package, Precision, evaluate};
use palettist::data::picture::decode_picture;
use palettist::data::{CaptionOptions, Crop, Filter, Missing, Transform, read_folder};
use palettist::files::TensorFile;
use palettist::palette::{PalettizedCheckpoint, PalettizedFile};
use palettist::source::lora::LoraChoice;
use palettist::source::{Component, Model, ModelOptions};
use tch::{Device, Kind, Tensor};

/// The manifest around every fuzzed package.
pub const MANIFEST: &[u8] = br#"{
    "fileFormatVersion": "1.0.0",
    "itemInfoEntries": {
        "a": {"author": "com.apple.CoreML", "description": "", "name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"},
        "b": {"author": "com.apple.CoreML", "description": "", "name": "weights", "path": "com.apple.CoreML/weights"}
    },
    "rootModelIdentifier": "a"
}"#;

/// A folder in memory where there is one: thousands of inputs a second are written to files.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a folder to write to")
}

/// A safetensors file: its header, its tensors, and the model that it may be.
pub fn safetensors(bytes: &[u8]) {
    let folder = folder();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).expect("written");
    if let Ok(file) = TensorFile::open(&path) {
        let _ = file.metadata();
        for name in file.names() {
            let shape = file.shape(&name).expect("a shape for each name");
            let stored = file.bytes(&name).expect("a checked header's bytes lie in the file");
            if let Ok(kind) = file.kind(&name) {
                let tensor = file.tensor(&name).expect("a tensor of a known type");
                assert_eq!((tensor.kind(), tensor.size()), (kind, shape.clone()));
                // Numbers of fp8 are read wider than they are stored.
                let width = if file.is_fp8(&name) { 1 } else { kind.elt_size_in_bytes() };
                assert_eq!(stored.len(), tensor.numel() * width);
                for (from, count) in [(0, 1), (1, 2), (i64::MAX, 1)] {
                    let _ = file.rows(&name, from, count);
                }
            }
        }
    }
    if let Ok(model) = Model::open(&path.display().to_string()) {
        for component in Component::ALL {
            let _ = model.config_json(component);
            let _ = model.check(component);
        }
        let _ = model.scheduler_config();
    }
}

/// A LoRA, merged into a small model.
pub fn loras(bytes: &[u8]) {
    let folder = folder();
    let path = folder.path().join("lora.safetensors");
    fs::write(&path, bytes).expect("written");
    // This file lies in tests/fuzz, wherever it is compiled from.
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|root| root.join("tests/fuzz").is_dir());
    let model = model.expect("the checkout").join("tests/fixtures/pipeline/model").display().to_string();
    let lora = LoraChoice { path: path.display().to_string(), weight: 0.7, te_weight: None };
    let Ok(model) = Model::open_with(&model, &ModelOptions { loras: vec![lora], ..ModelOptions::default() }) else {
        return;
    };
    for component in [Component::Unet, Component::TextEncoder] {
        if let Ok(weights) = model.weights(component, Kind::Float, Device::Cpu) {
            assert!(weights.values().all(|weight| weight.kind() == Kind::Float));
        }
    }
}

/// A palettized checkpoint: every parameter read, its weights made, and taken for a subject of itself.
pub fn palettes(bytes: &[u8]) {
    let folder = folder();
    let path = folder.path().join("unet.palettes.safetensors");
    fs::write(&path, bytes).expect("written");
    let Ok(file) = PalettizedFile::open(&path) else { return };
    for name in file.names() {
        let _ = file.read(name);
    }
    if let Ok(checkpoint) = PalettizedCheckpoint::of(&file)
        && let Ok(weights) = checkpoint.weights(Kind::Float, Device::Cpu)
    {
        assert_eq!(weights.len(), file.names().count());
    }
    let _ = file.with_subject(&path);
}

/// A config, then, between null bytes, a recipe that it names (unless empty), and `key=value` changes.
pub fn configs(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\0');
    let (toml, recipe) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut changes: Vec<String> = parts.map(str::to_owned).collect();
    let folder = folder();
    if !recipe.is_empty() {
        let path = folder.path().join("recipe.toml");
        fs::write(&path, recipe).expect("written");
        changes.push(format!("palettize.recipe={:?}", path.display().to_string()));
    } else if toml.contains("recipe") {
        // A file of this machine, which is none of the fuzzer's.
        changes.push("palettize.recipe=\"no such recipe\"".to_owned());
    }
    match config::parse(toml, "fuzzed.toml", &changes) {
        Err(error) => assert!(!error.problems.is_empty()),
        Ok(read) => {
            let text = read.config.resolved_toml();
            let again = config::parse(&text, "resolved.toml", &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(again.config.resolved_toml(), text);
        }
    }
}

/// `model.mlmodel` and `weight.bin` of a package's bytes: four bytes of the first one's length, the first, the second.
pub fn split_package(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return (bytes, &[]) };
    rest.split_at_checked(u32::from_le_bytes(*length) as usize).unwrap_or((rest, &[]))
}

/// The inverse of [`split_package`].
pub fn join_package(model: &[u8], weights: &[u8]) -> Vec<u8> {
    [&(model.len() as u32).to_le_bytes(), model, weights].concat()
}

/// A package: opened, its weights counted and looked at, run on zeros where it is small.
pub fn packages(bytes: &[u8]) {
    let (model, weights) = split_package(bytes);
    let folder = folder();
    let data = folder.path().join("Data/com.apple.CoreML");
    fs::create_dir_all(data.join("weights")).expect("a folder");
    fs::write(folder.path().join("Manifest.json"), MANIFEST).expect("written");
    fs::write(data.join("model.mlmodel"), model).expect("written");
    fs::write(data.join("weights/weight.bin"), weights).expect("written");
    let Ok(package) = Package::open(folder.path()) else { return };
    for weight in package.weights().unwrap_or_default() {
        let _ = package.weight(&weight.name);
    }
    let _ = package.check_values();
    let elements = |shape: &[i64]| shape.iter().fold(1_i64, |product, &size| product.saturating_mul(size));
    if package.inputs().iter().all(|input| elements(&input.kind.shape) < 100_000) {
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let inputs = package.inputs().iter().map(|input| (input.name.clone(), zeros(&input.kind.shape))).collect();
        let _ = evaluate(&package, &inputs, Precision::Float32);
    }
}

/// A folder of pictures and captions: between null bytes `metadata.jsonl` (no such file where it is empty), then names and
/// contents of other files.
pub fn captions(bytes: &[u8]) {
    let mut parts = bytes.split(|&byte| byte == 0);
    let folder = folder();
    let metadata = parts.next().unwrap_or_default();
    if !metadata.is_empty() {
        fs::write(folder.path().join("metadata.jsonl"), metadata).expect("written");
    }
    while let Some(name) = parts.next() {
        let contents = parts.next().unwrap_or_default();
        let name = String::from_utf8_lossy(name);
        let path = Path::new(&*name);
        let inside = path.components().all(|part| matches!(part, Part::Normal(_) | Part::CurDir));
        // What the file system refuses (too long, a file where a folder must be) is not there.
        if inside && path.components().count() < 40 {
            let path = folder.path().join(path);
            let _ = path.parent().map(fs::create_dir_all);
            let _ = fs::write(&path, contents);
        }
    }
    for missing in [Missing::Error, Missing::Fill("a cat".to_owned())] {
        let options = CaptionOptions { missing, ..CaptionOptions::default() };
        match read_folder(folder.path(), &options) {
            Err(problems) => assert!(!problems.0.is_empty()),
            Ok(samples) => assert!(samples.samples.iter().all(|sample| sample.path.is_file())),
        }
    }
}

/// A picture: decoded, and brought to two sizes.
pub fn pictures(bytes: &[u8]) {
    let Ok(picture) = decode_picture(bytes) else { return };
    let wide = Transform { crop: Crop::At(0.3, 0.9), flip: true, filter: Filter::Lanczos, ..Transform::center(64, 40) };
    for transform in [Transform::center(24, 24), wide] {
        let made = transform.apply(&picture);
        assert_eq!(made.dimensions(), (transform.width, transform.height));
        let _ = transform.size_ids(picture.width(), picture.height());
    }
}
