//! Counting the bytes an op must move, from its tensors, and the numbers made of them.

use ferrotile::TensorRef;

/// Bytes of all elements of the tensors, each counted once; gaps between strided elements don't count.
pub fn count_bytes(tensors: &[TensorRef<'_>]) -> u64 {
    tensors.iter().map(|t| t.numel() * t.dtype().size()).sum()
}

/// Bandwidth in GB/s (10^9 bytes) of `bytes` in `us` microseconds.
pub fn gbs(bytes: u64, us: f64) -> f64 {
    bytes as f64 / us / 1e3
}

/// Geometric mean, which summarises a grid; 0 for an empty list.
pub fn geometric_mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { (values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_bandwidth_and_mean() {
        let device = ferrotile::Device::emulator();
        let x = device.zeros::<f32>(8 * 16).unwrap();
        let q = device.zeros::<u8>(8 * 16).unwrap();
        // A view of 8 rows of 10 counts its elements, not the gaps.
        let (x, q) = (x.strided(&[8, 10], &[16, 1], 0).unwrap(), q.tensor(&[8, 16]).unwrap());
        assert_eq!(count_bytes(&[x, q]), 8 * 10 * 4 + 8 * 16);
        assert_eq!(gbs(174_000_000, 58.0), 3000.0);
        assert!((geometric_mean(&[1.0, 4.0]) - 2.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[]), 0.0);
    }
}
