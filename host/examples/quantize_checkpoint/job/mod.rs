//! The job: plan the output, quantise one tensor after the other, read the output back and compare.
//!
//! Neither file is ever in memory: matrices are worked on in pieces of some rows. A module of its own, so that the tests
//! (`tests/quantize_checkpoint.rs`) run it too.

pub mod cli;
mod codec;
pub mod error;
pub mod header;
mod plan;
#[path = "../../shared/mod.rs"]
mod shared;
pub mod storage;
pub mod synthetic;
mod table;

use codec::Codec;
use error::{Error, Result, io};
use ferrotile::Device;
use ferrotile::quant::QuantFormat;
use header::{Header, Tensor};
use indicatif::ProgressBar;
use plan::{Plan, Values, metadata, outputs, plan, sf_name};
use std::collections::HashMap;
use std::fmt::{self, Display};
use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::{Create, NewFile, read_at};

/// Weights that share a scale factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// So many rows and columns.
    Of(u32, u32),
    /// A row.
    Row,
}

impl Block {
    /// How many rows.
    pub fn rows(self) -> u32 {
        if let Block::Of(rows, _) = self { rows } else { 1 }
    }

    /// Rows and columns in a matrix of `columns` columns.
    pub fn size(self, columns: u64) -> (u32, u32) {
        match self {
            Block::Of(rows, columns) => (rows, columns),
            // The library refuses a longer row.
            Block::Row => (1, u32::try_from(columns).unwrap_or(u32::MAX)),
        }
    }
}

impl Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Block::Of(rows, columns) => write!(f, "{rows}x{columns}"),
            Block::Row => f.write_str("row"),
        }
    }
}

/// Bytes copied at a time.
const COPY_BYTES: u64 = 8 << 20;

/// What to do.
pub struct Options {
    pub input: PathBuf,
    pub output: PathBuf,
    pub format: QuantFormat,
    pub block: Block,
    /// How many weights are worked on at once: enough to keep the device busy, few enough that the progress bar moves.
    pub piece_values: u64,
}

/// One tensor of the input, done.
pub struct Outcome {
    pub source: Tensor,
    /// Bytes in the output, scale factors included.
    pub bytes_after: u64,
    /// `None` for a tensor that was copied.
    pub quality: Option<Quality>,
}

/// How well a matrix survived, and how long that took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quality {
    /// Sum of the squares of the weights.
    pub signal: f64,
    /// Sum of the squares of the errors.
    pub noise: f64,
    pub max_error: f32,
    /// Time of the quantising launches.
    pub micros: f64,
    /// What they read and wrote.
    pub bytes_moved: u64,
}

impl Quality {
    /// Signal-to-noise ratio; infinite when nothing was lost.
    pub fn snr_db(&self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }

    /// Adds what is known of other values.
    pub fn add(&mut self, other: &Quality) {
        self.signal += other.signal;
        self.noise += other.noise;
        self.max_error = self.max_error.max(other.max_error);
        self.micros += other.micros;
        self.bytes_moved += other.bytes_moved;
    }
}

