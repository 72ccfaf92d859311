//! An image, open on this host: what guests read, and the swarm's member for it.
//!
//! ```text
//!   guest thread ─ read ─┬─ zeros ─► fill
//!                        ├─ verified since the start ─► preadv from the cache, straight into the guest's buffers
//!                        ├─ just fetched ─► copy from memory
//!                        └─ else ─► Want ─► engine Reads ─► Ask ─► task: cache │ peer │ seed ─► verify ─► Arrived
//!                                     ▲                                                                    │
//!                           waits on a channel ◄──────────── Deliver (and keep: write, set bit) ◄──────────┘
//! ```
//!
//! Invariants
//! * A block reaches a reader, a peer or the cache only after its hash was checked since the start of the agent.
//! * A delivered block stays in memory until the cache has it, so that the next read of it does not fetch again.
//! * At most `WRITES_MAX` blocks wait to be written; sources are slowed down beyond that.
//! * The lock is never held while waiting.
//!
//! Not here: which source is asked (`engine::image::read`), how one is asked (`fetch`), who the peers are (`peers`).

use std::collections::{HashMap, VecDeque};
use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::AbortHandle;
use whimbrel_engine::image::read::{
    Action, Class, Config, Event, Outcome, Reads, Report, RequestId, Source, Waiter, Why,
};
use whimbrel_wire::api::ReadBytes;
use whimbrel_wire::meta::ImageParent;
use whimbrel_wire::record::image::BLOCK_BYTES;
use whimbrel_wire::{HostId, ImageId, Name, Time};

use super::cache::{ImageCache, Loaded};
use super::fetch::{self, Arrival};
use super::images::{Images, Shared};
use super::manifest::Manifest;
use super::repo::Repo;
use super::siblings::Hashes;
use crate::block_dev::{BlockRead, Extent};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::metrics;

/// Blocks that wait to be written to the cache: 8 MiB.
pub(super) const WRITES_MAX: usize = 64;
/// Delivered blocks that stay in memory for a while: 2 MiB.
const RECENT_MAX: usize = 16;
/// Blocks fetched ahead of a reader that reads in order.
const AHEAD_BLOCKS: u64 = 8;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// An image, open for reading on this host. Read it from threads that may wait, not from async tasks.
#[derive(Clone)]
pub struct Image {
    pub(super) core: Arc<Core>,
}

/// What an open image consists of.
pub struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) images: Weak<Images>,
    pub(super) parent: ImageParent,
    pub(super) domain: Option<Name>,
    pub(super) manifest: Arc<Manifest>,
    pub(super) cache: ImageCache,
    pub(super) hashes: Hashes,
    pub(super) repo: Arc<Repo>,
    pub(super) counters: Counters,
    pub(super) writes: Arc<Semaphore>,
    /// Changes of the cache that peers have not been told.
    pub(super) news: Mutex<News>,
    pub(super) news_came: Notify,
    state: Mutex<State>,
    wake: Notify,
    last_read: AtomicU64,
}

/// Changes of the cache: block, and whether it is here now.
pub type News = std::collections::BTreeMap<u64, bool>;

/// Bytes by source.
#[derive(Default)]
pub struct Counters {
    cache: AtomicU64,
    peer: AtomicU64,
    seed: AtomicU64,
}

struct State {
    reads: Reads,
    waiters: HashMap<Waiter, oneshot::Sender<Result<Bytes>>>,
    waiter_count: Waiter,
    arrived: HashMap<RequestId, Held>,
    tasks: HashMap<RequestId, AbortHandle>,
    writing: HashMap<u64, Bytes>,
    recent: VecDeque<(u64, Bytes)>,
    /// What the last source said that failed, per block under way.
    errors: HashMap<u64, Error>,
    disk_full: bool,
}

/// A block that arrived, and its place in the queue of writes.
struct Held {
    bytes: Bytes,
    /// Copied from another image's cache.
    sibling: bool,
    permit: Option<OwnedSemaphorePermit>,
}

