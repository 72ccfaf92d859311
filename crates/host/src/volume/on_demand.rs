//! Layers on two hosts at once (`vm migrate --disk on-demand`): one hands out what the other fetches.
//!
//! ```text
//!   source                                                         target
//!   layer fenced ─ serve(to, epoch) ─► Served ◄─ layer.read ────── Pull ◄─ a reader of the guest's disk
//!        stop_serving ◄─ taken back, or given up     layer.pull ──── └──── a step: what nobody asked for yet
//! ```
//!
//! Invariants
//! * A layer is handed out only while it is fenced here, and only to the host and at the epoch that the caller knows
//!   from the metadata store.
//! * A layer under pull stays open until it is whole, whoever else closes it: fetching does not need a VM.
//!
//! Not here: what is fetched when (`disk::Pull`), when a layer may be handed out (`engine::migrate::handover`).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use whimbrel_wire::meta::VolumeRecord;
use whimbrel_wire::peer::layer::{BYTES_MAX, LayerAsk, METHOD_PULL, METHOD_READ, RANGES_MAX};
use whimbrel_wire::peer::migrate::PullHead;
use whimbrel_wire::{DiskId, Epoch, HostId};

use super::Volumes;
use crate::block_dev::BlockRead;
use crate::blocking::blocking;
use crate::disk::{BaseImage, FetchRange, Layer, LayerSpec, Pull, RemoteLayer, Urgency};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::link::{Links, PeerIdentity, Router};
use crate::memory::Limiter;

/// Parts of layers that are read for other hosts at once; more wait.
const READS_MAX: usize = 16;
/// How long a question waits for its turn.
const TURN_LIMIT: Duration = Duration::from_secs(5);
/// How long a reader's question may take; it is asked again then.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// How long any other question may take; a slow link brings a megabyte in this time.
const PULL_LIMIT: Duration = Duration::from_secs(60);
/// Beyond the limits above, for the answer's way through this process.
const SLACK: Duration = Duration::from_secs(1);

/// See the module's charter.
pub(super) struct OnDemand {
    links: Links,
    pulls: Mutex<HashMap<DiskId, Arc<Pull>>>,
    served: Mutex<HashMap<DiskId, Served>>,
    turns: Semaphore,
}

/// A layer that is handed out.
#[derive(Clone)]
struct Served {
    layer: Arc<Layer>,
    to: HostId,
    epoch: Epoch,
    limiter: Arc<Limiter>,
    bytes: Arc<AtomicU64>,
}

impl OnDemand {
    pub(super) fn new(links: Links) -> Self {
        Self { links, pulls: Mutex::default(), served: Mutex::default(), turns: Semaphore::new(READS_MAX) }
    }

    /// The layer's pull, while it is open.
    pub(super) fn pull_of(&self, disk_id: DiskId) -> Option<Arc<Pull>> {
        self.pulls.lock().get(&disk_id).cloned()
    }

    /// Hands the layer out no more.
    pub(super) fn stop_serving(&self, disk_id: DiskId) {
        self.served.lock().remove(&disk_id);
    }

    /// Forgets the layer's pull; whoever reads what is not here fails.
    pub(super) fn drop_pull(&self, disk_id: DiskId) {
        if let Some(pull) = self.pulls.lock().remove(&disk_id) {
            pull.stop_waiting();
        }
    }
}

impl Volumes {
    /// Registers what other hosts call.
    pub fn register(&self, router: Router) -> Router {
        let method = |router: Router, name, urgency| {
            let volumes = self.clone();
            router.call(name, move |peer: PeerIdentity, ask: LayerAsk, _payload| {
                let volumes = volumes.clone();
                async move { volumes.hand_out(&peer.host, ask, urgency).await }
            })
        };
        let router = method(router, METHOD_READ, Urgency::Demand);
        method(router, METHOD_PULL, Urgency::Ahead)
    }

