//! Owned device memory.

use crate::device::Backend;
use crate::tensor::{MAX_RANK, contiguous_strides};
use crate::{Device, Element, Error, Result, TensorMut, TensorRef, View, emu};
use std::fmt;
use std::marker::PhantomData;

/// `len` elements of `T` on a device, freed on drop.
///
/// Freeing GPU memory waits for the kernels that are running, so dropping a buffer early is never wrong, only slow.
///
/// ```
/// let device = ferrotile::Device::emulator();
/// let mut x = device.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// // Two rows of the three, without the first column.
/// let t = x.strided(&[2, 1], &[2, 1], 1)?;
/// assert_eq!((t.ptr(), t.is_contiguous()), (x.as_ptr() + 4, false));
/// x.copy_from(&[0.0; 6])?;
/// assert!(x.tensor(&[7]).is_err());
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub struct Buffer<T> {
    device: Device,
    ptr: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Buffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device that holds the memory.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Address of the first element: a device address or, on the emulator, a host address. A multiple of 256.
    pub fn as_ptr(&self) -> u64 {
        self.ptr
    }

    /// The same memory as bytes.
    pub(crate) fn into_bytes(self) -> Buffer<u8> {
        let buffer = std::mem::ManuallyDrop::new(self);
        Buffer { device: buffer.device, ptr: buffer.ptr, len: buffer.bytes(), element: PhantomData }
    }

    fn bytes(&self) -> usize {
        // Cannot overflow: `alloc` computed the same product.
        self.len * size_of::<T>()
    }
}

impl<T: Element> Buffer<T> {
    pub(crate) fn alloc(op: &'static str, device: &Device, len: usize) -> Result<Self> {
        let out_of_memory = |bytes| Error::OutOfMemory { op, device: device.to_string(), bytes };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(u64::MAX))?;
        let ptr = match device.backend {
            Backend::Emulator(emulator) => emu::alloc(bytes, emulator.checked).ok_or_else(|| out_of_memory(bytes as u64))?,
            Backend::Cuda(context) => context.alloc(op, bytes)?,
        };
        Ok(Self { device: *device, ptr, len, element: PhantomData })
    }

    /// A copy of the contents. Waits for everything that runs on the device.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut data = Vec::<T>::with_capacity(self.len);
        let to = data.as_mut_ptr().cast();
        // SAFETY: both sides have `bytes` bytes, and kernels that write here are done once the driver call returns.
        unsafe {
            match self.device.backend {
                Backend::Emulator(_) => emu::download(to, self.ptr, self.bytes()),
                Backend::Cuda(context) => context.download("to_vec", to, self.ptr, self.bytes())?,
            }
        }
        // SAFETY: all of it was just written, and any bytes are a valid `T`.
        unsafe { data.set_len(self.len) };
        Ok(data)
    }

    /// Overwrite all elements. Waits for everything that runs on the device.
    ///
    /// # Errors
    /// [`Error::Shape`] when `data` has another length, [`Error::Driver`].
    pub fn copy_from(&mut self, data: &[T]) -> Result<()> {
        if data.len() != self.len {
            let (expected, got) = (format!("[{}]", self.len), format!("[{}]", data.len()));
            return Err(Error::Shape { op: "copy_from", arg: "data", expected, got });
        }
        let from = data.as_ptr().cast();
        // SAFETY: both sides have `bytes` bytes; the buffer is borrowed exclusively.
        unsafe {
            match self.device.backend {
                Backend::Emulator(emulator) => emu::upload(self.ptr, from, self.bytes(), emulator.checked),
                Backend::Cuda(context) => context.upload("copy_from", self.ptr, from, self.bytes())?,
            }
        }
        Ok(())
    }

    /// Set every byte to `byte`. Waits for everything that runs on the device; [`Stream::fill`](crate::Stream::fill) does not.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn fill_bytes(&mut self, byte: u8) -> Result<()> {
        // SAFETY: the buffer has that many bytes and is borrowed exclusively.
        unsafe {
            match self.device.backend {
                Backend::Emulator(emulator) => emu::fill(self.ptr, byte, self.bytes(), emulator.checked),
                Backend::Cuda(context) => context.fill("fill_bytes", self.ptr, byte, self.bytes())?,
            }
        }
        Ok(())
    }

    /// The start of the buffer as a contiguous tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than four dimensions or more elements than the buffer has.
    pub fn tensor(&self, shape: &[u64]) -> Result<TensorRef<'_>> {
        Ok(TensorRef::new(self.dense("tensor", shape)?))
    }

    /// The start of the buffer as a contiguous tensor that may be written.
    ///
    /// # Errors
    /// Those of [`tensor`](Self::tensor).
    pub fn tensor_mut(&mut self, shape: &[u64]) -> Result<TensorMut<'_>> {
        TensorMut::new("tensor_mut", self.dense("tensor_mut", shape)?)
    }

    /// A tensor whose first element is element `offset` of the buffer. Strides count elements.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than four dimensions, a wrong number of strides, or an element outside of the buffer.
    pub fn strided(&self, shape: &[u64], strides: &[u64], offset: u64) -> Result<TensorRef<'_>> {
        Ok(TensorRef::new(self.view("strided", shape, strides, offset)?))
    }

    /// A tensor that may be written, whose first element is element `offset` of the buffer. Strides count elements.
    ///
    /// # Errors
    /// Those of [`strided`](Self::strided), and [`Error::Layout`] for a stride of 0.
    pub fn strided_mut(&mut self, shape: &[u64], strides: &[u64], offset: u64) -> Result<TensorMut<'_>> {
        TensorMut::new("strided_mut", self.view("strided_mut", shape, strides, offset)?)
    }

    fn dense(&self, op: &'static str, shape: &[u64]) -> Result<View> {
        let strides = contiguous_strides(shape);
        self.view(op, shape, &strides[..shape.len().min(MAX_RANK)], 0)
    }

    fn view(&self, op: &'static str, shape: &[u64], strides: &[u64], offset: u64) -> Result<View> {
        let beyond = || beyond(op, self.len, shape, strides, offset);
        // The offset is checked first, so that the address of the first element cannot overflow.
        if offset > self.len as u64 {
            return Err(beyond());
        }
        let skipped = offset * T::DTYPE.size();
        let view = View::new(op, self.device, self.ptr + skipped, T::DTYPE, shape, strides)?;
        if view.span_bytes() > self.bytes() as u64 - skipped {
            return Err(beyond());
        }
        Ok(view)
    }
}

