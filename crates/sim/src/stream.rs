//! Memory and disk on their way: frames with versions over two links, sent again until acknowledged.
//!
//! A frame that is not acknowledged is sent again over the other link, and the first one may still arrive, later
//! than a newer version of the same page: that is what versions are for. It may even arrive after the guest has
//! resumed: that is what the epoch in the frame is for.

use whimbrel_engine::migrate::handover::{Event, SourceWork};
use whimbrel_wire::Time;
use whimbrel_wire::api::DiskMove;

use crate::guest::{BLOCKS, CopyState, Io, PAGES};
use crate::net::LINKS;
use crate::plant::Plant;
use crate::world::{Attempt, HostIx, What, Work, World};

/// Sent again after this long without an acknowledgement.
const AGAIN_MS: u64 = 120;
/// Frames per pump.
const BURST: usize = 10;
/// The rest that fits the downtime limit.
const REST: usize = 6;

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// A page.
    Page(usize),
    /// A block of the layer.
    Block(usize),
    /// Registers are the frame's version; with the list of outstanding I/O.
    Device(Vec<Io>),
}

/// A frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// From.
    pub from: HostIx,
    /// To.
    pub to: HostIx,
    /// Incarnation of the agent that sent it.
    pub life: u64,
    /// Attempt it belongs to.
    pub attempt: Attempt,
    /// Epoch of the right under which it was sent.
    pub epoch: u64,
    /// What it carries.
    pub load: Load,
    /// In which version.
    pub version: u64,
}

/// What a stream is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// The guest runs.
    Copy,
    /// The guest is stopped.
    Last,
    /// Memory and disk are there.
    Device,
    /// Nothing to send at the moment.
    Idle,
}

/// The sending end, in the memory of the source's agent.
#[derive(Clone, Debug)]
pub struct Stream {
    to: HostIx,
    epoch: u64,
    /// What it is doing.
    pub round: Round,
    pages: Vec<Sent>,
    blocks: Vec<Sent>,
    device: Sent,
    with_disk: bool,
    told_at: Option<Time>,
    turn: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    acked: Option<u64>,
    sent: Option<(u64, Time)>,
    link: usize,
}

impl Sent {
    /// The link to send `version` over now, if it has to be sent.
    fn due(&mut self, version: u64, now: Time, turn: usize) -> Option<usize> {
        if self.acked == Some(version) {
            return None;
        }
        match self.sent {
            Some((sent, at)) if sent == version => {
                if now < at.plus_ms(AGAIN_MS) {
                    return None;
                }
                self.link = (self.link + 1) % LINKS;
            }
            _ => self.link = turn % LINKS,
        }
        self.sent = Some((version, now));
        Some(self.link)
    }

    fn ack(&mut self, version: u64) {
        self.acked = self.acked.max(Some(version));
    }
}

impl Stream {
    /// A stream to `to` under `epoch`; `disk` says whether the layer is copied with it.
    pub fn new(to: HostIx, epoch: u64, disk: DiskMove) -> Self {
        Self {
            to,
            epoch,
            round: Round::Copy,
            pages: vec![Sent::default(); PAGES],
            blocks: vec![Sent::default(); BLOCKS],
            device: Sent::default(),
            with_disk: disk == DiskMove::Copy,
            told_at: None,
            turn: 0,
        }
    }
}

impl World {
    pub(crate) fn pump_soon(&mut self, host: HostIx, attempt: Attempt) {
        let life = self.hosts[host].life;
        self.after_us(200, 1_000, What::Pump(host, life, attempt));
    }

    pub(crate) fn on_pump(&mut self, host: HostIx, life: u64, attempt: Attempt) {
        let Some(agent) = self.agent(host, life) else { return };
        let Some(mut stream) = agent.streams.remove(&attempt) else { return };
        let frames = self.frames(host, attempt, &mut stream);
        let to = stream.to;
        for (link, frame) in frames {
            for at in self.net.frame(self.now, host, to, link, &mut self.rng).into_iter().flatten() {
                self.at(at, What::Frame(frame.clone()));
            }
        }
        if let Some(agent) = self.agent(host, life) {
            agent.streams.insert(attempt, stream);
        }
        self.progress(host, attempt);
        if self.agent(host, life).is_some_and(|agent| agent.streams.contains_key(&attempt)) {
            self.after_ms(8, What::Pump(host, life, attempt));
        }
    }

