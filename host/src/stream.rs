//! Streams, graphs and events.

use crate::device::Backend;
use crate::{Device, Element, Error, Result, TensorMut, TensorRef, View, check, driver, emu};
use ferrotile_kernels::entry::{Entry, KernelArgs};
use ferrotile_kernels::launch::LaunchConfig;
use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A queue of work on a device. On a GPU everything given to it runs later and in order; the emulator runs it at once.
pub struct Stream {
    device: Device,
    raw: *mut c_void,
    owned: bool,
}

// SAFETY: the driver's stream handles may be used from any thread, also from several at the same time.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn create(device: &Device) -> Result<Self> {
        match device.backend {
            Backend::Emulator(_) => Ok(Self::default_of(device)),
            Backend::Cuda(context) => Ok(Self { device: *device, raw: context.create_stream()?, owned: true }),
        }
    }

    pub(crate) fn default_of(device: &Device) -> Self {
        Self { device: *device, raw: ptr::null_mut(), owned: false }
    }

    /// A stream of another library, a `CUstream` or `cudaStream_t`. It is not destroyed on drop. The emulator ignores `raw`.
    ///
    /// # Safety
    /// `raw` is a stream of the primary context of `device` and outlives the returned value.
    pub unsafe fn from_raw(device: &Device, raw: *mut c_void) -> Self {
        Self { device: *device, raw, owned: false }
    }

    /// Device of the stream.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The `CUstream`; null for the default stream and on the emulator.
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// Wait until everything given to the stream is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn synchronize(&self) -> Result<()> {
        match self.device.backend {
            Backend::Emulator(_) => Ok(()),
            Backend::Cuda(context) => context.synchronize(self.raw),
        }
    }

    /// Set every byte of a contiguous tensor. Asynchronous, allocates nothing.
    ///
    /// ```
    /// let device = ferrotile::Device::emulator();
    /// let mut x = device.alloc::<i32>(6)?;
    /// device.stream()?.fill(&mut x.tensor_mut(&[2, 3])?, 0xFF)?;
    /// assert_eq!(x.to_vec()?, [-1; 6]);
    /// # Ok::<(), ferrotile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Layout`] when `out` is not contiguous, [`Error::DeviceMismatch`], [`Error::Driver`].
    pub fn fill(&self, out: &mut TensorMut<'_>, byte: u8) -> Result<()> {
        let op = "fill";
        check::on_device(op, &self.device, "out", out.device())?;
        check::contiguous(op, "out", out)?;
        let bytes = out.span_bytes() as usize;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the tensor is borrowed exclusively and, being contiguous, consists of these bytes.
        unsafe {
            match self.device.backend {
                Backend::Emulator(emulator) => emu::fill(out.ptr(), byte, bytes, emulator.checked),
                Backend::Cuda(context) => context.fill_async(op, self.raw, out.ptr(), byte, bytes)?,
            }
        }
        Ok(())
    }

    /// Set every byte of a contiguous tensor to zero. Asynchronous, allocates nothing.
    ///
    /// # Errors
    /// Those of [`fill`](Self::fill).
    pub fn memset_zero(&self, out: &mut TensorMut<'_>) -> Result<()> {
        self.fill(out, 0)
    }

    /// Copy a contiguous tensor into another of the same size in bytes. Asynchronous, allocates nothing.
    ///
    /// ```
    /// let device = ferrotile::Device::emulator();
    /// let from = device.upload(&[1.0f32, 2.0, 3.0])?;
    /// let mut to = device.alloc::<f32>(3)?;
    /// device.stream()?.copy(&mut to.tensor_mut(&[3])?, &from.tensor(&[3])?)?;
    /// assert_eq!(to.to_vec()?, [1.0, 2.0, 3.0]);
    /// # Ok::<(), ferrotile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Layout`] when one is not contiguous, [`Error::Shape`] when the sizes differ, [`Error::Overlap`],
    /// [`Error::DeviceMismatch`], [`Error::Driver`].
    pub fn copy(&self, to: &mut TensorMut<'_>, from: &TensorRef<'_>) -> Result<()> {
        let op = "copy";
        check::same_device(op, self, &[("to", to), ("from", from)])?;
        check::contiguous(op, "to", to)?;
        check::contiguous(op, "from", from)?;
        check::no_overlap(op, ("to", to), ("from", from))?;
        let bytes = to.span_bytes();
        if bytes != from.span_bytes() {
            let size = |bytes| format!("{bytes} bytes");
            return Err(Error::Shape { op, arg: "from", expected: size(bytes), got: size(from.span_bytes()) });
        }
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both tensors are borrowed, contiguous, of this size and apart.
        unsafe {
            match self.device.backend {
                Backend::Emulator(emulator) => emu::copy(to.ptr(), from.ptr(), bytes as usize, emulator.checked),
                Backend::Cuda(context) => context.copy_async(op, self.raw, to.ptr(), from.ptr(), bytes as usize)?,
            }
        }
        Ok(())
    }

    /// For calls that wait for the stream: an error, before anything is launched, if that is not possible because it is captured.
    pub(crate) fn refuse_capture(&self, op: &'static str) -> Result<()> {
        match self.device.backend {
            Backend::Emulator(_) => Ok(()),
            Backend::Cuda(context) => context.refuse_capture(op, self.raw),
        }
    }

    /// The elements of a contiguous tensor of this type, once the work given to the stream so far is done. Waits for that.
    pub(crate) fn download<T: Element>(&self, op: &'static str, view: &View) -> Result<Vec<T>> {
        let len = view.span_bytes() as usize;
        let mut values = vec![T::zeroed(); len / size_of::<T>()];
        let to: *mut u8 = values.as_mut_ptr().cast();
        // SAFETY: both sides have that many bytes, of which any make a `T`; whoever made the view has said that they may be read.
        unsafe {
            match self.device.backend {
                Backend::Emulator(_) => emu::download(to, view.ptr(), len),
                Backend::Cuda(context) => context.download_after(op, self.raw, to, view.ptr(), len)?,
            }
        }
        Ok(values)
    }

    /// Launch a kernel: for launchers, which have checked that `args` points to memory as large as the kernel touches. A grid
    /// without blocks launches nothing. Asynchronous; allocates nothing, except that the first launch of a kernel compiles it.
    ///
    /// # Errors
    /// [`Error::Value`] for a configuration that no device takes, [`Error::Fault`] from the checked emulator, [`Error::Driver`].
    #[doc(hidden)]
    pub fn launch<A: KernelArgs + Sync>(
        &self,
        op: &'static str,
        entry: &'static Entry<A>,
        config: &LaunchConfig,
        args: &A,
    ) -> Result<()> {
        if config.num_blocks() == 0 {
            return Ok(());
        }
        check::launch_config(op, config, entry.max_threads)?;
        match self.device.backend {
            Backend::Emulator(emulator) => Ok(entry.emulate(config, args, &emulator.options())?),
            // SAFETY: that the arguments fit the kernel is the launcher's part.
            Backend::Cuda(context) => unsafe { context.launch(op, self.raw, entry, config, args) },
        }
    }

    /// Record what `work` gives to the stream, without running it, as a graph that can be launched again and again. The tensors
    /// it uses must still be there whenever the graph runs: their addresses are recorded. `work` may not wait for the device;
    /// other threads that copy to or from a buffer of it are held up until the capture is over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on the emulator and on the default stream; what `work` returns; [`Error::Driver`].
    pub fn capture(&self, work: impl FnOnce(&Stream) -> Result<()>) -> Result<Graph> {
        let op = "capture";
        let Backend::Cuda(context) = self.device.backend else {
            return Err(Error::Unsupported { op, what: "the emulator has no graphs, launch directly".to_owned() });
        };
        if self.raw.is_null() {
            return Err(Error::Unsupported { op, what: "the default stream cannot be captured, use Device::stream".to_owned() });
        }
        let capture = context.begin_capture(self.raw)?;
        work(self)?;
        Ok(Graph { device: self.device, raw: capture.finish()? })
    }
}

