//! Differentiable k-means of vectors against full autograd: reference values, and libtorch's own autograd in f64.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{dense, distance, shared};
use palettist::files::TensorFile;
use palettist::ops::Weights;
use palettist::palette::{DkmLayer, Form, Frozen, LutDtype, SoftenRows};
use tch::{Device, Kind, Tensor};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Seeds libtorch's generator, which all threads share, until the guard goes.
fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    guard
}

fn form(bits: u32, cluster_dim: usize) -> Form {
    Form { cluster_dim, ..Form::per_tensor(bits) }
}

/// One step of a layer: the soft weight and the state.
fn step(layer: &mut DkmLayer, weight: &Tensor, rho: f64) -> (Tensor, SoftenRows) {
    let mut soft = weight.empty_like();
    let state = layer.soften(weight, rho, 3, None, &mut soft).unwrap();
    (soft, state)
}

fn backward(state: &SoftenRows, upstream: &Tensor) -> Tensor {
    let mut gradient = upstream.copy();
    state.backward(&mut gradient).unwrap();
    gradient
}

/// Vectors of one group, `[n, d]`, of a part of a weight; and back.
fn vectors(part: &Tensor, form: Form) -> Tensor {
    let (dim, rows) = (form.cluster_dim as i64, part.transpose(0, form.axis as i64));
    rows.reshape([rows.size()[0] / dim, dim, -1]).transpose(1, 2).reshape([-1, dim])
}

fn weights(vectors: &Tensor, part: &Tensor, form: Form) -> Tensor {
    let (dim, rows) = (form.cluster_dim as i64, part.transpose(0, form.axis as i64));
    let planes = vectors.reshape([rows.size()[0] / dim, -1, dim]).transpose(1, 2);
    planes.reshape(rows.size()).transpose(0, form.axis as i64)
}

/// Differentiable k-means of vectors by the book, for autograd: (soft vectors, centroids).
fn by_the_book(points: &Tensor, centroids: &Tensor, tau: f64) -> (Tensor, Tensor) {
    let mut centroids = centroids.shallow_clone();
    let mut attention = Tensor::new();
    for _ in 0..3 {
        let away = (points.unsqueeze(1) - &centroids).square().sum_dim_intlist(2i64, false, Kind::Double);
        attention = (-away / tau).softmax(1, Kind::Double);
        let mass = attention.sum_dim_intlist(0i64, false, Kind::Double);
        centroids = attention.transpose(0, 1).matmul(points) / mass.unsqueeze(1);
    }
    (attention.matmul(&centroids), centroids)
}

/// Soft weight, centroids and gradient of a layer by the book.
fn layer_by_the_book(layer: &DkmLayer, weight: &Tensor, rho: f64, upstream: &Tensor) -> [Tensor; 3] {
    let form = layer.form;
    let wide = weight.to_kind(Kind::Double).set_requires_grad(true);
    let groups = form.groups(&weight.size());
    let (mut soft, mut centroids) = (Vec::new(), Vec::new());
    for (group, part) in wide.chunk(groups as i64, form.axis as i64).iter().enumerate() {
        let table = form.cluster_dim << form.bits;
        let entries = Tensor::from_slice(&layer.centroids[group * table..][..table]);
        let entries = entries.view([-1, form.cluster_dim as i64]);
        let (one, new) = by_the_book(&vectors(part, form), &entries, layer.temperature(group, rho));
        soft.push(weights(&one, part, form));
        centroids.push(new.view(-1));
    }
    let soft = Tensor::cat(&soft, form.axis as i64);
    let gradient = Tensor::run_backward(&[(&soft * upstream).sum(Kind::Double)], &[&wide], false, false).remove(0);
    [soft, Tensor::cat(&centroids, 0), gradient]
}

