//! A whole training step, with and without palettes, beside the same step with diffusers in PyTorch.
//!
//!     make bench
//!     cargo bench --profile dev --bench step -- [parts of the lines' names: "batch 4", "2 bits", diffusers]
//!
//! The model is examples/base, at its own size, and the one that $PALETTIST_MODEL names (a diffusers folder), at batch 1
//! and 4: random latents, noise and text; the denoising loss; AdamW on all of the UNet, fp32. diffusers runs where
//! $PALETTIST_PEERS names a Python that has it: the same shapes, `torch.optim.AdamW(fused=True)`, clipped gradients.

#[path = "measure.rs"]
mod measure;

use std::process::Command;

use measure::{Cost, least};
use palettist::config::{Palettize, Train};
use palettist::networks::unet::unet;
use palettist::ops::Tensors;
use palettist::source::{Component, Model};
use palettist::torch::random::{Purpose, generator};
use palettist::torch::waiting::sleep_soon;
use palettist::train::optimizer::AdamW;
use palettist::train::trained::Trained;
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const REPEATS: usize = 3;
const PEER: &str = "diffusers, no palettes";

fn main() {
    // As the program does.
    sleep_soon();
    // cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let line_of = |batch: i64, what: &str| format!("batch {batch}, {what}");
    let wants = |line: &str| wanted.is_empty() || wanted.iter().any(|part| line.contains(part));
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base").to_owned();
    for folder in [Some(base), std::env::var("PALETTIST_MODEL").ok()].into_iter().flatten() {
        println!("{folder}: seconds a step, and GB beyond what is held between steps");
        // First of all: it may need all the memory there is.
        let theirs: Vec<Option<Cost>> =
            [1, 4].map(|batch| if wants(&line_of(batch, PEER)) { ask(&folder, batch) } else { None }).into();
        for (batch, theirs) in [1, 4].into_iter().zip(theirs) {
            let mut plain = None;
            let mut show = |what: &str, cost: &dyn Fn() -> Option<Cost>| {
                let line = line_of(batch, what);
                if wants(&line) {
                    match cost() {
                        Some(cost) => println!("  {}", told(&line, cost, *plain.get_or_insert(cost))),
                        None => println!("  {line} was not run: $PALETTIST_PEERS names no Python that has it"),
                    }
                }
            };
            show("no palettes", &|| Some(step(&folder, batch, &Palettize { enabled: false, ..Palettize::default() })));
            for bits in [2, 4] {
                let palettes = || Some(step(&folder, batch, &Palettize { n_bits: bits, ..Palettize::default() }));
                show(&format!("palettes of {bits} bits"), &palettes);
            }
            show(PEER, &|| theirs);
        }
    }
}

/// One line; `first` is what the first one of this batch took.
fn told(line: &str, cost: Cost, first: Cost) -> String {
    format!(
        "{line:30} {:7.3} s wall, {:7.3} s CPU, {:6.3} GB; {:.2} times the first",
        cost.wall,
        cost.cpu,
        cost.memory * 1e-9,
        cost.wall / first.wall
    )
}

fn step(folder: &str, batch: i64, palettize: &Palettize) -> Cost {
    let model = Model::open(folder).expect("a diffusers folder");
    let config = model.unet_config().expect("a UNet");
    let parameters = model.parameters(Component::Unet).expect("a UNet");
    let weights = model.weights(Component::Unet, Kind::Float, Device::Cpu).expect("whole weights");
    let mut trained = Trained::new(
        vec![(Component::Unet, weights, parameters)],
        palettize,
        &Train::default(),
        Device::Cpu,
        &mut |_, _| {},
    )
    .expect("finite weights");
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let (side, channels) = (config.sample_size, config.in_channels);
    let latents = Tensor::randn([batch, channels, side, side], FLOAT);
    let noise = Tensor::randn([batch, config.out_channels, side, side], FLOAT);
    let text = Tensor::randn([batch, 77, config.cross_attention_dim], FLOAT);
    let timesteps = Tensor::randint(1000, [batch], (Kind::Int64, Device::Cpu));
    let mut random = generator(0, Purpose::Rounding, 0);
    least(REPEATS, || {
        let begun = trained.begin(0.3, |_| true).expect("finite weights");
        let mut ops = Tensors::new(&begun.networks[&Component::Unet]);
        let output = unet(&mut ops, &config, &latents, &timesteps, &text);
        output.mse_loss(&noise, tch::Reduction::Mean).backward();
        drop(output);
        trained.apply(begun, &adamw, 1.0, &mut random, |_| 1e-6).expect("finite gradients");
    })
}

fn ask(folder: &str, batch: i64) -> Option<Cost> {
    let python = std::env::var_os("PALETTIST_PEERS")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/step.py");
    let mut command = Command::new(python);
    command.args([script, folder, &batch.to_string()]).env_remove("GOMP_SPINCOUNT");
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.lines().last()?.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [wall, cpu, memory] = numbers[..] else { return None };
    Some(Cost { wall, cpu, memory })
}
