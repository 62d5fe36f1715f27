//! Inputs of benchmark rows: a block of random values, again and again.
//!
//! To make every value on the host, and to copy it from there, took most of a run's time. Here a device copies all but the first block.

use super::rng::Rng;
use super::suite::text;
use ferrotile::{Buffer, Device, E4m3, Element};
use half::bf16;

/// Values of a block. A launch reads many of them, so that values that are the same lie far apart.
pub const BLOCK: u64 = 1 << 20;

/// `len` elements that repeat `block`.
pub fn repeated<T: Element>(device: &Device, block: &[T], len: u64) -> Result<Buffer<T>, String> {
    if len <= block.len() as u64 {
        return device.upload(&block[..len as usize]).map_err(text);
    }
    let copies = || -> ferrotile::Result<Buffer<T>> {
        let (source, stream) = (device.upload(block)?, device.stream()?);
        let mut all = device.alloc::<T>(len as usize)?;
        for at in (0..len).step_by(block.len()) {
            let n = (len - at).min(block.len() as u64);
            stream.copy(&mut all.strided_mut(&[n], &[1], at)?, &source.tensor(&[n])?)?;
        }
        stream.synchronize()?;
        Ok(all)
    };
    copies().map_err(text)
}

/// `len` elements of which each is made of a standard normal value. Inputs of one call have different seeds.
pub fn of_normal<T: Element + Send + Default>(
    device: &Device,
    seed: u64,
    len: u64,
    make: impl Fn(f32) -> T + Sync,
) -> Result<Buffer<T>, String> {
    repeated(device, &Rng::new(seed).fill(len.min(BLOCK) as usize, |rng, i| make(rng.normal(i))), len)
}

/// Standard normal bf16.
pub fn normal_bf16(device: &Device, seed: u64, len: u64) -> Result<Buffer<bf16>, String> {
    of_normal(device, seed, len, bf16::from_f32)
}

/// Standard normal f32.
pub fn normal_f32(device: &Device, seed: u64, len: u64) -> Result<Buffer<f32>, String> {
    of_normal(device, seed, len, |v| v)
}

/// e4m3 codes of normal values, as the peers' benchmark quantises them: with a scale of 2^-7, which goes with them.
pub fn codes_e4m3(device: &Device, seed: u64, len: u64) -> Result<Buffer<u8>, String> {
    of_normal(device, seed, len, |v| E4m3::from_f32(v * 128.0).0)
}

/// Random bytes: what the peers' benchmark takes for pairs of e2m1.
pub fn bytes(device: &Device, seed: u64, len: u64) -> Result<Buffer<u8>, String> {
    repeated(device, &Rng::new(seed).bytes(len.min(BLOCK) as usize), len)
}

/// f32 from 0 to 1.
pub fn uniform(device: &Device, seed: u64, len: u64) -> Result<Buffer<f32>, String> {
    repeated(device, &Rng::new(seed).fill(len.min(BLOCK) as usize, |rng, i| rng.unit(i)), len)
}

/// One value all over.
pub fn constant<T: Element>(device: &Device, value: T, len: u64) -> Result<Buffer<T>, String> {
    repeated(device, &vec![value; len.min(BLOCK) as usize], len)
}

/// The scale of [`codes_e4m3`] and [`bytes`], as f32 bits or as four exponents.
pub fn scale_word(packed: bool) -> u32 {
    if packed { 0x7878_7878 } else { 2f32.powi(-7).to_bits() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_repeated_to_the_end() {
        let device = Device::emulator();
        for len in [0, 1, 6, 7, 8, 21, 23] {
            let got = repeated(&device, &[0u32, 1, 2, 3, 4, 5, 6], len).unwrap().to_vec().unwrap();
            assert_eq!(got, (0..len as u32).map(|i| i % 7).collect::<Vec<_>>());
        }
        let len = 2 * BLOCK + 3;
        let got = normal_f32(&device, 5, len).unwrap().to_vec().unwrap();
        let block = Rng::new(5).normal_f32(BLOCK as usize);
        assert!(got.len() as u64 == len && got.iter().zip(block.iter().cycle()).all(|(a, b)| a == b));
        assert_ne!(normal_f32(&device, 6, 3).unwrap().to_vec().unwrap(), got[..3]);
    }
}
