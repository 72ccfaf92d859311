//! Manifests, packs and indexes: round trips, damage, hostile bytes.

use super::*;
use crate::id::BlockHash;

fn entry(n: u8) -> Entry {
    Entry { hash: BlockHash([n; 32]), pack: 1, offset: 7, length: 500, encoding: Encoding::Zstd }
}

#[test]
fn every_record_reads_back() {
    let header = ManifestHeader { size_bytes: 10 << 30, packs: 3, entries: 70, data_bytes: 70 << 17 };
    assert_eq!(ManifestHeader::decode(&header.encode()).unwrap(), header);
    assert_eq!(header.file_bytes(), 64 + 3 * 32 + (10 << 30 >> 17) / 64 * 16 + 70 * 48);
    assert_eq!(Entry::decode(&entry(3).encode(), 2).unwrap(), entry(3));
    assert!(Entry::decode(&entry(3).encode(), 1).is_err(), "the pack is not in the list");
    let directory = Directory { present: 0b1011, first_entry: 40 };
    assert_eq!(Directory::decode(&directory.encode()).unwrap(), directory);
    let entries: Vec<_> = (64..68).map(|block| directory.entry_of(block)).collect();
    assert_eq!(entries, [Some(40), Some(41), None, Some(42)]);
    let index = IndexHeader { packs: 2, entries: 9 };
    assert_eq!(IndexHeader::decode(&index.encode()).unwrap(), index);
}

#[test]
fn a_packs_tail_reads_back_and_damage_is_found() {
    let blocks = [
        PackEntry { hash: BlockHash([1; 32]), offset: 0, length: 100, encoding: Encoding::Raw },
        PackEntry { hash: BlockHash([2; 32]), offset: 100, length: 50, encoding: Encoding::Zstd },
    ];
    let tail = encode_pack_tail(&blocks);
    let (index, trailer) = tail.split_at(tail.len() - PACK_TRAILER_BYTES);
    let trailer = PackTrailer::decode(trailer).unwrap();
    assert_eq!(decode_pack_index(index, &trailer, 150).unwrap(), blocks);
    assert!(decode_pack_index(index, &trailer, 149).is_err());
    let mut bad = index.to_vec();
    bad[40] ^= 1;
    assert!(decode_pack_index(&bad, &trailer, 150).is_err());
}

#[test]
fn cut_short_or_changed_bytes_never_panic_and_unknown_versions_are_named() {
    let header = ManifestHeader { size_bytes: 1 << 20, packs: 1, entries: 8, data_bytes: 1 << 20 };
    let good = header.encode();
    for cut in 0..48 {
        assert!(ManifestHeader::decode(&good[..cut]).is_err());
    }
    for place in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good;
            bad[place] ^= 1 << bit;
            if let Ok(read) = ManifestHeader::decode(&bad) {
                // Whatever passes is small enough to compute with.
                assert!(read.file_bytes() < 1 << 50);
            }
        }
    }
    let mut newer = good;
    newer[8] = 9;
    assert_eq!(ManifestHeader::decode(&newer).unwrap_err().kind, ErrorKind::Unsupported);
    for byte in 0..=255 {
        let _ = Entry::decode(&[byte; 48], u64::from(byte));
        let _ = Directory::decode(&[byte; 16]).map(|directory| directory.entry_of(u64::from(byte)));
        let _ = PackTrailer::decode(&[byte; 64]);
        let _ = IndexHeader::decode(&[byte; 32]);
    }
}

#[test]
fn block_lengths_add_up() {
    assert_eq!(block_len(BLOCK_BYTES as u64 + 512, 0), BLOCK_BYTES as usize);
    assert_eq!(block_len(BLOCK_BYTES as u64 + 512, 1), 512);
    assert_eq!(block_len(BLOCK_BYTES as u64 + 512, 2), 0);
    assert_eq!(block_len(u64::MAX, u64::MAX), 0);
    assert_eq!(block_count(BLOCK_BYTES as u64 + 512), 2);
}
