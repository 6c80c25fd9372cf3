//! Palettes where numbers are extreme: few weights for each entry, few values, tiny weights, dead channels, entries far from
//! all weights. What is right is what the definition says ([`palettist::palette::reference`]), in f64.

mod common;

use common::distance;
use half::f16;
use palettist::palette::clustering::Clustering;
use palettist::palette::reference::dkm;
use palettist::palette::{Code, DkmLayer, Form, Histogram, LutDtype, SoftenRows, fit, soften};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Normal numbers (sums of twelve uniform ones, less six).
fn normal(random: &mut ChaCha8Rng, count: usize, std: f64) -> Vec<f64> {
    (0..count).map(|_| ((0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0) * std).collect()
}

fn floats(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).to_kind(Kind::Float)
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.to_kind(Kind::Double).norm().double_value(&[])
}

fn step(layer: &mut DkmLayer, weight: &Tensor, rho: f64) -> (Tensor, SoftenRows) {
    let mut soft = weight.empty_like();
    let state = layer.soften(weight, rho, 3, None, &mut soft).unwrap();
    (soft, state)
}

fn back(state: &SoftenRows, upstream: &Tensor) -> Tensor {
    let mut gradient = upstream.copy();
    state.backward(&mut gradient).unwrap();
    gradient
}

/// Of the definition, with autograd's gradient for `upstream`: soft weights, entries, gradient. `weights` and `entries` are
/// `[N, D]` and `[K, D]`.
fn by_definition(weights: &Tensor, entries: &Tensor, tau: f64, upstream: &Tensor) -> [Tensor; 3] {
    let leaf = weights.to_kind(Kind::Double).set_requires_grad(true);
    let (soft, entries) = dkm(&leaf, entries, tau, 3).unwrap();
    let loss = (&soft * upstream.to_kind(Kind::Double).view_as(&soft)).sum(Kind::Double);
    let gradient = Tensor::run_backward(&[&loss], &[&leaf], false, false).remove(0);
    [soft.detach(), entries.detach(), gradient]
}

/// Weights of many kinds, named.
fn kinds(random: &mut ChaCha8Rng, count: usize, bits: u32) -> Vec<(&'static str, Vec<f64>)> {
    let plain = normal(random, count, 0.02);
    let levels = normal(random, 1 << bits, 0.02);
    let few = normal(random, 3, 0.02);
    let mut outlier = plain.clone();
    outlier[0] = 3.0;
    let clusters = plain.iter().enumerate().map(|(i, w)| w * 0.001 + if i % 2 == 0 { 0.5 } else { -0.5 });
    vec![
        ("constant", vec![0.1; count]),
        ("zeros", vec![0.0; count]),
        ("three values", (0..count).map(|i| few[i * 7 % 3]).collect()),
        ("a palette already", (0..count).map(|i| f16::from_f64(levels[i * 11 % levels.len()]).to_f64()).collect()),
        ("two clusters", clusters.collect()),
        ("1e-4", plain.iter().map(|w| w * 5e-3).collect()),
        ("1e-5", plain.iter().map(|w| w * 5e-4).collect()),
        ("1e-6", plain.iter().map(|w| w * 5e-5).collect()),
        ("1e-7", plain.iter().map(|w| w * 5e-6).collect()),
        ("an outlier", outlier),
        ("normal", plain),
    ]
}

