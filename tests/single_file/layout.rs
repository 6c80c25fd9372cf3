//! Files in latent-diffusion's layout: small ones of random diffusers weights, by the inverse of the names, and sparse ones
//! of any size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use palettist::networks::autoencoder::AutoencoderConfig;
use palettist::networks::text_encoder::TextEncoderConfig;
use palettist::networks::unet::UnetConfig;
use palettist::ops::Weights;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::CPU;

/// The configurations of a small model: (UNet, text encoder, autoencoder).
pub fn small(version: u8) -> [Value; 3] {
    let (first, layers, heads) = if version == 1 { (32, 2, json!(8)) } else { (64, 23, json!([1, 1])) };
    let unet = json!({
        "block_out_channels": [first, 64], "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": heads,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": version == 2,
    });
    let text = json!({
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 1,
        "eos_token_id": 2, "hidden_act": if version == 1 { "quick_gelu" } else { "gelu" },
    });
    let autoencoder = json!({
        "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "latent_channels": 4,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
    });
    [unet, text, autoencoder]
}

/// Random fp16 weights of [`small`], in the order of [`Component::ALL`].
pub fn random_weights(configs: &[Value; 3]) -> [Weights; 3] {
    tch::manual_seed(7);
    let parameters = [
        UnetConfig::from_json(&configs[0]).unwrap().parameters(),
        TextEncoderConfig::from_json(&configs[1]).unwrap().parameters(),
        AutoencoderConfig::from_json(&configs[2]).unwrap().parameters(),
    ];
    parameters.map(|list| {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, CPU)) * 0.05;
        list.iter().map(|p| (p.name.clone(), random(&p.shape).to_kind(Kind::Half))).collect()
    })
}

/// latent-diffusion's name for a parameter of diffusers' UNet whose blocks have `layers` layers each.
pub fn ldm_unet(name: &str, layers: &[usize]) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let number = |i: usize| parts[i].parse::<usize>().unwrap();
    let rest = |from: usize| parts[from..].join(".");
    let inner = |from: usize| match (parts[from], rest(from + 1)) {
        ("norm1", rest) => format!("in_layers.0.{rest}"),
        ("conv1", rest) => format!("in_layers.2.{rest}"),
        ("time_emb_proj", rest) => format!("emb_layers.1.{rest}"),
        ("norm2", rest) => format!("out_layers.0.{rest}"),
        ("conv2", rest) => format!("out_layers.3.{rest}"),
        ("conv_shortcut", rest) => format!("skip_connection.{rest}"),
        (other, _) => panic!("{other}"),
    };
    let name = match parts[0] {
        "conv_in" => format!("input_blocks.0.0.{}", parts[1]),
        "conv_norm_out" => format!("out.0.{}", parts[1]),
        "conv_out" => format!("out.2.{}", parts[1]),
        "time_embedding" => format!("time_embed.{}.{}", if parts[1] == "linear_1" { 0 } else { 2 }, parts[2]),
        "mid_block" if parts[1] == "attentions" => format!("middle_block.1.{}", rest(3)),
        "mid_block" => format!("middle_block.{}.{}", 2 * number(2), inner(3)),
        "down_blocks" => {
            let first = 1 + layers[..number(1)].iter().map(|layers| layers + 1).sum::<usize>();
            match parts[2] {
                "resnets" => format!("input_blocks.{}.0.{}", first + number(3), inner(4)),
                "attentions" => format!("input_blocks.{}.1.{}", first + number(3), rest(4)),
                _ => format!("input_blocks.{}.0.op.{}", first + layers[number(1)], parts[5]),
            }
        }
        "up_blocks" => {
            let reversed: Vec<usize> = layers.iter().rev().map(|layers| layers + 1).collect();
            let first: usize = reversed[..number(1)].iter().sum();
            match parts[2] {
                "resnets" => format!("output_blocks.{}.0.{}", first + number(3), inner(4)),
                "attentions" => format!("output_blocks.{}.1.{}", first + number(3), rest(4)),
                // Deeper blocks have no attention here.
                _ => format!("output_blocks.{}.1.conv.{}", first + reversed[number(1)] - 1, parts[5]),
            }
        }
        other => panic!("{other}"),
    };
    format!("model.diffusion_model.{name}")
}

