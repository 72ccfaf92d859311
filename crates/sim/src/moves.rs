//! What a host's agent is to the handover: carries out the engine's actions on the simulated host, and reports back.
//!
//! Not here: decisions (`engine::migrate::handover`, run unchanged), frames (`stream`), rules (`check`).

use whimbrel_engine::migrate::handover::{
    Action, Cas, CasResult, Event, JournalEntry, Offer, Outcome, ReqId, Side, Source, SourceWork, Target,
    TargetWork, ToSource, ToTarget,
};
use whimbrel_wire::api::DiskMove;
use whimbrel_wire::meta::{Mode, VmState};
use whimbrel_wire::{AttemptId, ErrorKind, Time, WireError};

use crate::faults::Fault;
use crate::guest::{Copy, CopyState};
use crate::plant::Plant;
use crate::store::no_answer;
use crate::stream::{Round, Stream};
use crate::world::{Answer, Asker, Attempt, HostIx, Message, What, Work, World, vm_name};

/// So long after the end of faults nothing of them is left: not even a target that waits for a source.
const QUIET_MS: u64 = 40_000;

fn number(attempt: AttemptId) -> Attempt {
    // Attempts are numbered by the world; see `on_move`.
    u64::try_from(attempt.0.as_u128()).unwrap_or(0)
}

fn error(text: &str) -> WireError {
    WireError::new(ErrorKind::Io, text)
}

impl World {
    // ---- beginning ----------------------------------------------------------------------------------------------

    /// Somebody wants the VM elsewhere.
    pub(crate) fn on_move(&mut self) {
        let holder = self.host_ix(&self.store.holder().clone());
        let busy = |world: &Self, host: HostIx| {
            world.hosts[host]
                .agent
                .as_ref()
                .is_none_or(|agent| !agent.sources.is_empty() || !agent.targets.is_empty())
        };
        let running = self.hosts[holder]
            .copies
            .values()
            .find(|copy| copy.state == CopyState::Running)
            .map(|copy| copy.id);
        let others: Vec<HostIx> = (0..self.hosts.len()).filter(|ix| *ix != holder).collect();
        let to = others[self.rng.index(others.len())];
        if let Some(copy) = running
            && !busy(self, holder)
            && !self.hosts[to].gone
        {
            self.begin_move(holder, to, copy);
        }
        if !self.calm {
            let ms = self.rng.between(500, 5_000);
            self.after_ms(ms, What::Move);
        }
    }

    fn begin_move(&mut self, from: HostIx, to: HostIx, copy: u64) {
        let attempt = self.new_id();
        let record = self.store.vm();
        let offer = Offer {
            attempt: AttemptId(uuid::Uuid::from_u128(u128::from(attempt))),
            vm: vm_name(),
            source: self.hosts[from].name.clone(),
            target: self.hosts[to].name.clone(),
            epoch: record.right.epoch,
            spec: record.spec.clone(),
            mode: Mode::A,
            disk: if self.rates.on_demand { DiskMove::OnDemand } else { DiskMove::Copy },
            verify: false,
            processor: Vec::new(),
        };
        self.note(format_args!("move {attempt}: h{from} to h{to}"));
        self.tally.moves += 1;
        let quiet_since = crate::faults::CALM.plus_ms(QUIET_MS);
        if self.now >= quiet_since && !self.hosts.iter().any(|host| host.gone) {
            self.must_succeed.insert(attempt);
        }
        let source = Source::new(offer, self.now).with_plant(self.plant.and_then(Plant::in_engine));
        self.hosts[from].copy_of.insert(attempt, copy);
        if let Some(agent) = &mut self.hosts[from].agent {
            agent.sources.insert(attempt, source);
        }
        self.source_event(from, attempt, Event::Tick);
        if self.rates.cancels && !self.calm && self.rng.permille(300) {
            let longest = if self.rng.permille(500) { 15 } else { 1_500 };
            let ms = self.rng.between(1, longest);
            self.after_ms(ms, What::Fault(Fault::Cancel(from, attempt)));
        }
    }

