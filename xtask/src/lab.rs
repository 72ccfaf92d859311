//! Several hosts on one machine: each a network and mount namespace with its own agent, directories and addresses.
//!
//! ```text
//!   xtask ─exec─▶ sh (removes the directory at the end) ─▶ unshare: own mounts, network, process ids
//!     └─▶ xtask again, process 1 in there:
//!            fab0 10.77.0.1 ──veth── h1: eth0 10.77.0.11   agent, QEMU, br0 ──┐
//!                        └──veth── h2: eth0 10.77.0.12   agent, QEMU, br0 ──┴── guests0 10.78.0.1
//! ```
//!
//! Invariants: when the inner process ends, however it ends, the kernel ends every process in there and takes the
//! interfaces and mounts away; nothing outside the lab's directory is written.
//!
//! Not here: what is done with the hosts (`demo.rs`, `e2e/`, `bench/`).

mod enter;
mod host;
mod net;
mod s3;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};

pub use enter::{enter, inside, keep_running, one_user_only, own_directory, prepared};
pub use host::{Host, VmArgs, VmSockets, port_args};
pub use net::Link;
pub use s3::S3;

use crate::cmd::{cmd, run};
use crate::guest::Image;
use crate::qemu::Qemu;

/// Places on the hosts' network that are taken.
static PLACES: AtomicUsize = AtomicUsize::new(0);

/// Hosts of this lab, and the network between them.
pub struct Lab {
    dir: PathBuf,
    hosts: Vec<Host>,
    /// QEMU as seen in the lab.
    pub qemu: Qemu,
    /// The guest image as seen in the lab.
    pub image: Image,
    next_vm: Cell<u32>,
}

impl Lab {
    /// Sets up `count` hosts without agents, in a fresh directory of the lab. Must run inside [`enter()`].
    pub fn new(name: &str, count: usize, qemu: &Qemu, image: &Image) -> Result<Lab> {
        let dir = own_directory()?.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        // QEMU runs as an unprivileged user, who may not be able to walk to where these really are.
        let qemu = Qemu { version: qemu.version, bin: show_through(&qemu.bin, &dir.join("qemu"), "bin")? };
        let guest = dir.join("guest");
        let image = Image {
            kernel: show_through(&image.kernel, &guest, "vmlinuz")?,
            initrd: show_through(&image.initrd, &guest, "initrd.img")?,
            disk: show_through(&image.disk, &guest, "disk.raw")?,
        };
        net::make_fabric(name)?;
        // Labs of one process share the hosts' network.
        let first = PLACES.fetch_add(count, Ordering::Relaxed);
        let hosts = (1..=count).map(|n| Host::new(&dir, name, n, first + n, &qemu)).collect::<Result<_>>()?;
        Ok(Lab { dir, hosts, qemu, image, next_vm: Cell::new(2) })
    }

