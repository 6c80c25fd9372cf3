//! The configurations of a single-file checkpoint, which has none, from the shapes of its tensors.
//!
//! What shapes do not tell is what all of Stable Diffusion 1, all of 2 or all of XL have in common. The keys and values
//! are those of the models' own `config.json` and `scheduler_config.json`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Which Stable Diffusion a file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// OpenAI's text encoder, 8 heads in each block of the UNet.
    One,
    /// OpenCLIP's text encoder, heads of 64 channels.
    Two,
    /// Both text encoders, heads of 64 channels.
    Xl,
}

/// What the UNet predicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prediction {
    #[default]
    Epsilon,
    Velocity,
}

/// How the model's noise is to be taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Noise {
    pub prediction: Prediction,
    /// `rescale_betas_zero_snr`
    pub zero_snr: bool,
}

/// Shapes of a component's parameters, by their diffusers names.
pub struct Shapes(pub BTreeMap<String, Vec<i64>>);

impl Shapes {
    /// How long an axis of a parameter is.
    fn axis(&self, name: &str, axis: usize) -> Result<i64> {
        let shape = self.0.get(name).with_context(|| format!("the tensor for `{name}` is missing"))?;
        shape.get(axis).copied().with_context(|| format!("the tensor for `{name}` has the shape {shape:?}"))
    }

    fn rank(&self, name: &str) -> usize {
        self.0.get(name).map_or(0, Vec::len)
    }

    fn has(&self, prefix: &str) -> bool {
        self.starting(prefix).next().is_some()
    }

    fn starting(&self, prefix: &str) -> impl Iterator<Item = &str> {
        let names = self.0.range(prefix.to_owned()..).map(|(name, _)| name.as_str());
        names.take_while(move |name| name.starts_with(prefix))
    }

    /// One more than the largest number that follows `prefix`.
    fn count(&self, prefix: &str) -> usize {
        let numbers = self.starting(prefix).filter_map(|name| name[prefix.len()..].split('.').next()?.parse().ok());
        numbers.max().map_or(0, |last: usize| last.saturating_add(1))
    }
}

