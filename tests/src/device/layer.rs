//! The device layer: kernels of `ferrotile_kernels::selftest` against plain Rust, on both backends.

use crate::support::cases::Depth;
use crate::support::device_math;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::{Buffer, Device, Element, Stream};
use ferrotile_kernels::device::{In, LaunchConfig, Out, SharedLayout, num};
use ferrotile_kernels::entry::{Entry, KernelArgs};
use ferrotile_kernels::selftest as k;

/// Checks of the device layer.
pub const SUITE: Suite = Suite { op: "selftest", run };

const OP: &str = "selftest";
const THREADS: usize = k::THREADS as usize;

fn run(ctx: &Ctx) -> Result<Report, String> {
    device_math::register();
    type Check = fn(&Run) -> Result<(), String>;
    let checks: [(&str, Check); 20] = [
        ("scan", scan),
        ("warp_ops", warp_ops),
        ("block_ops", block_ops),
        ("atomics", atomics),
        ("chain", chain),
        ("copies", copies),
        ("mma", mma),
        ("conversions", conversions),
        ("conversion_sweep", conversion_sweep),
        ("stochastic_sweep", stochastic_sweep),
        ("packed", packed),
        ("decode", decode),
        ("math", math),
        ("short_math", short_math),
        ("silu_sweep", silu_sweep),
        ("short_silu", short_silu),
        ("widths", widths),
        ("grid", grid),
        ("large_shared", large_shared),
        ("empty_grid", empty_grid),
    ];
    let stream = ctx.device.stream().map_err(text)?;
    let run = Run { device: ctx.device, stream, full: ctx.depth == Depth::Full };
    // All of them run even if one fails: time on a GPU is dear, and they are independent.
    let failures: Vec<String> = checks
        .into_iter()
        .filter(|(name, _)| ctx.case(name))
        .filter_map(|(name, check)| check(&run).err().map(|e| format!("{name}: {e}")))
        .collect();
    ensure(failures.is_empty(), || failures.join("\n"))?;
    Ok(ctx.report())
}

struct Run {
    device: Device,
    stream: Stream,
    full: bool,
}

impl Run {
    fn upload<T: Element>(&self, data: &[T]) -> Result<Buffer<T>, String> {
        self.device.upload(data).map_err(text)
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>, String> {
        self.device.alloc(len).map_err(text)
    }

    fn launch<A: KernelArgs + Sync>(&self, entry: &'static Entry<A>, config: LaunchConfig, args: A) -> Result<(), String> {
        self.stream.launch(OP, entry, &config, &args).map_err(text)?;
        self.stream.synchronize().map_err(text)
    }
}

fn input<T: Element, U>(buffer: &Buffer<T>) -> In<U> {
    In::new(buffer.as_ptr(), (buffer.len() * size_of::<T>()) as u64)
}

fn output<T: Element, U>(buffer: &Buffer<T>) -> Out<U> {
    Out::new(buffer.as_ptr(), (buffer.len() * size_of::<T>()) as u64)
}

fn read<T: Element>(buffer: &Buffer<T>) -> Result<Vec<T>, String> {
    buffer.to_vec().map_err(text)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], expected: &[T]) -> Result<(), String> {
    let at = got.iter().zip(expected).position(|(a, b)| a != b);
    ensure(at.is_none() && got.len() == expected.len(), || match at {
        Some(i) => format!("{what}[{i}]: got {:?}, expected {:?}", got[i], expected[i]),
        None => format!("{what}: {} values, expected {}", got.len(), expected.len()),
    })
}

