//! Whole stores: real files, real metadata (SQLite), a transport in memory that can lie, lose hosts and count.

use std::collections::{HashMap, HashSet};
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::Value;
use tempfile::TempDir;
use whimbrel_wire::api::TaskKind;
use whimbrel_wire::peer::block::METHOD_BLOCK;
use whimbrel_wire::record::image::BLOCK_BYTES;

use super::*;
use crate::block_dev::Extent;
use crate::meta::sqlite::SqliteStore;
use crate::task::Tasks;

mod damage;
mod remote;
mod share;

const BLOCK: usize = BLOCK_BYTES as usize;

/// A disk in memory whose runs of zero blocks are holes.
pub struct Disk(pub Vec<u8>);

impl Disk {
    /// `pattern`: per block a number; 0 is a hole, equal numbers are equal blocks, odd ones do not compress.
    pub fn of(pattern: &[u64]) -> Arc<Self> {
        Arc::new(Self(pattern.iter().flat_map(|n| block(*n)).collect()))
    }
}

pub fn block(n: u64) -> Vec<u8> {
    if n == 0 {
        return vec![0; BLOCK];
    }
    if n.is_multiple_of(2) {
        return format!("block {n} ").into_bytes().into_iter().cycle().take(BLOCK).collect();
    }
    let mut out = vec![0; BLOCK];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

impl BlockRead for Disk {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut at = offset as usize;
        for slice in into {
            let length = slice.len();
            slice.copy_from_slice(&self.0[at..at + length]);
            at += length;
        }
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let start = offset as usize;
        let end = (start / BLOCK + 1) * BLOCK;
        let end = end.min(self.0.len());
        Ok(Extent { length: (end - start) as u64, data: self.0[start..end].iter().any(|byte| *byte != 0) })
    }
}

/// Hosts that reach each other by function calls.
#[derive(Default)]
pub struct Net {
    servers: Mutex<HashMap<HostId, Arc<Server>>>,
    pub liars: Mutex<HashSet<HostId>>,
    pub down: Mutex<HashSet<HostId>>,
    pub block_calls: AtomicU64,
}

struct From {
    net: Arc<Net>,
    host: HostId,
}

#[async_trait]
impl PeerTransport for From {
    async fn call(
        &self,
        host: &HostId,
        method: &'static str,
        params: Value,
        payload: Bytes,
        _deadline: Duration,
    ) -> Result<(Value, Bytes)> {
        let server = self.net.servers.lock().get(host).cloned();
        let server = server.filter(|_| !self.net.down.lock().contains(host));
        let Some(server) = server else {
            return Err(Error::new(ErrorKind::Unavailable, format!("reach host {host}")));
        };
        let (value, mut bytes) = server.serve(&self.host, method, params, payload).await?;
        if method == METHOD_BLOCK {
            self.net.block_calls.fetch_add(1, Ordering::Relaxed);
            if self.net.liars.lock().contains(host) && !bytes.is_empty() {
                let mut wrong = bytes.to_vec();
                wrong[100] ^= 1;
                bytes = Bytes::from(wrong);
            }
        }
        Ok((value, bytes))
    }
}

