//! Which models a LoRA was made for, as far as its tensors tell.

use std::fmt;

use super::super::Component;
use super::file::LoraFile;
use super::form::Form;
use super::modules::networks;

/// A family of models that share the sizes of their layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    One,
    Two,
    Xl,
    /// The refiner of XL.
    Refiner,
    Flux,
    /// Another model with a transformer in place of the UNet.
    Transformer,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Family::One => "Stable Diffusion 1",
            Family::Two => "Stable Diffusion 2",
            Family::Xl => "Stable Diffusion XL",
            Family::Refiner => "the refiner of Stable Diffusion XL",
            Family::Flux => "Flux",
            Family::Transformer => "a model with a transformer in place of the UNet",
        })
    }
}

impl Family {
    /// That of a model whose UNet reads text embeddings of this width; none where no known one has it.
    pub fn of_model(is_xl: bool, width: i64) -> Option<Self> {
        match width {
            _ if is_xl => Some(Self::Xl),
            768 => Some(Self::One),
            1024 => Some(Self::Two),
            _ => None,
        }
    }

    /// That of a LoRA, by the width of the text embeddings that its layers read, and by its networks.
    pub fn of_lora(file: &LoraFile) -> Option<Self> {
        let mut found = None;
        for (spelled, parts) in &file.layers {
            let flat = spelled.replace('.', "_");
            if ["double_blocks_", "single_blocks_", "single_transformer_blocks_"].iter().any(|part| flat.contains(part))
            {
                return Some(Self::Flux);
            }
            if flat.starts_with("transformer_")
                || flat.starts_with("lora_transformer_")
                || flat.contains("joint_blocks_")
            {
                found = Some(Self::Transformer);
                continue;
            }
            let (of, name) = networks(spelled);
            let is_xl =
                of == [Component::TextEncoder2] || name.starts_with("label_emb") || name.starts_with("add_embedding");
            if is_xl {
                return Some(Self::Xl);
            }
            let inputs = || Form::of(parts).ok().flatten().and_then(|form| form.inputs(file));
            // In a UNet only what reads the text has inputs of these widths; cloneofsimo's layers have no names.
            let reads_text = flat.contains("attn2_to_k") || flat.contains("attn2_to_v") || spelled.starts_with("unet:");
            found = match inputs().filter(|_| reads_text) {
                Some(768) => Some(Self::One),
                Some(1024) => Some(Self::Two),
                Some(2048) => Some(Self::Xl),
                // A UNet's own width too, where names do not tell.
                Some(1280) if !spelled.starts_with("unet:") => Some(Self::Refiner),
                _ => found,
            };
            if found.is_none() && flat.contains("self_attn") && inputs() == Some(1024) {
                found = Some(Self::Two);
            }
        }
        found
    }
}
