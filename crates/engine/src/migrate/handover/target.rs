//! The side that follows: see the parent module for states, limits and invariants.
//!
//! Messages move it as far as READY. From there on only the record does: it polls, and a message is no more than a
//! reason to look now.

use whimbrel_wire::api::DiskMove;
use whimbrel_wire::meta::{Mode, VmState};
use whimbrel_wire::peer::migrate::{Course, JournalEntry, Offer, Side, Step, ToSource, ToTarget};
use whimbrel_wire::{ErrorKind, HostId, Time, WireError};

use super::desk::{Asked, Desk};
use super::record::{Cas, CasResult, Seen, TargetView};
use super::{Action, Event, Outcome, limit};

/// What the target's host does for the machine. Idempotent, all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetWork {
    /// Check that this host could run the VM: versions, machine, room, names.
    Negotiate,
    /// Make room: incoming QEMU, files for RAM, layers, streams.
    Prepare,
    /// Check that all of memory, disk, device state and the list of I/O is here, loaded, and kept such that it
    /// survives the end of this agent (layers flushed).
    Verify,
    /// Reissue the listed I/O and let the guest run, if it does not already. On failure say truly whether it may
    /// have run.
    Resume,
    /// Start QEMU again from the kept memory and device state; the guest has never run here.
    Rebuild,
    /// Announce the guest's addresses.
    Announce,
    /// Fetch what is still at the source only. From here on the VM is one of this host's like any other: its end is no
    /// business of this machine's, and does not end the fetching. `Failed` is followed by another try.
    Pull,
    /// Drop everything of the attempt: QEMU (even if its guest runs: the right is gone), memory, layers. Must not
    /// touch the same VM if it has come back by a later attempt.
    Discard,
}

type Out = Vec<Action<ToSource, TargetWork>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// First look at the record.
    Reading,
    Negotiating,
    Accepted,
    Preparing,
    Receiving,
    Verifying,
    /// READY: the record decides.
    Ready,
    Resuming,
    Rebuilding,
    Announcing,
    /// The guest runs; the record is being told.
    Marking,
    Pulling,
    /// The volumes' records are being told that all is here.
    MarkingPulled,
    /// The guest has run and is gone; the record is being told.
    MarkingCrashed,
    HandingBack,
    Discarding,
    /// Found after a restart: all is done but for removing the journal entry.
    Closing,
    Done,
}

/// See the module's charter.
#[derive(Debug)]
pub struct Target {
    offer: Offer,
    state: State,
    step: Step,
    /// When the source was last heard.
    heard: Time,
    /// When the source was last spoken to.
    said: Time,
    desk: Desk,
    seen: Seen,
    /// QEMU or a stream here is broken: letting the guest run needs a rebuild first.
    broken: Option<WireError>,
    rebuilt: bool,
    /// The record has been told that an operator is needed.
    called: bool,
    /// An agent that ended since was about to let the guest run.
    may_have_run: bool,
    /// When work is to be started (again).
    work_at: Option<(TargetWork, Time)>,
    why: Outcome,
    outcome: Option<Outcome>,
}

impl Target {
    /// Begins on the source's first [`ToTarget::Offer`].
    pub fn new(offer: Offer, now: Time) -> Self {
        Self {
            offer,
            state: State::Reading,
            step: Step::Negotiate,
            heard: now,
            said: now,
            desk: Desk::default(),
            seen: Seen::default(),
            broken: None,
            rebuilt: false,
            called: false,
            may_have_run: false,
            work_at: None,
            why: Outcome::Moved,
            outcome: None,
        }
    }

    /// Goes on after a restart of the agent, from the attempt's newest entry. Before READY nothing can have been
    /// committed, and what streams had brought is not trusted: the attempt is discarded and the source told.
    pub fn recover(entry: &JournalEntry, now: Time) -> Self {
        let mut target = Self::new(entry.offer.clone(), now);
        target.step = entry.step;
        target.state = match (entry.course, entry.step) {
            (Course::HandBack, _) => State::HandingBack,
            (Course::Undo, _) => State::Discarding,
            // A look at the record, then `Resume`, which does nothing to a guest that runs.
            (Course::Onward, Step::Verify | Step::Commit | Step::Resume | Step::Announce | Step::Pull) => {
                State::Ready
            }
            (Course::Onward, Step::Release) => State::Closing,
            (Course::Onward, _) => State::Discarding,
        };
        target.may_have_run = entry.step >= Step::Resume;
        if target.state == State::Discarding {
            let text = format!("the agent of host {} restarted in step {}", entry.offer.target, entry.step);
            target.why = Outcome::Stayed(WireError::new(ErrorKind::Unavailable, text));
            target.work_at = Some((TargetWork::Discard, now));
        }
        target
    }

