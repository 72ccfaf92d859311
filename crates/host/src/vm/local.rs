//! One VM of this host: its QEMU, its disks, its files.
//!
//! Invariants: a [`LocalVm`] never ends its QEMU by being dropped; [`LocalVm::release`] does, once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_wire::meta::{VmRecord, VmSpec, VmState, VolumeRecord, key};
use whimbrel_wire::record::vm::LocalVm as LocalRecord;
use whimbrel_wire::{DiskId, Epoch, Name, VmId};

use super::{KILL_LIMIT, VmConfig};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::{DeviceSlot, SlotState, SocketOwner, VhostUserOptions, VhostUserServer, WriteTracker};
use crate::guest::binary::QemuBinary;
use crate::guest::launch::{DiskKind, DiskSocket, LaunchPlan, disk_queues};
use crate::guest::process::{self, ProcessId, QemuProcess};
use crate::guest::qmp::Qmp;
use crate::guest::tap::Tap;
use crate::records;
use crate::volume::Volumes;

/// How long QMP has to answer when a QEMU is found again.
const QMP_LIMIT: Duration = Duration::from_secs(10);
/// How much of QEMU's log is told when it ended by itself.
const LAST_WORDS_BYTES: usize = 1000;
/// How long a running request of a disk has to end before its volume is closed.
const FENCE_LIMIT: Duration = Duration::from_secs(5);

/// A disk of a VM.
pub struct VmDisk {
    /// The volume.
    pub volume: Name,
    /// Its layer.
    pub disk_id: DiskId,
    /// Where requests find the volume: empty at a target until COMMIT.
    pub slot: DeviceSlot,
    socket: PathBuf,
    server: Mutex<Option<VhostUserServer>>,
}

impl VmDisk {
    /// Has pages of guest RAM that the disk's reads write marked, or no longer.
    pub fn track_writes(&self, tracker: Option<WriteTracker>) {
        if let Some(server) = &*self.server.lock() {
            server.track_writes(tracker);
        }
    }

    /// Requests that the guest has made and that are not answered.
    pub fn unfinished(&self) -> usize {
        self.server.lock().as_ref().map_or(0, VhostUserServer::unfinished)
    }

    fn stop(&self) {
        if let Some(Err(error)) = self.server.lock().take().map(VhostUserServer::stop) {
            tracing::warn!(volume = %self.volume, %error, "disk server did not stop cleanly");
        }
    }
}

/// See the module's charter.
pub struct LocalVm {
    /// Its name.
    pub name: Name,
    /// Its lasting identity.
    pub id: VmId,
    /// How it was started.
    pub spec: VmSpec,
    /// Its QEMU.
    pub process: QemuProcess,
    /// Its disks, in the order of `spec.volumes`.
    pub disks: Vec<VmDisk>,
    /// The file that is its RAM.
    pub ram_path: PathBuf,
    /// Its sockets and logs.
    pub run_dir: PathBuf,
    qmp_path: PathBuf,
    qmp: tokio::sync::Mutex<Qmp>,
    epoch: AtomicU64,
    busy: AtomicBool,
    released: AtomicBool,
    on_purpose: AtomicBool,
}

/// Held while a VM is moved or stopped.
pub struct Busy {
    vm: Arc<LocalVm>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.vm.busy.store(false, Ordering::Release);
    }
}

