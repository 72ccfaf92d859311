//! A disk of ours into a foreign file.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use uuid::Uuid;

use super::copy::{Difference, each_data, each_difference};
use super::run::{fd_path, qemu_img};
use super::source::hand_over;
use super::work::WorkDir;
use super::{ConvertConfig, ExportAs, Format, Progress};
use crate::block_dev::BlockRead;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::vhdx::{NewDisk, NewParent, VhdxFile, Writer};

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
    as_: &ExportAs,
    parent: Option<(&VhdxFile, &dyn BlockRead)>,
    progress: Progress<'_>,
) -> Result<()> {
    let what = || format!("export to {}", to.display());
    if to.exists() {
        return Err(Error::new(ErrorKind::AlreadyExists, format!("{}: the file exists", what())));
    }
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", Uuid::new_v4()));
    let partial = Partial { path: to.with_file_name(name) };
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).write(true).create_new(true).mode(0o644).open(&partial.path).with_context(what)?;
    match as_.format {
        Format::Raw => write_raw(disk, &file, progress).with_context(what)?,
        Format::Vhdx => {
            write_vhdx(disk, &file, to, as_.disk_id, parent, progress).with_context(what)?;
        }
        Format::Qcow2 | Format::Vmdk => {
            let work = WorkDir::new(&config.work_dir)?;
            let raw = work.create("disk.raw")?;
            write_raw(disk, &raw, progress).with_context(what)?;
            let made = convert(config, &work, &raw, disk.size_bytes(), as_.format, progress);
            let mut made = made.with_context(what)?;
            made.rewind().with_context(what)?;
            std::io::copy(&mut made, &mut file).with_context(what)?;
            file.flush().with_context(what)?;
        }
    }
    file.sync_all().with_context(what)?;
    // Not over a file that somebody else made meanwhile.
    rustix::fs::renameat_with(CWD, &partial.path, CWD, to, RenameFlags::NOREPLACE).with_context(what)?;
    let dir = directory(to);
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(what)
}

fn directory(of: &Path) -> &Path {
    of.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The disk's data into an empty file; what reads as zeros stays a hole.
fn write_raw(disk: &dyn BlockRead, file: &File, progress: Progress<'_>) -> Result<()> {
    file.set_len(disk.size_bytes()).context("write raw file")?;
    each_data(disk, progress, &mut |offset, bytes| file.write_all_at(bytes, offset).context("write raw file"))
}

/// The disk's data, or what of it differs from `parent`, into an empty file.
fn write_vhdx(
    disk: &dyn BlockRead,
    file: &File,
    to: &Path,
    disk_id: Option<Uuid>,
    parent: Option<(&VhdxFile, &dyn BlockRead)>,
    progress: Progress<'_>,
) -> Result<()> {
    let size_bytes = disk.size_bytes();
    let disk_id = disk_id.unwrap_or_else(Uuid::new_v4);
    let Some((top, parent)) = parent else {
        let new = NewDisk { size_bytes, sector_bytes: 512, disk_id, parent: None };
        let mut writer = Writer::new(file, new)?;
        each_data(disk, progress, &mut |offset, bytes| writer.write(offset, bytes))?;
        return writer.finish();
    };
    if parent.size_bytes() != size_bytes {
        let why = format!(
            "write over {}: it is a disk of {} bytes, the new one has {size_bytes}",
            top.name(),
            parent.size_bytes()
        );
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    let sector_bytes = top.geometry().sector_bytes();
    let new = NewDisk {
        size_bytes,
        sector_bytes: sector_bytes as u32,
        disk_id: top.disk_id().unwrap_or(disk_id),
        parent: Some(NewParent {
            data_write_id: top.header().data_write_id,
            relative_path: relative(Path::new(top.name()), to)?,
        }),
    };
    let mut writer = Writer::new(file, new)?;
    each_difference(disk, parent, sector_bytes, progress, &mut |offset, difference| match difference {
        Difference::Data(bytes) => writer.write(offset, bytes),
        Difference::Zeros(length) => writer.write_zeroes(offset, length),
    })?;
    writer.finish()
}

/// How the file `to` names `parent`, whose path is resolved: from its directory on, with backslashes.
fn relative(parent: &Path, to: &Path) -> Result<String> {
    let dir = directory(to).canonicalize().with_context(|| format!("find {}", to.display()))?;
    let words = |path: &Path| -> Vec<String> {
        let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
        parts.map(|part| part.as_os_str().to_string_lossy().into_owned()).collect()
    };
    let (from, parent) = (words(&dir), words(parent));
    let same = from.iter().zip(&parent).take_while(|(a, b)| a == b).count();
    let ups = vec!["..".to_owned(); from.len() - same];
    let first = if ups.is_empty() { vec![".".to_owned()] } else { ups };
    Ok([first.as_slice(), parent.get(same..).unwrap_or_default()].concat().join("\\"))
}

/// A raw file into a new file of `format` in the work directory.
fn convert(
    config: &ConvertConfig,
    work: &WorkDir,
    raw: &File,
    size: u64,
    format: Format,
    progress: Progress<'_>,
) -> Result<File> {
    let made = work.create("disk.out")?;
    hand_over(config, raw)?;
    hand_over(config, &made)?;
    let from = format!("driver=raw,file.driver=file,file.filename={},file.locking=off", fd_path(raw));
    let to = fd_path(&made);
    // Fixed parts of the formats, and their tables: well below a hundredth of the disk.
    let bytes_max = size + size / 64 + (64 << 20);
    let args = ["convert", "--image-opts", "-O", format.as_str(), &from, &to];
    let output = qemu_img(config, &args, &[raw, &made], bytes_max, &mut || progress(size, size))?;
    if output.status.success() {
        return Ok(made);
    }
    let kind = if output.stderr.contains("No space left") { ErrorKind::NoSpace } else { ErrorKind::Io };
    Err(Error::new(kind, format!("write {format}: {}", output.complaint())))
}
