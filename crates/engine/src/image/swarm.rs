//! Who else has blocks of an image, as far as this host knows.
//!
//! ```text
//!   unknown ── hello, bitmap ──► live ◄── time passes ── suspect      live ── wrong bytes ──► quarantined
//!                                  └── timeout, refusal ──►┘          live ── gone ──► unknown
//! ```
//!
//! Invariants: a quarantined peer is never asked again for this image; a suspect is not asked while another
//! source is left, for a time that doubles with each failure in a row. Knowledge is a hint: a peer that says that
//! it lacks a block is believed over its bitmap.

use std::collections::BTreeMap;

use whimbrel_wire::peer::block::{Bitmap, Run};
use whimbrel_wire::{HostId, ImageId, Time};

use super::home;

/// A first failure makes a peer suspect for so long.
const SUSPECT_MS: u64 = 500;
/// No peer is suspect for longer than this after one failure.
const SUSPECT_MS_MAX: u64 = 30_000;

/// What is known of one peer.
#[derive(Clone, Debug)]
struct Peer {
    has: Bitmap,
    outstanding: u32,
    rtt_ns: u64,
    failures: u32,
    suspect_until: Time,
    quarantined: bool,
    /// Left the swarm; kept only while quarantined, so that it does not come back with a clean name.
    gone: bool,
}

/// See the module's charter.
#[derive(Clone, Debug)]
pub struct Swarm {
    image: ImageId,
    me: HostId,
    blocks: u64,
    peers: BTreeMap<HostId, Peer>,
}

impl Swarm {
    /// A swarm of this host alone.
    pub fn new(image: ImageId, me: HostId, blocks: u64) -> Self {
        Self { image, me, blocks, peers: BTreeMap::new() }
    }

    /// A peer told its whole bitmap. One for another number of blocks counts as empty.
    pub fn hello(&mut self, host: &HostId, has: Bitmap) {
        if *host == self.me {
            return;
        }
        let has = if has.blocks() == self.blocks { has } else { Bitmap::new(self.blocks) };
        let fresh = Peer {
            has: Bitmap::new(0),
            outstanding: 0,
            rtt_ns: 0,
            failures: 0,
            suspect_until: Time(0),
            quarantined: false,
            gone: false,
        };
        let peer = self.peers.entry(host.clone()).or_insert(fresh);
        peer.gone = false;
        peer.suspect_until = Time(0);
        peer.failures = 0;
        if !peer.quarantined {
            peer.has = has;
        }
    }

    /// A peer told changes. Ignored from one that never said hello.
    pub fn changed(&mut self, host: &HostId, here: &[Run], gone: &[Run]) {
        let blocks = self.blocks;
        let Some(peer) = self.peers.get_mut(host).filter(|peer| !peer.quarantined) else { return };
        let each = |run: &Run| run.first.min(blocks)..run.first.saturating_add(run.count).min(blocks);
        for block in gone.iter().flat_map(each) {
            peer.has.remove(block);
        }
        for block in here.iter().flat_map(each) {
            peer.has.insert(block);
        }
    }

    /// A peer left, or the links to it are gone.
    pub fn lost(&mut self, host: &HostId) {
        if let Some(peer) = self.peers.get_mut(host) {
            if peer.quarantined {
                peer.gone = true;
            } else {
                self.peers.remove(host);
            }
        }
    }

    /// A peer says that it lacks a block that we thought it has.
    pub fn lacks(&mut self, host: &HostId, block: u64) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.has.remove(block);
        }
    }

    /// A peer sent bytes that are not the block's.
    pub fn quarantine(&mut self, host: &HostId) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.quarantined = true;
            peer.has = Bitmap::new(0);
        }
    }

    /// A request to `host` starts.
    pub fn asked(&mut self, host: &HostId) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.outstanding += 1;
        }
    }

    /// A request to `host` that was counted by [`Swarm::asked`] is over.
    pub fn answered(&mut self, host: &HostId) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.outstanding = peer.outstanding.saturating_sub(1);
        }
    }

    /// A request was served after `took_ns`.
    pub fn served(&mut self, host: &HostId, took_ns: u64) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.failures = 0;
            peer.suspect_until = Time(0);
            peer.rtt_ns = if peer.rtt_ns == 0 { took_ns } else { (peer.rtt_ns * 7 + took_ns) / 8 };
        }
    }

    /// A request failed or ran into its deadline.
    pub fn failed(&mut self, host: &HostId, now: Time) {
        if let Some(peer) = self.peers.get_mut(host) {
            let ms = SUSPECT_MS.saturating_mul(1 << peer.failures.min(16)).min(SUSPECT_MS_MAX);
            peer.failures = peer.failures.saturating_add(1);
            peer.suspect_until = peer.suspect_until.max(now.plus_ms(ms));
        }
    }

    /// A peer had too much to do: leave it alone for a moment.
    pub fn busy(&mut self, host: &HostId, now: Time) {
        if let Some(peer) = self.peers.get_mut(host) {
            peer.suspect_until = peer.suspect_until.max(now.plus_ms(20));
        }
    }

    /// The peers known to have `block` that may be asked for it, best first: least outstanding, then fastest.
    /// `any` includes suspects.
    pub fn holders(&self, block: u64, now: Time, any: bool) -> Vec<HostId> {
        let mut found: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.has.has(block) && peer.willing(now, any))
            // Equals share the load by block rather than by name.
            .map(|(host, peer)| {
                (peer.outstanding, peer.rtt_ns >> 20, home::weight(&self.image, block, host), host)
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, _, _, host)| host.clone()).collect()
    }

    /// The hosts that come before this one as the home of `block`, best first; suspects left out.
    pub fn homes_before_me(&self, block: u64, now: Time) -> Vec<HostId> {
        let live = self.peers.iter().filter(|(_, peer)| peer.willing(now, false)).map(|(host, _)| host);
        let ranked = home::ranked(&self.image, block, live.chain(std::iter::once(&self.me)));
        ranked.into_iter().take_while(|host| **host != self.me).cloned().collect()
    }

    /// How many peers are known to have `block`.
    pub fn copies(&self, block: u64) -> usize {
        self.peers.values().filter(|peer| peer.has.has(block)).count()
    }

    /// Peers that can be told of changes.
    pub fn members(&self) -> impl Iterator<Item = &HostId> {
        self.peers.iter().filter(|(_, peer)| !peer.gone).map(|(host, _)| host)
    }

    /// Whether this peer is quarantined.
    pub fn is_quarantined(&self, host: &HostId) -> bool {
        self.peers.get(host).is_some_and(|peer| peer.quarantined)
    }
}

impl Peer {
    fn willing(&self, now: Time, any: bool) -> bool {
        !self.quarantined && !self.gone && (any || self.suspect_until <= now)
    }
}
