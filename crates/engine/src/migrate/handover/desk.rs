//! Requests to the metadata store: one at a time, each with a number, a limit, and a time to try again.
//!
//! Invariant: only the answer to the newest request counts. A CAS without an answer is unknown, never failed.

use whimbrel_wire::Time;

use super::{Action, Cas, CasResult, ReqId, limit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read,
    Cas,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Desk {
    last: u64,
    pending: Option<(ReqId, Asked, Time)>,
    again_at: Option<Time>,
    /// Why the newest request failed, until one succeeds.
    pub(super) trouble: Option<String>,
}

impl Desk {
    fn next(&mut self, asked: Asked, now: Time) -> ReqId {
        self.last += 1;
        let id = ReqId(self.last);
        self.pending = Some((id, asked, now));
        self.again_at = None;
        id
    }

    /// Reads the records, unless a request is under way already.
    pub(super) fn read<M, W>(&mut self, now: Time, out: &mut Vec<Action<M, W>>) {
        if self.pending.is_none() {
            let id = self.next(Asked::Read, now);
            out.push(Action::Read(id));
        }
    }

    /// Reads anew, even if a read is under way: it might have seen the state before something that has happened.
    pub(super) fn read_anew<M, W>(&mut self, now: Time, out: &mut Vec<Action<M, W>>) {
        if !matches!(self.pending, Some((_, Asked::Cas, _))) {
            let id = self.next(Asked::Read, now);
            out.push(Action::Read(id));
        }
    }

    /// Changes the records. A read under way is forgotten.
    pub(super) fn cas<M, W>(&mut self, now: Time, cas: Cas, out: &mut Vec<Action<M, W>>) {
        let id = self.next(Asked::Cas, now);
        out.push(Action::Cas(id, Box::new(cas)));
    }

    /// Whatever is under way, its answer no longer counts.
    pub(super) fn forget(&mut self) {
        self.pending = None;
        self.again_at = None;
    }

    /// Reads at `at`, unless something else is asked before.
    pub(super) fn read_at(&mut self, at: Time) {
        self.again_at = Some(at);
    }

    /// If `id` is the newest request, it is answered now; how long that took, milliseconds.
    pub(super) fn answered(&mut self, id: ReqId, now: Time) -> Option<u64> {
        let (pending, _, since) = self.pending?;
        if pending != id {
            return None;
        }
        self.pending = None;
        Some(now.since_ms(since))
    }

    /// The request whose limit has run out; it counts as answered.
    pub(super) fn overdue(&mut self, now: Time) -> Option<Asked> {
        let (_, asked, since) = self.pending?;
        if now < since.plus_ms(limit::STORE_MS) {
            return None;
        }
        self.pending = None;
        self.trouble = Some(format!("no answer for {} s", limit::STORE_MS / 1000));
        Some(asked)
    }

    /// Whether the time to try again has come.
    pub(super) fn due(&mut self, now: Time) -> bool {
        let due = self.pending.is_none() && self.again_at.is_some_and(|at| at <= now);
        if due {
            self.again_at = None;
        }
        due
    }

    /// Nothing is asked and nothing will be.
    pub(super) fn idle(&self) -> bool {
        self.pending.is_none() && self.again_at.is_none()
    }

    /// When something has to be done here.
    pub(super) fn deadline(&self) -> Option<Time> {
        match self.pending {
            Some((_, _, since)) => Some(since.plus_ms(limit::STORE_MS)),
            None => self.again_at,
        }
    }

    /// Remembers what a change's answer says about the store.
    pub(super) fn heard_of(&mut self, result: &CasResult) {
        self.trouble = match result {
            CasResult::NotMade(error) | CasResult::Unknown(error) => Some(error.message.clone()),
            CasResult::Yes(_) | CasResult::Conflict => None,
        };
    }

    /// Words for people: why the store is waited for.
    pub(super) fn words(&self) -> String {
        match &self.trouble {
            Some(trouble) => format!("the metadata store ({trouble})"),
            None => "the metadata store".to_owned(),
        }
    }
}
