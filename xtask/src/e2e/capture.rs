//! Following a guest's writes: in groups, by faults that the agent serves; and with a disk of QEMU's own that is read
//! past the page cache, for which the copy waits.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, IMAGE};
use crate::flight::{Flight, Move};
use crate::lab::Lab;
use crate::qmp::Qmp;

const SOON: Duration = Duration::from_secs(30);
const WORKLOAD: &str = "wg.mem_mib=128 wg.mem_rate=100 wg.disk=/data/records";

/// See the module's charter.
pub fn followed_in_groups_and_past_the_page_cache(c: &Context<'_>) -> Result<()> {
    let lab = Lab::new("capture", 2, &c.lab.qemu, &c.lab.image)?;
    for host in lab.hosts() {
        host.configure("write_tracking = \"groups\"\n")?;
    }
    lab.start_cluster(c.program)?;
    lab.hosts().first().context("a lab has hosts")?.publish(&lab.image.disk, IMAGE)?;
    let mut flight = Flight::start(&lab, 0, "grouped", IMAGE, 256, 2, WORKLOAD)?;
    for to in [1, 0] {
        let moved = whole(&mut flight, to)?;
        let faults = figure(&moved, "faults_served")?;
        ensure!(faults > 0.0, "no fault was served: writes were not followed in groups");
        println!(
            "       {faults:.0} faults served in {:.1} ms, {:.0} per GiB; {:.0} pages sent again for nothing, groups of {:.0}",
            figure(&moved, "fault_ms")?,
            figure(&moved, "faults_per_gib")?,
            figure(&moved, "wasted_resends")?,
            figure(&moved, "group_pages")?,
        );
        ensure!(moved.task["figures"].get("drains").is_none(), "drained without need");
    }
    // A node is enough: what a request would do with it, QEMU's tests show.
    let mut qmp = Qmp::connect(&flight.host()?.vm_sockets("grouped").qmp, SOON)?;
    let file = lab.image.kernel.to_string_lossy();
    let node = json!({ "driver": "file", "node-name": "direct0", "filename": file, "read-only": true,
        "cache": { "direct": true } });
    qmp.execute("blockdev-add", node)?;
    drop(qmp);
    let moved = whole(&mut flight, 1)?;
    let drains = figure(&moved, "drains")?;
    ensure!(drains > 0.0, "a disk that bypasses the page cache was not waited for");
    println!(
        "       {drains:.0} drains of {:.1} ms, the longest of {:.1}",
        figure(&moved, "drain_ms")? / drains,
        figure(&moved, "drain_longest_ms")?
    );
    flight.stop()
}

fn figure(moved: &Move, name: &str) -> Result<f64> {
    moved.task["figures"][name]
        .as_f64()
        .with_context(|| format!("the task shows no figure {name}: {}", moved.task))
}

/// A move in mode A, with the hash of all RAM compared at the pause and the guest's own check after it.
fn whole(flight: &mut Flight<'_>, to: usize) -> Result<Move> {
    let moved = flight.migrate(to, &["--mode", "a", "--verify"])?;
    ensure!(moved.beat.resets == 0, "the guest started anew");
    flight.must_be_whole()?;
    Ok(moved)
}
