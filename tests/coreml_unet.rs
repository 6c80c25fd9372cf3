//! The forms of a UNet's package: what each computes is what the network computes, which is tested against diffusers.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use common::copy_folder;
use common::{checker, metadata, palettized, random, small_unet, weights};
use palettist::coreml::AttentionImplementation::{self, Original, SplitEinsum, SplitEinsumV2};
use palettist::coreml::DeploymentTarget;
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::format::metadata::CUT_FROM;
use palettist::coreml::reading::{Chain, DataType, Package, Precision, evaluate, psnr};
use palettist::coreml::verifying::layers::Recording;
use palettist::coreml::verifying::{Settings, UnetInputs, verify_unet};
use palettist::coreml::writing::chunk::export_in_chunks;
use palettist::coreml::writing::weights::WeightSource;
use palettist::networks::unet::{UnetConfig, unet};
use palettist::ops::{Tensors, Watch, Weights};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// The inputs of a package and what the network makes of them.
struct Case {
    inputs: BTreeMap<String, Tensor>,
    expected: Tensor,
}

/// Random inputs for latents of a size, late in the noise, where errors of the timestep would show.
fn case(config: &UnetConfig, weights: &Weights, batch: i64, height: i64, width: i64) -> Case {
    let _no_gradients = tch::no_grad_guard();
    let drawn = random(3, &[vec![batch, 4, height, width], vec![batch, 77, config.cross_attention_dim]]);
    let timestep = Tensor::full([batch], 981, (Kind::Float, Device::Cpu));
    let weights: Weights = weights.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Float))).collect();
    let expected = unet(&mut Tensors::new(&weights), config, &drawn[0], &timestep, &drawn[1]);
    let context = drawn[1].transpose(1, 2).unsqueeze(2).contiguous();
    let inputs = [("sample", &drawn[0]), ("timestep", &timestep), ("encoder_hidden_states", &context)];
    let inputs = inputs.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).into();
    Case { inputs, expected }
}

/// How well a package of this form agrees in 32 and in 16 bits, and how many einsums it has.
fn agreement(
    config: &UnetConfig,
    weights: &Weights,
    attention: AttentionImplementation,
    (batch, height, width): (i64, i64, i64),
    case: &Case,
) -> (f64, f64, usize) {
    let folder = tempfile::tempdir().unwrap();
    let options = UnetOptions { attention, batch, height, width, ..UnetOptions::new(config) };
    let path = export_unet(config, weights, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
    let package = Package::open(&path).unwrap();
    let run = |precision| {
        let got = evaluate(&package, &case.inputs, precision).unwrap();
        psnr(&case.expected, &got["noise_pred"])
    };
    let einsums = package.operation_counts().get("einsum").copied().unwrap_or(0);
    (run(Precision::Float32), run(Precision::Float16), einsums)
}

/// Latents of `(batch, height, width)`, in SD 1's form or with SD 2's linear projections.
fn attentions_agree(linear: bool, size: (i64, i64, i64)) {
    let (batch, height, width) = size;
    let heads = if linear { json!([2, 3]) } else { json!(2) };
    let config = small_unet(8, [24, 48], heads, linear);
    let weights = weights(&config);
    let case = case(&config, &weights, batch, height, width);
    // Self- and cross-attention: on the way down and (twice) up at the first level, in the middle at the second.
    let pairs = |parts: i64, heads: i64| 2 * (parts * heads) as usize;
    let (heads, last) = (config.heads[0], config.heads[1]);
    let by_head = 2 * (3 * pairs(1, heads) + pairs(1, last));
    let parts = |tokens: i64| (tokens as u64).div_ceil(512) as i64;
    let in_parts = 2 * (3 * pairs(parts(height * width), heads) + pairs(parts(height * width / 4), last));
    for (attention, einsums) in [(Original, 0), (SplitEinsum, by_head), (SplitEinsumV2, in_parts)] {
        let (full, half, found) = agreement(&config, &weights, attention, size, &case);
        eprintln!("{attention}, {size:?}, linear {linear}: {full:.1} dB, in 16 bits {half:.1} dB, {found} einsums");
        assert!(full > 90.0 && half > 50.0, "{attention}, {size:?}: {full} dB, in 16 bits {half} dB");
        assert_eq!(found, einsums, "{attention}, {size:?}");
    }
}

#[test]
fn the_three_attentions_compute_the_same() {
    // 1120 and 280 tokens: 512 divides neither.
    attentions_agree(true, (2, 40, 28));
    // 1536 and 384.
    attentions_agree(false, (1, 48, 32));
}

/// `cargo test --test coreml_unet -- --ignored --nocapture`
#[test]
#[ignore = "a minute of large attention"]
fn the_three_attentions_compute_the_same_at_full_size() {
    attentions_agree(false, (1, 64, 64));
    attentions_agree(true, (1, 96, 64));
    // 5184 tokens, 64 more than 512 divides.
    attentions_agree(false, (1, 72, 72));
}

/// The network with `weights` as a package is compared with it.
fn network<'a>(
    config: &'a UnetConfig,
    weights: &'a Weights,
    recording: Option<Watch<'a>>,
) -> impl FnMut(&UnetInputs) -> anyhow::Result<Tensor> + 'a {
    move |given| {
        let ops = Tensors::new(weights).computing_in(Kind::Float);
        let mut ops = recording.map_or(ops.clone(), |watch| ops.watched(watch));
        Ok(unet(&mut ops, config, &given.sample, &given.timestep, given.condition()))
    }
}

