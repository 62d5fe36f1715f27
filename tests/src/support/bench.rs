//! The benchmark: one row per op and case, timed the way the peers are timed.
//!
//! Method (`../shared/peer/README.md`): a 512 MiB buffer is zeroed before every call, so inputs start outside L2 and the host runs
//! ahead of the device; an event is recorded on either side of the call; the median counts, of what takes less than 20 us with its
//! tensors in three places. What an empty pair of events reads, and the time of a 1 GiB copy, are rows of the same run.

use super::bytes::gbs;
use super::suite::{Filter, ptx_sha, text};
use ferrotile::{BareLaunch, Buffer, Device, Event, LaunchWay, Stream};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Launches an op once on the stream.
pub type Launch = Box<dyn FnMut(&Stream) -> ferrotile::Result<()>>;

/// One line of the benchmark.
pub struct Row {
    /// Name of the op.
    pub op: &'static str,
    /// The case, spelled as the peers spell it: `key=value` in alphabetical order, joined by commas.
    pub case: String,
    /// Bytes that must move: every input and output once.
    pub bytes: u64,
    /// Allocates and fills the tensors and returns what launches the op.
    #[allow(clippy::type_complexity)]
    pub build: Box<dyn Fn(&Device, &Stream) -> Result<Launch, String>>,
}

/// A result, as it stands in the JSON file.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Name of the op.
    pub op: String,
    /// The case.
    pub case: String,
    /// Median time of a call in microseconds.
    pub us: f64,
    /// Bytes over time; absent where bytes mean nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbs: Option<f64>,
    /// Fastest and slowest call in microseconds.
    pub spread: [f64; 2],
    /// Device name.
    pub device: String,
    /// Driver version.
    pub driver: String,
    /// SHA-256 of the op's PTX.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ptx_sha: Option<String>,
}

/// Rows that are several ops in one graph. They have no kernel of their own to launch for the first time.
pub const LAYERS: &[&str] = &["moe_layer"];

/// Times rows on one device.
pub struct Bench {
    device: Device,
    stream: Stream,
    /// The default stream, on which the peers are timed: a call on another one reads 0.1 us more.
    timed: Stream,
    flush: Buffer<u8>,
    repeats: usize,
    building: Duration,
}

/// Zeroed before every call; ten times an H100's L2.
const FLUSH_BYTES: usize = 512 << 20;
const REPEATS: usize = 31;
/// Rows that take less are timed in [`PLACES`] places. Which half of L2 and which channels of memory the first lines are in is worth 0.1 to
/// 0.5 us of 4; tensors of all rows start at the same address if nothing else is allocated, and all would have the same luck.
const SHORT_US: f64 = 20.0;
const PLACES: usize = 3;

impl Bench {
    /// On a GPU with the method above; on the emulator with a few calls and nothing to flush.
    pub fn new(device: &Device) -> Result<Self, String> {
        let (flush, repeats) = if device.is_emulator() { (0, 3) } else { (FLUSH_BYTES, REPEATS) };
        let stream = device.stream().map_err(text)?;
        let timed = device.default_stream();
        Ok(Self { device: *device, stream, timed, flush: device.alloc(flush).map_err(text)?, repeats, building: Duration::ZERO })
    }

    fn line(&self, op: &str, case: &str, bytes: u64, mut times: Vec<f64>) -> Line {
        times.sort_by(f64::total_cmp);
        let us = times[times.len() / 2];
        let round = |us: f64| (us * 100.0).round() / 100.0;
        Line {
            op: op.to_owned(),
            case: case.to_owned(),
            us: round(us),
            gbs: (bytes > 0).then(|| gbs(bytes, us).round()),
            spread: [round(times[0]), round(times[times.len() - 1])],
            device: self.device.name(),
            driver: self.device.driver_version(),
            ptx_sha: if self.device.is_emulator() { None } else { ptx_sha(op) },
        }
    }

    /// Times of the calls of `launch`, each with a cold L2.
    fn measure(&mut self, launch: &mut dyn FnMut(&Stream) -> ferrotile::Result<()>) -> ferrotile::Result<Vec<f64>> {
        for _ in 0..2 {
            launch(&self.timed)?;
        }
        self.timed.synchronize()?;
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        let mut times = Vec::with_capacity(self.repeats);
        for _ in 0..self.repeats {
            let len = self.flush.len() as u64;
            self.timed.memset_zero(&mut self.flush.tensor_mut(&[len])?)?;
            start.record(&self.timed)?;
            launch(&self.timed)?;
            end.record(&self.timed)?;
            self.timed.synchronize()?;
            times.push(end.elapsed_us_since(&start)?);
        }
        Ok(times)
    }

    /// What an empty pair of events reads, and a copy of 1 GiB.
    pub fn limits(&mut self) -> Result<Vec<Line>, String> {
        let empty = self.measure(&mut |_| Ok(())).map_err(text)?;
        let mut lines = vec![self.line("events", "", 0, empty)];
        let bytes = if self.device.is_emulator() { 64 << 20 } else { 1usize << 30 };
        let from: Buffer<u8> = self.device.zeros(bytes).map_err(text)?;
        let mut to: Buffer<u8> = self.device.alloc(bytes).map_err(text)?;
        let times = self.measure(&mut |stream| {
            let len = bytes as u64;
            stream.copy(&mut to.tensor_mut(&[len])?, &from.tensor(&[len])?)
        });
        lines.push(self.line(
            "copy",
            if self.device.is_emulator() { "bytes=64MiB" } else { "bytes=1GiB" },
            2 * bytes as u64,
            times.map_err(text)?,
        ));
        Ok(lines)
    }

