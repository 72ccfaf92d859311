//! The scenarios themselves.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{
    Context, IMAGE, Scenario, adopt, capture, cold_block, errors, files, formats, iotests, kill, live,
    memory, nbd, no_space, on_demand, resize, shorter, snapshots, swarm,
};
use crate::cmd::output;
use crate::flight::Flight;
use crate::qemu::Version;
use crate::qmp::Qmp;
use crate::tcp::Client;

/// Parts of names of scenarios in which QEMU's version plays no part: one of the versions is enough.
pub const ANY_VERSION: [&str; 9] = [
    "eight hosts boot",
    "an agent's memory",
    "memory that is known",
    "formats of others",
    "only know files",
    "no space",
    "snapshots are made",
    "turns out to be forbidden",
    "steered while they run",
];

/// In the order they run.
pub const ALL: [Scenario; 30] = [
    ("a workload's own check reports what is damaged on purpose", damage_is_reported),
    ("moves to and fro in mode A lose nothing", to_and_fro_mode_a),
    ("moves to and fro in mode B lose nothing", to_and_fro_mode_b),
    ("memory that is known at the target does not travel", shorter::memory_travels_shorter),
    (
        "writes are followed in groups, and disks past the page cache waited for",
        capture::followed_in_groups_and_past_the_page_cache,
    ),
    ("a TCP connection survives a move", tcp_survives),
    ("moves are steered while they run", live::moves_are_steered),
    ("an agent killed under a running guest comes back and the guest never noticed", agent_restart),
    ("a killed guest comes back with every acknowledged record", acknowledged_records_survive),
    ("a disk follows its VM, whichever agent is killed meanwhile", on_demand::a_disk_follows_its_vm),
    ("a guest moves while it waits for a block", cold_block::a_guest_moves_while_it_waits_for_a_block),
    ("snapshots are made, moved, cloned and removed under a guest", snapshots::snapshots_under_a_guest),
    ("volumes become larger under a guest, on its way and at rest", resize::volumes_become_larger),
    ("adopt: a QEMU started by hand moves in mode A", adopt::adopted_in_mode_a),
    ("adopt: a QEMU with private memory moves in mode B, then in mode A", adopt::adopted_in_mode_b),
    ("adopt: a volume of ours stays on its device", adopt::adopted_with_a_volume),
    ("adopt: mode B is taken where mode A turns out to be forbidden", adopt::falls_back_to_mode_b),
    ("adopt: what cannot be taken over is refused, by name", adopt::refusals),
    ("adopt: cut short, it is undone", adopt::cut_short),
    ("everything is killed at every step in mode A", kill::in_mode_a),
    ("everything is killed at every step in mode B", kill::in_mode_b),
    ("eight hosts boot from one image and the store is read once", swarm::store_is_read_once),
    ("an agent's memory stays within its limits", memory::agent_memory),
    ("a guest whose host has no space waits for it", no_space::a_guest_waits_for_space),
    ("an attached volume passes what NBD's other programs ask of it", nbd::peers_tools_agree),
    (iotests::NAME, iotests::qemus_own_tests_pass),
    ("an attached volume is a file to programs that only know files", files::programs_take_it_for_a_file),
    ("disks go out and come back in the formats of others", formats::in_and_out),
    ("what goes wrong around a VM is told and leaves it alone", errors::errors_leave_the_vm_alone),
    ("mistakes are answered with what, where and what to do", mistakes),
];

/// 100 MiB/s of memory written, the disk fsynced without pause.
const BUSY: &str = "wg.mem_mib=128 wg.mem_rate=100 wg.disk=/data/records";
const CALM: &str = "wg.mem_mib=32 wg.mem_rate=10 wg.disk=/data/records wg.disk_rate=100";
const MEMORY_MIB: u64 = 256;
const SOON: Duration = Duration::from_secs(30);

fn start<'a>(c: &'a Context<'_>, name: &str, workload: &str) -> Result<Flight<'a>> {
    Flight::start(c.lab, 0, name, IMAGE, MEMORY_MIB, 2, workload)
}

