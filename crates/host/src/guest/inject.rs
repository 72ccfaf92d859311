//! Makes a userfaultfd inside a running QEMU, and takes it out.
//!
//! ```text
//!   agent ─ ptrace ─▶ QEMU's main thread: userfaultfd(), or ioctl on /dev/userfaultfd ─▶ descriptor
//!         ◀─────────── pidfd_getfd ─────────────────────────────────────────────────────┘  (closed there again)
//! ```
//!
//! Ways, in order, until one is let through: the system call with all rights (if QEMU has them), the system call
//! for faults of user mode only (enough to track writes: the kernel lifts asynchronous write-protection whoever
//! writes), the ioctl on a descriptor of /dev/userfaultfd that QEMU is given over QMP.
//!
//! Invariants
//! * One thread of QEMU stands still, below 2 ms; the guest's processors run on.
//! * A failure half-way leaves QEMU as it was. A seccomp filter is asked, never tried.
//! * Ours is the only descriptor: when it is closed, by the kernel if the agent dies, all tracking is undone.
//!
//! Not here: the stopping and calling (`tracee`), what the descriptor is used for (`dirty`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde_json::{Value, json};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::proc_fs;
use crate::guest::process::QemuProcess;
use crate::guest::qmp::Qmp;
use crate::guest::tracee::{Hurry, Tracee, find_syscall};
use crate::guest::uffd;

/// Gives userfaultfds to whoever may open it.
const DEVICE: &str = "/dev/userfaultfd";
const FD_NAME: &str = "whimbrel-uffd";

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Injected {
    /// Our copy of the descriptor; the API is not agreed on yet.
    pub uffd: OwnedFd,
    /// How long the one thread stood still: from the order to stop until it was let go.
    pub stopped: Duration,
}

/// The call that makes the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// userfaultfd(2) with further flags.
    Call(i32),
    /// `USERFAULTFD_IOC_NEW` on this descriptor of QEMU's.
    Ioctl(i32),
}

impl Way {
    fn call(self) -> (i64, [u64; 6]) {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let word = |value: i32| u64::from(value.cast_unsigned());
        match self {
            Self::Call(more) => (libc::SYS_userfaultfd, [word(flags | more), 0, 0, 0, 0, 0]),
            Self::Ioctl(fd) => (libc::SYS_ioctl, [word(fd), uffd::IOC_NEW, word(flags), 0, 0, 0]),
        }
    }
}

/// Makes a userfaultfd inside a QEMU by running one system call in its main thread. Its guest's processors run on.
/// The descriptor inside QEMU is closed again: when ours is closed, by the kernel if the agent dies, all is undone.
pub async fn userfaultfd_of(qmp: &Qmp, process: &QemuProcess) -> Result<Injected> {
    make(qmp, process, true).await
}

/// The same, for a descriptor that also gets the faults of the kernel on QEMU's behalf: whoever stops a guest's writes
/// until the agent has looked needs that, or system calls of QEMU's would fail.
pub async fn serving_userfaultfd_of(qmp: &Qmp, process: &QemuProcess) -> Result<Injected> {
    make(qmp, process, false).await
}

async fn make(qmp: &Qmp, process: &QemuProcess, user_mode_will_do: bool) -> Result<Injected> {
    let mut ways = Vec::new();
    if proc_fs::has_capability(process.pid(), proc_fs::CAP_SYS_PTRACE)? || unprivileged_allowed() {
        ways.push(Way::Call(0));
    }
    if user_mode_will_do {
        ways.push(Way::Call(uffd::USER_MODE_ONLY));
    }
    let mut tried = Vec::new();
    for way in ways {
        match inject(process, way).await {
            Err(error) if matches!(error.kind(), ErrorKind::Missing | ErrorKind::Io) => {
                tried.push(format!("{way:?}: {error}"));
            }
            other => return log(process, way, other),
        }
    }
    match with_device(qmp, process).await {
        Err(error) => {
            tried.push(format!("{DEVICE}: {error}"));
            let words = format!("make a userfaultfd in process {}: {}", process.pid(), tried.join("; "));
            Err(Error::new(ErrorKind::Missing, words).hint("the VM can still be moved in mode B"))
        }
        other => other,
    }
}

