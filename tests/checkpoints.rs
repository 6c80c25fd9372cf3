//! Checkpoints by the real program: damaged ones, copies, those of other folders, and what they lead to.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::copy_folder;
use common::runs::{ROOT, Run, contents, ends, killed_after, program, wait_for};
use palettist::train::run_folder::{Holds, RunFolder};

const FOUR: [&str; 4] = [
    "train.max_train_steps=4",
    "checkpoint.checkpointing_steps=1",
    "checkpoint.checkpoints_total_limit=9",
    "export.coreml=false",
];

/// FOUR, and more.
fn four<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&FOUR[..], more].concat()
}

fn step(run: &Run, step: u64) -> PathBuf {
    run.out().join(format!("checkpoints/step-{step:06}"))
}

#[test]
fn a_damaged_checkpoint_is_not_resumed_from() {
    let run = Run::new();
    run.train(&FOUR);
    fs::remove_file(run.out().join("finished.json")).unwrap();
    let tensors = step(&run, 4).join("state.safetensors");
    let whole = fs::read(&tensors).unwrap();
    let refused = |expected: &str| {
        let before = contents(&run.out());
        for command in ["check", "train"] {
            let told = ends(run.path(), &run.arguments(command, &four(&["train.max_train_steps=5"])), 1, expected);
            assert!(told.contains("delete that folder to resume from the checkpoint before it"), "{told}");
            assert!(!told.contains("fetch it again"), "{told}");
        }
        assert!(contents(&run.out()) == before);
    };
    // As a power cut leaves it: the size is right, the end was never written.
    let mut zeros = whole.clone();
    zeros[whole.len() / 2..].fill(0);
    fs::write(&tensors, &zeros).unwrap();
    refused("step-000004 is damaged: state.safetensors is not as it was written");
    // One bit of one weight.
    let mut flipped = whole.clone();
    flipped[whole.len() - 3] ^= 4;
    fs::write(&tensors, &flipped).unwrap();
    refused("state.safetensors is not as it was written");
    fs::write(&tensors, &whole[..whole.len() / 2]).unwrap();
    refused("state.safetensors is not as it was written");
    fs::write(&tensors, &whole).unwrap();
    let facts = step(&run, 4).join("state.json");
    let text = fs::read(&facts).unwrap();
    fs::write(&facts, &text[..text.len() / 2]).unwrap();
    refused("step-000004 is damaged: state.json is not as it was written");
    fs::remove_dir_all(step(&run, 4)).unwrap();
    let told = run.train(&four(&["train.max_train_steps=5"]));
    assert!(told.contains("step-000003 (step 3 of 5)"), "{told}");
}

#[test]
fn a_checkpoint_under_another_steps_name_is_refused() {
    let run = Run::new();
    run.train(&FOUR);
    copy_folder(&step(&run, 2), &step(&run, 9));
    let expected = "step-000009 is a checkpoint of step 2 under another step's name; move it out of checkpoints/";
    run.refused(&four(&["train.max_train_steps=6"]), expected);
    // Others know that the run stands at step 4.
    let Holds::Run(found) = RunFolder::of(&run.out()).unwrap() else { panic!("no run") };
    assert_eq!(found.step(), 4);
    assert_eq!(found.checkpoints.len(), 4);
    ends(run.path(), &["clean", "run"], 0, "");
    assert!(step(&run, 9).join("state.json").is_file(), "the copy is the user's");
    assert!(!step(&run, 4).exists());
}

