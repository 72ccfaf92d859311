//! Snapshots of volumes, and volumes made from them.
//!
//! ```text
//!   snapshot:  new empty layer made on the writable one ─► record: the new one is the volume's ─► disk fenced,
//!              old one sealed, disk served from the new one
//!   remove:    record: "removing" ─► the layer's blocks into a neighbour (disk::Merge) ─► record: it is gone
//! ```
//!
//! The record changes before the layers change places, while the guest still writes the old one: until then nothing
//! was written to the new one, so whoever opens the chain after a crash in between finds every write, below an empty
//! layer. An empty layer over the old one reads the same, so neither order of events shows.
//!
//! Invariants
//! * A layer that another volume of this host needs is not removed, nor merged under it.
//! * Who changes a volume's chain, or moves it, has a [`Claim`] to it.
//!
//! Not here: chains on disk (`disk::chain`), the order of a merge (`engine::disk::merge`), the guest's file systems
//! (`guest::agent`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use whimbrel_engine::disk::identity::CHAIN_MAX;
use whimbrel_wire::api::{VolumeCreate, VolumeLayer, VolumeSnapshot};
use whimbrel_wire::meta::{LayerRecord, VolumeRecord, key};
use whimbrel_wire::record::layer::{Parent, State};
use whimbrel_wire::{DiskId, Epoch, Name, Object, Right, SnapshotRef};

use super::Volumes;
use crate::blocking::blocking;
use crate::clock;
use crate::disk::{Layer, LayerSpec, Merge, MergePlan, Relinked, Report};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::{DeviceSlot, SlotState};
use crate::guest::agent::GuestAgent;
use crate::records::{self, Change, Versioned};
use crate::task::TaskHandle;

/// How long a running request of the guest has to end when its disk changes layers.
const FENCE_LIMIT: Duration = Duration::from_secs(5);
/// How often a removal is tried again when its volume was opened or closed under it.
const TRIES: u32 = 5;
/// … and how long is waited between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// Which volumes somebody works on, and at what.
#[derive(Clone, Default)]
pub(super) struct Claims {
    taken: Arc<Mutex<HashMap<Name, &'static str>>>,
    /// Layers that came for a volume and that nothing here lies on yet.
    pinned: Arc<Mutex<HashSet<(Name, DiskId)>>>,
}

/// Held by who changes the chains of some volumes; nobody else does meanwhile.
#[must_use]
pub struct Claim {
    claims: Claims,
    names: Vec<Name>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = self.claims.taken.lock();
        for name in &self.names {
            taken.remove(name);
        }
    }
}

/// What uses the volume while a snapshot of it is made.
#[derive(Default)]
pub struct SnapshotWith {
    /// Where the requests of its user find it.
    pub slot: Option<DeviceSlot>,
    /// The agent inside the guest that uses it.
    pub agent: Option<GuestAgent>,
}

impl Volumes {
    /// Reserves volumes for a change of their chains, or a move; all of them or none.
    pub fn claim(&self, names: impl IntoIterator<Item = Name>, what: &'static str) -> Result<Claim> {
        let claims = self.shared.claims.clone();
        let names: Vec<Name> = names.into_iter().collect();
        let mut taken = claims.taken.lock();
        if let Some((name, why)) = names.iter().find_map(|name| taken.get(name).map(|why| (name, why))) {
            return Err(Error::new(ErrorKind::Refused, format!("use volume {name}: {why}"))
                .hint("wait until that is over; see `whimbrel task list`"));
        }
        taken.extend(names.iter().map(|name| (name.clone(), what)));
        drop(taken);
        Ok(Claim { claims, names })
    }

