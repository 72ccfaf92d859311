//! The order in which a background fill fetches the blocks of an image.
//!
//! First the blocks this host is the home of, so that hosts which fill at once hand **different** portions to each
//! other and the seed is read about once; then, from a place of this host's own, what the fewest peers have, looked
//! for within a window so that the order stays nearly sequential.
//!
//! Not here: when a fill may run beside demand reads (`read`).

use whimbrel_wire::{HostId, ImageId, Time};

use super::home;
use super::swarm::Swarm;

/// How far ahead of its place the fill looks for rare blocks.
const WINDOW_BLOCKS: u64 = 64;

/// Where a fill stands.
#[derive(Clone, Debug)]
pub struct Fill {
    blocks: u64,
    own: bool,
    start: u64,
    done: u64,
}

impl Fill {
    /// A fill of an image of `blocks` blocks on host `me`.
    pub fn new(image: &ImageId, me: &HostId, blocks: u64) -> Self {
        let groups = blocks.div_ceil(home::GROUP_BLOCKS).max(1);
        let start = home::weight(image, u64::MAX, me) % groups * home::GROUP_BLOCKS;
        Self { blocks, own: true, start, done: 0 }
    }

    /// The next block to fetch among those for which `wanted` says so (stored, not in the cache, not under way);
    /// `None` when there is none left. A block is proposed again until `wanted` no longer says so.
    pub fn next(&mut self, swarm: &Swarm, now: Time, wanted: impl Fn(u64) -> bool) -> Option<u64> {
        while self.own {
            let block = self.done;
            if block >= self.blocks {
                self.own = false;
                self.done = 0;
            } else if wanted(block) && swarm.homes_before_me(block, now).is_empty() {
                return Some(block);
            } else {
                self.done += 1;
            }
        }
        while self.done < self.blocks {
            let block = self.at(self.done);
            if !wanted(block) {
                self.done += 1;
                continue;
            }
            let window = self.done..self.blocks.min(self.done + WINDOW_BLOCKS);
            return window.map(|done| self.at(done)).filter(|block| wanted(*block)).min_by_key(|block| {
                match swarm.copies(*block) {
                    // What nobody has is fetched by its home; asking now would only make us wait for it.
                    0 => usize::MAX,
                    copies => copies,
                }
            });
        }
        None
    }

    fn at(&self, done: u64) -> u64 {
        (self.start + done) % self.blocks.max(1)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::BTreeSet;
    use whimbrel_wire::peer::block::Bitmap;

    #[test]
    fn every_block_is_filled_once_and_own_blocks_come_first() {
        let image = ImageId([1; 32]);
        let me: HostId = "a".parse().unwrap();
        let mut swarm = Swarm::new(image, me.clone(), 300);
        for peer in ["b", "c"] {
            swarm.hello(&peer.parse().unwrap(), Bitmap::new(300));
        }
        let mut fill = Fill::new(&image, &me, 300);
        let mut got = Vec::new();
        let mut left: BTreeSet<u64> = (0..300).filter(|block| block % 7 != 0).collect();
        let own: BTreeSet<u64> =
            left.iter().copied().filter(|block| swarm.homes_before_me(*block, Time(0)).is_empty()).collect();
        while let Some(block) = fill.next(&swarm, Time(0), |block| left.contains(&block)) {
            assert!(left.remove(&block));
            got.push(block);
        }
        assert!(left.is_empty());
        assert_eq!(got.iter().take(own.len()).copied().collect::<BTreeSet<_>>(), own);
        assert!(!own.is_empty() && own.len() < 200);
    }
}