/// `unet/config.json`.
pub fn unet(shapes: &Shapes, version: Version, prediction: Prediction) -> Result<Value> {
    let blocks = shapes.count("down_blocks.");
    let (mut channels, mut layers) = (Vec::new(), Vec::new());
    let (mut down_depths, mut up_depths) = (Vec::new(), Vec::new());
    let (mut down, mut up) = (Vec::new(), Vec::new());
    let depths = |block: &str| {
        // Whatever number a name holds, there are no more than tensors.
        let resnets = shapes.count(&format!("{block}.resnets.")).min(shapes.0.len());
        let depth = |resnet| shapes.count(&format!("{block}.attentions.{resnet}.transformer_blocks."));
        (0..resnets).map(depth).collect::<Vec<_>>()
    };
    for block in 0..blocks {
        channels.push(shapes.axis(&format!("down_blocks.{block}.resnets.0.conv2.weight"), 0)?);
        layers.push(shapes.count(&format!("down_blocks.{block}.resnets.")));
        let attends = shapes.has(&format!("down_blocks.{block}.attentions."));
        down.push(if attends { "CrossAttnDownBlock2D" } else { "DownBlock2D" });
        down_depths.push(match (attends, block + 1 == blocks) {
            (true, _) => depths(&format!("down_blocks.{block}")),
            // The middle block has the depth of the last.
            (_, true) => vec![shapes.count("mid_block.attentions.0.transformer_blocks.").max(1)],
            _ => vec![1],
        });
        let attends = shapes.has(&format!("up_blocks.{block}.attentions."));
        up_depths.push(if attends { depths(&format!("up_blocks.{block}")) } else { vec![1] });
        up.push(if attends { "CrossAttnUpBlock2D" } else { "UpBlock2D" });
    }
    let ending = |ending: &str| shapes.0.keys().find(|name| name.ends_with(ending));
    let keys = ending(".attn2.to_k.weight").context("it has no cross-attention: not a Stable Diffusion")?;
    let heads = match version {
        Version::One => json!(8),
        _ if channels.iter().all(|channels| channels % 64 == 0) => {
            json!(channels.iter().map(|channels| channels / 64).collect::<Vec<_>>())
        }
        _ => bail!("its blocks have {channels:?} channels; Stable Diffusion 2 and XL have heads of 64 channels"),
    };
    let mid_block = match (shapes.has("mid_block."), shapes.has("mid_block.attentions.")) {
        (false, _) => None,
        (true, false) => Some("UNetMidBlock2D"),
        (true, true) => Some("UNetMidBlock2DCrossAttn"),
    };
    let large = (version, prediction) == (Version::Two, Prediction::Velocity);
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "center_input_sample": false,
        "cross_attention_dim": shapes.axis(keys, 1)?,
        "down_block_types": down,
        "downsample_padding": 1,
        "dual_cross_attention": false,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": shapes.axis("conv_in.weight", 1)?,
        "layers_per_block": one_or_list(&layers),
        "mid_block_scale_factor": 1,
        "mid_block_type": mid_block,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "num_class_embeds": null,
        "only_cross_attention": false,
        "out_channels": shapes.axis("conv_out.weight", 0)?,
        "resnet_time_scale_shift": "default",
        "sample_size": if version == Version::Xl { 128 } else if large { 96 } else { 64 },
        "up_block_types": up,
        // In fp16 the attention of 2.1 overflows.
        "upcast_attention": large,
        "use_linear_projection": ending(".proj_in.weight").is_some_and(|name| shapes.rank(name) == 2),
    });
    // What a way up has that mirrors the way down.
    let mirrored = (0..blocks).all(|block| {
        let (theirs, ours) = (&down_depths[blocks - 1 - block], &up_depths[block]);
        let is_even = |depths: &[usize]| depths.iter().all(|depth| *depth == theirs[0]);
        is_even(theirs) && (up[block] == "UpBlock2D" || is_even(ours))
    });
    if !mirrored {
        config["reverse_transformer_layers_per_block"] = up_depths.iter().map(|depths| one_or_list(depths)).collect();
    }
    let down_depths: Vec<Value> = down_depths.iter().map(|depths| one_or_list(depths)).collect();
    if down_depths.iter().any(|depth| *depth != 1) {
        let first = down_depths[0].clone();
        let same = first.is_number() && down_depths.iter().all(|depth| *depth == first);
        config["transformer_layers_per_block"] = if same { first } else { Value::Array(down_depths) };
    }
    if version == Version::Xl {
        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] = json!(256);
        config["projection_class_embeddings_input_dim"] = json!(shapes.axis("add_embedding.linear_1.weight", 1)?);
    }
    Ok(config)
}

/// `vae/config.json`; latents are multiplied by `scaling_factor`, or by what all of the version have in common.
pub fn autoencoder(shapes: &Shapes, version: Version, scaling_factor: Option<f64>) -> Result<Value> {
    let blocks = shapes.count("encoder.down_blocks.");
    let channels = (0..blocks)
        .map(|block| shapes.axis(&format!("encoder.down_blocks.{block}.resnets.0.conv2.weight"), 0))
        .collect::<Result<Vec<_>>>()?;
    let (sample_size, usual) = match version {
        Version::One => (512, 0.18215),
        Version::Two => (768, 0.18215),
        Version::Xl => (1024, 0.13025),
    };
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; blocks],
        "force_upcast": true,
        "in_channels": shapes.axis("encoder.conv_in.weight", 1)?,
        "latent_channels": shapes.axis("decoder.conv_in.weight", 1)?,
        "layers_per_block": shapes.count("encoder.down_blocks.0.resnets."),
        "norm_num_groups": 32,
        "out_channels": shapes.axis("decoder.conv_out.weight", 0)?,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor.unwrap_or(usual),
        "up_block_types": vec!["UpDecoderBlock2D"; blocks],
        "use_post_quant_conv": shapes.has("post_quant_conv."),
        "use_quant_conv": shapes.has("quant_conv."),
    }))
}

/// `text_encoder/config.json`.
pub fn text_encoder(shapes: &Shapes, version: Version) -> Result<Value> {
    // OpenAI's or OpenCLIP's; what the latter projects to is not used in Stable Diffusion 2.
    match version {
        Version::One | Version::Xl => clip(shapes, "CLIPTextModel", "quick_gelu", None),
        Version::Two => clip(shapes, "CLIPTextModel", "gelu", Some(512)),
    }
}

