//! The page stream: a VM's RAM on its way from source to target, over one ordered, encrypted byte stream.
//!
//! ```text
//!  source                                              target
//!    ── Open {blocks} ─────────────────────────────────►   sizes compared
//!    ◄────────────────────────────── Opened {knows} ──
//!    ── RoundBegin r ──────────────────────────────────►
//!    ── Pages r (zero | raw | words | zstd …) … ───────►   verified, written
//!    ── RoundEnd r {counts} ───────────────────────────►   all of it in place, but what is missing
//!    ◄────────────────── RoundDone r {counts, missing} ──   then round r + 1
//!    ── DigestAsk ─────────────────────────────────────►   verify mode, guest paused
//!    ◄──────────────────────────────── Digest {blake3} ──
//!    ── Close ─────────────────────────────────────────►
//!    ◄────────────────────────────────────── Closed ──     (Refused {error} instead of any answer)
//! ```
//!
//! Mode B carries QEMU's own migration stream instead, in both directions at once: `Bytes` frames, then one
//! `BytesEnd` each way. Without the end a direction was cut off, not finished.
//!
//! Frame, little-endian: a header of 16 bytes, then `body_len` bytes.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | magic `WP` |
//! | 2 | 1 | format version, 1 |
//! | 3 | 1 | kind: 1 pages, 2 control (JSON, [`Control`]), 3 bytes |
//! | 4 | 4 | `body_len` |
//! | 8 | 4 | round |
//! | 12 | 4 | CRC-32C of header bytes 0..12, of the body up to the payload, and of the **decoded** pages |
//!
//! Body of a pages frame: block `u16`, encoding `u8` (0 zero, 1 raw, 2 zstd, 3 words, 4 words in zstd, 5 changed words,
//! 6 changed words in zstd, 7 references to pages, 8 references to disks), reserved `u8`, run count `u32`, runs of
//! `{first_page u32, pages u32}`, payload. The payload holds the pages of all runs in order: nothing (zero),
//! `4096 × pages` bytes (raw), one zstd frame that decodes to exactly that many bytes, words, one zstd frame that decodes
//! to words, or references ([`mod@reference`]). In a control frame the whole body counts as payload.
//!
//! Words stand for pages in which one 64-bit word (zero, a pattern) is frequent: one byte per page, 0, 1 or 2; then,
//! page by page, for 0 its 4096 bytes, for 1 the frequent word (8 bytes), a mask of 512 bits (64 bytes, bit *i* of
//! byte *j* for word 8*j* + *i*; set: the word is another one), and the other words in order (8 bytes each); for 2 the
//! same without the mask, which is that of the last page before it that has one (there must be one).
//!
//! Changed words are words in which a page's first byte may also be 4, 5 or 6: as 0, 1 or 2, but what follows stands for
//! the page XORed with the version that the target has, which is the one of the last round that carried it, or zeros. At
//! least one page of the frame is such a page. The check is over the pages themselves: if it does not agree, the target
//! has another version than the source thinks, writes nothing of the frame, and lacks all its pages.
//!
//! Encodings above 4 go only to a target that said in `Opened` that it knows what they take ([`Technique`]). A round's
//! pages that a target `missing` says it lacks hold anything; the source sends them in a later round with encodings below
//! 5, and the memory is complete only after a last round with nothing missing.
//!
//! Body of a bytes frame: encoding `u8` (1 raw, 2 zstd), reserved 3 bytes, decoded length `u32` of at most
//! [`CHUNK_BYTES_MAX`], payload.
//!
//! Invariants
//! * Rounds are numbered from 1 and do not overlap: round r + 1 begins after `RoundDone r`, so of two versions of
//!   a page the one of the newer round is written last. A page occurs at most once in a round.
//! * Runs are ascending, disjoint, not empty, and end within the block; a data frame has at most
//!   [`GROUP_PAGES_MAX`] pages, any frame at most [`RUNS_MAX`] runs. The parser refuses everything else and
//!   never panics. Blocks have fewer than 2^32 pages (16 TiB).
//! * Nothing of a frame is written before its check agreed.
//!
//! Not here: when rounds end (`engine::memory::precopy`), what is compressed (`engine::block::encode`), the
//! codec itself (`host::codec`), QEMU's own stream (`host::memory::stream`).

