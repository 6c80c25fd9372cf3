//! The table of all keys: what a change of each means to a run that is resumed, and when the key has an effect (the
//! conditions are in `effects`). A test requires an entry for every key of the schema, so that a new one is not forgotten.

use super::Config;
use super::effects::*;

/// What it means to a run that resumes that the value of a key changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// What is learned stays the same: where things lie, what is shown, saved, measured and exported. Of a folder or model
    /// the content counts, not the path, and that is compared elsewhere.
    Free,
    /// The run continues with the new value, and says so.
    Notice,
    /// It would be another run.
    Refused,
}

/// A key and what is known of it.
pub(super) struct Key {
    /// Dotted, as in `train.max_train_steps`.
    pub name: &'static str,
    pub change: Change,
    /// Why the key has no effect in a config; `None` where it has.
    pub idle: Condition,
}

/// When a key has no effect.
pub(super) type Condition = fn(&Config) -> Option<Idle>;

const fn key(name: &'static str, change: Change, idle: Condition) -> Key {
    Key { name, change, idle }
}

impl Key {
    /// Whether the key has no effect in `config`, whatever its length is changed to.
    pub fn is_idle(&self, config: &Config) -> bool {
        (self.idle)(config).is_some_and(|idle| !matches!(idle.verdict, Verdict::Passing | Verdict::Odd))
    }
}

/// The entry of a key.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

use Change::{Free, Notice, Refused};

