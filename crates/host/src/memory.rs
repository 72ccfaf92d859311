//! RAM on its way between two hosts.
//!
//! ```text
//!  guest::Tracker ──► PageBitmap ◄── SharedDirty ◄── export (disk back-end writes guest memory)
//!                         │
//!   mode A      Source::send_round ── wire::peer::memory frames ──► target::receive
//!                    │ RamFile (pread)                                   │ RamFile (pwrite)
//!              source QEMU's RAM file                              target QEMU's RAM file
//!
//!   mode B      source QEMU ══ unix socket ══ stream::Source ── link ── stream::Target ══ unix socket ══ target QEMU
//! ```
//!
//! * [`bitmap`]: which pages are to be sent; `plan`: in which order. [`ram`]: the files. [`encoder`]: pages to frames.
//! * [`known`], `lookup`: pages that need not be sent with their bytes, at the source and at the target; by their versions
//!   (`delta`), by equal pages (`reference`) and by blocks of images ([`disks`]). [`techniques`]: which of it is used, and what it did.
//! * [`source`], [`target`]: rounds over a link. [`stream`]: mode B. [`progress`], [`limit`]: what people see and set.
//!
//! Not here: who finds the pages that changed (`guest`), when to stop sending (`engine::memory::precopy`), the
//! format on the wire (`wire::peer::memory`).

pub mod bitmap;
pub mod carry;
mod delta;
pub mod disks;
pub mod encoder;
mod frames;
pub mod known;
pub mod limit;
mod lookup;
pub mod pace;
mod plan;
pub mod progress;
pub mod ram;
mod reference;
pub mod source;
pub mod stream;
pub mod target;
pub mod techniques;
#[cfg(test)]
mod test;
#[cfg(test)]
mod test_known;

pub use bitmap::{PAGE_BYTES, PageBitmap, SharedDirty};
pub use limit::Limiter;
pub use progress::{Figures, Progress};
pub use ram::RamFile;
pub use source::{RoundReport, Source, SourceOptions};
pub use target::{Received, TargetOptions};
pub use techniques::Techniques;
