//! LoRAs merged into models: what the tools that write them merge (`tests/oracle/lora.py`), the spellings of one adapter,
//! mistakes, and runs of the program.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::runs::{ROOT, config, ends, run, succeed};
use common::shared;
use palettist::files::{TensorFile, write_safetensors};
use palettist::ops::Weights;
use palettist::source::lora::LoraChoice;
use palettist::source::{Component, Model, ModelOptions, copy_model, identity, model_id};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/fixtures").join(name)
}

fn model_path(name: &str) -> String {
    fixture(name).join("model").to_str().unwrap().to_owned()
}

fn choice(path: &Path, weight: f64) -> LoraChoice {
    LoraChoice { path: path.to_str().unwrap().to_owned(), weight, te_weight: None }
}

fn open(model: &str, loras: Vec<LoraChoice>) -> anyhow::Result<Model> {
    Model::open_with(model, &ModelOptions { loras, ..ModelOptions::default() })
}

fn weights(model: &Model) -> BTreeMap<Component, Weights> {
    let parts = std::iter::once(Component::Unet).chain(model.text_encoders());
    parts.map(|component| (component, model.weights(component, Kind::Float, Device::Cpu).unwrap())).collect()
}

/// The largest difference, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[])
}

/// Every parameter is what the tool of the layout makes of it, or is the model's own.
#[test]
fn merges_are_those_of_the_tools_that_write_such_files() {
    let cases: Value = serde_json::from_slice(&fs::read(fixture("lora/cases.json")).unwrap()).unwrap();
    let expected = TensorFile::open(&fixture("lora/expected.safetensors")).unwrap();
    let names = expected.names();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let path = model_path(case["model"].as_str().unwrap());
        let lora = choice(&fixture("lora").join(case["path"].as_str().unwrap()), case["weight"].as_f64().unwrap());
        let model = open(&path, vec![lora]).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let own = weights(&Model::open(&path).unwrap());
        let mut compared = 0;
        for (component, merged) in weights(&model) {
            for (parameter, value) in merged {
                let key = format!("{name}|{}|{parameter}", component.folder());
                if names.contains(&key) {
                    let error = difference(&value, &expected.tensor(&key).unwrap());
                    assert!(error < 1e-6, "{key}: {error}");
                    assert!(!value.equal(&own[&component][&parameter]), "{key}");
                    compared += 1;
                } else {
                    assert!(value.equal(&own[&component][&parameter]), "{key} is changed");
                }
            }
        }
        let of_case = names.iter().filter(|key| key.starts_with(&format!("{name}|"))).count();
        assert!(compared == of_case && compared > 0, "{name}: {compared} of {of_case}");
    }
}

/// A Stable Diffusion 1.5 as far as a LoRA sees it: all layers of its UNet and text encoder, zeros in a sparse file.
fn sd15(folder: &Path) -> String {
    use std::io::{Seek, SeekFrom, Write};
    let parts = [
        ("unet", "diffusion_pytorch_model.safetensors", palettist_configs::UNET),
        ("text_encoder", "model.safetensors", palettist_configs::TEXT),
    ];
    for (part, file, config) in parts {
        let to = folder.join(part);
        fs::create_dir_all(&to).unwrap();
        fs::write(to.join("config.json"), config).unwrap();
        let config: Value = serde_json::from_str(config).unwrap();
        let parameters = match part {
            "unet" => palettist::networks::unet::UnetConfig::from_json(&config).unwrap().parameters(),
            _ => palettist::networks::text_encoder::TextEncoderConfig::from_json(&config).unwrap().parameters(),
        };
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for parameter in parameters {
            let bytes = 2 * parameter.shape.iter().product::<i64>();
            let entry = serde_json::json!({
                "dtype": "F16", "shape": parameter.shape, "data_offsets": [end, end + bytes]
            });
            header.insert(parameter.name, entry);
            end += bytes;
        }
        let mut header = serde_json::to_vec(&header).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = fs::File::create(to.join(file)).unwrap();
        out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        out.write_all(&header).unwrap();
        // Zeros take no room in a file with holes.
        out.seek(SeekFrom::Current(end - 1)).unwrap();
        out.write_all(&[0]).unwrap();
    }
    folder.to_str().unwrap().to_owned()
}

/// Of Stable Diffusion 1.5, as diffusers has them.
mod palettist_configs {
    pub const UNET: &str = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 64, "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
    pub const TEXT: &str = r#"{"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "layer_norm_eps": 1e-5}"#;
}

