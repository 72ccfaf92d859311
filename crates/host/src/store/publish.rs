//! Publishing: from any disk that can be read to packs, index, manifest, in that order.
//!
//! ```text
//!   extents ─► jobs of 8 blocks ─► workers: read, skip zeros, hash, look up, compress ─► in order again
//!                                                                                           │
//!      manifest last ◄─ index ◄─ all packs are there ◄─ upload, 2 at a time ◄─ packs of 32 MiB ◄┘
//! ```
//!
//! Invariants
//! * What refers to something is written after it: packs, then indexes, then the manifest; the name is the caller's.
//! * Blocks stand in packs in the order of the disk, whatever the workers' order: the same disk published twice to
//!   the same store gives the same manifest, and the second time nothing is uploaded.
//! * A pack that is reused was looked at: it is there and long enough. One that is not is written anew.
//! * Memory is bounded: some jobs, three packs, 32 bytes per new block.
//! * Stopped half-way, it leaves packs that nothing refers to, which a collection removes.
//!
//! Not here: names (`store`), safety beside a collection (`guard`).

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, IoSliceMut, Write};
use std::path::Path;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use whimbrel_wire::record::image::{
    BLOCK_BYTES, Directory, Encoding, Entry, ManifestHeader, PACK_BYTES_AIM, PACK_TRAILER_BYTES, PACKS_MAX,
    PackEntry, PackId, SIZE_BYTES_MAX, block_len, encode_pack_tail, manifest_path,
};
use whimbrel_wire::{BlockHash, ImageId};

use super::dedup::{Builder, Dedup, ENTRIES_AIM, Known};
use super::guard::Mark;
use super::repo::Repo;
use crate::block_dev::BlockRead;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::task::TaskHandle;

/// Blocks per job.
const JOB_BLOCKS: usize = 8;
/// The most workers.
const WORKERS_MAX: usize = 8;
const ZSTD_LEVEL: i32 = 3;

/// What a publication made.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    /// The image.
    pub id: ImageId,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes of its blocks that are not zeros, uncompressed.
    pub stored_bytes: u64,
    /// Blocks that the repository did not have.
    pub new_blocks: u64,
    /// Blocks that it had, or that repeat within the disk.
    pub shared_blocks: u64,
}

/// Publishes `source` to `repo`. `index_dir` keeps the repository's dedup indexes, `scratch` is an empty directory.
pub async fn publish(
    repo: &Arc<Repo>,
    index_dir: &Path,
    scratch: &Path,
    source: Arc<dyn BlockRead>,
    task: &TaskHandle,
) -> Result<Published> {
    repo.check_writable()?;
    let mut mark = Mark::publishing(repo).await?;
    let done = publish_marked(repo, &mut mark, index_dir, scratch, source, task).await;
    mark.remove().await;
    done
}

async fn publish_marked(
    repo: &Arc<Repo>,
    mark: &mut Mark<'_>,
    index_dir: &Path,
    scratch: &Path,
    source: Arc<dyn BlockRead>,
    task: &TaskHandle,
) -> Result<Published> {
    task.phase("index");
    let dedup = Dedup::load(repo, index_dir).await.context("read the store's dedup indexes")?;
    task.phase("upload");
    let (packs, uploads) = mpsc::channel(1);
    let scan = Scan::new(Arc::clone(repo), dedup, scratch, source, packs)?;
    let cancelled = task.cancelled();
    let progress = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let scanning = tokio::task::spawn_blocking({
        let progress = Arc::clone(&progress);
        move || scan.run(&|| *cancelled.borrow(), &progress)
    });
    let mut uploading = Box::pin(upload_packs(repo, uploads));
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(250));
    let total = async {
        loop {
            tokio::select! {
                done = &mut uploading => return done,
                _ = tick.tick() => {
                    let (done, all) = Scan::split(progress.load(std::sync::atomic::Ordering::Relaxed));
                    task.progress(done, all);
                    mark.renew().await?;
                }
            }
        }
    };
    // When the upload fails its end of the channel goes away, and the scan stops at its next pack.
    let uploaded = total.await;
    drop(uploading);
    let scanned =
        scanning.await.map_err(|error| Error::with_source(ErrorKind::Internal, "scan the disk", error))?;
    uploaded?;
    let scanned = scanned?;
    task.phase("manifest");
    for (path, object) in scanned.indexes {
        repo.put(&path, object).await?;
    }
    mark.renew().await?;
    if task.is_cancelled() {
        return Err(Error::new(ErrorKind::Cancelled, "publish: cancelled"));
    }
    let object = manifest_path(&scanned.published.id);
    if repo.size(&object).await? != Some(scanned.manifest_bytes) {
        repo.put_file(&object, &scratch.join("manifest")).await?;
    }
    task.progress(scanned.published.size_bytes, scanned.published.size_bytes);
    Ok(scanned.published)
}

