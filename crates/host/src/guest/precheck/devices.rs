//! Devices that write guest memory behind the page tables' back, and disks.
//!
//! Not here: what a disk's files are like (`nodes`).

use std::path::Path;

use serde_json::{Value, json};

use super::{Disk, Findings, HostFacts, children, property};
use crate::error::Result;
use crate::guest::qmp::Qmp;

/// Where a machine's devices are, with an id of their own or without.
const DEVICE_PATHS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Every disk: block devices of QEMU's own, and vhost-user-blk, which QEMU does not count among them.
pub(super) async fn disks(qmp: &Qmp, facts: &HostFacts, found: &mut Findings) -> Result<Vec<Disk>> {
    let drives: Vec<Value> = qmp.execute("query-block", json!({})).await?;
    let mut disks: Vec<_> = drives.iter().filter_map(|drive| block_device(drive, facts)).collect();
    for base in DEVICE_PATHS {
        for (name, kind) in children(qmp, base).await? {
            if !kind.starts_with("vhost-user-blk") {
                continue;
            }
            let chardev = property(qmp, &format!("{base}/{name}"), "chardev").await?;
            let source = socket_of(qmp, &chardev).await?;
            let ours = facts.disk_sockets.iter().any(|socket| socket == Path::new(&source));
            if !ours {
                found.mode_a.push(format!(
                    "disk {name} is served by another program at {source}: its writes into guest memory cannot be \
                     tracked"
                ));
            }
            disks.push(Disk { id: name, source, ours, direct: false });
        }
    }
    Ok(disks)
}

fn block_device(drive: &Value, facts: &HostFacts) -> Option<Disk> {
    let inserted = drive.get("inserted")?;
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let id = [text(drive, "device"), text(drive, "qdev"), text(inserted, "node-name")];
    let source = text(inserted, "file");
    let is_ours = |socket: &std::path::PathBuf| {
        text(inserted, "drv") == "nbd" && source.ends_with(&format!("socket={}", socket.display()))
    };
    Some(Disk {
        id: id.into_iter().find(|id| !id.is_empty())?,
        ours: facts.disk_sockets.iter().any(is_ours),
        direct: inserted.pointer("/cache/direct") == Some(&Value::Bool(true)),
        source,
    })
}

/// The path of a chardev's socket. `query-chardev` does not tell: 7.2 prints the near end's name, which is empty.
async fn socket_of(qmp: &Qmp, chardev: &str) -> Result<String> {
    let path = format!("/chardevs/{chardev}");
    let address: Value = qmp.execute("qom-get", json!({ "path": path, "property": "addr" })).await?;
    Ok(address.get("path").and_then(Value::as_str).unwrap_or(chardev).to_owned())
}

/// Devices of which another process, or hardware, writes guest memory. Gives those that pass the guest's commands on to
/// a disk of this host, whose transfers are direct.
pub(super) async fn others(qmp: &Qmp, found: &mut Findings) -> Result<Vec<String>> {
    let mut direct = Vec::new();
    for base in DEVICE_PATHS {
        for (name, kind) in children(qmp, base).await? {
            let what = match kind.as_str() {
                kind if kind.starts_with("vfio") => "hardware writes guest memory by itself",
                kind if kind.starts_with("vhost-user-blk") => continue,
                kind if kind.starts_with("vhost-user") || kind.starts_with("vhost-vdpa") => {
                    "another program writes guest memory"
                }
                kind if kind.starts_with("vhost-scsi") => {
                    "the kernel's own target writes guest memory directly"
                }
                "scsi-block" | "scsi-generic" => {
                    direct.push(name);
                    continue;
                }
                kind if kind.starts_with("ivshmem") => "its memory is shared with others",
                _ => continue,
            };
            found.mode_a.push(format!("device {name} ({kind}): {what}, which cannot be tracked"));
        }
    }
    let networks = qmp.human("info network").await?;
    for line in
        networks.lines().filter(|line| line.contains("type=vhost-user") || line.contains("type=vhost-vdpa"))
    {
        let name = line.trim().trim_start_matches("\\ ").split(':').next().unwrap_or_default();
        found
            .mode_a
            .push(format!("network {name}: another program writes guest memory, which cannot be tracked"));
    }
    Ok(direct)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn direct_io_of_a_foreign_disk_is_seen() {
        let drive = json!({ "device": "", "qdev": "/machine/peripheral/d0", "inserted": {
            "node-name": "n0", "drv": "raw", "file": "/srv/disk.img", "cache": { "direct": true } } });
        let disk = block_device(&drive, &HostFacts::default()).unwrap();
        assert!(disk.direct && !disk.ours);
        assert_eq!(disk.id, "/machine/peripheral/d0");
        let facts = HostFacts { disk_sockets: vec!["/run/v.sock".into()], ..HostFacts::default() };
        let drive = json!({ "device": "d", "inserted": { "drv": "nbd", "file": "nbd+unix:///v?socket=/run/v.sock" } });
        assert!(block_device(&drive, &facts).unwrap().ours);
        assert!(block_device(&json!({ "device": "cd0" }), &facts).is_none());
    }
}