/// One adapter as kohya, PEFT and cloneofsimo write it, for Stable Diffusion 1.5 at its real sizes.
#[test]
fn three_spellings_of_one_adapter_merge_to_the_same_bytes() {
    let Some(loras) = shared("loras") else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = sd15(folder.path());
    let of = |spelling: &str| {
        let lora = choice(&loras.join(format!("analog_svd_rank4.{spelling}.safetensors")), 0.8);
        let model = open(&base, vec![lora]).unwrap();
        let layers = model.loras()[0].to_string();
        assert!(layers.contains("144 layers of the UNet, 48 layers of the text encoder"), "{layers}");
        (model_id(&model), model)
    };
    let spellings = ["kohya", "peft", "cloneofsimo"].map(of);
    assert!(spellings.iter().all(|(id, _)| *id == spellings[0].0), "one model, whoever spells the LoRA");
    for component in [Component::Unet, Component::TextEncoder] {
        let stored = spellings.each_ref().map(|(_, model)| model.stored(component).unwrap());
        let mut changed = 0;
        for name in stored[0].names() {
            let [kohya, others @ ..] = stored.each_ref().map(|s| s.tensor(name, Kind::Float, Device::Cpu).unwrap());
            assert!(others.iter().all(|other| other.equal(&kohya)), "{name}");
            changed += usize::from(kohya.count_nonzero(None).int64_value(&[]) > 0);
        }
        assert_eq!(changed, if component == Component::Unet { 144 } else { 48 });
    }
    // Against the formula, in float64.
    let file = TensorFile::open(&loras.join("analog_svd_rank4.peft.safetensors")).unwrap();
    let layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v";
    let factor = |part: &str| file.tensor(&format!("unet.{layer}.{part}.weight")).unwrap().to_kind(Kind::Double);
    let expected = (factor("lora_B").matmul(&factor("lora_A")) * 0.8).to_kind(Kind::Float);
    let stored = spellings[0].1.stored(Component::Unet).unwrap();
    let merged = stored.tensor(&format!("{layer}.weight"), Kind::Float, Device::Cpu).unwrap();
    assert!(difference(&merged, &expected) < 1e-6);
    let refused = open(&base, vec![choice(&loras.join("lora_illust.pt"), 1.0)]).map(drop).unwrap_err().to_string();
    assert!(refused.contains("lora_illust.pt is a PyTorch pickle") && refused.contains("save_file"), "{refused}");
}

/// What a file of these tensors on top of `kohya.safetensors` is refused for.
struct Broken {
    folder: tempfile::TempDir,
    tensors: Weights,
}

impl Broken {
    fn new() -> Self {
        let file = TensorFile::open(&fixture("lora/kohya.safetensors")).unwrap();
        let tensors = file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect();
        Self { folder: tempfile::tempdir().unwrap(), tensors }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("broken.safetensors")
    }

    fn write(&self, change: impl FnOnce(&mut Weights)) {
        let mut tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&self.path(), tensors, None, &BTreeMap::new()).unwrap();
    }

    fn says(&self, expected: &[&str], change: impl FnOnce(&mut Weights)) {
        self.write(change);
        let error = open(&model_path("pipeline"), vec![choice(&self.path(), 1.0)]).map(drop).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("broken.safetensors") && !error.contains('\n'), "{error}");
        expected.iter().for_each(|text| assert!(error.contains(text), "{text}: {error}"));
    }
}

const LAYER: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";

