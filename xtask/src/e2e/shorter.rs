//! Memory that does not travel with its bytes: what a move counts of each technique, and that a guest cannot tell.
//!
//! Not here: the techniques (`crates/host/src/memory/known.rs`).

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Context, IMAGE};
use crate::flight::{Flight, Move};

const VM: &str = "shorter";
const MEMORY_MIB: u64 = 256;
/// A sixteenth of a page at a time, over a part of memory that fits the source's cache.
const WORKLOAD: &str =
    "wg.mem_mib=96 wg.mem_hot=16 wg.mem_rate=40 wg.mem_steps=16 wg.disk=/data/records wg.disk_rate=50";
/// Slow enough for several rounds.
const RATE: &str = "300Mbit";

/// See the module's charter.
pub fn memory_travels_shorter(c: &Context<'_>) -> Result<()> {
    let (_, target) = c.lab.pair();
    target.whimbrel(&["image", "prefetch", IMAGE])?;
    let mut flight = Flight::start(c.lab, 0, VM, IMAGE, MEMORY_MIB, 1, WORKLOAD)?;
    let shown = flight.host()?.whimbrel(&["vm", "show", VM])?;
    if shown["mode"].as_str().map(str::to_lowercase).as_deref() != Some("a") {
        println!("       mode A is not possible on this machine, so not tried: {}", shown["mode_reasons"]);
        return flight.stop();
    }
    let common = ["--mode", "a", "--verify", "--bandwidth", RATE];
    let first = flight.migrate(1, &common).context("move it with everything on")?;
    let told =
        ["delta", "same", "disk"].map(|kind| format!("{kind} {}", figure(&first, &format!("{kind}_pages"))));
    println!("       {} rounds, pages told shorter: {}", figure(&first, "rounds"), told.join(", "));
    ensure!(figure(&first, "delta_pages") > 100.0, "pages that change a little went whole: {}", first.task);
    ensure!(figure(&first, "disk_pages") > 100.0, "pages of the image's programs went whole: {}", first.task);
    ensure!(figure(&first, "delta_missed_pages") == 0.0, "the target had other versions: {}", first.task);
    for kind in ["delta", "same", "disk"] {
        let (pages, bytes) =
            (figure(&first, &format!("{kind}_pages")), figure(&first, &format!("{kind}_saved_bytes")));
        ensure!(bytes >= pages * 30.0, "{kind}: {pages} pages saved {bytes} bytes: {}", first.task);
    }
    let off = ["--without", "delta", "--without", "same-pages", "--without", "disk-blocks"];
    let plain =
        flight.migrate(0, &[common.as_slice(), &off].concat()).context("move it with everything off")?;
    for name in ["delta_pages", "unchanged_pages", "same_pages", "disk_pages"] {
        ensure!(figure(&plain, name) == 0.0, "{name} although it was switched off: {}", plain.task);
    }
    flight.must_be_whole()?;
    flight.stop()
}

fn figure(moved: &Move, name: &str) -> f64 {
    moved.task.pointer(&format!("/figures/{name}")).and_then(Value::as_f64).unwrap_or(f64::NAN)
}
