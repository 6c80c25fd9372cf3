//! Training by the real program: kill and resume, DreamBooth on photographs, a full path to a verified package, and what
//! bad input gets.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::runs::{ROOT, config, files, pictures, program, run, succeed, text, wait_for};
use common::shared;
use palettist::files::TensorFile;
use palettist::palette::PalettizedCheckpoint;
use tch::Kind;

#[test]
fn a_run_killed_and_resumed_ends_with_the_same_bytes() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // One config for both, so that the recipe inside the checkpoint is the same.
    let config = config(whole.path());
    let config = config.to_str().unwrap();
    succeed(run(whole.path(), &["train", config]));

    // Killed as soon as the second checkpoint is there, and again, in the frozen phase. How a gradient is computed is no
    // part of what is: the second start is without checkpointing.
    for (step, checkpointing) in [("step-000004", true), ("step-000010", false)] {
        let change = format!("train.gradient_checkpointing={checkpointing}");
        let mut child = program(broken.path(), &["train", config, &change]).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, step, || broken.path().join("run/checkpoints").join(step).is_dir());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = run(broken.path(), &["train", config]);
    assert!(text(&output.stderr).contains("resuming from "), "{}", text(&output.stderr));
    succeed(output);

    for file in ["tiny.palettes.safetensors", "model/unet/diffusion_pytorch_model.safetensors", "report.html"] {
        let [a, b] = [&whole, &broken].map(|folder| fs::read(folder.path().join("run").join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    let metrics = fs::read_to_string(broken.path().join("run/logs/metrics.jsonl")).unwrap();
    let steps: Vec<u64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line.get("learning_rate").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>(), "each step is in metrics.jsonl once");
}

/// Trains palettes of another form, killed and resumed, packs and verifies them. The palettized checkpoint, and the tensors of
/// the last one to resume from.
fn trained_resumed_and_packed(form: &[&str]) -> (PalettizedCheckpoint, TensorFile) {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config(whole.path());
    let few = ["train.train_text_encoder=false", "sample.sample_every_n_steps=0"];
    let arguments = [&["train", config.to_str().unwrap()], form, &few].concat();
    succeed(run(whole.path(), &arguments));
    for step in ["step-000004", "step-000010"] {
        let mut child = program(broken.path(), &arguments).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, step, || broken.path().join("run/checkpoints").join(step).is_dir());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    succeed(run(broken.path(), &arguments));
    let file = "run/tiny.palettes.safetensors";
    let [a, b] = [&whole, &broken].map(|folder| fs::read(folder.path().join(file)).unwrap());
    assert!(a == b, "the resumed run differs");

    let package = fs::read_dir(whole.path().join("run/coreml")).unwrap().next().unwrap().unwrap().path();
    let [package, model] = [package, whole.path().join("run/model")].map(|path| path.to_str().unwrap().to_owned());
    succeed(run(whole.path(), &["verify", &package, "--against", &model, "--min-psnr", "50"]));
    let state = TensorFile::open(&whole.path().join("run/checkpoints/step-000012/state.safetensors")).unwrap();
    (PalettizedCheckpoint::read(&whole.path().join(file)).unwrap(), state)
}

/// Groups of channels, scales of channels and 8-bit entries are trained, resumed, exported for iOS 18 and verified.
#[test]
fn palettes_of_groups_and_scales_are_trained_and_packed() {
    let (checkpoint, _) = trained_resumed_and_packed(&[
        "palettize.granularity=per_grouped_channel",
        "palettize.group_size=8",
        "palettize.enable_per_channel_scale=true",
        "palettize.lut_dtype=i8",
    ]);
    let grouped = checkpoint.palettes.values().filter(|palette| palette.form.group_size == Some(8)).count();
    assert!(grouped > 0 && grouped == checkpoint.palettes.len(), "{grouped} of {}", checkpoint.palettes.len());
    assert!(checkpoint.palettes.values().all(|palette| palette.scales.len() == palette.shape[0] as usize));
}

/// So are palettes of master weights in bf16, whose moments and gradients are bf16 too; biases, norms and palettes are not.
#[test]
fn master_weights_may_be_bf16() {
    let (_, state) = trained_resumed_and_packed(&["train.mixed_precision=bf16", "train.full_bf16=true"]);
    let (mut brain, mut float) = (0, 0);
    for name in state.names() {
        let tensor = state.tensor(&name).unwrap();
        // What is kept of the master weights while assignments are fixed is as they are.
        let of_weight = ["value/", "exp_avg/", "exp_avg_sq/"].iter().any(|part| name.starts_with(part))
            || name.ends_with(".residual");
        if of_weight && tensor.dim() > 1 {
            assert_eq!(tensor.kind(), Kind::BFloat16, "{name}");
            brain += 1;
        } else {
            assert_ne!(tensor.kind(), Kind::BFloat16, "{name}");
            float += usize::from(of_weight);
        }
    }
    assert!(brain > 0 && float > 0, "{brain} and {float}");
}

/// So are palettes of vectors.
#[test]
fn palettes_of_vectors_are_trained_and_packed() {
    for form in [
        ["palettize.cluster_dim=2", "palettize.n_bits=4", "palettize.group_axis=1"],
        ["palettize.cluster_dim=4", "palettize.n_bits=8", "palettize.lut_dtype=i8"],
    ] {
        let (checkpoint, _) = trained_resumed_and_packed(&form);
        let vectors = checkpoint.palettes.values().filter(|palette| palette.form.cluster_dim > 1).count();
        assert!(vectors > 0 && vectors == checkpoint.palettes.len(), "{vectors} of {}", checkpoint.palettes.len());
    }
}

/// With assignments fixed from the first step, norms and biases move only where that is asked for.
#[test]
fn norms_and_biases_are_estimated_again_unless_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let trained = |reestimate: bool| {
        let arguments = [
            "train".to_owned(),
            config.display().to_string(),
            format!("palettize.reestimate_norms_and_biases={reestimate}"),
            format!("output_dir=run-{reestimate}"),
            "palettize.freeze_fraction=1.0".into(),
            "palettize.palette_learning_rate=1e-3".into(),
            "train.train_text_encoder=false".into(),
            "train.max_train_steps=3".into(),
            "sample.sample_every_n_steps=0".into(),
            "export.coreml=false".into(),
        ];
        succeed(run(folder.path(), &arguments.iter().map(String::as_str).collect::<Vec<_>>()));
        let file = format!("run-{reestimate}/tiny.palettes.safetensors");
        PalettizedCheckpoint::read(&folder.path().join(file)).unwrap()
    };
    let (with, without) = (trained(true), trained(false));
    let plain = folder.path().join("plain.palettes.safetensors");
    let model = format!("{ROOT}/tests/fixtures/pipeline/model");
    let arguments = ["palettize", &model, "-o", plain.to_str().unwrap(), "--bits", "2", "--weight-threshold", "100"];
    succeed(run(folder.path(), &arguments));
    let plain = PalettizedCheckpoint::read(&plain).unwrap();
    let moved = |trained: &PalettizedCheckpoint| {
        trained.dense.iter().filter(|(name, tensor)| !tensor.equal(&plain.dense[*name])).count()
    };
    assert_eq!(moved(&without), 0);
    assert!(moved(&with) > plain.dense.len() / 2, "{} of {}", moved(&with), plain.dense.len());
    // Palettes learn in both, and assignments stay those of the start.
    for trained in [&with, &without] {
        let same = |(name, palette): (&String, &palettist::palette::Palette)| {
            palette.indices == plain.palettes[name].indices && palette.entries != plain.palettes[name].entries
        };
        assert!(trained.palettes.iter().all(same));
    }
}

