//! Volumes that become larger, with real files and metadata; the agent ends in the middle and starts again.

use std::io::{IoSlice, IoSliceMut};

use uuid::Uuid;
use whimbrel_wire::api::{TaskKind, VolumeAttach, VolumeCreate, VolumeSnapshot};
use whimbrel_wire::meta::{Attempt, VmSpec, VmState};
use whimbrel_wire::{AttemptId, Epoch, Object, Right, VmId};

use super::super::test_cluster::{Agent, Cluster, name};
use super::*;
use crate::block_dev::{BlockDev, BlockRead};
use crate::disk::Layer;
use crate::export::DeviceSlot;
use crate::task::Tasks;

const BLOCK: u64 = 4096;
const SIZE: u64 = 4 << 20;

async fn create(agent: &Agent, volume: &str, from: Option<&str>) -> VolumeRecord {
    let from = from.map(|from| from.parse().unwrap());
    let size_bytes = from.is_none().then_some(SIZE);
    let request = VolumeCreate { name: name(volume), image: None, size_bytes, from };
    agent.volumes.create(&request).await.unwrap()
}

async fn resize(agent: &Agent, volume: &str, size: u64) -> Result<VolumeRecord> {
    agent.volumes.resize(&name(volume), size, &SnapshotWith::default()).await
}

async fn snapshot(agent: &Agent, volume: &str, as_name: &str) -> VolumeRecord {
    let request = VolumeSnapshot { name: Some(name(as_name)), no_quiesce: false };
    agent.volumes.snapshot(&name(volume), &request, &SnapshotWith::default()).await.unwrap()
}

async fn record(agent: &Agent, volume: &str) -> VolumeRecord {
    agent.volumes.record(&name(volume)).await.unwrap().value
}

async fn open(agent: &Agent, volume: &str) -> Arc<Layer> {
    agent.volumes.open(&record(agent, volume).await).await.unwrap()
}

fn write(disk: &dyn BlockDev, offset: u64, fill: u8) {
    disk.write(offset, &[IoSlice::new(&[fill; BLOCK as usize])]).unwrap();
}

