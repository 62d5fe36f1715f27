//! What can go wrong, one variant per kind of mistake.

use crate::DType;
use ferrotile_kernels::device::emu::Fault;

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A refused call or a failed device. The text starts with the op and names the argument, what was expected and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or slice has the wrong number of dimensions or the wrong sizes.
    #[error("{op}: {arg} has shape {got}, expected {expected}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The argument.
        arg: &'static str,
        /// What the op takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A tensor has an element type that the op does not take.
    #[error("{op}: {arg} is {got}, allowed: {allowed}")]
    DType {
        /// The op.
        op: &'static str,
        /// The argument.
        arg: &'static str,
        /// The types the op takes.
        allowed: String,
        /// What it was given.
        got: DType,
    },
    /// Strides or alignment do not fit the kernel.
    #[error("{op}: layout of {arg} is {got}, expected {expected}")]
    Layout {
        /// The op.
        op: &'static str,
        /// The argument.
        arg: &'static str,
        /// What the op takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A number is out of range or not one of the listed values.
    #[error("{op}: {arg} is {got}, allowed: {allowed}")]
    Value {
        /// The op.
        op: &'static str,
        /// The argument.
        arg: &'static str,
        /// The values the op takes.
        allowed: String,
        /// What it was given.
        got: String,
    },
    /// An argument lives on another device than the stream.
    #[error("{op}: {arg} is on {got}, the stream is on {expected}")]
    DeviceMismatch {
        /// The op.
        op: &'static str,
        /// The argument.
        arg: &'static str,
        /// Device of the stream.
        expected: String,
        /// Device of the argument.
        got: String,
    },
    /// Two arguments share memory and one of them is written.
    #[error("{op}: {a} and {b} overlap in memory")]
    Overlap {
        /// The op.
        op: &'static str,
        /// One argument.
        a: &'static str,
        /// The other argument.
        b: &'static str,
    },
    /// The device or this build cannot do it.
    #[error("{op}: {what}")]
    Unsupported {
        /// The op.
        op: &'static str,
        /// What is missing, and what would help.
        what: String,
    },
    /// The CUDA driver refused.
    #[error("{op}: {name}{}{}{hint}", number(*code), if hint.is_empty() { "" } else { ": " })]
    Driver {
        /// The op.
        op: &'static str,
        /// The driver's error code; 0 when the driver was never reached.
        code: i32,
        /// The driver's name for it.
        name: String,
        /// What it usually means and what to do; may hold the log of the PTX compiler.
        hint: String,
    },
    /// The checked emulator found a mistake in a kernel or in its arguments.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The device has not that much memory left.
    #[error("{op}: no {bytes} bytes of memory left on {device}")]
    OutOfMemory {
        /// The op.
        op: &'static str,
        /// The device.
        device: String,
        /// What was asked for.
        bytes: u64,
    },
}

/// The driver's code in brackets, if it was the driver that failed.
fn number(code: i32) -> String {
    if code == 0 { String::new() } else { format!(" ({code})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_op_argument_expected_and_got() {
        let shape = Error::Shape { op: "topk_gate", arg: "idx", expected: "[5, 8]".into(), got: "[5, 9]".into() };
        assert_eq!(shape.to_string(), "topk_gate: idx has shape [5, 9], expected [5, 8]");
        let dtype = Error::DType { op: "cast_back", arg: "x", allowed: "e4m3, e2m1x2".into(), got: DType::F32 };
        assert_eq!(dtype.to_string(), "cast_back: x is f32, allowed: e4m3, e2m1x2");
        let driver = Error::Driver { op: "device", code: 100, name: "CUDA_ERROR_NO_DEVICE".into(), hint: String::new() };
        assert_eq!(driver.to_string(), "device: CUDA_ERROR_NO_DEVICE (100)");
        let absent = Error::Driver { op: "device", code: 0, name: "no CUDA driver".into(), hint: "install it".into() };
        assert_eq!(absent.to_string(), "device: no CUDA driver: install it");
    }

    #[test]
    fn errors_cross_threads() {
        fn sendable<T: Send + Sync + 'static>() {}
        sendable::<Error>();
    }
}
