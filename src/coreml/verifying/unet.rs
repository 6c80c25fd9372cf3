//! Comparing a UNet, which has the most inputs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use tch::{Device, Kind, Tensor};

use super::{Case, Report, Settings, compare, inputs_of, normal};
use crate::coreml::components::unet::residual_name;
use crate::coreml::reading::{Chain, TensorType};
use crate::networks::unet::{Added, Condition, TIME_IDS};

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
