//! From a config to what the loop needs: networks, data, teacher.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::denoise::{Class, ClassSource, Denoise};
use super::examples::{Encoder, Examples, Texts, epoch};
use super::identity::{Identity, ModelIdentity, Read};
use super::initialise::initialise;
use super::objective::Objective;
use super::output::export_plan;
use super::palettes::file_of_palettes;
use super::plan::Before;
use super::reconstruct::Reconstruct;
use super::refused::refused;
use super::run_folder::{self, Holds, RunFolder};
use super::teacher::{Teacher, is_base_after_all, other_teacher, prior_is_base, start};
use super::trained::{Fixed, Trained};
use super::validate::Validation;
use super::{class_images, prompts};
use crate::config::{self, Config, PaletteOverride, Recipe, TrainedComponent, matches_glob};
use crate::coreml::components::unet::{LARGEST_LATENTS, takes_latents};
use crate::coreml::{DeploymentTarget, PackageMetadata};
use crate::data::manifest::Picture;
use crate::data::{Cache, Crop, DataSet, Manifest, Sample, Transform, load_picture};
use crate::ops::{Parameter, Weights};
use crate::palette::PalettizedCheckpoint;
use crate::pipeline::drawing::check_shapes;
use crate::pipeline::text_to_image::{self, TextToImage};
use crate::source::{Component, Model};
use crate::terminal::{Progress, note};
use crate::torch::random::{Purpose, generator, uniform};

/// What the loop works on.
pub struct Setup {
    pub objective: Box<dyn Objective>,
    pub trained: Trained,
    pub model: Model,
    pub learned_from: Identity,
}

/// The model of a config: that of `model.pretrained_model_name_or_path`, which may be a run's folder.
///
/// # Errors
/// As [`Model::open_with`]; a run that is not finished.
pub fn open_model(config: &Config) -> Result<Model> {
    let (model, _) = RunFolder::open(&config.model.pretrained_model_name_or_path, &config.model.options())?;
    Ok(model)
}

/// What is said of the LoRAs that are merged into the model of a config: a line each, and what of them has no effect.
pub fn merged(config: &Config, model: &Model) -> Vec<String> {
    let mut lines: Vec<String> = model.loras().iter().map(|lora| format!("merged in: the LoRA {lora}")).collect();
    let of_unet = model.loras().iter().any(|lora| lora.changes_network(Component::Unet));
    if let Some(palettes) = config.palettize.palettes.as_ref().filter(|_| of_unet && config.palettize.enabled) {
        lines.push(format!("the UNet's weights are those of {}: LoRAs change text encoders alone", palettes.display()));
    }
    lines
}

/// What is said of a model whose UNet training does not begin from float weights: `read` is what its weights told.
pub fn begins_from(config: &Config, read: &Read) -> Option<String> {
    let values = read.values?;
    let path = Path::new(&config.model.pretrained_model_name_or_path);
    match RunFolder::of(path) {
        // Those of any form, which the values alone may not show.
        Ok(Holds::Run(run)) if run.config.palettize.enabled => Some(format!(
            "the model of {} holds the values of its palettes: training begins from these",
            path.display()
        )),
        _ => values.remark(),
    }
}

/// Opens the model and the data of `config`. What the run to resume learned from is compared with them before any long
/// work.
///
/// # Errors
/// Whatever is wrong with either, one line; what changed since the run began.
pub fn open(config: &Config, device: Device, kind: Kind, before: Before) -> Result<Setup> {
    let model = open_model(config)?;
    match config.train.component {
        TrainedComponent::Autoencoder => autoencoder(config, model, device, kind, before),
        TrainedComponent::Unet => {
            let (objective, trained, model, learned_from) = unet(config, model, device, kind, before)?;
            Ok(Setup { objective: Box::new(objective), trained, model, learned_from })
        }
    }
}

/// The model of a config by its content, and its teacher where that is another and there already.
///
/// # Errors
/// Either can't be read; the teacher is of another architecture.
pub fn identity(config: &Config, model: &Model) -> Result<Read> {
    let mut read = ModelIdentity::of(model, config)?;
    if let Some(file) = file_of_palettes(config)? {
        read.identity = read.identity.with_palettes(&file)?;
    }
    match other_teacher(config, model)? {
        Some(teacher) => Ok(Read { identity: read.identity.with_teacher(&teacher)?, ..read }),
        None => Ok(read),
    }
}

