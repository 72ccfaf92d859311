//! Which versions of pages a source keeps, so that a page that is sent again can be sent as what changed.
//!
//! ```text
//!   sent again ─► admit ─┬─ has a slot, or one is free ────────────────► the version goes there
//!                        ├─ another's, not sent for a round and more ──► the version goes there instead
//!                        └─ none of them, or changes have not been paying ─► not kept
//!   sent once more ─► find ─► changes ─► judge: did they pay? a page whose changes do not gives its slot up
//! ```
//!
//! The versions are those that the target has: what was kept is what was sent. A guest that goes round a working set
//! larger than the cache would find nothing in one that keeps the newest pages; here a page stays until it was not sent
//! for a whole round, so a part of such a set is always found.
//!
//! Invariants
//! * At most as many slots are in use as were given; no slot belongs to two pages.
//! * A page that was forgotten is not found before it was admitted again.
//!
//! Not here: the bytes, finding what changed (`host::memory::delta`), how changes are written (`host::codec::words`).

use std::collections::HashMap;

use super::PageId;

/// Slots looked at for one that can be taken from its page.
const PROBES: usize = 16;
/// So many times in a row changes may not pay before a page's slot goes to another.
const FRUITLESS_MAX: u8 = 2;
/// After so many judgements they are weighed, and count half afterwards.
const WINDOW: u32 = 512;
/// Changes have to pay for one page in so many, or they count as barren.
const BARREN_SHARE: u32 = 16;
/// While changes are barren, one page in so many is admitted all the same, to see whether they still are.
const PROBE_SHARE: u32 = 16;

/// Whether a page is sent as its changes, `changed_bytes` long, or by itself, `plain_bytes` long; neither is compressed
/// yet. What changes are hardly gets shorter; the page itself may well.
pub fn pays(changed_bytes: usize, plain_bytes: usize) -> bool {
    changed_bytes.saturating_mul(2) <= plain_bytes
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    page: PageId,
    /// The round in which the page was last sent, or looked for.
    used: u32,
    /// How many times in a row its changes did not pay.
    fruitless: u8,
}

/// Which page has which slot. See the module.
#[derive(Clone, Debug, Default)]
pub struct Versions {
    slots: Vec<Option<Slot>>,
    slots_max: usize,
    free: Vec<u32>,
    by_page: HashMap<PageId, u32>,
    hand: usize,
    round: u32,
    judged: u32,
    paid: u32,
    barren: bool,
    turned_away: u32,
}

impl Versions {
    /// Nothing is kept; at most `slots_max` pages will be.
    pub fn new(slots_max: u32) -> Self {
        Self { slots_max: slots_max as usize, ..Self::default() }
    }

    /// A round begins; their numbers rise.
    pub fn begin_round(&mut self, round: u32) {
        self.round = round;
    }

    /// The slot of a page's version, if it is kept.
    pub fn find(&mut self, page: PageId) -> Option<u32> {
        let slot = *self.by_page.get(&page)?;
        if let Some(Some(kept)) = self.slots.get_mut(slot as usize) {
            kept.used = self.round;
        }
        Some(slot)
    }

    /// Learns whether the changes of a page that was found paid.
    pub fn judge(&mut self, page: PageId, paid: bool) {
        self.judged += 1;
        self.paid += u32::from(paid);
        if self.judged >= WINDOW {
            self.barren = self.paid * BARREN_SHARE < self.judged;
            (self.judged, self.paid) = (self.judged / 2, self.paid / 2);
        }
        let Some(slot) = self.by_page.get(&page).copied() else { return };
        let Some(Some(kept)) = self.slots.get_mut(slot as usize) else { return };
        kept.fruitless = if paid { 0 } else { kept.fruitless + 1 };
        if kept.fruitless >= FRUITLESS_MAX {
            self.forget(page);
        }
    }

    /// Where the version of a page that is being sent is to be kept; none if it is not worth it.
    pub fn admit(&mut self, page: PageId) -> Option<u32> {
        if let Some(slot) = self.find(page) {
            return Some(slot);
        }
        if self.barren {
            self.turned_away += 1;
            if !self.turned_away.is_multiple_of(PROBE_SHARE) {
                return None;
            }
        }
        let slot = self.room()?;
        let kept = Slot { page, used: self.round, fruitless: 0 };
        match self.slots.get_mut(slot as usize) {
            Some(place) => *place = Some(kept),
            None => self.slots.push(Some(kept)),
        }
        self.by_page.insert(page, slot);
        Some(slot)
    }

    /// The target has another version of the page now, or none that is known.
    pub fn forget(&mut self, page: PageId) {
        if let Some(slot) = self.by_page.remove(&page) {
            if let Some(place) = self.slots.get_mut(slot as usize) {
                *place = None;
            }
            self.free.push(slot);
        }
    }

    /// As [`Self::forget`], for `pages` pages from `first` on.
    pub fn forget_run(&mut self, first: PageId, pages: u32) {
        let end = first.page.saturating_add(pages);
        if (self.by_page.len() as u64) < u64::from(pages) {
            let inside = |page: &PageId| page.block == first.block && (first.page..end).contains(&page.page);
            let found: Vec<PageId> = self.by_page.keys().copied().filter(inside).collect();
            found.into_iter().for_each(|page| self.forget(page));
        } else {
            (first.page..end).for_each(|page| self.forget(PageId { page, ..first }));
        }
    }

