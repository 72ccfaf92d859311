//! TLS 1.3 between hosts: calls, streams, one port.
//!
//! ```text
//!   Links::call ──► kept connection per host and lane (dial once, back off, ping) ──► Router at the peer
//!   Links::stream ─► a connection of its own ───────────────────────────────────────► Router at the peer
//!   Links::listen ◄─ one port: peer protocol, remote API, joining (by ALPN)
//! ```
//!
//! Invariants
//! * The other end's certificate names it; its role is checked at every call, its name at every dial.
//! * A removed host ([`Links::refuse`]) is refused at once, and its open connections are closed.
//! * A call fails with `Unavailable` or `TimedOut` only if nothing of it was sent, or if the peer itself says so;
//!   with [`ErrorKind::Unknown`] if it may have been carried out.
//! * Every wait has a limit, every queue a length.
//!
//! The wire format stands in `wire::peer`. Not here: certificates' making and renewal (`cluster`), who may call
//! what (`engine::trust`).

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::TlsStream;
use whimbrel_wire::peer::{CallHead, FrameKind, Open};
use whimbrel_wire::{HostId, Role};

mod conn;
mod credentials;
mod dial;
mod export_tls;
mod frame;
mod own;
#[cfg(test)]
pub(crate) mod proxy;
mod router;
mod serve;
mod stream;
pub(crate) mod tls;
mod write;

pub use credentials::{
    CertificateInfo, Credentials, PeerIdentity, certificate_from_pem, identity_uri, read_certificate,
};
pub use dial::{connect_api, join};
pub use export_tls::ExportTls;
pub(crate) use frame::{Frame, read_frame, to_json, write_frame};
pub use own::own_addresses;
pub use router::Router;
pub use serve::{Listening, StreamOffer};
pub use stream::PeerStream;
pub use tls::fingerprint;

use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::metrics;
use conn::Fault;
use dial::Lane;
use stream::{Health, Registry, Socket};

/// Limits of links; the defaults suit hosts of one site.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// Ask for a sign of life after this long without one, milliseconds.
    pub ping_ms: u64,
    /// Give a kept connection up after this long without a sign of life, milliseconds.
    pub dead_ms: u64,
    /// Limit for one TCP connect, milliseconds.
    pub connect_ms: u64,
    /// Limit for a TLS handshake and hello, milliseconds.
    pub handshake_ms: u64,
    /// The kernel gives a connection up whose peer acknowledges, or reads, nothing for so long, milliseconds.
    pub give_up_ms: u32,
    /// Close a kept connection that nobody used for so long, milliseconds.
    pub idle_ms: u64,
    /// Most connections that come in at once.
    pub connections_max: usize,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            ping_ms: 500,
            dead_ms: 2_000,
            connect_ms: 2_000,
            handshake_ms: 5_000,
            give_up_ms: 20_000,
            idle_ms: 120_000,
            connections_max: 16_384,
        }
    }
}

/// What is known about one host.
#[derive(Default)]
struct Peer {
    health: Arc<Health>,
    keepers: Arc<AtomicUsize>,
    /// Short calls, so that they do not wait behind blocks.
    control: Lane,
    /// Calls that carry bulk.
    bulk: Lane,
}

struct Shared {
    credentials: Arc<Credentials>,
    options: LinkOptions,
    client_tls: Arc<rustls::ClientConfig>,
    addresses: RwLock<HashMap<HostId, Vec<SocketAddr>>>,
    /// Certificates of a host below this generation are refused.
    refused_below: RwLock<HashMap<HostId, u64>>,
    peers: Mutex<HashMap<HostId, Arc<Peer>>>,
    registry: Arc<Registry>,
}

/// Connections with the other hosts. Clones share everything.
#[derive(Clone)]
pub struct Links(Arc<Shared>);

/// Program and version, as hellos say it.
fn program() -> String {
    format!("whimbrel {}", env!("CARGO_PKG_VERSION"))
}

/// Methods whose payloads are bulky travel on a connection of their own, unless a guest waits for the answer.
fn is_bulk(method: &str) -> bool {
    let areas = ["image.", "memory."];
    method == whimbrel_wire::peer::layer::METHOD_PULL || areas.iter().any(|area| method.starts_with(area))
}

