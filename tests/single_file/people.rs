//! Files as people have them: marks of what is predicted, leftovers, fp8, one network alone, biases of other ranks.

use palettist::palette::PalettizedCheckpoint;
use palettist::source::{ModelOptions, PREDICTION, PredictionType, TEXT_ENCODERS};

use super::*;

type Tensors = BTreeMap<String, Tensor>;

fn clone(tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

fn with(tensors: &Tensors, more: &[(&str, Tensor)]) -> Tensors {
    let mut all = clone(tensors);
    all.extend(more.iter().map(|(name, tensor)| (name.to_string(), tensor.shallow_clone())));
    all
}

fn empty() -> Tensor {
    Tensor::zeros([0], (Kind::Float, CPU))
}

/// A file with tensors of any type, fp8 too.
fn write_any(path: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let (dtype, size) = match tensor.kind() {
            Kind::Float8e4m3fn => ("F8_E4M3", 1),
            Kind::Float8e5m2 => ("F8_E5M2", 1),
            Kind::Half => ("F16", 2),
            Kind::Float => ("F32", 4),
            Kind::Int8 => ("I8", 1),
            Kind::Int64 => ("I64", 8),
            other => panic!("{other:?}"),
        };
        let from = data.len();
        data.resize(from + tensor.numel() * size, 0);
        let bytes = tensor.contiguous().flatten(0, -1).view_dtype(Kind::Uint8);
        bytes.copy_data_u8(&mut data[from..], tensor.numel() * size);
        header
            .insert(name.clone(), json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [from, data.len()]}));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    fs::write(path, [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()).unwrap();
}

#[test]
fn marks_say_what_is_predicted() {
    let (_folder, path, tensors, _) = single_file(1);
    let scheduler = |options: &ModelOptions| {
        let config = Model::open_with(path.to_str().unwrap(), options)?.scheduler_config()?;
        let rescale = config.get("rescale_betas_zero_snr").cloned().unwrap_or(json!(false));
        anyhow::Ok((config["prediction_type"].as_str().unwrap().to_owned(), rescale))
    };
    let auto = ModelOptions::default();
    let v = |rescale: bool| ("v_prediction".to_owned(), json!(rescale));
    let epsilon = ("epsilon".to_owned(), json!(false));
    write(&path, &tensors, &[]);
    assert_eq!(scheduler(&auto).unwrap(), epsilon);
    for (names, rescale) in [(&["v_pred"][..], false), (&["ztsnr"], true), (&["v_pred", "ztsnr"], true)] {
        let marks: Vec<_> = names.iter().map(|name| (*name, empty())).collect();
        write(&path, &with(&tensors, &marks), &[]);
        assert_eq!(scheduler(&auto).unwrap(), v(rescale), "{names:?}");
    }
    for key in ["modelspec.prediction_type", "modelspec.predict_key"] {
        write(&path, &tensors, &[(key, "v")]);
        assert_eq!(scheduler(&auto).unwrap(), v(false), "{key}");
        write(&path, &tensors, &[(key, "epsilon")]);
        assert_eq!(scheduler(&auto).unwrap(), epsilon, "{key}");
        write(&path, &tensors, &[(key, "sample")]);
        assert_says(scheduler(&auto), &[key, "sample", "small.safetensors"]);
    }
    // Two marks that contradict each other are not for the program to choose from.
    write(&path, &with(&tensors, &[("v_pred", empty())]), &[("modelspec.prediction_type", "epsilon")]);
    assert_says(scheduler(&auto), &["v_pred", "modelspec.prediction_type", "--prediction-type"]);
    let said = |prediction_type| ModelOptions { prediction_type, ..ModelOptions::default() };
    assert_eq!(scheduler(&said(PredictionType::VPrediction)).unwrap(), v(false));
    assert_eq!(scheduler(&said(PredictionType::Epsilon)).unwrap(), epsilon);

    write(&path, &tensors, &[]);
    let yaml = path.with_extension("yaml");
    fs::write(
        &yaml,
        "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: \"v\"\n",
    )
    .unwrap();
    assert_eq!(scheduler(&auto).unwrap(), v(false));
    let rescaled = ModelOptions { rescale_betas_zero_snr: Some(true), ..ModelOptions::default() };
    assert_eq!(scheduler(&rescaled).unwrap(), v(true));
    fs::write(&yaml, "model:\n  params:\n    parameterization: x0\n").unwrap();
    assert_says(scheduler(&auto), &["small.yaml", "x0"]);
    fs::remove_file(&yaml).unwrap();
    fs::write(path.with_extension("yml"), "model:\n  params:\n    parameterization: v\n").unwrap();
    assert_eq!(scheduler(&auto).unwrap(), v(false));
}

