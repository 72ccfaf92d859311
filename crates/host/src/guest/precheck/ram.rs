//! Every RAM block of a QEMU, and who carries it to the target.
//!
//! QEMU's rule under `x-ignore-shared` (migration/ram.c, `migrate_ram_is_ignored`): a block is left out of the
//! stream if it is not migratable (it has no name then), or if it is shared and, since 8.1, also a named file.
//! Before 8.1 shared memfd blocks are left out too, and would be lost.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Findings, MovedBy, RamBlock, children, property};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::dirty::RamMapping;
use crate::guest::proc_fs::{self, Mapping};
use crate::guest::qmp::{Qmp, Version};

/// The first version that leaves out named files only.
const NAMED_FILES_ONLY: Version = Version { major: 8, minor: 1, micro: 0 };
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A `memory-backend-*` object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Backend {
    kind: String,
    share: bool,
    path: Option<PathBuf>,
}

/// Looks at every block; what speaks against a move goes to `found`.
pub(super) async fn blocks(qmp: &Qmp, pid: u32, found: &mut Findings) -> Result<Vec<RamBlock>> {
    let listed = parse_blocks(&qmp.human("info ramblock").await?);
    if listed.is_empty() {
        return Err(Error::new(ErrorKind::Unsupported, "read `info ramblock`: it lists no block"));
    }
    let backends = backends(qmp).await?;
    let mappings = proc_fs::mappings(pid)?;
    let mut blocks = Vec::new();
    for listed in listed {
        // Machine types up to 4.0 name blocks by the object's full path.
        let id = listed.name.strip_prefix("/objects/").unwrap_or(&listed.name);
        blocks.push(judge(listed.clone(), backends.get(id), &mappings, qmp.version(), found));
    }
    let ours: Vec<&str> = blocks
        .iter()
        .filter(|block| block.moved_by == MovedBy::Us)
        .map(|block| block.name.as_str())
        .collect();
    match ours.as_slice() {
        [] if found.mode_a.is_empty() => found.mode_a.push("no RAM block is a file".to_owned()),
        [] | [_] => {}
        several => found.mode_a.push(format!("RAM is in several files ({}): use one", several.join(", "))),
    }
    Ok(blocks)
}

/// Name and size of every block.
pub(super) async fn sizes(qmp: &Qmp) -> Result<Vec<(String, u64)>> {
    let listed = parse_blocks(&qmp.human("info ramblock").await?);
    Ok(listed.into_iter().map(|block| (block.name, block.size_bytes)).collect())
}

/// Why QEMU's own stream would leave writes behind: before 9.0 under TCG it loses track of writes to a block that is a
/// whole multiple of 64 pages (see `launch::ram_bytes`).
pub(super) fn lost_by_stream(blocks: &[RamBlock], accel: &str, version: Version) -> Option<String> {
    const FIXED: Version = Version { major: 9, minor: 0, micro: 0 };
    const WORD_BYTES: u64 = 64 * 4096;
    // Firmware and option ROMs are written before the guest runs, if ever.
    let is_rom = |name: &str| {
        let by_path = name.starts_with('/') && !name.starts_with("/objects/");
        by_path || name.ends_with(".rom") || name.ends_with("bios")
    };
    let lost: Vec<&str> = blocks
        .iter()
        .filter(|block| !is_rom(&block.name) && block.size_bytes.is_multiple_of(WORD_BYTES))
        .map(|block| block.name.as_str())
        .collect();
    (accel == "tcg" && version < FIXED && !lost.is_empty()).then(|| {
        format!(
            "QEMU {version} under TCG loses writes to RAM blocks whose size is a multiple of 256 KiB ({}) from its own \
             stream: use QEMU 9.0 or later, KVM, or sizes 8 KiB less",
            lost.join(", ")
        )
    })
}

