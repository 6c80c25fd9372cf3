//! The small CLIP while it learns.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use palettist::files::{TensorFile, write_bytes, write_safetensors};
use palettist::networks::clip_model::{ClipConfig, LOGIT_SCALE};
use palettist::networks::text_encoder::text_encoder;
use palettist::networks::vision::image_embeds;
use palettist::ops::{Tensors, Weights};
use palettist::source::Tokenizer;
use palettist::train::initialise::initialise;
use palettist::train::optimizer::{AdamW, Moments};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::drawings::Drawings;

/// How large it is.
pub struct Sizes {
    /// Of the pictures, px.
    pub side: u32,
    pub patch: u32,
    pub width: i64,
    pub vision_layers: i64,
    pub text_layers: i64,
    pub heads: i64,
    /// Tokens of a text, start and end included.
    pub positions: i64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { side: 48, patch: 8, width: 128, vision_layers: 4, text_layers: 2, heads: 4, positions: 32 }
    }
}

/// Mean and standard deviation that pixels are brought to: those of a picture from −1 to 1.
const MEAN: f64 = 0.5;
const STD: f64 = 0.5;
/// CLIP's own limit of the factor on cosines (Radford et al. 2021, 2.5).
const MOST_SCALE: f64 = 100.0;

/// What learns, with its optimizer.
pub struct Judge {
    json: Value,
    config: ClipConfig,
    tokenizer: Tokenizer,
    weights: Weights,
    moments: BTreeMap<String, Moments>,
    side: u32,
    positions: i64,
}

impl Judge {
    pub fn new(sizes: &Sizes, tokenizer: &Path, seed: u64) -> Result<Self> {
        let tokenizer = Tokenizer::open(tokenizer)?;
        let layers = |count: i64| {
            json!({
                "hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_hidden_layers": count,
                "num_attention_heads": sizes.heads, "hidden_act": "quick_gelu", "projection_dim": sizes.width,
            })
        };
        let mut text = layers(sizes.text_layers);
        text["model_type"] = json!("clip_text_model");
        text["vocab_size"] = json!(tokenizer.vocabulary_size());
        text["max_position_embeddings"] = json!(sizes.positions);
        text["bos_token_id"] = json!(tokenizer.encode("")[0]);
        text["eos_token_id"] = json!(tokenizer.end());
        text["pad_token_id"] = json!(tokenizer.pad());
        let mut vision = layers(sizes.vision_layers);
        vision["model_type"] = json!("clip_vision_model");
        vision["image_size"] = json!(sizes.side);
        vision["patch_size"] = json!(sizes.patch);
        let json = json!({
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": sizes.width,
            "text_config": text, "vision_config": vision,
        });
        let config = ClipConfig::from_json(&json)?;
        let weights = initialise(&config.parameters(), seed);
        let weights: Weights =
            weights.into_iter().map(|(name, tensor)| (name, tensor.set_requires_grad(true))).collect();
        let moments =
            weights.iter().map(|(name, tensor)| (name.clone(), Moments::zeros_like(&tensor.detach()))).collect();
        Ok(Self { json, config, tokenizer, weights, moments, side: sizes.side, positions: sizes.positions })
    }