fn log(process: &QemuProcess, way: Way, result: Result<Injected>) -> Result<Injected> {
    if let Ok(injected) = &result {
        let stopped_us = injected.stopped.as_micros();
        tracing::info!(pid = process.pid(), ?way, stopped_us, "made a userfaultfd in QEMU");
    }
    result
}

fn unprivileged_allowed() -> bool {
    std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|text| text.trim() == "1")
}

/// Whether the kernel tells this process the seccomp filters of another: it wants CAP_SYS_ADMIN, and that of the host's
/// own user namespace.
pub(crate) fn may_ask_filters() -> Result<bool> {
    let map = std::fs::read_to_string("/proc/self/uid_map").context("read /proc/self/uid_map")?;
    let all = map.split_whitespace().eq(["0", "0", "4294967295"]);
    Ok(all && proc_fs::has_capability(std::process::id(), proc_fs::CAP_SYS_ADMIN)?)
}

/// Whether [`DEVICE`] may be opened, and lent to QEMU.
pub(crate) fn device_opens() -> bool {
    OpenOptions::new().read(true).write(true).open(DEVICE).is_ok()
}

/// Lends QEMU a descriptor of /dev/userfaultfd for the time of one ioctl.
async fn with_device(qmp: &Qmp, process: &QemuProcess) -> Result<Injected> {
    let device: File =
        OpenOptions::new().read(true).write(true).open(DEVICE).with_context(|| format!("open {DEVICE}"))?;
    qmp.execute_with_fd::<Value>("getfd", json!({ "fdname": FD_NAME }), device.as_fd()).await?;
    let lent = proc_fs::descriptors(process.pid())?;
    let lent = lent.into_iter().rev().find(|(_, target)| target == Path::new(DEVICE));
    let result = match lent {
        Some((fd, _)) => log(process, Way::Ioctl(fd), inject(process, Way::Ioctl(fd)).await),
        None => Err(Error::new(ErrorKind::Missing, format!("find {DEVICE} among QEMU's descriptors"))),
    };
    qmp.execute::<Value>("closefd", json!({ "fdname": FD_NAME })).await?;
    result
}

async fn inject(process: &QemuProcess, way: Way) -> Result<Injected> {
    let pid = process.pid();
    let pidfd = process.pidfd().try_clone().context("copy a descriptor")?;
    // A thread of its own: ptrace is bound to the thread, and if it ends early the kernel lets QEMU go.
    let thread = move || inject_blocking(pid, &pidfd, way);
    let done = tokio::task::spawn_blocking(|| std::thread::spawn(thread).join());
    let joined = done.await.map_err(|error| Error::with_source(ErrorKind::Internal, "inject", error))?;
    joined.map_err(|_| Error::new(ErrorKind::Internal, "inject: the thread panicked"))?
}

fn inject_blocking(pid: u32, pidfd: &OwnedFd, way: Way) -> Result<Injected> {
    let action = || format!("make a userfaultfd in process {pid}");
    let at = find_syscall(pid)?;
    let tid = i32::try_from(pid).map_err(|_| Error::new(ErrorKind::InvalidInput, action()))?;
    let _hurry = Hurry::up(0);
    let mut tracee = Tracee::stop(pid, tid, at)?;
    let (number, arguments) = way.call();
    let remote = tracee.call(number, arguments).with_context(action)?;
    let remote_fd = i32::try_from(remote).map_err(|_| Error::new(ErrorKind::Internal, action()))?;
    let ours = pidfd_getfd(pidfd, remote_fd, PidfdGetfdFlags::empty()).map_err(io::Error::from);
    // Also if that failed: nothing stays behind in QEMU.
    let closed = tracee.call(libc::SYS_close, [remote.cast_unsigned(), 0, 0, 0, 0, 0]);
    let since = tracee.started();
    drop(tracee);
    let stopped = since.elapsed();
    closed.with_context(action)?;
    Ok(Injected { uffd: ours.with_context(action)?, stopped })
}
