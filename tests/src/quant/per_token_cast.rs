//! Reference, cases, checks and benchmark rows of `per_token_cast` and its two variants.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, TOKENS, rows_apart};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_token_cast::{self as op, Args, PrecomputedArgs, SfOnlyArgs};
use ferrotile::quant::{Format, Input, Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E2m1x2, E4m3, Stream, TensorMut, TensorRef, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_token_cast", run };

// The reference.

/// Values on their way into a cast: `value * scale`, with one scale for a block `(npt, npc)`; 1 for plain input.
#[derive(Clone, Debug)]
pub(super) struct Values {
    pub(super) values: Vec<f32>,
    pub(super) hidden: usize,
    scales: Option<BlockScales>,
}

#[derive(Clone, Debug)]
pub(super) struct BlockScales {
    sf: Vec<f32>,
    block: (u32, u32),
}

/// Data as bytes, row by row, and scales `(T, K)`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Quantised {
    pub(super) data: Vec<u8>,
    pub(super) sf: Vec<f32>,
}

/// Largest value of a format, and the smallest `amax`.
pub(super) fn limits(format: Format) -> (f32, f32) {
    match format {
        Format::E4m3 => (448.0, f32::from_bits(0x38D1_B717)),
        Format::E2m1 => (6.0, f32::from_bits(0x01C0_0000)),
    }
}

/// How scales are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    Exact,
    Powers,
    E4m3,
}

impl Rule {
    fn of(round_sf: bool, layout: SfLayout) -> Self {
        match (round_sf, layout.is_e4m3()) {
            (_, true) => Rule::E4m3,
            (true, _) => Rule::Powers,
            (false, _) => Rule::Exact,
        }
    }
}

/// The stored scale, and what the data are multiplied by.
fn scale(amax: f32, format: Format, rule: Rule) -> (f32, f32) {
    let (largest, amax_min) = limits(format);
    if rule == Rule::E4m3 {
        // 0.875 for e4m3, 0.01171875 for e2m1.
        let sf = decode_e4m3(encode_e4m3(amax.max(largest * 2f32.powi(-9)) / largest));
        return (sf, 1.0 / sf);
    }
    let c = amax.max(amax_min);
    let s = c / largest;
    if rule == Rule::Exact {
        return (s, largest / c);
    }
    // The next power of two, by the exponent field: positive normal numbers only come here.
    let exponent = s.to_bits() >> 23;
    let sf = f32::from_bits(if s.to_bits() & 0x7F_FFFF == 0 { exponent << 23 } else { (exponent + 1) << 23 });
    (sf, 1.0 / sf)
}

/// e4m3 by counting steps: 2^-9 below 2^-6, else an eighth of the binade.
pub(super) fn encode_e4m3(v: f32) -> u8 {
    if v.is_nan() {
        return 0x7F;
    }
    let sign = (v.to_bits() >> 24) as u8 & 0x80;
    if v.abs() >= 448.0 {
        return sign | 0x7E;
    }
    let binade = ((v.to_bits() >> 23 & 0xFF) as i32 - 127).max(-6);
    // `powi` is slow, and so is `round_ties_even`, a call on older processors; the grids have billions of values. Around 2^23 the
    // neighbours of an f32 are whole numbers.
    let per_unit = f32::from_bits(((127 + 3 - binade) as u32) << 23);
    let steps = (v.abs() * per_unit + 8_388_608.0 - 8_388_608.0) as i32;
    sign | ((binade + 6) * 8 + steps) as u8
}

/// e2m1 by the decision points of the specification; the inputs here have positive NaNs only.
fn encode_e2m1(v: f32) -> u8 {
    if v.is_nan() {
        return 7;
    }
    let a = v.abs();
    let code = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    code | if v.is_sign_negative() { 8 } else { 0 }
}

/// Products of NaN have these bits on a GPU.
fn bits_of_product(v: f32) -> u32 {
    if v.is_nan() { 0x7FFF_FFFF } else { v.to_bits() }
}

/// The two random words of four values, given by their bits: the hash of quant.md 6.3.
pub(super) fn random_words(v: [u32; 4], quad: u32) -> [u32; 2] {
    let factors = [0x5671_D42Bu32, 0x9995_E499, 0xACE1_B8A5, 0xE153_538D];
    let mut h = factors.iter().zip(v).fold(quad, |h, (f, v)| h.wrapping_add(f.wrapping_mul(v)));
    h ^= h >> 23;
    h = h.wrapping_mul(0x7FEB_352D);
    h ^= h >> 16;
    [0x846C_A68Bu32, 0xD35A_2D97].map(|f| h.wrapping_mul(f)).map(|r| r ^ (r >> 11))
}

/// The neighbour of `v` that 16 random bits choose, in a format whose binades from `2^smallest_binade` on have `steps` values: a random
/// part of a spacing is added, and the rest cut off. May be the first value beyond `largest`.
pub(super) fn neighbour(v: f32, bits: u16, largest: f32, smallest_binade: i32, steps: f64) -> f32 {
    if v.is_nan() {
        return v;
    }
    let a = v.abs().min(largest);
    let binade = ((a.to_bits() >> 23) as i32 - 127).max(smallest_binade);
    let spacing = f64::from_bits(((1023 + binade) as u64) << 52) / steps;
    // Cut off by going through an integer.
    (((a as f64 / spacing + bits as f64 / 65536.0) as u64 as f64 * spacing) as f32).copysign(v)
}

/// Codes of four values, rounded stochastically.
pub(super) fn round_stochastically(v: &[f32], quad: u32, format: Format) -> [u8; 4] {
    let r = random_words(std::array::from_fn(|i| bits_of_product(v[i])), quad)[0];
    let bits = [r as u16, (r as u16).reverse_bits(), (r >> 16) as u16, ((r >> 16) as u16).reverse_bits()];
    let (largest, smallest_binade, steps) = match format {
        Format::E4m3 => (448.0, -6, 8.0),
        Format::E2m1 => (6.0, 0, 2.0),
    };
    std::array::from_fn(|i| {
        let value = neighbour(v[i], bits[i], largest, smallest_binade, steps);
        // A value of the format by now, or the first one beyond it, so there is nothing to round.
        if format == Format::E4m3 { encode_e4m3(value) } else { encode_e2m1(value) }
    })
}

pub(super) fn decode_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
    let magnitude = match (exponent, code & 0x7F) {
        (_, 0x7F) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

fn decode_e2m1(code: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][(code & 7) as usize];
    if code & 8 != 0 { -magnitude } else { magnitude }
}

/// The values that data of a format stand for, without their scales.
pub(super) fn decode(data: &[u8], format: Format) -> Vec<f32> {
    match format {
        Format::E4m3 => {
            let values: [f32; 256] = std::array::from_fn(|code| decode_e4m3(code as u8));
            data.par_iter().map(|c| values[*c as usize]).collect()
        }
        Format::E2m1 => data.par_iter().flat_map_iter(|c| [decode_e2m1(c & 15), decode_e2m1(c >> 4)]).collect(),
    }
}

impl Values {
    pub(super) fn plain(values: Vec<f32>, hidden: u64) -> Self {
        Self { values, hidden: hidden as usize, scales: None }
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.values.len().checked_div(self.hidden).unwrap_or(0)
    }

    /// Input scales of all channels of a row.
    fn row_scales(&self, row: usize) -> Vec<f32> {
        match &self.scales {
            None => vec![1.0; self.hidden],
            Some(BlockScales { sf, block: (npt, npc) }) => {
                let npc = *npc as usize;
                let columns = self.hidden.div_ceil(npc);
                let row = row / *npt as usize;
                (0..self.hidden).map(|i| sf[row * columns + i / npc]).collect()
            }
        }
    }

    /// The cast, with `given` scales `(T, K)` instead of computed ones.
    pub(super) fn cast(&self, format: Format, npc: usize, rule: Rule, given: Option<&[f32]>) -> Quantised {
        self.cast_rounded(format, npc, rule, given, false)
    }

    fn cast_rounded(&self, format: Format, npc: usize, rule: Rule, given: Option<&[f32]>, stochastic: bool) -> Quantised {
        let columns = self.hidden.div_ceil(npc);
        let row_bytes = format.columns(self.hidden as u64) as usize;
        let mut data = vec![0u8; self.num_tokens() * row_bytes];
        let mut sf = vec![0f32; self.num_tokens() * columns];
        if self.values.is_empty() {
            return Quantised { data, sf };
        }
        let rows = data.par_chunks_mut(row_bytes).zip(sf.par_chunks_mut(columns)).zip(self.values.par_chunks(self.hidden));
        rows.enumerate().for_each(|(row, ((data, sf), values))| {
            let scales = self.row_scales(row);
            let mut scaled = vec![0f32; self.hidden.next_multiple_of(4)];
            for k in 0..columns {
                let group = k * npc..self.hidden.min((k + 1) * npc);
                let inverse = match given {
                    Some(given) => 1.0 / given[row * columns + k],
                    None => {
                        // `max` ignores NaN.
                        let amax = group.clone().fold(0f32, |max, i| max.max(values[i].abs() * scales[i]));
                        let (stored, inverse) = scale(amax, format, rule);
                        sf[k] = stored;
                        inverse
                    }
                };
                for i in group {
                    // A zero stays one, also where the factor is infinite: a group of zeros in a block with a large scale.
                    scaled[i] = if values[i] == 0.0 { values[i] } else { values[i] * (scales[i] * inverse) };
                }
            }
            let codes: Vec<u8> = if stochastic {
                scaled.chunks_exact(4).enumerate().flat_map(|(i, quad)| round_stochastically(quad, i as u32, format)).collect()
            } else {
                scaled.iter().map(|v| if format == Format::E4m3 { encode_e4m3(*v) } else { encode_e2m1(*v) }).collect()
            };
            match format {
                Format::E4m3 => data.copy_from_slice(&codes[..self.hidden]),
                Format::E2m1 => data.iter_mut().zip(codes.chunks(2)).for_each(|(byte, pair)| *byte = pair[0] | pair[1] << 4),
            }
        });
        Quantised { data, sf }
    }
}

