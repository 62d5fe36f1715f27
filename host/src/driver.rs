//! The CUDA driver: the only file that touches `cust` or raw driver functions.
//!
//! `cust` enumerates devices and reads their properties. Everything on the way of a launch calls the driver itself, for three
//! reasons: `cust` returns error codes as a Rust enum, which a newer driver's codes would make undefined; its contexts and
//! modules are released on drop, while ours live as long as the process; and it has no log of the PTX compiler.
//!
//! Every call binds the primary context of its device first, so any thread may use any device.

use crate::stream::LaunchWay;
use crate::{Error, Result, ptx};
use cust::device::{Device, DeviceAttribute};
use cust::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUgraph, CUgraphExec, CUmodule, CUstream};
use ferrotile_kernels::entry::{Entry, KernelArgs, Loaded, Params};
use ferrotile_kernels::launch::LaunchConfig;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, PoisonError, RwLock, RwLockWriteGuard};

// The driver functions with their error code as the plain integer that it is. `cust_raw`, which declares them with the enum,
// brings the library to link.
unsafe extern "C" {
    fn cuInit(flags: c_uint) -> c_int;
    fn cuDriverGetVersion(version: *mut c_int) -> c_int;
    fn cuGetErrorName(error: c_int, name: *mut *const c_char) -> c_int;
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: CUdevice) -> c_int;
    fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice) -> c_int;
    fn cuDevicePrimaryCtxSetFlags_v2(device: CUdevice, flags: c_uint) -> c_int;
    fn cuCtxSetCurrent(context: CUcontext) -> c_int;
    fn cuCtxSynchronize() -> c_int;
    fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) -> c_int;
    fn cuMemFree_v2(address: CUdeviceptr) -> c_int;
    fn cuMemcpyHtoD_v2(to: CUdeviceptr, from: *const c_void, bytes: usize) -> c_int;
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize) -> c_int;
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream) -> c_int;
    fn cuMemsetD8_v2(to: CUdeviceptr, byte: u8, bytes: usize) -> c_int;
    fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) -> c_int;
    fn cuMemsetD8Async(to: CUdeviceptr, byte: u8, bytes: usize, stream: CUstream) -> c_int;
    fn cuStreamCreate(stream: *mut CUstream, flags: c_uint) -> c_int;
    fn cuStreamDestroy_v2(stream: CUstream) -> c_int;
    fn cuStreamSynchronize(stream: CUstream) -> c_int;
    fn cuStreamIsCapturing(stream: CUstream, status: *mut c_int) -> c_int;
    fn cuStreamBeginCapture_v2(stream: CUstream, mode: c_int) -> c_int;
    fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) -> c_int;
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> c_int;
    fn cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, flags: u64) -> c_int;
    fn cuGraphLaunch(exec: CUgraphExec, stream: CUstream) -> c_int;
    fn cuGraphExecDestroy(exec: CUgraphExec) -> c_int;
    fn cuGraphDestroy(graph: CUgraph) -> c_int;
    fn cuEventCreate(event: *mut CUevent, flags: c_uint) -> c_int;
    fn cuEventRecord(event: CUevent, stream: CUstream) -> c_int;
    fn cuEventSynchronize(event: CUevent) -> c_int;
    fn cuEventElapsedTime(ms: *mut f32, start: CUevent, end: CUevent) -> c_int;
    fn cuEventDestroy_v2(event: CUevent) -> c_int;
    fn cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        count: c_uint,
        options: *mut c_int,
        values: *mut *mut c_void,
    ) -> c_int;
    fn cuModuleUnload(module: CUmodule) -> c_int;
    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) -> c_int;
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: CUfunction) -> c_int;
    fn cuFuncSetAttribute(function: CUfunction, attribute: c_int, value: c_int) -> c_int;
    fn cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> c_int;
    fn cuLaunchCooperativeKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        params: *mut *mut c_void,
    ) -> c_int;
}

// `cust` does not have this attribute.
const DEVICE_MAX_SHARED_BYTES_OPTIN: c_int = 97;
const STREAM_NON_BLOCKING: c_uint = 1;
const CAPTURE_THREAD_LOCAL: c_int = 1;
const CAPTURE_RELAXED: c_int = 2;
const JIT_ERROR_LOG: c_int = 5;
const JIT_ERROR_LOG_BYTES: c_int = 6;
const FUNC_STATIC_SHARED_BYTES: c_int = 1;
const FUNC_MAX_DYNAMIC_SHARED_BYTES: c_int = 8;

const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const UNSUPPORTED_PTX_VERSION: c_int = 222;

/// Oldest architecture that runs the kernels: their PTX is for sm_90.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (9, 0);

#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";

/// A GPU's primary context and the kernels loaded into it. Made once per GPU and never released.
pub struct Context {
    ordinal: usize,
    raw: CUcontext,
    name: String,
    num_sms: u32,
    max_shared_bytes: i32,
    driver: String,
    launch_ex: LaunchEx,
    /// Compiled kernels by the address of their [`Loaded`], where launches look first. Held while a kernel is compiled, so that none is
    /// compiled twice.
    functions: Mutex<HashMap<usize, Function>>,
    /// Held exclusively while a stream is captured and shared while somebody waits for the whole GPU: such a wait fails, and
    /// ends the capture as well, even if they are in different threads.
    capturing: RwLock<()>,
}

