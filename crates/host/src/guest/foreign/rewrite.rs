//! From the command line of a running QEMU to one that any host can use: pure.
//!
//! ```text
//!   -object RAM        ─► the same id, a file of the host's, shared       -netdev tap ─► a tap on the same bridge
//!   -chardev, -serial  ─► a socket or file in the VM's directory          -drive, -blockdev + -device virtio-blk
//!   -vnc               ─► a socket there                                       ─► the same device, on a volume
//!   -name, -pidfile, -S, -incoming, -qmp, -monitor …  ─► gone, ours instead
//!   machine, processor, devices, …                    ─► word for word (the machine type with its version)
//!   everything else                                   ─► a reason that names it
//! ```
//!
//! Invariants
//! * Every drive with a medium becomes a volume or a reason. Every device that QEMU has is in the result or a reason.
//! * A virtio-blk device keeps bus, address and geometry: its state fits, and the new QEMU need not read the disk to
//!   find the geometry.
//!
//! Not here: gathering what is known (`facts`), the words of one host (`line`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use whimbrel_wire::Name;
use whimbrel_wire::foreign::{ForeignArg, ForeignBus, ForeignDisk, ForeignSpec};
use whimbrel_wire::meta::NetSpec;

use super::argv::{Opt, Props, split};
use super::facts::{Device, Drive, Facts};
use crate::guest::launch::{DISKS_MAX, NETS_MAX};

/// What comes of a command line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The command line for any host.
    pub foreign: ForeignSpec,
    /// Its disks, as they are now, in the order of `foreign.disks`.
    pub disks: Vec<PlannedDisk>,
    /// Its networks.
    pub nets: Vec<NetSpec>,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// `-kernel`, which every host must have at that path.
    pub kernel: Option<String>,
    /// `-initrd`.
    pub initrd: Option<String>,
    /// `-append`.
    pub append: Option<String>,
    /// `-cpu`.
    pub cpu: String,
    /// The serial console's socket here, if it is one.
    pub console: Option<PathBuf>,
    /// Why another host could not start its equal; all of it.
    pub refusals: Vec<String>,
}

/// A disk of a QEMU that is to be adopted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannedDisk {
    /// A volume of ours already, on this socket.
    Ours {
        /// The volume.
        volume: Name,
        /// Its socket.
        socket: PathBuf,
    },
    /// A drive of QEMU's own, to be mirrored into a volume.
    Drive(Drive),
}

/// Options that only concern the host QEMU runs on, and are ours to give.
const DROPPED: &[&str] = &[
    "D", "L", "S", "d", "daemonize", "gdb", "incoming", "loadvm", "mem-path", "mem-prealloc", "monitor", "name",
    "no-quit", "no-shutdown", "pidfile", "preconfig", "qmp", "qmp-pretty", "runas", "run-with", "s", "trace",
    "full-screen", "alt-grab", "g", "blockdev",
];
/// Options that are the same on every host.
const SAME: &[&str] = &[
    "action", "boot", "compat", "cpu", "enable-kvm", "global", "icount", "k", "m", "msg", "no-acpi",
    "no-fd-bootchk", "no-hpet", "no-reboot", "no-user-config", "nodefaults", "nodefconfig", "nographic", "numa",
    "only-migratable", "overcommit", "prom-env", "rtc", "sandbox", "seed", "smp", "tb-size", "usb", "uuid", "vga",
    "watchdog", "watchdog-action", "win2k-hack", "append",
];
/// Objects that are the same on every host.
const OBJECTS: &[&str] = &["iothread", "rng-random", "rng-builtin", "cryptodev-backend-builtin", "thread-context"];
/// Properties of a RAM object that any host can keep.
const RAM_PROPS: &[&str] =
    &["id", "size", "merge", "dump", "reserve", "x-use-canonical-path-for-ramblock-id", "qom-type"];
