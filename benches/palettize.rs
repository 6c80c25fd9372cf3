//! Palettes without training: those of SD 1.5's UNet beside coremltools' `palettize_weights`, both by k-means, 4 bits.
//!
//!     PALETTIST_PEERS=PYTHON make bench
//!
//! Every layer of the real architecture, with random weights; layers of one shape have the same. Ours are made all at once,
//! as `palettist palettize` does; coremltools makes one of each shape, and is reckoned to take as long for each other of
//! that shape. Errors are squared, over the sum of squares of the weights.

#[path = "measure.rs"]
mod measure;
#[path = "peer.rs"]
mod peer;

use std::collections::BTreeMap;
use std::ffi::OsStr;

use measure::{Cost, median, once};
use palettist::networks::unet::UnetConfig;
use palettist::ops::Weights;
use palettist::palette::{Form, post_training};
use tch::{Device, Kind, Tensor};

const BITS: u32 = 4;

fn main() {
    let parameters = UnetConfig::from_json(&serde_json::json!({"cross_attention_dim": 768}))
        .expect("diffusers' defaults are SD 1.5's")
        .parameters();
    let chosen: BTreeMap<String, Form> = parameters
        .iter()
        .filter(|p| p.palettizable && p.shape.iter().product::<i64>() > 2048)
        .map(|p| (p.name.clone(), Form::per_tensor(BITS)))
        .collect();
    let layers: BTreeMap<&str, &Vec<i64>> =
        parameters.iter().filter(|p| chosen.contains_key(&p.name)).map(|p| (p.name.as_str(), &p.shape)).collect();
    let mut of_shape: BTreeMap<&Vec<i64>, (Tensor, usize)> = BTreeMap::new();
    for shape in layers.values() {
        let drawn = || (Tensor::randn(shape.as_slice(), (Kind::Float, Device::Cpu)) * 0.02).to_kind(Kind::Half);
        of_shape.entry(shape).or_insert_with(|| (drawn(), 0)).1 += 1;
    }
    let mut made = None;
    let mut palettize = || {
        let weights = layers.iter().map(|(name, shape)| Ok((name.to_string(), of_shape[shape].0.shallow_clone())));
        // Handles go from thread to thread by themselves, but not what they are taken from.
        let weights: Vec<_> = weights.collect();
        let palettes = post_training::palettize(weights.into_iter(), &chosen, Weights::new(), BTreeMap::new(), &|_| ());
        made = Some(palettes.expect("finite weights"));
    };
    let costs: Vec<Cost> = (0..3).map(|_| once(&mut palettize)).collect();
    let [wall, cpu] =
        [|cost: &Cost| cost.wall, |cost: &Cost| cost.cpu].map(|of| median(costs.iter().map(of).collect()));
    let memory = costs.into_iter().reduce(Cost::least).unwrap_or_default().memory;
    let made = made.expect("it was made");
    println!("{} layers of {} shapes, {BITS} bits", layers.len(), of_shape.len());
    println!("ours: {wall:.2} s wall, {cpu:.2} s CPU, {:.2} GB", memory * 1e-9);
    let folder = tempfile::tempdir().expect("a folder for weights");
    let (mut their_wall, mut their_cpu, mut largest) = (0.0, 0.0, 0.0f64);
    for (shape, (weight, count)) in &of_shape {
        let file = folder.path().join("weight.safetensors");
        Tensor::write_safetensors(&[("weight", weight)], &file).expect("it can be written");
        let arguments = [file.as_os_str(), BITS.to_string().as_ref()].map(OsStr::to_owned);
        let Some([one_wall, one_cpu, error]) = peer::ask("palettize.py", &arguments) else {
            return println!("coremltools was not run: $PALETTIST_PEERS names no Python that has it");
        };
        let name = layers.iter().find(|(_, of)| *of == shape).map(|(name, _)| *name).expect("a layer of each shape");
        let soft = made.palettes[name].tensor(Kind::Double, Device::Cpu).expect("a palette");
        let weight = weight.to_kind(Kind::Double);
        let square = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
        let beside = square(&(soft - &weight)) / square(&weight) / error;
        largest = largest.max(beside);
        println!(
            "{count:3} of {shape:?}: coremltools {one_wall:.3} s wall, {one_cpu:.3} s CPU; our error {beside:.6} of its"
        );
        their_wall += one_wall * *count as f64;
        their_cpu += one_cpu * *count as f64;
    }
    println!(
        "coremltools: {their_wall:.1} s wall, {their_cpu:.1} s CPU: {:.0} and {:.0} times ours; our error at most \
         {largest:.6} of its",
        their_wall / wall,
        their_cpu / cpu
    );
}
