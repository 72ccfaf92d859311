//! The lab as the kill tests use it: who is whom, what is struck and mended, and what is the case.
//!
//! Invariant: whether a guest runs is asked of every QEMU itself, over a monitor of its own; what the agents believe
//! is compared with that, never taken for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Case, Victim};
use crate::cmd::{self, cmd};
use crate::e2e::{Context, IMAGE};
use crate::flight::Flight;
use crate::lab::{self, Host};
use crate::qmp::Qmp;

const WORKLOAD: &str = "wg.mem_mib=24 wg.mem_rate=20 wg.disk=/data/records wg.disk_rate=200";
const MEMORY_MIB: u64 = 128;
/// From everything being back to the VM running, its record right and all moves over.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// A QEMU answers its monitor within this time, or has ended.
const QMP_LIMIT: Duration = Duration::from_secs(2);
/// How long connections are reset: both sides say something twice a second.
const RESET_FOR: Duration = Duration::from_millis(700);

/// See the module's charter.
pub(super) struct World<'a> {
    c: &'a Context<'a>,
    mode: &'static str,
    pub(super) flight: Flight<'a>,
    booted: usize,
}

/// One move's hosts: indices in the lab.
#[derive(Clone, Copy)]
pub(super) struct Sides {
    pub(super) source: usize,
    pub(super) target: usize,
}

/// The host that keeps the metadata.
pub(super) const KEEPER: usize = 0;
const MOVERS: [usize; 2] = [1, 2];

impl<'a> World<'a> {
    pub(super) fn new(c: &'a Context<'a>, mode: &'static str) -> Result<World<'a>> {
        for n in MOVERS {
            let host = c.lab.hosts().get(n).context("find a host of the lab")?;
            host.kill_agent()?;
            start_agent(c, host)?;
        }
        Ok(World { c, mode, flight: boot(c, mode, 1)?, booted: 1 })
    }

    pub(super) fn host(&self, n: usize) -> Result<&'a Host> {
        self.c.lab.hosts().get(n).context("find a host of the lab")
    }

    pub(super) fn sides(&self) -> Sides {
        Sides { source: self.flight.at(), target: 3 - self.flight.at() }
    }

    pub(super) fn dir(&self) -> &Path {
        self.c.lab.dir()
    }

    pub(super) fn has_mode_a(&self) -> Result<bool> {
        let shown = self.flight.host()?.whimbrel(&["vm", "show", &self.flight.name])?;
        Ok(shown["mode"].as_str().is_some_and(|mode| mode.eq_ignore_ascii_case("a")))
    }

    /// Ends the VM; the agents go on without fail points.
    pub(super) fn leave(self) -> Result<()> {
        let c = self.c;
        self.flight.stop()?;
        for n in MOVERS {
            let host = c.lab.hosts().get(n).context("find a host of the lab")?;
            host.kill_agent()?;
            host.start_agent(c.program)?;
        }
        Ok(())
    }

    /// The ends of the agents' logs, for a case that went wrong.
    pub(super) fn tell(&self) {
        for host in self.c.lab.hosts() {
            eprintln!("── {} says last:\n{}", host.name(), host.log_tail());
        }
    }

    /// After a case that went wrong: another VM, so that the next case says something of its own.
    pub(super) fn anew(&mut self) -> Result<()> {
        self.mend()?;
        for host in self.c.lab.hosts() {
            drop(host.whimbrel(&["vm", "stop", &self.flight.name, "--force"]));
        }
        for pid in lab::processes_with(&format!("/vms/{}/", self.flight.name))? {
            kill(pid)?;
        }
        self.booted += 1;
        self.flight = boot(self.c, self.mode, self.booted)?;
        Ok(())
    }

    /// After QEMU died under the guest: the same VM from the same volume.
    pub(super) fn boot_again(&mut self, at: usize) -> Result<()> {
        self.flight.boot_again(at, MEMORY_MIB, 1, WORKLOAD)
    }

    // ---- striking and mending -----------------------------------------------------------------------------------

    /// Has the agent of `side` held at the step of the case; where it will say so.
    pub(super) fn arm(&self, case: &Case, at: usize, hold: &Path) -> Result<PathBuf> {
        let point = format!("{}:{}:hold={}", case.victim.side(), case.step, hold.display());
        let path = fail_point(self.host(at)?);
        // Renamed into place: an agent must not read half of it.
        let fresh = path.with_extension("new");
        fs::write(&fresh, point).context("arm a fail point")?;
        fs::rename(&fresh, &path).context("arm a fail point")?;
        Ok(hold.join(format!("{}-{}", case.victim.side(), case.step)))
    }

    pub(super) fn disarm(&self) -> Result<()> {
        for n in MOVERS {
            fs::write(fail_point(self.host(n)?), "").context("disarm a fail point")?;
        }
        Ok(())
    }

    pub(super) fn strike(&self, victim: Victim, sides: Sides) -> Result<()> {
        let (source, target) = (self.host(sides.source)?, self.host(sides.target)?);
        match victim {
            Victim::SourceAgent => source.kill_agent(),
            Victim::TargetAgent => target.kill_agent(),
            Victim::Metadata => self.host(KEEPER)?.kill_agent(),
            Victim::Connection => self.c.lab.set_cut(source, target, true),
            Victim::SourceNetwork => source.set_network(false),
            Victim::TargetQemu => self.kill_qemu(sides.target),
            Victim::Reset => {
                let pairs = [(source, target), (target, source)];
                pairs.iter().try_for_each(|(a, b)| a.reset_connections(b, true))?;
                std::thread::sleep(RESET_FOR);
                pairs.iter().try_for_each(|(a, b)| a.reset_connections(b, false))
            }
        }
    }

