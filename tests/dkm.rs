//! Differentiable k-means against full autograd: reference values, and libtorch's own autograd in f64.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{dense, distance, shared};
use half::f16;
use palettist::files::TensorFile;
use palettist::ops::Weights;
use palettist::palette::clustering::Clustering;
use palettist::palette::{AdamWStep, Code, Gradient, Histogram, Level};
use palettist::palette::{DkmLayer, Form, Frozen, LutDtype, Palette, Soften, SoftenRows, kmeans, soften};
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

/// The soft weight, the centroids and the state of [`soften`].
fn softened(weight: &Tensor, centroids: &[f64], tau: f64, iterations: usize, code: Code) -> (Tensor, Vec<f64>, Soften) {
    let mut soft = weight.empty_like();
    let (centroids, state) = soften(weight, centroids, tau, iterations, code, &mut soft).unwrap();
    (soft, centroids, state)
}

/// One step of a layer: the soft weight and the state.
fn step(layer: &mut DkmLayer, weight: &Tensor, rho: f64, code: Option<Code>) -> (Tensor, SoftenRows) {
    let mut soft = weight.empty_like();
    let state = layer.soften(weight, rho, 3, code, &mut soft).unwrap();
    (soft, state)
}

/// ∂L/∂w, of one table or of a layer.
trait Backward {
    fn in_place(&self, gradient: &mut Tensor) -> anyhow::Result<()>;
}

impl Backward for Soften {
    fn in_place(&self, gradient: &mut Tensor) -> anyhow::Result<()> {
        self.backward(gradient)
    }
}

impl Backward for SoftenRows {
    fn in_place(&self, gradient: &mut Tensor) -> anyhow::Result<()> {
        self.backward(gradient)
    }
}

fn backward(state: &impl Backward, upstream: &Tensor) -> Tensor {
    let mut gradient = upstream.copy();
    state.in_place(&mut gradient).unwrap();
    gradient
}

#[test]
fn reference_values() {
    let Some(folder) = shared("dkm_vectors") else { return };
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let mut checked = 0;
    for case in cases.as_array().unwrap() {
        if !case["group_size"].is_null() || case["cluster_dim"] != 1 {
            continue; // one scalar palette a tensor here
        }
        let name = case["name"].as_str().unwrap();
        let file = TensorFile::open(&folder.join(format!("{name}.safetensors"))).unwrap();
        let get = |part: &str| file.tensor(part).unwrap();
        let centroids = Vec::<f64>::try_from(get("centroids_in").to_kind(Kind::Double).view(-1)).unwrap();
        let tau = get("tau").to_kind(Kind::Double).double_value(&[0]);
        let weight = get("weight").to_kind(Kind::Float);
        // Those that are rounded to bf16 are numbers of f16 too where they are not next to zero: everything times 256.
        let up = if case["rounded_to"] == "bf16" { 256.0 } else { 1.0 };
        let centroids: Vec<f64> = centroids.iter().map(|c| c * up).collect();
        let iterations = case["iterations"].as_u64().unwrap() as usize;
        let (soft, centroids, state) =
            softened(&(weight.copy() * up), &centroids, tau * up * up, iterations, Code::F16);
        let (soft, centroids) = (soft / up, centroids.iter().map(|c| c / up).collect::<Vec<f64>>());
        let gradient = backward(&state, &get("upstream").to_kind(Kind::Float));
        assert_eq!((soft.size(), gradient.size()), (weight.size(), weight.size()));
        let errors = [
            distance(&soft, &get("soft_weight")),
            distance(&Tensor::from_slice(&centroids), &get("centroids_out")),
            distance(&gradient, &get("gradient")),
        ];
        eprintln!("{name}: soft weight {:.1e}, centroids {:.1e}, gradient {:.1e}", errors[0], errors[1], errors[2]);
        assert!(errors[0] < 1e-6 && errors[1] < 1e-9 && errors[2] < 1e-6, "{name}: {errors:?}");
        checked += 1;
    }
    assert_eq!(checked, 14);
}

