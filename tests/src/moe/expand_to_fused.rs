//! expand_to_fused and expand_to_fused_with_sf: reference, cases, checks and benchmark.

use super::common_expanded::{DeviceMaps, Maps};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, MoeCase, moe_bench_cases, moe_cases};
use crate::support::compare::{Bits, equal};
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use bytemuck::Pod;
use ferrotile::moe::expand_to_fused::{Args, WithSfArgs, expand_to_fused, expand_to_fused_with_sf};
use ferrotile::quant::{Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, Device, E4m3, Element, Stream, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;

/// The checks of both ops.
pub const SUITE: Suite = Suite { op: "expand_to_fused", run };

/// Every byte of an output before the launch.
const FILL: u8 = 0xA5;

/// Elements before the first and after the last of an output that must stay as they are.
const GUARD: u64 = 16;

/// A type whose values may be any bytes.
trait Value: Element + Bits + Send + Sync + Default + Pod {}
impl<T: Element + Bits + Send + Sync + Default + Pod> Value for T {}

/// Elements of any bits, also NaN with payloads.
fn random<T: Value>(rng: &Rng, len: usize) -> Vec<T> {
    rng.bytes(len * size_of::<T>()).par_chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// What a row of the expanded buffer is to hold.
#[derive(Clone, Copy)]
enum Expected {
    Token(usize),
    Zeros,
    Untouched,
}

/// From the definition: choices say where tokens go, negative experts are padding.
fn reference(maps: &Maps) -> Vec<Expected> {
    let of_row = |(source, expert): (Option<usize>, &i32)| match source {
        Some(token) => Expected::Token(token),
        None if *expert < 0 => Expected::Zeros,
        None => Expected::Untouched,
    };
    maps.sources().into_iter().zip(&maps.pos_to_expert).map(of_row).collect()
}

/// Where rows lie: `[t, h]` elements of input and `[p, h]` of output.
#[derive(Clone, Copy, Debug)]
struct Place {
    h: u64,
    /// Elements from one row of `x` to the next.
    stride: u64,
    /// Elements before the first of `x` and of `out`, which changes their alignment.
    offsets: [u64; 2],
}

impl Place {
    fn dense(h: u64) -> Self {
        Self { h, stride: h, offsets: [0, 0] }
    }
}

/// Rows of tokens, and room for the expanded ones.
struct Data<T> {
    t: u64,
    p: u64,
    place: Place,
    x: Buffer<T>,
    /// The contents of `x`.
    values: Vec<T>,
    out: Buffer<T>,
}

impl<T: Value> Data<T> {
    fn new(device: &Device, maps: &Maps, place: Place, name: &str) -> Result<Self, String> {
        let len = place.offsets[0] + maps.t.saturating_sub(1) * place.stride + place.h;
        Self::with_values(device, maps, place, random(&Rng::named(name), len as usize))
    }

    fn with_values(device: &Device, maps: &Maps, place: Place, values: Vec<T>) -> Result<Self, String> {
        let x = device.upload(&values).map_err(text)?;
        let mut data = Self { t: maps.t, p: maps.p, place, x, values, out: device.alloc(0).map_err(text)? };
        data.make_out(device)?;
        Ok(data)
    }

    /// Of a benchmark: nobody asks for the values.
    fn of_buffer(device: &Device, maps: &Maps, place: Place, x: Buffer<T>) -> Result<Self, String> {
        let mut data = Self { t: maps.t, p: maps.p, place, x, values: Vec::new(), out: device.alloc(0).map_err(text)? };
        data.make_out(device)?;
        Ok(data)
    }

    /// Another view of the same values; the output anew.
    fn view(&mut self, device: &Device, place: Place) -> Result<(), String> {
        self.place = place;
        self.make_out(device)
    }

    fn make_out(&mut self, device: &Device) -> Result<(), String> {
        let len = 2 * GUARD + self.place.offsets[1] + self.p * self.place.h;
        self.out = device.alloc(len as usize).map_err(text)?;
        self.out.fill_bytes(FILL).map_err(text)
    }

    /// Where the output starts in its buffer.
    fn start(&self) -> u64 {
        GUARD + self.place.offsets[1]
    }

    fn row(&self, token: usize) -> &[T] {
        let start = self.place.offsets[0] as usize + token * self.place.stride as usize;
        &self.values[start..start + self.place.h as usize]
    }

    /// The output, if nothing around it was written.
    fn read(&self, name: &str) -> Result<Vec<T>, String> {
        let all = self.out.to_vec().map_err(text)?;
        let (start, end) = (self.start() as usize, all.len() - GUARD as usize);
        let fill = bytemuck::pod_read_unaligned::<T>(&[FILL; 16][..size_of::<T>()]).bits();
        let outside = all[..start].iter().chain(&all[end..]).all(|v| v.bits() == fill);
        ensure(outside, || format!("elements outside of out were written; {name}"))?;
        Ok(all[start..end].to_vec())
    }

    fn compare(&self, rows: &[Expected], name: &str) -> Result<(), String> {
        let got = self.read(name)?;
        let h = self.place.h as usize;
        if h == 0 {
            return Ok(());
        }
        let zeros = vec![T::default(); h];
        let fill = vec![bytemuck::pod_read_unaligned::<T>(&[FILL; 16][..size_of::<T>()]); h];
        let expected = |row: usize| match rows[row] {
            Expected::Token(token) => self.row(token),
            Expected::Zeros => &zeros,
            Expected::Untouched => &fill,
        };
        let same =
            |row: &usize| bytemuck::cast_slice::<T, u8>(&got[row * h..][..h]) == bytemuck::cast_slice::<T, u8>(expected(*row));
        // One row after the other says more than all of them would.
        match (0..rows.len()).into_par_iter().find_first(|row| !same(row)) {
            None => Ok(()),
            Some(row) => equal("row of out", &format!("row {row}; {name}"), &[h as u64], &got[row * h..][..h], expected(row)),
        }
    }
}

/// A call of the first op.
struct Plain<T> {
    maps: DeviceMaps,
    data: Data<T>,
}

impl<T: Value> Plain<T> {
    fn args(&mut self) -> ferrotile::Result<Args<'_>> {
        let Data { t, p, place: Place { h, stride, offsets }, .. } = self.data;
        let start = self.data.start();
        Ok(Args {
            x: self.data.x.strided(&[t, h], &[stride, 1], offsets[0])?,
            token_topk_to_pos: self.maps.token_topk_to_pos()?,
            pos_to_expert: self.maps.pos_to_expert()?,
            out: self.data.out.strided_mut(&[p, h], &[h.max(1), 1], start)?,
        })
    }

    fn launch(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        expand_to_fused(stream, self.args()?)
    }
}

fn check<T: Value>(stream: &Stream, maps: &Maps, place: Place, name: &str) -> Result<(), String> {
    let name = format!("{name},{place:?},type={}", T::DTYPE);
    let device = stream.device();
    let mut call = Plain::<T> { maps: DeviceMaps::new(device, maps)?, data: Data::new(device, maps, place, &name)? };
    call.launch(stream).map_err(text)?;
    call.data.compare(&reference(maps), &name)
}

/// Options of the second op.
#[derive(Clone, Copy, Debug)]
struct Scales {
    npc: u32,
    from: SfLayout,
    to: SfLayout,
    pos_to_token: bool,
}

/// Scale factors of either type are four bytes.
enum ScaleBuffer {
    F32(Buffer<f32>),
    Packed(Buffer<Ue8m0x4>),
}

impl ScaleBuffer {
    fn new(device: &Device, layout: SfLayout, words: &[u32]) -> Result<Self, String> {
        Ok(if layout.is_packed() {
            Self::Packed(device.upload::<Ue8m0x4>(bytemuck::cast_slice(words)).map_err(text)?)
        } else {
            Self::F32(device.upload::<f32>(bytemuck::cast_slice(words)).map_err(text)?)
        })
    }

    fn sf<'a>(&'a self, shape: &SfShape, layout: SfLayout) -> ferrotile::Result<Sf<'a>> {
        let tensor = match self {
            Self::F32(sf) => sf.strided(&shape.shape, &shape.strides, 0)?,
            Self::Packed(sf) => sf.strided(&shape.shape, &shape.strides, 0)?,
        };
        Ok(Sf { tensor, layout })
    }

    fn sf_mut<'a>(&'a mut self, shape: &SfShape, layout: SfLayout) -> ferrotile::Result<SfMut<'a>> {
        let tensor = match self {
            Self::F32(sf) => sf.strided_mut(&shape.shape, &shape.strides, 0)?,
            Self::Packed(sf) => sf.strided_mut(&shape.shape, &shape.strides, 0)?,
        };
        Ok(SfMut { tensor, layout })
    }

    fn words(&self) -> Result<Vec<u32>, String> {
        Ok(match self {
            Self::F32(sf) => bytemuck::cast_slice(&sf.to_vec().map_err(text)?).to_vec(),
            Self::Packed(sf) => bytemuck::cast_slice(&sf.to_vec().map_err(text)?).to_vec(),
        })
    }
}

