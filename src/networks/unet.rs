//! `UNet2DConditionModel` of Stable Diffusion 1.x, 2.x and their cut-down relatives (BK-SDM), driven by
//! `unet/config.json`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::json::Json;
use super::resnet::{Resnet, upsample};
use super::transformer::SpatialTransformer;
use crate::ops::{Activation, Conv, Linear, Ops, Parameter, declared};

/// What `unet/config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    /// Side of the latents that the model was made for.
    pub sample_size: i64,
    pub block_out_channels: Vec<i64>,
    /// For each block on the way down, whether it has transformers.
    pub down_attention: Vec<bool>,
    /// For each block on the way up, whether it has transformers.
    pub up_attention: Vec<bool>,
    /// Whether there is a middle block (BK-SDM small and tiny have none).
    pub mid_block: bool,
    pub layers_per_block: Vec<i64>,
    pub transformer_layers_per_block: Vec<i64>,
    /// Heads of each block (diffusers calls them `attention_head_dim`).
    pub heads: Vec<i64>,
    pub cross_attention_dim: i64,
    pub norm_num_groups: i64,
    pub norm_eps: f64,
    pub downsample_padding: i64,
    pub use_linear_projection: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
}

impl UnetConfig {
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let json = Json::new("UNet2DConditionModel", value)?;
        let down = ["CrossAttnDownBlock2D", "DownBlock2D"];
        let up = ["CrossAttnUpBlock2D", "UpBlock2D"];
        let down_types = json.names("down_block_types", &[down[0], down[0], down[0], down[1]], &down)?;
        let up_types = json.names("up_block_types", &[up[1], up[0], up[0], up[0]], &up)?;
        let blocks = down_types.len();
        let block_out_channels = json.integers("block_out_channels", &[320, 640, 1280, 1280])?;
        if up_types.len() != blocks || block_out_channels.len() != blocks {
            bail!(
                "UNet2DConditionModel: config.json has {blocks} `down_block_types`, {} `up_block_types` and {} \
                 `block_out_channels`; they must be as many",
                up_types.len(),
                block_out_channels.len()
            );
        }
        let mid_block = !json.is_null("mid_block_type");
        json.only("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")])?;
        json.only("act_fn", &[json!("silu"), json!("swish")])?;
        json.only("resnet_time_scale_shift", &[json!("default")])?;
        json.only("time_embedding_type", &[json!("positional")])?;
        json.only("attention_type", &[json!("default")])?;
        for key in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
            json.only(key, &[json!(1)])?;
        }
        for key in ["conv_in_kernel", "conv_out_kernel"] {
            json.only(key, &[json!(3)])?;
        }
        for key in [
            "center_input_sample",
            "only_cross_attention",
            "mid_block_only_cross_attention",
            "dual_cross_attention",
            "resnet_skip_time_act",
            "class_embeddings_concat",
        ] {
            json.only(key, &[json!(false)])?;
        }
        for key in [
            "class_embed_type",
            "num_class_embeds",
            "addition_embed_type",
            "addition_time_embed_dim",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_cond_proj_dim",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "cross_attention_norm",
            "num_attention_heads",
            "projection_class_embeddings_input_dim",
            "reverse_transformer_layers_per_block",
        ] {
            json.only(key, &[])?;
        }
        json.only("dropout", &[json!(0)])?;
        let config = Self {
            in_channels: json.integer("in_channels", 4)?,
            out_channels: json.integer("out_channels", 4)?,
            sample_size: json.integer("sample_size", 64)?,
            down_attention: down_types.iter().map(|name| name == down[0]).collect(),
            up_attention: up_types.iter().map(|name| name == up[0]).collect(),
            mid_block,
            layers_per_block: json.per_block("layers_per_block", 2, blocks)?,
            transformer_layers_per_block: json.per_block("transformer_layers_per_block", 1, blocks)?,
            heads: json.per_block("attention_head_dim", 8, blocks)?,
            cross_attention_dim: json.integer("cross_attention_dim", 1280)?,
            norm_num_groups: json.integer("norm_num_groups", 32)?,
            norm_eps: json.number("norm_eps", 1e-5)?,
            // Downsampling with padding 0 pads at one side only in diffusers; no Stable Diffusion has it.
            downsample_padding: json.integer("downsample_padding", 1)?,
            use_linear_projection: json.flag("use_linear_projection", false)?,
            flip_sin_to_cos: json.flag("flip_sin_to_cos", true)?,
            freq_shift: json.number("freq_shift", 0.0)?,
            block_out_channels,
        };
        for (&channels, &heads) in config.block_out_channels.iter().zip(&config.heads) {
            if channels % config.norm_num_groups != 0 {
                bail!(
                    "UNet2DConditionModel: config.json has `norm_num_groups`: {}, which does not divide {channels} of \
                     `block_out_channels`",
                    config.norm_num_groups
                );
            }
            if channels % heads != 0 {
                bail!(
                    "UNet2DConditionModel: config.json has `attention_head_dim`: {heads} (the number of heads), which \
                     does not divide {channels} of `block_out_channels`"
                );
            }
        }
        Ok(config)
    }

    /// The parameters of this network, by their diffusers names.
    pub fn parameters(&self) -> Vec<Parameter> {
        // Shapes of parameters do not depend on the size; this one passes every downsampling.
        let size = 1 << self.block_out_channels.len();
        declared(|ops| {
            let sample = vec![1, self.in_channels, size, size];
            unet(ops, self, &sample, &vec![1], &vec![1, 77, self.cross_attention_dim]);
        })
    }
}

