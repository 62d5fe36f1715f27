//! The part that uses the library: values to the device, one launch, results back.

use super::Block;
use super::error::Result;
use ferrotile::quant::{Format, Input, Sf, SfLayout, SfMut, cast_back, per_block_cast, per_token_cast, sf_shape};
use ferrotile::{Device, Event, Stream, TensorMut, TensorRef};
use std::borrow::Cow;

/// The casts take a hidden size that is a multiple of this. Other matrices get columns of zeros on the way in, which change
/// neither the scale factors nor the other values, and lose them on the way out.
const COLUMN_MULTIPLE: usize = 64;

/// DeepSeek's checkpoints have f32 scale factors, row by row.
const LAYOUT: SfLayout = SfLayout::RowMajor;

/// Quantises to one format and back.
pub struct Codec {
    stream: Stream,
    format: Format,
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
    pub fn new(device: &Device, format: Format, block: Block) -> Result<Self> {
        let codec = Self { stream: device.stream()?, format, block };
        // The first launch of a kernel compiles it for the GPU. That is no part of a tensor's throughput.
        codec.quantise(&[0.0; COLUMN_MULTIPLE], COLUMN_MULTIPLE)?;
        Ok(codec)
    }

    /// Type of the data in a safetensors file; FP4 has none there that readers agree on.
    pub fn data_dtype(&self) -> &'static str {
        match self.format {
            Format::E4m3 => "F8_E4M3",
            Format::E2m1 => "I8",
        }
    }

    /// Bytes in a row of data. An odd last FP4 value has a byte of its own, whose upper half is 0.
    pub fn data_columns(&self, columns: u64) -> u64 {
        match self.format {
            Format::E4m3 => columns,
            Format::E2m1 => columns.div_ceil(2),
        }
    }

    /// Rows and columns of the scale factors of a matrix.
    pub fn sf_shape(&self, [rows, columns]: [u64; 2]) -> [u64; 2] {
        sf_shape(rows, columns, self.block, LAYOUT).shape
    }

    /// Quantises rows of `columns` values.
    pub fn quantise(&self, values: &[f32], columns: usize) -> Result<Quantised> {
        let device = self.stream.device();
        let size = self.padded(values.len() / columns, columns);

        let x = device.upload(&with_columns(Cow::Borrowed(values), columns, size.hidden as usize))?;
        let mut data = device.alloc::<u8>((size.rows * size.data_columns) as usize)?;
        let mut sf = device.alloc::<f32>((size.sf[0] * size.sf[1]) as usize)?;
        let (start, end) = (Event::new(device)?, Event::new(device)?);
        start.record(&self.stream)?;
        self.cast(
            x.tensor(&[size.rows, size.hidden])?,
            data.tensor_mut(&[size.rows, size.data_columns])?.reinterpret(self.format.dtype())?,
            SfMut { tensor: sf.tensor_mut(&size.sf)?, layout: LAYOUT },
        )?;
        end.record(&self.stream)?;
        let micros = end.elapsed_us_since(&start)?;

        let (data, sf) = (data.to_vec()?, sf.to_vec()?);
        let bytes_moved = (4 * x.len() + data.len() + 4 * sf.len()) as u64;
        let data = with_columns(Cow::Owned(data), size.data_columns as usize, self.data_columns(columns as u64) as usize);
        let sf = with_columns(Cow::Owned(sf), size.sf[1] as usize, self.sf_shape([size.rows, columns as u64])[1] as usize);
        Ok(Quantised { data: data.into_owned(), sf: sf.into_owned(), micros, bytes_moved })
    }

    /// The values that data and scale factors of `rows` rows of `columns` values stand for.
    pub fn dequantise(&self, data: Vec<u8>, sf: Vec<f32>, rows: usize, columns: usize) -> Result<Vec<f32>> {
        let device = self.stream.device();
        let size = self.padded(rows, columns);
        let (data_columns, sf_columns) = (data.len() / rows, self.sf_shape([size.rows, columns as u64])[1]);

        let data = device.upload(&with_columns(Cow::Owned(data), data_columns, size.data_columns as usize))?;
        let sf = device.upload(&with_columns(Cow::Owned(sf), sf_columns as usize, size.sf[1] as usize))?;
        let mut out = device.alloc::<f32>((size.rows * size.hidden) as usize)?;
        self.cast_back(
            data.tensor(&[size.rows, size.data_columns])?.reinterpret(self.format.dtype())?,
            Sf { tensor: sf.tensor(&size.sf)?, layout: LAYOUT },
            out.tensor_mut(&[size.rows, size.hidden])?,
        )?;
        self.stream.synchronize()?;
        Ok(with_columns(Cow::Owned(out.to_vec()?), size.hidden as usize, columns).into_owned())
    }

    /// One launch. The scales of DeepSeek's checkpoints are exact quotients, not rounded to powers of two.
    fn cast(&self, x: TensorRef<'_>, out: TensorMut<'_>, sf: SfMut<'_>) -> Result<()> {
        let (block, round_sf) = (self.block, false);
        if block.0 == 1 {
            let args = per_token_cast::Args { x: Input::Plain(x), npc: block.1, round_sf, stochastic: false, out, sf };
            Ok(per_token_cast::per_token_cast(&self.stream, args)?)
        } else {
            Ok(per_block_cast::per_block_cast(&self.stream, per_block_cast::Args { x, block, round_sf, out, sf })?)
        }
    }

    /// One launch back.
    fn cast_back(&self, x: TensorRef<'_>, sf: Sf<'_>, out: TensorMut<'_>) -> Result<()> {
        Ok(cast_back::cast_back(&self.stream, cast_back::Args { x, sf, block: self.block, out })?)
    }

    /// Sizes on the device.
    fn padded(&self, rows: usize, columns: usize) -> Size {
        let (rows, hidden) = (rows as u64, columns.next_multiple_of(COLUMN_MULTIPLE) as u64);
        Size { rows, hidden, data_columns: self.format.columns(hidden), sf: self.sf_shape([rows, hidden]) }
    }
}

/// Sizes on the device, with the columns that were added.
struct Size {
    rows: u64,
    hidden: u64,
    data_columns: u64,
    sf: [u64; 2],
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
