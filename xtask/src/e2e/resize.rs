//! Volumes that become larger: under a running guest and a paused one, with snapshots, before, during and after a move,
//! under an agent that is killed, at rest, and over NBD.
//!
//! ```text
//!   a VM with its own disk, which it flushes all the time, and one of data
//!   data disk resized ─▶ the guest sees it ─▶ zeros there, written, read again after every event ─▶ and so on
//! ```
//!
//! Invariant: what the guest wrote behind the old end is there after whatever comes, and nothing but zeros was there
//! before.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Context, IMAGE};
use crate::cmd::{capture, cmd, find_program, output};
use crate::flight::Flight;
use crate::lab::Host;
use crate::qmp::Qmp;

const VM: &str = "larger";
const DATA: &str = "larger-data";
/// The guest's name for the data disk.
const DEVICE: &str = "/dev/vdb";
const MEMORY_MIB: u64 = 128;
const WORKLOAD: &str = "wg.mem_mib=32 wg.mem_rate=4 wg.disk=/data/records wg.disk_rate=100";
const MIB: u64 = 1 << 20;
const STEP: u64 = 64 * MIB;
const BLOCK: u64 = 4096;
const SOON: Duration = Duration::from_secs(30);
/// A guest sees it this soon; the emulator and a busy machine included.
const SEEN: Duration = Duration::from_secs(5);
/// A resize must not be noticed; on a busy machine the beat may be late for other reasons.
const PAUSE_MS: f64 = 1000.0;
/// Slow enough that something can be asked for meanwhile.
const SLOWLY: [&str; 2] = ["--bandwidth", "100Mbit"];

/// The data disk, as it is by now.
struct Data<'a, 'b> {
    flight: &'b mut Flight<'a>,
    size: u64,
    /// Places that were written.
    filled: Vec<u64>,
    /// Commands that the guest has carried out.
    done: u64,
}

/// The scenario.
pub fn volumes_become_larger(c: &Context<'_>) -> Result<()> {
    let (first, second) = c.lab.pair();
    first.whimbrel(&["volume", "create", VM, "--image", IMAGE])?;
    first.whimbrel(&["volume", "create", DATA, "--size", &format!("{STEP}")])?;
    let mut flight = Flight::launch(c.lab, 0, VM, &[VM, DATA], MEMORY_MIB, 1, WORKLOAD)?;
    flight.status().command(&format!("watch {DEVICE}"), SOON)?;
    let mut data = Data { flight: &mut flight, size: STEP, filled: Vec::new(), done: 0 };
    data.seen(SOON)?;
    data.fill(&[0, STEP - BLOCK])?;

    under_a_running_guest(&mut data).context("under a running guest")?;
    paused(&mut data).context("under a paused guest")?;
    first.whimbrel(&["volume", "snapshot", DATA, "--name", "small"])?;
    data.grow().context("on a snapshot")?;
    agent_killed(c, &mut data, first).context("under an agent that is killed")?;
    moved(&mut data, first, second).context("before and after a move")?;
    agent_killed(c, &mut data, second).context("under an agent that is killed, after a move")?;

    let errors = data.flight.verify()?;
    ensure!(errors == 0, "the guest found {errors} errors: {}", data.flight.status().now()?["last_error"]);
    let (size, filled) = (data.size, std::mem::take(&mut data.filled));
    flight.stop()?;
    at_rest(c, second, size, filled).context("at rest")?;
    over_nbd(second).context("over NBD")
}

fn under_a_running_guest(data: &mut Data<'_, '_>) -> Result<()> {
    data.flight.receiver().restart_window();
    let (mut seen, mut told) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..3 {
        let (command, sees) = data.grow()?;
        (told, seen) = (told.max(command), seen.max(sees));
    }
    let beat = data.flight.receiver().report();
    println!(
        "       three resizes: the command took {:.0} ms at most, the guest saw it {:.0} ms after at most, and was \
         silent for {:.0} ms at most",
        told.as_secs_f64() * 1e3,
        seen.as_secs_f64() * 1e3,
        beat.longest_gap_ms
    );
    ensure!(beat.longest_gap_ms < PAUSE_MS && beat.resets == 0, "the guest stood still");
    // Its own disk, with a file system in use; nothing of it changes but its end.
    let host = data.flight.host()?;
    let was = size_of(host, VM)?;
    host.whimbrel(&["volume", "resize", VM, &format!("{}", was + STEP)])?;
    data.flight.must_be_whole()?;
    let before = host.whimbrel(&["volume", "show", DATA])?;
    let after = host.whimbrel(&["volume", "resize", DATA, &format!("{}", data.size)])?;
    for same in ["size_bytes", "data_id"] {
        ensure!(before[same] == after[same], "the same size changed {same}: {before} {after}");
    }
    refused(
        host,
        &["volume", "resize", DATA, &format!("{}", data.size - BLOCK)],
        "would lose what is behind",
    )?;
    refused(host, &["volume", "resize", DATA, "65T"], "at most")?;
    let checked = host.whimbrel(&["volume", "check", DATA])?;
    ensure!(checked["problems"] == json!([]), "{checked}");
    Ok(())
}

