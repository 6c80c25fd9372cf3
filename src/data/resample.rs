//! Pillow's resize of 8-bit pictures, to the bit (`src/libImaging/Resample.c`): what diffusers' and kohya's trainers
//! feed their networks.
//!
//! Separable: rows first, then columns, rounded to 8 bits between. When a picture shrinks, the filter is widened by
//! the same factor, so that every source pixel counts (antialiasing). Weights are normalised in double precision and
//! then held in fixed point with 22 fractional bits.

use image::RgbImage;

/// The interpolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle of radius 1: torchvision's default, and that of diffusers' DreamBooth script.
    Bilinear,
    /// Keys' cubic of radius 2 with a = −0.5: CLIP's.
    Bicubic,
    /// A windowed sinc of radius 3: sharper.
    Lanczos,
}

impl Filter {
    fn radius(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match self {
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Bicubic => match x.abs() {
                x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
                _ => 0.0,
            },
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

/// Fractional bits of a weight: 8 bits of pixel and 2 of head room are left in 32.
const PRECISION: u32 = 32 - 8 - 2;

/// Of one output position: the first source position and the weights from there on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let widening = scale.max(1.0);
    let radius = filter.radius() * widening;
    (0..to)
        .map(|position| {
            let center = (position as f64 + 0.5) * scale;
            // `as usize` truncates toward zero and takes negative values to 0, as the C code does in two steps.
            let first = (center - radius + 0.5) as usize;
            let end = ((center + radius + 0.5) as usize).min(from);
            let weights: Vec<f64> =
                (first..end).map(|source| filter.weight((source as f64 - center + 0.5) / widening)).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: &f64| (weight / sum * f64::from(1 << PRECISION)).round() as i32;
            Taps { first, weights: weights.iter().map(fixed).collect() }
        })
        .collect()
}

/// The weighted sum of pixels `step` apart.
fn blend(taps: &Taps, pixels: &[u8], start: usize, step: usize) -> u8 {
    let mut sum = 1i32 << (PRECISION - 1);
    for (tap, weight) in taps.weights.iter().enumerate() {
        sum += i32::from(pixels[start + (taps.first + tap) * step]) * weight;
    }
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// `picture` at another size, as `PIL.Image.resize((width, height), filter)`. Sizes are at least 1.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (old_width, old_height) = (picture.width() as usize, picture.height() as usize);
    let (width, height) = (width.max(1) as usize, height.max(1) as usize);
    let mut pixels = picture.as_raw().clone();
    if width != old_width {
        let taps = taps(old_width, width, filter);
        let mut wide = vec![0; width * old_height * 3];
        for (row, line) in wide.chunks_exact_mut(width * 3).enumerate() {
            for (column, pixel) in line.chunks_exact_mut(3).enumerate() {
                for (channel, value) in pixel.iter_mut().enumerate() {
                    *value = blend(&taps[column], &pixels, row * old_width * 3 + channel, 3);
                }
            }
        }
        pixels = wide;
    }
    if height != old_height {
        let taps = taps(old_height, height, filter);
        let mut tall = vec![0; width * height * 3];
        for (row, line) in tall.chunks_exact_mut(width * 3).enumerate() {
            for (column, value) in line.iter_mut().enumerate() {
                *value = blend(&taps[row], &pixels, column, width * 3);
            }
        }
        pixels = tall;
    }
    RgbImage::from_raw(width as u32, height as u32, pixels).expect("the buffer was made for this size")
}
