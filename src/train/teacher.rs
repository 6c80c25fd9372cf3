//! A model that answers what the one that learns is to answer too: a frozen UNet with the text encoders that belong to it.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::examples::Texts;
use super::identity::ModelIdentity;
use super::refused::refused;
use super::run_folder::{MODEL, RunFolder};
use crate::config::{Config, Distill, DistillOn, Mode, PriorSource, TeacherChoice};
use crate::data::Cache;
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::{Tensors, Weights};
use crate::pipeline::condition::SizeIds;
use crate::pipeline::text_to_image;
use crate::source::{Component, Model, ModelOptions};

/// How many frozen models a run asks: the teacher, and the base for the prior loss, which may be one.
pub fn asked_models(config: &Config) -> u64 {
    let is_another = !config.distill.enabled || config.distill.teacher != TeacherChoice::Base;
    u64::from(config.distill.enabled) + u64::from(prior_is_base(config) && is_another)
}

/// The model that the UNet, and the text encoder where that learns, start from: the config's, or that of the first of two
/// stages.
///
/// # Errors
/// The first stage is not finished.
pub fn start(config: &Config, model: &Model) -> Result<Model> {
    let Some(first) = config.first_stage() else { return Ok(model.clone()) };
    let folder = first.output_dir.to_string_lossy();
    let (model, _) = RunFolder::open(&folder, &options(config))
        .with_context(|| format!("what the first of two stages made; delete {folder} to have it run again"))?;
    Ok(model)
}

/// What the config says of its model holds for another one in its place, but for where parts of it lie and what is merged
/// into it.
fn options(config: &Config) -> ModelOptions {
    ModelOptions { revision: None, vae: None, loras: Vec::new(), ..config.model.options() }
}

/// Whether what the first of two stages makes is not there (any more): `train` runs it first.
pub fn first_stage_is_missing(config: &Config) -> bool {
    config.first_stage().is_some_and(|first| !first.output_dir.join(MODEL).is_dir())
}

/// The teacher, where it is not the base: `None` where none teaches, or the first stage is still to come.
///
/// # Errors
/// A model that can't be read, or of another architecture than `model`.
pub fn other_teacher(config: &Config, model: &Model) -> Result<Option<Model>> {
    match &config.distill.teacher {
        _ if !config.distill.enabled => Ok(None),
        TeacherChoice::Base => Ok(None),
        TeacherChoice::Personalized => (!first_stage_is_missing(config)).then(|| start(config, model)).transpose(),
        TeacherChoice::Model(path) => {
            let place = || format!("distill.teacher = \"{path}\" (neither \"base\" nor \"personalized\")");
            let (teacher, _) = RunFolder::open(path, &options(config)).with_context(place)?;
            if let Some(misfit) = misfit(model, &teacher).with_context(place)? {
                return refused(format!(
                    "distill.teacher = \"{path}\" is of another architecture than {}: {misfit}; name a model of the same",
                    model.path().display()
                ));
            }
            Ok(Some(teacher))
        }
    }
}

/// What to say of a teacher of another name that turns out to be the base itself and is asked about the subject.
pub fn is_base_after_all(config: &Config, learned_from: &ModelIdentity) -> Option<String> {
    let subject = config.train.mode == Mode::Dreambooth && !asks_class_alone(&config.distill);
    (subject && learned_from.teacher_is_base()).then(|| {
        "the UNet of distill.teacher is that of the base, which has never seen the subject: on the subject's own pictures it \
         pulls back to what it knows; distill.on = \"class\" asks it about the class alone"
            .to_owned()
    })
}

/// What of a teacher is not as the model's.
fn misfit(model: &Model, teacher: &Model) -> Result<Option<String>> {
    // Whatever size of pictures each was made for.
    let built = |model: &Model| anyhow::Ok(UnetConfig { sample_size: 0, ..model.unet_config()? });
    if built(model)? != built(teacher)? {
        return Ok(Some("its UNet is built otherwise".to_owned()));
    }
    let shapes = |model: &Model, component| -> Result<BTreeMap<String, Vec<i64>>> {
        Ok(model.parameters(component)?.into_iter().map(|p| (p.name, p.shape)).collect())
    };
    let (own, theirs) = (shapes(model, Component::Unet)?, shapes(teacher, Component::Unet)?);
    if let Some((name, shape)) = own.iter().find(|(name, shape)| theirs.get(*name) != Some(shape)) {
        let found = theirs.get(name).map_or("missing".to_owned(), |found| format!("{found:?}"));
        return Ok(Some(format!("its {name} is {found}, the model's {shape:?}")));
    }
    let (own, theirs) = (text_to_image::schedule(model)?, text_to_image::schedule(teacher)?);
    if own.prediction != theirs.prediction {
        return Ok(Some(format!("it predicts {:?}, the model {:?}", theirs.prediction, own.prediction)));
    }
    Ok((own.alphas_cumprod != theirs.alphas_cumprod).then(|| "its noise schedule differs".to_owned()))
}

/// Whether the prior loss compares with the base's answer rather than with pictures of the class.
pub fn prior_is_base(config: &Config) -> bool {
    config.data.prior().is_some_and(|settings| settings.prior_source == PriorSource::Base)
}

/// Whether the teacher is asked about the class alone, which is the second half of a batch.
pub fn asks_class_alone(distill: &Distill) -> bool {
    distill.on == DistillOn::Class
}

/// Noised latents `[B, C, h, w]` with their timesteps `[B]`, and what a UNet is told of them.
pub struct Question<'q> {
    pub noised: Tensor,
    pub timesteps: Tensor,
    pub captions: &'q [String],
    pub sizes: &'q [SizeIds],
}

/// A frozen model.
pub struct Teacher {
    config: UnetConfig,
    /// As files hold it, and as the networks see it: two bytes a weight, converted as they are used.
    unet: Weights,
    /// By its own text encoders, whatever becomes of the one that learns.
    texts: Texts,
    kind: Kind,
}

impl Teacher {
    /// Reads a model that will be asked about these captions, computing in `kind`.
    ///
    /// # Errors
    /// It can't be read; [`super::Stopped`].
    pub fn load<'c>(
        model: &Model,
        captions: impl Iterator<Item = &'c String>,
        cache: &Cache,
        (device, kind): (Device, Kind),
    ) -> Result<Self> {
        let texts = Texts::new(captions, model, Some(cache), device)?;
        let two_bytes = if kind == Kind::Float { Kind::Half } else { kind };
        let unet = model.weights(Component::Unet, two_bytes, device)?;
        Ok(Self { config: model.unet_config()?, unet, texts, kind })
    }

    /// What it predicts `[B, C, h, w]`, fp32, without gradient; `features` takes what its blocks give.
    ///
    /// # Errors
    /// A caption that it was not loaded for.
    pub fn answer(&self, question: &Question, features: Option<&RefCell<Vec<Tensor>>>) -> Result<Tensor> {
        let Question { noised, timesteps, captions, sizes } = question;
        let _guard = tch::no_grad_guard();
        let told = self.texts.embed(captions, sizes, None)?.to_kind(self.kind);
        let mut ops = Tensors::new(&self.unet).computing_in(self.kind);
        if let Some(features) = features {
            ops = ops.keeping_features(features);
        }
        Ok(unet(&mut ops, &self.config, noised, timesteps, told.condition()).to_kind(Kind::Float))
    }
}
