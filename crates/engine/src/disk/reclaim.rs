//! Which space of a layer's log is freed next.
//!
//! ```text
//!   segment:   live blocks, and what it takes on disk
//!     nothing live ─────────────────────────────► Drop    the whole file
//!     much dead since the last look ────────────► Punch   payloads of records of which nothing is live; costs no copy
//!     live ≤ half of what it takes (index, and
//!     records that are dead in part) ───────────► Move    what is live to the end of the log, then Drop
//! ```
//!
//! The log is appended to for ever, so what is overwritten stays until this says otherwise. Punching comes first because
//! it costs no write; what it cannot free is the index (a block per flush at worst) and the rest of long records. A move
//! writes at most as much as it frees, so a layer never writes more than twice what its guest does because of it.
//!
//! Invariants: the segment that is being appended to is neither moved nor dropped, nor one that was begun since the look
//! began: what is live in it may have been counted too early. What is chosen frees at least
//! [`PIECE_BLOCKS`], or is a whole segment; so choosing again and again comes to an end.
//!
//! Not here: how it is done safely, and at which rate (`host::disk`).

/// Less dead space than this in a segment is left alone, 4 KiB blocks (4 MiB).
pub const PIECE_BLOCKS: u32 = 1024;

/// A segment as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentUse {
    /// Its number.
    pub segment: u32,
    /// Blocks that the map points to.
    pub live_blocks: u32,
    /// Blocks that the file takes on disk.
    pub disk_blocks: u32,
    /// Live blocks when its dead records were last punched out; none if never since the layer was opened.
    pub live_at_punch: Option<u32>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Remove the segment: nothing in it is live.
    Drop(u32),
    /// Punch out the records of the segment of which nothing is live.
    Punch(u32),
    /// Append what is live in the segment once more, so that nothing in it is.
    Move(u32),
}

/// The next piece of work; `tail` is the segment that was being appended to when counting began, `piece_blocks` what is too little to care
/// ([`PIECE_BLOCKS`]).
pub fn choose(segments: &[SegmentUse], tail: u32, piece_blocks: u32) -> Option<Work> {
    // Nothing is appended to those any more, so what is live in them only becomes less.
    let closed = || segments.iter().filter(|segment| segment.segment < tail);
    if let Some(empty) = closed().find(|segment| segment.live_blocks == 0) {
        return Some(Work::Drop(empty.segment));
    }
    let dead_since = |segment: &SegmentUse| {
        let known = segment.live_at_punch.unwrap_or(segment.disk_blocks);
        let taken = segment.disk_blocks.saturating_sub(segment.live_blocks);
        known.saturating_sub(segment.live_blocks).min(taken)
    };
    let punch = segments.iter().max_by_key(|segment| dead_since(segment));
    if let Some(segment) = punch.filter(|segment| dead_since(segment) >= piece_blocks.max(1)) {
        return Some(Work::Punch(segment.segment));
    }
    let frees =
        |segment: &SegmentUse| segment.disk_blocks.saturating_sub(2 * segment.live_blocks.min(u32::MAX / 2));
    let moved = closed().filter(|s| s.live_blocks <= s.disk_blocks / 2).max_by_key(|segment| frees(segment));
    moved.filter(|segment| frees(segment) >= piece_blocks.max(1)).map(|segment| Work::Move(segment.segment))
}

/// Whether it is time to look, after so much was appended since the last look to a layer that takes so much on disk.
/// A look costs time in proportion to the map, so it is taken in proportion to what can have died.
pub fn due(appended_blocks: u64, disk_blocks: u64) -> bool {
    appended_blocks >= (disk_blocks / 16).max(4 * u64::from(PIECE_BLOCKS))
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// A log in which each record is some blocks long, each block live or not.
    #[derive(Clone, Debug, Default)]
    struct Segment {
        /// Live blocks, blocks in all, whether it is punched out.
        records: Vec<(u32, u32, bool)>,
        dropped: bool,
        live_at_punch: Option<u32>,
    }

    impl Segment {
        fn live(&self) -> u32 {
            self.records.iter().map(|(live, _, _)| live).sum()
        }
        /// With an index block per record.
        fn on_disk(&self) -> u32 {
            self.records.iter().map(|(_, all, punched)| 1 + if *punched { 0 } else { *all }).sum()
        }
    }

    fn segment() -> impl Strategy<Value = Segment> {
        let record = (1..300u32, 0..=100u32, 0..3u8).prop_map(|(all, share, kind)| match kind {
            0 => (0, all, false),
            1 => (all, all, false),
            _ => (all * share / 100, all, false),
        });
        proptest::collection::vec(record, 0..80).prop_map(|records| Segment { records, ..Segment::default() })
    }

    proptest! {
        /// Carried out until nothing is chosen: it ends, keeps every live block, moves no more than it frees, and
        /// leaves little that is dead.
        #[test]
        fn what_is_dead_is_freed_and_what_is_live_is_kept(mut log in proptest::collection::vec(segment(), 1..12)) {
            let live_before: u64 = log.iter().map(|segment| u64::from(segment.live())).sum();
            let mut appended = 0u64;
            for turn in 0.. {
                prop_assert!(turn < 1000, "it does not end");
                let uses: Vec<SegmentUse> = (0u32..).zip(&log).filter(|(_, s)| !s.dropped).map(|(n, s)| SegmentUse {
                    segment: n,
                    live_blocks: s.live(),
                    disk_blocks: s.on_disk(),
                    live_at_punch: s.live_at_punch,
                }).collect();
                let tail = log.len() as u32 - 1;
                match choose(&uses, tail, PIECE_BLOCKS) {
                    None => break,
                    Some(Work::Drop(n)) => {
                        prop_assert!(n != tail && log[n as usize].live() == 0);
                        log[n as usize].dropped = true;
                    }
                    Some(Work::Punch(n)) => {
                        let segment = &mut log[n as usize];
                        segment.live_at_punch = Some(segment.live());
                        segment.records.iter_mut().filter(|r| r.0 == 0).for_each(|r| r.2 = true);
                    }
                    Some(Work::Move(n)) => {
                        prop_assert!(n != tail);
                        let (live, on_disk) = (log[n as usize].live(), log[n as usize].on_disk());
                        prop_assert!(live * 2 <= on_disk);
                        appended += u64::from(live);
                        log[n as usize].records.iter_mut().for_each(|r| r.0 = 0);
                        log[tail as usize].records.push((live, live, false));
                    }
                }
            }
            let live: u64 = log.iter().filter(|s| !s.dropped).map(|s| u64::from(s.live())).sum();
            prop_assert_eq!(live, live_before);
            prop_assert!(appended <= live_before);
            for segment in log.iter().rev().skip(1).filter(|segment| !segment.dropped) {
                let left = segment.on_disk().saturating_sub(2 * segment.live());
                prop_assert!(left < PIECE_BLOCKS, "{left} blocks of dead space stay");
            }
        }
    }

    #[test]
    fn a_segment_begun_since_the_look_began_is_left_alone() {
        let empty =
            |segment| SegmentUse { segment, live_blocks: 0, disk_blocks: 9000, live_at_punch: Some(0) };
        assert_eq!(choose(&[empty(4), empty(5)], 4, PIECE_BLOCKS), None);
        assert_eq!(choose(&[empty(3), empty(5)], 4, PIECE_BLOCKS), Some(Work::Drop(3)));
    }

    #[test]
    fn a_look_is_taken_in_proportion() {
        assert!(!due(4095, 0) && due(4096, 0));
        assert!(!due(1 << 16, 1 << 28) && due(1 << 24, 1 << 28));
    }
}
