//! NBD: what a client and we agree on, and what a request may do.
//!
//! ```text
//!  client's flags ──▶ Negotiation ── option ──▶ answer, and ─┬─ Option: the next one
//!                          ▲                                 ├─ StartTls: encrypt, and begin again
//!                          └── everything said before TLS    ├─ Transmission(Agreed): requests (`request`)
//!                              is forgotten                  └─ End, Refuse: close
//! ```
//!
//! Invariants
//! * Where TLS is demanded, nothing but STARTTLS and ABORT is answered with anything but "TLS first".
//! * An answer says only what holds: "don't fragment" is offered only where replies are chunked, zeroing and
//!   trimming only where the export may be written.
//!
//! Not here: bytes (`wire::nbd`), sockets and disks (`host::export::nbd`).

mod request;
#[cfg(test)]
mod test;

use whimbrel_wire::nbd::option::{self, InfoQuery, MetaQuery};
use whimbrel_wire::nbd::{CONTEXT, CONTEXT_ID, Headers, Replies, STRING_BYTES_MAX, transmission};

pub use request::{Refusal, Work, admit};

/// Smallest unit of offsets and lengths, bytes.
pub const BLOCK_BYTES_MIN: u32 = 512;
/// What a volume's layer keeps together: smaller writes are completed with what was there, bytes.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Most bytes of a read or a write.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// The one export that is offered.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// Its name; clients may ask for the empty name instead.
    pub name: &'a str,
    /// Size of the disk now, bytes.
    pub size_bytes: u64,
    /// Whether clients may only read.
    pub read_only: bool,
}

/// What the handshake settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Form of replies, and with it of requests.
    pub replies: Replies,
    /// Whether block status may be asked for.
    pub status: bool,
}

impl Agreed {
    /// Form of requests.
    pub fn headers(&self) -> Headers {
        match self.replies {
            Replies::Extended => Headers::Extended,
            Replies::Simple | Replies::Structured => Headers::Compact,
        }
    }
}

/// What comes after an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// The answer goes out as it is, then TLS begins; tell [`Negotiation::encrypted`] when it stands.
    StartTls,
    /// Requests.
    Transmission(Agreed),
    /// Nothing: the client wants no more.
    End,
    /// Nothing: the client may not go on, and there is no way to tell it why.
    Refuse(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    NotOffered,
    Demanded,
    Stands,
}

/// See the module's charter.
#[derive(Debug)]
pub struct Negotiation {
    tls: Tls,
    fixed: bool,
    no_zeroes: bool,
    agreed: Agreed,
}

