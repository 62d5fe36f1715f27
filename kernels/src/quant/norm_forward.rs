//! norm_forward: root mean square norm of rows, optionally of the sum with a residual.
//!
//! In    x, residual bf16 or f32 [b, t, h], weight \[h\]    Out  out, residual_out (x + residual) [b, t, h], rstd f32 [b, t]
//! Close the sum is bitwise the specification's; `rstd` is an f32 sum in a fixed order and `rsqrt.approx`, `out` is f32 arithmetic
//!       rounded once (quant.md 6.10).  The order depends on `h` and the type alone.
//! Map   a row on 16 or 32 lanes, or on a block, which keep it in registers; a longer row is read twice, the second time from L2.
//! Cost  2 or 4 bytes each of x, residual, residual_out and out a channel; memory bound.

use crate::device::*;
pub use crate::quant::common::Divisor;
use crate::quant::per_token_cast::Source;
pub use crate::quant::per_token_cast::{Bf16, F32};
use crate::{kernel, unroll};
use core::marker::PhantomData;

/// Vectors that a lane keeps in registers.
pub const VECTORS: usize = 4;
/// Most threads of a row. Rows of up to [`VECTORS`] vectors for each of them are read once.
pub const MAX_THREADS: u32 = 512;
/// Threads of a block of rows that are shorter than a block.
pub const SHORT_THREADS: u32 = 128;

/// There is a residual.
pub const RESIDUAL: u32 = 1;
/// There is a weight; without one it counts as 1.
pub const WEIGHT: u32 = 2;
/// `residual_out` is written.
pub const RESIDUAL_OUT: u32 = 4;
/// `rstd` is written.
pub const RSTD: u32 = 8;

/// An element type: four words of it are a vector, which a lane reads and writes at once.
pub trait Value: Source<Raw = [u32; 4]> {
    /// A word of ones.
    const ONE: u32;

    /// Sums, each rounded once.
    fn add(a: [u32; 4], b: [u32; 4]) -> [u32; 4];

    /// `sums` and the squares of a vector.
    fn add_squares(sums: [f32; 2], v: [u32; 4]) -> [f32; 2];

    /// `(v * rstd) * (weight * out_scale)`, rounded to this type.
    fn scale(v: [u32; 4], weight: [u32; 4], rstd: f32, out_scale: f32) -> [u32; 4];

    /// Write the first `channels` of a vector one by one.
    fn store_part(out: Out<u8>, v: [u32; 4], channels: u32);
}

impl Value for Bf16 {
    const ONE: u32 = 0x3f80_3f80;

    #[inline(always)]
    fn add(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        core::array::from_fn(|i| bf16x2_add(a[i], b[i]))
    }

    #[inline(always)]
    fn add_squares(sums: [f32; 2], v: [u32; 4]) -> [f32; 2] {
        v.iter().fold(sums, |[a, b], w| {
            let [x, y] = bf16x2_to_f32(*w);
            [fma(x, x, a), fma(y, y, b)]
        })
    }

    #[inline(always)]
    fn scale(v: [u32; 4], weight: [u32; 4], rstd: f32, out_scale: f32) -> [u32; 4] {
        core::array::from_fn(|i| {
            // Not `bf16x2_to_f32`: the compiler would keep its results from `add_squares` until here, in twice the registers.
            let floats = |w: u32| [0x1044, 0x3244].map(|bytes| f32::from_bits(byte_permute(w, 0, bytes)));
            let (x, w) = (floats(v[i]), floats(weight[i]));
            f32x2_to_bf16x2((x[0] * rstd) * (w[0] * out_scale), (x[1] * rstd) * (w[1] * out_scale))
        })
    }

    #[inline(always)]
    #[track_caller]
    fn store_part(out: Out<u8>, v: [u32; 4], channels: u32) {
        unroll!(i in 8 {
            if (i as u32) < channels {
                out.cast::<u16>().set(i as u32, (v[i / 2] >> (i % 2 * 16)) as u16);
            }
        });
    }
}

