//! What several tests need: the shared data beside the checkout, the independent checker, a small UNet with random
//! weights.

// Each test takes what it needs of it.
#![allow(dead_code)]

pub mod pictures;
pub mod runs;
pub mod stand_in;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::f16;
use palettist::coreml::PackageMetadata;
use palettist::networks::unet::UnetConfig;
use palettist::ops::Weights;
use palettist::palette::{Form, Frozen, LutDtype, Palette, PalettizedCheckpoint};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The folder or file `name` of the shared data: in `../shared/data` or in $PALETTIST_SHARED. Without it, `None` and a
/// word on why the test does nothing.
pub fn shared(name: &str) -> Option<PathBuf> {
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let named = std::env::var_os("PALETTIST_SHARED").map(PathBuf::from);
    let found = [Some(beside), named].into_iter().flatten().map(|data| data.join(name)).find(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: no {name} in ../shared/data or in $PALETTIST_SHARED");
    }
    found
}

/// A Python with coremltools 9 and torch ($PALETTIST_PYTHON), and the folder of the independent checker of packages.
/// Without them, `None` and a word on why the test does nothing.
pub fn checker() -> Option<(OsString, PathBuf)> {
    let tools = shared("../tools")?;
    let python = std::env::var_os("PALETTIST_PYTHON").filter(|_| tools.join("mlpackage_eval.py").exists());
    if python.is_none() {
        eprintln!("skipped: needs the shared checker and PALETTIST_PYTHON, a Python with coremltools 9 and torch");
    }
    Some((python?, tools))
}

/// A UNet of two blocks, one with attention. `heads` is `attention_head_dim`; `linear` is `use_linear_projection`.
pub fn small_unet(sample_size: i64, channels: [i64; 2], heads: Value, linear: bool) -> UnetConfig {
    UnetConfig::from_json(&json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": heads,
        "cross_attention_dim": 40,
        "norm_num_groups": 8,
        "use_linear_projection": linear,
    }))
    .unwrap()
}

/// Normal numbers that fp16 holds, in fp32. libtorch's generator is one for all threads, and so is the lock.
pub fn random(seed: i64, shapes: &[Vec<i64>]) -> Vec<Tensor> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    let draw = |shape: &Vec<i64>| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    shapes.iter().map(|shape| draw(shape).to_kind(Kind::Half).to_kind(Kind::Float)).collect()
}

/// Random parameters in fp16, norms and biases too.
pub fn weights(config: &UnetConfig) -> Weights {
    let parameters = config.parameters();
    let values = random(7, &parameters.iter().map(|parameter| parameter.shape.clone()).collect::<Vec<_>>());
    let scaled = |shape: &[i64], values: Tensor| {
        let fan_in = shape[1..].iter().product::<i64>().max(1) as f64;
        if shape.len() == 1 { 1.0 + 0.2 * values } else { values / fan_in.sqrt() }.to_kind(Kind::Half)
    };
    parameters.iter().zip(values).map(|(p, values)| (p.name.clone(), scaled(&p.shape, values))).collect()
}

/// The same parameters with every palettizable weight as a palette, of 1, 2, 4, 6, 8 bits in turn. How well a palette
/// fits does not matter here.
pub fn palettized(config: &UnetConfig, weights: &Weights) -> PalettizedCheckpoint {
    let mut checkpoint =
        PalettizedCheckpoint { palettes: BTreeMap::new(), dense: BTreeMap::new(), metadata: BTreeMap::new() };
    for (index, parameter) in config.parameters().iter().enumerate() {
        let tensor = &weights[&parameter.name];
        if !parameter.palettizable {
            checkpoint.dense.insert(parameter.name.clone(), tensor.shallow_clone());
            continue;
        }
        let bits = [1, 2, 4, 6, 8][index % 5];
        let (last, spread) = ((1i32 << bits) - 1, 2.0 * tensor.to_kind(Kind::Float).std(false).double_value(&[]));
        let entries = (0..=last).map(|i| f16::from_f64(spread * (2.0 * f64::from(i) / f64::from(last) - 1.0)));
        let nearest = ((tensor.to_kind(Kind::Float) / spread + 1.0) * (f64::from(last) / 2.0)).round();
        let indices = nearest.clamp(0.0, f64::from(last)).flatten(0, -1).to_kind(Kind::Uint8);
        let palette = Palette::new(bits, tensor.size(), Vec::try_from(indices).unwrap(), entries.collect()).unwrap();
        checkpoint.palettes.insert(parameter.name.clone(), palette);
    }
    checkpoint
}

/// Of packages that tests write.
pub fn metadata() -> PackageMetadata {
    PackageMetadata {
        model: "someone/tiny".into(),
        author: "someone".into(),
        license: "mit".into(),
        ..Default::default()
    }
}

/// A checkpoint whose layers have the `forms` in turn, with weights of a size that a network could have.
pub fn palettized_as(config: &UnetConfig, forms: &[Form]) -> PalettizedCheckpoint {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut checkpoint = PalettizedCheckpoint::default();
    for (name, shape, palettizable) in config.parameters().into_iter().map(|p| (p.name, p.shape, p.palettizable)) {
        let mut number = || random.random::<f32>() * 2.0 - 1.0;
        if !palettizable {
            let about = if name.ends_with("weight") { 1.0 } else { 0.0 };
            let values: Vec<f16> = (0..shape[0]).map(|_| f16::from_f32(about + 0.1 * number())).collect();
            checkpoint.dense.insert(name, Tensor::from_slice(&values));
            continue;
        }
        let form = forms[checkpoint.palettes.len() % forms.len()];
        let fan_in: i64 = shape[1..].iter().product();
        let spread = 1.7 / (fan_in as f32).sqrt();
        let scaled = form.scales(&shape) > 0;
        let entries = (0..(form.groups(&shape) * form.cluster_dim) << form.bits).map(|_| match form.lut_dtype {
            LutDtype::I8 => f16::from_f32((127.0 * number()).round()),
            LutDtype::F16 => f16::from_f32(if scaled { 1.0 } else { spread } * number()),
        });
        let entries = entries.collect();
        let unit = if form.lut_dtype == LutDtype::I8 { spread / 127.0 } else { spread };
        let scales = (0..form.scales(&shape)).map(|_| f16::from_f32(unit * (1.0 + 0.5 * number()))).collect();
        let count = shape.iter().product::<i64>() as usize / form.cluster_dim;
        let indices = (0..count).map(|_| (random.random::<u32>() % (1 << form.bits)) as u8).collect();
        let palette = Palette::with_form(form, shape, indices, entries, scales).unwrap();
        checkpoint.palettes.insert(name, palette);
    }
    // Every form has its layer.
    assert!(checkpoint.palettes.len() >= forms.len().min(50));
    checkpoint
}

/// What the network sees of a layer whose assignments are fixed.
pub fn dense(frozen: &Frozen, shape: &[i64]) -> Tensor {
    let mut dense = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    frozen.dense(&mut dense).unwrap();
    dense
}

/// |a − b| / |b|, L2.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double).view(-1), b.to_kind(Kind::Double).view(-1));
    ((&a - &b).norm() / b.norm()).double_value(&[])
}

/// Copies a folder with all that is in it; the copy's files may be changed, which those of the fixtures may not.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_folder(&entry.path(), &to),
            false => fs::write(to, fs::read(entry.path()).unwrap()).unwrap(),
        }
    }
}
