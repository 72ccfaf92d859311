//! The target's part of a move: what it checks, prepares, receives, verifies and keeps.
//!
//! ```text
//!   offer ─► Negotiate ─► Prepare: QEMU waits, disks on standby ─► streams arrive ─► Verify ─► READY
//!                                                   │ memory ─► RAM file
//!                                                   │ layers ─► directories, durable
//!                                                   └ state  ─► a file that is kept, and loaded into QEMU
//!   Resume: layers opened at the new epoch, disks served, guest runs
//!   Pull: the VM is one of this host's like any other; what the source still has is fetched
//! ```
//!
//! Invariants
//! * Nothing of the VM is served or run here before the machine says Resume.
//! * RAM file, device state and layers outlive this agent and the waiting QEMU: a target whose QEMU died before the
//!   guest ran starts another one from them.
//! * The end of the waiting QEMU is told at once; one that was taken out of `vm` before it was ended is not told of.
//! * Attempts of one VM follow each other: what a later one makes is not there before an earlier one's journal is gone.

mod kept;
mod lower;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{RwLock, watch};
use tokio::task::AbortHandle;
use whimbrel_engine::migrate::handover::{
    Event, Offer, Outcome, Step, Target, TargetWork, ToSource, ToTarget,
};
use whimbrel_wire::api::DiskMove;
use whimbrel_wire::meta::{Mode, VmRecord, VolumeRecord, key};
use whimbrel_wire::peer::migrate::{Control, DataOpen, PullHead, StateHead};
use whimbrel_wire::{AttemptId, Epoch, ErrorKind, Name};

use super::data::{self, Chunk, service};
use super::driver::{self, Events, Hands, WorkFailed};
use super::store::VolumeRecords;
use super::{Shared, control};
use crate::blocking::blocking;
use crate::clock;
use crate::disk::{BaseImage, LayerReceiver, Received, ShipSeal};
use crate::error::{Context as _, Error, Result};
use crate::guest::device_state::{self, Loader};
use crate::guest::{launch, processor};
use crate::link::{PeerIdentity, PeerStream, Router, StreamOffer};
use crate::memory::disks::Images;
use crate::memory::stream::{self, StreamOptions};
use crate::memory::target::TargetOptions;
use crate::memory::{Limiter, Progress};
use crate::records;
use crate::task::TaskHandle;
use crate::vm::LocalVm;
use crate::volume::{Volumes, space_of};

/// How long QEMU may take to say that it has loaded what it was sent (mode B).
const LOAD_LIMIT: Duration = Duration::from_secs(10);
/// Of the source's blocks, about so many bytes are fetched between two reports.
const STEP_BYTES: u64 = 16 << 20;
/// How long an earlier attempt may take to be discarded here before the next is refused.
const DISCARD_LIMIT: Duration = Duration::from_secs(15);
/// How long a write of a stream that is given up may take to end.
const STREAM_LIMIT: Duration = Duration::from_secs(5);

/// See the module's charter.
pub struct TargetSide {
    shared: Arc<Shared>,
    offer: Offer,
    control: control::Sender,
    events: Events<Target>,
    task: TaskHandle,
    vm: Mutex<Option<Arc<LocalVm>>>,
    /// Mode A: where `vm`'s QEMU waits for its state.
    loader: Mutex<Option<Loader>>,
    /// Waits for the end of `vm`'s QEMU.
    watcher: Mutex<Option<AbortHandle>>,
    /// This attempt may have left something of the VM on this host.
    prepared: AtomicBool,
    volumes: VolumeRecords,
    arrived: Mutex<Arrived>,
    /// Mode B: QEMU's stream.
    qemu: tokio::sync::Mutex<Option<stream::Target>>,
    /// Why the source's blocks do not come just now.
    trouble: Mutex<Option<String>>,
    /// The attempt is being discarded: streams end, also those of a source that fell silent.
    over: watch::Sender<bool>,
    /// Held for reading by whoever writes a layer.
    layers_in_use: RwLock<()>,
}

/// What has come so far.
#[derive(Default)]
struct Arrived {
    /// Volumes whose layer is here, durably; with the handle, unless an earlier process of this agent received it.
    layers: HashMap<Name, Received>,
    /// On demand: volumes whose map is here, durably, with a place for their blocks.
    maps: HashSet<Name>,
    state: Option<StateHead>,
    qemu_loaded: bool,
}

