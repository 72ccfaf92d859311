//! Image reads: layer → cache → peer → seed (capability 8).
//!
//! One [`Reads`] per image and host. The layer above the image has been asked already; here a block is looked for
//! in this host's cache, in the caches of peers, and in the seed store only if no willing peer has it.
//!
//! ```text
//!                    Want
//!                     │        joining, or no slot for a fill
//!                     ▼
//!                  Queued ─────────► Asking cache ─► peer ─► peer … ─► home ─► stand-in ─► seed ─► any peer
//!                                       │  ▲                                                        │
//!                            Verified   │  └── wrong hash, not there, busy, failed, deadline ───────┤
//!                                       ▼                                                           ▼
//!                                    Deliver (and keep, by the policy)                             Fail
//! ```
//!
//! Invariants
//! * One flight per block: all who want it wait for the same one, and each is answered exactly once.
//! * The seed is not asked while a willing peer has the block. Willing: not quarantined, not suspect, not tried in
//!   this flight, not busy for longer than [`Config::busy_ms_max`].
//! * A block that nobody has is asked from its home, which fetches and keeps it: however many hosts want it at
//!   once, the seed is read about once. A host that was asked as a home asks no other home, so there are no rings.
//! * A peer that sent wrong bytes is quarantined for the image, and named.
//! * A deadline starts the next source; the late one may still win. Everything ends by [`Config::give_up_ms`].
//! * Only blocks that were verified and written to the cache are advertised.
//!
//! Not here: what peers are known to have (`swarm`), who is home (`home`), bytes and hashes (`host::store`).

use std::collections::{BTreeMap, BTreeSet};

use whimbrel_wire::peer::block::{Bitmap, Run};
use whimbrel_wire::{HostId, ImageId, Time};

use super::swarm::Swarm;

/// Limits and policy; times in milliseconds.
#[derive(Clone, Debug)]
pub struct Config {
    /// For a read of the local cache.
    pub cache_ms: u64,
    /// For a peer that has the block.
    pub peer_ms: u64,
    /// For a home, which may have to read the seed.
    pub home_ms: u64,
    /// For the seed.
    pub seed_ms: u64,
    /// No flight lasts longer.
    pub give_up_ms: u64,
    /// How long the first reads wait to learn who else has the image.
    pub join_ms: u64,
    /// Wait so long before a busy peer is asked again…
    pub busy_ms: u64,
    /// …and no longer than this in one flight.
    pub busy_ms_max: u64,
    /// A block is kept once it was fetched from peers so many times; from the seed, always.
    pub keep_after_peer_fetches: u32,
    /// How many homes are asked before this host reads the seed itself.
    pub homes_max: u32,
    /// The most demand flights at once.
    pub demand_parallel: usize,
    /// The most background flights at once; only one while demand reads are under way.
    pub fill_parallel: usize,
    /// The most blocks whose peer fetches are counted.
    pub counted_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cache_ms: 5_000,
            peer_ms: 1_000,
            home_ms: 4_000,
            seed_ms: 15_000,
            give_up_ms: 60_000,
            join_ms: 500,
            busy_ms: 30,
            busy_ms_max: 2_000,
            keep_after_peer_fetches: 1,
            homes_max: 2,
            demand_parallel: 256,
            fill_parallel: 4,
            counted_max: 65_536,
        }
    }
}

/// Somebody who waits for a block; given by the caller, unique while it waits.
pub type Waiter = u64;

/// One question to one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Why a block is wanted; the smaller is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// In case somebody wants it later.
    Fill,
}

/// Where a block may come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// This host's cache; the block is verified again on the way.
    Cache,
    /// A peer that advertises it.
    Peer(HostId),
    /// The block's home, which fetches it if it has to.
    Home(HostId),
    /// The seed store.
    Seed,
}

