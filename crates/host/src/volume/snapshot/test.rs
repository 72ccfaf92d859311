//! Snapshots of volumes of one host, with real files and metadata; the agent ends and starts again.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, Ordering};

use whimbrel_wire::api::TaskKind;

use super::super::test_cluster::{Agent, Cluster, name};
use super::*;
use crate::block_dev::{BlockDev, BlockRead};
use crate::task::Tasks;

const BLOCK: usize = 4096;
const SIZE: usize = 8 << 20;

async fn create(agent: &Agent, volume: &str, from: Option<&str>) -> Result<VolumeRecord> {
    let from = from.map(|from| from.parse().unwrap());
    let size_bytes = from.is_none().then_some(SIZE as u64);
    agent.volumes.create(&VolumeCreate { name: name(volume), image: None, size_bytes, from }).await
}

async fn snapshot(agent: &Agent, volume: &str, as_name: &str, with: &SnapshotWith) -> Result<VolumeRecord> {
    let request = VolumeSnapshot { name: Some(name(as_name)), no_quiesce: false };
    agent.volumes.snapshot(&name(volume), &request, with).await
}

async fn remove(agent: &Agent, snapshot: &str) -> Result<()> {
    let task = Arc::new(Tasks::default().start(TaskKind::Merge, snapshot));
    agent.volumes.remove_snapshot(&snapshot.parse().unwrap(), &task).await
}

async fn record(agent: &Agent, volume: &str) -> VolumeRecord {
    agent.volumes.record(&name(volume)).await.unwrap().value
}

async fn open(agent: &Agent, volume: &str) -> Arc<Layer> {
    agent.volumes.open(&record(agent, volume).await).await.unwrap()
}

fn write(disk: &dyn BlockDev, block: usize, fill: u8) {
    disk.write((block * BLOCK) as u64, &[IoSlice::new(&[fill; BLOCK])]).unwrap();
}

fn first_bytes(disk: &dyn BlockRead, blocks: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks * BLOCK];
    disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes.iter().copied().step_by(BLOCK).collect()
}

async fn sound(agent: &Agent, volume: &str) {
    let check = agent.volumes.check(&record(agent, volume).await).await.unwrap();
    assert!(check.problems.is_empty(), "{:?}", check.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_keep_what_was_there_and_go_in_any_order() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    let first = create(&agent, "v", None).await.unwrap();
    write(&*open(&agent, "v").await, 0, 1);
    let made = snapshot(&agent, "v", "one", &SnapshotWith::default()).await.unwrap();
    assert_ne!(made.disk_id, first.disk_id);
    assert_eq!((made.layers.len(), made.layers[0].disk_id), (1, first.disk_id));
    assert_eq!(made.right.object, Object::Layer(made.disk_id));
    write(&*open(&agent, "v").await, 1, 2);
    snapshot(&agent, "v", "two", &SnapshotWith::default()).await.unwrap();
    write(&*open(&agent, "v").await, 0, 3);
    let again = snapshot(&agent, "v", "two", &SnapshotWith::default()).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    snapshot(&agent, "v", "three", &SnapshotWith::default()).await.unwrap();

    let clone = create(&agent, "c", Some("v@two")).await.unwrap();
    assert_eq!(clone.layers.len(), 2);
    assert!(clone.layers.iter().all(|layer| layer.snapshot.is_none()));
    assert_eq!(first_bytes(&*open(&agent, "c").await, 3), [1, 2, 0]);
    write(&*open(&agent, "c").await, 2, 9);
    assert_eq!(first_bytes(&*open(&agent, "v").await, 3), [3, 2, 0]);
    assert_eq!(create(&agent, "d", Some("v@none")).await.unwrap_err().kind(), ErrorKind::NotFound);

    // What the clone was made from stays; what lies under both goes, and both read the same.
    let error = remove(&agent, "v@two").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("made from it: c"), "{error}");
    let error = agent.volumes.remove(&name("v")).await.unwrap_err();
    assert!(error.to_string().contains(": c"), "{error}");
    remove(&agent, "v@one").await.unwrap();
    for volume in ["v", "c"] {
        sound(&agent, volume).await;
    }
    assert_eq!(first_bytes(&*open(&agent, "c").await, 3), [1, 2, 9]);
    assert_eq!(first_bytes(&*open(&agent, "v").await, 3), [3, 2, 0]);
    assert_eq!(record(&agent, "c").await.layers.len(), 1);
    agent.volumes.remove(&name("c")).await.unwrap();
    remove(&agent, "v@three").await.unwrap();
    remove(&agent, "v@two").await.unwrap();
    sound(&agent, "v").await;
    let last = record(&agent, "v").await;
    assert!(last.layers.is_empty());
    assert_eq!(first_bytes(&*open(&agent, "v").await, 3), [3, 2, 0]);
    assert_eq!(agent.volumes.dir().list().unwrap(), [last.disk_id]);
    // With its snapshots it goes as a whole.
    snapshot(&agent, "v", "four", &SnapshotWith::default()).await.unwrap();
    agent.volumes.remove(&name("v")).await.unwrap();
    assert!(agent.volumes.dir().list().unwrap().is_empty());
}

