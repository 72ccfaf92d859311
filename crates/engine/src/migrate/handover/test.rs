//! The two machines against each other, a store and two QEMUs, with the schedule and the faults chosen by proptest.
//!
//! The world is as small as it can be: no bytes move. What is checked is who runs the guest: never two, never
//! one that the record does not name, and, once faults stop, exactly one; and, if the disk follows later, that nobody
//! gives up blocks that the other side lacks. The simulator (`crates/sim`) runs the same
//! machines with real timing, memory and disks.

mod on_demand;

use proptest::prelude::*;
use whimbrel_wire::api::DiskMove;
use whimbrel_wire::meta::{Mode, VmRecord, VmSpec, VmState, VolumeRecord};
use whimbrel_wire::{
    AttemptId, DataId, DiskId, Epoch, ErrorKind, HostId, Object, Right, Time, VmId, WireError,
};

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Nothing,
    /// Incoming at the target; kept but stopped at the source.
    Stopped,
    Runs,
    Dead,
}

type SourceEvent = Event<ToSource, SourceWork>;
type TargetEvent = Event<ToTarget, TargetWork>;

enum Pending {
    ToSource(ToSource),
    ToTarget(ToTarget),
    SourceWork(SourceWork),
    TargetWork(TargetWork),
    Store(Side, ReqId, Option<Box<Cas>>),
}

struct World {
    now: Time,
    vm: VmRecord,
    rev: u64,
    /// Its volume, if its blocks follow later.
    volume: Option<(VolumeRecord, u64)>,
    /// The target has a place for blocks that are at the source.
    missing: bool,
    /// The source has its layer still, and hands it out.
    layer_at_source: bool,
    serves: bool,
    broken: Option<String>,
    pending: Vec<Pending>,
    /// Changes whose sender has given up waiting; they may still be made.
    late: Vec<Cas>,
    source: Option<Source>,
    target: Option<Target>,
    source_journal: Option<JournalEntry>,
    target_journal: Option<JournalEntry>,
    at_source: Guest,
    at_target: Guest,
    ran_at_target: bool,
    /// The target has been about to run the guest: if agent and QEMU both end now, nobody knows whether it ran.
    let_go: bool,
    target_ready: bool,
    plant: Option<Plant>,
    faults: bool,
    source_outcome: Option<Outcome>,
}

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn offer(disk: DiskMove) -> Offer {
    let volumes = if disk == DiskMove::OnDemand { vec![host("web-disk")] } else { Vec::new() };
    Offer {
        attempt: AttemptId(uuid::Uuid::from_u128(7)),
        vm: host("web-1"),
        source: host("a"),
        target: host("b"),
        epoch: Epoch(4),
        spec: VmSpec { volumes, ..VmSpec::default() },
        mode: Mode::A,
        disk,
        verify: false,
        processor: Vec::new(),
    }
}

fn trouble() -> WireError {
    WireError::new(ErrorKind::Unavailable, "the test says so")
}

impl World {
    fn new(plant: Option<Plant>, disk: DiskMove) -> Self {
        let offer = offer(disk);
        let id = DiskId(uuid::Uuid::nil());
        let volume = VolumeRecord {
            name: host("web-disk"),
            disk_id: id,
            data_id: DataId(uuid::Uuid::nil()),
            size_bytes: 1 << 20,
            image: None,
            layers: Vec::new(),
            right: Right { object: Object::Layer(id), holder: host("a"), epoch: Epoch(9) },
            attached_to: Some(offer.vm.clone()),
            depends_on: None,
            limits: Default::default(),
        };
        let right =
            Right { object: Object::Memory(VmId(uuid::Uuid::nil())), holder: host("a"), epoch: Epoch(4) };
        let vm = VmRecord {
            name: offer.vm.clone(),
            right,
            state: VmState::Running,
            spec: offer.spec.clone(),
            attempt: None,
            came_by: None,
            waiting_for: None,
        };
        let now = Time(1_000_000_000);
        let mut world = Self {
            now,
            vm,
            rev: 1,
            volume: (disk == DiskMove::OnDemand).then_some((volume, 1)),
            missing: false,
            layer_at_source: true,
            serves: false,
            broken: None,
            pending: Vec::new(),
            late: Vec::new(),
            source: Some(Source::new(offer, now).with_plant(plant)),
            target: None,
            source_journal: None,
            target_journal: None,
            at_source: Guest::Runs,
            at_target: Guest::Nothing,
            ran_at_target: false,
            let_go: false,
            target_ready: false,
            plant,
            faults: true,
            source_outcome: None,
        };
        world.tick();
        world
    }

