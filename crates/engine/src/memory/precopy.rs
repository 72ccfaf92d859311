//! When to stop copying and pause: the rounds of pre-copy (capability 4).
//!
//! ```text
//!             ┌────────────── Continue ──────────────┐
//!             ▼                                      │
//!  round of all pages ──► after_round(what was sent, what is dirty now) ──► Pause          the rest fits the limit
//!                                                    │                  └─► Pause, over     asked to pause anyway
//!                                                    └─► NotConverging                      nothing gets better
//! ```
//!
//! The pause is estimated as `fixed + dirty pages × seconds per page + disk tail / link rate`. While it is over
//! the limit another round follows, as long as rounds make it shorter. Under the limit a round or two more are
//! made only if each is expected to make the pause much shorter: a short pause is worth a little total time.
//!
//! Sending a page that will be written again before the pause is wasted work. As many as fit the pause beside everything
//! else are therefore withheld, the most often written first ([`super::rank`] says which those are).
//!
//! Invariants
//! * At most [`Policy::rounds_max`] rounds, whatever the guest does. A copy is given up only after rounds *and* time
//!   without progress: a guest's busy seconds, or those of a host, pass.
//! * `dirty_pages` counts every page that the target does not have in its newest version, withheld ones too.
//! * Time is an argument: durations are measured by the caller.
//!
//! Not here: which pages are dirty (`host::guest`), sending (`host::memory::source`), post-copy.

use std::fmt;

/// Part of the limit that withheld pages may take.
const HOT_SHARE: f64 = 0.6;
/// A round under the limit must be expected to cut the estimate to this share.
const WORTH: f64 = 0.7;
/// At most so many rounds are made under the limit.
const POLISH_ROUNDS_MAX: u32 = 3;
/// Below this the copying part of the pause is not worth shortening, milliseconds.
const POLISH_FLOOR_MS: f64 = 4.0;
/// A round counts as progress if it cut the best estimate so far to this share.
const PROGRESS: f64 = 0.9;
/// Only after so many rounds without progress, and [`Policy::patience_ms`], is it said that nothing gets better.
const PATIENCE_ROUNDS: u32 = 5;
/// Rounds with fewer data pages say nothing about the time per page.
const TELLING_PAGES: u64 = 128;
/// Weight of a new observation in means.
const WEIGHT: f64 = 0.5;
/// Seconds per page before anything was measured: 1 Gbit/s, uncompressed.
const PAGE_S_PRIOR: f64 = 4096.0 / 1.19e8;

/// What is asked of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The longest pause that is wanted, milliseconds.
    pub downtime_limit_ms: u64,
    /// What a pause takes beside copying: stop, device state, commit, resume; milliseconds.
    pub fixed_ms: u64,
    /// The most rounds, the first one included.
    pub rounds_max: u32,
    /// How long rounds may bring no progress before the copy is given up, milliseconds.
    pub patience_ms: u64,
    /// What to do with a guest that writes faster than it can be copied.
    pub when_stuck: WhenStuck,
}

impl Policy {
    /// The usual policy for a limit.
    pub fn new(downtime_limit_ms: u64) -> Self {
        let (fixed_ms, rounds_max, patience_ms) = (30, 2000, 30_000);
        Self { downtime_limit_ms, fixed_ms, rounds_max, patience_ms, when_stuck: WhenStuck::Fail }
    }
}

/// What to do with a guest that writes faster than it can be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenStuck {
    /// Give up; the guest stays where it is.
    Fail,
    /// Pause longer than the limit.
    PauseAnyway,
}

/// What happened in a round, and what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pages sent with their bytes (zero pages are not counted).
    pub data_pages: u64,
    /// How long the round took, microseconds.
    pub duration_us: u64,
    /// Part of `duration_us` that was spent obeying a bandwidth limit, which the last round need not.
    pub throttled_us: u64,
    /// Wire bytes per second that the link takes; 0 if unknown.
    pub link_bytes_s: u64,
    /// Pages that the target lacks now: written during the round, or withheld.
    pub dirty_pages: u64,
    /// Bytes of the disk that the last round has to carry as well.
    pub disk_tail_bytes: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send another round.
    Continue {
        /// Up to so many pages that are dirty again and again are better left for the last round.
        withhold_pages: u64,
    },
    /// Pause the guest and send the rest.
    Pause {
        /// The expected pause, milliseconds.
        estimate_ms: u64,
        /// The pause is expected to be longer than the limit, and was asked for anyway.
        over_limit: bool,
    },
    /// The guest writes faster than it can be copied; give up.
    NotConverging(Stuck),
}