/// Registers the streams of moves to this host.
pub(super) fn register(shared: &Arc<Shared>, router: Router) -> Router {
    let control = Arc::clone(shared);
    let router = router.stream(control::SERVICE, move |peer, attempt: AttemptId, offer| {
        serve_control(Arc::clone(&control), peer, attempt, offer)
    });
    let services = [service::MEMORY, service::LAYER, service::STATE, service::QEMU];
    services.into_iter().fold(router, |router, name| {
        let shared = Arc::clone(shared);
        router.stream(name, move |peer, open: DataOpen, offer| {
            serve_data(Arc::clone(&shared), name, peer, open, offer)
        })
    })
}

async fn serve_control(
    shared: Arc<Shared>,
    peer: PeerIdentity,
    attempt: AttemptId,
    offer: StreamOffer,
) -> Result<()> {
    let stream = offer.accept().await?;
    let known = shared.targets.lock().get(&attempt).cloned();
    // Until there is a target, answers go through a sender of their own.
    let sender = known.as_ref().map(|side| side.control.clone()).unwrap_or_default();
    let (inbox, mut messages) = tokio::sync::mpsc::channel(control::IN_MAX);
    let take = async {
        while let Some(message) = messages.recv().await {
            take_message(&shared, &peer, attempt, &sender, message).await;
        }
        Ok(())
    };
    tokio::select! {
        result = control::serve(stream, &sender, inbox) => result,
        result = take => result,
    }
}

async fn take_message(
    shared: &Arc<Shared>,
    peer: &PeerIdentity,
    attempt: AttemptId,
    sender: &control::Sender,
    message: Control<ToTarget>,
) {
    if message.attempt != attempt {
        return;
    }
    let known = shared.targets.lock().get(&attempt).cloned();
    let side = match (known, &message.message) {
        (Some(side), _) if side.offer.source == peer.host => side,
        (None, ToTarget::Offer(offer))
            if offer.attempt == attempt && offer.target == shared.host && offer.source == peer.host =>
        {
            TargetSide::begin(shared, Target::new((**offer).clone(), clock::now()), sender.clone(), None)
        }
        _ => return sender.send(attempt, ToSource::Gone),
    };
    let _ = side.events.send(Event::Peer(message.message)).await;
}

async fn serve_data(
    shared: Arc<Shared>,
    service: &'static str,
    peer: PeerIdentity,
    open: DataOpen,
    offer: StreamOffer,
) -> Result<()> {
    let side = shared.targets.lock().get(&open.attempt).cloned();
    let side = side.filter(|side| side.offer.source == peer.host).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("receive {service}: this host knows nothing of attempt {}", open.attempt),
        )
    })?;
    let stream = offer.accept().await?;
    let result = match service {
        // What writes to a disk ends between two writes, not in the middle of one.
        service::LAYER => match open.layer {
            None => side.receive_layer(stream, open.volume).await,
            Some(layer) => side.receive_lower(stream, open.volume, layer).await,
        },
        service::MEMORY => side.unless_over(side.receive_memory(stream)).await,
        service::STATE => side.unless_over(side.receive_state(stream)).await,
        _ => side.unless_over(side.receive_qemu(stream)).await,
    };
    result.inspect_err(|error| {
        tracing::warn!(vm = %side.offer.vm, service, %error, "a stream of a move ended");
        side.tell_what_broke(error);
    })
}

impl TargetSide {
    /// Starts a machine.
    fn begin(
        shared: &Arc<Shared>,
        machine: Target,
        control: control::Sender,
        vm: Option<Arc<LocalVm>>,
    ) -> Arc<Self> {
        let (events, queue) = driver::queue::<Target>();
        let offer = machine.offer().clone();
        let task = super::task_for(shared, &offer.vm);
        task.figure("incoming", 1.0);
        let side = Arc::new(Self {
            shared: Arc::clone(shared),
            offer,
            control,
            events: events.clone(),
            task,
            vm: Mutex::default(),
            loader: Mutex::default(),
            watcher: Mutex::default(),
            prepared: AtomicBool::new(machine.step_now() >= Step::Prepare),
            volumes: VolumeRecords::new(&shared.meta),
            arrived: Mutex::default(),
            qemu: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
            over: watch::Sender::new(false),
            layers_in_use: RwLock::default(),
        });
        if let Some(vm) = vm {
            side.hold(vm);
        }
        shared.targets.lock().insert(side.offer.attempt, Arc::clone(&side));
        let running = Arc::clone(&side);
        tokio::spawn(async move {
            let shared = &running.shared;
            let (meta, journal) = (Arc::clone(&shared.meta), shared.journal.clone());
            let outcome = driver::run(machine, Arc::clone(&running), (events, queue), meta, journal).await;
            running.finish(&outcome).await;
        });
        side
    }

