//! Comparing a package with the network that it was made from: the same inputs through both.
//!
//! The package is read back from disk and run by [`read`](super::read). With 32-bit arithmetic only what export did is
//! left of the difference; with 16 bits it is what a phone will compute.

use std::collections::BTreeMap;
use std::{fmt, iter};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use super::components::Part;
use super::export::residual_name;
use super::layers::{Layers, Recording};
use super::read::{Chain, DataType, Precision, TensorType, psnr};
use crate::networks::unet::{Added, Condition, TIME_IDS};

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
}

impl Default for Settings<'_> {
    fn default() -> Self {
        Self { seed: 0, timesteps: vec![1, 501, 981], device: Device::Cpu, memory: None, recording: None }
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
        rows,
        layers,
    })
}

/// Which network a package holds, by its inputs.
///
/// # Errors
/// None that Palettist knows, with the inputs it has.
pub fn part_of(package: &Chain) -> Result<Part> {
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

/// What a UNet is given, in the network's own terms.
pub struct UnetInputs {
    /// `[B, 4, h, w]`
    pub sample: Tensor,
    /// `[B]`
    pub timestep: Tensor,
    /// `[B, T, C]`
    pub context: Tensor,
    /// What SDXL is told besides the prompt's tokens: the pooled text `[B, P]` and sizes `[B, 6]`.
    pub added: Option<[Tensor; 2]>,
    /// Of a ControlNet, where the package takes them.
    pub residuals: Vec<Tensor>,
}

impl UnetInputs {
    /// What the network is told besides sample and timestep.
    pub fn condition(&self) -> Condition<'_, Tensor> {
        let added = self.added.as_ref().map(|[text_embeds, time_ids]| Added { text_embeds, time_ids });
        Condition { context: &self.context, added, residuals: &self.residuals }
    }
}

/// Compares a UNet's package, or its chunks, with `reference`, which gives the predicted noise `[B,4,h,w]`. The package
/// takes the context as `[B,T,C]` or, as Apple's, `[B,C,1,T]`.
///
/// # Errors
/// When the package is not a UNet with the inputs `sample`, `timestep` and `encoder_hidden_states`, with or without
/// SDXL's `time_ids` and `text_embeds` and a ControlNet's `additional_residual_0` and so on, and one output, and what
/// `reference` returns.
pub fn verify_unet(
    package: &Chain,
    reference: &mut dyn FnMut(&UnetInputs) -> Result<Tensor>,
    settings: &Settings<'_>,
) -> Result<Report> {
    let kinds = unet_inputs(package)?;
    let [output] = package.outputs() else {
        bail!("{} has {} outputs, a UNet has one", package.path().display(), package.outputs().len());
    };
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    let cases = settings.timesteps.iter().map(|&timestep| {
        let mut draw = |kind| Ok(normal(&mut random, kind)?.f_to_device(settings.device)?);
        let (sample, context) = (draw(kinds.sample)?, draw(kinds.context)?);
        let residuals = kinds.residuals.iter().map(|kind| draw(kind)).collect::<Result<Vec<_>>>()?;
        let added =
            kinds.added.map(|text| Ok::<_, anyhow::Error>([draw(text)?, sizes(kinds.sample, settings.device)?]));
        let added = added.transpose()?;
        let timesteps = Tensor::f_full(&kinds.timestep.shape, timestep as f64, (Kind::Float, settings.device))?;
        let tokens = if kinds.context.rank() == 4 {
            context.f_squeeze_dim(2)?.f_transpose(1, 2)?
        } else {
            context.shallow_clone()
        };
        let fixed = [("sample", &sample), ("timestep", &timesteps), ("encoder_hidden_states", &context)];
        let mut inputs: BTreeMap<String, Tensor> =
            fixed.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).into();
        let of_added = added.iter().flat_map(|both| ADDED.into_iter().zip(both));
        inputs.extend(of_added.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())));
        inputs.extend(residuals.iter().enumerate().map(|(i, tensor)| (residual_name(i), tensor.shallow_clone())));
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            let given = UnetInputs { sample, timestep: timesteps, context: tokens, added, residuals };
            reference(&given).context("the network that the package is compared with")?
        };
        let name = format!("timestep {timestep}");
        Ok(Case { name, inputs, expected: [(output.name.clone(), expected)].into() })
    });
    compare(package, cases, settings)
}

