//! One picture file → a tensor, as diffusers' training scripts make it: decoded, turned as its EXIF orientation says,
//! brought to RGB, its shorter side resized to the resolution, cropped, scaled to [-1, 1].
//!
//! PNG, JPEG (baseline, progressive, gray, CMYK), WebP and BMP, told by their content, not by their name; 8 and 16
//! bits. What is transparent becomes white. Colour profiles are not applied (diffusers applies none either).

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, bail};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};
use tch::{Kind, Tensor};

use super::resample::{Filter, resize};

/// Which part of a resized picture is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    /// The middle, as torchvision's `CenterCrop`.
    Center,
    /// The part at these fractions, in [0, 1), of the freedom across and down; for random crops.
    At(f64, f64),
}

/// How a picture becomes the input of a network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transform {
    /// Size of the result, px.
    pub width: u32,
    pub height: u32,
    pub filter: Filter,
    pub crop: Crop,
    /// Mirrors left and right.
    pub flip: bool,
}

impl Transform {
    /// The transform of diffusers' DreamBooth script with `--center_crop`: bilinear, the middle, not mirrored.
    pub fn center(width: u32, height: u32) -> Self {
        Self { width, height, filter: Filter::Bilinear, crop: Crop::Center, flip: false }
    }

    /// Resizes so that the picture just covers the target, then crops and mirrors.
    pub fn apply(&self, picture: &RgbImage) -> RgbImage {
        let ((wide, tall), (x, y)) = self.placed(picture.width(), picture.height());
        let resized = resize(picture, wide, tall, self.filter);
        let mut cropped = image::imageops::crop_imm(&resized, x, y, self.width, self.height).to_image();
        if self.flip {
            image::imageops::flip_horizontal_in_place(&mut cropped);
        }
        cropped
    }

    /// What a picture of `w` × `h` px is resized to, and left and top of the part that is kept.
    fn placed(&self, w: u32, h: u32) -> ((u32, u32), (u32, u32)) {
        let (w, h) = (u64::from(w), u64::from(h));
        let (width, height) = (u64::from(self.width), u64::from(self.height));
        // torchvision's rule: the tight side exactly, the other one rounded down.
        let (wide, tall) = if w * height <= h * width { (width, width * h / w) } else { (height * w / h, height) };
        let origin = match self.crop {
            Crop::Center => (middle(wide - width), middle(tall - height)),
            Crop::At(x, y) => (at(x, wide - width), at(y, tall - height)),
        };
        ((wide as u32, tall as u32), origin)
    }

    /// What Stable Diffusion XL is told of a picture of `w` × `h` px that went through: its height and width, top and
    /// left of the part that was kept in the resized picture (mirrored first, where it is), height and width of the
    /// result.
    pub fn size_ids(&self, w: u32, h: u32) -> [i64; 6] {
        let ((wide, _), (x, y)) = self.placed(w, h);
        let left = if self.flip { wide - self.width - x } else { x };
        [h, w, y, left, self.height, self.width].map(i64::from)
    }

    /// All that the result depends on beside the picture, for cache keys.
    pub fn describe(&self) -> String {
        format!("{self:?}")
    }
}

/// Half of `room` as Python's `round` has it: halves go to the even neighbour.
fn middle(room: u64) -> u32 {
    let half = room / 2;
    (if room % 2 == 1 && half % 2 == 1 { half + 1 } else { half }) as u32
}

fn at(fraction: f64, room: u64) -> u32 {
    ((fraction * (room + 1) as f64) as u64).min(room) as u32
}

/// Width and height of the picture at `path`, upright, from its header.
///
/// # Errors
/// One line naming the file: not readable, not a picture.
pub fn picture_size(path: &Path) -> Result<(u32, u32)> {
    let size = || {
        let mut decoder = ImageReader::open(path)?.with_guessed_format()?.into_decoder()?;
        let (width, height) = decoder.dimensions();
        let turned = matches!(
            decoder.orientation()?,
            Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
        );
        anyhow::Ok(if turned { (height, width) } else { (width, height) })
    };
    size().with_context(|| format!("cannot read the picture {}", path.display()))
}

/// Reads the picture at `path`: `f32 [3, H, W]` in [-1, 1] on the CPU.
///
/// # Errors
/// As [`read_picture`].
pub fn load_picture(path: &Path, transform: &Transform) -> Result<Tensor> {
    to_tensor(&transform.apply(&read_picture(path)?))
}

/// Decodes the picture at `path`: upright, RGB, what is transparent on white.
///
/// # Errors
/// One line naming the file: not readable, not a picture, truncated or damaged.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    let bytes = fs::read(path).with_context(|| format!("cannot read the picture {}", path.display()))?;
    decode_picture(&bytes).with_context(|| format!("cannot read the picture {}", path.display()))
}

/// [`read_picture`] from the file's bytes; errors do not name the file.
pub fn decode_picture(bytes: &[u8]) -> Result<RgbImage> {
    if bytes.is_empty() {
        bail!("the file is empty");
    }
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::WebP | ImageFormat::Bmp) => {}
        // The decoder fills what is missing with gray and says nothing.
        Some(ImageFormat::Jpeg) if !jpeg_has_end(bytes) => {
            bail!("the JPEG is truncated: it stops before its end marker, after {} bytes", bytes.len())
        }
        Some(ImageFormat::Jpeg) => {}
        Some(other) => bail!("it is a {other:?} file; convert it to PNG or JPEG"),
        None => bail!("its content is not that of a picture (PNG, JPEG, WebP, BMP)"),
    }
    let damaged = "the picture is damaged or truncated";
    let mut decoder = reader.into_decoder().context(damaged)?;
    let orientation = decoder.orientation().context(damaged)?;
    let mut picture = DynamicImage::from_decoder(decoder).context(damaged)?;
    if picture.width() == 0 || picture.height() == 0 {
        bail!("the picture is {} x {} px", picture.width(), picture.height());
    }
    picture.apply_orientation(orientation);
    if !picture.color().has_alpha() {
        return Ok(picture.into_rgb8());
    }
    let rgba = picture.into_rgba8();
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    for (to, from) in rgb.pixels_mut().zip(rgba.pixels()) {
        let alpha = u32::from(from[3]);
        for channel in 0..3 {
            to[channel] = ((u32::from(from[channel]) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        }
    }
    Ok(rgb)
}

/// `f32 [3, H, W]` in [-1, 1].
pub fn to_tensor(picture: &RgbImage) -> Result<Tensor> {
    let size = [i64::from(picture.height()), i64::from(picture.width()), 3];
    let pixels = Tensor::f_from_data_size(picture.as_raw(), &size, Kind::Uint8)?;
    Ok(pixels.f_permute([2, 0, 1])?.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1)?.f_contiguous()?)
}

/// Whether the first picture of a JPEG file has its end marker: walks the segments, and in the coded data of each
/// scan looks for a marker that is neither a stuffed byte (FF 00) nor a restart (FF D0 … FF D7). What follows the end
/// (a second picture, a maker's note) does not matter.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        let Some(skip) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) else {
            return false;
        };
        at += skip;
        let Some(skip) = bytes[at..].iter().position(|&byte| byte != 0xff) else {
            return false;
        };
        let marker = bytes[at + skip];
        at += skip + 1;
        match marker {
            0xd9 => return true,
            0x00 | 0x01 | 0xd0..=0xd8 => {}
            // In a scan's coded data, after its header, only the two kinds above occur before the next segment.
            _ => match bytes.get(at..at + 2) {
                Some(length) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        }
    }
}