/// coremltools' own palettizer in every granularity that it has, without its approximations (`tests/oracle/dkm.py`).
#[test]
fn coremltools_palettizer_has_the_same_gradients() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/palettes"));
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("dkm.json")).unwrap()).unwrap();
    let file = TensorFile::open(&folder.join("dkm.safetensors")).unwrap();
    let (weight, upstream) = (file.tensor("weight").unwrap(), file.tensor("upstream").unwrap());
    let shape = weight.size();
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (tau, number) = (case["tau"].as_f64().unwrap(), |key: &str| case[key].as_u64().map(|n| n as usize));
        let get = |part: &str| file.tensor(&format!("{name}.{part}"));
        let scales = get("scales");
        let form = Form {
            group_size: number("group_size"),
            cluster_dim: number("cluster_dim").unwrap(),
            per_channel_scale: scales.is_ok(),
            ..Form::per_tensor(number("bits").unwrap() as u32)
        };
        // A layer that stands where theirs does, at their temperature.
        let unit = Tensor::full([form.groups(&shape) as i64 + 1], tau, (Kind::Double, Device::Cpu));
        let mut saved: Weights =
            [("layer.centroids".to_owned(), get("start").unwrap().view(-1)), ("layer.kmeans".to_owned(), unit)].into();
        saved.extend(scales.into_iter().map(|scales| ("layer.scales".to_owned(), scales)));
        let mut layer = DkmLayer::restore("layer", form, &shape, &saved, Device::Cpu).unwrap();
        let mut soft = Tensor::empty_like(&weight);
        let state = layer.soften(&weight, 1.0, number("iterations").unwrap(), Some(Code::F16), &mut soft).unwrap();
        let gradient = backward(&state, &upstream);
        let errors = [
            distance(&soft, &get("soft").unwrap()),
            distance(&Tensor::from_slice(&layer.centroids), &get("centroids").unwrap().view(-1)),
            distance(&gradient, &get("gradient").unwrap()),
        ];
        eprintln!("{name}: soft weight {:.1e}, centroids {:.1e}, gradient {:.1e}", errors[0], errors[1], errors[2]);
        // Vectors are computed in 32 bits.
        let near = if form.cluster_dim == 1 { 1e-6 } else { 1e-5 };
        assert!(errors.iter().all(|&error| error < near), "{name}: {errors:?}");
    }
    assert_eq!(cases.as_array().unwrap().len(), 15);
}

/// Differentiable k-means by the book, weights × entries, for autograd: (soft weight, centroids).
fn by_the_book(weight: &Tensor, centroids: &Tensor, tau: f64, iterations: usize) -> (Tensor, Tensor) {
    let column = weight.view([-1, 1]);
    let mut centroids = centroids.shallow_clone();
    let mut attention = Tensor::new();
    for _ in 0..iterations {
        attention = (-(&column - &centroids.view([1, -1])).square() / tau).softmax(1, Kind::Double);
        let mass = attention.sum_dim_intlist(0i64, false, Kind::Double);
        centroids = (&attention * &column).sum_dim_intlist(0i64, false, Kind::Double) / mass;
    }
    (attention.matmul(&centroids.view([-1, 1])).view_as(weight), centroids)
}

/// What is seen of a weight through a code, by libtorch's own rounding.
fn rounded(weight: &Tensor, code: Code) -> Tensor {
    match code {
        Code::F16 => weight.to_kind(Kind::Half).to_kind(Kind::Float),
        Code::Fixed { step } => (weight / f64::from(step)).round() * f64::from(step),
    }
}

