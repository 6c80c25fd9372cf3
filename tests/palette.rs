//! Palettes: packing, the palettized checkpoint, k-means, differentiable k-means.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use palettist::ops::{Initial, Parameter, Weights};
use palettist::palette::packing::{pack, unpack};
use palettist::palette::{BITS, Form, Palette, PalettizedCheckpoint, kmeans, post_training};
use palettist::palette::{Code, Histogram};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

fn error<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

/// Written by Apple's own writer of sub-byte blobs (coremltools 9.0).
#[test]
fn packing_is_core_mls() {
    let golden: [(u32, &[u8], &[u8]); 5] = [
        (1, &[1, 0, 1, 1, 0, 0, 0, 1, 1], &[0x8D, 0x01]),
        (2, &[0, 3, 2, 1, 3], &[0x6C, 0x03]),
        (3, &[1, 2, 3, 4, 5, 6, 7, 0, 5], &[0xD1, 0x58, 0x1F, 0x05]),
        (4, &[1, 2, 3], &[0x21, 0x03]),
        (6, &[1, 2, 3, 63, 32], &[0x81, 0x30, 0xFC, 0x20]),
    ];
    for (bits, indices, bytes) in golden {
        assert_eq!(pack(indices, bits), bytes, "{bits} bits");
        assert_eq!(unpack(bytes, bits, indices.len()).unwrap(), indices, "{bits} bits");
    }
}

#[test]
fn packing_round_trips_at_every_length() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for bits in 1..=8 {
        for count in (0..40).chain([1000, 4097]) {
            let indices: Vec<u8> = (0..count).map(|_| (random.random::<u32>() % (1 << bits)) as u8).collect();
            let packed = pack(&indices, bits);
            assert_eq!(packed.len(), (count * bits as usize).div_ceil(8));
            assert_eq!(unpack(&packed, bits, count).unwrap(), indices, "{bits} bits, {count}");
        }
    }
}

#[test]
fn unpacking_refuses_what_does_not_fit() {
    assert!(error(unpack(&[0x21, 0x13], 4, 3)).contains("not zero"));
    assert!(error(unpack(&[0x21], 4, 3)).contains("1 bytes"));
    assert!(error(unpack(&[0x21, 0, 0], 4, 3)).contains("3 bytes"));
    assert!(error(unpack(&[], 4, usize::MAX)).contains("do not take"));
    assert!(unpack(&[0], 0, 1).is_err());
    assert!(unpack(&[0; 2], 9, 1).is_err());
}

fn random_palette(bits: u32, shape: &[i64], random: &mut ChaCha8Rng) -> Palette {
    let count: i64 = shape.iter().product();
    let indices = (0..count).map(|_| (random.random::<u32>() % (1 << bits)) as u8).collect();
    let entries = (0..1 << bits).map(|_| f16::from_f32(random.random::<f32>() - 0.5)).collect();
    Palette::new(bits, shape.to_vec(), indices, entries).unwrap()
}

fn checkpoint() -> PalettizedCheckpoint {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let palettes = BITS
        .iter()
        .zip([vec![3, 5], vec![4, 3, 3, 3], vec![5, 3], vec![7, 1], vec![2, 9, 1, 1], vec![300]])
        .map(|(&bits, shape)| (format!("layer{bits}.weight"), random_palette(bits, &shape, &mut random)))
        .collect();
    let dense = BTreeMap::from([
        ("norm.weight".to_string(), Tensor::from_slice(&[1f32, 0.5, -2.0]).to_kind(Kind::Half)),
        ("scalar".to_string(), Tensor::from(0.25f32).to_kind(Kind::Half)),
        ("conv.weight".to_string(), Tensor::arange(24, (Kind::Half, Device::Cpu)).view([2, 3, 4])),
    ]);
    let metadata = BTreeMap::from([
        ("source_model".to_string(), "somewhere/über".to_string()),
        ("recipe".to_string(), "[palette]\nbits = 4\n".to_string()),
    ]);
    PalettizedCheckpoint { palettes, dense, metadata }
}

