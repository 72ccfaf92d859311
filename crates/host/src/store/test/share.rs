//! Sharing: between publications, between images, between hosts.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn publishing_twice_uploads_nothing_and_shared_blocks_are_stored_and_fetched_once() {
    let world = World::new();
    let store = world.host("a").await;
    let base: Vec<u64> = (1..=300).map(|n| n * 2 + 1).collect();
    let first = world.publish(&store, "base", Disk::of(&base)).await.unwrap();
    let before = world.objects();
    let stamp = |path: &str| std::fs::metadata(world.seed_dir().join(path)).unwrap().modified().unwrap();
    let times: Vec<_> = before
        .keys()
        .filter(|path| !path.starts_with("names/"))
        .map(|path| (path.clone(), stamp(path)))
        .collect();
    let again = world.publish(&store, "copy", Disk::of(&base)).await.unwrap();
    assert_eq!(first.id, again.id);
    let mut after = world.objects();
    after.remove("names/copy/latest.json");
    assert_eq!(before, after);
    assert!(times.iter().all(|(path, time)| stamp(path) == *time), "nothing was written again");

    let mut changed = base.clone();
    (changed[7], changed[200]) = (9999, 10001);
    world.publish(&store, "next", Disk::of(&changed)).await.unwrap();
    let grown: u64 = world.objects().values().sum::<u64>() - after.values().sum::<u64>();
    assert!(
        grown < 3 * BLOCK as u64 + (300 + 400) * 48,
        "{grown} bytes for two blocks, an index and a manifest"
    );

    let reader = world.host("b").await;
    let image = reader.open_named(&"base".parse().unwrap()).await.unwrap();
    read_all(&image).await.unwrap();
    settled(&image).await;
    let next = reader.open_named(&"next".parse().unwrap()).await.unwrap();
    assert_eq!(read_all(&next).await.unwrap(), Disk::of(&changed).0);
    assert_eq!(next.read_bytes().seed, 2 * BLOCK as u64, "the rest was copied on this host");
    settled(&next).await;
    assert_eq!(next.cached_bytes(), next.stored_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_hosts_that_boot_at_once_read_the_seed_about_once() {
    let world = World::new();
    let publisher = world.host("publisher").await;
    let numbers: Vec<u64> = (1..=160).collect();
    let disk = Disk::of(&numbers);
    world.publish(&publisher, "boot", disk.clone()).await.unwrap();
    let name: ImageRef = "boot".parse().unwrap();

    let single = world.host("single").await;
    read_all(&single.open_named(&name).await.unwrap()).await.unwrap();
    let one = single.figures().seed_object_bytes;
    single.stop().await;
    world.net.servers.lock().clear();
    let holds = world.meta.read(key::HOLDS).await.unwrap();
    let gone = holds.items.into_iter().map(|item| Op::Delete(item.key)).collect();
    world.meta.txn(vec![], gone).await.unwrap();

    let mut hosts = Vec::new();
    for n in 0..8 {
        hosts.push(world.host(&format!("h{n}")).await);
    }
    let mut readers = Vec::new();
    for (n, host) in hosts.iter().enumerate() {
        let (host, name, disk) = (Arc::clone(host), name.clone(), disk.clone());
        readers.push(tokio::spawn(async move {
            let image = host.open_named(&name).await.unwrap();
            // A boot reads in the same order everywhere, a few KiB at a time.
            for at in (0..disk.0.len()).step_by(64 << 10) {
                let bytes = read(&image, at as u64, 64 << 10).await.unwrap();
                assert!(bytes == disk.0[at..at + (64 << 10)], "host {n} at {at}");
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    let all: u64 = hosts.iter().map(|host| host.figures().seed_object_bytes).sum();
    assert!(all as f64 <= one as f64 * 1.1, "{all} bytes out of the seed, one host alone reads {one}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_peer_is_dropped_and_the_read_succeeds() {
    let world = World::new();
    let liar = world.host("liar").await;
    let disk = Disk::of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    world.publish(&liar, "i", disk.clone()).await.unwrap();
    let name: ImageRef = "i".parse().unwrap();
    let image = liar.open_named(&name).await.unwrap();
    read_all(&image).await.unwrap();
    settled(&image).await;
    world.net.liars.lock().insert("liar".parse().unwrap());
    let reader = world.host("reader").await;
    let before = metrics().image_liars.get();
    let image = reader.open_named(&name).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    assert!(metrics().image_liars.get() > before);
    assert!(image.core.with_reads(|reads, _| reads.swarm().is_quarantined(&"liar".parse().unwrap())));
    let asked = world.net.block_calls.load(Ordering::Relaxed);
    assert_eq!(image.read_bytes().peer, 0);
    settled(&image).await;
    read_all(&image).await.unwrap();
    assert_eq!(world.net.block_calls.load(Ordering::Relaxed), asked, "it is not asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_serve_what_they_have_when_the_store_is_gone_and_hosts_die() {
    let world = World::new();
    let a = world.host("a").await;
    let b = world.host("b").await;
    let disk = Disk::of(&(1..=40).collect::<Vec<_>>());
    world.publish(&a, "i", disk.clone()).await.unwrap();
    let name: ImageRef = "i".parse().unwrap();
    for store in [&a, &b] {
        let image = store.open_named(&name).await.unwrap();
        read_all(&image).await.unwrap();
        settled(&image).await;
    }
    std::fs::remove_dir_all(world.seed_dir().join("packs")).unwrap();
    world.net.down.lock().insert("b".parse().unwrap());
    let c = world.host_with("c", &[], |config| config.keep_after_peer_fetches = 2).await;
    let image = c.open_named(&name).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    assert_eq!(image.read_bytes(), ReadBytes { layer: 0, cache: 0, peer: 40 * BLOCK as u64, seed: 0 });
    settled(&image).await;
    assert_eq!(image.cached_bytes(), 0, "kept after the second fetch only");
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    settled(&image).await;
    assert!(image.cached_bytes() >= 20 * BLOCK as u64, "{}", image.cached_bytes());

    world.net.down.lock().insert("a".parse().unwrap());
    let d = world.host("d").await;
    let image = d.open_named(&name).await;
    // The manifest is in the store still, c answers for it too; blocks that only a and b have cannot be read.
    let error = match image {
        Ok(image) => read_all(&image).await.err(),
        Err(error) => Some(error),
    };
    if let Some(error) = error {
        assert!(error.to_string().contains("block"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_another_domain_learns_nothing() {
    let world = World::new();
    let red = world.host_with("red", &["red"], |_| {}).await;
    let disk = Disk::of(&[1, 2, 3]);
    let record = world.publish(&red, "secret", disk.clone()).await.unwrap();
    assert_eq!(record.domain, Some("red".parse().unwrap()));
    let image = red.open_named(&"secret".parse().unwrap()).await.unwrap();
    read_all(&image).await.unwrap();
    let _blue = world.host_with("blue", &["blue"], |_| {}).await;
    let _red2 = world.host_with("red2", &["red"], |_| {}).await;
    let ask = serde_json::json!({"image": record.id, "index": 0});
    let call = |host: &str| {
        let (host, ask, server) = (host.parse::<HostId>().unwrap(), ask.clone(), red.server());
        async move { server.serve(&host, METHOD_BLOCK, ask, Bytes::new()).await }
    };
    let (_, bytes) = call("red2").await.unwrap();
    assert_eq!(bytes, block(1));
    assert_eq!(call("blue").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(call("stranger").await.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn removing_and_collecting_beside_publishing_loses_nothing() {
    let world = Arc::new(World::new());
    let (a, b) = (world.host("a").await, world.host("b").await);
    let shared: Vec<u64> = (1..=30).collect();
    world.publish(&a, "moving", Disk::of(&shared)).await.unwrap();
    let publisher = tokio::spawn({
        let (world, a) = (Arc::clone(&world), Arc::clone(&a));
        let shared = shared.clone();
        async move {
            for round in 0..12u64 {
                let mut numbers = shared.clone();
                numbers[3] = 1000 + round;
                // The same name again and again: what it meant before becomes garbage.
                world.publish(&a, "moving", Disk::of(&numbers)).await.unwrap();
            }
        }
    });
    let mut collected = 0;
    while !publisher.is_finished() {
        // A host that is publishing is waited for.
        collected += b.collect(None, 0).await.unwrap().manifests;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    publisher.await.unwrap();
    b.collect(None, 0).await.unwrap();
    assert!(collected > 0, "the collections ran beside the publications");
    let task = world.tasks.start(TaskKind::Export, "check");
    let report = b.verify(&"moving".parse().unwrap(), true, &task).await.unwrap();
    assert_eq!((report.checked_blocks, report.bad_blocks.len()), (30, 0), "{:?}", report.bad_blocks);
    assert!(
        !world.objects().keys().any(|path| path.starts_with("publishing") || path.starts_with("collecting"))
    );
}
