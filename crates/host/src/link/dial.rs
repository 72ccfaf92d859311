//! Connecting to a host: one attempt at a time per lane, backing off after failures.

use bytes::Bytes;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::{TlsConnector, TlsStream};
use whimbrel_wire::peer::cluster::{JoinAnswer, JoinRequest};
use whimbrel_wire::peer::{ALPN_HTTP, FrameKind, Hello, Open, ProtocolVersion, Welcome};
use whimbrel_wire::{HostId, Role, Time};

use super::conn::Conn;
use super::frame::{Frame, io_error, read_frame, to_json, write_frame};
use super::stream::{PeerStream, Socket};
use super::{LinkOptions, Links, Peer, program, tls};
use crate::clock;
use crate::error::{Context, Error, ErrorKind, Result};

const BACKOFF_FIRST_MS: u64 = 50;
const BACKOFF_LAST_MS: u64 = 1_000;

/// How the last attempts went.
#[derive(Default)]
struct Backoff {
    failures: u32,
    next: Time,
    why: Option<(ErrorKind, String)>,
}

/// A place for one kept connection.
#[derive(Default)]
pub(super) struct Lane {
    current: Mutex<Option<Arc<Conn>>>,
    dialing: tokio::sync::Mutex<Backoff>,
}

impl Lane {
    fn open(&self) -> Option<Arc<Conn>> {
        self.current.lock().as_ref().filter(|conn| conn.is_open()).cloned()
    }

    /// The lane's connection, made if there is none. While it backs off it fails at once, with the last reason.
    pub async fn conn(
        &self,
        links: &Links,
        host: &HostId,
        peer: &Peer,
        deadline: Instant,
    ) -> Result<Arc<Conn>> {
        if let Some(conn) = self.open() {
            return Ok(conn);
        }
        let late = || Error::new(ErrorKind::TimedOut, format!("connect to host {host}: no time left"));
        let mut backoff = timeout_at(deadline, self.dialing.lock()).await.map_err(|_| late())?;
        if let Some(conn) = self.open() {
            return Ok(conn);
        }
        if let Some((kind, why)) = &backoff.why
            && clock::now() < backoff.next
        {
            return Err(Error::new(*kind, why.clone()));
        }
        let dialled = timeout_at(deadline, dial(links, host, None)).await.unwrap_or_else(|_| Err(late()));
        match dialled {
            Ok(stream) => {
                *backoff = Backoff::default();
                let conn = Arc::new(Conn::start(stream, links.options(), peer.keepers.clone()));
                *self.current.lock() = Some(conn.clone());
                Ok(conn)
            }
            Err(error) => {
                let wait_ms = BACKOFF_FIRST_MS << backoff.failures.min(8);
                backoff.failures += 1;
                backoff.next = clock::now().plus_ms(wait_ms.min(BACKOFF_LAST_MS));
                backoff.why = Some((error.kind(), error.to_string()));
                Err(error)
            }
        }
    }
}

/// Connects to `host` at the first of its addresses that answers, and says hello.
pub(super) async fn dial(links: &Links, host: &HostId, open: Option<Open>) -> Result<PeerStream> {
    let addresses = links.addresses(host);
    let mut failed =
        Error::new(ErrorKind::NotFound, format!("connect to host {host}: its address is not known"));
    let hello = hello(open)?;
    for address in addresses {
        match dial_at(links, host, address, &hello).await {
            Ok(stream) => return Ok(stream),
            // The peer answered and refused: its other addresses would say the same.
            Err(Attempt { error, answered: true }) => return Err(error),
            Err(Attempt { error, answered: false }) => failed = error,
        }
    }
    Err(failed)
}

struct Attempt {
    error: Error,
    answered: bool,
}

async fn dial_at(
    links: &Links,
    host: &HostId,
    address: SocketAddr,
    hello: &Frame,
) -> Result<PeerStream, Attempt> {
    let what = format!("connect to host {host} at {address}");
    let silent = |error: Error| Attempt { error, answered: false };
    let tls = connect(address, links.0.client_tls.clone(), links.options())
        .await
        .with_context(|| what.clone())
        .map_err(silent)?;
    let mut stream = links.admit(tls).with_context(|| what.clone()).map_err(silent)?;
    let peer = stream.peer();
    if peer.host != *host || peer.role != Role::Host {
        let error = Error::new(ErrorKind::Denied, format!("{what}: {peer} answered there"));
        return Err(silent(error.hint("the address book is out of date")));
    }
    let limit = Duration::from_millis(links.options().handshake_ms);
    match timeout(limit, say_hello(&mut stream, hello)).await {
        Ok(Ok(())) => Ok(stream),
        Ok(Err(error)) => Err(Attempt { error: error_in(error, &what), answered: true }),
        Err(_) => Err(silent(Error::new(ErrorKind::TimedOut, format!("{what}: no answer to hello")))),
    }
}

