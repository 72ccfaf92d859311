//! NBD's numbers, as far as we speak it (github.com/NetworkBlockDevice/nbd, doc/proto.md). All big-endian.

use crate::error::ErrorKind;

pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Server's and client's handshake flags: fixed newstyle, no padding zeroes.
pub(super) const HANDSHAKE_FLAGS: u16 = 3;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub(super) const REP_ERR_INVALID: u32 = 0x8000_0003;
pub(super) const REP_ERR_UNKNOWN: u32 = 0x8000_0006;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Flags of the export: has flags, flush, FUA, trim, write-zeroes, don't-fragment, multi-conn, cache.
pub(super) const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10;
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

pub(super) const CMD_FLAG_FUA: u16 = 1;
pub(super) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = 1 << 15 | 1;

/// State of a run that reads as zeros and takes no room: hole, zero.
pub(super) const STATE_HOLE_ZERO: u32 = 3;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const ESHUTDOWN: u32 = 108;

/// The only metadata context there is, and its number.
pub(super) const CONTEXT: &[u8] = b"base:allocation";
pub(super) const CONTEXT_ID: u32 = 1;

/// Smallest unit of offsets and lengths.
pub(super) const MIN_BLOCK: u32 = 512;
/// Most bytes of a read or write.
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;
/// Most bytes of an option.
pub(super) const MAX_OPTION: u32 = 64 << 10;

/// Bytes of a request's header.
pub(super) const REQUEST_BYTES: usize = 28;

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// Reads a header; `None` if it does not start with its magic number.
    pub(super) fn parse(raw: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut at = 0;
        let mut take = |bytes: usize| {
            let value = raw[at..at + bytes].iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
            at += bytes;
            value
        };
        let magic = take(4) as u32;
        let request = Self {
            flags: take(2) as u16,
            command: take(2) as u16,
            cookie: take(8),
            offset: take(8),
            length: take(4) as u32,
        };
        (magic == REQUEST_MAGIC).then_some(request)
    }
}

/// The error number for what went wrong.
pub(super) fn errno(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::NoSpace => ENOSPC,
        ErrorKind::InvalidInput => EINVAL,
        _ => EIO,
    }
}
