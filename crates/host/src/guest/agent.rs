//! The agent inside a guest (qemu-guest-agent): its file systems are frozen while a snapshot is made.
//!
//! ```text
//!   guest-sync-delimited ── answers? ─► guest-fsfreeze-freeze ─► (snapshot) ─► guest-fsfreeze-thaw
//!                         └ nothing within a second: the guest has none; the snapshot is crash-consistent
//! ```
//!
//! The guest's end is a virtio-serial port named `org.qemu.guest_agent.0`, ours the socket `qga.sock` in the VM's
//! runtime directory; protocol: JSON lines, as QEMU's documentation of the guest agent says (QGA protocol reference).
//!
//! Invariants: whatever was frozen is thawed; a guest that answers nonsense, or nothing, delays a snapshot by a bounded
//! time and fails nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Context as _, Error, ErrorKind, Result};

/// Name of the socket in a VM's runtime directory.
pub const SOCKET: &str = "qga.sock";
/// How long the guest's agent has to say that it is there.
const SYNC_LIMIT: Duration = Duration::from_secs(1);
/// How long file systems have to freeze or thaw.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// The longest answer.
const LINE_MAX_BYTES: u64 = 64 << 10;

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct GuestAgent {
    path: PathBuf,
}

/// File systems are frozen.
#[derive(Debug)]
pub struct Frozen(BufReader<UnixStream>);

impl GuestAgent {
    /// The agent of a VM with that runtime directory, if it was started with a socket for one.
    pub fn of(run_dir: &Path) -> Option<Self> {
        let path = run_dir.join(SOCKET);
        path.exists().then_some(Self { path })
    }

    /// Freezes the guest's file systems; none if it has no agent, or the agent cannot.
    pub async fn freeze(&self) -> Option<Frozen> {
        match self.try_freeze().await {
            Ok(frozen) => Some(frozen),
            Err(error) => {
                tracing::info!(socket = %self.path.display(), %error, "the guest's file systems are not frozen");
                None
            }
        }
    }

    async fn try_freeze(&self) -> Result<Frozen> {
        let what = || format!("talk to the guest agent at {}", self.path.display());
        let stream = timeout(SYNC_LIMIT, UnixStream::connect(&self.path)).await;
        let stream = stream.map_err(|error| Error::with_source(ErrorKind::TimedOut, what(), error))?;
        let mut stream = BufReader::new(stream.with_context(what)?);
        let id = uuid::Uuid::new_v4().as_u64_pair().0 >> 12;
        timeout(SYNC_LIMIT, sync(&mut stream, id))
            .await
            .map_err(|error| Error::with_source(ErrorKind::TimedOut, what(), error))?
            .with_context(what)?;
        match timeout(FREEZE_LIMIT, call(&mut stream, "guest-fsfreeze-freeze")).await {
            Ok(Ok(_)) => Ok(Frozen(stream)),
            Ok(Err(error)) => {
                // Some file systems may be frozen, some not.
                self.thaw(Frozen(stream)).await;
                Err(error)
            }
            Err(error) => {
                self.thaw(Frozen(stream)).await;
                Err(Error::with_source(ErrorKind::TimedOut, "freeze the guest's file systems", error))
            }
        }
    }

    /// Thaws them again.
    pub async fn thaw(&self, mut frozen: Frozen) {
        match timeout(FREEZE_LIMIT, call(&mut frozen.0, "guest-fsfreeze-thaw")).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::error!(socket = %self.path.display(), %error, "the guest's file systems were not thawed");
            }
            Err(_) => {
                tracing::error!(socket = %self.path.display(), "the guest does not say that its file systems are thawed");
            }
        }
    }
}

