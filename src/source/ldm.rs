//! The names of tensors in single-file checkpoints, as CompVis' latent-diffusion and Stability's stablediffusion call
//! them, mapped by rule to those of diffusers.
//!
//! latent-diffusion numbers what its UNet runs through in one row: on the way down the first convolution, then for each
//! block its layers and the downsampling after them; on the way up the layers alone. Where a block ends is read from the
//! places of the downsampling convolutions, so that any depth and any number of layers has its names.

use std::collections::BTreeSet;

use super::alone::{AUTOENCODER, Alone, Meaning, UNET};
use super::{Component, names};
use crate::files::is_scale;

const TEXT_ENCODER: &str = "cond_stage_model.transformer.";
/// The prefix of Stable Diffusion 2's text encoder, which keeps OpenCLIP's names.
pub const OPEN_CLIP: &str = "cond_stage_model.model.";

const XL_TEXT_ENCODER: &str = "conditioner.embedders.0.transformer.";
/// The prefix of Stable Diffusion XL's second text encoder, OpenCLIP's ViT-bigG.
const XL_OPEN_CLIP: &str = "conditioner.embedders.1.model.";

/// How many layers of OpenCLIP's ViT-H Stable Diffusion 2 uses: all but the last of its 24.
const OPEN_CLIP_LAYERS: usize = 23;
/// No network has so many blocks or layers; a file that numbers them further is damaged.
const MOST: usize = 1000;

/// Where the blocks of a file's networks begin and end.
pub struct Layout {
    /// Block and layer of each input block but the first.
    down: Vec<Place>,
    /// The same of each output block.
    up: Vec<Place>,
    /// How many resolutions the autoencoder's decoder has; it counts them from the picture inward, diffusers outward.
    decoder_levels: usize,
    alone: Alone,
}

