//! What export costs and what it writes, beside Apple's converter: operations, constants, bytes, seconds, memory, and
//! how far the packages are from the network.
//!
//!     make bench
//!     PALETTIST_APPLE=PYTHON cargo bench --profile dev --bench coreml -- [FORMS, or parts of their names]
//!
//! The model is examples/base and the one that $PALETTIST_MODEL names (a diffusers folder of fp16 safetensors). Each
//! package is written by a process of its own, start and reading of the model included, whose wall time and largest
//! resident memory are told. Apple's converter (ml-stable-diffusion's torch2coreml, by benches/peers/apple.py, which
//! says what it needs) runs where $PALETTIST_APPLE names a Python that has it. Both packages are read and run by
//! `palettist verify` and compared with the network as it is, the least PSNR of all outputs and inputs in 32- and in
//! 16-bit arithmetic; palettes are therefore part of the difference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use palettist::coreml::components::Part;
use palettist::coreml::reading::{Chain, Package};
use palettist::source::Model;

/// A package, or two, as both converters are told to write it.
struct Form {
    name: &'static str,
    part: Part,
    /// What the package's name ends in.
    package: &'static str,
    /// Options that both have.
    options: &'static [&'static str],
}

const ATTENTION: &str = "--attention-implementation";

const FORMS: [Form; 12] = [
    Form { name: "text_encoder", part: Part::TextEncoder, package: "text_encoder", options: &[] },
    Form { name: "text_encoder_2", part: Part::TextEncoder2, package: "text_encoder_2", options: &[] },
    Form { name: "vae_decoder", part: Part::VaeDecoder, package: "vae_decoder", options: &[] },
    Form { name: "vae_encoder", part: Part::VaeEncoder, package: "vae_encoder", options: &[] },
    Form { name: "safety_checker", part: Part::SafetyChecker, package: "safety_checker", options: &[] },
    Form { name: "unet", part: Part::Unet, package: "unet", options: &[ATTENTION, "ORIGINAL"] },
    Form { name: "unet SPLIT_EINSUM", part: Part::Unet, package: "unet", options: &[ATTENTION, "SPLIT_EINSUM"] },
    Form { name: "unet SPLIT_EINSUM_V2", part: Part::Unet, package: "unet", options: &[ATTENTION, "SPLIT_EINSUM_V2"] },
    Form {
        name: "unet 2 chunks",
        part: Part::Unet,
        package: "unet_chunk1",
        options: &[ATTENTION, "ORIGINAL", "--chunk-unet"],
    },
    Form {
        name: "unet ControlNet",
        part: Part::Unet,
        package: "control-unet",
        options: &[ATTENTION, "ORIGINAL", "--unet-support-controlnet"],
    },
    Form {
        name: "unet 4 bits",
        part: Part::Unet,
        package: "unet",
        options: &[ATTENTION, "ORIGINAL", "--quantize-nbits", "4"],
    },
    Form {
        name: "text_encoder 4 bits",
        part: Part::TextEncoder,
        package: "text_encoder",
        options: &["--quantize-nbits", "4"],
    },
];

/// What one converter made of a form.
struct Made {
    seconds: f64,
    /// Bytes.
    memory: f64,
    /// By kind, constants left out.
    operations: BTreeMap<String, usize>,
    constants: usize,
    /// Of the constants that operations compute with.
    weights: u64,
    bytes: u64,
    /// dB, in 32 and 16 bits.
    psnr: [f64; 2],
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let apple = std::env::var_os("PALETTIST_APPLE").map(PathBuf::from);
    if apple.is_none() {
        println!("Apple's converter was not run: $PALETTIST_APPLE names no Python that has it");
    }
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/base").to_owned();
    for folder in [Some(base), std::env::var("PALETTIST_MODEL").ok()].into_iter().flatten() {
        let model = Model::open(&folder).expect("a diffusers folder");
        println!("{folder}: ours / Apple's, and Apple's over ours");
        println!(
            "{:22} {:>17} {:>17} {:>23} {:>23} {:>23} {:>27} {:>25}",
            "", "operations", "constants", "MB of them", "MB of files", "seconds", "MB of memory", "dB, 32 / 16 bits"
        );
        let parts = Part::of(&model);
        let among = |form: &&Form| wanted.is_empty() || wanted.iter().any(|name| form.name.contains(name.as_str()));
        for form in FORMS.iter().filter(|form| parts.contains(&form.part)).filter(among) {
            let ours = make(form, &folder, None, model.is_xl()).expect("export writes a package that verify reads");
            let theirs = apple.as_deref().and_then(|python| {
                make(form, &folder, Some(python), model.is_xl())
                    .inspect_err(|error| println!("{}: Apple's: {error}", form.name))
                    .ok()
            });
            show(form, &ours, theirs.as_ref());
        }
    }
}

