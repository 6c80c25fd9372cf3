//! How pictures are made ready for a CLIP: transformers' `CLIPImageProcessor`, as it computes with Pillow.

use std::borrow::Cow;

use anyhow::{Result, bail, ensure};
use image::RgbImage;
use image::imageops::{crop_imm, replace};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::data::resample::{Filter, resize};
use crate::networks::vision::VisionConfig;

/// No picture is made larger on its way into a CLIP: a file that asks for more is damaged.
const MOST_PIXELS: i64 = 8192;

/// What a picture is resized to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Size {
    /// The shorter side; the longer one follows, rounded down.
    Shortest(u32),
    Exact {
        width: u32,
        height: u32,
    },
}

/// The steps, each where it is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessor {
    resize: Option<(Size, Filter)>,
    /// Width and height of the middle that is kept; black around a picture that is smaller.
    crop: Option<(u32, u32)>,
    /// What bytes are multiplied by.
    rescale: f64,
    /// What is subtracted from each channel, and what it is divided by.
    normalize: Option<([f64; 3], [f64; 3])>,
}

impl Preprocessor {
    /// Reads `preprocessor_config.json`. What is missing there takes `CLIPImageProcessor`'s default.
    ///
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub fn from_json(json: &Value) -> Result<Self> {
        ensure!(json.is_object(), "it is not an object");
        let get = |key: &str| json.get(key).filter(|value| !value.is_null());
        let flag = |key: &str| match get(key) {
            None => Ok(true),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => bail!("`{key}` is {other}; true or false is expected"),
        };
        let numbers = |key: &str, default: [f64; 3]| match get(key) {
            None => Ok(default),
            Some(value) => match serde_json::from_value::<[f64; 3]>(value.clone()) {
                Ok(numbers) if numbers.iter().all(|n| n.is_finite()) => Ok(numbers),
                _ => bail!("`{key}` is {value}; three numbers are expected"),
            },
        };
        let filter = match get("resample").map_or(Some(3), Value::as_u64) {
            Some(1) => Filter::Lanczos,
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            _ => bail!(
                "`resample` is {}, which is not supported (1, Lanczos, 2, bilinear, and 3, bicubic, are)",
                json["resample"]
            ),
        };
        let crop = match get("crop_size").map_or(Ok(Size::Shortest(224)), |value| size("crop_size", value)) {
            // One number is a square's.
            Ok(Size::Shortest(side)) => Ok((side, side)),
            Ok(Size::Exact { width, height }) => Ok((width, height)),
            Err(error) => Err(error),
        };
        let size = get("size").map_or(Ok(Size::Shortest(224)), |value| size("size", value));
        let rescale = match get("rescale_factor").map_or(Some(1.0 / 255.0), Value::as_f64).filter(|f| f.is_finite()) {
            Some(factor) => factor,
            None => bail!("`rescale_factor` is {}; a number is expected", json["rescale_factor"]),
        };
        let mean = numbers("image_mean", [0.48145466, 0.4578275, 0.40821073])?;
        let std = numbers("image_std", [0.26862954, 0.26130258, 0.27577711])?;
        ensure!(!std.contains(&0.0), "`image_std` is {}; zero does not divide", json["image_std"]);
        Ok(Self {
            resize: flag("do_resize")?.then(|| size.map(|size| (size, filter))).transpose()?,
            crop: flag("do_center_crop")?.then_some(crop).transpose()?,
            rescale: if flag("do_rescale")? { rescale } else { 1.0 },
            normalize: flag("do_normalize")?.then_some((mean, std)),
        })
    }

    /// The same, once it is known to give pictures of the size that a CLIP takes.
    ///
    /// # Errors
    /// It gives others.
    pub fn fitting(self, vision: &VisionConfig) -> Result<Self> {
        let side = vision.image_size;
        ensure!(vision.channels == 3, "the CLIP takes pictures of {} channels, and these have 3", vision.channels);
        let given = match (self.crop, self.resize) {
            (Some(size), _) => Some(size),
            (None, Some((Size::Exact { width, height }, _))) => Some((width, height)),
            // Of a square picture.
            (None, Some((Size::Shortest(side), _))) => Some((side, side)),
            (None, None) => None,
        };
        if let Some((width, height)) = given
            && (i64::from(width), i64::from(height)) != (side, side)
        {
            bail!("it makes pictures of {width} × {height} pixels, and the CLIP takes {side} × {side} (`image_size`)");
        }
        Ok(self)
    }

    /// A picture → fp32 `[3, H, W]` on the CPU.
    ///
    /// # Errors
    /// libtorch's.
    pub fn apply(&self, picture: &RgbImage) -> Result<Tensor> {
        let mut picture = Cow::Borrowed(picture);
        if let Some((size, filter)) = self.resize {
            let (width, height) = size.of(picture.width(), picture.height());
            picture = Cow::Owned(resize(&picture, width, height, filter));
        }
        if let Some((width, height)) = self.crop {
            picture = Cow::Owned(middle(&picture, width, height));
        }
        let shape = [i64::from(picture.height()), i64::from(picture.width()), 3];
        let pixels = Tensor::f_from_data_size(picture.as_raw(), &shape, Kind::Uint8)?.f_permute([2, 0, 1])?;
        let pixels = pixels.f_to_kind(Kind::Float)?.f_mul_scalar(self.rescale)?;
        Ok(match self.normalize {
            None => pixels.f_contiguous()?,
            Some((mean, std)) => {
                let channels = |values: [f64; 3]| Tensor::from_slice(&values.map(|n| n as f32)).view([3, 1, 1]);
                pixels.f_sub(&channels(mean))?.f_div(&channels(std))?.f_contiguous()?
            }
        })
    }
}