/// Ways to call the driver for the kernel of a [`BareLaunch`], for the benchmark's launch lab.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchWay {
    /// `cuLaunchKernel` (`cuLaunchCooperativeKernel` if the kernel needs it), nothing else.
    Call,
    /// `cuCtxSetCurrent` before each call, as launchers do.
    Bind,
    /// `cuCtxGetCurrent` before each call, and `cuCtxSetCurrent` where the answer is another context.
    Compare,
    /// `cuLaunchKernelEx` without attributes.
    Ex,
    /// The parameters as one block of memory.
    Buffer,
    /// A graph of the one kernel.
    Graph,
    /// On the default stream.
    DefaultStream,
    /// On a stream that waits for the default stream.
    BlockingStream,
    /// An empty kernel without parameters, one block of one warp.
    Empty,
    /// An empty kernel with as many parameters.
    EmptyParams,
}

impl LaunchWay {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Call,
        Self::Bind,
        Self::Compare,
        Self::Ex,
        Self::Buffer,
        Self::Graph,
        Self::DefaultStream,
        Self::BlockingStream,
        Self::Empty,
        Self::EmptyParams,
    ];
}

/// A launch taken out of a launcher, to be repeated without anything of ours around it. For the benchmark.
#[doc(hidden)]
pub struct BareLaunch(driver::BareLaunch);

