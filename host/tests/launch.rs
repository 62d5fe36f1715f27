//! Launches, graphs and errors, with the same kernels on the emulator and, where there is one, on a GPU.
//!
//! The kernels are declared here and their PTX is written by hand, so that this crate's tests need no device compiler.

use ferrotile::{Device, Error, Result, Stream, register_ptx};
use ferrotile_kernels::device::{
    In, LaunchConfig, Out, SharedLayout, block_idx_x, block_sync, grid_dim_x, grid_sync, thread_idx,
};
use ferrotile_kernels::kernel;

kernel! {
    op = host_test;
    threads = 128;
    /// out[i] = start + i * step.
    pub fn iota(out: Out<u32>, start: u32, step: u32, n: u32) {
        let i = block_idx_x() * 128 + thread_idx();
        if i < n {
            out.set(i, i * step + start);
        }
    }
}

/// Elements of `turn`'s shared array: 200 KB, far above the 48 KB that need no permission.
const TURN: u32 = 50_000;

fn turn_layout() -> (SharedLayout, ferrotile_kernels::device::Shared<u32>) {
    let mut layout = SharedLayout::new();
    let array = layout.array(TURN);
    (layout, array)
}

kernel! {
    op = host_test;
    threads = 256;
    /// out[t] = 255 - t, by way of the far end of a large shared array.
    pub fn turn(out: Out<u32>) {
        let (_, array) = turn_layout();
        let t = thread_idx();
        array.set(TURN - 1 - t, t);
        block_sync();
        out.set(t, array.get(TURN - 1 - (255 - t)));
    }
}

kernel! {
    op = host_test;
    /// out[b] = what block b + 1 wrote before the barrier over the grid.
    pub fn neighbour(scratch: Out<u32>, out: Out<u32>, barrier: Out<u32>) {
        let (b, n) = (block_idx_x(), grid_dim_x());
        if thread_idx() == 0 {
            scratch.set(b, b + 1);
        }
        grid_sync(barrier);
        if thread_idx() == 0 {
            out.set(b, scratch.get((b + 1) % n));
        }
    }
}

kernel! {
    op = host_test;
    /// Reads one element, wherever `x` points to.
    pub fn touch(x: In<u32>, out: Out<u32>) {
        if thread_idx() == 0 {
            out.set(0, x.get(0));
        }
    }
}

kernel! {
    op = host_test;
    /// Has no PTX.
    pub fn absent(out: Out<u32>) {
        out.set(0, 1);
    }
}

kernel! {
    op = host_test_broken;
    /// Its PTX does not compile.
    pub fn broken(out: Out<u32>) {
        out.set(0, 1);
    }
}

kernel! {
    op = host_test_future;
    /// Its PTX is newer than any driver.
    pub fn future(out: Out<u32>) {
        out.set(0, 1);
    }
}

kernel! {
    op = host_test_unknown;
    /// Its op has no PTX at all.
    pub fn unknown(out: Out<u32>) {
        out.set(0, 1);
    }
}

const OP: &str = "host_test";

/// Every device of this machine, the emulator in several modes.
fn devices() -> Vec<Device> {
    register_ptx(OP, include_str!("launch.ptx"));
    let mut devices = vec![Device::emulator(), Device::emulator().checked(), Device::emulator().checked().shuffled(7)];
    match Device::cuda(0) {
        Ok(device) => devices.push(device),
        Err(reason) => eprintln!("GPU: skipped ({reason})"),
    }
    devices
}

fn run_iota(stream: &Stream, out: Out<u32>, start: u32, n: u32) -> Result<()> {
    stream.launch(OP, &iota::ENTRY, &LaunchConfig::new(n.div_ceil(128), 128), &iota::Args { out, start, step: 3, n })
}

fn expected_iota(start: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| start + 3 * i).collect()
}

#[test]
fn results_are_the_same_everywhere() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for n in [0, 1, 127, 128, 1000, 100_001] {
            let mut out = device.alloc::<u32>(n as usize).unwrap();
            run_iota(&stream, out.tensor_mut(&[n as u64]).unwrap().output(), 5, n).unwrap();
            assert_eq!(out.to_vec().unwrap(), expected_iota(5, n), "{device}, {n}");
        }
    }
}