    /// Kills the VM's QEMU on a host, as soon as there is one.
    pub(super) fn kill_qemu(&self, at: usize) -> Result<()> {
        let needle = self.host(at)?.vm_sockets(&self.flight.name).beat;
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            match lab::process_with(&needle.to_string_lossy()) {
                Ok(pid) => return kill(pid),
                Err(e) if Instant::now() > end => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The operator makes sure that a host runs nothing any more.
    pub(super) fn fence(&self, at: usize) -> Result<()> {
        let host = self.host(at)?;
        host.kill_agent()?;
        let needle = host.vm_sockets(&self.flight.name).beat;
        lab::processes_with(&needle.to_string_lossy())?.into_iter().try_for_each(kill)
    }

    /// Everything that was struck works again.
    pub(super) fn mend(&self) -> Result<()> {
        self.disarm()?;
        self.c.lab.set_cut(self.host(MOVERS[0])?, self.host(MOVERS[1])?, false)?;
        for n in [KEEPER, MOVERS[0], MOVERS[1]] {
            let host = self.host(n)?;
            host.set_network(true)?;
            if !host.has_agent() || host.wait_agent_end(Duration::ZERO) {
                start_agent(self.c, host)?;
            }
        }
        Ok(())
    }

    // ---- what is the case ---------------------------------------------------------------------------------------

    /// The hosts whose QEMU executes the guest, as QEMU itself says.
    pub(super) fn running_at(&self) -> Result<Vec<usize>> {
        let mut running = Vec::new();
        for n in MOVERS {
            let sockets = self.host(n)?.vm_sockets(&self.flight.name);
            // None: it never was there, or is ending just now.
            if lab::process_with(&sockets.beat.to_string_lossy()).is_err() {
                continue;
            }
            let asked =
                Qmp::connect(&sockets.qmp, QMP_LIMIT).and_then(|mut q| q.execute("query-status", json!({})));
            if asked.is_ok_and(|said| said["running"] == true) {
                running.push(n);
            }
        }
        ensure!(running.len() <= 1, "the guest runs at {} hosts at once", running.len());
        Ok(running)
    }

    /// The VM as the cluster knows it; asked where the store is.
    pub(super) fn record(&self) -> Result<Value> {
        self.host(KEEPER)?.whimbrel(&["vm", "show", &self.flight.name])
    }

    /// What unfinished tasks of this VM wait for, on agents that live.
    pub(super) fn unfinished(&self) -> Result<Vec<String>> {
        let mut waiting = Vec::new();
        for n in MOVERS {
            let host = self.host(n)?;
            if !host.has_agent() {
                continue;
            }
            let tasks = host.whimbrel(&["task", "list"])?;
            let object = format!("vm {}", self.flight.name);
            let open = tasks.as_array().into_iter().flatten().filter(|task| {
                task["object"] == object
                    && !["done", "failed", "cancelled"].iter().any(|s| task["state"] == *s)
            });
            waiting.extend(open.map(|task| {
                let step = task["phase"].as_str().unwrap_or_default();
                format!("{} in {step}: {}", host.name(), task["waiting_for"].as_str().unwrap_or("busy"))
            }));
        }
        Ok(waiting)
    }

    /// Waits until the VM runs in one place, its record says so, no move of it is open, and nothing of it is
    /// anywhere else; or until its record says that it has crashed. Where it runs.
    pub(super) fn settle(&self) -> Result<Option<usize>> {
        let end = Instant::now() + SETTLE_LIMIT;
        loop {
            let missing = match self.settled()? {
                Ok(at) => return Ok(at),
                Err(missing) => missing,
            };
            if Instant::now() > end {
                bail!("not in order {SETTLE_LIMIT:?} after everything came back: {missing}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What is not yet as it should be.
    fn settled(&self) -> Result<std::result::Result<Option<usize>, String>> {
        let running = self.running_at()?;
        let processes = lab::processes_with(&format!("/vms/{}/", self.flight.name))?.len();
        let open = self.unfinished()?;
        if !open.is_empty() {
            return Ok(Err(format!("a move is open: {}", open.join("; "))));
        }
        let record = match self.record() {
            Ok(record) => record,
            Err(e) => return Ok(Err(format!("{e:#}"))),
        };
        let (state, holder) = (record["state"].as_str(), record["host"].as_str());
        match running.as_slice() {
            [] if state == Some("crashed") && processes == 0 => Ok(Ok(None)),
            [at] if state == Some("running") && holder == Some(self.host(*at)?.name()) && processes == 1 => {
                Ok(Ok(Some(*at)))
            }
            _ => Ok(Err(format!(
                "runs at {running:?} in {processes} processes; the record says {state:?} at {holder:?}"
            ))),
        }
    }
}

fn boot<'a>(c: &'a Context<'_>, mode: &str, number: usize) -> Result<Flight<'a>> {
    let name = format!("victim-{mode}{number}");
    Flight::start(c.lab, MOVERS[0], &name, IMAGE, MEMORY_MIB, 1, WORKLOAD)
}

fn fail_point(host: &Host) -> PathBuf {
    host.dir().join("failpoint")
}

fn start_agent(c: &Context<'_>, host: &Host) -> Result<()> {
    let point = format!("file={}", fail_point(host).display());
    host.start_agent_with(c.program, &[("WHIMBREL_FAILPOINT", &point)])
}

fn kill(pid: u32) -> Result<()> {
    // One that has just ended by itself is as dead.
    cmd::output(&mut cmd("kill", &["-KILL", &pid.to_string()])).map(drop)
}
