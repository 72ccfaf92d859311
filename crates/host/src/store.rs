//! Images on this host: publish, cache, read, verify, scrub, collect.
//!
//! ```text
//!   publish ─► repo ─► object store          guests ─► Image: BlockRead ─┬─ cache (verified blocks, this host)
//!   source: any BlockRead                                                ├─ peers (image.block over links)
//!   (file, volume)                                                       └─ repo  (the seed store)
//! ```
//!
//! Memory: an open image takes 3 bits per block of its size (3 MiB per TiB), 1 bit per block and known peer, and at
//! most 2 MiB of blocks just read plus 8 MiB of blocks being written. Manifests stay in files.
//!
//! Not here: where a block is read from is decided by `engine::image::read`; formats are in `wire::record::image`;
//! foreign image formats are read by `convert`.

pub mod cache;
pub mod collect;
pub mod convert;
pub mod dedup;
mod fetch;
pub mod guard;
pub mod image;
mod images;
pub mod manifest;
pub mod peers;
pub mod publish;
pub mod repo;
mod scrub;
mod siblings;
mod sorted;
mod whole;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use whimbrel_wire::api::{Image as ImageShow, ImageVerify, ReadBytes};
use whimbrel_wire::meta::{ClusterRecord, HostRecord, ImageParent, ImageRecord, VolumeRecord, key};
use whimbrel_wire::record::image::{ImageName, name_path};
use whimbrel_wire::{HostId, ImageId, ImageRef, Name};

use crate::block_dev::{BlockDev, BlockRead};
use crate::blocking::blocking;
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::Router;
use crate::meta::{Committed, Compare, MetaStore, Op};
use crate::metrics::metrics;
use crate::records::{self, Versioned};
use crate::task::TaskHandle;
use images::{Images, Shared};
use peers::Server;

pub use collect::Collected;
pub use image::Image;
pub use peers::PeerTransport;
pub use repo::S3Keys;

/// How long a collection waits for those who publish.
const COLLECT_WAIT: Duration = Duration::from_secs(60);

/// How the store works.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where the cache is kept: `DIR/cache/IMAGE_ID/…`.
    pub data_dir: PathBuf,
    /// This host.
    pub host: HostId,
    /// Where images go unless told otherwise: `file:///dir`, `/dir`, `s3://bucket/prefix?endpoint=…`, `http(s)://…`.
    pub default_store_url: Option<String>,
    /// Keys for stores in S3; the environment's (AWS_ACCESS_KEY_ID, …) otherwise.
    pub s3_keys: Option<S3Keys>,
    /// Blocks from peers are kept after so many fetches; 1: at once.
    pub keep_after_peer_fetches: u32,
    /// Bytes per second sent to peers; 0: no limit.
    pub upload_bytes_s: u64,
    /// Bytes per second read by the background scrub; 0: no scrub.
    pub scrub_bytes_s: u64,
}

impl StoreConfig {
    /// The defaults.
    pub fn new(data_dir: impl Into<PathBuf>, host: HostId) -> Self {
        Self {
            data_dir: data_dir.into(),
            host,
            default_store_url: None,
            s3_keys: None,
            keep_after_peer_fetches: 1,
            upload_bytes_s: 0,
            scrub_bytes_s: 4 << 20,
        }
    }
}

/// Figures of the store since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreFigures {
    /// Bytes delivered to readers, by where they came from.
    pub read_bytes: ReadBytes,
    /// Bytes of objects read from seed stores, as stored there.
    pub seed_object_bytes: u64,
    /// Bytes of blocks in the cache.
    pub cached_bytes: u64,
    /// Images that are open.
    pub open_images: u64,
}

/// See the module's charter.
pub struct Store {
    shared: Arc<Shared>,
    images: Arc<Images>,
    server: Arc<Server>,
}