    fn check(&self) -> Result<(), String> {
        if self.at_source == Guest::Runs && self.at_target == Guest::Runs {
            return Err("the guest runs twice".to_owned());
        }
        self.broken.clone().map_or(Ok(()), Err)
    }

    fn source(&mut self, event: SourceEvent) {
        let Some(mut source) = self.source.take() else { return };
        let mut out = Vec::new();
        source.step(self.now, event, &mut out);
        let mut ended = false;
        for action in out {
            match action {
                Action::Journal { entry, .. } => self.source_journal = Some(*entry),
                Action::Enter(_) => {}
                Action::Read(id) => self.pending.push(Pending::Store(Side::Source, id, None)),
                Action::Cas(id, cas) => self.pending.push(Pending::Store(Side::Source, id, Some(cas))),
                Action::Send(message) => self.pending.push(Pending::ToTarget(message)),
                Action::Do(work) => {
                    if matches!(work, SourceWork::ResumeHere | SourceWork::Release) {
                        self.pending.retain(|pending| !matches!(pending, Pending::SourceWork(_)));
                    }
                    self.pending.push(Pending::SourceWork(work));
                }
                Action::Finished(outcome) => {
                    self.source_journal = None;
                    self.source_outcome = Some(outcome);
                    ended = true;
                }
            }
        }
        if !ended {
            self.source = Some(source);
        }
    }

    fn target(&mut self, event: TargetEvent) {
        let Some(mut target) = self.target.take() else { return };
        let mut out = Vec::new();
        target.step(self.now, event, &mut out);
        let mut ended = false;
        for action in out {
            match action {
                Action::Journal { entry, .. } => self.target_journal = Some(*entry),
                Action::Enter(_) => {}
                Action::Read(id) => self.pending.push(Pending::Store(Side::Target, id, None)),
                Action::Cas(id, cas) => self.pending.push(Pending::Store(Side::Target, id, Some(cas))),
                Action::Send(message) => self.pending.push(Pending::ToSource(message)),
                Action::Do(work) => {
                    if work == TargetWork::Discard {
                        self.pending.retain(|pending| !matches!(pending, Pending::TargetWork(_)));
                    }
                    self.let_go |= work == TargetWork::Resume;
                    self.pending.push(Pending::TargetWork(work));
                }
                Action::Finished(_) => {
                    self.target_journal = None;
                    ended = true;
                }
            }
        }
        if !ended {
            self.target = Some(target);
        }
    }

    fn tick(&mut self) {
        self.source(Event::Tick);
        self.target(Event::Tick);
    }

    fn seen(&self) -> Seen {
        Seen { vm: Some((self.vm.clone(), self.rev)), volumes: self.volume.clone().into_iter().collect() }
    }

    fn apply(&mut self, cas: &Cas) -> CasResult {
        let volume_rev = self.volume.as_ref().map(|(_, rev)| *rev);
        if cas.vm.1 != self.rev || cas.volumes.iter().any(|(_, rev)| Some(*rev) != volume_rev) {
            return CasResult::Conflict;
        }
        self.vm = cas.vm.0.clone();
        self.rev += 1;
        if let Some((volume, _)) = cas.volumes.first() {
            self.volume = Some((volume.clone(), self.rev));
        }
        CasResult::Yes(self.rev)
    }

    fn reply(&mut self, side: Side, source: SourceEvent, target: TargetEvent) {
        match side {
            Side::Source => self.source(source),
            Side::Target => self.target(target),
        }
    }