thread_local! {
    /// Whether this thread captures a stream, and so holds the lock above.
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, also from several at the same time.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

#[derive(Clone, Copy)]
struct Function(CUfunction);

// SAFETY: as for `Context`.
unsafe impl Send for Function {}
// SAFETY: as for `Context`.
unsafe impl Sync for Function {}

#[inline]
fn check(op: &'static str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(failed(op, code)) }
}

#[cold]
fn failed(op: &'static str, code: c_int) -> Error {
    error(op, code, hint(code).to_owned())
}

fn error(op: &'static str, code: c_int, hint: String) -> Error {
    let mut name = ptr::null();
    // SAFETY: the driver returns a static string, or leaves null for a code that it does not know.
    let known = unsafe { cuGetErrorName(code, &mut name) } == 0 && !name.is_null();
    let name = if known {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    } else if code == NO_DEVICE {
        // Without a driver there is nobody to ask for the name.
        "CUDA_ERROR_NO_DEVICE".to_owned()
    } else {
        "unknown CUDA error".to_owned()
    };
    Error::Driver { op, code, name, hint }
}

/// What a driver error usually means.
fn hint(code: c_int) -> &'static str {
    match code {
        3 | 4 => "the CUDA driver is shutting down",
        34 => "a stub libcuda was loaded instead of the driver's, check LD_LIBRARY_PATH",
        NO_DEVICE => "no NVIDIA GPU is visible, check nvidia-smi and CUDA_VISIBLE_DEVICES",
        209 => "the GPU cannot run this code",
        221 => "the driver's PTX compiler (libnvidia-ptxjitcompiler) is missing, install the complete driver",
        700 => "an earlier kernel touched memory outside of its buffers, run it on Device::emulator().checked() to see where",
        701 => "too many threads, registers or too much shared memory for one block",
        715 | 717 | 718 | 719 => "an earlier kernel failed, run it on Device::emulator().checked() to see where",
        716 => "an earlier kernel made a misaligned access, run it on Device::emulator().checked() to see where",
        720 => "the grid of a cooperative launch does not fit on the GPU at once",
        802 => "the system is not ready, on NVSwitch machines the fabric manager must run",
        803 => "the loaded kernel module and libcuda are of different versions, reboot after a driver update",
        804 => "the CUDA compatibility package does not support this GPU",
        900..=908 => "not possible while a stream is captured into a graph",
        _ => "",
    }
}

/// Start the driver. Only on the way to a device, never on a launch.
fn init() -> Result<()> {
    let op = "device";
    // SAFETY: loading the driver runs only its own initialisers.
    let library = unsafe { libloading::Library::new(LIBRARY) };
    match library {
        // Stays loaded: unloading a driver that others use is never right.
        Ok(library) => std::mem::forget(library),
        Err(cause) => {
            let hint = format!("{LIBRARY} cannot be loaded ({cause}), install the NVIDIA driver or use Device::emulator");
            return Err(Error::Driver { op, code: 0, name: "no CUDA driver".to_owned(), hint });
        }
    }
    // SAFETY: no preconditions; calling it again does nothing.
    check(op, unsafe { cuInit(0) })
}

type LaunchEx = unsafe extern "C" fn(*const ExConfig, CUfunction, *mut *mut c_void, *mut *mut c_void) -> c_int;

/// `cuLaunchKernelEx`, which `cust_raw` does not declare: so there may be nothing to link it with.
fn launch_ex() -> Result<LaunchEx> {
    // SAFETY: the driver is loaded already.
    let library = unsafe { libloading::Library::new(LIBRARY) };
    // SAFETY: the type is that of the driver's header.
    let found = library.ok().and_then(|driver| unsafe { driver.get::<LaunchEx>(b"cuLaunchKernelEx\0") }.ok().map(|f| *f));
    found.ok_or_else(|| Error::Unsupported {
        op: "device",
        what: format!("the driver ({}) is older than CUDA 12.0 (driver 525)", driver_version()),
    })
}

/// Number of GPUs.
pub fn count() -> Result<usize> {
    init()?;
    Ok(Device::num_devices().map_err(enumeration)? as usize)
}

/// An error that came through `cust`, whose enum has the driver's codes.
fn enumeration(cause: cust::error::CudaError) -> Error {
    let code = cause as c_int;
    error("device", code, hint(code).to_owned())
}

/// The context of a GPU, made on first use.
pub fn context(ordinal: usize) -> Result<&'static Context> {
    static CONTEXTS: Mutex<Vec<&'static Context>> = Mutex::new(Vec::new());
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = contexts.iter().find(|context| context.ordinal == ordinal) {
        return Ok(context);
    }
    let context: &'static Context = Box::leak(Box::new(Context::new(ordinal)?));
    contexts.push(context);
    Ok(context)
}

