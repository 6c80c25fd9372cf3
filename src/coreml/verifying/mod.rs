//! Comparing a package with the network that it was made from: the same inputs through both.
//!
//! The package is read back from disk and run by [`reading`](super::reading). With 32-bit arithmetic only what export did is
//! left of the difference; with 16 bits it is what a phone will compute.

pub mod layers;
pub mod parameters;
mod unet;

use std::collections::BTreeMap;
use std::{fmt, iter};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use self::layers::{Layers, Recording};
use self::parameters::{Held, Parameters};
pub use self::unet::{UnetInputs, verify_unet};
use super::prompt::Prompt;
use super::reading::{Chain, DataType, Feature, Precision, TensorType, parameter_of, psnr};
use crate::coreml::components::{Attended, Part};
use crate::coreml::format::metadata::COMPONENT;
use crate::networks::text_encoder::TextEncoderConfig;
use crate::source::{Component, Model};

/// What to compare on.
#[derive(Clone)]
pub struct Settings<'a> {
    /// Of the random inputs.
    pub seed: u64,
    /// For UNets, of 1000: little noise, half, nearly all. The last tells whether the sinusoid of large numbers
    /// survived.
    pub timesteps: Vec<i64>,
    pub device: Device,
    /// What a run may take of main memory, in bytes: packages that ask for more are refused, not run.
    pub memory: Option<u64>,
    /// What watches the network, where layers are to be compared too.
    pub recording: Option<&'a Recording>,
    /// What the package should hold, to compare that too.
    pub held: Option<Held<'a>>,
}

impl Default for Settings<'_> {
    fn default() -> Self {
        Self { seed: 0, timesteps: vec![1, 501, 981], device: Device::Cpu, memory: None, recording: None, held: None }
    }
}

/// Agreement of one output on one set of inputs, in dB ([`psnr`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What went in: `timestep 981`.
    pub input: String,
    pub output: String,
    pub float32: f64,
    pub float16: f64,
}

/// What [`compare`] found; prints as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub specification_version: i32,
    pub operations: usize,
    pub file_bytes: u64,
    /// Of the weights of convolutions and linear layers, tables counted.
    pub bits_per_weight: f64,
    /// Weights of convolutions and linear layers, and how many of them are palettized.
    pub weights: usize,
    pub palettized: usize,
    /// Where it is known what the package [should hold](Settings::held).
    pub parameters: Option<Parameters>,
    pub rows: Vec<Row>,
    /// Every layer on the last inputs, where the network was [watched](Settings::recording).
    pub layers: Option<Layers>,
}

impl Report {
    /// The least of all PSNRs in this precision.
    pub fn least(&self, precision: Precision) -> f64 {
        let of = |row: &Row| if precision == Precision::Float32 { row.float32 } else { row.float16 };
        self.rows.iter().map(of).fold(f64::INFINITY, f64::min)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "specification version {}, {} operations, {:.1} MB",
            self.specification_version,
            self.operations,
            self.file_bytes as f64 / 1e6
        )?;
        writeln!(
            f,
            "{} of {} layer weights palettized, {:.3} bits a weight",
            self.palettized, self.weights, self.bits_per_weight
        )?;
        if let Some(parameters) = &self.parameters {
            writeln!(f, "{parameters}")?;
        }
        let width = |of: fn(&Row) -> &str| self.rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0);
        let (input, output) = (width(|row| &row.input), width(|row| &row.output));
        writeln!(f, "{:input$}  {:output$}   PSNR, 32 bits   PSNR, 16 bits", "", "")?;
        for row in &self.rows {
            let names = format!("{:input$}  {:output$}", row.input, row.output);
            writeln!(f, "{names} {:12.2} dB {:12.2} dB", row.float32, row.float16)?;
        }
        if let (Some(layers), Some(last)) = (&self.layers, self.rows.last()) {
            write!(f, "\nlayers, {}\n{layers}", last.input)?;
        }
        Ok(())
    }
}

/// What a network gives, by the names of a package's outputs.
pub type Outputs = BTreeMap<String, Tensor>;