/// A pack on its way.
struct Pack {
    id: PackId,
    bytes: Bytes,
}

async fn upload_packs(repo: &Repo, packs: mpsc::Receiver<Pack>) -> Result<()> {
    let stream = futures_util::stream::unfold(packs, |mut packs| async {
        packs.recv().await.map(|pack| (pack, packs))
    });
    let done = stream
        .map(|pack| async move {
            let path = pack.id.path();
            // The same pack may be there from a publication that was stopped.
            if repo.size(&path).await? == Some(pack.bytes.len() as u64) {
                return Ok(());
            }
            repo.put(&path, pack.bytes).await
        })
        .buffer_unordered(2);
    let mut done = std::pin::pin!(done);
    while let Some(result) = done.next().await {
        result?;
    }
    Ok(())
}

struct Scanned {
    published: Published,
    manifest_bytes: u64,
    indexes: Vec<(String, Bytes)>,
}

/// What a worker found out about a block.
enum Found {
    Zeros,
    Known(BlockHash, Known),
    New(BlockHash, Vec<u8>, Encoding),
}

struct Job {
    number: u64,
    blocks: Vec<u64>,
}

type JobResult = (u64, Result<Vec<(u64, Found)>>);

struct Scan {
    repo: Arc<Repo>,
    runtime: Handle,
    dedup: Dedup,
    source: Arc<dyn BlockRead>,
    uploads: mpsc::Sender<Pack>,
    scratch: std::path::PathBuf,
    size_bytes: u64,
    assembly: Assembly,
}

/// The image as far as it has been put together.
struct Assembly {
    entries: BufWriter<File>,
    entry_count: u64,
    present: Vec<u64>,
    data_bytes: u64,
    packs: Vec<PackId>,
    pack_numbers: HashMap<PackId, u32>,
    /// Packs of the store that were looked at: their sizes.
    pack_sizes: HashMap<PackId, u64>,
    /// Blocks of this disk by the first half of their hash.
    seen: HashMap<[u8; 16], Placed>,
    current: Vec<u8>,
    current_number: Option<u32>,
    current_blocks: Vec<PackEntry>,
    index: Builder,
    indexes: Vec<(String, Bytes)>,
    new_blocks: u64,
    shared_blocks: u64,
}

#[derive(Clone, Copy)]
struct Placed {
    pack: u32,
    offset: u32,
    length: u32,
    encoding: Encoding,
}

