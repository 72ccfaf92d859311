//! The receiver of a guest's beat: what people outside noticed, on the host's clock.
//!
//! ```text
//!   source QEMU ─ socket ─┐
//!                         ├─▶ one log: number, arrival ─▶ longest silence, missing, repeated, resets, flips
//!   target QEMU ─ socket ─┘
//! ```
//!
//! A guest's own clock stops while it is paused, so silence can only be measured here. The same receiver measures
//! our migrations and QEMU's own.
//!
//! Invariants: arrivals of all sockets go through one lock, so their order is one order; only a number higher
//! than every one before ends a silence.
//!
//! Not here: sending (`guest/src/beat.rs`), the workload's counters (`status.rs`).

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Between two beats.
pub const PERIOD_MS: f64 = 1.0;
const FRAME: usize = 16;
/// A number lower by more than this is not an old beat but a guest that started anew.
const RESET_DISTANCE: u64 = 2000;

/// What was heard since the window began.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Beats heard.
    pub beats: u64,
    /// Longest time between two new beats, milliseconds; a silence that still lasts counts.
    pub longest_gap_ms: f64,
    /// Numbers never heard, among those passed.
    pub missing: u64,
    /// Numbers heard before, or out of order.
    pub repeated: u64,
    /// The guest started counting anew.
    pub resets: u64,
    /// How often new beats began to come from another socket; a migration is one.
    pub flips: u64,
    /// The newest number.
    pub newest: u64,
    /// Beats by socket, old ones too: two that bring beats at once are two guests.
    pub heard_from: Vec<u64>,
    /// When each socket brought its first new beat of this window.
    pub first_from: Vec<Option<Instant>>,
}

impl Report {
    /// For people and scripts.
    pub fn json(&self) -> Value {
        json!({
            "beats": self.beats, "longest_gap_ms": self.longest_gap_ms, "missing": self.missing,
            "repeated": self.repeated, "resets": self.resets, "flips": self.flips, "newest": self.newest,
        })
    }

    /// Longest silence less the beat's own period: how long the guest did not run.
    pub fn downtime_ms(&self) -> f64 {
        (self.longest_gap_ms - PERIOD_MS).max(0.0)
    }
}

#[derive(Default)]
struct Log {
    report: Report,
    last_new: Option<Instant>,
    marked: Option<Instant>,
    first_since_mark: Option<Instant>,
    last_source: Option<usize>,
}

