//! Palettes of numbers on a CUDA device: all layers in one [`Batch`], where its kernels can be had.

use anyhow::Result;
use tch::{Device, Tensor};

use crate::palette::AdamWStep;
use crate::palette::batch::{Batch, Found, Member, tested};
use crate::terminal::note_once;

/// The batch of a run, from when it is first needed.
pub enum Together {
    Untried,
    /// Its kernels cannot be had, or are wrong on the card: libtorch's operators do the same.
    No,
    Yes(Box<Batch>),
}

impl Together {
    /// [`Batch::begin`]; says of each member whether it was taken. Where there is no batch a line says why, once.
    ///
    /// # Errors
    /// As [`Batch::begin`].
    pub fn begin(&mut self, members: &mut [Member], rho: f64, iterations: usize) -> Result<Vec<bool>> {
        let device = members.first().map(|member| member.weight.device());
        if let (Self::Untried, Some(Device::Cuda(index))) = (&*self, device) {
            *self = match tested(index) {
                Ok(batch) => Self::Yes(Box::new(batch)),
                Err(error) => {
                    note_once(format_args!("palettes go through libtorch's operators, which is slower: {error:#}"));
                    Self::No
                }
            };
        }
        match self {
            Self::Yes(batch) if !members.is_empty() => batch.begin(members, rho, iterations),
            _ => Ok(vec![false; members.len()]),
        }
    }

    /// [`Batch::gradient`].
    ///
    /// # Errors
    /// As there.
    pub fn gradient(&mut self, upstream: Vec<Option<Tensor>>) -> Result<Vec<Found>> {
        match self {
            Self::Yes(batch) if !upstream.is_empty() => batch.gradient(upstream),
            _ => Ok(Vec::new()),
        }
    }

    /// [`Batch::step`].
    ///
    /// # Errors
    /// As there.
    pub fn step(&mut self, steps: &[(AdamWStep, u32)]) -> Result<()> {
        match self {
            Self::Yes(batch) if !steps.is_empty() => batch.step(steps),
            _ => Ok(()),
        }
    }

    /// Other weights are in place of those that the batch knows.
    pub fn forget(&mut self) {
        if let Self::Yes(batch) = self {
            batch.forget();
        }
    }
}
