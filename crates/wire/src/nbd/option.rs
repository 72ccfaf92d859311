//! Options: what client and server say before they agree on an export.
//!
//! ```text
//! info, go                 name length u32 │ name │ count u16 │ (kind of information u16) × count
//! set / list meta context  name length u32 │ name │ count u32 │ (length u32 │ query) × count
//! export                   0 u16 │ size u64 │ transmission flags u16
//! block size               3 u16 │ smallest u32 │ preferred u32 │ largest payload u32
//! name                     1 u16 │ name
//! server                   name length u32 │ name
//! meta context             id u32 │ name
//! ```

use super::Fields;

/// "NBDMAGIC".
const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT".
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag of both sides: options are answered.
pub const FLAG_FIXED_NEWSTYLE: u32 = 1;
/// Handshake flag of both sides: no padding behind the answer to [`EXPORT_NAME`].
pub const FLAG_NO_ZEROES: u32 = 2;
/// The padding behind the answer to [`EXPORT_NAME`], bytes.
pub const PADDING_BYTES: usize = 124;
/// Most bytes of an option's data that we take.
pub const DATA_BYTES_MAX: u32 = 64 << 10;

/// Choose an export, the old way: its answer cannot say no.
pub const EXPORT_NAME: u32 = 1;
/// Give up.
pub const ABORT: u32 = 2;
/// Name the exports.
pub const LIST: u32 = 3;
/// Go on with TLS.
pub const STARTTLS: u32 = 5;
/// Describe an export.
pub const INFO: u32 = 6;
/// Describe an export and choose it.
pub const GO: u32 = 7;
/// Reads are answered in chunks.
pub const STRUCTURED_REPLY: u32 = 8;
/// Name the metadata contexts.
pub const LIST_META_CONTEXT: u32 = 9;
/// Choose metadata contexts.
pub const SET_META_CONTEXT: u32 = 10;
/// Everything is chunked, and lengths have 64 bits.
pub const EXTENDED_HEADERS: u32 = 11;

/// Kind of answer: done.
pub const REP_ACK: u32 = 1;
/// Kind of answer: an export's name.
pub const REP_SERVER: u32 = 2;
/// Kind of answer: something about an export.
pub const REP_INFO: u32 = 3;
/// Kind of answer: a metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Kind of answer: the option is not known.
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// Kind of answer: the option is known and not offered.
pub const REP_ERR_POLICY: u32 = 0x8000_0002;
/// Kind of answer: the option's data make no sense.
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
/// Kind of answer: TLS first.
pub const REP_ERR_TLS_REQD: u32 = 0x8000_0005;
/// Kind of answer: no such export.
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
/// Kind of answer: the option's data are too large.
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;
/// Kind of answer: extended headers are agreed on already.
pub const REP_ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;

/// Kind of information: size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Kind of information: the export's own name.
pub const INFO_NAME: u16 = 1;
/// Kind of information: limits of lengths and offsets.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// The server's first words.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    let flags = (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) as u16;
    let parts: [&[u8]; 3] = [&MAGIC.to_be_bytes(), &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()];
    for (place, byte) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *place = *byte;
    }
    bytes
}

/// What stands before an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// Which option.
    pub option: u32,
    /// Length of its data, bytes.
    pub length: u32,
}

impl OptionHead {
    /// Bytes of a head.
    pub const BYTES: usize = 16;

    /// Reads a head; `None` if it does not start with its magic number.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        let head = Self { option: fields.u32()?, length: fields.u32()? };
        (magic == OPTION_MAGIC).then_some(head)
    }

    /// The head as a client sends it.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let value = u128::from(OPTION_MAGIC) << 64 | u128::from(self.option) << 32 | u128::from(self.length);
        value.to_be_bytes()
    }
}

/// Data of [`INFO`] and [`GO`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// Which export; empty for the one that is meant if none is named.
    pub name: &'a [u8],
    /// Kinds of information the client asks for.
    pub kinds: Vec<u16>,
}

impl<'a> InfoQuery<'a> {
    /// Reads an option's data; `None` if lengths do not fit each other.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        if fields.0.len() != 2 * usize::from(count) {
            return None;
        }
        let kinds = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
        Some(Self { name, kinds })
    }
}

/// Data of [`LIST_META_CONTEXT`] and [`SET_META_CONTEXT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    /// Which export; empty for the one that is meant if none is named.
    pub name: &'a [u8],
    /// Names of contexts, or of namespaces.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> MetaQuery<'a> {
    /// Reads an option's data; `None` if lengths do not fit each other.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = usize::try_from(fields.u32()?).ok()?;
        // Each takes at least its length's four bytes, so the data bounds the count.
        if count > fields.0.len() / 4 {
            return None;
        }
        let queries = (0..count).map(|_| fields.string()).collect::<Option<_>>()?;
        fields.0.is_empty().then_some(Self { name, queries })
    }
}

/// Appends one answer to an option.
pub fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[&[u8]]) {
    let length: usize = data.iter().map(|part| part.len()).sum();
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}