#[test]
fn a_checkpoint_from_elsewhere_is_the_runs_before_its_first_save() {
    let run = Run::new();
    run.train(&FOUR);
    let elsewhere = run.path().join("kept");
    fs::rename(step(&run, 3), &elsewhere).unwrap();
    let long = four(&["train.max_train_steps=3000", "checkpoint.checkpointing_steps=1000"]);
    let begins = |changes: &[&str], out: &Path| {
        let arguments = run.arguments("train", &[&long[..], changes].concat());
        let mut child = program(run.path(), &arguments).stderr(std::process::Stdio::null()).spawn().unwrap();
        let metrics = || fs::read_to_string(out.join("logs/metrics.jsonl")).unwrap_or_default();
        wait_for(&mut child, "step 5", || metrics().contains("{\"step\":5,"));
        child.kill().unwrap();
        child.wait().unwrap();
        let Holds::Run(found) = RunFolder::of(out).unwrap() else { panic!("no run in {}", out.display()) };
        let steps: Vec<u64> = found.checkpoints.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [3]);
    };
    begins(&["--resume", "kept"], &run.out());
    // Nor is it forgotten in a folder of its own; its curve comes with it where that is known.
    let other = run.path().join("other");
    begins(&["--resume", "run/checkpoints/step-000003", "output_dir=other"], &other);
    let told = run.train(&four(&["train.max_train_steps=5", "output_dir=other"]));
    assert!(told.contains("other/checkpoints/step-000003 (step 3 of 5)"), "{told}");
    let metrics = fs::read_to_string(other.join("logs/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().filter(|line| line.contains("loss/denoise")).count(), 5, "{metrics}");
}

#[test]
fn a_branch_that_is_returned_to_has_its_own_curve() {
    let run = Run::new();
    run.train(&FOUR);
    let first = fs::read_to_string(run.out().join("logs/metrics.jsonl")).unwrap();
    run.train(&four(&["train.learning_rate=0.01", "--resume", "run/checkpoints/step-000001"]));
    run.train(&four(&["--resume", "run/checkpoints/set-aside-1/step-000004"]));
    assert_eq!(fs::read_to_string(run.out().join("logs/metrics.jsonl")).unwrap(), first);
    let Holds::Run(found) = RunFolder::of(&run.out()).unwrap() else { panic!("no run") };
    assert_eq!(found.checkpoints.len(), 1);
}

#[test]
fn a_run_that_goes_on_under_another_name_keeps_its_palettes() {
    let run = Run::new();
    run.train(&FOUR);
    killed_after(&run, &four(&["name=cat", "train.max_train_steps=3000"]), "step-000005");
    let Holds::Run(found) = RunFolder::of(&run.out()).unwrap() else { panic!("no run") };
    assert_eq!(found.name(), "cat");
    assert_eq!(found.palettes().unwrap().unwrap(), run.out().join("tiny.palettes.safetensors"));
    fs::remove_file(run.out().join("tiny.palettes.safetensors")).unwrap();
    ends(
        run.path(),
        &["export", "run", "-o", "out"],
        1,
        "tiny.palettes.safetensors is missing, the palettes of this run",
    );
}

#[test]
fn what_a_user_put_into_a_run_survives() {
    let run = Run::new();
    let note = step(&run, 1).join("note.txt");
    run.train(&four(&["train.max_train_steps=1"]));
    fs::write(&note, "the best one").unwrap();
    // The model on another disk, by a link.
    let disk = run.path().join("disk");
    fs::rename(run.out().join("model"), &disk).unwrap();
    std::os::unix::fs::symlink(&disk, run.out().join("model")).unwrap();
    let weights = disk.join("unet/diffusion_pytorch_model.safetensors");
    let before = fs::read(&weights).unwrap();
    run.train(&[
        "train.max_train_steps=4",
        "checkpoint.checkpointing_steps=1",
        "checkpoint.checkpoints_total_limit=2",
        "export.coreml=false",
    ]);
    assert_eq!(fs::read_to_string(&note).unwrap(), "the best one");
    assert!(!step(&run, 2).exists());
    assert!(run.out().join("model").is_symlink(), "the link stays");
    assert_ne!(fs::read(&weights).unwrap(), before, "and leads to the new model");
}

#[test]
fn check_tells_of_a_run_that_is_writing_and_a_listing_does_not_mind() {
    let run = Run::new();
    run.train(&FOUR);
    let held = palettist::train::run_folder::lock(&run.out()).unwrap();
    for command in ["check", "train"] {
        ends(
            run.path(),
            &run.arguments(command, &four(&["train.max_train_steps=5"])),
            1,
            "is writing to the output folder",
        );
    }
    ends(run.path(), &["clean", "run", "--dry-run"], 0, "");
    ends(run.path(), &["clean", "run"], 1, "is writing to the output folder");
    drop(held);
    let told = ends(run.path(), &run.arguments("check", &four(&["train.max_train_steps=5"])), 0, "");
    assert!(!told.contains("is writing"), "{told}");
}

/// Palettes know which text encoders their UNet goes with.
#[test]
fn palettes_on_a_model_with_other_text_encoders_are_told() {
    let run = Run::new();
    run.train(&four(&["train.train_text_encoder=true", "train.text_encoder_lr=0.01", "distill.enabled=false"]));
    let model = format!("{ROOT}/tests/fixtures/pipeline/model");
    let palettes = run.out().join("tiny.palettes.safetensors");
    let draw = |model: &str, more: &[&str]| {
        let arguments = [&["generate", model, "--prompt", "a", "-o", "a.png", "--steps", "2"], more].concat();
        ends(run.path(), &arguments, 0, "")
    };
    let warned = "this UNet goes with other text encoders than those of";
    let given = ["--palettes", palettes.to_str().unwrap()];
    assert!(draw(&model, &given).contains(warned));
    for told in [draw("run", &[]), draw("run", &given), draw("run/model", &given)] {
        assert!(!told.contains(warned), "{told}");
    }
    let told = draw(&model, &[&given[..], &["--prediction-type", "v_prediction"]].concat());
    assert!(told.contains("this UNet predicts epsilon, and"), "{told}");
    // One that learned alone goes with the base.
    let run = Run::new();
    run.train(&FOUR);
    let palettes = run.out().join("tiny.palettes.safetensors");
    let arguments = ["generate", &model, "--prompt", "a", "-o", "a.png", "--steps", "2", "--palettes"];
    let told = ends(run.path(), &[&arguments[..], &[palettes.to_str().unwrap()]].concat(), 0, "");
    assert!(!told.contains("warning"), "{told}");
}

#[test]
fn results_that_are_damaged_are_told_and_can_be_written_again() {
    let run = Run::new();
    let four = ["train.max_train_steps=4", "checkpoint.checkpointing_steps=1"];
    run.train(&four);
    let palettes = run.out().join("tiny.palettes.safetensors");
    let whole = fs::read(&palettes).unwrap();
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(&palettes, &longer).unwrap();
    let expected = "run/tiny.palettes.safetensors is not as the run wrote it: it was changed, or is damaged; delete it";
    for command in ["check", "train"] {
        let output = program(run.path(), &run.arguments(command, &four)).output().unwrap();
        let told = format!("{}{}", common::runs::text(&output.stdout), common::runs::text(&output.stderr));
        assert!(told.contains(expected), "{command}: {told}");
    }
    ends(run.path(), &["export", "run", "-o", "out"], 1, "delete it and run `palettist train` with its config");
    fs::remove_file(&palettes).unwrap();
    run.train(&four);
    assert_eq!(fs::read(&palettes).unwrap(), whole);

    // A package that a copy left incomplete does not stop a longer run.
    let package = fs::read_dir(run.out().join("coreml")).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(package.join("Manifest.json")).unwrap();
    let finished = fs::read(run.out().join("finished.json")).unwrap();
    let told = run.train(&["train.max_train_steps=5", "checkpoint.checkpointing_steps=1"]);
    assert!(told.contains("was changed since the run wrote it"), "{told}");
    assert!(package.join("Manifest.json").is_file());

    // As a run leaves it that was killed while it wrote its results.
    fs::write(run.out().join("finished.json"), finished).unwrap();
    let arguments = ["generate", "run", "--prompt", "a", "-o", "a.png", "--steps", "2"];
    let told = ends(run.path(), &arguments, 1, "a longer run was writing its results and was cut off");
    assert!(!told.contains("are those of step 4"), "{told}");
    run.train(&["train.max_train_steps=5", "checkpoint.checkpointing_steps=1"]);
    ends(run.path(), &arguments, 0, "");
}

#[test]
fn an_unfinished_run_that_was_moved_is_ended_where_it_is() {
    let run = Run::new();
    killed_after(&run, &four(&["train.max_train_steps=3000"]), "step-000002");
    fs::create_dir(run.path().join("sub")).unwrap();
    fs::rename(run.out(), run.path().join("sub/run")).unwrap();
    let told =
        ends(run.path(), &["clean", "sub/run"], 1, "palettist train sub/run/config.resolved.toml output_dir=sub/run ");
    assert!(told.contains("train.max_train_steps="), "{told}");
}

/// A DreamBooth config whose class pictures, and cache, lie in the run's own folder.
fn dreambooth(run: &Run) -> Vec<String> {
    let model = run.path().join("model");
    copy_folder(Path::new(&format!("{ROOT}/tests/fixtures/pipeline/model")), &model);
    fs::read_dir(run.path().join("pictures"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .for_each(|caption| fs::remove_file(caption).unwrap());
    [
        "model.pretrained_model_name_or_path=model",
        "data.dreambooth.instance_data_dir=pictures",
        "data.dreambooth.instance_prompt=a photo of sks dog",
        "data.dreambooth.class_data_dir=run/class",
        "data.dreambooth.class_prompt=a photo of dog",
        "data.dreambooth.num_class_images=4",
        "data.dreambooth.prior_sample_steps=2",
        "data.dreambooth.sample_batch_size=1",
        "data.cache_dir=run/cache",
        "data.resolution=32",
        "output_dir=run",
        "train.max_train_steps=2",
        "train.device=cpu",
        "checkpoint.checkpointing_steps=1",
        "palettize.enabled=false",
        "sample.sample_every_n_steps=0",
        "export.coreml=false",
    ]
    .map(String::from)
    .to_vec()
}

#[test]
fn class_pictures_that_a_run_learned_from_are_not_given_up_for_others() {
    let run = Run::new();
    let config = format!("{ROOT}/configs/dreambooth-2bit.toml");
    let changes = dreambooth(&run);
    let arguments = |command: &'static str, more: &[&'static str]| -> Vec<String> {
        let own = changes.iter().cloned();
        [command.to_owned(), config.clone()].into_iter().chain(own).chain(more.iter().map(|x| x.to_string())).collect()
    };
    let ends = |command, more: &[&'static str], code, expected: &str| {
        let arguments = arguments(command, more);
        ends(run.path(), &arguments.iter().map(String::as_str).collect::<Vec<_>>(), code, expected)
    };
    // Killed while it draws: the folder is the run's, although its own pictures are all that is in it.
    let slow = arguments("train", &["data.dreambooth.prior_sample_steps=300"]);
    let slow: Vec<&str> = slow.iter().map(String::as_str).collect();
    let mut child = program(run.path(), &slow).stderr(std::process::Stdio::null()).spawn().unwrap();
    wait_for(&mut child, "a class picture", || run.out().join("class/drawn-00000.png").is_file());
    child.kill().unwrap();
    child.wait().unwrap();
    ends("check", &[], 0, "");
    let told = ends("train", &[], 0, "");
    assert!(told.contains("wrote the model"), "{told}");

    // The same model, saved by another version of diffusers.
    let unet = run.path().join("model/unet/config.json");
    let text = fs::read_to_string(&unet).unwrap();
    fs::write(&unet, text.replacen('{', "{\"_name_or_path\": \"somewhere/else\",", 1)).unwrap();
    let told = ends("train", &["train.max_train_steps=3"], 0, "(step 2 of 3)");
    assert!(!told.contains("drawn from something else"), "{told}");

    // A class that is called as the subject is.
    let same = [
        "data.dreambooth.class_prompt=a photo of sks dog",
        "output_dir=other",
        "data.dreambooth.class_data_dir=other/c",
    ];
    let output =
        program(run.path(), &arguments("check", &same).iter().map(String::as_str).collect::<Vec<_>>()).output();
    let told = common::runs::text(&output.unwrap().stdout);
    assert!(told.contains("pictures of the class would be taught as the subject"), "{told}");
    ends("check", &["data.dreambooth.class_data_dir=run/samples"], 2, "a folder in run that the run writes to itself");

    // Another sampler draws other pictures; the run learned from these.
    let scheduler = run.path().join("model/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap();
    assert!(text.contains("\"set_alpha_to_one\": false"), "{text}");
    fs::write(&scheduler, text.replace("\"set_alpha_to_one\": false", "\"set_alpha_to_one\": true")).unwrap();
    let before = contents(&run.out());
    for command in ["check", "train"] {
        let told = ends(command, &["train.max_train_steps=4"], 2, "the run in run learned from ");
        assert!(!told.contains("the float model draws"), "{told}");
    }
    assert!(contents(&run.out()) == before);
}
