//! Which link carries which unit of a round: hotter memory on faster links, never the other way (capability 4).
//!
//! ```text
//!   units by class   cold ───────────────────────────────────────────► hot
//!   links by rate    │ slowest link's share │   next   │ fastest's share │      shares by bytes, as the rates are
//!                     pulls ►                pulls ►    pulls ►                 coldest first: what is hot goes late
//!                                         ◄ steal       ◄ steal                 a faster link takes a slower one's hottest
//! ```
//!
//! A plan is made once per round from one snapshot of the links' rates and the segments' classes. Links are not told
//! what to carry, they ask: a link that turns out slower than the snapshot asks less often. One that has carried its own
//! share takes units of its neighbours' where the invariant allows, so that the end of a round is short.
//!
//! Invariants
//! * Monotone: of two units that went over links of different rates, the one with the higher class never went over
//!   the slower link. Links of one rate and units of one class are free.
//! * Every unit is handed out once. While a unit is left, the link whose share it is in gets it.
//! * Units of one class are handed out in the order in which they were given, within a share.
//!
//! Exempt, and therefore not asked for here: urgent pages and what has to be sent again.
//!
//! Source: US8458284B2 claims 1 and 2 (the assignment is monotone); shares and stealing are ours.
//!
//! Not here: the ranking (`rank`), what a unit is (`host::memory::plan`), the links themselves (`host::link`).

/// Something to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// How often it changes; see [`super::rank`].
    pub class: u8,
    /// About how many bytes it is.
    pub bytes: u64,
}

/// What is left of one link's share, and what it was given.
#[derive(Clone, Debug)]
struct Share {
    link: usize,
    rate_bytes_s: u64,
    /// Places in [`LinkPlan::order`] that are its own and left.
    left: std::ops::Range<usize>,
    /// The lowest and the highest class that it was given.
    given: Option<(u8, u8)>,
}

/// The plan of one round.
#[derive(Clone, Debug)]
pub struct LinkPlan {
    units: Vec<Unit>,
    /// Units from the coldest to the hottest.
    order: Vec<usize>,
    /// From the slowest link to the fastest.
    shares: Vec<Share>,
}

impl LinkPlan {
    /// A plan for links of these rates, bytes per second. Rates that are all 0 (nothing is known) count as equal.
    pub fn new(units: Vec<Unit>, rates_bytes_s: &[u64]) -> Self {
        let class = |at: &usize| units.get(*at).map_or(0, |unit| unit.class);
        let mut order: Vec<usize> = (0..units.len()).collect();
        order.sort_by_key(class);
        let mut links: Vec<(usize, u64)> = rates_bytes_s.iter().copied().enumerate().collect();
        links.sort_by_key(|(_, rate)| *rate);
        let total_rate: u128 = links.iter().map(|(_, rate)| u128::from(*rate)).sum();
        let total_bytes: u128 = units.iter().map(|unit| u128::from(unit.bytes)).sum();
        let mut shares = Vec::with_capacity(links.len());
        let (mut at, mut bytes, mut rate_so_far, count) = (0, 0u128, 0u128, links.len());
        for (index, (link, rate_bytes_s)) in links.into_iter().enumerate() {
            rate_so_far += u128::from(rate_bytes_s);
            let (part, whole) =
                if total_rate == 0 { (index as u128 + 1, count as u128) } else { (rate_so_far, total_rate) };
            let start = at;
            let wanted = total_bytes.saturating_mul(part) / whole;
            while let Some(unit) = order.get(at).and_then(|unit| units.get(*unit)) {
                // The last share ends with the last unit, however few bytes units say they are.
                if bytes >= wanted && index + 1 < count {
                    break;
                }
                bytes += u128::from(unit.bytes);
                at += 1;
            }
            shares.push(Share { link, rate_bytes_s, left: start..at, given: None });
        }
        Self { units, order, shares }
    }