/// latent-diffusion's name for a parameter of diffusers' autoencoder of four resolutions.
fn ldm_autoencoder(name: &str) -> String {
    let mut name = name.replace("down_blocks", "down").replace("downsamplers.0", "downsample");
    for up in 0..4 {
        name = name.replace(&format!("up_blocks.{up}."), &format!("up.{}.", 3 - up));
    }
    for (ours, theirs) in [
        ("upsamplers.0", "upsample"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("resnets", "block"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ] {
        name = name.replace(ours, theirs);
    }
    format!("first_stage_model.{name}")
}

/// The tensors of a single file, as scripts write them: attention of the autoencoder as 1×1 convolutions, buffers, moving
/// averages, and for version 2 OpenCLIP's names, projections in one, and a last layer that is not used.
pub fn ldm(version: u8, weights: &[Weights; 3]) -> BTreeMap<String, Tensor> {
    let mut file = BTreeMap::new();
    for (name, tensor) in &weights[0] {
        file.insert(ldm_unet(name, &[1, 1]), tensor.shallow_clone());
    }
    for (name, tensor) in &weights[2] {
        let convolution = name.contains("attentions") && tensor.dim() == 2;
        let tensor = if convolution { tensor.unsqueeze(-1).unsqueeze(-1) } else { tensor.shallow_clone() };
        file.insert(ldm_autoencoder(name), tensor);
    }
    for (name, tensor) in &weights[1] {
        if version == 1 {
            file.insert(format!("cond_stage_model.transformer.{name}"), tensor.shallow_clone());
            continue;
        }
        let name = name.trim_start_matches("text_model.");
        let theirs = match name {
            "embeddings.position_embedding.weight" => "positional_embedding".to_owned(),
            "embeddings.token_embedding.weight" => "token_embedding.weight".to_owned(),
            _ => name
                .replace("final_layer_norm", "ln_final")
                .replace("encoder.layers", "transformer.resblocks")
                .replace("layer_norm", "ln_")
                .replace("fc1", "c_fc")
                .replace("fc2", "c_proj")
                .replace("self_attn.out_proj", "attn.out_proj"),
        };
        let (tensor, theirs) = match theirs.split_once("self_attn.q_proj.") {
            None if theirs.contains("self_attn.") => continue,
            None => (tensor.shallow_clone(), theirs),
            Some((layer, part)) => {
                let key = |which: &str| &weights[1][&format!("text_model.{}", name.replace("q_proj", which))];
                let three = Tensor::cat(&["q_proj", "k_proj", "v_proj"].map(key), 0);
                (three, format!("{layer}attn.in_proj_{part}"))
            }
        };
        if theirs.starts_with("transformer.resblocks.22.") {
            let last = theirs.replace("resblocks.22", "resblocks.23");
            file.insert(format!("cond_stage_model.model.{last}"), tensor.zeros_like());
        }
        file.insert(format!("cond_stage_model.model.{theirs}"), tensor);
    }
    let number = |value: i64| Tensor::from(value);
    if version == 1 {
        let ids = Tensor::arange(77, (Kind::Int64, CPU)).view([1, 77]);
        file.insert("cond_stage_model.transformer.text_model.embeddings.position_ids".into(), ids);
    } else {
        file.insert("cond_stage_model.model.text_projection".into(), Tensor::eye(64, (Kind::Half, CPU)));
        file.insert("cond_stage_model.model.logit_scale".into(), Tensor::from(4.6f32));
    }
    file.insert("model_ema.diffusion_modelout2bias".into(), Tensor::zeros([4], (Kind::Float, CPU)));
    file.insert("model_ema.num_updates".into(), number(3));
    file.insert("alphas_cumprod".into(), Tensor::zeros([1000], (Kind::Float, CPU)));
    file
}

/// A file with the header of a whole checkpoint and, but for `global_step`, holes for data.
pub fn sparse_file(path: &Path, shapes: &BTreeMap<String, Vec<i64>>, global_step: Option<i64>, metadata: Value) {
    let (mut header, mut offset) = (serde_json::Map::from_iter([("__metadata__".to_owned(), metadata)]), 0);
    for (name, shape) in shapes {
        let end = offset + 2 * shape.iter().product::<i64>();
        header.insert(name.clone(), json!({ "dtype": "F16", "shape": shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    if global_step.is_some() {
        header
            .insert("global_step".into(), json!({ "dtype": "I64", "shape": [], "data_offsets": [offset, offset + 8] }));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let end = 8 + header.len() as u64 + offset as u64;
    file.set_len(end).unwrap();
    if let Some(step) = global_step {
        file.seek(SeekFrom::Start(end)).unwrap();
        file.write_all(&step.to_le_bytes()).unwrap();
    }
}
