//! The images that are open on this host, and how one is opened.
//!
//! ```text
//!   open ─► record in the metadata store (domain) ─► tell that we have it (holds/…) ─► manifest: own file, a peer, the
//!        store ─► cache files ─► join the swarm (`peers`)
//! ```
//!
//! Invariants: an image is opened once, whoever asks at the same time waits for the same opening; it stays open, since
//! it serves peers too. Losing the metadata store does not keep an image from opening whose record is in `about.json`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, Semaphore};
use whimbrel_wire::meta::{HoldsRecord, ImageParent, ImageRecord, key};
use whimbrel_wire::{HostId, ImageId, Name};

use super::StoreConfig;
use super::cache::ImageCache;
use super::image::Core;
use super::manifest::Manifest;
use super::peers::{self, PeerTransport, Upload};
use super::repo::Repo;
use super::siblings::Hashes;
use crate::blocking::blocking;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::meta::{MetaStore, Op};

/// No question to the metadata store is waited for longer.
const META_WAIT: Duration = Duration::from_secs(3);

/// What all open images share.
pub struct Shared {
    pub(super) config: StoreConfig,
    pub(super) meta: Arc<dyn MetaStore>,
    pub(super) peers: Arc<dyn PeerTransport>,
    pub(super) runtime: Handle,
    pub(super) serving: Semaphore,
    pub(super) upload: Upload,
    repos: Mutex<HashMap<String, Arc<Repo>>>,
}

/// See the module's charter.
pub struct Images {
    shared: Arc<Shared>,
    cells: Mutex<HashMap<ImageId, Arc<OnceCell<Arc<Core>>>>>,
}

/// `about.json`: where a cached image came from.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct About {
    parent: ImageParent,
    #[serde(default)]
    domain: Option<Name>,
}

impl Shared {
    pub(super) fn new(
        config: StoreConfig,
        meta: Arc<dyn MetaStore>,
        peers: Arc<dyn PeerTransport>,
        runtime: Handle,
    ) -> Arc<Self> {
        let upload = Upload::new(config.upload_bytes_s);
        let serving = Semaphore::new(peers::SERVING_MAX);
        Arc::new(Self { config, meta, peers, runtime, serving, upload, repos: Mutex::default() })
    }

    /// The repository at `url`; the same one, with the same breaker, for everybody.
    pub(super) fn repo(&self, url: &str, create: bool) -> Result<Arc<Repo>> {
        if let Some(repo) = self.repos.lock().get(url) {
            return Ok(Arc::clone(repo));
        }
        let repo = Repo::open(url, create, self.config.s3_keys.as_ref())?;
        Ok(Arc::clone(self.repos.lock().entry(url.to_owned()).or_insert(repo)))
    }

    /// Bytes of objects read from all repositories.
    pub(super) fn seed_bytes(&self) -> u64 {
        self.repos.lock().values().map(|repo| repo.fetched_bytes()).sum()
    }

    /// Asks the metadata store, with a limit.
    pub(super) async fn meta<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(META_WAIT, call).await {
            Ok(result) => result,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "ask the metadata store: no answer")),
        }
    }

    pub(super) fn image_dir(&self, id: &ImageId) -> PathBuf {
        self.config.data_dir.join("cache").join(id.to_string())
    }

    /// Tells the cluster that this host has, or will have, blocks of an image.
    pub(super) async fn tell_holds(&self, id: &ImageId, blocks: u64) -> Result<()> {
        let value = serde_json::to_vec(&HoldsRecord { blocks })
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write a record", error))?;
        let put = Op::Put(key::holds(id, &self.config.host), value);
        self.meta(self.meta.txn(Vec::new(), vec![put])).await.map(|_| ())
    }

    /// The other hosts that have blocks of an image, and roughly how many.
    pub(super) async fn holders(&self, id: &ImageId) -> Result<Vec<(HostId, u64)>> {
        let prefix = key::holders(id);
        let found = self.meta(self.meta.read(&prefix)).await?;
        let host_of = |key: &str| key.strip_prefix(&prefix).and_then(|name| name.parse::<HostId>().ok());
        Ok(found
            .items
            .iter()
            .filter_map(|item| {
                let record: HoldsRecord = serde_json::from_slice(&item.value).ok()?;
                host_of(&item.key).map(|host| (host, record.blocks))
            })
            .filter(|(host, _)| *host != self.config.host)
            .collect())
    }
}

