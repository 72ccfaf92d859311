//! The HTTP API's types: JSON over the agent's unix socket, and over TLS with a client certificate.
//!
//! Field names are a contract (see the interface): add, never rename. Times are seconds since 1970.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::WireError;
use crate::id::{DataId, DiskId, HostId, ImageId, ImageRef, Name, Role, SnapshotRef};
use crate::meta::{IoLimits, Mode, Space, VmSpec, VmState};

/// A virtual machine, as `vm list` and `vm show` print it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    pub name: Name,
    /// The host that holds the right to run it.
    pub host: HostId,
    /// What it does.
    pub state: VmState,
    /// Epoch of the right.
    pub epoch: u64,
    /// How its memory would be moved (null when not running here, where nobody has looked).
    pub mode: Option<Mode>,
    /// RAM, bytes.
    pub memory_bytes: u64,
    /// Its boot volume.
    pub volume: Option<Name>,
    /// All its volumes.
    pub volumes: Vec<Name>,
    /// What has to happen before it goes on.
    pub waiting_for: Option<String>,
    /// Why mode A is not possible, if it is not.
    #[serde(default)]
    pub mode_reasons: Vec<String>,
    /// Process id of QEMU, where it runs here.
    #[serde(default)]
    pub pid: Option<u32>,
}

/// Start a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmRun {
    /// Its name.
    pub name: Name,
    /// How to start it.
    pub spec: VmSpec,
}

/// Take over a running QEMU. Local socket only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmAdopt {
    /// The name it gets.
    pub name: Name,
    /// Its QMP socket.
    pub qmp: String,
}

/// Whether memory may follow after the switch-over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PostCopy {
    /// When the guest dirties memory faster than it can be sent.
    #[default]
    Auto,
    /// Never.
    Never,
    /// At once.
    Now,
}

/// When the writable layer is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskMove {
    /// Before the switch-over.
    #[default]
    Copy,
    /// After it, as blocks are asked for and in the background.
    OnDemand,
}

/// What makes pages of memory shorter in mode A, beyond compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryTechnique {
    /// A page that is sent again travels as what changed.
    Delta,
    /// A page that equals one that was sent is named.
    SamePages,
    /// A page that equals the block of an image that it was read from is named.
    DiskBlocks,
}

/// Move a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmMigrate {
    /// Where to.
    pub to: HostId,
    /// The longest pause aimed at, milliseconds.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// Most bytes per second on the wire.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
    /// See [`PostCopy`].
    #[serde(default)]
    pub post_copy: PostCopy,
    /// See [`DiskMove`].
    #[serde(default)]
    pub disk: DiskMove,
    /// Force a mode; the best one otherwise.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// Hash all RAM at the pause on both sides and compare.
    #[serde(default)]
    pub verify: bool,
    /// Not to be used for this move; more may be switched off in the hosts' configurations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<MemoryTechnique>,
}

/// What a task is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Move a VM.
    Migrate,
    /// Publish an image.
    Publish,
    /// Fetch a whole image into the cache.
    Prefetch,
    /// Check an image against its hashes.
    Verify,
    /// Write an image or volume to a file.
    Export,
    /// Fill a volume from a file.
    Import,
    /// Take over a running QEMU, its disks mirrored into volumes.
    Adopt,
    /// Remove a snapshot: its blocks go into a neighbour in the chain.
    Merge,
    /// Move the rest of a layer after a switch-over.
    LayerPull,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Under way.
    Running,
    /// Waits for something: see `waiting_for`.
    Waiting,
    /// Done.
    Done,
    /// Failed: see `error`.
    Failed,
    /// Cancelled, and undone.
    Cancelled,
}

impl TaskState {
    /// Nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// Long work.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Number, unique on its host.
    pub id: u64,
    /// What it is about.
    pub kind: TaskKind,
    /// What it works on: "vm web-1".
    pub object: String,
    /// The step it is in.
    pub phase: String,
    /// Where it stands.
    pub state: TaskState,
    /// Bytes dealt with so far.
    pub done_bytes: u64,
    /// Bytes to deal with, as far as known.
    pub total_bytes: u64,
    /// Recent speed.
    pub rate_bytes_s: u64,
    /// Time left, as far as known.
    pub eta_s: Option<u64>,
    /// How long the VM stood still, once known.
    pub downtime_ms: Option<f64>,
    /// Bytes sent to other hosts.
    pub wire_bytes: u64,
    /// What it waits for or depends on.
    pub waiting_for: Option<String>,
    /// Why it failed.
    pub error: Option<WireError>,
    /// What people should know about it: decisions taken, things left behind.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Further figures by name (rounds, pages, compressed bytes, …).
    #[serde(default)]
    pub figures: std::collections::BTreeMap<String, f64>,
}

