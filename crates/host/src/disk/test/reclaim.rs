//! Space of what was overwritten is freed, and nobody sees it.

use whimbrel_engine::disk::reclaim::PIECE_BLOCKS;

use super::ship::{seal, ship};
use super::*;
use crate::disk::files::Dir;
use crate::disk::{LayerReceiver, check};

const BLOCKS: u64 = 2048;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A block's content says which block it is, and when it was written.
fn content(block: u64, version: u64) -> Vec<u8> {
    (version << 32 | block).to_le_bytes().repeat(512)
}

fn files_bytes(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    entries.map(|meta| meta.blocks() * 512).sum()
}

fn small_pieces(layer: &Layer) {
    layer.reclaim.piece_blocks.store(16, Ordering::Relaxed);
}

/// Writes every block several times over, scattered, with a flush after some.
fn overwrite(layer: &Layer, oracle: &mut [u8], random: &mut Random, writes: u64) {
    for turn in 1..=writes {
        let first = random.below(BLOCKS);
        let blocks = (1 + random.below(9)).min(BLOCKS - first);
        let bytes: Vec<u8> = (first..first + blocks).flat_map(|block| content(block, turn)).collect();
        let at = (first * BLOCK) as usize;
        oracle[at..at + bytes.len()].copy_from_slice(&bytes);
        write(layer, first * BLOCK, &bytes).unwrap();
        if random.below(6) == 0 {
            layer.flush().unwrap();
        }
        if random.below(200) == 0 {
            layer.discard(first * BLOCK, blocks * BLOCK).unwrap();
            oracle[at..at + (blocks * BLOCK) as usize].fill(0);
        }
    }
}

#[test]
fn what_was_overwritten_is_freed_and_everything_else_stays() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    small_pieces(&layer);
    let mut random = Random(7);
    let mut oracle = vec![0; (BLOCKS * BLOCK) as usize];
    // Not in the background: what is there before must be known.
    let hold = layer.hold_reclaim();
    overwrite(&layer, &mut oracle, &mut random, 6000);
    drop(hold);
    let (before, data_id) = (files_bytes(&path), layer.info().data_id);
    let done = layer.reclaim().unwrap();
    let after = files_bytes(&path);
    println!(
        "{} MiB of log for {} MiB of disk: {} MiB are left; {done:?}",
        before >> 20,
        (BLOCKS * BLOCK) >> 20,
        after >> 20
    );
    assert!(before > 8 * BLOCKS * BLOCK, "{before}");
    assert!(after < 3 * BLOCKS * BLOCK, "{after} of {before}");
    assert!(done.punched_blocks > 0 && done.moved_blocks > 0 && done.dropped_segments > 0, "{done:?}");
    assert_eq!(layer.info().data_id, data_id);
    assert!(read_all(&*layer) == oracle);
    assert!(check(&path).unwrap().problems.is_empty());

    // It opens the same, without an orderly end and with one, and works on.
    drop(layer);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    small_pieces(&layer);
    assert!(read_all(&*layer) == oracle);
    overwrite(&layer, &mut oracle, &mut random, 2000);
    layer.reclaim().unwrap();
    layer.close().unwrap();
    drop(layer);
    let report = check(&path).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    assert!(read_all(&*layer) == oracle);

    // Moved to another host it is the same disk.
    let there = temp_dir();
    let spec = layer.spec();
    let mut receiver = LayerReceiver::create(&there.path().join("layer"), &spec).unwrap();
    ship(&layer, &mut receiver);
    let seal = seal(&layer, &receiver);
    let arrived = receiver.finish(&seal).unwrap().open(None, Epoch(2)).unwrap();
    assert!(read_all(&*arrived) == oracle);
}

#[test]
fn a_discarded_disk_takes_next_to_nothing() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    small_pieces(&layer);
    for turn in 0..4 {
        write(&*layer, 0, &vec![turn + 1; (BLOCKS * BLOCK) as usize]).unwrap();
    }
    layer.discard(0, BLOCKS * BLOCK).unwrap();
    layer.reclaim().unwrap();
    // The last record but one stays: no later one says yet that it is durable.
    let left = files_bytes(&path);
    assert!(left < 3 << 19, "{left} bytes for a disk of zeros");
    drop(layer);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    assert!(read_all(&*layer).iter().all(|byte| *byte == 0));
}

