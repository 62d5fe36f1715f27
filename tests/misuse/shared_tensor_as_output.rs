//! An output has to be borrowed exclusively.

use ferrotile::Device;
use ferrotile::moe::topk_gate;

fn main() -> ferrotile::Result<()> {
    let device = Device::emulator();
    let scores = device.zeros::<f32>(4 * 64)?;
    let topk_idx = device.zeros::<i64>(4 * 2)?;
    let args = topk_gate::Args { scores: scores.tensor(&[4, 64])?, topk_idx: topk_idx.tensor(&[4, 2])? };
    topk_gate(&device.stream()?, args)
}