#[test]
fn the_package_of_a_run_is_the_network_that_was_trained() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    succeed(run(folder.path(), &["train", config.to_str().unwrap(), "palettize.n_bits=4"]));
    let package = fs::read_dir(folder.path().join("run/coreml")).unwrap().next().unwrap().unwrap().path();
    let model = folder.path().join("run/model");
    let palettes = folder.path().join("run/tiny.palettes.safetensors");
    let [package, model, palettes] = [&package, &model, &palettes].map(|path| path.to_str().unwrap());
    // The palettes, and the diffusers folder that holds their values, are the same network.
    succeed(run(folder.path(), &["verify", package, "--against", model, "--min-psnr", "50"]));
    succeed(run(folder.path(), &["verify", package, "--against", model, "--palettes", palettes, "--min-psnr", "50"]));
    // Another network is told apart.
    let other = format!("{ROOT}/tests/fixtures/pipeline/model");
    let output = run(folder.path(), &["verify", package, "--against", &other, "--min-psnr", "50"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("this package holds palettes"), "{}", text(&output.stderr));
    let told = succeed(run(
        folder.path(),
        &["evaluate", model, "--config", config.to_str().unwrap(), "--palettes", palettes, "--json"],
    ));
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["float"], told["palettized"], "{told}");
}

