//! What the tests of the casts with a scale for each channel share: the reference, inputs, outputs.

use crate::support::cases::rows_apart;
use crate::support::compare;
use crate::support::golden::{Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{ensure, text};
use ferrotile::quant::{Input, Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E4m3, TensorMut, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;

// The reference.

/// Data as bytes, row by row, and scales `(M, H)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    pub data: Vec<u8>,
    pub sf: Vec<f32>,
}

/// `(sf, what the data are multiplied by)`.
fn scale(amax: f32, round: bool) -> (f32, f32) {
    let c = if amax > 1e-4 { amax } else { 1e-4 };
    if c == f32::INFINITY {
        return (f32::INFINITY, if round { f32::NEG_INFINITY } else { 0.0 });
    }
    let s = c / 448.0;
    if !round {
        return (s, 448.0 / c);
    }
    // The smallest power of two that is not below `s`; all of them are normal numbers.
    let mut power = f32::from_bits(s.to_bits() & 0x7F80_0000);
    if power < s {
        power *= 2.0;
    }
    (power, 1.0 / power)
}

/// The e4m3 nearest to a value, ties to even: codes count steps of the spacing around the value, which is a power of two.
fn e4m3(v: f32) -> u8 {
    if v.is_nan() {
        return 0x7F;
    }
    let sign = (v.to_bits() >> 24 & 0x80) as u8;
    let a = v.abs();
    if a >= 448.0 {
        return sign | 0x7E;
    }
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    // Adding 2^23 rounds to an integer, ties to even; there are fewer than 16 steps in a binade.
    let steps = a / f32::from_bits(((exponent - 3 + 127) as u32) << 23) + 8_388_608.0;
    sign | (steps.to_bits() as u8 + ((exponent + 6) << 3) as u8)
}

/// The value of an e4m3.
pub fn e4m3_value(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
    let magnitude = match code & 0x7F {
        0x7F => f32::NAN,
        _ if exponent == 0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The cast of `rows` rows of `h` channels; row `r` is `x[source(r)]`, or zeros.
pub fn reference(
    x: &[f32],
    (rows, h): (usize, usize),
    npt: u32,
    round: bool,
    source: impl Fn(usize) -> Option<usize> + Sync,
) -> Quantised {
    let npt = npt as usize;
    let mut data = vec![0u8; rows * h];
    let mut sf = vec![0f32; rows.div_ceil(npt) * h];
    if h == 0 {
        return Quantised { data, sf };
    }
    let blocks = data.par_chunks_mut(npt * h).zip(sf.par_chunks_mut(h)).enumerate();
    blocks.for_each(|(m, (data, sf))| {
        let row = |i: usize| source(m * npt + i).map(|from| &x[from * h..(from + 1) * h]);
        let rows = data.len() / h;
        let mut amax = vec![0f32; h];
        for values in (0..rows).filter_map(row) {
            // `>` is false for NaN.
            amax.iter_mut().zip(values).for_each(|(max, v)| *max = if v.abs() > *max { v.abs() } else { *max });
        }
        let mut inverse = vec![0f32; h];
        for k in 0..h {
            (sf[k], inverse[k]) = scale(amax[k], round);
        }
        for (i, out) in data.chunks_exact_mut(h).enumerate() {
            match row(i) {
                Some(values) => out.iter_mut().zip(values.iter().zip(&inverse)).for_each(|(q, (v, inv))| *q = e4m3(v * inv)),
                // A row of zeros; times an infinite factor they are NaN.
                None => out.iter_mut().zip(&inverse).for_each(|(q, inv)| *q = e4m3(0.0 * inv)),
            }
        }
    });
    Quantised { data, sf }
}

impl Quantised {
    /// What the data stand for.
    pub fn values(&self, h: usize, npt: u32) -> Vec<f32> {
        let value = |i: usize| e4m3_value(self.data[i]) * self.sf[i / h / npt as usize * h + i % h];
        (0..self.data.len()).into_par_iter().map(value).collect()
    }

    /// Words of the scale tensor, contiguous: f32 bits, or the exponents of four block rows with zeros for those that do not exist.
    pub fn sf_words(&self, h: usize, layout: SfLayout) -> Vec<u32> {
        if layout != SfLayout::PerChannelPacked {
            return self.sf.iter().map(|v| v.to_bits()).collect();
        }
        let mut words = vec![0u32; (self.sf.len() / h.max(1)).div_ceil(4) * h];
        for (i, v) in self.sf.iter().enumerate() {
            let (m, k) = (i / h, i % h);
            words[m / 4 * h + k] |= (v.to_bits() >> 23) << (m % 4 * 8);
        }
        words
    }

    /// Data of `(rows, h)` as `(h, rows)`.
    pub fn transposed(&self, h: usize) -> Vec<u8> {
        let rows = self.data.len() / h.max(1);
        let mut out = vec![0; self.data.len()];
        out.par_chunks_mut(rows.max(1)).enumerate().for_each(|(k, out)| {
            out.iter_mut().enumerate().for_each(|(r, q)| *q = self.data[r * h + k]);
        });
        out
    }
}

// Inputs.

/// What is cast: an element type, and for e4m3 the layout of its scales and the channels that share one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Bf16,
    F32,
    Pair(SfLayout, u32),
}

impl Kind {
    /// As it stands in the name of a case.
    pub fn name(self) -> String {
        match self {
            Kind::Bf16 => "bf16".to_owned(),
            Kind::F32 => "f32".to_owned(),
            Kind::Pair(layout, npc) => format!("e4m3 1x{npc} {layout}"),
        }
    }

    /// Bytes of `rows` rows of `h` channels with their scales.
    pub fn bytes(self, rows: u64, h: u64) -> u64 {
        match self {
            Kind::Bf16 => 2 * rows * h,
            Kind::F32 => 4 * rows * h,
            Kind::Pair(layout, npc) => {
                let sf = sf_shape(rows, h, (1, npc), layout);
                rows * h + sf.shape[0] * sf.shape[1] * 4
            }
        }
    }
}

/// An input on the device, and the values that it stands for.
pub struct Source {
    pub kind: Kind,
    pub t: u64,
    pub h: u64,
    pub stride: u64,
    pub offset: u64,
    pub values: Vec<f32>,
    data: Data,
}

enum Data {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
    Pair(Buffer<E4m3>, SfShape, Buffer<u32>),
}

impl Source {
    /// Plain input; bf16 values must be given as such.
    pub fn plain(device: &Device, kind: Kind, (t, h): (u64, u64), place: (u64, u64), values: Vec<f32>) -> Result<Self, String> {
        let data = match kind {
            Kind::Bf16 => {
                let rows: Vec<bf16> = values.par_iter().map(|v| bf16::from_f32(*v)).collect();
                Data::Bf16(device.upload(&rows_apart(&rows, h, place, bf16::MAX)).map_err(text)?)
            }
            _ => Data::F32(device.upload(&rows_apart(&values, h, place, f32::MAX)).map_err(text)?),
        };
        Ok(Self { kind, t, h, stride: place.0, offset: place.1, values, data })
    }

    /// The input of a golden case: bf16, or quantised if the call says how many channels have a scale.
    pub fn recorded(device: &Device, golden: &Golden, case: &Case) -> Result<Self, String> {
        let npc: Option<u32> = case.param_or("num_per_channels", None)?;
        let x = golden.tensor(case, if npc.is_some() { "in/x.0" } else { "in/x" })?;
        let (shape, place) = ((x.shape[0], x.shape[1]), (x.shape[1], 0));
        match npc {
            None => Self::plain(device, Kind::Bf16, shape, place, x.floats()?),
            Some(npc) => {
                let scales = golden.tensor(case, "in/x.1")?.to_vec::<f32>()?;
                Self::pair(device, (SfLayout::RowMajor, npc), shape, place, x.bytes, &scales)
            }
        }
    }

    /// Quantised input from its codes and scales `(T, K)`; packed scales must be powers of two.
    pub fn pair(
        device: &Device,
        (layout, npc): (SfLayout, u32),
        (t, h): (u64, u64),
        place: (u64, u64),
        codes: &[u8],
        scales: &[f32],
    ) -> Result<Self, String> {
        let columns = h.div_ceil(npc.into()) as usize;
        let values = codes.par_iter().enumerate().map(|(i, code)| {
            let (row, k) = (i / h as usize, i % h as usize / npc as usize);
            e4m3_value(*code) * scales[row * columns + k]
        });
        let values = values.collect();
        let shape = sf_shape(t, h, (1, npc), layout);
        let mut words = vec![u32::from_ne_bytes([0xA5; 4]); shape.elements as usize];
        for (row, scales) in scales.chunks_exact(columns.max(1)).enumerate() {
            for (k, scale) in scales.iter().enumerate() {
                if layout.is_packed() {
                    let at = (row as u64 * shape.strides[0] + k as u64 / 4 * shape.strides[1]) as usize;
                    let byte = 8 * (k % 4);
                    words[at] = words[at] & !(0xFF << byte) | (scale.to_bits() >> 23) << byte;
                } else {
                    words[(row as u64 * shape.strides[0] + k as u64 * shape.strides[1]) as usize] = scale.to_bits();
                }
            }
        }
        let sf = device.upload(&words).map_err(text)?;
        let codes: Vec<E4m3> = codes.iter().map(|code| E4m3(*code)).collect();
        let data = Data::Pair(device.upload(&rows_apart(&codes, h, place, E4m3(0x7E))).map_err(text)?, shape, sf);
        Ok(Self { kind: Kind::Pair(layout, npc), t, h, stride: place.0, offset: place.1, values, data })
    }

    /// Normal values, or [`awkward`] ones; for pairs codes of all kinds and scales of their own.
    pub fn random(device: &Device, kind: Kind, (t, h): (u64, u64), place: (u64, u64), hard: bool) -> Result<Self, String> {
        let name = format!("{} {t} {h} {hard}", kind.name());
        let rng = Rng::named(&name);
        let len = (t * h) as usize;
        if let Kind::Pair(layout, npc) = kind {
            let codes = rng.fill(len, |rng, i| match rng.bits(i) {
                // All codes, or those of normal values with the scale 1/128.
                bits if hard && bits & 7 == 0 => (bits >> 8) as u8,
                _ => e4m3(rng.normal(i) * 128.0),
            });
            let scales = rng.stream(1).fill((t * h.div_ceil(npc.into())) as usize, |rng, i| {
                let power = 2f32.powi(rng.below(i, if hard { 40 } else { 4 }) as i32 - 20);
                if layout.is_packed() { power } else { power * (1.0 + rng.stream(2).unit(i)) }
            });
            return Self::pair(device, (layout, npc), (t, h), place, &codes, &scales);
        }
        let mut values = rng.normal_f32(len);
        if hard {
            awkward(&mut values, h, kind, rng.stream(1));
        }
        if kind == Kind::Bf16 {
            // Toward zero: the largest f32 would become infinity.
            let cut =
                |v: &mut f32| *v = if hard { f32::from_bits(v.to_bits() & 0xFFFF_0000) } else { bf16::from_f32(*v).to_f32() };
            values.par_iter_mut().for_each(cut);
        }
        Self::plain(device, kind, (t, h), place, values)
    }

    /// Normal values for a benchmark; for pairs codes and scales as a cast of them has.
    pub fn bench(device: &Device, kind: Kind, (t, h): (u64, u64)) -> Result<Self, String> {
        let data = match kind {
            Kind::Bf16 => Data::Bf16(inputs::normal_bf16(device, 0, t * h)?),
            Kind::F32 => Data::F32(inputs::normal_f32(device, 0, t * h)?),
            Kind::Pair(layout, npc) => {
                // The largest of 128 is mostly between 2.2 and 3.4.
                let codes = inputs::of_normal(device, 0, t * h, |v| E4m3(e4m3(v * 128.0)))?;
                let shape = sf_shape(t, h, (1, npc), layout);
                let words = Rng::new(1).fill(inputs::BLOCK as usize, |rng, i| {
                    if layout.is_packed() { 0x7878_7878 } else { ((2.2 + 1.2 * rng.unit(i)) / 448.0).to_bits() }
                });
                let sf = inputs::repeated(device, &words, shape.elements)?;
                Data::Pair(codes, shape, sf)
            }
        };
        Ok(Self { kind, t, h, stride: h, offset: 0, values: Vec::new(), data })
    }

    /// A single row `t` times, all at the same address.
    pub fn repeated(self, t: u64) -> Self {
        Self { t, stride: 0, ..self }
    }

    /// What launchers take.
    pub fn input(&self) -> ferrotile::Result<Input<'_>> {
        let (shape, strides) = ([self.t, self.h], [self.stride, 1]);
        Ok(match &self.data {
            Data::Bf16(b) => Input::Plain(b.strided(&shape, &strides, self.offset)?),
            Data::F32(b) => Input::Plain(b.strided(&shape, &strides, self.offset)?),
            Data::Pair(b, sf, words) => {
                let Kind::Pair(layout, npc) = self.kind else { unreachable!("a pair is made of one") };
                let tensor = words.strided(&sf.shape, &sf.strides, 0)?.reinterpret(sf.dtype)?;
                Input::Quantised { data: b.strided(&shape, &strides, self.offset)?, sf: Sf { tensor, layout }, block: (1, npc) }
            }
        })
    }
}

/// All that is hard in a column: zeros, negative ones, subnormals, values below the clamp, halfway points and their neighbours under a
/// scale of 1, one huge value, the largest finite value, NaN here and there, NaN alone.
fn awkward(values: &mut [f32], h: u64, kind: Kind, rng: Rng) {
    let ties = [1.0625f32, 1.1875, 2f32.powi(-10), 1.5 * 2f32.powi(-9), 17.0, 19.0, 432.0];
    let step = if kind == Kind::Bf16 { 1 << 16 } else { 1 };
    values.par_iter_mut().enumerate().for_each(|(i, v)| {
        let (row, column) = (i as u64 / h, i as u64 % h);
        let draw = rng.bits(i as u64);
        let sign = if draw & 1 == 0 { 1.0 } else { -1.0 };
        *v = match column % 16 {
            0 => 0.0 * sign,
            1 => f32::from_bits((draw >> 8) as u32 & 0x807F_FFFF),
            2 => *v * 1e-6,
            3 if row % 32 == 5 => 448.0,
            3 | 4 if row.is_multiple_of(32) => -448.0,
            3 | 4 => {
                let tie = ties[(draw >> 8) as usize % ties.len()].to_bits();
                sign * f32::from_bits(tie.wrapping_add_signed(((draw >> 16) as i32).rem_euclid(3) * step - step))
            }
            5 if row % 32 == 31 => 1e38 * sign,
            6 if row % 128 == 77 => f32::MAX * sign,
            7 if draw.is_multiple_of(5) => f32::NAN,
            8 => f32::NAN,
            _ => *v,
        };
    });
}

// Outputs.

/// Elements behind an output that must stay as they are.
const GUARD: usize = 64;
/// What outputs and guards are filled with.
pub const FILL: u8 = 0xA5;

/// Output buffers of one call: `rows` rows of `h` channels, transposed or not.
pub struct Outputs {
    shape: [u64; 2],
    offset: u64,
    pub data: Buffer<u8>,
    sf_shape: SfShape,
    pub layout: SfLayout,
    pub sf: Buffer<u32>,
}

impl Outputs {
    /// `offset` bytes before the data, which they move away from multiples of 16.
    pub fn new(device: &Device, shape: [u64; 2], offset: u64, sf_shape: SfShape, layout: SfLayout) -> Result<Self, String> {
        let mut data = device.alloc::<u8>((offset + shape[0] * shape[1]) as usize + GUARD).map_err(text)?;
        let mut sf = device.alloc::<u32>(sf_shape.elements as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { shape, offset, data, sf_shape, layout, sf })
    }

    /// Scales of `(rows, h)` in blocks of `npt` rows, in rows that lie `gap` elements further apart than they need.
    pub fn sf_shape((rows, h): (u64, u64), npt: u32, layout: SfLayout, gap: u64) -> SfShape {
        let mut shape = sf_shape(rows, h, (npt, 1), layout);
        shape.strides[0] += gap;
        shape.elements += gap * shape.shape[0];
        shape
    }

    /// What launchers take.
    pub fn tensors(&mut self) -> ferrotile::Result<(TensorMut<'_>, SfMut<'_>)> {
        let strides = [self.shape[1], 1];
        let out = self.data.strided_mut(&self.shape, &strides, self.offset)?.reinterpret(DType::E4m3)?;
        let tensor = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        Ok((out, SfMut { tensor, layout: self.layout }))
    }

    /// As before the call.
    pub fn clear(&mut self) -> Result<(), String> {
        self.data.fill_bytes(FILL).map_err(text)?;
        self.sf.fill_bytes(FILL).map_err(text)
    }

    /// Compare with data and words of scales, and look at what surrounds them.
    pub fn check(&self, name: &str, data: &[u8], words: &[u32]) -> Result<(), String> {
        let got = self.data.to_vec().map_err(text)?;
        let (before, got) = got.split_at(self.offset as usize);
        let (got, behind) = got.split_at(got.len() - GUARD);
        let untouched = before.iter().chain(behind).all(|b| *b == FILL);
        ensure(untouched, || format!("data: bytes around the tensor were written; {name}"))?;
        compare::equal::<E4m3>("data", name, &self.shape, bytemuck::cast_slice(got), bytemuck::cast_slice(data))?;
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(words));
        match self.layout {
            SfLayout::PerChannelPacked => compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, expected)?,
            _ => {
                compare::equal_strided::<f32>("sf", name, shape, strides, bytemuck::cast_slice(&sf), bytemuck::cast_slice(words))?
            }
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }
}

