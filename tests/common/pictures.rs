//! Folders of pictures that tests make.

use std::fs;
use std::io::Cursor;

use image::{ImageFormat, RgbImage};
use palettist::data::Sample;
use palettist::data::look::look_at;

/// A small picture that no filter flattens.
pub fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 9) as u8, (y * 13) as u8, (x * y * 5) as u8]))
}

/// A picture as a file of this format.
pub fn encoded(picture: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A folder with these files; those named as pictures are pictures.
pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match ImageFormat::from_path(name) {
            Ok(format) if text.is_empty() => fs::write(path, encoded(&picture(20, 16), format)).unwrap(),
            _ => fs::write(path, text).unwrap(),
        }
    }
    folder
}

/// What is wrong with these pictures.
pub fn unreadable(samples: &[Sample]) -> Vec<String> {
    let samples: Vec<&Sample> = samples.iter().collect();
    look_at(&samples).into_iter().filter_map(|look| look.err().map(|error| format!("{error:#}"))).collect()
}
