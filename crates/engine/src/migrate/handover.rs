//! The one spine of every move: who does what in which order, who waits for whom, and who may run the VM.
//!
//! Two state machines, [`Source`] and [`Target`], one per side and attempt. The source drives. Whatever the route,
//! the steps are the same; the host crate carries out the actions and reports back with events.
//!
//! ```text
//!  SOURCE                                                     TARGET
//!  reading ── record is ours ──► writing attempt              reading ── record names this attempt
//!     │                              │                           │
//!  offered ◄─────── Offer ──────────►│◄──────── Accepted ─── negotiating ─► accepted
//!     │                                                          │
//!  preparing ─────── Enter(prepare) ──────────────────────► preparing
//!     │◄──────────── Did(prepare) ──────────────────────────     │
//!  copying ◄───┐ not yet, or the store is silent             receiving
//!     │ rest fits│                                               │
//!  checking ───┘ store answered, record still ours               │
//!     │                                                          │
//!  pause → list-io → last-round → device-state ─ Enter(…) ──►    │
//!     │                                                          │
//!  verifying ─────── Enter(verify) ───────────────────────► verifying ─► journal ─► READY
//!     │◄──────────── Did(verify) = READY ───────────────────     │ polls the record
//!  committing ── CAS: holder=target, epoch+1, attempt=none       │
//!     │ yes        │ anything else (surely not made: undoing)    │
//!     │         resolving ── read back ──┬─ target's ──► (as yes)│
//!     │            │ still ours          └─ somebody's: release  │
//!     │         fencing ── CAS: attempt=none ─► undoing          │
//!     │                                                          │
//!  waiting ───────── Committed(epoch) ────────────────────► record says: mine, epoch+1
//!     │                                                     resuming ── fails ─► rebuilding ── fails ─► handing back
//!     │                                                          │ guest runs                 CAS: holder=source, epoch+2
//!     │◄──────────── Running (or the record says so) ────── announcing ─► marking ─► [pulling ─► marking] ─► done
//!  [serving]  until Pulled (or the record says so)
//!     │
//!  releasing ─► done
//!
//!  any failure or cancel before the CAS is sent: undoing (guest goes on here) ─► clearing (attempt=none) ─► done
//! ```
//!
//! # Who waits for whom, and how long
//!
//! | side, state | waits for | limit | then |
//! |---|---|---|---|
//! | source, offered | the target's answer | [`limit::CONNECT_MS`] of silence, [`limit::NEGOTIATE_MS`] in all | undo |
//! | source, offered … verifying | any sign of the target | [`limit::PEER_LOST_MS`] | undo |
//! | source, preparing | target's QEMU, files | [`limit::PREPARE_MS`] | undo |
//! | source, copying | the rest to fit the downtime limit | none: the guest runs; `cancel` ends it | – |
//! | source, checking | the store | none: the guest runs, copying goes on | – |
//! | source, pause … device-state | own QEMU, links | [`limit::PAUSE_MS`], [`limit::LIST_IO_MS`], [`limit::LAST_ROUND_MS`], [`limit::DEVICE_STATE_MS`] | undo |
//! | source, verifying | READY | [`limit::VERIFY_MS`], with hashing [`limit::VERIFY_HASH_MS`] | undo |
//! | source, committing | the CAS's answer | [`limit::STORE_MS`] | read back; undo if it was certainly not made |
//! | source, resolving, fencing | the store | none: only the record says who runs the VM | – |
//! | source, waiting | the target to run the guest, or hand back | none: only the operator can decide otherwise | – |
//! | source, target silent while waiting | – | [`limit::PEER_SILENT_MS`] | the record says `needs_operator` |
//! | source, serving (`--disk on-demand`) | the target to fetch the rest | none: the task says that it depends on the source | – |
//! | target, pulling (`--disk on-demand`) | the source to hand out the rest | none: likewise | – |
//! | source, undoing | own QEMU | the host's own limits | the record says `crashed` |
//! | source, clearing | the store | none: the guest runs here already | – |
//! | target, before READY | any sign of the source | [`limit::PEER_LOST_MS`] | look at the record: discard if it is over |
//! | target, before READY | any sign of the source | [`limit::TARGET_PATIENCE_MS`] | discard |
//! | target, READY | the record | none | – |
//! | target, source silent after the pause | – | [`limit::PEER_SILENT_MS`] | the record says `needs_operator` |
//! | target, resuming | own QEMU | the host's own limits | rebuild, then hand back |
//!
//! # After a restart of the agent
//!
//! | side, newest entry | record says | then |
//! |---|---|---|
//! | source, before `release` | still ours | fence (the last entry may be lost, COMMIT on its way), undo |
//! | source, before `release` | the target's | as after COMMIT |
//! | source, before `release` | ours again, by a hand-back or the operator | the guest goes on here |
//! | source, `release` | – | give up the copy |
//! | target, before `verify` | – | discard; the source is told, or asks and hears `Gone` |
//! | target, `verify` … `announce` | mine | resume what QEMU has, else rebuild, else hand back; if it may have run: `crashed` |
//! | target, `verify` … `announce` | this attempt stands | wait, as READY |
//! | target, `verify` … `announce` | over | discard |
//! | target, `pull` | mine | go on fetching; the VM itself is found again as any other VM of the host |
//! | target, `pull` | over | discard |
//!
//! # Invariants
//!
//! * A side runs the VM only while the record names it as the holder. Messages never decide who runs, only when
//!   to look. [`Target`] resumes after it has *read* that it is the holder at epoch + 1; [`Source`] resumes a
//!   guest whose commit may have been sent only after the record made that commit impossible ("fencing": the
//!   attempt is taken out by a CAS of its own, so that a delayed commit conflicts).
//! * READY is said after everything is at the target, durably enough to survive the end of its agent; COMMIT is
//!   sent only after READY.
//! * The guest is paused only when the store has just answered (younger than [`limit::STORE_FRESH_MS`]).
//! * The source keeps QEMU, memory and layer until the guest is known to run at the target, with `--disk on-demand`
//!   until the record says that no block is missing there; the target hands back only if the guest has not run a
//!   single instruction there.
//! * A layer is handed out to a target ([`SourceWork::Serve`]) only after the record was seen to name that target:
//!   from then on nobody writes it here.
//! * A QEMU that ends is noticed at once: before READY the attempt is undone, after it the target rebuilds or hands
//!   back, and once the guest may have run the record says `crashed`.
//! * `vm recover` lets a guest go on only where all of it is ([`can_run`]): at the target that is from READY on.
//! * Every transition that recovery must know about is journalled before the effect it guards. Recovery reads the
//!   record before it acts, whatever the journal says.
//!
//! Not here: rounds and when the rest fits (`memory::precopy`), how bytes travel (`host::link`, `host::memory`),
//! what exactly is prepared, verified and announced (`host::migrate`).

