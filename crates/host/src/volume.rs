//! Volumes of this host: made, opened once, exported, removed.
//!
//! ```text
//!   VolumeRecord (who may write, what is under it)  ──► open ──► Layer over Image ──► guests' disks, NBD, export
//! ```
//!
//! Invariants
//! * A layer is opened for writing once per process, at the epoch of the record whose holder is this host.
//! * A volume is in use by one VM or one socket.
//!
//! Not here: the layer (`disk`), images (`store`), moving a layer (`migrate`).

mod on_demand;
mod resize;
mod snapshot;
#[cfg(test)]
mod test_cluster;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use whimbrel_wire::api::{Export, VolumeAttach, VolumeCheck, VolumeCreate, VolumeImport};
use whimbrel_wire::meta::{ImageParent, LayerRecord, VolumeRecord, key};
use whimbrel_wire::record::layer::{Parent, SEGMENT_BLOCKS};
use whimbrel_wire::{DataId, DiskId, Epoch, HostId, Name, Object, Right};

use crate::block_dev::{BlockDev, BlockRead};
use crate::blocking::blocking;
use crate::disk::{BaseImage, Layer, LayerReceiver, LayerSpec, VolumeDir, VolumeSpec};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::nbd::{NbdOptions, NbdPlace, NbdServer};
use crate::export::{DeviceSlot, VhostUserOptions, VhostUserServer};
use crate::link::{ExportTls, Links};
use crate::meta::MetaStore;
use crate::records::{self, Change};
use crate::store::Store;
use crate::store::convert::{Converter, ExportAs, Format, each_data};
use crate::task::TaskHandle;
use crate::vm::DiskServer;
use on_demand::OnDemand;
pub use snapshot::{Claim, SnapshotWith};

/// All volumes of this host.
#[derive(Clone)]
pub struct Volumes {
    shared: Arc<Shared>,
}

struct Shared {
    host: HostId,
    dir: VolumeDir,
    run_dir: PathBuf,
    meta: Arc<dyn MetaStore>,
    store: Arc<Store>,
    open: Mutex<HashMap<DiskId, Arc<Layer>>>,
    /// One open at a time per layer.
    opening: Mutex<HashMap<DiskId, Arc<tokio::sync::Mutex<()>>>>,
    links: Links,
    on_demand: OnDemand,
    claims: snapshot::Claims,
    exports: Mutex<HashMap<Name, Exported>>,
}

/// A volume shown on a socket or a port.
struct Exported {
    place: NbdPlace,
    disk_id: DiskId,
    server: DiskServer,
}

/// What this host knows of a volume whose layer is here.
#[derive(Clone, Copy, Debug)]
pub struct VolumeFigures {
    /// What a reader sees.
    pub data_id: DataId,
    /// What the layer takes on disk.
    pub layer_bytes: u64,
}

