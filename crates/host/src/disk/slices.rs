//! Scattered buffers: length, checksum, zeros, and a window on them without allocation.

use std::io::{IoSlice, IoSliceMut};

use crate::error::Result;

/// Bytes of all slices.
pub(super) fn length(slices: &[IoSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Bytes of all slices.
pub(super) fn length_mut(slices: &[IoSliceMut<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// CRC-32C of all bytes in order.
pub(super) fn crc(slices: &[IoSlice<'_>]) -> u32 {
    slices.iter().fold(0, |crc, slice| crc32c::crc32c_append(crc, slice))
}

/// Fills with zeros.
pub(super) fn zero(slices: &mut [IoSliceMut<'_>]) {
    for slice in slices {
        slice.fill(0);
    }
}

/// Calls `each` with parts of `slices` that together are the bytes `skip..skip + take`, and with each part's offset from
/// `skip`. Whole slices go together; if the window is everything there is one call.
pub(super) fn window(
    slices: &mut [IoSliceMut<'_>],
    skip: u64,
    take: u64,
    mut each: impl FnMut(&mut [IoSliceMut<'_>], u64) -> Result<bool>,
) -> Result<bool> {
    let end = skip + take;
    let (mut at, mut next) = (0u64, 0usize);
    while let Some(slice) = slices.get(next).filter(|_| at < end) {
        let slice_end = at + slice.len() as u64;
        if slice_end <= skip {
            (at, next) = (slice_end, next + 1);
        } else if at >= skip && slice_end <= end {
            let (first, from) = (next, at);
            while let Some(slice) = slices.get(next).filter(|slice| at + slice.len() as u64 <= end) {
                (at, next) = (at + slice.len() as u64, next + 1);
            }
            if !each(slices.get_mut(first..next).unwrap_or_default(), from - skip)? {
                return Ok(false);
            }
        } else {
            let part = skip.max(at)..end.min(slice_end);
            let bytes = slices.get_mut(next).map(|slice| &mut slice[..]).unwrap_or_default();
            let bytes =
                bytes.get_mut((part.start - at) as usize..(part.end - at) as usize).unwrap_or_default();
            if !each(&mut [IoSliceMut::new(bytes)], part.start - skip)? {
                return Ok(false);
            }
            (at, next) = (slice_end, next + 1);
        }
    }
    Ok(true)
}

/// The bytes `skip..skip + take` of `slices`.
pub(super) fn part<'a>(slices: &'a [IoSlice<'a>], skip: u64, take: u64) -> Vec<IoSlice<'a>> {
    let (mut at, end) = (0u64, skip + take);
    let mut parts = Vec::new();
    for slice in slices {
        let slice_end = at + slice.len() as u64;
        let (from, to) = (skip.max(at), end.min(slice_end));
        if from < to {
            let bytes = slice.get((from - at) as usize..(to - at) as usize).unwrap_or_default();
            parts.push(IoSlice::new(bytes));
        }
        at = slice_end;
    }
    parts
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_window_is_the_bytes_it_names(
            lengths in proptest::collection::vec(0..9usize, 0..8), skip in 0..40u64, take in 0..40u64
        ) {
            let total: usize = lengths.iter().sum();
            let mut bytes: Vec<u8> = (0..total as u8).collect();
            let expected: Vec<u8> = bytes.iter().copied().skip(skip as usize).take(take as usize).collect();
            let mut slices = Vec::new();
            let mut rest = bytes.as_mut_slice();
            for length in lengths {
                let (slice, after) = rest.split_at_mut(length);
                slices.push(IoSliceMut::new(slice));
                rest = after;
            }
            let mut seen = vec![];
            window(&mut slices, skip, take, |parts, offset| {
                assert_eq!(offset, seen.len() as u64);
                seen.extend(parts.iter().flat_map(|part| part.iter().copied()));
                Ok(true)
            }).unwrap();
            prop_assert_eq!(&seen, &expected);
            let shared: Vec<IoSlice<'_>> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
            let parts = part(&shared, skip, take);
            prop_assert_eq!(crc(&parts), crc32c::crc32c(&expected));
        }
    }
}
