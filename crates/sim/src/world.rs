//! The world: hosts, agents, network, store, guest, one queue of events in virtual time.
//!
//! ```text
//!  queue ──► handle ──► moves   engine's Source and Target      ──► actions ──► store, net, copies
//!                  ├──► stream  frames of memory and disk
//!                  ├──► reads   engine's Reads
//!                  ├──► guest   instructions, I/O, flushes
//!                  └──► faults  crashes, cuts, outages ──► later: restarts, heals
//!  after every event: check
//! ```
//!
//! What survives: a host that loses power keeps journals (synced entries), layers (durable part) and cached blocks
//! (written ones); an agent that crashes leaves QEMU, RAM files and the page cache too. Everything else is in
//! [`Agent`] and is gone with it.
//!
//! Invariant: nothing here depends on anything but the seed and the plant; one thread, ordered maps, own generator.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use whimbrel_engine::migrate::handover::{Cas, CasResult, SourceWork, TargetWork};
use whimbrel_engine::migrate::handover::{JournalEntry, ReqId, Seen, Source, Target, ToSource, ToTarget};
use whimbrel_wire::id::VmId;
use whimbrel_wire::meta::{VmRecord, VmSpec, VmState, VolumeRecord};
use whimbrel_wire::{DataId, DiskId, Epoch, HostId, Name, Object, Right, Time, WireError};

use crate::faults::{Fault, Rates};
use crate::guest::{Copy, CopyId, Io, Layer, Truth};
use crate::net::Net;
use crate::plant::Plant;
use crate::reads::{self, Cache, Reader};
use crate::rng::Rng;
use crate::store::Store;
use crate::stream::{Frame, Stream};
use crate::trace::Trace;

/// A host's place in [`World::hosts`].
pub type HostIx = usize;
/// An attempt's number; its [`AttemptId`](whimbrel_wire::AttemptId) is the same number.
pub type Attempt = u64;

/// Work that an agent has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// For a source.
    Source(SourceWork),
    /// For a target.
    Target(TargetWork),
}

/// A control message.
#[derive(Clone, Debug)]
pub enum Message {
    /// To the target of an attempt.
    ToTarget(ToTarget),
    /// To its source.
    ToSource(ToSource),
}

/// Answer of the store.
#[derive(Clone, Debug)]
pub enum Answer {
    /// To a read.
    Seen(Box<Seen>),
    /// To a failed read.
    Failed(WireError),
    /// To a change.
    Cas(CasResult),
}

/// Who asked the store.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// Host.
    pub host: HostIx,
    /// Incarnation of its agent.
    pub life: u64,
    /// The attempt whose machine asked.
    pub attempt: Attempt,
    /// The machine's number for the request.
    pub id: ReqId,
}

/// An event.
#[derive(Clone, Debug)]
pub enum What {
    /// A machine's deadline.
    Wake(HostIx, u64, Attempt),
    /// A control message arrives.
    Control { from: HostIx, to: HostIx, connection: u64, attempt: Attempt, message: Message },
    /// A request reaches the store.
    StoreArrives(Asker, Option<Box<Cas>>),
    /// An answer comes back.
    StoreAnswers(Asker, Answer),
    /// The watch tells an agent of a change.
    Hint(HostIx, u64),
    /// Work is done.
    Work(HostIx, u64, u64),
    /// A frame of memory or disk arrives.
    Frame(Frame),
    /// Its acknowledgement arrives.
    Ack(Frame),
    /// A stream looks for something to send.
    Pump(HostIx, u64, Attempt),
    /// The guest's next instructions.
    Guest,
    /// A disk write is done.
    IoDone(HostIx, CopyId, Io),
    /// A flush is done: blocks as they were when it began.
    FlushDone(HostIx, CopyId, u64, Vec<u64>),
    /// Blocks become durable on their own (only with a planted mistake).
    Persist(HostIx, CopyId, Vec<u64>),
    /// Something breaks, or is repaired.
    Fault(Fault),
    /// Somebody starts a move.
    Move,
    /// Agents look for a VM that is theirs and has no QEMU.
    Supervise,
    /// Whether a paused guest waits too long.
    Watchdog,
    /// Of the read path.
    Reads(reads::What),
}

