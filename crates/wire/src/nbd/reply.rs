//! Replies: simple ones, chunks, and chunks with extended headers.
//!
//! ```text
//! kinds of chunks      0 nothing more     1 data: offset u64 │ bytes      2 hole: offset u64 │ length u32
//!                      5 status: context u32 │ (length u32 │ state u32) × n
//!                      6 status, extended: context u32 │ n u32 │ (length u64 │ state u64) × n
//!                      8001 error: error u32 │ length u16 │ words
//! flag 1: the last chunk of its answer
//! ```

use super::request::{Command, Request};
use super::{CONTEXT_ID, STRING_BYTES_MAX};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

const DONE: u16 = 1;

const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const BLOCK_STATUS_EXT: u16 = 6;
const ERROR: u16 = 1 << 15 | 1;

/// Errors as they are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted.
    Perm = 1,
    /// The disk failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// There is no room, or the disk ends before.
    NoSpace = 28,
    /// Too much at once.
    Overflow = 75,
    /// Not possible as fast as was asked for.
    NotSup = 95,
    /// The disk is not served any more.
    Shutdown = 108,
}

/// Form of all replies of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replies {
    /// One reply, its data behind it.
    #[default]
    Simple,
    /// Chunks where there is data or an error; simple ones otherwise.
    Structured,
    /// Chunks with extended headers, always.
    Extended,
}

/// A run of a disk, as status chunks tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its length, bytes.
    pub length: u64,
    /// `STATE_*`.
    pub state: u32,
}

/// What stands before a reply's data, or a whole reply without data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    raw: [u8; Self::BYTES_MAX],
    len: usize,
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.raw.get(..self.len).unwrap_or_default()
    }
}

impl Head {
    /// Longest head, bytes: an extended hole.
    pub const BYTES_MAX: usize = 44;

    fn new() -> Self {
        Self { raw: [0; Self::BYTES_MAX], len: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        if let Some(room) = self.raw.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
        self
    }

    fn simple(request: &Request, error: u32) -> Self {
        Self::new()
            .put(&SIMPLE_MAGIC.to_be_bytes())
            .put(&error.to_be_bytes())
            .put(&request.cookie.to_be_bytes())
    }

    fn chunk(replies: Replies, request: &Request, kind: u16, flags: u16, payload: u64) -> Self {
        let start = |magic: u32| {
            Self::new()
                .put(&magic.to_be_bytes())
                .put(&flags.to_be_bytes())
                .put(&kind.to_be_bytes())
                .put(&request.cookie.to_be_bytes())
        };
        if replies == Replies::Extended {
            return start(EXTENDED_MAGIC).put(&request.offset.to_be_bytes()).put(&payload.to_be_bytes());
        }
        start(CHUNK_MAGIC).put(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes())
    }

    /// What stands before `length` bytes of a read's data from `offset` on. `last`: nothing of the answer follows.
    /// Simple replies have one such head, for the whole request.
    pub fn data(replies: Replies, request: &Request, offset: u64, length: u64, last: bool) -> Self {
        if replies == Replies::Simple {
            return Self::simple(request, 0);
        }
        let flags = if last { DONE } else { 0 };
        Self::chunk(replies, request, OFFSET_DATA, flags, 8 + length).put(&offset.to_be_bytes())
    }

    /// `length` bytes from `offset` on read as zeros. Not for simple replies.
    pub fn hole(replies: Replies, request: &Request, offset: u64, length: u32, last: bool) -> Self {
        let flags = if last { DONE } else { 0 };
        Self::chunk(replies, request, OFFSET_HOLE, flags, 12)
            .put(&offset.to_be_bytes())
            .put(&length.to_be_bytes())
    }

    /// The request was done, and there is nothing else to say. Not for reads.
    pub fn done(replies: Replies, request: &Request) -> Self {
        match replies {
            Replies::Extended => Self::chunk(replies, request, NONE, DONE, 0),
            Replies::Simple | Replies::Structured => Self::simple(request, 0),
        }
    }
}

/// The request failed; `why` is for people, and sent where there is a place for it.
pub fn error(replies: Replies, request: &Request, error: Errno, why: &str) -> Vec<u8> {
    if replies == Replies::Simple {
        return Head::simple(request, error as u32).to_vec();
    }
    let why = why.get(..why.floor_char_boundary(STRING_BYTES_MAX)).unwrap_or_default();
    let head = Head::chunk(replies, request, ERROR, DONE, 6 + why.len() as u64);
    let mut reply = head.to_vec();
    reply.extend((error as u32).to_be_bytes());
    reply.extend((why.len() as u16).to_be_bytes());
    reply.extend_from_slice(why.as_bytes());
    reply
}

/// The runs from a [`Command::BlockStatus`]'s offset on; there is at least one, none longer than the request. Not for
/// simple replies.
pub fn status(replies: Replies, request: &Request, runs: &[Run]) -> Vec<u8> {
    debug_assert!(request.command == Command::BlockStatus && !runs.is_empty());
    let count = runs.len() as u64;
    let extended = replies == Replies::Extended;
    let (kind, payload) =
        if extended { (BLOCK_STATUS_EXT, 8 + 16 * count) } else { (BLOCK_STATUS, 4 + 8 * count) };
    let mut reply = Head::chunk(replies, request, kind, DONE, payload).to_vec();
    reply.reserve(usize::try_from(payload).unwrap_or(0));
    reply.extend(CONTEXT_ID.to_be_bytes());
    if extended {
        reply.extend((count as u32).to_be_bytes());
    }
    for run in runs {
        if extended {
            reply.extend(run.length.to_be_bytes());
            reply.extend(u64::from(run.state).to_be_bytes());
        } else {
            reply.extend(u32::try_from(run.length).unwrap_or(u32::MAX).to_be_bytes());
            reply.extend(run.state.to_be_bytes());
        }
    }
    reply
}
