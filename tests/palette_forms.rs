//! Palettes of every form: what they look up, how they are stored, what is refused.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use palettist::palette::{BITS, Form, LutDtype, Palette, PalettizedCheckpoint};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

fn error<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

/// Every form that a weight of `shape` can have, groups of 1, 2, 4 and all channels among them.
fn forms(shape: &[i64]) -> Vec<Form> {
    let mut forms = Vec::new();
    for bits in BITS {
        for axis in [0, 1] {
            let all = shape.get(axis).copied().unwrap_or(1) as usize;
            for group_size in [None, Some(1), Some(2), Some(4), Some(all)] {
                for cluster_dim in [1, 2, 4] {
                    for per_channel_scale in [false, true] {
                        for lut_dtype in [LutDtype::F16, LutDtype::I8] {
                            forms.push(Form { bits, group_size, axis, cluster_dim, per_channel_scale, lut_dtype });
                        }
                    }
                }
            }
        }
    }
    forms.retain(|form| form.problem().is_none() && form.misfit(shape).is_none());
    forms
}

fn random_palette(form: Form, shape: &[i64], random: &mut ChaCha8Rng) -> Palette {
    let count = shape.iter().product::<i64>() as usize / form.cluster_dim;
    let indices = (0..count).map(|_| (random.random::<u32>() % (1 << form.bits)) as u8).collect();
    let entries = (0..(form.groups(shape) * form.cluster_dim) << form.bits)
        .map(|_| match form.lut_dtype {
            LutDtype::F16 => f16::from_f32(random.random::<f32>() - 0.5),
            LutDtype::I8 => f16::from_f32((random.random::<u32>() % 255) as f32 - 127.0),
        })
        .collect();
    let scales = (0..form.scales(shape)).map(|_| f16::from_f32(0.1 + random.random::<f32>())).collect();
    Palette::with_form(form, shape.to_vec(), indices, entries, scales).unwrap()
}

/// The definition, element by element, by coordinates.
fn by_definition(palette: &Palette) -> Vec<f16> {
    let Palette { form, shape, indices, entries, scales } = palette;
    let (d, size) = (form.cluster_dim, 1usize << form.bits);
    let strides = |shape: &[i64]| -> Vec<usize> {
        (0..shape.len()).map(|axis| shape[axis + 1..].iter().product::<i64>() as usize).collect()
    };
    let mut of_indices = shape.clone();
    if d > 1 {
        of_indices[form.axis] /= d as i64;
    }
    let (here, there) = (strides(shape), strides(&of_indices));
    (0..shape.iter().product::<i64>() as usize)
        .map(|element| {
            let mut at: Vec<usize> = here.iter().zip(shape).map(|(s, &n)| element / s % n as usize).collect();
            let channel = at.get(form.axis).copied().unwrap_or(0);
            if d > 1 {
                at[form.axis] /= d;
            }
            let index = indices[at.iter().zip(&there).map(|(a, s)| a * s).sum::<usize>()] as usize;
            let group = channel / form.group_size.unwrap_or(usize::MAX);
            let entry = entries[(group * size + index) * d + channel % d];
            match (form.per_channel_scale, form.lut_dtype) {
                (true, _) => f16::from_f64(entry.to_f64() * scales[at[0]].to_f64()),
                (false, LutDtype::I8) => f16::from_f64(entry.to_f64() * scales[group].to_f64()),
                (false, LutDtype::F16) => entry,
            }
        })
        .collect()
}

const SHAPES: [&[i64]; 7] = [&[4, 3], &[8, 4], &[1, 1], &[12, 4, 3, 3], &[4, 8, 1, 1], &[7, 5, 1, 3], &[300]];

#[test]
fn elements_are_looked_up_as_defined() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut tried = 0;
    for shape in SHAPES {
        for form in forms(shape) {
            let palette = random_palette(form, shape, &mut random);
            assert_eq!(palette.dense(), by_definition(&palette), "{form:?} of {shape:?}");
            let tensor = palette.tensor(Kind::Float, Device::Cpu).unwrap();
            assert_eq!(tensor.size(), shape);
            tried += 1;
        }
    }
    assert!(tried > 1000, "{tried}");
    // Larger than one thread's share.
    for form in [
        Form { group_size: Some(16), ..Form::per_tensor(4) },
        Form { group_size: Some(16), axis: 1, ..Form::per_tensor(3) },
        Form { cluster_dim: 4, ..Form::per_tensor(8) },
        Form { per_channel_scale: true, lut_dtype: LutDtype::I8, ..Form::per_tensor(2) },
    ] {
        let palette = random_palette(form, &[64, 320, 3, 3], &mut random);
        assert_eq!(palette.dense(), by_definition(&palette), "{form:?}");
    }
}

