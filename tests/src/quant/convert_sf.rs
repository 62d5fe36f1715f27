//! Reference, cases, checks and benchmark rows of `convert_sf`.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::convert_sf::{Args, convert_sf};
use ferrotile::quant::{Sf, SfLayout, SfMut, sf_shape};
use ferrotile::{Buffer, Device, E4m3, Stream, TensorMut, TensorRef};
use rayon::prelude::*;
use std::cmp::Ordering;
use std::sync::LazyLock;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "convert_sf", run };

const LAYOUTS: [SfLayout; 7] = [
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::PerChannelPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
];

// The reference.

/// The code of a scale, and whether it stands for that very number.
fn encode(layout: SfLayout, v: f32) -> (u32, bool) {
    if layout.is_packed() {
        /// 2^-126 to 2^127, the numbers of the codes 1 to 254.
        static POWERS: LazyLock<Vec<f64>> = LazyLock::new(|| (1..255).map(|e| 2f64.powi(e - 127)).collect());
        let a = v.abs() as f64;
        let code = match v.is_nan() {
            true => 255,
            false if a == 0.0 => 0,
            false => 1 + POWERS.partition_point(|power| *power < a) as u32,
        };
        (code, decode(layout, code).to_bits() == v.to_bits())
    } else if layout.is_e4m3() {
        /// What the codes 0 to 0x7E stand for, ascending.
        static NUMBERS: LazyLock<Vec<f64>> =
            LazyLock::new(|| (0..0x7F).map(|code| decode(SfLayout::RowMajorE4m3, code) as f64).collect());
        if v.is_nan() {
            return (0x7F, true);
        }
        let sign = if v.is_sign_negative() { 0x80 } else { 0 };
        let a = (v.abs() as f64).min(448.0);
        let distance = |code: usize| (NUMBERS[code] - a).abs();
        let above = NUMBERS.partition_point(|number| *number < a);
        let below = above.saturating_sub(1);
        // Of two that are as near the one that is even.
        let code = match distance(below).total_cmp(&distance(above)) {
            Ordering::Less => below,
            Ordering::Equal if below % 2 == 0 => below,
            _ => above,
        } as u32;
        (code | sign, decode(layout, code) == v.abs())
    } else {
        (v.to_bits(), true)
    }
}

/// What a code stands for.
fn decode(layout: SfLayout, code: u32) -> f32 {
    if layout.is_packed() {
        f32::from_bits(code << 23)
    } else if layout.is_e4m3() {
        E4m3(code as u8).to_f32()
    } else {
        f32::from_bits(code)
    }
}

// Scales in memory.

const FILL: u8 = 0xA5;

/// `M` by `K` scales as bytes, in rows or columns that lie `gap` steps of 16 bytes further apart than they need.
#[derive(Clone, Debug)]
struct Stored {
    layout: SfLayout,
    shape: [u64; 2],
    strides: [u64; 2],
    bytes: Vec<u8>,
}

impl Stored {
    /// Filled with [`FILL`], with a few bytes behind that are none of the tensor's.
    fn new((m, k): (u64, u64), layout: SfLayout, gap: u64) -> Self {
        let sf = sf_shape(m, k, (1, 1), layout);
        let gap = gap * 16 / layout.dtype().size();
        let [rows, columns] = sf.shape;
        let (strides, elements) = if layout.is_col_major() {
            ([1, sf.strides[1] + gap], columns * (sf.strides[1] + gap))
        } else {
            ([columns + gap, 1], rows * (columns + gap))
        };
        Self { layout, shape: sf.shape, strides, bytes: vec![FILL; (elements * layout.dtype().size()) as usize + 64] }
    }

