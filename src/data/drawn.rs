//! Pictures that the program drew know what drew them: each carries a record in its own file, a chunk of text in the PNG.
//! So a record cannot be lost, be left over or belong to another picture, whenever a run is killed.
//!
//! A picture whose record differs from what would be drawn today is outdated. One that was changed since, by whatever
//! program, is the user's own: the record has the hash of all other bytes of the file.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::picture::png_chunks;
use crate::files::hex;

/// What a picture was drawn from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub prompt: String,
    /// The model by its content.
    pub model: String,
    pub sampler: String,
    pub steps: usize,
    /// As Rust writes it: compared as text.
    pub guidance_scale: String,
    /// px.
    pub size: [i64; 2],
    pub seed: u64,
}

impl Record {
    /// A name for all pictures of this record, for folders.
    pub fn key(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        hex(&Sha256::digest(text.as_bytes()))[..16].to_owned()
    }

    /// What differs in `now`, for messages: `prompt "a dog", now "a cat"`.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let texts = |record: &Self| {
            [
                ("prompt", format!("{:?}", record.prompt)),
                ("model", "another".to_owned()),
                ("sampler", record.sampler.clone()),
                ("steps", record.steps.to_string()),
                ("guidance", record.guidance_scale.clone()),
                ("size", format!("{} × {} px", record.size[0], record.size[1])),
                ("seed", record.seed.to_string()),
            ]
        };
        let model = (self.model != now.model).then(|| "another model".to_owned());
        let others = texts(self).into_iter().zip(texts(now)).filter(|(a, b)| a != b);
        model.into_iter().chain(others.map(|((name, a), (_, b))| format!("{name} {a}, now {b}"))).collect()
    }
}

/// A record with the hash of the picture that carries it.
#[derive(Serialize, Deserialize)]
struct Carried {
    #[serde(flatten)]
    record: Record,
    /// SHA-256 of the file without the record.
    sha256: String,
}

/// The chunk's keyword.
const KEYWORD: &[u8] = b"palettist:drawn";

/// The PNG file `png` with `record` in it.
pub fn with_record(png: &[u8], record: &Record) -> Vec<u8> {
    let carried = Carried { record: record.clone(), sha256: hex(&Sha256::digest(png)) };
    let json = serde_json::to_string(&carried).unwrap_or_default();
    // International text, uncompressed, of no language (PNG specification, 11.3.4.5).
    let data = [b"iTXt", KEYWORD, &[0, 0, 0, 0, 0], json.as_bytes()].concat();
    let mut checksum = flate2::Crc::new();
    checksum.update(&data);
    let chunk = [&(data.len() as u32 - 4).to_be_bytes(), &*data, &checksum.sum().to_be_bytes()].concat();
    // After the header chunk, which is always the first.
    let at = png_chunks(png).next().map_or(png.len(), |(_, range)| range.end);
    [&png[..at], &*chunk, &png[at..]].concat()
}

/// The record of a picture that the program drew and that nobody changed since.
pub fn record_of(path: &Path) -> Option<Record> {
    record_in(&fs::read(path).ok()?)
}

fn record_in(bytes: &[u8]) -> Option<Record> {
    if !bytes.starts_with(b"\x89PNG") {
        return None;
    }
    let text = |range: &std::ops::Range<usize>| -> Option<Vec<u8>> {
        let data = bytes.get(range.start + 8..range.end - 4)?;
        Some(data.strip_prefix(KEYWORD)?.strip_prefix(&[0, 0, 0, 0, 0])?.to_vec())
    };
    let (range, json) = png_chunks(bytes)
        .filter(|(kind, _)| kind == b"iTXt")
        .find_map(|(_, range)| Some((range.clone(), text(&range)?)))?;
    let carried: Carried = serde_json::from_slice(&json).ok()?;
    let mut hash = Sha256::new();
    hash.update(&bytes[..range.start]);
    hash.update(&bytes[range.end..]);
    (hex(&hash.finalize()) == carried.sha256).then_some(carried.record)
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, RgbImage};

    use super::*;
    use crate::data::picture::decode_picture;

    #[test]
    fn a_picture_carries_its_record_until_it_is_changed() {
        let record = Record {
            prompt: "ein Hund, „groß“\n🐕".into(),
            model: "abc".into(),
            sampler: "ddim".into(),
            steps: 25,
            guidance_scale: "7.5".into(),
            size: [512, 512],
            seed: 42,
        };
        let picture = RgbImage::from_fn(9, 7, |x, y| image::Rgb([x as u8, y as u8, 3]));
        let mut png = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut png, ImageFormat::Png).unwrap();
        let png = png.into_inner();
        assert_eq!(record_in(&png), None);
        let drawn = with_record(&png, &record);
        assert_eq!(record_in(&drawn), Some(record.clone()));
        assert_eq!(decode_picture(&drawn).unwrap(), picture, "another decoder reads the file");
        let mut changed = drawn.clone();
        let last = changed.len() - 20;
        changed[last] ^= 1;
        assert_eq!(record_in(&changed), None);
        for cut in 0..drawn.len() {
            assert_eq!(record_in(&drawn[..cut]), None, "cut to {cut}");
        }
        let other = Record { prompt: "a cat".into(), seed: 7, model: "d".into(), ..record.clone() };
        assert_ne!(record.key(), other.key());
        let expected = ["another model", "prompt \"ein Hund, „groß“\\n🐕\", now \"a cat\"", "seed 42, now 7"];
        assert_eq!(record.differences(&other), expected);
    }
}
