//! The files of a layer's directory: whole writes, whole reads, durability in one place.
//!
//! Everything a layer changes on disk goes through here, so that the crash tests can record each write and each
//! durability edge, and make them fail.
//!
//! Not here: what the bytes mean (`wire::record::layer`).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::error::{Context, ErrorKind, Result};

#[cfg(test)]
pub(super) mod record;

/// Ends the name of a directory that is not whole yet.
pub(super) const PARTIAL: &str = "partial";
/// Slices that the kernel takes in one call.
const SLICES_MAX: usize = 1024;

/// A layer's directory.
#[derive(Clone, Debug)]
pub(super) struct Dir {
    path: PathBuf,
    #[cfg(test)]
    recorder: Option<std::sync::Arc<record::Recorder>>,
}

/// A file in it.
#[derive(Debug)]
pub(super) struct DataFile {
    file: File,
    /// Set by the first failed sync. The kernel tells an error to one caller only, and then forgets the pages.
    sync_failed: parking_lot::Mutex<bool>,
    #[cfg(test)]
    name: String,
    #[cfg(test)]
    recorder: Option<std::sync::Arc<record::Recorder>>,
}

impl Dir {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            #[cfg(test)]
            recorder: None,
        }
    }

    #[cfg(test)]
    pub(super) fn recorded(path: &Path, recorder: std::sync::Arc<record::Recorder>) -> Self {
        Self { path: path.to_owned(), recorder: Some(recorder) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory itself, durably, with what `fill` puts into it: whole, or not at all.
    pub(super) fn make(&self, fill: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let what = || format!("make directory {}", self.path.display());
        if self.path.exists() {
            return Err(crate::Error::new(ErrorKind::AlreadyExists, format!("{}: it exists", what())));
        }
        let mut partial = self.clone();
        partial.path = self.path.with_extension(PARTIAL);
        if partial.path.exists() {
            std::fs::remove_dir_all(&partial.path).with_context(what)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(&partial.path).with_context(what)?;
        let filled = fill(&partial).and_then(|()| partial.sync()).and_then(|()| {
            rustix::fs::renameat_with(CWD, &partial.path, CWD, &self.path, RenameFlags::NOREPLACE)
                .with_context(what)
        });
        filled.inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&partial.path);
        })?;
        self.path.parent().map_or(Ok(()), sync_dir)
    }

    /// A new, empty file; what had the name before is gone.
    pub(super) fn create(&self, name: &str) -> io::Result<DataFile> {
        #[cfg(test)]
        record::before_write(self.recorder.as_deref(), 1)?;
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(true).mode(0o600).open(self.at(name))?;
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::Create(name.to_owned()));
        Ok(self.data_file(file, name))
    }

    pub(super) fn open(&self, name: &str, writable: bool) -> io::Result<DataFile> {
        let file = OpenOptions::new().read(true).write(writable).open(self.at(name))?;
        Ok(self.data_file(file, name))
    }

    pub(super) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        std::fs::read(self.at(name))
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.at(name))?;
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::Remove(name.to_owned()));
        Ok(())
    }

    /// Whether the file exists.
    pub(super) fn has(&self, name: &str) -> bool {
        self.at(name).exists()
    }

    /// Names of all files.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// Makes creations and removals durable.
    pub(super) fn sync(&self) -> Result<()> {
        sync_dir(&self.path)?;
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::SyncDir);
        Ok(())
    }

    /// Takes the lock that a writable handle holds; the file's closing gives it back.
    pub(super) fn lock(&self) -> Result<File> {
        let what = || format!("lock layer {}", self.path.display());
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(self.at("lock"));
        let file = file.with_context(what)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(crate::Error::new(
                ErrorKind::Refused,
                format!("{}: it is open for writing already", what()),
            )),
            Err(error) => Err(error).with_context(what),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn data_file(&self, file: File, name: &str) -> DataFile {
        let _ = name;
        DataFile {
            file,
            sync_failed: parking_lot::Mutex::new(false),
            #[cfg(test)]
            name: name.to_owned(),
            #[cfg(test)]
            recorder: self.recorder.clone(),
        }
    }
}

/// Makes a directory's entries durable.
pub(super) fn sync_dir(path: &Path) -> Result<()> {
    let what = || format!("sync directory {}", path.display());
    File::open(path).and_then(|dir| dir.sync_all()).with_context(what)
}

impl DataFile {
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Bytes that the file takes on disk.
    pub(super) fn disk_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Gives the space of a range back; it reads as zeros. The file keeps its length.
    pub(super) fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, length)?;
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::Write {
            name: self.name.clone(),
            offset,
            bytes: vec![0; usize::try_from(length).unwrap_or(0)],
        });
        Ok(())
    }

    /// Writes all of `from` at `offset`. After an error an unknown part of it is written.
    pub(super) fn write(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        let length: usize = from.iter().map(|slice| slice.len()).sum();
        #[cfg(test)]
        record::before_write(self.recorder.as_deref(), (offset + length as u64).saturating_sub(self.len()?))?;
        let first = from.get(..SLICES_MAX).unwrap_or(from);
        let mut done = retry(|| rustix::io::pwritev(&self.file, first, offset))?;
        // A short write: a full disk, or a signal. Go on slice by slice, which then tells why.
        if done < length {
            let mut skip = done;
            for slice in from {
                let rest = slice.get(skip.min(slice.len())..).unwrap_or_default();
                skip = skip.saturating_sub(slice.len());
                self.file.write_all_at(rest, offset + done as u64)?;
                done += rest.len();
            }
        }
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::Write {
            name: self.name.clone(),
            offset,
            bytes: from.iter().flat_map(|slice| slice.iter().copied()).collect(),
        });
        Ok(())
    }

    /// Fills all of `into` from `offset` on.
    pub(super) fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let length: usize = into.iter().map(|slice| slice.len()).sum();
        let slices = into.len().min(SLICES_MAX);
        let mut done = retry(|| {
            let first = into.get_mut(..slices).unwrap_or_default();
            rustix::io::preadv(&self.file, first, offset)
        })?;
        if done < length {
            let mut skip = done;
            for slice in into {
                let from = skip.min(slice.len());
                skip -= from;
                let rest = slice.get_mut(from..).unwrap_or_default();
                self.file.read_exact_at(rest, offset + done as u64)?;
                done += rest.len();
            }
        }
        Ok(())
    }

    /// Fills `into`, or as much of it as the file has; gives the length read.
    pub(super) fn read_some(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Returns once everything written is durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        let mut failed = self.sync_failed.lock();
        if *failed {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        *failed = true;
        #[cfg(test)]
        record::before_sync(self.recorder.as_deref())?;
        self.file.sync_data()?;
        *failed = false;
        #[cfg(test)]
        record::note(self.recorder.as_deref(), || record::Op::Sync(self.name.clone()));
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
