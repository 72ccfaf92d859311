//! The start of an NBD connection: carries out what `engine::export::nbd::Negotiation` decides.
//!
//! Not here: requests (`session`).

use std::time::Instant;

use whimbrel_engine::export::nbd::{Agreed, Negotiation, Next};
use whimbrel_wire::nbd::OptionHead;
use whimbrel_wire::nbd::option::{DATA_BYTES_MAX, greeting};

use super::Export;
use super::line::Line;
use crate::error::{Error, ErrorKind, Result};

/// Data of options over this are not even skipped, bytes.
const SKIP_BYTES_MAX: u32 = 16 << 20;

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("shake hands with an NBD client: {what}"))
}

/// Goes through the handshake; `None` if the client only wanted to look.
pub(super) fn shake_hands(export: &Export, line: &mut Line) -> Result<Option<Agreed>> {
    let deadline = Instant::now() + export.options.patience;
    line.limit_sending(export.options.patience)?;
    line.send(&greeting())?;
    let mut flags = [0; 4];
    if !line.receive_exactly(&mut flags, deadline)? {
        return Ok(None);
    }
    let mut talk = Negotiation::new(u32::from_be_bytes(flags), export.tls.is_some()).map_err(bad)?;
    let mut answer = Vec::new();
    let mut data = Vec::new();
    loop {
        let mut head = [0; OptionHead::BYTES];
        if !line.receive_exactly(&mut head, deadline)? {
            return Ok(None);
        }
        let head = OptionHead::decode(&head).ok_or_else(|| bad("an option without its magic number"))?;
        answer.clear();
        let next = if head.length > DATA_BYTES_MAX {
            skip(line, head.length, deadline)?;
            talk.too_big(head.option, &mut answer)
        } else {
            data.resize(head.length as usize, 0);
            if !line.receive_exactly(&mut data, deadline)? {
                return Ok(None);
            }
            talk.step(&export.offer(), head.option, &data, &mut answer)
        };
        line.send(&answer)?;
        match (next, &export.tls) {
            (Next::Option, _) => {}
            (Next::StartTls, Some(tls)) => {
                line.encrypt(tls, deadline)?;
                talk.encrypted();
            }
            (Next::Transmission(agreed), _) => return Ok(Some(agreed)),
            (Next::End, _) => return Ok(None),
            (Next::Refuse(why), _) => return Err(bad(why)),
            (Next::StartTls, None) => return Err(bad("there is no TLS here")),
        }
    }
}

fn skip(line: &mut Line, length: u32, deadline: Instant) -> Result<()> {
    if length > SKIP_BYTES_MAX {
        return Err(bad("a huge option"));
    }
    let mut scratch = [0; 4096];
    let mut left = length as usize;
    while left > 0 {
        let part = left.min(scratch.len());
        if !line.receive_exactly(scratch.get_mut(..part).unwrap_or_default(), deadline)? {
            return Err(bad("it is gone in the middle of an option"));
        }
        left -= part;
    }
    Ok(())
}