    /// `luck` 0 is the good case.
    fn store(&mut self, side: Side, id: ReqId, cas: Option<Box<Cas>>, luck: u8) {
        let Some(cas) = cas else {
            if luck % 8 == 7 {
                return self.reply(side, Event::ReadFailed(id, trouble()), Event::ReadFailed(id, trouble()));
            }
            let seen = Box::new(self.seen());
            return self.reply(side, Event::Records(id, seen.clone()), Event::Records(id, seen));
        };
        let result = match luck % 8 {
            7 => {
                self.late.push(*cas);
                CasResult::Unknown(trouble())
            }
            6 => {
                self.apply(&cas);
                CasResult::Unknown(trouble())
            }
            5 => CasResult::NotMade(trouble()),
            _ => self.apply(&cas),
        };
        self.reply(side, Event::Cas(id, result.clone()), Event::Cas(id, result));
    }

    fn source_work(&mut self, work: SourceWork, luck: u8) {
        let fails = luck % 16 == 15;
        match work {
            SourceWork::Pause if self.at_source == Guest::Runs => self.at_source = Guest::Stopped,
            SourceWork::ResumeHere if self.at_source == Guest::Stopped => {
                (self.at_source, self.serves) = (Guest::Runs, false);
            }
            SourceWork::ResumeHere if self.at_source != Guest::Runs => {
                return self.source(Event::Failed { work, error: trouble(), may_have_run: false });
            }
            SourceWork::Release => {
                self.at_source = Guest::Dead;
                (self.layer_at_source, self.serves) = (false, false);
                if self.missing && self.vm.right.holder == host("b") {
                    self.broken = Some("the source gave up blocks that the target lacks".to_owned());
                }
            }
            SourceWork::ResumeHere => {}
            SourceWork::Serve if !fails => {
                self.serves = true;
                let before = self.vm.right.holder == host("a") && self.vm.right.epoch == Epoch(4);
                if before || self.at_source == Guest::Runs {
                    self.broken = Some("the source hands out what it may still write".to_owned());
                }
            }
            _ if fails => return self.source(Event::Failed { work, error: trouble(), may_have_run: false }),
            _ => {}
        }
        self.source(Event::Done(work));
    }

    fn target_work(&mut self, work: TargetWork, luck: u8) {
        let mut fails = luck % 16 == 15 && !matches!(work, TargetWork::Discard);
        let mut may_have_run = false;
        match work {
            TargetWork::Prepare if !fails => {
                self.at_target = Guest::Stopped;
                self.missing = self.volume.is_some();
            }
            TargetWork::Pull if !fails => {
                fails = self.missing && !self.serves;
                self.missing &= fails;
            }
            TargetWork::Verify if !fails => {
                fails = self.at_target != Guest::Stopped;
                self.target_ready = !fails;
            }
            TargetWork::Rebuild if !fails => self.at_target = Guest::Stopped,
            TargetWork::Resume => match self.at_target {
                Guest::Stopped if fails => {}
                Guest::Stopped | Guest::Runs => {
                    fails = false;
                    self.at_target = Guest::Runs;
                    self.ran_at_target = true;
                }
                Guest::Nothing | Guest::Dead => {
                    fails = true;
                    may_have_run = self.ran_at_target;
                }
            },
            TargetWork::Discard => {
                self.at_target = Guest::Dead;
                (self.target_ready, self.missing) = (false, false);
            }
            _ => {}
        }
        if fails {
            self.target(Event::Failed { work, error: trouble(), may_have_run });
        } else {
            self.target(Event::Done(work));
        }
    }

