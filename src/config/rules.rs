//! What a config must fulfil beyond types: ranges, and keys that must go together. Nothing on disk is looked at.

use std::path::{Component, Path, PathBuf};

use crate::coreml::DeploymentTarget;
use crate::coreml::components::Part;

use super::{
    Config, Distill, DistillOn, LrScheduler, MixedPrecision, Mode, PriorSource, SamplePrompt, TeacherChoice,
    TrainedComponent,
};
use crate::palette::BITS;

/// Replaces `{name}` and `{output_dir}` in paths.
pub(super) fn fill_names(config: &mut Config) {
    let fill = |path: &Path, what: &str, by: &str| PathBuf::from(path.to_string_lossy().replace(what, by));
    config.output_dir = fill(&config.output_dir, "{name}", &config.name);
    let output_dir = config.output_dir.to_string_lossy().into_owned();
    let cache_dir = fill(&config.data.cache_dir, "{output_dir}", &output_dir);
    config.data.cache_dir = without_parents(&fill(&cache_dir, "{name}", &config.name));
}

/// `runs/dog/../cache` as `runs/cache`: the folder left of a `..` need not exist yet.
fn without_parents(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if matches!(result.components().next_back(), Some(Component::Normal(_))) => {
                result.pop();
            }
            part => result.push(part),
        }
    }
    result
}

/// The rules that are broken, as (key, what is wrong and what to do).
pub(super) fn broken(config: &Config) -> Vec<(String, String)> {
    let mut rules = Rules::default();
    general(config, &mut rules);
    data(config, &mut rules);
    train(config, &mut rules);
    palettize(config, &mut rules);
    rest(config, &mut rules);
    rules.broken
}

#[derive(Default)]
struct Rules {
    broken: Vec<(String, String)>,
}

impl Rules {
    /// Notes `message` about `key` unless `holds`.
    fn must(&mut self, holds: bool, key: &str, message: impl Into<String>) {
        if !holds {
            self.broken.push((key.to_string(), message.into()));
        }
    }

    fn at_least_one(&mut self, value: usize, key: &str) {
        self.must(value >= 1, key, "must be at least 1");
    }

    /// Models have a thousand timesteps.
    fn sampler_steps(&mut self, value: usize, key: &str) {
        self.must((1..=1000).contains(&value), key, format!("is {value}, but must be from 1 to 1000"));
    }

    fn between(&mut self, value: f64, low: f64, high: f64, key: &str) {
        self.must((low..=high).contains(&value), key, format!("is {value}, but must be between {low} and {high}"));
    }

    fn positive(&mut self, value: f64, key: &str) {
        self.must(value > 0.0 && value.is_finite(), key, format!("is {value}, but must be above 0"));
    }

    fn not_negative(&mut self, value: f64, key: &str) {
        self.must(value >= 0.0 && value.is_finite(), key, format!("is {value}, but must be 0 or more"));
    }
}

/// The rate at which `lr_scheduler = "polynomial"` ends, as in diffusers (`lr_end`).
pub const POLYNOMIAL_END: f64 = 1e-7;

/// The most bytes of the name of a run or a model: file systems take names of 255, and packages' names add to this.
pub const LONGEST_NAME: usize = 160;

fn general(config: &Config, rules: &mut Rules) {
    let version = config.config_version;
    rules.must(version == 1, "config_version", format!("is {version}, but this version of Palettist reads 1"));
    let good = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    let name = &config.name;
    rules.must(
        !name.is_empty() && name.chars().all(good) && !name.starts_with('.'),
        "name",
        format!("is \"{name}\"; use letters, digits, `-`, `_` and `.`, because files are named after it"),
    );
    rules.must(
        name.len() <= LONGEST_NAME,
        "name",
        format!("has {} bytes; {LONGEST_NAME} at most, because files are named after it", name.len()),
    );
    rules.must(config.output_dir != Path::new(""), "output_dir", "must not be empty");
    let folders = config.picture_folders().into_iter();
    let written = [("output_dir", config.output_dir.as_path()), ("data.cache_dir", config.data.cache_dir.as_path())];
    for (key, path) in folders.chain(written) {
        let message = format!("is \"{}\", and `~` is no home folder here: write that out", path.display());
        rules.must(!path.starts_with("~"), key, message);
    }
    rules.must(
        !config.model.pretrained_model_name_or_path.is_empty(),
        "model.pretrained_model_name_or_path",
        "is missing: the model to start from, a diffusers folder or a single-file checkpoint (.safetensors)",
    );
    rules.must(
        !config.model.train_from_scratch || config.model.loras.is_empty(),
        "model.loras",
        "can't be merged with model.train_from_scratch: a LoRA changes the weights that it was made for",
    );
    for (number, lora) in config.model.loras.iter().enumerate() {
        if let Some(mistake) = lora.mistake() {
            rules.must(false, "model.loras", format!("{mistake} (entry {})", number + 1));
        }
    }
    rules.must(
        !(config.model.train_from_scratch && config.distill.enabled),
        "distill.enabled",
        "can't be true with model.train_from_scratch: random weights teach nothing",
    );
    rules.must(
        !(config.model.train_from_scratch && config.train.mode == Mode::Dreambooth),
        "model.train_from_scratch",
        "can't be true with train.mode = \"dreambooth\", which changes a model that can already draw",
    );
}

