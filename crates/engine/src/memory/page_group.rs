//! Groups of pages that one write fault opens, and which way of following writes costs less (capability 10).
//!
//! Two ways, of which the host's `guest::capture` uses one at a time:
//!
//! | way | a guest's write to an armed page | cost |
//! |---|---|---|
//! | [`Capture::Pages`] | the kernel opens that page by itself and remembers | one short fault for each page |
//! | [`Capture::Groups`] | the agent opens an aligned group around the page | one long fault for each group; what the guest did not change of it is sent again for nothing |
//!
//! ```text
//!   after every scan:  Looked ──► PageGroups::observe ──► size of a group, 2 … 256 pages
//!     Writes or Looked ──► Estimate ──► choose ──► Pages or Groups; near the pause always Pages
//! ```
//!
//! The counter that the size follows adds a sampled page that had changed when its group was armed again, and takes
//! one off that had not. Below zero more than half was wasted: the size is halved. With three quarters changed, and
//! faults enough to be worth saving, it is doubled.
//!
//! Invariants
//! * A group holds the faulting page, is contiguous and aligned to its size, a power of two of at least two pages; only
//!   the end of a block cuts it short.
//! * One observation changes the size by one step at most.
//!
//! Source: US 9110702 B2, claims 1 and 2. Not here: the faults (`host::guest::fault`), when to pause (`precopy`).

use std::ops::Range;

/// The smallest group, pages.
pub const GROUP_MIN_PAGES: u64 = 2;
/// The largest, pages.
pub const GROUP_MAX_PAGES: u64 = 256;
/// A copy begins with this size, pages.
const GROUP_FIRST_PAGES: u64 = 8;
/// Fewer sampled pages say nothing yet; they are kept for the next decision.
const TELLING_PAGES: u64 = 64;
/// Fewer faults are not worth saving.
const TELLING_FAULTS: u64 = 32;
/// Groups must be expected to cost this share of what single pages cost before they are begun.
const WORTH: f64 = 0.5;
/// And are given up when they cost this share.
const NOT_WORTH: f64 = 0.9;
/// Below this share of the time, what following single pages costs is not worth a change.
const NOTICEABLE: f64 = 0.01;
/// Groups are begun only if sending what is dirty takes longer than this, milliseconds.
const FAR_MS: f64 = 2000.0;
/// And given up when it takes less than this.
const NEAR_MS: f64 = 500.0;

/// The group that a fault at `page` opens, in a block of `pages` pages.
pub fn group_of(page: u64, size_pages: u64, pages: u64) -> Range<u64> {
    let size = size_pages.next_power_of_two().clamp(GROUP_MIN_PAGES, GROUP_MAX_PAGES);
    let start = page & !(size - 1);
    start..start.saturating_add(size).min(pages.max(page.saturating_add(1)))
}

/// What was seen between two scans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Write faults that were served.
    pub faults: u64,
    /// Pages that they opened; all of these are sent again.
    pub opened_pages: u64,
    /// Pages of opened groups that were looked at before and after.
    pub sampled_pages: u64,
    /// Those of them whose bytes were the same.
    pub unchanged_pages: u64,
}

/// The size of groups; see the module's charter.
#[derive(Clone, Debug)]
pub struct PageGroups {
    size_pages: u64,
    changed: u64,
    unchanged: u64,
    faults: u64,
}

impl Default for PageGroups {
    fn default() -> Self {
        Self { size_pages: GROUP_FIRST_PAGES, changed: 0, unchanged: 0, faults: 0 }
    }
}

impl PageGroups {
    /// The size of the groups that faults open from now on, pages.
    pub fn size_pages(&self) -> u64 {
        self.size_pages
    }

    /// Takes note of what happened since the last scan; the size from now on.
    pub fn observe(&mut self, looked: &Looked) -> u64 {
        let unchanged = looked.unchanged_pages.min(looked.sampled_pages);
        self.changed += looked.sampled_pages - unchanged;
        self.unchanged += unchanged;
        self.faults += looked.faults;
        let sampled = self.changed + self.unchanged;
        if sampled < TELLING_PAGES {
            return self.size_pages;
        }
        if self.unchanged > self.changed {
            self.size_pages = (self.size_pages / 2).max(GROUP_MIN_PAGES);
        } else if self.unchanged * 4 <= sampled && self.faults >= TELLING_FAULTS {
            self.size_pages = (self.size_pages * 2).min(GROUP_MAX_PAGES);
        }
        (self.changed, self.unchanged, self.faults) = (0, 0, 0);
        self.size_pages
    }
}

