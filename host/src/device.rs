//! Devices: the CPU emulator and CUDA GPUs.

#[cfg(doc)]
use crate::Error;
use crate::{Buffer, Element, Result, Stream, driver};
use ferrotile_kernels::device::emu;
use std::fmt;

/// Where tensors live and kernels run: the emulator or one GPU. Cheap to copy.
///
/// Two emulator devices are equal when both have checks on or both have them off; two CUDA devices when they are the same GPU.
///
/// ```
/// let device = ferrotile::Device::emulator().checked();
/// let x = device.upload(&[1u32, 2, 3])?;
/// assert_eq!(x.to_vec()?, [1, 2, 3]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Device {
    pub(crate) backend: Backend,
}

#[derive(Clone, Copy)]
pub(crate) enum Backend {
    Emulator(Emulator),
    Cuda(&'static driver::Context),
}

#[derive(Clone, Copy)]
pub(crate) struct Emulator {
    pub checked: bool,
    seed: Option<u64>,
}

impl Emulator {
    pub fn options(self) -> emu::Options {
        let order = self.seed.map_or(emu::Order::Ascending, emu::Order::Shuffled);
        emu::Options { checked: self.checked, order, ..Default::default() }
    }
}

/// The emulator says that it has as many multiprocessors as an H100, so that grids derived from the number are the same.
const EMULATOR_NUM_SMS: u32 = 132;

impl Device {
    /// The CPU emulator without the expensive checks, blocks and threads in ascending order.
    pub const fn emulator() -> Self {
        Self { backend: Backend::Emulator(Emulator { checked: false, seed: None }) }
    }

    /// GPU number `ordinal`, as CUDA counts them. Creates the GPU's primary context on first use and keeps it; that also lets the driver read
    /// its compiler, so that no op's first launch has to.
    ///
    /// # Errors
    /// [`Error::Driver`] when this crate was built without feature `cuda`, or there is no driver or no GPU; [`Error::Value`] for an
    /// ordinal out of range; [`Error::Unsupported`] for a GPU that is older than the compiled kernels.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self { backend: Backend::Cuda(driver::context(ordinal)?) })
    }

    /// Number of GPUs that CUDA sees.
    ///
    /// # Errors
    /// [`Error::Driver`] when this crate was built without feature `cuda`, or there is no driver or no GPU.
    pub fn cuda_count() -> Result<usize> {
        driver::count()
    }

    /// The emulator with all checks on: memory that nothing wrote and races too, not only bounds, alignment and missed barriers.
    /// Much slower.
    /// Has no effect on a GPU.
    #[must_use]
    pub const fn checked(mut self) -> Self {
        if let Backend::Emulator(emulator) = &mut self.backend {
            emulator.checked = true;
        }
        self
    }

    /// The emulator with blocks and threads in a random order that depends on `seed` only. Has no effect on a GPU.
    #[must_use]
    pub const fn shuffled(mut self, seed: u64) -> Self {
        if let Backend::Emulator(emulator) = &mut self.backend {
            emulator.seed = Some(seed);
        }
        self
    }

    /// Name of the GPU, or `emulator`.
    pub fn name(&self) -> String {
        match self.backend {
            Backend::Emulator(_) => "emulator".to_owned(),
            Backend::Cuda(context) => context.name().to_owned(),
        }
    }

    /// Whether this is the emulator.
    pub const fn is_emulator(&self) -> bool {
        matches!(self.backend, Backend::Emulator(_))
    }

    /// CUDA's number of the GPU; `None` for the emulator.
    pub fn ordinal(&self) -> Option<usize> {
        match self.backend {
            Backend::Emulator(_) => None,
            Backend::Cuda(context) => Some(context.ordinal()),
        }
    }

    /// Number of multiprocessors. The emulator has 132, like an H100.
    pub fn num_sms(&self) -> u32 {
        match self.backend {
            Backend::Emulator(_) => EMULATOR_NUM_SMS,
            Backend::Cuda(context) => context.num_sms(),
        }
    }

    /// Version of the driver and of the CUDA release it implements; for the emulator the version of this crate.
    pub fn driver_version(&self) -> String {
        match self.backend {
            Backend::Emulator(_) => concat!("ferrotile ", env!("CARGO_PKG_VERSION")).to_owned(),
            Backend::Cuda(context) => context.driver_version(),
        }
    }

    /// What the driver takes to compile each kernel, in microseconds; nothing on the emulator. For the benchmark.
    ///
    /// # Errors
    /// [`Error::Driver`].
    #[doc(hidden)]
    pub fn compile_times(&self) -> Result<Vec<(&'static str, f64)>> {
        match self.backend {
            Backend::Emulator(_) => Ok(Vec::new()),
            Backend::Cuda(context) => context.compile_times(),
        }
    }

    /// A new stream, which does not wait for the default stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn stream(&self) -> Result<Stream> {
        Stream::create(self)
    }

    /// CUDA's default stream of the device. It cannot be captured into a graph.
    pub fn default_stream(&self) -> Stream {
        Stream::default_of(self)
    }

    /// A buffer of `len` elements with arbitrary contents. The checked emulator reports a kernel that reads one before anything
    /// wrote it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::alloc("alloc", self, len)
    }

    /// A buffer of `len` zeros. Synchronises.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        let mut buffer = Buffer::alloc("zeros", self, len)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// A buffer with a copy of `data`. Synchronises.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn upload<T: Element>(&self, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = Buffer::alloc("upload", self, data.len())?;
        buffer.copy_from(data)?;
        Ok(buffer)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self.backend, other.backend) {
            (Backend::Emulator(a), Backend::Emulator(b)) => a.checked == b.checked,
            (Backend::Cuda(a), Backend::Cuda(b)) => a.ordinal() == b.ordinal(),
            _ => false,
        }
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Backend::Emulator(Emulator { checked: false, .. }) => f.write_str("emulator"),
            Backend::Emulator(_) => f.write_str("emulator (checked)"),
            Backend::Cuda(context) => write!(f, "cuda:{}", context.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equality_is_same_memory_with_the_same_checks() {
        assert_eq!(Device::emulator(), Device::emulator().shuffled(3));
        assert_ne!(Device::emulator(), Device::emulator().checked());
        assert_eq!(Device::emulator().checked().to_string(), "emulator (checked)");
    }

    #[test]
    fn options_reach_the_emulator() {
        let Backend::Emulator(plain) = Device::emulator().backend else { panic!("not the emulator") };
        assert!(!plain.options().checked && matches!(plain.options().order, emu::Order::Ascending));
        let Backend::Emulator(other) = Device::emulator().checked().shuffled(9).backend else { panic!("not the emulator") };
        assert!(other.options().checked && matches!(other.options().order, emu::Order::Shuffled(9)));
    }

    #[test]
    fn devices_are_shared_between_threads() {
        fn shared<T: Send + Sync + Copy>() {}
        shared::<Device>();
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_the_error_says_so() {
        let error = Device::cuda(0).unwrap_err().to_string();
        assert!(error.starts_with("device: ") && error.contains("feature `cuda`"), "{error}");
        assert!(Device::cuda_count().is_err());
    }
}
