//! The header: who this layer is, who may open it, where its log begins and ends.
//!
//! ```text
//!   0 magic "WHMBLYR1"   8 version   12 crc32c of the other 4092 bytes   16 generation
//!  24 features_required  32 features_ignorable   40 disk_id   56 data_id   72 size_bytes   80 epoch
//!  88 salt   96 session   104 segment_blocks   108 first_segment   112 state   113 parent kind
//! 120 parent (image id, 32 B; or disk id 16 B + data id 16 B)
//! 160 clean end: present u8; 164 LogPoint (20 B)
//! 192 checkpoint: present u8; 196 LogPoint; 216 number; 224 runs; 232 BLAKE3 (32 B)
//! 272 receiving: ShipPosition (52 B)
//! 328 sector_bytes   332 second linkage: present u8; 336 data id (16 B)
//! ```

use crate::error::{ErrorKind, WireError};
use crate::id::{DataId, DiskId, Epoch, ImageId};
use crate::record::layer::field::{self, put};
use crate::record::layer::log::LogPoint;
use crate::record::layer::ship::ShipPosition;
use crate::record::layer::{BLOCK_LEN, COUNT_MAX, DISK_BYTES_MAX, SECTOR_BYTES, VERSION};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"WHMBLYR1";

/// What a layer lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parent {
    /// Nothing: unwritten blocks read as zeros.
    None,
    /// An immutable image.
    Image(ImageId),
    /// Another layer, with what its readers saw when this one was made.
    Layer {
        /// The parent's identity.
        disk_id: DiskId,
        /// The parent's content.
        data_id: DataId,
    },
}

/// How complete a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Whole; may be opened.
    Ready,
    /// Being received from another host; nobody may open it. Says up to where it is durable here.
    Receiving(ShipPosition),
    /// Blocks named in `pull.map` are still at another host.
    Pulling,
    /// A snapshot: other layers lie, or may lie, on it. Nobody writes it.
    Sealed,
}

/// The layer was closed in order: its log ends exactly here.
pub type CleanEnd = LogPoint;

/// The newest checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointRef {
    /// Replay goes on from here.
    pub covers: LogPoint,
    /// The file is `map.NUMBER`.
    pub number: u64,
    /// Runs in the file.
    pub runs: u64,
    /// BLAKE3 of the file's bytes.
    pub hash: [u8; 32],
}

/// One slot of the header file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Rises by one with each update; picks the slot (even 0, odd 1) and the newer of two valid ones.
    pub generation: u64,
    /// Features that a reader must know. None in this version.
    pub features_required: u64,
    /// Features that a reader may ignore; kept as they are.
    pub features_ignorable: u64,
    /// Identity, for life.
    pub disk_id: DiskId,
    /// Identity of what readers see.
    pub data_id: DataId,
    /// What the layer lies on.
    pub parent: Parent,
    /// While this layer is merged into its parent: the content that the parent has from the merge's first change on.
    /// The link holds with either of the two.
    pub second_linkage: Option<DataId>,
    /// Logical sector of the disk, bytes.
    pub sector_bytes: u32,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// The newest epoch at which the layer was opened or fenced; older ones are refused.
    pub epoch: Epoch,
    /// Random; stands in every group head, so that a guest's data cannot look like a group.
    pub salt: u64,
    /// Counts writable opens.
    pub session: u64,
    /// Length of a segment, 4 KiB blocks.
    pub segment_blocks: u32,
    /// Segments below may be absent; from here on all are there. The checkpoint covers at least all below.
    pub first_segment: u32,
    /// How complete the layer is.
    pub state: State,
    /// Where the log ends, if the layer was closed in order.
    pub clean_end: Option<CleanEnd>,
    /// The newest checkpoint.
    pub checkpoint: Option<CheckpointRef>,
}

impl Header {
    /// Length of one slot, bytes.
    pub const LEN: usize = BLOCK_LEN;

    /// Where this generation is written in the header file, bytes.
    pub fn slot_offset(&self) -> u64 {
        (self.generation % 2) * Self::LEN as u64
    }

