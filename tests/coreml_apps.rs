//! Packages as apps use them: what texts are padded with, what a bundle holds and misses, what is at its place when an
//! export is killed, and what `verify` says of packages that are not what it was told.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::copy_folder;
use common::{metadata, small_unet, weights};
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::reading::{Chain, Package};
use palettist::files::{TensorFile, write_safetensors};
use palettist::source::Model;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");
const XL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sdxl/model");
const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base");

fn palettist(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).output().unwrap()
}

/// Exit code, standard output, standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = palettist(arguments);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Exports; the packages and other paths that it names, and what it warned of.
fn export(model: &str, folder: &Path, more: &[&str]) -> (Vec<PathBuf>, String) {
    let (code, out, err) = run(&[&["export", model, "-o", folder.to_str().unwrap()], more].concat());
    assert_eq!(code, 0, "{out}{err}");
    (out.lines().map(PathBuf::from).collect(), err)
}

fn edit(path: &Path, changes: Value) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(path, json.to_string()).unwrap();
}

/// Changes the weights in a file.
fn change_weights(path: &Path, change: impl Fn(&mut BTreeMap<String, Tensor>)) {
    let mut tensors: BTreeMap<String, Tensor> = {
        let file = TensorFile::open(path).unwrap();
        file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect()
    };
    change(&mut tensors);
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_safetensors(path, tensors, None, &BTreeMap::new()).unwrap();
}

fn table<'a>(tensors: &'a mut BTreeMap<String, Tensor>, ending: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|(name, _)| name.ends_with(ending)).unwrap().1
}

/// A table with more rows.
fn lengthened(table: &Tensor, rows: i64) -> Tensor {
    let more = Tensor::ones([rows - table.size()[0], table.size()[1]], (table.kind(), Device::Cpu)) * 0.25;
    Tensor::cat(&[table, &more], 0)
}

/// Texts of the first encoder are filled up by Apple's Swift package with the end-of-text, and by this model with `!`.
#[test]
fn either_padding_is_answered_as_the_model_answers_its_own() {
    let folder = tempfile::tempdir().unwrap();
    for target in ["iOS16", "iOS18"] {
        let place = folder.path().join(target);
        let (packages, _) = export(MODEL, &place, &["--component", "text_encoder", "--min-deployment-target", target]);
        let (code, out, err) = run(&["verify", packages[0].to_str().unwrap(), "--against", MODEL, "--min-psnr", "60"]);
        assert_eq!(code, 0, "{out}{err}");
        for row in ["short text ", "padded as by Swift ", "long text "] {
            assert!(out.lines().any(|line| line.starts_with(row)), "{row}: {out}");
        }
    }
    // What pads as Swift does needs nothing.
    let (packages, _) = export(BASE, folder.path(), &["--component", "text_encoder"]);
    let (code, out, _) = run(&["verify", packages[0].to_str().unwrap(), "--against", BASE]);
    assert!(code == 0 && !out.contains("padded as by Swift"), "{out}");
}

/// Texts as long as the model's are in all packages, and `verify` knows them.
#[test]
fn packages_take_texts_as_long_as_the_models() {
    for (tokens, positions) in [(100, 100), (90, 100)] {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("long");
        copy_folder(Path::new(MODEL), &model);
        edit(&model.join("text_encoder/config.json"), json!({ "max_position_embeddings": positions }));
        edit(&model.join("tokenizer/tokenizer_config.json"), json!({ "model_max_length": tokens }));
        change_weights(&model.join("text_encoder/model.safetensors"), |tensors| {
            let table = table(tensors, "position_embedding.weight");
            *table = lengthened(table, positions);
        });
        let model = model.to_str().unwrap();
        let (packages, _) = export(model, &folder.path().join("out"), &["--component", "unet,text_encoder"]);
        let shape = |package: &Path, input: &str| {
            let package = Package::open(package).unwrap();
            package.inputs().iter().find(|feature| feature.name == input).unwrap().kind.shape.clone()
        };
        assert_eq!(shape(&packages[0], "encoder_hidden_states"), [2, 8, 1, tokens]);
        assert_eq!(shape(&packages[1], "input_ids"), [1, tokens]);
        let paths: Vec<&str> = packages.iter().map(|path| path.to_str().unwrap()).collect();
        let (code, out, err) = run(&[&["verify"], &paths[..], &["--against", model]].concat());
        assert_eq!(code, 0, "{out}{err}");
        assert!(out.contains("2 of 2 packages agree with the model"), "{out}");
    }
}