    /// Learns from the pictures `which`; returns the loss.
    pub fn step(&mut self, drawings: &Drawings, which: &[usize], rate: f64) -> Result<f64> {
        let loss = self.loss(drawings, which)?;
        loss.backward();
        let _guard = tch::no_grad_guard();
        for decays in [true, false] {
            let names: Vec<&String> =
                self.weights.keys().filter(|name| (self.weights[*name].dim() > 1) == decays).collect();
            let parameters: Vec<&Tensor> = names.iter().map(|name| &self.weights[*name]).collect();
            let gradients: Vec<Tensor> = parameters.iter().map(|parameter| parameter.grad()).collect();
            let moments: Vec<&Moments> = names.iter().map(|name| &self.moments[*name]).collect();
            let adam = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay: if decays { 0.05 } else { 0.0 } };
            adam.step(&parameters, &gradients.iter().collect::<Vec<_>>(), &moments, rate)?;
        }
        self.weights.values_mut().for_each(Tensor::zero_grad);
        if let Some(scale) = self.weights.get(LOGIT_SCALE) {
            let _ = scale.shallow_clone().clamp_max_(MOST_SCALE.ln());
        }
        Ok(loss.double_value(&[]))
    }

    fn loss(&self, drawings: &Drawings, which: &[usize]) -> Result<Tensor> {
        let mut ops = Tensors::new(&self.weights);
        let pixels = (augment(&drawings.batch(which)) - MEAN) / STD;
        let pictures = unit(&image_embeds(&mut ops, &self.config.vision, &pixels)) * self.weights[LOGIT_SCALE].exp();

        // All texts at once: the captions, then the values of each label.
        let values = drawings.values();
        let captions: Vec<&str> = which.iter().map(|&index| drawings.captions[index].as_str()).collect();
        let all = captions.iter().copied().chain(values.values().flat_map(|texts| texts.values().map(String::as_str)));
        let texts = unit(&text_encoder(&mut ops, &self.config.text, &self.ids(all)?).pooled);
        let logits = pictures.matmul(&texts.tr());

        let count = which.len() as i64;
        let labels: Vec<&BTreeMap<String, String>> = which.iter().map(|&index| &drawings.labels[index]).collect();
        let alike = |a: usize, b: usize| captions[a] == captions[b];
        let same: Vec<f32> = (0..which.len())
            .flat_map(|a| (0..which.len()).map(move |b| (a, b)))
            .map(|(a, b)| f32::from(alike(a, b)))
            .collect();
        let same = Tensor::from_slice(&same).view([count, count]);
        let target = &same / same.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
        let own = logits.narrow(1, 0, count);
        let cross = |logits: &Tensor| -(logits.log_softmax(1, Kind::Float) * &target).sum(Kind::Float) / count as f64;
        let mut loss = (cross(&own) + cross(&own.tr())) / 2.0;

        let mut first = count;
        for (label, texts) in &values {
            let place: BTreeMap<&str, i64> = texts.keys().map(String::as_str).zip(0..).collect();
            // −100 is left out.
            let target: Vec<i64> =
                labels.iter().map(|labels| labels.get(label).map_or(-100, |value| place[value.as_str()])).collect();
            let width = texts.len() as i64;
            if width > 1 && target.iter().any(|&value| value >= 0) {
                loss += logits.narrow(1, first, width).cross_entropy_for_logits(&Tensor::from_slice(&target));
            }
            first += width;
        }
        Ok(loss)
    }

    /// Token ids `[N, T]`, T those of the longest text: what follows an end is never looked at.
    fn ids<'t>(&self, texts: impl Iterator<Item = &'t str>) -> Result<Tensor> {
        let mut rows = Vec::new();
        for text in texts {
            let mut row = self.tokenizer.encode(text);
            row.truncate(row.iter().position(|&id| id == self.tokenizer.end()).map_or(row.len(), |end| end + 1));
            let limit = self.positions as usize;
            ensure!(row.len() <= limit, "\"{text}\" has {} tokens, and the judge reads {limit}", row.len());
            rows.push(row);
        }
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        rows.iter_mut().for_each(|row| row.resize(longest, self.tokenizer.pad()));
        Ok(Tensor::from_slice(&rows.concat()).view([rows.len() as i64, longest as i64]))
    }

    /// Takes up what [`Self::keep`] left, where there is such a file; returns how many steps were done.
    ///
    /// # Errors
    /// It is of other settings, or damaged.
    pub fn resume(&mut self, state: &Path, settings: &str) -> Result<usize> {
        if !state.exists() {
            return Ok(0);
        }
        let file = TensorFile::open(state)?;
        let metadata = file.metadata();
        let said = metadata.get("settings").map_or("", String::as_str);
        ensure!(said == settings, "{} is of {said}, and this is {settings}: remove it", state.display());
        let step: usize = metadata.get("step").and_then(|step| step.parse().ok()).context("the state has no step")?;
        let _guard = tch::no_grad_guard();
        for (name, weight) in &self.weights {
            let moments = &self.moments[name];
            for (part, to) in [("weight", weight), ("mean", &moments.exp_avg), ("square", &moments.exp_avg_sq)] {
                to.shallow_clone().copy_(&file.tensor(&format!("{part}.{name}"))?);
            }
            let _ = moments.step.shallow_clone().fill_(step as f64);
        }
        Ok(step)
    }

    /// Writes all that the next step depends on.
    pub fn keep(&self, state: &Path, step: usize, settings: &str) -> Result<()> {
        let mut named: Vec<(String, &Tensor)> = Vec::new();
        for (name, weight) in &self.weights {
            let moments = &self.moments[name];
            for (part, from) in [("weight", weight), ("mean", &moments.exp_avg), ("square", &moments.exp_avg_sq)] {
                named.push((format!("{part}.{name}"), from));
            }
        }
        let metadata = [("step", step.to_string()), ("settings", settings.to_owned())];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
        write_safetensors(state, named.iter().map(|(name, tensor)| (name.as_str(), *tensor)), None, &metadata)?;
        Ok(())
    }

    /// Writes the folder, the weights in fp16.
    pub fn save(&self, out: &Path, tokenizer: &Path) -> Result<()> {
        let write = |name: &str, json: &Value| {
            write_bytes(&out.join(name), (serde_json::to_string_pretty(json)? + "\n").as_bytes())
        };
        write("config.json", &self.json)?;
        let side = json!({ "height": self.side, "width": self.side });
        let processor = json!({
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": true, "do_resize": true, "resample": 3,
            "size": { "shortest_edge": self.side }, "do_center_crop": true, "crop_size": side, "do_rescale": true,
            "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": [MEAN, MEAN, MEAN], "image_std": [STD, STD, STD],
        });
        write("preprocessor_config.json", &processor)?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let tensors = self.weights.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&out.join("model.safetensors"), tensors, Some(Kind::Half), &metadata)?;
        let names: BTreeSet<_> = fs::read_dir(tokenizer)
            .with_context(|| format!("cannot read {}", tokenizer.display()))?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        for name in names {
            let bytes = fs::read(tokenizer.join(&name)).with_context(|| tokenizer.join(&name).display().to_string())?;
            write_bytes(&out.join(name), &bytes)?;
        }
        // Texts here are shorter.
        let path = out.join("tokenizer_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap_or_else(|_| b"{}".to_vec()))?;
        config["model_max_length"] = json!(self.positions);
        write("tokenizer_config.json", &config)
    }
}

