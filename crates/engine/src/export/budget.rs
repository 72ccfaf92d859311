//! How many requests, and how many bytes, a disk's clients may have per second.
//!
//! ```text
//!   free at ──────┬──── now ────▶          a request may begin when both "free at" have passed
//!                 └ never further back than BURST_NS: idle time is not saved up
//! ```
//!
//! Each request moves "free at" on by what it costs (the generic cell rate algorithm: ITU-T I.371, annex A). A request is
//! let in before its size is known and pays afterwards, so a large one is never stuck behind a small budget; the next one
//! waits for what it took.
//!
//! Invariant: from any request to any later one no more begins than the rate times that time, a burst, and one request.
//!
//! Not here: clocks and waiting (`host::export::pacer`).

use whimbrel_wire::meta::IoLimits;

/// So much time's worth may begin at once, nanoseconds.
pub const BURST_NS: u64 = 50_000_000;

/// See the module's charter. Times are nanoseconds since any one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    limits: IoLimits,
    request_at_ns: u64,
    bytes_at_ns: u64,
}

impl Budget {
    /// A budget of these limits; zero counts as none.
    pub fn new(limits: IoLimits) -> Self {
        let limits = IoLimits {
            iops: limits.iops.filter(|rate| *rate > 0),
            bandwidth_bytes_s: limits.bandwidth_bytes_s.filter(|rate| *rate > 0),
        };
        Self { limits, request_at_ns: 0, bytes_at_ns: 0 }
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.limits != IoLimits::default()
    }

    /// How long the next request has to wait, nanoseconds.
    pub fn wait_ns(&self, now_ns: u64) -> u64 {
        self.request_at_ns.max(self.bytes_at_ns).saturating_sub(now_ns)
    }

    /// A request of so many bytes has begun.
    pub fn charge(&mut self, now_ns: u64, bytes: u64) {
        let earliest = now_ns.saturating_sub(BURST_NS);
        let later = |at_ns: u64, amount: u64, rate: Option<u64>| match rate {
            Some(rate) => at_ns.max(earliest).saturating_add(time_ns(amount, rate)),
            None => at_ns,
        };
        self.request_at_ns = later(self.request_at_ns, 1, self.limits.iops);
        self.bytes_at_ns = later(self.bytes_at_ns, bytes, self.limits.bandwidth_bytes_s);
    }
}

fn time_ns(amount: u64, rate_s: u64) -> u64 {
    let time_ns = u128::from(amount) * 1_000_000_000 / u128::from(rate_s.max(1));
    u64::try_from(time_ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn without_limits_nothing_waits() {
        let mut budget = Budget::new(IoLimits { iops: Some(0), bandwidth_bytes_s: None });
        assert!(!budget.is_limited());
        for _ in 0..1000 {
            budget.charge(5, u64::MAX);
            assert_eq!(budget.wait_ns(5), 0);
        }
    }

    #[test]
    fn a_request_larger_than_the_burst_is_let_in_and_paid_for() {
        let mut budget = Budget::new(IoLimits { iops: None, bandwidth_bytes_s: Some(1 << 20) });
        let now = 100 * SECOND_NS;
        assert_eq!(budget.wait_ns(now), 0);
        budget.charge(now, 2 << 20);
        assert_eq!(budget.wait_ns(now), 2 * SECOND_NS - BURST_NS);
    }

    proptest! {
        /// Whoever asks whenever it may gets what the limits say: not more, and, if it always asks, not less.
        #[test]
        fn the_rates_are_kept(
            iops in 1u64..50_000, bytes_s in 1u64..1 << 30,
            requests in prop::collection::vec((0u64..1 << 20, 0u64..3), 2..200),
        ) {
            let mut budget = Budget::new(IoLimits { iops: Some(iops), bandwidth_bytes_s: Some(bytes_s) });
            let start = 1000 * SECOND_NS;
            let mut now = start;
            let (mut begun, mut begun_bytes, mut last_bytes, mut idled) = (0u64, 0u64, 0u64, false);
            for (bytes, idle) in requests {
                if idle == 2 {
                    now += 3 * BURST_NS;
                    idled = true;
                }
                now += budget.wait_ns(now);
                let allowed = |rate: u64| u128::from(rate) * u128::from(now - start + BURST_NS) / u128::from(SECOND_NS) + 1;
                // What began before this one.
                prop_assert!(u128::from(begun) <= allowed(iops), "{begun} requests");
                prop_assert!(u128::from(begun_bytes - last_bytes) <= allowed(bytes_s), "{begun_bytes} bytes");
                budget.charge(now, bytes);
                begun += 1;
                begun_bytes += bytes;
                last_bytes = bytes;
            }
            if !idled {
                // Nanoseconds are cut off with each request.
                let needed = time_ns(begun - 1, iops).max(time_ns(begun_bytes - last_bytes, bytes_s));
                prop_assert!(now - start <= needed + begun, "{} ns for {needed}", now - start);
            }
        }
    }
}
