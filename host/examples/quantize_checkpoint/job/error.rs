//! What can go wrong, each with a text that names the file.

use super::Block;
use ferrotile::quant::QuantFormat;
use std::io;
use std::path::{Path, PathBuf};

/// Result of everything in this program.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the checkpoint was not quantised. No output is left behind in any of these cases.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No op quantises like this.
    #[error("{format} has no scale factor for `{block}`; it has one for: {allowed}")]
    Block { format: QuantFormat, block: Block, allowed: String },
    /// The input is something else, or damaged in its header.
    #[error("{}: not a safetensors file: {why}", path.display())]
    NotSafetensors { path: PathBuf, why: String },
    /// The input ends early.
    #[error("{}: truncated: its header asks for {expected} bytes, the file has {got}", path.display())]
    Truncated { path: PathBuf, expected: u64, got: u64 },
    /// A weight that no scale factor can represent.
    #[error("{}: tensor `{tensor}` holds {value} at [{row}, {column}], and only finite f32 values can be quantised", path.display())]
    NotFinite { path: PathBuf, tensor: String, row: u64, column: u64, value: f32 },
    /// The scale factors need a name that the input uses for something else.
    #[error("{}: holds `{name}` already, the name for the scale factors of `{tensor}`", path.display())]
    NameTaken { path: PathBuf, name: String, tensor: String },
    /// Replacing the input would lose it.
    #[error("{}: is input and output at the same time", path.display())]
    SameFile { path: PathBuf },
    /// The disk is full.
    #[error("{}: no space left on the disk: the output needs {bytes} bytes in all; what was written of it is removed", path.display())]
    NoSpace { path: PathBuf, bytes: u64 },
    /// The operating system refused something else.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    /// The output, read back, is not what was written.
    #[error("{}: reading back gives something else than was written: {what}", path.display())]
    ReadBack { path: PathBuf, what: String },
    /// Ctrl-C.
    #[error("interrupted; what was written is removed")]
    Interrupted,
    /// The device, or a launch that the library refused.
    #[error(transparent)]
    Device(#[from] ferrotile::Error),
}

impl Error {
    /// The exit code of the program: 130 is what shells expect after Ctrl-C, 2 is that of a wrong command line.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Interrupted => 130,
            Error::Block { .. } => 2,
            _ => 1,
        }
    }
}

/// Adds path and intention to an error of the operating system.
pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), action, source }
}
