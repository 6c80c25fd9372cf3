//! Defaults: from diffusers' examples, kohya's READMEs and EveryDream2 (learning rates, steps, prior loss), and from
//! measurements of palette training (temperatures, frozen fraction). Those that depend on other keys (`learning_rate`
//! on `mode`, `distill.on` on `mode` and `teacher`, latent sizes on `resolution`) are set in `read`.

use std::path::PathBuf;

use super::*;
use crate::coreml::components::Part;
use crate::coreml::{AttentionImplementation, DeploymentTarget};
use crate::diffusion::SamplerChoice;
use crate::palette::{Form, LutDtype};

impl Default for Config {
    fn default() -> Self {
        Self {
            config_version: 1,
            name: "palettist".into(),
            output_dir: "runs/{name}".into(),
            seed: 42,
            model: Model::default(),
            data: Data::default(),
            train: Train::default(),
            palettize: Palettize::default(),
            distill: Distill::default(),
            sample: Sample::default(),
            checkpoint: Checkpoint::default(),
            logging: Logging::default(),
            validation: Validation::default(),
            export: Export::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            resolution: 512,
            train_data_dir: None,
            validation_data_dir: None,
            caption_extension: vec![".txt".into(), ".caption".into()],
            missing_caption: MissingCaption::Error,
            caption_dropout_rate: 0.05,
            flip_aug: false,
            center_crop: true,
            cache_dir: "{output_dir}/../cache".into(),
            dreambooth: None,
        }
    }
}

impl Default for Dreambooth {
    fn default() -> Self {
        Self {
            instance_data_dir: PathBuf::new(),
            instance_prompt: String::new(),
            class_data_dir: None,
            class_prompt: String::new(),
            with_prior_preservation: true,
            prior_source: PriorSource::Pictures,
            prior_loss_weight: 1.0,
            num_class_images: 200,
            sample_batch_size: 4,
            prior_sample_steps: 50,
            prior_guidance_scale: 7.5,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            mode: Mode::Full,
            component: TrainedComponent::Unet,
            train_text_encoder: false,
            stop_text_encoder_training: 0,
            max_train_steps: 800,
            train_batch_size: 1,
            gradient_accumulation_steps: 1,
            learning_rate: 5e-6,
            text_encoder_lr: 2.5e-6,
            lr_scheduler: LrScheduler::Constant,
            lr_warmup_steps: 0,
            lr_num_cycles: 1,
            lr_power: 1.0,
            max_grad_norm: 1.0,
            use_ema: false,
            ema_decay: 0.9999,
            min_snr_gamma: None,
            timestep_beta: None,
            noise_offset: 0.0,
            device: DeviceChoice::Auto,
            mixed_precision: MixedPrecision::No,
            full_bf16: false,
            gradient_checkpointing: true,
            optimizer: Optimizer::default(),
            autoencoder: AutoencoderLoss::default(),
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { kind: OptimizerType::Adamw, betas: [0.9, 0.999], weight_decay: 0.01, eps: 1e-8 }
    }
}

impl Default for AutoencoderLoss {
    fn default() -> Self {
        Self {
            kl_weight: 1e-6,
            crop: None,
            loss_type: LossType::L1,
            gradient_weight: 0.0,
            scales: 1,
            decoder_only: false,
            latent_noise: 0.0,
        }
    }
}

impl Default for Palettize {
    fn default() -> Self {
        Self {
            enabled: true,
            n_bits: 4,
            granularity: Granularity::PerTensor,
            group_size: Form::GROUP_SIZE,
            group_axis: 0,
            cluster_dim: 1,
            enable_per_channel_scale: false,
            lut_dtype: LutDtype::F16,
            weight_threshold: 2048,
            kmeans_max_iter: 3,
            temperature_start: 1.0,
            temperature_end: 0.1,
            freeze_fraction: 0.2,
            reestimate_norms_and_biases: true,
            palette_learning_rate: 5e-6,
            palettes: None,
            recipe: None,
            overrides: Vec::new(),
        }
    }
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            enabled: false,
            teacher: TeacherChoice::Base,
            personalize_steps: 800,
            personalize_learning_rate: 5e-6,
            on: DistillOn::All,
            lambda_sd: 1.0,
            lambda_kd_output: 1.0,
            lambda_kd_feat: 0.0,
        }
    }
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            sample_every_n_steps: 100,
            prompts: Vec::new(),
            sample_steps: 25,
            guidance_scale: 7.5,
            seed: 42,
            sampler: SamplerChoice::default(),
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { checkpointing_steps: 200, checkpoint_every_n_minutes: 15, checkpoints_total_limit: 3 }
    }
}

impl Default for Logging {
    fn default() -> Self {
        Self { log_every: 10, report_to: vec![Tracker::Jsonl, Tracker::Tensorboard] }
    }
}

impl Default for Validation {
    fn default() -> Self {
        Self { every_n_steps: 100, seed: 0, batches: 16 }
    }
}

impl Default for Export {
    fn default() -> Self {
        Self {
            coreml: true,
            components: vec![Part::Unet],
            min_deployment_target: DeploymentTarget::Ios16,
            attention_implementation: AttentionImplementation::Original,
            latent_h: 64,
            latent_w: 64,
            unet_batch_one: false,
            unet_support_controlnet: false,
            chunk_unet: false,
            quantize_nbits: None,
            bundle_resources_for_swift_cli: false,
        }
    }
}
