//! The memory of contiguous CPU tensors as Rust slices, for the few kernels that are written in Rust.

use anyhow::{Result, ensure};
use half::f16;
use tch::{Device, Kind, Tensor};

fn check(tensor: &Tensor, kind: Kind) -> Result<usize> {
    ensure!(
        tensor.device() == Device::Cpu && tensor.is_contiguous() && tensor.f_kind()? == kind,
        "a contiguous {kind:?} tensor on the CPU is needed, not {tensor:?}"
    );
    Ok(tensor.numel())
}

/// The elements of `tensor`, row-major.
///
/// # Errors
/// When it is not a contiguous f32 tensor on the CPU.
pub fn floats(tensor: &Tensor) -> Result<&[f32]> {
    let length = check(tensor, Kind::Float)?;
    // SAFETY: a contiguous CPU tensor of f32 holds `length` of them from data_ptr on; the borrow keeps it alive.
    // libtorch hands out no address for an empty tensor.
    Ok(if length == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const f32, length) } })
}

/// The elements of `tensor`, row-major, to be written. The caller must hold the only handle to that memory (a tensor
/// it has just made), which tch's types cannot say.
///
/// # Errors
/// When it is not a contiguous f32 tensor on the CPU.
pub fn floats_mut(tensor: &mut Tensor) -> Result<&mut [f32]> {
    let length = check(tensor, Kind::Float)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `floats`; exclusive by the borrow and by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut f32, length) })
}

/// The elements of `tensor`, row-major.
///
/// # Errors
/// When it is not a contiguous f16 tensor on the CPU.
pub fn halves(tensor: &Tensor) -> Result<&[f16]> {
    let length = check(tensor, Kind::Half)?;
    // SAFETY: as in `floats`, with f16.
    Ok(if length == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const f16, length) } })
}

/// The elements of `tensor`, row-major.
///
/// # Errors
/// When it is not a contiguous u8 tensor on the CPU.
pub fn bytes(tensor: &Tensor) -> Result<&[u8]> {
    let length = check(tensor, Kind::Uint8)?;
    // SAFETY: as in `floats`, with u8.
    Ok(if length == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) } })
}
