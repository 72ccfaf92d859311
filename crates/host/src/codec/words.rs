//! Pages with one frequent 64-bit word, written without it (`wire::peer::memory` has the format).
//!
//! Much of a guest's memory is such pages: sparse tables, zeroed tails, fill patterns. Leaving the frequent word out
//! takes a tenth of the time that zstd takes for the same, and what is left over goes through zstd the faster. A page whose
//! previous version is known may stand there as its difference from that, of which the frequent word is zero.
//!
//! ```text
//!  page ──32 samples──► the word seen most ──► mask of the others + the others ──► shorter? else the page as it is
//!  page XOR previous version ───── zero ─────► mask of the others + the others ──► pays? instead of the above
//! ```
//!
//! Invariants: [`pack`] never needs more than it was given; [`unpack`] fills its output exactly or fails, whatever the
//! bytes say.
//!
//! Not here: whether zstd follows (`memory::encoder`), whether a difference pays (`engine::memory::delta`).

use whimbrel_engine::memory::delta;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::PAGE_BYTES;

const WORDS: usize = PAGE_BYTES / 8;
const MASK_BYTES: usize = WORDS / 8;
/// Frequent word and mask.
const HEAD_BYTES: usize = 8 + MASK_BYTES;
/// A page is masked if at most this many of its words are others: an eighth saved pays for reading the mask.
const OTHERS_MAX: usize = WORDS * 7 / 8;
const SAMPLES: usize = 32;
/// Modes of a page: as it is; with its mask; with the mask of the masked page before it.
const PLAIN: u8 = 0;
const MASKED: u8 = 1;
const MASKED_ALIKE: u8 = 2;
/// Added to the mode of a page that stands there as its difference.
const DIFFERENCE: u8 = 4;

/// Writes the pages of `raw` (whole pages) into the front of `out` and returns how many bytes that took; nothing if
/// `out` is too small.
pub fn pack(raw: &[u8], out: &mut [u8]) -> Option<usize> {
    pack_changes(raw, out, |_| None, |_| ())
}

/// What a page would take, for pages of which the difference from the previous version is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The page's place in what is packed.
    pub index: usize,
    /// Bytes that the page takes by itself.
    pub plain_bytes: usize,
    /// Bytes that its difference takes.
    pub changed_bytes: usize,
    /// The difference stands there.
    pub paid: bool,
}

/// As [`pack`]; `difference` gives a page XORed with the version that the reader has, where that is known, and `tried`
/// learns what became of it.
pub fn pack_changes<'a>(
    raw: &[u8],
    out: &mut [u8],
    difference: impl Fn(usize) -> Option<&'a [u8]>,
    mut tried: impl FnMut(Tried),
) -> Option<usize> {
    let pages = raw.len() / PAGE_BYTES;
    let (modes, mut rest) = out.split_at_mut_checked(pages)?;
    let room = rest.len();
    let (mut masked, mut changed) = ([0; PAGE_BYTES + HEAD_BYTES], [0; PAGE_BYTES + HEAD_BYTES]);
    let mut last = None;
    for (index, (page, mode)) in raw.chunks_exact(PAGE_BYTES).zip(modes).enumerate() {
        let mut found = mask(page, frequent(page), &mut masked);
        let (mut masked, mut flag) = (&masked, 0);
        if let Some(changes) = difference(index) {
            let plain_bytes = found.unwrap_or(PAGE_BYTES);
            // Too many changes to be worth a mask take a whole page.
            let changed_bytes = mask(changes, 0, &mut changed).unwrap_or(PAGE_BYTES);
            let paid = delta::pays(changed_bytes, plain_bytes);
            tried(Tried { index, plain_bytes, changed_bytes, paid });
            if paid {
                (masked, found, flag) = (&changed, Some(changed_bytes), DIFFERENCE);
            }
        }
        let (form, parts) = match found.and_then(|len| split(masked.get(..len)?)) {
            None => (PLAIN, [page, &[], &[]]),
            // Arrays of one structure repeat its layout.
            Some((word, mask, others)) if last == Some(*mask) => (MASKED_ALIKE, [&word[..], &[], others]),
            Some((word, mask, others)) => {
                last = Some(*mask);
                (MASKED, [&word[..], &mask[..], others])
            }
        };
        *mode = form | flag;
        for part in parts {
            let (place, behind) = rest.split_at_mut_checked(part.len())?;
            place.copy_from_slice(part);
            rest = behind;
        }
    }
    Some(pages + room - rest.len())
}

