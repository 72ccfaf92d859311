//! References: pages that are named instead of sent, because the target is thought to hold their bytes already.
//!
//! Payload of a references frame: for each page of its runs, in order, [`REFERENCE_BYTES`] little-endian bytes.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | object: the RAM block (encoding 7), or the disk by its place in the VM's list of volumes (encoding 8) |
//! | 2 | 2 | reserved, 0 |
//! | 4 | 4 | index: the page of that block, or the 4 KiB block of the image under that disk |
//! | 8 | 16 | the first 16 bytes of the page's BLAKE3 |
//!
//! What is named may have become another page since: the hash decides, and a target that does not find it says which
//! pages it lacks ([`Missing`]). The frame's check is over the references themselves.
//!
//! Not here: which pages are named (`engine::memory::reference`), looking them up (`host::memory::reference`).

use serde::{Deserialize, Serialize};

/// Bytes of one reference.
pub const REFERENCE_BYTES: usize = 24;
/// Bytes of a page's hash.
pub const HASH_BYTES: usize = 16;
/// The most runs of pages that a target says it lacks after a round.
pub const MISSING_RUNS_MAX: usize = 4096;

/// Names the bytes of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// A RAM block, or a disk; see the module.
    pub object: u16,
    /// A page of it, or a block of 4 KiB.
    pub index: u32,
    /// The first bytes of the page's BLAKE3.
    pub hash: [u8; HASH_BYTES],
}

impl Reference {
    /// Appends the reference to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.object.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.hash);
    }

    /// Reads a reference from a stranger's bytes; none if its reserved bits are set.
    pub fn parse(bytes: &[u8; REFERENCE_BYTES]) -> Option<Self> {
        let (head, hash) = bytes.split_first_chunk::<8>()?;
        let [o0, o1, 0, 0, i0, i1, i2, i3] = *head else { return None };
        let (object, index) = (u16::from_le_bytes([o0, o1]), u32::from_le_bytes([i0, i1, i2, i3]));
        Some(Self { object, index, hash: *hash.first_chunk()? })
    }
}

/// Pages that a target lacks: block, first page, pages. Ascending and disjoint within a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing(pub u16, pub u32, pub u32);

/// Pages that were not found, by how they had been sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Misses {
    /// As changes to a version that the target did not have.
    pub delta: u64,
    /// As equal to another page of the guest's.
    pub same: u64,
    /// As equal to a block of its disks' images.
    pub disk: u64,
}

impl Misses {
    /// Whether every page was found.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Adds those of another part of the work.
    pub fn add(&mut self, other: &Self) {
        self.delta += other.delta;
        self.same += other.same;
        self.disk += other.disk;
    }
}

/// What makes a page shorter and has to be known at both ends. A name that a release does not know is ignored by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Technique {
    /// Pages as changes to the version sent before: encodings 5 and 6.
    Delta,
    /// Pages named by an equal page: encoding 7.
    Same,
    /// Pages named by an equal block of an image: encoding 8.
    Disk,
    /// One of a later release.
    #[serde(other)]
    Unknown,
}