    /// Goes on after a restart of the agent.
    pub(super) async fn take_up(shared: &Arc<Shared>, machine: Target) -> Result<()> {
        let offer = machine.offer().clone();
        // Before the machine moves: it must find the QEMU that may be running the guest already.
        let vm = match shared.vms.local_record(&offer.vm)? {
            // It is found again with the other VMs of this host.
            _ if matches!(machine.step_now(), Step::Pull | Step::Release) => None,
            Some(local) => shared.vms.reattach(&local, offer.epoch.next(), false).await?,
            None => None,
        };
        Self::begin(shared, machine, control::Sender::default(), vm);
        Ok(())
    }

    async fn finish(&self, outcome: &Outcome) {
        tracing::info!(vm = %self.offer.vm, attempt = %self.offer.attempt, ?outcome, "move ended at the target");
        self.shared.targets.lock().remove(&self.offer.attempt);
        self.remove_attachments().await;
        let watcher = self.watcher.lock().take();
        if let Some(watcher) = watcher {
            watcher.abort();
        }
        let vm = self.vm.lock().take();
        match (vm, outcome) {
            (Some(vm), Outcome::Moved) => self.shared.vms.watch(&vm),
            // The record says what has become of it; nobody needs what is left of its QEMU.
            (_, Outcome::Crashed(_)) => self.clear().await,
            _ => {}
        }
        self.task.end(&super::result_of(outcome, &self.offer.vm));
    }

