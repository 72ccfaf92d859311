//! Moves that are steered while they run: the limit is changed, one is cancelled, two cross each other.
//!
//! ```text
//!   guest writes memory as fast as it can ─▶ slow move ─▶ cancelled ─▶ its speed, its silence, QEMU's mappings as before
//!   guest writes a little ─▶ move at 8 Mbit/s ─▶ task limit ─▶ it is over soon
//!   two guests on two hosts ─▶ each moves to the other's ─▶ both whole
//! ```

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Context, IMAGE};
use crate::flight::{Flight, MOVE_LIMIT};
use crate::lab::{self, Host};

const MEMORY_MIB: u64 = 256;
/// More than an emulated processor can do.
const RESTLESS: &str = "wg.mem_mib=96 wg.mem_rate=100000";
const CALM: &str = "wg.mem_mib=96 wg.mem_rate=10 wg.disk=/data/records wg.disk_rate=100";
/// The workloads' memory alone takes minutes at this rate.
const SLOW: &str = "4Mbit";
const SLOW_BYTES_S: u64 = 500_000;
/// Speed is measured over this time.
const WINDOW: Duration = Duration::from_secs(3);
/// A processor that is shared with others is not equally fast all the time. Tracking that was left behind costs less than
/// that varies: it is looked for in QEMU's mappings. This is for what stops or slows a guest.
const SAME: f64 = 0.7;
const TRIES: usize = 5;

/// See the module's charter.
pub fn moves_are_steered(c: &Context<'_>) -> Result<()> {
    let (first, second) = c.lab.pair();
    let mut restless = Flight::start(c.lab, 0, "restless", IMAGE, MEMORY_MIB, 1, RESTLESS)?;
    cancelled_without_a_trace(&mut restless, first, second).context("a move that was cancelled")?;
    restless.stop()?;
    let mut near = Flight::start(c.lab, 0, "near", IMAGE, MEMORY_MIB, 1, CALM)?;
    limit_is_lifted(&mut near, first, second).context("a move whose limit was lifted")?;
    let mut far = Flight::start(c.lab, 0, "far", IMAGE, MEMORY_MIB, 1, CALM)?;
    crossed(&mut near, &mut far, first, second).context("moves that cross")?;
    near.stop()?;
    far.stop()
}

fn cancelled_without_a_trace(flight: &mut Flight<'_>, from: &Host, to: &Host) -> Result<()> {
    let before = Speed::of(flight)?;
    let shown = from.whimbrel(&["vm", "show", &flight.name])?;
    let mode_a = shown["mode"].as_str().is_some_and(|mode| mode.eq_ignore_ascii_case("a"));
    let qemu = lab::qemu_pid(&flight.name)?;
    let task = begin(from, &flight.name, to, &["--bandwidth", SLOW])?;
    wait_for(from, &task, |task| task["figures"]["memory_wire_bytes"].as_f64() > Some(0.0))?;
    if mode_a {
        ensure!(tracked(qemu)?, "nothing tracks the guest's writes while it is moved");
    }
    let during = Speed::of(flight)?;
    from.whimbrel(&["task", "cancel", &task])?;
    let ended = from.whimbrel(&["task", "show", &task])?;
    ensure!(ended["state"] == "cancelled", "the move ended as {ended}");
    ensure!(!tracked(qemu)?, "the guest's writes are still tracked");
    let left = lab::processes_with(&format!("/vms/{}/", flight.name))?;
    ensure!(left == [qemu], "processes of the VM: {left:?}, its own is {qemu}");
    // The best of several: a machine that does something else for a moment proves nothing.
    let mut after = Speed::of(flight)?;
    for _ in 0..TRIES {
        if after.pages_s >= before.pages_s * SAME && after.silence_ms <= before.silence_ms + 20.0 {
            break;
        }
        let again = Speed::of(flight)?;
        after = Speed {
            pages_s: after.pages_s.max(again.pages_s),
            silence_ms: after.silence_ms.min(again.silence_ms),
        };
    }
    println!(
        "       pages written per second, longest silence: before {before}, during {during}, after {after}"
    );
    ensure!(
        after.pages_s >= before.pages_s * SAME,
        "the guest writes {after} after the cancelled move, {before} before it"
    );
    flight.must_be_whole()
}