/// A palette with about as many entries as weights gave gradients 10⁵ to 10⁸ times too large.
#[test]
fn gradients_keep_their_size_whatever_the_number_of_weights_and_values() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut worst = (0.0, String::new());
    for bits in [2, 3, 4, 6, 8] {
        for count in [16, 24, 40, 64, 100, 256, 257, 288, 300, 512, 1000] {
            for (kind, values) in kinds(&mut random, count, bits) {
                let spread = values.iter().map(|w| w.abs()).sum::<f64>() / count as f64;
                let mut layer = DkmLayer::new("layer", Form::per_tensor(bits), &floats(&values)).unwrap();
                for (round, rho) in [1.0, 0.3, 0.1, 0.1].into_iter().enumerate() {
                    // As training moves weights: not at all, then a little.
                    let moved = normal(&mut random, count, [0.0, 1e-3, 1e-3, 1e-2][round] * spread);
                    let weight = floats(&values.iter().zip(moved).map(|(w, d)| w + d).collect::<Vec<_>>());
                    let upstream = floats(&normal(&mut random, count, 1.0));
                    let (soft, state) = step(&mut layer, &weight, rho);
                    let gradient = back(&state, &upstream);
                    let size = norm(&gradient) / norm(&upstream);
                    let case = format!("{bits} bits, {count} weights, {kind}, rho {rho}");
                    assert!(size.is_finite() && norm(&soft).is_finite(), "{case}");
                    if size > worst.0 {
                        worst = (size, case);
                    }
                }
            }
        }
    }
    println!("largest: {worst:?}");
    assert!(worst.0 < 100.0, "{worst:?}");
}

/// Few weights are seen as they are, and so each is what the definition makes of it.
#[test]
fn layers_of_few_weights_are_the_definition() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for bits in [2, 4, 6, 8] {
        for count in [20, 60, 150, 288, 300, 700, 1100] {
            let exact = |w: &f64| f16::from_f64(*w).to_f64();
            let values: Vec<f64> = normal(&mut random, count, 0.02).iter().map(exact).collect();
            let (weight, upstream) = (floats(&values), floats(&normal(&mut random, count, 1.0)));
            for rho in [1.0, 0.3, 0.1] {
                let mut layer = DkmLayer::new("layer", Form::per_tensor(bits), &weight).unwrap();
                let per_entry = count as f64 / 2f64.powi(bits as i32);
                if layer.code(0, rho) != Code::F16 || per_entry <= 1.0 {
                    continue;
                }
                let entries = Tensor::from_slice(&layer.centroids).view([-1, 1]);
                let tau = layer.temperature(0, rho);
                let [soft, entries, gradient] = by_definition(&weight.view([-1, 1]), &entries, tau, &upstream);
                let (ours, state) = step(&mut layer, &weight, rho);
                let case = format!("{bits} bits, {count} weights, rho {rho}");
                assert!(distance(&ours, &soft.view(-1)) < 1e-6, "{case}");
                assert!(distance(&Tensor::from_slice(&layer.centroids), &entries.view(-1)) < 1e-7, "{case}");
                // Of fewer than five for each entry it is taken to be that of the soft weight.
                let gradient = if per_entry < 5.0 { &upstream } else { &gradient.view(-1) };
                let error = distance(&back(&state, &upstream), gradient);
                assert!(error < 2e-6, "{case}: {error:e}");
            }
        }
    }
}

/// Numbers and vectors at random are the definition's.
#[test]
fn random_clusterings_are_the_definition() {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    for round in 0..40 {
        let (count, entries) = (random.random_range(1..400), random.random_range(1..40));
        let std = 10f64.powf(random.random_range(-4.0..1.0));
        let values: Vec<f16> = normal(&mut random, count, std).into_iter().map(f16::from_f64).collect();
        let centroids = normal(&mut random, entries, 1.5 * std);
        let tau = std * std * 10f64.powf(random.random_range(-3.0..0.5));
        check_table(&values, &centroids, tau, &mut random, &format!("{round}: {count}, {entries}, {std:e}, {tau:e}"));
    }
}