/// What a run of this config would learn from today.
///
/// # Errors
/// Whatever is wrong with the model or the data.
pub fn learns_from(config: &Config) -> Result<Identity> {
    let model = open_model(config)?;
    let data = manifest(&DataSet::read(config, class_images::drawing(config, &model)?.as_ref())?)?;
    Ok(Identity { model: identity(config, &model)?.identity, data })
}

/// What is trained on, as far as it is there: DreamBooth's class pictures may still have to be drawn. Validation is not.
///
/// # Errors
/// A picture can't be read.
pub fn manifest(data: &DataSet) -> Result<Manifest> {
    let class = data.class.iter().flat_map(|class| &class.samples);
    Manifest::of(&data.training.iter().chain(class).cloned().collect::<Vec<_>>())
}

/// fp32 weights to start from: the model's, or random ones.
fn initial(config: &Config, model: &Model, component: Component) -> Result<(Weights, Vec<Parameter>)> {
    let parameters = model.parameters(component)?;
    let weights = if config.model.train_from_scratch {
        initialise(&parameters, config.seed)
    } else {
        model.weights(component, Kind::Float, Device::Cpu)?
    };
    Ok((weights, parameters))
}

fn autoencoder(config: &Config, model: Model, device: Device, kind: Kind, before: Before) -> Result<Setup> {
    supports(config, &model)?;
    // Before the long work: what is wrong with the data is told at once.
    let identity = ModelIdentity::of(&model, config)?.identity;
    let (data, learned_from) = read_data(config, &model, identity, before, device)?;
    let DataSet { training, validation, .. } = data;
    let (mut weights, parameters) = initial(config, &model, Component::Autoencoder)?;
    if config.model.train_from_scratch {
        even_gain(&mut weights);
        quiet_posterior(&mut weights, model.autoencoder_config()?.latent_channels);
    }
    let trained = Trained::new(
        vec![(Component::Autoencoder, weights, parameters)],
        (&config.palettize, &Fixed::new()),
        &config.train,
        device,
        before.resumes,
        &mut |_, _| {},
    )?;
    let objective = Reconstruct {
        config: model.autoencoder_config()?,
        settings: config.train.autoencoder.clone(),
        pictures: bytes(config, &training)?,
        epoch: epoch(&training),
        validation: validation.as_deref().map(|samples| bytes(config, samples)).transpose()?,
        batch: config.train.train_batch_size,
        flip: config.data.flip_aug,
        seed: config.seed,
        device,
        kind,
        recomputes: config.train.gradient_checkpointing,
    };
    Ok(Setup { objective: Box::new(objective), trained, model, learned_from })
}

/// Gives layers a gain of 1 and no biases to begin with (He et al. 2015, 2.2, for a path that is linear). PyTorch's own
/// values shrink a signal by √3 a layer while biases keep their size: after a dozen layers biases are all that is left,
/// and a new autoencoder holds brightness only for its first thousands of steps.
fn even_gain(weights: &mut Weights) {
    let _guard = tch::no_grad_guard();
    for (name, weight) in weights.iter_mut() {
        if name.ends_with(".bias") {
            let _ = weight.zero_();
        } else if weight.dim() > 1 {
            let _ = weight.g_mul_scalar_(3.0_f64.sqrt());
        }
    }
}

/// Lowers the log-variance that a new encoder begins with from about 0 to −5: noise of deviation 1 would drown its means,
/// which are near 0, and with them all that the decoder could learn from.
fn quiet_posterior(weights: &mut Weights, latent_channels: i64) {
    let _guard = tch::no_grad_guard();
    let last = ["quant_conv.bias", "encoder.conv_out.bias"].into_iter().find(|name| weights.contains_key(*name));
    if let Some(bias) = last.and_then(|name| weights.get_mut(name)) {
        let _ = bias.narrow(0, latent_channels, latent_channels).fill_(-5.0);
    }
}

