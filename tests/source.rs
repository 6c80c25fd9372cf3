//! Models on disk: folders as diffusers and transformers wrote them over the years, and damaged ones.
//! The fixtures are made by `tests/oracle/networks.py`.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::copy_folder;
use common::shared;
use palettist::files::{TensorFile, write_safetensors};
use palettist::networks::autoencoder::decode;
use palettist::networks::text_encoder::text_encoder;
use palettist::networks::unet::unet;
use palettist::ops::{Tensors, Weights};
use palettist::source::{Component, Model, Tokenizer, copy_model};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/networks")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A copy of the tiny pipeline, to be changed.
fn pipeline() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(&fixtures().join("pipeline"), &model);
    (folder, model)
}

fn open(folder: &Path) -> Model {
    Model::open(folder.to_str().unwrap()).unwrap()
}

/// Writes weights under other names, shapes and types.
fn rewrite(path: &Path, weights: &Weights, kind: Option<Kind>, rename: impl Fn(&str) -> String) {
    let renamed: Vec<(String, &Tensor)> = weights.iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    let list = renamed.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    write_safetensors(path, list, kind, &BTreeMap::new()).unwrap();
}

fn assert_same(a: &Weights, b: &Weights) {
    assert_eq!(a.len(), b.len());
    for (name, tensor) in a {
        assert!(b[name].kind() == tensor.kind() && b[name].equal(tensor), "{name}");
    }
}