    /// Where the scale of a scaling block is.
    fn place(&self, m: usize, k: usize) -> std::ops::Range<usize> {
        let [row, column] = self.strides.map(|s| s as usize);
        let (start, len) = match self.layout {
            SfLayout::RowMajor | SfLayout::ColMajor => ((m * row + k * column) * 4, 4),
            SfLayout::RowMajorPacked | SfLayout::ColMajorPacked => ((m * row + k / 4 * column) * 4 + k % 4, 1),
            SfLayout::PerChannelPacked => ((m / 4 * row + k * column) * 4 + m % 4, 1),
            SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3 => (m * row + k * column, 1),
        };
        start..start + len
    }

    /// Every element, padding of packed words included, becomes zeros.
    fn clear(&mut self) {
        let size = self.layout.dtype().size() as usize;
        for r in 0..self.shape[0] {
            for c in 0..self.shape[1] {
                let at = (r * self.strides[0] + c * self.strides[1]) as usize * size;
                self.bytes[at..at + size].fill(0);
            }
        }
    }

    fn store(&mut self, scales: &[u32], (m, k): (u64, u64)) {
        for i in 0..m as usize {
            for j in 0..k as usize {
                let place = self.place(i, j);
                let len = place.len();
                self.bytes[place].copy_from_slice(&scales[i * k as usize + j].to_le_bytes()[..len]);
            }
        }
    }
}

/// A conversion on a device.
struct Conversion {
    blocks: (u64, u64),
    from: Stored,
    to: Stored,
    /// What the output is to hold, and how many scales it cannot.
    expected: Vec<u8>,
    odd: i32,
    sf: Buffer<u8>,
    out: Buffer<u8>,
    bad: Buffer<i32>,
}

/// What the counter holds before.
const BEFORE: i32 = 1000;

impl Conversion {
    /// `even`: powers of two that every layout can hold; otherwise any codes at all.
    fn new(device: &Device, blocks: (u64, u64), [from, to]: [SfLayout; 2], gaps: [u64; 2], even: bool) -> Result<Self, String> {
        let (mut from, mut to) = (Stored::new(blocks, from, gaps[0]), Stored::new(blocks, to, gaps[1]));
        let rng = Rng::named(&format!("convert_sf {blocks:?} {even}"));
        let codes: Vec<u32> = (0..blocks.0 * blocks.1)
            .map(|i| match rng.bits(i) {
                draw if even || draw.is_multiple_of(3) => encode(from.layout, 2f32.powi(((draw >> 8) & 15) as i32 - 8)).0,
                draw if from.layout.dtype().size() == 1 || from.layout.is_packed() => (draw >> 8) as u32 & 0xFF,
                // Around what e4m3 can hold, and any f32 at all.
                draw if draw % 3 == 1 => (draw >> 8) as u32 & 0x87FF_FFFF | 0x3800_0000,
                draw => (draw >> 8) as u32,
            })
            .collect();
        from.store(&codes, blocks);
        let pristine = to.clone();
        let encoded: Vec<(u32, bool)> = codes.par_iter().map(|code| encode(to.layout, decode(from.layout, *code))).collect();
        to.clear();
        to.store(&encoded.iter().map(|(code, _)| *code).collect::<Vec<_>>(), blocks);
        Ok(Self {
            blocks,
            sf: device.upload(&from.bytes).map_err(text)?,
            out: device.upload(&pristine.bytes).map_err(text)?,
            bad: device.upload(&[BEFORE]).map_err(text)?,
            expected: to.bytes,
            odd: encoded.iter().filter(|(_, fits)| !fits).count() as i32,
            to: pristine,
            from,
        })
    }

