//! A tap: the host's end of a VM's network interface, attached to a bridge and up before the VM runs.
//!
//! Invariant: the interface lives as long as a descriptor of it is open, here or in QEMU: dropping the [`Tap`]
//! removes it unless [`Tap::into_fd`] handed the descriptor over and QEMU holds it.
//!
//! Not here: the virtual network between hosts.
#![expect(unsafe_code, reason = "ioctls with structures of the kernel")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::{Context, ErrorKind, Result};

/// Adds the interface with an index to the bridge with a name (linux/sockios.h; libc lacks it).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
const TUN_PATH: &str = "/dev/net/tun";

/// See the module's charter.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Makes a tap named `name`, or by the kernel if none is given, attaches it to `bridge` and brings it up.
    pub fn create(name: Option<&str>, bridge: &str) -> Result<Self> {
        let action = || format!("make a tap on bridge {bridge}");
        index_of(bridge).with_context(action).map_err(|error| match error.kind() {
            ErrorKind::NotFound => error.hint(format!("make it: ip link add {bridge} type bridge")),
            _ => error,
        })?;
        let tun = OpenOptions::new().read(true).write(true).open(TUN_PATH);
        let tun = tun.with_context(|| format!("{}: open {TUN_PATH}", action())).map_err(|error| {
            error.hint(format!(
                "the agent must be able to read and write {TUN_PATH}; run the VM without --net otherwise"
            ))
        })?;
        let mut request = request_for(name.unwrap_or("wbtap%d")).with_context(action)?;
        // The header lets QEMU pass checksums and large segments through instead of computing them.
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as i16;
        // SAFETY: TUNSETIFF takes a `struct ifreq`.
        unsafe { ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) }.with_context(action)?;
        let tap = Self { fd: tun.into(), name: name_in(&request) };
        tap.attach(bridge).with_context(action)?;
        tap.bring_up().with_context(action)?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor, for QEMU.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    fn attach(&self, bridge: &str) -> io::Result<()> {
        let control = control_socket()?;
        let mut request = request_for(bridge)?;
        request.ifr_ifru.ifru_ifindex = index_of(&self.name)?;
        // SAFETY: SIOCBRADDIF takes a `struct ifreq`.
        unsafe { ioctl(control.as_raw_fd(), SIOCBRADDIF, &mut request) }
    }

    fn bring_up(&self) -> io::Result<()> {
        let control = control_socket()?;
        let mut request = request_for(&self.name)?;
        // SAFETY: both take a `struct ifreq`; the kernel filled in the flags that are read.
        unsafe {
            ioctl(control.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request)?;
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
            ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request)
        }
    }
}

fn control_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn index_of(name: &str) -> io::Result<i32> {
    let control = control_socket()?;
    let mut request = request_for(name)?;
    // SAFETY: SIOCGIFINDEX takes a `struct ifreq`, and fills in the index that is read.
    unsafe {
        ioctl(control.as_raw_fd(), libc::SIOCGIFINDEX, &mut request).map_err(|error| {
            let missing = error.raw_os_error() == Some(libc::ENODEV);
            if missing {
                io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}"))
            } else {
                error
            }
        })?;
        Ok(request.ifr_ifru.ifru_ifindex)
    }
}

fn request_for(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: a structure of integers and bytes; all zeros are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
        let words = format!("{name:?} is not the name of an interface (1 to 15 characters)");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|c| c.cast_unsigned()).take_while(|&c| c != 0).collect();
    String::from_utf8(bytes).unwrap_or_default()
}

/// # Safety
/// `request` takes a `struct ifreq`.
unsafe fn ioctl(fd: i32, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: by the caller; the reference lives for the call.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
