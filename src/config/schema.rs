//! The keys of a config. A key is here only if this version honours it; defaults are in `defaults`. Steps are optimizer
//! steps, except in [`Sample::sample_steps`].
//!
//! This is the one source of what is known of a key: its comment is its description in the JSON Schema, in `docs/config.md`
//! and in `configs/reference.toml`; an `example` is shown where a key has no default.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::coreml::components::Part;
use crate::coreml::exporting::Nbits;
use crate::coreml::{AttentionImplementation, DeploymentTarget};
use crate::diffusion::SamplerChoice;
use crate::palette::LutDtype;
use crate::source::lora::LoraChoice;
use crate::source::{ModelOptions, PredictionType};

/// A config: one TOML file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Version of this schema: 1.
    pub config_version: u32,
    /// Names the run and what it writes: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// The run's folder, for all that it writes; `{name}` is replaced.
    pub output_dir: PathBuf,
    /// Seed of all randomness of the run.
    pub seed: u64,
    pub model: Model,
    pub data: Data,
    pub train: Train,
    pub palettize: Palettize,
    pub distill: Distill,
    pub sample: Sample,
    pub checkpoint: Checkpoint,
    pub logging: Logging,
    pub validation: Validation,
    pub export: Export,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// A diffusers folder, a single-file checkpoint (`.safetensors`) or a hub id (required).
    #[schemars(example = &"models/stable-diffusion-v1-5")]
    pub pretrained_model_name_or_path: String,
    /// Starts the networks that are trained from random weights; only their `config.json` is read.
    pub train_from_scratch: bool,
    /// The branch, tag or commit of a hub id, in the local Hugging Face cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"fp16")]
    pub revision: Option<String>,
    /// Another autoencoder in place of the model's: a diffusers folder, a single file (`.safetensors`) or a hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"models/sd-vae-ft-mse")]
    pub vae: Option<String>,
    /// What the UNet predicts.
    #[serde(skip_serializing_if = "is_auto")]
    #[schemars(example = &"v_prediction")]
    pub prediction_type: PredictionType,
    /// Whether the noise schedule is rescaled to end in noise alone (Lin et al. 2023); what the model's files say if not
    /// given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = true)]
    pub rescale_betas_zero_snr: Option<bool>,
    /// LoRAs that are merged into the weights, in fp32 and in this order, before anything else sees them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(example = [serde_json::json!({"path": "style.safetensors", "weight": 0.8})])]
    pub loras: Vec<LoraChoice>,
}

fn is_auto(prediction: &PredictionType) -> bool {
    *prediction == PredictionType::Auto
}

impl Model {
    /// What `[model]` says besides where the model is.
    pub fn options(&self) -> ModelOptions {
        ModelOptions {
            revision: self.revision.clone(),
            vae: self.vae.clone(),
            loras: self.loras.clone(),
            prediction_type: self.prediction_type,
            rescale_betas_zero_snr: self.rescale_betas_zero_snr,
        }
    }
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Side of the square that pictures are brought to, px; a multiple of 8.
    pub resolution: i64,
    /// Pictures and captions for `mode = "full"`: `metadata.jsonl` or `metadata.csv` (`file_name`, `text`), sidecar files, or
    /// kohya's folders (`10_sks dog`: repeats an epoch, and the caption of pictures without one).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"data/pictures")]
    pub train_data_dir: Option<PathBuf>,
    /// Pictures and captions that are never trained on, for the validation loss. With `mode = "dreambooth"` those without
    /// a caption have `instance_prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"data/pictures-validation")]
    pub validation_data_dir: Option<PathBuf>,
    /// Extensions of sidecar caption files, tried in this order, in any case of letters.
    pub caption_extension: Vec<String>,
    /// What a picture without a caption is: a mistake in the data, or trained on with the empty caption.
    pub missing_caption: MissingCaption,
    /// Fraction of captions replaced by the empty one, so that classifier-free guidance keeps working; default 0.05 for
    /// `mode = "full"`, 0 for `"dreambooth"`.
    pub caption_dropout_rate: f64,
    /// Mirrors pictures at random.
    pub flip_aug: bool,
    /// Crops from the centre; otherwise at random.
    pub center_crop: bool,
    /// Latents and text embeddings, computed once; `{output_dir}` is replaced. Runs may share it.
    pub cache_dir: PathBuf,
    /// Pictures of the subject and of its class; required by `mode = "dreambooth"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dreambooth: Option<Dreambooth>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MissingCaption {
    /// A mistake in the data: stop and say which picture.
    Error,
    /// Trained on with the empty caption.
    Empty,
}

