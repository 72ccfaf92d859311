//! Who is a member: host records, followed by every host; where they are reached, and who was removed.
//!
//! Invariant: a removed host is refused as soon as its record is seen, and stays refused while the store is away.

use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use whimbrel_wire::HostId;
use whimbrel_wire::meta::{HostRecord, Space, key};

use super::CHANGE;
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::Links;
use crate::meta::{self, Item, MetaStore, WatchEvent};

/// The hosts' records as last seen. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Arc<RwLock<BTreeMap<HostId, HostRecord>>>);

impl Hosts {
    /// One host's record.
    pub fn get(&self, host: &HostId) -> Option<HostRecord> {
        self.0.read().get(host).cloned()
    }

    /// All records, removed hosts too, by name.
    pub fn all(&self) -> Vec<HostRecord> {
        self.0.read().values().cloned().collect()
    }

    /// The host, if it is a member that was not removed; an error for people otherwise.
    pub fn member(&self, host: &HostId) -> Result<HostRecord> {
        match self.get(host) {
            Some(record) if !record.revoked => Ok(record),
            Some(_) => Err(Error::new(ErrorKind::NotFound, format!("find host {host}: it was removed"))),
            None => Err(Error::new(ErrorKind::NotFound, format!("find host {host}: there is no such host"))
                .hint("whimbrel host list")),
        }
    }

    fn apply(&self, item: &Item, links: &Links) {
        let record: HostRecord = match meta::parse(&item.key, &item.value) {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(%error, "skip a host's record");
                return;
            }
        };
        let addresses: Vec<SocketAddr> = record.addresses.iter().filter_map(|it| it.parse().ok()).collect();
        links.set_addresses(&record.name, addresses);
        links.refuse(&record.name, if record.revoked { u64::MAX } else { record.generation });
        self.0.write().insert(record.name.clone(), record);
    }
}

/// Follows the hosts' records, feeding the address book and the refusals of `links`; runs until it is dropped.
pub async fn follow_hosts(store: Arc<dyn MetaStore>, links: Links, hosts: Hosts) {
    loop {
        if let Err(error) = follow_once(&*store, &links, &hosts).await {
            tracing::warn!(%error, "follow the hosts' records");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn follow_once(store: &dyn MetaStore, links: &Links, hosts: &Hosts) -> Result<()> {
    let snapshot = store.read(key::HOSTS).await.context("read the hosts' records")?;
    for item in &snapshot.items {
        hosts.apply(item, links);
    }
    let mut events = store.watch(key::HOSTS, snapshot.rev).await.context("watch the hosts' records")?;
    while let Some(event) = events.recv().await {
        match event {
            WatchEvent::Put(item) => hosts.apply(&item, links),
            // Records are marked, not removed; one that vanished all the same is no reason to trust its host.
            WatchEvent::Deleted(key, _) => tracing::warn!(key, "a host's record was deleted"),
            WatchEvent::Compacted => break,
        }
    }
    Ok(())
}

/// What a host tells about itself.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `IP:PORT` of its peer port, best first.
    pub addresses: Vec<String>,
    /// The program's version.
    pub version: String,
    /// Kernel release and QEMU version.
    pub platform: String,
    /// Of the file system with its volumes.
    pub space: Option<Space>,
}

/// Writes what a host tells about itself into its record, with the time. To be repeated every half minute or so.
pub async fn announce(store: &dyn MetaStore, host: &HostId, facts: &Facts) -> Result<()> {
    let change = |record: Option<HostRecord>| {
        let Some(mut record) = record else {
            return Err(Error::new(ErrorKind::NotFound, format!("announce host {host}: it has no record")));
        };
        if record.revoked {
            let what = format!("announce host {host}: it was removed from the cluster");
            return Err(Error::new(ErrorKind::Denied, what).hint("join again with a new token"));
        }
        record.addresses.clone_from(&facts.addresses);
        record.version.clone_from(&facts.version);
        record.platform.clone_from(&facts.platform);
        record.space = facts.space;
        record.seen_s = clock::wall_s();
        Ok(Some(record))
    };
    meta::update(store, &key::host(host), CHANGE, change).await.map(drop)
}

/// Removes a host: none of its certificates is good any more, on any host that sees the record. `signer` is the
/// host with the authority's key, which cannot be removed. Rights that the host holds stay its own.
pub async fn remove(store: &dyn MetaStore, host: &HostId, signer: &HostId) -> Result<()> {
    if host == signer {
        let what = format!("remove host {host}: it has the key of the cluster's authority");
        return Err(Error::new(ErrorKind::Refused, what).hint("certificates could never be renewed again"));
    }
    let change = |record: Option<HostRecord>| {
        let mut record = record.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("remove host {host}: there is no such host"))
        })?;
        record.revoked = true;
        Ok(Some(record))
    };
    meta::update(store, &key::host(host), CHANGE, change).await.map(drop)
}
