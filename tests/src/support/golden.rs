//! Golden data: inputs and outputs of the published kernels, in `shared/golden` beside the repository.

use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What a test says when there is no golden data.
pub const SKIPPED: &str = "golden data: skipped (../shared is absent)";

/// One recorded call.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Number of the case; keys of its tensors start with it.
    pub case: u64,
    /// Name of the op, or of several that were recorded together.
    pub op: String,
    /// Arguments of the call.
    pub params: serde_json::Value,
    /// Strides of the tensors that were not contiguous, by key. Their data here are contiguous all the same.
    pub strides: HashMap<String, Vec<u64>>,
    /// Which file it is in.
    #[serde(skip)]
    file: usize,
}

impl Case {
    /// An argument; an error names the case.
    pub fn param<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        T::deserialize(&self.params[name]).map_err(|e| format!("{}: parameter {name}: {e}", self.name()))
    }

    /// Op, number and arguments, for error texts.
    pub fn name(&self) -> String {
        format!("golden case {} of {} {}", self.case, self.op, self.params)
    }
}

/// A recorded tensor.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Element type. FP4 data are `I8` with two values a byte.
    pub dtype: Dtype,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Strides in elements that the original had.
    pub strides: Vec<u64>,
    /// The elements, contiguous in logical order, little-endian.
    pub bytes: &'a [u8],
}

impl Tensor<'_> {
    /// The elements as a type of the same size.
    pub fn to_vec<T: bytemuck::Pod>(&self) -> Result<Vec<T>, String> {
        let numel = self.shape.iter().product::<u64>() as usize;
        if numel * size_of::<T>() != self.bytes.len() {
            return Err(format!("golden tensor of {:?} read as elements of {} bytes", self.dtype, size_of::<T>()));
        }
        // The file's bytes are not aligned for `T`.
        Ok(self.bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
    }
}

/// The golden files, read.
pub struct Golden {
    files: Vec<File>,
    cases: Vec<Case>,
}

struct File {
    path: PathBuf,
    data: Vec<u8>,
    /// Where the tensors' bytes start.
    start: usize,
    metadata: Metadata,
}

impl Golden {
    /// The golden data beside the repository; prints [`SKIPPED`] and returns `None` when they are not there. Files that are there but
    /// can't be read are an error.
    pub fn open() -> Result<Option<Self>, String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
        let golden = Self::open_folder(&folder)?;
        if golden.is_none() {
            eprintln!("{SKIPPED}");
        }
        Ok(golden)
    }

    /// The golden data of a folder; `None` if the folder has no `.safetensors` file.
    pub fn open_folder(folder: &Path) -> Result<Option<Self>, String> {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(format!("{}: {e}", folder.display())),
        };
        let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        let mut golden = Self { files: Vec::new(), cases: Vec::new() };
        for path in paths {
            golden.read(path)?;
        }
        golden.cases.sort_by_key(|case| case.case);
        Ok(if golden.files.is_empty() { None } else { Some(golden) })
    }

    fn read(&mut self, path: PathBuf) -> Result<(), String> {
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let data = std::fs::read(&path).map_err(|e| failed(&e))?;
        let (header, metadata) = SafeTensors::read_metadata(&data).map_err(|e| failed(&e))?;
        let list = metadata
            .metadata()
            .as_ref()
            .and_then(|m| m.get("cases"))
            .ok_or_else(|| failed(&"the header has no list of cases"))?;
        let mut cases: Vec<Case> = serde_json::from_str(list).map_err(|e| failed(&e))?;
        cases.iter_mut().for_each(|case| case.file = self.files.len());
        self.cases.extend(cases);
        // The header is preceded by its length in 8 bytes.
        self.files.push(File { path, data, start: 8 + header, metadata });
        Ok(())
    }

    /// All cases, by number.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// The cases of an op; an error if there are none, so that a mistyped name does not pass as covered.
    pub fn cases_of(&self, op: &str) -> Result<Vec<&Case>, String> {
        let cases: Vec<&Case> = self.cases.iter().filter(|case| case.op == op).collect();
        if cases.is_empty() { Err(format!("golden data: no case of {op}")) } else { Ok(cases) }
    }

    /// Keys of a case's tensors without the number: `in/x`, `out/0`; `out/` if the call returned a single tensor.
    pub fn keys(&self, case: &Case) -> Vec<String> {
        let prefix = format!("{}/", case.case);
        let file = &self.files[case.file];
        let mut keys: Vec<String> =
            file.metadata.tensors().keys().filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned())).collect();
        keys.sort();
        keys
    }

    /// A tensor of a case by its key without the number.
    pub fn tensor(&self, case: &Case, key: &str) -> Result<Tensor<'_>, String> {
        let file = &self.files[case.file];
        let full = format!("{}/{key}", case.case);
        let info = file
            .metadata
            .info(&full)
            .ok_or_else(|| format!("{} has no tensor {key}, but {:?} ({})", case.name(), self.keys(case), file.path.display()))?;
        let shape: Vec<u64> = info.shape.iter().map(|n| *n as u64).collect();
        let strides = case.strides.get(&full).cloned().unwrap_or_else(|| contiguous(&shape));
        // `read_metadata` has checked that the offsets lie in the file.
        let bytes = &file.data[file.start + info.data_offsets.0..file.start + info.data_offsets.1];
        Ok(Tensor { dtype: info.dtype, shape, strides, bytes })
    }
}

