//! Run folders by the real program: what is in one is known, nothing in it is lost, and it is a model like any other.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::copy_folder;
use common::runs::{QUICK, ROOT, Run, contents, ends, hidden, killed_after, program, succeed, text, wait_for};
use palettist::files::{TensorFile, write_safetensors};
use serde_json::Value;
use tch::Tensor;

#[test]
fn a_finished_run_says_so_and_writes_nothing() {
    let run = Run::new();
    let steps = ["train.max_train_steps=2"];
    let told = run.train(&steps);
    assert!(told.contains("palettist clean run"), "{told}");
    let before = contents(&run.out());
    let same = |changes: &[&str], expected: &str| {
        let told = ends(run.path(), &run.arguments("train", &[&steps[..], changes].concat()), 0, expected);
        assert_eq!(contents(&run.out()), before, "{told}");
    };
    same(&[], "run is finished (2 steps); nothing was written");
    // Nor does anything that changes no result.
    same(&["sample.prompts=[\"a dog\"]", "logging.log_every=7", "checkpoint.checkpointing_steps=1"], "is finished");
    let checked = succeed(common::runs::run(run.path(), &run.arguments("check", &steps)));
    assert!(checked.contains("run is finished (2 steps)"), "{checked}");
    run.refused(&["train.max_train_steps=1"], "is finished, with 2 steps, and max_train_steps is 1");
    run.refused(&["train.max_train_steps=2", "seed=7"], "`seed` was 42 and is now 7");

    // What would change what is learned is not taken up, and that is said.
    same(
        &["train.learning_rate=0.002"],
        "note: not used, because nothing is left to learn: learning_rate = 0.002 (was",
    );

    // What is gone is written again, and nothing else.
    fs::remove_dir_all(run.out().join("model/vae")).unwrap();
    fs::remove_file(run.out().join("tiny.palettes.safetensors")).unwrap();
    let report = fs::metadata(run.out().join("report.html")).unwrap().modified().unwrap();
    let told = run.train(&steps);
    assert!(told.contains("wrote the palettized checkpoint") && !told.contains("Core ML"), "{told}");
    assert_eq!(contents(&run.out()), before);
    assert_eq!(fs::metadata(run.out().join("report.html")).unwrap().modified().unwrap(), report);
    // A package that is to be another is made again.
    let told = run.train(&[&steps[..], &["export.min_deployment_target=iOS17"]].concat());
    assert!(told.contains("wrote the Core ML package") && !told.contains("palettized checkpoint"), "{told}");
}

#[test]
fn results_are_not_overwritten_when_checkpoints_are_gone() {
    let run = Run::new();
    let steps = ["train.max_train_steps=2", "export.coreml=false"];
    run.train(&steps);
    fs::remove_dir_all(run.out().join("checkpoints")).unwrap();
    let before = contents(&run.out());
    let told = run.train(&steps);
    assert!(told.contains("is finished"), "{told}");
    run.refused(&["train.max_train_steps=4", "export.coreml=false"], "its checkpoints are gone");
    assert_eq!(contents(&run.out()), before);
    // Without checkpoints nothing can be written again: that is said.
    fs::remove_file(run.out().join("tiny.palettes.safetensors")).unwrap();
    let told = run.train(&steps);
    assert!(told.contains("missing in it: tiny.palettes.safetensors"), "{told}");
    // As older versions left it.
    fs::remove_file(run.out().join("finished.json")).unwrap();
    assert!(run.train(&steps).contains("is finished"));
    run.refused(&[&steps[..], &["seed=7"]].concat(), "holds results (model, report.html) and no checkpoint");
    fs::remove_file(run.out().join("report.html")).unwrap();
    run.refused(&steps, "holds results (model) and no checkpoint");
    // Before any result a run starts again.
    fs::remove_dir_all(run.out().join("model")).unwrap();
    assert!(run.train(&steps).contains("starts from the beginning"));
    run.refused(&["name=\"other\"", "output_dir=run", "train.max_train_steps=1"], "max_train_steps is 1");
}

