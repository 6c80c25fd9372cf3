//! Keys without effect: under which conditions a key of the table in `keys` does nothing, and what is said of one that is
//! written all the same.
//!
//! Refused is what the user surely meant otherwise: a setting whose switch was forgotten. Where the switch is written too
//! (`palettize.enabled=false` to compare with float), a config that others share may hold the rest, and it is only warned of.

use super::{
    Config, DistillOn, Granularity, LrScheduler, Mode, Palettize, PriorSource, SamplePrompt, TeacherChoice,
    TrainedComponent,
};
use crate::coreml::components::Part;

/// Why a key has no effect.
pub(super) struct Idle {
    pub why: String,
    pub verdict: Verdict,
}

/// What is said of a key without effect that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Refused unless this key, the switch, is written too.
    Forgotten(&'static str),
    Refused,
    Warned,
    /// Warned of: it depends on the length of the run, as that of a short trial.
    Passing,
    /// Warned of, in the words of `why` alone: the key has an effect, but hardly the one that is meant.
    Odd,
}

impl Idle {
    fn new(verdict: Verdict, why: impl Into<String>) -> Option<Self> {
        Some(Self { why: why.into(), verdict })
    }
}

use Verdict::{Forgotten, Odd, Passing, Refused, Warned};

pub(super) fn always(_: &Config) -> Option<Idle> {
    None
}

fn is_autoencoder(config: &Config) -> bool {
    config.train.component == TrainedComponent::Autoencoder
}

pub(super) fn unet(config: &Config) -> Option<Idle> {
    let why = "it is for the UNet, and train.component is \"autoencoder\"";
    if is_autoencoder(config) { Idle::new(Warned, why) } else { None }
}

pub(super) fn merged(config: &Config) -> Option<Idle> {
    let why = "LoRAs change the UNet and text encoders, and train.component is \"autoencoder\"";
    if is_autoencoder(config) { Idle::new(Warned, why) } else { None }
}

pub(super) fn cache(config: &Config) -> Option<Idle> {
    let why = "with train.component = \"autoencoder\" nothing is cached";
    if is_autoencoder(config) { Idle::new(Warned, why) } else { None }
}

pub(super) fn autoencoder(config: &Config) -> Option<Idle> {
    let why = "it is for train.component = \"autoencoder\"";
    if is_autoencoder(config) { None } else { Idle::new(Forgotten("train.component"), why) }
}

/// What holds for an encoder that learns.
pub(super) fn encoder(config: &Config) -> Option<Idle> {
    let why = "the encoder does not learn (train.autoencoder.decoder_only = true)";
    let fixed = config.train.autoencoder.decoder_only;
    autoencoder(config).or_else(|| if fixed { Idle::new(Warned, why) } else { None })
}

pub(super) fn crop(config: &Config) -> Option<Idle> {
    autoencoder(config).or_else(|| match config.train.autoencoder.crop {
        Some(crop) if crop == config.data.resolution => {
            Idle::new(Warned, format!("pictures are {crop} px wide and high too (data.resolution)"))
        }
        _ => None,
    })
}

/// `data.train_data_dir`.
pub(super) fn instead_of_captions_folder(config: &Config) -> Option<Idle> {
    let why = "train.mode = \"dreambooth\" takes its pictures from data.dreambooth.instance_data_dir";
    if config.train.mode == Mode::Dreambooth { Idle::new(Refused, why) } else { None }
}

pub(super) fn captions(config: &Config) -> Option<Idle> {
    // The validation folder has captions in any mode.
    let unread = config.train.mode == Mode::Dreambooth && config.data.validation_data_dir.is_none();
    let why =
        "train.mode = \"dreambooth\" reads no captions: every picture has the instance_prompt or the class_prompt";
    if unread { Idle::new(Refused, why) } else { None }
}

/// `data.missing_caption`.
pub(super) fn missing_caption(config: &Config) -> Option<Idle> {
    let why = "with train.component = \"autoencoder\" pictures need no captions";
    captions(config).or_else(|| if is_autoencoder(config) { Idle::new(Warned, why) } else { None })
}

/// `data.caption_dropout_rate`.
pub(super) fn dropout(config: &Config) -> Option<Idle> {
    let why = "is 1: every caption is replaced by the empty one, and none is learned";
    unet(config).or_else(|| if config.data.caption_dropout_rate == 1.0 { Idle::new(Odd, why) } else { None })
}

