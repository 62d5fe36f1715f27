//! A tensor cannot be read and written by the same launch: the borrow checker says so before any overlap check does.

use ferrotile::quant::{Sf, SfLayout, cast_back};
use ferrotile::{Device, E4m3};

fn main() -> ferrotile::Result<()> {
    let device = Device::emulator();
    let sf = device.zeros::<f32>(2)?;
    let mut x = device.zeros::<E4m3>(2 * 128)?;
    let args = cast_back::Args {
        x: x.tensor(&[2, 128])?,
        sf: Sf { tensor: sf.tensor(&[2, 1])?, layout: SfLayout::RowMajor },
        block: (1, 128),
        out: x.tensor_mut(&[2, 128])?,
    };
    cast_back(&device.stream()?, args)
}
