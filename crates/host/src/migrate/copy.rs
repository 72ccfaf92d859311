//! The copy: rounds of memory and disk while the guest runs, and what is left when it stands still.
//!
//! ```text
//!   attach tracker ─► round 1: every page ─► scan ─► decide ─┬─ go on ─► round n ─► scan ─► …
//!        layers: ship what is new beside every round         └─ fits: say so, keep rounds short until the pause
//!   paused: last scan ─► last round ─► layers' ends, or maps ─► device state ─► what saving it wrote
//! ```
//!
//! Invariants
//! * A page is sent after it was armed again: what the guest writes during the send is in the next set.
//! * Pages that disk servers write for the guest are in the set too ([`SharedDirty`]).
//! * A page that a scan reported while the guest ran is read after a grace period ([`Watch::grace`]): a direct transfer
//!   that was under way at the scan has ended then.
//! * After the last scan the guest stands still and no disk is served, so nothing changes any more but what QEMU
//!   itself writes while it saves its devices: a scan after the save catches that.
//!
//! Not here: when the pause begins (`engine::memory::precopy` advises, `engine::migrate::handover` orders).

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use whimbrel_engine::memory::page_group::{Capture as Way, Wanted};
use whimbrel_engine::memory::precopy::{Decision, Precopy, Round};
use whimbrel_engine::memory::rank::{self, Classes, Ranking};
use whimbrel_wire::Name;
use whimbrel_wire::peer::migrate::{LayerHave, LayerHead, PullHead};
use whimbrel_wire::record::layer::{BLOCK_BYTES, RunKind, ShipPosition, runs};

use super::data::{self, Chunk};
use super::follow::{self, Follow};
use super::watch::Watch;
use crate::block_dev::BlockDev as _;
use crate::blocking::blocking;
use crate::codec::adaptive::Adaptive;
use crate::disk::{Layer, ReclaimHold, ShipEnd};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::export::{FilledFrom, WriteTracker};
use crate::guest::capture::Capture;
use crate::guest::device_state::Saver;
use crate::guest::inject::Injected;
use crate::guest::precheck::{MovedBy, RamBlock, Report};
use crate::link::PeerStream;
use crate::memory::pace::Pace;
use crate::memory::source::{RoundReport, Source, SourceOptions};
use crate::memory::{Limiter, PageBitmap, Progress, RamFile, SharedDirty};
use crate::task::TaskHandle;
use crate::vm::LocalVm;

/// Bytes of a layer sent in one piece.
const CHUNK_BYTES: usize = 4 << 20;
/// A layer is caught up in at most so many passes per round; the rest is the next round's.
const CATCH_UP_PASSES: u32 = 8;
/// A layer whose blocks follow later is flushed this often while the guest runs, so that little is left to flush when it
/// stands still.
const FLUSH_EVERY: Duration = Duration::from_millis(500);
/// Rounds shorter than this are spaced out: an idle guest needs no rounds back to back.
const ROUND_MIN: Duration = Duration::from_millis(20);

/// The target's RAM files, in the order in which the source offers them.
pub fn target_blocks(vm: &LocalVm) -> Result<Vec<RamFile>> {
    let (Some(name), Some(path)) = (crate::guest::launch::ram_block(&vm.spec), &vm.ram_path) else {
        return Err(Error::new(ErrorKind::Unsupported, "receive RAM: this VM has several RAM blocks"));
    };
    Ok(vec![RamFile::open_target(name, path)?])
}

/// What each of the VM's disks filled the RAM file's pages from, in the order of its volumes.
fn filled(vm: &LocalVm, ram: &std::fs::Metadata) -> Vec<Option<FilledFrom>> {
    let disk = |name: &Name| vm.disks.iter().find(|disk| disk.volume == *name);
    let volumes = vm.spec.volumes.iter();
    volumes.map(|name| disk(name)?.filled(ram.dev(), ram.ino())).collect()
}

/// One RAM block under copy.
struct Block {
    capture: Capture,
    follow: Follow,
    by_disks: Arc<SharedDirty>,
    dirty: PageBitmap,
    before: PageBitmap,
    ranking: Ranking,
    /// When it was last looked for written pages; the first look finds what exists, which says nothing of change.
    looked: Option<Instant>,
}

