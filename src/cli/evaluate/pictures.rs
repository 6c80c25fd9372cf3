//! `palettist evaluate --prompts`: final pictures, by a judge and beside the float model's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use image::RgbImage;
use serde_json::json;
use tch::Tensor;

use super::args::Args;
use super::table::Table;
use crate::cli::model::{ModelArgs, Opened};
use crate::cli::train::stop_on_interrupt;
use crate::cli::{Interrupted, Usage, must_be_new, print};
use crate::diffusion::Noise;
use crate::judge::{Choices, Clip, JudgedPrompt, Metric, Scores, psnr, read_labels, read_prompts, right};
use crate::pipeline::{Pipeline, Request};
use crate::report::pictures;
use crate::source::ModelOptions;
use crate::terminal::{Progress, note, warn};
use crate::train::{Stopped, go_on};

/// A model that draws, and what its pictures score.
struct Side {
    /// In tables, in JSON and in the names of files.
    name: &'static str,
    pipeline: Pipeline,
    /// What the command line asks of it.
    request: Request,
    scores: Scores,
}

/// What judges.
struct Judge {
    clip: Clip,
    choices: Choices,
    /// Unit vectors of the prompts, `[prompts, E]`.
    texts: Tensor,
}

pub fn run(args: &Args, file: &Path) -> Result<()> {
    args.drawing.check()?;
    if args.num_images == Some(0) {
        return Err(Usage("--num-images 0: at least one picture of each prompt is needed".into()).into());
    }
    if let Some(folder) = &args.output {
        must_be_new(folder)?;
    }
    let prompts = read_prompts(file)?;
    let opened = args.model.open(args.palettes.as_deref())?.with_subject(args.subject.as_deref())?;
    let against = against(args)?;
    if args.clip.is_none() && against.is_none() && opened.palettes.is_none() {
        let message = "there is nothing to score: give a judge (--clip), palettes (--palettes) or a model to compare with \
                       (--against)";
        return Err(Usage(message.into()).into());
    }
    if args.clip.is_none() && prompts.iter().any(|prompt| !prompt.labels.is_empty()) {
        note(format_args!("the labels in {} are not scored without a judge (--clip)", file.display()));
    }
    for opened in [Some(&opened), against.as_ref()].into_iter().flatten() {
        let own = opened.model.unet_config()?.sample_size * opened.model.autoencoder_config()?.factor();
        args.drawing.check_sides(&opened.model, args.drawing.size((own, own)), args.device)?;
    }
    let judge = args.clip.as_deref().map(|clip| Judge::open(clip, args, &prompts)).transpose()?;
    let mut sides = sides(args, &opened, against.as_ref())?;
    let evaluations = evaluations(args, &prompts, &sides)?;
    let mut kept = args.output.as_deref().map(Kept::create).transpose()?;

    stop_on_interrupt("stopping; what is finished is kept")?;
    let mut bar = Progress::new("drawing", 0, evaluations).counting("evaluation");
    let mut before = 0;
    let mut finished = 0;
    let mut is_stopped = false;
    for (index, prompt) in prompts.iter().enumerate() {
        let drawn = match draw(args, &sides, (index, prompt), &mut before, &mut bar) {
            Err(error) if error.is::<Stopped>() => {
                is_stopped = true;
                break;
            }
            drawn => drawn?,
        };
        let shown = score(&mut sides, judge.as_ref(), (index, prompt), &drawn)?;
        if let Some(kept) = &mut kept {
            kept.write(args, &sides, (index, prompt), &shown)?;
        }
        finished += 1;
    }
    bar.finish();
    if finished > 0 {
        let table = Table {
            sides: sides.iter().map(|side| (side.name, &side.scores)).collect(),
            prompts: finished,
            images: images(args),
            choices: judge.iter().flat_map(|judge| judge.choices.counts()).collect(),
            seed: args.drawing.seed.unwrap_or(0),
        };
        if args.json { print(table.json())? } else { print(table.text())? }
    }
    match finished {
        _ if !is_stopped => Ok(()),
        0 => Err(Interrupted("stopped before the first prompt was finished".into()).into()),
        _ => {
            let message = format!(
                "stopped; these are the scores of {finished} of {} prompts, which were finished",
                prompts.len()
            );
            Err(Interrupted(message).into())
        }
    }
}

/// The model of `--against`, with what MODEL's options say of it too.
fn against(args: &Args) -> Result<Option<Opened>> {
    let Some(model) = args.against.clone() else { return Ok(None) };
    // A revision is of one hub id; a LoRA is merged into MODEL, so that it can be compared with what it was.
    let options = ModelOptions { revision: None, loras: Vec::new(), ..args.model.options.clone() };
    ModelArgs { model, options }.open(None).map(Some)
}

