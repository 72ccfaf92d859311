//! The receiving side of mode A: frames are checked, decoded and written into the incoming guest's RAM files.
//!
//! ```text
//!   Open ─► Opened ─► ( RoundBegin ─► Pages* ─► RoundEnd ─► RoundDone )* ─► Close ─► Closed
//!                          reader ──bounded queue──► decoders (blocking threads): check, decode, pwrite
//! ```
//!
//! Invariants
//! * A page is written only after its frame's check, or its reference's hash, agreed; what could not be is told to the
//!   source at the round's end (`lookup`). Of two rounds the newer one is written last: a round's
//!   decoders have ended before `RoundDone` is said, and only then does the next one begin.
//! * What a source says is never trusted: sizes, places and lengths are checked, a violation ends the stream with an
//!   error, and nothing is ever written outside of the blocks.
//! * The guest does not run here before the handover's COMMIT; until then all of this may be thrown away.
//!
//! Not here: making the RAM files (`guest`), when the guest may run (`engine::migrate::handover`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use whimbrel_wire::peer::memory::{
    BlockShape, Control, Encoding, GROUP_PAGES_MAX, Header, Kind, PAGE_BYTES, Pages, RoundCounts,
};

use crate::codec::adaptive::thread_cpu_s;
use crate::codec::{Decompressor, words};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::disks::Images;
use crate::memory::frames::{read_body, read_control, read_header, write_control};
use crate::memory::lookup::Lookup;
use crate::memory::pace::cores;
use crate::memory::progress::Progress;
use crate::memory::ram::{self, RamFile};
use crate::memory::source::{joined, unexpected};
use crate::memory::techniques::Techniques;

/// Frames that may wait between the stream and the decoders.
const QUEUE_FRAMES: usize = 8;

/// How a target receives.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Threads that decode; at least 1. The default leaves one processor free.
    pub workers: usize,
    /// How long the source may be silent within a round.
    pub stall_limit: Duration,
    /// How long the source may be silent between rounds, while it waits for other things.
    pub idle_limit: Duration,
    /// What the source may use to make pages shorter.
    pub techniques: Techniques,
    /// Images under the VM's disks, as far as this host has them.
    pub images: Images,
}

impl Default for TargetOptions {
    fn default() -> Self {
        Self {
            workers: cores().saturating_sub(1).max(1),
            stall_limit: Duration::from_secs(30),
            idle_limit: Duration::from_secs(300),
            techniques: Techniques::default(),
            images: Images::default(),
        }
    }
}

/// What was received in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Rounds that were completed.
    pub rounds: u32,
    /// The last of them was sent while the guest was paused, and nothing was missing: the memory is complete.
    pub complete: bool,
    /// Pages by kind, over all rounds.
    pub counts: RoundCounts,
}

/// Receives rounds until the source closes. On an error the source is told why; the RAM files are then of no use.
pub async fn receive<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: &mut S,
    blocks: Vec<RamFile>,
    options: &TargetOptions,
    progress: &Progress,
) -> Result<Received> {
    let blocks: Arc<[RamFile]> = blocks.into();
    let mut target = Target {
        pages: blocks.iter().map(RamFile::pages).collect(),
        lookup: Arc::new(Lookup::new(Arc::clone(&blocks), options.images.clone())),
        blocks,
        decoders: Vec::new(),
        spare_buffers: Arc::default(),
        options: options.clone(),
        progress: progress.clone(),
        received: Received::default(),
    };
    let ended = target.run(stream).await;
    if let Err(error) = &ended {
        let refused = Control::Refused { error: error.to_wire() };
        // It may be gone; then there is nobody to tell.
        let _ = write_control(stream, &refused, target.received.rounds, Duration::from_secs(2)).await;
    }
    ended.map(|()| target.received)
}

struct Target {
    blocks: Arc<[RamFile]>,
    /// The sizes of the blocks.
    pages: Arc<[u64]>,
    lookup: Arc<Lookup>,
    /// Decoders at rest.
    decoders: Vec<Decoder>,
    spare_buffers: Arc<Mutex<Vec<Vec<u8>>>>,
    options: TargetOptions,
    progress: Progress,
    received: Received,
}

/// A pages frame on its way to a decoder: the header, the body's buffer, the body's length.
type Job = (Header, Vec<u8>, usize);

