//! What lies where in a diffusers folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Component, Network};
use crate::files::json::{read_json, read_json_if_there};
use crate::terminal::note_once;

/// Checks that `folder` is a diffusers folder of Stable Diffusion 1, 2 or XL, and says whether it has the two text
/// encoders of the latter.
///
/// # Errors
/// One line that says what it is instead.
pub fn check(folder: &Path) -> Result<bool> {
    let shown = folder.display();
    if let Some(index) = read_json_if_there(&folder.join("model_index.json"))? {
        let class = index.get("_class_name").and_then(Value::as_str).unwrap_or("a class it does not name");
        let uses = |part: &str| index.pointer(&format!("/{part}/1")).is_some_and(Value::is_string);
        if !uses("unet") {
            bail!("{shown}/model_index.json is of {class}, which has no `unet`: not a Stable Diffusion 1, 2 or XL");
        }
        if uses("text_encoder_2") && !uses("text_encoder") {
            bail!("{shown}/model_index.json is of {class} with the second text encoder only: a refiner, not supported");
        }
        return Ok(uses("text_encoder_2"));
    }
    if !folder.join("unet").is_dir() {
        let hint = match read_json_if_there(&folder.join("config.json"))? {
            None if folder.join("adapter_config.json").is_file() => {
                " (it is a LoRA of PEFT: give its model, and this with --lora, or under [[model.loras]] of a config)"
                    .to_owned()
            }
            None => String::new(),
            Some(config) => one_component(&config),
        };
        bail!("{shown} is not a diffusers folder: it has neither model_index.json nor unet/{hint}");
    }
    Ok(folder.join("text_encoder_2").is_dir())
}

/// Pipelines that draw from a text alone.
const TEXT_TO_IMAGE: [&str; 4] = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionXLPipeline",
];

/// What is said of a model that was saved as a pipeline for something else, as `model_index.json` has it. What its UNet
/// can do is told by that itself: an index may be of a pipeline for inpainting whose UNet draws from text alone.
pub fn other_pipeline(folder: &Path, is_xl: bool) -> Result<Option<String>> {
    let Some(index) = read_json_if_there(&folder.join("model_index.json"))? else { return Ok(None) };
    let class = index.get("_class_name").map(|class| class.as_str().map_or_else(|| class.to_string(), str::to_owned));
    if let Some(class) =
        class.as_ref().filter(|class| class.contains("StableDiffusion") && class.contains("XL") != is_xl)
    {
        let (encoders, kind) = if is_xl { ("two text encoders", "XL") } else { ("one text encoder", "1 or 2") };
        return Ok(Some(format!(
            "model_index.json of {} names {class}, but {encoders}: it is taken as a Stable Diffusion {kind}; diffusers cannot \
             load it",
            folder.display()
        )));
    }
    let other = class.filter(|class| !TEXT_TO_IMAGE.contains(&class.as_str()));
    Ok(other.map(|class| {
        format!(
            "{} was saved as a {class}: its UNet, autoencoder and text encoders are used by themselves, and what else that \
             pipeline does is not",
            folder.display()
        )
    }))
}

/// What a folder with this `config.json` at its top is, in parentheses.
fn one_component(config: &Value) -> String {
    let class = config.get("_class_name").or_else(|| config.pointer("/architectures/0")).and_then(Value::as_str);
    match class {
        Some(class) if class.contains("ControlNet") || class == "T2IAdapter" => {
            format!(" (it is a {class}, which goes with a model: give the model that it was made for)")
        }
        Some(class @ "AutoencoderKL") => {
            format!(" (it is an {class} alone: give the model, and this with --vae or model.vae)")
        }
        Some(class @ ("UNet2DConditionModel" | "CLIPTextModel" | "CLIPTextModelWithProjection")) => {
            format!(" (it is one component, a {class}: give the folder above it, the whole model's)")
        }
        Some(class) => format!(" (it is a {class}, which is not supported)"),
        None => " (it looks like one component: give the folder above it)".to_owned(),
    }
}