    fn frames(&mut self, host: HostIx, attempt: Attempt, stream: &mut Stream) -> Vec<(usize, Frame)> {
        let mut frames = Vec::new();
        let now = self.now;
        let it = &self.hosts[host];
        let Some(copy) = it.copy_of.get(&attempt).and_then(|id| it.copies.get(id)) else { return frames };
        let (to, epoch, life) = (stream.to, stream.epoch, it.life);
        let frame = |load, version| Frame { from: host, to, life, attempt, epoch, load, version };
        if matches!(stream.round, Round::Copy | Round::Last) {
            let burst = if stream.round == Round::Last { PAGES } else { BURST };
            for turn in 0..PAGES + BLOCKS {
                let ix = (stream.turn + turn) % (PAGES + BLOCKS);
                if frames.len() >= burst {
                    stream.turn = ix;
                    break;
                }
                let (sent, load, version) = if ix < PAGES {
                    (&mut stream.pages[ix], Load::Page(ix), copy.ram[ix])
                } else if stream.with_disk {
                    let block = ix - PAGES;
                    (&mut stream.blocks[block], Load::Block(block), copy.layer.cached[block])
                } else {
                    continue;
                };
                if let Some(link) = sent.due(version, now, ix + turn) {
                    frames.push((link, frame(load, version)));
                }
            }
        }
        if stream.round == Round::Device
            && let Some(regs) = copy.regs
            && let Some(link) = stream.device.due(regs, now, 0)
        {
            frames.push((link, frame(Load::Device(copy.io.clone()), regs)));
        }
        frames
    }

    pub(crate) fn on_frame(&mut self, frame: &Frame) {
        if !self.agent_up(frame.to) {
            return;
        }
        let plant = self.plant;
        let it = &mut self.hosts[frame.to];
        let Some(copy) = it.copy_of.get(&frame.attempt).and_then(|id| it.copies.get_mut(id)) else { return };
        if copy.brought_by != Some(frame.attempt) {
            return;
        }
        if copy.epoch > frame.epoch && plant != Some(Plant::SkipEpochCheck) {
            return;
        }
        let stale = |have: u64| frame.version < have && plant != Some(Plant::DropPageVersion);
        match &frame.load {
            Load::Page(page) => {
                let have = copy.have.as_ref().map_or(0, |have| have.pages[*page]);
                if !stale(have) {
                    copy.ram[*page] = frame.version;
                    if let Some(have) = &mut copy.have {
                        have.pages[*page] = frame.version;
                    }
                }
            }
            Load::Block(block) => {
                let have = copy.have.as_ref().map_or(0, |have| have.blocks[*block]);
                // Blocks are written under the layer's lock in the order they come: the planted mistake is in RAM.
                if frame.version >= have {
                    copy.layer.cached[*block] = frame.version;
                    if let Some(have) = &mut copy.have {
                        have.blocks[*block] = frame.version;
                    }
                }
            }
            Load::Device(io) => {
                if copy.state == CopyState::Incoming {
                    copy.state = CopyState::Stopped;
                    copy.regs = Some(frame.version);
                    copy.io.clone_from(io);
                }
            }
        }
        let link = usize::from(self.rng.permille(500));
        for at in self.net.frame(self.now, frame.to, frame.from, link, &mut self.rng).into_iter().flatten() {
            self.at(at, What::Ack(frame.clone()));
        }
    }

    pub(crate) fn on_ack(&mut self, frame: &Frame) {
        let Some(agent) = self.agent(frame.from, frame.life) else { return };
        let Some(stream) = agent.streams.get_mut(&frame.attempt) else { return };
        match &frame.load {
            Load::Page(page) => stream.pages[*page].ack(frame.version),
            Load::Block(block) => stream.blocks[*block].ack(frame.version),
            Load::Device(_) => stream.device.ack(frame.version),
        }
        self.progress(frame.from, frame.attempt);
    }

    /// Tells the machine when a round is done.
    fn progress(&mut self, host: HostIx, attempt: Attempt) {
        let now = self.now;
        let it = &mut self.hosts[host];
        let Some(copy) = it.copy_of.get(&attempt).and_then(|id| it.copies.get(id)) else { return };
        let Some(agent) = &mut it.agent else { return };
        let Some(stream) = agent.streams.get_mut(&attempt) else { return };
        let pages =
            stream.pages.iter().zip(&copy.ram).filter(|(sent, version)| sent.acked != Some(**version));
        let blocks = stream
            .blocks
            .iter()
            .zip(&copy.layer.cached)
            .filter(|(sent, version)| sent.acked != Some(**version));
        let left = pages.count() + if stream.with_disk { blocks.count() } else { 0 };
        let done = match stream.round {
            Round::Copy if left <= REST && stream.told_at.is_none_or(|at| now >= at.plus_ms(100)) => {
                stream.told_at = Some(now);
                SourceWork::Copy
            }
            Round::Last if left == 0 => {
                stream.round = Round::Idle;
                SourceWork::LastRound
            }
            Round::Device if copy.regs.is_some() && stream.device.acked == copy.regs => {
                stream.round = Round::Idle;
                SourceWork::DeviceState
            }
            _ => return,
        };
        if done != SourceWork::Copy {
            agent.works.retain(|(_, at, work)| *at != attempt || *work != Work::Source(done));
        }
        self.source_event(host, attempt, Event::Done(done));
    }
}
