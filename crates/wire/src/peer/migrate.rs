//! The handover of a VM between two hosts: control messages, and what each side writes down on the way.
//!
//! Data (pages, layer extents, device state, the list of outstanding I/O) has streams of its own; here is only
//! what decides. Every message stands in a [`Control`], which names the attempt: a message of another attempt
//! is answered with [`ToSource::Gone`] or [`ToTarget::Abort`] and changes nothing.
//!
//! Rule for versions: fields are added with `#[serde(default)]`; an unknown variant refuses the move.
//!
//! Not here: the order of the messages and what follows from them (`engine::migrate::handover`).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

use crate::api::DiskMove;
use crate::error::{ErrorKind, WireError};
use crate::id::{AttemptId, DataId, DiskId, Epoch, HostId, Name};
use crate::meta::{Mode, VmSpec};
use crate::record::layer::{Header, Parent};

/// Makes the enum of steps with everything that has to list all of them.
macro_rules! steps {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The steps of every move, in order. See `engine::migrate::handover` for what happens in each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Step {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl Step {
            /// Every step, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The step's name: in journals, in `task show`, in fail points.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

steps! {
    /// The attempt is written into the VM's record; the target says whether it could run the VM.
    Negotiate = "negotiate",
    /// The target makes room: an incoming QEMU, files for RAM, layers.
    Prepare = "prepare",
    /// Memory and disk flow while the guest runs.
    Copy = "copy",
    /// The guest is stopped at the source.
    Pause = "pause",
    /// Outstanding I/O is cancelled at the source and listed.
    ListIo = "list-io",
    /// What changed since the last round of the copy.
    LastRound = "last-round",
    /// QEMU's device state.
    DeviceState = "device-state",
    /// The target proves to itself that it has everything, durably, and says READY.
    Verify = "verify",
    /// One compare-and-swap of the records: from now on the VM is the target's.
    Commit = "commit",
    /// The target reissues the listed I/O and lets the guest run.
    Resume = "resume",
    /// The target announces the guest's addresses.
    Announce = "announce",
    /// The disk follows the guest (`--disk on-demand` only): the target fetches what the source still has.
    Pull = "pull",
    /// The source gives up its copy.
    Release = "release",
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Step {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        Self::ALL.iter().copied().find(|step| step.as_str() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|step| step.as_str()).collect();
            WireError::new(
                ErrorKind::InvalidInput,
                format!("read the step {text:?}: one of {}", names.join(", ")),
            )
        })
    }
}

/// The two sides of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Where the VM comes from.
    Source,
    /// Where it goes.
    Target,
}

impl Side {
    /// Both sides.
    pub const ALL: &'static [Self] = &[Self::Source, Self::Target];

    /// `source` or `target`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is moved, from where to where, and how: agreed at the start, the same on both sides, journalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The attempt.
    pub attempt: AttemptId,
    /// The VM.
    pub vm: Name,
    /// The host that runs it.
    pub source: HostId,
    /// The host that shall run it.
    pub target: HostId,
    /// Epoch of the VM's right at the source; the target will hold it at the next one.
    pub epoch: Epoch,
    /// How to start the same VM.
    pub spec: VmSpec,
    /// How memory is moved.
    pub mode: Mode,
    /// When the writable layers are moved.
    #[serde(default)]
    pub disk: DiskMove,
    /// Hash all RAM at the pause on both sides and compare.
    #[serde(default)]
    pub verify: bool,
    /// What the guest's processor offers at the source; empty if that is not known.
    #[serde(default)]
    pub processor: Vec<CpuidWord>,
}

/// One register of one CPUID leaf, as a guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidWord {
    /// EAX on the way in.
    pub leaf: u32,
    /// ECX on the way in, where the leaf has subleaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subleaf: Option<u32>,
    /// `EAX`, `EBX`, `ECX` or `EDX`.
    pub register: String,
    /// The features, a bit each.
    pub bits: u32,
}

impl CpuidWord {
    /// Whether both are the same register of the same leaf.
    pub fn is_same_place(&self, other: &Self) -> bool {
        (self.leaf, self.subleaf, &self.register) == (other.leaf, other.subleaf, &other.register)
    }
}

impl fmt::Display for CpuidWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPUID {:#x}", self.leaf)?;
        if let Some(subleaf) = self.subleaf {
            write!(f, ".{subleaf}")?;
        }
        write!(f, " {}", self.register)
    }
}

/// A control message with the attempt it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control<M> {
    /// The attempt.
    pub attempt: AttemptId,
    /// The message.
    pub message: M,
}

/// From source to target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToTarget {
    /// Can you take this VM? Answered by `Accepted` or `Failed`. May be repeated.
    Offer(Box<Offer>),
    /// The source is in this step. Prepare and Verify are answered by `Did` or `Failed`. May be repeated.
    Enter(Step),
    /// The source found the right in the target's hands. Repeated until `Running`.
    Committed(Epoch),
    /// The attempt is over and cannot commit any more; why, for people.
    Abort(String),
}

