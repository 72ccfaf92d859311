//! Virtual machines of this host: start, find again after a restart, stop, notice their end.
//!
//! ```text
//!   run ──► record Starting ──► disks exported ──► QEMU started ──► record Running
//!                                                      │ ends by itself
//!                                                      ▼
//!                                            record Stopped | Crashed
//!   agent restarts: local record ──► right still ours? ── yes ─► disks exported again, QMP again
//!                                                     └── no ──► QEMU ended: somebody else runs the VM
//! ```
//!
//! Invariants
//! * A QEMU whose guest may run exists only while this host holds the VM's right; a restarted agent asks the
//!   store before it serves a disk.
//! * QEMU, its sockets and its RAM file outlive the agent; the local record is written before the metadata record
//!   says `Running`.
//! * A VM that is being moved is not stopped or moved twice: [`LocalVm::busy`].
//!
//! Not here: moves (`migrate`), volumes (`volume`), QEMU itself (`guest`).

mod adopt;
mod local;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use uuid::Uuid;
use whimbrel_engine::memory::page_group::Wanted;
use whimbrel_wire::api::{VmRun, VolumeResize, VolumeSnapshot};
use whimbrel_wire::meta::{IoLimits, VmRecord, VmSpec, VmState, VolumeRecord, key};
use whimbrel_wire::{Epoch, HostId, Name, Object, Right, VmId};

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::guest::agent::GuestAgent;
use crate::guest::binary::QemuBinary;
use crate::guest::launch;
use crate::guest::precheck::{self, HostFacts, Report};
use crate::meta::MetaStore;
use crate::records::{self, Change, Versioned};
use crate::volume::{SnapshotWith, Volumes};

pub use adopt::Adoption;
pub(crate) use local::DiskServer;
pub use local::{Busy, LocalVm, VmDisk};

/// How long QEMU has to end after the guest was asked to shut down.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);
/// How long a killed QEMU has to be gone.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Where things of VMs are, and how they run.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Local records: one file per VM.
    pub records_dir: PathBuf,
    /// Sockets and logs: one directory per VM.
    pub run_dir: PathBuf,
    /// RAM files; a tmpfs or hugetlbfs.
    pub memory_dir: PathBuf,
    /// QEMU's program, if not the one in `PATH`.
    pub qemu: Option<PathBuf>,
    /// The user and group that VMs run as; the agent's own if none.
    pub user: Option<(u32, u32)>,
    /// How a guest's writes are followed while its memory is copied.
    pub write_tracking: Wanted,
}

/// All VMs of this host.
#[derive(Clone)]
pub struct Vms {
    shared: Arc<Shared>,
}

struct Shared {
    host: HostId,
    config: VmConfig,
    meta: Arc<dyn MetaStore>,
    volumes: Volumes,
    facts: HostFacts,
    here: Mutex<BTreeMap<Name, Arc<LocalVm>>>,
}

