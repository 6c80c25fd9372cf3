//! A whole training step, with and without palettes, beside the same step with diffusers in PyTorch.
//!
//!     make bench
//!     cargo bench --profile dev --bench step -- [parts of the lines' names: "batch 4", "2 bits", diffusers]
//!
//! The model is examples/base, at its own size, and the one that $PALETTIST_MODEL names (a diffusers folder), at batch 1
//! and 4: random latents, noise and text; the denoising loss; AdamW on all of the UNet, fp32. diffusers runs where
//! $PALETTIST_PEERS names a Python that has it: the same shapes, `torch.optim.AdamW(fused=True)`, clipped gradients.
//!
//! Steps of a small model are taken in turn, one of each line, many times over, so that a machine whose speed varies varies
//! for all; of a large one the lines come one after the other, since there is no memory for all at once. A line tells the
//! least of its costs, and the median of what its steps took beside those of the first line.

#[path = "measure.rs"]
mod measure;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use measure::{Cost, median, once};
use palettist::config::{Palettize, Train};
use palettist::networks::unet::unet;
use palettist::ops::Tensors;
use palettist::source::{Component, Model};
use palettist::torch::environment;
use palettist::torch::random::{Purpose, generator};
use palettist::train::optimizer::AdamW;
use palettist::train::trained::{Fixed, Trained};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// One line's training: each call takes a step.
type Steps = Box<dyn FnMut() -> Cost>;

/// What a line is called, and what begins its training.
struct Line {
    name: String,
    begin: Box<dyn Fn() -> Option<Steps>>,
}

fn main() {
    // As the program does.
    environment::start_again();
    // cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let wants = |line: &Line| wanted.is_empty() || wanted.iter().any(|part| line.name.contains(part));
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base").to_owned();
    for folder in [Some(base), std::env::var("PALETTIST_MODEL").ok()].into_iter().flatten() {
        println!("{folder}: seconds a step, and GB beyond what is held between steps");
        let parameters = Model::open(&folder).and_then(|model| model.parameters(Component::Unet));
        let weights: i64 =
            parameters.expect("a UNet").iter().map(|parameter| parameter.shape.iter().product::<i64>()).sum();
        for batch in [1, 4] {
            let lines: Vec<Line> = lines(&folder, batch).into_iter().filter(wants).collect();
            let costs: Vec<(&Line, Vec<Cost>)> = if weights < 100_000_000 {
                in_turn(&lines, 40)
            } else {
                lines.iter().flat_map(|line| in_turn(std::slice::from_ref(line), 3)).collect()
            };
            let first = costs.first().map(|(_, costs)| costs.clone()).unwrap_or_default();
            costs.iter().for_each(|(line, costs)| println!("  {}", told(&line.name, costs, &first)));
        }
    }
}

fn lines(folder: &str, batch: i64) -> Vec<Line> {
    let ours = |what: &str, palettize: Palettize| {
        let folder = folder.to_owned();
        let begin = Box::new(move || Some(begin(&folder, batch, &palettize)));
        Line { name: format!("batch {batch}, {what}"), begin }
    };
    let mut lines = vec![ours("no palettes", Palettize { enabled: false, ..Palettize::default() })];
    for n_bits in [2, 4] {
        lines.push(ours(&format!("palettes of {n_bits} bits"), Palettize { n_bits, ..Palettize::default() }));
    }
    let folder = folder.to_owned();
    let name = format!("batch {batch}, diffusers, no palettes");
    lines.push(Line { name, begin: Box::new(move || begin_peer(&folder, batch)) });
    lines
}

/// `rounds` steps of each line, in turn, after one that is not counted.
fn in_turn(lines: &[Line], rounds: usize) -> Vec<(&Line, Vec<Cost>)> {
    let mut running = Vec::new();
    for line in lines {
        match (line.begin)() {
            Some(mut steps) => {
                steps();
                running.push((line, steps, Vec::new()));
            }
            None => println!("  {} was not run: $PALETTIST_PEERS names no Python that has it", line.name),
        }
    }
    for _ in 0..rounds {
        for (_, steps, costs) in &mut running {
            // Threads of the one before go to sleep first.
            std::thread::sleep(Duration::from_millis(10));
            costs.push(steps());
        }
    }
    let costs = running.into_iter().map(|(line, _, costs)| (line, costs)).collect();
    give_back_memory();
    costs
}

