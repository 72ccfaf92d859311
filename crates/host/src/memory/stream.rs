//! Mode B: QEMU moves the memory itself, and the agents carry its stream; in the order of the handover.
//!
//! ```text
//!  source QEMU ══ socket pair ══ Source ── link ── Target ══ socket pair ══ target QEMU (-incoming defer -S)
//!
//!  Source:  start ─► next_round* ─► pause ─► finish              or cancel, at any time before COMMIT
//!             active                 guest stopped,   rest of RAM and device state,
//!                                    pre-switchover   completed: the target has loaded all of it
//!  Target:  accept ─► wait_loaded: paused, complete, not running before somebody says `cont`
//! ```
//!
//! Who pauses: QEMU gets a downtime limit far below the wanted one, so that it keeps copying while this side counts
//! its rounds; when the engine finds that the rest fits, [`Source::pause`] stops the guest. A guest that writes
//! next to nothing makes QEMU reach even the small limit and pause the guest by itself ([`Step::Paused`]).
//!
//! Invariants
//! * `pause-before-switchover`: QEMU sends no device state before [`Source::finish`].
//! * `return-path`: "completed" at the source means that the target QEMU has loaded everything. COMMIT comes after
//!   that; a QEMU that fails later can no longer let the guest run again by itself.
//! * The target is paused after loading, whatever the source was.
//! * Every wait has a limit. Dropping a [`Source`] or [`Target`] ends the carrying; QEMU then fails its migration,
//!   and the guest at the source goes on if it was not paused by us.
//!
//! Not here: when the rest fits (`engine::memory::precopy`), how bytes are carried (`carry`), mode A (`source`).

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use whimbrel_engine::memory::precopy::Round;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::qmp::Qmp;
use crate::memory::carry::{CarryOptions, Passed, carry};
use crate::memory::limit::Limiter;
use crate::memory::progress::Progress;

/// Name under which QEMU keeps our end of the stream.
const FD_NAME: &str = "whimbrel-memory";
/// No limit worth the name: the stream's other end is on this host, and the agent limits what leaves it.
const BANDWIDTH_BYTES_S: u64 = 64 << 30;
/// The part of the downtime limit that QEMU is told.
const QEMU_LIMIT_SHARE: u64 = 10;
/// The longest limit that QEMU takes, milliseconds: with the guest paused anyway, it need not wait.
const QEMU_LIMIT_MAX_MS: u64 = 2_000_000;
/// How often QEMU is asked while it copies.
const POLL: Duration = Duration::from_millis(10);
/// How often QEMU is asked while the guest is paused.
const POLL_PAUSED: Duration = Duration::from_millis(1);

/// How mode B is run.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// The longest pause that is wanted, milliseconds.
    pub downtime_limit_ms: u64,
    /// How bytes are carried.
    pub carry: CarryOptions,
}

impl StreamOptions {
    /// The usual options for a downtime limit, with a limit on bytes per second.
    pub fn new(downtime_limit_ms: u64, limiter: Arc<Limiter>) -> Self {
        let (stall_limit, idle_limit) = (Duration::from_secs(30), Duration::from_secs(300));
        Self { downtime_limit_ms, carry: CarryOptions { limiter, stall_limit, idle_limit } }
    }
}

/// What QEMU did since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A round has ended; the engine decides whether to pause. The disk's tail is the caller's to fill in.
    Round(Round),
    /// QEMU has paused the guest by itself: next to nothing is left.
    Paused,
}

/// The sending side of a move in mode B.
pub struct Source {
    qmp: Qmp,
    pump: Pump,
    progress: Progress,
    /// What QEMU had done when the last round ended.
    last: Seen,
    last_at: Instant,
}

impl Source {
    /// Starts QEMU's migration into `link`. On failure the guest runs on.
    pub async fn start<S>(qmp: Qmp, link: S, options: &StreamOptions, progress: Progress) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let started = async {
            prepare(&qmp).await?;
            let limit_ms = (options.downtime_limit_ms / QEMU_LIMIT_SHARE).max(1);
            set_downtime_limit(&qmp, limit_ms).await?;
            let ours = give_end(&qmp).await?;
            let pump = Pump::start(ours, link, &options.carry);
            qmp.execute::<Value>("migrate", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
            Ok::<_, Error>(pump)
        };
        let pump = started.await.context("start QEMU's migration")?;
        let last = Seen::default();
        Ok(Self { qmp, pump, progress, last, last_at: Instant::now() })
    }

    /// Waits until QEMU has ended a round, or paused the guest, or failed.
    pub async fn next_round(&mut self) -> Result<Step> {
        loop {
            let seen = self.look().await?;
            match seen.status.as_str() {
                "pre-switchover" => return Ok(Step::Paused),
                // The first round begins with a sync of its own.
                "active" if seen.rounds > self.last.rounds => {
                    let since = std::mem::replace(&mut self.last, seen.clone());
                    let began = std::mem::replace(&mut self.last_at, Instant::now());
                    if since.rounds > 0 {
                        return Ok(Step::Round(self.round(&since, &seen, began)));
                    }
                }
                "none" | "setup" | "active" | "device" => {}
                other => return Err(self.failed(other, &seen)),
            }
            sleep(POLL).await;
        }
    }