impl Target {
    async fn run<S: AsyncRead + AsyncWrite + Unpin + Send>(&mut self, stream: &mut S) -> Result<()> {
        let stall_limit = self.options.stall_limit;
        match read_control(stream, self.options.idle_limit).await? {
            Control::Open { blocks } => self.compare(&blocks)?,
            other => return Err(unexpected(&other)),
        }
        self.decoders = (0..self.options.workers.max(1)).map(|_| Decoder::new()).collect::<Result<_>>()?;
        let Techniques { disk, .. } = self.options.techniques;
        let techniques = Techniques { disk: disk && self.options.images.any(), ..self.options.techniques };
        let knows = techniques.known();
        write_control(stream, &Control::Opened { knows }, 0, stall_limit).await?;
        loop {
            let header = read_header(stream, self.options.idle_limit).await?;
            match self.control(stream, &header).await? {
                Control::RoundBegin { last } => {
                    let (counts, decode_ms) = self.round(stream, header.round).await?;
                    let lookup = Arc::clone(&self.lookup);
                    let (missing, misses) = joined(spawn_blocking(move || lookup.end_round()).await)?;
                    self.received.complete = last && missing.is_empty();
                    let done = Control::RoundDone { counts, decode_ms, missing, misses };
                    write_control(stream, &done, header.round, stall_limit).await?;
                }
                Control::DigestAsk => {
                    let blocks = Arc::clone(&self.blocks);
                    let hash = joined(spawn_blocking(move || ram::digest(&blocks, cores())).await)?;
                    let digest = Control::Digest { blake3: hash.to_hex().to_string() };
                    write_control(stream, &digest, header.round, stall_limit).await?;
                }
                Control::Close => {
                    return write_control(stream, &Control::Closed, header.round, stall_limit).await;
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    fn compare(&self, offered: &[BlockShape]) -> Result<()> {
        let shapes = self.blocks.iter().map(|ram| (ram.name(), ram.pages()));
        if offered.iter().map(|block| (block.name.as_str(), block.pages)).eq(shapes.clone()) {
            return Ok(());
        }
        let list = |blocks: &mut dyn Iterator<Item = (&str, u64)>| {
            blocks.map(|(name, pages)| format!("{name} of {pages} pages")).collect::<Vec<_>>().join(", ")
        };
        let theirs = list(&mut offered.iter().take(16).map(|block| (block.name.as_str(), block.pages)));
        let ours = list(&mut self.blocks.iter().map(|ram| (ram.name(), ram.pages())));
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("receive RAM: the source has {theirs}; here is {ours}"),
        )
        .hint("both sides must start QEMU with the same memory; was the VM's memory changed while it ran?"))
    }

    async fn control<S: AsyncRead + Unpin>(&self, stream: &mut S, header: &Header) -> Result<Control> {
        if header.kind != Kind::Control {
            return Err(Error::new(ErrorKind::Corrupt, "read page stream: pages outside of a round"));
        }
        let mut body = Vec::new();
        read_body(stream, header, &mut body, self.options.stall_limit).await?;
        match Control::parse(header, &body)? {
            Control::Refused { error } => Err(Error::from(error)).context("receive RAM: the source gave up"),
            message => Ok(message),
        }
    }

    /// One round, from after its begin to its end; returns what was written and the milliseconds that took.
    async fn round<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        round: u32,
    ) -> Result<(RoundCounts, u64)> {
        if Some(round) != self.received.rounds.checked_add(1) {
            let text = format!("read page stream: round {round} after {}", self.received.rounds);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        self.progress.update(|figures| figures.round = round);
        let failed = Arc::new(AtomicBool::new(false));
        let (sender, threads) = self.start_decoders(&failed);
        let read = self.read_round(stream, round, &sender, &failed).await;
        drop(sender);
        let (mut counts, mut cpu_s, mut first_error) = (RoundCounts::default(), 0.0, None);
        for thread in threads {
            match joined(thread.await) {
                Ok((decoder, wrote, seconds)) => {
                    self.decoders.push(decoder);
                    counts.add(&wrote);
                    cpu_s += seconds;
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        // A decoder's error is the cause, that of the reader at most its effect.
        let claimed = first_error.map_or(read, Err)?;
        if claimed != counts {
            let text = format!("read page stream: the source sent {claimed:?}, received were {counts:?}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        self.received.rounds = round;
        self.received.counts.add(&counts);
        Ok((counts, (cpu_s * 1e3) as u64))
    }

    fn start_decoders(&mut self, failed: &Arc<AtomicBool>) -> (mpsc::Sender<Job>, Vec<DecoderThread>) {
        let (sender, receiver) = mpsc::channel::<Job>(QUEUE_FRAMES);
        let receiver = Arc::new(Mutex::new(receiver));
        let start = |mut decoder: Decoder| {
            let (blocks, pages) = (Arc::clone(&self.blocks), Arc::clone(&self.pages));
            let lookup = Arc::clone(&self.lookup);
            let (jobs, spare, failed) =
                (Arc::clone(&receiver), Arc::clone(&self.spare_buffers), Arc::clone(failed));
            spawn_blocking(move || {
                let done = decoder.drain((&*blocks, &*lookup), &pages, &jobs, &spare, &failed);
                if done.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                done.map(|(counts, cpu_s)| (decoder, counts, cpu_s))
            })
        };
        (sender, self.decoders.drain(..).map(start).collect())
    }

    /// Reads frames up to the round's end and returns what the source says it sent.
    async fn read_round<S: AsyncRead + Unpin>(
        &self,
        stream: &mut S,
        round: u32,
        sender: &mpsc::Sender<Job>,
        failed: &AtomicBool,
    ) -> Result<RoundCounts> {
        loop {
            let header = read_header(stream, self.options.stall_limit).await?;
            if header.round != round {
                let text = format!("read page stream: a frame of round {} in round {round}", header.round);
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            if header.kind == Kind::Control {
                return match self.control(stream, &header).await? {
                    Control::RoundEnd { counts } => Ok(counts),
                    other => Err(unexpected(&other)),
                };
            }
            let mut body = self.spare_buffers.lock().pop().unwrap_or_default();
            let len = read_body(stream, &header, &mut body, self.options.stall_limit).await?;
            let given_up = || Error::new(ErrorKind::Corrupt, "receive RAM: a frame could not be written");
            if failed.load(Ordering::Relaxed) {
                return Err(given_up());
            }
            let bytes = (Header::LENGTH + len) as u64;
            self.progress.update(|figures| figures.wire_bytes += bytes);
            sender.send((header, body, len)).await.map_err(|_| given_up())?;
        }
    }
}

type DecoderThread = JoinHandle<Result<(Decoder, RoundCounts, f64)>>;

/// Checks, decodes and writes frames; one per thread.
struct Decoder {
    decompressor: Decompressor,
    raw: Vec<u8>,
    /// Words that came in zstd.
    worded: Vec<u8>,
    /// Places of the pages that came as their differences.
    differences: Vec<usize>,
    scratch: Vec<u8>,
}

impl Decoder {
    fn new() -> Result<Self> {
        let raw = vec![0; GROUP_PAGES_MAX * PAGE_BYTES];
        let (differences, scratch) = (Vec::new(), vec![0; PAGE_BYTES]);
        Ok(Self { decompressor: Decompressor::new()?, worded: raw.clone(), raw, differences, scratch })
    }

    /// Takes jobs until there are no more; returns what was written and the processor seconds it took.
    fn drain(
        &mut self,
        (blocks, lookup): (&[RamFile], &Lookup),
        pages: &[u64],
        jobs: &Mutex<mpsc::Receiver<Job>>,
        spare: &Mutex<Vec<Vec<u8>>>,
        failed: &AtomicBool,
    ) -> Result<(RoundCounts, f64)> {
        let start_s = thread_cpu_s();
        let mut counts = RoundCounts::default();
        loop {
            // Held while waiting: the other decoders wait for the lock instead of for the queue.
            let job = jobs.lock().blocking_recv();
            let Some((header, buffer, len)) = job else { break };
            // After a failure jobs are only taken, so that the reader never waits for room in the queue.
            if !failed.load(Ordering::Relaxed) {
                let body = buffer.get(..len).unwrap_or(&[]);
                let frame = Pages::parse(&header, body, pages)?;
                self.apply(blocks, lookup, &frame)?;
                match frame.encoding {
                    Encoding::Zero => counts.zero_pages += frame.pages(),
                    Encoding::SamePages | Encoding::DiskBlocks => counts.referred_pages += frame.pages(),
                    _ => counts.data_pages += frame.pages(),
                }
            }
            let mut spare = spare.lock();
            if spare.len() < QUEUE_FRAMES {
                spare.push(buffer);
            }
        }
        Ok((counts, thread_cpu_s() - start_s))
    }

    fn apply(&mut self, blocks: &[RamFile], lookup: &Lookup, frame: &Pages<'_>) -> Result<()> {
        // The parser looked the block's number up already.
        let Some(ram) = blocks.get(usize::from(frame.block)) else { return Ok(()) };
        let raw_bytes = usize::try_from(frame.pages()).unwrap_or(0) * PAGE_BYTES;
        let mut raw = match frame.encoding {
            Encoding::Zero => {
                frame.verify(&[])?;
                for run in frame.runs() {
                    let first = u64::from(run.first_page);
                    ram.zero(first..first + u64::from(run.pages))?;
                }
                return Ok(());
            }
            Encoding::Raw => frame.payload,
            Encoding::Zstd => {
                let raw = self.raw.get_mut(..raw_bytes).unwrap_or(&mut []);
                self.decompressor.decompress(frame.payload, raw)?;
                raw
            }
            Encoding::Words => {
                let raw = self.raw.get_mut(..raw_bytes).unwrap_or(&mut []);
                words::unpack(frame.payload, raw)?;
                raw
            }
            Encoding::WordsZstd => {
                let raw = self.raw.get_mut(..raw_bytes).unwrap_or(&mut []);
                let len = self.decompressor.decompress_up_to(frame.payload, &mut self.worded)?;
                words::unpack(self.worded.get(..len).unwrap_or(&[]), raw)?;
                raw
            }
            Encoding::Changes | Encoding::ChangesZstd => {
                let raw = self.raw.get_mut(..raw_bytes).unwrap_or(&mut []);
                let worded = match frame.encoding {
                    Encoding::Changes => frame.payload,
                    _ => {
                        let len = self.decompressor.decompress_up_to(frame.payload, &mut self.worded)?;
                        self.worded.get(..len).unwrap_or(&[])
                    }
                };
                words::unpack_changes(worded, raw, &mut self.differences)?;
                lookup.add_versions(frame, &self.differences, raw, &mut self.scratch)?;
                if !self.differences.is_empty() && frame.verify(raw).is_err() {
                    lookup.lacks_changes(frame);
                    return Ok(());
                }
                raw
            }
            Encoding::SamePages | Encoding::DiskBlocks => return lookup.resolve(frame, &mut self.scratch),
        };
        frame.verify(raw)?;
        for run in frame.runs() {
            let Some((pages, rest)) = raw.split_at_checked(run.pages as usize * PAGE_BYTES) else { break };
            ram.write(u64::from(run.first_page), pages)?;
            raw = rest;
        }
        Ok(())
    }
}

#[cfg(test)]
mod fuzz {
    use std::sync::OnceLock;

    use whimbrel_wire::peer::memory::{HASH_BYTES, Reference, Run, put_pages};

    use super::*;
    use crate::memory::ram::test::ram;

    /// A frame whose payload is `payload`, and whose check agrees with it as far as that can be.
    fn frame(encoding: Encoding, pages: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_pages(&mut out, 1, 0, encoding, &[Run { first_page: 1, pages }], payload, payload);
        out
    }

    fn one_reference() -> Vec<u8> {
        let mut bytes = vec![2, 0];
        Reference { object: 0, index: 5, hash: [3; HASH_BYTES] }.put(&mut bytes);
        bytes
    }

    whimbrel_fuzz::fuzz! {
        /// What stands for pages without being their bytes, applied to a small memory.
        fn told_pages(bytes) seeds [
            one_reference(),
            [&[0, 1, 5, 4][..], &[0; 72], &[7; 100]].concat(),
            [3, 0, 1, 2, 3].to_vec(),
        ] {
            static ENDS: OnceLock<(Arc<[RamFile]>, Mutex<Decoder>)> = OnceLock::new();
            let (blocks, decoder) = ENDS.get_or_init(|| {
                (vec![ram(16)].into(), Mutex::new(Decoder::new().expect("make a decoder")))
            });
            let [kind, pages, payload @ ..] = bytes else { return };
            let kinds = [Encoding::Changes, Encoding::ChangesZstd, Encoding::SamePages, Encoding::DiskBlocks];
            let encoding = kinds[usize::from(*kind) % kinds.len()];
            let frame = frame(encoding, u32::from(pages % 4) + 1, payload);
            let (head, body) = frame.split_first_chunk().expect("a frame has a header");
            let header = Header::parse(head).expect("it was written so");
            let Ok(pages) = Pages::parse(&header, body, &[16]) else { return };
            let lookup = Lookup::new(Arc::clone(blocks), Images::default());
            let applied = decoder.lock().apply(blocks, &lookup, &pages);
            let (missing, misses) = lookup.end_round().unwrap_or_default();
            let told: u64 = missing.iter().map(|run| u64::from(run.2)).sum();
            assert!(told <= pages.pages() && misses.delta + misses.same + misses.disk <= pages.pages());
            assert!(applied.is_err() || missing.iter().all(|run| run.0 == 0 && u64::from(run.1) < 16));
        }
    }
}