/// What a source answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The bytes are here and have the right hash.
    Verified,
    /// Bytes came, with another hash.
    WrongHash,
    /// The source does not have the block.
    NotHave,
    /// The source asks to be left alone for a while.
    Busy,
    /// No answer, or an error.
    Failed,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody wants a block.
    Want {
        /// Which.
        block: u64,
        /// Who.
        waiter: Waiter,
        /// How urgently.
        class: Class,
        /// Whether this host's cache claims to have it.
        local: bool,
        /// Whether a peer wants it, which takes this host for the block's home.
        for_peer: bool,
    },
    /// A source answered.
    Arrived {
        /// The question.
        request: RequestId,
        /// The answer.
        outcome: Outcome,
    },
    /// The block was verified and is in the cache.
    Kept {
        /// Which.
        block: u64,
    },
    /// The block is no longer in the cache (rot found by the scrub, eviction).
    Lost {
        /// Which.
        block: u64,
    },
    /// A peer told its bitmap.
    Hello {
        /// Who.
        host: HostId,
        /// What it has.
        has: Bitmap,
    },
    /// A peer told changes.
    Changed {
        /// Who.
        host: HostId,
        /// Blocks it has now.
        here: Vec<Run>,
        /// Blocks it no longer has.
        gone: Vec<Run>,
    },
    /// A peer left, or cannot be reached.
    Left {
        /// Who.
        host: HostId,
    },
    /// Everybody who was known to have the image was asked for a bitmap, and answered or failed.
    Joined,
    /// [`Reads::next_wake`] has come.
    Tick,
}

/// Why a flight failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No peer has the block, and the seed does not answer.
    Unreachable,
    /// The seed's bytes are damaged, and no peer has good ones.
    Corrupt,
    /// The time ran out.
    TimedOut,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask a source; answer with [`Event::Arrived`].
    Ask {
        /// Names the question.
        request: RequestId,
        /// Which block.
        block: u64,
        /// Whom.
        source: Source,
        /// When the next source is tried; the answer still counts.
        deadline: Time,
    },
    /// The answer is of no more use; none has to come.
    Cancel {
        /// Which question.
        request: RequestId,
    },
    /// Hand the bytes of `request` to all waiters; write them to the cache if `keep`, then say [`Event::Kept`].
    Deliver {
        /// The question whose answer it is.
        request: RequestId,
        /// Which block.
        block: u64,
        /// Where it came from.
        source: Source,
        /// Whether it goes into the cache.
        keep: bool,
        /// Who gets it.
        waiters: Vec<Waiter>,
    },
    /// Nobody could give the block.
    Fail {
        /// Which block.
        block: u64,
        /// Who is told.
        waiters: Vec<Waiter>,
        /// Why.
        why: Why,
    },
    /// The cache's copy is bad: forget it.
    Drop {
        /// Which block.
        block: u64,
    },
    /// Tell peers that this host has the block.
    Advertise {
        /// Which block.
        block: u64,
    },
    /// Tell peers that this host no longer has it.
    Withdraw {
        /// Which block.
        block: u64,
    },
    /// For the log and the counters.
    Report(Report),
}

/// Something people should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A peer sent bytes that are not the block's, and is not asked again for this image.
    Liar {
        /// Who.
        host: HostId,
        /// For which block.
        block: u64,
    },
    /// The cache's bytes changed since they were written.
    Rot {
        /// Which block.
        block: u64,
    },
    /// The seed store's bytes are not the block's.
    SeedCorrupt {
        /// Which block.
        block: u64,
    },
    /// A peer did not have what it had advertised.
    Stale {
        /// Who.
        host: HostId,
        /// Which block.
        block: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Deadline(RequestId),
    Retry(u64),
}

#[derive(Clone, Debug)]
struct Request {
    block: u64,
    source: Source,
    asked: Time,
    deadline: Time,
}