impl Store {
    /// Opens the cache under `config.data_dir`. Must be called within a tokio runtime, which is kept for the
    /// store's own work; [`Image`]s are read from plain threads.
    pub async fn open(
        config: StoreConfig,
        meta: Arc<dyn MetaStore>,
        peers: Arc<dyn PeerTransport>,
    ) -> Result<Arc<Self>> {
        let dir = config.data_dir.join("cache");
        std::fs::create_dir_all(&dir).with_context(|| format!("make the cache {}", dir.display()))?;
        let _ = std::fs::remove_dir_all(config.data_dir.join("scratch"));
        let scrub_bytes_s = config.scrub_bytes_s;
        let shared = Shared::new(config, meta, peers, Handle::current());
        let images = Images::new(Arc::clone(&shared));
        let server = Server::new(Arc::clone(&shared), Arc::clone(&images));
        shared.runtime.spawn(scrub::scrub(Arc::downgrade(&images), scrub_bytes_s));
        Ok(Arc::new(Self { shared, images, server }))
    }

    /// Registers what peers may ask.
    pub fn register(&self, router: Router) -> Router {
        self.server.register(router)
    }

    /// What answers peers, for transports other than the links.
    pub fn server(&self) -> Arc<Server> {
        Arc::clone(&self.server)
    }

    /// Tells peers that this host answers no more, and lets go of the images.
    pub async fn stop(&self) {
        let open = self.images.close_all();
        futures_util::future::join_all(open.iter().map(peers::leave)).await;
    }