impl Context {
    fn new(ordinal: usize) -> Result<Self> {
        let op = "device";
        let count = count()?;
        if count == 0 {
            return Err(error(op, NO_DEVICE, hint(NO_DEVICE).to_owned()));
        }
        if ordinal >= count {
            let allowed = if count == 1 { "0 (one GPU is visible)".to_owned() } else { format!("0 to {}", count - 1) };
            return Err(Error::Value { op, arg: "ordinal", allowed, got: ordinal.to_string() });
        }
        let device = Device::get_device(ordinal as u32).map_err(enumeration)?;
        let attribute = |which| device.get_attribute(which).map_err(enumeration);
        let name = device.name().map_err(enumeration)?;
        let capability =
            (attribute(DeviceAttribute::ComputeCapabilityMajor)?, attribute(DeviceAttribute::ComputeCapabilityMinor)?);
        if capability < MIN_COMPUTE_CAPABILITY {
            let (major, minor) = capability;
            let what =
                format!("cuda:{ordinal} ({name}) has compute capability {major}.{minor}, the kernels need 9.0 (H100) or newer");
            return Err(Error::Unsupported { op, what });
        }
        let (mut raw, mut max_shared_bytes) = (ptr::null_mut(), 0);
        // SAFETY: a device handle from the driver, and places for the answers.
        unsafe {
            check(op, cuDeviceGetAttribute(&mut max_shared_bytes, DEVICE_MAX_SHARED_BYTES_OPTIN, device.as_raw()))?;
            check(op, cuDevicePrimaryCtxRetain(&mut raw, device.as_raw()))?;
        }
        let context = Self {
            ordinal,
            raw,
            name,
            num_sms: attribute(DeviceAttribute::MultiprocessorCount)?.try_into().unwrap_or(1),
            max_shared_bytes,
            driver: driver_version(),
            launch_ex: launch_ex()?,
            functions: Mutex::new(HashMap::new()),
            capturing: RwLock::new(()),
        };
        context.read_compiler(op)?;
        Ok(context)
    }

