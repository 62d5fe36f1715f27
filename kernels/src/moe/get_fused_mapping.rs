//! get_fused_mapping: the expert-major order of all (token, choice) slots, a stable counting sort by expert.
//!
//! In    topk_idx i64 `[t, k]` as n = t·k slots       Out   pos_to_{expert, token, token_topk} i32 `[p]`, token_topk_to_pos i32 `[t, k]`,
//!       expert_start, expert_end, num_tokens_per_expert i32 `[e]`; -1 where there is nothing
//! Exact integers; slots of an expert stand in ascending order whatever the launch. Values outside `0..e` count as -1 (too large
//!       ones are reported by the checked emulator); a slot whose
//!       row would be `p` or more is dropped from all arrays of positions.
//! Map   a warp owns `groups` runs of 32 slots. Each block counts its slots by expert and publishes the counts; it adds up those of
//!       all blocks and of those before it, lays out the experts, and places its slots. A single block has nothing to publish.
//!       Places of more than two runs wait in `token_topk_to_pos` until their rows are known.
//! Code  every step stands once, in loops that stay loops: what the driver compiles before the first launch takes it three times as long as
//!       ptxas, 65 ms here.
//! Cost  8·n bytes read, 4·n + 12·p written, and 8·blocks²·e of counts from L2; bound by two trips to memory, one for the slots and
//!       one for the counts.

use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block, one for each expert. A thread may use 64 registers, so that one block fills an SM.
pub const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / WARP_SIZE;

/// Most experts.
pub const MAX_EXPERTS: u32 = THREADS;

/// Runs of slots that a warp loads at once and keeps in registers.
const HELD: usize = 2;

/// Up to this many slots one block is faster than several that have to exchange counts.
const MAX_ALONE: u32 = THREADS;

/// Every block reads the counts of all blocks, so more than 256 KiB of them cost more than what further blocks save.
const MAX_COUNTS: u32 = 32 << 10;

/// How the slots are divided: a block has 32 warps, a warp `groups` runs of 32 slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of blocks, at least 1.
    pub blocks: u32,
    /// Runs of 32 slots of a warp, at least 1.
    pub groups: u32,
}

/// The plan for `n` slots (at most 2^31) and `e` experts (1 to [`MAX_EXPERTS`]): a block on every SM if there is work for them.
pub const fn plan(n: u32, e: u32, num_sms: u32) -> Plan {
    let by_counts = max_blocks(e);
    let most = if num_sms < by_counts { num_sms } else { by_counts };
    plan_of(n, if n <= MAX_ALONE { 1 } else { most })
}

/// The plan for `n` slots with at most `most` blocks.
const fn plan_of(n: u32, most: u32) -> Plan {
    let groups = at_least_1(ceil_div(n, at_least_1(most) * THREADS));
    Plan { blocks: at_least_1(ceil_div(n, groups * THREADS)), groups }
}

/// Words of 8 bytes of workspace that are enough for [`plan`] on any device: the number of calls, and the counts.
pub const fn workspace_words(n: u32, e: u32) -> u32 {
    let (by_slots, by_counts) = (at_least_1(ceil_div(n, THREADS)), max_blocks(e));
    1 + (if by_slots < by_counts { by_slots } else { by_counts }) * e
}

const fn max_blocks(e: u32) -> u32 {
    match MAX_COUNTS.checked_div(e) {
        Some(blocks) => at_least_1(blocks),
        None => 1,
    }
}

const fn at_least_1(v: u32) -> u32 {
    if v == 0 { 1 } else { v }
}

/// Shared memory, indexed by expert unless said otherwise.
struct Block {
    layout: SharedLayout,
    /// By warp and expert: slots of the warp, then slots of the warps before it.
    counters: Shared<u32>,
    /// Slots of all blocks.
    total: Shared<u32>,
    /// Slots of the blocks before this one, then the row of this block's first slot.
    base: Shared<u32>,
    /// Row after the last one, padding included.
    end: Shared<u32>,
    /// By warp.
    scratch: Shared<u32>,
    /// One word: number of this call.
    call: Shared<u32>,
}

const fn block(e: u32) -> Block {
    let mut layout = SharedLayout::new();
    let counters = layout.array(WARPS * e);
    let (total, base, end) = (layout.array(e), layout.array(e), layout.array(e));
    let (scratch, call) = (layout.array(WARPS), layout.array(1));
    Block { layout, counters, total, base, end, scratch, call }
}