fn damage_is_reported(c: &Context<'_>) -> Result<()> {
    let mut flight = start(c, "damaged", CALM)?;
    flight.status().command("stop-writing", SOON)?;
    ensure!(flight.verify()? == 0, "errors before anything was damaged");
    for (n, what) in ["page", "version", "sector"].iter().enumerate() {
        flight.status().command(&format!("corrupt {what}"), SOON)?;
        let errors = flight.verify()?;
        ensure!(
            errors == n as u64 + 1,
            "after damage to a {what}: {errors} errors reported, expected {}",
            n + 1
        );
    }
    flight.stop()
}

fn to_and_fro_mode_a(c: &Context<'_>) -> Result<()> {
    to_and_fro(c, "fro-a", "a")
}

fn to_and_fro_mode_b(c: &Context<'_>) -> Result<()> {
    to_and_fro(c, "fro-b", "b")
}

fn to_and_fro(c: &Context<'_>, name: &str, mode: &str) -> Result<()> {
    let mut flight = start(c, name, BUSY)?;
    let shown = flight.host()?.whimbrel(&["vm", "show", name])?;
    if mode == "a" && shown["mode"].as_str().map(str::to_lowercase).as_deref() != Some("a") {
        println!("       mode A is not possible on this machine, so not tried: {}", shown["mode_reasons"]);
        return flight.stop();
    }
    // Each mode is tried at length on the version on which its kill tests run.
    let at_length = (mode == "a") == (c.lab.qemu.version == Version::V10_0);
    let rounds = match (c.long, at_length) {
        (true, _) => 100,
        (false, true) => 12,
        (false, false) => 4,
    };
    let (mut acked, mut worst_ms) = (0, 0f64);
    for round in 1..=rounds {
        let to = 1 - flight.at();
        let mut options = vec!["--mode", mode];
        // A full hash of RAM at the pause costs time: now and then, in mode A, where the pages are moved by us.
        if mode == "a" && round % 5 == 1 {
            options.push("--verify");
        }
        let moved = flight.migrate(to, &options).with_context(|| format!("move {round}"))?;
        ensure!(moved.beat.resets == 0, "move {round}: the guest started anew");
        ensure!(moved.beat.flips <= 1, "move {round}: beats came from both hosts in turn");
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "move {round}: acknowledged records went back from {acked} to {now}");
        acked = now;
        worst_ms = worst_ms.max(moved.beat.longest_gap_ms);
        flight.must_be_whole().with_context(|| format!("after move {round}"))?;
    }
    println!("       {rounds} moves in mode {mode}, {acked} records, longest silence {worst_ms:.0} ms");
    flight.stop()
}

fn tcp_survives(c: &Context<'_>) -> Result<()> {
    let mut flight = start(c, "tcp", CALM)?;
    let Some(address) = flight.address.clone() else {
        println!("       this user may not open /dev/net/tun, so not tried");
        return flight.stop();
    };
    let mut client = Client::connect(&address)?;
    for to in [1, 0] {
        flight.migrate(to, &[])?;
        client.echo("still there?").with_context(|| format!("after the move to host {}", to + 1))?;
    }
    flight.stop()
}

fn agent_restart(c: &Context<'_>) -> Result<()> {
    let mut flight = start(c, "steady", BUSY)?;
    let host = flight.host()?;
    flight.receiver().restart_window();
    let restart = || {
        host.kill_agent()?;
        std::thread::sleep(Duration::from_millis(500));
        host.start_agent(c.program)
    };
    restart()?;
    disk_goes_on(&mut flight)?;
    // QEMU before 8.2 forgets its disks when the agent goes away while the guest is paused, and for good.
    let mut qmp = Qmp::connect(&host.vm_sockets("steady").qmp, SOON)?;
    qmp.execute("stop", json!({}))?;
    restart()?;
    std::thread::sleep(Duration::from_secs(2));
    qmp.execute("cont", json!({}))?;
    disk_goes_on(&mut flight).context("after the agent came back under a paused guest")?;
    restart()?;
    disk_goes_on(&mut flight).context("after the agent came back once more")?;
    ensure!(flight.receiver().report().resets == 0, "the guest started anew");
    flight.must_be_whole()?;
    flight.migrate(1, &[]).context("move it after the agent's restart")?;
    flight.must_be_whole()?;
    flight.stop()
}