    /// Lets one of the things under way happen.
    fn happen(&mut self, which: u8, luck: u8) {
        if self.pending.is_empty() {
            return;
        }
        let mut at = usize::from(which) % self.pending.len();
        // Messages of one direction keep their order.
        let same = |a: &Pending, b: &Pending| std::mem::discriminant(a) == std::mem::discriminant(b);
        if matches!(self.pending[at], Pending::ToSource(_) | Pending::ToTarget(_)) {
            at = self.pending.iter().position(|pending| same(pending, &self.pending[at])).unwrap_or(at);
        }
        let luck = if self.faults { luck } else { 0 };
        match self.pending.remove(at) {
            Pending::ToSource(_) | Pending::ToTarget(_) if luck % 8 == 7 => {}
            Pending::ToSource(message) => self.source(Event::Peer(message)),
            Pending::ToTarget(message) => self.deliver_to_target(message),
            Pending::SourceWork(work) => self.source_work(work, luck),
            Pending::TargetWork(work) => self.target_work(work, luck),
            Pending::Store(side, id, cas) => self.store(side, id, cas, luck),
        }
    }

    fn deliver_to_target(&mut self, message: ToTarget) {
        match (&self.target, message) {
            (Some(_), message) => self.target(Event::Peer(message)),
            (None, ToTarget::Offer(offer))
                if self.target_journal.is_none() && self.at_target == Guest::Nothing =>
            {
                self.target = Some(Target::new(*offer, self.now));
                self.target(Event::Tick);
            }
            (None, _) if self.target_journal.is_none() => {
                self.pending.push(Pending::ToSource(ToSource::Gone));
            }
            (None, _) => {}
        }
    }

    fn crash(&mut self, side: Side, luck: u8) {
        // Work under way may have had its effect; requests on their way may still arrive.
        let mut works = Vec::new();
        let late = &mut self.late;
        self.pending.retain_mut(|pending| match (pending, side) {
            (Pending::SourceWork(work), Side::Source) => {
                works.push((Some(*work), None));
                false
            }
            (Pending::TargetWork(work), Side::Target) => {
                works.push((None, Some(*work)));
                false
            }
            (Pending::Store(asker, _, cas), _) if *asker == side => {
                late.extend(cas.take().map(|cas| *cas));
                false
            }
            (Pending::ToSource(_) | Pending::ToTarget(_), _) => false,
            _ => true,
        });
        match side {
            Side::Source => (self.source, self.serves) = (None, false),
            Side::Target => self.target = None,
        }
        for (source, target) in works.into_iter().filter(|_| luck.is_multiple_of(2)) {
            if let Some(work) = source {
                self.source_work(work, 0);
            }
            if let Some(work) = target {
                self.target_work(work, 0);
            }
        }
    }

    fn restart(&mut self) {
        if let (None, Some(entry)) = (&self.source, &self.source_journal) {
            self.source = Some(Source::recover(entry, self.now).with_plant(self.plant));
        }
        if let (None, Some(entry)) = (&self.target, &self.target_journal) {
            self.target = Some(Target::recover(entry, self.now));
        }
        self.tick();
    }

    fn fault(&mut self, which: u8, luck: u8) {
        match which % 8 {
            0 => self.crash(Side::Source, luck),
            1 => self.crash(Side::Target, luck),
            2 => self.source(Event::Cancel),
            3 if self.at_target != Guest::Nothing => {
                self.at_target = Guest::Dead;
                self.target(Event::Broken(trouble()));
            }
            4 if !self.late.is_empty() => {
                let at = usize::from(luck) % self.late.len();
                let cas = self.late.remove(at);
                self.apply(&cas);
            }
            5 => self.restart(),
            _ => {
                self.now = self.now.plus_ms(u64::from(luck) * 50);
                self.tick();
            }
        }
    }

    /// The next thing happens, or time passes.
    fn go_on(&mut self) {
        if self.pending.is_empty() {
            self.now = self.now.plus_ms(100);
            self.tick();
        } else {
            self.happen(0, 0);
        }
    }

    /// No more faults: everything must come to an end.
    fn calm(&mut self) -> Result<(), String> {
        self.faults = false;
        for cas in std::mem::take(&mut self.late) {
            self.apply(&cas);
        }
        self.restart();
        for _ in 0..20_000 {
            if self.source.is_none() && self.target.is_none() && self.pending.is_empty() {
                break;
            }
            self.go_on();
            self.check()?;
        }
        if self.source.is_some() || self.target.is_some() {
            return Err(format!("never ended: {:?} {:?}", self.source, self.target));
        }
        self.end_state()
    }

