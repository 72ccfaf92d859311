//! Two hosts with real links, files and metadata; their agents end and start again.

use std::io::{IoSlice, IoSliceMut};

use whimbrel_wire::api::VolumeCreate;

use super::super::test_cluster::{Agent, Cluster, name};
use super::*;
use crate::block_dev::{BlockDev, BlockRead};

const BLOCK: usize = 4096;
const SIZE: usize = 16 << 20;

/// The record as COMMIT makes it.
fn passed(record: &VolumeRecord, to: &str) -> VolumeRecord {
    let depends_on = (record.right.holder != name(to)).then(|| record.right.holder.clone());
    VolumeRecord { right: record.right.passed_to(name(to)), depends_on, ..record.clone() }
}

/// A volume on host `a`, written here and there, and what it reads as.
async fn written(a: &Agent) -> (VolumeRecord, Vec<u8>) {
    let create = VolumeCreate { name: name("v"), image: None, size_bytes: Some(SIZE as u64), from: None };
    let record = a.volumes.create(&create).await.unwrap();
    let layer = a.volumes.open(&record).await.unwrap();
    let mut oracle = vec![0; SIZE];
    for turn in 0..2000_usize {
        let block = turn * 37 % (SIZE / BLOCK);
        let bytes = [(turn % 250 + 1) as u8; BLOCK];
        layer.write((block * BLOCK) as u64, &[IoSlice::new(&bytes)]).unwrap();
        oracle[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&bytes);
    }
    layer.discard(0, 1 << 20).unwrap();
    oracle[..1 << 20].fill(0);
    (record, oracle)
}

/// What passes during the pause: the map.
fn announce(a: &Agent, b: &Agent, record: &VolumeRecord) {
    let layer = a.volumes.opened(record.disk_id).unwrap();
    let end = layer.ship_end().unwrap();
    let map = layer.pull_map();
    let head = PullHead { data_id: end.data_id, epoch: end.epoch, map_bytes: map.len() as u64 };
    b.volumes.make_pull(record, &head, &map).unwrap();
}

fn read(layer: &Arc<Layer>, offset: usize, length: usize) -> tokio::task::JoinHandle<Result<Vec<u8>>> {
    let layer = Arc::clone(layer);
    tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; length];
        layer.read(offset as u64, &mut [IoSliceMut::new(&mut bytes)]).map(|()| bytes)
    })
}

async fn step(volumes: &Volumes, disk_id: DiskId, bytes: u64) -> Result<bool> {
    let pull = volumes.shared.on_demand.pull_of(disk_id).unwrap();
    tokio::task::spawn_blocking(move || pull.step(bytes)).await.unwrap().map(|progress| progress.done)
}

async fn short_wait() {
    tokio::time::sleep(Duration::from_millis(600)).await;
}