/// A cluster in a directory: metadata, a seed store, hosts.
pub struct World {
    pub dir: TempDir,
    pub meta: Arc<dyn MetaStore>,
    pub net: Arc<Net>,
    pub tasks: Tasks,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let meta = SqliteStore::open(&dir.path().join("meta.db")).unwrap();
        Self { dir, meta, net: Arc::default(), tasks: Tasks::default() }
    }

    pub fn seed_dir(&self) -> PathBuf {
        self.dir.path().join("seed")
    }

    pub fn seed_url(&self) -> String {
        self.seed_dir().display().to_string()
    }

    /// A store on host `name`; the same directory each time, as after a restart.
    pub async fn host(&self, name: &str) -> Arc<Store> {
        self.host_with(name, &[], |_| {}).await
    }

    pub async fn host_with(
        &self,
        name: &str,
        domains: &[&str],
        set: impl FnOnce(&mut StoreConfig),
    ) -> Arc<Store> {
        let host: HostId = name.parse().unwrap();
        // As JSON: what else a host says about itself is not our business.
        let record = serde_json::json!({"name": name, "addresses": [], "domains": domains});
        let put = Op::Put(key::host(&host), to_json(&record).unwrap());
        self.meta.txn(vec![], vec![put]).await.unwrap();
        let mut config = StoreConfig::new(self.dir.path().join(name), host.clone());
        config.default_store_url = Some(self.seed_url());
        config.scrub_bytes_s = 0;
        set(&mut config);
        let peers = Arc::new(From { net: Arc::clone(&self.net), host: host.clone() });
        let store = Store::open(config, Arc::clone(&self.meta), peers).await.unwrap();
        self.net.servers.lock().insert(host, store.server());
        store
    }

    pub async fn publish(&self, store: &Store, name: &str, disk: Arc<dyn BlockRead>) -> Result<ImageRecord> {
        let task = self.tasks.start(TaskKind::Publish, name);
        let done = store.publish(disk, name.parse().unwrap(), None, &task).await;
        task.end(&done.as_ref().map(|_| ()).map_err(|error| Error::new(error.kind(), error.to_string())));
        done
    }

    /// Every object of the seed store with its size and content hash.
    pub fn objects(&self) -> std::collections::BTreeMap<String, u64> {
        fn walk(dir: &Path, base: &Path, into: &mut std::collections::BTreeMap<String, u64>) {
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, base, into);
                } else {
                    let name = path.strip_prefix(base).unwrap().display().to_string();
                    into.insert(name, entry.metadata().unwrap().len());
                }
            }
        }
        let mut found = std::collections::BTreeMap::new();
        walk(&self.seed_dir(), &self.seed_dir(), &mut found);
        found
    }
}

/// Reads a range on a thread that may wait, as guests do.
pub async fn read(image: &Arc<Image>, offset: u64, length: usize) -> Result<Vec<u8>> {
    let image = Arc::clone(image);
    tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0xee; length];
        // Uneven pieces, as descriptors of a queue may be.
        let (first, second) = bytes.split_at_mut(length / 3 / 512 * 512);
        image.read(offset, &mut [IoSliceMut::new(first), IoSliceMut::new(second)])?;
        Ok(bytes)
    })
    .await
    .unwrap()
}

pub async fn read_all(image: &Arc<Image>) -> Result<Vec<u8>> {
    read(image, 0, image.size_bytes() as usize).await
}