    /// Compile a kernel that does nothing. For the first text of a process the driver reads its compiler from disk, 50 to 150 ms that
    /// belong to opening the device and not to whichever op happens to be launched first. A text in the driver's cache costs nothing.
    fn read_compiler(&self, op: &'static str) -> Result<()> {
        self.bind(op)?;
        // A driver that does not take this takes no kernel either, and says more about why when an op is launched.
        let (text, mut module) =
            (c".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry nothing() { ret; }\n", ptr::null_mut());
        // SAFETY: the text ends with a zero byte, and the module is unloaded only if there is one.
        unsafe {
            if cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 0, ptr::null_mut(), ptr::null_mut()) == 0 {
                cuModuleUnload(module);
            }
        }
        Ok(())
    }

    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn num_sms(&self) -> u32 {
        self.num_sms
    }

    pub fn driver_version(&self) -> String {
        self.driver.clone()
    }

    fn bind(&self, op: &'static str) -> Result<()> {
        // SAFETY: a context that is never released.
        check(op, unsafe { cuCtxSetCurrent(self.raw) })
    }

    /// Bind and run one driver call.
    fn call(&self, op: &'static str, call: impl FnOnce() -> c_int) -> Result<()> {
        self.bind(op)?;
        check(op, call())
    }

    /// As [`call`](Self::call) for drops, which have nobody to tell about an error.
    fn quietly(&self, call: impl FnOnce() -> c_int) {
        if self.bind("drop").is_ok() {
            call();
        }
    }

    pub fn alloc(&self, op: &'static str, bytes: usize) -> Result<u64> {
        let mut address = 0;
        // CUDA refuses empty allocations, but an empty buffer is a buffer.
        // SAFETY: `address` is valid for the write.
        match self.call(op, || unsafe { cuMemAlloc_v2(&mut address, bytes.max(1)) }) {
            Err(Error::Driver { code: OUT_OF_MEMORY, .. }) => {
                Err(Error::OutOfMemory { op, device: format!("cuda:{}", self.ordinal), bytes: bytes as u64 })
            }
            other => other.map(|()| address),
        }
    }

    pub fn free(&self, address: u64) {
        // A buffer may be dropped by a thread that is capturing; freeing is allowed then in the relaxed mode only.
        let _relaxed = Relaxed::new();
        // SAFETY: allocated in `alloc` and owned by the caller.
        self.quietly(|| unsafe { cuMemFree_v2(address) });
    }

    /// # Safety
    /// Both sides have `bytes` bytes.
    pub unsafe fn upload(&self, op: &'static str, address: u64, from: *const u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // Non-blocking streams do not wait for the default stream nor it for them: wait for the old contents' users before,
        // and for the copy, which may still be under way when the call returns, after.
        // SAFETY: by the caller.
        self.wait_for_all(op)?;
        self.call(op, || unsafe { cuMemcpyHtoD_v2(address, from.cast(), bytes) })?;
        self.call(op, || unsafe { cuStreamSynchronize(ptr::null_mut()) })
    }

    /// # Safety
    /// Both sides have `bytes` bytes.
    pub unsafe fn download(&self, op: &'static str, to: *mut u8, address: u64, bytes: usize) -> Result<()> {
        self.wait_for_all(op)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: by the caller.
        self.call(op, || unsafe { cuMemcpyDtoH_v2(to.cast(), address, bytes) })
    }

    /// Download once the work given to `stream` so far is done. Other streams go on.
    ///
    /// # Safety
    /// Both sides have `bytes` bytes.
    pub unsafe fn download_after(
        &self,
        op: &'static str,
        stream: *mut c_void,
        to: *mut u8,
        address: u64,
        bytes: usize,
    ) -> Result<()> {
        if bytes > 0 {
            // SAFETY: by the caller; the memory is not touched any more once the stream has been waited for.
            self.call(op, || unsafe { cuMemcpyDtoHAsync_v2(to.cast(), address, bytes, stream.cast()) })?;
        }
        // SAFETY: a stream of this context.
        self.call(op, || unsafe { cuStreamSynchronize(stream.cast()) })
    }

    /// An error if waiting for `stream` is not possible because it, or another one by this thread, is being captured.
    pub fn refuse_capture(&self, op: &'static str, stream: *mut c_void) -> Result<()> {
        let mut status = 0;
        // SAFETY: a stream of this context; `status` is a place for the answer.
        self.call(op, || unsafe { cuStreamIsCapturing(stream.cast(), &mut status) })?;
        if status != 0 || CAPTURES.get() {
            let what = "waits for the stream, which is not possible while it is captured".to_owned();
            return Err(Error::Unsupported { op, what });
        }
        Ok(())
    }

    /// # Safety
    /// `bytes` bytes at `address` belong to the caller.
    pub unsafe fn fill(&self, op: &'static str, address: u64, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: by the caller; the waits are those of `upload`.
        self.wait_for_all(op)?;
        self.call(op, || unsafe { cuMemsetD8_v2(address, byte, bytes) })?;
        self.call(op, || unsafe { cuStreamSynchronize(ptr::null_mut()) })
    }

    /// # Safety
    /// `bytes` bytes at `address` belong to the caller, `stream` is one of this context.
    pub unsafe fn fill_async(&self, op: &'static str, stream: *mut c_void, address: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.call(op, || unsafe { cuMemsetD8Async(address, byte, bytes, stream.cast()) })
    }

    /// # Safety
    /// Both sides have `bytes` bytes and do not overlap; `stream` is one of this context.
    pub unsafe fn copy_async(&self, op: &'static str, stream: *mut c_void, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.call(op, || unsafe { cuMemcpyDtoDAsync_v2(to, from, bytes, stream.cast()) })
    }

    pub fn create_stream(&self) -> Result<*mut c_void> {
        let mut stream = ptr::null_mut();
        // SAFETY: `stream` is valid for the write.
        self.call("stream", || unsafe { cuStreamCreate(&mut stream, STREAM_NON_BLOCKING) })?;
        Ok(stream.cast())
    }

    pub fn destroy_stream(&self, stream: *mut c_void) {
        // SAFETY: made by `create_stream`. Work that is still queued goes on.
        self.quietly(|| unsafe { cuStreamDestroy_v2(stream.cast()) });
    }

    pub fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        // SAFETY: a stream of this context.
        self.call("synchronize", || unsafe { cuStreamSynchronize(stream.cast()) })
    }

    /// Start to capture a stream. Other threads that wait for the whole GPU are held up until the capture is over.
    pub fn begin_capture(&'static self, stream: *mut c_void) -> Result<Capture> {
        let op = "capture";
        if CAPTURES.get() {
            return Err(Error::Unsupported { op, what: "this thread is capturing another stream".to_owned() });
        }
        let alone = self.capturing.write().unwrap_or_else(PoisonError::into_inner);
        // Thread-local: a launcher that allocates or synchronises fails instead of doing it behind the graph's back, while
        // other threads are not disturbed.
        // SAFETY: a stream of this context.
        self.call(op, || unsafe { cuStreamBeginCapture_v2(stream.cast(), CAPTURE_THREAD_LOCAL) })?;
        CAPTURES.set(true);
        Ok(Capture { context: self, stream: stream.cast(), open: true, _alone: alone })
    }

    /// Wait for everything that runs on the GPU, in whatever stream.
    fn wait_for_all(&self, op: &'static str) -> Result<()> {
        if CAPTURES.get() {
            let what = "waits for the GPU, which is not possible while this thread captures a graph".to_owned();
            return Err(Error::Unsupported { op, what });
        }
        let _nobody_captures = self.capturing.read().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: no preconditions.
        self.call(op, || unsafe { cuCtxSynchronize() })
    }

    pub fn launch_graph(&self, graph: *mut c_void, stream: *mut c_void) -> Result<()> {
        // SAFETY: made by `end_capture`; a stream of this context.
        self.call("graph", || unsafe { cuGraphLaunch(graph.cast(), stream.cast()) })
    }

    pub fn destroy_graph(&self, graph: *mut c_void) {
        // SAFETY: made by `end_capture`.
        self.quietly(|| unsafe { cuGraphExecDestroy(graph.cast()) });
    }

    pub fn create_event(&self) -> Result<*mut c_void> {
        let mut event = ptr::null_mut();
        // SAFETY: `event` is valid for the write.
        self.call("event", || unsafe { cuEventCreate(&mut event, 0) })?;
        Ok(event.cast())
    }

    pub fn record_event(&self, event: *mut c_void, stream: *mut c_void) -> Result<()> {
        // SAFETY: event and stream of this context.
        self.call("event", || unsafe { cuEventRecord(event.cast(), stream.cast()) })
    }

    pub fn elapsed_us(&self, start: *mut c_void, end: *mut c_void) -> Result<f64> {
        let mut ms = 0.0f32;
        // SAFETY: events of this context.
        unsafe {
            self.call("event", || cuEventSynchronize(start.cast()))?;
            self.call("event", || cuEventSynchronize(end.cast()))?;
            self.call("event", || cuEventElapsedTime(&mut ms, start.cast(), end.cast()))?;
        }
        Ok(f64::from(ms) * 1e3)
    }

    pub fn destroy_event(&self, event: *mut c_void) {
        // SAFETY: made by `create_event`.
        self.quietly(|| unsafe { cuEventDestroy_v2(event.cast()) });
    }

    /// # Safety
    /// The arguments point to memory of this device as large as the kernel touches; `stream` is one of this context.
    pub unsafe fn launch<A: KernelArgs>(
        &self,
        op: &'static str,
        stream: *mut c_void,
        entry: &'static Entry<A>,
        config: &LaunchConfig,
        args: &A,
    ) -> Result<()> {
        let function = match entry.loaded.get(self.ordinal) {
            Some(function) => function.as_ptr().cast(),
            None => self.function(op, &entry.loaded, entry.op, entry.name)?,
        };
        let mut params = Params::default();
        args.pack(&mut params);
        // SAFETY: args and entry come from one declaration; the rest by the caller.
        unsafe { self.launch_function(op, stream.cast(), function, config, &mut params) }
    }

    /// # Safety
    /// `params` are those of the function; for the rest see [`launch`](Self::launch).
    unsafe fn launch_function(
        &self,
        op: &'static str,
        stream: CUstream,
        function: CUfunction,
        config: &LaunchConfig,
        params: &mut Params,
    ) -> Result<()> {
        let mut cooperative = Attribute { id: ATTRIBUTE_COOPERATIVE, value: [1, 0, 0, 0, 0, 0, 0, 0] };
        let config = ExConfig {
            grid: config.grid,
            block: [config.threads, 1, 1],
            shared: config.shared_bytes,
            stream,
            attributes: ptr::from_mut(&mut cooperative).cast(),
            num_attributes: config.cooperative.into(),
        };
        self.bind(op)?;
        if config.num_attributes != 0 {
            // SAFETY: by the caller; the driver has copied everything when it returns.
            return check(op, unsafe { (self.launch_ex)(&config, function, params.pointers(), ptr::null_mut()) });
        }
        // One block instead of a pointer to each parameter: for 30 of them that saves the host a microsecond. A cooperative launch cannot
        // be captured that way.
        let (block, mut bytes) = params.block();
        let mut extra = [
            ptr::without_provenance_mut(LAUNCH_PARAM_BUFFER_POINTER),
            block,
            ptr::without_provenance_mut(LAUNCH_PARAM_BUFFER_SIZE),
            ptr::from_mut(&mut bytes).cast(),
            ptr::without_provenance_mut(LAUNCH_PARAM_END),
        ];
        // SAFETY: as above.
        check(op, unsafe { (self.launch_ex)(&config, function, ptr::null_mut(), extra.as_mut_ptr()) })
    }

    /// The kernel of an entry, compiled if it is not yet.
    #[cold]
    fn function(&self, op: &'static str, loaded: &'static Loaded, file: &str, name: &str) -> Result<CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let key = ptr::from_ref(loaded).addr();
        if let Some(Function(function)) = functions.get(&key) {
            return Ok(*function);
        }
        self.bind(op)?;
        let function = self.load(op, file, name, "")?;
        functions.insert(key, function);
        loaded.set(self.ordinal, function.0.cast());
        Ok(function.0)
    }

    /// Compile one kernel, its text followed by `more`. The module stays loaded as long as the process runs.
    fn load(&self, op: &'static str, file: &str, name: &str, more: &str) -> Result<Function> {
        let text = ptx::text(file)
            .ok_or_else(|| Error::Unsupported { op, what: format!("no PTX of {file} in this build, run cargo xtask ptx") })?;
        let module = ptx::module(text, name, more).ok_or_else(|| Error::Unsupported {
            op,
            what: format!("the PTX of {file} has no kernel {name}, run cargo xtask ptx"),
        })?;
        let name = CString::new(name).map_err(|_| Error::Unsupported { op, what: format!("{name:?} is no name of a kernel") })?;

        // The first launch may be one that is being captured; loading is allowed then in the relaxed mode only.
        let _relaxed = Relaxed::new();
        let function = Function(self.compile(op, &module, &name, ptx::isa(text))?);
        let mut fixed = 0;
        // SAFETY: a function that was just loaded.
        unsafe {
            check(op, cuFuncGetAttribute(&mut fixed, FUNC_STATIC_SHARED_BYTES, function.0))?;
            // All the GPU has, once: the launch says how much of it is used. Without this 48 KB would be the limit.
            check(op, cuFuncSetAttribute(function.0, FUNC_MAX_DYNAMIC_SHARED_BYTES, self.max_shared_bytes - fixed))?;
        }
        Ok(function)
    }

    /// What the driver takes to compile each kernel, in microseconds; the median of three where one is slow. They stay loaded.
    pub fn compile_times(&self) -> Result<Vec<(&'static str, f64)>> {
        const SLOW_US: f64 = 80_000.0;
        self.bind("compile")?;
        let timed = |op, name| -> Result<f64> {
            let more = ptx::fresh_comment();
            let start = std::time::Instant::now();
            self.load("compile", op, name, &more)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        // The first compilation of a process also reads the compiler from disk.
        if let Some((op, name)) = ptx::kernels().next() {
            timed(op, name)?;
        }
        let median = |(op, name)| -> Result<(&'static str, f64)> {
            let mut times = vec![timed(op, name)?];
            if times[0] > SLOW_US {
                times.extend([timed(op, name)?, timed(op, name)?]);
                times.sort_by(f64::total_cmp);
            }
            Ok((name, times[times.len() / 2]))
        };
        ptx::kernels().map(median).collect()
    }

    fn compile(&self, op: &'static str, module: &CStr, name: &CStr, isa: Option<(u32, u32)>) -> Result<CUfunction> {
        let mut log = vec![0u8; 8192];
        let mut options = [JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES];
        // The size is passed in the place of a pointer; that is how the driver wants it.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(log.len())];
        let (mut loaded, mut function) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the text ends with a zero byte; the log has the size that is passed.
        let code =
            unsafe { cuModuleLoadDataEx(&mut loaded, module.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr()) };
        if code == UNSUPPORTED_PTX_VERSION {
            let (major, minor) = isa.unwrap_or_default();
            let needed = ptx::driver_for((major, minor));
            return Err(error(
                op,
                code,
                format!("the kernels are PTX {major}.{minor} and need {needed}, this driver is {}", self.driver),
            ));
        }
        if code != 0 {
            let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
            let parts = [hint(code)].into_iter().chain(log.lines().map(str::trim)).filter(|part| !part.is_empty());
            return Err(error(op, code, parts.collect::<Vec<_>>().join("; ")));
        }
        // SAFETY: the module was just loaded and is unloaded only if nobody gets a function from it.
        unsafe {
            let code = cuModuleGetFunction(&mut function, loaded, name.as_ptr());
            if code != 0 {
                cuModuleUnload(loaded);
            }
            check(op, code)?;
        }
        Ok(function)
    }
}