    /// Takes a QEMU for this attempt's, and tells the machine when it ends.
    fn hold(self: &Arc<Self>, vm: Arc<LocalVm>) {
        let side = Arc::clone(self);
        let watched = Arc::clone(&vm);
        *self.vm.lock() = Some(vm);
        let task = tokio::spawn(async move {
            if watched.process.exited().await.is_ok() {
                while !side.tell_end(&watched) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        });
        let earlier = self.watcher.lock().replace(task.abort_handle());
        if let Some(earlier) = earlier {
            earlier.abort();
        }
    }

    /// Tells the machine that a QEMU ended, unless it is no longer this attempt's; false if it has to be tried again.
    fn tell_end(&self, ended: &Arc<LocalVm>) -> bool {
        // Told under the lock: one that is being replaced or discarded has been taken out before.
        let held = self.vm.lock();
        if !held.as_ref().is_some_and(|vm| Arc::ptr_eq(vm, ended)) {
            return true;
        }
        let text =
            format!("the QEMU that takes vm {} in ended by itself: {}", ended.name, ended.last_words());
        self.events.try_send(Event::Broken(Error::new(ErrorKind::Unavailable, text).to_wire())).is_ok()
    }

    /// Removes what this attempt may have left of the VM here, layers apart.
    async fn clear(&self) {
        if self.prepared.load(Ordering::Acquire)
            && let Err(error) = self.shared.vms.clear(&self.offer.vm, self.offer.epoch.next()).await
        {
            tracing::warn!(vm = %self.offer.vm, %error, "remains of a move were left");
        }
    }

    async fn record(&self) -> Result<VmRecord> {
        let (name, meta) = (&self.offer.vm, &*self.shared.meta);
        Ok(records::must::<VmRecord>(meta, &key::vm(name), &format!("vm {name}")).await?.value)
    }

    fn vm(&self) -> Result<Arc<LocalVm>> {
        self.vm.lock().clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                format!("reach the incoming QEMU of vm {}: it has ended", self.offer.vm),
            )
        })
    }

    async fn negotiate(&self) -> Result<()> {
        let (offer, vms) = (&self.offer, &self.shared.vms);
        let action = || format!("take vm {} at host {}", offer.vm, self.shared.host);
        let refuse = |kind, words: String| Err(Error::new(kind, format!("{}: {words}", action())));
        if !self.is_earlier_over().await? {
            return refuse(ErrorKind::Refused, "an earlier move of it is not over here".into());
        }
        if vms.here(&offer.vm).is_some() || vms.local_record(&offer.vm)?.is_some() {
            return refuse(ErrorKind::AlreadyExists, "a VM of that name runs here already".into());
        }
        let mut spec = offer.spec.clone();
        launch::settle(&mut spec, &vms.qemu().await?, false).await.with_context(action)?;
        let models = vms.qemu().await?.cpu_models().await?;
        let model = spec.cpu.clone().unwrap_or_default();
        let model = model.split(',').next().unwrap_or_default().to_owned();
        if model != "max" && model != "host" && !models.contains(&model) {
            return refuse(ErrorKind::Unsupported, format!("its QEMU does not know the processor {model}"));
        }
        for file in [&spec.kernel, &spec.initrd].into_iter().flatten() {
            if !std::path::Path::new(file).exists() {
                return refuse(ErrorKind::NotFound, format!("{file} is not on this host"));
            }
        }
        for net in &spec.nets {
            if !std::path::Path::new("/sys/class/net").join(&net.bridge).exists() {
                return refuse(
                    ErrorKind::NotFound,
                    format!("there is no bridge {} on this host", net.bridge),
                );
            }
        }
        let (_, free) = space_of(&vms.config().memory_dir)?;
        if free < spec.memory_bytes {
            return refuse(
                ErrorKind::NoSpace,
                format!(
                    "{} has {free} bytes free, the VM's RAM has {}",
                    vms.config().memory_dir.display(),
                    spec.memory_bytes
                ),
            );
        }
        for name in &spec.volumes {
            let volume = self.volumes.read(name).await?;
            // The image under it must be readable from here before anything is moved.
            vms.volumes().open_base(&volume).await.with_context(action)?;
        }
        Ok(())
    }

    /// Waits for what an earlier attempt left here to be discarded, or released.
    async fn is_earlier_over(&self) -> Result<bool> {
        let deadline = Instant::now() + DISCARD_LIMIT;
        loop {
            let entries = self.shared.journal.read_all()?;
            let is_earlier = |offer: &Offer| offer.vm == self.offer.vm && offer.attempt != self.offer.attempt;
            if !entries.iter().any(|entry| is_earlier(&entry.offer)) {
                return Ok(true);
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn prepare(self: &Arc<Self>) -> Result<()> {
        let record = VmRecord { spec: self.offer.spec.clone(), ..self.record().await? };
        self.prepared.store(true, Ordering::Release);
        let vm = self.shared.vms.launch(&record, true).await?;
        self.hold(Arc::clone(&vm));
        let qmp = vm.qmp().await?;
        if self.offer.mode == Mode::A {
            *self.loader.lock() = Some(Loader::new(&qmp).await?);
        }
        let here = processor::features(&qmp).await?;
        processor::must_be_equal(&self.offer.processor, &here)
            .with_context(|| format!("take vm {} at host {}", self.offer.vm, self.shared.host))
    }

    /// What went wrong here, such as a full disk, is told over the control connection: the source sees no more than
    /// that its stream was closed. A stream that the source lost needs no words.
    fn tell_what_broke(&self, error: &Error) {
        if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut | ErrorKind::Cancelled) {
            return;
        }
        let mut told = error.to_wire();
        told.message = format!("take vm {} at host {}: {}", self.offer.vm, self.shared.host, told.message);
        if error.kind() == ErrorKind::NoSpace && told.hint.is_none() {
            told = told.hint(format!("make room on host {}, then repeat the command", self.shared.host));
        }
        // A machine whose queue is full has other troubles, and finds the stream missing.
        let _ = self.events.try_send(Event::Broken(told));
    }

    /// The images under the VM's volumes, as far as they are here.
    async fn images(&self) -> Result<Images> {
        let mut images = Images::default();
        for name in &self.offer.spec.volumes {
            let record = self.volumes.read(name).await?;
            images.0.push(self.shared.vms.volumes().image_here(&record).await?);
        }
        Ok(images)
    }

    async fn receive_memory(&self, mut stream: PeerStream) -> Result<()> {
        let blocks = super::copy::target_blocks(&*self.vm()?)?;
        let (techniques, images) = (self.shared.techniques, self.images().await?);
        let options = TargetOptions { techniques, images, ..TargetOptions::default() };
        let progress = Progress::default();
        crate::memory::target::receive(&mut stream, blocks, &options, &progress).await?;
        Ok(())
    }

    /// Waits for something from the source, but no longer than the attempt lasts.
    async fn unless_over<T>(&self, wait: impl Future<Output = Result<T>>) -> Result<T> {
        let mut over = self.over.subscribe();
        tokio::select! {
            biased;
            _ = over.wait_for(|over| *over) => {
                Err(attempt_is_over())
            }
            result = wait => result,
        }
    }

    async fn receive_layer(&self, mut stream: PeerStream, volume: Option<Name>) -> Result<()> {
        let name = volume
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "receive a layer: no volume is named"))?;
        // Before the look: whoever discards sets `over` first, then waits for those who hold this.
        let _in_use = self.layers_in_use.read().await;
        if *self.over.borrow() {
            return Err(attempt_is_over());
        }
        let record = self.volumes.read(&name).await?;
        let volumes = self.shared.vms.volumes().clone();
        if self.offer.disk == DiskMove::OnDemand {
            let result = self.unless_over(take_map(&mut stream, volumes, record)).await;
            if result.is_ok() {
                self.arrived.lock().maps.insert(name);
            }
            data::write_result(&mut stream, &result).await?;
            return result;
        }
        let receiver = volumes.receiver(&record)?;
        let finished = self.take_chunks(&mut stream, receiver, &name).await?;
        let result = finished.map(|received| {
            self.arrived.lock().layers.insert(name.clone(), received);
        });
        data::write_result(&mut stream, &result).await?;
        result
    }

    /// Receives a layer's chunks; then whether they are all.
    async fn take_chunks(
        &self,
        stream: &mut PeerStream,
        receiver: LayerReceiver,
        name: &Name,
    ) -> Result<Result<Received>> {
        let mut receiver = receiver;
        let mut chunk = Vec::new();
        while self.unless_over(data::read_piece(stream, &mut chunk)).await? {
            // Disk writes wait; the other streams of the move must not.
            let came = Chunk::new(std::mem::take(&mut chunk));
            let written = blocking("write a received layer", move || {
                receiver.write(&came.unpack()?)?;
                Ok(receiver)
            });
            receiver = written.await.with_context(|| format!("receive layer of volume {name}"))?;
        }
        let seal: ShipSeal = self.unless_over(data::read_json(stream)).await?;
        Ok(blocking("finish a received layer", move || receiver.finish(&seal)).await)
    }

    async fn receive_state(&self, mut stream: PeerStream) -> Result<()> {
        let head: StateHead = data::read_json(&mut stream).await?;
        let result = match self.keep_outstanding(&head.outstanding) {
            Ok(()) => self.take_state(&head, &mut stream).await,
            Err(error) => Err(error),
        };
        if result.is_ok() {
            self.arrived.lock().state = Some(head);
        }
        data::write_result(&mut stream, &result).await?;
        result
    }

    async fn take_state(&self, head: &StateHead, stream: &mut PeerStream) -> Result<()> {
        if head.state_bytes == 0 {
            return Ok(());
        }
        let limit = device_state::STATE_MAX_BYTES as u64;
        if head.state_bytes > limit {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("receive device state of {} bytes: at most {limit}", head.state_bytes),
            ));
        }
        let mut state = Vec::new();
        stream.take(head.state_bytes).read_to_end(&mut state).await.context("receive device state")?;
        if blake3::hash(&state).to_hex().as_str() != head.state_hash {
            return Err(Error::new(ErrorKind::Corrupt, "receive device state: its hash is wrong"));
        }
        // Kept before anybody is told: a QEMU that dies from then on can be started again.
        crate::durable::replace_fast(&self.state_path(), &state)?;
        let loader = self.loader.lock().take();
        let loader = loader.ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "load device state: the QEMU that waited for it is gone")
        })?;
        loader.load(&state).await?;
        self.arrived.lock().qemu_loaded = true;
        Ok(())
    }

    async fn receive_qemu(&self, stream: PeerStream) -> Result<()> {
        let vm = self.vm()?;
        let carry = StreamOptions::new(0, Arc::new(Limiter::new(None))).carry;
        let target = stream::Target::accept(vm.qmp().await?, stream, &carry).await?;
        *self.qemu.lock().await = Some(target);
        Ok(())
    }

    async fn verify(&self) -> Result<()> {
        let vm = self.vm()?;
        let (head, missing) = {
            let arrived = self.arrived.lock();
            let missing: Vec<String> = self
                .offer
                .spec
                .volumes
                .iter()
                .filter(|name| !arrived.layers.contains_key(*name) && !arrived.maps.contains(*name))
                .map(ToString::to_string)
                .collect();
            (arrived.state.clone(), missing)
        };
        head.ok_or_else(|| Error::new(ErrorKind::Corrupt, "verify: no device state has come"))?;
        if !missing.is_empty() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("verify: layers missing: {}", missing.join(", ")),
            ));
        }
        if self.offer.mode == Mode::B {
            let mut qemu = self.qemu.lock().await;
            let target = qemu
                .as_mut()
                .ok_or_else(|| Error::new(ErrorKind::Corrupt, "verify: QEMU's stream has not come"))?;
            target.wait_loaded(LOAD_LIMIT).await?;
        } else if !self.arrived.lock().qemu_loaded {
            return Err(Error::new(ErrorKind::Corrupt, "verify: QEMU has not loaded the device state"));
        }
        if !vm.process.is_alive() {
            return Err(Error::new(ErrorKind::Unavailable, "verify: the incoming QEMU has ended"));
        }
        Ok(())
    }

    async fn resume(&self) -> Result<(), WorkFailed> {
        let sent = AtomicBool::new(false);
        let result = async {
            let vm = self.vm()?;
            if !vm.process.is_alive() {
                return Err(Error::new(ErrorKind::Unavailable, "resume: the incoming QEMU has ended"));
            }
            vm.set_epoch(self.offer.epoch.next());
            self.open_layers().await?;
            vm.reissue(self.outstanding().await?);
            vm.serve_disks(self.shared.vms.volumes()).await?;
            vm.write_record(self.shared.vms.config(), false)?;
            let qmp = vm.qmp().await?;
            let running = qmp.run_state().await? == "running";
            vm.disks_connected().await;
            // From here on the guest runs, or may have run.
            sent.store(true, Ordering::Release);
            if !running {
                qmp.cont().await?;
            }
            Ok(())
        };
        result.await.map_err(|error: Error| WorkFailed { error, may_have_run: sent.load(Ordering::Acquire) })
    }

    /// Opens the layers that came, without reading their logs again.
    async fn open_layers(&self) -> Result<()> {
        let (came, maps) = {
            let mut arrived = self.arrived.lock();
            let came: Vec<(Name, Received)> = arrived.layers.drain().collect();
            (came, std::mem::take(&mut arrived.maps))
        };
        let volumes = self.shared.vms.volumes().clone();
        for (name, received) in came {
            let (record, image, epoch) = self.passed_on(&name).await?;
            let (dir, id) = (volumes.dir().clone(), record.disk_id);
            let opened =
                blocking("open a received layer", move || received.open(dir.base(id, image)?, epoch)).await;
            volumes.keep(record.disk_id, opened.with_context(|| format!("open volume {name}"))?);
            volumes.unpin(&name);
        }
        for name in maps {
            let (record, base, epoch) = self.passed_on(&name).await?;
            volumes.open_pull(&record, base, epoch, &self.offer.source).await?;
            volumes.unpin(&name);
        }
        Ok(())
    }

    /// A volume's record, the image under it, and the epoch of the right that COMMIT has passed on to this host.
    async fn passed_on(&self, name: &Name) -> Result<(VolumeRecord, Option<BaseImage>, Epoch)> {
        let record = self.volumes.known(name).await?;
        let base = self.shared.vms.volumes().open_base(&record).await?;
        // COMMIT passed every volume's right on with the VM's: one epoch later than it was read.
        let passed = record.right.holder != self.shared.host;
        let epoch = if passed { record.right.epoch.next() } else { record.right.epoch };
        Ok((record, base, epoch))
    }

    /// Fetches what the source still has. An error is followed by another try, from where this one was.
    async fn pull(&self) -> Result<()> {
        let vm = self.vm.lock().take();
        if let Some(vm) = vm {
            self.shared.vms.watch(&vm);
        }
        let volumes = self.shared.vms.volumes();
        let mut pulls = Vec::new();
        for name in &self.offer.spec.volumes {
            let record = self.volumes.known(name).await?;
            if let Some(pull) = volumes.pull(&record).await? {
                pulls.push((record.disk_id, pull));
            }
        }
        for (disk_id, pull) in &pulls {
            loop {
                let stepping = Arc::clone(pull);
                let stepped = blocking("fetch a layer", move || stepping.step(STEP_BYTES)).await;
                let progress = stepped.inspect_err(|error| *self.trouble.lock() = Some(error.to_string()))?;
                self.trouble.lock().take();
                let all: Vec<_> = pulls.iter().map(|(_, pull)| pull.progress()).collect();
                let total: u64 = all.iter().map(|progress| progress.total_bytes).sum();
                let left: u64 = all.iter().map(|progress| progress.left_bytes).sum();
                self.task.progress(total.saturating_sub(left), total);
                if progress.done {
                    break;
                }
            }
            volumes.pulled(*disk_id);
        }
        Ok(())
    }

    async fn rebuild(self: &Arc<Self>) -> Result<()> {
        if self.offer.mode == Mode::B {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "start QEMU again: in mode B the device state has gone through the one that ended",
            ));
        }
        let old = self.vm.lock().take();
        if let Some(old) = old {
            self.shared.vms.put_aside(&old).await;
        }
        let state = tokio::fs::read(self.state_path()).await.context("read the kept device state")?;
        let record = VmRecord { spec: self.offer.spec.clone(), ..self.record().await? };
        let vm = self.shared.vms.launch(&record, true).await?;
        self.hold(Arc::clone(&vm));
        Loader::new(&vm.qmp().await?).await?.load(&state).await
    }

    async fn discard(&self) -> Result<()> {
        self.over.send_replace(true);
        if tokio::time::timeout(STREAM_LIMIT, self.layers_in_use.write()).await.is_err() {
            tracing::warn!(vm = %self.offer.vm, "a layer is still being written while its move is discarded");
        }
        // While its blocks follow, the VM is among the others of this host.
        let followed = || {
            let vm = self.shared.vms.here(&self.offer.vm);
            vm.filter(|vm| vm.epoch() == self.offer.epoch.next())
        };
        let vm = self.vm.lock().take().or_else(followed);
        if let Some(vm) = vm {
            self.shared.vms.forget(&vm).await;
        }
        self.clear().await;
        *self.arrived.lock() = Arrived::default();
        for name in &self.offer.spec.volumes {
            if let Ok(record) = self.volumes.read(name).await {
                self.shared.vms.volumes().drop_copy(&record);
            }
        }
        self.remove_attachments().await;
        Ok(())
    }
}

