//! Comparing a result with its reference: by bytes unless a tolerance is derived where it is used.
//!
//! Every function returns `Err` with a text that says where the first difference is and what both sides hold.

use ferrotile::{E2m1x2, E4m3, E5m2, Ue8m0x4};
use half::{bf16, f16};
use rayon::prelude::*;

/// An element that can be compared by its bits and shown in decimal and hex.
pub trait Bits: Copy + Sync {
    /// The bits, zero-extended.
    fn bits(self) -> u64;
    /// The value, or the values packed in it.
    fn decimal(self) -> String;
}

/// An element with a value, for comparisons with a tolerance: f32, f64, bf16, f16 and small integers.
pub trait Number: Copy + Sync + Into<f64> {}

impl<T: Copy + Sync + Into<f64>> Number for T {}

/// Elements that one rayon task sums.
const CHUNK: usize = 1 << 16;

macro_rules! bits {
    ($($t:ty: $v:ident => $bits:expr, $decimal:expr;)*) => { $(impl Bits for $t {
        fn bits(self) -> u64 {
            let $v = self;
            $bits
        }
        fn decimal(self) -> String {
            let $v = self;
            $decimal
        }
    })* };
}
bits! {
    f32: v => v.to_bits().into(), format!("{v:e}");
    f64: v => v.to_bits(), format!("{v:e}");
    bf16: v => v.to_bits().into(), format!("{:e}", v.to_f32());
    f16: v => v.to_bits().into(), format!("{:e}", v.to_f32());
    u8: v => v.into(), v.to_string();
    u16: v => v.into(), v.to_string();
    u32: v => v.into(), v.to_string();
    u64: v => v, v.to_string();
    i8: v => (v as u8).into(), v.to_string();
    i32: v => (v as u32).into(), v.to_string();
    i64: v => v as u64, v.to_string();
    E4m3: v => v.0.into(), small_float(v.0, 3, 7, 0x7F);
    E5m2: v => v.0.into(), small_float(v.0, 2, 15, 0x7D);
    E2m1x2: v => v.0.into(), format!("{} {}", small_float(e2m1(v.0), 1, 1, 0xFF), small_float(e2m1(v.0 >> 4), 1, 1, 0xFF));
    Ue8m0x4: v => (v.0 as u32).into(), format!("2^{:?}", v.0.to_le_bytes().map(|b| b as i32 - 127));
}

/// A nibble with its sign bit moved to where a byte has it.
fn e2m1(nibble: u8) -> u8 {
    (nibble & 7) | (nibble & 8) << 4
}

/// Value of a small float with its sign in bit 7, as text; magnitudes from `nan` on are NaN (e5m2's infinity is shown as 65536).
fn small_float(code: u8, man_bits: u32, bias: i32, nan: u8) -> String {
    let magnitude = code & 0x7F;
    let sign = if code & 0x80 != 0 { "-" } else { "" };
    if magnitude >= nan {
        return format!("{sign}NaN");
    }
    let exp = (magnitude >> man_bits) as i32;
    let man = (magnitude & ((1 << man_bits) - 1)) as f64 / (1 << man_bits) as f64;
    let value = if exp == 0 { man * 2f64.powi(1 - bias) } else { (1.0 + man) * 2f64.powi(exp - bias) };
    format!("{sign}{value}")
}

fn show<T: Bits>(v: T) -> String {
    format!("{} (0x{:0width$x})", v.decimal(), v.bits(), width = 2 * size_of::<T>())
}

/// Coordinates of the `index`th element in row-major order.
fn coordinates(shape: &[u64], mut index: u64) -> Vec<u64> {
    let mut at = vec![0; shape.len()];
    for (x, size) in at.iter_mut().zip(shape).rev() {
        *x = index % size;
        index /= size;
    }
    at
}

fn numel(shape: &[u64]) -> usize {
    shape.iter().product::<u64>() as usize
}

