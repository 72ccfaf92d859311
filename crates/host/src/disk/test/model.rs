//! Random operations against a disk in RAM, with reopening in order and without.

use proptest::prelude::*;

use super::*;
use crate::disk::files::Dir;
use crate::disk::layer::OPEN;
use crate::disk::{VolumeDir, check};

const SIZE: u64 = 300 * BLOCK + 1024;
const BASE: u64 = 170 * BLOCK + 512;

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: u64,
        sectors: u64,
        fill: u8,
        slices: usize,
    },
    Zero {
        sector: u64,
        sectors: u64,
        discard: bool,
    },
    Read {
        sector: u64,
        sectors: u64,
        slices: usize,
    },
    Flush,
    Checkpoint,
    Reopen {
        in_order: bool,
        next_epoch: bool,
    },
    FenceAndBack,
    Reclaim,
    /// By so many sectors, with the layer in use or not.
    Grow {
        sectors: u64,
        at_rest: bool,
    },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let sectors = prop_oneof![1..9u64, Just(8), 8..200u64, 300..700u64];
    // Behind the first end too: what is not there when its turn comes is left out.
    (0..SIZE / 512 * 3 / 2, sectors, any::<bool>()).prop_map(|(sector, sectors, aligned)| {
        if aligned { (sector / 8 * 8, sectors.next_multiple_of(8)) } else { (sector, sectors) }
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (range(), 1..255u8, 1..40usize)
            .prop_map(|((sector, sectors), fill, slices)| Step::Write { sector, sectors, fill, slices }),
        2 => (range(), any::<bool>()).prop_map(|((sector, sectors), discard)| Step::Zero { sector, sectors, discard }),
        4 => (range(), 1..40usize).prop_map(|((sector, sectors), slices)| Step::Read { sector, sectors, slices }),
        2 => Just(Step::Flush),
        1 => Just(Step::Checkpoint),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(in_order, next_epoch)| Step::Reopen { in_order, next_epoch }),
        1 => Just(Step::FenceAndBack),
        1 => Just(Step::Reclaim),
        2 => (1..300u64, any::<bool>()).prop_map(|(sectors, at_rest)| Step::Grow { sectors, at_rest }),
    ]
}

/// The bytes in `count` slices at most, none of them empty.
fn sliced(bytes: &[u8], count: usize) -> Vec<IoSlice<'_>> {
    bytes.chunks(bytes.len().div_ceil(count).max(1)).map(IoSlice::new).collect()
}

