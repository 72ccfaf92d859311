//! virtio-blk: what the device says about itself, and what a request asks for.
//!
//! ```text
//!  readable: type u32, reserved u32, sector u64, then data of a write       writable: data of a read, status u8
//! ```
//!
//! Parts may be cut anywhere; nothing is assumed about which descriptor holds what.
//!
//! Not here: rings and memory (`ring`, `guest_ram`), carrying requests out (`queue`).

use std::ops::Range;

use super::guest_ram::{Seg, copy_in};

/// Unit of all offsets and lengths on the wire.
pub(super) const SECTOR: u64 = 512;

/// Most bytes of one request; Linux sends at most a few MiB.
pub(super) const MAX_REQUEST_BYTES: u64 = 32 << 20;

/// Most ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 32;
/// Most sectors of one such range: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

/// What the guest is told about the disk.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) read_only: bool,
    pub(super) queues: u16,
    /// Answer to "get id": at most 20 bytes.
    pub(super) serial: String,
}

impl Identity {
    /// The device's own feature bits.
    ///
    /// CONFIG_WCE is not among them: a guest that switched the write cache off would not be believed by the next
    /// process that serves the device, since nothing carries that choice over.
    pub(super) fn features(&self) -> u64 {
        let mut bits = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
        if self.queues > 1 {
            bits |= F_MQ;
        }
        bits | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    /// The configuration space (`struct virtio_blk_config`, up to its write-zeroes fields) of a disk of that size.
    pub(super) fn config(&self, size_bytes: u64) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = space.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(0, &(size_bytes / SECTOR).to_le_bytes());
        put(12, &254_u32.to_le_bytes()); // seg_max: with header and status, the usual ring of 256
        put(20, &512_u32.to_le_bytes()); // blk_size
        put(24, &[3, 0]); // 2^3 sectors to a physical block, aligned
        put(26, &8_u16.to_le_bytes()); // min_io_size, sectors
        put(32, &[1]); // writeback
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
        put(44, &8_u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        space
    }
}

/// Whether `len` bytes from `offset` on lie on a disk of `size_bytes`, in whole sectors.
pub(super) fn holds(size_bytes: u64, offset: u64, len: u64) -> bool {
    len.is_multiple_of(SECTOR)
        && len <= MAX_REQUEST_BYTES
        && offset.checked_add(len).is_some_and(|end| end <= size_bytes)
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Other,
}

/// Bytes of the header before a write's data.
pub(super) const HEADER_BYTES: usize = 16;

/// Reads a request's header; `None` if it has none.
pub(super) fn ask(readable: &[Seg]) -> Option<Ask> {
    let mut header = [0; HEADER_BYTES];
    if !copy_in(readable, 0, &mut header) {
        return None;
    }
    let whole = u128::from_le_bytes(header);
    let sector = (whole >> 64) as u64;
    // A sector beyond 2^55 is beyond every disk; so is its offset.
    let offset = sector.saturating_mul(SECTOR);
    Some(match whole as u32 {
        0 => Ask::Read { offset },
        1 => Ask::Write { offset },
        4 => Ask::Flush,
        8 => Ask::GetId,
        11 => Ask::Discard,
        13 => Ask::WriteZeroes,
        _ => Ask::Other,
    })
}

/// The byte ranges of a discard or write-zeroes request; the status to answer with if they are wrong.
pub(super) fn ranges(size_bytes: u64, readable: &[Seg], discard: bool) -> Result<Vec<Range<u64>>, u8> {
    let total: usize = readable.iter().map(|seg| seg.len).sum();
    let bytes = total.saturating_sub(HEADER_BYTES);
    if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > MAX_RANGES as usize {
        return Err(S_IOERR);
    }
    let mut ranges = Vec::with_capacity(bytes / 16);
    for at in (HEADER_BYTES..total).step_by(16) {
        let mut raw = [0; 16];
        if !copy_in(readable, at, &mut raw) {
            return Err(S_IOERR);
        }
        let whole = u128::from_le_bytes(raw);
        let (sector, sectors, flags) = (whole as u64, (whole >> 64) as u32, (whole >> 96) as u32);
        // Only "unmap" exists, and only for write-zeroes.
        if flags & !1 != 0 || (discard && flags != 0) {
            return Err(S_UNSUPP);
        }
        let start = sector.checked_mul(SECTOR).ok_or(S_IOERR)?;
        let end = start.checked_add(u64::from(sectors) * SECTOR).ok_or(S_IOERR)?;
        if sectors > MAX_RANGE_SECTORS || end > size_bytes {
            return Err(S_IOERR);
        }
        ranges.push(start..end);
    }
    Ok(ranges)
}

#[cfg(test)]
mod test {
    use super::*;

    fn seg(bytes: &mut [u8]) -> Seg {
        Seg { gpa: 0, ptr: bytes.as_mut_ptr(), len: bytes.len() }
    }

    fn identity() -> Identity {
        Identity { read_only: false, queues: 4, serial: String::new() }
    }

    #[test]
    fn the_guest_is_told_of_a_write_back_cache_that_it_must_flush() {
        let identity = identity();
        assert_ne!(identity.features() & F_FLUSH, 0);
        assert_eq!(identity.features() & 1 << 11, 0, "CONFIG_WCE would not survive a restart");
        let config = identity.config(1 << 20);
        assert_eq!(config[32], 1);
        assert_eq!(&config[..8], &2048_u64.to_le_bytes());
        assert_eq!(&config[34..36], &4_u16.to_le_bytes());
    }

    #[test]
    fn a_header_cut_in_two_is_read_and_a_short_one_is_refused() {
        let mut whole = [0; 16];
        whole[0] = 1;
        whole[8] = 3;
        let (left, right) = whole.split_at_mut(7);
        assert_eq!(ask(&[seg(left), seg(right)]), Some(Ask::Write { offset: 3 * 512 }));
        assert_eq!(ask(&[seg(&mut [0; 15])]), None);
        assert_eq!(ask(&[seg(&mut [0xff; 16])]), Some(Ask::Other));
    }

    #[test]
    fn ranges_beyond_the_disk_or_of_a_strange_shape_are_refused() {
        let range = |sector: u64, sectors: u32, flags: u32| {
            let mut bytes = vec![0; 16];
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        };
        let parse = |mut bytes: Vec<u8>, discard| ranges(1 << 20, &[seg(&mut bytes)], discard);
        assert_eq!(parse(range(8, 8, 0), true), Ok(vec![Range { start: 4096, end: 8192 }]));
        assert_eq!(parse(range(8, 8, 1), false), Ok(vec![Range { start: 4096, end: 8192 }]));
        assert_eq!(parse(range(8, 8, 1), true), Err(S_UNSUPP));
        assert_eq!(parse(range(2047, 2, 0), true), Err(S_IOERR));
        assert_eq!(parse(range(u64::MAX, 1, 0), true), Err(S_IOERR));
        assert_eq!(parse(vec![0; 20], true), Err(S_IOERR));
        assert_eq!(parse(vec![0; 16], true), Err(S_IOERR));
        assert_eq!(parse(vec![0; 16 + 16 * 33], true), Err(S_IOERR));
    }

    #[test]
    fn what_does_not_lie_on_the_disk_in_whole_sectors_is_refused() {
        let holds = |offset, len| holds(1 << 20, offset, len);
        assert!(holds((1 << 20) - 512, 512));
        assert!(!holds((1 << 20) - 512, 1024));
        assert!(!holds(0, 100));
        assert!(!holds(u64::MAX - 100, 512));
    }
}