#[test]
fn clean_deletes_what_a_finished_run_no_longer_needs() {
    let run = Run::new();
    let steps = ["train.max_train_steps=2"];
    run.train(&steps);
    let leftover = run.out().join("logs/.metrics.jsonl.1-0.part");
    fs::write(&leftover, "half").unwrap();
    fs::write(run.out().join("checkpoints/mine.txt"), "mine").unwrap();
    let before = contents(&run.out());
    let told = succeed(common::runs::run(run.path(), &["clean", "run", "--dry-run"]));
    assert!(told.contains("run/checkpoints/step-000002  ") && told.contains("nothing was deleted"), "{told}");
    assert!(told.contains(".metrics.jsonl.1-0.part"), "{told}");
    assert_eq!(contents(&run.out()), before);
    let note = run.out().join("checkpoints/step-000002/note.txt");
    fs::write(&note, "mine").unwrap();
    ends(run.path(), &["clean", "run"], 1, "note.txt is not of the run");
    fs::remove_file(note).unwrap();
    // What killed processes left goes whole, whatever files it holds.
    let left_by_killed = [".step-000001.1-0.part/state.safetensors", ".step-000002.1-1.part/half.json"];
    let left_by_killed = left_by_killed.map(|name| run.out().join("checkpoints").join(name));
    let package = run.out().join("coreml/.tiny_unet.mlpackage.1-2.part/Data/weight.bin");
    for file in left_by_killed.iter().chain([&package]) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "half").unwrap();
    }
    let told = succeed(common::runs::run(run.path(), &["clean", "run"]));
    assert!(left_by_killed.iter().chain([&package]).all(|file| !file.parent().unwrap().exists()), "{told}");
    assert!(told.contains("step-000002") && told.contains("results stay"), "{told}");
    let left = contents(&run.out());
    let gone: Vec<_> =
        before.keys().filter(|path| !left.contains_key(*path)).map(|p| p.display().to_string()).collect();
    let expected = [
        "checkpoints/step-000002/state.json",
        "checkpoints/step-000002/state.safetensors",
        "logs/.metrics.jsonl.1-0.part",
    ];
    assert_eq!(gone, expected);
    assert!(left.iter().all(|(path, bytes)| before[path] == *bytes));
    assert_eq!(succeed(common::runs::run(run.path(), &["clean", "run"])).trim(), "nothing to delete");
    assert!(run.train(&steps).contains("is finished"));
    let drawn = ["generate", "run", "--prompt", "a cat", "-o", "cat.png", "--steps", "1", "--device", "cpu"];
    succeed(common::runs::run(run.path(), &drawn));
    assert!(run.path().join("cat.png").is_file());

    // A run whose palettes are gone, or another's, is not taken for its plain weights.
    let palettes = run.out().join("tiny.palettes.safetensors");
    let own = fs::read(&palettes).unwrap();
    fs::remove_file(&palettes).unwrap();
    ends(run.path(), &["export", "run", "-o", "out"], 1, "tiny.palettes.safetensors is missing");
    ends(run.path(), &drawn, 1, "tiny.palettes.safetensors is missing");
    fs::write(&palettes, &own[..own.len() - 1]).unwrap();
    ends(run.path(), &["export", "run", "-o", "out"], 1, "is not the file that this run wrote");
    fs::write(&palettes, own).unwrap();

    // Folders of others, and runs that go on, are left alone.
    let folder = run.path().to_str().unwrap();
    ends(run.path(), &["clean", folder], 2, "is not a run of palettist");
    ends(run.path(), &["clean", "nowhere"], 2, "does not exist");
    let unfinished = Run::new();
    killed_after(&unfinished, &[], "step-000002");
    let before = contents(&unfinished.out());
    let told = ends(unfinished.path(), &["clean", "run"], 1, "is not finished (step ");
    assert!(told.contains("nothing was deleted"), "{told}");
    assert_eq!(contents(&unfinished.out()), before);
}

#[test]
fn a_resumed_run_knows_its_data_and_model_by_content() {
    let run = Run::new();
    let fixture = PathBuf::from(format!("{ROOT}/tests/fixtures/pipeline/model"));
    killed_after(&run, &["checkpoint.checkpointing_steps=1"], "step-000002");
    let pictures = run.path().join("pictures");

    let cat = pictures.join("cat.png");
    fs::copy(pictures.join("0001.png"), &cat).unwrap();
    fs::write(pictures.join("cat.txt"), "a cat").unwrap();
    run.refused(&[], "1 picture was added: cat.png");
    fs::remove_file(cat).unwrap();
    fs::remove_file(pictures.join("cat.txt")).unwrap();
    let caption = fs::read(pictures.join("0002.txt")).unwrap();
    fs::write(pictures.join("0002.txt"), "something else").unwrap();
    run.refused(&[], "0002.png (\"a picture 2\" is now \"something else\")");
    fs::write(pictures.join("0002.txt"), caption).unwrap();

    // Another fine-tune of the same shape.
    let other = run.path().join("other");
    copy_folder(&fixture, &other);
    let weights = other.join("unet/diffusion_pytorch_model.safetensors");
    change_one(&weights, |_| 0.123);
    run.refused(&["model.pretrained_model_name_or_path=other"], "the model is another: its UNet changed");

    // Moved folders are the same, and so are paths that are written otherwise.
    fs::rename(&pictures, run.path().join("moved")).unwrap();
    let copy = run.path().join("copy");
    copy_folder(&fixture, &copy);
    fs::rename(run.out(), run.path().join("renamed")).unwrap();
    let changes = [
        "data.train_data_dir=./moved/../moved",
        "model.pretrained_model_name_or_path=copy",
        "output_dir=renamed",
        "train.max_train_steps=4",
        "train.learning_rate=0.0005",
        "validation.batches=2",
        "sample.sample_steps=3",
        "checkpoint.checkpoints_total_limit=3",
        "export.coreml=false",
    ];
    let told = run.train(&changes);
    let expected = "note: continuing with max_train_steps = 4 (was 12), learning_rate = 0.0005 (was 0.001)";
    assert!(told.contains(expected), "{told}");
}