#[cold]
fn beyond(op: &'static str, len: usize, shape: &[u64], strides: &[u64], offset: u64) -> Error {
    let expected = format!("elements within the {len} of the buffer");
    Error::Shape { op, arg: "shape", expected, got: format!("{shape:?} with strides {strides:?} from element {offset}") }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        match self.device.backend {
            // SAFETY: allocated with this size on this device, and nobody can borrow the buffer any more.
            Backend::Emulator(emulator) => unsafe { emu::free(self.ptr, self.bytes(), emulator.checked) },
            Backend::Cuda(context) => context.free(self.ptr),
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let element = std::any::type_name::<T>();
        write!(f, "Buffer<{element}> of {} at {:#x} on {}", self.len, self.ptr, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    const DEVICES: [Device; 2] = [Device::emulator(), Device::emulator().checked()];

    #[test]
    fn contents_survive_the_round_trip() {
        for device in DEVICES {
            let mut b = device.upload(&[half::bf16::from_f32(1.5); 1001]).unwrap();
            assert_eq!((b.len(), b.as_ptr() % 256, b.device()), (1001, 0, &device));
            assert_eq!(b.to_vec().unwrap(), vec![half::bf16::from_f32(1.5); 1001]);
            b.fill_bytes(0xA5).unwrap();
            assert!(b.to_vec().unwrap().iter().all(|v| v.to_bits() == 0xA5A5));
            let new: Vec<_> = (0..1001).map(half::bf16::from_bits).collect();
            b.copy_from(&new).unwrap();
            assert_eq!(b.to_vec().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>(), (0..1001).collect::<Vec<u16>>());
            assert_eq!(device.zeros::<i64>(17).unwrap().to_vec().unwrap(), [0; 17]);
        }
    }

    #[test]
    fn empty_buffers_work() {
        for device in DEVICES {
            let mut b = device.upload::<f32>(&[]).unwrap();
            b.fill_bytes(1).unwrap();
            assert!(b.is_empty() && b.to_vec().unwrap().is_empty());
            assert_eq!(b.tensor(&[0, 5]).unwrap().numel(), 0);
            assert!(matches!(b.tensor(&[1]), Err(Error::Shape { .. })));
        }
    }

    #[test]
    fn copy_from_checks_the_length() {
        let mut b = Device::emulator().zeros::<u8>(4).unwrap();
        let error = b.copy_from(&[1, 2, 3]).unwrap_err();
        assert_eq!(error.to_string(), "copy_from: data has shape [3], expected [4]");
    }

    #[test]
    fn tensors_stay_within_the_buffer() {
        let mut b = Device::emulator().zeros::<f32>(24).unwrap();
        let base = b.as_ptr();
        assert_eq!(b.tensor(&[2, 3, 4]).unwrap().strides(), [12, 4, 1]);
        assert_eq!(b.tensor_mut(&[23]).unwrap().dtype(), DType::F32);
        assert!(matches!(b.tensor(&[5, 5]), Err(Error::Shape { op: "tensor", .. })));
        assert!(matches!(b.tensor_mut(&[u64::MAX, 2]), Err(Error::Shape { op: "tensor_mut", .. })));

        // 3 rows of 4 with stride 8 from element 4 end at element 4 + 2*8 + 4 = 24.
        let t = b.strided(&[3, 4], &[8, 1], 4).unwrap();
        assert_eq!((t.ptr(), t.span_bytes()), (base + 16, 80));
        let error = b.strided(&[3, 4], &[8, 1], 5).unwrap_err().to_string();
        assert_eq!(
            error,
            "strided: shape has shape [3, 4] with strides [8, 1] from element 5, expected elements within the 24 of the buffer"
        );
        assert!(b.strided(&[0], &[1], 24).is_ok());
        assert!(matches!(b.strided(&[0], &[1], 25), Err(Error::Shape { .. })));
        assert!(matches!(b.strided(&[1], &[1], u64::MAX), Err(Error::Shape { .. })));
        assert!(matches!(b.strided_mut(&[2, 4], &[0, 1], 0), Err(Error::Layout { .. })));
    }

    #[test]
    fn a_size_beyond_memory_is_an_error() {
        for device in DEVICES {
            assert!(matches!(device.alloc::<i64>(usize::MAX / 4), Err(Error::OutOfMemory { op: "alloc", .. })));
            assert!(matches!(device.alloc::<u8>(isize::MAX as usize), Err(Error::OutOfMemory { op: "alloc", .. })));
        }
    }
}