#[test]
fn reference_values() {
    let Some(folder) = shared("dkm_vectors") else { return };
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let mut checked = 0;
    for case in cases.as_array().unwrap().iter().filter(|case| case["cluster_dim"] != 1) {
        let name = case["name"].as_str().unwrap();
        let file = TensorFile::open(&folder.join(format!("{name}.safetensors"))).unwrap();
        let get = |part: &str| file.tensor(part).unwrap();
        let numbers = |part: &str| Vec::<f64>::try_from(get(part).to_kind(Kind::Double).view(-1)).unwrap();
        let form = Form {
            group_size: case["group_size"].as_u64().map(|size| size as usize),
            ..form(case["entries"].as_u64().unwrap().ilog2(), case["cluster_dim"].as_u64().unwrap() as usize)
        };
        let weight = get("weight").to_kind(Kind::Float);
        let mut layer = DkmLayer::new(name, form, &weight).unwrap();
        // Temperatures are given as they are.
        (layer.centroids, layer.kmeans_mse) = (numbers("centroids_in"), numbers("tau"));
        let (soft, state) = step(&mut layer, &weight, 1.0);
        let gradient = backward(&state, &get("upstream").to_kind(Kind::Float));
        let errors = [
            distance(&soft, &get("soft_weight")),
            distance(&Tensor::from_slice(&layer.centroids), &get("centroids_out")),
            distance(&gradient, &get("gradient")),
        ];
        eprintln!("{name}: soft weight {:.1e}, centroids {:.1e}, gradient {:.1e}", errors[0], errors[1], errors[2]);
        assert!(errors[0] < 1e-6 && errors[1] < 1e-6 && errors[2] < 1e-5, "{name}: {errors:?}");
        checked += 1;
    }
    assert_eq!(checked, 2);
}

/// Forms with vectors: one table or several, along output or input channels.
fn forms(bits: u32, cluster_dim: usize) -> [Form; 4] {
    let plain = form(bits, cluster_dim);
    let grouped = Form { group_size: Some(8), ..plain };
    [plain, Form { axis: 1, ..plain }, grouped, Form { axis: 1, ..grouped }]
}

#[test]
fn gradients_are_autograds_for_every_form_and_temperature() {
    let _alone = seeded(7);
    let forms = [(1, 2), (4, 2), (8, 2), (2, 4), (8, 4)].into_iter().flat_map(|(bits, dim)| forms(bits, dim));
    for (round, form) in forms.enumerate() {
        let shape: &[i64] = [&[16i64, 24, 3, 3] as &[i64], &[24, 40], &[8, 8, 1, 1]][round % 3];
        let scale = [0.02, 1.0, 1e-3][round % 3];
        let weight = (Tensor::randn(shape, DOUBLE) * scale + 0.3 * scale).to_kind(Kind::Float);
        let upstream = Tensor::randn(shape, FLOAT);
        let rho = [1.0, 0.3, 0.1][round % 3];
        let mut layer = DkmLayer::new("layer", form, &weight).unwrap();
        let [soft, centroids, gradient] = layer_by_the_book(&layer, &weight, rho, &upstream);
        let (ours, state) = step(&mut layer, &weight, rho);
        let case = format!("{form:?}, {shape:?}, ρ {rho}");
        if weight.numel() / form.cluster_dim / form.groups(shape) <= 1 << form.bits {
            // With an entry for each vector nothing is to be done.
            assert!(ours.equal(&weight) && backward(&state, &upstream).equal(&upstream), "{case}");
            continue;
        }
        assert!(distance(&ours, &soft) < 1e-5, "{case}: soft {:e}", distance(&ours, &soft));
        let moved = distance(&Tensor::from_slice(&layer.centroids), &centroids);
        assert!(moved < 1e-5, "{case}: centroids {moved:e}");
        let ours = backward(&state, &upstream);
        let (error, largest) = (distance(&ours, &gradient), gradient.abs().max().double_value(&[]));
        assert!(error < 1e-5, "{case}: gradient {error:e} of {largest:e}");
        eprintln!("{case}: gradient {error:.1e}");

        let saved: Weights = layer.tensors().unwrap().into_iter().collect();
        assert_eq!(DkmLayer::restore("layer", form, shape, &saved, Device::Cpu).unwrap(), layer);
    }
}

