//! Front-ends that begin in the middle of a conversation.
//!
//! ```text
//!   connected ── GET_FEATURES first ─────────▶ the usual greeting, then rings
//!             ├─ anything else first ────────▶ primed: what the front-end agreed on with an earlier process is put
//!             │                                in its mouth, then rings
//!             └─ nothing ([`MUTE_AFTER`]) ───▶ mute: it has to be stopped and made to run again before it speaks
//! ```
//!
//! QEMU before 8.2 loses track of its device when a back-end goes away while the guest is paused (fixed there by
//! "vhost-user: fix lost reconnect"): it connects again, but takes the new connection for the old one. Running a
//! paused guest makes it set up the rings there, without a greeting.
//!
//! Invariant: a primed conversation assumes what [`PROTOCOL`] says was agreed on, which every supported QEMU does agree
//! on; features that a guest chose are said again by QEMU itself.
//!
//! Not here: what is made of the messages (`frontend`); who wakes a mute one (`vm::local`).

#![expect(unsafe_code, reason = "the handler gives no other way to exchange its connection")]

use std::io::{self, Read as _, Write as _};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::frontend::Frontend;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// A front-end that has said nothing for so long will not by itself: QEMU greets in the instant in which it connects.
pub(super) const MUTE_AFTER: Duration = Duration::from_millis(300);

/// What is offered to QEMU, and what every version of it takes.
pub(super) const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// What is offered beyond that, and taken by newer ones only: requests that do not end at a pause go along in the
/// in-flight record, which QEMU from 11 on moves with its device (`inflight-migration=on`).
pub(super) const NEWER: VhostUserProtocolFeatures = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;

// Requests and header, as the specification of vhost-user numbers them.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 12;

/// Waits for the next message, which stays to be read: its request. None if the front-end goes away.
pub(super) fn peek_request(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut request = [0; 4];
    loop {
        let flags = RecvFlags::PEEK | RecvFlags::WAITALL;
        match recv(stream, &mut request[..], flags) {
            Ok((_, got)) if got < request.len() => return Ok(None),
            Ok(_) => return Ok(Some(u32::from_ne_bytes(request))),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for the first message, which stays to be read: whether it is a greeting. None if the front-end goes away.
pub(super) fn begins_with_greeting(stream: &UnixStream) -> io::Result<Option<bool>> {
    let greets = |request| matches!(request, GET_FEATURES | SET_OWNER | GET_PROTOCOL_FEATURES);
    Ok(peek_request(stream)?.map(greets))
}

/// A handler for `stream` to which the front-end's part of the greeting has been said.
pub(super) fn primed(
    stream: &UnixStream,
    frontend: &Arc<Mutex<Frontend>>,
) -> Result<BackendReqHandler<Mutex<Frontend>>> {
    let action = "take up a front-end's conversation";
    let (ours, mut theirs) = UnixStream::pair().context(action)?;
    let mut handler = BackendReqHandler::from_stream(ours, Arc::clone(frontend));
    let protocol_features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let messages = [
        (GET_FEATURES, None),
        (SET_FEATURES, Some(protocol_features)),
        (SET_PROTOCOL_FEATURES, Some(PROTOCOL.bits())),
    ];
    for (request, value) in messages {
        let mut message = Vec::with_capacity(HEADER_BYTES + 8);
        let length = if value.is_some() { 8 } else { 0 };
        [request, VERSION, length].iter().for_each(|word| message.extend(word.to_ne_bytes()));
        message.extend(value.iter().flat_map(|value| value.to_ne_bytes()));
        theirs.write_all(&message).context(action)?;
        handler.handle_request().map_err(|error| Error::with_source(ErrorKind::Internal, action, error))?;
        if value.is_none() {
            theirs.read_exact(&mut [0; HEADER_BYTES + 8]).context(action)?;
        }
    }
    // SAFETY: the descriptor is open, since the handler owns it and is alive. It is not closed here (`ManuallyDrop`),
    // and nobody else uses it: `handler` is ours alone. `dup2` puts the front-end's connection in its place, which the
    // handler will close as its own.
    let mut own = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(handler.as_raw_fd()) });
    rustix::io::dup2(stream, &mut own).map_err(io::Error::from).context(action)?;
    Ok(handler)
}
