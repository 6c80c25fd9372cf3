//! Compiled packages: as Apple's compiler makes them, as the reader reads them, and as the command writes them.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::shared;
use palettist::coreml::compiling::{Compiled, Unsupported, compile};
use palettist::coreml::reading::{Package, Precision, evaluate};
use serde_json::Value;
use tch::Tensor;

/// How many of the pairs are equal at least: `model.mil`, `coremldata.bin`, `analytics/coremldata.bin`, `metadata.json`.
const REACHED: [(&str, usize); 4] =
    [("model.mil", 11), ("coremldata.bin", 11), ("analytics", 11), ("metadata.json", 11)];

/// All folders below one, itself included.
fn folders(folder: &Path, found: &mut Vec<PathBuf>) {
    found.push(folder.to_owned());
    let mut within: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    within.sort();
    within.iter().filter(|path| path.is_dir()).for_each(|path| folders(path, found));
}

/// A model and what Apple's compiler made of it.
struct Pair {
    model: PathBuf,
    compiled: PathBuf,
}

/// The pairs below a folder: a compiled model, and beside it a package or the file of a model.
fn pairs(folder: &Path) -> Vec<Pair> {
    let mut all = Vec::new();
    folders(folder, &mut all);
    let is_compiled =
        |path: &Path| ["model.mil", "coremldata.bin", "metadata.json"].iter().all(|file| path.join(file).is_file());
    let models = |beside: &Path| {
        let mut within = Vec::new();
        folders(beside, &mut within);
        let files = within.iter().flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()));
        files.filter(|path| path.extension().is_some_and(|ending| ending == "mlmodel")).collect::<Vec<_>>()
    };
    let compiled = all.into_iter().filter(|path| is_compiled(path));
    compiled
        .filter_map(|compiled| {
            let model = models(compiled.parent()?).into_iter().next()?;
            Some(Pair { model, compiled })
        })
        .collect()
}

/// A text with the entries of whoever printed it taken out of `buildInfo`.
fn without_producer(text: &str) -> String {
    let mut lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
    let (head, entries) = lines[1].split_once("({").unwrap();
    let entries = entries.strip_suffix("})]").unwrap();
    let own = ["{\"coremlc-component-MIL\"", "{\"coremlc-version\"", "{\"palettist-version\""];
    let kept = entries.split_inclusive('}').map(|entry| entry.trim_start_matches(", "));
    let kept: Vec<&str> = kept.filter(|entry| !own.iter().any(|own| entry.starts_with(own))).collect();
    lines[1] = format!("{head}({{{}}})]", kept.join(", "));
    lines.join("\n")
}

/// Numbers and bytes of the fields of a message.
type Fields = Vec<(u64, Vec<u8>)>;

/// `coremldata.bin` with the entries that users define, which Apple's compiler writes in any order, sorted: the bytes before
/// the description, its fields, the bytes after it.
fn sorted_data(data: &[u8]) -> (Vec<u8>, Fields, Vec<u8>) {
    let length = u64::from_le_bytes(data[75..83].try_into().unwrap()) as usize;
    let mut description = fields(&data[83..83 + length]);
    for (number, bytes) in &mut description {
        if *number == 100 {
            let mut about = fields(bytes);
            about.sort();
            *bytes =
                about.into_iter().flat_map(|(number, bytes)| [number.to_le_bytes().to_vec(), bytes].concat()).collect();
        }
    }
    (data[..75].to_vec(), description, data[83 + length..].to_vec())
}

/// The fields of a message that has none but numbers, texts and messages; a number as its bytes.
fn fields(mut bytes: &[u8]) -> Fields {
    let mut found = Vec::new();
    let number = |bytes: &mut &[u8]| {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    };
    while !bytes.is_empty() {
        let key = number(&mut bytes);
        if key & 7 == 0 {
            found.push((key >> 3, number(&mut bytes).to_le_bytes().to_vec()));
            continue;
        }
        assert_eq!(key & 7, 2);
        let length = number(&mut bytes) as usize;
        found.push((key >> 3, bytes[..length].to_vec()));
        bytes = &bytes[length..];
    }
    found
}

/// The first lines in which two texts differ.
fn difference(own: &str, apples: &str) -> String {
    let mut lines = own.lines().zip(apples.lines()).enumerate();
    match lines.find(|(_, (own, apples))| own != apples) {
        Some((number, (own, apples))) => format!("line {}:\n  {own:.300}\n  {apples:.300}", number + 1),
        None => format!("{} bytes, {} bytes", own.len(), apples.len()),
    }
}

