//! For tests: a TCP forwarder that loses what passes, in one direction, without closing anything.

use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What the forwarder does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Forwards.
    Pass,
    /// Loses what the server says.
    LoseAnswers,
    /// Loses what the client says.
    LoseRequests,
}

/// Stops when dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    task: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards to `to` from an address of its own.
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, told) = watch::channel(Mode::Pass);
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while open.try_join_next().is_some() {}
                open.spawn(forward(client, to, told.clone()));
            }
        });
        Self { address, mode, task: Some(task) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send(mode).unwrap();
    }

    /// Closes everything.
    pub async fn stop(mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        let _ = task.await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn forward(client: TcpStream, to: SocketAddr, mode: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    tokio::select! {
        () = pass(server_in, client_out, mode.clone(), Mode::LoseAnswers) => {}
        () = pass(client_in, server_out, mode, Mode::LoseRequests) => {}
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mode: watch::Receiver<Mode>,
    losing: Mode,
) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let got = from.read(&mut bytes).await.unwrap_or(0);
        if got == 0 {
            return;
        }
        let lose = *mode.borrow() == losing;
        if !lose && to.write_all(&bytes[..got]).await.is_err() {
            return;
        }
    }
}
