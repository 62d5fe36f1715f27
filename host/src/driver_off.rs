//! Stands in for `driver.rs` when feature `cuda` is off: a context that cannot exist, so that nothing else needs to ask.

use crate::stream::LaunchWay;
use crate::{Error, Result};
use ferrotile_kernels::entry::{Entry, KernelArgs};
use ferrotile_kernels::launch::LaunchConfig;
use std::ffi::c_void;

/// Never made.
pub enum Context {}

/// Never made.
pub enum Capture {}

impl Capture {
    pub fn finish(self) -> Result<*mut c_void> {
        match self {}
    }

    pub fn finish_bare(self) -> Result<BareLaunch> {
        match self {}
    }
}

/// Never made.
pub enum BareLaunch {}

impl BareLaunch {
    pub fn num_params(&self) -> usize {
        match *self {}
    }

    pub fn burst(&mut self, _way: LaunchWay, _n: u32) -> Result<()> {
        match *self {}
    }

    pub fn wait(&self) -> Result<()> {
        match *self {}
    }
}

pub fn set_schedule(_ordinal: usize, _flags: u32) -> Result<()> {
    off()
}

fn off<T>() -> Result<T> {
    Err(Error::Driver {
        op: "device",
        code: 0,
        name: "no CUDA support in this build".to_owned(),
        hint: "build ferrotile with feature `cuda`, or use Device::emulator".to_owned(),
    })
}

pub fn count() -> Result<usize> {
    off()
}

pub fn context(_ordinal: usize) -> Result<&'static Context> {
    off()
}

macro_rules! unreachable_methods {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => { impl Context { $(
        pub fn $name(&self $(, $arg: $ty)*) $(-> $ret)? {
            $(let _ = $arg;)*
            match *self {}
        }
    )* } };
}
unreachable_methods! {
    fn ordinal() -> usize;
    fn name() -> &str;
    fn num_sms() -> u32;
    fn driver_version() -> String;
    fn compile_times() -> Result<Vec<(&'static str, f64)>>;
    fn alloc(op: &'static str, bytes: usize) -> Result<u64>;
    fn free(address: u64);
    fn create_stream() -> Result<*mut c_void>;
    fn destroy_stream(stream: *mut c_void);
    fn synchronize(stream: *mut c_void) -> Result<()>;
    fn refuse_capture(op: &'static str, stream: *mut c_void) -> Result<()>;
    fn begin_capture(stream: *mut c_void) -> Result<Capture>;
    fn launch_graph(graph: *mut c_void, stream: *mut c_void) -> Result<()>;
    fn destroy_graph(graph: *mut c_void);
    fn create_event() -> Result<*mut c_void>;
    fn record_event(event: *mut c_void, stream: *mut c_void) -> Result<()>;
    fn elapsed_us(start: *mut c_void, end: *mut c_void) -> Result<f64>;
    fn destroy_event(event: *mut c_void);
}

// Unsafe like their twins in `driver.rs`, so that callers read the same with and without the feature.
#[allow(clippy::missing_safety_doc)]
impl Context {
    pub unsafe fn upload(&self, _op: &'static str, _address: u64, _from: *const u8, _bytes: usize) -> Result<()> {
        match *self {}
    }

    pub unsafe fn download(&self, _op: &'static str, _to: *mut u8, _address: u64, _bytes: usize) -> Result<()> {
        match *self {}
    }

    pub unsafe fn download_after(
        &self,
        _op: &'static str,
        _stream: *mut c_void,
        _to: *mut u8,
        _address: u64,
        _bytes: usize,
    ) -> Result<()> {
        match *self {}
    }

    pub unsafe fn fill(&self, _op: &'static str, _address: u64, _byte: u8, _bytes: usize) -> Result<()> {
        match *self {}
    }

    pub unsafe fn copy_async(&self, _op: &'static str, _stream: *mut c_void, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        match *self {}
    }

    pub unsafe fn fill_async(
        &self,
        _op: &'static str,
        _stream: *mut c_void,
        _address: u64,
        _byte: u8,
        _bytes: usize,
    ) -> Result<()> {
        match *self {}
    }

    pub unsafe fn launch<A: KernelArgs>(
        &self,
        _op: &'static str,
        _stream: *mut c_void,
        _entry: &'static Entry<A>,
        _config: &LaunchConfig,
        _args: &A,
    ) -> Result<()> {
        match *self {}
    }
}
