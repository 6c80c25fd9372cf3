//! Kills at random moments: nothing is lost, nothing is left over after the next run, and the bytes are those of a run that
//! was left alone. $PALETTIST_KILLS says how often each kind of work is killed; without it, a few times.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::runs::{ROOT, config, contents, ends, files, hidden, pictures, program};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How often each kind of work is killed.
fn kills() -> usize {
    std::env::var("PALETTIST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// Runs the program and kills it after `delay`; whether it was still running.
fn killed(folder: &Path, arguments: &[&str], delay: Duration) -> bool {
    let mut command = program(folder, arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + delay;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{arguments:?}: {status}");
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

/// Delays of the kills: anywhere within what the whole of it takes.
fn delays(whole: Duration, seed: u64) -> Vec<Duration> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..kills()).map(|_| whole.mul_f64(random.random::<f64>())).collect()
}

fn timed(folder: &Path, arguments: &[&str]) -> Duration {
    let begun = Instant::now();
    ends(folder, arguments, 0, "");
    begun.elapsed()
}

/// What a run makes, but for event files (which have times in them) and its checkpoints.
fn made(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let told = |path: &Path| path.to_string_lossy().contains("events.out") || path.starts_with("checkpoints");
    contents(run).into_iter().filter(|(path, _)| !told(path)).collect()
}

#[test]
fn training_that_is_killed_ends_with_the_same_bytes_and_leaves_nothing_over() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // One config for both, so that the recipe inside the checkpoint is the same.
    let config = config(whole.path());
    let arguments = ["train", config.to_str().unwrap(), "checkpoint.checkpointing_steps=1"];
    let took = timed(whole.path(), &arguments);
    let expected = made(&whole.path().join("run"));
    let run = broken.path().join("run");
    for (number, delay) in delays(took, 1).into_iter().enumerate() {
        killed(broken.path(), &arguments, delay);
        // Now and then to the end and from the beginning, with the cache empty.
        if number % 5 == 4 {
            ends(broken.path(), &arguments, 0, "");
            same(&made(&run), &expected);
            fs::remove_dir_all(broken.path()).unwrap();
            fs::create_dir(broken.path()).unwrap();
        }
    }
    ends(broken.path(), &arguments, 0, "");
    same(&made(&run), &expected);
    for folder in [run, broken.path().join("cache")] {
        assert_eq!(hidden(&folder), Vec::<PathBuf>::new());
    }
}

fn same(found: &[(PathBuf, Vec<u8>)], expected: &[(PathBuf, Vec<u8>)]) {
    let names = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for ((path, found), (_, expected)) in found.iter().zip(expected) {
        assert!(found == expected, "{} differs", path.display());
    }
}

/// A run that is made longer replaces its results at the new end; killed there it has the old ones or the new ones whole.
#[test]
fn a_run_that_is_killed_as_it_ends_keeps_a_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let quick = ["train.train_text_encoder=false", "sample.sample_every_n_steps=0", "distill.enabled=false"];
    let steps = |steps: usize| format!("train.max_train_steps={steps}");
    let short = steps(1);
    let start = [&["train", config.to_str().unwrap(), &short], &quick[..]].concat();
    let took = timed(folder.path(), &start);
    fs::write(folder.path().join("run/model/mine.txt"), "mine").unwrap();
    let mut last = 1;
    for (number, delay) in delays(took, 2).into_iter().enumerate() {
        last = number + 2;
        let longer = steps(last);
        let arguments = [&["train", config.to_str().unwrap(), &longer], &quick[..]].concat();
        killed(folder.path(), &arguments, delay.max(took / 2));
        ends(folder.path(), &arguments, 0, "");
        let run = folder.path().join("run");
        assert_eq!(hidden(&run), Vec::<PathBuf>::new());
        assert_eq!(fs::read_to_string(run.join("model/mine.txt")).unwrap(), "mine");
    }
    assert!(last > 1);
}

#[test]
fn an_export_that_is_killed_keeps_a_whole_package() {
    let folder = tempfile::tempdir().unwrap();
    let model = format!("{ROOT}/tests/fixtures/pipeline/model");
    let arguments = ["export", &model, "-o", "out", "--component", "unet,text_encoder", "--overwrite"];
    let took = timed(folder.path(), &arguments);
    let out = folder.path().join("out");
    let expected = contents(&out);
    for delay in delays(took, 3) {
        killed(folder.path(), &arguments, delay);
        // Whole, or put back by the next.
        let whole = contents(&out).into_iter().filter(|(path, _)| !path.starts_with("."));
        let there: Vec<_> = whole.filter(|(path, _)| expected.contains_key(path)).collect();
        assert!(there.iter().all(|(path, bytes)| expected[path] == *bytes), "{delay:?}");
        ends(folder.path(), &arguments, 0, "");
        assert_eq!(contents(&out), expected, "{delay:?}");
    }
}

#[test]
fn class_pictures_that_are_drawn_by_killed_runs_are_those_of_one_that_was_not() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pictures = pictures(whole.path()).display().to_string();
    let changes = [
        format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/pipeline/model"),
        format!("data.dreambooth.instance_data_dir={pictures}"),
        "data.dreambooth.class_data_dir=class".into(),
        "data.dreambooth.num_class_images=12".into(),
        "data.dreambooth.prior_sample_steps=4".into(),
        "data.resolution=32".into(),
        "train.max_train_steps=1".into(),
        "train.lr_warmup_steps=0".into(),
        "train.device=cpu".into(),
        "palettize.weight_threshold=100".into(),
        "export.coreml=false".into(),
    ];
    let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
    let mut arguments = vec!["train", config.as_str()];
    arguments.extend(changes.iter().map(String::as_str));
    let took = timed(whole.path(), &arguments);
    let class = |folder: &tempfile::TempDir| contents(&folder.path().join("class"));
    for delay in delays(took, 4) {
        killed(broken.path(), &arguments, delay);
        let drawn = broken.path().join("class");
        if drawn.is_dir() {
            let expected = class(&whole);
            let shown = |path: &PathBuf| !path.to_string_lossy().starts_with('.');
            for (path, bytes) in class(&broken).into_iter().filter(|(path, _)| shown(path)) {
                assert!(expected.get(&path) == Some(&bytes), "{} is not whole", path.display());
            }
        }
    }
    ends(broken.path(), &arguments, 0, "");
    assert_eq!(class(&broken), class(&whole));
    assert!(files(&broken.path().join("class")).len() >= 12);
    assert_eq!(hidden(&broken.path().join("runs")), Vec::<PathBuf>::new());
}
