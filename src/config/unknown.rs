//! Keys that do not exist: what each is here, what it is in other trainers, or which key is meant.

use toml::{Table, Value};

/// A key that does not exist.
pub(super) struct Unknown {
    pub message: String,
    /// The key that is surely meant.
    pub meant: Option<Vec<String>>,
}

/// What to say of the key at `path`, which `known`, a config with every key, does not have. `path` without its last part is
/// a table that there is.
pub(super) fn unknown(known: &Table, path: &[String]) -> Unknown {
    let Some((name, parent)) = path.split_last() else { return Unknown { message: String::new(), meant: None } };
    let section = if parent.is_empty() { String::new() } else { format!(" in [{}]", parent.join(".")) };
    let all = everything(known, "");
    let (hint, meant) = hint(&all, name, &parent.join("."));
    let message = match foreign(name).filter(|_| meant.is_none()) {
        Some((what, instead)) => {
            let instead = if instead.is_empty() { String::new() } else { format!("; {instead}") };
            format!("`{name}`{section} is not in this version: {what}{instead}")
        }
        None => format!("unknown key `{name}`{section}{hint}"),
    };
    Unknown { message, meant: meant.map(|key| key.split('.').map(str::to_owned).collect()) }
}

/// All keys and tables, dotted; tables end in a dot.
fn everything(known: &Table, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (name, value) in known {
        match value {
            Value::Table(inner) => {
                found.push(format!("{prefix}{name}."));
                found.extend(everything(inner, &format!("{prefix}{name}.")));
            }
            _ => found.push(format!("{prefix}{name}")),
        }
    }
    found
}

/// The hint for a name in a table, and the key or table that it means.
fn hint(all: &[String], name: &str, parent: &str) -> (String, Option<String>) {
    let plain = |key: &str| key.trim_end_matches('.').to_owned();
    let parts = |key: &str| match plain(key).rsplit_once('.') {
        Some((table, last)) => (table.to_owned(), last.to_owned()),
        None => (String::new(), plain(key)),
    };
    let siblings = || all.iter().filter(|key| parts(key).0 == parent);
    let same = |a: &str, b: &str| squeezed(a) == squeezed(b);
    if let Some(key) = siblings().find(|key| same(&parts(key).1, name)) {
        return (format!("; did you mean `{}`?", parts(key).1), Some(plain(key)));
    }
    let synonym =
        SYNONYMS.iter().find(|(theirs, ours)| same(theirs, name) && all.iter().any(|key| plain(key) == *ours));
    if let Some((_, ours)) = synonym {
        return (format!("; here it is `{ours}`"), Some((*ours).to_owned()));
    }
    let elsewhere = all.iter().filter(|key| same(&parts(key).1, name)).min_by_key(|key| key.matches('.').count());
    if let Some(key) = elsewhere {
        let (table, last) = parts(key);
        let place = match (table.is_empty(), key.ends_with('.')) {
            (_, true) => format!("; it is [{}]", plain(key)),
            (true, false) => "; it belongs at the top, before the first [table]".to_owned(),
            (false, false) if last == *name => format!("; it belongs in [{table}]"),
            (false, false) => format!("; it is `{last}` in [{table}]"),
        };
        return (place, Some(plain(key)));
    }
    if foreign(name).is_some() {
        return (String::new(), None);
    }
    if let Some(key) = closest(name, siblings().map(|key| (parts(key).1, key))) {
        return (format!("; did you mean `{}`?", parts(key).1), Some(plain(key)));
    }
    if let Some(key) = closest(name, all.iter().map(|key| (parts(key).1, key))) {
        return (format!("; did you mean `{}`?", plain(key)), Some(plain(key)));
    }
    (String::new(), None)
}

/// A name without what is often written otherwise: capitals, `_`, `-`.
fn squeezed(name: &str) -> String {
    name.trim_start_matches('-').to_lowercase().replace(['_', '-'], "")
}

