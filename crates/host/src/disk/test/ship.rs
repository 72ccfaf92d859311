//! Layers on their way: shipped while written, received, pulled.

use super::*;
use crate::disk::{FetchRange, LayerReceiver, Pull, RemoteLayer, ShipSeal, Urgency, check};
use whimbrel_wire::record::layer::ShipPosition;

const SIZE: u64 = 2048 * BLOCK;

fn two() -> (TempDir, Arc<Layer>, PathBuf) {
    let (dir, _path, layer) = layer(SIZE);
    let target = dir.path().join("target");
    (dir, layer, target)
}

/// Ships everything that is there; gives the bytes sent.
pub(super) fn ship(layer: &Layer, receiver: &mut LayerReceiver) -> usize {
    let mut sent = 0;
    loop {
        let from = receiver.position();
        let (chunk, next) = layer.read_ship(&from, 100_000).unwrap();
        if chunk.is_empty() {
            assert_eq!(next, from);
            return sent;
        }
        assert!(chunk.len() < 100_000 + (3 << 20));
        sent += chunk.len();
        assert_eq!(receiver.write(&chunk).unwrap(), next);
    }
}

pub(super) fn seal(layer: &Layer, receiver: &LayerReceiver) -> ShipSeal {
    let end = layer.ship_end().unwrap();
    assert!(end.reached(&receiver.position()));
    end.seal(receiver.position())
}

#[test]
fn a_layer_arrives_whole_while_it_is_written() {
    let (_dir, layer, target) = two();
    let mut oracle = vec![0u8; SIZE as usize];
    let mut receiver = LayerReceiver::create(&target, &layer.spec()).unwrap();
    for turn in 0..400u64 {
        let (block, blocks) = (turn * 193 % 1900, turn % 90 + 1);
        let range = (block * BLOCK) as usize..((block + blocks) * BLOCK) as usize;
        oracle[range.clone()].fill(turn as u8);
        if turn % 11 == 3 {
            oracle[range.clone()].fill(0);
            layer.discard(block * BLOCK, blocks * BLOCK).unwrap();
        } else {
            write(&*layer, block * BLOCK, &oracle[range]).unwrap();
        }
        if turn % 23 == 0 {
            ship(&layer, &mut receiver);
        }
    }
    assert!(layer.ship_left_bytes(&receiver.position()) > 0);
    assert_eq!(Layer::open(&target, None, Epoch(9), false).unwrap_err().kind(), ErrorKind::Refused);
    ship(&layer, &mut receiver);
    assert_eq!(layer.ship_left_bytes(&receiver.position()), 0);
    let seal = seal(&layer, &receiver);
    let id = layer.info().data_id;
    layer.fence(Epoch(2)).unwrap();
    let arrived = receiver.finish(&seal).unwrap();
    let arrived = arrived.open(None, Epoch(2)).unwrap();
    assert!(read_all(&*arrived) == oracle);
    assert_eq!(arrived.info().data_id, id);
    write(&*arrived, 0, &[9; 512]).unwrap();
    assert_ne!(arrived.info().data_id, id);
    oracle[..512].fill(9);
    drop(arrived);
    assert!(check(&target).unwrap().problems.is_empty());
    assert_eq!(Layer::open(&target, None, Epoch(1), true).unwrap_err().kind(), ErrorKind::Refused);
    assert!(read_all(&*Layer::open(&target, None, Epoch(2), true).unwrap()) == oracle);
}

#[test]
fn what_was_overwritten_is_not_sent() {
    let (_dir, layer, target) = two();
    for turn in 0..1000u64 {
        write(&*layer, turn % 10 * BLOCK, &[turn as u8; 4096]).unwrap();
    }
    let mut receiver = LayerReceiver::create(&target, &layer.spec()).unwrap();
    let sent = ship(&layer, &mut receiver);
    assert!(sent < 20 * 4096 * 2, "{sent}");
}

