//! The sending side of mode A: rounds of pages over one stream.
//!
//! ```text
//!   send_round:  Plan ──► Worker (blocking thread) ─┐ bounded queue
//!                    └──► Worker (blocking thread) ─┴──► writer (limiter, stream) ──► target
//!                                                            └─ every window: Pace::wrote
//! ```
//!
//! A round is over when the target has said which pages of it are in place, so two rounds never overlap. Those that it
//! lacks, because they were not sent with their bytes and it has not what was named, are in the next round; after a last
//! round they are sent at once.
//!
//! Invariants
//! * Pages are read while the guest writes. The caller takes a page out of the tracker, which re-arms it, **before**
//!   it hands the page to [`Source::send_round`]: a page that is torn by a write is dirty again and is in a later
//!   round. The last round is sent while the guest is paused.
//! * At most [`QUEUE_FRAMES`] groups are encoded and unsent: memory is bounded, and a slow link slows the workers.
//! * When `send_round` for the last round has returned, the target lacks nothing.
//! * Dropping the future of `send_round` cancels it; the stream is of no use afterwards, and says so.
//!
//! Not here: which pages, how many rounds (`guest`, `engine::memory::precopy`), the format (`wire::peer::memory`).

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use whimbrel_engine::memory::precopy::Round;
use whimbrel_engine::memory::rank::Classes;
use whimbrel_wire::peer::memory::{BlockShape, Control, Misses, Missing, RoundCounts, Run};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::bitmap::PageBitmap;
use crate::memory::disks::Disks;
use crate::memory::encoder::{Work, Worker};
use crate::memory::frames::{read_control, write_control};
use crate::memory::known::Known;
use crate::memory::limit::Limiter;
use crate::memory::pace::{Pace, cores};
use crate::memory::plan::Plan;
use crate::memory::progress::Progress;
use crate::memory::ram::{self, RamFile};
use crate::memory::techniques::Techniques;

/// Groups of pages that may wait between the workers and the stream.
pub const QUEUE_FRAMES: usize = 12;
/// How long a target may take to hash its RAM.
const DIGEST_LIMIT: Duration = Duration::from_secs(600);

/// How a source sends.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Threads that encode; at least 1. The default leaves one processor free.
    pub workers: usize,
    /// The limit on bytes per second; the last round ignores it.
    pub limiter: Arc<Limiter>,
    /// How long the target may take nothing, or not answer.
    pub stall_limit: Duration,
    /// How often a running round looks for pages that were written again.
    pub look_every: Duration,
    /// Never compress (for measurements).
    pub raw_only: bool,
    /// What may make pages shorter, if the target knows it, too.
    pub techniques: Techniques,
    /// The VM's disks, of which pages of its memory may be blocks.
    pub disks: Disks,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            workers: cores().saturating_sub(1).max(1),
            limiter: Arc::new(Limiter::new(None)),
            stall_limit: Duration::from_secs(30),
            look_every: Duration::from_millis(100),
            raw_only: false,
            techniques: Techniques::default(),
            disks: Disks::default(),
        }
    }
}

/// Finds the pages that were written since the last look, one set for each block; whoever gives them remembers them for a
/// later round.
pub type Rewritten<'a> = &'a mut (dyn FnMut() -> Result<Vec<PageBitmap>> + Send);

/// What a round was.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundReport {
    /// The round's number, from 1.
    pub round: u32,
    /// Pages by kind.
    pub counts: RoundCounts,
    /// Pages that were to be sent and had not changed.
    pub unchanged_pages: u64,
    /// Pages that the target lacks all the same; they are in the next round by themselves.
    pub missing_pages: u64,
    /// Bytes that went out.
    pub wire_bytes: u64,
    /// From the call to the target's answer.
    pub duration: Duration,
    /// Part of it that was spent obeying the bandwidth limit.
    pub throttled: Duration,
    /// Wire bytes per second that the link takes, as measured so far; 0 if unknown.
    pub link_bytes_s: u64,
    /// Processor time of encoding, seconds.
    pub encode_cpu_s: f64,
    /// Processor time of decoding and writing at the target, milliseconds.
    pub decode_ms: u64,
}

