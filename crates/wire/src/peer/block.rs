//! Image blocks and bitmaps between hosts: the methods `image.manifest`, `image.bitmap`, `image.have`, `image.block`.
//!
//! ```text
//!   A                                             B
//!   │ image.manifest {image, offset, length} ────► │   only if A does not have it
//!   │ ◄──────────────── {size} + part of the file  │
//!   │ image.bitmap {image, blocks} + A's bitmap ─► │   A joins the swarm of the image: both learn of each other
//!   │ ◄───────────────── {blocks} + B's bitmap     │
//!   │ image.have {image, here, gone} ────────────► │   batched changes, at least 50 ms apart
//!   │ image.block {image, index, on_demand} ─────► │
//!   │ ◄── {answer: here, …} + the block's bytes    │   or not_have, busy
//! ```
//!
//! Bitmaps are payloads: bit `i` of the bitmap is bit `i % 8` of byte `i / 8`; trailing zero bytes are left out.
//!
//! Invariants: a block is asked for by image and index, and served only to hosts entitled to that image: a hash
//! alone opens nothing. Bytes are verified by whoever gets them.
//!
//! Not here: whom to ask (`engine::image::read`), how calls travel (`host::link`).

use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, WireError};
use crate::id::ImageId;

/// Method: get a part of a manifest.
pub const METHOD_MANIFEST: &str = "image.manifest";
/// Method: exchange bitmaps.
pub const METHOD_BITMAP: &str = "image.bitmap";
/// Method: tell changes of one's bitmap.
pub const METHOD_HAVE: &str = "image.have";
/// Method: get a block.
pub const METHOD_BLOCK: &str = "image.block";

/// The most blocks an image has: 64 TiB of 128 KiB blocks. Bounds what a stranger can make us allocate (64 MiB).
pub const BLOCKS_MAX: u64 = 1 << 29;
/// The most runs in one `image.have`.
pub const RUNS_MAX: usize = 4096;

/// The most bytes of a manifest in one answer.
pub const MANIFEST_PART_BYTES: u64 = 1 << 20;

/// Params of `image.manifest`; no payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestAsk {
    /// Which image.
    pub image: ImageId,
    /// Where the part starts, bytes.
    pub offset: u64,
    /// How long it is at most, bytes; at most [`MANIFEST_PART_BYTES`] are sent.
    pub length: u64,
}

/// The answer to `image.manifest`; the payload is the part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestReply {
    /// Size of the whole manifest, bytes.
    pub size_bytes: u64,
}

/// Params of `image.bitmap`; the payload is the caller's bitmap. The answer has the same form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapHello {
    /// Which image.
    pub image: ImageId,
    /// How many blocks it has; a host that disagrees refuses.
    pub blocks: u64,
}

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first block.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Params of `image.have`; no payload. The answer is empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// Which image.
    pub image: ImageId,
    /// Blocks that are now in the caller's cache, verified.
    #[serde(default)]
    pub here: Vec<Run>,
    /// Blocks that no longer are.
    #[serde(default)]
    pub gone: Vec<Run>,
    /// The caller has closed the image and answers no more questions about it.
    #[serde(default)]
    pub leaves: bool,
}

/// Params of `image.block`; no payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockAsk {
    /// Which image.
    pub image: ImageId,
    /// Which block.
    pub index: u64,
    /// Whether to fetch it from the seed store if it is not here, because the caller takes us for its home.
    #[serde(default)]
    pub on_demand: bool,
}

/// How a host answers for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockAnswer {
    /// The payload is the block, uncompressed.
    Here,
    /// It is not here (any more).
    NotHave,
    /// Too much to do: ask somebody else.
    Busy,
}

/// The answer to `image.block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockReply {
    /// What became of the question.
    pub answer: BlockAnswer,
}

/// Gathers ascending blocks into runs, at most [`RUNS_MAX`] at a time; the rest stays in the iterator.
pub fn runs(blocks: &mut std::iter::Peekable<impl Iterator<Item = u64>>) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    while let Some(&block) = blocks.peek() {
        if let Some(run) = out.last_mut().filter(|run| run.first + run.count == block) {
            run.count += 1;
        } else if out.len() == RUNS_MAX {
            break;
        } else {
            out.push(Run { first: block, count: 1 });
        }
        blocks.next();
    }
    out
}

