//! Functions that the two backends round differently, computed on the device under test: a reference that uses them has the bits
//! that kernels on that device have.

use super::suite::text;
use ferrotile::Device;
use ferrotile_kernels::device::{In, LaunchConfig, Out, num};
use ferrotile_kernels::selftest as k;

pub use ferrotile_kernels::selftest::Function;

const OP: &str = "selftest";

/// Makes the PTX of the device layer's own kernels known, which is not in the published crate.
pub fn register() {
    #[cfg(feature = "cuda")]
    ferrotile::register_ptx(OP, include_str!("../../ptx/selftest.ptx"));
}

/// `function` of each value.
pub fn map(device: &Device, function: Function, x: &[f32]) -> Result<Vec<f32>, String> {
    if x.is_empty() {
        return Ok(Vec::new());
    }
    register();
    let n = u32::try_from(x.len()).map_err(text)?;
    let from = device.upload(x).map_err(text)?;
    let to = device.alloc::<f32>(x.len()).map_err(text)?;
    let bytes = 4 * x.len() as u64;
    let args = k::apply::Args { x: In::new(from.as_ptr(), bytes), y: Out::new(to.as_ptr(), bytes), n, function: function as u32 };
    let config = LaunchConfig::new(n.div_ceil(k::THREADS).min(1 << 14), k::THREADS);
    let stream = device.stream().map_err(text)?;
    stream.launch(OP, &k::apply::ENTRY, &config, &args).map_err(text)?;
    stream.synchronize().map_err(text)?;
    to.to_vec().map_err(text)
}

/// `e^v` of each value, as kernels compute it.
pub fn exp_of(device: &Device, x: &[f32]) -> Result<Vec<f32>, String> {
    map(device, Function::Exp, x)
}

/// `function` of all 65536 bf16 values, by their bits.
pub fn bf16_table(device: &Device, function: Function) -> Result<Vec<f32>, String> {
    let all: Vec<f32> = (0..=u16::MAX).map(num::bf16_to_f32).collect();
    map(device, function, &all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_what_they_say() {
        let device = Device::emulator();
        let x = [0.5f32, 2.0, 3.0];
        let close = |function, expected: [f32; 3]| {
            let got = map(&device, function, &x).unwrap();
            assert!(got.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-6), "{function:?}: {got:?}");
        };
        close(Function::Exp, x.map(f32::exp));
        close(Function::Exp2, x.map(f32::exp2));
        close(Function::Rcp, x.map(f32::recip));
        close(Function::Rsqrt, x.map(|v| 1.0 / v.sqrt()));
        assert!(exp_of(&device, &[]).unwrap().is_empty());
        assert_eq!(bf16_table(&device, Function::Exp).unwrap()[0x3F80], exp_of(&device, &[1.0]).unwrap()[0]);
    }
}