    /// An agent goes on from its journals.
    pub(crate) fn recover_moves(&mut self, host: HostIx) {
        let entries: Vec<(Attempt, JournalEntry)> =
            self.hosts[host].journal.iter().map(|(attempt, (entry, _))| (*attempt, entry.clone())).collect();
        for (attempt, entry) in entries {
            self.tally.recoveries += 1;
            self.note(format_args!(
                "h{host}: recovers {attempt} as {} in {} {:?}",
                entry.side, entry.step, entry.course
            ));
            let now = self.now;
            let plant = self.plant.and_then(Plant::in_engine);
            let Some(agent) = &mut self.hosts[host].agent else { return };
            match entry.side {
                Side::Source => {
                    agent.sources.insert(attempt, Source::recover(&entry, now).with_plant(plant));
                    self.source_event(host, attempt, Event::Tick);
                }
                Side::Target => {
                    agent.targets.insert(attempt, Target::recover(&entry, now));
                    self.target_event(host, attempt, Event::Tick);
                }
            }
        }
    }

    // ---- the machines -------------------------------------------------------------------------------------------

    /// Gives a source an event and carries out what follows.
    pub(crate) fn source_event(
        &mut self,
        host: HostIx,
        attempt: Attempt,
        event: Event<ToSource, SourceWork>,
    ) {
        let now = self.now;
        let Some(agent) = &mut self.hosts[host].agent else { return };
        let Some(source) = agent.sources.get_mut(&attempt) else { return };
        let mut actions = Vec::new();
        source.step(now, event, &mut actions);
        let peer = source.offer().target.clone();
        let deadline = source.deadline();
        for action in actions {
            let alive = match action {
                Action::Journal { entry, sync } => self.journal(host, attempt, *entry, sync),
                Action::Enter(step) => self.enter(host, attempt, Side::Source, step.as_str()),
                Action::Read(id) => self.ask_store(host, attempt, id, None),
                Action::Cas(id, cas) => self.ask_store(host, attempt, id, Some(cas)),
                Action::Send(message) => self.send(host, &peer, attempt, Message::ToTarget(message)),
                Action::Do(work) => self.start_work(host, attempt, Work::Source(work)),
                Action::Finished(outcome) => self.finished(host, attempt, Side::Source, &outcome),
            };
            if !alive {
                return;
            }
        }
        self.wake(host, attempt, deadline);
    }

    /// Gives a target an event and carries out what follows.
    pub(crate) fn target_event(
        &mut self,
        host: HostIx,
        attempt: Attempt,
        event: Event<ToTarget, TargetWork>,
    ) {
        let now = self.now;
        let Some(agent) = &mut self.hosts[host].agent else { return };
        let Some(target) = agent.targets.get_mut(&attempt) else { return };
        let mut actions = Vec::new();
        target.step(now, event, &mut actions);
        let peer = target.offer().source.clone();
        let deadline = target.deadline();
        for action in actions {
            let alive = match action {
                Action::Journal { entry, sync } => self.journal(host, attempt, *entry, sync),
                Action::Enter(step) => self.enter(host, attempt, Side::Target, step.as_str()),
                Action::Read(id) => self.ask_store(host, attempt, id, None),
                Action::Cas(id, cas) => self.ask_store(host, attempt, id, Some(cas)),
                Action::Send(message) => self.send(host, &peer, attempt, Message::ToSource(message)),
                Action::Do(work) => self.start_work(host, attempt, Work::Target(work)),
                Action::Finished(outcome) => self.finished(host, attempt, Side::Target, &outcome),
            };
            if !alive {
                return;
            }
        }
        self.wake(host, attempt, deadline);
    }

