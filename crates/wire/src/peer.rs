//! What hosts say to each other: framing, hello, methods.
//!
//! Everything runs over TCP + TLS 1.3 on the host's one port; both sides show a certificate of the cluster's
//! authority. The TLS application protocol (ALPN) chooses what is spoken:
//!
//! | ALPN | who | what |
//! |---|---|---|
//! | `whimbrel` | certificate of any role, checked per call | this protocol |
//! | `http/1.1` | certificate of any role, checked per request | the remote API ([`crate::api`]) |
//! | `whimbrel-join` | no certificate, a token | one call, [`cluster::JoinRequest`] |
//!
//! # Frames
//!
//! ```text
//!  0        4            8          12       16
//!  | json_len | payload_len | request | kind  | json_len bytes of JSON | payload_len bytes |
//! ```
//!
//! All four numbers are little-endian `u32`. `json_len` is at most [`JSON_MAX`], `payload_len` at most
//! [`PAYLOAD_MAX`]; whoever sends more is cut off. JSON ignores unknown fields. A frame of unknown kind ends the
//! connection: kinds are only added together with a [`ProtocolVersion`].
//!
//! # A connection
//!
//! ```text
//!   client                                    server
//!     Hello {versions, program, open?}  ──►
//!                                       ◄──   Welcome {version, program}     or Failed, and the end
//!   without `open`: calls, any number at once     with `open`: a stream
//!     Call #7 {method, params} payload  ──►       bytes both ways, until either side closes
//!                                       ◄──   Answer #7 result payload       or Failed #7 WireError
//!     Ping #0                           ──►
//!                                       ◄──   Pong #0
//! ```
//!
//! * Answers come in any order; `request` ties them to calls. Numbers are the client's choice, unique among its
//!   calls under way on this connection.
//! * The server runs at most [`OUTSTANDING_MAX`] calls of a connection at once and answers `Unavailable` beyond.
//! * A call whose answer did not come may have been carried out ([`crate::ErrorKind::Unknown`] at the caller).
//! * The client pings when it has heard nothing for half a second and gives the peer up after two.
//!
//! # Methods
//!
//! Named `AREA.VERB`; which role may call which is `engine::trust::role`. Their parameters and results are the
//! modules below; what is bulky travels as the payload, never as JSON.
//!
//! Not here: who may call what (`engine`), how connections are kept (`host::link`).

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{ErrorKind, WireError};

pub mod block;
pub mod cluster;
pub mod layer;
pub mod memory;
pub mod meta;
pub mod migrate;

/// ALPN of this protocol.
pub const ALPN_PEER: &[u8] = b"whimbrel";
/// ALPN of the remote API.
pub const ALPN_HTTP: &[u8] = b"http/1.1";
/// ALPN of joining.
pub const ALPN_JOIN: &[u8] = b"whimbrel-join";

/// Most bytes of a frame's JSON.
pub const JSON_MAX: usize = 1 << 20;
/// Most bytes of a frame's payload.
pub const PAYLOAD_MAX: usize = 8 << 20;
/// Most calls of one connection that a server runs at once.
pub const OUTSTANDING_MAX: usize = 1024;
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 16;

/// Versions of the protocol. A release speaks the newest and the one before it, so that releases N and N−1
/// interoperate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum ProtocolVersion {
    /// The first: everything in this module's text.
    V1 = 1,
}

impl ProtocolVersion {
    /// What this release speaks, newest first.
    pub const SPOKEN: [Self; 1] = [Self::V1];

    /// The numbers of [`ProtocolVersion::SPOKEN`], for a hello.
    pub fn spoken_numbers() -> Vec<u16> {
        Self::SPOKEN.iter().map(|version| *version as u16).collect()
    }