/// Finds the beginning of the answers that are ours: what an earlier caller did not read is skipped.
async fn sync(stream: &mut BufReader<UnixStream>, id: u64) -> Result<()> {
    let ask = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    // The first byte ends whatever half a command somebody left in the guest's parser.
    let bytes = [b"\xff", ask.to_string().as_bytes(), b"\n"].concat();
    stream.get_mut().write_all(&bytes).await.context("ask the guest agent")?;
    loop {
        let mut skipped = Vec::new();
        (&mut *stream)
            .take(LINE_MAX_BYTES)
            .read_until(0xff, &mut skipped)
            .await
            .context("hear the guest agent")?;
        if skipped.is_empty() {
            return Err(Error::new(ErrorKind::Unavailable, "hear the guest agent: it hung up"));
        }
        if skipped.last() == Some(&0xff) && answer(stream).await?.as_u64() == Some(id) {
            return Ok(());
        }
    }
}

async fn call(stream: &mut BufReader<UnixStream>, command: &str) -> Result<Value> {
    let ask = format!("{}\n", json!({ "execute": command }));
    stream.get_mut().write_all(ask.as_bytes()).await.context("ask the guest agent")?;
    answer(stream).await.with_context(|| format!("guest agent: {command}"))
}

async fn answer(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = Vec::new();
    stream.take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await.context("hear the guest agent")?;
    let said: Value = serde_json::from_slice(&line)
        .map_err(|error| Error::with_source(ErrorKind::Corrupt, "read what the guest agent says", error))?;
    match said.get("return") {
        Some(value) => Ok(value.clone()),
        None => {
            let why = said.pointer("/error/desc").and_then(Value::as_str).unwrap_or("it does not say why");
            Err(Error::new(ErrorKind::Unsupported, format!("the guest agent refuses: {why}")))
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use tokio::net::UnixListener;

    /// What the guest does; gives the commands it got.
    async fn guest(listener: UnixListener, refuses: bool, noise: &'static [u8]) -> Vec<String> {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        stream.get_mut().write_all(noise).await.unwrap();
        let mut seen = Vec::new();
        loop {
            let mut line = Vec::new();
            if stream.read_until(b'\n', &mut line).await.unwrap() == 0 {
                return seen;
            }
            let text = line.strip_prefix(b"\xff").unwrap_or(&line);
            let ask: Value = serde_json::from_slice(text).unwrap();
            let command = ask["execute"].as_str().unwrap().to_owned();
            let said = match command.as_str() {
                "guest-sync-delimited" => {
                    stream.get_mut().write_all(b"\xff").await.unwrap();
                    json!({ "return": ask["arguments"]["id"] })
                }
                "guest-fsfreeze-freeze" if refuses => {
                    json!({ "error": { "class": "GenericError", "desc": "no" } })
                }
                _ => json!({ "return": 2 }),
            };
            seen.push(command);
            stream.get_mut().write_all(format!("{said}\n").as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn file_systems_are_frozen_and_thawed_over_what_others_left() {
        for noise in [b"".as_slice(), b"{\"return\": 1}\n{\"ret".as_slice()] {
            let dir = tempfile::tempdir().unwrap();
            assert!(GuestAgent::of(dir.path()).is_none());
            let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
            let guest = tokio::spawn(guest(listener, false, noise));
            let agent = GuestAgent::of(dir.path()).unwrap();
            let frozen = agent.freeze().await.unwrap();
            agent.thaw(frozen).await;
            let seen = guest.await.unwrap();
            assert_eq!(seen, ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
        }
    }

    #[tokio::test]
    async fn a_guest_that_cannot_freeze_is_thawed_and_one_that_is_silent_delays_little() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let refusing = tokio::spawn(guest(listener, true, b""));
        let agent = GuestAgent::of(dir.path()).unwrap();
        assert!(agent.freeze().await.is_none());
        assert_eq!(refusing.await.unwrap().last().unwrap(), "guest-fsfreeze-thaw");

        std::fs::remove_file(dir.path().join(SOCKET)).unwrap();
        let _silent = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let asked = std::time::Instant::now();
        assert!(agent.freeze().await.is_none());
        assert!(asked.elapsed() < 3 * SYNC_LIMIT);
    }
}
