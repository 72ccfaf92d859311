//! The start of an NBD connection: what client and server agree on.
//!
//! Not here: requests (`session`).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::{Export, proto};
use crate::error::{Context, Error, ErrorKind, Result};

/// What the handshake settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// `base:allocation` may be asked for.
    pub(super) allocation: bool,
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("shake hands with an NBD client: {what}"))
}

/// Reads big-endian numbers off an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(self.bytes(2)?.iter().fold(0, |value, byte| value << 8 | u16::from(*byte)))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(self.bytes(4)?.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    /// A name with its length in front.
    fn name(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.bytes(len)
    }
}

/// Goes through the handshake; `None` if the client only wanted to look.
pub(super) fn shake_hands(export: &Export, stream: &UnixStream) -> Result<Option<Agreed>> {
    let mut io = stream;
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(proto::MAGIC.to_be_bytes());
    greeting.extend(proto::OPTION_MAGIC.to_be_bytes());
    greeting.extend(proto::HANDSHAKE_FLAGS.to_be_bytes());
    io.write_all(&greeting).context("greet an NBD client")?;
    let flags = u32::from_be_bytes(read(&mut io)?);
    if flags & !u32::from(proto::HANDSHAKE_FLAGS) != 0 || flags & 1 == 0 {
        return Err(bad("it does not speak fixed newstyle"));
    }
    let mut hands = Hands { export, io, agreed: Agreed::default(), no_zeroes: flags & 2 != 0 };
    loop {
        let magic = u64::from_be_bytes(read(&mut io)?);
        let option = u32::from_be_bytes(read(&mut io)?);
        let length = u32::from_be_bytes(read(&mut io)?);
        if magic != proto::OPTION_MAGIC || length > proto::MAX_OPTION {
            return Err(bad("an option without its magic number, or a huge one"));
        }
        let mut data = vec![0; length as usize];
        io.read_exact(&mut data).context("read an option")?;
        match hands.option(option, &data)? {
            Next::Option => {}
            Next::Transmission => return Ok(Some(hands.agreed)),
            Next::End => return Ok(None),
        }
    }
}

fn read<const N: usize>(io: &mut &UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    io.read_exact(&mut bytes).context("read from an NBD client")?;
    Ok(bytes)
}

enum Next {
    Option,
    Transmission,
    End,
}

struct Hands<'a> {
    export: &'a Export,
    io: &'a UnixStream,
    agreed: Agreed,
    no_zeroes: bool,
}

impl Hands<'_> {
    fn option(&mut self, option: u32, data: &[u8]) -> Result<Next> {
        match option {
            proto::OPT_EXPORT_NAME => return self.export_name(data),
            proto::OPT_ABORT => {
                self.reply(option, proto::REP_ACK, &[])?;
                return Ok(Next::End);
            }
            proto::OPT_LIST if data.is_empty() => {
                let name = self.export.options.name.as_bytes();
                let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                entry.extend(name);
                self.reply(option, proto::REP_SERVER, &entry)?;
                self.reply(option, proto::REP_ACK, &[])?;
            }
            proto::OPT_INFO | proto::OPT_GO => return self.info(option, data),
            proto::OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.structured = true;
                self.reply(option, proto::REP_ACK, &[])?;
            }
            proto::OPT_LIST_META_CONTEXT | proto::OPT_SET_META_CONTEXT => self.meta_context(option, data)?,
            proto::OPT_LIST | proto::OPT_STRUCTURED_REPLY => {
                self.reply(option, proto::REP_ERR_INVALID, &[])?;
            }
            _ => self.reply(option, proto::REP_ERR_UNSUP, &[])?,
        }
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let mut reply = Vec::with_capacity(20 + data.len());
        reply.extend(proto::OPTION_REPLY_MAGIC.to_be_bytes());
        reply.extend(option.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        self.io.write_all(&reply).context("answer an option")
    }

    fn knows(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.options.name.as_bytes()
    }

    /// Size and flags, as both ways to choose an export send them.
    fn size_and_flags(&self) -> [u8; 10] {
        let read_only = if self.export.options.read_only { proto::EXPORT_READ_ONLY } else { 0 };
        let mut bytes = [0; 10];
        let (size, flags) = bytes.split_at_mut(8);
        size.copy_from_slice(&self.export.slot.size_bytes().to_be_bytes());
        flags.copy_from_slice(&(proto::EXPORT_FLAGS | read_only).to_be_bytes());
        bytes
    }

    /// The old way, which has no way to say no.
    fn export_name(&mut self, name: &[u8]) -> Result<Next> {
        if !self.knows(name) {
            return Err(bad("it wants an export that is not here"));
        }
        let mut answer = self.size_and_flags().to_vec();
        if !self.no_zeroes {
            answer.resize(answer.len() + 124, 0);
        }
        self.io.write_all(&answer).context("answer an option")?;
        Ok(Next::Transmission)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Next> {
        let mut fields = Fields(data);
        let name = fields.name();
        let asked = fields.u16().and_then(|count| {
            let asked = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
            fields.0.is_empty().then_some(asked)
        });
        let (Some(name), Some(_)) = (name, asked) else {
            self.reply(option, proto::REP_ERR_INVALID, &[])?;
            return Ok(Next::Option);
        };
        if !self.knows(name) {
            self.reply(option, proto::REP_ERR_UNKNOWN, &[])?;
            return Ok(Next::Option);
        }
        let mut export = proto::INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.size_and_flags());
        self.reply(option, proto::REP_INFO, &export)?;
        // Told whether asked for or not: whoever ignores it gets errors instead of surprises.
        let mut sizes = proto::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [proto::MIN_BLOCK, 4096, proto::MAX_PAYLOAD] {
            sizes.extend(size.to_be_bytes());
        }
        self.reply(option, proto::REP_INFO, &sizes)?;
        self.reply(option, proto::REP_ACK, &[])?;
        Ok(if option == proto::OPT_GO { Next::Transmission } else { Next::Option })
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut fields = Fields(data);
        let name = fields.name();
        let queries = fields.u32().and_then(|count| {
            // Each takes at least its length's four bytes: the data bounds the count.
            let queries = (0..count).map(|_| fields.name()).collect::<Option<Vec<_>>>()?;
            fields.0.is_empty().then_some(queries)
        });
        let (Some(name), Some(queries)) = (name, queries) else {
            return self.reply(option, proto::REP_ERR_INVALID, &[]);
        };
        if !self.knows(name) {
            return self.reply(option, proto::REP_ERR_UNKNOWN, &[]);
        }
        let setting = option == proto::OPT_SET_META_CONTEXT;
        if setting && !self.agreed.structured {
            return self.reply(option, proto::REP_ERR_INVALID, &[]);
        }
        let wanted = if setting {
            queries.contains(&proto::CONTEXT)
        } else {
            queries.is_empty() || queries.iter().any(|query| matches!(*query, b"base:" | proto::CONTEXT))
        };
        if setting {
            self.agreed.allocation = wanted;
        }
        if wanted {
            let id = if setting { proto::CONTEXT_ID } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend(proto::CONTEXT);
            self.reply(option, proto::REP_META_CONTEXT, &context)?;
        }
        self.reply(option, proto::REP_ACK, &[])
    }
}