/// Changes one weight of `conv_out.weight`.
fn change_one(path: &Path, change: impl Fn(f64) -> f64) {
    let file = TensorFile::open(path).unwrap();
    let tensors: Vec<(String, Tensor)> =
        file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect();
    let metadata = file.metadata();
    drop(file);
    let (_, tensor) = tensors.iter().find(|(name, _)| name == "conv_out.weight").unwrap();
    let mut one = tensor.get(0).get(0).get(0).get(0);
    let _ = one.fill_(change(one.double_value(&[])));
    write_safetensors(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None, &metadata).unwrap();
}

#[test]
fn a_resumed_run_names_each_key_that_may_not_change() {
    let run = Run::new();
    killed_after(&run, &["checkpoint.checkpointing_steps=1"], "step-000002");
    run.refused(&["train.min_snr_gamma=5.0"], "`train.min_snr_gamma` was not set and is now 5.0");
    run.refused(
        &["seed=7", "data.flip_aug=false"],
        "`seed` was 42 and is now 7; `data.flip_aug` was true and is now false",
    );
    run.refused(&["palettize.n_bits=4"], "`palettize.n_bits` was 2 and is now 4");
    run.refused(&["train.max_train_steps=1"], "and max_train_steps is 1");
}

#[test]
fn an_older_checkpoint_begins_a_new_branch() {
    let run = Run::new();
    let changes =
        ["train.max_train_steps=4", "checkpoint.checkpointing_steps=1", "checkpoint.checkpoints_total_limit=9"];
    run.train(&changes);
    let palettes = fs::read(run.out().join("tiny.palettes.safetensors")).unwrap();
    let metrics = fs::read(run.out().join("logs/metrics.jsonl")).unwrap();
    fn from<'a>(changes: &[&'a str], folder: &'a str) -> Vec<&'a str> {
        [changes, &["train.learning_rate=0.01", "--resume", folder]].concat()
    }
    let told =
        ends(run.path(), &run.arguments("train", &from(&changes, "run/checkpoints/step-000002")), 0, "set-aside-1");
    assert!(told.contains("(step 2 of 4)"), "{told}");
    let aside = run.out().join("checkpoints/set-aside-1");
    for name in ["step-000003", "step-000004"] {
        assert!(aside.join(name).join("state.json").is_file(), "{name}");
    }
    assert_eq!(fs::read(aside.join("tiny.palettes.safetensors")).unwrap(), palettes);
    assert_eq!(fs::read(aside.join("metrics.jsonl")).unwrap(), metrics);
    assert_ne!(fs::read(run.out().join("tiny.palettes.safetensors")).unwrap(), palettes);
    let steps: Vec<u64> = run.metrics().iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps.iter().filter(|step| **step == 3).count(), 1);
    // What was set aside is not returned to.
    let before = contents(&run.out());
    let told = run.train(&[&changes[..], &["train.learning_rate=0.01"]].concat());
    assert!(told.contains("is finished"), "{told}");
    assert_eq!(contents(&run.out()), before);

    for (folder, expected) in [
        ("nonsense", "--resume nonsense: does not exist"),
        ("pictures", "--resume pictures: is not a checkpoint"),
        ("run", "run/checkpoints/step-000004 is one"),
    ] {
        ends(run.path(), &run.arguments("train", &from(&changes, folder)), 2, expected);
    }
    assert_eq!(contents(&run.out()), before);
}

