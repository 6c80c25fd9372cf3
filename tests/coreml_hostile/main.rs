//! Packages that somebody broke, compiled or not, by accident or on purpose: refused with a message, never a panic.
//!
//! Some mutants of each package are tried with the other tests. Ten thousand, a minute or two of one core, with the
//! address space of the process limited:
//!
//! ```sh
//! OMP_NUM_THREADS=1 cargo test --test coreml_hostile -- --ignored --nocapture
//! ```

#[path = "../common/mod.rs"]
mod common;
mod compiled;
mod mutants;
mod mutate;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::shared;
use palettist::coreml::format::proto::{self, BindingKind, DimensionKind, TensorElements, ValueKind, ValueTypeKind};
use palettist::coreml::reading::Package;
use prost::Message;

const MODEL: &str = "Data/com.apple.CoreML/model.mlmodel";
const WEIGHTS: &str = "Data/com.apple.CoreML/weights/weight.bin";

/// A package of the shared data, or `None` where this checkout has none.
fn original(name: &str) -> Option<PathBuf> {
    Some(shared("coreml_packages")?.join(name).with_extension("mlpackage"))
}

/// A copy that can be changed.
struct Copy {
    folder: tempfile::TempDir,
}

impl Copy {
    fn of(package: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join(WEIGHTS).parent().unwrap()).unwrap();
        for file in ["Manifest.json", MODEL, WEIGHTS] {
            // Not `fs::copy`, which would copy that the original is read-only.
            fs::write(folder.path().join(file), fs::read(package.join(file)).unwrap()).unwrap();
        }
        Self { folder }
    }

    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(file)).unwrap()
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.folder.path().join(file), bytes).unwrap();
    }

    fn open(&self) -> anyhow::Result<Package> {
        Package::open(self.folder.path())
    }

    fn refusal(&self) -> String {
        match self.open() {
            Ok(_) => panic!("a broken package was accepted"),
            Err(error) => format!("{error:#}"),
        }
    }
}

#[test]
fn broken_weight_files() {
    let Some(package) = original("unet_pal4_cd2_ios18") else { return };
    let copy = Copy::of(&package);
    assert!(copy.open().is_ok(), "the copy itself is sound");
    let whole = copy.read(WEIGHTS);
    for cut in [0, 1, 63, 64, 100, 128, whole.len() / 2, whole.len() - 65, whole.len() - 1] {
        copy.write(WEIGHTS, &whole[..cut]);
        let message = copy.refusal();
        assert!(message.contains("weight.bin"), "cut to {cut}: {message}");
    }
    copy.write(WEIGHTS, &[&whole[..], &[0; 64]].concat());
    assert!(copy.refusal().contains("follow the last"));

    // Header and first records: every single bit matters.
    let second = (128 + u64::from_le_bytes(whole[72..80].try_into().unwrap()) as usize).next_multiple_of(64);
    for at in (0..128).chain(second..second + 64) {
        for bit in 0..8 {
            let mut broken = whole.clone();
            broken[at] ^= 1 << bit;
            copy.write(WEIGHTS, &broken);
            assert!(copy.open().is_err(), "bit {bit} of byte {at}");
        }
    }
    let mut broken = whole.clone();
    broken[second] = 0;
    copy.write(WEIGHTS, &broken);
    assert!(copy.refusal().contains("sentinel"), "{}", copy.refusal());

    // A size that nobody could allocate.
    broken = whole.clone();
    broken[72..80].copy_from_slice(&(u64::MAX - 1000).to_le_bytes());
    copy.write(WEIGHTS, &broken);
    assert!(copy.refusal().contains("pass the end"), "{}", copy.refusal());

    fs::remove_file(copy.folder.path().join(WEIGHTS)).unwrap();
    assert!(copy.refusal().contains("is not in the package"), "{}", copy.refusal());
}

#[test]
fn a_model_that_cannot_be_decoded_is_told_in_words() {
    let Some(package) = original("clip_pal4_ios16") else { return };
    let copy = Copy::of(&package);
    let whole = copy.read(MODEL);
    copy.write(MODEL, b"");
    assert!(copy.refusal().ends_with("model.mlmodel is damaged: it is empty; export the package again"));
    copy.write(MODEL, &whole[..whole.len() - 1]);
    let message = copy.refusal();
    assert!(
        message.contains("model.mlmodel is damaged: its `Model.ml_program` cannot be decoded; export"),
        "{message}"
    );
    copy.write(MODEL, b"\x07not a model");
    assert!(copy.refusal().contains("model.mlmodel is damaged: it cannot be decoded; export"), "{}", copy.refusal());
    // Within: the description's first input.
    let name = whole.windows(9).position(|bytes| bytes == b"input_ids").unwrap();
    let mut broken = whole.clone();
    broken[name] = 0xff;
    copy.write(MODEL, &broken);
    let message = copy.refusal();
    assert!(message.contains("its `FeatureDescription.name` cannot be decoded"), "{message}");
}

