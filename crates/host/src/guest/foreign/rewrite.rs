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

mod channels;
mod disks;

use std::collections::BTreeSet;
use std::path::PathBuf;

use whimbrel_wire::Name;
use whimbrel_wire::foreign::{ForeignArg, ForeignSpec};
use whimbrel_wire::meta::NetSpec;

use super::argv::{Opt, Props, split};
use super::facts::{Device, Drive, Facts};

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
    "D",
    "L",
    "S",
    "d",
    "daemonize",
    "gdb",
    "incoming",
    "loadvm",
    "mem-path",
    "mem-prealloc",
    "monitor",
    "name",
    "no-quit",
    "no-shutdown",
    "pidfile",
    "preconfig",
    "qmp",
    "qmp-pretty",
    "runas",
    "run-with",
    "s",
    "trace",
    "full-screen",
    "alt-grab",
    "g",
    "blockdev",
];
/// Options that are the same on every host.
const SAME: &[&str] = &[
    "action",
    "boot",
    "compat",
    "cpu",
    "enable-kvm",
    "global",
    "icount",
    "k",
    "m",
    "msg",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-reboot",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "numa",
    "only-migratable",
    "overcommit",
    "prom-env",
    "rtc",
    "sandbox",
    "seed",
    "smp",
    "tb-size",
    "usb",
    "uuid",
    "vga",
    "watchdog",
    "watchdog-action",
    "win2k-hack",
    "append",
];
/// Objects that are the same on every host.
const OBJECTS: &[&str] =
    &["iothread", "rng-random", "rng-builtin", "cryptodev-backend-builtin", "thread-context"];
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
    let mut work =
        Work { facts, options: &options, plan: Plan::default(), seen: BTreeSet::new(), serials: 0 };
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
    fn refuse(&mut self, option: &Opt, why: &str) {
        self.plan.refusals.push(format!("{}: {}", option.shown(), why));
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
        named
            .filter_map(|option| Some((option.clone(), Props::parse(option.text(), implied).ok()?)))
            .collect()
    }

    /// The properties of an option; a reason if they cannot be read.
    fn props(&mut self, option: &Opt, implied: &str) -> Option<Props> {
        match Props::parse(option.text(), implied) {
            Ok(props) => Some(props),
            Err(why) => {
                self.refuse(option, &why);
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
                self.refuse(
                    option,
                    "only virtio-blk-pci disks can be taken over: state it as -drive if=virtio",
                );
            }
            "cdrom" | "fda" | "fdb" => {
                self.refuse(option, "a medium in a file of this host: start without it");
            }
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
        let backends: Vec<_> =
            objects.iter().filter(|(_, props)| kind(props).starts_with("memory-backend-")).collect();
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
                        self.refuse(option, &format!("{key} is a file of this host"));
                    }
                    "confidential-guest-support" | "memory-encryption" => {
                        self.refuse(option, &format!("{key} is bound to this host's processor"));
                    }
                    _ => machine.set(&key, value),
                }
            }
        }
        machine.set("type", self.facts.machine.clone());
        if self.plan.foreign.ram_block.is_some()
            && machine.get("memory-backend").is_none()
            && !self.memory_by_numa()
        {
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
        self.words(&["-monitor", "none"]);
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
            if !self.plan.disks.iter().any(planned)
                && !self.plan.refusals.iter().any(|why| why.contains(&told))
            {
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
                let why =
                    format!("it runs {} processors now: some were plugged after the start", self.facts.vcpus);
                self.refuse(&option.clone(), &why);
            }
        }
    }
}

fn is_virtio_blk(kind: &str) -> bool {
    matches!(
        kind,
        "virtio-blk-pci" | "virtio-blk-pci-non-transitional" | "virtio-blk-pci-transitional" | "virtio-blk"
    )
}

/// The type behind QEMU's short names for devices.
fn alias(kind: &str) -> String {
    let virtio = [
        "blk", "net", "rng", "balloon", "serial", "scsi", "gpu", "keyboard", "mouse", "tablet", "crypto",
        "iommu",
    ];
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
    drive.device == device.path
        || drive.device.strip_prefix(device.path.as_str()).is_some_and(|rest| rest.starts_with('/'))
}