/// All pictures as bytes `[N, 3, H, W]`.
fn bytes(config: &Config, samples: &[Sample]) -> Result<Tensor> {
    let pictures: Result<Vec<Tensor>> = samples
        .iter()
        .enumerate()
        .map(|(index, sample)| {
            super::stop::go_on()?;
            let picture = load_picture(&sample.path, &transform(config, index))?;
            Ok(((picture + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8))
        })
        .collect();
    Ok(Tensor::stack(&pictures?, 0))
}

/// What the picture of this number goes through. Random crops are drawn once a picture, because latents are cached.
pub fn transform(config: &Config, index: usize) -> Transform {
    let centered = Transform::center(config.data.resolution as u32, config.data.resolution as u32);
    if config.data.center_crop {
        return centered;
    }
    let mut random = generator(config.seed, Purpose::Crop, index as u64);
    Transform { crop: Crop::At(uniform(&mut random), uniform(&mut random)), ..centered }
}

/// Checks that this kind of model can be trained as `config` wants it.
///
/// # Errors
/// What it asks for that does not go with the model.
pub fn supports(config: &Config, model: &Model) -> Result<()> {
    if model.is_xl() && config.train.train_text_encoder {
        return refused(format!(
            "train.train_text_encoder = true, and {} is a Stable Diffusion XL, whose two text encoders are not trained here; \
             set it to false",
            model.path().display()
        ));
    }
    let (height, width) = (config.export.latent_h, config.export.latent_w);
    if config.export.coreml && !takes_latents(height, width) {
        return refused(format!(
            "export.latent_h = {height} and export.latent_w = {width}: a package can be made for 1 to {LARGEST_LATENTS} \
             each; set them, or export.coreml = false"
        ));
    }
    if config.export.coreml {
        export_plan(config, model, PackageMetadata::default())?;
    }
    let factor = match config.train.component {
        TrainedComponent::Unet => {
            let factor = TextToImage::of(model)?.autoencoder.factor();
            prompts::check_samplers(config, model)?;
            let file = file_of_palettes(config)?;
            if let Some(file) = &file {
                check_shapes(model, &file.shapes()).context("palettize.palettes")?;
                let target = config.export.min_deployment_target;
                let needs = file.needs_ios18().filter(|_| config.export.coreml && target != DeploymentTarget::Ios18);
                if let Some((name, what)) = needs {
                    return refused(format!(
                        "palettize.palettes: {name} has {what}; set export.min_deployment_target = \"iOS18\""
                    ));
                }
            }
            let learns_palettes = file.is_none() && config.palettize.enabled;
            if learns_palettes && config.palettize.chosen(&model.parameters(Component::Unet)?).forms.is_empty() {
                return refused(format!(
                    "no layer of the UNet would get a palette: see palettize.weight_threshold ({}), group_size and \
                     overrides, or set palettize.enabled = false",
                    config.palettize.weight_threshold
                ));
            }
            model.text_encoders().try_for_each(|component| model.tokenizer_of(component).map(drop))?;
            // The end of a run writes the whole model: what cannot be copied then is found now.
            model.check_small_files()?;
            factor
        }
        TrainedComponent::Autoencoder => model.autoencoder_config()?.factor(),
    };
    let resolution = config.data.resolution;
    if resolution % factor != 0 {
        return refused(format!(
            "data.resolution is {resolution}, and the autoencoder of {} takes multiples of {factor}",
            model.path().display()
        ));
    }
    Ok(())
}

/// Checks that the layers that a config names, in its recipe and in overrides, are layers of the UNet.
///
/// # Errors
/// Each that is not, a [`config::Error`].
pub fn names_layers(config: &Config, model: &Model) -> Result<()> {
    if !config.palettize.enabled || config.palettize.palettes.is_some() {
        return Ok(());
    }
    let parameters = model.parameters(Component::Unet)?;
    let (mut problems, mut from_recipe) = (Vec::new(), 0);
    if let Some(path) = &config.palettize.recipe {
        let recipe = Recipe::read(path)?;
        // Its layers stand before the overrides; they are looked at where their lines are known.
        from_recipe = recipe.overrides().len();
        problems.extend(recipe.check(&parameters).err().into_iter().flat_map(|error| error.problems));
    }
    for PaletteOverride { pattern, .. } in config.palettize.overrides.iter().skip(from_recipe) {
        if !parameters.iter().any(|p| p.palettizable && matches_glob(pattern, &p.name)) {
            let message = format!("match = \"{pattern}\" is not a weight of this UNet");
            problems.extend(config::Error::about("palettize.overrides", &message).problems);
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(config::Error { problems }.into()) }
}

/// [`open`] of a run that trains the UNet.
pub(super) fn unet(
    config: &Config,
    model: Model,
    device: Device,
    kind: Kind,
    before: Before,
) -> Result<(Denoise, Trained, Model, Identity)> {
    supports(config, &model)?;
    prompts::other_sampler(config, &model)?.iter().for_each(crate::terminal::warn);
    if !config.model.train_from_scratch {
        // Before the long work: what is wrong with the file is told at once.
        model.check(Component::Unet)?;
    }
    names_layers(config, &model)?;
    let schedule = text_to_image::schedule(&model)?;
    let (other, start) = (other_teacher(config, &model)?, start(config, &model)?);
    let read = identity(config, &model)?;
    merged(config, &model).iter().for_each(note);
    begins_from(config, &read).iter().for_each(note);
    is_base_after_all(config, &read.identity).iter().for_each(crate::terminal::warn);
    let (data, learned_from) = read_data(config, &model, read.identity, before, device)?;
    let cache = Cache::open(&config.data.cache_dir)?;
    let Encoded { scaling_factor, examples, class, validation } =
        encoded(config, &model, (&data, &learned_from.data), &cache, device)?;

    // One network at a time is read, used and dropped; what learns, which is the most, comes last.
    let mut networks = Vec::new();
    if config.train.train_text_encoder {
        let (weights, parameters) = initial(config, &start, Component::TextEncoder)?;
        networks.push((Component::TextEncoder, weights, parameters));
    }
    let of_class = match config.data.prior() {
        Some(settings) if prior_is_base(config) => vec![settings.class_prompt.clone()],
        _ => Vec::new(),
    };
    let learned = [Some(&examples), class.as_ref()];
    let learned: Vec<&String> =
        learned.into_iter().flatten().flat_map(|examples| &examples.captions).chain(&of_class).collect();
    let texts = Texts::new(
        learned.iter().copied().chain(validation.iter().flat_map(|examples| &examples.captions)),
        &model,
        Some(&cache).filter(|_| !config.train.train_text_encoder),
        device,
    )?;
    let validation = validation.map(|examples| {
        let batch = config.train.train_batch_size;
        let sizes = (batch, batch * config.validation.batches);
        Validation::new(&examples, scaling_factor, sizes, config.validation.seed, &schedule, (device, kind))
    });

    let (weights, parameters, fixed) = match file_of_palettes(config)? {
        Some(file) => {
            let PalettizedCheckpoint { palettes, dense, .. } = PalettizedCheckpoint::of(&file)?;
            let dense = dense.into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float))).collect();
            (dense, model.parameters(Component::Unet)?, palettes)
        }
        None => {
            let (weights, parameters) = initial(config, &start, Component::Unet)?;
            (weights, parameters, Fixed::new())
        }
    };
    networks.insert(0, (Component::Unet, weights, parameters));
    let total: usize = networks.iter().map(|(_, _, parameters)| parameters.len()).sum();
    let mut bar = Progress::new(
        if config.palettize.enabled && fixed.is_empty() && !before.resumes { "clustering" } else { "copying" },
        0,
        total as u64,
    )
    .counting("tensor");
    let mut told = |done: usize, _: usize| bar.update(done as u64, &[]);
    let trained =
        Trained::new(networks, (&config.palettize, &fixed), &config.train, device, before.resumes, &mut told)?;
    bar.finish();

    let load =
        |model: &Model| anyhow::Ok(Rc::new(Teacher::load(model, learned.iter().copied(), &cache, (device, kind))?));
    let asks_base = prior_is_base(config) || (config.distill.enabled && other.is_none());
    let base = asks_base.then(|| load(&model)).transpose()?;
    let teacher = match &other {
        Some(other) => Some(load(other)?),
        None => base.clone().filter(|_| config.distill.enabled),
    };
    let class = config.data.prior().zip(class.map(ClassSource::Pictures).or_else(|| {
        let prompt = of_class.into_iter().next()?;
        Some(ClassSource::Base { prompt, base: base.clone()? })
    }));
    let class = class.map(|(settings, source)| Class { source, weight: settings.prior_loss_weight });
    let objective = Denoise {
        unet: model.unet_config()?,
        schedule,
        scaling_factor,
        examples,
        class,
        texts,
        teacher,
        validation,
        config: config.clone(),
        device,
        kind,
        sampler: prompts::sampler(config, &model, (device, kind)),
    };
    Ok((objective, trained, model, learned_from))
}

