//! Full disks, failing syncs, old epochs, damage.

use super::*;
use crate::disk::check;
use crate::disk::files::Dir;
use crate::disk::files::record::Recorder;
use crate::disk::layer::remove;
use whimbrel_wire::record::layer::State;

struct Rig {
    _dir: TempDir,
    path: PathBuf,
    recorder: Arc<Recorder>,
    files: Dir,
}

impl Rig {
    fn new() -> Self {
        let dir = temp_dir();
        let path = dir.path().join("layer");
        Layer::create(&path, &spec(1024 * BLOCK)).unwrap();
        let recorder = Arc::new(Recorder::default());
        recorder.keep.store(false, Ordering::Relaxed);
        let files = Dir::recorded(&path, Arc::clone(&recorder));
        Self { _dir: dir, path, recorder, files }
    }
    fn open(&self) -> Arc<Layer> {
        Layer::open_in(&self.files, None, Epoch(1), true, |_| Ok(())).unwrap()
    }
}

#[test]
fn a_full_disk_fails_the_write_that_did_not_fit_and_nothing_else() {
    let rig = Rig::new();
    let layer = rig.open();
    let mut oracle = vec![0u8; 1024 * 4096];
    let mut failed = 0;
    for turn in 0..600u64 {
        // Room for a few more records now and then, cut at any byte.
        if turn % 7 == 3 {
            rig.recorder.space.store(turn * 131 % 30_000, Ordering::Relaxed);
        }
        if turn % 21 == 20 {
            rig.recorder.space.store(u64::MAX, Ordering::Relaxed);
        }
        let (block, blocks) = (turn * 37 % 1000, turn % 5 + 1);
        let bytes = vec![(turn % 255) as u8 + 1; (blocks * BLOCK) as usize];
        let result = if turn % 9 == 0 {
            layer.discard(block * BLOCK, blocks * BLOCK)
        } else {
            write(&*layer, block * BLOCK, &bytes)
        };
        let range = (block * BLOCK) as usize..((block + blocks) * BLOCK) as usize;
        match result {
            Ok(()) if turn % 9 == 0 => oracle[range].fill(0),
            Ok(()) => oracle[range].copy_from_slice(&bytes),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                failed += 1;
            }
        }
        if turn % 50 == 0 {
            layer.flush().unwrap();
            assert!(read_all(&*layer) == oracle, "turn {turn}");
        }
    }
    assert!(failed > 50, "{failed}");
    assert!(read_all(&*layer) == oracle);
    // No room for a checkpoint either: closing is slower to open, but whole.
    rig.recorder.space.store(5000, Ordering::Relaxed);
    layer.close().unwrap();
    drop(layer);
    rig.recorder.space.store(u64::MAX, Ordering::Relaxed);
    let report = check(&rig.path).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert!(read_all(&*rig.open()) == oracle);
}

#[test]
fn after_a_failed_sync_the_layer_never_takes_another_write() {
    let rig = Rig::new();
    let layer = rig.open();
    write(&*layer, 0, &[1; 4096]).unwrap();
    layer.flush().unwrap();
    write(&*layer, BLOCK, &[2; 4096]).unwrap();
    rig.recorder.sync_fails.store(true, Ordering::Relaxed);
    assert_eq!(layer.flush().unwrap_err().kind(), ErrorKind::Io);
    rig.recorder.sync_fails.store(false, Ordering::Relaxed);
    // The kernel would say that all is well now. It is not.
    assert_eq!(layer.flush().unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(write(&*layer, 0, &[3; 4096]).unwrap_err().kind(), ErrorKind::Io);
    assert!(layer.discard(0, BLOCK).is_err());
    assert_eq!(read(&*layer, 0, 4096), [1; 4096]);
    assert!(!layer.info().writable);
    layer.close().unwrap();
    drop(layer);
    assert_eq!(read(&*rig.open(), 0, 4096), [1; 4096]);
}

#[test]
fn flushes_that_wait_together_share_one_sync() {
    let rig = Rig::new();
    let layer = rig.open();
    write(&*layer, 0, &[1; 4096]).unwrap();
    rig.recorder.sync_ms.store(5, Ordering::Relaxed);
    let before = rig.recorder.syncs.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for thread in 0..16u64 {
            let layer = &layer;
            scope.spawn(move || {
                for turn in 0..5 {
                    write(&**layer, (thread * 5 + turn) * BLOCK, &[thread as u8; 4096]).unwrap();
                    layer.flush().unwrap();
                    assert!(layer.info().durable_seq > 0);
                }
            });
        }
    });
    let syncs = rig.recorder.syncs.load(Ordering::Relaxed) - before;
    assert!(syncs <= 40, "{syncs} syncs for 80 flushes");
    let none = rig.recorder.syncs.load(Ordering::Relaxed);
    layer.flush().unwrap();
    assert_eq!(rig.recorder.syncs.load(Ordering::Relaxed), none, "nothing to sync");
}

