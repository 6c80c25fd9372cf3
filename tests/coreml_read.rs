//! The reader against packages that coremltools wrote, with outputs of the PyTorch models they were converted from.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{shared, small_unet};
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::reading::{Chain, Package, Precision, evaluate, psnr};
use palettist::coreml::verifying::{Settings, UnetInputs, verify_unet};
use palettist::coreml::writing::weights::WeightSource;
use palettist::coreml::{DeploymentTarget, PackageMetadata};
use palettist::networks::unet::unet;
use palettist::ops::{Tensors, Weights};
use palettist::palette::{PalettizedCheckpoint, kmeans};
use serde_json::json;
use tch::{Kind, Tensor};

/// Inputs and expected outputs (`expect.NAME` in the file) that go with a package.
fn example(package: &Path) -> (BTreeMap<String, Tensor>, BTreeMap<String, Tensor>) {
    let (mut inputs, mut expected) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in Tensor::read_npz(package.with_extension("npz")).unwrap() {
        match name.strip_prefix("expect.") {
            Some(name) => expected.insert(name.to_string(), tensor),
            None => inputs.insert(name, tensor),
        };
    }
    (inputs, expected)
}

fn open(folder: &Path, name: &str) -> anyhow::Result<Package> {
    Package::open(&folder.join(name).with_extension("mlpackage"))
}

/// PSNR of every output, the least one.
fn least_psnr(package: &Package, precision: Precision) -> f64 {
    let (inputs, expected) = example(package.path());
    let got = evaluate(package, &inputs, precision).unwrap();
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    expected.iter().map(|(name, expected)| psnr(expected, &got[name])).fold(f64::INFINITY, f64::min)
}

/// What an independent evaluator (numpy and PyTorch) found: name, PSNR in 32 and in 16 bits in dB, weights of layers,
/// how many of them are palettized, bits a weight of theirs.
const PACKAGES: [(&str, f64, f64, usize, usize, &str); 7] = [
    ("clip_pal4_ios16", 92.95, 67.42, 12, 12, "4.1875"),
    ("unet_fp16_ios16", 111.84, 64.60, 83, 0, "16.0000"),
    ("unet_pal2_ios16", 114.00, 65.83, 83, 83, "2.0068"),
    ("unet_pal4_ios16", 112.97, 65.41, 83, 83, "4.0270"),
    ("unet_pal4_g8_ios18", 112.22, 64.39, 83, 82, "4.2183"),
    ("unet_pal4_cd2_ios18", 112.38, 65.26, 83, 83, "2.0541"),
    ("unet_pal4_lut8_ios18", 112.88, 65.45, 83, 83, "4.0152"),
];

#[test]
fn packages_of_coremltools_compute_what_pytorch_computed() {
    let Some(folder) = shared("coreml_packages") else { return };
    for (name, float32, float16, ..) in PACKAGES {
        let package = open(&folder, name).unwrap();
        let (full, half) = (least_psnr(&package, Precision::Float32), least_psnr(&package, Precision::Float16));
        println!("{name:22} {full:7.2} dB in 32 bits ({float32:.2}), {half:6.2} dB in 16 ({float16:.2})");
        // Order of summation may differ between machines, so the last tenths do.
        assert!(full >= float32 - 0.5, "{name}: {full:.2} dB in 32 bits");
        assert!(half >= float16 - 1.0, "{name}: {half:.2} dB in 16 bits");
    }
}

#[test]
fn weights_cost_what_they_cost() {
    let Some(folder) = shared("coreml_packages") else { return };
    for (name, _, _, count, palettized, bits) in PACKAGES {
        let package = open(&folder, name).unwrap();
        package.check_values().unwrap();
        let weights = package.weights().unwrap();
        let layers: Vec<_> = weights.iter().filter(|weight| weight.layer).collect();
        let (bytes, elements) = layers.iter().fold((0, 0), |sum, w| (sum.0 + w.bytes, sum.1 + w.elements));
        assert_eq!(layers.len(), count, "{name}");
        assert_eq!(layers.iter().filter(|weight| weight.palettes.is_some()).count(), palettized, "{name}");
        assert_eq!(format!("{:.4}", 8.0 * bytes as f64 / elements as f64), bits, "{name}");
    }
}

