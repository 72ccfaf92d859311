//! Chains: snapshots, clones and merges at random against disks in RAM, cut off and opened again.

use std::collections::BTreeMap;

use proptest::prelude::*;
use whimbrel_wire::record::layer::State;
use whimbrel_wire::{DataId, DiskId};

use super::*;
use crate::disk::files::Dir;
use crate::disk::header_file::HeaderFile;
use crate::disk::{Merge, MergePlan, VolumeDir};

const BLOCKS: u64 = 600;
const SIZE: usize = (BLOCKS * BLOCK) as usize;

#[derive(Clone, Debug)]
enum Step {
    Write {
        volume: usize,
        block: u64,
        blocks: u64,
        fill: u8,
    },
    Discard {
        volume: usize,
        block: u64,
        blocks: u64,
    },
    /// The volume goes on on a new layer.
    Snapshot {
        volume: usize,
    },
    /// Another volume on one of its lower layers.
    Clone {
        volume: usize,
        layer: usize,
    },
    /// A lower layer is taken out, after so many tries that are cut off.
    Remove {
        volume: usize,
        layer: usize,
        cuts: u64,
    },
    /// Everything is closed and opened again, in order or not.
    Reopen {
        in_order: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..BLOCKS - 1, prop_oneof![1..4u64, 1..300u64]);
    prop_oneof![
        8 => (0..4usize, range(), 1..255u8)
            .prop_map(|(volume, (block, blocks), fill)| Step::Write { volume, block, blocks, fill }),
        2 => (0..4usize, range()).prop_map(|(volume, (block, blocks))| Step::Discard { volume, block, blocks }),
        4 => (0..4usize).prop_map(|volume| Step::Snapshot { volume }),
        2 => (0..4usize, 0..6usize).prop_map(|(volume, layer)| Step::Clone { volume, layer }),
        3 => (0..4usize, 0..6usize, 0..4u64)
            .prop_map(|(volume, layer, cuts)| Step::Remove { volume, layer, cuts }),
        1 => any::<bool>().prop_map(|in_order| Step::Reopen { in_order }),
    ]
}

struct Volume {
    top: Arc<Layer>,
    oracle: Vec<u8>,
}

struct Rig {
    dir: VolumeDir,
    volumes: Vec<Volume>,
}

fn new_layer(dir: &VolumeDir, parent: Parent) -> DiskId {
    let spec = LayerSpec { segment_blocks: 512, ..LayerSpec::new(parent, SIZE as u64, Epoch(1)) };
    dir.create(&spec).unwrap();
    spec.disk_id
}

fn on(layer: &Layer) -> Parent {
    let info = layer.info();
    Parent::Layer { disk_id: info.disk_id, data_id: info.data_id }
}

impl Rig {
    fn open(&self, disk_id: DiskId) -> Arc<Layer> {
        self.dir.open(disk_id, None, Epoch(1), true).unwrap()
    }

    fn snapshot(&mut self, volume: usize) {
        let below = Arc::clone(&self.volumes[volume].top);
        if self.dir.chain(below.info().disk_id).unwrap().len() > 8 {
            return;
        }
        below.settle_id().unwrap();
        let id = new_layer(&self.dir, on(&below));
        let above =
            Layer::open(&self.dir.path(id), Some(Arc::clone(&below) as Arc<dyn BlockRead>), Epoch(1), true);
        below.seal().unwrap();
        self.dir.keep_sealed(&below);
        assert_eq!(write(&*below, 0, &[1; 512]).unwrap_err().kind(), ErrorKind::Refused);
        self.volumes[volume].top = above.unwrap();
    }

    fn clone_from(&mut self, volume: usize, layer: usize) {
        let chain = self.dir.chain(self.volumes[volume].top.info().disk_id).unwrap();
        let Some(on) = chain.get(layer + 1).filter(|_| self.volumes.len() < 4) else { return };
        let parent = Parent::Layer { disk_id: on.disk_id, data_id: on.data_id };
        let top = self.open(new_layer(&self.dir, parent));
        let oracle = read_all(&*top);
        self.volumes.push(Volume { top, oracle });
    }

    /// Takes a lower layer out of a volume's chain, if one layer only lies on it.
    fn remove(&mut self, volume: usize, layer: usize, cuts: u64) {
        let chain = self.dir.chain(self.volumes[volume].top.info().disk_id).unwrap();
        let Some(header) = chain.get(layer + 1) else { return };
        let plan = MergePlan { layer: header.disk_id, child: chain[layer].disk_id };
        let tops: BTreeMap<DiskId, Arc<Layer>> =
            self.volumes.iter().map(|volume| (volume.top.info().disk_id, Arc::clone(&volume.top))).collect();
        let open = |id: DiskId| tops.get(&id).cloned();
        if self.dir.children(plan.layer).unwrap().len() > 1 {
            let error = Merge::new(&self.dir, plan, &open).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            return;
        }
        for cut in 0..cuts {
            let mut left = cut;
            let cut_off = Merge::new(&self.dir, plan, &open).unwrap().run(&mut |_, _| {
                if left == 0 {
                    return Err(Error::new(ErrorKind::Cancelled, "cut off"));
                }
                left -= 1;
                Ok(())
            });
            if cut_off.is_ok() {
                return;
            }
            self.verify("cut off");
        }
        let stands = Merge::new(&self.dir, plan, &open).unwrap().run(&mut |_, _| Ok(())).unwrap();
        assert!(stands == plan.layer || stands == plan.child);
        let now = self.dir.chain(self.volumes[volume].top.info().disk_id).unwrap();
        assert_eq!(now.len(), chain.len() - 1);
        assert!(now.iter().all(|header| header.second_linkage.is_none()));
    }

