//! Pictures from tensors, and many on one sheet.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use image::{ImageFormat, Rgb, RgbImage};
use tch::{Device, Kind, Tensor};

use crate::files::write_bytes;

/// The picture of a tensor `[3, H, W]` with values from 0 to 1; what lies outside is clipped, as diffusers does.
///
/// # Errors
/// When the shape is another.
pub fn from_tensor(tensor: &Tensor) -> Result<RgbImage> {
    let (channels, height, width) = tensor.size3().context("a picture is [3, H, W]")?;
    ensure!(channels == 3, "a picture has 3 channels, not {channels}");
    let _no_grad = tch::no_grad_guard();
    let bytes = tensor
        .f_to_device(Device::Cpu)?
        .f_to_kind(Kind::Float)?
        .f_mul_scalar(255.0)?
        .f_nan_to_num(0.0, None, None)?
        .f_clamp(0.0, 255.0)?
        .f_round()?
        .f_permute([1, 2, 0])?
        .f_to_kind(Kind::Uint8)?
        .f_contiguous()?
        .f_view([-1])?;
    let bytes: Vec<u8> = Vec::try_from(&bytes)?;
    RgbImage::from_raw(width as u32, height as u32, bytes).context("a picture's bytes do not fill it")
}

/// One sheet of rows of pictures, `gap` white pixels between them and around. Rows may differ in length, pictures in
/// size: each column is as wide as its widest.
pub fn sheet(rows: &[Vec<RgbImage>], gap: u32) -> RgbImage {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widest = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|p| p.width()).max().unwrap_or(0);
    let widths: Vec<u32> = (0..columns).map(widest).collect();
    let heights: Vec<u32> = rows.iter().map(|row| row.iter().map(|p| p.height()).max().unwrap_or(0)).collect();
    let total = |sizes: &[u32]| sizes.iter().map(|size| size + gap).sum::<u32>() + gap;
    let mut sheet = RgbImage::from_pixel(total(&widths), total(&heights), Rgb([255; 3]));
    let mut y = gap;
    for (row, height) in rows.iter().zip(&heights) {
        let mut x = gap;
        for (picture, width) in row.iter().zip(&widths) {
            image::imageops::replace(&mut sheet, picture, i64::from(x), i64::from(y));
            x += width + gap;
        }
        y += height + gap;
    }
    sheet
}

/// The bytes of a PNG file.
///
/// # Errors
/// None that a picture of at least one pixel gives.
pub fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).context("writing a PNG")?;
    Ok(bytes.into_inner())
}

/// Writes a PNG whole or not at all.
///
/// # Errors
/// The system's, naming the file.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    write_bytes(path, &png(picture)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_becomes_its_picture() {
        // Channels are planes: red, green, blue of two pixels.
        let tensor = Tensor::from_slice(&[0f32, 1.0, 0.5, 9.0, -9.0, f32::NAN]).view([3, 1, 2]);
        let picture = from_tensor(&tensor).unwrap();
        assert_eq!((picture.width(), picture.height()), (2, 1));
        assert_eq!(picture.into_raw(), [0, 128, 0, 255, 255, 0]);
        assert!(from_tensor(&Tensor::from_slice(&[0f32; 4]).view([1, 2, 2])).is_err());
    }

    #[test]
    fn a_sheet_places_each_picture() {
        let (red, blue) = (Rgb([255, 0, 0]), Rgb([0, 0, 255]));
        let rows = [
            vec![RgbImage::from_pixel(2, 3, red), RgbImage::from_pixel(4, 2, blue)],
            vec![RgbImage::from_pixel(3, 1, blue)],
        ];
        let sheet = sheet(&rows, 1);
        assert_eq!((sheet.width(), sheet.height()), (1 + 3 + 1 + 4 + 1, 1 + 3 + 1 + 1 + 1));
        for (x, y, colour) in
            [(1, 1, red), (2, 3, red), (3, 1, Rgb([255; 3])), (5, 1, blue), (8, 2, blue), (1, 5, blue)]
        {
            assert_eq!(*sheet.get_pixel(x, y), colour, "at {x}, {y}");
        }
    }
}
