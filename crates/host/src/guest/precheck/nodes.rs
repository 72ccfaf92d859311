//! QEMU's block nodes: which of them transfer into guest memory past the page tables.
//!
//! | a node | its transfers into guest memory |
//! |---|---|
//! | a file or device through the page cache | copied by the kernel: seen |
//! | NBD, SSH, HTTP, iSCSI, NFS, RBD, … | copied by QEMU: seen |
//! | a file or device with `cache=none`, or on a file system that may bypass the page cache by itself | direct: seen when they begin, not when they end; a drain closes the gap (`guest::drain`) |
//! | `nvme`, libblkio's | hardware or another program holds guest memory for good: never seen |
//!
//! Every node counts, backing files and unused ones too: a request goes down the chain with the guest's own buffer.
//!
//! Not here: devices that are no block nodes (`devices`).

use std::path::Path;

use serde_json::{Value, json};

use super::Findings;
use crate::error::Result;
use crate::guest::qmp::Qmp;

/// Drivers that read a file of this host.
const FILE_DRIVERS: [&str; 3] = ["file", "host_device", "host_cdrom"];
/// Drivers that keep guest memory mapped for hardware or for another program.
const MAPPING_DRIVERS: [&str; 4] = ["nvme", "io_uring", "nvme-io_uring", "virtio-blk-"];
/// File systems that read through the page cache when not asked otherwise: ext2 to 4, XFS, Btrfs, tmpfs, ramfs,
/// overlayfs, NFS, F2FS, squashfs, ISO 9660, UDF, FAT. FUSE and CIFS are not among them: a mount may be all direct.
const CACHED_FILE_SYSTEMS: [i64; 12] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0x8584_58f6,
    0x794c_7630,
    0x6969,
    0xf2f5_2010,
    0x7371_7368,
    0x9660,
    0x1501_3346,
    0x4d44,
];

/// What a node's transfers look like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transfers {
    Seen,
    Direct,
    Never,
}

/// Looks at every node; gives the files that are read or written directly.
pub(super) async fn direct_io(qmp: &Qmp, found: &mut Findings) -> Result<Vec<String>> {
    let nodes: Vec<Value> = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let mut direct = Vec::new();
    for node in &nodes {
        let text = |key: &str| node.get(key).and_then(Value::as_str).unwrap_or_default();
        let (driver, file) = (text("drv"), text("file"));
        let asked = node.pointer("/cache/direct") == Some(&Value::Bool(true));
        match judge(driver, asked, || through_cache(Path::new(file))) {
            Transfers::Seen => {}
            Transfers::Direct if direct.iter().any(|known| known == file) => {}
            Transfers::Direct => direct.push(file.to_owned()),
            Transfers::Never => found.mode_a.push(format!(
                "disk node {} (driver {driver}): hardware or another program writes guest memory by itself, which cannot \
                 be tracked",
                text("node-name")
            )),
        }
    }
    Ok(direct)
}

fn judge(driver: &str, asked: bool, cached: impl FnOnce() -> bool) -> Transfers {
    // A name that ends in a dash stands for all that begin with it.
    let maps =
        |one: &&'static str| if one.ends_with('-') { driver.starts_with(*one) } else { driver == *one };
    if MAPPING_DRIVERS.iter().any(maps) {
        return Transfers::Never;
    }
    match FILE_DRIVERS.contains(&driver) && (asked || !cached()) {
        true => Transfers::Direct,
        false => Transfers::Seen,
    }
}

/// Whether a file is read through the page cache; a file that cannot be looked at from here is taken not to be.
fn through_cache(file: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    let Ok(metadata) = std::fs::metadata(file) else { return false };
    if metadata.file_type().is_block_device() {
        return true;
    }
    rustix::fs::statfs(file).is_ok_and(|system| CACHED_FILE_SYSTEMS.contains(&{ system.f_type }))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_goes_past_the_page_tables_is_told_from_what_does_not() {
        let cases = [
            ("file", false, true, Transfers::Seen),
            ("file", true, true, Transfers::Direct),
            ("file", false, false, Transfers::Direct),
            ("host_device", true, true, Transfers::Direct),
            ("qcow2", true, false, Transfers::Seen),
            ("nbd", true, false, Transfers::Seen),
            ("nvme", false, true, Transfers::Never),
            ("nvme-io_uring", false, true, Transfers::Never),
            ("virtio-blk-vhost-vdpa", false, true, Transfers::Never),
        ];
        for (driver, asked, cached, expected) in cases {
            assert_eq!(judge(driver, asked, || cached), expected, "{driver}, direct={asked}");
        }
    }

    #[test]
    fn only_a_file_on_a_known_file_system_goes_through_the_cache() {
        let file = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(through_cache(file.path()));
        assert!(!through_cache(&file.path().join("nothing")));
        assert!(!through_cache(Path::new("/proc/self/maps")));
        assert!(!through_cache(Path::new("json:{\"driver\":\"file\"}")));
    }
}
