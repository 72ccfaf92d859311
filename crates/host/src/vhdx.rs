//! VHDX files: read with everything they lie on, and written anew.
//!
//! ```text
//!   file ─► identifier, header ─► log, replayed in memory ─► regions, metadata ─► every BAT entry verified ─► VhdxFile
//!                                                                                                               │ parent,
//!   Writer: blocks, bitmaps ─► tables ─► flush ─► headers ─► flush            VhdxDisk: BlockRead ◄── check_link ┘ and so on
//! ```
//!
//! Invariants
//! * Nothing is written to a file that is read: a log that was not carried out is replayed in memory, and every read sees
//!   what it says.
//! * A file that opens is whole: every block lies inside it, and none over another. One that is cut off does not open.
//! * A chain opens only if every link holds (`engine::disk::vhdx::check_link`). Parents are looked for where the caller
//!   allows.
//! * A file that is written becomes valid with its last write, the headers. Until then it is no VHDX file.
//! * Memory: 1 bit per MiB of the file, 8 bytes per block that is written, 80 bytes per logged 4 KiB.
//!
//! Not here: what the bytes mean (`wire::record::vhdx`, `engine::disk::vhdx`), which directory parents may be in
//! (`store::convert`).

mod disk;
mod file;
mod replay;
mod write;

pub use disk::{FindParent, VhdxDisk};
pub use file::VhdxFile;
pub use write::{NewDisk, NewParent, Writer};

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod test;
#[cfg(test)]
mod test_peers;