#[derive(Clone, Debug)]
struct Flight {
    class: Class,
    order: u64,
    waiters: Vec<Waiter>,
    /// The cache is still to be tried.
    local: bool,
    /// A peer takes this host for the home: no other home is asked.
    direct: bool,
    started: Option<Time>,
    /// The question whose deadline moves the flight on; earlier ones may still be answered.
    current: Option<RequestId>,
    late: Vec<RequestId>,
    tried: Vec<HostId>,
    busy: Vec<HostId>,
    busy_since: Option<Time>,
    retry_at: Option<Time>,
    homes: u32,
    seed_tried: bool,
    last_pass: bool,
    why: Why,
}

enum Next {
    Ask(Source),
    Wait(Time),
    GiveUp,
}

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct Reads {
    config: Config,
    swarm: Swarm,
    flights: BTreeMap<u64, Flight>,
    queue: BTreeSet<(Class, u64, u64)>,
    requests: BTreeMap<RequestId, Request>,
    timers: BTreeSet<(Time, Timer)>,
    peer_fetches: BTreeMap<u64, u32>,
    asking: [usize; 2],
    counter: u64,
    join_until: Option<Time>,
}

impl Reads {
    /// The read path of `image`, which has `blocks` blocks, on host `me`, from `now` on.
    pub fn new(config: Config, image: ImageId, me: HostId, blocks: u64, now: Time) -> Self {
        let join_until = (config.join_ms > 0).then(|| now.plus_ms(config.join_ms));
        Self {
            config,
            swarm: Swarm::new(image, me, blocks),
            flights: BTreeMap::new(),
            queue: BTreeSet::new(),
            requests: BTreeMap::new(),
            timers: BTreeSet::new(),
            peer_fetches: BTreeMap::new(),
            asking: [0; 2],
            counter: 0,
            join_until,
        }
    }

    /// What peers are known to have.
    pub fn swarm(&self) -> &Swarm {
        &self.swarm
    }

    /// Whether a flight for the block is under way or queued.
    pub fn in_flight(&self, block: u64) -> bool {
        self.flights.contains_key(&block)
    }

    /// When [`Event::Tick`] is due, if nothing else happens before.
    pub fn next_wake(&self) -> Option<Time> {
        let timer = self.timers.first().map(|(at, _)| *at);
        let join = self.join_until.filter(|_| !self.queue.is_empty());
        [timer, join].into_iter().flatten().min()
    }

    /// Takes an event and appends what is to be done to `actions`.
    pub fn step(&mut self, now: Time, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Want { block, waiter, class, local, for_peer } => {
                self.want(now, block, waiter, class, local, for_peer, actions);
            }
            Event::Arrived { request, outcome } => self.arrived(now, request, outcome, actions),
            Event::Kept { block } => {
                self.peer_fetches.remove(&block);
                actions.push(Action::Advertise { block });
            }
            Event::Lost { block } => actions.push(Action::Withdraw { block }),
            Event::Hello { host, has } => self.swarm.hello(&host, has),
            Event::Changed { host, here, gone } => self.swarm.changed(&host, &here, &gone),
            Event::Left { host } => self.left(now, &host, actions),
            Event::Joined => self.join_until = None,
            Event::Tick => {}
        }
        self.fire_timers(now, actions);
        self.start_queued(now, actions);
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one event")]
    fn want(
        &mut self,
        now: Time,
        block: u64,
        waiter: Waiter,
        class: Class,
        local: bool,
        for_peer: bool,
        actions: &mut Vec<Action>,
    ) {
        self.counter += 1;
        let order = self.counter;
        let fresh = !self.flights.contains_key(&block);
        let flight = self.flights.entry(block).or_insert_with(|| Flight {
            class,
            order,
            waiters: Vec::new(),
            local,
            direct: false,
            started: None,
            current: None,
            late: Vec::new(),
            tried: Vec::new(),
            busy: Vec::new(),
            busy_since: None,
            retry_at: None,
            homes: 0,
            seed_tried: false,
            last_pass: false,
            why: Why::Unreachable,
        });
        flight.waiters.push(waiter);
        flight.direct |= for_peer;
        if fresh {
            self.queue.insert((class, order, block));
            return;
        }
        if class < flight.class {
            let was = std::mem::replace(&mut flight.class, class);
            if flight.started.is_none() {
                self.queue.remove(&(was, flight.order, block));
                self.queue.insert((class, flight.order, block));
            } else {
                self.asking[was as usize] -= 1;
                self.asking[class as usize] += 1;
            }
        }
        if for_peer && flight.started.is_some() {
            let at_home = flight.current.and_then(|id| self.requests.get(&id));
            // Two hosts take each other for the home: without this they would wait for each other.
            if at_home.is_some_and(|request| matches!(request.source, Source::Home(_))) {
                self.next_source(now, block, actions);
            }
        }
    }