/// Predicts the noise (or the velocity) in `sample`.
///
/// `sample` `[B, in, h, w]`, `timestep` `[B]`, `context` `[B, S, cross_attention_dim]` → `[B, out, h, w]`.
pub fn unet<O: Ops>(
    ops: &mut O,
    config: &UnetConfig,
    sample: &O::Value,
    timestep: &O::Value,
    context: &O::Value,
) -> O::Value {
    let channels = &config.block_out_channels;
    let blocks = channels.len();
    let resnet = Resnet { groups: config.norm_num_groups, eps: config.norm_eps };
    let transformer = |block: usize, name: String| SpatialTransformer {
        name,
        groups: config.norm_num_groups,
        heads: config.heads[block],
        layers: config.transformer_layers_per_block[block],
        linear_projection: config.use_linear_projection,
    };
    let temb = time_embedding(ops, config, timestep);

    let mut x = ops.conv2d(sample, "conv_in", Conv::same(config.in_channels, channels[0], 3));
    let mut skips = vec![ops.share(&x)];
    for (block, &out) in channels.iter().enumerate() {
        let name = format!("down_blocks.{block}");
        for layer in 0..config.layers_per_block[block] {
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, Some(&temb), out);
            if config.down_attention[block] {
                x = ops.block(transformer(block, format!("{name}.attentions.{layer}")), &[&x, context]);
            }
            skips.push(ops.share(&x));
        }
        if block + 1 < blocks {
            let down = Conv { stride: 2, padding: config.downsample_padding, ..Conv::same(out, out, 3) };
            x = ops.conv2d(&x, &format!("{name}.downsamplers.0.conv"), down);
            skips.push(ops.share(&x));
        }
    }
    if config.mid_block {
        let last = blocks - 1;
        x = resnet.forward(ops, "mid_block.resnets.0", &x, Some(&temb), channels[last]);
        x = ops.block(transformer(last, "mid_block.attentions.0".into()), &[&x, context]);
        x = resnet.forward(ops, "mid_block.resnets.1", &x, Some(&temb), channels[last]);
    }
    for up in 0..blocks {
        let (name, block) = (format!("up_blocks.{up}"), blocks - 1 - up);
        for layer in 0..=config.layers_per_block[block] {
            // Skips and resnets on the way up are as many by construction.
            let skip = skips.pop().expect("a skip for each resnet on the way up");
            x = ops.concat_channels(&[x, skip]);
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, Some(&temb), channels[block]);
            if config.up_attention[up] {
                x = ops.block(transformer(block, format!("{name}.attentions.{layer}")), &[&x, context]);
            }
        }
        if let Some(next) = skips.last() {
            // To the size of the next skip: twice, or one less where an odd size was halved on the way down.
            let size = ops.shape(next);
            x = upsample(ops, &name, &x, size[2], size[3]);
        }
    }
    resnet.out(ops, "", &x, config.out_channels)
}

/// `[B] → [B, 4·C₀]`, activated: every residual block starts from SiLU of the embedding.
fn time_embedding<O: Ops>(ops: &mut O, config: &UnetConfig, timestep: &O::Value) -> O::Value {
    let (width, wide) = (config.block_out_channels[0], 4 * config.block_out_channels[0]);
    let t = ops.timestep_embedding(timestep, width, config.flip_sin_to_cos, config.freq_shift);
    let first = Linear { in_features: width, out_features: wide, bias: true };
    let t = ops.linear(&t, "time_embedding.linear_1", first);
    let t = ops.activation(&t, Activation::Silu);
    let t = ops.linear(&t, "time_embedding.linear_2", Linear { in_features: wide, ..first });
    ops.activation(&t, Activation::Silu)
}