/// A block that was asked for.
pub enum Obtained {
    /// It is in memory.
    Now(Bytes),
    /// It will come, or an error will.
    Later(oneshot::Receiver<Result<Bytes>>),
}

/// How a block of the disk can be read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Zeros,
    Cache,
    Fetch,
}

impl Core {
    #[expect(clippy::too_many_arguments, reason = "the parts of one value")]
    pub(super) fn new(
        shared: Arc<Shared>,
        images: Weak<Images>,
        parent: ImageParent,
        domain: Option<Name>,
        manifest: Arc<Manifest>,
        cache: ImageCache,
        hashes: Hashes,
        repo: Arc<Repo>,
    ) -> Arc<Self> {
        let config = Config {
            keep_after_peer_fetches: shared.config.keep_after_peer_fetches,
            demand_parallel: 64,
            fill_parallel: 16,
            ..Config::default()
        };
        let host = shared.config.host.clone();
        let reads = Reads::new(config, parent.id, host, manifest.blocks(), clock::now());
        let core = Arc::new(Self {
            shared,
            images,
            parent,
            domain,
            manifest,
            cache,
            hashes,
            repo,
            counters: Counters::default(),
            writes: Arc::new(Semaphore::new(WRITES_MAX)),
            news: Mutex::default(),
            news_came: Notify::new(),
            state: Mutex::new(State {
                reads,
                waiters: HashMap::new(),
                waiter_count: 0,
                arrived: HashMap::new(),
                tasks: HashMap::new(),
                writing: HashMap::new(),
                recent: VecDeque::new(),
                errors: HashMap::new(),
                disk_full: false,
            }),
            wake: Notify::new(),
            last_read: AtomicU64::new(u64::MAX),
        });
        core.shared.runtime.spawn(tick(Arc::downgrade(&core)));
        core
    }

    /// What it is.
    pub fn id(&self) -> ImageId {
        self.parent.id
    }

    /// Bytes read on this host since the start: whole blocks from peers and the seed, what was asked from the cache.
    pub fn read_bytes(&self) -> ReadBytes {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ReadBytes {
            layer: 0,
            cache: of(&self.counters.cache),
            peer: of(&self.counters.peer),
            seed: of(&self.counters.seed),
        }
    }

    /// Asks for a stored block.
    pub(super) fn obtain(self: &Arc<Self>, block: u64, class: Class, for_peer: bool) -> Obtained {
        let local = self.cache.holds(block) || fetch::in_sibling(self, block);
        let mut state = self.state.lock();
        if let Some(bytes) = state.in_memory(block) {
            return Obtained::Now(bytes);
        }
        let (sender, receiver) = oneshot::channel();
        state.waiter_count += 1;
        let waiter = state.waiter_count;
        state.waiters.insert(waiter, sender);
        self.step(&mut state, Event::Want { block, waiter, class, local, for_peer });
        Obtained::Later(receiver)
    }

    /// Tells the engine that something happened.
    pub(super) fn tell(self: &Arc<Self>, event: Event) {
        self.step(&mut self.state.lock(), event);
    }

    /// Asks the engine about peers.
    pub(super) fn with_reads<T>(&self, ask: impl FnOnce(&Reads, Time) -> T) -> T {
        ask(&self.state.lock().reads, clock::now())
    }

    fn step(self: &Arc<Self>, state: &mut State, event: Event) {
        let before = state.reads.next_wake();
        let mut actions = Vec::new();
        state.reads.step(clock::now(), event, &mut actions);
        for action in actions {
            self.act(state, action);
        }
        if state.reads.next_wake() != before {
            self.wake.notify_one();
        }
    }

