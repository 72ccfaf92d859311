//! The lab's network: two bridges (hosts, guests), a veth pair per host to each, and link classes.

use anyhow::{Context as _, Result};

use crate::cmd::{capture, cmd, run};

/// What the link between two hosts is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// As fast as the machine moves packets.
    Open,
    /// 1 Gbit/s.
    Gbit1,
    /// 10 Gbit/s.
    Gbit10,
}

impl Link {
    /// As in the names of figures.
    pub fn name(self) -> &'static str {
        match self {
            Link::Open => "open",
            Link::Gbit1 => "1g",
            Link::Gbit10 => "10g",
        }
    }
}

/// The address of the lab itself on the hosts' network.
pub const FABRIC_ADDRESS: &str = "10.77.0.1";

fn ip(args: &str) -> Result<()> {
    run(&mut cmd("ip", &args.split_whitespace().collect::<Vec<_>>()))
}

/// Whether this network namespace has an interface; /sys shows those of the namespace it was mounted in.
fn has_interface(name: &str) -> Result<bool> {
    Ok(crate::cmd::output(&mut cmd("ip", &["link", "show", "dev", name]))?.status.success())
}

/// The bridges, which all labs of one process share.
pub fn make_fabric(lab: &str) -> Result<()> {
    for (bridge, address) in [("fab0", FABRIC_ADDRESS), ("guests0", "10.78.0.1")] {
        if has_interface(bridge)? {
            continue;
        }
        ip(&format!("link add {bridge} type bridge forward_delay 0"))
            .with_context(|| format!("make the network of lab {lab}"))?;
        ip(&format!("addr add {address}/24 dev {bridge}"))?;
        ip(&format!("link set {bridge} up"))?;
    }
    Ok(())
}

/// A host's namespace with `eth0` on the hosts' network and `br0` on the guests'.
pub fn add_host(ns: &str, number: usize) -> Result<()> {
    let id = ns.replace('-', "");
    ip(&format!("netns add {ns}"))?;
    ip(&format!("link add f{id} type veth peer name eth0 netns {ns}"))?;
    ip(&format!("link set f{id} master fab0 up"))?;
    ip(&format!("-n {ns} addr add {}/24 dev eth0", address(number)))?;
    ip(&format!("-n {ns} link set eth0 up"))?;
    ip(&format!("-n {ns} link set lo up"))?;
    ip(&format!("link add g{id} type veth peer name eth1 netns {ns}"))?;
    ip(&format!("link set g{id} master guests0 up"))?;
    ip(&format!("-n {ns} link add br0 type bridge forward_delay 0"))?;
    ip(&format!("-n {ns} link set eth1 master br0 up"))?;
    ip(&format!("-n {ns} link set br0 up"))
}

/// Takes a host's namespace away.
pub fn remove_host(ns: &str) -> Result<()> {
    ip(&format!("netns del {ns}"))?;
    for side in ["f", "g"] {
        let name = format!("{side}{}", ns.replace('-', ""));
        if has_interface(&name)? {
            ip(&format!("link del {name}"))?;
        }
    }
    Ok(())
}

/// The address of host `number` on the hosts' network.
pub fn address(number: usize) -> String {
    format!("10.77.0.{}", 10 + number)
}

/// Keeps these hosts from hearing each other, without telling them, or no longer. All other hosts reach them.
pub fn set_apart(names: &[&str], apart: bool) -> Result<()> {
    let state = if apart { "on" } else { "off" };
    names.iter().try_for_each(|ns| {
        ip(&format!("link set dev f{} type bridge_slave isolated {state}", ns.replace('-', "")))
    })
}

/// Ends every TCP connection of a host to `address` by a reset as soon as it sends something, or no longer.
pub fn reset_to(ns: &str, address: &str, on: bool) -> Result<()> {
    let nft = |args: &str| {
        let mut c = cmd("ip", &["netns", "exec", ns, "nft"]);
        c.args(args.split_whitespace());
        run(&mut c)
    };
    if !on {
        return nft("delete table ip lab");
    }
    nft("add table ip lab")?;
    nft("add chain ip lab out { type filter hook output priority 0 ; }")?;
    nft(&format!("add rule ip lab out ip daddr {address} meta l4proto tcp reject with tcp reset"))
}

/// Shapes what goes out of a host and what comes into it.
pub fn shape(ns: &str, link: Link) -> Result<()> {
    let outer = format!("f{}", ns.replace('-', ""));
    for (inside, dev) in [(Some(ns), "eth0"), (None, outer.as_str())] {
        let tc = |args: &str| {
            let mut c = cmd("tc", &[]);
            if let Some(ns) = inside {
                c.args(["-n", ns]);
            }
            c.args(args.split_whitespace());
            c
        };
        // There is nothing to delete the first time.
        drop(crate::cmd::output(&mut tc(&format!("qdisc del dev {dev} root")))?);
        let (rate, burst, queue) = match link {
            Link::Open => continue,
            Link::Gbit1 => ("1gbit", "256k", "4m"),
            Link::Gbit10 => ("10gbit", "2m", "16m"),
        };
        run(&mut tc(&format!("qdisc add dev {dev} root handle 1: htb default 10 r2q 1000")))?;
        run(&mut tc(&format!(
            "class add dev {dev} parent 1: classid 1:10 htb rate {rate} ceil {rate} burst {burst} cburst {burst}"
        )))?;
        run(&mut tc(&format!("qdisc add dev {dev} parent 1:10 bfifo limit {queue}")))?;
    }
    Ok(())
}

/// Bytes out of a host's `eth0`.
pub fn bytes_out(ns: &str) -> Result<u64> {
    let text = capture(&mut cmd("ip", &["-n", ns, "-s", "-j", "link", "show", "dev", "eth0"]))?;
    let value: serde_json::Value = serde_json::from_str(&text).context("read interface counters")?;
    value.pointer("/0/stats64/tx/bytes").and_then(|v| v.as_u64()).context("find the sent bytes of eth0")
}