/// Waits until the cache has written what it was given.
pub async fn settled(image: &Image) {
    let _all = image.core.writes.acquire_many(image::WRITES_MAX as u32).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_is_read_and_stays_in_the_cache_over_a_restart() {
    let world = World::new();
    let store = world.host("a").await;
    let mut disk = Disk::of(&[0, 0, 1, 2, 3, 0, 2, 0, 0, 0, 5]);
    Arc::get_mut(&mut disk).unwrap().0.truncate(10 * BLOCK + 1536);
    let record = world.publish(&store, "base:1", disk.clone()).await.unwrap();
    assert_eq!(record.size_bytes, disk.0.len() as u64);
    assert_eq!(record.stored_bytes, 4 * BLOCK as u64 + 1536);
    let image = store.open_named(&"base:1".parse().unwrap()).await.unwrap();
    let mut short = vec![0; 4096];
    assert!(!image.read_now(2 * BLOCK as u64, &mut [IoSliceMut::new(&mut short)]).unwrap(), "not here yet");
    assert!(image.read_now(0, &mut [IoSliceMut::new(&mut short)]).unwrap(), "zeros need nobody");
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    settled(&image).await;
    assert!(image.read_now(2 * BLOCK as u64, &mut [IoSliceMut::new(&mut short)]).unwrap());
    assert_eq!(short, disk.0[2 * BLOCK..2 * BLOCK + 4096]);
    let extent = |offset| image.extent(offset).unwrap();
    assert_eq!(extent(512), Extent { length: 2 * BLOCK as u64 - 512, data: false });
    assert_eq!(extent(2 * BLOCK as u64), Extent { length: 3 * BLOCK as u64, data: true });
    assert_eq!(extent(10 * BLOCK as u64), Extent { length: 1536, data: true });
    let shown = store.show(&"base:1".parse().unwrap()).await.unwrap();
    assert_eq!(shown.cached_bytes, record.stored_bytes);
    // Block 2 stands twice in the image, once in the store, and is fetched for each place.
    assert_eq!(shown.read_bytes.seed, record.stored_bytes);
    assert!(image.read(record.size_bytes, &mut [IoSliceMut::new(&mut short)]).is_err());

    drop((image, store));
    std::fs::rename(world.seed_dir(), world.dir.path().join("away")).unwrap();
    std::fs::create_dir(world.seed_dir()).unwrap();
    let store = world.host("a").await;
    let image = store.open_named(&"base:1".parse().unwrap()).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    assert_eq!(image.read_bytes().seed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_listed_checked_prefetched_and_removed() {
    let world = World::new();
    let store = world.host("a").await;
    let numbers: Vec<u64> = (0..100).map(|n| n % 40).collect();
    world.publish(&store, "big", Disk::of(&numbers)).await.unwrap();
    let name: ImageRef = "big".parse().unwrap();
    assert_eq!(store.list().await.unwrap().len(), 1);
    let task = world.tasks.start(TaskKind::Prefetch, "big");
    store.prefetch(&name, &task).await.unwrap();
    let shown = store.show(&name).await.unwrap();
    assert_eq!(shown.cached_bytes, shown.stored_bytes);
    for seed in [false, true] {
        let report = store.verify(&name, seed, &task).await.unwrap();
        assert!(report.bad_blocks.is_empty(), "{:?}", report.bad_blocks);
        assert_eq!(report.checked_blocks, 97);
    }
    store.remove(&name).await.unwrap();
    let gone = store.show(&name).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    assert!(store.remove(&name).await.is_err());
    assert!(world.objects().keys().any(|path| path.starts_with("packs/")));
    let collected = store.collect(None, 0).await.unwrap();
    assert_eq!((collected.manifests, collected.packs), (1, 1));
    assert!(world.objects().is_empty(), "{:?}", world.objects());
}

/// A disk of one TiB with three blocks of data.
struct Sparse;

impl Sparse {
    const BLOCKS: u64 = 1 << 23;
    const DATA: [u64; 3] = [0, 1 << 20, (1 << 23) - 1];
}

impl BlockRead for Sparse {
    fn size_bytes(&self) -> u64 {
        Self::BLOCKS * u64::from(BLOCK_BYTES)
    }

    fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
        let number = offset / u64::from(BLOCK_BYTES);
        assert!(Self::DATA.contains(&number), "holes are not read");
        into[0].copy_from_slice(&block(number * 2 + 1));
        Ok(())
    }

    fn read_now(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<bool> {
        self.read(offset, into).map(|()| true)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let number = offset / u64::from(BLOCK_BYTES);
        let data = Self::DATA.contains(&number);
        let end = if data {
            number + 1
        } else {
            Self::DATA.into_iter().find(|next| *next > number).unwrap_or(Self::BLOCKS)
        };
        Ok(Extent { length: end * u64::from(BLOCK_BYTES) - offset, data })
    }
}

/// Resident anonymous bytes of this process: the heap, without mapped files.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_image_takes_a_few_bits_of_memory_per_block() {
    let world = World::new();
    let store = world.host("a").await;
    let record = world.publish(&store, "sparse", Arc::new(Sparse)).await.unwrap();
    assert_eq!(record.stored_bytes, 3 * BLOCK as u64);
    let before = anonymous_bytes();
    let image = store.open_named(&"sparse".parse().unwrap()).await.unwrap();
    assert_eq!(read(&image, image.size_bytes() - BLOCK as u64, BLOCK).await.unwrap(), block((1 << 24) - 1));
    settled(&image).await;
    let grown = anonymous_bytes().saturating_sub(before);
    println!("an open image of 1 TiB takes {grown} bytes");
    // Stored, held, verified: 3 MiB; a copy of the bitmap for a greeting and the allocator's slack come on top.
    assert!(grown < 9 << 20, "{grown} bytes");
    let dir = world.dir.path().join("a/cache").join(record.id.to_string());
    let on_disk = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(dir.join("data")).unwrap()) * 512;
    assert!(on_disk < 1 << 20, "the cache is sparse: {on_disk}");
}
