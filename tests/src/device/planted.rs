//! Kernels that do what they must not do, and the fault the emulator has to report for each.

use ferrotile_kernels::device::emu::{Fault, Options, Order};
use ferrotile_kernels::device::{
    In, LaunchConfig, Out, Scope, Shared, SharedLayout, block_sync, copy_commit, copy_wait, grid_sync, index_below,
};
use ferrotile_kernels::device::{Mbarrier, block_idx_x, spin, thread_idx, warp_max_u32, warp_shuffle_xor, warp_sync};
use ferrotile_kernels::kernel;
use std::time::Duration;

/// Words of the tensors and of shared memory.
const WORDS: u32 = 256;

kernel! {
    op = planted;
    threads = 256;
    /// `mode` chooses the mistake, see the tests.
    pub fn mistake(x: In<u32>, y: Out<u32>, mode: u32) {
        let mut layout = SharedLayout::new();
        let s: Shared<u32> = layout.array(WORDS);
        let t = thread_idx();
        match mode {
            0 => y.set(t + 1, x.get(t)),
            1 => y.set(t, x.at(u64::MAX).get(t)),
            2 => y.set(t, x.load16(t & 1)[0]),
            3 => {
                s.set(t, t);
                y.set(t, s.get(t ^ 32));
            }
            4 if t == 77 => {}
            4 => block_sync(),
            5 if t == 37 => {}
            5 => y.set(t, warp_max_u32(t)),
            6 => {
                let v = if t < 16 { warp_shuffle_xor(t, 1) } else { warp_shuffle_xor(t, 2) };
                y.set(t, v);
            }
            7 => y.set(t, s.get(t)),
            8 => y.set(0, t),
            9 => layout.array::<u32>(4096).set(t * 16, 1),
            10 => s.set(t + 1, 1),
            11 => {
                s.set(t, t);
                y.set(t, s.get(t ^ 1));
            }
            12 => y.set(t, y.get(t)),
            13 => {
                while y.load_acquire(0, Scope::Gpu) != 12345 {
                    spin();
                }
            }
            14 => y.set(block_idx_x() & 1, 1),
            15 => {
                s.copy16_async(0, x, 0);
                copy_commit();
                y.set(t, s.get(0));
                copy_wait::<0>();
            }
            16 => grid_sync(y),
            17 => y.set(t, [1u32, 2][t as usize]),
            18 => {
                let b = Mbarrier::new(s.cast(), 0);
                b.wait(0);
            }
            19 => s.load16(2).iter().for_each(|v| y.set(t, *v)),
            // The right way to do 3, 11 and 15.
            20 => {
                s.set(t, t);
                block_sync();
                let v = s.get(t ^ 32);
                block_sync();
                s.set(t, v);
                warp_sync();
                y.set(t, s.get(t ^ 1));
            }
            21 => y.set(t, index_below(x.get(t) + 1, WORDS) as u32),
            _ => {}
        }
    }
}

fn run(mode: u32, order: Order) -> Result<(), Fault> {
    let x: Vec<u32> = (0..WORDS).collect();
    let mut y = vec![0u32; WORDS as usize];
    run_on(mode, order, &x, &mut y)
}