#[test]
fn a_foreign_pointer_and_stream_work() {
    for device in devices() {
        let owner = device.zeros::<u32>(100).unwrap();
        let stream = device.stream().unwrap();
        // SAFETY: both outlive their uses here.
        let foreign = unsafe { Stream::from_raw(&device, stream.raw()) };
        let tensor =
            unsafe { ferrotile::TensorMut::from_raw(&device, owner.as_ptr() + 40, ferrotile::DType::U32, &[50], &[1]) }.unwrap();
        run_iota(&foreign, tensor.output(), 1, 50).unwrap();
        foreign.synchronize().unwrap();
        let data = owner.to_vec().unwrap();
        assert_eq!(data[10..60], expected_iota(1, 50), "{device}");
        assert!(data[..10].iter().chain(&data[60..]).all(|&v| v == 0), "{device}");
    }
}

#[test]
fn large_dynamic_shared_memory_works() {
    for device in devices() {
        let mut out = device.zeros::<u32>(256).unwrap();
        let args = turn::Args { out: out.tensor_mut(&[256]).unwrap().output() };
        let config = LaunchConfig::new(1, 256).shared(&turn_layout().0);
        device.default_stream().launch(OP, &turn::ENTRY, &config, &args).unwrap();
        assert_eq!(out.to_vec().unwrap(), (0..256).rev().collect::<Vec<u32>>(), "{device}");
    }
}

#[test]
fn cooperative_launches_work() {
    for device in devices() {
        let n = 16;
        let (mut scratch, mut out, mut barrier) =
            (device.zeros::<u32>(n).unwrap(), device.zeros::<u32>(n).unwrap(), device.zeros::<u32>(1).unwrap());
        let args = neighbour::Args {
            scratch: scratch.tensor_mut(&[n as u64]).unwrap().output(),
            out: out.tensor_mut(&[n as u64]).unwrap().output(),
            barrier: barrier.tensor_mut(&[1]).unwrap().output(),
        };
        device.stream().unwrap().launch(OP, &neighbour::ENTRY, &LaunchConfig::new(n as u32, 32).cooperative(), &args).unwrap();
        let expected: Vec<u32> = (0..n as u32).map(|b| (b + 1) % n as u32 + 1).collect();
        assert_eq!(out.to_vec().unwrap(), expected, "{device}");
    }
}

#[test]
fn impossible_configurations_are_refused() {
    for device in devices() {
        let mut out = device.zeros::<u32>(1).unwrap();
        let args = iota::Args { out: out.tensor_mut(&[1]).unwrap().output(), start: 0, step: 0, n: 1 };
        for config in [LaunchConfig::new(1, 256), LaunchConfig::grid([1, 1, 65_536], 128), LaunchConfig::new(1, 0)] {
            let result = device.default_stream().launch(OP, &iota::ENTRY, &config, &args);
            assert!(matches!(result, Err(Error::Value { op: OP, .. })), "{device}, {config:?}: {result:?}");
        }
        // No block, no launch, whatever the rest is.
        device.default_stream().launch(OP, &iota::ENTRY, &LaunchConfig::grid([7, 0, 1], 4096), &args).unwrap();
    }
}

#[test]
fn the_emulator_reports_misuse() {
    for device in [Device::emulator(), Device::emulator().checked()] {
        let mut out = device.zeros::<u32>(100).unwrap();
        let error = run_iota(&device.default_stream(), out.tensor_mut(&[99]).unwrap().output(), 0, 100).unwrap_err();
        let Error::Fault(fault) = &error else { panic!("{error}") };
        assert_eq!((fault.kernel, fault.block, fault.thread), ("host_test__iota", [0; 3], 99), "{error}");
        assert!(fault.at.file().ends_with("launch.rs"), "{error}");
    }
}