fn attempt_is_over() -> Error {
    Error::new(ErrorKind::Cancelled, "receive a stream: the attempt is over")
}

/// Receives which blocks of a layer follow later, and makes a place for them.
async fn take_map(stream: &mut PeerStream, volumes: Volumes, record: VolumeRecord) -> Result<()> {
    let head: PullHead = data::read_json(stream).await?;
    let what = || format!("receive the map of volume {}", record.name);
    if head.map_bytes > PullHead::MAP_BYTES_MAX {
        let limit = PullHead::MAP_BYTES_MAX;
        let why = format!("{}: {} bytes, at most {limit}", what(), head.map_bytes);
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    let (mut map, mut piece) = (Vec::new(), Vec::new());
    while data::read_piece(stream, &mut piece).await? {
        if (map.len() + piece.len()) as u64 > head.map_bytes {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: it is longer than it says", what()),
            ));
        }
        map.extend_from_slice(&piece);
    }
    if map.len() as u64 != head.map_bytes {
        return Err(Error::new(ErrorKind::Corrupt, format!("{}: it is shorter than it says", what())));
    }
    blocking("make a place for a layer", move || volumes.make_pull(&record, &head, &map)).await
}

impl Hands<Target> for TargetSide {
    async fn work(self: Arc<Self>, work: TargetWork) -> Result<(), WorkFailed> {
        match work {
            TargetWork::Negotiate => self.negotiate().await?,
            TargetWork::Prepare => self.prepare().await?,
            TargetWork::Verify => self.verify().await?,
            TargetWork::Resume => self.resume().await?,
            TargetWork::Rebuild => self.rebuild().await?,
            TargetWork::Announce => device_state::announce_self(&self.vm()?.qmp().await?).await?,
            TargetWork::Pull => self.pull().await?,
            TargetWork::Discard => self.discard().await?,
        }
        Ok(())
    }

    fn send(&self, message: ToSource) {
        self.control.send(self.offer.attempt, message);
    }

    fn enter(&self, step: Step) {
        self.task.phase(step.as_str());
    }

    fn waiting_for(&self, what: Option<String>) {
        let trouble = self.trouble.lock().clone();
        self.task.waiting_for(what.map(|what| match trouble {
            Some(trouble) => format!("{what}; now: {trouble}"),
            None => what,
        }));
    }
}
