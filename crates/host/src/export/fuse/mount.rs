//! Mounts: the system calls.

#![expect(unsafe_code, reason = "mount(2) and umount2(2) have no safe face here")]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};

/// How something is mounted; never with programs, devices or set-user-id bits that count.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MountFlags {
    /// Nobody may write.
    pub(super) read_only: bool,
    /// Change what is mounted there.
    pub(super) remount: bool,
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|error| Error::with_source(ErrorKind::InvalidInput, "name a mount", error))
}

/// Mounts `source` of type `kind` at `target`.
pub(super) fn mount(source: &str, target: &Path, kind: &str, flags: MountFlags, data: &str) -> Result<()> {
    let mut bits = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    bits |= if flags.read_only { libc::MS_RDONLY } else { 0 };
    bits |= if flags.remount { libc::MS_REMOUNT } else { 0 };
    let source = c_string(source.as_bytes())?;
    let place = c_string(target.as_os_str().as_bytes())?;
    let kind = c_string(kind.as_bytes())?;
    let data = c_string(data.as_bytes())?;
    // SAFETY: all four are C strings that live until the call returns; the kernel copies what it keeps of them.
    let result =
        unsafe { libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), bits, data.as_ptr().cast()) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).with_context(|| format!("mount {}", target.display()))
}

/// Aborts the connection of the FUSE mount at `target`, whoever uses it, and takes the mount away.
pub(super) fn abort_and_detach(target: &Path) -> io::Result<()> {
    unmount(target, libc::MNT_FORCE | libc::MNT_DETACH)
}

/// Takes away what is mounted at `target`, with all that is mounted below; who has files open keeps them.
pub(super) fn detach(target: &Path) -> io::Result<()> {
    unmount(target, libc::MNT_DETACH)
}

fn unmount(target: &Path, flags: libc::c_int) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: a C string that lives until the call returns.
    match unsafe { libc::umount2(target.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
