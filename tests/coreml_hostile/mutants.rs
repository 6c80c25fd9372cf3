//! Thousands of mutants through what `inspect` and `verify` do: each is refused with a message or runs; none panics,
//! takes ten seconds, or a gigabyte.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use palettist::coreml::AttentionImplementation::{self, Original, SplitEinsum, SplitEinsumV2};
use palettist::coreml::DeploymentTarget;
use palettist::coreml::components::unet::{UnetOptions, export_unet};
use palettist::coreml::format::proto;
use palettist::coreml::reading::{Chain, Precision};
use palettist::coreml::writing::chunk::cut_package;
use palettist::coreml::writing::weights::WeightSource;
use palettist::palette::{Form, LutDtype};
use prost::Message;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::common::{metadata, palettized, palettized_as, random, small_unet, weights};
use crate::mutate::{Files, mutant};
use crate::{MODEL, WEIGHTS};

/// What a mutant may take.
pub const LONGEST: Duration = Duration::from_secs(10);
pub const MOST_MEMORY: u64 = 1 << 30;

/// A sound package, and what it runs on.
pub struct Sound {
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    pub files: Files,
    pub program: proto::Model,
    pub inputs: BTreeMap<String, Tensor>,
}

/// Small UNets of every form: fp16, palettes, the tables of iOS 18, for ControlNets, in chunks; the other networks; and
/// one of coremltools in which sizes are computed.
pub fn originals(folder: &Path) -> Vec<Sound> {
    let config = small_unet(4, [8, 16], json!(2), false);
    let floats = weights(&config);
    let palettes = palettized(&config, &floats);
    let plain = Form::per_tensor(3);
    let forms = [
        plain,
        Form { group_size: Some(4), ..plain },
        Form { cluster_dim: 2, ..plain },
        Form { per_channel_scale: true, ..plain },
        Form { lut_dtype: LutDtype::I8, group_size: Some(2), ..plain },
    ];
    let tables = palettized_as(&config, &forms);
    let cases: [(&str, &dyn WeightSource, DeploymentTarget, AttentionImplementation, bool); 4] = [
        ("fp16", &floats, DeploymentTarget::Ios16, Original, false),
        ("palettes", &palettes, DeploymentTarget::Ios16, SplitEinsum, false),
        ("controlnet", &palettes, DeploymentTarget::Ios17, Original, true),
        ("tables", &tables, DeploymentTarget::Ios18, SplitEinsumV2, false),
    ];
    let mut paths = Vec::new();
    for (name, weights, target, attention, controlnet) in cases {
        let options = UnetOptions { target, attention, controlnet, batch: 1, ..UnetOptions::new(&config) };
        let folder = folder.join(name);
        let path = export_unet(&config, weights, &options, &metadata(), &folder, &mut |_, _| {}).unwrap();
        if attention != Original {
            let chunks = cut_package(&path, &folder.join("chunks/whole.mlpackage"), false).unwrap();
            paths.extend(chunks.into_iter().enumerate().map(|(i, path)| (format!("{name}, chunk {}", i + 1), path)));
        }
        paths.push((name.to_owned(), path));
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/networks/pipeline");
    let arguments = ["export", model, "--component", "text_encoder,vae_encoder", "--latent-h", "2", "--latent-w", "2"];
    let output = Command::new(env!("CARGO_BIN_EXE_palettist")).args(arguments).arg("-o").arg(folder).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    paths.extend(said.lines().map(|line| (line.rsplit('_').nth(1).unwrap_or(line).to_owned(), PathBuf::from(line))));
    let counted = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counted/iOS17.mlpackage");
    paths.push(("counted".to_owned(), counted.into()));
    paths.into_iter().map(|(name, path)| original(name, &path)).collect()
}

fn original(name: String, path: &Path) -> Sound {
    let read = |file: &str| fs::read(path.join(file)).unwrap();
    let files = Files { manifest: read("Manifest.json"), model: read(MODEL), weights: read(WEIGHTS) };
    let program = proto::Model::decode(&files.model[..]).unwrap();
    let package = palettist::coreml::reading::Package::open(path).unwrap();
    let features = package.inputs();
    let shapes: Vec<Vec<i64>> = features.iter().map(|feature| feature.kind.shape.clone()).collect();
    let drawn = features.iter().zip(random(9, &shapes)).map(|(feature, values)| {
        let ids = Tensor::full(&feature.kind.shape, 3, (Kind::Float, Device::Cpu));
        (feature.name.clone(), if feature.name == "input_ids" { ids } else { values })
    });
    Sound { name, path: path.to_owned(), program, inputs: drawn.collect(), files }
}

/// How many mutants were refused, were opened, and ran in both precisions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub refused: usize,
    pub opened: usize,
    pub ran: usize,
}

