//! Volumes from the disk image files of others, and into such files; chains as chains.
//!
//! ```text
//!   base.vhdx ◀─ monday.vhdx ◀─ disk.vhdx     import ─▶   volume@base ◀─ volume@monday ◀─ volume
//!   disk-base.vhdx ◀─ disk-monday.vhdx ◀─ disk.vhdx   ◀─ export --chain
//! ```
//!
//! Invariants
//! * Each level reads as it did on the other side; what did not change between two of them is not written again.
//! * What fails or is cancelled leaves neither a volume nor files.
//!
//! Not here: the formats, and which names in a file may be followed (`store::convert`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use whimbrel_wire::Name;
use whimbrel_wire::api::{Export, VolumeCreate, VolumeImport, VolumeSnapshot};
use whimbrel_wire::meta::{LayerRecord, VolumeRecord};

use super::Volumes;
use super::snapshot::SnapshotWith;
use crate::block_dev::{BlockDev, BlockRead};
use crate::blocking::blocking;
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::store::convert::{
    Converter, Difference, ExportAs, Format, Level, ParentFile, Progress, each_data, each_difference,
};
use crate::task::TaskHandle;

/// Units in which two levels are compared, bytes.
const COMPARED_BYTES: u64 = 4096;

impl Volumes {
    /// Makes a volume from a disk image file. What a VHDX file lies on becomes snapshots, named after the files, unless
    /// one volume without any is asked for.
    pub async fn import(
        &self,
        request: &VolumeImport,
        convert: Arc<Converter>,
        task: &Arc<TaskHandle>,
    ) -> Result<()> {
        let file = PathBuf::from(&request.file);
        let stated = request.format.as_deref();
        let mut levels = opened(convert, file, stated, task, Converter::open_levels).await?;
        if request.flatten {
            levels.drain(..levels.len().saturating_sub(1));
        }
        let size_bytes = levels.last().map(|level| level.disk.size_bytes());
        let create = VolumeCreate { name: request.name.clone(), image: None, size_bytes, from: None };
        let mut record = self.create(&create).await?;
        task.phase("write");
        let result = async {
            let names = snapshot_names(&levels);
            let mut below: Option<Arc<dyn BlockRead>> = None;
            for (level, name) in levels.iter().zip(names) {
                if below.is_some() {
                    let snapshot = VolumeSnapshot { name: Some(name), no_quiesce: true };
                    record = self.snapshot(&request.name, &snapshot, &SnapshotWith::default()).await?;
                }
                let layer = self.open(&record).await?;
                let (task, source, under) = (Arc::clone(task), Arc::clone(&level.disk), below.take());
                let copied =
                    blocking("copy a disk", move || copy(&*source, under.as_deref(), &*layer, &task));
                copied.await?;
                below = Some(Arc::clone(&level.disk));
            }
            Ok(())
        };
        let result = result.await;
        self.close(record.disk_id);
        if result.is_err() {
            self.remove(&request.name).await?;
        }
        result
    }

    /// Writes a volume to a disk image file; with `chain` its snapshots too, each to a file of its own.
    pub async fn export(
        &self,
        record: &VolumeRecord,
        file: PathBuf,
        what: ExportAs,
        chain: bool,
        convert: Arc<Converter>,
        task: &Arc<TaskHandle>,
    ) -> Result<()> {
        let action = format!("export volume {}", record.name);
        if let Some(vm) = &record.attached_to {
            return Err(Error::new(ErrorKind::Refused, format!("{action}: vm {vm} writes it"))
                .hint("stop the VM first"));
        }
        if chain && (what.format != Format::Vhdx || what.parent.is_some()) {
            let why = format!("{action}: a chain is written as vhdx files of its own");
            return Err(Error::new(ErrorKind::InvalidInput, why).hint("--format vhdx, without --parent"));
        }
        let layer = self.open(record).await?;
        let what = ExportAs { disk_id: Some(record.disk_id.0), ..what };
        let result = if chain {
            self.export_chain(record, layer, &file, what, convert, task).await.with_context(|| action)
        } else {
            export_file(convert, layer, file, what, task).await
        };
        if !self.is_exported(&record.name) {
            self.close(record.disk_id);
        }
        result
    }

    async fn export_chain(
        &self,
        record: &VolumeRecord,
        top: Arc<dyn BlockRead>,
        file: &Path,
        what: ExportAs,
        convert: Arc<Converter>,
        task: &Arc<TaskHandle>,
    ) -> Result<()> {
        let mut levels: Vec<(PathBuf, Arc<dyn BlockRead>)> = Vec::new();
        for layer in &record.layers {
            // The chain is open, so each of its layers is, over those below it.
            let disk = self.shared.dir.sealed(layer.disk_id).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("read layer {}: it is not open", layer.disk_id))
            })?;
            levels.push((level_file(file, layer), disk));
        }
        levels.push((file.to_owned(), top));
        let (mut written, mut parent) = (Vec::<PathBuf>::new(), None);
        for (path, disk) in levels {
            let as_ = ExportAs { parent, ..what.clone() };
            let made = export_file(Arc::clone(&convert), Arc::clone(&disk), path.clone(), as_, task).await;
            if let Err(error) = made {
                for path in &written {
                    if let Err(error) = std::fs::remove_file(path) {
                        tracing::warn!(%error, path = %path.display(), "file of a chain left behind");
                    }
                }
                return Err(error);
            }
            parent = Some(ParentFile { file: path.clone(), disk: Some(disk) });
            written.push(path);
        }
        Ok(())
    }
}