/// Which blocks of an image somebody has.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitmap {
    blocks: u64,
    words: Vec<u64>,
}

impl Bitmap {
    /// No block of `blocks`.
    pub fn new(blocks: u64) -> Self {
        let words = blocks.min(BLOCKS_MAX).div_ceil(64);
        Self { blocks, words: vec![0; usize::try_from(words).unwrap_or(0)] }
    }

    /// How many blocks it speaks of.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    fn place(&self, block: u64) -> Option<(usize, u64)> {
        let word = usize::try_from(block / 64).ok()?;
        (block < self.blocks && word < self.words.len()).then_some((word, 1 << (block % 64)))
    }

    /// Whether the block is there; `false` outside.
    pub fn has(&self, block: u64) -> bool {
        self.place(block).is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Adds a block; whether that changed anything.
    pub fn insert(&mut self, block: u64) -> bool {
        let Some((word, bit)) = self.place(block) else { return false };
        let was = self.words[word];
        self.words[word] |= bit;
        was & bit == 0
    }

    /// Removes a block; whether that changed anything.
    pub fn remove(&mut self, block: u64) -> bool {
        let Some((word, bit)) = self.place(block) else { return false };
        let was = self.words[word];
        self.words[word] &= !bit;
        was & bit != 0
    }

    /// How many blocks are there.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The blocks that are there, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0u64..).zip(&self.words).flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = u64::from(rest.trailing_zeros());
                (rest != 0).then(|| {
                    rest &= rest - 1;
                    index * 64 + bit
                })
            })
        })
    }

    /// The form in which it travels.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        bytes
    }

    /// Reads what a stranger sent as a bitmap of `blocks` blocks.
    pub fn from_bytes(blocks: u64, bytes: &[u8]) -> Result<Self, WireError> {
        let bad = |why: &str| Err(WireError::new(ErrorKind::InvalidInput, format!("read a bitmap: {why}")));
        if blocks > BLOCKS_MAX {
            return bad("more blocks than an image has");
        }
        if bytes.len() as u64 > blocks.div_ceil(8) {
            return bad("longer than its image");
        }
        let mut map = Self::new(blocks);
        for (word, part) in map.words.iter_mut().zip(bytes.chunks(8)) {
            *word = part.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        let spare = blocks % 64;
        if spare != 0 && map.words.last().is_some_and(|last| last >> spare != 0) {
            return bad("bits beyond the image's end");
        }
        Ok(map)
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {})", self.count(), self.blocks)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_bitmap_travels_and_nonsense_is_refused() {
        let mut map = Bitmap::new(70);
        assert!(map.insert(3) && map.insert(69) && !map.insert(69) && !map.insert(70));
        let back = Bitmap::from_bytes(70, &map.to_bytes()).unwrap();
        assert_eq!(back, map);
        assert_eq!(back.iter().collect::<Vec<_>>(), [3, 69]);
        assert_eq!(back.count(), 2);
        assert!(map.remove(3) && !map.remove(3) && !map.has(3));
        assert!(Bitmap::from_bytes(70, &[0xff; 9]).is_err(), "bits 70 and 71 do not exist");
        assert!(Bitmap::from_bytes(70, &[0; 10]).is_err());
        assert!(Bitmap::from_bytes(u64::MAX, &[]).is_err());
        assert_eq!(Bitmap::from_bytes(70, &[]).unwrap().count(), 0);
    }

    #[test]
    fn blocks_gather_into_runs() {
        let mut some = [1, 2, 3, 7, 9, 10].into_iter().peekable();
        let got: Vec<_> = runs(&mut some).into_iter().map(|run| (run.first, run.count)).collect();
        assert_eq!(got, [(1, 3), (7, 1), (9, 2)]);
        let mut many = (0..RUNS_MAX as u64 + 5).map(|i| i * 2).peekable();
        assert_eq!(runs(&mut many).len(), RUNS_MAX);
        assert_eq!(runs(&mut many).len(), 5);
    }
}