/// A writer that never pauses, through the slot that a guest's requests go through.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_in_use_changes_layers_without_an_error_and_the_snapshot_is_one_moment() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    create(&agent, "v", None).await.unwrap();
    let slot = DeviceSlot::active(open(&agent, "v").await);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (slot, stop) = (slot.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                // Always in this order, so that a moment in which the second is newer never was.
                for block in [0, 1] {
                    let disk = slot.enter_within(Duration::from_secs(20)).unwrap();
                    let bytes = count.to_le_bytes().repeat(BLOCK / 8);
                    disk.write(block * BLOCK as u64, &[IoSlice::new(&bytes)]).unwrap();
                }
                if count.is_multiple_of(8) {
                    slot.enter_within(Duration::from_secs(20)).unwrap().flush().unwrap();
                }
            }
            count
        })
    };
    let with = SnapshotWith { slot: Some(slot.clone()), agent: None };
    for number in 0..6 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        snapshot(&agent, "v", &format!("s{number}"), &with).await.unwrap();
    }
    remove(&agent, "v@s5").await.unwrap();
    remove(&agent, "v@s2").await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let count = writer.join().unwrap();
    let counters = |disk: &dyn BlockRead| {
        let mut bytes = [0; 2 * BLOCK];
        disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        [0, BLOCK].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(counters(&*open(&agent, "v").await), [count, count]);
    let mut last = 0;
    for number in [0, 1, 3, 4] {
        let volume = format!("c{number}");
        create(&agent, &volume, Some(&format!("v@s{number}"))).await.unwrap();
        let [first, second] = counters(&*open(&agent, &volume).await);
        assert!(second == first || second + 1 == first, "{first} {second}");
        assert!(first > last && second <= count, "{first} {last}");
        last = first;
        sound(&agent, &volume).await;
    }
    sound(&agent, "v").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_anywhere_goes_on_with_every_write() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    create(&agent, "v", None).await.unwrap();
    let layer = open(&agent, "v").await;
    write(&*layer, 0, 1);
    // As the record is when the agent ends after it said so and before the layers changed places.
    let old = agent.volumes.record(&name("v")).await.unwrap();
    let data_id = layer.settle_id().unwrap();
    let parent = Parent::Layer { disk_id: old.value.disk_id, data_id };
    let spec = LayerSpec::new(parent, SIZE as u64, Epoch(1));
    agent.volumes.dir().create(&spec).unwrap();
    let made = LayerRecord {
        disk_id: old.value.disk_id,
        data_id,
        size_bytes: SIZE as u64,
        snapshot: Some(name("s")),
        made_s: 0,
        quiesced: false,
        removing: false,
    };
    let next = VolumeRecord { disk_id: spec.disk_id, layers: vec![made], ..old.value.clone() };
    Change::default().replace(&old, &next).unwrap().commit_or_refuse(&*cluster.meta, "test").await.unwrap();
    write(&*layer, 1, 2);
    drop(layer);
    agent.end().await;

    let agent = cluster.agent("a", "127.0.0.1:0").await;
    assert_eq!(first_bytes(&*open(&agent, "v").await, 2), [1, 2]);
    write(&*open(&agent, "v").await, 2, 3);
    sound(&agent, "v").await;
    // A removal that was begun is known, and goes on.
    let now = agent.volumes.record(&name("v")).await.unwrap();
    let mut leaving = now.value.clone();
    leaving.layers[0].removing = true;
    Change::default()
        .replace(&now, &leaving)
        .unwrap()
        .commit_or_refuse(&*cluster.meta, "test")
        .await
        .unwrap();
    agent.end().await;
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    let unfinished = agent.volumes.unfinished_removals().await.unwrap();
    assert_eq!(unfinished.iter().map(ToString::to_string).collect::<Vec<_>>(), ["v@s"]);
    let error = snapshot(&agent, "v", "t", &SnapshotWith::default()).await.unwrap_err();
    assert!(error.to_string().contains("being removed"), "{error}");
    remove(&agent, "v@s").await.unwrap();
    assert!(agent.volumes.unfinished_removals().await.unwrap().is_empty());
    assert_eq!(first_bytes(&*open(&agent, "v").await, 3), [1, 2, 3]);
    sound(&agent, "v").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time_changes_a_chain() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    create(&agent, "v", None).await.unwrap();
    let claim = agent.volumes.claim([name("v")], "its VM is being moved").unwrap();
    let error = snapshot(&agent, "v", "s", &SnapshotWith::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("its VM is being moved"), "{error}");
    drop(claim);
    snapshot(&agent, "v", "s", &SnapshotWith::default()).await.unwrap();
    // A disk that is not served now is not switched.
    let fenced = DeviceSlot::active(open(&agent, "v").await);
    fenced.fence(Duration::from_secs(1)).unwrap();
    let with = SnapshotWith { slot: Some(fenced), agent: None };
    assert_eq!(snapshot(&agent, "v", "t", &with).await.unwrap_err().kind(), ErrorKind::Refused);
}
