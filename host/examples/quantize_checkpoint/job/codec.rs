//! The part that uses the library: values to the device, one launch, results back.

use super::Block;
use super::error::{Error, Result};
use ferrotile::quant::{QuantFormat, QuantSpec, QuantTensor, SfLayout};
use ferrotile::{Device, Event, Stream};
use std::borrow::Cow;

/// Some of the casts take a hidden size that is a multiple of this. Other matrices get columns of zeros on the way in, which change
/// neither the scale factors nor the other values, and lose them on the way out.
const COLUMN_MULTIPLE: usize = 64;

/// DeepSeek's checkpoints have f32 scale factors, row by row.
const LAYOUT: SfLayout = SfLayout::RowMajor;

/// Blocks that the library can quantise to a format, the usual one first.
pub fn blocks(format: QuantFormat) -> &'static [Block] {
    const BLOCKS: [Block; 5] = [Block::Of(128, 128), Block::Of(1, 128), Block::Of(1, 32), Block::Row, Block::Of(128, 1)];
    match format {
        QuantFormat::E4m3 => &BLOCKS,
        // A scale for each channel is for operands of FP8 matrix products.
        QuantFormat::E2m1 => BLOCKS.split_at(4).0,
        QuantFormat::E5m6 => &[Block::Row],
    }
}

/// Refuses what no op of the library does.
pub fn check(format: QuantFormat, block: Block) -> Result<()> {
    let allowed = blocks(format);
    if allowed.contains(&block) {
        return Ok(());
    }
    let allowed = allowed.iter().map(Block::to_string).collect::<Vec<_>>().join(", ");
    Err(Error::Block { format, block, allowed })
}

/// Quantises to one format and back.
pub struct Codec {
    stream: Stream,
    format: QuantFormat,
    block: Block,
}

/// Some rows of a matrix, quantised.
pub struct Quantised {
    /// Rows of [`Codec::data_columns`] bytes.
    pub data: Vec<u8>,
    /// One f32 for each scaling block, row by row.
    pub sf: Vec<f32>,
    /// Time of the launch on the device.
    pub micros: f64,
    /// What the launch read and wrote.
    pub bytes_moved: u64,
}

impl Codec {
    /// A codec that runs on `device`.
    pub fn new(device: &Device, format: QuantFormat, block: Block) -> Result<Self> {
        check(format, block)?;
        let codec = Self { stream: device.stream()?, format, block };
        // The first launch of a kernel compiles it for the GPU. That is no part of a tensor's throughput.
        codec.quantise(&[0.0; COLUMN_MULTIPLE], COLUMN_MULTIPLE)?;
        Ok(codec)
    }

    /// Type of the data in a safetensors file; FP4 and e5m6 have none there that readers agree on.
    pub fn data_dtype(&self) -> &'static str {
        match self.format {
            QuantFormat::E4m3 => "F8_E4M3",
            QuantFormat::E2m1 => "I8",
            QuantFormat::E5m6 => "U8",
        }
    }

    /// Bytes in a row of data, filled up with zeros to values that are stored together: two of FP4 in a byte, eight of e5m6 in twelve.
    pub fn data_columns(&self, columns: u64) -> u64 {
        self.format.columns(columns.next_multiple_of(self.format.channels_together()))
    }

    /// Rows and columns of the scale factors of a matrix.
    pub fn sf_shape(&self, [rows, columns]: [u64; 2]) -> [u64; 2] {
        self.spec(columns).sf_shape(rows, columns).shape
    }

    /// Quantises rows of `columns` values.
    pub fn quantise(&self, values: &[f32], columns: usize) -> Result<Quantised> {
        let device = self.stream.device();
        let (rows, hidden) = ((values.len() / columns) as u64, padded(columns));
        let x = device.upload(&with_columns(Cow::Borrowed(values), columns, hidden as usize))?;
        let mut q = QuantTensor::alloc(device, self.spec(hidden), rows, hidden)?;
        let (start, end) = (Event::new(device)?, Event::new(device)?);
        start.record(&self.stream)?;
        // The scales of DeepSeek's checkpoints are exact quotients, not rounded to powers of two.
        q.quantise(&self.stream, x.tensor(&[rows, hidden])?, false)?;
        end.record(&self.stream)?;
        let micros = end.elapsed_us_since(&start)?;

        let (data, sf) = (q.data_to_vec()?, q.scales_to_vec()?);
        let bytes_moved = (4 * x.len() + data.len() + 4 * sf.len()) as u64;
        let [data_from, data_to] = [hidden, columns as u64].map(|columns| self.data_columns(columns) as usize);
        let [sf_from, sf_to] = [hidden, columns as u64].map(|columns| self.sf_shape([rows, columns])[1] as usize);
        let (data, sf) = (with_columns(Cow::Owned(data), data_from, data_to), with_columns(Cow::Owned(sf), sf_from, sf_to));
        Ok(Quantised { data: data.into_owned(), sf: sf.into_owned(), micros, bytes_moved })
    }

    /// The values that data and scale factors of `rows` rows of `columns` values stand for.
    pub fn dequantise(&self, data: &[u8], sf: &[f32], rows: usize, columns: usize) -> Result<Vec<f32>> {
        let device = self.stream.device();
        let (rows, hidden) = (rows as u64, padded(columns));
        let [data_from, data_to] = [columns as u64, hidden].map(|columns| self.data_columns(columns) as usize);
        let [sf_from, sf_to] = [columns as u64, hidden].map(|columns| self.sf_shape([rows, columns])[1] as usize);
        let data = with_columns(Cow::Borrowed(data), data_from, data_to);
        let sf = with_columns(Cow::Borrowed(sf), sf_from, sf_to);

        let q = QuantTensor::from_host(device, self.spec(hidden), rows, hidden, &data, &sf)?;
        let mut out = device.alloc::<f32>((rows * hidden) as usize)?;
        q.cast_back(&self.stream, out.tensor_mut(&[rows, hidden])?)?;
        self.stream.synchronize()?;
        Ok(with_columns(Cow::Owned(out.to_vec()?), hidden as usize, columns).into_owned())
    }

    /// How matrices of `columns` columns are quantised.
    fn spec(&self, columns: u64) -> QuantSpec {
        QuantSpec { format: self.format, block: self.block.size(columns), layout: LAYOUT }
    }
}

/// Columns on the device.
fn padded(columns: usize) -> u64 {
    columns.next_multiple_of(COLUMN_MULTIPLE) as u64
}

/// The same rows with `to` columns: cut, or filled up with zeros.
fn with_columns<T: Copy + Default>(rows: Cow<'_, [T]>, from: usize, to: usize) -> Cow<'_, [T]> {
    if from == to {
        return rows;
    }
    let kept = from.min(to);
    let mut out = vec![T::default(); rows.len() / from * to];
    for (out, row) in out.chunks_exact_mut(to).zip(rows.chunks_exact(from)) {
        out[..kept].copy_from_slice(&row[..kept]);
    }
    Cow::Owned(out)
}
