//! Golden data: inputs and outputs of the published kernels. Those of 2.1.0 are in `tests/golden`, those of 1.0.0 in `shared/golden`
//! beside the repository. On a machine without the repository, `check --golden FOLDER` or the environment variable
//! `FERROTILE_GOLDEN` (one folder or several, separated as in `PATH`) says where the files are.

use super::suite::{Ctx, ensure};
use ferrotile::quant::{SfLayout, SfShape};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What a test says when there is no golden data at all.
pub const SKIPPED: &str = "golden data: skipped (no folder has any)";

/// Environment variable that names the folders.
const VARIABLE: &str = "FERROTILE_GOLDEN";

/// The release that computed a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Peer {
    /// 1.0.0; its files do not say so.
    #[default]
    #[serde(rename = "v1")]
    V1,
    /// 2.1.0.
    #[serde(rename = "v2")]
    V2,
}

impl Peer {
    /// Its version.
    pub fn version(self) -> &'static str {
        match self {
            Self::V1 => "1.0.0",
            Self::V2 => "2.1.0",
        }
    }
}

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
    /// The release that computed it.
    #[serde(skip)]
    pub peer: Peer,
    /// Which file it is in.
    #[serde(skip)]
    file: usize,
}

impl Case {
    /// An argument; an error names the case.
    pub fn param<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        T::deserialize(&self.params[name]).map_err(|e| format!("{}: parameter {name}: {e}", self.name()))
    }

    /// An argument, or its default if the call left it out.
    pub fn param_or<T: serde::de::DeserializeOwned>(&self, name: &str, default: T) -> Result<T, String> {
        if self.params.get(name).is_none_or(serde_json::Value::is_null) { Ok(default) } else { self.param(name) }
    }

    /// The layout of scale factors that the call asked for, and whether they are rounded to powers of two.
    pub fn sf_options(&self) -> Result<(SfLayout, bool), String> {
        let flag = |name| self.param_or(name, false);
        let (col_major, packed, e4m3) = (flag("use_tma_aligned_col_major_sf")?, flag("use_packed_ue8m0")?, flag("use_e4m3_sf")?);
        let layout = match (col_major, packed, e4m3) {
            (false, false, false) => SfLayout::RowMajor,
            (true, false, false) => SfLayout::ColMajor,
            (false, true, false) => SfLayout::RowMajorPacked,
            (true, true, false) => SfLayout::ColMajorPacked,
            (false, false, true) => SfLayout::RowMajorE4m3,
            (true, false, true) => SfLayout::ColMajorE4m3,
            (_, true, true) => return Err(format!("{}: scales packed and e4m3", self.name())),
        };
        Ok((layout, flag("round_sf")?))
    }

    /// Release, op, number and arguments, for error texts.
    pub fn name(&self) -> String {
        format!("golden case {} of {}'s {} {}", self.case, self.peer.version(), self.op, self.params)
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

impl Tensor<'_> {
    /// The values of a bf16 or f32 tensor.
    pub fn floats(&self) -> Result<Vec<f32>, String> {
        if self.dtype == safetensors::Dtype::BF16 {
            return Ok(self.to_vec::<half::bf16>()?.iter().map(|v| v.to_f32()).collect());
        }
        self.to_vec()
    }

    /// The words of packed scales with `columns` scales in a row. Bytes beyond the last one, which the peers leave as they find them
    /// and we write as zeros, are zero.
    pub fn packed_words(&self, columns: u64) -> Result<Vec<u32>, String> {
        let mut words = self.to_vec::<u32>()?;
        let per_row = columns.div_ceil(4);
        for (i, word) in words.iter_mut().enumerate() {
            let used = (columns - 4 * (i as u64 % per_row)).min(4);
            *word &= u32::MAX >> (32 - 8 * used);
        }
        Ok(words)
    }

    /// Scale factors have the shape and the strides that ours have. Strides of dimensions of size 1 mean nothing.
    pub fn check_place(&self, name: &str, ours: &SfShape) -> Result<(), String> {
        let strides = (0..2).all(|i| self.shape[i] == 1 || self.strides[i] == ours.strides[i]);
        ensure(self.shape == ours.shape && strides, || {
            let (theirs, ours) = ((&self.shape, &self.strides), (ours.shape, ours.strides));
            format!("sf: shape and strides are {theirs:?} there and {ours:?} here; {name}")
        })
    }
}

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Look for the files in this folder and nowhere else; before the first use of them.
pub fn set_folder(folder: &Path) -> Result<(), String> {
    FOLDER.set(folder.to_owned()).map_err(|_| "golden data: the folder has been set already".to_owned())
}