impl Quantised {
    /// What [`compare::bias_within`] takes: for every value 2 if its cast lies below it, 1 if it is exact.
    fn bias(&self, exact: &[f32], format: Format, hidden: usize, npc: u32) -> u64 {
        if exact.is_empty() {
            return 0;
        }
        let (columns, row_bytes) = (hidden.div_ceil(npc as usize), format.columns(hidden as u64) as usize);
        let values: [f32; 256] = std::array::from_fn(|code| match format {
            Format::E4m3 => decode_e4m3(code as u8),
            Format::E2m1 => decode_e2m1(code as u8 & 15),
        });
        let rows = self.data.par_chunks(row_bytes).zip(self.sf.par_chunks(columns)).zip(exact.par_chunks(hidden));
        let twice = rows.map(|((data, sf), exact)| {
            let back = |i: usize| match format {
                Format::E4m3 => values[data[i] as usize],
                Format::E2m1 => values[(data[i / 2] >> (4 * (i % 2)) & 15) as usize],
            };
            let groups = exact.chunks(npc as usize).enumerate();
            let twice = groups.map(|(k, exact)| {
                let row = exact.iter().enumerate().map(|(i, exact)| (back(k * npc as usize + i) * sf[k], *exact));
                row.map(|(back, exact)| 2 * (back < exact) as u64 + (back == exact) as u64).sum::<u64>()
            });
            twice.sum::<u64>()
        });
        twice.sum()
    }
}

/// Values and what casts of them give, made once for all inputs and layouts that share them.
struct Reference {
    values: Values,
    #[allow(clippy::type_complexity)]
    made: RefCell<HashMap<(Format, u32, Rule, bool), Rc<Quantised>>>,
}

impl Reference {
    fn new(values: Values) -> Rc<Self> {
        Rc::new(Self { values, made: RefCell::default() })
    }

    fn cast(&self, format: Format, npc: u32, rule: Rule) -> Rc<Quantised> {
        self.cast_rounded(format, npc, rule, false)
    }

    fn cast_rounded(&self, format: Format, npc: u32, rule: Rule, stochastic: bool) -> Rc<Quantised> {
        let make = || Rc::new(self.values.cast_rounded(format, npc as usize, rule, None, stochastic));
        self.made.borrow_mut().entry((format, npc, rule, stochastic)).or_insert_with(make).clone()
    }
}

/// A quantised tensor with scales of a block, which later is an input.
fn quantise_blocks(values: &Values, format: Format, (npt, npc): (u32, u32), rule: Rule) -> (Vec<u8>, BlockScales) {
    let (hidden, rows, strip) = (values.hidden, values.num_tokens(), npt as usize);
    let columns = hidden.div_ceil(npc as usize);
    let mut sf = vec![0f32; rows.div_ceil(strip) * columns];
    if rows > 0 {
        sf.par_chunks_mut(columns).zip(values.values.par_chunks(strip * hidden)).for_each(|(sf, values)| {
            for (k, sf) in sf.iter_mut().enumerate() {
                let block = values.chunks(hidden).flat_map(|row| row[k * npc as usize..].iter().take(npc as usize));
                *sf = scale(block.fold(0f32, |max, v| max.max(v.abs())), format, rule).0;
            }
        });
    }
    let mut data = vec![0u8; rows * format.columns(hidden as u64) as usize];
    if let Some(row_bytes) = data.len().checked_div(rows) {
        data.par_chunks_mut(row_bytes).zip(values.values.par_chunks(hidden)).enumerate().for_each(|(row, (data, values))| {
            let scaled = |i: usize| values[i] / sf[row / strip * columns + i / npc as usize];
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = match format {
                    Format::E4m3 => encode_e4m3(scaled(i)),
                    Format::E2m1 => encode_e2m1(scaled(2 * i)) | encode_e2m1(scaled(2 * i + 1)) << 4,
                };
            }
        });
    }
    (data, BlockScales { sf, block: (npt, npc) })
}

/// Words of a scale tensor, contiguous in its logical shape: f32 bits, or four exponents, 0 for groups that do not exist, or four e4m3.
fn sf_words(sf: &[f32], columns: usize, layout: SfLayout) -> Vec<u32> {
    if layout.is_e4m3() {
        let word = |four: &[f32]| four.iter().enumerate().fold(0, |word, (i, v)| word | (encode_e4m3(*v) as u32) << (8 * i));
        return sf.chunks(4).map(word).collect();
    }
    if !layout.is_packed() {
        return sf.par_iter().map(|v| v.to_bits()).collect();
    }
    let word = |four: &[f32]| four.iter().enumerate().fold(0, |word, (i, v)| word | (v.to_bits() >> 23) << (8 * i));
    let (columns, row_words) = (columns.max(1), columns.div_ceil(4).max(1));
    let mut words = vec![0; sf.len() / columns * row_words];
    words.par_chunks_mut(row_words).zip(sf.par_chunks(columns)).for_each(|(words, row)| {
        words.iter_mut().zip(row.chunks(4)).for_each(|(to, four)| *to = word(four));
    });
    words
}

// Inputs.

/// A tensor of two dimensions on the device, of any type a cast reads.
struct Rows {
    elements: Elements,
    shape: [u64; 2],
    stride: u64,
    offset: u64,
}

enum Elements {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
    E4m3(Buffer<E4m3>),
    E2m1(Buffer<E2m1x2>),
}

impl Rows {
    /// bf16 values must be given as such.
    fn plain(device: &Device, dtype: DType, values: &[f32], shape: [u64; 2], at: (u64, u64)) -> Result<Self, String> {
        // What lies between the rows would be noticed if it were read.
        let elements = match dtype {
            DType::Bf16 => {
                let values: Vec<bf16> = values.par_iter().map(|v| bf16::from_f32(*v)).collect();
                Elements::Bf16(device.upload(&rows_apart(&values, shape[1], at, bf16::from_f32(1e30))).map_err(text)?)
            }
            _ => Elements::F32(device.upload(&rows_apart(values, shape[1], at, 1e30)).map_err(text)?),
        };
        Ok(Self { elements, shape, stride: at.0, offset: at.1 })
    }

    fn quantised(device: &Device, format: Format, data: &[u8], shape: [u64; 2], at: (u64, u64)) -> Result<Self, String> {
        let bytes = rows_apart(data, shape[1], at, 0x7E);
        let elements = match format {
            Format::E4m3 => Elements::E4m3(device.upload(bytemuck::cast_slice(&bytes)).map_err(text)?),
            Format::E2m1 => Elements::E2m1(device.upload(bytemuck::cast_slice(&bytes)).map_err(text)?),
        };
        Ok(Self { elements, shape, stride: at.0, offset: at.1 })
    }

    fn tensor(&self) -> ferrotile::Result<TensorRef<'_>> {
        let strides = [self.stride, 1];
        match &self.elements {
            Elements::Bf16(b) => b.strided(&self.shape, &strides, self.offset),
            Elements::F32(b) => b.strided(&self.shape, &strides, self.offset),
            Elements::E4m3(b) => b.strided(&self.shape, &strides, self.offset),
            Elements::E2m1(b) => b.strided(&self.shape, &strides, self.offset),
        }
    }

    fn name(&self) -> &'static str {
        match self.elements {
            Elements::Bf16(_) => "bf16",
            Elements::F32(_) => "f32",
            Elements::E4m3(_) => "e4m3",
            Elements::E2m1(_) => "e2m1",
        }
    }
}

/// Scales on the device in some layout and pitch.
struct Scales {
    words: Buffer<u32>,
    shape: [u64; 2],
    strides: [u64; 2],
    layout: SfLayout,
}

impl Scales {
    /// `pad` is what the pitch exceeds the smallest possible one by. Inputs need no pitch that is a multiple of 4.
    fn new(device: &Device, scales: &BlockScales, hidden: u64, layout: SfLayout, pad: u64) -> Result<Self, String> {
        let columns = hidden.div_ceil(scales.block.1.into());
        let words = sf_words(&scales.sf, columns as usize, layout);
        let shape = [(scales.sf.len() as u64).checked_div(columns).unwrap_or(0), layout.columns(columns)];
        let strides = if layout.is_col_major() { [1, shape[0] + pad] } else { [shape[1] + pad, 1] };
        let size = layout.dtype().size() as usize;
        let elements = (shape[0] * strides[0]).max(shape[1] * strides[1]) as usize;
        // What nobody may read is NaN in every layout.
        let mut all = vec![0x7FFF_FFFFu32; (elements * size).div_ceil(4)];
        let (from, to): (&[u8], &mut [u8]) = (bytemuck::cast_slice(&words), bytemuck::cast_slice_mut(&mut all));
        for i in 0..(shape[0] * shape[1]) as usize {
            let (row, column) = (i as u64 / shape[1], i as u64 % shape[1]);
            let at = (row * strides[0] + column * strides[1]) as usize * size;
            to[at..at + size].copy_from_slice(&from[i * size..(i + 1) * size]);
        }
        Ok(Self { words: device.upload(&all).map_err(text)?, shape, strides, layout })
    }

    fn sf(&self) -> ferrotile::Result<Sf<'_>> {
        let dtype = self.layout.dtype();
        // SAFETY: `new` made the buffer large enough for these elements, and it outlives the result.
        let tensor = unsafe { TensorRef::from_raw(self.words.device(), self.words.as_ptr(), dtype, &self.shape, &self.strides)? };
        Ok(Sf { tensor, layout: self.layout })
    }
}

/// An input: on the device and as values.
struct Source {
    rows: Rows,
    scales: Option<(Scales, (u32, u32))>,
    reference: Rc<Reference>,
    /// Names the kind of values.
    kind: &'static str,
}

impl Source {
    fn plain(
        device: &Device,
        dtype: DType,
        reference: Rc<Reference>,
        at: (u64, u64),
        kind: &'static str,
    ) -> Result<Self, String> {
        let values = &reference.values;
        let shape = [values.num_tokens() as u64, values.hidden as u64];
        Ok(Self { rows: Rows::plain(device, dtype, &values.values, shape, at)?, scales: None, reference, kind })
    }

    /// The same quantised input with its scales in another layout.
    fn with_layout(mut self, device: &Device, layout: SfLayout) -> Result<Self, String> {
        if let (Some(scales), Some((on_device, _))) = (&self.reference.values.scales, &mut self.scales) {
            *on_device = Scales::new(device, scales, self.reference.values.hidden as u64, layout, 0)?;
        }
        Ok(self)
    }

    /// The quantised form of `values`, its scales powers of two unless they are e4m3, in `layout`, and rows of bytes at `at`.
    fn quantised(
        device: &Device,
        values: &Values,
        format: Format,
        block: (u32, u32),
        layout: SfLayout,
        at: (u64, u64),
        kind: &'static str,
    ) -> Result<Self, String> {
        let (data, scales) = quantise_blocks(values, format, block, Rule::of(true, layout));
        Self::from_codes(device, data, values.hidden as u64, scales, format, layout, at, kind)
    }