#[test]
fn readers_and_writers_notice_nothing_while_space_is_freed() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    small_pieces(&layer);
    for block in 0..BLOCKS {
        write(&*layer, block * BLOCK, &content(block, 0)).unwrap();
    }
    let stop = AtomicBool::new(false);
    let freed = std::thread::scope(|scope| {
        let (layer, stop) = (&layer, &stop);
        for thread in 0..2u64 {
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                for turn in 1..4000u64 {
                    let block = random.below(BLOCKS / 2) * 2 + thread;
                    write(&**layer, block * BLOCK, &content(block, turn)).unwrap();
                    if turn % 16 == 0 {
                        layer.flush().unwrap();
                    }
                }
                stop.store(true, Ordering::Relaxed);
            });
            scope.spawn(move || {
                let mut random = Random(thread + 77);
                while !stop.load(Ordering::Relaxed) {
                    let first = random.below(BLOCKS - 64);
                    let bytes = read(&**layer, first * BLOCK, 64 * 4096);
                    for (block, bytes) in (first..).zip(bytes.chunks(4096)) {
                        let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                        assert_eq!(word as u32 as u64, block, "another block's content, or none");
                        assert!(bytes.chunks(8).all(|other| other == &bytes[..8]), "a torn block");
                    }
                }
            });
        }
        let mut freed = 0;
        while !stop.load(Ordering::Relaxed) {
            let done = layer.reclaim().unwrap();
            freed += done.punched_blocks + u64::from(done.dropped_segments);
        }
        freed
    });
    assert!(freed > 0);
    drop(layer);
    assert!(check(&path).unwrap().problems.is_empty());
}

#[test]
fn a_held_log_is_left_alone_and_a_flush_begins_the_work_by_itself() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    let hold = layer.hold_reclaim();
    let all = vec![1; (BLOCKS * BLOCK) as usize];
    for _ in 0..4 {
        write(&*layer, 0, &all).unwrap();
        layer.flush().unwrap();
    }
    assert_eq!(layer.reclaim().unwrap(), crate::disk::Reclaimed::default());
    let before = files_bytes(&path);
    drop(hold);
    // Enough for a look to be due again.
    for _ in 0..4 {
        write(&*layer, 0, &all).unwrap();
        layer.flush().unwrap();
    }
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while files_bytes(&path) > before {
        assert!(std::time::Instant::now() < end, "nothing is freed: {} bytes", files_bytes(&path));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(read_all(&*layer) == all);
    assert!(u64::from(PIECE_BLOCKS) < 4 * BLOCKS);
}

#[test]
fn a_damaged_checkpoint_is_read_from_its_copy_once_the_log_alone_is_not_enough() {
    let (_dir, path, layer) = layer(BLOCKS * BLOCK);
    small_pieces(&layer);
    let mut oracle = vec![0; (BLOCKS * BLOCK) as usize];
    let hold = layer.hold_reclaim();
    overwrite(&layer, &mut oracle, &mut Random(3), 4000);
    drop(hold);
    assert!(layer.reclaim().unwrap().dropped_segments > 0);
    layer.close().unwrap();
    drop(layer);
    let maps: Vec<_> =
        Dir::new(&path).names().unwrap().into_iter().filter(|name| name.starts_with("map.")).collect();
    assert_eq!(maps.len(), 2, "{maps:?}");
    let damage = |name: &str| {
        let mut bytes = std::fs::read(path.join(name)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path.join(name), bytes).unwrap();
    };
    damage(&maps[0]);
    assert!(read_all(&*Layer::open(&path, None, Epoch(1), true).unwrap()) == oracle);
    damage(&maps[1]);
    let error = Layer::open(&path, None, Epoch(1), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// Zeros hide what lies below: they must arrive although the segment that said so is gone.
#[test]
fn zeros_over_an_image_outlive_the_segment_that_said_so() {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(BLOCKS * BLOCK)).unwrap();
    let image = || RamDisk::new(vec![5; (BLOCKS * BLOCK) as usize]) as Arc<dyn BlockRead>;
    let layer = Layer::open(&path, Some(image()), Epoch(1), true).unwrap();
    small_pieces(&layer);
    let mut oracle = vec![5; (BLOCKS * BLOCK) as usize];
    for block in (0..BLOCKS).step_by(16) {
        layer.discard(block * BLOCK, 3 * BLOCK).unwrap();
        oracle[(block * BLOCK) as usize..((block + 3) * BLOCK) as usize].fill(0);
    }
    for turn in 0..5 {
        let bytes = vec![turn + 1; (BLOCKS / 2 * BLOCK) as usize];
        write(&*layer, BLOCKS / 2 * BLOCK, &bytes).unwrap();
        oracle[(BLOCKS / 2 * BLOCK) as usize..].copy_from_slice(&bytes);
    }
    let done = layer.reclaim().unwrap();
    assert!(done.dropped_segments > 0, "{done:?}");
    let there = temp_dir();
    let mut receiver = LayerReceiver::create(&there.path().join("layer"), &layer.spec()).unwrap();
    ship(&layer, &mut receiver);
    let seal = seal(&layer, &receiver);
    let arrived = receiver.finish(&seal).unwrap().open(Some(image()), Epoch(2)).unwrap();
    assert!(read_all(&*arrived) == oracle);
    drop(layer);
    assert!(read_all(&*Layer::open(&path, Some(image()), Epoch(1), true).unwrap()) == oracle);
}
