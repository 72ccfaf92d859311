//! Ranges of a disk that are being written: one that a sector is read, changed and written back for is nobody else's
//! meanwhile.
//!
//! Invariant: of two ranges that overlap and are held at the same time, none is held alone.

use std::ops::Range;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Between two looks whether a waiter is still wanted.
const POLL: Duration = Duration::from_millis(100);

struct Hold {
    id: u64,
    range: Range<u64>,
    alone: bool,
}

#[derive(Default)]
struct State {
    next_id: u64,
    held: Vec<Hold>,
}

impl State {
    fn take(&mut self, range: &Range<u64>, alone: bool) -> Option<u64> {
        let conflicts = |hold: &Hold| {
            (alone || hold.alone) && hold.range.start < range.end && range.start < hold.range.end
        };
        if self.held.iter().any(conflicts) {
            return None;
        }
        self.next_id += 1;
        self.held.push(Hold { id: self.next_id, range: range.clone(), alone });
        Some(self.next_id)
    }
}

/// See the module's charter.
#[derive(Default)]
pub(super) struct Ranges {
    state: Mutex<State>,
    freed: Condvar,
}

/// A range that is held until this is dropped.
pub(super) struct Held<'a> {
    ranges: &'a Ranges,
    id: u64,
}

impl Ranges {
    /// Holds `range`, if nobody is in the way.
    pub(super) fn try_hold(&self, range: &Range<u64>, alone: bool) -> Option<Held<'_>> {
        let id = self.state.lock().take(range, alone)?;
        Some(Held { ranges: self, id })
    }

    /// Holds `range`, waiting for who is in the way; `None` once `give_up` says so.
    pub(super) fn hold(
        &self,
        range: &Range<u64>,
        alone: bool,
        give_up: impl Fn() -> bool,
    ) -> Option<Held<'_>> {
        let mut state = self.state.lock();
        loop {
            if let Some(id) = state.take(range, alone) {
                return Some(Held { ranges: self, id });
            }
            if give_up() {
                return None;
            }
            self.freed.wait_for(&mut state, POLL);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.ranges.state.lock();
        state.held.retain(|hold| hold.id != self.id);
        self.ranges.freed.notify_all();
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nobody_is_beside_one_who_is_alone(
            steps in prop::collection::vec((0..40_u64, 1..10_u64, any::<bool>(), any::<bool>()), 1..40)
        ) {
            let ranges = Ranges::default();
            let mut held: Vec<(Range<u64>, bool, Held<'_>)> = Vec::new();
            for (start, length, alone, release) in steps {
                if release && !held.is_empty() {
                    held.remove(start as usize % held.len());
                    continue;
                }
                let range = start..start + length;
                let overlaps = |other: &Range<u64>| other.clone().any(|byte| range.contains(&byte));
                let free = held.iter().all(|(other, theirs, _)| !(overlaps(other) && (alone || *theirs)));
                match ranges.try_hold(&range, alone) {
                    Some(taken) => {
                        prop_assert!(free);
                        held.push((range, alone, taken));
                    }
                    None => prop_assert!(!free),
                }
            }
        }
    }

    #[test]
    fn who_waits_goes_on_when_the_range_is_free_and_gives_up_when_told() {
        let ranges = Ranges::default();
        let held = ranges.try_hold(&(0..512), true);
        assert!(ranges.hold(&(0..512), false, || true).is_none());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| ranges.hold(&(0..1024), false, || false).is_some());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiter.is_finished());
            drop(held);
            assert!(waiter.join().unwrap());
        });
    }
}