impl Images {
    pub(super) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared, cells: Mutex::default() })
    }

    /// The images that are open.
    pub(super) fn open_ones(&self) -> Vec<Arc<Core>> {
        self.cells.lock().values().filter_map(|cell| cell.get().cloned()).collect()
    }

    /// Lets go of all images, and gives those that were open.
    pub(super) fn close_all(&self) -> Vec<Arc<Core>> {
        let cells = std::mem::take(&mut *self.cells.lock());
        cells.into_values().filter_map(|cell| cell.get().cloned()).collect()
    }

    /// The open ones other than `id`.
    pub(super) fn open_except(&self, id: ImageId) -> Vec<Arc<Core>> {
        let cells = self.cells.lock();
        cells.iter().filter(|(other, _)| **other != id).filter_map(|(_, cell)| cell.get().cloned()).collect()
    }

    /// The image, if it is open.
    pub(super) fn get(&self, id: &ImageId) -> Option<Arc<Core>> {
        self.cells.lock().get(id).and_then(|cell| cell.get().cloned())
    }

    /// Opens an image; whoever asks at the same time waits for the same opening.
    pub(super) async fn open(self: &Arc<Self>, parent: &ImageParent) -> Result<Arc<Core>> {
        let cell = Arc::clone(self.cells.lock().entry(parent.id).or_default());
        let opened = cell
            .get_or_try_init(|| async {
                self.open_now(parent)
                    .await
                    .with_context(|| format!("open image {} ({})", parent.image, parent.id))
            })
            .await;
        opened.cloned()
    }

    /// The image for a peer that asks: open, being opened, or in the cache's directory.
    pub(super) async fn open_for_peer(self: &Arc<Self>, id: &ImageId) -> Result<Arc<Core>> {
        if let Some(core) = self.get(id) {
            return Ok(core);
        }
        let Some(about) = self.about(id) else {
            return Err(Error::new(ErrorKind::NotFound, format!("find image {id}: it is not on this host")));
        };
        self.open(&about.parent).await
    }

    /// The images in the cache's directory.
    pub(super) fn cached(&self) -> Vec<ImageParent> {
        let dir = self.shared.config.data_dir.join("cache");
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let ids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<ImageId>().ok());
        ids.filter_map(|id| self.about(&id)).map(|about| about.parent).collect()
    }

    /// The domain of an image that is in the cache's directory.
    pub(super) fn domain(&self, id: &ImageId) -> Option<Option<Name>> {
        match self.get(id) {
            Some(core) => Some(core.domain.clone()),
            None => self.about(id).map(|about| about.domain),
        }
    }

    fn about(&self, id: &ImageId) -> Option<About> {
        let bytes = std::fs::read(self.shared.image_dir(id).join("about.json")).ok()?;
        serde_json::from_slice::<About>(&bytes).ok().filter(|about| about.parent.id == *id)
    }

    async fn open_now(self: &Arc<Self>, parent: &ImageParent) -> Result<Arc<Core>> {
        let shared = &self.shared;
        let id = parent.id;
        let dir = shared.image_dir(&id);
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let about = self.settle_about(parent).await?;
        let repo = shared.repo(&parent.store_url, false)?;
        let path = dir.join("manifest");
        let manifest = match open_manifest(path.clone(), id).await {
            Ok(manifest) => manifest,
            Err(error) => {
                if error.kind() == ErrorKind::Corrupt {
                    tracing::warn!(%error, "fetch a damaged manifest again");
                }
                let _ = std::fs::remove_file(&path);
                if let Err(error) = shared.tell_holds(&id, 0).await {
                    tracing::warn!(%error, image = %id, "tell other hosts that this one has an image");
                }
                peers::fetch_manifest(shared, &id, &repo, &path).await?;
                open_manifest(path, id).await?
            }
        };
        let manifest = Arc::new(manifest);
        let open_files = {
            let manifest = Arc::clone(&manifest);
            move || Ok((ImageCache::open(&dir, Arc::clone(&manifest))?, Hashes::open(&dir, &manifest)?))
        };
        let (cache, hashes) = blocking("open a cache", open_files).await?;
        let core = Core::new(
            Arc::clone(shared),
            Arc::downgrade(self),
            parent.clone(),
            about.domain,
            manifest,
            cache,
            hashes,
            repo,
        );
        shared.runtime.spawn(peers::membership(Arc::downgrade(&core)));
        shared.runtime.spawn(peers::tell_news(Arc::downgrade(&core)));
        Ok(core)
    }

    /// Which domain the image belongs to: what the cluster says, or said when it was first opened.
    async fn settle_about(&self, parent: &ImageParent) -> Result<About> {
        let known = self.about(&parent.id);
        let record_key = key::image(&parent.image);
        let record = self.shared.meta(self.shared.meta.get(&record_key)).await;
        let record = match record {
            Ok(item) => item.and_then(|item| serde_json::from_slice::<ImageRecord>(&item.value).ok()),
            Err(error) if known.is_some() => {
                tracing::warn!(%error, image = %parent.image, "open an image by what this host knows of it");
                None
            }
            Err(error) => return Err(error),
        };
        let domain = match record.filter(|record| record.id == parent.id) {
            Some(record) => record.domain,
            None => known.and_then(|about| about.domain),
        };
        let about = About { parent: parent.clone(), domain };
        let bytes = serde_json::to_vec_pretty(&about)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "write about.json", error))?;
        let path = self.shared.image_dir(&parent.id).join("about.json");
        let part = path.with_extension("part");
        std::fs::write(&part, bytes)
            .and_then(|()| std::fs::rename(&part, &path))
            .context("write about.json")?;
        Ok(about)
    }
}

async fn open_manifest(path: PathBuf, id: ImageId) -> Result<Manifest> {
    blocking("open a manifest", move || Manifest::open(&path, id)).await
}

/// Whether the image is still there, for tasks that must not keep it.
pub(super) fn alive(core: &Weak<Core>) -> Option<Arc<Core>> {
    core.upgrade()
}