    fn wake(&mut self, host: HostIx, attempt: Attempt, deadline: Option<Time>) {
        // A machine that is due at once gets there a moment later: time has to pass.
        let Some(at) = deadline.map(|at| at.max(Time(self.now.0 + 1_000_000))) else { return };
        let life = self.hosts[host].life;
        let Some(agent) = &mut self.hosts[host].agent else { return };
        if agent.wakes.get(&attempt).is_some_and(|queued| *queued <= at && *queued > self.now) {
            return;
        }
        agent.wakes.insert(attempt, at);
        self.at(at, What::Wake(host, life, attempt));
    }

    pub(crate) fn on_wake(&mut self, host: HostIx, life: u64, attempt: Attempt) {
        let now = self.now;
        let Some(agent) = self.agent(host, life) else { return };
        if agent.wakes.get(&attempt).is_some_and(|at| *at <= now) {
            agent.wakes.remove(&attempt);
        }
        self.source_event(host, attempt, Event::Tick);
        self.target_event(host, attempt, Event::Tick);
    }

    // ---- actions: each says whether the agent is still alive ----------------------------------------------------

    fn journal(&mut self, host: HostIx, attempt: Attempt, entry: JournalEntry, sync: bool) -> bool {
        if self.plant == Some(Plant::ForgetJournal) {
            return true;
        }
        let journal = &mut self.hosts[host].journal;
        let durable =
            if sync { Some(entry.clone()) } else { journal.remove(&attempt).and_then(|(_, old)| old) };
        journal.insert(attempt, (entry, durable));
        true
    }

    /// A fail point.
    fn enter(&mut self, host: HostIx, attempt: Attempt, side: Side, step: &str) -> bool {
        self.note(format_args!("h{host}: {attempt} {side}:{step}"));
        if self.calm || !self.rng.permille(self.rates.at_steps) {
            return true;
        }
        let fault = self.fault_for(host, attempt);
        self.on_fault(fault);
        self.agent_up(host)
    }

    fn finished(&mut self, host: HostIx, attempt: Attempt, side: Side, outcome: &Outcome) -> bool {
        self.note(format_args!("h{host}: {attempt} {side} finished: {outcome:?}"));
        if side == Side::Source && matches!(outcome, Outcome::Stayed(_) | Outcome::Cancelled) {
            self.tally.undone += 1;
            if self.must_succeed.contains(&attempt) {
                self.fail(format!("nothing is broken, and move {attempt} failed: {outcome:?}"));
            }
        }
        self.hosts[host].journal.remove(&attempt);
        if let Some(agent) = &mut self.hosts[host].agent {
            agent.sources.remove(&attempt);
            agent.targets.remove(&attempt);
            agent.streams.remove(&attempt);
        }
        true
    }

    fn send(&mut self, from: HostIx, to: &whimbrel_wire::HostId, attempt: Attempt, message: Message) -> bool {
        let to = self.host_ix(to);
        if self.agent_up(to)
            && let Some((at, connection)) = self.net.control(self.now, from, to, &mut self.rng)
        {
            self.at(at, What::Control { from, to, connection, attempt, message });
        }
        true
    }

    pub(crate) fn on_control(&mut self, from: HostIx, to: HostIx, attempt: Attempt, message: Message) {
        let back = self.hosts[from].name.clone();
        let Some(agent) = &mut self.hosts[to].agent else { return };
        match message {
            Message::ToSource(message) => {
                if agent.sources.contains_key(&attempt) {
                    self.source_event(to, attempt, Event::Peer(message));
                } else if message != ToSource::Gone {
                    let abort = ToTarget::Abort("the source knows nothing of this attempt".to_owned());
                    self.send(to, &back, attempt, Message::ToTarget(abort));
                }
            }
            Message::ToTarget(message) => {
                let known = agent.targets.contains_key(&attempt);
                match message {
                    message if known => self.target_event(to, attempt, Event::Peer(message)),
                    ToTarget::Offer(offer) => {
                        agent.targets.insert(attempt, Target::new(*offer, self.now));
                        self.target_event(to, attempt, Event::Tick);
                    }
                    ToTarget::Abort(_) => {}
                    ToTarget::Enter(_) | ToTarget::Committed(_) => {
                        self.send(to, &back, attempt, Message::ToSource(ToSource::Gone));
                    }
                }
            }
        }
    }

