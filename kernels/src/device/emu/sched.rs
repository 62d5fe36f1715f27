//! Runs the threads of a launch: who is next, who waits for whom, and what is wrong when they wait in different places.

use super::memory::Region;
use super::race::{Conflict, GlobalShadow, Kind, Shadow, Who};
use super::stack::{Stack, StackPool};
use super::{Fault, FaultKind, Options, Order};
use crate::launch::LaunchConfig;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use rayon::prelude::*;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

pub use super::race::Kind as Access;

/// Source position of an operation.
pub type Here = &'static Location<'static>;

const WARP: u32 = 32;

/// The one warp operation that orders memory.
pub const WARP_SYNC: &str = "warp_sync";

/// Why a thread does not run.
#[derive(Clone, Copy)]
pub enum Wait {
    /// It can run.
    Ready,
    /// For the other lanes of its warp.
    Warp(&'static str, Here),
    /// For the other threads of its block.
    Block(Here),
    /// For all blocks.
    Grid(Here),
    /// For a change in memory.
    Spin(Here),
    /// It has finished.
    Done,
}

impl Wait {
    fn describe(self) -> String {
        match self {
            Wait::Ready => "is running".into(),
            Wait::Warp(op, at) => format!("is in {op} at {at}"),
            Wait::Block(at) => format!("is in block_sync at {at}"),
            Wait::Grid(at) => format!("is in grid_sync at {at}"),
            Wait::Spin(at) => format!("waits for memory at {at}"),
            Wait::Done => "has left the kernel".into(),
        }
    }

    fn at(self) -> Here {
        match self {
            Wait::Warp(_, at) | Wait::Block(at) | Wait::Grid(at) | Wait::Spin(at) => at,
            Wait::Ready | Wait::Done => Location::caller(),
        }
    }
}

/// An asynchronous copy of 4 or 16 bytes that a thread has started.
pub struct PendingCopy {
    pub to: u32,
    pub from: usize,
    pub bytes: u32,
    pub group: u32,
}

/// A bulk copy that has been started.
pub struct PendingBulk {
    pub to: u32,
    pub from: usize,
    pub bytes: u32,
    pub barrier: u32,
}

/// State of an mbarrier.
#[derive(Clone, Copy)]
pub struct Bulk {
    pub expected: u32,
    pub pending: u32,
    pub bytes: i64,
    pub phase: u32,
}

/// What one emulated thread knows.
pub struct Thread {
    pub index: u32,
    pub wait: Cell<Wait>,
    parity: Cell<usize>,
    yielder: Cell<*const Yielder<(), ()>>,
    block: *const Block,
    pub copies: RefCell<Vec<PendingCopy>>,
    pub copy_group: Cell<u32>,
}

/// What the lanes of a warp share: two sets of slots, so that one wait per exchange is enough.
struct Warp {
    slots: [UnsafeCell<[u64; 32]>; 2],
    epoch: Cell<u32>,
}

/// The coroutine of a thread.
type Routine = Coroutine<(), (), (), Stack>;

/// One block in flight.
pub struct Block {
    launch: *const Launch<'static>,
    pub index: [u32; 3],
    linear: u32,
    threads: Vec<Thread>,
    warps: Vec<Warp>,
    coroutines: RefCell<Vec<Option<Routine>>>,
    epoch: Cell<u32>,
    grid_epoch: Cell<u32>,
    acquired: Cell<bool>,
    shared: Vec<UnsafeCell<u128>>,
    shared_bytes: u32,
    shared_written: RefCell<Vec<bool>>,
    shared_shadow: Option<Shadow>,
    pub bulk: RefCell<Vec<PendingBulk>>,
    pub barriers: RefCell<HashMap<u32, Bulk>>,
}

/// What all blocks of a launch share.
struct Launch<'a> {
    kernel: &'static str,
    config: LaunchConfig,
    options: Options,
    body: &'a (dyn Fn() + Sync),
    global: Option<GlobalShadow>,
    next: AtomicU64,
    stop: AtomicBool,
    fault: Mutex<Option<Fault>>,
    /// Counts whatever makes progress, over all cores.
    progress: AtomicU64,
}

thread_local! {
    static CURRENT: Cell<*const Thread> = const { Cell::new(std::ptr::null()) };
    static STACKS: RefCell<StackPool> = RefCell::new(StackPool::default());
}

