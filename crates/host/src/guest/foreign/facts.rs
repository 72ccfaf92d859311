//! What a running QEMU has, as far as its command line does not tell: devices, drives, taps.
//!
//! Not here: what follows from it (`rewrite`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use whimbrel_wire::Name;

use crate::error::Result;
use crate::guest::precheck::Report;
use crate::guest::proc_fs;
use crate::guest::process::QemuProcess;
use crate::guest::qmp::Qmp;

/// See the module's charter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Machine type, versioned.
    pub machine: String,
    /// Processor model.
    pub cpu: String,
    /// `tcg` or `kvm`.
    pub accel: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// RAM blocks that are the guest's memory: name and size.
    pub ram: Vec<(String, u64)>,
    /// Every device that was made by a `-device`, a `-drive` or a hot-plug.
    pub devices: Vec<Device>,
    /// Every drive with a medium.
    pub drives: Vec<Drive>,
    /// Descriptors of taps, and their interfaces.
    pub tap_fds: BTreeMap<String, String>,
    /// Taps by their `-netdev` id, and their interfaces.
    pub tap_names: BTreeMap<String, String>,
    /// Interfaces of this host that are ports of a bridge, and the bridge.
    pub bridges: BTreeMap<String, String>,
    /// Sockets on which this agent shows volumes over vhost-user-blk.
    pub own_sockets: BTreeMap<PathBuf, Name>,
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its path: `/machine/peripheral/disk0`.
    pub path: String,
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its type.
    pub kind: String,
    /// Its bus's id.
    pub bus: String,
    /// Its address on that bus, of a PCI device.
    pub addr: Option<u32>,
    /// The drive that it shows, if any.
    pub drive: Option<String>,
    /// Cylinders, heads and sectors, of a disk.
    pub geometry: Option<[u64; 3]>,
    /// Its queues, of a disk.
    pub queues: Option<u16>,
}

/// A drive with a medium.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drive {
    /// Its name as a `-drive`; empty if it is a block node.
    pub name: String,
    /// The block node that the device reads.
    pub node: String,
    /// The path of its device, if it has one.
    pub device: String,
    /// The file, as QEMU names it.
    pub source: String,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl Drive {
    /// What job commands call it.
    pub fn root(&self) -> &str {
        if self.name.is_empty() { &self.node } else { &self.name }
    }
}

/// Asks QEMU and /proc.
pub async fn collect(
    qmp: &Qmp,
    process: &QemuProcess,
    report: &Report,
    own_sockets: BTreeMap<PathBuf, Name>,
) -> Result<Facts> {
    let mut facts = Facts {
        machine: report.machine.clone(),
        cpu: report.cpu.clone(),
        accel: report.accel.clone(),
        vcpus: report.vcpus,
        own_sockets,
        ..Facts::default()
    };
    let is_rom = |name: &str| name.starts_with('/') && !name.starts_with("/objects/");
    let blocks = report.ram.iter().filter(|block| !is_rom(&block.name));
    facts.ram = blocks.map(|block| (block.name.clone(), block.size_bytes)).collect();
    for (base, named) in [("/machine/peripheral", true), ("/machine/peripheral-anon", false)] {
        for (name, kind) in super::super::precheck::children(qmp, base).await? {
            facts.devices.push(device(qmp, format!("{base}/{name}"), named.then_some(name), kind).await);
        }
    }
    let drives: Vec<Value> = qmp.execute("query-block", json!({})).await?;
    facts.drives = drives.iter().filter_map(drive).collect();
    for (fd, target) in proc_fs::descriptors(process.pid())? {
        if target == Path::new("/dev/net/tun")
            && let Some(name) = interface_of(process.pid(), fd)
        {
            facts.tap_fds.insert(fd.to_string(), name);
        }
    }
    facts.tap_names = taps_in(&qmp.human("info network").await?);
    facts.bridges = bridges();
    Ok(facts)
}

async fn device(qmp: &Qmp, path: String, id: Option<String>, kind: String) -> Device {
    // Properties that a device does not have are no news.
    let get = async |name: &str| {
        qmp.execute::<Value>("qom-get", json!({ "path": path, "property": name })).await.unwrap_or_default()
    };
    let number = |value: Value| value.as_u64();
    let bus = get("parent_bus").await;
    let bus = bus.as_str().and_then(|bus| bus.rsplit('/').next()).unwrap_or_default().to_owned();
    let addr = number(get("addr").await).and_then(|addr| u32::try_from(addr).ok());
    let mut device = Device { path: path.clone(), id, bus, addr, ..Device::default() };
    if kind.contains("blk") {
        device.drive = get("drive").await.as_str().map(str::to_owned);
        let geometry = (number(get("cyls").await), number(get("heads").await), number(get("secs").await));
        if let (Some(cyls), Some(heads), Some(secs)) = geometry {
            device.geometry = Some([cyls, heads, secs]);
        }
        device.queues = number(get("num-queues").await).and_then(|count| u16::try_from(count).ok());
    }
    device.kind = kind;
    device
}

fn drive(value: &Value) -> Option<Drive> {
    let inserted = value.get("inserted")?;
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Drive {
        name: text(value, "device"),
        node: text(inserted, "node-name"),
        device: text(value, "qdev"),
        source: text(inserted, "file"),
        size_bytes: inserted.pointer("/image/virtual-size").and_then(Value::as_u64).unwrap_or(0),
        read_only: inserted.get("ro") == Some(&Value::Bool(true)),
    })
}

/// The interface behind a descriptor of /dev/net/tun.
fn interface_of(pid: u32, fd: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("iff:")).map(|name| name.trim().to_owned())
}

/// Taps in `info network`: ` \ tap0: index=0,type=tap,ifname=wbtap3,script=no,downscript=no`.
fn taps_in(text: &str) -> BTreeMap<String, String> {
    let parse = |line: &str| {
        let (id, rest) = line.trim_start_matches([' ', '\\']).split_once(": ")?;
        let is_tap = rest.split(',').any(|part| part == "type=tap");
        let name = rest.split(',').find_map(|part| part.trim().strip_prefix("ifname="))?;
        is_tap.then(|| (id.to_owned(), name.to_owned()))
    };
    text.lines().filter_map(parse).collect()
}

fn bridges() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let master = fs::read_link(entry.path().join("master")).ok();
        let bridge = master.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        if let Some(bridge) = bridge {
            found.insert(entry.file_name().to_string_lossy().into_owned(), bridge);
        }
    }
    found
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn taps_are_read_from_the_monitors_list() {
        let text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01\r\n \
             \\ t0: index=0,type=tap,ifname=tap7,script=no,downscript=no\r\n \\ u0: index=0,type=user,net=10.0.2.0";
        assert_eq!(taps_in(text), [("t0".to_owned(), "tap7".to_owned())].into());
    }

    #[test]
    fn an_empty_drive_is_none_and_a_nodes_name_serves_where_it_has_no_other() {
        assert_eq!(drive(&json!({ "device": "cd0" })), None);
        let value = json!({ "device": "", "qdev": "/machine/peripheral/d/virtio-backend", "inserted": {
            "node-name": "fmt", "file": "/x.qcow2", "ro": false, "image": { "virtual-size": 4096 } } });
        let found = drive(&value).unwrap();
        assert_eq!((found.root(), found.size_bytes, found.read_only), ("fmt", 4096, false));
    }
}
