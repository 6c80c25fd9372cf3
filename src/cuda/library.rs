//! Shared libraries that are loaded by name while the program runs.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Of dlfcn.h: all of it at once, and its names for libraries that come after it.
#[cfg(target_os = "linux")]
const FLAGS: c_int = 0x2 | 0x100;
#[cfg(not(target_os = "linux"))]
const FLAGS: c_int = 0x2 | 0x8;

/// A library, which stays loaded until the program ends.
#[derive(Clone, Copy)]
pub struct Library(NonNull<c_void>);

// SAFETY: a handle that any thread may look names up in.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// A file, or a name that the system looks for.
    pub fn open(path: &Path) -> Option<Self> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        // SAFETY: a C string. Those that are opened are NVIDIA's, which do nothing as they are loaded.
        NonNull::new(unsafe { dlopen(path.as_ptr(), FLAGS) }).map(Self)
    }

    /// The function `name`, as a pointer of type `F`.
    ///
    /// # Errors
    /// The library has none.
    ///
    /// # Safety
    /// `F` is the `extern "C" fn` that the library documents under this name.
    pub unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: a handle of `dlopen`, and a C string.
        let found = unsafe { dlsym(self.0.as_ptr(), name.as_ptr()) };
        let found = NonNull::new(found).with_context(|| format!("a library has no {}", name.to_string_lossy()));
        // SAFETY: by the caller's promise; both are pointers.
        found.map(|found| unsafe { std::mem::transmute_copy(&found.as_ptr()) })
    }
}

/// The text at `text`, as far as there is one.
///
/// # Safety
/// It is null or a C string.
pub unsafe fn text(text: *const c_char) -> String {
    // SAFETY: by the caller's promise.
    if text.is_null() { "no message".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
}

/// What a library answered, 0 being success.
///
/// # Errors
/// Anything else: `said`, of `of`.
pub fn done(code: c_int, of: &str, said: impl FnOnce(c_int) -> String) -> Result<()> {
    if code != 0 {
        bail!("{of}: {} (error {code})", said(code));
    }
    Ok(())
}