    fn act(self: &Arc<Self>, state: &mut State, action: Action) {
        match action {
            Action::Ask { request, block, source, deadline } => {
                let limit = Duration::from_millis(deadline.since_ms(clock::now()).max(1));
                let task = self.shared.runtime.spawn(ask(Arc::clone(self), request, block, source, limit));
                state.tasks.insert(request, task.abort_handle());
            }
            Action::Cancel { request } => {
                state.arrived.remove(&request);
                if let Some(task) = state.tasks.remove(&request) {
                    task.abort();
                }
            }
            Action::Deliver { request, block, source, keep, waiters } => {
                self.deliver(state, request, block, &source, keep, &waiters);
            }
            Action::Fail { block, waiters, why } => {
                let source = state.errors.remove(&block);
                for waiter in waiters {
                    if let Some(sender) = state.waiters.remove(&waiter) {
                        let _ = sender.send(Err(self.failure(block, why, source.as_ref())));
                    }
                }
            }
            Action::Drop { block } => {
                state.recent.retain(|(other, _)| *other != block);
                if let Err(error) = self.cache.forget(block) {
                    tracing::error!(%error, image = %self.id(), block, "forget a bad block");
                }
            }
            Action::Advertise { block } => self.add_news(block, true),
            Action::Withdraw { block } => self.add_news(block, false),
            Action::Report(report) => self.report(&report),
        }
    }

    fn deliver(
        self: &Arc<Self>,
        state: &mut State,
        request: RequestId,
        block: u64,
        source: &Source,
        keep: bool,
        waiters: &[Waiter],
    ) {
        state.tasks.remove(&request);
        state.errors.remove(&block);
        let Some(held) = state.arrived.remove(&request) else {
            tracing::error!(image = %self.id(), block, "deliver a block that did not arrive");
            return;
        };
        let length = held.bytes.len() as u64;
        let counter = match source {
            Source::Cache => None,
            Source::Peer(_) | Source::Home(_) => Some((&self.counters.peer, "peer")),
            Source::Seed => Some((&self.counters.seed, "seed")),
        };
        if let Some((counter, label)) = counter {
            counter.fetch_add(length, Ordering::Relaxed);
            metrics().image_read_bytes.with_label_values(&[label]).inc_by(length);
        }
        for waiter in waiters {
            if let Some(sender) = state.waiters.remove(waiter) {
                let _ = sender.send(Ok(held.bytes.clone()));
            }
        }
        if keep || held.sibling {
            state.writing.insert(block, held.bytes.clone());
            let core = Arc::clone(self);
            self.shared.runtime.spawn_blocking(move || core.keep(block, &held.bytes, held.permit));
        } else if *source != Source::Cache {
            state.remember(block, held.bytes);
        }
    }

    /// Writes a block to the cache; on a thread that may block.
    fn keep(self: &Arc<Self>, block: u64, bytes: &Bytes, permit: Option<OwnedSemaphorePermit>) {
        let kept = self.cache.keep(block, bytes);
        drop(permit);
        let mut state = self.state.lock();
        state.writing.remove(&block);
        match kept {
            Ok(true) => {
                state.disk_full = false;
                self.step(&mut state, Event::Kept { block });
            }
            Ok(false) => {
                state.remember(block, bytes.clone());
                if !std::mem::replace(&mut state.disk_full, true) {
                    let (image, dir) = (self.id(), self.shared.config.data_dir.display());
                    tracing::warn!(%image, %dir, "the cache's disk is full: blocks are read, not kept");
                }
            }
            Err(error) => {
                state.remember(block, bytes.clone());
                tracing::error!(%error, image = %self.id(), "keep a block");
            }
        }
    }

    fn add_news(&self, block: u64, here: bool) {
        self.news.lock().insert(block, here);
        self.news_came.notify_one();
    }

    fn report(&self, report: &Report) {
        let image = self.id();
        match report {
            Report::Liar { host, block } => {
                metrics().image_liars.inc();
                tracing::warn!(
                    %image, %host, block,
                    "host {host} sent wrong bytes for a block; it is not asked again for this image"
                );
            }
            Report::Rot { block } => {
                metrics().image_rot_blocks.inc();
                tracing::warn!(%image, block, "the cache's copy of a block has changed; it is fetched again");
            }
            Report::SeedCorrupt { block } => {
                tracing::error!(%image, block, store = self.repo.url(), "the store's copy of a block is damaged");
            }
            Report::Stale { host, block } => {
                tracing::debug!(%image, %host, block, "a peer lacks a block that it advertised");
            }
        }
    }

