//! Volumes of this host: made, opened once, exported, removed.
//!
//! ```text
//!   VolumeRecord (who may write, what is under it)  ──► open ──► Layer over Image ──► guests' disks, NBD, files, export
//! ```
//!
//! Invariants
//! * A layer is opened for writing once per process, at the epoch of the record whose holder is this host.
//! * A volume is in use by one VM, one socket or one file.
//!
//! Not here: the layer (`disk`), images (`store`), moving a layer (`migrate`), disks of other systems (`files`).

mod files;
mod on_demand;
mod resize;
mod snapshot;
mod space;
#[cfg(test)]
mod test_cluster;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use whimbrel_engine::memory::reference::holds_enough;
use whimbrel_wire::api::{VolumeAttach, VolumeCheck, VolumeCreate};
use whimbrel_wire::meta::{ImageParent, IoLimits, LayerRecord, VolumeRecord, key};
use whimbrel_wire::record::layer::{Parent, SEGMENT_BLOCKS};
use whimbrel_wire::{DataId, DiskId, Epoch, HostId, Name, Object, Right};

use crate::block_dev::BlockRead;
use crate::blocking::blocking;
use crate::disk::{BaseImage, Layer, LayerReceiver, LayerSpec, VolumeDir, VolumeSpec};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::fuse::{FileDir, FileExport, FileOptions};
use crate::export::nbd::{NbdOptions, NbdPlace, NbdServer};
use crate::export::{DeviceSlot, SizeNotice, VhostUserOptions, VhostUserServer};
use crate::link::{ExportTls, Links};
use crate::meta::MetaStore;
use crate::records::{self, Change};
use crate::store::Store;
use crate::vm::DiskServer;
pub use files::{export_as, export_file, format_of, open_file};
use on_demand::OnDemand;
pub use snapshot::{Claim, SnapshotWith};
pub use space::SpaceWatch;
pub(crate) use space::space_of;

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
    /// Where volumes are shown as files.
    files: Arc<FileDir>,
}

/// A volume shown to programs.
struct Exported {
    disk_id: DiskId,
    server: Server,
}

/// What shows it.
enum Server {
    /// On a socket or a port.
    Disk { place: NbdPlace, server: DiskServer },
    /// As a file.
    File(FileExport),
}

impl Server {
    fn slot(&self) -> &DeviceSlot {
        match self {
            Self::Disk { server, .. } => server.slot(),
            Self::File(file) => file.slot(),
        }
    }

    /// A file needs none: whoever looks is told.
    fn size_notice(&self) -> Option<SizeNotice> {
        match self {
            Self::Disk { server, .. } => server.size_notice(),
            Self::File(_) => None,
        }
    }

    fn stop(self) -> Result<()> {
        match self {
            Self::Disk { server, .. } => server.stop(),
            Self::File(file) => file.stop(),
        }
    }
}

/// How long a request of a client that was cut off may go on.
const LAST_REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// What this host knows of a volume whose layer is here.
#[derive(Clone, Copy, Debug)]
pub struct VolumeFigures {
    /// What a reader sees.
    pub data_id: DataId,
    /// What the layer takes on disk.
    pub layer_bytes: u64,
}

impl Volumes {
    /// The volumes below `data_dir`; sockets go below `run_dir`, files into its directory `files`, from which what an
    /// agent that was killed left is taken away.
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
        let files = FileDir::new(run_dir.join("files"))?;
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
            files,
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
            limits: IoLimits::default(),
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