/// In the vocabulary, and said where no text reaches them in Apple's programs.
#[test]
fn added_tokens_are_in_the_bundle_or_told() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("inverted");
    copy_folder(Path::new(MODEL), &model);
    let first = Model::open(MODEL).unwrap().tokenizer().unwrap().vocabulary_size();
    let added = json!({ "<sks-dog>": first, "★": first + 1 });
    fs::write(model.join("tokenizer/added_tokens.json"), added.to_string()).unwrap();
    edit(&model.join("text_encoder/config.json"), json!({ "vocab_size": first + 2 }));
    change_weights(&model.join("text_encoder/model.safetensors"), |tensors| {
        let table = table(tensors, "token_embedding.weight");
        *table = lengthened(table, first + 2);
    });
    let out = folder.path().join("out");
    let flags = ["--bundle-resources-for-swift-cli", "--component", "text_encoder"];
    let (_, said) = export(model.to_str().unwrap(), &out, &flags);
    assert!(said.contains("never make the added tokens `<sks-dog>`, which vocab.json holds"), "{said}");
    let vocabulary: Value = serde_json::from_slice(&fs::read(out.join("Resources/vocab.json")).unwrap()).unwrap();
    assert_eq!(vocabulary["<sks-dog>"], first);
    assert_eq!((&vocabulary["★"], &vocabulary["★</w>"]), (&json!(first + 1), &json!(first + 1)));
}

#[test]
fn bundles_tell_what_apps_will_miss_and_cannot_use() {
    let bundle = |model: &str, more: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let flags = [&["--bundle-resources-for-swift-cli"], more].concat();
        let (said, warned) = export(model, folder.path(), &flags);
        let said: Vec<String> = said.iter().map(|line| line.display().to_string()).collect();
        (said.join("\n"), warned)
    };
    let (said, warned) = bundle(XL, &["--component", "unet", "--unet-support-controlnet", "--unet-batch-one"]);
    assert!(said.contains("TextEncoder, TextEncoder2, VAEDecoder are missing there"), "{said}");
    assert!(said.contains("add --component text_encoder,text_encoder_2,vae_decoder\n"), "{said}");
    assert!(said.contains("Unet is missing there") && said.contains("without --unet-support-controlnet"), "{said}");
    assert!(warned.contains("have no ControlNets for Stable Diffusion XL"), "{warned}");
    assert!(warned.contains("always call the UNet of Stable Diffusion XL with a batch of two"), "{warned}");
    let (said, warned) = bundle(XL, &[]);
    assert!(!said.contains("missing") && !warned.contains("warning"), "{said}{warned}");
    let (said, warned) = bundle(MODEL, &["--unet-support-controlnet"]);
    assert!(said.contains("which Apple's programs need for pictures without a ControlNet"), "{said}");
    assert!(said.contains("in Resources/controlnet") && !warned.contains("warning"), "{said}{warned}");
    let (said, warned) = bundle(MODEL, &["--component", "unet,text_encoder", "--unet-batch-one"]);
    assert!(said.contains("VAEDecoder is missing there") && said.contains("without VAEEncoder"), "{said}");
    assert!(!warned.contains("warning"), "{warned}");
}