/// One set of inputs.
pub struct Case {
    /// What messages call it.
    pub name: String,
    /// For the package: by the names and in the shapes of its inputs.
    pub inputs: BTreeMap<String, Tensor>,
    /// What the network makes of them, by the names of the outputs.
    pub expected: BTreeMap<String, Tensor>,
}

/// Runs `package` on each case, in both precisions, and compares every output, and every layer where
/// [a recording](Settings::recording) watches the network that makes the cases.
///
/// # Errors
/// When it takes more memory than it [may](Settings::memory), cannot be run on these inputs, or its outputs are not
/// those expected.
pub fn compare(
    package: &Chain,
    cases: impl IntoIterator<Item = Result<Case>>,
    settings: &Settings<'_>,
) -> Result<Report> {
    let shown = package.path().display();
    let recording = settings.recording;
    // Before the network runs, which takes as much.
    let (needed, gigabyte) = (package.peak_bytes(), 1e9);
    if let Some(memory) = settings.memory.filter(|&memory| memory < needed) {
        bail!(
            "running {shown} takes {:.1} GB of memory, and {:.1} GB are free",
            needed as f64 / gigabyte,
            memory as f64 / gigabyte
        );
    }
    let parameters = settings.held.map(|held| parameters::compare(package, held)).transpose()?;
    let (mut rows, mut layers) = (Vec::new(), None);
    let mut cases = cases.into_iter();
    let mut next = || {
        recording.inspect(|recording| recording.clear());
        cases.next()
    };
    while let Some(case) = next() {
        let Case { name, inputs, expected } = case?;
        let run =
            |precision, watch: &mut dyn FnMut(&str, &Tensor) -> Result<()>| package.evaluate(&inputs, precision, watch);
        let ([single, half], found) = recording.unwrap_or(&Recording::default()).compare(run)?;
        layers = recording.map(|_| found);
        for output in package.outputs() {
            let wanted = expected.get(&output.name);
            let wanted = wanted.with_context(|| format!("{shown} gives {}, the network does not", output.name))?;
            ensure!(
                wanted.size() == output.kind.shape,
                "{shown} gives {} as {}, the network a shape {:?}",
                output.name,
                output.kind,
                wanted.size()
            );
            let of = |computed: &BTreeMap<String, Tensor>| -> Result<f64> {
                Ok(psnr(wanted, computed.get(&output.name).context("an output was not computed")?))
            };
            let (float32, float16) = (of(&single)?, of(&half)?);
            rows.push(Row { input: name.clone(), output: output.name.clone(), float32, float16 });
        }
        if let Some(name) = expected.keys().find(|name| package.outputs().iter().all(|output| output.name != **name)) {
            bail!("{shown} does not give {name}, the network does");
        }
    }
    let mut weights = package.weights()?;
    weights.retain(|weight| weight.layer);
    let (bytes, elements) =
        weights.iter().fold((0, 0), |(bytes, elements), weight| (bytes + weight.bytes, elements + weight.elements));
    Ok(Report {
        specification_version: package.packages()[0].specification_version(),
        operations: package.operations(),
        file_bytes: package.file_bytes(),
        bits_per_weight: 8.0 * bytes as f64 / elements.max(1) as f64,
        weights: weights.len(),
        palettized: weights.iter().filter(|weight| weight.palettes.is_some()).count(),
        parameters,
        rows,
        layers,
    })
}

