//! Disks: every virtio-blk device on a volume, whatever it was on.
//!
//! Not here: copying what is on them (`vm::adopt`).

use std::path::PathBuf;

use whimbrel_wire::foreign::{ForeignArg, ForeignBus, ForeignDisk};

use super::{PlannedDisk, Work, is_virtio_blk};
use crate::guest::foreign::argv::{Opt, Props};
use crate::guest::foreign::facts::{Device, Drive};
use crate::guest::launch::DISKS_MAX;

impl Work<'_> {
    pub(super) fn virtio_blk(
        &mut self,
        option: &Opt,
        mut props: Props,
        fact: &Device,
        drive: &Drive,
        name: &str,
    ) {
        let Some(node) = self.disk(&option.shown(), drive) else { return };
        props.set("drive", node);
        self.keep_geometry(&mut props, fact);
        // What a -drive says of its device.
        let legacy =
            self.of("drive", "file").into_iter().find(|(_, drive)| drive.get("id").as_deref() == Some(name));
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
        } else if self
            .plan
            .disks
            .iter()
            .any(|disk| matches!(disk, PlannedDisk::Drive(other) if other.node == drive.node))
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

    pub(super) fn vhost_user_blk(&mut self, option: &Opt, props: &Props, fact: &Device) {
        let id = props.get("chardev").unwrap_or_default();
        let chardev = self
            .of("chardev", "backend")
            .into_iter()
            .find(|(_, chardev)| chardev.get("id").as_deref() == Some(&id));
        let Some((_, chardev)) = chardev else {
            return self.refuse(option, "its chardev is not on the command line");
        };
        let socket = PathBuf::from(chardev.get("path").unwrap_or_default());
        let Some(volume) = self.facts.own_sockets.get(&socket) else {
            return self
                .refuse(option, &format!("{} is not a volume that this agent shows", socket.display()));
        };
        if chardev.get("reconnect").is_none() && chardev.get("reconnect-ms").is_none() {
            let why =
                format!("add reconnect=1 to chardev {id}: else the disk is lost when the agent restarts");
            return self.refuse(option, &why);
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

    pub(super) fn drive(&mut self, option: &Opt) {
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
    pub(super) fn implicit_disks(&mut self) {
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
                self.refuse(&option, &format!("QEMU has no virtio-blk device for drive {name}"));
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
}

fn without_medium(props: &Props) -> Props {
    let mut left = props.clone();
    for key in ["file", "format", "driver"] {
        left.remove(key);
    }
    left
}
