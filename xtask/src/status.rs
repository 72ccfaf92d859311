//! The workload's status lines, and commands to it, over its second virtio-serial port.
//!
//! Not here: what the fields mean (`guest/src/report.rs`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// A connection to one QEMU's status socket.
pub struct Status {
    reader: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Status {
    /// Connects; the socket may take up to `limit` to appear.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Status> {
        let end = Instant::now() + limit;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_millis(100))).context("limit reads")?;
                    stream.set_write_timeout(Some(Duration::from_secs(5))).context("limit writes")?;
                    return Ok(Status { reader: BufReader::new(stream), line: Vec::new() });
                }
                Err(e) if Instant::now() > end => {
                    return Err(e).with_context(|| format!("connect to {}", socket.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The next line that `wanted` accepts.
    fn find(&mut self, limit: Duration, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(0) => bail!("wait for {what}: the guest's status port was closed"),
                Ok(_) if self.line.ends_with(b"\n") => {
                    // A line that began before we connected is no JSON.
                    let value = serde_json::from_slice(&self.line).ok();
                    self.line.clear();
                    if let Some(v) = value.filter(&wanted) {
                        return Ok(v);
                    }
                }
                Ok(_) => {}
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).with_context(|| format!("wait for {what}")),
            }
        }
        bail!("wait for {what}: nothing within {limit:?}")
    }

    /// A status line that the guest sends from now on. Lines that were waiting to be read are skipped.
    pub fn now(&mut self) -> Result<Value> {
        self.drain();
        self.find(Duration::from_secs(20), "a status line of the guest", |v| v.get("uptime_ms").is_some())
    }

    /// Waits until every worker of the guest is at work.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Value> {
        self.find(limit, "the guest's workload to be ready", |v| v.get("ready") == Some(&Value::Bool(true)))
    }

    /// Gives a command and waits for its reply; the number of errors so far comes back.
    pub fn command(&mut self, command: &str, limit: Duration) -> Result<u64> {
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).context("send to the guest")?;
        let reply =
            self.find(limit, &format!("the guest's reply to {command:?}"), |v| v.get("reply").is_some())?;
        if reply.get("reply").and_then(Value::as_str) != Some(command) {
            bail!("the guest does not understand {command:?}: {reply}");
        }
        reply.get("errors").and_then(Value::as_u64).context("read the guest's error count")
    }

    fn drain(&mut self) {
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            let before = Instant::now();
            match self.reader.read_until(b'\n', &mut self.line) {
                // A line that took time to come is a fresh one, but may have been sent before: the next one counts.
                Ok(n) if n > 0 && self.line.ends_with(b"\n") => {
                    self.line.clear();
                    if before.elapsed() > Duration::from_millis(50) {
                        return;
                    }
                }
                Ok(0) => return,
                _ => {}
            }
        }
    }
}

/// A counter of a status line.
pub fn counter(status: &Value, name: &str) -> Result<u64> {
    status.get(name).and_then(Value::as_u64).with_context(|| format!("read {name} from the guest's status"))
}
