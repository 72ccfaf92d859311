//! Mode A: all of a VM but its RAM, out of one QEMU and into another, through QEMU's own migration stream.
//!
//! ```text
//!   source: Saver::new ─▶ stop ─▶ save ──┬─▶ (target took over) kill
//!                                        └─▶ (it did not)       resume
//!   target: started with -incoming defer ─▶ Loader::new ─▶ load ─▶ paused ─▶ (commit) ─▶ resume ─▶ announce
//! ```
//!
//! What can be said to QEMU before the guest is paused is said before: each word costs a millisecond.
//!
//! Invariants
//! * With `x-ignore-shared` the stream leaves out RAM that is a named shared file; the precheck made sure that all
//!   RAM is such a file or is in the stream.
//! * After `save` the source is paused and may run again at any time: nothing was given away.
//! * A device may write guest memory while it is saved: the last scan for written pages comes after `save`.
//! * After `load` the target is paused until it is told to run; guest memory is as it was before.
//! * The stream is at most [`STATE_MAX_BYTES`] long, on both sides.
//!
//! Not here: RAM (`memory`), QEMU's stream with RAM in it (mode B, `migrate`).

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::qmp::Qmp;

/// The longest device state that is accepted, bytes. Real ones have some 300 KB.
pub const STATE_MAX_BYTES: usize = 64 << 20;
/// How long saving or loading may take.
pub const STATE_LIMIT: Duration = Duration::from_secs(30);
/// Name under which QEMU keeps our end of the stream.
const FD_NAME: &str = "whimbrel-state";
/// No limit worth the name: the stream is small and its other end is on this host.
const BANDWIDTH_BYTES_S: u64 = 64 << 30;

/// A QEMU that has been told how to save its state.
pub struct Saver {
    qmp: Qmp,
}

impl Saver {
    /// Sets what a stream without RAM takes; it holds until somebody sets something else.
    pub async fn new(qmp: &Qmp) -> Result<Self> {
        prepare(qmp).await.context("prepare to save device state")?;
        Ok(Self { qmp: qmp.clone() })
    }

    /// Saves the device state of the VM, which is paused for it if it is not. On failure the VM stays paused and may
    /// be resumed.
    pub async fn save(&self) -> Result<Vec<u8>> {
        let saved = try_save(&self.qmp).await;
        if saved.is_err() {
            // Nothing may be left under way that a later `cont` would trip over.
            if let Err(error) = self.qmp.cancel_migration().await {
                tracing::debug!(%error, "cancel after a failed save");
            }
        }
        saved.context("save device state")
    }
}

