//! Both sides of a move of memory, over a pipe.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use whimbrel_wire::peer::memory::{Control, Encoding, Header, Run, put_pages};

use super::ram::digest;
use super::ram::test::ram;
use super::*;
use crate::error::{ErrorKind, Result};

/// The same file again.
pub fn again(ram: &RamFile) -> RamFile {
    ram.try_clone().unwrap()
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed << 1 | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(len)
    .collect()
}

/// A page's content by kind: zero, noise, compressible.
pub fn page(kind: u8, seed: u64) -> Vec<u8> {
    match kind % 3 {
        0 => vec![0; PAGE_BYTES],
        1 => noise(seed, PAGE_BYTES),
        _ => noise(seed, 16).repeat(PAGE_BYTES / 16),
    }
}

fn start_target(blocks: &[RamFile], mut stream: DuplexStream) -> tokio::task::JoinHandle<Result<Received>> {
    let blocks = blocks.iter().map(again).collect();
    let options = TargetOptions { stall_limit: Duration::from_secs(5), ..TargetOptions::default() };
    tokio::spawn(async move { target::receive(&mut stream, blocks, &options, &Progress::default()).await })
}

/// A target at work.
pub type Receiving = tokio::task::JoinHandle<Result<Received>>;

async fn start(source: &[RamFile], target: &[RamFile]) -> (Source<DuplexStream>, Receiving) {
    let (source, receiving, _) = start_with(source, target, Techniques::default()).await;
    (source, receiving)
}

/// Both ends, with what the source may use, and the figures.
pub async fn start_with(
    source: &[RamFile],
    target: &[RamFile],
    techniques: Techniques,
) -> (Source<DuplexStream>, Receiving, Progress) {
    let (near, far) = duplex(300_000);
    let receiving = start_target(target, far);
    let options = SourceOptions {
        stall_limit: Duration::from_secs(5),
        workers: 2,
        look_every: Duration::ZERO,
        techniques,
        ..SourceOptions::default()
    };
    let (blocks, progress) = (source.iter().map(again).collect(), Progress::default());
    (Source::open(near, blocks, options, progress.clone()).await.unwrap(), receiving, progress)
}