    // ---- the store ----------------------------------------------------------------------------------------------

    fn ask_store(&mut self, host: HostIx, attempt: Attempt, id: ReqId, cas: Option<Box<Cas>>) -> bool {
        let asker = Asker { host, life: self.hosts[host].life, attempt, id };
        let late = cas.is_some() && self.rng.permille(self.store.late);
        let (low, high) = if late { (100_000, 8_000_000) } else { (300, 6_000) };
        self.after_us(low, high, What::StoreArrives(asker, cas));
        true
    }

    pub(crate) fn on_store_arrives(&mut self, asker: Asker, cas: Option<Box<Cas>>) {
        if self.store.down {
            if self.rng.permille(200) {
                // Waits somewhere on its way.
                self.after_us(100_000, 6_000_000, What::StoreArrives(asker, cas));
            } else if self.rng.permille(600) {
                let answer = match cas {
                    // Refused before it left, or no answer: only the second may still be made.
                    Some(_) if self.rng.permille(500) => Answer::Cas(CasResult::NotMade(no_answer())),
                    Some(_) => Answer::Cas(CasResult::Unknown(no_answer())),
                    None => Answer::Failed(no_answer()),
                };
                self.after_us(300, 50_000, What::StoreAnswers(asker, answer));
            }
            return;
        }
        let answer = match cas {
            None => Answer::Seen(Box::new(self.store.seen())),
            Some(cas) => match self.change(&cas) {
                Some(result) => Answer::Cas(result),
                None => return,
            },
        };
        let lost = matches!(answer, Answer::Cas(_)) && self.rng.permille(self.store.lose_answers);
        if !lost {
            self.after_us(300, 4_000, What::StoreAnswers(asker, answer));
        } else if self.rng.permille(500) {
            self.after_us(
                300,
                100_000,
                What::StoreAnswers(asker, Answer::Cas(CasResult::Unknown(no_answer()))),
            );
        }
    }

    /// Makes a change in the store, checks it and tells the watches.
    pub(crate) fn change(&mut self, cas: &Cas) -> Option<CasResult> {
        let before = (self.store.vm().right.epoch, self.store.vm().came_by);
        let result = match self.store.apply(cas) {
            Ok(result) => result,
            Err(broken) => {
                self.fail(broken);
                return None;
            }
        };
        if let CasResult::Yes(rev) = result {
            let vm = self.store.vm().clone();
            self.note(format_args!(
                "store {rev}: {} at epoch {}, {:?}, attempt {:?}",
                vm.right.holder,
                vm.right.epoch,
                vm.state,
                vm.attempt.as_ref().map(|attempt| number(attempt.id))
            ));
            if vm.right.epoch != before.0 && vm.came_by.is_some() {
                let back = vm.came_by == before.1;
                self.tally.hand_backs += u64::from(back);
                self.tally.commits += u64::from(!back);
            }
            for host in 0..self.hosts.len() {
                let life = self.hosts[host].life;
                if self.agent_up(host) && !self.store.down {
                    self.after_us(1_000, 80_000, What::Hint(host, life));
                }
            }
        }
        Some(result)
    }

    pub(crate) fn on_store_answers(&mut self, asker: Asker, answer: Answer) {
        let Asker { host, life, attempt, id } = asker;
        let now = self.now;
        let Some(agent) = self.agent(host, life) else { return };
        if !matches!(answer, Answer::Failed(_) | Answer::Cas(CasResult::Unknown(_) | CasResult::NotMade(_))) {
            agent.store_answered = Some(now);
        }
        let is_source = agent.sources.contains_key(&attempt);
        match (answer, is_source) {
            (Answer::Seen(seen), true) => self.source_event(host, attempt, Event::Records(id, seen)),
            (Answer::Seen(seen), false) => self.target_event(host, attempt, Event::Records(id, seen)),
            (Answer::Failed(error), true) => self.source_event(host, attempt, Event::ReadFailed(id, error)),
            (Answer::Failed(error), false) => self.target_event(host, attempt, Event::ReadFailed(id, error)),
            (Answer::Cas(result), true) => self.source_event(host, attempt, Event::Cas(id, result)),
            (Answer::Cas(result), false) => self.target_event(host, attempt, Event::Cas(id, result)),
        }
    }