/// Where two values differ.
fn differing(path: &str, own: &Value, apples: &Value, found: &mut Vec<String>) {
    match (own, apples) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                differing(&format!("{path}/{key}"), &of(a), &of(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(at, (a, b))| differing(&format!("{path}/{at}"), a, b, found));
        }
        _ if own == apples => {}
        _ => found.push(format!("{path}: {own} is {apples}")),
    }
}

#[test]
fn compiled_as_apples_compiler_does() {
    let Some(folder) = shared("mlmodelc_pairs") else { return };
    let (mut equal, mut compiled, mut refused) = ([0; 4], 0, 0);
    for pair in pairs(&folder) {
        let name = pair.compiled.strip_prefix(&folder).unwrap().display().to_string();
        let apples = |file: &str| fs::read(pair.compiled.join(file)).unwrap();
        let metadata: Value = serde_json::from_slice(&apples("metadata.json")).unwrap();
        // The packages have other names than those that they were compiled under.
        let class = metadata[0]["generatedClassName"].as_str().unwrap();
        let stem = pair.model.file_stem().unwrap().to_str().unwrap();
        let own = match Compiled::of(&fs::read(&pair.model).unwrap(), class, stem) {
            Ok(own) => own,
            Err(error) => {
                let unsupported = error.downcast_ref::<Unsupported>().unwrap_or_else(|| panic!("{name}: {error:#}"));
                println!("{name}: {unsupported}");
                refused += 1;
                continue;
            }
        };
        compiled += 1;
        let text = String::from_utf8(apples("model.mil")).unwrap();
        let texts = (without_producer(&own.program), without_producer(&text));
        let mut differences = Vec::new();
        differing("", &own.metadata, &metadata, &mut differences);
        let same = [
            texts.0 == texts.1,
            sorted_data(&own.data) == sorted_data(&apples("coremldata.bin")),
            own.analytics == apples("analytics/coremldata.bin"),
            differences.is_empty(),
        ];
        if !same[0] {
            println!("{name}: {}", difference(&texts.0, &texts.1));
        }
        differences.iter().for_each(|difference| println!("{name}: {difference}"));
        for ((count, same), (file, _)) in equal.iter_mut().zip(same).zip(REACHED) {
            *count += usize::from(same);
            if !same {
                println!("{name}: {file} differs");
            }
        }
    }
    println!("{} pairs: {refused} refused, {compiled} compiled; equal to Apple's:", compiled + refused);
    for ((file, least), equal) in REACHED.into_iter().zip(equal) {
        println!("  {file}: {equal} of {compiled}");
        assert!(equal >= least, "{file}: {equal} are equal, {least} were");
    }
}

/// The programs of models within pipelines are printed as they would be alone; what is beside them is another form there.
#[test]
fn models_of_pipelines_as_apples_compiler_does() {
    const LEAST: usize = 12;
    let Some(folder) = shared("mlmodelc_pairs") else { return };
    let mut all = Vec::new();
    folders(&folder, &mut all);
    let (mut compiled, mut equal) = (0, 0);
    for first in all.iter().filter(|path| path.ends_with("model0") && path.join("model.mil").is_file()) {
        let whole = first.parent().unwrap();
        let Ok(model) = fs::read(whole.parent().unwrap().join("input.mlmodel")) else { continue };
        let pipeline = fields(&model).into_iter().find(|(number, _)| *number == 202).unwrap().1;
        let models = fields(&pipeline).into_iter().filter(|(number, _)| *number == 1);
        for (number, (_, model)) in models.enumerate() {
            let place = whole.join(format!("model{number}"));
            let own = match Compiled::of(&model, "model", "model") {
                Ok(own) => own,
                Err(error) => {
                    assert!(error.is::<Unsupported>(), "{}: {error:#}", place.display());
                    continue;
                }
            };
            compiled += 1;
            let text = fs::read_to_string(place.join("model.mil")).unwrap();
            let texts = (without_producer(&own.program), without_producer(&text));
            if texts.0 == texts.1 {
                equal += 1;
            } else {
                println!("{}: {}", place.display(), difference(&texts.0, &texts.1));
            }
        }
    }
    println!("models of pipelines: {equal} of {compiled} model.mil equal to Apple's");
    assert!(equal >= LEAST, "{equal} are equal, {LEAST} were");
}

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");

