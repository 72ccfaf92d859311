//! A guest that waits for a block of a slow store is moved while it waits.
//!
//! ```text
//!   the store answers nothing ─▶ guest reads a block that no host has ─▶ move ─▶ the store answers again
//!                                      └ unanswered at the source ───────┴─ done again at the target ─▶ right, once
//! ```
//!
//! Moves of the same guest with nothing outstanding, in turns with those, say what the wait costs. One move more is
//! broken off after the pause: the source does the read itself.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Context;
use crate::bench::median;
use crate::flight::{Flight, Move};
use crate::lab::{Lab, S3};

const VM: &str = "cold";
const FAR: &str = "cold-far";
const IMAGE: &str = "cold:system";
const FAR_IMAGE: &str = "cold:far";
/// The guest's name for the disk of far blocks.
const DEVICE: &str = "/dev/vdb";
const FAR_MIB: u64 = 128;
/// Between two reads, so that what the store sends ahead does not hold the next one.
const STRIDE_BYTES: u64 = 8 << 20;
const MEMORY_MIB: u64 = 128;
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=10 wg.disk=/data/records wg.disk_rate=50";
/// Moves of each kind, and how many there may be until the two kinds can be told from the machine's own noise.
const MOVES: usize = 4;
const MOVES_MAX: usize = 12;
/// From the guest's order until its request is with the agent.
const TAKEN: Duration = Duration::from_millis(500);
/// How long the store goes on saying nothing once the guest runs at the target.
const DELAY: Duration = Duration::from_secs(2);
const READ_LIMIT: Duration = Duration::from_secs(30);
/// So much longer a guest may stand still because of it.
const MORE_MS: f64 = 20.0;

/// See the module's charter.
pub fn a_guest_moves_while_it_waits_for_a_block(c: &Context<'_>) -> Result<()> {
    let work = c.lab.dir().join("cold");
    fs::create_dir_all(&work).context("make the scenario's directory")?;
    let s3 = S3::start(&c.s3s_fs, &work.join("s3"))?;
    let lab = Lab::new("cold", 2, &c.lab.qemu, &c.lab.image)?;
    let point = work.join("failpoint");
    let point_env = format!("file={}", point.display());
    let env = [S3::ENV.as_slice(), &[("WHIMBREL_FAILPOINT", point_env.as_str())]].concat();
    lab.start_cluster_with(c.program, s3.url(), &env)?;
    let (first, _) = lab.pair();
    first.publish(&lab.image.disk, IMAGE)?;
    let far = far_file(&work)?;
    first.publish(&far, FAR_IMAGE)?;
    fs::remove_file(&far).context("remove the published file")?;
    first.whimbrel(&["volume", "create", VM, "--image", IMAGE])?;
    first.whimbrel(&["volume", "create", FAR, "--image", FAR_IMAGE])?;
    let mut flight = Flight::launch(&lab, 0, VM, &[VM, FAR], MEMORY_MIB, 1, WORKLOAD)?;

    // To and fro once: both hosts know both images.
    for to in [1, 0] {
        flight.migrate(to, &[]).context("move it with nothing outstanding")?;
    }
    let (mut plain, mut waiting) = (Times::default(), Times::default());
    let mut reads = 0;
    for round in 0..MOVES_MAX {
        if round >= MOVES && waiting.added_ms(&plain) <= MORE_MS {
            break;
        }
        let to = 1 - flight.at();
        plain.add(&flight.migrate(to, &[]).context("move it with nothing outstanding")?)?;
        let to = 1 - flight.at();
        s3.hold(true);
        read_next(&mut flight, reads)?;
        let moved =
            flight.migrate(to, &[]).with_context(|| format!("move {round} with a read outstanding"))?;
        let left = moved.task["figures"]["reissued_requests"].as_f64().unwrap_or_default();
        ensure!(left >= 1.0, "move {round}: the read was not outstanding at the pause: {}", moved.task);
        std::thread::sleep(DELAY);
        ensure!(
            flight.counter("cold_reads")? == reads,
            "move {round}: the read ended while the store said nothing"
        );
        s3.hold(false);
        reads += 1;
        ended(&mut flight, reads).with_context(|| format!("after move {round}"))?;
        waiting.add(&moved)?;
    }
    undone(&mut flight, &s3, &point, &mut reads).context("a move broken off after the pause")?;
    // Every block is what it was, and the device answers: a request answered twice would have ended that.
    flight.must_be_whole()?;
    println!(
        "       {} moves with a read outstanding: {waiting}; with none: {plain}",
        waiting.downtime_ms.len()
    );
    let added_ms = waiting.added_ms(&plain);
    ensure!(
        added_ms <= MORE_MS,
        "a read outstanding made the pause {added_ms:.0} ms longer: {waiting}; with none {plain}"
    );
    flight.stop()?;
    fs::remove_dir_all(&work).context("remove the scenario's directory")
}