impl LocalVm {
    /// Starts QEMU with its disks.
    pub(super) async fn launch(
        config: &VmConfig,
        volumes: &Volumes,
        qemu: QemuBinary,
        record: &VmRecord,
        incoming: bool,
    ) -> Result<Self> {
        let id = record
            .id()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "read the VM's record: no memory object"))?;
        let run_dir = config.run_dir.join(record.name.as_str());
        fs::create_dir_all(&run_dir).with_context(|| format!("make directory {}", run_dir.display()))?;
        let ram_path = config.memory_dir.join(format!("{}.ram", record.name));
        if !incoming {
            // Left over from a VM that ended while no agent ran; its record says that nobody uses it.
            let _ = fs::remove_file(&ram_path);
        }
        let mut disks = Vec::with_capacity(record.spec.volumes.len());
        for (index, name) in record.spec.volumes.iter().enumerate() {
            let socket = run_dir.join(format!("disk{index}.sock"));
            disks.push(serve(config, volumes, name, socket, &record.spec, !incoming).await?);
        }
        let mut taps = Vec::with_capacity(record.spec.nets.len());
        for net in &record.spec.nets {
            taps.push(Tap::create(None, &net.bridge)?.into_fd());
        }
        let plan = LaunchPlan {
            name: record.name.clone(),
            spec: record.spec.clone(),
            qemu,
            run_dir: run_dir.clone(),
            ram_path: ram_path.clone(),
            disks: sockets(&disks),
            taps,
            incoming,
            user: config.user,
        };
        let started = process::spawn(&plan).await?;
        let vm = Self {
            name: record.name.clone(),
            id,
            spec: record.spec.clone(),
            process: started.process,
            disks,
            ram_path,
            run_dir,
            qmp_path: plan.qmp_path(),
            qmp: tokio::sync::Mutex::new(started.qmp),
            epoch: AtomicU64::new(record.right.epoch.0),
            busy: AtomicBool::new(false),
            released: AtomicBool::new(false),
            on_purpose: AtomicBool::new(false),
        };
        if let Err(error) = vm.write_record(config, incoming) {
            vm.process.kill(KILL_LIMIT).await?;
            return Err(error);
        }
        Ok(vm)
    }

    /// Finds a QEMU that ran before the agent ended; serves its disks again if `active`.
    pub(super) async fn reattach(
        config: &VmConfig,
        volumes: &Volumes,
        local: &LocalRecord,
        epoch: Epoch,
        active: bool,
    ) -> Result<Option<Self>> {
        let Some(process) = QemuProcess::reattach(&process_id(local))? else { return Ok(None) };
        let run_dir = config.run_dir.join(local.name.as_str());
        let mut disks = Vec::with_capacity(local.spec.volumes.len());
        for (index, name) in local.spec.volumes.iter().enumerate() {
            let socket = run_dir.join(format!("disk{index}.sock"));
            disks.push(serve(config, volumes, name, socket, &local.spec, active).await?);
        }
        let qmp_path = PathBuf::from(&local.qmp);
        let Some(qmp) = connect_again(&qmp_path, &process).await? else { return Ok(None) };
        Ok(Some(Self {
            name: local.name.clone(),
            id: local.id,
            spec: local.spec.clone(),
            process,
            disks,
            ram_path: PathBuf::from(&local.ram_path),
            run_dir,
            qmp_path,
            qmp: tokio::sync::Mutex::new(qmp),
            epoch: AtomicU64::new(epoch.0),
            busy: AtomicBool::new(false),
            released: AtomicBool::new(false),
            on_purpose: AtomicBool::new(false),
        }))
    }

    /// Writes this host's own record of the VM.
    pub(crate) fn write_record(&self, config: &VmConfig, incoming: bool) -> Result<()> {
        let id = self.process.id();
        let record = LocalRecord {
            version: LocalRecord::VERSION,
            name: self.name.clone(),
            id: self.id,
            epoch: self.epoch(),
            spec: self.spec.clone(),
            pid: id.pid,
            start_time: id.start_time,
            boot_id: id.boot_id.clone(),
            qmp: self.qmp_path.to_string_lossy().into_owned(),
            ram_path: self.ram_path.to_string_lossy().into_owned(),
            incoming,
        };
        let path = record_path(config, &self.name);
        let bytes = serde_json::to_vec(&record)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write the VM's local record", error))?;
        crate::durable::replace(&path, &bytes)
    }

    /// Epoch of the right under which it runs here.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    pub(crate) fn set_epoch(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    /// The connection to QEMU; made anew if it was lost.
    pub async fn qmp(&self) -> Result<Qmp> {
        let mut qmp = self.qmp.lock().await;
        if qmp.is_closed() {
            *qmp = Qmp::connect(&self.qmp_path, QMP_LIMIT).await?;
        }
        Ok(qmp.clone())
    }

    /// The serial console's socket.
    pub fn console_path(&self) -> PathBuf {
        self.run_dir.join("console.sock")
    }

    pub(super) fn disk_sockets(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|disk| disk.socket.clone()).collect()
    }

    /// The end of what QEMU wrote about itself; its log goes with the VM's directory.
    pub(crate) fn last_words(&self) -> String {
        let log = fs::read(self.run_dir.join("qemu.log")).unwrap_or_default();
        let tail = log.get(log.len().saturating_sub(LAST_WORDS_BYTES)..).unwrap_or_default();
        String::from_utf8_lossy(tail).trim().to_owned()
    }

    /// Reserves the VM for one move or stop.
    pub fn busy(self: &Arc<Self>, action: &str) -> Result<Busy> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{action}: it is being moved or stopped already"),
            )
            .hint("see `whimbrel task list`"));
        }
        Ok(Busy { vm: Arc::clone(self) })
    }

    /// The end that comes is wanted: the VM is stopped, not crashed.
    pub(super) fn stopped_on_purpose(&self) {
        self.on_purpose.store(true, Ordering::Release);
    }

    /// Waits for QEMU's end; how the VM ended, or None if it was released.
    pub(super) async fn ended(&self) -> Option<VmState> {
        let mut events = self.qmp().await.ok().map(|qmp| qmp.events());
        let exited = self.process.exited();
        tokio::pin!(exited);
        let mut guest_stopped = false;
        loop {
            let next = async {
                match &mut events {
                    Some(events) => events.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = &mut exited => break,
                event = next => match event {
                    Ok(event) => guest_stopped |= event.name == "SHUTDOWN",
                    Err(_) => events = None,
                },
            }
        }
        if self.released.load(Ordering::Acquire) {
            return None;
        }
        let clean = guest_stopped || self.on_purpose.load(Ordering::Acquire);
        Some(if clean { VmState::Stopped } else { VmState::Crashed })
    }

    /// Serves every disk, opening its layer if need be. Does nothing to those that are served.
    pub(crate) async fn serve_disks(&self, volumes: &Volumes) -> Result<()> {
        for disk in &self.disks {
            if disk.slot.state() == SlotState::Active {
                continue;
            }
            // An open layer needs no word of the store: it is ours until somebody fences it.
            let layer = match volumes.opened(disk.disk_id).filter(|layer| !layer.is_fenced()) {
                Some(layer) => layer,
                None => {
                    let what = format!("volume {}", disk.volume);
                    let key = key::volume(&disk.volume);
                    let record = records::must::<VolumeRecord>(volumes.meta(), &key, &what).await?;
                    volumes.open(&record.value).await?
                }
            };
            disk.slot.activate(layer)?;
        }
        Ok(())
    }

    /// Ends QEMU and its disk servers; the RAM file stays.
    pub(super) async fn end_keeping_ram(&self, volumes: &Volumes) {
        if !self.released.swap(true, Ordering::AcqRel) {
            self.end_process(volumes).await;
        }
    }

    async fn end_process(&self, volumes: &Volumes) {
        if let Err(error) = self.process.kill(KILL_LIMIT).await {
            tracing::error!(vm = %self.name, %error, "QEMU does not end");
        }
        for disk in &self.disks {
            volumes.stop_waiting(disk.disk_id);
            if let Err(error) = disk.slot.fence(FENCE_LIMIT) {
                tracing::warn!(vm = %self.name, volume = %disk.volume, %error, "disk closed under a running request");
            }
            disk.stop();
            volumes.close(disk.disk_id);
        }
    }

    /// Ends QEMU, closes the disks, removes the files. Does nothing the second time.
    pub(super) async fn release(&self, config: &VmConfig, volumes: &Volumes) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        self.end_process(volumes).await;
        let _ = fs::remove_file(&self.ram_path);
        let _ = fs::remove_file(record_path(config, &self.name));
        let _ = fs::remove_dir_all(&self.run_dir);
    }
}