#[test]
fn gradients_are_autograds_at_every_size_and_temperature() {
    let _alone = seeded(7);
    for (round, bits) in [1u32, 2, 4, 6, 8].into_iter().cycle().take(20).enumerate() {
        let shape: &[i64] = [&[700i64] as &[i64], &[23, 7, 3, 3], &[1, 1], &[60, 61]][round % 4];
        let (scale, rho) = ([0.02, 1.0, 1e-3][round % 3], [1.0, 0.3, 0.1, 3.0][round / 5]);
        let weight = (Tensor::randn(shape, DOUBLE) * scale + 0.3 * scale).to_kind(Kind::Float);
        let upstream = Tensor::randn(shape, FLOAT);
        let layer = DkmLayer::new("layer", Form::per_tensor(bits), &weight).unwrap();
        let code = [Code::F16, layer.code(0, rho)][round % 2];
        let weight = rounded(&weight, code);
        let tau = layer.temperature(0, rho);
        let wide = weight.to_kind(Kind::Double).set_requires_grad(true);
        let (book_soft, book_centroids) = by_the_book(&wide, &Tensor::from_slice(&layer.centroids), tau, 3);
        let book = Tensor::run_backward(&[(&book_soft * &upstream).sum(Kind::Double)], &[&wide], false, false);

        let (soft, centroids, state) = softened(&weight, &layer.centroids, tau, 3, code);
        let gradient = backward(&state, &upstream);
        // Where there are more entries than values, entries differ by rounding only and attention may be anything.
        let case = format!("{bits} bits, {shape:?}, scale {scale}, {code:?}");
        assert!(distance(&soft, &book_soft) < 1e-6, "{case}: soft {:e}", distance(&soft, &book_soft));
        assert!(distance(&Tensor::from_slice(&centroids), &book_centroids) < 1e-7, "{case}");
        let error = distance(&gradient, &book[0]);
        let largest = book[0].abs().max().double_value(&[]);
        assert!(error < 2e-6 || largest < 1e-9, "{case}: gradient {error:e} of {largest:e}");
    }
}

