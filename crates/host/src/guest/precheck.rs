//! May this QEMU be moved, and how? Every RAM block is accounted for; what is missing is said in words.
//!
//! ```text
//!   HostFacts (probed once) ─┐
//!   QMP, /proc/PID ──────────┴─▶ Report: mode A, or why not; mode B, or why not even that
//! ```
//!
//! Invariants
//! * Mode A only if each RAM block is either a file that we move, or proven to be in QEMU's own stream.
//! * A reason names the block, device or disk, and says what would have to change.
//!
//! Not here: carrying out the move (`migrate`).

mod devices;
mod nodes;
mod ram;
mod sharers;

use std::fs::File;
use std::path::PathBuf;

use serde_json::{Value, json};
use whimbrel_wire::meta::Mode;

use crate::error::{Context, Result};
use crate::guest::dirty::RamMapping;
use crate::guest::inject;
use crate::guest::proc_fs;
use crate::guest::process::QemuProcess;
use crate::guest::qmp::{Qmp, Version, text_at};
use crate::guest::uffd;

/// What holds for every VM of this host. Probing takes some milliseconds; do it once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Why writes cannot be tracked from outside, found by trying on memory of our own; `None` if they can.
    pub tracking_missing: Option<String>,
    /// Sockets of the agent's own disk servers.
    pub disk_sockets: Vec<PathBuf>,
}

/// Who carries a RAM block to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovedBy {
    /// The agents, page by page.
    Us,
    /// QEMU's own stream, with the device state.
    QemuStream,
    /// Nobody: QEMU leaves it out, and it is no file of ours.
    Nobody,
}

/// A block of a VM's RAM, ROM or device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name: `ram`, `pc.bios`, `/rom@etc/acpi/tables`.
    pub name: String,
    /// The file it is, if it is one.
    pub path: Option<PathBuf>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Size of its pages, bytes.
    pub page_size_bytes: u64,
    /// Where QEMU has the file mapped, if it is one.
    pub mappings: Vec<RamMapping>,
    /// See [`MovedBy`].
    pub moved_by: MovedBy,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// QEMU's device or block node: `disk0`, `#block123`.
    pub id: String,
    /// Its file or socket, as QEMU names it.
    pub source: String,
    /// Served by this agent.
    pub ours: bool,
    /// Opened with O_DIRECT, past the page tables.
    pub direct: bool,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The best mode; `None` if the VM cannot be moved: see `refusals`.
    pub mode: Option<Mode>,
    /// Why mode A is not possible, if it is not.
    pub mode_a_reasons: Vec<String>,
    /// Why mode B is not possible, if it is not.
    pub mode_b_reasons: Vec<String>,
    /// Why nothing is possible, if so.
    pub refusals: Vec<String>,
    /// Every RAM block.
    pub ram: Vec<RamBlock>,
    /// Every disk.
    pub disks: Vec<Disk>,
    /// Files and devices whose transfers go past the page tables until they have ended: mode A has to let QEMU's disks
    /// drain (`guest::drain`) before it reads what a scan reported. Empty for most VMs, which then pay nothing.
    pub direct_io: Vec<String>,
    /// Machine type, versioned.
    pub machine: String,
    /// Processor model.
    pub cpu: String,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// `tcg` or `kvm`.
    pub accel: String,
    /// QEMU's version.
    pub qemu_version: Version,
}

impl Report {
    /// Bytes of RAM that the guest was given (blocks that we move).
    pub fn memory_bytes(&self) -> u64 {
        self.ram.iter().filter(|block| block.moved_by == MovedBy::Us).map(|block| block.size_bytes).sum()
    }
}

/// Looks at a running QEMU. Changes nothing.
pub async fn precheck(qmp: &Qmp, process: &QemuProcess, facts: &HostFacts) -> Result<Report> {
    look(qmp, process, facts).await.with_context(|| format!("look at QEMU, process {}", process.pid()))
}