/// Where a snapshot goes beside the file that its volume goes to: `disk.vhdx` ─▶ `disk-monday.vhdx`.
fn level_file(file: &Path, layer: &LayerRecord) -> PathBuf {
    let mut name = file.file_stem().unwrap_or_default().to_owned();
    let of = layer.snapshot.as_ref().map_or_else(|| layer.disk_id.to_string(), ToString::to_string);
    name.push(format!("-{of}"));
    if let Some(extension) = file.extension() {
        name.push(".");
        name.push(extension);
    }
    file.with_file_name(name)
}

/// For each level the name of the snapshot that is taken before it is written: that of the one below it.
fn snapshot_names(levels: &[Level]) -> Vec<Name> {
    let mut names: Vec<Name> = Vec::new();
    let below = std::iter::once(None).chain(levels.iter().map(Some));
    for (number, (_, below)) in levels.iter().zip(below).enumerate() {
        let wanted: String = below.map(|level| level.name.as_str()).unwrap_or_default().to_ascii_lowercase();
        let wanted: String =
            wanted.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
        let wanted = wanted.trim_matches('-').parse::<Name>().ok();
        let wanted = wanted.filter(|name| !names.contains(name));
        let numbered = || format!("level-{number}").parse::<Name>().ok();
        names.extend(wanted.or_else(numbered));
    }
    names
}

/// The stated format, or the one that the file's extension stands for; never what its content looks like.
pub fn format_of(file: &Path, stated: Option<&str>) -> Result<Format> {
    stated.map_or_else(|| Format::of_extension(file), str::parse)
}

/// What a request wants written to `file`.
pub fn export_as(file: &Path, request: &Export) -> Result<ExportAs> {
    let format = format_of(file, request.format.as_deref())?;
    let parent = request.parent.as_ref().map(|file| ParentFile { file: file.into(), disk: None });
    Ok(ExportAs { format, disk_id: None, parent })
}

/// Opens a disk image file for reading, converting it if it is neither raw nor VHDX.
pub async fn open_file(
    convert: Arc<Converter>,
    file: PathBuf,
    format: Option<&str>,
    task: &Arc<TaskHandle>,
) -> Result<Arc<dyn BlockRead>> {
    opened(convert, file, format, task, Converter::open).await
}

async fn opened<T: Send + 'static>(
    convert: Arc<Converter>,
    file: PathBuf,
    format: Option<&str>,
    task: &Arc<TaskHandle>,
    open: fn(&Converter, &Path, Option<Format>, Progress<'_>) -> Result<T>,
) -> Result<T> {
    let format = format.map(str::parse).transpose()?;
    task.phase("convert");
    let task = Arc::clone(task);
    let opened = blocking("open a disk image", move || {
        open(&convert, &file, format, &mut |done, total| step(&task, done, total))
    });
    opened.await
}

/// Writes a disk to a disk image file.
pub async fn export_file(
    convert: Arc<Converter>,
    disk: Arc<dyn BlockRead>,
    file: PathBuf,
    what: ExportAs,
    task: &Arc<TaskHandle>,
) -> Result<()> {
    task.phase("write");
    let task = Arc::clone(task);
    blocking("write a disk image", move || {
        convert.export(&*disk, &file, &what, &mut |done, total| step(&task, done, total))
    })
    .await
}

/// Reports progress; an error if somebody cancelled.
fn step(task: &TaskHandle, done: u64, total: u64) -> Result<()> {
    task.progress(done, total);
    if task.is_cancelled() {
        return Err(Error::new(ErrorKind::Cancelled, "copy a disk: cancelled"));
    }
    Ok(())
}

/// Copies what `source` holds, or what of it differs from `below`, into `target`, which reads as `below` or as zeros.
fn copy(
    source: &dyn BlockRead,
    below: Option<&dyn BlockRead>,
    target: &dyn BlockDev,
    task: &TaskHandle,
) -> Result<()> {
    let mut progress = |done, total| step(task, done, total);
    let write = |offset, bytes: &[u8]| target.write(offset, &[std::io::IoSlice::new(bytes)]);
    if let Some(below) = below {
        each_difference(source, below, COMPARED_BYTES, &mut progress, &mut |offset, difference| {
            match difference {
                Difference::Data(bytes) => write(offset, bytes),
                Difference::Zeros(length) => target.write_zeroes(offset, length),
            }
        })?;
    } else {
        each_data(source, &mut progress, &mut |offset, bytes| write(offset, bytes))?;
    }
    target.flush()
}