    /// The image under a volume, if this host has enough of it for looking pages of memory up in it.
    pub(crate) async fn image_here(&self, record: &VolumeRecord) -> Result<Option<Arc<dyn BlockRead>>> {
        let Some(parent) = &record.image else { return Ok(None) };
        let image = self.shared.store.open_image(parent).await?;
        let enough = holds_enough(image.cached_bytes(), image.stored_bytes());
        Ok(enough.then_some(image as Arc<dyn BlockRead>))
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

    /// Whether the volume is shown to programs.
    pub fn is_exported(&self, name: &Name) -> bool {
        self.shared.exports.lock().contains_key(name)
    }

    /// Sockets, ports and files that the volume is shown on.
    pub fn exports(&self, name: &Name) -> Vec<String> {
        let exports = self.shared.exports.lock();
        let show = |exported: &Exported| match &exported.server {
            Server::Disk { place: NbdPlace::Unix(path), .. } => path.to_string_lossy().into_owned(),
            Server::Disk { place: NbdPlace::Tcp(address), .. } => format!("nbds://{address}/{name}"),
            Server::File(file) => file.path().to_string_lossy().into_owned(),
        };
        exports.get(name).map(show).into_iter().collect()
    }

    /// Sockets of volumes that are shown over vhost-user-blk, and the volumes.
    pub(crate) fn vhost_user_sockets(&self) -> BTreeMap<PathBuf, Name> {
        let exports = self.shared.exports.lock();
        let over = exports.iter().filter_map(|(name, exported)| match &exported.server {
            Server::Disk { place: NbdPlace::Unix(path), server: DiskServer::VhostUser(_) } => {
                Some((path.clone(), name.clone()))
            }
            _ => None,
        });
        over.collect()
    }

    /// Takes a volume's socket out of this register, with its server at work: a VM has it from now on.
    pub(crate) fn hand_over(&self, name: &Name) -> Option<(PathBuf, DiskServer)> {
        let mut exports = self.shared.exports.lock();
        let Exported { disk_id, server } = exports.remove(name)?;
        match server {
            Server::Disk { place: NbdPlace::Unix(path), server } => Some((path, server)),
            server => {
                exports.insert(name.clone(), Exported { disk_id, server });
                None
            }
        }
    }

    /// Takes back what was handed over.
    pub(crate) fn take_back(&self, record: &VolumeRecord, path: PathBuf, server: DiskServer) {
        let server = Server::Disk { place: NbdPlace::Unix(path), server };
        let exported = Exported { disk_id: record.disk_id, server };
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
            return Err(Error::new(ErrorKind::Refused, format!("{action}: it is shown to programs"))
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

    /// Shows a volume on a socket of this host, on a TCP port, or as a file.
    pub async fn attach(&self, record: &VolumeRecord, request: &VolumeAttach) -> Result<()> {
        let name = &record.name;
        let action = || format!("attach volume {name}");
        let invalid = |why: &str| Err(Error::new(ErrorKind::InvalidInput, format!("{}: {why}", action())));
        if let Some(vm) = &record.attached_to {
            return Err(Error::new(ErrorKind::Refused, format!("{}: vm {vm} uses it", action())));
        }
        if self.is_exported(name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("{}: it is shown to programs already", action()),
            ));
        }
        match request.export.as_str() {
            "nbd" => {}
            "vhost-user-blk" if request.listen.is_some() || request.read_only => {
                return invalid("a port, or reading only, is to be had over nbd");
            }
            "fuse" if request.listen.is_some() => return invalid("a port is to be had over nbd"),
            "vhost-user-blk" | "fuse" => {}
            other => return invalid(&format!("{other:?} is neither nbd nor vhost-user-blk nor fuse")),
        }
        let address = request.listen.as_ref().map(|text| text.parse());
        let address = address.transpose().map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, format!("{}: read IP:PORT", action()), error)
        })?;
        let slot = DeviceSlot::active(self.open(record).await?);
        slot.limit(record.limits);
        let run_dir = &self.shared.run_dir;
        let server = match request.export.as_str() {
            "fuse" => {
                let options = FileOptions {
                    name: name.as_str().to_owned(),
                    read_only: request.read_only,
                    ..FileOptions::default()
                };
                let files = Arc::clone(&self.shared.files);
                let file =
                    blocking("show a volume as a file", move || FileExport::start(&files, slot, options));
                Server::File(file.await?)
            }
            "nbd" => {
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
                Server::Disk { place: server.place().clone(), server: DiskServer::Nbd(server) }
            }
            _ => {
                let path = run_dir.join(format!("{name}.vhost.sock"));
                let server = VhostUserServer::start(&path, slot, VhostUserOptions::default())?;
                Server::Disk { place: NbdPlace::Unix(path), server: DiskServer::VhostUser(server) }
            }
        };
        let exported = Exported { disk_id: record.disk_id, server };
        self.shared.exports.lock().insert(name.clone(), exported);
        Ok(())
    }

    /// Takes a volume's socket or file away. When this returned, no request of a client reaches the volume any more.
    pub async fn detach(&self, name: &Name) -> Result<()> {
        let exported = self.shared.exports.lock().remove(name).ok_or_else(|| {
            let what = format!("detach volume {name}: it is not shown to programs of this host");
            Error::new(ErrorKind::NotFound, what)
        })?;
        let Exported { disk_id, server } = exported;
        let slot = server.slot().clone();
        let stopped = blocking("stop a disk server", move || server.stop()).await;
        self.close(disk_id);
        // Requests that waited for another host have failed by now.
        let fenced = blocking("fence a volume", move || slot.fence(LAST_REQUEST_LIMIT)).await;
        stopped.and(fenced)
    }

    /// Takes all files away: they would not outlive this process, but be in the way of whoever uses them.
    pub async fn detach_files(&self) {
        let is_file = |exported: &Exported| matches!(exported.server, Server::File(_));
        let names: Vec<Name> = {
            let exports = self.shared.exports.lock();
            exports.iter().filter(|(_, exported)| is_file(exported)).map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            if let Err(error) = self.detach(&name).await {
                tracing::warn!(volume = %name, %error, "take a volume's file away");
            }
        }
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