impl Log {
    fn hear(&mut self, source: usize, number: u64, at: Instant) {
        let r = &mut self.report;
        r.beats += 1;
        if r.heard_from.len() <= source {
            r.heard_from.resize(source + 1, 0);
        }
        if let Some(heard) = r.heard_from.get_mut(source) {
            *heard += 1;
        }
        let reset = number + RESET_DISTANCE < r.newest;
        if number <= r.newest && !reset {
            r.repeated += 1;
            return;
        }
        if reset {
            r.resets += 1;
        } else if r.newest > 0 {
            r.missing += number - r.newest - 1;
        }
        r.newest = number;
        if let Some(last) = self.last_new {
            r.longest_gap_ms = r.longest_gap_ms.max(ms(at.saturating_duration_since(last)));
        }
        self.last_new = Some(at);
        if self.marked.is_some_and(|mark| at > mark) {
            self.first_since_mark.get_or_insert(at);
        }
        if self.last_source.is_some_and(|s| s != source) {
            r.flips += 1;
        }
        self.last_source = Some(source);
        if r.first_from.len() <= source {
            r.first_from.resize(source + 1, None);
        }
        if let Some(first) = r.first_from.get_mut(source) {
            first.get_or_insert(at);
        }
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Listens until it is dropped.
pub struct Receiver {
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Receiver {
    /// A receiver without sockets.
    pub fn new() -> Receiver {
        Receiver { log: Arc::default(), stop: Arc::default(), threads: Vec::new() }
    }

    /// Listens to these sockets, which need not exist yet.
    pub fn on(sockets: &[PathBuf]) -> Receiver {
        let mut receiver = Receiver::new();
        for socket in sockets {
            receiver.add(socket);
        }
        receiver
    }

    /// Listens to one more socket; gives its index in [`Report::first_from`].
    pub fn add(&mut self, socket: &Path) -> usize {
        let source = self.threads.len();
        let (log, stop, socket) = (Arc::clone(&self.log), Arc::clone(&self.stop), socket.to_path_buf());
        self.threads.push(thread::spawn(move || listen(source, &socket, &log, &stop)));
        source
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new window; numbers go on.
    pub fn restart_window(&self) {
        let mut log = self.log();
        let newest = log.report.newest;
        log.report = Report { newest, ..Report::default() };
    }

    /// Begins a new window in which numbers begin anew.
    pub fn forget(&self) {
        *self.log() = Log::default();
    }

    /// Remembers this moment for [`Receiver::back_after`].
    pub fn mark(&self) {
        let mut log = self.log();
        log.marked = Some(Instant::now());
        log.first_since_mark = None;
    }

    /// How long after the mark the first new beat came; none if none has come.
    pub fn back_after(&self) -> Option<Duration> {
        let log = self.log();
        Some(log.first_since_mark?.saturating_duration_since(log.marked?))
    }

    /// What the window holds so far.
    pub fn report(&self) -> Report {
        let log = self.log();
        let mut report = log.report.clone();
        if let Some(last) = log.last_new {
            report.longest_gap_ms = report.longest_gap_ms.max(ms(last.elapsed()));
        }
        report
    }

    /// Waits until `count` beats came in this window.
    pub fn wait_for_beats(&self, count: u64, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if self.report().beats >= count {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// Waits until the socket `source` brought a new beat, and says when that was.
    pub fn wait_for_source(&self, source: usize, limit: Duration) -> Option<Instant> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(Some(at)) = self.report().first_from.get(source) {
                return Some(*at);
            }
            thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Receiver::new()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            // A listener that panicked has nothing left to stop.
            drop(thread.join());
        }
    }
}

fn listen(source: usize, socket: &Path, log: &Mutex<Log>, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        if let Ok(stream) = UnixStream::connect(socket) {
            read_beats(source, stream, log, stop);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn read_beats(source: usize, mut stream: UnixStream, log: &Mutex<Log>, stop: &AtomicBool) {
    if stream.set_read_timeout(Some(Duration::from_millis(100))).is_err() {
        return;
    }
    let mut buffer = [0u8; 256 * FRAME];
    let mut filled = 0;
    while !stop.load(Relaxed) {
        let Some(free) = buffer.get_mut(filled..) else { return };
        match stream.read(free) {
            Ok(0) => return,
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(_) => return,
        }
        let at = Instant::now();
        let mut start = 0;
        while let Some(frame) = buffer.get(start..start + FRAME).filter(|_| start + FRAME <= filled) {
            if let (Some(b"BEAT"), Some(number)) = (frame.first_chunk(), frame.last_chunk()) {
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                log.hear(source, u64::from_le_bytes(*number), at);
                start += FRAME;
            } else {
                // Joined in the middle of a frame: move on to the next one.
                start += 1;
            }
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn silence_repeats_losses_and_a_restart_are_told_apart() {
        let (mut log, t) = (Log::default(), Instant::now());
        let at = |ms: u64| t + Duration::from_millis(ms);
        for (source, number, when) in [(0, 5000, 0), (0, 5001, 1), (1, 5001, 30), (1, 5004, 51), (1, 1, 60)] {
            log.hear(source, number, at(when));
        }
        let r = log.report;
        assert_eq!((r.repeated, r.missing, r.resets, r.flips), (1, 2, 1, 1));
        assert!((r.longest_gap_ms - 50.0).abs() < 0.001);
        assert_eq!(r.first_from, [Some(at(0)), Some(at(51))]);
    }

    #[test]
    fn beats_are_read_from_a_socket_that_appears_late_and_starts_in_the_middle_of_a_frame() {
        use std::io::Write as _;
        let dir = std::env::temp_dir().join(format!("beat-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("b.sock");
        let receiver = Receiver::on(std::slice::from_ref(&path));
        thread::sleep(Duration::from_millis(20));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (mut s, _) = listener.accept().unwrap();
        s.write_all(&[7; 5]).unwrap();
        for n in 1..=3u64 {
            s.write_all(b"BEAT\0\0\0\0").unwrap();
            s.write_all(&n.to_le_bytes()).unwrap();
        }
        assert!(receiver.wait_for_beats(3, Duration::from_secs(5)));
        assert_eq!(receiver.report().newest, 3);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
