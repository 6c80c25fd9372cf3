//! The passes over weights seen through a code ([`super::codes`]) by libtorch's operators, for devices other than the CPU.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::code::{ByCode, CODES, Code};

/// The code of each element: `[elements]` Int.
fn codes(weight: &Tensor, code: Code) -> Result<Tensor> {
    let codes = match code {
        Code::F16 => {
            let bits = weight.f_to_kind(Kind::Half)?.f_contiguous()?.f_view_dtype(Kind::Int16)?;
            bits.f_to_kind(Kind::Int)?.f_bitwise_and(0xFFFFi64)?
        }
        Code::Fixed { step } => {
            // Everything that is refused to the least code.
            let mut steps = weight
                .f_to_kind(Kind::Float)?
                .f_mul_scalar(1.0 / f64::from(step))?
                .f_round()?
                .f_nan_to_num(-32_768.0, None, None)?;
            steps.f_clamp_(-32_768.0, 32_767.0)?.f_add_scalar_(32_768.0)?.f_to_kind(Kind::Int)?
        }
    };
    Ok(codes.f_reshape(-1)?)
}

fn by_code<T: Copy + Default + 'static>(values: impl Iterator<Item = T>) -> Box<ByCode<T>> {
    values.collect::<Vec<T>>().try_into().ok().expect("one for each code")
}

pub fn counts(weight: &Tensor, code: Code) -> Result<Box<ByCode<u32>>> {
    let counts = codes(weight, code)?.f_bincount(None::<&Tensor>, CODES as i64)?;
    Ok(by_code(Vec::<i64>::try_from(counts.f_to_device(Device::Cpu)?)?.into_iter().map(|n| n as u32)))
}

pub fn look_up(weight: &Tensor, code: Code, table: &ByCode<f32>) -> Result<Tensor> {
    let table = Tensor::f_from_slice(table)?.f_to_device(weight.device())?;
    Ok(table.f_index_select(0, &codes(weight, code)?)?.f_view(weight.size().as_slice())?)
}

pub fn add_up(weight: &Tensor, values: &Tensor, code: Code) -> Result<Vec<f64>> {
    let totals = codes(weight, code)?.f_bincount(Some(&values.f_reshape(-1)?), CODES as i64)?;
    Ok(Vec::<f64>::try_from(totals.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?)?)
}

pub fn combine(weight: &Tensor, code: Code, table: &ByCode<[f32; 2]>, gradient: &mut Tensor) -> Result<()> {
    let (slopes, offsets) = (by_code(table.iter().map(|row| row[0])), by_code(table.iter().map(|row| row[1])));
    // The gradient itself where it is f32; of bf16 it is rounded once, at the end.
    let mut line = gradient.f_to_kind(Kind::Float)?;
    let _ = line.f_mul_(&look_up(weight, code, &slopes)?)?;
    let _ = line.f_add_(&look_up(weight, code, &offsets)?)?;
    if gradient.f_kind()? != Kind::Float {
        gradient.f_copy_(&line)?;
    }
    Ok(())
}