fn data(config: &Config, rules: &mut Rules) {
    let data = &config.data;
    rules.must(
        (8..=8192).contains(&data.resolution) && data.resolution % 8 == 0,
        "data.resolution",
        format!("is {}, but must be a multiple of 8 up to 8192", data.resolution),
    );
    rules.between(data.caption_dropout_rate, 0.0, 1.0, "data.caption_dropout_rate");
    rules.must(!data.caption_extension.is_empty(), "data.caption_extension", "is empty; [\".txt\"], say");
    rules.must(
        data.caption_extension.iter().all(|own| !own.trim_matches('.').is_empty() && !own.contains(['/', '\\'])),
        "data.caption_extension",
        "must hold extensions, as in [\".txt\"]",
    );
    match (config.train.mode, &data.dreambooth) {
        (Mode::Full, None) => rules.must(
            data.train_data_dir.is_some(),
            "data.train_data_dir",
            "is missing: the folder of pictures and captions",
        ),
        // That its keys have no effect is told by the table of keys.
        (Mode::Full, Some(_)) => {}
        (Mode::Dreambooth, None) => {
            rules.must(false, "data.dreambooth", "is missing: train.mode = \"dreambooth\" needs that table")
        }
        (Mode::Dreambooth, Some(dreambooth)) => {
            let key = |name: &str| format!("data.dreambooth.{name}");
            let prior = dreambooth.with_prior_preservation;
            rules.must(
                dreambooth.instance_data_dir != Path::new(""),
                &key("instance_data_dir"),
                "is missing: the folder with pictures of the subject",
            );
            rules.must(
                !dreambooth.instance_prompt.trim().is_empty(),
                &key("instance_prompt"),
                "is missing: the caption of the subject, as in \"a photo of sks dog\"",
            );
            let pictures = prior && dreambooth.prior_source == PriorSource::Pictures;
            rules.must(
                !pictures || dreambooth.class_data_dir.as_deref().is_some_and(|dir| dir != Path::new("")),
                &key("class_data_dir"),
                "is missing: prior preservation keeps its pictures there (or set with_prior_preservation = false)",
            );
            rules.must(
                !prior || !dreambooth.class_prompt.trim().is_empty(),
                &key("class_prompt"),
                "is missing: prior preservation needs it, as in \"a photo of dog\" \
                 (or set with_prior_preservation = false)",
            );
            rules.not_negative(dreambooth.prior_loss_weight, &key("prior_loss_weight"));
            rules.at_least_one(dreambooth.num_class_images, &key("num_class_images"));
            rules.at_least_one(dreambooth.sample_batch_size, &key("sample_batch_size"));
            rules.sampler_steps(dreambooth.prior_sample_steps, &key("prior_sample_steps"));
            rules.not_negative(dreambooth.prior_guidance_scale, &key("prior_guidance_scale"));
        }
    }
}