use crate::error::{ErrorKind, WireError};
use serde::{Deserialize, Serialize};
use std::ops::Range;

pub mod reference;

pub use reference::{HASH_BYTES, MISSING_RUNS_MAX, Misses, Missing, REFERENCE_BYTES, Reference, Technique};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// The most pages in one data frame: 1 MiB of memory.
pub const GROUP_PAGES_MAX: usize = 256;
/// The most runs in one frame.
pub const RUNS_MAX: usize = 4096;
/// The most bytes of a control frame's body.
pub const CONTROL_BYTES_MAX: usize = 256 << 10;
/// The most bytes of any body.
pub const BODY_BYTES_MAX: usize = PAGES_HEAD + RUNS_MAX * RUN_BYTES + GROUP_PAGES_MAX * PAGE_BYTES;
/// The most bytes, decoded, of a bytes frame.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The version of this format.
pub const FORMAT_VERSION: u8 = 1;

const MAGIC: [u8; 2] = *b"WP";
const PAGES_HEAD: usize = 8;
const RUN_BYTES: usize = 8;
const BYTES_HEAD: usize = 8;

fn corrupt(what: impl std::fmt::Display) -> WireError {
    WireError::new(ErrorKind::Corrupt, format!("read page stream: {what}"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages of a RAM block.
    Pages,
    /// A [`Control`] message.
    Control,
    /// A piece of QEMU's own stream.
    Bytes,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::Control => 2,
            Self::Bytes => 3,
        }
    }
}

/// The first 16 bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// The round the frame belongs to; 0 before the first.
    pub round: u32,
    /// Bytes that follow the header, at most [`BODY_BYTES_MAX`].
    pub body_len: usize,
    /// The CRC-32C of everything else; see the module.
    pub check: u32,
}

impl Header {
    /// Bytes of a header.
    pub const LENGTH: usize = 16;

    /// Reads a header from a stranger's bytes.
    pub fn parse(bytes: &[u8; Self::LENGTH]) -> Result<Self, WireError> {
        let [m0, m1, version, kind, ..] = *bytes;
        if [m0, m1] != MAGIC {
            return Err(corrupt("a frame does not start with its magic"));
        }
        if version != FORMAT_VERSION {
            return Err(WireError::new(
                ErrorKind::Unsupported,
                format!("read page stream: format {version}, this release knows {FORMAT_VERSION}"),
            )
            .hint("run the same release, or neighbouring ones, on both hosts"));
        }
        let (kind, limit) = match kind {
            1 => (Kind::Pages, BODY_BYTES_MAX),
            2 => (Kind::Control, CONTROL_BYTES_MAX),
            3 => (Kind::Bytes, BYTES_HEAD + CHUNK_BYTES_MAX),
            other => return Err(corrupt(format_args!("unknown frame kind {other}"))),
        };
        let body_len = u32_at(bytes, 4) as usize;
        if body_len > limit {
            return Err(corrupt(format_args!("a body of {body_len} bytes, limit {limit}")));
        }
        Ok(Self { kind, round: u32_at(bytes, 8), body_len, check: u32_at(bytes, 12) })
    }

    fn head(&self) -> [u8; 12] {
        let mut head = [0; 12];
        head[..2].copy_from_slice(&MAGIC);
        head[2] = FORMAT_VERSION;
        head[3] = self.kind.code();
        head[4..8].copy_from_slice(&(self.body_len as u32).to_le_bytes());
        head[8..12].copy_from_slice(&self.round.to_le_bytes());
        head
    }

    pub(crate) fn check_of(&self, before_payload: &[u8], decoded: &[u8]) -> u32 {
        let crc = crc32c::crc32c(&self.head());
        crc32c::crc32c_append(crc32c::crc32c_append(crc, before_payload), decoded)
    }

    fn put(&self, frame: &mut [u8]) {
        frame[..12].copy_from_slice(&self.head());
        frame[12..Self::LENGTH].copy_from_slice(&self.check.to_le_bytes());
    }
}

