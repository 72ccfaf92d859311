//! Takes over a QEMU that somebody else started.
//!
//! ```text
//!   look_at (changes nothing) ──► refused: everything that is missing, by name
//!      │
//!      ▼ carry_out, a task
//!   volumes made, records Starting ──► disks mirrored into them over NBD ──► all in step ──► switched ──► Running
//!      └──────────── anything fails, or is cancelled: undone, QEMU as it was ◄──────┘
//! ```
//!
//! Disks are mirrored at adoption, not at the move: from then on the VM is like any other, and what its disks need is
//! known before anybody wants to move it in a hurry. Writes of the guest go to both places while it lasts, so that it
//! comes to an end however busy the guest is.
//!
//! Invariants
//! * Until the first disk is switched over, everything is undone on failure, on cancel, and by an agent that comes
//!   back after it was killed half-way. After that the VM stays ours; a disk that could not be switched keeps it from
//!   being moved, and is named.
//! * Files of whoever started it are never removed.
//!
//! Not here: what may be taken over (`guest::foreign`, `guest::precheck`), moving it (`migrate`).

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use whimbrel_wire::api::{VmAdopt, VolumeCreate};
use whimbrel_wire::foreign::ForeignBus;
use whimbrel_wire::meta::{VmRecord, VmSpec, VmState, VolumeRecord, key};
use whimbrel_wire::{Epoch, Name, Object, Right, VmId};

use super::local::{self, DiskServer, Found, LocalVm, VmDisk};
use super::{Vms, precheck};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::guest::foreign::{self, Drive, Plan, PlannedDisk};
use crate::guest::precheck::{HostFacts, MovedBy};
use crate::guest::process::QemuProcess;
use crate::guest::qmp::Qmp;
use crate::records::{self, Change};
use crate::task::TaskHandle;

/// How long a QMP socket may take to answer; another program may hold it.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at how far the mirrors are.
const POLL: Duration = Duration::from_millis(200);
/// How long a mirror that is in step may take to switch over, or a cancelled one to end.
const SWITCH_LIMIT: Duration = Duration::from_secs(60);

/// A QEMU that was looked at and may be taken over.
pub struct Adoption {
    vms: Vms,
    name: Name,
    spec: VmSpec,
    plan: Plan,
    qmp: Qmp,
    process: QemuProcess,
}

/// A disk on its way into a volume.
struct Mirror {
    job: String,
    node: String,
    drive: Drive,
}

impl Vms {
    /// Looks at a running QEMU. What speaks against taking it over is an error that says all of it.
    pub async fn look_at(&self, request: &VmAdopt) -> Result<Adoption> {
        let name = &request.name;
        let action = || format!("adopt vm {name}");
        let shared = &self.shared;
        if self.here(name).is_some() || self.local_record(name)?.is_some() {
            let words = format!("{}: a VM of that name runs here", action());
            return Err(Error::new(ErrorKind::AlreadyExists, words));
        }
        if let Some(old) = records::get::<VmRecord>(&*shared.meta, &key::vm(name)).await? {
            self.may_start_again(&old.value).with_context(action)?;
        }
        let qmp = Qmp::connect(Path::new(&request.qmp), CONNECT_LIMIT).await.with_context(action)?;
        let process = foreign::process_behind(&qmp).await.with_context(action)?;
        let known = shared.here.lock().values().find(|vm| vm.process.id() == process.id()).cloned();
        if let Some(vm) = known {
            let words = format!("{}: process {} is vm {} already", action(), process.pid(), vm.name);
            return Err(Error::new(ErrorKind::AlreadyExists, words));
        }
        self.judge(name, qmp, process).await.with_context(action)
    }