    fn verify(&self, what: &str) {
        for (number, volume) in self.volumes.iter().enumerate() {
            assert!(read_all(&*volume.top) == volume.oracle, "{what}: volume {number}");
        }
    }

    /// As a new process finds it.
    fn reopen(&mut self, in_order: bool) {
        let ids: Vec<DiskId> = self.volumes.iter().map(|volume| volume.top.info().disk_id).collect();
        for volume in &mut self.volumes {
            if in_order {
                volume.top.close().unwrap();
            }
            // The lock goes with the last handle.
            volume.top = layer(BLOCK).2;
        }
        for (volume, id) in ids.into_iter().enumerate() {
            self.volumes[volume].top = self.open(id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn chains_read_as_disks_in_ram_do(steps in proptest::collection::vec(step(), 1..50)) {
        let files = temp_dir();
        let dir = VolumeDir::new(files.path()).unwrap();
        let top = new_layer(&dir, Parent::None);
        let mut rig = Rig { dir, volumes: vec![] };
        rig.volumes.push(Volume { top: rig.open(top), oracle: vec![0; SIZE] });
        for step in steps {
            let count = rig.volumes.len();
            match step.clone() {
                Step::Write { volume, block, blocks, fill } => {
                    let volume = &mut rig.volumes[volume % count];
                    let range = (block * BLOCK) as usize..((block + blocks).min(BLOCKS) * BLOCK) as usize;
                    volume.oracle[range.clone()].fill(fill);
                    write(&*volume.top, block * BLOCK, &volume.oracle[range]).unwrap();
                }
                Step::Discard { volume, block, blocks } => {
                    let volume = &mut rig.volumes[volume % count];
                    let length = blocks.min(BLOCKS - block) * BLOCK;
                    volume.oracle[(block * BLOCK) as usize..(block * BLOCK + length) as usize].fill(0);
                    volume.top.discard(block * BLOCK, length).unwrap();
                }
                Step::Snapshot { volume } => rig.snapshot(volume % count),
                Step::Clone { volume, layer } => rig.clone_from(volume % count, layer),
                Step::Remove { volume, layer, cuts } => rig.remove(volume % count, layer, cuts),
                Step::Reopen { in_order } => rig.reopen(in_order),
            }
            rig.verify(&format!("{step:?}"));
        }
        rig.reopen(false);
        rig.verify("at the end");
        for volume in &rig.volumes {
            for report in rig.dir.check(volume.top.info().disk_id, None).unwrap() {
                prop_assert!(report.problems.is_empty(), "{:?}", report.problems);
            }
        }
        // Volumes go one by one, and nothing is left that nobody needs.
        while let Some(volume) = rig.volumes.pop() {
            let ids: Vec<DiskId> =
                rig.dir.chain(volume.top.info().disk_id).unwrap().iter().map(|header| header.disk_id).collect();
            drop(volume);
            rig.dir.remove(ids[0]).unwrap();
            rig.dir.remove_unused(&ids[1..], |_| false).unwrap();
            rig.verify("after another volume went");
        }
        prop_assert_eq!(rig.dir.list().unwrap(), Vec::<DiskId>::new());
    }
}

/// A volume whose lower layer's process died before it was sealed.
#[test]
fn a_lower_layer_that_was_not_sealed_is_sealed_with_all_that_was_written() {
    let files = temp_dir();
    let dir = VolumeDir::new(files.path()).unwrap();
    let lower = new_layer(&dir, Parent::None);
    let below = dir.open(lower, None, Epoch(1), true).unwrap();
    let data_id = below.settle_id().unwrap();
    let top = new_layer(&dir, Parent::Layer { disk_id: lower, data_id });
    let mut oracle = vec![0; SIZE];
    for block in 0..50usize {
        oracle[block * 8192..block * 8192 + 512].fill(block as u8 + 1);
        write(&*below, block as u64 * 8192, &oracle[block * 8192..block * 8192 + 512]).unwrap();
    }
    // While somebody still writes it, nothing opens over it.
    assert_eq!(dir.open(top, None, Epoch(1), true).unwrap_err().kind(), ErrorKind::Refused);
    drop(below);
    assert!(dir.check(top, None).unwrap()[1].notes.iter().any(|note| note.contains("not sealed")));
    let layer = dir.open(top, None, Epoch(1), true).unwrap();
    assert!(read_all(&*layer) == oracle);
    let header = dir.header(lower).unwrap();
    assert_eq!((header.state, header.data_id), (State::Sealed, data_id));
    let error = dir.open(lower, None, Epoch(9), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("snapshot"), "{error}");
}

#[test]
fn a_parent_that_changed_is_named_with_its_file_and_accepted_only_on_the_operators_word() {
    let files = temp_dir();
    let dir = VolumeDir::new(files.path()).unwrap();
    let lower = new_layer(&dir, Parent::None);
    let below = dir.open(lower, None, Epoch(1), true).unwrap();
    write(&*below, 0, &[1; 8192]).unwrap();
    let was = below.settle_id().unwrap();
    below.seal().unwrap();
    drop(below);
    let top = new_layer(&dir, Parent::Layer { disk_id: lower, data_id: was });
    // Behind the child's back.
    let now = DataId::from_u128(77);
    let mut file = HeaderFile::open(&Dir::new(&dir.path(lower)), true).unwrap();
    file.update(|header| header.data_id = now).map_err(Error::from).unwrap();
    drop(file);
    let error = dir.open(top, None, Epoch(1), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    for word in [was.to_string(), now.to_string(), dir.path(lower).display().to_string()] {
        assert!(error.to_string().contains(&word), "{error}");
    }
    assert_eq!(dir.check(top, None).unwrap()[0].problems.len(), 1);
    let broken = dir.relink(top, false).unwrap();
    assert_eq!((broken.len(), broken[0].was, broken[0].now), (1, was, now));
    assert!(dir.open(top, None, Epoch(1), true).is_err(), "looking repairs nothing");
    assert_eq!(dir.relink(top, true).unwrap(), broken);
    assert!(dir.relink(top, true).unwrap().is_empty());
    assert_eq!(read(&*dir.open(top, None, Epoch(1), true).unwrap(), 0, 8192), [1; 8192]);
}

#[test]
fn chains_in_a_circle_and_of_wrong_sizes_do_not_open() {
    let files = temp_dir();
    let dir = VolumeDir::new(files.path()).unwrap();
    let first = new_layer(&dir, Parent::None);
    let data_id = dir.header(first).unwrap().data_id;
    let second = new_layer(&dir, Parent::Layer { disk_id: first, data_id });
    let over = Parent::Layer { disk_id: second, data_id: dir.header(second).unwrap().data_id };
    dir.set_parent(first, over).unwrap();
    let error = dir.open(second, None, Epoch(1), true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    dir.set_parent(first, Parent::None).unwrap();
    let mut file = HeaderFile::open(&Dir::new(&dir.path(first)), true).unwrap();
    file.update(|header| header.size_bytes += 512).map_err(Error::from).unwrap();
    drop(file);
    let error = dir.open(second, None, Epoch(1), true).unwrap_err();
    assert!(error.to_string().contains("smaller"), "{error}");
}

#[test]
fn a_guest_writes_on_while_the_layer_under_it_is_taken_out() {
    let files = temp_dir();
    let dir = VolumeDir::new(files.path()).unwrap();
    let lower = new_layer(&dir, Parent::None);
    let below = dir.open(lower, None, Epoch(1), true).unwrap();
    let mut oracle: Vec<u8> = (0..SIZE).map(|at| (at / 4096 % 250) as u8 + 1).collect();
    write(&*below, 0, &oracle).unwrap();
    let data_id = below.settle_id().unwrap();
    let top = new_layer(&dir, Parent::Layer { disk_id: lower, data_id });
    let above =
        Layer::open(&dir.path(top), Some(Arc::clone(&below) as Arc<dyn BlockRead>), Epoch(1), true).unwrap();
    below.seal().unwrap();
    dir.keep_sealed(&below);
    drop(below);
    let open = |id: DiskId| (id == top).then(|| Arc::clone(&above));
    let before = {
        write(&*above, 0, &[7; 512]).unwrap();
        oracle[..512].fill(7);
        above.info().data_id
    };
    std::thread::scope(|scope| {
        let merging = scope.spawn(|| {
            let plan = MergePlan { layer: lower, child: top };
            Merge::new(&dir, plan, &open).unwrap().run(&mut |_, _| Ok(())).unwrap()
        });
        for turn in 0..400u64 {
            let block = turn * 7 % BLOCKS;
            let bytes = vec![(turn % 200) as u8 + 1; 1024];
            let at = (block * BLOCK + 512) as usize;
            oracle[at..at + 1024].copy_from_slice(&bytes);
            write(&*above, at as u64, &bytes).unwrap();
            assert_eq!(read(&*above, at as u64, 1024), bytes);
        }
        assert_eq!(merging.join().unwrap(), top);
    });
    assert!(read_all(&*above) == oracle);
    assert_eq!(above.info().data_id, before, "nothing a reader sees changed");
    assert_eq!(above.info().parent, Parent::None);
    assert_eq!(dir.list().unwrap(), [top]);
    drop(above);
    assert!(read_all(&*dir.open(top, None, Epoch(1), true).unwrap()) == oracle);
}