fn contiguous(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// A file with one case in memory, the way the format lays it out.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    /// A folder of this test run's own, removed at the end.
    struct Folder(PathBuf);
    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ferrotile-golden-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn reads_narrow_types_strides_and_parameters() {
        let header = r#"{"__metadata__":{"cases":"[{\"case\": 7, \"op\": \"cast\", \"params\": {\"npc\": 32}, \"strides\": {\"7/in/x\": [1, 4]}}]"},
            "7/in/x":{"dtype":"F8_E4M3","shape":[3,2],"data_offsets":[0,6]},"7/out/":{"dtype":"I8","shape":[2],"data_offsets":[6,8]}}"#;
        let folder = Folder::new("narrow");
        std::fs::write(folder.0.join("a.safetensors"), file(header, &[1, 2, 3, 4, 5, 6, 0xFF, 8])).unwrap();
        let golden = Golden::open_folder(&folder.0).unwrap().unwrap();
        let case = golden.cases_of("cast").unwrap()[0];
        assert_eq!(case.param::<u64>("npc"), Ok(32));
        assert!(case.param::<u64>("npt").unwrap_err().contains("parameter npt"));
        assert_eq!(golden.keys(case), ["in/x", "out/"]);
        let x = golden.tensor(case, "in/x").unwrap();
        assert_eq!((x.dtype, &x.shape[..], &x.strides[..]), (Dtype::F8_E4M3, &[3, 2][..], &[1, 4][..]));
        assert_eq!(x.to_vec::<u8>().unwrap(), [1, 2, 3, 4, 5, 6]);
        assert!(x.to_vec::<u16>().is_err());
        assert_eq!(golden.tensor(case, "out/").unwrap().to_vec::<i8>().unwrap(), [-1, 8]);
        assert!(golden.tensor(case, "out/0").unwrap_err().contains("has no tensor out/0"));
        assert!(golden.cases_of("cats").is_err());
    }

    #[test]
    fn absent_is_none_and_damaged_is_an_error() {
        let folder = Folder::new("damaged");
        assert!(Golden::open_folder(&folder.0.join("nothing")).unwrap().is_none());
        assert!(Golden::open_folder(&folder.0).unwrap().is_none());
        std::fs::write(folder.0.join("a.safetensors"), b"short").unwrap();
        assert!(Golden::open_folder(&folder.0).is_err());
        // The data end before the offset that the header names.
        let header = r#"{"__metadata__":{"cases":"[]"},"0/in/x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        std::fs::write(folder.0.join("a.safetensors"), file(header, &[0; 4])).unwrap();
        assert!(Golden::open_folder(&folder.0).is_err());
    }

    #[test]
    fn the_recorded_files_are_complete() {
        let Some(golden) = Golden::open().unwrap() else { return };
        assert_eq!(golden.cases().len(), 90);
        for case in golden.cases() {
            let keys = golden.keys(case);
            assert!(
                keys.iter().any(|k| k.starts_with("in/")) && keys.iter().any(|k| k.starts_with("out/") || k == "out"),
                "{keys:?}"
            );
            for key in keys {
                let tensor = golden.tensor(case, &key).unwrap();
                assert_eq!(tensor.shape.len(), tensor.strides.len(), "{} {key}", case.name());
                assert_eq!(tensor.to_vec::<u8>().is_ok(), tensor.bytes.len() as u64 == tensor.shape.iter().product::<u64>());
            }
        }
        assert_eq!(golden.cases_of("per_token_cast").unwrap().len(), 24);
        // The first input of the casts has a row of zeros and one huge value, as its description says.
        let case = golden.cases_of("per_token_cast").unwrap()[0];
        let x: Vec<f32> = golden.tensor(case, "in/x").unwrap().to_vec::<bf16>().unwrap().iter().map(|v| v.to_f32()).collect();
        assert_eq!(x.len(), 37 * 384);
        assert!(x.chunks(384).any(|row| row.iter().all(|v| *v == 0.0)));
    }
}
