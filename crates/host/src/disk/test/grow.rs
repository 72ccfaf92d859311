//! Disks that become larger: over what ends in the middle of a block, under a reader, at rest, refused, and failing.

use super::*;
use crate::disk::files::Dir;
use crate::disk::files::record::Recorder;
use crate::disk::{VolumeDir, check};
use whimbrel_wire::record::layer::DISK_BYTES_MAX;

const SIZE: u64 = 10 * BLOCK + 1536;
const GROWN: u64 = 40 * BLOCK + 512;

#[test]
fn what_a_disk_gains_reads_as_zeros_and_takes_writes() {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(SIZE)).unwrap();
    // Full of data up to the very end, in the middle of a block.
    let mut oracle = vec![7; SIZE as usize];
    let base: Arc<dyn BlockRead> = RamDisk::new(vec![7; SIZE as usize]);
    let layer = Layer::open(&path, Some(Arc::clone(&base)), Epoch(1), true).unwrap();
    write(&*layer, SIZE - 512, &[9; 512]).unwrap();
    oracle[SIZE as usize - 512..].fill(9);
    let id = layer.info().data_id;
    for same in [SIZE, SIZE - 511] {
        layer.grow(same).unwrap();
    }
    assert!(read(&*layer, SIZE, 0).is_empty() && layer.extent(SIZE + 512).is_err());
    assert_eq!(write(&*layer, SIZE, &[1; 512]).unwrap_err().kind(), ErrorKind::InvalidInput);

    layer.grow(GROWN).unwrap();
    oracle.resize(GROWN as usize, 0);
    assert_eq!((layer.size_bytes(), layer.info().size_bytes), (GROWN, GROWN));
    assert_eq!(layer.info().data_id, id, "this session has changed it already");
    assert!(read_all(&*layer) == oracle);
    let extent = layer.extent(11 * BLOCK).unwrap();
    assert!(!extent.data && extent.length == GROWN - 11 * BLOCK);
    for (at, length) in [(SIZE - 512, 2048), (GROWN - 512, 512), (20 * BLOCK, 3 * BLOCK)] {
        let range = at as usize..(at + length) as usize;
        oracle[range.clone()].fill(3);
        write(&*layer, at, &oracle[range]).unwrap();
    }
    layer.discard(21 * BLOCK, GROWN - 21 * BLOCK).unwrap();
    oracle[21 * 4096..].fill(0);
    layer.checkpoint().unwrap();
    layer.grow(2 * GROWN).unwrap();
    oracle.resize(2 * GROWN as usize, 0);
    write(&*layer, 2 * GROWN - BLOCK, &[5; 4096]).unwrap();
    oracle[2 * GROWN as usize - 4096..].fill(5);
    layer.flush().unwrap();
    drop(layer);
    let report = check(&path).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    let layer = Layer::open(&path, Some(base), Epoch(1), true).unwrap();
    assert!(read_all(&*layer) == oracle);
    let id = layer.info().data_id;
    layer.grow(3 * GROWN).unwrap();
    assert_ne!(layer.info().data_id, id, "more to see under an old id");
}