/// A call of the second op.
struct WithSf<T> {
    maps: DeviceMaps,
    data: Data<T>,
    scales: Scales,
    /// Shapes of the scales, and the words of both buffers before the launch.
    shapes: [SfShape; 2],
    words: [Vec<u32>; 2],
    x_sf: ScaleBuffer,
    out_sf: ScaleBuffer,
}

impl<T: Value> WithSf<T> {
    fn new(device: &Device, maps: &Maps, data: Data<T>, scales: Scales, name: &str) -> Result<Self, String> {
        let values_per_byte = if T::DTYPE == ferrotile::DType::E2m1x2 { 2 } else { 1 };
        let shapes = [(maps.t, scales.from), (maps.p, scales.to)]
            .map(|(rows, layout)| sf_shape(rows, data.place.h * values_per_byte, (1, scales.npc), layout));
        let words = [
            random::<u32>(&Rng::named(name).stream(1), shapes[0].elements as usize),
            vec![u32::from_ne_bytes([FILL; 4]); shapes[1].elements as usize],
        ];
        Ok(Self {
            maps: DeviceMaps::new(device, maps)?,
            data,
            scales,
            x_sf: ScaleBuffer::new(device, scales.from, &words[0])?,
            out_sf: ScaleBuffer::new(device, scales.to, &words[1])?,
            shapes,
            words,
        })
    }

