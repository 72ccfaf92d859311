//! The side that drives: see the parent module for states, limits and invariants.
//!
//! Everything that can go wrong before COMMIT is sent ends in [`Source::undo`]; everything after it is decided by
//! what the record says ([`Source::on_seen`]).

mod words;

use whimbrel_wire::api::DiskMove;
use whimbrel_wire::meta::VmState;
use whimbrel_wire::peer::migrate::{Course, JournalEntry, Offer, Side, Step, ToSource, ToTarget};
use whimbrel_wire::{Epoch, ErrorKind, Time, WireError};

use super::desk::{Asked, Desk};
use super::record::{Cas, CasResult, Seen, SourceView};
use super::{Action, Event, Outcome, Plant, limit};

/// What the source's host does for the machine. Idempotent, all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceWork {
    /// Copy memory and disk in rounds. `Done` when the rest fits the downtime limit, and again whenever it fits
    /// once more; copying goes on until `Pause`.
    Copy,
    /// Stop the guest.
    Pause,
    /// Cancel outstanding I/O, list it, send the list; refuse I/O from here on.
    ListIo,
    /// Send what has changed since, memory and disk; `Done` when the target has it. If the disk follows on demand,
    /// make the layer durable instead: the guest will read it from here after it has resumed elsewhere, and what it
    /// has been told is written must not change under it if this host loses power.
    LastRound,
    /// Save and send the device state; `Done` when the target has it.
    DeviceState,
    /// Let the target, which holds the right now, read the layers here, and let nobody write them (`--disk on-demand`);
    /// lasts until `ResumeHere`, `Release`, or the end of this agent.
    Serve,
    /// Stop whatever of the above is under way, take I/O again, reissue what was cancelled, let the guest run if it
    /// is stopped. Does nothing to a guest that runs.
    ResumeHere,
    /// Give up what is kept of this attempt here: end QEMU (even if its guest runs: the right is gone), drop
    /// memory and layers. Must not touch the same VM if it has come back by a later attempt.
    Release,
}

pub(super) type Out = Vec<Action<ToTarget, SourceWork>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// First look at the record.
    Reading,
    /// The attempt is being written into it.
    Writing,
    Offered,
    Preparing,
    Copying,
    /// The rest fits; the store is asked whether it is there.
    Checking,
    /// Work of the current step, the guest paused.
    Working(SourceWork),
    Verifying,
    /// COMMIT is sent.
    Committing,
    /// Reading back what became of COMMIT (also: the first look after a restart).
    Resolving,
    /// Taking the attempt out of the record before anything else, since COMMIT may still be on its way.
    Fencing,
    /// The VM is the target's; it has not been heard to run.
    Waiting,
    /// It runs there and depends on this host.
    Serving,
    /// Found after a restart: the copy was about to be given up.
    Dropping,
    Releasing,
    /// The guest is being let go here.
    Undoing,
    /// The guest runs here; the record is being put in order.
    Clearing,
    Done,
}

/// See the module's charter.
#[derive(Debug)]
pub struct Source {
    offer: Offer,
    plant: Option<Plant>,
    state: State,
    step: Step,
    /// When the state was entered.
    since: Time,
    /// When the target was last heard.
    heard: Time,
    /// When the target was last spoken to.
    said: Time,
    /// The attempt may still get into the record, by a request that has had no answer.
    begin_open: bool,
    /// The record has been told that an operator is needed.
    called: bool,
    desk: Desk,
    seen: Seen,
    /// Epoch at which this host holds the right, as far as it knows; grows if the right is handed back.
    epoch: Epoch,
    /// How the move will have ended once everything is undone or released.
    why: Outcome,
    /// The guest could not be let go here.
    crashed: Option<WireError>,
    /// When `Serve` is to be tried again.
    serve_at: Option<Time>,
    outcome: Option<Outcome>,
}

impl Source {
    /// Begins the move of a VM that runs here. `offer.epoch` is that of the VM's right as the caller knows it.
    pub fn new(offer: Offer, now: Time) -> Self {
        Self {
            plant: None,
            state: State::Reading,
            step: Step::Negotiate,
            since: now,
            heard: now,
            said: now,
            begin_open: false,
            called: false,
            desk: Desk::default(),
            seen: Seen::default(),
            epoch: offer.epoch,
            why: Outcome::Moved,
            crashed: None,
            serve_at: None,
            outcome: None,
            offer,
        }
    }

