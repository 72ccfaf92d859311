//! What the API says and does about VMs.

use whimbrel_engine::migrate::handover;
use whimbrel_host::records::{self, Versioned};
use whimbrel_host::{Context as _, Error, ErrorKind, Result};
use whimbrel_wire::api::{
    TaskKind, TaskStarted, Vm, VmAdopt, VmConsole, VmMigrate, VmRecover, VmRun, VmStop,
};
use whimbrel_wire::meta::{VmRecord, VmState, VolumeRecord, key};
use whimbrel_wire::{HostId, Name};

use super::Node;
use crate::agent::forward;

impl Node {
    /// All VMs of the cluster.
    pub async fn vms_list(&self) -> Result<Vec<Vm>> {
        let records = records::list::<VmRecord>(&*self.meta, key::VMS).await?;
        let mut vms = Vec::with_capacity(records.len());
        for record in records {
            vms.push(self.describe(record.value).await);
        }
        Ok(vms)
    }

    /// One VM.
    pub async fn vm_show(&self, name: &Name) -> Result<Vm> {
        Ok(self.describe(self.vm_record(name).await?.value).await)
    }

    /// Starts a VM here.
    pub async fn vm_run(&self, request: VmRun) -> Result<Vm> {
        let record = self.vms.run(request).await?;
        Ok(self.describe(record).await)
    }

    /// Takes over a running QEMU: what speaks against it is answered at once, mirroring its disks is a task.
    pub async fn vm_adopt(&self, request: VmAdopt) -> Result<TaskStarted> {
        let adoption = self.vms.look_at(&request).await?;
        let task = self.tasks.start(TaskKind::Adopt, format!("vm {}", request.name));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        tokio::spawn(async move {
            let result = adoption.carry_out(&task).await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Where the VM's console is.
    pub async fn vm_console(&self, name: &Name) -> Result<VmConsole> {
        let vm = self.vms.must_be_here(name).await?;
        let socket = vm.console_path().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("open the console of vm {name}: whoever started it gave it none on a socket"),
            )
            .hint("it gets one when it is moved to another host")
        })?;
        Ok(VmConsole { socket: socket.to_string_lossy().into_owned() })
    }

    /// Shuts a VM down, wherever it runs.
    pub async fn vm_stop(&self, name: &Name, request: VmStop) -> Result<Vm> {
        let record = self.vm_record(name).await?.value;
        let holder = record.right.holder;
        // What is kept here of a VM that has moved away is not the VM.
        if holder != self.host && (self.vms.here(name).is_none() || self.migrations.can_run(name)?.is_some())
        {
            return forward::post(self, &holder, format!("/v1/vms/{name}/stop"), &request).await;
        }
        self.vms.stop(name, request.force).await?;
        self.vm_show(name).await
    }

    /// Moves a VM, wherever it runs.
    pub async fn vm_migrate(&self, name: &Name, request: VmMigrate) -> Result<TaskStarted> {
        let holder = self.vm_record(name).await?.value.right.holder;
        if holder != self.host {
            return forward::post(self, &holder, format!("/v1/vms/{name}/migrate"), &request).await;
        }
        let task = self.migrations.start(name, &request).await?;
        Ok(TaskStarted { task, host: self.host.clone() })
    }