fn first_byte(disk: &dyn BlockRead, offset: u64) -> u8 {
    let mut bytes = [0; 512];
    disk.read(offset, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes[0]
}

/// Problems and notes of a check.
async fn check(agent: &Agent, volume: &str) -> (Vec<String>, Vec<String>) {
    let check = agent.volumes.check(&record(agent, volume).await).await.unwrap();
    (check.problems, check.notes)
}

/// The record says so; as an agent leaves it that ends before it goes on.
async fn say(cluster: &Cluster, agent: &Agent, volume: &str, change: impl FnOnce(&mut VolumeRecord)) {
    let old = agent.volumes.record(&name(volume)).await.unwrap();
    let mut next = old.value.clone();
    change(&mut next);
    let change = Change::default().replace(&old, &next).unwrap();
    change.commit_or_refuse(&*cluster.meta, "test").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn at_rest_and_in_use_a_volume_becomes_larger_and_never_smaller() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    let made = create(&agent, "v", None).await;
    let resized = resize(&agent, "v", 2 * SIZE + 100).await.unwrap();
    assert_eq!(resized, VolumeRecord { size_bytes: 2 * SIZE + 512, ..made.clone() });
    assert!(agent.volumes.opened(made.disk_id).is_none(), "nobody needs it open");
    let layer = open(&agent, "v").await;
    assert_eq!(layer.size_bytes(), 2 * SIZE + 512);
    write(&*layer, 2 * SIZE - BLOCK, 1);

    let slot = DeviceSlot::active(Arc::clone(&layer) as _);
    let with = SnapshotWith { slot: Some(slot.clone()), agent: None };
    let entered = slot.clone();
    // A request under way is not in the way.
    let held = tokio::task::spawn_blocking(move || {
        let device = entered.enter_within(Duration::from_secs(20)).unwrap();
        write(&*device, 0, 9);
        std::thread::sleep(Duration::from_millis(300));
        write(&*device, 3 * SIZE - BLOCK, 2);
    });
    agent.volumes.resize(&name("v"), 3 * SIZE, &with).await.unwrap();
    held.await.unwrap();
    assert_eq!((layer.size_bytes(), slot.size_bytes()), (3 * SIZE, 3 * SIZE));
    assert_eq!(first_byte(&*layer, 3 * SIZE - BLOCK), 2);
    let before = (record(&agent, "v").await, layer.info().data_id);
    assert_eq!(resize(&agent, "v", 3 * SIZE).await.unwrap(), before.0, "it is that large");
    for size in [SIZE, 0, u64::MAX] {
        let error = resize(&agent, "v", size).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!((record(&agent, "v").await, layer.info().data_id), before);
    let missing = resize(&agent, "w", SIZE).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(check(&agent, "v").await.0, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_between_record_and_layer_goes_on_at_the_next_open() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    let made = create(&agent, "v", None).await;
    let layer = open(&agent, "v").await;
    write(&*layer, SIZE - BLOCK, 1);
    let id = layer.info().data_id;
    say(&cluster, &agent, "v", |record| record.size_bytes = 2 * SIZE).await;
    let (problems, notes) = check(&agent, "v").await;
    assert!(
        problems.is_empty() && notes.iter().any(|note| note.contains("when it is opened next")),
        "{notes:?}"
    );
    drop(layer);
    agent.end().await;

    let agent = cluster.agent("a", "127.0.0.1:0").await;
    assert_eq!(agent.volumes.dir().header(made.disk_id).unwrap().size_bytes, SIZE);
    let layer = open(&agent, "v").await;
    assert_eq!(layer.size_bytes(), 2 * SIZE);
    assert_ne!(layer.info().data_id, id);
    write(&*layer, 2 * SIZE - BLOCK, 2);
    assert_eq!((first_byte(&*layer, SIZE - BLOCK), first_byte(&*layer, SIZE)), (1, 0));
    // In one process: the command again does it, for a layer that is open, and for what serves it.
    say(&cluster, &agent, "v", |record| record.size_bytes = 3 * SIZE).await;
    let slot = DeviceSlot::active(open(&agent, "v").await);
    let with = SnapshotWith { slot: Some(slot.clone()), agent: None };
    assert_eq!(slot.size_bytes(), 2 * SIZE);
    agent.volumes.resize(&name("v"), 3 * SIZE, &with).await.unwrap();
    assert_eq!((layer.size_bytes(), slot.size_bytes()), (3 * SIZE, 3 * SIZE));
    let (problems, notes) = check(&agent, "v").await;
    assert!(problems.is_empty() && !notes.iter().any(|note| note.contains("bytes, its record")), "{notes:?}");
    // The other way round never happens by itself, and is told.
    say(&cluster, &agent, "v", |record| record.size_bytes = SIZE).await;
    assert_eq!(check(&agent, "v").await.0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_snapshots_the_layer_on_top_grows_and_its_parents_keep_their_size() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    create(&agent, "v", None).await;
    write(&*open(&agent, "v").await, SIZE - BLOCK, 1);
    snapshot(&agent, "v", "one").await;
    resize(&agent, "v", 2 * SIZE).await.unwrap();
    write(&*open(&agent, "v").await, 2 * SIZE - BLOCK, 2);
    snapshot(&agent, "v", "two").await;
    resize(&agent, "v", 3 * SIZE).await.unwrap();
    let sizes = |record: &VolumeRecord| -> Vec<u64> {
        record.layers.iter().map(|layer| layer.size_bytes).chain([record.size_bytes]).collect()
    };
    assert_eq!(sizes(&record(&agent, "v").await), [SIZE, 2 * SIZE, 3 * SIZE]);
    for (volume, from, size) in [("c", "v@one", SIZE), ("d", "v@two", 2 * SIZE)] {
        assert_eq!(create(&agent, volume, Some(from)).await.size_bytes, size);
        assert_eq!(open(&agent, volume).await.size_bytes(), size);
        assert_eq!(check(&agent, volume).await.0, Vec::<String>::new());
    }
    let see = |disk: &Layer| {
        [SIZE - BLOCK, SIZE, 2 * SIZE - BLOCK, 3 * SIZE - BLOCK].map(|at| first_byte(disk, at))
    };
    assert_eq!(see(&*open(&agent, "v").await), [1, 0, 2, 0]);
    assert_eq!(check(&agent, "v").await.0, Vec::<String>::new());
    for volume in ["c", "d"] {
        agent.volumes.remove(&name(volume)).await.unwrap();
    }
    agent.end().await;
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    assert_eq!(see(&*open(&agent, "v").await), [1, 0, 2, 0]);
    for (left, snapshot) in ["v@one", "v@two"].into_iter().enumerate() {
        let task = Arc::new(Tasks::default().start(TaskKind::Merge, snapshot));
        agent.volumes.remove_snapshot(&snapshot.parse().unwrap(), &task).await.unwrap();
        assert_eq!(see(&*open(&agent, "v").await), [1, 0, 2, 0]);
        assert_eq!(record(&agent, "v").await.layers.len(), 1 - left);
        assert_eq!(check(&agent, "v").await.0, Vec::<String>::new());
    }
    assert_eq!(record(&agent, "v").await.size_bytes, 3 * SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_moves_or_is_changed_otherwise_keeps_its_size() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    let made = create(&agent, "v", None).await;
    let refused = |words: &'static str| {
        let agent = &agent;
        async move {
            let error = resize(agent, "v", 2 * SIZE).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(record(agent, "v").await.size_bytes, SIZE);
        }
    };
    let claim = agent.volumes.claim([name("v")], "its VM is being moved").unwrap();
    refused("its VM is being moved").await;
    drop(claim);
    let fenced = DeviceSlot::active(open(&agent, "v").await);
    fenced.fence(Duration::from_secs(1)).unwrap();
    let with = SnapshotWith { slot: Some(fenced), agent: None };
    let error = agent.volumes.resize(&name("v"), 2 * SIZE, &with).await.unwrap_err();
    assert!(error.to_string().contains("being moved"), "{error}");

    // The VM's record says that it moves, whatever this agent knows of it.
    let vm = VmRecord {
        name: name("web"),
        right: Right { object: Object::Memory(VmId(Uuid::new_v4())), ..made.right.clone() },
        state: VmState::Migrating,
        spec: VmSpec::default(),
        attempt: Some(Attempt { id: AttemptId(Uuid::new_v4()), target: name("b") }),
        came_by: None,
        waiting_for: None,
    };
    let change = Change::default().create(&key::vm(&name("web")), &vm).unwrap();
    change.commit_or_refuse(&*cluster.meta, "test").await.unwrap();
    say(&cluster, &agent, "v", |record| record.attached_to = Some(name("web"))).await;
    refused("its VM is being moved").await;
    say(&cluster, &agent, "v", |record| record.attached_to = None).await;

    say(&cluster, &agent, "v", |record| record.depends_on = Some(name("b"))).await;
    refused("depends on host b").await;
    say(&cluster, &agent, "v", |record| record.depends_on = None).await;
    let away = Right { holder: name("b"), epoch: Epoch(2), ..made.right.clone() };
    say(&cluster, &agent, "v", |record| record.right = away).await;
    refused("host b holds the right").await;
    say(&cluster, &agent, "v", |record| record.right = made.right.clone()).await;
    resize(&agent, "v", 2 * SIZE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_on_a_socket_becomes_larger_there() {
    let cluster = Cluster::new();
    let agent = cluster.agent("a", "127.0.0.1:0").await;
    for (volume, export) in [("n", "nbd"), ("u", "vhost-user-blk")] {
        let made = create(&agent, volume, None).await;
        let attach = VolumeAttach { export: export.into(), listen: None, read_only: false };
        agent.volumes.attach(&made, &attach).await.unwrap();
        let slot = agent.volumes.export_slot(&name(volume)).unwrap();
        let with = SnapshotWith { slot: Some(slot.clone()), agent: None };
        agent.volumes.resize(&name(volume), 2 * SIZE, &with).await.unwrap();
        assert!(agent.volumes.export_notice(&name(volume)).is_none(), "nobody is connected over vhost-user");
        assert_eq!(slot.size_bytes(), 2 * SIZE);
        write(&*slot.enter_within(Duration::from_secs(1)).unwrap(), 2 * SIZE - BLOCK, 4);
        agent.volumes.detach(&name(volume)).await.unwrap();
        assert_eq!(first_byte(&*open(&agent, volume).await, 2 * SIZE - BLOCK), 4);
    }
}