    pub(crate) fn on_hint(&mut self, host: HostIx, life: u64) {
        let Some(agent) = self.agent(host, life) else { return };
        let sources: Vec<Attempt> = agent.sources.keys().copied().collect();
        let targets: Vec<Attempt> = agent.targets.keys().copied().collect();
        for attempt in sources {
            self.source_event(host, attempt, Event::RecordChanged);
        }
        for attempt in targets {
            self.target_event(host, attempt, Event::RecordChanged);
        }
    }

    // ---- work ---------------------------------------------------------------------------------------------------

    fn start_work(&mut self, host: HostIx, attempt: Attempt, work: Work) -> bool {
        let id = self.new_id();
        let now = self.now;
        let life = self.hosts[host].life;
        if work == Work::Source(SourceWork::Pause) {
            self.check_pause(host);
        }
        let Some(agent) = &mut self.hosts[host].agent else { return false };
        match work {
            Work::Source(SourceWork::ResumeHere | SourceWork::Release)
            | Work::Target(TargetWork::Discard) => {
                agent.works.retain(|(_, at, _)| *at != attempt);
                agent.streams.remove(&attempt);
                agent.serves.remove(&attempt);
            }
            Work::Source(SourceWork::Copy) => {
                let Some(source) = agent.sources.get(&attempt) else { return true };
                let offer = source.offer().clone();
                let to = self.host_ix(&offer.target);
                let stream = Stream::new(to, offer.epoch.0, offer.disk);
                if let Some(agent) = &mut self.hosts[host].agent {
                    agent.streams.insert(attempt, stream);
                }
                self.pump_soon(host, attempt);
                return true;
            }
            Work::Source(SourceWork::LastRound) => return self.stream_round(host, attempt, Round::Last),
            Work::Source(SourceWork::DeviceState) => return self.stream_round(host, attempt, Round::Device),
            _ => {}
        }
        let Some(agent) = &mut self.hosts[host].agent else { return false };
        agent.works.push((id, attempt, work));
        if !self.calm && self.rng.permille(self.rates.hangs) && may_fail(work) && !is_retried(work) {
            return true;
        }
        let (low, high) = match work {
            Work::Target(TargetWork::Prepare | TargetWork::Rebuild) => (20_000, 250_000),
            Work::Target(TargetWork::Pull) => (20_000, 400_000),
            _ => (500, 12_000),
        };
        let us = self.rng.between(low, high);
        self.at(Time(now.0 + us * 1000), What::Work(host, life, id));
        true
    }

    fn stream_round(&mut self, host: HostIx, attempt: Attempt, round: Round) -> bool {
        let Some(agent) = &mut self.hosts[host].agent else { return false };
        if let Some(stream) = agent.streams.get_mut(&attempt) {
            stream.round = round;
            self.pump_soon(host, attempt);
        }
        true
    }