/// One line that names what it is about.
fn assert_says<T>(result: anyhow::Result<T>, words: &[&str]) {
    let message = format!("{:#}", result.map(drop).expect_err("it should be refused"));
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn a_folder_of_todays_diffusers_computes_what_diffusers_does() {
    let _guard = tch::no_grad_guard();
    let model = open(&fixtures().join("pipeline"));
    let expected = TensorFile::open(&fixtures().join("pipeline.safetensors")).unwrap();
    let close = |name: &str, tensor: Tensor| {
        let expected = expected.tensor(name).unwrap();
        let error = f64::try_from((tensor - &expected).norm() / expected.norm()).unwrap();
        assert!(error <= 1e-5, "{name}: {error:e}");
    };
    let text = model.weights(Component::TextEncoder, Kind::Float, CPU).unwrap();
    let ids = model.tokenizer().unwrap().encode("a red cat, a dog!");
    let ids = Tensor::from_slice(&ids).unsqueeze(0);
    let context = text_encoder(&mut Tensors::new(&text), &model.text_encoder_config().unwrap(), &ids).last_hidden_state;
    close("context", context);

    let sample = expected.tensor("sample").unwrap();
    let weights = model.weights(Component::Unet, Kind::Float, CPU).unwrap();
    let context = expected.tensor("context").unwrap();
    let timestep = Tensor::from_slice(&[481i64]);
    close("noise", unet(&mut Tensors::new(&weights), &model.unet_config().unwrap(), &sample, &timestep, &context));
    let weights = model.weights(Component::Autoencoder, Kind::Float, CPU).unwrap();
    close("image", decode(&mut Tensors::new(&weights), &model.autoencoder_config().unwrap(), &sample));
    assert_eq!(model.scheduler_config().unwrap()["_class_name"], "DDIMScheduler");
}

#[test]
fn every_type_and_every_old_name_gives_the_same_weights() {
    let (_folder, path) = pipeline();
    let model = open(&path);
    let whole: Vec<Weights> = model.components().map(|c| model.weights(c, Kind::Half, CPU).unwrap()).collect();
    assert_eq!(whole[0]["conv_in.weight"].kind(), Kind::Half);

    // Text encoder: the prefix of transformers before 5, and its buffer.
    let file = path.join("text_encoder/model.safetensors");
    let mut old = Weights::new();
    for (name, tensor) in &whole[1] {
        assert!(name.starts_with("text_model."));
        old.insert(name.clone(), tensor.to_kind(Kind::Float));
    }
    old.insert("text_model.embeddings.position_ids".into(), Tensor::arange(77, (Kind::Int64, CPU)).view([1, 77]));
    rewrite(&file, &old, None, str::to_owned);
    assert_same(&model.weights(Component::TextEncoder, Kind::Half, CPU).unwrap(), &whole[1]);
    rewrite(&file, &old, None, |name| name.trim_start_matches("text_model.").to_owned());
    assert_same(&model.weights(Component::TextEncoder, Kind::Half, CPU).unwrap(), &whole[1]);

    // Autoencoder: old attention names, and its layers as 1×1 convolutions.
    let file = path.join("vae/diffusion_pytorch_model.safetensors");
    let attention = |name: &str| {
        let pairs = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
        pairs.iter().fold(name.to_owned(), |name, (today, old)| name.replace(today, old))
    };
    rewrite(&file, &whole[2], None, attention);
    assert!(TensorFile::open(&file).unwrap().names().iter().any(|n| n.ends_with("proj_attn.weight")));
    assert_same(&model.weights(Component::Autoencoder, Kind::Half, CPU).unwrap(), &whole[2]);
    let convolutions: Weights = whole[2]
        .iter()
        .map(|(name, tensor)| {
            let attention = name.contains("attentions") && tensor.dim() == 2;
            (name.clone(), if attention { tensor.view([tensor.size()[0], -1, 1, 1]) } else { tensor.shallow_clone() })
        })
        .collect();
    rewrite(&file, &convolutions, None, attention);
    assert_same(&model.weights(Component::Autoencoder, Kind::Half, CPU).unwrap(), &whole[2]);

    // UNet: fp32, bf16, and a file of mixed types.
    let file = path.join("unet/diffusion_pytorch_model.safetensors");
    rewrite(&file, &whole[0], Some(Kind::Float), str::to_owned);
    assert_same(&model.weights(Component::Unet, Kind::Half, CPU).unwrap(), &whole[0]);
    let kinds = [Kind::Float, Kind::Half, Kind::Double];
    let mixed = whole[0].iter().zip(kinds.iter().cycle()).map(|((n, t), &k)| (n.clone(), t.to_kind(k))).collect();
    rewrite(&file, &mixed, None, str::to_owned);
    assert_same(&model.weights(Component::Unet, Kind::Half, CPU).unwrap(), &whole[0]);
    rewrite(&file, &whole[0], Some(Kind::BFloat16), str::to_owned);
    let brain = whole[0].iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::BFloat16))).collect();
    assert_same(&model.weights(Component::Unet, Kind::BFloat16, CPU).unwrap(), &brain);
}