/// The emulated thread that is running.
#[track_caller]
pub fn current() -> &'static Thread {
    let thread = CURRENT.get();
    assert!(!thread.is_null(), "device functions run inside kernels only");
    // SAFETY: set by `Block::resume` for as long as the thread runs.
    unsafe { &*thread }
}

impl Thread {
    #[inline(always)]
    pub fn block(&self) -> &Block {
        // SAFETY: a block is boxed and outlives its threads.
        unsafe { &*self.block }
    }

    fn warp(&self) -> &Warp {
        &self.block().warps[(self.index / WARP) as usize]
    }

    /// Stop here until the scheduler says that the wait is over.
    pub fn wait_for(&self, wait: Wait) {
        self.wait.set(wait);
        // SAFETY: the yielder lives on this coroutine's stack.
        unsafe { (*self.yielder.get()).suspend(()) };
    }

    /// Exchange one word with the other lanes: what each lane gave, to be read before the next exchange but one.
    #[inline]
    pub fn exchange(&self, op: &'static str, value: u64, at: Here) -> &[u64; 32] {
        let warp = self.warp();
        let parity = self.parity.get();
        self.parity.set(parity ^ 1);
        // SAFETY: the lanes of a block run one at a time; a lane writes only its own slot.
        unsafe { (*warp.slots[parity].get())[(self.index % WARP) as usize] = value };
        self.wait_for(Wait::Warp(op, at));
        // SAFETY: as above; nobody writes this set before all lanes have passed the next exchange.
        unsafe { &*warp.slots[parity].get() }
    }

    fn fault_at(&self, kind: FaultKind, at: Here) -> Fault {
        Fault { kernel: self.block().launch().kernel, block: self.block().index, thread: self.index, at, kind }
    }

    /// Give up: the kernel did something wrong.
    #[cold]
    #[inline(never)]
    pub fn fault(&self, kind: FaultKind, at: Here) -> ! {
        resume_unwind(Box::new(self.fault_at(kind, at)))
    }

    fn who(&self) -> Who {
        let block = self.block();
        let releases = block.launch().global.as_ref().map_or(0, |g| g.releases.of(block.linear));
        Who {
            block: block.linear,
            thread: self.index,
            block_epoch: block.epoch.get(),
            warp_epoch: self.warp().epoch.get(),
            grid_epoch: block.grid_epoch.get(),
            releases,
            acquired: block.acquired.get(),
        }
    }

    #[cold]
    fn race(&self, space: &'static str, offset: u64, access: Kind, conflict: Conflict, at: Here) -> ! {
        let kind = FaultKind::Race {
            space,
            offset,
            access: access.name(),
            other_access: conflict.other.name(),
            other_block: conflict.block,
            other_thread: conflict.thread,
        };
        self.fault(kind, at)
    }

    /// Checks of a global access beyond bounds and alignment.
    #[inline(never)]
    pub fn check_global(&self, address: usize, bytes: usize, access: Kind, at: Here) {
        let Some(global) = &self.block().launch().global else { return };
        if access != Kind::Write
            && let Some(offset) = global.unwritten(address, bytes)
        {
            self.fault(FaultKind::Unwritten { space: "global", offset }, at);
        }
        if let Err(conflict) = global.access(address, bytes, access, self.who()) {
            // The byte of a conflict counts from the start of its range.
            self.race("global", conflict.byte as u64, access, conflict, at);
        }
    }

    /// Checks of a shared access beyond bounds and alignment.
    #[inline(never)]
    pub fn check_shared(&self, offset: u32, bytes: usize, access: Kind, at: Here) {
        let block = self.block();
        let (Some(shadow), Some(global)) = (&block.shared_shadow, &block.launch().global) else { return };
        let from = offset as usize;
        {
            let mut written = block.shared_written.borrow_mut();
            if access == Kind::Write {
                written[from..from + bytes].fill(true);
            } else if let Some(i) = written[from..from + bytes].iter().position(|w| !w) {
                drop(written);
                self.fault(FaultKind::Unwritten { space: "shared", offset: (from + i) as u64 }, at);
            }
        }
        if let Err(conflict) = shadow.access(from, bytes, access, self.who(), &global.releases) {
            self.race("shared", conflict.byte as u64, access, conflict, at);
        }
    }

    /// This block has released what it wrote.
    pub fn release(&self) {
        if let Some(global) = &self.block().launch().global {
            global.releases.add(self.block().linear);
        }
    }

