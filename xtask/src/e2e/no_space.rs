//! A host's disk fills up under a running guest: the guest waits, is told of no error, and goes on when there is space.
//!
//! Not here: no space where a move goes to (`errors.rs`), a layer without space by itself (`host::disk`'s tests).

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Context, IMAGE};
use crate::cmd::{cmd, run};
use crate::flight::Flight;
use crate::lab::{Host, Lab};

const VM: &str = "thirsty";
const MEMORY_MIB: u64 = 256;
/// More records than the small disk has room for.
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=10 wg.disk=/data/records wg.disk_mib=32";
const SMALL: &str = "size=16m";
const LARGE: &str = "remount,size=1g";
const FULL_LIMIT: Duration = Duration::from_secs(90);
/// How long it is watched waiting.
const WAITING: Duration = Duration::from_secs(5);
const GOES_ON_LIMIT: Duration = Duration::from_secs(10);
/// A guest that does not wait for its disk is as lively as ever.
const SILENCE_MAX_MS: f64 = 1000.0;

/// See the module's charter.
pub fn a_guest_waits_for_space(c: &Context<'_>) -> Result<()> {
    let lab = Lab::new("space", 2, &c.lab.qemu, &c.lab.image)?;
    let (host, _) = lab.pair();
    let layers = host.dir().join("data/volumes");
    fs::create_dir_all(&layers).context("make the volumes' directory")?;
    let options = format!("{SMALL},mode=755");
    run(cmd("mount", &["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&layers))?;
    lab.start_cluster(c.program)?;
    host.publish(&lab.image.disk, IMAGE)?;
    let mut flight = Flight::start(&lab, 0, VM, IMAGE, MEMORY_MIB, 2, WORKLOAD)?;

    // It is told before it happens, with when.
    let warned = wait_for_pressure(host, &["low", "critical"])?;
    ensure!(warned["free_bytes"].as_u64() > Some(0), "told too late: {warned}");
    ensure!(warned["promised_bytes"].as_u64() > warned["total_bytes"].as_u64(), "not thin: {warned}");
    let shown = wait_for(host, "the disk to be full", FULL_LIMIT, |vm| {
        vm["waiting_for"].as_str().is_some_and(|what| what.contains("space") && what.contains(VM))
    })?;
    ensure!(shown["state"] == "running", "a guest that waits for space is {shown}");
    let acked = flight.counter("disk_acked")?;
    flight.receiver().restart_window();
    std::thread::sleep(WAITING);
    ensure!(flight.counter("disk_acked")? == acked, "records were acknowledged without space");
    let silence = flight.receiver().report().longest_gap_ms;
    ensure!(silence < SILENCE_MAX_MS, "the guest was silent for {silence:.0} ms while its disk waited");

    // An agent that comes back meets the same lack, and the guest still none of it.
    host.kill_agent()?;
    host.start_agent(c.program)?;
    wait_for(host, "the lack of space to be known again", GOES_ON_LIMIT, |vm| vm["waiting_for"].is_string())?;
    ensure!(flight.counter("disk_acked")? == acked, "records were acknowledged without space");

    run(cmd("mount", &["-o", LARGE]).arg(&layers))?;
    wait_for(host, "the guest to go on", GOES_ON_LIMIT, |vm| vm["waiting_for"].is_null())?;
    let end = Instant::now() + GOES_ON_LIMIT;
    while flight.counter("disk_acked")? <= acked + 100 {
        ensure!(Instant::now() < end, "the guest writes no records although there is space");
    }
    flight.must_be_whole()?;
    println!("       full after {acked} records, went on with space");
    // With space it can also be moved.
    flight.migrate(1, &[])?;
    flight.must_be_whole()?;
    flight.stop()
}

/// Waits until the host says this of its volumes' space; what it says.
fn wait_for_pressure(host: &Host, levels: &[&str]) -> Result<Value> {
    let end = Instant::now() + FULL_LIMIT;
    loop {
        let space = host.whimbrel(&["host", "show", host.name()])?["space"].clone();
        if space["pressure"].as_str().is_some_and(|level| levels.contains(&level)) {
            return Ok(space);
        }
        ensure!(Instant::now() < end, "space was never called {}: {space}", levels.join(" or "));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Asks for the VM until `is` it.
fn wait_for(host: &Host, what: &str, limit: Duration, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + limit;
    loop {
        let shown = host.whimbrel(&["vm", "show", VM])?;
        if is(&shown) {
            return Ok(shown);
        }
        ensure!(
            Instant::now() < end,
            "wait for {what}: after {limit:?} the VM is {shown}\n{}",
            host.log_tail()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}