impl Block {
    /// The pages written since the last look; they are dirty from now on.
    fn written(&mut self) -> Result<PageBitmap> {
        let mut fresh = PageBitmap::new(self.dirty.pages());
        let stats = self.capture.scan(&mut fresh)?;
        self.follow.scanned(self.capture.way(), &fresh, stats.took);
        self.by_disks.drain_into(&mut fresh);
        if let Some(looked) = self.looked.replace(Instant::now()) {
            self.ranking.observe(looked.elapsed().as_secs_f64(), fresh.segments());
        }
        self.dirty.merge(&fresh);
        Ok(fresh)
    }
}

/// Memory under copy (mode A).
pub struct MemoryCopy {
    blocks: Vec<Block>,
    source: Source<PeerStream>,
    watch: Watch,
}

/// A layer under copy.
pub struct LayerCopy {
    /// Its volume.
    pub volume: Name,
    layer: Arc<Layer>,
    stream: PeerStream,
    limiter: Arc<Limiter>,
    pace: Pace,
    /// Back from each piece that it packed.
    adaptive: Option<Adaptive>,
    position: ShipPosition,
    end: Option<ShipEnd>,
    _hold: ReclaimHold,
}

impl MemoryCopy {
    /// Starts to track the guest's writes and offers its RAM to the target.
    pub async fn begin(
        vm: &LocalVm,
        report: &Report,
        injected: Injected,
        stream: PeerStream,
        mut options: SourceOptions,
        progress: Progress,
        wanted: Wanted,
    ) -> Result<Self> {
        let ours: Vec<&RamBlock> = report.ram.iter().filter(|block| block.moved_by == MovedBy::Us).collect();
        tracing::debug!(vm = %vm.name, stopped_us = injected.stopped.as_micros(), "userfaultfd made inside QEMU");
        let [block] = ours.as_slice() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("track the memory of vm {}: {} RAM blocks, not one", vm.name, ours.len()),
            ));
        };
        let path = block
            .path
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "track a RAM block without a file"))?;
        let file = File::open(path).with_context(|| format!("open RAM file {}", path.display()))?;
        let meta = file.metadata().context("look at the RAM file")?;
        let pages = block.size_bytes.div_ceil(crate::memory::PAGE_BYTES as u64);
        let by_disks = Arc::new(SharedDirty::new(pages));
        for disk in &vm.disks {
            let tracker =
                WriteTracker { device: meta.dev(), inode: meta.ino(), dirty: Arc::clone(&by_disks) };
            disk.track_writes(Some(tracker));
        }
        let (way, uffd) = match Follow::first(wanted) {
            Way::Pages => (Way::Pages, injected.uffd),
            Way::Groups => match follow::injected_for(Way::Groups, vm).await {
                Ok(serving) => (Way::Groups, serving.uffd),
                Err(error) => {
                    tracing::warn!(vm = %vm.name, %error, "writes are followed page by page, not in groups");
                    (Way::Pages, injected.uffd)
                }
            },
        };
        let capture = Capture::attach(way, vm.process.pid(), uffd, &file, &block.mappings)?;
        let follow = Follow::new(wanted);
        let ram = RamFile::open_source(block.name.clone(), path)?;
        options.disks.filled = filled(vm, &meta);
        let source = Source::open(stream, vec![ram], options, progress).await?;
        let block = Block {
            capture,
            follow,
            by_disks,
            dirty: PageBitmap::new(pages),
            before: PageBitmap::new(pages),
            ranking: Ranking::new(pages),
            looked: None,
        };
        let watch = Watch::new(vm.qmp().await?, report);
        Ok(Self { blocks: vec![block], source, watch })
    }

    /// Adds what was written since the last scan; how many pages are dirty now.
    fn scan(&mut self) -> Result<u64> {
        let mut dirty = 0;
        for block in &mut self.blocks {
            block.written()?;
            dirty += block.dirty.count();
        }
        Ok(dirty)
    }

    /// Follows writes in the other way from now on, if that is the better one.
    async fn follow_better(&mut self, vm: &LocalVm, report: &RoundReport) -> Result<()> {
        for index in 0..self.blocks.len() {
            let Some(block) = self.blocks.get_mut(index) else { break };
            let dirty_pages = block.dirty.count();
            let Some(way) = block.follow.consider(&block.capture, report, dirty_pages) else { continue };
            let Some(injected) = block.follow.userfaultfd(way, vm).await else { continue };
            // It takes long for a large guest, and other work waits for this thread.
            let mut blocks = std::mem::take(&mut self.blocks);
            let switched = blocking("follow writes in another way", move || {
                let result = match blocks.get_mut(index) {
                    Some(block) => block.capture.switch(injected.uffd, &mut block.dirty),
                    None => Ok(()),
                };
                Ok((blocks, result))
            });
            let (blocks, result) = switched.await?;
            self.blocks = blocks;
            result?;
        }
        Ok(())
    }

    fn show(&self, task: &TaskHandle) {
        self.watch.show(task);
        self.blocks.iter().for_each(|block| block.follow.show(&block.capture, task));
    }

    /// Sends what is dirty. Of pages that were dirty the round before, too, the most often written are kept for a later
    /// round, up to `withhold_pages` of them.
    async fn round(&mut self, withhold_pages: u64, last: bool) -> Result<RoundReport> {
        if !last {
            self.watch.grace().await?;
        }
        let classes: Vec<Classes> = self.blocks.iter().map(|block| block.ranking.classes()).collect();
        let again = |block: &Block| {
            let mut again = block.dirty.clone();
            again.intersect(&block.before);
            again
        };
        let floor = if withhold_pages > 0 {
            let mut count = [0; rank::CLASSES];
            for (block, classes) in self.blocks.iter().zip(&classes) {
                classes.count(again(block).segments(), &mut count);
            }
            rank::withhold_from(&count, withhold_pages)
        } else {
            None
        };
        let mut sets = Vec::with_capacity(self.blocks.len());
        for (block, classes) in self.blocks.iter_mut().zip(&classes) {
            let mut hot = again(block);
            hot.retain_segments(|segment| floor.is_some_and(|floor| classes.of(segment) >= floor));
            let mut set = block.dirty.take();
            block.before = set.clone();
            set.subtract(&hot);
            block.dirty = hot;
            sets.push(set);
        }
        self.source.rank(classes);
        if last {
            return self.source.send_round(&sets, true).await;
        }
        let blocks = &mut self.blocks;
        let mut rewritten = || blocks.iter_mut().map(Block::written).collect();
        self.source.send_round_while_running(&sets, &mut rewritten).await
    }

    /// The last round: the guest stands still.
    pub async fn last_round(&mut self) -> Result<RoundReport> {
        self.scan()?;
        self.round(0, true).await
    }

    /// Fails if the VM's memory is not the one that is copied any more.
    pub async fn must_be_same(&self) -> Result<()> {
        self.watch.same_memory().await
    }

    /// Compares the hashes of all RAM at both ends.
    pub async fn compare(&mut self) -> Result<String> {
        Ok(self.source.compare_digests().await?.to_hex().to_string())
    }

    /// Stops tracking, whatever state the stream is in.
    pub fn abandon(self) {
        for block in self.blocks {
            if let Err(error) = block.capture.detach() {
                tracing::warn!(%error, "write tracking was not undone");
            }
        }
    }
}

