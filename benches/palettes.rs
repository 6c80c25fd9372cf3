//! What palettes cost in a training step: the soft weight and the gradient through it, on the layers of SD 1.5.
//!
//!     make bench
//!
//! For each layer: our pass forward and back against a plain copy of the bytes that must be touched (32 a weight in
//! fp32: four passes, each reading or writing 8), against coremltools' DKM and against differentiable k-means by plain
//! autograd. As in a network, a layer's numbers have left the processor's caches when their turn comes again: there are
//! as many layers of the shape as take 330 MB, forward through all of them, then back; and so with the copy. The peers
//! get one layer. They run where $PALETTIST_PEERS names a Python that has torch and coremltools, and are skipped where a
//! layer would need more memory than there is. Then all 282 layers, and the large ones at each level of vector instructions.
//!
//! In training the way back and AdamW's step are one pass, which counts for the next step too: "in training" is what that
//! step with palettes takes more than AdamW's own. What is compared is done in turn; ratios are medians over the rounds.

#[path = "measure.rs"]
mod measure;
#[path = "peer.rs"]
mod peer;

use std::time::Instant;

use measure::{Cost, median, once};
use palettist::networks::unet::UnetConfig;
use palettist::ops::Parameter;
use palettist::palette::{DkmLayer, Form, Gradient, Level, SoftenRows};
use palettist::torch::environment;
use palettist::train::optimizer::{AdamW, Moments, norm};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
/// coremltools' default, and ours.
const ITERATIONS: usize = 3;
/// ρ: the middle of the schedule.
const TEMPERATURE: f64 = 0.3;

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
/// So small that weights stay what they are.
const RATE: f64 = 1e-9;

/// One layer with what a step needs.
struct Layer {
    weight: Tensor,
    soft: Tensor,
    gradient: Tensor,
    moments: Moments,
    palettes: Vec<DkmLayer>,
}

impl Layer {
    fn new(shape: &[i64], bits: &[u32]) -> Self {
        let fan_in: i64 = shape[1..].iter().product();
        let weight = Tensor::randn(shape, FLOAT) / (fan_in as f64).sqrt();
        let palettes =
            bits.iter().map(|&bits| DkmLayer::new("layer", Form::per_tensor(bits), &weight).expect("finite")).collect();
        Self::with(weight, palettes)
    }

    fn with(weight: Tensor, palettes: Vec<DkmLayer>) -> Self {
        let (soft, gradient, moments) = (weight.empty_like(), weight.copy(), Moments::zeros_like(&weight));
        Self { weight, soft, gradient, moments, palettes }
    }

    /// Another one of the same numbers, in memory of its own.
    fn again(&self) -> Self {
        Self::with(self.weight.copy(), self.palettes.clone())
    }
}

/// Forward through all of them, side by side as training does it.
fn forward(layers: &mut [Layer], place: usize) -> Vec<SoftenRows> {
    let soften = |layer: &mut Layer| {
        let Layer { weight, soft, palettes, .. } = layer;
        palettes[place].soften(weight, TEMPERATURE, ITERATIONS, None, soft).expect("finite")
    };
    layers.par_iter_mut().map(soften).collect()
}

/// What is measured on all of the layers; `place` says which of their palettes.
type Work = fn(layers: &mut [Layer], place: usize);

/// 32 bytes a weight.
fn copy(layers: &mut [Layer], _: usize) {
    for _ in 0..4 {
        layers.iter_mut().for_each(|layer| layer.soft.copy_(&layer.weight));
    }
}

/// Forward, then back to a gradient of the weights.
fn soften_and_back(layers: &mut [Layer], place: usize) {
    let states = forward(layers, place);
    let back =
        |(layer, state): (&mut Layer, SoftenRows)| state.backward(&mut layer.gradient).expect("of the same shape");
    layers.par_iter_mut().zip(states).for_each(back);
}

/// As a training step does it.
fn soften_and_step(layers: &mut [Layer], place: usize) {
    let states = forward(layers, place);
    layers.par_iter_mut().zip(states).for_each(|(layer, state)| {
        let gradient = layer.palettes[place].gradient(state, layer.gradient.shallow_clone());
        assert!(matches!(gradient, Ok(Gradient::Own { .. })), "layers on the CPU take their own steps");
    });
    layers.par_iter_mut().for_each(|layer| {
        let step = ADAMW.count(&layer.moments, RATE, 1.0).expect("a number");
        let Moments { exp_avg, exp_avg_sq, .. } = &layer.moments;
        layer.palettes[place].step(&layer.weight, [exp_avg, exp_avg_sq], &step).expect("of the same shape");
    });
}

/// The same step without palettes.
fn step(layers: &mut [Layer], _: usize) {
    let gradients: Vec<&Tensor> = layers.iter().map(|layer| &layer.gradient).collect();
    let weights: Vec<&Tensor> = layers.iter().map(|layer| &layer.weight).collect();
    let moments: Vec<&Moments> = layers.iter().map(|layer| &layer.moments).collect();
    assert!(norm(&gradients).is_finite());
    ADAMW.step(&weights, &gradients, &moments, RATE).expect("of one shape");
}

