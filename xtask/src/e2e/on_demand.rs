//! Disks that follow their VM (`vm migrate --disk on-demand`).
//!
//! ```text
//!   a VM with its own disk, which it flushes all the time, and a large one with known content
//!   moved with the disk before ─▶ moved with the disk after, to and fro ─▶ agents killed, VM stopped while blocks follow
//! ```
//!
//! Invariant: after every move the guest's records are whole, no volume depends on anybody, and the host that it
//! left keeps no layer of it.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, IMAGE};
use crate::cmd::{cmd, output, run};
use crate::flight::Flight;
use crate::lab::Host;

const VM: &str = "follow";
const BIG: &str = "follow-big";
const BIG_MIB: usize = 256;
const MEMORY_MIB: u64 = 128;
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=4 wg.disk=/data/records wg.disk_rate=200";
/// Slow enough that something can happen while blocks follow.
const SLOWLY: [&str; 4] = ["--disk", "on-demand", "--bandwidth", "300Mbit"];
const PULL_LIMIT: Duration = Duration::from_secs(120);

/// The scenario.
pub fn a_disk_follows_its_vm(c: &Context<'_>) -> Result<()> {
    let file = random_file(c)?;
    let first = host(c, 0)?;
    first.whimbrel(&["volume", "import", BIG, &file.to_string_lossy(), "--format", "raw"])?;
    first.whimbrel(&["volume", "create", VM, "--image", IMAGE])?;
    let mut flight = Flight::launch(c.lab, 0, VM, &[VM, BIG], MEMORY_MIB, 1, WORKLOAD)?;

    let copied = flight.migrate(1, &[]).context("move it with its disk")?;
    left_nothing(c, &flight, 0)?;
    let (mut worst_ms, mut acked) = (0f64, 0);
    let mut fastest = Duration::MAX;
    for round in 1..=4 {
        let (from, to) = (flight.at(), 1 - flight.at());
        let started = Instant::now();
        let moved = flight
            .migrate(to, &["--disk", "on-demand"])
            .with_context(|| format!("move {round} on demand"))?;
        println!(
            "       {BIG_MIB} MiB on demand: ran there after {:.1} s, silent for {:.0} ms, all there after {:.1} s",
            moved.total.as_secs_f64(),
            moved.beat.longest_gap_ms,
            started.elapsed().as_secs_f64()
        );
        ensure!(moved.beat.resets == 0 && moved.beat.flips <= 1, "move {round}: the guest did not just move");
        worst_ms = worst_ms.max(moved.beat.longest_gap_ms);
        fastest = fastest.min(moved.total);
        left_nothing(c, &flight, from).with_context(|| format!("after move {round}"))?;
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "move {round}: acknowledged records went back from {acked} to {now}");
        acked = now;
        flight.must_be_whole().with_context(|| format!("after move {round}"))?;
    }
    println!(
        "       with the disk before: ran there after {:.1} s, silent for {:.0} ms; on demand at best {:.1} s, at worst \
         {worst_ms:.0} ms",
        copied.total.as_secs_f64(),
        copied.beat.longest_gap_ms,
        fastest.as_secs_f64(),
    );
    ensure!(fastest < copied.total, "the disk was to follow, and the move took as long as with it");

    killed_while_blocks_follow(c, &mut flight, true).context("source's agent killed")?;
    killed_while_blocks_follow(c, &mut flight, false).context("target's agent killed")?;
    stopped_while_blocks_follow(c, flight, &file)
}

fn host<'a>(c: &'a Context<'_>, n: usize) -> Result<&'a Host> {
    c.lab.hosts().get(n).context("find a host of the lab")
}

/// Bytes that nothing can make smaller, the same in every run.
fn random_file(c: &Context<'_>) -> Result<PathBuf> {
    let path = c.lab.dir().join("big.raw");
    let mut file = fs::File::create(&path).context("make a large file")?;
    let (mut state, mut piece) = (0x9E37_79B9_7F4A_7C15_u64, Vec::with_capacity(1 << 20));
    for _ in 0..BIG_MIB {
        piece.clear();
        while piece.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend_from_slice(&state.to_le_bytes());
        }
        file.write_all(&piece).context("write a large file")?;
    }
    Ok(path)
}

