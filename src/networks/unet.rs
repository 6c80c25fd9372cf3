//! `UNet2DConditionModel` of Stable Diffusion 1.x, 2.x, XL and their cut-down relatives (BK-SDM), driven by
//! `unet/config.json`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::json::{Json, limits};
use super::resnet::{Resnet, upsample};
use super::transformer::SpatialTransformer;
use crate::ops::{Activation, Conv, Linear, Ops, Parameter, declared};

/// How many layers transformers have: for each block, one number for each of its residual blocks.
pub type Depths = Vec<Vec<i64>>;

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
    /// None in BK-SDM small and tiny.
    pub mid_block: Option<MidBlock>,
    /// For each block on the way down, how many layers the transformer after each residual block has.
    pub down_transformers: Depths,
    /// For each block on the way up, which has one residual block more.
    pub up_transformers: Depths,
    /// Heads of each block (diffusers calls them `attention_head_dim`).
    pub heads: Vec<i64>,
    pub cross_attention_dim: i64,
    pub norm_num_groups: i64,
    pub norm_eps: f64,
    pub downsample_padding: i64,
    pub use_linear_projection: bool,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    /// What Stable Diffusion XL is told besides the prompt's tokens.
    pub addition: Option<Addition>,
}

/// What lies between the way down and the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MidBlock {
    /// `UNetMidBlock2D`: one residual block (SSD-1B).
    Residual,
    /// `UNetMidBlock2DCrossAttn`: a transformer of so many layers between two residual blocks.
    Attention(i64),
}

/// How many sizes SDXL is told: height and width of the original, the crop's top and left, height and width of the
/// target (Podell et al. 2023, 2.2).
pub const TIME_IDS: i64 = 6;

/// SDXL's second way into the time embedding (`addition_embed_type` `text_time`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addition {
    /// Width of the pooled text embedding.
    pub text_width: i64,
    /// Width of the sinusoids of each of the [`TIME_IDS`].
    pub time_width: i64,
}

/// What a UNet is told of the picture.
pub struct Condition<'a, V> {
    /// The prompt, `[B, S, cross_attention_dim]`.
    pub context: &'a V,
    /// For a configuration with an [`Addition`], and for no other.
    pub added: Option<Added<'a, V>>,
    /// What ControlNets add (Zhang et al. 2023), of [`UnetConfig::residual_shapes`]; none without.
    pub residuals: &'a [V],
}

/// What SDXL's UNet is told besides the prompt's tokens.
pub struct Added<'a, V> {
    /// The prompt as the second text encoder sums it up, `[B, text_width]`.
    pub text_embeds: &'a V,
    /// Sizes in pixels, `[B, 6]` (see [`TIME_IDS`]).
    pub time_ids: &'a V,
}

impl<'a, V> From<&'a V> for Condition<'a, V> {
    fn from(context: &'a V) -> Self {
        Self { context, added: None, residuals: &[] }
    }
}

impl Addition {
    fn from_json(json: &Json) -> Result<Option<Self>> {
        json.only("addition_embed_type", &[json!("text_time"), Value::Null])?;
        let (embeds, wide) = ("addition_time_embed_dim", "projection_class_embeddings_input_dim");
        if !json.is_there("addition_embed_type") {
            json.only(embeds, &[])?;
            json.only(wide, &[])?;
            return Ok(None);
        }
        // diffusers has no defaults for these two.
        let (time_width, wide_width) = (json.integer(embeds, 0)?, json.integer(wide, 0)?);
        let text_width = wide_width - TIME_IDS * time_width;
        if time_width == 0 || text_width <= 0 {
            bail!(
                "UNet2DConditionModel: config.json has `{embeds}`: {time_width} and `{wide}`: {wide_width}; the latter is \
                 {TIME_IDS} times the former and the width of the pooled text"
            );
        }
        Ok(Some(Self { text_width, time_width }))
    }
}

