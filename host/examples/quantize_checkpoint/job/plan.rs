//! What becomes of each tensor, and what the output holds. Decided before any data are read.

use super::codec::Codec;
use super::error::{Error, Result};
use super::header::{Header, Metadata, Tensor};
use super::{Block, Options};
use half::{bf16, f16};
use std::collections::HashSet;

/// What DeepSeek's checkpoints call the factors that turn quantised values back into weights, `inv` or not.
const SF_SUFFIX: &str = "_scale_inv";

/// What happens to a tensor of the input.
pub struct Plan {
    pub source: Tensor,
    /// Type of the values of a matrix that is quantised. Everything else is copied.
    pub values: Option<Values>,
}

/// Values that are quantised. Only f32 goes to the device: it holds all of the 16-bit ones.
#[derive(Clone, Copy)]
pub enum Values {
    F64,
    F32,
    Bf16,
    F16,
}

impl Values {
    /// Bytes of one.
    pub const fn bytes(self) -> u64 {
        match self {
            Values::F64 => 8,
            Values::F32 => 4,
            Values::Bf16 | Values::F16 => 2,
        }
    }

    /// As f32. Only f64 is rounded, by a millionth of the error that quantisation makes.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Values::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
            Values::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Values::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Values::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        }
    }
}

/// Name of the scale factors of a matrix.
pub fn sf_name(name: &str) -> String {
    format!("{name}{SF_SUFFIX}")
}

/// Decides what is quantised: all matrices of floating-point numbers but scale factors that are there already.
pub fn plan(header: &Header) -> Vec<Plan> {
    let names: HashSet<_> = header.tensors.iter().map(|t| t.name.as_str()).collect();
    let is_sf = |name: &str| name.strip_suffix(SF_SUFFIX).is_some_and(|of| names.contains(of));
    let values = |t: &Tensor| match t.dtype.as_str() {
        _ if t.shape.len() != 2 || is_sf(&t.name) => None,
        "F64" => Some(Values::F64),
        "F32" => Some(Values::F32),
        "BF16" => Some(Values::Bf16),
        "F16" => Some(Values::F16),
        _ => None,
    };
    header.tensors.iter().map(|t| Plan { values: values(t), source: t.clone() }).collect()
}

/// The tensors of the output.
pub fn outputs(options: &Options, codec: &Codec, plans: &[Plan]) -> Result<Vec<Tensor>> {
    let names: HashSet<_> = plans.iter().map(|p| p.source.name.as_str()).collect();
    let mut tensors = Vec::new();
    for Plan { source, values } in plans {
        let (Some([rows, columns]), Some(_)) = (source.matrix(), values) else {
            tensors.push(source.clone());
            continue;
        };
        let name = sf_name(&source.name);
        if names.contains(name.as_str()) {
            return Err(Error::NameTaken { path: options.input.clone(), name, tensor: source.name.clone() });
        }
        tensors.push(Tensor::new(source.name.clone(), codec.data_dtype(), &[rows, codec.data_columns(columns)]));
        tensors.push(Tensor::new(name, "F32", &codec.sf_shape([rows, columns])));
    }
    Ok(tensors)
}

/// The texts of the input, and what one needs to know to dequantise: FP4 and e5m6 data do not tell their columns when these were filled
/// up, nor does anything tell the original type.
pub fn metadata(options: &Options, header: &Header, plans: &[Plan]) -> Metadata {
    let mut metadata = header.metadata.clone();
    let matrices = plans.iter().filter(|p| p.values.is_some()).map(|p| &p.source);
    let matrices: serde_json::Map<_, _> =
        matrices.map(|t| (t.name.clone(), serde_json::json!({ "dtype": t.dtype, "shape": t.shape }))).collect();
    if !matrices.is_empty() {
        let block = match options.block {
            Block::Of(rows, columns) => serde_json::json!([rows, columns]),
            Block::Row => "row".into(),
        };
        let how = serde_json::json!({ "format": options.format.name(), "block": block, "matrices": matrices });
        metadata.insert("ferrotile".to_owned(), how.to_string());
    }
    metadata
}
