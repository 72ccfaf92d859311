//! This machine's own addresses.
#![expect(unsafe_code, reason = "getifaddrs hands out a C list")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{Context as _, Result};

/// Addresses under which others may reach this machine: no loopback, no link-local ones; IPv4 first. Loopback if
/// there is nothing else.
pub fn own_addresses() -> Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the result; it is freed below exactly once.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(std::io::Error::last_os_error()).context("list this machine's addresses");
    }
    let mut next = list;
    // SAFETY: `next` is null or a member of the list, which is not freed before the loop ends.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        let Ok(flags) = i32::try_from(entry.ifa_flags) else { continue };
        if flags & libc::IFF_UP == 0 || entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: a non-null address starts with its family; its type follows from the family.
        found.extend(unsafe { read(entry.ifa_addr) }.filter(|ip| is_reachable(*ip)));
    }
    // SAFETY: `list` came from getifaddrs and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    found.sort_by_key(IpAddr::is_ipv6);
    if found.is_empty() {
        found.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    Ok(found)
}

/// # Safety
/// `address` points to a socket address whose size fits its family.
unsafe fn read(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: promised by the caller.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: promised by the caller; the family is IPv4's.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr))))
        }
        libc::AF_INET6 => {
            // SAFETY: promised by the caller; the family is IPv6's.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}

fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn there_is_always_an_address() {
        let found = own_addresses().unwrap();
        assert!(!found.is_empty());
        assert!(found.iter().all(|ip| !ip.is_unspecified()));
    }
}
