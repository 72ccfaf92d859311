//! Makes a userfaultfd inside a running QEMU, and takes it out.
//!
//! Not here: what the descriptor is used for (`dirty`).

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::process::QemuProcess;
use crate::guest::qmp::Qmp;

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Injected {
    /// Our copy of the descriptor; the API is not agreed on yet.
    pub uffd: OwnedFd,
    /// How long the one thread stood still.
    pub stopped: Duration,
}

/// Makes a userfaultfd inside a QEMU by running one system call in its main thread. Its guest's processors run on.
/// The descriptor inside QEMU is closed again: when ours is closed, by the kernel if the agent dies, all is undone.
pub async fn userfaultfd_of(qmp: &Qmp, process: &QemuProcess) -> Result<Injected> {
    let _ = (qmp, process);
    Err(Error::new(ErrorKind::Unsupported, "make a userfaultfd in QEMU: not there yet"))
}
