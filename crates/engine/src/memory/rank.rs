//! Memory ranked by how often it changes (capability 4).
//!
//! A block of RAM is cut into segments of [`SEGMENT_PAGES`] pages. Every look at the pages that were written gives each
//! segment a number of pages over a time; the mean of that rate, in which what is [`TAU_S`] old weighs a third, is the
//! segment's change frequency.
//!
//! ```text
//!   looks at written pages ──► Ranking (mean rates) ──► Classes, one snapshot per round ──► order, links (`link_plan`)
//!                                                   └─► withheld: the hottest that fit the pause
//! ```
//!
//! Frequencies are compared in classes of factor two: rates within a class are as good as equal, and equal segments keep
//! the order of their addresses, so that neighbours are read and compressed together.
//!
//! Invariants
//! * Pure: time is an argument. The state is 4 bytes per segment (16 KiB for each GiB of RAM), whatever the guest does.
//! * A segment that is written more often in each of the same looks never has a lower class.
//!
//! Source: US8458284B2 (segments ranked by change frequency); the mean and the classes are ours.
//!
//! Not here: finding written pages (`host::guest::dirty`), sending (`host::memory::plan`).

/// Pages of a segment: 256 KiB, the unit in which pages are read and compressed together.
pub const SEGMENT_PAGES: u64 = 64;
/// How many classes there are.
pub const CLASSES: usize = 16;
/// After so many seconds without a write a rate is down to 1/e. Rounds of a fraction of it see it nearly constant; what
/// a guest did before the last few rounds is forgotten.
pub const TAU_S: f64 = 2.0;
/// Segments with fewer page writes per second than this are cold: class 0.
const COLD_PAGES_S: f32 = 1.0 / 16.0;

/// How often each segment of a block changes.
#[derive(Clone, Debug)]
pub struct Ranking {
    pages_s: Vec<f32>,
}

/// The class of each segment at one moment; 0 is coldest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes(Vec<u8>);

impl Ranking {
    /// A block of `pages` pages that nobody has seen change yet.
    pub fn new(pages: u64) -> Self {
        let segments = usize::try_from(pages.div_ceil(SEGMENT_PAGES)).unwrap_or(usize::MAX);
        Self { pages_s: vec![0.0; segments] }
    }

    /// Takes in a look: in the last `seconds` these segments had so many pages written; the others none. A segment
    /// beyond the end is ignored.
    pub fn observe(&mut self, seconds: f64, written: impl IntoIterator<Item = (usize, u32)>) {
        if seconds <= 0.0 || !seconds.is_finite() {
            return;
        }
        let keep = (-seconds / TAU_S).exp();
        // What one written page adds to the mean.
        let one = ((1.0 - keep) / seconds) as f32;
        for rate in &mut self.pages_s {
            *rate *= keep as f32;
        }
        for (segment, pages) in written {
            if let Some(rate) = self.pages_s.get_mut(segment) {
                *rate += pages as f32 * one;
            }
        }
    }

    /// The classes as they are now.
    pub fn classes(&self) -> Classes {
        Classes(self.pages_s.iter().map(|rate| class(*rate)).collect())
    }
}

/// The class of a rate: one more for each doubling.
fn class(pages_s: f32) -> u8 {
    if pages_s < COLD_PAGES_S {
        return 0;
    }
    let doublings = (pages_s / COLD_PAGES_S).log2();
    // Of a positive, finite number; casts saturate.
    (1 + doublings as u8).min(CLASSES as u8 - 1)
}

impl Classes {
    /// The class of a segment; 0 for one that is not known.
    pub fn of(&self, segment: usize) -> u8 {
        self.0.get(segment).copied().unwrap_or(0)
    }

    /// Adds so many pages of these segments to a count by class.
    pub fn count(&self, pages: impl IntoIterator<Item = (usize, u32)>, into: &mut [u64; CLASSES]) {
        for (segment, pages) in pages {
            if let Some(count) = into.get_mut(usize::from(self.of(segment))) {
                *count += u64::from(pages);
            }
        }
    }
}

/// The lowest class of those to be withheld: the hottest, whole classes, as long as all their pages together are at most
/// `budget_pages`. Nothing if not even the hottest class that has pages fits.
pub fn withhold_from(pages: &[u64; CLASSES], budget_pages: u64) -> Option<u8> {
    let mut left = budget_pages;
    let mut floor = None;
    for (class, pages) in (0..CLASSES as u8).zip(pages).rev() {
        let Some(rest) = left.checked_sub(*pages) else { break };
        left = rest;
        if *pages > 0 {
            floor = Some(class);
        }
    }
    floor
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Naive: the mean as an integral over the whole history, each look weighted with how long ago it was.
        #[test]
        fn the_mean_is_that_of_the_whole_history(
            looks in prop::collection::vec((0.001f64..1.0, 0u32..=64), 1..60),
        ) {
            let mut ranking = Ranking::new(SEGMENT_PAGES);
            for (seconds, pages) in &looks {
                ranking.observe(*seconds, [(0, *pages)]);
            }
            let mut naive = 0.0;
            let mut ago_s = 0.0;
            for (seconds, pages) in looks.iter().rev() {
                let rate = f64::from(*pages) / seconds;
                naive += rate * ((-ago_s / TAU_S).exp() - (-(ago_s + seconds) / TAU_S).exp());
                ago_s += seconds;
            }
            let found = f64::from(ranking.pages_s[0]);
            prop_assert!((found - naive).abs() <= 1e-3 * naive.max(1.0), "{found} {naive}");
        }

        #[test]
        fn who_is_written_more_in_every_look_is_not_colder(
            looks in prop::collection::vec((0.001f64..1.0, 0u32..=64, 0u32..=64), 1..40),
        ) {
            let mut ranking = Ranking::new(2 * SEGMENT_PAGES);
            for (seconds, a, b) in &looks {
                ranking.observe(*seconds, [(0, *a.min(b)), (1, *a.max(b)), (9, 1)]);
            }
            let classes = ranking.classes();
            prop_assert!(classes.of(0) <= classes.of(1));
            prop_assert!(usize::from(classes.of(1)) < CLASSES);
        }

        /// Naive: try every floor.
        #[test]
        fn withheld_is_as_much_as_fits_of_the_hottest(
            pages in prop::array::uniform16(0u64..100),
            budget in 0u64..1600,
        ) {
            let sum_from = |floor: usize| pages.iter().skip(floor).sum::<u64>();
            match withhold_from(&pages, budget) {
                None => prop_assert!((0..CLASSES).all(|floor| sum_from(floor) == 0 || sum_from(floor) > budget)),
                Some(floor) => {
                    let floor = usize::from(floor);
                    prop_assert!(sum_from(floor) <= budget && pages[floor] > 0);
                    let none_more = |lower| sum_from(lower) > budget || sum_from(lower) == sum_from(floor);
                    prop_assert!((0..floor).all(none_more));
                }
            }
        }
    }

    #[test]
    fn what_is_left_alone_gets_cold() {
        let mut ranking = Ranking::new(2 * SEGMENT_PAGES);
        for _ in 0..20 {
            ranking.observe(0.1, [(0, 64)]);
        }
        assert!(ranking.classes().of(0) > 10);
        assert_eq!(ranking.classes().of(1), 0);
        for _ in 0..200 {
            ranking.observe(0.1, [(1, 1)]);
        }
        assert_eq!(ranking.classes().of(0), 0);
        assert!(ranking.classes().of(1) > 0);
        ranking.observe(0.0, [(0, 64)]);
        ranking.observe(f64::NAN, [(0, 64)]);
        assert_eq!(ranking.classes().of(0), 0);
    }
}