    /// Stops the guest, unless QEMU already has, and waits until QEMU holds before the switch-over.
    pub async fn pause(&mut self, limit: Duration) -> Result<()> {
        // Once the guest stands still there is nothing to wait for.
        self.qmp.stop().await.context("pause guest")?;
        set_downtime_limit(&self.qmp, QEMU_LIMIT_MAX_MS).await?;
        self.wait_for("pre-switchover", &["active", "device"], limit).await.context("pause guest")
    }

    /// Sends the rest of RAM and the device state; returns when the target QEMU has loaded all of it.
    pub async fn finish(&mut self, limit: Duration) -> Result<()> {
        let state = json!({ "state": "pre-switchover" });
        self.qmp.execute::<Value>("migrate-continue", state).await.context("finish QEMU's migration")?;
        let passing = ["pre-switchover", "device", "active"];
        self.wait_for("completed", &passing, limit).await.context("finish QEMU's migration")?;
        self.look().await.map(drop)
    }

    /// Stops the migration. A guest that QEMU paused by itself runs again; one that we paused is the caller's to
    /// resume, as is one whose migration has completed.
    pub async fn cancel(self) -> Result<()> {
        // The pump is kept until QEMU has let go: a broken stream would make it say "failed".
        self.qmp.cancel_migration().await
    }

    /// What the round that has just ended was.
    fn round(&self, before: &Seen, now: &Seen, began: Instant) -> Round {
        let link_bytes_s = self.pump.passed.link_bytes_s.load(Ordering::Relaxed);
        // `began` is when the last round ended, as seen by polling.
        let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        Round {
            data_pages: now.normal_pages.saturating_sub(before.normal_pages),
            duration_us,
            throttled_us: 0,
            link_bytes_s,
            dirty_pages: now.remaining_bytes / 4096,
            disk_tail_bytes: 0,
        }
    }

    async fn look(&mut self) -> Result<Seen> {
        let seen = Seen::of(&self.qmp).await?;
        let passed = &self.pump.passed;
        let (wire_bytes, link_bytes_s) =
            (passed.wire_bytes.load(Ordering::Relaxed), passed.link_bytes_s.load(Ordering::Relaxed));
        let raw_bytes = passed.raw_bytes.load(Ordering::Relaxed);
        self.progress.update(|figures| {
            figures.round = seen.rounds;
            figures.total_bytes = seen.total_bytes;
            figures.left_pages = seen.remaining_bytes / 4096;
            figures.data_pages = seen.normal_pages;
            figures.zero_pages = seen.zero_pages;
            figures.wire_bytes = wire_bytes;
            figures.packed_raw_bytes = raw_bytes;
            figures.packed_wire_bytes = wire_bytes;
            figures.link_bytes_s = link_bytes_s;
            figures.dirty_bytes_s = seen.dirty_bytes_s;
        });
        Ok(seen)
    }

    async fn wait_for(&mut self, wanted: &str, passing: &[&str], limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.look().await?;
            if seen.status == wanted {
                return Ok(());
            }
            if !passing.contains(&seen.status.as_str()) {
                return Err(self.failed(&seen.status, &seen));
            }
            if Instant::now() >= deadline {
                let text = format!("QEMU's migration is {:?}, not {wanted:?}, after {limit:?}", seen.status);
                return Err(Error::new(ErrorKind::TimedOut, text));
            }
            sleep(POLL_PAUSED).await;
        }
    }

    fn failed(&self, status: &str, seen: &Seen) -> Error {
        let reason = self.pump.broken().or_else(|| seen.error.clone());
        let reason = reason.unwrap_or_else(|| "QEMU gives no reason; its log may".to_owned());
        let kind = if status == "cancelled" { ErrorKind::Cancelled } else { ErrorKind::Unavailable };
        Error::new(kind, format!("QEMU's migration is {status:?}: {reason}"))
    }
}

/// The receiving side of a move in mode B.
pub struct Target {
    qmp: Qmp,
    pump: Pump,
}

impl Target {
    /// Lets a QEMU that was started with `-incoming defer -S` receive from `link`.
    pub async fn accept<S>(qmp: Qmp, link: S, carry: &CarryOptions) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let accepted = async {
            let found = qmp.run_state().await?;
            if found != "inmigrate" {
                let text = format!("this QEMU does not wait for a migration: it is {found:?}");
                return Err(Error::new(ErrorKind::InvalidInput, text));
            }
            prepare(&qmp).await?;
            let ours = give_end(&qmp).await?;
            qmp.execute::<Value>("migrate-incoming", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
            Ok(ours)
        };
        let ours = accepted.await.context("receive QEMU's migration")?;
        let pump = Pump::start(ours, link, carry);
        Ok(Self { qmp, pump })
    }