fn error_in(error: Error, what: &str) -> Error {
    let failed: Result<()> = Err(error);
    failed.context(what).err().unwrap_or_else(|| Error::new(ErrorKind::Internal, what))
}

async fn connect(
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
    options: &LinkOptions,
) -> Result<TlsStream<Socket>> {
    let limit = Duration::from_millis(options.connect_ms);
    let silent = |_| Error::new(ErrorKind::Unavailable, "open a TCP connection: no answer");
    let tcp = timeout(limit, TcpStream::connect(address)).await.map_err(silent)?;
    let socket = Socket::new(tcp.context("open a TCP connection")?, options.give_up_ms)?;
    let limit = Duration::from_millis(options.handshake_ms);
    let silent = |_| Error::new(ErrorKind::Unavailable, "shake hands: no answer");
    // Certificates of the cluster name hosts by URI: the address serves as a name that nobody compares.
    let handshake = TlsConnector::from(config).connect(ServerName::from(address.ip()), socket);
    let tls = timeout(limit, handshake).await.map_err(silent)?;
    Ok(tls.map_err(io_error).context("shake hands")?.into())
}

fn hello(open: Option<Open>) -> Result<Frame> {
    let hello = Hello { versions: ProtocolVersion::spoken_numbers(), program: program(), open };
    Frame::new(FrameKind::Hello, 0, to_json(&hello, "a hello")?, Bytes::new())
}

async fn say_hello(io: &mut (impl AsyncRead + AsyncWrite + Unpin), hello: &Frame) -> Result<()> {
    write_frame(io, hello).await?;
    let ended = || {
        Error::new(ErrorKind::Unavailable, "wait for a welcome: the peer closed the connection")
            .hint("it may have refused this host's certificate")
    };
    let answer = read_frame(io).await?.ok_or_else(ended)?;
    match answer.kind {
        FrameKind::Welcome => {
            let welcome: Welcome = answer.parse("a welcome")?;
            ProtocolVersion::agree(&[welcome.version])?;
            Ok(())
        }
        FrameKind::Failed => Err(answer.error()),
        kind => Err(Error::new(ErrorKind::InvalidInput, format!("wait for a welcome: got {kind:?}"))),
    }
}

/// Connects to the remote API of the member at `address`: HTTP/1.1 is spoken over the result.
pub async fn connect_api(links: &Links, address: SocketAddr) -> Result<PeerStream> {
    let what = || format!("connect to the API at {address}");
    let config = tls::client(links.credentials(), ALPN_HTTP)?;
    let stream = connect(address, config, links.options()).await.and_then(|tls| links.admit(tls));
    let stream = stream.with_context(what)?;
    if stream.peer().role != Role::Host {
        return Err(Error::new(ErrorKind::Denied, format!("{}: {} answered there", what(), stream.peer())));
    }
    Ok(stream)
}

/// Asks the host at `address`, which must show a certificate of the authority with this fingerprint, for a
/// certificate. `csr_der` is the certificate request.
pub async fn join(
    address: SocketAddr,
    authority: [u8; 32],
    request: &JoinRequest,
    csr_der: Vec<u8>,
    options: &LinkOptions,
) -> Result<JoinAnswer> {
    let what = || format!("join the cluster through {address}");
    let exchange = async {
        let mut tls = connect(address, tls::join_client(authority)?, options).await?;
        say_hello(&mut tls, &hello(None)?).await?;
        let json = to_json(request, "a request to join")?;
        write_frame(&mut tls, &Frame::new(FrameKind::Call, 1, json, csr_der.into())?).await?;
        let ended = || Error::new(ErrorKind::Unknown, "wait for the certificate: the connection ended");
        let answer = read_frame(&mut tls).await?.ok_or_else(ended)?;
        match answer.kind {
            FrameKind::Answer => answer.parse("the answer to a join"),
            FrameKind::Failed => Err(answer.error()),
            kind => {
                Err(Error::new(ErrorKind::InvalidInput, format!("wait for the certificate: got {kind:?}")))
            }
        }
    };
    match timeout(Duration::from_secs(30), exchange).await {
        Ok(answer) => answer.with_context(what),
        Err(_) => Err(Error::new(ErrorKind::TimedOut, what())),
    }
}
