//! A disk of ours into a foreign file.

use std::fs::{File, OpenOptions};
use std::io::{IoSliceMut, Seek, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use super::run::{fd_path, qemu_img};
use super::source::hand_over;
use super::work::WorkDir;
use super::{ConvertConfig, Format, Progress};
use crate::block_dev::BlockRead;
use crate::error::{Context, Error, ErrorKind, Result};

const STEP_BYTES: u64 = 1 << 20;
const ZERO_UNIT: usize = 4096;

/// A file under construction; removed if it still has this name when dropped.
struct Partial {
    path: PathBuf,
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Writes `disk` into the new file `to`. It appears under its name whole and durable, or not at all.
pub(super) fn export(
    config: &ConvertConfig,
    disk: &dyn BlockRead,
    to: &Path,
    format: Format,
    progress: Progress<'_>,
) -> Result<()> {
    let what = || format!("export to {}", to.display());
    if to.exists() {
        return Err(Error::new(ErrorKind::AlreadyExists, format!("{}: the file exists", what())));
    }
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", uuid::Uuid::new_v4()));
    let partial = Partial { path: to.with_file_name(name) };
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).write(true).create_new(true).mode(0o644).open(&partial.path).with_context(what)?;
    if format == Format::Raw {
        write_raw(disk, &file, progress).with_context(what)?;
    } else {
        let work = WorkDir::new(&config.work_dir)?;
        let raw = work.create("disk.raw")?;
        write_raw(disk, &raw, progress).with_context(what)?;
        let mut made = convert(config, &work, &raw, disk.size_bytes(), format).with_context(what)?;
        made.rewind().with_context(what)?;
        std::io::copy(&mut made, &mut file).with_context(what)?;
        file.flush().with_context(what)?;
    }
    file.sync_all().with_context(what)?;
    // Not over a file that somebody else made meanwhile.
    rustix::fs::renameat_with(CWD, &partial.path, CWD, to, RenameFlags::NOREPLACE).with_context(what)?;
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).with_context(what)
}

/// The disk's data into an empty file; what reads as zeros stays a hole.
fn write_raw(disk: &dyn BlockRead, file: &File, progress: Progress<'_>) -> Result<()> {
    let size = disk.size_bytes();
    file.set_len(size).context("write raw file")?;
    let mut buffer = vec![0; STEP_BYTES as usize];
    let mut at = 0;
    while at < size {
        let extent = disk.extent(at)?;
        let length = extent.length.min(size - at).max(1);
        if !extent.data {
            at += length;
            progress(at, size)?;
            continue;
        }
        let length = length.min(STEP_BYTES - at % STEP_BYTES);
        let bytes = buffer.get_mut(..length as usize).unwrap_or_default();
        disk.read(at, &mut [IoSliceMut::new(bytes)])?;
        let mut offset = at;
        for unit in bytes.chunks(ZERO_UNIT) {
            if unit.iter().any(|byte| *byte != 0) {
                file.write_all_at(unit, offset).context("write raw file")?;
            }
            offset += unit.len() as u64;
        }
        at += length;
        progress(at, size)?;
    }
    Ok(())
}

/// A raw file into a new file of `format` in the work directory.
fn convert(config: &ConvertConfig, work: &WorkDir, raw: &File, size: u64, format: Format) -> Result<File> {
    let made = work.create("disk.out")?;
    hand_over(config, raw)?;
    hand_over(config, &made)?;
    let from = format!("driver=raw,file.driver=file,file.filename={},file.locking=off", fd_path(raw));
    let to = fd_path(&made);
    // Fixed parts of the formats, and their tables: well below a hundredth of the disk.
    let bytes_max = size + size / 64 + (64 << 20);
    let args = ["convert", "--image-opts", "-O", format.as_str(), &from, &to];
    let output = qemu_img(config, &args, &[raw, &made], bytes_max, &mut || Ok(()))?;
    if output.status.success() {
        return Ok(made);
    }
    let kind = if output.stderr.contains("No space left") { ErrorKind::NoSpace } else { ErrorKind::Io };
    Err(Error::new(kind, format!("write {format}: {}", output.complaint())))
}
