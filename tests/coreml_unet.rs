//! The forms of a UNet's package: what each computes is what the network computes, which is tested against diffusers.

mod common;

use std::collections::BTreeMap;

use common::{metadata, random, small_unet, weights};
use palettist::coreml::attention::AttentionImplementation::{self, Original, SplitEinsum, SplitEinsumV2};
use palettist::coreml::export::{UnetOptions, export_unet};
use palettist::coreml::read::{Package, Precision, evaluate, psnr};
use palettist::networks::unet::{UnetConfig, unet};
use palettist::ops::{Tensors, Weights};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// The inputs of a package and what the network makes of them.
struct Case {
    inputs: BTreeMap<String, Tensor>,
    expected: Tensor,
}

/// Random inputs for latents of a size, late in the noise, where errors of the timestep would show.
fn case(config: &UnetConfig, weights: &Weights, batch: i64, height: i64, width: i64) -> Case {
    let _no_gradients = tch::no_grad_guard();
    let drawn = random(3, &[vec![batch, 4, height, width], vec![batch, 77, config.cross_attention_dim]]);
    let timestep = Tensor::full([batch], 981, (Kind::Float, Device::Cpu));
    let weights: Weights = weights.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Float))).collect();
    let expected = unet(&mut Tensors::new(&weights), config, &drawn[0], &timestep, &drawn[1]);
    let context = drawn[1].transpose(1, 2).unsqueeze(2).contiguous();
    let inputs = [("sample", &drawn[0]), ("timestep", &timestep), ("encoder_hidden_states", &context)];
    let inputs = inputs.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).into();
    Case { inputs, expected }
}

/// How well a package of this form agrees in 32 and in 16 bits, and how many einsums it has.
fn agreement(
    config: &UnetConfig,
    weights: &Weights,
    attention: AttentionImplementation,
    (batch, height, width): (i64, i64, i64),
    case: &Case,
) -> (f64, f64, usize) {
    let folder = tempfile::tempdir().unwrap();
    let options = UnetOptions { attention, batch, height, width, ..UnetOptions::new(config) };
    let path = export_unet(config, weights, &options, &metadata(), folder.path(), &mut |_, _| {}).unwrap();
    let package = Package::open(&path).unwrap();
    let run = |precision| {
        let got = evaluate(&package, &case.inputs, precision).unwrap();
        psnr(&case.expected, &got["noise_pred"])
    };
    let einsums = package.operation_counts().get("einsum").copied().unwrap_or(0);
    (run(Precision::Float32), run(Precision::Float16), einsums)
}

/// Latents of `(batch, height, width)`, in SD 1's form or with SD 2's linear projections.
fn attentions_agree(linear: bool, size: (i64, i64, i64)) {
    let (batch, height, width) = size;
    let heads = if linear { json!([2, 3]) } else { json!(2) };
    let config = small_unet(8, [24, 48], heads, linear);
    let weights = weights(&config);
    let case = case(&config, &weights, batch, height, width);
    // Self- and cross-attention: on the way down and (twice) up at the first level, in the middle at the second.
    let pairs = |parts: i64, heads: i64| 2 * (parts * heads) as usize;
    let (heads, last) = (config.heads[0], config.heads[1]);
    let by_head = 2 * (3 * pairs(1, heads) + pairs(1, last));
    let parts = |tokens: i64| (tokens as u64).div_ceil(512) as i64;
    let in_parts = 2 * (3 * pairs(parts(height * width), heads) + pairs(parts(height * width / 4), last));
    for (attention, einsums) in [(Original, 0), (SplitEinsum, by_head), (SplitEinsumV2, in_parts)] {
        let (full, half, found) = agreement(&config, &weights, attention, size, &case);
        eprintln!("{attention}, {size:?}, linear {linear}: {full:.1} dB, in 16 bits {half:.1} dB, {found} einsums");
        assert!(full > 90.0 && half > 50.0, "{attention}, {size:?}: {full} dB, in 16 bits {half} dB");
        assert_eq!(found, einsums, "{attention}, {size:?}");
    }
}

#[test]
fn the_three_attentions_compute_the_same() {
    // 1120 and 280 tokens: 512 divides neither.
    attentions_agree(true, (2, 40, 28));
    // 1536 and 384.
    attentions_agree(false, (1, 48, 32));
}

/// `cargo test --test coreml_unet -- --ignored --nocapture`
#[test]
#[ignore = "a minute of large attention"]
fn the_three_attentions_compute_the_same_at_full_size() {
    attentions_agree(false, (1, 64, 64));
    attentions_agree(true, (1, 96, 64));
    // 5184 tokens, 64 more than 512 divides.
    attentions_agree(false, (1, 72, 72));
}