impl BareLaunch {
    /// The one launch that `work` gives to the stream, with its arguments; it is not run.
    ///
    /// # Safety
    /// What it touches is there whenever it is launched, and is used by nothing else then.
    ///
    /// # Errors
    /// Those of [`Stream::capture`]; [`Error::Unsupported`] if there is more than one launch, and with drivers older than CUDA 12.4.
    pub unsafe fn record(stream: &Stream, work: impl FnOnce(&Stream) -> Result<()>) -> Result<Self> {
        let Backend::Cuda(context) = stream.device.backend else {
            return Err(Error::Unsupported { op: "bare launch", what: "the emulator has no driver".to_owned() });
        };
        let capture = context.begin_capture(stream.raw)?;
        work(stream)?;
        Ok(Self(capture.finish_bare()?))
    }

    /// How many parameters the kernel has.
    pub fn num_params(&self) -> usize {
        self.0.num_params()
    }

    /// Launch it `n` times.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn burst(&mut self, way: LaunchWay, n: u32) -> Result<()> {
        self.0.burst(way, n)
    }

    /// Wait for all of it without letting the thread sleep.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn wait(&self) -> Result<()> {
        self.0.wait()
    }
}

/// How threads wait for a GPU, `CU_CTX_SCHED_*`; before the first use of the GPU.
#[doc(hidden)]
pub fn set_schedule(ordinal: usize, flags: u32) -> Result<()> {
    driver::set_schedule(ordinal, flags)
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (Backend::Cuda(context), true) = (self.device.backend, self.owned) {
            context.destroy_stream(self.raw);
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream {:p} on {}", self.raw, self.device)
    }
}

/// Recorded work, made by [`Stream::capture`].
pub struct Graph {
    device: Device,
    raw: *mut c_void,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Run the recorded work on a stream. Asynchronous, allocates nothing.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`], [`Error::Driver`].
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        let op = "graph";
        check::on_device(op, &stream.device, "graph", &self.device)?;
        match self.device.backend {
            Backend::Emulator(_) => Ok(()),
            Backend::Cuda(context) => context.launch_graph(self.raw, stream.raw),
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Backend::Cuda(context) = self.device.backend {
            context.destroy_graph(self.raw);
        }
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph on {}", self.device)
    }
}

/// A point in a stream whose time is taken: device time on a GPU, wall clock on the emulator.
///
/// ```
/// use ferrotile::{Device, Event};
///
/// let device = Device::emulator();
/// let (stream, start, end) = (device.stream()?, Event::new(&device)?, Event::new(&device)?);
/// start.record(&stream)?;
/// end.record(&stream)?;
/// assert!(end.elapsed_us_since(&start)? >= 0.0);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub struct Event {
    device: Device,
    raw: *mut c_void,
    wall: Mutex<Option<Instant>>,
}

// SAFETY: the driver's event handles may be used from any thread, also from several at the same time.
unsafe impl Send for Event {}
// SAFETY: as above; the wall clock has its lock.
unsafe impl Sync for Event {}