#[test]
fn a_reader_never_sees_the_end_come_nearer_nor_anything_but_zeros_behind_it() {
    let (_dir, _path, layer) = layer(BLOCK);
    write(&*layer, 0, &[1; 4096]).unwrap();
    let (stop, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                let size = layer.size_bytes();
                assert!(size >= last);
                seen.fetch_add(u64::from(size > last), Ordering::Relaxed);
                last = size;
                // The extent of now goes on to the end of now, or of a moment later.
                let extent = layer.extent(size - 512).unwrap();
                assert!(extent.length >= 512);
                let bytes = read(&*layer, size - 512, 512);
                assert!(size == BLOCK || bytes.iter().all(|byte| *byte == 0));
            }
        });
        // However late the reader begins.
        let mut sectors = 9;
        while !reader.is_finished() && (sectors < 600 || seen.load(Ordering::Relaxed) < 10) {
            layer.grow(sectors * 512).unwrap();
            sectors += 1;
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

#[test]
fn at_rest_only_who_holds_the_right_makes_it_larger() {
    let dir = temp_dir();
    let volumes = VolumeDir::new(dir.path()).unwrap();
    let spec = spec(SIZE);
    volumes.create(&spec).unwrap();
    let path = volumes.path(spec.disk_id);
    let layer = Layer::open(&path, None, Epoch(5), true).unwrap();
    write(&*layer, 0, &[1; 4096]).unwrap();
    let refused = |epoch, size| volumes.grow_at_rest(spec.disk_id, size, epoch).unwrap_err().kind();
    assert_eq!(refused(Epoch(5), GROWN), ErrorKind::Refused, "somebody has it open");
    layer.close().unwrap();
    for error in [layer.grow(GROWN), write(&*layer, 0, &[1; 512])] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Refused, "it is closed");
    }
    drop(layer);
    assert_eq!(refused(Epoch(4), GROWN), ErrorKind::Refused, "another host's time has come");
    assert_eq!(refused(Epoch(5), DISK_BYTES_MAX + 1), ErrorKind::InvalidInput);
    let before = volumes.header(spec.disk_id).unwrap();
    volumes.grow_at_rest(spec.disk_id, SIZE / 2, Epoch(5)).unwrap();
    assert_eq!(volumes.header(spec.disk_id).unwrap(), before, "it is that large");
    volumes.grow_at_rest(spec.disk_id, GROWN, Epoch(6)).unwrap();
    let after = volumes.header(spec.disk_id).unwrap();
    assert_eq!((after.size_bytes, after.epoch, after.clean_end), (GROWN, Epoch(6), before.clean_end));
    assert_ne!(after.data_id, before.data_id);
    assert_eq!(Layer::open(&path, None, Epoch(5), true).unwrap_err().kind(), ErrorKind::Refused);
    let layer = Layer::open(&path, None, Epoch(6), true).unwrap();
    assert_eq!(read_all(&*layer)[..4096], [1; 4096]);
    layer.fence(Epoch(7)).unwrap();
    assert_eq!(layer.grow(2 * GROWN).unwrap_err().kind(), ErrorKind::Refused);
    drop(layer);
    volumes.seal(spec.disk_id).unwrap();
    assert_eq!(refused(Epoch(9), 2 * GROWN), ErrorKind::Refused, "it is a snapshot");
}

#[test]
fn a_child_larger_than_its_parent_reads_zeros_behind_it() {
    let dir = temp_dir();
    let volumes = VolumeDir::new(dir.path()).unwrap();
    let lower = spec(SIZE);
    volumes.create(&lower).unwrap();
    let below = volumes.open(lower.disk_id, None, Epoch(1), true).unwrap();
    write(&*below, 0, &[7; SIZE as usize]).unwrap();
    let on = Parent::Layer { disk_id: lower.disk_id, data_id: below.settle_id().unwrap() };
    below.seal().unwrap();
    drop(below);
    let upper = LayerSpec { parent: on, ..spec(SIZE) };
    volumes.create(&upper).unwrap();
    let above = volumes.open(upper.disk_id, None, Epoch(1), true).unwrap();
    above.grow(GROWN).unwrap();
    // Completed from the parent as far as that goes.
    write(&*above, SIZE / BLOCK * BLOCK, &[1; 512]).unwrap();
    let mut oracle = vec![7; SIZE as usize];
    oracle[(SIZE / BLOCK * BLOCK) as usize..][..512].fill(1);
    oracle.resize(GROWN as usize, 0);
    assert!(read_all(&*above) == oracle);
    drop(above);
    for report in volumes.check(upper.disk_id, None).unwrap() {
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }
    let above = volumes.open(upper.disk_id, None, Epoch(1), true).unwrap();
    assert!(read_all(&*above) == oracle);
    assert_eq!(volumes.header(lower.disk_id).unwrap().size_bytes, SIZE);
}

#[test]
fn a_full_disk_is_not_in_the_way_and_a_header_that_may_not_be_durable_ends_writing() {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(SIZE)).unwrap();
    let recorder = Arc::new(Recorder::default());
    recorder.keep.store(false, Ordering::Relaxed);
    let files = Dir::recorded(&path, Arc::clone(&recorder));
    let layer = Layer::open_in(&files, None, Epoch(1), true, |_| Ok(())).unwrap();
    recorder.space.store(100, Ordering::Relaxed);
    layer.grow(GROWN).unwrap();
    assert_eq!(write(&*layer, 0, &[1; 4096]).unwrap_err().kind(), ErrorKind::NoSpace);
    recorder.space.store(u64::MAX, Ordering::Relaxed);
    write(&*layer, 0, &[1; 4096]).unwrap();
    recorder.sync_fails.store(true, Ordering::Relaxed);
    assert_eq!(layer.grow(2 * GROWN).unwrap_err().kind(), ErrorKind::Io);
    recorder.sync_fails.store(false, Ordering::Relaxed);
    // Which of the two a later reader finds, nobody knows.
    assert_eq!(write(&*layer, 0, &[1; 4096]).unwrap_err().kind(), ErrorKind::Io);
    assert!(layer.grow(2 * GROWN).is_err());
    assert_eq!(layer.size_bytes(), GROWN);
    drop(layer);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    layer.grow(3 * GROWN).unwrap();
    assert_eq!(read_all(&*layer).len() as u64, 3 * GROWN);
}
