//! What the API says and does about volumes.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use whimbrel_host::records;
use whimbrel_host::volume::export_as;
use whimbrel_host::{Error, ErrorKind, Result};
use whimbrel_wire::api::{
    Export, TaskKind, TaskStarted, Volume, VolumeAttach, VolumeCheck, VolumeCreate, VolumeImport,
    VolumeRelink, VolumeResize, VolumeSnapshot,
};
use whimbrel_wire::meta::{IoLimits, VolumeRecord, key};
use whimbrel_wire::{Name, SnapshotRef};

use super::Node;
use crate::agent::forward;

impl Node {
    /// All volumes of the cluster.
    pub async fn volumes_list(&self) -> Result<Vec<Volume>> {
        let records = records::list::<VolumeRecord>(&*self.meta, key::VOLUMES).await?;
        Ok(records.into_iter().map(|record| self.describe_volume(record.value)).collect())
    }

    /// One volume.
    pub async fn volume_show(&self, name: &Name) -> Result<Volume> {
        Ok(self.describe_volume(self.volume_record(name).await?))
    }

    /// Makes a volume here.
    pub async fn volume_create(&self, request: VolumeCreate) -> Result<Volume> {
        Ok(self.describe_volume(self.volumes.create(&request).await?))
    }

    /// Checks a volume where its layer is.
    pub async fn volume_check(&self, name: &Name) -> Result<VolumeCheck> {
        let record = self.volume_record(name).await?;
        if let Some(answer) = self.at_holder(&record, "check", &()).await {
            return answer;
        }
        self.volumes.check(&record).await
    }

