//! The source's part of a move: copy, pause, send the rest, let the guest go on or give it up.
//!
//! ```text
//!   Copy: a loop of rounds ── fits ─► (the machine asks the store) ─► Pause ends the loop
//!   ListIo: disks fenced      LastRound: memory, layers      DeviceState: saved, sent, re-scanned
//!   ResumeHere: everything above undone                      Release: QEMU ended, RAM and layers dropped
//!   on demand: only the layers' maps are sent; Serve: the layers handed out to the target until Release
//! ```
//!
//! Invariants
//! * Only `Release` gives anything up. `ResumeHere` works from any point, also after a restart of the agent.
//! * While the guest stands still, nothing waits that could have been opened before: all streams stand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;
use whimbrel_engine::memory::precopy::{Policy, Precopy};
use whimbrel_engine::migrate::handover::{
    Event, Offer, Outcome, Source, SourceWork, Step, ToSource, ToTarget,
};
use whimbrel_wire::api::{DiskMove, VmMigrate};
use whimbrel_wire::meta::{Mode, VmRecord, VolumeRecord, key};
use whimbrel_wire::peer::migrate::{Control, DataOpen, DiskIo, LayerHead, StateHead};
use whimbrel_wire::{ErrorKind, Name};

use super::copy::{After, Copying, LayerCopy, LayerMap, MemoryCopy};
use super::data::{self, service};
use super::driver::{self, Events, Hands, WorkFailed};
use super::store::VolumeRecords;
use super::{Shared, control};
use crate::blocking::blocking;
use crate::error::{Context as _, Error, Result};
use crate::guest::device_state::Saver;
use crate::guest::inject::{self, Injected};
use crate::link::PeerStream;
use crate::memory::disks::{Disks, Images};
use crate::memory::source::SourceOptions;
use crate::memory::stream::{self, StreamOptions};
use crate::memory::{Limiter, Progress, Techniques};
use crate::records;
use crate::task::TaskHandle;
use crate::vm::{Busy, LocalVm};

/// Limit for opening a stream to the target.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// So long the target has to say why it closed a stream before the closing itself is the reason.
const WORD_WAIT: Duration = Duration::from_millis(300);
/// How long the record is waited for where it is only a hint.
const RECORD_LIMIT: Duration = Duration::from_millis(500);
/// How long a running disk request has to end when the guest is paused.
const FENCE_LIMIT: Duration = Duration::from_secs(4);
/// After a round that fits, so long is waited for the order to pause before the next round.
const ORDER_WAIT: Duration = Duration::from_millis(100);
/// How long QEMU has to hold before the switch-over once the guest stands still (mode B).
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long QEMU has to send the rest and the device state (mode B).
const FINISH_LIMIT: Duration = Duration::from_secs(15);

/// See the module's charter.
pub struct SourceSide {
    shared: Arc<Shared>,
    offer: Offer,
    downtime_limit_ms: u64,
    techniques: Techniques,
    limiter: Arc<Limiter>,
    control: control::Sender,
    events: Events<Source>,
    task: TaskHandle,
    progress: Progress,
    vm: Mutex<Option<Arc<LocalVm>>>,
    /// What the offer of mode A was made on, until the copy begins.
    injected: Mutex<Option<Injected>>,
    /// Held by the loop of rounds, then by what follows the pause.
    copying: tokio::sync::Mutex<Option<Copying>>,
    state_stream: tokio::sync::Mutex<Option<PeerStream>>,
    qemu_stream: tokio::sync::Mutex<Option<stream::Source>>,
    stop_copy: AtomicBool,
    order: Notify,
    paused_at: Mutex<Option<Instant>>,
    /// What the paused guest's disks left unanswered.
    outstanding: Mutex<Vec<DiskIo>>,
    /// The step under way and when it began, for the figures.
    in_step: Mutex<Option<(Step, Instant)>>,
    layer_bytes: AtomicU64,
    /// The volumes' records before COMMIT: after it, the guest must not wait for the store.
    volumes: VolumeRecords,
    /// On demand: bytes that follow the VM, and counts of those that were handed out.
    follow_bytes: AtomicU64,
    handed_out: Mutex<Vec<Arc<AtomicU64>>>,
}