/// Which network of `model` a package holds, by its inputs. Of the two text encoders of Stable Diffusion XL, whose inputs
/// and outputs are named alike: the second where it projects the pooled text, as only that one does; else the one that is
/// as wide; else what the package says that it is.
///
/// # Errors
/// None that Palettist knows, with the inputs it has; a network of a model of another kind; metadata that say otherwise.
pub fn part_of(package: &Chain, model: &Model) -> Result<Part> {
    let part = part_by_inputs(package)?;
    let has = |features: &[Feature], name: &str| features.iter().any(|feature| feature.name == name);
    let is_xl = match part {
        Part::Unet => Some(has(package.inputs(), "time_ids")),
        Part::TextEncoder => Some(has(package.outputs(), Attended::Penultimate.output())),
        _ => None,
    };
    if let Some(is_xl) = is_xl.filter(|is_xl| *is_xl != model.is_xl()) {
        let (what, kind) = (part.component().title(), if is_xl { "is one" } else { "is none" });
        let other = if is_xl { "is not" } else { "is" };
        bail!(
            "{} is a package of another model: its {what} {kind} of Stable Diffusion XL, and {} {other}",
            package.path().display(),
            model.path().display()
        );
    }
    let first = package.packages().first();
    let said: Option<Part> = first.and_then(|package| package.metadata().user_defined.get(COMPONENT)?.parse().ok());
    let is_second = (part == Part::TextEncoder && is_xl == Some(true)).then(|| is_second(package, model, said));
    let part = if is_second.transpose()? == Some(true) { Part::TextEncoder2 } else { part };
    match said.filter(|said| *said != part) {
        None => Ok(part),
        Some(said) => bail!(
            "{} holds the {part}, and its metadata ({COMPONENT}) says that it is the {said}: export it again",
            package.path().display()
        ),
    }
}

/// Whether a package with one of the two text encoders of Stable Diffusion XL, which says that it is `said`, holds the
/// second one.
fn is_second(package: &Chain, model: &Model, said: Option<Part>) -> Result<bool> {
    let [own, second] =
        [Component::TextEncoder, Component::TextEncoder2].map(|component| model.text_encoder_config_of(component));
    let (own, second) = (own?, second?);
    if own.projection.is_some() != second.projection.is_some() {
        let projects = package.weights()?.iter().any(|weight| parameter_of(&weight.name) == "text_projection_weight");
        return Ok(projects == second.projection.is_some());
    }
    if own.hidden_size != second.hidden_size {
        let channels = package.outputs().first().and_then(|output| output.kind.shape.last());
        return Ok(channels == Some(&second.hidden_size));
    }
    // Of one shape: only their weights differ, which are compared next.
    Ok(said == Some(Part::TextEncoder2))
}

fn part_by_inputs(package: &Chain) -> Result<Part> {
    let has = |name: &str| package.inputs().iter().any(|input| input.name == name);
    let parts = [
        ("sample", Part::Unet),
        ("input_ids", Part::TextEncoder),
        ("z", Part::VaeDecoder),
        ("x", Part::VaeEncoder),
        ("clip_input", Part::SafetyChecker),
    ];
    match parts.into_iter().find(|(input, _)| has(input)) {
        Some((_, part)) => Ok(part),
        None => bail!(
            "{} is none of Stable Diffusion's networks: its inputs are {}",
            package.path().display(),
            inputs_of(package)
        ),
    }
}

fn inputs_of(package: &Chain) -> String {
    let found: Vec<_> = package.inputs().iter().map(|input| format!("{} {}", input.name, input.kind)).collect();
    found.join(", ")
}

/// Compares a package of one input with `reference`, which gives the outputs by name: a half of an autoencoder on
/// normal numbers.
///
/// # Errors
/// When the package has other inputs, and what `reference` returns.
pub fn verify_one_input(
    package: &Chain,
    reference: &mut dyn FnMut(&Tensor) -> Result<BTreeMap<String, Tensor>>,
    settings: &Settings<'_>,
) -> Result<Report> {
    let [input] = package.inputs() else {
        bail!("{} has the inputs {}, one is expected", package.path().display(), inputs_of(package));
    };
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    // Made when it is asked for: what watches the network begins then.
    let case = iter::once_with(|| {
        let numbers = normal(&mut random, &input.kind)?.f_to_device(settings.device)?;
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            reference(&numbers).context("the network that the package is compared with")?
        };
        let inputs = [(input.name.clone(), numbers)].into();
        Ok(Case { name: format!("random {}", input.name), inputs, expected })
    });
    compare(package, case, settings)
}