mod desk;
mod record;
mod source;
mod step;
mod target;
#[cfg(test)]
mod test;

pub use record::{Cas, CasResult, Seen, can_run, recover};
pub use source::{Source, SourceWork};
pub use step::FailPoint;
pub use target::{Target, TargetWork};
pub use whimbrel_wire::peer::migrate::{Course, JournalEntry, Offer, Side, Step, ToSource, ToTarget};

use whimbrel_wire::{HostId, WireError};

/// Limits of every wait, milliseconds. Those of the pause add up to the longest time a guest can stand still
/// without the store being at fault.
pub mod limit {
    /// The source's silence limit until the target has answered for the first time: connecting takes longer.
    pub const CONNECT_MS: u64 = 10_000;
    /// From the first offer to the target's yes or no.
    pub const NEGOTIATE_MS: u64 = 30_000;
    /// A target that has said nothing for this long is lost.
    pub const PEER_LOST_MS: u64 = 3_000;
    /// Target: starting the incoming QEMU, making files.
    pub const PREPARE_MS: u64 = 60_000;
    /// Source: QEMU stops the guest.
    pub const PAUSE_MS: u64 = 5_000;
    /// Source: cancel and list outstanding I/O.
    pub const LIST_IO_MS: u64 = 5_000;
    /// Source: send the last round. A backstop; the downtime limit decides when the pause begins.
    pub const LAST_ROUND_MS: u64 = 30_000;
    /// Source: save the device state and send it.
    pub const DEVICE_STATE_MS: u64 = 15_000;
    /// Target: check that everything is there.
    pub const VERIFY_MS: u64 = 15_000;
    /// The same, when all RAM is hashed on both sides.
    pub const VERIFY_HASH_MS: u64 = 180_000;
    /// A request to the store that has no answer after this long counts as unknown.
    pub const STORE_MS: u64 = 3_000;
    /// Pause before a failed request to the store is tried again.
    pub const STORE_RETRY_MS: u64 = 500;
    /// The pause begins only if the store answered within this time.
    pub const STORE_FRESH_MS: u64 = 1_000;
    /// How often a side that depends on the record looks at it, besides being told of changes.
    pub const RECORD_POLL_MS: u64 = 1_000;
    /// How often each side gives a sign of life (and repeats what it last asked for).
    pub const ALIVE_EVERY_MS: u64 = 500;
    /// Silence of the other side, after the pause, until the record says that an operator is needed: of the source
    /// before COMMIT, of the target after it.
    pub const PEER_SILENT_MS: u64 = 10_000;
    /// Target: silence of the source, before READY, until the target gives up by itself.
    pub const TARGET_PATIENCE_MS: u64 = 30_000;
}

