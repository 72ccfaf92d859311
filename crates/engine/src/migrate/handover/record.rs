//! What the records say about an attempt, and every change a move makes to them.
//!
//! ```text
//!             holder  epoch  attempt  came_by   state
//! begin       source  e      A        –         migrating
//! clear       source  e      none     –         running / crashed      (undo; makes a commit impossible)
//! commit      target  e+1    none     A         starting               (with the volumes' rights)
//! mark        target  e+1    none     A         running / crashed
//! hand back   source  e+2    none     A         starting               (with the volumes' rights)
//! recover     ON      +1     none     none      starting               (the operator; with the volumes' rights)
//! ```
//!
//! Invariants: each change is one transaction on the condition that no record has changed since it was read; a
//! right changes hands only with epoch + 1.

use whimbrel_wire::meta::{Attempt, VmRecord, VmState, VolumeRecord};
use whimbrel_wire::peer::migrate::{Course, JournalEntry, Offer, Side, Step};
use whimbrel_wire::{AttemptId, Epoch, HostId, WireError, api::DiskMove};

/// The records of a VM and its volumes, read at one revision of the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The VM's record with the revision of its last change; none if it has been removed.
    pub vm: Option<(VmRecord, u64)>,
    /// Its volumes' records, likewise.
    pub volumes: Vec<(VolumeRecord, u64)>,
}

/// One transaction: write these records if each was last changed at the revision beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cas {
    /// The VM's new record, and the revision at which it must have been changed last.
    pub vm: (VmRecord, u64),
    /// Volumes' new records, likewise. Those that are not changed are not listed.
    pub volumes: Vec<(VolumeRecord, u64)>,
}

/// How a [`Cas`] ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasResult {
    /// Made, at this revision.
    Yes(u64),
    /// A record has changed since; nothing was written (by this request).
    Conflict,
    /// It was not made and never will be: the store could not be reached, or refused.
    NotMade(WireError),
    /// No answer, or an error that does not exclude that it was or will be made.
    Unknown(WireError),
}

/// What the record says to the source of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SourceView {
    /// The source holds the right at the attempt's epoch; whether the attempt stands in the record.
    Ours { attempt: bool },
    /// The target holds it, by this attempt or by the operator's hand; whether it has run the guest.
    Target { ran: bool },
    /// The source holds it again, and the guest has not run elsewhere (or the operator says so).
    HandedBack,
    /// Neither; whatever the source keeps of this attempt is no longer the VM.
    Elsewhere(Option<HostId>),
}

/// What the record says to the target of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TargetView {
    /// The attempt stands in the record.
    Pending,
    /// The target holds the right, by this attempt or by the operator's hand.
    Mine,
    /// The attempt is over; who holds the right.
    Over(Option<HostId>),
}

impl Seen {
    /// `epoch` is the one at which the source holds the right as far as it knows.
    pub(super) fn for_source(&self, offer: &Offer, epoch: Epoch) -> SourceView {
        let Some((vm, _)) = &self.vm else { return SourceView::Elsewhere(None) };
        let right = &vm.right;
        if right.holder == offer.source {
            if right.epoch == epoch {
                let attempt = vm.attempt.as_ref().is_some_and(|attempt| attempt.id == offer.attempt);
                return SourceView::Ours { attempt };
            }
            if right.epoch > epoch && vm.came_by.is_none_or(|by| by == offer.attempt) {
                return SourceView::HandedBack;
            }
        } else if right.holder == offer.target
            && right.epoch == epoch.next()
            && vm.came_by.is_none_or(|by| by == offer.attempt)
        {
            let ran = !matches!(vm.state, VmState::Starting | VmState::NeedsOperator);
            return SourceView::Target { ran };
        }
        SourceView::Elsewhere(Some(right.holder.clone()))
    }

    pub(super) fn for_target(&self, offer: &Offer) -> TargetView {
        let Some((vm, _)) = &self.vm else { return TargetView::Over(None) };
        let right = &vm.right;
        let by_this = |by: AttemptId| by == offer.attempt;
        if right.holder == offer.target && right.epoch == offer.epoch.next() && vm.came_by.is_none_or(by_this)
        {
            return TargetView::Mine;
        }
        let stands = vm.attempt.as_ref().is_some_and(|attempt| by_this(attempt.id));
        if right.holder == offer.source && right.epoch == offer.epoch && stands {
            return TargetView::Pending;
        }
        TargetView::Over(Some(right.holder.clone()))
    }