impl Scan {
    fn new(
        repo: Arc<Repo>,
        dedup: Dedup,
        scratch: &Path,
        source: Arc<dyn BlockRead>,
        uploads: mpsc::Sender<Pack>,
    ) -> Result<Self> {
        let size_bytes = source.size_bytes();
        if size_bytes > SIZE_BYTES_MAX || !size_bytes.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("publish a disk of {size_bytes} bytes: whole sectors, and 64 TiB at most"),
            ));
        }
        let entries = File::create(scratch.join("entries")).context("make a scratch file")?;
        let blocks = usize::try_from(size_bytes.div_ceil(u64::from(BLOCK_BYTES)).div_ceil(64)).unwrap_or(0);
        let assembly = Assembly {
            entries: BufWriter::with_capacity(1 << 20, entries),
            entry_count: 0,
            present: vec![0; blocks],
            data_bytes: 0,
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            pack_sizes: HashMap::new(),
            seen: HashMap::new(),
            current: Vec::new(),
            current_number: None,
            current_blocks: Vec::new(),
            index: Builder::default(),
            indexes: Vec::new(),
            new_blocks: 0,
            shared_blocks: 0,
        };
        let scratch = scratch.to_owned();
        Ok(Self { repo, runtime: Handle::current(), dedup, source, uploads, scratch, size_bytes, assembly })
    }

    /// Progress is one number: MiB done in the upper half, MiB in all in the lower.
    fn split(progress: u64) -> (u64, u64) {
        ((progress >> 32) << 20, (progress & 0xffff_ffff) << 20)
    }

    fn run(
        mut self,
        cancelled: &dyn Fn() -> bool,
        progress: &std::sync::atomic::AtomicU64,
    ) -> Result<Scanned> {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).min(WORKERS_MAX);
        let window = workers * 2;
        let (jobs, queue) = std_mpsc::sync_channel::<Job>(window);
        let (results, done) = std_mpsc::sync_channel::<JobResult>(window);
        let queue = Mutex::new(queue);
        let source = Arc::clone(&self.source);
        let dedup = std::mem::replace(&mut self.dedup, Dedup::none());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                let results = results.clone();
                let (queue, source, dedup) = (&queue, &source, &dedup);
                scope.spawn(move || work(queue, &results, source.as_ref(), dedup));
            }
            drop(results);
            let mut feed =
                Feed { source: source.as_ref(), size_bytes: self.size_bytes, offset: 0, data_until: 0 };
            let outcome = self.assemble(&jobs, &done, &mut feed, window, cancelled, progress);
            // Workers that wait for a job, or on a full channel, must see that nobody is there any more.
            drop(jobs);
            drop(done);
            outcome
        })?;
        self.finish()
    }

    fn assemble(
        &mut self,
        jobs: &std_mpsc::SyncSender<Job>,
        done: &std_mpsc::Receiver<JobResult>,
        feed: &mut Feed<'_>,
        window: usize,
        cancelled: &dyn Fn() -> bool,
        progress: &std::sync::atomic::AtomicU64,
    ) -> Result<()> {
        let mut waiting: BTreeMap<u64, Vec<(u64, Found)>> = BTreeMap::new();
        let (mut sent, mut taken) = (0u64, 0u64);
        let mut fed_all = false;
        loop {
            if cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "publish: cancelled"));
            }
            while !fed_all && (sent - taken) < window as u64 {
                let blocks = feed.next_blocks()?;
                if blocks.is_empty() {
                    fed_all = true;
                } else if jobs.send(Job { number: sent, blocks }).is_ok() {
                    sent += 1;
                } else {
                    return Err(Error::new(ErrorKind::Internal, "scan the disk: no worker is left"));
                }
            }
            let mib = |bytes: u64| (bytes >> 20).min(0xffff_ffff);
            progress.store(
                mib(feed.offset.min(self.size_bytes)) << 32 | mib(self.size_bytes),
                std::sync::atomic::Ordering::Relaxed,
            );
            if sent == taken {
                return Ok(());
            }
            let (number, found) = done
                .recv()
                .map_err(|_| Error::new(ErrorKind::Internal, "scan the disk: the workers are gone"))?;
            waiting.insert(number, found?);
            while let Some(blocks) = waiting.remove(&taken) {
                taken += 1;
                for (block, found) in blocks {
                    self.take(block, found)?;
                }
            }
        }
    }

    fn take(&mut self, block: u64, found: Found) -> Result<()> {
        let (hash, new) = match found {
            Found::Zeros => return Ok(()),
            Found::Known(hash, known) => (hash, self.reuse(hash, known)?),
            Found::New(hash, stored, encoding) => (hash, Some((stored, encoding))),
        };
        let key = seen_key(&hash);
        let placed = match (self.assembly.seen.get(&key).copied(), new) {
            (Some(placed), _) => {
                self.assembly.shared_blocks += 1;
                placed
            }
            (None, Some((stored, encoding))) => self.append(hash, &stored, encoding)?,
            // `reuse` has put it into `seen`.
            (None, None) => self.again(block, hash)?,
        };
        let entry = Entry {
            hash,
            pack: placed.pack,
            offset: placed.offset,
            length: placed.length,
            encoding: placed.encoding,
        };
        let assembly = &mut self.assembly;
        assembly.entries.write_all(&entry.encode()).context("write a scratch file")?;
        assembly.entry_count += 1;
        assembly.data_bytes += block_len(self.size_bytes, block) as u64;
        if let Some(word) = usize::try_from(block / 64).ok().and_then(|word| assembly.present.get_mut(word)) {
            *word |= 1 << (block % 64);
        }
        Ok(())
    }

    /// Refers to a block of the store, if its pack is there and long enough.
    fn reuse(&mut self, hash: BlockHash, known: Known) -> Result<Option<(Vec<u8>, Encoding)>> {
        let size = match self.assembly.pack_sizes.get(&known.pack) {
            Some(size) => *size,
            None => {
                let size = self.runtime.block_on(self.repo.size(&known.pack.path()))?.unwrap_or(0);
                self.assembly.pack_sizes.insert(known.pack, size);
                size
            }
        };
        let end = u64::from(known.offset) + u64::from(known.length);
        if size >= end + PACK_TRAILER_BYTES as u64 {
            let pack = self.assembly.pack_number(known.pack)?;
            let Known { offset, length, encoding, .. } = known;
            self.assembly.seen.entry(seen_key(&hash)).or_insert(Placed { pack, offset, length, encoding });
        }
        Ok(None)
    }

    /// The index knew the block, its pack is damaged or gone: the block is read and stored again.
    fn again(&mut self, block: u64, hash: BlockHash) -> Result<Placed> {
        tracing::warn!(
            store = self.repo.url(),
            block,
            "a pack is missing or cut short; store its block again"
        );
        let bytes = read_block(self.source.as_ref(), block)?;
        if BlockHash::of(&bytes) != hash {
            return Err(Error::new(ErrorKind::InvalidInput, "publish: the disk changes while it is read"));
        }
        let (stored, encoding) = shrink(&mut compressor()?, bytes);
        self.append(hash, &stored, encoding)
    }

    fn append(&mut self, hash: BlockHash, stored: &[u8], encoding: Encoding) -> Result<Placed> {
        let assembly = &mut self.assembly;
        let pack = match assembly.current_number {
            Some(number) => number,
            None => {
                let number = assembly.next_number()?;
                // Its name is known when it is full.
                assembly.packs.push(PackId([0; 32]));
                assembly.current_number = Some(number);
                assembly.current.reserve(PACK_BYTES_AIM + (1 << 20));
                number
            }
        };
        let narrow = |n: usize| u32::try_from(n).map_err(|_| Error::new(ErrorKind::Internal, "fill a pack"));
        let (offset, length) = (narrow(assembly.current.len())?, narrow(stored.len())?);
        assembly.current.extend_from_slice(stored);
        assembly.current_blocks.push(PackEntry { hash, offset, length, encoding });
        assembly.new_blocks += 1;
        let placed = Placed { pack, offset, length, encoding };
        assembly.seen.insert(seen_key(&hash), placed);
        if assembly.current.len() >= PACK_BYTES_AIM {
            self.close_pack()?;
        }
        Ok(placed)
    }

    fn close_pack(&mut self) -> Result<()> {
        let assembly = &mut self.assembly;
        let Some(number) = assembly.current_number.take() else { return Ok(()) };
        let blocks = std::mem::take(&mut assembly.current_blocks);
        let mut bytes = std::mem::take(&mut assembly.current);
        bytes.extend_from_slice(&encode_pack_tail(&blocks));
        let id = PackId(*blake3::hash(&bytes).as_bytes());
        if let Some(place) = assembly.packs.get_mut(number as usize) {
            *place = id;
        }
        assembly.pack_numbers.insert(id, number);
        for PackEntry { hash, offset, length, encoding } in blocks {
            assembly.index.add(hash, &Known { pack: id, offset, length, encoding });
        }
        if assembly.index.len() >= ENTRIES_AIM {
            assembly.indexes.push(std::mem::take(&mut assembly.index).finish());
        }
        self.uploads
            .blocking_send(Pack { id, bytes: Bytes::from(bytes) })
            .map_err(|_| Error::new(ErrorKind::Unavailable, "publish: the upload has ended"))
    }

    /// Writes the manifest to the scratch directory.
    fn finish(mut self) -> Result<Scanned> {
        self.close_pack()?;
        let mut assembly = self.assembly;
        if !assembly.index.is_empty() {
            assembly.indexes.push(std::mem::take(&mut assembly.index).finish());
        }
        assembly.entries.flush().context("write a scratch file")?;
        let header = ManifestHeader {
            size_bytes: self.size_bytes,
            packs: assembly.packs.len() as u64,
            entries: assembly.entry_count,
            data_bytes: assembly.data_bytes,
        };
        let out = File::create(self.scratch.join("manifest")).context("make the manifest")?;
        let mut out = Hashing { out: BufWriter::with_capacity(1 << 20, out), hasher: blake3::Hasher::new() };
        out.write_all(&header.encode()).context("write the manifest")?;
        for pack in &assembly.packs {
            out.write_all(&pack.0).context("write the manifest")?;
        }
        let mut first_entry = 0;
        for present in &assembly.present {
            let item = Directory { present: *present, first_entry };
            out.write_all(&item.encode()).context("write the manifest")?;
            first_entry += u64::from(present.count_ones());
        }
        let mut entries = File::open(self.scratch.join("entries")).context("read a scratch file")?;
        std::io::copy(&mut entries, &mut out).context("write the manifest")?;
        out.out.flush().context("write the manifest")?;
        let published = Published {
            id: ImageId(*out.hasher.finalize().as_bytes()),
            size_bytes: self.size_bytes,
            stored_bytes: assembly.data_bytes,
            new_blocks: assembly.new_blocks,
            shared_blocks: assembly.shared_blocks,
        };
        Ok(Scanned { published, manifest_bytes: header.file_bytes(), indexes: assembly.indexes })
    }
}

