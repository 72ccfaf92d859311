//! The network between hosts: two links per pair, with delay, loss, duplicates and cuts; and control connections,
//! which keep their order and lose everything in flight when they are reset.
//!
//! Not here: who listens (`world`).

use whimbrel_wire::Time;

use crate::rng::Rng;

/// Links between any two hosts.
pub const LINKS: usize = 2;

/// Delay and faults of a run; see [`Net::new`].
#[derive(Debug)]
pub struct Net {
    hosts: usize,
    base_us: [u64; LINKS],
    jitter_us: u64,
    /// Of a thousand frames.
    pub loss: u64,
    /// Of a thousand frames.
    pub duplicates: u64,
    /// Of a thousand frames, that are late by up to `late_us`.
    pub late: u64,
    late_us: u64,
    /// By ordered pair and link.
    cut: Vec<[bool; LINKS]>,
    /// When the newest control message of an ordered pair arrives.
    ordered: Vec<Time>,
    /// Counts resets of each pair's control connection; a message of an older one is lost.
    connection: Vec<u64>,
}

impl Net {
    /// A network of a run's own character.
    pub fn new(hosts: usize, rng: &mut Rng) -> Self {
        let pairs = hosts * hosts;
        let slow = rng.permille(300);
        Self {
            hosts,
            base_us: [
                rng.between(50, 2_000),
                if slow { rng.between(5_000, 40_000) } else { rng.between(50, 4_000) },
            ],
            jitter_us: rng.between(0, 3_000),
            loss: if rng.permille(500) { rng.between(0, 60) } else { 0 },
            duplicates: if rng.permille(500) { rng.between(0, 40) } else { 0 },
            late: if rng.permille(600) { rng.between(0, 80) } else { 0 },
            late_us: rng.between(10_000, 1_500_000),
            cut: vec![[false; LINKS]; pairs],
            ordered: vec![Time(0); pairs],
            connection: vec![0; pairs],
        }
    }

    fn pair(&self, from: usize, to: usize) -> usize {
        from * self.hosts + to
    }

    /// The faults that are a matter of chance end; delays stay.
    pub fn calm(&mut self) {
        self.loss = 0;
        self.duplicates = 0;
        self.late = 0;
        for cut in &mut self.cut {
            *cut = [false; LINKS];
        }
    }

    /// Cuts or heals one link between two hosts, both ways. The control connection is reset by a cut.
    pub fn set_cut(&mut self, a: usize, b: usize, link: usize, cut: bool) {
        for pair in [self.pair(a, b), self.pair(b, a)] {
            self.cut[pair][link % LINKS] = cut;
        }
        if cut {
            self.reset(a, b);
        }
    }

    /// The control connection between two hosts breaks; a new one is made at once where it can be.
    pub fn reset(&mut self, a: usize, b: usize) {
        for pair in [self.pair(a, b), self.pair(b, a)] {
            self.connection[pair] += 1;
        }
    }

    /// Whether any link between the two works.
    pub fn reachable(&self, a: usize, b: usize) -> bool {
        self.cut[self.pair(a, b)].iter().any(|cut| !cut)
    }

    fn delay_us(&self, link: usize, rng: &mut Rng) -> u64 {
        self.base_us[link % LINKS] + rng.between(0, self.jitter_us)
    }

    /// When a control message sent now arrives, and on which connection; none if it is lost.
    pub fn control(&mut self, now: Time, from: usize, to: usize, rng: &mut Rng) -> Option<(Time, u64)> {
        let pair = self.pair(from, to);
        let link = self.cut[pair].iter().position(|cut| !cut)?;
        // A lost segment is sent again by the transport: late, not lost.
        let again_us = if rng.permille(self.loss) { 200_000 } else { 0 };
        let at = Time(now.0 + (self.delay_us(link, rng) + again_us) * 1000).max(self.ordered[pair]);
        self.ordered[pair] = at;
        Some((at, self.connection[pair]))
    }

    /// Whether a control message of this connection may still be delivered.
    pub fn same_connection(&self, from: usize, to: usize, connection: u64) -> bool {
        self.connection[self.pair(from, to)] == connection
    }

    /// When the copies of a data frame sent now over a link arrive: none, one or two.
    pub fn frame(&self, now: Time, from: usize, to: usize, link: usize, rng: &mut Rng) -> [Option<Time>; 2] {
        if self.cut[self.pair(from, to)][link % LINKS] || rng.permille(self.loss) {
            return [None, None];
        }
        let mut arrival = || {
            let late_us = if rng.permille(self.late) { rng.between(0, self.late_us) } else { 0 };
            Time(now.0 + (self.delay_us(link, rng) + late_us) * 1000)
        };
        let first = arrival();
        let second = arrival();
        [Some(first), rng.permille(self.duplicates).then_some(second)]
    }
}
