//! A tensor borrows the buffer it lies in.

use ferrotile::{Device, TensorRef};

fn view(device: &Device) -> ferrotile::Result<TensorRef<'static>> {
    let buffer = device.zeros::<f32>(8)?;
    buffer.tensor(&[8])
}

fn main() -> ferrotile::Result<()> {
    view(&Device::emulator()).map(|_| ())
}
