//! The control channel of an attempt: JSON lines both ways, opened by the source, opened again when it breaks.
//!
//! ```text
//!   source ──(stream migrate.control)──► target        Control<ToTarget> │ Control<ToSource>, one per line
//!       └──◄ lost ► wait ► open again                  what matters is repeated by the machines
//! ```
//!
//! Invariants: messages are sent in order or not at all; of those that cannot be sent now the last is kept until there
//! is a connection, the others are dropped, since the machines repeat what matters, though not soon; lines are bounded.
//! A line that cannot be read ends the connection, not the move.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc;
use whimbrel_wire::peer::migrate::Control;
use whimbrel_wire::{AttemptId, HostId};

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::link::{Links, PeerStream};

/// The stream's service.
pub const SERVICE: &str = "migrate.control";
/// The longest line, bytes: an offer with its VM's arguments.
const LINE_MAX_BYTES: u64 = 1 << 20;
/// Messages that wait to be written; more are dropped.
const OUT_MAX: usize = 64;
/// Messages that wait to be taken; the peer waits then.
pub const IN_MAX: usize = 64;
/// Pause before the source dials again.
const REDIAL: Duration = Duration::from_millis(300);
/// Limit for dialling.
const DIAL_LIMIT: Duration = Duration::from_secs(3);

/// The sending end.
#[derive(Clone, Default)]
pub struct Sender {
    out: Arc<Mutex<Out>>,
}

#[derive(Default)]
struct Out {
    connection: Option<mpsc::Sender<Vec<u8>>>,
    /// Said while there was no connection.
    kept: Option<Vec<u8>>,
}

impl Sender {
    /// Sends a message of `attempt`, if there is room; without a connection it is what the next one begins with.
    pub fn send<M: Serialize>(&self, attempt: AttemptId, message: M) {
        let Ok(mut line) = serde_json::to_vec(&Control { attempt, message }) else { return };
        line.push(b'\n');
        let out = &mut *self.out.lock();
        match &out.connection {
            Some(connection) => drop(connection.try_send(line)),
            None => out.kept = Some(line),
        }
    }

    fn attach(&self) -> mpsc::Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel(OUT_MAX);
        let mut out = self.out.lock();
        if let Some(line) = out.kept.take() {
            let _ = sender.try_send(line);
        }
        out.connection = Some(sender);
        receiver
    }

    fn detach(&self) {
        self.out.lock().connection = None;
    }
}

/// Source: keeps a connection to `target` until it is aborted, or nobody takes from `inbox` any more.
pub async fn keep<M: DeserializeOwned>(
    links: Links,
    target: HostId,
    attempt: AttemptId,
    sender: Sender,
    inbox: mpsc::Sender<Control<M>>,
) {
    while !inbox.is_closed() {
        match links.stream(&target, SERVICE, &attempt, DIAL_LIMIT).await {
            Ok(stream) => {
                if let Err(error) = serve(stream, &sender, inbox.clone()).await {
                    tracing::info!(%target, %attempt, %error, "control connection of a move lost");
                }
            }
            Err(error) => tracing::debug!(%target, %attempt, %error, "control connection of a move not made"),
        }
        tokio::time::sleep(REDIAL).await;
    }
}

/// Runs one connection: writes what `sender` is given, puts what comes into `inbox` until nobody takes from it.
pub async fn serve<M: DeserializeOwned>(
    stream: PeerStream,
    sender: &Sender,
    inbox: mpsc::Sender<Control<M>>,
) -> Result<()> {
    let mut out = sender.attach();
    let (reader, mut writer) = tokio::io::split(stream);
    let write = async {
        while let Some(line) = out.recv().await {
            writer.write_all(&line).await.context("send control message")?;
            writer.flush().await.context("send control message")?;
        }
        // Another connection has taken this one's place.
        Ok(())
    };
    let read = async {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            let count = (&mut reader).take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await;
            let count = count.context("receive control message")?;
            if count == 0 || line.last() != Some(&b'\n') {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "receive control message: the connection ended",
                ));
            }
            let message = serde_json::from_slice(&line).map_err(|error| {
                Error::with_source(ErrorKind::InvalidInput, "read control message", error)
            })?;
            if inbox.send(message).await.is_err() {
                return Ok(());
            }
        }
    };
    let result = tokio::select! {
        result = write => result,
        result = read => result,
    };
    if result.is_err() {
        sender.detach();
    }
    result
}
