//! Carries out the handover that the engine decides.
//!
//! ```text
//!   Migrations ── start ──► SourceSide ─┐                        ┌─ TargetSide ◄── migrate.control (an offer)
//!                                       ├─ driver ── machine ── driver
//!        copy: memory rounds, layers ───┴──── streams ───────────┴── receives, verifies, keeps
//! ```
//!
//! | stream | carries |
//! |---|---|
//! | `migrate.control` | the machines' messages |
//! | `migrate.memory` | mode A: pages |
//! | `migrate.layer` | one volume's writable layer, or which blocks it has if they follow later |
//! | `migrate.state` | device state, the RAM's hash, where each layer ends |
//! | `migrate.qemu` | mode B: QEMU's own stream, and its return path |
//!
//! Invariants: what the machine orders is idempotent here; nothing of a VM is given up but by `Release` and
//! `Discard`; after a restart every journalled attempt goes on.
//!
//! Not here: the order of steps and what follows from failures (`engine::migrate::handover`).

mod control;
mod copy;
mod data;
mod driver;
mod follow;
mod journal;
mod source;
mod store;
mod target;
mod watch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;
use whimbrel_engine::migrate::handover::{
    self, Cas, CasResult, Course, JournalEntry, Offer, Outcome, Seen, Side, Source, Step, Target,
};
use whimbrel_wire::api::{PostCopy, TaskKind, VmMigrate};
use whimbrel_wire::meta::{HostRecord, Mode, VmRecord, VmSpec, VmState, VolumeRecord, key};
use whimbrel_wire::{AttemptId, HostId, Name};

use crate::clock;
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::guest::inject::{self, Injected};
use crate::guest::precheck::Report;
use crate::guest::{drain, processor};
use crate::link::{Links, Router};
use crate::memory::Techniques;
use crate::meta::MetaStore;
use crate::records;
use crate::task::{TaskHandle, Tasks};
use crate::vm::{LocalVm, Vms};
use crate::volume::Claim;
use journal::Journal;
use source::SourceSide;
use target::TargetSide;

/// The pause aimed at when nobody says otherwise, milliseconds (QEMU's default is 300).
const DOWNTIME_LIMIT_MS: u64 = 300;

/// All moves in which this host takes part.
#[derive(Clone)]
pub struct Migrations {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub host: HostId,
    pub links: Links,
    pub meta: Arc<dyn MetaStore>,
    pub vms: Vms,
    pub tasks: Tasks,
    pub journal: Journal,
    /// What may make pages of memory shorter, in mode A.
    pub techniques: Techniques,
    targets: Mutex<HashMap<AttemptId, Arc<TargetSide>>>,
    /// Held while a layer under a volume's writable one comes in.
    lower: tokio::sync::Mutex<()>,
}