    fn args(&mut self) -> ferrotile::Result<WithSfArgs<'_>> {
        let Data { t, p, place: Place { h, stride, offsets }, .. } = self.data;
        let start = self.data.start();
        Ok(WithSfArgs {
            x: self.data.x.strided(&[t, h], &[stride, 1], offsets[0])?,
            x_sf: self.x_sf.sf(&self.shapes[0], self.scales.from)?,
            num_per_channels: self.scales.npc,
            token_topk_to_pos: self.maps.token_topk_to_pos()?,
            pos_to_expert: self.maps.pos_to_expert()?,
            pos_to_token: if self.scales.pos_to_token { Some(self.maps.pos_to_token()?) } else { None },
            out: self.data.out.strided_mut(&[p, h], &[h.max(1), 1], start)?,
            out_sf: self.out_sf.sf_mut(&self.shapes[1], self.scales.to)?,
        })
    }

    fn launch(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        expand_to_fused_with_sf(stream, self.args()?)
    }

    fn compare_sf(&self, rows: &[Expected], name: &str) -> Result<(), String> {
        let mut expected = self.words[1].clone();
        let [from, to] = &self.shapes;
        for (row, what) in rows.iter().enumerate() {
            for column in 0..to.shape[1] {
                let place = (row as u64 * to.strides[0] + column * to.strides[1]) as usize;
                expected[place] = match what {
                    Expected::Token(token) => {
                        self.words[0][(*token as u64 * from.strides[0] + column * from.strides[1]) as usize]
                    }
                    Expected::Zeros => 0,
                    Expected::Untouched => continue,
                };
            }
        }
        // The whole buffer, with the padding of columns.
        equal("buffer of out_sf", name, &[to.elements], &self.out_sf.words()?, &expected)
    }
}

fn check_with_sf<T: Value>(stream: &Stream, maps: &Maps, place: Place, scales: Scales, name: &str) -> Result<(), String> {
    let name = format!("{name},{place:?},{scales:?},type={}", T::DTYPE);
    let device = stream.device();
    let mut call = WithSf::<T>::new(device, maps, Data::new(device, maps, place, &name)?, scales, &name)?;
    call.launch(stream).map_err(text)?;
    let rows = reference(maps);
    call.compare_sf(&rows, &name)?;
    call.data.compare(&rows, &name)
}

/// Every layout to every layout of the same type.
fn layouts() -> Vec<(SfLayout, SfLayout)> {
    let all = SfLayout::COMMON.iter();
    all.flat_map(|from| SfLayout::COMMON.iter().map(|to| (*from, *to))).filter(|(from, to)| from.dtype() == to.dtype()).collect()
}

