//! RAM on its way between two hosts.
//!
//! ```text
//!  guest::Tracker ──► PageBitmap ◄── SharedDirty ◄── export (disk back-end writes guest memory)
//!                         │
//!            source::send_round ── wire::peer::memory frames ──► target::receive
//!                  RamFile (read)                                 RamFile (write)
//! ```
//!
//! * [`bitmap`]: which pages are to be sent.
//!
//! Not here: who finds the pages that changed (`guest`), when to stop sending (`engine::memory::precopy`).

pub mod bitmap;

pub use bitmap::{PAGE_BYTES, PageBitmap, SharedDirty};