    /// The next unit for a link, by its place in what the plan was made of; nothing if there is none that it may carry.
    pub fn next(&mut self, link: usize) -> Option<usize> {
        let own = self.shares.iter().position(|share| share.link == link)?;
        let from_own = self.shares.get_mut(own).and_then(|share| share.left.next());
        let place = from_own.or_else(|| self.steal(own))?;
        let unit = *self.order.get(place)?;
        let class = self.units.get(unit)?.class;
        let share = self.shares.get_mut(own)?;
        let (low, high) = share.given.unwrap_or((class, class));
        share.given = Some((low.min(class), high.max(class)));
        Some(unit)
    }

    /// Takes a unit out of another's share.
    fn steal(&mut self, own: usize) -> Option<usize> {
        // Of a slower one the hottest, of a faster one the coldest; of those further away none would do if these do not.
        let slower = (0..own).rev().find(|at| self.has_left(*at));
        let faster = (own + 1..self.shares.len()).find(|at| self.has_left(*at));
        if let Some(place) = slower.and_then(|at| Some(self.shares.get(at)?.left.end - 1))
            && self.may_carry(own, place)
        {
            return slower.and_then(|at| self.shares.get_mut(at)?.left.next_back());
        }
        let place = self.shares.get(faster?)?.left.start;
        if self.may_carry(own, place) { self.shares.get_mut(faster?)?.left.next() } else { None }
    }

    fn has_left(&self, at: usize) -> bool {
        self.shares.get(at).is_some_and(|share| !share.left.is_empty())
    }

    /// Whether the plan stays monotone if the unit at this place goes over the link of this share.
    fn may_carry(&self, own: usize, place: usize) -> bool {
        let Some(class) = self.class_at(place) else { return false };
        let Some(rate) = self.shares.get(own).map(|share| share.rate_bytes_s) else { return false };
        self.shares.iter().all(|other| {
            let Some((low, high)) = self.classes_of(other) else { return true };
            match other.rate_bytes_s.cmp(&rate) {
                std::cmp::Ordering::Less => high <= class,
                std::cmp::Ordering::Equal => true,
                std::cmp::Ordering::Greater => low >= class,
            }
        })
    }

    /// The lowest and the highest class of what a link was given and of what is left in its share.
    fn classes_of(&self, share: &Share) -> Option<(u8, u8)> {
        let left = share.left.clone();
        let ends = [left.clone().next(), left.clone().next_back()];
        let left = ends.into_iter().flatten().filter_map(|place| self.class_at(place));
        let given = share.given.into_iter().flat_map(|(low, high)| [low, high]);
        left.chain(given).fold(None, |all, class| {
            let (low, high) = all.unwrap_or((class, class));
            Some((low.min(class), high.max(class)))
        })
    }