    /// Takes a snapshot; gives the volume's record with its new writable layer.
    ///
    /// `Refused`: the volume is held by another host, moves, or depends on another host. `TimedOut`: a request of the
    /// guest did not end; nothing changed.
    pub async fn snapshot(
        &self,
        volume: &Name,
        request: &VolumeSnapshot,
        with: &SnapshotWith,
    ) -> Result<VolumeRecord> {
        let action = format!("snapshot volume {volume}");
        let _claim = self.claim([volume.clone()], "a snapshot of it is being made")?;
        let old = self.record(volume).await?;
        self.finish_switch(&old.value, with).await.with_context(|| action.clone())?;
        let record = &old.value;
        let name = self.snapshot_name(record, request.name.as_ref()).with_context(|| action.clone())?;
        if with.slot.as_ref().is_some_and(|slot| slot.state() != SlotState::Active) {
            let why = format!("{action}: its VM is on its way to or from another host");
            return Err(Error::new(ErrorKind::Refused, why));
        }
        let in_use = with.slot.is_some();
        let below = self.open(record).await?;
        let (dir, epoch, on) = (self.shared.dir.clone(), record.right.epoch, Arc::clone(&below));
        let (spec, above) = blocking("make a layer", move || {
            // While the guest runs: what is left for the pause is what it writes from here on.
            on.checkpoint_before_seal()?;
            let data_id = if in_use { on.settle_id()? } else { on.info().data_id };
            let info = on.info();
            let parent = Parent::Layer { disk_id: info.disk_id, data_id };
            let spec = LayerSpec {
                segment_blocks: on.spec().segment_blocks,
                ..LayerSpec::new(parent, info.size_bytes, epoch)
            };
            dir.create(&spec)?;
            let above = Layer::open(&dir.path(spec.disk_id), Some(on), epoch, true)?;
            Ok((spec, above))
        })
        .await
        .with_context(|| action.clone())?;

        let frozen = match (&with.agent, request.no_quiesce) {
            (Some(agent), false) => agent.freeze().await,
            _ => None,
        };
        let result = async {
            let made = LayerRecord {
                disk_id: record.disk_id,
                data_id: match spec.parent {
                    Parent::Layer { data_id, .. } => data_id,
                    _ => record.data_id,
                },
                size_bytes: spec.size_bytes,
                snapshot: Some(name),
                made_s: clock::wall_s(),
                quiesced: frozen.is_some(),
                removing: false,
            };
            let next = VolumeRecord {
                disk_id: spec.disk_id,
                data_id: spec.data_id,
                layers: record.layers.iter().cloned().chain([made]).collect(),
                right: Right { object: Object::Layer(spec.disk_id), ..record.right.clone() },
                ..record.clone()
            };
            let change = Change::default().replace(&old, &next)?;
            if let Err(error) = change.commit_or_refuse(&*self.shared.meta, &action).await {
                if error.kind() == ErrorKind::Refused {
                    self.discard(&above, spec.disk_id);
                }
                // Of any other the outcome is not known: both layers stay, and the record decides.
                return Err(error);
            }
            if let Err(error) = self.switch(&next, &below, &above, with).await {
                self.undo_switch(&old.value, &next, &below, &above).await;
                return Err(error).with_context(|| action.clone());
            }
            Ok(next)
        }
        .await;
        if let (Some(agent), Some(frozen)) = (&with.agent, frozen) {
            agent.thaw(frozen).await;
        }
        result
    }

    /// Has the volume served from its new layer: requests wait for as long as the old one takes to become durable.
    async fn switch(
        &self,
        next: &VolumeRecord,
        below: &Arc<Layer>,
        above: &Arc<Layer>,
        with: &SnapshotWith,
    ) -> Result<()> {
        let (below, above, slot) = (Arc::clone(below), Arc::clone(above), with.slot.clone());
        let volumes = self.clone();
        let (disk_id, below_id, name) = (next.disk_id, below.info().disk_id, next.name.clone());
        blocking("put a layer on a volume", move || {
            use crate::block_dev::BlockDev as _;
            below.flush()?;
            if let Some(slot) = &slot {
                slot.fence(FENCE_LIMIT)?;
            }
            if let Err(error) = below.seal() {
                // What could not be made durable must not be hidden from who asks for it to be.
                if let Some(slot) = &slot {
                    slot.activate(below)?;
                }
                return Err(error);
            }
            let shared = &volumes.shared;
            shared.dir.keep_sealed(&below);
            shared.open.lock().remove(&below_id);
            volumes.keep(disk_id, Arc::clone(&above));
            if let Some(exported) = shared.exports.lock().get_mut(&name) {
                exported.disk_id = disk_id;
            }
            match &slot {
                Some(slot) => slot.activate(above),
                None => Ok(()),
            }
        })
        .await
    }

