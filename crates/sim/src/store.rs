//! The metadata store: the VM's and its volume's records, changed by compare-and-swap; outages, answers that get
//! lost, requests that arrive late.
//!
//! Invariants checked on every change: a right's epoch rises by one when its holder changes, and never else.

use whimbrel_engine::migrate::handover::{Cas, CasResult, Seen};
use whimbrel_wire::meta::{VmRecord, VolumeRecord};
use whimbrel_wire::{HostId, Right, WireError};

/// See the module's charter.
#[derive(Debug)]
pub struct Store {
    rev: u64,
    vm: (VmRecord, u64),
    volume: (VolumeRecord, u64),
    /// Requests are not served.
    pub down: bool,
    /// Of a thousand requests: made, but the answer is lost.
    pub lose_answers: u64,
    /// Of a thousand requests: late by up to eight seconds.
    pub late: u64,
}

impl Store {
    /// A store with one VM and its volume.
    pub fn new(vm: VmRecord, volume: VolumeRecord) -> Self {
        Self { rev: 1, vm: (vm, 1), volume: (volume, 1), down: false, lose_answers: 0, late: 0 }
    }

    /// What a read sees.
    pub fn seen(&self) -> Seen {
        Seen { vm: Some(self.vm.clone()), volumes: vec![self.volume.clone()] }
    }

    /// The VM's record.
    pub fn vm(&self) -> &VmRecord {
        &self.vm.0
    }

    /// Who holds the right to run the VM.
    pub fn holder(&self) -> &HostId {
        &self.vm.0.right.holder
    }

    /// Makes a change if its conditions hold. `Err` is a broken rule.
    pub fn apply(&mut self, cas: &Cas) -> Result<CasResult, String> {
        let unchanged = cas.vm.1 == self.vm.1 && cas.volumes.iter().all(|(_, rev)| *rev == self.volume.1);
        if !unchanged {
            return Ok(CasResult::Conflict);
        }
        check_right(&self.vm.0.right, &cas.vm.0.right)?;
        self.rev += 1;
        self.vm = (cas.vm.0.clone(), self.rev);
        if let Some((volume, _)) = cas.volumes.first() {
            check_right(&self.volume.0.right, &volume.right)?;
            self.volume = (volume.clone(), self.rev);
        }
        if self.vm.0.right.holder != self.volume.0.right.holder {
            return Err(format!(
                "the VM is held by {}, its volume by {}",
                self.vm.0.right.holder, self.volume.0.right.holder
            ));
        }
        Ok(CasResult::Yes(self.rev))
    }
}

fn check_right(old: &Right, new: &Right) -> Result<(), String> {
    let moved = old.holder != new.holder;
    let want = if moved { old.epoch.next() } else { old.epoch };
    // The operator may place a VM on the host that holds it already: a new epoch with the same holder.
    if new.epoch == want || new.epoch == old.epoch.next() {
        return Ok(());
    }
    Err(format!(
        "a right went from {} at epoch {} to {} at epoch {}",
        old.holder, old.epoch, new.holder, new.epoch
    ))
}

/// The error of a request without an answer.
pub fn no_answer() -> WireError {
    WireError::new(whimbrel_wire::ErrorKind::Unavailable, "the store does not answer")
}
