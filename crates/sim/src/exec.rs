//! The guest executing on some host: instructions, I/O, flushes, stopping, going on, starting from disk; with the
//! checks that belong to each.
//!
//! Not here: who decides (`moves`), what is true (`guest::Truth`).

use crate::guest::{BLOCKS, Copy, CopyId, CopyState, Io, PAGES, Truth};
use crate::plant::Plant;
use crate::world::{HostIx, What, World};

/// Pages that are written most.
const HOT: usize = 5;

impl World {
    /// Executes a few instructions, wherever the guest runs.
    pub(crate) fn on_guest(&mut self) {
        self.after_us(2_000, 9_000, What::Guest);
        let mut at = None;
        for (host, it) in self.hosts.iter().enumerate() {
            at = it
                .copies
                .values()
                .find(|copy| copy.state == CopyState::Running)
                .map(|copy| (host, copy.id))
                .or(at);
        }
        let Some((host, id)) = at else { return };
        for _ in 0..2 {
            self.instruction(host, id);
        }
        if self.rng.permille(60) {
            self.flush(host, id);
        }
    }

    fn instruction(&mut self, host: HostIx, id: CopyId) {
        let pages = if self.rng.permille(800) { HOT } else { PAGES };
        let page = self.rng.index(pages);
        let looked_at = self.rng.index(PAGES);
        let block = self.rng.index(BLOCKS);
        let kind = self.rng.below(100);
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return };
        let truth = &mut self.truth;
        if copy.regs != Some(truth.regs) {
            let words =
                format!("h{host} executes instruction {:?}, the guest is at {}", copy.regs, truth.regs);
            return self.fail(words);
        }
        if copy.epoch < truth.epoch {
            let words =
                format!("h{host} executes at epoch {}, epoch {} has executed", copy.epoch, truth.epoch);
            return self.fail(words);
        }
        truth.epoch = copy.epoch;
        truth.regs += 1;
        copy.regs = Some(truth.regs);
        if copy.ram[looked_at] != truth.ram[looked_at] {
            let words = format!(
                "h{host}: page {looked_at} reads as version {}, the guest wrote {}",
                copy.ram[looked_at], truth.ram[looked_at]
            );
            return self.fail(words);
        }
        if kind < 70 {
            copy.ram[page] = truth.regs;
            truth.ram[page] = truth.regs;
        }
        let busy = copy.io.iter().any(|io| io.block == block);
        if kind >= 94 && !busy && copy.io.len() < 4 {
            let io = Io { block, value: truth.regs };
            copy.io.push(io);
            truth.io.push(io);
            self.after_us(500, 25_000, What::IoDone(host, id, io));
        } else if kind < 10 && !busy {
            self.read_disk(host, id, block);
        }
    }

    fn read_disk(&mut self, host: HostIx, id: CopyId, block: usize) {
        let missing =
            self.hosts[host].copies.get(&id).is_some_and(|copy| copy.layer.missing.contains(&block));
        if missing {
            // A read of a block that nobody hands out now waits; here it is just not made.
            let Some(found) = self.handed_out(host, id).map(|blocks| blocks[block]) else { return };
            self.tally.remote_reads += 1;
            let want = self.truth.written[block];
            if found != want {
                self.fail(format!("h{host}: block {block} is fetched as {found}, the guest wrote {want}"));
            }
            return;
        }
        let Some(copy) = self.hosts[host].copies.get(&id) else { return };
        let (found, want) = (copy.layer.cached[block], self.truth.written[block]);
        if found != want {
            self.fail(format!("h{host}: block {block} reads as {found}, the guest wrote {want}"));
        }
    }

    /// Gives the guest's outstanding writes to the disk again.
    pub(crate) fn submit_io(&mut self, host: HostIx) {
        let mut again = Vec::new();
        for copy in self.hosts[host].copies.values_mut() {
            if copy.state == CopyState::Running {
                copy.takes_io = true;
                again.extend(copy.io.iter().map(|io| (copy.id, *io)));
            }
        }
        for (id, io) in again {
            self.after_us(500, 8_000, What::IoDone(host, id, io));
        }
    }

    pub(crate) fn on_io_done(&mut self, host: HostIx, id: CopyId, io: Io) {
        // The disk is served by the agent: without it, the guest waits.
        if !self.agent_up(host) {
            return;
        }
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return };
        let alive = matches!(copy.state, CopyState::Running | CopyState::Stopped);
        if !alive || !copy.takes_io || !copy.io.contains(&io) {
            return;
        }
        copy.layer.cached[io.block] = io.value;
        copy.layer.missing.remove(&io.block);
        copy.io.retain(|other| *other != io);
        self.truth.io.retain(|other| *other != io);
        self.truth.written[io.block] = io.value;
    }

    fn flush(&mut self, host: HostIx, id: CopyId) {
        if !self.agent_up(host) {
            return;
        }
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return };
        copy.flush += 1;
        let token = copy.flush;
        let blocks = copy.layer.cached.clone();
        self.after_us(500, 12_000, What::FlushDone(host, id, token, blocks));
    }

    pub(crate) fn on_flush_done(&mut self, host: HostIx, id: CopyId, token: u64, blocks: &[u64]) {
        let early = self.plant == Some(Plant::AckFlushEarly);
        if !self.agent_up(host) {
            return;
        }
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return };
        if copy.flush != token || copy.state != CopyState::Running {
            return;
        }
        if !early {
            copy.layer.persist(blocks);
        }
        let missing = copy.layer.missing.clone();
        for (block, value) in blocks.iter().enumerate() {
            if !missing.contains(&block) {
                self.truth.acked[block] = self.truth.acked[block].max(*value);
            }
        }
        if early {
            self.after_ms(1_500, What::Persist(host, id, blocks.to_vec()));
        }
    }

    /// Cancels outstanding I/O. Some of it has reached the layer, though the guest does not know.
    pub(crate) fn list_io(&mut self, host: HostIx, id: Option<CopyId>) {
        let reached: Vec<bool> = (0..8).map(|_| self.rng.permille(500)).collect();
        let Some(copy) = id.and_then(|id| self.hosts[host].copies.get_mut(&id)) else { return };
        copy.takes_io = false;
        for (io, reached) in copy.io.iter().zip(reached) {
            if reached {
                copy.layer.cached[io.block] = io.value;
                copy.layer.missing.remove(&io.block);
            }
        }
        if self.rates.on_demand {
            // The target will read these blocks later: if this host lost power first, it would read older ones.
            let blocks = copy.layer.cached.clone();
            copy.layer.persist(&blocks);
        }
    }

    pub(crate) fn stop_guest(&mut self, host: HostIx, id: CopyId) {
        if let Some(copy) = self.hosts[host].copies.get_mut(&id) {
            copy.state = CopyState::Stopped;
            copy.flush += 1;
        }
        self.note(format_args!("h{host}: guest stops"));
    }

    /// Lets a stopped guest run, after looking at it as no host could.
    pub(crate) fn let_guest_run(&mut self, host: HostIx, id: CopyId, epoch: Option<u64>) {
        self.note(format_args!("h{host}: guest goes on"));
        let right = self.store.vm().right.clone();
        if self.hosts[host].name != right.holder {
            return self.fail(format!("h{host} lets the guest run, {} holds it", right.holder));
        }
        let elsewhere = self.hosts.iter().flat_map(|it| it.copies.values());
        if elsewhere.filter(|copy| copy.id != id).any(|copy| copy.state == CopyState::Running) {
            return self.fail(format!("h{host} lets the guest run, and it runs already"));
        }
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return };
        copy.epoch = epoch.unwrap_or(right.epoch.0);
        copy.state = CopyState::Running;
        copy.have = None;
        if let Some(words) = differs(copy, &self.truth) {
            return self.fail(format!("h{host}: {words}"));
        }
        self.submit_io(host);
    }

    /// Starts the guest from its disk: whatever a flush has acknowledged must be there.
    pub(crate) fn boot(&mut self, host: HostIx, from: CopyId, epoch: u64) {
        self.note(format_args!("h{host}: guest started from its disk"));
        let Some(old) = self.hosts[host].copies.remove(&from) else { return };
        for (block, value) in old.layer.cached.iter().enumerate() {
            let acked = self.truth.acked[block];
            if *value < acked {
                let words = format!("h{host}: block {block} is {value}; {acked} was written and flushed");
                return self.fail(words);
            }
        }
        self.hosts[host].copies.clear();
        let id = self.new_id();
        let regs = self.truth.regs;
        self.truth = Truth {
            ram: vec![0; PAGES],
            regs,
            written: old.layer.cached.clone(),
            acked: self.truth.acked.clone(),
            io: Vec::new(),
            epoch,
        };
        let copy = Copy::booted(id, old.layer, regs, epoch);
        self.hosts[host].copies.insert(id, copy);
    }

    /// The blocks that the copy here lacks, as the host that has them hands them out; none while it does not.
    fn handed_out(&mut self, host: HostIx, id: CopyId) -> Option<Vec<u64>> {
        let attempt = self.hosts[host].copies.get(&id)?.brought_by?;
        let source = self.hosts.iter().position(|it| {
            it.copy_of.get(&attempt).is_some_and(|copy| it.copies.contains_key(copy))
                && it.name != self.hosts[host].name
        });
        let Some(source) = source else {
            // The right kind of wait is for the operator; the wrong kind is a source that gave up too early.
            if !self.hosts.iter().any(|it| it.gone) {
                self.fail(format!("h{host} depends on blocks that nobody has any more"));
            }
            return None;
        };
        let it = &self.hosts[source];
        let serves = it.agent.as_ref().is_some_and(|agent| agent.serves.contains(&attempt));
        if !serves || !self.net.reachable(host, source) {
            return None;
        }
        Some(it.copies.get(it.copy_of.get(&attempt)?)?.layer.cached.clone())
    }

    /// Fetches some of what is missing of the layer here; whether nothing is missing any more.
    pub(crate) fn pull(&mut self, host: HostIx, id: CopyId) -> bool {
        let Some(copy) = self.hosts[host].copies.get(&id) else { return true };
        if !copy.layer.partial || copy.brought_by.is_none() {
            return true;
        }
        // What the guest wrote over meanwhile needs nobody, but is made durable like the rest.
        let blocks = match copy.layer.missing.is_empty() {
            true => copy.layer.cached.clone(),
            false => match self.handed_out(host, id) {
                Some(blocks) => blocks,
                None => return false,
            },
        };
        let some = if self.calm { BLOCKS } else { self.rng.index(BLOCKS) + 1 };
        let Some(copy) = self.hosts[host].copies.get_mut(&id) else { return true };
        for _ in 0..some {
            let Some(block) = copy.layer.missing.pop_last() else { break };
            copy.layer.cached[block] = blocks[block];
        }
        let cached = copy.layer.cached.clone();
        copy.layer.persist(&cached);
        let whole = copy.layer.missing.is_empty();
        if whole {
            copy.layer.partial = false;
            self.tally.pulls += 1;
        }
        whole
    }
}

/// How a copy that is about to run differs from the guest.
fn differs(copy: &Copy, truth: &Truth) -> Option<String> {
    if copy.regs != Some(truth.regs) {
        return Some(format!("the guest goes on at instruction {:?}, it was at {}", copy.regs, truth.regs));
    }
    if let Some(page) = (0..PAGES).find(|page| copy.ram[*page] != truth.ram[*page]) {
        return Some(format!(
            "page {page} is version {}, the guest wrote {}",
            copy.ram[page], truth.ram[page]
        ));
    }
    let (mut io, mut want) = (copy.io.clone(), truth.io.clone());
    io.sort_by_key(|io| io.block);
    want.sort_by_key(|io| io.block);
    if io != want {
        return Some(format!("outstanding I/O is {io:?}, the guest submitted {want:?}"));
    }
    (0..BLOCKS).find_map(|block| {
        let open = want.iter().any(|io| io.block == block);
        let (found, written) = (copy.layer.cached[block], truth.written[block]);
        let here = !copy.layer.missing.contains(&block);
        (here && !open && found != written)
            .then(|| format!("block {block} is {found}, the guest wrote {written}"))
    })
}
