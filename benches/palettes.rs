//! What palettes cost in a training step: the soft weight and the gradient through it, on the layers of SD 1.5.
//!
//!     make bench
//!
//! For each layer: our pass forward and back against a plain copy of the bytes that must be touched (32 a weight in
//! fp32: four passes, each reading or writing 8), against coremltools' DKM and against differentiable k-means by plain
//! autograd. As in a network, a layer's numbers have left the processor's caches when their turn comes again: there are
//! as many layers of the shape as take 200 MB, forward through all of them, then back; and so with the copy. The peers
//! get one layer. They run where $PALETTIST_PEERS names a Python that has torch and coremltools, and are skipped where a
//! layer would need more memory than there is. Then all 282 layers.

#[path = "measure.rs"]
mod measure;

use std::process::Command;
use std::time::Instant;

use measure::{Cost, once};
use palettist::networks::unet::UnetConfig;
use palettist::ops::Parameter;
use palettist::palette::{DkmLayer, Form, Soften, soften};
use palettist::torch::environment;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
/// coremltools' default, and ours.
const ITERATIONS: usize = 3;
/// ρ: the middle of the schedule.
const TEMPERATURE: f64 = 0.3;

/// One layer with what a step needs.
struct Layer {
    weight: Tensor,
    soft: Tensor,
    gradient: Tensor,
    palettes: Vec<DkmLayer>,
}

impl Layer {
    fn new(shape: &[i64], bits: &[u32]) -> Self {
        let fan_in: i64 = shape[1..].iter().product();
        let weight = Tensor::randn(shape, FLOAT) / (fan_in as f64).sqrt();
        let palettes =
            bits.iter().map(|&bits| DkmLayer::new("layer", Form::per_tensor(bits), &weight).expect("finite")).collect();
        let (soft, gradient) = (weight.empty_like(), Tensor::randn(shape, FLOAT));
        Self { weight, soft, gradient, palettes }
    }

    /// Another one of the same numbers, in memory of its own.
    fn again(&self) -> Self {
        let Self { weight, soft, gradient, palettes } = self;
        Self { weight: weight.copy(), soft: soft.copy(), gradient: gradient.copy(), palettes: palettes.clone() }
    }

    fn forward(&mut self, place: usize) -> Soften {
        let layer = &self.palettes[place];
        let (tau, code) = (layer.temperature(0, TEMPERATURE), layer.code(0, TEMPERATURE));
        soften(&self.weight, &layer.centroids, tau, ITERATIONS, code, &mut self.soft).expect("finite").1
    }
}

/// Forward through all of them, then back, side by side as training does it.
fn step(layers: &mut [Layer], place: usize) {
    let states: Vec<Soften> = layers.par_iter_mut().map(|layer| layer.forward(place)).collect();
    let back = |(layer, state): (&mut Layer, Soften)| state.backward(&mut layer.gradient).expect("of the same shape");
    layers.par_iter_mut().zip(states).for_each(back);
}

/// 32 bytes a weight.
fn copy(layers: &mut [Layer]) {
    for _ in 0..4 {
        layers.iter_mut().for_each(|layer| layer.soft.copy_(&layer.weight));
    }
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
    println!("{threads} threads; per weight: ns of CPU time, bytes of memory beyond weight, soft weight and gradient");
    println!(
        "{:>24} {:>6} {:>14} {:>16} {:>22} {:>22}",
        "layer", "bits", "copy of 32 B", "ours", "coremltools DKM", "plain autograd"
    );
    let shapes: [&[i64]; 6] =
        [&[320, 320], &[320, 320, 3, 3], &[1280, 1280], &[640, 1280, 3, 3], &[10240, 1280], &[1280, 2560, 3, 3]];
    for shape in shapes {
        let first = Layer::new(shape, &[2, 4]);
        // Of 12 bytes a weight.
        let count = (200_000_000 / (12 * first.weight.numel())).max(1);
        let mut layers: Vec<Layer> = (1..count).map(|_| first.again()).collect();
        layers.push(first);
        let weights = (count * layers[0].weight.numel()) as f64;
        let copy = least(7, || copy(&mut layers));
        for (place, bits) in [2, 4].into_iter().enumerate() {
            let ours = least(7, || step(&mut layers, place));
            let [theirs, plain] = ["coremltools", "autograd"].map(|peer| ask(peer, shape, bits));
            let per_weight =
                |cost: Cost, weights: f64| format!("{:.2} {:.2}", cost.cpu * 1e9 / weights, cost.memory / weights);
            let one = weights / count as f64;
            let beside = |cost: Option<Cost>| match cost {
                Some(cost) => format!("{} {:.0}x", per_weight(cost, one), cost.cpu / one / (ours.cpu / weights)),
                None => "-".to_string(),
            };
            println!(
                "{:>24} {bits:>6} {:>14} {:>16} {:>22} {:>22}   {:.2} times the copy's CPU time, {:.2} its wall time",
                format!("{shape:?}"),
                format!("{:.2}", copy.cpu * 1e9 / weights),
                per_weight(ours, weights),
                beside(theirs),
                beside(plain),
                ours.cpu / copy.cpu,
                ours.wall / copy.wall
            );
        }
    }
    let weights: i64 = parameters.iter().map(|p| p.shape.iter().product::<i64>()).sum();
    println!("all {} layers, {weights} weights", parameters.len());
    let mut layers: Vec<Layer> = parameters.iter().map(|p| Layer::new(&p.shape, &[2, 4])).collect();
    let copy = least(3, || copy(&mut layers));
    println!("copy of 32 B a weight: {:.2} s wall, {:.2} s CPU", copy.wall, copy.cpu);
    for (place, bits) in [2, 4].into_iter().enumerate() {
        let ours = least(3, || step(&mut layers, place));
        println!(
            "{bits} bits: {:.2} s wall, {:.2} s CPU, {:.2} GB beyond weights, soft weights and gradients; {:.2} times the \
             copy's wall time, {:.2} its CPU time",
            ours.wall,
            ours.cpu,
            ours.memory * 1e-9,
            ours.wall / copy.wall,
            ours.cpu / copy.cpu
        );
    }
}

/// One layer's forward and backward in Python; `None` without peers, or where the layer is too large for them.
fn ask(peer: &str, shape: &[i64], bits: u32) -> Option<Cost> {
    let python = std::env::var_os("PALETTIST_PEERS")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/palettes.py");
    let mut command = Command::new(python);
    command.arg(script).arg(peer).arg(bits.to_string()).args(shape.iter().map(i64::to_string));
    let output = command.output().expect("$PALETTIST_PEERS is a Python");
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.lines().last()?.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [wall, cpu, memory] = numbers[..] else { return None };
    Some(Cost { wall, cpu, memory })
}

/// The least of `repeats` measurements of `work`, after one that is not counted. Short work is done several times in each,
/// because the system counts the time of threads in ticks of some milliseconds.
fn least(repeats: usize, mut work: impl FnMut()) -> Cost {
    work();
    let start = Instant::now();
    work();
    let times = (0.1 / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 1000.0);
    let measured = (0..repeats).map(|_| once(|| (0..times as usize).for_each(|_| work())));
    let least = measured.reduce(Cost::least).unwrap_or_default();
    Cost { wall: least.wall / times, cpu: least.cpu / times, ..least }
}