fn random_words(seed: &str, len: usize) -> Vec<u32> {
    Rng::named(seed).bytes(len * 4).chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn scan(r: &Run) -> Result<(), String> {
    let n = THREADS * 9 - 77;
    let x = random_words("scan", n);
    let (dx, sum, total) = (r.upload(&x)?, r.alloc::<u32>(n)?, r.alloc::<u32>(n)?);
    let mut layout = SharedLayout::new();
    layout.array::<u32>(8);
    let args = k::scan::Args { x: input(&dx), sum: output(&sum), total: output(&total), n: n as u32 };
    r.launch(&k::scan::ENTRY, LaunchConfig::new(9, k::THREADS).shared(&layout), args)?;
    let (mut sums, mut totals) = (Vec::new(), Vec::new());
    for block in x.chunks(THREADS) {
        let mut running = 0u32;
        for v in block {
            running = running.wrapping_add(*v);
            sums.push(running);
        }
        totals.extend(block.iter().map(|_| running));
    }
    same("sum", &read(&sum)?, &sums)?;
    same("total", &read(&total)?, &totals)
}

/// An f32 as an integer that orders like it; NaN below everything, -0 equal to +0.
fn order(bits: u32) -> u32 {
    let v = f32::from_bits(bits);
    if v.is_nan() {
        return 0;
    }
    let bits = if v == 0.0 { 0 } else { bits };
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Butterfly over groups of `n` lanes, widest distance first.
fn butterfly<V: Copy>(v: [V; 32], n: usize, f: impl Fn(V, V) -> V) -> [V; 32] {
    let mut v = v;
    let mut mask = n / 2;
    while mask > 0 {
        v = std::array::from_fn(|l| f(v[l], v[l ^ mask]));
        mask /= 2;
    }
    v
}

fn warp_ops(r: &Run) -> Result<(), String> {
    let blocks = 6;
    let mut x = random_words("warp", blocks * THREADS);
    // Some warps with finite floats of like size, some with equal values, NaN, infinities and zeros of both signs.
    for (i, v) in x.iter_mut().enumerate() {
        match i / 32 % 6 {
            0 => *v = (Rng::named("f").normal(i as u64)).to_bits(),
            1 => *v &= 0x3f,
            2 => *v = [0x7fc0_0000, 0xff80_0000, 0x7f80_0000, 0x8000_0000, 0, 0x3f80_0000, 0xbf80_0000, 0xffff_ffff][i % 8],
            3 => *v = 7,
            _ => {}
        }
    }
    let (dx, y) = (r.upload(&x)?, r.alloc::<u32>(x.len() * k::WARP_OPS as usize)?);
    r.launch(
        &k::warp_ops::ENTRY,
        LaunchConfig::new(blocks as u32, k::THREADS),
        k::warp_ops::Args { x: input(&dx), y: output(&y) },
    )?;
    let got = read(&y)?;
    let num_max = |a: f32, b: f32| if a.is_nan() || a < b || (a == b && a.is_sign_negative()) { b } else { a };
    let num_min = |a: f32, b: f32| if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a };
    for (w, warp) in x.chunks_exact(32).enumerate() {
        let v: [u32; 32] = std::array::from_fn(|l| warp[l]);
        let f = v.map(f32::from_bits);
        let ballot = |p: &dyn Fn(u32) -> bool| (0..32).fold(0u32, |m, l| m | (p(v[l]) as u32) << l);
        let keys = v.map(order);
        let best = *keys.iter().max().unwrap_or(&0);
        let index = keys.iter().position(|key| *key == best).unwrap_or(0) as u32;
        let (sum, max, min) = (butterfly(f, 32, |a, b| a + b), butterfly(f, 8, num_max), butterfly(f, 16, num_min));
        let largest = v.iter().map(|b| b & 0x7fff_ffff).max().unwrap_or(0);
        let xor = butterfly(v, 4, |a, b| a ^ b);
        let mut running = 0u32;
        for l in 0..32 {
            running = running.wrapping_add(v[l]);
            let wide = v[(l + 1) % 32] as u64 * 0x1_0000_0001;
            let permuted = {
                let table: Vec<u8> = v[l].to_le_bytes().into_iter().chain((!v[l]).to_le_bytes()).collect();
                let selector = v[l] >> 7;
                u32::from_le_bytes(std::array::from_fn(|n| {
                    let nibble = (selector >> (4 * n)) as usize & 15;
                    let byte = table[nibble & 7];
                    if nibble < 8 {
                        byte
                    } else if byte >= 128 {
                        255
                    } else {
                        0
                    }
                }))
            };
            let expected = [
                v[(v[l] as usize & 63) % 32],
                v[l ^ 5],
                v[if l >= 3 { l - 3 } else { l }],
                v[if l + 7 < 32 { l + 7 } else { l }],
                ballot(&|v| v & 1 == 1),
                (ballot(&|v| v & 0xff == 0) != 0) as u32,
                (ballot(&|v| v & 0x80 == 0) == u32::MAX) as u32,
                ballot(&|other| other & 3 == v[l] & 3),
                v.iter().fold(0u32, |s, v| s.wrapping_add(*v)),
                *v.iter().max().unwrap_or(&0),
                *v.iter().min().unwrap_or(&0),
                sum[l].to_bits(),
                max[l].to_bits(),
                min[l].to_bits(),
                largest,
                running,
                best,
                index,
                (wide >> 16) as u32,
                v[31 - l],
                permuted,
                xor[l],
                // 40 counts as 8.
                v[if l >= 8 { l - 8 } else { l }],
                v[if l + 8 < 32 { l + 8 } else { l }],
            ];
            for (op, &expected) in expected.iter().enumerate() {
                let got = got[(w * 32 + l) * k::WARP_OPS as usize + op];
                let both_nan = (11..15).contains(&op) && f32::from_bits(got).is_nan() && f32::from_bits(expected).is_nan();
                ensure(got == expected || both_nan, || {
                    format!("warp {w}, lane {l}, result {op}: got {got:#x}, expected {expected:#x}")
                })?;
            }
        }
    }
    Ok(())
}

fn block_ops(r: &Run) -> Result<(), String> {
    let blocks = 5;
    let x = Rng::named("block").normal_f32(blocks * THREADS);
    let (dx, y, bins) = (r.upload(&x)?, r.alloc::<f32>(x.len() * 2)?, r.upload(&[0u32; 16])?);
    let mut layout = SharedLayout::new();
    layout.array::<f32>(8);
    layout.array::<f32>(8);
    layout.array::<u32>(16);
    let args = k::block_ops::Args { x: input(&dx), y: output(&y), bins: output(&bins) };
    r.launch(&k::block_ops::ENTRY, LaunchConfig::new(blocks as u32, k::THREADS).shared(&layout), args)?;
    let mut expected = Vec::new();
    let mut counts = [0u32; 16];
    for block in x.chunks_exact(THREADS) {
        let of_warps: Vec<f32> =
            block.chunks_exact(32).map(|w| butterfly(std::array::from_fn(|l| w[l]), 32, |a, b| a + b)[0]).collect();
        let parts: [f32; 32] = std::array::from_fn(|l| of_warps.get(l).copied().unwrap_or(0.0));
        let sum = butterfly(parts, 32, |a, b| a + b)[0];
        let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        expected.extend(block.iter().flat_map(|_| [sum, max]));
        let mut bins = [0u32; 16];
        block.iter().for_each(|v| bins[(v.to_bits() >> 8 & 15) as usize] += 1);
        bins[15] |= 1 << 20;
        (0..15).for_each(|b| counts[b] += bins[b]);
        // The bit is set before, between or after the additions: the count below it is the same.
        counts[15] += bins[15];
    }
    same("sum and max", &read(&y)?, &expected)?;
    same("bins", &read(&bins)?, &counts)
}

fn atomics(r: &Run) -> Result<(), String> {
    let blocks = 17;
    let x = random_words("atomics", blocks * THREADS);
    let dx = r.upload(&x)?;
    let words = r.upload(&[0u32, u32::MAX, 0, u32::MAX, 0, 0, 0])?;
    let (wide, floats) = (r.upload(&[0u64, 0].map(|v| v as i64))?, r.upload(&[0f32])?);
    let (parts, ticket, sum) = (r.alloc::<u32>(x.len())?, r.upload(&[0u32])?, r.upload(&[0u32])?);
    let mut layout = SharedLayout::new();
    layout.array::<u32>(1);
    let args = k::atomics::Args {
        x: input(&dx),
        words: output(&words),
        wide: output(&wide),
        floats: output(&floats),
        parts: output(&parts),
        ticket: output(&ticket),
        sum: output(&sum),
    };
    r.launch(&k::atomics::ENTRY, LaunchConfig::new(blocks as u32, k::THREADS).shared(&layout), args)?;
    let w = read(&words)?;
    same(
        "words",
        &w[..5],
        &[
            x.iter().fold(0u32, |s, v| s.wrapping_add(*v)),
            x.iter().fold(u32::MAX, |s, v| s.min(*v)),
            x.iter().fold(0, |s, v| s.max(*v)),
            x.iter().fold(u32::MAX, |s, v| s & v),
            x.iter().fold(0, |s, v| s | v),
        ],
    )?;
    ensure((1..=x.len() as u32).contains(&w[5]) && w[6] == 1, || format!("compare_exchange: {:?}", &w[5..]))?;
    let squares = x.iter().fold(0u64, |s, v| s.wrapping_add(*v as u64 * *v as u64)) as i64;
    let largest = x.iter().map(|v| (*v as u64) << 20).max().unwrap_or(0) as i64;
    same("wide", &read(&wide)?, &[squares, largest])?;
    same("floats", &read(&floats)?, &[x.iter().map(|v| (v & 15) as f32).sum()])?;
    same("sum of all blocks", &read(&sum)?, &[x.iter().fold(0u32, |s, v| s.wrapping_add(v ^ 0x5555_5555))])
}

fn chain(r: &Run) -> Result<(), String> {
    let blocks = 300;
    let (order, flags, values) = (r.upload(&[0u32])?, r.upload(&vec![0u32; blocks])?, r.alloc::<u32>(blocks)?);
    let mut layout = SharedLayout::new();
    layout.array::<u32>(1);
    let args = k::chain::Args { order: output(&order), flags: output(&flags), values: output(&values) };
    r.launch(&k::chain::ENTRY, LaunchConfig::new(blocks as u32, k::THREADS).shared(&layout), args)?;
    let expected: Vec<u32> =
        std::iter::successors(Some(1u32), |v| Some(v.wrapping_mul(3).wrapping_add(1))).take(blocks).collect();
    same("values", &read(&values)?, &expected)
}

fn copies(r: &Run) -> Result<(), String> {
    let blocks = 3;
    let words = k::COPY_WORDS as usize;
    let x = random_words("copies", blocks * words);
    let (dx, y) = (r.upload(&x)?, r.alloc::<u32>(x.len())?);
    let config = LaunchConfig::new(blocks as u32, k::THREADS).shared(&k::copies_shared().0);
    r.launch(&k::copies::ENTRY, config, k::copies::Args { x: input(&dx), y: output(&y) })?;
    let mut expected = x.clone();
    for block in 0..blocks {
        for t in 0..THREADS {
            for j in 0..4 {
                let from = |stage: usize, t: usize| x[block * words + stage * 1024 + (t % 256) * 4 + j];
                expected[block * words + t * 4 + j] = from(1, t + 2);
                expected[block * words + 1024 + t * 4 + j] = from(0, t + 1);
            }
        }
    }
    same("y", &read(&y)?, &expected)
}

fn mma(r: &Run) -> Result<(), String> {
    let tiles = 24;
    let rng = Rng::named("mma");
    let (a, b, c) = (rng.normal_bf16(tiles * 256), Rng::named("mma b").normal_bf16(tiles * 128), rng.normal_f32(tiles * 128));
    let (ta, tb) = (Rng::named("ta").normal_f32(tiles * 128), Rng::named("tb").normal_f32(tiles * 64));
    let (da, db, dc, dta, dtb, dtc) =
        (r.upload(&a)?, r.upload(&b)?, r.upload(&c)?, r.upload(&ta)?, r.upload(&tb)?, r.upload(&c)?);
    let args = k::mma::Args { a: input(&da), b: input(&db), c: output(&dc), ta: input(&dta), tb: input(&dtb), tc: output(&dtc) };
    r.launch(&k::mma::ENTRY, LaunchConfig::new(tiles as u32, 32), args)?;
    let (got, got_tf32) = (read(&dc)?, read(&dtc)?);
    let tf32 = |v: f32| f32::from_bits(v.to_bits() & 0xffff_e000) as f64;
    for tile in 0..tiles {
        for (row, col) in (0..16).flat_map(|row| (0..8).map(move |col| (row, col))) {
            let i = tile * 128 + row * 8 + col;
            let terms: Vec<f64> = (0..16)
                .map(|j| a[tile * 256 + row * 16 + j].to_f64() * b[tile * 128 + j * 8 + col].to_f64())
                .chain([c[i] as f64])
                .collect();
            let terms_tf32: Vec<f64> = (0..8)
                .map(|j| tf32(ta[tile * 128 + row * 8 + j]) * tf32(tb[tile * 64 + j * 8 + col]))
                .chain([c[i] as f64])
                .collect();
            for (name, got, terms) in [("bf16", got[i], terms), ("tf32", got_tf32[i], terms_tf32)] {
                let expected: f64 = terms.iter().sum();
                // The tensor core aligns all 17 terms to the largest and truncates each to 24 bits, and truncates the sum once more.
                let largest = terms.iter().fold(0f64, |m, t| m.max(t.abs()));
                let bound = (17.0 * largest + expected.abs()) * 2f64.powi(-23);
                ensure((got as f64 - expected).abs() <= bound, || {
                    format!("{name} tile {tile}, row {row}, column {col}: got {got}, expected {expected} within {bound:e}")
                })?;
            }
        }
    }
    Ok(())
}

fn conversions(r: &Run) -> Result<(), String> {
    let x = super::num::awkward_f32();
    // All of them on a GPU; on the emulator, where instruction and integer code are the same code, a sample of 40,000.
    let step = if r.device.is_emulator() { (x.len() / 40_000).max(1) } else { 1 };
    let x: Vec<f32> = x.into_iter().step_by(step).collect();
    let per = k::CONVERSIONS as usize;
    for part in x.chunks(1 << 22) {
        let (dx, y) = (r.upload(part)?, r.alloc::<u32>(part.len() * 2 * per)?);
        let config = LaunchConfig::new(part.len().div_ceil(THREADS) as u32, k::THREADS);
        r.launch(&k::conversions::ENTRY, config, k::conversions::Args { x: input(&dx), y: output(&y), n: part.len() as u32 })?;
        for (i, got) in read(&y)?.chunks_exact(2 * per).enumerate() {
            let v = part[i];
            let bf16 = num::f32_to_bf16(v) as u32;
            let e4m3 = num::f32_to_e4m3(v) as u32;
            let expected = [
                bf16,
                bf16,
                num::f32_to_f16(v) as u32,
                num::f32_to_f16_rz(v) as u32,
                e4m3,
                e4m3,
                num::f32_to_e5m2(v) as u32,
                num::f32_to_e2m1(v) as u32,
                num::f32_to_e5m6(v) as u32,
                num::f16_to_f32(num::f32_to_f16(v)).to_bits(),
            ];
            for (kind, half) in [("instruction", &got[..per]), ("integer code", &got[per..])] {
                let at = (0..per).find(|&j| half[j] != expected[j]);
                if let Some(j) = at {
                    let bits = v.to_bits();
                    return Err(format!("{kind} {j} of {v:e} ({bits:#010x}): got {:#x}, expected {:#x}", half[j], expected[j]));
                }
            }
        }
    }
    Ok(())
}

/// All 16-bit patterns on a GPU, a sample on the emulator, at scales that bring different ones of them into the range of e2m1.
fn packed(r: &Run) -> Result<(), String> {
    let (stride, blocks) = if r.device.is_emulator() { (31, 8) } else { (1, 256) };
    let per = k::PACKED as usize;
    for exponent in [-126, -100, -3, -1, 0, 1, 2, 9, 120, 126] {
        let scale = 2f32.powi(exponent);
        let y = r.alloc::<u32>(blocks * THREADS * per)?;
        r.launch(
            &k::packed::ENTRY,
            LaunchConfig::new(blocks as u32, k::THREADS),
            k::packed::Args { scale, stride, y: output(&y) },
        )?;
        for (i, got) in read(&y)?.chunks_exact(per).enumerate() {
            let (a, b) = k::packed_operands(i as u32 * stride);
            let halves =
                |f: &dyn Fn(u16, u16) -> u16| f(a as u16, b as u16) as u32 | (f((a >> 16) as u16, (b >> 16) as u16) as u32) << 16;
            // e2m1 is promised up to 6 only.
            let (mut e2m1, mut mask) = (0, 0);
            for (j, word) in [a, a.rotate_left(16), b, a].into_iter().enumerate() {
                for half in 0..2 {
                    let bits = (word >> (16 * half)) as u16;
                    let (v, at) = (num::bf16_to_f32(bits) * scale, 8 * j + 4 * half);
                    let code = if v.is_nan() { 7 | (bits >> 12) as u8 & 8 } else { num::f32_to_e2m1(v) };
                    if v.is_nan() || v.abs() <= 6.0 {
                        e2m1 |= (code as u32) << at;
                        mask |= 15 << at;
                    }
                }
            }
            let larger = |infinity: u16| {
                move |a: u16, b: u16| match [a & 0x7FFF, b & 0x7FFF].map(|m| (m, m > infinity)) {
                    [(_, true), (_, true)] => 0x7FFF,
                    [(_, true), (m, _)] | [(m, _), (_, true)] => m,
                    [(a, _), (b, _)] => a.max(b),
                }
            };
            // No operand is a zero but the first, so there are no equal ones with different signs.
            let ordered = |choose: fn(f32, f32) -> f32| {
                move |a: u16, b: u16| {
                    let (x, y) = (num::bf16_to_f32(a), num::bf16_to_f32(b));
                    if x.is_nan() || y.is_nan() { 0x7FFF } else { num::f32_to_bf16(choose(x, y)) }
                }
            };
            let expected = [
                e2m1,
                halves(&|a, b| num::f32_to_bf16(num::bf16_to_f32(a) * num::bf16_to_f32(b))),
                halves(&larger(0x7F80)),
                halves(&larger(0x7C00)),
                halves(&|a, b| a.max(b)),
                (a & b) | (!a & !b),
                halves(&|a, b| num::f32_to_bf16(num::bf16_to_f32(a) + num::bf16_to_f32(b))),
                halves(&|a, b| if num::bf16_to_f32(a) > num::bf16_to_f32(b) { 0x3F80 } else { 0 }),
                halves(&ordered(|a, b| if a < b { a } else { b })),
                halves(&ordered(|a, b| if a < b { b } else { a })),
            ];
            for (j, expected) in expected.into_iter().enumerate() {
                let got = if j == 0 { got[0] & mask } else { got[j] };
                if got != expected {
                    return Err(format!(
                        "packed {j} of {a:#010x}, {b:#010x}, scale 2^{exponent}: got {got:#x}, expected {expected:#x}"
                    ));
                }
            }
        }
    }
    Ok(())
}

fn conversion_sweep(r: &Run) -> Result<(), String> {
    // On a GPU all 2^32 patterns.
    let (stride, n, blocks) = if r.device.is_emulator() { (65_521, 1u64 << 16, 16) } else { (1, 1 << 32, 132 * 8) };
    let per = k::CONVERSIONS as usize;
    let (differ, first) = (r.upload(&vec![0u32; per])?, r.upload(&vec![u32::MAX; per])?);
    let args = k::conversion_sweep::Args { start: 0, stride, n, differ: output(&differ), first: output(&first) };
    r.launch(&k::conversion_sweep::ENTRY, LaunchConfig::new(blocks, k::THREADS), args)?;
    let (differ, first) = (read(&differ)?, read(&first)?);
    ensure(differ.iter().all(|n| *n == 0), || {
        format!("instruction and integer code differ: counts {differ:?}, first patterns {first:#x?}")
    })
}

/// On a GPU all 2^32 patterns, each with three pairs of random words.
fn stochastic_sweep(r: &Run) -> Result<(), String> {
    let (stride, n, blocks) = if r.device.is_emulator() { (65_521 * 4, 1u64 << 14, 16) } else { (1, 1 << 32, 132 * 8) };
    let per = k::STOCHASTIC as usize;
    for seed in 0..3 {
        let (differ, first) = (r.upload(&vec![0u32; per])?, r.upload(&vec![u32::MAX; per])?);
        let args = k::stochastic_sweep::Args { start: 0, stride, n, seed, differ: output(&differ), first: output(&first) };
        r.launch(&k::stochastic_sweep::ENTRY, LaunchConfig::new(blocks, k::THREADS), args)?;
        let (differ, first) = (read(&differ)?, read(&first)?);
        ensure(differ.iter().all(|n| *n == 0), || {
            format!("stochastic rounding, seed {seed}: counts {differ:?}, first patterns {first:#x?}")
        })?;
    }
    Ok(())
}

fn decode(r: &Run) -> Result<(), String> {
    let per = k::DECODED as usize;
    let y = r.alloc::<f32>(65_536 * per)?;
    r.launch(&k::decode::ENTRY, LaunchConfig::new(256, k::THREADS), k::decode::Args { y: output(&y) })?;
    for (i, got) in read(&y)?.chunks_exact(per).enumerate() {
        let (lo, hi, word) = (i as u8, (i >> 8) as u8, i as u32 | (i as u32) << 16);
        let f16 = num::f16_to_f32(i as u16);
        let bf16 = num::bf16_to_f32(i as u16);
        let mut expected =
            vec![num::e4m3_to_f32(lo), num::e4m3_to_f32(hi), num::e5m2_to_f32(lo), num::e5m2_to_f32(hi), f16, f16, bf16, bf16];
        expected.extend((0..8).map(|j| num::e2m1_to_f32((word >> (4 * j)) as u8 & 15)));
        expected.extend((0..8).map(|j| num::e5m6_to_f32(if j % 2 == 0 { i as u16 } else { !i as u16 } & 0xfff)));
        for (j, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
            ensure(same, || format!("word {i:#06x}, result {j}: got {got}, expected {expected}"))?;
        }
    }
    Ok(())
}

fn math(r: &Run) -> Result<(), String> {
    let n = if r.full { 1 << 20 } else { 1 << 14 };
    let rng = Rng::named("math");
    let mut x: Vec<f32> = (0..n).map(|i| rng.normal(i) * [0.01f32, 1.0, 10.0, 60.0][i as usize % 4]).collect();
    x.extend([
        0.0,
        -0.0,
        1.0,
        2.0,
        0.5,
        87.9,
        89.0,
        -87.0,
        -110.0,
        126.0,
        -126.5,
        2e-38,
        3e38,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ]);
    let (dx, y) = (r.upload(&x)?, r.alloc::<f32>(x.len() * k::MATH as usize)?);
    let config = LaunchConfig::new(x.len().div_ceil(THREADS) as u32, k::THREADS);
    r.launch(&k::math::ENTRY, config, k::math::Args { x: input(&dx), y: output(&y), n: x.len() as u32 })?;
    let eps = |bits: f64| 2f64.powf(-bits);
    for (v, got) in x.iter().zip(read(&y)?.chunks_exact(k::MATH as usize)) {
        let w = *v as f64;
        // The stated bounds, and half an ulp for the rounding of the result to f32.
        let (log2_abs, rel22) = (if (0.5..=2.0).contains(v) { eps(22.0) } else { 0.0 }, eps(22.0) + eps(24.0));
        let checks = [
            ("fast_exp2", 0, w.exp2(), rel22, 2f64.powi(-126)),
            ("fast_log2", 1, w.log2(), rel22, log2_abs),
            ("fast_log", 2, w.ln(), rel22 + eps(23.0), log2_abs),
            ("fast_rsqrt", 3, 1.0 / w.sqrt(), eps(22.9) + eps(24.0), 2f64.powi(-126)),
            ("fast_rcp", 4, 1.0 / w, eps(23.0), 2f64.powi(-126)),
            // 2 ulp, which is at most 2^-22 relative.
            ("exp", 5, w.exp(), eps(22.0), 2f64.powi(-126)),
        ];
        for (name, i, expected, relative, absolute) in checks {
            let got = got[i] as f64;
            let expected = if expected.abs() > f32::MAX as f64 { expected.signum() * f64::INFINITY } else { expected };
            let close = (got - expected).abs() <= expected.abs() * relative + absolute;
            // Near the largest f32 either side may round to infinity.
            let edge = expected.abs() > 3.40e38 && got.abs() > 3.40e38;
            ensure(close || edge || got == expected || (got.is_nan() && expected.is_nan()), || {
                format!("{name}({v:e}): got {got:e}, expected {expected:e}")
            })?;
        }
        let exact = [
            ("sqrt", 6, v.sqrt()),
            ("fma", 7, v.mul_add(*v, -1.0)),
            ("division", 8, 1.0 / v),
            ("max_total", 9, v.max(0.5)),
            ("min_total", 10, v.min(0.5)),
            ("max_abs", 15, v.abs().max(0.5)),
            ("max_nan", 11, if v.is_nan() { *v } else { v.max(0.5) }),
            ("min_nan", 12, if v.is_nan() { *v } else { v.min(0.5) }),
            ("one_plus_exp", 13, got[14]),
            ("max_abs", 15, v.abs().max(0.5)),
        ];
        for (name, i, expected) in exact {
            ensure(got[i].to_bits() == expected.to_bits() || (got[i].is_nan() && expected.is_nan()), || {
                format!("{name}({v:e}): got {:e}, expected {expected:e}", got[i])
            })?;
        }
    }
    Ok(())
}

/// Functions without the branches of the operators have the operators' bits, and `exp_nonpositive` those of the emulator, within an ulp of
/// the exact power.
fn short_math(r: &Run) -> Result<(), String> {
    // On a GPU all mantissas of two binades; every number from 2^-60 on would be as many binades of the same.
    let step = if r.device.is_emulator() { 1021 } else { 1 };
    let between = |from: f32, to: f32, step: usize| -> Vec<f32> {
        (from.to_bits()..to.to_bits()).step_by(step).map(f32::from_bits).collect()
    };
    let differ = |name: &str, x: &[f32], got: &[f32], expected: &dyn Fn(f32) -> f32| -> Result<(), String> {
        match x.iter().zip(got).find(|(x, got)| got.to_bits() != expected(**x).to_bits()) {
            None => Ok(()),
            Some((x, got)) => Err(format!("{name}({x:e}): got {got:e}, expected {:e}", expected(*x))),
        }
    };
    for (from, step) in [(1.0f32, step), (2f32.powi(-90), 4093 * step), (2f32.powi(100), 4093 * step)] {
        let x = between(from, 4.0 * from, step);
        differ("sqrt_normal", &x, &device_math::map(&r.device, k::Function::SqrtNormal, &x)?, &f32::sqrt)?;
    }
    // Down to quotients that are nearly subnormal, where all is exact.
    for (from, to, step) in [(0.25f32, 4.0, step), (2f32.powi(-120), 0.25, 4093 * step), (4.0, 2f32.powi(60), 4093 * step)] {
        let x = between(from, to, step);
        differ("divide_normal", &x, &device_math::map(&r.device, k::Function::DivideNormal, &x)?, &|v| v / (v + 0.375))?;
    }
    let mut x: Vec<f32> = between(1e-8, 110.0, 61 * step).iter().map(|v| -v).collect();
    x.extend([0.0, -0.0, f32::NEG_INFINITY, f32::MIN, -1e-45, -104.0, -103.3, -87.4]);
    let got = device_math::map(&r.device, k::Function::ExpNonpositive, &x)?;
    let emulated = device_math::map(&Device::emulator(), k::Function::ExpNonpositive, &x)?;
    for ((x, got), emulated) in x.iter().zip(&got).zip(&emulated) {
        let exact = f64::from(*x).exp();
        let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        let close = (f64::from(*got) - exact).abs() <= ulp && got.to_bits() == emulated.to_bits();
        ensure(close, || format!("exp_nonpositive({x:e}): got {got:e}, on the emulator {emulated:e}, expected {exact:e}"))?;
    }
    let nan = device_math::map(&r.device, k::Function::ExpNonpositive, &[f32::NAN])?;
    ensure(nan[0].is_nan(), || format!("exp_nonpositive(NaN): got {:e}", nan[0]))
}

/// With the shortest division of SwiGLU, every product of a bf16 with `silu` of a bf16 is rounded to the same bf16 as with the IEEE one.
fn short_silu(r: &Run) -> Result<(), String> {
    let y = r.alloc::<f32>(1 << 16)?;
    let args = k::short_silu::Args { y: output(&y) };
    r.launch(&k::short_silu::ENTRY, LaunchConfig::new((1 << 16) / k::THREADS, k::THREADS), args)?;
    let exp = device_math::bf16_table(&r.device, k::Function::Exp)?;
    for (i, got) in read(&y)?.iter().enumerate() {
        let l = num::bf16_to_f32(i as u16);
        // The gate's negative is another entry of the table.
        let expected = l / (1.0 + exp[i ^ 0x8000]);
        let product = |silu: f32, m: u16| num::f32_to_bf16(silu * num::bf16_to_f32(0x3F80 + m));
        let same = got.to_bits() == expected.to_bits() || (0..128).all(|m| product(*got, m) == product(expected, m));
        ensure(same, || format!("silu({l:e}): got {got:e}, expected {expected:e}"))?;
    }
    Ok(())
}

/// The activation of SwiGLU has the bits of the IEEE quotient.
fn silu_sweep(r: &Run) -> Result<(), String> {
    // On a GPU all 2^32 gates; on the emulator all that bf16 has, and some of the others.
    let sweeps: &[(u32, u64)] = if r.device.is_emulator() { &[(1 << 16, 1 << 16), (65_521, 1 << 16)] } else { &[(1, 1 << 32)] };
    for &(stride, n) in sweeps {
        let (differ, first) = (r.upload(&[0u32])?, r.upload(&[u32::MAX])?);
        let args = k::silu_sweep::Args { start: 0, stride, n, differ: output(&differ), first: output(&first) };
        let blocks = (n / THREADS as u64).min(132 * 8) as u32;
        r.launch(&k::silu_sweep::ENTRY, LaunchConfig::new(blocks, k::THREADS), args)?;
        let (differ, first) = (read(&differ)?[0], f32::from_bits(read(&first)?[0]));
        ensure(differ == 0, || format!("{differ} of {n} gates differ, first {first:e} ({:#x})", first.to_bits()))?;
    }
    Ok(())
}

fn widths(r: &Run) -> Result<(), String> {
    let grid = [3u32, 2, 2];
    let threads = 12 * THREADS;
    let x = Rng::named("widths").bytes(threads * 64);
    let mut y = r.alloc::<u8>(x.len())?;
    y.fill_bytes(0xA5).map_err(text)?;
    let (dx, indices) = (r.upload(&x)?, r.alloc::<u32>(threads * 4)?);
    let args = k::widths::Args { x: input(&dx), y: output(&y), indices: output(&indices) };
    r.launch(&k::widths::ENTRY, LaunchConfig::grid(grid, k::THREADS), args)?;
    same("y", &read(&y)?, &x)?;
    let mut expected = Vec::new();
    for block in 0..12u32 {
        let (bx, by, bz) = (block % 3, block / 3 % 2, block / 6);
        for t in 0..k::THREADS {
            expected.extend([t | k::THREADS << 16, bx | by << 8 | bz << 16, (t % 32) | ((t / 32) << 8), 1]);
        }
    }
    same("indices", &read(&indices)?, &expected)
}

fn grid(r: &Run) -> Result<(), String> {
    let (blocks, rounds) = (40u32, 3u32);
    let words = r.alloc::<u32>(blocks as usize)?;
    let (sums, barrier) = (r.alloc::<u32>((blocks * rounds) as usize)?, r.upload(&[0u32])?);
    let expected: Vec<u32> =
        (0..blocks).flat_map(|_| (0..rounds).map(|round| (0..blocks).map(|b| b * (round + 1) + 1).sum())).collect();
    // Twice: the barrier's word must be ready for the next launch.
    for _ in 0..2 {
        let args = k::grid::Args { words: output(&words), sums: output(&sums), barrier: output(&barrier), rounds };
        r.launch(&k::grid::ENTRY, LaunchConfig::new(blocks, k::THREADS).cooperative(), args)?;
        same("sums", &read(&sums)?, &expected)?;
    }
    ensure(read(&barrier)?[0] & 0x7fff_ffff == 0, || "the barrier's word counts wrong".to_owned())
}

fn large_shared(r: &Run) -> Result<(), String> {
    let words = 50 * 1024u32;
    let blocks = 3u32;
    let y = r.alloc::<u32>((words * blocks) as usize)?;
    let mut layout = SharedLayout::new();
    layout.array::<u32>(words);
    let config = LaunchConfig::new(blocks, k::THREADS).shared(&layout);
    r.launch(&k::large_shared::ENTRY, config, k::large_shared::Args { y: output(&y), words })?;
    let expected: Vec<u32> = (0..blocks).flat_map(|b| (0..words).map(move |i| (words - 1 - i) * 7 + b)).collect();
    same("y", &read(&y)?, &expected)
}

fn empty_grid(r: &Run) -> Result<(), String> {
    let mut y = r.alloc::<f32>(16)?;
    y.fill_bytes(0xA5).map_err(text)?;
    r.launch(&k::decode::ENTRY, LaunchConfig::new(0, k::THREADS), k::decode::Args { y: output(&y) })?;
    same("y", &read(&y)?, &[f32::from_bits(0xA5A5_A5A5); 16])
}

#[cfg(test)]
mod tests {
    use ferrotile_kernels::device::{divide_by, fma};

    #[test]
    fn device_layer() {
        super::SUITE.test();
    }

    /// `divide_by` before its last rounding is within 2^-22 ulp of the exact quotient. So only quotients that are so close to the middle of
    /// two floats could be rounded wrongly, and those of a divisor can be enumerated. The inverse comes from a start that is up to an ulp off.
    #[test]
    fn divide_by_rounds_correctly_near_the_middle() {
        let mantissa = |bits: u64| f32::from_bits(0x3F80_0000 | bits as u32 & 0x7F_FFFF);
        let (first, last) = (1u64 << 23, 1u64 << 24);
        let mut cases = 0;
        // All divisors, by a step of 1, take 20 seconds. The first and the last ones are the special ones.
        for b_bits in (first..first + 500).chain((first..last).step_by(97)).chain(last - 500..last) {
            let b = mantissa(b_bits);
            let exact = 1.0 / f64::from(b);
            let nearest = exact as f32;
            let starts = [-1, 0, 1].map(|off: i32| f32::from_bits(nearest.to_bits().wrapping_add_signed(off)));
            // Half an ulp off, this start is a fixed point. The instruction does better, which the operator relies on too.
            let possible = |near: &f32| (f64::from(*near) - exact).abs() < 2f64.powi(-24) && (b_bits, *near) != (last - 1, 0.5);
            let inverses: Vec<f32> =
                starts.into_iter().filter(possible).map(|near| fma(near, fma(-b, near, 1.0), near)).collect();
            assert!(inverses.iter().all(|inverse| *inverse == nearest), "{b:e}");
            // With whole numbers for mantissas, `a * 2^(shift + 1) - b * odd = rest`, and the rest is at most 8.
            let twos = b_bits.trailing_zeros();
            if twos > 2 {
                continue;
            }
            let odd = b_bits >> twos;
            for shift in [23, 24] {
                let mut inverse_of_power = 1;
                for _ in 0..shift + 1 - twos {
                    inverse_of_power = inverse_of_power * odd.div_ceil(2) % odd;
                }
                let most = 8i64 >> twos;
                for rest in (-most..=most).filter(|rest| rest % 2 != 0) {
                    let a = rest.rem_euclid(odd as i64) as u64 * inverse_of_power % odd;
                    for a_bits in (a..last).step_by(odd as usize).filter(|a| *a >= first && (shift == 23) == (*a >= b_bits)) {
                        let a = mantissa(a_bits);
                        for inverse in &inverses {
                            assert_eq!(divide_by(a, b, *inverse), a / b, "{a:e} / {b:e}");
                        }
                        cases += 1;
                    }
                }
            }
        }
        assert!(cases > 400_000, "{cases}");
    }
}
