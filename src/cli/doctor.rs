//! `palettist doctor`: what this machine can train.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{print, size};
use crate::networks::unet::UnetConfig;
use crate::terminal::duration;
use crate::train::estimate::unet_step;

/// Tells what this machine has (devices, libtorch, memory, disk) and what it can train
#[derive(clap::Args)]
pub struct Args {
    /// Where runs will be written
    #[arg(long, default_value = ".")]
    output_dir: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Weights of the SD 1.5 UNet; SD 2.1's has 1 % more.
const SD15_WEIGHTS: f64 = 859_520_964.0;
/// The steps of a usual DreamBooth run.
const DREAMBOOTH_STEPS: f64 = 800.0;
/// Operations are timed for about so long.
const TIMING: Duration = Duration::from_secs(10);
/// fp32 weight, gradient, AdamW's two moments and the palettized weight.
const TRAINING_BYTES_PER_WEIGHT: f64 = 20.0;
/// The teacher's.
const TEACHER_BYTES_PER_WEIGHT: f64 = 2.0;
/// Beyond these, at batch 1 and 512 px with gradient checkpointing: activations, libtorch. Measured on the CPU.
const TRAINING_REST: f64 = 1.2e9;
/// fp32 weights and the largest activations.
const SAMPLING_BYTES_PER_WEIGHT: f64 = 5.0;

pub fn run(args: Args) -> Result<()> {
    let devices: Vec<Device> = match tch::Cuda::is_available() {
        true => (0..tch::Cuda::device_count() as usize).map(Device::Cuda).chain([Device::Cpu]).collect(),
        false => vec![Device::Cpu],
    };
    let speeds = devices.iter().map(|&device| multiply_speed(device)).collect::<Result<Vec<f64>>>()?;
    // The first is the one that `auto` takes.
    let step = unet_step(&UnetConfig::sd15()?, 1, (64, 64), devices[0], TIMING);
    let graphics = graphics_cards();
    let memory = memory();
    let disk = free_disk(&args.output_dir);
    let threads = tch::get_num_threads();
    if args.json {
        let listed: Vec<_> = devices
            .iter()
            .zip(&speeds)
            .map(|(device, speed)| json!({"device": name(*device), "gflops": speed / 1e9}))
            .collect();
        return print(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "libtorch": crate::torch::version(),
            "devices": listed,
            "threads": threads,
            "memory_bytes": memory.map(|m| m.0),
            "memory_available_bytes": memory.map(|m| m.1),
            "disk_free_bytes": disk,
            "sd15_step_seconds": step,
        }));
    }
    print(format_args!("palettist {}, libtorch {}", env!("CARGO_PKG_VERSION"), crate::torch::version()))?;
    for (device, speed) in devices.iter().zip(&speeds) {
        let what = match device {
            Device::Cuda(i) => graphics.get(*i).cloned().unwrap_or_default(),
            _ => format!("{threads} threads"),
        };
        print(format_args!("{:<8}{what}; {:.0} GFLOP/s in fp32", name(*device), speed / 1e9))?;
    }
    if devices.len() == 1 {
        // A card that libtorch can't use is the usual surprise.
        let why = match graphics.first() {
            Some(card) => format!("{card} is there, but this libtorch is the CPU build: CUDA=1 make build"),
            None => "no NVIDIA GPU found".to_string(),
        };
        print(format_args!("cuda    {why}"))?;
    }
    let (total, available) = memory.unwrap_or((0, 0));
    if total > 0 {
        print(format_args!("memory  {}, {} available", size(total), size(available)))?;
    }
    if let Some(free) = disk {
        print(format_args!("disk    {} free for {}", size(free), args.output_dir.display()))?;
    }
    print(format_args!(
        "one SD 1.5 training step (batch 1, 512 px, fp32): {step:.1} s; 800 steps of DreamBooth with prior preservation: {}",
        duration(2.0 * DREAMBOOTH_STEPS * step)
    ))?;
    let room = graphics.first().filter(|_| devices.len() > 1).and_then(|card| card_memory(card)).unwrap_or(available);
    let training = SD15_WEIGHTS * TRAINING_BYTES_PER_WEIGHT + TRAINING_REST;
    for (task, bytes) in [
        ("training palettes of the SD 1.5 UNet (batch 1, 512 px)", training),
        ("the same with distillation", training + SD15_WEIGHTS * TEACHER_BYTES_PER_WEIGHT),
        ("sampling with SD 1.5", SD15_WEIGHTS * SAMPLING_BYTES_PER_WEIGHT),
    ] {
        let answer = if room == 0 || room as f64 > bytes { "fits" } else { "does not fit" };
        print(format_args!("{task} takes {}: {answer}", size(bytes as u64)))?;
    }
    Ok(())
}

fn name(device: Device) -> String {
    match device {
        Device::Cuda(i) => format!("cuda:{i}"),
        _ => "cpu".to_string(),
    }
}

/// Multiply-adds a second, counted as two, of a matrix product that fills the device.
fn multiply_speed(device: Device) -> Result<f64> {
    let side: i64 = if device == Device::Cpu { 512 } else { 4096 };
    let a = Tensor::f_rand([side, side], (Kind::Float, device))?;
    let flop = 2.0 * (side as f64).powi(3);
    let mut product = a.f_matmul(&a)?;
    wait_for(&product)?;
    let (start, mut rounds) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(200) {
        product = a.f_matmul(&a)?;
        wait_for(&product)?;
        rounds += 1;
    }
    Ok(flop * f64::from(rounds) / start.elapsed().as_secs_f64())
}

/// Reading one value waits for the device to finish.
fn wait_for(tensor: &Tensor) -> Result<()> {
    let _: f64 = tensor.f_double_value(&[0, 0])?;
    Ok(())
}

/// `NVIDIA H200, 143771 MiB` a card, as the driver's own tool tells it.
fn graphics_cards() -> Vec<String> {
    let listed = Command::new("nvidia-smi").args(["--query-gpu=name,memory.total", "--format=csv,noheader"]).output();
    match listed {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_string()).collect()
        }
        _ => Vec::new(),
    }
}

/// Bytes from the line of a card.
fn card_memory(card: &str) -> Option<u64> {
    let mebibytes: u64 = card.rsplit(", ").next()?.strip_suffix(" MiB")?.trim().parse().ok()?;
    Some(mebibytes << 20)
}

/// (total, available) bytes of main memory, where the system tells.
pub(super) fn memory() -> Option<(u64, u64)> {
    if let Ok(text) = std::fs::read_to_string("/proc/meminfo") {
        let field = |name: &str| -> Option<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(rest.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
        };
        return Some((field("MemTotal:")?, field("MemAvailable:")?));
    }
    let output = Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok()?;
    let total = String::from_utf8_lossy(&output.stdout).trim().parse().ok()?;
    Some((total, total))
}

/// Bytes free on the disk of `path`, or of the nearest folder above it that exists.
pub(super) fn free_disk(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let existing = absolute.ancestors().find(|folder| folder.exists())?;
    let output = Command::new("df").arg("-Pk").arg(existing).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let kilobytes: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_that_is_timed_is_that_of_stable_diffusion_1_5() {
        let weights: i64 =
            UnetConfig::sd15().unwrap().parameters().iter().map(|p| p.shape.iter().product::<i64>()).sum();
        assert_eq!(weights as f64, SD15_WEIGHTS);
    }

    #[test]
    fn the_memory_of_a_card_is_read_from_its_line() {
        assert_eq!(card_memory("NVIDIA H200, 143771 MiB"), Some(143_771 << 20));
        assert_eq!(card_memory("NVIDIA H200, [N/A]"), None);
    }
}
