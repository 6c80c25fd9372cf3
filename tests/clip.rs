//! The judge against transformers' own CLIP (`tests/oracle/clip.py`), the folders that are refused, and
//! `evaluate --prompts`.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::runs::{ROOT, ends, program, run, succeed, text, wait_for};
use image::RgbImage;
use palettist::data::picture::read_picture;
use palettist::files::TensorFile;
use palettist::judge::{Clip, Preprocessor, psnr};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pipeline/model");
const CLIP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip/model");

fn furthest(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// What `tests/oracle/clip.py` wrote in `folder` is what the judge says.
fn agrees(folder: &Path) {
    let expected = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
    let expected = |name: &str| expected.tensor(name).unwrap();
    let pictures = ["wide", "tall"]
        .map(|name| read_picture(&Path::new(ROOT).join(format!("tests/fixtures/pictures/{name}.png"))).unwrap());
    let json: Value =
        serde_json::from_slice(&fs::read(folder.join("model/preprocessor_config.json")).unwrap()).unwrap();
    let preprocessor = Preprocessor::from_json(&json).unwrap();
    let pixels = Tensor::stack(&pictures.each_ref().map(|picture| preprocessor.apply(picture).unwrap()), 0);
    assert!(
        furthest(&pixels, &expected("pixels")) < 1e-5,
        "pixels differ by {:e}",
        furthest(&pixels, &expected("pixels"))
    );

    let texts: Vec<String> = serde_json::from_slice(&fs::read(folder.join("texts.json")).unwrap()).unwrap();
    let clip = Clip::open(&folder.join("model").display().to_string(), Device::Cpu).unwrap();
    let text_embeds = clip.texts(&texts.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let image_embeds = clip.pictures(&pictures.iter().collect::<Vec<_>>()).unwrap();
    let logits = clip.logits(&image_embeds, &text_embeds);
    // The texts and pictures are told apart: equality says something.
    assert!(logits.std(true).double_value(&[]) > 0.1);
    for (name, value) in [("text_embeds", &text_embeds), ("image_embeds", &image_embeds), ("logits_per_image", &logits)]
    {
        let error = furthest(value, &expected(name));
        eprintln!("{}: {name} differs by {error:.1e}", folder.display());
        assert!(error < 1e-4, "{name} differs by {error:e}");
    }
    assert_eq!(texts.iter().map(|text| clip.cuts(text)).collect::<Vec<_>>(), [false, false, false, true, false]);
}

#[test]
fn embeddings_and_logits_are_those_of_transformers() {
    agrees(&Path::new(ROOT).join("tests/fixtures/clip"));
}

/// Other configurations, made by transformers at once.
#[test]
fn other_kinds_of_clip_agree_with_transformers_too() {
    let Some(python) = std::env::var_os("PALETTIST_PYTHON") else {
        eprintln!("skipped: needs PALETTIST_PYTHON, a Python with torch and transformers");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for case in ["0", "1", "2"] {
        let to = folder.path().join(case);
        let mut script = Command::new(&python);
        script.arg(Path::new(ROOT).join("tests/oracle/clip.py")).arg(&to).arg(case);
        let output = script.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        agrees(&to);
    }
}

/// A copy of the CLIP of the fixtures, to be spoilt.
fn copy(folder: &Path) -> PathBuf {
    let to = folder.join("clip");
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(CLIP).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    to
}

fn refused(clip: &Path) -> String {
    let error = Clip::open(&clip.display().to_string(), Device::Cpu).err().expect("a refusal");
    let message = format!("{error:#}");
    assert!(!message.contains('\n') && message.contains(&*clip.display().to_string()), "{message}");
    message
}

fn set(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn what_is_not_a_clip_is_named() {
    let with = |spoil: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        let clip = copy(folder.path());
        spoil(&clip);
        refused(&clip)
    };
    let config = |change: fn(&mut Value)| with(&|clip| set(&clip.join("config.json"), change));
    let says = |message: String, words: &[&str]| {
        for word in words {
            assert!(message.contains(word), "`{message}` does not say `{word}`");
        }
    };
    says(
        config(|json| (json["model_type"], json["architectures"]) = (json!("siglip"), json!(["SiglipModel"]))),
        &["is a SiglipModel, not a CLIP", "a CLIPModel of transformers is expected"],
    );
    says(
        config(|json| {
            (json["model_type"], json["architectures"]) = (json!("clip_text_model"), json!(["CLIPTextModel"]))
        }),
        &["is a CLIPTextModel, half of a CLIP"],
    );
    says(config(|json| json["architectures"] = json!(["CLIPForImageClassification"])), &["not a whole CLIP"]);
    says(config(|json| drop(json.as_object_mut().unwrap().remove("vision_config"))), &["no `vision_config`"]);
    // Wrong widths: of a tensor, of the embeddings.
    says(
        config(|json| json["text_config"]["hidden_size"] = json!(36)),
        &["model.safetensors", "has the shape", "this config.json asks for"],
    );
    says(config(|json| json["projection_dim"] = json!(25)), &["_projection.weight", "[24, 32]", "[25, 32]"]);
    says(config(|json| json["text_config"]["vocab_size"] = json!(7)), &["token_embedding", "[7, 32]"]);
    says(config(|json| json["vision_config"]["num_channels"] = json!(0)), &["`num_channels`: 0"]);
    let preprocessor = |change: fn(&mut Value)| with(&|clip| set(&clip.join("preprocessor_config.json"), change));
    says(
        preprocessor(|json| json["crop_size"] = json!(40)),
        &["preprocessor_config.json", "40 × 40", "32 × 32 (`image_size`)"],
    );
    says(preprocessor(|json| json["resample"] = json!(5)), &["preprocessor_config.json", "`resample` is 5"]);
    says(
        with(&|clip| fs::remove_file(clip.join("preprocessor_config.json")).unwrap()),
        &["no preprocessor_config.json"],
    );
    says(with(&|clip| fs::remove_file(clip.join("tokenizer.json")).unwrap()), &["has no tokenizer"]);
    says(with(&|clip| fs::remove_file(clip.join("config.json")).unwrap()), &["has no config.json"]);
    says(
        with(&|clip| fs::rename(clip.join("model.safetensors"), clip.join("pytorch_model.bin")).unwrap()),
        &["pytorch_model.bin is a pickle", "import CLIPModel"],
    );
    says(
        with(&|clip| {
            let path = clip.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        }),
        &["not a whole safetensors file"],
    );
    says(refused(Path::new(MODEL)), &["is a diffusers folder", "CLIPModel"]);
    says(refused(Path::new("/nowhere/at/all")), &["does not exist"]);
    says(refused(&Path::new(CLIP).join("config.json")), &["is a file; the folder of a CLIP is expected"]);
}

/// transformers 5 may keep the image processor in the processor's file.
#[test]
fn the_image_processor_within_a_processor_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let clip = copy(folder.path());
    let path = clip.join("preprocessor_config.json");
    let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    fs::remove_file(path).unwrap();
    fs::write(clip.join("processor_config.json"), json!({ "image_processor": json }).to_string()).unwrap();
    Clip::open(&clip.display().to_string(), Device::Cpu).unwrap();
}

/// A folder with prompts that have labels, in `prompts.jsonl`, and palettes of the model of the fixtures.
fn work() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let lines = [
        json!({ "text": "a red cat", "color": "red", "thing": "cat" }),
        json!({ "text": "a blue dog --d 7", "color": "blue", "thing": "dog", "number": 3 }),
        json!({ "text": "a dog", "thing": "dog", "file_name": "0.png" }),
    ];
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(folder.path().join("prompts.jsonl"), lines).unwrap();
    let out = folder.path().join("p.palettes.safetensors");
    succeed(run(folder.path(), &["palettize", MODEL, "-o", &out.display().to_string(), "--bits", "1"]));
    folder
}

const DRAWN: [&str; 8] = ["--clip", CLIP, "--steps", "2", "--guidance-scale", "1", "--device", "cpu"];

fn evaluated(folder: &Path, more: &[&str]) -> Value {
    let arguments = [&["evaluate", MODEL, "--prompts", "prompts.jsonl", "--json"][..], &DRAWN, more].concat();
    serde_json::from_str(&succeed(run(folder, &arguments))).unwrap()
}

#[test]
fn pictures_are_scored_beside_the_float_models() {
    let folder = work();
    let folder = folder.path();
    let found =
        evaluated(folder, &["--palettes", "p.palettes.safetensors", "--num-images", "2", "-o", "kept", "--seed", "3"]);
    assert_eq!((&found["prompts"], &found["pictures_of_each"]), (&json!(3), &json!(2)), "{found}");
    let number =
        |pointer: &str| found.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer}: {found}"));
    // No PSNR of float to itself; all else of both, with intervals.
    assert!(found["float"].get("psnr_db").is_none() && found["difference"].get("psnr_db").is_none(), "{found}");
    for side in ["float", "model", "difference"] {
        for score in ["clip_score", "right/thing", "right/color", "right/all"] {
            let [mean, low, high] = ["mean", "low", "high"].map(|part| number(&format!("/{side}/{score}/{part}")));
            assert!(low <= mean && mean <= high, "{side} {score}: {found}");
        }
    }
    assert!((3.0..58.0).contains(&number("/model/psnr_db/mean")), "{found}");

    // The table's numbers are the means of those in the folder, over prompts of the means of their pictures.
    let lines = fs::read_to_string(folder.join("kept/scores.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 12);
    let of = |side: &str, key: &str| {
        let values: Vec<f64> =
            lines.iter().filter(|line| line["drawn_by"] == side).map(|line| line[key].as_f64().unwrap()).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    assert!((of("model", "clip_score") - number("/model/clip_score/mean")).abs() < 1e-9);
    assert!((of("model", "psnr_db") - number("/model/psnr_db/mean")).abs() < 1e-9);
    let right = |line: &Value| line["asked"]["thing"] == line["shown"]["thing"];
    let share = lines.iter().filter(|line| line["drawn_by"] == "float" && right(line)).count() as f64 / 6.0;
    assert!((100.0 * share - number("/float/right/thing/mean")).abs() < 1e-9);
    // Each value that was shown is one of those that the prompts name.
    assert!(lines.iter().all(|line| ["cat", "dog"].contains(&line["shown"]["thing"].as_str().unwrap())), "{lines:?}");
    let seeds: Vec<u64> = lines.iter().map(|line| line["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, [3, 4, 3, 4, 7, 8, 7, 8, 7, 8, 7, 8], "by float, then by the model");

    // The pictures are those that `generate` draws of the same seed, and the scores are theirs.
    let picture = |name: &str| read_picture(&folder.join("kept").join(name)).unwrap();
    let pair: [RgbImage; 2] = ["0001-0-float.png", "0001-0-model.png"].map(picture);
    let line = lines.iter().find(|line| line["file_name"] == "0001-0-model.png").unwrap();
    assert!((psnr(&pair[0], &pair[1]) - line["psnr_db"].as_f64().unwrap()).abs() < 1e-9);
    let drawn = ["--steps", "2", "--guidance-scale", "1", "--device", "cpu"];
    let arguments = [
        "generate",
        MODEL,
        "--palettes",
        "p.palettes.safetensors",
        "--prompt",
        "a blue dog",
        "--seed",
        "7",
        "-o",
        "g.png",
    ];
    succeed(run(folder, &[&arguments[..], &drawn].concat()));
    assert_eq!(read_picture(&folder.join("g.png")).unwrap(), pair[1]);

    // Nothing is written over, and the same line says the same.
    let again = [&["evaluate", MODEL, "--prompts", "prompts.jsonl", "-o", "kept"][..], &DRAWN].concat();
    ends(folder, &again, 2, "kept exists already");
    let again = evaluated(folder, &["--palettes", "p.palettes.safetensors", "--num-images", "2", "--seed", "3"]);
    assert_eq!(again, found);
}

#[test]
fn a_model_may_be_judged_alone_or_beside_another() {
    let folder = work();
    let folder = folder.path();
    let alone = evaluated(folder, &[]);
    assert!(alone.get("float").is_none() && alone.get("difference").is_none(), "{alone}");
    assert!(alone["model"].get("psnr_db").is_none() && alone["model"]["clip_score"]["mean"].is_f64(), "{alone}");
    // Beside itself: the same pictures.
    let same = evaluated(folder, &["--against", MODEL]);
    assert_eq!(same["float"]["clip_score"], alone["model"]["clip_score"]);
    assert_eq!(same["difference"]["clip_score"], json!({ "mean": 0.0, "low": 0.0, "high": 0.0 }));
    assert!((same["model"]["psnr_db"]["low"].as_f64().unwrap() - 58.92).abs() < 0.01, "{same}");

    // Without a judge there is the PSNR, of plain prompts too; labels are said not to be scored.
    fs::write(folder.join("plain.txt"), "# a remark\na red cat\n\na dog --s 1\n").unwrap();
    let plain = ["evaluate", MODEL, "--prompts", "plain.txt", "--palettes", "p.palettes.safetensors", "--steps", "2"];
    let told = succeed(run(folder, &plain));
    assert!(told.starts_with("2 prompts, one picture of each, the same noise for both models"), "{told}");
    assert!(told.contains("PSNR, dB") && !told.contains("CLIP"), "{told}");
    let labelled =
        ["evaluate", MODEL, "--prompts", "prompts.jsonl", "--palettes", "p.palettes.safetensors", "--steps", "1"];
    ends(folder, &labelled, 0, "the labels in prompts.jsonl are not scored without a judge (--clip)");

    // Values that no prompt names, with texts of their own.
    let labels = json!({ "thing": { "cat": "a cat", "bird": "!!" }, "color": ["red", "green"] });
    fs::write(folder.join("labels.json"), labels.to_string()).unwrap();
    let arguments =
        [&["evaluate", MODEL, "--prompts", "prompts.jsonl", "--labels", "labels.json"][..], &DRAWN].concat();
    let told = succeed(run(folder, &arguments));
    assert!(told.contains("the judge chooses each color of 3, thing of 3"), "{told}");
}

#[test]
fn mistakes_are_told_before_anything_is_drawn() {
    let folder = work();
    let folder = folder.path();
    let says = |arguments: &[&str], code: i32, expected: &str| {
        ends(folder, &[&["evaluate", MODEL][..], arguments].concat(), code, expected)
    };
    says(&[], 2, "--config");
    says(&["--prompts", "prompts.jsonl"], 2, "there is nothing to score");
    says(&["--prompts", "prompts.jsonl", "--config", "a.toml"], 2, "cannot be used with");
    says(&["--config", "a.toml", "--steps", "3"], 2, "cannot be used with");
    says(&["--config", "a.toml", "--clip", CLIP], 2, "cannot be used with");
    says(&["--config", "a.toml", "-o", "kept"], 2, "cannot be used with");
    says(&["--clip", CLIP], 2, "--prompts");
    says(&["--prompts", "none.txt", "--clip", CLIP], 1, "cannot read none.txt");
    fs::write(folder.join("empty.txt"), "\n# nothing\n").unwrap();
    says(&["--prompts", "empty.txt", "--clip", CLIP], 1, "empty.txt has no prompts");
    fs::write(folder.join("bad.jsonl"), "{\"text\": \"a\"}\n{\"prompt\": \"b\"}\n").unwrap();
    says(&["--prompts", "bad.jsonl", "--clip", CLIP], 1, "bad.jsonl:2: there is no `text`");
    fs::write(folder.join("flags.txt"), "a cat --w 33\n").unwrap();
    says(&["--prompts", "flags.txt", "--clip", CLIP], 1, "flags.txt:1: `--w`");
    fs::write(folder.join("one.jsonl"), "{\"text\": \"a\", \"thing\": \"cat\"}\n").unwrap();
    says(&["--prompts", "one.jsonl", "--clip", CLIP], 1, "all prompts have the thing `cat`");
    fs::write(folder.join("labels.json"), "{\"thing\": 3}").unwrap();
    let arguments = ["--prompts", "prompts.jsonl", "--clip", CLIP, "--labels", "labels.json"];
    says(&arguments, 1, "labels.json: `thing` is neither");
    says(&[&["--prompts", "prompts.jsonl", "--num-images", "0"][..], &DRAWN].concat(), 2, "--num-images 0");
    says(&["--prompts", "prompts.jsonl", "--clip", CLIP, "--height", "33"], 2, "--height 33 is not a multiple");
    says(&["--prompts", "prompts.jsonl", "--clip", CLIP, "--steps", "0"], 2, "--steps 0");
    says(&["--prompts", "prompts.jsonl", "--clip", CLIP, "--steps", "5000"], 2, "--steps 5000");
    assert!(!folder.join("kept").exists());
}

#[test]
fn finished_prompts_survive_an_interrupt() {
    let folder = work();
    let folder = folder.path();
    fs::write(folder.join("many.txt"), "a red cat\n".repeat(3000)).unwrap();
    let arguments =
        ["evaluate", MODEL, "--prompts", "many.txt", "--palettes", "p.palettes.safetensors", "-o", "kept", "--json"];
    let mut child = program(folder, &[&arguments[..], &DRAWN].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&mut child, "a second prompt", || folder.join("kept/0001-model.png").exists());
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{told}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finished = found["prompts"].as_u64().unwrap();
    assert!((1..3000).contains(&finished));
    assert!(told.contains(&format!("these are the scores of {finished} of 3000 prompts")), "{told}");
    // Not a terminal: plain lines. PNDM evaluates its network three times in two steps, for two models.
    assert!(told.contains("drawing 0/18000 "), "{told}");
    // All that was finished is in the folder.
    let lines = fs::read_to_string(folder.join("kept/scores.jsonl")).unwrap();
    let names: BTreeMap<String, Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| (line["file_name"].as_str().unwrap().to_owned(), line))
        .collect();
    assert_eq!(names.len() as u64, 2 * finished);
    assert!(names.keys().all(|name| folder.join("kept").join(name).is_file()));
}
