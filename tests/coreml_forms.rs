//! Palettes of every form as Core ML stores them: what our reader, coremltools and an independent evaluator decode is
//! what the palette says, bit for bit.
//!
//! The last test needs a Python with coremltools 9 and torch, named by `PALETTIST_PYTHON`.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{checker, palettized_as, small_unet};
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::reading::{Chain, Package};
use palettist::coreml::verifying::{Settings, UnetInputs, verify_unet};
use palettist::coreml::writing::chunk::cut_package;
use palettist::coreml::{AttentionImplementation, DeploymentTarget, PackageMetadata};
use palettist::networks::unet::{UnetConfig, unet};
use palettist::ops::Tensors;
use palettist::palette::{BITS, Form, LutDtype, PalettizedCheckpoint};
use serde_json::json;
use tch::{Device, Kind, Tensor};

fn config(linear: bool) -> UnetConfig {
    small_unet(8, [24, 48], json!(4), linear)
}

/// Every kind of palette that is exported, at every number of bits.
fn forms() -> Vec<Form> {
    let of_bits = |bits| {
        let plain = Form::per_tensor(bits);
        let grouped = Form { group_size: Some(4), ..plain };
        let bytes = Form { lut_dtype: LutDtype::I8, ..plain };
        [
            plain,
            grouped,
            Form { group_size: Some(1), ..plain },
            Form { axis: 1, ..grouped },
            Form { cluster_dim: 2, ..plain },
            Form { cluster_dim: 4, ..plain },
            Form { cluster_dim: 2, ..grouped },
            Form { cluster_dim: 4, axis: 1, ..grouped },
            Form { per_channel_scale: true, ..plain },
            Form { per_channel_scale: true, ..grouped },
            bytes,
            Form { lut_dtype: LutDtype::I8, ..grouped },
            Form { cluster_dim: 2, ..bytes },
            Form { per_channel_scale: true, ..bytes },
            Form { per_channel_scale: true, group_size: Some(2), ..bytes },
        ]
    };
    BITS.into_iter().flat_map(of_bits).collect()
}

/// Exports the whole, attention as `attention`.
fn export_as(
    attention: AttentionImplementation,
    config: &UnetConfig,
    checkpoint: &PalettizedCheckpoint,
    target: DeploymentTarget,
    folder: &Path,
) -> anyhow::Result<PathBuf> {
    let metadata = PackageMetadata { model: "tiny".into(), ..Default::default() };
    let options = UnetOptions { target, attention, batch: 1, ..UnetOptions::new(config) };
    export_unet(config, checkpoint, &options, &metadata, folder, &mut |_, _| {})
}

fn export(
    config: &UnetConfig,
    checkpoint: &PalettizedCheckpoint,
    target: DeploymentTarget,
    folder: &Path,
) -> anyhow::Result<Package> {
    Package::open(&export_as(AttentionImplementation::Original, config, checkpoint, target, folder)?)
}

/// The name that a weight has in the package.
fn stored_name(name: &str) -> String {
    format!("{}_to_fp16_palettized", name.replace('.', "_"))
}

/// A UNet has some fifty layers: forms that do not fit in one go into the next.
fn checkpoints() -> Vec<(UnetConfig, PalettizedCheckpoint)> {
    let fits = |form: &&Form| form.misfit(&[4, 24, 3, 3]).is_none() && form.misfit(&[24, 4, 3, 3]).is_none();
    let forms: Vec<Form> = forms();
    assert_eq!(forms.iter().filter(fits).count(), forms.len());
    forms
        .chunks(45)
        .enumerate()
        .map(|(i, forms)| (config(i % 2 == 0), forms))
        .map(|(c, f)| {
            let checkpoint = palettized_as(&c, f);
            (c, checkpoint)
        })
        .collect()
}

#[test]
fn our_reader_decodes_what_was_written() {
    for (config, checkpoint) in checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let package = export(&config, &checkpoint, DeploymentTarget::Ios18, folder.path()).unwrap();
        let costs: BTreeMap<String, u64> = package.weights().unwrap().into_iter().map(|w| (w.name, w.bytes)).collect();
        decodes(&package, &checkpoint);
        for (name, palette) in &checkpoint.palettes {
            let bits = palette.form.package_bits(&palette.shape);
            assert_eq!(costs[&stored_name(name)] * 8, bits, "{name}, {:?}", palette.form);
        }
        agrees(&Chain::from(package), &config, &checkpoint);
    }
}

/// Every palette of the checkpoint that is in the package is the same there, bit for bit; how many are.
fn decodes(package: &Package, checkpoint: &PalettizedCheckpoint) -> usize {
    let there: BTreeSet<String> = package.weights().unwrap().into_iter().map(|weight| weight.name).collect();
    let mut found = 0;
    for (name, palette) in checkpoint.palettes.iter().filter(|(name, _)| there.contains(&stored_name(name))) {
        let decoded: Vec<f32> = Vec::try_from(package.weight(&stored_name(name)).unwrap().flatten(0, -1)).unwrap();
        let expected: Vec<f32> = palette.dense().iter().map(|v| v.to_f32()).collect();
        assert!(decoded == expected, "{name}, {:?}", palette.form);
        found += 1;
    }
    found
}