#[test]
fn broken_manifests() {
    let Some(package) = original("clip_pal4_ios16") else { return };
    let copy = Copy::of(&package);
    let manifest = String::from_utf8(copy.read("Manifest.json")).unwrap();
    let mut broken: Vec<(String, &str)> = vec![
        ("".into(), "Manifest.json is damaged: it is empty; export the package again"),
        (
            "{\n  \"fileFormatVersion\": ".into(),
            "Manifest.json is damaged: it is not JSON at line 2, column 23; export",
        ),
        ("[]".into(), "fileFormatVersion"),
        ("[".repeat(100_000), "Manifest.json"),
        (manifest.replace("1.0.0", "2.0.0"), "fileFormatVersion"),
        (manifest.replace("com.apple.CoreML/weights", "com.apple.CoreML/../../../etc"), "author/name"),
        (
            manifest.replace("\"weights\"", "\"model.mlmodel\"").replace("CoreML/weights", "CoreML/model.mlmodel"),
            "second",
        ),
    ];
    let root = manifest.split("rootModelIdentifier").nth(1).unwrap().split('"').nth(2).unwrap();
    broken.push((manifest.replacen(&format!("\"{root}\": {{"), "\"x\": {", 1), "rootModelIdentifier"));
    for (text, part) in broken {
        assert_ne!(text, manifest, "{part}");
        copy.write("Manifest.json", text.as_bytes());
        let message = copy.refusal();
        assert!(message.contains(part), "{part}: {message}");
    }
    fs::remove_file(copy.folder.path().join("Manifest.json")).unwrap();
    assert!(copy.refusal().contains("Manifest.json"));
    let no_package = |path: &Path| format!("{:#}", Package::open(path).unwrap_err());
    assert!(no_package(&copy.folder.path().join("nothing")).contains("no such folder"));
    assert!(no_package(&copy.folder.path().join(MODEL)).contains("it is a file; a package is a folder"));

    // A link that leads out of the package.
    let copy = Copy::of(&package);
    fs::remove_file(copy.folder.path().join(WEIGHTS)).unwrap();
    std::os::unix::fs::symlink(package.join(WEIGHTS), copy.folder.path().join(WEIGHTS)).unwrap();
    assert!(copy.refusal().contains("not a regular file"));
}

/// The block of operations of a model.
fn block(model: &mut proto::Model) -> &mut proto::Block {
    let functions = &mut model.ml_program.as_mut().unwrap().functions;
    functions.get_mut("main").unwrap().block_specializations.values_mut().next().unwrap()
}

/// The first operation of a kind.
fn first<'a>(model: &'a mut proto::Model, kind: &str) -> &'a mut proto::Operation {
    block(model).operations.iter_mut().find(|operation| operation.r#type == kind).unwrap()
}

/// The tensor type of a value type.
fn tensor(kind: &mut Option<proto::ValueType>) -> &mut proto::TensorType {
    match kind.as_mut().unwrap().kind.as_mut().unwrap() {
        ValueTypeKind::Tensor(tensor) => tensor,
        _ => panic!("not a tensor"),
    }
}

fn set_dimension(kind: &mut Option<proto::ValueType>, axis: usize, size: u64) {
    let constant = proto::ConstantDimension { size };
    tensor(kind).dimensions[axis].dimension = Some(DimensionKind::Constant(constant));
}

/// A change to a model, and what the message must hold.
type Change = (&'static str, fn(&mut proto::Model), &'static str);