/// What a `.yaml` says that is not taken up is told, and that it says nothing.
#[test]
fn what_is_not_read_of_a_yaml_is_told() {
    let (_folder, path, tensors, _) = single_file(1);
    write(&path, &tensors, &[]);
    let told = |text: &str| {
        fs::write(path.with_extension("yaml"), text).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_palettist"));
        let out = path.with_file_name("out");
        let _ = fs::remove_dir_all(&out);
        let output = command.arg("export").arg(&path).arg("-o").arg(&out).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let usual = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n    linear_end: \
                 0.0120\n    timesteps: 1000\n    scale_factor: 0.18215\n";
    assert!(!told(usual).contains("small.yaml"));
    let other = told(&usual.replace("0.18215", "0.5").replace("timesteps: 1000", "timesteps: 500"));
    let expected =
        "small.yaml: `scale_factor: 0.5` (0.18215 is taken) and `timesteps: 500` (1000 is taken) are not read";
    assert!(other.contains(expected), "{other}");
    assert!(told("model: [").contains("small.yaml says nothing that is read"));
}

#[test]
fn what_lies_beside_the_networks_is_not_used() {
    let (folder, path, tensors, weights) = single_file(1);
    let one = || Tensor::ones([1], (Kind::Half, CPU));
    let names = [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.visual_projection.weight",
        "cond_stage_model.transformer.vision_model.post_layernorm.bias",
        "model_ema.diffusion_modelinput_blocks00weight",
        "model_ema.decay",
        "first_stage_model.loss.discriminator.main.0.weight",
        "embedding_manager.string_to_param_dict.*",
        "optimizer_states.0.exp_avg",
        "alphas_cumprod",
        "something",
    ];
    write(&path, &with(&tensors, &names.map(|name| (name, one()))), &[]);
    assert_same(&open(&path), &weights);
    let (code, _, error) =
        palettist(folder.path(), &["palettize", "small.safetensors", "-o", "a.palettes.safetensors", "--bits", "1"]);
    assert_eq!((code, error.matches("note: ").count()), (0, 1), "{error}");
    let note = error.lines().find(|line| line.starts_with("note: ")).unwrap();
    assert!(
        note.contains("small.safetensors") && note.contains("not used") && note.contains("`cond_stage_model.…`"),
        "{note}"
    );
    assert!(!note.contains("position_ids") && !note.contains("alphas"), "{note}");
}

#[test]
fn fp8_weights_are_read_as_wider_ones() {
    let (_folder, path, tensors, weights) = single_file(1);
    for kind in [Kind::Float8e4m3fn, Kind::Float8e5m2] {
        for scale in [None, Some(0.25)] {
            let mut stored = clone(&tensors);
            for (name, tensor) in &tensors {
                if name.starts_with("model.diffusion_model.") && tensor.dim() > 1 {
                    stored.insert(name.clone(), tensor.to_kind(kind));
                    if let Some(scale) = scale {
                        let name = format!("{}.scale_weight", name.strip_suffix(".weight").unwrap());
                        stored.insert(name, Tensor::from(scale as f32));
                    }
                }
            }
            if scale.is_some() {
                stored.insert("scaled_fp8".into(), Tensor::zeros([2], (Kind::Float, CPU)).to_kind(kind));
            }
            write_any(&path, &stored);
            let read = open(&path).weights(Component::Unet, Kind::Float, CPU).unwrap();
            for (name, tensor) in &weights[0] {
                let expected = match tensor.dim() {
                    1 => tensor.to_kind(Kind::Float),
                    _ => tensor.to_kind(kind).to_kind(Kind::Float) * scale.unwrap_or(1.0),
                };
                assert!(read[name].equal(&expected), "{name}");
            }
        }
    }
    // Integers are no such thing.
    let name = "model.diffusion_model.input_blocks.0.0.weight";
    let mut stored = clone(&tensors);
    stored.insert(name.into(), tensors[name].to_kind(Kind::Int8));
    write_any(&path, &stored);
    assert_says(open(&path).check(Component::Unet), &[name, "Int8", "quantized"]);
}

#[test]
fn biases_may_have_axes_of_length_one() {
    let (_folder, path, tensors, weights) = single_file(1);
    let turned = |tensor: &Tensor, image: bool| match (tensor.dim(), image) {
        (1, true) => tensor.view([1, -1, 1, 1]),
        (1, false) => tensor.view([-1, 1, 1]),
        _ => tensor.shallow_clone(),
    };
    for image in [true, false] {
        let turned = tensors.iter().map(|(name, tensor)| (name.clone(), turned(tensor, image)));
        write(&path, &turned.collect(), &[]);
        assert_same(&open(&path), &weights);
    }
}

#[test]
fn a_unet_alone_has_any_usual_prefix() {
    let (folder, whole, tensors, weights) = single_file(1);
    let base = folder.path().join("base");
    copy_model(&open(&whole), &base, &[], Kind::Half).unwrap();
    let path = folder.path().join("unet.safetensors");
    let ldm = |prefix: &str| {
        let unet =
            tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("model.diffusion_model.")?, tensor)));
        unet.map(|(name, tensor)| (format!("{prefix}{name}"), tensor.shallow_clone())).collect::<Tensors>()
    };
    let diffusers = |prefix: &str| -> Tensors {
        weights[0].iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.shallow_clone())).collect()
    };
    let files = ["model.diffusion_model.", "diffusion_model.", "model.", ""].map(ldm);
    for tensors in files.into_iter().chain(["unet.", ""].map(diffusers)) {
        let first = tensors.keys().next().unwrap();
        write(&path, &tensors, &[]);
        let model = open(&path);
        let read = model.weights(Component::Unet, Kind::Half, CPU).unwrap();
        assert!(weights[0].iter().all(|(name, tensor)| read[name].equal(tensor)), "{first}");
        assert_says(
            Pipeline::load(&model, None, Kind::Float, CPU),
            &["unet.safetensors holds a UNet alone", "text encoder and autoencoder", "unet/diffusion_pytorch_model"],
        );
    }
    // What that message advises.
    for tensors in [ldm("diffusion_model."), diffusers("unet.")] {
        write(&base.join("unet/diffusion_pytorch_model.safetensors"), &tensors, &[]);
        assert_same(&open(&base), &weights);
    }
    // A prefix of the one is none of the other, and a name that the UNet does not have is still told.
    let mut tensors = diffusers("unet.");
    tensors.insert("unet.conv_odd.weight".into(), empty());
    write(&base.join("unet/diffusion_pytorch_model.safetensors"), &tensors, &[]);
    assert_says(open(&base).weights(Component::Unet, Kind::Half, CPU), &["`unet.conv_odd.weight`", "does not have"]);

    // Its palettes are those of the whole model, and packages are made of both.
    write(&path, &diffusers("unet."), &[]);
    let succeeds = |arguments: &[&str]| {
        let (code, _, told) = palettist(folder.path(), arguments);
        assert_eq!(code, 0, "{told}");
    };
    let palettes = |model: &Path, name: &str| {
        let file = folder.path().join(name);
        let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
        succeeds(&["palettize", model, "--bits", "2", "--weight-threshold", "100", "-o", file]);
        file.to_owned()
    };
    let (of_alone, of_whole) = (palettes(&path, "a.palettes.safetensors"), palettes(&whole, "w.palettes.safetensors"));
    let tables = |file: &str| PalettizedCheckpoint::read(Path::new(file)).unwrap();
    let (alone, all) = (tables(&of_alone), tables(&of_whole));
    assert!(!all.palettes.is_empty() && alone.palettes.keys().eq(all.palettes.keys()));
    assert_eq!(alone.metadata.get(PREDICTION), all.metadata.get(PREDICTION));
    assert!(all.metadata.contains_key(TEXT_ENCODERS) && !alone.metadata.contains_key(TEXT_ENCODERS));
    let out = folder.path().join("out");
    let arguments = ["export", path.to_str().unwrap(), "--component", "unet", "--palettes", &of_alone, "-o"];
    succeeds(&[&arguments[..], &[out.to_str().unwrap()]].concat());
}