impl LayerCopy {
    /// A layer whose stream is open. The limit holds until the guest stands still.
    pub fn new(volume: Name, layer: Arc<Layer>, stream: PeerStream, limiter: Arc<Limiter>) -> Self {
        let position = layer.ship_from();
        let _hold = layer.hold_reclaim();
        let pace = Pace::new(1, false);
        Self { volume, layer, stream, limiter, pace, adaptive: None, position, end: None, _hold }
    }

    /// Bytes that the target lacks.
    fn left_bytes(&self) -> u64 {
        self.layer.ship_left_bytes(&self.position)
    }

    /// Sends what was written since.
    async fn catch_up(&mut self) -> Result<u64> {
        let mut sent = 0;
        for _ in 0..CATCH_UP_PASSES {
            let (layer, from) = (Arc::clone(&self.layer), self.position);
            let mut adaptive = match self.adaptive.take() {
                Some(adaptive) => adaptive,
                None => Adaptive::new(self.pace.chooser())?,
            };
            let read = move || {
                let (log, next) = layer.read_ship(&from, CHUNK_BYTES)?;
                let chunk = if log.is_empty() { None } else { Some(Chunk::pack(&log, &mut adaptive)?) };
                Ok((chunk, next, adaptive))
            };
            let (chunk, next, adaptive) = blocking("read a layer", read).await?;
            self.adaptive = Some(adaptive);
            let Some((chunk, cpu_s)) = chunk else { break };
            // The end of a layer is known when nobody writes it any more: a guest waits.
            if self.end.is_none() {
                self.limiter.pass(chunk.bytes().len()).await;
            }
            let writing = Instant::now();
            data::write_piece(&mut self.stream, chunk.bytes()).await?;
            self.pace.wrote(chunk.bytes().len(), writing.elapsed(), cpu_s);
            sent += chunk.bytes().len() as u64;
            self.position = next;
        }
        Ok(sent)
    }