    /// Pages whose version is kept.
    pub fn kept(&self) -> usize {
        self.by_page.len()
    }

    /// A slot that nobody has, or has used in this round or the one before.
    fn room(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() < self.slots_max {
            return u32::try_from(self.slots.len()).ok();
        }
        for _ in 0..PROBES.min(self.slots.len()) {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(Some(kept)) = self.slots.get(at).copied() else { continue };
            if kept.used.saturating_add(1) < self.round {
                self.by_page.remove(&kept.page);
                return u32::try_from(at).ok();
            }
        }
        None
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn id(page: u32) -> PageId {
        PageId { block: (page % 3) as u16, page }
    }

    #[derive(Clone, Debug)]
    enum Act {
        Round,
        /// Sent: found if it was kept, judged so, then admitted.
        Send(u32, bool),
        Forget(u32),
        ForgetRun(u32, u32),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            1 => Just(Act::Round),
            12 => (0u32..60, any::<bool>()).prop_map(|(page, paid)| Act::Send(page, paid)),
            1 => (0u32..60).prop_map(Act::Forget),
            1 => (0u32..60, 0u32..200).prop_map(|(page, pages)| Act::ForgetRun(page, pages)),
        ]
    }

    proptest! {
        /// What is found is what was kept: bytes beside it, which every admission overwrites, are the page's last ones.
        #[test]
        fn what_is_found_is_the_version_sent_last(slots in 0u32..12, acts in prop::collection::vec(act(), 0..400)) {
            let mut versions = Versions::new(slots);
            let (mut bytes, mut sent, mut round) = (HashMap::new(), HashMap::<PageId, usize>::new(), 1);
            versions.begin_round(round);
            for (version, act) in acts.into_iter().enumerate() {
                match act {
                    Act::Round => {
                        round += 1;
                        versions.begin_round(round);
                    }
                    Act::Send(page, paid) => {
                        let page = id(page);
                        if let Some(slot) = versions.find(page) {
                            prop_assert_eq!(bytes.get(&slot), sent.get(&page), "{:?}", page);
                            prop_assert!(sent.contains_key(&page));
                            versions.judge(page, paid);
                        }
                        match versions.admit(page) {
                            Some(slot) => {
                                prop_assert!(slot < slots);
                                bytes.insert(slot, version);
                            }
                            None => prop_assert!(versions.find(page).is_none()),
                        }
                        sent.insert(page, version);
                    }
                    Act::Forget(page) => {
                        versions.forget(id(page));
                        prop_assert!(versions.find(id(page)).is_none());
                    }
                    Act::ForgetRun(page, pages) => {
                        let before = versions.kept();
                        let first = id(page);
                        let inside = (page..page.saturating_add(pages)).map(|page| PageId { page, ..first });
                        let gone = inside.clone().filter(|page| versions.by_page.contains_key(page)).count();
                        versions.forget_run(first, pages);
                        prop_assert_eq!(versions.kept(), before - gone);
                        prop_assert!(inside.clone().all(|page| versions.find(page).is_none()));
                    }
                }
                prop_assert!(versions.kept() <= slots as usize);
                let owners: std::collections::HashSet<u32> = versions.by_page.values().copied().collect();
                prop_assert_eq!(owners.len(), versions.kept());
            }
        }

        #[test]
        fn changes_are_sent_only_if_they_are_shorter(changed in 0usize..5000, plain in 1usize..5000) {
            prop_assert!(!pays(changed, plain) || changed < plain);
            prop_assert!(pays(changed, plain) || changed * 2 > plain);
        }
    }

    /// Sends `pages` in order, round after round, with changes that pay or do not; the pages found in the last round.
    fn rounds(versions: &mut Versions, pages: u32, rounds: u32, paid: bool) -> u32 {
        let mut found = 0;
        for _ in 0..rounds {
            versions.begin_round(versions.round + 1);
            found = 0;
            for page in 0..pages {
                if versions.find(id(page)).is_some() {
                    found += 1;
                    versions.judge(id(page), paid);
                }
                versions.admit(id(page));
            }
        }
        found
    }

    #[test]
    fn a_working_set_twice_the_cache_is_found_by_half() {
        assert_eq!(rounds(&mut Versions::new(100), 200, 5, true), 100);
    }

    #[test]
    fn pages_that_are_not_sent_any_more_make_room() {
        let mut versions = Versions::new(100);
        rounds(&mut versions, 100, 3, true);
        for round in 10..13 {
            versions.begin_round(round);
            (1000..1050).for_each(|page| {
                versions.admit(id(page));
            });
        }
        assert!((1000..1050).all(|page| versions.find(id(page)).is_some()));
    }

    #[test]
    fn pages_whose_changes_do_not_pay_are_hardly_kept_and_come_back_when_they_do() {
        let mut versions = Versions::new(10_000);
        rounds(&mut versions, 10_000, 8, false);
        assert!(versions.kept() < 3000, "{}", versions.kept());
        let found = rounds(&mut versions, 10_000, 12, true);
        assert!(found > 9000, "{found}");
    }
}