#[test]
fn another_autoencoder_takes_the_place_of_the_models_own() {
    let (folder, path, tensors, weights) = single_file(1);
    let model = folder.path().join("model");
    copy_model(&open(&path), &model, &[], Kind::Half).unwrap();
    let vae: Weights = weights[2].iter().map(|(name, tensor)| (name.clone(), tensor * 2)).collect();
    let file = folder.path().join("vae.safetensors");
    let with_vae = |model: &Path, vae: &Path| {
        let options = ModelOptions { vae: Some(vae.to_str().unwrap().to_owned()), ..ModelOptions::default() };
        Model::open_with(model.to_str().unwrap(), &options)
    };
    let check = |with: &Path, what: &str| {
        for model in [&model, &path] {
            let opened = with_vae(model, with).unwrap();
            let read = opened.weights(Component::Autoencoder, Kind::Half, CPU).unwrap();
            assert!(vae.iter().all(|(name, tensor)| read[name].equal(tensor)), "{what}");
            assert!(
                opened.weights(Component::Unet, Kind::Half, CPU).unwrap()["conv_in.weight"]
                    .equal(&weights[0]["conv_in.weight"])
            );
            assert_eq!(opened.autoencoder_config().unwrap().scaling_factor, 0.18215);
            Pipeline::load(&opened, None, Kind::Float, CPU).unwrap();
        }
    };
    // In the original names, in whole and in files of it alone, as vae-ft-mse-840000 is; and in diffusers' names.
    let original = |prefix: &str, more: &[(&str, Tensor)]| {
        let of = |name: &str| name.strip_prefix("first_stage_model.").map(|rest| format!("{prefix}{rest}"));
        let own = tensors.iter().filter_map(|(name, tensor)| Some((of(name)?, tensor * 2)));
        with(&own.collect(), more)
    };
    write(&file, &original("first_stage_model.", &[]), &[]);
    check(&file, "first_stage_model.");
    write(&file, &original("", &[("model_ema.decay", empty()), ("loss.logvar", empty())]), &[]);
    check(&file, "original names");
    write(&file, &vae.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect(), &[]);
    check(&file, "diffusers' names");
    // A folder of it, and of a whole model with it.
    let other = folder.path().join("other");
    copy_model(&with_vae(&model, &file).unwrap(), &other, &[], Kind::Half).unwrap();
    check(&other.join("vae"), "folder");
    check(&other, "model");
    assert!(
        open(&other).weights(Component::Autoencoder, Kind::Half, CPU).unwrap()["quant_conv.bias"]
            .equal(&vae["quant_conv.bias"])
    );

    assert_says(with_vae(&model, &folder.path().join("none")), &["none", "does not exist"]);
    assert_says(with_vae(&model, &folder.path().join("model/unet")), &["UNet"]);
    let config = other.join("vae/config.json");
    let mut json = read(&config);
    json["scaling_factor"] = json!(0.13025);
    fs::write(&config, json.to_string()).unwrap();
    let opened = with_vae(&model, &other).unwrap();
    assert_says(Pipeline::load(&opened, None, Kind::Float, CPU), &["scaling_factor", "0.13025", "0.18215"]);
    let mut json = read(&config);
    json["scaling_factor"] = json!(0.18215);
    json["latent_channels"] = json!(16);
    fs::write(&config, json.to_string()).unwrap();
    let opened = with_vae(&model, &other).unwrap();
    assert_says(Pipeline::load(&opened, None, Kind::Float, CPU), &["16", "autoencoder"]);
    // That of a whole checkpoint is what its UNet says: of another kind of model, whatever model it is given for.
    let of_xl =
        with(&tensors, &[("model.diffusion_model.label_emb.0.0.weight", Tensor::zeros([8, 8], (Kind::Half, CPU)))]);
    let whole = folder.path().join("whole.safetensors");
    write(&whole, &of_xl, &[]);
    for model in [&model, &path] {
        let opened = with_vae(model, &whole).unwrap();
        assert_says(Pipeline::load(&opened, None, Kind::Float, CPU), &["scaling_factor", "0.13025", "0.18215"]);
    }
    // The file alone is no model.
    assert_says(Model::open(file.to_str().unwrap()), &["autoencoder alone", "--vae"]);
}

#[test]
fn a_long_text_encoder_has_long_texts() {
    let (folder, path, mut tensors, _) = single_file(1);
    let name = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight";
    tensors.insert(name.into(), Tensor::zeros([248, 64], (Kind::Half, CPU)));
    write(&path, &tensors, &[]);
    assert_eq!(open(&path).tokenizer().unwrap().length(), 248);
    let to = folder.path().join("copy");
    copy_model(&open(&path), &to, &[], Kind::Half).unwrap();
    assert_eq!(read(&to.join("tokenizer/tokenizer_config.json"))["model_max_length"], 248);
    assert_eq!(open(&to).tokenizer().unwrap().length(), 248);
}