/// Grid and block. Several blocks wait for each other, so they have to run at the same time.
pub const fn config(plan: Plan, e: u32) -> LaunchConfig {
    let config = LaunchConfig::new(plan.blocks, THREADS).shared(&block(e).layout);
    if plan.blocks > 1 { config.cooperative() } else { config }
}

kernel! {
    op = get_fused_mapping;
    threads = 1024, blocks = 1;
    /// `workspace` was zeroed once, and is not used by another launch at the same time.
    pub fn mapping(
        topk_idx: In<i64>, workspace: Out<u64>,
        pos_to_expert: Out<i32>, pos_to_token: Out<i32>, pos_to_token_topk: Out<i32>,
        token_topk_to_pos: Out<i32>, expert_start: Out<i32>, expert_end: Out<i32>, num_tokens_per_expert: Out<i32>,
        n: u32, e: u32, k: u32, groups: u32, p: u32, alignment: u32,
    ) {
        let slots = Slots::of_this_warp(topk_idx, n, e, groups);
        let block = block(e);
        let counters = block.counters.slice(warp_id() * e, e);
        let exchange = Exchange { workspace, e };
        let alone = grid_dim_x() == 1;
        let outputs = Outputs { pos_to_expert, pos_to_token, pos_to_token_topk, token_topk_to_pos, k, p };

        // Load.
        let held: [u32; HELD] = core::array::from_fn(|i| slots.load(i as u32));
        if !alone && thread_idx() == 0 {
            block.call.set(0, exchange.call());
        }

        // Count this block's slots, and tell the others.
        clear(&block, counters, e);
        warp_sync();
        let (mut next, mut places) = (held, [0; HELD]);
        let mut group = 0;
        // At least HELD turns, so that the places of the runs held end up where they belong.
        while group < groups || group < HELD as u32 {
            let expert = push(&mut next, slots.load(group + HELD as u32));
            let place = slots.count(expert, counters);
            push(&mut places, place);
            if groups > HELD as u32 && slots.has(group) {
                token_topk_to_pos.set(slots.slot(group), place as i32);
            }
            group += 1;
        }
        block_sync();
        let expert = thread_idx();
        if expert < e {
            let sum = scan_warps(block.counters, e, expert);
            if alone {
                block.total.set(expert, sum);
            } else {
                exchange.publish(block.call.get(0), expert, sum);
            }
        }
        block_sync();

        // Add up the counts of all blocks.
        if !alone {
            exchange.add(block.call.get(0), &block);
            block_sync();
            if block_idx_x() == 0 && thread_idx() == 0 {
                exchange.finish(block.call.get(0));
            }
        }

        // Lay out the experts.
        let len = if expert < e { align_up(block.total.get(expert), alignment) } else { 0 };
        let (end, _) = block_scan_sum(len, block.scratch);
        if expert < e {
            let start = end - len;
            if block_idx_x() == 0 {
                expert_start.set(expert, start as i32);
                expert_end.set(expert, end as i32);
                num_tokens_per_expert.set(expert, len as i32);
            }
            block.base.set(expert, start + block.base.get(expert));
            block.total.set(expert, start + block.total.get(expert));
            block.end.set(expert, end);
        }
        block_sync();

        // Store.
        let (mut held, mut group) = (held, 0);
        while group < groups {
            let slot = slots.slot(group);
            if slots.has(group) {
                let (expert, place) = if groups > HELD as u32 {
                    (slots.load(group), token_topk_to_pos.get(slot) as u32)
                } else {
                    (held[0], places[0])
                };
                let pos = if expert == NONE { NONE } else { block.base.get(expert) + counters.get(expert) + place };
                outputs.write(slot, expert, pos);
            }
            // Turned, not drained: a queue that is constant after a few turns would have the compiler peel them off the loop.
            held.rotate_left(1);
            places.rotate_left(1);
            group += 1;
        }
        outputs.pad(&block, e);
    }
}

/// The slots of a warp: `groups` runs of 32 from `first` on.
#[derive(Clone, Copy)]
struct Slots {
    topk_idx: In<i64>,
    first: u32,
    groups: u32,
    n: u32,
    e: u32,
}

/// What a slot without an expert here counts as.
const NONE: u32 = u32::MAX;