/// One bad package stops none of the others.
#[test]
fn verify_goes_through_all_packages_and_asks_for_palettes() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--component", "text_encoder,vae_decoder", "--quantize-nbits", "text_encoder=4"];
    let (packages, _) = export(BASE, folder.path(), &flags);
    let [text, decoder] = [0, 1].map(|at: usize| packages[at].to_str().unwrap());
    let none = folder.path().join("none.mlpackage");
    let none = none.to_str().unwrap();
    let (code, out, err) = run(&["verify", text, none, decoder, "--against", BASE]);
    assert_eq!(code, 1);
    assert!(out.contains("1 of 3 packages agree with the model") && out.contains("random z"), "{out}");
    let lines: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(lines.len() == 2 && lines[1].contains("none.mlpackage"), "{err}");
    assert!(lines[0].contains("this package holds palettes: give --quantize-nbits text_encoder=4"), "{err}");
    let (code, out, err) = run(&["verify", text, decoder]);
    assert!(code == 0 && out.contains("2 of 2 packages are sound"), "{out}{err}");
    // The command line alone is wrong.
    let (code, _, err) = run(&["verify", text, "--against", BASE, "--quantize-nbits", "6"]);
    assert!(code == 2 && err.contains("its palettes have 4 bits, and --quantize-nbits says 6"), "{err}");
    let (code, out, err) = run(&["verify", text, decoder, "--against", BASE, "--quantize-nbits", "text_encoder=4"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, _, err) = run(&["verify", decoder, "--against", BASE, "--quantize-nbits", "4"]);
    assert!(code == 1 && err.contains("holds no palettes: it was exported without --palettes"), "{err}");
}

/// Of a checkpoint's palettes the package says nothing but that they are there.
#[test]
fn verify_asks_for_the_palettes_of_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let palettes = folder.path().join("x.palettes.safetensors");
    let palettes = palettes.to_str().unwrap();
    assert_eq!(run(&["palettize", MODEL, "-o", palettes, "--bits", "4"]).0, 0);
    let (packages, _) = export(MODEL, &folder.path().join("palettes"), &["--palettes", palettes]);
    let package = packages[0].to_str().unwrap();
    let (code, _, err) = run(&["verify", package, "--against", MODEL]);
    assert!(
        code == 2 && err.contains("this package holds palettes: give --palettes FILE or --quantize-nbits"),
        "{err}"
    );
    let (code, out, err) = run(&["verify", package, "--against", MODEL, "--palettes", palettes]);
    assert_eq!(code, 0, "{out}{err}");
    // And the other way round.
    let (packages, _) = export(MODEL, &folder.path().join("plain"), &[]);
    let (code, _, err) = run(&["verify", packages[0].to_str().unwrap(), "--against", MODEL, "--palettes", palettes]);
    assert!(code == 1 && err.contains("holds no palettes"), "{err}");
}

/// By what the packages say, since neither width nor names of inputs do.
#[test]
fn encoders_of_one_width_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("xl");
    copy_folder(Path::new(XL), &model);
    let (first, second) = (model.join("text_encoder"), model.join("text_encoder_2"));
    for file in ["config.json", "model.safetensors"] {
        fs::copy(first.join(file), second.join(file)).unwrap();
    }
    edit(
        &second.join("config.json"),
        json!({ "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 10 }),
    );
    // The UNet attends to both side by side.
    edit(&model.join("unet/config.json"), json!({ "cross_attention_dim": 16 }));
    change_weights(&model.join("unet/diffusion_pytorch_model.safetensors"), |tensors| {
        for (_, tensor) in tensors
            .iter_mut()
            .filter(|(name, _)| name.ends_with("attn2.to_k.weight") || name.ends_with("attn2.to_v.weight"))
        {
            *tensor = tensor.narrow(1, 0, 16).contiguous();
        }
    });
    change_weights(&second.join("model.safetensors"), |tensors| {
        for tensor in tensors.values_mut() {
            *tensor = (&*tensor * 0.75).to_kind(Kind::Half);
        }
        tensors.insert("text_projection.weight".into(), Tensor::ones([10, 8], (Kind::Half, Device::Cpu)));
    });
    let model = model.to_str().unwrap();
    let (packages, _) = export(model, folder.path(), &["--component", "text_encoder,text_encoder_2"]);
    let paths: Vec<&str> = packages.iter().map(|path| path.to_str().unwrap()).collect();
    let (code, out, err) = run(&[&["verify"], &paths[..], &["--against", model]].concat());
    assert!(code == 0 && out.contains("2 of 2 packages agree"), "{out}{err}");
    let (code, _, err) = run(&["verify", paths[0], "--against", MODEL]);
    assert!(code == 1 && err.contains("is a package of another model: its text encoder is one of"), "{err}");
}

/// What a package says of itself is not believed against its inputs.
#[test]
fn a_package_that_calls_itself_another_network_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (packages, _) = export(MODEL, folder.path(), &["--component", "vae_decoder"]);
    let path = packages[0].to_str().unwrap();
    let specification = packages[0].join("Data/com.apple.CoreML/model.mlmodel");
    let mut bytes = fs::read(&specification).unwrap();
    let [key, value] = ["palettist.component", "vae_decoder"].map(str::as_bytes);
    let key = bytes.windows(key.len()).position(|part| part == key).unwrap();
    let value = key + bytes[key..].windows(value.len()).position(|part| part == value).unwrap();
    bytes[value..][..11].copy_from_slice(b"vae_encoder");
    fs::write(&specification, bytes).unwrap();
    let (code, _, err) = run(&["verify", path, "--against", MODEL]);
    let expected = "holds the vae_decoder, and its metadata (palettist.component) says that it is the vae_encoder";
    assert!(code == 1 && err.contains(expected), "{err}");
}