/// The text about elements that differ; `differ` holds their row-major indices.
fn report<T: Bits>(
    what: &str,
    params: &str,
    shape: &[u64],
    differ: &[usize],
    value: impl Fn(usize) -> (T, T),
) -> Result<(), String> {
    let Some(&first) = differ.first() else { return Ok(()) };
    let (got, expected) = value(first);
    let at = coordinates(shape, first as u64);
    let (count, all) = (differ.len(), numel(shape));
    let (got, expected) = (show(got), show(expected));
    Err(format!("{what}: {count} of {all} differ, first at {at:?} of {shape:?}: got {got}, expected {expected}; {params}"))
}

/// Same bytes in two contiguous tensors of this shape. `params` spells the case and ends up in the error.
pub fn equal<T: Bits>(what: &str, params: &str, shape: &[u64], got: &[T], expected: &[T]) -> Result<(), String> {
    same_length(what, params, got.len(), expected.len())?;
    same_length(what, params, got.len(), numel(shape))?;
    // Whole chunks, which the compiler makes vector instructions of; where they differ is looked for only if they do.
    let same = |(a, b): (&[T], &[T])| a.iter().zip(b).fold(0, |all, (a, b)| all | (a.bits() ^ b.bits())) == 0;
    if got.par_chunks(CHUNK).zip(expected.par_chunks(CHUNK)).all(same) {
        return Ok(());
    }
    let differ: Vec<usize> = (0..got.len()).into_par_iter().filter(|&i| got[i].bits() != expected[i].bits()).collect();
    report(what, params, shape, &differ, |i| (got[i], expected[i]))
}

/// Same bytes in a strided tensor (`got` is its whole buffer from the first element on) and a contiguous one.
pub fn equal_strided<T: Bits>(
    what: &str,
    params: &str,
    shape: &[u64],
    strides: &[u64],
    got: &[T],
    expected: &[T],
) -> Result<(), String> {
    same_length(what, params, expected.len(), numel(shape))?;
    let rows = Rows::new(shape, strides);
    if let Some(last) = rows.last().filter(|last| *last >= got.len()) {
        return Err(format!("{what}: a buffer of {} elements has no element {last}; {params}", got.len()));
    }
    let differs = |i: &usize| got[rows.offset(*i)].bits() != expected[*i].bits();
    let differ: Vec<usize> = (0..expected.len()).into_par_iter().filter(differs).collect();
    report(what, params, shape, &differ, |i| (got[rows.offset(i)], expected[i]))
}

/// Every element of the buffer that the strided tensor does not cover still consists of `fill` bytes.
pub fn untouched<T: Bits + bytemuck::Pod>(
    what: &str,
    params: &str,
    shape: &[u64],
    strides: &[u64],
    buffer: &[T],
    fill: u8,
) -> Result<(), String> {
    let rows = Rows::new(shape, strides);
    let mut covered = vec![false; buffer.len()];
    for start in &rows.starts {
        for i in 0..rows.len {
            if let Some(c) = covered.get_mut(start + i * rows.stride) {
                *c = true;
            }
        }
    }
    let touched = |i: &usize| !covered[*i] && bytemuck::bytes_of(&buffer[*i]).iter().any(|b| *b != fill);
    let all: Vec<usize> = (0..buffer.len()).into_par_iter().filter(touched).collect();
    match all.first() {
        None => Ok(()),
        Some(&i) => {
            let got = show(buffer[i]);
            Err(format!("{what}: {} elements outside the tensor were written, first number {i}: {got}; {params}", all.len()))
        }
    }
}

/// Offsets of the elements of a strided tensor, by row-major index.
struct Rows {
    /// Offset of the first element of each row; a row is everything along the last dimension.
    starts: Vec<usize>,
    len: usize,
    stride: usize,
}