#[test]
fn the_table_is_exact_in_f64_and_agrees_with_finite_differences() {
    // Values that f16 holds, so that moving one to its neighbour is a finite difference through the whole table.
    let values: Vec<f16> = (0..64).map(|i| f16::from_f64((i as f64 * 0.7).sin() + 0.01 * i as f64)).collect();
    let upstream: Vec<f64> = (0..64).map(|i| (i as f64 * 1.3).cos()).collect();
    let centroids = [-0.8, -0.1, 0.45, 1.2];
    let tau = 0.3;
    let wide: Vec<f64> = values.iter().map(|v| v.to_f64()).collect();
    let weight = Tensor::from_slice(&wide).set_requires_grad(true);
    let (soft, out) = by_the_book(&weight, &Tensor::from_slice(&centroids), tau, 3);
    let loss = (&soft * Tensor::from_slice(&upstream)).sum(Kind::Double);
    let book = Vec::<f64>::try_from(&Tensor::run_backward(&[&loss], &[&weight], false, false)[0]).unwrap();

    let loss_of = |values: &[f16]| -> f64 {
        let table = Clustering::cluster(Histogram::of_halves(values).unwrap(), &centroids, tau, 3).unwrap();
        let (bins, soft) = (&table.histogram().bins, table.soft_values());
        let place = |v: &f16| bins.iter().position(|&bin| bin == v.to_bits()).unwrap();
        values.iter().zip(&upstream).map(|(v, g)| g * soft[place(v)]).sum()
    };
    assert!((loss_of(&values) - loss.double_value(&[])).abs() < 1e-13);
    let table = Clustering::cluster(Histogram::of_halves(&values).unwrap(), &centroids, tau, 3).unwrap();
    for (ours, theirs) in table.entries().iter().zip(Vec::<f64>::try_from(out).unwrap()) {
        assert!((ours - theirs).abs() < 1e-13);
    }
    let bins = &table.histogram().bins;
    let place = |v: &f16| bins.iter().position(|&bin| bin == v.to_bits()).unwrap();
    let mut sums = vec![0.0; bins.len()];
    values.iter().zip(&upstream).for_each(|(v, g)| sums[place(v)] += g);
    let lines = table.backward(&sums);
    for i in 0..values.len() {
        let ours = {
            let (direct, through) = lines[place(&values[i])];
            upstream[i] * direct + through
        };
        assert!((ours - book[i]).abs() < 1e-12, "{i}: {ours} is not {}", book[i]);
        if values[i].to_f64().abs() < 0.01 {
            continue; // ulps near zero are too small for a difference
        }
        // Steps of a few ulps of f16 to both sides.
        let moved = |steps: i32| {
            let mut moved = values.clone();
            moved[i] = f16::from_bits((values[i].to_bits() as i32 + steps) as u16);
            (loss_of(&moved), moved[i].to_f64())
        };
        let ((above, right), (below, left)) = (moved(2), moved(-2));
        let difference = (above - below) / (right - left);
        assert!((ours - difference).abs() < 1e-3, "{i}: {ours} is not {difference}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let _alone = seeded(3);
    // Four pieces, the last of them short.
    let weight = Tensor::randn([1001, 900], FLOAT) * 0.02;
    let upstream = Tensor::randn([1001, 900], FLOAT);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (weight, upstream) = (weight.shallow_clone(), upstream.shallow_clone());
        pool.install(move || {
            let mut layer = DkmLayer::new("layer", Form::per_tensor(4), &weight).unwrap();
            let (soft, state) = step(&mut layer, &weight, 0.5, None);
            let gradient = backward(&state, &upstream);
            let frozen = layer.freeze(&weight).unwrap();
            (soft, gradient, layer, frozen.gradient(&upstream).unwrap(), frozen.palette().unwrap())
        })
    };
    let one = run(1);
    for threads in [2, 5] {
        let many = run(threads);
        assert!(one.0.equal(&many.0) && one.1.equal(&many.1) && one.3.equal(&many.3));
        assert_eq!((&one.2, &one.4), (&many.2, &many.4));
    }
}

#[test]
fn degenerate_layers_stay_finite() {
    let _alone = seeded(1);
    let tiny = f16::from_bits(1).to_f32();
    let normal = Vec::<f32>::try_from(Tensor::randn([4000], FLOAT)).unwrap();
    let outlier: Vec<f32> = normal.iter().map(|v| v * 0.01).chain([6e4]).collect();
    let denormals: Vec<f32> = normal.iter().map(|v| v * tiny * 40.0).collect();
    let far_below: Vec<f32> = normal.iter().map(|v| v * 1e-40).collect();
    let cases: [&[f32]; 8] =
        [&[], &[0.0; 9], &[0.25; 9], &[-1.0, 1.0, 1.0], &outlier, &denormals, &far_below, &[tiny, 3e4]];
    for values in cases {
        for bits in palettist::palette::BITS {
            for code in [Some(Code::F16), None, Some(Code::fixed(1e-4))] {
                let weight = Tensor::from_slice(values);
                let mut layer = DkmLayer::new("layer", Form::per_tensor(bits), &weight).unwrap();
                for rho in [1.0, 0.1, 1e-6] {
                    let (soft, state) = step(&mut layer, &weight, rho, code);
                    let gradient = backward(&state, &Tensor::ones_like(&weight));
                    for tensor in [&soft, &gradient] {
                        let finite = Vec::<f32>::try_from(tensor).unwrap().iter().all(|v| v.is_finite());
                        assert!(finite, "{bits} bits, rho {rho}, {:?}", &values[..values.len().min(4)]);
                    }
                    assert!(layer.centroids.iter().all(|c| c.is_finite()));
                    assert!(state.hard_error().is_finite());
                }
                let palette = layer.hard(&weight).unwrap();
                assert_eq!((palette.indices.len(), palette.entries.len()), (values.len(), 1 << bits));
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let message = format!(
            "{:#}",
            DkmLayer::new("mid.weight", Form::per_tensor(2), &Tensor::from_slice(&[1.0, bad])).unwrap_err()
        );
        assert!(message.contains("mid.weight") && message.contains("1 of its values"), "{message}");
        let mut layer = DkmLayer::new("mid.weight", Form::per_tensor(2), &Tensor::from_slice(&[1.0f32, 2.0])).unwrap();
        assert!(layer.soften(&Tensor::from_slice(&[1.0, bad]), 1.0, 3, None, &mut Tensor::zeros([2], FLOAT)).is_err());
        assert!(layer.hard(&Tensor::from_slice(&[1.0, bad])).is_err());
    }
}

#[test]
fn cooling_brings_the_soft_weight_to_the_hard_one() {
    let _alone = seeded(11);
    let weight = (Tensor::randn([64, 64], FLOAT) * 0.02).to_kind(Kind::Half).to_kind(Kind::Float);
    let mut layer = DkmLayer::new("layer", Form::per_tensor(2), &weight).unwrap();
    let fit = kmeans::fit(&Vec::<f16>::try_from(weight.to_kind(Kind::Half).view(-1)).unwrap(), &[64, 64], 2).unwrap();
    // Before any step the layer's own palette is the post-training one.
    assert_eq!(layer.hard(&weight).unwrap(), fit.palette);
    assert_eq!(layer.kmeans_mse, [fit.error]);
    let mut gaps = Vec::new();
    for rho in [1.0, 0.1, 1e-3, 1e-5] {
        let (soft, state) = step(&mut layer, &weight, rho, Some(Code::F16));
        let hard = layer.hard(&weight).unwrap().tensor(Kind::Float, Device::Cpu).unwrap();
        gaps.push(distance(&soft, &hard));
        let error = (&hard - &weight).square().mean(Kind::Double).double_value(&[]);
        // The reported error is of entries that are not rounded to f16 yet.
        assert!((state.hard_error() - error).abs() < 1e-3 * error);
    }
    assert!(gaps.is_sorted_by(|a, b| a > b) && gaps[3] < 0.01, "{gaps:?}");
}

#[test]
fn frozen_layers_train_their_entries_alone() {
    let _alone = seeded(5);
    for bits in [1, 2, 4, 8] {
        let form = Form::per_tensor(bits);
        let weight = Tensor::randn([40, 11, 3, 3], FLOAT);
        let layer = DkmLayer::new("layer", Form::per_tensor(bits), &weight).unwrap();
        let mut frozen = layer.freeze(&weight).unwrap();
        let hard = layer.hard(&weight).unwrap();
        assert_eq!(frozen.palette().unwrap(), hard);
        assert!(dense(&frozen, &weight.size()).equal(&hard.tensor(Kind::Float, Device::Cpu).unwrap()));

        let indices: Vec<i64> = hard.indices.iter().map(|&i| i as i64).collect();
        let entries = Tensor::from_slice(&hard.entries.iter().map(|e| e.to_f64()).collect::<Vec<_>>());
        let entries = entries.set_requires_grad(true);
        let upstream = Tensor::randn_like(&weight);
        let wide = entries.index_select(0, &Tensor::from_slice(&indices)).view_as(&weight);
        let book = Tensor::run_backward(&[(wide * &upstream).sum(Kind::Double)], &[&entries], false, false);
        let gradient = frozen.gradient(&upstream).unwrap();
        assert_eq!(gradient.size(), [1 << bits]);
        assert!(distance(&gradient, &book[0]) < 1e-6, "{bits} bits");
        assert!(frozen.gradient(&upstream.view([40, -1])).is_err());

        // A step that f16 cannot hold: what the network sees stays what is stored.
        let mut handle = frozen.entries.shallow_clone();
        let _ = handle.g_add_(&(gradient * 1.2345e-4));
        let palette = frozen.palette().unwrap();
        assert!(dense(&frozen, &weight.size()).equal(&palette.tensor(Kind::Float, Device::Cpu).unwrap()));
        assert_eq!(palette.indices, hard.indices);
        assert_ne!(palette.entries, hard.entries);

        let saved: Weights = frozen.tensors().into_iter().collect();
        let restored = Frozen::restore("layer", form, &[40, 11, 3, 3], &saved, Device::Cpu).unwrap();
        assert!(restored.entries.equal(&frozen.entries));
        assert_eq!(restored.palette().unwrap(), palette);
        let message = |result: anyhow::Result<Frozen>| format!("{:#}", result.unwrap_err());
        assert!(message(Frozen::restore("other", form, &[3960], &saved, Device::Cpu)).contains("`other.assignments`"));
        assert!(message(Frozen::restore("layer", form, &[3961], &saved, Device::Cpu)).contains("[3961] is expected"));
        if bits < 8 {
            let mut broken: Weights = saved.iter().map(|(name, t)| (name.clone(), t.copy())).collect();
            let _ = broken.get_mut("layer.assignments").unwrap().fill_(255);
            assert!(message(Frozen::restore("layer", form, &[3960], &broken, Device::Cpu)).contains("points past"));
        }
        frozen.entries = Tensor::full([1 << bits], f64::NAN, FLOAT);
        assert!(format!("{:#}", frozen.palette().unwrap_err()).contains("parameter layer: a palette entry is NaN"));
    }
}

#[test]
fn layers_are_saved_and_restored_exactly() {
    let _alone = seeded(6);
    let weight = Tensor::randn([50, 50], FLOAT);
    let mut layer = DkmLayer::new("a.weight", Form::per_tensor(4), &weight).unwrap();
    drop(step(&mut layer, &weight, 0.7, None));
    let saved: Weights = layer.tensors().unwrap().into_iter().collect();
    let mut restored = DkmLayer::restore("a.weight", Form::per_tensor(4), &[50, 50], &saved, Device::Cpu).unwrap();
    assert_eq!(restored, layer);
    let (one, _) = step(&mut layer, &weight, 0.5, None);
    let (two, _) = step(&mut restored, &weight, 0.5, None);
    assert!(one.equal(&two) && layer == restored);
    let message = format!(
        "{:#}",
        DkmLayer::restore("a.weight", Form::per_tensor(2), &[50, 50], &saved, Device::Cpu).unwrap_err()
    );
    assert!(message.contains("`a.weight.centroids`") && message.contains("[4] is expected"), "{message}");
    assert!(DkmLayer::restore("b.weight", Form::per_tensor(4), &[50, 50], &HashMap::new(), Device::Cpu).is_err());
}

#[test]
fn ties_and_equal_entries_have_one_answer() {
    let weight = Tensor::from_slice(&[0.0f32, 0.5, 1.0, 0.75, 0.25]);
    let mut layer = DkmLayer::new("layer", Form::per_tensor(2), &weight).unwrap();
    layer.centroids = vec![1.0, 0.0, 0.5, 0.5];
    let palette = layer.hard(&weight).unwrap();
    assert_eq!(palette.entries, [0.0, 0.5, 0.5, 1.0].map(f16::from_f32));
    assert_eq!(palette.indices, [0, 1, 3, 1, 0]);
    assert!(Palette::new(2, vec![5], palette.indices.clone(), palette.entries[..3].to_vec()).is_err());
    assert!(Palette::new(1, vec![5], palette.indices, vec![f16::ZERO, f16::ONE]).is_err());
}

/// The shape in which one number a channel multiplies a weight.
fn along_channels(shape: &[i64]) -> Vec<i64> {
    std::iter::once(shape[0]).chain(shape[1..].iter().map(|_| 1)).collect()
}

/// Forms with more than one table, or with scales.
fn forms(bits: u32) -> Vec<Form> {
    let plain = Form::per_tensor(bits);
    let grouped = Form { group_size: Some(4), ..plain };
    vec![
        grouped,
        Form { axis: 1, ..grouped },
        Form { per_channel_scale: true, ..plain },
        Form { per_channel_scale: true, ..grouped },
        Form { lut_dtype: LutDtype::I8, ..plain },
        Form { lut_dtype: LutDtype::I8, axis: 1, ..grouped },
        Form { lut_dtype: LutDtype::I8, per_channel_scale: true, ..grouped },
    ]
}

/// The soft weight of every form, its gradient and its new centroids are those of autograd through each group by the
/// book, with scales that are held constant.
#[test]
fn groups_and_scales_have_autograds_gradients() {
    let _alone = seeded(21);
    let cases = [2, 4].into_iter().flat_map(forms).flat_map(|form| [(form, Some(Code::F16)), (form, None)]);
    for (round, (form, code)) in cases.enumerate().filter(|(_, (form, code))| code.is_some() || !form.per_channel_scale)
    {
        let shape: &[i64] = if round % 4 < 2 { &[8, 12, 3, 3] } else { &[12, 20] };
        // Channels of different spread; scaled ones are not on the grid of codes, so these are compared more loosely.
        let spread = Tensor::logspace(-0.5, 0.5, shape[0], 10.0, DOUBLE);
        let spread = spread.view(along_channels(shape).as_slice());
        let weight = rounded(&(Tensor::randn(shape, DOUBLE) * 0.05 * spread).to_kind(Kind::Float), Code::F16);
        let upstream = Tensor::randn(shape, FLOAT);
        let mut layer = DkmLayer::new("layer", form, &weight).unwrap();
        let weight = match code {
            Some(_) => weight,
            None => {
                // On the grid of each group's own code.
                let parts = weight.chunk(form.groups(shape) as i64, form.axis as i64).into_iter().enumerate();
                let parts: Vec<Tensor> = parts.map(|(group, part)| rounded(&part, layer.code(group, 0.5))).collect();
                Tensor::cat(&parts, form.axis as i64)
            }
        };
        let start = layer.centroids.clone();
        let scales: Option<Tensor> =
            layer.tensors().unwrap().into_iter().find(|(name, _)| name == "layer.scales").map(|(_, t)| t);
        let wide = weight.to_kind(Kind::Double).set_requires_grad(true);
        let scaled = match &scales {
            Some(scales) => &wide / scales.view(along_channels(shape).as_slice()),
            None => wide.shallow_clone(),
        };
        let (groups, entries) = (form.groups(shape), 1usize << form.bits);
        let parts = scaled.chunk(groups as i64, form.axis as i64);
        let mut soft = Vec::new();
        let mut centroids = Vec::new();
        for (group, part) in parts.iter().enumerate() {
            let entries = Tensor::from_slice(&start[group * entries..][..entries]);
            let (one, new) = by_the_book(&part.contiguous(), &entries, layer.temperature(group, 0.5), 3);
            soft.push(one);
            centroids.push(new);
        }
        let soft = Tensor::cat(&soft, form.axis as i64);
        let soft = match &scales {
            Some(scales) => soft * scales.view(along_channels(shape).as_slice()),
            None => soft,
        };
        let book = Tensor::run_backward(&[(&soft * &upstream).sum(Kind::Double)], &[&wide], false, false);

        let (ours, state) = step(&mut layer, &weight, 0.5, code);
        let gradient = backward(&state, &upstream);
        let (near, steep) = if scales.is_some() { (2e-3, 3e-2) } else { (1e-6, 2e-6) };
        assert!(distance(&ours, &soft) < near, "{form:?}: {}", distance(&ours, &soft));
        assert!(distance(&gradient, &book[0]) < steep, "{form:?}: {}", distance(&gradient, &book[0]));
        let new = Tensor::from_slice(&layer.centroids);
        assert!(distance(&new, &Tensor::cat(&centroids, 0)) < near, "{form:?}");

        // Saved and restored exactly, soft and frozen; what the network sees frozen is what is stored.
        let saved: Weights = layer.tensors().unwrap().into_iter().collect();
        assert_eq!(DkmLayer::restore("layer", form, shape, &saved, Device::Cpu).unwrap(), layer);
        let mut frozen = layer.freeze(&weight).unwrap();
        let palette = frozen.palette().unwrap();
        assert_eq!((palette.form, palette.shape.as_slice()), (form, shape));
        assert!(dense(&frozen, shape).equal(&palette.tensor(Kind::Float, Device::Cpu).unwrap()), "{form:?}");
        assert_eq!(palette, layer.hard(&weight).unwrap());
        let error = distance(&palette.tensor(Kind::Double, Device::Cpu).unwrap(), &weight);
        assert!(error < [0.45, 0.17][(form.bits == 4) as usize], "{form:?}: {error}");
        let gradient = frozen.gradient(&upstream).unwrap();
        assert_eq!(gradient.size(), [(groups * entries) as i64]);
        // Large enough a step that rounding is little of it.
        let eps = 0.05 * (frozen.entries.norm() / gradient.norm()).double_value(&[]);
        frozen.entries = frozen.entries.copy() - &gradient * eps;
        let moved = dense(&frozen, shape);
        assert!(moved.equal(&frozen.palette().unwrap().tensor(Kind::Float, Device::Cpu).unwrap()));
        let saved: Weights = frozen.tensors().into_iter().collect();
        let restored = Frozen::restore("layer", form, shape, &saved, Device::Cpu).unwrap();
        assert_eq!(restored.palette().unwrap(), frozen.palette().unwrap());
        if form.lut_dtype == LutDtype::F16 {
            // The slope along the gradient of the entries is its square.
            let change = ((&moved - palette.tensor(Kind::Float, Device::Cpu).unwrap()) * &upstream).sum(Kind::Double);
            let expected = -eps * gradient.square().sum(Kind::Double).double_value(&[]);
            assert!((change.double_value(&[]) / expected - 1.0).abs() < 0.02, "{form:?}");
        }
    }
    let message =
        DkmLayer::new("v", Form { group_size: Some(3), ..Form::per_tensor(4) }, &Tensor::zeros([4, 4], FLOAT));
    assert!(format!("{:#}", message.unwrap_err()).contains("parameter v: its 4 output channels do not divide"));
}

/// Whatever vector instructions there are, soft weights, gradients, steps and palettes have the same bits.
#[test]
fn every_level_gives_the_same_bytes() {
    let plain = Form::per_tensor(2);
    let forms = [
        plain,
        Form { bits: 4, ..plain },
        Form { bits: 4, group_size: Some(8), ..plain },
        Form { per_channel_scale: true, ..plain },
        Form { bits: 4, cluster_dim: 2, ..plain },
        Form { bits: 4, cluster_dim: 4, ..plain },
    ];
    let levels = Level::available();
    assert_eq!(levels[0], Level::Plain);
    let constants = AdamWStep {
        factor: 0.5,
        decay: 1.0 - 1e-5,
        rate_of_mean: 0.1,
        beta2: 0.99,
        rate_of_square: 0.01,
        size: 1e-2,
        root: 10.0,
        eps: 1e-8,
    };
    let wave = |kind: Kind, step: f64| {
        let numbers = Tensor::arange(64 * 83, FLOAT) * step;
        ((numbers.sin() + (numbers * 0.37).cos()) * 0.03).to_kind(kind).view([64, 83])
    };
    for form in forms {
        for (kind, code) in [(Kind::Float, None), (Kind::Float, Some(Code::F16)), (Kind::BFloat16, None)] {
            let run = |level: Level| {
                level.force();
                let weight = wave(kind, 0.7123);
                let mut layer = DkmLayer::new("layer", form, &weight).unwrap();
                let moments = [weight.zeros_like(), weight.zeros_like()];
                let mut all = Vec::new();
                for rho in [0.8, 0.1] {
                    let (soft, state) = step(&mut layer, &weight, rho, code);
                    let upstream = wave(kind, 1.31);
                    all.extend([soft, backward(&state, &upstream)]);
                    if let Gradient::Own { square } = layer.gradient(state, upstream).unwrap() {
                        layer.step(&weight, [&moments[0], &moments[1]], &constants).unwrap();
                        all.push(Tensor::from_slice(&[square]));
                    }
                    all.extend([weight.copy(), moments[0].copy(), moments[1].copy()]);
                }
                all.extend(layer.tensors().unwrap().into_iter().map(|(_, tensor)| tensor));
                (all, layer.hard(&weight).unwrap())
            };
            let (expected, palette) = run(Level::Plain);
            for &level in &levels[1..] {
                let (found, hard) = run(level);
                assert!(found.iter().zip(&expected).all(|(found, expected)| found.equal(expected)), "{form:?} {level}");
                assert_eq!(hard, palette, "{form:?} {level}");
            }
        }
    }
}