/// A capture under way. Dropped without [`finish`](Self::finish), after an error or a panic, it is thrown away.
pub struct Capture {
    context: &'static Context,
    stream: CUstream,
    open: bool,
    _alone: RwLockWriteGuard<'static, ()>,
}

impl Capture {
    /// End the capture and make it executable.
    pub fn finish(self) -> Result<*mut c_void> {
        let (op, context, mut exec) = ("capture", self.context, ptr::null_mut());
        let graph = self.end(op)?;
        // SAFETY: the graph is destroyed once the executable one exists.
        unsafe {
            let made = context.call(op, || cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            cuGraphDestroy(graph);
            made?;
        }
        Ok(exec.cast())
    }

    /// End the capture and take the kernel out of what was recorded.
    pub fn finish_bare(self) -> Result<BareLaunch> {
        let (context, stream) = (self.context, self.stream);
        BareLaunch::new(context, stream, self.end("bare launch")?)
    }

    fn end(mut self, op: &'static str) -> Result<CUgraph> {
        let mut graph = ptr::null_mut();
        self.open = false;
        // SAFETY: the stream that is being captured.
        self.context.call(op, || unsafe { cuStreamEndCapture(self.stream, &mut graph) })?;
        Ok(graph)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        CAPTURES.set(false);
        if self.open {
            let mut graph = ptr::null_mut();
            // SAFETY: a capture that failed yields a null graph, which is not destroyed.
            self.context.quietly(|| unsafe {
                let code = cuStreamEndCapture(self.stream, &mut graph);
                if graph.is_null() { code } else { cuGraphDestroy(graph) }
            });
        }
    }
}

/// Puts the thread into the relaxed capture mode, in which calls that a capture forbids are allowed, until dropped.
struct Relaxed(c_int);

impl Relaxed {
    fn new() -> Self {
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: exchanges the thread's mode with the variable. If it fails the variable keeps its value, which is then put back.
        unsafe { cuThreadExchangeStreamCaptureMode(&mut mode) };
        Self(mode)
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: puts back the mode that `new` took.
        unsafe { cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// One recorded launch without anything of ours around it: what the benchmark compares launches with, and the ways of calling the
/// driver that it compares with each other.
pub struct BareLaunch {
    context: &'static Context,
    stream: CUstream,
    api: BareApi,
    graph: CUgraph,
    exec: CUgraphExec,
    node: KernelNode,
    cooperative: bool,
    /// The parameters as one block of memory, as the kernel sees them, and a pointer to each.
    block: Vec<u8>,
    params: Vec<*mut c_void>,
    /// Kernels that do nothing, without parameters and with `num_params` of 8 bytes.
    empty: CUfunction,
    empty_params: CUfunction,
    /// A stream that waits for the default stream.
    blocking: CUstream,
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
struct KernelNode {
    function: CUfunction,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
    kernel: *mut c_void,
    context: CUcontext,
}

/// `CUlaunchAttribute`.
#[repr(C)]
struct Attribute {
    /// 4 bytes, and 4 that are not used.
    id: u64,
    value: [u64; 8],
}

/// `CUlaunchConfig`.
#[repr(C)]
struct ExConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: CUstream,
    attributes: *mut c_void,
    num_attributes: c_uint,
}

/// Driver functions that only a measurement needs. They are looked up when it starts: programs that link them would not start with a
/// driver from before CUDA 12.4.
#[derive(Clone, Copy)]
struct BareApi {
    graph_nodes: unsafe extern "C" fn(CUgraph, *mut *mut c_void, *mut usize) -> c_int,
    node_params: unsafe extern "C" fn(*mut c_void, *mut KernelNode) -> c_int,
    node_attribute: unsafe extern "C" fn(*mut c_void, c_int, *mut [u64; 8]) -> c_int,
    param_info: unsafe extern "C" fn(CUfunction, usize, *mut usize, *mut usize) -> c_int,
    launch_ex: unsafe extern "C" fn(*const ExConfig, CUfunction, *mut *mut c_void, *mut *mut c_void) -> c_int,
    current: unsafe extern "C" fn(*mut CUcontext) -> c_int,
    query: unsafe extern "C" fn(CUstream) -> c_int,
}

const NOT_READY: c_int = 600;
const ATTRIBUTE_COOPERATIVE: u64 = 2;
const LAUNCH_PARAM_END: usize = 0;
const LAUNCH_PARAM_BUFFER_POINTER: usize = 1;
const LAUNCH_PARAM_BUFFER_SIZE: usize = 2;

impl BareApi {
    fn load() -> Result<Self> {
        // SAFETY: the driver is loaded already.
        let library = unsafe { libloading::Library::new(LIBRARY) }
            .map_err(|e| Error::Unsupported { op: "bare launch", what: e.to_string() })?;
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type of the field is that of the driver's header.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(|_| Error::Unsupported {
                    op: "bare launch",
                    what: concat!("this driver has no ", $name).to_owned(),
                })?
            };
        }
        let api = Self {
            graph_nodes: find!("cuGraphGetNodes"),
            node_params: find!("cuGraphKernelNodeGetParams_v2"),
            node_attribute: find!("cuGraphKernelNodeGetAttribute"),
            param_info: find!("cuFuncGetParamInfo"),
            launch_ex: find!("cuLaunchKernelEx"),
            current: find!("cuCtxGetCurrent"),
            query: find!("cuStreamQuery"),
        };
        std::mem::forget(library);
        Ok(api)
    }
}