#[test]
fn no_tensor_is_left_out_without_a_word() {
    let broken = Broken::new();
    let float = (Kind::Float, Device::Cpu);
    let up = format!("{LAYER}.lora_up.weight");
    let put = |name: &str, tensor: Tensor| {
        let name = name.to_owned();
        move |tensors: &mut Weights| drop(tensors.insert(name, tensor))
    };
    broken.says(&[&up, "missing"], |tensors| drop(tensors.remove(&format!("{LAYER}.lora_down.weight"))));
    broken.says(&["stands alone", "alpha"], |tensors| {
        tensors.retain(|name, _| !name.starts_with(LAYER) || name.ends_with("alpha"));
    });
    broken.says(&[&up, "[16, 2]", "[8, 8]"], put(&up, Tensor::ones([16, 2], float)));
    broken.says(&[&up, "cannot be multiplied"], put(&up, Tensor::ones([8, 3], float)));
    broken.says(&[&up, "not finite"], put(&up, Tensor::full([8, 2], f64::NAN, float)));
    broken.says(&[&up, "Int64"], put(&up, Tensor::ones([8, 2], (Kind::Int64, Device::Cpu))));
    let strange = "lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight";
    broken.says(&["does not have", "lora_unet_down_blocks_7"], |tensors| {
        tensors.insert(strange.into(), Tensor::ones([8, 2], float));
        tensors.insert(strange.replace("up.w", "down.w"), Tensor::ones([2, 8], float));
    });
    broken.says(&["<s1>", "textual inversion"], put("<s1>", Tensor::ones([16], float)));
    broken.says(&["OFT"], put(&format!("{LAYER}.oft_blocks"), Tensor::ones([16], float)));
    broken.says(&["two kinds"], |tensors| drop(tensors.insert(format!("{LAYER}.diff"), Tensor::ones([8, 8], float))));
    broken.says(&["changed by two"], |tensors| {
        for part in ["up", "down"] {
            let value = tensors[&format!("{LAYER}.lora_{part}.weight")].shallow_clone();
            let name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
            tensors.insert(format!("{name}.lora.{part}.weight"), value);
        }
    });
    broken.says(&["dora_scale", "[5]"], put(&format!("{LAYER}.dora_scale"), Tensor::ones([5], float)));
    broken.says(&["no bias"], put(&format!("{LAYER}.diff_b"), Tensor::ones([8], float)));
    broken.says(&["not one number"], put(&format!("{LAYER}.alpha"), Tensor::ones([2], float)));
    broken.says(&["is empty"], |tensors| tensors.clear());
    broken.says(&["is not a LoRA", "conv_in.weight"], |tensors| {
        *tensors = Weights::from([("conv_in.weight".to_owned(), Tensor::ones([8, 8], float))]);
    });
    let second = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight";
    broken.says(&["second text encoder", "Stable Diffusion XL"], |tensors| {
        tensors.insert(second.into(), Tensor::ones([8, 2], float));
        tensors.insert(second.replace("up.w", "down.w"), Tensor::ones([2, 8], float));
    });
}

#[test]
fn a_lora_of_another_family_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (base, path) = (sd15(folder.path()), folder.path().join("other.safetensors"));
    let float = (Kind::Half, Device::Cpu);
    for (layer, width, family) in [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, "Stable Diffusion XL"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "Stable Diffusion 2"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "a model with a transformer in place of the UNet"),
    ] {
        let (up, down) = (Tensor::ones([640, 4], float), Tensor::ones([4, width], float));
        let names = [format!("{layer}.lora_up.weight"), format!("{layer}.lora_down.weight")];
        let tensors = [(names[0].as_str(), &up), (names[1].as_str(), &down)];
        write_safetensors(&path, tensors, None, &BTreeMap::new()).unwrap();
        let error = open(&base, vec![choice(&path, 1.0)]).map(drop).unwrap_err();
        assert!(error.is::<palettist::source::Misused>(), "{error:#}");
        let expected = format!("other.safetensors is a LoRA of {family}, and {base} is a Stable Diffusion 1");
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

#[test]
fn loras_are_merged_one_after_the_other_with_their_weights() {
    let (path, lora) = (model_path("pipeline"), fixture("lora/kohya.safetensors"));
    let own = weights(&Model::open(&path).unwrap());
    let merged = |loras: Vec<LoraChoice>| weights(&open(&path, loras).unwrap());
    let (unet, text) = (Component::Unet, Component::TextEncoder);
    let (of_unet, of_text) = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
    );
    let one = merged(vec![choice(&lora, 1.0)]);
    let change = |merged: &BTreeMap<Component, Weights>, component: Component, name: &str| {
        &merged[&component][name] - &own[&component][name]
    };
    let twice = merged(vec![choice(&lora, 0.5), choice(&lora, 1.5)]);
    for (component, name) in [(unet, of_unet), (text, of_text)] {
        assert!(difference(&change(&twice, component, name), &(2.0 * change(&one, component, name))) < 1e-6);
    }
    // The text encoder's own weight, and none.
    let own_weight = LoraChoice { te_weight: Some(-0.5), ..choice(&lora, 1.0) };
    let other = merged(vec![own_weight.clone()]);
    assert!(difference(&change(&other, text, of_text), &(-0.5 * change(&one, text, of_text))) < 1e-6);
    assert!(change(&other, unet, of_unet).equal(&change(&one, unet, of_unet)));
    let none = merged(vec![LoraChoice { te_weight: Some(0.0), ..choice(&lora, 1.0) }]);
    assert!(none[&text][of_text].equal(&own[&text][of_text]));
    // What it is called says what is in it.
    let name = |loras| open(&path, loras).unwrap().name().to_owned();
    assert_eq!(name(vec![choice(&lora, 1.0), choice(&lora, 0.5)]), "model_kohya_kohya_0.5");
    assert_eq!(name(vec![own_weight]), "model_kohya_1_-0.5");
    assert_eq!(name(vec![choice(&lora, 0.0)]), "model");
}