impl Negotiation {
    /// Begins with the client's flags. An error says why the client must be left.
    pub fn new(client_flags: u32, demand_tls: bool) -> Result<Self, &'static str> {
        if client_flags & !(option::FLAG_FIXED_NEWSTYLE | option::FLAG_NO_ZEROES) != 0 {
            return Err("it has flags that were not offered");
        }
        Ok(Self {
            tls: if demand_tls { Tls::Demanded } else { Tls::NotOffered },
            fixed: client_flags & option::FLAG_FIXED_NEWSTYLE != 0,
            no_zeroes: client_flags & option::FLAG_NO_ZEROES != 0,
            agreed: Agreed::default(),
        })
    }

    /// TLS stands: nothing that was said before counts.
    pub fn encrypted(&mut self) {
        self.tls = Tls::Stands;
        self.agreed = Agreed::default();
    }

    /// Takes one option with its data, and appends what to answer.
    pub fn step(&mut self, offer: &Offer<'_>, number: u32, data: &[u8], answer: &mut Vec<u8>) -> Next {
        if !self.fixed && number != option::EXPORT_NAME {
            return Next::Refuse("it uses options without having said that it knows answers");
        }
        let mut reply = |kind: u32, parts: &[&[u8]]| option::put_reply(answer, number, kind, parts);
        match number {
            option::ABORT => {
                reply(option::REP_ACK, &[]);
                return Next::End;
            }
            option::EXPORT_NAME if self.tls == Tls::Demanded => {
                return Next::Refuse("it wants an export without TLS");
            }
            option::STARTTLS => match self.tls {
                Tls::NotOffered => reply(option::REP_ERR_POLICY, &[b"no TLS on this socket"]),
                Tls::Demanded if data.is_empty() => {
                    reply(option::REP_ACK, &[]);
                    return Next::StartTls;
                }
                Tls::Demanded | Tls::Stands => reply(option::REP_ERR_INVALID, &[]),
            },
            _ if self.tls == Tls::Demanded => reply(option::REP_ERR_TLS_REQD, &[b"TLS first"]),
            option::EXPORT_NAME => return self.export_name(offer, data, answer),
            option::INFO | option::GO => return self.info(offer, number, data, answer),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(offer, number, data, answer);
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                reply(option::REP_ERR_INVALID, &[b"this option has no data"]);
            }
            option::LIST => {
                let name = offer.name.as_bytes();
                reply(option::REP_SERVER, &[&(name.len() as u32).to_be_bytes(), name]);
                reply(option::REP_ACK, &[]);
            }
            option::STRUCTURED_REPLY if self.agreed.replies == Replies::Extended => {
                reply(option::REP_ERR_EXT_HEADER_REQD, &[]);
            }
            option::STRUCTURED_REPLY => {
                self.agreed.replies = Replies::Structured;
                reply(option::REP_ACK, &[]);
            }
            option::EXTENDED_HEADERS => {
                self.agreed.replies = Replies::Extended;
                reply(option::REP_ACK, &[]);
            }
            _ => reply(option::REP_ERR_UNSUP, &[]),
        }
        Next::Option
    }

    /// Says that an option's data was too large to be read.
    pub fn too_big(&self, number: u32, answer: &mut Vec<u8>) -> Next {
        if number == option::EXPORT_NAME || !self.fixed {
            return Next::Refuse("the name of the export it wants is too long");
        }
        let kind = if self.tls == Tls::Demanded { option::REP_ERR_TLS_REQD } else { option::REP_ERR_TOO_BIG };
        option::put_reply(answer, number, kind, &[]);
        Next::Option
    }

    fn size_and_flags(&self, offer: &Offer<'_>) -> [u8; 10] {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE;
        flags |= if offer.read_only {
            transmission::READ_ONLY
        } else {
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
        };
        if self.agreed.replies != Replies::Simple {
            flags |= transmission::SEND_DF;
        }
        if self.agreed.replies == Replies::Extended && self.agreed.status {
            flags |= transmission::BLOCK_STATUS_PAYLOAD;
        }
        let mut bytes = [0; 10];
        let (size, last) = bytes.split_at_mut(8);
        size.copy_from_slice(&offer.size_bytes.to_be_bytes());
        last.copy_from_slice(&flags.to_be_bytes());
        bytes
    }

    /// The old way, which has no way to say no.
    fn export_name(&self, offer: &Offer<'_>, name: &[u8], answer: &mut Vec<u8>) -> Next {
        if self.agreed.replies == Replies::Extended {
            return Next::Refuse("it chose its export the old way after it asked for extended headers");
        }
        if !knows(offer, name) {
            return Next::Refuse("it wants an export that is not here");
        }
        answer.extend(self.size_and_flags(offer));
        if !self.no_zeroes {
            answer.extend([0; option::PADDING_BYTES]);
        }
        Next::Transmission(self.agreed)
    }

    fn info(&self, offer: &Offer<'_>, number: u32, data: &[u8], answer: &mut Vec<u8>) -> Next {
        let mut reply = |kind: u32, parts: &[&[u8]]| option::put_reply(answer, number, kind, parts);
        let Some(query) = InfoQuery::decode(data) else {
            reply(option::REP_ERR_INVALID, &[b"lengths do not fit"]);
            return Next::Option;
        };
        if !knows(offer, query.name) {
            reply(option::REP_ERR_UNKNOWN, &[b"there is no export of that name"]);
            return Next::Option;
        }
        reply(option::REP_INFO, &[&option::INFO_EXPORT.to_be_bytes(), &self.size_and_flags(offer)]);
        // Told whether asked for or not: whoever ignores it gets errors instead of surprises.
        let sizes = [BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
        reply(option::REP_INFO, &[&option::INFO_BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()]);
        if query.kinds.contains(&option::INFO_NAME) {
            reply(option::REP_INFO, &[&option::INFO_NAME.to_be_bytes(), offer.name.as_bytes()]);
        }
        reply(option::REP_ACK, &[]);
        if number == option::GO { Next::Transmission(self.agreed) } else { Next::Option }
    }

    fn meta_context(&mut self, offer: &Offer<'_>, number: u32, data: &[u8], answer: &mut Vec<u8>) {
        let mut reply = |kind: u32, parts: &[&[u8]]| option::put_reply(answer, number, kind, parts);
        let setting = number == option::SET_META_CONTEXT;
        if setting {
            // What was chosen before is gone, even if this fails.
            self.agreed.status = false;
        }
        let Some(query) = MetaQuery::decode(data) else {
            return reply(option::REP_ERR_INVALID, &[b"lengths do not fit"]);
        };
        if !knows(offer, query.name) {
            return reply(option::REP_ERR_UNKNOWN, &[b"there is no export of that name"]);
        }
        if setting && self.agreed.replies == Replies::Simple {
            return reply(option::REP_ERR_INVALID, &[b"structured replies or extended headers first"]);
        }
        let named = query.queries.contains(&CONTEXT);
        let wanted = if setting {
            named
        } else {
            named || query.queries.is_empty() || query.queries.contains(&&b"base:"[..])
        };
        if wanted {
            let id = if setting { CONTEXT_ID } else { 0 };
            reply(option::REP_META_CONTEXT, &[&id.to_be_bytes(), CONTEXT]);
        }
        reply(option::REP_ACK, &[]);
        if setting {
            self.agreed.status = wanted;
        }
    }
}

fn knows(offer: &Offer<'_>, name: &[u8]) -> bool {
    name.is_empty() || (name.len() <= STRING_BYTES_MAX && name == offer.name.as_bytes())
}