impl Value for F32 {
    const ONE: u32 = 0x3f80_0000;

    #[inline(always)]
    fn add(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        core::array::from_fn(|i| (f32::from_bits(a[i]) + f32::from_bits(b[i])).to_bits())
    }

    #[inline(always)]
    fn add_squares(sums: [f32; 2], v: [u32; 4]) -> [f32; 2] {
        let [a, b, c, d] = v.map(f32::from_bits);
        [fma(c, c, fma(a, a, sums[0])), fma(d, d, fma(b, b, sums[1]))]
    }

    #[inline(always)]
    fn scale(v: [u32; 4], weight: [u32; 4], rstd: f32, out_scale: f32) -> [u32; 4] {
        core::array::from_fn(|i| ((f32::from_bits(v[i]) * rstd) * (f32::from_bits(weight[i]) * out_scale)).to_bits())
    }

    #[inline(always)]
    #[track_caller]
    fn store_part(out: Out<u8>, v: [u32; 4], channels: u32) {
        unroll!(i in 4 {
            if (i as u32) < channels {
                out.cast::<u32>().set(i as u32, v[i]);
            }
        });
    }
}

/// The vector at `at`, whole if `WIDE`, else as far as `channels` go.
#[inline(always)]
#[track_caller]
pub fn load<S: Value, const WIDE: bool>(at: In<u8>, channels: u32) -> [u32; 4] {
    if WIDE { S::load(at) } else { S::load_part(at, channels) }
}

/// Write a vector, see [`load`].
#[inline(always)]
#[track_caller]
pub fn store<S: Value, const WIDE: bool>(at: Out<u8>, v: [u32; 4], channels: u32) {
    if WIDE { at.store16(0, v) } else { S::store_part(at, v, channels) }
}

/// Bytes before a channel.
#[inline(always)]
pub fn bytes<S: Value>(channel: u32) -> u64 {
    channel as u64 * (S::BITS / 8) as u64
}

/// Logarithm of the lanes of a row that is shorter than a block, 4 or 5; more stands for a block.
///
/// Lanes of a row hold whole packed words of scales, 128 channels, whatever `hidden` is.
pub const fn lanes_log2<S: Value>(hidden: u32) -> u32 {
    let threads = row_threads::<S>(hidden);
    match threads {
        0..=16 if S::CHANNELS == 8 => 4,
        0..=32 => 5,
        _ => 6,
    }
}

const fn row_threads<S: Value>(hidden: u32) -> u32 {
    ceil_div(ceil_div(hidden, S::CHANNELS), VECTORS as u32)
}

/// Grid and block.
pub fn config<S: Value>(num_rows: u32, hidden: u32) -> LaunchConfig {
    let lanes = lanes_log2::<S>(hidden);
    let config = if lanes <= 5 {
        LaunchConfig::new(ceil_div(num_rows, SHORT_THREADS >> lanes), SHORT_THREADS)
    } else {
        LaunchConfig::new(num_rows, align_up(row_threads::<S>(hidden), WARP_SIZE).min(MAX_THREADS))
    };
    config.shared(&shared().0)
}

/// Shared memory: one value a warp.
#[inline(always)]
fn shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let scratch = layout.array(WARP_SIZE);
    (layout, scratch)
}

/// Rows of a tensor `[b, t, h]`, whose last stride is 1.
#[derive(Clone, Copy)]
pub struct Strides {
    /// Bytes from one batch to the next.
    pub batch: u64,
    /// Bytes from one token to the next.
    pub token: u64,
}

