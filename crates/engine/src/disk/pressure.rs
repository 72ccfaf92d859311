//! When a file system that thin volumes grow on should be called short of space.
//!
//! ```text
//!   ample ──▶ low ──▶ critical ──▶ full        at once, by what is free or by when it will be gone
//!     ◀────────◀──────────◀──────────          only once it is a quarter better than what brought it there
//! ```
//!
//! Volumes together may promise more than there is, so what counts is what is free and how fast it goes: an average over
//! a minute in which the last samples count most. Space that comes back does not count against space that goes.
//!
//! Not here: looking (`host::volume::space`), guests that find no space (`host::export`).

use whimbrel_wire::meta::Pressure;

/// Free space below this share of all, or below [`LOW_BYTES`] if that is less, is low.
const LOW_SHARE: f64 = 0.15;
const LOW_BYTES: f64 = 100.0 * GIB;
/// The same for critical.
const CRITICAL_SHARE: f64 = 0.05;
const CRITICAL_BYTES: f64 = 20.0 * GIB;
/// As low counts also what will be full so soon, at the rate of late, seconds.
const LOW_S: f64 = 3600.0;
const CRITICAL_S: f64 = 600.0;
/// A level is left when there is so many times what it begins with.
const LEAVE: f64 = 1.25;
/// Below this nothing can be written any more: a layer's next segment needs it, bytes.
const FULL_BYTES: u64 = 64 << 10;
/// Time constant of the average rate, seconds.
const AVERAGE_S: f64 = 60.0;
/// What is foretold rests on at least a tenth of the time that it is ahead, and on no less and no more than this, seconds.
const SEEN_MIN_S: f64 = 4.0;
const SEEN_MAX_S: f64 = 60.0;
const GIB: f64 = (1u64 << 30) as f64;

/// What is known of a file system; fed with a look now and then.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watch {
    last: Option<(u64, u64)>,
    /// Bytes per second that went lately, and over how long that was seen.
    rate_bytes_s: f64,
    seen_s: f64,
    level: Pressure,
}

impl Watch {
    /// What the last look came to.
    pub fn level(&self) -> Pressure {
        self.level
    }

    /// A look: so much there was, and is free, at a time in nanoseconds since any one moment. Gives the level, and in how
    /// many seconds nothing will be left, if that can be told.
    pub fn look(&mut self, at_ns: u64, total_bytes: u64, free_bytes: u64) -> (Pressure, Option<u64>) {
        if let Some((before_ns, before_bytes)) = self.last {
            let passed_s = at_ns.saturating_sub(before_ns) as f64 / 1e9;
            if passed_s > 0.0 {
                let rate = before_bytes.saturating_sub(free_bytes) as f64 / passed_s;
                // The first samples are their own average.
                let weight = (passed_s / (self.seen_s + passed_s).min(AVERAGE_S)).min(1.0);
                self.rate_bytes_s += (rate - self.rate_bytes_s) * weight;
                self.seen_s += passed_s;
            }
        }
        self.last = Some((at_ns, free_bytes));
        let (total, free) = (total_bytes as f64, free_bytes as f64);
        let full_in_s = (self.rate_bytes_s >= 1.0).then(|| free / self.rate_bytes_s);
        let full_in_s =
            full_in_s.filter(|left_s| self.seen_s >= (left_s / 10.0).clamp(SEEN_MIN_S, SEEN_MAX_S));
        let below = |level: Pressure, share: f64, bytes: f64, soon_s: f64| {
            // Whoever is at a level, or beyond it, has to come further to leave it.
            let times = if self.level >= level { LEAVE } else { 1.0 };
            free < (share * total).min(bytes) * times
                || full_in_s.is_some_and(|left_s| left_s < soon_s * times)
        };
        self.level = if free_bytes < FULL_BYTES {
            Pressure::Full
        } else if below(Pressure::Critical, CRITICAL_SHARE, CRITICAL_BYTES, CRITICAL_S) {
            Pressure::Critical
        } else if below(Pressure::Low, LOW_SHARE, LOW_BYTES, LOW_S) {
            Pressure::Low
        } else {
            Pressure::Ample
        };
        (self.level, full_in_s.map(|left_s| left_s as u64))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const SECOND_NS: u64 = 1_000_000_000;
    const TIB: u64 = 1 << 40;

    #[test]
    fn a_file_system_that_fills_is_called_low_then_critical_then_full() {
        let mut watch = Watch::default();
        let mut levels = Vec::new();
        // 1 GiB per second: an hour's worth is more than there is, so it is foretold, not only seen.
        for second in 0..=1024 {
            let (level, full_in_s) = watch.look(second * SECOND_NS, TIB, TIB - (second << 30));
            if second > 60 && level < Pressure::Full {
                let left_s = full_in_s.unwrap();
                assert!(left_s.abs_diff(1024 - second) <= 1, "{left_s} s at {second} s");
            }
            if levels.last() != Some(&level) {
                levels.push(level);
            }
        }
        assert_eq!(levels, [Pressure::Ample, Pressure::Low, Pressure::Critical, Pressure::Full]);
    }

    #[test]
    fn a_level_is_left_only_when_it_is_clearly_over() {
        let mut watch = Watch::default();
        let at = |share: f64| (share * 100.0 * GIB) as u64;
        let total = at(1.0);
        let mut look = |second: u64, share: f64| watch.look(second * SECOND_NS, total, at(share)).0;
        assert_eq!(look(0, 0.16), Pressure::Ample);
        // It goes slowly, so that nothing is foretold within an hour.
        assert_eq!(look(100_000, 0.149), Pressure::Low);
        assert_eq!(look(200_000, 0.16), Pressure::Low);
        assert_eq!(look(300_000, 0.19), Pressure::Ample);
        assert_eq!(look(400_000, 0.16), Pressure::Ample);
        assert_eq!(look(900_000, 0.04), Pressure::Critical);
        assert_eq!(look(910_000, 0.06), Pressure::Critical);
        assert_eq!(look(920_000, 0.07), Pressure::Low);
    }

    proptest! {
        /// What anybody would say by looking at the free space alone is never made less of.
        #[test]
        fn little_space_is_never_called_ample(
            total in 1u64 << 24..1 << 50,
            looks in prop::collection::vec((1u64..100 * SECOND_NS, 0.0f64..=1.0), 1..60),
        ) {
            let mut watch = Watch::default();
            let mut now = 0;
            for (passed_ns, share) in looks {
                now += passed_ns;
                let free = (share * total as f64) as u64;
                let (level, full_in_s) = watch.look(now, total, free);
                let floor = |share: f64, bytes: f64| (free as f64) < (share * total as f64).min(bytes);
                if free < FULL_BYTES {
                    prop_assert_eq!(level, Pressure::Full);
                } else if floor(CRITICAL_SHARE, CRITICAL_BYTES) {
                    prop_assert_eq!(level, Pressure::Critical);
                } else if floor(LOW_SHARE, LOW_BYTES) {
                    prop_assert!(level >= Pressure::Low);
                }
                if full_in_s.is_some_and(|left_s| (left_s as f64) < CRITICAL_S - 1.0) {
                    prop_assert!(level >= Pressure::Critical);
                }
            }
        }
    }
}
