//! Stores behind a network: read-only HTTP from a server of this test, and S3 from `s3s-fs`.

use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

/// Serves the files of a directory with ranges, one thread per connection, until the test ends.
fn serve_files(dir: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            std::thread::spawn(move || serve_connection(&stream, &dir));
        }
    });
    format!("http://{address}/images")
}

fn serve_connection(stream: &TcpStream, dir: &Path) -> Option<()> {
    let mut lines = BufReader::new(stream);
    loop {
        let mut request = String::new();
        lines.read_line(&mut request).ok().filter(|n| *n > 0)?;
        let mut range = None;
        loop {
            let mut line = String::new();
            lines.read_line(&mut line).ok()?;
            let line = line.trim().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("range: bytes=") {
                let (first, last) = value.split_once('-')?;
                range = Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?));
            }
            if line.is_empty() {
                break;
            }
        }
        let mut words = request.split_whitespace();
        let (method, path) = (words.next()?, words.next()?.strip_prefix("/images/")?);
        answer(stream, method, &dir.join(path), range).ok()?;
    }
}

fn answer(
    mut stream: &TcpStream,
    method: &str,
    path: &Path,
    range: Option<(usize, usize)>,
) -> std::io::Result<()> {
    let Ok(bytes) = std::fs::read(path) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    };
    let modified = "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT";
    let total = bytes.len();
    let part = match range {
        Some((first, _)) if first >= total => {
            return stream.write_all(
                format!("HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\n\r\n")
                    .as_bytes(),
            );
        }
        Some((first, last)) => {
            let last = last.min(total - 1);
            let part = &bytes[first..=last];
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\n{modified}\r\nContent-Range: bytes {first}-{last}/{total}\r\nContent-Length: {}\r\n\r\n",
                part.len()
            );
            stream.write_all(head.as_bytes())?;
            part
        }
        None => {
            let head = format!("HTTP/1.1 200 OK\r\n{modified}\r\nContent-Length: {total}\r\n\r\n");
            stream.write_all(head.as_bytes())?;
            &bytes[..]
        }
    };
    if method == "HEAD" { Ok(()) } else { stream.write_all(part) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_read_over_http_and_not_written() {
    let world = World::new();
    let store = world.host("a").await;
    let disk = Disk::of(&[1, 2, 3, 0, 5, 6]);
    let record = world.publish(&store, "web", disk.clone()).await.unwrap();
    let url = serve_files(world.seed_dir());
    let parent = ImageParent { store_url: url.clone(), ..parent_of(&record) };
    world.net.servers.lock().clear();
    let reader = world.host("b").await;
    let image = reader.open_image(&parent).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    assert_eq!(image.read_bytes().seed, 5 * BLOCK as u64);
    let task = world.tasks.start(TaskKind::Publish, "web");
    let error = reader.publish(disk, "x".parse().unwrap(), Some(url), &task).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let pack = world.objects().into_keys().find(|path| path.starts_with("packs/")).unwrap();
    std::fs::write(world.seed_dir().join(pack), b"short").unwrap();
    let third = world.host("c").await;
    world.net.servers.lock().clear();
    let image = third.open_image(&parent).await.unwrap();
    let error = read_all(&image).await.unwrap_err();
    assert!(error.to_string().contains("cut short") || error.to_string().contains("416"), "{error}");
}

struct S3 {
    child: Child,
    url: String,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `s3s-fs` over a directory with one bucket. `cargo xtask test` installs the program.
fn start_s3(root: &Path) -> S3 {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin/s3s-fs");
    let program = std::env::var_os("WHIMBREL_TEST_S3S_FS").map_or(own, PathBuf::from);
    assert!(
        program.exists(),
        "{} is missing: `cargo xtask test` installs it, or run `cargo install s3s-fs --version 0.14.1 --locked \
         --features binary --root target/tools`, or set WHIMBREL_TEST_S3S_FS",
        program.display()
    );
    std::fs::create_dir_all(root.join("bucket")).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new(program)
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .args(["--access-key", "KEY", "--secret-key", "SECRET"])
        .arg(root)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut s3 =
        S3 { child, url: format!("s3://bucket/images?endpoint=http://127.0.0.1:{port}&region=us-east-1") };
    for _ in 0..200 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return s3;
        }
        if s3.child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut said = String::new();
    let _ = s3.child.kill();
    s3.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    panic!("s3s-fs did not start: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_published_to_s3_read_removed_and_collected() {
    let world = World::new();
    let s3 = start_s3(&world.dir.path().join("s3"));
    let url = s3.url.clone();
    let with_url = |config: &mut StoreConfig| {
        config.default_store_url = Some(url.clone());
        config.s3_keys = Some(S3Keys { access_key_id: "KEY".into(), secret_access_key: "SECRET".into() });
    };
    let store = world.host_with("a", &[], with_url).await;
    // More than one part of a multipart upload.
    let numbers: Vec<u64> = (1..=300).map(|n| n * 2 + 1).collect();
    let disk = Disk::of(&numbers);
    let first = world.publish(&store, "cloud", disk.clone()).await.unwrap();
    let sent = store.shared.repo(&url, false).unwrap().sent_bytes();
    let again = world.publish(&store, "cloud", disk.clone()).await.unwrap();
    assert_eq!(first.id, again.id);
    let more = store.shared.repo(&url, false).unwrap().sent_bytes() - sent;
    assert!(more < 1000, "{more} bytes for a mark and a name");
    let reader = world.host_with("b", &[], with_url).await;
    world.net.servers.lock().clear();
    let image = reader.open_named(&"cloud".parse().unwrap()).await.unwrap();
    assert_eq!(read_all(&image).await.unwrap(), disk.0);
    store.remove(&"cloud".parse().unwrap()).await.unwrap();
    let collected = store.collect(None, 0).await.unwrap();
    assert_eq!((collected.manifests, collected.packs), (1, 2));
    drop(s3);
    let third = world.host_with("c", &[], with_url).await;
    let parent = parent_of(&first);
    let error = third.open_image(&parent).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    // Credentials do not belong into messages.
    assert!(!error.to_string().contains("SECRET"), "{error}");
}
