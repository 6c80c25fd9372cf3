//! Upsampling of images `[…, H, W]`.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use super::checks::floats;
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::TensorType;

/// Height and width of the result, and the two factors.
fn sizes(call: &Call) -> Result<[(i64, f64); 2]> {
    let x = call.kind("x")?;
    let [.., height, width] = x.shape[..] else { bail!("upsampling of {x}") };
    let scaled = |name: &str, size: i64| -> Result<(i64, f64)> {
        let factor = call.real(name)?;
        // The bound keeps the product exact and far from overflow.
        ensure!(factor > 0.0 && factor <= 65536.0, "parameter {name} is {factor}");
        Ok(((size as f64 * factor).floor() as i64, factor))
    };
    Ok([scaled("scale_factor_height", height)?, scaled("scale_factor_width", width)?])
}

pub fn infer(call: &Call) -> Result<TensorType> {
    floats(call, &["x"])?;
    let x = call.kind("x")?;
    ensure!((3..=5).contains(&x.rank()), "upsampling of {x}");
    if call.kind == "upsample_bilinear" {
        ensure!(x.rank() == 4, "upsample_bilinear of {x} is not supported, only rank 4");
        let align = call.boolean("align_corners")?;
        let half = if call.has("half_pixel_centers") { call.boolean("half_pixel_centers")? } else { !align };
        ensure!(align != half, "upsample_bilinear with align_corners {align} and half_pixel_centers {half}");
    }
    let mut shape = x.shape[..x.rank() - 2].to_vec();
    shape.extend(sizes(call)?.map(|(size, _)| size));
    x.with_shape(shape)
}

pub fn run(call: &Call) -> Result<Tensor> {
    let (x, [(height, by_height), (width, by_width)]) = (call.tensor("x")?, sizes(call)?);
    if call.kind == "upsample_bilinear" {
        let align = call.boolean("align_corners")?;
        return Ok(x.f_upsample_bilinear2d([height, width], align, by_height, by_width)?);
    }
    let nearest = |x: &Tensor, axis: i64, size: i64, factor: f64| -> Result<Tensor> {
        let last = x.size()[(x.dim() as i64 + axis) as usize] - 1;
        let index: Vec<i64> = (0..size).map(|at| ((at as f64 / factor).floor() as i64).min(last)).collect();
        let index = Tensor::f_from_slice(&index)?.f_to_kind(Kind::Int64)?.f_to_device(x.device())?;
        Ok(x.f_index_select(axis, &index)?)
    };
    nearest(&nearest(x, -2, height, by_height)?, -1, width, by_width)
}
