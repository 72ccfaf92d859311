//! A limit on bytes per second, shared by everything that one move sends (`--bandwidth`), and changed while it does.
//!
//! ```text
//!   pass(n) ──► owed ≤ a burst? ── yes ─► owed += n ─► go
//!                  │ no: wait until so much is paid, or the limit changes, and look again
//!                  └──────────────────────────────────────────────────────────────────
//! ```
//!
//! Invariant: over any second about `bytes_s` bytes pass; a burst of at most [`BURST_MS`] and one piece more are let through
//! at once.
//!
//! Not here: priorities between streams (`link`).

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// How much time's worth of bytes may pass at once, milliseconds.
pub const BURST_MS: u64 = 50;

/// See the module.
#[derive(Debug)]
pub struct Limiter {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    bytes_s: Option<f64>,
    /// Bytes that were let through and are not paid for, at `at`.
    owed: f64,
    at: Instant,
}

impl State {
    fn pay(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.owed = self.bytes_s.map_or(0.0, |rate| (self.owed - rate * seconds).max(0.0));
        self.at = now;
    }
}

impl Limiter {
    /// A limit in bytes per second, or none.
    pub fn new(bytes_s: Option<u64>) -> Self {
        let state = State { bytes_s: rate(bytes_s), owed: 0.0, at: Instant::now() };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Changes the limit, also for what waits.
    pub fn set(&self, bytes_s: Option<u64>) {
        {
            let mut state = self.state.lock();
            state.pay(Instant::now());
            state.bytes_s = rate(bytes_s);
        }
        self.changed.notify_waiters();
    }

    /// Waits until `bytes` may pass; returns how long that was.
    pub async fn pass(&self, bytes: usize) -> Duration {
        let started = Instant::now();
        loop {
            // Before the look: a change after it is not missed.
            let changed = self.changed.notified();
            let now = Instant::now();
            let Some(wait) = self.try_pass(bytes, now) else { return now.duration_since(started) };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// Lets `bytes` through, or says when to ask again.
    fn try_pass(&self, bytes: usize, now: Instant) -> Option<Duration> {
        let mut state = self.state.lock();
        state.pay(now);
        let rate = state.bytes_s?;
        // Clocks round; a byte more does not matter.
        let over = state.owed - rate * BURST_MS as f64 / 1e3 - 1.0;
        if over > 0.0 {
            return Some(Duration::from_secs_f64((over + 1.0) / rate));
        }
        state.owed += bytes as f64;
        None
    }
}

fn rate(bytes_s: Option<u64>) -> Option<f64> {
    bytes_s.filter(|rate| *rate > 0).map(|rate| rate as f64)
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
            match limiter.try_pass(10_000, now) {
                Some(wait) => now += wait,
                None => passed += 10_000,
            }
        }
        assert!((1_000_000..=1_070_000).contains(&passed), "{passed}");
    }

    #[test]
    fn without_a_limit_nothing_waits_and_idle_time_is_not_saved_up() {
        assert_eq!(Limiter::new(None).try_pass(1 << 40, Instant::now()), None);
        let limiter = Limiter::new(Some(1_000_000));
        let later = Instant::now() + Duration::from_secs(100);
        // The burst, one more on credit, then waiting.
        assert_eq!(limiter.try_pass(50_000, later), None);
        assert_eq!(limiter.try_pass(50_000, later), None);
        assert_eq!(limiter.try_pass(1, later), Some(Duration::from_millis(50)));
    }

    #[test]
    fn what_is_owed_is_paid_at_the_new_rate_and_not_at_all_without_one() {
        let limiter = Limiter::new(Some(1_000));
        assert_eq!(limiter.try_pass(1_000_000, Instant::now()), None);
        assert!(limiter.try_pass(1, Instant::now()).is_some_and(|wait| wait > Duration::from_secs(900)));
        limiter.set(Some(10_000_000));
        assert!(limiter.try_pass(1, Instant::now()).is_some_and(|wait| wait < Duration::from_secs(1)));
        limiter.set(None);
        assert_eq!(limiter.try_pass(1, Instant::now()), None);
    }
}
