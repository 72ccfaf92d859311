//! Pages that do not travel with their bytes, over a pipe: changes, references, and what becomes of those that the target
//! does not find.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use proptest::prelude::*;
use whimbrel_wire::peer::memory::{
    Control, Encoding, HASH_BYTES, MISSING_RUNS_MAX, Missing, Reference, RoundCounts, Run, put_pages,
};

use super::bitmap::PageBitmap;
use super::disks::{Disks, Images};
use super::frames;
use super::lookup::Lookup;
use super::ram::RamFile;
use super::ram::test::ram;
use super::reference::hash;
use super::test::{again, hostile, noise, page, runtime, same, start_with};
use super::{PAGE_BYTES, Techniques};
use crate::block_dev::{BlockDev as _, BlockRead};
use crate::error::ErrorKind;
use crate::export::test_device::RamDevice;
use crate::export::{FilledFrom, Fills};

const DELTA: Techniques = Techniques { delta_bytes: 1 << 20, ..Techniques::NONE };
const SAME: Techniques = Techniques { same: true, ..Techniques::NONE };

fn fill(ram: &RamFile) {
    for number in 0..ram.pages() {
        ram.write(number, &noise(number, PAGE_BYTES)).unwrap();
    }
}

fn change(ram: &RamFile, number: u64, at: usize, to: u8) {
    let mut bytes = vec![0; PAGE_BYTES];
    ram.read(number, &mut bytes).unwrap();
    bytes[at] = to;
    ram.write(number, &bytes).unwrap();
}

fn flip(ram: &RamFile, number: u64, at: usize, bits: u8) {
    let byte = read(ram, number)[at];
    change(ram, number, at, byte ^ bits);
}

fn read(ram: &RamFile, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    ram.read(number, &mut bytes).unwrap();
    bytes
}

fn set(pages: u64, numbers: impl IntoIterator<Item = u64>) -> Vec<PageBitmap> {
    let mut set = PageBitmap::new(pages);
    numbers.into_iter().for_each(|number| set.set(number));
    vec![set]
}

/// What a guest does to a page between two rounds.
#[derive(Clone, Copy, Debug)]
enum Write {
    /// One byte.
    Byte(u8),
    /// All of it, with noise.
    New(u8),
    /// What another page holds.
    Copy(u64),
    /// The bytes that stand there.
    Same,
    Zero,
    Pattern(u8),
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        4 => any::<u8>().prop_map(Write::Byte),
        2 => any::<u8>().prop_map(Write::New),
        3 => (0u64..1000).prop_map(Write::Copy),
        2 => Just(Write::Same),
        1 => Just(Write::Zero),
        1 => any::<u8>().prop_map(Write::Pattern),
    ]
}