impl Migrations {
    /// No moves yet: see [`Migrations::recover`].
    pub fn new(
        host: HostId,
        links: Links,
        meta: Arc<dyn MetaStore>,
        vms: Vms,
        tasks: Tasks,
        techniques: Techniques,
        journal_dir: PathBuf,
    ) -> Result<Self> {
        let journal = Journal::open(journal_dir)?;
        let (targets, lower) = (Mutex::default(), tokio::sync::Mutex::default());
        let shared = Shared { host, links, meta, vms, tasks, journal, techniques, targets, lower };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Registers what other hosts call.
    pub fn register(&self, router: Router) -> Router {
        target::register(&self.shared, router)
    }

    /// VMs whose fate the journal decides.
    pub fn unfinished(&self) -> Result<Vec<Name>> {
        Ok(self.deciding()?.into_iter().map(|entry| entry.offer.vm).collect())
    }

    /// Entries of moves that decide about their VM. Once the record says that it runs here it is one of this host's like
    /// any other, while a disk's blocks follow too.
    fn deciding(&self) -> Result<Vec<JournalEntry>> {
        let mut entries = self.shared.journal.read_all()?;
        let runs_here = |entry: &JournalEntry| {
            (entry.side, entry.course) == (Side::Target, Course::Onward)
                && matches!(entry.step, Step::Pull | Step::Release)
        };
        entries.retain(|entry| !runs_here(entry));
        Ok(entries)
    }

    /// Takes up every move that an earlier process of this agent left behind.
    pub async fn recover(&self) -> Result<()> {
        for entry in self.shared.journal.read_all()? {
            let (vm, attempt) = (entry.offer.vm.clone(), entry.offer.attempt);
            tracing::info!(%vm, %attempt, side = %entry.side, step = %entry.step, "taking up a move");
            let result = match entry.side {
                Side::Source => {
                    let machine = Source::recover(&entry, clock::now());
                    SourceSide::take_up(&self.shared, machine).await
                }
                Side::Target => {
                    let machine = Target::recover(&entry, clock::now());
                    TargetSide::take_up(&self.shared, machine).await
                }
            };
            if let Err(error) = result {
                tracing::error!(%vm, %attempt, %error, "cannot take up a move; its journal is kept");
            }
        }
        Ok(())
    }

    /// Whether this host has all of a VM in whose unfinished move it takes part; none if it takes part in none.
    pub fn can_run(&self, vm: &Name) -> Result<Option<bool>> {
        let entries = self.deciding()?;
        Ok(entries.iter().find(|entry| entry.offer.vm == *vm).map(handover::can_run))
    }

    /// Begins to move a VM of this host; the task's number.
    pub async fn start(&self, name: &Name, request: &VmMigrate) -> Result<u64> {
        let shared = &self.shared;
        let vm = shared.vms.must_be_here(name).await?;
        let record =
            records::must::<VmRecord>(&*shared.meta, &key::vm(name), &format!("vm {name}")).await?.value;
        let mut busy = vm.busy(&format!("move vm {name}"))?;
        busy.hold(self.claim_volumes(&record.spec).await.with_context(|| format!("move vm {name}"))?);
        let (offer, tracking) = self.offer(&vm, &record, request).await?;
        let task = shared.tasks.start(TaskKind::Migrate, format!("vm {name}"));
        let id = task.id();
        let injected = tracking.unwrap_or_else(|why| {
            tracing::warn!(vm = %name, why, "moved in mode B");
            task.note(why);
            None
        });
        SourceSide::start(shared, vm, busy, offer, request, task, injected);
        Ok(id)
    }

    /// The records of a VM and its volumes, as the handover reads them.
    pub async fn read_records(&self, vm: &Name) -> Result<Seen> {
        store::read(&*self.shared.meta, vm).await
    }

    /// Makes a change of records that the engine decided; `Refused` if somebody else was faster.
    pub async fn change_records(&self, cas: &Cas) -> Result<()> {
        match store::cas(&*self.shared.meta, cas).await {
            CasResult::Yes(_) => Ok(()),
            CasResult::Conflict => {
                Err(Error::new(ErrorKind::Refused, "change records: they have changed meanwhile")
                    .hint("look at the VM again, then repeat the command"))
            }
            CasResult::NotMade(error) | CasResult::Unknown(error) => Err(error.into()),
        }
    }

    /// Reserves a VM's volumes; refused while a snapshot under one of them is being removed.
    async fn claim_volumes(&self, spec: &VmSpec) -> Result<Claim> {
        let claim = self.shared.vms.volumes().claim(spec.volumes.iter().cloned(), "its VM is being moved")?;
        for name in &spec.volumes {
            let what = format!("volume {name}");
            let record =
                records::must::<VolumeRecord>(&*self.shared.meta, &key::volume(name), &what).await?.value;
            if record.layers.iter().any(|layer| layer.removing) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("{what}: a snapshot under it is being removed"),
                )
                .hint("wait until that is over; see `whimbrel task list`"));
            }
        }
        Ok(claim)
    }

    async fn offer(&self, vm: &LocalVm, record: &VmRecord, request: &VmMigrate) -> Result<(Offer, Tracking)> {
        let shared = &self.shared;
        let (name, to) = (&vm.name, &request.to);
        let action = format!("move vm {name} to host {to}");
        let refuse = |kind, words: String| Err(Error::new(kind, format!("{action}: {words}")));
        if *to == shared.host {
            return refuse(ErrorKind::InvalidInput, "it runs there already".into());
        }
        if request.post_copy == PostCopy::Now {
            return refuse(ErrorKind::Unsupported, "post-copy is not in this release".into());
        }
        if record.state != VmState::Running && record.state != VmState::Migrating {
            return refuse(ErrorKind::Refused, format!("it is {:?}", record.state));
        }
        let host =
            records::must::<HostRecord>(&*shared.meta, &key::host(to), &format!("host {to}")).await?.value;
        if host.revoked {
            return refuse(ErrorKind::NotFound, format!("host {to} has been removed from the cluster"));
        }
        if host.draining {
            return refuse(ErrorKind::Refused, format!("host {to} is draining"));
        }
        shared.vms.volumes_must_be_whole(&record.spec).await.with_context(|| action.clone())?;
        let report = shared.vms.precheck(vm).await?;
        let strange = report.disks.iter().find(|disk| record.spec.foreign.is_some() && !disk.ours);
        if let Some(disk) = strange {
            return refuse(
                ErrorKind::Refused,
                format!("disk {} is {}, which is no volume of this VM", disk.id, disk.source),
            );
        }
        let mode = match (request.mode, report.mode) {
            (Some(Mode::B), Some(Mode::A)) if !report.mode_b_reasons.is_empty() => {
                return refuse(
                    ErrorKind::Unsupported,
                    format!("mode B: {}", report.mode_b_reasons.join("; ")),
                );
            }
            (_, None) => return refuse(ErrorKind::Unsupported, report.refusals.join("; ")),
            (Some(Mode::A), Some(Mode::B)) => {
                return refuse(
                    ErrorKind::Unsupported,
                    format!("mode A: {}", report.mode_a_reasons.join("; ")),
                );
            }
            (Some(asked), Some(_)) => asked,
            (None, Some(best)) => best,
        };
        // Mode A is offered only when what it takes stands inside QEMU already, and the disks can be waited for.
        let (mode, tracking) = match mode {
            Mode::B => (Mode::B, Ok(None)),
            Mode::A => match prepare_tracking(vm, &report).await {
                Ok(injected) => (Mode::A, Ok(Some(injected))),
                Err(error) if request.mode.is_none() && report.mode_b_reasons.is_empty() => {
                    (Mode::B, Err(format!("moved in mode B, because mode A could not begin: {error}")))
                }
                Err(error) => return Err(error).with_context(|| action.clone()),
            },
        };
        let offer = Offer {
            attempt: AttemptId(Uuid::new_v4()),
            vm: name.clone(),
            source: shared.host.clone(),
            target: to.clone(),
            epoch: record.right.epoch,
            spec: record.spec.clone(),
            mode,
            disk: request.disk,
            verify: request.verify,
            processor: processor::features(&vm.qmp().await?).await.with_context(|| action.clone())?,
        };
        Ok((offer, tracking))
    }
}

