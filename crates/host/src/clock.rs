//! The host's monotonic clock, as the engine's [`Time`], and the wall clock for records.
//!
//! Invariant: nothing is decided by the wall clock except the end of certificates and tokens.

use rustix::time::{ClockId, clock_gettime};
use std::time::{SystemTime, UNIX_EPOCH};
use whimbrel_wire::Time;

/// Nanoseconds of `CLOCK_MONOTONIC`: the same clock in every process of this machine.
pub fn now() -> Time {
    let time = clock_gettime(ClockId::Monotonic);
    // The kernel's monotonic clock is never negative.
    Time(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
}

/// Seconds since 1970.
pub fn wall_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn time_passes() {
        let before = now();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!((5..5_000).contains(&now().since_ms(before)));
        assert!(wall_s() > 1_700_000_000);
    }
}
