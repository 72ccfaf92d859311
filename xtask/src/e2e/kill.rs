//! Everything that takes part in a move is killed, at every step of it, and either comes back after two seconds or
//! never does. Afterwards the VM runs exactly once, with all that it was told is safe.
//!
//! ```text
//!   h1 keeps the metadata, h2 and h3 move the VM
//!   arm a step (WHIMBREL_FAILPOINT) ─▶ move ─▶ at the step: kill ─▶ 2 s, back / 10 s, not back ─▶ verdict ─▶ all back
//! ```
//!
//! Not here: far more orders of events (`crates/sim`).

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, IMAGE};
use crate::cmd::{cmd, run};
use crate::flight::Flight;
use crate::lab::{self, Host};
use crate::paths;

const WORKLOAD: &str = "wg.mem_mib=48 wg.mem_rate=20 wg.disk=/data/records wg.disk_rate=200";
const VM: &str = "victim";
/// Nothing is held up for longer than this before its step.
const REACH_LIMIT: Duration = Duration::from_secs(40);
const BACK_AFTER: Duration = Duration::from_secs(2);
const NEVER_FOR: Duration = Duration::from_secs(10);
/// From everything being back to the VM's beat.
const SETTLE_LIMIT: Duration = Duration::from_secs(45);
/// A lost target lets the source go on within this time, plus the beat's own jitter on a busy machine.
const LOST_TARGET_GAP_MS: f64 = 5500.0;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceAgent,
    TargetAgent,
    TargetQemu,
    Connection,
    Metadata,
}

impl Victim {
    const ALL: [Victim; 5] =
        [Victim::SourceAgent, Victim::TargetAgent, Victim::TargetQemu, Victim::Connection, Victim::Metadata];

    fn name(self) -> &'static str {
        match self {
            Victim::SourceAgent => "source agent",
            Victim::TargetAgent => "target agent",
            Victim::TargetQemu => "target QEMU",
            Victim::Connection => "connection",
            Victim::Metadata => "metadata store",
        }
    }

    /// Whose step is waited for.
    fn side(self) -> &'static str {
        match self {
            Victim::TargetAgent | Victim::TargetQemu => "target",
            Victim::SourceAgent | Victim::Connection | Victim::Metadata => "source",
        }
    }
}

/// Names of the handover's steps, in order, read where they are defined.
fn steps() -> Result<Vec<String>> {
    let path = paths::workspace().join("crates/wire/src/peer/migrate.rs");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let body = text.split("\nsteps! {").nth(1).and_then(|b| b.split("\n}").next());
    let names: Vec<String> = body
        .context("find the handover's steps")?
        .lines()
        .filter_map(|l| Some(l.trim().strip_suffix("\",")?.split_once(" = \"")?.1.to_owned()))
        .collect();
    ensure!(names.len() >= 8, "only {} steps found in {}", names.len(), path.display());
    Ok(names)
}

/// One case.
struct Case<'a> {
    step: &'a str,
    victim: Victim,
    comes_back: bool,
}

/// Every step, victim and way back; with `--long` only.
pub fn everything_is_killed_at_every_step(c: &Context<'_>) -> Result<()> {
    if !c.long {
        println!("       left to --long: it takes an hour");
        return Ok(());
    }
    let steps = steps()?;
    let mut flight = Flight::start(c.lab, 1, VM, IMAGE, 128, 1, WORKLOAD)?;
    let (mut ran, mut wrong) = (0, Vec::new());
    for step in &steps {
        for victim in Victim::ALL {
            for comes_back in [true, false] {
                let case = Case { step, victim, comes_back };
                let back = if comes_back { "back after 2 s" } else { "never back" };
                let words = format!("{} killed at {step}, {back}", victim.name());
                ran += 1;
                match one(c, &mut flight, &case) {
                    Ok(what) => println!("       {words}: {what}"),
                    Err(e) => {
                        println!("       {words}: WRONG: {e:#}");
                        wrong.push(words);
                        flight = anew(c, &flight, wrong.len())?;
                    }
                }
            }
        }
    }
    println!("       {ran} cases, {} wrong", wrong.len());
    if !wrong.is_empty() {
        bail!("{} of {ran} cases went wrong: {}", wrong.len(), wrong.join("; "));
    }
    flight.stop()
}

