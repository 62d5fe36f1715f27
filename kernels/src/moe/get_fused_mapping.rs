//! get_fused_mapping: the expert-major order of all (token, choice) slots, a stable counting sort by expert.
//!
//! In    topk_idx i64 `[t, k]` as n = t·k slots       Out   pos_to_{expert, token, token_topk} i32 `[p]`, token_topk_to_pos i32 `[t, k]`,
//!       expert_start, expert_end, num_tokens_per_expert i32 `[e]`; -1 where there is nothing
//! Exact integers; slots of an expert stand in ascending order whatever the launch. Values outside `0..e` count as -1; a slot whose
//!       row would be `p` or more is dropped from all arrays of positions.
//! Map   `count`: each block counts its slots by expert. `place`: each block adds up the counts of all blocks and of those before
//!       it, lays out the experts, and places its slots, warps one after the other. A warp owns `groups` runs of 32 slots.
//! Cost  16·n bytes read, 4·n + 12·p written, and blocks²·e counts from L2; bound by two launches and four trips to memory.

use crate::device::*;
use crate::kernel;

/// Threads of a block, one for each expert.
pub const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / WARP_SIZE;

/// Most experts.
pub const MAX_EXPERTS: u32 = THREADS;

/// Every block reads the counts of all blocks, so more than 128 KiB of them cost more than what further blocks save.
const MAX_COUNTS: u32 = 32 << 10;

/// How the slots are divided: a block has 32 warps, a warp `groups` runs of 32 slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of blocks, at least 1.
    pub blocks: u32,
    /// Runs of 32 slots of a warp, at least 1.
    pub groups: u32,
}

/// The plan for `n` slots (at most 2^31) and `e` experts (1 to [`MAX_EXPERTS`]): two blocks on an SM if there is work for them.
pub const fn plan(n: u32, e: u32, num_sms: u32) -> Plan {
    let by_counts = max_blocks(e);
    let most = if 2 * num_sms < by_counts { 2 * num_sms } else { by_counts };
    let groups = at_least_1(ceil_div(n, most * THREADS));
    Plan { blocks: at_least_1(ceil_div(n, groups * THREADS)), groups }
}

