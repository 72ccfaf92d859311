//! The member's side of joining and renewing: the signer decides and signs, others forward.
//!
//! Invariant: a token is removed in the same transaction that writes what it bought.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use whimbrel_wire::Role;
use whimbrel_wire::meta::{HostRecord, TokenRecord, key};
use whimbrel_wire::peer::cluster::{JoinAnswer, JoinRequest, MetaLocation, RenewAnswer, RenewRequest};

use super::authority::{Authority, Subject, life_s};
use super::files::{Files, Membership};
use super::{CHANGE, check_addresses, new_host_record, token};
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Links, PeerIdentity, Router};
use crate::meta::{self, Committed, Compare, MetaStore, Op};

/// How long the signer may take.
const SIGN: Duration = Duration::from_secs(15);

/// Answers those who join and those who renew.
pub struct Service {
    store: Arc<dyn MetaStore>,
    links: Links,
    membership: Membership,
    ca_pem: String,
    authority: Option<Authority>,
    host_life_s: u64,
}

impl Service {
    /// The service of the member whose files these are.
    pub fn new(store: Arc<dyn MetaStore>, links: Links, files: &Files) -> Result<Arc<Self>> {
        Self::with_life(store, links, files, life_s(Role::Host))
    }

    /// As [`Service::new`]; hosts' certificates live for `host_life_s` seconds.
    pub fn with_life(
        store: Arc<dyn MetaStore>,
        links: Links,
        files: &Files,
        host_life_s: u64,
    ) -> Result<Arc<Self>> {
        let (membership, ca_pem, authority) = (files.membership()?, files.ca_pem()?, files.authority()?);
        let signer = &membership.signer;
        if links.addresses(&signer.name).is_empty() {
            links.set_addresses(
                &signer.name,
                signer.addresses.iter().filter_map(|it| it.parse().ok()).collect(),
            );
        }
        Ok(Arc::new(Self { store, links, membership, ca_pem, authority, host_life_s }))
    }

    /// Adds joining and renewing to what this host answers.
    pub fn routes(self: &Arc<Self>, router: Router) -> Router {
        let (join, forwarded, renew) = (self.clone(), self.clone(), self.clone());
        router
            .join(move |from, request, csr| {
                let service = join.clone();
                async move {
                    let name = request.name.clone();
                    let answer = service.join(request, csr).await?;
                    tracing::info!(%from, role = %answer.role, %name, "joined the cluster");
                    Ok(answer)
                }
            })
            .call("cluster.join", move |_, request: JoinRequest, csr| {
                let service = forwarded.clone();
                async move { Ok((service.sign_join(&request, &csr).await?, Bytes::new())) }
            })
            .call("cluster.renew", move |peer, _: RenewRequest, csr| {
                let service = renew.clone();
                async move {
                    let certificate_pem = service.renew(&peer, &csr).await?;
                    Ok((RenewAnswer { certificate_pem }, Bytes::new()))
                }
            })
    }

    async fn join(&self, request: JoinRequest, csr: Bytes) -> Result<JoinAnswer> {
        if self.authority.is_some() {
            return self.sign_join(&request, &csr).await;
        }
        let signer = &self.membership.signer.name;
        let (answer, _) = self.links.call(signer, "cluster.join", &request, csr, SIGN).await?;
        Ok(answer)
    }