    /// For a benchmark: powers of two that every layout can hold.
    fn bench(device: &Device, blocks: (u64, u64), layouts: [SfLayout; 2]) -> Result<Self, String> {
        let [from, to] = layouts.map(|layout| Stored::new(blocks, layout, 0));
        let codes: Vec<[u8; 4]> = (-8..8).map(|e| encode(from.layout, 2f32.powi(e)).0.to_le_bytes()).collect();
        let len = if from.layout.is_packed() { 1 } else { from.layout.dtype().size() as usize };
        let draws = Rng::named("convert_sf benchmark").bytes(inputs::BLOCK as usize);
        let block: Vec<u8> = draws.iter().flat_map(|draw| &codes[*draw as usize % codes.len()][..len]).copied().collect();
        Ok(Self {
            blocks,
            sf: inputs::repeated(device, &block, from.bytes.len() as u64)?,
            out: device.upload(&to.bytes).map_err(text)?,
            bad: device.upload(&[BEFORE]).map_err(text)?,
            expected: Vec::new(),
            odd: 0,
            from,
            to,
        })
    }

    fn reset(&mut self) -> Result<(), String> {
        self.out.copy_from(&self.to.bytes).map_err(text)?;
        self.bad.copy_from(&[BEFORE]).map_err(text)
    }

    fn call(&mut self, stream: &Stream, counts: bool) -> ferrotile::Result<()> {
        let (from, to) = (&self.from, &self.to);
        let tensor = |buffer: &Buffer<u8>, s: &Stored| {
            // SAFETY: the buffer holds the whole tensor and lives as long as this call.
            unsafe { TensorRef::from_raw(buffer.device(), buffer.as_ptr(), s.layout.dtype(), &s.shape, &s.strides) }
        };
        // SAFETY: as above, and nothing else uses the output.
        let out = unsafe { TensorMut::from_raw(self.out.device(), self.out.as_ptr(), to.layout.dtype(), &to.shape, &to.strides) };
        let args = Args {
            sf: Sf { tensor: tensor(&self.sf, from)?, layout: from.layout },
            num_blocks: self.blocks,
            out: SfMut { tensor: out?, layout: to.layout },
            bad: if counts { Some(self.bad.tensor_mut(&[1])?) } else { None },
        };
        convert_sf(stream, args)
    }