pub fn same(a: &[RamFile], b: &[RamFile]) -> bool {
    digest(a, 2).unwrap() == digest(b, 2).unwrap()
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn rounds_of_any_pages_make_the_target_equal(
        sizes in prop::collection::vec(1u64..400, 1..4),
        rounds in prop::collection::vec(
            prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1u64..90, any::<u8>()), 0..12),
            1..4,
        ),
    ) {
        runtime().block_on(async {
            let from: Vec<_> = sizes.iter().map(|pages| ram(*pages)).collect();
            let to: Vec<_> = sizes.iter().map(|pages| ram(*pages)).collect();
            // The target's files may hold anything before the first round.
            to[0].write(0, &page(1, 99)).unwrap();
            let (mut source, receiving) = start(&from, &to).await;
            let mut sent = 0;
            for (number, writes) in rounds.iter().enumerate() {
                let mut dirty = if number == 0 { source.full_sets() } else { source.empty_sets() };
                for (seed, (block, first, len, kind)) in writes.iter().enumerate() {
                    let block = block.index(from.len());
                    let first = first.index(usize::try_from(sizes[block]).unwrap()) as u64;
                    let end = (first + len).min(sizes[block]);
                    for at in first..end {
                        from[block].write(at, &page(*kind, seed as u64 * 1000 + at)).unwrap();
                    }
                    dirty[block].set_range(first, end - first);
                }
                let report = source.send_round(&dirty, number + 1 == rounds.len()).await.unwrap();
                let pages: u64 = dirty.iter().map(PageBitmap::count).sum();
                // What was written again as it was need not be sent.
                prop_assert!(report.counts.pages() <= pages && (number > 1 || report.counts.pages() == pages));
                sent += report.counts.pages();
            }
            source.compare_digests().await.unwrap();
            source.close().await.unwrap();
            let received = receiving.await.unwrap().unwrap();
            prop_assert!(received.complete && received.rounds as usize == rounds.len());
            prop_assert_eq!(received.counts.pages(), sent);
            prop_assert!(same(&from, &to));
            Ok(())
        })?;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_written_while_they_are_read_arrive_in_their_last_version() {
    const PAGES: u64 = 2000;
    let (from, to) = ([ram(PAGES)], [ram(PAGES)]);
    let (mut source, receiving) = start(&from, &to).await;
    let (dirty, stop, written) = (SharedDirty::new(PAGES), AtomicBool::new(false), AtomicU64::new(0));
    let mut last = std::thread::scope(|scope| {
        scope.spawn(|| {
            for version in 1u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let at = version.wrapping_mul(0x9e37_79b9) % PAGES;
                // Some pages become zero, so that they change kind between rounds.
                from[0].write(at, &vec![(version % 7) as u8; PAGE_BYTES]).unwrap();
                dirty.mark(at, 1);
                written.store(version, Ordering::Relaxed);
            }
        });
        let sent = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                let mut sets = source.full_sets();
                for rounds in 1.. {
                    source.send_round(&sets, false).await.unwrap();
                    sets = source.empty_sets();
                    dirty.drain_into(&mut sets[0]);
                    if rounds >= 10 && written.load(Ordering::Relaxed) > 5000 {
                        break;
                    }
                }
                sets
            })
        });
        // Something is left for the last round.
        let seen = written.load(Ordering::Relaxed);
        while written.load(Ordering::Relaxed) < seen + 100 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        sent
    });
    dirty.drain_into(&mut last[0]);
    assert!(!same(&from, &to), "nothing was left for the last round, so nothing was tested");
    source.send_round(&last, true).await.unwrap();
    source.compare_digests().await.unwrap();
    source.close().await.unwrap();
    assert!(receiving.await.unwrap().unwrap().complete);
}

#[tokio::test]
async fn untouched_memory_costs_almost_nothing_and_stays_untouched() {
    let (from, to) = ([ram(1 << 20)], [ram(1 << 20)]);
    from[0].write(77_777, &page(1, 1)).unwrap();
    let (mut source, receiving) = start(&from, &to).await;
    let report = source.send_round(&source.full_sets(), true).await.unwrap();
    assert_eq!(report.counts.data_pages, 1);
    assert!(report.wire_bytes < 5000, "{}", report.wire_bytes);
    assert_eq!((from[0].data_pages().unwrap(), to[0].data_pages().unwrap()), (1, 1));
    source.close().await.unwrap();
    receiving.await.unwrap().unwrap();
}

#[tokio::test]
async fn unequal_memory_is_refused_with_both_shapes() {
    let (near, far) = duplex(10_000);
    let receiving = start_target(&[ram(10)], far);
    let opened = Source::open(near, vec![ram(11)], SourceOptions::default(), Progress::default()).await;
    let error = opened.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let text = error.to_string();
    assert!(text.contains("mem of 11 pages") && text.contains("mem of 10 pages"), "{text}");
    assert!(receiving.await.unwrap().is_err());
}

