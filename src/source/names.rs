//! Tensor names through the versions of diffusers and transformers, mapped to those that the networks ask for.

use super::{Component, Network};

/// Today's name of a tensor of `network` that a file calls `name`; `None` for what is no parameter.
///
/// - Text encoder: transformers 5 writes names without the prefix `text_model.`; transformers before 4.31 also wrote
///   the buffer `position_ids`.
/// - Safety checker: transformers before 5 wrote `vision_model.` twice; before 4.31 also the buffer `position_ids`.
/// - CLIP: transformers before 4.31 also wrote both encoders' buffers `position_ids`.
/// - Autoencoder: diffusers before 0.12 called the linear layers of its attention `query`, `key`, `value`, `proj_attn`.
pub fn today(network: Network, name: &str) -> Option<String> {
    let component = match network {
        Network::Of(component) => component,
        Network::Clip => return (!name.ends_with("_model.embeddings.position_ids")).then(|| name.to_owned()),
    };
    match component {
        Component::Unet => Some(name.to_owned()),
        // What the second one is projected by lies beside its `text_model`.
        Component::TextEncoder2 if name.starts_with("text_projection.") => Some(name.to_owned()),
        Component::TextEncoder | Component::TextEncoder2 => {
            let bare = name.strip_prefix("text_model.").unwrap_or(name);
            (bare != "embeddings.position_ids").then(|| format!("text_model.{bare}"))
        }
        Component::SafetyChecker => {
            let bare = name.strip_prefix("vision_model.vision_model.").or(name.strip_prefix("vision_model."));
            match bare {
                None => Some(name.to_owned()),
                Some("embeddings.position_ids") => None,
                Some(bare) => Some(format!("vision_model.{bare}")),
            }
        }
        Component::Autoencoder => {
            let renamed = attention_layer(name).and_then(|(attention, layer, part)| {
                let layer = match layer {
                    "query" => "to_q",
                    "key" => "to_k",
                    "value" => "to_v",
                    "proj_attn" => "to_out.0",
                    _ => return None,
                };
                Some(format!("{attention}.{layer}.{part}"))
            });
            Some(renamed.unwrap_or_else(|| name.to_owned()))
        }
    }
}

/// The shape that the network has for a tensor of today's `name` stored as `shape`: the layers of the autoencoder's
/// attention were once written as 1×1 convolutions, `[out, in, 1, 1]`, and are linear, `[out, in]`.
pub fn today_shape(network: Network, name: &str, shape: &[i64]) -> Vec<i64> {
    match shape {
        [out, inner, 1, 1]
            if network == Network::Of(Component::Autoencoder) && name.contains("mid_block.attentions.") =>
        {
            vec![*out, *inner]
        }
        _ => shape.to_vec(),
    }
}

/// `decoder.mid_block.attentions.0`, `query`, `weight`.
fn attention_layer(name: &str) -> Option<(&str, &str, &str)> {
    let (path, part) = name.rsplit_once('.')?;
    let (attention, layer) = path.rsplit_once('.')?;
    attention.contains("mid_block.attentions.").then_some((attention, layer, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_become_todays() {
        let old = |component, name| today(Network::Of(component), name);
        let today_shape = |component, name, shape| today_shape(Network::Of(component), name, shape);
        let vae = Component::Autoencoder;
        assert_eq!(
            old(vae, "decoder.mid_block.attentions.0.proj_attn.bias").unwrap(),
            "decoder.mid_block.attentions.0.to_out.0.bias"
        );
        assert_eq!(
            old(vae, "encoder.mid_block.attentions.0.key.weight").unwrap(),
            "encoder.mid_block.attentions.0.to_k.weight"
        );
        for name in ["encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid_block.resnets.0.conv1.weight"] {
            assert_eq!(old(vae, name).unwrap(), name);
        }
        let text = Component::TextEncoder;
        for name in ["text_model.final_layer_norm.weight", "final_layer_norm.weight"] {
            assert_eq!(old(text, name).unwrap(), "text_model.final_layer_norm.weight");
        }
        for name in ["text_model.embeddings.position_ids", "embeddings.position_ids"] {
            assert_eq!(old(text, name), None);
        }
        let checker = Component::SafetyChecker;
        for name in ["vision_model.vision_model.pre_layrnorm.bias", "vision_model.pre_layrnorm.bias"] {
            assert_eq!(old(checker, name).unwrap(), "vision_model.pre_layrnorm.bias");
        }
        assert_eq!(old(checker, "vision_model.vision_model.embeddings.position_ids"), None);
        assert_eq!(old(checker, "concept_embeds").unwrap(), "concept_embeds");
        for name in ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"] {
            assert_eq!(today(Network::Clip, name), None);
        }
        assert_eq!(today(Network::Clip, "logit_scale").unwrap(), "logit_scale");
        let name = "decoder.mid_block.attentions.0.to_q.weight";
        assert_eq!(today_shape(vae, name, &[8, 8, 1, 1]), [8, 8]);
        assert_eq!(today_shape(vae, "decoder.conv_in.weight", &[8, 8, 1, 1]), [8, 8, 1, 1]);
    }
}