fn unit(embeds: &Tensor) -> Tensor {
    embeds / embeds.norm_scalaropt_dim(2, [-1], true)
}

/// Pictures `[B, 3, S, S]` from 0 to 1, each a little moved, zoomed and tinted; the batch at times blurred; all noised.
fn augment(pictures: &Tensor) -> Tensor {
    let options = (Kind::Float, pictures.device());
    let (batch, side) = (pictures.size()[0], pictures.size()[3]);
    let between = |low: f64, high: f64, shape: &[i64]| Tensor::rand(shape, options) * (high - low) + low;
    let zoom = between(0.85, 1.15, &[batch]);
    let zero = Tensor::zeros([batch], options);
    let shift = || between(-0.1, 0.1, &[batch]);
    let rows = [Tensor::stack(&[&zoom, &zero, &shift()], 1), Tensor::stack(&[&zero, &zoom, &shift()], 1)];
    let grid = Tensor::affine_grid_generator(&Tensor::stack(&rows, 1), pictures.size().as_slice(), false);
    // Bilinear; what lies outside is as the border.
    let x = pictures.grid_sampler(&grid, 0, 1, false);
    let gain = between(0.85, 1.12, &[batch, 1, 1, 1]);
    let tint = between(-0.04, 0.04, &[batch, 3, 1, 1]);
    let x = (x - 0.5) * gain + 0.5 + tint;
    let small = match Tensor::rand([1], options).double_value(&[0]) {
        u if u < 0.4 => side,
        u if u < 0.7 => side * 5 / 8,
        _ => side * 3 / 8,
    };
    let x = match small == side {
        true => x,
        false => x.adaptive_avg_pool2d([small, small]).upsample_bilinear2d([side, side], false, None, None),
    };
    let noise = x.randn_like() * between(0.0, 0.06, &[batch, 1, 1, 1]);
    (x + noise).clamp(0.0, 1.0)
}