    fn class_at(&self, place: usize) -> Option<u8> {
        self.order.get(place).and_then(|unit| self.units.get(*unit)).map(|unit| unit.class)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// Links with rates of their own, which need not be those of the plan: gives the link of each unit, the order in
    /// which units were carried, and when each link was done.
    struct Carried {
        by: Vec<Option<usize>>,
        sequence: Vec<Vec<usize>>,
        done_s: Vec<f64>,
    }

    fn carry(units: &[Unit], planned: &[u64], real: &[f64]) -> Carried {
        let mut plan = LinkPlan::new(units.to_vec(), planned);
        let mut carried = Carried {
            by: vec![None; units.len()],
            sequence: vec![Vec::new(); real.len()],
            done_s: vec![0.0; real.len()],
        };
        let mut idle = vec![false; real.len()];
        while let Some(link) = (0..real.len())
            .filter(|link| !idle[*link])
            .min_by(|a, b| carried.done_s[*a].total_cmp(&carried.done_s[*b]))
        {
            let Some(unit) = plan.next(link) else {
                // What a link may not carry now it may not carry later: the others' shares only shrink, what was given
                // only grows.
                idle[link] = true;
                continue;
            };
            assert_eq!(carried.by[unit].replace(link), None, "unit {unit} was handed out twice");
            carried.sequence[link].push(unit);
            carried.done_s[link] += units[unit].bytes as f64 / real[link];
        }
        carried
    }

    fn units() -> impl Strategy<Value = Vec<Unit>> {
        prop::collection::vec((0u8..6, 1u64..1000).prop_map(|(class, bytes)| Unit { class, bytes }), 0..60)
    }

    proptest! {
        #[test]
        fn no_hotter_unit_goes_over_a_slower_link(
            units in units(),
            links in prop::collection::vec((0u64..5, 1.0f64..10.0), 1..6),
        ) {
            let planned: Vec<u64> = links.iter().map(|(rate, _)| *rate).collect();
            let real: Vec<f64> = links.iter().map(|(_, rate)| *rate).collect();
            let carried = carry(&units, &planned, &real);
            // Naive: all of it, and every pair.
            for (unit, by) in carried.by.iter().enumerate() {
                prop_assert!(by.is_some(), "unit {unit} was left");
            }
            for (a, by_a) in carried.by.iter().enumerate() {
                for (b, by_b) in carried.by.iter().enumerate() {
                    let (Some(by_a), Some(by_b)) = (*by_a, *by_b) else { continue };
                    let inverted = planned[by_a] < planned[by_b] && units[a].class > units[b].class;
                    prop_assert!(!inverted, "{a} over {by_a}, {b} over {by_b}");
                }
            }
        }

        /// Memory of one class may go anywhere: nobody is idle while something is left.
        #[test]
        fn equal_units_keep_every_link_busy_to_the_end(
            bytes in prop::collection::vec(1u64..1000, 1..80),
            links in prop::collection::vec((0u64..5, 1.0f64..10.0), 1..6),
        ) {
            let units: Vec<Unit> = bytes.iter().map(|bytes| Unit { class: 3, bytes: *bytes }).collect();
            let planned: Vec<u64> = links.iter().map(|(rate, _)| *rate).collect();
            let real: Vec<f64> = links.iter().map(|(_, rate)| *rate).collect();
            let carried = carry(&units, &planned, &real);
            let last_s = carried.done_s.iter().copied().fold(0.0, f64::max);
            for (link, done_s) in carried.done_s.iter().enumerate() {
                let longest_s = 1000.0 / real.iter().copied().fold(f64::INFINITY, f64::min);
                prop_assert!(last_s - done_s <= longest_s + 1e-9, "link {link}: {done_s} of {last_s}");
            }
        }

        #[test]
        fn one_link_carries_the_coldest_first_and_equals_in_order(units in units()) {
            let carried = carry(&units, &[7], &[1.0]);
            let mut sorted: Vec<usize> = (0..units.len()).collect();
            sorted.sort_by_key(|unit| units[*unit].class);
            prop_assert_eq!(&carried.sequence[0], &sorted);
        }
    }

    #[test]
    fn shares_follow_the_rates_and_the_hottest_goes_over_the_fastest() {
        let units: Vec<Unit> = (0..12).map(|at| Unit { class: at / 2, bytes: 100 }).collect();
        let carried = carry(&units, &[30, 10, 20], &[30.0, 10.0, 20.0]);
        assert_eq!(carried.sequence, [vec![6, 7, 8, 9, 10, 11], vec![0, 1], vec![2, 3, 4, 5]]);
    }

    #[test]
    fn a_link_that_became_slow_is_helped_by_the_faster_ones_only() {
        let units: Vec<Unit> = (0..10).map(|at| Unit { class: at, bytes: 100 }).collect();
        // The slow link carries the coldest; the fast one takes the hottest of what is left there.
        let carried = carry(&units, &[10, 40], &[0.1, 40.0]);
        assert_eq!(carried.by[0], Some(0));
        assert!(carried.by.iter().skip(1).all(|by| *by == Some(1)), "{:?}", carried.by);
        // The fast link hangs: nobody else may carry what is hot.
        let carried = carry(&units, &[10, 40], &[10.0, 0.1]);
        assert_eq!(carried.sequence[0], [0, 1]);
    }
}