#[test]
fn dreambooth_on_photographs() {
    let Some(photographs) = shared("dreambooth") else { return };
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("class");
    fs::create_dir(&class).unwrap();
    for i in 0..3 {
        let name = format!("dog2_{i:02}.jpg");
        fs::copy(photographs.join("class_dog").join(&name), class.join(&name)).unwrap();
    }
    let overrides = [
        format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/pipeline/model"),
        format!("data.dreambooth.instance_data_dir={}", photographs.join("instance/dog").display()),
        format!("data.dreambooth.class_data_dir={}", class.display()),
        "data.dreambooth.num_class_images=5".into(),
        "data.dreambooth.prior_sample_steps=2".into(),
        "data.resolution=64".into(),
        "train.max_train_steps=20".into(),
        "train.device=cpu".into(),
        "palettize.weight_threshold=100".into(),
        "sample.sample_every_n_steps=10".into(),
        "sample.sample_steps=2".into(),
    ];
    let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
    let mut arguments = vec!["train", &config];
    arguments.extend(overrides.iter().map(String::as_str));
    succeed(run(folder.path(), &arguments));
    let output = folder.path().join("runs/sks-dog-2bit");
    for file in ["sks-dog-2bit.palettes.safetensors", "model/model_index.json", "coreml", "samples/step-000020.png"] {
        assert!(output.join(file).exists(), "no {file}");
    }
    // Two of the five class pictures were missing and are drawn; the photographs are as they were.
    assert_eq!(fs::read_dir(&class).unwrap().count(), 5);
}

/// Presses Ctrl-C; what the program then tells.
fn interrupt(child: Child) -> String {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    text(&output.stderr)
}

#[test]
fn ctrl_c_before_the_first_step_leaves_nothing_half_done() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let config = config.to_str().unwrap();
    // 2000 pictures at four times their size: more than a minute's work.
    let many = format!("data.train_data_dir={ROOT}/datasets/sketchbook/train");
    let arguments = ["train", config, &many, "data.resolution=512"];
    let mut child = program(folder.path(), &arguments).stderr(Stdio::piped()).spawn().unwrap();
    let cache = folder.path().join("cache");
    wait_for(&mut child, "cached latents", || cache.is_dir() && files(&cache).len() > 2);
    // Another run in the same folder is refused while this one goes on.
    let refused = run(folder.path(), &arguments);
    let expected = format!("another run (process {}) is writing to the output folder run", child.id());
    assert!(text(&refused.stderr).contains(&expected), "{}", text(&refused.stderr));
    assert_eq!(refused.status.code(), Some(1));

    let told = interrupt(child);
    assert!(told.contains("stopped; what was finished is kept"), "{told}");
    let cached = files(&cache);
    assert!(cached.len() < 1000, "{} pictures were encoded", cached.len());
    assert!(cached.iter().all(|path| path.extension().is_some_and(|e| e == "safetensors")), "{cached:?}");
    for path in &cached {
        palettist::files::TensorFile::open(path).unwrap();
    }
    // The folder is free again, and still this run's.
    succeed(run(folder.path(), &["train", config, "train.max_train_steps=1", "export.coreml=false"]));
}

/// Libtorch's threads sleep while they wait, and memory is kept, unless the user has a say in it.
#[cfg(target_os = "linux")]
#[test]
fn the_program_starts_in_an_environment_that_suits_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let ours = ["GOMP_SPINCOUNT=10000", "GLIBC_TUNABLES=glibc.malloc.mmap_max=0"];
    for (given, expected) in [
        (None, ours),
        (Some(("GOMP_SPINCOUNT", "5")), ["GOMP_SPINCOUNT=5", ours[1]]),
        (Some(("GLIBC_TUNABLES", "glibc.malloc.check=0")), [ours[0], "GLIBC_TUNABLES=glibc.malloc.check=0"]),
    ] {
        let mut command = program(folder.path(), &["train", config.to_str().unwrap()]);
        for variable in ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GLIBC_TUNABLES"] {
            command.env_remove(variable);
        }
        command.stderr(Stdio::null()).stdout(Stdio::null()).envs(given);
        let mut child = command.spawn().unwrap();
        let environment = format!("/proc/{}/environ", child.id());
        wait_for(&mut child, &format!("{expected:?}"), || {
            let text = fs::read(&environment).unwrap_or_default();
            let has = |start: &str| text.split(|&byte| byte == 0).any(|word| word.starts_with(start.as_bytes()));
            expected.iter().all(|start| has(start))
        });
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn ctrl_c_amid_a_class_picture_leaves_none() {
    let folder = tempfile::tempdir().unwrap();
    let overrides = [
        format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/pipeline/model"),
        format!("data.dreambooth.instance_data_dir={}", pictures(folder.path()).display()),
        "data.dreambooth.class_data_dir=class".into(),
        "data.dreambooth.prior_sample_steps=900".into(),
        "data.resolution=256".into(),
        "train.device=cpu".into(),
    ];
    let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
    let mut arguments = vec!["train", &config];
    arguments.extend(overrides.iter().map(String::as_str));
    let mut child = program(folder.path(), &arguments).stderr(Stdio::piped()).spawn().unwrap();
    let class = folder.path().join("class");
    wait_for(&mut child, "a folder for class pictures", || class.is_dir());
    std::thread::sleep(Duration::from_millis(300));
    interrupt(child);
    assert_eq!(files(&class), Vec::<PathBuf>::new());
}

