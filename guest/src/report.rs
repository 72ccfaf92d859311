//! Counters, their report as JSON lines five times a second, and the commands that come back.
//!
//! ```text
//!   in : stop-writing | start-writing | rate MIB_S | verify-all | corrupt page|sector|version
//!        read|blank|fill DISK OFFSET | watch DISK
//!   out: {"uptime_ms":…,"beats":…,"pages_written":…,…,"errors":0,"last_error":null}
//!        {"reply":"verify-all","errors":0}
//! ```

use std::io::{ErrorKind, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::{cold, port};

/// Between two status lines on the port.
const PERIOD: Duration = Duration::from_millis(200);
/// Between two on the console.
const CONSOLE_PERIOD: Duration = Duration::from_secs(5);
/// The longest command that is waited for.
const MAX_COMMAND: usize = 256;

/// What a command asks of a worker.
pub enum Order {
    /// Write, or only verify.
    Writing(bool),
    /// MiB of pages per second.
    Rate(u64),
    /// Check everything once, then say so.
    VerifyAll(Sender<()>),
    /// Damage something, to see that it is noticed.
    Corrupt(Corrupt),
}

/// What to damage.
#[derive(Clone, Copy)]
pub enum Corrupt {
    /// One bit of a page.
    Page,
    /// One bit of an acknowledged record.
    Sector,
    /// A page is put back to its version before.
    Version,
}

/// What happened so far.
#[derive(Default)]
pub struct Counters {
    /// Workers that finished their first pass.
    pub ready: AtomicU64,
    /// Number of the newest beat.
    pub beats: AtomicU64,
    /// Page versions written.
    pub pages_written: AtomicU64,
    /// Pages read and compared.
    pub pages_verified: AtomicU64,
    /// Pages found wrong.
    pub mem_errors: AtomicU64,
    /// Newest record at the start of the program.
    pub disk_recovered: AtomicU64,
    /// Newest record whose flush returned.
    pub disk_acked: AtomicU64,
    /// Records read back and compared.
    pub records_verified: AtomicU64,
    /// Reads and writes of known content that ended and were right.
    pub cold_reads: AtomicU64,
    /// The disk whose size is reported.
    watched: Mutex<Option<PathBuf>>,
    /// Records found wrong, and I/O errors.
    pub disk_errors: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Counters {
    /// Counts a bad page.
    pub fn memory_error(&self, what: &str) {
        self.mem_errors.fetch_add(1, Relaxed);
        self.keep(what);
    }

    /// Counts a bad record or a failed I/O.
    pub fn disk_error(&self, what: &str) {
        self.disk_errors.fetch_add(1, Relaxed);
        self.keep(what);
    }

    fn keep(&self, what: &str) {
        say(&format!("ERROR {what}\n"));
        if let Ok(mut last) = self.last_error.lock() {
            *last = Some(what.replace(['"', '\\', '\n'], "'"));
        }
    }

    fn errors(&self) -> u64 {
        self.mem_errors.load(Relaxed) + self.disk_errors.load(Relaxed)
    }

    fn json(&self, started: Instant, workers: usize) -> String {
        let last = self.last_error.lock().ok().and_then(|l| l.clone());
        let last = last.map_or_else(|| "null".to_owned(), |l| format!("\"{l}\""));
        let ready = self.ready.load(Relaxed) == workers as u64;
        let get = |c: &AtomicU64| c.load(Relaxed);
        let watched = self.watched.lock().ok().and_then(|path| path.clone());
        let watched_bytes = watched.map_or(0, |path| cold::size_bytes(&path));
        format!(
            "{{\"uptime_ms\":{},\"ready\":{ready},\"beats\":{},\"pages_written\":{},\"pages_verified\":{},\
             \"mem_errors\":{},\"disk_recovered\":{},\"disk_acked\":{},\"records_verified\":{},\
             \"cold_reads\":{},\"watched_bytes\":{watched_bytes},\"disk_errors\":{},\"errors\":{},\"last_error\":{last}}}\n",
            started.elapsed().as_millis(),
            get(&self.beats),
            get(&self.pages_written),
            get(&self.pages_verified),
            get(&self.mem_errors),
            get(&self.disk_recovered),
            get(&self.disk_acked),
            get(&self.records_verified),
            get(&self.cold_reads),
            get(&self.disk_errors),
            self.errors(),
        )
    }
}

/// Says something on the console. That may be gone: whoever logs in there hangs up on all who had it before.
fn say(words: &str) {
    let _ = write!(std::io::stdout(), "whimbrel-guest: {words}");
}

/// Reports and takes commands until the machine ends.
pub fn run(counters: &Arc<Counters>, workers: &[Sender<Order>]) {
    let started = Instant::now();
    let mut console_due = started;
    let mut port = None;
    let mut pending = Vec::new();
    loop {
        let line = counters.json(started, workers.len());
        if Instant::now() >= console_due {
            say(&line);
            console_due += CONSOLE_PERIOD;
        }
        if port.is_none() {
            port = port::open("whimbrel.status").ok();
        }
        if let Some(port) = &mut port {
            // Whether anybody listens does not matter: the next line tells everything again.
            drop(port.write(line.as_bytes()));
        }
        let next = Instant::now() + PERIOD;
        while Instant::now() < next {
            if let Some(port) = &mut port {
                for command in read_commands(port, &mut pending) {
                    let reply = obey(&command, counters, workers);
                    write_reply(port, &reply);
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn read_commands(port: &mut std::fs::File, pending: &mut Vec<u8>) -> Vec<String> {
    let mut buffer = [0u8; 512];
    match port.read(&mut buffer) {
        Ok(n) => pending.extend_from_slice(&buffer[..n]),
        Err(_) => return Vec::new(),
    }
    let mut commands = Vec::new();
    while let Some(end) = pending.iter().position(|b| *b == b'\n') {
        let line: Vec<u8> = pending.drain(..=end).collect();
        commands.push(String::from_utf8_lossy(&line).trim().to_owned());
    }
    if pending.len() > MAX_COMMAND {
        pending.clear();
    }
    commands
}

/// A reply matters more than a status line: it is retried for a while.
fn write_reply(port: &mut std::fs::File, reply: &str) {
    for _ in 0..200 {
        match port.write(reply.as_bytes()) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
}

fn obey(command: &str, counters: &Arc<Counters>, workers: &[Sender<Order>]) -> String {
    let all = |make: &dyn Fn() -> Order| {
        for worker in workers {
            // A worker that ended has counted its error.
            drop(worker.send(make()));
        }
    };
    let mut words = command.split_whitespace();
    match (words.next(), words.next()) {
        (Some("stop-writing"), None) => all(&|| Order::Writing(false)),
        (Some("start-writing"), None) => all(&|| Order::Writing(true)),
        (Some("rate"), Some(rate)) if rate.parse::<u64>().is_ok() => {
            let rate = rate.parse().unwrap_or(0);
            all(&|| Order::Rate(rate));
        }
        (Some("corrupt"), Some("page")) => all(&|| Order::Corrupt(Corrupt::Page)),
        (Some("corrupt"), Some("sector")) => all(&|| Order::Corrupt(Corrupt::Sector)),
        (Some("corrupt"), Some("version")) => all(&|| Order::Corrupt(Corrupt::Version)),
        (Some(verb @ ("read" | "blank" | "fill")), Some(disk)) => match words.next().map(str::parse) {
            Some(Ok(offset)) => {
                let work = match verb {
                    "fill" => cold::Work::Fill,
                    "blank" => cold::Work::Blank,
                    _ => cold::Work::Read,
                };
                cold::begin(work, disk, offset, counters);
            }
            _ => return format!("{{\"reply\":\"no offset\",\"errors\":{}}}\n", counters.errors()),
        },
        (Some("watch"), Some(disk)) => {
            if let Ok(mut watched) = counters.watched.lock() {
                *watched = Some(PathBuf::from(disk));
            }
        }
        (Some("verify-all"), None) => {
            let (tx, rx) = channel();
            all(&|| Order::VerifyAll(tx.clone()));
            drop(tx);
            // Ends when every worker answered or is gone.
            rx.iter().for_each(drop);
        }
        _ => return format!("{{\"reply\":\"unknown command\",\"errors\":{}}}\n", counters.errors()),
    }
    format!("{{\"reply\":\"{command}\",\"errors\":{}}}\n", counters.errors())
}