/// A package, or its chunks, computes what the network computes, and all its palettes are in it.
fn agrees(package: &Chain, config: &UnetConfig, checkpoint: &PalettizedCheckpoint) {
    let weights = checkpoint.weights(Kind::Float, Device::Cpu).unwrap();
    let mut network = |given: &UnetInputs| {
        Ok(unet(&mut Tensors::new(&weights), config, &given.sample, &given.timestep, given.condition()))
    };
    let report = verify_unet(package, &mut network, &Settings { timesteps: vec![981], ..Settings::default() }).unwrap();
    // In 16 bits these random tables, whose means are far from 0, tell nothing.
    assert!(report.rows.iter().all(|row| row.float32 > 90.0), "{report}");
    assert_eq!(report.palettized, checkpoint.palettes.len());
}

/// Attention for the Neural Engine and chunks keep every form, on every system that holds it.
#[test]
fn forms_survive_split_attention_and_chunks() {
    let older = forms().into_iter().filter(|form| form.needs_ios18().is_none()).collect::<Vec<_>>();
    assert_eq!(older.len(), 5, "one table, 1, 2, 4, 6 or 8 bits");
    let plain = (config(false), palettized_as(&config(false), &older));
    let cases = [(DeploymentTarget::Ios16, plain)]
        .into_iter()
        .chain(checkpoints().into_iter().map(|c| (DeploymentTarget::Ios18, c)));
    for (target, (config, checkpoint)) in cases {
        let folder = tempfile::tempdir().unwrap();
        let whole =
            export_as(AttentionImplementation::SplitEinsumV2, &config, &checkpoint, target, folder.path()).unwrap();
        let chunks = cut_package(&whole, &folder.path().join("chunks/whole.mlpackage"), false).unwrap();
        let whole = Package::open(&whole).unwrap();
        assert_eq!(decodes(&whole, &checkpoint), checkpoint.palettes.len());
        let chain = Chain::open(&chunks[0]).unwrap();
        let found: Vec<usize> = chain.packages().iter().map(|chunk| decodes(chunk, &checkpoint)).collect();
        assert_eq!((found.len(), found.iter().sum()), (2, checkpoint.palettes.len()));
        assert!(found.iter().all(|&found| found > 0));
        for chunk in chain.packages() {
            assert_eq!(chunk.specification_version(), whole.specification_version());
        }
        agrees(&Chain::from(whole), &config, &checkpoint);
        agrees(&chain, &config, &checkpoint);
    }
}

#[test]
fn older_systems_are_refused_what_they_cannot_hold() {
    let config = config(true);
    let folder = tempfile::tempdir().unwrap();
    for form in forms() {
        let checkpoint = palettized_as(&config, &[form]);
        for target in [DeploymentTarget::Ios16, DeploymentTarget::Ios17] {
            let folder = folder.path().join(format!("{form:?} {target}"));
            match (form.needs_ios18(), export(&config, &checkpoint, target, &folder)) {
                (None, package) => assert!(package.unwrap().specification_version() < 9),
                (Some(what), package) => {
                    let message = format!("{:#}", package.unwrap_err());
                    assert!(message.contains(what) && message.contains("need iOS18"), "{message}");
                    assert!(!folder.exists() || std::fs::read_dir(&folder).unwrap().next().is_none());
                }
            }
        }
        // One form at a time is enough of the slow part.
        if form.bits > 3 {
            break;
        }
    }
}

/// Validates each package, decodes every compressed constant with coremltools and compares bit for bit.
const CHECK: &str = r#"
import glob, sys, numpy, coremltools
from coremltools.converters.mil.frontend.milproto.load import load
folder, tools = sys.argv[1:]
sys.path.insert(0, tools)
import mlpackage_eval as M
for path in sorted(glob.glob(folder + "/*/*.mlpackage")):
    package = M.validate(path)
    print("issues", [str(issue) for issue in package.issues])
    expected = numpy.load(path + "/../expected.npz")
    model = coremltools.models.MLModel(path, skip_model_load=True)
    spec = model.get_spec()
    weights = path + "/Data/com.apple.CoreML/weights"
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    compared = 0
    for op in program.functions["main"].operations:
        if op.op_type != "constexpr_lut_to_dense":
            continue
        name, got = op.outputs[0].name, M._coremltools_decode(op)[0]
        wanted = expected[name].astype(numpy.float16).reshape(got.shape)
        assert got.dtype == numpy.float16, (name, got.dtype)
        assert numpy.array_equal(got.view(numpy.uint16) & 0x7fff, wanted.view(numpy.uint16) & 0x7fff), name
        assert numpy.array_equal(got, wanted), name
        compared += 1
    print("compared", compared, len(expected.files))
"#;

#[test]
fn coremltools_decodes_what_was_written() {
    let Some((python, tools)) = checker() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut sizes = Vec::new();
    for (number, (config, checkpoint)) in checkpoints().into_iter().enumerate() {
        let folder = folder.path().join(number.to_string());
        export(&config, &checkpoint, DeploymentTarget::Ios18, &folder).unwrap();
        let dense: Vec<(String, Tensor)> = checkpoint
            .palettes
            .iter()
            .map(|(name, palette)| (stored_name(name), palette.tensor(Kind::Float, Device::Cpu).unwrap()))
            .collect();
        let named: Vec<(&str, &Tensor)> = dense.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        Tensor::write_npz(&named, folder.join("expected.npz")).unwrap();
        sizes.push(format!("compared {0} {0}", dense.len()));
    }
    let output = Command::new(python).args(["-c", CHECK]).arg(folder.path()).arg(tools).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> =
        said.lines().filter(|line| line.starts_with("compared") || line.starts_with("issues")).collect();
    let expected: Vec<&str> = sizes.iter().flat_map(|size| ["issues []", size]).collect();
    assert_eq!(lines, expected);
}
