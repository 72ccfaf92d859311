//! One TLS connection with a known peer: counted, listed among the open ones, closed when the peer is removed.
//!
//! Invariant: whoever holds a [`PeerStream`] knows who is at the other end.

use super::credentials::PeerIdentity;
use crate::clock;
use crate::error::{Context, Result};
use crate::metrics::metrics;
use parking_lot::Mutex;
use prometheus::IntCounter;
use rustix::net::{Shutdown, shutdown, sockopt};
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// When a peer was last heard, on any connection.
#[derive(Debug, Default)]
pub(super) struct Health {
    heard_ns: AtomicU64,
}

impl Health {
    fn touch(&self) {
        self.heard_ns.store(clock::now().0, Ordering::Relaxed);
    }

    /// Milliseconds since the peer was heard; `None` if never.
    pub fn silent_ms(&self) -> Option<u64> {
        let heard = self.heard_ns.load(Ordering::Relaxed);
        (heard != 0).then(|| clock::now().since_ms(whimbrel_wire::Time(heard)))
    }
}

/// What has passed over one connection.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    heard: Health,
    peer: OnceLock<Account>,
}

#[derive(Debug)]
struct Account {
    sent: IntCounter,
    received: IntCounter,
    health: Arc<Health>,
}

impl Traffic {
    /// From now on `peer` (a host, or the role of others) is charged, with what has passed already.
    pub fn charge(&self, peer: &str, health: Arc<Health>) {
        let metrics = metrics();
        let account = Account {
            sent: metrics.link_sent_bytes.with_label_values(&[peer]),
            received: metrics.link_received_bytes.with_label_values(&[peer]),
            health,
        };
        account.sent.inc_by(self.sent.load(Ordering::Relaxed));
        account.received.inc_by(self.received.load(Ordering::Relaxed));
        account.health.touch();
        // Set once per connection, right after its handshake.
        let _ = self.peer.set(account);
    }

    /// Milliseconds since anything came over this connection.
    pub fn silent_ms(&self) -> u64 {
        self.heard.silent_ms().unwrap_or(0)
    }

    fn count_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(account) = self.peer.get() {
            account.sent.inc_by(bytes as u64);
        }
    }

    fn count_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.heard.touch();
        if let Some(account) = self.peer.get() {
            account.received.inc_by(bytes as u64);
            account.health.touch();
        }
    }
}

/// A TCP connection that counts.
#[derive(Debug)]
pub(super) struct Socket {
    tcp: TcpStream,
    pub traffic: Arc<Traffic>,
}

impl Socket {
    /// Takes over a connection and sets its options: no delay, and given up when the peer's machine stays
    /// silent for `give_up_ms` (the kernel counts a peer that reads nothing for so long as silent too).
    pub fn new(tcp: TcpStream, give_up_ms: u32) -> Result<Self> {
        let set = || -> rustix::io::Result<()> {
            sockopt::set_tcp_nodelay(&tcp, true)?;
            sockopt::set_socket_keepalive(&tcp, true)?;
            sockopt::set_tcp_keepidle(&tcp, Duration::from_secs(2))?;
            sockopt::set_tcp_keepintvl(&tcp, Duration::from_secs(1))?;
            sockopt::set_tcp_keepcnt(&tcp, 5)?;
            sockopt::set_tcp_user_timeout(&tcp, give_up_ms)
        };
        set().context("set options of a TCP connection")?;
        let traffic = Arc::new(Traffic::default());
        traffic.heard.touch();
        Ok(Self { tcp, traffic })
    }

    fn handle(&self) -> Result<OwnedFd> {
        self.tcp.as_fd().try_clone_to_owned().context("duplicate a socket's descriptor")
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.tcp).poll_read(cx, buf))?;
        this.traffic.count_received(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let sent = ready!(Pin::new(&mut this.tcp).poll_write(cx, buf))?;
        this.traffic.count_sent(sent);
        Poll::Ready(Ok(sent))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let sent = ready!(Pin::new(&mut this.tcp).poll_write_vectored(cx, bufs))?;
        this.traffic.count_sent(sent);
        Poll::Ready(Ok(sent))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(cx)
    }
}

/// All open connections, so that those of a removed peer can be closed whatever they are used for.
#[derive(Debug, Default)]
pub(super) struct Registry {
    next: AtomicU64,
    open: Mutex<HashMap<u64, (PeerIdentity, OwnedFd)>>,
}

impl Registry {
    fn enter(self: &Arc<Self>, peer: PeerIdentity, handle: OwnedFd) -> Entry {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(number, (peer, handle));
        metrics().link_connections.inc();
        Entry { registry: self.clone(), number }
    }

    /// Closes every connection whose peer `matches`, under the feet of whoever uses it; returns how many.
    pub fn close(&self, matches: impl Fn(&PeerIdentity) -> bool) -> usize {
        let open = self.open.lock();
        let found = open.values().filter(|(peer, _)| matches(peer));
        found.map(|(_, handle)| shutdown(handle, Shutdown::Both)).filter(Result::is_ok).count()
    }
}

/// A place in the registry, left when dropped.
#[derive(Debug)]
struct Entry {
    registry: Arc<Registry>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.registry.open.lock().remove(&self.number);
        metrics().link_connections.dec();
    }
}

/// Bytes both ways with a known peer, over a TLS connection of its own. Closed by dropping it; a shutdown of the
/// writing side is seen by the peer as the end of the stream.
#[derive(Debug)]
pub struct PeerStream {
    io: TlsStream<Socket>,
    peer: PeerIdentity,
    traffic: Arc<Traffic>,
    _entry: Entry,
}

impl PeerStream {
    pub(super) fn new(
        mut io: TlsStream<Socket>,
        peer: PeerIdentity,
        registry: &Arc<Registry>,
    ) -> Result<Self> {
        // More than rustls' 64 KiB at once saves system calls on the data path.
        match &mut io {
            TlsStream::Client(tls) => tls.get_mut().1.set_buffer_limit(Some(BUFFER_LIMIT_BYTES)),
            TlsStream::Server(tls) => tls.get_mut().1.set_buffer_limit(Some(BUFFER_LIMIT_BYTES)),
        }
        let socket = io.get_ref().0;
        let traffic = socket.traffic.clone();
        let entry = registry.enter(peer.clone(), socket.handle()?);
        Ok(Self { io, peer, traffic, _entry: entry })
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Bytes sent on the wire, TLS and all.
    pub fn sent_bytes(&self) -> u64 {
        self.traffic.sent.load(Ordering::Relaxed)
    }

    /// Bytes received from the wire, TLS and all.
    pub fn received_bytes(&self) -> u64 {
        self.traffic.received.load(Ordering::Relaxed)
    }

    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }
}

const BUFFER_LIMIT_BYTES: usize = 256 << 10;

impl AsyncRead for PeerStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
