//! The header of a safetensors file: 8 bytes of length, a JSON object of that many bytes, then the data of all tensors.
//!
//! The `safetensors` crate wants the whole file in memory (or mapped); here only the header is ever read at once.

use super::error::{Error, Result, io};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The key of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// No header is longer, says the format. Of any other file the first 8 bytes are nearly always a larger number.
const MAX_HEADER: u64 = 100_000_000;

/// Texts that belong to the whole file.
pub type Metadata = BTreeMap<String, String>;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// As the file spells it. Types that this program does not know are copied, so it is no enum.
    pub dtype: String,
    pub shape: Vec<u64>,
    /// Where its data begin, counted from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// In the order of their data.
    pub tensors: Vec<Tensor>,
    pub metadata: Metadata,
}

/// A tensor as the JSON has it.
#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    /// Begin and end, counted from the end of the header.
    data_offsets: [u64; 2],
}

impl Tensor {
    /// A tensor of one of the common types that has no place in a file yet.
    pub fn new(name: impl Into<String>, dtype: &str, shape: &[u64]) -> Self {
        let bytes = size(dtype, shape).flatten().unwrap_or(0);
        Self { name: name.into(), dtype: dtype.to_owned(), shape: shape.to_owned(), offset: 0, bytes }
    }

    /// Rows and columns, if it is a matrix.
    pub fn matrix(&self) -> Option<[u64; 2]> {
        self.shape.as_slice().try_into().ok()
    }
}

/// Bits of an element.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Bytes of a tensor: outer `None` for an unknown type, inner `None` for a size that is no whole number of bytes or too large.
fn size(dtype: &str, shape: &[u64]) -> Option<Option<u64>> {
    let bits = shape.iter().try_fold(bits(dtype)?, |product, &side| product.checked_mul(side));
    Some(bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8))
}

impl Header {
    /// Reads the header of a file of safetensors and checks it against the length of the file. Leaves the data alone.
    pub fn read(file: &mut (impl Read + Seek + ?Sized), path: &Path) -> Result<Self> {
        let wrong = |why: String| Error::NotSafetensors { path: path.to_owned(), why };
        let truncated = |expected, got| Error::Truncated { path: path.to_owned(), expected, got };

        let file_bytes = file.seek(SeekFrom::End(0)).map_err(io(path, "find its length"))?;
        file.rewind().map_err(io(path, "read it"))?;
        if file_bytes < 8 {
            return Err(wrong(format!("it has {file_bytes} bytes, and the length of the header alone takes 8")));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io(path, "read its header"))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER {
            return Err(wrong(format!("its first 8 bytes stand for a header of {length} bytes, the limit is {MAX_HEADER}")));
        }
        // What there is of the JSON tells a truncated file from one of another kind.
        let mut json = vec![0; length.min(file_bytes - 8) as usize];
        file.read_exact(&mut json).map_err(io(path, "read its header"))?;
        if length == 0 || json.first().is_some_and(|&byte| byte != b'{') {
            return Err(wrong("its header is no JSON object".to_owned()));
        }
        let data_start = 8 + length;
        if file_bytes < data_start {
            return Err(truncated(data_start, file_bytes));
        }

        let json = serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(&json);
        let mut json = json.map_err(|e| wrong(format!("its header is no valid JSON: {e}")))?;
        let metadata = match json.remove(METADATA) {
            Some(texts) => serde_json::from_value(texts).map_err(|e| wrong(format!("{METADATA} in its header: {e}")))?,
            None => Metadata::new(),
        };
        let mut tensors = Vec::with_capacity(json.len());
        for (name, entry) in json {
            let entry = serde_json::from_value::<Entry>(entry);
            let Entry { dtype, shape, data_offsets: [begin, end] } =
                entry.map_err(|e| wrong(format!("tensor `{name}` in its header: {e}")))?;
            let bytes = end.checked_sub(begin).ok_or_else(|| wrong(format!("the data of `{name}` end before they begin")))?;
            if size(&dtype, &shape).is_some_and(|expected| expected != Some(bytes)) {
                return Err(wrong(format!("`{name}` has {bytes} bytes, which is not the size of {dtype} {shape:?}")));
            }
            let offset = data_start.checked_add(begin).ok_or_else(|| wrong(format!("`{name}` begins at byte {begin}")))?;
            tensors.push(Tensor { name, dtype, shape, offset, bytes });
        }
        // Empty tensors first, so that they may share an offset with their neighbour.
        tensors.sort_by_key(|t| (t.offset, t.bytes));

        let mut end = data_start;
        for t in &tensors {
            if t.offset != end {
                let what = if t.offset < end { "overlap those of the tensor before" } else { "leave a gap before them" };
                return Err(wrong(format!("the data of `{}` {what}", t.name)));
            }
            end = end.checked_add(t.bytes).ok_or_else(|| wrong(format!("`{}` has {} bytes", t.name, t.bytes)))?;
        }
        match file_bytes {
            got if got < end => Err(truncated(end, got)),
            got if got > end => Err(wrong(format!("{} bytes follow the last tensor", got - end))),
            _ => Ok(Self { tensors, metadata }),
        }
    }

    /// Gives every tensor its place, and the bytes that the file starts with. The sizes are all known, so this comes before
    /// any data.
    ///
    /// Types with larger elements come first: then every tensor is aligned for its type, which readers that map the file rely on.
    pub fn place(mut tensors: Vec<Tensor>, metadata: Metadata) -> (Self, Vec<u8>) {
        tensors.sort_by_key(|t| std::cmp::Reverse(bits(&t.dtype)));
        let mut json = serde_json::Map::new();
        if !metadata.is_empty() {
            json.insert(METADATA.to_owned(), serde_json::json!(metadata));
        }
        let mut begin = 0;
        for t in &mut tensors {
            t.offset = begin;
            begin += t.bytes;
            let entry = Entry { dtype: t.dtype.clone(), shape: t.shape.clone(), data_offsets: [t.offset, begin] };
            json.insert(t.name.clone(), serde_json::json!(entry));
        }
        let mut text = serde_json::Value::Object(json).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');

        let data_start = 8 + text.len() as u64;
        tensors.iter_mut().for_each(|t| t.offset += data_start);
        let start = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        (Self { tensors, metadata }, start)
    }

    /// Bytes of the whole file, whose header takes `start` bytes.
    pub fn file_bytes(&self, start: u64) -> u64 {
        start + self.tensors.iter().map(|t| t.bytes).sum::<u64>()
    }
}
