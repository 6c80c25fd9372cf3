//! The layers of a network under the names that files of LoRAs have for them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::ldm::Layout;
use super::super::{Component, names};
use super::NETWORKS;
use crate::ops::Parameter;

/// The layers of one network.
pub struct Modules {
    pub component: Component,
    /// Shapes of the weight and of the bias, by the layer's name of today.
    layers: BTreeMap<String, Shapes>,
    /// Today's names by those with `_` for `.`, as kohya writes them.
    flat: HashMap<String, String>,
    /// latent-diffusion's numbers of a UNet's blocks.
    layout: Option<Layout>,
}

/// The shapes of a layer's parameters, as far as it has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shapes {
    pub weight: Option<Vec<i64>>,
    pub bias: Option<Vec<i64>>,
}

impl Modules {
    pub fn new(component: Component, parameters: &[Parameter]) -> Self {
        let mut layers: BTreeMap<String, Shapes> = BTreeMap::new();
        for parameter in parameters {
            let Some((layer, part)) = parameter.name.rsplit_once('.') else { continue };
            let shapes = layers.entry(layer.to_owned()).or_default();
            match part {
                "weight" => shapes.weight = Some(parameter.shape.clone()),
                "bias" => shapes.bias = Some(parameter.shape.clone()),
                _ => {}
            }
        }
        let flat = layers.keys().map(|name| (name.replace('.', "_"), name.clone())).collect();
        let layout = (component == Component::Unet)
            .then(|| Layout::of_diffusers(parameters.iter().map(|parameter| parameter.name.as_str())));
        Self { component, layers, flat, layout }
    }

    /// Names of all layers.
    pub fn names(&self) -> BTreeSet<&str> {
        self.layers.keys().map(String::as_str).collect()
    }

    pub fn shapes(&self, layer: &str) -> Shapes {
        self.layers.get(layer).cloned().unwrap_or_default()
    }

    /// Today's name of the layer that a file calls `spelled`, without the network's prefix.
    pub fn find(&self, spelled: &str) -> Option<&str> {
        let of_layer = |name: &str| self.layers.get_key_value(name).map(|(name, _)| name.as_str());
        let of_flat = |flat: &str| self.flat.get(flat).map(String::as_str);
        // Text encoders of transformers 5 have no `text_model.`.
        let today = names::today(self.component.into(), &format!("{spelled}.weight"));
        let today = today.as_deref().and_then(|name| name.strip_suffix(".weight"));
        let text = (self.component != Component::Unet).then(|| format!("text_model_{spelled}"));
        of_layer(spelled)
            .or_else(|| today.and_then(of_layer))
            .or_else(|| of_flat(spelled))
            .or_else(|| text.and_then(|text| of_flat(&text)))
            .or_else(|| {
                let renamed = self.layout.as_ref()?.unet_module(&dotted(&spelled.replace('.', "_"))?)?;
                of_flat(&renamed.replace('.', "_"))
            })
    }
}

/// latent-diffusion's name of a layer with the dots that kohya's has not, as far as the blocks' names tell them:
/// `input_blocks_4_1_proj_in` is `input_blocks.4.1.proj_in`.
fn dotted(flat: &str) -> Option<String> {
    const WHOLE: [(&str, &str); 6] = [
        ("time_embed_0", "time_embed.0"),
        ("time_embed_2", "time_embed.2"),
        ("label_emb_0_0", "label_emb.0.0"),
        ("label_emb_0_2", "label_emb.0.2"),
        ("out_0", "out.0"),
        ("out_2", "out.2"),
    ];
    // Parts of residual blocks, of which the number is a name's end.
    const PARTS: [(&str, &str); 6] = [
        ("in_layers_0", "in_layers.0"),
        ("in_layers_2", "in_layers.2"),
        ("emb_layers_1", "emb_layers.1"),
        ("out_layers_0", "out_layers.0"),
        ("out_layers_3", "out_layers.3"),
        ("skip_connection", "skip_connection"),
    ];
    if let Some((_, name)) = WHOLE.iter().find(|(whole, _)| *whole == flat) {
        return Some((*name).to_owned());
    }
    let (block, rest) = ["input_blocks_", "middle_block_", "output_blocks_"]
        .into_iter()
        .find_map(|block| Some((block.trim_end_matches('_'), flat.strip_prefix(block)?)))?;
    let mut words = rest.split('_');
    let numbers = if block == "middle_block" { 1 } else { 2 };
    let mut name = block.to_owned();
    for _ in 0..numbers {
        let number: usize = words.next()?.parse().ok()?;
        name = format!("{name}.{number}");
    }
    let rest = words.collect::<Vec<_>>().join("_");
    let part = PARTS.iter().find(|(part, _)| *part == rest).map_or(rest.as_str(), |(_, part)| part);
    Some(if part.is_empty() { name } else { format!("{name}.{part}") })
}

