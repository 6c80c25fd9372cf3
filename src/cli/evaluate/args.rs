//! The command line of `palettist evaluate`.

use std::path::PathBuf;

use tch::Device;

use crate::cli::drawing::{DrawingArgs, device};
use crate::cli::model::ModelArgs;

/// How much of a float model palettes keep: by the denoising loss (--config) or by final pictures (--prompts)
///
/// With --config: the denoising loss on the config's validation split, next to the float model's, and how far the UNet's
/// outputs are from its.
///
/// With --prompts: each prompt is drawn by MODEL with its palettes and by the float model, that of --against or else
/// MODEL's own weights, from the same noise. Scores are the PSNR of the pictures to float's and, by the CLIP of --clip, the
/// CLIP score (100 times the cosine of picture and prompt, as torchmetrics has it) and how often a picture shows what its
/// labels say, each with the 95 % interval over prompts (bootstrap; too narrow for fewer than some twenty prompts). Ctrl-C
/// keeps the prompts that are finished.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The config whose validation split, seed and resolution are taken for the loss
    #[arg(
        long,
        required_unless_present = "prompts",
        conflicts_with_all = ["prompts", "clip", "labels", "against", "num_images", "output", "DrawingArgs"]
    )]
    pub config: Option<PathBuf>,
    /// Changes to the config: validation.batches=8
    #[arg(value_name = "key=value", requires = "config")]
    pub overrides: Vec<String>,
    /// A palettized checkpoint to put in place of the model's weights
    #[arg(long)]
    pub palettes: Option<PathBuf>,
    /// What a run with palettize.palettes learnt on these palettes, to put onto them
    #[arg(long, value_name = "SUBJECT")]
    pub subject: Option<PathBuf>,
    /// Prompts to draw, one on each line, with the flags of a config's `sample.prompts` where wanted; or, in a file that ends
    /// in .jsonl, objects: `text`, and any labels of what the picture is to show, {"text": "a red cat", "thing": "cat"}
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// The judge: the folder of a CLIP of transformers' (CLIPModel), or its id in the local Hugging Face cache
    #[arg(long, value_name = "CLIP", requires = "prompts")]
    pub clip: Option<String>,
    /// What the judge chooses among beside the values in --prompts: a .json file, {"thing": ["cat", "dog"]} or, with the texts
    /// that it is to look for, {"thing": {"cat": "a drawing of a cat"}}; or a .jsonl file of labelled lines
    #[arg(long, value_name = "FILE", requires = "clip")]
    pub labels: Option<PathBuf>,
    /// The float model to compare with, a folder, a single file, a hub id or a run, without the LoRAs of --lora
    /// [default: MODEL without palettes]
    #[arg(long, value_name = "MODEL", requires = "prompts")]
    pub against: Option<String>,
    /// How many pictures of each prompt [default: 1]. The first one has the seed plus the prompt's number, from 0, times
    /// this: `generate --seed` draws it again
    #[arg(long, value_name = "N", requires = "prompts")]
    pub num_images: Option<usize>,
    /// A new folder for the pictures, and the scores of each (scores.jsonl)
    #[arg(short, long, value_name = "DIR", requires = "prompts")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub drawing: DrawingArgs,
    /// cpu, cuda, mps or auto
    #[arg(long, default_value = "auto", value_parser = device)]
    pub device: Device,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}