impl Judge {
    fn open(clip: &str, args: &Args, prompts: &[JudgedPrompt]) -> Result<Self> {
        let more = args.labels.as_deref().map(read_labels).transpose()?.unwrap_or_default();
        let clip = Clip::open(clip, args.device)?;
        let choices = Choices::new(&clip, prompts, &more)?;
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.drawn.prompt.as_str()).collect();
        let cut: Vec<&&str> = texts.iter().filter(|text| clip.cuts(text)).collect();
        if let Some(first) = cut.first() {
            warn(format_args!(
                "this CLIP reads the beginning only of {} of {} prompts, which are too long for it; the first is \"{first}\"",
                cut.len(),
                texts.len()
            ));
        }
        Ok(Self { texts: clip.texts(&texts)?, clip, choices })
    }
}

/// Float, where there is such a model, then MODEL.
fn sides(args: &Args, opened: &Opened, against: Option<&Opened>) -> Result<Vec<Side>> {
    let side = |name, pipeline: Pipeline| {
        let mut request = args.drawing.request();
        args.drawing.complete(&mut request, &pipeline)?;
        args.drawing.say_sampler(&pipeline, &request);
        request.size = Some(args.drawing.size(pipeline.own_size()).unwrap_or(pipeline.own_size()));
        anyhow::Ok(Side { name, pipeline, request, scores: Scores::default() })
    };
    let load = |opened: &Opened, with_palettes: bool| {
        let checkpoint = if with_palettes { opened.checkpoint()? } else { None };
        Pipeline::load(&opened.model, checkpoint.as_ref(), args.drawing.precision, args.device)
    };
    let mut sides = Vec::new();
    match against {
        Some(against) => sides.push(side("float", load(against, true)?)?),
        None if opened.palettes.is_some() => {
            opened.note_values("\"float\" draws with these in plain fp16");
            sides.push(side("float", load(opened, false)?)?);
        }
        None => {}
    }
    sides.push(side("model", load(opened, true)?)?);
    if let [float, model] = &mut sides[..] {
        // One guidance for both, also where their kinds have different ones by default.
        float.request.guidance_scale = model.request.guidance_scale;
        check_pair(float, model)?;
    }
    Ok(sides)
}

/// Two models that can draw the same pictures from the same noise.
fn check_pair(float: &Side, model: &Side) -> Result<()> {
    let latents = |side: &Side| (side.pipeline.unet_config.in_channels, side.pipeline.autoencoder_config.factor());
    if latents(float) != latents(model) {
        let message = "--against is of another kind: its latents have other sizes, and cannot be the same noise";
        return Err(Usage(message.into()).into());
    }
    let sizes = [&float.request, &model.request].map(|request| request.size.unwrap_or_default());
    if sizes[0] != sizes[1] {
        let [(h, w), (height, width)] = sizes;
        let message = format!(
            "--against draws pictures of {h} × {w} pixels and MODEL of {height} × {width} (height × width): say --height and \
             --width"
        );
        return Err(Usage(message).into());
    }
    let samplers = [float, model].map(|side| side.pipeline.own_sampler().kind);
    if model.request.sampler.is_none() && samplers[0] != samplers[1] {
        warn(format_args!(
            "the two models have different samplers, {} and {}: with --scheduler, only their weights differ",
            samplers[0], samplers[1]
        ));
    }
    Ok(())
}

/// Pictures of each prompt.
fn images(args: &Args) -> usize {
    args.num_images.unwrap_or(1)
}

/// What to draw of a prompt: what its flags do not say is what the command line says.
fn request(args: &Args, side: &Side, (index, prompt): (usize, &JudgedPrompt)) -> Request {
    let defaults = Request {
        prompt: String::new(),
        negative_prompt: side.request.negative_prompt.clone(),
        noise: Noise::Seed(0),
        ..side.request
    };
    let mut request = prompt.drawn.clone().request(defaults);
    request.images = images(args);
    request.noise = Noise::Seeds(seeds(args, (index, prompt)).collect());
    request
}

/// The seed of each picture of a prompt.
fn seeds(args: &Args, (index, prompt): (usize, &JudgedPrompt)) -> impl Iterator<Item = u64> + use<> {
    let images = images(args) as u64;
    let own = args.drawing.seed.unwrap_or(0).wrapping_add(index as u64 * images);
    let first = prompt.drawn.seed.unwrap_or(own);
    (0..images).map(move |image| first.wrapping_add(image))
}

