//! A host's own record of a VM that it runs: what a restarted agent needs to find it again.
//!
//! One JSON file per VM, replaced by rename. Unknown fields are ignored; a higher [`LocalVm::VERSION`] is refused.
//!
//! Not here: who may run the VM: the metadata store knows (`crate::meta::VmRecord`).

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, Name, VmId};
use crate::meta::VmSpec;

/// See the module's charter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalVm {
    /// Version of this record.
    pub version: u32,
    /// The VM's name.
    pub name: Name,
    /// Its lasting identity.
    pub id: VmId,
    /// Epoch of the right under which it was started here.
    pub epoch: Epoch,
    /// How it was started.
    pub spec: VmSpec,
    /// Process id of its QEMU.
    pub pid: u32,
    /// When that process started, in clock ticks since boot: a pid alone may be somebody else's by now.
    pub start_time: u64,
    /// The boot during which it runs.
    pub boot_id: String,
    /// Its QMP socket.
    pub qmp: String,
    /// The file that is its RAM, if we made it; empty otherwise.
    pub ram_path: String,
    /// Waits for the device state of a move that has not been committed.
    #[serde(default)]
    pub incoming: bool,
    /// Sockets of its disks, in order, where they are not the usual ones of its runtime directory.
    #[serde(default)]
    pub disk_sockets: Vec<String>,
    /// Its serial console, where it is not the usual one of its runtime directory; empty if it has none.
    #[serde(default)]
    pub console: Option<String>,
    /// Being taken over: its disks may not be on their volumes yet.
    #[serde(default)]
    pub adopting: bool,
}

impl LocalVm {
    /// The version written by this release.
    pub const VERSION: u32 = 1;
}
