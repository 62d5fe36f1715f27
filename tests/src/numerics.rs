//! The last table of `docs/numerics.md`: what casting normal values and casting them back leaves, by the library's ops on the emulator.

use crate::support::rng::Rng;
use ferrotile::Device;
use ferrotile::quant::{QuantFormat, QuantSpec, QuantTensor, SfLayout};
use half::bf16;

const PAGE: &str = include_str!("../../docs/numerics.md");
const BEGIN: &str = "<!-- numerics:begin -->";
const END: &str = "<!-- numerics:end -->";

const TOKENS: u64 = 256;
const HIDDEN: u64 = 4096;

/// How far a number of the page may be from the one found: SNR in dB, bits, or per cent.
const TOLERANCE: f64 = 0.02;

/// A row of the table; `powers` makes every scale a power of two.
struct Case {
    format: QuantFormat,
    block: (u32, u32),
    layout: SfLayout,
    powers: bool,
}

fn cases() -> Vec<Case> {
    let case = |format, block, layout, powers| Case { format, block, layout, powers };
    let (e4m3, e2m1) = (QuantFormat::E4m3, QuantFormat::E2m1);
    vec![
        case(QuantFormat::E5m6, (1, HIDDEN as u32), SfLayout::RowMajor, false),
        case(e4m3, (1, 128), SfLayout::RowMajor, false),
        case(e4m3, (1, 128), SfLayout::RowMajor, true),
        case(e4m3, (1, 32), SfLayout::RowMajorPacked, true),
        case(e4m3, (128, 128), SfLayout::RowMajor, false),
        case(e4m3, (128, 1), SfLayout::RowMajor, false),
        case(e2m1, (1, 32), SfLayout::RowMajor, false),
        case(e2m1, (1, 32), SfLayout::RowMajorPacked, true),
        case(e2m1, (1, 16), SfLayout::RowMajorE4m3, false),
        case(e2m1, (128, 128), SfLayout::RowMajor, false),
    ]
}

/// Bits of a value, and the smallest normal number.
fn format(format: QuantFormat) -> (f64, f64) {
    match format {
        QuantFormat::E5m6 => (12.0, 2f64.powi(-14)),
        QuantFormat::E4m3 => (8.0, 2f64.powi(-6)),
        QuantFormat::E2m1 => (4.0, 1.0),
    }
}

/// Signal-to-noise ratio in dB; the largest relative error of values from their `smallest` one on; the share of values that became 0. The
/// last two in per cent.
fn quality(x: &[f32], y: &[f32], smallest: impl Fn(usize) -> f64) -> [f64; 3] {
    let (mut signal, mut noise, mut largest, mut zeros) = (0.0, 0.0, 0f64, 0);
    for (i, (x, y)) in x.iter().zip(y).enumerate() {
        let (x, y) = (f64::from(*x), f64::from(*y));
        signal += x * x;
        noise += (x - y) * (x - y);
        if x.abs() >= smallest(i) {
            largest = largest.max((x - y).abs() / x.abs());
        }
        zeros += (x != 0.0 && y == 0.0) as u64;
    }
    [10.0 * f64::log10(signal / noise), 100.0 * largest, 100.0 * zeros as f64 / x.len() as f64]
}

fn line(format: &str, block: &str, scale: &str, bits: f64, [snr, largest, zeros]: [f64; 3]) -> String {
    format!("| {format} | {block} | {scale} | {bits:.2} | {snr:.2} | {largest:.2} % | {zeros:.2} % |\n")
}

/// The table as it should be.
fn table() -> String {
    let x = Rng::named("numerics").normal_f32((TOKENS * HIDDEN) as usize);
    let mut table =
        "| format | block | scale | bits | SNR in dB | largest relative error | become 0 |\n|---|---|---|---:|---:|---:|---:|\n"
            .to_owned();
    let rounded: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    table += &line("bf16", "–", "–", 16.0, quality(&x, &rounded, |_| 2f64.powi(-126)));

    let device = Device::emulator();
    let stream = device.stream().unwrap();
    let on_device = device.upload(&x).unwrap();
    for Case { format: name, block, layout, powers } in cases() {
        let spec = QuantSpec { format: name, block, layout };
        let mut q = QuantTensor::alloc(&device, spec, TOKENS, HIDDEN).unwrap();
        q.quantise(&stream, on_device.tensor(&[TOKENS, HIDDEN]).unwrap(), powers).unwrap();
        let mut back = device.alloc::<f32>(x.len()).unwrap();
        q.view().cast_back(&stream, back.tensor_mut(&[TOKENS, HIDDEN]).unwrap()).unwrap();
        let (back, sf) = (back.to_vec().unwrap(), q.scales_to_vec().unwrap());

        let (bits, smallest) = format(name);
        let (hidden, npt, npc) = (HIDDEN as usize, block.0 as usize, block.1 as usize);
        let sf = |i: usize| sf[i / hidden / npt * hidden.div_ceil(npc) + i % hidden / npc];
        let (scale, scale_bits) = match layout {
            SfLayout::RowMajorPacked => ("ue8m0", 8.0),
            SfLayout::RowMajorE4m3 => ("e4m3", 8.0),
            _ if powers => ("power of two in f32", 32.0),
            _ => ("f32", 32.0),
        };
        let bits = bits + scale_bits / (npt * npc) as f64;
        let quality = quality(&x, &back, |i| smallest * f64::from(sf(i)));
        table += &line(name.name(), &format!("({npt}, {npc})"), scale, bits, quality);
    }
    table
}

/// Equal but for small differences of numbers.
fn agree(page: &str, found: &str) -> bool {
    let cells = |table: &str| -> Vec<String> { table.trim().split(['|', '\n']).map(|cell| cell.trim().to_owned()).collect() };
    let number = |cell: &str| cell.trim_end_matches(" %").parse::<f64>().ok();
    let (page, found) = (cells(page), cells(found));
    page.len() == found.len()
        && page.iter().zip(&found).all(|(a, b)| match (number(a), number(b)) {
            (Some(a), Some(b)) => (a - b).abs() <= TOLERANCE + 1e-9,
            _ => a == b,
        })
}

#[test]
fn the_table_is_what_the_ops_give() {
    let (_, rest) = PAGE.split_once(BEGIN).unwrap();
    let (page, _) = rest.split_once(END).unwrap();
    let found = table();
    assert!(agree(page, &found), "docs/numerics.md should have this between its marks:\n{BEGIN}\n{found}{END}");
}

#[test]
fn other_numbers_are_noticed() {
    let found = line("e4m3", "(1, 128)", "f32", 8.25, [31.5, 5.88, 0.1]);
    for (page, same) in [("31.52", true), ("31.53", false), ("", false)] {
        assert_eq!(agree(&found.replace("31.50", page), &found), same, "{page}");
    }
    assert!(!agree(&found.replace("f32", "ue8m0"), &found) && !agree(&found.repeat(2), &found));
}
