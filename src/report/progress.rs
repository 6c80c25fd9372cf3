//! The progress of a long piece of work, on standard error: a bar on a terminal, now and then a plain line elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line is written at most.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
/// Weight of the newest step in the moving average of a step's duration: about the last 20 count.
const NEWEST: f64 = 0.1;

/// One piece of work of a known number of steps.
pub struct Progress {
    what: String,
    unit: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    last_step: u64,
    last_time: Instant,
    seconds_per_step: Option<f64>,
    last_line: Option<Instant>,
}

impl Progress {
    /// `what` (`training`) has done `done` steps of `total`.
    pub fn new(what: &str, done: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
            let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(what.to_string());
            bar.set_position(done);
            bar
        });
        Self {
            what: what.to_string(),
            unit: "step",
            total,
            bar,
            last_step: done,
            last_time: Instant::now(),
            seconds_per_step: None,
            last_line: None,
        }
    }

    /// Counts something else than steps (`layer`).
    pub fn counting(self, unit: &'static str) -> Self {
        Self { unit, ..self }
    }

    /// `step` steps are done; `values` are shown beside (`("loss", 0.0812)`).
    pub fn update(&mut self, step: u64, values: &[(&str, f64)]) {
        let now = Instant::now();
        if step > self.last_step {
            let newest = (now - self.last_time).as_secs_f64() / (step - self.last_step) as f64;
            let average = self.seconds_per_step.map_or(newest, |old| old + NEWEST * (newest - old));
            self.seconds_per_step = Some(average);
        }
        (self.last_step, self.last_time) = (step, now);
        let line = describe(values, self.unit, self.seconds_per_step, self.total.saturating_sub(step));
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(line);
            }
            None if step >= self.total || self.last_line.is_none_or(|last| now - last >= PLAIN_EVERY) => {
                self.last_line = Some(now);
                // Standard error may be closed; that is no reason to stop working.
                let _ = writeln!(std::io::stderr(), "{} {step}/{}  {line}", self.what, self.total);
            }
            None => {}
        }
    }

    /// Time since the last [`Progress::update`] was spent on something else (sampling, saving) and does not count.
    pub fn skip_time(&mut self) {
        self.last_time = Instant::now();
    }

    /// Prints a line without disturbing the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::terminal::tell(line)),
            None => crate::terminal::tell(line),
        }
    }

    /// Leaves the bar where it is and ends its line.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// `loss 0.0812  lr 1.0e-6  1.52 s/step  17 min left`
fn describe(values: &[(&str, f64)], unit: &str, seconds_per_step: Option<f64>, left: u64) -> String {
    let mut parts: Vec<String> = values.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
    if let Some(seconds) = seconds_per_step {
        parts.push(if seconds >= 0.5 {
            format!("{seconds:.2} s/{unit}")
        } else {
            format!("{:.1} {unit}s/s", 1.0 / seconds)
        });
        if left > 0 {
            parts.push(format!("{} left", duration(seconds * left as f64)));
        }
    }
    parts.join("  ")
}

/// Four digits, or an exponent where those say nothing.
fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || (1e-3..1e4).contains(&size) { format!("{value:.4}") } else { format!("{value:.2e}") }
}

/// `45 s`, `17 min`, `3 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5999 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_well() {
        assert_eq!(
            describe(&[("loss", 0.08123), ("lr", 1e-6)], "step", Some(1.5), 680),
            "loss 0.0812  lr 1.00e-6  1.50 s/step  17 min left"
        );
        assert_eq!(describe(&[("loss", f64::NAN)], "step", Some(0.05), 0), "loss NaN  20.0 steps/s");
        assert_eq!([5.0, 3600.0, 11_100.0].map(duration), ["5 s", "60 min", "3 h 05 min"]);
    }

    #[test]
    fn skipped_time_does_not_slow_the_estimate() {
        let mut progress = Progress::new("test", 0, 100);
        progress.update(1, &[]);
        let before = progress.seconds_per_step.unwrap();
        std::thread::sleep(Duration::from_millis(300));
        progress.skip_time();
        progress.update(2, &[]);
        assert!(progress.seconds_per_step.unwrap() < before + 0.01);
    }
}
