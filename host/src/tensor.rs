//! Borrowed tensors: a device pointer with element type, shape and strides.
//!
//! [`TensorRef`] and [`TensorMut`] are what launchers take. They come from a [`Buffer`](crate::Buffer) or, through `from_raw`,
//! from memory of another library. Both dereference to [`View`], which has the accessors.

use crate::{DType, Device, Error, Result};
use ferrotile_kernels::device::{In, Out};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

/// Most dimensions a tensor may have.
pub const MAX_RANK: usize = 4;

/// Where a tensor is and how it is laid out; no right to touch the memory.
#[derive(Clone, Copy, PartialEq)]
pub struct View {
    device: Device,
    ptr: u64,
    dtype: DType,
    rank: usize,
    shape: [u64; MAX_RANK],
    strides: [u64; MAX_RANK],
    numel: u64,
    span: u64,
}

impl View {
    /// A view with sizes whose products are known to fit in 64 bits, so that no later arithmetic can overflow.
    pub(crate) fn new(op: &'static str, device: Device, ptr: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> Result<Self> {
        if shape.len() > MAX_RANK || strides.len() != shape.len() {
            return Err(wrong_rank(op, shape, strides));
        }
        let too_large = || too_large(op, shape, strides);
        let numel = shape.iter().filter(|&&n| n != 0).try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(too_large)?;
        let empty = shape.contains(&0);
        let last = shape.iter().zip(strides).try_fold(0u64, |last, (&n, &stride)| {
            let step = n.saturating_sub(1).checked_mul(stride)?;
            last.checked_add(step)
        });
        let elements = if empty { Some(0) } else { last.and_then(|last| last.checked_add(1)) };
        let span = elements.and_then(|n| n.checked_mul(dtype.size())).ok_or_else(too_large)?;
        ptr.checked_add(span).ok_or_else(too_large)?;

        let mut view = Self {
            device,
            ptr,
            dtype,
            rank: shape.len(),
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
            numel: if empty { 0 } else { numel },
            span,
        };
        view.shape[..shape.len()].copy_from_slice(shape);
        view.strides[..shape.len()].copy_from_slice(strides);
        Ok(view)
    }

    /// Device that holds the memory.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Address of the first element: a device address or, on the emulator, a host address.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.shape[..self.rank]
    }

    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[u64] {
        &self.strides[..self.rank]
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Size of dimension `i`, 1 beyond the last one.
    pub fn dim(&self, i: usize) -> u64 {
        self.shape.get(i).copied().unwrap_or(1)
    }

    /// Stride of dimension `i` in elements, 1 beyond the last one.
    pub fn stride(&self, i: usize) -> u64 {
        self.strides.get(i).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn numel(&self) -> u64 {
        self.numel
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.numel == 0
    }

    /// Whether the elements lie one after the other, last dimension fastest. Strides of dimensions of size 1 do not count.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (&n, &stride) in self.shape().iter().zip(self.strides()).rev() {
            if n != 1 && stride != expected {
                return self.is_empty();
            }
            expected *= n;
        }
        true
    }

    /// Bytes from the start of the first to the end of the last element.
    pub fn span_bytes(&self) -> u64 {
        self.span
    }

    /// The pointer for a kernel that only reads.
    pub fn input<T>(&self) -> In<T> {
        In::new(self.ptr, self.span)
    }

    fn reinterpret(mut self, dtype: DType) -> Result<Self> {
        if dtype.size() != self.dtype.size() {
            let allowed = format!("types of {} bytes such as {}", self.dtype.size(), self.dtype);
            return Err(Error::DType { op: "reinterpret", arg: "dtype", allowed, got: dtype });
        }
        self.dtype = dtype;
        Ok(self)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} strides {:?} at {:#x} on {}", self.dtype, self.shape(), self.strides(), self.ptr, self.device)
    }
}