/// `[data.dreambooth]` (Ruiz et al. 2022, arXiv:2208.12242)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Dreambooth {
    /// 3 to 10 pictures of the subject (required).
    #[schemars(example = &"data/dog")]
    pub instance_data_dir: PathBuf,
    /// The caption of the subject's pictures, with a rare word for it: `a photo of sks dog` (required).
    #[schemars(example = &"a photo of sks dog")]
    pub instance_prompt: String,
    /// Pictures of the subject's class, with `prior_source = "pictures"`; drawn by the model where too few, and drawn again
    /// when prompt, model, size or seed change. Pictures that the user put there are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"data/dog-class")]
    pub class_data_dir: Option<PathBuf>,
    /// The caption of the class, the same without the rare word: `a photo of dog`.
    #[schemars(example = &"a photo of dog")]
    pub class_prompt: String,
    /// Also trains on the class, so that the model does not forget it (section 3.3).
    pub with_prior_preservation: bool,
    /// Where the prior loss knows the class from.
    pub prior_source: PriorSource,
    /// λ of the prior loss: mean loss of the subject's pictures + λ · mean loss of the class.
    pub prior_loss_weight: f64,
    /// How many pictures of the class to have; more are not used, as in diffusers.
    pub num_class_images: usize,
    /// How many of them to draw at a time.
    pub sample_batch_size: usize,
    /// Sampler steps per picture of the class.
    pub prior_sample_steps: usize,
    /// Classifier-free guidance scale of the pictures of the class.
    pub prior_guidance_scale: f64,
}

/// What the prior loss compares the prediction with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PriorSource {
    /// The noise in pictures of the class, as the paper does.
    Pictures,
    /// The answer of the base, the model that the run starts from, to the class prompt on the subject's own noised pictures:
    /// no pictures of the class are needed (ai-toolkit's `diff_output_preservation`).
    Base,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Pictures with captions.
    Full,
    /// A subject, named by a rare word.
    Dreambooth,
}