/// Large enough for several pieces, and for cells that are cut.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let _alone = seeded(3);
    let weight = Tensor::randn([1004, 900], FLOAT) * 0.02;
    let upstream = Tensor::randn([1004, 900], FLOAT);
    let layer = DkmLayer::new("layer", form(4, 2), &weight).unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (weight, upstream, mut layer) = (weight.shallow_clone(), upstream.shallow_clone(), layer.clone());
        pool.install(move || {
            let (soft, state) = step(&mut layer, &weight, 0.5);
            let gradient = backward(&state, &upstream);
            let frozen = layer.freeze(&weight).unwrap();
            (soft, gradient, layer, frozen.gradient(&upstream).unwrap(), frozen.palette().unwrap())
        })
    };
    let one = run(1);
    let many = run(3);
    assert!(one.0.equal(&many.0) && one.1.equal(&many.1) && one.3.equal(&many.3));
    assert_eq!((&one.2, &one.4), (&many.2, &many.4));
    let [soft, centroids, gradient] = layer_by_the_book(&layer, &weight, 0.5, &upstream);
    let errors = [
        distance(&one.0, &soft),
        distance(&Tensor::from_slice(&one.2.centroids), &centroids),
        distance(&one.1, &gradient),
    ];
    assert!(errors.iter().all(|&error| error < 1e-5), "{errors:?}");
}