    /// The slot's bytes.
    pub fn encode(&self) -> Box<[u8; Self::LEN]> {
        let mut out = Box::new([0u8; Self::LEN]);
        let to = out.as_mut_slice();
        put(to, 0, MAGIC);
        put(to, 8, &VERSION.to_le_bytes());
        put(to, 16, &self.generation.to_le_bytes());
        put(to, 24, &self.features_required.to_le_bytes());
        put(to, 32, &self.features_ignorable.to_le_bytes());
        put(to, 40, self.disk_id.0.as_bytes());
        put(to, 56, self.data_id.0.as_bytes());
        put(to, 72, &self.size_bytes.to_le_bytes());
        put(to, 80, &self.epoch.0.to_le_bytes());
        put(to, 88, &self.salt.to_le_bytes());
        put(to, 96, &self.session.to_le_bytes());
        put(to, 104, &self.segment_blocks.to_le_bytes());
        put(to, 108, &self.first_segment.to_le_bytes());
        match &self.state {
            State::Ready => {}
            State::Receiving(position) => {
                put(to, 112, &[1]);
                put(to, 272, &position.encode());
            }
            State::Pulling => put(to, 112, &[2]),
            State::Sealed => put(to, 112, &[3]),
        }
        match self.parent {
            Parent::None => {}
            Parent::Image(id) => {
                put(to, 113, &[1]);
                put(to, 120, &id.0);
            }
            Parent::Layer { disk_id, data_id } => {
                put(to, 113, &[2]);
                put(to, 120, disk_id.0.as_bytes());
                put(to, 136, data_id.0.as_bytes());
            }
        }
        if let Some(end) = &self.clean_end {
            put(to, 160, &[1]);
            put(to, 164, &end.encode());
        }
        if let Some(checkpoint) = &self.checkpoint {
            put(to, 192, &[1]);
            put(to, 196, &checkpoint.covers.encode());
            put(to, 216, &checkpoint.number.to_le_bytes());
            put(to, 224, &checkpoint.runs.to_le_bytes());
            put(to, 232, &checkpoint.hash);
        }
        put(to, 328, &self.sector_bytes.to_le_bytes());
        if let Some(second) = &self.second_linkage {
            put(to, 332, &[1]);
            put(to, 336, second.0.as_bytes());
        }
        let crc = checksum(to);
        put(to, 12, &crc.to_le_bytes());
        out
    }

    /// Reads one slot.
    ///
    /// `Corrupt` if it is not a whole slot, `Unsupported` if a newer release wrote it.
    pub fn decode(from: &[u8]) -> Result<Self, WireError> {
        let corrupt = |why: &str| WireError::new(ErrorKind::Corrupt, format!("read layer header: {why}"));
        if from.len() != Self::LEN || field::bytes::<8>(from, 0) != *MAGIC {
            return Err(corrupt("no magic"));
        }
        if field::u32(from, 12) != checksum(from) {
            return Err(corrupt("checksum differs"));
        }
        let newer = |what: String| {
            WireError::new(ErrorKind::Unsupported, format!("read layer header: {what}"))
                .hint("a newer release wrote this layer: update this host")
        };
        if field::u32(from, 8) != VERSION {
            return Err(newer(format!("version {} (known: {VERSION})", field::u32(from, 8))));
        }
        let features_required = field::u64(from, 24);
        if features_required != 0 {
            return Err(newer(format!("unknown required features {features_required:#x}")));
        }
        let header = Self {
            generation: field::u64(from, 16),
            features_required,
            features_ignorable: field::u64(from, 32),
            disk_id: DiskId(uuid_at(from, 40)),
            data_id: DataId(uuid_at(from, 56)),
            parent: match field::u8(from, 113) {
                0 => Parent::None,
                1 => Parent::Image(ImageId(field::bytes(from, 120))),
                2 => {
                    Parent::Layer { disk_id: DiskId(uuid_at(from, 120)), data_id: DataId(uuid_at(from, 136)) }
                }
                other => return Err(newer(format!("parent kind {other}"))),
            },
            second_linkage: (field::u8(from, 332) == 1).then(|| DataId(uuid_at(from, 336))),
            // A layer made before the field was: they all had these.
            sector_bytes: match field::u32(from, 328) {
                0 => SECTOR_BYTES,
                other => other,
            },
            size_bytes: field::u64(from, 72),
            epoch: Epoch(field::u64(from, 80)),
            salt: field::u64(from, 88),
            session: field::u64(from, 96),
            segment_blocks: field::u32(from, 104),
            first_segment: field::u32(from, 108),
            state: match field::u8(from, 112) {
                0 => State::Ready,
                1 => State::Receiving(ShipPosition::decode(from.get(272..).unwrap_or_default())?),
                2 => State::Pulling,
                3 => State::Sealed,
                other => return Err(newer(format!("state {other}"))),
            },
            clean_end: match field::u8(from, 160) {
                1 => Some(LogPoint::decode(from, 164)?),
                _ => None,
            },
            checkpoint: match field::u8(from, 192) {
                1 => Some(CheckpointRef {
                    covers: LogPoint::decode(from, 196)?,
                    number: field::u64(from, 216),
                    runs: field::u64(from, 224),
                    hash: field::bytes(from, 232),
                }),
                _ => None,
            },
        };
        let checkpoint = header.checkpoint.map_or(0, |checkpoint| checkpoint.number);
        for (what, number) in
            [("generation", header.generation), ("session", header.session), ("checkpoint", checkpoint)]
        {
            if number > COUNT_MAX {
                return Err(corrupt(&format!("{what} {number}")));
            }
        }
        if header.size_bytes == 0
            || !header.size_bytes.is_multiple_of(512)
            || header.size_bytes > DISK_BYTES_MAX
        {
            return Err(corrupt(&format!("a disk of {} bytes", header.size_bytes)));
        }
        if !matches!(header.sector_bytes, 512 | 4096)
            || !header.size_bytes.is_multiple_of(header.sector_bytes.into())
        {
            return Err(corrupt(&format!("sectors of {} bytes", header.sector_bytes)));
        }
        if header.segment_blocks < 8 || !header.segment_blocks.is_power_of_two() {
            return Err(corrupt(&format!("segments of {} blocks", header.segment_blocks)));
        }
        Ok(header)
    }