fn limit_is_lifted(flight: &mut Flight<'_>, from: &Host, to: &Host) -> Result<()> {
    let lab = flight.lab();
    let task = begin(from, &flight.name, to, &["--bandwidth", SLOW])?;
    wait_for(from, &task, |task| task["figures"]["memory_wire_bytes"].as_f64() > Some(0.0))?;
    let (start, bytes) = (Instant::now(), lab.bytes_out(from)?);
    thread::sleep(WINDOW);
    let slow_bytes_s = (lab.bytes_out(from)? - bytes) as f64 / start.elapsed().as_secs_f64();
    // Frames and their acknowledgements are larger than what is in them, and a piece may pass on credit.
    ensure!(
        slow_bytes_s <= SLOW_BYTES_S as f64 * 1.3,
        "{slow_bytes_s:.0} bytes per second were sent, {SLOW_BYTES_S} are the limit"
    );
    let limited = Instant::now();
    from.whimbrel(&["task", "limit", &task])?;
    let ended = wait_for(from, &task, is_over)?;
    ensure!(ended["state"] == "done", "the move ended as {ended}");
    for name in ["expected_downtime_ms", "link_bytes_s"] {
        ensure!(ended["figures"][name].as_f64().is_some(), "the move does not say {name}: {ended}");
    }
    println!(
        "       {:.0} kB/s under the limit; over {:.1} s after it was lifted",
        slow_bytes_s / 1e3,
        limited.elapsed().as_secs_f64()
    );
    ensure!(limited.elapsed() < Duration::from_secs(30), "lifting the limit was not noticed");
    let refused = from.whimbrel(&["task", "limit", &task, "--bandwidth", SLOW]);
    ensure!(refused.is_err(), "a task that has ended took a limit");
    flight.set_host(1)?;
    flight.must_be_whole()
}

/// One is at each host; each goes to the other's.
fn crossed(near: &mut Flight<'_>, far: &mut Flight<'_>, first: &Host, second: &Host) -> Result<()> {
    let (one, other) = (begin(first, &far.name, second, &[])?, begin(second, &near.name, first, &[])?);
    for (host, task) in [(first, one), (second, other)] {
        let ended = wait_for(host, &task, is_over)?;
        ensure!(ended["state"] == "done", "the move from {} ended as {ended}", host.name());
    }
    near.set_host(0)?;
    far.set_host(1)?;
    near.must_be_whole()?;
    far.must_be_whole()
}

fn begin(from: &Host, vm: &str, to: &Host, options: &[&str]) -> Result<String> {
    let args = [&["vm", "migrate", vm, "--to", to.name(), "--no-wait"], options].concat();
    Ok(from.whimbrel(&args)?["task"].to_string())
}

fn is_over(task: &Value) -> bool {
    ["done", "failed", "cancelled"].iter().any(|state| task["state"] == *state)
}

/// Looks at a task until `holds`, or until it is over and never will.
fn wait_for(host: &Host, task: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + MOVE_LIMIT;
    loop {
        let shown = host.whimbrel(&["task", "show", task])?;
        if holds(&shown) {
            return Ok(shown);
        }
        if is_over(&shown) || Instant::now() > end {
            bail!("waited in vain for task {task}: {shown}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a userfaultfd write-protects memory of the process.
fn tracked(pid: u32) -> Result<bool> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read QEMU's mappings")?;
    let mut flags = maps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    Ok(flags.any(|flags| flags.split_whitespace().any(|flag| flag == "uw" || flag == "um")))
}

/// What a guest does when nobody stops it.
struct Speed {
    pages_s: f64,
    silence_ms: f64,
}

impl Speed {
    fn of(flight: &mut Flight<'_>) -> Result<Speed> {
        let pages = flight.counter("pages_written")?;
        flight.receiver().restart_window();
        let start = Instant::now();
        thread::sleep(WINDOW);
        let silence_ms = flight.receiver().report().longest_gap_ms;
        let more = flight.counter("pages_written")? - pages;
        Ok(Speed { pages_s: more as f64 / start.elapsed().as_secs_f64(), silence_ms })
    }
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0}, {:.0} ms", self.pages_s, self.silence_ms)
    }
}
