//! Routes a batch of tokens through eight small experts, forward and backward, on a GPU if there is one, and compares the result
//! with a dense layer.
//!
//! ```text
//! cargo run --release --example moe_layer
//! cargo run --release --example moe_layer -- --tokens 4096 --topk 4 --quantise
//! cargo run --release --example moe_layer -- --rows 600
//! ```
//!
//! Gate, mapping, casts, expanding and summing are this library's and run on the device; the calls are in `layer/mod.rs`. The matrix products
//! of the experts are not: this library has none. They run on the CPU on both devices, in `layer/experts.rs`, where a training stack
//! would call its grouped GEMM.

mod layer;

use std::process::ExitCode;

fn main() -> ExitCode {
    layer::cli::main(std::env::args_os()).into()
}
