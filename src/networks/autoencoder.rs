//! `AutoencoderKL`: pictures to latents, an eighth of the side, and back.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::json::Json;
use super::resnet::{Resnet, upsample};
use crate::ops::{Conv, Linear, Mask, Ops, Parameter, declared};

/// What `vae/config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    pub latent_channels: i64,
    pub block_out_channels: Vec<i64>,
    pub layers_per_block: i64,
    pub norm_num_groups: i64,
    /// Latents are multiplied by it before they reach the UNet, so that their variance is about one.
    pub scaling_factor: f64,
    /// Whether it overflows in fp16, as Stable Diffusion XL's own does, so that it is to compute in fp32.
    pub force_upcast: bool,
    pub mid_block_attention: bool,
    pub quant_conv: bool,
    pub post_quant_conv: bool,
}

impl AutoencoderConfig {
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let json = Json::new("AutoencoderKL", value)?;
        let (down, up) = (["DownEncoderBlock2D"], ["UpDecoderBlock2D"]);
        let down_types = json.names("down_block_types", &down, &down)?;
        let up_types = json.names("up_block_types", &up, &up)?;
        let block_out_channels = json.integers("block_out_channels", &[64])?;
        if down_types.len() != block_out_channels.len() || up_types.len() != block_out_channels.len() {
            bail!(
                "AutoencoderKL: config.json has {} `down_block_types`, {} `up_block_types` and {} \
                 `block_out_channels`; they must be as many",
                down_types.len(),
                up_types.len(),
                block_out_channels.len()
            );
        }
        json.only("act_fn", &[json!("silu"), json!("swish")])?;
        for key in ["shift_factor", "latents_mean", "latents_std"] {
            json.only(key, &[])?;
        }
        let scaling_factor = json.number("scaling_factor", 0.18215)?;
        if !(scaling_factor.is_finite() && scaling_factor > 0.0) {
            bail!("AutoencoderKL: config.json has `scaling_factor`: {scaling_factor}, which must be above 0");
        }
        let config = Self {
            in_channels: json.integer("in_channels", 3)?,
            out_channels: json.integer("out_channels", 3)?,
            latent_channels: json.integer("latent_channels", 4)?,
            layers_per_block: json.layers("layers_per_block", 1)?,
            norm_num_groups: json.integer("norm_num_groups", 32)?,
            scaling_factor,
            force_upcast: json.flag("force_upcast", true)?,
            mid_block_attention: json.flag("mid_block_add_attention", true)?,
            quant_conv: json.flag("use_quant_conv", true)?,
            post_quant_conv: json.flag("use_post_quant_conv", true)?,
            block_out_channels,
        };
        if let Some(channels) = config.block_out_channels.iter().find(|&&c| c % config.norm_num_groups != 0) {
            bail!(
                "AutoencoderKL: config.json has `norm_num_groups`: {}, which does not divide {channels} of \
                 `block_out_channels`",
                config.norm_num_groups
            );
        }
        Ok(config)
    }

    /// How many times smaller a latent's side is than the picture's: 8 for every Stable Diffusion.
    pub fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The parameters of this network, by their diffusers names: encoder, then decoder.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut all = self.encoder_parameters();
        all.extend(self.decoder_parameters());
        all
    }

    /// Those of [`encode`].
    pub fn encoder_parameters(&self) -> Vec<Parameter> {
        let side = 2 * self.factor();
        declared(|ops| {
            encode(ops, self, &vec![1, self.in_channels, side, side]);
        })
    }

    /// Those of [`decode`].
    pub fn decoder_parameters(&self) -> Vec<Parameter> {
        declared(|ops| {
            decode(ops, self, &vec![1, self.latent_channels, 2, 2]);
        })
    }

    fn resnet(&self) -> Resnet {
        Resnet { groups: self.norm_num_groups, eps: 1e-6 }
    }
}