/// Checks that everything that a text-to-image model needs is there: what a download that broke off does not have. No
/// weight is read.
///
/// # Errors
/// One line that says what is missing.
pub fn check_whole(folder: &Path) -> Result<()> {
    let is_xl = check(folder)?;
    let of = |xl: bool| !xl || is_xl;
    for (component, tokenizer) in [
        (Component::Unet, None),
        (Component::Autoencoder, None),
        (Component::TextEncoder, Some("tokenizer")),
        (Component::TextEncoder2, Some("tokenizer_2")),
    ] {
        if !of(component == Component::TextEncoder2) {
            continue;
        }
        let part = folder.join(component.folder());
        read_json(&part.join("config.json"))?;
        if let Some(file) = weight_files(&part, component.into())?.into_iter().find(|file| !file.is_file()) {
            bail!("{} is missing", file.display());
        }
        let tokenizer = tokenizer.map(|name| folder.join(name));
        let there =
            |tokenizer: &PathBuf| ["tokenizer.json", "vocab.json"].iter().any(|name| tokenizer.join(name).is_file());
        if let Some(tokenizer) = tokenizer.filter(|tokenizer| !there(tokenizer)) {
            bail!("{} holds no tokenizer", tokenizer.display());
        }
    }
    read_json_if_there(&folder.join("scheduler/scheduler_config.json")).map(drop)
}

/// The safetensors files of a network: one, or the shards of an index. Full precision comes before variants, as
/// diffusers has it.
pub(super) fn weight_files(folder: &Path, network: Network) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    found.sort();
    // The other library's name does as well.
    let stems = match network.weight_file() {
        "model.safetensors" => ["model", "diffusion_pytorch_model"],
        _ => ["diffusion_pytorch_model", "model"],
    };
    for stem in stems {
        // `stem.safetensors`, `stem.fp16.safetensors`, any other variant; an index in the place of each.
        let middle = |name: &str, ending: &str| -> Option<String> {
            let middle = name.strip_prefix(stem)?.strip_suffix(ending)?;
            (middle.is_empty() || middle.starts_with('.')).then(|| middle.to_owned())
        };
        let mut candidates: Vec<(u8, bool, &String)> = Vec::new();
        for name in &found {
            // The variant of an index stands before `.safetensors` or, from older diffusers, before `.json`.
            let index = middle(name, ".safetensors.index.json").or_else(|| {
                let variant = middle(name, ".json")?.strip_prefix(".safetensors.index")?.to_owned();
                (!variant.is_empty()).then_some(variant)
            });
            let (variant, sharded) = match (middle(name, ".safetensors"), index) {
                (Some(variant), _) if !variant.contains("-of-") => (variant, false),
                (_, Some(variant)) => (variant, true),
                _ => continue,
            };
            let rank = match variant.as_str() {
                "" => 0,
                ".fp32" => 1,
                ".bf16" => 2,
                ".fp16" => 3,
                _ => 4,
            };
            candidates.push((rank, sharded, name));
        }
        // transformers takes a whole file before shards, diffusers shards before a whole file.
        let shards_first = stems[0] != "model";
        candidates.sort_by_key(|&(rank, sharded, name)| (rank, sharded != shards_first, name));
        if let Some((rank, sharded, name)) = candidates.first() {
            // Variants beside full precision are what repositories have.
            if let Some((_, _, other)) = candidates.get(1).filter(|(other, ..)| *rank > 0 || *other == 0) {
                let shown = folder.display();
                note_once(format_args!("{shown} holds {name} and {other}: the first is used"));
            }
            let path = folder.join(name);
            return if *sharded { shards(&path) } else { Ok(vec![path]) };
        }
    }
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|ending| name.ends_with(ending));
    if let Some(name) = found.iter().find(pickle) {
        let convert = match network {
            // Whichever class model_index.json names: it keeps all the parts that the pipeline has.
            Network::Of(_) => "diffusers import DiffusionPipeline as P; P.from_pretrained('MODEL')",
            Network::Clip => "transformers import CLIPModel as C; C.from_pretrained('CLIP')",
        };
        bail!(
            "{} is a pickle, which can run code and is never read; convert the model once with: python -c \"from \
             {convert}.save_pretrained('FOLDER')\"",
            folder.join(name).display()
        );
    }
    bail!("{} holds no weights: {}.safetensors is expected", folder.display(), stems[0])
}

/// The files that an index names, each once.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("{} has no `weight_map`", index.display()))?;
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut files = std::collections::BTreeSet::new();
    for (tensor, file) in map {
        // A shard lies beside its index; a name that leads elsewhere is not followed.
        let name = file.as_str().filter(|name| name.ends_with(".safetensors") && !name.contains(['/', '\\']));
        let name = name.with_context(|| format!("{}: tensor `{tensor}` is in {file}, not a shard", index.display()))?;
        files.insert(folder.join(name));
    }
    if let Some(missing) = files.iter().find(|path| !path.is_file()) {
        bail!("{} is missing; {} names it", missing.display(), index.display());
    }
    Ok(files.into_iter().collect())
}