fn no_limit() -> Arc<Limiter> {
    Arc::new(Limiter::new(None))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_used_while_its_blocks_follow_and_either_agent_may_end_meanwhile() {
    let cluster = Cluster::new();
    let a = cluster.agent("a", "127.0.0.1:0").await;
    let b = cluster.agent("b", "127.0.0.1:0").await;
    let address = a.listening.address();
    b.links.set_addresses(&name("a"), vec![address]);
    let (record, mut oracle) = written(&a).await;
    let disk_id = record.disk_id;
    announce(&a, &b, &record);
    let theirs = passed(&record, "b");
    let epoch = theirs.right.epoch;

    // The guest runs at b before a knows: its reads wait, its writes and flushes do not.
    let layer = b.volumes.open_pull(&record, None, epoch, &name("a")).await.unwrap();
    let at = 5 << 20;
    let early = read(&layer, at, 256 << 10);
    layer.write(8 << 20, &[IoSlice::new(&[0xee; BLOCK])]).unwrap();
    layer.flush().unwrap();
    oracle[8 << 20..(8 << 20) + BLOCK].fill(0xee);
    assert_eq!(
        read(&layer, 0, 1 << 20).await.unwrap().unwrap(),
        &oracle[..1 << 20],
        "zeros came with the map"
    );
    short_wait().await;
    assert!(!early.is_finished());
    let refused = step(&b.volumes, disk_id, 1 << 20).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    let count = a.volumes.serve(disk_id, &name("b"), epoch, &no_limit()).await.unwrap();
    assert_eq!(early.await.unwrap().unwrap(), &oracle[at..at + (256 << 10)]);
    assert!(count.load(Ordering::Relaxed) > 0);
    let error = a.volumes.opened(disk_id).unwrap().write(0, &[IoSlice::new(&[1; BLOCK])]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "fenced");

    // The source's agent ends; b's reader waits until it is back and serves again.
    assert!(!step(&b.volumes, disk_id, 1 << 20).await.unwrap());
    a.end().await;
    let during = read(&layer, 12 << 20, 1 << 20);
    short_wait().await;
    assert!(step(&b.volumes, disk_id, 1 << 20).await.is_err());
    let a = cluster.agent("a", &address.to_string()).await;
    short_wait().await;
    assert!(!during.is_finished(), "nothing is handed out before the records were read");
    a.volumes.serve(disk_id, &name("b"), epoch, &no_limit()).await.unwrap();
    assert_eq!(during.await.unwrap().unwrap(), &oracle[12 << 20..13 << 20]);

    // The target's agent ends; the next one finds by the record where the rest is.
    drop(layer);
    b.end().await;
    let b = cluster.agent("b", "127.0.0.1:0").await;
    b.links.set_addresses(&name("a"), vec![address]);
    let layer = b.volumes.open(&theirs).await.unwrap();
    assert!(Arc::ptr_eq(&layer, &b.volumes.open(&theirs).await.unwrap()));
    assert_eq!(read(&layer, 0, SIZE).await.unwrap().unwrap(), oracle);
    // Whoever used it is gone; fetching goes on.
    b.volumes.close(disk_id);
    while !step(&b.volumes, disk_id, 1 << 20).await.unwrap() {}
    b.volumes.pulled(disk_id);
    assert!(b.volumes.pull(&theirs).await.unwrap().is_none());
    a.volumes.drop_copy(&theirs);
    assert!(!a.volumes.is_here(disk_id));
    a.end().await;
    assert_eq!(read(&layer, 0, SIZE).await.unwrap().unwrap(), oracle);
    drop(layer);
    b.volumes.close(disk_id);
    let whole = VolumeRecord { depends_on: None, ..theirs };
    let layer = b.volumes.open(&whole).await.unwrap();
    assert_eq!(read(&layer, 0, SIZE).await.unwrap().unwrap(), oracle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_is_handed_out_to_its_holder_only_and_taken_back() {
    let cluster = Cluster::new();
    let a = cluster.agent("a", "127.0.0.1:0").await;
    let b = cluster.agent("b", "127.0.0.1:0").await;
    let c = cluster.agent("c", "127.0.0.1:0").await;
    for other in [&b, &c] {
        other.links.set_addresses(&name("a"), vec![a.listening.address()]);
    }
    let (record, oracle) = written(&a).await;
    let disk_id = record.disk_id;
    let epoch = record.right.epoch.next();
    let ask = |who: &Agent, epoch: Epoch, range: (u64, u64)| {
        let links = who.links.clone();
        async move {
            let ask = LayerAsk { disk_id, epoch, ranges: vec![range] };
            let answer: Result<((), Bytes)> =
                links.call(&name("a"), METHOD_READ, &ask, Bytes::new(), READ_LIMIT).await;
            answer.map(|((), bytes)| bytes).map_err(|error| error.kind())
        }
    };
    let some = (4 << 20, 4096);
    let refused = Err(ErrorKind::Refused);
    assert_eq!(ask(&b, epoch, some).await, refused, "nobody has said so");
    a.volumes.serve(disk_id, &name("b"), epoch, &no_limit()).await.unwrap();
    assert_eq!(ask(&b, epoch, some).await.unwrap(), oracle[4 << 20..(4 << 20) + 4096]);
    assert_eq!(ask(&c, epoch, some).await, refused, "another host");
    assert_eq!(ask(&b, record.right.epoch, some).await, refused, "an older epoch");
    assert_eq!(ask(&b, epoch, (SIZE as u64, 4096)).await, Err(ErrorKind::InvalidInput), "behind the end");
    assert_eq!(ask(&b, epoch, (0, BYTES_MAX + 512)).await, Err(ErrorKind::InvalidInput), "too much");

    // The right comes back: the same handle writes again, and nothing is handed out any more.
    let back = passed(&passed(&record, "b"), "a");
    let layer = a.volumes.open(&back).await.unwrap();
    layer.write(0, &[IoSlice::new(&[1; BLOCK])]).unwrap();
    assert_eq!(ask(&b, epoch, some).await, refused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_for_many_scattered_ranges_are_split_and_answered_whole() {
    let cluster = Cluster::new();
    let a = cluster.agent("a", "127.0.0.1:0").await;
    let b = cluster.agent("b", "127.0.0.1:0").await;
    b.links.set_addresses(&name("a"), vec![a.listening.address()]);
    let (record, oracle) = written(&a).await;
    let epoch = record.right.epoch.next();
    a.volumes.serve(record.disk_id, &name("b"), epoch, &no_limit()).await.unwrap();
    let remote = OverLinks {
        links: b.links.clone(),
        source: name("a"),
        disk_id: record.disk_id,
        epoch,
        runtime: Handle::current(),
    };
    let mut ranges: Vec<FetchRange> =
        (0..1000).map(|n| FetchRange { offset: n * 8192, length: 512 * (n % 8 + 1) }).collect();
    ranges.push(FetchRange { offset: 0, length: SIZE as u64 - 512 });
    let asks = remote.asks(&ranges);
    assert!(asks.iter().all(|(ask, length)| ask.length() == Ok(*length)));
    let wanted: Vec<u8> = ranges
        .iter()
        .flat_map(|range| &oracle[range.offset as usize..(range.offset + range.length) as usize])
        .copied()
        .collect();
    let fetched = tokio::task::spawn_blocking(move || {
        let mut into = vec![0; ranges.iter().map(|range| range.length as usize).sum()];
        remote.fetch(&ranges, &mut into, Urgency::Ahead).map(|()| into)
    });
    assert!(fetched.await.unwrap().unwrap() == wanted);
}
