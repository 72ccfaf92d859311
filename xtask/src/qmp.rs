//! QEMU's monitor protocol, as far as the benchmarks' peers need it: one JSON object a line, events in between.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// An answer takes no longer.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to one QEMU.
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects, waiting up to `limit` for the socket, and shakes hands.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Qmp> {
        let end = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(s) => break s,
                Err(e) if Instant::now() > end => {
                    return Err(e).with_context(|| format!("connect to {}", socket.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).context("limit reads")?;
        let mut qmp = Qmp(BufReader::new(stream));
        qmp.line()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line).context("read from QEMU")? == 0 {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).context("read from QEMU")
    }

    /// Runs a command and gives what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            request["arguments"] = arguments;
        }
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).context("write to QEMU")?;
        loop {
            let answer = self.line()?;
            if let Some(e) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", e["desc"]);
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }
}
