//! Kernels of our own on CUDA devices, compiled for the card when they are first used: nothing of CUDA is needed to build.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | [`Kernels`] | the kernels of one source on one device, and launching them |
//! | [`compiler`] | NVRTC, which compiles CUDA C++ for a card, and what it compiled before, on disk |
//! | `driver` | NVIDIA's driver, which loads what is compiled and runs it |
//! | `library` | libraries that are loaded by name |

pub mod compiler;
mod driver;
mod library;

use std::ffi::c_void;

use anyhow::{Context, Result};
use tch::Device;

use compiler::{Compiler, kept_in};
use driver::{Driver, Function, Module};

/// The kernels of one source, loaded on one device.
pub struct Kernels {
    driver: Driver,
    module: Module,
    index: usize,
    /// How many units the device has that run blocks.
    pub multiprocessors: u32,
}

/// One of [`Kernels`].
pub struct Kernel(Function);

impl Kernels {
    /// Compiles `source` (CUDA C++; `name` is what messages call it) for CUDA device `index`, or takes what an earlier run
    /// compiled.
    ///
    /// # Errors
    /// The driver or NVRTC is missing or refuses; the source has mistakes.
    pub fn load(name: &str, source: &str, index: usize) -> Result<Self> {
        // libtorch makes its context of the device before ours is asked for: both are the same then.
        drop(tch::Tensor::f_empty([1], (tch::Kind::Float, Device::Cuda(index)))?);
        let (driver, card) = Driver::of_device(index)?;
        let compiler = Compiler::find()?;
        let target = compiler.target(card.architecture)?;
        let kept = kept_in().map(|folder| folder.join(compiler.file_name(source, &target)));
        let image = kept.as_ref().and_then(|path| std::fs::read(path).ok());
        // What cannot be loaded is damaged: it is compiled again.
        let module = match image.and_then(|image| driver.load(image).ok()) {
            Some(module) => module,
            None => {
                let image = compiler.compile(name, source, &target)?.image;
                if let Some(path) = &kept {
                    // A folder that cannot be written to is no reason to stop: the next run compiles it, too.
                    let _ = crate::files::write_bytes(path, &image);
                }
                driver.load(image).with_context(|| format!("what NVRTC made of {name}"))?
            }
        };
        Ok(Self { driver, module, index, multiprocessors: card.multiprocessors })
    }

    /// The kernel `extern "C" __global__ void name(…)`.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<Kernel> {
        Ok(Kernel(self.driver.function(&self.module, name)?))
    }

    /// Queues `kernel` on libtorch's current stream: `blocks` blocks of `lanes` threads, with the one `argument`.
    ///
    /// # Errors
    /// The driver refuses; or an earlier error of the device comes out here.
    ///
    /// # Safety
    /// `Argument` is laid out as the kernel's own; with this argument the kernel touches only memory of the device that
    /// lives until it has run, which memory of libtorch's tensors does: it is given to others in the order of the stream.
    pub unsafe fn launch<Argument>(&self, kernel: &Kernel, blocks: u32, lanes: u32, argument: &Argument) -> Result<()> {
        let stream = crate::torch::cuda_stream(self.index)?;
        let argument = argument as *const Argument as *mut c_void;
        // SAFETY: by the caller's promise.
        unsafe { self.driver.launch(&kernel.0, blocks.max(1), lanes, stream, argument) }
    }
}