/// `image` `[B, 3, H, W]` in −1…1 → moments `[B, 2·latent, H/8, W/8]`: the mean, then the logarithm of the
/// variance, both before `scaling_factor`.
pub fn encode<O: Ops>(ops: &mut O, config: &AutoencoderConfig, image: &O::Value) -> O::Value {
    let resnet = config.resnet();
    let channels = &config.block_out_channels;
    let mut x = ops.conv2d(image, "encoder.conv_in", Conv::same(config.in_channels, channels[0], 3));
    for (block, &out) in channels.iter().enumerate() {
        let name = format!("encoder.down_blocks.{block}");
        for layer in 0..config.layers_per_block {
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, None, out);
        }
        if block + 1 < channels.len() {
            let padded = ops.pad_bottom_right(&x);
            let down = Conv { stride: 2, padding: 0, ..Conv::same(out, out, 3) };
            x = ops.conv2d(&padded, &format!("{name}.downsamplers.0.conv"), down);
        }
    }
    let x = mid_block(ops, config, "encoder.mid_block", &x);
    let moments = 2 * config.latent_channels;
    let x = resnet.out(ops, "encoder.", &x, moments);
    if config.quant_conv { ops.conv2d(&x, "quant_conv", Conv::same(moments, moments, 1)) } else { x }
}

/// `latents` `[B, latent, h, w]` (already divided by `scaling_factor`) → picture `[B, 3, 8h, 8w]`, about −1…1.
pub fn decode<O: Ops>(ops: &mut O, config: &AutoencoderConfig, latents: &O::Value) -> O::Value {
    let resnet = config.resnet();
    let channels = &config.block_out_channels;
    let (latent, last) = (config.latent_channels, channels.len() - 1);
    let conv_in = Conv::same(latent, channels[last], 3);
    let x = if config.post_quant_conv {
        let x = ops.conv2d(latents, "post_quant_conv", Conv::same(latent, latent, 1));
        ops.conv2d(&x, "decoder.conv_in", conv_in)
    } else {
        ops.conv2d(latents, "decoder.conv_in", conv_in)
    };
    let mut x = mid_block(ops, config, "decoder.mid_block", &x);
    for (block, &out) in channels.iter().rev().enumerate() {
        let name = format!("decoder.up_blocks.{block}");
        for layer in 0..=config.layers_per_block {
            x = resnet.forward(ops, &format!("{name}.resnets.{layer}"), &x, None, out);
        }
        if block < last {
            let size = ops.shape(&x);
            x = upsample(ops, &name, &x, 2 * size[2], 2 * size[3]);
        }
    }
    resnet.out(ops, "decoder.", &x, config.out_channels)
}

/// Residual block, single-head attention over pixels, residual block.
fn mid_block<O: Ops>(ops: &mut O, config: &AutoencoderConfig, name: &str, x: &O::Value) -> O::Value {
    let resnet = config.resnet();
    let shape = ops.shape(x);
    let channels = shape[1];
    let mut x = resnet.forward(ops, &format!("{name}.resnets.0"), x, None, channels);
    if config.mid_block_attention {
        let attention = format!("{name}.attentions.0");
        let linear = Linear { in_features: channels, out_features: channels, bias: true };
        let h = ops.group_norm(&x, &format!("{attention}.group_norm"), config.norm_num_groups, 1e-6);
        let h = ops.image_to_tokens(&h);
        let q = ops.linear(&h, &format!("{attention}.to_q"), linear);
        let k = ops.linear(&h, &format!("{attention}.to_k"), linear);
        let v = ops.linear(&h, &format!("{attention}.to_v"), linear);
        let h = ops.attention(&q, &k, &v, 1, Mask::None);
        let h = ops.linear(&h, &format!("{attention}.to_out.0"), linear);
        let h = ops.tokens_to_image(&h, shape[2], shape[3]);
        x = ops.add(&h, &x);
    }
    resnet.forward(ops, &format!("{name}.resnets.1"), &x, None, channels)
}