    fn end_state(&self) -> Result<(), String> {
        let depends = self.volume.as_ref().is_some_and(|(volume, _)| volume.depends_on.is_some());
        if depends || self.missing && self.vm.right.holder == host("b") {
            return Err(format!("blocks are missing: {}, the record says: {:?}", self.missing, self.volume));
        }
        let holder = self.vm.right.holder.as_str();
        let want = match (holder, self.vm.state) {
            ("a", VmState::Running) => (Guest::Runs, false),
            ("b", VmState::Running) => (Guest::Runs, true),
            (_, VmState::Crashed) => return self.crashed(),
            _ => return Err(format!("the record ends as {:?}", self.vm)),
        };
        let found = if want.1 { self.at_target } else { self.at_source };
        // A QEMU killed after the guest had started is an ordinary crash, found by whoever watches QEMU.
        let crashed_later = want.1 && found == Guest::Dead && self.ran_at_target;
        if found != want.0 && !crashed_later {
            return Err(format!(
                "record {:?}, source {:?}, target {:?}",
                self.vm, self.at_source, self.at_target
            ));
        }
        if self.vm.attempt.is_some() {
            return Err("the attempt still stands in the record".to_owned());
        }
        Ok(())
    }

    fn crashed(&self) -> Result<(), String> {
        if self.ran_at_target || self.let_go { Ok(()) } else { Err("a crash that nothing caused".to_owned()) }
    }
}

fn run(script: &[(u8, u8, u8)], plant: Option<Plant>, disk: DiskMove) -> Result<World, String> {
    let mut world = World::new(plant, disk);
    for (kind, which, luck) in script {
        if *kind < 16 {
            world.fault(*which, *luck);
        } else if *kind < 80 {
            world.now = world.now.plus_ms(100);
            world.tick();
        } else {
            world.happen(*which, *luck);
        }
        world.check()?;
    }
    world.calm()?;
    Ok(world)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_guest_runs_once(script in prop::collection::vec(any::<(u8, u8, u8)>(), 0..600)) {
        let end = run(&script, None, DiskMove::Copy);
        prop_assert!(end.is_ok(), "{}", end.err().unwrap_or_default());
    }

    #[test]
    fn whatever_happens_blocks_that_follow_are_not_lost(
        script in prop::collection::vec(any::<(u8, u8, u8)>(), 0..600)
    ) {
        let end = run(&script, None, DiskMove::OnDemand);
        prop_assert!(end.is_ok(), "{}", end.err().unwrap_or_default());
    }
}

#[test]
fn without_faults_the_vm_moves() {
    let world = run(&[], None, DiskMove::Copy).unwrap();
    assert_eq!(world.at_target, Guest::Runs);
    assert_eq!(world.at_source, Guest::Dead);
    assert_eq!(world.vm.right.holder, host("b"));
    assert_eq!(world.vm.right.epoch, Epoch(5));
    assert_eq!(world.source_outcome, Some(Outcome::Moved));
}

#[test]
fn a_lost_target_lets_the_source_resume_within_five_seconds() {
    // Lose the target after every number of events up to the commit.
    for events in 0..200 {
        let mut world = World::new(None, DiskMove::Copy);
        world.faults = false;
        for _ in 0..events {
            world.go_on();
        }
        if world.vm.right.holder == host("b") {
            return;
        }
        world.crash(Side::Target, 1);
        world.target_journal = None;
        let lost = world.now;
        // Offers are not answered at all while the host is away.
        world.at_target = Guest::Dead;
        while world.at_source != Guest::Runs || world.source.is_some() {
            world.pending.retain(|pending| !matches!(pending, Pending::ToTarget(_)));
            world.go_on();
            if world.at_source != Guest::Runs {
                assert!(world.now.since_ms(lost) < 5_000, "after {events} events");
            }
            if world.vm.right.holder == host("b") {
                // COMMIT was on its way when the target was lost: only the operator can decide.
                return;
            }
        }
    }
    panic!("the commit was never reached");
}

