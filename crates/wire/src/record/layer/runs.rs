//! Runs of the extent map: the body of checkpoints (`map.N`) and of `pull.map`.
//!
//! ```text
//! file: 0 magic "WHMBMAP1"  8 version  12 crc32c of the runs  16 count   then `count` runs, sorted, apart
//! run (16 B): 0 first block u64 (the two top bits are the kind: 1 zero, 2 data)   8 blocks u32   12 place u32, 0 for zeros
//! ```
//!
//! `place` counts 4 KiB blocks over all segments: `segment × segment_blocks + block`.

use crate::error::{ErrorKind, WireError};
use crate::record::layer::field;
use crate::record::layer::{BLOCK_BYTES, DISK_BYTES_MAX, VERSION};

const MAGIC: &[u8; 8] = b"WHMBMAP1";
const KIND_SHIFT: u32 = 62;

/// What is at a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Zeros.
    Zero,
    /// Payload, from this place of the log on, 4 KiB blocks.
    Data(u32),
}

/// A run of blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First 4 KiB block of the disk.
    pub start: u64,
    /// Its length, blocks; not 0.
    pub blocks: u32,
    /// What is there.
    pub kind: RunKind,
}

impl Run {
    /// Encoded length, bytes.
    pub const LEN: usize = 16;

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let (kind, place) = match self.kind {
            RunKind::Zero => (1u64, 0),
            RunKind::Data(place) => (2, place),
        };
        let mut out = [0; Self::LEN];
        field::put(&mut out, 0, &(self.start | kind << KIND_SHIFT).to_le_bytes());
        field::put(&mut out, 8, &self.blocks.to_le_bytes());
        field::put(&mut out, 12, &place.to_le_bytes());
        out
    }

    fn decode(from: &[u8]) -> Option<Self> {
        let (first, place) = (field::u64(from, 0), field::u32(from, 12));
        let run = Self {
            start: first & !(3 << KIND_SHIFT),
            blocks: field::u32(from, 8),
            kind: match first >> KIND_SHIFT {
                1 if place == 0 => RunKind::Zero,
                2 => RunKind::Data(place),
                _ => return None,
            },
        };
        let blocks_max = DISK_BYTES_MAX / BLOCK_BYTES;
        (run.blocks > 0 && run.start < blocks_max && run.start + u64::from(run.blocks) <= blocks_max)
            .then_some(run)
    }

    /// The block after the last.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.blocks)
    }
}

/// The first 24 bytes of a file of runs.
pub fn encode_head(runs: &[u8]) -> [u8; 24] {
    let mut out = [0; 24];
    field::put(&mut out, 0, MAGIC);
    field::put(&mut out, 8, &VERSION.to_le_bytes());
    field::put(&mut out, 12, &crc32c::crc32c(runs).to_le_bytes());
    field::put(&mut out, 16, &((runs.len() / Run::LEN) as u64).to_le_bytes());
    out
}

/// A whole file of runs.
pub fn encode(runs: impl IntoIterator<Item = Run>) -> Vec<u8> {
    let mut body = vec![0; 24];
    for run in runs {
        body.extend_from_slice(&run.encode());
    }
    let head = encode_head(body.get(24..).unwrap_or_default());
    field::put(&mut body, 0, &head);
    body
}

/// Reads a file of runs: they are sorted and do not overlap.
pub fn decode(from: &[u8]) -> Result<Vec<Run>, WireError> {
    let corrupt = |why: &str| WireError::new(ErrorKind::Corrupt, format!("read extent map: {why}"));
    if from.len() < 24 || field::bytes::<8>(from, 0) != *MAGIC {
        return Err(corrupt("no magic"));
    }
    if field::u32(from, 8) != VERSION {
        return Err(WireError::new(ErrorKind::Unsupported, "read extent map: unknown version"));
    }
    let body = from.get(24..).unwrap_or_default();
    let whole = body.len() % Run::LEN == 0 && field::u64(from, 16) == (body.len() / Run::LEN) as u64;
    if !whole || field::u32(from, 12) != crc32c::crc32c(body) {
        return Err(corrupt("checksum or length differs"));
    }
    let mut runs = Vec::with_capacity(body.len() / Run::LEN);
    let mut end = 0;
    for bytes in body.chunks_exact(Run::LEN) {
        let run = Run::decode(bytes).ok_or_else(|| corrupt("an impossible run"))?;
        if run.start < end {
            return Err(corrupt("runs overlap"));
        }
        end = run.end();
        runs.push(run);
    }
    Ok(runs)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn runs_read_back_and_damage_is_noticed() {
        let runs = vec![
            Run { start: 0, blocks: 3, kind: RunKind::Data(77) },
            Run { start: 3, blocks: 1, kind: RunKind::Zero },
            Run { start: 1 << 30, blocks: u32::MAX >> 4, kind: RunKind::Data(0) },
        ];
        let bytes = encode(runs.iter().copied());
        assert_eq!(decode(&bytes).unwrap(), runs);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
        let overlapping = [runs[1], Run { start: 2, ..runs[1] }];
        assert!(decode(&encode(overlapping)).is_err());
    }
}