/// The item whose name is a misspelling of `name`: one slip, and one more for each four letters beyond four.
fn closest<T>(name: &str, items: impl Iterator<Item = (String, T)>) -> Option<T> {
    let name = name.to_lowercase();
    let allowed = (name.chars().count() / 4).clamp(1, 3);
    items
        .map(|(known, item)| (strsim::damerau_levenshtein(&name, &known.to_lowercase()), known.len(), item))
        // Not another word of the same length.
        .filter(|(slips, length, _)| *slips <= allowed && slips * 2 < *length)
        .min_by_key(|(slips, ..)| *slips)
        .map(|(_, _, item)| item)
}

/// `; did you mean …?`, or nothing if no name is near.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    closest(name, names.map(|known| (known.to_owned(), known)))
        .map_or_else(String::new, |known| format!("; did you mean `{known}`?"))
}

/// Whether some key has this dotted name.
#[cfg(test)]
fn exists(known: &Table, key: &str) -> bool {
    super::read::leaves(known, "").iter().any(|(name, _)| name == key)
}

/// What other trainers call our keys: kohya's sd-scripts, diffusers' examples, OneTrainer, ai-toolkit, EveryDream.
const SYNONYMS: &[(&str, &str)] = &[
    ("snr_gamma", "train.min_snr_gamma"),
    ("min_snr", "train.min_snr_gamma"),
    ("max_steps", "train.max_train_steps"),
    ("steps", "train.max_train_steps"),
    ("num_train_steps", "train.max_train_steps"),
    ("train_steps", "train.max_train_steps"),
    ("batch_size", "train.train_batch_size"),
    ("gradient_accumulation", "train.gradient_accumulation_steps"),
    ("lr", "train.learning_rate"),
    ("unet_lr", "train.learning_rate"),
    ("learning_rate_unet", "train.learning_rate"),
    ("learning_rate_te", "train.text_encoder_lr"),
    ("learning_rate_te1", "train.text_encoder_lr"),
    ("text_encoder_learning_rate", "train.text_encoder_lr"),
    ("te_lr", "train.text_encoder_lr"),
    ("learning_rate_scheduler", "train.lr_scheduler"),
    ("lr_scheduler_type", "train.lr_scheduler"),
    ("learning_rate_warmup_steps", "train.lr_warmup_steps"),
    ("warmup_steps", "train.lr_warmup_steps"),
    ("lr_scheduler_num_cycles", "train.lr_num_cycles"),
    ("lr_scheduler_power", "train.lr_power"),
    ("learning_rate_cycles", "train.lr_num_cycles"),
    ("clip_grad_norm", "train.max_grad_norm"),
    ("stop_text_encoder_training_at_step", "train.stop_text_encoder_training"),
    ("optimizer_type", "train.optimizer.type"),
    ("adam_weight_decay", "train.optimizer.weight_decay"),
    ("adam_epsilon", "train.optimizer.eps"),
    ("epsilon", "train.optimizer.eps"),
    ("offset_noise_weight", "train.noise_offset"),
    ("ema", "train.use_ema"),
    ("use_gradient_checkpointing", "train.gradient_checkpointing"),
    ("full_bf16_training", "train.full_bf16"),
    ("caption_ext", "data.caption_extension"),
    ("caption_extention", "data.caption_extension"),
    ("caption_dropout", "data.caption_dropout_rate"),
    ("proportion_empty_prompts", "data.caption_dropout_rate"),
    ("cond_dropout", "data.caption_dropout_rate"),
    ("random_flip", "data.flip_aug"),
    ("hflip", "data.flip_aug"),
    ("image_dir", "data.train_data_dir"),
    ("data_dir", "data.train_data_dir"),
    ("folder_path", "data.train_data_dir"),
    ("dataset_path", "data.train_data_dir"),
    ("validation_dir", "data.validation_data_dir"),
    ("instance_dir", "data.dreambooth.instance_data_dir"),
    ("class_dir", "data.dreambooth.class_data_dir"),
    ("reg_data_dir", "data.dreambooth.class_data_dir"),
    ("prior_preservation", "data.dreambooth.with_prior_preservation"),
    ("prior_loss_scale", "data.dreambooth.prior_loss_weight"),
    ("max_resolution", "data.resolution"),
    ("cache_folder", "data.cache_dir"),
    ("vae_path", "model.vae"),
    ("pretrained_vae_model_name_or_path", "model.vae"),
    ("zero_terminal_snr", "model.rescale_betas_zero_snr"),
    ("rescale_noise_scheduler_to_zero_terminal_snr", "model.rescale_betas_zero_snr"),
    ("pretrained_model", "model.pretrained_model_name_or_path"),
    ("pretrained_model_name", "model.pretrained_model_name_or_path"),
    ("base_model", "model.pretrained_model_name_or_path"),
    ("base_model_name", "model.pretrained_model_name_or_path"),
    ("name_or_path", "model.pretrained_model_name_or_path"),
    ("model_name", "model.pretrained_model_name_or_path"),
    ("model_path", "model.pretrained_model_name_or_path"),
    ("checkpoint_path", "model.pretrained_model_name_or_path"),
    ("sample_every", "sample.sample_every_n_steps"),
    ("sample_prompts", "sample.prompts"),
    ("validation_prompt", "sample.prompts"),
    ("validation_prompts", "sample.prompts"),
    ("num_inference_steps", "sample.sample_steps"),
    ("cfg_scale", "sample.guidance_scale"),
    ("sample_sampler", "sample.sampler"),
    ("noise_scheduler", "sample.sampler"),
    ("validation_steps", "validation.every_n_steps"),
    ("validate_every_n_steps", "validation.every_n_steps"),
    ("validation_seed", "validation.seed"),
    ("save_every", "checkpoint.checkpointing_steps"),
    ("save_every_n_steps", "checkpoint.checkpointing_steps"),
    ("checkpoint_every_n_steps", "checkpoint.checkpointing_steps"),
    ("ckpt_every_n_minutes", "checkpoint.checkpoint_every_n_minutes"),
    ("max_step_saves_to_keep", "checkpoint.checkpoints_total_limit"),
    ("save_total_limit", "checkpoint.checkpoints_total_limit"),
    ("keep_last_n", "checkpoint.checkpoints_total_limit"),
    ("log_with", "logging.report_to"),
    ("logging_steps", "logging.log_every"),
    ("log_every_n_steps", "logging.log_every"),
    ("output_name", "name"),
    ("run_name", "name"),
    ("output_folder", "output_dir"),
    ("train_seed", "seed"),
    ("bits", "palettize.n_bits"),
    ("nbits", "palettize.n_bits"),
    ("quantize_nbits", "palettize.n_bits"),
    ("palette_lr", "palettize.palette_learning_rate"),
    ("channel_group_size", "palettize.group_size"),
    ("lambda_kd", "distill.lambda_kd_output"),
    ("minimum_deployment_target", "export.min_deployment_target"),
];