    fn arrived(&mut self, now: Time, id: RequestId, outcome: Outcome, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.remove(&id) else { return };
        self.timers.remove(&(request.deadline, Timer::Deadline(id)));
        let block = request.block;
        if let Source::Peer(host) | Source::Home(host) = &request.source {
            self.swarm.answered(host);
            match outcome {
                Outcome::Verified => self.swarm.served(host, now.0.saturating_sub(request.asked.0)),
                Outcome::WrongHash => {
                    self.swarm.quarantine(host);
                    actions.push(Action::Report(Report::Liar { host: host.clone(), block }));
                }
                Outcome::NotHave => {
                    self.swarm.lacks(host, block);
                    if matches!(request.source, Source::Peer(_)) {
                        actions.push(Action::Report(Report::Stale { host: host.clone(), block }));
                    }
                }
                Outcome::Busy => self.swarm.busy(host, now),
                Outcome::Failed => self.swarm.failed(host, now),
            }
        }
        match (&request.source, outcome) {
            (Source::Cache, Outcome::WrongHash) => {
                actions.push(Action::Drop { block });
                actions.push(Action::Withdraw { block });
                actions.push(Action::Report(Report::Rot { block }));
            }
            (Source::Cache, Outcome::NotHave) => actions.push(Action::Withdraw { block }),
            (Source::Seed, Outcome::WrongHash) => {
                actions.push(Action::Report(Report::SeedCorrupt { block }));
            }
            _ => {}
        }
        let Some(flight) = self.flights.get_mut(&block) else { return };
        flight.late.retain(|late| *late != id);
        let was_current = flight.current == Some(id);
        if was_current {
            flight.current = None;
        }
        match (&request.source, outcome) {
            (_, Outcome::Verified) => {
                self.deliver(id, request, actions);
                return;
            }
            (Source::Seed, Outcome::WrongHash) => flight.why = Why::Corrupt,
            (Source::Peer(host) | Source::Home(host), Outcome::Busy) => {
                if matches!(request.source, Source::Home(_)) {
                    flight.homes = flight.homes.saturating_sub(1);
                }
                flight.busy.push(host.clone());
                flight.busy_since.get_or_insert(now);
            }
            _ => {}
        }
        if was_current {
            self.next_source(now, block, actions);
        }
    }

    fn deliver(&mut self, id: RequestId, request: Request, actions: &mut Vec<Action>) {
        let block = request.block;
        let Some(flight) = self.end(block, actions) else { return };
        let keep = match &request.source {
            Source::Cache => false,
            Source::Seed => true,
            Source::Peer(_) | Source::Home(_) => {
                flight.direct || flight.class == Class::Fill || self.fetched_often(block)
            }
        };
        actions.push(Action::Deliver {
            request: id,
            block,
            source: request.source,
            keep,
            waiters: flight.waiters,
        });
    }

    fn fetched_often(&mut self, block: u64) -> bool {
        let limit = self.config.keep_after_peer_fetches;
        if limit <= 1 {
            return true;
        }
        // The count is a hint about what is hot: starting over now and then costs a few fetches.
        if self.peer_fetches.len() >= self.config.counted_max && !self.peer_fetches.contains_key(&block) {
            self.peer_fetches.clear();
        }
        let count = self.peer_fetches.entry(block).or_insert(0);
        *count += 1;
        *count >= limit
    }