    /// The hosts, in order.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Two of them.
    pub fn pair(&self) -> (&Host, &Host) {
        match self.hosts.as_slice() {
            [a, b, ..] => (a, b),
            // A lab is made with at least two hosts by everyone who asks for a pair.
            _ => unreachable!("a lab with one host has no pair"),
        }
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// An address for a guest's interface, `IP/PREFIX`, fresh at each call.
    pub fn guest_address(&self) -> String {
        let n = self.next_vm.get();
        self.next_vm.set(n + 1);
        format!("10.78.0.{n}/24")
    }

    /// Cuts the two hosts off from each other, silently, or joins them again; others reach both.
    pub fn set_cut(&self, a: &Host, b: &Host, cut: bool) -> Result<()> {
        net::set_apart(&[a.name(), b.name()], cut)
    }

    /// Makes every host's interface a link of this class.
    pub fn shape(&self, link: Link) -> Result<()> {
        self.hosts.iter().try_for_each(|h| net::shape(h.name(), link))
    }

    /// Bytes that went out of `from` towards the others so far, as its interface counts them.
    pub fn bytes_out(&self, from: &Host) -> Result<u64> {
        net::bytes_out(from.name())
    }

    /// Makes one more QEMU visible in the lab.
    pub fn show_qemu(&self, qemu: &Qemu) -> Result<Qemu> {
        let place = self.dir.join(format!("qemu-{}", qemu.version.name()));
        Ok(Qemu { version: qemu.version, bin: show_through(&qemu.bin, &place, "bin")? })
    }

    /// Lets each agent see its own host's directory only, and none of other labs' or of stores; programs and guest
    /// images stay visible. To be called before the agents start.
    pub fn hide_hosts_from_each_other(&self) -> Result<()> {
        let list = |dir: &Path| -> Result<Vec<PathBuf>> {
            let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
            Ok(entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect())
        };
        let shared = ["qemu", "guest"].map(|name| self.dir.join(name));
        let mut all: Vec<PathBuf> = list(&own_directory()?)?.into_iter().filter(|p| *p != self.dir).collect();
        all.extend(list(&self.dir)?.into_iter().filter(|p| !shared.contains(p)));
        for host in &self.hosts {
            host.hide(all.iter().filter(|p| *p != host.dir()).cloned().collect());
        }
        Ok(())
    }

    /// Starts the agents and makes one cluster of them, images in a store of the lab's own.
    pub fn start_cluster(&self, whimbrel: &Path) -> Result<()> {
        let store = self.dir.join("store");
        fs::create_dir_all(&store).context("make the image store")?;
        self.start_cluster_with(whimbrel, &store.to_string_lossy(), &[])
    }

    /// The same with images in the store at `url`, and environment variables for the agents.
    pub fn start_cluster_with(&self, whimbrel: &Path, url: &str, env: &[(&str, &str)]) -> Result<()> {
        for host in &self.hosts {
            host.start_agent_with(whimbrel, env)?;
        }
        let Some((first, others)) = self.hosts.split_first() else { return Ok(()) };
        first.whimbrel(&["cluster", "init", "--name", "lab", "--store", url])?;
        for host in others {
            let token = first.whimbrel(&["cluster", "token"])?;
            let token =
                token.get("token").and_then(|t| t.as_str()).context("read the join token")?.to_owned();
            host.whimbrel(&["host", "join", first.peer_address(), "--token", &token])?;
        }
        Ok(())
    }
}

/// Whether guests can have interfaces here: without root that depends on the mode of /dev/net/tun.
pub fn has_taps() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok()
}

/// The process of a VM's QEMU, on whatever host of this lab.
pub fn qemu_pid(vm: &str) -> Result<u32> {
    process_with(&format!("/vms/{vm}/"))
}

/// The QEMU whose command line contains `needle`.
pub fn process_with(needle: &str) -> Result<u32> {
    let found = processes_with(needle)?.into_iter().next();
    found.with_context(|| format!("find a QEMU with {needle} on its command line: there is none"))
}

/// Every QEMU whose command line contains `needle`.
pub fn processes_with(needle: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list processes")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.split(' ').next().unwrap_or_default().contains("qemu-system") && line.contains(needle) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Bind-mounts `what` below `under`, where anybody can reach it.
fn show_through(what: &Path, under: &Path, name: &str) -> Result<PathBuf> {
    fs::create_dir_all(under).with_context(|| format!("create {}", under.display()))?;
    if what.is_dir() {
        // A program's directory brings its neighbours (libraries, firmware) along.
        let home = what.parent().context("a directory to show has a parent")?;
        run(cmd("mount", &["--bind"]).arg(home).arg(under))?;
        return Ok(under.join(what.file_name().context("a directory to show has a name")?));
    }
    let place = under.join(name);
    fs::write(&place, "").with_context(|| format!("create {}", place.display()))?;
    run(cmd("mount", &["--bind"]).arg(what).arg(&place))?;
    Ok(place)
}
