//! The cluster's certificate authority, join tokens, certificates and their renewal, and who is a member.
//!
//! ```text
//!   init ──► authority, own certificate, operator's certificate          (files; on one host, once)
//!   make_token ──► token/HASH in the metadata store, text for the newcomer
//!   join ──► any member ──► the signer: compare-and-delete the token, write host/NAME, sign
//!   keep_renewed ──► at two thirds of a certificate's life: new key, `cluster.renew`, exchanged while running
//!   remove ──► host/NAME revoked ──► follow_hosts on every host: refused, open connections closed
//! ```
//!
//! Invariants
//! * The authority's key is on the host that made the cluster and nowhere else; that host signs, others forward.
//! * A token is good once and for an hour; the store holds its hash only.
//! * A certificate says what its token, or the certificate it replaces, said; never what its holder asks for.
//! * A name that was removed may join again: its generation rises, and earlier certificates stay refused.
//!
//! Not here: TLS itself and refusing connections (`link`), who may call what (`engine::trust`).

pub mod authority;
pub mod files;
pub mod hosts;
pub mod renew;
pub mod serve;
#[cfg(test)]
mod test;
pub mod token;

pub use authority::{Authority, HOST_LIFE_S, Subject};
pub use files::{Files, Membership};
pub use hosts::{Facts, Hosts, announce, follow_hosts, remove};
pub use renew::keep_renewed;
pub use serve::Service;
pub use token::{JoinToken, TOKEN_LIFE_S, make_token};

use std::path::Path;
use std::time::Duration;
use whimbrel_wire::meta::{ClusterRecord, HostRecord, key};
use whimbrel_wire::peer::cluster::{JoinRequest, Member, MetaLocation};
use whimbrel_wire::{HostId, Name, Role};

use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{self, LinkOptions, fingerprint, read_certificate};
use crate::meta::{self, Committed, Compare, MetaStore, Op};

/// How long changing a record may take.
const CHANGE: Duration = Duration::from_secs(10);

/// Makes a cluster: its authority, this host's certificate and one for an operator, all as files under `dir`.
/// The records of the metadata store are written by [`found`], when the store runs.
pub fn init(
    dir: &Path,
    cluster: &Name,
    host: &HostId,
    addresses: &[String],
    meta: MetaLocation,
) -> Result<Membership> {
    check_addresses(addresses)?;
    let files = Files::create(dir)?;
    let authority = Authority::generate(cluster)?;
    files.write_authority(&authority)?;
    let operator: Name = "operator".parse()?;
    for (role, name) in [(Role::Host, host), (Role::Operator, &operator)] {
        let subject = Subject { role, name: name.clone(), generation: 1 };
        let (certificate, key) = authority.issue(&subject, authority::life_s(role))?;
        files.write_credentials(role, &certificate, &key)?;
    }
    let signer = Member { name: host.clone(), addresses: addresses.to_vec() };
    let membership =
        Membership { cluster: cluster.clone(), role: Role::Host, name: host.clone(), signer, meta };
    // Last: its presence says that everything else is there.
    files.write_membership(&membership)?;
    Ok(membership)
}

/// Writes the cluster's record and the first host's, if they are not there.
pub async fn found(store: &dyn MetaStore, files: &Files, default_store_url: Option<String>) -> Result<()> {
    let membership = files.membership()?;
    let ca_pem = files.ca_pem()?;
    let record = ClusterRecord { name: membership.cluster.clone(), ca_pem, default_store_url };
    let host = new_host_record(&membership.name, &membership.signer.addresses, 1, "");
    let host_key = key::host(&membership.name);
    let compare = vec![Compare::Absent(key::CLUSTER.into()), Compare::Absent(host_key.clone())];
    let ops = vec![
        Op::Put(key::CLUSTER.into(), meta::encode(key::CLUSTER, &record)?),
        Op::Put(host_key.clone(), meta::encode(&host_key, &host)?),
    ];
    match meta::commit(store, compare, ops, CHANGE).await.context("write the cluster's record")? {
        Committed::Yes(_) => Ok(()),
        Committed::Conflict => {
            let found = meta::record::<ClusterRecord>(store, key::CLUSTER).await?;
            match found {
                Some((found, _)) if found.ca_pem == record.ca_pem => Ok(()),
                _ => Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!(
                        "write the record of cluster {}: the store belongs to another cluster",
                        record.name
                    ),
                )),
            }
        }
    }
}

fn new_host_record(name: &HostId, addresses: &[String], generation: u64, version: &str) -> HostRecord {
    HostRecord {
        name: name.clone(),
        addresses: addresses.to_vec(),
        draining: false,
        revoked: false,
        generation,
        seen_s: clock::wall_s(),
        version: version.to_owned(),
        platform: String::new(),
        domains: Vec::new(),
        space: None,
    }
}

fn check_addresses(addresses: &[String]) -> Result<()> {
    for address in addresses {
        let parsed: Result<std::net::SocketAddr, _> = address.parse();
        let good = parsed.is_ok_and(|address| address.port() != 0 && !address.ip().is_unspecified());
        if !good {
            let what = format!("read the address {address:?}: IP:PORT, as other hosts reach it");
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
    }
    if addresses.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "read a host's addresses: there are none"));
    }
    Ok(())
}

/// Joins the cluster of the member at `address` with a token: gets a certificate for `name` and writes the files
/// under `dir`. `addresses` are this host's own; empty for operators, readers and guests.
pub async fn join(
    dir: &Path,
    address: std::net::SocketAddr,
    token: &str,
    name: &HostId,
    addresses: &[String],
) -> Result<Membership> {
    let token: JoinToken = token.parse()?;
    let files = Files::create(dir)?;
    let (key_pem, request) = authority::new_request()?;
    let ask = JoinRequest {
        secret: token.secret().to_owned(),
        name: name.clone(),
        addresses: addresses.to_vec(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let answer = link::join(address, token.authority(), &ask, request, &LinkOptions::default()).await?;
    let ca = link::certificate_from_pem(&answer.ca_pem)?;
    if fingerprint(&ca) != token.authority() {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("join through {address}: its authority is another one"),
        ));
    }
    let certificate = link::certificate_from_pem(&answer.certificate_pem)?;
    let info = read_certificate(&certificate)?;
    if info.identity.host != *name || info.identity.role != answer.role {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("join through {address}: got a certificate for {}", info.identity),
        ));
    }
    // Refuses a key that does not fit.
    link::Credentials::from_pem(&answer.ca_pem, &answer.certificate_pem, &key_pem)?;
    files.write_ca(&answer.ca_pem)?;
    files.write_credentials(answer.role, &answer.certificate_pem, &key_pem)?;
    let membership = Membership {
        cluster: answer.cluster,
        role: answer.role,
        name: name.clone(),
        signer: answer.signer,
        meta: answer.meta,
    };
    files.write_membership(&membership)?;
    Ok(membership)
}