impl Links {
    /// Links that speak as `credentials` say.
    pub fn new(credentials: Arc<Credentials>, options: LinkOptions) -> Result<Self> {
        let client_tls = tls::client(&credentials, whimbrel_wire::peer::ALPN_PEER)?;
        Ok(Self(Arc::new(Shared {
            credentials,
            options,
            client_tls,
            addresses: RwLock::default(),
            refused_below: RwLock::default(),
            peers: Mutex::default(),
            registry: Arc::default(),
        })))
    }

    /// Who this host is.
    pub fn me(&self) -> PeerIdentity {
        self.0.credentials.me()
    }

    /// The certificate and authority these links use.
    pub fn credentials(&self) -> &Arc<Credentials> {
        &self.0.credentials
    }

    fn options(&self) -> &LinkOptions {
        &self.0.options
    }

    /// Opens this host's port: `router` answers calls, streams, the remote API and joins.
    pub async fn listen(&self, address: SocketAddr, router: Router) -> Result<Listening> {
        serve::listen(self, address, router).await
    }

    /// From now on `host` is dialled at these addresses, the first that answers.
    pub fn set_addresses(&self, host: &HostId, addresses: Vec<SocketAddr>) {
        self.0.addresses.write().insert(host.clone(), addresses);
    }

    /// Where `host` is dialled.
    pub fn addresses(&self, host: &HostId) -> Vec<SocketAddr> {
        self.0.addresses.read().get(host).cloned().unwrap_or_default()
    }

    /// From now on certificates of `host` of a generation below this are refused, and its connections that were
    /// made with one are closed. `u64::MAX` refuses every one: the host has been removed.
    pub fn refuse(&self, host: &HostId, below_generation: u64) {
        self.0.refused_below.write().insert(host.clone(), below_generation);
        let closed = self.0.registry.close(|peer| {
            peer.role == Role::Host && peer.host == *host && peer.generation < below_generation
        });
        if closed > 0 {
            tracing::info!(%host, closed, "close connections of a removed host");
        }
    }

    /// Calls `method` at `host` and waits at most `deadline` for the result and its payload.
    /// Errors of the peer keep their kind; see the module's invariants for the others.
    pub async fn call<P, T>(
        &self,
        host: &HostId,
        method: &str,
        params: &P,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<(T, Bytes)>
    where
        P: Serialize + ?Sized,
        T: DeserializeOwned,
    {
        let result = self.call_inner(host, method, params, payload, deadline).await;
        let area = method.split('.').next().unwrap_or_default();
        let label = if result.is_ok() { "ok" } else { "failed" };
        metrics().link_calls.with_label_values(&[area, label]).inc();
        let (json, payload) = result?;
        let value = serde_json::from_slice(&json).map_err(|error| {
            let what = format!("read the result of {method} at host {host}");
            Error::with_source(ErrorKind::InvalidInput, what, error)
        })?;
        Ok((value, payload))
    }

    async fn call_inner<P: Serialize + ?Sized>(
        &self,
        host: &HostId,
        method: &str,
        params: &P,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<(Bytes, Bytes)> {
        let what = || format!("call {method} at host {host}");
        let deadline = Instant::now() + deadline;
        let head = CallHead { method: method.to_owned(), params: raw(params)? };
        let json = Bytes::from(to_json(&head, "a call")?);
        let peer = self.peer(host);
        let lane = if is_bulk(method) { &peer.bulk } else { &peer.control };
        // A connection may end between being chosen and being used: nothing was sent then, and the next is tried.
        let mut fault = Fault::Gone;
        for _ in 0..3 {
            let conn = lane.conn(self, host, &peer, deadline).await.with_context(what)?;
            match conn.call(json.clone(), payload.clone(), deadline).await {
                Ok(frame) if frame.kind == FrameKind::Failed => {
                    return Err(frame.error()).with_context(what);
                }
                Ok(frame) => return Ok((frame.json, frame.payload)),
                Err(Fault::Gone) => {}
                Err(other) => {
                    fault = other;
                    break;
                }
            }
        }
        Err(fault.into_error(&what()))
    }

    /// Opens a stream of `service` at `host`, on a connection of its own. `deadline` limits the opening only.
    /// A stream that the peer's handler refuses fails with the handler's error.
    pub async fn stream<P: Serialize + ?Sized>(
        &self,
        host: &HostId,
        service: &str,
        params: &P,
        deadline: Duration,
    ) -> Result<PeerStream> {
        let open = Open { service: service.to_owned(), params: raw(params)? };
        let what = || format!("open a stream of {service} at host {host}");
        match tokio::time::timeout(deadline, dial::dial(self, host, Some(open))).await {
            Ok(stream) => stream.with_context(what),
            Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("{}: {deadline:?} are over", what()))),
        }
    }