    /// Sends a layer that nobody writes, unless the target has it; gives the bytes sent. Ends early, with an error, once
    /// `stop` is set. `head` is what its header on disk says: a merge may have put it on another parent since it was opened.
    pub async fn ship_whole(mut self, head: &LayerHead, stop: &AtomicBool) -> Result<u64> {
        data::write_json(&mut self.stream, head).await?;
        self.stream.flush().await.context("send a layer's head")?;
        let answer: LayerHave = data::read_json(&mut self.stream).await?;
        if answer.have {
            return Ok(0);
        }
        let mut sent = 0;
        loop {
            let some = self.catch_up().await?;
            if some == 0 {
                return Ok(sent + self.finish().await?);
            }
            sent += some;
            if stop.load(Ordering::Acquire) {
                return Err(Error::new(ErrorKind::Cancelled, "send a layer: the copy is over"));
            }
        }
    }

    /// The guest stands still: sends the rest and waits until the target has all of it, durably.
    pub async fn finish(&mut self) -> Result<u64> {
        let layer = Arc::clone(&self.layer);
        let end = blocking("flush a layer", move || layer.ship_end()).await?;
        self.end = Some(end);
        let mut sent = 0;
        while !end.reached(&self.position) {
            let some = self.catch_up().await?;
            if some == 0 && !end.reached(&self.position) {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("ship volume {}: its log ends early", self.volume),
                ));
            }
            sent += some;
        }
        data::write_piece(&mut self.stream, &[]).await?;
        data::write_json(&mut self.stream, &end.seal(self.position)).await?;
        data::read_result(&mut self.stream).await.with_context(|| format!("ship volume {}", self.volume))?;
        Ok(sent)
    }
}

/// A layer of which only the map is sent; its blocks follow when the VM has moved.
pub struct LayerMap {
    volume: Name,
    layer: Arc<Layer>,
    stream: PeerStream,
    flushed: Option<Instant>,
}

impl LayerMap {
    /// A layer whose stream is open; refused if its map is too long for a pause.
    pub async fn new(volume: Name, layer: Arc<Layer>, stream: PeerStream) -> Result<Self> {
        let measured = Arc::clone(&layer);
        let map = blocking("read the map of a layer", move || Ok(measured.pull_map())).await?;
        // The guest goes on writing, so some room is left.
        if map.len() as u64 > PullHead::MAP_BYTES_MAX / 2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "send the map of volume {volume}: its layer is in too many pieces ({} bytes)",
                    map.len()
                ),
            )
            .hint("move it with --disk copy"));
        }
        Ok(Self { volume, layer, stream, flushed: None })
    }

    /// Makes durable what the guest has written, now and then.
    async fn keep_durable(&mut self) -> Result<()> {
        if self.flushed.is_none_or(|at| at.elapsed() >= FLUSH_EVERY) {
            let layer = Arc::clone(&self.layer);
            blocking("flush a layer", move || layer.flush()).await?;
            self.flushed = Some(Instant::now());
        }
        Ok(())
    }

    /// The guest stands still: makes the rest durable and tells the target which blocks are here. Gives the bytes sent
    /// and those that are to follow.
    pub async fn finish(&mut self) -> Result<(u64, u64)> {
        let layer = Arc::clone(&self.layer);
        let (end, map) = blocking("flush a layer", move || Ok((layer.ship_end()?, layer.pull_map()))).await?;
        let map_bytes = map.len() as u64;
        let head = PullHead { data_id: end.data_id, epoch: end.epoch, map_bytes };
        data::write_json(&mut self.stream, &head).await?;
        for piece in map.chunks(CHUNK_BYTES) {
            data::write_piece(&mut self.stream, piece).await?;
        }
        data::write_piece(&mut self.stream, &[]).await?;
        self.stream.flush().await.context("send the map of a layer")?;
        let runs = runs::decode(&map).map_err(Error::from)?;
        let data = runs.iter().filter(|run| run.kind != RunKind::Zero);
        let follow = data.map(|run| u64::from(run.blocks) * BLOCK_BYTES).sum();
        data::read_result(&mut self.stream)
            .await
            .with_context(|| format!("send the map of volume {}", self.volume))?;
        Ok((map_bytes, follow))
    }
}

