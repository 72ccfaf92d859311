//! Hosts with real links, files and metadata, for the tests of volumes.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use whimbrel_wire::{Name, Role};

use super::Volumes;
use crate::cluster::Authority;
use crate::link::{LinkOptions, Links, Listening, Router};
use crate::meta::MetaStore;
use crate::meta::sqlite::SqliteStore;
use crate::store::{Store, StoreConfig};

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A host's agent.
pub struct Agent {
    pub volumes: Volumes,
    pub store: Arc<Store>,
    pub links: Links,
    pub(super) listening: Listening,
}

impl Agent {
    /// Ends it, and waits until its connections are closed.
    pub async fn end(self) {
        self.store.stop().await;
        drop(self);
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
}

pub struct Cluster {
    authority: Authority,
    pub meta: Arc<dyn MetaStore>,
    dir: TempDir,
}

impl Cluster {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let meta = SqliteStore::open(&dir.path().join("meta.db")).unwrap();
        Self { authority: Authority::generate(&name("test")).unwrap(), meta, dir }
    }

    pub fn data(&self, host: &str) -> std::path::PathBuf {
        self.dir.path().join(host)
    }

    pub async fn agent(&self, host: &str, address: &str) -> Agent {
        let links =
            Links::new(self.authority.credentials(Role::Host, &name(host)).unwrap(), LinkOptions::default())
                .unwrap();
        let data: &Path = &self.data(host);
        let config = StoreConfig::new(data, name(host));
        let store = Store::open(config, Arc::clone(&self.meta), Arc::new(links.clone())).await.unwrap();
        let meta = Arc::clone(&self.meta);
        let volumes =
            Volumes::new(name(host), data, data.join("run"), meta, Arc::clone(&store), links.clone())
                .unwrap();
        let address: SocketAddr = address.parse().unwrap();
        let listening = links.listen(address, volumes.register(Router::new())).await.unwrap();
        Agent { volumes, store, links, listening }
    }
}