    /// This block has acquired what others released.
    pub fn acquire(&self) {
        self.block().acquired.set(true);
    }
}

impl Block {
    fn new(launch: &Launch<'_>, linear: u64) -> Box<Self> {
        let [gx, gy, _] = launch.config.grid;
        let index =
            [(linear % gx as u64) as u32, (linear / gx as u64 % gy as u64) as u32, (linear / gx as u64 / gy as u64) as u32];
        let threads = launch.config.threads;
        let shared_bytes = launch.config.shared_bytes;
        let checked = launch.global.is_some();
        let mut block = Box::new(Block {
            // SAFETY of the lifetime: blocks end before `launch` returns.
            launch: (&raw const *launch).cast(),
            index,
            linear: linear as u32,
            threads: Vec::new(),
            warps: (0..threads / WARP)
                .map(|_| Warp { slots: [UnsafeCell::new([0; 32]), UnsafeCell::new([0; 32])], epoch: Cell::new(0) })
                .collect(),
            coroutines: RefCell::new((0..threads).map(|_| None).collect()),
            epoch: Cell::new(0),
            grid_epoch: Cell::new(0),
            acquired: Cell::new(false),
            shared: (0..shared_bytes.div_ceil(16) + 64).map(|_| UnsafeCell::new(0)).collect(),
            shared_bytes,
            shared_written: RefCell::new(if checked { vec![false; shared_bytes as usize] } else { Vec::new() }),
            shared_shadow: checked.then(|| Shadow::new(shared_bytes as usize)),
            bulk: RefCell::default(),
            barriers: RefCell::default(),
        });
        let this: *const Block = &*block;
        block.threads = (0..threads)
            .map(|index| Thread {
                index,
                wait: Cell::new(Wait::Ready),
                parity: Cell::new(0),
                yielder: Cell::new(std::ptr::null()),
                block: this,
                copies: RefCell::default(),
                copy_group: Cell::new(0),
            })
            .collect();
        block
    }

