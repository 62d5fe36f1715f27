//! What a launch costs on the host. Alone in its file, because tests of one file run at the same time and disturb each other.
#![cfg(feature = "cuda")]

use ferrotile::{Device, Event, register_ptx};
use ferrotile_kernels::device::{LaunchConfig, Out, block_idx_x, thread_idx};
use ferrotile_kernels::kernel;
use std::time::{Duration, Instant};

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

#[test]
fn launches_cost_little_host_time() {
    register_ptx("host_test", include_str!("launch.ptx"));
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(reason) => return eprintln!("GPU: skipped ({reason})"),
    };
    let stream = device.stream().unwrap();
    let mut out = device.zeros::<u32>(128).unwrap();
    let args = iota::Args { out: out.tensor_mut(&[128]).unwrap().output(), start: 0, step: 3, n: 128 };
    let launch = || stream.launch("host_test", &iota::ENTRY, &LaunchConfig::new(1, 128), &args).unwrap();

    let start = Instant::now();
    launch();
    let first = start.elapsed();
    stream.synchronize().unwrap();

    // Short bursts: a full queue would make the driver wait for the GPU. The best burst is the cost without interruptions.
    let burst = || {
        let start = Instant::now();
        (0..50).for_each(|_| launch());
        let time = start.elapsed() / 50;
        stream.synchronize().unwrap();
        time
    };
    let later = (0..50).map(|_| burst()).min().unwrap();

    let (begin, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    begin.record(&stream).unwrap();
    launch();
    end.record(&stream).unwrap();
    let device_us = end.elapsed_us_since(&begin).unwrap();

    let (name, driver, sms) = (device.name(), device.driver_version(), device.num_sms());
    eprintln!(
        "{name}, driver {driver}, {sms} SMs: first launch {first:?}, later ones {later:?}, {device_us:.1} us between events"
    );
    assert!(first < Duration::from_millis(100), "{first:?}");
    assert!(later < Duration::from_micros(5), "{later:?}");
    assert!((0.1..10_000.0).contains(&device_us), "{device_us}");
}
