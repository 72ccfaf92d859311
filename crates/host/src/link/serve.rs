//! The listening side: handshakes, refusals, and running what was called.
//!
//! ```text
//!  TCP ─► ClientHello ─► ALPN whimbrel-join ─► one call, no certificate
//!                    └─► certificate ─► name, role, revoked? ─► http/1.1 ─► handed over
//!                                                           └─► whimbrel ─► Hello ─► calls | stream
//! ```
//!
//! Invariants: a peer without a good certificate is told nothing; handshakes are bounded in number and time.

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsStream};
use whimbrel_wire::peer::cluster::JoinRequest;
use whimbrel_wire::peer::{
    ALPN_HTTP, ALPN_JOIN, ALPN_PEER, CallHead, FrameKind, Hello, OUTSTANDING_MAX, Open, ProtocolVersion,
    Welcome,
};

use super::credentials::PeerIdentity;
use super::frame::{Frame, read_frame, to_json, write_frame};
use super::router::Router;
use super::stream::{PeerStream, Socket, Traffic};
use super::write::write_frames;
use super::{Links, program, tls};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::metrics;

/// Handshakes at once; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// Joins at once.
const JOINS_MAX: usize = 8;

/// A host's open port. Dropping it closes the port and every connection that came in through it.
#[derive(Debug)]
pub struct Listening {
    address: SocketAddr,
    task: AbortHandle,
}

impl Listening {
    /// The address it listens on, with the port the kernel chose if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Server {
    links: Links,
    router: Router,
    tls: Arc<ServerConfig>,
    join_tls: Arc<ServerConfig>,
    joins: Semaphore,
}

pub(super) async fn listen(links: &Links, address: SocketAddr, router: Router) -> Result<Listening> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr().context("ask for the listening address")?;
    let credentials = links.credentials();
    let server = Arc::new(Server {
        tls: tls::server(credentials)?,
        join_tls: tls::join_server(credentials)?,
        links: links.clone(),
        router,
        joins: Semaphore::new(JOINS_MAX),
    });
    let task = tokio::spawn(accept(listener, server)).abort_handle();
    Ok(Listening { address, task })
}

async fn accept(listener: TcpListener, server: Arc<Server>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut running = JoinSet::new();
    loop {
        while running.try_join_next().is_some() {}
        let Ok(place) = handshakes.clone().acquire_owned().await else { return };
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, for example: others end, and then it goes on.
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if running.len() >= server.links.options().connections_max {
            metrics().link_refused.inc();
            continue;
        }
        let server = server.clone();
        running.spawn(async move {
            let limit = Duration::from_millis(server.links.options().handshake_ms);
            let admitted = match timeout(limit, server.admit(tcp)).await {
                Ok(admitted) => admitted,
                Err(_) => Err(Error::new(ErrorKind::TimedOut, "shake hands")),
            };
            drop(place);
            let served = match admitted {
                Ok(admitted) => server.serve(admitted, from).await,
                Err(error) => {
                    metrics().link_refused.inc();
                    Err(error)
                }
            };
            if let Err(error) = served {
                tracing::debug!(%from, %error, "connection ended");
            }
        });
    }
}

/// Keeps a connection whose handshake failed for a moment: closed at once, with bytes of the peer still unread, it
/// would be reset, and the peer would not learn why.
fn linger((error, mut socket): (std::io::Error, Socket)) -> Error {
    tokio::spawn(async move {
        let mut rest = [0; 1024];
        let drain = async {
            // An error ends the wait as well as the peer's end.
            let _ = socket.shutdown().await;
            for _ in 0..64 {
                if !matches!(socket.read(&mut rest).await, Ok(1..)) {
                    return;
                }
            }
        };
        // The wait is over in any case.
        let _ = timeout(Duration::from_millis(500), drain).await;
    });
    Error::with_source(ErrorKind::Denied, "shake hands", error)
}

enum Admitted {
    Joining(Box<TlsStream<Socket>>),
    Http(Box<PeerStream>),
    Peer(Box<PeerStream>),
}