fn apply(ram: &RamFile, number: u64, write: Write) {
    match write {
        Write::Byte(byte) => change(ram, number, usize::from(byte) * 16, byte),
        Write::New(seed) => ram.write(number, &noise(u64::from(seed) + 5000, PAGE_BYTES)).unwrap(),
        Write::Copy(other) => ram.write(number, &read(ram, other % ram.pages())).unwrap(),
        Write::Same => {}
        Write::Zero => ram.write(number, &[0; PAGE_BYTES]).unwrap(),
        Write::Pattern(byte) => ram.write(number, &[byte; PAGE_BYTES]).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// A guest that rewrites pages between rounds and while they run arrives as it is, whatever is used.
    #[test]
    fn a_guest_that_rewrites_pages_arrives_as_it_is(
        pages in 1u64..300,
        rounds in prop::collection::vec(prop::collection::vec((0u64..1000, write()), 0..60), 1..7),
        delta_kib in 0u64..2000,
        same_pages: bool,
        // What stands at the target changes behind everybody's back, which nothing but a check can find.
        broken in prop::collection::vec((0usize..7, 0u64..1000), 0..3),
    ) {
        runtime().block_on(async {
            let (from, to) = (ram(pages), ram(pages));
            fill(&from);
            let techniques = Techniques { delta_bytes: delta_kib << 10, same: same_pages, ..Techniques::NONE };
            let (mut source, receiving, progress) = start_with(&[again(&from)], &[again(&to)], techniques).await;
            source.send_round(&source.full_sets(), false).await.unwrap();
            let mut dirty = PageBitmap::new(pages);
            for (index, writes) in rounds.iter().enumerate() {
                let last = index + 1 == rounds.len();
                let (before, during) = writes.split_at(if last { writes.len() } else { writes.len() / 2 });
                for (number, write) in before {
                    apply(&from, number % pages, *write);
                    dirty.set(number % pages);
                }
                for (when, number) in &broken {
                    // Dirty at the source, too: what nobody sends again nobody can find.
                    if *when == index {
                        flip(&to, number % pages, 77, 1);
                        flip(&from, number % pages, 99, index as u8 + 1);
                        dirty.set(number % pages);
                    }
                }
                let set = [dirty.take()];
                if last {
                    source.send_round(&set, true).await.unwrap();
                    prop_assert!(source.lacking().is_empty());
                    break;
                }
                let mut during = during.iter();
                let mut rewritten = || {
                    let mut fresh = PageBitmap::new(pages);
                    if let Some((number, write)) = during.next() {
                        // Marked behind the write, as a tracker does.
                        apply(&from, number % pages, *write);
                        fresh.set(number % pages);
                    }
                    dirty.merge(&fresh);
                    Ok(vec![fresh])
                };
                source.send_round_while_running(&set, &mut rewritten).await.unwrap();
            }
            let figures = progress.get();
            prop_assert!(same_pages || figures.shortened.same.pages == 0);
            prop_assert!(delta_kib >= 4 || figures.shortened.delta.pages + figures.shortened.unchanged_pages == 0);
            prop_assert!(!broken.is_empty() || figures.misses.is_none());
            source.compare_digests().await.unwrap();
            source.close().await.unwrap();
            prop_assert!(receiving.await.unwrap().unwrap().complete);
            prop_assert!(same(&[again(&from)], &[again(&to)]));
            Ok(())
        })?;
    }
}

#[test]
fn hot_pages_travel_as_their_changes_from_the_third_time_on() {
    runtime().block_on(async {
        let (from, to) = (ram(200), ram(200));
        fill(&from);
        let (mut source, receiving, progress) = start_with(&[again(&from)], &[again(&to)], DELTA).await;
        let mut bytes = Vec::new();
        for round in 1..=4 {
            (0..200).for_each(|number| change(&from, number, 1000, round));
            bytes.push(source.send_round(&source.full_sets(), round == 4).await.unwrap().wire_bytes);
        }
        assert!(bytes[1] > 800_000 && bytes[2] < 40_000 && bytes[3] < 40_000, "{bytes:?}");
        let did = progress.get().shortened;
        assert_eq!((did.delta.pages, did.unchanged_pages), (400, 0));
        assert!(did.delta.bytes > 400 * 3900, "{did:?}");
        // What was written as it was is not sent at all.
        let report = source.send_round(&source.full_sets(), true).await.unwrap();
        assert_eq!((report.counts.pages(), progress.get().shortened.unchanged_pages), (0, 200));
        source.close().await.unwrap();
        assert!(receiving.await.unwrap().unwrap().complete);
        assert!(same(&[from], &[to]));
    });
}

#[test]
fn a_change_to_a_version_that_the_target_has_not_is_sent_whole_in_the_next_round_or_in_the_last_one_itself() {
    for last in [false, true] {
        runtime().block_on(async {
            let (from, to) = (ram(100), ram(100));
            fill(&from);
            let (mut source, receiving, progress) = start_with(&[again(&from)], &[again(&to)], DELTA).await;
            source.send_round(&source.full_sets(), false).await.unwrap();
            source.send_round(&set(100, 0..100), false).await.unwrap();
            change(&to, 50, 1, 0xee);
            change(&from, 50, 2000, 1);
            let report = source.send_round(&set(100, [50]), last).await.unwrap();
            assert_eq!(progress.get().misses.delta, 1);
            if last {
                assert_eq!((report.missing_pages, report.counts.data_pages), (0, 2));
            } else {
                assert_eq!((report.missing_pages, report.to_engine(5, 0).dirty_pages), (1, 6));
                assert!(source.lacking()[0].contains(50));
                assert_ne!(read(&from, 50), read(&to, 50));
                // Nobody names the page again; it is owed.
                let report = source.send_round(&source.empty_sets(), true).await.unwrap();
                assert_eq!((report.missing_pages, report.counts.data_pages), (0, 1));
            }
            source.compare_digests().await.unwrap();
            source.close().await.unwrap();
            assert!(receiving.await.unwrap().unwrap().complete);
        });
    }
}

#[test]
fn equal_pages_travel_once() {
    runtime().block_on(async {
        let (from, to) = (ram(2000), ram(2000));
        for number in 0..2000 {
            from.write(number, &noise(number % 10, PAGE_BYTES)).unwrap();
        }
        let (mut source, receiving, progress) = start_with(&[again(&from)], &[again(&to)], SAME).await;
        let report = source.send_round(&source.full_sets(), false).await.unwrap();
        // Two workers may meet a content at the same time.
        assert!(report.counts.data_pages <= 20 && report.counts.pages() == 2000, "{report:?}");
        assert!(report.wire_bytes < 200_000, "{report:?}");
        let did = progress.get().shortened.same;
        assert_eq!(did.pages, report.counts.referred_pages);
        assert!(did.bytes > did.pages * 4000);
        // Sent again as they were, they are named by themselves, even when the guest stands still.
        let report = source.send_round(&source.full_sets(), true).await.unwrap();
        assert_eq!((report.counts.referred_pages, report.missing_pages), (2000, 0));
        assert!(progress.get().misses.is_none());
        source.compare_digests().await.unwrap();
        source.close().await.unwrap();
        assert!(receiving.await.unwrap().unwrap().complete);
    });
}

#[test]
fn pages_of_a_pattern_are_sent_and_not_named() {
    runtime().block_on(async {
        let (from, to) = (ram(500), ram(500));
        (0..500).for_each(|number| from.write(number, &[7; PAGE_BYTES]).unwrap());
        let (mut source, receiving, _) = start_with(&[again(&from)], &[again(&to)], SAME).await;
        let report = source.send_round(&source.full_sets(), false).await.unwrap();
        assert_eq!((report.counts.data_pages, report.counts.referred_pages), (500, 0));
        assert!(report.wire_bytes < 10_000, "{report:?}");
        source.close().await.unwrap();
        receiving.await.unwrap().unwrap();
        assert!(same(&[from], &[to]));
    });
}

/// The page that is named was overwritten: in the guest, which the source sees, or only at the target.
#[test]
fn a_page_named_by_one_that_was_overwritten_since_arrives_all_the_same() {
    for (at_target, last) in [(false, false), (false, true), (true, false), (true, true)] {
        runtime().block_on(async {
            let (from, to) = (ram(100), ram(100));
            fill(&from);
            let (mut source, receiving, progress) = start_with(&[again(&from)], &[again(&to)], SAME).await;
            source.send_round(&source.full_sets(), false).await.unwrap();
            let named = read(&from, 30);
            from.write(60, &named).unwrap();
            if at_target {
                to.write(30, &page(1, 999)).unwrap();
            } else {
                from.write(30, &page(1, 999)).unwrap();
            }
            let report = source.send_round(&set(100, [60]), last).await.unwrap();
            // Last rounds name pages by themselves only.
            let missed = u64::from(at_target && !last);
            assert_eq!((progress.get().misses.same, report.missing_pages), (missed, missed));
            source.send_round(&set(100, [30]), true).await.unwrap();
            assert_eq!(read(&to, 60), named);
            // The target's own mistake: page 30 was told to be as it had been sent, and was found not to be.
            assert_eq!(progress.get().misses.same, missed + u64::from(at_target));
            source.compare_digests().await.unwrap();
            source.close().await.unwrap();
            assert!(receiving.await.unwrap().unwrap().complete);
        });
    }
}

#[test]
fn a_target_that_knows_nothing_gets_nothing_of_it() {
    runtime().block_on(async {
        let (from, to) = (ram(300), ram(300));
        (0..300).for_each(|number| from.write(number, &noise(number % 3, PAGE_BYTES)).unwrap());
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let options = super::TargetOptions { techniques: Techniques::NONE, ..Default::default() };
        let blocks = vec![again(&to)];
        let receiving = tokio::spawn(async move {
            super::target::receive(&mut far, blocks, &options, &super::Progress::default()).await
        });
        let progress = super::Progress::default();
        let (blocks, options) = (vec![again(&from)], super::SourceOptions::default());
        let mut source = super::Source::open(near, blocks, options, progress.clone()).await.unwrap();
        for round in 1..4 {
            let report = source.send_round(&source.full_sets(), round == 3).await.unwrap();
            assert_eq!(report.counts.data_pages, 300);
        }
        assert_eq!(progress.get().shortened, Default::default());
        source.close().await.unwrap();
        assert!(receiving.await.unwrap().unwrap().complete);
        assert!(same(&[from], &[to]));
    });
}

fn references(list: &[Reference]) -> Vec<u8> {
    let mut payload = Vec::new();
    list.iter().for_each(|reference| reference.put(&mut payload));
    payload
}

fn frame(encoding: Encoding, runs: &[Run], raw: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_pages(&mut bytes, 1, 0, encoding, runs, raw, payload);
    bytes
}

fn control(message: &Control) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.put(&mut bytes, 1).unwrap();
    bytes
}

