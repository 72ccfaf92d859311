//! An object store of the lab's own, and the count of what leaves it.
//!
//! ```text
//!   agent (10.77.0.x) ──TCP──▶ 10.77.0.1: proxy of this process, counts every byte ──▶ s3s-fs on the loopback ──▶ files
//! ```
//!
//! The proxy can be told to hold everything back: a store that does not answer for a while.
//!
//! Invariant: the store has no other way out, so the count holds everything that hosts got from it, headers included.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::net::FABRIC_ADDRESS;
use crate::cmd::dying_with_us;

const START_LIMIT: Duration = Duration::from_secs(20);
const KEY: &str = "LABKEY";
const SECRET: &str = "LABSECRET";

/// See the module's charter. The program ends when this is dropped.
pub struct S3 {
    child: Child,
    url: String,
    sent_bytes: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
}

impl S3 {
    /// What an agent has to have in its environment to use the store.
    pub const ENV: [(&'static str, &'static str); 2] =
        [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)];

    /// Starts `program` (s3s-fs) over `dir`, with one bucket.
    pub fn start(program: &Path, dir: &Path) -> Result<S3> {
        fs::create_dir_all(dir.join("bucket")).context("make the bucket")?;
        let free = TcpListener::bind("127.0.0.1:0").context("find a port for the object store")?;
        let port = free.local_addr().context("find a port for the object store")?.port();
        drop(free);
        let mut c = dying_with_us(program, &["--host", "127.0.0.1", "--port", &port.to_string()]);
        c.args(["--access-key", KEY, "--secret-key", SECRET]).arg(dir);
        let mut child = c
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let end = Instant::now() + START_LIMIT;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = child.try_wait().context("look at the object store")? {
                bail!("the object store {} ended at once: {status}", program.display());
            }
            if Instant::now() > end {
                bail!("the object store {} does not answer", program.display());
            }
            thread::sleep(Duration::from_millis(50));
        }
        let listener = TcpListener::bind((FABRIC_ADDRESS, 0)).context("listen for the store's readers")?;
        let outside = listener.local_addr().context("listen for the store's readers")?;
        let sent_bytes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent_bytes);
        let held = Arc::new(AtomicBool::new(false));
        let gate = Arc::clone(&held);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A reader whose connection fails tries again.
                let Ok(store) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                if let Err(e) = pass_on(client, store, &counter, &gate) {
                    eprintln!("the store's proxy: {e}");
                }
            }
        });
        let url = format!("s3://bucket/images?endpoint=http://{outside}&region=us-east-1");
        Ok(S3 { child, url, sent_bytes, held })
    }

    /// For `--store`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether what the store sends is held back from now on.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::SeqCst);
    }

    /// Bytes that left the store so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // Best effort: the end of the lab's first process ends everything for certain.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Passes bytes both ways until both sides are done, on threads of their own.
fn pass_on(
    client: TcpStream,
    store: TcpStream,
    sent_bytes: &Arc<AtomicU64>,
    held: &Arc<AtomicBool>,
) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    store.set_nodelay(true)?;
    let (client2, store2) = (client.try_clone()?, store.try_clone()?);
    let (counter, held) = (Arc::clone(sent_bytes), Arc::clone(held));
    thread::spawn(move || pump(client2, store2, |_| {}));
    thread::spawn(move || {
        pump(store, client, |n| {
            while held.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(5));
            }
            counter.fetch_add(n as u64, Ordering::Relaxed);
        });
    });
    Ok(())
}

fn pump(mut from: TcpStream, mut to: TcpStream, count: impl Fn(usize)) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(n) if n > 0 => {
                count(n);
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    // The other direction may still be under way.
    drop(to.shutdown(Shutdown::Write));
    drop(from.shutdown(Shutdown::Read));
}