#[test]
fn degenerate_layers_stay_finite() {
    let _alone = seeded(4);
    let normal = Vec::<f32>::try_from(Tensor::randn([4000], FLOAT)).unwrap();
    let outlier: Vec<f32> = normal[1..].iter().map(|v| v * 0.01).chain([6e4]).collect();
    let denormals: Vec<f32> = normal.iter().map(|v| v * 2e-6).collect();
    let far_below: Vec<f32> = normal.iter().map(|v| v * 1e-40).collect();
    let few: Vec<f32> = normal.iter().map(|v| v.round()).collect();
    let cases: [&[f32]; 8] = [
        &[0.0; 16],
        &[0.25; 16],
        &[-1.0, 1.0, 1.0, 1.0],
        &outlier,
        &denormals,
        &far_below,
        &few,
        &[1e-7, 3e4, 0.0, 0.0],
    ];
    for values in cases {
        for (bits, dim) in [(1, 2), (4, 2), (8, 2), (2, 4), (8, 4)] {
            let weight = Tensor::from_slice(values).view([4, -1]);
            let mut layer = DkmLayer::new("layer", form(bits, dim), &weight).unwrap();
            for rho in [1.0, 0.1, 1e-6] {
                let (soft, state) = step(&mut layer, &weight, rho);
                let gradient = backward(&state, &Tensor::ones_like(&weight));
                for tensor in [&soft, &gradient] {
                    let finite = tensor.isfinite().all().int64_value(&[]) == 1;
                    assert!(finite, "{bits} bits, d {dim}, rho {rho}, {:?}", &values[..4]);
                }
                assert!(layer.centroids.iter().all(|c| c.is_finite()));
                assert!(state.hard_error().is_finite());
            }
            let palette = layer.hard(&weight).unwrap();
            assert_eq!((palette.indices.len(), palette.entries.len()), (values.len() / dim, dim << bits));
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let weight = Tensor::from_slice(&[1.0, bad]).view([2, 1]);
        let message = format!("{:#}", DkmLayer::new("mid.weight", form(2, 2), &weight).unwrap_err());
        assert!(message.contains("mid.weight") && message.contains("1 of its values"), "{message}");
        let mut layer =
            DkmLayer::new("mid.weight", form(2, 2), &Tensor::from_slice(&[1.0f32, 2.0]).view([2, 1])).unwrap();
        let message = layer.soften(&weight, 1.0, 3, None, &mut weight.empty_like()).err().unwrap();
        assert!(format!("{message:#}").contains("mid.weight: some of its values are infinite"), "{message:#}");
        assert!(layer.hard(&weight).is_err());
    }
    // Channels that do not divide into vectors.
    let message = DkmLayer::new("v", form(4, 4), &Tensor::zeros([6, 4], FLOAT)).unwrap_err();
    assert!(format!("{message:#}").contains("parameter v: its 6 output channels do not divide"), "{message:#}");
}

#[test]
fn cooling_brings_the_soft_weight_to_the_hard_one() {
    let _alone = seeded(11);
    let weight = (Tensor::randn([64, 64], FLOAT) * 0.02).to_kind(Kind::Half).to_kind(Kind::Float);
    let mut layer = DkmLayer::new("layer", form(4, 2), &weight).unwrap();
    let halves = Vec::<half::f16>::try_from(weight.to_kind(Kind::Half).view(-1)).unwrap();
    let fit = palettist::palette::fit(&halves, &[64, 64], &layer.form).unwrap();
    // Before any step the layer's own palette is the post-training one.
    assert_eq!(layer.hard(&weight).unwrap(), fit.palette);
    assert!((layer.kmeans_mse[0] / fit.error - 1.0).abs() < 1e-5 && (layer.power / fit.power - 1.0).abs() < 1e-5);
    let mut gaps = Vec::new();
    for rho in [1.0, 0.1, 1e-3, 1e-5] {
        let (soft, state) = step(&mut layer, &weight, rho);
        let hard = layer.hard(&weight).unwrap().tensor(Kind::Float, Device::Cpu).unwrap();
        gaps.push(distance(&soft, &hard));
        let error = (&hard - &weight).square().mean(Kind::Double).double_value(&[]);
        // The reported error is of entries that are not rounded to f16 yet.
        assert!((state.hard_error() - error).abs() < 1e-3 * error, "{} is not {error}", state.hard_error());
    }
    assert!(gaps.is_sorted_by(|a, b| a > b) && gaps[3] < 0.02, "{gaps:?}");
}

#[test]
fn frozen_layers_train_their_entries_alone() {
    let _alone = seeded(5);
    let forms = [(4, 2), (8, 4)].into_iter().flat_map(|(bits, dim)| forms(bits, dim));
    for form in forms.flat_map(|form| [form, Form { lut_dtype: LutDtype::I8, ..form }]) {
        let shape = [16, 24, 3, 3];
        let weight = Tensor::randn(shape, FLOAT);
        let layer = DkmLayer::new("layer", form, &weight).unwrap();
        let mut frozen = layer.freeze(&weight).unwrap();
        let palette = frozen.palette().unwrap();
        let stored = palette.tensor(Kind::Float, Device::Cpu).unwrap();
        assert_eq!(palette, layer.hard(&weight).unwrap());
        assert!(dense(&frozen, &shape).equal(&stored), "{form:?}");
        assert!(distance(&stored, &weight) < 0.4, "{form:?}");

        // The gradient of the entries is that of a look-up: along it, the loss falls by its square.
        let upstream = Tensor::randn(shape, FLOAT);
        let gradient = frozen.gradient(&upstream).unwrap();
        assert_eq!(gradient.size(), frozen.entries.size());
        let saved: Weights = frozen.tensors().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
        let eps = 0.05 * (frozen.entries.norm() / gradient.norm()).double_value(&[]);
        frozen.entries = frozen.entries.copy() - &gradient * eps;
        let moved = dense(&frozen, &shape);
        assert!(moved.equal(&frozen.palette().unwrap().tensor(Kind::Float, Device::Cpu).unwrap()), "{form:?}");
        if form.lut_dtype == LutDtype::F16 {
            let change = ((&moved - &stored) * &upstream).sum(Kind::Double).double_value(&[]);
            let expected = -eps * gradient.square().sum(Kind::Double).double_value(&[]);
            assert!((change / expected - 1.0).abs() < 0.02, "{form:?}: {change} is not {expected}");
        }
        let restored = Frozen::restore("layer", form, &shape, &saved, Device::Cpu).unwrap();
        assert_eq!(restored.palette().unwrap(), palette);
        let message = format!("{:#}", Frozen::restore("layer", form, &[16, 24], &saved, Device::Cpu).unwrap_err());
        assert!(message.contains("is expected"), "{message}");
    }
}
