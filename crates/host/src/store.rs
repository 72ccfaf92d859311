//! Images on this host: publish, cache, read, verify, scrub, collect.
//!
//! ```text
//!   publish ─► repo ─► object store          guests ─► Image: BlockRead ─┬─ cache (verified blocks, this host)
//!   source: any BlockRead                                                ├─ peers (image.block over links)
//!   (file, volume)                                                       └─ repo  (the seed store)
//! ```
//!
//! Not here: where a block is read from is decided by `engine::image::read`; formats are in `wire::record::image`;
//! foreign image formats are read by `convert`.

pub mod cache;
pub mod collect;
pub mod convert;
pub mod dedup;
pub mod guard;
pub mod manifest;
pub mod peers;
pub mod publish;
pub mod repo;
pub mod siblings;
pub mod sorted;

use std::path::PathBuf;
use std::sync::Arc;

use whimbrel_wire::api::{Image as ImageShow, ImageVerify, ReadBytes};
use whimbrel_wire::meta::{ImageParent, ImageRecord};
use whimbrel_wire::{HostId, ImageId, ImageRef};

use crate::block_dev::{BlockDev, BlockRead};
use crate::error::{Error, ErrorKind, Result};
use crate::meta::MetaStore;
use crate::task::TaskHandle;

pub use peers::PeerTransport;

/// How the store works; times and rates are limits.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where the cache is kept: `DIR/cache/IMAGE_ID/…`.
    pub data_dir: PathBuf,
    /// This host.
    pub host: HostId,
    /// Where images go unless told otherwise: `file:///dir`, `/dir`, `s3://bucket/prefix?endpoint=…`, `http(s)://…`.
    pub default_store_url: Option<String>,
    /// Blocks from peers are kept after so many fetches; 1: at once.
    pub keep_after_peer_fetches: u32,
    /// Bytes per second sent to peers; 0: no limit.
    pub upload_bytes_s: u64,
    /// Bytes per second read by the background scrub; 0: no scrub.
    pub scrub_bytes_s: u64,
}

/// Figures of the store, for /metrics and `image show`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreFigures {
    /// Bytes delivered to readers, by where they came from.
    pub read_bytes: ReadBytes,
    /// Bytes of blocks served to peers.
    pub served_bytes: u64,
    /// Blocks whose cached bytes had changed.
    pub rot_blocks: u64,
    /// Peers that sent wrong bytes.
    pub liars: u64,
}

/// What a collection removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Manifests that no name and no volume refers to.
    pub manifests: u64,
    /// Packs that no manifest refers to.
    pub packs: u64,
}

/// An image, open for reading on this host. See [`BlockRead`].
pub struct Image {
    size_bytes: u64,
}

/// See the module's charter.
pub struct Store {
    config: StoreConfig,
}

fn unfinished(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what}: not built yet"))
}

impl Store {
    /// Opens the cache under `config.data_dir`. Must be called within a tokio runtime, which is kept for the
    /// store's own work; [`Image`]s are read from plain threads.
    pub async fn open(
        config: StoreConfig,
        _meta: Arc<dyn MetaStore>,
        _peers: Arc<dyn PeerTransport>,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { config }))
    }

    /// Publishes `source` under a name. Blocks the repository has already are not uploaded. `task` shows progress
    /// and may cancel.
    pub async fn publish(
        &self,
        _source: Arc<dyn BlockRead>,
        _image: ImageRef,
        _store_url: Option<String>,
        _task: &TaskHandle,
    ) -> Result<ImageRecord> {
        Err(unfinished("publish"))
    }

    /// What a name means, from the metadata store.
    pub async fn resolve(&self, _image: &ImageRef) -> Result<ImageRecord> {
        Err(unfinished("resolve"))
    }

    /// The image under a volume, open for reading; the same one for everybody who asks.
    pub async fn open_image(&self, _parent: &ImageParent) -> Result<Arc<Image>> {
        Err(unfinished("open image"))
    }

    /// All images of the cluster.
    pub async fn list(&self) -> Result<Vec<ImageShow>> {
        Err(unfinished("list images"))
    }

    /// One image.
    pub async fn show(&self, _image: &ImageRef) -> Result<ImageShow> {
        Err(unfinished("show image"))
    }

    /// Reads every block of the image from the cache (`store` false) or from the seed store and compares hashes.
    pub async fn verify(&self, _image: &ImageRef, _seed: bool, _task: &TaskHandle) -> Result<ImageVerify> {
        Err(unfinished("verify image"))
    }

    /// Fetches every block into the cache.
    pub async fn prefetch(&self, _image: &ImageRef, _task: &TaskHandle) -> Result<()> {
        Err(unfinished("prefetch image"))
    }

    /// Writes the whole image to `target`, which is at least as large and reads as zeros.
    pub async fn export(
        &self,
        _image: &ImageRef,
        _target: Arc<dyn BlockDev>,
        _task: &TaskHandle,
    ) -> Result<()> {
        Err(unfinished("export image"))
    }

    /// Removes a name; blocks stay until [`Store::collect`]. Refused while a volume is based on it.
    pub async fn remove(&self, _image: &ImageRef) -> Result<()> {
        Err(unfinished("remove image"))
    }

    /// Removes from the repository at `store_url` what no name and no volume refers to and is older than
    /// `grace_s`. Safe beside publishing hosts.
    pub async fn collect(&self, _store_url: Option<String>, _grace_s: u64) -> Result<Collected> {
        Err(unfinished("collect"))
    }

    /// What was read and served since the start, all images.
    pub fn figures(&self) -> StoreFigures {
        let _ = &self.config;
        StoreFigures::default()
    }
}

impl Image {
    /// What it is.
    pub fn id(&self) -> ImageId {
        ImageId([0; 32])
    }

    /// Bytes delivered to readers since it was opened.
    pub fn read_bytes(&self) -> ReadBytes {
        ReadBytes::default()
    }
}

impl BlockRead for Image {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, _offset: u64, _into: &mut [std::io::IoSliceMut<'_>]) -> Result<()> {
        Err(unfinished("read image"))
    }

    fn read_now(&self, _offset: u64, _into: &mut [std::io::IoSliceMut<'_>]) -> Result<bool> {
        Ok(false)
    }

    fn extent(&self, _offset: u64) -> Result<crate::block_dev::Extent> {
        Err(unfinished("read image"))
    }
}
