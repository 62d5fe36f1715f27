//! Tests of the device layer itself.

pub mod num;