impl Slots {
    #[inline(always)]
    fn of_this_warp(topk_idx: In<i64>, n: u32, e: u32, groups: u32) -> Self {
        let warp = block_idx_x() * WARPS + warp_id();
        Self { topk_idx, first: warp * groups * WARP_SIZE, groups, n, e }
    }

    /// This lane's slot of a run.
    #[inline(always)]
    fn slot(self, group: u32) -> u32 {
        self.first + group * WARP_SIZE + lane_id()
    }

    /// Whether this lane has a slot in a run.
    #[inline(always)]
    fn has(self, group: u32) -> bool {
        group < self.groups && self.slot(group) < self.n
    }

    /// Expert of this lane's slot of a run, [`NONE`] beyond the last run.
    #[inline(always)]
    #[track_caller]
    fn load(self, group: u32) -> u32 {
        let expert = if self.has(group) { self.topk_idx.get(self.slot(group)) as u64 } else { u64::MAX };
        if expert < self.e as u64 {
            return expert as u32;
        }
        if expert as i64 >= 0 {
            // Nothing hangs on the answer: the checked emulator reports it, and PTX has no trace of it.
            index_below(if expert < NONE as u64 { expert as u32 } else { NONE }, self.e);
        }
        NONE
    }

    /// Count a run in the warp's counters. Returns what stood there for each slot, plus the slots of the same expert before it in
    /// the run.
    #[inline(always)]
    #[track_caller]
    fn count(self, expert: u32, counters: Shared<u32>) -> u32 {
        let lane = lane_id();
        let same = warp_match_any(expert);
        let mut place = 0;
        if expert != NONE {
            place = counters.get(expert) + (same & ((1 << lane) - 1)).count_ones();
        }
        // The last lane of an expert moves its counter on, once all lanes have read it.
        warp_sync();
        if expert != NONE && same >> lane == 1 {
            counters.set(expert, place + 1);
        }
        warp_sync();
        place
    }
}

/// Append to a queue of fixed length; returns its first element.
#[inline(always)]
fn push(queue: &mut [u32; HELD], last: u32) -> u32 {
    let first = queue[0];
    queue.rotate_left(1);
    queue[HELD - 1] = last;
    first
}

/// Where the positions go, and what it takes to compute them.
struct Outputs {
    pos_to_expert: Out<i32>,
    pos_to_token: Out<i32>,
    pos_to_token_topk: Out<i32>,
    token_topk_to_pos: Out<i32>,
    k: u32,
    p: u32,
}

impl Outputs {
    /// The slot stands at `pos`, unless that is beyond the buffer.
    #[inline(always)]
    #[track_caller]
    fn write(&self, slot: u32, expert: u32, pos: u32) {
        let placed = pos < self.p;
        self.token_topk_to_pos.set(slot, if placed { pos as i32 } else { -1 });
        if placed {
            self.pos_to_expert.set(pos, expert as i32);
            self.pos_to_token.set(pos, slot.checked_div(self.k).unwrap_or(0) as i32);
            self.pos_to_token_topk.set(pos, slot as i32);
        }
    }

    /// Write -1 to the rows that no slot has: those at the end of each expert, a warp for an expert, and those after the last one.
    #[inline(always)]
    #[track_caller]
    fn pad(&self, block: &Block, e: u32) {
        // Neighbouring experts belong to different blocks.
        let mut expert = warp_id() * grid_dim_x() + block_idx_x();
        loop {
            let of_expert = expert < e;
            let (mut pos, end, step) = if of_expert {
                (block.total.get(expert) + lane_id(), block.end.get(expert), WARP_SIZE)
            } else {
                (block.end.get(e - 1) + block_idx_x() * THREADS + thread_idx(), self.p, grid_dim_x() * THREADS)
            };
            let end = if end < self.p { end } else { self.p };
            while pos < end {
                rolled();
                self.pos_to_expert.set(pos, -1);
                self.pos_to_token.set(pos, -1);
                self.pos_to_token_topk.set(pos, -1);
                pos += step;
            }
            if !of_expert {
                break;
            }
            expert += WARPS * grid_dim_x();
        }
    }
}

/// Words of other blocks in flight in a thread: enough for 128 blocks of 32 experts at once.
const IN_FLIGHT: usize = 4;