/// What is freed is kept otherwise (`palettist::torch::environment`), and the next line needs it, another program's maybe.
fn give_back_memory() {
    #[cfg(target_os = "linux")]
    {
        unsafe extern "C" {
            fn malloc_trim(kept: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's, which takes any number.
        unsafe { malloc_trim(0) };
    }
}

/// One line; `first` is what the first one of this batch took.
fn told(name: &str, costs: &[Cost], first: &[Cost]) -> String {
    let least = costs.iter().copied().reduce(Cost::least).unwrap_or_default();
    let walls = costs.iter().map(|cost| cost.wall).collect();
    let ratios = costs.iter().zip(first).map(|(cost, first)| cost.wall / first.wall).collect();
    format!(
        "{name:30} {:7.3} s wall ({:7.3} in the middle), {:7.3} s CPU, {:6.3} GB; {:.2} times the first",
        least.wall,
        median(walls),
        least.cpu,
        least.memory * 1e-9,
        median(ratios)
    )
}

fn begin(folder: &str, batch: i64, palettize: &Palettize) -> Steps {
    let model = Model::open(folder).expect("a diffusers folder");
    let config = model.unet_config().expect("a UNet");
    let parameters = model.parameters(Component::Unet).expect("a UNet");
    let weights = model.weights(Component::Unet, Kind::Float, Device::Cpu).expect("whole weights");
    let networks = vec![(Component::Unet, weights, parameters)];
    let mut trained =
        Trained::new(networks, (palettize, &Fixed::new()), &Train::default(), Device::Cpu, false, &mut |_, _| {})
            .expect("finite weights");
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let (side, channels) = (config.sample_size, config.in_channels);
    let latents = Tensor::randn([batch, channels, side, side], FLOAT);
    let noise = Tensor::randn([batch, config.out_channels, side, side], FLOAT);
    let text = Tensor::randn([batch, 77, config.cross_attention_dim], FLOAT);
    let timesteps = Tensor::randint(1000, [batch], (Kind::Int64, Device::Cpu));
    let mut random = generator(0, Purpose::Rounding, 0);
    let mut step = move || {
        let begun = trained.begin(0.3, |_| true).expect("finite weights");
        let mut ops = Tensors::new(&begun.networks[&Component::Unet]);
        let output = unet(&mut ops, &config, &latents, &timesteps, &text);
        output.mse_loss(&noise, tch::Reduction::Mean).backward();
        drop(output);
        trained.apply(begun, &adamw, 1.0, &mut random, |_| 1e-6).expect("finite gradients");
    };
    Box::new(move || once(&mut step))
}

/// A Python that takes a step for each line it reads, and answers with what it cost.
struct Peer {
    child: Child,
    /// None as it ends.
    asked: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn ask(&mut self) -> Option<Cost> {
        writeln!(self.asked.as_mut()?).ok()?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer).ok()?;
        let numbers: Vec<f64> = answer.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [wall, cpu, memory] = numbers[..] else { return None };
        Some(Cost { wall, cpu, memory })
    }
}

impl Drop for Peer {
    /// Its memory is needed.
    fn drop(&mut self) {
        drop(self.asked.take());
        let _ = self.child.wait();
    }
}

fn begin_peer(folder: &str, batch: i64) -> Option<Steps> {
    let python = std::env::var_os("PALETTIST_PEERS")?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/step.py");
    let mut command = Command::new(python);
    command.args([script, folder, &batch.to_string()]);
    // As it would run without us.
    for variable in environment::variables() {
        command.env_remove(variable);
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let (asked, answers) = (child.stdin.take(), BufReader::new(child.stdout.take()?));
    let mut peer = Peer { child, asked, answers };
    peer.ask()?;
    Some(Box::new(move || peer.ask().expect("the peer still runs")))
}
