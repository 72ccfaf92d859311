//! What breaks, when, and for how long; and the operator, who acts when only an operator can.
//!
//! Faults come at random times and, more to the point, at the fail points of the handover: whenever a machine enters
//! a step, with some chance its agent, its host, its peer, a QEMU, a link or the store fails right there.

use whimbrel_engine::migrate::handover::{CasResult, Event, recover};
use whimbrel_wire::{ErrorKind, Time, WireError};

use crate::guest::{CopyId, CopyState};
use crate::net::LINKS;
use crate::rng::Rng;
use crate::world::{Attempt, HostIx, What, World};

/// When faults end and repairs begin.
pub const CALM: Time = Time(20_000_000_000);
/// How long after that the operator looks.
const OPERATOR_MS: u64 = 35_000;

/// How much goes wrong in a run; chances of a thousand.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// A fault at a fail point.
    pub at_steps: u64,
    /// Work that never ends.
    pub hangs: u64,
    /// Work that fails.
    pub failures: u64,
    /// A crash for good.
    pub for_good: u64,
    /// Moves are cancelled now and then.
    pub cancels: bool,
    /// Disks follow after the switch-over.
    pub on_demand: bool,
}

impl Rates {
    /// A run's own character: some are rough, some nearly quiet.
    pub fn new(rng: &mut Rng) -> Self {
        let rough = rng.below(4);
        Self {
            at_steps: [0, 15, 40, 90][usize::try_from(rough).unwrap_or(0)],
            hangs: rng.below(6),
            failures: rng.below(20),
            for_good: rng.below(200),
            cancels: rng.permille(300),
            on_demand: rng.permille(200),
        }
    }
}

/// Something breaks, or is repaired. Durations in milliseconds; none: for good.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The agent is killed.
    Crash(HostIx, Option<u64>),
    /// The host loses power.
    Power(HostIx, Option<u64>),
    /// Power and agent come back.
    Restore(HostIx),
    /// A QEMU that does not run the guest ends.
    KillIdle(HostIx),
    /// The QEMU that runs the guest ends.
    KillGuest,
    /// A link is cut.
    Cut(HostIx, HostIx, usize, u64),
    /// It works again.
    Heal(HostIx, HostIx, usize),
    /// The control connection breaks.
    Reset(HostIx, HostIx),
    /// The metadata store does not answer.
    StoreDown(u64),
    /// It does again.
    StoreUp,
    /// The store loses answers and delays requests.
    StoreFlaky(u64),
    /// A move is cancelled.
    Cancel(HostIx, Attempt),
    /// The seed store of images does not answer.
    SeedDown(u64),
    /// It does again.
    SeedUp,
    /// A cached block changes on disk.
    Rot(HostIx),
    /// Faults end; everything that can be repaired is.
    Calm,
    /// The operator looks.
    Operator,
}

impl World {
    pub(crate) fn plan_faults(&mut self) {
        let count = self.rng.below(6);
        for _ in 0..count {
            let at = Time(self.rng.between(200, 16_000) * 1_000_000);
            let host = self.rng.index(self.hosts.len());
            let fault = self.any_fault(host, (host + 1) % self.hosts.len());
            self.at(at, What::Fault(fault));
        }
        self.store.lose_answers = if self.rng.permille(300) { self.rng.below(150) } else { 0 };
        self.store.late = if self.rng.permille(400) { self.rng.below(200) } else { 0 };
        self.at(CALM, What::Fault(Fault::Calm));
    }

    /// A fault at the fail point of a machine on `host`.
    pub(crate) fn fault_for(&mut self, host: HostIx, attempt: Attempt) -> Fault {
        let agent = self.hosts[host].agent.as_ref();
        let peer = agent.and_then(|agent| {
            let source = agent.sources.get(&attempt).map(|source| source.offer().target.clone());
            source.or_else(|| agent.targets.get(&attempt).map(|target| target.offer().source.clone()))
        });
        let peer = peer.map_or(host, |peer| self.host_ix(&peer));
        let (a, b) = if self.rng.permille(500) { (host, peer) } else { (peer, host) };
        self.any_fault(a, b)
    }

    fn any_fault(&mut self, a: HostIx, b: HostIx) -> Fault {
        let can_go = !self.hosts.iter().any(|host| host.gone);
        let for_good = can_go && self.rng.permille(self.rates.for_good);
        let back_ms = if self.rng.permille(500) { 2_000 } else { self.rng.between(150, 9_000) };
        let back = (!for_good).then_some(back_ms);
        let ms = self.rng.between(50, 12_000);
        match self.rng.below(100) {
            0..22 => Fault::Crash(a, back),
            22..32 => Fault::Power(a, back),
            32..46 => Fault::KillIdle(a),
            46..50 => Fault::KillGuest,
            50..58 => Fault::Cut(a, b, self.rng.index(LINKS), ms),
            58..66 => Fault::Cut(a, b, LINKS, ms),
            66..70 => Fault::Reset(a, b),
            70..82 => Fault::StoreDown(ms),
            82..88 => Fault::StoreFlaky(ms),
            88..94 => Fault::SeedDown(ms),
            _ => Fault::Rot(a),
        }
    }