    /// Takes a VM over from a dead host.
    pub async fn vm_recover(&self, name: &Name, request: VmRecover) -> Result<Vm> {
        if request.on != self.host {
            let on = request.on.clone();
            return forward::post(self, &on, format!("/v1/vms/{name}/recover"), &request).await;
        }
        let action = || format!("recover vm {name} on host {}", self.host);
        let record = self.vm_record(name).await?.value;
        if !request.fenced {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{}: host {} holds the right and may still run it", action(), record.right.holder),
            )
            .hint("make sure that host is off or cut off from network and storage, then add --fenced"));
        }
        self.blocks_must_be_there(&record, &request.on).await.with_context(action)?;
        // A host that has part in an unfinished move goes on with the guest itself; others start it from its disks.
        let in_move = match self.migrations.can_run(name)? {
            Some(true) => true,
            Some(false) => return Err(self.part_only(&action(), &record)),
            None => {
                self.disks_must_be_here(&record).await.with_context(action)?;
                false
            }
        };
        let seen = self.migrations.read_records(name).await?;
        let cas = handover::recover(&seen, &self.host)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{}: there is none", action())))?;
        self.migrations.change_records(&cas).await.with_context(action)?;
        tracing::warn!(vm = %name, from = %record.right.holder, "VM taken over by the operator's word");
        if !in_move {
            self.vms.start_recovered(&cas.vm.0).await.with_context(action)?;
        }
        self.vm_show(name).await
    }

    /// A volume that lacks blocks can only be used where those are.
    async fn blocks_must_be_there(&self, record: &VmRecord, on: &HostId) -> Result<()> {
        for name in &record.spec.volumes {
            let what = format!("volume {name}");
            let volume = records::must::<VolumeRecord>(&*self.meta, &key::volume(name), &what).await?.value;
            if let Some(host) = volume.depends_on.filter(|host| host != on) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("start from {what}: some of its blocks are at host {host} only"),
                )
                .hint(format!(
                    "bring host {} back, or recover the VM on host {host}: there it is as it was when it moved away",
                    record.right.holder
                )));
            }
        }
        Ok(())
    }

    fn part_only(&self, action: &str, record: &VmRecord) -> Error {
        let holder = &record.right.holder;
        let text = format!("{action}: a move to here was cut short before all of the VM had come");
        Error::new(ErrorKind::Refused, text)
            .hint(format!("bring host {holder} back: it has all of the VM and lets it go on"))
    }

    async fn disks_must_be_here(&self, record: &VmRecord) -> Result<()> {
        for name in &record.spec.volumes {
            let what = format!("volume {name}");
            let volume = records::must::<VolumeRecord>(&*self.meta, &key::volume(name), &what).await?.value;
            if !self.volumes.is_here(volume.disk_id) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("start from {what}: its layer is at host {} and not here", volume.right.holder),
                )
                .hint(format!(
                    "bring host {} back, or recover the VM on the host that has the layer",
                    volume.right.holder
                )));
            }
        }
        Ok(())
    }

    async fn vm_record(&self, name: &Name) -> Result<Versioned<VmRecord>> {
        records::must(&*self.meta, &key::vm(name), &format!("vm {name}")).await
    }

    async fn describe(&self, record: VmRecord) -> Vm {
        let mut vm = Vm {
            name: record.name.clone(),
            host: record.right.holder.clone(),
            state: record.state,
            epoch: record.right.epoch.0,
            mode: None,
            memory_bytes: record.spec.memory_bytes,
            volume: record.spec.volumes.first().cloned(),
            volumes: record.spec.volumes.clone(),
            waiting_for: record.waiting_for.clone(),
            mode_reasons: Vec::new(),
            pid: None,
        };
        if record.right.holder == self.host
            && matches!(record.state, VmState::Running | VmState::Migrating)
            && let Some(here) = self.vms.here(&record.name)
        {
            vm.pid = Some(here.process.pid());
            match self.vms.precheck(&here).await {
                Ok(report) => {
                    vm.mode = report.mode;
                    vm.mode_reasons = report.mode_a_reasons;
                    vm.mode_reasons.extend(report.refusals);
                }
                Err(error) => vm.mode_reasons.push(error.to_string()),
            }
            if let Some(disk) = here.disks.iter().find(|disk| disk.waits_for_space()) {
                vm.waiting_for.get_or_insert(format!(
                    "space for volume {}: host {} has none left, and the guest goes on when it has",
                    disk.volume, self.host
                ));
            }
        }
        for name in &record.spec.volumes {
            if let Ok(Some(volume)) = records::get::<VolumeRecord>(&*self.meta, &key::volume(name)).await
                && let Some(host) = volume.value.depends_on
            {
                vm.waiting_for.get_or_insert(format!("volume {name}: depends on host {host}"));
            }
        }
        vm
    }
}