/// Devices that are tied to the host, with why.
const TIED: &[(&str, &str)] = &[
    ("vfio", "it is hardware of this host"),
    ("vhost-user-blk", ""),
    ("vhost-", "another program or the kernel of this host serves it"),
    ("ivshmem", "its memory is shared with others on this host"),
    ("usb-host", "it is a device of this host"),
    ("usb-redir", "it is a device of somebody's"),
    ("usb-storage", "only virtio-blk-pci disks can be taken over"),
    ("usb-bot", "only virtio-blk-pci disks can be taken over"),
    ("usb-mtp", "it shows files of this host"),
    ("virtio-9p", "it shows files of this host"),
    ("tpm", "its state is with another program"),
    ("loader", "it loads a file of this host"),
    ("nvdimm", "it is a file of this host"),
    ("virtio-pmem", "it is a file of this host"),
    ("virtio-mem", "its plugged size may have changed"),
    ("nvme", "only virtio-blk-pci disks can be taken over"),
    ("ide-hd", "only virtio-blk-pci disks can be taken over"),
    ("scsi-hd", "only virtio-blk-pci disks can be taken over"),
    ("scsi-block", "it is a disk of this host"),
    ("scsi-generic", "it is a device of this host"),
    ("sd-card", "only virtio-blk-pci disks can be taken over"),
    ("virtio-blk-device", "only virtio-blk-pci disks can be taken over"),
    ("pci-assign", "it is hardware of this host"),
    ("x-pci-proxy", "another program serves it"),
    ("qxl", "its screen is served over SPICE"),
];

/// See the module's charter. `words` leaves the program's name out.
pub fn rewrite(words: &[String], facts: &Facts) -> Plan {
    let (options, strange) = split(words);
    let mut work = Work { facts, options: &options, plan: Plan::default(), seen: BTreeSet::new(), serials: 0 };
    work.plan.refusals = strange;
    work.plan.cpu = facts.cpu.clone();
    work.memory();
    for option in &options {
        work.option(option);
    }
    work.implicit_disks();
    work.defaults();
    work.leftovers();
    work.plan
}

struct Work<'a> {
    facts: &'a Facts,
    options: &'a [Opt],
    plan: Plan,
    /// Paths of devices that are accounted for.
    seen: BTreeSet<String>,
    serials: u32,
}