/// The network that learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainedComponent {
    Unet,
    Autoencoder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    CosineWithRestarts,
    Polynomial,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// CUDA where there is a GPU, else the CPU.
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MixedPrecision {
    /// fp32 throughout.
    No,
    /// Networks compute in bf16; master weights (but for `full_bf16`), palettes and losses stay fp32.
    Bf16,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Whether the model learns from pictures with captions (`full`) or learns one subject (`dreambooth`).
    pub mode: Mode,
    /// The network that learns: the UNet, or the autoencoder alone.
    pub component: TrainedComponent,
    /// Trains the text encoder along with the UNet.
    pub train_text_encoder: bool,
    /// The step after which the text encoder stays as it is; 0 = never. Of a run of two stages (`distill.teacher =
    /// "personalized"`) the steps of both count, those of the first stage first.
    pub stop_text_encoder_training: u64,
    /// Optimizer steps of the run.
    pub max_train_steps: u64,
    /// Pictures per batch.
    pub train_batch_size: usize,
    /// Batches summed into one step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate of the weights. Default: 5e-6 for `mode = "full"`, 1e-6 for `"dreambooth"`.
    pub learning_rate: f64,
    /// Peak learning rate of the text encoder. Default: half of `learning_rate`.
    pub text_encoder_lr: f64,
    /// How the learning rate changes after its warm-up.
    pub lr_scheduler: LrScheduler,
    /// Steps over which the rate rises from 0, whatever the `lr_scheduler`.
    pub lr_warmup_steps: u64,
    /// Restarts of `cosine_with_restarts`.
    pub lr_num_cycles: u64,
    /// Exponent of `polynomial`.
    pub lr_power: f64,
    /// Gradients are scaled down to this norm; 0 = never.
    pub max_grad_norm: f64,
    /// Keeps a moving average of the weights and ships that.
    pub use_ema: bool,
    /// Decay of the moving average per step.
    pub ema_decay: f64,
    /// γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); off when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = 5.0)]
    pub min_snr_gamma: Option<f64>,
    /// Draws timesteps from Beta(a, b) over the schedule rather than evenly: `[3, 1]`, of BitsFusion (Sui et al. 2024,
    /// arXiv:2406.04333, 4.2), looks more often at noisier pictures. Evenly when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = [3.0, 1.0])]
    pub timestep_beta: Option<[f64; 2]>,
    /// Adds this times a constant per channel to the noise.
    pub noise_offset: f64,
    /// Where the run computes.
    pub device: DeviceChoice,
    /// The arithmetic of the networks.
    pub mixed_precision: MixedPrecision,
    /// Master weights, gradients and moments of AdamW in bf16, but for biases and norms; updates are rounded at random, so
    /// that small ones are not lost. Half the memory of all these; needs `mixed_precision = "bf16"`.
    pub full_bf16: bool,
    /// Keeps only the values at the borders of the networks' blocks for the backward pass and computes those within a
    /// second time: less memory, more time, the same bytes.
    pub gradient_checkpointing: bool,
    pub optimizer: Optimizer,
    pub autoencoder: AutoencoderLoss,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerType {
    Adamw,
}

/// `[train.optimizer]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    #[serde(rename = "type")]
    /// The optimizer: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
    pub kind: OptimizerType,
    /// Decay of AdamW's first and second moments.
    pub betas: [f64; 2],
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator of AdamW's update.
    pub eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    L1,
    L2,
}

/// `[train.autoencoder]`: only with `component = "autoencoder"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderLoss {
    /// Weight of the KL divergence of the latents from a unit normal (Rombach et al. 2022, appendix G).
    pub kl_weight: f64,
    /// Trains on random crops of this side, px; the whole picture when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = 256)]
    pub crop: Option<i64>,
    /// The loss of the reconstruction: absolute (`l1`) or squared (`l2`) differences.
    pub loss_type: LossType,
    /// Weight of the same loss on the differences between neighbouring pixels, which are large only along edges; 0
    /// leaves them out.
    pub gradient_weight: f64,
    /// How many scales the loss is the mean of: the picture, the picture at half its side, at a quarter and so on.
    pub scales: u32,
    /// Trains the decoder alone, as sd-vae-ft-mse was: latents stay as they are, so that every UNet of the model fits still.
    pub decoder_only: bool,
    /// The largest standard deviation of noise on the latents that the decoder is given, in units of scaled latents, drawn
    /// uniformly for each picture: the decoder learns to clear what a UNet leaves. 0 adds none.
    pub latent_noise: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One palette a weight tensor.
    PerTensor,
    /// One palette for every `group_size` channels.
    PerGroupedChannel,
}

