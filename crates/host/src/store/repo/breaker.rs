//! The circuit breaker of a store.
//!
//! ```text
//!   closed ── FAILURES_MAX in a row ──► open (answers at once) ── pause over ──► one call is let through
//!     ▲                                   ▲                                         │
//!     └────────────── it succeeds ────────┼─────────────────────────────────────────┤
//!                                         └── it fails: the pause doubles ──────────┘
//! ```

use parking_lot::Mutex;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

const FAILURES_MAX: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// See the module's charter.
#[derive(Default)]
pub struct Breaker {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    /// Fails at once while open.
    pub fn check(&self) -> Result<()> {
        let mut state = self.state.lock();
        let Some(until) = state.open_until else { return Ok(()) };
        let now = Instant::now();
        if now < until {
            let left_ms = until.duration_since(now).as_millis();
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!(
                    "ask the store: it failed {} times in a row; next try in {left_ms} ms",
                    state.failures
                ),
            ));
        }
        // This call probes; the others go on failing until it has ended.
        state.open_until = Some(now + PAUSE);
        Ok(())
    }

    /// Notes how a call ended: `answered` even if the answer was "no".
    pub fn note(&self, answered: bool) {
        let mut state = self.state.lock();
        if answered {
            *state = State::default();
            return;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures >= FAILURES_MAX {
            let doublings = (state.failures - FAILURES_MAX).min(5);
            state.open_until = Some(Instant::now() + (PAUSE * 2u32.pow(doublings)).min(PAUSE_MAX));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_on_an_answer() {
        let breaker = Breaker::default();
        breaker.note(false);
        breaker.note(false);
        breaker.note(true);
        breaker.note(false);
        breaker.note(false);
        assert!(breaker.check().is_ok());
        breaker.note(false);
        assert_eq!(breaker.check().unwrap_err().kind(), ErrorKind::Unavailable);
        breaker.state.lock().open_until = Some(Instant::now());
        assert!(breaker.check().is_ok(), "one probe");
        assert!(breaker.check().is_err(), "and only one");
        breaker.note(true);
        assert!(breaker.check().is_ok());
    }
}