#[test]
fn checkpoints_come_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    let written = checkpoint();
    written.write(&path).unwrap();
    let read = PalettizedCheckpoint::read(&path).unwrap();
    assert_eq!(read.palettes, written.palettes);
    assert_eq!(read.metadata, written.metadata);
    assert_eq!(read.dense.keys().collect::<Vec<_>>(), written.dense.keys().collect::<Vec<_>>());
    for (name, tensor) in &read.dense {
        assert_eq!(tensor, &written.dense[name], "{name}");
        assert_eq!((tensor.size(), tensor.kind()), (written.dense[name].size(), Kind::Half), "{name}");
    }
    // What is read is written as the same bytes, others may read it, and nothing else is left there.
    let again = folder.path().join("again.safetensors");
    read.write(&again).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);

    let weights = read.weights(Kind::Float, Device::Cpu).unwrap();
    assert_eq!(weights.len(), 9);
    for (name, palette) in &written.palettes {
        assert_eq!(weights[name].size(), palette.shape);
        let values = Vec::<f32>::try_from(weights[name].view([-1])).unwrap();
        let expected: Vec<f32> = palette.indices.iter().map(|&i| palette.entries[i as usize].to_f32()).collect();
        assert_eq!(values, expected, "{name}");
    }
    // Weights are copies: training on them leaves the checkpoint alone.
    let mut half = read.weights(Kind::Half, Device::Cpu).unwrap();
    let _ = half.get_mut("norm.weight").unwrap().zero_();
    assert_eq!(read.dense["norm.weight"], written.dense["norm.weight"]);
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    std::fs::write(&path, "old").unwrap();
    let mut bad = checkpoint();
    bad.dense.insert("float".to_string(), Tensor::from_slice(&[1f32]));
    let message = error(bad.write(&path));
    assert!(message.contains("float") && message.contains("unet.safetensors"), "{message}");
    let mut twice = checkpoint();
    twice.dense.insert("layer1.weight".to_string(), Tensor::from_slice(&[1f32]).to_kind(Kind::Half));
    assert!(error(twice.write(&path)).contains("layer1.weight"));
    assert!(checkpoint().write(&path.join("below a file.safetensors")).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// The file with its header's text put through `change` (the length before it is mended).
fn with_header(bytes: &[u8], change: impl Fn(String) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.as_bytes());
    changed.extend(&bytes[8 + length..]);
    changed
}