#[cold]
fn wrong_rank(op: &'static str, shape: &[u64], strides: &[u64]) -> Error {
    if shape.len() > MAX_RANK {
        let expected = format!("at most {MAX_RANK} dimensions");
        return Error::Shape { op, arg: "shape", expected, got: format!("{shape:?}") };
    }
    let expected = format!("one for each dimension of {shape:?}");
    Error::Shape { op, arg: "strides", expected, got: format!("{strides:?}") }
}

#[cold]
fn too_large(op: &'static str, shape: &[u64], strides: &[u64]) -> Error {
    let expected = "fewer than 2^64 bytes".to_owned();
    Error::Shape { op, arg: "shape", expected, got: format!("{shape:?} with strides {strides:?}") }
}

#[cold]
fn broadcast(op: &'static str, view: &View) -> Error {
    let got = format!("shape {:?} with strides {:?}", view.shape(), view.strides());
    Error::Layout { op, arg: "strides", expected: "no stride 0 in a tensor that is written".to_owned(), got }
}

/// Strides of a tensor whose elements lie one after the other; only the first are for a tensor of fewer than [`MAX_RANK`] dimensions. An
/// empty dimension counts as 1, as other libraries do it.
// Without memory from the heap: tensors are made for every launch.
pub(crate) fn contiguous_strides(shape: &[u64]) -> [u64; MAX_RANK] {
    let mut strides = [1u64; MAX_RANK];
    for i in (1..shape.len().min(MAX_RANK)).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
    }
    strides
}

/// A tensor that is read.
///
/// ```
/// let x = ferrotile::Device::emulator().upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// let t = x.tensor(&[2, 3])?;
/// assert_eq!((t.shape(), t.strides(), t.span_bytes()), (&[2, 3][..], &[3, 1][..], 24));
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorRef<'a> {
    view: View,
    memory: PhantomData<&'a [u8]>,
}

/// A tensor that is written, or read and written.
#[derive(Debug, PartialEq)]
pub struct TensorMut<'a> {
    view: View,
    memory: PhantomData<&'a mut [u8]>,
}

impl Deref for TensorRef<'_> {
    type Target = View;

    fn deref(&self) -> &View {
        &self.view
    }
}

impl Deref for TensorMut<'_> {
    type Target = View;

    fn deref(&self) -> &View {
        &self.view
    }
}

impl<'a> TensorRef<'a> {
    pub(crate) fn new(view: View) -> Self {
        Self { view, memory: PhantomData }
    }

    /// A tensor in memory that this crate does not own. Strides count elements.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than four dimensions, a number of strides other than that of dimensions, or sizes beyond 64 bits.
    ///
    /// # Safety
    /// For `'a`, and until work launched meanwhile is done, every element must be initialised memory of `device` that nobody
    /// frees or writes without synchronising with the streams that use this tensor.
    pub unsafe fn from_raw(device: &Device, ptr: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> Result<Self> {
        Ok(Self::new(View::new("TensorRef::from_raw", *device, ptr, dtype, shape, strides)?))
    }

    /// The same bytes as another type of the same size, for instance e4m3 in a u8 tensor of another library.
    ///
    /// # Errors
    /// [`Error::DType`] when the sizes differ.
    pub fn reinterpret(self, dtype: DType) -> Result<Self> {
        Ok(Self::new(self.view.reinterpret(dtype)?))
    }
}

impl<'a> TensorMut<'a> {
    pub(crate) fn new(op: &'static str, view: View) -> Result<Self> {
        // Only the plain case is caught: a broadcast dimension, where two indices are one element.
        if !view.is_empty() && view.shape().iter().zip(view.strides()).any(|(&n, &stride)| n > 1 && stride == 0) {
            return Err(broadcast(op, &view));
        }
        Ok(Self { view, memory: PhantomData })
    }

    /// A view for which [`new`](Self::new) was fine before.
    pub(crate) fn of_own(view: View) -> Self {
        Self { view, memory: PhantomData }
    }