#[test]
fn receiving_goes_on_after_a_restart_of_either_side() {
    let (_dir, layer, target) = two();
    let spec = layer.spec();
    let mut receiver = LayerReceiver::create(&target, &spec).unwrap();
    for turn in 0..300u64 {
        write(&*layer, turn * 5 % 500 * BLOCK, &[turn as u8; 4096]).unwrap();
        if turn % 40 == 17 {
            let (chunk, _) = layer.read_ship(&receiver.position(), 50_000).unwrap();
            receiver.write(&chunk).unwrap();
        }
        if turn % 40 == 30 {
            receiver.sync().unwrap();
            let durable = receiver.position();
            let (chunk, _) = layer.read_ship(&receiver.position(), 50_000).unwrap();
            receiver.write(&chunk).unwrap();
            drop(receiver);
            receiver = LayerReceiver::open(&target).unwrap();
            assert_eq!(receiver.position(), durable, "what came after is sent again");
        }
    }
    // The source's agent restarts as well: a position means the same to its next handle.
    let path = layer.dir.path().to_owned();
    drop(layer);
    let layer = Layer::open(&path, None, Epoch(1), true).unwrap();
    write(&*layer, 0, &[0xaa; 4096]).unwrap();
    ship(&layer, &mut receiver);
    let seal = seal(&layer, &receiver);
    drop(receiver.finish(&seal).unwrap());
    let arrived = Layer::open(&target, None, Epoch(2), true).unwrap();
    assert!(read_all(&*arrived) == read_all(&*layer));
    assert_eq!(LayerReceiver::open(&target).unwrap_err().kind(), ErrorKind::Refused, "open already");
    drop(arrived);
    assert_eq!(LayerReceiver::open(&target).unwrap_err().kind(), ErrorKind::AlreadyExists);
}

