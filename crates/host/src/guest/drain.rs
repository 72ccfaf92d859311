//! Grace periods for direct I/O: waits until what a QEMU's own disks had under way has ended, while the guest runs.
//!
//! A direct transfer (`O_DIRECT`, pass-through of SCSI commands) pins the guest's pages and writes them past the page
//! tables. The pinning is seen as a write, what the device writes later is not:
//!
//! ```text
//!   pinned      scan: reports it, arms it again                 the transfer ends
//!   ───●──────────────●───────────────────────────────────────────────●────────────▶
//!                      └ read here, the page is old, and nobody will say so again
//! ```
//!
//! So a page that a scan reported may be read only when everything that was under way at that scan has ended. What
//! begins after the scan pins the page anew and is reported by the next one. The wait is the block layer's own
//! *drain*: it holds new requests back, waits for those under way, lets go. The processors run on (they wait only if
//! they touch a device meanwhile), no page is scanned while anything stands still, and no page is sent twice for it:
//! that is why it is preferred to scans within `stop` and `cont`, which also flush every disk and stop every device.
//!
//! Invariants
//! * [`Drains::pass`] returns after every block request has ended that was under way when it was called.
//! * Drains take at most a tenth of the guest's time and are at least `APART_MIN` apart. Three that take longer
//!   than [`DRAIN_LIMIT`] end the copy, with words.
//!
//! Not here: which disks need it (`precheck`), scans (`dirty`).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::qmp::{Qmp, Version};

/// A drain that takes longer counts as too slow: requests of the guest wait for it.
pub const DRAIN_LIMIT: Duration = Duration::from_millis(300);
/// So many may be too slow: a disk's busy moment passes.
const SLOW_MAX: u32 = 3;
/// Limit for one, after which QEMU is given up.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Between the end of a drain and the next one.
const APART_MIN: Duration = Duration::from_millis(100);
/// Or so many times the last one's duration, up to [`APART_MAX`].
const APART_TIMES: u32 = 9;
const APART_MAX: Duration = Duration::from_secs(2);
/// In versions up to this one, an empty transaction drains all disks.
const TRANSACTION_DRAINS: Version = Version { major: 10, minor: u32::MAX, micro: u32::MAX };

/// What drains have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainStats {
    /// How many there were.
    pub count: u32,
    /// Together they took.
    pub total: Duration,
    /// The longest took.
    pub longest: Duration,
    /// So many took longer than [`DRAIN_LIMIT`].
    pub slow: u32,
}

/// See the module's charter.
pub struct Drains {
    qmp: Qmp,
    stats: DrainStats,
    next: Option<Instant>,
}

impl Drains {
    /// For the QEMU at the other end of `qmp`.
    pub fn new(qmp: Qmp) -> Self {
        Self { qmp, stats: DrainStats::default(), next: None }
    }

    /// What they have cost so far.
    pub fn stats(&self) -> DrainStats {
        self.stats
    }

    /// Returns once everything has ended that the disks had under way; keeps its distance from the drain before.
    pub async fn pass(&mut self) -> Result<()> {
        if let Some(next) = self.next {
            tokio::time::sleep_until(next.into()).await;
        }
        let took = drain(&self.qmp).await?;
        self.next = Some(Instant::now() + APART_MIN.max((took * APART_TIMES).min(APART_MAX)));
        self.stats.count += 1;
        self.stats.total += took;
        self.stats.longest = self.stats.longest.max(took);
        self.stats.slow += u32::from(took > DRAIN_LIMIT);
        if self.stats.slow >= SLOW_MAX {
            return Err(too_slow(self.stats.longest));
        }
        Ok(())
    }
}

/// One drain now; how long it took.
pub async fn drain(qmp: &Qmp) -> Result<Duration> {
    let started = Instant::now();
    let action = "wait for the I/O that the VM's disks have under way";
    if qmp.version() <= TRANSACTION_DRAINS {
        let nothing = json!({ "actions": [] });
        qmp.execute_within::<Value>("transaction", nothing, CALL_LIMIT).await.context(action)?;
    } else {
        // What a newer version drains for an empty transaction is not known; that stopping drains is promised.
        qmp.execute_within::<Value>("stop", json!({}), CALL_LIMIT).await.context(action)?;
        qmp.cont().await.context(action)?;
    }
    Ok(started.elapsed())
}

/// Why a VM with disks like these is not moved in mode A.
pub fn too_slow(took: Duration) -> Error {
    let words = format!(
        "copy memory: the VM's disks bypass the page cache and take {} ms to end what they have under way, which the \
         copy has to wait for; at most {} ms are taken",
        took.as_millis(),
        DRAIN_LIMIT.as_millis()
    );
    Error::new(ErrorKind::TimedOut, words).hint("move it in mode B, or while its disks are less busy")
}