#[test]
fn mistakes_get_one_line_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let config = config.to_str().unwrap();
    let refused = |arguments: &[&str], code: i32, expected: &str| {
        let output = run(folder.path(), arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{told}");
        assert!(told.contains(expected), "`{told}` does not say `{expected}`");
        let errors = told.lines().filter(|line| !line.starts_with("warning: ")).count();
        assert!(!told.contains("panicked") && errors <= 3, "{told}");
    };
    refused(&["train", config, "train.learning_rat=1"], 2, "learning_rate");

    fs::create_dir(folder.path().join("run")).unwrap();
    fs::write(folder.path().join("run/mine.txt"), "keep").unwrap();
    refused(&["train", config], 2, "is not a run of this program");
    assert_eq!(fs::read_to_string(folder.path().join("run/mine.txt")).unwrap(), "keep");
    fs::remove_dir_all(folder.path().join("run")).unwrap();

    succeed(run(folder.path(), &["train", config, "train.max_train_steps=2", "export.coreml=false"]));
    let palettes = folder.path().join("run/tiny.palettes.safetensors");
    let before = fs::read(&palettes).unwrap();
    refused(&["train", config, "train.max_train_steps=2", "train.seed=7"], 2, "seed");
    refused(&["train", config, "train.max_train_steps=2", "seed=7"], 2, "`seed` was 42 and is now 7");
    refused(&["train", config, "train.max_train_steps=2", "--resume", "never"], 2, "holds a run already");
    assert_eq!(fs::read(&palettes).unwrap(), before);
    // A longer run is the same run.
    succeed(run(folder.path(), &["train", config, "train.max_train_steps=3", "export.coreml=false"]));

    let picture = folder.path().join("pictures/0003.png");
    let bytes = fs::read(&picture).unwrap();
    fs::write(&picture, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["train", config, "output_dir=other"], 1, "0003.png");
    fs::remove_file(&picture).unwrap();
    refused(&["train", config, "output_dir=other2"], 1, "0003");
}

/// A command line that trains one step on the tiny model with DreamBooth.
fn drawing(folder: &Path, changes: &[&str]) -> Command {
    let mut overrides = vec![
        format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/pipeline/model"),
        format!("data.dreambooth.instance_data_dir={}", pictures(folder).display()),
        format!("output_dir=runs/{}", fs::read_dir(folder.join("runs")).map_or(0, Iterator::count)),
        "data.cache_dir=cache".into(),
    ];
    overrides.extend(
        [
            "data.dreambooth.class_data_dir=class",
            "data.dreambooth.num_class_images=3",
            "data.dreambooth.prior_sample_steps=1",
            "data.resolution=32",
            "train.max_train_steps=1",
            "train.device=cpu",
            "palettize.enabled=false",
            "sample.sample_every_n_steps=0",
            "export.coreml=false",
        ]
        .map(String::from),
    );
    overrides.extend(changes.iter().map(|change| (*change).to_owned()));
    let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
    let arguments: Vec<&str> = ["train", &config].into_iter().chain(overrides.iter().map(String::as_str)).collect();
    program(folder, &arguments)
}

/// Runs it: what is told, and the class pictures by name.
fn draw(folder: &Path, changes: &[&str]) -> (String, Vec<(String, Vec<u8>)>) {
    let output = drawing(folder, changes).output().unwrap();
    let told = text(&output.stderr);
    succeed(output);
    let class = folder.join("class");
    let entries = fs::read_dir(&class).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut found: Vec<_> = entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect();
    found.sort();
    (told, found)
}