#[test]
fn damaged_foreign_and_misplaced_chunks_are_refused_and_change_nothing() {
    let (_dir, layer, target) = two();
    let mut receiver = LayerReceiver::create(&target, &layer.spec()).unwrap();
    let mut chunks = Vec::new();
    let mut position = layer.ship_from();
    for turn in 0..3u64 {
        write(&*layer, turn * BLOCK, &[turn as u8 + 1; 4096]).unwrap();
        let (chunk, next) = layer.read_ship(&position, 1 << 20).unwrap();
        position = next;
        chunks.push(chunk);
    }
    assert_eq!(receiver.write(&chunks[1]).unwrap_err().kind(), ErrorKind::InvalidInput, "a gap");
    let mut bad = chunks[0].clone();
    *bad.last_mut().unwrap() ^= 1;
    assert_eq!(receiver.write(&bad).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(receiver.position(), ShipPosition::START);
    let (_other_dir, _path, other) = super::layer(SIZE);
    write(&*other, 0, &[1; 4096]).unwrap();
    let foreign = other.read_ship(&other.ship_from(), 1 << 20).unwrap().0;
    assert_eq!(receiver.write(&foreign).unwrap_err().kind(), ErrorKind::InvalidInput);
    for chunk in &chunks {
        let after = receiver.write(chunk).unwrap();
        assert_eq!(receiver.write(chunk).unwrap(), after, "a repeated chunk is ignored");
    }
    let seal = seal(&layer, &receiver);
    // Other bytes than the source sent, with all checksums right: the running hash notices.
    let mut wrong = seal;
    wrong.position.chain[0] ^= 1;
    assert_eq!(receiver.finish(&wrong).unwrap_err().kind(), ErrorKind::Corrupt);
    let receiver = LayerReceiver::open(&target).unwrap();
    assert_eq!(receiver.position(), ShipPosition::START, "nothing was durable yet");
}

#[test]
fn a_damaged_source_is_noticed() {
    let (_dir, layer, _target) = two();
    write(&*layer, 0, &[1; 4096]).unwrap();
    layer.flush().unwrap();
    let segment = layer.dir.path().join("segment.00000000");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[2 * 4096 + 5] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let error = layer.read_ship(&layer.ship_from(), 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

struct Remote {
    layer: Arc<Layer>,
    answers: AtomicBool,
    fetched: AtomicU64,
    /// Readers' tries that had no answer.
    refused: AtomicU64,
}

impl RemoteLayer for Remote {
    fn fetch(&self, ranges: &[FetchRange], into: &mut [u8], urgency: Urgency) -> Result<()> {
        if !self.answers.load(Ordering::Relaxed) {
            self.refused.fetch_add(u64::from(urgency == Urgency::Demand), Ordering::Relaxed);
            return Err(Error::new(ErrorKind::Unavailable, "fetch from source: no answer"));
        }
        self.fetched.fetch_add(into.len() as u64, Ordering::Relaxed);
        let mut rest = into;
        for range in ranges {
            let (part, after) = rest.split_at_mut(range.length as usize);
            self.layer.read(range.offset, &mut [IoSliceMut::new(part)])?;
            rest = after;
        }
        assert!(rest.is_empty(), "ranges and buffer are of one length");
        Ok(())
    }
}

#[test]
fn a_layer_is_used_while_it_is_pulled_and_needs_the_source_no_more_afterwards() {
    let image = || RamDisk::new(half_full((SIZE / 2) as usize)) as Arc<dyn BlockRead>;
    let dir = temp_dir();
    let path = dir.path().join("source");
    Layer::create(&path, &spec(SIZE)).unwrap();
    let source = Layer::open(&path, Some(image()), Epoch(1), true).unwrap();
    for turn in 0..300u64 {
        write(&*source, turn * 31 % 2000 * BLOCK, &vec![turn as u8 | 1; 4096 * (turn % 12 + 1) as usize])
            .unwrap();
    }
    source.discard(100 * BLOCK, 500 * BLOCK).unwrap();
    source.ship_end().unwrap();
    source.fence(Epoch(2)).unwrap();
    let mut oracle = read_all(&*source);
    let remote = Arc::new(Remote {
        layer: Arc::clone(&source),
        answers: AtomicBool::new(true),
        fetched: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    });
    let target = dir.path().join("target");
    Pull::create(&target, &source.spec(), &source.pull_map()).unwrap();
    assert_eq!(Layer::open(&target, None, Epoch(2), false).unwrap_err().kind(), ErrorKind::Refused);
    let open = || Pull::open(&target, Some(image()), remote.clone(), Epoch(2)).unwrap();

    let pull = open();
    assert!(read_all(&**pull.layer()) == oracle, "through the source");
    let mut into = [0; 512];
    assert!(!pull.layer().read_now(0, &mut [IoSliceMut::new(&mut into)]).unwrap());
    assert!(
        pull.layer().read_now(200 * BLOCK, &mut [IoSliceMut::new(&mut into)]).unwrap(),
        "zeros came with the map"
    );
    // The guest writes, also parts of blocks that are not here yet.
    for turn in 0..60u64 {
        let sector = turn * 997 % (SIZE / 512 - 20);
        let range = (sector * 512) as usize..((sector + 1 + turn % 17) * 512) as usize;
        oracle[range.clone()].fill(0xc0 + turn as u8 % 32);
        write(&**pull.layer(), sector * 512, &oracle[range]).unwrap();
        if turn % 10 == 0 {
            let progress = pull.step(100_000).unwrap();
            assert!(!progress.done && progress.left_bytes < progress.total_bytes);
        }
    }
    pull.layer().flush().unwrap();
    drop(pull);

    // A restart, and a source that does not answer for a while.
    let pull = open();
    remote.answers.store(false, Ordering::Relaxed);
    assert_eq!(pull.step(u64::MAX).unwrap_err().kind(), ErrorKind::Unavailable);
    remote.answers.store(true, Ordering::Relaxed);
    let before = remote.fetched.load(Ordering::Relaxed);
    while !pull.step(1 << 20).unwrap().done {}
    assert!(remote.fetched.load(Ordering::Relaxed) - before < SIZE, "nothing is fetched twice");
    remote.answers.store(false, Ordering::Relaxed);
    assert!(read_all(&**pull.layer()) == oracle);
    let layer = Arc::clone(pull.layer());
    drop(pull);
    write(&*layer, 0, &[5; 512]).unwrap();
    oracle[..512].fill(5);
    drop(layer);
    assert!(check(&target).unwrap().problems.is_empty());
    assert!(read_all(&*Layer::open(&target, Some(image()), Epoch(2), true).unwrap()) == oracle);
    assert!(!target.join("pull.map").exists());
}

/// A source with every other block written, and a pull from it.
fn scattered() -> (TempDir, Arc<Remote>, Arc<Pull>, Vec<u8>) {
    let (dir, layer, target) = two();
    for block in (0..SIZE / BLOCK).step_by(2) {
        write(&*layer, block * BLOCK, &[block as u8 | 1; BLOCK as usize]).unwrap();
    }
    layer.ship_end().unwrap();
    layer.fence(Epoch(2)).unwrap();
    let oracle = read_all(&*layer);
    Pull::create(&target, &layer.spec(), &layer.pull_map()).unwrap();
    let remote = Arc::new(Remote {
        layer,
        answers: AtomicBool::new(false),
        fetched: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    });
    let pull = Arc::new(Pull::open(&target, None, remote.clone(), Epoch(2)).unwrap());
    (dir, remote, pull, oracle)
}

fn read_at(layer: &Layer, offset: u64) -> Result<Vec<u8>> {
    let mut into = vec![0; BLOCK as usize];
    layer.read(offset, &mut [IoSliceMut::new(&mut into)]).map(|()| into)
}

#[test]
fn a_reader_waits_for_a_silent_source_and_goes_on_afterwards() {
    let (_dir, remote, pull, oracle) = scattered();
    let at = 100 * BLOCK;
    let reader = std::thread::spawn({
        let layer = Arc::clone(pull.layer());
        move || read_at(&layer, at)
    });
    while remote.refused.load(Ordering::Relaxed) < 2 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(!reader.is_finished());
    // What is here is written, read and flushed meanwhile.
    write(&**pull.layer(), 0, &[7; BLOCK as usize]).unwrap();
    pull.layer().flush().unwrap();
    assert_eq!(read_at(pull.layer(), 0).unwrap(), [7; BLOCK as usize]);
    remote.answers.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap().unwrap() == oracle[at as usize..(at + BLOCK) as usize]);
}

#[test]
fn a_reader_whose_block_comes_by_other_ways_does_not_ask_for_it_any_more() {
    let (_dir, remote, pull, _oracle) = scattered();
    let at = 100 * BLOCK;
    let reader = std::thread::spawn({
        let layer = Arc::clone(pull.layer());
        move || read_at(&layer, at)
    });
    while remote.refused.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The source never answers: the block is written here.
    write(&**pull.layer(), at, &[9; BLOCK as usize]).unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), [9; BLOCK as usize]);
}