/// Pictures as the autoencoder's moments.
struct Encoded {
    scaling_factor: f64,
    examples: Examples,
    class: Option<Examples>,
    validation: Option<Examples>,
}

fn encoded(
    config: &Config,
    model: &Model,
    (data, looked_at): (&DataSet, &Manifest),
    cache: &Cache,
    device: Device,
) -> Result<Encoded> {
    let autoencoder = model.autoencoder_config()?;
    let weights = model.weights(Component::Autoencoder, Kind::Float, device)?;
    let encoder = Encoder::new(&autoencoder, &weights, device, cache)?;
    let encode = |what: &str, samples: &[Sample], looked_at: &[Picture], flip: bool| {
        let mut bar = Progress::new(what, 0, (samples.len() * if flip { 2 } else { 1 }) as u64).counting("picture");
        let examples =
            encoder.encode(samples, looked_at, &|index| transform(config, index), flip, &mut |done, _| {
                bar.update(done as u64, &[])
            })?;
        bar.finish();
        anyhow::Ok(examples)
    };
    let flip = config.data.flip_aug;
    // As `manifest` has them: those of the class come last.
    let (subject, of_class) = looked_at.pictures.split_at(data.training.len().min(looked_at.pictures.len()));
    let examples = encode("encoding pictures", &data.training, subject, flip)?;
    let class = match &data.class {
        Some(class) => Some(encode("encoding class pictures", &class.samples, of_class, flip)?),
        None => None,
    };
    let validation = match &data.validation {
        Some(samples) => Some(encode("encoding validation pictures", samples, &[], false)?),
        None => None,
    };
    Ok(Encoded { scaling_factor: autoencoder.scaling_factor, examples, class, validation })
}