async fn try_save(qmp: &Qmp) -> Result<Vec<u8>> {
    let deadline = Instant::now() + STATE_LIMIT;
    qmp.stop().await?;
    let mut ours = give_end(qmp).await?;
    qmp.execute::<Value>("migrate", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
    let mut state = Vec::with_capacity(1 << 20);
    let mut limited = (&mut ours).take(STATE_MAX_BYTES as u64 + 1);
    timeout_at(deadline, limited.read_to_end(&mut state))
        .await
        .map_err(|_| late())?
        .context("read stream")?;
    if state.len() > STATE_MAX_BYTES {
        let words = format!("the stream is longer than {STATE_MAX_BYTES} bytes: RAM seems to be in it");
        return Err(Error::new(ErrorKind::Unsupported, words));
    }
    completed(qmp, deadline).await?;
    tracing::debug!(bytes = state.len(), "device state saved");
    Ok(state)
}

/// A QEMU that waits for its state on a stream. It ends if this is dropped before the state has been loaded.
pub struct Loader {
    qmp: Qmp,
    ours: UnixStream,
}

impl Loader {
    /// Has a QEMU that was started for it wait for its state.
    pub async fn new(qmp: &Qmp) -> Result<Self> {
        let ready = async {
            let found = qmp.run_state().await?;
            if found != "inmigrate" {
                let words = format!("this QEMU does not wait for state: it is {found}");
                return Err(Error::new(ErrorKind::InvalidInput, words));
            }
            prepare(qmp).await?;
            let ours = give_end(qmp).await?;
            qmp.execute::<Value>("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
            Ok(Self { qmp: qmp.clone(), ours })
        };
        ready.await.context("prepare to load device state")
    }

    /// Loads a saved state. QEMU is paused afterwards.
    pub async fn load(self, state: &[u8]) -> Result<()> {
        try_load(&self.qmp, self.ours, state).await.context("load device state")
    }
}

async fn try_load(qmp: &Qmp, mut ours: UnixStream, state: &[u8]) -> Result<()> {
    if state.len() > STATE_MAX_BYTES {
        return Err(Error::new(ErrorKind::InvalidInput, format!("it has {} bytes", state.len())));
    }
    let deadline = Instant::now() + STATE_LIMIT;
    let write = async {
        ours.write_all(state).await?;
        ours.shutdown().await
    };
    let written = timeout_at(deadline, write).await.map_err(|_| late())?;
    // If QEMU broke off, it says why; that it did is then no news.
    completed(qmp, deadline).await?;
    written.context("write stream")?;
    loop {
        // Completion is told a moment before the run state changes.
        match qmp.run_state().await?.as_str() {
            "inmigrate" | "finish-migrate" if Instant::now() < deadline => {
                sleep(Duration::from_millis(1)).await;
            }
            "paused" | "prelaunch" => return Ok(()),
            other => {
                return Err(Error::new(ErrorKind::Internal, format!("the target is {other}, not paused")));
            }
        }
    }
}

/// Tells the network where the VM is now: a few broadcasts from each of its interfaces, by QEMU.
pub async fn announce_self(qmp: &Qmp) -> Result<()> {
    let pace = json!({ "initial": 10, "max": 200, "rounds": 6, "step": 50 });
    qmp.execute::<Value>("announce-self", pace).await.map(drop).context("announce the VM's addresses")
}

async fn prepare(qmp: &Qmp) -> Result<()> {
    let known: Vec<Value> = qmp.execute("query-migrate-capabilities", json!({})).await?;
    let names = known.iter().filter_map(|one| one.get("capability").and_then(Value::as_str));
    // Whatever somebody left switched on would change the stream.
    let wanted = |name: &str| matches!(name, "x-ignore-shared" | "events");
    let list: Vec<_> = names.map(|name| json!({ "capability": name, "state": wanted(name) })).collect();
    qmp.execute::<Value>("migrate-set-capabilities", json!({ "capabilities": list })).await?;
    let parameters = json!({ "max-bandwidth": BANDWIDTH_BYTES_S });
    qmp.execute::<Value>("migrate-set-parameters", parameters).await.map(drop)
}

/// Gives QEMU one end of a stream and keeps the other.
async fn give_end(qmp: &Qmp) -> Result<UnixStream> {
    let (ours, theirs) = StdUnixStream::pair().context("make a socket pair")?;
    ours.set_nonblocking(true).context("make a socket pair")?;
    qmp.execute_with_fd::<Value>("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd()).await?;
    UnixStream::from_std(ours).context("make a socket pair")
}

async fn completed(qmp: &Qmp, deadline: Instant) -> Result<()> {
    loop {
        let info: Value = qmp.execute("query-migrate", json!({})).await?;
        let text = |key| info.get(key).and_then(Value::as_str);
        match text("status") {
            Some("completed") => return Ok(()),
            Some(end @ ("failed" | "cancelled")) => {
                let words = text("error-desc").unwrap_or("QEMU gives no reason; its log may");
                return Err(Error::new(ErrorKind::Io, format!("QEMU's stream {end}: {words}")));
            }
            _ if Instant::now() >= deadline => return Err(late()),
            _ => sleep(Duration::from_millis(1)).await,
        }
    }
}

fn late() -> Error {
    Error::new(ErrorKind::TimedOut, format!("not done within {STATE_LIMIT:?}"))
}