/// Why a copy does not converge; prints as a sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Rounds made.
    pub rounds: u32,
    /// The shortest pause that any round offered, milliseconds.
    pub best_ms: u64,
    /// The limit, milliseconds.
    pub limit_ms: u64,
    /// Bytes per second that the guest writes (each page once per round).
    pub dirty_bytes_s: u64,
    /// Bytes of memory per second that are copied.
    pub copy_bytes_s: u64,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(
            f,
            "the guest writes {} MiB of memory per second or more, {} MiB/s are copied: after {} rounds the pause \
             would be {} ms, the limit is {} ms",
            mib(self.dirty_bytes_s),
            mib(self.copy_bytes_s),
            self.rounds,
            self.best_ms,
            self.limit_ms
        )
    }
}

/// The state of one copy.
#[derive(Clone, Debug)]
pub struct Precopy {
    policy: Policy,
    rounds: u32,
    page_s: Option<f64>,
    dirty_pages_s: Option<f64>,
    /// The pause that the last round led to.
    pause_ms: Option<f64>,
    best_ms: f64,
    rounds_without_progress: u32,
    us_without_progress: u64,
    polish_rounds: u32,
}

impl Precopy {
    /// Before the first round, which sends all pages.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            rounds: 0,
            page_s: None,
            dirty_pages_s: None,
            pause_ms: None,
            best_ms: f64::INFINITY,
            rounds_without_progress: 0,
            us_without_progress: 0,
            polish_rounds: 0,
        }
    }

    /// Takes in a finished round and decides.
    pub fn after_round(&mut self, round: &Round) -> Decision {
        self.observe(round);
        let estimate_ms = self.pause_of(round.dirty_pages, round);
        self.pause_ms = Some(estimate_ms);
        if estimate_ms <= self.policy.downtime_limit_ms as f64 {
            let more = self.worth_polishing(estimate_ms, round) && self.rounds < self.policy.rounds_max;
            if !more {
                return Decision::Pause { estimate_ms: estimate_ms.ceil() as u64, over_limit: false };
            }
            self.polish_rounds += 1;
            self.best_ms = self.best_ms.min(estimate_ms);
            // What is withheld would make the pause longer, and that is what this round is for.
            return Decision::Continue { withhold_pages: 0 };
        }
        if estimate_ms < self.best_ms * PROGRESS {
            (self.rounds_without_progress, self.us_without_progress) = (0, 0);
            // Many small steps count as one when they add up, so what they are measured against stays.
            self.best_ms = estimate_ms;
        } else {
            self.rounds_without_progress += 1;
            self.us_without_progress = self.us_without_progress.saturating_add(round.duration_us);
        }
        let patient = self.rounds_without_progress < PATIENCE_ROUNDS
            || self.us_without_progress < self.policy.patience_ms.saturating_mul(1000);
        if self.rounds >= self.policy.rounds_max || !patient {
            return self.stuck(estimate_ms);
        }
        Decision::Continue { withhold_pages: self.withhold_pages(round) }
    }

    /// The nanoseconds until the pause begins for each page that the running round still has to send, if all goes on as it
    /// does; nothing if it does not converge, or before the first round is over.
    pub fn page_left_ns(&self) -> Option<u64> {
        let page_s = self.page_s?;
        let growth = self.dirty_pages_s.unwrap_or(0.0) * page_s;
        // Each round sends what the one before let dirty: a geometric series.
        (growth < 0.95).then(|| (page_s / (1.0 - growth) * 1e9) as u64)
    }

    /// How long the pause would be if it began now, milliseconds; nothing before the first round is over.
    pub fn expected_pause_ms(&self) -> Option<u64> {
        self.pause_ms.map(|pause_ms| pause_ms.ceil() as u64)
    }

    /// Rounds taken in so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Bytes per second that the guest writes, as far as rounds can tell.
    pub fn dirty_bytes_s(&self) -> u64 {
        (self.dirty_pages_s.unwrap_or(0.0) * 4096.0) as u64
    }

    fn observe(&mut self, round: &Round) {
        self.rounds += 1;
        let mean = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old + WEIGHT * (new - old)));
        let seconds = round.duration_us.saturating_sub(round.throttled_us) as f64 / 1e6;
        if round.data_pages >= TELLING_PAGES && seconds > 0.0 {
            self.page_s = mean(self.page_s, seconds / round.data_pages as f64);
        }
        if round.duration_us > 0 {
            let rate = round.dirty_pages as f64 / (round.duration_us as f64 / 1e6);
            self.dirty_pages_s = mean(self.dirty_pages_s, rate);
        }
    }

    fn pause_of(&self, pages: u64, round: &Round) -> f64 {
        self.policy.fixed_ms as f64 + self.copy_ms(pages) + disk_ms(round)
    }

    fn copy_ms(&self, pages: u64) -> f64 {
        pages as f64 * self.page_s.unwrap_or(PAGE_S_PRIOR) * 1e3
    }

    /// Under the limit: would another round make the pause much shorter?
    fn worth_polishing(&self, estimate_ms: f64, round: &Round) -> bool {
        let copy_ms = estimate_ms - self.policy.fixed_ms as f64;
        // Of pages that came back in the last, longer round some will not come back in this one; if they do, the rate
        // that is measured next says so.
        let next_pages = self.dirty_pages_s.unwrap_or(0.0) * copy_ms / 1e3;
        let next_ms = self.pause_of(next_pages as u64, round);
        self.polish_rounds < POLISH_ROUNDS_MAX && copy_ms > POLISH_FLOOR_MS && next_ms < estimate_ms * WORTH
    }

    /// How many pages fit the withheld ones' part of the pause.
    fn withhold_pages(&self, round: &Round) -> u64 {
        let room_ms = self.policy.downtime_limit_ms as f64 * HOT_SHARE - self.pause_of(0, round);
        // Casts saturate: no room is no pages.
        (room_ms / self.copy_ms(1)) as u64
    }

    fn stuck(&self, estimate_ms: f64) -> Decision {
        match self.policy.when_stuck {
            WhenStuck::PauseAnyway => Decision::Pause {
                estimate_ms: estimate_ms.ceil() as u64,
                over_limit: estimate_ms > self.policy.downtime_limit_ms as f64,
            },
            WhenStuck::Fail => Decision::NotConverging(Stuck {
                rounds: self.rounds,
                best_ms: self.best_ms.ceil() as u64,
                limit_ms: self.policy.downtime_limit_ms,
                dirty_bytes_s: self.dirty_bytes_s(),
                copy_bytes_s: (4096.0 / self.page_s.unwrap_or(PAGE_S_PRIOR)) as u64,
            }),
        }
    }
}