fn small_places() -> Vec<Place> {
    vec![
        Place::dense(0),
        Place::dense(1),
        Place::dense(37),
        // Rows of 16, 4 and 2 bytes in bf16.
        Place::dense(72),
        Place::dense(14),
        // Chunks of 4 vectors a lane, the second one ragged or not; of 7, one a row and two. Cases of one and two choices without padding
        // have two rows a token at most, for two chunks of padding a warp; that of one rank has seven, for one.
        Place::dense(1800),
        Place { h: 2048, stride: 2064, offsets: [0, 0] },
        Place { h: 1792, stride: 1792, offsets: [16, 16] },
        Place::dense(3584),
        Place { h: 64, stride: 80, offsets: [0, 0] },
        Place { h: 64, stride: 67, offsets: [0, 0] },
        Place { h: 64, stride: 64, offsets: [1, 0] },
        Place { h: 64, stride: 64, offsets: [0, 2] },
    ]
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let stream = ctx.device.stream().map_err(text)?;
    for case in moe_cases(Depth::Small) {
        for (alignment, tail) in [(1, 0), (16, 3)] {
            let name = format!("{},a={alignment},tail={tail}", case.name());
            if ctx.case(&name) {
                let maps = Maps::of_moe(&case, alignment, tail);
                for place in small_places() {
                    check::<bf16>(&stream, &maps, place, &name)?;
                }
                check::<f32>(&stream, &maps, Place::dense(5), &name)?;
                check::<i64>(&stream, &maps, Place::dense(9), &name)?;
                check::<u8>(&stream, &maps, Place::dense(13), &name)?;
            }
        }
    }
    // One case has five rows and 16 of padding, the other more choices than are loaded at once.
    for (number, case) in [(5, 1, 1, 1), (33, 9, 32, 8)].into_iter().enumerate() {
        let case = MoeCase { num_send_tokens: case.0, num_topk: case.1, num_experts: case.2, num_ranks: case.3 };
        let maps = Maps::of_moe(&case, 16, 5);
        for (from, to) in layouts() {
            for pos_to_token in [false, true] {
                let name = format!("sf,{},from={from},to={to},pos_to_token={pos_to_token}", case.name());
                if ctx.case(&name) {
                    let scales = |npc| Scales { npc, from, to, pos_to_token };
                    // 16 and 5 scales a row, in vectors if row-major; then narrow rows with one.
                    check_with_sf::<E4m3>(&stream, &maps, Place::dense(512), scales(32), &name)?;
                    check_with_sf::<E4m3>(&stream, &maps, Place::dense(576), scales(128), &name)?;
                    // Data in chunks: ragged of 4 vectors a lane, and of 7.
                    check_with_sf::<E4m3>(&stream, &maps, Place::dense(1920), scales(128), &name)?;
                    check_with_sf::<E4m3>(&stream, &maps, Place::dense(7168), scales(128), &name)?;
                    if number == 1 {
                        check_with_sf::<E4m3>(&stream, &maps, Place::dense(36), scales(128), &name)?;
                        check_with_sf::<u8>(&stream, &maps, Place::dense(41), scales(7), &name)?;
                        check_with_sf::<ferrotile::E2m1x2>(
                            &stream,
                            &maps,
                            Place { offsets: [2, 0], ..Place::dense(64) },
                            scales(16),
                            &name,
                        )?;
                    }
                }
            }
        }
    }
    for (name, maps) in special_maps() {
        if ctx.case(name) {
            check::<bf16>(&stream, &maps, Place::dense(40), name)?;
            for (pos_to_token, to) in [(false, SfLayout::ColMajor), (true, SfLayout::ColMajor), (false, SfLayout::RowMajor)] {
                let scales = Scales { npc: 32, from: SfLayout::RowMajor, to, pos_to_token };
                check_with_sf::<E4m3>(&stream, &maps, Place::dense(128), scales, name)?;
            }
        }
    }
    if ctx.depth == Depth::Full {
        grid(ctx, &stream)?;
    }
    if ctx.case("twice") {
        twice(&stream)?;
    }
    if !ctx.device.is_emulator() && ctx.case("graph") {
        graph(&stream)?;
    }
    let notes = golden::check_cases(ctx, &["expand_to_fused", "expand_to_fused_with_sf"], |golden, case| {
        check_golden(&stream, golden, case)
    })?;
    Ok(Report { notes, ..ctx.report() })
}

/// No tokens, no choices, no rows; rows that nothing names.
fn special_maps() -> Vec<(&'static str, Maps)> {
    let maps = |t, k, token_topk_to_pos, pos_to_expert: &[i32], pos_to_token: &[i32]| Maps {
        t,
        k,
        p: pos_to_expert.len() as u64,
        token_topk_to_pos,
        pos_to_expert: pos_to_expert.to_vec(),
        pos_to_token: pos_to_token.to_vec(),
    };
    vec![
        ("no tokens but padding", maps(0, 3, vec![], &[-1; 35], &[-1; 35])),
        ("no choices", maps(3, 0, vec![], &[-1, -2, i32::MIN], &[-1; 3])),
        ("no rows", maps(4, 2, vec![-1; 8], &[], &[])),
        ("many tokens, one row", maps(70, 1, [vec![-1; 69], vec![0]].concat(), &[3], &[69])),
        // All choices of a token, more than are loaded at once.
        ("all choices", maps(2, 17, (0..34).map(|i| 33 - i).collect(), &[0; 34], &[[1; 17], [0; 17]].concat())),
    ]
}

/// The grid of the specification: every case and hidden size, with rows of 16 as its tests have them. Scales for fewer hidden sizes, with
/// all layouts of the tests.
fn grid(ctx: &Ctx, stream: &Stream) -> Result<(), String> {
    let device = &ctx.device;
    for case in moe_bench_cases() {
        let maps = Maps::of_moe(&case, 16, 0);
        let rows = reference(&maps);
        let widest = Place::dense(7168);
        if ctx.case(&case.name()) {
            // Narrower rows are views of the widest ones.
            let mut call =
                Plain::<bf16> { maps: DeviceMaps::new(device, &maps)?, data: Data::new(device, &maps, widest, &case.name())? };
            for h in HIDDENS {
                let name = format!("{},h={h}", case.name());
                call.data.view(device, Place { h, ..widest })?;
                call.launch(stream).map_err(text)?;
                call.data.compare(&rows, &name)?;
            }
        }
        for npc in [32, 128] {
            for layout in [SfLayout::RowMajor, SfLayout::ColMajorPacked] {
                for h in [576, 2048, 7168] {
                    // The tests' scales are row-major; the peers' cast makes column-major ones.
                    let from = if npc == 32 && layout.is_packed() { SfLayout::RowMajorPacked } else { layout };
                    let scales = Scales { npc, from, to: layout, pos_to_token: h != 2048 };
                    let name = format!("{},h={h},npc={npc},sf={layout}", case.name());
                    if ctx.case(&name) {
                        check_with_sf::<E4m3>(stream, &maps, Place::dense(h), scales, &name)?;
                    }
                }
            }
        }
    }
    // More than 2^31 elements: in one launch, and byte by byte in two.
    for (h, name) in [(7168, "large"), (7167, "large, narrow")] {
        if ctx.case(name) {
            let t = 300_100;
            let maps = Maps {
                t,
                k: 1,
                p: t + 40,
                token_topk_to_pos: (0..t as i32)
                    .map(|token| if token % 1000 == 7 { -1 } else { t as i32 + 39 - token })
                    .collect(),
                pos_to_expert: (0..t as i32 + 40)
                    .map(|row| if row < 40 || (t as i32 + 39 - row) % 1000 == 7 { -1 } else { 0 })
                    .collect(),
                pos_to_token: vec![],
            };
            check::<u8>(stream, &maps, Place::dense(h), name)?;
        }
    }
    Ok(())
}

