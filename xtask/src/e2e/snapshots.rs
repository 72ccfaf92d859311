//! Snapshots under a running guest (`volume snapshot`), volumes made from them, and moves of all that.
//!
//! ```text
//!   a VM that flushes its disk all the time ─▶ snapshots ─▶ agent killed ─▶ moved with its chain, to and fro
//!   a volume made from the first snapshot boots; snapshots are removed under the guest, in no order
//! ```
//!
//! Invariant: the guest never sees an error, its acknowledged records never go back, and every chain is sound.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Context, IMAGE};
use crate::cmd::output;
use crate::flight::Flight;
use crate::lab::Host;

const VM: &str = "layers";
const CLONE: &str = "layers-clone";
const MEMORY_MIB: u64 = 128;
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=4 wg.disk=/data/records wg.disk_rate=200";
/// A guest must not notice a snapshot; on a busy machine its beat may be late for other reasons.
const PAUSE_MS: f64 = 1000.0;

/// The scenario.
pub fn snapshots_under_a_guest(c: &Context<'_>) -> Result<()> {
    let first = host(c, 0)?;
    first.whimbrel(&["volume", "create", VM, "--image", IMAGE])?;
    let mut flight = Flight::launch(c.lab, 0, VM, &[VM], MEMORY_MIB, 1, WORKLOAD)?;
    flight.receiver().restart_window();
    for name in ["one", "two", "three"] {
        let started = Instant::now();
        let shown = first.whimbrel(&["volume", "snapshot", VM, "--name", name])?;
        println!("       snapshot {name} in {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
        ensure!(shown["chain"][0]["snapshot"] == name, "the volume says: {shown}");
        std::thread::sleep(Duration::from_millis(700));
    }
    let beat = flight.receiver().report();
    println!("       the guest was silent for at most {:.0} ms", beat.longest_gap_ms);
    ensure!(beat.longest_gap_ms < PAUSE_MS, "a snapshot stopped the guest for {:.0} ms", beat.longest_gap_ms);
    let mut acked = goes_on(&mut flight, 0).context("after three snapshots")?;

    refused(first, &["volume", "create", "none", "--from", "layers@four"], "there is none")?;
    first.whimbrel(&["volume", "create", CLONE, "--from", &format!("{VM}@one")])?;
    refused(first, &["volume", "remove", &format!("{VM}@one")], CLONE)?;
    check(first, VM)?;
    check(first, CLONE)?;

    first.kill_agent()?;
    first.start_agent(c.program)?;
    acked = goes_on(&mut flight, acked).context("after the agent came back")?;
    first.whimbrel(&["volume", "snapshot", VM, "--name", "four"])?;

    let layers = chain(first, VM)?;
    let moved = flight.migrate(1, &[]).context("move it with its chain")?;
    println!("       moved with {} layers in {:.1} s", layers.len() + 1, moved.total.as_secs_f64());
    acked = goes_on(&mut flight, acked).context("after the move")?;
    let second = host(c, 1)?;
    ensure!(chain(second, VM)? == layers, "the chain changed on its way");
    has_layers(second, &layers, &[true; 4])?;
    // What the clone was made from stays where the clone is.
    has_layers(first, &layers, &[false, false, false, true])?;

    second.whimbrel(&["volume", "remove", &format!("{VM}@two")])?;
    second.whimbrel(&["volume", "remove", &format!("{VM}@four")])?;
    acked = goes_on(&mut flight, acked).context("after two snapshots were removed under it")?;
    ensure!(chain(second, VM)?.len() == 2, "two snapshots are left");

    flight.migrate(0, &[]).context("move it back, to where its lowest layer is")?;
    acked = goes_on(&mut flight, acked).context("after the move back")?;
    flight.migrate(1, &["--disk", "on-demand"]).context("move it, the disk after it")?;
    acked = goes_on(&mut flight, acked).context("after the move with the disk behind it")?;
    whole(second)?;
    check(second, VM)?;
    second.whimbrel(&["volume", "remove", &format!("{VM}@one")])?;
    second.whimbrel(&["volume", "remove", &format!("{VM}@three")])?;
    goes_on(&mut flight, acked).context("after all snapshots were removed under it")?;
    ensure!(chain(second, VM)?.is_empty(), "no snapshot is left");
    check(second, VM)?;
    flight.stop()?;
    second.whimbrel(&["volume", "remove", VM])?;

    // Made from the first snapshot, which the original no longer has.
    let mut clone = Flight::launch(c.lab, 0, CLONE, &[CLONE], MEMORY_MIB, 1, WORKLOAD)?;
    clone.must_be_whole().context("boot from the first snapshot")?;
    clone.stop()?;
    check(first, CLONE)?;
    first.whimbrel(&["volume", "remove", CLONE])?;
    has_layers(first, &layers, &[false; 4])
}

fn host<'a>(c: &'a Context<'_>, n: usize) -> Result<&'a Host> {
    c.lab.hosts().get(n).context("find a host of the lab")
}

/// The guest still writes, and lost nothing.
fn goes_on(flight: &mut Flight<'_>, acked: u64) -> Result<u64> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
        if now > acked + 20 {
            break;
        }
        ensure!(Instant::now() < end, "the guest does not write any more: {now} records");
        std::thread::sleep(Duration::from_millis(100));
    }
    flight.must_be_whole()?;
    flight.counter("disk_acked")
}

/// The layers under a volume's writable one, the newest first.
fn chain(host: &Host, volume: &str) -> Result<Vec<String>> {
    let shown = host.whimbrel(&["volume", "show", volume])?;
    let layers = shown["chain"].as_array().context("read a volume's chain")?;
    Ok(layers.iter().filter_map(|layer| layer["disk_id"].as_str().map(str::to_owned)).collect())
}

fn has_layers(host: &Host, layers: &[String], expected: &[bool]) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    for (layer, expected) in layers.iter().zip(expected) {
        let path = host.dir().join("data/volumes").join(layer);
        while path.exists() != *expected {
            ensure!(Instant::now() < end, "{}: there is {}", path.display(), path.exists());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Every invariant of the chain holds. A layer that is written shows a tail, which is no problem.
fn check(host: &Host, volume: &str) -> Result<()> {
    let checked = host.whimbrel(&["volume", "check", volume])?;
    let problems = checked["problems"].as_array().context("read what a check says")?;
    ensure!(problems.is_empty(), "{volume}: {problems:?}");
    Ok(())
}

fn whole(host: &Host) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while host.whimbrel(&["volume", "show", VM])?["depends_on"] != Value::Null {
        ensure!(Instant::now() < end, "blocks still follow");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn refused(host: &Host, args: &[&str], words: &str) -> Result<()> {
    let out = output(&mut host.cli(args))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && said.contains(words), "`{}` said {said:?}", args.join(" "));
    Ok(())
}