/// Evaluations of all UNets in all; checks what the prompts' flags ask for.
fn evaluations(args: &Args, prompts: &[JudgedPrompt], sides: &[Side]) -> Result<u64> {
    let mut total = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        for side in sides {
            let request = request(args, side, (index, prompt));
            let (_, sampler) = side
                .pipeline
                .sampler(request.sampler, request.steps)
                .with_context(|| format!("the prompt \"{}\" asks for {} steps", prompt.drawn.prompt, request.steps))?;
            total += (request.images.div_ceil(request.batch) * sampler.timesteps().len()) as u64;
        }
    }
    Ok(total)
}

/// The pictures of each side.
fn draw(
    args: &Args,
    sides: &[Side],
    prompt: (usize, &JudgedPrompt),
    before: &mut u64,
    bar: &mut Progress,
) -> Result<Vec<Vec<RgbImage>>> {
    let mut all = Vec::new();
    for side in sides {
        let request = request(args, side, prompt);
        let mut last = 0;
        let output = side.pipeline.generate(&request, &mut |done, _| {
            last = done as u64;
            bar.update(*before + last, &[]);
            go_on()
        })?;
        *before += last;
        all.push(output.images.unbind(0).iter().map(pictures::from_tensor).collect::<Result<_>>()?);
    }
    Ok(all)
}

/// A picture with all that is known of it.
struct Shown<'p> {
    picture: &'p RgbImage,
    scores: BTreeMap<Metric, f64>,
    /// What the judge found.
    labels: BTreeMap<String, String>,
}

/// Scores the pictures of a prompt, a list of each side, and adds them to the sides' scores.
fn score<'p>(
    sides: &mut [Side],
    judge: Option<&Judge>,
    (index, prompt): (usize, &JudgedPrompt),
    drawn: &'p [Vec<RgbImage>],
) -> Result<Vec<Vec<Shown<'p>>>> {
    let mut all: Vec<Vec<Shown>> = Vec::new();
    for (side, own) in sides.iter_mut().zip(drawn) {
        let mut shown: Vec<Shown> =
            own.iter().map(|picture| Shown { picture, scores: BTreeMap::new(), labels: BTreeMap::new() }).collect();
        if let Some(Judge { clip, choices, texts }) = judge {
            let embeds = clip.pictures(&own.iter().collect::<Vec<_>>())?;
            let cosines = embeds.matmul(&texts.get(index as i64));
            for ((picture, one), found) in (0..).zip(&mut shown).zip(choices.shown(&embeds)) {
                one.scores.insert(Metric::Clip, 100.0 * cosines.double_value(&[picture]));
                one.scores.extend(right(&found, &prompt.labels));
                one.labels = found.into_iter().map(|(label, value)| (label.to_owned(), value.to_owned())).collect();
            }
        }
        if let Some(float) = all.first() {
            for (float, one) in float.iter().zip(&mut shown) {
                one.scores.insert(Metric::Psnr, psnr(float.picture, one.picture));
            }
        }
        side.scores.push(&shown.iter().map(|one| one.scores.clone()).collect::<Vec<_>>());
        all.push(shown);
    }
    Ok(all)
}

/// The folder of `--output`.
struct Kept<'d> {
    folder: &'d Path,
    scores: File,
}

impl<'d> Kept<'d> {
    fn create(folder: &'d Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
        let path = folder.join("scores.jsonl");
        let scores = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { folder, scores })
    }

    fn write(
        &mut self,
        args: &Args,
        sides: &[Side],
        (index, prompt): (usize, &JudgedPrompt),
        shown: &[Vec<Shown>],
    ) -> Result<()> {
        for (side, shown) in sides.iter().zip(shown) {
            for ((number, seed), one) in seeds(args, (index, prompt)).enumerate().zip(shown) {
                let number = if shown.len() > 1 { format!("-{number}") } else { String::new() };
                let name = format!("{index:04}{number}-{}.png", side.name);
                pictures::write_png(&self.folder.join(&name), one.picture)?;
                let mut line = json!({
                    "file_name": name, "text": prompt.drawn.prompt, "drawn_by": side.name, "seed": seed,
                });
                for (metric, value) in &one.scores {
                    if matches!(metric, Metric::Clip | Metric::Psnr) {
                        line[metric.key()] = json!(value);
                    }
                }
                if !one.labels.is_empty() {
                    line["asked"] = json!(prompt.labels);
                    line["shown"] = json!(one.labels);
                }
                writeln!(self.scores, "{line}")
                    .with_context(|| format!("cannot write {}", self.folder.join("scores.jsonl").display()))?;
            }
        }
        Ok(())
    }
}