    /// Milliseconds since anything was heard of `host`, on any connection in either direction; `None` if never.
    /// Only while calls run, or it is [kept](Links::keep), does silence mean something.
    pub fn peer_silent_ms(&self, host: &HostId) -> Option<u64> {
        self.0.peers.lock().get(host)?.health.silent_ms()
    }

    /// Keeps a connection to `host` open, made again whenever it ends, until the result is dropped: then
    /// [`Links::peer_silent_ms`] tells within two seconds that the host is gone.
    pub fn keep(&self, host: &HostId) -> Kept {
        let peer = self.peer(host);
        peer.keepers.fetch_add(1, Ordering::Relaxed);
        let task = tokio::spawn(keep(self.clone(), host.clone(), peer.clone())).abort_handle();
        Kept { peer, task }
    }

    fn peer(&self, host: &HostId) -> Arc<Peer> {
        self.0.peers.lock().entry(host.clone()).or_default().clone()
    }

    /// Takes over a connection after its handshake, if its certificate is good and not revoked.
    fn admit(&self, tls: TlsStream<Socket>) -> Result<PeerStream> {
        let (socket, session) = tls.get_ref();
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate
            .ok_or_else(|| Error::new(ErrorKind::Denied, "shake hands: the peer showed no certificate"))?;
        let peer = read_certificate(certificate)?.identity;
        // Only a host's name is a host's: an operator may bear the same one.
        if peer.role == Role::Host {
            socket.traffic.charge(peer.host.as_str(), self.peer(&peer.host).health.clone());
        } else {
            socket.traffic.charge(peer.role.as_str(), Arc::default());
        }
        let stream = PeerStream::new(tls, peer, &self.0.registry)?;
        // Checked after the registration: a removal at this moment finds the connection or is found here.
        self.check_not_refused(stream.peer())?;
        Ok(stream)
    }

    fn check_not_refused(&self, peer: &PeerIdentity) -> Result<()> {
        let below = self.0.refused_below.read().get(&peer.host).copied().unwrap_or(0);
        if peer.role == Role::Host && peer.generation < below {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("shake hands with host {}: it was removed from the cluster", peer.host),
            )
            .hint("let it join again with a new token"));
        }
        Ok(())
    }
}

fn raw<P: Serialize + ?Sized>(params: &P) -> Result<Box<RawValue>> {
    serde_json::value::to_raw_value(params)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write parameters as JSON", error))
}

/// Keeps a connection open; see [`Links::keep`].
pub struct Kept {
    peer: Arc<Peer>,
    task: AbortHandle,
}

impl Kept {
    /// Milliseconds since anything was heard of the host; `None` if never.
    pub fn silent_ms(&self) -> Option<u64> {
        self.peer.health.silent_ms()
    }

    /// Returns once nothing has been heard of the host for `limit_ms`, counted from now if it never was.
    pub async fn until_silent(&self, limit_ms: u64) {
        let begun = clock::now();
        loop {
            let silent_ms = self.silent_ms().unwrap_or_else(|| clock::now().since_ms(begun));
            if silent_ms >= limit_ms {
                return;
            }
            tokio::time::sleep(Duration::from_millis((limit_ms - silent_ms).max(1))).await;
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.peer.keepers.fetch_sub(1, Ordering::Relaxed);
        self.task.abort();
    }
}

async fn keep(links: Links, host: HostId, peer: Arc<Peer>) {
    loop {
        let deadline = Instant::now() + Duration::from_millis(links.options().handshake_ms);
        match peer.control.conn(&links, &host, &peer, deadline).await {
            Ok(conn) => conn.ended().await,
            Err(error) => {
                tracing::debug!(%host, %error, "keep a connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

#[cfg(test)]
mod test;