/// `text_encoder_2/config.json` of Stable Diffusion XL.
pub fn second_text_encoder(shapes: &Shapes) -> Result<Value> {
    let projected = shapes.axis("text_projection.weight", 0)?;
    clip(shapes, "CLIPTextModelWithProjection", "gelu", Some(projected))
}

/// A text encoder of this class, `projected` to its own width where no other is given.
fn clip(shapes: &Shapes, class: &str, activation: &str, projected: Option<i64>) -> Result<Value> {
    let tokens = "text_model.embeddings.token_embedding.weight";
    let hidden = shapes.axis(tokens, 1)?;
    if hidden % 64 != 0 {
        bail!("its text encoder has {hidden} channels; Stable Diffusion has heads of 64 channels");
    }
    Ok(json!({
        "architectures": [class],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": hidden,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": shapes.axis("text_model.encoder.layers.0.mlp.fc1.weight", 0)?,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shapes.axis("text_model.embeddings.position_embedding.weight", 0)?,
        "model_type": "clip_text_model",
        "num_attention_heads": hidden / 64,
        "num_hidden_layers": shapes.count("text_model.encoder.layers."),
        "pad_token_id": 1,
        "projection_dim": projected.unwrap_or(hidden),
        "torch_dtype": "float32",
        "vocab_size": shapes.axis(tokens, 0)?,
    }))
}

/// `scheduler/scheduler_config.json`.
pub fn scheduler(version: Version, noise: Noise) -> Value {
    let Noise { prediction, zero_snr } = noise;
    let class = match (version, prediction) {
        (Version::Xl, _) => "EulerDiscreteScheduler",
        (_, Prediction::Epsilon) => "PNDMScheduler",
        (_, Prediction::Velocity) => "DDIMScheduler",
    };
    let prediction = if prediction == Prediction::Epsilon { "epsilon" } else { "v_prediction" };
    let mut config = json!({
        "_class_name": class,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": false,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": false,
        "skip_prk_steps": true,
        "steps_offset": 1,
        "trained_betas": null,
    });
    if zero_snr {
        config["rescale_betas_zero_snr"] = json!(true);
    }
    if version == Version::Xl {
        // Where the others have nothing, each sampler has its own.
        for (key, value) in [("timestep_spacing", json!("leading")), ("interpolation_type", json!("linear"))] {
            config[key] = value;
        }
    }
    config
}

/// diffusers' form of numbers by block that are often all the same.
fn one_or_list(numbers: &[usize]) -> Value {
    match numbers {
        [first, rest @ ..] if rest.iter().all(|number| number == first) => json!(first),
        _ => json!(numbers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::unet::UnetConfig;

    fn shapes(config: &Value) -> Shapes {
        let parameters = UnetConfig::from_json(config).unwrap().parameters();
        Shapes(parameters.into_iter().map(|parameter| (parameter.name, parameter.shape)).collect())
    }

    /// SSD-1B at full size, and the same with attention in the middle: what its shapes tell has the same parameters.
    #[test]
    fn transformers_of_any_depth_are_told_by_shapes() {
        let mut config = json!({
            "_class_name": "UNet2DConditionModel",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "mid_block_type": "UNetMidBlock2D",
            "projection_class_embeddings_input_dim": 2816,
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": true,
        });
        for middle in ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn"] {
            config["mid_block_type"] = middle.into();
            let of_config = shapes(&config);
            let told = unet(&of_config, Version::Xl, Prediction::Epsilon).unwrap();
            assert_eq!(told["mid_block_type"], middle);
            assert_eq!(shapes(&told).0, of_config.0);
        }
    }

    /// A name with a number beyond all sense costs nothing.
    #[test]
    fn numbers_in_names_are_not_counted_up_to() {
        let mut hostile = shapes(&json!({"_class_name": "UNet2DConditionModel"}));
        hostile.0.insert(format!("up_blocks.1.resnets.{}.x", usize::MAX), vec![1]);
        let told = unet(&hostile, Version::One, Prediction::Epsilon).unwrap();
        let error = UnetConfig::from_json(&told).unwrap_err().to_string();
        assert!(error.contains("reverse_transformer_layers_per_block") && error.len() < 400, "{error:.400}");
    }
}