    /// Makes a place for a layer whose blocks stay at another host for now. What an earlier attempt left is removed.
    pub(crate) fn make_pull(&self, record: &VolumeRecord, head: &PullHead, map: &[u8]) -> Result<()> {
        let spec = LayerSpec { data_id: head.data_id, epoch: head.epoch, ..super::spec_of(record) };
        let _ = self.shared.dir.remove(record.disk_id);
        self.shared.dir.create_pull(&spec, map).with_context(|| format!("prepare volume {}", record.name))
    }

    /// Opens a layer whose blocks are still at `source`, for writing at `epoch`.
    pub(crate) async fn open_pull(
        &self,
        record: &VolumeRecord,
        base: Option<BaseImage>,
        epoch: Epoch,
        source: &HostId,
    ) -> Result<Arc<Layer>> {
        let disk_id = record.disk_id;
        let remote = Arc::new(OverLinks {
            links: self.shared.on_demand.links.clone(),
            source: source.clone(),
            disk_id,
            epoch,
            runtime: Handle::current(),
        });
        let dir = self.shared.dir.clone();
        let pull = blocking("open a layer", move || dir.open_pull(disk_id, base, remote, epoch)).await;
        let pull = Arc::new(pull.with_context(|| format!("open volume {}", record.name))?);
        let layer = Arc::clone(pull.layer());
        self.shared.on_demand.pulls.lock().insert(disk_id, pull);
        self.keep(disk_id, Arc::clone(&layer));
        Ok(layer)
    }

    /// The volume's pull, opened if need be; none if nothing of it is at another host any more.
    pub(crate) async fn pull(&self, record: &VolumeRecord) -> Result<Option<Arc<Pull>>> {
        if let Some(pull) = self.shared.on_demand.pull_of(record.disk_id) {
            return Ok(Some(pull));
        }
        if !self.is_here(record.disk_id) || !self.shared.dir.is_pulling(record.disk_id)? {
            return Ok(None);
        }
        self.open(record).await?;
        Ok(self.shared.on_demand.pull_of(record.disk_id))
    }

    /// The layer is whole: it is closed like any other from here on.
    pub(crate) fn pulled(&self, disk_id: DiskId) {
        self.shared.on_demand.pulls.lock().remove(&disk_id);
    }

    /// Nobody wants the answer to requests that wait for another host any more: the VM they come from is ended.
    pub(crate) fn stop_waiting(&self, disk_id: DiskId) {
        if let Some(pull) = self.shared.on_demand.pull_of(disk_id) {
            pull.stop_waiting();
        }
    }

    /// Fences the layer here at `epoch`, durably, and hands it out to `to`, which holds the right to write the volume
    /// at that epoch: the caller has seen that in the metadata store. Gives the count of bytes handed out.
    pub(crate) async fn serve(
        &self,
        disk_id: DiskId,
        to: &HostId,
        epoch: Epoch,
        limiter: &Arc<Limiter>,
    ) -> Result<Arc<AtomicU64>> {
        let shared = &self.shared;
        let known = shared.on_demand.served.lock().get(&disk_id).cloned();
        if let Some(served) = known.filter(|served| served.to == *to && served.epoch == epoch) {
            return Ok(served.bytes);
        }
        let (opened, path) = (self.opened(disk_id), shared.dir.path(disk_id));
        let layer = blocking("open a layer", move || {
            if let Some(layer) = opened {
                return layer.fence(epoch).map(|()| layer);
            }
            // After a restart: what is asked for lies in this layer, not below it.
            let writer = Layer::open(&path, None, epoch, true)?;
            writer.fence(epoch)?;
            writer.close()?;
            drop(writer);
            Layer::open(&path, None, epoch, false)
        });
        let layer = layer.await.with_context(|| format!("hand out layer {disk_id} to host {to}"))?;
        let bytes = Arc::new(AtomicU64::new(0));
        let served =
            Served { layer, to: to.clone(), epoch, limiter: Arc::clone(limiter), bytes: Arc::clone(&bytes) };
        shared.on_demand.served.lock().insert(disk_id, served);
        Ok(bytes)
    }