/// Bytes that one page takes without its frequent word, as [`pack`] writes it.
pub fn packed_bytes(page: &[u8]) -> usize {
    let mut masked = [0; PAGE_BYTES + HEAD_BYTES];
    mask(page, frequent(page), &mut masked).unwrap_or(page.len())
}

/// Reads what [`pack`] wrote into `raw` (whole pages), or fails with kind `Corrupt`.
pub fn unpack(packed: &[u8], raw: &mut [u8]) -> Result<()> {
    let mut differences = Vec::new();
    unpack_changes(packed, raw, &mut differences)?;
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Corrupt, "read words of pages: a difference stands among them")),
    }
}

/// Reads what [`pack_changes`] wrote into `raw` (whole pages), or fails with kind `Corrupt`. `differences` gets the places
/// of the pages that are still to be XORed with their previous versions, ascending.
pub fn unpack_changes(packed: &[u8], raw: &mut [u8], differences: &mut Vec<usize>) -> Result<()> {
    let bad = || Error::new(ErrorKind::Corrupt, "read words of pages: they do not fill the pages exactly");
    let (modes, mut rest) = packed.split_at_checked(raw.len() / PAGE_BYTES).ok_or_else(bad)?;
    let mut last = None;
    differences.clear();
    for (index, (page, mode)) in raw.chunks_exact_mut(PAGE_BYTES).zip(modes).enumerate() {
        if mode & DIFFERENCE != 0 {
            differences.push(index);
        }
        let mode = mode & !DIFFERENCE;
        if mode == PLAIN {
            let (bytes, behind) = rest.split_at_checked(page.len()).ok_or_else(bad)?;
            rest = behind;
            page.copy_from_slice(bytes);
            continue;
        }
        let (word, behind) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
        rest = behind;
        if mode == MASKED {
            let (mask, behind) = rest.split_first_chunk::<MASK_BYTES>().ok_or_else(bad)?;
            (last, rest) = (Some(mask), behind);
        } else if mode != MASKED_ALIKE {
            return Err(bad());
        }
        rest = last.and_then(|mask| unmask(word, mask, rest, page)).ok_or_else(bad)?;
    }
    if rest.is_empty() { Ok(()) } else { Err(bad()) }
}