#[tokio::test]
async fn a_different_byte_at_the_target_is_found_by_the_digest() {
    let (from, to) = ([ram(100)], [ram(100)]);
    let (mut source, receiving) = start(&from, &to).await;
    source.send_round(&source.full_sets(), true).await.unwrap();
    to[0].write(50, &page(1, 5)).unwrap();
    assert_eq!(source.compare_digests().await.unwrap_err().kind(), ErrorKind::Corrupt);
    drop(source);
    assert_eq!(receiving.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_lost_link_ends_both_sides_and_a_cancelled_round_is_not_resumed() {
    let (from, to) = ([ram(4000)], [ram(4000)]);
    for at in 0..4000 {
        from[0].write(at, &page(1, at)).unwrap();
    }
    // A target that reads a little and is gone.
    let (near, mut far) = duplex(100_000);
    let peer = tokio::spawn(async move {
        let _ = frames::read_control(&mut far, Duration::from_secs(1)).await.unwrap();
        frames::write_control(&mut far, &Control::Opened { knows: Vec::new() }, 0, Duration::from_secs(1))
            .await
            .unwrap();
        let mut some = vec![0; 500_000];
        far.read_exact(&mut some).await.unwrap();
    });
    let blocks = vec![again(&from[0])];
    let mut source = Source::open(near, blocks, SourceOptions::default(), Progress::default()).await.unwrap();
    let error = source.send_round(&source.full_sets(), false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    peer.await.unwrap();

    let (mut source, receiving) = start(&from, &to).await;
    let sets = source.full_sets();
    let cut = tokio::time::timeout(Duration::from_millis(1), source.send_round(&sets, false)).await;
    assert!(cut.is_err());
    assert_eq!(source.send_round(&sets, false).await.unwrap_err().kind(), ErrorKind::Cancelled);
    drop(source);
    assert!(receiving.await.unwrap().is_err());
}

#[tokio::test]
async fn the_bandwidth_limit_holds_but_not_in_the_last_round() {
    let (from, to) = ([ram(1000)], [ram(1000)]);
    for at in 0..1000 {
        from[0].write(at, &page(1, at)).unwrap();
    }
    let (near, far) = duplex(100_000);
    let receiving = start_target(&to, far);
    let limiter = std::sync::Arc::new(Limiter::new(Some(10 << 20)));
    let options = SourceOptions { limiter, ..SourceOptions::default() };
    let blocks = vec![again(&from[0])];
    let mut source = Source::open(near, blocks, options, Progress::default()).await.unwrap();
    let slow = source.send_round(&source.full_sets(), false).await.unwrap();
    assert!(slow.duration > Duration::from_millis(250), "{slow:?}");
    assert!(slow.throttled > Duration::from_millis(200), "{slow:?}");
    let last = source.send_round(&source.full_sets(), true).await.unwrap();
    assert_eq!(last.throttled, Duration::ZERO);
    source.close().await.unwrap();
    receiving.await.unwrap().unwrap();
}

/// Sends `bytes` after a proper opening and the begin of round 1.
pub async fn hostile(bytes: Vec<u8>) -> Result<Received> {
    let (mut near, far) = duplex(1 << 20);
    let receiving = start_target(&[ram(100)], far);
    let limit = Duration::from_secs(1);
    let blocks = vec![whimbrel_wire::peer::memory::BlockShape { name: "mem".into(), pages: 100 }];
    frames::write_control(&mut near, &Control::Open { blocks }, 0, limit).await?;
    frames::read_control(&mut near, limit).await?;
    frames::write_control(&mut near, &Control::RoundBegin { last: true }, 1, limit).await?;
    near.write_all(&bytes).await.unwrap();
    near.shutdown().await.unwrap();
    receiving.await.unwrap()
}

fn frame(round: u32, runs: &[Run], encoding: Encoding, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_pages(&mut bytes, round, 0, encoding, runs, payload, payload);
    bytes
}

#[tokio::test]
async fn a_hostile_source_is_refused_and_writes_nothing_outside() {
    let run = |first_page, pages| Run { first_page, pages };
    let raw = |round, first_page| frame(round, &[run(first_page, 1)], Encoding::Raw, &[9; PAGE_BYTES]);
    let end = |counts| {
        let mut bytes = Vec::new();
        Control::RoundEnd { counts }.put(&mut bytes, 1).unwrap();
        bytes
    };
    let counts = |data_pages| whimbrel_wire::peer::memory::RoundCounts { data_pages, ..Default::default() };
    let good = [raw(1, 3), end(counts(1))].concat();
    assert_eq!(hostile(good).await.unwrap_err().kind(), ErrorKind::Unavailable, "good, but never closed");
    for (what, bytes) in [
        ("beyond the end", [raw(1, 100), end(counts(1))].concat()),
        ("another round", [raw(2, 3), end(counts(1))].concat()),
        ("a wrong count", [raw(1, 3), end(counts(2))].concat()),
        ("noise", noise(7, 5000)),
        ("a bomb", [frame(1, &[run(0, 4)], Encoding::Zstd, &noise(1, 100)), end(counts(4))].concat()),
        (
            "a zero run over everything and more",
            [frame(1, &[run(0, u32::MAX)], Encoding::Zero, &[]), end(counts(0))].concat(),
        ),
    ] {
        assert_eq!(hostile(bytes).await.unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
    }
    let mut flipped = raw(1, 3);
    flipped[Header::LENGTH + 20] ^= 1;
    assert_eq!(hostile([flipped, end(counts(1))].concat()).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]
    /// The guest writes while rounds run; what is left out comes in the last round.
    #[test]
    fn pages_that_are_written_again_before_their_turn_are_not_lost(
        sizes in prop::collection::vec(1u64..1500, 1..3),
        writes in prop::collection::vec(
            prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 0..40),
            0..12,
        ),
    ) {
        runtime().block_on(async {
            let from: Vec<_> = sizes.iter().map(|pages| ram(*pages)).collect();
            let to: Vec<_> = sizes.iter().map(|pages| ram(*pages)).collect();
            for ram in &from {
                for number in 0..ram.pages() {
                    ram.write(number, &page(1, number)).unwrap();
                }
            }
            let (mut source, receiving) = start(&from, &to).await;
            let mut pending = source.empty_sets();
            let mut writes = writes.iter().zip(1u64..);
            for _ in 0..2 {
                let full = source.full_sets();
                let mut rewritten = || {
                    let mut fresh: Vec<_> = sizes.iter().map(|pages| PageBitmap::new(*pages)).collect();
                    let (batch, seed) = writes.next().unwrap_or((const { &Vec::new() }, 0));
                    for (block, number, kind) in batch {
                        let block = block.index(from.len());
                        let number = number.index(sizes[block] as usize) as u64;
                        from[block].write(number, &page(*kind, seed)).unwrap();
                        fresh[block].set(number);
                    }
                    pending.iter_mut().zip(&fresh).for_each(|(all, fresh)| all.merge(fresh));
                    Ok(fresh)
                };
                source.send_round_while_running(&full, &mut rewritten).await.unwrap();
            }
            source.send_round(&pending, true).await.unwrap();
            source.close().await.unwrap();
            receiving.await.unwrap().unwrap();
            assert!(same(&from, &to));
        });
    }
}

#[test]
fn pages_that_are_written_again_before_their_turn_are_left_out() {
    runtime().block_on(async {
        let (from, to) = (ram(4000), ram(4000));
        for number in 0..4000 {
            from.write(number, &page(1, number)).unwrap();
        }
        let (mut source, receiving) = start(&[again(&from)], &[again(&to)]).await;
        let mut again_written = PageBitmap::new(4000);
        again_written.set_range(3000, 1000);
        let (full, mut first) = (source.full_sets(), true);
        let mut rewritten = || {
            let fresh =
                if std::mem::take(&mut first) { again_written.clone() } else { PageBitmap::new(4000) };
            Ok(vec![fresh])
        };
        let report = source.send_round_while_running(&full, &mut rewritten).await.unwrap();
        assert_eq!(report.counts.pages(), 3000);
        assert!(!same(&[again(&from)], &[again(&to)]));
        let report = source.send_round(&[again_written], true).await.unwrap();
        assert_eq!(report.counts.pages(), 1000);
        source.close().await.unwrap();
        receiving.await.unwrap().unwrap();
        assert!(same(&[from], &[to]));
    });
}