/// Ways to make and store scales: rounded or not, and the layout.
pub const SCALES: [(bool, SfLayout); 3] =
    [(false, SfLayout::RowMajor), (true, SfLayout::RowMajor), (true, SfLayout::PerChannelPacked)];

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of quant.md 9, to hold the reference to something.
    #[test]
    fn the_reference_reproduces_the_published_vectors() {
        let x = [0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0];
        let y = [0.3, -2.0, 5.0, -6.0, 1.25, 2.5, -0.75, 0.26];
        let check = |x: &[f32], round, sf: u32, data: &[u8]| {
            let q = reference(x, (x.len(), 1), 32, round, Some);
            assert_eq!((q.sf[0].to_bits(), &q.data[..]), (sf, data), "{round}");
        };
        check(&x, false, 0x3E64_9249, &[0x2E, 0xB9, 0x49, 0x55, 0xE0, 0, 0x80, 0x7E]);
        check(&x, true, 0x3E80_0000, &[0x2D, 0xB8, 0x48, 0x54, 0xDF, 0, 0x80, 0x7C]);
        check(&y, true, 2f32.powi(-6).to_bits(), &[0x5A, 0xF0, 0x7A, 0xFC, 0x6A, 0x72, 0xE4, 0x58]);
        check(&[0.0; 8], false, 0x346F_ACAD, &[0; 8]);
        check(&[0.0; 8], true, 105 << 23, &[0; 8]);
    }

    #[test]
    fn codes_and_values_agree() {
        for code in 0..=255u8 {
            let expected = if code & 0x7F == 0x7F { 0x7F } else { code };
            assert_eq!(e4m3(e4m3_value(code)), expected);
        }
        // Halfway points go to even codes.
        for code in (0..0x7Eu8).step_by(2) {
            let up = (e4m3_value(code) + e4m3_value(code + 1)) / 2.0;
            assert_eq!(e4m3(up), code);
            if code > 0 {
                assert_eq!(e4m3((e4m3_value(code - 1) + e4m3_value(code)) / 2.0), code);
            }
        }
        assert_eq!([e4m3(f32::INFINITY), e4m3(-1e9), e4m3(464.0), e4m3(1e-30)], [0x7E, 0xFE, 0x7E, 0]);
    }
}