#[test]
fn what_a_package_declares() {
    let Some(folder) = shared("coreml_packages") else { return };
    let package = open(&folder, "unet_pal4_g8_ios18").unwrap();
    assert_eq!((package.specification_version(), package.opset()), (9, "CoreML8"));
    let inputs: Vec<_> = package.inputs().iter().map(|input| format!("{} {}", input.name, input.kind)).collect();
    let expected = ["sample FLOAT32[2, 4, 16, 16]", "timestep FLOAT32[2]", "encoder_hidden_states FLOAT32[2, 7, 32]"];
    assert_eq!(inputs, expected);
    assert_eq!(package.outputs()[0].name, "noise_pred");
    assert_eq!(package.operation_counts()["constexpr_lut_to_dense"], 82);
    assert!(package.metadata().user_defined.contains_key("com.github.apple.coremltools.version"));
    let weights = package.weights().unwrap();
    // Tables for 8 channels each; a tensor with another number of tables would show here.
    let of =
        |w: &palettist::coreml::reading::WeightSummary| w.palettes.map(|p| (p.bits, p.groups * 8 == w.shape[0] as u64));
    assert!(weights.iter().filter_map(of).all(|found| found == (4, true)));
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let Some(folder) = shared("coreml_packages") else { return };
    let package = open(&folder, "clip_pal4_ios16").unwrap();
    let refusal = |name: &str, tensor: Tensor| {
        let inputs = BTreeMap::from([(name.to_string(), tensor)]);
        format!("{:#}", evaluate(&package, &inputs, Precision::Float32).unwrap_err())
    };
    assert!(refusal("ids", Tensor::zeros([1, 16], (Kind::Int, tch::Device::Cpu))).contains("has no input ids"));
    assert!(refusal("input_ids", Tensor::zeros([1, 15], (Kind::Int, tch::Device::Cpu))).contains("[1, 15]"));
    assert!(refusal("input_ids", Tensor::full([1, 16], 0.5, (Kind::Float, tch::Device::Cpu))).contains("fractions"));
    // Far outside the table of tokens: the gather is named.
    let message = refusal("input_ids", Tensor::full([1, 16], 1 << 30, (Kind::Int, tch::Device::Cpu)));
    assert!(message.contains("gather ->"), "{message}");
}

#[test]
fn a_unet_agrees_with_itself() {
    let Some(folder) = shared("coreml_packages") else { return };
    let path = folder.join("unet_pal4_ios16.mlpackage");
    let package = Package::open(&path).unwrap();
    let mut itself = |given: &UnetInputs| {
        let names = ["sample", "timestep", "encoder_hidden_states"].map(String::from);
        let tensors = [&given.sample, &given.timestep, &given.context].map(Tensor::shallow_clone);
        let inputs = names.into_iter().zip(tensors).collect();
        Ok(evaluate(&package, &inputs, Precision::Float32)?.remove("noise_pred").unwrap())
    };
    let settings = Settings { timesteps: vec![981], ..Settings::default() };
    let report = verify_unet(&Chain::open(&path).unwrap(), &mut itself, &settings).unwrap();
    println!("{report}");
    assert!(report.least(Precision::Float32) > 120.0);
    assert!((50.0..90.0).contains(&report.least(Precision::Float16)), "half precision has an error of its own");
    assert_eq!((report.weights, report.palettized), (83, 83));
    let clip = Chain::open(&folder.join("clip_pal4_ios16.mlpackage")).unwrap();
    let message = format!("{:#}", verify_unet(&clip, &mut itself, &Settings::default()).unwrap_err());
    assert!(message.contains("is not a UNet") && message.contains("input_ids INT32[1, 16]"), "{message}");
}