struct Queued {
    at: Time,
    order: u64,
    what: What,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What an agent keeps in memory only.
pub struct Agent {
    /// Moves from here.
    pub sources: BTreeMap<Attempt, Source>,
    /// Moves to here.
    pub targets: BTreeMap<Attempt, Target>,
    /// Streams of moves from here.
    pub streams: BTreeMap<Attempt, Stream>,
    /// Work under way: number, attempt, what.
    pub works: Vec<(u64, Attempt, Work)>,
    /// The image's read path.
    pub reader: Reader,
    /// When each machine's next wake-up is queued.
    pub wakes: BTreeMap<Attempt, Time>,
    /// When the store last answered.
    pub store_answered: Option<Time>,
    /// Guests that this agent has let run; one that starts later cannot know.
    pub let_go: BTreeSet<Attempt>,
    /// Moves from here whose layer it hands out (`--disk on-demand`).
    pub serves: BTreeSet<Attempt>,
}

/// A host.
pub struct Host {
    /// Its name.
    pub name: HostId,
    /// It has power.
    pub powered: bool,
    /// Nobody will start its agent again.
    pub gone: bool,
    /// Its agent, while it runs.
    pub agent: Option<Agent>,
    /// Counts the agent's starts.
    pub life: u64,
    /// Newest journal entry of each attempt, and the newest that survives the loss of power.
    pub journal: BTreeMap<Attempt, (JournalEntry, Option<JournalEntry>)>,
    /// Copies of the guest.
    pub copies: BTreeMap<CopyId, Copy>,
    /// The copy that an attempt is about.
    pub copy_of: BTreeMap<Attempt, CopyId>,
    /// The image cache's files.
    pub cache: Cache,
}

/// What a run was like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Events handled.
    pub events: u64,
    /// Moves begun.
    pub moves: u64,
    /// Commits.
    pub commits: u64,
    /// Rights handed back.
    pub hand_backs: u64,
    /// Times the guest went on at the source after a move failed or was cancelled.
    pub undone: u64,
    /// Agents that went on from a journal.
    pub recoveries: u64,
    /// Faults injected.
    pub faults: u64,
    /// Times the operator had to act.
    pub operator: u64,
    /// Blocks read.
    pub reads: u64,
    /// Blocks of its disk that the guest read while they were at another host (`--disk on-demand`).
    pub remote_reads: u64,
    /// Layers fetched to their last block.
    pub pulls: u64,
}

impl Tally {
    /// Adds another run's numbers.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.moves += other.moves;
        self.commits += other.commits;
        self.hand_backs += other.hand_backs;
        self.undone += other.undone;
        self.recoveries += other.recoveries;
        self.faults += other.faults;
        self.operator += other.operator;
        self.reads += other.reads;
        self.remote_reads += other.remote_reads;
        self.pulls += other.pulls;
    }
}

/// See the module's charter.
pub struct World {
    /// Now.
    pub now: Time,
    /// The run's chance.
    pub rng: Rng,
    /// What happened.
    pub trace: Trace,
    /// The planted mistake.
    pub plant: Option<Plant>,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Between them.
    pub net: Net,
    /// The metadata store.
    pub store: Store,
    /// The seed store of images.
    pub seed: reads::Seed,
    /// The one guest.
    pub truth: Truth,
    /// How much goes wrong.
    pub rates: Rates,
    /// No more faults.
    pub calm: bool,
    /// The first rule that was broken.
    pub violation: Option<String>,
    /// Data was lost with a host that never came back: nothing more can be asked of the guest.
    pub excused: bool,
    /// Numbers.
    pub tally: Tally,
    pub(crate) next_id: u64,
    /// Moves begun when nothing was broken any more.
    pub(crate) must_succeed: BTreeSet<Attempt>,
    /// Since when two hosts cannot hear each other, by ordered pair.
    pub(crate) unheard_since: BTreeMap<(HostIx, HostIx), Time>,
}

/// The VM's name.
pub fn vm_name() -> Name {
    name("web-1")
}

/// A name that is known to be good.
pub fn name(text: &str) -> Name {
    match text.parse() {
        Ok(name) => name,
        // Only literals and "hN" come here.
        Err(_) => unreachable!("{text} is a name"),
    }
}