    fn launch(&self) -> &Launch<'_> {
        // SAFETY: blocks end before `launch` returns.
        unsafe { &*self.launch.cast() }
    }

    pub fn checked(&self) -> bool {
        self.shared_shadow.is_some()
    }

    pub fn grid(&self) -> [u32; 3] {
        self.launch().config.grid
    }

    pub fn num_threads(&self) -> u32 {
        self.launch().config.threads
    }

    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// Address of shared memory; 1024-byte aligned as on the hardware.
    pub fn shared_base(&self) -> *mut u8 {
        let start = self.shared.as_ptr() as usize;
        start.next_multiple_of(1024) as *mut u8
    }

    /// A copy engine will write here: until then the bytes count as unwritten.
    pub fn shared_in_flight(&self, offset: u32, bytes: u32) {
        if self.checked() {
            self.shared_written.borrow_mut()[offset as usize..(offset + bytes) as usize].fill(false);
        }
    }

    /// A copy engine wrote here, ordered by its barrier.
    pub fn shared_arrived(&self, offset: u32, bytes: u32) {
        if let Some(shadow) = &self.shared_shadow {
            self.shared_written.borrow_mut()[offset as usize..(offset + bytes) as usize].fill(true);
            shadow.forget(offset as usize, bytes as usize);
        }
    }

    /// A bulk copy begins; it arrives when somebody waits for its barrier.
    pub fn start_bulk(&self, to: u32, from: usize, bytes: u32, barrier: u32) {
        self.bulk.borrow_mut().push(PendingBulk { to, from, bytes, barrier });
    }

    /// All bulk copies that complete on this barrier arrive; how many bytes that is.
    pub fn finish_bulk(&self, barrier: u32) -> u32 {
        let mut arrived = 0;
        self.bulk.borrow_mut().retain(|copy| {
            if copy.barrier != barrier {
                return true;
            }
            let to = self.shared_base().wrapping_add(copy.to as usize);
            // SAFETY: both sides were checked when the copy was started.
            unsafe { std::ptr::copy_nonoverlapping(copy.from as *const u8, to, copy.bytes as usize) };
            self.shared_arrived(copy.to, copy.bytes);
            arrived += copy.bytes;
            false
        });
        arrived
    }

    /// Run thread `t` until it waits or ends.
    fn resume(&self, t: usize, stacks: &mut StackPool) -> Result<(), Fault> {
        let thread = &self.threads[t];
        let mut coroutines = self.coroutines.borrow_mut();
        let coroutine = coroutines[t].get_or_insert_with(|| {
            let address = &raw const *thread as usize;
            let body: *const (dyn Fn() + Sync) = self.launch().body;
            // SAFETY: the body outlives the launch, and with it every coroutine.
            let body: &'static (dyn Fn() + Sync) =
                unsafe { &*std::mem::transmute::<*const (dyn Fn() + Sync), *const (dyn Fn() + Sync)>(body) };
            Coroutine::with_stack(stacks.take(), move |yielder: &Yielder<(), ()>, ()| {
                // SAFETY: the thread outlives its coroutine.
                let thread = unsafe { &*(address as *const Thread) };
                thread.yielder.set(yielder);
                body();
            })
        });
        CURRENT.set(thread);
        let outcome = catch_unwind(AssertUnwindSafe(|| coroutine.resume(())));
        CURRENT.set(std::ptr::null());
        let ended = match outcome {
            Ok(CoroutineResult::Yield(())) => return Ok(()),
            Ok(CoroutineResult::Return(())) => Ok(()),
            Err(payload) => Err(match payload.downcast::<Fault>() {
                Ok(fault) => *fault,
                Err(payload) => {
                    let text = payload
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string()))
                        .unwrap_or_else(|| "of unknown type".into());
                    thread.fault_at(FaultKind::Panic(text), Location::caller())
                }
            }),
        };
        thread.wait.set(Wait::Done);
        if let Some(coroutine) = coroutines[t].take() {
            let stack = coroutine.into_stack();
            let intact = stack.intact();
            stacks.give(stack);
            if !intact {
                return Err(thread.fault_at(FaultKind::StackOverflow, Location::caller()));
            }
        }
        ended
    }

    /// Run warp `w` until none of its lanes can go on; whether anything but waiting was done.
    fn run_warp(&self, w: usize, turn: &mut Turn, stacks: &mut StackPool) -> Result<bool, Fault> {
        let lanes = w * WARP as usize..(w + 1) * WARP as usize;
        let mut progressed = false;
        loop {
            let (mut in_warp_op, mut spinning) = (0, false);
            let rotate = turn.below(WARP as usize);
            for i in 0..WARP as usize {
                let t = lanes.start + turn.lane(i, rotate);
                if matches!(self.threads[t].wait.get(), Wait::Ready) {
                    self.resume(t, stacks)?;
                    progressed |= !matches!(self.threads[t].wait.get(), Wait::Spin(_));
                }
                match self.threads[t].wait.get() {
                    Wait::Warp(..) => in_warp_op += 1,
                    Wait::Spin(_) => spinning = true,
                    _ => {}
                }
            }
            if in_warp_op == 0 || (spinning && in_warp_op < WARP) {
                return Ok(progressed);
            }
            // Some lane is in a warp operation: all have to be, in the same one.
            let first = self.threads[lanes.clone()].iter().find(|t| matches!(t.wait.get(), Wait::Warp(..)));
            let Some(first) = first else { return Ok(progressed) };
            let Wait::Warp(op, at) = first.wait.get() else { return Ok(progressed) };
            for thread in &self.threads[lanes.clone()] {
                match thread.wait.get() {
                    Wait::Warp(other_op, other_at) if other_op == op && std::ptr::eq(other_at, at) => {}
                    Wait::Warp(other_op, other_at) if other_op == op && other_at == at => {}
                    other => {
                        let text = format!("lane {} {}", thread.index % WARP, other.describe());
                        return Err(first.fault_at(FaultKind::MissedWarpOp { op, other: text }, at));
                    }
                }
            }
            if op == WARP_SYNC {
                let epoch = &self.warps[w].epoch;
                epoch.set(epoch.get() + 1);
            }
            self.threads[lanes.clone()].iter().for_each(|t| t.wait.set(Wait::Ready));
        }
    }

    /// Run the block until it ends or can only wait.
    fn run(&self, turn: &mut Turn, stacks: &mut StackPool) -> Result<State, Fault> {
        let mut any_progress = false;
        loop {
            for thread in &self.threads {
                if matches!(thread.wait.get(), Wait::Spin(_)) {
                    thread.wait.set(Wait::Ready);
                }
            }
            let mut progressed = false;
            let warps = self.warps.len();
            let rotate = turn.below(warps);
            for i in 0..warps {
                progressed |= self.run_warp((i + rotate) % warps, turn, stacks)?;
            }
            any_progress |= progressed;
            if self.threads.iter().any(|t| matches!(t.wait.get(), Wait::Spin(_))) {
                if progressed {
                    continue;
                }
                return Ok(State::Spinning(any_progress));
            }
            let first = &self.threads[0];
            if self.threads.iter().all(|t| matches!(t.wait.get(), Wait::Done)) {
                return Ok(State::Done);
            }
            // Nobody can go on, so all must be at the same barrier.
            let waiting = self.threads.iter().find(|t| !matches!(t.wait.get(), Wait::Done)).unwrap_or(first);
            let (wait, at) = (waiting.wait.get(), waiting.wait.get().at());
            let op = if matches!(wait, Wait::Grid(_)) { "grid_sync" } else { "block_sync" };
            for thread in &self.threads {
                let same = match (wait, thread.wait.get()) {
                    (Wait::Block(_), Wait::Block(other)) | (Wait::Grid(_), Wait::Grid(other)) => other == at,
                    _ => false,
                };
                if !same {
                    let other = format!("thread {} {}", thread.index, thread.wait.get().describe());
                    return Err(waiting.fault_at(FaultKind::MissedBarrier { op, other }, at));
                }
            }
            if matches!(wait, Wait::Grid(_)) {
                return Ok(State::AtGrid);
            }
            self.release_barrier();
        }
    }

    fn release_barrier(&self) {
        self.epoch.set(self.epoch.get() + 1);
        self.threads.iter().for_each(|t| t.wait.set(Wait::Ready));
    }

    /// Drop what is left of the threads after a fault, without running them.
    fn abandon(&self, stacks: &mut StackPool) {
        for coroutine in self.coroutines.borrow_mut().iter_mut() {
            if let Some(mut coroutine) = coroutine.take() {
                if coroutine.started() && !coroutine.done() {
                    // SAFETY: what stands on a suspended kernel's stack is plain data; the emulator suspends only in
                    // functions that hold no guards.
                    unsafe { coroutine.force_reset() };
                }
                if coroutine.done() {
                    stacks.give(coroutine.into_stack());
                }
            }
        }
    }
}

