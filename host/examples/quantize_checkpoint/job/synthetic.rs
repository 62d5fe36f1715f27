//! A checkpoint of random weights, for when there is no real one at hand.

use super::error::{Error, Result};
use super::header::{Header, Metadata, Tensor};
use super::shared::Random;
use super::storage::{Create, NewFile};
use half::{bf16, f16};
use std::f32::consts::TAU;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Hidden size and the other sides of a layer: a small Llama with grouped heads.
const HIDDEN: u64 = 1024;
const KV: u64 = 256;
const INTERMEDIATE: u64 = 2816;
/// Sides that are no multiple of a scaling block.
const VOCABULARY: u64 = 5003;
const PATCH: u64 = 588;

/// Standard deviation of the weights.
const DEVIATION: f32 = 0.02;

/// Writes a checkpoint of `layers` layers. The same `seed` gives the same bytes.
pub fn write(path: &Path, layers: u64, seed: u64, stop: &AtomicBool, create: &Create) -> Result<()> {
    let mut tensors = vec![
        Tensor::new("model.position_ids", "I64", &[1, 512]),
        Tensor::new("model.embed_tokens.weight", "BF16", &[VOCABULARY, HIDDEN]),
        Tensor::new("model.patch_embed.weight", "F16", &[HIDDEN, PATCH]),
    ];
    for layer in 0..layers {
        let mut add = |name: &str, dtype: &str, shape: &[u64]| {
            tensors.push(Tensor::new(format!("model.layers.{layer}.{name}.weight"), dtype, shape));
        };
        add("input_layernorm", "F32", &[HIDDEN]);
        add("self_attn.q_proj", "BF16", &[HIDDEN, HIDDEN]);
        add("self_attn.k_proj", "BF16", &[KV, HIDDEN]);
        add("self_attn.v_proj", "BF16", &[KV, HIDDEN]);
        add("self_attn.o_proj", "BF16", &[HIDDEN, HIDDEN]);
        add("post_attention_layernorm", "F32", &[HIDDEN]);
        add("mlp.gate_proj", "F32", &[INTERMEDIATE, HIDDEN]);
        add("mlp.up_proj", "F32", &[INTERMEDIATE, HIDDEN]);
        add("mlp.down_proj", "F32", &[HIDDEN, INTERMEDIATE]);
    }
    let metadata = Metadata::from([("format".to_owned(), "pt".to_owned())]);
    let (header, start) = Header::place(tensors, metadata);
    let mut file = NewFile::create(path, header.file_bytes(start.len() as u64), create)?;
    file.write_at(0, &start)?;
    let mut random = Random(seed);
    for t in &header.tensors {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        file.write_at(t.offset, &data(t, &mut random))?;
    }
    file.sync()?;
    file.finish()
}

/// Bytes of one tensor: counting integers, or normal numbers.
fn data(t: &Tensor, random: &mut Random) -> Vec<u8> {
    let count = t.shape.iter().product::<u64>();
    let normals = (0..count.div_ceil(2)).flat_map(|_| random.normals()).take(count as usize).map(|x| x * DEVIATION);
    match t.dtype.as_str() {
        "I64" => (0..count).flat_map(u64::to_le_bytes).collect(),
        "F16" => normals.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        "BF16" => normals.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => normals.flat_map(f32::to_le_bytes).collect(),
    }
}

impl Random {
    /// Two independent normal numbers (Box and Muller).
    fn normals(&mut self) -> [f32; 2] {
        let bits = self.next();
        // 24 bits each; the first is never 0, because of the logarithm.
        let uniform = |bits: u64| (bits & 0xFF_FFFF) as f32 / (1 << 24) as f32;
        let radius = (-2.0 * (1.0 - uniform(bits)).ln()).sqrt();
        let (sin, cos) = (TAU * uniform(bits >> 32)).sin_cos();
        [radius * cos, radius * sin]
    }
}