/// QEMU does not look at its disk's size while the guest is paused: it is told again when the disk starts.
fn paused(data: &mut Data<'_, '_>) -> Result<()> {
    let host = data.flight.host()?;
    let mut qmp = Qmp::connect(&host.vm_sockets(VM).qmp, SOON)?;
    qmp.execute("stop", json!({}))?;
    data.size += STEP;
    host.whimbrel(&["volume", "resize", DATA, &format!("{}", data.size)])?;
    qmp.execute("cont", json!({}))?;
    data.seen(SEEN)?;
    data.use_the_new_end()
}

/// Once after it said that it is done, and at any moment before.
fn agent_killed(c: &Context<'_>, data: &mut Data<'_, '_>, host: &Host) -> Result<()> {
    host.kill_agent()?;
    host.start_agent(c.program)?;
    data.read_all()?;
    data.grow().context("told by the new agent")?;
    let mut done = 0;
    let waits_ms: &[u64] = if c.long { &[1, 8, 20, 40] } else { &[1, 20] };
    for &wait_ms in waits_ms {
        let asked = data.size + STEP;
        let mut command = host
            .cli(&["volume", "resize", DATA, &format!("{asked}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start a resize")?;
        std::thread::sleep(Duration::from_millis(wait_ms));
        host.kill_agent()?;
        drop(command.wait());
        host.start_agent(c.program)?;
        let recorded = size_of(host, DATA)?;
        ensure!(recorded == asked || recorded == data.size, "it has {recorded} bytes by its record");
        done += u32::from(recorded == asked);
        data.size = recorded;
        data.seen(SOON).with_context(|| format!("killed after {wait_ms} ms"))?;
        data.use_the_new_end()?;
        data.read_all()?;
    }
    println!(
        "       of {} resizes whose agent was killed {done} were carried out, the others were not begun",
        waits_ms.len()
    );
    data.flight.must_be_whole()
}

fn moved(data: &mut Data<'_, '_>, first: &Host, second: &Host) -> Result<()> {
    data.flight.migrate(1, &[])?;
    data.seen(SEEN)?;
    data.read_all()?;
    data.size += STEP;
    first
        .whimbrel(&["volume", "resize", DATA, &format!("{}", data.size)])
        .context("asked where it is no more: passed on to where it is")?;
    data.seen(SEEN)?;
    data.use_the_new_end()?;
    data.grow().context("where it came to")?;
    // While it moves nothing changes, and the command says why; the same size would do nothing but for that.
    let mut command = second
        .cli(&[&["vm", "migrate", VM, "--to", first.name()], SLOWLY.as_slice()].concat())
        .stdout(Stdio::null())
        .spawn()
        .context("start a slow move")?;
    let end = Instant::now() + SOON;
    while second.whimbrel(&["vm", "show", VM])?["state"] != "migrating" {
        ensure!(Instant::now() < end && command.try_wait()?.is_none(), "the slow move does not begin");
    }
    refused(second, &["volume", "resize", DATA, &format!("{}", data.size)], "being moved")?;
    ensure!(command.try_wait()?.is_none(), "the slow move was over by then");
    ensure!(command.wait().context("wait for the move")?.success(), "the slow move failed");
    data.flight.set_host(0)?;
    data.read_all()?;
    data.grow().context("where it came back to")?;
    data.flight.migrate(1, &["--disk", "on-demand"]).context("move it, the disk after it")?;
    data.read_all()?;
    let end = Instant::now() + SOON;
    while second.whimbrel(&["volume", "show", DATA])?["depends_on"] != Value::Null {
        ensure!(Instant::now() < end, "blocks still follow");
        std::thread::sleep(Duration::from_millis(100));
    }
    data.grow().map(drop).context("after its blocks followed")
}

fn at_rest(c: &Context<'_>, host: &Host, size: u64, filled: Vec<u64>) -> Result<()> {
    let size = size + STEP;
    host.whimbrel(&["volume", "resize", DATA, &format!("{size}")])?;
    let checked = host.whimbrel(&["volume", "check", DATA])?;
    ensure!(checked["problems"] == json!([]), "{checked}");
    let shown = host.whimbrel(&["volume", "show", DATA])?;
    ensure!(shown["chain"][0]["size_bytes"].as_u64().is_some_and(|below| below < size), "{shown}");
    let mut flight = Flight::launch(c.lab, 1, VM, &[VM, DATA], MEMORY_MIB, 1, WORKLOAD)?;
    flight.status().command(&format!("watch {DEVICE}"), SOON)?;
    let mut data = Data { flight: &mut flight, size, filled, done: 0 };
    data.seen(SOON)?;
    data.use_the_new_end()?;
    data.read_all()?;
    flight.must_be_whole()?;
    flight.stop()?;
    host.whimbrel(&["volume", "remove", VM])?;
    host.whimbrel(&["volume", "remove", DATA]).map(drop)
}

/// A client that connects anew sees the new size.
fn over_nbd(host: &Host) -> Result<()> {
    let name = "larger-nbd";
    host.whimbrel(&["volume", "create", name, "--size", "8M"])?;
    let shown = host.whimbrel(&["volume", "attach", name, "--export", "nbd"])?;
    let place = shown["exports"][0].as_str().context("attach says where")?;
    let uri = format!("nbd+unix:///{name}?socket={place}");
    ensure!(find_program("nbdinfo").is_some(), "nbdinfo is missing: run `cargo xtask test` as root once");
    for mib in [8, 24] {
        host.whimbrel(&["volume", "resize", name, &format!("{mib}M")])?;
        let told = capture(&mut cmd("nbdinfo", &["--size", &uri]))?;
        ensure!(told.trim() == format!("{}", mib * MIB), "nbdinfo says {told:?} after a resize to {mib} MiB");
    }
    host.whimbrel(&["volume", "detach", name])?;
    host.whimbrel(&["volume", "remove", name]).map(drop)
}

impl Data<'_, '_> {
    /// Makes it larger, and has the guest use what is new; how long the command took, and the guest after it.
    fn grow(&mut self) -> Result<(Duration, Duration)> {
        self.size += STEP;
        let host = self.flight.host()?;
        let started = Instant::now();
        let shown = host.whimbrel(&["volume", "resize", DATA, &format!("{}", self.size)])?;
        let told = started.elapsed();
        ensure!(shown["size_bytes"] == self.size, "the command says: {shown}");
        let seen = self.seen(SEEN)?;
        self.use_the_new_end()?;
        Ok((told, seen))
    }

    /// Waits until the guest has the disk's size; how long.
    fn seen(&mut self, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let has = self.flight.counter("watched_bytes")?;
            if has == self.size {
                return Ok(started.elapsed());
            }
            ensure!(started.elapsed() < limit, "the guest sees {has} bytes, its disk has {}", self.size);
        }
    }

    /// Zeros there, then known content.
    fn use_the_new_end(&mut self) -> Result<()> {
        let places = [self.size - STEP, self.size - BLOCK];
        if self.filled.contains(&places[1]) {
            return Ok(());
        }
        for at in places {
            self.order("blank", at)?;
        }
        self.ended()?;
        self.fill(&places)
    }

    fn fill(&mut self, places: &[u64]) -> Result<()> {
        for at in places {
            self.order("fill", *at)?;
        }
        self.filled.extend(places);
        self.ended()
    }

    fn read_all(&mut self) -> Result<()> {
        for at in self.filled.clone() {
            self.order("read", at)?;
        }
        self.ended()
    }

    fn order(&mut self, what: &str, at: u64) -> Result<()> {
        self.done += 1;
        self.flight.status().command(&format!("{what} {DEVICE} {at}"), SOON).map(drop)
    }

    /// Waits until every order was carried out, and rightly.
    fn ended(&mut self) -> Result<()> {
        let end = Instant::now() + SOON;
        loop {
            let status = self.flight.status().now()?;
            ensure!(status["errors"] == 0, "the guest says: {}", status["last_error"]);
            if status["cold_reads"] == self.done {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the guest's disk does not answer: {status}");
        }
    }
}

fn size_of(host: &Host, volume: &str) -> Result<u64> {
    host.whimbrel(&["volume", "show", volume])?["size_bytes"].as_u64().context("read a volume's size")
}

fn refused(host: &Host, args: &[&str], words: &str) -> Result<()> {
    let out = output(&mut host.cli(args))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && said.contains(words), "`{}` said {said:?}", args.join(" "));
    Ok(())
}
