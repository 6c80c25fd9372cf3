//! The table of all keys: what a change of each means to a run that is resumed. A test requires an entry for every key of
//! the schema, so that a new one is not forgotten.

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
}

const fn key(name: &'static str, change: Change) -> Key {
    Key { name, change }
}

/// The entry of a key.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

use Change::{Free, Notice, Refused};

pub(super) static KEYS: &[Key] = &[
    key("config_version", Refused),
    // Files are named after it.
    key("name", Notice),
    key("output_dir", Free),
    key("seed", Refused),
    key("model.pretrained_model_name_or_path", Free),
    key("model.train_from_scratch", Refused),
    key("data.resolution", Refused),
    key("data.train_data_dir", Free),
    key("data.validation_data_dir", Free),
    key("data.caption_extension", Refused),
    key("data.missing_caption", Refused),
    key("data.caption_dropout_rate", Refused),
    key("data.flip_aug", Refused),
    key("data.center_crop", Refused),
    key("data.cache_dir", Free),
    key("data.dreambooth.instance_data_dir", Free),
    key("data.dreambooth.instance_prompt", Refused),
    key("data.dreambooth.class_data_dir", Free),
    key("data.dreambooth.class_prompt", Refused),
    key("data.dreambooth.with_prior_preservation", Refused),
    key("data.dreambooth.prior_loss_weight", Refused),
    key("data.dreambooth.num_class_images", Refused),
    key("data.dreambooth.sample_batch_size", Free),
    key("data.dreambooth.prior_sample_steps", Refused),
    key("data.dreambooth.prior_guidance_scale", Refused),
    key("train.mode", Refused),
    key("train.component", Refused),
    key("train.train_text_encoder", Refused),
    key("train.stop_text_encoder_training", Refused),
    key("train.max_train_steps", Notice),
    key("train.train_batch_size", Refused),
    key("train.gradient_accumulation_steps", Refused),
    key("train.learning_rate", Notice),
    key("train.text_encoder_lr", Notice),
    key("train.lr_scheduler", Refused),
    key("train.lr_warmup_steps", Refused),
    key("train.lr_num_cycles", Refused),
    key("train.lr_power", Refused),
    key("train.max_grad_norm", Refused),
    key("train.use_ema", Refused),
    key("train.ema_decay", Refused),
    key("train.min_snr_gamma", Refused),
    key("train.timestep_beta", Refused),
    key("train.noise_offset", Refused),
    // Another machine may resume a run, though not to the same bytes.
    key("train.device", Notice),
    key("train.mixed_precision", Refused),
    key("train.full_bf16", Refused),
    key("train.gradient_checkpointing", Free),
    key("train.optimizer.type", Refused),
    key("train.optimizer.betas", Refused),
    key("train.optimizer.weight_decay", Refused),
    key("train.optimizer.eps", Refused),
    key("train.autoencoder.kl_weight", Refused),
    key("train.autoencoder.crop", Refused),
    key("train.autoencoder.loss_type", Refused),
    key("palettize.enabled", Refused),
    key("palettize.n_bits", Refused),
    key("palettize.granularity", Refused),
    key("palettize.group_size", Refused),
    key("palettize.group_axis", Refused),
    key("palettize.cluster_dim", Refused),
    key("palettize.enable_per_channel_scale", Refused),
    key("palettize.lut_dtype", Refused),
    key("palettize.weight_threshold", Refused),
    key("palettize.kmeans_max_iter", Refused),
    key("palettize.temperature_start", Refused),
    key("palettize.temperature_end", Refused),
    key("palettize.freeze_fraction", Refused),
    key("palettize.reestimate_norms_and_biases", Refused),
    key("palettize.palette_learning_rate", Notice),
    // Its layers are among the overrides.
    key("palettize.recipe", Free),
    key("palettize.overrides", Refused),
    key("distill.enabled", Refused),
    key("distill.lambda_sd", Refused),
    key("distill.lambda_kd_output", Refused),
    key("distill.lambda_kd_feat", Refused),
    key("sample.sample_every_n_steps", Free),
    key("sample.prompts", Free),
    key("sample.sample_steps", Free),
    key("sample.guidance_scale", Free),
    key("sample.seed", Free),
    key("sample.sampler", Free),
    key("checkpoint.checkpointing_steps", Free),
    key("checkpoint.checkpoint_every_n_minutes", Free),
    key("checkpoint.checkpoints_total_limit", Free),
    key("logging.log_every", Free),
    key("logging.report_to", Free),
    key("validation.every_n_steps", Free),
    key("validation.seed", Free),
    key("validation.batches", Free),
    key("export.coreml", Free),
    key("export.min_deployment_target", Free),
    key("export.latent_h", Free),
    key("export.latent_w", Free),
];