    /// Ends a flight: its other questions are cancelled.
    fn end(&mut self, block: u64, actions: &mut Vec<Action>) -> Option<Flight> {
        let flight = self.flights.remove(&block)?;
        for id in flight.late.iter().copied().chain(flight.current) {
            if let Some(request) = self.requests.remove(&id) {
                self.timers.remove(&(request.deadline, Timer::Deadline(id)));
                if let Source::Peer(host) | Source::Home(host) = &request.source {
                    self.swarm.answered(host);
                }
                actions.push(Action::Cancel { request: id });
            }
        }
        if let Some(at) = flight.retry_at {
            self.timers.remove(&(at, Timer::Retry(block)));
        }
        if flight.started.is_some() {
            self.asking[flight.class as usize] -= 1;
        } else {
            self.queue.remove(&(flight.class, flight.order, block));
        }
        Some(flight)
    }

    fn left(&mut self, now: Time, host: &HostId, actions: &mut Vec<Action>) {
        self.swarm.lost(host);
        let theirs: Vec<RequestId> = self
            .requests
            .iter()
            .filter(
                |(_, request)| matches!(&request.source, Source::Peer(at) | Source::Home(at) if at == host),
            )
            .map(|(id, _)| *id)
            .collect();
        for id in theirs {
            actions.push(Action::Cancel { request: id });
            self.arrived(now, id, Outcome::Failed, actions);
        }
    }

    fn fire_timers(&mut self, now: Time, actions: &mut Vec<Action>) {
        while let Some((at, timer)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.remove(&(at, timer));
            match timer {
                Timer::Retry(block) => {
                    if let Some(flight) = self.flights.get_mut(&block) {
                        flight.retry_at = None;
                        let busy = std::mem::take(&mut flight.busy);
                        flight.tried.retain(|host| !busy.contains(host));
                        self.next_source(now, block, actions);
                    }
                }
                Timer::Deadline(id) => {
                    let Some(request) = self.requests.get(&id) else { continue };
                    let block = request.block;
                    if let Source::Peer(host) | Source::Home(host) = &request.source {
                        self.swarm.failed(host, now);
                    }
                    if self.flights.get(&block).is_some_and(|flight| flight.current == Some(id)) {
                        self.next_source(now, block, actions);
                    }
                }
            }
        }
        if self.join_until.is_some_and(|until| until <= now) {
            self.join_until = None;
        }
    }

    fn start_queued(&mut self, now: Time, actions: &mut Vec<Action>) {
        let joining = self.join_until.is_some();
        let mut ready = Vec::new();
        let mut asking = self.asking;
        for (class, order, block) in &self.queue {
            let [demand, fill] = asking;
            let slots = match class {
                Class::Demand => self.config.demand_parallel.saturating_sub(demand),
                Class::Fill if demand > 0 => 1usize.saturating_sub(fill),
                Class::Fill => self.config.fill_parallel.saturating_sub(fill),
            };
            if slots == 0 {
                if *class == Class::Fill {
                    break;
                }
                continue;
            }
            let local = self.flights.get(block).is_some_and(|flight| flight.local);
            if joining && !local {
                continue;
            }
            asking[*class as usize] += 1;
            ready.push((*class, *order, *block));
        }
        for entry in ready {
            self.queue.remove(&entry);
            self.asking[entry.0 as usize] += 1;
            if let Some(flight) = self.flights.get_mut(&entry.2) {
                flight.started = Some(now);
            }
            self.next_source(now, entry.2, actions);
        }
    }