impl Assembly {
    fn next_number(&self) -> Result<u32> {
        u32::try_from(self.packs.len())
            .ok()
            .filter(|number| u64::from(*number) < PACKS_MAX)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "publish: too many packs"))
    }

    fn pack_number(&mut self, pack: PackId) -> Result<u32> {
        if let Some(number) = self.pack_numbers.get(&pack) {
            return Ok(*number);
        }
        let number = self.next_number()?;
        self.packs.push(pack);
        self.pack_numbers.insert(pack, number);
        Ok(number)
    }
}

/// Which blocks may hold data, in order.
struct Feed<'a> {
    source: &'a dyn BlockRead,
    size_bytes: u64,
    offset: u64,
    data_until: u64,
}

impl Feed<'_> {
    fn next_blocks(&mut self) -> Result<Vec<u64>> {
        let mut blocks = Vec::with_capacity(JOB_BLOCKS);
        while blocks.len() < JOB_BLOCKS && self.offset < self.size_bytes {
            if self.offset >= self.data_until {
                let extent = self.source.extent(self.offset)?;
                let end = self.offset.saturating_add(extent.length.max(512));
                if !extent.data {
                    self.offset = end;
                    continue;
                }
                self.data_until = end;
            }
            let block = self.offset / u64::from(BLOCK_BYTES);
            blocks.push(block);
            self.offset = (block + 1) * u64::from(BLOCK_BYTES);
        }
        Ok(blocks)
    }
}

