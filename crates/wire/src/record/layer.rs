//! Layers at rest: the format of a volume's writable part.
//!
//! A layer is a directory:
//!
//! ```text
//! header            two 4 KiB slots; the valid one with the higher generation counts       [Header]
//! segment.00000000  4 KiB segment head, then groups                                        [SegmentHead]
//! segment.00000001  …
//! map.00000007      a checkpoint: the extent map as of one place in the log                [checkpoint]
//! pull.map          which ranges another host still has (`--disk on-demand` only)           [runs]
//! lock              flock(2): exclusive for the one writable handle
//!
//! segment:  ┌──────┬───────┬────────┬────────┬─ ─┬───────┬────────┬─ ─      block = 4 KiB
//!           │ head │ index │ payload│ payload│   │ index │ payload│
//!           └──────┴───────┴────────┴────────┴─ ─┴───────┴────────┴─ ─
//! index:    64 entries of 64 bytes: a group head, then up to 63 records; zeros after the last
//! ```
//!
//! All numbers are little-endian. Payloads are whole 4 KiB blocks at 4 KiB places, so reads go straight from the page
//! cache to the guest and a dead payload can be punched out. The index costs 1 block in 64 where writes come
//! in streams, and 1 block per flush at worst: after a flush the next record opens a new group, so that **no
//! block is written again after it was reported durable**.
//!
//! Rules
//! * Every record is bound to the whole log before it: `chain` is the CRC of the entry before (the layer's
//!   salt for the first), `seq` counts by one. A segment belongs to one writable session; its head tells the `seq`
//!   and `chain` at which it goes on, and so cuts off whatever torn tail the segment before it has.
//! * A segment is durable before the next one is created.
//! * The log ends at the first entry or payload that is not what its CRC says, in the last segment only, and
//!   only above the highest `durable_seq` seen. Damage below is corruption and refuses to open.
//! * A checkpoint is a cache: its header fields say from which place on the log is replayed. If it is damaged the
//!   log is replayed from segment 0.
//! * `data_id` in the header changes, durably, before the first record of a writable session.
//! * A disk may become larger, never smaller: `size_bytes` rises in one update of the header, after or together with a
//!   change of `data_id`. So the last block, which may be short, is padded with zeros; what is behind the end of a
//!   layer's parent or image reads as zeros in the layer.
//! * A sealed layer is never written again, but for a merge that gives it a new `data_id` first. A child's header has
//!   its parent's `disk_id` and `data_id`; while the child is merged into its parent the second linkage has the
//!   parent's next `data_id`, and the link holds with either.
//! * Versions: a reader refuses a header whose version it does not know, or with an unknown bit in
//!   `features_required`; unknown bits in `features_ignorable` are kept as they are. Reserved bytes are zero.
//! * Sequence numbers are 1 to [`COUNT_MAX`], sessions, generations and numbers of
//!   checkpoints at most that; anything else is damage.
//! * Space is reclaimed in two ways. Payloads of records of which no block is live may be holes: replay does not read
//!   payloads below `durable_seq`. Below `first_segment` any segment of which no block is live may be absent: replay
//!   begins at the checkpoint, which is then written twice (`map.N.copy`) because nothing else has what it says.
//!
//! Not here: who may open a layer (`engine::disk::identity`), reading and writing (`host::disk`).

pub mod header;
pub mod log;
pub mod runs;
pub mod ship;

pub use header::{CheckpointRef, CleanEnd, Header, Parent, State};
pub use log::{Entry, EntryKind, GroupHead, LogPoint, SegmentHead};
pub use runs::{Run, RunKind};
pub use ship::{ShipChunk, ShipFrame, ShipPosition};

/// Unit of the map and of the log, bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// The same, for slices.
pub const BLOCK_LEN: usize = 4096;
/// Entries in an index block, the group head included.
pub const INDEX_ENTRIES: usize = 64;
/// Logical sector of the disks, bytes.
pub const SECTOR_BYTES: u32 = 512;
/// Length of one entry, bytes.
pub const ENTRY_LEN: usize = 64;
/// The most a record's payload has; a longer write is several records.
pub const PAYLOAD_BYTES_MAX: u64 = 1 << 20;
/// A group takes no further record once its payloads have this much, so that a reader of the log who goes group
/// by group never holds more than this and one record.
pub const GROUP_PAYLOAD_BYTES: u64 = 1 << 20;
/// The largest disk.
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// Blocks of a segment, unless a test wants it smaller (1 GiB).
pub const SEGMENT_BLOCKS: u32 = 1 << 18;
/// The most that a sequence number, a session, a generation or a checkpoint's number may be. No layer gets there in its life; a reader refuses a
/// file that says more, so that counting on from what a file says never wraps.
pub const COUNT_MAX: u64 = 1 << 62;
/// The only version of the format.
pub const VERSION: u32 = 1;

/// Little-endian fields of a fixed-size record, bounds-checked by construction: reads past the end give zeros.
pub(crate) mod field {
    /// `N` bytes at `at`.
    pub fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
        from.get(at..at + N).and_then(|slice| slice.try_into().ok()).unwrap_or([0; N])
    }
    /// A number at `at`.
    pub fn u32(from: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes(from, at))
    }
    /// A number at `at`.
    pub fn u64(from: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes(from, at))
    }
    /// A byte at `at`.
    pub fn u8(from: &[u8], at: usize) -> u8 {
        from.get(at).copied().unwrap_or(0)
    }
    /// Writes `what` at `at`; the caller's record is long enough.
    pub fn put(into: &mut [u8], at: usize, what: &[u8]) {
        if let Some(slot) = into.get_mut(at..at + what.len()) {
            slot.copy_from_slice(what);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    struct Random(u64);
    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 as usize % limit.max(1)
        }
    }

    fn decode_everything(bytes: &[u8]) {
        let _ = Header::decode(bytes);
        let _ = Header::newest([bytes, bytes.get(..bytes.len() / 2).unwrap_or_default()]);
        let _ = SegmentHead::decode(bytes);
        let _ = GroupHead::decode(bytes);
        let _ = Entry::decode(bytes).map(|(entry, _)| entry.payload_blocks());
        let _ = runs::decode(bytes);
        let _ = ShipChunk::decode(bytes);
        let _ = ShipPosition::decode(bytes);
    }

    /// Strangers' bytes: random ones, and good ones with damage whose checksums were made to fit again.
    #[test]
    fn no_bytes_make_a_decoder_panic() {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..20_000 {
            let length = [0, 24, 63, 64, 72, 100, 4095, 4096, 5000][random.below(9)];
            let mut bytes: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
            decode_everything(&bytes);
            let magic: &[u8] = [b"WHMBLYR1", b"WHMBSEG1", b"WHMBMAP1", b"WHMBSHP1"][random.below(4)];
            field::put(&mut bytes, 0, magic);
            field::put(&mut bytes, 8, &1u32.to_le_bytes());
            for (at, from, to) in [(0, 4, 64), (12, 16, 72), (12, 24, length)] {
                let mut sealed = bytes.clone();
                let crc = crc32c::crc32c(sealed.get(from..to).unwrap_or_default());
                field::put(&mut sealed, at, &crc.to_le_bytes());
                decode_everything(&sealed);
            }
            if length == 4096 {
                let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..]);
                field::put(&mut bytes, 12, &crc.to_le_bytes());
                decode_everything(&bytes);
            }
        }
    }
}