/// A longer run lets assignments learn again and fixes them at its new end; killed in between it ends with the same bytes.
#[test]
fn a_longer_run_thaws_and_freezes_again() {
    for form in [&[][..], &["palettize.lut_dtype=i8", "palettize.enable_per_channel_scale=true"]] {
        let (whole, broken) = (Run::new(), Run::new());
        // Soft up to 2 of 4 steps, then up to 4 of 8.
        let every = ["palettize.freeze_fraction=0.5", "checkpoint.checkpointing_steps=1", "export.coreml=false"];
        let short = [&every[..], form, &["train.max_train_steps=4"]].concat();
        let long = [&every[..], form, &["train.max_train_steps=10"]].concat();
        for run in [&whole, &broken] {
            // One config for both, so that the recipe inside the checkpoint is the same.
            ends(run.path(), &[&["train", whole.config.as_str()], &QUICK[..], &short].concat(), 0, "");
        }
        let palettes = |run: &Run| fs::read(run.out().join("tiny.palettes.safetensors")).unwrap();
        let before = palettes(&whole);
        let told = whole.train(&long);
        assert!(told.contains("learn again, up to step 5"), "{told}");
        let soft: Vec<u64> = whole
            .metrics()
            .iter()
            .filter(|line| line.get("temperature").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert_eq!(soft, [1, 2, 5]);
        assert_ne!(palettes(&whole), before);
        // Some weights have another entry than at the end of the short run.
        for step in ["step-000005", "step-000007"] {
            let arguments = [&["train", whole.config.as_str()], &QUICK[..], &long].concat();
            let mut child = program(broken.path(), &arguments).stderr(std::process::Stdio::null()).spawn().unwrap();
            wait_for(&mut child, step, || broken.out().join("checkpoints").join(step).is_dir());
            child.kill().unwrap();
            child.wait().unwrap();
        }
        ends(broken.path(), &[&["train", whole.config.as_str()], &QUICK[..], &long].concat(), 0, "");
        assert!(palettes(&whole) == palettes(&broken), "the resumed run differs");
        let report = |run: &Run| fs::read_to_string(run.out().join("report.html")).unwrap();
        assert_eq!(report(&whole), report(&broken));
    }
}

#[test]
fn the_parts_of_the_loss_are_means_over_all_of_a_step() {
    let run = Run::new();
    run.train(&["train.max_train_steps=2", "train.gradient_accumulation_steps=3", "export.coreml=false"]);
    let lines: Vec<Value> = run.metrics().into_iter().filter(|line| line.get("learning_rate").is_some()).collect();
    assert_eq!(lines.len(), 2);
    for line in lines {
        let [loss, part] = ["loss", "loss/denoise"].map(|name| line[name].as_f64().unwrap());
        assert!((loss - part).abs() < 1e-6 * loss, "{line}");
    }
}

/// 4 pictures a step, however many of them at a time.
#[test]
fn batches_and_accumulation_are_one_run() {
    let losses = |batch: usize| -> Vec<f64> {
        let run = Run::new();
        let sizes = [
            format!("train.train_batch_size={batch}"),
            format!("train.gradient_accumulation_steps={}", 4 / batch),
            "train.max_train_steps=3".into(),
            "validation.batches=1".into(),
            "export.coreml=false".into(),
        ];
        run.train(&sizes.each_ref().map(String::as_str));
        let losses = run.metrics().into_iter().filter(|line| line.get("learning_rate").is_some());
        losses.map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let (four, two, one) = (losses(4), losses(2), losses(1));
    assert!(four.len() == 3 && four[0] != four[1], "{four:?}");
    for ((four, two), one) in four.iter().zip(two).zip(one) {
        // fp32's, of sums in another order, three steps on.
        assert!((two / four - 1.0).abs() < 1e-4 && (one / four - 1.0).abs() < 1e-4, "{four} {two} {one}");
    }
}

#[test]
fn a_model_that_is_not_finite_is_refused_before_training() {
    let run = Run::new();
    let other = run.path().join("other");
    copy_folder(&PathBuf::from(format!("{ROOT}/tests/fixtures/pipeline/model")), &other);
    let weights = other.join("unet/diffusion_pytorch_model.safetensors");
    for (value, expected) in [(f64::NAN, "`conv_out.weight` holds values that are not finite"), (1e5, "beyond 65504")] {
        change_one(&weights, |_| value);
        for command in ["check", "train"] {
            let arguments = run.arguments(command, &["model.pretrained_model_name_or_path=other"]);
            // fp16 holds no 1e5: it is infinite there.
            let expected = if value.is_nan() { expected } else { "conv_out.weight" };
            ends(run.path(), &arguments, 1, expected);
        }
    }
    assert!(!run.out().join("checkpoints").exists());
    // Nor is anything measured with such a model.
    change_one(&weights, |_| f64::NAN);
    let expected = "the UNet's `conv_out.weight` holds values that are not finite";
    for arguments in [
        &["evaluate", "other", "--config", "tiny.toml"][..],
        &["analyze", "other", "--config", "tiny.toml", "-o", "bits.toml", "--target-bits", "4"],
        &["palettize", "other", "-o", "c.palettes.safetensors", "--bits", "2", "--calibrate", "tiny.toml"],
    ] {
        ends(run.path(), arguments, 1, expected);
    }
}

#[test]
fn training_that_runs_away_is_called_that_with_advice_that_is_true() {
    let run = Run::new();
    for change in ["train.learning_rate=1e10", "train.learning_rate=1e30"] {
        let told =
            ends(run.path(), &run.arguments("train", &[change, "train.max_grad_norm=0"]), 1, "the training diverged");
        assert!(told.contains("no checkpoint was saved before that"), "{told}");
        assert!(hidden(&run.out()).is_empty());
    }
    run.train(&["train.max_train_steps=4", "checkpoint.checkpointing_steps=2", "export.coreml=false"]);
    let arguments = run.arguments("train", &["train.learning_rate=1e10", "checkpoint.checkpointing_steps=2"]);
    let told =
        ends(run.path(), &arguments, 1, "the newest checkpoint, run/checkpoints/step-000004, is from before that");
    assert!(told.contains("learning_rate is 10000000000.0"), "{told}");
    // Which is so.
    run.train(&["train.max_train_steps=6", "export.coreml=false"]);
}

#[test]
fn a_run_is_a_model_wherever_one_is_asked_for() {
    let run = Run::new();
    let with_text = ["train.max_train_steps=2", "train.train_text_encoder=true", "train.text_encoder_lr=0.01"];
    run.train(&with_text);
    let packages = |folder: &str| {
        let mut names: Vec<String> = fs::read_dir(run.path().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let own = ["Stable_Diffusion_version_tiny_text_encoder.mlpackage", "Stable_Diffusion_version_tiny_unet.mlpackage"];
    assert_eq!(packages("run/coreml"), own);
    // The same packages, of the same bytes.
    succeed(common::runs::run(run.path(), &["export", "run", "-o", "out", "--component", "unet,text_encoder"]));
    assert_eq!(packages("out"), own);
    assert_eq!(contents(&run.path().join("out")), contents(&run.path().join("run/coreml")));
    for package in own {
        let package = format!("run/coreml/{package}");
        succeed(common::runs::run(run.path(), &["verify", &package, "--against", "run", "--min-psnr", "50"]));
    }
    let base = format!("{ROOT}/tests/fixtures/pipeline/model");
    let text_encoder = format!("run/coreml/{}", own[0]);
    let other = common::runs::run(run.path(), &["verify", &text_encoder, "--against", &base, "--min-psnr", "50"]);
    assert_eq!(other.status.code(), Some(1), "{}", text(&other.stdout));

    let evaluated = succeed(common::runs::run(run.path(), &["evaluate", "run", "--config", &run.config, "--json"]));
    let evaluated: Value = serde_json::from_str(&evaluated).unwrap();
    assert!(evaluated["palettized"].is_f64(), "{evaluated}");
    // As a base for another run, too.
    let more = ["model.pretrained_model_name_or_path=run", "output_dir=next", "train.max_train_steps=1"];
    let values = "the model of run holds the values of its palettes: training begins from these";
    ends(run.path(), &run.arguments("train", &more), 0, values);
    // And its model by itself, which says nothing of where it came from.
    let more = ["model.pretrained_model_name_or_path=run/model", "output_dir=more", "train.max_train_steps=1"];
    let values = "different values: they were quantized before (palettes, fp8), and training begins from these values";
    ends(run.path(), &run.arguments("train", &more), 0, values);
    let checked = succeed(common::runs::run(run.path(), &run.arguments("check", &more[..2])));
    assert!(checked.contains(values), "{checked}");
    let float = succeed(common::runs::run(run.path(), &run.arguments("check", &["output_dir=none"])));
    assert!(!float.contains("quantized before"), "{float}");

    let unfinished = Run::new();
    killed_after(&unfinished, &[], "step-000002");
    let drawn = ["generate", "run", "--prompt", "a cat", "-o", "cat.png"];
    ends(unfinished.path(), &drawn, 1, "is a run that is not finished (step ");
}

/// `[export]` says what `export` would be told, and both write the same bytes.
#[test]
fn a_run_ends_with_what_export_would_write() {
    let run = Run::new();
    let parts = ["unet", "text_encoder", "vae_decoder"];
    let components = format!("export.components={parts:?}");
    run.train(&[
        "train.max_train_steps=2",
        &components,
        "export.attention_implementation=SPLIT_EINSUM",
        "export.chunk_unet=true",
        "export.unet_batch_one=true",
        "export.unet_support_controlnet=true",
        "export.quantize_nbits=text_encoder=6,vae_decoder=8",
        "export.bundle_resources_for_swift_cli=true",
    ]);
    let flags = [
        "--attention-implementation=SPLIT_EINSUM",
        "--chunk-unet",
        "--unet-batch-one",
        "--unet-support-controlnet",
        "--quantize-nbits=text_encoder=6,vae_decoder=8",
        "--bundle-resources-for-swift-cli",
    ];
    let export = ["export", "run", "-o", "out", "--component", "unet,text_encoder,vae_decoder"];
    succeed(common::runs::run(run.path(), &[&export[..], &flags[..]].concat()));
    let written = contents(&run.path().join("out"));
    assert!(written.keys().any(|path| path.to_string_lossy().contains("control-unet_chunk2")), "{:?}", written.keys());
    assert!(written.keys().any(|path| path.ends_with("Resources/vocab.json")), "{:?}", written.keys());
    assert_eq!(written, contents(&run.path().join("run/coreml")));
    // A network that the model does not have is told before anything is trained.
    let more = ["output_dir=other", "export.components=[\"unet\",\"text_encoder_2\"]"];
    ends(run.path(), &run.arguments("train", &more), 2, "export.components names text_encoder_2, and ");
    assert!(!run.path().join("other/logs").exists());
}

#[test]
fn a_users_files_in_a_run_survive_a_longer_run() {
    let run = Run::new();
    let steps = ["train.max_train_steps=2", "export.coreml=false"];
    run.train(&steps);
    fs::write(run.out().join("model/mine.txt"), "mine").unwrap();
    fs::create_dir(run.out().join("model/unet/notes")).unwrap();
    fs::write(run.out().join("model/unet/notes/a.txt"), "a").unwrap();
    fs::write(run.out().join("model/model_index.json"), "{}").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("/nowhere/at/all", run.out().join("model/link")).unwrap();
    let told = run.train(&["train.max_train_steps=3", "export.coreml=false"]);
    #[cfg(unix)]
    assert!(run.out().join("model/link").is_symlink());
    assert!(told.contains("kept in run/model"), "{told}");
    let read = |name: &str| fs::read_to_string(run.out().join("model").join(name)).unwrap();
    assert_eq!([read("mine.txt"), read("unet/notes/a.txt"), read("model_index.json.changed")], ["mine", "a", "{}"]);
    assert!(read("model_index.json").contains("UNet2DConditionModel"));
    // However often it is made longer; by so little that nothing is to be learned but palettes.
    let told = run.train(&["train.max_train_steps=4", "export.coreml=false", "palettize.freeze_fraction=0.4"]);
    assert!(told.contains("of 4 steps assignments are fixed from step 2 on"), "{told}");
    assert_eq!([read("mine.txt"), read("unet/notes/a.txt"), read("model_index.json.changed")], ["mine", "a", "{}"]);
    assert!(hidden(&run.out()).is_empty());
}

/// A finished run that is called otherwise writes what is named after it once more; what has the old name is told of.
#[test]
fn a_run_under_another_name_tells_of_what_has_the_old_one() {
    let run = Run::new();
    run.train(&["train.max_train_steps=2"]);
    let named = "note: the run is called cat now (was tiny); what it wrote under the old name stays as it is in run: \
                 coreml/Stable_Diffusion_version_tiny_unet.mlpackage, tiny.palettes.safetensors";
    let checked =
        succeed(common::runs::run(run.path(), &run.arguments("check", &["train.max_train_steps=2", "name=cat"])));
    assert!(checked.contains(named), "{checked}");
    for steps in ["train.max_train_steps=2", "train.max_train_steps=3"] {
        let told = run.train(&[steps, "name=cat"]);
        assert!(told.contains(named) || steps.ends_with('3'), "{told}");
        assert!(
            run.out().join("cat.palettes.safetensors").is_file()
                && run.out().join("tiny.palettes.safetensors").is_file()
        );
    }
}

/// What somebody changed among a run's results is there after a longer run, under another name; what nobody changed is
/// replaced.
#[test]
fn results_that_were_changed_survive_a_longer_run() {
    let run = Run::new();
    run.train(&["train.max_train_steps=2"]);
    let package = run.out().join("coreml/Stable_Diffusion_version_tiny_unet.mlpackage");
    let weights = package.join("Data/com.apple.CoreML/weights/weight.bin");
    let report = run.out().join("report.html");
    let own = fs::read(&report).unwrap();
    fs::write(package.join("notes.txt"), "mine").unwrap();
    let changed = [&fs::read(&weights).unwrap()[..], b"more"].concat();
    fs::write(&weights, &changed).unwrap();
    fs::write(package.join(".DS_Store"), "of the system").unwrap();
    fs::write(run.out().join("tiny.palettes.safetensors"), "mine").unwrap();
    let told = run.train(&["train.max_train_steps=3"]);
    for name in ["coreml/Stable_Diffusion_version_tiny_unet.mlpackage", "tiny.palettes.safetensors"] {
        let note = format!("run/{name} was changed since the run wrote it; what was there is run/{name}.changed now");
        assert!(told.contains(&note), "{told}");
    }
    let kept = |inner: &str| fs::read(package.with_extension("mlpackage.changed").join(inner)).unwrap();
    assert_eq!(kept("notes.txt"), b"mine");
    assert_eq!(kept("Data/com.apple.CoreML/weights/weight.bin"), changed);
    assert_eq!(fs::read(run.out().join("tiny.palettes.safetensors.changed")).unwrap(), b"mine");
    assert!(!package.join("notes.txt").exists() && fs::read(&weights).unwrap() != changed);
    assert!(!run.out().join("report.html.changed").exists() && fs::read(&report).unwrap() != own);
    // Only what the system leaves, then nothing: nothing more is kept.
    fs::write(package.join(".DS_Store"), "of the system").unwrap();
    let told = run.train(&["train.max_train_steps=4"]);
    assert!(!told.contains("was changed since"), "{told}");
    // Ended and killed before it could say so: what is there is the run's own.
    let finished = run.out().join("finished.json");
    let before = fs::read(&finished).unwrap();
    run.train(&["train.max_train_steps=5"]);
    // Each end has an event file of its own in logs/.
    let results = || contents(&run.out()).into_iter().filter(|(path, _)| !path.starts_with("logs")).collect::<Vec<_>>();
    let whole = results();
    fs::write(&finished, before).unwrap();
    let told = run.train(&["train.max_train_steps=5"]);
    assert!(!told.contains("was changed since") && !told.contains("kept in"), "{told}");
    let now = results();
    let named = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(named(&now), named(&whole));
    assert!(now.iter().zip(&whole).all(|(now, whole)| now == whole));
}

/// What a run keeps on another disk, through a link, is not deleted.
#[test]
#[cfg(unix)]
fn clean_deletes_nothing_through_a_link() {
    use std::os::unix::fs::symlink;
    let run = Run::new();
    run.train(&["train.max_train_steps=2", "export.coreml=false"]);
    let (checkpoints, elsewhere) = (run.out().join("checkpoints"), run.path().join("elsewhere"));
    let refused = |link: &str| {
        let before = contents(&elsewhere);
        for arguments in [&["clean", "run"][..], &["clean", "run", "--dry-run"]] {
            let told = ends(run.path(), arguments, 1, &format!("{link} is a link, and what it leads to lies outside"));
            assert!(told.contains("nothing was deleted"), "{told}");
        }
        assert!(contents(&elsewhere) == before && !before.is_empty());
    };
    fs::rename(&checkpoints, &elsewhere).unwrap();
    symlink(&elsewhere, &checkpoints).unwrap();
    refused("run/checkpoints");
    // A run resumes from there all the same.
    run.train(&["train.max_train_steps=3", "export.coreml=false"]);
    fs::remove_file(&checkpoints).unwrap();
    fs::create_dir(&checkpoints).unwrap();
    symlink(elsewhere.join("step-000003"), checkpoints.join("step-000003")).unwrap();
    refused("run/checkpoints/step-000003");
    fs::remove_file(checkpoints.join("step-000003")).unwrap();
    symlink(&elsewhere, checkpoints.join("set-aside-1")).unwrap();
    refused("run/checkpoints/set-aside-1");
    fs::remove_file(checkpoints.join("set-aside-1")).unwrap();
    succeed(common::runs::run(run.path(), &["clean", "run"]));
}

#[test]
fn check_refuses_what_train_could_not_write() {
    let run = Run::new();
    fs::write(run.path().join("file"), "").unwrap();
    for (change, expected) in [
        ("output_dir=file", "is a file"),
        ("output_dir=file/run", "file is a file"),
        ("data.cache_dir=file/cache", "file is a file"),
        ("export.latent_h=5000", "1 to 4096"),
    ] {
        for command in ["check", "train"] {
            ends(run.path(), &run.arguments(command, &[change]), 2, expected);
        }
    }
    assert_eq!(hidden(run.path()), Vec::<PathBuf>::new());
}

/// One that is refused before it began leaves nothing behind, and nothing of what was there is removed.
#[test]
fn a_run_that_is_refused_leaves_no_folder() {
    let run = Run::new();
    fs::write(run.path().join("pictures/0000.png"), "not a picture").unwrap();
    let refused = |folder: &str| {
        let output = format!("output_dir={folder}");
        ends(run.path(), &run.arguments("train", &[&output]), 1, "cannot read the picture");
    };
    refused("new/below/run");
    assert!(!run.path().join("new").exists());
    fs::create_dir_all(run.path().join("mine/own")).unwrap();
    refused("mine/own/run");
    refused("mine/own");
    assert_eq!(fs::read_dir(run.path().join("mine/own")).unwrap().count(), 0);
}

/// Whoever measures pictures of one folder is told what `train` would say of them all.
#[test]
fn overlapping_folders_are_refused_by_evaluate_and_calibration() {
    let run = Run::new();
    let text = fs::read_to_string(run.path().join("tiny.toml")).unwrap();
    let validation = format!("{ROOT}/datasets/sketchbook/validation");
    let within = run.path().join("pictures/held-out");
    fs::create_dir_all(&within).unwrap();
    fs::copy(run.path().join("pictures/0000.png"), within.join("a.png")).unwrap();
    fs::write(within.join("a.txt"), "a picture").unwrap();
    fs::write(run.path().join("tiny.toml"), text.replace(&validation, &within.display().to_string())).unwrap();
    let model = format!("{ROOT}/tests/fixtures/pipeline/model");
    for arguments in [
        &["evaluate", &model, "--config", "tiny.toml"][..],
        &["analyze", &model, "--config", "tiny.toml", "-o", "bits.toml", "--target-bits", "4"],
        &["palettize", &model, "-o", "c.palettes.safetensors", "--bits", "2", "--calibrate", "tiny.toml"],
    ] {
        ends(run.path(), arguments, 1, "lies in data.train_data_dir");
    }
}

/// What learns is counted, the text encoder too: weights and two moments of four bytes each.
#[test]
fn check_counts_a_text_encoder_that_learns() {
    let run = Run::new();
    let told = |change: &str| {
        let told = succeed(common::runs::run(run.path(), &run.arguments("check", &[change])));
        let size =
            told.split("checkpoints of about ").nth(1).and_then(|rest| rest.split(" kB").next()).unwrap().to_owned();
        size.parse::<f64>().unwrap()
    };
    let more = told("train.train_text_encoder=true") - told("train.train_text_encoder=false");
    // 14 096 weights.
    assert!((more - 169.2).abs() < 0.2, "{more}");
}

/// What runs that were killed left half written goes when the next one begins.
#[test]
fn leftovers_of_killed_runs_go() {
    let run = Run::new();
    killed_after(&run, &[], "step-000002");
    let cache = run.path().join("cache");
    let some = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    for folder in [run.out().join("checkpoints/.step-000009.1-7.part"), run.out().join(".model.1-8.part")] {
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("state.safetensors"), "half").unwrap();
    }
    let place = [run.out().join(".tiny.palettes.safetensors.3-1.part"), some.join(".a.safetensors.3-1.part")];
    place.iter().for_each(|path| fs::write(path, "half").unwrap());
    // Somebody else's.
    fs::write(run.out().join(".nfs0001"), "").unwrap();
    run.train(&["export.coreml=false"]);
    assert_eq!(hidden(&run.out()), [run.out().join(".nfs0001")]);
    assert_eq!(hidden(&cache), Vec::<PathBuf>::new());
}

/// What a full disk gives, by a limit on the size of files.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_keeps_the_older_checkpoint() {
    let run = Run::new();
    let steps = ["train.max_train_steps=6", "checkpoint.checkpointing_steps=2"];
    killed_after(&run, &steps, "step-000002");
    let checkpoints = run.out().join("checkpoints");
    let newest = || palettist::train::state::list(&checkpoints).pop().unwrap();
    let (step, path) = newest();
    let before = contents(&path);
    // Blocks of 1024 bytes, half of what a checkpoint takes.
    let blocks = fs::metadata(path.join("state.safetensors")).unwrap().len() / 2048;
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let arguments = run.arguments("train", &steps);
    let program = env!("CARGO_BIN_EXE_palettist");
    let output = std::process::Command::new("bash")
        .args([&["-c", &script, program], &arguments[..]].concat())
        .current_dir(run.path())
        .output()
        .unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(&format!("step-{step:06} is whole: no space left for ")), "{told}");
    assert_eq!((newest(), contents(&path) == before), ((step, path), true));
    assert_eq!(hidden(&run.out()), Vec::<PathBuf>::new());
    run.train(&steps);
}

/// Ctrl-C while samples are drawn: they are drawn when the run goes on, and nothing is told twice.
#[test]
fn what_ctrl_c_cuts_short_is_done_when_the_run_goes_on() {
    let (whole, broken) = (Run::new(), Run::new());
    let changes = [
        "train.max_train_steps=3",
        "validation.every_n_steps=2",
        "sample.sample_every_n_steps=2",
        "sample.sample_steps=300",
        "export.coreml=false",
    ];
    let arguments = [&["train", whole.config.as_str()], &QUICK[..], &changes].concat();
    ends(whole.path(), &arguments, 0, "");
    let mut child = program(broken.path(), &arguments).stderr(std::process::Stdio::null()).spawn().unwrap();
    let metrics = broken.out().join("logs/metrics.jsonl");
    let validated = || fs::read_to_string(&metrics).is_ok_and(|text| text.contains("loss/validation"));
    wait_for(&mut child, "a validation loss", validated);
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!broken.out().join("samples/step-000002.png").exists());
    ends(broken.path(), &arguments, 0, "");
    for name in ["logs/metrics.jsonl", "report.html", "samples/step-000002.png", "tiny.palettes.safetensors"] {
        let [a, b] = [&whole, &broken].map(|run| fs::read(run.out().join(name)).unwrap());
        assert!(a == b, "{name} differs");
    }
}