    async fn judge(&self, name: &Name, qmp: Qmp, process: QemuProcess) -> Result<Adoption> {
        let mut refusals = Vec::new();
        let target: Value = qmp.execute("query-target", json!({})).await?;
        if target.get("arch").and_then(Value::as_str) != Some("x86_64") {
            refusals.push(format!("it emulates {}, not x86_64", target.get("arch").unwrap_or(&Value::Null)));
        }
        let state = qmp.run_state().await?;
        if state != "running" {
            refusals.push(format!("its guest is {state}: let it run first"));
        }
        let sockets = self.shared.volumes.vhost_user_sockets();
        let facts =
            HostFacts { disk_sockets: sockets.keys().cloned().collect(), ..self.shared.facts.clone() };
        let report = precheck::precheck(&qmp, &process, &facts).await?;
        refusals.extend(report.refusals.iter().cloned());
        let words = foreign::words_of(&process)?;
        let facts = foreign::collect(&qmp, &process, &report, sockets).await?;
        let mut plan = foreign::rewrite(&words, &facts);
        refusals.append(&mut plan.refusals);
        for number in 0..plan.disks.len() {
            let volume = volume_name(name, number)?;
            let there = records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(&volume)).await?;
            if matches!(plan.disks.get(number), Some(PlannedDisk::Drive(_))) && there.is_some() {
                refusals.push(format!("volume {volume}, which its disk would go to, is there already"));
            }
        }
        if !refusals.is_empty() {
            return Err(Error::new(ErrorKind::Unsupported, refusals.join("; "))
                .hint("nothing was changed; every reason above has to go first"));
        }
        // A file may be longer than the block in it; the one at the target must be like it.
        let ours = report.ram.iter().find(|block| block.moved_by == MovedBy::Us);
        if let Some(length) =
            ours.and_then(|block| std::fs::metadata(block.path.as_ref()?).ok()).map(|file| file.len())
        {
            plan.memory_bytes = length;
        }
        let volumes = (0..plan.disks.len()).map(|number| match plan.disks.get(number) {
            Some(PlannedDisk::Ours { volume, .. }) => Ok(volume.clone()),
            _ => volume_name(name, number),
        });
        let spec = VmSpec {
            memory_bytes: plan.memory_bytes,
            vcpus: report.vcpus,
            volumes: volumes.collect::<Result<_>>()?,
            nets: plan.nets.clone(),
            kernel: plan.kernel.clone(),
            initrd: plan.initrd.clone(),
            append: plan.append.clone(),
            machine: Some(report.machine.clone()),
            accel: Some(report.accel.clone()),
            cpu: Some(plan.cpu.clone()),
            qemu_args: Vec::new(),
            foreign: Some(plan.foreign.clone()),
        };
        tracing::info!(vm = %name, pid = process.pid(), qemu = %report.qemu_version, disks = plan.disks.len(),
            "a QEMU that somebody else started may be taken over");
        Ok(Adoption { vms: self.clone(), name: name.clone(), spec, plan, qmp, process })
    }

    /// After a restart of the agent: finishes what was under way, or undoes it. Whether the VM is ours.
    pub(super) async fn settle_adoption(&self, vm: &Arc<LocalVm>) -> Result<bool> {
        let qmp = vm.qmp().await?;
        let nodes = nbd_nodes(&vm.spec);
        let switched = nodes_in_use(&qmp).await?;
        let count = nodes.iter().filter(|node| switched.contains(node.as_str())).count();
        stop_jobs(&qmp, &nodes).await;
        if count > 0 || nodes.is_empty() {
            if count < nodes.len() {
                tracing::error!(vm = %vm.name, "not every disk of the VM is on its volume: it cannot be moved");
            }
            vm.adopted();
            vm.write_record(self.config(), false)?;
            return Ok(true);
        }
        tracing::warn!(vm = %vm.name, "taking the VM over was cut short; it is undone, its QEMU goes on as it was");
        drop_nodes(&qmp, &nodes).await;
        self.give_up(vm, BTreeSet::new()).await;
        Ok(false)
    }

    /// Lets go of a QEMU that was not taken over after all; `lent` are servers of volumes that go back.
    async fn give_up(&self, vm: &Arc<LocalVm>, lent: BTreeSet<Name>) {
        for disk in vm.disks.iter().filter(|disk| lent.contains(&disk.volume)) {
            let record = records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(&disk.volume)).await;
            if let (Some(server), Ok(Some(record))) = (disk.take_server(), record) {
                self.shared.volumes.take_back(&record.value, disk.socket.clone(), server);
            }
        }
        vm.let_go(self.config(), &self.shared.volumes, |volume| lent.contains(volume));
        {
            let mut here = self.shared.here.lock();
            if here.get(&vm.name).is_some_and(|other| Arc::ptr_eq(other, vm)) {
                here.remove(&vm.name);
            }
        }
        self.remove_records(&vm.name, vm.id, &vm.spec).await;
    }

    /// Removes the records of a VM that was not taken over, and the volumes that were made for it.
    async fn remove_records(&self, name: &Name, id: VmId, spec: &VmSpec) {
        let result = async {
            let mut change = Change::default();
            if let Some(vm) = records::get::<VmRecord>(&*self.shared.meta, &key::vm(name)).await?
                && vm.value.right.object == Object::Memory(id)
            {
                change = change.delete(&vm);
            }
            for volume in &spec.volumes {
                let Some(record) =
                    records::get::<VolumeRecord>(&*self.shared.meta, &key::volume(volume)).await?
                else {
                    continue;
                };
                if record.value.attached_to.as_ref() == Some(name) {
                    let free = VolumeRecord { attached_to: None, ..record.value.clone() };
                    change = change.replace(&record, &free)?;
                }
            }
            change.commit_or_refuse(&*self.shared.meta, "undo an adoption").await?;
            for volume in made_for(spec) {
                self.shared.volumes.remove(volume).await?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = result.await {
            tracing::warn!(vm = %name, %error, "records of a VM that was not taken over were left behind");
        }
    }
}

impl Adoption {
    /// Takes it over.
    pub async fn carry_out(self, task: &TaskHandle) -> Result<()> {
        let action = format!("adopt vm {}", self.name);
        self.run(task).await.context(action)
    }

    async fn run(mut self, task: &TaskHandle) -> Result<()> {
        task.phase("register");
        let vms = self.vms.clone();
        let record = self.register().await?;
        let (vm, lent) = match self.take(&record).await {
            Ok(taken) => taken,
            Err(error) => {
                vms.remove_records(&self.name, record.id().unwrap_or(VmId(Uuid::nil())), &self.spec).await;
                return Err(error);
            }
        };
        let busy = vm.busy("adopt")?;
        let mirrors = self.mirrors();
        let mut switched = false;
        let result = async {
            // Its end must be the end of the process, whatever it was told when it started.
            self.qmp.execute::<Value>("set-action", json!({ "shutdown": "poweroff" })).await?;
            self.mirror(&vm, &mirrors, task).await?;
            task.phase("switch");
            for mirror in &mirrors {
                self.switch(mirror).await.map(|()| switched = true)?;
            }
            Ok(())
        };
        let result: Result<()> = result.await;
        if let Err(error) = result {
            let nodes: Vec<String> = mirrors.iter().map(|mirror| mirror.node.clone()).collect();
            stop_jobs(&self.qmp, &nodes).await;
            if !switched {
                drop_nodes(&self.qmp, &nodes).await;
                drop(busy);
                vms.give_up(&vm, lent).await;
                return Err(error);
            }
            self.settle(&vm, &record).await?;
            return Err(error
                .hint("a disk is still on its file: the VM is registered, and cannot be moved like this"));
        }
        self.settle(&vm, &record).await?;
        drop(busy);
        for path in vm.foreign_ram().await {
            task.note(format!(
                "RAM file {} belongs to whoever made it: it is left when the VM moves away",
                path.display()
            ));
        }
        for mirror in &mirrors {
            task.note(format!("{} is no longer used: the disk is on a volume", mirror.drive.source));
        }
        Ok(())
    }

    /// The VM is ours: says so in the records.
    async fn settle(&self, vm: &Arc<LocalVm>, record: &VmRecord) -> Result<()> {
        vm.adopted();
        vm.write_record(self.vms.config(), false)?;
        self.vms.set_state(&self.name, record.right.epoch, VmState::Running).await?;
        self.vms.watch(vm);
        tracing::info!(vm = %self.name, pid = vm.process.pid(), "VM adopted");
        Ok(())
    }

    /// Makes the volumes, and the records.
    async fn register(&self) -> Result<VmRecord> {
        let (shared, name) = (&self.vms.shared, &self.name);
        let action = "write the VM's record";
        let id = VmId(Uuid::new_v4());
        let old = records::get::<VmRecord>(&*shared.meta, &key::vm(name)).await?;
        let epoch = old.as_ref().map_or(Epoch(1), |old| old.value.right.epoch.next());
        let record = VmRecord {
            name: name.clone(),
            right: Right { object: Object::Memory(id), holder: shared.host.clone(), epoch },
            state: VmState::Starting,
            spec: self.spec.clone(),
            attempt: None,
            came_by: None,
            waiting_for: None,
        };
        for (volume, disk) in self.spec.volumes.iter().zip(&self.plan.disks) {
            if let PlannedDisk::Drive(drive) = disk {
                let request = VolumeCreate {
                    name: volume.clone(),
                    image: None,
                    size_bytes: Some(drive.size_bytes),
                    from: None,
                };
                if let Err(error) = shared.volumes.create(&request).await {
                    self.vms.remove_records(name, id, &self.spec).await;
                    return Err(error);
                }
            }
        }
        let result = async {
            let mut change = match &old {
                Some(old) => Change::default().replace(old, &record)?,
                None => Change::default().create(&key::vm(name), &record)?,
            };
            for volume in &self.spec.volumes {
                let what = format!("volume {volume}");
                let found = records::must::<VolumeRecord>(&*shared.meta, &key::volume(volume), &what).await?;
                let attached = VolumeRecord { attached_to: Some(name.clone()), ..found.value.clone() };
                change = change.replace(&found, &attached)?;
            }
            change.commit_or_refuse(&*shared.meta, action).await
        };
        if let Err(error) = result.await {
            self.vms.remove_records(name, id, &self.spec).await;
            return Err(error);
        }
        Ok(record)
    }

    /// Serves the volumes, and writes down that the VM is being taken over.
    async fn take(&mut self, record: &VmRecord) -> Result<(Arc<LocalVm>, BTreeSet<Name>)> {
        let shared = &self.vms.shared;
        let owner = self.process.owner()?;
        let run_dir = shared.config.run_dir.join(self.name.as_str());
        make_dir(&run_dir, owner)?;
        let (mut disks, mut lent) = (Vec::new(), BTreeSet::new());
        for (index, (volume, planned)) in self.spec.volumes.iter().zip(&self.plan.disks).enumerate() {
            let disk = match planned {
                PlannedDisk::Drive(_) => {
                    let socket = local::usual_socket(&run_dir, index);
                    local::serve(Some(owner), &shared.volumes, volume, socket, &self.spec, index, true).await
                }
                PlannedDisk::Ours { volume, .. } => self.borrow(volume).await.inspect(|_| {
                    lent.insert(volume.clone());
                }),
            };
            match disk {
                Ok(disk) => disks.push(disk),
                Err(error) => {
                    self.put_back(disks, &lent).await;
                    let _ = std::fs::remove_dir_all(&run_dir);
                    return Err(error);
                }
            }
        }
        let found = Found {
            process: self.process.try_clone()?,
            qmp: self.qmp.clone(),
            console: self.plan.console.clone(),
            run_dir,
        };
        let vm = Arc::new(LocalVm::take_over(record, found, disks)?);
        shared.here.lock().insert(self.name.clone(), Arc::clone(&vm));
        if let Err(error) = vm.write_record(&shared.config, false) {
            self.vms.give_up(&vm, lent).await;
            return Err(error);
        }
        Ok((vm, lent))
    }

    /// Takes a volume's socket over, with its server at work.
    async fn borrow(&self, volume: &Name) -> Result<VmDisk> {
        let volumes = &self.vms.shared.volumes;
        let what = format!("volume {volume}");
        let record = records::must::<VolumeRecord>(volumes.meta(), &key::volume(volume), &what).await?.value;
        let (socket, server) = volumes.hand_over(volume).ok_or_else(|| {
            Error::new(ErrorKind::Refused, format!("take {what} over: it was detached meanwhile"))
        })?;
        Ok(VmDisk::new(&record, socket, server))
    }

    async fn put_back(&self, disks: Vec<VmDisk>, lent: &BTreeSet<Name>) {
        let volumes = &self.vms.shared.volumes;
        for disk in disks {
            let Some(server) = disk.take_server() else { continue };
            let record = records::get::<VolumeRecord>(volumes.meta(), &key::volume(&disk.volume)).await;
            match (lent.contains(&disk.volume), record) {
                (true, Ok(Some(record))) => volumes.take_back(&record.value, disk.socket.clone(), server),
                _ => {
                    let _ = DiskServer::stop(server);
                    volumes.close(disk.disk_id());
                }
            }
        }
    }

    fn mirrors(&self) -> Vec<Mirror> {
        let disks = self.plan.disks.iter().zip(&self.plan.foreign.disks).enumerate();
        let mirror =
            |(index, (planned, wanted)): (usize, (&PlannedDisk, &whimbrel_wire::foreign::ForeignDisk))| {
                match planned {
                    PlannedDisk::Drive(drive) => {
                        Some(Mirror { job: job_name(index), node: wanted.id.clone(), drive: drive.clone() })
                    }
                    PlannedDisk::Ours { .. } => None,
                }
            };
        disks.filter_map(mirror).collect()
    }

    /// Has QEMU copy its disks into the volumes until both are the same, and stay so.
    async fn mirror(&self, vm: &LocalVm, mirrors: &[Mirror], task: &TaskHandle) -> Result<()> {
        task.phase("mirror");
        for mirror in mirrors {
            let disk = vm.disks.iter().zip(nodes_of(&vm.spec)).find(|(_, node)| *node == mirror.node);
            let (disk, _) =
                disk.ok_or_else(|| Error::new(ErrorKind::Internal, "mirror a disk: it has no volume"))?;
            let node = foreign::nbd_node(&mirror.node, &disk.socket.to_string_lossy(), disk.volume.as_str());
            self.qmp.execute::<Value>("blockdev-add", node).await?;
            let order = json!({
                "job-id": mirror.job, "device": mirror.drive.root(), "target": mirror.node, "sync": "full",
                "copy-mode": "write-blocking", "auto-dismiss": false,
            });
            self.qmp.execute::<Value>("blockdev-mirror", order).await?;
        }
        loop {
            if task.is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "mirror its disks: cancelled"));
            }
            let jobs = jobs(&self.qmp).await?;
            let (mut done, mut total, mut ready) = (0, 0, true);
            for mirror in mirrors {
                let job = jobs.get(&mirror.job);
                if let Some(error) = job.and_then(|job| job.error.clone()) {
                    let words = format!("mirror {}: {error}", mirror.drive.source);
                    return Err(Error::new(ErrorKind::Io, words));
                }
                let Some(job) = job.filter(|job| job.status != "concluded") else {
                    return Err(Error::new(
                        ErrorKind::Cancelled,
                        format!("mirror {}: somebody else ended the job", mirror.drive.source),
                    ));
                };
                (done, total) = (done + job.done_bytes, total + job.total_bytes);
                ready &= job.status == "ready";
            }
            task.progress(done, total);
            if ready {
                return Ok(());
            }
            sleep(POLL).await;
        }
    }

    /// Has the guest's device use the volume from now on.
    async fn switch(&self, mirror: &Mirror) -> Result<()> {
        let action = || format!("switch drive {} to its volume", mirror.drive.root());
        self.qmp.execute::<Value>("job-complete", json!({ "id": mirror.job })).await.with_context(action)?;
        let job = ended(&self.qmp, &mirror.job).await.with_context(action)?;
        if let Some(error) = job.and_then(|job| job.error) {
            return Err(Error::new(ErrorKind::Io, format!("{}: {error}", action())));
        }
        if !nodes_in_use(&self.qmp).await?.contains(&mirror.node) {
            return Err(Error::new(ErrorKind::Io, format!("{}: QEMU did not", action())));
        }
        Ok(())
    }
}

