//! DreamBooth's class pictures (Ruiz et al. 2022, 3.3): drawn by the float model where there are too few.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tch::{Device, Kind};

use crate::config::{Config, Dreambooth};
use crate::data::Class;
use crate::data::drawn::{Record, record_of, with_record};
use crate::data::set::drawn_name;
use crate::diffusion::{Noise, Own};
use crate::files::{beside, write_bytes};
use crate::pipeline::{Pipeline, Request};
use crate::report::pictures;
use crate::source::{Model, identity};
use crate::terminal::{Progress, tell, warn};

/// Where, in the class folder, pictures are kept that were drawn from something else: hidden, by the key of their record.
const ASIDE: &str = ".drawn-before";

/// What class pictures would be drawn from; `None` where none are asked for.
///
/// # Errors
/// A part of the model cannot be read.
pub fn drawing(config: &Config, model: &Model) -> Result<Option<Record>> {
    let Some((settings, _)) = config.class_folder() else { return Ok(None) };
    let request = request(settings);
    let size = config.data.resolution;
    let sampler = request.sampler.map_or_else(|| anyhow::Ok(Own::of(&model.scheduler_config()?).kind), Ok)?;
    Ok(Some(Record {
        prompt: request.prompt,
        model: identity(model)?,
        sampler: sampler.to_string(),
        steps: request.steps,
        guidance_scale: format!("{:?}", request.guidance_scale),
        size: [size, size],
        seed: config.seed,
    }))
}

/// What is asked of the model for each picture; noise and number are still to be set.
fn request(settings: &Dreambooth) -> Request {
    Request {
        prompt: settings.class_prompt.clone(),
        steps: settings.prior_sample_steps,
        guidance_scale: settings.prior_guidance_scale,
        ..Request::default()
    }
}

/// The class pictures, those that are missing drawn, each from the noise of its number: a run that was killed while drawing
/// goes on where it stopped. Pictures that were drawn from something else are set aside, and come back when what they were
/// drawn from does. Pictures of the user's own are never touched.
///
/// # Errors
/// The model can't draw; the folder can't be written; [`super::Stopped`].
pub fn complete(config: &Config, class: Class, record: &Record, model: &Model, device: Device) -> Result<Class> {
    let Some((settings, folder)) = config.class_folder().filter(|_| class.missing > 0) else { return Ok(class) };
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let _alone = alone(folder)?;
    // Whoever drew there until now may have left nothing to do.
    let class = Class::read(settings, folder, Some(record))?;
    if class.missing > 0 {
        draw(config, &class, record, model, device)?;
    }
    Ok(Class::read(settings, folder, Some(record))?)
}

/// Waits until no other run draws in `folder`, and removes what killed ones left half written. Where there are no locks
/// nothing is waited for, nor removed.
fn alone(folder: &Path) -> Result<Option<File>> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    let mut told = false;
    loop {
        super::stop::go_on()?;
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) => {
                if !told {
                    tell(format_args!("another run is drawing class pictures in {}; waiting for it", folder.display()));
                    told = true;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    beside::tidy(folder);
    Ok(Some(file))
}

fn draw(config: &Config, class: &Class, record: &Record, model: &Model, device: Device) -> Result<()> {
    let Some((settings, folder)) = config.class_folder() else { return Ok(()) };
    for outdated in &class.outdated {
        set_aside(folder, &outdated.sample.path, &outdated.record)?;
    }
    if !class.outdated.is_empty() {
        let shown = folder.join(ASIDE);
        tell(format_args!(
            "{} pictures that were drawn from something else are kept in {}",
            class.outdated.len(),
            shown.display()
        ));
    }
    let free = |index: &usize| !folder.join(drawn_name(*index)).exists();
    let places: Vec<usize> = (0..).filter(free).take(class.missing).collect();
    let mut missing = Vec::new();
    for index in places {
        if !bring_back(folder, index, record)? {
            missing.push(index);
        }
    }
    let shown = folder.display();
    if missing.len() < class.missing {
        let back = class.missing - missing.len();
        tell(format_args!("{shown}: {back} pictures that were drawn from the same before are taken back"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    tell(format_args!(
        "{shown} has {} pictures of \"{}\"; the float model draws {} more",
        class.samples.len() + class.missing - missing.len(),
        settings.class_prompt,
        missing.len()
    ));
    let pipeline = Pipeline::load(model, None, Kind::Float, device)?;
    if let Some(warning) = pipeline.own_sampler().warning {
        warn(warning);
    }
    let side = config.data.resolution;
    let seed = |index: &usize| config.seed.wrapping_mul(1_000_003).wrapping_add(*index as u64);
    let mut bar = Progress::new("drawing class pictures", 0, missing.len() as u64).counting("picture");
    let mut done = 0;
    for batch in missing.chunks(settings.sample_batch_size) {
        let request = Request {
            noise: Noise::Seeds(batch.iter().map(seed).collect()),
            size: Some((side, side)),
            images: batch.len(),
            batch: batch.len(),
            ..request(settings)
        };
        let drawn = pipeline.generate(&request, &mut |_, _| super::stop::go_on())?.images;
        for (&index, picture) in batch.iter().zip(drawn.unbind(0)) {
            let png = pictures::png(&pictures::from_tensor(&picture)?)?;
            write_bytes(&folder.join(drawn_name(index)), &with_record(&png, record))?;
        }
        done += batch.len() as u64;
        bar.update(done, &[]);
    }
    bar.finish();
    Ok(())
}

fn aside(folder: &Path, record: &Record) -> PathBuf {
    folder.join(ASIDE).join(record.key())
}

fn set_aside(folder: &Path, picture: &Path, record: &Record) -> Result<()> {
    let to = aside(folder, record);
    fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
    // By its name in the folder; a picture that is there under the same name was drawn from the same.
    let name: Vec<_> =
        picture.strip_prefix(folder).unwrap_or(picture).iter().map(|part| part.to_string_lossy()).collect();
    let target = to.join(name.join("-"));
    fs::rename(picture, &target).with_context(|| format!("cannot move {} to {}", picture.display(), target.display()))
}

/// Takes the picture of this number back, if it was drawn from the same before.
fn bring_back(folder: &Path, index: usize, record: &Record) -> Result<bool> {
    let from = aside(folder, record).join(drawn_name(index));
    if record_of(&from).as_ref() != Some(record) {
        return Ok(false);
    }
    let to = folder.join(drawn_name(index));
    fs::rename(&from, &to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
    Ok(true)
}