/// The table against the definition: entries, soft values, gradients.
fn check_table(values: &[f16], centroids: &[f64], tau: f64, random: &mut ChaCha8Rng, case: &str) {
    let wide: Vec<f64> = values.iter().map(|v| v.to_f64()).collect();
    let upstream = normal(random, values.len(), 1.0);
    let column = |values: &[f64]| Tensor::from_slice(values).view([-1, 1]);
    let [soft, entries, gradient] =
        by_definition(&column(&wide), &column(centroids), tau, &Tensor::from_slice(&upstream));
    let table = Clustering::cluster(Histogram::of_halves(values).unwrap(), centroids, tau, 3).unwrap();
    let power = (wide.iter().map(|w| w * w).sum::<f64>() / wide.len() as f64).sqrt().max(1e-12);
    let numbers = |tensor: Tensor| Vec::<f64>::try_from(tensor.view(-1)).unwrap();
    for (ours, theirs) in table.entries().iter().zip(numbers(entries)) {
        assert!((ours - theirs).abs() < 1e-8 * power, "{case}: an entry is {ours:e}, and not {theirs:e}");
    }
    let bins = table.histogram().bins.clone();
    let place = |v: &f16| bins.iter().position(|&bin| bin == v.to_bits()).unwrap();
    let soft_values = table.soft_values();
    for (value, theirs) in values.iter().zip(numbers(soft)) {
        let ours = soft_values[place(value)];
        assert!((ours - theirs).abs() < 1e-8 * power, "{case}: {ours:e} is not {theirs:e}");
    }
    let mut sums = vec![0.0; bins.len()];
    values.iter().zip(&upstream).for_each(|(v, g)| sums[place(v)] += g);
    let lines = table.backward(&sums);
    let gradient = numbers(gradient);
    let most = gradient.iter().fold(1.0, |most: f64, g| most.max(g.abs()));
    for ((value, upstream), theirs) in values.iter().zip(&upstream).zip(gradient) {
        let (direct, through) = lines[place(value)];
        let ours = upstream * direct + through;
        assert!((ours - theirs).abs() < 1e-7 * most, "{case}: a gradient is {ours:e}, and not {theirs:e}");
    }
}

/// Entries that see only what is e⁻³⁸ of its row, e⁻⁵⁰⁰⁰, or a little of both sides, come where the definition has them.
#[test]
fn entries_far_from_all_weights_are_the_definitions() {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let values: Vec<f16> = normal(&mut random, 300, 1.0).into_iter().map(f16::from_f64).collect();
    for far in [3.0, 4.0, 5.0, 6.0, 8.0, 20.0, 1000.0] {
        for tau in [1.0, 0.3, 0.05, 0.01] {
            let near = [-1.0, -0.2, 0.3, 1.1];
            for extra in [&[far][..], &[-far], &[far, far + 0.5], &[-far, far, 2.0 * far], &[far, far]] {
                let centroids: Vec<f64> = near.iter().chain(extra).copied().collect();
                check_table(&values, &centroids, tau, &mut random, &format!("{extra:?} at {tau}"));
            }
        }
    }
    // In a gap between two clusters, nearer to one or in the middle.
    let values: Vec<f16> = values.iter().map(|v| f16::from_f64(v.to_f64() * 0.1 + 5.0 * v.to_f64().signum())).collect();
    for between in [0.0, 0.01, 1.0, -3.0] {
        for tau in [0.5, 0.1, 0.02, 0.005] {
            let centroids = [-5.1, -4.9, between, 4.9, 5.1];
            check_table(&values, &centroids, tau, &mut random, &format!("{between} between, at {tau}"));
        }
    }
    // Through evenly spaced codes, with rows of zeros among the bins.
    let wide: Vec<f64> = values.iter().map(|v| v.to_f64()).collect();
    let (weight, code) = (floats(&wide), Code::fixed(2f64.powi(-10)));
    let seen = (&weight * 1024.0).round() / 1024.0;
    for far in [12.0, 40.0] {
        let centroids = [-5.1, -4.9, 4.9, 5.1, far];
        let mut soft = weight.empty_like();
        let (ours, _) = soften(&weight, &centroids, 0.02, 3, code, &mut soft).unwrap();
        let entries = Tensor::from_slice(&centroids).view([-1, 1]);
        let [_, theirs, _] = by_definition(&seen.view([-1, 1]), &entries, 0.02, &seen);
        assert!(distance(&Tensor::from_slice(&ours), &theirs.view(-1)) < 1e-9, "{far}");
    }
}

