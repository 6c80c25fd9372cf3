//! The shim over libtorch: operators that tch does not generate (through the dispatcher), and CUDA loaded at
//! run time. All `unsafe` around libtorch lives here; the C++ half is `ext.cpp`.

pub mod environment;
pub mod gradient;
pub mod random;
pub mod rounding;
pub mod slices;

use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use tch::Tensor;

/// One argument of [`call`], in the order of the operator's schema.
pub enum Arg<'a> {
    /// `None` of an optional argument.
    None,
    /// A tensor.
    Tensor(&'a Tensor),
    /// A list of tensors.
    Tensors(&'a [&'a Tensor]),
    /// An integer, a dtype or a memory format.
    Int(i64),
    /// A floating-point number.
    Double(f64),
    /// A truth value.
    Bool(bool),
    /// A list of integers.
    Ints(&'a [i64]),
}

/// `torch.channels_last` as the dispatcher numbers memory formats.
pub const CHANNELS_LAST: i64 = 2;

#[repr(C)]
struct RawArg {
    kind: i32,
    integer: i64,
    real: f64,
    pointer: *const c_void,
    length: usize,
}

unsafe extern "C" {
    fn palettist_call(
        name: *const c_char,
        overload: *const c_char,
        arguments: *const RawArg,
        count: usize,
        outputs: *mut *mut torch_sys::C_tensor,
        capacity: usize,
        written: *mut usize,
    ) -> *mut c_char;
    fn palettist_load_cuda() -> i32;
    fn palettist_library_folder() -> *mut c_char;
    fn palettist_cuda_stream(index: i64, stream: *mut *mut c_void) -> *mut c_char;
    fn palettist_torch_version() -> *const c_char;
    fn free(pointer: *mut c_void);
}

/// From here on the C library gives freed memory of a megabyte and more back to the system at once. glibc else keeps it
/// and splits it up, which takes several times the memory of the largest where one large tensor follows the other. On
/// other systems it does nothing.
pub fn give_back_large_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        /// From malloc.h: what is as large comes from `mmap`. Set once, it no longer grows with what is freed.
        const M_MMAP_THRESHOLD: std::ffi::c_int = -3;
        // SAFETY: the C library's own function; it takes any value, and refuses one that it cannot use.
        unsafe { mallopt(M_MMAP_THRESHOLD, 1 << 20) };
    }
}

/// Calls the operator `aten::name` with its overload, e.g. `call("aten::_fused_adamw_", "", …)`.
///
/// # Errors
/// libtorch's own message, without its stack trace.
pub fn call(name: &str, overload: &str, arguments: &[Arg]) -> Result<Vec<Tensor>> {
    let lists: Vec<Vec<*mut torch_sys::C_tensor>> = arguments
        .iter()
        .map(|argument| match argument {
            Arg::Tensors(tensors) => tensors.iter().map(|t| t.as_ptr() as *mut _).collect(),
            _ => Vec::new(),
        })
        .collect();
    let raw: Vec<RawArg> = arguments
        .iter()
        .zip(&lists)
        .map(|(argument, list)| {
            let mut raw = RawArg { kind: 0, integer: 0, real: 0.0, pointer: std::ptr::null(), length: 0 };
            match argument {
                Arg::None => {}
                Arg::Tensor(t) => (raw.kind, raw.pointer) = (1, t.as_ptr() as *const c_void),
                Arg::Tensors(_) => {
                    (raw.kind, raw.pointer, raw.length) = (2, list.as_ptr() as *const c_void, list.len())
                }
                Arg::Int(v) => (raw.kind, raw.integer) = (3, *v),
                Arg::Double(v) => (raw.kind, raw.real) = (4, *v),
                Arg::Bool(v) => (raw.kind, raw.integer) = (5, *v as i64),
                Arg::Ints(v) => (raw.kind, raw.pointer, raw.length) = (6, v.as_ptr() as *const c_void, v.len()),
            }
            raw
        })
        .collect();
    let (name_c, overload_c) = (CString::new(name)?, CString::new(overload)?);
    let mut outputs = [std::ptr::null_mut(); 8];
    let mut written = 0;
    // SAFETY: every pointer in `raw` points into `arguments` or `lists`, which outlive the call; `outputs` has the
    // capacity that is passed.
    let message = unsafe {
        palettist_call(
            name_c.as_ptr(),
            overload_c.as_ptr(),
            raw.as_ptr(),
            raw.len(),
            outputs.as_mut_ptr(),
            outputs.len(),
            &mut written,
        )
    };
    // SAFETY: each of the first `written` outputs is a new at::Tensor that nobody else owns.
    let tensors = outputs[..written].iter().map(|&p| unsafe { Tensor::from_ptr(p) }).collect();
    told(message).map_err(|text| anyhow!("libtorch, in {name}: {text}"))?;
    Ok(tensors)
}

/// What a function of the shim returned: nothing, or the first line of its message, which is freed.
fn told(message: *mut c_char) -> Result<(), String> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null message is a C string from strdup, ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        free(message as *mut c_void);
        text
    };
    Err(text.lines().next().unwrap_or("no message").to_owned())
}

/// Makes the CUDA half of libtorch available where its library lies beside the CPU one. First line of `main`.
pub fn load_cuda() -> bool {
    // SAFETY: only loads a library of the same libtorch that this program is linked to.
    unsafe { palettist_load_cuda() != 0 }
}

/// The folder of the libtorch that this program runs with.
pub fn library_folder() -> Option<PathBuf> {
    // SAFETY: null, or a C string from strdup, ours to free.
    unsafe {
        let folder = palettist_library_folder();
        let path = (!folder.is_null()).then(|| PathBuf::from(OsStr::from_bytes(CStr::from_ptr(folder).to_bytes())));
        free(folder as *mut c_void);
        path
    }
}

/// The stream on which libtorch queues work for CUDA device `index` now, as CUDA's own handle.
///
/// # Errors
/// libtorch's message: it has no CUDA.
pub fn cuda_stream(index: usize) -> Result<*mut c_void> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: the pointer outlives the call.
    let message = unsafe { palettist_cuda_stream(index as i64, &mut stream) };
    told(message).map_err(|text| anyhow!("libtorch, for its stream: {text}"))?;
    Ok(stream)
}

/// The version of libtorch, `2.11.0`.
pub fn version() -> String {
    // SAFETY: a static, null-terminated string.
    unsafe { CStr::from_ptr(palettist_torch_version()) }.to_string_lossy().into_owned()
}

/// A libtorch error as one line, without its C++ stack trace.
pub fn error(error: tch::TchError) -> anyhow::Error {
    anyhow!("libtorch: {}", error.to_string().lines().next().unwrap_or("no message").trim())
}