    /// What rows took so far to be built: the inputs, mostly.
    pub fn building(&self) -> Duration {
        self.building
    }

    /// Allocate and fill the tensors of a row.
    pub fn build(&mut self, row: &Row) -> Result<Launch, String> {
        let start = Instant::now();
        let launch = (row.build)(&self.device, &self.stream)?;
        self.stream.synchronize().map_err(text)?;
        self.building += start.elapsed();
        Ok(launch)
    }

    /// Time one row; a short one with its tensors in several places.
    pub fn row(&mut self, row: &Row) -> Result<Line, String> {
        let mut times = Vec::new();
        for place in 0..PLACES {
            // Moves tensors that share a page of the driver's, and those that do not.
            let spacers = [300_000, 3 << 20].map(|bytes| self.device.alloc::<u8>(place * bytes));
            let mut launch = self.build(row)?;
            times.extend(self.measure(&mut launch).map_err(text)?);
            drop((launch, spacers));
            let us = times.iter().sum::<f64>() / times.len() as f64;
            if self.device.is_emulator() || us > SHORT_US {
                break;
            }
        }
        Ok(self.line(row.op, &row.case, row.bytes, times))
    }

    /// The first launch of an op in this process, driver JIT included. Then the host time of a launch through the launcher, of the bare
    /// driver call with the same arguments, and the difference: the launcher's own share. For these `small`, a row that keeps the device
    /// busy for less time: twenty thousand launches a row are most of what a run takes otherwise.
    pub fn first_launch(&mut self, row: &Row, small: &Row) -> Result<Vec<Line>, String> {
        let mut launch = self.build(row)?;
        let start = Instant::now();
        launch(&self.stream).map_err(text)?;
        let submitted = start.elapsed().as_secs_f64() * 1e6;
        self.stream.synchronize().map_err(text)?;
        let case = format!("op={}", row.op);
        let mut lines = vec![self.line("first_launch", &case, 0, vec![submitted])];
        launch = self.build(small)?;
        launch(&self.stream).map_err(text)?;
        self.stream.synchronize().map_err(text)?;
        if self.device.is_emulator() {
            let times = (0..self.repeats).map(|_| self.burst(1, &mut launch)).collect::<Result<_, _>>()?;
            lines.push(self.line("host_time_of_a_launch", &case, 0, times));
            return Ok(lines);
        }
        // SAFETY: what the row built lives as long as its launch, and nothing else runs.
        let bare = unsafe { BareLaunch::record(&self.stream, &mut launch) };
        let mut bare = bare.map_err(text)?;
        let (mut ours, mut drivers, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..BURSTS {
            // One after the other, so that whatever slows the machine down slows both down.
            ours.push(self.burst(BURST, &mut launch)?);
            bare.wait().map_err(text)?;
            drivers.push(driver_burst(&mut bare, LaunchWay::Call)?);
            added.push(ours[ours.len() - 1] - drivers[drivers.len() - 1]);
        }
        for (op, times) in
            [("host_time_of_a_launch", ours), ("host_time_of_the_driver_call", drivers), ("host_time_of_the_launcher", added)]
        {
            lines.push(self.line(op, &case, 0, times));
        }
        Ok(lines)
    }

    /// How long the driver compiles each kernel that a filter chooses, the longest first: the first launch takes that and little more.
    pub fn compile_times(&self, filters: &[Filter]) -> Result<Vec<Line>, String> {
        let mut times = self.device.compile_times().map_err(text)?;
        times.retain(|(name, _)| filters.is_empty() || filters.iter().any(|filter| filter.entry(name)));
        times.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(times.into_iter().map(|(name, us)| self.line("compile", &format!("entry={name}"), 0, vec![us])).collect())
    }

    /// Host time of one of `n` launches in microseconds.
    fn burst(&self, n: u32, launch: &mut Launch) -> Result<f64, String> {
        let start = Instant::now();
        for _ in 0..n {
            launch(&self.stream).map_err(text)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(n))
    }

    /// The ways to call the driver beside each other, in host time per launch of the row's kernel.
    pub fn launch_lab(&mut self, row: &Row) -> Result<Vec<Line>, String> {
        let mut launch = (row.build)(&self.device, &self.stream)?;
        launch(&self.stream).map_err(text)?;
        // SAFETY: as in `first_launch`.
        let mut bare = unsafe { BareLaunch::record(&self.stream, &mut launch) }.map_err(text)?;
        let mut times = vec![Vec::new(); LaunchWay::ALL.len() + 1];
        for _ in 0..BURSTS {
            bare.wait().map_err(text)?;
            times[0].push(self.burst(BURST, &mut launch)?);
            for (way, times) in LaunchWay::ALL.into_iter().zip(&mut times[1..]) {
                bare.wait().map_err(text)?;
                times.push(driver_burst(&mut bare, way)?);
            }
        }
        bare.wait().map_err(text)?;
        let ways = std::iter::once("Launcher".to_owned()).chain(LaunchWay::ALL.iter().map(|way| format!("{way:?}")));
        let params = bare.num_params();
        Ok(ways
            .zip(times)
            .map(|(way, times)| self.line("launch_lab", &format!("op={},params={params},way={way}", row.op), 0, times))
            .collect())
    }
}

/// Launches that the queue takes without filling: what is timed is the host's work, and one look at the clock a burst.
const BURST: u32 = 32;
const BURSTS: usize = 301;

/// Host time of one launch in microseconds.
fn driver_burst(bare: &mut BareLaunch, way: LaunchWay) -> Result<f64, String> {
    let start = Instant::now();
    bare.burst(way, BURST).map_err(text)?;
    let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(BURST);
    bare.wait().map_err(text)?;
    Ok(us)
}