#[test]
fn broken_programs_name_the_operation() {
    let changes: [Change; 24] = [
        ("version", |m| m.specification_version = 99, "specificationVersion is 99"),
        ("another opset's version", |m| m.specification_version = 8, "goes with CoreML7"),
        ("no program", |m| m.ml_program = None, "not an ML program"),
        ("no description", |m| m.description = None, "no description"),
        ("described shape", |m| m.description.as_mut().unwrap().input[0].name = "x".into(), "described are"),
        ("order", |m| block(m).operations.reverse(), "not defined before"),
        ("missing operation", |m| drop(block(m).operations.remove(0)), "operation"),
        (
            "defined twice",
            |m| {
                let twice = first(m, "softmax").clone();
                block(m).operations.push(twice);
            },
            "twice",
        ),
        ("unknown operation", |m| first(m, "softmax").r#type = "launch_missiles".into(), "launch_missiles ->"),
        (
            "unknown input",
            |m| {
                let axis = first(m, "softmax").inputs["axis"].clone();
                first(m, "softmax").inputs.insert("axes".into(), axis);
            },
            "softmax -> ",
        ),
        ("default left out", |m| drop(first(m, "softmax").inputs.remove("axis")), "axis must be written out"),
        (
            "newer parameter",
            |m| {
                let axis = first(m, "gather").inputs["axis"].clone();
                first(m, "gather").inputs.insert("validate_indices".into(), axis);
            },
            "validate_indices needs specification version 8",
        ),
        ("declared shape", |m| set_dimension(&mut first(m, "linear").outputs[0].r#type, 1, 17), "it follows"),
        ("enormous shape", |m| set_dimension(&mut first(m, "linear").outputs[0].r#type, 1, u64::MAX / 2), "more than"),
        ("empty dimension", |m| set_dimension(&mut first(m, "linear").outputs[0].r#type, 1, 0), "without elements"),
        ("declared type", |m| tensor(&mut first(m, "linear").outputs[0].r#type).data_type = 11, "it follows"),
        ("unknown type", |m| tensor(&mut first(m, "linear").outputs[0].r#type).data_type = 77, "data type 77"),
        ("rank", |m| tensor(&mut first(m, "linear").outputs[0].r#type).rank = -1, "rank -1"),
        (
            "computed weight",
            |m| {
                let x = first(m, "linear").inputs["x"].clone();
                first(m, "linear").inputs.insert("weight".into(), x);
            },
            "must be constant",
        ),
        (
            "constant output",
            |m| {
                let constant = first(m, "const").outputs[0].name.clone();
                block(m).outputs[0] = constant;
            },
            "must be computed",
        ),
        (
            "blob offset",
            |m| {
                let indices = first(m, "constexpr_lut_to_dense").attributes.get_mut("indices").unwrap();
                let Some(ValueKind::BlobFile(place)) = &mut indices.kind else { panic!("not a blob") };
                place.offset += 64;
            },
            "no blob's record lies at offset",
        ),
        (
            "blob file",
            |m| {
                let indices = first(m, "constexpr_lut_to_dense").attributes.get_mut("indices").unwrap();
                let Some(ValueKind::BlobFile(place)) = &mut indices.kind else { panic!("not a blob") };
                place.file_name = "@model_path/weights/../../../../../../etc/passwd".into();
            },
            "is not in the package",
        ),
        (
            "size of the lut",
            |m| {
                let lut = first(m, "constexpr_lut_to_dense").attributes["indices"].clone();
                first(m, "constexpr_lut_to_dense").attributes.insert("lut".into(), lut);
            },
            "constexpr_lut_to_dense ->",
        ),
        (
            "shape of the weight",
            |m| {
                let shape = first(m, "constexpr_lut_to_dense").attributes.get_mut("shape").unwrap();
                let Some(ValueKind::Immediate(immediate)) = &mut shape.kind else { panic!("not immediate") };
                let Some(proto::ImmediateKind::Tensor(tensor)) = &mut immediate.value else { panic!("not a tensor") };
                let Some(TensorElements::Bytes(bytes)) = &mut tensor.value else { panic!("not bytes") };
                bytes.values[3] = 0x7f;
            },
            "constexpr_lut_to_dense ->",
        ),
    ];
    let Some(package) = original("clip_pal4_ios16") else { return };
    let copy = Copy::of(&package);
    let model = proto::Model::decode(&copy.read(MODEL)[..]).unwrap();
    for (name, change, part) in changes {
        let mut changed = model.clone();
        change(&mut changed);
        assert_ne!(changed, model, "{name}");
        copy.write(MODEL, &changed.encode_to_vec());
        let message = copy.refusal();
        assert!(message.contains(part), "{name}: {message}");
    }
}

/// Where the bytes of a constant lie in `weight.bin`.
fn blob(value: &proto::Value) -> usize {
    let Some(ValueKind::BlobFile(place)) = &value.kind else { panic!("not a blob") };
    place.offset as usize + 64
}

#[test]
fn values_that_are_no_numbers() {
    let Some(package) = original("unet_fp16_ios16") else { return };
    let copy = Copy::of(&package);
    let mut model = proto::Model::decode(&copy.read(MODEL)[..]).unwrap();
    let whole = copy.read(WEIGHTS);
    let constants: BTreeMap<String, proto::Operation> = block(&mut model)
        .operations
        .iter()
        .filter(|operation| {
            operation.r#type == "const" && matches!(operation.attributes["val"].kind, Some(ValueKind::BlobFile(_)))
        })
        .map(|operation| (operation.outputs[0].name.clone(), operation.clone()))
        .collect();
    // The first operation of a kind that takes such a constant as this input, and the constant's name.
    let taken = |model: &mut proto::Model, kind: &str, input: &str| {
        let takes = |operation: &proto::Operation| match &operation.inputs.get(input)?.arguments[0].binding {
            Some(BindingKind::Name(name)) if constants.contains_key(name) => Some(name.clone()),
            _ => None,
        };
        let mut operations = block(model).operations.iter().enumerate();
        operations
            .find_map(|(at, operation)| Some((at, takes(operation).filter(|_| operation.r#type == kind)?)))
            .unwrap()
    };
    let place = |name: &str| blob(&constants[name].attributes["val"]);
    let check = |at: usize, value: f32| {
        let mut broken = whole.clone();
        broken[at + 2..at + 4].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
        copy.write(WEIGHTS, &broken);
        copy.open().unwrap().check_values().map_err(|error| format!("{error:#}"))
    };
    let (_, weight) = taken(&mut model, "conv", "weight");
    let at = place(&weight);
    assert_eq!(check(at, 1.0), Ok(()));
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let said = check(at, value).unwrap_err();
        assert!(said.contains(&format!("const -> {weight}: val: 1 of ")) && said.contains("NaN or infinite"), "{said}");
    }
    // What is added may be a mask.
    let (number, mask) = taken(&mut model, "mul", "y");
    let at = place(&mask);
    assert!(check(at, f32::NEG_INFINITY).is_err());
    block(&mut model).operations[number].r#type = "add".into();
    copy.write(MODEL, &model.encode_to_vec());
    assert_eq!(check(at, f32::NEG_INFINITY), Ok(()));
    assert!(check(at, f32::INFINITY).is_err() && check(at, f32::NAN).is_err());

    // Thousands of constants that share the largest blob: it is read once.
    let size = |constant: &proto::Operation| {
        let at = blob(&constant.attributes["val"]) - 56;
        u64::from_le_bytes(whole[at..at + 8].try_into().unwrap())
    };
    let largest = constants.values().max_by_key(|constant| size(constant)).unwrap();
    let again = (0..50_000).map(|number| {
        let mut again = largest.clone();
        again.outputs[0].name = format!("again_{number}");
        let name = again.attributes.get_mut("name").unwrap();
        let Some(ValueKind::Immediate(immediate)) = &mut name.kind else { panic!("not immediate") };
        let Some(proto::ImmediateKind::Tensor(tensor)) = &mut immediate.value else { panic!("not a tensor") };
        let Some(TensorElements::Strings(strings)) = &mut tensor.value else { panic!("not a string") };
        strings.values = vec![format!("again_{number}")];
        again
    });
    block(&mut model).operations.splice(0..0, again);
    copy.write(WEIGHTS, &whole);
    copy.write(MODEL, &model.encode_to_vec());
    let package = copy.open().unwrap();
    let start = Instant::now();
    package.check_values().unwrap();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(2), "{} bytes 50 000 times take {took:?}", size(largest));

    // A palette.
    let Some(package) = original("unet_pal2_ios16") else { return };
    let copy = Copy::of(&package);
    let mut model = proto::Model::decode(&copy.read(MODEL)[..]).unwrap();
    let palettized = first(&mut model, "constexpr_lut_to_dense");
    let (name, lut) = (palettized.outputs[0].name.clone(), palettized.attributes.get_mut("lut").unwrap());
    let Some(ValueKind::Immediate(immediate)) = &mut lut.kind else { panic!("not immediate") };
    let Some(proto::ImmediateKind::Tensor(tensor)) = &mut immediate.value else { panic!("not a tensor") };
    let Some(TensorElements::Bytes(bytes)) = &mut tensor.value else { panic!("not bytes") };
    bytes.values[2..4].copy_from_slice(&half::f16::NEG_INFINITY.to_le_bytes());
    copy.write(MODEL, &model.encode_to_vec());
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).arg("verify").arg(copy.folder.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&format!("constexpr_lut_to_dense -> {name}: lut: 1 of 4 values are NaN or infinite")),
        "{said}"
    );
}

#[test]
fn constants_that_refer_to_each_other_in_a_circle() {
    let Some(package) = original("unet_pal4_lut8_ios18") else { return };
    let copy = Copy::of(&package);
    let mut model = proto::Model::decode(&copy.read(MODEL)[..]).unwrap();
    // The table of the first weight becomes the weight itself; then two that name each other.
    let weight = first(&mut model, "constexpr_lut_to_dense").outputs[0].name.clone();
    let scale = first(&mut model, "constexpr_blockwise_shift_scale");
    let argument = proto::Binding { binding: Some(BindingKind::Name(weight.clone())) };
    scale.inputs.insert("data".into(), proto::Argument { arguments: vec![argument.clone()] });
    copy.write(MODEL, &model.encode_to_vec());
    assert!(copy.refusal().contains("is not an earlier constant"), "{}", copy.refusal());
    // With an earlier definition of the same name the circle hides behind a duplicate.
    let mut early = first(&mut model, "const").clone();
    early.outputs[0].name = weight;
    block(&mut model).operations.insert(0, early);
    copy.write(MODEL, &model.encode_to_vec());
    copy.refusal();
}