/// How writes are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Capture {
    /// Asynchronously, page by page.
    #[default]
    Pages,
    /// By faults that open groups.
    Groups,
}

/// What is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// Whichever costs less.
    #[default]
    Auto,
    /// Only this one.
    Always(Capture),
}

/// What things cost on this host, nanoseconds; measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// The guest's write to an armed page, followed page by page.
    pub page_ns: f64,
    /// The guest's write fault that the agent serves.
    pub fault_ns: f64,
    /// A page that such a fault opens: the kernel still has a short fault of its own on the first write to each.
    pub opened_ns: f64,
    /// Sending a page once more.
    pub resend_ns: f64,
}

/// The shape of a set of written pages: how many groups of each size hold them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Pages written.
    pub pages: u64,
    /// For 2, 4, … 256 pages: aligned groups with a written page in them.
    pub groups: [u64; 8],
}

impl Writes {
    /// Of the written pages as ranges, in order.
    pub fn of(ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut writes = Self::default();
        let mut next = [0u64; 8];
        for range in ranges.into_iter().filter(|range| range.start < range.end) {
            writes.pages += range.end - range.start;
            for (shift, (groups, next)) in (1u32..).zip(writes.groups.iter_mut().zip(&mut next)) {
                // Groups before `next` are counted already.
                let first = (range.start >> shift).max(*next);
                let end = ((range.end - 1) >> shift) + 1;
                *groups += end.saturating_sub(first);
                *next = end.max(*next);
            }
        }
        writes
    }

    /// Those of another scan too: a page that was armed and written again was followed twice.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        for (mine, theirs) in self.groups.iter_mut().zip(other.groups) {
            *mine += theirs;
        }
    }

    /// What following these writes page by page costs, nanoseconds.
    pub fn pages_ns(&self, costs: &Costs) -> f64 {
        self.pages as f64 * costs.page_ns
    }

    /// What groups of the best size cost, nanoseconds; that size. At most half of what they open may be for nothing,
    /// as [`PageGroups`] sees to it.
    pub fn groups_ns(&self, costs: &Costs) -> (f64, u64) {
        let mut best = (f64::INFINITY, GROUP_MIN_PAGES);
        for (shift, groups) in (1u32..).zip(self.groups) {
            let opened = groups << shift;
            if opened > self.pages * 2 && shift > 1 {
                break;
            }
            let wasted = opened.saturating_sub(self.pages);
            let ns = groups as f64 * costs.fault_ns
                + opened as f64 * costs.opened_ns
                + wasted as f64 * costs.resend_ns;
            if ns < best.0 {
                best = (ns, 1 << shift);
            }
        }
        best
    }
}

/// What either way costs for the same writes, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Page by page.
    pub pages_ns: f64,
    /// In groups.
    pub groups_ns: f64,
}

impl Estimate {
    /// From what was seen page by page: groups are what they might be.
    pub fn of_writes(writes: &Writes, costs: &Costs) -> Self {
        Self { pages_ns: writes.pages_ns(costs), groups_ns: writes.groups_ns(costs).0 }
    }

    /// From what was seen in groups: both are measured, waste by its sample.
    pub fn of_faults(looked: &Looked, costs: &Costs) -> Self {
        let unchanged = looked.unchanged_pages.min(looked.sampled_pages) as f64;
        let share = if looked.sampled_pages == 0 { 0.0 } else { unchanged / looked.sampled_pages as f64 };
        let wasted = looked.opened_pages as f64 * share;
        Self {
            pages_ns: (looked.opened_pages as f64 - wasted) * costs.page_ns,
            groups_ns: looked.faults as f64 * costs.fault_ns
                + looked.opened_pages as f64 * costs.opened_ns
                + wasted * costs.resend_ns,
        }
    }
}

/// How far the pause is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// A change of the way pays.
    Far,
    /// Not worth a change.
    Between,
    /// A page more to send counts, a fault does not.
    Near,
}

impl Distance {
    /// By the time that sending what is dirty takes, milliseconds.
    pub fn of(left_ms: f64) -> Self {
        match left_ms {
            left if left < NEAR_MS => Self::Near,
            left if left < FAR_MS => Self::Between,
            _ => Self::Far,
        }
    }
}