/// Connects to the QMP of a QEMU that ran before; none if it ends meanwhile (a killed one takes its time).
async fn connect_again(path: &Path, process: &QemuProcess) -> Result<Option<Qmp>> {
    let deadline = Instant::now() + QMP_LIMIT;
    loop {
        match Qmp::connect(path, QMP_LIMIT).await {
            Ok(qmp) => return Ok(Some(qmp)),
            Err(_) if !process.is_alive() => return Ok(None),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Serves a volume to a VM, at once or when it is activated.
async fn serve(
    config: &VmConfig,
    volumes: &Volumes,
    name: &Name,
    socket: PathBuf,
    spec: &VmSpec,
    active: bool,
) -> Result<VmDisk> {
    let what = format!("volume {name}");
    let record = records::must::<VolumeRecord>(volumes.meta(), &key::volume(name), &what).await?.value;
    let slot = if active {
        let layer = volumes.open(&record).await?;
        DeviceSlot::active(layer)
    } else {
        DeviceSlot::standby(record.size_bytes)
    };
    let owner = config.user.map(|(uid, gid)| SocketOwner { uid, gid, mode: 0o600 });
    let options = VhostUserOptions {
        queues: disk_queues(spec),
        serial: name.as_str().to_owned(),
        owner,
        ..VhostUserOptions::default()
    };
    let server = VhostUserServer::start(&socket, slot.clone(), options)?;
    Ok(VmDisk {
        volume: name.clone(),
        disk_id: record.disk_id,
        slot,
        socket,
        server: Mutex::new(Some(server)),
    })
}

fn sockets(disks: &[VmDisk]) -> Vec<DiskSocket> {
    let socket = |disk: &VmDisk| DiskSocket {
        id: disk.volume.clone(),
        socket_path: disk.socket.clone(),
        kind: DiskKind::VhostUserBlk,
    };
    disks.iter().map(socket).collect()
}

fn record_path(config: &VmConfig, name: &Name) -> PathBuf {
    config.records_dir.join(format!("{name}.json"))
}

fn process_id(local: &LocalRecord) -> ProcessId {
    ProcessId { pid: local.pid, start_time: local.start_time, boot_id: local.boot_id.clone() }
}

/// Every local record. One that cannot be read is reported and left.
pub(super) fn read_all(config: &VmConfig) -> Result<Vec<LocalRecord>> {
    let dir = &config.records_dir;
    let mut records = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read directory {}", dir.display()))? {
        let path = entry.with_context(|| format!("read directory {}", dir.display()))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let parsed =
            fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<LocalRecord>(&bytes).ok());
        match parsed {
            Some(record) if record.version <= LocalRecord::VERSION => records.push(record),
            _ => {
                tracing::error!(path = %path.display(), "cannot read a VM's local record; the VM is left alone");
            }
        }
    }
    Ok(records)
}

/// Ends the process that a record names, if it still is that process.
pub(super) async fn end_process(local: &LocalRecord) -> Result<()> {
    match QemuProcess::reattach(&process_id(local))? {
        Some(process) => process.kill(KILL_LIMIT).await,
        None => Ok(()),
    }
}

/// Removes what is left of a VM whose process has ended.
pub(super) fn remove_files(config: &VmConfig, local: &LocalRecord) {
    let _ = fs::remove_file(&local.ram_path);
    let _ = fs::remove_dir_all(config.run_dir.join(local.name.as_str()));
    let _ = fs::remove_file(record_path(config, &local.name));
}
