//! `analyze` by the real program: what is measured, what is kept, the recipe that comes out, and who takes it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::copy_folder;
use common::runs::pictures;
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A folder with a config for the tiny model of the fixtures, which has weights that mean nothing.
struct Work {
    folder: tempfile::TempDir,
    model: String,
}

impl Work {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = format!("{ROOT}/tests/fixtures/pipeline/model");
        pictures(folder.path());
        let text = format!(
            "name = \"tiny\"\noutput_dir = \"run\"\n[model]\npretrained_model_name_or_path = \"{model}\"\n[data]\n\
             resolution = 32\ntrain_data_dir = \"pictures\"\n\
             validation_data_dir = \"{ROOT}/datasets/sketchbook/validation\"\ncache_dir = \"cache\"\n[train]\n\
             max_train_steps = 1\ntrain_batch_size = 3\ndevice = \"cpu\"\n[palettize]\nweight_threshold = 200\n\
             [validation]\nbatches = 2\n[sample]\nsample_every_n_steps = 0\n"
        );
        fs::write(folder.path().join("tiny.toml"), text).unwrap();
        Self { folder, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palettist"));
        // One thread each: the tests run side by side, and these networks are too small for more.
        command.env("OMP_NUM_THREADS", "1").env("RAYON_NUM_THREADS", "1");
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.program(arguments).output().unwrap()
    }

    /// Standard output and standard error of what must succeed.
    fn succeed(&self, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    /// Standard error of what must fail with `code`.
    fn fail(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains("error: ") && !error.contains("internal error"), "{error}");
        error
    }

    fn analyze<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        ["analyze", &self.model, "--config", "tiny.toml"].into_iter().chain(more.iter().copied()).collect()
    }

    /// The bits of each layer of the recipe `name`.
    fn recipe(&self, name: &str) -> BTreeMap<String, u32> {
        let table: toml::Table = fs::read_to_string(self.path(name)).unwrap().parse().unwrap();
        let layers = table["layers"].as_table().unwrap();
        layers.iter().map(|(name, bits)| (name.clone(), bits.as_integer().unwrap() as u32)).collect()
    }

    fn inspect(&self, file: &str) -> Value {
        serde_json::from_str(&self.succeed(&["inspect", "--json", file]).0).unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_recipe_keeps_its_budget_and_palettize_check_and_train_take_it() {
    let work = Work::new();
    let (out, _) = work.succeed(&work.analyze(&["-o", "mixed.toml", "--target-bits", "2.6", "--samples", "4"]));
    assert!(out.contains("over 4 noised pictures") && out.contains("wrote mixed.toml"), "{out}");
    let recipe = work.recipe("mixed.toml");
    assert!(recipe.len() > 10 && recipe.values().any(|&bits| bits != recipe["conv_in.weight"]), "{recipe:?}");

    let file = "mixed.palettes.safetensors";
    work.succeed(&["palettize", &work.model, "-o", file, "--recipe", "mixed.toml"]);
    let found = work.inspect(file);
    let average = found["palettized_bits"].as_f64().unwrap() / found["palettized_weights"].as_f64().unwrap();
    assert!(average <= 2.6 && average > 2.3, "{average}");
    let palettes: BTreeMap<String, u32> = found["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|t| {
            let bits = t["type"].as_str()?.strip_suffix("-bit palette")?.parse().ok()?;
            Some((t["name"].as_str()?.to_owned(), bits))
        })
        .collect();
    assert_eq!(palettes, recipe);

    let with = ["palettize.recipe=mixed.toml", "export.coreml=false"];
    let (out, _) = work.succeed(&["check", "tiny.toml", with[0], with[1]]);
    assert!(out.contains(&format!("{average:.3} bits a palettized weight, palettes counted")), "{out}");
    work.succeed(&["train", "tiny.toml", with[0], with[1]]);
    let trained = work.inspect("run/tiny.palettes.safetensors");
    for key in ["palettized_weights", "palettized_bits", "weights", "bits"] {
        assert_eq!(trained[key], found[key], "{key}");
    }
    // The run holds the recipe itself: it can be taken up without the file.
    fs::remove_file(work.path("mixed.toml")).unwrap();
    work.succeed(&["check", "run/config.resolved.toml"]);
}

