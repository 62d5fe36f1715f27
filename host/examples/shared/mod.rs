//! What the examples share. They are programs of their own, so each includes this file.

use ferrotile::Device;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;

/// What runs the kernels, as it is called on the command line.
#[derive(Clone, Copy)]
pub enum DeviceName {
    /// The first GPU, or the emulator where there is none.
    Auto,
    /// The CPU.
    Emulator,
    /// A GPU.
    Cuda(usize),
}

/// `auto`, `emulator`, `cuda` or `cuda:N`.
pub fn parse_device(text: &str) -> Result<DeviceName, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceName::Auto),
        None if text == "emulator" => Ok(DeviceName::Emulator),
        None if text == "cuda" => Ok(DeviceName::Cuda(0)),
        Some(("cuda", ordinal)) => ordinal.parse().map(DeviceName::Cuda).map_err(|_| format!("`{ordinal}` is no GPU's number")),
        _ => Err("allowed: auto, emulator, cuda:N".to_owned()),
    }
}

/// The device, and a text that says which one and why.
pub fn device(name: DeviceName) -> ferrotile::Result<(Device, String)> {
    let gpu = |ordinal| {
        let device = Device::cuda(ordinal)?;
        let text = format!("{device} ({}, driver {})", device.name(), device.driver_version());
        Ok((device, text))
    };
    match name {
        DeviceName::Emulator => Ok((Device::emulator(), "the CPU emulator".to_owned())),
        DeviceName::Cuda(ordinal) => gpu(ordinal),
        DeviceName::Auto => {
            Ok(gpu(0).unwrap_or_else(|error: ferrotile::Error| (Device::emulator(), format!("the CPU emulator ({error})"))))
        }
    }
}

/// A bar that knows no end yet.
pub fn progress_bar() -> ProgressBar {
    let progress = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {eta:>4} left  {wide_msg}") {
        progress.set_style(style);
    }
    progress
}

/// Prints. A closed pipe (`... | head`) is no reason to fail.
pub fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// The splitmix64 generator.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
