//! Records of the metadata store: small, JSON, one key each; changed by compare-and-swap only.
//!
//! ```text
//! cluster                 ClusterRecord        made by `cluster init`
//! host/NAME               HostRecord           written by the host itself; removed = revoked
//! token/HASH              TokenRecord          a join token, hashed, until used or expired
//! image/NAME:TAG          ImageRecord          what a name means today
//! volume/NAME             VolumeRecord         with the right to write its layer
//! vm/NAME                 VmRecord             with the right to run it, and the move under way
//! holds/IMAGE_ID/HOST     HoldsRecord          coarse: this host's cache has blocks of that image
//! ```
//!
//! Invariants: a VM's right and its volumes' rights change in one transaction; epoch + 1 each time. Bulk state
//! (bitmaps, page versions, blocks) never goes here.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::foreign::ForeignSpec;
use crate::id::{AttemptId, DataId, DiskId, HostId, ImageId, ImageRef, Name, Right, VmId};

/// Keys, so that no other place spells them.
pub mod key {
    use crate::id::{ImageId, ImageRef, Name};

    /// The cluster's record.
    pub const CLUSTER: &str = "cluster";
    /// All hosts.
    pub const HOSTS: &str = "host/";
    /// All join tokens.
    pub const TOKENS: &str = "token/";
    /// All image names.
    pub const IMAGES: &str = "image/";
    /// All volumes.
    pub const VOLUMES: &str = "volume/";
    /// All virtual machines.
    pub const VMS: &str = "vm/";
    /// Who caches what.
    pub const HOLDS: &str = "holds/";

    /// A host's record.
    pub fn host(name: &Name) -> String {
        format!("{HOSTS}{name}")
    }
    /// A token's record, by the hash of its secret.
    pub fn token(hash_hex: &str) -> String {
        format!("{TOKENS}{hash_hex}")
    }
    /// An image name's record.
    pub fn image(image: &ImageRef) -> String {
        format!("{IMAGES}{image}")
    }
    /// A volume's record.
    pub fn volume(name: &Name) -> String {
        format!("{VOLUMES}{name}")
    }
    /// A VM's record.
    pub fn vm(name: &Name) -> String {
        format!("{VMS}{name}")
    }
    /// The records of all hosts that cache blocks of an image.
    pub fn holders(image: &ImageId) -> String {
        format!("{HOLDS}{image}/")
    }
    /// One host's record of an image it caches blocks of.
    pub fn holds(image: &ImageId, host: &Name) -> String {
        format!("{HOLDS}{image}/{host}")
    }
}

/// The cluster: made once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The cluster's name.
    pub name: Name,
    /// The certificate authority, PEM.
    pub ca_pem: String,
    /// Where images are published unless told otherwise.
    #[serde(default)]
    pub default_store_url: Option<String>,
}

/// A host, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// The host's name.
    pub name: HostId,
    /// `IP:PORT` of its peer port, best first.
    pub addresses: Vec<String>,
    /// Whether VMs may be moved to it.
    #[serde(default)]
    pub draining: bool,
    /// Removed from the cluster: none of its certificates is good any more.
    #[serde(default)]
    pub revoked: bool,
    /// How often a host of this name has joined; certificates of earlier generations are refused.
    #[serde(default)]
    pub generation: u64,
    /// When it last said that it lives, in seconds since 1970. A hint for people; nothing is decided by it.
    #[serde(default)]
    pub seen_s: u64,
    /// The program's version.
    #[serde(default)]
    pub version: String,
    /// Kernel release and QEMU version, for people and prechecks.
    #[serde(default)]
    pub platform: String,
    /// Tenants whose objects this host may read; an empty list means the default domain.
    #[serde(default)]
    pub domains: Vec<Name>,
    /// Of the file system with its volumes, when it was looked at last.
    #[serde(default)]
    pub space: Option<Space>,
}

/// Space of the file system that a host's volumes grow on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Space {
    /// All of it, bytes.
    pub total_bytes: u64,
    /// What volumes may still take, bytes.
    pub free_bytes: u64,
    /// Sizes of this host's volumes together, bytes: what their guests may write one day.
    pub promised_bytes: u64,
    /// How short it is.
    pub pressure: Pressure,
    /// Seconds until nothing is left, at the rate of late.
    pub full_in_s: Option<u64>,
}

/// How short of space a file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pressure {
    /// Nothing to do.
    #[default]
    Ample,
    /// To be looked after today.
    Low,
    /// To be looked after now.
    Critical,
    /// Guests that write wait.
    Full,
}

impl Pressure {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ample => "ample",
            Self::Low => "low",
            Self::Critical => "critical",
            Self::Full => "full",
        }
    }
}

/// A join token that has not been used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Role of the certificate it buys.
    pub role: crate::id::Role,
    /// Not good from this second since 1970 on.
    pub expires_s: u64,
}

/// What an image name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its name and tag.
    pub image: ImageRef,
    /// What it is.
    pub id: ImageId,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes of blocks that are stored for it (shared ones too), uncompressed.
    pub stored_bytes: u64,
    /// Where manifest and packs are.
    pub store_url: String,
    /// Tenant that may read it.
    #[serde(default)]
    pub domain: Option<Name>,
}