async fn look(qmp: &Qmp, process: &QemuProcess, facts: &HostFacts) -> Result<Report> {
    let mut found = Findings::default();
    found.mode_a.extend(facts.tracking_missing.clone());
    found.look_at_process(process)?;
    found.look_at_migration(qmp).await?;
    let ram = ram::blocks(qmp, process.pid(), &mut found).await?;
    let disks = devices::disks(qmp, facts, &mut found).await?;
    let mut direct_io = nodes::direct_io(qmp, &mut found).await?;
    direct_io.extend(devices::others(qmp, &mut found).await?);
    sharers::others(process.pid(), &ram, &mut found)?;
    let cpus: Vec<Value> = qmp.execute("query-cpus-fast", json!({})).await?;
    let first = cpus.first().map(|cpu| text_at(cpu, "qom-path", "query-cpus-fast")).transpose()?;
    let cpu = match first {
        Some(path) => property(qmp, &path, "type").await?.replace("-x86_64-cpu", ""),
        None => String::new(),
    };
    let kvm: Value = qmp.execute("query-kvm", json!({})).await?;
    let accel = if kvm.get("enabled") == Some(&Value::Bool(true)) { "kvm" } else { "tcg" };
    found.mode_b.extend(ram::lost_by_stream(&ram, accel, qmp.version()));
    if found.refusals.is_empty() && !found.mode_a.is_empty() {
        found.refusals.extend(found.mode_b.iter().map(|reason| format!("mode B: {reason}")));
    }
    let mode = match (found.refusals.is_empty(), found.mode_a.is_empty()) {
        (false, _) => None,
        (true, true) => Some(Mode::A),
        (true, false) => Some(Mode::B),
    };
    if mode.is_none() && !found.mode_b.is_empty() {
        // Both ways are closed: all reasons count.
        found.refusals.extend(found.mode_a.iter().map(|reason| format!("mode A: {reason}")));
    }
    Ok(Report {
        mode,
        mode_a_reasons: found.mode_a,
        mode_b_reasons: found.mode_b,
        refusals: found.refusals,
        ram,
        disks,
        direct_io,
        machine: property(qmp, "/machine", "type").await?.trim_end_matches("-machine").to_owned(),
        cpu,
        vcpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        accel: accel.to_owned(),
        qemu_version: qmp.version(),
    })
}

/// Name and size of every RAM block that QEMU has now: what is added to a running VM shows here.
pub async fn ram_sizes(qmp: &Qmp) -> Result<Vec<(String, u64)>> {
    ram::sizes(qmp).await
}

/// The files that are a QEMU's RAM.
pub async fn ram_files(qmp: &Qmp) -> Result<Vec<PathBuf>> {
    ram::files(qmp).await
}

/// A text property of an object of QEMU's.
async fn property(qmp: &Qmp, path: &str, name: &str) -> Result<String> {
    qmp.execute("qom-get", json!({ "path": path, "property": name })).await
}

/// The children of an object: name and type.
pub(super) async fn children(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>> {
    let list: Vec<Value> = qmp.execute("qom-list", json!({ "path": path })).await?;
    let child = |one: &Value| {
        let kind = one.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((one.get("name")?.as_str()?.to_owned(), kind.to_owned()))
    };
    Ok(list.iter().filter_map(child).collect())
}

/// What speaks against a move, as it is found.
#[derive(Default)]
struct Findings {
    mode_a: Vec<String>,
    mode_b: Vec<String>,
    refusals: Vec<String>,
}

impl Findings {
    /// May its threads be stopped, so that a userfaultfd can be made in it?
    fn look_at_process(&mut self, process: &QemuProcess) -> Result<()> {
        let pid = process.pid();
        let tracer = proc_fs::status(pid, "TracerPid")?;
        if tracer != "0" {
            self.mode_a.push(format!("process {tracer} traces this QEMU: end that debugger"));
        }
        // Opening it takes the very right that ptrace takes.
        if let Err(error) = File::open(format!("/proc/{pid}/mem")) {
            self.mode_a.push(format!(
                "no right to trace process {pid} ({error}): run the agent as root or with CAP_SYS_PTRACE"
            ));
        }
        if proc_fs::status(pid, "Seccomp")? != "0" && !inject::may_ask_filters()? && !inject::device_opens() {
            self.mode_a.push(
                "whether QEMU's seccomp filter lets userfaultfd through cannot be asked without CAP_SYS_ADMIN, and \
                 /dev/userfaultfd cannot be opened: run the agent as root, outside of user namespaces"
                    .to_owned(),
            );
        }
        Ok(())
    }

    async fn look_at_migration(&mut self, qmp: &Qmp) -> Result<()> {
        let info: Value = qmp.execute("query-migrate", json!({})).await?;
        let blocked = info.get("blocked-reasons").and_then(Value::as_array);
        for reason in blocked.into_iter().flatten().filter_map(Value::as_str) {
            self.refusals.push(format!("QEMU cannot save this VM's devices: {reason}"));
        }
        if let Some(
            status @ ("setup" | "active" | "postcopy-active" | "pre-switchover" | "device" | "colo"),
        ) = info.get("status").and_then(Value::as_str)
        {
            self.refusals
                .push(format!("a migration that somebody else started is {status}: wait, or cancel it"));
        }
        let known: Vec<Value> = qmp.execute("query-migrate-capabilities", json!({})).await?;
        let names = known.iter().filter_map(|one| one.get("capability").and_then(Value::as_str));
        if !names.into_iter().any(|name| name == "x-ignore-shared") {
            self.mode_a.push(format!("QEMU {} has no capability x-ignore-shared", qmp.version()));
        }
        Ok(())
    }
}

impl HostFacts {
    /// Tries what mode A needs on memory of this process.
    pub fn probe() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let words = |error: std::io::Error| {
            format!(
                "writes cannot be tracked from outside on this host (Linux {release}): {error}; it takes Linux 6.7 \
                 or later and the right to userfaultfd"
            )
        };
        Self { tracking_missing: uffd::probe_tracking().err().map(words), disk_sockets: Vec::new() }
    }
}