/// How a frame's payload stands for its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// All pages are zero; no payload.
    Zero,
    /// The pages as they are.
    Raw,
    /// One zstd frame over all the pages.
    Zstd,
    /// Frequent words left out; see the module.
    Words,
    /// One zstd frame over words.
    WordsZstd,
    /// Words, some of them changes to the version before.
    Changes,
    /// One zstd frame over changed words.
    ChangesZstd,
    /// Equal pages of this memory.
    SamePages,
    /// Equal blocks of images under the VM's disks.
    DiskBlocks,
}

impl Encoding {
    fn code(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
            Self::Zstd => 2,
            Self::Words => 3,
            Self::WordsZstd => 4,
            Self::Changes => 5,
            Self::ChangesZstd => 6,
            Self::SamePages => 7,
            Self::DiskBlocks => 8,
        }
    }
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page's number in its block.
    pub first_page: u32,
    /// How many pages; never 0.
    pub pages: u32,
}

impl Run {
    /// The bytes of the block that the run covers.
    pub fn byte_range(&self) -> Range<u64> {
        let start = u64::from(self.first_page) * PAGE_BYTES as u64;
        start..start + u64::from(self.pages) * PAGE_BYTES as u64
    }
}

/// A pages frame, parsed but not decoded.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// The RAM block, by its place in [`Control::Open`].
    pub block: u16,
    /// How the payload is to be read.
    pub encoding: Encoding,
    /// The payload.
    pub payload: &'a [u8],
    header: Header,
    before_payload: &'a [u8],
    pages: u64,
}

impl<'a> Pages<'a> {
    /// Reads a pages frame from a stranger's bytes; `blocks` holds the number of pages of each block.
    pub fn parse(header: &Header, body: &'a [u8], blocks: &[u64]) -> Result<Self, WireError> {
        let bad = |what: &str| Err(corrupt(what));
        let [b0, b1, encoding, reserved, ..] = *body else { return bad("a pages frame is cut short") };
        if header.kind != Kind::Pages || body.len() != header.body_len || reserved != 0 {
            return bad("a pages frame contradicts its header");
        }
        let block = u16::from_le_bytes([b0, b1]);
        let Some(&block_pages) = blocks.get(usize::from(block)) else {
            return bad("a pages frame names an unknown block");
        };
        let run_count = u32_at(body, 4) as usize;
        if body.len() < PAGES_HEAD || run_count == 0 || run_count > RUNS_MAX {
            return bad("a pages frame has no runs, or too many");
        }
        let Some((before_payload, payload)) = body.split_at_checked(PAGES_HEAD + run_count * RUN_BYTES)
        else {
            return bad("a pages frame is shorter than its runs");
        };
        let encoding = match encoding {
            0 => Encoding::Zero,
            1 => Encoding::Raw,
            2 => Encoding::Zstd,
            3 => Encoding::Words,
            4 => Encoding::WordsZstd,
            5 => Encoding::Changes,
            6 => Encoding::ChangesZstd,
            7 => Encoding::SamePages,
            8 => Encoding::DiskBlocks,
            _ => return bad("unknown encoding"),
        };
        let mut frame = Self { block, encoding, payload, header: *header, before_payload, pages: 0 };
        let mut end = 0;
        for run in frame.runs() {
            let first = u64::from(run.first_page);
            if run.pages == 0 || first < end || first + u64::from(run.pages) > block_pages {
                return bad("a run is empty, out of order or outside of its block");
            }
            end = first + u64::from(run.pages);
            frame.pages += u64::from(run.pages);
        }
        frame.check_payload_length()?;
        Ok(frame)
    }

    fn check_payload_length(&self) -> Result<(), WireError> {
        if self.encoding != Encoding::Zero && self.pages > GROUP_PAGES_MAX as u64 {
            return Err(corrupt("a data frame has too many pages"));
        }
        let (len, raw_len) = (self.payload.len() as u64, self.pages * PAGE_BYTES as u64);
        let good = match self.encoding {
            Encoding::Zero => len == 0,
            Encoding::Raw => len == raw_len,
            Encoding::Zstd
            | Encoding::Words
            | Encoding::WordsZstd
            | Encoding::Changes
            | Encoding::ChangesZstd => len > 0 && len < raw_len,
            Encoding::SamePages | Encoding::DiskBlocks => len == self.pages * REFERENCE_BYTES as u64,
        };
        if good { Ok(()) } else { Err(corrupt("a payload's length does not fit its encoding")) }
    }

