//! How a disk becomes larger: which sizes it may take, and in which order who learns of it.
//!
//! ```text
//!   record of the volume ──► header of its layer, with a new data_id ──► map, size ──► front-ends, guests
//!   (the intent, durable)    (durable, one write)                        (readers see more from here on)
//! ```
//!
//! A crash after the record leaves a layer smaller than its record says; whoever opens it next makes it as large. No
//! order leaves a layer larger than its record, so a target that makes room by the record has room for the layer.
//!
//! Invariants
//! * Disks do not become smaller: what a guest keeps at the end would be lost, and layers below would stick out.
//! * What a disk gains reads as zeros; a layer's parents keep their size ([`super::identity::check_chain`]).
//!
//! Not here: doing any of it (`host::volume::resize`, `host::disk`).

use whimbrel_wire::record::layer::{DISK_BYTES_MAX, SECTOR_BYTES};
use whimbrel_wire::size::show_bytes;
use whimbrel_wire::{ErrorKind, WireError};

/// What is to be done about a disk of `size_bytes` that is to have `asked_bytes`; the latter is rounded up to whole
/// sectors, as when a volume is made. None: it has that size.
///
/// `InvalidInput`: it would become smaller, or larger than a disk can be.
pub fn grow_to(size_bytes: u64, asked_bytes: u64) -> Result<Option<u64>, WireError> {
    let refuse = |why: String| WireError::new(ErrorKind::InvalidInput, why);
    let next = asked_bytes.checked_next_multiple_of(SECTOR_BYTES.into());
    let Some(next) = next.filter(|next| *next <= DISK_BYTES_MAX) else {
        let most = show_bytes(DISK_BYTES_MAX);
        return Err(refuse(format!("a disk has at most {most}, not {asked_bytes} bytes")));
    };
    if next < size_bytes {
        let why = format!(
            "it has {size_bytes} bytes and would lose what is behind byte {next}: disks become larger only"
        );
        return Err(refuse(why).hint(
            "make a smaller volume and copy what is needed inside the guest, or leave the end of this one unused",
        ));
    }
    Ok((next > size_bytes).then_some(next))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn disks_become_larger_in_whole_sectors_up_to_the_largest() {
        assert_eq!(grow_to(1 << 20, 2 << 20).unwrap(), Some(2 << 20));
        assert_eq!(grow_to(1 << 20, (1 << 20) + 1).unwrap(), Some((1 << 20) + 512));
        assert_eq!(grow_to(1 << 20, DISK_BYTES_MAX).unwrap(), Some(DISK_BYTES_MAX));
        for same in [1 << 20, (1 << 20) - 511] {
            assert_eq!(grow_to(1 << 20, same).unwrap(), None);
        }
        for bad in [0, 1, (1 << 20) - 512, DISK_BYTES_MAX + 1, u64::MAX] {
            let error = grow_to(1 << 20, bad).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidInput, "{bad}");
        }
        let error = grow_to(1 << 20, 4096).unwrap_err();
        assert!(error.to_string().contains("1048576 bytes") && error.hint.is_some(), "{error}");
    }
}
