//! Finding a hash in a sorted file by `pread`, without loading it.

use crate::error::Result;

/// The first of `count` ascending keys that is not below `key`; `count` if none. Hashes are spread evenly, so a guess
/// by proportion is nearly right; every other step halves, so that a file which lies cannot make it slow.
pub fn lower_bound(count: u64, key: u64, key_at: impl Fn(u64) -> Result<u64>) -> Result<u64> {
    let (mut low, mut high) = (0, count);
    let (mut low_key, mut high_key) = (0, u64::MAX);
    let mut guess = true;
    while low < high {
        let span = u128::from(high_key.saturating_sub(low_key)).max(1);
        let share = u128::from(key.saturating_sub(low_key)) * u128::from(high - low) / span;
        let step = if guess { u64::try_from(share).unwrap_or(u64::MAX) } else { (high - low) / 2 };
        guess = !guess;
        let middle = low + step.min(high - low - 1);
        let found = key_at(middle)?;
        if found < key {
            low = middle + 1;
            low_key = found;
        } else {
            high = middle;
            high_key = found;
        }
    }
    Ok(low)
}

/// The part of a hash that files are sorted by.
pub fn sort_key(hash: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_finds_what_a_plain_search_finds(mut keys in prop::collection::vec(any::<u64>(), 0..200), extra: u64) {
            keys.sort_unstable();
            for key in keys.iter().copied().chain([extra, 0, u64::MAX]) {
                let found = lower_bound(keys.len() as u64, key, |i| Ok(keys[i as usize])).unwrap();
                prop_assert_eq!(found as usize, keys.partition_point(|other| *other < key));
            }
        }
    }
}