/// Attention over 144×144 latents has more scores than 2^32.
#[test]
fn packages_of_large_pictures_are_sound() {
    let folder = tempfile::tempdir().unwrap();
    let config = small_unet(8, [8, 16], json!(8), false);
    let options = UnetOptions { height: 144, width: 144, ..UnetOptions::new(&config) };
    let path = export_unet(&config, &weights(&config), &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
    Package::open(&path).unwrap().check_values().unwrap();
}

/// Two models of one name, as two fine-tunes in folders of the same name are: their packages are not mixed in a bundle.
#[test]
fn two_models_of_one_name_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|place| folder.path().join(place).join("dog"));
    copy_folder(Path::new(MODEL), &first);
    copy_folder(Path::new(MODEL), &second);
    change_weights(&second.join("unet/diffusion_pytorch_model.safetensors"), |tensors| {
        let bias = tensors.get_mut("conv_out.bias").unwrap();
        *bias = &*bias + 0.5;
    });
    let [first, second] = [first, second].map(|path| path.to_str().unwrap().to_owned());
    let out = folder.path().join("out");
    let at = out.to_str().unwrap();
    let bundle = ["--bundle-resources-for-swift-cli", "--overwrite"];
    export(&first, &out, &["--component", "text_encoder,vae_decoder"]);
    let id = |part: &str| {
        let package = Package::open(&out.join(format!("Stable_Diffusion_version_dog_{part}.mlpackage"))).unwrap();
        package.metadata().user_defined["palettist.model_id"].clone()
    };
    assert_eq!(id("text_encoder"), id("vae_decoder"));
    // Without a bundle it is said, with one it is refused before anything is written.
    let said = "text_encoder.mlpackage is of another model of this name: its weights are not those of";
    let arguments = ["export", second.as_str(), "-o", at, "--component", "unet"];
    let (code, out_text, err) = run(&[&arguments[..], &bundle].concat());
    assert!(code == 2 && err.contains(said) && err.contains("--component all --overwrite"), "{out_text}{err}");
    assert!(!out.join("Resources").exists() && !out.join("Stable_Diffusion_version_dog_unet.mlpackage").exists());
    let (_, warned) = export(&second, &out, &["--component", "unet"]);
    assert!(warned.contains(&format!("warning: {at}/Stable_Diffusion_version_dog_{said}")), "{warned}");
    assert_ne!(id("unet"), id("text_encoder"));
    // All of one model.
    export(&second, &out, &[&["--component", "all"][..], &bundle].concat());
    assert_eq!(id("unet"), id("text_encoder"));
    // What was compiled of another model, of which no package is there any more.
    fs::remove_dir_all(out.join("Stable_Diffusion_version_dog_text_encoder.mlpackage")).unwrap();
    let compiled = out.join("Resources/TextEncoder.mlmodelc");
    fs::create_dir_all(&compiled).unwrap();
    let about = |id: &str| json!([{"userDefinedMetadata": {"palettist.model_id": id}}]).to_string();
    fs::write(compiled.join("metadata.json"), about("another")).unwrap();
    let (code, _, err) = run(&[&arguments[..], &bundle].concat());
    assert!(code == 2 && err.contains("TextEncoder.mlmodelc is of another model of this name"), "{err}");
    fs::write(compiled.join("metadata.json"), about(&id("unet"))).unwrap();
    let (code, _, err) = run(&[&arguments[..], &bundle].concat());
    assert_eq!(code, 0, "{err}");
    // An autoencoder in place of the model's own makes no other model of it.
    export(&second, &out, &["--component", "vae_decoder", "--vae", &first, "--overwrite"]);
    assert_eq!(id("vae_decoder"), id("unet"));
    // But the two halves of an autoencoder must be one's.
    let other = folder.path().join("other");
    copy_folder(&Path::new(&first).join("vae"), &other);
    change_weights(&other.join("diffusion_pytorch_model.safetensors"), |tensors| {
        let bias = tensors.get_mut("decoder.conv_out.bias").unwrap();
        *bias = &*bias + 0.5;
    });
    let with = ["--vae", other.to_str().unwrap()];
    export(&second, &out, &[&["--component", "vae_encoder,vae_decoder", "--overwrite"][..], &with].concat());
    let halves = ["export", second.as_str(), "-o", at, "--component", "vae_encoder"];
    let (code, _, err) = run(&[&halves[..], &bundle].concat());
    assert!(code == 2 && err.contains("vae_decoder.mlpackage is of another model of this name"), "{err}");
    let (code, _, err) = run(&[&halves[..], &bundle, &with].concat());
    assert_eq!(code, 0, "{err}");
    // Neither half is written: what is there stays one's.
    let (code, _, err) = run(&[&arguments[..], &bundle].concat());
    assert_eq!(code, 0, "{err}");
}

