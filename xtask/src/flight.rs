//! One VM with the workload, from its start on one host through any number of moves: what demo, end-to-end tests
//! and benchmarks have in common.
//!
//! Invariant: what is measured is measured outside the guest, with sockets of all hosts listened to before the
//! first beat.
//!
//! Not here: hosts (`lab.rs`), verdicts (the callers').

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::beat::{Receiver, Report};
use crate::lab::{Host, Lab, VmArgs, has_taps};
use crate::status::{Status, counter};

/// From the start of a VM to its first beat, at most; machines that emulate beside a build are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// For the workload's first pass over its memory.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// A move that took longer has hung.
pub const MOVE_LIMIT: Duration = Duration::from_secs(180);
/// Between the move's command and the first beat at the target, after the command has ended.
const BEAT_LIMIT: Duration = Duration::from_secs(30);

/// A VM under way.
pub struct Flight<'a> {
    lab: &'a Lab,
    /// The VM's name.
    pub name: String,
    at: usize,
    receiver: Receiver,
    status: Status,
    /// From the command to the first beat.
    pub boot: Duration,
    /// The guest's address, if it has one.
    pub address: Option<String>,
}

/// One move.
#[derive(Debug)]
pub struct Move {
    /// From the command to the first beat at the target.
    pub total: Duration,
    /// The beat during the move.
    pub beat: Report,
    /// The task as the agent reported it.
    pub task: Value,
    /// Bytes that left the source host's interface.
    pub interface_bytes: u64,
}

impl Move {
    /// A number of the task.
    pub fn figure(&self, name: &str) -> Option<f64> {
        self.task.get(name)?.as_f64()
    }
}