    /// The newest version that both sides speak.
    pub fn agree(offered: &[u16]) -> Result<Self, WireError> {
        Self::SPOKEN.into_iter().find(|version| offered.contains(&(*version as u16))).ok_or_else(|| {
            WireError::new(
                ErrorKind::Unsupported,
                format!(
                    "agree on a protocol version: the peer speaks {offered:?}, this host {:?}",
                    Self::spoken_numbers()
                ),
            )
            .hint("upgrade the older side; releases N and N-1 interoperate")
        })
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FrameKind {
    /// First frame of the client: [`Hello`].
    Hello = 1,
    /// First frame of the server: [`Welcome`].
    Welcome = 2,
    /// A call: [`CallHead`] and a payload.
    Call = 3,
    /// Its result: JSON as the method says, and a payload.
    Answer = 4,
    /// Its error, or the refusal of a hello: [`WireError`].
    Failed = 5,
    /// Are you there?
    Ping = 6,
    /// Yes.
    Pong = 7,
}

impl FrameKind {
    fn from_number(number: u32) -> Option<Self> {
        [Self::Hello, Self::Welcome, Self::Call, Self::Answer, Self::Failed, Self::Ping, Self::Pong]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }
}

/// The first 16 bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of JSON that follow.
    pub json_len: u32,
    /// Bytes of payload after the JSON.
    pub payload_len: u32,
    /// The call this frame belongs to; 0 for frames that belong to none.
    pub request: u32,
    /// What the frame is.
    pub kind: FrameKind,
}

impl FrameHeader {
    /// The header as it is sent.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let numbers = [self.json_len, self.payload_len, self.request, self.kind as u32];
        for (place, number) in bytes.chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Reads a header and checks its lengths.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
        let json_len = u32::from_le_bytes([a, b, c, d]);
        let payload_len = u32::from_le_bytes([e, f, g, h]);
        let request = u32::from_le_bytes([i, j, k, l]);
        let kind = u32::from_le_bytes([m, n, o, p]);
        let bad = |what: String| WireError::new(ErrorKind::InvalidInput, format!("read a frame: {what}"));
        if json_len as usize > JSON_MAX {
            return Err(bad(format!("{json_len} bytes of JSON, at most {JSON_MAX} are allowed")));
        }
        if payload_len as usize > PAYLOAD_MAX {
            return Err(bad(format!("{payload_len} bytes of payload, at most {PAYLOAD_MAX} are allowed")));
        }
        let kind = FrameKind::from_number(kind).ok_or_else(|| bad(format!("unknown kind {kind}")))?;
        Ok(Self { json_len, payload_len, request, kind })
    }
}

/// The client's first words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Numbers of the protocol versions it speaks.
    pub versions: Vec<u16>,
    /// Program and version, for people.
    #[serde(default)]
    pub program: String,
    /// Set to turn the connection into a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<Open>,
}

/// The stream that a client wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Open {
    /// Which service.
    pub service: String,
    /// Its parameters.
    pub params: Box<RawValue>,
}

/// The server's first words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// The version both speak from here on.
    pub version: u16,
    /// Program and version, for people.
    #[serde(default)]
    pub program: String,
}

/// The JSON of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CallHead {
    /// Which method.
    pub method: String,
    /// Its parameters.
    pub params: Box<RawValue>,
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_survives_encoding() {
        let header = FrameHeader { json_len: 5, payload_len: 8 << 20, request: 7, kind: FrameKind::Answer };
        assert_eq!(FrameHeader::decode(&header.encode()).unwrap(), header);
    }

    #[test]
    fn too_long_and_unknown_frames_are_refused() {
        let good = FrameHeader { json_len: 0, payload_len: 0, request: 0, kind: FrameKind::Ping };
        for bad in [
            FrameHeader { json_len: JSON_MAX as u32 + 1, ..good },
            FrameHeader { payload_len: PAYLOAD_MAX as u32 + 1, ..good },
        ] {
            assert!(FrameHeader::decode(&bad.encode()).is_err());
        }
        let mut unknown = good.encode();
        unknown[12] = 99;
        assert!(FrameHeader::decode(&unknown).is_err());
    }

    #[test]
    fn both_sides_settle_on_the_newest_common_version() {
        assert_eq!(ProtocolVersion::agree(&[2, 1]).unwrap(), ProtocolVersion::V1);
        assert_eq!(ProtocolVersion::agree(&[9]).unwrap_err().kind, ErrorKind::Unsupported);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let hello: Hello = serde_json::from_str(r#"{"versions":[1],"mood":"good"}"#).unwrap();
        assert!(hello.open.is_none());
    }

    proptest! {
        #[test]
        fn any_sixteen_bytes_are_read_or_refused(bytes: [u8; HEADER_LEN]) {
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