/// The end of Apple's safety checkers, by coremltools (tests/oracle/counted.py): how many pixels are blanked is known
/// when it runs.
#[test]
fn as_many_values_as_there_are() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counted"));
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let numbers = |list: &serde_json::Value| -> Vec<f64> { serde_json::from_value(list.clone()).unwrap() };
    for target in ["iOS16", "iOS17"] {
        let package = open(folder, target).unwrap();
        for case in cases.as_array().unwrap() {
            let inputs = package.inputs().iter().map(|input| {
                let tensor = Tensor::from_slice(&numbers(&case["inputs"][&input.name])).reshape(&input.kind.shape);
                (input.name.clone(), tensor)
            });
            let got = evaluate(&package, &inputs.collect(), Precision::Float32).unwrap();
            for output in package.outputs() {
                let expected = Tensor::from_slice(&numbers(&case["outputs"][&output.name])).reshape(&output.kind.shape);
                let difference = (&got[&output.name] - expected).abs().max().double_value(&[]);
                // Weights are fp16.
                assert!(difference < 1e-3, "{target}, {}: {difference}", output.name);
            }
        }
    }
}

/// What this project exports, against the network that it trains, for each target: dense, and with 2-bit palettes.
#[test]
fn exported_unets_compute_what_the_network_computes() {
    let config = small_unet(16, [32, 64], json!(4), false);
    tch::manual_seed(3);
    let random = |shape: &[i64]| {
        let values = Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
        let fan_in = shape[1..].iter().product::<i64>().max(1) as f64;
        if shape.len() == 1 { 1.0 + 0.2 * values } else { values / fan_in.sqrt() }.to_kind(Kind::Half)
    };
    let weights: Weights = config.parameters().iter().map(|p| (p.name.clone(), random(&p.shape))).collect();
    let mut palettized =
        PalettizedCheckpoint { palettes: BTreeMap::new(), dense: BTreeMap::new(), metadata: BTreeMap::new() };
    for parameter in config.parameters() {
        let weight = &weights[&parameter.name];
        if parameter.palettizable {
            let values = Vec::<half::f16>::try_from(weight.flatten(0, -1)).unwrap();
            let palette = kmeans::fit(&values, &weight.size(), 2).unwrap().palette;
            palettized.palettes.insert(parameter.name.clone(), palette);
        } else {
            palettized.dense.insert(parameter.name.clone(), weight.shallow_clone());
        }
    }
    let dense: Weights = weights.iter().map(|(name, w)| (name.clone(), w.to_kind(Kind::Float))).collect();
    let hard = palettized.weights(Kind::Float, tch::Device::Cpu).unwrap();
    let cases: [(DeploymentTarget, &dyn WeightSource, &Weights, f64); 4] = [
        (DeploymentTarget::Ios16, &weights, &dense, 16.0),
        (DeploymentTarget::Ios16, &palettized, &hard, 2.1),
        (DeploymentTarget::Ios17, &palettized, &hard, 2.1),
        (DeploymentTarget::Ios18, &palettized, &hard, 2.1),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (target, stored, computed, most_bits) in cases {
        let options = UnetOptions { target, overwrite: true, ..UnetOptions::new(&config) };
        let metadata = PackageMetadata { model: "tiny".into(), ..Default::default() };
        let path = export_unet(&config, stored, &options, &metadata, folder.path(), &mut |_, _| {}).unwrap();
        let mut network = |given: &UnetInputs| {
            Ok(unet(&mut Tensors::new(computed), &config, &given.sample, &given.timestep, given.condition()))
        };
        let report = verify_unet(&Chain::open(&path).unwrap(), &mut network, &Settings::default()).unwrap();
        println!("{report}");
        assert!(report.least(Precision::Float32) > 90.0, "{report}");
        assert!(report.least(Precision::Float16) > 55.0, "{report}");
        assert!(report.bits_per_weight <= most_bits, "{report}");
    }
}
