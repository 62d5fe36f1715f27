//! What the checks of the small routing ops share: tensors in the middle of a buffer, and the cases of the MoE grid.

use crate::support::cases::{Depth, MoeCase, moe_cases};
use crate::support::compare::{Bits, untouched};
use crate::support::suite::text;
use ferrotile::{Buffer, Device, Element};

/// Elements after the end of each output that must stay as they are.
pub const GUARD: u64 = 37;

/// What unwritten bytes hold.
pub const FILL: u8 = 0xA5;

/// A buffer for an output of `len` elements from element `offset` on, filled with 0xA5.
pub fn prefilled<T: Element>(device: &Device, len: u64, offset: u64) -> Result<Buffer<T>, String> {
    let mut buffer = device.alloc::<T>((offset + len + GUARD) as usize).map_err(text)?;
    buffer.fill_bytes(FILL).map_err(text)?;
    Ok(buffer)
}

/// A buffer with these elements from element `offset` on, and 0xA5 around them.
pub fn uploaded<T: Element>(device: &Device, data: &[T], offset: u64) -> Result<Buffer<T>, String> {
    let fill: T = bytemuck::pod_read_unaligned(&[FILL; 16][..size_of::<T>()]);
    let mut around = vec![fill; offset as usize + data.len() + GUARD as usize];
    around[offset as usize..][..data.len()].copy_from_slice(data);
    device.upload(&around).map_err(text)
}

/// The `len` elements from element `offset` on, if nothing else was written.
pub fn inside<T: Element + Bits>(what: &str, name: &str, buffer: &Buffer<T>, len: u64, offset: u64) -> Result<Vec<T>, String> {
    let all = buffer.to_vec().map_err(text)?;
    let (before, from) = all.split_at(offset as usize);
    untouched(what, name, &[0], &[1], before, FILL)?;
    untouched(what, name, &[len], &[1], from, FILL)?;
    Ok(from[..len as usize].to_vec())
}

/// A row of the MoE grid.
pub fn moe(num_send_tokens: u64, num_topk: u64, num_experts: u64, num_ranks: u64) -> MoeCase {
    MoeCase { num_send_tokens, num_topk, num_experts, num_ranks }
}

/// The MoE grid; at full depth the small cases too, which both backends compute then.
pub fn grid(depth: Depth) -> Vec<MoeCase> {
    let mut cases = moe_cases(Depth::Small);
    if depth == Depth::Full {
        cases.extend(moe_cases(Depth::Full));
    }
    cases
}

/// The name of a benchmark case: `e=32,ep=8,k=8,send=4001`.
pub fn bench_name(case: &MoeCase) -> String {
    let MoeCase { num_send_tokens, num_topk, num_experts, num_ranks } = case;
    format!("e={num_experts},ep={num_ranks},k={num_topk},send={num_send_tokens}")
}

/// The pairs of experts and ranks in the benchmarks of 1.0.0.
pub const PAIRS: [(u64, u64); 3] = [(9, 8), (32, 8), (4, 64)];

/// The three cases of the peers' own benchmark, and small ones.
pub fn bench_cases() -> Vec<MoeCase> {
    let mut cases: Vec<MoeCase> = PAIRS.iter().map(|(e, ep)| moe(4001, 8, *e, *ep)).collect();
    cases.extend([1, 16, 128].map(|send| moe(send, 8, 32, 8)));
    cases
}

/// The call was stopped by the checked emulator because of an index beyond its bound.
#[cfg(test)]
pub fn stopped(what: &str, result: ferrotile::Result<()>) -> Result<(), String> {
    let told =
        matches!(&result, Err(ferrotile::Error::Fault(fault)) if fault.to_string().contains(" in memory, allowed: below "));
    crate::support::suite::ensure(told, || format!("{what}: expected a fault because of an index, got {result:?}"))
}