    /// The same machine with a planted mistake; for the simulator.
    #[must_use]
    pub fn with_plant(mut self, plant: Option<Plant>) -> Self {
        self.plant = plant;
        self
    }

    /// Goes on after a restart of the agent, from the attempt's newest entry: reads the record, then undoes the
    /// attempt or goes on after COMMIT, as the record says.
    pub fn recover(entry: &JournalEntry, now: Time) -> Self {
        let mut source = Self::new(entry.offer.clone(), now);
        source.step = entry.step;
        source.state = State::Resolving;
        source.why = Outcome::Stayed(WireError::new(
            ErrorKind::Unavailable,
            format!(
                "move vm {}: the agent of host {} restarted in step {}",
                entry.offer.vm, entry.offer.source, entry.step
            ),
        ));
        if entry.step == Step::Release && entry.course == Course::Onward {
            source.state = State::Dropping;
        }
        source.begin_open = entry.step == Step::Negotiate;
        source
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

    /// Whether `Cancel` still has an effect.
    pub fn can_cancel(&self) -> bool {
        self.before_commit()
    }

    /// Whether the VM is the target's as far as this side knows.
    pub fn committed(&self) -> bool {
        matches!(self.state, State::Waiting | State::Serving)
            || (self.state == State::Releasing && self.why == Outcome::Moved)
    }

    /// When [`Event::Tick`] is due; none once it has finished.
    pub fn deadline(&self) -> Option<Time> {
        if self.state == State::Done {
            return None;
        }
        let limit = self.state_limit_ms().map(|(ms, _)| self.since.plus_ms(ms));
        let silence = self.silence_limit_ms().map(|ms| self.heard.plus_ms(ms));
        let talk = self.talk().map(|_| self.said.plus_ms(limit::ALIVE_EVERY_MS));
        let must_act = self.state == State::Dropping || (self.desk.idle() && self.needs_record());
        let kick = must_act.then_some(self.since);
        [limit, silence, talk, kick, self.serve_at, self.desk.deadline()].into_iter().flatten().min()
    }

    /// Takes an event in; appends what is to be done to `out`.
    pub fn step(&mut self, now: Time, event: Event<ToSource, SourceWork>, out: &mut Out) {
        if self.state == State::Done {
            return;
        }
        match event {
            Event::Tick => {}
            Event::Cancel => {
                if self.before_commit() {
                    self.undo(now, Outcome::Cancelled, out);
                }
            }
            Event::RecordChanged => {
                if !matches!(
                    self.state,
                    State::Committing | State::Fencing | State::Releasing | State::Undoing
                ) {
                    self.desk.read_anew(now, out);
                }
            }
            Event::Records(id, seen) => {
                if let Some(took_ms) = self.desk.answered(id, now) {
                    self.desk.trouble = None;
                    self.on_seen(now, *seen, took_ms, out);
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
            Event::Failed { work, error, .. } => self.on_failed(now, work, error, out),
            // After COMMIT was sent the record decides; letting a lost guest go on here fails by itself.
            Event::Broken(error) => {
                if self.before_commit() {
                    self.undo(now, Outcome::Stayed(error), out);
                }
            }
        }
        self.timers(now, out);
    }

    // ---- states -------------------------------------------------------------------------------------------------

    fn go(&mut self, now: Time, state: State) {
        self.state = state;
        self.since = now;
        if !matches!(state, State::Waiting | State::Serving) {
            self.serve_at = None;
        }
    }

    fn journal(&self, course: Course, out: &mut Out) {
        let entry = JournalEntry {
            version: JournalEntry::VERSION,
            side: Side::Source,
            offer: self.offer.clone(),
            step: self.step,
            course,
        };
        // After the loss of power no QEMU is left here, and the record alone says what to do: no need to wait for
        // the disk while the guest stands still.
        out.push(Action::Journal { entry: Box::new(entry), sync: self.step == Step::Negotiate });
    }

    /// Enters a step: journal, fail point, word to the target.
    fn enter(&mut self, now: Time, step: Step, state: State, out: &mut Out) {
        self.step = step;
        self.go(now, state);
        self.journal(Course::Onward, out);
        out.push(Action::Enter(step));
        if (Step::Prepare..=Step::Verify).contains(&step) {
            self.said = now;
            out.push(Action::Send(ToTarget::Enter(step)));
        }
    }

    fn enter_work(&mut self, now: Time, step: Step, work: SourceWork, out: &mut Out) {
        self.enter(now, step, State::Working(work), out);
        out.push(Action::Do(work));
    }

    /// The attempt can be undone without asking the store.
    fn before_commit(&self) -> bool {
        matches!(
            self.state,
            State::Reading
                | State::Writing
                | State::Offered
                | State::Preparing
                | State::Copying
                | State::Checking
                | State::Working(_)
                | State::Verifying
        )
    }

    /// The target went silent with the VM in its hands, and the record does not say so yet.
    fn wants_operator(&self, now: Time) -> bool {
        !self.called && now.since_ms(self.heard) >= limit::PEER_SILENT_MS
    }

    /// What the operator can do about a target that does not run what it holds.
    fn way_out(&self) -> String {
        let Offer { vm, source, target, .. } = &self.offer;
        format!("bring {target} back, or make sure that it is off and run: vm recover {vm} --on {source}")
    }

    /// These states cannot go on without a look at the record.
    fn needs_record(&self) -> bool {
        matches!(
            self.state,
            State::Reading
                | State::Writing
                | State::Checking
                | State::Resolving
                | State::Fencing
                | State::Waiting
                | State::Serving
                | State::Clearing
        )
    }

    /// What is said again while waiting: a sign of life, and the repetition of what may have been lost.
    fn talk(&self) -> Option<ToTarget> {
        match self.state {
            State::Offered => Some(ToTarget::Offer(Box::new(self.offer.clone()))),
            State::Preparing | State::Copying | State::Checking | State::Working(_) | State::Verifying => {
                Some(ToTarget::Enter(self.step))
            }
            // A sign of life: a target that misses it calls the operator.
            State::Committing | State::Resolving | State::Fencing if self.step == Step::Commit => {
                Some(ToTarget::Enter(Step::Commit))
            }
            State::Waiting | State::Serving => Some(ToTarget::Committed(self.epoch.next())),
            State::Undoing | State::Clearing if self.offer.epoch == self.epoch => {
                Some(ToTarget::Abort(self.reason()))
            }
            _ => None,
        }
    }

    fn reason(&self) -> String {
        match &self.why {
            Outcome::Stayed(error) | Outcome::Crashed(error) => error.to_string(),
            Outcome::Cancelled => "cancelled".to_owned(),
            Outcome::Moved | Outcome::Lost(_) => "over".to_owned(),
        }
    }

    fn silence_limit_ms(&self) -> Option<u64> {
        match self.state {
            State::Offered => Some(limit::CONNECT_MS),
            State::Preparing | State::Copying | State::Checking | State::Working(_) | State::Verifying => {
                Some(limit::PEER_LOST_MS)
            }
            _ => None,
        }
    }

    fn state_limit_ms(&self) -> Option<(u64, &'static str)> {
        match self.state {
            State::Reading | State::Writing => {
                Some((limit::NEGOTIATE_MS, "the metadata store did not take the attempt"))
            }
            State::Offered => {
                Some((limit::NEGOTIATE_MS, "the target did not say whether it can take the VM"))
            }
            State::Preparing => Some((limit::PREPARE_MS, "the target did not get ready to receive")),
            State::Working(SourceWork::Pause) => Some((limit::PAUSE_MS, "QEMU did not stop the guest")),
            State::Working(SourceWork::ListIo) => {
                Some((limit::LIST_IO_MS, "outstanding I/O could not be cancelled"))
            }
            State::Working(SourceWork::LastRound) => {
                Some((limit::LAST_ROUND_MS, "the last round did not get through"))
            }
            State::Working(SourceWork::DeviceState) => {
                Some((limit::DEVICE_STATE_MS, "the device state did not get through"))
            }
            State::Verifying if self.offer.verify => {
                Some((limit::VERIFY_HASH_MS, "the target did not finish hashing"))
            }
            State::Verifying => Some((limit::VERIFY_MS, "the target did not say READY")),
            _ => None,
        }
    }

    fn timers(&mut self, now: Time, out: &mut Out) {
        if self.state == State::Done {
            return;
        }
        if let Some(Asked::Cas) = self.desk.overdue(now) {
            let error = WireError::new(ErrorKind::Unknown, "change the records: no answer from the store");
            self.on_cas(now, &CasResult::Unknown(error), out);
        }
        if let Some((ms, what)) = self.state_limit_ms()
            && now >= self.since.plus_ms(ms)
        {
            let text = format!("move vm {}: {what} within {} s", self.offer.vm, ms / 1000);
            self.undo(now, Outcome::Stayed(WireError::new(ErrorKind::TimedOut, text)), out);
        }
        if let Some(ms) = self.silence_limit_ms()
            && now >= self.heard.plus_ms(ms)
        {
            let text = format!(
                "move vm {}: host {} has not been heard for {} s in step {}",
                self.offer.vm,
                self.offer.target,
                now.since_ms(self.heard) / 1000,
                self.step
            );
            self.undo(now, Outcome::Stayed(WireError::new(ErrorKind::Unavailable, text)), out);
        }
        if now >= self.said.plus_ms(limit::ALIVE_EVERY_MS)
            && let Some(message) = self.talk()
        {
            self.said = now;
            out.push(Action::Send(message));
        }
        if self.desk.due(now) || (self.desk.idle() && self.needs_record()) {
            self.desk.read(now, out);
        }
        if self.serve_at.is_some_and(|at| at <= now) {
            self.serve_at = None;
            out.push(Action::Do(SourceWork::Serve));
        }
        if self.state == State::Dropping {
            self.release(now, Outcome::Moved, out);
        }
    }

    // ---- what happened ------------------------------------------------------------------------------------------

    fn on_peer(&mut self, now: Time, message: ToSource, out: &mut Out) {
        self.heard = now;
        match (message, self.state) {
            (ToSource::Accepted, State::Offered) => {
                self.enter(now, Step::Prepare, State::Preparing, out);
            }
            (ToSource::Did(Step::Prepare), State::Preparing) => {
                self.enter(now, Step::Copy, State::Copying, out);
                out.push(Action::Do(SourceWork::Copy));
            }
            (ToSource::Did(Step::Verify), State::Verifying) => self.commit(now, out),
            (ToSource::Failed(step, error), _) if self.before_commit() => {
                let kind = error.kind;
                let text = format!(
                    "move vm {} to {} (step {step}): {}",
                    self.offer.vm, self.offer.target, error.message
                );
                self.undo(now, Outcome::Stayed(WireError { kind, message: text, hint: error.hint }), out);
            }
            // An answer to the very first offer, which may have crossed the target's start.
            (ToSource::Gone, State::Offered) => {}
            (ToSource::Gone, _) if self.before_commit() => {
                let text = format!("move vm {}: host {} lost the attempt", self.offer.vm, self.offer.target);
                self.undo(now, Outcome::Stayed(WireError::new(ErrorKind::Unavailable, text)), out);
            }
            (ToSource::Running, State::Waiting) => self.runs_there(now, out),
            (ToSource::Pulled, State::Waiting | State::Serving) => self.release(now, Outcome::Moved, out),
            (ToSource::Gone, State::Waiting | State::Serving) => self.desk.read(now, out),
            _ => {}
        }
    }

    fn on_done(&mut self, now: Time, work: SourceWork, out: &mut Out) {
        match (work, self.state) {
            (SourceWork::Copy, State::Copying) => {
                self.go(now, State::Checking);
                self.desk.read_anew(now, out);
            }
            (SourceWork::Pause, State::Working(SourceWork::Pause)) => {
                self.enter_work(now, Step::ListIo, SourceWork::ListIo, out);
            }
            (SourceWork::ListIo, State::Working(SourceWork::ListIo)) => {
                if self.plant == Some(Plant::SkipLastRound) {
                    self.enter_work(now, Step::DeviceState, SourceWork::DeviceState, out);
                } else {
                    self.enter_work(now, Step::LastRound, SourceWork::LastRound, out);
                }
            }
            (SourceWork::LastRound, State::Working(SourceWork::LastRound)) => {
                self.enter_work(now, Step::DeviceState, SourceWork::DeviceState, out);
            }
            (SourceWork::DeviceState, State::Working(SourceWork::DeviceState)) => {
                self.enter(now, Step::Verify, State::Verifying, out);
                if self.plant == Some(Plant::CommitBeforeReady) {
                    self.commit(now, out);
                }
            }
            (SourceWork::ResumeHere, State::Undoing) => self.clear(now, out),
            (SourceWork::Release, State::Releasing) => self.finish(self.why.clone(), out),
            _ => {}
        }
    }

    fn on_failed(&mut self, now: Time, work: SourceWork, error: WireError, out: &mut Out) {
        match (work, self.state) {
            (SourceWork::ResumeHere, State::Undoing) => {
                self.crashed = Some(error);
                self.clear(now, out);
            }
            // What could not be removed is found again when the agent starts; the VM is not touched by it.
            (SourceWork::Release, State::Releasing) => self.finish(self.why.clone(), out),
            (SourceWork::ResumeHere | SourceWork::Release, _) => {}
            // The guest waits for what it reads meanwhile.
            (SourceWork::Serve, State::Waiting | State::Serving) => {
                self.serve_at = Some(now.plus_ms(limit::ALIVE_EVERY_MS));
            }
            _ if self.before_commit() => self.undo(now, Outcome::Stayed(error), out),
            _ => {}
        }
    }

    fn on_cas(&mut self, now: Time, result: &CasResult, out: &mut Out) {
        self.desk.heard_of(result);
        match (self.state, result) {
            (State::Writing, CasResult::Yes(_)) => self.offer_it(now, out),
            (State::Committing, CasResult::Yes(_)) => self.committed_there(now, out),
            (State::Committing, CasResult::Unknown(error))
                if self.plant == Some(Plant::ResumeWithoutReadBack) =>
            {
                self.undo(now, Outcome::Stayed(error.clone()), out);
            }
            // COMMIT is not on its way: the guest goes on at once, whether or not the store comes back.
            (State::Committing, CasResult::NotMade(error)) => {
                let WireError { kind, message, hint } = error.clone();
                let message =
                    format!("move vm {}: the right could not be passed on: {message}", self.offer.vm);
                self.undo(now, Outcome::Stayed(WireError { kind, message, hint }), out);
            }
            (State::Committing, _) => {
                self.go(now, State::Resolving);
                self.desk.read(now, out);
            }
            (State::Waiting, CasResult::Yes(_)) => {
                self.called = true;
                self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
            }
            (State::Fencing, CasResult::Yes(_)) => self.resume_here(now, Course::Undo, out),
            (State::Clearing, CasResult::Yes(_)) => self.finish(self.end(), out),
            (_, CasResult::NotMade(_)) => self.desk.read_at(now.plus_ms(limit::STORE_RETRY_MS)),
            _ => self.desk.read(now, out),
        }
    }

    /// A look at the record, in any state.
    fn on_seen(&mut self, now: Time, seen: Seen, took_ms: u64, out: &mut Out) {
        let view = seen.for_source(&self.offer, self.epoch);
        self.seen = seen;
        let again = now.plus_ms(limit::RECORD_POLL_MS);
        match (self.state, view) {
            (State::Done | State::Dropping | State::Releasing | State::Committing, _) => {}
            (State::Reading, view) => self.first_look(now, &view, out),
            (State::Undoing | State::Clearing, SourceView::HandedBack | SourceView::Target { .. }) => {
                let holder = self.seen.vm.as_ref().map(|(vm, _)| vm.right.holder.clone());
                self.release(now, Outcome::Lost(holder), out);
            }
            // Whatever became of the VM: its volumes lack blocks that are nowhere but here.
            (State::Waiting | State::Serving, SourceView::Elsewhere(_)) if self.may_be_needed() => {
                self.desk.read_at(again);
            }
            (State::Resolving, SourceView::Elsewhere(_)) if self.is_depended_on() => {
                self.committed_there(now, out);
            }
            (_, SourceView::Elsewhere(holder)) => {
                let outcome = if self.committed() { Outcome::Moved } else { Outcome::Lost(holder) };
                self.release(now, outcome, out);
            }
            // From `Serving` only by the operator's hand: the target is lost with what the guest did there, and
            // what is kept here is the newest there is.
            (State::Waiting | State::Serving | State::Resolving | State::Fencing, SourceView::HandedBack) => {
                self.take_back(now, out);
            }
            (State::Resolving | State::Fencing, SourceView::Target { .. }) => self.committed_there(now, out),
            (State::Waiting, SourceView::Target { ran: true }) => self.runs_there(now, out),
            (State::Serving, SourceView::Target { .. }) if !self.is_depended_on() => {
                self.release(now, Outcome::Moved, out);
            }
            (State::Waiting, SourceView::Target { .. }) if self.wants_operator(now) => {
                let words = format!(
                    "host {} holds vm {} after a move, has not said that it runs it, and is silent; {}",
                    self.offer.target,
                    self.offer.vm,
                    self.way_out()
                );
                self.cas(now, self.seen.call_operator(words), out);
            }
            (State::Waiting | State::Serving, _) => self.desk.read_at(again),
            // The right went to the target though COMMIT was not sent: the operator's doing.
            (_, SourceView::HandedBack | SourceView::Target { .. }) => {
                let holder = self.seen.vm.as_ref().map(|(vm, _)| vm.right.holder.clone());
                self.release(now, Outcome::Lost(holder), out);
            }
            (State::Writing, SourceView::Ours { attempt: true }) => self.offer_it(now, out),
            (State::Writing, SourceView::Ours { attempt: false }) => self.begin(now, out),
            (State::Resolving, SourceView::Ours { attempt: true }) => {
                self.go(now, State::Fencing);
                self.cas(now, self.seen.settle(VmState::Migrating), out);
            }
            (State::Fencing, SourceView::Ours { attempt: true }) => {
                self.cas(now, self.seen.settle(VmState::Migrating), out);
            }
            (State::Resolving | State::Fencing, SourceView::Ours { .. }) => {
                self.resume_here(now, Course::Undo, out);
            }
            (State::Checking, SourceView::Ours { attempt: true }) if took_ms > limit::STORE_FRESH_MS => {
                self.desk.trouble = Some(format!("answers after {took_ms} ms"));
                self.desk.read(now, out);
            }
            (State::Checking, SourceView::Ours { attempt: true }) => {
                self.enter_work(now, Step::Pause, SourceWork::Pause, out);
            }
            (State::Undoing, SourceView::Ours { .. }) => {}
            (State::Clearing, SourceView::Ours { attempt }) => self.settle(now, attempt, out),
            (_, SourceView::Ours { attempt: true }) => {}
            (_, SourceView::Ours { attempt: false }) => {
                let text = format!("move vm {}: the attempt was taken out of the record", self.offer.vm);
                self.undo(now, Outcome::Stayed(WireError::new(ErrorKind::Refused, text)), out);
            }
        }
    }

    // ---- transitions --------------------------------------------------------------------------------------------

    /// Whether a volume lacks blocks that are here.
    fn is_depended_on(&self) -> bool {
        self.offer.disk == DiskMove::OnDemand && self.seen.depends_on(&self.offer.source)
    }

    /// The same, or nobody can tell because the VM's record is gone.
    fn may_be_needed(&self) -> bool {
        self.offer.disk == DiskMove::OnDemand && (self.seen.vm.is_none() || self.is_depended_on())
    }

    fn cas(&mut self, now: Time, cas: Option<Cas>, out: &mut Out) {
        // None only if the record is gone, which `on_seen` has dealt with.
        if let Some(cas) = cas {
            self.desk.cas(now, cas, out);
        }
    }

    fn first_look(&mut self, now: Time, view: &SourceView, out: &mut Out) {
        let state = self.seen.vm.as_ref().map(|(vm, _)| vm.state);
        let volumes_ours = self.seen.volumes.len() == self.offer.spec.volumes.len()
            && self.seen.volumes.iter().all(|(volume, _)| volume.right.holder == self.offer.source);
        let runs = matches!(state, Some(VmState::Running | VmState::Migrating | VmState::NeedsOperator));
        // The next target would depend on two hosts.
        let depends_on = self.seen.volumes.iter().find_map(|(volume, _)| volume.depends_on.clone());
        match view {
            SourceView::Ours { .. } if runs && volumes_ours && depends_on.is_none() => {
                self.go(now, State::Writing);
                self.journal(Course::Onward, out);
                out.push(Action::Enter(Step::Negotiate));
                self.begin(now, out);
            }
            SourceView::Ours { .. } => {
                let why = match depends_on {
                    _ if !runs => "it does not run".to_owned(),
                    Some(host) if volumes_ours => {
                        format!("a volume of it still depends on host {host}: its blocks are being fetched")
                    }
                    _ => "a volume of it is not held here".to_owned(),
                };
                let text = format!("move vm {}: {why}", self.offer.vm);
                self.finish(Outcome::Stayed(WireError::new(ErrorKind::Refused, text)), out);
            }
            _ => {
                let text = format!(
                    "move vm {}: host {} does not hold it at epoch {}",
                    self.offer.vm, self.offer.source, self.epoch
                );
                self.finish(Outcome::Stayed(WireError::new(ErrorKind::Refused, text)), out);
            }
        }
    }

    fn begin(&mut self, now: Time, out: &mut Out) {
        self.begin_open = true;
        self.cas(now, self.seen.begin(&self.offer), out);
    }

    fn offer_it(&mut self, now: Time, out: &mut Out) {
        self.begin_open = false;
        self.go(now, State::Offered);
        self.heard = now;
        self.said = now;
        out.push(Action::Send(ToTarget::Offer(Box::new(self.offer.clone()))));
    }

    /// READY: the one change that moves the VM.
    fn commit(&mut self, now: Time, out: &mut Out) {
        self.enter(now, Step::Commit, State::Committing, out);
        self.cas(now, self.seen.commit(&self.offer), out);
    }

    fn committed_there(&mut self, now: Time, out: &mut Out) {
        self.enter(now, Step::Resume, State::Waiting, out);
        self.said = now;
        out.push(Action::Send(ToTarget::Committed(self.epoch.next())));
        if self.offer.disk == DiskMove::OnDemand {
            out.push(Action::Do(SourceWork::Serve));
        }
        self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
        if self.plant == Some(Plant::ReleaseBeforeRunning) {
            self.release(now, Outcome::Moved, out);
        }
    }

    fn runs_there(&mut self, now: Time, out: &mut Out) {
        self.enter(now, Step::Announce, State::Serving, out);
        match self.offer.disk {
            DiskMove::Copy => self.release(now, Outcome::Moved, out),
            DiskMove::OnDemand if self.plant == Some(Plant::ReleaseBeforePulled) => {
                self.release(now, Outcome::Moved, out);
            }
            DiskMove::OnDemand => {
                self.enter(now, Step::Pull, State::Serving, out);
                self.desk.read_at(now.plus_ms(limit::RECORD_POLL_MS));
            }
        }
    }

    /// Gives up the copy here: the VM is somebody else's.
    fn release(&mut self, now: Time, outcome: Outcome, out: &mut Out) {
        self.why = outcome;
        self.enter(now, Step::Release, State::Releasing, out);
        out.push(Action::Do(SourceWork::Release));
    }

    /// The target gave the right back, or the operator did, and the guest has not run there.
    fn take_back(&mut self, now: Time, out: &mut Out) {
        if let Some((vm, _)) = &self.seen.vm {
            self.epoch = vm.right.epoch;
        }
        let text = format!(
            "move vm {}: it did not run at host {}; the right came back",
            self.offer.vm, self.offer.target
        );
        self.why = Outcome::Stayed(WireError::new(ErrorKind::Unavailable, text));
        self.resume_here(now, Course::HandBack, out);
    }

    /// Ends the attempt before COMMIT: the guest goes on here first, the record is put in order afterwards.
    fn undo(&mut self, now: Time, why: Outcome, out: &mut Out) {
        self.why = why;
        if self.state == State::Reading {
            self.finish(self.why.clone(), out);
            return;
        }
        self.said = now;
        out.push(Action::Send(ToTarget::Abort(self.reason())));
        self.resume_here(now, Course::Undo, out);
    }

    fn resume_here(&mut self, now: Time, course: Course, out: &mut Out) {
        self.go(now, State::Undoing);
        self.journal(course, out);
        out.push(Action::Do(SourceWork::ResumeHere));
    }

    fn clear(&mut self, now: Time, out: &mut Out) {
        self.go(now, State::Clearing);
        // The answer to an older change must not be taken for that of the change to come.
        self.desk.forget();
        self.desk.read(now, out);
    }

    fn settle(&mut self, now: Time, attempt: bool, out: &mut Out) {
        let state = if self.crashed.is_some() { VmState::Crashed } else { VmState::Running };
        if attempt || self.begin_open || !self.seen.state_is(state) {
            // With `begin_open` the record may look right and yet be about to change: writing it, even with the
            // same content, makes what is on its way conflict.
            self.cas(now, self.seen.settle(state), out);
        } else {
            self.finish(self.end(), out);
        }
    }

    fn end(&self) -> Outcome {
        self.crashed.clone().map_or_else(|| self.why.clone(), Outcome::Crashed)
    }

    fn finish(&mut self, outcome: Outcome, out: &mut Out) {
        self.state = State::Done;
        self.outcome = Some(outcome.clone());
        out.push(Action::Finished(outcome));
    }
}