    /// Moves a flight on: the current question, if there is one, becomes a late one.
    fn next_source(&mut self, now: Time, block: u64, actions: &mut Vec<Action>) {
        let next = self.choose(now, block);
        let give_up = match self.flights.get_mut(&block) {
            Some(flight) => {
                flight.late.extend(flight.current.take());
                flight.started.unwrap_or(now).plus_ms(self.config.give_up_ms)
            }
            None => return,
        };
        match next {
            Next::Ask(source) => self.ask(now, block, source, give_up, actions),
            Next::Wait(until) => self.retry_at(until.min(give_up), block),
            Next::GiveUp if self.worth_waiting(now, block, give_up) => self.retry_at(give_up, block),
            Next::GiveUp => {
                if let Some(flight) = self.end(block, actions) {
                    let why = if now >= give_up { Why::TimedOut } else { flight.why };
                    actions.push(Action::Fail { block, waiters: flight.waiters, why });
                }
            }
        }
    }

    fn retry_at(&mut self, at: Time, block: u64) {
        let Some(flight) = self.flights.get_mut(&block) else { return };
        if let Some(earlier) = flight.retry_at.replace(at) {
            self.timers.remove(&(earlier, Timer::Retry(block)));
        }
        self.timers.insert((at, Timer::Retry(block)));
    }

    /// Nobody is left to ask, but somebody may still answer late.
    fn worth_waiting(&self, now: Time, block: u64, give_up: Time) -> bool {
        now < give_up && self.flights.get(&block).is_some_and(|flight| !flight.late.is_empty())
    }

    fn ask(&mut self, now: Time, block: u64, source: Source, give_up: Time, actions: &mut Vec<Action>) {
        self.counter += 1;
        let id = RequestId(self.counter);
        let limit_ms = match &source {
            Source::Cache => self.config.cache_ms,
            Source::Peer(_) => self.config.peer_ms,
            Source::Home(_) => self.config.home_ms,
            Source::Seed => self.config.seed_ms,
        };
        let deadline = now.plus_ms(limit_ms).min(give_up);
        if let Source::Peer(host) | Source::Home(host) = &source {
            self.swarm.asked(host);
        }
        self.timers.insert((deadline, Timer::Deadline(id)));
        self.requests.insert(id, Request { block, source: source.clone(), asked: now, deadline });
        if let Some(flight) = self.flights.get_mut(&block) {
            flight.current = Some(id);
        }
        actions.push(Action::Ask { request: id, block, source, deadline });
    }

    /// The order of sources: the heart of the read path.
    fn choose(&mut self, now: Time, block: u64) -> Next {
        let Some(flight) = self.flights.get_mut(&block) else { return Next::GiveUp };
        let give_up = flight.started.unwrap_or(now).plus_ms(self.config.give_up_ms);
        if now >= give_up {
            return Next::GiveUp;
        }
        if std::mem::take(&mut flight.local) {
            return Next::Ask(Source::Cache);
        }
        loop {
            let holders = self.swarm.holders(block, now, flight.last_pass);
            if let Some(host) = holders.into_iter().find(|host| !flight.tried.contains(host)) {
                flight.tried.push(host.clone());
                return Next::Ask(Source::Peer(host));
            }
            if flight.last_pass {
                return Next::GiveUp;
            }
            let waited_ms = flight.busy_since.map_or(0, |since| now.since_ms(since));
            if !flight.busy.is_empty() && waited_ms < self.config.busy_ms_max {
                return Next::Wait(now.plus_ms(self.config.busy_ms));
            }
            if !flight.direct && !flight.seed_tried && flight.homes < self.config.homes_max {
                let homes = self.swarm.homes_before_me(block, now);
                if let Some(host) = homes.into_iter().find(|host| !flight.tried.contains(host)) {
                    flight.tried.push(host.clone());
                    flight.homes += 1;
                    return Next::Ask(Source::Home(host));
                }
            }
            if !flight.seed_tried {
                flight.seed_tried = true;
                return Next::Ask(Source::Seed);
            }
            // Nothing is left but those that failed us before.
            flight.last_pass = true;
            flight.tried.clear();
        }
    }
}

#[cfg(test)]
mod test;