/// Exit code, standard output, standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn ok(arguments: &[&str]) -> String {
    let (code, out, err) = run(arguments);
    assert_eq!(code, 0, "{arguments:?}: {out}{err}");
    out
}

fn fails(arguments: &[&str], with: i32) -> String {
    let (code, out, err) = run(arguments);
    assert_eq!(code, with, "{arguments:?}: {out}{err}");
    err
}

/// Exports all networks of a small model, and what the options say.
fn export(folder: &Path, more: &[&str]) -> Vec<String> {
    let said = ok(&[&["export", MODEL, "-o", folder.to_str().unwrap()], more].concat());
    said.lines().filter(|line| line.ends_with(".mlpackage")).map(str::to_owned).collect()
}

/// Every kind of package that is written, for every system.
#[test]
fn what_is_exported_compiles_and_reads_back_as_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 4] = [
        ("plain", &["--component", "all", "--quantize-nbits", "4"]),
        ("newest", &["--component", "all", "--quantize-nbits", "3"]),
        ("split", &["--attention-implementation", "SPLIT_EINSUM", "--chunk-unet", "--min-deployment-target", "iOS17"]),
        ("controlled", &["--unet-support-controlnet"]),
    ];
    for (name, options) in cases {
        let packages = export(&folder.path().join(name), options);
        let out = folder.path().join(name).join("compiled");
        let paths: Vec<&str> = packages.iter().map(String::as_str).collect();
        let said = ok(&[&["compile"], &paths[..], &["-o", out.to_str().unwrap()]].concat());
        assert_eq!(said.lines().count(), packages.len(), "{said}");
        for path in &packages {
            let path = Path::new(path);
            let place = out.join(path.file_name().unwrap()).with_extension("mlmodelc");
            let (package, compiled) = (Package::open(path).unwrap(), Package::open(&place).unwrap());
            assert!(compiled.is_compiled() && !package.is_compiled());
            assert_eq!(compiled.inputs(), package.inputs());
            assert_eq!(compiled.outputs(), package.outputs());
            assert_eq!(compiled.metadata(), package.metadata());
            assert_eq!(compiled.operation_counts(), package.operation_counts());
            assert_eq!(compiled.weights().unwrap(), package.weights().unwrap());
            compiled.check_values().unwrap();
            // What apps decide by.
            let json: Value = serde_json::from_slice(&fs::read(place.join("metadata.json")).unwrap()).unwrap();
            let einsums = json[0]["mlProgramOperationTypeHistogram"].get("Ios16.einsum").is_some();
            assert_eq!(einsums, name == "split", "{}", path.display());
            let texts =
                json[0]["inputSchema"].as_array().unwrap().iter().flat_map(|input| input.as_object().unwrap().values());
            assert!(texts.into_iter().all(Value::is_string));
            let text = fs::read_to_string(place.join("model.mil")).unwrap();
            assert!(text.lines().nth(1).unwrap().contains("\"palettist-version\""), "who made it is told");
        }
    }
}

#[test]
fn the_command_replaces_nothing_unasked_and_says_how_weights_are_shared() {
    let folder = tempfile::tempdir().unwrap();
    let packages = export(&folder.path().join("packages"), &["--component", "text_encoder"]);
    let (package, out) = (packages[0].as_str(), folder.path().join("out"));
    let to = ["-o", out.to_str().unwrap()];
    let said = ok(&[&["compile", package], &to[..]].concat());
    let shared = ["(reflink)", "(hard link)", "weights copied"];
    assert!(shared.iter().any(|how| said.contains(how)), "{said}");
    let place = out.join(Path::new(package).file_name().unwrap()).with_extension("mlmodelc");
    let weights = |folder: &Path| fs::read(folder.join("weights/weight.bin")).unwrap();
    assert!(weights(&place) == weights(&Path::new(package).join("Data/com.apple.CoreML")));
    fs::write(place.join("metadata.json"), "changed").unwrap();
    assert!(
        fails(&[&["compile", package], &to[..]].concat(), 2)
            .contains("exists already and is left as it is: --overwrite")
    );
    assert_eq!(fs::read_to_string(place.join("metadata.json")).unwrap(), "changed");
    ok(&[&["compile", package, "--overwrite"], &to[..]].concat());
    Package::open(&place).unwrap();
    let names: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    // Something else, and a link, are never replaced.
    fs::remove_dir_all(&place).unwrap();
    fs::create_dir(&place).unwrap();
    let overwrite = [&["compile", package, "--overwrite"], &to[..]].concat();
    assert!(fails(&overwrite, 2).contains("is not a compiled Core ML model"));
    fs::remove_dir(&place).unwrap();
    std::os::unix::fs::symlink(package, &place).unwrap();
    assert!(fails(&overwrite, 2).contains("is not a compiled Core ML model"));
    fs::remove_file(&place).unwrap();
    // One of two is no package: the other is compiled.
    let none = folder.path().join("none");
    fs::create_dir(&none).unwrap();
    let said = fails(&[&["compile", none.to_str().unwrap(), package], &to[..]].concat(), 1);
    assert!(said.contains("none: Manifest.json is missing") && said.lines().count() == 1, "{said}");
    assert!(place.is_dir());
    assert!(
        fails(&[&["compile", package, package, "--overwrite"], &to[..]].concat(), 2).contains("two of the packages")
    );
    // Weights that are missing.
    fs::remove_file(Path::new(package).join("Data/com.apple.CoreML/weights/weight.bin")).unwrap();
    assert!(fails(&overwrite, 1).contains("its file of weights \"weight.bin\" is missing"));
    assert!(place.is_dir(), "what was there stays");
}