    /// A snapshot whose record was made by an earlier call that could not go on.
    pub(super) async fn finish_switch(&self, record: &VolumeRecord, with: &SnapshotWith) -> Result<()> {
        let Some(last) = record.layers.last() else { return Ok(()) };
        let Some(below) = self.opened(last.disk_id).filter(|layer| layer.is_writable()) else {
            return Ok(());
        };
        let (path, epoch, base) =
            (self.shared.dir.path(record.disk_id), record.right.epoch, Arc::clone(&below));
        let opened = blocking("open a layer", move || Layer::open(&path, Some(base), epoch, true));
        let above = match self.opened(record.disk_id) {
            Some(above) => above,
            None => opened.await?,
        };
        self.switch(record, &below, &above, with).await
    }

    /// The record goes back to what it said, as long as the old layer is the one that is written.
    async fn undo_switch(
        &self,
        old: &VolumeRecord,
        next: &VolumeRecord,
        below: &Arc<Layer>,
        above: &Arc<Layer>,
    ) {
        if !below.is_writable() {
            return;
        }
        let undone = async {
            let now = self.record(&old.name).await?;
            if now.value == *next {
                let what = format!("undo the snapshot of volume {}", old.name);
                Change::default().replace(&now, old)?.commit_or_refuse(&*self.shared.meta, &what).await?;
                self.discard(above, next.disk_id);
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = undone.await {
            tracing::warn!(volume = %old.name, %error, "a snapshot that failed is taken up by the next one");
        }
    }

    /// Removes a layer that was made in vain.
    fn discard(&self, above: &Layer, disk_id: DiskId) {
        if let Err(error) = above.close().and_then(|()| self.shared.dir.remove(disk_id)) {
            tracing::warn!(%disk_id, %error, "a layer that is of no use was not removed");
        }
    }

    fn snapshot_name(&self, record: &VolumeRecord, asked: Option<&Name>) -> Result<Name> {
        self.must_be_local(record)?;
        if let Some(leaving) = record.layers.iter().find(|layer| layer.removing) {
            let which =
                leaving.snapshot.as_ref().map_or_else(|| leaving.disk_id.to_string(), ToString::to_string);
            return Err(Error::new(ErrorKind::Refused, format!("snapshot {which} is being removed"))
                .hint("wait until that is over, or repeat its removal"));
        }
        if record.layers.len() + 2 > CHAIN_MAX {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("it has {} layers already, as many as a chain may have", record.layers.len() + 1),
            )
            .hint("remove snapshots that are of no use"));
        }
        let taken = |name: &Name| record.layers.iter().any(|layer| layer.snapshot.as_ref() == Some(name));
        match asked {
            Some(name) if taken(name) => {
                Err(Error::new(ErrorKind::AlreadyExists, format!("it has a snapshot {name} already")))
            }
            Some(name) => Ok(name.clone()),
            None => {
                let free = (1..=CHAIN_MAX + 1).find_map(|number| {
                    let name = format!("snap-{number}").parse::<Name>().ok()?;
                    (!taken(&name)).then_some(name)
                });
                free.ok_or_else(|| Error::new(ErrorKind::Internal, "find a name for a snapshot"))
            }
        }
    }