impl UnetConfig {
    /// The UNet of Stable Diffusion 1.5, which sizes and times are told of.
    ///
    /// # Errors
    /// None.
    pub fn sd15() -> Result<Self> {
        Self::from_json(&json!({
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "down_block_types":
                ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "in_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 4,
            "sample_size": 64,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        }))
    }

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
        let mid_blocks = [json!("UNetMidBlock2DCrossAttn"), json!("UNetMidBlock2D"), Value::Null];
        json.only("mid_block_type", &mid_blocks)?;
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
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_cond_proj_dim",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "cross_attention_norm",
            "num_attention_heads",
        ] {
            json.only(key, &[])?;
        }
        json.only("dropout", &[json!(0)])?;
        let addition = Addition::from_json(&json)?;
        let layers_per_block = json.per_block("layers_per_block", 2, blocks)?;
        let (down_transformers, up_transformers) = transformers(&json, &layers_per_block)?;
        let mid_block = match json.text_or_null("mid_block_type", "UNetMidBlock2DCrossAttn")?.as_deref() {
            None => None,
            Some("UNetMidBlock2D") => Some(MidBlock::Residual),
            // As deep as the last block's first.
            Some(_) => Some(MidBlock::Attention(down_transformers[blocks - 1][0])),
        };
        let config = Self {
            in_channels: json.integer("in_channels", 4)?,
            out_channels: json.integer("out_channels", 4)?,
            // diffusers' own default is none.
            sample_size: if json.is_there("sample_size") { json.integer("sample_size", 64)? } else { 64 },
            down_attention: down_types.iter().map(|name| name == down[0]).collect(),
            up_attention: up_types.iter().map(|name| name == up[0]).collect(),
            mid_block,
            down_transformers,
            up_transformers,
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
            addition,
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
        let all: i64 = config.down_transformers.iter().chain(&config.up_transformers).flatten().sum();
        if all > limits::TRANSFORMERS {
            bail!(
                "UNet2DConditionModel: config.json has {all} transformer layers (`layers_per_block` times \
                 `transformer_layers_per_block`); at most {} are supported",
                limits::TRANSFORMERS
            );
        }
        Ok(config)
    }

    /// Shapes of the residuals that a ControlNet gives for latents of `height × width`: one for each value that is kept
    /// for the way up, in the order in which they come, then one for the middle.
    pub fn residual_shapes(&self, batch: i64, height: i64, width: i64) -> Vec<Vec<i64>> {
        let (mut size, blocks) = ([height, width], self.block_out_channels.len());
        let mut shapes = vec![vec![batch, self.block_out_channels[0], height, width]];
        for (block, &channels) in self.block_out_channels.iter().enumerate() {
            shapes.extend(self.down_transformers[block].iter().map(|_| vec![batch, channels, size[0], size[1]]));
            if block + 1 < blocks {
                size = size.map(|n| (n + 2 * self.downsample_padding - 3) / 2 + 1);
                shapes.push(vec![batch, channels, size[0], size[1]]);
            }
        }
        shapes.extend(shapes.last().cloned());
        shapes
    }

    /// The parameters of this network, by their diffusers names.
    pub fn parameters(&self) -> Vec<Parameter> {
        // Shapes of parameters do not depend on the size; this one passes every downsampling.
        let size = 1 << self.block_out_channels.len();
        declared(|ops| self.walk(ops, 1, (size, size)))
    }

    /// Walks the network on shapes: `batch` latents of `height` × `width` and texts of 77 tokens.
    pub fn walk<O: Ops<Value = Vec<i64>>>(&self, ops: &mut O, batch: i64, (height, width): (i64, i64)) {
        let (sample, context) =
            (vec![batch, self.in_channels, height, width], vec![batch, 77, self.cross_attention_dim]);
        let text_embeds = vec![batch, self.addition.map_or(0, |added| added.text_width)];
        let time_ids = vec![batch, TIME_IDS];
        let added = self.addition.map(|_| Added { text_embeds: &text_embeds, time_ids: &time_ids });
        unet(ops, self, &sample, &vec![batch], Condition { context: &context, added, residuals: &[] });
    }
}

/// How many layers the transformers have: for each block on the way down and each on the way up, one number for each
/// residual block. Without a list of its own, the way up mirrors the way down.
fn transformers(json: &Json, layers_per_block: &[i64]) -> Result<(Depths, Depths)> {
    let (key, reverse) = ("transformer_layers_per_block", "reverse_transformer_layers_per_block");
    let down = json.per_layer(key, layers_per_block)?;
    let on_the_way_up: Vec<i64> = layers_per_block.iter().rev().map(|layers| layers + 1).collect();
    if json.is_there(reverse) {
        return Ok((down, json.per_layer(reverse, &on_the_way_up)?));
    }
    let mirrored = down.iter().rev().zip(&on_the_way_up).map(|(depths, &layers)| {
        let even = depths.iter().all(|depth| *depth == depths[0]);
        even.then(|| vec![depths[0]; layers as usize])
    });
    match mirrored.collect::<Option<_>>() {
        Some(up) => Ok((down, up)),
        None => bail!(
            "UNet2DConditionModel: config.json has lists within `{key}`, and so needs `{reverse}` too: what the way up has"
        ),
    }
}