    pub(crate) fn on_work(&mut self, host: HostIx, life: u64, id: u64) {
        let Some(agent) = self.agent(host, life) else { return };
        let Some(at) = agent.works.iter().position(|(number, ..)| *number == id) else { return };
        let (_, attempt, work) = agent.works.remove(at);
        let rate = match work {
            // Rare enough by itself; it is what makes a target hand back.
            Work::Target(TargetWork::Rebuild) => 400,
            _ if may_fail(work) => self.rates.failures,
            _ => 0,
        };
        let fails = !self.calm && self.rng.permille(rate);
        let result = if fails { Err((error("it failed"), false)) } else { self.effect(host, attempt, work) };
        match (work, result) {
            (Work::Source(work), Ok(())) => self.source_event(host, attempt, Event::Done(work)),
            (Work::Target(work), Ok(())) => self.target_event(host, attempt, Event::Done(work)),
            (Work::Source(work), Err((error, may_have_run))) => {
                self.source_event(host, attempt, Event::Failed { work, error, may_have_run });
            }
            (Work::Target(work), Err((error, may_have_run))) => {
                self.target_event(host, attempt, Event::Failed { work, error, may_have_run });
            }
        }
    }

    /// The effect of work on the host; the error says whether the guest may have run.
    pub(crate) fn effect(
        &mut self,
        host: HostIx,
        attempt: Attempt,
        work: Work,
    ) -> Result<(), (WireError, bool)> {
        let gone = |may_have_run| Err((error("QEMU is gone"), may_have_run));
        let id = self.hosts[host].copy_of.get(&attempt).copied();
        let state = id.and_then(|id| self.hosts[host].copies.get(&id)).map(|copy| copy.state);
        match work {
            Work::Source(SourceWork::Pause) => match (id, state) {
                (Some(id), Some(CopyState::Running)) => self.stop_guest(host, id),
                _ => return gone(false),
            },
            Work::Source(SourceWork::ListIo) => self.list_io(host, id),
            Work::Source(SourceWork::ResumeHere) => match (id, state) {
                (Some(id), Some(CopyState::Stopped)) => self.let_guest_run(host, id, None),
                (Some(_), Some(CopyState::Running)) => self.submit_io(host),
                _ => return gone(true),
            },
            Work::Source(SourceWork::Release) | Work::Target(TargetWork::Discard) => {
                if let Some(id) = id {
                    self.hosts[host].copies.remove(&id);
                }
            }
            Work::Source(SourceWork::Serve) => self.serve(host, attempt, state),
            Work::Source(SourceWork::Copy | SourceWork::LastRound | SourceWork::DeviceState) => {}
            Work::Target(TargetWork::Negotiate | TargetWork::Announce) => {}
            Work::Target(TargetWork::Prepare) => self.prepare(host, attempt),
            Work::Target(TargetWork::Verify) => return self.verify(host, id),
            Work::Target(TargetWork::Resume) => match (id, state) {
                (Some(id), Some(CopyState::Stopped)) => {
                    let epoch = self.hosts[host].agent.as_ref().and_then(|agent| agent.targets.get(&attempt));
                    let epoch = epoch.map(|target| target.offer().epoch.0 + 1);
                    if let Some(agent) = &mut self.hosts[host].agent {
                        agent.let_go.insert(attempt);
                    }
                    self.let_guest_run(host, id, epoch);
                }
                (Some(_), Some(CopyState::Running)) => {}
                _ => {
                    let agent = self.hosts[host].agent.as_ref();
                    return gone(agent.is_some_and(|agent| agent.let_go.contains(&attempt)));
                }
            },
            Work::Target(TargetWork::Rebuild) => {
                let copy = id.and_then(|id| self.hosts[host].copies.get_mut(&id));
                match copy {
                    Some(copy) if copy.kept => copy.state = CopyState::Stopped,
                    _ => return gone(false),
                }
            }
            Work::Target(TargetWork::Pull) => {
                return if id.is_none_or(|id| self.pull(host, id)) {
                    Ok(())
                } else {
                    Err((error("something is still at the source"), false))
                };
            }
        }
        Ok(())
    }

    fn prepare(&mut self, host: HostIx, attempt: Attempt) {
        if self.hosts[host].copy_of.contains_key(&attempt) {
            return;
        }
        let id = self.new_id();
        let mut copy = Copy::incoming(id, attempt);
        let on_demand = self.hosts[host].agent.as_ref().and_then(|agent| agent.targets.get(&attempt));
        if on_demand.is_some_and(|target| target.offer().disk == DiskMove::OnDemand) {
            copy.layer.missing = (0..crate::guest::BLOCKS).collect();
            copy.layer.partial = true;
        }
        self.hosts[host].copy_of.insert(attempt, id);
        self.hosts[host].copies.insert(id, copy);
    }