/// What a norm reads, and what it writes besides its result.
pub struct Norm {
    /// Input.
    pub x: In<u8>,
    /// What is added to it.
    pub residual: In<u8>,
    /// A factor for each channel.
    pub weight: In<u8>,
    /// The sum, contiguous.
    pub residual_out: Out<u8>,
    /// The other factor.
    pub rstd: Out<f32>,
    /// Of `x`.
    pub x_strides: Strides,
    /// Of `residual`.
    pub residual_strides: Strides,
    /// Channels.
    pub hidden: u32,
    /// Its inverse.
    pub inv_hidden: f32,
    /// [`RESIDUAL`] and the like.
    pub parts: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// A factor for all.
    pub out_scale: f32,
}

/// A row, and the vectors of it that are this thread's: one every `step` channels from `first` on, as long as they begin before `end`.
#[derive(Clone, Copy)]
pub struct Row {
    /// Number of the row among all.
    pub index: u32,
    /// Its batch.
    pub batch: u32,
    /// Its number in the batch.
    pub token: u32,
    /// First channel of this thread's first vector.
    pub first: u32,
    /// Channels from one vector to the next.
    pub step: u32,
    /// Channels of the row, 0 for a row that does not exist.
    pub end: u32,
}

impl Row {
    /// The row of this thread.
    #[inline(always)]
    pub fn of_thread<S: Value>(num_rows: u32, hidden: u32, num_tokens: u32, by_tokens: Divisor, lanes_log2: u32) -> Self {
        // In channels from the start: lanes would be kept in registers beside them.
        let channel = thread_idx() * S::CHANNELS;
        let (first, step, index) = if lanes_log2 <= 5 {
            let step = S::CHANNELS << lanes_log2;
            (channel & (step - 1), step, block_idx_x() * (SHORT_THREADS >> lanes_log2) + (thread_idx() >> lanes_log2))
        } else {
            (channel, block_dim() * S::CHANNELS, block_idx_x())
        };
        let batch = by_tokens.divide(index);
        Self { index, batch, token: index - batch * num_tokens, first, step, end: if index < num_rows { hidden } else { 0 } }
    }

    /// First channel of vector `i`.
    #[inline(always)]
    pub fn channel(self, i: u32) -> u32 {
        self.first + i * self.step
    }

    /// Bytes from this thread's first vector to vector `i`, in a format of `bits` bits.
    #[inline(always)]
    pub fn skip(self, i: u32, bits: u32) -> u64 {
        i as u64 * (self.step * bits / 8) as u64
    }

    /// Where this thread's first vector is.
    #[inline(always)]
    fn offset<S: Value>(self, strides: Strides) -> u64 {
        self.batch as u64 * strides.batch + self.token as u64 * strides.token + bytes::<S>(self.first)
    }

    /// Where it is in a contiguous tensor, in elements.
    #[inline(always)]
    pub fn element(self, hidden: u32) -> u64 {
        self.index as u64 * hidden as u64 + self.first as u64
    }

    /// Sum over the row, in a fixed order.
    #[inline(always)]
    #[track_caller]
    fn sum<S: Value>(self, value: f32, scratch: Shared<f32>) -> f32 {
        let sum = warp_sum::<16>(value);
        if self.step <= 16 * S::CHANNELS {
            return sum;
        }
        let sum = sum + warp_shuffle_xor(sum, 16);
        if self.step <= 32 * S::CHANNELS {
            return sum;
        }
        if lane_id() == 0 {
            scratch.set(warp_id(), sum);
        }
        block_sync();
        warp_sum::<32>(if lane_id() < block_dim() / 32 { scratch.get(lane_id()) } else { 0.0 })
    }
}

/// What becomes of a norm.
pub trait Emit {
    /// Takes vectors of this thread, from its `first` on. All lanes of a warp call it together, for channels beyond the row's end too.
    fn vectors<const N: usize>(&self, first: u32, v: [[u32; 4]; N]);
}

