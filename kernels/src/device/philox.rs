//! Random words from a counter: Philox4x32-10 of Salmon and others, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// What the key grows by each round: the golden ratio and the square root of 3, less 1, as fractions of 2^32.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words of a counter and a key; other counters or keys give words without any relation to these. The same on both backends,
/// and the same as Random123's `philox4x32` with ten rounds.
#[inline(always)]
pub const fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k0, mut k1]) = (counter, key);
    let mut round = 0;
    while round < 10 {
        let x = MULTIPLIERS[0] as u64 * a as u64;
        let y = MULTIPLIERS[1] as u64 * c as u64;
        [a, b, c, d] = [(y >> 32) as u32 ^ b ^ k0, y as u32, (x >> 32) as u32 ^ d ^ k1, x as u32];
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
        round += 1;
    }
    [a, b, c, d]
}

#[cfg(all(test, not(target_arch = "nvptx64")))]
mod tests {
    use super::philox4x32_10;

    /// Those that Random123 is delivered with (`kat_vectors`).
    #[test]
    fn known_answers() {
        let zeros = philox4x32_10([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        let ones = philox4x32_10([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = philox4x32_10([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]);
        assert_eq!(pi, [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }
}