enum State {
    Done,
    /// Every thread waits for memory; whether something else was done before.
    Spinning(bool),
    AtGrid,
}

/// Decides whose turn it is.
struct Turn {
    state: u64,
    shuffled: bool,
}

impl Turn {
    fn new(order: Order, block: u64) -> Self {
        let seed = if let Order::Shuffled(seed) = order { seed } else { 0 };
        Self { state: (seed ^ block.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1, shuffled: order != Order::Ascending }
    }

    /// A number below `n`: 0 in ascending order.
    fn below(&mut self, n: usize) -> usize {
        if !self.shuffled {
            return 0;
        }
        // xorshift64*: enough to shuffle.
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// The lane that is `i`th: rotated, and in odd rotations backwards.
    fn lane(&self, i: usize, rotate: usize) -> usize {
        let i = (i + rotate) % WARP as usize;
        if rotate % 2 == 1 { WARP as usize - 1 - i } else { i }
    }
}

/// The `i`th block to start: a permutation of `0..blocks` that needs no memory.
fn block_at(order: Order, i: u64, blocks: u64) -> u64 {
    let Order::Shuffled(seed) = order else { return i };
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = ((seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) % blocks) | 1;
    while gcd(step, blocks) != 1 {
        step += 2;
    }
    ((i as u128 * step as u128 + (seed % blocks) as u128) % blocks as u128) as u64
}

/// Blocks that one core keeps alive while they wait for others.
const PARKED: usize = 256;

/// Runs blocks until none are left.
fn worker(launch: &Launch<'_>) {
    // A kernel launched from within a launch would find the pool taken; it gets a fresh one.
    let mut stacks = STACKS.take();
    if let Err(fault) = run_blocks(launch, &mut stacks) {
        launch.stop.store(true, Ordering::Relaxed);
        launch.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
    }
    STACKS.set(stacks);
}

fn run_blocks(launch: &Launch<'_>, stacks: &mut StackPool) -> Result<(), Fault> {
    let blocks = launch.config.num_blocks();
    let order = launch.options.order;
    let capacity = if launch.config.cooperative { usize::MAX } else { PARKED };
    let mut live: Vec<(Box<Block>, Turn, bool)> = Vec::new();
    let mut last_progress = (Instant::now(), launch.progress.load(Ordering::Relaxed));
    let outcome = 'run: loop {
        if launch.stop.load(Ordering::Relaxed) {
            break Ok(());
        }
        let mut exhausted = true;
        if live.len() < capacity {
            let i = launch.next.fetch_add(1, Ordering::Relaxed);
            if i < blocks {
                exhausted = false;
                let linear = block_at(order, i, blocks);
                live.push((Block::new(launch, linear), Turn::new(order, linear), false));
            }
        }
        if live.is_empty() && exhausted {
            break Ok(());
        }
        // A new block runs alone first; when there is none, all that wait get another turn.
        let first = if exhausted { 0 } else { live.len() - 1 };
        let mut i = first;
        while i < live.len() {
            let (block, turn, at_grid) = &mut live[i];
            if *at_grid {
                i += 1;
                continue;
            }
            match block.run(turn, stacks) {
                Err(fault) => break 'run Err(fault),
                Ok(State::Done) => {
                    launch.progress.fetch_add(1, Ordering::Relaxed);
                    live.swap_remove(i);
                    continue;
                }
                Ok(State::Spinning(progressed)) => {
                    launch.progress.fetch_add(progressed as u64, Ordering::Relaxed);
                }
                Ok(State::AtGrid) if !launch.config.cooperative => {
                    let thread = &block.threads[0];
                    let other = "the launch is not cooperative".to_owned();
                    let kind = FaultKind::MissedBarrier { op: "grid_sync", other };
                    break 'run Err(thread.fault_at(kind, thread.wait.get().at()));
                }
                Ok(State::AtGrid) => {
                    launch.progress.fetch_add(1, Ordering::Relaxed);
                    *at_grid = true;
                }
            }
            i += 1;
        }
        if !exhausted {
            continue;
        }
        if live.len() as u64 == blocks && live.iter().all(|(_, _, at_grid)| *at_grid) {
            for (block, _, at_grid) in &mut live {
                block.grid_epoch.set(block.grid_epoch.get() + 1);
                block.release_barrier();
                *at_grid = false;
            }
            continue;
        }
        let progress = launch.progress.load(Ordering::Relaxed);
        if progress != last_progress.1 {
            last_progress = (Instant::now(), progress);
        } else if let Some((block, _, _)) = live.first()
            && last_progress.0.elapsed() > launch.options.patience
        {
            let stuck = block.threads.iter().find(|t| !matches!(t.wait.get(), Wait::Done)).unwrap_or(&block.threads[0]);
            break Err(stuck.fault_at(FaultKind::Deadlock, stuck.wait.get().at()));
        }
        if !live.is_empty() {
            std::thread::yield_now();
        }
    };
    for (block, _, _) in &live {
        block.abandon(stacks);
    }
    outcome
}

/// Run `body` once per thread of the launch; returns when all blocks have finished or one has faulted.
///
/// `regions` are the tensors the kernel was given (only used with checks on).
pub fn launch(
    kernel: &'static str,
    max_threads: u32,
    config: &LaunchConfig,
    options: &Options,
    regions: &[Region],
    body: &(dyn Fn() + Sync),
) -> Result<(), Fault> {
    let blocks = config.num_blocks();
    if blocks == 0 {
        return Ok(());
    }
    let allowed = if max_threads == 0 { 1024 } else { max_threads };
    if config.threads == 0 || config.threads > allowed || !config.threads.is_multiple_of(WARP) {
        let kind = FaultKind::BlockSize { threads: config.threads, allowed };
        return Err(Fault { kernel, block: [0; 3], thread: 0, at: Location::caller(), kind });
    }
    let launch = Launch {
        kernel,
        config: *config,
        options: *options,
        body,
        global: options.checked.then(|| GlobalShadow::new(regions, blocks)),
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        fault: Mutex::new(None),
        progress: AtomicU64::new(0),
    };
    let workers = rayon::current_num_threads().min(blocks.min(usize::MAX as u64) as usize);
    if config.cooperative || workers <= 1 {
        worker(&launch);
    } else {
        (0..workers).into_par_iter().with_max_len(1).for_each(|_| worker(&launch));
    }
    let fault = launch.fault.into_inner().unwrap_or_else(PoisonError::into_inner);
    fault.map_or(Ok(()), Err)
}