#[test]
fn every_file_name_is_found_and_full_precision_comes_first() {
    let (_folder, path) = pipeline();
    let (model, unet) = (open(&path), path.join("unet"));
    let whole = model.weights(Component::Unet, Kind::Half, CPU).unwrap();
    let plain = unet.join("diffusion_pytorch_model.safetensors");
    for name in ["diffusion_pytorch_model.fp16.safetensors", "model.safetensors", "model.fp16.safetensors"] {
        fs::rename(&plain, unet.join(name)).unwrap();
        assert_same(&model.weights(Component::Unet, Kind::Half, CPU).unwrap(), &whole);
        fs::rename(unet.join(name), &plain).unwrap();
    }
    // Half precision beside full: the latter is read.
    let zeros = whole.iter().map(|(name, tensor)| (name.clone(), tensor.zeros_like())).collect();
    rewrite(&unet.join("diffusion_pytorch_model.fp16.safetensors"), &zeros, None, str::to_owned);
    rewrite(&unet.join("diffusion_pytorch_model.non_ema.safetensors"), &zeros, None, str::to_owned);
    assert_same(&model.weights(Component::Unet, Kind::Half, CPU).unwrap(), &whole);

    for (index, shard) in [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000N-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model.fp16-0000N-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model-0000N-of-00002.fp16.safetensors",
        ),
    ] {
        let sharded = path.join("unet");
        fs::remove_dir_all(&sharded).unwrap();
        fs::create_dir(&sharded).unwrap();
        fs::copy(fixtures().join("pipeline/unet/config.json"), sharded.join("config.json")).unwrap();
        let mut map = serde_json::Map::new();
        for part in ["1", "2"] {
            let file = shard.replace('N', part);
            let half = |name: &str| (name < "m") == (part == "1");
            let weights: Weights =
                whole.iter().filter(|(name, _)| half(name)).map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            assert!(!weights.is_empty());
            rewrite(&sharded.join(&file), &weights, None, str::to_owned);
            map.extend(weights.keys().map(|name| (name.clone(), json!(file))));
        }
        fs::write(sharded.join(index), json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
        assert_same(&model.weights(Component::Unet, Kind::Half, CPU).unwrap(), &whole);

        fs::remove_file(sharded.join(shard.replace('N', "2"))).unwrap();
        assert_says(model.weights(Component::Unet, Kind::Half, CPU), &["2-of-00002", "is missing", index]);
        fs::write(sharded.join(index), json!({ "weight_map": { "x": "../secret.safetensors" } }).to_string()).unwrap();
        assert_says(model.check(Component::Unet), &["../secret.safetensors", "not a shard"]);
    }
}

#[test]
fn damaged_and_foreign_weights_are_refused() {
    let (_folder, path) = pipeline();
    let model = open(&path);
    let file = path.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let weights = || model.weights(Component::Unet, Kind::Float, CPU);
    let whole = weights().unwrap();
    let changed = |change: &dyn Fn(&mut Weights)| {
        let mut copy: Weights = whole.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        change(&mut copy);
        rewrite(&file, &copy, None, str::to_owned);
    };
    let name = "diffusion_pytorch_model.safetensors";

    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    assert_says(weights(), &[name, "promises", "fetch it again"]);
    fs::write(&file, &bytes[..100]).unwrap();
    assert_says(weights(), &[name, "longer than the file"]);
    fs::write(&file, b"").unwrap();
    assert_says(weights(), &[name, "0 bytes"]);

    let lost = "mid_block.resnets.0.conv1.weight";
    changed(&|weights| drop(weights.remove(lost)));
    assert_says(weights(), &[name, lost, "missing"]);
    changed(&|weights| drop(weights.insert("lora.up.weight".into(), Tensor::ones([2], (Kind::Float, CPU)))));
    assert_says(weights(), &[name, "lora.up.weight", "does not have"]);
    changed(&|weights| drop(weights.insert(lost.into(), Tensor::ones([2, 3], (Kind::Float, CPU)))));
    assert_says(weights(), &[name, lost, "[2, 3]", "[16, 16, 3, 3]"]);
    changed(&|weights| {
        let quantized = weights[lost].to_kind(Kind::Int8);
        weights.insert(lost.into(), quantized);
    });
    assert_says(weights(), &[name, lost, "Int8", "not supported"]);

    fs::rename(&file, path.join("unet/diffusion_pytorch_model.bin")).unwrap();
    assert_says(weights(), &["diffusion_pytorch_model.bin", "pickle", "save_pretrained"]);
    fs::remove_file(path.join("unet/diffusion_pytorch_model.bin")).unwrap();
    assert_says(weights(), &["holds no weights", name]);

    // Both the old and today's name of one tensor.
    let vae = model.weights(Component::Autoencoder, Kind::Float, CPU).unwrap();
    let query = "encoder.mid_block.attentions.0.to_q.bias";
    let mut twice: Weights = vae.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    twice.insert(query.replace("to_q", "query"), vae[query].shallow_clone());
    rewrite(&path.join("vae").join(name), &twice, None, str::to_owned);
    assert_says(model.check(Component::Autoencoder), &["twice", "query.bias"]);
}

