//! Time and memory of a piece of work, as the operating system counts them (Linux; elsewhere only wall time).

use std::fs;
use std::time::Instant;

/// What a piece of work took.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    /// Seconds.
    pub wall: f64,
    /// Seconds of all threads together; 0 where it is not known.
    pub cpu: f64,
    /// Bytes that the process held at most, over those it held before; 0 where it is not known.
    pub memory: f64,
}

impl Cost {
    /// Of each number the lesser one.
    pub fn least(self, other: Self) -> Self {
        let Self { wall, cpu, memory } = other;
        Self { wall: self.wall.min(wall), cpu: self.cpu.min(cpu), memory: self.memory.min(memory) }
    }
}

/// What `work` costs this time.
pub fn once(work: impl FnOnce()) -> Cost {
    // Writing 5 there sets the peak to what is held now.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let (before, cpu, start) = (memory("VmRSS:"), cpu_seconds(), Instant::now());
    work();
    let wall = start.elapsed().as_secs_f64();
    Cost { wall, cpu: cpu_seconds() - cpu, memory: memory("VmHWM:") - before }
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    // Nanoseconds that each thread ran.
    let Ok(threads) = fs::read_dir("/proc/self/task") else { return 0.0 };
    let run = |task: fs::DirEntry| -> Option<f64> {
        fs::read_to_string(task.path().join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
    };
    threads.flatten().filter_map(run).sum::<f64>() * 1e-9
}

fn memory(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kilobytes| kilobytes.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}

/// The one in the middle.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}
