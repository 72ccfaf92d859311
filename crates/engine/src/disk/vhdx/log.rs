//! Which entries of a log are to be replayed (section 2.3.2).
//!
//! ```text
//!   the log is a ring:   … old old [e7]─[e8]─[e9] …          a sequence: entries end to end, numbers rising by one
//!                                  ▲           └ head        valid: the head's tail is an entry of it
//!                                  └ tail of e9              active: the valid one whose head has the highest number
//! ```
//!
//! Invariant: the entries of the active sequence from its head's tail on, in order, bring the file to the state that was
//! promised last; whatever stands elsewhere in the ring is older, or torn.
//!
//! Not here: whether bytes are a whole entry (`wire::record::vhdx::log` and who reads the file).

use std::collections::BTreeMap;

/// A whole entry, by its place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its length, bytes; not 0.
    pub bytes: u32,
    /// Where the oldest entry that goes with it begins.
    pub tail: u32,
    /// Its number.
    pub sequence: u64,
}

/// Places of the entries to replay, oldest first; `None`: the log holds no valid sequence.
///
/// `entries` are the whole ones by place, `log_bytes` is the length of the ring; no two of them lie over each other.
pub fn active(entries: &BTreeMap<u32, Entry>, log_bytes: u32) -> Option<Vec<u32>> {
    let next = |at: u32, entry: &Entry| {
        let end = (u64::from(at) + u64::from(entry.bytes)) % u64::from(log_bytes.max(1));
        let end = u32::try_from(end).ok()?;
        entries.get(&end).filter(|after| after.sequence == entry.sequence.wrapping_add(1)).map(|_| end)
    };
    // An entry that none leads to begins a sequence. Numbers rise along it, so that it cannot bite its tail.
    let followers: std::collections::BTreeSet<u32> =
        entries.iter().filter_map(|(at, entry)| next(*at, entry)).collect();
    let mut best: Option<(u64, Vec<u32>)> = None;
    for (first, _) in entries.iter().filter(|(at, _)| !followers.contains(at)) {
        let mut places = Vec::new();
        // A head's tail names an entry that is in the sequence already.
        let mut valid = None;
        let mut at = Some(*first);
        while let Some((place, entry)) = at.and_then(|at| entries.get(&at).map(|entry| (at, entry))) {
            places.push(place);
            at = next(place, entry);
            if at.is_none() {
                let tail = places.iter().position(|place| *place == entry.tail);
                valid = tail.map(|tail| (entry.sequence, tail));
            }
        }
        let Some((sequence, tail)) = valid else { continue };
        if best.as_ref().is_none_or(|(highest, _)| sequence > *highest) {
            best = Some((sequence, places.split_off(tail)));
        }
    }
    best.map(|(_, places)| places)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn entry(sectors: u32, tail: u32, sequence: u64) -> Entry {
        Entry { bytes: sectors * 4096, tail: tail * 4096, sequence }
    }

    fn ring(entries: &[(u32, Entry)]) -> BTreeMap<u32, Entry> {
        entries.iter().map(|(at, entry)| (at * 4096, *entry)).collect()
    }

    fn sectors(found: Option<Vec<u32>>) -> Option<Vec<u32>> {
        found.map(|places| places.iter().map(|place| place / 4096).collect())
    }

    #[test]
    fn the_newest_valid_sequence_counts_from_its_tail_on() {
        let log = ring(&[
            (0, entry(2, 0, 1)),
            (2, entry(2, 0, 2)),
            (4, entry(3, 2, 3)),
            // Not followed by number 4 at once: another, older life of the ring.
            (10, entry(2, 10, 1)),
        ]);
        assert_eq!(sectors(active(&log, 256 * 4096)), Some(vec![2, 4]));
        assert_eq!(active(&BTreeMap::new(), 4096), None);
    }

    #[test]
    fn a_sequence_goes_round_the_end_of_the_ring() {
        let log = ring(&[(250, entry(4, 250, 8)), (254, entry(4, 250, 9)), (2, entry(2, 254, 10))]);
        assert_eq!(sectors(active(&log, 256 * 4096)), Some(vec![254, 2]));
    }

    #[test]
    fn a_head_whose_tail_was_overwritten_makes_no_sequence() {
        let log = ring(&[(4, entry(2, 0, 7)), (6, entry(2, 0, 8)), (20, entry(2, 20, 3))]);
        assert_eq!(sectors(active(&log, 256 * 4096)), Some(vec![20]));
        // One entry that fills the ring and follows itself only in place.
        let whole = ring(&[(0, entry(256, 0, 1))]);
        assert_eq!(sectors(active(&whole, 256 * 4096)), Some(vec![0]));
    }

    /// The specification's own procedure: from every place, the longest sequence; of the valid ones that with the
    /// highest number at its head.
    fn tried_from_everywhere(entries: &BTreeMap<u32, Entry>, log_bytes: u32) -> Option<Vec<u32>> {
        let mut best: Option<(u64, Vec<u32>)> = None;
        for start in (0..log_bytes).step_by(4096) {
            let (mut run, mut at): (Vec<(u32, Entry)>, u32) = (Vec::new(), start);
            while let Some(found) = entries.get(&at) {
                if run.last().is_some_and(|(_, last)| last.sequence + 1 != found.sequence) {
                    break;
                }
                run.push((at, *found));
                at = (at + found.bytes) % log_bytes;
            }
            let Some((_, head)) = run.last().copied() else { continue };
            let Some(tail) = run.iter().position(|(at, _)| *at == head.tail) else { continue };
            // Longer ones with the same head hold the same entries from the tail on.
            if best.as_ref().is_none_or(|(highest, _)| head.sequence > *highest) {
                best = Some((head.sequence, run[tail..].iter().map(|(at, _)| *at).collect()));
            }
        }
        best.map(|(_, places)| places)
    }

    proptest! {
        /// A ring that was written round and round, of which some entries were torn.
        #[test]
        fn what_counts_is_what_trying_from_everywhere_finds(
            start in 0u32..32, first in 1u64..9,
            written in proptest::collection::vec((1u32..6, 0usize..4, proptest::bool::weighted(0.15)), 0..60)
        ) {
            const RING: u32 = 32;
            let mut log: BTreeMap<u32, Entry> = BTreeMap::new();
            let (mut at, mut sequence, mut places) = (start, first, Vec::new());
            for (length, back, torn) in written {
                for over in 0..length {
                    let sector = (at + over) % RING;
                    log.retain(|place, old| (sector + RING - place / 4096) % RING >= old.bytes / 4096);
                }
                places.push(at);
                let tail = places[places.len() - 1 - back.min(places.len() - 1)];
                if !torn {
                    log.insert(at * 4096, entry(length, tail, sequence));
                }
                sequence += 1;
                at = (at + length) % RING;
            }
            prop_assert_eq!(active(&log, RING * 4096), tried_from_everywhere(&log, RING * 4096));
        }
    }
}