    /// Answers another host.
    async fn hand_out(&self, peer: &HostId, ask: LayerAsk, urgency: Urgency) -> Result<((), Bytes)> {
        let on_demand = &self.shared.on_demand;
        let length = ask.length()?;
        let served = on_demand.served.lock().get(&ask.disk_id).cloned();
        let served =
            served.filter(|served| served.to == *peer && served.epoch == ask.epoch).ok_or_else(|| {
                Error::new(
                    ErrorKind::Refused,
                    format!(
                        "read layer {}: it is not for host {peer} at epoch {} now",
                        ask.disk_id, ask.epoch
                    ),
                )
            })?;
        if urgency == Urgency::Ahead {
            served.limiter.pass(length as usize).await;
        }
        let turn = tokio::time::timeout(TURN_LIMIT, on_demand.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(Error::new(ErrorKind::Unavailable, "read a layer: this host has too much to read"));
        };
        let layer = Arc::clone(&served.layer);
        let bytes = blocking("read a layer", move || {
            let mut bytes = vec![0; length as usize];
            let mut rest = bytes.as_mut_slice();
            for (offset, length) in ask.ranges {
                let (part, after) = rest.split_at_mut(length as usize);
                layer.read(offset, &mut [std::io::IoSliceMut::new(part)])?;
                rest = after;
            }
            Ok(Bytes::from(bytes))
        });
        let bytes = bytes.await?;
        served.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(((), bytes))
    }
}

/// A layer at another host.
struct OverLinks {
    links: Links,
    source: HostId,
    disk_id: DiskId,
    epoch: Epoch,
    runtime: Handle,
}

impl OverLinks {
    /// Splits ranges into questions, each with the length of its answer.
    fn asks(&self, ranges: &[FetchRange]) -> Vec<(LayerAsk, u64)> {
        let mut asks: Vec<(LayerAsk, u64)> = Vec::new();
        for range in ranges {
            let (mut offset, mut left) = (range.offset, range.length);
            while left > 0 {
                let open = asks
                    .last_mut()
                    .filter(|(ask, length)| *length < BYTES_MAX && ask.ranges.len() < RANGES_MAX);
                let Some((ask, length)) = open else {
                    let ask = LayerAsk { disk_id: self.disk_id, epoch: self.epoch, ranges: Vec::new() };
                    asks.push((ask, 0));
                    continue;
                };
                let some = left.min(BYTES_MAX - *length);
                ask.ranges.push((offset, some));
                *length += some;
                offset += some;
                left -= some;
            }
        }
        asks
    }
}

async fn ask_for(
    links: Links,
    source: HostId,
    method: &'static str,
    (ask, length): (LayerAsk, u64),
    limit: Duration,
) -> Result<Bytes> {
    let ((), bytes) = links.call(&source, method, &ask, Bytes::new(), limit).await?;
    if bytes.len() as u64 != length {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("read layer {} at host {source}: {} bytes came, not {length}", ask.disk_id, bytes.len()),
        ));
    }
    Ok(bytes)
}

impl RemoteLayer for OverLinks {
    fn fetch(&self, ranges: &[FetchRange], into: &mut [u8], urgency: Urgency) -> Result<()> {
        let (method, limit) = match urgency {
            Urgency::Demand => (METHOD_READ, READ_LIMIT),
            Urgency::Ahead => (METHOD_PULL, PULL_LIMIT),
        };
        let calls: Vec<_> = self
            .asks(ranges)
            .into_iter()
            .map(|ask| ask_for(self.links.clone(), self.source.clone(), method, ask, limit))
            .collect();
        // Readers' threads are none of the runtime's: they wait for an answer from it.
        let (answer, came) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            let _ = answer.send(try_join_all(calls).await);
        });
        let parts = came.recv_timeout(limit + SLACK).map_err(|error| {
            let what = format!("read layer {} at host {}", self.disk_id, self.source);
            Error::with_source(ErrorKind::TimedOut, what, error)
        })??;
        let (mut at, length) = (0, into.len());
        for part in parts {
            let Some(some) = into.get_mut(at..at + part.len()) else { break };
            some.copy_from_slice(&part);
            at += part.len();
        }
        if at == length {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Internal, "read a layer: ranges and buffer differ in length"))
    }
}

#[cfg(test)]
mod test;