    fn failure(&self, block: u64, why: Why, source: Option<&Error>) -> Error {
        let (kind, what) = match why {
            Why::Unreachable => (
                source.map_or(ErrorKind::Unavailable, Error::kind),
                "no other host has it and the store does not give it",
            ),
            Why::Corrupt => {
                (ErrorKind::Corrupt, "the store's copy is damaged and no other host has a good one")
            }
            Why::TimedOut => (ErrorKind::TimedOut, "nobody gave it in time"),
        };
        let detail = source.map(|error| format!(": {error}")).unwrap_or_default();
        let context =
            format!("read block {block} of image {} ({}): {what}{detail}", self.parent.image, self.id());
        Error::new(kind, context).hint(format!("is the store {} reachable and whole?", self.repo.url()))
    }

    /// How blocks of the disk can be read: runs of the same way, as byte ranges within `offset..offset + length`.
    fn ways(&self, offset: u64, length: u64) -> impl Iterator<Item = (Way, Range<u64>)> + '_ {
        let end = offset + length;
        let way = |block| {
            if !self.manifest.is_stored(block) {
                Way::Zeros
            } else if self.cache.is_verified(block) {
                Way::Cache
            } else {
                Way::Fetch
            }
        };
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = at;
            let mut block = at / BLOCK;
            let first = way(block);
            at = (block + 1) * BLOCK;
            // Missing blocks come one by one, the others as far as they reach.
            while at < end && first != Way::Fetch {
                block += 1;
                if way(block) != first {
                    break;
                }
                at += BLOCK;
            }
            at = at.min(end);
            Some((first, start..at))
        })
    }

    fn check_range(&self, offset: u64, into: &[IoSliceMut<'_>]) -> Result<u64> {
        let length: u64 = into.iter().map(|part| part.len() as u64).sum();
        let size = self.manifest.header().size_bytes;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("read {length} bytes at {offset} of image {}: it has {size}", self.id()),
            ));
        }
        Ok(length)
    }

    fn read_cached(&self, offset: u64, into: &mut [IoSliceMut<'_>], length: u64) -> Result<()> {
        self.cache.read_verified(offset, into)?;
        self.counters.cache.fetch_add(length, Ordering::Relaxed);
        metrics().image_read_bytes.with_label_values(&["cache"]).inc_by(length);
        Ok(())
    }

    /// A reader that goes from one block to the next finds the following ones on their way.
    fn fetch_ahead(self: &Arc<Self>, block: u64) {
        let last = self.last_read.swap(block, Ordering::Relaxed);
        if last == u64::MAX || block != last + 1 {
            return;
        }
        let ahead = (block + 1..block + 1 + AHEAD_BLOCKS).take_while(|next| *next < self.manifest.blocks());
        for next in ahead.filter(|next| self.manifest.is_stored(*next) && !self.cache.holds(*next)) {
            if self.with_reads(|reads, _| reads.in_flight(next)) {
                continue;
            }
            // Nobody waits: dropping the receiver leaves the flight under way.
            drop(self.obtain(next, Class::Fill, false));
        }
    }
}

impl State {
    fn in_memory(&self, block: u64) -> Option<Bytes> {
        let recent = || self.recent.iter().find(|(other, _)| *other == block).map(|(_, bytes)| bytes);
        self.writing.get(&block).or_else(recent).cloned()
    }

    fn remember(&mut self, block: u64, bytes: Bytes) {
        self.recent.retain(|(other, _)| *other != block);
        self.recent.push_back((block, bytes));
        if self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
        }
    }
}

