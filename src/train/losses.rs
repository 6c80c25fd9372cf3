//! What each loss of a run is asked to do, in words: told by `check`, and by `train` as it begins. The formulas are those of
//! `denoise` and `reconstruct`.

use anyhow::Result;

use super::teacher::{asks_class_alone, prior_is_base};
use crate::config::{Config, Distill, LossType, Mode, TeacherChoice, TrainedComponent};
use crate::diffusion::Prediction;
use crate::pipeline::text_to_image;
use crate::source::Model;

/// A line for each part of the loss, by the name under which it is logged: what is compared with what, on which pictures,
/// with which weight.
///
/// # Errors
/// The model's scheduler can't be read.
pub fn told(config: &Config, model: &Model) -> Result<Vec<String>> {
    Ok(match config.train.component {
        TrainedComponent::Autoencoder => of_autoencoder(config),
        TrainedComponent::Unet => of_unet(config, text_to_image::schedule(model)?.prediction),
    })
}

fn of_unet(config: &Config, prediction: Prediction) -> Vec<String> {
    let truth = match prediction {
        Prediction::Epsilon => "the noise that was added",
        Prediction::VPrediction => "the velocity that noise and picture make",
    };
    let distill = &config.distill;
    // Without a teacher the data weigh 1.
    let Distill { lambda_kd_output, lambda_kd_feat, .. } = *distill;
    let lambda_sd = if distill.enabled { distill.lambda_sd } else { 1.0 };
    let dreambooth = config.data.dreambooth.as_ref().filter(|_| config.train.mode == Mode::Dreambooth);
    let pictures = match dreambooth {
        Some(settings) => format!("the subject's pictures, told \"{}\"", settings.instance_prompt),
        None => "all pictures, told their captions".to_owned(),
    };
    let mut lines = vec![line("denoise", &format!("what the UNet predicts with {truth}"), &pictures, lambda_sd)];
    let prior = dreambooth.filter(|settings| settings.with_prior_preservation);
    let class = prior.map(|settings| match prior_is_base(config) {
        true => format!("the subject's pictures, told \"{}\"", settings.class_prompt),
        false => format!("pictures of the class, told \"{}\"", settings.class_prompt),
    });
    if let Some((settings, class)) = prior.zip(class.as_ref()) {
        let with = if prior_is_base(config) { "what the base predicts" } else { truth };
        let weight = lambda_sd * settings.prior_loss_weight;
        lines.push(line("prior", &format!("what the UNet predicts with {with}"), class, weight));
    }
    if !distill.enabled {
        return lines;
    }
    let on = match (class, prior) {
        (Some(class), _) if asks_class_alone(distill) => class,
        (Some(class), Some(settings)) => {
            format!("{pictures}, and, times {:?}, on {class}", settings.prior_loss_weight)
        }
        _ => pictures,
    };
    let teacher = match &distill.teacher {
        TeacherChoice::Base => "the base".to_owned(),
        TeacherChoice::Personalized => "the model of the first stage".to_owned(),
        TeacherChoice::Model(model) => format!("the teacher {model}"),
    };
    let output = format!("what the UNet predicts with what {teacher} predicts");
    lines.push(line("distill", &output, &on, lambda_kd_output));
    if lambda_kd_feat > 0.0 {
        let features = format!("what the UNet's blocks give with what those of {teacher} give");
        lines.push(line("features", &features, &on, lambda_kd_feat));
    }
    lines
}

fn line(name: &str, compared: &str, pictures: &str, weight: f64) -> String {
    format!("loss/{name} compares {compared}, on {pictures}; weight {weight:?}")
}

fn of_autoencoder(config: &Config) -> Vec<String> {
    let settings = &config.train.autoencoder;
    let norm = match settings.loss_type {
        LossType::L1 => "absolute",
        LossType::L2 => "squared",
    };
    let mut how = format!("{norm} differences");
    if settings.gradient_weight > 0.0 {
        how += &format!(", and those of edges times {:?}", settings.gradient_weight);
    }
    if settings.scales > 1 {
        how += &format!(", the mean over {} scales", settings.scales);
    }
    if settings.latent_noise > 0.0 {
        how += &format!("; latents get noise of up to {:?} of their deviation", settings.latent_noise);
    }
    let mut lines =
        vec![format!("reconstruction compares what comes out with what went in ({how}), on all pictures; weight 1.0")];
    if settings.decoder_only {
        lines.push("the decoder alone learns: latents stay as they are".to_owned());
    } else {
        lines.push(format!("kl compares latents with a unit normal, on all pictures; weight {:?}", settings.kl_weight));
    }
    lines
}