impl Vms {
    /// No VMs yet: see [`Vms::pick_up`].
    pub fn new(host: HostId, config: VmConfig, meta: Arc<dyn MetaStore>, volumes: Volumes) -> Result<Self> {
        for dir in [&config.records_dir, &config.run_dir, &config.memory_dir] {
            std::fs::create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
        }
        let facts = HostFacts::probe();
        if let Some(reason) = &facts.tracking_missing {
            tracing::info!(reason, "mode A is not possible on this host; VMs are moved in mode B");
        }
        let shared = Shared { host, config, meta, volumes, facts, here: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The VM, if its QEMU runs here.
    pub fn here(&self, name: &Name) -> Option<Arc<LocalVm>> {
        self.shared.here.lock().get(name).cloned()
    }

    /// The volumes that VMs' disks come from.
    pub fn volumes(&self) -> &Volumes {
        &self.shared.volumes
    }

    /// What holds for every VM of this host.
    pub fn facts(&self) -> &HostFacts {
        &self.shared.facts
    }

    /// The QEMU that VMs are started with.
    pub async fn qemu(&self) -> Result<QemuBinary> {
        QemuBinary::find(self.shared.config.qemu.as_deref()).await
    }

    /// Asks QEMU now what the first start or move would have to wait for; the answers are kept. One that is missing is
    /// told when a VM needs it.
    pub async fn ask_ahead(&self) {
        let asked = async {
            let qemu = self.qemu().await?;
            qemu.machine_types().await?;
            qemu.cpu_models().await
        };
        if let Err(error) = asked.await {
            tracing::info!(%error, "QEMU was not asked ahead");
        }
    }

    /// Starts a VM under a new name, or one whose record says that it is stopped.
    pub async fn run(&self, request: VmRun) -> Result<VmRecord> {
        let VmRun { name, mut spec } = request;
        let shared = &self.shared;
        let action = || format!("run vm {name}");
        if spec.foreign.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: that command line is not ours", action()),
            ));
        }
        launch::settle(&mut spec, &self.qemu().await?, true).await.with_context(action)?;
        let old = records::get::<VmRecord>(&*shared.meta, &key::vm(&name)).await?;
        if let Some(old) = &old {
            self.may_start_again(&old.value).with_context(action)?;
            self.volumes_must_be_whole(&old.value.spec).await.with_context(action)?;
        }
        self.volumes_must_be_whole(&spec).await.with_context(action)?;
        let id = VmId(Uuid::new_v4());
        give_macs(&mut spec, id);
        let volumes = self.free_volumes(&spec).await.with_context(action)?;
        let epoch = old.as_ref().map_or(Epoch(1), |old| old.value.right.epoch.next());
        let record = VmRecord {
            name: name.clone(),
            right: Right { object: Object::Memory(id), holder: shared.host.clone(), epoch },
            state: VmState::Starting,
            spec,
            attempt: None,
            came_by: None,
            waiting_for: None,
        };
        let mut change = match &old {
            Some(old) => Change::default().replace(old, &record)?,
            None => Change::default().create(&key::vm(&name), &record)?,
        };
        for volume in &volumes {
            let attached = VolumeRecord { attached_to: Some(name.clone()), ..volume.value.clone() };
            change = change.replace(volume, &attached)?;
        }
        change.commit_or_refuse(&*shared.meta, &action()).await?;
        match self.launch(&record, false).await {
            Ok(vm) => {
                self.set_state(&name, record.right.epoch, VmState::Running).await?;
                self.watch(&vm);
                Ok(VmRecord { state: VmState::Running, ..record })
            }
            Err(error) => {
                self.undo_start(&record).await;
                Err(error).with_context(action)
            }
        }
    }

    fn may_start_again(&self, old: &VmRecord) -> Result<()> {
        if !matches!(old.state, VmState::Stopped | VmState::Crashed) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("use the name: a VM of that name is at host {} ({:?})", old.right.holder, old.state),
            )
            .hint("choose another name, or stop that VM first"));
        }
        if old.right.holder != self.shared.host {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("use the name: host {} holds the right of the stopped VM", old.right.holder),
            )
            .hint("run it there, or `vm recover` it here after making sure that the other host is off"));
        }
        Ok(())
    }

    /// A move that still fetches blocks of a VM's volumes knows the VM by its right: before it is over nobody may
    /// start the VM anew, or move it on.
    pub(crate) async fn volumes_must_be_whole(&self, spec: &VmSpec) -> Result<()> {
        for name in &spec.volumes {
            let record = records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(name)).await?;
            if let Some(host) = record.and_then(|record| record.value.depends_on) {
                let words =
                    format!("volume {name} still depends on host {host}: its blocks are being fetched");
                return Err(Error::new(ErrorKind::Refused, words)
                    .hint("wait for the task that fetches them, see `whimbrel task list`"));
            }
        }
        Ok(())
    }

    /// The records of the VM's volumes, which must be here and in nobody's use.
    async fn free_volumes(&self, spec: &VmSpec) -> Result<Vec<Versioned<VolumeRecord>>> {
        let mut volumes: Vec<Versioned<VolumeRecord>> = Vec::with_capacity(spec.volumes.len());
        for name in &spec.volumes {
            let what = format!("volume {name}");
            let volume = records::must::<VolumeRecord>(&*self.shared.meta, &key::volume(name), &what).await?;
            let record = &volume.value;
            if record.right.holder != self.shared.host {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("use {what}: host {} holds the right to write it", record.right.holder),
                )
                .hint(format!("run the VM there (add --host {})", record.right.holder)));
            }
            if let Some(vm) = &record.attached_to {
                return Err(Error::new(ErrorKind::Refused, format!("use {what}: it is attached to vm {vm}")));
            }
            if self.shared.volumes.is_exported(name) {
                return Err(Error::new(ErrorKind::Refused, format!("use {what}: it is shown to programs"))
                    .hint(format!("`whimbrel volume detach {name}` first")));
            }
            if volumes.iter().any(|other| other.key == volume.key) {
                return Err(Error::new(ErrorKind::InvalidInput, format!("use {what} twice")));
            }
            volumes.push(volume);
        }
        Ok(volumes)
    }

    /// Starts QEMU for a record whose right is ours (or, `incoming`, will be).
    pub(crate) async fn launch(&self, record: &VmRecord, incoming: bool) -> Result<Arc<LocalVm>> {
        let vm =
            LocalVm::launch(&self.shared.config, &self.shared.volumes, self.qemu().await?, record, incoming);
        let vm = Arc::new(vm.await?);
        self.shared.here.lock().insert(record.name.clone(), Arc::clone(&vm));
        Ok(vm)
    }

    async fn undo_start(&self, record: &VmRecord) {
        let result = async {
            let mut change = Change::default();
            for name in &record.spec.volumes {
                let Some(volume) =
                    records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(name)).await?
                else {
                    continue;
                };
                if volume.value.attached_to.as_ref() == Some(&record.name) {
                    change = change
                        .replace(&volume, &VolumeRecord { attached_to: None, ..volume.value.clone() })?;
                }
            }
            if let Some(vm) = records::get::<VmRecord>(&*self.shared.meta, &key::vm(&record.name)).await?
                && vm.value.right == record.right
            {
                change = change.delete(&vm);
            }
            change.commit(&*self.shared.meta).await
        };
        if let Err(error) = result.await {
            tracing::warn!(vm = %record.name, %error, "records of a VM that did not start were left behind");
        }
    }

    /// Writes the VM's state into its record, if the right is still what it was.
    pub(crate) async fn set_state(&self, name: &Name, epoch: Epoch, state: VmState) -> Result<()> {
        loop {
            let Some(vm) = records::get::<VmRecord>(&*self.shared.meta, &key::vm(name)).await? else {
                return Ok(());
            };
            let mine = vm.value.right.holder == self.shared.host && vm.value.right.epoch == epoch;
            if !mine || vm.value.state == state {
                return Ok(());
            }
            let mut change = Change::default().replace(&vm, &VmRecord { state, ..vm.value.clone() })?;
            if matches!(state, VmState::Stopped | VmState::Crashed) {
                for name in &vm.value.spec.volumes {
                    let Some(volume) =
                        records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(name)).await?
                    else {
                        continue;
                    };
                    if volume.value.attached_to.as_ref() == Some(&vm.value.name) {
                        change = change
                            .replace(&volume, &VolumeRecord { attached_to: None, ..volume.value.clone() })?;
                    }
                }
            }
            if change.commit(&*self.shared.meta).await? {
                return Ok(());
            }
        }
    }

    /// Notices the end of the VM's QEMU, and writes down how it ended.
    pub(crate) fn watch(&self, vm: &Arc<LocalVm>) {
        let (vms, vm) = (self.clone(), Arc::clone(vm));
        tokio::spawn(async move {
            let state = match vm.ended().await {
                Some(state) => state,
                // Released on purpose: whoever did it keeps the records.
                None => return,
            };
            if state == VmState::Crashed {
                tracing::error!(vm = %vm.name, said = vm.last_words(), "QEMU ended by itself");
            } else {
                tracing::info!(vm = %vm.name, ?state, "VM ended");
            }
            vms.forget(&vm).await;
            let mut wait = Duration::from_millis(200);
            while let Err(error) = vms.set_state(&vm.name, vm.epoch(), state).await {
                tracing::warn!(vm = %vm.name, %error, "cannot write down that the VM ended; trying again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(30));
            }
        });
    }

    /// Ends the VM's QEMU if it still is, closes its disks and removes its files of this host.
    pub(crate) async fn forget(&self, vm: &Arc<LocalVm>) {
        vm.release(&self.shared.config, &self.shared.volumes).await;
        let mut here = self.shared.here.lock();
        if here.get(&vm.name).is_some_and(|other| Arc::ptr_eq(other, vm)) {
            here.remove(&vm.name);
        }
    }

    /// Ends and removes what this host still has of a VM up to epoch `newest`: what an earlier process of this agent
    /// left, or a QEMU that was put aside.
    pub(crate) async fn clear(&self, name: &Name, newest: Epoch) -> Result<()> {
        if let Some(vm) = self.here(name).filter(|vm| vm.epoch() <= newest) {
            self.forget(&vm).await;
        }
        if let Some(local) = self.local_record(name)?.filter(|local| local.epoch <= newest) {
            local::end_process(&local).await?;
            local::remove_files(&self.shared.config, &local);
        }
        Ok(())
    }

    /// Ends a waiting QEMU but keeps its RAM file, so that another one can be started from it.
    pub(crate) async fn put_aside(&self, vm: &Arc<LocalVm>) {
        vm.end_keeping_ram(&self.shared.volumes).await;
        let mut here = self.shared.here.lock();
        if here.get(&vm.name).is_some_and(|other| Arc::ptr_eq(other, vm)) {
            here.remove(&vm.name);
        }
    }

    /// Ends tracking of disk servers' writes into a VM's RAM.
    pub(crate) fn forget_tracking(&self, vm: &LocalVm) {
        for disk in &vm.disks {
            disk.track_writes(None);
        }
    }

    /// Shuts a VM of this host down.
    pub async fn stop(&self, name: &Name, force: bool) -> Result<()> {
        let vm = self.must_be_here(name).await?;
        let _busy = vm.busy(&format!("stop vm {name}"))?;
        if !force {
            vm.qmp().await?.execute::<serde_json::Value>("system_powerdown", serde_json::json!({})).await?;
            if tokio::time::timeout(SHUTDOWN_LIMIT, vm.process.exited()).await.is_err() {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    format!(
                        "stop vm {name}: the guest did not shut down within {} s",
                        SHUTDOWN_LIMIT.as_secs()
                    ),
                )
                .hint("--force ends it without asking the guest"));
            }
        }
        vm.stopped_on_purpose();
        vm.process.kill(KILL_LIMIT).await?;
        self.forget(&vm).await;
        self.set_state(name, vm.epoch(), VmState::Stopped).await
    }

    /// The VM, which must run here; the error says where it is otherwise.
    pub async fn must_be_here(&self, name: &Name) -> Result<Arc<LocalVm>> {
        if let Some(vm) = self.here(name) {
            return Ok(vm);
        }
        let record =
            records::must::<VmRecord>(&*self.shared.meta, &key::vm(name), &format!("vm {name}")).await?.value;
        Err(if record.right.holder == self.shared.host {
            Error::new(ErrorKind::NotFound, format!("reach vm {name}: it does not run ({:?})", record.state))
        } else {
            Error::new(ErrorKind::Refused, format!("reach vm {name}: it is at host {}", record.right.holder))
        })
    }

    /// The VM that uses a volume of this host, which neither moves nor stops while this is held; none if no VM does.
    async fn user_of(&self, volume: &VolumeRecord, action: &str) -> Result<Option<(Arc<LocalVm>, Busy)>> {
        let Some(user) = volume.attached_to.as_ref().filter(|_| volume.right.holder == self.shared.host)
        else {
            return Ok(None);
        };
        let vm = self.must_be_here(user).await.with_context(|| action.to_owned())?;
        let busy = vm.busy(action)?;
        Ok(Some((vm, busy)))
    }

    /// Takes a snapshot of a volume of this host, whether or not a VM uses it; gives the volume's new record.
    pub async fn snapshot_volume(&self, name: &Name, request: &VolumeSnapshot) -> Result<VolumeRecord> {
        let volumes = self.volumes();
        let what = format!("volume {name}");
        let record = records::must::<VolumeRecord>(volumes.meta(), &key::volume(name), &what).await?.value;
        let Some((vm, _busy)) = self.user_of(&record, &format!("snapshot {what}")).await? else {
            let with = SnapshotWith { slot: volumes.export_slot(name), agent: None };
            return volumes.snapshot(name, request, &with).await;
        };
        let disk = vm.disk_of(name).with_context(|| format!("snapshot {what}"))?;
        let with = SnapshotWith { slot: Some(disk.slot.clone()), agent: GuestAgent::of(&vm.run_dir) };
        let made = volumes.snapshot(name, request, &with).await;
        let serves = match &made {
            Ok(record) => Some(record.disk_id),
            // An earlier one may have been finished before this one failed.
            Err(_) => records::get::<VolumeRecord>(volumes.meta(), &key::volume(name))
                .await?
                .map(|record| record.value.disk_id)
                .filter(|disk_id| volumes.opened(*disk_id).is_some()),
        };
        if let Some(disk_id) = serves {
            disk.set_disk_id(disk_id);
        }
        made
    }

    /// Limits what the clients of a volume of this host have of it, from now on and wherever it goes.
    pub async fn limit_volume(&self, name: &Name, limits: IoLimits) -> Result<VolumeRecord> {
        let volumes = self.volumes();
        let (key, what) = (key::volume(name), format!("volume {name}"));
        let action = format!("limit {what}");
        let record = records::must::<VolumeRecord>(volumes.meta(), &key, &what).await?.value;
        // The record is part of a move: it must not change under one.
        let user = self.user_of(&record, &action).await?;
        let slot = match &user {
            Some((vm, _)) => Some(vm.disk_of(name).with_context(|| action.clone())?.slot.clone()),
            None => None,
        };
        let old = records::must::<VolumeRecord>(volumes.meta(), &key, &what).await?;
        let next = VolumeRecord { limits, ..old.value.clone() };
        Change::default().replace(&old, &next)?.commit_or_refuse(volumes.meta(), &action).await?;
        for slot in slot.into_iter().chain(volumes.export_slot(name)) {
            slot.limit(limits);
        }
        Ok(next)
    }

    /// Makes a volume of this host larger, whether or not a VM uses it; gives the volume's new record. A guest that runs
    /// hears of it.
    pub async fn resize_volume(&self, name: &Name, request: &VolumeResize) -> Result<VolumeRecord> {
        let volumes = self.volumes();
        let what = format!("volume {name}");
        let record = records::must::<VolumeRecord>(volumes.meta(), &key::volume(name), &what).await?.value;
        let Some((vm, _busy)) = self.user_of(&record, &format!("resize {what}")).await? else {
            let with = SnapshotWith { slot: volumes.export_slot(name), agent: None };
            let resized = volumes.resize(name, request.size_bytes, &with).await?;
            volumes.tell_size(name, volumes.export_notice(name)).await;
            return Ok(resized);
        };
        let disk = vm.disk_of(name).with_context(|| format!("resize {what}"))?;
        let with = SnapshotWith { slot: Some(disk.slot.clone()), agent: None };
        let resized = volumes.resize(name, request.size_bytes, &with).await;
        if let Ok(record) = &resized {
            // A snapshot that was not carried through may have been, first.
            disk.set_disk_id(record.disk_id);
            volumes.tell_size(name, disk.size_notice()).await;
        }
        resized
    }

    /// Looks at a VM of this host: which mode it may be moved in, and why not the other.
    pub async fn precheck(&self, vm: &LocalVm) -> Result<Report> {
        let facts = HostFacts { disk_sockets: vm.disk_sockets(), ..self.shared.facts.clone() };
        precheck::precheck(&vm.qmp().await?, &vm.process, &facts).await
    }

    /// Finds the VMs that this host ran before the agent ended. Those whose right has gone are ended. `skip` names
    /// VMs with a move under way: their journal decides.
    pub async fn pick_up(&self, skip: &[Name]) -> Result<()> {
        for local in local::read_all(&self.shared.config)? {
            let name = local.name.clone();
            if skip.contains(&name) {
                continue;
            }
            if let Err(error) = self.pick_up_one(local).await {
                tracing::error!(vm = %name, %error, "cannot pick the VM up; its QEMU and files are left as they are");
            }
        }
        Ok(())
    }

    async fn pick_up_one(&self, local: whimbrel_wire::record::vm::LocalVm) -> Result<()> {
        let shared = &self.shared;
        let record = self.record_or_wait(&local.name).await?;
        let ours = record.as_ref().is_some_and(|vm| {
            vm.value.right.holder == shared.host && vm.value.right.object == Object::Memory(local.id)
        });
        match record {
            Some(record) if ours => {
                let Some(vm) = self.reattach(&local, record.value.right.epoch, true).await? else {
                    local::remove_files(&shared.config, &local);
                    return self.set_state(&local.name, record.value.right.epoch, VmState::Crashed).await;
                };
                tracing::info!(vm = %vm.name, pid = local.pid, "VM picked up");
                if vm.is_adopting() && !self.settle_adoption(&vm).await? {
                    return Ok(());
                }
                self.set_state(&vm.name, record.value.right.epoch, VmState::Running).await?;
                self.watch(&vm);
                tokio::spawn(async move {
                    if !vm.has_lost_disks().await {
                        return;
                    }
                    let wake = async {
                        let _busy = vm.busy("wake its disks")?;
                        vm.wake_disks().await
                    };
                    if let Err(error) = wake.await {
                        tracing::error!(vm = %vm.name, %error, "its disks may stand still; moving it helps");
                    }
                });
                Ok(())
            }
            _ => {
                tracing::warn!(vm = %local.name, "the right to run this VM has gone elsewhere; ending its QEMU here");
                local::end_process(&local).await?;
                local::remove_files(&shared.config, &local);
                Ok(())
            }
        }
    }

    /// Connects to a QEMU that ran before the agent ended; `serve` its disks at once, or only when it is said. None
    /// if it has ended.
    pub(crate) async fn reattach(
        &self,
        local: &whimbrel_wire::record::vm::LocalVm,
        epoch: Epoch,
        serve: bool,
    ) -> Result<Option<Arc<LocalVm>>> {
        let vm = LocalVm::reattach(&self.shared.config, &self.shared.volumes, local, epoch, serve).await?;
        let Some(vm) = vm else { return Ok(None) };
        let vm = Arc::new(vm);
        self.shared.here.lock().insert(vm.name.clone(), Arc::clone(&vm));
        Ok(Some(vm))
    }

    /// Starts a VM from its disks, after the operator gave its right to this host.
    pub async fn start_recovered(&self, record: &VmRecord) -> Result<()> {
        if let Some(vm) = self.here(&record.name) {
            // Our own, from before: its memory belongs to an epoch that is over.
            self.forget(&vm).await;
        }
        let vm = self.launch(record, false).await?;
        self.set_state(&record.name, record.right.epoch, VmState::Running).await?;
        self.watch(&vm);
        Ok(())
    }

    /// This host's own records of VMs.
    pub(crate) fn local_record(&self, name: &Name) -> Result<Option<whimbrel_wire::record::vm::LocalVm>> {
        Ok(local::read_all(&self.shared.config)?.into_iter().find(|local| local.name == *name))
    }

    pub(crate) fn config(&self) -> &VmConfig {
        &self.shared.config
    }

    /// The VM's record; waits for a store that does not answer, since nothing may be assumed.
    async fn record_or_wait(&self, name: &Name) -> Result<Option<Versioned<VmRecord>>> {
        loop {
            match records::get::<VmRecord>(&*self.shared.meta, &key::vm(name)).await {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::Unknown
                    ) =>
                {
                    tracing::warn!(vm = %name, %error, "waiting for the metadata store before picking the VM up");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                other => return other,
            }
        }
    }
}

/// Interfaces without a MAC address get one that follows from the VM's identity.
fn give_macs(spec: &mut VmSpec, id: VmId) {
    let bytes = id.0.as_bytes();
    for (index, net) in spec.nets.iter_mut().enumerate() {
        if net.mac.is_empty() {
            let [a, b, c] = [bytes[1], bytes[2], bytes[3]];
            #[expect(clippy::cast_possible_truncation, reason = "a VM has a handful of interfaces")]
            let last = c.wrapping_add(index as u8);
            net.mac = format!("52:54:00:{a:02x}:{b:02x}:{last:02x}");
        }
    }
}