#[test]
fn readers_that_nobody_waits_for_end() {
    let (_dir, remote, pull, oracle) = scattered();
    let reader = std::thread::spawn({
        let layer = Arc::clone(pull.layer());
        move || read_at(&layer, 0)
    });
    while remote.refused.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    pull.stop_waiting();
    assert_eq!(reader.join().unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(read_at(pull.layer(), 0).unwrap_err().kind(), ErrorKind::Unavailable);
    pull.wait_again();
    remote.answers.store(true, Ordering::Relaxed);
    while !pull.step(1 << 20).unwrap().done {}
    remote.answers.store(false, Ordering::Relaxed);
    assert!(read_all(&**pull.layer()) == oracle);
}

#[test]
fn scattered_blocks_are_fetched_many_at_a_time() {
    struct Counting(Arc<Remote>, AtomicU64);
    impl RemoteLayer for Counting {
        fn fetch(&self, ranges: &[FetchRange], into: &mut [u8], urgency: Urgency) -> Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.fetch(ranges, into, urgency)
        }
    }
    let (dir, remote, pull, oracle) = scattered();
    drop(pull);
    remote.answers.store(true, Ordering::Relaxed);
    let counting = Arc::new(Counting(remote, AtomicU64::new(0)));
    let pull = Pull::open(&dir.path().join("target"), None, counting.clone(), Epoch(2)).unwrap();
    let before = pull.progress();
    assert_eq!((before.total_bytes, before.left_bytes), (SIZE / 2, SIZE / 2));
    while !pull.step(u64::MAX).unwrap().done {}
    assert_eq!(counting.1.load(Ordering::Relaxed), 1, "1,024 blocks fit in one fetch");
    assert!(read_all(&**pull.layer()) == oracle);
}

#[test]
fn a_reader_that_looked_before_the_last_block_came_is_not_given_the_image() {
    // A source that, asked by a reader, lets the pull finish first: the reader's look is older than the end.
    struct Racing(Arc<Remote>, Mutex<Option<std::sync::mpsc::Sender<()>>>, AtomicBool);
    impl RemoteLayer for Racing {
        fn fetch(&self, ranges: &[FetchRange], into: &mut [u8], urgency: Urgency) -> Result<()> {
            if urgency == Urgency::Ahead {
                return self.0.fetch(ranges, into, urgency);
            }
            if let Some(asked) = self.1.lock().take() {
                asked.send(()).unwrap();
            }
            while !self.2.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(Error::new(ErrorKind::NotFound, "fetch from source: it has forgotten the layer"))
        }
    }
    let (dir, remote, pull, oracle) = scattered();
    drop(pull);
    remote.answers.store(true, Ordering::Relaxed);
    let (asked, was_asked) = std::sync::mpsc::channel();
    let racing = Arc::new(Racing(remote, Mutex::new(Some(asked)), AtomicBool::new(false)));
    let image = RamDisk::new(half_full(SIZE as usize)) as Arc<dyn BlockRead>;
    let pull = Pull::open(&dir.path().join("target"), Some(image), racing.clone(), Epoch(2)).unwrap();
    let at = 100 * BLOCK;
    let reader = std::thread::spawn({
        let layer = Arc::clone(pull.layer());
        move || read_at(&layer, at)
    });
    was_asked.recv().unwrap();
    while !pull.step(u64::MAX).unwrap().done {}
    racing.2.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap().unwrap() == oracle[at as usize..(at + BLOCK) as usize]);
}
