//! Crashes: what a layer does to its files is recorded, then cut off after every single step, in two ways.
//!
//! * The process dies (`kill -9`): everything written stays, the write under way stays in part. Every write that
//!   returned must be there: the guest goes on running.
//! * Power is lost: of what was not synced any part may stay, torn at any sector, also a file that was never made
//!   durable in its directory. Every flush that returned must hold, and each block be one of the values written at
//!   or after its last flushed one.
//!
//! Space of what was overwritten is freed in between, of every size.
//!
//! The disk becomes larger now and then; once it has, it stays so.
//!
//! In both: content that differs from what a session found has another `data_id`; and the layer goes on working.

use std::collections::BTreeMap;

use super::*;
use crate::disk::check;
use crate::disk::files::Dir;
use crate::disk::files::record::{Op, Recorder};
use whimbrel_wire::DataId;

const BLOCKS: u64 = 40;
const SIZE: usize = (BLOCKS * BLOCK) as usize;

type Files = BTreeMap<String, Vec<u8>>;

/// A block's content after each operation that touched it.
type History = Vec<Vec<(usize, Vec<u8>)>>;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }
}

/// A run of the workload, as the disk saw it.
struct Recording {
    start: Files,
    ops: Vec<Op>,
    history: History,
    /// Size of the disk after each operation that changed it.
    sizes: Vec<(usize, usize)>,
    /// Operations that were flushes (or ended with one).
    flushes: Vec<usize>,
    /// What each session found: when it began, the id of the content, the content.
    found: Vec<(usize, DataId, Vec<u8>)>,
}