    #[allow(clippy::too_many_arguments)]
    fn from_codes(
        device: &Device,
        data: Vec<u8>,
        hidden: u64,
        scales: BlockScales,
        format: Format,
        layout: SfLayout,
        at: (u64, u64),
        kind: &'static str,
    ) -> Result<Self, String> {
        let columns = format.columns(hidden);
        let shape = [(data.len() as u64).checked_div(columns).unwrap_or(0), columns];
        let rows = Rows::quantised(device, format, &data, shape, at)?;
        let on_device = Scales::new(device, &scales, hidden, layout, at.0 - columns)?;
        let block = scales.block;
        let values = Values { values: decode(&data, format), hidden: hidden as usize, scales: Some(scales) };
        Ok(Self { rows, scales: Some((on_device, block)), reference: Reference::new(values), kind })
    }

    fn input(&self) -> ferrotile::Result<Input<'_>> {
        let data = self.rows.tensor()?;
        match &self.scales {
            None => Ok(Input::Plain(data)),
            Some((scales, block)) => Ok(Input::Quantised { data, sf: scales.sf()?, block: *block }),
        }
    }

    fn num_tokens(&self) -> u64 {
        self.reference.values.num_tokens() as u64
    }

    fn hidden(&self) -> u64 {
        self.reference.values.hidden as u64
    }

    fn case(&self, variant: &str, format: Format, npc: u32, round: bool, layout: SfLayout) -> String {
        let from = match &self.scales {
            None => self.rows.name().to_owned(),
            Some((scales, (npt, npc))) => format!("{},{npt}x{npc},{}", self.rows.name(), scales.layout),
        };
        let (h, kind, t) = (self.hidden(), self.kind, self.num_tokens());
        let (stride, offset) = (self.rows.stride, self.rows.offset);
        format!(
            "fmt={format},h={h},input={from},kind={kind},npc={npc},offset={offset},op={variant},round_sf={round},sf={layout},stride={stride},t={t}"
        )
    }
}

/// Standard normal values, such that `dtype` holds them.
pub(super) fn normal(dtype: DType, (t, h): (u64, u64), name: &str) -> Values {
    let mut values = Rng::named(name).normal_f32((t * h) as usize);
    if dtype == DType::Bf16 {
        values.par_iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
    }
    Values::plain(values, h)
}

/// Values with all that is hard: rows and groups of zeros, negative zeros, subnormals, halfway points of both formats and their
/// neighbours, one huge value in a group, the largest finite value, NaN.
pub(super) fn awkward(dtype: DType, (t, h): (u64, u64), name: &str) -> Values {
    let mut values = normal(dtype, (t, h), name);
    let rng = Rng::named(name).stream(1);
    let ties = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1.0625, 1.1875, 2f32.powi(-10), 1.5 * 2f32.powi(-9), 440.0];
    for (i, v) in values.values.iter_mut().enumerate() {
        let (row, col) = (i as u64 / h, i as u64 % h);
        let draw = rng.bits(i as u64);
        let sign = if draw & 1 == 0 { 1.0 } else { -1.0 };
        // A tie or one of its neighbours, in a group whose scale is 1 because its first value is the format's largest.
        let tie = || {
            let step = if dtype == DType::Bf16 { 1 << 16 } else { 1 };
            let tie = ties[(draw >> 8) as usize % ties.len()].to_bits();
            sign * f32::from_bits(tie.wrapping_add_signed(((draw >> 16) as i32).rem_euclid(3) * step - step))
        };
        *v = match row % 8 {
            0 => 0.0 * sign,
            1 if col % 16 == 0 => 448.0,
            2 if col % 16 == 0 => 6.0,
            1 | 2 => tie().clamp(-448.0, 448.0),
            3 if col % 64 == 5 => 1e38 * sign,
            3 if col == h - 1 => f32::MAX * sign,
            4 => f32::from_bits((draw >> 8) as u32 & 0x807F_FFFF),
            5 => *v * 2f32.powi((draw >> 8) as i32 % 30 - 20),
            6 if draw.is_multiple_of(31) || col / 128 == 1 => f32::NAN,
            _ => *v,
        };
        if dtype == DType::Bf16 {
            // Toward zero: the largest f32 would become infinity.
            *v = f32::from_bits(v.to_bits() & 0xFFFF_0000);
        }
    }
    values
}

/// Codes of a quantised input with all bit patterns (NaN only on request), and scales that are powers of two far apart, or any, or all that
/// e4m3 has but NaN, 0 too.
fn awkward_codes(
    format: Format,
    (t, h): (u64, u64),
    block: (u32, u32),
    rule: Rule,
    nan: bool,
    name: &str,
) -> (Vec<u8>, BlockScales) {
    let rng = Rng::named(name);
    let columns = format.columns(h);
    let mut data = rng.bytes((t * columns) as usize);
    for (i, code) in data.iter_mut().enumerate() {
        // Rows of zeros too, of both signs.
        if i as u64 / columns % 8 == 3 {
            *code &= 0x88;
        } else if format == Format::E4m3 && !nan && *code & 0x7F == 0x7F {
            *code ^= 1;
        }
    }
    let blocks = t.div_ceil(block.0.into()) * h.div_ceil(block.1.into());
    let scales = rng.stream(2);
    let sf = (0..blocks).map(|i| {
        let power = 2f32.powi(scales.below(i, 24) as i32 - 12);
        match rule {
            Rule::Powers => power,
            Rule::Exact => power * (1.0 + scales.unit(blocks + i)),
            Rule::E4m3 => decode_e4m3(scales.below(i, 0x7F) as u8),
        }
    });
    (data, BlockScales { sf: sf.collect(), block })
}

// Running.

/// Bytes, or words, behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

/// Output buffers of one call.
struct Outputs {
    format: Format,
    shape: [u64; 2],
    /// Where the data start in their buffer.
    offset: u64,
    data: Buffer<u8>,
    sf_shape: SfShape,
    layout: SfLayout,
    sf: Buffer<u32>,
}

impl Outputs {
    fn new(device: &Device, shape: (u64, u64), format: Format, npc: u32, layout: SfLayout) -> Result<Self, String> {
        let sf_shape = sf_shape(shape.0, shape.1, (1, npc), layout);
        let shape = [shape.0, format.columns(shape.1)];
        let mut data = device.alloc::<u8>((shape[0] * shape[1]) as usize + GUARD).map_err(text)?;
        let sf_words = (sf_shape.elements * sf_shape.dtype.size()).div_ceil(4) as usize;
        let mut sf = device.alloc::<u32>(sf_words + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { format, shape, offset: 0, data, sf_shape, layout, sf })
    }

    fn cast(&mut self, stream: &Stream, x: Input<'_>, npc: u32, round_sf: bool) -> ferrotile::Result<()> {
        self.cast_rounded(stream, x, npc, round_sf, false)
    }

    fn cast_rounded(
        &mut self,
        stream: &Stream,
        x: Input<'_>,
        npc: u32,
        round_sf: bool,
        stochastic: bool,
    ) -> ferrotile::Result<()> {
        let sf = self.sf_mut()?;
        let out = self.data.strided_mut(&self.shape, &[self.shape[1], 1], self.offset)?.reinterpret(self.format.dtype())?;
        op::per_token_cast(stream, Args { x, npc, round_sf, stochastic, out, sf })
    }

    /// The scales; only one of them may be in use.
    fn sf_mut<'a>(&self) -> ferrotile::Result<SfMut<'a>> {
        let SfShape { dtype, shape, strides, .. } = &self.sf_shape;
        // SAFETY: the buffer has room for these elements. It outlives the call that the scales are made for, which uses nothing
        // else of it.
        let tensor = unsafe { TensorMut::from_raw(self.sf.device(), self.sf.as_ptr(), *dtype, shape, strides)? };
        Ok(SfMut { tensor, layout: self.layout })
    }

    fn sf_only(&mut self, stream: &Stream, x: TensorRef<'_>, npc: u32, round_sf: bool) -> ferrotile::Result<()> {
        let sf = self.sf_mut()?;
        op::per_token_cast_with_sf_only(stream, SfOnlyArgs { x, format: self.format, npc, round_sf, sf })
    }

    fn precomputed(&mut self, stream: &Stream, x: TensorRef<'_>, npc: u32, sf: &Scales) -> ferrotile::Result<()> {
        let out = self.data.strided_mut(&self.shape, &[self.shape[1], 1], self.offset)?.reinterpret(self.format.dtype())?;
        op::per_token_cast_with_precomputed_sf(stream, PrecomputedArgs { x, sf: sf.sf()?, npc, out })
    }

    fn check_data(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        let all = self.data.to_vec().map_err(text)?;
        let end = all.len() - GUARD + self.offset as usize;
        let data = &all[self.offset as usize..end];
        let outside = || all[..self.offset as usize].iter().chain(&all[end..]);
        ensure(outside().all(|b| *b == FILL), || format!("data: bytes outside the tensor were written; {name}"))?;
        match self.format {
            Format::E4m3 => {
                compare::equal::<E4m3>("data", name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(expected))
            }
            Format::E2m1 => {
                compare::equal::<E2m1x2>("data", name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(expected))
            }
        }
    }

    /// `expected` in the logical order of the tensor.
    fn check_sf(&self, name: &str, expected: &[u32]) -> Result<(), String> {
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        if self.layout.is_e4m3() {
            let (got, expected): (&[E4m3], &[E4m3]) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            let expected = &expected[..(shape[0] * shape[1]) as usize];
            compare::equal_strided::<E4m3>("sf", name, shape, strides, got, expected)?;
            return compare::untouched::<E4m3>("sf", name, shape, strides, got, FILL);
        }
        if self.layout.is_packed() {
            let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, expected)?;
        } else {
            let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            compare::equal_strided::<f32>("sf", name, shape, strides, got, expected)?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }
}

const FORMATS: [Format; 2] = [Format::E4m3, Format::E2m1];
pub(super) const GROUPS: [u32; 4] = [16, 32, 64, 128];
/// Rounded scales, layout.
const CONFIGS: [(bool, SfLayout); 8] = [
    (true, SfLayout::ColMajorPacked),
    (true, SfLayout::RowMajor),
    (true, SfLayout::RowMajorPacked),
    (true, SfLayout::ColMajor),
    (false, SfLayout::RowMajor),
    (false, SfLayout::ColMajor),
    (false, SfLayout::RowMajorE4m3),
    (false, SfLayout::ColMajorE4m3),
];
/// Layouts of the scales of a quantised input.
const LAYOUTS: [SfLayout; 6] = [
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
];
/// The configurations of the published grid.
const PUBLISHED: &[(bool, SfLayout)] = CONFIGS.split_at(2).0;

