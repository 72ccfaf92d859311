//! Unix sockets that an unprivileged QEMU may connect to, and nobody else.

use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{Gid, Mode, Uid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Context, Error, ErrorKind, Result};

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOwner {
    /// User that owns the socket.
    pub uid: u32,
    /// Group that owns the socket.
    pub gid: u32,
    /// Permission bits, e.g. 0o600.
    pub mode: u32,
}

/// Binds `path`, replacing a socket that an earlier process left; nobody can connect before owner and mode are set.
pub(super) fn listen(path: &Path, owner: Option<SocketOwner>) -> Result<UnixListener> {
    remove_stale(path)?;
    let what = || format!("listen on {}", path.display());
    let address = SocketAddrUnix::new(path).with_context(what)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .with_context(what)?;
    rustix::net::bind(&socket, &address).with_context(what)?;
    let mode = owner.map_or(0o600, |owner| owner.mode);
    rustix::fs::chmod(path, Mode::from_raw_mode(mode)).with_context(what)?;
    if let Some(owner) = owner {
        rustix::fs::chown(path, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
            .with_context(|| format!("give {} to user {}", path.display(), owner.uid))?;
    }
    rustix::net::listen(&socket, 16).with_context(what)?;
    Ok(UnixListener::from(socket))
}

fn remove_stale(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("remove old socket {}", path.display()))
        }
        Ok(_) => Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("listen on {}: it exists and is not a socket", path.display()),
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("look at {}", path.display())),
    }
}