    /// Takes a snapshot of a volume, where it is.
    pub async fn volume_snapshot(&self, name: &Name, request: VolumeSnapshot) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        if let Some(answer) = self.at_holder(&record, "snapshot", &request).await {
            return answer;
        }
        Ok(self.describe_volume(self.vms.snapshot_volume(name, &request).await?))
    }

    /// Limits what the clients of a volume have of it, where it is.
    pub async fn volume_limit(&self, name: &Name, limits: IoLimits) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        if let Some(answer) = self.at_holder(&record, "limit", &limits).await {
            return answer;
        }
        Ok(self.describe_volume(self.vms.limit_volume(name, limits).await?))
    }

    /// Makes a volume larger, where it is.
    pub async fn volume_resize(&self, name: &Name, request: &VolumeResize) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        if let Some(answer) = self.at_holder(&record, "resize", request).await {
            return answer;
        }
        Ok(self.describe_volume(self.vms.resize_volume(name, request).await?))
    }

    /// Removes a snapshot of a volume of this host.
    pub async fn snapshot_remove(&self, snapshot: SnapshotRef) -> Result<TaskStarted> {
        let record = self.volume_record(&snapshot.volume).await?;
        self.refuse_elsewhere(&record)?;
        if !record.layers.iter().any(|layer| layer.snapshot.as_ref() == Some(&snapshot.snapshot)) {
            return Err(Error::new(ErrorKind::NotFound, format!("find snapshot {snapshot}: there is none"))
                .hint(format!("see `whimbrel volume show {}`", snapshot.volume)));
        }
        Ok(self.begin_removal(snapshot))
    }

    /// Goes on with removals that an earlier process of this agent began.
    pub async fn resume_removals(&self) -> Result<()> {
        for snapshot in self.volumes.unfinished_removals().await? {
            tracing::info!(%snapshot, "going on with the removal of a snapshot");
            self.begin_removal(snapshot);
        }
        Ok(())
    }

    fn begin_removal(&self, snapshot: SnapshotRef) -> TaskStarted {
        let task = self.tasks.start(TaskKind::Merge, format!("volume {snapshot}"));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (volumes, task) = (self.volumes.clone(), Arc::new(task));
        tokio::spawn(async move {
            let result = volumes.remove_snapshot(&snapshot, &task).await;
            task.end(&result);
        });
        started
    }

    /// Shows links under a volume that do not hold, or makes them hold.
    pub async fn volume_relink(&self, name: &Name, request: VolumeRelink) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        self.refuse_elsewhere(&record)?;
        let accept = request.accept_changed_parent;
        let broken = self.volumes.relink(name, accept).await?;
        if accept || broken.is_empty() {
            return Ok(self.describe_volume(self.volume_record(name).await?));
        }
        let links: Vec<String> = broken
            .iter()
            .map(|link| {
                format!(
                    "layer {} was made over content {} of layer {}, which now has {}",
                    link.layer, link.was, link.parent, link.now
                )
            })
            .collect();
        Err(Error::new(ErrorKind::Refused, format!("relink volume {name}: {}", links.join("; ")))
            .hint("what the volume reads may be a mixture; if it is wanted: --accept-changed-parent"))
    }

    /// Makes a volume from a file of this host.
    pub async fn volume_import(&self, request: VolumeImport) -> Result<TaskStarted> {
        let task = self.tasks.start(TaskKind::Import, format!("volume {}", request.name));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (volumes, convert, task) = (self.volumes.clone(), Arc::clone(&self.convert), Arc::new(task));
        tokio::spawn(async move {
            let result = volumes.import(&request, convert, &task).await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Writes a volume of this host to a file.
    pub async fn volume_export(&self, name: &Name, request: Export) -> Result<TaskStarted> {
        let record = self.volume_record(name).await?;
        self.refuse_elsewhere(&record)?;
        let file = PathBuf::from(&request.file);
        let what = export_as(&file, &request)?;
        let task = self.tasks.start(TaskKind::Export, format!("volume {name}"));
        let started = TaskStarted { task: task.id(), host: self.host.clone() };
        let (volumes, convert, task) = (self.volumes.clone(), Arc::clone(&self.convert), Arc::new(task));
        tokio::spawn(async move {
            let result = volumes.export(&record, file, what, request.chain, convert, &task).await;
            task.end(&result);
        });
        Ok(started)
    }

    /// Shows a volume of this host on a socket, on a TCP port, or as a file.
    pub async fn volume_attach(&self, name: &Name, request: &VolumeAttach) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        self.refuse_elsewhere(&record)?;
        self.volumes.attach(&record, request).await?;
        Ok(self.describe_volume(record))
    }

    /// Takes the socket or the file away.
    pub async fn volume_detach(&self, name: &Name) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        self.volumes.detach(name).await?;
        Ok(self.describe_volume(record))
    }

    /// Deletes a volume and its data.
    pub async fn volume_remove(&self, name: &Name) -> Result<Volume> {
        let record = self.volume_record(name).await?;
        if record.right.holder != self.host {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("remove volume {name}: its layer is at host {}", record.right.holder),
            )
            .hint("remove it there"));
        }
        self.volumes.remove(name).await?;
        Ok(self.describe_volume(record))
    }

    /// Has the host that holds a volume do what only it can; nothing if that is this one.
    async fn at_holder<T: DeserializeOwned>(
        &self,
        record: &VolumeRecord,
        action: &str,
        request: &impl Serialize,
    ) -> Option<Result<T>> {
        let (holder, name) = (&record.right.holder, &record.name);
        if *holder == self.host {
            return None;
        }
        Some(forward::post(self, holder, format!("/v1/volumes/{name}/{action}"), request).await)
    }

    fn refuse_elsewhere(&self, record: &VolumeRecord) -> Result<()> {
        if record.right.holder == self.host {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!("use volume {}: host {} holds the right to write it", record.name, record.right.holder),
        )
        .hint("do this on that host"))
    }

    async fn volume_record(&self, name: &Name) -> Result<VolumeRecord> {
        Ok(records::must::<VolumeRecord>(&*self.meta, &key::volume(name), &format!("volume {name}"))
            .await?
            .value)
    }

    fn describe_volume(&self, record: VolumeRecord) -> Volume {
        let here = (record.right.holder == self.host).then(|| self.volumes.figures(&record)).flatten();
        Volume {
            data_id: here.as_ref().map_or(record.data_id, |here| here.data_id),
            layer_bytes: here.as_ref().map(|here| here.layer_bytes),
            exports: self.volumes.exports(&record.name),
            chain: self.volumes.chain(&record),
            name: record.name,
            disk_id: record.disk_id,
            size_bytes: record.size_bytes,
            parent: record.image.map(|parent| parent.image),
            holder: record.right.holder,
            epoch: record.right.epoch.0,
            attached_to: record.attached_to,
            depends_on: record.depends_on,
            limits: record.limits,
        }
    }
}