/// Words of workspace that are enough for [`plan`] on any device: the counts.
pub const fn workspace_words(n: u32, e: u32) -> u32 {
    let (by_slots, by_counts) = (at_least_1(ceil_div(n, THREADS)), max_blocks(e));
    (if by_slots < by_counts { by_slots } else { by_counts }) * e
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

/// Shared memory of `count`: one counter for each expert.
const fn shared_count(e: u32) -> (SharedLayout, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let counters = layout.array(e);
    (layout, counters)
}

/// Shared memory of `place`: a counter for each warp and expert, and the block's sums.
struct PlaceShared {
    layout: SharedLayout,
    counters: Shared<u32>,
    total: Shared<u32>,
    before: Shared<u32>,
    scratch: Shared<u32>,
}

const fn shared_place(e: u32) -> PlaceShared {
    let mut layout = SharedLayout::new();
    let counters = layout.array(WARPS * e);
    let (total, before, scratch) = (layout.array(e), layout.array(e), layout.array(WARPS));
    PlaceShared { layout, counters, total, before, scratch }
}

/// Grid and block of `count`.
pub const fn config_count(plan: Plan, e: u32) -> LaunchConfig {
    LaunchConfig::new(plan.blocks, THREADS).shared(&shared_count(e).0)
}

/// Grid and block of `place`.
pub const fn config_place(plan: Plan, e: u32) -> LaunchConfig {
    LaunchConfig::new(plan.blocks, THREADS).shared(&shared_place(e).layout)
}

/// Grid and block of `fused`.
pub const fn config_fused(plan: Plan, e: u32) -> LaunchConfig {
    config_place(plan, e).cooperative()
}

kernel! {
    op = get_fused_mapping;
    threads = 1024, blocks = 2;
    /// First launch: counts of each block into the workspace, and -1 everywhere in the arrays by position.
    pub fn count(
        topk_idx: In<i64>, counts: Out<u32>, pos_to_expert: Out<i32>, pos_to_token: Out<i32>, pos_to_token_topk: Out<i32>,
        n: u32, e: u32, groups: u32, p: u32,
    ) {
        let slots = Slots::of_this_warp(topk_idx, n, e, groups);
        let held = slots.expert(0);
        let (_, counters) = shared_count(e);
        if thread_idx() < e {
            counters.set(thread_idx(), 0);
        }
        block_sync();
        slots.count(held, counters);
        fill(pos_to_expert, pos_to_token, pos_to_token_topk, p);
        block_sync();
        if thread_idx() < e {
            counts.set(block_idx_x() * e + thread_idx(), counters.get(thread_idx()));
        }
    }
}

kernel! {
    op = get_fused_mapping;
    threads = 1024, blocks = 2;
    /// Second launch: everything else.
    pub fn place(
        topk_idx: In<i64>, counts: Out<u32>, pos_to_expert: Out<i32>, pos_to_token: Out<i32>, pos_to_token_topk: Out<i32>,
        token_topk_to_pos: Out<i32>, expert_start: Out<i32>, expert_end: Out<i32>, num_tokens_per_expert: Out<i32>,
        n: u32, e: u32, k: u32, groups: u32, p: u32, alignment: u32,
    ) {
        let slots = Slots::of_this_warp(topk_idx, n, e, groups);
        let held = slots.expert(0);
        let shared = shared_place(e);
        clear(&shared, e);
        let sums = Sums::load(|i| counts.get(i), e);
        block_sync();
        sums.add(&shared, e);
        slots.count(held, shared.counters.slice(warp_id() * e, e));
        block_sync();
        lay_out(&shared, expert_start, expert_end, num_tokens_per_expert, e, alignment);
        block_sync();
        let outputs = Outputs { pos_to_expert, pos_to_token, pos_to_token_topk, token_topk_to_pos, k, p };
        slots.place(held, shared.counters.slice(warp_id() * e, e), &outputs);
    }
}

kernel! {
    op = get_fused_mapping;
    threads = 1024, blocks = 2;
    /// Both in one cooperative launch. `barrier` is one word that was zeroed once.
    pub fn fused(
        topk_idx: In<i64>, counts: Out<u32>, barrier: Out<u32>,
        pos_to_expert: Out<i32>, pos_to_token: Out<i32>, pos_to_token_topk: Out<i32>,
        token_topk_to_pos: Out<i32>, expert_start: Out<i32>, expert_end: Out<i32>, num_tokens_per_expert: Out<i32>,
        n: u32, e: u32, k: u32, groups: u32, p: u32, alignment: u32,
    ) {
        let slots = Slots::of_this_warp(topk_idx, n, e, groups);
        let held = slots.expert(0);
        let shared = shared_place(e);
        clear(&shared, e);
        block_sync();
        slots.count(held, shared.counters.slice(warp_id() * e, e));
        fill(pos_to_expert, pos_to_token, pos_to_token_topk, p);
        block_sync();
        if thread_idx() < e {
            let mut sum = 0u32;
            for warp in 0..WARPS {
                sum += shared.counters.get(warp * e + thread_idx());
            }
            counts.set(block_idx_x() * e + thread_idx(), sum);
        }
        grid_sync(barrier);
        Sums::load(|i| counts.get(i), e).add(&shared, e);
        block_sync();
        lay_out(&shared, expert_start, expert_end, num_tokens_per_expert, e, alignment);
        block_sync();
        let outputs = Outputs { pos_to_expert, pos_to_token, pos_to_token_topk, token_topk_to_pos, k, p };
        slots.place(held, shared.counters.slice(warp_id() * e, e), &outputs);
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

/// Where the positions go, and what it takes to compute them.
struct Outputs {
    pos_to_expert: Out<i32>,
    pos_to_token: Out<i32>,
    pos_to_token_topk: Out<i32>,
    token_topk_to_pos: Out<i32>,
    k: u32,
    p: u32,
}

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

    /// Expert of this lane's slot of a run, or [`NONE`].
    #[inline(always)]
    #[track_caller]
    fn expert(self, group: u32) -> u32 {
        let slot = self.slot(group);
        let expert = if slot < self.n { self.topk_idx.get(slot) as u64 } else { u64::MAX };
        if expert < self.e as u64 { expert as u32 } else { NONE }
    }

    /// Count the warp's slots in `counters[expert]`; `held` is [`expert(0)`](Self::expert), loaded ahead of time.
    #[inline(always)]
    #[track_caller]
    fn count(self, held: u32, counters: Shared<u32>) {
        let mut expert = held;
        let mut group = 0;
        loop {
            if expert != NONE {
                counters.atomic_add(expert, 1);
            }
            group += 1;
            if group >= self.groups {
                break;
            }
            expert = self.expert(group);
        }
    }

    /// Give the warp's slots their positions in ascending order, from `next[expert]` on.
    #[inline(always)]
    #[track_caller]
    fn place(self, held: u32, next: Shared<u32>, outputs: &Outputs) {
        let lane = lane_id();
        let mut expert = held;
        let mut group = 0;
        loop {
            let same = warp_match_any(expert);
            let before = (same & ((1 << lane) - 1)).count_ones();
            let mut pos = NONE;
            if expert != NONE {
                pos = next.get(expert) + before;
            }
            outputs.write(self.slot(group), self.n, expert, pos);
            group += 1;
            if group >= self.groups {
                break;
            }
            // The last lane of an expert moves its counter on, once all lanes have read it.
            warp_sync();
            if expert != NONE && same >> lane == 1 {
                next.set(expert, pos + 1);
            }
            warp_sync();
            expert = self.expert(group);
        }
    }
}

impl Outputs {
    /// Slot `slot` of `n` stands at `pos`, unless that is beyond the buffer.
    #[inline(always)]
    #[track_caller]
    fn write(&self, slot: u32, n: u32, expert: u32, pos: u32) {
        let placed = pos < self.p;
        if slot < n {
            self.token_topk_to_pos.set(slot, if placed { pos as i32 } else { -1 });
        }
        if placed {
            self.pos_to_expert.set(pos, expert as i32);
            self.pos_to_token.set(pos, slot.checked_div(self.k).unwrap_or(0) as i32);
            self.pos_to_token_topk.set(pos, slot as i32);
        }
    }
}

/// Set the arrays by position to -1, all blocks together.
#[inline(always)]
#[track_caller]
fn fill(pos_to_expert: Out<i32>, pos_to_token: Out<i32>, pos_to_token_topk: Out<i32>, p: u32) {
    let mut pos = block_idx_x() * THREADS + thread_idx();
    while pos < p {
        pos_to_expert.set(pos, -1);
        pos_to_token.set(pos, -1);
        pos_to_token_topk.set(pos, -1);
        pos += grid_dim_x() * THREADS;
    }
}

/// A thread's part of the counts of one expert.
struct Sums {
    expert: u32,
    /// Over all blocks.
    total: u32,
    /// Over the blocks before this one.
    before: u32,
}

impl Sums {
    /// Loads in flight in a thread: enough for 192 blocks of 32 experts at once.
    const UNROLL: usize = 6;

    /// The threads stand beside each other in rows as the counts do, rows rounded up to a power of two.
    #[inline(always)]
    #[track_caller]
    fn load(count: impl Fn(u32) -> u32, e: u32) -> Self {
        let (blocks, this) = (grid_dim_x(), block_idx_x());
        let log = 32 - (e - 1).leading_zeros();
        let shift = THREADS.trailing_zeros() - log;
        let (first, step) = (thread_idx() >> log, 1 << shift);
        let expert = thread_idx() & ((1 << log) - 1);
        let (mut total, mut before) = (0u32, 0u32);
        if expert < e {
            let mut row = first;
            while row < blocks {
                // Rows of this round that are there, and those of them before this block.
                let (there, earlier) = ((blocks - row - 1) >> shift, this.wrapping_sub(row + 1) as i32 >> shift);
                let of: [u32; Self::UNROLL] =
                    core::array::from_fn(|i| if i as u32 <= there { count((row + i as u32 * step) * e + expert) } else { 0 });
                for (i, n) in of.iter().enumerate() {
                    total += n;
                    before += if i as i32 <= earlier { *n } else { 0 };
                }
                row += Self::UNROLL as u32 * step;
            }
        }
        Self { expert, total, before }
    }

    /// Add to the block's sums.
    #[inline(always)]
    #[track_caller]
    fn add(&self, shared: &PlaceShared, e: u32) {
        if self.total > 0 && self.expert < e {
            shared.total.atomic_add(self.expert, self.total);
            shared.before.atomic_add(self.expert, self.before);
        }
    }
}

/// Zero all counters and sums of the block.
#[inline(always)]
#[track_caller]
fn clear(shared: &PlaceShared, e: u32) {
    let mut i = thread_idx();
    while i < WARPS * e {
        shared.counters.set(i, 0);
        i += THREADS;
    }
    if thread_idx() < e {
        shared.total.set(thread_idx(), 0);
        shared.before.set(thread_idx(), 0);
    }
}

/// Where each expert starts, and from the counters of the block's warps the first position of each warp and expert.
#[inline(always)]
#[track_caller]
fn lay_out(
    shared: &PlaceShared,
    expert_start: Out<i32>,
    expert_end: Out<i32>,
    num_tokens_per_expert: Out<i32>,
    e: u32,
    alignment: u32,
) {
    let expert = thread_idx();
    let len = if expert < e { align_up(shared.total.get(expert), alignment) } else { 0 };
    let (end, _) = block_scan_sum(len, shared.scratch);
    if expert < e {
        let start = end - len;
        if block_idx_x() == 0 {
            expert_start.set(expert, start as i32);
            expert_end.set(expert, end as i32);
            num_tokens_per_expert.set(expert, len as i32);
        }
        let mut next = start + shared.before.get(expert);
        // Several at a time: one by one, each would wait for the one before.
        const AT_ONCE: usize = 8;
        let mut warp = 0;
        while warp < WARPS {
            let of: [u32; AT_ONCE] = core::array::from_fn(|i| shared.counters.get((warp + i as u32) * e + expert));
            for (i, n) in of.iter().enumerate() {
                shared.counters.set((warp + i as u32) * e + expert, next);
                next += n;
            }
            warp += AT_ONCE as u32;
        }
    }
}
