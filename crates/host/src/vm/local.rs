//! One VM of this host: its QEMU, its disks, its files.
//!
//! Invariants: a [`LocalVm`] never ends its QEMU by being dropped; [`LocalVm::release`] does, once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_wire::foreign::ForeignBus;
use whimbrel_wire::meta::{VmRecord, VmSpec, VmState, VolumeRecord, key};
use whimbrel_wire::peer::migrate::{DiskIo, QueueIo};
use whimbrel_wire::record::vm::LocalVm as LocalRecord;
use whimbrel_wire::{DiskId, Epoch, Name, VmId};

use super::{KILL_LIMIT, VmConfig};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::nbd::{NbdOptions, NbdServer};
use crate::export::{
    DeviceSlot, FilledFrom, FrontEndState, SizeNotice, SlotState, SocketOwner, VhostUserOptions,
    VhostUserServer, WriteTracker,
};
use crate::guest::binary::QemuBinary;
use crate::guest::launch::{self, DiskKind, DiskSocket, LaunchPlan, disk_queues};
use crate::guest::process::{self, ProcessId, QemuProcess};
use crate::guest::qmp::Qmp;
use crate::guest::tap::Tap;
use crate::records;
use crate::volume::{Claim, Volumes};

/// How long QMP has to answer when a QEMU is found again.
const QMP_LIMIT: Duration = Duration::from_secs(10);
/// How much of QEMU's log is told when it ended by itself.
const LAST_WORDS_BYTES: usize = 1000;
/// How long a guest's request over NBD waits for a disk that is between two hosts; an error is the last resort.
const DISK_PATIENCE: Duration = Duration::from_secs(3600);
/// How long a running request of a disk has to end before its volume is closed.
const FENCE_LIMIT: Duration = Duration::from_secs(5);

/// How long QEMU may take to connect again to disks that are served again; it tries every second.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// A disk of a VM.
pub struct VmDisk {
    /// The volume.
    pub volume: Name,
    /// Its writable layer: another one after each snapshot.
    disk_id: Mutex<DiskId>,
    /// Where requests find the volume: empty at a target until COMMIT.
    pub slot: DeviceSlot,
    pub(super) socket: PathBuf,
    pub(super) kind: DiskKind,
    server: Mutex<Option<DiskServer>>,
}

/// What shows a volume on a socket.
pub(crate) enum DiskServer {
    /// Over NBD.
    Nbd(NbdServer),
    /// Over vhost-user-blk.
    VhostUser(VhostUserServer),
}

impl DiskServer {
    /// Where requests find the volume.
    pub(crate) fn slot(&self) -> &DeviceSlot {
        match self {
            Self::Nbd(server) => server.slot(),
            Self::VhostUser(server) => server.slot(),
        }
    }

    /// What is to be told to who is connected after the volume became larger. Over NBD there is no word for it.
    pub(crate) fn size_notice(&self) -> Option<SizeNotice> {
        match self {
            Self::Nbd(_) => None,
            Self::VhostUser(server) => server.size_notice(),
        }
    }

    /// Ends the service.
    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::Nbd(server) => server.stop(),
            Self::VhostUser(server) => server.stop(),
        }
    }
}

impl VmDisk {
    /// A disk whose server stands.
    pub(super) fn new(record: &VolumeRecord, socket: PathBuf, server: DiskServer) -> Self {
        let kind = match server {
            DiskServer::Nbd(_) => DiskKind::Nbd,
            DiskServer::VhostUser(_) => DiskKind::VhostUserBlk,
        };
        Self {
            volume: record.name.clone(),
            disk_id: Mutex::new(record.disk_id),
            slot: server.slot().clone(),
            socket,
            kind,
            server: Mutex::new(Some(server)),
        }
    }

    /// Its writable layer.
    pub fn disk_id(&self) -> DiskId {
        *self.disk_id.lock()
    }

    /// It is served from another layer now.
    pub(crate) fn set_disk_id(&self, disk_id: DiskId) {
        *self.disk_id.lock() = disk_id;
    }

    /// Has pages of guest RAM that the disk's reads write marked, or no longer. Over NBD QEMU itself writes them, and
    /// its page tables tell.
    pub fn track_writes(&self, tracker: Option<WriteTracker>) {
        if let Some(DiskServer::VhostUser(server)) = &*self.server.lock() {
            server.track_writes(tracker);
        }
    }

