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

use std::path::PathBuf;

use whimbrel_wire::meta::Mode;

use crate::error::Result;
use crate::guest::dirty::RamMapping;
use crate::guest::process::QemuProcess;
use crate::guest::qmp::{Qmp, Version};

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
    /// Why nothing is possible, if so.
    pub refusals: Vec<String>,
    /// Every RAM block.
    pub ram: Vec<RamBlock>,
    /// Every disk.
    pub disks: Vec<Disk>,
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
    let _ = (qmp, process, facts);
    Err(crate::Error::new(crate::ErrorKind::Unsupported, "look at a running QEMU: not there yet"))
}

impl HostFacts {
    /// Tries what mode A needs on memory of this process.
    pub fn probe() -> Self {
        Self::default()
    }
}
