//! Parts of a volume's layer between hosts, while its blocks follow a VM that has moved (`--disk on-demand`).
//!
//! ```text
//!   A (holds the right, lacks blocks)             B (has them)
//!   │ layer.read {disk_id, epoch, ranges} ──────► │   a reader waits: travels beside long transfers
//!   │ layer.pull {disk_id, epoch, ranges} ──────► │   nobody waits yet
//!   │ ◄────────── the ranges' bytes, in one piece │   or `refused`: not (or not yet, or no more) for A at this epoch
//! ```
//!
//! Invariant: B answers only the host that the metadata store names as the holder, at its epoch, and only while B's own
//! layer is fenced.
//!
//! Not here: which ranges B has (they came with the handover, `migrate.layer`), how calls travel (`host::link`).

use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, WireError};
use crate::id::{DiskId, Epoch};

/// Method: get what a reader waits for.
pub const METHOD_READ: &str = "layer.read";
/// Method: get what nobody waits for yet.
pub const METHOD_PULL: &str = "layer.pull";

/// The most bytes in one answer.
pub const BYTES_MAX: u64 = 1 << 20;
/// The most ranges in one question.
pub const RANGES_MAX: usize = 256;

/// Params of both methods; no payload. The answer is empty; its payload is the bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerAsk {
    /// Which layer.
    pub disk_id: DiskId,
    /// Epoch of the caller's right.
    pub epoch: Epoch,
    /// Offset and length of each range, bytes: multiples of 512.
    pub ranges: Vec<(u64, u64)>,
}

impl LayerAsk {
    /// Bytes of all ranges, if the question is one that may be asked.
    pub fn length(&self) -> Result<u64, WireError> {
        let bad = |why: &str| Err(WireError::new(ErrorKind::InvalidInput, format!("read a layer: {why}")));
        if self.ranges.len() > RANGES_MAX {
            return bad("too many ranges at once");
        }
        let mut all = 0u64;
        for (offset, length) in &self.ranges {
            if offset.checked_add(*length).is_none()
                || !offset.is_multiple_of(512)
                || !length.is_multiple_of(512)
            {
                return bad("an impossible range");
            }
            all = all.saturating_add(*length);
        }
        if all > BYTES_MAX {
            return bad("too many bytes at once");
        }
        Ok(all)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn impossible_questions_are_refused() {
        let ask = |ranges: &[(u64, u64)]| {
            let disk_id = DiskId(uuid::Uuid::nil());
            LayerAsk { disk_id, epoch: Epoch(2), ranges: ranges.to_vec() }.length()
        };
        assert_eq!(ask(&[]), Ok(0));
        assert_eq!(ask(&[(512, 512), (1 << 40, BYTES_MAX - 512)]), Ok(BYTES_MAX));
        for bad in [
            &[(0, BYTES_MAX + 512)][..],
            &[(0, BYTES_MAX), (0, 512)],
            &[(u64::MAX - 511, 1024)],
            &[(1, 512)],
            &[(0, 513)],
            &[(0, !511), (0, !511)],
            &[(0, 512); RANGES_MAX + 1],
        ] {
            assert!(ask(bad).is_err(), "{bad:?}");
        }
    }
}
