//! The memory of contiguous CPU tensors as Rust slices, for the few kernels that are written in Rust.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// What an element of a tensor is in Rust.
///
/// # Safety
/// libtorch lays out [`Self::KIND`] as Rust lays out `Self`, and every pattern of its bits is a value.
pub unsafe trait Element: Copy + Send + Sync {
    const KIND: Kind;
}

// SAFETY: of all four.
unsafe impl Element for f32 {
    const KIND: Kind = Kind::Float;
}
unsafe impl Element for f16 {
    const KIND: Kind = Kind::Half;
}
unsafe impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}
unsafe impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}

fn check<E: Element>(tensor: &Tensor) -> Result<usize> {
    ensure!(
        tensor.device() == Device::Cpu && tensor.is_contiguous() && tensor.f_kind()? == E::KIND,
        "a contiguous {:?} tensor on the CPU is needed, not {tensor:?}",
        E::KIND
    );
    Ok(tensor.numel())
}

/// The elements of `tensor`, row-major.
///
/// # Errors
/// When it is not contiguous, not on the CPU, or of another type.
pub fn elements<E: Element>(tensor: &Tensor) -> Result<&[E]> {
    let length = check::<E>(tensor)?;
    // SAFETY: a contiguous CPU tensor holds `length` of them from data_ptr on; the borrow keeps it alive.
    // libtorch hands out no address for an empty tensor.
    Ok(if length == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const E, length) } })
}

/// The elements of `tensor`, row-major, to be written. The caller must hold the only handle to that memory (a tensor
/// it has just made), which tch's types cannot say.
///
/// # Errors
/// As [`elements`].
pub fn elements_mut<E: Element>(tensor: &mut Tensor) -> Result<&mut [E]> {
    let length = check::<E>(tensor)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `elements`; exclusive by the borrow and by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut E, length) })
}