/// Starts a slow move and waits until the guest runs at the target while blocks are still at the source.
fn begin(c: &Context<'_>, flight: &mut Flight<'_>, to: usize) -> Result<Child> {
    let (source, target) = (flight.host()?, host(c, to)?);
    flight.receiver().restart_window();
    let child = source
        .cli(&[&["vm", "migrate", VM, "--to", target.name()], SLOWLY.as_slice()].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start the move")?;
    flight.receiver().wait_for_source(to, Duration::from_secs(60)).context("the guest does not arrive")?;
    flight.set_host(to)?;
    let shown = target.whimbrel(&["volume", "show", BIG])?;
    ensure!(shown["depends_on"] == source.name(), "the volume says: {shown}");
    Ok(child)
}

fn killed_while_blocks_follow(c: &Context<'_>, flight: &mut Flight<'_>, source_dies: bool) -> Result<()> {
    let (from, to) = (flight.at(), 1 - flight.at());
    let acked = flight.counter("disk_acked")?;
    let mut command = begin(c, flight, to)?;
    let (source, target) = (host(c, from)?, host(c, to)?);
    refused(target, &["vm", "migrate", VM, "--to", source.name()], "depends on")?;
    let victim = if source_dies { source } else { target };
    victim.kill_agent()?;
    std::thread::sleep(Duration::from_secs(3));
    if source_dies {
        let said = target.whimbrel(&["task", "list"])?;
        let waits = said.as_array().into_iter().flatten().filter_map(|task| task["waiting_for"].as_str());
        let words: Vec<&str> = waits.filter(|words| words.contains("depends on")).collect();
        ensure!(words.iter().any(|words| words.contains(source.name())), "the tasks say: {said}");
        let left = target.whimbrel(&["volume", "show", BIG])?;
        ensure!(left["depends_on"] == source.name(), "the blocks came from nowhere: {left}");
    }
    victim.start_agent(c.program)?;
    whole(target)?;
    left_nothing(c, flight, from)?;
    drop(command.wait());
    let report = flight.receiver().report();
    ensure!(report.resets == 0, "the guest started anew");
    let now = flight.counter("disk_acked")?;
    ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
    flight.must_be_whole()?;
    let who = if source_dies { "source" } else { "target" };
    println!("       {who}'s agent killed while blocks follow: silent for {:.0} ms", report.longest_gap_ms);
    Ok(())
}

/// The VM is stopped while blocks follow: they go on, and then it starts again with everything.
fn stopped_while_blocks_follow(
    c: &Context<'_>,
    mut flight: Flight<'_>,
    file: &std::path::Path,
) -> Result<()> {
    let (from, to) = (flight.at(), 1 - flight.at());
    let mut command = begin(c, &mut flight, to)?;
    let (source, target) = (host(c, from)?, host(c, to)?);
    let acked = flight.counter("disk_acked")?;
    flight.stop()?;
    let again = ["vm", "run", VM, "--volume", VM, "--volume", BIG, "--memory", "128M"];
    refused(target, &again, "depends on")?;
    whole(target)?;
    drop(command.wait());
    gone(target, source)?;
    let exported = c.lab.dir().join("big.out.raw");
    drop(fs::remove_file(&exported));
    target.whimbrel(&["volume", "export", BIG, &exported.to_string_lossy(), "--format", "raw"])?;
    run(cmd("cmp", &[]).arg(file).arg(&exported)).context("compare the large disk with what it was")?;
    let mut flight = Flight::launch(c.lab, to, "follow-2", &[VM, BIG], MEMORY_MIB, 1, WORKLOAD)?;
    let recovered = flight.counter("disk_recovered")?;
    ensure!(recovered >= acked, "{acked} records were acknowledged, {recovered} survived");
    flight.must_be_whole()?;
    flight.stop()
}

fn refused(host: &Host, args: &[&str], words: &str) -> Result<()> {
    let out = output(&mut host.cli(args))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && said.contains(words), "`{}` said {said:?}", args.join(" "));
    Ok(())
}

/// Waits until no volume depends on another host.
fn whole(host: &Host) -> Result<()> {
    let end = Instant::now() + PULL_LIMIT;
    loop {
        let both = [VM, BIG].map(|volume| host.whimbrel(&["volume", "show", volume]));
        let depends: Vec<_> = both.iter().flatten().filter(|v| !v["depends_on"].is_null()).collect();
        // An agent that was just started may not answer yet.
        if depends.is_empty() && both.iter().all(Result::is_ok) {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("blocks still follow after {PULL_LIMIT:?}: {depends:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The host that the VM left has no layer of it any more, and the volumes are sound.
fn left_nothing(c: &Context<'_>, flight: &Flight<'_>, from: usize) -> Result<()> {
    whole(flight.host()?)?;
    gone(flight.host()?, host(c, from)?)
}

fn gone(holder: &Host, source: &Host) -> Result<()> {
    for volume in [VM, BIG] {
        let shown = holder.whimbrel(&["volume", "show", volume])?;
        let id = shown["disk_id"].as_str().context("read the volume's layer")?.to_owned();
        let layer = source.dir().join("data/volumes").join(id);
        let end = Instant::now() + Duration::from_secs(20);
        while layer.exists() {
            ensure!(Instant::now() < end, "{} still is there", layer.display());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