struct Hashing<W> {
    out: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

fn work(
    queue: &Mutex<std_mpsc::Receiver<Job>>,
    results: &std_mpsc::SyncSender<JobResult>,
    source: &dyn BlockRead,
    dedup: &Dedup,
) {
    loop {
        let job = match queue.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => return,
        };
        let Ok(job) = job else { return };
        let found = look_at_all(&job.blocks, source, dedup);
        if results.send((job.number, found)).is_err() {
            return;
        }
    }
}

fn look_at_all(blocks: &[u64], source: &dyn BlockRead, dedup: &Dedup) -> Result<Vec<(u64, Found)>> {
    let mut compressor = compressor()?;
    blocks.iter().map(|block| Ok((*block, look_at(*block, source, dedup, &mut compressor)?))).collect()
}

fn look_at(
    block: u64,
    source: &dyn BlockRead,
    dedup: &Dedup,
    compressor: &mut zstd::bulk::Compressor<'_>,
) -> Result<Found> {
    let bytes = read_block(source, block)?;
    if bytes.chunks(64).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0) {
        return Ok(Found::Zeros);
    }
    let hash = BlockHash::of(&bytes);
    if let Some(known) = dedup.find(&hash)? {
        return Ok(Found::Known(hash, known));
    }
    let (stored, encoding) = shrink(compressor, bytes);
    Ok(Found::New(hash, stored, encoding))
}

fn read_block(source: &dyn BlockRead, block: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; block_len(source.size_bytes(), block)];
    let offset = block * u64::from(BLOCK_BYTES);
    source
        .read(offset, &mut [IoSliceMut::new(&mut bytes)])
        .with_context(|| format!("read the disk at {offset}"))?;
    Ok(bytes)
}

fn compressor() -> Result<zstd::bulk::Compressor<'static>> {
    zstd::bulk::Compressor::new(ZSTD_LEVEL).context("set up zstd")
}

/// Compressed if that saves an eighth: less does not pay for decompressing it on every host.
fn shrink(compressor: &mut zstd::bulk::Compressor<'_>, bytes: Vec<u8>) -> (Vec<u8>, Encoding) {
    match compressor.compress(&bytes) {
        Ok(small) if small.len() <= bytes.len() / 8 * 7 => (small, Encoding::Zstd),
        _ => (bytes, Encoding::Raw),
    }
}

/// Half of the hash: two blocks of one disk with equal halves and different hashes would take 2^64 blocks.
fn seen_key(hash: &BlockHash) -> [u8; 16] {
    hash.0.first_chunk::<16>().copied().unwrap_or_default()
}