/// Which networks a layer's name in a file is of, and its name without their prefix. A name without one may be of any.
pub fn networks(spelled: &str) -> (&'static [Component], &str) {
    const UNET: &[Component] = &[Component::Unet];
    const FIRST: &[Component] = &[Component::TextEncoder];
    const SECOND: &[Component] = &[Component::TextEncoder2];
    const ANY: &[Component] = &NETWORKS;
    const PREFIXES: [(&str, &[Component]); 10] = [
        ("lora_unet_", UNET),
        ("lora_te1_", FIRST),
        ("lora_te2_", SECOND),
        ("lora_te_", FIRST),
        ("lycoris_", ANY),
        ("unet.", UNET),
        ("text_encoder_2.", SECOND),
        ("text_encoder.", FIRST),
        ("model.diffusion_model.", UNET),
        ("diffusion_model.", UNET),
    ];
    const WRAPPER: &str = "base_model.model.";
    let spelled = spelled.strip_prefix(WRAPPER).unwrap_or(spelled);
    let found = PREFIXES.iter().find_map(|(prefix, of)| Some((*of, spelled.strip_prefix(prefix)?)));
    let (of, rest) = found.unwrap_or((ANY, spelled));
    (of, rest.strip_prefix(WRAPPER).unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Initial;

    fn modules(component: Component, names: &[&str]) -> Modules {
        let parameters: Vec<Parameter> = names
            .iter()
            .map(|name| Parameter {
                name: format!("{name}.weight"),
                shape: vec![2, 2],
                initial: Initial::Constant(0.0),
                palettizable: true,
            })
            .collect();
        Modules::new(component, &parameters)
    }

    #[test]
    fn a_unets_layers_are_found_by_every_name() {
        let unet = modules(
            Component::Unet,
            &[
                "conv_in",
                "time_embedding.linear_2",
                "add_embedding.linear_1",
                "down_blocks.0.resnets.0.conv1",
                "down_blocks.0.downsamplers.0.conv",
                "down_blocks.1.resnets.0.conv_shortcut",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
                "mid_block.attentions.0.proj_in",
                "mid_block.resnets.1.time_emb_proj",
                "up_blocks.0.resnets.0.conv2",
                "up_blocks.0.resnets.1.conv2",
                "up_blocks.0.upsamplers.0.conv",
                "up_blocks.1.resnets.1.conv2",
                "conv_out",
            ],
        );
        for (spelled, name) in [
            ("conv_in", "conv_in"),
            ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv1"),
            ("mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
            ("input_blocks_0_0", "conv_in"),
            ("input_blocks.0.0", "conv_in"),
            ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
            ("input_blocks_2_0_op", "down_blocks.0.downsamplers.0.conv"),
            ("input_blocks_3_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
            (
                "input_blocks_3_1_transformer_blocks_0_attn1_to_out_0",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            ),
            ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
            ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
            ("output_blocks_1_0_out_layers_3", "up_blocks.0.resnets.1.conv2"),
            ("output_blocks_1_1_conv", "up_blocks.0.upsamplers.0.conv"),
            ("output_blocks_3_0_out_layers_3", "up_blocks.1.resnets.1.conv2"),
            ("time_embed_2", "time_embedding.linear_2"),
            ("label_emb_0_0", "add_embedding.linear_1"),
            ("out_2", "conv_out"),
        ] {
            assert_eq!(unet.find(spelled), Some(name), "{spelled}");
        }
        for spelled in
            ["input_blocks_9_0_op", "input_blocks_x", "mid_block", "output_blocks_99999999999999999999_0", ""]
        {
            assert_eq!(unet.find(spelled), None, "{spelled}");
        }
    }

    #[test]
    fn prefixes_name_the_network() {
        let text = modules(Component::TextEncoder, &["text_model.encoder.layers.0.self_attn.q_proj"]);
        for spelled in [
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_encoder_layers_0_self_attn_q_proj",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder.encoder.layers.0.self_attn.q_proj",
            "text_encoder.base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
        ] {
            let (of, rest) = networks(spelled);
            assert!(of.contains(&Component::TextEncoder), "{spelled}");
            assert_eq!(text.find(rest), Some("text_model.encoder.layers.0.self_attn.q_proj"), "{spelled}");
        }
        assert_eq!(networks("lora_te2_x"), (&[Component::TextEncoder2][..], "x"));
        assert_eq!(networks("diffusion_model.x"), (&[Component::Unet][..], "x"));
    }
}
