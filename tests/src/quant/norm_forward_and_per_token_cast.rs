//! norm_forward_and_per_token_cast: reference, cases, checks and benchmark.

use crate::support::bench::Row;
use crate::support::cases::Depth;
use crate::support::compare::equal;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::quant::norm_forward_and_per_token_cast::{Args, norm_forward_and_per_token_cast};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "norm_forward_and_per_token_cast", run };

/// What the op computes, written without a look at the kernel.
fn reference(x: &[u32]) -> Vec<u32> {
    x.to_vec()
}

/// Lengths: none, one, around a block, many blocks.
fn cases(depth: Depth) -> Vec<u64> {
    match depth {
        Depth::Small => vec![0, 1, 255, 256, 257],
        Depth::Full => vec![0, 1, 255, 256, 257, 4001 * 7168],
    }
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    for n in cases(ctx.depth) {
        let name = format!("n={n}");
        if ctx.case(&name) {
            let x: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
            let stream = ctx.device.stream().map_err(text)?;
            let on_device = ctx.device.upload(&x).map_err(text)?;
            let mut y = ctx.device.alloc::<u32>(n as usize).map_err(text)?;
            let args = Args { x: on_device.tensor(&[n]).map_err(text)?, y: y.tensor_mut(&[n]).map_err(text)? };
            norm_forward_and_per_token_cast(&stream, args).map_err(text)?;
            equal("y", &name, &[n], &y.to_vec().map_err(text)?, &reference(&x))?;
        }
    }
    Ok(ctx.report())
}

/// The benchmark rows of this op, with the peers' names for the cases.
pub fn bench() -> Vec<Row> {
    let n: u64 = 8064 * 7168;
    vec![Row {
        op: "norm_forward_and_per_token_cast",
        case: format!("n={n}"),
        bytes: 8 * n,
        build: Box::new(move |device, _| {
            let x = device.zeros::<u32>(n as usize).map_err(text)?;
            let mut y = device.zeros::<u32>(n as usize).map_err(text)?;
            Ok(Box::new(move |stream| norm_forward_and_per_token_cast(stream, Args { x: x.tensor(&[n])?, y: y.tensor_mut(&[n])? })))
        }),
    }]
}

#[cfg(test)]
mod tests {
    #[test]
    fn suite() {
        super::SUITE.test();
    }
}