/// Quantises a file. `stop` may be set at any time, by another thread or a signal; then this returns soon and leaves nothing.
pub fn run(
    options: &Options,
    device: &Device,
    progress: &ProgressBar,
    stop: &AtomicBool,
    create: &Create,
) -> Result<Vec<Outcome>> {
    let path = &options.input;
    let mut input = File::open(path).map_err(io(path, "open it"))?;
    let header = Header::read(&mut input, path)?;
    // One file may have two names. An output that is not there yet is another file.
    if let (Ok(a), Ok(b)) = (fs::canonicalize(path), fs::canonicalize(&options.output))
        && a == b
    {
        return Err(Error::SameFile { path: a });
    }

    let codec = Codec::new(device, options.format, options.block)?;
    let plans = plan(&header);
    let (placed, start) = Header::place(outputs(options, &codec, &plans)?, metadata(options, &header, &plans));
    let mut output = NewFile::create(&options.output, placed.file_bytes(start.len() as u64), create)?;
    output.write_at(0, &start)?;

    // Every byte is read twice: to quantise and to compare.
    progress.set_length(2 * plans.iter().map(|p| p.source.bytes).sum::<u64>());
    let mut job = Job { options, codec, progress, stop, input, output };
    let places = by_name(&placed);
    let timings = plans.iter().map(|p| job.write(p, &places)).collect::<Result<Vec<_>>>()?;
    job.output.sync()?;

    // From here on only what the file says counts.
    let written = Header::read(job.output.storage(), &options.output)?;
    if written != placed {
        return Err(job.differs("its header"));
    }
    let places = by_name(&written);
    let mut outcomes = Vec::with_capacity(plans.len());
    for (plan, timing) in plans.into_iter().zip(timings) {
        outcomes.push(job.read_back(plan, timing, &places)?);
    }
    job.output.finish()?;
    Ok(outcomes)
}

/// Tensors by their names.
type Places<'a> = HashMap<&'a str, &'a Tensor>;

fn by_name(header: &Header) -> Places<'_> {
    header.tensors.iter().map(|t| (t.name.as_str(), t)).collect()
}

/// Everything that working on a tensor needs.
struct Job<'a> {
    options: &'a Options,
    codec: Codec,
    progress: &'a ProgressBar,
    stop: &'a AtomicBool,
    input: File,
    output: NewFile,
}

