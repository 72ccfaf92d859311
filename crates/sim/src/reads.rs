//! What a host's agent is to the image read path: asks caches, peers and the seed as the engine says, checks hashes,
//! keeps and advertises blocks.
//!
//! A block's bytes are one number; its hash is right if the number is. One host may lie about what it serves, disks
//! may rot, the seed may be away. Rules: a reader gets the right bytes or an error that the seed's absence explains;
//! everybody is answered; an honest host never sends wrong bytes.
//!
//! Not here: where a block is looked for (`engine::image::read`, run unchanged).

use std::collections::BTreeMap;

use whimbrel_engine::image::read::{
    Action, Class, Config, Event, Outcome, Reads, Report, RequestId, Source, Waiter,
};
use whimbrel_wire::peer::block::{Bitmap, Run};
use whimbrel_wire::{ImageId, Time};

use crate::plant::Plant;
use crate::rng::Rng;
use crate::world::{HostIx, What as Any, World};

/// Blocks of the image.
const BLOCKS: u64 = 20;
const IMAGE: ImageId = ImageId([7; 32]);
/// The engine gives up by then, and a failure may be explained by a seed that was away so long ago.
const GIVE_UP_MS: u64 = 60_000;

/// The right bytes of a block.
fn right(block: u64) -> u64 {
    block * 7_919 + 13
}

/// The seed store, and the one host that may lie.
#[derive(Debug)]
pub struct Seed {
    down: bool,
    /// When it was last away or damaged.
    trouble: Option<Time>,
    corrupt: Option<u64>,
    liar: Option<HostIx>,
    lies: u64,
    busy: u64,
}

impl Seed {
    /// A seed, and perhaps a liar, of a run's own.
    pub fn new(hosts: usize, rng: &mut Rng) -> Self {
        Self {
            down: false,
            trouble: None,
            corrupt: rng.permille(100).then(|| rng.below(BLOCKS)),
            liar: rng.permille(400).then(|| rng.index(hosts)),
            lies: rng.between(50, 900),
            busy: if rng.permille(300) { rng.below(200) } else { 0 },
        }
    }

    /// It goes away or comes back.
    pub fn set_down(&mut self, down: bool, now: Time) {
        self.down = down;
        self.trouble = Some(now);
    }

    /// Everything that can be repaired is.
    pub fn calm(&mut self, now: Time) {
        if self.down || self.corrupt.is_some() {
            self.trouble = Some(now);
        }
        self.down = false;
        self.corrupt = None;
        self.busy = 0;
    }

    fn explains_failure(&self, now: Time) -> bool {
        let recent = self.trouble.is_some_and(|at| now <= at.plus_ms(GIVE_UP_MS + 1_000));
        self.down || self.corrupt.is_some() || recent
    }
}

/// The cache's files: blocks as they were written.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    blocks: BTreeMap<u64, u64>,
    /// Written since power was last lost, and perhaps not on the disk.
    fresh: Vec<u64>,
}

impl Cache {
    /// The newest writes are gone.
    pub fn lose_power(&mut self) {
        for block in self.fresh.drain(..) {
            self.blocks.remove(&block);
        }
    }

    fn bitmap(&self) -> Bitmap {
        let mut has = Bitmap::new(BLOCKS);
        for block in self.blocks.keys() {
            has.insert(*block);
        }
        has
    }
}

/// Who waits for a block.
#[derive(Clone, Copy, Debug)]
enum Wait {
    /// A reader on this host, of which block.
    Local(u64),
    /// Another host: which, its incarnation and its question.
    Remote(HostIx, u64, RequestId),
}

/// The read path in an agent's memory.
#[derive(Debug)]
pub struct Reader {
    machine: Reads,
    waiting: BTreeMap<Waiter, Wait>,
    arrived: BTreeMap<RequestId, u64>,
    wake: Option<Time>,
}

impl Reader {
    /// Nobody waits.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// Answer to a question.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Bytes, not yet checked.
    Bytes(u64),
    /// Not there.
    NotHave,
    /// Ask later.
    Busy,
    /// No answer, or an error.
    Failed,
}

/// An event.
#[derive(Clone, Debug)]
pub enum What {
    /// The machine's deadline.
    Wake(HostIx, u64),
    /// Somebody reads.
    Client,
    /// Everybody reads everything: faults are over.
    ReadAll,
    /// An answer comes: to whom, question, block, whether from another host.
    Answered(HostIx, u64, RequestId, u64, Answer, bool),
    /// A question of another host comes.
    Called { from: HostIx, life: u64, to: HostIx, request: RequestId, block: u64, home: bool },
    /// A block is in the cache's files.
    Kept(HostIx, u64, u64, u64),
    /// A peer tells what it has.
    Hello(HostIx, HostIx, Bitmap),
    /// A peer tells what has changed.
    Changed(HostIx, HostIx, Option<u64>, Option<u64>),
    /// A peer is gone.
    Left(HostIx, HostIx),
    /// Everybody has been asked for a bitmap.
    Joined(HostIx, u64),
}

