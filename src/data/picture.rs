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
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, RgbImage};
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

/// Width and height of a picture, upright, from its header.
///
/// # Errors
/// It is not a picture.
pub fn picture_size(bytes: &[u8]) -> Result<(u32, u32)> {
    let mut decoder = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let turned = matches!(
        decoder.orientation()?,
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
    );
    Ok(if turned { (height, width) } else { (width, height) })
}

/// Reads the picture at `path`: `f32 [3, H, W]` in [-1, 1] on the CPU.
///
/// # Errors
/// As [`read_picture`].
pub fn load_picture(path: &Path, transform: &Transform) -> Result<Tensor> {
    to_tensor(&transform.apply(&read_picture(path)?))
}

/// As [`load_picture`], from the file's bytes.
///
/// # Errors
/// As [`decode_picture`].
pub fn load_bytes(bytes: &[u8], transform: &Transform) -> Result<Tensor> {
    to_tensor(&transform.apply(&decode_picture(bytes)?))
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
    if let Some(what) = not_a_picture(bytes) {
        bail!("{what}");
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
    let mut decoder = match reader.into_decoder() {
        // The decoder's own limit, which it checks before it tells the size.
        Err(ImageError::Limits(_)) => {
            bail!("the picture has more than {} million pixels; make it smaller", MOST_PIXELS >> 20)
        }
        decoder => decoder.context(damaged)?,
    };
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    let orientation = decoder.orientation().context(damaged)?;
    let mut picture = DynamicImage::from_decoder(decoder).context(damaged)?;
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

/// A picture of more pixels is taken for a damaged or hostile one: those of the largest cameras have 200 million.
const MOST_PIXELS: u64 = 1 << 28;
/// A picture whose sides differ more would be cropped to less than a twentieth of it, after it was enlarged to a size that
/// memory may not hold.
const LONGEST: u32 = 20;

/// Refuses a picture that cannot become an example, from its header alone.
fn check_size(width: u32, height: u32) -> Result<()> {
    let size = format!("the picture is {width} x {height} px");
    if width == 0 || height == 0 {
        bail!("{size}");
    }
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        bail!("{size}, more than {} million pixels; make it smaller", MOST_PIXELS >> 20);
    }
    if width.max(height) / width.min(height) >= LONGEST {
        bail!("{size}: one side is more than {LONGEST} times the other; crop it, or leave it out");
    }
    Ok(())
}

/// What other files that come under a picture's name are, by how they begin.
fn not_a_picture(bytes: &[u8]) -> Option<&'static str> {
    let start = bytes.get(..bytes.len().min(1024))?;
    let text = start.trim_ascii_start();
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii_start();
    let begins = |with: &str| text.get(..with.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(with.as_bytes()));
    let brand = start.get(4..12).filter(|box_| box_.starts_with(b"ftyp")).map(|box_| &box_[4..]);
    Some(match brand {
        Some(b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"mif1" | b"msf1") => {
            "it is a HEIC file; convert it to PNG or JPEG"
        }
        Some(b"avif" | b"avis") => "it is an AVIF file; convert it to PNG or JPEG",
        Some(_) => "it is a video",
        None if begins("version https://git-lfs.github.com/") => {
            "it is a Git LFS pointer in place of the picture: run `git lfs pull` where it came from"
        }
        None if begins("<!doctype html") || begins("<html") || begins("<head") => {
            "it is a web page (HTML) saved under a picture's name: download the picture itself"
        }
        None if begins("<svg") => "it is an SVG file; convert it to PNG or JPEG",
        None if begins("<?xml") => match start.windows(4).any(|four| four == b"<svg") {
            true => "it is an SVG file; convert it to PNG or JPEG",
            false => "it is an XML file, such as servers answer errors with: download the picture itself",
        },
        None if begins("{") => "it is a JSON file, such as servers answer errors with: download the picture itself",
        None if begins("%pdf") => "it is a PDF file; convert it to PNG or JPEG",
        None if start.starts_with(b"PK\x03\x04") => "it is a ZIP file; unpack it",
        None if start.starts_with(b"\x00\x00\x00\x0cJXL ") || start.starts_with(b"\xff\x0a") => {
            "it is a JPEG XL file; convert it to PNG or JPEG"
        }
        _ => return None,
    })
}

/// Whether a PNG or WebP file has several pictures to show one after the other; the first one is read.
pub fn is_animated(bytes: &[u8]) -> bool {
    match bytes {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', b'V', b'P', b'8', b'X', _, _, _, _, flags, ..] => {
            flags & 2 != 0
        }
        // Its control chunk stands before the picture.
        [0x89, b'P', b'N', b'G', ..] => {
            png_chunks(bytes).take_while(|(kind, _)| kind != b"IDAT").any(|(kind, _)| kind == *b"acTL")
        }
        _ => false,
    }
}

/// The chunks of a PNG file: their types, and where they lie with their length and checksum.
pub fn png_chunks(bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], std::ops::Range<usize>)> {
    let mut at = 8;
    std::iter::from_fn(move || {
        let head = bytes.get(at..at + 8)?;
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let range = at..at.checked_add(length)?.checked_add(12)?;
        bytes.get(range.clone())?;
        at = range.end;
        Some(([head[4], head[5], head[6], head[7]], range))
    })
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