#[test]
fn the_guest_is_not_paused_while_the_store_is_silent() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    let mut silent = false;
    for _ in 0..2_000 {
        silent |= world.source.as_ref().is_some_and(|source| source.step_now() == Step::Copy);
        if silent {
            world.pending.retain(|pending| !matches!(pending, Pending::Store(Side::Source, ..)));
        }
        world.go_on();
        assert_eq!(world.at_source, Guest::Runs);
    }
    let waiting = world.source.as_ref().and_then(Source::waiting_for).unwrap();
    assert!(waiting.contains("metadata store"), "{waiting}");
}

#[test]
fn a_silent_source_is_reported_to_the_operator_who_can_choose_the_target() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    while !world.target_ready {
        world.go_on();
    }
    world.crash(Side::Source, 1);
    let gone = world.now;
    let calm = |world: &mut World| {
        world.pending.retain(|pending| !matches!(pending, Pending::ToSource(_)));
        world.go_on();
    };
    while world.vm.state != VmState::NeedsOperator {
        calm(&mut world);
        assert!(world.now.since_ms(gone) < 15_000);
    }
    let words = world.vm.waiting_for.clone().unwrap();
    assert!(words.contains("vm recover web-1 --on b"), "{words}");
    assert_eq!(world.vm.right.holder, host("a"));
    let cas = recover(&world.seen(), &host("b")).unwrap();
    assert!(matches!(world.apply(&cas), CasResult::Yes(_)));
    for _ in 0..200 {
        calm(&mut world);
    }
    assert_eq!(world.at_target, Guest::Runs);
    assert_eq!(world.vm.state, VmState::Running);
    assert_eq!(world.vm.right.epoch, Epoch(5));
}

#[test]
fn a_silent_target_is_reported_to_the_operator_who_can_choose_the_source() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    while world.vm.right.holder != host("b") {
        world.go_on();
    }
    world.crash(Side::Target, 1);
    world.at_target = Guest::Dead;
    let gone = world.now;
    while world.vm.state != VmState::NeedsOperator {
        world.pending.retain(|pending| !matches!(pending, Pending::ToTarget(_)));
        world.go_on();
        assert!(world.now.since_ms(gone) < 15_000);
    }
    let words = world.vm.waiting_for.clone().unwrap();
    assert!(words.ends_with("vm recover web-1 --on a"), "{words}");
    assert_eq!(world.vm.right.holder, host("b"));
    assert!(world.source_journal.as_ref().is_some_and(can_run));
    let seen = Seen { vm: Some((world.vm.clone(), world.rev)), volumes: Vec::new() };
    let cas = recover(&seen, &host("a")).unwrap();
    assert!(matches!(world.apply(&cas), CasResult::Yes(_)));
    for _ in 0..200 {
        world.pending.retain(|pending| !matches!(pending, Pending::ToTarget(_)));
        world.go_on();
    }
    assert_eq!(world.at_source, Guest::Runs);
    assert_eq!((world.vm.state, world.vm.right.epoch), (VmState::Running, Epoch(6)));
    // What comes back later gives up what it has.
    world.calm().unwrap();
    assert_eq!(world.at_source, Guest::Runs);
}

/// In mode B the waiting QEMU ends with the source's stream, which ends with the source's agent.
#[test]
fn a_target_that_breaks_because_the_source_is_gone_stays_to_call_the_operator() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    while world.target.as_ref().is_none_or(|target| target.step_now() < Step::ListIo) {
        world.go_on();
    }
    world.crash(Side::Source, 1);
    world.target(Event::Broken(trouble()));
    while world.vm.state != VmState::NeedsOperator {
        world.pending.retain(|pending| !matches!(pending, Pending::ToSource(_)));
        world.go_on();
    }
    world.calm().unwrap();
    assert_eq!(world.at_source, Guest::Runs);
    assert_eq!((world.vm.state, world.vm.waiting_for.clone()), (VmState::Running, None));
}