#[test]
fn what_is_not_a_model_folder_is_told_what_is() {
    let (folder, path) = pipeline();
    let at = |path: &Path| Model::open(path.to_str().unwrap());
    assert_says(at(&path.join("nowhere")), &["nowhere", "does not exist", "diffusers folder"]);
    assert_says(at(&path.join("unet")), &["not a diffusers folder", "folder above"]);
    assert_says(
        at(&path.join("unet/config.json")),
        &["a single-file checkpoint (.safetensors) is expected", "a JSON document"],
    );
    assert_says(Model::open("nobody/no-such-model-here"), &["nobody/no-such-model-here", "cache", "hf download"]);

    let mut config = read(&path.join("unet/config.json"));
    config["class_embed_type"] = json!("projection");
    fs::write(path.join("unet/config.json"), config.to_string()).unwrap();
    assert_says(open(&path).unet_config(), &["unet/config.json", "`class_embed_type`: \"projection\""]);
    fs::write(path.join("unet/config.json"), "{\"sample_size\": ").unwrap();
    assert_says(open(&path).unet_config(), &["unet/config.json", "not JSON", "line 1"]);
    fs::remove_dir_all(path.join("vae")).unwrap();
    assert_says(open(&path).autoencoder_config(), &["autoencoder", "vae", "missing"]);

    let mut index = read(&path.join("model_index.json"));
    index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
    index["_class_name"] = json!("StableDiffusionXLPipeline");
    fs::write(path.join("model_index.json"), index.to_string()).unwrap();
    let second = open(&path).text_encoder_config_of(Component::TextEncoder2);
    assert_says(second, &["second text encoder", "text_encoder_2", "missing"]);
    index["text_encoder"] = json!([null, null]);
    fs::write(path.join("model_index.json"), index.to_string()).unwrap();
    assert_says(at(&path), &["StableDiffusionXLPipeline", "refiner"]);
    drop(folder);
}

/// Packages are named after it.
#[test]
fn a_folder_by_a_path_without_a_name_is_called_by_its_own() {
    let (_folder, model) = pipeline();
    for path in [model.clone(), model.join("."), model.join("unet/..")] {
        assert_eq!(open(&path).name(), "model", "{}", path.display());
    }
}

#[test]
fn a_copied_model_has_the_new_weights_and_the_rest() {
    let (folder, path) = pipeline();
    let model = open(&path);
    let mut weights = model.weights(Component::Unet, Kind::Float, CPU).unwrap();
    let doubled = &weights["conv_in.weight"] * 2;
    weights.insert("conv_in.weight".into(), doubled);
    let to = folder.path().join("copy");
    copy_model(&model, &to, &[(Component::Unet, &weights)], Kind::Half).unwrap();
    let copy = open(&to);
    for component in model.components() {
        let expected = match component {
            Component::Unet => weights.iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::Half))).collect(),
            other => model.weights(other, Kind::Half, CPU).unwrap(),
        };
        assert_same(&copy.weights(component, Kind::Half, CPU).unwrap(), &expected);
    }
    let text = "a red cat";
    assert_eq!(copy.tokenizer().unwrap().encode(text), model.tokenizer().unwrap().encode(text));
    assert_eq!(copy.scheduler_config().unwrap(), model.scheduler_config().unwrap());
    let full = folder.path().join("full");
    copy_model(&model, &full, &[], Kind::Float).unwrap();
    // What transformers and diffusers load side by side is of one type, fp16 files or not.
    assert_eq!(read(&to.join("text_encoder/config.json"))["dtype"], "float32");
    assert_eq!(read(&full.join("text_encoder/config.json"))["dtype"], "float32");
    let unet = model.weights(Component::Unet, Kind::Float, CPU).unwrap();
    assert_same(&open(&full).weights(Component::Unet, Kind::Float, CPU).unwrap(), &unet);
    assert_says(copy_model(&model, &to, &[], Kind::Half), &["exists already"]);

    // A source that breaks off in the middle leaves nothing.
    fs::remove_dir_all(path.join("scheduler")).unwrap();
    let broken = folder.path().join("broken");
    assert_says(copy_model(&model, &broken, &[], Kind::Half), &["scheduler"]);
    let names = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 3, "only the model and its two copies are there");
}

