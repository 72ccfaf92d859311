//! What the API says and does about hosts and links.

use whimbrel_host::meta;
use whimbrel_host::{Error, ErrorKind, Result, clock, cluster};
use whimbrel_wire::api::{Host, Link, Token};
use whimbrel_wire::meta::{HostRecord, key};
use whimbrel_wire::{HostId, Role};

use super::{Node, SILENT_AFTER_S};

/// How long changing a record may take.
const CHANGE: std::time::Duration = std::time::Duration::from_secs(10);
/// A link on which nothing was heard for this long is shown as silent, milliseconds.
const LINK_SILENT_MS: u64 = 5_000;

impl Node {
    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<Host>> {
        let records = whimbrel_host::records::list::<HostRecord>(&*self.meta, key::HOSTS).await?;
        Ok(records.into_iter().map(|record| describe(&record.value)).collect())
    }

    /// One host.
    pub async fn host(&self, name: &HostId) -> Result<Host> {
        let what = format!("host {name}");
        let record = whimbrel_host::records::must::<HostRecord>(&*self.meta, &key::host(name), &what).await?;
        Ok(describe(&record.value))
    }

    /// This host.
    pub async fn host_self(&self) -> Result<Host> {
        self.host(&self.host).await
    }

    /// Refuses or takes new VMs on a host.
    pub async fn host_drain(&self, name: &HostId, draining: bool) -> Result<Host> {
        let change = |record: Option<HostRecord>| {
            let record = record.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("drain host {name}: there is no such host"))
            })?;
            Ok(Some(HostRecord { draining, ..record }))
        };
        meta::update(&*self.meta, &key::host(name), CHANGE, change).await?;
        self.host(name).await
    }

    /// Revokes a host's certificates.
    pub async fn host_remove(&self, name: &HostId) -> Result<Host> {
        cluster::remove(&*self.meta, name, &self.membership.signer.name).await?;
        self.host(name).await
    }

    /// Makes a join token.
    pub async fn token(&self, role: Role) -> Result<Token> {
        cluster::make_token(&*self.meta, self.links.credentials(), role, cluster::TOKEN_LIFE_S).await
    }

    /// Connections to all other hosts.
    pub async fn links_list(&self) -> Result<Vec<Link>> {
        let others =
            self.hosts.all().into_iter().filter(|record| record.name != self.host && !record.revoked);
        Ok(others.map(|record| self.describe_link(&record)).collect())
    }

    /// The connection to one host.
    pub async fn link(&self, name: &HostId) -> Result<Link> {
        Ok(self.describe_link(&self.hosts.member(name)?))
    }

    fn describe_link(&self, record: &HostRecord) -> Link {
        let silent_ms = self.links.peer_silent_ms(&record.name);
        let metrics = whimbrel_host::metrics::metrics();
        let label = [record.name.as_str()];
        Link {
            host: record.name.clone(),
            state: match silent_ms {
                None => "idle".into(),
                Some(ms) if ms > LINK_SILENT_MS => "silent".into(),
                Some(_) => "up".into(),
            },
            address: record.addresses.first().cloned().unwrap_or_default(),
            silent_ms,
            sent_bytes: metrics.link_sent_bytes.with_label_values(&label).get(),
            received_bytes: metrics.link_received_bytes.with_label_values(&label).get(),
        }
    }
}

fn describe(record: &HostRecord) -> Host {
    let silent = clock::wall_s().saturating_sub(record.seen_s) > SILENT_AFTER_S;
    let state = match (record.revoked, silent, record.draining) {
        (true, ..) => "removed",
        (_, true, _) => "silent",
        (_, _, true) => "draining",
        _ => "alive",
    };
    Host {
        name: record.name.clone(),
        role: Role::Host,
        state: state.to_owned(),
        addresses: record.addresses.clone(),
        version: record.version.clone(),
        platform: record.platform.clone(),
        space: record.space,
    }
}