impl Rows {
    fn new(shape: &[u64], strides: &[u64]) -> Self {
        assert_eq!(shape.len(), strides.len(), "a stride for each dimension");
        let (len, outer) = shape.split_last().map_or((1, &[][..]), |(len, outer)| (*len as usize, outer));
        let stride = strides.last().map_or(1, |s| *s as usize);
        let start = |row| coordinates(outer, row as u64).iter().zip(strides).map(|(x, s)| x * s).sum::<u64>() as usize;
        let rows = if len == 0 { 0 } else { numel(outer) };
        Self { starts: (0..rows).into_par_iter().map(start).collect(), len, stride }
    }

    fn offset(&self, index: usize) -> usize {
        self.starts[index / self.len] + index % self.len * self.stride
    }

    /// The largest offset.
    fn last(&self) -> Option<usize> {
        self.starts.iter().max().map(|start| start + (self.len - 1) * self.stride)
    }
}

fn same_length(what: &str, params: &str, got: usize, expected: usize) -> Result<(), String> {
    if got == expected { Ok(()) } else { Err(format!("{what}: {got} elements, expected {expected}; {params}")) }
}

/// `sum((x-y)^2) / sum(x^2+y^2)` in f64, which is `1 - 2*sum(xy)/sum(x^2+y^2)` without the cancellation; 0 for two zero tensors.
///
/// NaN on either side gives NaN, so compare with `<`.
pub fn calc_diff<T: Number, U: Number>(x: &[T], y: &[U]) -> f64 {
    assert_eq!(x.len(), y.len(), "tensors of the same size");
    // Chunks of fixed size are summed in order, so that the result does not depend on the number of threads.
    let sums = |(x, y): (&[T], &[U])| {
        x.iter().zip(y).fold((0.0, 0.0), |(difference, denominator), (x, y)| {
            let (x, y): (f64, f64) = ((*x).into(), (*y).into());
            (difference + (x - y) * (x - y), denominator + x * x + y * y)
        })
    };
    let chunks: Vec<(f64, f64)> = x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK)).map(sums).collect();
    let (difference, denominator) = chunks.iter().fold((0.0, 0.0), |sum, chunk| (sum.0 + chunk.0, sum.1 + chunk.1));
    if denominator == 0.0 { 0.0 } else { difference / denominator }
}

/// [`calc_diff`] below `bound`.
pub fn close_diff<T: Number, U: Number>(what: &str, params: &str, got: &[T], expected: &[U], bound: f64) -> Result<(), String> {
    same_length(what, params, got.len(), expected.len())?;
    let diff = calc_diff(got, expected);
    if diff < bound { Ok(()) } else { Err(format!("{what}: difference {diff:e}, allowed {bound:e}; {params}")) }
}

/// Rounding errors go up as often as down: `|(#(x<ref) + #(x==ref)/2)/n - 1/2| < 10/sqrt(n)`. The share of values below has a standard
/// deviation of at most `1/(2 sqrt(n))` if each side is a coin's, so the bound is 20 of those.
pub fn check_bias<T: Number, U: Number>(what: &str, params: &str, x: &[T], exact: &[U]) -> Result<(), String> {
    same_length(what, params, x.len(), exact.len())?;
    // Twice the count, to stay with integers.
    let twice = |(x, y): (&T, &U)| match (*x).into().partial_cmp(&(*y).into()) {
        Some(std::cmp::Ordering::Less) => 2,
        Some(std::cmp::Ordering::Equal) => 1u64,
        _ => 0,
    };
    bias_within(what, params, x.par_iter().zip(exact).map(twice).sum(), x.len())
}

/// [`check_bias`] of `n` values that are counted already: `twice` is 2 for each that lies below its exact one and 1 for each that is exact.
pub fn bias_within(what: &str, params: &str, twice: u64, n: usize) -> Result<(), String> {
    if n == 0 {
        return Ok(());
    }
    let n = n as f64;
    let (share, bound) = (twice as f64 / 2.0 / n, 10.0 / n.sqrt());
    if (share - 0.5).abs() < bound {
        Ok(())
    } else {
        Err(format!("{what}: {share:.6} of {n} values lie below the exact ones, allowed 0.5 within {bound:.6}; {params}"))
    }
}