/// Two runs give the same bytes.
fn twice(stream: &Stream) -> Result<(), String> {
    let device = stream.device();
    let maps = Maps::of_moe(&MoeCase { num_send_tokens: 61, num_topk: 6, num_experts: 9, num_ranks: 8 }, 16, 0);
    let scales = Scales { npc: 32, from: SfLayout::ColMajor, to: SfLayout::ColMajor, pos_to_token: false };
    let data = Data::<E4m3>::new(device, &maps, Place::dense(160), "twice")?;
    let mut call = WithSf::new(device, &maps, data, scales, "twice")?;
    call.launch(stream).map_err(text)?;
    let first = (call.data.read("first")?, call.out_sf.words()?);
    call.launch(stream).map_err(text)?;
    equal("second out", "twice", &[first.0.len() as u64], &call.data.read("second")?, &first.0)?;
    equal("second out_sf", "twice", &[first.1.len() as u64], &call.out_sf.words()?, &first.1)
}

/// Both launchers can be recorded and replayed.
fn graph(stream: &Stream) -> Result<(), String> {
    let device = stream.device();
    let maps = Maps::of_moe(&MoeCase { num_send_tokens: 200, num_topk: 8, num_experts: 32, num_ranks: 8 }, 128, 0);
    let rows = reference(&maps);
    let data = || Data::<E4m3>::new(device, &maps, Place::dense(1024), "graph");
    let mut plain = Plain { maps: DeviceMaps::new(device, &maps)?, data: data()? };
    let scales = Scales { npc: 128, from: SfLayout::RowMajor, to: SfLayout::RowMajor, pos_to_token: true };
    let mut with_sf = WithSf::new(device, &maps, data()?, scales, "graph")?;
    let graph = stream.capture(|s| plain.launch(s).and_then(|()| with_sf.launch(s))).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let untouched = |out: Vec<E4m3>| out.iter().all(|v| v.0 == FILL);
    ensure(untouched(plain.data.read("graph")?) && untouched(with_sf.data.read("graph")?), || {
        "a capture ran the kernel".to_owned()
    })?;
    graph.launch(stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    plain.data.compare(&rows, "graph")?;
    with_sf.data.compare(&rows, "graph with sf")?;
    with_sf.compare_sf(&rows, "graph with sf")
}

fn check_golden(stream: &Stream, golden: &Golden, case: &Case) -> Result<(), String> {
    let (name, device) = (case.name(), stream.device());
    let maps = Maps::of_golden(golden, case)?;
    let rows = reference(&maps);
    let tensor = |key: &str| golden.tensor(case, key);
    if case.op == "expand_to_fused" {
        let x = tensor("in/x")?;
        let data = Data::<bf16>::with_values(device, &maps, Place::dense(x.shape[1]), x.to_vec()?)?;
        let mut call = Plain { maps: DeviceMaps::new(device, &maps)?, data };
        call.launch(stream).map_err(text)?;
        call.data.compare(&rows, &name)?;
        return equal("out", &name, &[maps.p, x.shape[1]], &call.data.read(&name)?, &tensor("out/")?.to_vec()?);
    }
    let (x, x_sf) = (tensor("in/x.0")?, tensor("in/x.1")?);
    let (to, _) = case.sf_options()?;
    let from = if to.is_packed() { SfLayout::RowMajorPacked } else { SfLayout::RowMajor };
    for pos_to_token in [false, true] {
        let scales = Scales { npc: case.param("num_per_channels")?, from, to, pos_to_token };
        let data = Data::<E4m3>::with_values(device, &maps, Place::dense(x.shape[1]), bytemuck::cast_slice(x.bytes).to_vec())?;
        let mut call = WithSf::new(device, &maps, data, scales, &name)?;
        call.words[0] = x_sf.to_vec()?;
        call.x_sf = ScaleBuffer::new(device, from, &call.words[0])?;
        call.launch(stream).map_err(text)?;
        call.compare_sf(&rows, &name)?;
        let out = tensor("out/0")?;
        equal("out", &name, &out.shape, &call.data.read(&name)?, bytemuck::cast_slice::<u8, E4m3>(out.bytes))?;
        let out_sf = tensor("out/1")?;
        out_sf.check_place(&name, &call.shapes[1])?;
        let (shape, strides) = (call.shapes[1].shape, call.shapes[1].strides);
        let words = call.out_sf.words()?;
        crate::support::compare::equal_strided("out_sf", &name, &shape, &strides, &words, &out_sf.to_vec::<u32>()?)?;
    }
    Ok(())
}

/// The peers' cases, those of the peer's own benchmark, and small ones. Rows are multiples of 128.
pub fn bench() -> Vec<Row> {
    let moe = |num_send_tokens, num_topk, num_experts, num_ranks| MoeCase { num_send_tokens, num_topk, num_experts, num_ranks };
    let all = |e, ep, h, k, send| (moe(send, k, e, ep), h);
    let mut rows = Vec::new();
    let cases = [
        all(32, 8, 7168, 8, 4001),
        all(4, 64, 7168, 8, 4001),
        all(9, 8, 7168, 8, 4001),
        all(9, 8, 2048, 2, 4001),
        all(32, 8, 7168, 8, 128),
        all(32, 8, 7168, 8, 16),
        all(32, 8, 7168, 8, 1),
    ];
    for (case, h) in cases {
        rows.push(row(case, h));
    }
    let pair = |case, npc, from, to, pos_to_token| with_sf_row(case, Scales { npc, from, to, pos_to_token });
    for case in [all(9, 8, 7168, 8, 4001), all(32, 8, 7168, 8, 4001)] {
        for npc in [32, 128] {
            rows.push(pair(case, npc, SfLayout::RowMajor, SfLayout::RowMajor, true));
            rows.push(pair(case, npc, SfLayout::ColMajorPacked, SfLayout::ColMajorPacked, true));
        }
    }
    rows.push(pair(all(9, 8, 2048, 2, 4001), 32, SfLayout::RowMajor, SfLayout::RowMajor, true));
    for send in [1, 16, 128] {
        rows.push(pair(all(32, 8, 7168, 8, send), 128, SfLayout::RowMajor, SfLayout::RowMajor, true));
    }
    rows
}

fn row(case: MoeCase, h: u64) -> Row {
    let MoeCase { num_send_tokens: send, num_topk: k, num_experts: e, num_ranks: ep } = case;
    let maps = Maps::of_moe(&case, 128, 0);
    let bytes = 2 * h * (maps.t + maps.p) + 4 * maps.t * maps.k + 4 * maps.p;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let x = inputs::normal_bf16(device, 0, maps.t * h)?;
        let data = Data::<bf16>::of_buffer(device, &maps, Place::dense(h), x)?;
        let mut call = Plain { maps: DeviceMaps::new(device, &maps)?, data };
        Ok(Box::new(move |stream| call.launch(stream)))
    };
    Row { op: "expand_to_fused", case: format!("e={e},ep={ep},h={h},k={k},send={send}"), bytes, build: Box::new(build) }
}