impl Size {
    /// Width and height that a picture of these sides is resized to.
    fn of(self, width: u32, height: u32) -> (u32, u32) {
        match self {
            Size::Exact { width, height } => (width, height),
            Size::Shortest(side) => {
                let (short, long) = (width.min(height).max(1), width.max(height));
                let long = (f64::from(side) * f64::from(long) / f64::from(short)) as u32;
                if width <= height { (side, long) } else { (long, side) }
            }
        }
    }
}

/// A number, or an object with `shortest_edge` or with `height` and `width`.
fn size(key: &str, value: &Value) -> Result<Size> {
    let side = |value: &Value| value.as_i64().filter(|n| (1..=MOST_PIXELS).contains(n)).map(|n| n as u32);
    let part = |name: &str| value.get(name).filter(|part| !part.is_null()).map(side);
    let found = match (part("shortest_edge"), part("height"), part("width"), part("longest_edge")) {
        (Some(shortest), None, None, None) => shortest.map(Size::Shortest),
        (None, Some(height), Some(width), None) => {
            height.zip(width).map(|(height, width)| Size::Exact { width, height })
        }
        (None, None, None, None) => side(value).map(Size::Shortest),
        _ => None,
    };
    match found {
        Some(size) => Ok(size),
        None => bail!(
            "`{key}` is {value}, which is not supported (a number, {{\"shortest_edge\"}} or {{\"height\", \"width\"}} of 1 \
             to {MOST_PIXELS} pixels is)"
        ),
    }
}

/// The middle of a picture, odd pixels left over at the right and below; black around one that is smaller.
fn middle(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (own_width, own_height) = (picture.width(), picture.height());
    let around = |own: u32, wanted: u32| wanted.saturating_sub(own).div_ceil(2);
    let within = |own: u32, wanted: u32| own.saturating_sub(wanted) / 2;
    if own_width >= width && own_height >= height {
        return crop_imm(picture, within(own_width, width), within(own_height, height), width, height).to_image();
    }
    let mut canvas = RgbImage::new(width.max(own_width), height.max(own_height));
    replace(&mut canvas, picture, around(own_width, width).into(), around(own_height, height).into());
    crop_imm(&canvas, within(own_width, width), within(own_height, height), width, height).to_image()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(json: Value) -> String {
        format!("{:#}", Preprocessor::from_json(&json).unwrap_err())
    }

    #[test]
    fn what_a_file_leaves_out_is_clips_own() {
        let own = Preprocessor::from_json(&json!({})).unwrap();
        let old = json!({ "size": 224, "crop_size": 224, "resample": 3, "do_resize": true, "do_center_crop": true });
        let new = json!({ "size": { "shortest_edge": 224 }, "crop_size": { "height": 224, "width": 224 } });
        for json in [old, new] {
            assert_eq!(Preprocessor::from_json(&json).unwrap(), own);
        }
        let nothing = json!({
            "do_resize": false, "do_center_crop": false, "do_rescale": false, "do_normalize": false, "size": 7
        });
        let nothing = Preprocessor::from_json(&nothing).unwrap();
        let picture = RgbImage::from_pixel(3, 2, image::Rgb([1, 2, 200]));
        let pixels = nothing.apply(&picture).unwrap();
        assert_eq!(pixels.size(), [3, 2, 3]);
        assert_eq!(pixels.select(0, 2).double_value(&[1, 1]), 200.0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert!(error(json!({ "resample": 0 })).contains("`resample` is 0"));
        assert!(error(json!({ "size": { "longest_edge": 9 } })).contains("`size` is {\"longest_edge\":9}"));
        assert!(error(json!({ "crop_size": -1 })).contains("`crop_size` is -1"));
        assert!(error(json!({ "image_mean": [0.5] })).contains("`image_mean` is [0.5]"));
        assert!(error(json!({ "image_std": [1, 0, 1] })).contains("zero does not divide"));
        assert!(error(json!({ "do_resize": 1 })).contains("`do_resize` is 1"));
        assert!(error(json!([])).contains("not an object"));
    }

    #[test]
    fn a_picture_smaller_than_the_crop_has_black_around_it() {
        let picture = RgbImage::from_pixel(2, 9, image::Rgb([255; 3]));
        let middle = middle(&picture, 5, 4);
        let row = |y: u32| (0..5).map(|x| middle.get_pixel(x, y)[0]).collect::<Vec<_>>();
        // transformers' `center_crop` leaves the odd pixel at the left.
        assert_eq!([row(0), row(3)], [vec![0, 0, 255, 255, 0], vec![0, 0, 255, 255, 0]]);
    }
}