fn train(config: &Config, rules: &mut Rules) {
    let train = &config.train;
    rules.must(train.max_train_steps >= 1, "train.max_train_steps", "must be at least 1");
    rules.at_least_one(train.train_batch_size, "train.train_batch_size");
    rules.at_least_one(train.gradient_accumulation_steps, "train.gradient_accumulation_steps");
    rules.positive(train.learning_rate, "train.learning_rate");
    rules.not_negative(train.text_encoder_lr, "train.text_encoder_lr");
    // As diffusers refuses it: the rate would rise.
    rules.must(
        train.lr_scheduler != LrScheduler::Polynomial || train.learning_rate > POLYNOMIAL_END,
        "train.learning_rate",
        format!(
            "is {:?}, but must be above {POLYNOMIAL_END:?}, where train.lr_scheduler = \"polynomial\" ends",
            train.learning_rate
        ),
    );
    rules.must(train.lr_num_cycles >= 1, "train.lr_num_cycles", "must be at least 1");
    rules.positive(train.lr_power, "train.lr_power");
    rules.not_negative(train.max_grad_norm, "train.max_grad_norm");
    rules.between(train.ema_decay, 0.0, 1.0, "train.ema_decay");
    rules.must(
        !(train.use_ema && config.palettize.enabled),
        "train.use_ema",
        "averages plain weights; with palettes (palettize.enabled) set it to false",
    );
    rules.must(
        !train.full_bf16 || train.mixed_precision == MixedPrecision::Bf16,
        "train.full_bf16",
        "needs train.mixed_precision = \"bf16\": networks that compute in fp32 would gain nothing from weights in bf16",
    );
    if let Some(gamma) = train.min_snr_gamma {
        rules.positive(gamma, "train.min_snr_gamma");
    }
    for number in train.timestep_beta.into_iter().flatten() {
        rules.positive(number, "train.timestep_beta");
    }
    rules.not_negative(train.noise_offset, "train.noise_offset");
    for beta in train.optimizer.betas {
        rules.must((0.0..1.0).contains(&beta), "train.optimizer.betas", "must be two numbers from 0 to below 1");
    }
    rules.not_negative(train.optimizer.weight_decay, "train.optimizer.weight_decay");
    rules.positive(train.optimizer.eps, "train.optimizer.eps");
    rules.not_negative(train.autoencoder.kl_weight, "train.autoencoder.kl_weight");
    if let Some(crop) = train.autoencoder.crop {
        rules.must(
            crop >= 8 && crop % 8 == 0 && crop <= config.data.resolution,
            "train.autoencoder.crop",
            format!("is {crop}, but must be a multiple of 8 up to data.resolution ({})", config.data.resolution),
        );
    }
    rules.not_negative(train.autoencoder.gradient_weight, "train.autoencoder.gradient_weight");
    rules.not_negative(train.autoencoder.latent_noise, "train.autoencoder.latent_noise");
    let new = train.autoencoder.decoder_only && config.model.train_from_scratch;
    rules.must(
        !new,
        "train.autoencoder.decoder_only",
        "is true, but with model.train_from_scratch = true there is no encoder yet: set one of them to false",
    );
    let (scales, side) = (train.autoencoder.scales, train.autoencoder.crop.unwrap_or(config.data.resolution));
    rules.must(
        (1..=4).contains(&scales) && side >> (scales - 1) >= 2,
        "train.autoencoder.scales",
        format!(
            "is {scales}, but must be 1 to 4, each half as wide as the one before it and the last at least 2 px (of {side})"
        ),
    );
    if train.component == TrainedComponent::Autoencoder {
        let only = "is only for the UNet; with train.component = \"autoencoder\" set it to";
        rules.must(train.mode == Mode::Full, "train.mode", format!("{only} \"full\""));
        rules.must(!config.palettize.enabled, "palettize.enabled", format!("{only} false"));
        rules.must(!config.distill.enabled, "distill.enabled", format!("{only} false"));
        rules.must(!train.train_text_encoder, "train.train_text_encoder", format!("{only} false"));
        rules.must(!config.export.coreml, "export.coreml", format!("{only} false"));
    }
}