/// The block of parameters that a list of launch options has; null if it has none.
///
/// # Safety
/// The list is null or ends with its mark.
unsafe fn recorded_block(mut list: *mut *mut c_void) -> *const u8 {
    // SAFETY: by the caller; a mark is followed by its value.
    unsafe {
        while !list.is_null() && (*list).addr() != LAUNCH_PARAM_END {
            if (*list).addr() == LAUNCH_PARAM_BUFFER_POINTER {
                return (*list.add(1)).cast();
            }
            list = list.add(2);
        }
    }
    ptr::null()
}

impl BareLaunch {
    fn new(context: &'static Context, stream: CUstream, graph: CUgraph) -> Result<Self> {
        let op = "bare launch";
        let api = BareApi::load()?;
        let (mut nodes, mut count) = ([ptr::null_mut(); 2], 2);
        let mut attribute = [0u64; 8];
        let mut node = KernelNode {
            function: ptr::null_mut(),
            grid: [0; 3],
            block: [0; 3],
            shared: 0,
            params: ptr::null_mut(),
            extra: ptr::null_mut(),
            kernel: ptr::null_mut(),
            context: ptr::null_mut(),
        };
        // SAFETY: places for the answers.
        unsafe {
            context.call(op, || (api.graph_nodes)(graph, nodes.as_mut_ptr(), &mut count))?;
            if count != 1 {
                return Err(Error::Unsupported { op, what: format!("{count} pieces of work instead of one launch") });
            }
            context.call(op, || (api.node_params)(nodes[0], &mut node))?;
            context.call(op, || (api.node_attribute)(nodes[0], ATTRIBUTE_COOPERATIVE as c_int, &mut attribute))?;
        }
        // Recorded as pointers or as one block, and the driver may have turned one into the other.
        // SAFETY: a list of pairs up to the end mark, in which the address of a block comes with its mark.
        let recorded_block = unsafe { recorded_block(node.extra) };
        if node.params.is_null() && recorded_block.is_null() {
            return Err(Error::Unsupported { op, what: "a launch whose parameters the driver does not give back".to_owned() });
        }
        let (mut block, mut offsets) = (Vec::new(), Vec::new());
        let (mut offset, mut size) = (0, 0);
        // SAFETY: as many parameters as the function has, each as large and in such a place as it says.
        unsafe {
            while (api.param_info)(node.function, offsets.len(), &mut offset, &mut size) == 0 {
                let from = if node.params.is_null() {
                    recorded_block.add(offset)
                } else {
                    (*node.params.add(offsets.len())).cast::<u8>()
                };
                block.resize(offset, 0u8);
                block.extend(std::slice::from_raw_parts(from, size));
                offsets.push(offset);
            }
        }
        let start = block.as_mut_ptr();
        let pointers: Vec<*mut c_void> = offsets.iter().map(|offset| start.wrapping_add(*offset).cast()).collect();
        let num_params = pointers.len();
        let params: Vec<String> = (0..num_params).map(|i| format!(".param .u64 p{i}")).collect();
        let text =
            |params: &str| format!(".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry empty({params}) {{ ret; }}\n");
        let compile = |params: &str| context.compile(op, &CString::new(text(params)).unwrap_or_default(), c"empty", None);
        let (mut exec, mut blocking) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: places for the answers.
        unsafe {
            context.call(op, || cuGraphInstantiateWithFlags(&mut exec, graph, 0))?;
            context.call(op, || cuStreamCreate(&mut blocking, 0))?;
        }
        let (empty, empty_params) = (compile("")?, compile(&params.join(", "))?);
        let cooperative = attribute[0] as u32 != 0;
        Ok(Self { context, stream, api, graph, exec, node, cooperative, block, params: pointers, empty, empty_params, blocking })
    }