/// One layer alone, made by `palettize` and measured by `evaluate`: the same loss.
#[test]
fn what_is_measured_is_what_evaluate_says() {
    let work = Work::new();
    let arguments = ["-o", "loss.toml", "--target-bits", "4", "--measure", "loss", "--bits", "1,4", "--json"];
    let found: Value = serde_json::from_str(&work.succeed(&work.analyze(&arguments)).0).unwrap();
    assert_eq!(found["samples"], 6, "the config's validation has two batches of three");
    let layer = found["layers"].as_array().unwrap().iter().find(|layer| layer["name"] == "conv_in.weight").unwrap();
    let [one, four] = [0, 1].map(|i| &layer["measured"][i]);
    assert_eq!((&one["bits"], &four["bits"]), (&Value::from(1), &Value::from(4)));
    assert!(one["mse"].as_f64() > four["mse"].as_f64(), "{layer}");

    fs::write(work.path("alone.toml"), "recipe_version = 1\n[layers]\nconv_in.weight = 1\n").unwrap();
    let file = "alone.palettes.safetensors";
    work.succeed(&["palettize", &work.model, "-o", file, "--recipe", "alone.toml"]);
    let (out, _) = work.succeed(&["evaluate", &work.model, "--config", "tiny.toml", "--palettes", file, "--json"]);
    let evaluated: Value = serde_json::from_str(&out).unwrap();
    let close = |a: &Value, b: &Value| {
        let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
        // A checkpoint holds all other weights in fp16.
        assert!((a / b - 1.0).abs() < 1e-3, "{a} is not {b}");
    };
    close(&found["float_loss"], &evaluated["float"]);
    close(&one["loss"], &evaluated["palettized"]);
    assert!((one["loss"].as_f64().unwrap() - found["float_loss"].as_f64().unwrap()).abs() > 1e-3, "a palette is felt");
}

#[test]
fn measurements_are_kept_and_only_used_where_they_belong() {
    let work = Work::new();
    let base = ["--bits", "1,4", "--samples", "3"];
    let with = |more: &[&'static str]| -> Vec<String> {
        let all = base.iter().chain(more).copied().collect::<Vec<_>>();
        work.analyze(&all).into_iter().map(str::to_owned).collect()
    };
    let run = |more: &[&'static str]| {
        let arguments = with(more);
        work.succeed(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(&["-o", "a.toml", "--target-bits", "3"]);
    let file = work.path("measurements.jsonl");
    let whole = fs::read_to_string(&file).unwrap();
    let rows = whole.lines().count();
    assert_eq!(rows, 2 * work.recipe("a.toml").len());

    // Another target, and a learning rate that measurements know nothing of: nothing is measured again.
    let (_, error) = run(&["-o", "b.toml", "--target-bits", "2", "train.learning_rate=1"]);
    assert!(error.contains(&format!("{rows} of {rows} measurements are in measurements.jsonl already")), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), whole);

    // A killed program leaves a line without its end: that one is measured again, and comes out the same.
    let cut = whole.trim_end().rfind('\n').unwrap() + 20;
    fs::write(&file, &whole[..cut]).unwrap();
    let (_, error) = run(&["-o", "c.toml", "--target-bits", "3"]);
    assert!(error.contains(&format!("{} of {rows} measurements", rows - 1)), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), whole);
    assert_eq!(work.recipe("c.toml"), work.recipe("a.toml"));

    // Other pictures, another size, another model: all is measured.
    let other = work.path("other");
    copy_folder(Path::new(&work.model), &other);
    let weights = other.join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    for (name, change) in [("d.toml", "validation.seed=5"), ("e.toml", "data.resolution=48")] {
        let (_, error) = run(&["-o", name, "--target-bits", "3", change]);
        assert!(!error.contains("already"), "{change}: {error}");
    }
    let other = ["analyze", "other", "--config", "tiny.toml", "-o", "f.toml", "--target-bits", "3"];
    let (_, error) = work.succeed(&other.into_iter().chain(base).collect::<Vec<_>>());
    assert!(!error.contains("already"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 4 * rows);

    fs::write(&file, format!("{whole}{{\"key\": 3}}\n{whole}")).unwrap();
    let arguments = with(&["-o", "g.toml", "--target-bits", "3"]);
    let error = work.fail(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), 1);
    assert!(error.contains(&format!("measurements.jsonl:{}: is not a measurement", rows + 1)), "{error}");
}