    /// The newer valid one of two slots. An `Unsupported` slot wins over a valid one, so that an older release
    /// never goes on from a state that a newer one has left behind.
    pub fn newest(slots: [&[u8]; 2]) -> Result<Self, WireError> {
        match slots.map(Self::decode) {
            [Err(error), _] | [_, Err(error)] if error.kind == ErrorKind::Unsupported => Err(error),
            [Ok(a), Ok(b)] => Ok(if a.generation >= b.generation { a } else { b }),
            [Ok(header), Err(_)] | [Err(_), Ok(header)] => Ok(header),
            [Err(error), Err(_)] => Err(error),
        }
    }
}

fn uuid_at(from: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes(field::bytes(from, at))
}

/// Of everything but the checksum itself.
fn checksum(slot: &[u8]) -> u32 {
    let (before, after) = slot.split_at(12.min(slot.len()));
    crc32c::crc32c_append(crc32c::crc32c(before), after.get(4..).unwrap_or_default())
}

#[cfg(test)]
mod test {
    use super::*;

    fn header() -> Header {
        Header {
            generation: 9,
            features_required: 0,
            features_ignorable: 1 << 40,
            disk_id: DiskId(Uuid::from_u128(1)),
            data_id: DataId(Uuid::from_u128(2)),
            parent: Parent::Layer {
                disk_id: DiskId(Uuid::from_u128(3)),
                data_id: DataId(Uuid::from_u128(4)),
            },
            second_linkage: Some(DataId(Uuid::from_u128(5))),
            sector_bytes: 512,
            size_bytes: 10 << 30,
            epoch: Epoch(5),
            salt: 6,
            session: 7,
            segment_blocks: 256,
            first_segment: 0,
            state: State::Receiving(ShipPosition { at: LogPoint::START, chain: [8; 32] }),
            clean_end: Some(LogPoint { segment: 1, block: 2, seq: 3, chain: 4 }),
            checkpoint: Some(CheckpointRef {
                covers: LogPoint { segment: 5, block: 6, seq: 7, chain: 8 },
                number: 9,
                runs: 10,
                hash: [11; 32],
            }),
        }
    }

    #[test]
    fn a_header_reads_back() {
        for parent in [Parent::None, Parent::Image(ImageId([7; 32])), header().parent] {
            for state in [State::Ready, State::Pulling, State::Sealed, header().state] {
                let second_linkage = header().second_linkage.filter(|_| state != State::Ready);
                let header = Header { parent, state, second_linkage, ..header() };
                assert_eq!(Header::decode(header.encode().as_slice()).unwrap(), header);
            }
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = header().encode();
        for bit in (0..Header::LEN * 8).step_by(7) {
            let mut bad = *good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
        assert!(Header::decode(&good[..100]).is_err());
    }

    #[test]
    fn numbers_from_which_counting_on_would_wrap_are_damage() {
        let refused = |header: Header| Header::decode(header.encode().as_slice()).unwrap_err().kind;
        let point = |seq| LogPoint { segment: 1, block: 2, seq, chain: 4 };
        for seq in [0, COUNT_MAX + 1, u64::MAX] {
            let checkpoint =
                header().checkpoint.map(|checkpoint| CheckpointRef { covers: point(seq), ..checkpoint });
            let state = State::Receiving(ShipPosition { at: point(seq), chain: [0; 32] });
            assert_eq!(refused(Header { clean_end: Some(point(seq)), ..header() }), ErrorKind::Corrupt);
            assert_eq!(refused(Header { checkpoint, ..header() }), ErrorKind::Corrupt);
            assert_eq!(refused(Header { state, ..header() }), ErrorKind::Corrupt);
        }
        assert_eq!(refused(Header { session: u64::MAX, ..header() }), ErrorKind::Corrupt);
        assert_eq!(refused(Header { generation: u64::MAX, ..header() }), ErrorKind::Corrupt);
    }

    #[test]
    fn the_newer_valid_slot_counts_and_a_newer_release_is_refused() {
        let old = header().encode();
        let new = Header { generation: 10, ..header() }.encode();
        assert_eq!(Header::newest([old.as_slice(), new.as_slice()]).unwrap().generation, 10);
        let mut torn = *new;
        torn[2000] ^= 1;
        assert_eq!(Header::newest([old.as_slice(), &torn]).unwrap().generation, 9);
        let future = Header { features_required: 2, ..header() }.encode();
        let error = Header::newest([old.as_slice(), future.as_slice()]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(Header::newest([&torn, &torn]).is_err());
    }
}
