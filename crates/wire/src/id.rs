//! The nouns: identifiers, addresses of blocks, rights and time.
//!
//! Invariants: a [`Name`] is always valid (1 to 63 characters of `a-z A-Z 0-9 . _ -`, starting with a letter or
//! digit), so it is safe as a path component and as a metadata key. Hash-like ids print as lower-case hex.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::{ErrorKind, WireError};

/// A point on the host's monotonic clock, in nanoseconds since an arbitrary start. The engine gets it as an
/// argument; the simulator makes it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// This time plus `ms` milliseconds, saturating.
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }

    /// Milliseconds from `earlier` to this time; 0 if `earlier` is later.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

/// Documents a type of ours that is text in JSON.
macro_rules! text_schema {
    ($name:ident) => {
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                String::schema()
            }
        }

        impl ToSchema for $name {}
    };
}

text_schema!(Name);
text_schema!(ImageRef);
text_schema!(SnapshotRef);

/// A name that people give: of a host, a VM, a volume, an image. See the module's invariants.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The most characters a name has.
    pub const LENGTH_MAX: usize = 63;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first && text.len() <= Self::LENGTH_MAX && text.chars().all(good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(WireError::new(
                ErrorKind::InvalidInput,
                format!(
                    "read the name {text:?}: a name has 1 to 63 letters, digits, '.', '_' or '-' and starts with \
                     a letter or digit"
                ),
            ))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = WireError;
    fn try_from(text: String) -> Result<Self, WireError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host of the cluster, by the name in its certificate.
pub type HostId = Name;

/// Counts the holders of a right: each change of holder adds one. A side effect carries the epoch under which
/// it is made, and the place of effect refuses an older one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of the next holder.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The id with these bits: the caller's randomness, or a count in tests and the simulator.
            pub const fn from_u128(bits: u128) -> Self {
                Self(Uuid::from_u128(bits))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id! {
    /// A virtual machine, for its whole life, whatever its name and host.
    VmId
}
uuid_id! {
    /// A layer of a volume, for its whole life.
    DiskId
}
uuid_id! {
    /// What a reader of a layer sees: changed, durably, before the first change a reader could see after a
    /// writable open (MS-VHDX 2.2.2 `DataWriteGuid`).
    DataId
}
uuid_id! {
    /// One attempt to move a VM; every message of the move carries it.
    AttemptId
}

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 32]);

        text_schema!($name);

        impl FromStr for $name {
            type Err = WireError;
            fn from_str(text: &str) -> Result<Self, WireError> {
                blake3::Hash::from_hex(text)
                    .map(|hash| Self(*hash.as_bytes()))
                    .map_err(|_| WireError::new(ErrorKind::InvalidInput, format!("read the hash {text:?}: it has 64 hex digits")))
            }
        }

        impl TryFrom<String> for $name {
            type Error = WireError;
            fn try_from(text: String) -> Result<Self, WireError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", &blake3::Hash::from_bytes(self.0).to_hex()[..12])
            }
        }
    };
}

hash_id! {
    /// An image: the BLAKE3 hash of its manifest.
    ImageId
}
hash_id! {
    /// The BLAKE3 hash of a block's bytes.
    BlockHash
}

impl BlockHash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// `NAME[:TAG]` of an image; the tag is `latest` if none is given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    /// The image's name.
    pub name: Name,
    /// Its tag.
    pub tag: Name,
}

impl FromStr for ImageRef {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        let (name, tag) = text.split_once(':').unwrap_or((text, "latest"));
        Ok(Self { name: name.parse()?, tag: tag.parse()? })
    }
}

impl TryFrom<String> for ImageRef {
    type Error = WireError;
    fn try_from(text: String) -> Result<Self, WireError> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(image: ImageRef) -> Self {
        image.to_string()
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.tag)
    }
}

/// `VOLUME@SNAPSHOT`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotRef {
    /// The volume.
    pub volume: Name,
    /// Its snapshot.
    pub snapshot: Name,
}

impl FromStr for SnapshotRef {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        let (volume, snapshot) = text.split_once('@').ok_or_else(|| {
            WireError::new(
                ErrorKind::InvalidInput,
                format!("read {text:?} as a snapshot: it is not VOLUME@SNAPSHOT"),
            )
        })?;
        Ok(Self { volume: volume.parse()?, snapshot: snapshot.parse()? })
    }
}

impl TryFrom<String> for SnapshotRef {
    type Error = WireError;
    fn try_from(text: String) -> Result<Self, WireError> {
        text.parse()
    }
}

impl From<SnapshotRef> for String {
    fn from(snapshot: SnapshotRef) -> Self {
        snapshot.to_string()
    }
}

impl fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

/// Anything that moves as blocks, or has one writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Object {
    /// An immutable image.
    Image(ImageId),
    /// The writable part of a volume.
    Layer(DiskId),
    /// A VM's RAM; the right over it is the control of the VM.
    Memory(VmId),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(id) => write!(f, "image {id}"),
            Self::Layer(id) => write!(f, "layer {id}"),
            Self::Memory(id) => write!(f, "memory {id}"),
        }
    }
}

/// One block of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockAddr {
    /// The object the block belongs to.
    pub object: Object,
    /// Its place, counted in blocks of the object's block size.
    pub index: u64,
}

/// Who may write an object. Changed only by compare-and-swap in the metadata store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Right {
    /// What the right is over.
    pub object: Object,
    /// The host that holds it.
    pub holder: HostId,
    /// How many holders there have been.
    pub epoch: Epoch,
}

impl Right {
    /// The same right in the hands of `holder`, one epoch later.
    pub fn passed_to(&self, holder: HostId) -> Self {
        Self { object: self.object, holder, epoch: self.epoch.next() }
    }
}

/// What a certificate allows; checked at every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A host agent.
    Host,
    /// A person or program that manages the cluster.
    Operator,
    /// May look, not change.
    Reader,
    /// An agent inside a VM: reads its job's dataset, holds no right.
    Guest,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Host, Self::Operator, Self::Reader, Self::Guest];

    /// The name as it stands in certificates and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Operator => "operator",
            Self::Reader => "reader",
            Self::Guest => "guest",
        }
    }
}

impl FromStr for Role {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| {
            WireError::new(
                ErrorKind::InvalidInput,
                format!("read the role {text:?}: host, operator, reader or guest"),
            )
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_are_safe_as_paths_and_keys() {
        for good in ["a", "web-1", "disk_0.old", "9lives"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_image_without_a_tag_is_latest() {
        let image: ImageRef = "debian".parse().unwrap();
        assert_eq!(image.to_string(), "debian:latest");
        assert_eq!("debian:12".parse::<ImageRef>().unwrap().tag.as_str(), "12");
        let snapshot: SnapshotRef = "db@before-1".parse().unwrap();
        assert_eq!((snapshot.volume.as_str(), snapshot.to_string().as_str()), ("db", "db@before-1"));
        for bad in ["db", "@x", "db@", "a@b@c"] {
            assert!(bad.parse::<SnapshotRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hashes_survive_json() {
        let hash = BlockHash::of(b"whimbrel");
        let text = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<BlockHash>(&text).unwrap(), hash);
        assert!(serde_json::from_str::<BlockHash>("\"zz\"").is_err());
    }
}