/// What `inspect` and `verify` do with the package at `path`.
pub fn survive(path: &Path, inputs: &BTreeMap<String, Tensor>, counts: &mut Counts) {
    match Chain::open(path) {
        Err(error) => {
            assert!(!format!("{error:#}").is_empty());
            counts.refused += 1;
        }
        Ok(chain) => {
            counts.opened += 1;
            chain.weights().unwrap();
            for package in chain.packages() {
                let _ = package.check_values();
            }
            let run = |precision| chain.evaluate(inputs, precision, &mut |_, _| Ok(())).is_ok();
            counts.ran += usize::from(run(Precision::Float32) & run(Precision::Float16));
        }
    }
}

/// Peak memory of this process since the last [`forget_peak`], in bytes; 0 where the system does not tell.
pub fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

pub fn forget_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// `count` mutants of each package, from number `first` on.
fn try_mutants(count: u64, first: u64) {
    let folder = tempfile::tempdir().unwrap();
    let (mut slowest, mut largest) = (Duration::ZERO, 0);
    for original in originals(folder.path()) {
        let place = folder.path().join("mutant.mlpackage");
        fs::create_dir_all(place.join(WEIGHTS).parent().unwrap()).unwrap();
        let (mut counts, began) = (Counts::default(), Instant::now());
        for number in first..first + count {
            let files = mutant(&original.files, &original.program, number);
            for (name, bytes) in [("Manifest.json", &files.manifest), (MODEL, &files.model), (WEIGHTS, &files.weights)]
            {
                fs::write(place.join(name), bytes).unwrap();
            }
            let work = || survive(&place, &original.inputs, &mut counts);
            let (took, memory) = within_limits(&format!("mutant {number} of {}", original.name), work);
            (slowest, largest) = (slowest.max(took), largest.max(memory));
        }
        println!("{}: {counts:?} in {:.1} s", original.name, began.elapsed().as_secs_f64());
        // Most are refused; those that change a name, a description or the value of a weight are not.
        assert!(counts.refused as u64 * 2 > count && counts.opened > 0, "{}: {counts:?}", original.name);
    }
    println!("slowest {slowest:?}; most memory of the process {:.0} MB", largest as f64 / 1e6);
}

#[test]
fn a_hundred_and_fifty_mutants() {
    try_mutants(15, 0);
}

/// Does `work` on `what`, which may neither panic nor take long nor much memory; says how long and how much it took.
pub fn within_limits(what: &str, work: impl FnOnce()) -> (Duration, u64) {
    forget_peak();
    let start = Instant::now();
    let survived = catch_unwind(AssertUnwindSafe(work));
    let (took, memory) = (start.elapsed(), peak());
    assert!(survived.is_ok(), "{what} panics");
    assert!(took < LONGEST, "{what} takes {took:?}");
    assert!(memory < MOST_MEMORY, "{what} takes {memory} bytes");
    (took, memory)
}

/// What an allocation too large would do shows only where address space is limited.
pub fn limit_address_space(more: u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let now = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10;
    let limit = format!("--as={}", now + more);
    let done = Command::new("prlimit").args(["--pid", &std::process::id().to_string(), &limit]).status();
    if !done.is_ok_and(|status| status.success()) {
        eprintln!("no prlimit here: only the memory that is used is looked at, not what is asked for");
    }
}

#[test]
#[ignore = "minutes"]
fn ten_thousand_mutants() {
    limit_address_space(MOST_MEMORY);
    try_mutants(1000, 1_000_000);
}

/// Through the program itself: a message and an exit code, no signal.
#[test]
fn the_program_refuses_mutants_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let originals = originals(folder.path());
    let place = folder.path().join("mutant.mlpackage");
    fs::create_dir_all(place.join(WEIGHTS).parent().unwrap()).unwrap();
    for (number, original) in originals.iter().enumerate() {
        let files = mutant(&original.files, &original.program, 7 + number as u64);
        for (name, bytes) in [("Manifest.json", &files.manifest), (MODEL, &files.model), (WEIGHTS, &files.weights)] {
            fs::write(place.join(name), bytes).unwrap();
        }
        for command in ["inspect", "verify"] {
            let output = Command::new(env!("CARGO_BIN_EXE_palettist")).arg(command).arg(&place).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            match output.status.code() {
                Some(0) => {}
                Some(1) => assert!(said.contains("mutant.mlpackage"), "{command}, {}: {said}", original.name),
                code => panic!("{command}, {}: {code:?}: {said}", original.name),
            }
        }
    }
}