/// `[palettize]`: differentiable k-means (Cho et al. 2022, arXiv:2108.12659) on every conv and linear weight of the UNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Palettize {
    /// Whether weights become palettes; `false` trains in float.
    pub enabled: bool,
    /// 1, 2, 3, 4, 6 or 8: a palette has 2^n_bits entries.
    pub n_bits: u32,
    /// Which weights share a palette.
    pub granularity: Granularity,
    /// Channels that share a palette, with `granularity = "per_grouped_channel"`. A weight that does not divide into
    /// such groups stays fp16.
    pub group_size: usize,
    /// Which channels are grouped, and along which the weights of an entry lie: 0 = output, 1 = input.
    pub group_axis: usize,
    /// Weights that an entry holds: 1, 2 or 4. On a CPU palettes of 2 (with 4 bits) cost some ten times as much
    /// a step, of 4 (with 8 bits) forty to a hundred times.
    pub cluster_dim: usize,
    /// Multiplies each output channel by a number of its own.
    pub enable_per_channel_scale: bool,
    /// What a palette's entry is stored as: `f16`, or `i8` with a scale.
    pub lut_dtype: LutDtype,
    /// Weights with no more elements than this stay fp16.
    pub weight_threshold: usize,
    /// Soft k-means iterations a step (T).
    pub kmeans_max_iter: usize,
    /// ρ at the first step: a layer's temperature is ρ times the mean squared error of its k-means.
    pub temperature_start: f64,
    /// ρ when assignments freeze; in between it falls geometrically.
    pub temperature_end: f64,
    /// Last fraction of the run, with assignments fixed: only palettes, and biases and norms, learn.
    pub freeze_fraction: f64,
    /// In that fraction biases, norms and whatever else has no palette go on learning; `false`: palettes alone learn.
    pub reestimate_norms_and_biases: bool,
    /// Learning rate of palettes while assignments are fixed; default: `learning_rate`.
    pub palette_learning_rate: f64,
    /// A palettized checkpoint of the model, in place of its UNet's weights: its assignments stay, and only the entries of its
    /// palettes, biases and norms learn. The run also writes these as a small file, which `--subject` puts onto the checkpoint.
    /// In place of all keys that say which weights become palettes, and how.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"base.palettes.safetensors")]
    pub palettes: Option<PathBuf>,
    /// Bits of each layer, as `palettist analyze` writes them: in place of `n_bits` and `weight_threshold`; what it does not
    /// name stays fp16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"mixed.toml")]
    pub recipe: Option<PathBuf>,
    /// Exceptions, also to the recipe, whose layers stand before them here; the last that matches a weight holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(example = [serde_json::json!({"match": "conv_in.weight", "n_bits": 8})])]
    pub overrides: Vec<PaletteOverride>,
}

/// `[[palettize.overrides]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PaletteOverride {
    /// Glob over a weight's name: `*` is anything, `?` one character (`*.attn1.*`, `conv_in.weight`).
    #[serde(rename = "match")]
    pub pattern: String,
    /// Bits for the weights that match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_bits: Option<u32>,
    /// Leaves them fp16.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip: bool,
}

/// `[distill]`: a float model teaches (BK-SDM, Kim et al. 2023, arXiv:2305.15798, section 3.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Distill {
    /// Whether a float model teaches.
    pub enabled: bool,
    /// `base`, the model that the run starts from; `personalized`, what that becomes when it learns the pictures in float
    /// first, in the same run; or the folder, file or hub id of a model of the same architecture.
    #[schemars(with = "String")]
    pub teacher: TeacherChoice,
    /// Steps of the first of two stages, with `teacher = "personalized"`: the model learns the pictures in float. The second
    /// stage, of `max_train_steps`, starts from it and learns palettes from it.
    pub personalize_steps: u64,
    /// The learning rate of the first stage; default: `learning_rate`.
    pub personalize_learning_rate: f64,
    /// The pictures that the teacher answers on. Default: `class` for `mode = "dreambooth"` with `teacher = "base"`, which has
    /// never seen the subject, else `all`.
    pub on: DistillOn,
    /// Weight of the denoising loss.
    pub lambda_sd: f64,
    /// Weight of the squared difference from the teacher's output, a mean over the pictures that it answers on. With
    /// `on = "all"` those of the class have a mean of their own, times `prior_loss_weight`, as in the denoising loss.
    pub lambda_kd_output: f64,
    /// Weight of the squared differences from what the teacher's blocks (each one on the way down, the middle one, each on
    /// the way up) give to the next, summed over the blocks.
    pub lambda_kd_feat: f64,
}

/// Who teaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
pub enum TeacherChoice {
    /// The model that the run starts from.
    Base,
    /// The model of the run's first stage.
    Personalized,
    /// A diffusers folder, a single file, a hub id or a run's folder.
    Model(String),
}

impl From<String> for TeacherChoice {
    fn from(text: String) -> Self {
        match text.as_str() {
            "base" => Self::Base,
            "personalized" => Self::Personalized,
            _ => Self::Model(text),
        }
    }
}