    /// The runs, ascending and disjoint.
    pub fn runs(&self) -> impl Iterator<Item = Run> + 'a {
        let table = self.before_payload.get(PAGES_HEAD..).unwrap_or(&[]);
        table.chunks_exact(RUN_BYTES).map(|run| Run { first_page: u32_at(run, 0), pages: u32_at(run, 4) })
    }

    /// The pages' numbers, in order.
    pub fn page_numbers(&self) -> impl Iterator<Item = u64> + 'a {
        self.runs()
            .flat_map(|run| u64::from(run.first_page)..u64::from(run.first_page) + u64::from(run.pages))
    }

    /// What stands for the pages of a references frame, in their order; `None` in place of one with reserved bits.
    pub fn references(&self) -> impl Iterator<Item = Option<Reference>> + 'a {
        self.payload
            .chunks_exact(REFERENCE_BYTES)
            .map(|bytes| bytes.try_into().ok().and_then(Reference::parse))
    }

    /// How many pages the frame carries.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The round the frame belongs to.
    pub fn round(&self) -> u32 {
        self.header.round
    }

    /// Compares the check with the decoded pages (nothing for a zero frame, the payload for references).
    pub fn verify(&self, decoded: &[u8]) -> Result<(), WireError> {
        if self.header.check_of(self.before_payload, decoded) == self.header.check {
            Ok(())
        } else {
            Err(corrupt("the check of a pages frame does not agree"))
        }
    }
}

/// Appends a pages frame to `out`. `raw` are the pages themselves (empty for zero pages) and make the check;
/// `payload` is what is sent (`raw` again, or what it was encoded to).
///
/// The caller keeps the format's limits; a frame that breaks one is refused by the other side.
pub fn put_pages(
    out: &mut Vec<u8>,
    round: u32,
    block: u16,
    encoding: Encoding,
    runs: &[Run],
    raw: &[u8],
    payload: &[u8],
) {
    let start = out.len();
    out.resize(start + Header::LENGTH, 0);
    out.extend_from_slice(&block.to_le_bytes());
    out.extend_from_slice(&[encoding.code(), 0]);
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.first_page.to_le_bytes());
        out.extend_from_slice(&run.pages.to_le_bytes());
    }
    let body_start = start + Header::LENGTH;
    let body_len = out.len() - body_start + payload.len();
    let mut header = Header { kind: Kind::Pages, round, body_len, check: 0 };
    header.check = header.check_of(&out[body_start..], raw);
    out.extend_from_slice(payload);
    header.put(&mut out[start..]);
}

/// A piece of QEMU's own stream, parsed but not decoded.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// `Raw` or `Zstd`.
    pub encoding: Encoding,
    /// The payload.
    pub payload: &'a [u8],
    /// Bytes that the payload decodes to.
    pub raw_bytes: usize,
    header: Header,
    before_payload: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// Reads a bytes frame from a stranger's bytes.
    pub fn parse(header: &Header, body: &'a [u8]) -> Result<Self, WireError> {
        let bad = |what: &str| Err(corrupt(what));
        let Some((before_payload, payload)) = body.split_at_checked(BYTES_HEAD) else {
            return bad("a bytes frame is cut short");
        };
        let [encoding, 0, 0, 0, ..] = *before_payload else { return bad("a bytes frame has reserved bits") };
        let raw_bytes = u32_at(before_payload, 4) as usize;
        if header.kind != Kind::Bytes || body.len() != header.body_len || raw_bytes > CHUNK_BYTES_MAX {
            return bad("a bytes frame contradicts its header");
        }
        let encoding = match encoding {
            1 if payload.len() == raw_bytes => Encoding::Raw,
            2 if payload.len() < raw_bytes => Encoding::Zstd,
            _ => return bad("a bytes frame's length does not fit its encoding"),
        };
        Ok(Self { encoding, payload, raw_bytes, header: *header, before_payload })
    }

    /// Compares the check with the decoded bytes.
    pub fn verify(&self, decoded: &[u8]) -> Result<(), WireError> {
        if self.header.check_of(self.before_payload, decoded) == self.header.check {
            Ok(())
        } else {
            Err(corrupt("the check of a bytes frame does not agree"))
        }
    }
}