pub(super) fn dreambooth(config: &Config) -> Option<Idle> {
    let why = "[data.dreambooth] is for train.mode = \"dreambooth\"";
    if config.train.mode == Mode::Dreambooth { None } else { Idle::new(Refused, why) }
}

/// The weight of the prior loss.
pub(super) fn prior(config: &Config) -> Option<Idle> {
    const SWITCH: &str = "data.dreambooth.with_prior_preservation";
    let off = config.data.dreambooth.as_ref().is_some_and(|dreambooth| !dreambooth.with_prior_preservation);
    let why = "there is no prior preservation (with_prior_preservation = false)";
    dreambooth(config).or_else(|| if off { Idle::new(Forgotten(SWITCH), why) } else { None })
}

/// The class.
pub(super) fn class(config: &Config) -> Option<Idle> {
    let weightless = config.data.dreambooth.as_ref().is_some_and(|dreambooth| dreambooth.prior_loss_weight == 0.0);
    // The teacher's answers on it have a weight of their own.
    let taught = config.distill.enabled && config.distill.on == DistillOn::Class;
    let why = "prior_loss_weight is 0; with_prior_preservation = false does the same with half the work";
    prior(config).or_else(|| if weightless && !taught { Idle::new(Warned, why) } else { None })
}

/// Pictures of the class.
pub(super) fn class_pictures(config: &Config) -> Option<Idle> {
    let none = config.data.dreambooth.as_ref().is_some_and(|dreambooth| dreambooth.prior_source == PriorSource::Base);
    let why = "there are no pictures of the class (prior_source = \"base\")";
    class(config).or_else(|| if none { Idle::new(Warned, why) } else { None })
}

pub(super) fn text_encoder(config: &Config) -> Option<Idle> {
    let why = "the text encoder is not trained (train.train_text_encoder = false)";
    if config.train.train_text_encoder { None } else { Idle::new(Forgotten("train.train_text_encoder"), why) }
}

/// `train.text_encoder_lr`.
pub(super) fn text_encoder_rate(config: &Config) -> Option<Idle> {
    let why = "is 0: the text encoder costs its memory and time and learns nothing; train.train_text_encoder = false does the \
               same without";
    text_encoder(config).or_else(|| if config.train.text_encoder_lr == 0.0 { Idle::new(Odd, why) } else { None })
}

/// `train.stop_text_encoder_training`.
pub(super) fn stop(config: &Config) -> Option<Idle> {
    let (stop, first) = (config.train.stop_text_encoder_training, config.first_stage_steps());
    let steps = config.train.max_train_steps + first;
    let why = || match first {
        0 => format!("the run ends before, after train.max_train_steps = {steps}"),
        _ => format!("the run ends before, after {steps} steps (distill.personalize_steps, train.max_train_steps)"),
    };
    text_encoder(config).or_else(|| if stop > 0 && stop >= steps { Idle::new(Passing, why()) } else { None })
}

/// `train.learning_rate`.
pub(super) fn dense(config: &Config) -> Option<Idle> {
    let palettize = &config.palettize;
    let alone = palettize.enabled && freeze_at(config) == 0 && !palettize.reestimate_norms_and_biases;
    let why = "palettes alone learn, at palettize.palette_learning_rate";
    if alone && !config.train.train_text_encoder { Idle::new(Passing, why) } else { None }
}

pub(super) fn scheduler(config: &Config) -> Option<Idle> {
    let train = &config.train;
    let why = "is \"constant_with_warmup\", but train.lr_warmup_steps is 0: the learning rate is constant from the first step";
    let bare = train.lr_scheduler == LrScheduler::ConstantWithWarmup && train.lr_warmup_steps == 0;
    if bare { Idle::new(Odd, why) } else { None }
}

pub(super) fn warmup(config: &Config) -> Option<Idle> {
    let (warmup, steps) = (config.train.lr_warmup_steps, config.train.max_train_steps);
    let why = || {
        format!(
            "is {warmup}, and train.max_train_steps is {steps}: the run ends within its warm-up, below train.learning_rate"
        )
    };
    if warmup >= steps && steps > 0 { Idle::new(Odd, why()) } else { None }
}

pub(super) fn cycles(config: &Config) -> Option<Idle> {
    let why = "it is for train.lr_scheduler = \"cosine_with_restarts\"";
    let has = config.train.lr_scheduler == LrScheduler::CosineWithRestarts;
    if has { None } else { Idle::new(Forgotten("train.lr_scheduler"), why) }
}

