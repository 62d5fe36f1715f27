//! The example `quantize_checkpoint`, run in this process: whole files in, whole files out, and every way it can fail.
//!
//! Inputs are made and outputs are read by the `safetensors` crate, and scale factors and decoded values are computed anew, so
//! that nothing here depends on the code that is tested.

#[path = "../examples/quantize_checkpoint/job/mod.rs"]
mod job;

use ferrotile::Device;
use ferrotile::quant::QuantFormat as Format;
use half::{bf16, f16};
use indicatif::ProgressBar;
use job::error::Error;
use job::header::Header;
use job::storage::{Storage, on_disk};
use job::{Block, Options, Outcome};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SQUARE: Block = Block::Of(128, 128);
const BLOCKS: [Block; 5] = [SQUARE, Block::Of(1, 128), Block::Of(1, 32), Block::Row, Block::Of(128, 1)];

/// What can be asked for.
fn ways() -> impl Iterator<Item = (Format, Block)> {
    let of = |format, blocks: &'static [Block]| blocks.iter().map(move |block| (format, *block));
    of(Format::E4m3, &BLOCKS).chain(of(Format::E2m1, &BLOCKS[..4])).chain(of(Format::E5m6, &BLOCKS[3..4]))
}

/// A folder of a test's own, removed with all its files when the test has passed.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("quantize-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Puts a file there.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.0).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn options(&self, format: Format, block: Block) -> Options {
        Options { input: self.path("in"), output: self.path("out"), format, block, piece_values: 1 << 20 }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// Runs the job on the emulator with a real disk.
fn run(options: &Options) -> Result<Vec<Outcome>, Error> {
    run_on(options, Device::emulator(), &on_disk)
}

fn run_on(options: &Options, device: Device, create: &job::storage::Create) -> Result<Vec<Outcome>, Error> {
    job::run(options, &device, &ProgressBar::hidden(), &AtomicBool::new(false), create)
}