/// After a case that went wrong: another VM, so that the next case says something of its own.
fn anew<'a>(c: &'a Context<'_>, old: &Flight<'a>, number: usize) -> Result<Flight<'a>> {
    for host in c.lab.hosts() {
        drop(host.whimbrel(&["vm", "stop", &old.name, "--force"]));
        restore(c, host)?;
    }
    while let Ok(pid) = lab::qemu_pid(&old.name) {
        run(&mut cmd("kill", &["-KILL", &pid.to_string()]))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Flight::start(c.lab, 1, &format!("{VM}-{number}"), IMAGE, 128, 1, WORKLOAD)
}

/// Network up, agent up and without a fail point.
fn restore(c: &Context<'_>, host: &Host) -> Result<()> {
    host.set_network(true)?;
    if !host.has_agent() || host.wait_agent_end(Duration::ZERO) {
        host.start_agent(c.program)?;
    }
    Ok(())
}

fn one(c: &Context<'_>, flight: &mut Flight<'_>, case: &Case<'_>) -> Result<String> {
    let (from, to) = (flight.at(), 3 - flight.at());
    let host = |n: usize| c.lab.hosts().get(n).context("find a host of the lab");
    let (source, target) = (host(from)?, host(to)?);
    let armed = if case.victim.side() == "source" { source } else { target };
    let acked = flight.counter("disk_acked")?;

    let hold = c.lab.dir().join(format!("hold-{}-{}", case.step, case.victim.name().replace(' ', "-")));
    drop(fs::remove_dir_all(&hold));
    fs::create_dir_all(&hold).context("make the fail point's directory")?;
    armed.kill_agent()?;
    let point = format!("{}:{}:hold={}", case.victim.side(), case.step, hold.display());
    armed.start_agent_with(c.program, &[("WHIMBREL_FAILPOINT", &point)])?;
    wait_picked_up(source, &flight.name)?;
    flight.receiver().restart_window();
    let mut command = source
        .cli(&["vm", "migrate", &flight.name, "--to", target.name()])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .context("start the move")?;
    let reached = wait_for_step(&hold, case, &mut command);
    if reached {
        strike(case.victim, flight, source, target, host(0)?)?;
        release(&hold)?;
        std::thread::sleep(if case.comes_back { BACK_AFTER } else { NEVER_FOR });
    }
    let gone_for_good = if reached && !case.comes_back {
        Some(verdict_without(flight, case, &[source, target])?)
    } else {
        None
    };
    let gap_ms = flight.receiver().report().longest_gap_ms;
    for n in 0..3 {
        restore(c, host(n)?)?;
    }
    let moved = end_command(&mut command)?;
    let at = settle(flight)?;
    // The fail point goes with the process that has it.
    armed.kill_agent()?;
    armed.start_agent(c.program)?;
    flight.set_host(at)?;
    let now = flight.counter("disk_acked")?;
    ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
    flight.must_be_whole()?;
    if !reached {
        ensure!(moved, "the step was not reached, and the move failed");
        return Ok("the step is not entered on that side; the move went through".to_owned());
    }
    let place = if at == to { "target" } else { "source" };
    Ok(format!("runs at the {place}, silent for {gap_ms:.0} ms{}", gone_for_good.unwrap_or_default()))
}