impl World {
    pub(crate) fn new_reader(&self, host: HostIx) -> Reader {
        let me = self.hosts[host].name.clone();
        let config = Config { keep_after_peer_fetches: 2, ..Config::default() };
        Reader {
            machine: Reads::new(config, IMAGE, me, BLOCKS, self.now),
            waiting: BTreeMap::new(),
            arrived: BTreeMap::new(),
            wake: None,
        }
    }

    pub(crate) fn plan_reads(&mut self) {
        self.after_ms(50, Any::Reads(What::Client));
        let late = Time(crate::faults::CALM.0 + (GIVE_UP_MS + 3_000) * 1_000_000);
        self.at(late, Any::Reads(What::ReadAll));
    }

    /// An agent that starts tells the others what it has, and asks them.
    pub(crate) fn join_swarm(&mut self, host: HostIx) {
        let mine = self.hosts[host].cache.bitmap();
        for other in 0..self.hosts.len() {
            if other == host || !self.agent_up(other) || !self.net.reachable(host, other) {
                continue;
            }
            let theirs = self.hosts[other].cache.bitmap();
            self.after_us(500, 20_000, Any::Reads(What::Hello(other, host, theirs)));
            self.after_us(500, 20_000, Any::Reads(What::Hello(host, other, mine.clone())));
        }
        let life = self.hosts[host].life;
        self.after_ms(25, Any::Reads(What::Joined(host, life)));
    }

    /// The others notice that an agent is gone.
    pub(crate) fn left_swarm(&mut self, host: HostIx) {
        for other in 0..self.hosts.len() {
            if other != host && self.agent_up(other) {
                self.after_us(1_000, 400_000, Any::Reads(What::Left(host, other)));
            }
        }
    }

    /// A cached block changes on disk.
    pub(crate) fn rot(&mut self, host: HostIx) {
        let count = self.hosts[host].cache.blocks.len();
        let which = self.rng.index(count);
        if let Some(bytes) = self.hosts[host].cache.blocks.values_mut().nth(which) {
            *bytes ^= 1 << 50;
        }
    }

    pub(crate) fn on_reads(&mut self, what: What) {
        match what {
            What::Wake(host, life) => {
                let now = self.now;
                if let Some(agent) = self.agent(host, life) {
                    if agent.reader.wake.is_some_and(|at| at <= now) {
                        agent.reader.wake = None;
                    }
                    self.reads_event(host, Event::Tick);
                }
            }
            What::Client => self.on_client(),
            What::ReadAll => {
                for host in 0..self.hosts.len() {
                    for block in 0..BLOCKS {
                        self.want(host, block, Class::Demand);
                    }
                }
            }
            What::Answered(host, life, request, block, answer, peer) => {
                if self.agent(host, life).is_some() {
                    self.on_answer(host, request, block, answer, peer);
                }
            }
            What::Called { from, life, to, request, block, home } => {
                self.on_called(from, life, to, request, block, home);
            }
            What::Kept(host, life, block, bytes) => {
                if self.agent(host, life).is_some() {
                    self.hosts[host].cache.blocks.insert(block, bytes);
                    self.hosts[host].cache.fresh.push(block);
                    self.reads_event(host, Event::Kept { block });
                }
            }
            What::Hello(from, to, has) => {
                let host = self.hosts[from].name.clone();
                self.reads_event(to, Event::Hello { host, has });
            }
            What::Changed(from, to, here, gone) => {
                let host = self.hosts[from].name.clone();
                let run =
                    |block: Option<u64>| block.map(|first| Run { first, count: 1 }).into_iter().collect();
                self.reads_event(to, Event::Changed { host, here: run(here), gone: run(gone) });
            }
            What::Left(host, to) => {
                let host = self.hosts[host].name.clone();
                self.reads_event(to, Event::Left { host });
            }
            What::Joined(host, life) => {
                if self.agent(host, life).is_some() {
                    self.reads_event(host, Event::Joined);
                }
            }
        }
    }

