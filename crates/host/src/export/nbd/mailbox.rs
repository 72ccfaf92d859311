//! Where threads of a connection that waited for something leave their answers; the connection's own thread sends
//! them.
//!
//! Invariant: an answer that was posted before the connection's thread looked is seen by it, or wakes it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::Result;
use crate::export::event::Waker;

/// What became of a request.
pub(super) enum Outcome {
    /// Send this.
    Reply(Vec<u8>),
    /// The service ends: the client must see its connection closed, not an error, so that it asks elsewhere.
    Close,
}

/// An answer, and what its request took of the connection's bounds.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) bytes: usize,
}

/// See the module's charter.
pub(super) struct Mailbox {
    answers: Mutex<Vec<Answer>>,
    waker: Waker,
    closed: AtomicBool,
}

impl Mailbox {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { answers: Mutex::default(), waker: Waker::new()?, closed: AtomicBool::new(false) })
    }

    pub(super) fn post(&self, answer: Answer) {
        self.answers.lock().push(answer);
        self.waker.wake();
    }

    /// Takes what was posted.
    pub(super) fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut *self.answers.lock())
    }

    /// Says that the thread is about to sleep; `false` if there is something to take instead.
    pub(super) fn prepare_to_sleep(&self) -> bool {
        self.waker.prepare();
        let nothing = self.answers.lock().is_empty();
        if !nothing {
            self.waker.awake();
        }
        nothing
    }

    /// Says that the thread woke up.
    pub(super) fn awake(&self) {
        self.waker.awake();
        self.waker.clear();
    }

    /// The connection is gone: long work for it may end early.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}