pub(super) fn power(config: &Config) -> Option<Idle> {
    let why = "it is for train.lr_scheduler = \"polynomial\"";
    let has = config.train.lr_scheduler == LrScheduler::Polynomial;
    if has { None } else { Idle::new(Forgotten("train.lr_scheduler"), why) }
}

pub(super) fn ema(config: &Config) -> Option<Idle> {
    let why = "no moving average is kept (train.use_ema = false)";
    let all = "is 0: the average is the last weights, as without train.use_ema";
    match config.train.use_ema {
        false => Idle::new(Forgotten("train.use_ema"), why),
        true if config.train.ema_decay == 0.0 => Idle::new(Odd, all),
        true => None,
    }
}

pub(super) fn palettes(config: &Config) -> Option<Idle> {
    let why = "there are no palettes (palettize.enabled = false)";
    if config.palettize.enabled { None } else { Idle::new(Forgotten("palettize.enabled"), why) }
}

/// What makes palettes of weights.
pub(super) fn learned_palettes(config: &Config) -> Option<Idle> {
    let why = "palettize.palettes says which weights are palettes, and how; their assignments stay";
    let fixed = config.palettize.palettes.is_some();
    palettes(config).or_else(|| if fixed { Idle::new(Warned, why) } else { None })
}

/// What holds for layers that neither a recipe nor an override names.
pub(super) fn unnamed_layers(config: &Config) -> Option<Idle> {
    let Palettize { recipe, .. } = &config.palettize;
    learned_palettes(config).or_else(|| match recipe {
        Some(_) => Idle::new(Warned, "palettize.recipe says the bits of every layer"),
        None if config.palettize.names_every_layer() => {
            Idle::new(Warned, "an override (match = \"*\") says the bits of every layer")
        }
        None => None,
    })
}

pub(super) fn groups(config: &Config) -> Option<Idle> {
    let why = "it is for palettize.granularity = \"per_grouped_channel\"";
    let grouped = config.palettize.granularity == Granularity::PerGroupedChannel;
    learned_palettes(config).or_else(|| if grouped { None } else { Idle::new(Forgotten("palettize.granularity"), why) })
}

pub(super) fn axis(config: &Config) -> Option<Idle> {
    let palettize = &config.palettize;
    let has = palettize.granularity == Granularity::PerGroupedChannel || palettize.cluster_dim > 1;
    let why = "it is for palettize.granularity = \"per_grouped_channel\" or a cluster_dim of 2 or 4";
    learned_palettes(config).or_else(|| if has { None } else { Idle::new(Forgotten("palettize.granularity"), why) })
}

fn freeze_at(config: &Config) -> u64 {
    config.palettize.freeze_at(config.train.max_train_steps)
}

/// What holds until assignments freeze.
pub(super) fn soft(config: &Config) -> Option<Idle> {
    let why = "assignments are fixed from the first step on (palettize.freeze_fraction, train.max_train_steps)";
    learned_palettes(config).or_else(|| if freeze_at(config) == 0 { Idle::new(Passing, why) } else { None })
}

/// What holds from then on.
pub(super) fn frozen(config: &Config) -> Option<Idle> {
    let why = "assignments are never fixed before the run ends (palettize.freeze_fraction, train.max_train_steps)";
    let never = freeze_at(config) >= config.train.max_train_steps;
    palettes(config).or_else(|| if never { Idle::new(Passing, why) } else { None })
}

/// `palettize.palette_learning_rate`.
pub(super) fn palette_rate(config: &Config) -> Option<Idle> {
    let why = "is 0: palettes stay as they are when assignments are fixed";
    frozen(config).or_else(|| if config.palettize.palette_learning_rate == 0.0 { Idle::new(Odd, why) } else { None })
}

/// `palettize.recipe`.
pub(super) fn recipe(config: &Config) -> Option<Idle> {
    let stars = config.palettize.overrides.iter().filter(|exception| exception.pattern == "*").count();
    let replaced = config.palettize.recipe.is_some() && stars > 1;
    let why = "an override (match = \"*\") replaces it";
    learned_palettes(config).or_else(|| if replaced { Idle::new(Warned, why) } else { None })
}

pub(super) fn overrides(config: &Config) -> Option<Idle> {
    learned_palettes(config).or_else(|| {
        // Exceptions to a recipe are there to replace its layers.
        if config.palettize.recipe.is_some() {
            return None;
        }
        let (shadowed, by) = config.palettize.shadowed()?;
        let why = format!("match = \"{shadowed}\" has no effect: a later override (match = \"{by}\") replaces it");
        Idle::new(Odd, why)
    })
}

