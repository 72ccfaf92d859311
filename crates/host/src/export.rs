//! Volumes shown to guests and tools: vhost-user-blk, NBD and files.
//!
//! ```text
//!  guest driver ── QEMU ── unix socket ──▶ server ──▶ frontend   the vhost-user conversation: memory, rings, logs
//!       │                                               │
//!       │ rings in shared guest RAM                     │ starts, stops
//!       └───────────────────────────────────────────▶ queue ──▶ DeviceSlot ──▶ Arc<dyn BlockDev>
//!                                                       │ would wait                ▲
//!                                                       └────────▶ pool ────────────┘
//!  nbd client ── unix socket, or TCP with TLS ──▶ nbd ──────────▶ DeviceSlot
//!  program ── a file ── kernel ── /dev/fuse ──▶ fuse ───────────▶ DeviceSlot
//! ```
//!
//! Invariants
//! * What a guest, a front-end or an NBD client sends never ends this process: a bad request fails, a bad ring
//!   stops, a bad connection is closed.
//! * The guest is always told "write-back, flush when you care", which is what a volume is; a guest that cannot
//!   flush gets every write made durable before it is acknowledged.
//! * A request is acknowledged once, after it was done. One that was not acknowledged when this process died is
//!   done by the next one that serves the same socket.
//! * A VM that moves does not wait for requests that wait: what is left unanswered is done at the target, once.
//! * No request reaches the disk before [`DeviceSlot::activate`] or after [`DeviceSlot::fence`] returned.
//!
//! Not here: what a volume is (`disk`), who may write it (the volume's right, `migrate`).

mod blk;
mod config_change;
mod dirty;
mod event;
mod fills;
mod frontend;
pub mod fuse;
#[cfg(test)]
mod fuzz;
mod greeting;
mod guest_ram;
mod handover;
mod inflight;
pub mod nbd;
mod op;
mod pacer;
mod pool;
mod queue;
mod ring;
mod server;
mod slot;
mod socket;

pub use config_change::SizeNotice;
pub use dirty::WriteTracker;
pub use fills::FilledFrom;
#[cfg(test)]
pub(crate) use fills::Fills;
pub use server::{ExportCounters, FrontEndState, VhostUserOptions, VhostUserServer};
pub use slot::{DeviceSlot, SlotState};
pub use socket::SocketOwner;

#[cfg(test)]
mod test_blkio;
#[cfg(test)]
pub(crate) mod test_device;
#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod test_kill;
#[cfg(test)]
mod test_vhost_user;
