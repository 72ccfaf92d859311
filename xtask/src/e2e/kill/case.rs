//! One case: arm, move, strike, look, mend, verify.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::expect::{self, Is, Place};
use super::world::{Sides, World};
use super::{Case, Victim};
use crate::lab::Host;

/// Nothing is held up for longer than this before its step.
const REACH_LIMIT: Duration = Duration::from_secs(40);
/// A step that comes after the command has its answer comes this soon.
const AFTER_COMMAND: Duration = Duration::from_secs(3);
const BACK_AFTER: Duration = Duration::from_secs(2);
/// While something is gone for good, what is the case must be so for at least this long, ...
const WATCH: Duration = Duration::from_millis(3500);
/// ... and be found within this time: silence is reported to the operator after ten seconds.
const FIND_LIMIT: Duration = Duration::from_secs(20);
/// From the operator's word to the guest running.
const RECOVER_LIMIT: Duration = Duration::from_secs(15);
/// The store is killed so long after the copy has begun: its streams are open by then, and it is not over.
const INTO_COPY: Duration = Duration::from_millis(700);
/// What makes the copy last long enough for that.
const SLOW_COPY: [&str; 4] = ["--bandwidth", "100Mbit", "--downtime-limit", "3s"];

/// What came of a case.
pub(super) struct Verdict {
    place: Option<Place>,
    silent_ms: f64,
    back_ms: Option<f64>,
    without: Option<String>,
    not_entered: bool,
}

impl Verdict {
    /// For the table.
    pub(super) fn short(&self) -> String {
        let place = match self.place {
            Some(Place::Source) => "S",
            Some(Place::Target) => "T",
            None => "crashed",
        };
        if self.not_entered {
            format!("{place} (not entered)")
        } else {
            format!("{place} {:.0}", self.silent_ms)
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Some(Place::Source) => "runs at the source",
            Some(Place::Target) => "runs at the target",
            None => "crashed, and said so; its records are there",
        };
        if self.not_entered {
            return write!(f, "the step is not entered on that side; {place}");
        }
        write!(f, "{place}, silent for {:.0} ms", self.silent_ms)?;
        match self.back_ms {
            Some(ms) => write!(f, ", heard {ms:.0} ms after the strike")?,
            None => write!(f, ", not heard since the strike")?,
        }
        if let Some(words) = &self.without {
            write!(f, "; without it: {words}")?;
        }
        Ok(())
    }
}

pub(super) fn run(world: &mut World<'_>, case: &Case) -> Result<Verdict> {
    let sides = world.sides();
    let acked = world.flight.counter("disk_acked")?;
    let hold = world.dir().join(format!("hold-{}-{}", case.step, case.victim.side()));
    drop(fs::remove_dir_all(&hold));
    fs::create_dir_all(&hold).context("make the fail point's directory")?;
    let armed = if case.victim.side() == "source" { sides.source } else { sides.target };
    let marker = world.arm(case, armed, &hold)?;
    world.flight.receiver().restart_window();
    let mut command = start_move(world, case, sides)?;
    let reached = wait_for(&marker, &mut command);
    world.disarm()?;
    let without = if reached { strike(world, case, sides, &hold)? } else { None };
    // What follows, the coming back itself, may silence it once more; that is not what is measured.
    let silent_ms = world.flight.receiver().report().longest_gap_ms;
    world.mend()?;
    let moved = end_command(&mut command)?;
    let at = world.settle()?;
    let back_ms = world.flight.receiver().back_after().map(|d| d.as_secs_f64() * 1e3);
    let silent_ms = if case.comes_back { world.flight.receiver().report().longest_gap_ms } else { silent_ms };
    let not_entered = !reached;
    ensure!(reached || moved, "the step was not reached, and the move failed");
    verify(world, case, sides, at, acked)?;
    let place = at.map(|at| if at == sides.source { Place::Source } else { Place::Target });
    if reached && let Some(limit_ms) = expect::silence_limit_ms(case) {
        ensure!(silent_ms <= limit_ms, "silent for {silent_ms:.0} ms, at most {limit_ms:.0} are allowed");
    }
    Ok(Verdict { place, silent_ms, back_ms, without, not_entered })
}

