//! What the copy has to ask of QEMU while the guest runs: that its own disks have ended what they had under way before
//! a page is read, and that the VM's memory is still the one that is copied.
//!
//! Invariants
//! * VMs whose disks go through the page tables are never made to wait: [`Watch::grace`] does nothing for them.
//! * Memory that was added or removed meanwhile ends the move with words before the guest is paused. What slips in
//!   between this look and the pause is refused by the target's QEMU, which knows all blocks by name and size.
//!
//! Not here: what a drain is and why (`guest::drain`).

use crate::error::{Error, ErrorKind, Result};
use crate::guest::drain::Drains;
use crate::guest::precheck::{self, Report};
use crate::guest::qmp::Qmp;
use crate::task::TaskHandle;

/// See the module's charter.
pub struct Watch {
    qmp: Qmp,
    drains: Option<Drains>,
    ram: Vec<(String, u64)>,
}

impl Watch {
    /// For the VM that `report` is about.
    pub fn new(qmp: Qmp, report: &Report) -> Self {
        let drains = (!report.direct_io.is_empty()).then(|| Drains::new(qmp.clone()));
        let ram = report.ram.iter().map(|block| (block.name.clone(), block.size_bytes)).collect();
        Self { qmp, drains, ram }
    }

    /// Between a scan and the reading of what it reported: returns once all transfers have ended that were under way at
    /// the scan.
    pub async fn grace(&mut self) -> Result<()> {
        match &mut self.drains {
            Some(drains) => drains.pass().await,
            None => Ok(()),
        }
    }

    /// Fails if the VM has other memory than at the beginning.
    pub async fn same_memory(&self) -> Result<()> {
        let now = precheck::ram_sizes(&self.qmp).await?;
        match difference(&self.ram, &now) {
            None => Ok(()),
            Some(words) => Err(Error::new(ErrorKind::Refused, format!("copy memory: {words}")).hint(
                "the VM goes on here; remove what was plugged in, or start the VM with it, and move it again",
            )),
        }
    }

    /// Shows what drains have cost, if there were any.
    pub fn show(&self, task: &TaskHandle) {
        let Some(stats) = self.drains.as_ref().map(Drains::stats) else { return };
        task.figure("drains", f64::from(stats.count));
        task.figure("drain_ms", stats.total.as_secs_f64() * 1e3);
        task.figure("drain_longest_ms", stats.longest.as_secs_f64() * 1e3);
    }
}

/// In words, the first block that one of the lists lacks. ROMs are left out: a reset changes their sizes.
fn difference(before: &[(String, u64)], now: &[(String, u64)]) -> Option<String> {
    let is_rom = |name: &str| name.is_empty() || name.starts_with("/rom@");
    let lacks = |list: &[(String, u64)], block: &(String, u64)| !is_rom(&block.0) && !list.contains(block);
    let added = now.iter().find(|block| lacks(before, block));
    let gone = before.iter().find(|block| lacks(now, block));
    let mib = |bytes: u64| bytes >> 20;
    match (added, gone) {
        (Some((name, bytes)), _) => {
            Some(format!("memory was added to the VM meanwhile (block {name}, {} MiB)", mib(*bytes)))
        }
        (None, Some((name, bytes))) => {
            Some(format!("memory was removed from the VM meanwhile (block {name}, {} MiB)", mib(*bytes)))
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn memory_that_comes_or_goes_is_named() {
        let block = |name: &str, bytes| (name.to_owned(), bytes);
        let before =
            [block("ram", 1 << 30), block("pc.bios", 1 << 18), block("/rom@etc/acpi/tables", 1 << 17)];
        let mut now = before.to_vec();
        now[2].1 <<= 1;
        assert_eq!(difference(&before, &now), None);
        now.push(block("dimm1", 128 << 20));
        assert!(
            difference(&before, &now).unwrap().contains("added to the VM meanwhile (block dimm1, 128 MiB)")
        );
        assert!(difference(&now, &before).unwrap().contains("removed from the VM meanwhile (block dimm1"));
        assert!(difference(&before, &[]).unwrap().contains("block ram, 1024 MiB"));
    }
}