#[test]
fn what_the_user_keeps_is_kept() {
    let work = Work::new();
    let overrides =
        "palettize.overrides=[{match=\"conv_out.weight\", n_bits=8}, {match=\"time_embedding.*\", skip=true}]";
    let keep = ["--keep", "*.conv1.weight=6", "--keep", "mid_block.resnets.0.conv1.weight=16"];
    let more =
        [&["-o", "kept.toml", "--target-megabytes", "0.05", "--samples", "2", "--bits", "1,2,4", overrides], &keep[..]]
            .concat();
    let (out, _) = work.succeed(&work.analyze(&[&more[..], &["--json"]].concat()));
    let recipe = work.recipe("kept.toml");
    assert_eq!(recipe["conv_out.weight"], 8);
    assert_eq!(recipe["mid_block.resnets.0.conv1.weight"], 16);
    assert_eq!(recipe["mid_block.resnets.1.conv1.weight"], 6);
    assert_eq!(recipe["time_embedding.linear_1.weight"], 16);
    // A kept layer is measured at its bits only.
    let found: Value = serde_json::from_str(&out).unwrap();
    let layers = found["layers"].as_array().unwrap();
    let measured =
        |name: &str| layers.iter().find(|l| l["name"] == name).unwrap()["measured"].as_array().unwrap().len();
    assert_eq!((measured("conv_out.weight"), measured("conv_in.weight")), (1, 3));
    // The weights as `inspect` counts them are what was said and within the megabytes.
    work.succeed(&["palettize", &work.model, "-o", "kept.palettes.safetensors", "--recipe", "kept.toml"]);
    let bytes = work.inspect("kept.palettes.safetensors")["bits"].as_u64().unwrap() / 8;
    assert_eq!(found["bytes"].as_u64().unwrap(), bytes);
    assert!(bytes <= 50_000, "{bytes}");
}

