//! What the tests and benchmarks of all ops share: inputs, case lists, comparisons, golden data, the suite runner.

pub mod bench;
pub mod bytes;
pub mod cases;
pub mod compare;
pub mod device_math;
pub mod golden;
pub mod inputs;
pub mod rng;
pub mod suite;
pub mod value;