    /// Hands the layer out to the target from here on.
    fn serve(&mut self, host: HostIx, attempt: Attempt, state: Option<CopyState>) {
        let right = &self.store.vm().right;
        let (holder, epoch) = (self.host_ix(&right.holder), right.epoch);
        let Some(agent) = &mut self.hosts[host].agent else { return };
        agent.serves.insert(attempt);
        let before = agent.sources.get(&attempt).is_some_and(|source| source.offer().epoch == epoch);
        if state == Some(CopyState::Running) || before && holder == host {
            self.fail(format!("h{host} hands out a layer that it may still write"));
        }
    }

    fn verify(&mut self, host: HostIx, id: Option<u64>) -> Result<(), (WireError, bool)> {
        let early = self.plant == Some(Plant::AckFlushEarly);
        let Some(copy) = id.and_then(|id| self.hosts[host].copies.get_mut(&id)) else {
            return Err((error("nothing has been prepared"), false));
        };
        if copy.state != CopyState::Stopped || copy.regs.is_none() {
            return Err((error("the device state has not come"), false));
        }
        copy.kept = true;
        let blocks = copy.layer.cached.clone();
        if early {
            let id = copy.id;
            self.after_ms(1_500, What::Persist(host, id, blocks));
        } else {
            copy.layer.persist(&blocks);
        }
        Ok(())
    }

    /// A VM whose record is this host's, and which has no QEMU and no move under way: start it from its disk.
    pub(crate) fn on_supervise(&mut self) {
        self.after_ms(500, What::Supervise);
        let host = self.host_ix(&self.store.holder().clone());
        let it = &self.hosts[host];
        let Some(agent) = &it.agent else { return };
        let idle = agent.sources.is_empty() && agent.targets.is_empty() && it.journal.is_empty();
        let all_dead = it.copies.values().all(|copy| copy.state == CopyState::Dead);
        if !idle || !all_dead || self.store.down || self.excused {
            return;
        }
        let newest = it.copies.values().max_by_key(|copy| (copy.epoch, copy.id)).map(|copy| copy.id);
        let Some(newest) = newest else {
            self.fail(format!("h{host} holds the VM and has nothing of it"));
            return;
        };
        if self.hosts[host].copies.get(&newest).is_some_and(|copy| !copy.layer.missing.is_empty()) {
            if !self.hosts.iter().any(|it| it.gone) {
                self.fail(format!("h{host} lacks blocks of the disk, and nobody fetches them"));
            }
            return;
        }
        let seen = self.store.seen();
        let Some((mut vm, rev)) = seen.vm else { return };
        vm.attempt = None;
        vm.state = VmState::Running;
        vm.waiting_for = None;
        let epoch = vm.right.epoch.0;
        let mut volumes = seen.volumes;
        for (volume, _) in &mut volumes {
            volume.depends_on = None;
        }
        if self.change(&Cas { vm: (vm, rev), volumes }).is_some() {
            self.boot(host, newest, epoch);
        }
    }
}

/// Work whose host limits every wait in it, so that it fails instead of hanging, and is then tried again.
fn is_retried(work: Work) -> bool {
    matches!(work, Work::Target(TargetWork::Pull) | Work::Source(SourceWork::Serve))
}

/// What may fail by itself. Going back must not: there is nothing left to do then.
fn may_fail(work: Work) -> bool {
    !matches!(
        work,
        Work::Source(SourceWork::ResumeHere | SourceWork::Release | SourceWork::Copy)
            | Work::Target(
                TargetWork::Discard | TargetWork::Resume | TargetWork::Rebuild | TargetWork::Announce
            )
    )
}