#[test]
fn residuals_of_controlnets_are_added_as_diffusers_adds_them() {
    let config = small_unet(16, [24, 48], json!(4), false);
    let weights = weights(&config);
    let folder = tempfile::tempdir().unwrap();
    for (attention, height, width) in [(Original, 16, 24), (SplitEinsum, 9, 16)] {
        let options =
            UnetOptions { attention, height, width, controlnet: true, overwrite: true, ..UnetOptions::new(&config) };
        let path = export_unet(&config, &weights, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
        assert!(path.ends_with("Stable_Diffusion_version_someone_tiny_control-unet.mlpackage"));
        let package = Chain::open(&path).unwrap();
        let declared: Vec<String> =
            package.inputs()[3..].iter().map(|input| format!("{} {}", input.name, input.kind)).collect();
        let shapes = config.residual_shapes(2, height, width);
        let expected = shapes.iter().enumerate().map(|(i, s)| format!("additional_residual_{i} FLOAT16{s:?}"));
        assert_eq!(declared, expected.collect::<Vec<_>>());
        // conv_in, one layer and a downsampler, one layer; the middle.
        assert_eq!(declared.len(), 5);
        let report = verify_unet(&package, &mut network(&config, &weights, None), &Settings::default()).unwrap();
        assert!(report.least(Precision::Float32) > 90.0 && report.least(Precision::Float16) > 55.0, "{report}");
    }
}

/// Chunks compute the whole to the last bit, in halves of the bytes, and say who made them.
#[test]
fn chunks_are_the_whole() {
    let config = small_unet(16, [24, 48], json!([2, 4]), true);
    let floats = weights(&config);
    let palettes = palettized(&config, &floats);
    let cases: [(&dyn WeightSource, DeploymentTarget, AttentionImplementation, bool); 4] = [
        (&floats, DeploymentTarget::Ios16, Original, false),
        (&palettes, DeploymentTarget::Ios16, SplitEinsum, true),
        (&palettes, DeploymentTarget::Ios17, Original, false),
        (&palettes, DeploymentTarget::Ios18, SplitEinsumV2, false),
    ];
    for (weights, target, attention, controlnet) in cases {
        let folder = tempfile::tempdir().unwrap();
        let size = if attention == SplitEinsumV2 { (24, 24) } else { (16, 12) };
        let options =
            UnetOptions { attention, target, controlnet, height: size.0, width: size.1, ..UnetOptions::new(&config) };
        let export = |folder: &Path| export_unet(&config, weights, &options, &metadata(), folder, &mut |_, _| {});
        let whole = Package::open(&export(folder.path()).unwrap()).unwrap();
        let place = folder.path().join("chunks").join(whole.path().file_name().unwrap());
        let paths = export_in_chunks(&place, false, export).unwrap();
        let chain = Chain::open(&paths[0]).unwrap();
        let left = || {
            let mut left: Vec<_> =
                std::fs::read_dir(place.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path()).collect();
            left.sort();
            left
        };
        assert_eq!(left(), paths);

        let [first, second] = chain.packages() else { panic!("not two chunks") };
        let bytes = [first, second].map(|chunk| chunk.weights().unwrap().iter().map(|w| w.bytes).sum::<u64>());
        eprintln!(
            "{target}, {attention}: {bytes:?} bytes of weights, {:?} of all",
            [first.file_bytes(), second.file_bytes()]
        );
        assert!(bytes[0].max(bytes[1]) * 100 <= 55 * (bytes[0] + bytes[1]), "{bytes:?}");
        for chunk in [first, second] {
            let (about, of_whole) = (chunk.metadata(), whole.metadata());
            assert_eq!((&about.author, &about.license), (&of_whole.author, &of_whole.license));
            let mut user_defined = about.user_defined.clone();
            assert_eq!(user_defined.remove(CUT_FROM), first.metadata().user_defined.get(CUT_FROM).cloned());
            assert_eq!((&about.version_string, &user_defined), (&of_whole.version_string, &of_whole.user_defined));
            assert!(chunk.inputs().iter().chain(chunk.outputs()).all(|feature| !feature.description.is_empty()));
        }
        assert_eq!(chain.inputs(), whole.inputs());
        assert_eq!(chain.outputs(), whole.outputs());
        // What is handed over is fp32, and all of it is taken.
        for output in first.outputs() {
            assert_eq!(output.kind.data_type, DataType::Float32, "{}", output.name);
            assert!(second.inputs().iter().any(|input| (&input.name, &input.kind) == (&output.name, &output.kind)));
        }
        assert!(!first.inputs().iter().any(|input| second.outputs().contains(input)));

        let shapes: Vec<Vec<i64>> = whole.inputs().iter().map(|input| input.kind.shape.clone()).collect();
        let names = whole.inputs().iter().map(|input| input.name.clone());
        let inputs: BTreeMap<String, Tensor> = names.zip(random(5, &shapes)).collect();
        for precision in [Precision::Float32, Precision::Float16] {
            let expected = evaluate(&whole, &inputs, precision).unwrap();
            let got = chain.evaluate(&inputs, precision, &mut |_, _| Ok(())).unwrap();
            assert!(got["noise_pred"].equal(&expected["noise_pred"]), "{target}, {attention}, {precision:?}");
        }
        // Again: what is there stays, or goes for the same bytes.
        let error = format!("{:#}", export_in_chunks(&place, false, export).unwrap_err());
        assert!(error.contains("chunk1.mlpackage exists already"), "{error}");
        assert_eq!(left(), paths);
        let model = |path: &Path| std::fs::read(path.join("Data/com.apple.CoreML/model.mlmodel")).unwrap();
        let before = model(&paths[1]);
        assert_eq!(export_in_chunks(&place, true, export).unwrap(), paths);
        assert_eq!((left(), model(&paths[1])), (paths.to_vec(), before));
        // A UNet is there in one form.
        let error = format!("{:#}", export_in_chunks(whole.path(), false, export).unwrap_err());
        assert!(error.contains("unet.mlpackage exists already"), "{error}");
        let paths = export_in_chunks(whole.path(), true, export).unwrap();
        assert!(paths.iter().all(|path| path.exists()) && !whole.path().exists());
    }
}

#[test]
fn chunks_that_do_not_belong_together_are_refused() {
    let config = small_unet(16, [24, 48], json!(4), false);
    let floats = weights(&config);
    let folder = tempfile::tempdir().unwrap();
    let chunks = [16, 24].map(|height| {
        let options = UnetOptions { height, ..UnetOptions::new(&config) };
        let export = |folder: &Path| export_unet(&config, &floats, &options, &metadata(), folder, &mut |_, _| {});
        export_in_chunks(&folder.path().join(height.to_string()).join("whole"), false, export).unwrap()
    });
    let refused = |paths: [&Path; 2]| {
        let packages = paths.map(|path| Package::open(path).unwrap());
        let error = Chain::new(packages.into()).err();
        format!("{:#}", error.expect("they do not belong together"))
    };
    let error = refused([&chunks[0][0], &chunks[1][1]]);
    assert!(error.contains("_chunk2.mlpackage takes") && error.contains("it is given FLOAT32[2, "), "{error}");
    // The second first.
    let error = refused([&chunks[0][1], &chunks[0][0]]);
    assert!(error.contains("_chunk1.mlpackage does not take noise_pred, which "), "{error}");
    // Cut alike, but other weights.
    let mut floats = weights(&config);
    let changed = &floats["conv_in.weight"] * 1.5;
    floats.insert("conv_in.weight".to_owned(), changed);
    let export =
        |folder: &Path| export_unet(&config, &floats, &UnetOptions::new(&config), &metadata(), folder, &mut |_, _| {});
    let others = export_in_chunks(&folder.path().join("others/whole"), false, export).unwrap();
    let error = refused([&chunks[0][0], &others[1]]);
    assert!(error.contains("are halves of different packages"), "{error}");
}

/// A package of a hundred kilobytes can ask for any amount of memory: that is told before it runs, network and all.
#[test]
fn packages_that_take_too_much_memory_are_not_run() {
    let config = small_unet(16, [24, 48], json!(2), false);
    let floats = weights(&config);
    let folder = tempfile::tempdir().unwrap();
    let options = UnetOptions { batch: 1, height: 128, width: 128, ..UnetOptions::new(&config) };
    let path = export_unet(&config, &floats, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
    let package = Chain::open(&path).unwrap();
    // The scores of two heads for each pair of 16384 tokens, before and after softmax, in fp32.
    let scores = 2 * 2 * 4 * (1u64 << 28);
    assert!((scores..scores + (1 << 28)).contains(&package.peak_bytes()), "{}", package.peak_bytes());
    let mut never = |_: &UnetInputs| -> anyhow::Result<Tensor> { panic!("the network runs") };
    let settings = Settings { memory: Some(scores), ..Settings::default() };
    let error = format!("{:#}", verify_unet(&package, &mut never, &settings).unwrap_err());
    assert!(error.contains("unet.mlpackage takes 4.") && error.contains("4.3 GB are free"), "{error}");
}

/// `verify --layers` points at the layer where the error begins.
#[test]
fn layers_show_where_the_error_grows() {
    let config = small_unet(16, [24, 48], json!(4), false);
    let mut stored = weights(&config);
    let sound: Weights = stored.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    let broken = "up_blocks.0.resnets.1.conv1";
    let weight = &stored[&format!("{broken}.weight")] * 1.01;
    stored.insert(format!("{broken}.weight"), weight);
    let layers = |stored: &Weights| {
        let folder = tempfile::tempdir().unwrap();
        let options = UnetOptions { attention: SplitEinsum, batch: 1, ..UnetOptions::new(&config) };
        let export = |folder: &Path| export_unet(&config, stored, &options, &metadata(), folder, &mut |_, _| {});
        let chunks = export_in_chunks(&folder.path().join("whole"), false, export).unwrap();
        let recording = Recording::default();
        let watch = |name: &str, value: &Tensor| recording.watch(name, value);
        let settings = Settings { recording: Some(&recording), timesteps: vec![1, 981], ..Settings::default() };
        let mut network = network(&config, &sound, Some(&watch));
        let report = verify_unet(&Chain::open(&chunks[0]).unwrap(), &mut network, &settings).unwrap();
        assert!(format!("{report}").contains("layers, timestep 981"), "{report}");
        report.layers.unwrap()
    };
    let names: BTreeSet<String> = config
        .parameters()
        .into_iter()
        .map(|parameter| parameter.name.rsplit_once('.').unwrap().0.to_owned())
        .collect();
    let found = layers(&sound);
    assert_eq!(found.rows.iter().map(|row| row.name.clone()).collect::<BTreeSet<_>>(), names);
    assert!(found.rows.iter().all(|row| row.float32 > 90.0 && row.float16 > 50.0), "{found}");
    let last = found.rows.last().unwrap();
    assert_eq!(last.name, "conv_out");

    let found = layers(&stored);
    let at = found.rows.iter().position(|row| row.name == broken).unwrap();
    assert!(found.rows[..at].iter().all(|row| row.float32 > 90.0), "{found}");
    assert!((30.0..60.0).contains(&found.rows[at].float32), "{found}");
    let losses = found.losses();
    assert!(losses.iter().all(|&loss| loss <= losses[at]), "{found}");
    assert!(format!("{found}").lines().any(|line| line.starts_with(broken) && line.ends_with('◀')), "{found}");
}

/// Validates, loads with coremltools, and runs one chunk after the other.
const CHECK: &str = r#"
import glob, json, sys, numpy, coremltools
from coremltools.converters.mil.frontend.milproto.load import load
folder, tools = sys.argv[1:]
sys.path.insert(0, tools)
import mlpackage_eval as M
results = []
for first in sorted(glob.glob(folder + "/*/*_chunk1.mlpackage")):
    case = first.rsplit("/", 1)[0]
    known = dict(numpy.load(case + "/inputs.npz"))
    expected = numpy.load(case + "/outputs.npz")["noise_pred"]
    issues = []
    for path in [first, first.replace("_chunk1", "_chunk2")]:
        package = M.validate(path)
        issues += [str(issue) for issue in package.issues]
        spec = coremltools.models.MLModel(path, skip_model_load=True).get_spec()
        weights = path + "/Data/com.apple.CoreML/weights"
        load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
        given = {feature.name: known[feature.name] for feature in spec.description.input}
        known.update(M.run(package, given, precision="fp32"))
    results.append({"issues": issues, "psnr": M.compare(known["noise_pred"], expected)["psnr_db"]})
print(json.dumps(results))
"#;

#[test]
fn an_independent_checker_runs_the_chunks() {
    let Some((python, tools)) = checker() else { return };
    let config = small_unet(16, [24, 48], json!(4), false);
    let floats = weights(&config);
    let palettes = palettized(&config, &floats);
    let hard = palettes.weights(Kind::Float, Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &dyn WeightSource, &Weights, DeploymentTarget, AttentionImplementation); 3] = [
        ("0", &floats, &floats, DeploymentTarget::Ios16, SplitEinsum),
        ("1", &palettes, &hard, DeploymentTarget::Ios16, Original),
        ("2", &palettes, &hard, DeploymentTarget::Ios18, SplitEinsumV2),
    ];
    for (name, stored, weights, target, attention) in cases {
        let folder = folder.path().join(name);
        let options = UnetOptions { target, attention, controlnet: true, ..UnetOptions::new(&config) };
        let export = |folder: &Path| export_unet(&config, stored, &options, &metadata(), folder, &mut |_, _| {});
        let paths = export_in_chunks(&folder.join("whole"), false, export).unwrap();
        let chain = Chain::open(&paths[0]).unwrap();
        let mut network = network(&config, weights, None);
        let mut kept = None;
        let mut reference = |given: &UnetInputs| {
            let expected = network(given)?;
            let context = given.context.transpose(1, 2).unsqueeze(2).contiguous();
            let residuals = given.residuals.iter().enumerate().map(|(i, x)| (format!("additional_residual_{i}"), x));
            let fixed = [("sample", &given.sample), ("timestep", &given.timestep), ("encoder_hidden_states", &context)];
            let all: Vec<(String, &Tensor)> =
                fixed.into_iter().map(|(name, x)| (name.to_owned(), x)).chain(residuals).collect();
            Tensor::write_npz(&all, folder.join("inputs.npz"))?;
            Tensor::write_npz(&[("noise_pred", &expected)], folder.join("outputs.npz"))?;
            kept = Some(());
            Ok(expected)
        };
        let settings = Settings { timesteps: vec![981], ..Settings::default() };
        let report = verify_unet(&chain, &mut reference, &settings).unwrap();
        assert!(kept.is_some() && report.least(Precision::Float32) > 90.0, "{report}");
    }
    let output = Command::new(python).args(["-c", CHECK]).arg(folder.path()).arg(tools).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let results: Vec<serde_json::Value> = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(results.len(), cases.len());
    for result in results {
        eprintln!("{result}");
        assert_eq!(result["issues"], json!([]));
        assert!(result["psnr"].as_f64().unwrap() > 90.0, "{result}");
    }
}

/// Through the command line: chunks for ControlNets, verified with their layers.
#[test]
fn the_command_line_exports_and_verifies_chunks() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (output.status.code().unwrap(), said.join("\n"))
    };
    let to = ["export", model, "-o", folder.path().to_str().unwrap(), "--chunk-unet"];
    let more = ["--unet-support-controlnet", "--unet-batch-one", "--attention-implementation", "SPLIT_EINSUM"];
    let arguments = [&to[..], &more, &["--latent-h", "24", "--latent-w", "8"]].concat();
    let (code, said) = run(&arguments);
    assert_eq!(code, 0, "{said}");
    let packages: Vec<&str> = said.lines().filter(|line| line.ends_with(".mlpackage")).collect();
    assert_eq!(packages.len(), 2, "{said}");
    assert!(packages[0].ends_with("_control-unet_chunk1.mlpackage"), "{said}");
    let (code, again) = run(&arguments);
    assert!(code == 2 && again.contains("_chunk1.mlpackage exists already"), "{again}");
    // Whole, it would be passed over for the chunks that are there.
    let whole: Vec<&str> = arguments.iter().copied().filter(|argument| *argument != "--chunk-unet").collect();
    let (code, again) = run(&whole);
    assert!(code == 2 && again.contains("_chunk1.mlpackage exists already"), "{again}");
    let (code, said_again) = run(&[&whole[..], &["--overwrite"]].concat());
    assert!(code == 0 && packages.iter().all(|path| !Path::new(path).exists()), "{said_again}");
    let (code, again) = run(&arguments);
    assert!(code == 2 && again.contains("_control-unet.mlpackage exists already"), "{again}");
    let (code, said_again) = run(&[&arguments[..], &["--overwrite"]].concat());
    assert!(code == 0 && !Path::new(&packages[0].replace("_chunk1", "")).exists(), "{said_again}");

    let (code, said) = run(&["verify", packages[0], packages[1], "--against", model, "--layers"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(said.matches("timestep 981 ").count(), 1, "the second chunk is taken with the first: {said}");
    assert!(said.contains("layers compared") && said.contains("mid_block.attentions.0.proj_in"), "{said}");
    let (code, said) = run(&["verify", packages[1], "--against", model]);
    assert!(code == 2 && said.contains("goes with"), "{said}");
    let (code, said) = run(&["verify", packages[1]]);
    assert!(code == 0 && said.contains("sound"), "{said}");
    // A half alone.
    let aside = folder.path().join("aside");
    for half in [0, 1] {
        std::fs::rename(packages[1 - half], &aside).unwrap();
        let missing = format!("its other half is missing: {}", packages[1 - half]);
        let (code, said) = run(&["verify", packages[half]]);
        assert!(code == 1 && said.contains("sound") && said.contains(&missing), "{said}");
        let (code, said) = run(&["verify", packages[half], "--against", model]);
        assert!(code == 1 && said.contains(&missing), "{said}");
        std::fs::rename(&aside, packages[1 - half]).unwrap();
    }
    // A half beside one of another export, whichever is asked about.
    let other = folder.path().join("other");
    let (code, said_again) =
        run(&[&["export", model, "-o", other.to_str().unwrap(), "--chunk-unet"], &more[..], &["--latent-h", "16"]]
            .concat());
    assert_eq!(code, 0, "{said_again}");
    let foreign = other.join(Path::new(packages[0]).file_name().unwrap());
    std::fs::rename(packages[0], &aside).unwrap();
    copy_folder(&foreign, Path::new(packages[0]));
    for half in packages.iter() {
        let (code, said) = run(&["verify", half]);
        assert!(code == 1 && said.contains("error: "), "{said}");
    }
    std::fs::remove_dir_all(packages[0]).unwrap();
    std::fs::rename(&aside, packages[0]).unwrap();
    // SDXL; and a model that predicts v, whose second chunk needs sample and timestep to tell the noise from it.
    let xl = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sdxl/model");
    let velocity = folder.path().join("velocity");
    copy_folder(Path::new(model), &velocity);
    let schedule = velocity.join("scheduler/scheduler_config.json");
    let text = std::fs::read_to_string(&schedule).unwrap();
    let changed = text.replace(r#""prediction_type": "epsilon""#, r#""prediction_type": "v_prediction""#);
    assert_ne!(changed, text);
    std::fs::write(&schedule, changed).unwrap();
    for model in [xl, velocity.to_str().unwrap()] {
        let (code, said) = run(&[&["export", model, "-o", to[3], "--chunk-unet"][..], &more].concat());
        assert_eq!(code, 0, "{said}");
        let first = said.lines().find(|line| line.ends_with("_chunk1.mlpackage")).unwrap();
        let (code, said) = run(&["verify", first, "--against", model, "--min-psnr", "50"]);
        assert!(code == 0 && said.contains("timestep 981 "), "{said}");
    }

    let (code, said) = run(&[&to[..], &["--component", "vae_decoder"]].concat());
    assert!(code == 2 && said.contains("--chunk-unet is about the UNet"), "{said}");
}