pub(super) static KEYS: &[Key] = &[
    key("config_version", Refused, always),
    // Files are named after it.
    key("name", Notice, always),
    key("output_dir", Free, always),
    key("seed", Refused, always),
    key("model.pretrained_model_name_or_path", Free, always),
    // Another autoencoder, and another revision, are known by their content.
    key("model.vae", Free, always),
    key("model.revision", Free, always),
    key("model.prediction_type", Refused, unet),
    key("model.rescale_betas_zero_snr", Refused, unet),
    key("model.train_from_scratch", Refused, always),
    // The last of its section, which tables end. LoRAs are known by their content too.
    key("model.loras", Free, merged),
    key("data.resolution", Refused, always),
    key("data.train_data_dir", Free, instead_of_captions_folder),
    key("data.validation_data_dir", Free, always),
    key("data.caption_extension", Refused, captions),
    key("data.missing_caption", Refused, missing_caption),
    key("data.caption_dropout_rate", Refused, dropout),
    key("data.flip_aug", Refused, always),
    key("data.center_crop", Refused, always),
    key("data.cache_dir", Free, cache),
    key("data.dreambooth.instance_data_dir", Free, dreambooth),
    key("data.dreambooth.instance_prompt", Refused, dreambooth),
    key("data.dreambooth.class_data_dir", Free, class_pictures),
    key("data.dreambooth.class_prompt", Refused, class),
    key("data.dreambooth.with_prior_preservation", Refused, dreambooth),
    key("data.dreambooth.prior_source", Refused, class),
    key("data.dreambooth.prior_loss_weight", Refused, prior),
    key("data.dreambooth.num_class_images", Refused, class_pictures),
    key("data.dreambooth.sample_batch_size", Free, class_pictures),
    key("data.dreambooth.prior_sample_steps", Refused, class_pictures),
    key("data.dreambooth.prior_guidance_scale", Refused, class_pictures),
    key("train.mode", Refused, always),
    key("train.component", Refused, always),
    key("train.train_text_encoder", Refused, always),
    key("train.stop_text_encoder_training", Refused, stop),
    key("train.max_train_steps", Notice, always),
    key("train.train_batch_size", Refused, always),
    key("train.gradient_accumulation_steps", Refused, always),
    key("train.learning_rate", Notice, dense),
    key("train.text_encoder_lr", Notice, text_encoder_rate),
    key("train.lr_scheduler", Refused, scheduler),
    key("train.lr_warmup_steps", Refused, warmup),
    key("train.lr_num_cycles", Refused, cycles),
    key("train.lr_power", Refused, power),
    key("train.max_grad_norm", Refused, always),
    key("train.use_ema", Refused, always),
    key("train.ema_decay", Refused, ema),
    key("train.min_snr_gamma", Refused, unet),
    key("train.timestep_beta", Refused, unet),
    key("train.noise_offset", Refused, unet),
    // Another machine may resume a run, though not to the same bytes.
    key("train.device", Notice, always),
    key("train.mixed_precision", Refused, always),
    key("train.full_bf16", Refused, always),
    key("train.gradient_checkpointing", Free, always),
    key("train.optimizer.type", Refused, always),
    key("train.optimizer.betas", Refused, always),
    key("train.optimizer.weight_decay", Refused, always),
    key("train.optimizer.eps", Refused, always),
    key("train.autoencoder.kl_weight", Refused, encoder),
    key("train.autoencoder.crop", Refused, crop),
    key("train.autoencoder.loss_type", Refused, autoencoder),
    key("train.autoencoder.gradient_weight", Refused, autoencoder),
    key("train.autoencoder.scales", Refused, autoencoder),
    key("train.autoencoder.decoder_only", Refused, autoencoder),
    key("train.autoencoder.latent_noise", Refused, autoencoder),
    key("palettize.enabled", Refused, always),
    key("palettize.n_bits", Refused, unnamed_layers),
    key("palettize.granularity", Refused, learned_palettes),
    key("palettize.group_size", Refused, groups),
    key("palettize.group_axis", Refused, axis),
    key("palettize.cluster_dim", Refused, learned_palettes),
    key("palettize.enable_per_channel_scale", Refused, learned_palettes),
    key("palettize.lut_dtype", Refused, learned_palettes),
    key("palettize.weight_threshold", Refused, unnamed_layers),
    key("palettize.kmeans_max_iter", Refused, soft),
    key("palettize.temperature_start", Refused, soft),
    key("palettize.temperature_end", Refused, soft),
    key("palettize.freeze_fraction", Refused, learned_palettes),
    key("palettize.reestimate_norms_and_biases", Refused, frozen),
    key("palettize.palette_learning_rate", Notice, palette_rate),
    // It is known by its content.
    key("palettize.palettes", Free, palettes),
    // Its layers are among the overrides.
    key("palettize.recipe", Free, recipe),
    key("palettize.overrides", Refused, overrides),
    key("distill.enabled", Refused, teacher),
    // Of a model the content counts, not the path.
    key("distill.teacher", Refused, distill),
    key("distill.personalize_steps", Refused, personalized),
    key("distill.personalize_learning_rate", Refused, personalized),
    key("distill.on", Refused, asked),
    key("distill.lambda_sd", Refused, distill),
    key("distill.lambda_kd_output", Refused, distill),
    key("distill.lambda_kd_feat", Refused, distill),
    key("sample.sample_every_n_steps", Free, sampling),
    key("sample.prompts", Free, prompts),
    key("sample.sample_steps", Free, each_steps),
    key("sample.guidance_scale", Free, each_scale),
    key("sample.seed", Free, each_seed),
    key("sample.sampler", Free, each_sampler),
    key("checkpoint.checkpointing_steps", Free, saved),
    key("checkpoint.checkpoint_every_n_minutes", Free, unsaved),
    key("checkpoint.checkpoints_total_limit", Free, always),
    key("logging.log_every", Free, logs),
    key("logging.report_to", Free, always),
    key("validation.every_n_steps", Free, validated),
    key("validation.seed", Free, noised_validation),
    key("validation.batches", Free, noised_validation),
    key("export.coreml", Free, always),
    key("export.components", Free, components),
    key("export.min_deployment_target", Free, package),
    key("export.attention_implementation", Free, attention),
    key("export.latent_h", Free, sized_package),
    key("export.latent_w", Free, sized_package),
    key("export.unet_batch_one", Free, unet_package),
    key("export.unet_support_controlnet", Free, unet_package),
    key("export.chunk_unet", Free, unet_package),
    key("export.quantize_nbits", Free, quantized),
    key("export.bundle_resources_for_swift_cli", Free, package),
];