#[test]
fn the_checked_emulator_knows_what_was_written() {
    let device = Device::emulator().checked();
    let stream = device.default_stream();
    let mut out = device.zeros::<u32>(1).unwrap();
    let mut touch = |x: &ferrotile::Buffer<u32>| {
        let args = touch::Args { x: x.tensor(&[1]).unwrap().input(), out: out.tensor_mut(&[1]).unwrap().output() };
        stream.launch(OP, &touch::ENTRY, &LaunchConfig::new(1, 32), &args)
    };
    let mut x = device.alloc::<u32>(8).unwrap();
    assert!(matches!(touch(&x), Err(Error::Fault(_))));
    run_iota(&device.default_stream(), x.tensor_mut(&[8]).unwrap().output(), 4, 8).unwrap();
    touch(&x).unwrap();
    touch(&device.zeros(8).unwrap()).unwrap();
    touch(&device.upload(&[1]).unwrap()).unwrap();
    let mut filled = device.alloc::<u32>(8).unwrap();
    device.default_stream().fill(&mut filled.tensor_mut(&[8]).unwrap(), 2).unwrap();
    touch(&filled).unwrap();
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;

    /// The GPU, or nothing and a word about it.
    fn gpu() -> Option<Device> {
        devices().into_iter().find(|device| !device.is_emulator())
    }

    #[test]
    fn a_graph_runs_what_was_captured() {
        let Some(device) = gpu() else { return };
        let stream = device.stream().unwrap();
        let n = 5000;
        let mut out = device.zeros::<u32>(n).unwrap();
        let pointer = out.tensor_mut(&[n as u64]).unwrap().output();
        // An entry of this thread's own, so that its very first launch, with its compilation, is inside of the capture.
        static FIRST: ferrotile_kernels::entry::Entry<iota::Args> = ferrotile_kernels::entry::Entry {
            op: OP,
            name: "host_test__iota",
            max_threads: 128,
            run: |_| (),
            loaded: ferrotile_kernels::entry::Loaded::new(),
        };
        let graph = stream
            .capture(|s| {
                s.launch(OP, &FIRST, &LaunchConfig::new(40, 128), &iota::Args { out: pointer, start: 9, step: 3, n: n as u32 })
            })
            .unwrap();
        assert_eq!(out.to_vec().unwrap(), vec![0; n], "recording must not run anything");
        for _ in 0..3 {
            out.fill_bytes(0).unwrap();
            graph.launch(&stream).unwrap();
            assert_eq!(out.to_vec().unwrap(), expected_iota(9, n as u32));
        }
        let other = graph.launch(&Device::emulator().default_stream());
        assert!(matches!(other, Err(Error::DeviceMismatch { arg: "graph", .. })));
    }

    #[test]
    fn a_failed_capture_leaves_the_stream_usable() {
        let Some(device) = gpu() else { return };
        let stream = device.stream().unwrap();
        let mut out = device.zeros::<u32>(64).unwrap();

        let refused = stream.capture(|_| Err(Error::Unsupported { op: "mine", what: "for the test".to_owned() }));
        assert!(matches!(refused, Err(Error::Unsupported { op: "mine", .. })));
        let copied = stream.capture(|_| device.zeros::<u32>(1).map(drop)).unwrap_err();
        assert!(matches!(copied, Error::Driver { op: "zeros", code: 900, .. }), "{copied}");
        let read = stream.capture(|_| out.to_vec().map(drop)).unwrap_err();
        assert!(matches!(read, Error::Unsupported { op: "to_vec", .. }), "{read}");
        let second = device.stream().unwrap();
        let nested = stream.capture(|_| second.capture(|_| Ok(())).map(drop)).unwrap_err();
        assert!(matches!(nested, Error::Unsupported { op: "capture", .. }), "{nested}");
        let waited = stream.capture(|s| s.synchronize()).unwrap_err();
        assert!(matches!(waited, Error::Driver { op: "synchronize", code: 900, .. }), "{waited}");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.capture(|_| panic!("for the test"))));
        assert!(panicked.is_err());
        assert!(matches!(device.default_stream().capture(|_| Ok(())), Err(Error::Unsupported { op: "capture", .. })));

        // A buffer that is dropped while the thread captures does not spoil the capture.
        let spare = device.zeros::<u32>(64).unwrap();
        let pointer = out.tensor_mut(&[64]).unwrap().output();
        let graph = stream
            .capture(|s| {
                drop(spare);
                run_iota(s, pointer, 2, 64)
            })
            .unwrap();
        graph.launch(&stream).unwrap();
        assert_eq!(out.to_vec().unwrap(), expected_iota(2, 64));
        run_iota(&stream, out.tensor_mut(&[64]).unwrap().output(), 1, 64).unwrap();
        assert_eq!(out.to_vec().unwrap(), expected_iota(1, 64));
    }

    #[test]
    fn driver_errors_say_what_to_do() {
        let Some(device) = gpu() else { return };
        register_ptx(
            "host_test_broken",
            ".version 7.8\n.target sm_90\n.address_size 64\n// entry host_test_broken__broken\nnonsense here\n",
        );
        register_ptx(
            "host_test_future",
            ".version 99.0\n.target sm_90\n.address_size 64\n// entry host_test_future__future\n.visible .entry host_test_future__future(.param .u64 p) { ret; }\n",
        );
        let mut buffer = device.zeros::<u32>(1).unwrap();
        let out = buffer.tensor_mut(&[1]).unwrap().output();
        let (stream, config) = (device.stream().unwrap(), LaunchConfig::new(1, 32));

        let text = |result: Result<()>| {
            let text = result.expect_err("must be refused").to_string();
            eprintln!("{text}");
            assert!(text.starts_with("some_op: "), "{text}");
            text
        };
        let broken = text(stream.launch("some_op", &broken::ENTRY, &config, &broken::Args { out }));
        assert!(broken.contains("CUDA_ERROR_INVALID_PTX (218)") && broken.contains("nonsense"), "{broken}");
        let future = text(stream.launch("some_op", &future::ENTRY, &config, &future::Args { out }));
        assert!(future.contains("CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)") && future.contains("PTX 99.0"), "{future}");
        let absent = text(stream.launch("some_op", &absent::ENTRY, &config, &absent::Args { out }));
        assert!(absent.contains("the PTX of host_test has no kernel host_test__absent"), "{absent}");
        let unknown = text(stream.launch("some_op", &unknown::ENTRY, &config, &unknown::Args { out }));
        assert!(unknown.contains("no PTX of host_test_unknown"), "{unknown}");

        let too_many = LaunchConfig::new(100_000, 32).cooperative();
        let grid =
            text(stream.launch("some_op", &neighbour::ENTRY, &too_many, &neighbour::Args { scratch: out, out, barrier: out }));
        assert!(grid.contains("(720)") && grid.contains("does not fit on the GPU at once"), "{grid}");

        assert!(matches!(device.alloc::<u8>(1 << 50), Err(Error::OutOfMemory { op: "alloc", bytes: 1_125_899_906_842_624, .. })));
        let ordinal = Device::cuda(99).unwrap_err();
        assert!(matches!(ordinal, Error::Value { arg: "ordinal", .. }), "{ordinal}");
        assert!(Device::cuda_count().unwrap() >= 1);
        // None of this has harmed the context.
        run_iota(&stream, out, 4, 1).unwrap();
        assert_eq!(buffer.to_vec().unwrap(), [4]);
    }

    #[test]
    fn many_threads_may_launch() {
        let Some(device) = gpu() else { return };
        std::thread::scope(|scope| {
            for start in 0..16 {
                scope.spawn(move || {
                    let stream = device.stream().unwrap();
                    let mut out = device.alloc::<u32>(10_000).unwrap();
                    for round in 0..20 {
                        run_iota(&stream, out.tensor_mut(&[10_000]).unwrap().output(), start + round, 10_000).unwrap();
                        assert_eq!(out.to_vec().unwrap(), expected_iota(start + round, 10_000));
                        // Others copy, allocate and free while this is captured.
                        let pointer = out.tensor_mut(&[10_000]).unwrap().output();
                        let graph = stream.capture(|s| run_iota(s, pointer, 7 * start, 10_000)).unwrap();
                        graph.launch(&stream).unwrap();
                        assert_eq!(out.to_vec().unwrap(), expected_iota(7 * start, 10_000));
                        drop(device.alloc::<u8>(1000).unwrap());
                    }
                });
            }
        });
    }

    #[test]
    #[ignore = "leaves the GPU's context unusable for the rest of the process"]
    fn a_crashed_kernel_is_reported_where_one_waits() {
        let Some(device) = gpu() else { return };
        let stream = device.stream().unwrap();
        let mut out = device.zeros::<u32>(1).unwrap();
        let args = touch::Args { x: In::new(1 << 60, 4), out: out.tensor_mut(&[1]).unwrap().output() };
        stream.launch(OP, &touch::ENTRY, &LaunchConfig::new(1, 32), &args).unwrap();
        let text = stream.synchronize().unwrap_err().to_string();
        eprintln!("{text}");
        assert!(text.contains("CUDA_ERROR") && text.contains("Device::emulator().checked()"), "{text}");
        // Everything fails from now on, but nothing panics, drops included.
        assert!(out.to_vec().is_err());
    }
}
