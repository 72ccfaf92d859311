//! Volumes become larger, in use or at rest.
//!
//! ```text
//!   record: the new size ──► layer (disk::grow) ──► slot ──► front-end told ──► guest sees it
//!          │ the agent ends
//!          └──► the next open, or the command again, makes the layer as large
//! ```
//!
//! Invariants
//! * The record comes first: a target of a move makes room by it, and no layer is larger than it.
//! * A volume that moves, or whose VM does, keeps its size until that is over: the record changes only together with the
//!   VM's saying that no move is under way.
//!
//! Not here: which sizes are allowed (`engine::disk::resize`), how a layer grows (`disk::grow`), how a front-end hears
//! of it (`export`).

use std::sync::Arc;
use std::time::Duration;

use whimbrel_engine::disk::resize;
use whimbrel_wire::Name;
use whimbrel_wire::meta::{VmRecord, VolumeRecord, key};

use super::Volumes;
use super::snapshot::SnapshotWith;
use crate::blocking::blocking;
use crate::disk::Report;
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::{SizeNotice, SlotState};
use crate::records::{self, Change};

/// How long a front-end has to ask for the new size before the command says that it is done.
const HEAR_LIMIT: Duration = Duration::from_secs(2);

impl Volumes {
    /// Makes a volume larger; gives its record. Does nothing if it has that size and its layer too.
    ///
    /// `InvalidInput`: it would become smaller. `Refused`: the volume is held by another host, its VM moves, its blocks
    /// are still at another host, or a snapshot of it is being removed.
    pub async fn resize(&self, volume: &Name, asked_bytes: u64, with: &SnapshotWith) -> Result<VolumeRecord> {
        let action = || format!("resize volume {volume}");
        let _claim = self.claim([volume.clone()], "it is being resized").with_context(action)?;
        let old = self.record(volume).await?;
        self.must_be_local(&old.value).with_context(action)?;
        self.finish_switch(&old.value, with).await.with_context(action)?;
        let refuse = |why: &str| Error::new(ErrorKind::Refused, format!("{}: {why}", action()));
        if old.value.layers.iter().any(|layer| layer.removing) {
            return Err(
                refuse("a snapshot of it is being removed").hint("wait until that is over, or repeat it")
            );
        }
        let moving =
            || refuse("its VM is being moved").hint("wait until that is over; see `whimbrel task list`");
        if with.slot.as_ref().is_some_and(|slot| slot.state() != SlotState::Active) {
            return Err(moving());
        }
        let mut change = Change::default();
        if let Some(vm) = &old.value.attached_to {
            let vm = records::must::<VmRecord>(self.meta(), &key::vm(vm), &format!("vm {vm}")).await?;
            if vm.value.attempt.is_some() {
                return Err(moving());
            }
            change = change.require(&vm);
        }
        if self.opened(old.value.disk_id).is_some_and(|layer| !layer.is_writable()) {
            return Err(refuse(
                "its layer takes no writes: a move is not over, or this host's disk had an error",
            ));
        }
        let size_bytes = old.value.size_bytes;
        let next = resize::grow_to(size_bytes, asked_bytes).map_err(Error::from).with_context(action)?;
        let record = VolumeRecord { size_bytes: next.unwrap_or(size_bytes), ..old.value.clone() };
        if next.is_some() {
            change.replace(&old, &record)?.commit_or_refuse(self.meta(), &action()).await?;
        }
        self.grow_layer(&record).await.with_context(action).map_err(|error| match next {
            Some(_) => error.hint("the volume's record has the new size: the layer follows when it is opened next, or the command is repeated"),
            None => error,
        })?;
        if let Some(slot) = &with.slot {
            slot.grow(record.size_bytes);
        }
        tracing::info!(%volume, size_bytes = record.size_bytes, was = size_bytes, "resized");
        Ok(record)
    }

    /// Makes the layer as large as the record says, open or not.
    async fn grow_layer(&self, record: &VolumeRecord) -> Result<()> {
        let shared = &self.shared;
        // Nobody opens it meanwhile.
        let opening = Arc::clone(shared.opening.lock().entry(record.disk_id).or_default());
        let _one = opening.lock().await;
        let (layer, dir) = (self.opened(record.disk_id), shared.dir.clone());
        let (id, size_bytes, epoch) = (record.disk_id, record.size_bytes, record.right.epoch);
        blocking("resize a layer", move || match layer {
            Some(layer) => layer.grow(size_bytes),
            None => dir.grow_at_rest(id, size_bytes, epoch),
        })
        .await
    }

    /// Has the front-end of a volume that became larger hear of it, and waits for that a little.
    pub async fn tell_size(&self, volume: &Name, notice: Option<SizeNotice>) {
        let Some(notice) = notice else { return };
        let told = blocking("tell a front-end its disk's size", move || Ok(notice.deliver(HEAR_LIMIT))).await;
        if !matches!(told, Ok(true)) {
            tracing::info!(%volume, "the guest does not look at its disk's new size now; it hears again when it runs");
        }
    }

    /// What is to be told to who is connected to an exported volume.
    pub fn export_notice(&self, volume: &Name) -> Option<SizeNotice> {
        self.shared.exports.lock().get(volume)?.server.size_notice()
    }

    /// What the record says of the sizes and the layers do not: problems; and a resize that is not carried out, which is
    /// none.
    pub(super) async fn compare_size(
        &self,
        volume: &Name,
        reports: &[Report],
        problems: &mut Vec<String>,
    ) -> Result<Option<String>> {
        // Read after the layers: it changes before they do.
        let record = self.record(volume).await?.value;
        for (layer, report) in record.layers.iter().rev().zip(reports.iter().skip(1)) {
            let found = report.header.size_bytes;
            if layer.disk_id == report.header.disk_id && layer.size_bytes != found {
                let recorded = layer.size_bytes;
                problems
                    .push(format!("layer {} has {found} bytes, its record says {recorded}", layer.disk_id));
            }
        }
        let Some(top) = reports.first().filter(|top| top.header.disk_id == record.disk_id) else {
            return Ok(None);
        };
        let (found, recorded) = (top.header.size_bytes, record.size_bytes);
        let text = format!("layer {} has {found} bytes, its record says {recorded}", record.disk_id);
        if found > recorded {
            problems.push(text);
            return Ok(None);
        }
        Ok((found < recorded).then(|| format!("{text}: it follows when it is opened next")))
    }
}

#[cfg(test)]
mod test;