#[test]
fn a_model_with_a_lora_is_another_model() {
    let (path, lora) = (model_path("pipeline"), fixture("lora/kohya.safetensors"));
    let base = Model::open(&path).unwrap();
    let with = |weight| open(&path, vec![choice(&lora, weight)]).unwrap();
    for id in [|model: &Model| model_id(model), |model: &Model| identity(model).unwrap()] {
        assert_ne!(id(&with(1.0)), id(&base));
        assert_ne!(id(&with(1.0)), id(&with(0.9)));
        assert_eq!(id(&with(1.0)), id(&with(1.0)));
        assert_eq!(id(&with(0.0)), id(&base));
    }
    // A copy is a plain folder with the same weights.
    let folder = tempfile::tempdir().unwrap();
    let (copy, half) = (folder.path().join("copy"), folder.path().join("half"));
    copy_model(&with(1.0), &half, &[], Kind::Half).unwrap();
    assert_eq!(model_id(&Model::open(half.to_str().unwrap()).unwrap()), model_id(&with(1.0)));
    copy_model(&with(1.0), &copy, &[], Kind::Float).unwrap();
    let (copied, merged) = (weights(&Model::open(copy.to_str().unwrap()).unwrap()), weights(&with(1.0)));
    for (component, own) in merged {
        assert!(own.iter().all(|(name, value)| copied[&component][name].equal(value)), "{component:?}");
    }
}

#[test]
fn a_folder_of_several_spellings_has_one_meaning() {
    let files = ["kohya", "diffusers"].map(|name| fixture(&format!("lora/{name}.safetensors")));
    // kohya's alpha by rank is 1.5 in the UNet and a third in the text encoder.
    let kohya = LoraChoice { te_weight: Some(3.0), ..choice(&files[0], 1.0) };
    let diffusers = LoraChoice { te_weight: Some(1.0), ..choice(&files[1], 1.5) };
    let [a, b] = [kohya, diffusers].map(|lora| weights(&open(&model_path("pipeline"), vec![lora]).unwrap()));
    for (component, weights) in a {
        for (name, value) in weights {
            assert!(difference(&value, &b[&component][&name]) < 1e-6, "{name}");
        }
    }
}

