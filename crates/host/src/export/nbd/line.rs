//! One connection's bytes: a socket, and TLS over it once that was agreed on.
//!
//! Invariant: a `Line` has one owner, the connection's thread; nobody else reads or writes the socket.
//!
//! Not here: who is let in (`link::ExportTls`).

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustls::ServerConnection;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{ExportTls, PeerIdentity};

/// What came of a look at the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
}

/// The socket under TLS, as `rustls` wants it.
struct Raw<'a> {
    socket: &'a OwnedFd,
    now: bool,
}

impl Raw<'_> {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let flags = if self.now { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        loop {
            match recv(self.socket, &mut *into, flags) {
                Err(Errno::INTR) => {}
                other => return Ok(other.map(|(_, length)| length)?),
            }
        }
    }
}

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.receive(into)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send(self.socket, bytes, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                // The limit of `Line::limit_sending` is over.
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends a connection, whoever reads or writes it.
pub(super) fn shut(socket: &OwnedFd) {
    // One that is closed already is what we want.
    let _ = shutdown(socket, Shutdown::Both);
}

/// See the module's charter.
pub(super) struct Line {
    socket: Arc<OwnedFd>,
    tls: Option<Box<ServerConnection>>,
    /// Who the client is, where TLS tells.
    peer: Option<(ExportTls, PeerIdentity)>,
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Line {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, tls: None, peer: None }
    }

    /// How long a receive may wait; for ever if not said.
    pub(super) fn limit_receiving(&self, limit: Option<Duration>) -> Result<()> {
        // The kernel takes zero for "for ever".
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        set_socket_timeout(&self.socket, Timeout::Recv, limit).context("set up a connection")
    }

    /// How long a send may wait for a client that does not read.
    pub(super) fn limit_sending(&self, limit: Duration) -> Result<()> {
        set_socket_timeout(&self.socket, Timeout::Send, Some(limit)).context("set up a connection")
    }

    /// Receives what there is, into `into`; waits for something unless `now`.
    pub(super) fn receive(&mut self, into: &mut [u8], now: bool) -> Result<Received> {
        self.try_receive(into, now).context("read from an NBD client")
    }

    fn try_receive(&mut self, into: &mut [u8], now: bool) -> io::Result<Received> {
        let mut raw = Raw { socket: &self.socket, now };
        let would_wait = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock if now => Ok(Received::Nothing),
            io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            _ => Err(error),
        };
        let Some(tls) = &mut self.tls else {
            return match raw.receive(into) {
                Ok(0) => Ok(Received::End),
                Ok(length) => Ok(Received::Bytes(length)),
                Err(error) => would_wait(error),
            };
        };
        loop {
            match tls.reader().read(into) {
                Ok(0) => return Ok(Received::End),
                Ok(length) => return Ok(Received::Bytes(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a farewell: gone all the same.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Received::End),
                Err(error) => return Err(error),
            }
            if let Err(error) = tls.read_tls(&mut raw) {
                return would_wait(error);
            }
            let state = tls.process_new_packets();
            while tls.wants_write() {
                tls.write_tls(&mut raw)?;
            }
            state.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// Fills `into`, by `deadline`; `false` if the client is gone before its first byte.
    pub(super) fn receive_exactly(&mut self, mut into: &mut [u8], deadline: Instant) -> Result<bool> {
        let mut first = true;
        while !into.is_empty() {
            self.limit_receiving(Some(left(deadline)?))?;
            match self.receive(into, false)? {
                Received::Bytes(length) => {
                    let rest = std::mem::take(&mut into);
                    into = rest.get_mut(length..).unwrap_or_default();
                }
                Received::End if first => return Ok(false),
                Received::End | Received::Nothing => {
                    return Err(Error::new(
                        ErrorKind::Unavailable,
                        "read from an NBD client: it is gone in mid-sentence",
                    ));
                }
            }
            first = false;
        }
        Ok(true)
    }

    /// Sends all of `bytes`.
    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.try_send(bytes).context("send to an NBD client")
    }

    fn try_send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut raw = Raw { socket: &self.socket, now: false };
        let Some(tls) = &mut self.tls else { return raw.write_all(bytes) };
        while !bytes.is_empty() {
            // Takes as much as it has room for.
            let taken = tls.writer().write(bytes)?;
            bytes = bytes.get(taken..).unwrap_or_default();
            while tls.wants_write() {
                tls.write_tls(&mut raw)?;
            }
        }
        Ok(())
    }

    /// Goes on with TLS, by `deadline`: nothing was read beyond what was asked for, so nothing that came in plain is
    /// taken for encrypted.
    pub(super) fn encrypt(&mut self, by: &ExportTls, deadline: Instant) -> Result<()> {
        let bad = |error| Error::with_source(ErrorKind::Denied, "shake hands with an NBD client", error);
        let mut tls = Box::new(ServerConnection::new(by.config().clone()).map_err(bad)?);
        let mut raw = Raw { socket: &self.socket, now: false };
        let what = "shake hands with an NBD client";
        while tls.is_handshaking() || tls.wants_write() {
            if tls.wants_write() {
                tls.write_tls(&mut raw).context(what)?;
                continue;
            }
            self.limit_receiving(Some(left(deadline)?))?;
            if tls.read_tls(&mut raw).context(what)? == 0 {
                return Err(Error::new(ErrorKind::Unavailable, "shake hands with an NBD client: it is gone"));
            }
            if let Err(error) = tls.process_new_packets() {
                // Tells the client why, if it still listens.
                let _ = tls.write_tls(&mut raw);
                return Err(bad(error));
            }
        }
        self.peer = Some((by.clone(), by.check(tls.peer_certificates())?));
        self.tls = Some(tls);
        Ok(())
    }

    /// Fails if the client was removed from the cluster since it was let in.
    pub(super) fn check_still_admitted(&self) -> Result<()> {
        self.peer.as_ref().map_or(Ok(()), |(by, peer)| by.check_still(peer))
    }

    /// Says farewell where there is a way to, and ends the connection.
    pub(super) fn close(mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            // The client may be gone already.
            let _ = tls.write_tls(&mut Raw { socket: &self.socket, now: false });
        }
        shut(&self.socket);
    }
}

fn left(deadline: Instant) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::new(ErrorKind::TimedOut, "shake hands with an NBD client: it takes too long"));
    }
    Ok(left)
}
