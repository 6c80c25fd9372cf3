//! Palettes: packing, the palettized checkpoint, k-means, differentiable k-means.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use palettist::palette::packing::{pack, unpack};
use palettist::palette::{BITS, Palette, PalettizedCheckpoint};
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
        .zip([vec![3, 5], vec![4, 3, 3, 3], vec![7, 1], vec![2, 9, 1, 1], vec![300]])
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
    assert_eq!(weights.len(), 8);
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
    for length in [0, 7, 8, 100, good.len() - 1] {
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
    refuse(&replaced(r#""palettist.version":"1""#, r#""palettist.version":"2""#), "version 2");
    refuse(&replaced(r#"\"bits\":4,"#, ""), "missing field");
    refuse(&replaced(r#"\"bits\":4"#, r#"\"bits\":5"#), "not 5");
    refuse(&replaced(r#"\"bits\":4"#, r#"\"bits\":6"#), "layer4.weight: its palette");
    refuse(&replaced(r#"\"shape\":[7,1]"#, r#"\"shape\":[9,1]"#), "layer4.weight: 9 indices");
    refuse(&replaced(r#"\"shape\":[7,1]"#, r#"\"shape\":[-7,-1]"#), "not the shape of a tensor");
    let huge = r#"\"shape\":[9223372036854775807,9223372036854775807]"#;
    refuse(&replaced(r#"\"shape\":[7,1]"#, huge), "not the shape of a tensor");
    let elsewhere = replaced("layer4.weight.indices", "layer4.weight.elsewhr");
    refuse(&elsewhere, "layer4.weight.elsewhr is stored as Uint8");
    refuse(&replaced("layer4.weight.palette", "layer4.weight.elsewhr"), "layer4.weight: `layer4.weight.indices` or");
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