/// The guest has more of its records acknowledged.
fn disk_goes_on(flight: &mut Flight<'_>) -> Result<()> {
    let before = flight.counter("disk_acked")?;
    let end = Instant::now() + SOON;
    while flight.counter("disk_acked")? < before + 50 {
        ensure!(Instant::now() < end, "the disk did not come back after the agent did");
    }
    Ok(())
}

fn acknowledged_records_survive(c: &Context<'_>) -> Result<()> {
    let name = "crashed";
    let mut flight = start(c, name, "wg.mem_mib=0 wg.disk=/data/records")?;
    let host = flight.host()?;
    std::thread::sleep(Duration::from_secs(2));
    let acked = flight.counter("disk_acked")?;
    ensure!(acked > 0, "no record was acknowledged");
    host.kill_agent()?;
    let pid = crate::lab::qemu_pid(name)?;
    crate::cmd::run(&mut crate::cmd::cmd("kill", &["-KILL", &pid.to_string()]))?;
    drop(flight);
    host.start_agent(c.program)?;
    // The VM is down, its volume is free again after the agent saw that.
    let end = Instant::now() + SOON;
    loop {
        let stopped = output(&mut host.cli(&["vm", "stop", name, "--force"]))?;
        let listed = host.whimbrel(&["vm", "list"])?;
        let running =
            listed.as_array().into_iter().flatten().any(|v| v["name"] == name && v["state"] == "running");
        if !running {
            break;
        }
        ensure!(Instant::now() < end, "the agent takes vm {name} for running: {stopped:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut again =
        Flight::restart(c.lab, 0, "crashed-2", name, MEMORY_MIB, 2, "wg.mem_mib=0 wg.disk=/data/records")?;
    let recovered = again.counter("disk_recovered")?;
    ensure!(recovered >= acked, "{acked} records were acknowledged, {recovered} survived");
    again.must_be_whole()?;
    again.stop()
}

/// Arguments, exit status, words that the message must hold.
type Mistake<'a> = (&'a [&'a str], i32, &'a [&'a str]);

fn mistakes(c: &Context<'_>) -> Result<()> {
    let flight = start(c, "right", "wg.mem_mib=0")?;
    let host = flight.host()?;
    let missing = c.lab.dir().join("missing.raw");
    let missing = missing.to_string_lossy();
    let table: [Mistake<'_>; 8] = [
        (&["vm", "show", "nobody"], 1, &["nobody"]),
        (&["vm", "migrate", "nobody", "--to", "e2e-h2"], 1, &["nobody"]),
        (&["vm", "migrate", "right", "--to", "nowhere"], 1, &["nowhere"]),
        (&["vm", "run", "right", "--volume", "right", "--memory", "64M"], 1, &["right"]),
        (&["volume", "create", "v", "--image", "no:such"], 1, &["no:such"]),
        (&["image", "publish", &missing, "--format", "raw", "--name", "m:1"], 1, &["missing.raw"]),
        (&["vm", "run", "x", "--volume", "nothing", "--memory", "64M"], 1, &["nothing"]),
        (&["vm", "fly"], 2, &["fly"]),
    ];
    let mut wrong = Vec::new();
    for (args, status, words) in table {
        let out = output(&mut host.cli(args))?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let code = out.status.code().unwrap_or(-1);
        // 4 says that another holds the right: as good an answer as 1 where it is true.
        if code != status && !(status == 1 && code == 4) || words.iter().any(|w| !said.contains(w)) {
            wrong.push(format!("`{}` ended with {code} and said {said:?}", args.join(" ")));
        }
    }
    ensure!(flight.receiver().report().longest_gap_ms < 5000.0, "the VM was disturbed by a mistake");
    flight.stop()?;
    if !wrong.is_empty() {
        bail!("{}", wrong.join("; "));
    }
    Ok(())
}
