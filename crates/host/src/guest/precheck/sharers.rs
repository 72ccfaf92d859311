//! Other programs that have a VM's RAM file mapped: what they write there, QEMU's page tables do not show.
//!
//! The agent itself maps it to serve disks, and marks what it writes; it does not count. A process that cannot be looked
//! at is left out: without the right to look, QEMU could not be traced either.
//!
//! Not here: devices by which QEMU itself lets others in (`devices`).

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use super::{Findings, MovedBy, RamBlock};
use crate::error::{Context as _, Result};
use crate::guest::proc_fs;

/// Looks through the processes of this host.
pub(super) fn others(qemu: u32, ram: &[RamBlock], found: &mut Findings) -> Result<()> {
    let ours: Vec<(&RamBlock, fs::Metadata)> = ram
        .iter()
        .filter(|block| block.moved_by == MovedBy::Us)
        .filter_map(|block| Some((block, fs::metadata(block.path.as_ref()?).ok()?)))
        .collect();
    if ours.is_empty() {
        return Ok(());
    }
    let entries = fs::read_dir("/proc").context("list processes")?;
    let processes = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for process in processes.filter(|process| *process != qemu && *process != std::process::id()) {
        // It may have ended meanwhile.
        let Ok(mappings) = proc_fs::mappings(process) else { continue };
        for (block, file) in &ours {
            let same = |one: &&proc_fs::Mapping| one.inode == file.ino() && one.device == file.dev();
            if mappings.iter().filter(same).any(|one| one.shared && one.writable) {
                let name = proc_fs::status(process, "Name").unwrap_or_default();
                found.mode_a.push(format!(
                    "process {process} ({name}) has RAM block {} mapped for writing: what it writes cannot be tracked",
                    block.name
                ));
            }
        }
    }
    Ok(())
}