#[test]
fn what_cannot_be_is_refused_before_any_work() {
    let work = Work::new();
    let refused = |more: &[&str], expected: &str| {
        let error = work.fail(&work.analyze(more), 2);
        assert!(error.contains(expected), "{more:?}: {error}");
        assert!(!work.path("x.toml").exists() && !work.path("measurements.jsonl").exists());
    };
    let target = ["-o", "x.toml", "--target-bits", "3"];
    let with = |more: &[&'static str]| [&target[..], more].concat();
    refused(&["-o", "x.toml"], "--target-bits");
    refused(&with(&["--target-megabytes", "3"]), "cannot be used with");
    refused(&["-o", "x.toml", "--target-bits", "0.9"], "the smallest palettes take 1.");
    refused(&["-o", "x.toml", "--target-bits", "NaN"], "is not a valid number");
    refused(&with(&["--keep", "conv_in.weight=5"]), "a palette has 1, 2, 3, 4, 6 or 8 bits (16: fp16)");
    refused(&["-o", "x.toml", "--target-megabytes", "0.001"], "the UNet takes 0.0");
    refused(&["-o", "x.json", "--target-bits", "3"], "x.json should end in .toml");
    refused(&["-o", "tiny.toml", "--target-bits", "3"], "tiny.toml exists already");
    refused(&with(&["--bits", "2, 5"]), "--bits 5: a palette has 1, 2, 3, 4, 6 or 8 bits");
    refused(&with(&["--bits", "3"]), "--bits 3: palettes of 3 bits need export.min_deployment_target=iOS18");
    refused(&with(&["--keep", "conv_in.weight"]), "is not of the form PATTERN=BITS");
    refused(&with(&["--keep", "conv_in.weight=five"]), "five is not a valid number of bits");
    refused(
        &with(&["--keep", "conv_inn.*=4"]),
        "--keep conv_inn.*: is not the weight of a convolution or linear layer",
    );
    refused(&with(&["palettize.weight_threshold=100000000"]), "no layer is large enough");
    fs::write(work.path("old.toml"), "recipe_version = 1\n[layers]\nconv_in.weight = 4\n").unwrap();
    refused(&with(&["palettize.recipe=old.toml"]), "the config takes its bits from palettize.recipe");
}

#[test]
fn a_recipe_of_another_model_is_refused_with_its_line() {
    let work = Work::new();
    fs::write(work.path("bad.toml"), "recipe_version = 1\n[layers]\nconv_in.weight = 4\n\"conv_inn.weight\" = 2\n")
        .unwrap();
    let expected = "bad.toml:4:1: `conv_inn.weight` is not the weight of a convolution or linear layer of this UNet; did you mean \
                    `conv_in.weight`?";
    let file = "x.palettes.safetensors";
    let errors = [
        work.fail(&["check", "tiny.toml", "palettize.recipe=bad.toml"], 2),
        work.fail(&["train", "tiny.toml", "palettize.recipe=bad.toml"], 2),
        work.fail(&["palettize", &work.model, "-o", file, "--recipe", "bad.toml"], 2),
    ];
    for error in errors {
        assert_eq!(error.matches(expected).count(), 1, "{error}");
        assert_eq!(error.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{error}");
    }
    fs::write(work.path("bad.toml"), "recipe_version = 1\n[layers]\nconv_in.weight = 16\n").unwrap();
    let error = work.fail(&["palettize", &work.model, "-o", file, "--recipe", "bad.toml"], 2);
    assert!(error.contains("nothing to palettize: bad.toml leaves every layer fp16"), "{error}");
    let both = work.fail(&["palettize", &work.model, "-o", file, "--recipe", "bad.toml", "--bits", "2"], 2);
    assert!(both.contains("cannot be used with"), "{both}");
    assert!(!work.path(file).exists());
}

/// Ctrl-C amid the measurements: code 130, what was measured is kept, the same command ends the work.
#[cfg(unix)]
#[test]
fn an_interrupted_analysis_goes_on() {
    let work = Work::new();
    let arguments = work.analyze(&[
        "-o",
        "mixed.toml",
        "--target-bits",
        "3",
        "--bits",
        "1,4",
        "--samples",
        "100",
        "train.train_batch_size=50",
    ]);
    let child = work.program(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let rows = || fs::read_to_string(work.path("measurements.jsonl")).map_or(0, |text| text.lines().count());
    let start = Instant::now();
    while rows() == 0 {
        assert!(start.elapsed() < Duration::from_secs(120), "nothing was measured");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(!work.path("mixed.toml").exists());
    let before = rows();
    assert!(before > 0);
    let (_, error) = work.succeed(&arguments);
    assert!(error.contains(&format!("{before} of ")), "{error}");
    assert_eq!(rows(), 2 * work.recipe("mixed.toml").len());
}

/// Palettes by importance are other palettes, with a larger plain error; a run is told how they were made.
#[test]
fn palettize_calibrates_on_the_pictures_of_a_config() {
    let work = Work::new();
    let with = |file: &str, more: &[&str]| {
        let arguments = ["palettize", &work.model, "-o", file, "--bits", "2", "--weight-threshold", "200"];
        work.succeed(&[&arguments[..], more].concat()).0
    };
    let calibrate = ["--calibrate", "tiny.toml", "--calibration-samples", "5"];
    let plain = with("plain.palettes.safetensors", &[]);
    let calibrated = with("calibrated.palettes.safetensors", &calibrate);
    let error = |out: &str| -> f64 {
        let (_, rest) = out.split_once("relative squared error ").unwrap();
        rest.split(',').next().unwrap().parse().unwrap()
    };
    assert!(error(&calibrated) > error(&plain), "{calibrated}{plain}");
    let recipe = &work.inspect("calibrated.palettes.safetensors")["metadata"]["recipe"];
    assert!(recipe.as_str().unwrap().contains("--calibrate tiny.toml --calibration-samples 5"), "{recipe}");
    // The same again, to the byte.
    with("again.palettes.safetensors", &calibrate);
    let read = |file: &str| fs::read(work.path(file)).unwrap();
    assert!(read("again.palettes.safetensors") == read("calibrated.palettes.safetensors"));

    let grouped = ["--granularity", "per_grouped_channel", "--group-size", "4"];
    let arguments = ["palettize", &work.model, "-o", "x.palettes.safetensors", "--bits", "2"];
    let error = work.fail(&[&arguments[..], &grouped, &calibrate].concat(), 2);
    assert!(error.contains("not with palettes for groups of channels"), "{error}");
}
