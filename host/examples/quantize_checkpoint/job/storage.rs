//! Writing a file so that it is there completely or not at all.

use super::error::{Error, Result, io};
use std::fs::{self, File, OpenOptions};
use std::io::{self as std_io, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What the output is written to. Tests put a full disk here.
pub trait Storage: Read + Write + Seek {
    /// Waits until everything is on the disk, so that a late "no space" is not lost.
    fn sync(&mut self) -> std_io::Result<()>;
}

impl Storage for File {
    fn sync(&mut self) -> std_io::Result<()> {
        self.sync_all()
    }
}

/// Opens the storage for a new file of this name.
pub type Create = dyn Fn(&Path) -> std_io::Result<Box<dyn Storage>>;

/// A real file.
pub fn on_disk(path: &Path) -> std_io::Result<Box<dyn Storage>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    Ok(Box::new(file))
}

/// A file that gets its name once it is complete; until then it has another one, and dropping it removes it.
pub struct NewFile {
    storage: Box<dyn Storage>,
    partial: PathBuf,
    path: PathBuf,
    /// Size of the complete file, for the text about a full disk.
    bytes: u64,
}

impl NewFile {
    /// Starts a file that will be called `path` and have `bytes` bytes. The unfinished file lies in the same folder, because
    /// only there can it be renamed.
    pub fn create(path: &Path, bytes: u64, create: &Create) -> Result<Self> {
        let name = path.file_name().filter(|_| !path.is_dir());
        let name = name.ok_or(ErrorKind::IsADirectory.into()).map_err(io(path, "write a file of this name"))?;
        let partial = path.with_file_name(format!(".{}.{}.partial", name.display(), std::process::id()));
        let storage = create(&partial).map_err(|e| failed(path, bytes, "create it", e))?;
        Ok(Self { storage, partial, path: path.to_owned(), bytes })
    }

    /// Writes `data` at a place of the file.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let result = self.storage.seek(SeekFrom::Start(offset)).and_then(|_| self.storage.write_all(data));
        result.map_err(|e| failed(&self.path, self.bytes, "write it", e))
    }

    /// Makes sure that all of it is on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.storage.sync().map_err(|e| failed(&self.path, self.bytes, "write it", e))
    }

    /// What was written so far.
    pub fn storage(&mut self) -> &mut dyn Storage {
        &mut *self.storage
    }

    /// Gives the file its name. Another file of that name is replaced in the same moment.
    pub fn finish(self) -> Result<()> {
        // When this went well, dropping `self` finds nothing to remove.
        fs::rename(&self.partial, &self.path).map_err(|e| failed(&self.path, self.bytes, "give it its name", e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // An error has nowhere to go, and the error that led here matters more.
        let _ = fs::remove_file(&self.partial);
    }
}

/// The error of writing a file that needs `bytes` bytes.
fn failed(path: &Path, bytes: u64, action: &'static str, source: std_io::Error) -> Error {
    let full = matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge);
    let path = path.to_owned();
    if full { Error::NoSpace { path, bytes } } else { Error::Io { path, action, source } }
}

/// Reads exactly `bytes` bytes at a place of a file.
pub fn read_at(file: &mut (impl Read + Seek + ?Sized), path: &Path, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut data = vec![0; bytes as usize];
    let result = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut data));
    result.map_err(io(path, "read it"))?;
    Ok(data)
}