/// Appends a bytes frame to `out`: `raw`, sent as `payload`.
pub fn put_chunk(out: &mut Vec<u8>, encoding: Encoding, raw: &[u8], payload: &[u8]) {
    let mut before_payload = [0; BYTES_HEAD];
    before_payload[0] = encoding.code();
    before_payload[4..].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    let body_len = BYTES_HEAD + payload.len();
    let mut header = Header { kind: Kind::Bytes, round: 0, body_len, check: 0 };
    header.check = header.check_of(&before_payload, raw);
    let start = out.len();
    out.resize(start + Header::LENGTH, 0);
    header.put(&mut out[start..]);
    out.extend_from_slice(&before_payload);
    out.extend_from_slice(payload);
}

/// A RAM block as both sides must see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockShape {
    /// The block's name in QEMU.
    pub name: String,
    /// Its size in pages of 4 KiB.
    pub pages: u64,
}

/// What a round carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundCounts {
    /// Pages sent with their bytes (raw or compressed).
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages sent as references.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub referred_pages: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl RoundCounts {
    /// Pages of all kinds.
    pub fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages + self.referred_pages
    }

    /// Adds what another part of the work carried.
    pub fn add(&mut self, other: &Self) {
        self.data_pages += other.data_pages;
        self.zero_pages += other.zero_pages;
        self.referred_pages += other.referred_pages;
    }
}

/// Everything in the page stream that is not pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum Control {
    /// Source: these blocks are to be moved.
    Open {
        /// In the order in which pages frames number them.
        blocks: Vec<BlockShape>,
    },
    /// Target: my blocks have the same sizes.
    Opened {
        /// What the source may use beyond encodings 0 to 4.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        knows: Vec<Technique>,
    },
    /// Source: pages of the header's round follow.
    RoundBegin {
        /// The guest is paused; nothing follows but this.
        last: bool,
    },
    /// Source: the header's round is complete.
    RoundEnd {
        /// What it carried.
        counts: RoundCounts,
    },
    /// Target: all pages of the header's round are in place.
    RoundDone {
        /// What was written; equal to the source's counts.
        counts: RoundCounts,
        /// Milliseconds of processor time that decoding and writing took, over all threads.
        decode_ms: u64,
        /// Pages that have to be sent again, at most [`MISSING_RUNS_MAX`] runs; some of them may not be missing.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        missing: Vec<Missing>,
        /// How they had been sent.
        #[serde(default, skip_serializing_if = "Misses::is_none")]
        misses: Misses,
    },
    /// Source: hash all blocks.
    DigestAsk,
    /// Target: the hash.
    Digest {
        /// BLAKE3, lower-case hex; see `host::memory::ram`.
        blake3: String,
    },
    /// Either side: QEMU closed this direction of its stream.
    BytesEnd,
    /// Source: no more rounds.
    Close,
    /// Target: nothing is pending.
    Closed,
    /// Either side: the stream ends here, and why.
    Refused {
        /// For people, and the kind to act on.
        error: WireError,
    },
}

impl Control {
    /// Appends the message as a frame to `out`.
    pub fn put(&self, out: &mut Vec<u8>, round: u32) -> Result<(), WireError> {
        let body = serde_json::to_vec(self)
            .map_err(|error| WireError::new(ErrorKind::Internal, format!("write page stream: {error}")))?;
        if body.len() > CONTROL_BYTES_MAX {
            return Err(WireError::new(ErrorKind::InvalidInput, "write page stream: a message is too long"));
        }
        let mut header = Header { kind: Kind::Control, round, body_len: body.len(), check: 0 };
        header.check = header.check_of(&[], &body);
        let start = out.len();
        out.resize(start + Header::LENGTH, 0);
        header.put(&mut out[start..]);
        out.extend_from_slice(&body);
        Ok(())
    }