pub(super) fn distill(config: &Config) -> Option<Idle> {
    let why = "the float model does not teach (distill.enabled = false)";
    if config.distill.enabled { None } else { Idle::new(Forgotten("distill.enabled"), why) }
}

/// `distill.enabled`.
pub(super) fn teacher(config: &Config) -> Option<Idle> {
    let distill = &config.distill;
    let mute = distill.enabled && distill.lambda_kd_output == 0.0 && distill.lambda_kd_feat == 0.0;
    let why = "is true, but lambda_kd_output and lambda_kd_feat are 0: the teacher costs a pass each step and teaches nothing";
    if mute {
        return Idle::new(Odd, why);
    }
    let why = "asks what prior_source = \"base\" asks already, the base's answer to the class prompt: lambda_kd_output only adds \
               to prior_loss_weight";
    let base = config.data.dreambooth.as_ref().is_some_and(|dreambooth| dreambooth.prior_source == PriorSource::Base);
    let asks = distill.enabled && distill.teacher == TeacherChoice::Base && distill.on == DistillOn::Class;
    let twice = base && asks && distill.lambda_kd_feat == 0.0;
    if twice { Idle::new(Odd, why) } else { None }
}

/// The first of two stages.
pub(super) fn personalized(config: &Config) -> Option<Idle> {
    let why = "it is for distill.teacher = \"personalized\"";
    let has = config.distill.teacher == TeacherChoice::Personalized;
    distill(config).or_else(|| if has { None } else { Idle::new(Forgotten("distill.teacher"), why) })
}

/// `distill.on`.
pub(super) fn asked(config: &Config) -> Option<Idle> {
    let full = config.train.mode == Mode::Full;
    let why = "train.mode = \"full\" has no pictures of a class: the teacher answers on all";
    if let Some(idle) = distill(config).or_else(|| if full { Idle::new(Refused, why) } else { None }) {
        return Some(idle);
    }
    let why = "is \"all\", and the teacher is the base, which has never seen the subject: on the subject's own pictures it pulls \
               back to what it knows, and the subject is lost; \"class\" asks it about the class alone";
    let untaught = config.distill.teacher == TeacherChoice::Base && config.distill.on == DistillOn::All;
    if untaught { Idle::new(Odd, why) } else { None }
}

/// Whether pictures are drawn at all.
fn drawn(config: &Config) -> Option<Idle> {
    let (every, steps) = (config.sample.sample_every_n_steps, config.train.max_train_steps);
    if every == 0 {
        return Idle::new(Warned, "no pictures are drawn (sample.sample_every_n_steps = 0)");
    }
    let why =
        || format!("no pictures are drawn: sample.sample_every_n_steps is {every}, train.max_train_steps {steps}");
    if every > steps { Idle::new(Passing, why()) } else { None }
}

/// What holds for pictures that are drawn from prompts.
pub(super) fn prompts(config: &Config) -> Option<Idle> {
    let why = "with train.component = \"autoencoder\" samples are reconstructions of pictures";
    if is_autoencoder(config) { Idle::new(Warned, why) } else { drawn(config) }
}

/// `sample.sample_every_n_steps`.
pub(super) fn sampling(config: &Config) -> Option<Idle> {
    let sample = &config.sample;
    if sample.sample_every_n_steps == 0 {
        return None;
    }
    let bare = !is_autoencoder(config) && sample.prompts.is_empty();
    if bare { Idle::new(Warned, "no pictures are drawn (sample.prompts is empty)") } else { drawn(config) }
}

/// What holds for prompts that do not say otherwise themselves.
fn each(config: &Config, says: impl Fn(&SamplePrompt) -> bool) -> Option<Idle> {
    let prompts = &config.sample.prompts;
    self::prompts(config).or_else(|| {
        if prompts.is_empty() {
            return Idle::new(Warned, "no pictures are drawn (sample.prompts is empty)");
        }
        let all = prompts.iter().all(|prompt| SamplePrompt::parse(prompt).is_ok_and(|prompt| says(&prompt)));
        if all { Idle::new(Warned, "every prompt of sample.prompts has its own") } else { None }
    })
}

pub(super) fn each_steps(config: &Config) -> Option<Idle> {
    each(config, |prompt| prompt.steps.is_some())
}