/// Has the guest read a block that it has not read before.
fn read_next(flight: &mut Flight<'_>, reads: u64) -> Result<()> {
    let offset = (reads + 1) * STRIDE_BYTES + 4096;
    ensure!(offset < FAR_MIB << 20, "the far disk is too small for this many reads");
    flight.status().command(&format!("read {DEVICE} {offset}"), READ_LIMIT)?;
    std::thread::sleep(TAKEN);
    Ok(())
}

/// Waits until so many reads were right.
fn ended(flight: &mut Flight<'_>, reads: u64) -> Result<()> {
    let end = Instant::now() + READ_LIMIT;
    loop {
        let status = flight.status().now()?;
        ensure!(status["errors"] == 0, "the guest says: {}", status["last_error"]);
        if status["cold_reads"] == reads {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the guest's read does not end: {status}");
    }
}

/// The target dies after the pause, and for good: the guest goes on where it was, and so does its read.
fn undone(flight: &mut Flight<'_>, s3: &S3, point: &PathBuf, reads: &mut u64) -> Result<()> {
    let (from, to) = (flight.at(), 1 - flight.at());
    let target = flight.lab().hosts().get(to).context("find the target in the lab")?;
    s3.hold(true);
    read_next(flight, *reads)?;
    fs::write(point, "target:verify:abort").context("arm the failpoint")?;
    let told = flight
        .host()?
        .cli(&["vm", "migrate", VM, "--to", target.name()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("start the move")?;
    ensure!(!told.success(), "the target died, and the move was done");
    ensure!(
        target.wait_agent_end(Duration::from_secs(10)),
        "the target's agent did not end at its failpoint"
    );
    fs::remove_file(point).context("disarm the failpoint")?;
    flight.set_host(from)?;
    let (heard, _) = flight.heard_from();
    ensure!(heard == [from], "the guest's beat comes from {heard:?}");
    ensure!(flight.counter("cold_reads")? == *reads, "the read ended while the store said nothing");
    s3.hold(false);
    *reads += 1;
    ended(flight, *reads)
}

/// A disk that the guest knows the content of (`guest/src/cold.rs`).
fn far_file(dir: &std::path::Path) -> Result<PathBuf> {
    let path = dir.join("far.raw");
    let mut file = fs::File::create(&path).context("make the far disk")?;
    let mut part = Vec::with_capacity(1 << 20);
    for mib in 0..FAR_MIB {
        part.clear();
        for offset in ((mib << 20)..(mib + 1) << 20).step_by(8) {
            part.extend_from_slice(&word(offset).to_le_bytes());
        }
        file.write_all(&part).context("write the far disk")?;
    }
    Ok(path)
}

fn word(offset: u64) -> u64 {
    let mut x = offset.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// What moves of one kind took, milliseconds.
#[derive(Default)]
struct Times {
    /// The agents' own account of the pause.
    downtime_ms: Vec<f64>,
    /// The longest silence of the beat; what the emulator takes to get going again comes on top.
    silent_ms: Vec<f64>,
}

impl Times {
    fn add(&mut self, moved: &Move) -> Result<()> {
        self.downtime_ms.push(moved.figure("downtime_ms").context("read the downtime of the task")?);
        self.silent_ms.push(moved.beat.longest_gap_ms);
        Ok(())
    }

    /// By how much these pauses are longer than others. An emulator on a busy machine adds tens of milliseconds to
    /// any of them, so few say little: what the wait itself costs is in the least and in the middle one alike.
    fn added_ms(&self, others: &Self) -> f64 {
        let more = |of: fn(&[f64]) -> f64| of(&self.downtime_ms) - of(&others.downtime_ms);
        more(least).min(more(median))
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = |values: &[f64]| values.iter().map(|ms| format!("{ms:.0}")).collect::<Vec<_>>().join(" ");
        write!(f, "paused for {} ms, silent for {} ms", all(&self.downtime_ms), all(&self.silent_ms))
    }
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}
