//! Gradient checkpointing changes nothing but memory and time: outputs and gradients are the same to the last bit.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use palettist::networks::autoencoder::{AutoencoderConfig, decode, encode};
use palettist::networks::text_encoder::{TextEncoderConfig, text_encoder};
use palettist::networks::unet::{UnetConfig, unet};
use palettist::ops::{Activation, Block, Linear, Ops, Parameter, Tensors, Weights};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// The first case of this kind of network among those that are compared with diffusers.
fn case(kind: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/networks/cases.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    cases.into_iter().find(|case| case["name"].as_str().unwrap().starts_with(kind)).unwrap()["config"].clone()
}

/// Irregular numbers in −1…1 that depend on `index`, fp32.
fn draw(index: u64, shape: &[i64]) -> Tensor {
    let count = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu));
    let values = ((count * 12.9898 + index as f64 * 78.233).sin() * 43758.5453).frac();
    values.to_kind(Kind::Float).view(shape)
}

/// Random weights, norms and biases too; leaves of which those learn that `learns` names.
fn weights(parameters: &[Parameter], learns: impl Fn(&str) -> bool) -> Weights {
    let weight = |(index, parameter): (usize, &Parameter)| {
        let fan_in = parameter.shape[1..].iter().product::<i64>() as f64;
        let value = draw(index as u64, &parameter.shape) / (2.0 * fan_in).sqrt();
        let value = if parameter.name.contains("norm") { value + 1.0 } else { value };
        (parameter.name.clone(), value.set_requires_grad(learns(&parameter.name)))
    };
    parameters.iter().enumerate().map(weight).collect()
}

/// The gradients of named leaves.
type Found = BTreeMap<String, Option<Tensor>>;

fn gradients<'t>(leaves: impl IntoIterator<Item = (String, &'t Tensor)>) -> Found {
    let gradient = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined);
    leaves.into_iter().map(|(name, leaf)| (name, gradient(leaf))).collect()
}

fn of_weights<'w>(network: &str, weights: &'w Weights) -> Vec<(String, &'w Tensor)> {
    weights.iter().map(|(name, leaf)| (format!("{network}/{name}"), leaf)).collect()
}

/// Every gradient is there in both or in neither, and equal.
fn same(plain: &Found, again: &Found, at_least: usize) {
    assert!(plain.values().flatten().count() >= at_least);
    assert_eq!(plain.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>());
    for (name, gradient) in plain {
        match (gradient, &again[name]) {
            (None, None) => {}
            (Some(a), Some(b)) => {
                assert!(a.abs().max().double_value(&[]) > 0.0, "{name}: the gradient is zero");
                assert!(a.equal(b), "{name}: {}", (a - b).abs().max());
            }
            _ => panic!("{name}: a gradient with and without checkpointing, but not both"),
        }
    }
}

/// Text encoder and UNet trained together: two backward passes, summed, as with gradient accumulation. A part of the
/// weights is held, `learns` says which learn.
fn together(recomputes: bool, kind: Kind, learns: fn(&str) -> bool, context_learns: bool) -> (Tensor, Found) {
    // More threads than processors make these small networks slow.
    tch::set_num_threads(1);
    let config = UnetConfig::from_json(&case("unet")).unwrap();
    let mut text_config = TextEncoderConfig::from_json(&case("text")).unwrap();
    text_config.hidden_size = config.cross_attention_dim;
    text_config.heads = 2;
    let unet_weights = weights(&config.parameters(), learns);
    let text_weights = weights(&text_config.parameters(), |name| context_learns && learns(name));
    let sample = draw(1, &[2, config.in_channels, 9, 11]).set_requires_grad(true);
    let timesteps = Tensor::from_slice(&[7i64, 801]);
    let mut outputs = Vec::new();
    for pass in 0..2 {
        let ids: Vec<i64> = (0..22).map(|i| (i * 5 + pass) % text_config.vocab_size).collect();
        let ids = Tensor::from_slice(&ids).view([2, 11]);
        let text_ops = &mut Tensors::new(&text_weights).computing_in(kind).recomputing(recomputes);
        let context = text_encoder(text_ops, &text_config, &ids).last_hidden_state;
        let ops = &mut Tensors::new(&unet_weights).computing_in(kind).recomputing(recomputes);
        let output = unet(ops, &config, &sample.to_kind(kind), &timesteps, &context).to_kind(Kind::Float);
        (&output * draw(10 + pass as u64, &output.size())).sum(Kind::Float).backward();
        outputs.push(output.detach());
    }
    let mut leaves = of_weights("unet", &unet_weights);
    leaves.extend(of_weights("text", &text_weights));
    leaves.push(("sample".into(), &sample));
    (Tensor::stack(&outputs, 0), gradients(leaves))
}

