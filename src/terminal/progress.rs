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
    between: Vec<Between>,
    /// Which of these is going on, and since when.
    now: Option<(usize, Instant)>,
}

/// Work between steps, which takes time of its own.
struct Between {
    what: &'static str,
    /// After so many steps; 0: never, but for the end.
    every: u64,
    /// Also after the last step.
    at_end: bool,
    /// What it takes, as measured.
    seconds: Option<f64>,
}

impl Between {
    /// How often it comes after `step` of `total` steps.
    fn left(&self, step: u64, total: u64) -> u64 {
        if step >= total {
            return 0;
        }
        let times = |to: u64| to.checked_div(self.every).unwrap_or(0);
        let last = self.at_end && (self.every == 0 || !total.is_multiple_of(self.every));
        times(total) - times(step) + u64::from(last)
    }
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
            between: Vec::new(),
            now: None,
        }
    }

    /// Reckons with work between steps: `what` (`sampling`), after each `every` steps (0: never) and, if `at_end`, after the
    /// last.
    pub fn with(mut self, what: &'static str, every: u64, at_end: bool) -> Self {
        self.between.push(Between { what, every, at_end, seconds: None });
        self
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
        let line = describe(values, self.unit, self.seconds_per_step, self.total.saturating_sub(step), self.rest());
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

    /// What is known of the work between steps that is still to come: its seconds, and what was not measured yet.
    fn rest(&self) -> (f64, Vec<&'static str>) {
        let left = |work: &Between| work.left(self.last_step, self.total);
        let seconds = self.between.iter().map(|work| left(work) as f64 * work.seconds.unwrap_or(0.0)).sum();
        let unknown = self.between.iter().filter(|work| work.seconds.is_none() && left(work) > 0);
        (seconds, unknown.map(|work| work.what).collect())
    }

    /// Work between steps begins, one of those of [`Progress::with`]: says so.
    pub fn begin(&mut self, what: &'static str) {
        let now = Instant::now();
        let Some(index) = self.between.iter().position(|work| work.what == what) else { return };
        self.now = Some((index, now));
        match &self.bar {
            Some(bar) => bar.set_message(what),
            // What takes no time is not worth a line each time.
            None if self.between[index].seconds.is_none_or(|seconds| seconds >= 1.0) => {
                self.last_line = Some(now);
                let _ = writeln!(std::io::stderr(), "{} {}/{}  {what}", self.what, self.last_step, self.total);
            }
            None => {}
        }
    }

    /// It ends. Its time does not count as that of a step.
    pub fn end(&mut self) {
        let now = Instant::now();
        if let Some((index, begun)) = self.now.take() {
            let (newest, known) = ((now - begun).as_secs_f64(), &mut self.between[index].seconds);
            *known = Some(known.map_or(newest, |old| (old + newest) / 2.0));
        }
        self.last_time = now;
    }

    /// Prints a line without disturbing the bar.
    pub fn say(&self, line: &str) {
        self.aside(|| super::tell(line));
    }

    /// Does what prints lines, without disturbing the bar.
    pub fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Leaves the bar where it is and ends its line.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// `loss 0.0812  lr 1.0e-6  1.52 s/step  17 min left`; `rest` is what comes between steps: its seconds, and what was not
/// measured yet.
fn describe(
    values: &[(&str, f64)],
    unit: &str,
    seconds_per_step: Option<f64>,
    left: u64,
    (rest, unknown): (f64, Vec<&str>),
) -> String {
    let mut parts: Vec<String> = values.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
    if let Some(seconds) = seconds_per_step {
        parts.push(if seconds >= 0.5 {
            format!("{seconds:.2} s/{unit}")
        } else {
            format!("{:.1} {unit}s/s", 1.0 / seconds)
        });
        if left > 0 {
            let without = match &unknown[..] {
                [] => String::new(),
                unknown => format!(", without {}", unknown.join(" and ")),
            };
            parts.push(format!("{} left{without}", duration(seconds * left as f64 + rest)));
        }
    }
    parts.join("  ")
}

/// Four digits, or an exponent where those say nothing.
fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || (1e-3..1e4).contains(&size) { format!("{value:.4}") } else { format!("{value:.2e}") }
}

/// A bar for bytes that are copied, which is there only while some are.
#[derive(Default)]
pub struct Copying(Option<Progress>);

impl Copying {
    /// `done` bytes of `total` are copied.
    pub fn hear(&mut self, done: u64, total: u64) {
        const MEGABYTE: u64 = 1_000_000;
        let begin = || Progress::new("copying weights", 0, total / MEGABYTE).counting("MB");
        self.0.get_or_insert_with(begin).update(done / MEGABYTE, &[]);
        if let Some(bar) = self.0.take_if(|_| done >= total) {
            bar.finish();
        }
    }
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
        let none = || (0.0, Vec::new());
        assert_eq!(
            describe(&[("loss", 0.08123), ("lr", 1e-6)], "step", Some(1.5), 680, none()),
            "loss 0.0812  lr 1.00e-6  1.50 s/step  17 min left"
        );
        assert_eq!(describe(&[("loss", f64::NAN)], "step", Some(0.05), 0, none()), "loss NaN  20.0 steps/s");
        assert_eq!(describe(&[], "step", Some(1.0), 60, (240.0, Vec::new())), "1.00 s/step  5 min left");
        let unknown = (0.0, vec!["validating", "sampling"]);
        assert_eq!(
            describe(&[], "step", Some(1.0), 60, unknown),
            "1.00 s/step  60 s left, without validating and sampling"
        );
        assert_eq!([5.0, 3600.0, 11_100.0].map(duration), ["5 s", "60 min", "3 h 05 min"]);
    }

    #[test]
    fn work_between_steps_counts_by_itself() {
        let mut progress = Progress::new("test", 0, 100).with("sampling", 30, false).with("saving", 0, true);
        progress.update(1, &[]);
        assert_eq!(progress.rest(), (0.0, vec!["sampling", "saving"]));
        let before = progress.seconds_per_step.unwrap();
        progress.begin("sampling");
        std::thread::sleep(Duration::from_millis(300));
        progress.end();
        progress.update(2, &[]);
        assert!(progress.seconds_per_step.unwrap() < before + 0.01);
        let (seconds, unknown) = progress.rest();
        // Three times more, after steps 30, 60 and 90.
        assert!(seconds >= 0.9 && unknown == ["saving"], "{seconds}");
        progress.update(90, &[]);
        assert_eq!(progress.rest().0, 0.0);
    }

    #[test]
    fn work_comes_as_often_as_the_loop_does_it() {
        let left = |every, at_end, step, total| Between { what: "", every, at_end, seconds: None }.left(step, total);
        assert_eq!([left(6, true, 0, 12), left(6, false, 0, 13), left(6, true, 0, 13)], [2, 2, 3]);
        assert_eq!([left(0, false, 3, 12), left(0, true, 3, 12), left(6, true, 12, 12)], [0, 1, 0]);
        assert_eq!([left(6, true, 6, 12), left(5, false, 9, 11)], [1, 1]);
    }
}