/// Asks one source, and tells the engine what came of it.
async fn ask(core: Arc<Core>, request: RequestId, block: u64, source: Source, limit: Duration) {
    // An answer that comes after its deadline still counts, so there is some more time for it.
    let limit = limit * 2;
    let arrival = match &source {
        Source::Cache => fetch::from_cache(&core, block).await,
        Source::Peer(host) => fetch::from_peer(&core, block, host, false, limit).await,
        Source::Home(host) => fetch::from_peer(&core, block, host, true, limit).await,
        Source::Seed => fetch::from_seed(&core, block, limit).await,
    };
    let arrival = fetch::blame_the_manifest(&core, arrival).await;
    let mut permit = None;
    if arrival.bytes.is_some() && (source != Source::Cache || arrival.sibling) {
        permit = Arc::clone(&core.writes).acquire_owned().await.ok();
    }
    let Arrival { outcome, bytes, sibling, error } = arrival;
    let mut state = core.state.lock();
    state.tasks.remove(&request);
    if let Some(error) = error {
        tracing::debug!(%error, image = %core.id(), block, ?source, "a source failed");
        // What the seed says matters most to people.
        if source == Source::Seed || !state.errors.contains_key(&block) {
            state.errors.insert(block, error);
        }
    }
    if let Some(bytes) = bytes.filter(|_| outcome == Outcome::Verified) {
        state.arrived.insert(request, Held { bytes, sibling, permit });
    }
    core.step(&mut state, Event::Arrived { request, outcome });
    // If the flight ended meanwhile nobody asked for it any more.
    state.arrived.remove(&request);
    if !state.reads.in_flight(block) {
        state.errors.remove(&block);
    }
}

/// Drives the engine's deadlines.
async fn tick(core: Weak<Core>) {
    loop {
        let Some(strong) = core.upgrade() else { return };
        let wake = strong.state.lock().reads.next_wake();
        let now = clock::now();
        let pause =
            wake.map_or(Duration::from_secs(5), |at| Duration::from_nanos(at.0.saturating_sub(now.0)));
        // Wakes up now and then to see whether the image is still there.
        let pause = pause.min(Duration::from_secs(5));
        if tokio::time::timeout(pause, strong.wake.notified()).await.is_err() && wake.is_some() {
            strong.tell(Event::Tick);
        }
    }
}

impl Image {
    /// What it is.
    pub fn id(&self) -> ImageId {
        self.core.id()
    }

    /// Name and store under which it was opened.
    pub fn parent(&self) -> &ImageParent {
        &self.core.parent
    }

    /// Bytes read on this host since the start: whole blocks from peers and the seed, what was asked from the cache.
    pub fn read_bytes(&self) -> ReadBytes {
        self.core.read_bytes()
    }

    /// Bytes of its blocks that are not zeros.
    pub fn stored_bytes(&self) -> u64 {
        self.core.manifest.header().data_bytes
    }

    /// Bytes of them in this host's cache.
    pub fn cached_bytes(&self) -> u64 {
        self.core.cache.held_bytes()
    }

    /// Hosts known to have it open or cached.
    pub fn peers(&self) -> Vec<HostId> {
        self.core.with_reads(|reads, _| reads.swarm().members().cloned().collect())
    }
}

impl BlockRead for Image {
    fn size_bytes(&self) -> u64 {
        self.core.manifest.header().size_bytes
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let core = &self.core;
        let length = core.check_range(offset, into)?;
        // What is missing is asked for at once, so that a large read waits for the slowest block, not for the sum.
        let runs: Vec<_> = core
            .ways(offset, length)
            .map(|(way, range)| {
                let block = range.start / BLOCK;
                let coming = (way == Way::Fetch).then(|| core.obtain(block, Class::Demand, false));
                (way, range, coming)
            })
            .collect();
        if let Some((_, last, _)) = runs.iter().rfind(|(way, ..)| *way == Way::Fetch) {
            core.fetch_ahead(last.start / BLOCK);
        }
        for (way, range, coming) in runs {
            let part = range.end - range.start;
            let mut target = sub_slices(into, range.start - offset, part);
            match (way, coming) {
                (_, Some(obtained)) => {
                    let bytes = wait(obtained)?;
                    let start = usize::try_from(range.start % BLOCK).unwrap_or(0);
                    copy_into(&bytes, start, &mut target)?;
                }
                (Way::Cache, None) => core.read_cached(range.start, &mut target, part)?,
                (_, None) => target.iter_mut().for_each(|slice| slice.fill(0)),
            }
        }
        Ok(())
    }

