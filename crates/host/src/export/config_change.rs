//! Telling a front-end that its device has another size.
//!
//! ```text
//!   SET_BACKEND_REQ_FD ──▶ its channel is kept
//!   resized, or a ring starts, and the front-end was told another size ──▶ CONFIG_CHANGE_MSG on the channel
//!   GET_CONFIG ──▶ told
//! ```
//!
//! QEMU asks for the configuration when it hears this, and interrupts its guest if the capacity is another one. While
//! the device is not started (the guest is paused, or its driver is not there yet) QEMU lets the message pass without a
//! look, so it is said again whenever a ring starts.
//!
//! The handler of messages takes the channel's descriptor and offers other messages than this one for it, so a second
//! descriptor is taken here before: from the message while it still lies in the socket.
//!
//! Invariant: nothing here waits for a front-end but [`SizeNotice::deliver`], which has a limit.
//!
//! Not here: what the configuration says (`blk`).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};

use super::greeting::{HEADER_BYTES, VERSION, peek_request};

// As the specification of vhost-user numbers them: the first from the front-end, the second to it.
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE_MSG: u32 = 2;

/// What a front-end knows of its device's size, and how it can be told another one.
#[derive(Default)]
pub(super) struct Notifier {
    state: Mutex<State>,
    heard: Condvar,
}

#[derive(Default)]
struct State {
    channel: Option<OwnedFd>,
    /// As it was last told by the front-end's own question.
    told_bytes: Option<u64>,
}

impl Notifier {
    /// This front-end listens there.
    pub(super) fn listens(&self, channel: OwnedFd) {
        self.state.lock().channel = Some(channel);
    }

    /// It has asked, and knows.
    pub(super) fn told(&self, size_bytes: u64) {
        self.state.lock().told_bytes = Some(size_bytes);
        self.heard.notify_all();
    }

    /// Has it ask, unless it knows.
    pub(super) fn tell(&self, size_bytes: u64) {
        let state = self.state.lock();
        let Some(channel) = state.channel.as_ref().filter(|_| state.told_bytes != Some(size_bytes)) else {
            return;
        };
        let mut message = [0; HEADER_BYTES];
        for (into, word) in message.chunks_exact_mut(4).zip([CONFIG_CHANGE_MSG, VERSION, 0]) {
            into.copy_from_slice(&word.to_ne_bytes());
        }
        if let Err(error) = send(channel, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            tracing::warn!(%error, "a front-end cannot be told the size of its disk; it is when it connects again");
        }
    }

    /// Whether it knows, by `deadline`.
    fn knows(&self, size_bytes: u64, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.told_bytes != Some(size_bytes) {
            if self.heard.wait_until(&mut state, deadline).timed_out() {
                return state.told_bytes == Some(size_bytes);
            }
        }
        true
    }
}

/// A size that a connected front-end is to hear of.
pub struct SizeNotice {
    pub(super) notifier: Arc<Notifier>,
    pub(super) size_bytes: u64,
}

impl SizeNotice {
    /// Tells it, and waits until it has asked for the new size; whether it has within `limit`.
    pub fn deliver(self, limit: Duration) -> bool {
        self.notifier.tell(self.size_bytes);
        self.notifier.knows(self.size_bytes, Instant::now() + limit)
    }
}

/// Waits for the next message, which stays to be read: the channel that it brings, if that is what it is for. An end of
/// the connection is left to who reads on.
pub(super) fn channel_in_next(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    if peek_request(stream)? != Some(SET_BACKEND_REQ_FD) {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut header = [0; HEADER_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    rustix::io::retry_on_intr(|| recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut control, flags))?;
    let mut found = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            found = descriptors.next();
        }
    }
    Ok(found)
}