/// How blocks tell each other their counts. A word of the workspace is a count in the lower half and the number of the call that wrote it in
/// the upper half: who finds the number of this call there has the count, without a barrier or a fence. Word 0 is the number of calls so far.
/// Numbers wrap, so a word is misread if nobody wrote it for exactly 2^32 calls.
struct Exchange {
    workspace: Out<u64>,
    e: u32,
}

impl Exchange {
    /// Number of this call.
    #[inline(always)]
    #[track_caller]
    fn call(&self) -> u32 {
        self.workspace.load_relaxed(0, Scope::Gpu) as u32 + 1
    }

    /// Tell everybody this block's count.
    #[inline(always)]
    #[track_caller]
    fn publish(&self, call: u32, expert: u32, count: u32) {
        let word = (call as u64) << 32 | count as u64;
        self.workspace.store_relaxed(1 + block_idx_x() * self.e + expert, word, Scope::Gpu);
    }

    /// Add the counts of all blocks, as they arrive, to the block's sums.
    #[inline(always)]
    #[track_caller]
    fn add(&self, call: u32, block: &Block) {
        // The threads stand beside each other in rows as the counts do, rows rounded up to a power of two.
        let (blocks, this) = (grid_dim_x(), block_idx_x());
        let log = 32 - (self.e - 1).leading_zeros();
        let step = THREADS >> log;
        let expert = thread_idx() & ((1 << log) - 1);
        let (mut total, mut before) = (0u32, 0u32);
        if expert < self.e {
            let mut row = thread_idx() >> log;
            while row < blocks {
                // Rows beyond the last stand for it, so that nothing but the words decides about waiting.
                let (last, mut words) = (blocks - 1, [0; IN_FLIGHT]);
                loop {
                    unroll!(i in IN_FLIGHT {
                        let row = row + i as u32 * step;
                        words[i] = self.workspace.load_relaxed(1 + (if row < last { row } else { last }) * self.e + expert, Scope::Gpu);
                    });
                    let mut wrong = 0;
                    unroll!(i in IN_FLIGHT { wrong |= (words[i] >> 32) as u32 ^ call });
                    if wrong == 0 {
                        break;
                    }
                    spin();
                }
                unroll!(i in IN_FLIGHT {
                    let count = if row < blocks { words[i] as u32 } else { 0 };
                    total += count;
                    before += if row < this { count } else { 0 };
                    row += step;
                });
            }
        }
        // Lanes with the same expert add up first.
        let mut distance = 1 << log;
        while distance < WARP_SIZE {
            total += warp_shuffle_xor(total, distance);
            before += warp_shuffle_xor(before, distance);
            distance *= 2;
        }
        if lane_id() >> log == 0 && total > 0 {
            block.total.atomic_add(expert, total);
            block.base.atomic_add(expert, before);
        }
    }

    /// Count the call, once all blocks have published, so that all have read its number.
    #[inline(always)]
    #[track_caller]
    fn finish(&self, call: u32) {
        self.workspace.store_relaxed(0, call as u64, Scope::Gpu);
    }
}

/// Zero the warp's counters and the block's sums.
#[inline(always)]
#[track_caller]
fn clear(block: &Block, counters: Shared<u32>, e: u32) {
    let mut i = lane_id();
    while i < e {
        rolled();
        counters.set(i, 0);
        i += WARP_SIZE;
    }
    if thread_idx() < e {
        block.total.set(thread_idx(), 0);
        block.base.set(thread_idx(), 0);
    }
}

/// Counters that a thread reads at once: one by one, each would wait for the one before.
const AT_ONCE: usize = 8;

/// Replace each warp's counter of an expert by the sum of those of the warps before it; returns the sum of all.
#[inline(always)]
#[track_caller]
fn scan_warps(counters: Shared<u32>, e: u32, expert: u32) -> u32 {
    let mut next = 0;
    let mut warp = 0;
    // The number of threads says the same as WARPS, but not to the compiler, which would unroll the loop.
    while warp < block_dim() / WARP_SIZE {
        rolled();
        let counts: [u32; AT_ONCE] = core::array::from_fn(|i| counters.get((warp + i as u32) * e + expert));
        for (i, count) in counts.iter().enumerate() {
            counters.set((warp + i as u32) * e + expert, next);
            next += count;
        }
        warp += AT_ONCE as u32;
    }
    next
}