/// Types of a UNet's inputs.
struct UnetKinds<'a> {
    sample: &'a TensorType,
    timestep: &'a TensorType,
    context: &'a TensorType,
    /// Of SDXL's pooled text.
    added: Option<&'a TensorType>,
    residuals: Vec<&'a TensorType>,
}

/// What SDXL is told besides the prompt's tokens, as [`UnetInputs::added`] has it.
const ADDED: [&str; 2] = ["text_embeds", "time_ids"];

/// Sizes as SDXL is told them, for pictures of the latents `sample`, uncropped.
fn sizes(sample: &TensorType, device: Device) -> Result<Tensor> {
    let (height, width) = (8 * sample.shape[2], 8 * sample.shape[3]);
    let row = Tensor::f_from_slice(&[height, width, 0, 0, height, width])?.f_to_kind(Kind::Float)?;
    Ok(row.f_unsqueeze(0)?.f_repeat([sample.shape[0], 1])?.f_to_device(device)?)
}

fn unet_inputs(package: &Chain) -> Result<UnetKinds<'_>> {
    let kind = |name: &str, ranks: &[usize]| {
        let found = package.inputs().iter().find(|input| input.name == name).map(|input| &input.kind);
        found.filter(|kind| kind.data_type.is_float() && ranks.contains(&kind.rank()))
    };
    let residuals: Vec<&TensorType> = (0..).map_while(|i| kind(&residual_name(i), &[4])).collect();
    let added = kind(ADDED[0], &[2])
        .filter(|text| kind(ADDED[1], &[2]).is_some_and(|sizes| sizes.shape == [text.shape[0], TIME_IDS]));
    let count = 3 + residuals.len() + if added.is_some() { ADDED.len() } else { 0 };
    match (kind("sample", &[4]), kind("timestep", &[1]), kind("encoder_hidden_states", &[3, 4])) {
        (Some(sample), Some(timestep), Some(context)) if package.inputs().len() == count => {
            ensure!(
                context.rank() == 3 || context.shape[2] == 1,
                "encoder_hidden_states of {} is {context}, neither [B,T,C] nor [B,C,1,T]",
                package.path().display()
            );
            Ok(UnetKinds { sample, timestep, context, added, residuals })
        }
        _ => {
            bail!(
                "{} is not a UNet: its inputs are {}; expected sample, timestep and encoder_hidden_states",
                package.path().display(),
                inputs_of(package)
            )
        }
    }
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

/// Compares a text encoder of `vocabulary` tokens with `reference(ids [B,T])`, which gives the outputs by name, on a
/// short text, padded, and on one as long as can be. `end` is the number of the end-of-text.
///
/// # Errors
/// When the package has other inputs than `input_ids`, and what `reference` returns.
pub fn verify_text_encoder(
    package: &Chain,
    (vocabulary, end): (i64, i64),
    reference: &mut dyn FnMut(&Tensor) -> Result<BTreeMap<String, Tensor>>,
    settings: &Settings<'_>,
) -> Result<Report> {
    let shown = package.path().display();
    let [input] = package.inputs() else {
        bail!("{shown} has the inputs {}, one is expected", inputs_of(package));
    };
    let [batch, tokens] = input.kind.shape[..] else { bail!("{shown} takes {}, not [1, 77]", input.kind) };
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    // Below the end-of-text, which is the largest id or one before others that texts do not hold.
    let words = end.min(vocabulary - 1).max(1) as u64;
    let lengths = [("short text", 7.min(tokens - 1)), ("long text", tokens - 1)];
    let cases = lengths.into_iter().map(|(name, length)| {
        let id = |place: i64| if place < length { (random.next_u64() % words) as i64 } else { end };
        let ids: Vec<i64> = (0..batch * tokens).map(|at| at % tokens).map(id).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_view([batch, tokens])?.f_to_device(settings.device)?;
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            reference(&ids).context("the network that the package is compared with")?
        };
        let fed = if input.kind.data_type.is_float() { ids.f_to_kind(Kind::Float)? } else { ids };
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
