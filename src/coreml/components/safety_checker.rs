//! Exports a safety checker.

use std::path::PathBuf;

use anyhow::Result;

use super::parts::{Part, check_size};
use crate::coreml::writing::interface::{Destination, Input, Interface, Output, Weighted, write};
use crate::networks::safety_checker::{SafetyCheckerConfig, safety_checker};

/// Writes a safety checker for pictures of `height × width` pixels. Apple's programs only use it for 512×512.
///
/// # Errors
/// Those of [`write()`].
pub fn export_safety_checker(
    config: &SafetyCheckerConfig,
    (height, width): (i64, i64),
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    check_size(height, width)?;
    let side = config.vision.image_size;
    let interface = Interface {
        component: Part::SafetyChecker.name().into(),
        about: "The safety checker of Stable Diffusion, which tells whether a picture shows what it should not. See \
                https://arxiv.org/abs/2210.04610."
            .into(),
        inputs: vec![
            Input::half(
                "clip_input",
                "The picture, resized and normalised as CLIP's are: 1, channels, height, width",
                &[1, config.vision.channels, side, side],
            ),
            Input::half("images", "The picture in full: 1, height, width, channels", &[1, height, width, 3]),
            Input::half("adjustment", "Added to the scores of special care: more than 0 is stricter", &[1]),
        ],
        outputs: vec![
            Output::new("filtered_images", "The picture, black if it is held back"),
            Output::new("has_nsfw_concepts", "1 if the picture is held back, else 0"),
            Output::new("concept_scores", "For each concept, how far it is above its threshold"),
        ],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        let output = safety_checker(ops, config, &inputs[0], &inputs[1], &inputs[2]);
        vec![output.filtered, output.held_back, output.scores]
    })
}