    fn read_here(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        let core = &self.core;
        let length = core.check_range(offset, into)?;
        for (way, range) in core.ways(offset, length) {
            let mut target = sub_slices(into, range.start - offset, range.end - range.start);
            match way {
                Way::Zeros => target.iter_mut().for_each(|slice| slice.fill(0)),
                Way::Cache => core.cache.read_verified(range.start, &mut target)?,
                Way::Fetch => {
                    let Loaded::Good(bytes) = core.cache.load(range.start / BLOCK)? else { return Ok(false) };
                    copy_into(&bytes, usize::try_from(range.start % BLOCK).unwrap_or(0), &mut target)?;
                }
            }
        }
        Ok(true)
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        let core = &self.core;
        let length = core.check_range(offset, into)?;
        let mut ways = core.ways(offset, length);
        let (first, second) = (ways.next(), ways.next());
        match (first, second) {
            (None, _) => return Ok(true),
            // Nearly every read of a running guest: one run, no allocation.
            (Some((Way::Cache, _)), None) => return core.read_cached(offset, into, length).map(|()| true),
            (Some((Way::Zeros, _)), None) => {
                into.iter_mut().for_each(|slice| slice.fill(0));
                return Ok(true);
            }
            _ => {}
        }
        let runs: Vec<_> = core.ways(offset, length).collect();
        if runs.iter().any(|(way, _)| *way == Way::Fetch) {
            return Ok(false);
        }
        for (way, range) in runs {
            let part = range.end - range.start;
            let mut target = sub_slices(into, range.start - offset, part);
            if way == Way::Zeros {
                target.iter_mut().for_each(|slice| slice.fill(0));
            } else {
                core.read_cached(range.start, &mut target, part)?;
            }
        }
        Ok(true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let size = self.size_bytes();
        if offset >= size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("look at {offset} of image {}: it has {size} bytes", self.id()),
            ));
        }
        let block = offset / BLOCK;
        let end = (block + self.core.manifest.run(block)) * BLOCK;
        Ok(Extent { length: end.min(size) - offset, data: self.core.manifest.is_stored(block) })
    }
}

fn wait(obtained: Obtained) -> Result<Bytes> {
    match obtained {
        Obtained::Now(bytes) => Ok(bytes),
        // The engine ends every flight within its limit.
        Obtained::Later(receiver) => receiver.blocking_recv().unwrap_or_else(|_| Err(stopped())),
    }
}

/// The error of a reader whose agent is stopping.
pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Unavailable, "read the image: the agent is stopping")
}

/// The slices of `into` that hold its bytes `skip..skip + length`.
fn sub_slices<'a>(into: &'a mut [IoSliceMut<'_>], skip: u64, length: u64) -> Vec<IoSliceMut<'a>> {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let mut out = Vec::with_capacity(into.len());
    for slice in into {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let end = slice.len().min(skip.saturating_add(left));
        let part = &mut slice[skip..end];
        left -= part.len();
        skip = 0;
        out.push(IoSliceMut::new(part));
        if left == 0 {
            break;
        }
    }
    out
}

fn copy_into(bytes: &[u8], start: usize, into: &mut [IoSliceMut<'_>]) -> Result<()> {
    let short = || Error::new(ErrorKind::Internal, "copy a block: it is shorter than its place");
    let mut rest = bytes.get(start..).ok_or_else(short)?;
    for slice in into {
        let (now, later) = rest.split_at_checked(slice.len()).ok_or_else(short)?;
        slice.copy_from_slice(now);
        rest = later;
    }
    Ok(())
}