/// Packages of coremltools, in every form of palettes, compute the same compiled.
#[test]
fn packages_of_others_compute_the_same_compiled() {
    let Some(folder) = shared("coreml_packages") else { return };
    let out = tempfile::tempdir().unwrap();
    for name in ["clip_pal4_ios16", "unet_pal4_g8_ios18", "unet_pal4_cd2_ios18", "unet_pal4_lut8_ios18"] {
        let path = folder.join(name).with_extension("mlpackage");
        let place = out.path().join(name).with_extension("mlmodelc");
        compile(&path, &place, false, &mut |_, _| {}).unwrap();
        let given = Tensor::read_npz(path.with_extension("npz")).unwrap().into_iter();
        let given = given.filter(|(name, _)| !name.starts_with("expect.")).collect();
        let computed = |path: &Path| evaluate(&Package::open(path).unwrap(), &given, Precision::Float32).unwrap();
        let (package, compiled) = (computed(&path), computed(&place));
        assert_eq!(package.keys().collect::<Vec<_>>(), compiled.keys().collect::<Vec<_>>());
        assert!(package.iter().all(|(name, value)| *value == compiled[name]), "{name}");
    }
}

#[test]
fn inspect_and_verify_read_what_a_bundle_holds() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = ["--component", "unet", "--chunk-unet", "--quantize-nbits", "4", "--bundle-resources-for-swift-cli"];
    let packages = export(folder.path(), &bundle);
    let place = |name: &str| folder.path().join("Resources").join(name).to_str().unwrap().to_owned();
    let [first, second] = ["UnetChunk1.mlmodelc", "UnetChunk2.mlmodelc"].map(place);
    let said = ok(&["inspect", &first]);
    assert!(said.contains("compiled Core ML model") && said.contains("compiled by: palettist "), "{said}");
    assert!(said.contains("4-bit palette"), "{said}");
    // The first half takes the second along.
    let against = ["--against", MODEL, "--quantize-nbits", "4"];
    assert!(ok(&[&["verify", &first], &against[..]].concat()).contains("dB"));
    assert!(fails(&[&["verify", &second], &against[..]].concat(), 2).contains("UnetChunk1.mlmodelc: verify that"));
    assert!(
        fails(&["verify", &first, "--against", MODEL, "--quantize-nbits", "6"], 2).contains("its palettes have 4 bits")
    );
    // What is compiled is counted once, beside its package or without one.
    let weights = |path: &str| {
        let about: Value = serde_json::from_str(&ok(&["inspect", "--json", path])).unwrap();
        about["weights"].as_u64().unwrap()
    };
    let all = weights(folder.path().to_str().unwrap());
    assert_eq!(weights(&place("")), all);
    assert_eq!(packages.iter().map(|package| weights(package)).sum::<u64>(), all);
    // Weights that are not the model's are found.
    let file = Path::new(&first).join("weights/weight.bin");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x11);
    fs::remove_file(&file).unwrap();
    fs::write(&file, bytes).unwrap();
    fails(&[&["verify", &first], &against[..]].concat(), 1);
}