/// From target to source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToSource {
    /// The target could run the VM.
    Accepted,
    /// The target has done its part of a step; of Verify: READY.
    Did(Step),
    /// The target could not do its part of a step.
    Failed(Step, WireError),
    /// The guest runs at the target.
    Running,
    /// The target has fetched what it depended on the source for.
    Pulled,
    /// The target knows nothing of this attempt.
    Gone,
    /// I am here.
    Alive,
}

/// Which way a side is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Course {
    /// Towards the target.
    Onward,
    /// The attempt is being undone.
    Undo,
    /// The target held the right but could not start the guest; the right goes back to the source.
    HandBack,
}

/// What a side writes down, durably, before the effect it guards. The newest entry of an attempt is enough to go
/// on after a restart; an entry is removed when its move has finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Version of this record; see [`JournalEntry::VERSION`]. A higher one is refused.
    pub version: u32,
    /// Whose entry it is.
    pub side: Side,
    /// What is moved.
    pub offer: Offer,
    /// The step it has reached. At the source: is about to enter. At the target: `verify` means that READY may
    /// have been said, `resume` that the guest may have run, `pull` that the record says so: from there on the VM is
    /// one of the target's like any other, and only its volumes' blocks are the attempt's.
    pub step: Step,
    /// Which way it goes.
    pub course: Course,
}

impl JournalEntry {
    /// The version written by this release.
    pub const VERSION: u32 = 1;
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn step_names_are_the_same_in_json_and_text() {
        for step in Step::ALL {
            assert_eq!(serde_json::to_string(step).unwrap(), format!("\"{step}\""));
            assert_eq!(step.as_str().parse::<Step>().unwrap(), *step);
        }
        assert!("jump".parse::<Step>().is_err());
    }
}

/// Opens a data stream of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataOpen {
    /// The attempt.
    pub attempt: AttemptId,
    /// The volume, for `migrate.layer`.
    #[serde(default)]
    pub volume: Option<Name>,
    /// A layer under the volume's writable one, for `migrate.layer`: it goes ahead of that one.
    #[serde(default)]
    pub layer: Option<DiskId>,
}

/// A layer that goes ahead of the writable one that lies on it, on `migrate.layer`: what the target makes for it,
/// unless it has it. The target answers with [`LayerHave`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerHead {
    /// Its identity.
    pub disk_id: DiskId,
    /// What its readers see.
    pub data_id: DataId,
    /// What it lies on.
    pub parent: Parent,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// The epoch of its last writer.
    pub epoch: Epoch,
    /// Length of a segment, 4 KiB blocks.
    pub segment_blocks: u32,
}

impl From<&Header> for LayerHead {
    fn from(header: &Header) -> Self {
        Self {
            disk_id: header.disk_id,
            data_id: header.data_id,
            parent: header.parent,
            size_bytes: header.size_bytes,
            epoch: header.epoch,
            segment_blocks: header.segment_blocks,
        }
    }
}

/// Whether the target has such a layer already, whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerHave {
    /// Nothing needs to be sent.
    pub have: bool,
}

/// What of a layer goes to the target during the pause if its blocks follow later, on `migrate.layer`: this, then the
/// map of what it has (`pull.map` of `record::layer`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullHead {
    /// What the layer's readers see.
    pub data_id: DataId,
    /// The epoch of its last writer; the layer opens at a later one.
    pub epoch: Epoch,
    /// Length of the map, bytes; at most [`PullHead::MAP_BYTES_MAX`].
    pub map_bytes: u64,
}

impl PullHead {
    /// The longest map, bytes: four million runs. It is sent while the guest stands still.
    pub const MAP_BYTES_MAX: u64 = 64 << 20;
}

/// What ends the copy, on `migrate.state`: said by the source when everything else has been sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateHead {
    /// Bytes of device state that follow; 0 in mode B, where it was in QEMU's stream.
    pub state_bytes: u64,
    /// BLAKE3 of those bytes, hex.
    pub state_hash: String,
    /// Requests that the source left unanswered, to be done again by the target before anything else.
    #[serde(default)]
    pub outstanding: Vec<DiskIo>,
}

/// Requests of a disk that were taken from the guest and not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIo {
    /// The disk's volume.
    pub volume: Name,
    /// By queue; those without such requests are left out.
    pub queues: Vec<QueueIo>,
}

/// Requests of one virtqueue that were taken from the guest and not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueIo {
    /// The queue's number.
    pub queue: u16,
    /// Where the available ring goes on: the index of the first entry that was not taken.
    pub next_avail: u16,
    /// The first descriptor of each, in the order in which they were taken.
    pub heads: Vec<u16>,
}