    /// Which block of the disk each page of a RAM file (device and inode number) was filled from, if anybody knows. Over
    /// NBD QEMU itself fills them.
    pub fn filled(&self, device: u64, inode: u64) -> Option<FilledFrom> {
        match &*self.server.lock() {
            Some(DiskServer::VhostUser(server)) => server.filled(device, inode),
            Some(DiskServer::Nbd(_)) | None => None,
        }
    }

    /// Whether the guest, when it is stopped from now on, leaves requests behind that do not end at once. Over NBD QEMU
    /// waits for all of them.
    pub fn cut_short(&self, cut_short: bool) {
        if let Some(DiskServer::VhostUser(server)) = &*self.server.lock() {
            server.cut_short(cut_short);
        }
    }

    /// Requests that the stopped guest has made and that are not answered.
    pub fn outstanding(&self) -> Result<DiskIo> {
        let queues = match &*self.server.lock() {
            Some(DiskServer::VhostUser(server)) => server.outstanding()?,
            Some(DiskServer::Nbd(_)) | None => Vec::new(),
        };
        Ok(DiskIo { volume: self.volume.clone(), queues })
    }

    /// Has requests done first that were left unanswered where the guest was stopped.
    fn reissue(&self, queues: Vec<QueueIo>) {
        if let Some(DiskServer::VhostUser(server)) = &*self.server.lock() {
            server.reissue(queues);
        }
    }

    /// Whether the guest waits because its layer finds no space. Over NBD QEMU is told, and pauses the guest.
    pub fn waits_for_space(&self) -> bool {
        match &*self.server.lock() {
            Some(DiskServer::VhostUser(server)) => server.waits_for_space(),
            Some(DiskServer::Nbd(_)) | None => false,
        }
    }

    /// Whether QEMU is at the disk's socket. Over NBD it is the one that waits.
    fn front_end(&self) -> FrontEndState {
        match &*self.server.lock() {
            Some(DiskServer::VhostUser(server)) => server.front_end(),
            Some(DiskServer::Nbd(_)) | None => FrontEndState::Spoke,
        }
    }

    /// What is to be told to QEMU after the volume became larger.
    pub(crate) fn size_notice(&self) -> Option<SizeNotice> {
        self.server.lock().as_ref().and_then(DiskServer::size_notice)
    }