fn load(path: &std::path::Path) -> Files {
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn base() -> Arc<dyn BlockRead> {
    RamDisk::new(half_full(SIZE / 2 + 512))
}

/// The disk block by block; the last one may be short, what it lacks is zeros.
fn blocks(content: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    content.chunks(4096).map(|block| {
        let mut whole = block.to_vec();
        whole.resize(4096, 0);
        whole
    })
}

fn record(seed: u64, steps: usize) -> Recording {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    Layer::create(&path, &spec(SIZE as u64)).unwrap();
    let start = load(&path);
    let recorder = Arc::new(Recorder::default());
    let files = Dir::recorded(&path, Arc::clone(&recorder));
    let open = |epoch| Layer::open_in(&files, Some(base()), epoch, true, |_| Ok(())).unwrap();
    let mut random = Random(seed);
    let mut epoch = Epoch(1);
    let mut layer = open(epoch);
    let mut content = read_all(&*layer);
    let mut found = vec![(0, layer.info().data_id, content.clone())];
    let mut history: History = blocks(&content).map(|block| vec![(0, block)]).collect();
    let mut sizes = vec![(0, SIZE)];
    let mut flushes = vec![0];
    for step in 1..=steps {
        recorder.mark(step as u64 * 2);
        let size = content.len();
        match random.below(23) {
            0..=11 => {
                let (sector, sectors) =
                    (random.below(size / 512), [1, 5, 8, 8, 16, 64, 300][random.below(7)]);
                let (sector, sectors) = if random.below(3) > 0 {
                    (sector / 8 * 8, usize::next_multiple_of(sectors, 8))
                } else {
                    (sector, sectors)
                };
                let range = sector * 512..size.min((sector + sectors) * 512);
                content[range.clone()].fill(step as u8);
                write(&*layer, range.start as u64, &content[range]).unwrap();
            }
            12..=13 => {
                let first = random.below(size.div_ceil(4096)) * 4096;
                let range = first..size.min(first + (1 + random.below(20)) * 4096);
                content[range.clone()].fill(0);
                layer.discard(range.start as u64, range.len() as u64).unwrap();
            }
            14..=16 => {
                layer.flush().unwrap();
                flushes.push(step);
            }
            17 => {
                layer.checkpoint().unwrap();
            }
            18 => {
                layer.reclaim.piece_blocks.store(1, Ordering::Relaxed);
                layer.reclaim().unwrap();
                // What it dropped, or punched, was flushed before; all that was written may be.
            }
            19 if size < 2 * SIZE => {
                content.resize(size + (1 + random.below(60)) * 512, 0);
                layer.grow(content.len() as u64).unwrap();
                sizes.push((step, content.len()));
            }
            _ => {
                if random.below(2) == 0 {
                    layer.close().unwrap();
                }
                drop(layer);
                epoch = epoch.next();
                layer = open(epoch);
                // Opening makes durable what it found.
                flushes.push(step);
                found.push((step, layer.info().data_id, content.clone()));
            }
        }
        assert!(read_all(&*layer) == content);
        history.resize(content.len().div_ceil(4096), vec![(0, vec![0; 4096])]);
        for (block, values) in blocks(&content).zip(&mut history) {
            if values.last().unwrap().1 != block {
                values.push((step, block));
            }
        }
        recorder.mark(step as u64 * 2 + 1);
    }
    let ops = recorder.ops.lock().clone();
    Recording { start, ops, history, sizes, flushes, found }
}

/// What may be on disk, op by op.
#[derive(Clone)]
struct Disk {
    /// With everything applied.
    now: Files,
    /// As of each file's last sync, and the directory's.
    durable: Files,
    /// Since then.
    pending: BTreeMap<String, Vec<(u64, Vec<u8>)>>,
    unsynced_names: Vec<String>,
    removed: Vec<String>,
}

fn put(file: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    file.resize(file.len().max(end), 0);
    file[offset as usize..end].copy_from_slice(bytes);
}

impl Disk {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Create(name) => {
                self.now.insert(name.clone(), Vec::new());
                self.pending.insert(name.clone(), Vec::new());
                self.unsynced_names.push(name.clone());
                self.removed.retain(|removed| removed != name);
            }
            Op::Write { name, offset, bytes } => {
                put(self.now.get_mut(name).unwrap(), *offset, bytes);
                self.pending.entry(name.clone()).or_default().push((*offset, bytes.clone()));
            }
            Op::Sync(name) => {
                // Removed since, but still open: nobody will find it.
                if let Some(bytes) = self.now.get(name) {
                    self.durable.insert(name.clone(), bytes.clone());
                    self.pending.remove(name);
                }
            }
            Op::Remove(name) => {
                self.now.remove(name);
                self.removed.push(name.clone());
            }
            Op::SyncDir => {
                self.unsynced_names.clear();
                for name in self.removed.drain(..) {
                    self.durable.remove(&name);
                    self.pending.remove(&name);
                }
            }
            Op::Mark(_) => {}
        }
    }

    /// Everything written, and a part of the write that was under way.
    fn killed(&self, next: Option<&Op>, random: &mut Random) -> Files {
        let mut files = self.now.clone();
        match next {
            Some(Op::Write { name, offset, bytes }) => {
                let part = &bytes[..random.below(bytes.len() + 1)];
                put(files.get_mut(name).unwrap(), *offset, part);
            }
            Some(Op::Create(name)) if random.below(2) == 0 => {
                files.insert(name.clone(), Vec::new());
            }
            _ => {}
        }
        files
    }

    /// What was synced, and any part of the rest.
    fn powerless(&self, random: &mut Random) -> Files {
        let mut files = self.durable.clone();
        for (name, writes) in &self.pending {
            let mut file = files.get(name).cloned().unwrap_or_default();
            let keep = random.below(4);
            for (offset, bytes) in writes {
                for (sector, at) in bytes.chunks(512).zip((*offset..).step_by(512)) {
                    // All, none, most, or half of the sectors.
                    let stays = match keep {
                        0 => true,
                        1 => false,
                        2 => random.below(12) > 0,
                        _ => random.below(2) > 0,
                    };
                    if stays {
                        put(&mut file, at, sector);
                    }
                }
            }
            files.insert(name.clone(), file);
        }
        for name in &self.unsynced_names {
            if random.below(2) == 0 {
                files.remove(name);
            }
        }
        for name in &self.removed {
            if random.below(2) == 0 {
                files.remove(name);
            }
        }
        files
    }
}