impl SourceSide {
    /// Begins a move.
    pub(super) fn start(
        shared: &Arc<Shared>,
        vm: Arc<LocalVm>,
        busy: Busy,
        offer: Offer,
        request: &VmMigrate,
        task: TaskHandle,
        injected: Option<Injected>,
    ) {
        let limit_ms = request.downtime_limit_ms.unwrap_or(super::DOWNTIME_LIMIT_MS);
        let machine = Source::new(offer, crate::clock::now());
        let vm = Some((vm, busy, injected));
        let techniques = shared.techniques.without(&request.without);
        Self::begin(shared, machine, vm, (limit_ms, techniques), request.bandwidth_bytes_s, task);
    }

    /// Goes on after a restart of the agent.
    pub(super) async fn take_up(shared: &Arc<Shared>, machine: Source) -> Result<()> {
        let name = machine.offer().vm.clone();
        let vm = match shared.vms.local_record(&name)? {
            Some(local) => shared.vms.reattach(&local, local.epoch, false).await?,
            None => None,
        };
        let vm = match vm {
            Some(vm) => {
                let mut busy = vm.busy("take up a move")?;
                let volumes = machine.offer().spec.volumes.iter().cloned();
                busy.hold(shared.vms.volumes().claim(volumes, "its VM is being moved")?);
                Some((vm, busy, None))
            }
            None => None,
        };
        let task = super::task_for(shared, &name);
        Self::begin(shared, machine, vm, (super::DOWNTIME_LIMIT_MS, shared.techniques), None, task);
        Ok(())
    }

    fn begin(
        shared: &Arc<Shared>,
        machine: Source,
        vm: Option<(Arc<LocalVm>, Busy, Option<Injected>)>,
        (downtime_limit_ms, techniques): (u64, Techniques),
        bandwidth_bytes_s: Option<u64>,
        task: TaskHandle,
    ) {
        let (vm, busy, injected) = match vm {
            Some((vm, busy, injected)) => (Some(vm), Some(busy), injected),
            None => (None, None, None),
        };
        let (events, queue) = driver::queue::<Source>();
        let limiter = Arc::new(Limiter::new(bandwidth_bytes_s));
        task.limited_by(Arc::clone(&limiter));
        let side = Arc::new(Self {
            shared: Arc::clone(shared),
            offer: machine.offer().clone(),
            downtime_limit_ms,
            techniques,
            limiter,
            control: control::Sender::default(),
            events: events.clone(),
            task,
            progress: Progress::default(),
            vm: Mutex::new(vm),
            injected: Mutex::new(injected),
            copying: tokio::sync::Mutex::default(),
            state_stream: tokio::sync::Mutex::default(),
            qemu_stream: tokio::sync::Mutex::default(),
            stop_copy: AtomicBool::new(false),
            order: Notify::new(),
            paused_at: Mutex::default(),
            outstanding: Mutex::default(),
            in_step: Mutex::default(),
            layer_bytes: AtomicU64::new(0),
            volumes: VolumeRecords::new(&shared.meta),
            follow_bytes: AtomicU64::new(0),
            handed_out: Mutex::default(),
        });
        tokio::spawn(async move {
            let (meta, journal) = (Arc::clone(&side.shared.meta), side.shared.journal.clone());
            let helpers = [
                tokio::spawn(Arc::clone(&side).keep_control()),
                tokio::spawn(Arc::clone(&side).hear_cancel()),
                tokio::spawn(Arc::clone(&side).show_progress()),
                tokio::spawn(Arc::clone(&side).watch_qemu()),
            ];
            let outcome = driver::run(machine, Arc::clone(&side), (events, queue), meta, journal).await;
            for helper in helpers {
                helper.abort();
            }
            side.finish(&outcome, busy).await;
        });
    }

