//! What a run tells while it runs: the bar, `logs/metrics.jsonl`, event files, `samples/`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::Tensor;

use super::run_folder::{LOGS, METRICS, SAMPLES};
use crate::config::{Config, Tracker};
use crate::report::{Metrics, TensorBoard, pictures};
use crate::terminal::Progress;

/// What a run does between steps.
pub const VALIDATING: &str = "validating";
pub const SAMPLING: &str = "sampling";
pub const SAVING: &str = "saving";

/// All of a run's reports.
pub struct Reporter {
    /// Steps of the stage before, which the bar counts too.
    before: u64,
    samples: PathBuf,
    every: u64,
    bar: Option<Progress>,
    metrics: Option<Metrics>,
    board: Option<TensorBoard>,
}

impl Reporter {
    /// Reports of a run in `folder` that has done `start` steps, and whether it logs any. The bar also counts the steps of
    /// the stages `before` and `after`.
    ///
    /// # Errors
    /// `logs/` can't be written.
    pub fn new(
        config: &Config,
        folder: &Path,
        start: u64,
        (before, after): (u64, u64),
        logs_any: bool,
    ) -> Result<Self> {
        let total = before + config.train.max_train_steps + after;
        let logs = folder.join(LOGS);
        let validates = config.data.validation_data_dir.is_some();
        let reports = |tracker| logs_any && config.logging.report_to.contains(&tracker);
        Ok(Self {
            before,
            samples: folder.join(SAMPLES),
            every: config.logging.log_every.max(1),
            bar: Some(
                Progress::new(if after > 0 { "personalizing" } else { "training" }, before + start, total)
                    .with(VALIDATING, if validates { config.validation.every_n_steps } else { 0 }, validates)
                    .with(SAMPLING, config.sample.sample_every_n_steps, false)
                    .with(SAVING, config.checkpoint.checkpointing_steps, true),
            ),
            metrics: reports(Tracker::Jsonl).then(|| Metrics::open(&logs.join(METRICS), start)).transpose()?,
            board: reports(Tracker::Tensorboard).then(|| TensorBoard::open(&logs, start)).transpose()?,
        })
    }

    /// Whether the step that ends at `done` is to be reported.
    pub fn due(&self, done: u64) -> bool {
        done.is_multiple_of(self.every)
    }

    /// One step more; only the bar is told.
    pub fn step(&mut self, done: u64, loss: f64) {
        if let Some(bar) = &mut self.bar {
            bar.update(self.before + done, &[("loss", loss)]);
        }
    }

    /// Numbers of the step that ended at `done`.
    ///
    /// # Errors
    /// The disk is full.
    pub fn scalars(&mut self, done: u64, values: &[(&str, f64)]) -> Result<()> {
        if let Some(metrics) = &mut self.metrics {
            metrics.write(done, values)?;
        }
        if let Some(board) = &mut self.board {
            for (name, value) in values {
                board.scalar(name, *value, done);
            }
            board.flush();
        }
        Ok(())
    }

    /// Pictures `[3, H, W]` in 0…1, as one sheet.
    ///
    /// # Errors
    /// The disk is full.
    pub fn pictures(&mut self, done: u64, tensors: &[Tensor]) -> Result<()> {
        if tensors.is_empty() {
            return Ok(());
        }
        let images = tensors.iter().map(pictures::from_tensor).collect::<Result<Vec<_>>>()?;
        let rows: Vec<Vec<_>> = images.chunks(8).map(<[_]>::to_vec).collect();
        let sheet = pictures::sheet(&rows, 4);
        pictures::write_png(&self.samples.join(format!("step-{done:06}.png")), &sheet)?;
        if let Some(board) = &mut self.board {
            board.picture("samples", &sheet, done);
        }
        Ok(())
    }

    /// Does work between steps, one of the three above, which is shown while it goes on.
    pub fn during<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        if let Some(bar) = &mut self.bar {
            bar.begin(what);
        }
        let done = work();
        if let Some(bar) = &mut self.bar {
            bar.end();
        }
        done
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.say(line),
            None => crate::terminal::tell(line),
        }
    }

    /// Says what was written where.
    pub fn wrote(&self, what: &str, path: &Path) {
        self.say(&format!("wrote {what}: {}", path.display()));
    }

    /// Ends the bar.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}