impl Work<'_> {
    fn refuse(&mut self, option: &Opt, why: impl AsRef<str>) {
        self.plan.refusals.push(format!("{}: {}", option.shown(), why.as_ref()));
    }

    fn push(&mut self, arg: ForeignArg) {
        self.plan.foreign.args.push(arg);
    }

    fn words(&mut self, words: &[&str]) {
        self.push(ForeignArg::Words(words.iter().map(|word| (*word).to_owned()).collect()));
    }

    fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option.name == name)
    }

    fn of(&self, name: &str, implied: &str) -> Vec<(Opt, Props)> {
        let named = self.options.iter().filter(|option| option.name == name);
        named.filter_map(|option| Some((option.clone(), Props::parse(option.text(), implied).ok()?))).collect()
    }

    /// The properties of an option; a reason if they cannot be read.
    fn props(&mut self, option: &Opt, implied: &str) -> Option<Props> {
        match Props::parse(option.text(), implied) {
            Ok(props) => Some(props),
            Err(why) => {
                self.refuse(option, why);
                None
            }
        }
    }

    fn option(&mut self, option: &Opt) {
        match option.name.as_str() {
            name if DROPPED.contains(&name) => {}
            "cpu" => {
                self.plan.cpu = option.text().to_owned();
                self.push(ForeignArg::Words(option.words()));
            }
            "append" => {
                self.plan.append = option.value.clone();
                self.push(ForeignArg::Words(option.words()));
            }
            name if SAME.contains(&name) => self.push(ForeignArg::Words(option.words())),
            "kernel" => {
                self.plan.kernel = option.value.clone();
                self.push(ForeignArg::Words(option.words()));
            }
            "initrd" => {
                self.plan.initrd = option.value.clone();
                self.push(ForeignArg::Words(option.words()));
            }
            // In `defaults`, where all that is said of them is known.
            "machine" | "M" | "accel" => {}
            "object" => self.object(option),
            "device" => self.device(option),
            "drive" => self.drive(option),
            "chardev" => self.chardev(option),
            "mon" => self.push(ForeignArg::Words(option.words())),
            "serial" => self.serial(option),
            "parallel" if matches!(option.text(), "none" | "null") => {
                self.push(ForeignArg::Words(option.words()));
            }
            "netdev" => self.netdev(option),
            "net" | "nic" if option.text() == "none" => self.push(ForeignArg::Words(option.words())),
            "net" | "nic" => self.refuse(option, "state the network as -netdev and -device"),
            "display" => self.display(option),
            "vnc" if option.text() == "none" => self.words(&["-display", "none"]),
            "vnc" => self.push(ForeignArg::Screen),
            "audiodev" => self.audiodev(option),
            "bios" if !option.text().contains('/') => self.push(ForeignArg::Words(option.words())),
            "smbios" | "fw_cfg" if !option.text().contains("file=") => {
                self.push(ForeignArg::Words(option.words()));
            }
            "pflash" => self.refuse(option, "firmware in a file of this host is not carried along"),
            "hda" | "hdb" | "hdc" | "hdd" | "mtdblock" | "sd" => {
                self.refuse(option, "only virtio-blk-pci disks can be taken over: state it as -drive if=virtio");
            }
            "cdrom" | "fda" | "fdb" => self.refuse(option, "a medium in a file of this host: start without it"),
            "snapshot" => self.refuse(option, "what the guest writes is thrown away at its end"),
            "readconfig" => self.refuse(option, "what the file says is not on the command line"),
            "set" => self.refuse(option, "give the property with its device"),
            "add-fd" => self.refuse(option, "a descriptor that only this process has"),
            _ => self.refuse(option, "it belongs to this host and cannot be had on another"),
        }
    }

    /// Which block is the guest's memory, and how it is a file elsewhere.
    fn memory(&mut self) {
        let objects = self.of("object", "qom-type");
        let kind = |props: &Props| props.get("qom-type").unwrap_or_default();
        let backends: Vec<_> = objects.iter().filter(|(_, props)| kind(props).starts_with("memory-backend-")).collect();
        let facts = self.facts;
        let named = |id: &str| {
            let is = |(name, _): &&(String, u64)| name == id || name.strip_prefix("/objects/") == Some(id);
            facts.ram.iter().find(is).cloned()
        };
        match backends.as_slice() {
            [] => {
                let default = ["pc.ram", "microvm.ram"].into_iter().find_map(named);
                match default {
                    Some((name, bytes)) => {
                        // A machine type before 4.1 would else name the block by its path.
                        let keys = "x-use-canonical-path-for-ramblock-id=off";
                        self.push(ForeignArg::Ram(format!(
                            "qom-type=memory-backend-file,id={name},size={bytes},{keys}"
                        )));
                        self.plan.memory_bytes = bytes;
                        self.plan.foreign.ram_block = Some(name);
                    }
                    None => self.plan.refusals.push("main memory: no RAM block of the usual name".to_owned()),
                }
            }
            [(option, props)] => {
                let id = props.get("id").unwrap_or_default();
                let Some((name, bytes)) = named(&id) else {
                    return self.refuse(option, "QEMU has no RAM block of that name");
                };
                let mut kept = props.clone();
                for key in props.names() {
                    if !RAM_PROPS.contains(&key.as_str()) {
                        kept.remove(&key);
                    }
                }
                kept.set("qom-type", "memory-backend-file");
                self.push(ForeignArg::Ram(kept.text()));
                self.plan.memory_bytes = bytes;
                self.plan.foreign.ram_block = Some(name);
            }
            several => {
                for (option, props) in several {
                    let id = props.get("id").unwrap_or_default();
                    self.plan.memory_bytes += named(&id).map_or(0, |(_, bytes)| bytes);
                    if kind(props) == "memory-backend-file" {
                        self.plan.refusals.push(format!(
                            "{}: one RAM file can be had elsewhere, and there are {}: use one, or memory-backend-ram",
                            option.shown(),
                            several.len()
                        ));
                    } else {
                        self.plan.foreign.args.push(ForeignArg::Words(option.words()));
                    }
                }
            }
        }
    }

    fn object(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "qom-type") else { return };
        let kind = props.get("qom-type").unwrap_or_default();
        match kind.as_str() {
            // Seen to in `memory`.
            kind if kind.starts_with("memory-backend-") => {}
            // Used by what is refused, or rewritten: nothing else may refer to it.
            "secret" => {}
            kind if OBJECTS.contains(&kind) => self.push(ForeignArg::Words(option.words())),
            _ => self.refuse(option, "an object of this kind belongs to this host"),
        }
    }

    fn device(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "driver") else { return };
        let (kind, id) = (props.get("driver").unwrap_or_default(), props.get("id"));
        let drive = props.get("drive");
        let facts = self.facts;
        let fact = facts.devices.iter().find(|device| match &id {
            Some(_) => device.id == id,
            None => {
                device.id.is_none()
                    && !self.seen.contains(&device.path)
                    && alias(&kind) == device.kind
                    && (drive.is_none() || device.drive == drive)
            }
        });
        let Some(fact) = fact else {
            return self.refuse(option, "the device is gone: it was unplugged after the start");
        };
        self.seen.insert(fact.path.clone());
        if props.get("romfile").is_some_and(|file| file.contains('/')) {
            return self.refuse(option, "its ROM is a file of this host");
        }
        if kind.starts_with("vhost-user-blk-pci") {
            return self.vhost_user_blk(option, &props, fact);
        }
        if let Some((_, why)) = TIED.iter().find(|(prefix, _)| kind.starts_with(prefix)) {
            return self.refuse(option, why);
        }
        let Some(name) = drive else { return self.push(ForeignArg::Words(option.words())) };
        let medium = facts.drives.iter().find(|drive| is_of(drive, fact) || drive.name == name);
        match medium {
            Some(drive) if is_virtio_blk(&kind) => self.virtio_blk(option, props, fact, drive, &name),
            Some(_) => self.refuse(option, "only virtio-blk-pci disks can be taken over"),
            None => self.push(ForeignArg::Words(option.words())),
        }
    }

    fn virtio_blk(&mut self, option: &Opt, mut props: Props, fact: &Device, drive: &Drive, name: &str) {
        let Some(node) = self.disk(&option.shown(), drive) else { return };
        props.set("drive", node);
        self.keep_geometry(&mut props, fact);
        // What a -drive says of its device.
        let legacy = self.of("drive", "file").into_iter().find(|(_, drive)| drive.get("id").as_deref() == Some(name));
        if let Some((option, legacy)) = legacy
            && !self.inherit(&option, &legacy, &mut props)
        {
            return;
        }
        self.push(ForeignArg::Words(vec!["-device".to_owned(), props.text()]));
    }

    /// Gives a device what its `-drive` said of it; whether that could be done.
    fn inherit(&mut self, option: &Opt, drive: &Props, device: &mut Props) -> bool {
        for key in ["werror", "rerror"] {
            if let Some(value) = drive.get(key) {
                device.set(key, value);
            }
        }
        if matches!(drive.get("cache").as_deref(), Some("writethrough" | "directsync")) {
            device.set("write-cache", "off");
        }
        let throttled = |key: &String| {
            key.starts_with("throttling.") || ["bps", "iops"].iter().any(|word| key.starts_with(word))
        };
        if drive.names().iter().any(throttled) {
            self.refuse(option, "limits of a drive are not kept: start without them");
            return false;
        }
        true
    }

    fn keep_geometry(&mut self, props: &mut Props, fact: &Device) {
        if let Some([cyls, heads, secs]) = fact.geometry {
            for (key, value) in [("cyls", cyls), ("heads", heads), ("secs", secs)] {
                props.set(key, value);
            }
        }
    }

    /// Plans a volume for a drive; the name of its block node from then on.
    fn disk(&mut self, shown: &str, drive: &Drive) -> Option<String> {
        let why = if drive.read_only {
            "a read-only disk in a file of this host is not carried along"
        } else if drive.size_bytes == 0 || !drive.size_bytes.is_multiple_of(512) {
            "its size is not a multiple of 512 bytes"
        } else if self.plan.disks.len() >= DISKS_MAX {
            "there are too many disks"
        } else if self.plan.disks.iter().any(|disk| matches!(disk, PlannedDisk::Drive(other) if other.node == drive.node))
        {
            "two devices share its drive"
        } else {
            let number = self.plan.disks.len();
            let node = format!("whimbrel-disk{number}");
            self.plan.disks.push(PlannedDisk::Drive(drive.clone()));
            self.plan.foreign.disks.push(ForeignDisk { bus: ForeignBus::Nbd, id: node.clone(), queues: 1 });
            self.push(ForeignArg::Disk(u32::try_from(number).unwrap_or(u32::MAX)));
            return Some(node);
        };
        self.plan.refusals.push(format!("{shown}: drive {} ({}): {why}", drive.root(), drive.source));
        None
    }

    fn vhost_user_blk(&mut self, option: &Opt, props: &Props, fact: &Device) {
        let id = props.get("chardev").unwrap_or_default();
        let chardev = self.of("chardev", "backend").into_iter().find(|(_, chardev)| chardev.get("id").as_deref() == Some(&id));
        let Some((_, chardev)) = chardev else {
            return self.refuse(option, "its chardev is not on the command line");
        };
        let socket = PathBuf::from(chardev.get("path").unwrap_or_default());
        let Some(volume) = self.facts.own_sockets.get(&socket) else {
            return self.refuse(option, format!("{} is not a volume that this agent shows", socket.display()));
        };
        if chardev.get("reconnect").is_none() && chardev.get("reconnect-ms").is_none() {
            let why = format!("add reconnect=1 to chardev {id}: else the disk is lost when the agent restarts");
            return self.refuse(option, why);
        }
        if self.plan.disks.len() >= DISKS_MAX {
            return self.refuse(option, "there are too many disks");
        }
        let number = u32::try_from(self.plan.disks.len()).unwrap_or(u32::MAX);
        self.plan.disks.push(PlannedDisk::Ours { volume: volume.clone(), socket });
        let queues = fact.queues.unwrap_or(1);
        self.plan.foreign.disks.push(ForeignDisk { bus: ForeignBus::VhostUserBlk, id, queues });
        self.push(ForeignArg::Disk(number));
        self.push(ForeignArg::Words(option.words()));
    }

    fn drive(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "file") else { return };
        match props.get("if").as_deref() {
            Some("virtio") => return,
            Some("pflash") => {
                return self.refuse(option, "firmware in a file of this host is not carried along");
            }
            _ => {}
        }
        let is_cd = props.get("media").as_deref() == Some("cdrom");
        let id = props.get("id").unwrap_or_default();
        let facts = self.facts;
        let medium = facts.drives.iter().find(|drive| !id.is_empty() && drive.name == id);
        if props.get("if").as_deref() == Some("none") {
            // One with a medium is its device's to deal with.
            if medium.is_none() && is_cd {
                self.push(ForeignArg::Words(vec!["-drive".to_owned(), without_medium(&props).text()]));
            }
        } else if is_cd && medium.is_none() && props.get("file").is_none() {
            self.push(ForeignArg::Words(option.words()));
        } else if is_cd {
            self.refuse(option, "a medium in a file of this host: start without it");
        } else {
            self.refuse(option, "only virtio-blk-pci disks can be taken over: say if=virtio");
        }
    }

    /// Devices that QEMU made for `-drive if=virtio`: stated as what they are, at the end of the list as QEMU does it.
    fn implicit_disks(&mut self) {
        let mut next = 0_u32;
        for (option, props) in self.of("drive", "file") {
            if props.get("if").as_deref() != Some("virtio") {
                continue;
            }
            let index = props.get("index").and_then(|text| text.parse().ok()).unwrap_or(next);
            next = index + 1;
            let name = props.get("id").unwrap_or_else(|| format!("virtio{index}"));
            let facts = self.facts;
            let fact = facts.devices.iter().find(|device| {
                device.id.is_none() && device.drive.as_ref() == Some(&name) && is_virtio_blk(&device.kind)
            });
            let medium = facts.drives.iter().find(|drive| drive.name == name);
            let (Some(fact), Some(medium)) = (fact, medium) else {
                self.refuse(&option, format!("QEMU has no virtio-blk device for drive {name}"));
                continue;
            };
            self.seen.insert(fact.path.clone());
            let Some(addr) = fact.addr else {
                self.refuse(&option, "its device has no PCI address");
                continue;
            };
            let Some(node) = self.disk(&option.shown(), medium) else { continue };
            let place = format!("bus={},addr={:#x}.{:#x}", fact.bus, addr >> 3, addr & 7);
            let text = format!("driver=virtio-blk-pci,drive={node},{place}");
            let Ok(mut device) = Props::parse(&text, "driver") else { continue };
            self.keep_geometry(&mut device, fact);
            if self.inherit(&option, &props, &mut device) {
                self.push(ForeignArg::Words(vec!["-device".to_owned(), device.text()]));
            }
        }
    }

    fn chardev(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "backend") else { return };
        let id = props.get("id").unwrap_or_default();
        let backend = props.get("backend").unwrap_or_default();
        let path = props.get("path").map(PathBuf::from);
        let mux = props.is_on("mux");
        let used_by_disk = |(_, device): &(Opt, Props)| {
            device.get("chardev").as_deref() == Some(&id)
                && device.get("driver").is_some_and(|kind| kind.starts_with("vhost-user-blk"))
        };
        if self.of("device", "driver").iter().any(used_by_disk) {
            return;
        }
        match backend.as_str() {
            "null" | "ringbuf" | "memory" => self.push(ForeignArg::Words(option.words())),
            "socket" if props.get("host").is_some() || props.get("port").is_some() => {
                self.refuse(option, "a network address of this host: use a unix socket");
            }
            "socket" if props.is_on("server") => {
                let console = self.is_console(&id, path.clone());
                let file = self.file_name(path.as_deref(), &id, "sock");
                self.push(ForeignArg::Socket { id, file, mux, console });
            }
            "socket" => self.refuse(option, "it connects to another program of this host"),
            "stdio" | "pty" | "vc" => {
                let console = self.is_console(&id, None);
                let file = self.file_name(None, &id, "sock");
                self.push(ForeignArg::Socket { id, file, mux, console });
            }
            "file" => {
                let file = self.file_name(path.as_deref(), &id, "log");
                self.push(ForeignArg::Log { id, file });
            }
            _ => self.refuse(option, "a chardev of this kind belongs to this host"),
        }
    }

    /// Whether a chardev is that of the first serial port; notes its socket.
    fn is_console(&mut self, id: &str, path: Option<PathBuf>) -> bool {
        let serials = self.options.iter().filter(|option| option.name == "serial");
        let mut ports: Vec<String> =
            serials.filter_map(|option| option.text().strip_prefix("chardev:").map(str::to_owned)).collect();
        for (_, device) in self.of("device", "driver") {
            if device.get("driver").as_deref() == Some("isa-serial") {
                ports.extend(device.get("chardev"));
            }
        }
        let is_console = ports.first().is_some_and(|port| port == id);
        if is_console {
            self.plan.console = path;
        }
        is_console
    }

    /// The name a socket or file has here, for any host; made from the id if that is none of its own.
    fn file_name(&self, path: Option<&Path>, id: &str, extension: &str) -> String {
        let taken = |name: &str| {
            self.plan.foreign.args.iter().any(|arg| match arg {
                ForeignArg::Socket { file, .. } | ForeignArg::Log { file, .. } => file == name,
                _ => false,
            })
        };
        // Ours begin with other words than these.
        let ours = |name: &str| {
            ["qmp", "console", "qemu", "disk", "vnc"].iter().any(|word| name.starts_with(word)) || name.starts_with('.')
        };
        let name = path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        if let Some(name) = name
            && !taken(&name)
            && !ours(&name)
        {
            return name;
        }
        let safe: String =
            id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
        format!("chardev-{safe}.{extension}")
    }

    fn serial(&mut self, option: &Opt) {
        let (number, text) = (self.serials, option.text());
        self.serials += 1;
        if text.starts_with("chardev:") || text == "none" || text == "null" {
            return self.push(ForeignArg::Words(option.words()));
        }
        let (id, console) = (format!("whimbrel-serial{number}"), number == 0);
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path.split(',').next().unwrap_or_default());
            if console {
                self.plan.console = Some(path.clone());
            }
            let file = self.file_name(Some(&path), &id, "sock");
            self.push(ForeignArg::Socket { id: id.clone(), file, mux: false, console });
        } else if matches!(text, "stdio" | "mon:stdio" | "pty") || text.starts_with("vc") {
            let file = self.file_name(None, &id, "sock");
            self.push(ForeignArg::Socket { id: id.clone(), file, mux: false, console });
        } else if let Some(path) = text.strip_prefix("file:") {
            let file = self.file_name(Some(Path::new(path)), &id, "log");
            self.push(ForeignArg::Log { id: id.clone(), file });
        } else {
            return self.refuse(option, "a line of this kind belongs to this host: use a unix socket");
        }
        self.words(&["-serial", &format!("chardev:{id}")]);
    }

    fn netdev(&mut self, option: &Opt) {
        let Some(props) = self.props(option, "type") else { return };
        let (id, kind) = (props.get("id").unwrap_or_default(), props.get("type").unwrap_or_default());
        if props.get("queues").is_some_and(|count| count != "1") || props.get("fds").is_some() {
            return self.refuse(option, "several queues are not supported: use one");
        }
        let interface = props.get("fd").and_then(|fd| self.facts.tap_fds.get(&fd).cloned());
        let interface = interface.or_else(|| props.get("ifname"));
        let interface = interface.or_else(|| self.facts.tap_names.get(&id).cloned());
        let bridge = match (kind.as_str(), interface) {
            ("tap", Some(interface)) => match self.facts.bridges.get(&interface) {
                Some(bridge) => bridge.clone(),
                None => {
                    return self.refuse(option, format!("tap {interface} is not on a bridge of this host"));
                }
            },
            ("tap" | "bridge", _) if props.get("br").is_some() => props.get("br").unwrap_or_default(),
            ("bridge", None) => "br0".to_owned(),
            ("tap", None) => return self.refuse(option, "the interface behind the tap cannot be found"),
            ("user", _) => {
                return self.refuse(option, "its connections end with this process: use a tap on a bridge");
            }
            _ => return self.refuse(option, "a network of this kind belongs to this host: use a tap on a bridge"),
        };
        if self.plan.nets.len() >= NETS_MAX {
            return self.refuse(option, "there are too many networks");
        }
        let user = self.of("device", "driver").into_iter().find(|(_, device)| device.get("netdev").as_ref() == Some(&id));
        let mac = user.and_then(|(_, device)| device.get("mac")).unwrap_or_default();
        let net = u32::try_from(self.plan.nets.len()).unwrap_or(u32::MAX);
        self.plan.nets.push(NetSpec { bridge, mac });
        self.push(ForeignArg::Tap { net, id });
    }

    fn display(&mut self, option: &Opt) {
        let kind = option.text().split(',').next().unwrap_or_default();
        match kind {
            "vnc" => self.push(ForeignArg::Screen),
            "none" | "gtk" | "sdl" | "curses" | "cocoa" => self.words(&["-display", "none"]),
            _ => self.refuse(option, "a screen of this kind belongs to this host: use none or vnc"),
        }
    }

    fn audiodev(&mut self, option: &Opt) {
        match self.props(option, "driver").and_then(|props| props.get("driver")).as_deref() {
            Some("none") => self.push(ForeignArg::Words(option.words())),
            Some(_) => self.refuse(option, "sound of this host: use driver none"),
            None => {}
        }
    }

    /// The machine and its accelerator, settled; what QEMU adds when it is not told otherwise.
    fn defaults(&mut self) {
        let mut machine = Props::Keys(Vec::new());
        let options = self.options;
        for option in options.iter().filter(|option| matches!(option.name.as_str(), "machine" | "M")) {
            let Some(props) = self.props(option, "type") else { continue };
            if matches!(props, Props::Json(_)) {
                self.refuse(option, "state the machine as key=value");
                continue;
            }
            for key in props.names() {
                let value = props.get(&key).unwrap_or_default();
                match key.as_str() {
                    "kernel" | "initrd" | "dtb" | "dumpdtb" | "firmware" | "pflash0" | "pflash1" => {
                        self.refuse(option, format!("{key} is a file of this host"));
                    }
                    "confidential-guest-support" | "memory-encryption" => {
                        self.refuse(option, format!("{key} is bound to this host's processor"));
                    }
                    _ => machine.set(&key, value),
                }
            }
        }
        machine.set("type", self.facts.machine.clone());
        if self.plan.foreign.ram_block.is_some() && machine.get("memory-backend").is_none() && !self.memory_by_numa() {
            machine.set("memory-backend", self.ram_object());
        }
        let accel = self.facts.accel.clone();
        let stated: Vec<Opt> = self.options.iter().filter(|option| option.name == "accel").cloned().collect();
        let mut kept = false;
        for option in stated {
            if option.text().split(',').next() == Some(accel.as_str()) {
                self.push(ForeignArg::Words(option.words()));
                kept = true;
            }
        }
        machine.remove("accel");
        if !kept && !self.has("enable-kvm") {
            machine.set("accel", accel);
        }
        let text = machine.text();
        self.words(&["-machine", &text]);
        if self.has("nodefaults") {
            return;
        }
        if !self.has("monitor") || self.has("nographic") {
            self.words(&["-monitor", "none"]);
        }
        if !["net", "nic", "netdev"].iter().any(|name| self.has(name)) {
            let why = "QEMU gave the VM a network card on its user-mode network, whose connections end with this \
                       process: start with -nodefaults or -nic none";
            self.plan.refusals.push(format!("no -nodefaults: {why}"));
        }
        let has_port = |(_, device): &(Opt, Props)| device.get("driver").as_deref() == Some("isa-serial");
        if self.serials == 0 && !self.of("device", "driver").iter().any(has_port) {
            let (id, file) = ("whimbrel-serial0".to_owned(), "chardev-serial0.sock".to_owned());
            self.push(ForeignArg::Socket { id, file, mux: false, console: true });
            self.words(&["-serial", "chardev:whimbrel-serial0"]);
        }
    }

    fn memory_by_numa(&self) -> bool {
        self.options.iter().any(|option| option.name == "numa" && option.text().contains("memdev"))
    }

    fn ram_object(&self) -> String {
        let block = self.plan.foreign.ram_block.as_deref().unwrap_or_default();
        block.strip_prefix("/objects/").unwrap_or(block).to_owned()
    }

    /// What QEMU has and the command line does not explain.
    fn leftovers(&mut self) {
        let facts = self.facts;
        for device in &facts.devices {
            if !self.seen.contains(&device.path) {
                let name = device.id.as_deref().unwrap_or(&device.path);
                self.plan.refusals.push(format!(
                    "device {name} ({}): it is not on the command line: it was plugged in after the start",
                    device.kind
                ));
            }
        }
        for drive in &facts.drives {
            let planned = |disk: &PlannedDisk| matches!(disk, PlannedDisk::Drive(other) if other == drive);
            let name = drive.root();
            let told = format!("drive {name} (");
            if !self.plan.disks.iter().any(planned) && !self.plan.refusals.iter().any(|why| why.contains(&told)) {
                self.plan.refusals.push(format!(
                    "drive {name} ({}): it is no disk of a virtio-blk-pci device, and a file of this host: start \
                     without it, or eject the medium",
                    drive.source
                ));
            }
        }
        if let Some(option) = self.options.iter().rev().find(|option| option.name == "smp") {
            let count = Props::parse(option.text(), "cpus").ok().and_then(|props| props.get("cpus"));
            if let Some(count) = count.and_then(|text| text.parse::<u32>().ok())
                && count != self.facts.vcpus
            {
                let why = format!("it runs {} processors now: some were plugged after the start", self.facts.vcpus);
                self.refuse(&option.clone(), why);
            }
        }
    }
}

fn without_medium(props: &Props) -> Props {
    let mut left = props.clone();
    for key in ["file", "format", "driver"] {
        left.remove(key);
    }
    left
}

fn is_virtio_blk(kind: &str) -> bool {
    matches!(kind, "virtio-blk-pci" | "virtio-blk-pci-non-transitional" | "virtio-blk-pci-transitional" | "virtio-blk")
}

/// The type behind QEMU's short names for devices.
fn alias(kind: &str) -> String {
    let virtio = ["blk", "net", "rng", "balloon", "serial", "scsi", "gpu", "keyboard", "mouse", "tablet", "crypto", "iommu"];
    let short = kind.strip_prefix("virtio-").filter(|rest| virtio.contains(rest));
    match (short, kind) {
        (Some(_), _) => format!("{kind}-pci"),
        (None, "ahci") => "ich9-ahci".to_owned(),
        (None, "lsi") => "lsi53c895a".to_owned(),
        (None, other) => other.to_owned(),
    }
}

/// Whether a drive is the medium of a device.
fn is_of(drive: &Drive, device: &Device) -> bool {
    drive.device == device.path || drive.device.strip_prefix(device.path.as_str()).is_some_and(|rest| rest.starts_with('/'))
}