fn with_sf_row((case, h): (MoeCase, u64), scales: Scales) -> Row {
    let MoeCase { num_send_tokens: send, num_topk: k, num_experts: e, num_ranks: ep } = case;
    let maps = Maps::of_moe(&case, 128, 0);
    let sf_bytes = |rows, layout| 4 * sf_shape(rows, h, (1, scales.npc), layout).shape.iter().product::<u64>();
    let bytes =
        h * (maps.t + maps.p) + 4 * maps.t * maps.k + 4 * maps.p + sf_bytes(maps.t, scales.from) + sf_bytes(maps.p, scales.to);
    let sf = if scales.to == SfLayout::RowMajor { "row" } else { "packed" };
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let x = inputs::of_normal(device, 0, maps.t * h, |v| E4m3::from_f32(v * 128.0))?;
        let data = Data::<E4m3>::of_buffer(device, &maps, Place::dense(h), x)?;
        let mut call = WithSf::new(device, &maps, data, scales, "bench")?;
        Ok(Box::new(move |stream| call.launch(stream)))
    };
    let case = format!("e={e},ep={ep},h={h},k={k},npc={},send={send},sf={sf}", scales.npc);
    Row { op: "expand_to_fused_with_sf", case, bytes, build: Box::new(build) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut, TensorRef};
    use proptest::prelude::*;

    #[test]
    fn suite() {
        SUITE.test();
    }

    fn small_maps() -> Maps {
        Maps::of_moe(&MoeCase { num_send_tokens: 9, num_topk: 3, num_experts: 4, num_ranks: 2 }, 4, 0)
    }

    /// The checked emulator reports rows and tokens that do not exist; without checks they count as none.
    #[test]
    fn indices_out_of_range() {
        let good = small_maps();
        let mut bad = good.clone();
        let slot = bad.token_topk_to_pos.iter().position(|row| *row >= 0).unwrap();
        bad.token_topk_to_pos[slot] = bad.p as i32;
        let mut bad_token = good.clone();
        bad_token.pos_to_token[0] = bad_token.t as i32;
        let scales = Scales { npc: 32, from: SfLayout::RowMajor, to: SfLayout::ColMajor, pos_to_token: true };
        for device in [Device::emulator(), Device::emulator().checked()] {
            let stream = device.stream().unwrap();
            let data = || Data::<E4m3>::new(&device, &good, Place::dense(64), "bad").unwrap();
            let mut plain = Plain { maps: DeviceMaps::new(&device, &bad).unwrap(), data: data() };
            let mut with_sf = WithSf::new(&device, &bad_token, data(), scales, "bad").unwrap();
            if device == Device::emulator() {
                plain.launch(&stream).unwrap();
                plain
                    .data
                    .compare(
                        &reference(&{
                            let mut maps = bad.clone();
                            maps.token_topk_to_pos[slot] = -1;
                            maps
                        }),
                        "bad",
                    )
                    .unwrap();
                with_sf.launch(&stream).unwrap();
                let words = with_sf.out_sf.words().unwrap();
                assert_eq!(words[0], 0, "the row of a token that does not exist has scales of padding");
            } else {
                let message = plain.launch(&stream).unwrap_err().to_string();
                assert!(message.contains("expand_to_fused"), "{message}");
                assert!(matches!(with_sf.launch(&stream), Err(Error::Fault(_))));
            }
        }
    }

    /// Every documented mistake is a typed error that names the argument, and leaves the outputs alone.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let maps = small_maps();
        let (t, p) = (maps.t, maps.p);
        let place = Place::dense(64);
        let mut call = Plain {
            maps: DeviceMaps::new(&device, &maps).unwrap(),
            data: Data::<bf16>::new(&device, &maps, place, "mistakes").unwrap(),
        };
        let scales = Scales { npc: 32, from: SfLayout::RowMajor, to: SfLayout::ColMajor, pos_to_token: true };
        let data = Data::<E4m3>::new(&device, &maps, place, "mistakes").unwrap();
        let mut with_sf = WithSf::new(&device, &maps, data, scales, "mistakes").unwrap();
        let (ints, wide, floats) =
            (device.zeros::<i32>(4096).unwrap(), device.zeros::<bf16>(65536).unwrap(), device.zeros::<f32>(4096).unwrap());
        let mut room = device.zeros::<f32>(4096).unwrap();
        let elsewhere = Device::emulator().zeros::<i32>(4096).unwrap();

        macro_rules! refused {
            (|$a:ident| $change:expr) => {{
                let mut $a = call.args().unwrap();
                $change;
                let error = expand_to_fused(&stream, $a).unwrap_err();
                assert!(call.data.read("refused").unwrap().iter().all(|v| v.to_le_bytes() == [FILL; 2]), "{error}");
                error
            }};
        }
        macro_rules! refused_sf {
            (|$a:ident| $change:expr) => {{
                let mut $a = with_sf.args().unwrap();
                $change;
                let error = expand_to_fused_with_sf(&stream, $a).unwrap_err();
                assert!(with_sf.data.read("refused").unwrap().iter().all(|v| v.0 == FILL), "{error}");
                assert!(with_sf.out_sf.words().unwrap().iter().all(|v| *v == u32::from_ne_bytes([FILL; 4])), "{error}");
                error
            }};
        }
        macro_rules! is {
            ($e:expr, $kind:ident, $name:literal) => {{
                let e = $e;
                assert!(matches!(&e, Error::$kind { arg, .. } if *arg == $name), "{e}");
                e
            }};
        }
        let strided = |shape: &[u64], strides: &[u64]| wide.strided(shape, strides, 0).unwrap();
        is!(refused!(|a| a.x = wide.tensor(&[64]).unwrap()), Shape, "x");
        is!(refused!(|a| a.x = strided(&[t, 64], &[1, t])), Layout, "x");
        is!(refused!(|a| a.x = floats.tensor(&[t, 64]).unwrap()), DType, "out");
        is!(refused!(|a| a.x = wide.tensor(&[t, 63]).unwrap()), Shape, "out");
        is!(refused!(|a| a.token_topk_to_pos = ints.tensor(&[t]).unwrap()), Shape, "token_topk_to_pos");
        let e = is!(refused!(|a| a.token_topk_to_pos = ints.tensor(&[t + 1, 3]).unwrap()), Shape, "token_topk_to_pos");
        assert!(e.to_string().starts_with("expand_to_fused: token_topk_to_pos has shape ["), "{e}");
        is!(refused!(|a| a.token_topk_to_pos = floats.tensor(&[t, 3]).unwrap()), DType, "token_topk_to_pos");
        is!(refused!(|a| a.token_topk_to_pos = ints.strided(&[t, 3], &[4, 1], 0).unwrap()), Layout, "token_topk_to_pos");
        is!(refused!(|a| a.pos_to_expert = ints.tensor(&[p, 1]).unwrap()), Shape, "pos_to_expert");
        is!(refused!(|a| a.pos_to_expert = ints.tensor(&[p + 1]).unwrap()), Shape, "out");
        is!(refused!(|a| a.pos_to_expert = ints.strided(&[p], &[2], 0).unwrap()), Layout, "pos_to_expert");
        is!(refused!(|a| a.pos_to_expert = elsewhere.tensor(&[p]).unwrap()), DeviceMismatch, "pos_to_expert");

        // SAFETY: refused before anything is touched.
        let raw = |ptr, dtype, shape: &[u64]| unsafe {
            let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
            (
                TensorRef::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
                TensorMut::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
            )
        };
        is!(refused!(|a| a.x = raw(wide.as_ptr() + 1, DType::Bf16, &[t, 64]).0), Layout, "x");
        is!(refused!(|a| a.pos_to_expert = raw(ints.as_ptr() + 2, DType::I32, &[p]).0), Layout, "pos_to_expert");
        let e = refused!(|a| a.x = raw(a.out.ptr(), DType::Bf16, &[t, 64]).0);
        assert_eq!(e.to_string(), "expand_to_fused: x and out overlap in memory");
        let huge = |t: u64, h: u64, k: u64, p: u64| {
            let at = |n: u64| n << 50;
            let args = Args {
                x: raw(at(1), DType::E4m3, &[t, h]).0,
                token_topk_to_pos: raw(at(2), DType::I32, &[t, k]).0,
                pos_to_expert: raw(at(3), DType::I32, &[p]).0,
                out: raw(at(4), DType::E4m3, &[p, h]).1,
            };
            expand_to_fused(&stream, args).unwrap_err()
        };
        for (error, name) in [
            (huge(1 << 31, 1, 1, 1), "num_tokens"),
            (huge(1, 1, 1 << 31, 1), "num_topk"),
            (huge(1, 1, 1, 1 << 31), "num_expanded_tokens"),
            (huge(1, 1 << 31, 1, 1), "bytes of a row"),
        ] {
            assert!(matches!(error, Error::Value { arg, .. } if arg == name), "{error}");
        }

        is!(refused_sf!(|a| a.x = wide.tensor(&[t, 64]).unwrap()), DType, "x");
        is!(refused_sf!(|a| a.num_per_channels = 0), Value, "num_per_channels");
        is!(refused_sf!(|a| a.num_per_channels = 128), Shape, "x_sf");
        is!(refused_sf!(|a| a.x_sf.layout = SfLayout::RowMajorPacked), DType, "x_sf");
        is!(refused_sf!(|a| a.x_sf.layout = SfLayout::RowMajorE4m3), Layout, "x_sf");
        is!(refused_sf!(|a| a.out_sf.layout = SfLayout::PerChannelPacked), Layout, "out_sf");
        is!(refused_sf!(|a| a.out_sf.layout = SfLayout::RowMajor), Layout, "out_sf");
        is!(refused_sf!(|a| a.out_sf.tensor = room.strided_mut(&[p, 2], &[1, p + 1], 0).unwrap()), Layout, "out_sf");
        let packed = device.zeros::<Ue8m0x4>(4096).unwrap();
        let from = Sf { tensor: packed.tensor(&[t, 1]).unwrap(), layout: SfLayout::RowMajorPacked };
        is!(refused_sf!(|a| a.x_sf = from), DType, "out_sf");
        is!(refused_sf!(|a| a.pos_to_token = Some(ints.tensor(&[p - 1]).unwrap())), Shape, "pos_to_token");
        is!(refused_sf!(|a| a.pos_to_token = Some(elsewhere.tensor(&[p]).unwrap())), DeviceMismatch, "pos_to_token");
        let e = refused_sf!(|a| a.x_sf.tensor = raw(a.out_sf.tensor.ptr(), DType::F32, &[t, 2]).0);
        assert_eq!(e.to_string(), "expand_to_fused_with_sf: x_sf and out_sf overlap in memory");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_and_alignment(
            send in 0u64..12, k in 1u64..12, e in 1u64..5, alignment in 1u64..9, h in 0u64..140, gap in 0u64..3,
            offsets in [0u64..3, 0u64..3], npc in 1u32..150, layout in prop::sample::select(layouts()), pos_to_token in any::<bool>(),
        ) {
            let case = MoeCase { num_send_tokens: send, num_topk: k.min(4 * e), num_experts: e, num_ranks: 4 };
            let maps = Maps::of_moe(&case, alignment, 0);
            let place = Place { h, stride: h + gap, offsets };
            let stream = Device::emulator().checked().shuffled(send * 71 + h).stream().unwrap();
            prop_assert_eq!(check::<bf16>(&stream, &maps, place, "prop"), Ok(()));
            let scales = Scales { npc, from: layout.0, to: layout.1, pos_to_token };
            prop_assert_eq!(check_with_sf::<E4m3>(&stream, &maps, place, scales, "prop"), Ok(()));
        }
    }
}