#[test]
fn what_is_stored_is_counted() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let bits = |form: Form, shape: &[i64], random: &mut ChaCha8Rng| random_palette(form, shape, random).stored_bits();
    let plain = Form::per_tensor(4);
    assert_eq!(bits(plain, &[32, 10], &mut random), 320 * 4 + 16 * 16);
    assert_eq!(bits(Form::per_tensor(3), &[3, 1], &mut random), 16 + 8 * 16, "indices fill bytes");
    assert_eq!(bits(Form { group_size: Some(8), ..plain }, &[32, 10], &mut random), 320 * 4 + 4 * 16 * 16);
    assert_eq!(bits(Form { cluster_dim: 4, ..plain }, &[32, 10], &mut random), 320 + 16 * 4 * 16);
    assert_eq!(bits(Form { per_channel_scale: true, ..plain }, &[32, 10], &mut random), 320 * 4 + 16 * 16 + 32 * 16);
    let bytes = Form { group_size: Some(8), lut_dtype: LutDtype::I8, ..plain };
    assert_eq!(bits(bytes, &[32, 10], &mut random), 320 * 4 + 4 * 16 * 8 + 4 * 16);
}

fn checkpoint(palettes: impl IntoIterator<Item = Palette>) -> PalettizedCheckpoint {
    let palettes = palettes.into_iter().enumerate().map(|(i, palette)| (format!("layer{i}.weight"), palette)).collect();
    let dense = BTreeMap::from([("norm.weight".to_string(), Tensor::from_slice(&[f16::ONE]))]);
    PalettizedCheckpoint { palettes, dense, metadata: BTreeMap::new() }
}

#[test]
fn every_form_is_read_as_it_was_written() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.palettes.safetensors");
    for shape in SHAPES {
        let written = checkpoint(forms(shape).into_iter().map(|form| random_palette(form, shape, &mut random)));
        written.write(&path).unwrap();
        let read = PalettizedCheckpoint::read(&path).unwrap();
        assert_eq!(read.palettes, written.palettes);
        assert_eq!(read.needs_ios18().is_some(), !shape.is_empty());
    }
}

/// A safetensors file of this header and these bytes.
fn safetensors(header: &str, bytes: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()
}

/// A file as version 0.1 of the program wrote it, byte for byte, and what this one makes of it.
#[test]
fn files_of_the_first_version_are_still_read_and_written() {
    let header = concat!(
        r#"{"__metadata__":{"palettist.palettes":"{\"a.weight\":{\"bits\":1,\"shape\":[2,3]}}","#,
        r#""palettist.version":"1"},"a.weight.indices":{"data_offsets":[4,5],"dtype":"U8","shape":[1]},"#,
        r#""a.weight.palette":{"data_offsets":[0,4],"dtype":"F16","shape":[2]}}"#
    );
    let header = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    let bytes = safetensors(&header, &[0x00, 0x3C, 0x00, 0xC0, 0b10_0110]);
    let folder = tempfile::tempdir().unwrap();
    let (old, again) = (folder.path().join("old.safetensors"), folder.path().join("again.safetensors"));
    std::fs::write(&old, &bytes).unwrap();
    let read = PalettizedCheckpoint::read(&old).unwrap();
    let palette = &read.palettes["a.weight"];
    assert_eq!(palette.form, Form::per_tensor(1));
    let dense: Vec<f32> = palette.dense().iter().map(|v| v.to_f32()).collect();
    assert_eq!(dense, [1.0, -2.0, -2.0, 1.0, 1.0, -2.0]);
    assert_eq!(read.needs_ios18(), None);
    read.write(&again).unwrap();
    assert_eq!(std::fs::read(&again).unwrap(), bytes);
}

/// Reads the file at `path` with its header's text put through `change`.
fn changed(path: &Path, change: impl Fn(String) -> String) -> anyhow::Result<PalettizedCheckpoint> {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let other = path.with_extension("changed");
    std::fs::write(&other, safetensors(&header, &bytes[8 + length..])).unwrap();
    PalettizedCheckpoint::read(&other)
}