    pub(crate) fn on_fault(&mut self, fault: Fault) {
        self.note(format_args!("fault: {fault:?}"));
        if !matches!(fault, Fault::Restore(_) | Fault::Heal(..) | Fault::StoreUp | Fault::SeedUp) {
            self.tally.faults += 1;
        }
        match fault {
            Fault::Crash(host, back) => {
                self.crash_agent(host);
                self.come_back(host, back);
            }
            Fault::Power(host, back) => {
                self.cut_power(host);
                self.come_back(host, back);
            }
            Fault::Restore(host) => self.restore(host),
            Fault::KillIdle(host) => self.kill_idle(host),
            Fault::KillGuest => self.kill_guest(),
            Fault::Cut(a, b, link, ms) => {
                for link in if link < LINKS { link..link + 1 } else { 0..LINKS } {
                    self.net.set_cut(a, b, link, true);
                    self.after_ms(ms, What::Fault(Fault::Heal(a, b, link)));
                }
                self.heard_changed();
            }
            Fault::Heal(a, b, link) => {
                self.net.set_cut(a, b, link, false);
                self.heard_changed();
            }
            Fault::Reset(a, b) => self.net.reset(a, b),
            Fault::StoreDown(ms) => {
                self.store.down = true;
                self.after_ms(ms, What::Fault(Fault::StoreUp));
            }
            Fault::StoreUp => self.store.down = false,
            Fault::StoreFlaky(ms) => {
                self.store.lose_answers = 400;
                self.store.late = 200;
                self.after_ms(ms, What::Fault(Fault::StoreUp));
            }
            Fault::Cancel(host, attempt) => self.source_event(host, attempt, Event::Cancel),
            Fault::SeedDown(ms) => {
                self.seed.set_down(true, self.now);
                self.after_ms(ms, What::Fault(Fault::SeedUp));
            }
            Fault::SeedUp => self.seed.set_down(false, self.now),
            Fault::Rot(host) => self.rot(host),
            Fault::Calm => self.calm_down(),
            Fault::Operator => self.on_operator(),
        }
    }

    fn come_back(&mut self, host: HostIx, back: Option<u64>) {
        match back {
            Some(ms) => self.after_ms(ms, What::Fault(Fault::Restore(host))),
            None => {
                self.note(format_args!("h{host}: gone for good"));
                self.hosts[host].gone = true;
            }
        }
    }

    fn kill_idle(&mut self, host: HostIx) {
        let copies = &mut self.hosts[host].copies;
        let idle =
            copies.values_mut().find(|copy| matches!(copy.state, CopyState::Incoming | CopyState::Stopped));
        let Some(copy) = idle else { return };
        copy.kill();
        let id = copy.id;
        self.tell_of_kill(host, id);
    }

    fn kill_guest(&mut self) {
        for host in 0..self.hosts.len() {
            let running = self.hosts[host].copies.values_mut().find(|copy| copy.state == CopyState::Running);
            if let Some(copy) = running {
                copy.kill();
                let id = copy.id;
                self.tell_of_kill(host, id);
            }
        }
    }

    /// An agent sees at once that a QEMU of its has ended.
    fn tell_of_kill(&mut self, host: HostIx, id: CopyId) {
        let attempts: Vec<Attempt> = self.hosts[host]
            .copy_of
            .iter()
            .filter(|(_, copy)| **copy == id)
            .map(|(attempt, _)| *attempt)
            .collect();
        for attempt in attempts {
            let error = WireError::new(ErrorKind::Io, "QEMU ended");
            self.source_event(host, attempt, Event::Broken(error.clone()));
            self.target_event(host, attempt, Event::Broken(error));
        }
    }

    fn calm_down(&mut self) {
        self.calm = true;
        self.net.calm();
        self.store.down = false;
        self.store.lose_answers = 0;
        self.store.late = 0;
        self.seed.calm(self.now);
        self.heard_changed();
        for host in 0..self.hosts.len() {
            self.restore(host);
        }
        self.after_ms(OPERATOR_MS + 10_000, What::Move);
        self.after_ms(OPERATOR_MS, What::Fault(Fault::Operator));
        self.after_ms(2 * OPERATOR_MS, What::Fault(Fault::Operator));
    }

    /// The holder's host, or its agent, is gone for good, and the guest does not run: the operator makes sure that it
    /// is off and places the VM where most of it is.
    fn on_operator(&mut self) {
        let holder = self.host_ix(&self.store.holder().clone());
        let runs = self.hosts[holder].copies.values().any(|copy| copy.state == CopyState::Running);
        if !self.hosts[holder].gone || runs {
            return;
        }
        self.cut_power(holder);
        let kept = |world: &Self, host: HostIx| {
            let it = &world.hosts[host];
            let agent = it.agent.as_ref()?;
            let ready = agent.targets.keys().chain(agent.sources.keys()).find_map(|attempt| {
                let copy = it.copies.get(it.copy_of.get(attempt)?)?;
                (copy.state == CopyState::Stopped && copy.regs.is_some()).then_some(copy)
            });
            ready.cloned()
        };
        let choice = (0..self.hosts.len()).find_map(|host| Some((host, kept(self, host)?)));
        let on = match choice {
            Some((host, copy)) => {
                // What ran on at the lost host is lost with it.
                self.truth.go_back_to(&copy);
                host
            }
            None => {
                self.excused = true;
                (0..self.hosts.len()).find(|host| self.agent_up(*host)).unwrap_or(holder)
            }
        };
        self.note(format_args!("operator: vm recover --on h{on}"));
        self.tally.operator += 1;
        let Some(cas) = recover(&self.store.seen(), &self.hosts[on].name) else { return };
        if self.change(&cas) == Some(CasResult::Conflict) {
            self.fail("the operator's change conflicts with nothing".to_owned());
        }
    }
}
