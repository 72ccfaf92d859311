//! Requests: the header, with 32 or 64 bits for the length, and what may follow it.

use super::Fields;

const MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Flag: durable before it is answered.
pub const FLAG_FUA: u16 = 1;
/// Flag of write-zeroes: what is zeroed takes room.
pub const FLAG_NO_HOLE: u16 = 1 << 1;
/// Flag of read: one chunk of content at most.
pub const FLAG_DF: u16 = 1 << 2;
/// Flag of block status: one run at most, and not more than was asked for.
pub const FLAG_REQ_ONE: u16 = 1 << 3;
/// Flag of write-zeroes: fail if a write would be as fast.
pub const FLAG_FAST_ZERO: u16 = 1 << 4;
/// Flag of extended requests: the length is that of a payload that follows.
pub const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Form of all requests of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// 28 bytes, lengths of 32 bits.
    Compact,
    /// 32 bytes, lengths of 64 bits.
    Extended,
}

impl Headers {
    /// Bytes of the longest header.
    pub const BYTES_MAX: usize = 32;

    /// Bytes of a header.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Compact => 28,
            Self::Extended => 32,
        }
    }
}

/// What a client wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send what is there.
    Read,
    /// Take what follows.
    Write,
    /// End the connection.
    Disconnect,
    /// Make durable what was answered.
    Flush,
    /// The range does not matter any more.
    Trim,
    /// The range will be read soon.
    Cache,
    /// The range reads as zeros.
    WriteZeroes,
    /// Tell which runs are holes.
    BlockStatus,
    /// Nothing we know.
    Other(u16),
}

impl From<u16> for Command {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }
}

impl From<Command> for u16 {
    fn from(command: Command) -> Self {
        match command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Other(other) => other,
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `FLAG_*`.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// Stands in the answer as it is.
    pub cookie: u64,
    /// Where on the disk, bytes.
    pub offset: u64,
    /// How much of the disk, or of payload, bytes.
    pub length: u64,
}

impl Request {
    /// Reads a header from the front of `bytes`; `None` if that is not one.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let (flags, command) = (fields.u16()?, fields.u16()?.into());
        let (cookie, offset) = (fields.u64()?, fields.u64()?);
        let (wanted, length) = match headers {
            Headers::Compact => (MAGIC, fields.u32()?.into()),
            Headers::Extended => (EXTENDED_MAGIC, fields.u64()?),
        };
        (magic == wanted).then_some(Self { flags, command, cookie, offset, length })
    }

    /// The header as a client sends it. Of a length over 32 bits compact headers keep the lower ones.
    pub fn encode(&self, headers: Headers) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(headers.bytes());
        let magic = match headers {
            Headers::Compact => MAGIC,
            Headers::Extended => EXTENDED_MAGIC,
        };
        bytes.extend(magic.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(u16::from(self.command).to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        match headers {
            Headers::Compact => bytes.extend((self.length as u32).to_be_bytes()),
            Headers::Extended => bytes.extend(self.length.to_be_bytes()),
        }
        bytes
    }

    /// Bytes that follow the header. An extended write has its data behind it even without [`FLAG_PAYLOAD_LEN`]: the
    /// protocol's text demands the flag, and QEMU 10.0 forgets it.
    pub fn payload_bytes(&self, headers: Headers) -> u64 {
        let flagged = headers == Headers::Extended && self.flags & FLAG_PAYLOAD_LEN != 0;
        if flagged || self.command == Command::Write { self.length } else { 0 }
    }
}

/// Payload of an extended block status: how much of the disk, and which contexts.
///
/// ```text
/// length u64 │ (context id u32) × n
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusPayload {
    /// How much of the disk, bytes.
    pub length: u64,
    /// Numbers of contexts.
    pub contexts: Vec<u32>,
}

impl StatusPayload {
    /// Longest payload that makes sense to read, bytes: there is one context only.
    pub const BYTES_MAX: u64 = 8 + 4 * 16;

    /// Reads a payload; `None` if its length is none that it can have.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let length = fields.u64()?;
        if !fields.0.len().is_multiple_of(4) {
            return None;
        }
        let contexts = (0..fields.0.len() / 4).map(|_| fields.u32()).collect::<Option<_>>()?;
        Some(Self { length, contexts })
    }
}
