//! A limit on bytes per second, shared by everything that one move sends (`--bandwidth`).
//!
//! Invariant: over any second about `bytes_s` bytes pass; a burst of at most [`BURST_MS`] is let through at once.
//!
//! Not here: priorities between streams (`link`).

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How much time's worth of bytes may pass at once, milliseconds.
pub const BURST_MS: u64 = 50;

/// See the module.
#[derive(Debug)]
pub struct Limiter(Mutex<State>);

#[derive(Debug)]
struct State {
    bytes_s: Option<f64>,
    /// When everything that was let through so far has been paid for.
    paid_at: Instant,
}

impl Limiter {
    /// A limit in bytes per second, or none.
    pub fn new(bytes_s: Option<u64>) -> Self {
        let limiter = Self(Mutex::new(State { bytes_s: None, paid_at: Instant::now() }));
        limiter.set(bytes_s);
        limiter
    }

    /// Changes the limit; what waits already waits as before.
    pub fn set(&self, bytes_s: Option<u64>) {
        self.0.lock().bytes_s = bytes_s.filter(|rate| *rate > 0).map(|rate| rate as f64);
    }

    /// Waits until `bytes` may pass; returns how long that was.
    pub async fn pass(&self, bytes: usize) -> Duration {
        let wait = self.reserve(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        wait
    }

    fn reserve(&self, bytes: usize, now: Instant) -> Duration {
        let mut state = self.0.lock();
        let Some(rate) = state.bytes_s else { return Duration::ZERO };
        let burst = Duration::from_millis(BURST_MS);
        let earliest = now.checked_sub(burst).unwrap_or(now);
        let paid_at = state.paid_at.max(earliest);
        let wait = paid_at.saturating_duration_since(now);
        state.paid_at = paid_at + Duration::from_secs_f64(bytes as f64 / rate);
        wait
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn over_a_second_no_more_passes_than_the_limit_and_a_burst() {
        let limiter = Limiter::new(Some(1_000_000));
        let start = Instant::now();
        let (mut now, mut passed) = (start, 0);
        while now < start + Duration::from_secs(1) {
            now += limiter.reserve(10_000, now);
            passed += 10_000;
        }
        assert!((1_000_000..=1_070_000).contains(&passed), "{passed}");
    }

    #[test]
    fn without_a_limit_nothing_waits_and_idle_time_is_not_saved_up() {
        assert_eq!(Limiter::new(None).reserve(1 << 40, Instant::now()), Duration::ZERO);
        let limiter = Limiter::new(Some(1_000_000));
        let later = Instant::now() + Duration::from_secs(100);
        // The burst, one more on credit, then waiting.
        assert_eq!(limiter.reserve(50_000, later), Duration::ZERO);
        assert_eq!(limiter.reserve(50_000, later), Duration::ZERO);
        assert_eq!(limiter.reserve(1, later), Duration::from_millis(50));
    }
}
