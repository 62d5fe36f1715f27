//! Quantises a checkpoint: every matrix of a safetensors file becomes FP8, FP4 or e5m6 with scale factors, on a GPU if there is one.
//!
//! ```text
//! cargo run --release --example quantize_checkpoint -- --input model.safetensors
//! cargo run --release --example quantize_checkpoint -- --synthetic --format e2m1 --block 1x32
//! cargo run --release --example quantize_checkpoint -- --synthetic --format e5m6
//! ```
//!
//! The calls of this library that do the work are in `job/codec.rs`; the rest reads and writes files.

mod job;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    // Without a handler Ctrl-C would end the program too, but leave the unfinished output under its temporary name.
    if let Err(error) = ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)) {
        eprintln!("note: Ctrl-C will not clean up: {error}");
    }
    job::cli::main(std::env::args_os(), &STOP, &job::storage::on_disk).into()
}