fn judge(
    listed: Listed,
    backend: Option<&Backend>,
    mappings: &[Mapping],
    version: Version,
    found: &mut Findings,
) -> RamBlock {
    let Listed { name, page_size_bytes, size_bytes } = listed;
    let mut block = RamBlock {
        name,
        path: None,
        size_bytes,
        page_size_bytes,
        mappings: Vec::new(),
        moved_by: MovedBy::QemuStream,
    };
    if block.name.is_empty() {
        block.moved_by = MovedBy::Nobody;
        found
            .refusals
            .push(format!("a RAM block of {size_bytes} bytes belongs to a device that cannot be moved"));
        return block;
    }
    // Not a backend's: QEMU's own private memory (ROMs and the like), always in the stream.
    let Some(backend) = backend else {
        if is_guest_ram(&block.name) {
            found.mode_a.push(not_a_file(&block.name, "it is private memory of QEMU"));
        }
        return block;
    };
    let file = backend.path.as_ref().filter(|_| backend.kind == "memory-backend-file");
    match file {
        Some(path) if backend.share => match file_mappings(path, size_bytes, mappings) {
            Ok(own) => {
                block.path = Some(path.clone());
                block.mappings = own;
                block.moved_by = MovedBy::Us;
            }
            Err(words) => {
                block.moved_by = MovedBy::Nobody;
                found.mode_a.push(format!("RAM block {} is {}: {words}", block.name, path.display()));
            }
        },
        Some(path) => {
            found.mode_a.push(not_a_file(&block.name, &format!("{} has share=off", path.display())));
        }
        None => {
            if backend.share && version < NAMED_FILES_ONLY {
                block.moved_by = MovedBy::Nobody;
            }
            found.mode_a.push(not_a_file(&block.name, &format!("it is a {}", backend.kind)));
        }
    }
    block
}

fn not_a_file(block: &str, why: &str) -> String {
    format!(
        "RAM block {block} is not a named file mapped shared ({why}): start QEMU with memory-backend-file,share=on"
    )
}

/// Main memory by the names that machine types give it when no backend is stated.
fn is_guest_ram(name: &str) -> bool {
    matches!(name, "pc.ram" | "microvm.ram" | "mach-virt.ram" | "ram")
}

/// The files among the backends.
pub(super) async fn files(qmp: &Qmp) -> Result<Vec<PathBuf>> {
    Ok(backends(qmp).await?.into_values().filter_map(|backend| backend.path).collect())
}

async fn backends(qmp: &Qmp) -> Result<BTreeMap<String, Backend>> {
    let mut found = BTreeMap::new();
    for (id, kind) in children(qmp, "/objects").await? {
        if !kind.starts_with("memory-backend-") {
            continue;
        }
        let path = format!("/objects/{id}");
        let share = qmp.execute::<Value>("qom-get", json!({ "path": path, "property": "share" })).await?;
        let file = match kind.as_str() {
            "memory-backend-file" => Some(PathBuf::from(property(qmp, &path, "mem-path").await?)),
            _ => None,
        };
        found.insert(id, Backend { kind, share: share == Value::Bool(true), path: file });
    }
    Ok(found)
}

/// Where QEMU has the file mapped; an error is words on why the file is of no use to us.
fn file_mappings(
    path: &Path,
    size_bytes: u64,
    mappings: &[Mapping],
) -> std::result::Result<Vec<RamMapping>, String> {
    let file = fs::metadata(path).map_err(|error| format!("the agent cannot reach it ({error})"))?;
    if file.is_dir() {
        return Err("a directory, the file in it has no name: state a file".to_owned());
    }
    let kind = rustix::fs::statfs(path).map_err(|error| format!("statfs: {error}"))?.f_type;
    if kind == HUGETLBFS_MAGIC {
        return Err(
            "on hugetlbfs, which a target cannot fill: use tmpfs, with transparent huge pages".to_owned()
        );
    }
    if kind != TMPFS_MAGIC {
        return Err("not on tmpfs, where writes can be tracked: put it below /dev/shm".to_owned());
    }
    let name = path.to_string_lossy();
    let own = mappings.iter().filter(|one| one.shared && one.inode == file.ino() && one.path == name);
    let own: Vec<_> = own
        .map(|one| RamMapping { file_offset: one.offset, address: one.start, length: one.length() })
        .collect();
    let mapped: u64 = own.iter().map(|one| one.length).sum();
    if mapped != size_bytes || file.len() < size_bytes {
        return Err(format!(
            "{mapped} of {size_bytes} bytes are mapped, the file has {}: was it replaced or is it seen through \
             another mount?",
            file.len()
        ));
    }
    Ok(own)
}

/// A line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    page_size_bytes: u64,
    size_bytes: u64,
}