fn palettize(config: &Config, rules: &mut Rules) {
    let palettize = &config.palettize;
    let bits = |n: u32| format!("is {n}, but Core ML has palettes of 1, 2, 3, 4, 6 or 8 bits");
    rules.must(BITS.contains(&palettize.n_bits), "palettize.n_bits", bits(palettize.n_bits));
    // Of a number of bits that is right, so that the other keys are looked at too.
    let form = palettize.form(BITS[0]);
    if let Some((field, message)) = form.problem() {
        let key = match field {
            "axis" => "group_axis",
            "per_channel_scale" => "enable_per_channel_scale",
            other => other,
        };
        rules.must(!palettize.enabled, &format!("palettize.{key}"), message);
    }
    if let Some(what) = palettize.needs_ios18() {
        let target = config.export.min_deployment_target;
        rules.must(
            !config.export.coreml || target == DeploymentTarget::Ios18,
            "export.min_deployment_target",
            format!("does not hold {what}: set \"iOS18\" (macOS15)"),
        );
    }
    rules.at_least_one(palettize.kmeans_max_iter, "palettize.kmeans_max_iter");
    rules.positive(palettize.temperature_start, "palettize.temperature_start");
    rules.positive(palettize.temperature_end, "palettize.temperature_end");
    rules.must(
        palettize.temperature_end <= palettize.temperature_start,
        "palettize.temperature_end",
        "must not be above temperature_start: temperatures fall, so that soft weights become palettes",
    );
    rules.between(palettize.freeze_fraction, 0.0, 1.0, "palettize.freeze_fraction");
    rules.not_negative(palettize.palette_learning_rate, "palettize.palette_learning_rate");
    for exception in &palettize.overrides {
        let named = format!("(match = \"{}\")", exception.pattern);
        rules.must(
            exception.n_bits.is_some() != exception.skip,
            "palettize.overrides",
            format!("{named} needs either n_bits or skip = true"),
        );
        if let Some(n) = exception.n_bits {
            rules.must(BITS.contains(&n), "palettize.overrides", format!("{named} n_bits {}", bits(n)));
        }
    }
    rules.not_negative(config.distill.lambda_sd, "distill.lambda_sd");
    rules.not_negative(config.distill.lambda_kd_output, "distill.lambda_kd_output");
    rules.not_negative(config.distill.lambda_kd_feat, "distill.lambda_kd_feat");
    let fixed = palettize.enabled && palettize.palettes.is_some();
    rules.must(
        !(fixed && config.train.train_text_encoder),
        "train.train_text_encoder",
        "can't be true with palettize.palettes: what is learnt goes into a small file of palettes, biases and norms",
    );
    rules.must(
        !(fixed && config.model.train_from_scratch),
        "model.train_from_scratch",
        "can't be true with palettize.palettes: the palettes are the weights",
    );
    rules.must(
        !(fixed && config.first_stage_steps() > 0),
        "distill.teacher",
        "can't be \"personalized\" with palettize.palettes: palettes would not start from what the first stage learns; name the \
         folder of a model that knows the subject",
    );
    let Distill { enabled, on, lambda_sd, lambda_kd_output, lambda_kd_feat, .. } = config.distill;
    rules.must(
        !enabled || lambda_sd + lambda_kd_output + lambda_kd_feat > 0.0,
        "distill.lambda_sd",
        "lambda_kd_output and lambda_kd_feat are all 0: there is nothing to learn from",
    );
    rules.must(
        config.distill.teacher != TeacherChoice::Model(String::new()),
        "distill.teacher",
        "is empty; it is \"base\", \"personalized\", or the folder of a model",
    );
    rules.must(config.distill.personalize_steps >= 1, "distill.personalize_steps", "must be at least 1");
    rules.positive(config.distill.personalize_learning_rate, "distill.personalize_learning_rate");
    let dreambooth = config.data.dreambooth.as_ref().filter(|_| config.train.mode == Mode::Dreambooth);
    let classless = dreambooth.is_some_and(|dreambooth| !dreambooth.with_prior_preservation);
    rules.must(
        !(enabled && on == DistillOn::Class && classless),
        "distill.enabled",
        "asks the teacher about the class alone (distill.on = \"class\"), and there is none \
         (with_prior_preservation = false); set it to false, or with_prior_preservation to true",
    );
}

fn rest(config: &Config, rules: &mut Rules) {
    rules.sampler_steps(config.sample.sample_steps, "sample.sample_steps");
    rules.not_negative(config.sample.guidance_scale, "sample.guidance_scale");
    for prompt in &config.sample.prompts {
        let wrong = match SamplePrompt::parse(prompt) {
            Err(message) => Some(message),
            Ok(SamplePrompt { negative_prompt: Some(_), guidance_scale, .. }) => {
                let scale = guidance_scale.unwrap_or(config.sample.guidance_scale);
                (scale <= 1.0).then(|| format!("`--n` has no effect: guidance of {scale} is none"))
            }
            Ok(_) => None,
        };
        if let Some(message) = wrong {
            rules.must(false, "sample.prompts", format!("(\"{prompt}\"): {message}"));
        }
    }
    rules.must(
        config.checkpoint.checkpoints_total_limit >= 2,
        "checkpoint.checkpoints_total_limit",
        "must be at least 2, so that a good checkpoint is there while the next is written",
    );
    rules.must(config.logging.log_every >= 1, "logging.log_every", "must be at least 1");
    rules.at_least_one(config.validation.batches, "validation.batches");
    export(config, rules);
}

fn export(config: &Config, rules: &mut Rules) {
    let export = &config.export;
    for (key, latent) in [("export.latent_h", export.latent_h), ("export.latent_w", export.latent_w)] {
        rules.must(latent >= 1, key, format!("is {latent}, but must be at least 1"));
    }
    rules.must(
        !export.components.is_empty(),
        "export.components",
        "is empty: name a network, or set export.coreml = false",
    );
    let Some(nbits) = export.quantize_nbits.as_ref().filter(|_| export.coreml) else { return };
    let key = "export.quantize_nbits";
    if let Some(part) = nbits.named().find(|part| !export.components.contains(part)) {
        rules.must(false, key, format!("names {part}, which export.components leaves out"));
    }
    let twice = nbits.names(Part::Unet) && config.palettize.enabled;
    rules.must(!twice, key, "names the UNet, which has the palettes of the run (palettize.enabled = true)");
    if let Some((part, what)) = config.quantized_needs_ios18() {
        rules.must(
            export.min_deployment_target == DeploymentTarget::Ios18,
            "export.min_deployment_target",
            format!("does not hold {what}, as of {part}: set \"iOS18\" (macOS15)"),
        );
    }
}