/// Whether to change the way writes are followed, after `interval_ns` in which the guest's writes cost what `estimate`
/// says.
pub fn choose(
    now: Capture,
    wanted: Wanted,
    estimate: &Estimate,
    interval_ns: f64,
    distance: Distance,
) -> Capture {
    let Estimate { pages_ns, groups_ns } = *estimate;
    match (wanted, now, distance) {
        (Wanted::Always(capture), ..) => capture,
        (Wanted::Auto, _, Distance::Near) => Capture::Pages,
        (Wanted::Auto, Capture::Pages, Distance::Far)
            if pages_ns > interval_ns * NOTICEABLE && groups_ns < pages_ns * WORTH =>
        {
            Capture::Groups
        }
        (Wanted::Auto, Capture::Groups, _) if groups_ns > pages_ns * NOT_WORTH => Capture::Pages,
        (Wanted::Auto, same, _) => same,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A guest that writes whole runs of `run` pages, aligned to their length, at places that `seed` chooses.
    fn runs(seed: u64, run: u64, count: u64, pages: u64) -> Vec<u64> {
        let mut state = seed | 1;
        let mut written = Vec::new();
        for _ in 0..count {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = (state >> 33) % (pages / run) * run;
            written.extend(start..start + run);
        }
        written
    }

    /// Naive: page after page, a set of open pages; what a scan interval looks like with groups of a size.
    fn interval(written: &[u64], size: u64, pages: u64) -> (Looked, u64) {
        let (mut open, mut faults) = (BTreeSet::new(), 0);
        for page in written {
            if open.contains(page) {
                continue;
            }
            faults += 1;
            let mut start = *page;
            while start % size != 0 {
                start -= 1;
            }
            open.extend((start..start + size).filter(|page| *page < pages));
        }
        let changed: BTreeSet<u64> = written.iter().copied().collect();
        let opened = open.len() as u64;
        let looked = Looked {
            faults,
            opened_pages: opened,
            sampled_pages: opened,
            unchanged_pages: open.difference(&changed).count() as u64,
        };
        (looked, changed.len() as u64)
    }

    const PAGES: u64 = 1 << 16;

    proptest! {
        // The oracles go page by page.
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_group_is_aligned_contiguous_and_holds_the_page(
            page in 0u64..10_000, shift in 0u32..12, room in 1u64..10_000,
        ) {
            let pages = page + room;
            let group = group_of(page, 1 << shift, pages);
            prop_assert!(group.contains(&page) && group.end <= pages);
            let size = (1u64 << shift).clamp(GROUP_MIN_PAGES, GROUP_MAX_PAGES);
            prop_assert!(group.start.is_multiple_of(size));
            prop_assert!(group.end - group.start == size || group.end == pages);
        }

        #[test]
        fn the_size_settles_where_little_is_wasted_and_few_faults_are_left(seed: u64, shift in 0u32..9, rounds in 12u64..30) {
            let run = 1 << shift;
            let mut groups = PageGroups::default();
            let mut sizes = Vec::new();
            for round in 0..rounds {
                // Sparse, so that runs rarely touch; often enough for a decision each time.
                let written = runs(seed.wrapping_add(round), run, (1024 / run).max(40), PAGES);
                let (looked, _) = interval(&written, groups.size_pages(), PAGES);
                let before = groups.size_pages();
                let after = groups.observe(&looked);
                prop_assert!(after.is_power_of_two() && (GROUP_MIN_PAGES..=GROUP_MAX_PAGES).contains(&after));
                prop_assert!(after == before || after == before * 2 || after * 2 == before);
                sizes.push(after);
            }
            // A run of at least two pages is opened whole by one fault; a larger group wastes half or more.
            let best = run.max(GROUP_MIN_PAGES);
            for size in sizes.iter().skip(9) {
                prop_assert!(*size >= best.min(GROUP_MAX_PAGES) && *size <= best * 2, "run {run}: {sizes:?}");
            }
        }

        #[test]
        fn waste_of_more_than_half_always_shrinks(changed in 0u64..1000, unchanged in 0u64..1000, faults: u16) {
            prop_assume!(changed + unchanged >= TELLING_PAGES);
            let mut groups = PageGroups::default();
            let after = groups.observe(&Looked {
                faults: u64::from(faults),
                opened_pages: changed + unchanged,
                sampled_pages: changed + unchanged,
                unchanged_pages: unchanged,
            });
            prop_assert_eq!(after < GROUP_FIRST_PAGES, unchanged > changed);
            let many = u64::from(faults) >= TELLING_FAULTS;
            prop_assert_eq!(after > GROUP_FIRST_PAGES, many && unchanged * 4 <= changed + unchanged);
        }

        #[test]
        fn the_shape_of_writes_is_that_of_sets(seed: u64, run_shift in 0u32..5, count in 0u64..60) {
            let written: BTreeSet<u64> = runs(seed, 1 << run_shift, count, 2048).into_iter().collect();
            let ranges: Vec<_> = written.iter().map(|page| *page..page + 1).collect();
            let writes = Writes::of(ranges);
            prop_assert_eq!(writes.pages, written.len() as u64);
            for (shift, groups) in (1u32..).zip(writes.groups) {
                let oracle: BTreeSet<u64> = written.iter().map(|page| page >> shift).collect();
                prop_assert_eq!(groups, oracle.len() as u64);
            }
            // Ranges of several pages give the same.
            let whole: BTreeSet<u64> = written.iter().map(|page| page >> run_shift).collect();
            let ranges = whole.iter().map(|run| run << run_shift..(run + 1) << run_shift);
            prop_assert_eq!(Writes::of(ranges), writes);
        }

        #[test]
        fn groups_are_chosen_only_where_they_cost_half(
            seed: u64, run_shift in 0u32..8, count in 1u64..400, page_ns in 100.0f64..3000.0,
            fault_ns in 1000.0f64..50_000.0, opened_ns in 0.0f64..2000.0, resend_ns in 0.0f64..40_000.0,
        ) {
            let written: BTreeSet<u64> = runs(seed, 1 << run_shift, count, PAGES).into_iter().collect();
            let list: Vec<u64> = written.iter().copied().collect();
            let writes = Writes::of(list.iter().map(|page| *page..page + 1));
            let costs = Costs { page_ns, fault_ns, opened_ns, resend_ns };
            // Naive: every size tried on the pages themselves.
            let cost = |size: u64| {
                let (looked, changed) = interval(&list, size, PAGES);
                let wasted = looked.opened_pages - changed;
                let allowed = size == GROUP_MIN_PAGES || looked.opened_pages <= changed * 2;
                let opened = looked.opened_pages as f64;
                let ns = looked.faults as f64 * fault_ns + opened * opened_ns + wasted as f64 * resend_ns;
                if allowed { ns } else { f64::INFINITY }
            };
            let best = (1..=8).map(|shift| cost(1 << shift)).fold(f64::INFINITY, f64::min);
            let (groups_ns, _) = writes.groups_ns(&costs);
            prop_assert!((groups_ns - best).abs() <= best * 1e-9, "{groups_ns} {best}");
            let pages_ns = written.len() as f64 * page_ns;
            let estimate = Estimate::of_writes(&writes, &costs);
            let chosen = choose(Capture::Pages, Wanted::Auto, &estimate, pages_ns, Distance::Far);
            prop_assert_eq!(chosen == Capture::Groups, best < pages_ns * WORTH);
        }
    }

    fn filling() -> Estimate {
        let costs = Costs { page_ns: 800.0, fault_ns: 8000.0, opened_ns: 100.0, resend_ns: 10_000.0 };
        Estimate::of_writes(&Writes::of(std::iter::once(0..4096)), &costs)
    }

    #[test]
    fn near_the_end_pages_are_followed_one_by_one_unless_somebody_forces_groups() {
        let choose = |now, wanted, left_ms| choose(now, wanted, &filling(), 1e6, Distance::of(left_ms));
        assert_eq!(choose(Capture::Pages, Wanted::Auto, 10_000.0), Capture::Groups);
        assert_eq!(choose(Capture::Pages, Wanted::Auto, 1000.0), Capture::Pages);
        assert_eq!(choose(Capture::Groups, Wanted::Auto, 1000.0), Capture::Groups);
        assert_eq!(choose(Capture::Groups, Wanted::Auto, 100.0), Capture::Pages);
        assert_eq!(choose(Capture::Groups, Wanted::Always(Capture::Groups), 1.0), Capture::Groups);
        assert_eq!(choose(Capture::Groups, Wanted::Always(Capture::Pages), 10_000.0), Capture::Pages);
    }

    #[test]
    fn a_quiet_guest_is_left_alone() {
        let ten_seconds = 1e10;
        let chosen = choose(Capture::Pages, Wanted::Auto, &filling(), ten_seconds, Distance::Far);
        assert_eq!(chosen, Capture::Pages);
    }

    #[test]
    fn groups_that_are_opened_for_nothing_are_given_up() {
        let costs = Costs { page_ns: 800.0, fault_ns: 8000.0, opened_ns: 100.0, resend_ns: 10_000.0 };
        let looked =
            |unchanged_pages| Looked { faults: 100, opened_pages: 6400, sampled_pages: 800, unchanged_pages };
        let choose = |unchanged| {
            let estimate = Estimate::of_faults(&looked(unchanged), &costs);
            choose(Capture::Groups, Wanted::Auto, &estimate, 1e6, Distance::Far)
        };
        assert_eq!(choose(0), Capture::Groups);
        assert_eq!(choose(700), Capture::Pages);
    }
}
