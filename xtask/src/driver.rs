//! Asks the CUDA driver of this machine two questions, without linking to it.

use std::ffi::{CStr, c_char, c_int, c_void};

// std already links libdl on the systems that have a CUDA driver.
unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// What this machine's driver is.
#[derive(Debug, PartialEq, Eq)]
pub enum Driver {
    /// libcuda.so.1 cannot be loaded.
    Missing,
    /// It loads, but finds no usable GPU: the code that cuInit returned.
    NoGpu(c_int),
    /// It works: highest CUDA version it knows (13000 is 13.0) and number of GPUs.
    Works(c_int, c_int),
}

/// Load the driver and initialise it.
pub fn probe() -> Driver {
    const RTLD_NOW: c_int = 2;
    let symbol = |library: *mut c_void, name: &CStr| {
        // SAFETY: `library` came from a successful dlopen, the name ends with 0.
        let address = unsafe { dlsym(library, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    };
    // SAFETY: the name ends with 0; loading the driver runs nothing but its own initialisers.
    let library = unsafe { dlopen(c"libcuda.so.1".as_ptr(), RTLD_NOW) };
    if library.is_null() {
        return Driver::Missing;
    }
    let (Some(init), Some(version), Some(count)) =
        (symbol(library, c"cuInit"), symbol(library, c"cuDriverGetVersion"), symbol(library, c"cuDeviceGetCount"))
    else {
        return Driver::Missing;
    };
    // SAFETY: these are the signatures of cuda.h; the pointers passed below are valid for the calls.
    unsafe {
        let init: unsafe extern "C" fn(u32) -> c_int = std::mem::transmute(init);
        let read_version: unsafe extern "C" fn(*mut c_int) -> c_int = std::mem::transmute(version);
        let read_count: unsafe extern "C" fn(*mut c_int) -> c_int = std::mem::transmute(count);
        let (mut version, mut gpus) = (0, 0);
        match init(0) {
            0 if read_version(&mut version) == 0 && read_count(&mut gpus) == 0 => Driver::Works(version, gpus),
            code => Driver::NoGpu(code),
        }
    }
}