    /// A tensor in memory that this crate does not own. Strides count elements.
    ///
    /// # Errors
    /// Those of [`TensorRef::from_raw`], and [`Error::Layout`] for a stride of 0.
    ///
    /// # Safety
    /// For `'a`, and until work launched meanwhile is done, every element must be memory of `device` that nobody frees, reads
    /// or writes without synchronising with the streams that use this tensor.
    pub unsafe fn from_raw(device: &Device, ptr: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> Result<Self> {
        let op = "TensorMut::from_raw";
        Self::new(op, View::new(op, *device, ptr, dtype, shape, strides)?)
    }

    /// The same tensor for reading.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef::new(self.view)
    }

    /// The same tensor for a shorter time, to pass it on and keep it.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { view: self.view, memory: PhantomData }
    }

    /// The same bytes as another type of the same size.
    ///
    /// # Errors
    /// [`Error::DType`] when the sizes differ.
    pub fn reinterpret(self, dtype: DType) -> Result<Self> {
        Ok(Self { view: self.view.reinterpret(dtype)?, memory: PhantomData })
    }

    /// The pointer for a kernel that writes.
    pub fn output<T>(&self) -> Out<T> {
        Out::new(self.view.ptr, self.view.span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(shape: &[u64], strides: &[u64]) -> Result<View> {
        View::new("test", Device::emulator(), 4096, DType::Bf16, shape, strides)
    }

    #[test]
    fn spans_and_contiguity() {
        let v = view(&[3, 5], &[8, 1]).unwrap();
        assert_eq!((v.numel(), v.span_bytes(), v.is_contiguous()), (15, 2 * (2 * 8 + 5), false));
        let v = view(&[3, 5], &[1, 3]).unwrap();
        assert_eq!((v.span_bytes(), v.is_contiguous()), (30, false));
        let v = view(&[2, 3, 4, 5], &[60, 20, 5, 1]).unwrap();
        assert_eq!((v.numel(), v.span_bytes(), v.is_contiguous()), (120, 240, true));
        // A dimension of size 1 may have any stride.
        assert!(view(&[1, 5], &[77, 1]).unwrap().is_contiguous());
        assert!(view(&[5, 1], &[1, 77]).unwrap().is_contiguous());
        let scalar = view(&[], &[]).unwrap();
        assert_eq!((scalar.numel(), scalar.span_bytes(), scalar.rank(), scalar.dim(0)), (1, 2, 0, 1));
    }

    #[test]
    fn empty_tensors_touch_nothing() {
        for shape in [[0, 7], [7, 0], [0, u64::MAX]] {
            let v = view(&shape, &contiguous_strides(&shape)[..2]).unwrap();
            assert_eq!((v.numel(), v.span_bytes(), v.is_contiguous()), (0, 0, true), "{shape:?}");
        }
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        for (shape, strides) in [([1 << 33, 1 << 33], [1 << 33, 1]), ([2, 2], [u64::MAX, 1]), ([1 << 32, 1 << 31], [1 << 31, 1])]
        {
            assert!(matches!(view(&shape, &strides), Err(Error::Shape { arg: "shape", .. })), "{shape:?}");
        }
    }

    #[test]
    fn rank_and_stride_count_are_checked() {
        assert!(matches!(view(&[1; 5], &[1; 5]), Err(Error::Shape { arg: "shape", .. })));
        assert!(matches!(view(&[2, 3], &[1]), Err(Error::Shape { arg: "strides", .. })));
    }

    #[test]
    fn a_written_tensor_has_no_broadcast_dimension() {
        let broadcast = view(&[4, 8], &[0, 1]).unwrap();
        assert!(matches!(TensorMut::new("test", broadcast), Err(Error::Layout { .. })));
        assert!(TensorMut::new("test", view(&[1, 8], &[0, 1]).unwrap()).is_ok());
    }

    #[test]
    fn reinterpret_keeps_the_size() {
        let t = TensorRef::new(view(&[4], &[1]).unwrap());
        assert_eq!(t.reinterpret(DType::F16).unwrap().dtype(), DType::F16);
        assert!(matches!(t.reinterpret(DType::U8), Err(Error::DType { .. })));
    }
}
