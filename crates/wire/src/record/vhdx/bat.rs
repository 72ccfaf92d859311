//! Entries of the block allocation table (section 2.5).
//!
//! ```text
//!  bits 0-2 state   3-19 zeros   20-63 where in the file, MiB
//!
//!  BAT:  p p p … p b p p p … p b …      p: a payload block; b: the sector bitmap of the chunk of payload blocks before it
//! ```
//!
//! A bitmap block is 1 MiB: a bit per sector, the lowest bit of a byte first; set: the sector is in this file.
//!
//! Not here: which entry is whose (`engine::disk::vhdx`).

use super::{MIB, corrupt};
use crate::error::WireError;

const STATE_MASK: u64 = 7;
const OFFSET_SHIFT: u32 = 20;

/// What a payload block's entry says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadState {
    /// Not in this file: the parent's, or zeros.
    NotPresent,
    /// Nobody knows; whatever the file holds there may be somebody's secret, so it reads as zeros.
    Undefined,
    /// Zeros.
    Zero,
    /// Discarded; reads as zeros. QEMU of before the specification's version 1.00 wrote it as 5.
    Unmapped,
    /// All of it is in this file.
    Full,
    /// The sectors whose bit is set are in this file, the others the parent's.
    Partial,
}

/// What a sector bitmap's entry says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapState {
    /// No block of the chunk is partly here.
    NotPresent,
    /// It is there.
    Present,
}

/// One entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatEntry(pub u64);

impl BatEntry {
    /// Bytes of an entry.
    pub const LEN: u64 = 8;

    /// A payload block's entry; `offset` in bytes, whole MiB.
    pub fn of_payload(state: PayloadState, offset: u64) -> Self {
        let state = match state {
            PayloadState::NotPresent => 0,
            PayloadState::Undefined => 1,
            PayloadState::Zero => 2,
            PayloadState::Unmapped => 3,
            PayloadState::Full => 6,
            PayloadState::Partial => 7,
        };
        Self((offset / MIB) << OFFSET_SHIFT | state)
    }

    /// The entry of a sector bitmap that is there.
    pub fn of_bitmap(offset: u64) -> Self {
        Self((offset / MIB) << OFFSET_SHIFT | 6)
    }

    /// Where the block is, bytes. Of meaning only where the state says that there is one.
    pub fn offset(self) -> u64 {
        (self.0 >> OFFSET_SHIFT).saturating_mul(MIB)
    }

    /// The state of a payload block. `Corrupt`: a reserved one.
    pub fn payload(self) -> Result<PayloadState, WireError> {
        match self.0 & STATE_MASK {
            0 => Ok(PayloadState::NotPresent),
            1 => Ok(PayloadState::Undefined),
            2 => Ok(PayloadState::Zero),
            3 | 5 => Ok(PayloadState::Unmapped),
            6 => Ok(PayloadState::Full),
            7 => Ok(PayloadState::Partial),
            state => Err(corrupt("read block allocation table", format!("a block in state {state}"))),
        }
    }

    /// The state of a sector bitmap. `Corrupt`: a reserved one.
    pub fn bitmap(self) -> Result<BitmapState, WireError> {
        match self.0 & STATE_MASK {
            0 => Ok(BitmapState::NotPresent),
            6 => Ok(BitmapState::Present),
            state => Err(corrupt("read block allocation table", format!("a sector bitmap in state {state}"))),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn entries_read_back_and_reserved_states_are_refused() {
        use PayloadState::{Full, NotPresent, Partial, Undefined, Unmapped, Zero};
        for state in [NotPresent, Undefined, Zero, Unmapped, Full, Partial] {
            let entry = BatEntry::of_payload(state, 77 * MIB);
            assert_eq!((entry.payload().unwrap(), entry.offset()), (state, 77 * MIB));
        }
        assert_eq!(BatEntry(0x80_0006).payload().unwrap(), Full, "as QEMU wrote it");
        assert_eq!(BatEntry(0x80_0006).offset(), 8 * MIB);
        assert!(BatEntry(4).payload().is_err());
        let bitmap = BatEntry::of_bitmap(5 * MIB);
        assert_eq!((bitmap.bitmap().unwrap(), bitmap.offset()), (BitmapState::Present, 5 * MIB));
        assert_eq!(BatEntry(0).bitmap().unwrap(), BitmapState::NotPresent);
        assert!(BatEntry(7).bitmap().is_err());
        // 44 bits of MiB are more than 64 bits of bytes.
        assert_eq!(BatEntry(u64::MAX).offset(), ((1 << 44) - 1) * MIB);
    }
}