impl Event {
    /// An event that was not recorded yet.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        let raw = match device.backend {
            Backend::Emulator(_) => ptr::null_mut(),
            Backend::Cuda(context) => context.create_event()?,
        };
        Ok(Self { device: *device, raw, wall: Mutex::new(None) })
    }

    /// Take the time when the stream gets here.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`], [`Error::Driver`].
    pub fn record(&self, stream: &Stream) -> Result<()> {
        check::on_device("event", &stream.device, "event", &self.device)?;
        match self.device.backend {
            Backend::Emulator(_) => *self.wall.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now()),
            Backend::Cuda(context) => context.record_event(self.raw, stream.raw)?,
        }
        Ok(())
    }

    /// Microseconds from `start` to this event. Waits until the device has reached both.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`]; [`Error::Value`] (emulator) or [`Error::Driver`] (GPU) when one of the two was never recorded.
    pub fn elapsed_us_since(&self, start: &Event) -> Result<f64> {
        check::on_device("event", &self.device, "start", &start.device)?;
        if let Backend::Cuda(context) = self.device.backend {
            return context.elapsed_us(start.raw, self.raw);
        }
        let time = |event: &Event, arg| {
            let recorded = *event.wall.lock().unwrap_or_else(PoisonError::into_inner);
            let (allowed, got) = ("a recorded event".to_owned(), "not recorded".to_owned());
            recorded.ok_or(Error::Value { op: "event", arg, allowed, got })
        };
        let (end, start) = (time(self, "end")?, time(start, "start")?);
        Ok(end.saturating_duration_since(start).as_secs_f64() * 1e6)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Backend::Cuda(context) = self.device.backend {
            context.destroy_event(self.raw);
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event on {}", self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn fill_reaches_exactly_the_tensor() {
        for device in [Device::emulator(), Device::emulator().checked()] {
            let mut b = device.zeros::<u32>(10).unwrap();
            let stream = device.stream().unwrap();
            stream.fill(&mut b.strided_mut(&[2, 3], &[3, 1], 2).unwrap(), 0xFF).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(b.to_vec().unwrap(), [0, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX, 0, 0]);
            stream.memset_zero(&mut b.tensor_mut(&[3]).unwrap()).unwrap();
            assert_eq!(b.to_vec().unwrap()[..4], [0, 0, 0, u32::MAX]);
            stream.fill(&mut b.tensor_mut(&[0]).unwrap(), 1).unwrap();
        }
    }

    #[test]
    fn fill_refuses_gaps_and_other_devices() {
        let device = Device::emulator();
        let mut b = device.zeros::<u32>(10).unwrap();
        let gaps = device.default_stream().fill(&mut b.strided_mut(&[2, 3], &[5, 1], 0).unwrap(), 1);
        assert!(matches!(gaps, Err(Error::Layout { op: "fill", arg: "out", .. })));
        let other = device.checked().default_stream().fill(&mut b.tensor_mut(&[10]).unwrap(), 1);
        assert!(matches!(other, Err(Error::DeviceMismatch { op: "fill", arg: "out", .. })));
        assert_eq!(b.to_vec().unwrap(), [0; 10]);
    }

    #[test]
    fn events_measure_wall_clock_on_the_emulator() {
        let device = Device::emulator();
        let stream = device.default_stream();
        let (start, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
        assert!(matches!(end.elapsed_us_since(&start), Err(Error::Value { .. })));
        start.record(&stream).unwrap();
        std::thread::sleep(Duration::from_millis(3));
        end.record(&stream).unwrap();
        let us = end.elapsed_us_since(&start).unwrap();
        assert!((3_000.0..3_000_000.0).contains(&us), "{us}");
        assert!(matches!(end.record(&device.checked().default_stream()), Err(Error::DeviceMismatch { .. })));
    }

    #[test]
    fn the_emulator_has_no_graphs() {
        let result = Device::emulator().default_stream().capture(|_| Ok(()));
        assert!(matches!(result, Err(Error::Unsupported { op: "capture", .. })));
    }
}