#[test]
fn an_old_epoch_opens_nothing_and_a_fenced_handle_writes_nothing() {
    let (_dir, path, layer) = layer(64 * BLOCK);
    write(&*layer, 0, &[1; 4096]).unwrap();
    let second = Layer::open(&path, None, Epoch(1), true).unwrap_err();
    assert_eq!(second.kind(), ErrorKind::Refused, "one writable handle: {second}");
    layer.fence(Epoch(5)).unwrap();
    assert_eq!(write(&*layer, 0, &[2; 4096]).unwrap_err().kind(), ErrorKind::Refused);
    assert!(layer.write_zeroes(0, BLOCK).is_err());
    layer.flush().unwrap();
    assert_eq!(read(&*layer, 0, 4096), [1; 4096]);
    assert_eq!(layer.unfence(Epoch(0)).unwrap_err().kind(), ErrorKind::Refused);
    drop(layer);
    let old = Layer::open(&path, None, Epoch(4), true).unwrap_err();
    assert_eq!(old.kind(), ErrorKind::Refused);
    assert!(old.to_string().contains("epoch 4"), "{old}");
    let layer = Layer::open(&path, None, Epoch(5), true).unwrap();
    write(&*layer, 0, &[3; 4096]).unwrap();
    assert_eq!(remove(&path).unwrap_err().kind(), ErrorKind::Refused, "it is open");
    drop(layer);
    remove(&path).unwrap();
    assert!(!path.exists());
}

#[test]
fn the_data_id_changes_before_the_first_write_and_only_then() {
    let (_dir, path, layer) = layer(64 * BLOCK);
    let id = layer.info().data_id;
    layer.flush().unwrap();
    read_all(&*layer);
    layer.discard(0, 64 * BLOCK).unwrap();
    assert_eq!(layer.info().data_id, id, "what is zero already does not change");
    write(&*layer, 0, &[1; 512]).unwrap();
    let changed = layer.info().data_id;
    assert_ne!(changed, id);
    write(&*layer, 0, &[2; 512]).unwrap();
    assert_eq!(layer.info().data_id, changed, "once per session");
    drop(layer);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    assert_eq!(layer.info().data_id, changed, "opening changes nothing");
    write(&*layer, 0, &[2; 512]).unwrap();
    assert_ne!(layer.info().data_id, changed);
}

#[test]
fn damage_to_what_was_durable_refuses_to_open_and_a_torn_tail_does_not() {
    let (_dir, path, layer) = layer(256 * BLOCK);
    for block in 0..40u64 {
        write(&*layer, block * BLOCK, &[block as u8 + 1; 4096]).unwrap();
        if block % 10 == 9 {
            layer.flush().unwrap();
        }
    }
    drop(layer);
    let segment = path.join("segment.00000000");
    let good = std::fs::read(&segment).unwrap();
    let open = || Layer::open(&path, None, Epoch(1), false);
    // Segment head, then groups of ten: index at 1, 12, 23, 34; the last flush is known to nobody but the caller.
    for (what, block, sound) in [
        ("the segment's head", 0, false),
        ("an index in the middle", 12, false),
        ("the last index", 34, true),
        ("a payload of the last group", 36, true),
    ] {
        let mut bad = good.clone();
        bad[block * 4096 + 100] ^= 1;
        std::fs::write(&segment, &bad).unwrap();
        let result = open();
        assert_eq!(result.is_ok(), sound, "{what}: {:?}", result.err());
        if let Err(error) = open() {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
        }
    }
    // A durable payload is believed when opening; the check reads it.
    let mut bad = good.clone();
    bad[5 * 4096 + 9] ^= 1;
    std::fs::write(&segment, &bad).unwrap();
    assert!(open().is_ok());
    let report = check(&path).unwrap();
    assert!(
        report.problems.iter().any(|problem| problem.contains("payload of record 4")),
        "{:?}",
        report.problems
    );
    std::fs::write(&segment, &good).unwrap();
    assert!(check(&path).unwrap().problems.is_empty());
    assert_eq!(read(&*open().unwrap(), 39 * BLOCK, 4096), [40; 4096]);
}