fn wait_for_step(hold: &std::path::Path, case: &Case<'_>, command: &mut Child) -> bool {
    let marker = hold.join(format!("{}-{}", case.victim.side(), case.step));
    let end = Instant::now() + REACH_LIMIT;
    let mut ended_at = None;
    while Instant::now() < end {
        if marker.exists() {
            return true;
        }
        // Steps after the commit may come after the command has its answer.
        if ended_at.is_none() && matches!(command.try_wait(), Ok(Some(_))) {
            ended_at = Some(Instant::now());
        }
        if ended_at.is_some_and(|t| t.elapsed() > Duration::from_secs(3)) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn strike(victim: Victim, flight: &Flight<'_>, source: &Host, target: &Host, keeper: &Host) -> Result<()> {
    match victim {
        Victim::SourceAgent => source.kill_agent(),
        Victim::TargetAgent => target.kill_agent(),
        Victim::Metadata => keeper.kill_agent(),
        Victim::Connection => source.set_network(false),
        Victim::TargetQemu => {
            let needle = target.vm_sockets(&flight.name).beat;
            // Before the target has started it there is none to kill: the step is passed through.
            match lab::process_with(&needle.to_string_lossy()) {
                Ok(pid) => run(&mut cmd("kill", &["-KILL", &pid.to_string()])),
                Err(_) => Ok(()),
            }
        }
    }
}

/// Lets the held side go on, if it still lives.
fn release(hold: &std::path::Path) -> Result<()> {
    let go: PathBuf = hold.join("go");
    fs::write(go, "").context("let the move go on")
}

/// While something is gone for good: never two, and none only where an operator is asked for.
fn verdict_without(flight: &Flight<'_>, case: &Case<'_>, sides: &[&Host]) -> Result<String> {
    let gap_ms = flight.receiver().report().longest_gap_ms;
    let (running, _) = flight.heard_from();
    ensure!(running.len() <= 1, "beats come from {} hosts at once", running.len());
    if case.victim == Victim::TargetAgent || case.victim == Victim::TargetQemu {
        // The commit moves the VM to the target: what is lost after it is not a lost target.
        let committed = matches!(case.step, "commit" | "resume" | "announce" | "release");
        ensure!(
            committed || gap_ms <= LOST_TARGET_GAP_MS,
            "silent for {gap_ms:.0} ms after the target was lost"
        );
    }
    if !running.is_empty() {
        return Ok(String::new());
    }
    let said =
        sides.iter().filter(|h| h.has_agent()).filter_map(|h| h.whimbrel(&["vm", "show", &flight.name]).ok());
    let waiting = said.filter_map(|vm| vm["waiting_for"].as_str().map(str::to_owned)).next();
    match waiting {
        Some(words) => Ok(format!("; without it: {words}")),
        None if case.victim == Victim::Metadata => Ok("; without it: nobody could say".to_owned()),
        None => bail!("the VM runs nowhere, and nobody says what it waits for"),
    }
}

/// Where it runs, once everything is back: exactly one place.
fn settle(flight: &Flight<'_>) -> Result<usize> {
    let end = Instant::now() + SETTLE_LIMIT;
    loop {
        let (running, _) = flight.heard_from();
        if let [at] = running.as_slice() {
            return Ok(*at);
        }
        ensure!(Instant::now() < end, "beats come from {} hosts after everything came back", running.len());
    }
}

/// Whether the move's command ended well; it is ended if it does not end by itself.
fn end_command(command: &mut Child) -> Result<bool> {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if let Some(status) = command.try_wait().context("wait for the move's command")? {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    command.kill().context("end the move's command")?;
    command.wait().context("wait for the move's command")?;
    Ok(false)
}

/// An agent that was just started answers before it has found its VMs again.
fn wait_picked_up(host: &Host, vm: &str) -> Result<()> {
    let end = Instant::now() + SETTLE_LIMIT;
    loop {
        if host.whimbrel(&["vm", "show", vm]).is_ok_and(|shown| shown["pid"].is_u64()) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the restarted agent of {} does not pick vm {vm} up", host.name());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod test {
    #[test]
    fn the_steps_of_the_handover_are_found() {
        let steps = super::steps().unwrap();
        assert!(steps.iter().any(|s| s == "commit"), "{steps:?}");
        assert_eq!(steps.first().map(String::as_str), Some("negotiate"));
    }
}