fn main() {
    // As the program does.
    environment::start_again();
    let parameters: Vec<Parameter> = UnetConfig::from_json(&serde_json::json!({"cross_attention_dim": 768}))
        .expect("diffusers' defaults are SD 1.5's")
        .parameters()
        .into_iter()
        .filter(|p| p.palettizable && p.shape.iter().product::<i64>() > 2048)
        .collect();
    let threads = rayon::current_num_threads();
    println!("vector instructions: {}", Level::in_use());
    println!("{threads} threads; per weight: ns of CPU time, bytes of memory beyond weight, soft weight and gradient");
    println!(
        "{:>24} {:>6} {:>14} {:>16} {:>22} {:>22}",
        "layer", "bits", "copy of 32 B", "ours", "coremltools DKM", "plain autograd"
    );
    let shapes: [&[i64]; 6] =
        [&[320, 320], &[320, 320, 3, 3], &[1280, 1280], &[640, 1280, 3, 3], &[10240, 1280], &[1280, 2560, 3, 3]];
    for shape in shapes {
        let first = Layer::new(shape, &[2, 4]);
        // Of 20 bytes a weight.
        let count = (330_000_000 / (20 * first.weight.numel())).max(1);
        let mut layers: Vec<Layer> = (1..count).map(|_| first.again()).collect();
        layers.push(first);
        let weights = layers[0].weight.numel() as f64;
        for (place, bits) in [2, 4].into_iter().enumerate() {
            let measured = Measured::new(&mut layers, place, 15);
            // Of one layer; none where it is too large for them.
            let [theirs, plain] = ["coremltools", "autograd"].map(|name| {
                let mut arguments = vec![name.to_string(), bits.to_string()];
                arguments.extend(shape.iter().map(i64::to_string));
                peer::ask("palettes.py", &arguments).map(|[wall, cpu, memory]| Cost { wall, cpu, memory })
            });
            let per_weight = |cost: Cost| format!("{:.2} {:.2}", cost.cpu * 1e9 / weights, cost.memory / weights);
            let ours = measured.least(|round| round.ours);
            let one = Cost { cpu: ours.cpu / count as f64, memory: ours.memory / count as f64, ..ours };
            let beside = |cost: Option<Cost>| match cost {
                Some(cost) => format!("{} {:.0}x", per_weight(cost), cost.cpu / one.cpu),
                None => "-".to_string(),
            };
            println!(
                "{:>24} {bits:>6} {:>14} {:>16} {:>22} {:>22}   {}",
                format!("{shape:?}"),
                format!("{:.2}", measured.least(|round| round.copy).cpu * 1e9 / weights / count as f64),
                per_weight(one),
                beside(theirs),
                beside(plain),
                measured.ratios()
            );
        }
    }
    let mut layers: Vec<Layer> = parameters.iter().map(|p| Layer::new(&p.shape, &[2, 4])).collect();
    layers.sort_by_key(|layer| layer.weight.numel());
    let small = layers.partition_point(|layer| layer.weight.numel() <= 1_000_000);
    for (what, from) in [("all", 0), ("above a million weights", small)] {
        let layers = &mut layers[from..];
        let weights: usize = layers.iter().map(|layer| layer.weight.numel()).sum();
        println!("{} layers, {what}: {weights} weights", layers.len());
        for (place, bits) in [2, 4].into_iter().enumerate() {
            let measured = Measured::new(layers, place, 5);
            let (copy, ours) = (measured.least(|round| round.copy), measured.least(|round| round.ours));
            let (with, without) = (measured.least(|round| round.with_palettes), measured.least(|round| round.without));
            println!(
                "{bits} bits: {:.2} s wall, {:.2} s CPU, {:.2} GB beyond weights, soft weights and gradients; a copy of 32 \
                 B a weight {:.2} s wall, {:.2} s CPU; AdamW with them {:.2} s CPU, without {:.2}; {}",
                ours.wall,
                ours.cpu,
                ours.memory * 1e-9,
                copy.wall,
                copy.cpu,
                with.cpu,
                without.cpu,
                measured.ratios()
            );
        }
    }
    // As processors with narrower vectors have it.
    let layers = &mut layers[small..];
    for level in Level::available() {
        level.force();
        for (place, bits) in [2, 4].into_iter().enumerate() {
            println!(
                "with {level}, above a million weights, {bits} bits: {}",
                Measured::new(layers, place, 3).ratios()
            );
        }
    }
}

/// What each kind of work took.
struct Round {
    copy: Cost,
    ours: Cost,
    with_palettes: Cost,
    without: Cost,
}

struct Measured {
    rounds: Vec<Round>,
}

impl Measured {
    /// Work in turn, so that a machine whose speed varies varies for all; after one round that is not counted. Short work is
    /// done several times in each round, because the system counts the time of threads in ticks of some milliseconds.
    fn new(layers: &mut [Layer], place: usize, rounds: usize) -> Self {
        let mut round = |times: usize| {
            let mut measure = |work: Work| {
                // What the way back has made of it is not multiplied again and again.
                layers.iter_mut().for_each(|layer| layer.gradient.copy_(&layer.weight));
                let cost = once(|| (0..times).for_each(|_| work(layers, place)));
                Cost { wall: cost.wall / times as f64, cpu: cost.cpu / times as f64, ..cost }
            };
            let (copy, ours) = (measure(copy), measure(soften_and_back));
            Round { copy, ours, with_palettes: measure(soften_and_step), without: measure(step) }
        };
        round(1);
        let start = Instant::now();
        round(1);
        let times = (0.4 / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 100.0);
        Self { rounds: (0..rounds).map(|_| round(times as usize)).collect() }
    }

    fn least(&self, work: fn(&Round) -> Cost) -> Cost {
        self.rounds.iter().map(work).reduce(Cost::least).unwrap_or_default()
    }

    /// Ours beside the copy.
    fn ratios(&self) -> String {
        let median_of = |ratio: &dyn Fn(&Round) -> f64| median(self.rounds.iter().map(ratio).collect());
        format!(
            "{:.2} times the copy's CPU time, {:.2} its wall time; in training {:.2} times its CPU time",
            median_of(&|round| round.ours.cpu / round.copy.cpu),
            median_of(&|round| round.ours.wall / round.copy.wall),
            median_of(&|round| (round.with_palettes.cpu - round.without.cpu) / round.copy.cpu)
        )
    }
}
