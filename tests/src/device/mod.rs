//! Tests of the device layer itself.

pub mod layer;
pub mod num;
#[cfg(test)]
mod planted;