/// Changes the limit of a task that runs.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskLimit {
    /// The most that it may send from now on, bytes per second; without it, no limit.
    #[serde(default)]
    pub bandwidth_bytes_s: Option<u64>,
}

/// Bytes read, by where they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReadBytes {
    /// The volume's own layer.
    pub layer: u64,
    /// This host's cache.
    pub cache: u64,
    /// Other hosts' caches.
    pub peer: u64,
    /// The seed store.
    pub seed: u64,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// `NAME:TAG`.
    pub name: ImageRef,
    /// What it is.
    pub id: ImageId,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Bytes of its blocks, holes and zeros not counted.
    pub stored_bytes: u64,
    /// Bytes of them in this host's cache.
    pub cached_bytes: u64,
    /// Bytes read on this host since the agent started.
    pub read_bytes: ReadBytes,
    /// Where it is stored.
    pub store_url: String,
}

/// Publish a file. Local socket only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImagePublish {
    /// The file.
    pub file: String,
    /// Its format: raw, qcow2, vhdx, vmdk. Taken from the extension if not given, never from the content.
    #[serde(default)]
    pub format: Option<String>,
    /// The name it gets.
    pub image: ImageRef,
    /// Where to; the cluster's default store otherwise.
    #[serde(default)]
    pub store_url: Option<String>,
}

/// Result of checking an image against its hashes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageVerify {
    /// Blocks looked at.
    pub checked_blocks: u64,
    /// Blocks that are damaged or missing, with where.
    pub bad_blocks: Vec<String>,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: Name,
    /// Its writable layer.
    pub disk_id: DiskId,
    /// What a reader sees.
    pub data_id: DataId,
    /// Size of the disk.
    pub size_bytes: u64,
    /// The image under it.
    pub parent: Option<ImageRef>,
    /// The host that may write it.
    pub holder: HostId,
    /// Epoch of the right.
    pub epoch: u64,
    /// The VM it is attached to.
    pub attached_to: Option<Name>,
    /// The host that still has blocks which the holder has not fetched.
    #[serde(default)]
    pub depends_on: Option<HostId>,
    /// Bytes the layer takes on disk, where it is here.
    #[serde(default)]
    pub layer_bytes: Option<u64>,
    /// Socket or file it is shown on, or `nbds://IP:PORT/NAME`, while attached.
    #[serde(default)]
    pub exports: Vec<String>,
    /// The layers under the writable one, the newest first: snapshots, and what a clone was made from.
    #[serde(default)]
    pub chain: Vec<VolumeLayer>,
    /// What its clients may have of it.
    #[serde(default)]
    pub limits: IoLimits,
}

/// A layer under a volume's writable one.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeLayer {
    /// The layer.
    pub disk_id: DiskId,
    /// What its readers see.
    pub data_id: DataId,
    /// Size of the disk.
    pub size_bytes: u64,
    /// The volume's snapshot of that state; none if another volume's, which this one was made from.
    pub snapshot: Option<Name>,
    /// When the snapshot was made, in seconds since 1970.
    pub made_s: u64,
    /// Whether the guest's file systems were frozen when it was made.
    pub quiesced: bool,
    /// It is being removed.
    pub removing: bool,
    /// Bytes it takes on disk, where it is here.
    #[serde(default)]
    pub layer_bytes: Option<u64>,
}

/// Make a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeCreate {
    /// Its name.
    pub name: Name,
    /// The image under it, or…
    #[serde(default)]
    pub image: Option<ImageRef>,
    /// …the size of an empty disk (with an image: grow to this size), or…
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// …the snapshot of another volume that it goes on from: `VOLUME@SNAPSHOT`.
    #[serde(default)]
    pub from: Option<SnapshotRef>,
}

/// Take a snapshot of a volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VolumeSnapshot {
    /// Its name; `snap-N` if none is given.
    #[serde(default)]
    pub name: Option<Name>,
    /// Do not ask the guest to freeze its file systems.
    #[serde(default)]
    pub no_quiesce: bool,
}