/// What follows a VM's writes, in mode A; or why mode B was chosen instead.
type Tracking = Result<Option<Injected>, String>;

/// How a move ended, as the task's result.
fn result_of(outcome: &Outcome, vm: &Name) -> Result<()> {
    match outcome {
        Outcome::Moved => Ok(()),
        Outcome::Stayed(error) => Err(Error::from(error.clone())),
        Outcome::Cancelled => {
            Err(Error::new(ErrorKind::Cancelled, format!("move vm {vm}: cancelled; it stays here")))
        }
        Outcome::Lost(holder) => {
            let who = holder.as_ref().map_or_else(|| "nobody".into(), ToString::to_string);
            Err(Error::new(ErrorKind::Refused, format!("move vm {vm}: the right over it is held by {who}")))
        }
        Outcome::Crashed(error) => Err(Error::from(error.clone())),
    }
}

/// What mode A takes in a QEMU.
async fn prepare_tracking(vm: &LocalVm, report: &Report) -> Result<Injected> {
    let qmp = vm.qmp().await?;
    if !report.direct_io.is_empty() {
        let took = drain::drain(&qmp).await?;
        if took > drain::DRAIN_LIMIT {
            return Err(drain::too_slow(took));
        }
    }
    inject::userfaultfd_of(&qmp, &vm.process).await
}

/// What of a move a task shows; a move taken up after a restart has a task of its own.
fn task_for(shared: &Shared, vm: &Name) -> TaskHandle {
    shared.tasks.start(TaskKind::Migrate, format!("vm {vm}"))
}
