//! The NBD protocol, as far as we speak it: its bytes, without what they mean for a disk.
//!
//! Source: github.com/NetworkBlockDevice/nbd, `doc/proto.md`; extended headers are on its branch `extension-ext-header`
//! (spoken by QEMU since 8.2 and libnbd since 1.18). Every number is big-endian.
//!
//! ```text
//! greeting           S: "NBDMAGIC" │ "IHAVEOPT" │ flags u16            C: flags u32
//! option             C: "IHAVEOPT" │ option u32 │ length u32 │ data                                   (option.rs)
//! answer to it       S: 0003e889045565a9 │ option u32 │ kind u32 │ length u32 │ data
//!
//! request            C: 25609513 │ flags u16 │ command u16 │ cookie u64 │ offset u64 │ length u32     (request.rs)
//!  extended          C: 21e41c71 │ flags u16 │ command u16 │ cookie u64 │ offset u64 │ length u64
//! simple reply       S: 67446698 │ error u32 │ cookie u64 │ data of a read                            (reply.rs)
//! chunk              S: 668e33ef │ flags u16 │ kind u16 │ cookie u64 │ length u32 │ payload
//!  extended          S: 6e8a278c │ flags u16 │ kind u16 │ cookie u64 │ offset u64 │ length u64 │ payload
//! ```
//!
//! Invariant: decoding never reads past what it was given and never allocates more than a small multiple of it.
//!
//! Not here: what is agreed on and what a request may do (`engine::export::nbd`), sockets (`host::export::nbd`).

pub mod option;
pub mod reply;
pub mod request;

pub use option::{InfoQuery, MetaQuery, OptionHead};
pub use reply::{Errno, Head, Replies, Run};
pub use request::{Command, Headers, Request};

/// The only metadata context there is: which runs are holes and read as zeros.
pub const CONTEXT: &[u8] = b"base:allocation";
/// Its number in status chunks.
pub const CONTEXT_ID: u32 = 1;
/// State of a run that takes no room.
pub const STATE_HOLE: u32 = 1;
/// State of a run that reads as zeros.
pub const STATE_ZERO: u32 = 2;

/// Longest string of the protocol, bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// What an export can do, told when it is chosen (`NBD_FLAG_*`).
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Flush is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Forced unit access is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Trim is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Write-zeroes is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// "Do not fragment" is understood; only where replies are chunked.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on every other.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Cache is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// "Zero only if that is fast" is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// Block status takes a list of contexts; only with extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Takes big-endian numbers off the front of bytes.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length in front.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.bytes(len)
    }
}

#[cfg(test)]
mod test;