/// Lines are `name  4 KiB  offset used total …`; the name may be empty, numbers are hexadecimal.
fn parse_blocks(text: &str) -> Vec<Listed> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let unit = words.iter().position(|word| matches!(*word, "KiB" | "MiB" | "GiB"))?;
        let shift = match words.get(unit) {
            Some(&"KiB") => 10,
            Some(&"MiB") => 20,
            _ => 30,
        };
        let number = words.get(unit.checked_sub(1)?)?.parse::<u64>().ok()?;
        let used = words.get(unit + 2)?.strip_prefix("0x")?;
        Some(Listed {
            name: words.get(..unit - 1)?.join(" "),
            page_size_bytes: number.checked_shl(shift)?,
            size_bytes: u64::from_str_radix(used, 16).ok()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    const V7: Version = Version { major: 7, minor: 2, micro: 22 };
    const V10: Version = Version { major: 10, minor: 0, micro: 2 };

    #[test]
    fn blocks_are_read_from_both_versions() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
             \x20                    ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000\r\n\
             /rom@etc/acpi/tables    4 KiB  0x00000000100c0000 0x0000000000020000 0x0000000000200000\r\n";
        let blocks = parse_blocks(old);
        assert_eq!(blocks.len(), 2);
        assert_eq!((blocks[0].name.as_str(), blocks[0].size_bytes), ("ram", 128 << 20));
        assert_eq!((blocks[1].name.as_str(), blocks[1].size_bytes), ("/rom@etc/acpi/tables", 0x20000));
        let new = "ram    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f1507fff000  rw\r\n\
             \x20   4 KiB  0x0 0x1000 0x1000 0x0 rw";
        let blocks = parse_blocks(new);
        assert_eq!(blocks[0].page_size_bytes, 2 << 20);
        assert_eq!(blocks[1].name, "");
    }

    fn listed(name: &str) -> Listed {
        Listed { name: name.to_owned(), page_size_bytes: 4096, size_bytes: 1 << 20 }
    }

    #[test]
    fn a_shared_memfd_is_lost_before_8_1_and_streamed_since() {
        let memfd = Backend { kind: "memory-backend-memfd".to_owned(), share: true, path: None };
        for (version, moved_by) in [(V7, MovedBy::Nobody), (V10, MovedBy::QemuStream)] {
            let mut found = Findings::default();
            let block = judge(listed("m0"), Some(&memfd), &[], version, &mut found);
            assert_eq!(block.moved_by, moved_by, "{version}");
            assert_eq!(found.mode_a.len(), 1);
            assert!(found.refusals.is_empty(), "QEMU's own stream carries it in mode B");
        }
    }

    #[test]
    fn blocks_that_old_versions_lose_under_tcg_are_named() {
        let block = |name: &str, size_bytes| RamBlock {
            name: name.to_owned(),
            path: None,
            size_bytes,
            page_size_bytes: 4096,
            mappings: Vec::new(),
            moved_by: MovedBy::QemuStream,
        };
        let blocks = [
            block("pc.ram", 256 << 20),
            block("vga.vram", 16 << 20),
            block("pc.bios", 256 << 10),
            block("0000:00:02.0/vga.rom", 256 << 10),
            block("m0", (256 << 20) - 8192),
        ];
        let why = lost_by_stream(&blocks, "tcg", V7).unwrap();
        assert!(why.contains("(pc.ram, vga.vram)"), "{why}");
        assert_eq!(lost_by_stream(&blocks, "kvm", V7), None);
        assert_eq!(lost_by_stream(&blocks, "tcg", V10), None);
        assert_eq!(lost_by_stream(&blocks[2..], "tcg", V7), None);
    }

    #[test]
    fn firmware_is_in_the_stream_and_main_memory_without_a_file_is_a_reason() {
        let mut found = Findings::default();
        assert_eq!(judge(listed("pc.bios"), None, &[], V10, &mut found).moved_by, MovedBy::QemuStream);
        assert!(found.mode_a.is_empty());
        judge(listed("pc.ram"), None, &[], V10, &mut found);
        assert!(found.mode_a[0].contains("pc.ram"), "{:?}", found.mode_a);
    }

    #[test]
    fn a_file_that_tracking_does_not_reach_is_a_reason_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        for (make, words) in [(false, "cannot reach"), (true, "tmpfs")] {
            if make {
                fs::write(&path, b"x").unwrap();
            }
            let shared =
                Backend { kind: "memory-backend-file".into(), share: true, path: Some(path.clone()) };
            let mut found = Findings::default();
            let block = judge(listed("ram"), Some(&shared), &[], V10, &mut found);
            if rustix::fs::statfs(dir.path()).unwrap().f_type != TMPFS_MAGIC || !make {
                assert_eq!(block.moved_by, MovedBy::Nobody);
                assert!(found.mode_a[0].contains(words), "{:?}", found.mode_a);
            }
        }
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// QEMU's list of RAM blocks.
        fn listed_blocks(bytes) seeds [
            b"   Block Name    PSize   Offset   Used   Total\r\n ram    4 KiB  0x0 0x8000000 0x8000000\r\n",
        ] {
            let _ = parse_blocks(&String::from_utf8_lossy(bytes));
        }
    }
}