fn run_on(mode: u32, order: Order, x: &[u32], y: &mut [u32]) -> Result<(), Fault> {
    let mut layout = SharedLayout::new();
    layout.array::<u32>(WORDS);
    let blocks = if mode == 14 { 3 } else { 1 };
    let config = LaunchConfig::new(blocks, 256).shared(&layout);
    let bytes = 4 * WORDS as u64;
    let args = mistake::Args { x: In::new(x.as_ptr() as u64, bytes), y: Out::new(y.as_mut_ptr() as u64, bytes), mode };
    let options = Options { checked: true, order, patience: Duration::from_millis(100) };
    mistake::ENTRY.emulate(&config, &args, &options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile_kernels::device::emu::{FaultKind, memory};

    /// The fault of a mistake, in both orders; its place has to be in this file.
    fn faults(mode: u32) -> Vec<FaultKind> {
        [Order::Ascending, Order::Shuffled(7)]
            .into_iter()
            .map(|order| {
                let fault = run(mode, order).expect_err("the mistake has to be found");
                assert_eq!(fault.kernel, "planted__mistake");
                if !matches!(fault.kind, FaultKind::Panic(_)) {
                    assert!(fault.at.file().ends_with("planted.rs"), "{fault}");
                }
                println!("{fault}");
                fault.kind
            })
            .collect()
    }

    macro_rules! finds {
        ($($name:ident: $mode:literal => $pattern:pat $(if $guard:expr)?,)*) => { $(
            #[test]
            fn $name() {
                for kind in faults($mode) {
                    assert!(matches!(&kind, $pattern $(if $guard)?), "{kind:?}");
                }
            }
        )* };
    }
    finds! {
        write_behind_the_end: 0 => FaultKind::OutOfBounds { space: "global", offset: 1024, bytes: 4, len: 1024 },
        read_before_the_start: 1 => FaultKind::OutOfBounds { space: "global", offset: -4, .. },
        misaligned_vector: 2 => FaultKind::Misaligned { space: "global", bytes: 16, .. },
        race_in_shared_memory: 3 => FaultKind::Race { space: "shared", .. } | FaultKind::Unwritten { space: "shared", .. },
        barrier_one_thread_misses: 4 => FaultKind::MissedBarrier { op: "block_sync", other } if other.contains("thread 77 has left"),
        reduction_one_lane_misses: 5 => FaultKind::MissedWarpOp { other, .. } if other.contains("lane 5"),
        shuffles_in_two_places: 6 => FaultKind::MissedWarpOp { op: "warp_shuffle_xor", .. },
        shared_memory_nothing_wrote: 7 => FaultKind::Unwritten { space: "shared", .. },
        two_threads_write_one_word: 8 => FaultKind::Race { space: "global", access: "write", other_access: "write", .. },
        shared_memory_not_asked_for: 9 => FaultKind::SharedTooSmall { needed: 17408, asked: 1024 },
        behind_a_shared_array: 10 => FaultKind::OutOfBounds { space: "shared", offset: 1024, .. },
        race_within_a_warp: 11 => FaultKind::Race { space: "shared", .. } | FaultKind::Unwritten { space: "shared", .. },
        wait_for_nothing: 13 => FaultKind::Deadlock,
        race_between_blocks: 14 => FaultKind::Race { space: "global", .. },
        copy_not_waited_for: 15 => FaultKind::Unwritten { space: "shared", .. } | FaultKind::Race { space: "shared", .. },
        index_panic: 17 => FaultKind::Panic(text) if text.contains("index out of bounds"),
        barrier_never_set_up: 18 => FaultKind::Unwritten { space: "shared", .. },
        index_too_large: 21 => FaultKind::Index { index: 256, len: 256 },
        misaligned_shared_vector: 19 => FaultKind::Misaligned { space: "shared", bytes: 16, .. },
    }

    #[test]
    fn grid_barrier_without_a_cooperative_launch() {
        for order in [Order::Ascending, Order::Shuffled(1)] {
            assert!(matches!(run(16, order).map_err(|f| f.kind), Err(FaultKind::MissedBarrier { op: "grid_sync", .. })));
        }
    }

    #[test]
    fn memory_nothing_wrote() {
        let x = vec![0u32; WORDS as usize];
        let mut y = vec![0u32; WORDS as usize];
        memory::register(y.as_ptr() as usize, y.len() * 4, false);
        memory::mark_written(y.as_ptr() as usize, 40);
        let fault = run_on(12, Order::Ascending, &x, &mut y).expect_err("it reads word 10");
        assert_eq!((fault.thread, fault.kind), (10, FaultKind::Unwritten { space: "global", offset: 40 }));
        memory::mark_written(y.as_ptr() as usize, y.len() * 4);
        run_on(12, Order::Ascending, &x, &mut y).expect("all of it is written now");
        memory::unregister(y.as_ptr() as usize);
    }

    #[test]
    fn block_sizes() {
        let x = vec![0u32; WORDS as usize];
        for (threads, allowed) in [(288, 256), (40, 256), (0, 256)] {
            let args = mistake::Args { x: In::new(x.as_ptr() as u64, 0), y: Out::null(), mode: 99 };
            let fault = mistake::ENTRY.emulate(&LaunchConfig::new(1, threads), &args, &Options::default());
            assert_eq!(fault.expect_err("a bad size").kind, FaultKind::BlockSize { threads, allowed });
        }
    }

    #[test]
    fn no_mistake_no_fault() {
        for order in [Order::Ascending, Order::Shuffled(1), Order::Shuffled(2)] {
            run(20, order).unwrap_or_else(|fault| panic!("{fault}"));
        }
    }

    /// Without checks the cheap ones are still found, and nothing is reported that is not wrong.
    #[test]
    fn bounds_without_checks() {
        let (x, mut y) = (vec![0u32; WORDS as usize], vec![0u32; WORDS as usize]);
        let args = mistake::Args { x: In::new(x.as_ptr() as u64, 1024), y: Out::new(y.as_mut_ptr() as u64, 1024), mode: 0 };
        let fault = mistake::ENTRY.emulate(&LaunchConfig::new(1, 256), &args, &Options::default());
        assert!(matches!(fault.expect_err("out of bounds").kind, FaultKind::OutOfBounds { .. }));
    }
}