fn start_move(world: &World<'_>, case: &Case, sides: Sides) -> Result<Child> {
    let (source, target) = (world.host(sides.source)?, world.host(sides.target)?);
    let mut args = vec!["vm", "migrate", &world.flight.name, "--to", target.name(), "--mode", case.mode];
    if slow_copy(case) {
        args.extend(SLOW_COPY);
    }
    source.cli(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("start the move")
}

/// The store fails while the copy is well under way: then the pause must wait for it.
fn slow_copy(case: &Case) -> bool {
    case.victim == Victim::Metadata && case.is(&["copy"])
}

/// Waits until the step is entered; whether it was.
fn wait_for(marker: &Path, command: &mut Child) -> bool {
    let end = Instant::now() + REACH_LIMIT;
    let mut ended_at = None;
    while Instant::now() < end {
        if marker.exists() {
            return true;
        }
        if ended_at.is_none() && matches!(command.try_wait(), Ok(Some(_))) {
            ended_at = Some(Instant::now());
        }
        if ended_at.is_some_and(|t| t.elapsed() > AFTER_COMMAND) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Strikes, lets the held side go on, and waits; what was the case without the victim, if it is gone for good.
fn strike(world: &World<'_>, case: &Case, sides: Sides, hold: &Path) -> Result<Option<String>> {
    let go: PathBuf = hold.join("go");
    let release = || fs::write(&go, "").context("let the move go on");
    if slow_copy(case) {
        release()?;
        std::thread::sleep(INTO_COPY);
    } else if case.victim == Victim::TargetQemu && case.is(&["prepare"]) {
        // Before that step there is none: killed as soon as it is there.
        release()?;
    }
    world.flight.receiver().mark();
    world.strike(case.victim, sides)?;
    release()?;
    if case.comes_back {
        std::thread::sleep(BACK_AFTER);
        return Ok(None);
    }
    let (is, words) = find(world, case, sides, &expect::without(case))?;
    if let Is::Operator(on) = is {
        operate(world, sides, on)?;
    }
    Ok(Some(words))
}

/// What is the case while something is gone for good, once it is what was expected.
fn find(world: &World<'_>, case: &Case, sides: Sides, expected: &[Is]) -> Result<(Is, String)> {
    let begun = Instant::now();
    loop {
        let (is, words) = look(world, case, sides)?;
        let found = is.filter(|is| expected.contains(is));
        if let Some(is) = found.filter(|_| begun.elapsed() > WATCH) {
            return Ok((is, words));
        }
        ensure!(begun.elapsed() < FIND_LIMIT, "gone for good, {expected:?} was expected: {words}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn look(world: &World<'_>, case: &Case, sides: Sides) -> Result<(Option<Is>, String)> {
    if let [at] = world.running_at()?.as_slice() {
        let heard = world.flight.receiver().back_after().is_some();
        if slow_copy(case) {
            // The guest runs; what matters is that the pause is due and waits for the store.
            let words = world.unfinished()?.join("; ");
            let waits = words.contains("it must answer before the guest is paused");
            return Ok(((heard && waits).then_some(Is::Source), words));
        }
        let (is, words) = if *at == sides.source {
            (Is::Source, "the source runs it")
        } else {
            (Is::Target, "the target runs it")
        };
        return Ok((heard.then_some(is), words.to_owned()));
    }
    if case.victim != Victim::Metadata {
        let record = world.record()?;
        let words = record["waiting_for"].as_str().unwrap_or_default().to_owned();
        let asks_for = |n: usize| -> Result<bool> {
            let recover = format!("vm recover {} --on {}", world.flight.name, world.host(n)?.name());
            Ok(words.ends_with(&recover))
        };
        match record["state"].as_str() {
            Some("crashed") => {
                return Ok((Some(Is::Crashed), "the record says that it has crashed".to_owned()));
            }
            Some("needs_operator") => {
                let on = if asks_for(sides.target)? {
                    Some(Place::Target)
                } else if asks_for(sides.source)? {
                    Some(Place::Source)
                } else {
                    None
                };
                return Ok((Some(Is::Operator(on)), words));
            }
            _ => {}
        }
    }
    let waiting = world.unfinished()?;
    let words = format!("runs nowhere; {}", waiting.join("; "));
    let store = waiting.iter().any(|task| task.contains("metadata store"));
    Ok((store.then_some(Is::Store), words))
}

/// The operator does what the record says.
fn operate(world: &World<'_>, sides: Sides, on: Option<Place>) -> Result<()> {
    let (on, lost) = match on {
        Some(Place::Source) => (sides.source, sides.target),
        Some(Place::Target) => (sides.target, sides.source),
        // The other host has to come back; taking over here is refused, and says so.
        None => return refused(world, world.host(sides.target)?),
    };
    world.fence(lost)?;
    let host = world.host(on)?;
    host.whimbrel(&["vm", "recover", &world.flight.name, "--on", host.name(), "--fenced"])?;
    let end = Instant::now() + RECOVER_LIMIT;
    while world.running_at()? != [on] {
        ensure!(Instant::now() < end, "vm recover --on {}: the guest does not run there", host.name());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn refused(world: &World<'_>, host: &Host) -> Result<()> {
    let args = ["vm", "recover", &world.flight.name, "--on", host.name(), "--fenced"];
    let Err(said) = host.whimbrel(&args) else {
        bail!("{} takes over what it has only a part of", host.name())
    };
    let said = format!("{said:#}");
    ensure!(said.contains("bring host"), "the refusal to recover does not say what to do: {said}");
    Ok(())
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

/// The guest is whole, with every record that was acknowledged before the case.
fn verify(world: &mut World<'_>, case: &Case, sides: Sides, at: Option<usize>, acked: u64) -> Result<()> {
    let may_crash = expect::without(case) == [Is::Crashed];
    let counter = match at {
        Some(at) => {
            world.flight.set_host(at)?;
            "disk_acked"
        }
        None if may_crash => {
            world.boot_again(sides.target)?;
            "disk_recovered"
        }
        None => bail!("the record says that the VM has crashed"),
    };
    let now = world.flight.counter(counter)?;
    ensure!(now >= acked, "{acked} records were acknowledged, {now} are there");
    world.flight.must_be_whole()
}
