//! Files of one network alone, which many tools write: a UNet or an autoencoder, in latent-diffusion's names or diffusers',
//! behind one prefix or another.

use std::borrow::Cow;

use super::{Component, names};

/// What a whole checkpoint begins the names of its UNet with.
pub(super) const UNET: &str = "model.diffusion_model.";
/// What a whole checkpoint begins the names of its autoencoder with.
pub(super) const AUTOENCODER: &str = "first_stage_model.";

/// What a tensor of the file is.
#[derive(Debug, PartialEq)]
pub enum Meaning {
    /// The parameter of this diffusers name.
    Parameter(Component, String),
    /// The parameters of these diffusers names, one upon the other along the first axis.
    Parameters(Component, Vec<String>),
    /// The parameter of this diffusers name, its two axes the other way round.
    Transposed(Component, String),
    /// A buffer that every such file may have, and that says nothing of its own.
    Nothing,
    /// Beside the networks: moving averages, parts that are not used, what training left.
    Beside,
}

/// What files of a UNet alone begin its names with.
const UNET_PREFIXES: [&str; 4] = ["diffusion_model.", "model.", "unet.", ""];
/// What files of an autoencoder alone begin its names with.
const AUTOENCODER_PREFIXES: [&str; 3] = ["vae.", "autoencoder.", ""];
/// First parts of the names of latent-diffusion's UNet.
const UNET_PARTS: [&str; 6] = ["input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."];
/// The same of diffusers' names.
const DIFFUSERS_UNET_PARTS: [&str; 8] = [
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "add_embedding.",
    "conv_in.",
    "conv_norm_out.",
    "conv_out.",
];
/// First parts of the names of an autoencoder, whoever's.
const AUTOENCODER_PARTS: [&str; 4] = ["encoder.", "decoder.", "quant_conv.", "post_quant_conv."];

/// How a file of one network alone calls its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Alone {
    /// It is a whole checkpoint.
    #[default]
    No,
    /// latent-diffusion's names of this network behind another prefix than a whole checkpoint's.
    Ldm { component: Component, prefix: &'static str },
    /// diffusers' names behind this prefix.
    Diffusers { component: Component, prefix: &'static str },
}

impl Alone {
    pub(super) fn of(names: &[&str]) -> Self {
        let has = |prefix: &str, part: &str| {
            names.iter().any(|name| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(part)))
        };
        if has(UNET, "") || has(AUTOENCODER, "") {
            return Self::No;
        }
        let unet = UNET_PREFIXES.into_iter().find_map(|prefix| {
            let component = Component::Unet;
            match (has(prefix, "input_blocks."), has(prefix, "down_blocks.")) {
                (true, _) => Some(Self::Ldm { component, prefix }),
                (_, true) => Some(Self::Diffusers { component, prefix }),
                _ => None,
            }
        });
        let autoencoder = || {
            AUTOENCODER_PREFIXES.into_iter().find_map(|prefix| {
                let component = Component::Autoencoder;
                match (has(prefix, "decoder.up."), has(prefix, "decoder.up_blocks.")) {
                    (true, _) => Some(Self::Ldm { component, prefix }),
                    (_, true) => Some(Self::Diffusers { component, prefix }),
                    _ => None,
                }
            })
        };
        unet.or_else(autoencoder).unwrap_or_default()
    }

    /// The name that a whole checkpoint has for the tensor `name`; a parameter where it has diffusers' name.
    pub(super) fn whole<'n>(&self, name: &'n str) -> Result<Cow<'n, str>, Meaning> {
        match *self {
            Self::Ldm { component: Component::Unet, prefix } => match name.strip_prefix(prefix) {
                Some(rest) if UNET_PARTS.iter().any(|part| rest.starts_with(part)) => {
                    Ok(format!("{UNET}{rest}").into())
                }
                _ => Ok(name.into()),
            },
            Self::Ldm { prefix, .. } => match name.strip_prefix(prefix) {
                Some(rest) if AUTOENCODER_PARTS.iter().any(|part| rest.starts_with(part)) => {
                    Ok(format!("{AUTOENCODER}{rest}").into())
                }
                _ => Ok(name.into()),
            },
            Self::Diffusers { component, prefix } => {
                let parts: &[&str] =
                    if component == Component::Unet { &DIFFUSERS_UNET_PARTS } else { &AUTOENCODER_PARTS };
                let rest = name.strip_prefix(prefix).filter(|rest| parts.iter().any(|part| rest.starts_with(part)));
                match rest.and_then(|rest| names::today(component.into(), rest)) {
                    Some(name) => Err(Meaning::Parameter(component, name)),
                    None => Ok(name.into()),
                }
            }
            Self::No => Ok(name.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ldm::Layout;
    use super::*;

    #[test]
    fn networks_alone_have_any_usual_prefix() {
        let of = |names: [&str; 2]| {
            let layout = Layout::of(names);
            names.map(|name| match layout.meaning(name) {
                Some(Meaning::Parameter(component, name)) => format!("{}/{name}", component.folder()),
                other => format!("{other:?}"),
            })
        };
        let unet = ["unet/conv_in.weight", "unet/time_embedding.linear_1.bias"];
        for prefix in ["model.diffusion_model.", "diffusion_model.", "model.", ""] {
            let names = [format!("{prefix}input_blocks.0.0.weight"), format!("{prefix}time_embed.0.bias")];
            assert_eq!(of([&names[0], &names[1]]), unet, "{prefix}");
        }
        for prefix in ["unet.", ""] {
            let names = [format!("{prefix}down_blocks.0.x"), format!("{prefix}conv_in.weight")];
            assert_eq!(of([&names[0], &names[1]]), ["unet/down_blocks.0.x", "unet/conv_in.weight"], "{prefix}");
        }
        let names = ["decoder.up.0.block.0.conv1.bias", "quant_conv.bias"];
        assert_eq!(of(names), ["vae/decoder.up_blocks.0.resnets.0.conv1.bias", "vae/quant_conv.bias"]);
        let names = ["decoder.up_blocks.0.x", "decoder.mid_block.attentions.0.query.bias"];
        assert_eq!(of(names), ["vae/decoder.up_blocks.0.x", "vae/decoder.mid_block.attentions.0.to_q.bias"]);
    }
}