/// A volume: a chain whose top layer has one writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The volume's name.
    pub name: Name,
    /// Its writable layer.
    pub disk_id: DiskId,
    /// What a reader sees, as of the last detach or move; the layer's header is the truth while attached.
    pub data_id: DataId,
    /// Size of the disk, bytes: what it is to have. The layer follows, at the latest when it is opened.
    pub size_bytes: u64,
    /// The image under the layer, if any.
    #[serde(default)]
    pub image: Option<ImageParent>,
    /// Layers between the image and the writable one, the lowest first: snapshots, and what a clone was made from.
    #[serde(default)]
    pub layers: Vec<LayerRecord>,
    /// Who may write, and where the layer is.
    pub right: Right,
    /// The VM it is attached to.
    #[serde(default)]
    pub attached_to: Option<Name>,
    /// The host that still has blocks the holder has not fetched (`--disk on-demand`).
    #[serde(default)]
    pub depends_on: Option<HostId>,
    /// What its clients may have of it.
    #[serde(default)]
    pub limits: IoLimits,
}

/// What the clients of a volume may have of it together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IoLimits {
    /// Requests per second that read, write, discard or zero; no limit if none.
    #[serde(default)]
    pub iops: Option<u64>,
    /// Bytes per second that are read or written; no limit if none.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
}

/// A layer that nobody writes any more, under a volume's writable one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The layer.
    pub disk_id: DiskId,
    /// What its readers see; what lies on it holds a copy.
    pub data_id: DataId,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// The volume's snapshot of that state; none if another volume's, which this one was made from.
    #[serde(default)]
    pub snapshot: Option<Name>,
    /// When the snapshot was made, in seconds since 1970; for people.
    #[serde(default)]
    pub made_s: u64,
    /// Whether the guest's file systems were frozen when it was made.
    #[serde(default)]
    pub quiesced: bool,
    /// It is being removed: its blocks are on their way into a neighbour.
    #[serde(default)]
    pub removing: bool,
}

/// The image under a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageParent {
    /// Its name when the volume was made; for people.
    pub image: ImageRef,
    /// What it is.
    pub id: ImageId,
    /// Where manifest and packs are.
    pub store_url: String,
}

/// How a VM's memory is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Mode {
    /// The agents move RAM; QEMU's stream carries device state only.
    A,
    /// The agents carry QEMU's own stream.
    B,
}

/// What a VM does, as far as the cluster knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Being started.
    Starting,
    /// Running at the holder of its right.
    Running,
    /// Running at the holder of its right while it is copied to another host.
    Migrating,
    /// Stopped; its volumes are kept.
    Stopped,
    /// Its process ended by itself.
    Crashed,
    /// The holder paused it for a move and nobody can tell what happened: see `waiting_for`.
    NeedsOperator,
}

/// What it takes to start the same VM on another host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSpec {
    /// RAM, bytes.
    pub memory_bytes: u64,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// Volumes, in order of attachment; the first is the boot disk.
    pub volumes: Vec<Name>,
    /// Bridges, one interface each, with the MAC address of the interface.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// Kernel to boot, on every host's own file system.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<String>,
    /// Kernel command line.
    #[serde(default)]
    pub append: Option<String>,
    /// Machine type, versioned (`pc-q35-7.2`); settled when the VM is first started.
    #[serde(default)]
    pub machine: Option<String>,
    /// `tcg` or `kvm`; settled when the VM is first started.
    #[serde(default)]
    pub accel: Option<String>,
    /// Processor model.
    #[serde(default)]
    pub cpu: Option<String>,
    /// Further QEMU arguments. `{run}` stands for the VM's runtime directory on the host that runs it.
    #[serde(default)]
    pub qemu_args: Vec<String>,
    /// Taken over from somebody else: started from this command line, not from the fields above, which then only
    /// describe it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<ForeignSpec>,
}

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetSpec {
    /// Bridge on the host.
    pub bridge: String,
    /// MAC address, `52:54:00:…`.
    pub mac: String,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its name.
    pub name: Name,
    /// Who runs it.
    pub right: Right,
    /// What it does.
    pub state: VmState,
    /// How it was started.
    pub spec: VmSpec,
    /// The move under way: exactly one attempt may commit, and only while it stands here.
    #[serde(default)]
    pub attempt: Option<Attempt>,
    /// The attempt that gave the right to its holder (or back to it); none if the VM was started here or the
    /// operator placed it here. Tells a copy that is kept at an old host whether it is still the VM.
    #[serde(default)]
    pub came_by: Option<AttemptId>,
    /// What has to happen before it goes on, for people.
    #[serde(default)]
    pub waiting_for: Option<String>,
}

impl VmRecord {
    /// The VM's lasting identity.
    pub fn id(&self) -> Option<VmId> {
        match self.right.object {
            crate::id::Object::Memory(id) => Some(id),
            _ => None,
        }
    }
}

/// A move under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attempt {
    /// Which one.
    pub id: AttemptId,
    /// Where to.
    pub target: HostId,
}

/// This host's cache has verified blocks of an image. Which ones, the host itself tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldsRecord {
    /// How many blocks, roughly: written when it doubles and when all are there.
    pub blocks: u64,
}
