use super::script::holds_bundle;
use super::*;
use crate::coreml::format::package::write_package;
use crate::coreml::format::proto::{self, data_type};
use crate::coreml::strangers::of_another_model;

/// A package of the smallest program: one operation on one value.
fn package(path: &Path) {
    let kind = proto::ValueType {
        kind: Some(proto::ValueTypeKind::Tensor(proto::TensorType {
            data_type: data_type::FLOAT32,
            rank: 1,
            dimensions: vec![proto::Dimension {
                dimension: Some(proto::DimensionKind::Constant(proto::ConstantDimension { size: 4 })),
            }],
            ..Default::default()
        })),
    };
    let named = |name: &str| proto::NamedValueType { name: name.into(), r#type: Some(kind.clone()) };
    let feature = |name: &str| {
        let array =
            proto::ArrayFeatureType { shape: vec![4], data_type: proto::array_type::FLOAT32, ..Default::default() };
        let kind = proto::FeatureType { kind: Some(proto::FeatureKind::MultiArray(array)), is_optional: false };
        proto::FeatureDescription { name: name.into(), short_description: String::new(), r#type: Some(kind) }
    };
    let x = proto::Binding { binding: Some(proto::BindingKind::Name("x".into())) };
    let relu = proto::Operation {
        r#type: "relu".into(),
        inputs: [("x".to_owned(), proto::Argument { arguments: vec![x] })].into(),
        outputs: vec![named("y")],
        ..Default::default()
    };
    let block = proto::Block { outputs: vec!["y".into()], operations: vec![relu], ..Default::default() };
    let function = proto::Function {
        inputs: vec![named("x")],
        opset: "CoreML6".into(),
        block_specializations: [("CoreML6".to_owned(), block)].into(),
        ..Default::default()
    };
    let program =
        proto::Program { version: 1, functions: [("main".to_owned(), function)].into(), ..Default::default() };
    let model = proto::Model {
        specification_version: 7,
        description: Some(proto::ModelDescription {
            input: vec![feature("x")],
            output: vec![feature("y")],
            metadata: None,
        }),
        is_updatable: false,
        ml_program: Some(program),
    };
    write_package(path, false, |weights| Ok((model, weights.finish()?.1))).unwrap();
}

fn write(bundle: &Bundle) -> Result<Bundled> {
    bundle.write(&mut |_, _| {})
}

/// Runs the script with an `xcrun` that makes empty folders.
#[test]
#[cfg(unix)]
fn the_script_compiles_what_is_there_under_the_names_that_swift_reads() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let metadata = PackageMetadata { model: "someone/it's new".into(), ..Default::default() };
    let place = |component: &str| folder.path().join(metadata.package_name(component));
    for component in ["text_encoder", "unet_chunk1", "unet_chunk2", "safety_checker"] {
        package(&place(component));
    }
    let texts = [("vocab.json", "{}".to_owned()), ("merges.txt", "a b\n".to_owned())];
    let bundle = Bundle {
        folder: folder.path(),
        metadata: &metadata,
        attention: AttentionImplementation::SplitEinsum,
        tokenizer: &texts,
        written: &["text_encoder", "unet", "safety_checker"].map(String::from),
        overwrite: false,
    };
    let there = write(&bundle);
    if cfg!(target_os = "macos") {
        // A real compiler has run.
        return;
    }
    let there = there.unwrap();
    assert!(!there.by_apple && there.left.is_empty() && there.compiled.len() == 4, "{there:?}");

    let tool = folder.path().join("bin/xcrun");
    fs::create_dir(tool.parent().unwrap()).unwrap();
    let fake = "#!/bin/sh\n[ \"$1\" = --find ] && exit 0\n[ -d \"$3\" ] || exit 1\n\
                mkdir \"$4/$(basename \"$3\" .mlpackage).mlmodelc\"\n";
    fs::write(&tool, fake).unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tool.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let names = |folder: PathBuf| {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let expected = [
        "SafetyChecker.mlmodelc",
        "TextEncoder.mlmodelc",
        "UnetChunk1.mlmodelc",
        "UnetChunk2.mlmodelc",
        "merges.txt",
        "vocab.json",
    ];
    // All is compiled already, and Apple's compiler takes its place.
    assert_eq!(names(there.resources.clone()), expected);
    let producer = |name: &str| fs::read_to_string(there.resources.join(name).join("model.mil"));
    assert!(producer("UnetChunk2.mlmodelc").unwrap().contains("palettist-version"));
    // The second time what is there already is written again.
    for arguments in [&[][..], &["--mochi"]] {
        let mut command = Command::new("sh");
        command.arg(&there.script).args(arguments).env("PATH", &path).env("HOME", folder.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(names(there.resources.clone()), expected);
    assert_eq!(names(folder.path().join("MochiDiffusion/models/it's new")), expected);
    // Then the UNet whole: chunks, which programs take first, are gone from everywhere.
    for chunk in ["unet_chunk1", "unet_chunk2"] {
        fs::remove_dir_all(place(chunk)).unwrap();
    }
    package(&place("unet"));
    // Not unasked.
    let refused = bundle.check().unwrap_err().to_string();
    assert!(refused.contains(".mlmodelc exists already"), "{refused}");
    // What is not written now is compiled where it is not yet, and what is of something else is left and told.
    let more = write(&Bundle { written: &[], ..bundle }).unwrap();
    assert_eq!(more.compiled, [(there.resources.join("Unet.mlmodelc"), more.compiled[0].1)]);
    let said = more.notes().join("\n");
    assert!(said.contains("TextEncoder.mlmodelc is not made of"), "the stand-in of a compiler makes nothing: {said}");
    assert!(said.contains("holds Unet whole and in chunks"), "{said}");
    assert!(there.resources.join("UnetChunk1.mlmodelc").exists() && producer("TextEncoder.mlmodelc").is_err());
    let again = write(&Bundle { overwrite: true, ..bundle }).unwrap();
    assert!(!again.resources.join("UnetChunk1.mlmodelc").exists(), "compiled of what was there");
    assert!(producer("TextEncoder.mlmodelc").is_ok() && again.left.is_empty(), "{again:?}");
    let mut command = Command::new("sh");
    command.arg(&there.script).arg("--mochi").env("PATH", &path).env("HOME", folder.path());
    assert!(command.output().unwrap().status.success());
    let expected = ["SafetyChecker.mlmodelc", "TextEncoder.mlmodelc", "Unet.mlmodelc", "merges.txt", "vocab.json"];
    assert_eq!(names(there.resources.clone()), expected);
    assert_eq!(names(folder.path().join("MochiDiffusion/models/it's new")), expected);
    let parts = [Part::TextEncoder, Part::Unet, Part::VaeDecoder, Part::SafetyChecker];
    assert_eq!(of_another_model(folder.path(), &metadata, &parts), None);
    let other = PackageMetadata { model: "another".into(), ..Default::default() };
    assert!(of_another_model(folder.path(), &other, &parts).is_some());
    // One of the same name that has no safety checker.
    assert!(of_another_model(folder.path(), &metadata, &parts[..3]).is_some());
    // What was compiled stays if compiling fails, and nothing is begun where a package is missing.
    fs::write(&tool, "#!/bin/sh\n[ \"$1\" = --find ]\n").unwrap();
    let run = || {
        let output = Command::new("sh").arg(&there.script).env("PATH", &path).output().unwrap();
        assert!(!output.status.success());
        assert_eq!(names(there.resources.clone()), expected);
        assert!(!folder.path().join(".compiling").exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    run();
    fs::write(&tool, fake).unwrap();
    fs::remove_dir_all(place("unet")).unwrap();
    assert!(run().contains("unet.mlpackage is not here any more"));
    package(&place("unet"));
    // A script that cannot find the compiler says so.
    let output = Command::new("sh").arg(&there.script).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("Xcode"));
}

/// A script of the user's, a vocabulary of another's, and links: none is replaced unasked, and nothing is written
/// through a link, asked or not.
#[test]
#[cfg(unix)]
fn what_is_not_its_own_stays() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (folder.path().join("bundle"), folder.path().join("outside"));
    let metadata = PackageMetadata { model: "m".into(), ..Default::default() };
    let texts = [("vocab.json", "{}".to_owned()), ("merges.txt", "a b\n".to_owned())];
    let bundle = Bundle {
        folder: &inside,
        metadata: &metadata,
        attention: AttentionImplementation::Original,
        tokenizer: &texts,
        written: &["unet".to_owned()],
        overwrite: false,
    };
    let resources = inside.join("Resources");
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    let refused = |name: &str| {
        for said in [bundle.check().unwrap_err().to_string(), write(&bundle).unwrap_err().to_string()] {
            assert!(said.contains(name) && said.contains("exists already"), "{said}");
        }
    };
    fs::create_dir_all(&resources).unwrap();
    fs::write(inside.join(SCRIPT), "echo mine\n").unwrap();
    refused(SCRIPT);
    assert_eq!(text(&inside.join(SCRIPT)), "echo mine\n");
    fs::remove_file(inside.join(SCRIPT)).unwrap();
    fs::create_dir_all(outside.join("compiled")).unwrap();
    fs::write(outside.join("vocab"), "theirs").unwrap();
    for (name, target) in [("vocab.json", "vocab"), ("Unet.mlmodelc", "compiled"), ("UnetChunk1.mlmodelc", "none")] {
        symlink(outside.join(target), resources.join(name)).unwrap();
        refused(name);
        if name != "vocab.json" {
            fs::remove_file(resources.join(name)).unwrap();
            symlink(outside.join(target), resources.join(name)).unwrap();
        }
        let there = write(&Bundle { overwrite: true, ..bundle }).unwrap();
        assert!(!resources.join(name).is_symlink(), "{name}");
        assert_eq!((text(&outside.join("vocab")).as_str(), outside.join("compiled").is_dir()), ("theirs", true));
        assert!(holds_bundle(&inside) && is_untouched(&text(&there.script)));
    }
    // Its own, as it was written, gives way to the next; touched, it is the user's.
    write(&bundle).unwrap();
    let own = text(&inside.join(SCRIPT));
    fs::write(inside.join(SCRIPT), own.replace("set -eu", "set -e")).unwrap();
    refused(SCRIPT);
    fs::remove_dir_all(&inside).unwrap();
    fs::create_dir(&inside).unwrap();
    symlink(&outside, &resources).unwrap();
    for overwrite in [false, true] {
        let said = write(&Bundle { overwrite, ..bundle }).unwrap_err().to_string();
        assert!(said.contains("Resources is a link"), "{said}");
    }
    assert!(!outside.join("vocab.json").exists());
}
