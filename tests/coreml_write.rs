//! The packages that the exporter writes: their structure, and what they compute.
//!
//! The last test hands packages to an independent checker (a Python program with coremltools, in the shared folder)
//! that validates and runs them; it needs a Python with coremltools and torch, named by `PALETTIST_PYTHON`.

mod common;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{checker, metadata, palettized, random, small_unet, weights};
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::format::proto::{
    BindingKind, Block, ImmediateKind, Model, Operation, TensorElements, Value, ValueKind,
};
use palettist::coreml::writing::chunk::export_in_chunks;
use palettist::coreml::writing::weights::WeightSource;
use palettist::coreml::{AttentionImplementation, DeploymentTarget};
use palettist::networks::unet::{UnetConfig, unet};
use palettist::ops::{Tensors, Weights};
use palettist::palette::{PalettizedCheckpoint, packing};
use prost::Message;
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// A UNet of two levels, with and without attention, of SD 1's kind (`linear` false) or SD 2's.
fn config(linear: bool) -> UnetConfig {
    let heads = if linear { json!([2, 4]) } else { json!(4) };
    small_unet(16, [24, 48], heads, linear)
}

fn model(package: &Path) -> Model {
    Model::decode(&fs::read(package.join("Data/com.apple.CoreML/model.mlmodel")).unwrap()[..]).unwrap()
}

fn block(model: &Model) -> &Block {
    let function = &model.ml_program.as_ref().unwrap().functions["main"];
    &function.block_specializations[&function.opset]
}

fn text(value: &Value) -> &str {
    match immediate(value) {
        TensorElements::Strings(strings) => &strings.values[0],
        other => panic!("not a string: {other:?}"),
    }
}

fn immediate(value: &Value) -> &TensorElements {
    let Some(ValueKind::Immediate(value)) = &value.kind else { panic!("not immediate: {value:?}") };
    let Some(ImmediateKind::Tensor(tensor)) = &value.value else { panic!("not a tensor: {value:?}") };
    tensor.value.as_ref().unwrap()
}

/// The data of a value that lies in weight.bin.
fn blob<'f>(file: &'f [u8], value: &Value) -> &'f [u8] {
    let Some(ValueKind::BlobFile(blob)) = &value.kind else { panic!("not in weight.bin: {value:?}") };
    let number = |at: u64| u64::from_le_bytes(file[at as usize..at as usize + 8].try_into().unwrap()) as usize;
    &file[number(blob.offset + 16)..][..number(blob.offset + 8)]
}

