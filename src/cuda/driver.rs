//! NVIDIA's driver by its C interface (`libcuda.so.1`; "CUDA Driver API" in NVIDIA's documentation).

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;

use anyhow::{Context, Result};

use super::library::{Library, done, text};

type Handle = *mut c_void;

/// The driver's functions, and the context of one device.
pub struct Driver {
    set_current: unsafe extern "C" fn(Handle) -> c_int,
    module_load_data: unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int,
    module_get_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int,
    launch_kernel: unsafe extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    context: Handle,
}

/// Compiled kernels, loaded for the rest of the program.
pub struct Module(Handle);

/// A kernel of a module.
pub struct Function(Handle);

// SAFETY: handles of the driver, and functions of it, which any thread may use.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What a card is.
pub struct Card {
    /// Its compute capability, 89 for 8.9.
    pub architecture: u32,
    /// Its units that run blocks.
    pub multiprocessors: u32,
}

impl Driver {
    /// The driver with the context that libtorch uses of CUDA device `index`.
    ///
    /// # Errors
    /// There is no driver, or no such device.
    pub fn of_device(index: usize) -> Result<(Self, Card)> {
        /// Of `CUdevice_attribute`.
        const MULTIPROCESSORS: c_int = 16;
        const MAJOR: c_int = 75;
        const MINOR: c_int = 76;
        let library =
            Library::open(Path::new("libcuda.so.1")).context("libcuda.so.1, NVIDIA's driver, is not found")?;
        // SAFETY: the types are those of cuda.h.
        let (mut driver, init, get_device, get_attribute, retain) = unsafe {
            let driver = Self {
                set_current: library.function(c"cuCtxSetCurrent")?,
                module_load_data: library.function(c"cuModuleLoadData")?,
                module_get_function: library.function(c"cuModuleGetFunction")?,
                launch_kernel: library.function(c"cuLaunchKernel")?,
                get_error_string: library.function(c"cuGetErrorString")?,
                context: null_mut(),
            };
            type Init = unsafe extern "C" fn(c_uint) -> c_int;
            type GetDevice = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
            type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
            type Retain = unsafe extern "C" fn(*mut Handle, c_int) -> c_int;
            let init: Init = library.function(c"cuInit")?;
            let get_device: GetDevice = library.function(c"cuDeviceGet")?;
            let get_attribute: GetAttribute = library.function(c"cuDeviceGetAttribute")?;
            let retain: Retain = library.function(c"cuDevicePrimaryCtxRetain")?;
            (driver, init, get_device, get_attribute, retain)
        };
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: all pointers are to variables that outlive the calls.
        unsafe {
            driver.done(init(0), "cuInit")?;
            driver.done(get_device(&mut device, index as c_int), "cuDeviceGet")?;
            driver.done(retain(&mut context, device), "cuDevicePrimaryCtxRetain")?;
        }
        driver.context = context;
        let attribute = |which: c_int| -> Result<u32> {
            let mut value = 0;
            // SAFETY: as above.
            driver.done(unsafe { get_attribute(&mut value, which, device) }, "cuDeviceGetAttribute")?;
            Ok(value.max(0) as u32)
        };
        let card = Card {
            architecture: 10 * attribute(MAJOR)? + attribute(MINOR)?,
            multiprocessors: attribute(MULTIPROCESSORS)?.max(1),
        };
        Ok((driver, card))
    }

    /// Loads a compiled image.
    ///
    /// # Errors
    /// It is not one for this card.
    pub fn load(&self, mut image: Vec<u8>) -> Result<Module> {
        // An image of text is read up to a zero.
        image.push(0);
        let mut module = null_mut();
        // SAFETY: the image outlives the call, which copies what it needs.
        unsafe {
            self.done((self.set_current)(self.context), "cuCtxSetCurrent")?;
            self.done((self.module_load_data)(&mut module, image.as_ptr().cast()), "cuModuleLoadData")?;
        }
        Ok(Module(module))
    }

    /// The kernel `name`.
    ///
    /// # Errors
    /// The module has none.
    pub fn function(&self, module: &Module, name: &str) -> Result<Function> {
        let (mut function, name_c) = (null_mut(), CString::new(name)?);
        // SAFETY: the pointers outlive the call.
        let code = unsafe { (self.module_get_function)(&mut function, module.0, name_c.as_ptr()) };
        self.done(code, "cuModuleGetFunction").with_context(|| format!("kernel {name}"))?;
        Ok(Function(function))
    }

    /// Queues a kernel of one argument.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `argument` points to what the kernel takes; the kernel touches only memory that it may.
    pub unsafe fn launch(
        &self,
        function: &Function,
        blocks: u32,
        lanes: u32,
        stream: *mut c_void,
        argument: *mut c_void,
    ) -> Result<()> {
        let mut arguments = [argument];
        // SAFETY: arguments are copied during the call; the rest by the caller's promise.
        let code = unsafe {
            self.done((self.set_current)(self.context), "cuCtxSetCurrent")?;
            let (arguments, others) = (arguments.as_mut_ptr(), null_mut());
            (self.launch_kernel)(function.0, blocks, 1, 1, lanes, 1, 1, 0, stream, arguments, others)
        };
        self.done(code, "cuLaunchKernel")
    }

    fn done(&self, code: c_int, of: &str) -> Result<()> {
        done(code, of, |code| {
            let mut said = std::ptr::null();
            // SAFETY: the driver writes a pointer to a text of its own, or leaves it null.
            unsafe {
                (self.get_error_string)(code, &mut said);
                text(said)
            }
        })
    }
}