/// The values that a block, or the size, may have: from its last value at step `from` or before, on.
fn allowed<T>(values: &[(usize, T)], from: usize, until: usize) -> impl Iterator<Item = &T> {
    let first = values.partition_point(|(step, _)| *step <= from).saturating_sub(1);
    values.iter().skip(first).take_while(move |(step, _)| *step <= until).map(|(_, value)| value)
}

/// `from`: blocks are at least as new as after this step; `done` is over, `until` was begun.
fn verify(recording: &Recording, files: &Files, (from, done, until): (usize, usize, usize), what: &str) {
    let dir = temp_dir();
    let path = dir.path().join("layer");
    std::fs::create_dir(&path).unwrap();
    for (name, bytes) in files {
        std::fs::write(path.join(name), bytes).unwrap();
    }
    let epoch = Epoch(1000);
    let layer =
        Layer::open(&path, Some(base()), epoch, true).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut content = read_all(&*layer);
    // It is durable when it returns, without a flush.
    assert!(allowed(&recording.sizes, done, until).any(|size| *size == content.len()), "{what}: the size");
    for (number, (block, values)) in blocks(&content).zip(&recording.history).enumerate() {
        let good = allowed(values, from, until).any(|value| *value == block);
        assert!(good, "{what}: block {number} begins with {:?}", &block[..16]);
    }
    let id = layer.info().data_id;
    for (_, found_id, found) in recording.found.iter().filter(|(step, ..)| *step <= done) {
        assert!(id != *found_id || content == *found, "{what}: changed data under the old data_id");
    }
    // It goes on, over the torn tail, and opens again.
    content[4096..8192].fill(0xab);
    write(&*layer, BLOCK, &content[4096..8192]).unwrap();
    layer.flush().unwrap();
    drop(layer);
    let report = check(&path).unwrap();
    assert!(report.problems.is_empty(), "{what}: {:?}", report.problems);
    let layer = Layer::open(&path, Some(base()), epoch, true).unwrap();
    assert!(read_all(&*layer) == content, "{what}: after going on");
}

fn cut_everywhere(seed: u64, steps: usize, power_losses: usize) -> usize {
    let recording = record(seed, steps);
    let start = recording.start.clone();
    let mut disk = Disk {
        now: start.clone(),
        durable: start,
        pending: BTreeMap::new(),
        unsynced_names: vec![],
        removed: vec![],
    };
    let mut random = Random(seed ^ 0x55);
    let (mut begun, mut done) = (0, 0);
    for (number, op) in recording.ops.iter().enumerate() {
        if let Op::Mark(mark) = op {
            let step = (mark / 2) as usize;
            if mark % 2 == 0 {
                begun = step;
            } else {
                done = step;
            }
            continue;
        }
        let what = format!("seed {seed}, before op {number}, step {begun}");
        let killed = disk.killed(Some(op), &mut random);
        verify(&recording, &killed, (done, done, begun), &format!("{what}, killed"));
        let flushed = recording.flushes.iter().rev().find(|step| **step <= done).copied().unwrap_or(0);
        for turn in 0..power_losses {
            let what = format!("{what}, power loss {turn}");
            verify(&recording, &disk.powerless(&mut random), (flushed, done, begun), &what);
        }
        disk.apply(op);
    }
    recording.ops.len()
}

#[test]
fn a_crash_at_any_point_keeps_what_was_promised() {
    for seed in 1..=3 {
        let ops = cut_everywhere(seed, 45, 3);
        assert!(ops > 150, "{ops}");
    }
}

#[test]
fn a_crash_at_any_point_keeps_what_was_promised_over_several_segments() {
    cut_everywhere(77, 90, 1);
}