impl From<TeacherChoice> for String {
    fn from(teacher: TeacherChoice) -> Self {
        match teacher {
            TeacherChoice::Base => "base".to_owned(),
            TeacherChoice::Personalized => "personalized".to_owned(),
            TeacherChoice::Model(model) => model,
        }
    }
}

/// The pictures that a teacher answers on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DistillOn {
    All,
    /// DreamBooth's pictures of the class; the data alone teach the subject.
    Class,
}

/// `[sample]`: pictures drawn during a run, with the palettes in place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sample {
    /// Draws every prompt each time so many steps are done; 0 = never.
    pub sample_every_n_steps: u64,
    /// Prompts to draw. Each may end in the flags of kohya's sd-scripts: `a cat --n blurry --w 512 --h 768 --d 1 --l 7.5 --s 28 --ss euler`.
    #[schemars(example = ["a photo of sks dog"])]
    pub prompts: Vec<String>,
    /// Sampler steps per picture.
    pub sample_steps: usize,
    /// Classifier-free guidance scale.
    pub guidance_scale: f64,
    /// Seed of the first prompt; each later prompt has the next number.
    pub seed: u64,
    /// The sampler, by name, or `auto`: that of the model's scheduler.
    #[schemars(with = "String")]
    pub sampler: SamplerChoice,
}

/// `[checkpoint]`: what `--resume` continues from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Saves a checkpoint each time so many steps are done; 0 = only by time and at the end.
    pub checkpointing_steps: u64,
    /// Saves a checkpoint each time so many minutes have passed; 0 = only by steps and at the end.
    pub checkpoint_every_n_minutes: u64,
    /// How many checkpoints are kept; older ones are deleted. At least 2, so that a good one is always there.
    pub checkpoints_total_limit: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tracker {
    /// `logs/metrics.jsonl`
    Jsonl,
    /// `logs/events.out.tfevents.*`
    Tensorboard,
}

/// `[logging]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Logging {
    /// Logs losses and learning rates each time so many steps are done.
    pub log_every: u64,
    /// Where they are logged, besides the progress line.
    pub report_to: Vec<Tracker>,
}

/// `[validation]`: the denoising loss on `validation_data_dir`, with noise and timesteps that never change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Validation {
    /// Measures the loss each time so many steps are done; 0 = only at the end.
    pub every_n_steps: u64,
    /// Seed of the noise and timesteps.
    pub seed: u64,
    /// How many batches are measured.
    pub batches: usize,
}

/// `[export]`: what is written when a run ends. The keys are the options of `export`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Whether Core ML packages are written, to `coreml/` in the run's folder.
    pub coreml: bool,
    /// Networks of which packages are written, those that the run does not train too. Default: what the run trains.
    pub components: Vec<Part>,
    /// The oldest system that the packages run on. Default: the first that can hold the palettes.
    pub min_deployment_target: DeploymentTarget,
    /// How the UNet's attention is computed: for the GPU, or for the Neural Engine.
    pub attention_implementation: AttentionImplementation,
    /// Height of the packages' latents, an eighth of a picture's. Default: `resolution` / 8.
    pub latent_h: i64,
    /// Width of the packages' latents, an eighth of a picture's. Default: `resolution` / 8.
    pub latent_w: i64,
    /// A UNet with a batch of one: two calls a step for classifier-free guidance, less memory.
    pub unet_batch_one: bool,
    /// A UNet that takes what ControlNets add (the package `control-unet`).
    pub unet_support_controlnet: bool,
    /// The UNet in two packages of half the bytes each, for phones.
    pub chunk_unet: bool,
    /// Palettes without training for networks that have none: bits for all, or `"text_encoder=6,vae_decoder=8"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"text_encoder=6,vae_decoder=8")]
    pub quantize_nbits: Option<Nbits>,
    /// Also makes the folder `Resources` that Apple's Swift package reads, of packages that are compiled.
    pub bundle_resources_for_swift_cli: bool,
}

impl Export {
    /// The networks, each once, in the order in which packages are written.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = self.components.clone();
        parts.sort();
        parts.dedup();
        parts
    }
}