    /// What stops the service; may wait. Over NBD QEMU flushes once more while it saves its devices, and must not wait
    /// for a disk that is fenced by then.
    pub fn fence(&self, limit: Duration) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (slot, kind) = (self.slot.clone(), self.kind);
        move || match kind {
            DiskKind::Nbd => slot.fence_durably(limit),
            DiskKind::VhostUserBlk => slot.fence(limit),
        }
    }

    /// Gives the server away, as it is.
    pub(super) fn take_server(&self) -> Option<DiskServer> {
        self.server.lock().take()
    }

    fn stop(&self) {
        if let Some(Err(error)) = self.server.lock().take().map(DiskServer::stop) {
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
    /// The file that is its RAM, if we made it.
    pub ram_path: Option<PathBuf>,
    /// Its sockets and logs.
    pub run_dir: PathBuf,
    /// Its serial console, if it has one on a socket.
    console: Option<PathBuf>,
    qmp_path: PathBuf,
    qmp: tokio::sync::Mutex<Qmp>,
    adopting: AtomicBool,
    epoch: AtomicU64,
    busy: AtomicBool,
    released: AtomicBool,
    on_purpose: AtomicBool,
}

/// A QEMU that somebody else started.
pub(super) struct Found {
    /// It.
    pub process: QemuProcess,
    /// The connection to it.
    pub qmp: Qmp,
    /// Its serial console's socket, if it has one.
    pub console: Option<PathBuf>,
    /// The directory made for its sockets.
    pub run_dir: PathBuf,
}

/// Held while a VM is moved or stopped, or a snapshot of a volume of it is made.
pub struct Busy {
    vm: Arc<LocalVm>,
    claim: Option<Claim>,
}

impl Busy {
    /// Has its volumes reserved for as long as it is.
    pub(crate) fn hold(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // The volumes first: whoever finds the VM free finds them free.
        self.claim = None;
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
            let socket = usual_socket(&run_dir, index);
            disks.push(serve(config.user, volumes, name, socket, &record.spec, index, !incoming).await?);
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
            ram_path: launch::ram_block(&record.spec).map(|_| ram_path),
            console: Some(plan.console_path()),
            run_dir,
            qmp_path: plan.qmp_path(),
            qmp: tokio::sync::Mutex::new(started.qmp),
            adopting: AtomicBool::new(false),
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

    /// A QEMU that somebody else started, about to be taken over; its disks are served.
    pub(super) fn take_over(record: &VmRecord, found: Found, disks: Vec<VmDisk>) -> Result<Self> {
        let id = record
            .id()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "read the VM's record: no memory object"))?;
        Ok(Self {
            name: record.name.clone(),
            id,
            spec: record.spec.clone(),
            process: found.process,
            disks,
            ram_path: None,
            console: found.console,
            run_dir: found.run_dir,
            qmp_path: found.qmp.path().to_owned(),
            qmp: tokio::sync::Mutex::new(found.qmp),
            adopting: AtomicBool::new(true),
            epoch: AtomicU64::new(record.right.epoch.0),
            busy: AtomicBool::new(false),
            released: AtomicBool::new(false),
            on_purpose: AtomicBool::new(false),
        })
    }

    /// Gives up a QEMU that was not taken over after all: it goes on, its files stay. `keep` names volumes that are
    /// not to be closed.
    pub(super) fn let_go(&self, config: &VmConfig, volumes: &Volumes, keep: impl Fn(&Name) -> bool) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        for disk in self.disks.iter().filter(|disk| !keep(&disk.volume)) {
            disk.stop();
            volumes.close(disk.disk_id());
        }
        let _ = fs::remove_file(record_path(config, &self.name));
        let _ = fs::remove_dir_all(&self.run_dir);
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
        // One that somebody else started runs as whoever that wanted.
        let user = if local.ram_path.is_empty() { Some(process.owner()?) } else { config.user };
        for (index, name) in local.spec.volumes.iter().enumerate() {
            let recorded = local.disk_sockets.get(index).map(PathBuf::from);
            let socket = recorded.unwrap_or_else(|| usual_socket(&run_dir, index));
            disks.push(serve(user, volumes, name, socket, &local.spec, index, active).await?);
        }
        let qmp_path = PathBuf::from(&local.qmp);
        let Some(qmp) = connect_again(&qmp_path, &process).await? else { return Ok(None) };
        Ok(Some(Self {
            name: local.name.clone(),
            id: local.id,
            spec: local.spec.clone(),
            process,
            disks,
            ram_path: (!local.ram_path.is_empty()).then(|| PathBuf::from(&local.ram_path)),
            console: match &local.console {
                None => Some(run_dir.join("console.sock")),
                Some(path) => (!path.is_empty()).then(|| PathBuf::from(path)),
            },
            run_dir,
            qmp_path,
            qmp: tokio::sync::Mutex::new(qmp),
            adopting: AtomicBool::new(local.adopting),
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
            ram_path: self
                .ram_path
                .as_ref()
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            incoming,
            disk_sockets: self.disks.iter().map(|disk| disk.socket.to_string_lossy().into_owned()).collect(),
            console: Some(
                self.console.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            ),
            adopting: self.adopting.load(Ordering::Acquire),
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

    /// Has requests done first that were left unanswered where the guest was stopped.
    pub fn reissue(&self, outstanding: Vec<DiskIo>) {
        for io in outstanding {
            if let Ok(disk) = self.disk_of(&io.volume) {
                disk.reissue(io.queues);
            }
        }
    }

    /// The serial console's socket, if it has one.
    pub fn console_path(&self) -> Option<&Path> {
        self.console.as_deref()
    }

    /// Being taken over: its disks may not be on their volumes yet.
    pub(crate) fn is_adopting(&self) -> bool {
        self.adopting.load(Ordering::Acquire)
    }

    /// It is taken over.
    pub(super) fn adopted(&self) {
        self.adopting.store(false, Ordering::Release);
    }

    /// RAM files that somebody else made, and that will be left when it has gone.
    pub(crate) async fn foreign_ram(&self) -> Vec<PathBuf> {
        if self.ram_path.is_some() {
            return Vec::new();
        }
        let blocks = async { crate::guest::precheck::ram_files(&self.qmp().await?).await };
        blocks.await.unwrap_or_default()
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

    /// Its disk on that volume.
    pub(super) fn disk_of(&self, volume: &Name) -> Result<&VmDisk> {
        self.disks.iter().find(|disk| disk.volume == *volume).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("find volume {volume}: vm {} has no such disk", self.name),
            )
        })
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
        Ok(Busy { vm: Arc::clone(self), claim: None })
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
            let layer = match volumes.opened(disk.disk_id()).filter(|layer| !layer.is_fenced()) {
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

    /// Waits until QEMU is connected to all disks again, but not for long. A guest that is made to run before that
    /// would find none in QEMU before 8.2.
    pub(crate) async fn disks_connected(&self) {
        let deadline = Instant::now() + CONNECT_LIMIT;
        while self.disks.iter().any(|disk| disk.front_end() == FrontEndState::Absent) {
            if Instant::now() > deadline {
                tracing::warn!(vm = %self.name, "QEMU is not connected to all disks");
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether a QEMU that was found again has lost track of its disks (see `export::greeting`); waits for it to connect,
    /// but not for long.
    pub(crate) async fn has_lost_disks(&self) -> bool {
        let deadline = Instant::now() + CONNECT_LIMIT;
        while Instant::now() < deadline {
            let seen: Vec<FrontEndState> = self.disks.iter().map(VmDisk::front_end).collect();
            if seen.contains(&FrontEndState::Mute) {
                return true;
            }
            if seen.iter().all(|one| *one == FrontEndState::Spoke) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// Has a QEMU that has lost track of its disks find them: the guest is stopped and made to run. Nobody else may
    /// stop it meanwhile.
    pub(crate) async fn wake_disks(&self) -> Result<()> {
        let action = || format!("wake the disks of vm {}", self.name);
        let qmp = self.qmp().await?;
        // One that is paused finds them when it is made to run.
        if qmp.run_state().await? != "running" {
            return Ok(());
        }
        tracing::warn!(vm = %self.name, "QEMU has lost track of its disks: stopping the guest for a moment");
        qmp.stop().await.with_context(action)?;
        self.disks_connected().await;
        qmp.cont().await.with_context(action)
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
            volumes.stop_waiting(disk.disk_id());
            if let Err(error) = disk.slot.fence(FENCE_LIMIT) {
                tracing::warn!(vm = %self.name, volume = %disk.volume, %error, "disk closed under a running request");
            }
            disk.stop();
            volumes.close(disk.disk_id());
        }
    }

    /// Ends QEMU, closes the disks, removes the files. Does nothing the second time.
    pub(super) async fn release(&self, config: &VmConfig, volumes: &Volumes) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        self.end_process(volumes).await;
        if let Some(path) = &self.ram_path {
            let _ = fs::remove_file(path);
        }
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

/// Serves volume number `index` of a VM to its QEMU, which runs as `user`, at once or when it is activated.
pub(super) async fn serve(
    user: Option<(u32, u32)>,
    volumes: &Volumes,
    name: &Name,
    socket: PathBuf,
    spec: &VmSpec,
    index: usize,
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
    slot.limit(record.limits);
    let owner = user.map(|(uid, gid)| SocketOwner { uid, gid, mode: 0o600 });
    let foreign = spec.foreign.as_ref().and_then(|foreign| foreign.disks.get(index));
    let server = match foreign.map(|disk| disk.bus) {
        Some(ForeignBus::Nbd) => {
            let options = NbdOptions {
                name: name.as_str().to_owned(),
                owner,
                disk_patience: DISK_PATIENCE,
                ..NbdOptions::default()
            };
            DiskServer::Nbd(NbdServer::start(&socket, slot, options)?)
        }
        // A disk that was attached by hand has no serial number, and gets none later.
        Some(ForeignBus::VhostUserBlk) | None => {
            let serial = if foreign.is_some() { String::new() } else { name.as_str().to_owned() };
            let queues = disk_queues(spec, index);
            let options = VhostUserOptions {
                queues,
                serial,
                owner,
                // An agent that comes back must be able to go on with QEMU before 8.2.
                mem_slots: false,
                ..VhostUserOptions::default()
            };
            DiskServer::VhostUser(VhostUserServer::start(&socket, slot, options)?)
        }
    };
    Ok(VmDisk::new(&record, socket, server))
}

/// Where a disk's socket is, unless its record says otherwise.
pub(super) fn usual_socket(run_dir: &Path, index: usize) -> PathBuf {
    run_dir.join(format!("disk{index}.sock"))
}

fn sockets(disks: &[VmDisk]) -> Vec<DiskSocket> {
    let socket = |disk: &VmDisk| DiskSocket {
        id: disk.volume.clone(),
        socket_path: disk.socket.clone(),
        kind: disk.kind,
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
    if !local.ram_path.is_empty() {
        let _ = fs::remove_file(&local.ram_path);
    }
    let _ = fs::remove_dir_all(config.run_dir.join(local.name.as_str()));
    let _ = fs::remove_file(record_path(config, &local.name));
}