#[test]
fn before_ready_the_operator_is_not_sent_to_the_target() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    while world.target.as_ref().is_none_or(|target| target.step_now() < Step::LastRound) {
        world.go_on();
    }
    world.crash(Side::Source, 1);
    assert!(!world.target_journal.as_ref().is_some_and(can_run));
    while world.vm.state != VmState::NeedsOperator {
        world.pending.retain(|pending| !matches!(pending, Pending::ToSource(_)));
        world.go_on();
    }
    let words = world.vm.waiting_for.clone().unwrap();
    assert!(words.contains("bring a back") && !words.contains("vm recover"), "{words}");
    world.calm().unwrap();
    assert_eq!(world.at_source, Guest::Runs);
    assert_eq!((world.vm.state, world.vm.waiting_for.clone()), (VmState::Running, None));
}

#[test]
fn a_commit_that_was_surely_not_made_lets_the_source_go_on_without_the_store() {
    let mut world = World::new(None, DiskMove::Copy);
    world.faults = false;
    while world.source.as_ref().is_some_and(|source| source.step_now() < Step::Commit) {
        world.go_on();
    }
    let lost = world.now;
    while world.at_source != Guest::Runs {
        let at = world.pending.iter().position(|pending| matches!(pending, Pending::Store(..)));
        match at.map(|at| world.pending.remove(at)) {
            Some(Pending::Store(side, id, Some(_))) => {
                let answer = || CasResult::NotMade(trouble());
                world.reply(side, Event::Cas(id, answer()), Event::Cas(id, answer()));
            }
            Some(Pending::Store(side, id, None)) => {
                world.reply(side, Event::ReadFailed(id, trouble()), Event::ReadFailed(id, trouble()));
            }
            _ => world.go_on(),
        }
        assert!(world.now.since_ms(lost) < 500);
    }
    world.calm().unwrap();
    assert_eq!((world.at_source, world.vm.right.holder.clone()), (Guest::Runs, host("a")));
}

#[test]
fn a_vm_that_crashed_lets_go_of_its_volumes() {
    let mut world = World::new(None, DiskMove::Copy);
    world.vm.state = VmState::Starting;
    let disk = DiskId(uuid::Uuid::from_u128(1));
    let volume = VolumeRecord {
        name: host("root"),
        disk_id: disk,
        data_id: DataId(uuid::Uuid::from_u128(2)),
        size_bytes: 1 << 20,
        image: None,
        layers: Vec::new(),
        right: Right { object: Object::Layer(disk), holder: host("b"), epoch: Epoch(5) },
        attached_to: Some(world.vm.name.clone()),
        depends_on: None,
        limits: Default::default(),
    };
    let seen = Seen { vm: Some((world.vm.clone(), 3)), volumes: vec![(volume, 2)] };
    let crashed = seen.settle(VmState::Crashed).unwrap();
    assert!(crashed.volumes.iter().all(|(volume, rev)| volume.attached_to.is_none() && *rev == 2));
    assert_eq!(crashed.volumes.len(), 1);
    assert!(seen.settle(VmState::Running).unwrap().volumes.is_empty());
}

#[test]
fn planted_mistakes_are_found() {
    // The last round moves bytes, which this world does not have: the simulator finds that one.
    for (plant, disk) in [
        (Plant::CommitBeforeReady, DiskMove::Copy),
        (Plant::ResumeWithoutReadBack, DiskMove::Copy),
        (Plant::ReleaseBeforeRunning, DiskMove::Copy),
        (Plant::ReleaseBeforePulled, DiskMove::OnDemand),
    ] {
        let mut runner = proptest::test_runner::TestRunner::new_with_rng(
            ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() },
            proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
        );
        let scripts = prop::collection::vec(any::<(u8, u8, u8)>(), 0..400);
        let found = runner.run(&scripts, |script| {
            prop_assert!(run(&script, Some(plant), disk).is_ok());
            Ok(())
        });
        assert!(found.is_err(), "{plant:?} was not found");
    }
}
