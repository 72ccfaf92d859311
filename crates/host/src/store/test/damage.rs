//! Damage: in the cache, in the store. Each is found, named, and healed where there is a good copy.

use super::*;
use std::os::unix::fs::FileExt;

fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

fn object(world: &World, prefix: &str) -> PathBuf {
    let path = world.objects().into_keys().find(|path| path.starts_with(prefix)).unwrap();
    world.seed_dir().join(path)
}

async fn published(world: &World) -> (Arc<Store>, Arc<Disk>, ImageRecord) {
    let store = world.host("a").await;
    let disk = Disk::of(&[1, 3, 5, 7, 9, 11, 13, 15]);
    let record = world.publish(&store, "i", disk.clone()).await.unwrap();
    (store, disk, record)
}

#[tokio::test(flavor = "multi_thread")]
async fn bit_rot_in_the_cache_is_found_at_first_use_and_by_the_scrub() {
    let world = World::new();
    let (store, disk, record) = published(&world).await;
    let name: ImageRef = "i".parse().unwrap();
    read_all(&store.open_named(&name).await.unwrap()).await.unwrap();
    store.stop().await;
    let data = world.dir.path().join("a/cache").join(record.id.to_string()).join("data");
    flip(&data, 3 * BLOCK as u64 + 5);
    let store = world.host("a").await;
    let image = store.open_named(&name).await.unwrap();
    let before = metrics().image_rot_blocks.get();
    assert_eq!(read_all(&image).await.unwrap(), disk.0, "fetched again");
    assert!(metrics().image_rot_blocks.get() > before);
    assert_eq!(image.read_bytes().seed, BLOCK as u64);
    settled(&image).await;

    // Rot after the first use: only the scrub looks.
    flip(&data, 5 * BLOCK as u64 + 9);
    let task = world.tasks.start(TaskKind::Export, "check");
    scrub::scrub_image(&image.core, u64::MAX).await;
    settled(&image).await;
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    assert_eq!(image.read_bytes().seed, 2 * BLOCK as u64);
    let report = store.verify(&name, false, &task).await.unwrap();
    assert!(report.bad_blocks.is_empty());
    assert_eq!(report.checked_blocks, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pack_is_named_and_good_copies_are_found_at_peers() {
    let world = World::new();
    let (store, disk, _) = published(&world).await;
    let name: ImageRef = "i".parse().unwrap();
    let pack = object(&world, "packs/");
    let whole = std::fs::read(&pack).unwrap();
    flip(&pack, 2 * BLOCK as u64);
    let image = store.open_named(&name).await.unwrap();
    let error = read(&image, 2 * BLOCK as u64, 4096).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let text = error.to_string();
    assert!(text.contains("block 2 of image i:latest") && text.contains("packs/"), "{text}");
    assert_eq!(read(&image, 0, 4096).await.unwrap(), disk.0[..4096], "the others are read");
    let task = world.tasks.start(TaskKind::Export, "check");
    let report = store.verify(&name, true, &task).await.unwrap();
    assert_eq!(report.bad_blocks.len(), 1, "{:?}", report.bad_blocks);

    std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
    let error = read(&image, 7 * BLOCK as u64, 4096).await.unwrap_err();
    assert!(error.to_string().contains("cut short"), "{error}");

    // With the pack whole again another host reads everything, and then helps the first one.
    std::fs::write(&pack, &whole).unwrap();
    let other = world.host("b").await;
    let helper = other.open_named(&name).await.unwrap();
    assert_eq!(read_all(&helper).await.unwrap(), disk.0);
    settled(&helper).await;
    std::fs::write(&pack, b"").unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(read_all(&image).await.unwrap(), disk.0);

    // Publishing again notices the damaged pack and stores its blocks anew.
    world.publish(&store, "healed", disk.clone()).await.unwrap();
    let report = store.verify(&"healed".parse().unwrap(), true, &task).await.unwrap();
    assert!(report.bad_blocks.is_empty(), "{:?}", report.bad_blocks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_missing_manifest_is_named() {
    let world = World::new();
    let (_, disk, _) = published(&world).await;
    let name: ImageRef = "i".parse().unwrap();
    let path = object(&world, "manifests/");
    let whole = std::fs::read(&path).unwrap();
    let store = world.host("b").await;
    for damaged in [&whole[..whole.len() - 10], &whole[..20], b""] {
        std::fs::write(&path, damaged).unwrap();
        let error = store.open_named(&name).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("manifest"), "{error}");
    }
    std::fs::write(&path, &whole).unwrap();
    flip(&path, 100);
    assert_eq!(store.open_named(&name).await.err().unwrap().kind(), ErrorKind::Corrupt);
    std::fs::remove_file(&path).unwrap();
    let error = store.open_named(&name).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    std::fs::write(&path, &whole).unwrap();
    let image = store.open_named(&name).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_gone_fails_clearly_and_a_full_disk_loses_nothing() {
    let world = World::new();
    let (store, disk, _) = published(&world).await;
    let name: ImageRef = "i".parse().unwrap();
    let image = store.open_named(&name).await.unwrap();
    // /dev/full is a disk without room.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    image.core.cache.set_data_for_test(full);
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    settled(&image).await;
    assert_eq!(image.cached_bytes(), 0);

    std::fs::remove_dir_all(world.seed_dir()).unwrap();
    let other = world.host("b").await;
    let error = other.open_named(&name).await.err().unwrap();
    assert!(error.to_string().contains(&world.seed_url()), "{error}");
    let error = world.publish(&other, "x", Arc::new(Disk(vec![1; 100]))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_publication_leaves_no_name_and_no_mark() {
    struct Slow(Disk);
    impl BlockRead for Slow {
        fn size_bytes(&self) -> u64 {
            self.0.size_bytes()
        }
        fn read(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> Result<()> {
            std::thread::sleep(Duration::from_millis(5));
            self.0.read(offset, into)
        }
        fn read_now(&self, _: u64, _: &mut [IoSliceMut<'_>]) -> Result<bool> {
            Ok(false)
        }
        fn extent(&self, offset: u64) -> Result<Extent> {
            self.0.extent(offset)
        }
    }
    let world = World::new();
    let store = world.host("a").await;
    let disk = Disk((1..=400).map(|n| n * 2 + 1).flat_map(block).collect());
    let task = world.tasks.start(TaskKind::Publish, "slow");
    let tasks = world.tasks.clone();
    let id = task.id();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        tasks.cancel(id).unwrap();
    });
    let error = store.publish(Arc::new(Slow(disk)), "slow".parse().unwrap(), None, &task).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert!(store.list().await.unwrap().is_empty());
    assert!(world.objects().keys().all(|path| path.starts_with("packs/")), "{:?}", world.objects());
}