    fn on_client(&mut self) {
        let host = self.rng.index(self.hosts.len());
        let block = self.rng.below(BLOCKS);
        let class = if self.rng.permille(150) { Class::Fill } else { Class::Demand };
        self.want(host, block, class);
        if self.rng.permille(100) {
            // Evicted.
            let block = self.rng.below(BLOCKS);
            if self.hosts[host].cache.blocks.remove(&block).is_some() {
                self.reads_event(host, Event::Lost { block });
            }
        }
        if !self.calm {
            self.after_us(20_000, 300_000, Any::Reads(What::Client));
        }
    }

    fn want(&mut self, host: HostIx, block: u64, class: Class) {
        let waiter = self.new_id();
        let local = self.hosts[host].cache.blocks.contains_key(&block);
        let Some(agent) = &mut self.hosts[host].agent else { return };
        agent.reader.waiting.insert(waiter, Wait::Local(block));
        self.reads_event(host, Event::Want { block, waiter, class, local, for_peer: false });
    }

    fn reads_event(&mut self, host: HostIx, event: Event) {
        let now = self.now;
        let Some(agent) = &mut self.hosts[host].agent else { return };
        let mut actions = Vec::new();
        agent.reader.machine.step(now, event, &mut actions);
        for action in actions {
            self.reads_action(host, action);
        }
        let life = self.hosts[host].life;
        let Some(agent) = &mut self.hosts[host].agent else { return };
        let Some(at) = agent.reader.machine.next_wake() else { return };
        let at = at.max(Time(now.0 + 1_000));
        if agent.reader.wake.is_none_or(|queued| at < queued) {
            agent.reader.wake = Some(at);
            self.at(at, Any::Reads(What::Wake(host, life)));
        }
    }

    fn reads_action(&mut self, host: HostIx, action: Action) {
        let life = self.hosts[host].life;
        match action {
            Action::Ask { request, block, source, .. } => self.ask(host, life, request, block, &source),
            Action::Cancel { request } => {
                if let Some(agent) = &mut self.hosts[host].agent {
                    agent.reader.arrived.remove(&request);
                }
            }
            Action::Deliver { request, block, keep, waiters, .. } => {
                let Some(agent) = &mut self.hosts[host].agent else { return };
                let Some(bytes) = agent.reader.arrived.remove(&request) else {
                    return self.fail(format!("h{host} delivers block {block}, of which no bytes have come"));
                };
                for waiter in waiters {
                    self.deliver(host, waiter, block, Answer::Bytes(bytes));
                }
                if keep {
                    self.after_us(300, 15_000, Any::Reads(What::Kept(host, life, block, bytes)));
                }
            }
            Action::Fail { block, waiters, why } => {
                if !self.seed.explains_failure(self.now) {
                    self.fail(format!(
                        "h{host} cannot read block {block} ({why:?}) though the seed is there"
                    ));
                }
                for waiter in waiters {
                    self.deliver(host, waiter, block, Answer::Failed);
                }
            }
            Action::Drop { block } => {
                self.hosts[host].cache.blocks.remove(&block);
            }
            Action::Advertise { block } => self.tell_peers(host, Some(block), None),
            Action::Withdraw { block } => self.tell_peers(host, None, Some(block)),
            Action::Report(Report::Liar { host: liar, block }) => {
                let ix = self.host_ix(&liar);
                if self.seed.liar != Some(ix) {
                    self.fail(format!(
                        "{liar}, which is honest, sent wrong bytes of block {block} to h{host}"
                    ));
                }
            }
            Action::Report(_) => {}
        }
    }

    fn deliver(&mut self, host: HostIx, waiter: Waiter, block: u64, answer: Answer) {
        let Some(agent) = &mut self.hosts[host].agent else { return };
        match (agent.reader.waiting.remove(&waiter), answer) {
            (None, _) => self.fail(format!("h{host}: waiter {waiter} of block {block} is answered twice")),
            (Some(Wait::Local(wanted)), Answer::Bytes(bytes)) => {
                self.tally.reads += 1;
                if wanted != block || bytes != right(block) {
                    self.fail(format!("h{host} reads block {wanted}: wrong bytes"));
                }
            }
            (Some(Wait::Local(_)), _) => {}
            (Some(Wait::Remote(to, life, request)), answer) => {
                self.reply(host, to, life, request, block, answer);
            }
        }
    }

    fn tell_peers(&mut self, host: HostIx, here: Option<u64>, gone: Option<u64>) {
        for other in 0..self.hosts.len() {
            if other != host && self.agent_up(other) && self.net.reachable(host, other) {
                self.after_us(500, 20_000, Any::Reads(What::Changed(host, other, here, gone)));
            }
        }
    }

