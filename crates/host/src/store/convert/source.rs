//! A disk image, open for reading.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use serde_json::Value;
use whimbrel_wire::record::layer::DISK_BYTES_MAX;

use super::inspect::Chain;
use super::run::{Output, fd_path, qemu_img};
use super::work::WorkDir;
use super::{ConvertConfig, Progress};
use crate::block_dev::{BlockRead, Extent};
use crate::error::{Context, Error, ErrorKind, Result};

/// Room that a converted file may take beyond its disk's size: none, but for rounding.
const SLACK_BYTES: u64 = 1 << 20;

/// The bytes of a disk image: a raw file, with its holes. Behind the file's end, up to the next multiple of 512, it reads
/// as zeros.
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    name: String,
    file_bytes: u64,
    /// Removed, with the file in it, when the source is dropped.
    _work: Option<WorkDir>,
}

impl Source {
    /// A raw file as it is.
    pub(super) fn open_raw(path: &Path) -> Result<Self> {
        let what = || format!("read {}", path.display());
        let file = File::open(path).with_context(what)?;
        let meta = file.metadata().with_context(what)?;
        if !meta.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{}: it is not a regular file", what())));
        }
        if meta.len() == 0 || meta.len() > DISK_BYTES_MAX {
            let why = format!("{}: a disk has 1 byte to 64 TiB, not {}", what(), meta.len());
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        Ok(Self { file, name: path.display().to_string(), file_bytes: meta.len(), _work: None })
    }

    /// The first bytes; gives how many there are.
    pub(super) fn head(&self, into: &mut [u8]) -> Result<usize> {
        self.file.read_at(into, 0).with_context(|| format!("read {}", self.name))
    }