#[test]
fn class_pictures_are_drawn_again_from_another_prompt_and_the_users_own_stay() {
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("class");
    fs::create_dir(&class).unwrap();
    let own = pictures(folder.path()).join("0004.png");
    fs::copy(&own, class.join("own.png")).unwrap();
    fs::remove_dir_all(folder.path().join("pictures")).unwrap();
    let (told, dogs) = draw(folder.path(), &[]);
    assert!(told.contains("the float model draws 2 more"), "{told}");
    let names = |set: &[(String, Vec<u8>)]| set.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&dogs), ["drawn-00000.png", "drawn-00001.png", "own.png"]);
    // Again: nothing is drawn.
    let (told, again) = draw(folder.path(), &[]);
    assert!(!told.contains("draws") && again == dogs, "{told}");
    // For a cat: both are drawn again, and the user's own is as it was.
    let cat = "data.dreambooth.class_prompt=a photo of cat";
    let (told, cats) = draw(folder.path(), &[cat]);
    assert!(
        told.contains("2 pictures drawn from something else (prompt \"a photo of dog\", now \"a photo of cat\")"),
        "{told}"
    );
    assert!(told.contains("the float model draws 2 more"), "{told}");
    assert_eq!(names(&cats), names(&dogs));
    assert!(cats[0] != dogs[0] && cats[1] != dogs[1] && cats[2] == dogs[2]);
    // The dogs come back as they were.
    let (told, back) = draw(folder.path(), &[]);
    assert!(told.contains("2 pictures that were drawn from the same before are taken back") && back == dogs, "{told}");
}

#[test]
fn class_pictures_of_a_run_that_was_killed_are_those_of_one_that_was_not() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let changes = [
        "data.dreambooth.prior_sample_steps=20",
        "data.dreambooth.num_class_images=6",
        "data.dreambooth.sample_batch_size=1",
    ];
    let (_, expected) = draw(whole.path(), &changes);
    assert_eq!(expected.len(), 6);
    let class = broken.path().join("class");
    for name in ["drawn-00001.png", "drawn-00004.png"] {
        let mut child = drawing(broken.path(), &changes).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, name, || class.join(name).is_file());
        child.kill().unwrap();
        child.wait().unwrap();
        // As a kill amid a write leaves it.
        fs::write(class.join(".drawn-00005.png.999-0.part"), "half").unwrap();
    }
    let (told, found) = draw(broken.path(), &changes);
    assert!(found == expected, "{told}");
}

#[test]
fn what_is_wrong_with_the_data_is_told_before_a_class_picture_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    fs::write(set.join("0009.png"), "<html>").unwrap();
    for (change, expected) in [
        ("train.max_train_steps=1", "0009.png: it is a web page"),
        ("data.dreambooth.instance_data_dir=no/such", "no/such does not exist"),
        ("data.validation_data_dir=no/such", "no/such does not exist"),
        ("data.dreambooth.class_data_dir=pictures/class", "lies in data.dreambooth.instance_data_dir"),
    ] {
        let overrides = [
            format!("model.pretrained_model_name_or_path={ROOT}/tests/fixtures/pipeline/model"),
            format!("data.dreambooth.instance_data_dir={}", set.display()),
            "data.dreambooth.class_data_dir=class".into(),
            "data.resolution=32".into(),
            "train.device=cpu".into(),
            change.into(),
        ];
        let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
        for command in ["check", "train"] {
            let mut arguments = vec![command, &config];
            arguments.extend(overrides.iter().map(String::as_str));
            let output = run(folder.path(), &arguments);
            let told = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{command} {change}: {told}");
            assert!(told.contains(expected), "{command} {change}: {told}");
        }
        assert!(!folder.path().join("class").exists() && !set.join("class").exists(), "{change}");
    }
}

#[test]
fn the_parts_of_the_loss_add_up_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let changes = [
        "data.dreambooth.prior_loss_weight=0.3",
        "distill.enabled=true",
        "distill.lambda_sd=0.8",
        "distill.lambda_kd_output=0.5",
        "distill.lambda_kd_feat=0.01",
        "logging.log_every=1",
        "train.gradient_accumulation_steps=1",
        // Palettes, so that student and teacher differ.
        "palettize.enabled=true",
        "palettize.weight_threshold=100",
    ];
    draw(folder.path(), &changes);
    let metrics = fs::read_to_string(folder.path().join("runs/0/logs/metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    let parts =
        ["loss/denoise", "loss/prior", "loss/distill", "loss/features"].map(|name| line[name].as_f64().unwrap());
    let (sum, loss) = (parts.iter().sum::<f64>(), line["loss"].as_f64().unwrap());
    assert!((sum / loss - 1.0).abs() < 1e-5, "{parts:?} make {sum}, not {loss}");
    assert!(parts.iter().all(|part| *part > 0.0), "{parts:?}");
}