    /// The store that was given, or this host's default, or the cluster's.
    async fn store_url(&self, given: Option<String>) -> Result<String> {
        if let Some(url) = given.or_else(|| self.shared.config.default_store_url.clone()) {
            return Ok(url);
        }
        let item = self.shared.meta(self.shared.meta.get(key::CLUSTER)).await?;
        let cluster = item.map(|item| from_json::<ClusterRecord>(&item.value, key::CLUSTER)).transpose()?;
        cluster.and_then(|cluster| cluster.default_store_url).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, "choose a store: none was given and there is no default")
                .hint("give --store URL, or set the cluster's default store")
        })
    }

    /// The tenant that images published here belong to: the first one this host serves.
    async fn own_domain(&self) -> Result<Option<Name>> {
        let record_key = key::host(&self.shared.config.host);
        let item = self.shared.meta(self.shared.meta.get(&record_key)).await?;
        let host = item.map(|item| from_json::<HostRecord>(&item.value, &record_key)).transpose()?;
        Ok(host.and_then(|host| host.domains.first().cloned()))
    }

    /// Publishes `source` under a name; a name that exists means the new image afterwards. Blocks the repository has
    /// already are not uploaded. `task` shows progress and may cancel.
    pub async fn publish(
        &self,
        source: Arc<dyn BlockRead>,
        image: ImageRef,
        store_url: Option<String>,
        task: &TaskHandle,
    ) -> Result<ImageRecord> {
        let what = || format!("publish image {image}");
        let store_url = self.store_url(store_url).await.with_context(what)?;
        let domain = self.own_domain().await.with_context(what)?;
        let repo = self.shared.repo(&store_url, true)?;
        let scratch = Scratch::new(&self.shared.config.data_dir)?;
        let index_dir = self.index_dir(&store_url);
        let done =
            publish::publish(&repo, &index_dir, &scratch.path, source, task).await.with_context(what)?;
        task.figure("new_blocks", done.new_blocks as f64);
        task.figure("shared_blocks", done.shared_blocks as f64);
        let record = ImageRecord {
            image: image.clone(),
            id: done.id,
            size_bytes: done.size_bytes,
            stored_bytes: done.stored_bytes,
            store_url,
            domain,
        };
        let name = ImageName {
            image: image.clone(),
            id: done.id,
            size_bytes: done.size_bytes,
            stored_bytes: done.stored_bytes,
            domain: record.domain.clone(),
            published_s: clock::wall_s(),
        };
        repo.put(&name_path(&image), Bytes::from(to_json(&name)?)).await.with_context(what)?;
        let put = Op::Put(key::image(&image), to_json(&record)?);
        self.shared.meta(self.shared.meta.txn(Vec::new(), vec![put])).await.with_context(what)?;
        Ok(record)
    }

    fn index_dir(&self, store_url: &str) -> PathBuf {
        let hash = blake3::hash(store_url.as_bytes()).to_hex();
        self.shared.config.data_dir.join("index").join(&hash.as_str()[..16])
    }

    /// What a name means, from the metadata store.
    pub async fn resolve(&self, image: &ImageRef) -> Result<ImageRecord> {
        Ok(self.resolve_versioned(image).await?.value)
    }

    /// The same with its revision, for a change that must not be made if the name is taken away meanwhile.
    pub async fn resolve_versioned(&self, image: &ImageRef) -> Result<Versioned<ImageRecord>> {
        let record_key = key::image(image);
        let item = self.shared.meta(self.shared.meta.get(&record_key)).await?;
        let Some(item) = item else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("find image {image}: there is none of that name"),
            )
            .hint("see `whimbrel image list`"));
        };
        records::parse(&item)
    }

    /// The image under a volume, open for reading; the same one for everybody who asks.
    pub async fn open_image(&self, parent: &ImageParent) -> Result<Arc<Image>> {
        let core = self.images.open(parent).await?;
        Ok(Arc::new(Image { core }))
    }

    /// The image of a name, open for reading.
    pub async fn open_named(&self, image: &ImageRef) -> Result<Arc<Image>> {
        let record = self.resolve(image).await?;
        self.open_image(&parent_of(&record)).await
    }

    /// All images of the cluster.
    pub async fn list(&self) -> Result<Vec<ImageShow>> {
        let found = self.shared.meta(self.shared.meta.read(key::IMAGES)).await?;
        let mut all = Vec::new();
        for item in found.items {
            all.push(self.describe(&from_json(&item.value, &item.key)?).await);
        }
        Ok(all)
    }

    /// One image.
    pub async fn show(&self, image: &ImageRef) -> Result<ImageShow> {
        Ok(self.describe(&self.resolve(image).await?).await)
    }

    async fn describe(&self, record: &ImageRecord) -> ImageShow {
        let core = match self.images.get(&record.id) {
            Some(core) => Some(core),
            // In the cache from an earlier run: what is there can be told without asking anybody.
            None if self.shared.image_dir(&record.id).join("bitmap").exists() => {
                self.images.open(&parent_of(record)).await.ok()
            }
            None => None,
        };
        ImageShow {
            name: record.image.clone(),
            id: record.id,
            size_bytes: record.size_bytes,
            stored_bytes: record.stored_bytes,
            cached_bytes: core.as_ref().map_or(0, |core| core.cache.held_bytes()),
            read_bytes: core.as_ref().map(|core| core.read_bytes()).unwrap_or_default(),
            store_url: record.store_url.clone(),
        }
    }

    /// Checks every block of the image in this host's cache, or in the seed store.
    pub async fn verify(&self, image: &ImageRef, seed: bool, task: &TaskHandle) -> Result<ImageVerify> {
        let open = self.open_named(image).await?;
        whole::verify(&open.core, seed, task).await.with_context(|| format!("verify image {image}"))
    }

    /// Fetches every block into the cache.
    pub async fn prefetch(&self, image: &ImageRef, task: &TaskHandle) -> Result<()> {
        let open = self.open_named(image).await?;
        whole::prefetch(&open.core, task).await.with_context(|| format!("prefetch image {image}"))
    }

    /// Writes the whole image to `target`, which is at least as large and reads as zeros.
    pub async fn export(
        &self,
        image: &ImageRef,
        target: Arc<dyn BlockDev>,
        task: Arc<TaskHandle>,
    ) -> Result<()> {
        let open = self.open_named(image).await?;
        blocking("write a disk image", move || whole::export(&open, target.as_ref(), &task))
            .await
            .with_context(|| format!("export image {image}"))
    }

    /// Removes a name. Blocks stay as long as another name or a volume needs them, and then until
    /// [`Store::collect`].
    pub async fn remove(&self, image: &ImageRef) -> Result<()> {
        let what = || format!("remove image {image}");
        let record_key = key::image(image);
        let item = self.shared.meta(self.shared.meta.get(&record_key)).await.with_context(what)?;
        let Some(item) = item else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("remove image {image}: there is none of that name"),
            ));
        };
        let record: ImageRecord = from_json(&item.value, &record_key)?;
        let repo = self.shared.repo(&record.store_url, false)?;
        repo.delete(&name_path(image)).await.with_context(what)?;
        let unchanged = Compare::Unchanged(record_key.clone(), item.mod_rev);
        let removed = self.shared.meta.txn(vec![unchanged], vec![Op::Delete(record_key)]);
        match self.shared.meta(removed).await.with_context(what)? {
            Committed::Yes(_) => Ok(()),
            Committed::Conflict => Err(Error::new(
                ErrorKind::Refused,
                format!("remove image {image}: it was published again meanwhile"),
            )),
        }
    }

    /// Removes from the repository what no name and no volume refers to and is older than `grace_s`. Safe beside
    /// publishing hosts. Also removes from this host's cache what is unknown to the cluster.
    pub async fn collect(&self, store_url: Option<String>, grace_s: u64) -> Result<Collected> {
        let store_url = self.store_url(store_url).await?;
        let repo = self.shared.repo(&store_url, false)?;
        let in_use = async || self.in_use().await;
        let done =
            collect::collect(&repo, &self.index_dir(&store_url), in_use, grace_s, COLLECT_WAIT).await?;
        self.forget_unused().await?;
        Ok(done)
    }

    /// The images that names and volumes of the cluster refer to.
    async fn in_use(&self) -> Result<HashSet<ImageId>> {
        let mut found = HashSet::new();
        // Volumes first: one that is made from a name meanwhile is found through the name.
        let volumes = self.shared.meta(self.shared.meta.read(key::VOLUMES)).await?;
        let names = self.shared.meta(self.shared.meta.read(key::IMAGES)).await?;
        let again = self.shared.meta(self.shared.meta.read(key::VOLUMES)).await?;
        for item in volumes.items.iter().chain(&again.items) {
            let volume: VolumeRecord = from_json(&item.value, &item.key)?;
            found.extend(volume.image.map(|image| image.id));
        }
        for item in &names.items {
            found.insert(from_json::<ImageRecord>(&item.value, &item.key)?.id);
        }
        Ok(found)
    }

    /// Removes cached images that no name and no volume refers to and that nobody has open.
    async fn forget_unused(&self) -> Result<()> {
        let in_use = self.in_use().await?;
        for parent in self.images.cached() {
            if in_use.contains(&parent.id) || self.images.get(&parent.id).is_some() {
                continue;
            }
            let dir = self.shared.image_dir(&parent.id);
            std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
            let gone = Op::Delete(key::holds(&parent.id, &self.shared.config.host));
            self.shared.meta(self.shared.meta.txn(Vec::new(), vec![gone])).await?;
        }
        Ok(())
    }

    /// What was read since the start, all images.
    pub fn figures(&self) -> StoreFigures {
        let open = self.images.open_ones();
        let mut figures = StoreFigures {
            seed_object_bytes: self.shared.seed_bytes(),
            open_images: open.len() as u64,
            ..StoreFigures::default()
        };
        for core in open {
            let read = core.read_bytes();
            figures.read_bytes.cache += read.cache;
            figures.read_bytes.peer += read.peer;
            figures.read_bytes.seed += read.seed;
            figures.cached_bytes += core.cache.held_bytes();
        }
        metrics().image_cached_bytes.set(i64::try_from(figures.cached_bytes).unwrap_or(i64::MAX));
        figures
    }
}

/// The image as what lies under a volume.
pub fn parent_of(record: &ImageRecord) -> ImageParent {
    ImageParent { image: record.image.clone(), id: record.id, store_url: record.store_url.clone() }
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write a record", error))
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8], key: &str) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::with_source(ErrorKind::Corrupt, format!("read the record {key}"), error))
}

/// A directory for one publication, removed with it.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(data_dir: &Path) -> Result<Self> {
        let path = data_dir.join("scratch").join(uuid::Uuid::new_v4().to_string());
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, dir = %self.path.display(), "remove a scratch directory");
        }
    }
}

#[cfg(test)]
mod test;