impl Server {
    /// The TLS handshake, and who came.
    async fn admit(&self, tcp: TcpStream) -> Result<Admitted> {
        let socket = Socket::new(tcp, self.links.options().give_up_ms)?;
        let start = LazyConfigAcceptor::new(Acceptor::default(), socket).await.context("shake hands")?;
        let offers = |wanted: &[u8]| {
            start.client_hello().alpn().is_some_and(|mut offered| offered.any(|name| name == wanted))
        };
        if offers(ALPN_JOIN) && self.router.find_join().is_some() {
            let tls = start.into_stream(self.join_tls.clone()).into_fallible().await.map_err(linger)?;
            return Ok(Admitted::Joining(Box::new(tls.into())));
        }
        let tls = start.into_stream(self.tls.clone()).into_fallible().await.map_err(linger)?;
        let tls = TlsStream::from(tls);
        let alpn = tls.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        let stream = Box::new(self.links.admit(tls)?);
        match alpn.as_deref() {
            Some(ALPN_PEER) => Ok(Admitted::Peer(stream)),
            Some(ALPN_HTTP) => Ok(Admitted::Http(stream)),
            _ => Err(Error::new(ErrorKind::Unsupported, "shake hands: no common application protocol")),
        }
    }

    async fn serve(&self, admitted: Admitted, from: SocketAddr) -> Result<()> {
        let limit = Duration::from_millis(self.links.options().handshake_ms);
        match admitted {
            Admitted::Joining(tls) => {
                let _place = self.joins.try_acquire().map_err(|_| busy("too many join at once"))?;
                match timeout(4 * limit, self.serve_join(*tls, from)).await {
                    Ok(served) => served,
                    Err(_) => Err(Error::new(ErrorKind::TimedOut, "let a host join")),
                }
            }
            Admitted::Http(stream) => match self.router.find_http() {
                Some(handler) => {
                    handler(*stream).await;
                    Ok(())
                }
                None => Err(Error::new(ErrorKind::Unsupported, "serve the remote API: it is off")),
            },
            Admitted::Peer(mut stream) => {
                let hello = timeout(limit, read_hello(&mut *stream));
                let hello =
                    hello.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::TimedOut, "wait for a hello")));
                match hello {
                    Ok(Hello { open: Some(open), .. }) => self.serve_stream(*stream, open).await,
                    Ok(_) => self.serve_calls(*stream).await,
                    Err(error) => refuse(&mut *stream, 0, error).await,
                }
            }
        }
    }

    async fn serve_join(&self, mut tls: TlsStream<Socket>, from: SocketAddr) -> Result<()> {
        if let Err(error) = read_hello(&mut tls).await {
            return refuse(&mut tls, 0, error).await;
        }
        write_frame(&mut tls, &welcome()?).await?;
        let Some(frame) = read_frame(&mut tls).await? else { return Ok(()) };
        let Some(handler) = self.router.find_join() else { return Ok(()) };
        let answer = async {
            let request: JoinRequest = frame.parse("a request to join")?;
            handler(from, request, frame.payload.clone()).await
        };
        match answer.await {
            Ok(answer) => {
                let json = to_json(&answer, "the answer to a join")?;
                let frame = Frame::new(FrameKind::Answer, frame.request, json, Bytes::new())?;
                write_frame(&mut tls, &frame).await?;
                tls.shutdown().await.context("close a connection")
            }
            Err(error) => {
                tracing::warn!(%from, %error, "refuse to let join");
                refuse(&mut tls, frame.request, error).await
            }
        }
    }

    async fn serve_stream(&self, stream: PeerStream, open: Open) -> Result<()> {
        let peer = stream.peer().clone();
        let slot = Arc::new(Mutex::new(Some(stream)));
        let run = async {
            let handler = self.router.find_stream(&peer, &open.service)?;
            handler(peer.clone(), open.params, StreamOffer { slot: slot.clone() }).await
        };
        let Err(error) = run.await else { return Ok(()) };
        let unaccepted = slot.lock().take();
        match unaccepted {
            Some(mut stream) => refuse(&mut stream, 0, error).await,
            None => {
                tracing::warn!(%peer, service = open.service, %error, "stream failed");
                Ok(())
            }
        }
    }

    async fn serve_calls(&self, mut stream: PeerStream) -> Result<()> {
        write_frame(&mut stream, &welcome()?).await?;
        let peer = stream.peer().clone();
        let traffic = stream.traffic().clone();
        let (reader, writer) = tokio::io::split(stream);
        let (urgent, urgent_queue) = mpsc::channel(4);
        let (answers, answer_queue) = mpsc::channel(64);
        let silence_ms = 4 * self.links.options().dead_ms;
        tokio::select! {
            read = self.read_calls(reader, &peer, &urgent, answers) => read,
            sent = write_frames(writer, urgent_queue, answer_queue, |_| true) => sent,
            () = until_silent(&traffic, silence_ms) => {
                Err(Error::new(ErrorKind::TimedOut, format!("wait for {peer}: silent for {silence_ms} ms")))
            }
        }
    }

    async fn read_calls(
        &self,
        mut reader: impl AsyncRead + Unpin,
        peer: &PeerIdentity,
        urgent: &mpsc::Sender<Frame>,
        answers: mpsc::Sender<Frame>,
    ) -> Result<()> {
        let slots = Arc::new(Semaphore::new(OUTSTANDING_MAX));
        while let Some(frame) = read_frame(&mut reader).await? {
            match frame.kind {
                FrameKind::Ping => {
                    // A full queue has pongs in it already.
                    let _ = urgent.try_send(Frame::bare(FrameKind::Pong, 0));
                }
                FrameKind::Call => match slots.clone().try_acquire_owned() {
                    Err(_) => {
                        // Only a peer that breaks the rules gets here; it may wait.
                        let failed = Frame::failed(frame.request, &busy("too many calls at once"));
                        let _ = answers.send(failed).await;
                    }
                    Ok(slot) => {
                        let answer = answer_call(self.router.clone(), peer.clone(), frame);
                        let answers = answers.clone();
                        tokio::spawn(async move {
                            // The caller may have gone; then nobody wants the answer.
                            let _ = answers.send(answer.await).await;
                            drop(slot);
                        });
                    }
                },
                kind => {
                    return Err(Error::new(ErrorKind::InvalidInput, format!("read a call: got {kind:?}")));
                }
            }
        }
        Ok(())
    }
}