/// The norm of this thread's row, for what `begin` makes. Everything that norms goes through here and so gets the same bits.
///
/// `HELD` vectors of a thread stay in registers; if there may be more, `LONG`, those are read twice, the second time from L2. `EARLY`: the
/// weights of those that stay are read together with them, for few rows, which all are the first of their multiprocessor.
#[inline(always)]
#[track_caller]
pub fn normalise<S: Value, E: Emit, const WIDE: bool, const LONG: bool, const HELD: usize, const EARLY: bool>(
    norm: &Norm,
    row: Row,
    begin: impl FnOnce() -> E,
) {
    let (_, scratch) = shared();
    let has = |part: u32| norm.parts & part != 0;
    let x = norm.x.at(row.offset::<S>(norm.x_strides));
    // Addresses are made where they are used: kept from here on they would cost registers, and so rows that are on their way.
    let residual = || norm.residual.at(row.offset::<S>(norm.residual_strides));
    let weight = || norm.weight.at(bytes::<S>(row.first));
    let residual_out = || norm.residual_out.at(row.element(norm.hidden) * bytes::<S>(1));
    let read = |from: In<u8>, i: u32| {
        let at = row.channel(i);
        if at < row.end { load::<S, WIDE>(from.at(row.skip(i, S::BITS)), row.end - at) } else { [0; 4] }
    };
    let write_sum = |i: u32, v: [u32; 4]| {
        let at = row.channel(i);
        if has(RESIDUAL_OUT) && at < row.end {
            store::<S, WIDE>(residual_out().at(row.skip(i, S::BITS)), v, row.end - at);
        }
    };
    // One condition a vector, for a predicate rather than a branch around the loads of all of them.
    let read_weight = |i: u32| {
        let at = row.channel(i);
        if (at < row.end) & has(WEIGHT) { load::<S, WIDE>(weight().at(row.skip(i, S::BITS)), row.end - at) } else { [S::ONE; 4] }
    };

    // Load.
    let early: [[u32; 4]; HELD] = core::array::from_fn(|i| if EARLY { read_weight(i as u32) } else { [0; 4] });
    let mut held: [[u32; 4]; HELD] = core::array::from_fn(|i| read(x, i as u32));
    if has(RESIDUAL) {
        let other: [[u32; 4]; HELD] = core::array::from_fn(|i| read(residual(), i as u32));
        held = core::array::from_fn(|i| S::add(held[i], other[i]));
        unroll!(i in HELD { write_sum(i as u32, held[i]) });
    }
    let mut sums = held.iter().fold([0.0; 2], |sums, v| S::add_squares(sums, *v));
    let again = |i: u32| {
        let v = read(x, i);
        if has(RESIDUAL) { S::add(v, read(residual(), i)) } else { v }
    };
    if LONG {
        let mut i = HELD as u32;
        while i * row.step < norm.hidden {
            let v = again(i);
            write_sum(i, v);
            sums = S::add_squares(sums, v);
            i += 1;
        }
    }

    // Compute.
    let sum = row.sum::<S>(sums[0] + sums[1], scratch);
    let rstd = fast_rsqrt(sum * norm.inv_hidden + norm.eps);

    // Store.
    if has(RSTD) && row.first == 0 && row.end > 0 {
        norm.rstd.set(row.index, rstd);
    }
    // The weights are in L1 once some rows are done. Fetched earlier they would take the registers of another row.
    unroll!(i in HELD {
        let weight = if EARLY { early[i] } else { read_weight(i as u32) };
        held[i] = S::scale(held[i], weight, rstd, norm.out_scale)
    });
    let emit = begin();
    if HELD > 0 {
        emit.vectors(0, held);
    }
    if LONG {
        let mut i = HELD as u32;
        while i * row.step < norm.hidden {
            emit.vectors(i, [S::scale(again(i), read_weight(i), rstd, norm.out_scale)]);
            i += 1;
        }
    }
}

/// The norm goes to memory.
struct Store<S, const WIDE: bool> {
    row: Row,
    out: Out<u8>,
    of: PhantomData<S>,
}