/// What a key of another trainer is, and what to do instead.
fn foreign(name: &str) -> Option<(&'static str, &'static str)> {
    let name = squeezed(name);
    FOREIGN
        .iter()
        .find(|(names, ..)| names.iter().any(|theirs| squeezed(theirs) == name))
        .map(|entry| (entry.1, entry.2))
}

/// Keys that other trainers have and this version has not: names, what it is, what to do instead.
const FOREIGN: &[(&[&str], &str, &str)] = &[
    (
        &["enable_bucket", "aspect_ratio_bucketing", "enable_arb", "bucketing"],
        "buckets of aspect ratios (kohya, OneTrainer)",
        "every picture is cropped to a square of data.resolution",
    ),
    (
        &[
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "bucket_no_upscale",
            "min_bucket_images",
            "small_bucket",
            "skip_image_resolution",
        ],
        "a setting of buckets of aspect ratios (kohya)",
        "every picture is cropped to a square of data.resolution",
    ),
    (&["random_crop"], "crops at random (kohya, diffusers)", "that is data.center_crop = false"),
    (
        &["shuffle_caption", "shuffle_tokens", "shuffle_caption_separator", "tag_shuffle", "shuffle_tags"],
        "captions whose tags are shuffled (kohya, ai-toolkit)",
        "captions are trained as they are written",
    ),
    (
        &[
            "keep_tokens",
            "keep_tokens_separator",
            "caption_separator",
            "secondary_separator",
            "token_warmup_min",
            "token_warmup_step",
            "enable_wildcard",
        ],
        "a setting of tags that are shuffled in captions (kohya)",
        "captions are trained as they are written",
    ),
    (
        &["caption_prefix", "caption_suffix", "trigger_word", "trigger"],
        "words added to every caption (kohya, ai-toolkit)",
        "write them into the captions",
    ),
    (
        &["caption_tag_dropout_rate", "tag_dropout"],
        "dropping single tags of captions (kohya)",
        "data.caption_dropout_rate drops whole captions",
    ),
    (&["caption_dropout_every_n_epochs"], "dropping captions by epochs (kohya)", "that is data.caption_dropout_rate"),
    (
        &["color_aug", "face_crop_aug_range", "debiased_aug", "random_rotate"],
        "an augmentation of pictures (kohya, OneTrainer)",
        "there is data.flip_aug",
    ),
    (
        &[
            "masked_loss",
            "alpha_mask",
            "mask_dir",
            "mask_path",
            "unmasked_weight",
            "masked_training",
            "conditioning_data_dir",
        ],
        "a loss on a part of each picture (kohya, OneTrainer)",
        "the whole picture is trained",
    ),
    (
        &["num_repeats", "repeats", "dataset_repeats", "balancing"],
        "how often a picture comes up in an epoch (kohya, OneTrainer)",
        "pictures come up equally often; copy those that should come up more often",
    ),
    (&["is_reg"], "pictures of the class (kohya)", "those lie in data.dreambooth.class_data_dir"),
    (
        &[
            "subsets",
            "datasets",
            "general",
            "directory",
            "concepts",
            "concept_file_name",
            "concepts_list",
            "dataset_config",
        ],
        "several folders of pictures (kohya, OneTrainer, ai-toolkit)",
        "put all pictures below one data.train_data_dir: its folders are read too",
    ),
    (
        &["in_json", "metadata_file", "image_column", "caption_column", "dataset_name", "dataset_config_name"],
        "another place of captions (kohya, diffusers)",
        "captions are in metadata.jsonl (file_name, text) in data.train_data_dir, or in a text file beside each picture",
    ),
    (&["class_tokens"], "captions from a word for the class (kohya)", "that is data.dreambooth.instance_prompt"),
    (
        &["clip_skip", "text_encoder_layer_skip"],
        "skipping the last layers of the text encoder (kohya, OneTrainer)",
        "the text encoder's last layer is taken, or what the model's config says",
    ),
    (
        &["max_token_length", "tokenizer_max_length"],
        "captions beyond the text encoder's length (kohya)",
        "longer captions are cut, and `palettist check` counts them",
    ),
    (
        &["weighted_captions", "weight_captions"],
        "weights of words in captions (kohya)",
        "captions are trained as they are written",
    ),
    (
        &["validation_split", "validation_split_percentage", "num_validation_images"],
        "pictures set aside by themselves (kohya)",
        "put some into a folder of their own: data.validation_data_dir",
    ),
    (
        &[
            "cache_latents",
            "cache_latents_to_disk",
            "latent_caching",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
            "vae_batch_size",
            "skip_cache_check",
        ],
        "a setting of the cache (kohya, OneTrainer)",
        "latents and text embeddings are always cached on disk, in data.cache_dir",
    ),
    (
        &[
            "num_workers",
            "dataloader_num_workers",
            "dataloader_threads",
            "max_data_loader_n_workers",
            "persistent_data_loader_workers",
        ],
        "threads that read pictures (kohya, diffusers)",
        "pictures are encoded once, and no step reads any",
    ),
    (
        &["num_train_epochs", "max_train_epochs", "epochs", "num_epochs", "epoch", "max_epochs"],
        "the length of a run in epochs (kohya, diffusers, OneTrainer)",
        "set train.max_train_steps: epochs × pictures / (train_batch_size × gradient_accumulation_steps); `palettist check` \
         tells the epochs",
    ),
    (
        &[
            "save_every_n_epochs",
            "sample_every_n_epochs",
            "validation_epochs",
            "checkpointing_epochs",
            "validate_every_n_epochs",
        ],
        "an interval in epochs (kohya, diffusers)",
        "intervals are in steps: checkpoint.checkpointing_steps, sample.sample_every_n_steps, validation.every_n_steps",
    ),
    (
        &["scale_lr", "learning_rate_scaler"],
        "a learning rate multiplied by the batch size (diffusers, OneTrainer)",
        "set train.learning_rate to the product",
    ),
    (
        &["train_unet"],
        "a run that leaves the UNet as it is (OneTrainer, ai-toolkit)",
        "the UNet always learns, and train.train_text_encoder adds the text encoder",
    ),
    (
        &["network_train_unet_only"],
        "a setting of LoRA (kohya)",
        "the UNet learns alone where train.train_text_encoder = false",
    ),
    (&["network_train_text_encoder_only"], "a setting of LoRA (kohya)", ""),
    (
        &[
            "network",
            "network_module",
            "network_dim",
            "network_rank",
            "network_alpha",
            "network_weights",
            "network_args",
            "network_dropout",
            "lora",
            "lora_rank",
            "lora_alpha",
            "rank",
            "linear_alpha",
            "conv_alpha",
            "conv_dim",
            "adapter",
            "use_lora",
            "peft_type",
            "dim_from_weights",
            "scale_weight_norms",
        ],
        "LoRA (kohya, diffusers, ai-toolkit)",
        "all weights of the UNet are trained, as palettes need",
    ),
    (
        &["base_weights", "base_weights_multiplier"],
        "a LoRA merged before training (kohya)",
        "merge it into the model first",
    ),
    (
        &["loss_type", "huber_schedule", "huber_c", "loss_weight_fn", "mse_strength", "mae_strength", "huber_strength"],
        "another loss than the squared error (kohya, OneTrainer)",
        "",
    ),
    (
        &[
            "noise_offset_type",
            "multires_noise_iterations",
            "multires_noise_discount",
            "adaptive_noise_scale",
            "noise_offset_random_strength",
            "perturbation_noise_weight",
            "input_perturbation",
            "ip_noise_gamma",
            "ip_noise_gamma_random_strength",
        ],
        "another noise (kohya, diffusers)",
        "there is train.noise_offset",
    ),
    (
        &[
            "min_timestep",
            "max_timestep",
            "min_noising_strength",
            "max_noising_strength",
            "timestep_sampling",
            "timestep_distribution",
            "timestep_bias_strategy",
        ],
        "a choice of timesteps (kohya, OneTrainer)",
        "train.timestep_beta draws some more often",
    ),
    (
        &["debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"],
        "another weighting of timesteps (kohya)",
        "there is train.min_snr_gamma",
    ),
    (
        &["v_parameterization", "v2", "sdxl", "arch", "model_type", "is_v2", "is_xl"],
        "the kind of model (kohya, ai-toolkit, OneTrainer)",
        "it is read from the model's files",
    ),
    (&["variant"], "another variant of a model's files (diffusers)", "give the path of the folder that has it"),
    (&["prediction_type"], "what the UNet predicts (diffusers)", "it is read from the model's scheduler"),
    (&["vae"], "another autoencoder (kohya)", "put it into the model's folder"),
    (&["revision"], "a revision of a hub id (diffusers)", "give the path of the snapshot"),
    (
        &[
            "xformers",
            "sdpa",
            "mem_eff_attn",
            "attention",
            "attention_mechanism",
            "enable_xformers_memory_efficient_attention",
            "attn_mode",
            "flash_attn",
        ],
        "a choice of how attention is computed (kohya, diffusers, OneTrainer)",
        "the program chooses",
    ),
    (
        &[
            "allow_tf32",
            "torch_compile",
            "dynamo_backend",
            "cudnn_benchmark",
            "opt_channels_last",
            "highvram",
            "lowvram",
            "deepspeed",
            "fp8_base",
            "fused_backward_pass",
            "ddp_timeout",
        ],
        "a setting of PyTorch (kohya, diffusers)",
        "",
    ),
    (
        &[
            "full_fp16",
            "train_dtype",
            "weight_dtype",
            "output_dtype",
            "save_precision",
            "dtype",
            "no_half_vae",
            "fallback_train_dtype",
        ],
        "a choice of types (kohya, OneTrainer)",
        "there are train.mixed_precision and train.full_bf16; models are written in fp16",
    ),
    (
        &[
            "use_8bit_adam",
            "use_8bit_adamw",
            "adam8bit",
            "optimizer_args",
            "use_lion_optimizer",
            "prodigy_beta3",
            "d_coef",
            "use_adafactor",
        ],
        "another optimizer (kohya, diffusers)",
        "it is AdamW; train.full_bf16 halves its memory",
    ),
    (
        &["adam_beta1", "adam_beta2", "beta1", "beta2"],
        "one of AdamW's two betas (diffusers, OneTrainer)",
        "train.optimizer.betas = [0.9, 0.999] has both",
    ),
    (
        &[
            "lr_scheduler_args",
            "lr_scheduler_min_lr_ratio",
            "lr_decay_steps",
            "lr_scheduler_timescale",
            "lr_warmup_ratio",
        ],
        "a setting of schedules of the learning rate (kohya)",
        "there are train.lr_warmup_steps, lr_num_cycles and lr_power",
    ),
    (
        &[
            "ema_update_interval",
            "ema_device",
            "ema_update_step_interval",
            "foreach_ema",
            "offload_ema",
            "update_ema_every",
        ],
        "a setting of the moving average (diffusers, OneTrainer)",
        "there is train.ema_decay",
    ),
    (
        &["negative_prompt", "negative"],
        "a negative prompt for all samples (ai-toolkit)",
        "a prompt has its own: \"a cat --n blurry\"",
    ),
    (
        &["width", "height", "sample_width", "sample_height"],
        "the size of samples (ai-toolkit)",
        "a prompt has its own: \"a cat --w 512 --h 768\"",
    ),
    (
        &["walk_seed"],
        "a seed for each sample (ai-toolkit)",
        "each prompt has a seed of its own: sample.seed plus its place",
    ),
    (
        &["sample_at_first", "sample_at_start", "disable_sampling"],
        "when samples are drawn (kohya, ai-toolkit)",
        "there is sample.sample_every_n_steps",
    ),
    (
        &[
            "resume",
            "resume_from_checkpoint",
            "save_state",
            "save_state_on_train_end",
            "resume_from",
            "continue_last_backup",
        ],
        "how a run resumes (kohya, diffusers)",
        "the same `palettist train` resumes the run, and --resume says from where",
    ),
    (
        &[
            "save_on_interrupt",
            "save_on_exception",
            "save_last_n_epochs",
            "save_last_n_steps",
            "save_last_n_steps_state",
            "save_n_epoch_ratio",
        ],
        "when states are saved (kohya)",
        "there are checkpointing_steps, checkpoint_every_n_minutes and checkpoints_total_limit in [checkpoint]",
    ),
    (
        &["save_model_as", "output_model_format", "output_model_destination", "use_safetensors"],
        "the format of the result (kohya, OneTrainer)",
        "runs write a diffusers folder in .safetensors, palettes, and a Core ML package",
    ),
    (
        &[
            "wandb_api_key",
            "wandb_run_name",
            "log_tracker_name",
            "log_tracker_config",
            "tracker_project_name",
            "tracker_run_name",
            "log_prefix",
            "use_wandb",
            "tensorboard",
        ],
        "a setting of trackers (kohya, diffusers)",
        "there is logging.report_to",
    ),
    (&["logging_dir", "logging_folder"], "a folder for logs (kohya, diffusers)", "logs lie in output_dir/logs"),
    (
        &["huggingface_repo_id", "push_to_hub", "hub_model_id", "hub_token", "huggingface_token", "hf_token"],
        "uploads to the hub (kohya, diffusers)",
        "upload the folder that a run writes",
    ),
    (&["offline", "cache_dir_hub", "local_files_only"], "downloads from the hub", "models are read from the disk"),
    (
        &["extends", "include", "preset"],
        "a config on top of another",
        "give one file, and key=value on the command line",
    ),
    (&["deterministic"], "a choice of determinism", "runs are deterministic"),
    (
        &["components"],
        "a choice of networks",
        "the UNet's weights become palettes; `palettist export --component` has the others",
    ),
    (
        &[
            "milestone",
            "palett_tau",
            "kmeans_init",
            "kmeans_opt1d_threshold",
            "prune_threshold",
            "palett_mode",
            "palett_cluster_tol",
            "palett_max_mem",
            "palett_batch_mode",
            "partition_size",
        ],
        "a setting of coremltools' DKM",
        "there are temperature_start, temperature_end and kmeans_max_iter in [palettize]",
    ),
    (
        &["harden_steps"],
        "the length of the part with fixed assignments, in steps",
        "palettize.freeze_fraction is a fraction of the run",
    ),
    (&["teacher", "teacher_dtype", "teacher_model"], "another teacher", "the model itself, in float, is the teacher"),
    (
        &[
            "compute_unit",
            "attention_implementation",
            "chunk_unet",
            "bundle_resources_for_swift_cli",
            "check_output_correctness",
        ],
        "a choice of Core ML packages",
        "`palettist export` has it",
    ),
    (&["job", "config", "process"], "a table of ai-toolkit", "`palettist init` writes a config"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::defaults::every_key;

    fn said(path: &str) -> (String, Option<String>) {
        let known = Table::try_from(every_key()).unwrap();
        let path: Vec<String> = path.split('.').map(str::to_owned).collect();
        let Unknown { message, meant } = unknown(&known, &path);
        (message, meant.map(|path| path.join(".")))
    }

    #[test]
    fn keys_of_other_trainers_are_named_for_what_they_are() {
        for (key, expected) in [
            (
                "data.enable_bucket",
                "`enable_bucket` in [data] is not in this version: buckets of aspect ratios (kohya, OneTrainer); every picture is",
            ),
            ("train.network_dim", "`network_dim` in [train] is not in this version: LoRA"),
            ("xformers", "`xformers` is not in this version: a choice of how attention is computed"),
            ("train.num_train_epochs", "set train.max_train_steps"),
            ("train.clip_skip", "is not in this version"),
            ("data.shuffle_caption", "is not in this version"),
            ("datasets", "put all pictures below one data.train_data_dir"),
        ] {
            let (message, meant) = said(key);
            assert!(message.contains(expected) && !message.contains("did you mean"), "{message}");
            assert_eq!(meant, None, "{key}");
        }
    }

    #[test]
    fn other_names_and_misspellings_mean_a_key() {
        for (key, hint, meant) in [
            ("train.lr", "; here it is `train.learning_rate`", "train.learning_rate"),
            ("data.caption_ext", "; here it is `data.caption_extension`", "data.caption_extension"),
            ("train.learning_rte", "; did you mean `learning_rate`?", "train.learning_rate"),
            ("train.learningRate", "; did you mean `learning_rate`?", "train.learning_rate"),
            ("train.mixed-precision", "; did you mean `mixed_precision`?", "train.mixed_precision"),
            ("data.learning_rat", "; did you mean `train.learning_rate`?", "train.learning_rate"),
            ("data.learning_rate", "; it belongs in [train]", "train.learning_rate"),
            ("optimizer", "; it is [train.optimizer]", "train.optimizer"),
            ("trian", "; did you mean `train`?", "train"),
        ] {
            let (message, found) = said(key);
            assert!(message.ends_with(hint), "{message}");
            assert_eq!(found.as_deref(), Some(meant));
        }
    }

    /// Names that share some letters with a key and mean something else.
    #[test]
    fn no_far_fetched_neighbour_is_named() {
        for key in
            ["train.gamma", "train.frobnicate", "data.colour", "palettize.codebook", "train.momentum", "export.fp16"]
        {
            let (message, meant) = said(key);
            assert!(message.starts_with("unknown key") && !message.contains(';'), "{message}");
            assert_eq!(meant, None);
        }
    }

    /// No name of another trainer hides a key of ours, and each has one entry.
    #[test]
    fn the_tables_agree_with_the_schema() {
        let known = Table::try_from(every_key()).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        let foreign = FOREIGN.iter().flat_map(|(names, ..)| names.iter().copied());
        for name in foreign.chain(SYNONYMS.iter().map(|(theirs, _)| *theirs)) {
            assert!(seen.insert(name), "{name} is there twice");
        }
        // Of [model], keys may come that are not in every version.
        for (theirs, ours) in SYNONYMS.iter().filter(|(_, ours)| !ours.starts_with("model.")) {
            assert!(exists(&known, ours), "{theirs}: there is no {ours}");
        }
    }
}