#[test]
fn packages_are_not_written_into_the_model_nor_without_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(Path::new(MODEL), &model);
    for place in [model.clone(), model.join("unet")] {
        let (code, _, err) = run(&["export", model.to_str().unwrap(), "-o", place.to_str().unwrap()]);
        assert!(code == 2 && err.contains("is the model's own folder"), "{err}");
    }
    let out = folder.path().join("out");
    let (code, _, err) = run(&["export", MODEL, "-o", out.to_str().unwrap(), "--model-version", ""]);
    assert!(code == 2 && err.contains("--model-version is empty") && !out.exists(), "{err}");
}

/// Killed at any time, an export that replaces packages leaves the old or the new ones whole, and the next run nothing else.
#[test]
#[cfg(unix)]
fn a_killed_export_loses_no_package() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let flags = ["export", MODEL, "-o", place, "--component", "unet,text_encoder"];
    let hidden = || {
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.as_encoded_bytes().starts_with(b".")).count()
    };
    for chunked in [false, true] {
        let more: &[&str] = if chunked { &["--chunk-unet"] } else { &[] };
        let (code, out, err) = run(&[&flags[..], &["--overwrite"], more].concat());
        assert_eq!(code, 0, "{out}{err}");
        let packages: Vec<PathBuf> = out.lines().map(PathBuf::from).collect();
        for round in 0..12u64 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
            command.args(flags).arg("--overwrite").args(more).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(37 * round));
            child.kill().unwrap();
            child.wait().unwrap();
            if !chunked && cfg!(target_os = "linux") {
                packages.iter().for_each(|path| drop(Package::open(path).unwrap()));
            }
            // The next run finds them as they are, and finishes what was begun.
            let (code, _, err) = run(&[&flags[..], more].concat());
            assert!(code == 2 && err.contains("exists already"), "round {round}: {err}");
            packages.iter().for_each(|path| drop(Chain::open(path).unwrap()));
        }
        let (code, _, err) = run(&[&flags[..], &["--overwrite"], more].concat());
        assert_eq!((code, hidden()), (0, 0), "{err}");
    }
}