/// Those, and one with e4m3 scales.
const EXTENDED: [(bool, SfLayout); 3] = [CONFIGS[0], CONFIGS[1], CONFIGS[6]];

/// What to do with an input.
struct Plan<'a> {
    npcs: &'a [u32],
    configs: &'a [(bool, SfLayout)],
    /// sf-only and precomputed too.
    variants: bool,
    /// Rounded stochastically too.
    stochastic: bool,
    /// The floats that the cast approximates: check that errors go both ways.
    bias: Option<&'a [f32]>,
    /// Where the output starts in its buffer.
    out_offset: u64,
}

impl Default for Plan<'_> {
    fn default() -> Self {
        Self { npcs: &GROUPS, configs: &CONFIGS, variants: false, stochastic: false, bias: None, out_offset: 0 }
    }
}

/// The launchers on one input.
fn check_source(ctx: &Ctx, source: &Source, formats: &[Format], plan: &Plan<'_>) -> Result<(), String> {
    let device = &ctx.device;
    let stream = device.stream().map_err(text)?;
    let hidden = source.hidden();
    let shape = (source.num_tokens(), hidden);
    for &format in formats {
        for &npc in plan.npcs {
            let columns = hidden.div_ceil(npc.into()) as usize;
            let reference = |rule| source.reference.cast(format, npc, rule);
            let whole_row = npc as u64 == hidden && !GROUPS.contains(&npc);
            for &(round, layout) in plan.configs.iter().filter(|(_, layout)| !(whole_row && layout.is_e4m3())) {
                let rule = Rule::of(round, layout);
                for stochastic in [false, true] {
                    let variant = if stochastic { "stochastic" } else { "cast" };
                    let name = source.case(variant, format, npc, round, layout);
                    if (stochastic && (!plan.stochastic || whole_row)) || !ctx.case(&name) {
                        continue;
                    }
                    let expected = source.reference.cast_rounded(format, npc, rule, stochastic);
                    let words = sf_words(&expected.sf, columns, layout);
                    let mut out = Outputs::new(device, shape, format, npc, layout)?;
                    out.offset = plan.out_offset;
                    // Twice, the second time over its own results, which must be the same.
                    for _ in 0..if ctx.depth == Depth::Small { 1 } else { 2 } {
                        let input = source.input().map_err(text)?;
                        out.cast_rounded(&stream, input, npc, round, stochastic).map_err(text)?;
                    }
                    out.check_sf(&name, &words)?;
                    out.check_data(&name, &expected.data)?;
                    if let Some(exact) = plan.bias.filter(|_| !layout.is_packed()) {
                        compare::bias_within("data", &name, expected.bias(exact, format, hidden as usize, npc), exact.len())?;
                    }
                }
                if !plan.variants || whole_row {
                    continue;
                }
                let x = source.rows.tensor().map_err(text)?;
                let name = source.case("sf_only", format, npc, round, layout);
                if ctx.case(&name) {
                    let mut out = Outputs::new(device, shape, format, npc, layout)?;
                    out.sf_only(&stream, x, npc, round).map_err(text)?;
                    out.check_sf(&name, &sf_words(&reference(rule).sf, columns, layout))?;
                }
                if layout.is_packed() {
                    continue;
                }
                let name = source.case("precomputed", format, npc, round, layout);
                if ctx.case(&name) {
                    let computed = reference(rule);
                    // Powers of two have exact inverses, and with e4m3 scales it is the inverse anyhow, so the data are those of the cast;
                    // seen once on the small shapes.
                    let expected = if rule != Rule::Exact && ctx.depth == Depth::Full && source.kind == "normal" {
                        computed.clone()
                    } else {
                        Rc::new(source.reference.values.cast(format, npc as usize, rule, Some(&computed.sf)))
                    };
                    ensure(rule == Rule::Exact || expected.data == computed.data, || format!("the references disagree; {name}"))?;
                    let given = BlockScales { sf: computed.sf.clone(), block: (1, npc) };
                    let sf = Scales::new(device, &given, hidden, layout, 3)?;
                    let mut out = Outputs::new(device, shape, format, npc, layout)?;
                    out.offset = plan.out_offset;
                    out.precomputed(&stream, x, npc, &sf).map_err(text)?;
                    out.check_data(&name, &expected.data)?;
                }
            }
        }
    }
    Ok(())
}

const DTYPES: [DType; 2] = [DType::Bf16, DType::F32];