    async fn keep_control(self: Arc<Self>) {
        let (inbox, mut messages) = tokio::sync::mpsc::channel::<Control<ToSource>>(control::IN_MAX);
        let (links, target, attempt) =
            (self.shared.links.clone(), self.offer.target.clone(), self.offer.attempt);
        let keep = control::keep(links, target, attempt, self.control.clone(), inbox);
        let take = async {
            while let Some(message) = messages.recv().await {
                if message.attempt == attempt {
                    let _ = self.events.send(Event::Peer(message.message)).await;
                }
            }
        };
        tokio::join!(keep, take);
    }

    async fn hear_cancel(self: Arc<Self>) {
        let mut cancelled = self.task.cancelled();
        if cancelled.wait_for(|cancelled| *cancelled).await.is_ok() {
            let _ = self.events.send(Event::Cancel).await;
        }
    }

    async fn watch_qemu(self: Arc<Self>) {
        let Some(vm) = self.vm.lock().clone() else { return };
        if vm.process.exited().await.is_ok() {
            let error = Error::new(ErrorKind::Unavailable, format!("move vm {}: its QEMU ended", vm.name));
            let _ = self.events.send(Event::Broken(error.to_wire())).await;
        }
    }

    async fn show_progress(self: Arc<Self>) {
        loop {
            self.report();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn report(&self) {
        let figures = self.progress.get();
        let counts = self.handed_out.lock().clone();
        let handed_out = counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>();
        let layers = self.layer_bytes.load(Ordering::Relaxed) + handed_out;
        if counts.is_empty() {
            let left = figures.left_pages * crate::memory::PAGE_BYTES as u64;
            self.task.progress(figures.total_bytes.saturating_sub(left), figures.total_bytes);
            if let Some(left_s) = figures.left_s() {
                self.task.time_left(left_s);
            }
        } else {
            // What the guest overwrites before it is fetched is never handed out.
            let follow = self.follow_bytes.load(Ordering::Relaxed);
            self.task.progress(handed_out, follow.max(handed_out));
        }
        self.task.wire_bytes(figures.wire_bytes + layers);
        if let Some(pause_ms) = figures.expected_pause_ms {
            self.task.figure("expected_downtime_ms", pause_ms as f64);
        }
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        for (name, value) in [
            ("data_pages", figures.data_pages),
            ("zero_pages", figures.zero_pages),
            ("memory_wire_bytes", figures.wire_bytes),
            ("layer_wire_bytes", layers),
            ("packed_raw_bytes", figures.packed_raw_bytes),
            ("packed_wire_bytes", figures.packed_wire_bytes),
            ("delta_pages", figures.shortened.delta.pages),
            ("delta_saved_bytes", figures.shortened.delta.bytes),
            ("delta_missed_pages", figures.misses.delta),
            ("unchanged_pages", figures.shortened.unchanged_pages),
            ("same_pages", figures.shortened.same.pages),
            ("same_saved_bytes", figures.shortened.same.bytes),
            ("same_missed_pages", figures.misses.same),
            ("disk_pages", figures.shortened.disk.pages),
            ("disk_saved_bytes", figures.shortened.disk.bytes),
            ("disk_missed_pages", figures.misses.disk),
            ("link_bytes_s", figures.link_bytes_s),
            ("dirty_bytes_s", figures.dirty_bytes_s),
        ] {
            self.task.figure(name, value as f64);
        }
    }

    async fn finish(&self, outcome: &Outcome, busy: Option<Busy>) {
        tracing::info!(vm = %self.offer.vm, attempt = %self.offer.attempt, ?outcome, "move ended at the source");
        self.report();
        drop(busy);
        let vm = self.vm.lock().take();
        if let Some(vm) = vm
            && !matches!(outcome, Outcome::Moved | Outcome::Lost(_))
        {
            self.shared.vms.watch(&vm);
        }
        self.task.end(&super::result_of(outcome, &self.offer.vm));
    }

    fn vm(&self) -> Result<Arc<LocalVm>> {
        self.vm.lock().clone().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, format!("reach QEMU of vm {}: it has ended", self.offer.vm))
        })
    }

    async fn open(&self, service: &str, volume: Option<&Name>) -> Result<PeerStream> {
        let open = DataOpen { attempt: self.offer.attempt, volume: volume.cloned(), layer: None };
        self.shared.links.stream(&self.offer.target, service, &open, OPEN_LIMIT).await
    }

    /// Sends the layers under a volume's writable one that the target lacks, the lowest first. Nobody writes them, so
    /// they are whole before anything else begins.
    async fn ship_lower(&self, record: &VolumeRecord) -> Result<()> {
        for lower in &record.layers {
            let layer = self.shared.vms.volumes().open_lower(lower.disk_id).await?;
            let open = DataOpen {
                attempt: self.offer.attempt,
                volume: Some(record.name.clone()),
                layer: Some(lower.disk_id),
            };
            let stream =
                self.shared.links.stream(&self.offer.target, service::LAYER, &open, OPEN_LIMIT).await?;
            let header = self.shared.vms.volumes().dir().header(lower.disk_id)?;
            let head = LayerHead::from(&header);
            let copy = LayerCopy::new(record.name.clone(), layer, stream, Arc::clone(&self.limiter));
            let sent = copy.ship_whole(&head, &self.stop_copy).await?;
            self.layer_bytes.fetch_add(sent, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Opens all streams and starts to follow the guest's writes.
    async fn begin_copy(&self) -> Result<Copying> {
        let vm = self.vm()?;
        let (mut layers, mut maps, mut images) = (Vec::new(), Vec::new(), Images::default());
        for name in &self.offer.spec.volumes {
            let record = self.volumes.read(name).await?;
            self.ship_lower(&record).await.with_context(|| format!("send what volume {name} lies on"))?;
            let layer = self.shared.vms.volumes().open(&record).await?;
            images.0.push(self.shared.vms.volumes().open_base(&record).await?.map(|(_, image)| image));
            let stream = self.open(service::LAYER, Some(name)).await?;
            match self.offer.disk {
                DiskMove::Copy => {
                    let limiter = Arc::clone(&self.limiter);
                    layers.push(LayerCopy::new(name.clone(), layer, stream, limiter));
                }
                DiskMove::OnDemand => maps.push(LayerMap::new(name.clone(), layer, stream).await?),
            }
        }
        *self.state_stream.lock().await = Some(self.open(service::STATE, None).await?);
        let (memory, saver) = match self.offer.mode {
            Mode::A => {
                let saver = Saver::new(&vm.qmp().await?).await?;
                let report = self.shared.vms.precheck(&vm).await?;
                let options = SourceOptions {
                    limiter: Arc::clone(&self.limiter),
                    techniques: self.techniques,
                    disks: Disks { images, ..Disks::default() },
                    ..SourceOptions::default()
                };
                let stream = self.open(service::MEMORY, None).await?;
                let injected = self.injected.lock().take();
                let injected = match injected {
                    Some(injected) => injected,
                    None => inject::userfaultfd_of(&vm.qmp().await?, &vm.process).await?,
                };
                let progress = self.progress.clone();
                let wanted = self.shared.vms.config().write_tracking;
                let memory =
                    MemoryCopy::begin(&vm, &report, injected, stream, options, progress, wanted).await?;
                (Some(memory), Some(saver))
            }
            Mode::B => {
                let wire = self.open(service::QEMU, None).await?;
                let options = StreamOptions::new(self.downtime_limit_ms, Arc::clone(&self.limiter));
                let source =
                    stream::Source::start(vm.qmp().await?, wire, &options, self.progress.clone()).await?;
                *self.qemu_stream.lock().await = Some(source);
                (None, None)
            }
        };
        let precopy = Precopy::new(Policy::new(self.downtime_limit_ms));
        Ok(Copying { memory, layers, maps, saver, precopy })
    }

    /// The loop of rounds; ends when the guest is about to be paused.
    async fn copy(&self) -> Result<()> {
        let mut guard = self.copying.lock().await;
        if guard.is_none() {
            *guard = Some(self.begin_copy().await?);
        }
        let Some(copying) = guard.as_mut() else { return Ok(()) };
        let mut withhold_pages = 0;
        let mut layer_bytes = self.layer_bytes.load(Ordering::Relaxed);
        while !self.stop_copy.load(Ordering::Acquire) {
            let after = match self.offer.mode {
                Mode::A => {
                    let vm = self.vm()?;
                    copying
                        .round(&vm, &mut withhold_pages, &self.task, &self.progress, &mut layer_bytes)
                        .await?
                }
                Mode::B => self.qemu_round(copying, &mut layer_bytes).await?,
            };
            self.layer_bytes.store(layer_bytes, Ordering::Relaxed);
            if matches!(after, After::Fits) {
                if let Some(memory) = &copying.memory {
                    memory.must_be_same().await?;
                }
                let _ = self.events.send(Event::Done(SourceWork::Copy)).await;
                let _ = tokio::time::timeout(ORDER_WAIT, self.order.notified()).await;
            }
        }
        Ok(())
    }

    async fn qemu_round(&self, copying: &mut Copying, layer_bytes: &mut u64) -> Result<After> {
        *layer_bytes += copying.layers_pass().await?;
        let step = {
            let mut guard = self.qemu_stream.lock().await;
            let source =
                guard.as_mut().ok_or_else(|| Error::new(ErrorKind::Internal, "copy: no stream of QEMU"))?;
            tokio::select! {
                step = source.next_round() => step?,
                // The order to pause, or to undo, must not wait for a round of QEMU's.
                () = self.order.notified() => return Ok(After::GoOn { withhold_pages: 0 }),
            }
        };
        match step {
            stream::Step::Paused => Ok(After::Fits),
            stream::Step::Round(round) => copying.judge(round, &self.task, &self.progress),
        }
    }

    async fn pause(&self) -> Result<()> {
        self.stop_copy.store(true, Ordering::Release);
        self.order.notify_one();
        // The loop gives the copy back before the guest is stopped, so that its last round does not count.
        let _copying = self.copying.lock().await;
        let vm = self.vm()?;
        vm.disks.iter().for_each(|disk| disk.cut_short(true));
        *self.paused_at.lock() = Some(Instant::now());
        match self.offer.mode {
            Mode::A => vm.qmp().await?.stop().await,
            Mode::B => {
                let mut guard = self.qemu_stream.lock().await;
                let source = guard
                    .as_mut()
                    .ok_or_else(|| Error::new(ErrorKind::Internal, "pause: no stream of QEMU"))?;
                source.pause(PAUSE_LIMIT).await
            }
        }
    }

    /// What the guest's disks left unanswered, for the target; from here on nothing reaches them any more.
    async fn list_io(&self) -> Result<()> {
        let vm = self.vm()?;
        let mut outstanding = Vec::new();
        for disk in &vm.disks {
            let io = disk.outstanding().with_context(|| format!("stop I/O of volume {}", disk.volume))?;
            outstanding.push(io);
            let fenced = blocking("fence a disk", disk.fence(FENCE_LIMIT)).await;
            fenced.with_context(|| format!("fence volume {}", disk.volume))?;
        }
        outstanding.retain(|io: &DiskIo| !io.queues.is_empty());
        let requests: usize =
            outstanding.iter().flat_map(|io| &io.queues).map(|queue| queue.heads.len()).sum();
        self.task.figure("reissued_requests", requests as f64);
        *self.outstanding.lock() = outstanding;
        Ok(())
    }

    async fn last_round(&self) -> Result<()> {
        let mut guard = self.copying.lock().await;
        let copying =
            guard.as_mut().ok_or_else(|| Error::new(ErrorKind::Internal, "send the last round: no copy"))?;
        let Copying { memory, layers, maps, .. } = copying;
        let memory = async {
            match memory {
                Some(memory) => memory.last_round().await.map(drop),
                None => Ok(()),
            }
        };
        let layers = async {
            for layer in layers {
                let sent = layer.finish().await?;
                self.layer_bytes.fetch_add(sent, Ordering::Relaxed);
            }
            for map in maps {
                let (sent, follow) = map.finish().await?;
                self.layer_bytes.fetch_add(sent, Ordering::Relaxed);
                self.follow_bytes.fetch_add(follow, Ordering::Relaxed);
            }
            Ok(())
        };
        let (memory, layers): (Result<()>, Result<()>) = tokio::join!(memory, layers);
        memory.and(layers)
    }

    async fn device_state(&self) -> Result<()> {
        let vm = self.vm()?;
        let mut guard = self.copying.lock().await;
        let Copying { memory, saver, .. } =
            guard.as_mut().ok_or_else(|| Error::new(ErrorKind::Internal, "send device state: no copy"))?;
        let mut state = Vec::new();
        let mut head = StateHead { outstanding: self.outstanding.lock().clone(), ..StateHead::default() };
        match self.offer.mode {
            Mode::A => {
                let saver = saver
                    .as_ref()
                    .ok_or_else(|| Error::new(ErrorKind::Internal, "send device state: not prepared"))?;
                state = saver.save().await?;
                // Some devices write to RAM while they are saved.
                if let Some(memory) = memory {
                    memory.last_round().await?;
                    if self.offer.verify {
                        let hash = memory.compare().await?;
                        tracing::info!(vm = %vm.name, hash, "RAM is the same at both ends");
                        self.task.figure("ram_verified", 1.0);
                    }
                }
            }
            Mode::B => {
                let mut guard = self.qemu_stream.lock().await;
                let source = guard
                    .as_mut()
                    .ok_or_else(|| Error::new(ErrorKind::Internal, "send device state: no stream"))?;
                source.finish(FINISH_LIMIT).await?;
            }
        }
        head.state_bytes = state.len() as u64;
        head.state_hash = blake3::hash(&state).to_hex().to_string();
        let mut guard = self.state_stream.lock().await;
        let stream =
            guard.as_mut().ok_or_else(|| Error::new(ErrorKind::Internal, "send device state: no stream"))?;
        data::write_json(stream, &head).await?;
        stream.write_all(&state).await.context("send device state")?;
        stream.flush().await.context("send device state")?;
        data::read_result(stream).await.context("send device state")
    }

    /// Hands the layers out to the target, at the epoch at which COMMIT passed their rights on.
    async fn serve(&self) -> Result<()> {
        for name in &self.offer.spec.volumes {
            let record = self.volumes.known(name).await?;
            let right = match record.right.holder == self.offer.source {
                true => record.right.passed_to(self.offer.target.clone()),
                false => record.right,
            };
            if right.holder != self.offer.target {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("hand out volume {name}: host {} holds the right to write it", right.holder),
                ));
            }
            let volumes = self.shared.vms.volumes();
            let count = volumes.serve(record.disk_id, &right.holder, right.epoch, &self.limiter).await?;
            let mut counts = self.handed_out.lock();
            if !counts.iter().any(|other| Arc::ptr_eq(other, &count)) {
                counts.push(count);
            }
        }
        Ok(())
    }

    async fn resume_here(&self) -> Result<()> {
        self.stop_copy.store(true, Ordering::Release);
        self.order.notify_one();
        let vm = self.vm()?;
        let qemu = self.qemu_stream.lock().await.take();
        if let Some(source) = qemu
            && let Err(error) = source.cancel().await
        {
            tracing::warn!(vm = %vm.name, %error, "QEMU's migration was not cancelled cleanly");
        }
        // Streams that are dropped end the copy at both ends.
        self.state_stream.lock().await.take();
        let copying = self.copying.lock().await.take();
        match copying {
            Some(copying) => copying.abandon(&vm),
            None => self.shared.vms.forget_tracking(&vm),
        }
        vm.disks.iter().for_each(|disk| disk.cut_short(false));
        vm.serve_disks(self.shared.vms.volumes()).await?;
        let qmp = vm.qmp().await?;
        // One that an earlier process of this agent began, or work that was stopped: QEMU would refuse to go on.
        qmp.cancel_migration().await?;
        if qmp.run_state().await? != "running" {
            vm.disks_connected().await;
            qmp.cont().await?;
        } else if vm.has_lost_disks().await {
            vm.wake_disks().await?;
        }
        // Handed back, the right is newer than the one it ran under. Read after the guest goes on: it waits for nobody.
        let (meta, key) = (&*self.shared.meta, key::vm(&vm.name));
        if let Ok(Ok(Some(record))) =
            tokio::time::timeout(RECORD_LIMIT, records::get::<VmRecord>(meta, &key)).await
        {
            vm.set_epoch(record.value.right.epoch);
        }
        if let Some(at) = self.paused_at.lock().take() {
            tracing::info!(vm = %vm.name, paused_ms = at.elapsed().as_millis(), "guest goes on at the source");
        }
        Ok(())
    }

    async fn release(&self) -> Result<()> {
        self.state_stream.lock().await.take();
        self.qemu_stream.lock().await.take();
        let copying = self.copying.lock().await.take();
        let vm = self.vm.lock().take();
        if let Some(vm) = vm {
            for path in vm.foreign_ram().await {
                let why = "whoever started the VM made it";
                self.task.note(format!(
                    "RAM file {} is left: {why}; remove it when it is of no use",
                    path.display()
                ));
            }
            self.shared.vms.forget(&vm).await;
            // Not before QEMU has ended: to undo the tracking of a process that lives takes longer than to end it.
            if let Some(copying) = copying {
                copying.abandon(&vm);
            }
        }
        // A QEMU that ended while no agent ran has left its files.
        self.shared.vms.clear(&self.offer.vm, self.offer.epoch).await?;
        for name in &self.offer.spec.volumes {
            // A record that cannot be read now leaves a copy behind, never removes one.
            if let Ok(record) = self.volumes.read(name).await {
                self.shared.vms.volumes().drop_copy(&record);
            }
        }
        Ok(())
    }

    /// Where the time went: how long each step took.
    fn note_step(&self, step: Step) {
        let before = self.in_step.lock().replace((step, Instant::now()));
        if let Some((before, since)) = before {
            let name = format!("{}_ms", before.as_str().replace('-', "_"));
            self.task.figure(&name, since.elapsed().as_secs_f64() * 1e3);
        }
    }

    /// The pause as far as this side sees it: until the target says that the guest runs.
    fn note_downtime(&self, message: &Step) {
        if *message == Step::Announce
            && let Some(at) = *self.paused_at.lock()
        {
            self.task.downtime_ms(at.elapsed().as_secs_f64() * 1000.0);
        }
    }
}

impl Hands<Source> for SourceSide {
    async fn work(self: Arc<Self>, work: SourceWork) -> Result<(), WorkFailed> {
        let result = match work {
            SourceWork::Copy => self.copy().await,
            SourceWork::Pause => self.pause().await,
            SourceWork::ListIo => self.list_io().await,
            SourceWork::LastRound => self.last_round().await,
            SourceWork::DeviceState => self.device_state().await,
            SourceWork::Serve => self.serve().await,
            SourceWork::ResumeHere => self.resume_here().await,
            SourceWork::Release => self.release().await,
        };
        if matches!(&result, Err(error) if error.kind() == ErrorKind::Unavailable) {
            // The target closed a stream, and is about to say why.
            tokio::time::sleep(WORD_WAIT).await;
        }
        Ok(result?)
    }

    fn send(&self, message: ToTarget) {
        self.control.send(self.offer.attempt, message);
    }

    fn enter(&self, step: Step) {
        self.task.phase(step.as_str());
        self.note_step(step);
        self.note_downtime(&step);
    }

    fn waiting_for(&self, what: Option<String>) {
        self.task.waiting_for(what);
    }
}
