//! Eventfds: waking a queue's thread, and signalling what came from a front-end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Context, Result};

/// Wakes a thread that sleeps on an eventfd, at the price of a system call only if it really sleeps.
///
/// The sleeper calls [`Waker::prepare`], looks once more whether there is something to do, and only then sleeps.
pub(super) struct Waker {
    fd: OwnedFd,
    sleeping: AtomicBool,
}

impl Waker {
    pub(super) fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("make an eventfd")?;
        Ok(Self { fd, sleeping: AtomicBool::new(false) })
    }

    /// Says that the thread is about to sleep. What was made visible before a `wake` that comes too early for
    /// this is visible to the caller after it.
    pub(super) fn prepare(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that the thread does not sleep any more.
    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Forgets wakes that came, for a sleeper that would see them again and again.
    pub(super) fn clear(&self) {
        // Nothing to read: nobody woke it.
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
    }

    /// Wakes the thread if it sleeps or is about to.
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.swap(false, Ordering::Relaxed) {
            signal(self.fd.as_fd());
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Adds one to an eventfd. A descriptor that came from a front-end may be anything: failures are its own loss.
pub(super) fn signal(fd: BorrowedFd<'_>) {
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}