impl World {
    /// A world of a seed's own making.
    pub fn new(seed: u64, plant: Option<Plant>, keep_trace: bool) -> Self {
        let mut rng = Rng::new(seed, 1);
        let count = usize::try_from(rng.between(2, 4)).unwrap_or(2);
        let net = Net::new(count, &mut rng);
        let rates = Rates::new(&mut rng);
        let hosts: Vec<Host> = (0..count)
            .map(|ix| Host {
                name: name(&format!("h{ix}")),
                powered: true,
                gone: false,
                agent: None,
                life: 0,
                journal: BTreeMap::new(),
                copies: BTreeMap::new(),
                copy_of: BTreeMap::new(),
                cache: Cache::default(),
            })
            .collect();
        let volume = name("disk-1");
        let right = |object| Right { object, holder: name("h0"), epoch: Epoch(1) };
        let vm = VmRecord {
            name: vm_name(),
            right: right(Object::Memory(VmId(uuid::Uuid::nil()))),
            state: VmState::Running,
            spec: VmSpec { volumes: vec![volume.clone()], ..VmSpec::default() },
            attempt: None,
            came_by: None,
            waiting_for: None,
        };
        let disk = DiskId(uuid::Uuid::nil());
        let volume = VolumeRecord {
            name: volume,
            disk_id: disk,
            data_id: DataId(uuid::Uuid::nil()),
            size_bytes: 0,
            image: None,
            layers: Vec::new(),
            right: right(Object::Layer(disk)),
            attached_to: Some(vm_name()),
            depends_on: None,
            limits: Default::default(),
        };
        let seed = reads::Seed::new(count, &mut rng);
        let mut world = Self {
            now: Time(0),
            rng,
            trace: Trace::new(keep_trace),
            plant,
            queue: BinaryHeap::new(),
            order: 0,
            hosts,
            net,
            store: Store::new(vm, volume),
            seed,
            truth: Truth::new(),
            rates,
            calm: false,
            violation: None,
            excused: false,
            tally: Tally::default(),
            next_id: 0,
            must_succeed: BTreeSet::new(),
            unheard_since: BTreeMap::new(),
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let id = self.new_id();
        self.hosts[0].copies.insert(id, Copy::booted(id, Layer::new(), 0, 1));
        for host in 0..self.hosts.len() {
            self.start_agent(host);
        }
        self.after_ms(1, What::Guest);
        let first_ms = self.rng.between(300, 1_500);
        self.after_ms(first_ms, What::Move);
        self.after_ms(500, What::Supervise);
        self.after_ms(100, What::Watchdog);
        self.plan_faults();
        self.plan_reads();
    }

    // ---- queue --------------------------------------------------------------------------------------------------

    /// A number that nothing else has.
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Lets something happen at a time.
    pub fn at(&mut self, at: Time, what: What) {
        self.order += 1;
        self.queue.push(Reverse(Queued { at: at.max(self.now), order: self.order, what }));
    }

    /// Lets something happen some milliseconds from now.
    pub fn after_ms(&mut self, ms: u64, what: What) {
        self.at(self.now.plus_ms(ms), what);
    }

    /// Lets something happen between `low` and `high` microseconds from now.
    pub fn after_us(&mut self, low: u64, high: u64, what: What) {
        let us = self.rng.between(low, high);
        self.at(Time(self.now.0 + us * 1000), what);
    }

    /// Writes a line into the trace.
    pub fn note(&mut self, words: std::fmt::Arguments<'_>) {
        self.trace.line(self.now, words);
    }

    /// A rule was broken.
    pub fn fail(&mut self, words: String) {
        self.note(format_args!("BROKEN: {words}"));
        self.violation.get_or_insert(words);
    }

    /// Runs until `until`, or until a rule is broken, or until `done` says so.
    pub fn run(&mut self, until: Time, done: impl Fn(&Self) -> bool) {
        while self.violation.is_none() {
            match self.queue.peek() {
                Some(Reverse(next)) if next.at <= until => {}
                _ => break,
            }
            let Some(Reverse(next)) = self.queue.pop() else { break };
            self.now = next.at;
            self.tally.events += 1;
            self.trace.mix(next.at, &[next.order]);
            let look = matches!(next.what, What::Supervise);
            self.handle(next.what);
            if look && done(self) {
                return;
            }
        }
        self.now = self.now.max(until);
    }

    fn handle(&mut self, what: What) {
        match what {
            What::Wake(host, life, attempt) => self.on_wake(host, life, attempt),
            What::Control { from, to, connection, attempt, message } => {
                if self.net.same_connection(from, to, connection) {
                    self.on_control(from, to, attempt, message);
                }
            }
            What::StoreArrives(asker, cas) => self.on_store_arrives(asker, cas),
            What::StoreAnswers(asker, answer) => self.on_store_answers(asker, answer),
            What::Hint(host, life) => self.on_hint(host, life),
            What::Work(host, life, id) => self.on_work(host, life, id),
            What::Frame(frame) => self.on_frame(&frame),
            What::Ack(frame) => self.on_ack(&frame),
            What::Pump(host, life, attempt) => self.on_pump(host, life, attempt),
            What::Guest => self.on_guest(),
            What::IoDone(host, copy, io) => self.on_io_done(host, copy, io),
            What::FlushDone(host, copy, token, blocks) => self.on_flush_done(host, copy, token, &blocks),
            What::Persist(host, copy, blocks) => {
                let host = &mut self.hosts[host];
                if let Some(copy) = host.copies.get_mut(&copy)
                    && host.powered
                {
                    copy.layer.persist(&blocks);
                }
            }
            What::Fault(fault) => self.on_fault(fault),
            What::Move => self.on_move(),
            What::Supervise => self.on_supervise(),
            What::Watchdog => self.on_watchdog(),
            What::Reads(what) => self.on_reads(what),
        }
    }

    // ---- agents -------------------------------------------------------------------------------------------------

    /// The agent of a host, if this incarnation of it still runs.
    pub fn agent(&mut self, host: HostIx, life: u64) -> Option<&mut Agent> {
        let host = &mut self.hosts[host];
        if host.life == life { host.agent.as_mut() } else { None }
    }

    /// Whether the agent runs.
    pub fn agent_up(&self, host: HostIx) -> bool {
        self.hosts[host].agent.is_some()
    }

    /// A host by its name.
    pub fn host_ix(&self, name: &HostId) -> HostIx {
        self.hosts.iter().position(|host| host.name == *name).unwrap_or(0)
    }

    /// Starts an agent: it goes on from its journals.
    pub fn start_agent(&mut self, host: HostIx) {
        if self.hosts[host].agent.is_some() || !self.hosts[host].powered {
            return;
        }
        self.hosts[host].life += 1;
        let reader = self.new_reader(host);
        self.hosts[host].agent = Some(Agent {
            sources: BTreeMap::new(),
            targets: BTreeMap::new(),
            streams: BTreeMap::new(),
            works: Vec::new(),
            reader,
            wakes: BTreeMap::new(),
            store_answered: None,
            let_go: BTreeSet::new(),
            serves: BTreeSet::new(),
        });
        self.note(format_args!("h{host}: agent starts"));
        self.submit_io(host);
        self.recover_moves(host);
        self.join_swarm(host);
        self.heard_changed();
    }

    /// An agent is killed.
    pub fn crash_agent(&mut self, host: HostIx) {
        let Some(agent) = self.hosts[host].agent.take() else { return };
        self.note(format_args!("h{host}: agent killed"));
        // What it had started may have had its effect, without anybody knowing.
        for (_, attempt, work) in agent.works {
            if self.rng.permille(500) {
                let _ = self.effect(host, attempt, work);
            }
        }
        for other in 0..self.hosts.len() {
            if other != host {
                self.net.reset(host, other);
            }
        }
        self.left_swarm(host);
        self.heard_changed();
    }

    /// A host loses power.
    pub fn cut_power(&mut self, host: HostIx) {
        if !self.hosts[host].powered {
            return;
        }
        self.note(format_args!("h{host}: power lost"));
        let agent = self.hosts[host].agent.take();
        let it = &mut self.hosts[host];
        it.powered = false;
        for copy in it.copies.values_mut() {
            copy.lose_power();
        }
        it.journal.retain(|_, (current, durable)| match durable {
            Some(entry) => {
                *current = entry.clone();
                true
            }
            None => false,
        });
        it.cache.lose_power();
        if agent.is_some() {
            for other in 0..self.hosts.len() {
                if other != host {
                    self.net.reset(host, other);
                }
            }
            self.left_swarm(host);
        }
        self.heard_changed();
    }

    /// Power comes back, and with it the agent.
    pub fn restore(&mut self, host: HostIx) {
        if self.hosts[host].gone {
            return;
        }
        self.hosts[host].powered = true;
        self.start_agent(host);
    }

    /// Keeps account of who can hear whom, after anything that changes it.
    pub fn heard_changed(&mut self) {
        for a in 0..self.hosts.len() {
            for b in 0..self.hosts.len() {
                let heard = a != b && self.agent_up(b) && self.net.reachable(a, b);
                if heard {
                    self.unheard_since.remove(&(a, b));
                } else {
                    self.unheard_since.entry((a, b)).or_insert(self.now);
                }
            }
        }
    }
}