impl Job<'_> {
    /// Copies or quantises a tensor to its place. Returns the time of the launches and what they moved.
    fn write(&mut self, plan: &Plan, places: &Places<'_>) -> Result<Quality> {
        let Plan { source, values } = plan;
        let place = places[source.name.as_str()];
        let mut timing = Quality::default();
        let (Some(shape), &Some(values)) = (source.matrix(), values) else {
            self.progress.set_message(format!("copying {}", source.name));
            for Range { start, end } in pieces(source.bytes, COPY_BYTES) {
                let data = self.read_input(source, start, end)?;
                self.output.write_at(place.offset + start, &data)?;
                self.done(data.len())?;
            }
            return Ok(timing);
        };

        self.progress.set_message(format!("quantising {}", source.name));
        let sf_place = places[sf_name(&source.name).as_str()];
        for rows in self.row_pieces(shape) {
            let x = self.values(source, values, shape, &rows)?;
            self.check_finite(source, shape, rows.start, &x)?;
            let quantised = self.codec.quantise(&x, shape[1] as usize)?;
            self.output.write_at(place.offset + self.data_bytes(shape, rows.start), &quantised.data)?;
            self.output.write_at(sf_place.offset + self.sf_bytes(shape, rows.start), bytes_of(&quantised.sf).as_slice())?;
            timing.micros += quantised.micros;
            timing.bytes_moved += quantised.bytes_moved;
            self.done(x.len() * values.bytes() as usize)?;
        }
        Ok(timing)
    }

    /// Compares a tensor of the output with the input.
    fn read_back(&mut self, plan: Plan, timing: Quality, places: &Places<'_>) -> Result<Outcome> {
        let Plan { source, values } = plan;
        let place = places[source.name.as_str()];
        let (Some(shape), Some(values)) = (source.matrix(), values) else {
            self.progress.set_message(format!("comparing {}", source.name));
            for Range { start, end } in pieces(source.bytes, COPY_BYTES) {
                let data = self.read_input(&source, start, end)?;
                if data != self.read_output(place, start, end)? {
                    return Err(self.differs(&source.name));
                }
                self.done(data.len())?;
            }
            return Ok(Outcome { bytes_after: place.bytes, source, quality: None });
        };

        self.progress.set_message(format!("dequantising {}", source.name));
        let sf_place = places[sf_name(&source.name).as_str()];
        let mut quality = timing;
        for rows in self.row_pieces(shape) {
            let x = self.values(&source, values, shape, &rows)?;
            let [start, end] = [rows.start, rows.end].map(|row| self.data_bytes(shape, row));
            let data = self.read_output(place, start, end)?;
            let [start, end] = [rows.start, rows.end].map(|row| self.sf_bytes(shape, row));
            let sf = Values::F32.decode(&self.read_output(sf_place, start, end)?);
            let y = self.codec.dequantise(&data, &sf, (rows.end - rows.start) as usize, shape[1] as usize)?;
            quality.compare(&x, &y);
            self.done(x.len() * values.bytes() as usize)?;
        }
        Ok(Outcome { bytes_after: place.bytes + sf_place.bytes, source, quality: Some(quality) })
    }

    /// Pieces of a matrix: ranges of rows that start where a scaling block starts. A matrix without columns has none.
    fn row_pieces(&self, [rows, columns]: [u64; 2]) -> impl Iterator<Item = Range<u64>> + use<> {
        let block_rows = self.options.block.rows() as u64;
        let fitting = self.options.piece_values.checked_div(columns).unwrap_or(0) / block_rows * block_rows;
        pieces(if columns == 0 { 0 } else { rows }, fitting.max(block_rows))
    }

    /// Bytes of data before a row.
    fn data_bytes(&self, [_, columns]: [u64; 2], row: u64) -> u64 {
        row * self.codec.data_columns(columns)
    }

    /// Bytes of scale factors before a row, which starts or ends a scaling block.
    fn sf_bytes(&self, [_, columns]: [u64; 2], row: u64) -> u64 {
        let [rows, columns] = self.codec.sf_shape([row, columns]);
        4 * rows * columns
    }

    /// Weights of some rows as f32.
    fn values(&mut self, source: &Tensor, values: Values, [_, columns]: [u64; 2], rows: &Range<u64>) -> Result<Vec<f32>> {
        let [start, end] = [rows.start, rows.end].map(|row| row * columns * values.bytes());
        Ok(values.decode(&self.read_input(source, start, end)?))
    }

    fn check_finite(&self, source: &Tensor, [_, columns]: [u64; 2], first_row: u64, x: &[f32]) -> Result<()> {
        let Some(i) = x.iter().position(|x| !x.is_finite()) else { return Ok(()) };
        let (row, column) = (first_row + i as u64 / columns, i as u64 % columns);
        Err(Error::NotFinite { path: self.options.input.clone(), tensor: source.name.clone(), row, column, value: x[i] })
    }

    fn read_input(&mut self, t: &Tensor, start: u64, end: u64) -> Result<Vec<u8>> {
        read_at(&mut self.input, &self.options.input, t.offset + start, end - start)
    }

    fn read_output(&mut self, t: &Tensor, start: u64, end: u64) -> Result<Vec<u8>> {
        read_at(self.output.storage(), &self.options.output, t.offset + start, end - start)
    }

    fn differs(&self, what: &str) -> Error {
        Error::ReadBack { path: self.options.output.clone(), what: what.to_owned() }
    }

    /// Some bytes of the input are done with. The place where the job can be stopped.
    fn done(&self, bytes: usize) -> Result<()> {
        self.progress.inc(bytes as u64);
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

impl Quality {
    /// Adds the errors of some weights.
    fn compare(&mut self, weights: &[f32], decoded: &[f32]) {
        for (&x, &y) in weights.iter().zip(decoded) {
            let error = x - y;
            self.signal += f64::from(x) * f64::from(x);
            self.noise += f64::from(error) * f64::from(error);
            self.max_error = self.max_error.max(error.abs());
        }
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Cuts `0..len` into ranges of at most `step`.
fn pieces(len: u64, step: u64) -> impl Iterator<Item = Range<u64>> {
    (0..len.div_ceil(step)).map(move |i| i * step..len.min((i + 1) * step))
}