fn volume_name(vm: &Name, number: usize) -> Result<Name> {
    Ok(format!("{vm}-disk{number}").parse()?)
}

fn job_name(index: usize) -> String {
    format!("whimbrel-mirror{index}")
}

/// The name by which QEMU knows each volume.
fn nodes_of(spec: &VmSpec) -> impl Iterator<Item = &str> {
    spec.foreign.iter().flat_map(|foreign| foreign.disks.iter().map(|disk| disk.id.as_str()))
}

/// Block nodes of volumes that were made for the VM's disks.
fn nbd_nodes(spec: &VmSpec) -> Vec<String> {
    let disks = spec.foreign.iter().flat_map(|foreign| &foreign.disks);
    disks.filter(|disk| disk.bus == ForeignBus::Nbd).map(|disk| disk.id.clone()).collect()
}

/// Volumes that were made for the VM's disks.
fn made_for(spec: &VmSpec) -> impl Iterator<Item = &Name> {
    let disks = spec.foreign.iter().flat_map(|foreign| &foreign.disks);
    spec.volumes.iter().zip(disks).filter(|(_, disk)| disk.bus == ForeignBus::Nbd).map(|(volume, _)| volume)
}

/// The directory of the VM's sockets, which its QEMU must be able to walk into.
fn make_dir(dir: &PathBuf, (uid, gid): (u32, u32)) -> Result<()> {
    let action = || format!("make directory {}", dir.display());
    std::fs::create_dir_all(dir).with_context(action)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).with_context(action)?;
    let own = rustix::process::geteuid().as_raw();
    if uid != own {
        chown(dir, Some(uid), Some(gid)).with_context(action)?;
    }
    Ok(())
}

