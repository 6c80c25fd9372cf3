//! Runs by the real program: a small model, a config, what a folder holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

pub fn program(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
    // One thread each: the tests run side by side, and these networks are too small for more.
    command.env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1");
    command.args(arguments).current_dir(folder).stdin(Stdio::null());
    command
}

pub fn run(folder: &Path, arguments: &[&str]) -> Output {
    program(folder, arguments).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// A config for the tiny model of the fixtures on the project's own pictures; 12 steps, all kinds of state in use.
pub fn config(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.toml");
    let text = format!(
        r#"name = "tiny"
output_dir = "run"
[model]
pretrained_model_name_or_path = "{ROOT}/tests/fixtures/pipeline/model"
[data]
resolution = 32
train_data_dir = "{ROOT}/datasets/mascot-captioned"
validation_data_dir = "{ROOT}/datasets/sketchbook/validation"
caption_dropout_rate = 0.2
flip_aug = true
[train]
train_text_encoder = true
stop_text_encoder_training = 5
max_train_steps = 12
train_batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 1e-3
lr_scheduler = "cosine"
lr_warmup_steps = 2
device = "cpu"
[palettize]
n_bits = 2
weight_threshold = 100
freeze_fraction = 0.4
[distill]
enabled = true
[sample]
sample_every_n_steps = 6
prompts = ["a cat"]
sample_steps = 2
[checkpoint]
checkpointing_steps = 2
checkpoints_total_limit = 2
[logging]
log_every = 1
[validation]
every_n_steps = 6
batches = 1
"#
    )
    .replace(&format!("{ROOT}/datasets/mascot-captioned"), &pictures(folder).display().to_string());
    fs::write(&path, text).unwrap();
    path
}

/// Six of the project's pictures with sidecar captions.
pub fn pictures(folder: &Path) -> PathBuf {
    let target = bare_pictures(folder);
    for i in 0..6 {
        fs::write(target.join(format!("{i:04}.txt")), format!("a picture {i}")).unwrap();
    }
    target
}

/// The same pictures without captions.
pub fn bare_pictures(folder: &Path) -> PathBuf {
    let target = folder.join("pictures");
    fs::create_dir_all(&target).unwrap();
    for i in 0..6 {
        let name = format!("{i:04}.png");
        fs::copy(Path::new(ROOT).join("datasets/sketchbook/train").join(&name), target.join(&name)).unwrap();
    }
    target
}

/// Waits for `there`, while the program runs.
pub fn wait_for(child: &mut Child, what: &str, there: impl Fn() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before {what}");
        assert!(began.elapsed() < Duration::from_secs(120), "no {what} after two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All files below `folder`.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// All files below `folder` with their bytes, but for the lock, whose content is the process of the last run.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files(folder).into_iter().filter(|path| !path.ends_with("train.lock"));
    files.map(|path| (path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap())).collect()
}

/// What killed processes left below `folder`: names with a dot in front.
pub fn hidden(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with('.') {
            found.push(entry.path());
        } else if entry.path().is_dir() {
            found.extend(hidden(&entry.path()));
        }
    }
    found
}

/// Runs the program, which is to end with `code` and to say `expected` on standard error.
pub fn ends(folder: &Path, arguments: &[&str], code: i32, expected: &str) -> String {
    let output = run(folder, arguments);
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}{}", text(&output.stdout));
    assert!(told.contains(expected), "{arguments:?}: `{told}` does not say `{expected}`");
    assert!(!told.contains("panicked") && !told.contains("internal error"), "{told}");
    told
}

/// A run of few steps without what takes time.
pub const QUICK: [&str; 5] = [
    "train.train_text_encoder=false",
    "sample.sample_every_n_steps=0",
    "distill.enabled=false",
    "train.gradient_accumulation_steps=1",
    "validation.every_n_steps=0",
];

/// A folder with a config, its pictures and, in `run`, what it makes.
pub struct Run {
    pub folder: tempfile::TempDir,
    pub config: String,
}

impl Run {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path()).to_str().unwrap().to_owned();
        Self { folder, config }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn out(&self) -> PathBuf {
        self.path().join("run")
    }

    pub fn arguments<'a>(&'a self, command: &'a str, changes: &[&'a str]) -> Vec<&'a str> {
        [&[command, self.config.as_str()], &QUICK[..], changes].concat()
    }

    /// Trains; what is said on standard error.
    pub fn train(&self, changes: &[&str]) -> String {
        ends(self.path(), &self.arguments("train", changes), 0, "")
    }

    /// Both `check` and `train` refuse this, in these words, and nothing changes.
    pub fn refused(&self, changes: &[&str], expected: &str) {
        // Of what a run that was killed left half written nothing is to be kept.
        let shown = |path: &Path| path.iter().all(|part| !part.to_string_lossy().starts_with('.'));
        let found = || contents(&self.out()).into_iter().filter(|(path, _)| shown(path)).collect::<Vec<_>>();
        let before = found();
        for command in ["check", "train"] {
            ends(self.path(), &self.arguments(command, changes), 2, expected);
        }
        assert!(found() == before, "{changes:?}");
    }

    pub fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.out().join("logs/metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Trains and kills the run once this checkpoint is there.
pub fn killed_after(run: &Run, changes: &[&str], checkpoint: &str) {
    let mut child = program(run.path(), &run.arguments("train", changes)).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&mut child, checkpoint, || run.out().join("checkpoints").join(checkpoint).is_dir());
    child.kill().unwrap();
    child.wait().unwrap();
}