/// Runs one call; its answer, whatever happens.
async fn answer_call(router: Router, peer: PeerIdentity, frame: Frame) -> Frame {
    let request = frame.request;
    let run = async {
        let head: CallHead = frame.parse("a call")?;
        let handler = router.find_call(&peer, &head.method)?;
        let handled = AssertUnwindSafe(handler(peer.clone(), head.params, frame.payload));
        let (json, payload) = handled.catch_unwind().await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Internal, format!("answer {}: the program failed", head.method)))
        })?;
        Frame::new(FrameKind::Answer, request, json, payload)
    };
    run.await.unwrap_or_else(|error| Frame::failed(request, &error))
}

async fn until_silent(traffic: &Traffic, silence_ms: u64) {
    while traffic.silent_ms() < silence_ms {
        tokio::time::sleep(Duration::from_millis(silence_ms / 4)).await;
    }
}

fn busy(what: &str) -> Error {
    Error::new(ErrorKind::Unavailable, format!("answer a call: {what}"))
}

async fn read_hello(io: &mut (impl AsyncRead + Unpin)) -> Result<Hello> {
    let nothing = || Error::new(ErrorKind::Unavailable, "read a hello: the connection ended");
    let frame = read_frame(io).await?.ok_or_else(nothing)?;
    if frame.kind != FrameKind::Hello {
        return Err(Error::new(ErrorKind::InvalidInput, format!("read a hello: got {:?}", frame.kind)));
    }
    let hello: Hello = frame.parse("a hello")?;
    ProtocolVersion::agree(&hello.versions)?;
    Ok(hello)
}

fn welcome() -> Result<Frame> {
    let [newest, ..] = ProtocolVersion::SPOKEN;
    let welcome = Welcome { version: newest as u16, program: program() };
    Frame::new(FrameKind::Welcome, 0, to_json(&welcome, "a welcome")?, Bytes::new())
}

/// Tells the peer what is wrong and closes; returns the error for the log.
async fn refuse(io: &mut (impl tokio::io::AsyncWrite + Unpin), request: u32, error: Error) -> Result<()> {
    let limit = Duration::from_secs(2);
    let tell = async {
        write_frame(io, &Frame::failed(request, &error)).await?;
        io.shutdown().await.context("close a connection")
    };
    // The peer may be gone; it was refused all the same.
    let _ = timeout(limit, tell).await;
    Err(error)
}

/// A stream that a peer wants; see [`Router::stream`].
pub struct StreamOffer {
    slot: Arc<Mutex<Option<PeerStream>>>,
}

impl StreamOffer {
    /// Lets the peer begin.
    pub async fn accept(self) -> Result<PeerStream> {
        let stream = self.slot.lock().take();
        let mut stream = stream.ok_or_else(|| Error::new(ErrorKind::Internal, "accept a stream twice"))?;
        write_frame(&mut stream, &welcome()?).await.context("accept a stream")?;
        Ok(stream)
    }
}