#[test]
fn unet_and_text_encoder_have_the_same_gradients() {
    let all = |_: &str| true;
    for kind in [Kind::Float, Kind::BFloat16] {
        let (output, plain) = together(false, kind, all, true);
        let (again_output, again) = together(true, kind, all, true);
        assert!(output.equal(&again_output));
        same(&plain, &again, 100);
    }
    // A text encoder that is held.
    let (output, plain) = together(false, Kind::Float, all, false);
    let (again_output, again) = together(true, Kind::Float, all, false);
    assert!(output.equal(&again_output));
    assert!(again.iter().all(|(name, gradient)| gradient.is_some() != name.starts_with("text/")));
    same(&plain, &again, 100);
}

#[test]
fn weights_that_are_held_get_no_gradient() {
    // Half of a block's weights, and blocks without any that learn before and between those with some.
    let some = |name: &str| name.contains("attn1") || name.contains("conv2.bias") || name.contains("fc1");
    let (_, plain) = together(false, Kind::Float, some, true);
    let (_, again) = together(true, Kind::Float, some, true);
    same(&plain, &again, 10);
    assert!(again.iter().all(|(name, gradient)| gradient.is_some() == (some(name) || name == "sample")));
}

#[test]
fn the_autoencoder_has_the_same_gradients() {
    let config = AutoencoderConfig::from_json(&case("vae")).unwrap();
    let run = |recomputes: bool| {
        let weights = weights(&config.parameters(), |_| true);
        let image = draw(2, &[1, 3, 24, 40]).set_requires_grad(true);
        let ops = &mut Tensors::new(&weights).recomputing(recomputes);
        let moments = encode(ops, &config, &image);
        let output = decode(ops, &config, &moments.narrow(1, 0, config.latent_channels));
        ((&output * draw(3, &output.size())).sum(Kind::Float) + moments.square().sum(Kind::Float)).backward();
        let mut leaves = of_weights("vae", &weights);
        leaves.push(("image".into(), &image));
        (output.detach(), gradients(leaves))
    };
    let ((output, plain), (again_output, again)) = (run(false), run(true));
    assert!(output.equal(&again_output));
    same(&plain, &again, 50);
}

/// Counts its runs.
struct Counted(Arc<AtomicUsize>);

impl Block for Counted {
    fn run<O: Ops>(&self, ops: &mut O, inputs: &[O::Value]) -> O::Value {
        self.0.fetch_add(1, Ordering::Relaxed);
        let h = ops.linear(&inputs[0], "layer", Linear { in_features: 3, out_features: 3, bias: false });
        let h = ops.activation(&h, Activation::Silu);
        ops.add(&h, &inputs[0])
    }
}

#[test]
fn a_block_runs_again_only_where_a_gradient_is_asked_for() {
    let counted = |recomputes: bool, learns: bool, graph: bool| {
        let runs = Arc::new(AtomicUsize::new(0));
        let weights = Weights::from([("layer.weight".to_owned(), draw(0, &[3, 3]).set_requires_grad(learns))]);
        let x = draw(1, &[2, 3]);
        let run = || Tensors::new(&weights).recomputing(recomputes).block(Counted(runs.clone()), &[&x]);
        let y = if graph { run() } else { tch::no_grad(run) };
        assert_eq!(y.requires_grad(), learns && graph);
        if y.requires_grad() {
            y.sum(Kind::Float).backward();
            assert!(weights["layer.weight"].grad().defined() && !x.grad().defined());
        }
        runs.load(Ordering::Relaxed)
    };
    assert_eq!(counted(true, true, true), 2);
    assert_eq!(counted(false, true, true), 1);
    assert_eq!(counted(true, false, true), 1);
    assert_eq!(counted(true, true, false), 1);
}
