//! The home of a block: which live host fetches it from the seed when nobody has it yet.
//!
//! Rendezvous hashing: every host computes the same ranking from the same set of hosts, without talking. When a
//! host joins or leaves, only the blocks it is first for change their home. Neighbouring blocks share a home
//! ([`GROUP_BLOCKS`]), so that the seed sees a few larger sequential reads rather than many scattered ones.
//!
//! Not here: what is done when the home does not answer (`read`).

use whimbrel_wire::{HostId, ImageId};

/// Blocks that share a home: 1 MiB of an image with 128 KiB blocks.
pub const GROUP_BLOCKS: u64 = 8;

/// The weight of `host` for `block` of `image`: the highest weight is the home, the second its stand-in.
pub fn weight(image: &ImageId, block: u64, host: &HostId) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in image.0.iter().take(8).chain(host.as_str().as_bytes()) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    mix(hash ^ mix(block / GROUP_BLOCKS))
}

/// The hosts in the order in which they are the block's home; ties (which take equal names) go by name.
pub fn ranked<'a>(image: &ImageId, block: u64, hosts: impl Iterator<Item = &'a HostId>) -> Vec<&'a HostId> {
    let mut weighed: Vec<_> = hosts.map(|host| (weight(image, block, host), host)).collect();
    weighed.sort_unstable_by(|a, b| b.cmp(a));
    weighed.into_iter().map(|(_, host)| host).collect()
}

/// The finaliser of splitmix64: every input bit reaches every output bit.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn homes_are_even_and_stay_when_another_host_leaves() {
        let image = ImageId([7; 32]);
        let hosts: Vec<HostId> = (0..8).map(|i| format!("host-{i}").parse().unwrap()).collect();
        let mut count = std::collections::BTreeMap::new();
        for group in 0..8000 {
            let block = group * GROUP_BLOCKS;
            let all = ranked(&image, block, hosts.iter());
            *count.entry(all[0].clone()).or_insert(0u32) += 1;
            assert_eq!(all, ranked(&image, block + GROUP_BLOCKS - 1, hosts.iter()));
            let without = ranked(&image, block, hosts.iter().filter(|host| *host != &hosts[3]));
            let expected: Vec<_> = all.into_iter().filter(|host| *host != &hosts[3]).collect();
            assert_eq!(without, expected);
        }
        assert_eq!(count.len(), 8);
        assert!(count.values().all(|n| (850..1150).contains(n)), "{count:?}");
    }
}