    /// What is moved.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The step it is in.
    pub fn step_now(&self) -> Step {
        self.step
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// What it waits for, or depends on, for people; none while it is busy.
    pub fn waiting_for(&self) -> Option<String> {
        let Offer { vm, source, target, .. } = &self.offer;
        match self.state {
            State::Reading
            | State::Marking
            | State::MarkingPulled
            | State::MarkingCrashed
            | State::HandingBack => Some(self.desk.words()),
            State::Ready if self.step == Step::Pull => Some(self.desk.words()),
            State::Ready if self.desk.trouble.is_some() => Some(self.desk.words()),
            State::Ready if self.called => Some(self.operator_words()),
            State::Ready => Some(format!("host {source} to commit the move of vm {vm} to {target}")),
            State::Pulling => {
                Some(format!("depends on {source}: the volumes' blocks are still being fetched"))
            }
            State::Accepted | State::Receiving => Some(format!("host {source}")),
            _ => None,
        }
    }

    /// When [`Event::Tick`] is due; none once it has finished.
    pub fn deadline(&self) -> Option<Time> {
        if self.state == State::Done {
            return None;
        }
        let must_read = self.desk.idle() && self.needs_record();
        let talk = self.said.plus_ms(limit::ALIVE_EVERY_MS);
        let kick = (must_read || self.state == State::Closing).then_some(self.said);
        [Some(talk), kick, self.work_at.map(|(_, at)| at), self.desk.deadline()].into_iter().flatten().min()
    }

    /// Takes an event in; appends what is to be done to `out`.
    pub fn step(&mut self, now: Time, event: Event<ToTarget, TargetWork>, out: &mut Out) {
        if self.state == State::Done {
            return;
        }
        match event {
            Event::Tick | Event::Cancel => {}
            Event::RecordChanged => {
                if self.needs_record() || self.follows_source() {
                    self.desk.read_anew(now, out);
                }
            }
            Event::Records(id, seen) => {
                if self.desk.answered(id, now).is_some() {
                    self.desk.trouble = None;
                    self.on_seen(now, *seen, out);
                }
            }
            Event::ReadFailed(id, error) => {
                if self.desk.answered(id, now).is_some() {
                    self.desk.trouble = Some(error.message);
                    self.desk.read_at(now.plus_ms(limit::STORE_RETRY_MS));
                }
            }
            Event::Cas(id, result) => {
                if self.desk.answered(id, now).is_some() {
                    self.on_cas(now, &result, out);
                }
            }
            Event::Peer(message) => self.on_peer(now, message, out),
            Event::Done(work) => self.on_done(now, work, out),
            Event::Failed { work, error, may_have_run } => {
                self.on_failed(now, work, error, may_have_run, out);
            }
            Event::Broken(error) => self.on_broken(error, out),
        }
        self.timers(now, out);
    }

    // ---- states -------------------------------------------------------------------------------------------------

    fn journal(&self, step: Step, course: Course, out: &mut Out) {
        let entry = JournalEntry {
            version: JournalEntry::VERSION,
            side: Side::Target,
            offer: self.offer.clone(),
            step,
            course,
        };
        // What is prepared must be found again to be removed; READY promises something that must outlive the agent;
        // "may have run" must outlive even the host, or a guest that ran would be handed back.
        let sync = matches!(step, Step::Prepare | Step::Verify | Step::Resume);
        out.push(Action::Journal { entry: Box::new(entry), sync });
    }

    fn enter(&mut self, step: Step, state: State, out: &mut Out) {
        self.step = step;
        self.state = state;
        out.push(Action::Enter(step));
    }

    fn say(&mut self, now: Time, message: ToSource, out: &mut Out) {
        self.said = now;
        out.push(Action::Send(message));
    }

    /// The source cannot have committed: READY has not been said.
    fn before_ready(&self) -> bool {
        matches!(
            self.state,
            State::Reading
                | State::Negotiating
                | State::Accepted
                | State::Preparing
                | State::Receiving
                | State::Verifying
        )
    }

    /// The source's messages say how to go on; should they fail to come, the record tells whether the attempt is over.
    fn follows_source(&self) -> bool {
        matches!(self.state, State::Accepted | State::Preparing | State::Receiving | State::Verifying)
    }

    fn needs_record(&self) -> bool {
        matches!(
            self.state,
            State::Reading
                | State::Ready
                | State::Marking
                | State::Pulling
                | State::MarkingPulled
                | State::MarkingCrashed
                | State::HandingBack
        )
    }

    fn timers(&mut self, now: Time, out: &mut Out) {
        if self.state == State::Done {
            return;
        }
        if let Some(Asked::Cas) = self.desk.overdue(now) {
            let error = WireError::new(ErrorKind::Unknown, "change the records: no answer from the store");
            self.on_cas(now, &CasResult::Unknown(error), out);
        }
        let silent_ms = now.since_ms(self.heard);
        if self.before_ready() && silent_ms >= limit::TARGET_PATIENCE_MS {
            let text = format!("host {} has not been heard for {} s", self.offer.source, silent_ms / 1000);
            self.discard(Outcome::Stayed(WireError::new(ErrorKind::Unavailable, text)), out);
        }
        if let Some((work, at)) = self.work_at
            && at <= now
        {
            self.work_at = None;
            out.push(Action::Do(work));
        }
        if self.state == State::Closing {
            self.finish(Outcome::Moved, out);
            return;
        }
        let lost = self.follows_source() && silent_ms >= limit::PEER_LOST_MS;
        if self.desk.idle() && (lost || self.wants_operator(now)) {
            self.desk.read(now, out);
        }
        if now >= self.said.plus_ms(limit::ALIVE_EVERY_MS) {
            let message = match self.state {
                State::Marking | State::Pulling => ToSource::Running,
                State::MarkingPulled => ToSource::Pulled,
                _ => ToSource::Alive,
            };
            self.say(now, message, out);
        }
        if self.desk.due(now) || (self.desk.idle() && self.needs_record()) {
            self.desk.read(now, out);
        }
    }

    /// The guest may stand still at the source. In mode B QEMU itself pauses it, before anybody says so.
    fn may_be_paused(&self) -> bool {
        let from = match self.offer.mode {
            Mode::A => Step::Pause,
            Mode::B => Step::Copy,
        };
        self.step >= from && matches!(self.state, State::Receiving | State::Verifying | State::Ready)
    }

    /// The source went silent with the guest paused, and the record does not say so yet.
    fn wants_operator(&self, now: Time) -> bool {
        self.may_be_paused() && !self.called && now.since_ms(self.heard) >= limit::PEER_SILENT_MS
    }

    // ---- what happened ------------------------------------------------------------------------------------------

    fn on_peer(&mut self, now: Time, message: ToTarget, out: &mut Out) {
        self.heard = now;
        match (message, self.state) {
            (ToTarget::Offer(_), State::Accepted) => self.say(now, ToSource::Accepted, out),
            (ToTarget::Enter(Step::Prepare), State::Accepted) => {
                self.journal(Step::Prepare, Course::Onward, out);
                self.enter(Step::Prepare, State::Preparing, out);
                out.push(Action::Do(TargetWork::Prepare));
            }
            (ToTarget::Enter(Step::Prepare), State::Receiving) => {
                self.say(now, ToSource::Did(Step::Prepare), out);
            }
            (ToTarget::Enter(step), State::Receiving) => match &self.broken {
                None => self.follow(step, out),
                Some(error) => {
                    let answer = ToSource::Failed(self.step, error.clone());
                    self.say(now, answer, out);
                }
            },
            (ToTarget::Enter(Step::Verify), State::Ready) => {
                let answer = match &self.broken {
                    None => ToSource::Did(Step::Verify),
                    Some(error) => ToSource::Failed(Step::Verify, error.clone()),
                };
                self.say(now, answer, out);
            }
            (ToTarget::Committed(_), State::Ready) => self.desk.read_anew(now, out),
            (ToTarget::Committed(_), State::Marking | State::Pulling) => {
                self.say(now, ToSource::Running, out);
            }
            (ToTarget::Abort(_), State::Ready) => self.desk.read_anew(now, out),
            (ToTarget::Abort(reason), _) if self.before_ready() => {
                self.discard(Outcome::Stayed(WireError::new(ErrorKind::Cancelled, reason)), out);
            }
            _ => {}
        }
    }

    /// The source is in `step`: enter it, and those before it of which no word came through.
    fn follow(&mut self, step: Step, out: &mut Out) {
        for next in Step::ALL {
            if *next > self.step && *next <= step.min(Step::Verify) {
                self.enter(*next, State::Receiving, out);
            }
        }
        if self.step == Step::Verify {
            self.state = State::Verifying;
            out.push(Action::Do(TargetWork::Verify));
        }
    }

    fn on_done(&mut self, now: Time, work: TargetWork, out: &mut Out) {
        match (work, self.state) {
            (TargetWork::Negotiate, State::Negotiating) => {
                self.state = State::Accepted;
                self.say(now, ToSource::Accepted, out);
            }
            (TargetWork::Prepare, State::Preparing) => {
                self.state = State::Receiving;
                self.say(now, ToSource::Did(Step::Prepare), out);
            }
            (TargetWork::Verify, State::Verifying) => {
                self.journal(Step::Verify, Course::Onward, out);
                self.state = State::Ready;
                // From here on the operator has one more choice.
                self.called = false;
                self.say(now, ToSource::Did(Step::Verify), out);
            }
            (TargetWork::Rebuild, State::Rebuilding) => self.resume(out),
            (TargetWork::Resume, State::Resuming) => {
                self.journal(Step::Announce, Course::Onward, out);
                self.enter(Step::Announce, State::Announcing, out);
                out.push(Action::Do(TargetWork::Announce));
            }
            (TargetWork::Announce, State::Announcing) => self.announced(now, out),
            (TargetWork::Pull, State::Pulling) => {
                self.state = State::MarkingPulled;
                self.desk.read_anew(now, out);
            }
            (TargetWork::Discard, State::Discarding) => self.finish(self.why.clone(), out),
            _ => {}
        }
    }

    fn on_failed(
        &mut self,
        now: Time,
        work: TargetWork,
        error: WireError,
        may_have_run: bool,
        out: &mut Out,
    ) {
        match (work, self.state) {
            (TargetWork::Negotiate | TargetWork::Prepare | TargetWork::Verify, _) if self.before_ready() => {
                self.cannot_take(error, out);
            }
            (TargetWork::Resume, State::Resuming) if may_have_run || self.may_have_run => {
                self.crashed(now, error, out);
            }
            (TargetWork::Resume, State::Resuming) if !self.rebuilt => self.rebuild(out),
            (TargetWork::Resume, State::Resuming) | (TargetWork::Rebuild, State::Rebuilding) => {
                self.hand_back(now, error, out);
            }
            // Neighbours learn the address from the guest's own traffic too.
            (TargetWork::Announce, State::Announcing) => self.announced(now, out),
            // The source is away: the task says what it depends on.
            (TargetWork::Pull, State::Pulling) => {
                self.work_at = Some((TargetWork::Pull, now.plus_ms(limit::ALIVE_EVERY_MS)));
            }
            (TargetWork::Discard, State::Discarding) => self.finish(self.why.clone(), out),
            _ => {}
        }
    }

    fn on_broken(&mut self, error: WireError, out: &mut Out) {
        if self.before_ready() {
            self.cannot_take(error, out);
        } else if self.state == State::Ready {
            // The source may have sent COMMIT already; it decides, the record tells.
            out.push(Action::Send(ToSource::Failed(Step::Verify, error.clone())));
            self.broken = Some(error);
        }
    }

    /// Tells the source that nothing will come of it. While the guest may stand still there, this side stays: if the
    /// source does not hear of it, because it is gone, somebody has to call the operator.
    fn cannot_take(&mut self, error: WireError, out: &mut Out) {
        out.push(Action::Send(ToSource::Failed(self.step, error.clone())));
        if self.may_be_paused() {
            self.state = State::Receiving;
            self.broken.get_or_insert(error);
        } else {
            self.discard(Outcome::Stayed(error), out);
        }
    }

    fn on_cas(&mut self, now: Time, result: &CasResult, out: &mut Out) {
        self.desk.heard_of(result);
        match (self.state, result) {
            (State::Marking, CasResult::Yes(_)) => self.marked(now, out),
            (State::MarkingPulled, CasResult::Yes(_)) => self.pulled(out),
            (State::MarkingCrashed, CasResult::Yes(_)) => self.marked(now, out),
            (State::HandingBack, CasResult::Yes(_)) => self.discard(self.why.clone(), out),
            (State::Receiving | State::Verifying | State::Ready, CasResult::Yes(_)) => {
                self.called = true;
                self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
            }
            (State::Receiving | State::Verifying | State::Ready, _) => {
                self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
            }
            (_, CasResult::NotMade(_)) => self.desk.read_at(now.plus_ms(limit::STORE_RETRY_MS)),
            _ => self.desk.read(now, out),
        }
    }

    /// A look at the record, in any state.
    fn on_seen(&mut self, now: Time, seen: Seen, out: &mut Out) {
        let view = seen.for_target(&self.offer);
        self.seen = seen;
        match (self.state, view) {
            (State::Reading, TargetView::Pending) => {
                self.enter(Step::Negotiate, State::Negotiating, out);
                out.push(Action::Do(TargetWork::Negotiate));
            }
            (State::Reading, _) => {
                let text = format!(
                    "take vm {} from host {}: the record does not name this attempt",
                    self.offer.vm, self.offer.source
                );
                let error = WireError::new(ErrorKind::Refused, text);
                self.say(now, ToSource::Failed(Step::Negotiate, error.clone()), out);
                self.finish(Outcome::Stayed(error), out);
            }
            (State::Accepted | State::Preparing, TargetView::Pending) => {
                self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
            }
            (State::Receiving | State::Verifying | State::Ready, TargetView::Pending) => {
                if self.wants_operator(now) {
                    let cas = self.seen.call_operator(self.operator_words());
                    self.cas(now, cas, out);
                } else {
                    self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
                }
            }
            (State::Accepted | State::Preparing | State::Receiving | State::Verifying, _) => {
                let error = WireError::new(ErrorKind::Refused, "the attempt was taken out of the record");
                self.discard(Outcome::Stayed(error), out);
            }
            (State::Ready, TargetView::Mine) => self.take(now, out),
            (State::Ready, TargetView::Over(holder)) => {
                let outcome = self.over(holder);
                self.discard(outcome, out);
            }
            // The volumes were deleted meanwhile.
            (State::Pulling, TargetView::Mine) if !self.seen.depends_on(&self.offer.source) => {
                self.pulled(out);
            }
            (State::Pulling, TargetView::Mine) => self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS)),
            (State::Pulling, TargetView::Over(holder)) => self.discard(Outcome::Lost(holder), out),
            (State::Marking | State::MarkingPulled | State::MarkingCrashed, TargetView::Mine) => {
                self.mark(now, out);
            }
            (State::Marking | State::MarkingPulled | State::MarkingCrashed, view) => {
                let holder = match view {
                    TargetView::Over(holder) => holder,
                    TargetView::Mine | TargetView::Pending => None,
                };
                self.discard(Outcome::Lost(holder), out);
            }
            (State::HandingBack, TargetView::Mine) => {
                let cas = self.seen.hand_back(&self.offer);
                self.cas(now, cas, out);
            }
            (State::HandingBack, _) => self.discard(self.why.clone(), out),
            _ => {}
        }
    }

    // ---- transitions --------------------------------------------------------------------------------------------

    fn cas(&mut self, now: Time, cas: Option<Cas>, out: &mut Out) {
        // None only if the record is gone, which `on_seen` has dealt with.
        if let Some(cas) = cas {
            self.desk.cas(now, cas, out);
        }
    }

    fn over(&self, holder: Option<HostId>) -> Outcome {
        if holder.as_ref() == Some(&self.offer.source) {
            Outcome::Stayed(WireError::new(
                ErrorKind::Cancelled,
                "the source took the attempt out of the record",
            ))
        } else {
            Outcome::Lost(holder)
        }
    }

    /// The record names this host: the VM is ours to run.
    fn take(&mut self, now: Time, out: &mut Out) {
        if self.step == Step::Pull {
            return self.pull(now, out);
        }
        // After a restart that may come after `resume`: a later entry is not replaced by an earlier one.
        if self.step < Step::Commit {
            self.journal(Step::Commit, Course::Onward, out);
            self.enter(Step::Commit, State::Resuming, out);
        }
        match self.broken.take() {
            None => self.resume(out),
            Some(error) if self.may_have_run => self.crashed(now, error, out),
            Some(_) => self.rebuild(out),
        }
    }

    fn rebuild(&mut self, out: &mut Out) {
        self.rebuilt = true;
        // What is broken is replaced.
        self.broken = None;
        self.state = State::Rebuilding;
        out.push(Action::Do(TargetWork::Rebuild));
    }

    /// The guest has run here and is gone, or may have: giving it back would take it back in time.
    fn crashed(&mut self, now: Time, error: WireError, out: &mut Out) {
        self.why = Outcome::Crashed(error);
        self.state = State::MarkingCrashed;
        self.desk.read_anew(now, out);
    }

    fn resume(&mut self, out: &mut Out) {
        self.journal(Step::Resume, Course::Onward, out);
        self.enter(Step::Resume, State::Resuming, out);
        out.push(Action::Do(TargetWork::Resume));
    }

    fn announced(&mut self, now: Time, out: &mut Out) {
        self.state = State::Marking;
        self.say(now, ToSource::Running, out);
        self.desk.read_anew(now, out);
    }

    /// Tells the record what has become of the VM here.
    fn mark(&mut self, now: Time, out: &mut Out) {
        let cas = match self.state {
            State::Marking if self.seen.state_is(VmState::Running) => return self.marked(now, out),
            State::Marking => self.seen.edit(|vm| {
                vm.state = VmState::Running;
                vm.waiting_for = None;
            }),
            State::MarkingPulled if !self.seen.depends_on(&self.offer.source) => return self.pulled(out),
            State::MarkingPulled => self.seen.pulled(),
            _ => self.seen.settle(VmState::Crashed),
        };
        self.cas(now, cas, out);
    }

    /// The record says what has become of the VM here. Even if it is gone, its disk is not: the rest is fetched.
    fn marked(&mut self, now: Time, out: &mut Out) {
        match self.offer.disk {
            DiskMove::Copy => self.finish_here(out),
            DiskMove::OnDemand => {
                self.journal(Step::Pull, Course::Onward, out);
                self.enter(Step::Pull, State::Pulling, out);
                self.pull(now, out);
            }
        }
    }

    fn pull(&mut self, now: Time, out: &mut Out) {
        self.state = State::Pulling;
        self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
        out.push(Action::Do(TargetWork::Pull));
    }

    fn pulled(&mut self, out: &mut Out) {
        out.push(Action::Send(ToSource::Pulled));
        self.finish_here(out);
    }

    /// Nothing of the attempt is left to do here; usually the VM has moved.
    fn finish_here(&mut self, out: &mut Out) {
        self.journal(Step::Release, Course::Onward, out);
        self.step = Step::Release;
        out.push(Action::Enter(Step::Release));
        self.finish(self.why.clone(), out);
    }

    /// Before READY the guest can only go on at the source: that has all of it, this side does not.
    fn operator_words(&self) -> String {
        let Offer { vm, source, target, .. } = &self.offer;
        let paused = match self.step >= Step::Pause {
            true => format!("host {source} paused vm {vm} for a move to {target} and is silent"),
            false => format!("host {source} may have paused vm {vm} for a move to {target} and is silent"),
        };
        if self.state == State::Ready {
            format!(
                "{paused}: bring {source} back, or make sure that it is off and run: vm recover {vm} --on {target}"
            )
        } else {
            format!("{paused}: bring {source} back; {target} has not got all of the VM")
        }
    }

    fn hand_back(&mut self, now: Time, error: WireError, out: &mut Out) {
        self.why = Outcome::Stayed(error);
        self.state = State::HandingBack;
        self.journal(Step::Resume, Course::HandBack, out);
        self.desk.read_anew(now, out);
    }

    fn discard(&mut self, outcome: Outcome, out: &mut Out) {
        self.why = outcome;
        self.state = State::Discarding;
        self.journal(self.step, Course::Undo, out);
        out.push(Action::Do(TargetWork::Discard));
    }

    fn finish(&mut self, outcome: Outcome, out: &mut Out) {
        self.state = State::Done;
        self.outcome = Some(outcome.clone());
        out.push(Action::Finished(outcome));
    }
}