    /// Waits until everything is loaded; the guest is paused then. `limit` runs from now on, over all rounds that
    /// are still to come.
    pub async fn wait_loaded(&mut self, limit: Duration) -> Result<()> {
        self.try_wait_loaded(limit).await.context("receive QEMU's migration")
    }

    async fn try_wait_loaded(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut poll = POLL;
        while Instant::now() < deadline {
            let seen = Seen::of(&self.qmp).await?;
            match seen.status.as_str() {
                // Completion is told a moment before the run state changes.
                "completed" => match self.qmp.run_state().await?.as_str() {
                    "inmigrate" | "finish-migrate" => poll = POLL_PAUSED,
                    "paused" | "prelaunch" => return Ok(()),
                    other => {
                        let text = format!("the guest is {other:?} after loading, not paused");
                        return Err(Error::new(ErrorKind::Internal, text));
                    }
                },
                "failed" | "cancelled" => {
                    let reason = seen.error.or_else(|| self.pump.broken());
                    let reason = reason.unwrap_or_else(|| "QEMU gives no reason; its log may".to_owned());
                    return Err(Error::new(ErrorKind::Io, reason));
                }
                _ => {
                    if let Some(reason) = self.pump.broken() {
                        return Err(Error::new(ErrorKind::Unavailable, reason));
                    }
                }
            }
            sleep(poll).await;
        }
        Err(Error::new(ErrorKind::TimedOut, format!("not loaded after {limit:?}")))
    }
}

/// The task that carries bytes; ends with whoever owns it.
struct Pump {
    task: JoinHandle<()>,
    passed: Arc<Passed>,
    error: Arc<Mutex<Option<String>>>,
}

impl Pump {
    fn start<S>(qemu: UnixStream, link: S, options: &CarryOptions) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let passed = Arc::new(Passed::default());
        let error: Arc<Mutex<Option<String>>> = Arc::default();
        let task = tokio::spawn({
            let (passed, options, error) = (Arc::clone(&passed), options.clone(), Arc::clone(&error));
            async move {
                if let Err(broken) = carry(qemu, link, &options, &passed).await {
                    tracing::debug!(error = %broken, "carrying QEMU's stream ended early");
                    *error.lock() = Some(broken.to_string());
                }
            }
        });
        Self { task, passed, error }
    }

    /// Why the carrying broke off, if it did.
    fn broken(&self) -> Option<String> {
        self.error.lock().clone()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What `query-migrate` says.
#[derive(Clone, Debug, Default)]
struct Seen {
    status: String,
    error: Option<String>,
    rounds: u32,
    total_bytes: u64,
    remaining_bytes: u64,
    normal_pages: u64,
    zero_pages: u64,
    dirty_bytes_s: u64,
}

impl Seen {
    async fn of(qmp: &Qmp) -> Result<Self> {
        let info: Value = qmp.execute("query-migrate", json!({})).await?;
        let text = |key| info.get(key).and_then(Value::as_str).map(str::to_owned);
        let ram = |key| info.get("ram").and_then(|ram| ram.get(key)).and_then(Value::as_u64).unwrap_or(0);
        let page_bytes = ram("page-size").max(1);
        Ok(Self {
            status: text("status").unwrap_or_else(|| "none".to_owned()),
            error: text("error-desc"),
            rounds: u32::try_from(ram("dirty-sync-count")).unwrap_or(u32::MAX),
            total_bytes: ram("total"),
            remaining_bytes: ram("remaining"),
            normal_pages: ram("normal"),
            zero_pages: ram("duplicate"),
            dirty_bytes_s: ram("dirty-pages-rate").saturating_mul(page_bytes),
        })
    }
}

/// Sets every capability, so that nothing that somebody left switched on changes the stream.
async fn prepare(qmp: &Qmp) -> Result<()> {
    let known: Vec<Value> = qmp.execute("query-migrate-capabilities", json!({})).await?;
    let names = known.iter().filter_map(|one| one.get("capability").and_then(Value::as_str));
    let wanted = |name: &str| matches!(name, "pause-before-switchover" | "return-path" | "events");
    let list: Vec<_> = names.map(|name| json!({ "capability": name, "state": wanted(name) })).collect();
    qmp.execute::<Value>("migrate-set-capabilities", json!({ "capabilities": list })).await?;
    let parameters = json!({ "max-bandwidth": BANDWIDTH_BYTES_S });
    qmp.execute::<Value>("migrate-set-parameters", parameters).await.map(drop)
}

async fn set_downtime_limit(qmp: &Qmp, limit_ms: u64) -> Result<()> {
    let parameters = json!({ "downtime-limit": limit_ms.min(QEMU_LIMIT_MAX_MS) });
    qmp.execute::<Value>("migrate-set-parameters", parameters).await.map(drop)
}

/// Gives QEMU one end of a stream and keeps the other.
async fn give_end(qmp: &Qmp) -> Result<UnixStream> {
    let (ours, theirs) = StdUnixStream::pair().context("make a socket pair")?;
    ours.set_nonblocking(true).context("make a socket pair")?;
    qmp.execute_with_fd::<Value>("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd()).await?;
    UnixStream::from_std(ours).context("make a socket pair")
}
