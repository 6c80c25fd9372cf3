//! From tensors to picture files.

use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use image::{ImageFormat, RgbImage, imageops};
use tch::{Kind, Tensor};

use crate::source::files::write_bytes;

/// A picture `[3, H, W]` of values from 0 to 1, rounded to 8 bits.
pub fn to_rgb(picture: &Tensor) -> Result<RgbImage> {
    let size = picture.size();
    ensure!(size.len() == 3 && size[0] == 3, "a picture has the shape [3, height, width], not {size:?}");
    let bytes = (picture.to_kind(Kind::Float) * 255.0).round().clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let bytes = Vec::<u8>::try_from(bytes.permute([1, 2, 0]).contiguous().flatten(0, -1))?;
    RgbImage::from_raw(size[2] as u32, size[1] as u32, bytes).context("a picture's bytes do not fill it")
}

/// Pictures in rows of `columns`, `gap` white pixels between them, each cell as large as the largest.
pub fn grid(pictures: &[RgbImage], columns: usize, gap: u32) -> RgbImage {
    let columns = columns.clamp(1, pictures.len().max(1));
    let rows = pictures.len().div_ceil(columns) as u32;
    let width = pictures.iter().map(RgbImage::width).max().unwrap_or(0);
    let height = pictures.iter().map(RgbImage::height).max().unwrap_or(0);
    let along = |count: u32, side: u32| (count * (side + gap)).saturating_sub(gap);
    let white = image::Rgb([255; 3]);
    let mut sheet = RgbImage::from_pixel(along(columns as u32, width), along(rows, height), white);
    for (index, picture) in pictures.iter().enumerate() {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        imageops::replace(&mut sheet, picture, i64::from(column * (width + gap)), i64::from(row * (height + gap)));
    }
    sheet
}

/// Writes a PNG: whole or, on an error, not at all.
pub fn save_png(picture: &RgbImage, path: &Path) -> Result<()> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).with_context(|| format!("cannot encode {}", path.display()))?;
    write_bytes(path, png.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_survives_the_file_and_the_grid() {
        let picture = (Tensor::arange(24, (Kind::Float, tch::Device::Cpu)) / 23.0).view([3, 2, 4]);
        let rgb = to_rgb(&picture).unwrap();
        assert_eq!(rgb.dimensions(), (4, 2));
        // Row 1, column 3: elements 7, 15 and 23 of the three planes.
        assert_eq!(rgb.get_pixel(3, 1).0, [7, 15, 23].map(|i| (i as f32 / 23.0 * 255.0).round() as u8));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let sheet = grid(&[rgb.clone(), rgb.clone(), rgb.clone()], 2, 1);
        save_png(&sheet, &path).unwrap();
        let read = image::open(&path).unwrap().to_rgb8();
        assert_eq!(read.dimensions(), (9, 5));
        assert_eq!(read.get_pixel(3, 4), rgb.get_pixel(3, 1));
        assert_eq!(read.get_pixel(8, 1), rgb.get_pixel(3, 1));
        assert_eq!(read.get_pixel(4, 0).0, [255; 3]);
    }
}