/// Squared error over squares.
fn relative(values: &[f64], dense: &[f16]) -> f64 {
    let error: f64 = values.iter().zip(dense).map(|(v, d)| (v - d.to_f64()).powi(2)).sum();
    error / values.iter().map(|v| v * v).sum::<f64>()
}

/// Integers of 8 bits hold small weights as fp16 entries do, as far as fp16 does: all were zeros from a standard deviation of
/// 1e-5 down.
#[test]
fn integer_entries_hold_tiny_weights() {
    let mut random = ChaCha8Rng::seed_from_u64(10);
    let shape = [16i64, 64];
    for bits in [2, 4, 6] {
        let plain = Form::per_tensor(bits);
        let forms = [
            plain,
            Form { group_size: Some(4), ..plain },
            Form { cluster_dim: 2, ..plain },
            Form { per_channel_scale: true, ..plain },
        ];
        for form in forms {
            for std in [1e-2, 1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7] {
                let weights = normal(&mut random, 1024, std);
                let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f64(w)).collect();
                let exact: Vec<f64> = halves.iter().map(|v| v.to_f64()).collect();
                let integers = Form { lut_dtype: LutDtype::I8, ..form };
                let error_of = |form: &Form| relative(&exact, &fit(&halves, &shape, form).unwrap().palette.dense());
                let trained = |form: Form| {
                    let weight = floats(&exact).view(shape);
                    let palette = DkmLayer::new("layer", form, &weight).unwrap().hard(&weight).unwrap();
                    relative(&exact, &palette.dense())
                };
                // Integers are 127 steps of either sign; with scales of channels they and the scales share what fp16 has.
                let more = if form.per_channel_scale { 0.06 } else { 2e-3 };
                for (ours, floats) in [(error_of(&integers), error_of(&form)), (trained(integers), trained(form))] {
                    assert!(ours < 1.1 * floats + more, "{integers:?} at {std:e}: {ours:.4}, fp16 {floats:.4}");
                }
            }
        }
    }
}

/// Dead channels, and channels with an outlier, cost the others nothing: with scales the error is no larger than without.
#[test]
fn scales_of_channels_bear_dead_channels_and_outliers() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let shape = [16i64, 96];
    for bits in [1, 2, 3, 4, 6, 8] {
        for dead in [0.0, 1e-7, 1e-6, 1e-4] {
            for lut_dtype in [LutDtype::F16, LutDtype::I8] {
                for (channels, outlier) in [(1, 0.0), (5, 0.0), (1, 1.5), (15, 0.0)] {
                    let mut weights = normal(&mut random, 16 * 96, 1.0);
                    for (channel, weights) in weights.chunks_mut(96).enumerate() {
                        let spread = 0.02 * 2f64.powf((channel % 5) as f64 / 2.0 - 1.0);
                        let scale = if channel < channels { dead } else { spread };
                        weights.iter_mut().for_each(|w| *w *= scale);
                        if channel == 9 && outlier > 0.0 {
                            weights[7] = outlier;
                        }
                    }
                    let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f64(w)).collect();
                    let exact: Vec<f64> = halves.iter().map(|v| v.to_f64()).collect();
                    let plain = Form { lut_dtype, ..Form::per_tensor(bits) };
                    let scaled = Form { per_channel_scale: true, ..plain };
                    let error_of = |form: &Form| relative(&exact, &fit(&halves, &shape, form).unwrap().palette.dense());
                    let case = format!("{bits} bits, {channels} dead of {dead:e}, outlier {outlier}, {lut_dtype:?}");
                    let (with, without) = (error_of(&scaled), error_of(&plain));
                    assert!(with <= 1.02 * without + 1e-6, "{case}: {with:.5} with scales, {without:.5} without");

                    // And in training: no gradient is all of what there is, and the palette is as good.
                    let weight = floats(&exact).view(shape);
                    let mut layer = DkmLayer::new("layer", scaled, &weight).unwrap();
                    let hard = relative(&exact, &layer.hard(&weight).unwrap().dense());
                    assert!(hard <= 1.3 * without + 1e-5, "{case}: {hard:.5} as training begins, {without:.5} without");
                    let upstream = floats(&normal(&mut random, 16 * 96, 1.0)).view(shape);
                    let (_, state) = step(&mut layer, &weight, 0.3);
                    let gradient = back(&state, &upstream);
                    let size = norm(&gradient) / norm(&upstream);
                    assert!(size < 100.0, "{case}: gradient {size:e}");
                }
            }
        }
    }
    let zeros = vec![f16::ZERO; 16 * 96];
    let palette = fit(&zeros, &shape, &Form { per_channel_scale: true, ..Form::per_tensor(2) }).unwrap().palette;
    assert!(palette.dense().iter().all(|v| v.to_f64() == 0.0));
}