/// Everything under copy.
pub struct Copying {
    /// Memory, in mode A.
    pub memory: Option<MemoryCopy>,
    /// Layers.
    pub layers: Vec<LayerCopy>,
    /// Layers that follow later.
    pub maps: Vec<LayerMap>,
    /// Saves the device state at the end, in mode A.
    pub saver: Option<Saver>,
    /// Judges every round.
    pub precopy: Precopy,
}

/// What a round of everything led to.
pub enum After {
    /// Not yet.
    GoOn {
        /// Leave so many of the pages that are dirty every time for the last round.
        withhold_pages: u64,
    },
    /// The rest fits the downtime limit.
    Fits,
}

impl Copying {
    /// One round of memory and layers (mode A).
    pub async fn round(
        &mut self,
        vm: &LocalVm,
        withhold_pages: &mut u64,
        task: &TaskHandle,
        progress: &Progress,
        layer_bytes: &mut u64,
    ) -> Result<After> {
        let started = Instant::now();
        let Some(memory) = &mut self.memory else {
            return Err(Error::new(ErrorKind::Internal, "copy memory: there is none under copy"));
        };
        if progress.get().round == 0 {
            memory.scan()?;
            memory.blocks.iter_mut().for_each(|block| block.follow.begin());
        }
        let report = memory.round(*withhold_pages, false).await?;
        memory.show(task);
        *layer_bytes += layers_pass(&mut self.layers, &mut self.maps).await?;
        if let Some(rest) = ROUND_MIN.checked_sub(started.elapsed()) {
            tokio::time::sleep(rest).await;
        }
        memory.follow_better(vm, &report).await?;
        let dirty = memory.scan()?;
        let after = self.judge(report.to_engine(dirty, 0), task, progress)?;
        *withhold_pages = match after {
            After::GoOn { withhold_pages } => withhold_pages,
            After::Fits => 0,
        };
        Ok(after)
    }

    /// Asks the engine what to do after a round; the disks' tails are filled in here.
    pub fn judge(&mut self, round: Round, task: &TaskHandle, progress: &Progress) -> Result<After> {
        let disk_tail_bytes = self.layers.iter().map(LayerCopy::left_bytes).sum();
        let round = Round { disk_tail_bytes, ..round };
        let decision = self.precopy.after_round(&round);
        progress.update(|figures| {
            figures.dirty_bytes_s = self.precopy.dirty_bytes_s();
            figures.expected_pause_ms = self.precopy.expected_pause_ms();
            figures.page_left_ns = self.precopy.page_left_ns();
        });
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        {
            task.figure("rounds", f64::from(self.precopy.rounds()));
            task.figure("dirty_bytes", (round.dirty_pages * crate::memory::PAGE_BYTES as u64) as f64);
        }
        match decision {
            Decision::Continue { withhold_pages } => Ok(After::GoOn { withhold_pages }),
            Decision::Pause { estimate_ms, .. } => {
                tracing::debug!(estimate_ms, dirty = round.dirty_pages, disk_tail_bytes, "the rest fits");
                Ok(After::Fits)
            }
            Decision::NotConverging(stuck) => {
                Err(Error::new(ErrorKind::TimedOut, format!("copy memory: {stuck}"))
                    .hint("raise --downtime-limit or --bandwidth, or quiet the guest"))
            }
        }
    }

    /// One pass over the layers alone (mode B, where QEMU copies the memory); gives the bytes sent.
    pub async fn layers_pass(&mut self) -> Result<u64> {
        layers_pass(&mut self.layers, &mut self.maps).await
    }

    /// Undoes what the copy did to the VM.
    pub fn abandon(self, vm: &LocalVm) {
        for disk in &vm.disks {
            disk.track_writes(None);
        }
        if let Some(memory) = self.memory {
            memory.abandon();
        }
    }
}

async fn layers_pass(layers: &mut [LayerCopy], maps: &mut [LayerMap]) -> Result<u64> {
    let mut sent = 0;
    for layer in layers {
        sent += layer.catch_up().await?;
    }
    for map in maps {
        map.keep_durable().await?;
    }
    Ok(sent)
}