fn disk_ms(round: &Round) -> f64 {
    if round.disk_tail_bytes == 0 {
        return 0.0;
    }
    let link = if round.link_bytes_s > 0 { round.link_bytes_s as f64 } else { 4096.0 / PAGE_S_PRIOR };
    round.disk_tail_bytes as f64 / link * 1e3
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// A guest that writes pages of a working set in order, round and round, at a constant rate, and a link with a
    /// constant time per page: the pause can be computed by hand.
    struct World {
        pages: u64,
        working_set: u64,
        writes_s: f64,
        page_s: f64,
    }

    struct Outcome {
        decision: Decision,
        rounds: u32,
        real_pause_ms: f64,
    }

    impl World {
        fn dirty_after(&self, seconds: f64) -> u64 {
            ((self.writes_s * seconds) as u64).min(self.working_set)
        }

        /// Naive: a round takes what its pages take; afterwards is dirty what was written during it.
        fn run(&self, policy: Policy) -> Outcome {
            let mut copy = Precopy::new(policy);
            let mut send = self.pages;
            for rounds in 1.. {
                let seconds = send as f64 * self.page_s;
                let dirty_pages = self.dirty_after(seconds);
                let decision = copy.after_round(&Round {
                    data_pages: send,
                    duration_us: (seconds * 1e6) as u64,
                    dirty_pages,
                    link_bytes_s: (4096.0 / self.page_s) as u64,
                    ..Round::default()
                });
                if let Decision::Continue { .. } = decision {
                    assert!(rounds < policy.rounds_max);
                    send = dirty_pages;
                    continue;
                }
                let real_pause_ms = policy.fixed_ms as f64 + dirty_pages as f64 * self.page_s * 1e3;
                return Outcome { decision, rounds, real_pause_ms };
            }
            unreachable!("the loop returns")
        }
    }

    proptest! {
        #[test]
        fn rounds_end_and_a_pause_within_the_limit_is_within_the_limit(
            pages in 1000u64..1_000_000,
            working_share in 0.0f64..1.0,
            writes_s in 0.0f64..1e6,
            page_us in 1.0f64..500.0,
            limit_ms in 35u64..1000,
            anyway: bool,
        ) {
            let world = World {
                pages,
                working_set: (pages as f64 * working_share) as u64,
                writes_s,
                page_s: page_us / 1e6,
            };
            let when_stuck = if anyway { WhenStuck::PauseAnyway } else { WhenStuck::Fail };
            let policy = Policy { when_stuck, ..Policy::new(limit_ms) };
            let outcome = world.run(policy);
            prop_assert!(outcome.rounds <= policy.rounds_max);
            let limit = limit_ms as f64;
            match outcome.decision {
                Decision::Pause { over_limit: false, .. } => prop_assert!(outcome.real_pause_ms <= limit * 1.02 + 0.1),
                Decision::Pause { over_limit: true, .. } => prop_assert!(anyway && outcome.real_pause_ms > limit * 0.98),
                Decision::NotConverging(_) => prop_assert!(!anyway),
                Decision::Continue { .. } => unreachable!("the loop ended"),
            }
            // Each round leaves at most this share of what it sent.
            let growth = writes_s * world.page_s;
            let everything_ms = policy.fixed_ms as f64 + world.working_set as f64 * world.page_s * 1e3;
            if growth < 0.8 || everything_ms < limit * 0.98 {
                let good = matches!(outcome.decision, Decision::Pause { over_limit: false, .. });
                prop_assert!(good, "{:?}", outcome.decision);
            }
            if growth > 1.05 && everything_ms > limit * 1.05 {
                let bad = matches!(outcome.decision, Decision::NotConverging(_) | Decision::Pause { over_limit: true, .. });
                prop_assert!(bad, "{:?}", outcome.decision);
            }
        }
    }

    fn quiet() -> World {
        World { pages: 262_144, working_set: 2_000, writes_s: 1_000.0, page_s: 3.4e-5 }
    }

    #[test]
    fn a_quiet_guest_needs_few_rounds_and_a_short_pause() {
        let outcome = quiet().run(Policy::new(100));
        assert!(matches!(outcome.decision, Decision::Pause { over_limit: false, .. }));
        assert!(outcome.rounds <= 3, "{}", outcome.rounds);
        assert!(outcome.real_pause_ms < 40.0, "{}", outcome.real_pause_ms);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_given_up_with_the_figures() {
        let world = World { writes_s: 100_000.0, working_set: 200_000, ..quiet() };
        let Decision::NotConverging(stuck) = world.run(Policy::new(100)).decision else { panic!("gave in") };
        let text = stuck.to_string();
        assert!(text.contains("the limit is 100 ms"), "{text}");
        // A page that is written twice in a round counts once: what is seen cannot exceed what is copied by much.
        assert!(stuck.dirty_bytes_s * 10 > stuck.copy_bytes_s * 9, "{stuck:?}");
        assert!((110 << 20..125 << 20).contains(&stuck.copy_bytes_s), "{stuck:?}");
    }

    #[test]
    fn what_is_withheld_fits_its_part_of_the_pause() {
        let decide = |limit_ms, disk_tail_bytes| {
            let round = Round {
                data_pages: 10_000,
                duration_us: 340_000,
                dirty_pages: 9_000,
                link_bytes_s: 119_000_000,
                disk_tail_bytes,
                ..Round::default()
            };
            Precopy::new(Policy::new(limit_ms)).after_round(&round)
        };
        // 60 of 100 ms, less 30 that a pause takes anyway, at 34 µs a page.
        assert_eq!(decide(100, 0), Decision::Continue { withhold_pages: 882 });
        assert_eq!(decide(100, 119_000_000 / 50), Decision::Continue { withhold_pages: 294 });
        assert_eq!(decide(100, 119_000_000), Decision::Continue { withhold_pages: 0 });
        assert_eq!(decide(40, 0), Decision::Continue { withhold_pages: 0 });
    }

    #[test]
    fn the_disk_s_tail_counts_towards_the_pause() {
        let round = |disk_tail_bytes| Round {
            data_pages: 10_000,
            duration_us: 340_000,
            dirty_pages: 10,
            link_bytes_s: 119_000_000,
            disk_tail_bytes,
            ..Round::default()
        };
        let decide = |tail| Precopy::new(Policy::new(100)).after_round(&round(tail));
        assert!(matches!(decide(1 << 20), Decision::Pause { .. }));
        assert!(matches!(decide(50 << 20), Decision::Continue { .. }));
    }

    #[test]
    fn time_left_is_unknown_when_nothing_converges() {
        let mut copy = Precopy::new(Policy::new(100));
        assert_eq!((copy.page_left_ns(), copy.expected_pause_ms()), (None, None));
        let round =
            Round { data_pages: 100_000, duration_us: 3_400_000, dirty_pages: 20_000, ..Round::default() };
        let _ = copy.after_round(&round);
        let left_ms = copy.page_left_ns().unwrap() * 20_000 / 1_000_000;
        // 20,000 pages take 680 ms, during which a fifth of them is written again, and so on.
        assert!((840..860).contains(&left_ms), "{left_ms}");
        assert_eq!(copy.expected_pause_ms(), Some(710));
        let _ = copy.after_round(&Round { dirty_pages: 200_000, ..round });
        assert_eq!(copy.page_left_ns(), None);
    }
}