/// A masked page's frequent word, mask and other words.
fn split(masked: &[u8]) -> Option<(&[u8; 8], &[u8; MASK_BYTES], &[u8])> {
    let (word, rest) = masked.split_first_chunk()?;
    let (mask, others) = rest.split_first_chunk()?;
    Some((word, mask, others))
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// The word that a sample of the page has most often.
fn frequent(page: &[u8]) -> u64 {
    // Structures repeat at powers of two; an odd stride does not see the same field of each of them.
    let mut seen: [u64; SAMPLES] = std::array::from_fn(|index| {
        let at = index * (WORDS / SAMPLES - 1) * 8;
        page.get(at..at + 8).map_or(0, word)
    });
    seen.sort_unstable();
    let (mut best, mut most, mut run, mut last) = (0, 0_u32, 0_u32, 0);
    for word in seen {
        run = if word == last { run + 1 } else { 1 };
        last = word;
        if run > most {
            (best, most) = (word, run);
        }
    }
    best
}

/// Writes the masked page to the front of `out`; nothing if too few words are `common`.
fn mask(page: &[u8], common: u64, out: &mut [u8; PAGE_BYTES + HEAD_BYTES]) -> Option<usize> {
    let (head, others) = out.split_first_chunk_mut::<HEAD_BYTES>()?;
    let (fill, masks) = head.split_first_chunk_mut::<8>()?;
    *fill = common.to_le_bytes();
    let mut at = 0;
    for (eight, mask) in page.chunks_exact(64).zip(masks) {
        let mut bits = 0;
        // Every word is written, and the next one over it if it was the common one: no branch to be mispredicted.
        for (index, bytes) in eight.chunks_exact(8).enumerate() {
            let other = word(bytes) != common;
            others.get_mut(at..at + 8)?.copy_from_slice(bytes);
            at += if other { 8 } else { 0 };
            bits |= u8::from(other) << index;
        }
        *mask = bits;
    }
    (at <= OTHERS_MAX * 8).then_some(HEAD_BYTES + at)
}

/// Fills the page from its frequent word, its mask and the others; returns what follows them.
fn unmask<'a>(
    fill: &[u8; 8],
    masks: &[u8; MASK_BYTES],
    others: &'a [u8],
    page: &mut [u8],
) -> Option<&'a [u8]> {
    let count: u32 = masks.iter().map(|mask| mask.count_ones()).sum();
    let (others, behind) = others.split_at_checked(count as usize * 8)?;
    let mut others = others.chunks_exact(8);
    for (eight, mask) in page.chunks_exact_mut(64).zip(masks) {
        for (index, place) in eight.chunks_exact_mut(8).enumerate() {
            let other = mask >> index & 1 == 1;
            place.copy_from_slice(if other { others.next()? } else { fill });
        }
    }
    Some(behind)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// Pages of `kinds`: how many of eight words differ from the frequent one.
    fn pages(kinds: &[(u64, u8)]) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut raw = Vec::new();
        for (common, others) in kinds {
            for _ in 0..WORDS {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let word = if (state >> 40) % 8 < u64::from(*others) { state } else { *common };
                raw.extend(word.to_le_bytes());
            }
        }
        raw
    }

    #[test]
    fn half_empty_pages_take_half_and_noise_takes_itself() {
        let mut out = vec![0; 3 * PAGE_BYTES];
        let len = pack(&pages(&[(0, 4), (7, 4)]), &mut out).unwrap();
        assert!((3900..4500).contains(&len), "{len}");
        let noise = pages(&[(0, 8)]);
        assert_eq!(pack(&noise, &mut out), Some(1 + PAGE_BYTES));
        assert_eq!(pack(&noise, &mut out[..PAGE_BYTES]), None);
        assert_eq!(pack(&[], &mut []), Some(0));
    }

    #[test]
    fn a_layout_that_repeats_is_said_once() {
        let page = |common: u64| -> Vec<u8> {
            let word = |at: u64| if at.is_multiple_of(4) { at * 0x9e37_79b9 + common + 1 } else { common };
            (0..WORDS as u64).flat_map(|at| word(at).to_le_bytes()).collect()
        };
        let noise = pages(&[(0, 8)]);
        let raw = [page(5), page(1 << 40), noise, page(9)].concat();
        let mut out = vec![0; raw.len() + 4];
        let len = pack(&raw, &mut out).unwrap();
        assert_eq!(out[..4], [MASKED, MASKED_ALIKE, PLAIN, MASKED_ALIKE]);
        assert_eq!(len, 4 + PAGE_BYTES + MASK_BYTES + 3 * (8 + 128 * 8));
        let mut back = vec![0; raw.len()];
        unpack(&out[..len], &mut back).unwrap();
        assert!(back == raw);
        // Nothing comes before the first page.
        out[0] = MASKED_ALIKE;
        assert!(unpack(&out[..len - MASK_BYTES], &mut back).is_err());
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(kinds in prop::collection::vec((any::<u64>(), 0u8..9), 0..5), room in 0usize..22_000) {
            let raw = pages(&kinds);
            let mut out = vec![0; room];
            if let Some(len) = pack(&raw, &mut out) {
                let mut back = vec![0xa5; raw.len()];
                unpack(&out[..len], &mut back).unwrap();
                prop_assert_eq!(back, raw);
            } else {
                prop_assert!(room < raw.len() + kinds.len());
            }
        }

        /// Pages of which some words changed come back from the differences and the versions before.
        #[test]
        fn changes_and_the_versions_before_make_the_pages(
            kinds in prop::collection::vec((any::<u64>(), 0u8..9, 0usize..600, any::<bool>()), 1..6),
            room in 0usize..26_000,
        ) {
            let plain: Vec<(u64, u8)> = kinds.iter().map(|(word, others, ..)| (*word, *others)).collect();
            let before = pages(&plain);
            let mut raw = before.clone();
            for (page, (word, _, changed, _)) in raw.chunks_exact_mut(PAGE_BYTES).zip(&kinds) {
                for at in (0..WORDS).step_by((WORDS / changed.max(&1)).max(1)).take(*changed) {
                    page[at * 8] ^= (word >> 8) as u8 | 1;
                }
            }
            let difference: Vec<u8> = raw.iter().zip(&before).map(|(a, b)| a ^ b).collect();
            let known = |index: usize| {
                kinds[index].3.then(|| &difference[index * PAGE_BYTES..(index + 1) * PAGE_BYTES])
            };
            let (mut out, mut paid) = (vec![0; room], Vec::new());
            let len = pack_changes(&raw, &mut out, known, |tried| {
                assert!(kinds[tried.index].3 && (!tried.paid || tried.changed_bytes < tried.plain_bytes));
                if tried.paid {
                    paid.push(tried.index);
                }
            });
            let Some(len) = len else {
                prop_assert!(room < raw.len() + kinds.len());
                return Ok(());
            };
            let (mut back, mut differences) = (vec![0xa5; raw.len()], vec![99]);
            unpack_changes(&out[..len], &mut back, &mut differences).unwrap();
            prop_assert_eq!(&differences, &paid);
            prop_assert_eq!(unpack(&out[..len], &mut vec![0; raw.len()]).is_err(), !paid.is_empty());
            for index in differences {
                let range = index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
                back[range.clone()].iter_mut().zip(&before[range]).for_each(|(a, b)| *a ^= b);
            }
            prop_assert!(back == raw);
            // A few changed words of a page without a frequent one are sent as such.
            for (index, (_, others, changed, known)) in kinds.iter().enumerate() {
                prop_assert!(!(*known && *others == 8 && *changed < 100) || paid.contains(&index));
            }
        }

        #[test]
        fn foreign_bytes_fill_the_pages_exactly_or_fail(
            packed in prop::collection::vec(any::<u8>(), 0..9000),
            modes in prop::collection::vec(0u8..9, 0..4),
        ) {
            let bytes: Vec<u8> = modes.iter().copied().chain(packed).collect();
            let (mut raw, mut differences) = (vec![0; modes.len() * PAGE_BYTES], Vec::new());
            let plain = unpack(&bytes, &mut raw);
            let changes = unpack_changes(&bytes, &mut raw, &mut differences);
            if changes.is_ok() {
                let marked: Vec<usize> = (0..modes.len()).filter(|at| modes[*at] & DIFFERENCE != 0).collect();
                prop_assert_eq!(plain.is_ok(), marked.is_empty());
                prop_assert_eq!(differences, marked);
            }
        }

        #[test]
        fn a_cut_or_longer_text_fails(kinds in prop::collection::vec((any::<u64>(), 0u8..9), 1..4), cut in 1usize..100) {
            let raw = pages(&kinds);
            let mut out = vec![0; raw.len() + kinds.len() + cut];
            let len = pack(&raw, &mut out).unwrap();
            let mut back = vec![0; raw.len()];
            prop_assert!(unpack(&out[..len - cut.min(len)], &mut back).is_err());
            prop_assert!(unpack(&out[..len + cut], &mut back).is_err());
        }
    }
}
