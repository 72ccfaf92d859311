//! The command line of a QEMU that somebody else started, with what belongs to one host taken out.
//!
//! ```text
//!   argv at the first host ──► [ForeignArg] in records ──► argv at the next host: its own files, sockets and taps
//! ```
//!
//! Invariants
//! * What the guest can see (machine, devices, their order and addresses) is in [`ForeignArg::Words`], word for word.
//! * No path of the first host is left but those that every host must have at the same place (kernel, initrd).
//!
//! Rule for versions: fields are added with `#[serde(default)]`; an unknown variant refuses the record.
//!
//! Not here: taking a command line apart and putting it together (`whimbrel_host::guest::foreign`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// See the module's charter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForeignSpec {
    /// The arguments, in order.
    pub args: Vec<ForeignArg>,
    /// The RAM block that is a file from the first move on; none if there are several.
    #[serde(default)]
    pub ram_block: Option<String>,
    /// How each volume reaches QEMU, in the order of the VM's volumes.
    #[serde(default)]
    pub disks: Vec<ForeignDisk>,
}

/// One option of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForeignArg {
    /// The same words on every host.
    Words(Vec<String>),
    /// `-object` for RAM: its properties, `key=value,…` or JSON, without path and `share`.
    Ram(String),
    /// `-chardev` that listens on a socket in the VM's runtime directory.
    Socket {
        /// The chardev's id.
        id: String,
        /// The socket's name in the directory.
        file: String,
        /// Shared by several users (`mux=on`).
        #[serde(default)]
        mux: bool,
        /// It is the serial console.
        #[serde(default)]
        console: bool,
    },
    /// `-chardev` that writes a file in the VM's runtime directory.
    Log {
        /// The chardev's id.
        id: String,
        /// The file's name in the directory.
        file: String,
    },
    /// `-vnc`, on a socket in the VM's runtime directory.
    Screen,
    /// `-netdev tap`, on the bridge that the VM's network of this number names.
    Tap {
        /// Index into the VM's networks.
        net: u32,
        /// The netdev's id.
        id: String,
    },
    /// What connects the volume of this number.
    Disk(u32),
}

/// How a volume reaches an adopted QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForeignDisk {
    /// Over NBD, as block node `id`; or over vhost-user-blk, through chardev `id`.
    pub bus: ForeignBus,
    /// The node's or chardev's name.
    pub id: String,
    /// Number of queues of the device.
    pub queues: u16,
}

/// What an adopted QEMU and the agent speak over a disk's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForeignBus {
    /// NBD: any disk device of QEMU's.
    Nbd,
    /// vhost-user-blk.
    VhostUserBlk,
}