pub(super) fn each_scale(config: &Config) -> Option<Idle> {
    each(config, |prompt| prompt.guidance_scale.is_some())
}

pub(super) fn each_seed(config: &Config) -> Option<Idle> {
    each(config, |prompt| prompt.seed.is_some())
}

pub(super) fn each_sampler(config: &Config) -> Option<Idle> {
    each(config, |prompt| prompt.sampler.is_some())
}

/// Both intervals of `[checkpoint]`.
pub(super) fn unsaved(config: &Config) -> Option<Idle> {
    let checkpoint = &config.checkpoint;
    let never = checkpoint.checkpointing_steps == 0 && checkpoint.checkpoint_every_n_minutes == 0;
    let why =
        "are both 0: nothing is saved before the run ends, and a run that is killed starts again from its first step";
    if never { Idle::new(Odd, why) } else { None }
}

/// `checkpoint.checkpointing_steps`.
pub(super) fn saved(config: &Config) -> Option<Idle> {
    let (every, steps) = (config.checkpoint.checkpointing_steps, config.train.max_train_steps);
    let why = || format!("the run ends before, after train.max_train_steps = {steps}, and is saved then");
    unsaved(config).or_else(|| if every > steps { Idle::new(Passing, why()) } else { None })
}

pub(super) fn logs(config: &Config) -> Option<Idle> {
    let (every, steps) = (config.logging.log_every, config.train.max_train_steps);
    if config.logging.report_to.is_empty() {
        return Idle::new(Warned, "nothing is logged (logging.report_to is empty)");
    }
    let why = || format!("the run ends before, after train.max_train_steps = {steps}");
    if every > steps { Idle::new(Passing, why()) } else { None }
}

pub(super) fn validation(config: &Config) -> Option<Idle> {
    let why = "there is nothing to measure on (data.validation_data_dir is not set)";
    if config.data.validation_data_dir.is_none() { Idle::new(Warned, why) } else { None }
}

/// `validation.every_n_steps`.
pub(super) fn validated(config: &Config) -> Option<Idle> {
    let (every, steps) = (config.validation.every_n_steps, config.train.max_train_steps);
    let why = || format!("the run ends before, after train.max_train_steps = {steps}, and the loss is measured then");
    validation(config).or_else(|| if every > steps { Idle::new(Passing, why()) } else { None })
}

/// What holds for a loss on noised pictures.
pub(super) fn noised_validation(config: &Config) -> Option<Idle> {
    validation(config).or_else(|| unet(config))
}

pub(super) fn package(config: &Config) -> Option<Idle> {
    let why = "no Core ML package is written (export.coreml = false)";
    if config.export.coreml { None } else { Idle::new(Forgotten("export.coreml"), why) }
}

/// `export.components`.
pub(super) fn components(config: &Config) -> Option<Idle> {
    let why = "leaves out the UNet, which this run trains: no package of it is written";
    let export = &config.export;
    // A bundle may have the UNet's package already.
    let leaves_out = !export.components.contains(&Part::Unet) && !export.bundle_resources_for_swift_cli;
    let leaves_out = leaves_out && !is_autoencoder(config);
    package(config).or_else(|| if leaves_out { Idle::new(Odd, why) } else { None })
}

/// What only the UNet's package shows.
pub(super) fn unet_package(config: &Config) -> Option<Idle> {
    let leaves_out = !config.export.components.contains(&Part::Unet);
    let idle = || Idle::new(Refused, "export.components leaves the UNet out");
    package(config).or_else(|| if leaves_out { idle() } else { None })
}

/// A bundle's script tells it the app, whether the UNet's package is there already or not.
pub(super) fn attention(config: &Config) -> Option<Idle> {
    if config.export.bundle_resources_for_swift_cli { package(config) } else { unet_package(config) }
}

pub(super) fn sized_package(config: &Config) -> Option<Idle> {
    let of_text = |part: &Part| matches!(part, Part::TextEncoder | Part::TextEncoder2);
    let idle = || Idle::new(Refused, "export.components names text encoders only, which see no latents");
    package(config).or_else(|| if config.export.components.iter().all(of_text) { idle() } else { None })
}

pub(super) fn quantized(config: &Config) -> Option<Idle> {
    let nothing = config.palettize.enabled && config.export.components.iter().all(|part| *part == Part::Unet);
    let why = "the UNet has the palettes of the run, and export.components names no other network";
    package(config).or_else(|| if nothing { Idle::new(Refused, why) } else { None })
}