/// Reads and looks at all data before anything long is done, then draws the class pictures that are missing.
fn read_data(
    config: &Config,
    model: &Model,
    identity: ModelIdentity,
    before: Before,
    device: Device,
) -> Result<(DataSet, Identity)> {
    let drawing = class_images::drawing(config, model)?;
    let mut set = DataSet::read(config, drawing.as_ref())?;
    let mut bar = None;
    let looked = set.examine(config.data.resolution, &mut |done, all| {
        super::stop::go_on()?;
        let bar = bar.get_or_insert_with(|| Progress::new("looking at pictures", 0, all as u64).counting("picture"));
        bar.update(done as u64, &[]);
        Ok(())
    })?;
    if let Some(bar) = bar {
        bar.finish();
    }
    let of_class = set.class.iter().flat_map(|class| &class.remarks);
    set.remarks.iter().chain(of_class).chain(&looked).for_each(crate::terminal::tell);
    let mut learned_from = Identity { model: identity, data: manifest(&set)? };
    before.check_so_far(&learned_from, set.class.as_ref())?;
    if !before.resumes {
        // From here on there may be something to lose: the folder is this run's.
        run_folder::begin(before.folder, config)?;
    }
    if let (Some(class), Some(record)) = (set.class.take(), &drawing) {
        set.class = Some(class_images::complete(config, class, record, model, device)?);
        learned_from.data = manifest(&set)?;
    }
    before.check(&learned_from)?;
    Ok((set, learned_from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Initial;

    /// What an autoencoder begins with keeps the size of a signal: per layer 1/√fan_in, and no biases.
    #[test]
    fn a_new_autoencoder_has_a_gain_of_one() {
        let weight = |name: &str, shape: &[i64], fan_in| Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            palettizable: true,
            initial: Initial::Uniform { fan_in },
        };
        let parameters =
            [weight("encoder.conv_in.weight", &[64, 16, 3, 3], 144), weight("encoder.conv_in.bias", &[64], 144)];
        let mut weights = initialise(&parameters, 1);
        even_gain(&mut weights);
        let deviation = weights["encoder.conv_in.weight"].std(true).double_value(&[]);
        assert!((deviation * 12.0 - 1.0).abs() < 0.03, "{deviation}");
        assert_eq!(weights["encoder.conv_in.bias"].abs().max().double_value(&[]), 0.0);
    }
}