    pub(super) fn must_be_local(&self, record: &VolumeRecord) -> Result<()> {
        if record.right.holder != self.shared.host {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("host {} holds the right to write it", record.right.holder),
            )
            .hint("do this on that host"));
        }
        if let Some(host) = &record.depends_on {
            return Err(Error::new(ErrorKind::Refused, format!("it depends on host {host}"))
                .hint("wait until its blocks are here; see `whimbrel task list`"));
        }
        Ok(())
    }

    pub(super) async fn record(&self, volume: &Name) -> Result<Versioned<VolumeRecord>> {
        records::must::<VolumeRecord>(&*self.shared.meta, &key::volume(volume), &format!("volume {volume}"))
            .await
    }

    /// Volumes that this host holds.
    async fn held(&self) -> Result<Vec<Versioned<VolumeRecord>>> {
        let mut all = records::list::<VolumeRecord>(&*self.shared.meta, key::VOLUMES).await?;
        all.retain(|record| record.value.right.holder == self.shared.host);
        Ok(all)
    }

    /// Makes a volume that goes on from a snapshot of another.
    pub(super) async fn create_from(
        &self,
        request: &VolumeCreate,
        from: &SnapshotRef,
    ) -> Result<VolumeRecord> {
        let shared = &self.shared;
        let action = || format!("create volume {} from {from}", request.name);
        let _claim = self.claim([from.volume.clone()], "a volume is being made from it")?;
        let source = self.record(&from.volume).await?;
        self.must_be_local(&source.value).with_context(action)?;
        let at = position(&source.value, from)?;
        let chain = source.value.layers.get(..=at).unwrap_or_default();
        let Some(on) = chain.last().filter(|layer| !layer.removing) else {
            return Err(Error::new(ErrorKind::Refused, format!("{}: it is being removed", action())));
        };
        let size_bytes = request.size_bytes.unwrap_or(on.size_bytes).next_multiple_of(512);
        if size_bytes < on.size_bytes {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: {size_bytes} bytes are less than the snapshot's {}", action(), on.size_bytes),
            ));
        }
        let parent = Parent::Layer { disk_id: on.disk_id, data_id: on.data_id };
        let spec = LayerSpec::new(parent, size_bytes, Epoch(1));
        let (dir, made, below) = (shared.dir.clone(), spec.clone(), on.disk_id);
        blocking("make a layer", move || {
            dir.seal(below)?;
            dir.create(&made)
        })
        .await
        .with_context(action)?;
        let layers = chain.iter().map(|layer| LayerRecord { snapshot: None, ..layer.clone() }).collect();
        let below = (source.value.image.clone(), layers);
        let change = Change::default().require(&source);
        self.add_record(&request.name, &spec, below, change, &action()).await
    }

    /// Removes a snapshot: its blocks go into a neighbour, while the disk is in use.
    ///
    /// `Refused`: other volumes were made from it; they are named.
    pub async fn remove_snapshot(&self, what: &SnapshotRef, task: &Arc<TaskHandle>) -> Result<()> {
        let action = || format!("remove snapshot {what}");
        let (record, affected) = self.who_shares(what).await.with_context(action)?;
        let names = affected.iter().map(|record| record.value.name.clone());
        let _claim = self.claim(names, "a snapshot under it is being removed").with_context(action)?;
        // Once more, now that nobody else changes them.
        let (_, affected) = match self.who_shares(what).await {
            Ok(now) if now.0 == record => now,
            Ok(_) => {
                return Err(Error::new(ErrorKind::Refused, format!("{}: its volume has changed", action()))
                    .hint("repeat the command"));
            }
            Err(error) => return Err(error),
        };
        let at = position(&record, what)?;
        let plan = MergePlan {
            layer: record.layers.get(at).map_or(record.disk_id, |layer| layer.disk_id),
            child: record.layers.get(at + 1).map_or(record.disk_id, |layer| layer.disk_id),
        };
        self.mark_removing(&affected, plan.layer).await.with_context(action)?;
        task.phase("merge");
        let stands = self.merge(&record, plan, task).await.with_context(action)?;
        self.forget_layer(&affected, plan, stands).await.with_context(action)
    }

    /// The volume of a snapshot, and all volumes (it is the first) whose chains go through that layer and the one on it.
    async fn who_shares(&self, what: &SnapshotRef) -> Result<(VolumeRecord, Vec<Versioned<VolumeRecord>>)> {
        let record = self.record(&what.volume).await?;
        self.must_be_local(&record.value)?;
        let at = position(&record.value, what)?;
        let layer = record.value.layers.get(at).map(|layer| layer.disk_id);
        let on_it = |record: &VolumeRecord| {
            let at = record.layers.iter().position(|other| Some(other.disk_id) == layer)?;
            Some(record.layers.get(at + 1).map_or(record.disk_id, |layer| layer.disk_id))
        };
        let child = on_it(&record.value);
        let (mut affected, mut dependents) = (Vec::new(), Vec::new());
        for other in self.held().await? {
            match on_it(&other.value) {
                None => {}
                Some(_) if other.value.name == record.value.name => affected.insert(0, other),
                Some(id) if Some(id) == child => affected.push(other),
                Some(_) => dependents.push(other.value.name.to_string()),
            }
        }
        if !dependents.is_empty() {
            return Err(made_from("it", &dependents));
        }
        for other in &affected {
            self.must_be_local(&other.value)
                .with_context(|| format!("volume {} shares it", other.value.name))?;
        }
        Ok((record.value, affected))
    }

    async fn mark_removing(&self, affected: &[Versioned<VolumeRecord>], layer: DiskId) -> Result<()> {
        let mut change = Change::default();
        for record in affected {
            let mut next = record.value.clone();
            next.layers.iter_mut().filter(|l| l.disk_id == layer).for_each(|l| l.removing = true);
            change = change.replace(record, &next)?;
        }
        change.commit_or_refuse(&*self.shared.meta, "say that a snapshot is being removed").await
    }

    async fn merge(&self, record: &VolumeRecord, plan: MergePlan, task: &Arc<TaskHandle>) -> Result<DiskId> {
        let mut tries = 0;
        loop {
            tries += 1;
            // The layer that is written is merged through the handle that its user has.
            if plan.child == record.disk_id && self.is_here(record.disk_id) {
                self.open(&self.record(&record.name).await?.value).await?;
            }
            let (volumes, dir, reported) = (self.clone(), self.shared.dir.clone(), Arc::clone(task));
            let merged = blocking("merge layers", move || {
                let open = |id: DiskId| volumes.opened(id).filter(|layer| layer.is_writable());
                let mut progress = |done: u64, total: u64| {
                    reported.progress(done * 4096, total * 4096);
                    if reported.is_cancelled() {
                        return Err(Error::new(ErrorKind::Cancelled, "merge layers: cancelled")
                            .hint("the snapshot stays marked; remove it again to go on"));
                    }
                    Ok(())
                };
                Merge::new(&dir, plan, &open)?.run(&mut progress)
            })
            .await;
            match merged {
                // Its user opened or closed the volume meanwhile.
                Err(error) if error.kind() == ErrorKind::Refused && tries < TRIES => {
                    tracing::info!(volume = %record.name, %error, "a merge is tried again");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                other => return other,
            }
        }
    }

    /// The records say what the chain is now.
    async fn forget_layer(
        &self,
        affected: &[Versioned<VolumeRecord>],
        plan: MergePlan,
        stands: DiskId,
    ) -> Result<()> {
        let stays = self.shared.dir.header(stands)?;
        let action = "say that a snapshot is gone";
        for _ in 0..TRIES {
            let mut change = Change::default();
            for known in affected {
                let record = self.record(&known.value.name).await?;
                let mut next = record.value.clone();
                next.layers.retain(|layer| layer.disk_id != plan.layer);
                for layer in next.layers.iter_mut().filter(|layer| layer.disk_id == plan.child) {
                    (layer.disk_id, layer.data_id) = (stands, stays.data_id);
                }
                change = change.replace(&record, &next)?;
            }
            // Somebody may attach the volume at the same time.
            if change.commit(&*self.shared.meta).await? {
                return Ok(());
            }
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!("{action}: somebody else changed the volume all the time"),
        )
        .hint("remove it again"))
    }

    /// Snapshots whose removal an earlier process of this agent began.
    pub async fn unfinished_removals(&self) -> Result<Vec<SnapshotRef>> {
        let mut found = Vec::new();
        for record in self.held().await? {
            let VolumeRecord { name, layers, .. } = record.value;
            let leaving =
                layers.into_iter().filter(|layer| layer.removing).filter_map(|layer| layer.snapshot);
            found.extend(leaving.map(|snapshot| SnapshotRef { volume: name.clone(), snapshot }));
        }
        Ok(found)
    }

    /// A volume whose snapshots others were made from is not removed.
    pub(super) async fn refuse_if_cloned(&self, record: &VolumeRecord, action: &str) -> Result<()> {
        let ours: HashSet<DiskId> = named(record).map(|layer| layer.disk_id).collect();
        let others = self.held().await?;
        let needs = |other: &VolumeRecord| {
            other.name != record.name && other.layers.iter().any(|layer| ours.contains(&layer.disk_id))
        };
        let names: Vec<String> = others
            .iter()
            .filter(|other| needs(&other.value))
            .map(|other| other.value.name.to_string())
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(made_from("its snapshots", &names)).with_context(|| action.to_owned())
    }

    /// Layers that are kept although nothing here lies on them yet: they came for `volume`, and it follows.
    pub(crate) fn pin(&self, volume: &Name, disk_id: DiskId) {
        self.shared.claims.pinned.lock().insert((volume.clone(), disk_id));
    }

    /// What came for `volume` is what it lies on, or of no use.
    pub(crate) fn unpin(&self, volume: &Name) {
        self.shared.claims.pinned.lock().retain(|(name, _)| name != volume);
    }

    /// Removes those of a volume's lower layers that nothing on this host lies on any more.
    pub(super) fn drop_unused_layers(&self, record: &VolumeRecord) -> Result<()> {
        self.unpin(&record.name);
        let pinned = self.shared.claims.pinned.lock().clone();
        let from_top: Vec<DiskId> = record.layers.iter().rev().map(|layer| layer.disk_id).collect();
        self.shared.dir.remove_unused(&from_top, |id| pinned.iter().any(|(_, pinned)| *pinned == id))
    }

    /// Links under a volume that do not hold, because a parent's content changed. With `accept` they are made to hold.
    pub async fn relink(&self, volume: &Name, accept: bool) -> Result<Vec<Relinked>> {
        let action = || format!("relink volume {volume}");
        let _claim = self.claim([volume.clone()], "it is being relinked")?;
        let record = self.record(volume).await?;
        self.must_be_local(&record.value).with_context(action)?;
        if accept && (record.value.attached_to.is_some() || self.is_exported(volume)) {
            return Err(Error::new(ErrorKind::Refused, format!("{}: it is in use", action()))
                .hint("stop its VM, or take its socket away, first"));
        }
        if accept {
            self.shut(record.value.disk_id);
        }
        let (dir, id) = (self.shared.dir.clone(), record.value.disk_id);
        let relinked =
            blocking("relink layers", move || dir.relink(id, accept)).await.with_context(action)?;
        if accept && !relinked.is_empty() {
            let mut next = record.value.clone();
            for layer in &mut next.layers {
                layer.data_id = self.shared.dir.header(layer.disk_id)?.data_id;
            }
            Change::default()
                .replace(&record, &next)?
                .commit_or_refuse(&*self.shared.meta, &action())
                .await?;
        }
        Ok(relinked)
    }

    /// A layer under a volume of this host, to be read.
    pub(crate) async fn open_lower(&self, disk_id: DiskId) -> Result<Arc<Layer>> {
        let dir = self.shared.dir.clone();
        blocking("open a layer", move || match dir.sealed(disk_id) {
            Some(layer) => Ok(layer),
            None => {
                dir.seal(disk_id)?;
                Layer::open(&dir.path(disk_id), None, Epoch(u64::MAX), false)
            }
        })
        .await
    }

    /// Whether this host has that layer, with that content, for others to lie on; `Refused` if it has it with another.
    pub(crate) fn has_lower(&self, spec: &LayerSpec) -> Result<bool> {
        let path = self.shared.dir.path(spec.disk_id);
        if !path.exists() {
            return Ok(false);
        }
        let header = self.shared.dir.header(spec.disk_id)?;
        if header.state == State::Sealed && header.data_id == spec.data_id {
            return Ok(true);
        }
        if self.shared.dir.children(spec.disk_id)?.is_empty() {
            // What an earlier move left half done.
            self.shared.dir.remove(spec.disk_id)?;
            return Ok(false);
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "receive layer {} with content {}: it is here with content {}, and others lie on it",
                spec.disk_id, spec.data_id, header.data_id
            ),
        )
        .hint(
            "a snapshot was removed here that the other host still has; remove it there too, then move again",
        ))
    }

    /// A place for a layer under a volume's writable one, which another host sends.
    pub(crate) fn lower_receiver(&self, spec: &LayerSpec) -> Result<crate::disk::LayerReceiver> {
        self.shared.dir.receive(spec)
    }

    /// The layers under a volume's writable one, the newest first, as people see them.
    pub fn chain(&self, record: &VolumeRecord) -> Vec<VolumeLayer> {
        let here = record.right.holder == self.shared.host;
        let show = |layer: &LayerRecord| VolumeLayer {
            disk_id: layer.disk_id,
            data_id: layer.data_id,
            size_bytes: layer.size_bytes,
            snapshot: layer.snapshot.clone(),
            made_s: layer.made_s,
            quiesced: layer.quiesced,
            removing: layer.removing,
            layer_bytes: here.then(|| self.shared.dir.disk_bytes(layer.disk_id)).flatten(),
        };
        record.layers.iter().rev().map(show).collect()
    }

    /// Where requests for an exported volume find it.
    pub fn export_slot(&self, name: &Name) -> Option<DeviceSlot> {
        self.shared.exports.lock().get(name).map(|exported| exported.server.slot().clone())
    }
}