    fn ask(&mut self, host: HostIx, life: u64, request: RequestId, block: u64, source: &Source) {
        let answered = |answer, peer| Any::Reads(What::Answered(host, life, request, block, answer, peer));
        match source {
            Source::Cache => {
                let bytes = self.hosts[host].cache.blocks.get(&block).copied();
                self.after_us(50, 2_000, answered(bytes.map_or(Answer::NotHave, Answer::Bytes), false));
            }
            Source::Seed => {
                if self.seed.down {
                    if self.rng.permille(500) {
                        self.after_us(1_000, 300_000, answered(Answer::Failed, false));
                    }
                    return;
                }
                let bytes = right(block) ^ if self.seed.corrupt == Some(block) { 1 << 40 } else { 0 };
                self.after_us(3_000, 80_000, answered(Answer::Bytes(bytes), false));
            }
            Source::Peer(to) | Source::Home(to) => {
                let home = matches!(source, Source::Home(_));
                let to = self.host_ix(to);
                if !self.agent_up(to) || !self.net.reachable(host, to) {
                    if self.rng.permille(700) {
                        self.after_us(500, 50_000, answered(Answer::Failed, true));
                    }
                    return;
                }
                if let Some((at, _)) = self.net.control(self.now, host, to, &mut self.rng) {
                    self.at(at, Any::Reads(What::Called { from: host, life, to, request, block, home }));
                }
            }
        }
    }

    fn on_called(&mut self, from: HostIx, life: u64, to: HostIx, request: RequestId, block: u64, home: bool) {
        if !self.agent_up(to) {
            return;
        }
        if self.rng.permille(self.seed.busy) {
            return self.reply(to, from, life, request, block, Answer::Busy);
        }
        let bytes = self.hosts[to].cache.blocks.get(&block).copied();
        if home {
            let waiter = self.new_id();
            if let Some(agent) = &mut self.hosts[to].agent {
                agent.reader.waiting.insert(waiter, Wait::Remote(from, life, request));
            }
            let local = bytes.is_some();
            self.reads_event(to, Event::Want { block, waiter, class: Class::Demand, local, for_peer: true });
            return;
        }
        let trusted = self.plant == Some(Plant::OfferUnverifiedBlock);
        let answer = match bytes {
            Some(bytes) if bytes == right(block) || trusted => Answer::Bytes(bytes),
            Some(_) => {
                self.hosts[to].cache.blocks.remove(&block);
                self.reads_event(to, Event::Lost { block });
                Answer::NotHave
            }
            None => Answer::NotHave,
        };
        self.reply(to, from, life, request, block, answer);
    }

    fn reply(&mut self, host: HostIx, to: HostIx, life: u64, request: RequestId, block: u64, answer: Answer) {
        let answer = match answer {
            Answer::Bytes(_) if self.seed.liar == Some(host) && self.rng.permille(self.seed.lies) => {
                Answer::Bytes(right(block) ^ (1 << 45))
            }
            other => other,
        };
        if let Some((at, _)) = self.net.control(self.now, host, to, &mut self.rng) {
            self.at(at, Any::Reads(What::Answered(to, life, request, block, answer, true)));
        }
    }

    fn on_answer(&mut self, host: HostIx, request: RequestId, block: u64, answer: Answer, peer: bool) {
        let outcome = match answer {
            Answer::Bytes(bytes) => {
                if peer && self.plant == Some(Plant::OfferUnverifiedBlock) {
                    self.hosts[host].cache.blocks.insert(block, bytes);
                    self.tell_peers(host, Some(block), None);
                }
                let unchecked = peer && self.plant == Some(Plant::AcceptWrongHash);
                if let Some(agent) = &mut self.hosts[host].agent {
                    agent.reader.arrived.insert(request, bytes);
                }
                if bytes == right(block) || unchecked { Outcome::Verified } else { Outcome::WrongHash }
            }
            Answer::NotHave => Outcome::NotHave,
            Answer::Busy => Outcome::Busy,
            Answer::Failed => Outcome::Failed,
        };
        self.reads_event(host, Event::Arrived { request, outcome });
        if let Some(agent) = &mut self.hosts[host].agent {
            agent.reader.arrived.remove(&request);
        }
    }

    /// The last reads have been made and answered.
    pub(crate) fn reads_done(&self) -> bool {
        self.now.0 > crate::faults::CALM.0 + (GIVE_UP_MS + 4_000) * 1_000_000
    }

    /// Somebody still waits for a block, long after faults have ended.
    pub(crate) fn reads_broken(&self) -> Option<String> {
        self.hosts.iter().enumerate().find_map(|(ix, host)| {
            let waiting = host.agent.as_ref()?.reader.waiting.values().next()?;
            Some(format!("h{ix}: nobody answered {waiting:?}"))
        })
    }
}