impl<S: Value, const WIDE: bool> Emit for Store<S, WIDE> {
    #[inline(always)]
    #[track_caller]
    fn vectors<const N: usize>(&self, first: u32, v: [[u32; 4]; N]) {
        unroll!(i in N {
            let number = first + i as u32;
            let at = self.row.channel(number);
            if at < self.row.end {
                store::<S, WIDE>(self.out.at(self.row.skip(number, S::BITS)), v[i], self.row.end - at);
            }
        });
    }
}

// Not for blocks of 576 threads, but for 56 registers: five rows of 7168 bf16 are under way on a multiprocessor.
kernel! {
    op = norm_forward;
    threads = 576, blocks = 2;
    /// Strides count bytes; `out` and `residual_out` are contiguous. The magic and the shift divide by `num_tokens`, see [`Divisor`].
    pub fn rows[S: Value, const WIDE: bool, const LONG: bool, const HELD: usize](
        x: In<u8>, residual: In<u8>, weight: In<u8>, out: Out<u8>, residual_out: Out<u8>, rstd: Out<f32>,
        x_batch_stride: u64, x_stride: u64, residual_batch_stride: u64, residual_stride: u64,
        num_rows: u32, hidden: u32, num_tokens: u32, tokens_magic: u32, tokens_shift: u32, lanes_log2: u32, parts: u32,
        inv_hidden: f32, eps: f32, out_scale: f32,
    ) {
        let norm = Norm {
            x, residual, weight, residual_out, rstd,
            x_strides: Strides { batch: x_batch_stride, token: x_stride },
            residual_strides: Strides { batch: residual_batch_stride, token: residual_stride },
            hidden, inv_hidden, parts, eps, out_scale,
        };
        let by_tokens = Divisor { magic: tokens_magic, shift: tokens_shift };
        let row = Row::of_thread::<S>(num_rows, hidden, num_tokens, by_tokens, lanes_log2);
        normalise::<S, _, WIDE, LONG, HELD, false>(&norm, row, || Store::<S, WIDE> { row, out: out.at(row.element(hidden) * bytes::<S>(1)), of: PhantomData });
    }
    entries {
        bf16[Bf16, true, false, VECTORS], f32[F32, true, false, VECTORS],
        bf16_long[Bf16, true, true, 0], f32_long[F32, true, true, 0],
        bf16_narrow[Bf16, false, true, 0], f32_narrow[F32, false, true, 0],
    }
}

kernel! {
    op = norm_forward;
    threads = 512, blocks = 1;
    /// As [`rows`], for no more blocks than there are multiprocessors.
    pub fn few_rows[S: Value](
        x: In<u8>, residual: In<u8>, weight: In<u8>, out: Out<u8>, residual_out: Out<u8>, rstd: Out<f32>,
        x_batch_stride: u64, x_stride: u64, residual_batch_stride: u64, residual_stride: u64,
        num_rows: u32, hidden: u32, num_tokens: u32, tokens_magic: u32, tokens_shift: u32, lanes_log2: u32, parts: u32,
        inv_hidden: f32, eps: f32, out_scale: f32,
    ) {
        let norm = Norm {
            x, residual, weight, residual_out, rstd,
            x_strides: Strides { batch: x_batch_stride, token: x_stride },
            residual_strides: Strides { batch: residual_batch_stride, token: residual_stride },
            hidden, inv_hidden, parts, eps, out_scale,
        };
        let by_tokens = Divisor { magic: tokens_magic, shift: tokens_shift };
        let row = Row::of_thread::<S>(num_rows, hidden, num_tokens, by_tokens, lanes_log2);
        normalise::<S, _, true, false, VECTORS, true>(&norm, row, || Store::<S, true> { row, out: out.at(row.element(hidden) * bytes::<S>(1)), of: PhantomData });
    }
    entries { bf16[Bf16], f32[F32] }
}