impl Volumes {
    /// The volumes below `data_dir`; sockets go below `run_dir`.
    pub fn new(
        host: HostId,
        data_dir: &Path,
        run_dir: PathBuf,
        meta: Arc<dyn MetaStore>,
        store: Arc<Store>,
        links: Links,
    ) -> Result<Self> {
        std::fs::create_dir_all(&run_dir).with_context(|| format!("make directory {}", run_dir.display()))?;
        let dir = VolumeDir::new(data_dir)?;
        let shared = Shared {
            host,
            dir,
            run_dir,
            meta,
            store,
            open: Mutex::default(),
            opening: Mutex::default(),
            on_demand: OnDemand::new(links.clone()),
            links,
            claims: snapshot::Claims::default(),
            exports: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Where the layers are.
    pub(crate) fn dir(&self) -> &VolumeDir {
        &self.shared.dir
    }

    /// Where the records are.
    pub fn meta(&self) -> &dyn MetaStore {
        &*self.shared.meta
    }

    /// Makes a volume; this host holds it.
    pub async fn create(&self, request: &VolumeCreate) -> Result<VolumeRecord> {
        let shared = &self.shared;
        let action = || format!("create volume {}", request.name);
        if let Some(from) = &request.from {
            return self.create_from(request, from).await;
        }
        if records::get::<VolumeRecord>(&*shared.meta, &key::volume(&request.name)).await?.is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{}: there is one of that name", action()),
            ));
        }
        let image = match &request.image {
            Some(image) => Some(shared.store.resolve_versioned(image).await.with_context(action)?),
            None => None,
        };
        let named = image.clone();
        let image = image.map(|image| image.value);
        let spec = VolumeSpec {
            image: image.as_ref().map(|image| (image.id, image.size_bytes)),
            size_bytes: request.size_bytes,
            epoch: Epoch(1),
        };
        let spec = spec.layer().with_context(action)?;
        shared.dir.create(&spec).with_context(action)?;
        let image =
            image.map(|image| ImageParent { image: image.image, id: image.id, store_url: image.store_url });
        let mut change = Change::default();
        if let Some(named) = &named {
            // Without its name the image might be collected before anybody sees that this volume needs it.
            change = change.require(named);
        }
        self.add_record(&request.name, &spec, (image, Vec::new()), change, &action()).await
    }

    /// Makes the record of a volume whose layer was just made here, on this image and these layers, if `change` holds;
    /// otherwise the layer goes again.
    async fn add_record(
        &self,
        name: &Name,
        spec: &LayerSpec,
        (image, layers): (Option<ImageParent>, Vec<LayerRecord>),
        change: Change,
        action: &str,
    ) -> Result<VolumeRecord> {
        let shared = &self.shared;
        let record = VolumeRecord {
            name: name.clone(),
            disk_id: spec.disk_id,
            data_id: spec.data_id,
            size_bytes: spec.size_bytes,
            image,
            layers,
            right: Right {
                object: Object::Layer(spec.disk_id),
                holder: shared.host.clone(),
                epoch: spec.epoch,
            },
            attached_to: None,
            depends_on: None,
        };
        let change = change.create(&key::volume(name), &record)?;
        let made = change.commit_or_refuse(&*shared.meta, action).await;
        if made.is_err() {
            let _ = shared.dir.remove(spec.disk_id);
        }
        made.map(|()| record)
    }

    /// The image under a volume, open for reading.
    pub async fn open_base(&self, record: &VolumeRecord) -> Result<Option<BaseImage>> {
        match &record.image {
            Some(parent) => {
                let image = self.shared.store.open_image(parent).await?;
                Ok(Some((parent.id, image)))
            }
            None => Ok(None),
        }
    }

    /// The volume's layer, open for writing at the record's epoch; the same one for everybody who asks. What was handed
    /// out to another host is taken back: the record says that the right is ours again.
    pub async fn open(&self, record: &VolumeRecord) -> Result<Arc<Layer>> {
        let shared = &self.shared;
        if record.right.holder != shared.host {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "open volume {}: host {} holds the right to write it",
                    record.name, record.right.holder
                ),
            ));
        }
        let opening = Arc::clone(shared.opening.lock().entry(record.disk_id).or_default());
        let _one = opening.lock().await;
        shared.on_demand.stop_serving(record.disk_id);
        if let Some(layer) = self.opened(record.disk_id) {
            if layer.is_fenced() {
                layer.unfence(record.right.epoch)?;
            }
            if let Some(pull) = shared.on_demand.pull_of(record.disk_id) {
                pull.wait_again();
            }
            return Ok(layer);
        }
        let base = self.open_base(record).await?;
        if self.is_here(record.disk_id) && shared.dir.is_pulling(record.disk_id)? {
            let source = record.depends_on.as_ref().ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "open volume {}: blocks of it are elsewhere, and nothing says where",
                        record.name
                    ),
                )
            })?;
            return self.open_pull(record, base, record.right.epoch, source).await;
        }
        let (dir, id, epoch) = (shared.dir.clone(), record.disk_id, record.right.epoch);
        let size_bytes = record.size_bytes;
        let opened = blocking("open a layer", move || {
            // A resize may have been cut off after the record said so.
            dir.grow_at_rest(id, size_bytes, epoch)?;
            dir.open(id, base, epoch, true)
        })
        .await;
        let layer = opened.with_context(|| format!("open volume {}", record.name))?;
        self.keep(record.disk_id, Arc::clone(&layer));
        Ok(layer)
    }

    /// The volume's layer, if it is open.
    pub fn opened(&self, disk_id: DiskId) -> Option<Arc<Layer>> {
        self.shared.open.lock().get(&disk_id).cloned()
    }

    /// Takes in a layer that was opened elsewhere (after it arrived from another host).
    pub(crate) fn keep(&self, disk_id: DiskId, layer: Arc<Layer>) {
        self.shared.open.lock().insert(disk_id, layer);
    }

    /// Whether this host has a copy of a layer.
    pub fn is_here(&self, disk_id: DiskId) -> bool {
        self.shared.dir.path(disk_id).exists()
    }

    /// Closes the volume's layer, if it is open. One that is still being fetched stays open.
    pub fn close(&self, disk_id: DiskId) {
        match self.shared.on_demand.pull_of(disk_id) {
            Some(pull) => pull.stop_waiting(),
            None => self.shut(disk_id),
        }
    }

    /// Closes the volume's layer, whatever it is used for.
    fn shut(&self, disk_id: DiskId) {
        self.shared.on_demand.drop_pull(disk_id);
        self.shared.on_demand.stop_serving(disk_id);
        let layer = self.shared.open.lock().remove(&disk_id);
        if let Some(layer) = layer
            && let Err(error) = layer.close()
        {
            tracing::warn!(%disk_id, %error, "layer not closed cleanly; its log is replayed at the next open");
        }
    }

    /// A place for the volume's layer, which another host sends.
    pub(crate) fn receiver(&self, record: &VolumeRecord) -> Result<LayerReceiver> {
        // What an earlier attempt left does not go on where this one begins.
        let _ = self.shared.dir.remove(record.disk_id);
        self.shared.dir.receive(&spec_of(record))
    }

    /// Removes this host's copy of a layer that another host holds.
    pub(crate) fn drop_copy(&self, record: &VolumeRecord) {
        if record.right.holder == self.shared.host {
            return;
        }
        self.shut(record.disk_id);
        self.shared.opening.lock().remove(&record.disk_id);
        let removed = match self.shared.dir.path(record.disk_id).exists() {
            true => self.shared.dir.remove(record.disk_id),
            false => Ok(()),
        };
        if let Err(error) = removed.and_then(|()| self.drop_unused_layers(record)) {
            tracing::warn!(volume = %record.name, %error, "copy of a layer that moved away was not removed");
        }
    }

    /// Whether the volume is shown on a socket.
    pub fn is_exported(&self, name: &Name) -> bool {
        self.shared.exports.lock().contains_key(name)
    }

    /// Sockets that the volume is shown on.
    pub fn exports(&self, name: &Name) -> Vec<String> {
        let exports = self.shared.exports.lock();
        let show = |exported: &Exported| match &exported.place {
            NbdPlace::Unix(path) => path.to_string_lossy().into_owned(),
            NbdPlace::Tcp(address) => format!("nbds://{address}/{name}"),
        };
        exports.get(name).map(show).into_iter().collect()
    }

    /// Sockets of volumes that are shown over vhost-user-blk, and the volumes.
    pub(crate) fn vhost_user_sockets(&self) -> BTreeMap<PathBuf, Name> {
        let exports = self.shared.exports.lock();
        let over = exports.iter().filter_map(|(name, exported)| match (&exported.server, &exported.place) {
            (DiskServer::VhostUser(_), NbdPlace::Unix(path)) => Some((path.clone(), name.clone())),
            _ => None,
        });
        over.collect()
    }

    /// Takes a volume's socket out of this register, with its server at work: a VM has it from now on.
    pub(crate) fn hand_over(&self, name: &Name) -> Option<(PathBuf, DiskServer)> {
        let mut exports = self.shared.exports.lock();
        let NbdPlace::Unix(path) = exports.get(name)?.place.clone() else { return None };
        Some((path, exports.remove(name)?.server))
    }

    /// Takes back what was handed over.
    pub(crate) fn take_back(&self, record: &VolumeRecord, path: PathBuf, server: DiskServer) {
        let exported = Exported { place: NbdPlace::Unix(path), disk_id: record.disk_id, server };
        self.shared.exports.lock().insert(record.name.clone(), exported);
    }

    /// What is known of the volume's layer here.
    pub fn figures(&self, record: &VolumeRecord) -> Option<VolumeFigures> {
        let info = match self.opened(record.disk_id) {
            Some(layer) => layer.info(),
            None => {
                Layer::open(&self.shared.dir.path(record.disk_id), None, Epoch(u64::MAX), false).ok()?.info()
            }
        };
        let layer_bytes = self.shared.dir.disk_bytes(record.disk_id).unwrap_or(info.log_bytes);
        Some(VolumeFigures { data_id: info.data_id, layer_bytes })
    }

    /// Verifies all invariants of a volume that is here.
    pub async fn check(&self, record: &VolumeRecord) -> Result<VolumeCheck> {
        let (dir, id, image) =
            (self.shared.dir.clone(), record.disk_id, record.image.as_ref().map(|image| image.id));
        // Space that is freed under the check would look like damage.
        let _hold = self.opened(record.disk_id).map(|layer| layer.hold_reclaim());
        let reports = blocking("check a volume", move || dir.check(id, image)).await;
        let reports = reports.with_context(|| format!("check volume {}", record.name))?;
        let depends_on = record.depends_on.iter().map(|host| format!("depends on host {host}"));
        let notes = reports.iter().flat_map(|report| report.notes.iter().cloned());
        let mut recorded = snapshot::compare(record, &reports);
        let size_note = self.compare_size(&record.name, &reports, &mut recorded).await?;
        Ok(VolumeCheck {
            name: record.name.clone(),
            records: reports.iter().map(|report| report.records).sum(),
            notes: depends_on.chain(notes).chain(size_note).collect(),
            problems: reports
                .iter()
                .flat_map(|report| report.problems.iter().cloned())
                .chain(recorded)
                .collect(),
        })
    }

    /// Deletes a volume and its layer.
    pub async fn remove(&self, name: &Name) -> Result<()> {
        let shared = &self.shared;
        let action = format!("remove volume {name}");
        let record =
            records::must::<VolumeRecord>(&*shared.meta, &key::volume(name), &format!("volume {name}"))
                .await?;
        if let Some(vm) = &record.value.attached_to {
            return Err(Error::new(ErrorKind::Refused, format!("{action}: it is attached to vm {vm}")));
        }
        if self.is_exported(name) {
            return Err(Error::new(ErrorKind::Refused, format!("{action}: it is exported on a socket"))
                .hint(format!("`whimbrel volume detach {name}` first")));
        }
        let _claim = self.claim([name.clone()], "it is being removed")?;
        self.refuse_if_cloned(&record.value, &action).await?;
        Change::default().delete(&record).commit_or_refuse(&*shared.meta, &action).await?;
        self.shut(record.value.disk_id);
        shared.opening.lock().remove(&record.value.disk_id);
        if shared.dir.path(record.value.disk_id).exists() {
            shared.dir.remove(record.value.disk_id).with_context(|| action.clone())?;
        }
        self.drop_unused_layers(&record.value).with_context(|| action)
    }

    /// Shows a volume on a socket of this host, or on a TCP port.
    pub async fn attach(&self, record: &VolumeRecord, request: &VolumeAttach) -> Result<()> {
        let name = &record.name;
        let action = || format!("attach volume {name}");
        if let Some(vm) = &record.attached_to {
            return Err(Error::new(ErrorKind::Refused, format!("{}: vm {vm} uses it", action())));
        }
        if self.is_exported(name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{}: it is on a socket already", action()),
            ));
        }
        let over_nbd = match request.export.as_str() {
            "nbd" => true,
            "vhost-user-blk" if request.listen.is_some() || request.read_only => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{}: a port, or reading only, is to be had over nbd", action()),
                ));
            }
            "vhost-user-blk" => false,
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{}: {other:?} is neither nbd nor vhost-user-blk", action()),
                ));
            }
        };
        let address = request.listen.as_ref().map(|text| text.parse());
        let address = address.transpose().map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, format!("{}: read IP:PORT", action()), error)
        })?;
        let layer = self.open(record).await?;
        let slot = DeviceSlot::active(layer);
        let run_dir = &self.shared.run_dir;
        let (place, server) = if over_nbd {
            let options = NbdOptions {
                name: name.as_str().to_owned(),
                read_only: request.read_only,
                ..NbdOptions::default()
            };
            let server = match address {
                Some(address) => {
                    let tls = ExportTls::new(&self.shared.links)?;
                    NbdServer::start_tcp(address, tls, slot, options)?
                }
                None => NbdServer::start(&run_dir.join(format!("{name}.nbd.sock")), slot, options)?,
            };
            (server.place().clone(), DiskServer::Nbd(server))
        } else {
            let path = run_dir.join(format!("{name}.vhost.sock"));
            let server = VhostUserServer::start(&path, slot, VhostUserOptions::default())?;
            (NbdPlace::Unix(path), DiskServer::VhostUser(server))
        };
        let exported = Exported { place, disk_id: record.disk_id, server };
        self.shared.exports.lock().insert(name.clone(), exported);
        Ok(())
    }

    /// Takes a volume's socket away.
    pub async fn detach(&self, name: &Name) -> Result<()> {
        let exported = self.shared.exports.lock().remove(name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("detach volume {name}: it is on no socket of this host"))
        })?;
        let disk_id = exported.disk_id;
        let stopped = blocking("stop a disk server", move || exported.server.stop()).await;
        self.close(disk_id);
        stopped
    }

    /// Makes a volume from a disk image file.
    pub async fn import(
        &self,
        request: &VolumeImport,
        convert: Arc<Converter>,
        task: &Arc<TaskHandle>,
    ) -> Result<()> {
        let file = PathBuf::from(&request.file);
        let source = open_file(convert, file, request.format.as_deref(), task).await?;
        let create = VolumeCreate {
            name: request.name.clone(),
            image: None,
            size_bytes: Some(source.size_bytes()),
            from: None,
        };
        let record = self.create(&create).await?;
        task.phase("write");
        let result = async {
            let layer = self.open(&record).await?;
            let task = Arc::clone(task);
            blocking("copy a disk", move || copy(&*source, &*layer, &task)).await
        };
        let result = result.await;
        self.close(record.disk_id);
        if result.is_err() {
            self.remove(&request.name).await?;
        }
        result
    }

    /// Writes a volume to a disk image file.
    pub async fn export(
        &self,
        record: &VolumeRecord,
        file: PathBuf,
        what: ExportAs,
        convert: Arc<Converter>,
        task: &Arc<TaskHandle>,
    ) -> Result<()> {
        if let Some(vm) = &record.attached_to {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("export volume {}: vm {vm} writes it", record.name),
            )
            .hint("stop the VM first"));
        }
        let layer = self.open(record).await?;
        let what = ExportAs { disk_id: Some(record.disk_id.0), ..what };
        let result = export_file(convert, layer, file, what, task).await;
        if !self.is_exported(&record.name) {
            self.close(record.disk_id);
        }
        result
    }
}

