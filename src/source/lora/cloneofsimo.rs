//! cloneofsimo's files count layers instead of naming them: in the order in which PyTorch walks through the modules of
//! diffusers 0.10 of which they are, as `lora_diffusion` did.

use std::collections::BTreeSet;

use super::super::Component;

/// The layers of `component` in that order, given the names of all layers and the classes in which `targets` has it look.
///
/// In the UNet blocks on the way up come before the middle one, attentions before residual blocks, and of a transformer
/// block the second attention comes last. In the text encoder keys come first.
///
/// # Errors
/// A class whose layers are not known here.
pub fn order(component: Component, targets: &[String], layers: &BTreeSet<&str>) -> Result<Vec<String>, String> {
    let mut wanted = Wanted::default();
    for target in targets {
        match (component, target.as_str()) {
            (Component::Unet, "CrossAttention" | "Attention") => wanted.attention = true,
            (Component::Unet, "GEGLU") => wanted.gate = true,
            (Component::Unet, "ResnetBlock2D") => wanted.resnets = true,
            (Component::TextEncoder | Component::TextEncoder2, "CLIPAttention") => wanted.attention = true,
            _ => return Err(format!("layers in {target}")),
        }
    }
    let candidates = if component == Component::Unet { unet(layers, &wanted) } else { text_encoder(layers) };
    Ok(candidates.into_iter().filter(|name| layers.contains(name.as_str())).collect())
}

/// Classes of diffusers in which layers are looked for.
#[derive(Default)]
struct Wanted {
    attention: bool,
    gate: bool,
    resnets: bool,
}

/// The numbers that follow `prefix` in names of layers, in order.
fn numbers(layers: &BTreeSet<&str>, prefix: &str) -> BTreeSet<usize> {
    let number = |name: &&str| name.strip_prefix(prefix)?.split('.').next()?.parse().ok();
    layers.iter().filter_map(number).collect()
}

fn unet(layers: &BTreeSet<&str>, wanted: &Wanted) -> Vec<String> {
    let mut found = Vec::new();
    let mut blocks = Vec::new();
    for way in ["down_blocks.", "up_blocks."] {
        blocks.extend(numbers(layers, way).into_iter().map(|number| format!("{way}{number}.")));
    }
    blocks.push("mid_block.".to_owned());
    for block in blocks {
        let attentions = format!("{block}attentions.");
        for attention in numbers(layers, &attentions) {
            let transformers = format!("{attentions}{attention}.transformer_blocks.");
            for transformer in numbers(layers, &transformers) {
                let parts = [("attn1", wanted.attention), ("ff", wanted.gate), ("attn2", wanted.attention)];
                for (part, _) in parts.into_iter().filter(|(_, wanted)| *wanted) {
                    let names: &[&str] =
                        if part == "ff" { &["net.0.proj"] } else { &["to_q", "to_k", "to_v", "to_out.0"] };
                    found.extend(names.iter().map(|name| format!("{transformers}{transformer}.{part}.{name}")));
                }
            }
        }
        let resnets = format!("{block}resnets.");
        for resnet in numbers(layers, &resnets).into_iter().filter(|_| wanted.resnets) {
            let names = ["conv1", "time_emb_proj", "conv2", "conv_shortcut"];
            found.extend(names.iter().map(|name| format!("{resnets}{resnet}.{name}")));
        }
    }
    found
}

fn text_encoder(layers: &BTreeSet<&str>) -> Vec<String> {
    let prefix = "text_model.encoder.layers.";
    let names = ["k_proj", "v_proj", "q_proj", "out_proj"];
    let of = |layer: usize| names.map(|name| format!("{prefix}{layer}.self_attn.{name}"));
    numbers(layers, prefix).into_iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_in_the_order_of_pytorchs_walk() {
        let transformer = |at: &str| {
            ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "ff.net.0.proj", "ff.net.2"]
                .map(|name| format!("{at}.transformer_blocks.0.{name}"))
        };
        let mut names: Vec<String> =
            ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"]
                .into_iter()
                .flat_map(transformer)
                .collect();
        names.extend(["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv_shortcut"].map(String::from));
        let layers: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let targets = |classes: &[&str]| classes.iter().map(|class| class.to_string()).collect::<Vec<_>>();
        let found = order(Component::Unet, &targets(&["Attention", "GEGLU"]), &layers).unwrap();
        assert_eq!(found.len(), 18);
        assert_eq!(
            found[4..6],
            ["ff.net.0.proj", "attn2.to_q"].map(|n| { format!("down_blocks.0.attentions.0.transformer_blocks.0.{n}") })
        );
        assert!(found[6].starts_with("up_blocks.1.") && found[12].starts_with("mid_block."), "{found:?}");
        let all = order(Component::Unet, &targets(&["ResnetBlock2D", "CrossAttention", "GEGLU"]), &layers).unwrap();
        assert_eq!(all[6..8], ["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv_shortcut"]);
        assert!(order(Component::Unet, &targets(&["Upsample2D"]), &layers).unwrap_err().contains("Upsample2D"));
    }
}