/// Compares a text encoder with `reference(ids [B,T])`, which gives the outputs by name, on a short text and on one as
/// long as can be. The reference is given the model's own padding, and the package that and, where it is another, the one
/// of Apple's Swift package: it has to answer both alike.
///
/// # Errors
/// When the package has other inputs than `input_ids` or takes longer texts than the network, and what `reference` returns.
pub fn verify_text_encoder(
    package: &Chain,
    config: &TextEncoderConfig,
    prompt: &Prompt,
    reference: &mut dyn FnMut(&Tensor) -> Result<BTreeMap<String, Tensor>>,
    settings: &Settings<'_>,
) -> Result<Report> {
    let shown = package.path().display();
    let [input] = package.inputs() else {
        bail!("{shown} has the inputs {}, one is expected", inputs_of(package));
    };
    let [batch, tokens] = input.kind.shape[..] else { bail!("{shown} takes {}, not [1, 77]", input.kind) };
    let positions = config.positions;
    ensure!(
        tokens <= positions,
        "{shown} is a package of another model: texts of {tokens} tokens, {positions} in the model's text encoder"
    );
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    // Below the end-of-text, which is the largest id or one before others that texts do not hold.
    let words = prompt.end.min(config.vocab_size - 1).max(1) as u64;
    let short = 7.min(tokens - 1);
    let mut texts = vec![("short text", short, prompt.pad), ("long text", tokens - 1, prompt.pad)];
    if prompt.differs() {
        texts.insert(1, ("padded as by Swift", short, prompt.swift_pad));
    }
    let cases = texts.into_iter().map(|(name, length, pad)| {
        let mut id = |place: i64| if place < length { (random.next_u64() % words) as i64 } else { prompt.end };
        let text: Vec<i64> = (0..batch * tokens).map(|at| id(at % tokens)).collect();
        let filled = |pad: i64| -> Result<Tensor> {
            let id = |(at, id): (usize, &i64)| if at as i64 % tokens > length { pad } else { *id };
            let ids: Vec<i64> = text.iter().enumerate().map(id).collect();
            Ok(Tensor::f_from_slice(&ids)?.f_view([batch, tokens])?.f_to_device(settings.device)?)
        };
        let (ids, fed) = (filled(prompt.pad)?, filled(pad)?);
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            reference(&ids).context("the network that the package is compared with")?
        };
        let fed = if input.kind.data_type.is_float() { fed.f_to_kind(Kind::Float)? } else { fed };
        Ok(Case { name: name.to_owned(), inputs: [(input.name.clone(), fed)].into(), expected })
    });
    compare(package, cases, settings)
}

/// Compares a safety checker with `reference(clip_input, images, adjustment)`, which gives the outputs by name, on two
/// random pictures of which one is adjusted to be held back where that can be.
///
/// # Errors
/// When the package has other inputs, and what `reference` returns.
pub fn verify_safety_checker(
    package: &Chain,
    reference: &mut dyn FnMut(&[Tensor; 3]) -> Result<Outputs>,
    settings: &Settings,
) -> Result<Report> {
    const INPUTS: [&str; 3] = ["clip_input", "images", "adjustment"];
    let kind = |name: &str| package.inputs().iter().find(|input| input.name == name).map(|input| &input.kind);
    let [Some(picture), Some(images), Some(adjustment)] = INPUTS.map(kind) else {
        bail!("{} has the inputs {}", package.path().display(), inputs_of(package));
    };
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    let cases = [0.0, 0.5].into_iter().map(|more| {
        let inputs = [
            normal(&mut random, picture)?.f_to_device(settings.device)?,
            normal(&mut random, images)?.f_to_device(settings.device)?,
            Tensor::f_full(&adjustment.shape, more, (Kind::Float, settings.device))?,
        ];
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            reference(&inputs).context("the network that the package is compared with")?
        };
        let inputs = INPUTS.map(String::from).into_iter().zip(inputs).collect();
        Ok(Case { name: format!("adjustment {more}"), inputs, expected })
    });
    compare(package, cases, settings)
}

/// Standard normal numbers (Box and Muller's), rounded to what the package's input can hold, so that the network sees
/// the same ones.
fn normal(random: &mut ChaCha8Rng, kind: &TensorType) -> Result<Tensor> {
    // In (0, 1]: the logarithm is finite.
    let mut uniform = || ((random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let numbers: Vec<f32> = (0..kind.elements())
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect();
    let numbers = Tensor::f_from_slice(&numbers)?.f_reshape(&kind.shape)?;
    Ok(match kind.data_type {
        DataType::Float16 => numbers.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?,
        _ => numbers,
    })
}