    /// How many parameters the kernel has.
    pub fn num_params(&self) -> usize {
        self.params.len()
    }

    /// Launch `n` times.
    pub fn burst(&mut self, way: LaunchWay, n: u32) -> Result<()> {
        let op = "bare launch";
        let (api, raw, params) = (self.api, self.context.raw, self.params.as_mut_ptr());
        let KernelNode { function, grid, block, shared, .. } = self.node;
        let cooperative = self.cooperative;
        self.context.bind(op)?;
        // SAFETY: function, sizes and parameters are those of the recorded launch; its memory is the caller's business, as it was there.
        let launch = |function: CUfunction, stream: CUstream, params: *mut *mut c_void, extra: *mut *mut c_void| unsafe {
            let ([x, y, z], [a, b, c]) = (grid, block);
            if cooperative && extra.is_null() {
                cuLaunchCooperativeKernel(function, x, y, z, a, b, c, shared, stream, params)
            } else {
                cuLaunchKernel(function, x, y, z, a, b, c, shared, stream, params, extra)
            }
        };
        let none = ptr::null_mut();
        let mut size = self.block.len();
        let mut buffer = [
            ptr::without_provenance_mut(LAUNCH_PARAM_BUFFER_POINTER),
            self.block.as_mut_ptr().cast::<c_void>(),
            ptr::without_provenance_mut(LAUNCH_PARAM_BUFFER_SIZE),
            ptr::from_mut(&mut size).cast(),
            ptr::without_provenance_mut(LAUNCH_PARAM_END),
        ];
        // Eight bytes for each parameter of the empty kernel.
        let mut zeros = [0u64; Params::MAX];
        let mut zero_params = [ptr::null_mut::<c_void>(); Params::MAX];
        zero_params.iter_mut().zip(&mut zeros).for_each(|(param, zero)| *param = ptr::from_mut(zero).cast());
        let config = ExConfig { grid, block, shared, stream: self.stream, attributes: none, num_attributes: 0 };
        for _ in 0..n {
            // SAFETY: as above; `current` is a place for the answer.
            let code = unsafe {
                match way {
                    LaunchWay::Call => launch(function, self.stream, params, ptr::null_mut()),
                    LaunchWay::Bind => {
                        cuCtxSetCurrent(raw);
                        launch(function, self.stream, params, ptr::null_mut())
                    }
                    LaunchWay::Compare => {
                        let mut current = ptr::null_mut();
                        (api.current)(&mut current);
                        if current != raw {
                            cuCtxSetCurrent(raw);
                        }
                        launch(function, self.stream, params, ptr::null_mut())
                    }
                    LaunchWay::Ex => (api.launch_ex)(&config, function, params, ptr::null_mut()),
                    LaunchWay::Buffer => launch(function, self.stream, ptr::null_mut(), buffer.as_mut_ptr()),
                    LaunchWay::Graph => cuGraphLaunch(self.exec, self.stream),
                    LaunchWay::DefaultStream => launch(function, ptr::null_mut(), params, ptr::null_mut()),
                    LaunchWay::BlockingStream => launch(function, self.blocking, params, ptr::null_mut()),
                    LaunchWay::Empty => {
                        cuLaunchKernel(self.empty, 1, 1, 1, 32, 1, 1, 0, self.stream, ptr::null_mut(), ptr::null_mut())
                    }
                    LaunchWay::EmptyParams => {
                        let params = zero_params.as_mut_ptr();
                        cuLaunchKernel(self.empty_params, 1, 1, 1, 32, 1, 1, 0, self.stream, params, ptr::null_mut())
                    }
                }
            };
            check(op, code)?;
        }
        Ok(())
    }