impl Layout {
    /// Reads it from all the names of a file.
    pub fn of<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        let (mut last_input, mut downsamplings, mut decoder_levels) = (0, BTreeSet::new(), 0);
        let names: Vec<&str> = names.into_iter().collect();
        let alone = Alone::of(&names);
        for name in names.iter().filter_map(|name| alone.whole(name).ok()) {
            let name = name.as_ref();
            if let Some((number, rest)) = numbered(name, "model.diffusion_model.input_blocks.") {
                last_input = last_input.max(number);
                if rest.starts_with("0.op.") {
                    downsamplings.insert(number);
                }
            } else if let Some((level, _)) = numbered(name, "first_stage_model.decoder.up.") {
                decoder_levels = decoder_levels.max(level + 1);
            }
        }
        let mut layers = vec![0];
        for number in 1..=last_input {
            match downsamplings.contains(&number) {
                true => layers.push(0),
                false => *layers.last_mut().expect("never empty") += 1,
            }
        }
        let (down, up) = numbers(&layers);
        Self { down, up, decoder_levels, alone }
    }

    /// That of the UNet whose parameters have these diffusers names.
    pub fn of_diffusers<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        let mut layers = Vec::new();
        for name in names {
            let Some((block, rest)) = numbered(name, "down_blocks.") else { continue };
            let Some((resnet, _)) = numbered(rest, "resnets.") else { continue };
            if layers.len() <= block {
                layers.resize(block + 1, 0);
            }
            layers[block] = layers[block].max(resnet + 1);
        }
        let (down, up) = numbers(&layers);
        Self { down, up, decoder_levels: 0, alone: Alone::No }
    }

    /// The diffusers name of the UNet's layer that latent-diffusion calls `name`.
    pub fn unet_module(&self, name: &str) -> Option<String> {
        self.unet(&format!("{name}.weight"))?.strip_suffix(".weight").map(str::to_owned)
    }

    /// The diffusers name of a tensor of `component`, where the file has latent-diffusion's names for it; its own name
    /// where that is no such name, and `None` for what is no parameter.
    pub fn renamed(&self, component: Component, name: &str) -> Option<String> {
        let ldm = match self.alone {
            Alone::Ldm { component: alone, .. } => alone == component,
            Alone::No => match component {
                Component::Unet => name.starts_with(UNET),
                Component::Autoencoder => name.starts_with(AUTOENCODER),
                _ => false,
            },
            Alone::Diffusers { .. } => false,
        };
        if !ldm {
            // Of a network alone, names may stand behind a prefix.
            let bare = match self.alone {
                Alone::Diffusers { component: alone, prefix } if alone == component => name.strip_prefix(prefix),
                _ => None,
            };
            return names::today(component.into(), bare.unwrap_or(name));
        }
        match self.meaning(name) {
            Some(Meaning::Parameter(of, name)) if of == component => Some(name),
            Some(Meaning::Nothing | Meaning::Beside) => None,
            _ => Some(name.to_owned()),
        }
    }

    /// What the tensor `name` is; `None` when it lies within a network and is nothing that Stable Diffusion 1, 2 or XL has
    /// there.
    pub fn meaning(&self, name: &str) -> Option<Meaning> {
        let parameter = |component, name: Option<String>| name.map(|name| Meaning::Parameter(component, name));
        if is_buffer(name) {
            return Some(Meaning::Nothing);
        }
        let name = match self.alone.whole(name) {
            Ok(name) => name,
            Err(meaning) => return Some(meaning),
        };
        let name = name.as_ref();
        if is_beside(name) {
            Some(Meaning::Beside)
        } else if let Some(rest) = name.strip_prefix(UNET) {
            parameter(Component::Unet, self.unet(rest))
        } else if let Some(rest) = name.strip_prefix(AUTOENCODER) {
            parameter(Component::Autoencoder, self.autoencoder(rest))
        } else if let Some(rest) = [TEXT_ENCODER, XL_TEXT_ENCODER].iter().find_map(|prefix| name.strip_prefix(prefix)) {
            let bare = rest.strip_prefix("text_model.").unwrap_or(rest);
            let within = ["embeddings.", "encoder.", "final_layer_norm."].iter().any(|part| bare.starts_with(part));
            match names::today(Component::TextEncoder.into(), rest) {
                Some(name) if within => Some(Meaning::Parameter(Component::TextEncoder, name)),
                // A whole CLIP has a tower for pictures and projections too.
                _ if !rest.starts_with("text_model.") => Some(Meaning::Beside),
                _ => None,
            }
        } else if let Some(rest) = name.strip_prefix(OPEN_CLIP) {
            match rest {
                "text_projection" => Some(Meaning::Nothing),
                _ => open_clip(rest, Component::TextEncoder, OPEN_CLIP_LAYERS),
            }
        } else if let Some(rest) = name.strip_prefix(XL_OPEN_CLIP) {
            match rest {
                "text_projection" => {
                    Some(Meaning::Transposed(Component::TextEncoder2, "text_projection.weight".into()))
                }
                _ => open_clip(rest, Component::TextEncoder2, MOST),
            }
        } else {
            Some(Meaning::Beside)
        }
    }

    fn unet(&self, name: &str) -> Option<String> {
        let (part, rest) = name.split_once('.')?;
        match part {
            "time_embed" => match numbered(rest, "")? {
                (0, rest) => Some(format!("time_embedding.linear_1.{rest}")),
                (2, rest) => Some(format!("time_embedding.linear_2.{rest}")),
                _ => None,
            },
            "label_emb" => match numbered(rest, "0.")? {
                (0, rest) => Some(format!("add_embedding.linear_1.{rest}")),
                (2, rest) => Some(format!("add_embedding.linear_2.{rest}")),
                _ => None,
            },
            "input_blocks" => match numbered(rest, "")? {
                (0, rest) => Some(format!("conv_in.{}", rest.strip_prefix("0.")?)),
                (number, rest) => {
                    let (block, layer) = self.down.get(number - 1)?;
                    match (numbered(rest, "")?, rest.strip_prefix("0.op.")) {
                        (_, Some(rest)) => Some(format!("down_blocks.{block}.downsamplers.0.conv.{rest}")),
                        ((0, rest), _) => Some(format!("down_blocks.{block}.resnets.{layer}.{}", resnet(rest)?)),
                        ((1, rest), _) => Some(format!("down_blocks.{block}.attentions.{layer}.{rest}")),
                        _ => None,
                    }
                }
            },
            "middle_block" => match numbered(rest, "")? {
                (0, rest) => Some(format!("mid_block.resnets.0.{}", resnet(rest)?)),
                (1, rest) => Some(format!("mid_block.attentions.0.{rest}")),
                (2, rest) => Some(format!("mid_block.resnets.1.{}", resnet(rest)?)),
                _ => None,
            },
            "output_blocks" => {
                let (number, rest) = numbered(rest, "")?;
                let (block, layer) = self.up.get(number)?;
                match numbered(rest, "")? {
                    (0, rest) => Some(format!("up_blocks.{block}.resnets.{layer}.{}", resnet(rest)?)),
                    // The upsampling comes after the attention, where there is one.
                    (1 | 2, rest) if rest.starts_with("conv.") => {
                        Some(format!("up_blocks.{block}.upsamplers.0.{rest}"))
                    }
                    (1, rest) => Some(format!("up_blocks.{block}.attentions.{layer}.{rest}")),
                    _ => None,
                }
            }
            "out" => match numbered(rest, "")? {
                (0, rest) => Some(format!("conv_norm_out.{rest}")),
                (2, rest) => Some(format!("conv_out.{rest}")),
                _ => None,
            },
            _ => None,
        }
    }

    fn autoencoder(&self, name: &str) -> Option<String> {
        let (half, rest) = name.split_once('.')?;
        if matches!(half, "quant_conv" | "post_quant_conv") {
            return Some(name.to_owned());
        }
        let (part, inner) = rest.split_once('.')?;
        let inner = match (half, part) {
            (_, "conv_in" | "conv_out") => rest.to_owned(),
            (_, "norm_out") => format!("conv_norm_out.{inner}"),
            (_, "mid") => match inner.split_once('.')? {
                ("block_1", rest) => format!("mid_block.resnets.0.{rest}"),
                ("block_2", rest) => format!("mid_block.resnets.1.{rest}"),
                ("attn_1", rest) => format!("mid_block.attentions.0.{}", autoencoder_attention(rest)?),
                _ => return None,
            },
            ("encoder", "down") => {
                let (level, rest) = numbered(inner, "")?;
                match rest.strip_prefix("downsample.") {
                    Some(rest) => format!("down_blocks.{level}.downsamplers.0.{rest}"),
                    None => format!("down_blocks.{level}.{}", autoencoder_resnet(rest)?),
                }
            }
            ("decoder", "up") => {
                let (level, rest) = numbered(inner, "")?;
                let block = self.decoder_levels.checked_sub(level + 1)?;
                match rest.strip_prefix("upsample.") {
                    Some(rest) => format!("up_blocks.{block}.upsamplers.0.{rest}"),
                    None => format!("up_blocks.{block}.{}", autoencoder_resnet(rest)?),
                }
            }
            _ => return None,
        };
        matches!(half, "encoder" | "decoder").then(|| format!("{half}.{inner}"))
    }
}