    fn authority(&self) -> Result<&Authority> {
        let signer = &self.membership.signer.name;
        self.authority.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("sign a certificate: only host {signer} has the key"))
        })
    }

    async fn sign_join(&self, request: &JoinRequest, csr: &[u8]) -> Result<JoinAnswer> {
        let authority = self.authority()?;
        // A second round is for another newcomer having changed the same record meanwhile.
        for _ in 0..3 {
            if let Some(answer) = self.try_join(authority, request, csr).await? {
                return Ok(answer);
            }
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            format!("let {} join: the store changes too fast", request.name),
        ))
    }

    /// One round; `None` if something changed between reading and writing.
    async fn try_join(
        &self,
        authority: &Authority,
        request: &JoinRequest,
        csr: &[u8],
    ) -> Result<Option<JoinAnswer>> {
        let token_key = token::record_key(&request.secret);
        let store = &*self.store;
        let Some((record, token_rev)) = meta::record::<TokenRecord>(store, &token_key).await? else {
            return Err(Error::new(ErrorKind::Denied, "check the token: it is unknown, or was used")
                .hint("make a new one: whimbrel cluster token"));
        };
        let role = record.role;
        if record.expires_s <= clock::wall_s() {
            return Err(Error::new(ErrorKind::Denied, "check the token: it has expired")
                .hint("make a new one: whimbrel cluster token"));
        }
        let mut compare = vec![Compare::Unchanged(token_key.clone(), token_rev)];
        let mut ops = vec![Op::Delete(token_key)];
        let mut generation = 1;
        if role == Role::Host {
            check_addresses(&request.addresses)?;
            let host_key = key::host(&request.name);
            let old = meta::record::<HostRecord>(store, &host_key).await?;
            generation = next_generation(request, old.as_ref().map(|(record, _)| record))?;
            compare.push(match old {
                Some((_, rev)) => Compare::Unchanged(host_key.clone(), rev),
                None => Compare::Absent(host_key.clone()),
            });
            let record = new_host_record(&request.name, &request.addresses, generation, &request.version);
            ops.push(Op::Put(host_key.clone(), meta::encode(&host_key, &record)?));
        }
        // Signed first: a request that cannot be signed costs no token.
        let subject = Subject { role, name: request.name.clone(), generation };
        let certificate_pem = authority.sign(&subject, csr, self.life_s(role))?;
        match meta::commit(store, compare, ops, CHANGE).await.context("use up the token")? {
            Committed::Yes(_) => Ok(Some(self.answer(role, certificate_pem))),
            Committed::Conflict => Ok(None),
        }
    }

    fn answer(&self, role: Role, certificate_pem: String) -> JoinAnswer {
        // The signer answers: where it is reached now may differ from when the cluster was made.
        let mut me = self.membership.signer.clone();
        let known = self.links.addresses(&me.name);
        if !known.is_empty() {
            me.addresses = known.iter().map(ToString::to_string).collect();
        }
        JoinAnswer {
            certificate_pem,
            ca_pem: self.ca_pem.clone(),
            role,
            cluster: self.membership.cluster.clone(),
            signer: me.clone(),
            meta: match &self.membership.meta {
                MetaLocation::Sqlite { .. } => MetaLocation::Served { by: me },
                other => other.clone(),
            },
        }
    }

    fn life_s(&self, role: Role) -> u64 {
        if role == Role::Host { self.host_life_s } else { life_s(role) }
    }

    /// Signs a new certificate that says what the peer's present one says.
    async fn renew(&self, peer: &PeerIdentity, csr: &[u8]) -> Result<String> {
        let authority = self.authority()?;
        if peer.role == Role::Host {
            let record = meta::record::<HostRecord>(&*self.store, &key::host(&peer.host)).await?;
            let good = record.is_some_and(|(it, _)| !it.revoked && it.generation == peer.generation);
            if !good {
                let what = format!("renew the certificate of host {}: it is no member", peer.host);
                return Err(Error::new(ErrorKind::Denied, what));
            }
        }
        let subject = Subject { role: peer.role, name: peer.host.clone(), generation: peer.generation };
        authority.sign(&subject, csr, self.life_s(peer.role))
    }

    /// A new certificate for this host itself, from wherever the signer is.
    pub(super) async fn renew_own(&self, csr: Vec<u8>) -> Result<String> {
        if self.authority.is_some() {
            return self.renew(&self.links.me(), &csr).await;
        }
        let signer = &self.membership.signer.name;
        let (answer, _): (RenewAnswer, _) =
            self.links.call(signer, "cluster.renew", &RenewRequest {}, csr.into(), SIGN).await?;
        Ok(answer.certificate_pem)
    }

    pub(super) fn links(&self) -> &Links {
        &self.links
    }

    pub(super) fn own_authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }
}

fn next_generation(request: &JoinRequest, old: Option<&HostRecord>) -> Result<u64> {
    match old {
        None => Ok(1),
        Some(record) if record.revoked => Ok(record.generation + 1),
        Some(_) => {
            let what = format!("let {} join: the cluster has a host of that name", request.name);
            Err(Error::new(ErrorKind::AlreadyExists, what)
                .hint(format!("whimbrel host remove {}, if it is gone for good", request.name)))
        }
    }
}
