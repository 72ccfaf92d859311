//! What a request may do: its flags, its place, its length.
//!
//! Invariant: what passes lies inside the disk, in whole units, and changes nothing of an export that may only be read.

use whimbrel_wire::nbd::request::{
    FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, StatusPayload,
};
use whimbrel_wire::nbd::{CONTEXT_ID, Command, Errno, Headers, Replies, Request};

use super::{Agreed, BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, Offer, PAYLOAD_BYTES_MAX};

/// What to do with the disk; offset and length are the request's, unless said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Send what is there; in one chunk of content if `whole`.
    Read {
        /// One chunk of content at most.
        whole: bool,
    },
    /// Take the payload.
    Write {
        /// Durable before it is answered.
        durable: bool,
    },
    /// Make durable what was answered.
    Flush,
    /// The range may be forgotten.
    Trim {
        /// Durable before it is answered.
        durable: bool,
    },
    /// Have the range fetched.
    Cache,
    /// The range reads as zeros from now on.
    Zero {
        /// As data that takes room, not as a hole.
        as_data: bool,
        /// Durable before it is answered.
        durable: bool,
    },
    /// Tell the runs of `length` bytes; one run only if `one`.
    Status {
        /// How much of the disk, bytes.
        length: u64,
        /// One run only.
        one: bool,
    },
}

/// Why a request is not done, though the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client is told.
    pub errno: Errno,
    /// And why, in words.
    pub why: &'static str,
}

fn no<T>(errno: Errno, why: &'static str) -> Result<T, Refusal> {
    Err(Refusal { errno, why })
}

/// Judges a request other than [`Command::Disconnect`], whose payload (`payload`, unless it is a write's) was read.
pub fn admit(agreed: &Agreed, offer: &Offer<'_>, request: &Request, payload: &[u8]) -> Result<Work, Refusal> {
    let durable = request.flags & FLAG_FUA != 0;
    let length = checked_flags(agreed, request, payload)?;
    let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && offer.read_only {
        return no(Errno::Perm, "the export is read-only");
    }
    if request.command == Command::Flush {
        return Ok(Work::Flush);
    }
    let unit = u64::from(BLOCK_BYTES_MIN);
    if length == 0 || !request.offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
        return no(Errno::Inval, "offset and length are not in units of 512 bytes, or there is no length");
    }
    if request.offset.checked_add(length).is_none_or(|end| end > offer.size_bytes) {
        let grows = matches!(request.command, Command::Write | Command::WriteZeroes);
        return no(if grows { Errno::NoSpace } else { Errno::Inval }, "the disk ends before");
    }
    let too_long = length > u64::from(PAYLOAD_BYTES_MAX);
    match request.command {
        Command::Read if too_long && agreed.replies != Replies::Simple => {
            no(Errno::Overflow, "more than the largest payload")
        }
        Command::Read if too_long => no(Errno::Inval, "more than the largest payload"),
        // A hole takes no second chunk where data takes the first: simple replies are whole by their nature.
        Command::Read => {
            let whole = request.flags & FLAG_DF != 0 || agreed.replies == Replies::Simple;
            Ok(Work::Read { whole })
        }
        Command::Write => Ok(Work::Write { durable }),
        Command::Trim => Ok(Work::Trim { durable }),
        Command::Cache => Ok(Work::Cache),
        Command::WriteZeroes => {
            let as_data = request.flags & FLAG_NO_HOLE != 0;
            if request.flags & FLAG_FAST_ZERO != 0 && (as_data || !is_whole(request, offer)) {
                // Zeros that are written, or blocks that must be completed: as slow as a write.
                return no(Errno::NotSup, "not faster than a write");
            }
            Ok(Work::Zero { as_data, durable })
        }
        Command::BlockStatus => Ok(Work::Status { length, one: request.flags & FLAG_REQ_ONE != 0 }),
        Command::Flush | Command::Disconnect | Command::Other(_) => no(Errno::Inval, "unknown command"),
    }
}

/// Whether the range has whole blocks only: its last one may be cut by the end of the disk.
fn is_whole(request: &Request, offer: &Offer<'_>) -> bool {
    let block = u64::from(BLOCK_BYTES_PREFERRED);
    let end = request.offset.saturating_add(request.length);
    request.offset.is_multiple_of(block) && (end.is_multiple_of(block) || end == offer.size_bytes)
}

/// Refuses flags that the command does not have; gives how much of the disk is meant.
fn checked_flags(agreed: &Agreed, request: &Request, payload: &[u8]) -> Result<u64, Refusal> {
    let extended = agreed.headers() == Headers::Extended;
    let chunked = agreed.replies != Replies::Simple;
    let known = match request.command {
        Command::Read if chunked => FLAG_DF,
        Command::WriteZeroes => FLAG_NO_HOLE | FLAG_FAST_ZERO,
        Command::BlockStatus => FLAG_REQ_ONE,
        Command::Other(_) => return no(Errno::Inval, "unknown command"),
        _ => 0,
    };
    if request.command == Command::BlockStatus && !agreed.status {
        return no(Errno::Inval, "no metadata context was chosen");
    }
    let carries = extended && request.flags & FLAG_PAYLOAD_LEN != 0;
    let may_carry = matches!(request.command, Command::Write | Command::BlockStatus);
    if carries && !may_carry {
        return no(Errno::Inval, "this command has no payload");
    }
    let known = if carries { known | FLAG_PAYLOAD_LEN } else { known };
    if request.flags & !(known | FLAG_FUA) != 0 {
        return no(Errno::Inval, "a flag that this command does not have");
    }
    if carries && request.command == Command::BlockStatus {
        return match StatusPayload::decode(payload) {
            Some(asked) if asked.contexts == [CONTEXT_ID] => Ok(asked.length),
            _ => no(Errno::Inval, "contexts that were not chosen, or not one after the other"),
        };
    }
    Ok(request.length)
}