/// A block and one of its layers.
type Place = (usize, usize);

/// The place of each input block but the first, and of each output block, of a UNet with so many layers in its blocks
/// on the way down.
fn numbers(layers: &[usize]) -> (Vec<Place>, Vec<Place>) {
    let last = layers.len().saturating_sub(1);
    // All blocks but the last end in a downsampling, which is counted too.
    let down = layers.iter().enumerate();
    let down = down.flat_map(|(block, &layers)| (0..layers + usize::from(block < last)).map(move |n| (block, n)));
    let up = layers.iter().rev().enumerate();
    let up = up.flat_map(|(block, &layers)| (0..=layers).map(move |layer| (block, layer)));
    (down.collect(), up.collect())
}

/// `prefix`, a number, a dot and the rest.
fn numbered<'n>(name: &'n str, prefix: &str) -> Option<(usize, &'n str)> {
    let (number, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    number.parse().ok().filter(|&number| number < MOST).map(|number| (number, rest))
}

/// A layer of the UNet's residual block.
fn resnet(name: &str) -> Option<String> {
    let parts = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    parts.iter().find_map(|(theirs, ours)| name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")))
}

/// `block.1.conv1.weight` → `resnets.1.conv1.weight`
fn autoencoder_resnet(name: &str) -> Option<String> {
    let (layer, rest) = numbered(name, "block.")?;
    match rest.strip_prefix("nin_shortcut.") {
        Some(rest) => Some(format!("resnets.{layer}.conv_shortcut.{rest}")),
        None => Some(format!("resnets.{layer}.{rest}")),
    }
}

/// A layer of the autoencoder's attention, whose layers newer converters already give today's names.
fn autoencoder_attention(name: &str) -> Option<String> {
    let (layer, part) = name.rsplit_once('.')?;
    let layer = match layer {
        "norm" => "group_norm",
        "q" | "to_q" => "to_q",
        "k" | "to_k" => "to_k",
        "v" | "to_v" => "to_v",
        "proj_out" | "to_out.0" => "to_out.0",
        _ => return None,
    };
    Some(format!("{layer}.{part}"))
}

/// OpenCLIP's text model; of its layers `used` are.
fn open_clip(name: &str, component: Component, used: usize) -> Option<Meaning> {
    let text = |name: String| Some(Meaning::Parameter(component, format!("text_model.{name}")));
    match name {
        "positional_embedding" => return text("embeddings.position_embedding.weight".into()),
        "token_embedding.weight" => return text("embeddings.token_embedding.weight".into()),
        "logit_scale" | "attn_mask" => return Some(Meaning::Nothing),
        _ => {}
    }
    if let Some(part) = name.strip_prefix("ln_final.") {
        return text(format!("final_layer_norm.{part}"));
    }
    if name.starts_with("visual.") {
        return Some(Meaning::Beside);
    }
    let (layer, rest) = numbered(name, "transformer.resblocks.")?;
    if layer >= used {
        return Some(Meaning::Nothing);
    }
    let layers = format!("encoder.layers.{layer}");
    if let Some(part) = rest.strip_prefix("attn.in_proj_") {
        let names = ["q", "k", "v"].map(|which| format!("text_model.{layers}.self_attn.{which}_proj.{part}"));
        return Some(Meaning::Parameters(component, names.into()));
    }
    let (part, ending) = rest.rsplit_once('.')?;
    let part = match part {
        "ln_1" => "layer_norm1",
        "ln_2" => "layer_norm2",
        "attn.out_proj" => "self_attn.out_proj",
        "mlp.c_fc" => "mlp.fc1",
        "mlp.c_proj" => "mlp.fc2",
        _ => return None,
    };
    text(format!("{layers}.{part}.{ending}"))
}

/// Buffers of the noise schedule and of the text encoders, scales, and marks that [`super::single_file`] reads.
fn is_buffer(name: &str) -> bool {
    const PREFIXES: [&str; 5] = ["alphas_cumprod", "log_one_minus_", "posterior_", "denoiser.", "sqrt_"];
    const NAMES: [&str; 9] = [
        "betas",
        "global_step",
        "v_pred",
        "ztsnr",
        "logvar",
        "lvlb_weights",
        "scale_factor",
        "model_ema.decay",
        "model_ema.num_updates",
    ];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || NAMES.contains(&name)
        || name.ends_with("position_ids")
        || is_scale(name)
}

/// What training leaves within the names of a network, and no network of diffusers reads.
fn is_beside(name: &str) -> bool {
    const PREFIXES: [&str; 3] = [
        // Moving averages of weights; diffusers reads the weights themselves too.
        "first_stage_model.model_ema.",
        // The discriminator that the autoencoder was trained with.
        "first_stage_model.loss.",
        "cond_stage_model.model.visual.",
    ];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_end_at_their_downsampling() {
        // Two layers, then one; the second block is the last.
        let names = ["0.0.weight", "1.0.x", "2.0.x", "3.0.op.weight", "4.0.x"];
        let names = names.map(|name| format!("model.diffusion_model.input_blocks.{name}"));
        let layout = Layout::of(names.iter().map(String::as_str));
        let name = |name: &str| match layout.meaning(&format!("model.diffusion_model.{name}")) {
            Some(Meaning::Parameter(Component::Unet, name)) => name,
            other => format!("{other:?}"),
        };
        assert_eq!(name("input_blocks.2.1.norm.bias"), "down_blocks.0.attentions.1.norm.bias");
        assert_eq!(name("input_blocks.3.0.op.weight"), "down_blocks.0.downsamplers.0.conv.weight");
        assert_eq!(name("input_blocks.4.0.in_layers.2.weight"), "down_blocks.1.resnets.0.conv1.weight");
        assert_eq!(name("output_blocks.1.1.conv.weight"), "up_blocks.0.upsamplers.0.conv.weight");
        assert_eq!(name("output_blocks.4.0.skip_connection.bias"), "up_blocks.1.resnets.2.conv_shortcut.bias");
        for unknown in ["output_blocks.5.0.in_layers.0.weight", "input_blocks.5.0.x", "input_blocks.1.2.x", "out.1.x"] {
            assert_eq!(name(unknown), "None", "{unknown}");
        }
        // A number that would make a layout of gigabytes.
        let damaged = Layout::of(["model.diffusion_model.input_blocks.99999999999.0.weight"]);
        assert!(damaged.down.is_empty());
    }

    #[test]
    fn open_clips_projections_are_three_in_one_and_its_last_layer_is_not_used() {
        let layout = Layout::of([]);
        let meaning = |name: &str| layout.meaning(&format!("cond_stage_model.model.{name}"));
        let name = |which| format!("text_model.encoder.layers.22.self_attn.{which}_proj.bias");
        let three = Meaning::Parameters(Component::TextEncoder, vec![name("q"), name("k"), name("v")]);
        assert_eq!(meaning("transformer.resblocks.22.attn.in_proj_bias"), Some(three));
        assert_eq!(meaning("transformer.resblocks.23.attn.in_proj_bias"), Some(Meaning::Nothing));
        assert_eq!(meaning("transformer.resblocks.1.mlp.c_fc2.bias"), None);
    }

    #[test]
    fn buffers_and_moving_averages_are_nothing_and_strangers_are_unknown() {
        let layout = Layout::of([]);
        for name in [
            "betas",
            "sqrt_recip_alphas_cumprod",
            "alphas_cumprod_prev",
            "ztsnr",
            "v_pred",
            "scaled_fp8",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
            "model.diffusion_model.input_blocks.1.1.proj_in.scale_weight",
        ] {
            assert_eq!(layout.meaning(name), Some(Meaning::Nothing), "{name}");
        }
        for name in [
            "model_ema.diffusion_modelout0weight",
            "first_stage_model.loss.logvar",
            "embedding_manager.string_to_param_dict.*",
            "optimizer_states.0.exp_avg",
            "cond_stage_model.logit_scale",
            "cond_stage_model.transformer.visual_projection.weight",
            "cond_stage_model.transformer.text_projection.weight",
            "cond_stage_model.transformer.vision_model.encoder.layers.0.mlp.fc1.bias",
            "cond_stage_model.model.visual.proj",
            "conditioner.embedders.0.logit_scale",
        ] {
            assert_eq!(layout.meaning(name), Some(Meaning::Beside), "{name}");
        }
        for name in [
            "first_stage_model.encoder.up.0.block.0.conv1.bias",
            "model.diffusion_model.x.y",
            "cond_stage_model.transformer.text_model.adapter.weight",
            "cond_stage_model.model.transformer.resblocks.0.adapter.weight",
        ] {
            assert_eq!(layout.meaning(name), None, "{name}");
        }
    }

    #[test]
    fn every_name_of_the_real_files_is_right() {
        let beside = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
        let named = std::env::var_os("PALETTIST_SHARED").map(Into::into);
        let Some(data) = [Some(beside), named].into_iter().flatten().find(|data| data.join("sd_configs").is_dir())
        else {
            crate::terminal::tell(format_args!("skipped: no shared data (set PALETTIST_SHARED to its folder)"));
            return;
        };
        for (model, entries) in [("sd15", 1130), ("sd21-base", 1214), ("sdxl-base-1.0", 2513)] {
            let bytes = std::fs::read(data.join("sd_configs").join(model).join("ldm_key_map.json")).unwrap();
            let map: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(map.len(), entries);
            let layout = Layout::of(map.keys().map(String::as_str));
            let named = |entry: &serde_json::Value| entry["diffusers"].as_str().unwrap().to_owned();
            for (name, entry) in &map {
                let component = Component::ALL.into_iter().find(|c| entry["component"] == c.folder()).unwrap();
                let wanted = match entry.get("diffusers_cat_dim0") {
                    Some(three) => Meaning::Parameters(component, serde_json::from_value(three.clone()).unwrap()),
                    None if entry["transpose"] == true => Meaning::Transposed(component, named(entry)),
                    None => Meaning::Parameter(component, named(entry)),
                };
                assert_eq!(layout.meaning(name), Some(wanted), "{name}");
            }
        }
    }
}