/// As a process that ends: what works for the layer in the background has it for a moment longer.
fn let_go(layer: Arc<Layer>, path: &std::path::Path) {
    drop(layer);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while let Err(error) = Dir::new(path).lock() {
        assert!(std::time::Instant::now() < end, "{error}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn run(steps: &[Step], with_base: bool) {
    let dir = temp_dir();
    let volumes = VolumeDir::new(dir.path()).unwrap();
    let spec = spec(SIZE);
    let disk_id = spec.disk_id;
    let path = volumes.path(disk_id);
    volumes.create(&spec).unwrap();
    let base = with_base.then(|| RamDisk::new(half_full(BASE as usize)) as Arc<dyn BlockRead>);
    let mut epoch = Epoch(1);
    let mut layer = Layer::open(&path, base.clone(), epoch, true).unwrap();
    let mut oracle = if with_base { half_full(BASE as usize) } else { vec![] };
    oracle.resize(SIZE as usize, 0);
    for step in steps {
        // What lies on the disk of what a step is about.
        let inside = |oracle: &[u8], sector: u64, sectors: u64| {
            let size = oracle.len() as u64 / 512;
            let sector = sector.min(size - 1);
            (sector, sectors.min(size - sector))
        };
        match *step {
            Step::Grow { sectors, at_rest } => {
                oracle.resize(oracle.len() + sectors as usize * 512, 0);
                let size = oracle.len() as u64;
                let before = layer.info().data_id;
                let was_open = layer.gate() == OPEN;
                if at_rest {
                    let_go(layer, &path);
                    volumes.grow_at_rest(disk_id, size, epoch).unwrap();
                    layer = Layer::open(&path, base.clone(), epoch, true).unwrap();
                } else {
                    layer.grow(size).unwrap();
                }
                assert_eq!(layer.size_bytes(), size);
                assert!(was_open || layer.info().data_id != before, "more to see under the old data_id");
            }
            Step::Write { sector, sectors, fill, slices } => {
                let (sector, sectors) = inside(&oracle, sector, sectors);
                let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
                for (n, byte) in oracle[range.clone()].iter_mut().enumerate() {
                    *byte = fill.wrapping_add((n / 512) as u8);
                }
                layer.write(sector * 512, &sliced(&oracle[range], slices)).unwrap();
            }
            Step::Zero { sector, sectors, discard } => {
                let (sector, sectors) = inside(&oracle, sector, sectors);
                oracle[(sector * 512) as usize..((sector + sectors) * 512) as usize].fill(0);
                let zero = if discard { BlockDev::discard } else { BlockDev::write_zeroes };
                zero(layer.as_ref(), sector * 512, sectors * 512).unwrap();
            }
            Step::Read { sector, sectors, slices } => {
                let (sector, sectors) = inside(&oracle, sector, sectors);
                let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
                let mut bytes = vec![0xee; range.len()];
                let size = bytes.len().div_ceil(slices).max(1);
                let mut into: Vec<_> = bytes.chunks_mut(size).map(IoSliceMut::new).collect();
                assert!(layer.read_now(sector * 512, &mut into).unwrap());
                assert!(bytes == oracle[range], "read of {sectors} sectors at {sector}");
            }
            Step::Flush => layer.flush().unwrap(),
            Step::Checkpoint => layer.checkpoint().unwrap(),
            Step::Reopen { in_order, next_epoch } => {
                if in_order {
                    layer.close().unwrap();
                    assert_eq!(write(&*layer, 0, &[1; 512]).unwrap_err().kind(), ErrorKind::Refused);
                }
                let_go(layer, &path);
                epoch = if next_epoch { epoch.next() } else { epoch };
                layer = Layer::open(&path, base.clone(), epoch, true).unwrap();
            }
            Step::Reclaim => {
                layer.reclaim.piece_blocks.store(1, Ordering::Relaxed);
                layer.reclaim().unwrap();
            }
            Step::FenceAndBack => {
                layer.fence(epoch.next()).unwrap();
                assert_eq!(write(&*layer, 0, &[1; 512]).unwrap_err().kind(), ErrorKind::Refused);
                layer.unfence(epoch).unwrap();
            }
        }
    }
    assert!(read_all(&*layer) == oracle);
    let (mut at, size) = (0, oracle.len() as u64);
    while at < size {
        let extent = layer.extent(at).unwrap();
        let end = at + extent.length;
        assert!(extent.length > 0 && end <= size);
        assert!(
            extent.data || oracle[at as usize..end as usize].iter().all(|byte| *byte == 0),
            "hole at {at}"
        );
        at = end;
    }
    drop(layer);
    let report = check(&path).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    let layer = Layer::open(&path, base, Epoch(0), false).unwrap();
    assert!(read_all(&*layer) == oracle, "read-only, after an unclean end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_layer_reads_as_a_disk_in_ram_does(
        steps in proptest::collection::vec(step(), 1..120), with_base: bool
    ) {
        run(&steps, with_base);
    }
}

#[test]
fn readers_and_writers_on_many_threads_see_whole_blocks() {
    let (_dir, _path, layer) = layer(64 * BLOCK);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (layer, stop) = (&layer, &stop);
            scope.spawn(move || {
                for turn in 0..300u64 {
                    let block = (turn * 7 + thread * 16) % 64;
                    let value = ((turn << 8) | thread).to_le_bytes();
                    write(&**layer, block * BLOCK, &value.repeat(512)).unwrap();
                    if turn % 16 == 0 {
                        layer.flush().unwrap();
                    }
                }
                stop.store(true, Ordering::Relaxed);
            });
            scope.spawn(move || {
                let mut turn = thread;
                while !stop.load(Ordering::Relaxed) {
                    turn += 1;
                    let bytes = read(&**layer, turn % 64 * BLOCK, 4096);
                    assert!(bytes.chunks(8).all(|word| word == &bytes[..8]), "a block of two writes");
                }
            });
        }
    });
}

#[test]
fn a_partial_write_over_a_block_that_is_not_here_does_not_wait() {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(64 * BLOCK)).unwrap();
    let base = RamDisk::new(half_full(64 * 4096));
    base.local.store(false, Ordering::Relaxed);
    let layer = Layer::open(&path, Some(base.clone()), Epoch(1), true).unwrap();
    let (one, whole) = ([9u8; 512], [9u8; 4096]);
    let mut into = [0u8; 512];
    assert!(!layer.write_now(512, &[IoSlice::new(&one)]).unwrap());
    assert!(!layer.read_now(512, &mut [IoSliceMut::new(&mut into)]).unwrap());
    assert!(layer.write_now(BLOCK, &[IoSlice::new(&whole)]).unwrap(), "a whole block needs nothing");
    assert!(layer.write_now(BLOCK + 512, &[IoSlice::new(&one)]).unwrap(), "its block is in the layer");
    assert!(layer.read_now(BLOCK, &mut [IoSliceMut::new(&mut into)]).unwrap());
    assert_eq!(base.reads.load(Ordering::Relaxed), 0);
    layer.write(512, &[IoSlice::new(&one)]).unwrap();
    let mut expected = half_full(64 * 4096)[..4096].to_vec();
    expected[512..1024].fill(9);
    assert_eq!(read(&*layer, 0, 4096), expected);
}

/// The disk ends in the middle of a block, and so does what is zeroed: nothing after it may be lost.
#[test]
fn the_last_sectors_of_a_disk_are_zeroed_like_others() {
    let last = SIZE / 512;
    for (sector, sectors) in
        [(last - 1, 1), (last - 2, 2), (last - 2, 1), (last - 3, 3), (last - 9, 9), (last - 12, 12)]
    {
        for discard in [false, true] {
            for with_base in [false, true] {
                let write = |sector, fill| Step::Write { sector, sectors: 1, fill, slices: 1 };
                let steps = [write(last - 1, 1), Step::Zero { sector, sectors, discard }, write(0, 2)];
                run(&steps, with_base);
                run(&steps[1..], with_base);
            }
        }
    }
}