    /// Wait for all of it without letting the thread sleep, so that the next burst starts on a processor that is awake.
    pub fn wait(&self) -> Result<()> {
        for stream in [self.stream, self.blocking, ptr::null_mut()] {
            loop {
                // SAFETY: streams of this context.
                match unsafe { (self.api.query)(stream) } {
                    NOT_READY => std::hint::spin_loop(),
                    code => break check("bare launch", code)?,
                }
            }
        }
        Ok(())
    }
}

impl Drop for BareLaunch {
    fn drop(&mut self) {
        // SAFETY: made in `new`; work that is still queued goes on.
        self.context.quietly(|| unsafe {
            cuGraphExecDestroy(self.exec);
            cuGraphDestroy(self.graph);
            cuStreamDestroy_v2(self.blocking)
        });
    }
}

/// How threads wait for the GPU, `CU_CTX_SCHED_*`; before the first use of the GPU.
pub fn set_schedule(ordinal: usize, flags: u32) -> Result<()> {
    let op = "device";
    init()?;
    let device = Device::get_device(ordinal as u32).map_err(enumeration)?;
    // SAFETY: a device of the driver.
    check(op, unsafe { cuDevicePrimaryCtxSetFlags_v2(device.as_raw(), flags) })
}

/// As `580.159.04 (CUDA 13.0)`; only the second part where the kernel module does not say its version.
fn driver_version() -> String {
    let mut version = 0;
    // SAFETY: `version` is valid for the write.
    unsafe { cuDriverGetVersion(&mut version) };
    let cuda = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    module_version(&module).map_or(cuda.clone(), |module| format!("{module} ({cuda})"))
}

/// The first word of the kernel module's report that looks like a version.
fn module_version(report: &str) -> Option<&str> {
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    report.lines().next()?.split_whitespace().find(is_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_modules_version_is_found() {
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Sep 2 18:00:00 UTC 2026\nGCC version: gcc 12.2.0\n";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.48.01  Release Build  (root@host)\n";
        assert_eq!(module_version(closed), Some("580.159.04"));
        assert_eq!(module_version(open), Some("590.48.01"));
        assert_eq!(module_version(""), None);
    }
}
