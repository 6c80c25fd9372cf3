//! The memory of contiguous CPU tensors as Rust slices, for the few kernels that are written in Rust.
//!
//! Handles of tch are not owners: `shallow_clone`, views and rows reach the same memory, whatever Rust's borrows say. So
//! each slice claims its bytes as long as it lives, and one that overlaps with another of which either is written to is
//! refused. What claims cannot see are libtorch's own operators; that none of them meets a slice is what callers promise.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, PoisonError};

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

// SAFETY: IEEE 754's binary32 in both.
unsafe impl Element for f32 {
    const KIND: Kind = Kind::Float;
}
// SAFETY: 16 bits in both, which are a number whatever they are.
unsafe impl Element for f16 {
    const KIND: Kind = Kind::Half;
}
// SAFETY: as for f16.
unsafe impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}
// SAFETY: a byte in both.
unsafe impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}

/// How many elements of a tensor one thread takes at a time: at most 16 pieces, and none below 2^18 elements but the last. A multiple of 16, so that
/// pieces of a tensor whose memory is aligned are aligned.
pub fn piece(elements: usize) -> usize {
    elements.div_ceil(16).next_multiple_of(16).max(1 << 18)
}

/// The bytes that slices are made of now, and whether they are written to.
static CLAIMS: Mutex<Vec<(Range<usize>, bool)>> = Mutex::new(Vec::new());

/// One of [`CLAIMS`], until it is dropped.
#[derive(Debug)]
struct Claim {
    bytes: Range<usize>,
    written: bool,
}

impl Claim {
    /// # Errors
    /// When some of the bytes are claimed, and here or there are written to.
    fn new(bytes: Range<usize>, written: bool) -> Result<Self> {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        let overlaps = |other: &Range<usize>| bytes.start < other.end && other.start < bytes.end;
        let met = claims.iter().any(|(other, other_written)| (written || *other_written) && overlaps(other));
        ensure!(!met, "the memory of a tensor is in use: it cannot be both written to and read, or written to twice");
        claims.push((bytes.clone(), written));
        Ok(Self { bytes, written })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        let own = |(bytes, written): &(Range<usize>, bool)| *bytes == self.bytes && *written == self.written;
        if let Some(place) = claims.iter().position(own) {
            claims.swap_remove(place);
        }
    }
}

/// The elements of a tensor, row-major, to be read.
#[derive(Debug)]
pub struct Reading<'t, E> {
    first: *const E,
    length: usize,
    /// None where there are no elements.
    _claim: Option<Claim>,
    tensor: PhantomData<&'t Tensor>,
}

/// The elements of a tensor, row-major, to be written to.
#[derive(Debug)]
pub struct Writing<'t, E> {
    first: *mut E,
    length: usize,
    _claim: Option<Claim>,
    tensor: PhantomData<&'t mut Tensor>,
}

impl<E: Element> Deref for Reading<'_, E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        // SAFETY: `claimed` found so many elements there, the borrowed tensor keeps them alive, and nobody writes to them:
        // no slice, because of the claim; no operator, by the promise of who called `elements`.
        unsafe { std::slice::from_raw_parts(self.first, self.length) }
    }
}

impl<E: Element> Deref for Writing<'_, E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        // SAFETY: as in `deref_mut`.
        unsafe { std::slice::from_raw_parts(self.first, self.length) }
    }
}

impl<E: Element> DerefMut for Writing<'_, E> {
    fn deref_mut(&mut self) -> &mut [E] {
        // SAFETY: `claimed` found so many elements there, the borrowed tensor keeps them alive, and nobody else has them:
        // no slice, because of the claim; no operator, by the promise of who called `elements_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.length) }
    }
}