fn count(block: &Block, kind: &str) -> usize {
    block.operations.iter().filter(|op| op.r#type == kind).count()
}

fn shape(model: &Model, input: bool, index: usize) -> (String, Vec<i64>, i32) {
    use palettist::coreml::format::proto::FeatureKind::MultiArray;
    let description = model.description.as_ref().unwrap();
    let feature = if input { &description.input[index] } else { &description.output[index] };
    assert!(!feature.short_description.is_empty(), "{} is not described", feature.name);
    match feature.r#type.as_ref().unwrap().kind.as_ref().unwrap() {
        MultiArray(array) => (feature.name.clone(), array.shape.clone(), array.data_type),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_package_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(false);
    let mut steps = Vec::new();
    let path = export_unet(
        &config,
        &weights(&config),
        &UnetOptions { height: 24, ..UnetOptions::new(&config) },
        &metadata(),
        folder.path(),
        &mut |done, total| steps.push((done, total)),
    )
    .unwrap();
    assert_eq!(path, folder.path().join("Stable_Diffusion_version_someone_tiny_unet.mlpackage"));
    let total = config.parameters().len();
    assert_eq!(steps, (1..=total).map(|done| (done, total)).collect::<Vec<_>>());

    let model = model(&path);
    let (half, single) = (65552, 65568);
    assert_eq!(model.specification_version, 7);
    assert_eq!(shape(&model, true, 0), ("sample".into(), vec![2, 4, 24, 16], half));
    assert_eq!(shape(&model, true, 1), ("timestep".into(), vec![2], half));
    assert_eq!(shape(&model, true, 2), ("encoder_hidden_states".into(), vec![2, 40, 1, 77], half));
    assert_eq!(shape(&model, false, 0), ("noise_pred".into(), vec![2, 4, 24, 16], single));
    let described = model.description.as_ref().unwrap();
    assert_eq!((described.input.len(), described.output.len()), (3, 1));
    let about = described.metadata.as_ref().unwrap();
    assert_eq!((&*about.version_string, &*about.author, &*about.license), ("someone/tiny", "someone", "mit"));
    assert_eq!(about.user_defined["com.github.apple.ml-stable-diffusion.version"], "1.1.0");

    let function = &model.ml_program.as_ref().unwrap().functions["main"];
    assert_eq!(function.opset, "CoreML6");
    assert_eq!(function.block_specializations.len(), 1);
    let block = block(&model);
    assert_eq!(block.outputs, ["noise_pred"]);
    // 1 + 2 transformers of one layer, with two attentions each; the mid block has one too.
    assert_eq!((count(block, "matmul"), count(block, "softmax"), count(block, "gelu")), (16, 8, 4));
    assert_eq!((count(block, "layer_norm"), count(block, "sqrt")), (12, 2 * 8 + 4 + 1));
    assert_eq!((count(block, "einsum"), count(block, "linear")), (0, 0));
}

/// Names are identifiers and unique; every value is defined before it is used; consts are all used.
#[test]
fn every_value_is_defined_once_and_before_its_use() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(true);
    let options = UnetOptions { target: DeploymentTarget::Ios18, ..UnetOptions::new(&config) };
    let checkpoint = palettized(&config, &weights(&config));
    let path = export_unet(&config, &checkpoint, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
    let model = model(&path);
    assert_eq!(model.specification_version, 9);
    let function = &model.ml_program.as_ref().unwrap().functions["main"];
    let mut values: HashSet<&str> = function.inputs.iter().map(|input| &*input.name).collect();
    let (mut names, mut used) = (HashSet::new(), HashSet::new());
    for op in &block(&model).operations {
        let name = text(&op.attributes["name"]);
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name}");
        assert!(names.insert(name), "two operations {name}");
        for binding in op.inputs.values().flat_map(|argument| &argument.arguments) {
            match binding.binding.as_ref().unwrap() {
                BindingKind::Name(value) => {
                    assert!(values.contains(&**value), "{name} uses {value}");
                    used.insert(&**value);
                }
                BindingKind::Value(_) => assert_eq!(op.r#type, "constexpr_lut_to_dense", "{name}"),
            }
        }
        for output in &op.outputs {
            assert!(values.insert(&output.name), "two values {}", output.name);
        }
    }
    used.insert("noise_pred");
    assert_eq!(values.difference(&used).collect::<Vec<_>>(), Vec::<&&str>::new());
}

#[test]
fn palettes_are_stored_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(true);
    let checkpoint = palettized(&config, &weights(&config));
    for target in [DeploymentTarget::Ios16, DeploymentTarget::Ios17, DeploymentTarget::Ios18] {
        let options = UnetOptions { target, overwrite: true, ..UnetOptions::new(&config) };
        let path = export_unet(&config, &checkpoint, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
        let model = model(&path);
        let file = fs::read(path.join("Data/com.apple.CoreML/weights/weight.bin")).unwrap();
        let palettes: Vec<&Operation> =
            block(&model).operations.iter().filter(|op| op.r#type == "constexpr_lut_to_dense").collect();
        assert_eq!(palettes.len(), checkpoint.palettes.len());
        for op in palettes {
            let part = |key: &str| match target {
                DeploymentTarget::Ios18 => match op.inputs[key].arguments[0].binding.as_ref().unwrap() {
                    BindingKind::Value(value) => value,
                    BindingKind::Name(name) => panic!("{key} bound to {name}"),
                },
                _ => &op.attributes[key],
            };
            let name = op.outputs[0].name.strip_suffix("_weight_to_fp16_palettized").unwrap();
            let (_, palette) = checkpoint
                .palettes
                .iter()
                .find(|(key, _)| key.strip_suffix(".weight").unwrap().replace('.', "_") == name)
                .unwrap();
            let bytes = |value: &Value| match &value.kind {
                Some(ValueKind::BlobFile(_)) => blob(&file, value).to_vec(),
                _ => match immediate(value) {
                    TensorElements::Bytes(bytes) => bytes.values.clone(),
                    other => panic!("{other:?}"),
                },
            };
            assert_eq!(bytes(part("indices")), packing::pack(&palette.indices, palette.form.bits), "{name}");
            let entries: Vec<u8> = palette.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            assert_eq!(bytes(part("lut")), entries, "{name}");
            if target != DeploymentTarget::Ios18 {
                let mut shape = palette.shape.clone();
                shape.resize(4, 1);
                let shape: Vec<u8> = shape.iter().flat_map(|&size| (size as u32).to_le_bytes()).collect();
                assert_eq!(bytes(part("shape")), shape, "{name}");
            }
        }
    }
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"]
        .map(|name| (name.into(), fs::read(folder.join(name)).unwrap()))
        .into()
}

#[test]
fn equal_models_give_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(false);
    let export = |checkpoint: &PalettizedCheckpoint, name: &str| {
        let options = UnetOptions { batch: 1, ..UnetOptions::new(&config) };
        let folder = folder.path().join(name);
        files(&export_unet(&config, checkpoint, &options, &metadata(), &folder, &mut |_, _| {}).unwrap())
    };
    let mut checkpoint = palettized(&config, &weights(&config));
    let first = export(&checkpoint, "first");
    assert!(first == export(&checkpoint, "second"), "two exports of one model differ");
    // Another weight changes the weights and, through them, the identifiers, and nothing else.
    let palette = checkpoint.palettes.get_mut("conv_in.weight").unwrap();
    palette.indices[0] ^= 1;
    let other = export(&checkpoint, "other");
    let differs: Vec<bool> = first.iter().zip(&other).map(|(a, b)| a != b).collect();
    assert_eq!(differs, [true, false, true]);
}

#[test]
fn what_is_there_is_not_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(false);
    let mut weights = weights(&config);
    let export = |weights: &Weights, overwrite: bool| {
        let options = UnetOptions { overwrite, ..UnetOptions::new(&config) };
        export_unet(&config, weights, &options, &metadata(), folder.path(), &mut |_, _| {})
    };
    let left = || {
        let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let path = export(&weights, false).unwrap();
    let before = files(&path);
    assert!(export(&weights, false).unwrap_err().to_string().contains("exists already and is left as it is"));

    // A failed export leaves the old package, and nothing else.
    let removed = weights.remove("mid_block.resnets.0.conv1.bias").unwrap();
    let error = format!("{:#}", export(&weights, true).unwrap_err());
    assert!(error.contains("`mid_block.resnets.0.conv1.bias`"), "{error}");
    // Nor a folder that was made for it.
    let new = folder.path().join("new/folder");
    let options = UnetOptions::new(&config);
    let export_to = |folder: &Path| export_unet(&config, &weights, &options, &metadata(), folder, &mut |_, _| {});
    assert!(export_to(&new).is_err() && export_in_chunks(&new.join("whole"), false, export_to).is_err());
    assert_eq!(left(), [path.file_name().unwrap()]);
    weights.insert("mid_block.resnets.0.conv1.bias".into(), removed * f64::INFINITY);
    let error = format!("{:#}", export(&weights, true).unwrap_err());
    assert!(error.contains("`mid_block.resnets.0.conv1.bias` holds"), "{error}");
    weights.insert("mid_block.resnets.0.conv1.bias".into(), Tensor::zeros([5], (Kind::Half, Device::Cpu)));
    let error = format!("{:#}", export(&weights, true).unwrap_err());
    assert!(error.contains("has shape [5], and the network wants [48]"), "{error}");
    assert!(before == files(&path));
    assert_eq!(left(), [path.file_name().unwrap()]);

    weights.insert("mid_block.resnets.0.conv1.bias".into(), Tensor::ones([48], (Kind::Half, Device::Cpu)));
    export(&weights, true).unwrap();
    assert!(before != files(&path));
    assert_eq!(left(), [path.file_name().unwrap()]);

    // Something else under the package's name stays, asked or not.
    fs::remove_file(path.join("Manifest.json")).unwrap();
    assert!(export(&weights, true).unwrap_err().to_string().contains("is not a Core ML package"));
}

/// Two exports into one folder at the same time, here one within the other.
#[test]
fn what_another_export_wrote_meanwhile_is_told_or_replaced() {
    let config = config(false);
    let weights = weights(&config);
    let other: Weights = weights.iter().map(|(name, tensor)| (name.clone(), tensor * 0.5)).collect();
    for overwrite in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let options = UnetOptions { overwrite, ..UnetOptions::new(&config) };
        let mut written = Vec::new();
        let exported = export_unet(&config, &weights, &options, &metadata(), folder.path(), &mut |done, _| {
            if done == 1 {
                let options = UnetOptions { overwrite: false, ..options.clone() };
                let path = export_unet(&config, &other, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
                written = files(&path);
            }
        });
        let left: Vec<PathBuf> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(files(&left[0]) == written, !overwrite);
        let error = exported.err().map(|error| format!("{error:#}"));
        let said = error.as_deref().is_some_and(|error| {
            error.ends_with("unet.mlpackage was written by another export meanwhile and is left as it is")
        });
        assert_eq!((said, error.is_none()), (!overwrite, overwrite), "{error:?}");
    }
}

/// Validates each package of the folder, loads it with coremltools, runs it on its inputs in fp32 and in fp16.
const CHECK: &str = r#"
import glob, json, sys, numpy, coremltools
from coremltools.converters.mil.frontend.milproto.load import load
folder, tools = sys.argv[1:]
sys.path.insert(0, tools)
import mlpackage_eval as M
results = {}
for path in sorted(glob.glob(folder + "/*/*.mlpackage")):
    case = path.split("/")[-2]
    package = M.validate(path)
    result = {"issues": [str(issue) for issue in package.issues]}
    for step in ["1", "981"]:
        inputs = dict(numpy.load(f"{folder}/{case}/{step}.inputs.npz"))
        expected = numpy.load(f"{folder}/{case}/{step}.outputs.npz")["noise_pred"]
        for precision in ["fp32", "fp16"]:
            output = M.run(package, inputs, precision=precision)["noise_pred"]
            result[f"{step} {precision}"] = M.compare(output, expected)["psnr_db"]
    # Last, for it rewrites the manifest.
    model = coremltools.models.MLModel(path, skip_model_load=True)
    spec = model.get_spec()
    weights = path + "/Data/com.apple.CoreML/weights"
    load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    result["license"] = spec.description.metadata.license
    results[case] = result
print(json.dumps(results))
"#;

/// An independent implementation validates the packages, loads them with coremltools and computes what we compute.
#[test]
fn an_independent_checker_agrees() {
    let Some((python, tools)) = checker() else { return };
    let folder = tempfile::tempdir().unwrap();
    use AttentionImplementation::{Original, SplitEinsum, SplitEinsumV2};
    let cases = [
        (false, DeploymentTarget::Ios16, Original, 2, 16, 16, false),
        (true, DeploymentTarget::Ios16, Original, 1, 16, 11, true),
        (false, DeploymentTarget::Ios17, Original, 2, 9, 16, true),
        (true, DeploymentTarget::Ios18, Original, 2, 8, 8, true),
        (false, DeploymentTarget::Ios16, SplitEinsum, 2, 16, 8, true),
        (true, DeploymentTarget::Ios18, SplitEinsumV2, 1, 24, 24, true),
    ];
    for (linear, target, attention, batch, height, width, palettes) in cases {
        let config = config(linear);
        let floats = weights(&config);
        let checkpoint = palettized(&config, &floats);
        let case =
            folder.path().join(format!("linear {linear}, {target}, {attention}, batch {batch}, palettes {palettes}"));
        let options = UnetOptions { batch, height, width, target, attention, ..UnetOptions::new(&config) };
        let source: &dyn WeightSource = if palettes { &checkpoint } else { &floats };
        export_unet(&config, source, &options, &metadata(), &case, &mut |_, _| {}).unwrap();
        let reference = if palettes {
            checkpoint.weights(Kind::Float, Device::Cpu).unwrap()
        } else {
            floats.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Float))).collect()
        };
        for timestep in [1, 981] {
            let drawn = random(timestep, &[vec![batch, 4, height, width], vec![batch, 77, 40]]);
            let (sample, context) = (&drawn[0], &drawn[1]);
            let t = Tensor::full([batch], timestep, (Kind::Float, Device::Cpu));
            let expected = unet(&mut Tensors::new(&reference), &config, sample, &t, context);
            let context = context.transpose(1, 2).unsqueeze(2).contiguous();
            let inputs = [("sample", sample), ("timestep", &t), ("encoder_hidden_states", &context)];
            Tensor::write_npz(&inputs, case.join(format!("{timestep}.inputs.npz"))).unwrap();
            Tensor::write_npz(&[("noise_pred", &expected)], case.join(format!("{timestep}.outputs.npz"))).unwrap();
        }
    }
    let output = Command::new(python).args(["-c", CHECK]).arg(folder.path()).arg(tools).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let results: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(results.as_object().unwrap().len(), cases.len());
    for (case, result) in results.as_object().unwrap() {
        eprintln!("{case}: {result}");
        assert_eq!((&result["issues"], &result["license"]), (&json!([]), &json!("mit")), "{case}");
        for (key, least) in [("1 fp32", 90.0), ("981 fp32", 90.0), ("1 fp16", 55.0), ("981 fp16", 55.0)] {
            assert!(result[key].as_f64().unwrap() >= least, "{case}: {key} {}", result[key]);
        }
    }
}