/// Names a request to the store, so that a late answer to an earlier one is not taken for this one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReqId(pub u64);

/// What happened, for a machine that receives messages `M` and has work `W` done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<M, W> {
    /// Time has passed: to be called at [`Source::deadline`], and once after `new` or `recover`.
    Tick,
    /// The operator cancels (source only). Has no effect once COMMIT has been sent.
    Cancel,
    /// A watch saw one of the records change. Only a hint to look.
    RecordChanged,
    /// Answer to [`Action::Read`].
    Records(ReqId, Box<Seen>),
    /// [`Action::Read`] failed.
    ReadFailed(ReqId, WireError),
    /// Answer to [`Action::Cas`].
    Cas(ReqId, CasResult),
    /// A message of the other side.
    Peer(M),
    /// Work is done.
    Done(W),
    /// Work failed.
    Failed {
        /// Which.
        work: W,
        /// Why.
        error: WireError,
        /// The guest may have run an instruction at the target (of [`TargetWork::Resume`]).
        may_have_run: bool,
    },
    /// The QEMU of this attempt here ended by itself (not one that work has ended or replaced), or a stream or the
    /// journal broke for good.
    Broken(WireError),
}

/// What to do, in this order; each action is complete, or under way where it says so, before the next begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<M, W> {
    /// Replace the attempt's journal entry. Must survive the end of this process before the next action begins;
    /// with `sync` also the loss of power.
    Journal {
        /// The entry.
        entry: Box<JournalEntry>,
        /// Whether to wait for the disk.
        sync: bool,
    },
    /// A step begins: the phase that people see, and where the fail point of this side and step stands.
    Enter(Step),
    /// Read the VM's and its volumes' records at one revision; answered by `Records` or `ReadFailed`.
    Read(ReqId),
    /// Change records in one transaction; answered by `Cas`. Never repeated by the host on its own.
    Cas(ReqId, Box<Cas>),
    /// Tell the other side, if it can be reached; what matters is repeated.
    Send(M),
    /// Start work in the background; answered by `Done` or `Failed`.
    Do(W),
    /// Nothing more will happen. The journal entry is removed, at the latest before another attempt to move the same
    /// VM begins here.
    Finished(Outcome),
}

/// How a move ended, as one side knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM runs at the target.
    Moved,
    /// The VM runs at the source, because of this. At the target: the attempt was discarded.
    Stayed(WireError),
    /// The operator cancelled; the VM runs at the source.
    Cancelled,
    /// Another host holds the right (the operator recovered the VM there), or nobody.
    Lost(Option<HostId>),
    /// This side holds the right and its QEMU is gone.
    Crashed(WireError),
}

/// Mistakes that the simulator plants to show that its checkers would find them. Never set outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The source commits without having heard READY.
    CommitBeforeReady,
    /// The source takes a CAS without an answer for one that failed, and lets the guest go on.
    ResumeWithoutReadBack,
    /// The source gives up its copy at COMMIT instead of when the guest runs at the target.
    ReleaseBeforeRunning,
    /// The source goes from listing I/O to device state.
    SkipLastRound,
    /// With `--disk on-demand` the source gives up its copy when the guest runs at the target, not when the target has
    /// every block.
    ReleaseBeforePulled,
}