fn integers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()
}

#[test]
fn small_vocabularies_give_transformers_ids_in_every_form() {
    let texts = read(&fixtures().join("texts.json"));
    let saved_today = Tokenizer::open(&fixtures().join("pipeline/tokenizer")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let vocabulary = folder.path().join("tokenizer");
    copy_folder(&fixtures().join("vocabulary"), &vocabulary);
    let saved_before = Tokenizer::open(&vocabulary).unwrap();
    fs::remove_file(vocabulary.join("special_tokens_map.json")).unwrap();
    let padded_with_end = Tokenizer::open(&vocabulary).unwrap();
    for case in texts.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(saved_today.encode(text), integers(&case["ids"]), "{text}");
        assert_eq!(saved_before.encode(text), integers(&case["ids"]), "{text}");
        assert_eq!(padded_with_end.encode(text), integers(&case["ids_padded_with_end"]), "{text}");
    }
}

/// Textual inversions. The ids are those of CLIPTokenizerFast (transformers 4.57; the only one of transformers 5) for this
/// vocabulary with these two lines in added_tokens.json.
#[test]
fn added_tokens_have_their_ids_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer");
    copy_folder(&fixtures().join("vocabulary"), &path);
    let check = |what: &str| {
        let tokenizer = Tokenizer::open(&path).unwrap();
        for (text, ids) in [
            ("a <cat-toy>, a red cat", &[196, 158, 198, 105, 158, 191, 189, 197][..]),
            ("MyToken mytoken a<cat-toy>a", &[196, 199, 199, 158, 198, 158, 197]),
            ("<cat-toy><cat-toy>", &[196, 198, 198, 197]),
        ] {
            assert_eq!(tokenizer.encode(text)[..ids.len()], *ids, "{what}: {text}");
        }
        assert_eq!(tokenizer.vocabulary_size(), 200, "{what}");
    };
    let added = path.join("added_tokens.json");
    fs::write(&added, r#"{"<cat-toy>": 198, "MyToken": 199}"#).unwrap();
    check("added_tokens.json");
    fs::remove_file(&added).unwrap();
    let token = |content: &str| json!({"content": content, "normalized": true, "special": false});
    let config = json!({"model_max_length": 77, "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {"198": token("<cat-toy>"), "199": token("MyToken")}});
    fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    check("added_tokens_decoder");
}

#[test]
fn texts_are_as_long_as_the_files_say() {
    let (_folder, path) = pipeline();
    let edit = |name: &str, key: &str, value: Value| {
        let mut config = read(&path.join(name));
        config[key] = value;
        fs::write(path.join(name), config.to_string()).unwrap();
    };
    let length = || open(&path).tokenizer().unwrap().length();
    assert_eq!(length(), 77);
    // LongCLIP; with a tokenizer that says so, and with one that does not say (transformers' "unknown").
    edit("text_encoder/config.json", "max_position_embeddings", json!(248));
    edit("tokenizer/tokenizer_config.json", "model_max_length", json!(248));
    assert_eq!(length(), 248);
    edit("tokenizer/tokenizer_config.json", "model_max_length", json!(1e30));
    assert_eq!(length(), 248);
    edit("tokenizer/tokenizer_config.json", "model_max_length", json!(77));
    assert_eq!(length(), 77);
    edit("tokenizer/tokenizer_config.json", "model_max_length", json!(249));
    assert_says(open(&path).tokenizer(), &["249", "248", "max_position_embeddings"]);
}

#[test]
fn damaged_tokenizers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert_says(Tokenizer::open(folder.path()), &["no tokenizer", "vocab.json"]);
    let path = folder.path().join("tokenizer");
    copy_folder(&fixtures().join("vocabulary"), &path);
    let merges = fs::read_to_string(path.join("merges.txt")).unwrap();
    fs::write(path.join("merges.txt"), format!("{merges}three word line\n")).unwrap();
    assert_says(Tokenizer::open(&path), &["merges.txt, line 10", "three word line"]);
    fs::write(path.join("merges.txt"), format!("{merges}x y\n")).unwrap();
    assert_says(Tokenizer::open(&path), &["xy", "vocabulary"]);
    fs::write(path.join("merges.txt"), &merges).unwrap();
    let mut vocabulary = read(&path.join("vocab.json"));
    vocabulary.as_object_mut().unwrap().remove("<|endoftext|>");
    fs::write(path.join("vocab.json"), vocabulary.to_string()).unwrap();
    assert_says(Tokenizer::open(&path), &["<|endoftext|>"]);
    fs::write(path.join("tokenizer.json"), r#"{"model": {"type": "Unigram"}}"#).unwrap();
    assert_says(Tokenizer::open(&path), &["tokenizer.json", "Unigram"]);

    // More tokens than the text encoder has rows.
    let (_folder, path) = pipeline();
    let mut config = read(&path.join("text_encoder/config.json"));
    config["vocab_size"] = json!(50);
    fs::write(path.join("text_encoder/config.json"), config.to_string()).unwrap();
    assert_says(open(&path).tokenizer(), &["198 tokens", "50", "vocab_size"]);
}

#[test]
fn clips_own_vocabulary_gives_the_golden_ids() {
    let (Some(clip), Some(configs)) = (shared("clip_tokenizer"), shared("sd_configs")) else { return };
    let tokenizer = |model: &str| {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&configs.join(model).join("tokenizer"), folder.path());
        for name in ["vocab.json", "merges.txt"] {
            fs::copy(clip.join(name), folder.path().join(name)).unwrap();
        }
        Tokenizer::open(folder.path()).unwrap()
    };
    let (first, second) = (tokenizer("sd15"), tokenizer("sd21-base"));
    assert_eq!(first.vocabulary_size(), 49408);
    let golden = read(&clip.join("golden_transformers.json"));
    let openai = read(&clip.join("golden_openai.json"));
    let mut differing = Vec::new();
    for (case, other) in golden.as_array().unwrap().iter().zip(openai.as_array().unwrap()) {
        let text = case["text"].as_str().unwrap();
        let (ids, bare) = (first.encode(text), integers(&case["ids"]));
        assert_eq!(ids, integers(&case["ids77"]), "{text}");
        // SD 2 pads with "!", which transformers then also reads as a special token of its own in texts.
        if !text.contains('!') && bare.len() <= 77 {
            let mut padded = bare.clone();
            padded.resize(77, 0);
            assert_eq!(second.encode(text), padded, "{text}");
        }
        // Where OpenAI's tokenizer agrees with transformers', so do we with both.
        let mut openai = integers(&other["ids"]);
        if openai.len() <= 77 {
            openai.resize(77, 49407);
            if openai != ids {
                differing.push(text.to_owned());
            }
        }
    }
    // ftfy's repairs and HTML entities, as the golden files' own notes list them.
    assert_eq!(differing.len(), 4, "{differing:?}");
    // transformers 5.23 with SD 2.1's tokenizer files.
    let ids = second.encode("wow!!! yes");
    assert_eq!(ids[..8], [49406, 2781, 0, 0, 0, 1958, 49407, 0]);
    let ids = second.encode("<|ENDOFTEXT|> hi <|endoftext|>");
    assert_eq!(ids[..6], [49406, 49407, 1883, 49407, 49407, 0]);
}