fn run(ctx: &Ctx) -> Result<Report, String> {
    check_plain_edges(ctx)?;
    check_quantised_edges(ctx)?;
    if ctx.depth == Depth::Full {
        check_grid(ctx)?;
        check_additions(ctx)?;
    }
    if !ctx.device.is_emulator() {
        check_graphs(ctx)?;
        if ctx.depth == Depth::Full {
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["per_token_cast"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// What the peers computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let format = if case.param::<String>("fmt")? == "e4m3" { Format::E4m3 } else { Format::E2m1 };
    let npc: u32 = case.param("num_per_channels")?;
    let (layout, round) = case.sf_options()?;
    let x = golden.tensor(case, "in/x")?;
    let shape = (x.shape[0], x.shape[1]);
    let (dtype, values) =
        if x.bytes.len() as u64 == 2 * shape.0 * shape.1 { (DType::Bf16, x.floats()?) } else { (DType::F32, x.to_vec::<f32>()?) };
    let source = Source::plain(&ctx.device, dtype, Reference::new(Values::plain(values, shape.1)), (shape.1, 0), "golden")?;
    let mut out = Outputs::new(&ctx.device, shape, format, npc, layout)?;
    let stream = ctx.device.stream().map_err(text)?;
    out.cast(&stream, source.input().map_err(text)?, npc, round).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check_data(&name, golden.tensor(case, "out/0")?.bytes)?;
    let sf = golden.tensor(case, "out/1")?;
    sf.check_place(&name, &out.sf_shape)?;
    let words = match layout {
        _ if layout.is_packed() => sf.packed_words(shape.1.div_ceil(npc.into()))?,
        // Four codes in a word, as in our references.
        _ if layout.is_e4m3() => {
            let codes = sf.to_vec::<u8>()?;
            codes.chunks(4).map(|c| c.iter().rev().fold(0, |word, code| word << 8 | *code as u32)).collect()
        }
        _ => sf.to_vec()?,
    };
    out.check_sf(&name, &words)
}

/// Plain input of small and awkward shapes and values.
fn check_plain_edges(ctx: &Ctx) -> Result<(), String> {
    let device = &ctx.device;
    for dtype in DTYPES {
        let source = |kind: &'static str, shape: (u64, u64), at: (u64, u64)| {
            let name = format!("per_token_cast {dtype} {shape:?} {kind}");
            let values = if kind == "awkward" { awkward(dtype, shape, &name) } else { normal(dtype, shape, &name) };
            Source::plain(device, dtype, Reference::new(values), at, kind)
        };
        let all = |extra: &[u32]| GROUPS.iter().chain(extra).copied().collect::<Vec<u32>>();
        // Ragged last group (576 = 4.5 * 128), whole rows, all layouts.
        let plan = Plan { npcs: &all(&[576]), variants: true, stochastic: true, ..Plan::default() };
        check_source(ctx, &source("awkward", (19, 576), (576, 0))?, &FORMATS, &plan)?;
        // So many rows that blocks have several, the last one fewer.
        let plan = Plan { npcs: &all(&[]), ..Plan::default() };
        check_source(ctx, &source("awkward", (131, 576), (576, 0))?, &FORMATS, &plan)?;
        // Several warp tiles a row, the last one cut; rows apart but aligned.
        let plan = Plan { npcs: &[32, 128, 2176], configs: &EXTENDED, stochastic: true, ..Plan::default() };
        check_source(ctx, &source("normal", (3, 2176), (4352, 8))?, &FORMATS, &plan)?;
        // Channel by channel: unaligned rows, and rows that are no whole number of vectors. An odd number only for e4m3.
        let plan = Plan { npcs: &[16, 128], variants: true, stochastic: true, ..Plan::default() };
        check_source(ctx, &source("awkward", (5, 102), (107, 1))?, &FORMATS, &plan)?;
        check_source(ctx, &source("awkward", (3, 37), (37, 0))?, &FORMATS[..1], &plan)?;
        let plan = Plan { npcs: &[64, 320], configs: &CONFIGS[2..7], out_offset: 1, variants: true, ..Plan::default() };
        check_source(ctx, &source("awkward", (3, 320), (320, 0))?, &FORMATS, &plan)?;
        // Nothing to do.
        let plan = Plan { npcs: &[32, 384], variants: true, stochastic: true, ..Plan::default() };
        check_source(ctx, &source("normal", (0, 384), (384, 0))?, &FORMATS, &plan)?;
        check_source(ctx, &source("normal", (0, 0), (0, 0))?, &FORMATS, &Plan { npcs: &[32], ..Plan::default() })?;
        // One token, and a row longer than the threads of a block can hold.
        let plan = Plan { npcs: &[128, 7168], configs: PUBLISHED, ..Plan::default() };
        check_source(ctx, &source("normal", (1, 7168), (7168, 0))?, &FORMATS, &plan)?;
        let plan = Plan { npcs: &[16448], configs: &CONFIGS[..1], ..Plan::default() };
        check_source(ctx, &source("normal", (1, 16448), (16448, 0))?, &FORMATS, &plan)?;
        check_source(ctx, &source("normal", (1, 16448), (16449, 1))?, &FORMATS, &plan)?;
    }
    Ok(())
}

/// Quantised input of small and awkward shapes and values.
fn check_quantised_edges(ctx: &Ctx) -> Result<(), String> {
    let device = &ctx.device;
    for format in FORMATS {
        let make = |shape: (u64, u64), block, layout: SfLayout, powers: bool, at: (u64, u64)| {
            let rule = Rule::of(powers, layout);
            let name = format!("per_token_cast {format} {shape:?} {block:?} {rule:?}");
            // In e2m1 a NaN has no code of its own, so only casts to e4m3 get some.
            let (data, scales) = awkward_codes(format, shape, block, rule, false, &name);
            let kind = if rule == Rule::Exact { "codes, any scale" } else { "codes" };
            Source::from_codes(device, data, shape.1, scales, format, layout, at, kind)
        };
        let columns = |h: u64| format.columns(h);
        // Blocks larger than the groups, smaller, and rows of their own; every layout of the input's scales with some pitch.
        for (i, block) in [(128, 128), (32, 32), (1, 16), (1, 64), (2, 2048)].into_iter().enumerate() {
            for (j, layout) in LAYOUTS.into_iter().enumerate() {
                let source = make((19, 576), block, layout, true, (columns(576) + 16 * i as u64, 0))?;
                let configs = [CONFIGS[(i + j) % 8], CONFIGS[(i + j + 3) % 8]];
                let (npcs, stochastic): (&[u32], _) = (if i == j { &GROUPS } else { &[32, 128] }, (i + j) % 3 == 0);
                check_source(ctx, &source, &FORMATS, &Plan { npcs, configs: &configs, stochastic, ..Plan::default() })?;
            }
        }
        // So many rows that blocks have several, the last one fewer.
        for layout in [SfLayout::RowMajor, SfLayout::ColMajorPacked] {
            let source = make((37, 576), (32, 32), layout, true, (columns(576), 0))?;
            check_source(ctx, &source, &FORMATS, &Plan { npcs: &GROUPS, ..Plan::default() })?;
        }
        // Scales that are no powers of two: the order of the factors shows.
        for layout in [SfLayout::RowMajor, SfLayout::ColMajor] {
            let source = make((6, 576), (2, 32), layout, false, (columns(576), 0))?;
            check_source(ctx, &source, &FORMATS, &Plan { npcs: &[16, 128], configs: &CONFIGS[3..], ..Plan::default() })?;
        }
        // Channel by channel, a block that covers all, and an output that is not aligned.
        let plan = Plan { npcs: &[16, 64], configs: &CONFIGS[1..7], stochastic: true, ..Plan::default() };
        check_source(ctx, &make((5, 102), (5, 102), SfLayout::ColMajor, true, (columns(102) + 3, 1))?, &FORMATS, &plan)?;
        check_source(ctx, &make((5, 102), (1, 16), SfLayout::RowMajorE4m3, true, (columns(102) + 3, 1))?, &FORMATS, &plan)?;
        let plan = Plan { npcs: &[32], configs: &CONFIGS[..4], out_offset: 1, ..Plan::default() };
        check_source(ctx, &make((5, 160), (7, 32), SfLayout::RowMajorPacked, true, (columns(160), 0))?, &FORMATS, &plan)?;
        // Several warp tiles a row.
        let plan = Plan { npcs: &[32, 128], configs: PUBLISHED, ..Plan::default() };
        check_source(ctx, &make((3, 1088), (128, 128), SfLayout::ColMajorPacked, true, (columns(1088), 0))?, &FORMATS, &plan)?;
        check_source(ctx, &make((0, 384), (128, 128), SfLayout::RowMajor, true, (columns(384), 0))?, &FORMATS, &plan)?;
    }
    // NaN codes: not part of the maximum, and NaN again.
    let (data, scales) = awkward_codes(Format::E4m3, (7, 192), (32, 32), Rule::Powers, true, "per_token_cast nan");
    let source = Source::from_codes(device, data, 192, scales, Format::E4m3, SfLayout::RowMajor, (192, 0), "codes, nan")?;
    let plan = Plan { npcs: &[32, 128], configs: &EXTENDED, stochastic: true, ..Plan::default() };
    check_source(ctx, &source, &FORMATS[..1], &plan)
}

/// The published grid: 4001 and 8001 tokens, seven hidden sizes, all inputs and formats; and all layouts where rows are ragged.
fn check_grid(ctx: &Ctx) -> Result<(), String> {
    let device = &ctx.device;
    for h in HIDDENS {
        for t in TOKENS {
            for dtype in DTYPES {
                let reference = Reference::new(normal(dtype, (t, h), &format!("per_token_cast {dtype} {t} {h}")));
                let values = &reference.values;
                let source = Source::plain(device, dtype, reference.clone(), (h, 0), "normal")?;
                let npcs = [32, 64, 128, h as u32];
                let configs = if h == 576 { &CONFIGS[..] } else { PUBLISHED };
                let plan = Plan { npcs: &npcs, configs, variants: true, bias: Some(&values.values), ..Plan::default() };
                check_source(ctx, &source, &FORMATS, &plan)?;
                // The same as a view of rows twice as long, for which one number of tokens is enough.
                if t == TOKENS[0] {
                    let view = Source::plain(device, dtype, reference.clone(), (2 * h, 0), "normal")?;
                    let plan = Plan { npcs: &npcs, configs: &CONFIGS[1..2], variants: true, ..Plan::default() };
                    check_source(ctx, &view, &FORMATS[..1], &plan)?;
                }
                if dtype == DType::F32 {
                    continue;
                }
                for format in FORMATS {
                    for block in [(128, 128), (32, 32)] {
                        let at = (format.columns(h), 0);
                        let mut source = Source::quantised(device, values, format, block, SfLayout::RowMajor, at, "normal")?;
                        for config in PUBLISHED {
                            source = source.with_layout(device, config.1)?;
                            let (npcs, configs, bias) = (&[32, 128], std::slice::from_ref(config), Some(&values.values[..]));
                            check_source(ctx, &source, &FORMATS, &Plan { npcs, configs, bias, ..Plan::default() })?;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// What 2.1.0 added, on its numbers of tokens and channels: every layout, e4m3 scales on both sides, stochastic rounding.
fn check_additions(ctx: &Ctx) -> Result<(), String> {
    let device = &ctx.device;
    for (t, h) in [(512, 128), (512, 192), (512, 384), (512, 768), (512, 2048), (512, 7168), (2001, 7168)] {
        for dtype in DTYPES {
            let values = normal(dtype, (t, h), &format!("per_token_cast {dtype} {t} {h}"));
            let reference = Reference::new(values);
            let source = Source::plain(device, dtype, reference.clone(), (h, 0), "normal")?;
            // The large one in e4m3 layouts.
            let (npcs, configs): (&[u32], _) = if t == 512 { (&GROUPS, &CONFIGS[..]) } else { (&[16, 32], &CONFIGS[6..]) };
            let bias = Some(&reference.values.values[..]);
            check_source(ctx, &source, &FORMATS, &Plan { npcs, configs, stochastic: true, bias, ..Plan::default() })?;
            if dtype == DType::F32 {
                continue;
            }
            for (format, block) in [(Format::E2m1, (1, 16)), (Format::E4m3, (1, 32)), (Format::E4m3, (128, 128))] {
                for layout in [SfLayout::RowMajorE4m3, SfLayout::ColMajorE4m3] {
                    let at = (format.columns(h), 0);
                    let source = Source::quantised(device, &reference.values, format, block, layout, at, "normal")?;
                    let plan = Plan { npcs: &[32, 128], configs: &EXTENDED, stochastic: t == 512, ..Plan::default() };
                    check_source(ctx, &source, &FORMATS, &plan)?;
                }
            }
        }
    }
    Ok(())
}

/// Every launcher recorded in a graph and replayed.
fn check_graphs(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let device = &ctx.device;
    let (format, npc, layout, shape) = (Format::E4m3, 128, SfLayout::RowMajor, (133, 576));
    let reference = Reference::new(normal(DType::Bf16, shape, name));
    let plain = Source::plain(device, DType::Bf16, reference.clone(), (576, 0), "graph")?;
    let pair = Source::quantised(device, &reference.values, Format::E2m1, (32, 32), SfLayout::ColMajorPacked, (288, 0), "graph")?;
    let (expected, of_rows) = (reference.cast(format, npc, Rule::Powers), reference.cast(format, 576, Rule::Powers));
    let of_pair = pair.reference.cast(format, npc, Rule::Powers);
    let given = Scales::new(device, &BlockScales { sf: expected.sf.clone(), block: (1, npc) }, 576, layout, 0)?;
    let outputs = |npc| Outputs::new(device, shape, format, npc, layout);
    let (mut all, mut scales, mut data) = (outputs(npc)?, outputs(npc)?, outputs(npc)?);
    let (mut rows, mut from_pair) = (outputs(576)?, outputs(npc)?);
    let stream = device.stream().map_err(text)?;
    let graph = stream
        .capture(|s| {
            let x = plain.rows.tensor()?;
            all.cast(s, plain.input()?, npc, true)?;
            scales.sf_only(s, x, npc, true)?;
            data.precomputed(s, x, npc, &given)?;
            rows.cast(s, plain.input()?, 576, true)?;
            from_pair.cast(s, pair.input()?, npc, true)
        })
        .map_err(text)?;
    let words = |sf: &[f32], npc: u64| sf_words(sf, 576u64.div_ceil(npc) as usize, layout);
    for replay in 0..2 {
        for out in [&mut all, &mut scales, &mut data, &mut rows, &mut from_pair] {
            out.data.fill_bytes(FILL).map_err(text)?;
            out.sf.fill_bytes(FILL).map_err(text)?;
        }
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let name = format!("{name},replay={replay}");
        all.check_data(&name, &expected.data)?;
        all.check_sf(&name, &words(&expected.sf, 128))?;
        scales.check_sf(&name, &words(&expected.sf, 128))?;
        data.check_data(&name, &expected.data)?;
        rows.check_data(&name, &of_rows.data)?;
        rows.check_sf(&name, &words(&of_rows.sf, 576))?;
        from_pair.check_data(&name, &of_pair.data)?;
        from_pair.check_sf(&name, &words(&of_pair.sf, 128))?;
    }
    Ok(())
}

/// More than 2^32 bytes of output, and rows of the input that far apart. Rows are one row in memory (stride 0) in the first case, so every
/// row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let device = &ctx.device;
    let stream = device.stream().map_err(text)?;
    let (t, h) = (600_001u64, 7168u64);
    let name = "kind=large output,h=7168,t=600001";
    if ctx.case(name) {
        let row = normal(DType::Bf16, (1, h), name);
        let expected = row.cast(Format::E4m3, 128, Rule::Powers, None);
        let mut rows = Rows::plain(device, DType::Bf16, &row.values, [1, h], (h, 0))?;
        (rows.shape, rows.stride) = ([t, h], 0);
        let mut out = Outputs::new(device, (t, h), Format::E4m3, 128, SfLayout::ColMajorPacked)?;
        out.cast(&stream, Input::Plain(rows.tensor().map_err(text)?), 128, true).map_err(text)?;
        let data = out.data.to_vec().map_err(text)?;
        let found = data[..(t * h) as usize].par_chunks_exact(h as usize).enumerate();
        if let Some(bad) = found.filter(|(_, row)| *row != expected.data).map(|(i, _)| i).min() {
            return Err(format!("data: row {bad} differs; {name}"));
        }
        let sf: Vec<f32> = expected.sf.iter().copied().cycle().take(t as usize * expected.sf.len()).collect();
        out.check_sf(name, &sf_words(&sf, expected.sf.len(), out.layout))?;
    }
    let (t, h, stride) = (130u64, 576u64, (1u64 << 24) + 8);
    let name = "kind=large input,h=576,t=130";
    if ctx.case(name) {
        let values = normal(DType::Bf16, (t, h), name);
        let expected = values.cast(Format::E2m1, 32, Rule::Powers, None);
        let compact = Rows::plain(device, DType::Bf16, &values.values, [t, h], (h, 0))?;
        let Elements::Bf16(compact) = &compact.elements else { return Err(format!("no bf16; {name}")) };
        let mut wide = device.alloc::<bf16>(((t - 1) * stride + h) as usize).map_err(text)?;
        for i in 0..t {
            let mut to = wide.strided_mut(&[h], &[1], i * stride).map_err(text)?;
            stream.copy(&mut to, &compact.strided(&[h], &[1], i * h).map_err(text)?).map_err(text)?;
        }
        let mut out = Outputs::new(device, (t, h), Format::E2m1, 32, SfLayout::RowMajorPacked)?;
        let x = wide.strided(&[t, h], &[stride, 1], 0).map_err(text)?;
        out.cast(&stream, Input::Plain(x), 32, true).map_err(text)?;
        out.check_data(name, &expected.data)?;
        out.check_sf(name, &sf_words(&expected.sf, 18, out.layout))?;
    }
    Ok(())
}

// The benchmark.

/// A row; `block` and with it a quantised input, if `input` is a format's data type.
fn row(
    case: String,
    input: DType,
    (t, h): (u64, u64),
    format: Format,
    npc: u32,
    layout: SfLayout,
    block: Option<(u32, u32)>,
) -> Row {
    row_rounded(case, input, (t, h), format, npc, layout, block.map(|block| (block, SfLayout::ColMajorPacked)), false)
}

/// A row with any layout of the input's scales, and stochastic rounding or not.
#[allow(clippy::too_many_arguments)]
fn row_rounded(
    case: String,
    input: DType,
    (t, h): (u64, u64),
    format: Format,
    npc: u32,
    layout: SfLayout,
    block: Option<((u32, u32), SfLayout)>,
    stochastic: bool,
) -> Row {
    let sf_bytes = |sf: SfShape| sf.shape[0] * sf.shape[1] * sf.dtype.size();
    let x_sf = block.map_or(0, |(block, layout)| sf_bytes(sf_shape(t, h, block, layout)));
    let x_columns = if input == DType::E2m1x2 { h / 2 } else { h };
    let bytes = t * x_columns * input.size() + x_sf + t * format.columns(h) + sf_bytes(sf_shape(t, h, (1, npc), layout));
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let n = t * x_columns;
        let elements = match input {
            DType::Bf16 => Elements::Bf16(inputs::normal_bf16(device, 0, n)?),
            DType::F32 => Elements::F32(inputs::normal_f32(device, 0, n)?),
            DType::E4m3 => Elements::E4m3(inputs::of_normal(device, 0, n, |v| E4m3::from_f32(v * 128.0))?),
            _ => Elements::E2m1(inputs::repeated(device, bytemuck::cast_slice(&Rng::new(0).bytes(inputs::BLOCK as usize)), n)?),
        };
        let scales = |(block, layout): ((u32, u32), SfLayout)| -> Result<_, String> {
            let SfShape { shape, strides, elements, .. } = sf_shape(t, h, block, layout);
            // 2^-7, four of them in a word but for f32.
            let code = u32::from_ne_bytes([E4m3::from_f32(2f32.powi(-7)).0; 4]);
            let word = if layout.is_e4m3() { code } else { inputs::scale_word(layout.is_packed()) };
            Ok((Scales { words: inputs::constant(device, word, elements)?, shape, strides, layout }, block))
        };
        let source = Source {
            rows: Rows { elements, shape: [t, x_columns], stride: x_columns, offset: 0 },
            scales: block.map(scales).transpose()?,
            reference: Reference::new(Values::plain(Vec::new(), h)),
            kind: "benchmark",
        };
        let mut out = Outputs::new(device, (t, h), format, npc, layout)?;
        let round = !layout.is_e4m3();
        Ok(Box::new(move |stream| out.cast_rounded(stream, source.input()?, npc, round, stochastic)))
    };
    Row { op: "per_token_cast", case, bytes, build: Box::new(build) }
}

/// The peers' cases, shapes of 1.0.0's own benchmark (8001 tokens), whole rows, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let packed = SfLayout::ColMajorPacked;
    let case = |format: Format, h: u64, input: &str, npc: u32, t: u64| {
        format!("fmt={format},h={h},input={input},npc={npc},sf=packed,t={t}")
    };
    for (dtype, input) in [(DType::Bf16, "bf16"), (DType::F32, "f32")] {
        for t in [8064, 8001] {
            for format in FORMATS {
                for npc in [32, 128, 7168] {
                    rows.push(row(case(format, 7168, input, npc, t), dtype, (t, 7168), format, npc, packed, None));
                }
            }
        }
        rows.push(row(case(Format::E4m3, 2048, input, 32, 4001), dtype, (4001, 2048), Format::E4m3, 32, packed, None));
        rows.push(row(case(Format::E4m3, 576, input, 128, 8001), dtype, (8001, 576), Format::E4m3, 128, packed, None));
    }
    for (dtype, input) in [(DType::E4m3, "e4m3"), (DType::E2m1x2, "e2m1")] {
        for format in FORMATS {
            for npc in [32, 128] {
                for block in [(128, 128), (32, 32)] {
                    let input = format!("{input},{}x{}", block.0, block.1);
                    rows.push(row(case(format, 7168, &input, npc, 8001), dtype, (8001, 7168), format, npc, packed, Some(block)));
                }
            }
        }
    }
    rows.extend(bench_additions());
    for t in [1, 16, 128] {
        for (dtype, input) in [(DType::Bf16, "bf16"), (DType::F32, "f32")] {
            rows.push(row(case(Format::E4m3, 7168, input, 128, t), dtype, (t, 7168), Format::E4m3, 128, packed, None));
        }
        rows.push(row(case(Format::E2m1, 7168, "bf16", 32, t), DType::Bf16, (t, 7168), Format::E2m1, 32, packed, None));
        let input = "e4m3,128x128";
        rows.push(row(
            case(Format::E4m3, 7168, input, 128, t),
            DType::E4m3,
            (t, 7168),
            Format::E4m3,
            128,
            packed,
            Some((128, 128)),
        ));
    }
    rows
}

/// Other layouts of the scales, and stochastic rounding.
fn bench_additions() -> Vec<Row> {
    let mut rows = Vec::new();
    let (shape, row_major, col_major) = ((8064, 7168), SfLayout::RowMajorE4m3, SfLayout::ColMajorE4m3);
    for (format, npc) in [(Format::E2m1, 16), (Format::E4m3, 32)] {
        for (layout, sf) in [(row_major, "e4m3"), (col_major, "e4m3_col")] {
            let case = format!("fmt={format},h=7168,input=bf16,npc={npc},sf={sf},t=8064");
            rows.push(row(case, DType::Bf16, shape, format, npc, layout, None));
        }
        for (dtype, input) in [(DType::Bf16, "bf16"), (DType::F32, "f32")] {
            let case = format!("fmt={format},h=7168,input={input},npc=32,rounding=stochastic,sf=packed,t=8064");
            rows.push(row_rounded(case, dtype, shape, format, 32, SfLayout::ColMajorPacked, None, true));
        }
        let case = format!("fmt={format},h=7168,in_sf=e4m3,input=e2m1,1x16,npc=32,sf=packed,t=8064");
        let block = Some(((1, 16), row_major));
        rows.push(row_rounded(case, DType::E2m1x2, shape, format, 32, SfLayout::ColMajorPacked, block, false));
    }
    let case = "fmt=e4m3,h=7168,input=bf16,npc=32,sf=packed_row,t=8064".to_owned();
    rows.push(row(case, DType::Bf16, shape, Format::E4m3, 32, SfLayout::RowMajorPacked, None));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, Result};
    use ferrotile_kernels::quant::common;
    use proptest::prelude::{Just, ProptestConfig, any, prop_oneof, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The vectors of quant.md 9, to hold the reference to something.
    #[test]
    fn the_reference_reproduces_the_published_vectors() {
        let check = |x: [f32; 8], format, round, sf: u32, data: &[u8]| {
            let rule = if round { Rule::Powers } else { Rule::Exact };
            let got = Values::plain(x.to_vec(), 8).cast(format, 16, rule, None);
            assert_eq!((got.sf[0].to_bits(), &got.data[..]), (sf, data), "{x:?} {format} {round}");
        };
        let x = [0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0];
        check(x, Format::E4m3, false, 0x3E64_9249, &[0x2E, 0xB9, 0x49, 0x55, 0xE0, 0x00, 0x80, 0x7E]);
        check(x, Format::E4m3, true, 0x3E80_0000, &[0x2D, 0xB8, 0x48, 0x54, 0xDF, 0x00, 0x80, 0x7C]);
        check(x, Format::E2m1, false, 0x4185_5555, &[0x80, 0x00, 0x09, 0x78]);
        check(x, Format::E2m1, true, 0x4200_0000, &[0x80, 0x00, 0x08, 0x58]);
        let y = [0.3, -2.0, 5.0, -6.0, 1.25, 2.5, -0.75, 0.26];
        check(y, Format::E2m1, true, 0x3F80_0000, &[0xC1, 0xF6, 0x42, 0x1A]);
        check(y, Format::E4m3, true, (127 - 6) << 23, &[0x5A, 0xF0, 0x7A, 0xFC, 0x6A, 0x72, 0xE4, 0x58]);
        check([0.0; 8], Format::E4m3, false, 0x346F_ACAD, &[0; 8]);
        check([0.0; 8], Format::E4m3, true, 105 << 23, &[0; 8]);
        check([0.0; 8], Format::E2m1, true, 1 << 23, &[0; 4]);
        // The layout example: the scale of row 3, group 4 of 5 is byte 0 of word 11.
        let sf: Vec<f32> = (0..25).map(|i| f32::from_bits((100 + i) << 23)).collect();
        let words = sf_words(&sf, 5, SfLayout::ColMajorPacked);
        assert_eq!((words[3 * 2 + 1], sf_shape(5, 576, (1, 128), SfLayout::ColMajorPacked).strides), (100 + 3 * 5 + 4, [1, 8]));
    }

    /// The kernels' scales are made without a division. Around every magnitude from which on the specification's quotient becomes another
    /// e4m3, and for others, they are the same.
    #[test]
    fn e4m3_scales_are_those_of_the_quotient() {
        for (format, largest) in [(Format::E4m3, 448f32), (Format::E2m1, 6.0)] {
            let check = |c: f32| {
                let got = match format {
                    Format::E4m3 => common::scale_e4m3::<common::E4m3>(c),
                    Format::E2m1 => common::scale_e4m3::<common::E2m1>(c),
                };
                let expected = scale(c, format, Rule::E4m3);
                assert_eq!((got.sf, got.inv), expected, "{c:e} for {format}");
            };
            for code in 1..=0x7E {
                let (mut low, mut high) = ((largest / 512.0).to_bits(), f32::MAX.to_bits());
                while low < high {
                    let middle = low + (high - low) / 2;
                    if encode_e4m3(f32::from_bits(middle) / largest) >= code { high = middle } else { low = middle + 1 }
                }
                (low.saturating_sub(1000)..low + 1000).for_each(|bits| check(f32::from_bits(bits)));
            }
            (0..1 << 16).for_each(|i: u32| check(f32::from_bits(i.wrapping_mul(0x7FF1)).abs()));
            [0.0, f32::MAX, f32::INFINITY, f32::MIN_POSITIVE, f32::NAN].into_iter().for_each(check);
        }
    }

    /// The errors of stochastic rounding average to zero for every distance from a neighbour: their sum stays within what that many
    /// independent choices deviate by. Rows of one value, so that the exact answer is known.
    #[test]
    fn stochastic_rounding_is_unbiased() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let (t, h) = (64u64, 256u64);
        for (format, largest) in [(Format::E4m3, 448f32), (Format::E2m1, 6.0)] {
            // Every group starts with the largest value, so that its scale is 1; the others have a random last bit, for the hash.
            let rng = Rng::named("unbiased");
            let fraction = |row: u64| 1.0 + (row as f32 + 0.5) / t as f32 * if format == Format::E4m3 { 0.125 } else { 0.5 };
            let value = |i: u64| f32::from_bits(fraction(i / h).to_bits() ^ (rng.bits(i) & 15) as u32);
            let x: Vec<f32> = (0..t * h).map(|i| if i % 32 == 0 { largest } else { value(i) }).collect();
            let source = Source::plain(&device, DType::F32, Reference::new(Values::plain(x.clone(), h)), (h, 0), "one").unwrap();
            let mut out = Outputs::new(&device, (t, h), format, 32, SfLayout::RowMajor).unwrap();
            out.cast_rounded(&stream, source.input().unwrap(), 32, true, true).unwrap();
            let data = out.data.to_vec().unwrap();
            let got = decode(&data[..(t * format.columns(h)) as usize], format);
            let spacing = if format == Format::E4m3 { 0.125f64 } else { 0.5 };
            for row in 0..t {
                let at = (row * h) as usize..((row + 1) * h) as usize;
                let errors: Vec<f64> = at.map(|i| (got[i] as f64 - x[i] as f64) / spacing).collect();
                let p = (row as f64 + 0.5) / t as f64;
                let bound = 5.0 * (h as f64 * p * (1.0 - p)).sqrt() + 1.0;
                let sum: f64 = errors.iter().sum();
                assert!(errors.iter().all(|e| e.abs() < 1.0) && sum.abs() < bound, "{format}, row {row}: {sum}, allowed {bound}");
            }
        }
    }

    /// Buffers from which good and bad arguments are made.
    struct Bad {
        device: Device,
        x: Buffer<bf16>,
        bytes: Buffer<u8>,
        out: Buffer<u8>,
        sf: Buffer<f32>,
    }

    impl Bad {
        fn new() -> Self {
            let device = Device::emulator();
            let mut bad = Self {
                x: device.zeros(4096).unwrap(),
                bytes: device.zeros(4096).unwrap(),
                out: device.alloc(4096).unwrap(),
                sf: device.alloc(4096).unwrap(),
                device,
            };
            bad.out.fill_bytes(FILL).unwrap();
            bad.sf.fill_bytes(FILL).unwrap();
            bad
        }

        /// The arguments of a good call, spoiled by `edit`, fail, and leave the outputs alone.
        fn refused(&mut self, edit: impl for<'a> FnOnce(&mut Args<'a>, &'a Self)) -> Error {
            let error = {
                // SAFETY: the same memory seen twice, but a refused call does not touch it.
                let twin = unsafe { &*(self as *const Self) };
                let out = self.out.tensor_mut(&[4, 128]).unwrap().reinterpret(DType::E4m3).unwrap();
                let sf = SfMut { tensor: self.sf.tensor_mut(&[4, 4]).unwrap(), layout: SfLayout::RowMajor };
                let mut args = Args {
                    x: Input::Plain(twin.x.tensor(&[4, 128]).unwrap()),
                    npc: 32,
                    round_sf: true,
                    stochastic: false,
                    out,
                    sf,
                };
                edit(&mut args, twin);
                op::per_token_cast(&twin.device.stream().unwrap(), args).expect_err("this call must be refused")
            };
            assert!(error.to_string().starts_with("per_token_cast: "), "{error}");
            assert!(self.out.to_vec().unwrap().iter().all(|b| *b == FILL));
            assert!(self.sf.to_vec().unwrap().iter().all(|v| v.to_bits() == 0xA5A5_A5A5));
            error
        }

        fn out<'a>(&self, shape: &[u64], strides: &[u64], dtype: DType) -> TensorMut<'a> {
            // SAFETY: as in `refused`.
            unsafe { TensorMut::from_raw(&self.device, self.out.as_ptr(), dtype, shape, strides).unwrap() }
        }

        fn sf<'a>(&self, shape: &[u64], strides: &[u64], layout: SfLayout) -> SfMut<'a> {
            // SAFETY: as in `refused`.
            let tensor = unsafe { TensorMut::from_raw(&self.device, self.sf.as_ptr(), layout.dtype(), shape, strides).unwrap() };
            SfMut { tensor, layout }
        }

        fn x<'a>(&self, offset: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> TensorRef<'a> {
            // SAFETY: as in `refused`.
            unsafe { TensorRef::from_raw(&self.device, self.x.as_ptr() + offset, dtype, shape, strides).unwrap() }
        }

        fn pair<'a>(&'a self, block: (u32, u32)) -> Input<'a> {
            let data = self.bytes.tensor(&[4, 128]).unwrap().reinterpret(DType::E4m3).unwrap();
            let tensor = self.x(0, DType::F32, &[1, 4], &[4, 1]);
            Input::Quantised { data, sf: Sf { tensor, layout: SfLayout::RowMajor }, block }
        }
    }

    macro_rules! refused {
        ($bad:expr, |$args:ident, $b:ident| $edit:expr, $pattern:pat) => {{
            let error = $bad.refused(|$args, $b| $edit);
            assert!(matches!(error, $pattern), "{error:?}");
        }};
    }

    #[test]
    fn bad_arguments_are_refused() {
        let bad = &mut Bad::new();
        // Shapes.
        refused!(bad, |a, b| a.x = Input::Plain(b.x.tensor(&[512]).unwrap()), Error::Shape { arg: "x", .. });
        refused!(bad, |a, b| a.x = Input::Plain(b.x.tensor(&[4, 96]).unwrap()), Error::Shape { arg: "out", .. });
        refused!(bad, |a, b| a.out = b.out(&[4, 128], &[128, 1], DType::E2m1x2), Error::Shape { arg: "out", .. });
        refused!(bad, |a, b| a.sf = b.sf(&[4, 3], &[3, 1], SfLayout::RowMajor), Error::Shape { arg: "sf", .. });
        refused!(bad, |a, _b| a.npc = 64, Error::Shape { arg: "sf", .. });
        // Types.
        refused!(bad, |a, b| a.x = Input::Plain(b.x(0, DType::F16, &[4, 128], &[128, 1])), Error::DType { arg: "x", .. });
        refused!(bad, |a, b| a.x = Input::Plain(b.x(0, DType::E4m3, &[4, 128], &[128, 1])), Error::DType { arg: "x", .. });
        refused!(bad, |a, b| a.out = b.out(&[4, 128], &[128, 1], DType::E5m2), Error::DType { arg: "out", .. });
        refused!(
            bad,
            |a, b| {
                a.sf = b.sf(&[4, 4], &[4, 1], SfLayout::RowMajor);
                a.sf.layout = SfLayout::RowMajorPacked;
            },
            Error::DType { arg: "sf", .. }
        );
        // Layouts.
        refused!(bad, |a, b| a.x = Input::Plain(b.x(0, DType::Bf16, &[4, 128], &[1, 4])), Error::Layout { arg: "x", .. });
        refused!(bad, |a, b| a.x = Input::Plain(b.x(1, DType::Bf16, &[4, 128], &[128, 1])), Error::Layout { arg: "x", .. });
        refused!(bad, |a, b| a.out = b.out(&[4, 128], &[256, 1], DType::E4m3), Error::Layout { arg: "out", .. });
        refused!(bad, |a, b| a.sf = b.sf(&[4, 4], &[1, 4], SfLayout::RowMajor), Error::Layout { arg: "sf", .. });
        refused!(bad, |a, b| a.sf = b.sf(&[4, 4], &[4, 1], SfLayout::ColMajor), Error::Layout { arg: "sf", .. });
        refused!(bad, |a, b| a.sf = b.sf(&[4, 4], &[1, 5], SfLayout::ColMajor), Error::Layout { arg: "sf", .. });
        // Values.
        refused!(
            bad,
            |a, b| {
                // Rounded to powers of two and e4m3 exclude each other.
                a.sf = b.sf(&[4, 4], &[4, 1], SfLayout::RowMajorE4m3);
                a.round_sf = true;
            },
            Error::Value { arg: "round_sf", .. }
        );
        refused!(bad, |a, b| a.sf = b.sf(&[4, 4], &[4, 1], SfLayout::PerChannelPacked), Error::Layout { arg: "sf", .. });
        refused!(
            bad,
            |a, b| {
                a.sf = b.sf(&[4, 4], &[1, 20], SfLayout::ColMajorE4m3);
                a.round_sf = false;
            },
            Error::Layout { arg: "sf", .. }
        );
        for (layout, stochastic) in [(SfLayout::RowMajor, true), (SfLayout::RowMajorE4m3, false)] {
            let error = bad.refused(|a, b| {
                a.x = Input::Plain(b.x.tensor(&[4, 192]).unwrap());
                a.out = b.out(&[4, 192], &[192, 1], DType::E4m3);
                a.sf = b.sf(&[4, 1], &[1, 1], layout);
                (a.npc, a.round_sf, a.stochastic) = (192, false, stochastic);
            });
            match stochastic {
                true => assert!(matches!(error, Error::Value { arg: "stochastic with one scale a row", .. }), "{error:?}"),
                false => assert!(matches!(error, Error::Layout { arg: "sf", .. }), "{error:?}"),
            }
        }
        for npc in [0, 8, 48, 256] {
            refused!(bad, |a, _b| a.npc = npc, Error::Value { arg: "npc", .. });
        }
        refused!(
            bad,
            |a, b| {
                a.x = Input::Plain(b.x.tensor(&[4, 96]).unwrap());
                a.out = b.out(&[4, 96], &[96, 1], DType::E4m3);
                a.sf = b.sf(&[4, 1], &[1, 1], SfLayout::RowMajor);
                a.npc = 96;
            },
            Error::Value { arg: "npc for a whole row", .. }
        );
        refused!(
            bad,
            |a, b| {
                a.sf = b.sf(&[4, 1], &[1, 4], SfLayout::ColMajorPacked);
                a.round_sf = false;
            },
            Error::Value { arg: "round_sf", .. }
        );
        refused!(
            bad,
            |a, b| {
                a.x = Input::Plain(b.x.tensor(&[4, 33]).unwrap());
                a.out = b.out(&[4, 16], &[16, 1], DType::E2m1x2);
            },
            Error::Value { arg: "hidden", .. }
        );
        refused!(
            bad,
            |a, b| a.x = Input::Plain(b.x(0, DType::Bf16, &[1 << 31, 128], &[0, 1])),
            Error::Value { arg: "num_tokens", .. }
        );
        refused!(bad, |a, b| a.x = Input::Plain(b.x(0, DType::Bf16, &[1, 1 << 31], &[0, 1])), Error::Value { arg: "hidden", .. });
        // Memory.
        refused!(
            bad,
            |a, b| a.x = Input::Plain(unsafe {
                TensorRef::from_raw(&b.device, b.out.as_ptr() + 256, DType::Bf16, &[4, 128], &[128, 1]).unwrap()
            }),
            Error::Overlap { a: "x", b: "out", .. }
        );
        refused!(
            bad,
            |a, b| a.x = Input::Plain(unsafe {
                TensorRef::from_raw(&b.device, b.sf.as_ptr(), DType::Bf16, &[4, 128], &[128, 1]).unwrap()
            }),
            Error::Overlap { a: "x", b: "sf", .. }
        );
        let checked = Device::emulator().checked();
        let elsewhere = checked.zeros::<bf16>(512).unwrap();
        let tensor = elsewhere.tensor(&[4, 128]).unwrap();
        let error = bad.refused(|a, _| {
            // SAFETY: refused, see there; only the device matters.
            let tensor = unsafe { TensorRef::from_raw(tensor.device(), tensor.ptr(), DType::Bf16, &[4, 128], &[128, 1]) };
            a.x = Input::Plain(tensor.unwrap());
        });
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error:?}");
    }

    #[test]
    fn bad_quantised_inputs_are_refused() {
        let bad = &mut Bad::new();
        refused!(
            bad,
            |a, b| {
                a.x = b.pair((128, 32));
                a.npc = 96;
            },
            Error::Value { arg: "npc with quantised input", .. }
        );
        // One scale a row is for plain input.
        refused!(
            bad,
            |a, b| {
                a.x = b.pair((128, 32));
                a.npc = 256;
            },
            Error::Value { arg: "npc with quantised input", .. }
        );
        for npt in [0, 3] {
            refused!(bad, |a, b| a.x = b.pair((npt, 32)), Error::Value { arg: "npt of the input's block", .. });
        }
        for npc in [0, 8, 48] {
            refused!(bad, |a, b| a.x = b.pair((128, npc)), Error::Value { arg: "npc of the input's block", .. });
        }
        refused!(bad, |a, b| a.x = b.pair((2, 32)), Error::Shape { arg: "x_sf", .. });
        refused!(bad, |a, b| a.x = b.pair((128, 64)), Error::Shape { arg: "x_sf", .. });
        refused!(
            bad,
            |a, b| {
                let Input::Quantised { data, mut sf, block } = b.pair((128, 32)) else { unreachable!() };
                sf.layout = SfLayout::ColMajorPacked;
                a.x = Input::Quantised { data, sf, block };
            },
            Error::DType { arg: "x_sf", .. }
        );
        refused!(
            bad,
            |a, b| {
                let Input::Quantised { sf, block, .. } = b.pair((128, 32)) else { unreachable!() };
                a.x = Input::Quantised { data: b.x(0, DType::Bf16, &[4, 128], &[128, 1]), sf, block };
            },
            Error::DType { arg: "x", .. }
        );
        refused!(
            bad,
            |a, b| {
                let Input::Quantised { data, block, .. } = b.pair((128, 32)) else { unreachable!() };
                // SAFETY: refused, see there.
                let tensor = unsafe { TensorRef::from_raw(&b.device, b.out.as_ptr() + 16, DType::F32, &[1, 4], &[4, 1]) };
                a.x = Input::Quantised { data, sf: Sf { tensor: tensor.unwrap(), layout: SfLayout::RowMajor }, block };
            },
            Error::Overlap { a: "x_sf", b: "out", .. }
        );
    }

    #[test]
    fn bad_arguments_of_the_variants_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(4 * 128).unwrap();
        let x = x.tensor(&[4, 128]).unwrap();
        let mut sf = device.zeros::<f32>(64).unwrap();
        let mut only = |npc, round_sf, layout: SfLayout| -> Result<()> {
            let tensor = sf.strided_mut(&[4, 1], &[1, 4], 0)?.reinterpret(layout.dtype())?;
            let sf = SfMut { tensor, layout };
            op::per_token_cast_with_sf_only(&stream, SfOnlyArgs { x, format: Format::E4m3, npc, round_sf, sf })
        };
        only(128, true, SfLayout::ColMajorPacked).unwrap();
        assert!(matches!(only(128, false, SfLayout::ColMajorPacked), Err(Error::Value { arg: "round_sf", .. })));
        assert!(matches!(only(256, true, SfLayout::ColMajor), Err(Error::Value { arg: "npc", .. })));
        assert!(matches!(only(64, true, SfLayout::ColMajor), Err(Error::Shape { arg: "sf", .. })));

        let sf = device.upload(&[1.0f32; 64]).unwrap();
        let mut out = device.zeros::<E4m3>(4 * 128).unwrap();
        let mut given = |npc, layout: SfLayout| -> Result<()> {
            let tensor = sf.strided(&[4, 1], &[1, 4], 0)?.reinterpret(layout.dtype())?;
            let args = PrecomputedArgs { x, sf: Sf { tensor, layout }, npc, out: out.tensor_mut(&[4, 128])? };
            op::per_token_cast_with_precomputed_sf(&stream, args)
        };
        given(128, SfLayout::RowMajor).unwrap();
        given(128, SfLayout::ColMajor).unwrap();
        for layout in [SfLayout::ColMajorPacked, SfLayout::RowMajorPacked, SfLayout::PerChannelPacked] {
            assert!(matches!(given(128, layout), Err(Error::Layout { arg: "sf", .. })));
        }
        assert!(matches!(given(96, SfLayout::RowMajor), Err(Error::Value { arg: "npc", .. })));
        assert!(matches!(given(32, SfLayout::RowMajor), Err(Error::Shape { arg: "sf", .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, row distance, alignment, magnitude and option.
        #[test]
        fn any_plain_input(
            t in 0u64..9, h in 1u64..300, gap in 0u64..20, offset in 0u64..9, out_offset in 0u64..9, f32_input in any::<bool>(),
            e2m1 in any::<bool>(), npc in prop_oneof![Just(16u32), Just(32), Just(64), Just(128)], config in 0usize..8,
            stochastic in any::<bool>(), exponent in -120i32..120, seed in any::<u32>(),
        ) {
            let h = if e2m1 { h + h % 2 } else { h };
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let mut values = normal(dtype, (t, h), &format!("{seed}"));
            // What is left of a small value as a bf16 is what the op sees.
            let held = |v: f32| if f32_input { v } else { bf16::from_f32(v).to_f32() };
            values.values.iter_mut().for_each(|v| *v = held(*v * 2f32.powi(exponent)));
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            let source = Source::plain(&ctx.device, dtype, Reference::new(values), (h + gap, offset), "any").unwrap();
            let plan = Plan { npcs: &[npc], configs: &CONFIGS[config..config + 1], variants: true, stochastic, bias: None, out_offset };
            check_source(&ctx, &source, &FORMATS[e2m1 as usize..e2m1 as usize + 1], &plan).unwrap();
        }

        /// Any quantised input.
        #[test]
        fn any_quantised_input(
            t in 0u64..9, h in 1u64..150, gap in 0u64..20, offset in 0u64..9, out_offset in 0u64..9, from_e2m1 in any::<bool>(),
            e2m1 in any::<bool>(), npc in prop_oneof![Just(16u32), Just(32), Just(64), Just(128)], config in 0usize..8,
            stochastic in any::<bool>(), npt_log2 in 0u32..4, npc_log2 in 4u32..8, layout in 0usize..6, seed in any::<u32>(),
        ) {
            let format = FORMATS[from_e2m1 as usize];
            let (h, columns) = (2 * h, format.columns(2 * h));
            let block = (1 << npt_log2, 1 << npc_log2);
            let layout = LAYOUTS[layout];
            let rule = Rule::of(layout.is_packed() || seed % 2 == 0, layout);
            let (data, scales) = awkward_codes(format, (t, h), block, rule, false, &format!("{seed}"));
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            let at = (columns + gap, offset);
            let source = Source::from_codes(&ctx.device, data, h, scales, format, layout, at, "any").unwrap();
            let plan = Plan { npcs: &[npc], configs: &CONFIGS[config..config + 1], variants: false, stochastic, bias: None, out_offset };
            check_source(&ctx, &source, &FORMATS[e2m1 as usize..e2m1 as usize + 1], &plan).unwrap();
        }
    }
}