    /// Whether the VM's record says this.
    pub(super) fn state_is(&self, state: VmState) -> bool {
        self.vm.as_ref().is_some_and(|(vm, _)| vm.state == state)
    }

    /// Whether some volume still has blocks at `host` only.
    pub(super) fn depends_on(&self, host: &HostId) -> bool {
        self.volumes.iter().any(|(volume, _)| volume.depends_on.as_ref() == Some(host))
    }

    /// A change of the VM's record alone.
    pub(super) fn edit(&self, edit: impl FnOnce(&mut VmRecord)) -> Option<Cas> {
        let (mut vm, rev) = self.vm.clone()?;
        edit(&mut vm);
        Some(Cas { vm: (vm, rev), volumes: Vec::new() })
    }

    /// The attempt begins.
    pub(super) fn begin(&self, offer: &Offer) -> Option<Cas> {
        self.edit(|vm| {
            vm.attempt = Some(Attempt { id: offer.attempt, target: offer.target.clone() });
            vm.state = VmState::Migrating;
            vm.waiting_for = None;
        })
    }

    /// The VM stays where it is, in this state. One that has crashed lets go of its volumes.
    pub(super) fn settle(&self, state: VmState) -> Option<Cas> {
        let mut cas = self.edit(|vm| {
            vm.attempt = None;
            vm.state = state;
            vm.waiting_for = None;
        })?;
        if state == VmState::Crashed {
            cas.volumes.clone_from(&self.volumes);
            for (volume, _) in &mut cas.volumes {
                volume.attached_to = None;
            }
        }
        Some(cas)
    }

    /// An operator is needed; the right is not touched.
    pub(super) fn call_operator(&self, waiting_for: String) -> Option<Cas> {
        self.edit(|vm| {
            vm.state = VmState::NeedsOperator;
            vm.waiting_for = Some(waiting_for);
        })
    }

    /// The right over the VM and its volumes passes to `holder`.
    fn pass(&self, holder: &HostId, by: Option<AttemptId>) -> Option<Cas> {
        let mut cas = self.edit(|vm| {
            vm.right = vm.right.passed_to(holder.clone());
            vm.attempt = None;
            vm.came_by = by;
            vm.state = VmState::Starting;
            vm.waiting_for = None;
        })?;
        cas.volumes.clone_from(&self.volumes);
        for (volume, _) in &mut cas.volumes {
            volume.right = volume.right.passed_to(holder.clone());
            // Whoever has the blocks does not depend on himself.
            volume.depends_on.take_if(|on| on == holder);
        }
        Some(cas)
    }

    /// COMMIT.
    pub(super) fn commit(&self, offer: &Offer) -> Option<Cas> {
        let mut cas = self.pass(&offer.target, Some(offer.attempt))?;
        for (volume, _) in &mut cas.volumes {
            volume.depends_on = match offer.disk {
                DiskMove::Copy => None,
                DiskMove::OnDemand => Some(offer.source.clone()),
            };
        }
        Some(cas)
    }

    /// The target, which has not run the guest, gives the right back.
    pub(super) fn hand_back(&self, offer: &Offer) -> Option<Cas> {
        let mut cas = self.pass(&offer.source, Some(offer.attempt))?;
        for (volume, _) in &mut cas.volumes {
            volume.depends_on = None;
        }
        Some(cas)
    }

    /// No volume depends on another host any more.
    pub(super) fn pulled(&self) -> Option<Cas> {
        let mut cas = self.edit(|vm| vm.waiting_for = None)?;
        cas.volumes.clone_from(&self.volumes);
        for (volume, _) in &mut cas.volumes {
            volume.depends_on = None;
        }
        Some(cas)
    }
}

/// Whether a host with this entry has all of the VM, so that the operator may let the guest go on there: the source
/// until it gives its copy up, the target from READY until it gives the VM up.
pub fn can_run(entry: &JournalEntry) -> bool {
    match entry.side {
        Side::Source => entry.step < Step::Release,
        Side::Target => entry.step >= Step::Verify && entry.course == Course::Onward,
    }
}

/// `vm recover NAME --on HOST`: the operator has made sure that the holder is off. Every later change by the old
/// holder conflicts; a host that has everything of an attempt under way (target after READY, source after COMMIT)
/// lets the guest go on, any other has to start the VM from its disks. None if there is no such VM.
pub fn recover(seen: &Seen, on: &HostId) -> Option<Cas> {
    seen.pass(on, None)
}