impl RoundReport {
    /// The round and another one behind it, which were one to the caller.
    fn and(mut self, next: &Self) -> Self {
        self.counts.add(&next.counts);
        self.round = next.round;
        self.unchanged_pages += next.unchanged_pages;
        self.missing_pages = next.missing_pages;
        self.wire_bytes += next.wire_bytes;
        self.duration += next.duration;
        self.throttled += next.throttled;
        self.link_bytes_s = next.link_bytes_s;
        self.encode_cpu_s += next.encode_cpu_s;
        self.decode_ms += next.decode_ms;
        self
    }

    /// The round as the engine judges it, with what is dirty now.
    pub fn to_engine(&self, dirty_pages: u64, disk_tail_bytes: u64) -> Round {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        // What is named in the first round is mostly never written again, and says nothing of the time that pages which are
        // take; later it is a part of them.
        let again = if self.round > 1 { self.counts.referred_pages + self.unchanged_pages } else { 0 };
        Round {
            data_pages: self.counts.data_pages + again,
            duration_us: us(self.duration),
            throttled_us: us(self.throttled),
            link_bytes_s: self.link_bytes_s,
            dirty_pages: dirty_pages + self.missing_pages,
            disk_tail_bytes,
        }
    }
}

/// The sending side of one move.
pub struct Source<S> {
    stream: S,
    blocks: Arc<[RamFile]>,
    options: SourceOptions,
    pace: Pace,
    known: Arc<Known>,
    /// What the target lacks of earlier rounds; nothing, or a set for each block.
    lacking: Vec<PageBitmap>,
    /// Workers at rest.
    workers: Vec<Worker>,
    spare_buffers: Arc<Mutex<Vec<Vec<u8>>>>,
    progress: Progress,
    /// How often what changes, for each block; see [`Self::rank`].
    classes: Vec<Classes>,
    round: u32,
    /// A round was begun and not finished: the stream is somewhere in the middle.
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Source<S> {
    /// Tells the target what is coming and waits until it agrees.
    pub async fn open(
        stream: S,
        blocks: Vec<RamFile>,
        options: SourceOptions,
        progress: Progress,
    ) -> Result<Self> {
        let blocks: Arc<[RamFile]> = blocks.into();
        let threads = options.workers.max(1);
        let mut source = Self {
            stream,
            pace: Pace::new(threads, options.raw_only),
            options,
            known: Arc::new(Known::new(Arc::clone(&blocks), &Techniques::NONE, Disks::default())),
            lacking: Vec::new(),
            workers: Vec::new(),
            spare_buffers: Arc::default(),
            progress,
            classes: Vec::new(),
            round: 0,
            broken: false,
            blocks,
        };
        let shapes = source.blocks.iter();
        let shapes =
            shapes.map(|ram| BlockShape { name: ram.name().to_owned(), pages: ram.pages() }).collect();
        let total_pages: u64 = source.blocks.iter().map(RamFile::pages).sum();
        source.progress.update(|figures| figures.total_bytes = total_pages * 4096);
        source.say(&Control::Open { blocks: shapes }).await.context("offer RAM")?;
        match source.hear(source.options.stall_limit).await.context("offer RAM")? {
            Control::Opened { knows } => {
                let techniques = source.options.techniques.shared_with(&knows);
                let disks = std::mem::take(&mut source.options.disks);
                source.known = Arc::new(Known::new(Arc::clone(&source.blocks), &techniques, disks));
            }
            other => return Err(unexpected(&other)),
        }
        for _ in 0..threads {
            let (blocks, known) = (Arc::clone(&source.blocks), Arc::clone(&source.known));
            source.workers.push(Worker::new(blocks, source.pace.chooser(), known)?);
        }
        Ok(source)
    }

    /// Empty sets, one for each block.
    pub fn empty_sets(&self) -> Vec<PageBitmap> {
        self.blocks.iter().map(|ram| PageBitmap::new(ram.pages())).collect()
    }

    /// Full sets, one for each block: the first round.
    pub fn full_sets(&self) -> Vec<PageBitmap> {
        self.blocks.iter().map(|ram| PageBitmap::full(ram.pages())).collect()
    }

    /// From the next round on, pages are sent in this order: what changes least first. One element for each block.
    pub fn rank(&mut self, classes: Vec<Classes>) {
        self.classes = classes;
    }

    /// Sends the pages of `sets` (one set for each block) and waits until the target has them. `last` says that the
    /// guest is paused; the bandwidth limit is then lifted.
    pub async fn send_round(&mut self, sets: &[PageBitmap], last: bool) -> Result<RoundReport> {
        self.round(sets, last, None).await
    }

    /// Sends a round while the guest runs. Pages that are found to be `rewritten` before their turn came are left out:
    /// they have to be sent in a later round in any case.
    pub async fn send_round_while_running(
        &mut self,
        sets: &[PageBitmap],
        rewritten: Rewritten<'_>,
    ) -> Result<RoundReport> {
        self.round(sets, false, Some(rewritten)).await
    }

    /// What the target lacks of rounds that were sent, for whoever goes on without a last round; nothing, or a set for
    /// each block.
    pub fn lacking(&self) -> &[PageBitmap] {
        &self.lacking
    }

    async fn round(
        &mut self,
        sets: &[PageBitmap],
        last: bool,
        rewritten: Option<Rewritten<'_>>,
    ) -> Result<RoundReport> {
        let lacking = std::mem::take(&mut self.lacking);
        let mut sets = Cow::Borrowed(sets);
        if !lacking.is_empty() {
            sets.to_mut().iter_mut().zip(&lacking).for_each(|(set, lacking)| set.merge(lacking));
        }
        let report = self.one_round(&sets, last, rewritten).await?;
        if !last || self.lacking.is_empty() {
            return Ok(report);
        }
        // The guest stands still, and waits for these.
        let lacking = std::mem::take(&mut self.lacking);
        let rest = self.one_round(&lacking, true, None).await?;
        if !self.lacking.is_empty() {
            let text = format!("send RAM: the target lacks {} pages that it was sent", rest.missing_pages);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(report.and(&rest))
    }

    async fn one_round(
        &mut self,
        sets: &[PageBitmap],
        last: bool,
        rewritten: Option<Rewritten<'_>>,
    ) -> Result<RoundReport> {
        if self.broken {
            return Err(Error::new(ErrorKind::Cancelled, "send RAM: an earlier round was cut short"));
        }
        self.broken = true;
        let start = Instant::now();
        self.round += 1;
        let left_pages: u64 = sets.iter().map(PageBitmap::count).sum();
        let round = self.round;
        self.progress.update(|figures| (figures.round, figures.left_pages) = (round, left_pages));
        let sent = self.try_round(sets, last, rewritten).await;
        let (mut report, work) = match sent {
            Ok(sent) => sent,
            Err(error) => return Err(self.explain(error).await),
        };
        report.duration = start.elapsed();
        report.counts = work.counts;
        report.unchanged_pages = work.shortened.unchanged_pages;
        report.encode_cpu_s = work.cpu_s;
        report.round = round;
        let link_bytes_s = self.pace.link_bytes_s();
        report.link_bytes_s = link_bytes_s;
        self.progress.update(|figures| {
            figures.left_pages = 0;
            figures.link_bytes_s = link_bytes_s;
            figures.packed_raw_bytes += work.packed_raw_bytes;
            figures.packed_wire_bytes += work.packed_wire_bytes;
            figures.shortened.add(&work.shortened);
        });
        self.broken = false;
        Ok(report)
    }

    /// Hashes all RAM on both sides at once; the guest is paused. An error of kind `Corrupt` if they differ.
    pub async fn compare_digests(&mut self) -> Result<blake3::Hash> {
        let blocks = Arc::clone(&self.blocks);
        let ours = spawn_blocking(move || ram::digest(&blocks, cores()));
        self.say(&Control::DigestAsk).await.context("compare RAM")?;
        let theirs = match self.hear(DIGEST_LIMIT).await.context("compare RAM")? {
            Control::Digest { blake3 } => blake3,
            other => return Err(unexpected(&other)),
        };
        let ours = joined(ours.await)?;
        if ours.to_hex().as_str() == theirs {
            return Ok(ours);
        }
        let text = format!("compare RAM: the source has {}, the target {theirs}", ours.to_hex());
        Err(Error::new(ErrorKind::Corrupt, text))
    }

    /// Says that no more rounds follow, and waits until the target knows.
    pub async fn close(mut self) -> Result<()> {
        self.say(&Control::Close).await.context("finish RAM")?;
        match self.hear(self.options.stall_limit).await.context("finish RAM")? {
            Control::Closed => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn try_round(
        &mut self,
        sets: &[PageBitmap],
        last: bool,
        rewritten: Option<Rewritten<'_>>,
    ) -> Result<(RoundReport, Work)> {
        self.known.begin_round(self.round, last);
        self.say(&Control::RoundBegin { last }).await?;
        let plan = Plan::new(Arc::clone(&self.blocks), sets, &self.classes, self.round == 1);
        let plan = Arc::new(Mutex::new(plan));
        let (sender, receiver) = mpsc::channel(QUEUE_FRAMES);
        let threads = self.start_workers(&plan, &sender);
        // The queue ends with the workers.
        drop(sender);
        let mut report = RoundReport::default();
        let skipping = rewritten.map(|rewritten| (plan, rewritten));
        self.write_frames(receiver, last, skipping, &mut report).await?;
        let mut work = Work::default();
        for thread in threads {
            let (worker, did) = joined(thread.await)?;
            self.workers.push(worker);
            work.add(&did);
        }
        self.say(&Control::RoundEnd { counts: work.counts }).await?;
        match self.hear(self.options.stall_limit).await? {
            Control::RoundDone { counts, decode_ms, missing, misses } if counts == work.counts => {
                report.decode_ms = decode_ms;
                self.known.learn_disks(work.shortened.disk.pages, misses.disk);
                self.take_missing(&missing, &misses, &mut report);
            }
            Control::RoundDone { counts, .. } => {
                let text = format!("the target wrote {counts:?} of {:?}", work.counts);
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            other => return Err(unexpected(&other)),
        }
        Ok((report, work))
    }

    /// Keeps what the target says it lacks for the next round.
    fn take_missing(&mut self, missing: &[Missing], misses: &Misses, report: &mut RoundReport) {
        self.progress.update(|figures| figures.misses.add(misses));
        if !missing.is_empty() {
            self.lacking = self.known.lacks(missing);
            report.missing_pages = self.lacking.iter().map(PageBitmap::count).sum();
        }
    }

    fn start_workers(
        &mut self,
        plan: &Arc<Mutex<Plan>>,
        sender: &mpsc::Sender<Encoded>,
    ) -> Vec<JoinHandle<Result<(Worker, Work)>>> {
        let round = self.round;
        let start = |worker: Worker| {
            let (plan, sender, spare) = (Arc::clone(plan), sender.clone(), Arc::clone(&self.spare_buffers));
            spawn_blocking(move || encode_round(worker, round, &plan, &sender, &spare))
        };
        self.workers.drain(..).map(start).collect()
    }

    async fn write_frames(
        &mut self,
        mut frames: mpsc::Receiver<Encoded>,
        last: bool,
        mut skipping: Option<(Arc<Mutex<Plan>>, Rewritten<'_>)>,
        report: &mut RoundReport,
    ) -> Result<()> {
        self.pace.resume();
        let mut looked = Instant::now();
        while let Some(frame) = frames.recv().await {
            if let Some((plan, rewritten)) = &mut skipping
                && looked.elapsed() >= self.options.look_every
            {
                let pages = rewritten()?;
                let skipped = plan.lock().skip(&pages);
                self.progress
                    .update(|figures| figures.left_pages = figures.left_pages.saturating_sub(skipped));
                looked = Instant::now();
            }
            if !last {
                report.throttled += self.options.limiter.pass(frame.bytes.len()).await;
            }
            let start = Instant::now();
            timeout(self.options.stall_limit, self.stream.write_all(&frame.bytes))
                .await
                .map_err(|_| Error::new(ErrorKind::TimedOut, "the target takes no more pages"))?
                .context("write to target")?;
            self.pace.wrote(frame.bytes.len(), start.elapsed(), frame.cpu_s);
            let bytes = frame.bytes.len() as u64;
            report.wire_bytes += bytes;
            let (counts, pages) = (frame.counts, frame.pages);
            self.progress.update(|figures| {
                figures.wire_bytes += bytes;
                figures.data_pages += counts.data_pages;
                figures.zero_pages += counts.zero_pages;
                figures.left_pages = figures.left_pages.saturating_sub(pages);
            });
            self.give_back(frame.bytes);
        }
        Ok(())
    }

    fn give_back(&self, mut buffer: Vec<u8>) {
        let mut spare = self.spare_buffers.lock();
        if spare.len() < QUEUE_FRAMES {
            buffer.clear();
            spare.push(buffer);
        }
    }

    async fn say(&mut self, message: &Control) -> Result<()> {
        write_control(&mut self.stream, message, self.round, self.options.stall_limit).await
    }

    async fn hear(&mut self, limit: Duration) -> Result<Control> {
        read_control(&mut self.stream, limit).await
    }

    /// A target that gives up says why and closes; what we see first is a broken stream.
    async fn explain(&mut self, error: Error) -> Error {
        if error.kind() == ErrorKind::Unavailable
            && let Err(refused) = self.hear(Duration::from_millis(500)).await
            && refused.kind() != ErrorKind::Unavailable
            && refused.kind() != ErrorKind::TimedOut
        {
            return refused;
        }
        error
    }
}

/// A worker's output: whole frames.
struct Encoded {
    bytes: Vec<u8>,
    counts: RoundCounts,
    /// Pages done with it, those included that need not be sent.
    pages: u64,
    cpu_s: f64,
}

/// The thread of one worker for one round.
fn encode_round(
    mut worker: Worker,
    round: u32,
    plan: &Mutex<Plan>,
    sender: &mpsc::Sender<Encoded>,
    spare: &Mutex<Vec<Vec<u8>>>,
) -> Result<(Worker, Work)> {
    worker.begin(round);
    let mut runs: Vec<Run> = Vec::new();
    let mut before = Work::default();
    loop {
        let mut bytes = spare.lock().pop().unwrap_or_default();
        let mut ended = None;
        while bytes.is_empty() && ended.is_none() {
            let piece = plan.lock().next(&mut runs)?;
            match piece {
                Some(piece) => worker.encode(piece, &runs, &mut bytes)?,
                None => ended = Some(worker.end(&mut bytes)?),
            }
        }
        let work = worker.work();
        let counts = RoundCounts {
            data_pages: work.counts.data_pages - before.counts.data_pages,
            zero_pages: work.counts.zero_pages - before.counts.zero_pages,
            referred_pages: work.counts.referred_pages - before.counts.referred_pages,
        };
        let (pages, cpu_s) = (work.pages() - before.pages(), work.cpu_s - before.cpu_s);
        before = work;
        // The receiver is gone if the round was given up: nobody waits for the rest.
        if !bytes.is_empty() && sender.blocking_send(Encoded { bytes, counts, pages, cpu_s }).is_err() {
            return Err(Error::new(ErrorKind::Cancelled, "encode RAM: the round was given up"));
        }
        if let Some(work) = ended {
            return Ok((worker, work));
        }
    }
}

/// What a join gives, or the death of the thread as an error.
pub(super) fn joined<T>(result: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.unwrap_or_else(|error| Err(Error::with_source(ErrorKind::Internal, "work on RAM", error)))
}

pub(super) fn unexpected(message: &Control) -> Error {
    Error::new(ErrorKind::Corrupt, format!("read page stream: {message:?} is out of place"))
}