    fn fill(&self, mut offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let inside = self.file_bytes.saturating_sub(offset).min(into.len() as u64) as usize;
        let (mut bytes, rest) = into.split_at_mut(inside);
        rest.fill(0);
        while !bytes.is_empty() {
            let done = self.file.read_at(bytes, offset)?;
            if done == 0 {
                // Somebody made the file shorter while it was read.
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            offset += done as u64;
            bytes = bytes.get_mut(done..).unwrap_or_default();
        }
        Ok(())
    }
}

impl BlockRead for Source {
    fn size_bytes(&self) -> u64 {
        self.file_bytes.next_multiple_of(512)
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let length: usize = into.iter().map(|slice| slice.len()).sum();
        if offset.checked_add(length as u64).is_none_or(|end| end > self.size_bytes()) {
            let why = format!("read {}: {length} bytes at {offset} are behind its end", self.name);
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        let mut at = offset;
        for slice in into {
            self.fill(at, slice).with_context(|| format!("read {} at {at}", self.name))?;
            at += slice.len() as u64;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let what = || format!("look for holes in {}", self.name);
        let to_end = self.size_bytes().saturating_sub(offset);
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Err(rustix::io::Errno::NXIO) => return Ok(Extent { length: to_end, data: false }),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP) => {
                return Ok(Extent { length: to_end, data: true });
            }
            data => data.with_context(what)?,
        };
        if data > offset {
            return Ok(Extent { length: (data - offset).min(to_end), data: false });
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(offset)).with_context(what)?;
        // The file's end counts as a hole; what rounds it up to a sector belongs to the data before.
        let length = if hole >= self.file_bytes { to_end } else { hole - offset };
        Ok(Extent { length, data: true })
    }
}

/// What `qemu-img info` says of the chain's first image.
fn virtual_size(config: &ConvertConfig, chain: &Chain) -> Result<u64> {
    let name = chain.name();
    let file = format!("json:{}", chain.options(0, false));
    let args = ["info", "--output=json", &file];
    let output = qemu_img(config, &args, &chain.files(), SLACK_BYTES, &mut || Ok(()))?;
    if !output.status.success() {
        return Err(cannot(&name, &output));
    }
    let info: Value = serde_json::from_str(&output.stdout).map_err(|error| {
        Error::with_source(ErrorKind::Internal, "read the output of qemu-img info", error)
    })?;
    let specific = &info["format-specific"]["data"];
    if specific["corrupt"] == Value::Bool(true) {
        return Err(damaged(&name, "it is marked as corrupt"));
    }
    let size = info["virtual-size"].as_u64().unwrap_or(0);
    if size == 0 || size > DISK_BYTES_MAX {
        let why = format!("read {name}: a disk of {size} bytes (1 to 64 TiB are possible)");
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    Ok(size)
}

/// Verifies every image of the chain: QEMU reads zeros behind the end of a file that was cut off.
fn check(config: &ConvertConfig, chain: &Chain) -> Result<()> {
    for (number, link) in chain.links.iter().enumerate() {
        let file = format!("json:{}", chain.options(number, false));
        let output = qemu_img(config, &["check", &file], &chain.files(), SLACK_BYTES, &mut || Ok(()))?;
        match output.status.code() {
            // Leaked clusters cost room, not data; raw files have nothing to check.
            Some(0 | 3 | 63) => {}
            Some(2) => return Err(damaged(&link.path.display().to_string(), &output.complaint())),
            _ => return Err(cannot(&link.path.display().to_string(), &output)),
        }
    }
    Ok(())
}

fn damaged(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("read {name}: it is cut off or damaged: {why}"))
        .hint("get the file again and compare its checksum; qemu-img check says more")
}

/// The error of a run that failed.
fn cannot(name: &str, output: &Output) -> Error {
    let complaint = output.complaint();
    let has = |word: &str| output.stderr.contains(word);
    if has("No space left") {
        return Error::new(ErrorKind::NoSpace, format!("convert {name}: {complaint}"))
            .hint("make room in the agent's work directory");
    }
    if has("log that needs to be replayed") || has("log needs to be replayed") {
        return Error::new(ErrorKind::InvalidInput, format!("read {name}: it was not closed in order"))
            .hint("qemu-img check -r all FILE replays its log");
    }
    if has("not supported") || has("unsupported") {
        return Error::new(ErrorKind::Unsupported, format!("read {name}: {complaint}"))
            .hint("make a plain file of it with the tool that wrote it");
    }
    damaged(name, &complaint)
}

/// Turns a chain into one sparse raw file.
pub(super) fn convert(config: &ConvertConfig, chain: &Chain, progress: Progress<'_>) -> Result<Source> {
    let name = chain.name();
    let size = virtual_size(config, chain)?;
    check(config, chain)?;
    let work = WorkDir::new(&config.work_dir)?;
    let file = work.create("disk.raw")?;
    file.set_len(size).with_context(|| format!("convert {name}"))?;
    hand_over(config, &file)?;
    let from = format!("json:{}", chain.options(0, true));
    let to = format!("driver=raw,file.driver=file,file.filename={},file.locking=off", fd_path(&file));
    let mut files = chain.files();
    files.push(&file);
    let args = ["convert", "-n", "--target-is-zero", "--target-image-opts", "-t", "writeback", &from, &to];
    let mut tick = || {
        let done = file.metadata().map_or(0, |meta| meta.blocks() * 512);
        progress(done.min(size), size)
    };
    let output = qemu_img(config, &args, &files, size + SLACK_BYTES, &mut tick)?;
    if !output.status.success() {
        return Err(cannot(&name, &output));
    }
    progress(size, size)?;
    Ok(Source { file, name, file_bytes: size, _work: Some(work) })
}

/// Lets the converter's user write a file of ours.
pub(super) fn hand_over(config: &ConvertConfig, file: &File) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (rustix::fs::Uid::from_raw(config.uid), rustix::fs::Gid::from_raw(config.gid));
        rustix::fs::fchown(file, Some(uid), Some(gid)).context("hand file to the converter")?;
    }
    Ok(())
}
