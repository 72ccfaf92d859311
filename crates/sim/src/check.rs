//! What must hold, whatever breaks. Rules that belong to one act (the guest goes on, a right changes, a block is
//! delivered) are checked where it happens; here are those about time, and about the end.

use whimbrel_wire::Time;
use whimbrel_wire::meta::VmState;

use crate::guest::{Copy, CopyState};
use crate::world::{HostIx, What, World};

/// A source that lost its target before COMMIT lets the guest run within this time.
const LOST_TARGET_MS: u64 = 5_000;
/// The store must have answered within this time when the pause begins.
const STORE_FRESH_MS: u64 = 1_000;

impl World {
    /// The pause begins only when the store has just answered.
    pub(crate) fn check_pause(&mut self, host: HostIx) {
        let answered = self.hosts[host].agent.as_ref().and_then(|agent| agent.store_answered);
        let fresh = answered.is_some_and(|at| self.now <= at.plus_ms(STORE_FRESH_MS));
        if !fresh {
            self.fail(format!("h{host} pauses the guest; the store last answered at {answered:?}"));
        }
    }

    pub(crate) fn on_watchdog(&mut self) {
        self.after_ms(100, What::Watchdog);
        for host in 0..self.hosts.len() {
            let Some(agent) = &self.hosts[host].agent else { continue };
            let paused = agent.sources.iter().find_map(|(attempt, source)| {
                let copy = self.hosts[host].copies.get(self.hosts[host].copy_of.get(attempt)?)?;
                (source.can_cancel() && copy.state == CopyState::Stopped)
                    .then(|| source.offer().target.clone())
            });
            let Some(target) = paused else { continue };
            let target = self.host_ix(&target);
            let Some(since) = self.unheard_since.get(&(host, target)).copied() else { continue };
            if self.now > since.plus_ms(LOST_TARGET_MS) {
                let words = format!(
                    "h{host} lost h{target} at {} ms, before COMMIT, and the guest still stands still",
                    since.0 / 1_000_000
                );
                self.fail(words);
            }
        }
    }

    /// Nothing more is going to happen.
    pub fn settled(&self) -> bool {
        let idle = self
            .hosts
            .iter()
            .filter_map(|host| host.agent.as_ref())
            .all(|agent| agent.sources.is_empty() && agent.targets.is_empty() && agent.reader.is_idle());
        self.calm && idle && self.reads_done() && (self.excused || self.guest_runs_at().is_some())
    }

    fn guest_runs_at(&self) -> Option<HostIx> {
        let runs =
            |host: &HostIx| self.hosts[*host].copies.values().any(|copy| copy.state == CopyState::Running);
        (0..self.hosts.len()).find(runs)
    }

    /// What must hold when faults have been over for long.
    pub fn check_end(&mut self) {
        if self.violation.is_none()
            && let Some(words) = self.end_broken()
        {
            self.fail(words);
        }
    }

    fn end_broken(&self) -> Option<String> {
        let someone_gone = self.hosts.iter().any(|host| host.gone);
        for (ix, host) in self.hosts.iter().enumerate() {
            let Some(agent) = &host.agent else { continue };
            let sources = agent.sources.values().map(|source| (source.step_now(), source.waiting_for()));
            let targets = agent.targets.values().map(|target| (target.step_now(), target.waiting_for()));
            for (step, waiting_for) in sources.chain(targets) {
                if waiting_for.is_none() || !someone_gone {
                    return Some(format!("h{ix} is still in step {step}, waiting for {waiting_for:?}"));
                }
            }
        }
        let left_over = self.hosts.iter().enumerate().find_map(|(ix, host)| {
            let agent = host.agent.as_ref()?;
            let idle = agent.sources.is_empty() && agent.targets.is_empty();
            let needed = |copy: &&Copy| copy.state == CopyState::Running || !copy.layer.missing.is_empty();
            let left = host.copies.values().find(|copy| !needed(copy))?;
            (idle && !self.excused)
                .then(|| format!("h{ix} still keeps a {:?} copy that nobody needs", left.state))
        });
        if left_over.is_some() {
            return left_over;
        }
        self.reads_broken().or_else(|| self.guest_broken())
    }

    fn guest_broken(&self) -> Option<String> {
        if self.excused {
            return None;
        }
        let record = self.store.vm();
        let holder = self.host_ix(&record.right.holder);
        // `--disk on-demand` says that it depends on the source; the source is gone.
        let lost = self.hosts[holder].copies.values().any(|copy| !copy.layer.missing.is_empty());
        if lost && self.hosts.iter().any(|host| host.gone) {
            return None;
        }
        let Some(at) = self.guest_runs_at() else {
            return Some(format!("the guest runs nowhere; the record says {:?} at h{holder}", record.state));
        };
        if at != holder {
            return Some(format!("the guest runs at h{at}, the record says h{holder}"));
        }
        // An agent that never came back has left the record as it was.
        let left = self.hosts[holder].gone;
        if !left && (record.state != VmState::Running || record.attempt.is_some()) {
            return Some(format!(
                "the guest runs; the record says {:?}, attempt {:?}",
                record.state, record.attempt
            ));
        }
        let copy = self.hosts[at].copies.values().find(|copy| copy.state == CopyState::Running)?;
        let wrong = copy.ram.iter().zip(&self.truth.ram).position(|(found, want)| found != want);
        wrong.map(|page| {
            format!(
                "page {page} ends as version {}, the guest wrote {}",
                copy.ram[page], self.truth.ram[page]
            )
        })
    }
}

/// How long a run lasts at most.
pub const END: Time = Time(180_000_000_000);
