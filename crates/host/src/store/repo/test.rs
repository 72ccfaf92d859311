//! Repositories in directories.

use super::*;

#[tokio::test]
async fn a_directory_keeps_objects_and_says_what_is_wrong_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}/store", dir.path().display());
    assert!(Repo::open(&url, false, None).is_err(), "not made by a reader");
    let repo = Repo::open(&url, true, None).unwrap();
    repo.put("packs/a", Bytes::from_static(b"hello")).await.unwrap();
    assert_eq!(&repo.range("packs/a", 1, 3).await.unwrap()[..], b"ell");
    let cut = repo.range("packs/a", 3, 9).await.unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::Corrupt, "{cut}");
    assert!(cut.to_string().contains("packs/a") && cut.to_string().contains("cut short"), "{cut}");
    let beyond = repo.range("packs/a", 30, 9).await.unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::Corrupt, "{beyond}");
    assert_eq!(repo.range("packs/b", 0, 1).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(repo.get("packs/a", 4).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(repo.size("packs/b").await.unwrap(), None);
    repo.put("packs/c/d", Bytes::from_static(b"x")).await.unwrap();
    let mut paths: Vec<_> = repo.list("packs").await.unwrap().into_iter().map(|listed| listed.path).collect();
    paths.sort();
    assert_eq!(paths, ["packs/a", "packs/c/d"]);
    assert!(repo.list("nothing").await.unwrap().is_empty());
    repo.delete("packs/a").await.unwrap();
    repo.delete("packs/a").await.unwrap();
    let large = vec![7u8; PART_BYTES * 2 + 5];
    let file = dir.path().join("large");
    std::fs::write(&file, &large).unwrap();
    repo.put_file("large", &file).await.unwrap();
    assert_eq!(repo.size("large").await.unwrap(), Some(large.len() as u64));
}

#[tokio::test]
async fn a_store_that_is_down_fails_and_then_fails_fast() {
    // A port nobody listens on.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let repo = Repo::open(&format!("http://{address}/x"), false, None).unwrap();
    for _ in 0..3 {
        let error = repo.get("names/a/latest.json", 100).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    let start = std::time::Instant::now();
    assert!(repo.get("names/a/latest.json", 100).await.is_err());
    assert!(start.elapsed() < Duration::from_millis(50));
    assert_eq!(repo.put("x", Bytes::new()).await.unwrap_err().kind(), ErrorKind::Unsupported);
    let secret = "s3://bucket/x?secret_access_key=abc";
    let refused = Repo::open(secret, false, None).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(!refused.to_string().contains("abc"), "{refused}");
    for bad in ["", "relative/dir", "ftp://x/y"] {
        assert_eq!(Repo::open(bad, true, None).err().unwrap().kind(), ErrorKind::InvalidInput, "{bad}");
    }
}