/// Make a volume larger, while it is in use.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeResize {
    /// Size of the disk from then on; rounded up to 512 bytes, not smaller than it is.
    pub size_bytes: u64,
}

/// Say that a layer's parent is what it is now.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VolumeRelink {
    /// The operator has seen that the parent's content is not what the layer was made over, and wants it.
    #[serde(default)]
    pub accept_changed_parent: bool,
}

/// How to attach a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeAttach {
    /// `vhost-user-blk`, `nbd` or `fuse`.
    pub export: String,
    /// `IP:PORT` to listen on instead of a socket, with TLS (`nbd` only); port 0: one that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Whether clients may only read (not over `vhost-user-blk`).
    #[serde(default)]
    pub read_only: bool,
}

/// A host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its name.
    pub name: HostId,
    /// Role of its certificate.
    pub role: Role,
    /// `alive`, `silent`, `draining` or `removed`.
    pub state: String,
    /// `IP:PORT` of its peer port.
    pub addresses: Vec<String>,
    /// Program version.
    pub version: String,
    /// Kernel and QEMU.
    pub platform: String,
    /// Of the file system with its volumes; not there before the host has looked.
    pub space: Option<Space>,
}

/// A join token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// The text to hand over; shown once.
    pub token: String,
    /// Not good from this second since 1970 on.
    pub expires_s: u64,
}

/// What `host join` needs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HostJoin {
    /// `IP:PORT` of a member.
    pub address: String,
    /// From `cluster token`.
    pub token: String,
}

/// The answer to a request that starts long work.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskStarted {
    /// The task's number on that host.
    pub task: u64,
    /// The host that does the work.
    pub host: HostId,
}

/// The connections to another host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Link {
    /// The other host.
    pub host: HostId,
    /// `up`, `silent` or `down`.
    pub state: String,
    /// `IP:PORT` of the other end.
    pub address: String,
    /// Milliseconds since the other end was last heard.
    pub silent_ms: Option<u64>,
    /// Bytes sent since the agent started.
    pub sent_bytes: u64,
    /// Bytes received since the agent started.
    pub received_bytes: u64,
}

/// Result of checking a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeCheck {
    /// The volume.
    pub name: Name,
    /// Log records looked at.
    pub records: u64,
    /// What is worth knowing, such as blocks that are still at another host.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What is wrong, each with its place; empty if all is well.
    pub problems: Vec<String>,
}

/// Where a VM's serial console is. Local socket only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmConsole {
    /// A unix socket on the host that runs the VM.
    pub socket: String,
}

/// Make a cluster.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ClusterInit {
    /// Its name.
    pub name: Name,
    /// Where images are published unless told otherwise.
    #[serde(default)]
    pub store: Option<String>,
}

/// Make a join token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenMake {
    /// Role of the certificate it buys.
    pub role: Role,
}

/// Refuse or allow new VMs on a host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HostDrain {
    /// Refuse them.
    pub draining: bool,
}

/// Check an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ImageCheck {
    /// Read every block from the store too.
    #[serde(default)]
    pub store: bool,
}

/// Write an image or a volume to a file. Local socket only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Export {
    /// The file; it must not exist.
    pub file: String,
    /// raw, qcow2, vhdx or vmdk; from the extension if not given.
    #[serde(default)]
    pub format: Option<String>,
    /// A vhdx file of the same size: only what differs from it is written, as a vhdx file that lies on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The volume's snapshots too, as vhdx files beside it that lie on each other; volumes only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chain: bool,
}

/// Make a volume from a file. Local socket only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeImport {
    /// Its name.
    pub name: Name,
    /// The image file.
    pub file: String,
    /// raw, qcow2, vhdx or vmdk; from the extension if not given.
    #[serde(default)]
    pub format: Option<String>,
    /// One volume without snapshots, whatever the file lies on.
    #[serde(default)]
    pub flatten: bool,
}

/// Stop a VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VmStop {
    /// Do not ask the guest.
    #[serde(default)]
    pub force: bool,
}

/// Take over a VM whose host died.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmRecover {
    /// The host that takes over.
    pub on: HostId,
    /// The operator made sure that the old host is off.
    pub fenced: bool,
}