#[test]
fn hostile_forms_are_refused() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unet.safetensors");
    let form = Form { group_size: Some(4), cluster_dim: 2, lut_dtype: LutDtype::I8, axis: 1, ..Form::per_tensor(4) };
    checkpoint([random_palette(form, &[6, 8, 3, 3], &mut random)]).write(&path).unwrap();
    let refuse = |from: &str, to: &str, expected: &str| {
        let result = changed(&path, |header| {
            assert!(header.contains(from), "{header}");
            header.replace(from, to)
        });
        let message = error(result);
        assert!(message.contains("layer0.weight") && message.contains(expected), "{message}, not {expected}");
        assert!(!message.contains('\n'), "{message}");
    };
    let of = |key: &str, value: &str| format!(r#"\"{key}\":{value}"#);
    let huge = "18446744073709551615";
    refuse(&of("group_size", "4"), &of("group_size", "0"), "group_size is 0");
    refuse(&of("group_size", "4"), &of("group_size", "3"), "multiple of the 2 weights");
    refuse(&of("group_size", "4"), &of("group_size", "6"), "8 input channels do not divide into groups of 6");
    refuse(&of("group_size", "4"), &of("group_size", "18446744073709551614"), "do not divide");
    refuse(&of("group_size", "4"), &of("group_size", "2"), "`layer0.weight.palette` is Int8 of shape [2, 16, 2]");
    refuse(&of("axis", "1"), &of("axis", "0"), "6 output channels do not divide into groups of 4");
    refuse(&of("axis", "1"), &of("axis", "2"), "axis is 2");
    refuse(&of("axis", "1"), &of("axis", huge), "axis is 1844");
    refuse(&of("cluster_dim", "2"), &of("cluster_dim", "4"), "`layer0.weight.indices` is Uint8");
    refuse(&of("cluster_dim", "2"), &of("cluster_dim", "0"), "cluster_dim is 0");
    refuse(&of("cluster_dim", "2"), &of("cluster_dim", huge), "cluster_dim is 1844");
    refuse(&of("lut_dtype", r#"\"i8\""#), &of("lut_dtype", r#"\"f16\""#), "Half of shape [2, 16, 2] is expected");
    refuse(&of("shape", "[6,8,3,3]"), &of("shape", "[6]"), "it has no axis 1");
    refuse(&of("shape", "[6,8,3,3]"), &of("shape", "[]"), "it has no axis 1");
    refuse(&of("shape", "[6,8,3,3]"), &of("shape", "[8,6,3,3]"), "do not divide");
    refuse(&of("shape", "[6,8,3,3]"), &of("shape", "[6,0,3,3]"), "do not divide");
    refuse("layer0.weight.scales", "layer0.weight.scalex", "`layer0.weight.scales` is missing");
    let unknown = changed(&path, |header| header.replace("group_size", "group_sise"));
    assert!(error(unknown).contains("group_sise"));
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let h = f16::from_f32;
    let make = |form: Form, indices: Vec<u8>, entries: Vec<f16>, scales: Vec<f16>| {
        error(Palette::with_form(form, vec![2, 2], indices, entries, scales))
    };
    let plain = Form::per_tensor(1);
    let scaled = Form { per_channel_scale: true, ..plain };
    let bytes = Form { lut_dtype: LutDtype::I8, ..plain };
    let (indices, entries) = (vec![0, 1, 1, 0], vec![h(1.0), h(2.0)]);
    let of = |form| (form, indices.clone(), entries.clone());
    let (form, i, e) = of(plain);
    assert!(make(form, i, e, vec![h(1.0)]).contains("has 0 scales, not 1"));
    let (form, i, e) = of(scaled);
    assert!(make(form, i, e, vec![h(1.0)]).contains("has 2 scales, not 1"));
    let (form, i, e) = of(scaled);
    assert!(make(form, i, e, vec![h(1.0), f16::INFINITY]).contains("times its scale is"));
    let (form, i, _) = of(scaled);
    assert!(make(form, i, vec![h(60000.0), h(1.0)], vec![h(2.0), h(1.0)]).contains("times its scale is inf"));
    let (form, i, _) = of(bytes);
    assert!(make(form, i, vec![h(0.5), h(1.0)], vec![h(1.0)]).contains("0.5, which is not an 8-bit integer"));
    let (form, i, _) = of(bytes);
    assert!(make(form, i, vec![h(128.0), h(1.0)], vec![h(1.0)]).contains("128, which is not an 8-bit integer"));
    let (form, i, e) = of(Form { group_size: Some(1), ..plain });
    assert!(make(form, i, e, vec![]).contains("has 2 × 2 entries, not 2"));
    let (form, i, e) = of(Form { cluster_dim: 2, ..plain });
    assert!(make(form, i, [e.clone(), e].concat(), vec![]).contains("4 indices for 2 of them each"));
    let (form, _, e) = of(plain);
    assert!(make(form, vec![0, 1, 2, 0], e, vec![]).contains("index 2 points past the 2 entries"));
}