/// A tensor of an input.
#[derive(Clone)]
struct Input {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Input {
    fn f32(name: &'static str, shape: [usize; 2], values: &[f32]) -> Self {
        Self { name, dtype: Dtype::F32, shape: shape.into(), bytes: values.iter().flat_map(|x| x.to_le_bytes()).collect() }
    }
}

/// A safetensors file.
fn serialize(tensors: &[Input]) -> Vec<u8> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|t| (t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    safetensors::serialize(views, Some(metadata)).unwrap()
}

/// A file whose header is this text, followed by zeros.
fn raw(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

/// Normal numbers: the sum of twelve uniform ones, of which the tails do not matter here.
fn normals(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// The value of an e4m3 code, from the definition of the format.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = if exponent == 0 { mantissa / 8.0 * 2f64.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The value of an e2m1 code.
fn e2m1(code: u8) -> f64 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The value of one of eight e5m6 codes: of a string of 96 bits, the first at the top, stored as three words.
fn e5m6(bytes: &[u8], i: usize) -> f64 {
    let words: [u32; 3] = std::array::from_fn(|w| u32::from_le_bytes(bytes[4 * w..4 * w + 4].try_into().unwrap()));
    let string = words.iter().fold(0u128, |string, word| string << 32 | u128::from(*word));
    let code = (string >> (84 - 12 * i)) as u32 & 0xFFF;
    let (exponent, mantissa) = ((code >> 6 & 31) as i32, f64::from(code & 63) / 64.0);
    let magnitude = if exponent == 0 { mantissa * 2f64.powi(-14) } else { (1.0 + mantissa) * 2f64.powi(exponent - 15) };
    if code & 0x800 == 0 { magnitude } else { -magnitude }
}

/// Checks the output for one matrix with scalar loops and returns the signal-to-noise ratio in dB.
fn check_matrix(file: &SafeTensors<'_>, name: &str, [rows, columns]: [usize; 2], x: &[f32], format: Format, block: Block) -> f64 {
    let context = format!("{name} [{rows}, {columns}] {format} {block:?}");
    let (data, sf) = (file.tensor(name).unwrap(), file.tensor(&format!("{name}_scale_inv")).unwrap());
    let (block_rows, block_columns) = match block {
        Block::Of(rows, columns) => (rows as usize, columns as usize),
        Block::Row => (1, columns.max(1)),
    };
    let sf_columns = columns.div_ceil(block_columns);
    let (dtype, data_columns, largest, smallest_amax) = match format {
        Format::E4m3 => (Dtype::F8_E4M3, columns, 448.0f32, 1e-4f32),
        Format::E2m1 => (Dtype::I8, columns.div_ceil(2), 6.0, 6.0 * f32::MIN_POSITIVE),
        Format::E5m6 => (Dtype::U8, columns.div_ceil(8) * 12, 65024.0, 1e-4),
    };
    assert_eq!((data.dtype(), data.shape()), (dtype, &[rows, data_columns][..]), "{context}");
    assert_eq!((sf.dtype(), sf.shape()), (Dtype::F32, &[rows.div_ceil(block_rows), sf_columns][..]), "{context}");
    let sf: Vec<f32> = sf.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();

    let mut amax = vec![smallest_amax; sf.len()];
    let (mut signal, mut noise) = (0.0, 0.0);
    for row in 0..rows {
        for column in 0..columns {
            let i = row / block_rows * sf_columns + column / block_columns;
            let (x, scale) = (x[row * columns + column], f64::from(sf[i]));
            amax[i] = amax[i].max(x.abs());
            let x = f64::from(x);
            let (code, half_step) = match format {
                // Three mantissa bits, and the steps of subnormal numbers.
                Format::E4m3 => (e4m3(data.data()[row * columns + column]), (x.abs() / 16.0).max(scale * 2f64.powi(-10))),
                Format::E2m1 => {
                    let byte = data.data()[row * data_columns + column / 2];
                    let step = match x.abs() / scale {
                        ..2.0 => 0.5,
                        ..4.0 => 1.0,
                        _ => 2.0,
                    };
                    (e2m1(if column % 2 == 0 { byte & 15 } else { byte >> 4 }), scale * step / 2.0)
                }
                Format::E5m6 => {
                    let start = row * data_columns + column / 8 * 12;
                    // Six mantissa bits; below 2^-14 a value may become either neighbour.
                    (e5m6(&data.data()[start..start + 12], column % 8), (x.abs() / 128.0).max(scale * 2f64.powi(-20)))
                }
            };
            let error = (x - code * scale).abs();
            // The factor covers the f32 roundings of the scale factor and of the product.
            assert!(error <= half_step * (1.0 + 1e-5), "{context}: [{row}, {column}] is {x:e}, decoded {:e}", code * scale);
            signal += x * x;
            noise += error * error;
        }
        if format == Format::E2m1 && columns % 2 == 1 {
            assert_eq!(data.data()[row * data_columns + columns / 2] >> 4, 0, "{context}: spare half byte of row {row}");
        }
        for column in columns..if format == Format::E5m6 { columns.next_multiple_of(8) } else { columns } {
            let start = row * data_columns + column / 8 * 12;
            assert_eq!(e5m6(&data.data()[start..start + 12], column % 8), 0.0, "{context}: spare value of row {row}");
        }
    }
    for (i, (sf, amax)) in sf.iter().zip(amax).enumerate() {
        assert_eq!(sf.to_bits(), (amax / largest).to_bits(), "{context}: scale factor {i} is {sf:e}, amax {amax:e}");
    }
    10.0 * (signal / noise).log10()
}

#[test]
fn matrices_of_every_shape_and_type_survive() {
    let folder = Folder::new();
    let f32s = |name, shape: [usize; 2]| Input::f32(name, shape, &normals(shape[0] * shape[1], name.len() as u64));
    let other = |name, shape: [usize; 2], dtype, bytes: &dyn Fn(f32) -> Vec<u8>| {
        let values = normals(shape[0] * shape[1], 7);
        Input { name, dtype, shape: shape.into(), bytes: values.iter().flat_map(|&x| bytes(x)).collect() }
    };
    let inputs = [
        f32s("even.weight", [256, 384]),
        f32s("ragged.weight", [131, 193]),
        f32s("odd", [130, 71]),
        f32s("row", [1, 300]),
        f32s("column.kernel", [300, 1]),
        f32s("one.value.w", [1, 1]),
        f32s("no.rows.at.all", [0, 64]),
        f32s("no.columns.at.all", [64, 0]),
        other("bf16", [129, 65], Dtype::BF16, &|x| bf16::from_f32(x).to_le_bytes().into()),
        other("f16", [64, 130], Dtype::F16, &|x| f16::from_f32(x).to_le_bytes().into()),
        other("f64", [5, 66], Dtype::F64, &|x| f64::from(x).to_le_bytes().into()),
    ];
    folder.file("in", &serialize(&inputs));
    for (format, block) in ways() {
        let options = folder.options(format, block);
        let outcomes = run(&options).unwrap();
        assert_eq!(outcomes.len(), inputs.len());
        let bytes = fs::read(&options.output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2 * inputs.len());
        for input in &inputs {
            let x: Vec<f32> = match input.dtype {
                Dtype::BF16 => input.bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
                Dtype::F16 => input.bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
                Dtype::F64 => input.bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
                _ => input.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            };
            let snr = check_matrix(&file, input.name, [input.shape[0], input.shape[1]], &x, format, block);
            let outcome = outcomes.iter().find(|o| o.source.name == input.name).unwrap();
            let quality = outcome.quality.unwrap();
            let sizes =
                [input.name.to_owned(), format!("{}_scale_inv", input.name)].map(|n| file.tensor(&n).unwrap().data().len());
            assert_eq!(outcome.bytes_after, (sizes[0] + sizes[1]) as u64);
            if x.is_empty() {
                assert_eq!(quality.noise, 0.0);
            } else if quality.noise == 0.0 {
                // A single value is its own amax; the quotient may still round.
                assert!(x.len() == 1 || block != SQUARE, "{}", input.name);
            } else {
                // f32 products against f64 ones.
                assert!((quality.snr_db() - snr).abs() < 1e-2 || snr > 100.0, "{}: {} {snr}", input.name, quality.snr_db());
            }
        }
    }
    assert_eq!(folder.names(), ["in", "out"]);
}

#[test]
fn normal_weights_keep_the_known_signal_to_noise_ratio() {
    let folder = Folder::new();
    let x = normals(256 * 512, 3);
    folder.file("in", &serialize(&[Input::f32("x.weight", [256, 512], &x)]));
    for (format, block) in ways() {
        let options = folder.options(format, block);
        let snr = run(&options).unwrap()[0].quality.unwrap().snr_db();
        let expected = match (format, block) {
            // The error is relative to each value: scale factors of their own matter little.
            (Format::E4m3, Block::Of(128, 128) | Block::Row) => 31.3..31.8,
            (Format::E4m3, Block::Of(1, 128) | Block::Of(128, 1)) => 31.5..32.1,
            (Format::E4m3, _) => 32.1..32.7,
            // Seven magnitudes: the smaller the block, the better they are used.
            (Format::E2m1, Block::Of(128, 128)) => 18.2..18.9,
            // Of 512 columns.
            (Format::E2m1, Block::Row) => 18.8..19.3,
            (Format::E2m1, Block::Of(1, 128)) => 19.0..19.6,
            (Format::E2m1, _) => 19.6..20.2,
            // Three mantissa bits more than e4m3.
            (Format::E5m6, _) => 49.4..50.0,
        };
        assert!(expected.contains(&snr), "{format} {block:?}: {snr} dB");
    }
}

#[test]
fn everything_else_is_copied_byte_for_byte() {
    let folder = Folder::new();
    let tensor = |name, dtype, shape: &[usize], bytes: Vec<u8>| Input { name, dtype, shape: shape.into(), bytes };
    let copied = [
        tensor("position_ids", Dtype::I64, &[1, 9], (0..72).collect()),
        tensor("norm.weight", Dtype::F32, &[5], [1.0, f32::NAN, f32::INFINITY, -0.0, 2.0].map(f32::to_le_bytes).concat()),
        tensor("conv.weight", Dtype::F16, &[2, 3, 5], (0..60).collect()),
        tensor("mask", Dtype::BOOL, &[3, 3], vec![1; 9]),
        tensor("done.weight", Dtype::F8_E4M3, &[3, 3], (0..9).collect()),
        tensor("done.weight_scale_inv", Dtype::F32, &[1, 1], vec![1, 2, 3, 4]),
        tensor("scalar", Dtype::BF16, &[], vec![7, 8]),
        tensor("empty", Dtype::U8, &[0, 3], vec![]),
    ];
    // Longer than the pieces in which tensors are copied.
    let long = tensor(
        "long",
        Dtype::U8,
        &[20_000_001],
        normals(20_000_001 / 4 + 1, 5).iter().flat_map(|x| x.to_le_bytes()).take(20_000_001).collect(),
    );
    let matrix = Input::f32("x.weight", [2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let inputs: Vec<_> = copied.into_iter().chain([long, matrix]).collect();
    folder.file("in", &serialize(&inputs));
    let options = folder.options(Format::E4m3, SQUARE);
    let outcomes = run(&options).unwrap();
    let bytes = fs::read(&options.output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), inputs.len() + 1);
    for input in inputs.iter().filter(|i| i.name != "x.weight") {
        let t = file.tensor(input.name).unwrap();
        assert_eq!((t.dtype(), t.shape()), (input.dtype, &input.shape[..]), "{}", input.name);
        assert!(t.data() == input.bytes, "{}", input.name);
        assert!(outcomes.iter().find(|o| o.source.name == input.name).unwrap().quality.is_none());
    }

    // What the program needs to know to decode is in the file, beside the texts of the input.
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let texts = metadata.metadata().as_ref().unwrap();
    assert_eq!(texts["format"], "pt");
    let how: serde_json::Value = serde_json::from_str(&texts["ferrotile"]).unwrap();
    let x = serde_json::json!({ "x.weight": { "dtype": "F32", "shape": [2, 3] } });
    assert_eq!(how, serde_json::json!({ "format": "e4m3", "block": [128, 128], "matrices": x }));

    // There is nothing left to quantise in the output.
    let again = Options { input: options.output, output: folder.path("again"), ..options };
    assert!(run(&again).unwrap().iter().all(|o| o.quality.is_none()));
    let second = fs::read(&again.output).unwrap();
    let second = SafeTensors::deserialize(&second).unwrap();
    assert!(file.tensors().iter().all(|(name, t)| second.tensor(name).unwrap() == *t));
}

#[test]
fn pieces_do_not_change_the_bytes() {
    let folder = Folder::new();
    folder.file("in", &serialize(&[Input::f32("x.weight", [1000, 70], &normals(70_000, 9))]));
    for (format, block) in ways() {
        let whole = folder.options(format, block);
        run(&whole).unwrap();
        // 3 rows, or one scaling block, at a time.
        let pieces = Options { output: folder.path("pieces"), piece_values: 210, ..whole };
        run(&pieces).unwrap();
        assert!(fs::read(folder.path("out")).unwrap() == fs::read(pieces.output).unwrap(), "{format} {block:?}");
    }
}

#[test]
fn the_checked_emulator_finds_nothing() {
    let folder = Folder::new();
    folder.file("in", &serialize(&[Input::f32("x.weight", [130, 70], &normals(9100, 2))]));
    for (format, block) in ways() {
        let options = folder.options(format, block);
        run(&options).unwrap();
        let checked = Options { output: folder.path("checked"), ..options };
        run_on(&checked, Device::emulator().checked().shuffled(1), &on_disk).unwrap();
        assert!(fs::read(folder.path("out")).unwrap() == fs::read(checked.output).unwrap(), "{format} {block:?}");
    }
}

#[test]
fn files_of_another_kind_are_refused() {
    let folder = Folder::new();
    let tensor = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let one = |dtype, shape, offsets| format!("{{{}}}", tensor("x", dtype, shape, offsets));
    let two = |a, b| format!("{{{},{}}}", tensor("x", "U8", "[4]", a), tensor("y", "U8", "[4]", b));
    let cases: [(Vec<u8>, &str); 17] = [
        (vec![], "it has 0 bytes"),
        (vec![1; 7], "it has 7 bytes"),
        (b"#!/bin/sh\necho hello\n".to_vec(), "its first 8 bytes stand for a header of"),
        (raw("", 0), "its header is no JSON object"),
        (raw("[1, 2, 3]", 0), "its header is no JSON object"),
        (raw("{\"x\":", 0), "its header is no valid JSON"),
        (raw("{\"x\": 5}", 0), "tensor `x` in its header"),
        (raw("{\"__metadata__\": {\"a\": 5}}", 0), "__metadata__ in its header"),
        (raw(&one("F32", "[-1]", "[0, 4]"), 4), "tensor `x` in its header"),
        (raw(&one("F32", "[2, 3]", "[0, 20]"), 20), "`x` has 20 bytes, which is not the size of F32 [2, 3]"),
        (raw(&one("F32", "[4294967296, 4294967296]", "[0, 20]"), 20), "not the size of F32"),
        (raw(&one("F4", "[3]", "[0, 2]"), 2), "not the size of F4"),
        (raw(&one("F32", "[1]", "[8, 4]"), 8), "the data of `x` end before they begin"),
        (raw(&one("X7", "[1]", "[18446744073709551610, 18446744073709551615]"), 8), "`x` begins at byte"),
        (raw(&two("[0, 4]", "[6, 10]"), 10), "the data of `y` leave a gap"),
        (raw(&two("[0, 4]", "[2, 6]"), 6), "the data of `y` overlap"),
        (raw(&two("[0, 4]", "[4, 8]"), 10), "2 bytes follow the last tensor"),
    ];
    for (bytes, expected) in cases {
        folder.file("in", &bytes);
        let error = run(&folder.options(Format::E4m3, SQUARE)).err().expect(expected);
        assert!(matches!(error, Error::NotSafetensors { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("in: not a safetensors file: ") && text.contains(expected), "{text}, expected: {expected}");
    }
    let absent = Options { input: folder.path("absent"), ..folder.options(Format::E4m3, SQUARE) };
    assert!(matches!(run(&absent), Err(Error::Io { action: "open it", .. })));
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn a_type_from_the_future_is_copied() {
    let folder = Folder::new();
    folder.file("in", &raw(r#"{"x":{"dtype":"F3_E1M1","shape":[2,4],"data_offsets":[0,3]}}"#, 3));
    let options = folder.options(Format::E4m3, SQUARE);
    let outcomes = run(&options).unwrap();
    assert!(outcomes[0].quality.is_none() && outcomes[0].bytes_after == 3);
    let header = Header::read(&mut File::open(&options.output).unwrap(), &options.output).unwrap();
    assert_eq!((header.tensors[0].dtype.as_str(), &header.tensors[0].shape[..]), ("F3_E1M1", &[2, 4][..]));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let folder = Folder::new();
    let bytes = serialize(&[Input::f32("x.weight", [3, 4], &[1.0; 12]), Input::f32("y.weight", [1, 2], &[2.0; 2])]);
    for length in 0..bytes.len() {
        folder.file("in", &bytes[..length]);
        let error = run(&folder.options(Format::E4m3, SQUARE)).err().unwrap();
        let truncated = matches!(error, Error::Truncated { got, .. } if got == length as u64);
        // Of the first 8 bytes alone one cannot say what they are.
        assert!(truncated || length < 8, "{length}: {error}");
        if length == bytes.len() - 1 {
            let text = format!("in: truncated: its header asks for {} bytes, the file has {length}", bytes.len());
            assert!(error.to_string().ends_with(&text), "{error}");
        }
    }
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn a_damaged_header_is_an_error_or_another_header() {
    let bytes = serialize(&[Input::f32("x.weight", [3, 4], &[1.0; 12]), Input::f32("y.weight", [1, 2], &[2.0; 2])]);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut errors = 0;
    for i in 0..header {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[i] ^= 1 << bit;
            match Header::read(&mut Cursor::new(&damaged), Path::new("damaged")) {
                Ok(header) => assert!(header.tensors.iter().all(|t| t.offset + t.bytes <= bytes.len() as u64), "{i}.{bit}"),
                Err(Error::NotSafetensors { .. } | Error::Truncated { .. }) => errors += 1,
                Err(other) => panic!("byte {i}, bit {bit}: {other}"),
            }
        }
    }
    assert!(errors > 4 * header, "only {errors} of {} damages were noticed", 8 * header);
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = Folder::new();
    folder.file("out", b"something older");
    let nan = |value: f32| {
        let mut x = normals(200 * 70, 4);
        x[131 * 70 + 69] = value;
        x
    };
    let weights = |dtype, bytes| Input { name: "h.0.weight", dtype, shape: vec![200, 70], bytes };
    let half = |x: f32| if x.is_finite() { f16::from_f32(x) } else { f16::from_f64(x.into()) };
    let cases = [
        (Input::f32("h.0.weight", [200, 70], &nan(f32::NAN)), "NaN"),
        (Input::f32("h.0.weight", [200, 70], &nan(f32::INFINITY)), "inf"),
        (Input::f32("h.0.weight", [200, 70], &nan(f32::NEG_INFINITY)), "-inf"),
        (weights(Dtype::BF16, nan(f32::NAN).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()), "NaN"),
        (weights(Dtype::F16, nan(f32::INFINITY).iter().flat_map(|&x| half(x).to_le_bytes()).collect()), "inf"),
        // Finite, but not as f32.
        (
            weights(
                Dtype::F64,
                nan(8.0).iter().flat_map(|&x| (if x == 8.0 { -1e300 } else { f64::from(x) }).to_le_bytes()).collect(),
            ),
            "-inf",
        ),
    ];
    for (input, value) in cases {
        let fine = Input::f32("a.weight", [4, 4], &[1.0; 16]);
        folder.file("in", &serialize(&[fine, input]));
        for block in BLOCKS {
            // In the first piece and in a later one.
            for piece_values in [1 << 20, 128] {
                let error = run(&Options { piece_values, ..folder.options(Format::E4m3, block) }).err().unwrap();
                let text = error.to_string();
                assert!(text.contains(&format!("tensor `h.0.weight` holds {value} at [131, 69]")), "{text}");
                assert_eq!(error.exit_code(), 1);
            }
        }
    }
    assert_eq!(folder.names(), ["in", "out"]);
    assert_eq!(fs::read(folder.path("out")).unwrap(), b"something older");
}

#[test]
fn extreme_finite_weights_are_fine() {
    let folder = Folder::new();
    let mut x = vec![f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::from_bits(1), -0.0];
    x.resize(128, 0.0);
    folder.file("in", &serialize(&[Input::f32("x.weight", [2, 64], &x)]));
    for block in BLOCKS {
        let options = folder.options(Format::E4m3, block);
        let quality = run(&options).unwrap()[0].quality.unwrap();
        assert!(quality.snr_db() > 100.0, "{block:?}: {} dB", quality.snr_db());
        let bytes = fs::read(&options.output).unwrap();
        check_matrix(&SafeTensors::deserialize(&bytes).unwrap(), "x.weight", [2, 64], &x, Format::E4m3, block);
    }
}

/// A disk that takes some bytes and then is full, forgets writes, or fails when everything should be on it.
struct BadDisk {
    file: Box<dyn Storage>,
    space: u64,
    forget_from: u64,
    sync: Option<ErrorKind>,
}

impl BadDisk {
    /// Such a disk with nothing wrong yet.
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: on_disk(path)?, space: u64::MAX, forget_from: u64::MAX, sync: None })
    }
}

impl Write for BadDisk {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.space == 0 && !data.is_empty() {
            return Err(ErrorKind::StorageFull.into());
        }
        let data = &data[..data.len().min(usize::try_from(self.space).unwrap_or(usize::MAX))];
        let position = self.file.stream_position()?;
        let written =
            if position >= self.forget_from { self.file.write(&vec![0; data.len()])? } else { self.file.write(data)? };
        self.space -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Read for BadDisk {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.file.read(data)
    }
}

impl Seek for BadDisk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Storage for BadDisk {
    fn sync(&mut self) -> io::Result<()> {
        self.sync.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

/// A small checkpoint with something to quantise and something to copy.
fn small(folder: &Folder) -> Options {
    let copied = Input { name: "ids", dtype: Dtype::I64, shape: vec![1, 8], bytes: (1..65).collect() };
    folder.file("in", &serialize(&[Input::f32("x.weight", [20, 70], &normals(1400, 6)), copied]));
    folder.options(Format::E4m3, SQUARE)
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let folder = Folder::new();
    let options = small(&folder);
    run(&options).unwrap();
    let needed = fs::metadata(&options.output).unwrap().len();
    fs::write(&options.output, b"something older").unwrap();
    for space in (0..needed).step_by(97).chain([needed - 1]) {
        let error =
            run_on(&options, Device::emulator(), &move |path: &Path| Ok(Box::new(BadDisk { space, ..BadDisk::open(path)? })));
        let error = error.err().unwrap();
        let text =
            format!("out: no space left on the disk: the output needs {needed} bytes in all; what was written of it is removed");
        assert!(error.to_string().ends_with(&text), "{space}: {error}");
        assert_eq!(error.exit_code(), 1);
    }
    // Some file systems say so only when asked whether everything is there.
    for (kind, full) in [(ErrorKind::StorageFull, true), (ErrorKind::QuotaExceeded, true), (ErrorKind::Other, false)] {
        let create = move |path: &Path| Ok(Box::new(BadDisk { sync: Some(kind), ..BadDisk::open(path)? }) as Box<dyn Storage>);
        let error = run_on(&options, Device::emulator(), &create).err().unwrap();
        assert_eq!(matches!(error, Error::NoSpace { bytes, .. } if bytes == needed), full, "{error}");
    }
    assert_eq!(folder.names(), ["in", "out"]);
    assert_eq!(fs::read(&options.output).unwrap(), b"something older");
    let exact = move |path: &Path| Ok(Box::new(BadDisk { space: needed, ..BadDisk::open(path)? }) as Box<dyn Storage>);
    run_on(&options, Device::emulator(), &exact).unwrap();
}

#[test]
fn a_disk_that_forgets_is_noticed() {
    let folder = Folder::new();
    let options = small(&folder);
    run(&options).unwrap();
    let header = Header::read(&mut File::open(&options.output).unwrap(), &options.output).unwrap();
    fs::remove_file(&options.output).unwrap();
    let ids = header.tensors.iter().find(|t| t.name == "ids").unwrap();
    for (forget_from, what) in [(ids.offset, "ids"), (0, "")] {
        let create = move |path: &Path| Ok(Box::new(BadDisk { forget_from, ..BadDisk::open(path)? }) as Box<dyn Storage>);
        let error = run_on(&options, Device::emulator(), &create).err().unwrap();
        let noticed = matches!(&error, Error::ReadBack { what: found, .. } if found == what);
        assert!(noticed || (forget_from == 0 && matches!(error, Error::NotSafetensors { .. })), "{error}");
    }
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn stopping_leaves_nothing_behind() {
    let folder = Folder::new();
    let options = small(&folder);
    let result = job::run(&options, &Device::emulator(), &ProgressBar::hidden(), &AtomicBool::new(true), &on_disk);
    let error = result.err().unwrap();
    assert!(matches!(error, Error::Interrupted));
    assert_eq!(error.exit_code(), 130);
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn blocks_that_a_format_does_not_have_are_refused() {
    let folder = Folder::new();
    let options = small(&folder);
    let refused = |format, block| run(&Options { format, block, ..folder.options(Format::E4m3, SQUARE) }).err().unwrap();
    let error = refused(Format::E5m6, SQUARE);
    assert_eq!(error.to_string(), "e5m6 has no scale factor for `128x128`; it has one for: row");
    assert_eq!(error.exit_code(), 2);
    let error = refused(Format::E2m1, Block::Of(128, 1));
    assert_eq!(error.to_string(), "e2m1 has no scale factor for `128x1`; it has one for: 128x128, 1x128, 1x32, row");
    assert!(matches!(refused(Format::E4m3, Block::Of(64, 64)), Error::Block { .. }));
    assert!(!options.output.exists());
    assert_eq!(folder.names(), ["in"]);
}

#[test]
fn outputs_that_would_lose_something_are_refused() {
    let folder = Folder::new();
    let options = small(&folder);
    let before = fs::read(&options.input).unwrap();
    // The same file by another name.
    let same = Options { output: folder.path("../").join(folder.0.file_name().unwrap()).join("in"), ..options };
    assert!(matches!(run(&same), Err(Error::SameFile { .. })));
    fs::create_dir(folder.path("directory")).unwrap();
    let directory = Options { output: folder.path("directory"), ..same };
    assert!(matches!(run(&directory), Err(Error::Io { action: "write a file of this name", .. })));
    let nowhere = Options { output: folder.path("no/such/folder/out"), ..directory };
    assert!(matches!(run(&nowhere), Err(Error::Io { action: "create it", .. })));
    assert!(fs::read(&nowhere.input).unwrap() == before);

    let taken =
        [Input::f32("x", [1, 1], &[1.0]), Input { name: "x_scale_inv", dtype: Dtype::U8, shape: vec![1], bytes: vec![0] }];
    folder.file("in", &serialize(&taken));
    let error = run(&folder.options(Format::E4m3, SQUARE)).err().unwrap();
    assert!(error.to_string().ends_with("in: holds `x_scale_inv` already, the name for the scale factors of `x`"), "{error}");
    assert_eq!(folder.names(), ["directory", "in"]);
}

/// Runs the whole program and returns its exit code.
fn program(args: &[&str]) -> u8 {
    job::cli::main(["quantize_checkpoint"].iter().chain(args), &AtomicBool::new(false), &on_disk)
}

#[test]
fn exit_codes() {
    let folder = Folder::new();
    let options = small(&folder);
    let (input, output) = (options.input.to_str().unwrap(), options.output.to_str().unwrap());
    let base = ["--input", input, "--output", output, "--device", "emulator"];
    assert_eq!(program(&base), 0);
    assert_eq!(program(&["--help"]), 0);
    let written = |format: &str, block: &str| {
        let bytes = fs::read(output).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let text = &metadata.metadata().as_ref().unwrap()["ferrotile"];
        let block = if block == "row" { r#""row""#.to_owned() } else { format!("[{}]", block.replace('x', ",")) };
        let expected = format!(r#""block":{block},"format":"{format}""#);
        assert!(text.contains(&expected), "{text}, expected {expected}");
    };
    for (format, default) in [("e4m3", "128x128"), ("e2m1", "128x128"), ("e5m6", "row")] {
        assert_eq!(program(&[&base[..], &["--format", format]].concat()), 0);
        written(format, default);
    }
    for (format, block) in ways() {
        let (format, block) = (format.name(), block.to_string());
        assert_eq!(program(&[&base[..], &["--format", format, "--block", &block]].concat()), 0);
        written(format, &block);
    }
    let usage: [&[&str]; 10] = [
        &[],
        &["--input", input, "--synthetic"],
        &["--input", input, "--seed", "2"],
        &["--input", input, "--format", "e5m2"],
        &["--input", input, "--format", "e5m6", "--block", "128x128"],
        &["--input", input, "--format", "e5m6", "--block", "1x32"],
        &["--input", input, "--format", "e2m1", "--block", "128x1"],
        &["--input", input, "--block", "64x64"],
        &["--input", input, "--device", "cuda:first"],
        &["--input", input, "--device", "tpu"],
    ];
    for args in usage {
        assert_eq!(program(args), 2, "{args:?}");
    }
    assert_eq!(program(&["--input", folder.path("absent").to_str().unwrap(), "--output", output]), 1);
    assert_eq!(program(&["--input", input, "--output", output, "--device", "cuda:4711"]), 1);
}

#[test]
fn synthetic_checkpoints_depend_on_the_seed_alone() {
    let folder = Folder::new();
    let written = |name: &str, seed| {
        job::synthetic::write(&folder.path(name), 0, seed, &AtomicBool::new(false), &on_disk).unwrap();
        fs::read(folder.path(name)).unwrap()
    };
    let first = written("a", 5);
    assert!(first == written("b", 5) && first != written("c", 6));
    let file = SafeTensors::deserialize(&first).unwrap();
    let patch = file.tensor("model.patch_embed.weight").unwrap();
    let values: Vec<f64> = patch.data().as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f64()).collect();
    let deviation = (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
    assert!((0.0199..0.0201).contains(&deviation), "{deviation}");

    let stopped = job::synthetic::write(&folder.path("d"), 0, 5, &AtomicBool::new(true), &on_disk);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(folder.names(), ["a", "b", "c"]);
}