    /// Reads a message from a stranger's bytes.
    pub fn parse(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        if header.kind != Kind::Control || header.body_len != body.len() {
            return Err(corrupt("a control frame contradicts its header"));
        }
        if header.check_of(&[], body) != header.check {
            return Err(corrupt("the check of a control frame does not agree"));
        }
        serde_json::from_slice(body).map_err(|error| corrupt(format_args!("a control message: {error}")))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: [u64; 2] = [1000, 10_000];

    fn frame(encoding: Encoding, runs: &[Run], raw: &[u8]) -> Vec<u8> {
        let mut out = vec![7; 3];
        put_pages(&mut out, 5, 1, encoding, runs, raw, raw);
        out.split_off(3)
    }

    fn parse(bytes: &[u8]) -> Result<(Header, Vec<Run>, Vec<u8>), WireError> {
        let (head, body) = bytes.split_first_chunk().ok_or_else(|| corrupt("short"))?;
        let header = Header::parse(head)?;
        let body = body.get(..header.body_len).ok_or_else(|| corrupt("short"))?;
        let pages = Pages::parse(&header, body, &BLOCKS)?;
        // The codec is not part of this crate: raw and zero frames only.
        pages.verify(pages.payload)?;
        Ok((header, pages.runs().collect(), pages.payload.to_vec()))
    }

    fn runs_from(gaps: &[(u32, u32)]) -> Vec<Run> {
        let mut next = 0;
        gaps.iter()
            .map(|(gap, pages)| {
                let run = Run { first_page: next + gap, pages: *pages };
                next = run.first_page + pages;
                run
            })
            .collect()
    }

    proptest! {
        #[test]
        fn a_frame_comes_back_as_it_was(gaps in prop::collection::vec((0u32..50, 1u32..4), 1..20), seed: u8) {
            let runs = runs_from(&gaps);
            let pages: usize = runs.iter().map(|run| run.pages as usize).sum();
            let raw: Vec<u8> = (0..pages * PAGE_BYTES).map(|i| seed.wrapping_add((i % 251) as u8)).collect();
            let (header, runs_back, raw_back) = parse(&frame(Encoding::Raw, &runs, &raw)).unwrap();
            prop_assert_eq!((header.round, runs_back, raw_back), (5, runs.clone(), raw));
            let (_, runs_back, _) = parse(&frame(Encoding::Zero, &runs, &[])).unwrap();
            prop_assert_eq!(runs_back, runs);
        }

        #[test]
        fn a_damaged_frame_is_refused(gaps in prop::collection::vec((0u32..50, 1u32..3), 1..5), at: prop::sample::Index, flip in 1u8..) {
            let runs = runs_from(&gaps);
            let pages: usize = runs.iter().map(|run| run.pages as usize).sum();
            let mut bytes = frame(Encoding::Raw, &runs, &vec![1; pages * PAGE_BYTES]);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), body_len in 0u32..100) {
            let _ = parse(&bytes);
            let mut framed = Vec::from(MAGIC);
            framed.extend([FORMAT_VERSION, 1]);
            framed.extend(body_len.to_le_bytes());
            framed.extend([0; 8]);
            framed.extend(&bytes);
            let _ = parse(&framed);
            framed[3] = 3;
            if let Some((head, body)) = framed.split_first_chunk() {
                let _ = Header::parse(head).and_then(|header| Chunk::parse(&header, body)?.verify(body));
            }
            framed[3] = 2;
            if let Some((head, body)) = framed.split_first_chunk() {
                let _ = Header::parse(head).and_then(|header| Control::parse(&header, body));
            }
        }
    }

    #[test]
    fn runs_outside_of_the_block_out_of_order_or_empty_are_refused() {
        let run = |first_page, pages| Run { first_page, pages };
        for runs in [
            vec![run(9_999, 2)],
            vec![run(u32::MAX, u32::MAX)],
            vec![run(5, 2), run(6, 1)],
            vec![run(5, 0)],
            vec![],
            vec![run(0, 1); RUNS_MAX + 1],
        ] {
            assert!(parse(&frame(Encoding::Zero, &runs, &[])).is_err());
        }
        let pages = GROUP_PAGES_MAX as u32 + 1;
        let raw = vec![0; pages as usize * PAGE_BYTES];
        assert!(parse(&frame(Encoding::Raw, &[run(0, pages)], &raw)).is_err());
        assert!(parse(&frame(Encoding::Zero, &[run(0, 10_000)], &[])).is_ok());
        assert!(parse(&frame(Encoding::Zero, &[run(0, 1)], &[1])).is_err());
    }