impl<'a> Flight<'a> {
    /// Makes a volume over `image_name`, starts the VM on host `at`, and waits until its workload is at work.
    pub fn start(
        lab: &'a Lab,
        at: usize,
        name: &str,
        image_name: &str,
        memory_mib: u64,
        vcpus: u32,
        workload: &str,
    ) -> Result<Flight<'a>> {
        let host = lab.hosts().get(at).context("start a VM on a host of the lab")?;
        host.whimbrel(&["volume", "create", name, "--image", image_name])?;
        Flight::restart(lab, at, name, name, memory_mib, vcpus, workload)
    }

    /// The same with a volume that is there already.
    pub fn restart(
        lab: &'a Lab,
        at: usize,
        name: &str,
        volume: &str,
        memory_mib: u64,
        vcpus: u32,
        workload: &str,
    ) -> Result<Flight<'a>> {
        Flight::launch(lab, at, name, &[volume], memory_mib, vcpus, workload)
    }

    /// The same with any number of volumes, boot disk first.
    pub fn launch(
        lab: &'a Lab,
        at: usize,
        name: &str,
        volumes: &[&str],
        memory_mib: u64,
        vcpus: u32,
        workload: &str,
    ) -> Result<Flight<'a>> {
        let host = lab.hosts().get(at).context("start a VM on a host of the lab")?;
        let sockets: Vec<_> = lab.hosts().iter().map(|h| h.vm_sockets(name).beat).collect();
        let address = lab.guest_address();
        let net = has_taps();
        let workload = if net { format!("{workload} wg.ip={address}") } else { workload.to_owned() };
        let args = VmArgs { name, volumes, memory_mib, vcpus, workload: &workload, net };
        let started = Instant::now();
        host.run_vm(&args, &lab.image)?;
        let receiver = Receiver::on(&sockets);
        if !receiver.wait_for_beats(1, BOOT_LIMIT) {
            bail!(
                "vm {name} sent no beat within {BOOT_LIMIT:?}; its console ends with:\n{}",
                console(host, name)
            );
        }
        let boot = started.elapsed();
        let mut status = Status::connect(&host.vm_sockets(name).status, READY_LIMIT)?;
        status.wait_ready(READY_LIMIT).with_context(|| console(host, name))?;
        let address = net.then(|| address.split('/').next().unwrap_or_default().to_owned());
        Ok(Flight { lab, name: name.to_owned(), at, receiver, status, boot, address })
    }

    /// Starts the VM again on host `at`, from the volume of its own name, after its QEMU ended.
    pub fn boot_again(&mut self, at: usize, memory_mib: u64, vcpus: u32, workload: &str) -> Result<()> {
        self.at = at;
        let host = self.host()?;
        let net = self.address.is_some();
        let address = self.lab.guest_address();
        let workload = if net { format!("{workload} wg.ip={address}") } else { workload.to_owned() };
        let name = &self.name;
        let args = VmArgs { name, volumes: &[name], memory_mib, vcpus, workload: &workload, net };
        // A guest that starts anew counts anew.
        self.receiver.forget();
        host.run_vm(&args, &self.lab.image)?;
        if !self.receiver.wait_for_beats(1, BOOT_LIMIT) {
            bail!("vm {name} sent no beat within {BOOT_LIMIT:?}; {}", console(host, name));
        }
        self.status = Status::connect(&host.vm_sockets(name).status, READY_LIMIT)?;
        self.status.wait_ready(READY_LIMIT).with_context(|| console(host, name))?;
        self.address = net.then(|| address.split('/').next().unwrap_or_default().to_owned());
        Ok(())
    }

    /// A VM that was started by hand on host `at`, with its beat and status sockets; `beats` are those of all hosts.
    pub fn found(
        lab: &'a Lab,
        at: usize,
        name: &str,
        beats: &[std::path::PathBuf],
        status: &std::path::Path,
    ) -> Result<Flight<'a>> {
        let started = Instant::now();
        let receiver = Receiver::on(beats);
        if !receiver.wait_for_beats(1, BOOT_LIMIT) {
            bail!("vm {name} sent no beat within {BOOT_LIMIT:?}");
        }
        let boot = started.elapsed();
        let mut status = Status::connect(status, READY_LIMIT)?;
        status.wait_ready(READY_LIMIT)?;
        Ok(Flight { lab, name: name.to_owned(), at, receiver, status, boot, address: None })
    }

    /// The host it runs on.
    pub fn host(&self) -> Result<&'a Host> {
        self.lab.hosts().get(self.at).context("find the VM's host in the lab")
    }

    /// The lab it flies in.
    pub fn lab(&self) -> &'a Lab {
        self.lab
    }

    /// Index of that host.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The VM is known to run elsewhere now.
    pub fn set_host(&mut self, at: usize) -> Result<()> {
        self.at = at;
        self.status = Status::connect(&self.host()?.vm_sockets(&self.name).status, BEAT_LIMIT)?;
        Ok(())
    }

    /// The beat's receiver.
    pub fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    /// The workload's port.
    pub fn status(&mut self) -> &mut Status {
        &mut self.status
    }

    /// Which hosts its beats come from within the next second or so, and how many beats are old ones.
    pub fn heard_from(&self) -> (Vec<usize>, u64) {
        self.receiver.restart_window();
        std::thread::sleep(Duration::from_millis(1200));
        let report = self.receiver.report();
        let hosts = report.heard_from.iter().enumerate().filter(|(_, n)| **n > 0).map(|(at, _)| at);
        (hosts.collect(), report.repeated)
    }

    /// Moves it to host `to` and waits for its beat there.
    pub fn migrate(&mut self, to: usize, options: &[&str]) -> Result<Move> {
        let (from, target) = (self.host()?, self.lab.hosts().get(to).context("find the target in the lab")?);
        self.receiver.restart_window();
        let bytes_before = self.lab.bytes_out(from)?;
        let started = Instant::now();
        let args = [&["vm", "migrate", &self.name, "--to", target.name()], options].concat();
        let task = from.whimbrel(&args)?;
        let first = self.receiver.wait_for_source(to, BEAT_LIMIT);
        let first = first.with_context(|| {
            format!(
                "vm {} is silent at {}; its console there:\n{}",
                self.name,
                target.name(),
                console(target, &self.name)
            )
        })?;
        let interface_bytes = self.lab.bytes_out(from)? - bytes_before;
        // What goes wrong right after the switch-over belongs to the move too.
        std::thread::sleep(Duration::from_millis(300));
        let beat = self.receiver.report();
        self.set_host(to)?;
        Ok(Move { total: first.duration_since(started), beat, task, interface_bytes })
    }

    /// Lets the guest verify every page and every record; errors since its start.
    pub fn verify(&mut self) -> Result<u64> {
        self.status.command("verify-all", MOVE_LIMIT)
    }

    /// Counters of the guest, fresh.
    pub fn counter(&mut self, name: &str) -> Result<u64> {
        counter(&self.status.now()?, name)
    }

    /// Fails unless the guest found nothing wrong, with its own words.
    pub fn must_be_whole(&mut self) -> Result<()> {
        let errors = self.verify()?;
        if errors > 0 {
            let last = self.status.now()?;
            bail!("vm {}: {errors} integrity errors, the last one: {}", self.name, last["last_error"]);
        }
        Ok(())
    }

    /// Ends the VM.
    pub fn stop(self) -> Result<()> {
        let host = self.host()?;
        host.whimbrel(&["vm", "stop", &self.name, "--force"]).map(drop)
    }
}

/// The end of a VM's serial console on a host, for messages.
pub fn console(host: &Host, vm: &str) -> String {
    let sockets = host.vm_sockets(vm);
    let dir = sockets.beat.parent().map(std::path::Path::to_path_buf).unwrap_or_default();
    let end = |file: &str| crate::cmd::tail(&std::fs::read(dir.join(file)).unwrap_or_default(), 8);
    format!("console: {}\nqemu: {}\nagent: {}", end("console.log"), end("qemu.log"), host.log_tail())
}