/// Writes a form, by `python` with Apple's converter or by ours, and looks at what came of it.
fn make(form: &Form, model: &str, python: Option<&Path>, xl: bool) -> Result<Made, String> {
    let palettist = env!("CARGO_BIN_EXE_palettist");
    let out = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut command;
    if let Some(python) = python {
        command = Command::new(python);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/apple.py")).args([model.as_ref(), out.path()]);
        command.arg(match form.part {
            Part::Unet => "--convert-unet",
            Part::TextEncoder | Part::TextEncoder2 => "--convert-text-encoder",
            Part::VaeDecoder => "--convert-vae-decoder",
            Part::VaeEncoder => "--convert-vae-encoder",
            Part::SafetyChecker => "--convert-safety-checker",
        });
        command.args(xl.then_some("--xl-version"));
    } else {
        command = Command::new(palettist);
        command.args(["export", model, "--component", form.part.name(), "-o"]).arg(out.path());
    }
    let (seconds, memory) = run(command.args(form.options), out.path())?;
    let ending = format!("_{}.mlpackage", form.package);
    let packages = fs::read_dir(out.path()).map_err(|error| error.to_string())?.flatten().map(|entry| entry.path());
    let path =
        packages.into_iter().find(|path| path.to_string_lossy().ends_with(&ending)).ok_or("it wrote no package")?;
    let package = Chain::open(&path).map_err(|error| format!("{error:#}"))?;
    let mut operations = BTreeMap::new();
    for (kind, count) in package.packages().iter().flat_map(Package::operation_counts) {
        *operations.entry(kind.to_owned()).or_default() += count;
    }
    let constant = |kind: &str| kind == "const" || kind.starts_with("constexpr_");
    let constants = operations.extract_if(.., |kind, _| constant(kind)).map(|(_, count)| count).sum();
    let weights = package.weights().map_err(|error| format!("{error:#}"))?.iter().map(|weight| weight.bytes).sum();
    let mut verify = Command::new(palettist);
    verify.arg("verify").arg(&path).args(["--against", model, "--min-psnr=-1000"]);
    let output = verify.output().map_err(|error| error.to_string())?;
    Ok(Made {
        seconds,
        memory,
        operations,
        constants,
        weights,
        bytes: package.file_bytes(),
        psnr: least(&String::from_utf8_lossy(&output.stdout))
            .ok_or_else(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())?,
    })
}

/// The least of the PSNRs in what `verify --against` prints.
fn least(table: &str) -> Option<[f64; 2]> {
    let rows = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [.., single, "dB", half, "dB"] = words[..] else { return None };
        Some([single.parse::<f64>().ok()?, half.parse().ok()?])
    });
    rows.reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1])])
}

/// Seconds and largest resident memory of a process; what it prints goes to a file in `folder`.
fn run(command: &mut Command, folder: &Path) -> Result<(f64, f64), String> {
    let log = folder.join("log");
    let create = || fs::File::create(&log).map(Stdio::from).map_err(|error| error.to_string());
    let start = Instant::now();
    let mut child =
        command.stdout(Stdio::null()).stderr(create()?).spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let status = format!("/proc/{}/status", child.id());
    let mut memory = 0.0f64;
    loop {
        // The peak so far, which only grows; a process that has ended no longer has one.
        let now = fs::read_to_string(&status).unwrap_or_default();
        let peak = now.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        memory = memory.max(peak.unwrap_or(0.0) * 1024.0);
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            if status.success() {
                return Ok((start.elapsed().as_secs_f64(), memory));
            }
            let said = fs::read_to_string(&log).unwrap_or_default();
            return Err(said.lines().last().unwrap_or("it failed and said nothing").to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn show(form: &Form, ours: &Made, theirs: Option<&Made>) {
    let count = |of: fn(&Made) -> usize| match theirs {
        Some(theirs) => format!("{} / {}", of(ours), of(theirs)),
        None => of(ours).to_string(),
    };
    let ratio = |digits: usize, of: fn(&Made) -> f64| match theirs {
        Some(theirs) => {
            let (ours, theirs) = (of(ours), of(theirs));
            format!("{ours:.digits$} / {theirs:.digits$} {:>6.2}x", theirs / ours)
        }
        None => format!("{:.digits$}", of(ours)),
    };
    let decibel = |made: &Made| format!("{:.1} {:.1}", made.psnr[0], made.psnr[1]);
    println!(
        "{:22} {:>17} {:>17} {:>23} {:>23} {:>23} {:>27} {:>25}",
        form.name,
        count(|made| made.operations.values().sum()),
        count(|made| made.constants),
        ratio(2, |made| made.weights as f64 / 1e6),
        ratio(2, |made| made.bytes as f64 / 1e6),
        ratio(2, |made| made.seconds),
        ratio(0, |made| made.memory / 1e6),
        theirs.map_or_else(|| decibel(ours), |theirs| format!("{} / {}", decibel(ours), decibel(theirs)))
    );
    let Some(theirs) = theirs else { return };
    let kinds: BTreeSet<&String> = ours.operations.keys().chain(theirs.operations.keys()).collect();
    let of = |made: &Made, kind: &str| made.operations.get(kind).copied().unwrap_or(0);
    let differing = kinds.into_iter().filter(|kind| of(ours, kind) != of(theirs, kind));
    let differing: Vec<String> =
        differing.map(|kind| format!("{kind} {} / {}", of(ours, kind), of(theirs, kind))).collect();
    if !differing.is_empty() {
        println!("    {}", differing.join(", "));
    }
}