/// Where the files are, the first of these that was given: the folder set, the variable, the repository.
fn folders() -> Vec<PathBuf> {
    if let Some(folder) = FOLDER.get() {
        return vec![folder.clone()];
    }
    if let Some(list) = std::env::var_os(VARIABLE) {
        return std::env::split_paths(&list).collect();
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    vec![tests.join("../../shared/golden"), tests.join("golden")]
}

/// Run `check` on every golden case of these ops that the context chooses. Returns what a report should note.
pub fn check_cases(
    ctx: &Ctx,
    ops: &[&str],
    mut check: impl FnMut(&Golden, &Case) -> Result<(), String>,
) -> Result<Vec<String>, String> {
    let Some(golden) = Golden::open()? else { return Ok(vec![SKIPPED.to_owned()]) };
    for op in ops {
        for case in golden.cases_of(op)? {
            if ctx.case(&case.name()) {
                check(&golden, case)?;
            }
        }
    }
    Ok(golden.notes())
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
    /// All golden data that there are; prints what is absent, and returns `None` if all is. Files that are there but can't be read are
    /// an error.
    pub fn open() -> Result<Option<Self>, String> {
        let folders = folders();
        let golden = Self::open_folders(&folders)?;
        match &golden {
            None => eprintln!("{SKIPPED}: {folders:?}"),
            Some(golden) => golden.notes().iter().for_each(|note| eprintln!("{note}")),
        }
        Ok(golden)
    }

    /// The golden data of one folder; `None` if it has no `.safetensors` file.
    pub fn open_folder(folder: &Path) -> Result<Option<Self>, String> {
        Self::open_folders(&[folder.to_owned()])
    }

    fn open_folders(folders: &[PathBuf]) -> Result<Option<Self>, String> {
        let mut golden = Self { files: Vec::new(), cases: Vec::new() };
        for folder in folders {
            let entries = match std::fs::read_dir(folder) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(format!("{}: {e}", folder.display())),
            };
            let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
            paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
            paths.sort();
            for path in paths {
                golden.read(path)?;
            }
        }
        golden.cases.sort_by_key(|case| (case.peer, case.case));
        Ok(if golden.files.is_empty() { None } else { Some(golden) })
    }

    /// Releases whose data are absent, as a reader of a report should know them.
    pub fn notes(&self) -> Vec<String> {
        let absent = [Peer::V1, Peer::V2].into_iter().filter(|peer| self.cases.iter().all(|case| case.peer != *peer));
        absent.map(|peer| format!("golden data of {}: skipped (absent)", peer.version())).collect()
    }

    fn read(&mut self, path: PathBuf) -> Result<(), String> {
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let data = std::fs::read(&path).map_err(|e| failed(&e))?;
        let (header, metadata) = SafeTensors::read_metadata(&data).map_err(|e| failed(&e))?;
        let about = |key: &str| metadata.metadata().as_ref().and_then(|m| m.get(key));
        let list = about("cases").ok_or_else(|| failed(&"the header has no list of cases"))?;
        let mut cases: Vec<Case> = serde_json::from_str(list).map_err(|e| failed(&e))?;
        let peer = match about("peer").map(String::as_str) {
            None | Some("v1") => Peer::V1,
            Some("v2") => Peer::V2,
            Some(other) => return Err(failed(&format!("computed by {other:?}, which is no release known here"))),
        };
        for case in &mut cases {
            (case.peer, case.file) = (peer, self.files.len());
        }
        self.cases.extend(cases);
        // The header is preceded by its length in 8 bytes.
        self.files.push(File { path, data, start: 8 + header, metadata });
        Ok(())
    }

    /// All cases, by release and number.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// The cases of an op. None is an error where the data of all releases are there, so that a mistyped name does not pass as covered.
    pub fn cases_of(&self, op: &str) -> Result<Vec<&Case>, String> {
        let cases: Vec<&Case> = self.cases.iter().filter(|case| case.op == op).collect();
        if cases.is_empty() && self.notes().is_empty() { Err(format!("golden data: no case of {op}")) } else { Ok(cases) }
    }

    /// The cases of an op that one release computed, if its data are there.
    pub fn cases_of_peer(&self, op: &str, peer: Peer) -> Result<Vec<&Case>, String> {
        Ok(self.cases_of(op)?.into_iter().filter(|case| case.peer == peer).collect())
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
        assert_eq!((case.peer, case.param_or("npt", 5u64)), (Peer::V1, Ok(5)));
        assert_eq!(case.sf_options(), Ok((SfLayout::RowMajor, false)));
        // Whether the other release has such an op is not known here.
        assert!(golden.cases_of("cats").unwrap().is_empty());
        assert_eq!(golden.notes(), ["golden data of 2.1.0: skipped (absent)"]);
    }

    #[test]
    fn the_releases_are_told_apart() {
        let header = |peer: &str| {
            let cases = r#"[{\"case\": 7, \"op\": \"cast\", \"params\": {\"round_sf\": true, \"use_packed_ue8m0\": true}, \"strides\": {}}]"#;
            format!(
                r#"{{"__metadata__":{{"cases":"{cases}"{peer}}},"7/in/x":{{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}}}"#
            )
        };
        let (old, new) = (Folder::new("old"), Folder::new("new"));
        std::fs::write(old.0.join("a.safetensors"), file(&header(""), &[1])).unwrap();
        std::fs::write(new.0.join("a.safetensors"), file(&header(r#","peer":"v2""#), &[2])).unwrap();
        // Whatever the order of the folders.
        let golden = Golden::open_folders(&[new.0.clone(), old.0.clone()]).unwrap().unwrap();
        let of = |peer| {
            let [case] = golden.cases_of_peer("cast", peer).unwrap()[..] else { panic!("one case") };
            assert_eq!(case.sf_options(), Ok((SfLayout::RowMajorPacked, true)));
            (case.name().split(' ').nth(4).unwrap().to_owned(), golden.tensor(case, "in/x").unwrap().bytes[0])
        };
        assert_eq!((of(Peer::V1), of(Peer::V2)), (("1.0.0's".to_owned(), 1), ("2.1.0's".to_owned(), 2)));
        assert_eq!(golden.cases().iter().map(|case| case.peer).collect::<Vec<_>>(), [Peer::V1, Peer::V2]);
        assert!(golden.notes().is_empty() && golden.cases_of("cats").is_err());
        std::fs::write(new.0.join("b.safetensors"), file(&header(r#","peer":"v3""#), &[2])).unwrap();
        assert!(Golden::open_folders(std::slice::from_ref(&new.0)).is_err());
    }

    #[test]
    fn unused_bytes_of_packed_scales_are_cleared() {
        let bytes = [0xFF; 16];
        let tensor = Tensor { dtype: Dtype::I32, shape: vec![2, 2], strides: vec![2, 1], bytes: &bytes };
        assert_eq!(tensor.packed_words(5).unwrap(), [u32::MAX, 0xFF, u32::MAX, 0xFF]);
        assert_eq!(tensor.packed_words(8).unwrap(), [u32::MAX; 4]);
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
        let count = |peer| golden.cases().iter().filter(|case| case.peer == peer).count();
        // Those of 2.1.0 are in the repository.
        assert_eq!(count(Peer::V2), 112);
        assert!([0, 90].contains(&count(Peer::V1)));
        for case in golden.cases() {
            let keys = golden.keys(case);
            // 2.1.0 returns nothing where it works in place, and nothing was recorded there.
            let in_place = case.op == "per_token_cast_and_cast_back";
            let outputs = in_place || keys.iter().any(|k| k.starts_with("out/") || k == "out");
            assert!(outputs && keys.iter().any(|k| k.starts_with("in/")), "{}: {keys:?}", case.name());
            for key in keys {
                let tensor = golden.tensor(case, &key).unwrap();
                assert_eq!(tensor.shape.len(), tensor.strides.len(), "{} {key}", case.name());
                assert_eq!(tensor.to_vec::<u8>().is_ok(), tensor.bytes.len() as u64 == tensor.shape.iter().product::<u64>());
            }
        }
        assert_eq!(golden.cases_of_peer("per_token_cast", Peer::V2).unwrap().len(), 29);
        // The first input of the casts has a row of zeros and one huge value, as its description says.
        let case = golden.cases_of("per_token_cast").unwrap()[0];
        let x: Vec<f32> = golden.tensor(case, "in/x").unwrap().to_vec::<bf16>().unwrap().iter().map(|v| v.to_f32()).collect();
        assert_eq!(x.len(), 37 * 384);
        assert!(x.chunks(384).any(|row| row.iter().all(|v| *v == 0.0)));
    }
}