/// `|x - y| <= atol + rtol * |y|` for every element, infinities equal to themselves and NaN to nothing. The specifications' default is
/// `atol = 1e-8`, `rtol = 1e-5`.
pub fn allclose<T: Number, U: Number>(
    what: &str,
    params: &str,
    shape: &[u64],
    got: &[T],
    expected: &[U],
    (atol, rtol): (f64, f64),
) -> Result<(), String> {
    same_length(what, params, got.len(), expected.len())?;
    same_length(what, params, got.len(), numel(shape))?;
    let value = |i: usize| -> (f64, f64) { (got[i].into(), expected[i].into()) };
    let far = |i: &usize| {
        let (x, y) = value(*i);
        // An infinite `y` would make the tolerance infinite.
        x != y && !(y.is_finite() && approx::abs_diff_eq!(x, y, epsilon = atol + rtol * y.abs()))
    };
    let differ: Vec<usize> = (0..got.len()).into_par_iter().filter(far).collect();
    report(what, &format!("atol {atol:e}, rtol {rtol:e}; {params}"), shape, &differ, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::rng::Rng;

    #[test]
    fn equal_reports_count_place_and_both_values() {
        let expected = [1.0f32, 0.0, 3.0, 4.0, 5.0, 6.0];
        let mut got = expected;
        assert_eq!(equal("out", "t=2,h=3", &[2, 3], &got, &expected), Ok(()));
        got[1] = -0.0;
        got[5] = 6.5;
        let text = equal("out", "t=2,h=3", &[2, 3], &got, &expected).unwrap_err();
        assert_eq!(
            text,
            "out: 2 of 6 differ, first at [0, 1] of [2, 3]: got -0e0 (0x80000000), expected 0e0 (0x00000000); t=2,h=3"
        );
        // NaN payloads count, equal payloads are equal.
        let nan = [f32::from_bits(0x7FC0_0001)];
        assert!(equal("nan", "", &[1], &nan, &[f32::NAN]).is_err());
        assert!(equal("nan", "", &[1], &nan, &nan).is_ok());
        assert_eq!(equal("out", "p", &[2], &[1u8], &[1u8, 2]).unwrap_err(), "out: 1 elements, expected 2; p");
        assert!(equal("out", "p", &[3], &[1u8, 2], &[1u8, 2]).is_err(), "shape and data disagree");
        assert!(equal::<u8>("empty", "", &[0, 7], &[], &[]).is_ok());
    }

    #[test]
    fn packed_formats_are_shown_as_values() {
        let text = |e: Result<(), String>| e.unwrap_err();
        assert!(text(equal("q", "", &[1], &[E4m3(0x7E)], &[E4m3(0xFF)])).contains("got 448 (0x7e), expected -NaN (0xff)"));
        assert!(
            text(equal("q", "", &[1], &[E5m2(0x7B)], &[E5m2(0x01)])).contains("got 57344 (0x7b), expected 0.0000152587890625")
        );
        assert!(
            text(equal("q", "", &[1], &[E2m1x2(0x9F)], &[E2m1x2(0x10)])).contains("got -6 -0.5 (0x9f), expected 0 0.5 (0x10)")
        );
        assert!(
            text(equal("q", "", &[1], &[Ue8m0x4(0x7F)], &[Ue8m0x4(-1)])).contains("got 2^[0, -127, -127, -127] (0x0000007f)")
        );
        assert!(
            text(equal("q", "", &[1], &[-1i64], &[7])).contains("got -1 (0xffffffffffffffff), expected 7 (0x0000000000000007)")
        );
    }

    #[test]
    fn strided_tensors_and_their_gaps() {
        // Column-major (3, 2) with a pitch of 4: rows 3 and 7 are padding.
        let (shape, strides) = ([3, 2], [1, 4]);
        let mut buffer = [10i32, 20, 30, -1, 40, 50, 60, -1];
        let expected = [10, 40, 20, 50, 30, 60];
        assert!(equal_strided("sf", "", &shape, &strides, &buffer, &expected).is_ok());
        assert!(untouched("sf", "", &shape, &strides, &buffer, 0xFF).is_ok());
        buffer[5] = 51;
        let text = equal_strided("sf", "", &shape, &strides, &buffer, &expected).unwrap_err();
        assert!(text.contains("first at [1, 1] of [3, 2]: got 51"), "{text}");
        buffer[3] = 0x00FF_FFFF;
        let text = untouched("sf", "case", &shape, &strides, &buffer, 0xFF).unwrap_err();
        assert!(text.contains("1 elements outside the tensor were written, first number 3"), "{text}");
        assert!(equal_strided("sf", "", &shape, &strides, &buffer[..6], &expected).unwrap_err().contains("no element 6"));
    }

    #[test]
    fn diff_is_the_formula_of_the_specification() {
        let x = Rng::new(1).normal_f32(1000);
        let y = Rng::new(2).normal_f32(1000);
        let sum = |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(&y).map(|(x, y)| f(*x as f64, *y as f64)).sum::<f64>();
        let formula = 1.0 - 2.0 * sum(&|x, y| x * y) / sum(&|x, y| x * x + y * y);
        assert!((calc_diff(&x, &y) - formula).abs() < 1e-12);
        assert_eq!(calc_diff(&x, &x), 0.0);
        assert_eq!(calc_diff(&[0f32; 3], &[0f64; 3]), 0.0);
        assert!(close_diff("d", "", &x, &y, 1e-3).is_err() && close_diff("d", "", &x, &x, 1e-3).is_ok());
        assert!(close_diff("d", "", &[f32::NAN], &[f32::NAN], 1e-3).is_err());
    }

    #[test]
    fn bias_finds_truncation_and_passes_nearest() {
        let exact = Rng::new(3).normal_f32(100_000);
        let nearest: Vec<bf16> = exact.iter().map(|v| bf16::from_f32(*v)).collect();
        let down: Vec<bf16> = exact.iter().map(|v| bf16::from_f32(v - v.abs() / 256.0)).collect();
        assert_eq!(check_bias("q", "", &nearest, &exact), Ok(()));
        assert!(check_bias("q", "", &down, &exact).unwrap_err().contains("lie below"));
        assert_eq!(check_bias("q", "", &exact, &exact), Ok(()));
        assert_eq!(check_bias::<f32, f32>("q", "", &[], &[]), Ok(()));
    }

    #[test]
    fn allclose_has_both_tolerances() {
        let close = |x: f64, y: f64| allclose("x", "", &[1], &[x], &[y], (1e-8, 1e-5)).is_ok();
        assert!(close(1.0, 1.0 + 9e-6) && !close(1.0, 1.0 + 2e-5));
        assert!(close(0.0, 9e-9) && !close(0.0, 2e-8));
        assert!(close(f64::INFINITY, f64::INFINITY) && !close(f64::INFINITY, f64::NEG_INFINITY));
        assert!(!close(1.0, f64::INFINITY) && !close(f64::INFINITY, 1.0) && !close(f64::NAN, f64::NAN) && !close(f64::NAN, 1.0));
        let text = allclose("x", "case", &[2], &[1f32, 2.0], &[1f32, 3.0], (0.0, 0.1)).unwrap_err();
        assert!(text.starts_with("x: 1 of 2 differ, first at [1] of [2]: got 2e0 (0x4000000000000000)"), "{text}");
        assert!(text.ends_with("atol 0e0, rtol 1e-1; case"), "{text}");
    }
}