#[test]
fn hostile_checkpoints_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    checkpoint().write(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let refuse = |bytes: &[u8], expected: &str| {
        std::fs::write(&path, bytes).unwrap();
        let message = error(PalettizedCheckpoint::read(&path));
        assert!(message.contains("unet.safetensors"), "{message}");
        assert!(message.contains(expected), "{message}, not {expected}");
        assert!(!message.contains('\n'), "{message}");
    };
    refuse(&[], "is empty (0 bytes)");
    for length in [7, 8, 100, good.len() - 1] {
        refuse(&good[..length], "safetensors file");
    }
    refuse(&[good.as_slice(), &[0]].concat(), "safetensors file");
    let replaced = |from: &str, to: &str| {
        with_header(&good, |header| {
            assert!(header.contains(from), "{header}");
            header.replace(from, to)
        })
    };
    refuse(&replaced("palettist.palettes", "palettist.palette"), "holds no palettes");
    refuse(&replaced(r#""palettist.version":"2""#, r#""palettist.version":"3""#), "version 3");
    refuse(&replaced(r#"\"bits\":4,"#, ""), "missing field");
    refuse(&replaced(r#"\"bits\":4"#, r#"\"bits\":5"#), "bits is 5");
    refuse(&replaced(r#"\"bits\":4"#, r#"\"bits\":6"#), "layer4.weight: `layer4.weight.indices` is Uint8 of shape [4]");
    refuse(&replaced(r#"\"shape\":[7,1]"#, r#"\"shape\":[9,1]"#), "layer4.weight: `layer4.weight.indices` is");
    refuse(&replaced(r#"\"shape\":[7,1]"#, r#"\"shape\":[-7,-1]"#), "not the shape of a tensor");
    let huge = r#"\"shape\":[9223372036854775807,9223372036854775807]"#;
    refuse(&replaced(r#"\"shape\":[7,1]"#, huge), "not the shape of a tensor");
    let elsewhere = replaced("layer4.weight.indices", "layer4.weight.elsewhr");
    refuse(&elsewhere, "layer4.weight.elsewhr is stored as Uint8");
    refuse(
        &replaced("layer4.weight.palette", "layer4.weight.elsewhr"),
        "layer4.weight: `layer4.weight.palette` is missing",
    );
    refuse(&replaced("\"scalar\":", "\"layer4.weight\":"), "layer4.weight is there twice");
    // A palette entry that is not a number. The bytes of the file lie where its header says.
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&good[8..8 + length]).unwrap();
    let start = 8 + length + header["layer1.weight.palette"]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut nan = good.clone();
    nan[start..start + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    refuse(&nan, "layer1.weight: a palette entry is NaN");
    assert!(PalettizedCheckpoint::read(Path::new("/nowhere/x.safetensors")).is_err());
}

fn squared_error(values: &[f64], weights: &[f64], entries: &[f64]) -> f64 {
    let nearest = |v: f64| entries.iter().map(|e| (v - e).powi(2)).fold(f64::INFINITY, f64::min);
    values.iter().zip(weights).map(|(&v, w)| w * nearest(v)).sum()
}

/// Least squared error over every way to cut sorted values into at most `clusters` intervals.
fn brute_force(values: &[f64], weights: &[f64], clusters: usize) -> f64 {
    if values.is_empty() || clusters == 0 {
        return if values.is_empty() { 0.0 } else { f64::INFINITY };
    }
    (1..=values.len())
        .map(|n| {
            let total: f64 = weights[..n].iter().sum();
            let mean = values[..n].iter().zip(weights).map(|(v, w)| v * w).sum::<f64>() / total;
            squared_error(&values[..n], &weights[..n], &[mean]) + brute_force(&values[n..], &weights[n..], clusters - 1)
        })
        .fold(f64::INFINITY, f64::min)
}

#[test]
fn k_means_is_the_best_of_all_clusterings() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for round in 0..400 {
        let count = 1 + round % 11;
        let scale = [1.0, 1e-6, 3e4][round % 3];
        let mut values: Vec<f64> = (0..count).map(|_| scale * (random.random::<f64>() - 0.5)).collect();
        if round % 4 == 0 {
            values[0] = 65504.0; // an outlier, as f16 can hold
        }
        values.sort_by(f64::total_cmp);
        let weights: Vec<f64> = (0..count).map(|_| (1 + random.random::<u32>() % 50) as f64).collect();
        for clusters in [1, 2, 3, 4, 6] {
            let means = kmeans::means(&values, &weights, clusters);
            assert!(means.len() <= clusters && means.is_sorted());
            let (ours, best) = (squared_error(&values, &weights, &means), brute_force(&values, &weights, clusters));
            let noise = 1e-24 * scale * scale;
            assert!(ours <= best * (1.0 + 1e-9) + noise, "{values:?} {weights:?} {clusters}: {ours} > {best}");
        }
    }
}

/// Least squared errors of sorted values in 1, 2, … `clusters` intervals, by all splits of each: O(n²) a row.
fn all_splits(values: &[f64], weights: &[f64], clusters: usize) -> Vec<f64> {
    let count = values.len();
    let cost = |from: usize, to: usize| {
        let total: f64 = weights[from..to].iter().sum();
        let mean = values[from..to].iter().zip(&weights[from..to]).map(|(v, w)| v * w).sum::<f64>() / total;
        squared_error(&values[from..to], &weights[from..to], &[mean])
    };
    let costs: Vec<Vec<f64>> = (0..count).map(|i| (i + 1..=count).map(|j| cost(i, j)).collect()).collect();
    let mut row: Vec<f64> = (0..=count).map(|j| if j == 0 { 0.0 } else { costs[0][j - 1] }).collect();
    let mut least = vec![row[count]];
    for _ in 1..clusters {
        let best = |j: usize| (0..j).map(|i| row[i] + costs[i][j - i - 1]).fold(f64::INFINITY, f64::min);
        row = (0..=count).map(|j| if j == 0 { 0.0 } else { best(j) }).collect();
        least.push(row[count]);
    }
    least
}

/// From 8 clusters on there is another algorithm; evenly spaced values of equal weight make its charges tie.
#[test]
fn k_means_of_many_clusters_is_the_best_too() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for round in 0..60 {
        let count = 9 + round % 90;
        let mut values: Vec<f64> = match round % 3 {
            0 => (0..count).map(|i| i as f64).collect(),
            1 => (0..count).map(|_| random.random::<f64>().powi(3)).collect(),
            _ => (0..count).map(|_| (random.random::<f64>() * 1e3).round() * 1e-7).collect(),
        };
        values.sort_by(f64::total_cmp);
        let weights: Vec<f64> = match round % 2 {
            0 => vec![1.0; count],
            _ => (0..count).map(|_| (1 + random.random::<u32>() % 1000) as f64).collect(),
        };
        let least = all_splits(&values, &weights, count.min(40));
        for clusters in [1, 2, 7, 8, 9, 16, 31, 40].into_iter().filter(|&n| n <= least.len()) {
            let means = kmeans::means(&values, &weights, clusters);
            assert!(means.len() <= clusters && means.is_sorted());
            let ours = squared_error(&values, &weights, &means);
            let best = least[clusters - 1];
            assert!(ours <= best * (1.0 + 1e-9) + 1e-25, "{count} values, {clusters} clusters: {ours} > {best}");
        }
    }
    // As large as it gets: every f16 there is.
    let mut values: Vec<f64> = (0..=0xFFFF).map(f16::from_bits).filter(|v| v.is_finite()).map(f64::from).collect();
    values.sort_by(f64::total_cmp);
    let ones = vec![1.0; values.len()];
    for clusters in [64, 256] {
        let means = kmeans::means(&values, &ones, clusters);
        assert_eq!(means.len(), clusters);
        // One more entry helps, one less hurts, and each entry is the mean of its members.
        let error = |clusters| squared_error(&values, &ones, &kmeans::means(&values, &ones, clusters));
        assert!(error(clusters - 1) > error(clusters) && error(clusters) > error(clusters + 1));
    }
}

/// Student's t with 4 degrees of freedom, nearly: heavier tails than a normal.
fn heavy_tailed(count: usize, scale: f64, random: &mut ChaCha8Rng) -> Vec<f16> {
    let mut normal = || (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
    (0..count)
        .map(|_| {
            let spread: f64 = (0..4).map(|_| normal().powi(2)).sum::<f64>() / 4.0;
            f16::from_f64(scale * normal() / spread.sqrt())
        })
        .collect()
}

#[test]
fn k_means_is_never_worse_than_lloyds_best_of_ten() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    for (round, bits) in [1, 2, 4, 6].into_iter().cycle().take(8).enumerate() {
        let values = heavy_tailed(3000, [0.02, 1.0][round % 2], &mut random);
        let fit = kmeans::fit(&values, &[30, 100], bits).unwrap();
        let mut wide: Vec<f64> = values.iter().map(|v| v.to_f64()).collect();
        wide.sort_by(f64::total_cmp);
        let ones = vec![1.0; wide.len()];
        let lloyd = (0..10)
            .map(|_| {
                let mut entries: Vec<f64> =
                    (0..1 << bits).map(|_| wide[random.random::<u32>() as usize % wide.len()]).collect();
                for _ in 0..100 {
                    let mut sums = vec![(0.0, 0.0); entries.len()];
                    for &v in &wide {
                        let near = (0..entries.len())
                            .min_by(|&a, &b| (v - entries[a]).abs().total_cmp(&(v - entries[b]).abs()))
                            .unwrap();
                        sums[near] = (sums[near].0 + v, sums[near].1 + 1.0);
                    }
                    for (entry, (sum, n)) in entries.iter_mut().zip(sums) {
                        *entry = if n > 0.0 { sum / n } else { *entry };
                    }
                }
                squared_error(&wide, &ones, &entries)
            })
            .fold(f64::INFINITY, f64::min);
        // Our entries are rounded to f16, Lloyd's are not.
        assert!(fit.error * 3000.0 <= lloyd * (1.0 + 1e-4), "{bits} bits: {} > {lloyd}", fit.error * 3000.0);
        let dense: Vec<f64> = fit.palette.dense().iter().map(|v| v.to_f64()).collect();
        let own: f64 = values.iter().zip(&dense).map(|(v, d)| (v.to_f64() - d).powi(2)).sum::<f64>() / 3000.0;
        assert!((own - fit.error).abs() <= 1e-12 * own, "{own} is reported as {}", fit.error);
        let nearest = squared_error(&wide, &ones, &fit.palette.entries.iter().map(|e| e.to_f64()).collect::<Vec<_>>());
        assert!((own * 3000.0 - nearest).abs() <= 1e-9 * nearest, "not every weight has its nearest entry");
    }
}

#[test]
fn degenerate_weights_have_palettes_too() {
    let of = |values: &[f32]| values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
    let tiny = f16::from_bits(1).to_f32();
    let exact: [&[f32]; 8] = [
        &[],
        &[0.0; 7],
        &[-0.0, 0.0, -0.0],
        &[0.3; 9],
        &[-1.5, 2.25, -1.5, 2.25],
        &[65504.0, -65504.0, -65504.0],
        &[tiny, tiny, -tiny],
        &[tiny, 65504.0],
    ];
    for values in exact {
        for bits in BITS {
            let values = of(values);
            let fit = kmeans::fit(&values, &[values.len() as i64], bits).unwrap();
            assert_eq!(fit.error, 0.0);
            assert_eq!(fit.palette.entries.len(), 1 << bits);
            assert!(fit.palette.dense().iter().zip(&values).all(|(d, v)| d == v), "{values:?}, {bits} bits");
        }
    }
    // One outlier of 3 million times the others' size takes one entry and costs the others nothing else.
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut values = heavy_tailed(5000, 0.02, &mut random);
    let without = kmeans::fit(&values, &[5000], 2).unwrap();
    values.push(f16::from_f32(-60000.0));
    let fit = kmeans::fit(&values, &[5001], 2).unwrap();
    assert_eq!(fit.palette.entries[0], f16::from_f32(-60000.0));
    let wide: Vec<f64> = values[..5000].iter().map(|v| v.to_f64()).collect();
    assert!(fit.error * 5001.0 > without.error * 5000.0 && fit.error < 1.0, "{}", fit.error);
    let mut sorted = wide.clone();
    sorted.sort_by(f64::total_cmp);
    let three = squared_error(&sorted, &vec![1.0; 5000], &kmeans::means(&sorted, &vec![1.0; 5000], 3));
    assert!((fit.error * 5001.0 - three).abs() < 1e-4 * three, "{} is not {three}", fit.error * 5001.0);

    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9] {
        let message = error(kmeans::fit(&of(&[1.0, bad]), &[2], 2));
        assert!(message.contains("1 of its values"), "{message}");
        let tensor = Tensor::from_slice(&[1.0, bad]);
        assert!(Histogram::of(&tensor, Code::F16, false).is_err());
        assert!(Histogram::of(&tensor, Code::fixed(0.1), false).is_err());
    }
    assert!(kmeans::fit(&of(&[1.0, 2.0]), &[3], 2).is_err());
}

#[test]
fn a_network_is_palettized_by_threshold() {
    let parameter = |name: &str, shape: &[i64], palettizable: bool| Parameter {
        name: name.to_string(),
        shape: shape.to_vec(),
        initial: Initial::Constant(0.0),
        palettizable,
    };
    let parameters = [
        parameter("large.weight", &[64, 33], true),
        parameter("just.weight", &[64, 32], true),
        parameter("norm.weight", &[4096], false),
    ];
    let chosen = post_training::chosen(&parameters, Form::per_tensor(4), post_training::WEIGHT_THRESHOLD).forms;
    assert_eq!(chosen.into_iter().collect::<Vec<_>>(), [("large.weight".to_string(), Form::per_tensor(4))]);

    let chosen =
        BTreeMap::from([2, 8].map(Form::per_tensor).map(|f| (if f.bits == 2 { "a" } else { "b" }.to_string(), f)));
    let make = |kind| {
        tch::manual_seed(1);
        let tensor = |n: &str, shape: &[i64]| Ok((n.to_string(), Tensor::randn(shape, (kind, Device::Cpu))));
        vec![tensor("a", &[10, 9, 3, 3]), tensor("b", &[100, 5]), tensor("c", &[7])]
    };
    let run = |weights: Vec<anyhow::Result<(String, Tensor)>>| {
        let layers = std::sync::Mutex::new(Vec::new());
        let about = BTreeMap::from([("recipe".to_string(), "palettize --bits 2".to_string())]);
        let made = post_training::palettize(weights.into_iter(), &chosen, Weights::new(), about, &|layer| {
            layers.lock().unwrap().push((layer.name.clone(), layer.elements, layer.form.bits, layer.relative_error));
        })?;
        Ok((made, layers.into_inner().unwrap()))
    };
    for kind in [Kind::Half, Kind::Float, Kind::BFloat16] {
        let (made, mut layers) = run(make(kind)).unwrap();
        layers.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!((layers[0].1, layers[0].2, layers[1].1, layers[1].2), (810, 2, 500, 8));
        // The k-means of a normal distribution in 4 intervals leaves 0.1175 of its variance.
        assert!((layers[0].3 - 0.1175).abs() < 0.02, "{}", layers[0].3);
        let original: BTreeMap<String, Tensor> = make(kind).into_iter().map(|item| item.unwrap()).collect();
        for (name, tensor) in made.weights(Kind::Double, Device::Cpu).unwrap() {
            let weight = original[&name].to_kind(Kind::Half).to_kind(Kind::Double);
            assert_eq!(tensor.size(), weight.size());
            let error = (&tensor - &weight).square().sum(Kind::Double) / weight.square().sum(Kind::Double);
            let reported = layers.iter().find(|l| l.0 == name).map_or(0.0, |l| l.3);
            assert!((error.double_value(&[]) - reported).abs() < 1e-9, "{name}");
        }
        assert_eq!(made.metadata["recipe"], "palettize --bits 2");
    }
    let mut infinite = make(Kind::Float);
    infinite[2] = Ok(("c".to_string(), Tensor::from_slice(&[1e9f32])));
    assert!(error(run(infinite)).contains("parameter c: 1 of its values"));
    let mut missing = make(Kind::Float);
    drop(missing.swap_remove(0));
    assert!(error(run(missing)).contains("parameter a is to become a palette"));
    let mut unreadable = make(Kind::Float);
    unreadable.push(Err(anyhow::anyhow!("the disk is gone")));
    assert!(error(run(unreadable)).contains("the disk is gone"));
}