/// A config with LoRAs, and quick.
fn with_loras(folder: &Path, loras: &str) -> String {
    let path = config(folder);
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("[data]\n", &format!("{loras}\n[data]\n"));
    let text = text.replace("train_text_encoder = true\nstop_text_encoder_training = 5\n", "");
    let text =
        text.replace("gradient_accumulation_steps = 2\n", "").replace("max_train_steps = 12", "max_train_steps = 4");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_run_learns_from_the_model_with_the_lora() {
    let folder = tempfile::tempdir().unwrap();
    let lora = fixture("lora/kohya.safetensors").display().to_string();
    let entry = |weight: f64| format!("[[model.loras]]\npath = \"{lora}\"\nweight = {weight}");
    let config = with_loras(folder.path(), &entry(0.5));
    let quick = ["sample.sample_every_n_steps=0", "validation.every_n_steps=0", "train.learning_rate=1e-9"];
    let command = |command: &'static str| [&[command, config.as_str()], &quick[..]].concat();
    let merged = "merged in: the LoRA";
    let checked = succeed(run(folder.path(), &[&command("check")[..], &["--no-estimate"]].concat()));
    assert!(checked.contains(merged) && checked.contains("weight 0.5: 7 layers of the UNet"), "{checked}");
    let said = ends(folder.path(), &command("train"), 0, merged);
    assert!(said.contains("of rank 2 to 3") && said.contains("weight 0.5") && said.contains("of the UNet"), "{said}");
    // The model that it made is the merged one, but for the rounding to fp16 and, of the UNet, palettes.
    let made = weights(&Model::open(folder.path().join("run/model").to_str().unwrap()).unwrap());
    let expected = weights(&open(&model_path("pipeline"), vec![choice(Path::new(&lora), 0.5)]).unwrap());
    let text = &expected[&Component::TextEncoder];
    for (name, value) in &made[&Component::TextEncoder] {
        assert!(value.equal(&text[name].to_kind(Kind::Half).to_kind(Kind::Float)), "{name}");
    }
    // Its package says so.
    let package = fs::read_dir(folder.path().join("run/coreml")).unwrap().flatten().next().unwrap().path();
    let inspected = succeed(run(folder.path(), &["inspect", package.to_str().unwrap()]));
    assert!(inspected.contains("palettist.loras: kohya=0.5"), "{inspected}");
    // Another weight, and no LoRA, are other models; the same LoRA elsewhere is the same one.
    let changed = with_loras(folder.path(), &entry(0.6));
    assert_eq!(changed, config);
    let more = [&command("train")[..], &["train.max_train_steps=5"]].concat();
    ends(folder.path(), &more, 2, "the model is another: its UNet, text encoder changed");
    with_loras(folder.path(), "");
    ends(folder.path(), &more, 2, "the model is another: its UNet, text encoder changed");
    let moved = folder.path().join("moved.safetensors");
    fs::copy(&lora, &moved).unwrap();
    with_loras(folder.path(), &format!("[[model.loras]]\npath = \"{}\"\nweight = 0.5", moved.display()));
    ends(folder.path(), &more, 0, "");
    // The run's palettes cannot take another LoRA.
    let refused = ["generate", "run", "--lora", &lora, "--prompt", "a cat", "-o", "cat.png"];
    ends(folder.path(), &refused, 2, "no LoRA can be merged");
}

#[test]
fn inspect_tells_what_a_lora_is() {
    let folder = fixture("lora");
    let said = |file: &str| succeed(run(&folder, &["inspect", file]));
    for (file, expected) in [
        (
            "kohya.safetensors",
            &["a LoRA: LoCon, LoRA of rank 2 to 3 in kohya's layout", "alpha: 1 to 3", "UNet: 7"][..],
        ),
        ("xl-ldm.safetensors", &["for Stable Diffusion XL", "layers of the second text encoder: 2"]),
        ("peft-dora/adapter_model.safetensors", &["DoRA", "in PEFT's layout", "alpha: not said by its tensors"]),
        ("processors.safetensors", &["the layout of diffusers' old attention processors", "rank 2"]),
        ("loha.safetensors", &["LoHa of rank 2"]),
        ("lokr-both.safetensors", &["LoKr of rank 1"]),
        ("full.safetensors", &["full differences in"]),
    ] {
        let said = said(file);
        expected.iter().for_each(|text| assert!(said.contains(text), "{text}: {said}"));
    }
    let Some(loras) = shared("loras") else { return };
    for (spelling, layout) in
        [("kohya", "kohya's layout"), ("peft", "diffusers' layout"), ("cloneofsimo", "cloneofsimo's")]
    {
        let said = said(loras.join(format!("analog_svd_rank4.{spelling}.safetensors")).to_str().unwrap());
        for expected in ["LoRA of rank 4", layout, "for Stable Diffusion 1", "UNet: 144", "text encoder: 48"] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
}

/// Shapes that no tool writes are refused, and nothing panics.
#[test]
fn odd_shapes_are_refused() {
    let broken = Broken::new();
    let shapes: [&[i64]; 9] =
        [&[], &[0], &[8], &[0, 8], &[8, 0], &[2, 0, 0, 3], &[1, 1, 1, 1, 1, 1], &[8, 2, 2, 2], &[8, 1, 2, 3, 4]];
    let parts = [
        &["lora_up.weight", "lora_down.weight", "lora_mid.weight"][..],
        &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        &["lokr_w1", "lokr_w2"],
        &["lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
        &["diff", "dora_scale"],
        &["lora_embedding_A", "lora_embedding_B"],
    ];
    let mut refused = 0;
    for (kind, shape) in parts.iter().flat_map(|kind| shapes.map(|shape| (kind, shape))) {
        for left_out in kind.iter().map(Some).chain([None]) {
            broken.write(|tensors| {
                tensors.clear();
                for part in kind.iter().filter(|part| Some(*part) != left_out) {
                    tensors.insert(format!("{LAYER}.{part}"), Tensor::ones(shape, (Kind::Float, Device::Cpu)));
                }
            });
            let opened = open(&model_path("pipeline"), vec![choice(&broken.path(), 1.0)]);
            let error = opened.map(drop).expect_err(&format!("{kind:?} {shape:?} {left_out:?}"));
            assert!(error.to_string().contains("broken.safetensors"), "{error:#}");
            refused += 1;
        }
    }
    assert!(refused > 200);
}

#[test]
fn a_lora_may_be_a_folder_or_in_the_hubs_cache() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("models--owner--style/snapshots/abc123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(fixture("lora/kohya.safetensors"), snapshot.join("style.safetensors")).unwrap();
    let out = folder.path().join("out");
    let model = model_path("pipeline");
    let export = |lora: &str, to: &Path| {
        let arguments = ["export", &model, "--lora", lora, "--component", "text_encoder", "-o", to.to_str().unwrap()];
        common::runs::program(folder.path(), &arguments).env("HF_HUB_CACHE", folder.path()).output().unwrap()
    };
    let said = common::runs::text(&export("owner/style=0.5", &out).stderr);
    assert!(said.contains("merged in: the LoRA owner/style (") && said.contains("weight 0.5"), "{said}");
    assert!(out.join("Stable_Diffusion_version_model_style_0.5_text_encoder.mlpackage").is_dir());
    let said = common::runs::text(&export("owner/other", &folder.path().join("none")).stderr);
    assert!(said.contains("the LoRA owner/other does not exist"), "{said}");
    let peft = fixture("lora/peft-embedding");
    succeed(export(peft.to_str().unwrap(), &folder.path().join("peft")));
    assert!(folder.path().join("peft/Stable_Diffusion_version_model_peft-embedding_text_encoder.mlpackage").is_dir());
}

#[test]
fn every_command_takes_loras() {
    let folder = tempfile::tempdir().unwrap();
    let (model, lora) = (model_path("pipeline"), fixture("lora/kohya.safetensors").display().to_string());
    let half = format!("{lora}=0.5");
    let go = |arguments: &[&str], code: i32, expected: &str| ends(folder.path(), arguments, code, expected);
    go(&["export", &model, "--lora", &half, "--component", "unet,text_encoder", "-o", "out"], 0, "weight 0.5");
    let package = |part: &str| format!("out/Stable_Diffusion_version_model_kohya_0.5_{part}.mlpackage");
    let (unet, text) = (package("unet"), package("text_encoder"));
    assert!(folder.path().join(&unet).is_dir() && folder.path().join(&text).is_dir());
    go(&["verify", &unet, &text, "--against", &model, "--lora", &half], 0, "");
    go(&["verify", &unet, "--against", &model], 1, "");
    go(
        &[
            "palettize",
            &model,
            "--lora",
            &half,
            "--bits",
            "4",
            "--weight-threshold",
            "100",
            "-o",
            "a.palettes.safetensors",
        ],
        0,
        "",
    );
    let palettes = TensorFile::open(&folder.path().join("a.palettes.safetensors")).unwrap();
    assert_eq!(palettes.metadata()["loras"], "kohya=0.5");
    let palettes = ["--palettes", "a.palettes.safetensors"];
    let draw = ["generate", &model, "--lora", &half, "--prompt", "a cat", "--steps", "2", "-o", "cat.png"];
    go(&[&draw[..], &palettes].concat(), 0, "changes none of them");
    // Options without effect, and mistakes.
    go(&["export", &model, "--lora", &lora, "--component", "vae_decoder", "-o", "vae"], 2, "--lora");
    go(&["verify", &unet, "--lora", &lora], 2, "--lora");
    go(
        &["generate", &model, "--lora", "none.safetensors", "--prompt", "a", "-o", "b.png"],
        1,
        "none.safetensors does not exist",
    );
    go(&["generate", &model, "--lora", &format!("{lora}=much"), "--prompt", "a", "-o", "b.png"], 2, "not a number");
    go(&["generate", &lora, "--prompt", "a", "-o", "b.png"], 1, "give the model, and this with --lora");
    go(
        &["generate", &model, "--lora", &format!("{lora}=0"), "--prompt", "a", "--steps", "1", "-o", "c.png"],
        0,
        "nothing of it is merged",
    );
    go(&["generate", &model_path("sdxl"), "--lora", &lora, "--prompt", "a", "-o", "b.png"], 2, "kohya.safetensors");
}