/// Vectors: with about as many entries as points, and exactly so many.
#[test]
fn vectors_of_few_points_keep_their_gradients_size() {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    for (dim, bits) in [(2, 4), (2, 8), (4, 8)] {
        for points in [40usize, 256, 288, 500] {
            for std in [0.02, 1e-5] {
                let shape = [dim as i64 * 4, points as i64 / 4];
                let form = Form { cluster_dim: dim, ..Form::per_tensor(bits) };
                let values = normal(&mut random, points / 4 * 4 * dim, std);
                let mut layer = DkmLayer::new("layer", form, &floats(&values).view(shape)).unwrap();
                for (rho, off) in [(1.0, 0.0), (0.3, 1e-3), (0.1, 1e-3)] {
                    let moved = normal(&mut random, values.len(), off * std);
                    let weight = floats(&values.iter().zip(moved).map(|(w, d)| w + d).collect::<Vec<_>>()).view(shape);
                    let upstream =
                        Tensor::ones(shape, FLOAT) * floats(&normal(&mut random, values.len(), 1.0)).view(shape);
                    let (_, state) = step(&mut layer, &weight, rho);
                    let size = norm(&back(&state, &upstream)) / norm(&upstream);
                    assert!(size < 60.0, "{dim} × {bits} bits, {points} points of {std:e}, rho {rho}: {size:e}");
                }
            }
        }
    }
}

/// A layer with an entry for each weight passes weights and gradients as they are, whatever happened to them before.
#[test]
fn an_entry_for_each_weight_is_the_identity() {
    let mut random = ChaCha8Rng::seed_from_u64(13);
    for (form, shape) in [
        (Form::per_tensor(4), [4i64, 4]),
        (Form::per_tensor(8), [10, 20]),
        (Form { group_size: Some(2), ..Form::per_tensor(6) }, [8, 30]),
        (Form { cluster_dim: 2, ..Form::per_tensor(6) }, [8, 16]),
        (Form { cluster_dim: 4, axis: 1, ..Form::per_tensor(4) }, [4, 16]),
    ] {
        let values = normal(&mut random, (shape[0] * shape[1]) as usize, 0.02);
        let mut layer = DkmLayer::new("layer", form, &floats(&values).view(shape)).unwrap();
        for rho in [1.0, 0.1] {
            let weight = floats(&normal(&mut random, values.len(), 0.03)).view(shape);
            let upstream = floats(&normal(&mut random, values.len(), 1.0)).view(shape);
            let (soft, state) = step(&mut layer, &weight, rho);
            assert!(soft.equal(&weight) && back(&state, &upstream).equal(&upstream), "{form:?}");
            let hard = layer.hard(&weight).unwrap().tensor(Kind::Float, Device::Cpu).unwrap();
            assert!(distance(&hard, &weight) < 1e-3, "{form:?}");
        }
        let bad = Tensor::full(shape, f64::NAN, FLOAT);
        assert!(layer.soften(&bad, 1.0, 3, None, &mut bad.copy()).is_err());
    }
}
