//! `palettist evaluate --config`.

use std::path::Path;

use anyhow::Result;
use serde_json::json;
use tch::Kind;

use super::args::Args;
use crate::cli::{MEASURED, is_of_data, load_config, print, warn_of_unused};
use crate::pipeline::drawing::unet_weights;
use crate::train::evaluate::{Evaluation, snr};

pub fn run(args: &Args, config: &Path) -> Result<()> {
    let config = load_config(config, &args.overrides)?;
    warn_of_unused(&args.overrides, "evaluate", |key| MEASURED.contains(&key) || is_of_data(key));
    let device = args.device;
    let opened =
        args.model.clone().open_by(&config, args.palettes.as_deref())?.with_subject(args.subject.as_deref())?;
    opened.note_values("\"float\" is these in plain fp16");
    let (model, checkpoint) = (&opened.model, opened.checkpoint()?);
    let evaluation = Evaluation::open(&config, model, None, device)?;
    let measure = |palettes| evaluation.measure(&unet_weights(model, palettes, Kind::Float, device)?);
    let float = measure(None)?;
    let palettized = checkpoint.as_ref().map(|checkpoint| measure(Some(checkpoint))).transpose()?;
    let palettized = palettized.map(|palettized| (palettized.loss, snr(float.power(), palettized.difference(&float))));
    let examples = evaluation.examples();
    if args.json {
        let (loss, snr) = palettized.unzip();
        return print(json!({ "examples": examples, "float": float.loss, "palettized": loss, "snr_db": snr }));
    }
    print(format_args!("validation loss over {examples} noised pictures"))?;
    print(format_args!("  float       {:.6}", float.loss))?;
    if let Some((loss, snr)) = palettized {
        let more = 100.0 * (loss / float.loss - 1.0);
        print(format_args!("  palettized  {loss:.6}  ({more:+.2} %), {snr:.1} dB from float's outputs"))?;
    }
    Ok(())
}
