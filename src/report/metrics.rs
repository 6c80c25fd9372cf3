//! `metrics.jsonl`: one JSON object a line, each with its `step`, flushed line by line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::files::write_bytes;

/// The open file.
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens `path` for a run that has done `step` steps: 0 for a new one. Lines of later steps, which a killed run may
    /// have left, are cut off, and so is a half-written last line; the rest stays as it is.
    ///
    /// # Errors
    /// The system's, naming the file.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create the folder {}", folder.display()))?;
        }
        if let Ok(text) = std::fs::read(path) {
            let kept = up_to(&text, step);
            if kept.len() != text.len() {
                write_bytes(path, kept)?;
            }
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    /// Appends one line: `{"step": 10, …}`. A number that is not finite is written as the string `"NaN"`, `"inf"` or
    /// `"-inf"`, because JSON has none.
    ///
    /// # Errors
    /// The system's (a full disk), naming the file.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = format!("{{\"step\":{step}");
        for (name, value) in values {
            let number = serde_json::Number::from_f64(*value).map(Value::Number);
            let value = number.unwrap_or_else(|| value.to_string().into());
            line += &format!(",{}:{value}", Value::from(*name));
        }
        line += "}\n";
        // One write a line: a killed run leaves whole lines but for, at most, the last.
        self.file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// The leading lines that are whole, are JSON, and are of no step after `step`.
fn up_to(text: &[u8], step: u64) -> &[u8] {
    let mut end = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let parsed: Option<Value> = serde_json::from_slice(line).ok();
        let written = parsed.as_ref().and_then(|line| line.get("step")).and_then(Value::as_u64);
        if !line.ends_with(b"\n") || written.is_none_or(|written| written > step) {
            break;
        }
        end += line.len();
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_cuts_what_came_after_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            metrics.write(step, &[("loss", step as f64 / 100.0)]).unwrap();
        }
        metrics.file.write_all(b"{\"step\":40,\"lo").unwrap();
        drop(metrics);
        Metrics::open(&path, 20).unwrap().write(25, &[("loss", f64::NAN)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "{\"step\":10,\"loss\":0.1}\n{\"step\":20,\"loss\":0.2}\n{\"step\":25,\"loss\":\"NaN\"}\n";
        assert_eq!(text, expected);
    }
}
