//! DreamBooth's class pictures (Ruiz et al. 2022, 3.3): drawn by the float model where there are too few.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use crate::config::{Config, Dreambooth};
use crate::data::is_picture;
use crate::diffusion::pipeline::{Noise, Pipeline, Request, initial_noise};
use crate::report::{Progress, pictures};
use crate::source::{Model, beside};

/// Draws what is missing to `num_class_images`, each from the noise of its number: a run that was killed while drawing
/// goes on where it stopped. Pictures of the user's own count and are never touched.
///
/// # Errors
/// The model can't draw; the folder can't be written.
pub fn draw_missing(
    config: &Config,
    settings: &Dreambooth,
    folder: &Path,
    model: &Model,
    device: Device,
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // What a run that was killed left half written.
    beside::tidy(folder);
    let name = |index: usize| format!("drawn-{index:05}.png");
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let there: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| is_picture(path)).collect();
    let wanted = settings.num_class_images;
    if there.len() >= wanted {
        return Ok(());
    }
    let missing: Vec<usize> =
        (0..wanted).filter(|&i| !folder.join(name(i)).exists()).take(wanted - there.len()).collect();
    eprintln!(
        "{} has {} pictures of \"{}\"; the float model draws {} more",
        folder.display(),
        there.len(),
        settings.class_prompt,
        missing.len()
    );
    let pipeline = Pipeline::load(model, None, Kind::Float, device)?;
    let side = config.data.resolution / pipeline.autoencoder_config.factor();
    let shape = [pipeline.unet_config.in_channels, side, side];
    let noise = |index: usize| initial_noise(config.seed.wrapping_mul(1_000_003).wrapping_add(index as u64), 1, shape);
    let mut bar = Progress::new("drawing class pictures", 0, missing.len() as u64).counting("picture");
    let mut done = 0;
    for batch in missing.chunks(settings.sample_batch_size) {
        let request = Request {
            prompt: settings.class_prompt.clone(),
            steps: settings.prior_sample_steps,
            guidance_scale: settings.prior_guidance_scale,
            noise: Noise::Latents(Tensor::cat(&batch.iter().map(|&index| noise(index)).collect::<Vec<_>>(), 0)),
            images: batch.len(),
            batch: batch.len(),
            ..Request::default()
        };
        let drawn = pipeline.generate(&request, &mut |_, _| super::go_on())?.images;
        for (&index, picture) in batch.iter().zip(drawn.unbind(0)) {
            pictures::write_png(&folder.join(name(index)), &pictures::from_tensor(&picture)?)?;
        }
        done += batch.len() as u64;
        bar.update(done, &[]);
    }
    bar.finish();
    Ok(())
}
