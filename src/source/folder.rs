//! What lies where in a diffusers folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Component;
use super::json::{read_json, read_json_if_there};

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
        let hint = match folder.join("config.json").is_file() {
            true => " (it looks like one component: give the folder above it)",
            false => "",
        };
        bail!("{shown} is not a diffusers folder: it has neither model_index.json nor unet/{hint}");
    }
    Ok(folder.join("text_encoder_2").is_dir())
}

/// The safetensors files of a component: one, or the shards of an index. Full precision comes before variants, as
/// diffusers has it.
pub fn weight_files(folder: &Path, component: Component) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    found.sort();
    let stems = match component {
        Component::TextEncoder | Component::TextEncoder2 | Component::SafetyChecker => {
            ["model", "diffusion_pytorch_model"]
        }
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
        candidates.sort();
        if let Some((_, sharded, name)) = candidates.first() {
            let path = folder.join(name);
            return if *sharded { shards(&path) } else { Ok(vec![path]) };
        }
    }
    let pickle = |name: &&String| [".bin", ".ckpt", ".pt", ".pth"].iter().any(|ending| name.ends_with(ending));
    if let Some(name) = found.iter().find(pickle) {
        bail!(
            "{} is a pickle, which can run code and is never read; convert the model once with: python -c \"from \
             diffusers import StableDiffusionPipeline as P; P.from_pretrained('MODEL').save_pretrained('FOLDER')\"",
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

/// Copies the plain files of a folder; links are followed (the Hugging Face cache is made of them).
pub fn copy_small_files(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", from.display()))?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}