#[test]
fn a_lost_checkpoint_loses_nothing() {
    let (_dir, path, layer) = layer(256 * BLOCK);
    for block in 0..30u64 {
        write(&*layer, block * BLOCK, &[block as u8 + 1; 4096]).unwrap();
    }
    layer.close().unwrap();
    let all = read_all(&*layer);
    drop(layer);
    let map = path.join("map.00000000");
    for damage in [0, 1] {
        match damage {
            0 => std::fs::write(&map, b"not a map").unwrap(),
            _ => std::fs::remove_file(&map).unwrap(),
        }
        assert_eq!(check(&path).unwrap().problems.len(), 1);
        assert!(read_all(&*Layer::open(&path, None, Epoch(1), false).unwrap()) == all);
    }
}

#[test]
fn a_missing_segment_is_noticed() {
    let (_dir, path, layer) = layer(1024 * BLOCK);
    for turn in 0..5u64 {
        write(&*layer, turn * BLOCK, &vec![turn as u8; 300 * 4096]).unwrap();
    }
    drop(layer);
    assert!(path.join("segment.00000002").exists());
    std::fs::remove_file(path.join("segment.00000001")).unwrap();
    assert_eq!(Layer::open(&path, None, Epoch(1), false).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn random_damage_never_panics() {
    let (_dir, path, layer) = layer(256 * BLOCK);
    for turn in 0..60u64 {
        write(&*layer, turn * 7 % 250 * BLOCK, &[turn as u8; 4096]).unwrap();
        if turn % 20 == 0 {
            layer.checkpoint().unwrap();
        }
    }
    drop(layer);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    for file in ["header", "segment.00000000", "map.00000002"] {
        let good = std::fs::read(path.join(file)).unwrap();
        for _ in 0..150 {
            let mut bad = good.clone();
            for _ in 0..next() % 4 + 1 {
                let at = next() % bad.len();
                let length = next() % 64 + 1;
                for byte in bad.iter_mut().skip(at).take(length) {
                    *byte = next() as u8;
                }
            }
            bad.truncate(if next() % 3 == 0 { next() % good.len() } else { good.len() });
            std::fs::write(path.join(file), &bad).unwrap();
            let _ = check(&path);
            if let Ok(layer) = Layer::open(&path, None, Epoch(9), false) {
                let mut into = vec![0; 256 * 4096];
                let _ = layer.read(0, &mut [IoSliceMut::new(&mut into)]);
            }
        }
        std::fs::write(path.join(file), &good).unwrap();
    }
    assert!(check(&path).unwrap().problems.is_empty());
}

#[test]
fn a_half_made_layer_is_not_left_behind() {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    let recorder = Arc::new(Recorder::default());
    recorder.space.store(100, Ordering::Relaxed);
    let files = Dir::recorded(&path, recorder);
    let error = Layer::create_in(&files, &spec(64 * BLOCK), State::Ready).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(!path.exists());
    for bad in [0, 100, 1 << 60] {
        assert_eq!(Layer::create(&path, &spec(bad)).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    Layer::create(&path, &spec(512)).unwrap();
    assert_eq!(Layer::create(&path, &spec(512)).unwrap_err().kind(), ErrorKind::AlreadyExists);
}