#[tokio::test]
async fn hostile_references_and_changes_end_the_stream_or_are_lacking_but_write_nothing() {
    let runs = [Run { first_page: 3, pages: 1 }];
    let good = Reference { object: 0, index: 7, hash: hash(&[0; PAGE_BYTES]) };
    let end = |counts| control(&Control::RoundEnd { counts });
    let referred = RoundCounts { referred_pages: 1, ..Default::default() };
    for (what, reference) in [
        ("a block that does not exist", Reference { object: 1, ..good }),
        ("a page behind the end", Reference { index: 100, ..good }),
    ] {
        let payload = references(&[reference]);
        let bytes = [frame(Encoding::SamePages, &runs, &payload, &payload), end(referred)].concat();
        assert_eq!(hostile(bytes).await.unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
    }
    let mut payload = references(&[good]);
    payload[2] = 1;
    let bytes = [frame(Encoding::SamePages, &runs, &payload, &payload), end(referred)].concat();
    assert_eq!(hostile(bytes).await.unwrap_err().kind(), ErrorKind::Corrupt, "reserved bits");
    // A wrong check of changes is not an error, unless there are none.
    let words = [&[1][..], &[0; 72]].concat();
    let data = RoundCounts { data_pages: 1, ..Default::default() };
    let bytes = [frame(Encoding::Changes, &runs, &[1; PAGE_BYTES], &words), end(data)].concat();
    assert_eq!(hostile(bytes).await.unwrap_err().kind(), ErrorKind::Corrupt, "changes of nothing");

    let wrong = Reference { hash: [1; HASH_BYTES], ..good };
    let disk = Reference { object: 9, ..good };
    let changed = [&[5][..], &[0; 72]].concat();
    for (encoding, payload, raw, counts) in [
        (Encoding::SamePages, references(&[wrong]), references(&[wrong]), referred),
        (Encoding::DiskBlocks, references(&[disk]), references(&[disk]), referred),
        (Encoding::Changes, changed, vec![9; PAGE_BYTES], data),
    ] {
        let to = ram(100);
        to.write(3, &page(1, 5)).unwrap();
        let (mut near, mut far) = tokio::io::duplex(1 << 20);
        let blocks = vec![again(&to)];
        let receiving = tokio::spawn(async move {
            super::target::receive(
                &mut far,
                blocks,
                &super::TargetOptions::default(),
                &super::Progress::default(),
            )
            .await
        });
        let limit = std::time::Duration::from_secs(1);
        let shapes = vec![whimbrel_wire::peer::memory::BlockShape { name: "mem".into(), pages: 100 }];
        frames::write_control(&mut near, &Control::Open { blocks: shapes }, 0, limit).await.unwrap();
        frames::read_control(&mut near, limit).await.unwrap();
        frames::write_control(&mut near, &Control::RoundBegin { last: true }, 1, limit).await.unwrap();
        let bytes = [frame(encoding, &runs, &raw, &payload), end(counts)].concat();
        tokio::io::AsyncWriteExt::write_all(&mut near, &bytes).await.unwrap();
        let Control::RoundDone { missing, misses, .. } =
            frames::read_control(&mut near, limit).await.unwrap()
        else {
            panic!("{encoding:?} ended the round");
        };
        assert_eq!((missing, misses.delta + misses.same + misses.disk), (vec![Missing(0, 3, 1)], 1));
        frames::write_control(&mut near, &Control::Close, 1, limit).await.unwrap();
        assert!(!receiving.await.unwrap().unwrap().complete, "{encoding:?}");
        assert_eq!(read(&to, 3), page(1, 5));
    }
}

#[test]
fn what_is_lacking_is_told_in_a_bounded_list_that_leaves_nothing_out() {
    let block = ram(40_000);
    let lookup = Lookup::new(vec![again(&block)].into(), Images::default());
    let lacking: Vec<u32> = (0..40_000).filter(|page| page % 3 == 0).collect();
    for group in lacking.chunks(100) {
        let runs: Vec<Run> = group.iter().map(|page| Run { first_page: *page, pages: 1 }).collect();
        let payload =
            references(&vec![Reference { object: 0, index: 1, hash: [7; HASH_BYTES] }; group.len()]);
        let bytes = frame(Encoding::SamePages, &runs, &payload, &payload);
        let (head, body) = bytes.split_first_chunk().unwrap();
        let header = whimbrel_wire::peer::memory::Header::parse(head).unwrap();
        let pages = whimbrel_wire::peer::memory::Pages::parse(&header, body, &[40_000]).unwrap();
        lookup.resolve(&pages, &mut [0; PAGE_BYTES]).unwrap();
    }
    let (missing, misses) = lookup.end_round().unwrap();
    assert_eq!(misses.same, lacking.len() as u64);
    assert!(missing.len() <= MISSING_RUNS_MAX, "{}", missing.len());
    let told =
        |page: u32| missing.iter().any(|Missing(_, first, pages)| (*first..first + pages).contains(&page));
    assert!(lacking.iter().all(|page| told(*page)));
    // The next round begins anew.
    assert!(lookup.end_round().unwrap().0.is_empty());
}

/// A disk's image of noise, of which every third block was changed at one end, and pages that were filled from it.
fn image_of(blocks: u64, salt: u64) -> Arc<dyn BlockRead> {
    let image = RamDevice::new(blocks as usize * PAGE_BYTES);
    for block in 0..blocks {
        let seed = if block % 3 == 0 { block + salt } else { block };
        let bytes = noise(seed + 7000, PAGE_BYTES);
        image.write(block * PAGE_BYTES as u64, &[IoSlice::new(&bytes)]).unwrap();
    }
    Arc::new(image)
}

async fn move_with_image(theirs: Option<Arc<dyn BlockRead>>, rounds: u64) -> super::Figures {
    const PAGES: u64 = 300;
    let (from, to, ours) = (ram(PAGES), ram(PAGES), image_of(PAGES, 0));
    let (fills, mut filled) = (Arc::new(Fills::new(PAGES << 12)), FilledFrom::default());
    filled.add(0, PAGES << 12, Arc::clone(&fills));
    let mut block = vec![0; PAGE_BYTES];
    for number in 0..PAGES {
        // Pages hold blocks in another order; some were written since, of some nothing is known.
        let from_block = (number * 7) % PAGES;
        assert!(ours.read_here(from_block << 12, &mut [IoSliceMut::new(&mut block)]).unwrap());
        from.write(number, &block).unwrap();
        match number % 10 {
            0 => {}
            1 => {
                fills.note(number << 12, 4096, from_block << 12);
                flip(&from, number, 99, 1);
            }
            2 => fills.note(number << 12, 4096, (PAGES + 5) << 12),
            _ => fills.note(number << 12, 4096, from_block << 12),
        }
    }
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let techniques = Techniques { disk: true, ..Techniques::NONE };
    let images = Images(vec![None, theirs]);
    let target = super::TargetOptions { images, techniques, ..Default::default() };
    let blocks = vec![again(&to)];
    let receiving = tokio::spawn(async move {
        super::target::receive(&mut far, blocks, &target, &super::Progress::default()).await
    });
    let (progress, blocks) = (super::Progress::default(), vec![again(&from)]);
    // The VM's second disk.
    let disks = Disks { images: Images(vec![None, Some(ours)]), filled: vec![None, Some(filled)], block: 0 };
    let options = super::SourceOptions { disks, ..Default::default() };
    let mut source = super::Source::open(near, blocks, options, progress.clone()).await.unwrap();
    for _ in 0..rounds {
        source.send_round(&source.full_sets(), false).await.unwrap();
    }
    source.send_round(&source.empty_sets(), true).await.unwrap();
    source.compare_digests().await.unwrap();
    source.close().await.unwrap();
    assert!(receiving.await.unwrap().unwrap().complete);
    assert!(same(&[from], &[to]));
    progress.get()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_filled_from_an_image_that_the_target_has_do_not_travel() {
    let figures = move_with_image(Some(image_of(300, 0)), 1).await;
    assert_eq!((figures.shortened.disk.pages, figures.misses.disk), (210, 0));
    assert!(figures.wire_bytes < 90 * 4200 + 210 * 40, "{figures:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_the_target_has_not_or_has_otherwise_are_sent_whole() {
    let figures = move_with_image(Some(image_of(300, 500)), 1).await;
    assert_eq!(figures.shortened.disk.pages, 210);
    assert!((60..=80).contains(&figures.misses.disk), "{figures:?}");
    // A smaller image: what lies behind its end is not there. More misses than finds, and no more of it is tried.
    let figures = move_with_image(Some(image_of(100, 0)), 3).await;
    assert_eq!(figures.shortened.disk.pages, 210);
    assert!((130..=150).contains(&figures.misses.disk), "{figures:?}");
    // No image at all: nothing is tried.
    let figures = move_with_image(None, 1).await;
    assert_eq!((figures.shortened.disk.pages, figures.misses.disk), (0, 0));
}