    #[test]
    fn a_piece_of_a_stream_comes_back_and_a_damaged_one_is_refused() {
        let mut bytes = Vec::new();
        put_chunk(&mut bytes, Encoding::Raw, b"QEVM", b"QEVM");
        let check = |bytes: &[u8]| {
            let (head, body) = bytes.split_first_chunk().unwrap();
            let header = Header::parse(head)?;
            let chunk = Chunk::parse(&header, body)?;
            chunk.verify(chunk.payload).map(|()| chunk.payload.to_vec())
        };
        assert_eq!(check(&bytes).unwrap(), b"QEVM");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(check(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn references_come_back_and_a_wrong_number_of_them_is_refused() {
        let one = Reference { object: 1, index: 77, hash: [9; HASH_BYTES] };
        let two = Reference { object: 0, index: u32::MAX, hash: [7; HASH_BYTES] };
        let mut payload = Vec::new();
        one.put(&mut payload);
        two.put(&mut payload);
        let runs = [Run { first_page: 5, pages: 1 }, Run { first_page: 9, pages: 1 }];
        let bytes = frame(Encoding::SamePages, &runs, &payload);
        let (head, body) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(head).unwrap();
        let pages = Pages::parse(&header, body, &BLOCKS).unwrap();
        pages.verify(pages.payload).unwrap();
        assert_eq!(pages.references().collect::<Vec<_>>(), [Some(one), Some(two)]);
        assert_eq!(pages.page_numbers().collect::<Vec<_>>(), [5, 9]);
        assert!(parse(&frame(Encoding::DiskBlocks, &runs, &payload[1..])).is_err());
        payload[2] = 1;
        let bytes = frame(Encoding::DiskBlocks, &runs, &payload);
        let (head, body) = bytes.split_first_chunk().unwrap();
        let pages = Pages::parse(&Header::parse(head).unwrap(), body, &BLOCKS).unwrap();
        assert_eq!(pages.references().collect::<Vec<_>>(), [None, Some(two)]);
        let many = [Run { first_page: 0, pages: GROUP_PAGES_MAX as u32 + 1 }];
        let payload = vec![0; (GROUP_PAGES_MAX + 1) * REFERENCE_BYTES];
        assert!(parse(&frame(Encoding::SamePages, &many, &payload)).is_err());
    }

    /// Releases that know no techniques say and hear less; both sides understand each other.
    #[test]
    fn neighbouring_releases_understand_each_other() {
        let read = |text: &str| serde_json::from_str::<Control>(text).unwrap();
        assert_eq!(read(r#"{"message":"opened"}"#), Control::Opened { knows: vec![] });
        assert_eq!(
            read(r#"{"message":"opened","knows":["delta","telepathy"]}"#),
            Control::Opened { knows: vec![Technique::Delta, Technique::Unknown] }
        );
        let old = r#"{"message":"round_done","counts":{"data_pages":1,"zero_pages":2},"decode_ms":3}"#;
        let counts = RoundCounts { data_pages: 1, zero_pages: 2, referred_pages: 0 };
        let done =
            Control::RoundDone { counts, decode_ms: 3, missing: Vec::new(), misses: Misses::default() };
        assert_eq!(read(old), done);
        assert_eq!(serde_json::to_string(&done).unwrap(), old);
        let quiet = Control::Opened { knows: Vec::new() };
        assert_eq!(serde_json::to_string(&quiet).unwrap(), r#"{"message":"opened"}"#);
        let mut full = Vec::new();
        let missing = vec![Missing(u16::MAX, u32::MAX, u32::MAX); MISSING_RUNS_MAX];
        let misses = Misses { delta: u64::MAX, same: u64::MAX, disk: u64::MAX };
        Control::RoundDone { counts, decode_ms: u64::MAX, missing, misses }.put(&mut full, 1).unwrap();
    }

    #[test]
    fn control_messages_come_back_and_other_formats_are_refused() {
        let open = Control::Open { blocks: vec![BlockShape { name: "mem".into(), pages: 3 }] };
        let mut bytes = Vec::new();
        open.put(&mut bytes, 4).unwrap();
        let (head, body) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(head).unwrap();
        assert_eq!((header.round, Control::parse(&header, body).unwrap()), (4, open));
        let mut newer = *head;
        newer[2] = 9;
        assert_eq!(Header::parse(&newer).unwrap_err().kind, ErrorKind::Unsupported);
    }
}