/// The layer of a volume, as the record knows it.
fn spec_of(record: &VolumeRecord) -> LayerSpec {
    LayerSpec {
        disk_id: record.disk_id,
        data_id: record.data_id,
        parent: match (record.layers.last(), &record.image) {
            (Some(below), _) => Parent::Layer { disk_id: below.disk_id, data_id: below.data_id },
            (None, Some(image)) => Parent::Image(image.id),
            (None, None) => Parent::None,
        },
        size_bytes: record.size_bytes,
        epoch: record.right.epoch,
        segment_blocks: SEGMENT_BLOCKS,
    }
}

/// The stated format, or the one that the file's extension stands for; never what its content looks like.
pub fn format_of(file: &Path, stated: Option<&str>) -> Result<Format> {
    stated.map_or_else(|| Format::of_extension(file), str::parse)
}

/// What a request wants written to `file`.
pub fn export_as(file: &Path, request: &Export) -> Result<ExportAs> {
    let format = format_of(file, request.format.as_deref())?;
    Ok(ExportAs { format, disk_id: None, parent: request.parent.as_ref().map(PathBuf::from) })
}

/// Opens a disk image file for reading, converting it if it is neither raw nor VHDX.
pub async fn open_file(
    convert: Arc<Converter>,
    file: PathBuf,
    format: Option<&str>,
    task: &Arc<TaskHandle>,
) -> Result<Arc<dyn BlockRead>> {
    let format = format.map(str::parse).transpose()?;
    task.phase("convert");
    let task = Arc::clone(task);
    let opened = blocking("open a disk image", move || {
        convert.open(&file, format, &mut |done, total| step(&task, done, total))
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

/// Copies what `source` holds into `target`, which reads as zeros.
fn copy(source: &dyn BlockRead, target: &dyn BlockDev, task: &TaskHandle) -> Result<()> {
    each_data(source, &mut |done, total| step(task, done, total), &mut |offset, bytes| {
        target.write(offset, &[std::io::IoSlice::new(bytes)])
    })?;
    target.flush()
}