/// A job of QEMU's.
struct Job {
    status: String,
    error: Option<String>,
    done_bytes: u64,
    total_bytes: u64,
}

async fn jobs(qmp: &Qmp) -> Result<BTreeMap<String, Job>> {
    let list: Vec<Value> = qmp.execute("query-jobs", json!({})).await?;
    let job = |value: &Value| {
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
        let job = Job {
            status: text("status").unwrap_or_default(),
            error: text("error"),
            done_bytes: number("current-progress"),
            total_bytes: number("total-progress"),
        };
        Some((text("id")?, job))
    };
    Ok(list.iter().filter_map(job).collect())
}

/// Waits for a job's end, and forgets it; none if it is not known any more.
async fn ended(qmp: &Qmp, id: &str) -> Result<Option<Job>> {
    let deadline = Instant::now() + SWITCH_LIMIT;
    loop {
        let job = jobs(qmp).await?.remove(id);
        match job {
            None => return Ok(None),
            Some(job) if job.status == "concluded" => {
                qmp.execute::<Value>("job-dismiss", json!({ "id": id })).await?;
                return Ok(Some(job));
            }
            Some(job) if Instant::now() > deadline => {
                let words = format!("wait for job {id}: it is still {}", job.status);
                return Err(Error::new(ErrorKind::TimedOut, words));
            }
            Some(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Ends the mirrors into these nodes; the guest's disks stay what they are.
async fn stop_jobs(qmp: &Qmp, nodes: &[String]) {
    let known = jobs(qmp).await.unwrap_or_default();
    let ours = known.iter().filter(|(id, _)| id.starts_with("whimbrel-mirror"));
    for (id, job) in ours.filter(|_| !nodes.is_empty()) {
        let stopped = async {
            if job.status != "concluded" {
                qmp.execute::<Value>("block-job-cancel", json!({ "device": id, "force": true })).await?;
            }
            ended(qmp, id).await.map(drop)
        };
        if let Err(error) = stopped.await {
            tracing::warn!(job = id, %error, "a mirror does not end");
        }
    }
}

/// Removes the nodes of volumes that are not used after all.
async fn drop_nodes(qmp: &Qmp, nodes: &[String]) {
    for node in nodes {
        if let Err(error) = qmp.execute::<Value>("blockdev-del", json!({ "node-name": node })).await {
            tracing::debug!(node, %error, "remove a block node");
        }
    }
}

/// Block nodes that devices read and write.
async fn nodes_in_use(qmp: &Qmp) -> Result<BTreeSet<String>> {
    let drives: Vec<Value> = qmp.execute("query-block", json!({})).await?;
    let node =
        |drive: &Value| drive.pointer("/inserted/node-name").and_then(Value::as_str).map(str::to_owned);
    Ok(drives.iter().filter_map(node).collect())
}