/// Predicts the noise (or the velocity) in `sample`.
///
/// `sample` `[B, in, h, w]`, `timestep` `[B]`, `condition` (its context alone, where there is no more) → `[B, out, h, w]`.
pub fn unet<'a, O: Ops>(
    ops: &mut O,
    config: &UnetConfig,
    sample: &O::Value,
    timestep: &O::Value,
    condition: impl Into<Condition<'a, O::Value>>,
) -> O::Value
where
    O::Value: 'a,
{
    let Condition { context, added, residuals } = condition.into();
    let channels = &config.block_out_channels;
    let blocks = channels.len();
    let resnet = Resnet { groups: config.norm_num_groups, eps: config.norm_eps };
    let transformer = |block: usize, name: String, layers: i64| SpatialTransformer {
        name,
        groups: config.norm_num_groups,
        heads: config.heads[block],
        layers,
        linear_projection: config.use_linear_projection,
    };
    let temb = time_embedding(ops, config, timestep, added);

    let mut x = ops.conv2d(sample, "conv_in", Conv::same(config.in_channels, channels[0], 3));
    let mut skips = vec![ops.share(&x)];
    for (block, &out) in channels.iter().enumerate() {
        let name = format!("down_blocks.{block}");
        for (layer, &depth) in config.down_transformers[block].iter().enumerate() {
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, Some(&temb), out);
            if config.down_attention[block] {
                x = ops.block(transformer(block, format!("{name}.attentions.{layer}"), depth), &[&x, context]);
            }
            skips.push(ops.share(&x));
        }
        if block + 1 < blocks {
            let down = Conv { stride: 2, padding: config.downsample_padding, ..Conv::same(out, out, 3) };
            x = ops.conv2d(&x, &format!("{name}.downsamplers.0.conv"), down);
            skips.push(ops.share(&x));
        }
        ops.feature(&x);
    }
    let (middle, residuals) = residuals.split_last().map_or((None, residuals), |(last, rest)| (Some(last), rest));
    if middle.is_some() {
        assert_eq!(residuals.len(), skips.len(), "a residual for each skip and one for the middle");
        skips = skips.iter().zip(residuals).map(|(skip, residual)| ops.add(skip, residual)).collect();
    }
    if let Some(mid_block) = config.mid_block {
        let last = blocks - 1;
        x = resnet.forward(ops, "mid_block.resnets.0", &x, Some(&temb), channels[last]);
        if let MidBlock::Attention(depth) = mid_block {
            x = ops.block(transformer(last, "mid_block.attentions.0".into(), depth), &[&x, context]);
            x = resnet.forward(ops, "mid_block.resnets.1", &x, Some(&temb), channels[last]);
        }
        ops.feature(&x);
    }
    if let Some(residual) = middle {
        x = ops.add(&x, residual);
    }
    for up in 0..blocks {
        let (name, block) = (format!("up_blocks.{up}"), blocks - 1 - up);
        for (layer, &depth) in config.up_transformers[up].iter().enumerate() {
            // Skips and resnets on the way up are as many by construction.
            let skip = skips.pop().expect("a skip for each resnet on the way up");
            x = ops.concat_channels(&[x, skip]);
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, Some(&temb), channels[block]);
            if config.up_attention[up] {
                x = ops.block(transformer(block, format!("{name}.attentions.{layer}"), depth), &[&x, context]);
            }
        }
        if let Some(next) = skips.last() {
            // To the size of the next skip: twice, or one less where an odd size was halved on the way down.
            let size = ops.shape(next);
            x = upsample(ops, &name, &x, size[2], size[3]);
        }
        ops.feature(&x);
    }
    resnet.out(ops, "", &x, config.out_channels)
}

/// `[B] → [B, 4·C₀]`, activated: every residual block starts from SiLU of the embedding.
fn time_embedding<O: Ops>(
    ops: &mut O,
    config: &UnetConfig,
    timestep: &O::Value,
    added: Option<Added<O::Value>>,
) -> O::Value {
    let UnetConfig { flip_sin_to_cos: flip, freq_shift: shift, .. } = *config;
    let width = config.block_out_channels[0];
    let t = ops.timestep_embedding(timestep, width, flip, shift);
    let mut embedding = perceptron(ops, "time_embedding", &t, 4 * width);
    if let Some(addition) = config.addition {
        let added = added.expect("this UNet was called without what SDXL is told besides the prompt's tokens");
        let sizes = ops.timestep_embedding(added.time_ids, addition.time_width, flip, shift);
        let text = ops.share(added.text_embeds);
        let both = ops.concat_channels(&[text, sizes]);
        let both = perceptron(ops, "add_embedding", &both, 4 * width);
        embedding = ops.add(&embedding, &both);
    }
    ops.activation(&embedding, Activation::Silu)
}

/// `TimestepEmbedding`: `[B, in] → [B, wide]`, two layers with SiLU between them.
fn perceptron<O: Ops>(ops: &mut O, name: &str, x: &O::Value, wide: i64) -> O::Value {
    let first = Linear { in_features: ops.shape(x)[1], out_features: wide, bias: true };
    let x = ops.linear(x, &format!("{name}.linear_1"), first);
    let x = ops.activation(&x, Activation::Silu);
    ops.linear(&x, &format!("{name}.linear_2"), Linear { in_features: wide, ..first })
}
