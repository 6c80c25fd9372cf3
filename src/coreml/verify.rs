//! Comparing a UNet package with the network that it was made from: the same random inputs through both.
//!
//! The package is read back from disk and run by [`read`](super::read). With 32-bit arithmetic only what export did is
//! left of the difference; with 16 bits it is what a phone will compute.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use super::read::{DataType, Package, Precision, TensorType, evaluate, psnr};

/// What to compare on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of the random inputs.
    pub seed: u64,
    /// Of 1000: little noise, half, nearly all. The last tells whether the sinusoid of large numbers survived.
    pub timesteps: Vec<i64>,
    pub device: Device,
}

impl Default for Settings {
    fn default() -> Self {
        Self { seed: 0, timesteps: vec![1, 501, 981], device: Device::Cpu }
    }
}

/// Agreement at one timestep, in dB ([`psnr`]).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    pub timestep: i64,
    pub float32: f64,
    pub float16: f64,
}

/// What [`verify_unet`] found; prints as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub specification_version: i32,
    pub operations: usize,
    pub file_bytes: u64,
    /// Of the weights of convolutions and linear layers, tables counted.
    pub bits_per_weight: f64,
    /// Weights of convolutions and linear layers, and how many of them are palettized.
    pub layers: usize,
    pub palettized: usize,
    pub rows: Vec<Row>,
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
            self.palettized, self.layers, self.bits_per_weight
        )?;
        writeln!(f, "timestep   PSNR, 32 bits   PSNR, 16 bits")?;
        for row in &self.rows {
            writeln!(f, "{:8} {:12.2} dB {:12.2} dB", row.timestep, row.float32, row.float16)?;
        }
        Ok(())
    }
}

/// Reads a UNet package and compares it with `reference(sample [B,4,h,w], timestep [B], context [B,T,C])`, which gives
/// the predicted noise `[B,4,h,w]`. The package takes the context as `[B,T,C]` or, as Apple's, `[B,C,1,T]`.
///
/// # Errors
/// When the package is not sound or not a UNet with the inputs `sample`, `timestep` and `encoder_hidden_states` and one
/// output, and what `reference` returns.
pub fn verify_unet(
    package: &Path,
    reference: &mut dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    settings: &Settings,
) -> Result<Report> {
    let package = Package::open(package)?;
    let mut rows = Vec::new();
    let mut random = ChaCha8Rng::seed_from_u64(settings.seed);
    let [sample_kind, timestep_kind, context_kind] = unet_inputs(&package)?;
    let [output] = package.outputs() else {
        bail!("{} has {} outputs, a UNet has one", package.path().display(), package.outputs().len());
    };
    for &timestep in &settings.timesteps {
        let sample = normal(&mut random, sample_kind)?.f_to_device(settings.device)?;
        let context = normal(&mut random, context_kind)?.f_to_device(settings.device)?;
        let timesteps = Tensor::f_full(&timestep_kind.shape, timestep as f64, (Kind::Float, settings.device))?;
        let tokens = if context_kind.rank() == 4 {
            context.f_squeeze_dim(2)?.f_transpose(1, 2)?
        } else {
            context.shallow_clone()
        };
        let expected = {
            let _no_gradients = tch::no_grad_guard();
            reference(&sample, &timesteps, &tokens).context("the network that the package is compared with")?
        };
        ensure!(
            expected.size() == output.kind.shape,
            "{} gives {}, the network a shape {:?}",
            package.path().display(),
            output.kind,
            expected.size()
        );
        let inputs = BTreeMap::from([
            ("sample".to_string(), sample),
            ("timestep".to_string(), timesteps),
            ("encoder_hidden_states".to_string(), context),
        ]);
        let run = |precision| -> Result<f64> {
            let got = evaluate(&package, &inputs, precision)?;
            Ok(psnr(&expected, got.get(&output.name).context("no output was computed")?))
        };
        rows.push(Row { timestep, float32: run(Precision::Float32)?, float16: run(Precision::Float16)? });
    }
    let weights = package.weights()?;
    let layers: Vec<_> = weights.iter().filter(|weight| weight.layer).collect();
    let (bytes, elements) =
        layers.iter().fold((0, 0), |(bytes, elements), weight| (bytes + weight.bytes, elements + weight.elements));
    Ok(Report {
        specification_version: package.specification_version(),
        operations: package.operation_counts().values().sum(),
        file_bytes: package.file_bytes(),
        bits_per_weight: 8.0 * bytes as f64 / elements.max(1) as f64,
        layers: layers.len(),
        palettized: layers.iter().filter(|weight| weight.palettes.is_some()).count(),
        rows,
    })
}

/// Types of sample, timestep and context.
fn unet_inputs(package: &Package) -> Result<[&TensorType; 3]> {
    let kind = |name: &str, ranks: &[usize]| {
        let found = package.inputs().iter().find(|input| input.name == name).map(|input| &input.kind);
        found.filter(|kind| kind.data_type.is_float() && ranks.contains(&kind.rank()))
    };
    match (kind("sample", &[4]), kind("timestep", &[1]), kind("encoder_hidden_states", &[3, 4])) {
        (Some(sample), Some(timestep), Some(context)) if package.inputs().len() == 3 => {
            ensure!(
                context.rank() == 3 || context.shape[2] == 1,
                "encoder_hidden_states of {} is {context}, neither [B,T,C] nor [B,C,1,T]",
                package.path().display()
            );
            Ok([sample, timestep, context])
        }
        _ => {
            let found: Vec<_> = package.inputs().iter().map(|input| format!("{} {}", input.name, input.kind)).collect();
            bail!(
                "{} is not a UNet: its inputs are {}; expected sample, timestep and encoder_hidden_states",
                package.path().display(),
                found.join(", ")
            )
        }
    }
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