    fn check(&self, name: &str, counts: bool) -> Result<(), String> {
        compare::equal("out", name, &[self.expected.len() as u64], &self.out.to_vec().map_err(text)?, &self.expected)?;
        let odd = if counts { self.odd } else { 0 };
        compare::equal("bad", name, &[1], &self.bad.to_vec().map_err(text)?, &[BEFORE + odd])
    }
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let stream = ctx.device.stream().map_err(text)?;
    let mut sizes = vec![(1, 1), (5, 3), (37, 9), (2, 70), (0, 4), (3, 0)];
    if ctx.depth == Depth::Full {
        sizes.extend([(8064, 56), (8064, 448), (63, 7168), (1, 7168), (100_001, 1), (4001, 33)]);
    }
    for (m, k) in sizes {
        for from in LAYOUTS {
            for to in LAYOUTS {
                let kinds = [(false, [1, 2]), (true, [0, 1]), (false, [0, 0])];
                // The reference takes its time over many.
                for (even, gaps) in kinds.into_iter().take(if m * k > 1_000_000 { 1 } else { 3 }) {
                    let name = format!("even={even},from={from},gaps={gaps:?},k={k},m={m},to={to}");
                    if !ctx.case(&name) {
                        continue;
                    }
                    let mut conversion = Conversion::new(&ctx.device, (m, k), [from, to], gaps, even)?;
                    ensure(!even || conversion.odd == 0, || format!("{} scales do not fit; {name}", conversion.odd))?;
                    for counts in [true, false] {
                        conversion.reset()?;
                        conversion.call(&stream, counts).map_err(text)?;
                        conversion.check(&name, counts)?;
                    }
                }
            }
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
    }
    Ok(ctx.report())
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph";
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let layouts = [SfLayout::RowMajor, SfLayout::ColMajorPacked];
    let mut conversion = Conversion::new(&ctx.device, (300, 56), layouts, [0, 0], false)?;
    let graph = stream.capture(|s| conversion.call(s, true)).map_err(text)?;
    for _ in 0..2 {
        conversion.reset()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        conversion.check(name, true)?;
    }
    Ok(())
}

/// Scales of 8064 tokens of 7168 channels, for 128 and 16 channels a scale, and of one token.
pub fn bench() -> Vec<Row> {
    let row = |blocks: (u64, u64), from: SfLayout, to: SfLayout| {
        let size = |layout: SfLayout| layout.rows(blocks.0) * layout.columns(blocks.1) * layout.dtype().size();
        let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
            let mut conversion = Conversion::bench(device, blocks, [from, to])?;
            Ok(Box::new(move |stream| conversion.call(stream, true)))
        };
        let case = format!("from={from},k={},m={},to={to}", blocks.1, blocks.0).replace(' ', "_");
        Row { op: "convert_sf", case, bytes: size(from) + size(to), build: Box::new(build) }
    };
    use SfLayout::{ColMajor, ColMajorE4m3, ColMajorPacked, PerChannelPacked, RowMajor, RowMajorE4m3, RowMajorPacked};
    vec![
        row((8064, 56), RowMajor, ColMajor),
        row((8064, 56), RowMajor, ColMajorPacked),
        row((8064, 56), ColMajorPacked, RowMajor),
        row((8064, 448), RowMajor, ColMajorPacked),
        row((8064, 448), RowMajorE4m3, ColMajorE4m3),
        row((63, 7168), RowMajor, PerChannelPacked),
        row((1, 56), RowMajor, RowMajorPacked),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_rounds_as_documented() {
        let packed = |v| encode(SfLayout::ColMajorPacked, v);
        assert_eq!([packed(1.0), packed(3.0), packed(0.0), packed(-1.0)], [(127, true), (129, false), (0, true), (127, false)]);
        assert_eq!([packed(f32::MAX), packed(f32::INFINITY), packed(1e-45)], [(255, false), (255, true), (1, false)]);
        assert_eq!((packed(f32::NAN), packed(-0.0)), ((255, false), (0, false)));
        let e4m3 = |v| encode(SfLayout::RowMajorE4m3, v);
        assert_eq!(
            [e4m3(1.0), e4m3(1.0625), e4m3(1.1875), e4m3(-0.0)],
            [(0x38, true), (0x38, false), (0x3A, false), (0x80, true)]
        );
        assert_eq!([e4m3(449.0), e4m3(f32::INFINITY), e4m3(2f32.powi(-10))], [(0x7E, false), (0x7E, false), (0, false)]);
    }

    /// Every wrong argument is refused with the error that the documentation names, and the outputs stay as they were.
    #[test]
    fn wrong_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let sf = device.zeros::<f32>(64).unwrap();
        let elsewhere = Device::emulator().checked().zeros::<f32>(64).unwrap();
        let mut out = device.alloc::<u32>(64).unwrap();
        let mut bad = device.alloc::<i32>(4).unwrap();
        out.fill_bytes(FILL).unwrap();
        bad.fill_bytes(FILL).unwrap();
        let fine = sf.tensor(&[5, 6]).unwrap();
        // (scales, blocks, strides of the output, where it starts, shape of the counter, its type)
        type Call<'a> = (TensorRef<'a>, (u64, u64), [u64; 2], u64, u64, DType);
        let mut run = |(tensor, num_blocks, strides, start, count, dtype): Call<'_>| {
            let out = out.strided_mut(&[5, 2], &strides, start)?.reinterpret(DType::Ue8m0x4)?;
            convert_sf(
                &stream,
                Args {
                    sf: Sf { tensor, layout: SfLayout::RowMajor },
                    num_blocks,
                    out: SfMut { tensor: out, layout: SfLayout::ColMajorPacked },
                    bad: Some(bad.tensor_mut(&[count])?.reinterpret(dtype)?),
                },
            )
        };
        let mut refuses = |call: Call<'_>, expected: &str| {
            let text = run(call).expect_err(expected).to_string();
            assert!(text.starts_with(&format!("convert_sf: {expected}")), "{text}\nexpected {expected}");
        };
        refuses((fine, (5, 1 << 31), [1, 8], 0, 1, DType::I32), "block columns is 2147483648, allowed");
        refuses((fine, (1 << 31, 6), [1, 8], 0, 1, DType::I32), "block rows is 2147483648, allowed");
        refuses((fine, (5, 7), [1, 8], 0, 1, DType::I32), "sf has shape [5, 6], expected [5, 7]");
        refuses((sf.tensor(&[5, 9]).unwrap(), (5, 9), [1, 8], 0, 1, DType::I32), "out has shape [5, 2], expected [5, 3]");
        let words = fine.reinterpret(DType::U32).unwrap();
        refuses((words, (5, 6), [1, 8], 0, 1, DType::I32), "sf is u32, allowed: f32");
        refuses((sf.strided(&[5, 6], &[1, 5], 0).unwrap(), (5, 6), [1, 8], 0, 1, DType::I32), "layout of sf is");
        refuses((fine, (5, 6), [2, 1], 0, 1, DType::I32), "layout of out is");
        refuses((fine, (5, 6), [1, 6], 0, 1, DType::I32), "layout of out is");
        refuses((fine, (5, 6), [1, 8], 1, 1, DType::I32), "layout of out is");
        refuses((fine, (5, 6), [1, 8], 0, 2, DType::I32), "bad has shape [2], expected [1]");
        refuses((fine, (5, 6), [1, 8], 0, 1, DType::U32), "bad is u32, allowed: i32");
        let away = elsewhere.tensor(&[5, 6]).unwrap();
        assert!(matches!(run((away, (5, 6), [1, 8], 0, 1, DType::I32)), Err(Error::DeviceMismatch { arg: "sf", .. })));
        assert!(out.to_vec().unwrap().iter().all(|v| *v == u32::from_ne_bytes([FILL; 4])), "out was written");
        assert!(bad.to_vec().unwrap().iter().all(|v| *v == i32::from_ne_bytes([FILL; 4])), "bad was written");

        // Nothing may overlap.
        let raw = |dtype, shape: &[u64], strides: &[u64]| {
            // SAFETY: the call is refused.
            unsafe { TensorMut::from_raw(&device, sf.as_ptr(), dtype, shape, strides).unwrap() }
        };
        fn args<'a>(tensor: TensorRef<'a>, out: TensorMut<'a>, bad: Option<TensorMut<'a>>) -> Args<'a> {
            let out = SfMut { tensor: out, layout: SfLayout::ColMajor };
            Args { sf: Sf { tensor, layout: SfLayout::RowMajor }, num_blocks: (5, 6), out, bad }
        }
        let own = args(fine, raw(DType::F32, &[5, 6], &[1, 8]), None);
        assert!(matches!(convert_sf(&stream, own), Err(Error::Overlap { a: "sf", b: "out", .. })));
        let mut to = device.zeros::<f32>(64).unwrap();
        let counter = args(fine, to.strided_mut(&[5, 6], &[1, 8], 0).unwrap(), Some(raw(DType::I32, &[1], &[1])));
        assert!(matches!(convert_sf(&stream, counter), Err(Error::Overlap { a: "sf", b: "bad", .. })));
        convert_sf(&stream, args(fine, to.strided_mut(&[5, 6], &[1, 8], 0).unwrap(), None)).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Any size, pitch and pair of layouts.
        #[test]
        fn any_scales(m in 0u64..70, k in 0u64..70, from in 0usize..7, to in 0usize..7, gaps in [0u64..3, 0u64..3], even: bool) {
            let device = Device::emulator().checked();
            let mut conversion = Conversion::new(&device, (m, k), [LAYOUTS[from], LAYOUTS[to]], gaps, even).unwrap();
            conversion.call(&device.stream().unwrap(), true).unwrap();
            prop_assert_eq!(conversion.check("any", true), Ok(()));
        }
    }
}