/// Where the elements of `tensor` begin, how many there are, and the claim to them.
fn claimed<E: Element>(tensor: &Tensor, written: bool) -> Result<(*mut E, usize, Option<Claim>)> {
    ensure!(
        tensor.device() == Device::Cpu && tensor.is_contiguous() && tensor.f_kind()? == E::KIND,
        "a contiguous {:?} tensor on the CPU is needed, not {tensor:?}",
        E::KIND
    );
    let length = tensor.numel();
    if length == 0 {
        // libtorch hands out no address for an empty tensor.
        return Ok((std::ptr::NonNull::dangling().as_ptr(), 0, None));
    }
    // A contiguous CPU tensor holds `length` of them from data_ptr on.
    let first = tensor.data_ptr() as *mut E;
    ensure!(first.is_aligned(), "a tensor of {:?} begins at an odd address", E::KIND);
    let start = first as usize;
    let claim = Claim::new(start..start + length * size_of::<E>(), written)?;
    Ok((first, length, Some(claim)))
}

/// The elements of `tensor`, row-major.
///
/// # Errors
/// When it is not contiguous, not on the CPU, or of another type; when something that is written to overlaps with it.
///
/// # Safety
/// While they are there, no operator of libtorch writes to this memory, through whatever handle.
pub unsafe fn elements<E: Element>(tensor: &Tensor) -> Result<Reading<'_, E>> {
    let (first, length, claim) = claimed(tensor, false)?;
    Ok(Reading { first, length, _claim: claim, tensor: PhantomData })
}

/// The elements of `tensor`, row-major, to be written.
///
/// # Errors
/// When it is not contiguous, not on the CPU, or of another type; when other elements that are there overlap with it.
///
/// # Safety
/// While they are there, no operator of libtorch reads this memory or writes to it, through whatever handle.
pub unsafe fn elements_mut<E: Element>(tensor: &mut Tensor) -> Result<Writing<'_, E>> {
    let (first, length, claim) = claimed(tensor, true)?;
    Ok(Writing { first, length, _claim: claim, tensor: PhantomData })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two handles to one memory are two owners for Rust: the second that would be written to is refused.
    #[test]
    fn slices_that_overlap_are_refused() {
        let mut tensor = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
        let (mut clone, mut rows) = (tensor.shallow_clone(), [tensor.get(0), tensor.get(1)]);
        // SAFETY: no operator runs between the first slice of a block and its end.
        unsafe {
            let [first, second] = &mut rows;
            let mut whole = elements_mut::<f32>(&mut tensor).unwrap();
            whole[7] = 3.0;
            let message = elements_mut::<f32>(&mut clone).unwrap_err().to_string();
            assert!(message.contains("in use"), "{message}");
            assert!(elements::<f32>(&clone).is_err());
            assert!(elements_mut::<f32>(first).is_err());
            drop(whole);

            let (mut first, second) = (elements_mut::<f32>(first).unwrap(), elements::<f32>(second).unwrap());
            first[1] = second[1];
            assert!(elements::<f32>(&clone).is_err(), "all of it, of which a row is written to");
            drop(first);
            let whole = elements::<f32>(&clone).unwrap();
            assert_eq!((whole[1], second[1], whole.len()), (3.0, 3.0, 24));
            assert!(elements_mut::<f32>(&mut tensor).is_err(), "it is read");
        }
        // SAFETY: as above.
        assert_eq!(unsafe { elements_mut::<f32>(&mut tensor) }.unwrap()[7], 3.0);
    }

    #[test]
    fn other_tensors_are_refused() {
        let tensor = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
        // SAFETY: no operator runs while a slice is there.
        unsafe {
            assert!(elements::<f16>(&tensor).is_err());
            assert!(elements_mut::<f32>(&mut tensor.transpose(0, 1)).is_err());
            assert!(elements::<f32>(&Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand([9], false)).is_err());
            assert!(elements_mut::<f32>(&mut tensor.narrow(0, 2, 0)).unwrap().is_empty());
            let empty = Tensor::zeros([0], (Kind::Uint8, Device::Cpu));
            assert!(elements::<u8>(&empty).unwrap().is_empty());
        }
    }

    #[test]
    fn kernels_given_one_tensor_twice_refuse_it() {
        let weight = Tensor::ones([64], (Kind::Float, Device::Cpu));
        let code = crate::palette::Code::F16;
        let message = crate::palette::soften(&weight, &[0.0, 1.0], 0.1, 3, code, &mut weight.shallow_clone());
        assert!(format!("{:#}", message.unwrap_err()).contains("in use"));
    }
}
