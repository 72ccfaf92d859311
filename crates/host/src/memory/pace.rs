//! Measures a move while it runs, for the choice of encoding: how fast the link takes bytes, how many processors are
//! spare.
//!
//! Invariant: only time for which the stream had something to write counts as the link's.
//!
//! Not here: the choice itself (`engine::block::encode`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use whimbrel_engine::block::encode::Chooser;

/// How long a window is, over which rates are measured and choices repeated.
const WINDOW: Duration = Duration::from_millis(20);
/// How often the machine's idle time is read.
const CPU_WINDOW: Duration = Duration::from_millis(100);
/// Less than this in a window says nothing about the link.
const TELLING_BYTES: u64 = 256 << 10;

/// Processors of this machine, at least 1.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The meters of one move, and the choice that they feed.
pub struct Pace {
    chooser: Arc<Mutex<Chooser>>,
    window: LinkWindow,
    cpu: CpuMeter,
}

impl Pace {
    /// Meters for a move with so many encoding threads.
    pub fn new(workers: usize, raw_only: bool) -> Self {
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        let chooser = Chooser::new(count(cores()), count(workers));
        let chooser = if raw_only { chooser.raw_only() } else { chooser };
        Self { chooser: Arc::new(Mutex::new(chooser)), window: LinkWindow::new(), cpu: CpuMeter::new() }
    }

    /// The choice, shared with the encoding threads.
    pub fn chooser(&self) -> Arc<Mutex<Chooser>> {
        Arc::clone(&self.chooser)
    }

    /// Wire bytes per second that the link takes; 0 before it was measured.
    pub fn link_bytes_s(&self) -> u64 {
        self.chooser.lock().link_bytes_s().unwrap_or(0.0) as u64
    }

    /// Starts a window, after a pause in which nothing was to be sent.
    pub fn resume(&mut self) {
        self.window = LinkWindow::new();
    }

    /// Takes in one write: its size, how long the stream was busy with it, and the processor time of its encoding.
    pub fn wrote(&mut self, bytes: usize, busy: Duration, encode_cpu_s: f64) {
        self.window.bytes += bytes as u64;
        self.window.busy += busy;
        self.cpu.encode_s += encode_cpu_s;
        if self.window.start.elapsed() < WINDOW {
            return;
        }
        let spare = self.cpu.spare_cores();
        let mut chooser = self.chooser.lock();
        if self.window.bytes >= TELLING_BYTES {
            chooser.observe_link(self.window.bytes, self.window.busy.as_secs_f64());
        }
        if let Some((cores, seconds)) = spare {
            chooser.observe_spare_cores(cores, seconds);
        }
        chooser.end_window();
        self.window = LinkWindow::new();
    }
}

/// Bytes written, and the time for which the stream was busy with them.
struct LinkWindow {
    start: Instant,
    bytes: u64,
    busy: Duration,
}

impl LinkWindow {
    fn new() -> Self {
        Self { start: Instant::now(), bytes: 0, busy: Duration::ZERO }
    }
}

/// How many processors are idle or busy with encoding for this move.
struct CpuMeter {
    since: Instant,
    idle_ticks: Option<u64>,
    encode_s: f64,
}

impl CpuMeter {
    fn new() -> Self {
        Self { since: Instant::now(), idle_ticks: idle_ticks(), encode_s: 0.0 }
    }

    /// Processors, and the seconds over which that was measured; nothing if it is too early to tell.
    fn spare_cores(&mut self) -> Option<(f64, f64)> {
        let seconds = self.since.elapsed().as_secs_f64();
        if seconds < CPU_WINDOW.as_secs_f64() {
            return None;
        }
        let now = idle_ticks();
        // Ticks are hundredths of a second, whatever the kernel's own.
        let idle_s = now?.saturating_sub(self.idle_ticks?) as f64 / 100.0;
        let cores = (idle_s + self.encode_s) / seconds;
        (self.since, self.idle_ticks, self.encode_s) = (Instant::now(), now, 0.0);
        Some((cores, seconds))
    }
}

/// The machine's idle time, all processors together, in hundredths of a second.
fn idle_ticks() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // cpu user nice system idle iowait …
    let mut fields = stat.lines().next()?.split_ascii_whitespace();
    let idle: u64 = fields.nth(4)?.parse().ok()?;
    let io_wait: u64 = fields.next()?.parse().ok()?;
    Some(idle + io_wait)
}