fn made_from(what: &str, volumes: &[String]) -> Error {
    let text = format!("these volumes were made from {what}: {}", volumes.join(", "));
    Error::new(ErrorKind::Refused, text)
        .hint("remove them first, or move them to another host: they take what they need along")
}

fn named(record: &VolumeRecord) -> impl Iterator<Item = &LayerRecord> {
    record.layers.iter().filter(|layer| layer.snapshot.is_some())
}

fn position(record: &VolumeRecord, what: &SnapshotRef) -> Result<usize> {
    record.layers.iter().position(|layer| layer.snapshot.as_ref() == Some(&what.snapshot)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("find snapshot {what}: there is none"))
            .hint(format!("see `whimbrel volume show {}`", what.volume))
    })
}

/// What the record says of the chain and the layers do not.
pub(super) fn compare(record: &VolumeRecord, reports: &[Report]) -> Vec<String> {
    if record.layers.iter().any(|layer| layer.removing) {
        return Vec::new();
    }
    let recorded: Vec<DiskId> = record.layers.iter().rev().map(|layer| layer.disk_id).collect();
    let found: Vec<DiskId> = reports.iter().skip(1).map(|report| report.header.disk_id).collect();
    let mut problems = Vec::new();
    if recorded != found {
        let show = |ids: &[DiskId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        problems.push(format!(
            "the record says that these layers lie under it: [{}]; it lies on [{}]",
            show(&recorded),
            show(&found)
        ));
    }
    for (layer, report) in record.layers.iter().rev().zip(reports.iter().skip(1)) {
        if layer.disk_id == report.header.disk_id && layer.data_id != report.header.data_id {
            problems.push(format!(
                "layer {} has content {}, its record says {}",
                layer.disk_id, report.header.data_id, layer.data_id
            ));
        }
    }
    problems
}

#[cfg(test)]
mod test;
