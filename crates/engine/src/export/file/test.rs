//! Every decision against one that looks at each byte.

use proptest::prelude::*;

use super::*;

fn file(size_bytes: u64) -> File {
    File { size_bytes, read_only: false, mode: 0o600, uid: 0, gid: 0 }
}

/// A map as one flag per byte, and its runs as a disk would tell them, cut short now and then.
fn extent_of(bytes: &[bool], at: u64, longest: u64) -> (u64, bool) {
    let rest = &bytes[at as usize..];
    let run = rest.iter().take_while(|data| **data == rest[0]).count() as u64;
    (run.min(longest), rest[0])
}

proptest! {
    #[test]
    fn reads_and_writes_stay_inside(size in 0..5000_u64, offset in 0..6000_u64, length in 0..6000_u64) {
        let named: Vec<u64> = (offset..offset + length).filter(|byte| *byte < size).collect();
        let range = admit_read(&file(size), offset, length);
        prop_assert_eq!(range.clone().collect::<Vec<_>>(), named.clone());
        match admit_write(&file(size), offset, length) {
            Ok(written) => prop_assert_eq!(written, range),
            Err(refusal) => {
                prop_assert_eq!(refusal, Refusal::BehindTheEnd);
                prop_assert!(length > 0 && named.is_empty());
            }
        }
        let read_only = File { read_only: true, ..file(size) };
        prop_assert_eq!(admit_write(&read_only, offset, length), Err(Refusal::ReadOnly));
    }

    #[test]
    fn a_cut_is_the_range_and_its_edges_lie_in_one_sector_each(start in 0..3000_u64, length in 0..3000_u64) {
        let Cut { head, whole, tail } = cut(start..start + length);
        let all: Vec<u64> = head.clone().chain(whole.clone()).chain(tail.clone()).collect();
        prop_assert_eq!(all, (start..start + length).collect::<Vec<_>>());
        if !whole.is_empty() {
            prop_assert!(whole.start.is_multiple_of(SECTOR_BYTES) && whole.end.is_multiple_of(SECTOR_BYTES));
        }
        for edge in [head, tail] {
            if !edge.is_empty() {
                prop_assert_eq!(edge.start / SECTOR_BYTES, (edge.end - 1) / SECTOR_BYTES);
                prop_assert!(edge.end - edge.start < SECTOR_BYTES);
            }
        }
    }

    #[test]
    fn sectors_hold_the_range_and_none_too_many(start in 0..3000_u64, length in 0..3000_u64) {
        let named: std::collections::BTreeSet<u64> =
            (start..start + length).map(|byte| byte / SECTOR_BYTES).collect();
        let held = sectors(&(start..start + length));
        prop_assert!(held.start.is_multiple_of(SECTOR_BYTES) && held.end.is_multiple_of(SECTOR_BYTES));
        let held: std::collections::BTreeSet<u64> =
            (held.start / SECTOR_BYTES..held.end / SECTOR_BYTES).collect();
        prop_assert_eq!(held, named);
    }

    #[test]
    fn a_seek_finds_what_a_look_at_every_byte_finds(
        runs in prop::collection::vec((any::<bool>(), 1..9_usize), 0..8),
        offset in 0..80_u64,
        longest in 1..20_u64,
        data: bool,
    ) {
        let bytes: Vec<bool> = runs.iter().flat_map(|(data, length)| vec![*data; *length]).collect();
        let size = bytes.len() as u64;
        let what = if data { Seek::Data } else { Seek::Hole };
        let found: Result<_, ()> = seek(&file(size), offset, what, |at| Ok(extent_of(&bytes, at, longest)));
        let mut naive = (offset..size).find(|at| bytes[*at as usize] == data);
        if naive.is_none() && !data && offset < size {
            naive = Some(size);
        }
        prop_assert_eq!(found, Ok(naive.ok_or(Refusal::NothingThere)));
    }

    #[test]
    fn blocks_are_counted_and_never_too_few(
        runs in prop::collection::vec((any::<bool>(), 1..9_usize), 0..8),
        longest in 1..20_u64,
        runs_max in 0..12_usize,
    ) {
        let bytes: Vec<bool> = runs.iter().flat_map(|(data, length)| vec![*data; *length]).collect();
        let size = bytes.len() as u64;
        let exact = bytes.iter().filter(|data| **data).count() as u64;
        let extent = |at| Ok::<_, ()>(extent_of(&bytes, at, longest));
        prop_assert_eq!(allocated(&file(size), bytes.len(), extent), Ok(exact));
        let some = allocated(&file(size), runs_max, extent).unwrap();
        prop_assert!(some >= exact && some <= size);
    }

    #[test]
    fn a_range_becomes_zeros_only_inside_the_file(
        size in 0..5000_u64, offset in 0..6000_u64, length in 1..6000_u64, mode in 0..0x80_u32
    ) {
        let inside = admit_read(&file(size), offset, length);
        let wanted = match mode {
            3 => Ok((Zeroing::Discard, inside)),
            0x10 if offset + length > size => Err(Refusal::BehindTheEnd),
            0x10 | 0x11 => Ok((Zeroing::Zeroes, inside)),
            _ => Err(Refusal::Unsupported),
        };
        prop_assert_eq!(admit_allocate(&file(size), mode, offset, length), wanted);
        let read_only = File { read_only: true, ..file(size) };
        prop_assert_eq!(admit_allocate(&read_only, mode, offset, length), Err(Refusal::ReadOnly));
    }

    #[test]
    fn attributes_stay_as_they_are(
        size in prop::option::of(0..3_u64), mode in prop::option::of(0..2_u32), uid in prop::option::of(0..2_u32),
        gid in prop::option::of(0..2_u32)
    ) {
        let file = File { size_bytes: 1, read_only: false, mode: 0o600, uid: 1, gid: 0 };
        // With the bits of a regular file, as they come.
        let mode = mode.map(|execute| 0o100_600 | execute);
        let same = size.unwrap_or(1) == 1
            && mode.unwrap_or(0o100_600) == 0o100_600
            && uid.unwrap_or(1) == 1
            && gid.unwrap_or(0) == 0;
        let change = Change { size_bytes: size, mode, uid, gid };
        prop_assert_eq!(admit_change(&file, &change), if same { Ok(()) } else { Err(Refusal::Fixed) });
    }
}
