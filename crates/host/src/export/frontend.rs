//! The conversation with a front-end: vhost-user's messages, and what they make of memory, rings and logs.
//!
//! ```text
//!  a ring:   configured ── kick, enabled ──▶ running ── GET_VRING_BASE, disabled, connection gone ──▶ configured
//!                                              ▲  │ memory table, log, call descriptor change
//!                                              └──┘ between two rounds of its thread
//! ```
//!
//! Invariants
//! * GET_VRING_BASE is answered only after the ring's requests were answered, or the limit ran out: what is left
//!   then stays in the in-flight record. The limit is short while the VM is about to move (`handover`).
//! * A message that makes no sense closes the connection; QEMU connects again.
//!
//! Not here: what a running ring does (`queue`); accepting connections (`server`).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use whimbrel_wire::peer::migrate::QueueIo;

use super::blk;
use super::config_change::Notifier;
use super::dirty::{Dirty, Log, WriteTracker};
use super::fills::FilledFrom;
use super::greeting;
use super::guest_ram::{GuestRam, MAX_REGIONS, RegionAddr};
use super::inflight::InflightFile;
use super::queue::{Device, RunningQueue, Setup, State};
use super::ring::{BadRing, Ring, RingAddr};
use super::server::VhostUserOptions;
use crate::error::{Error, ErrorKind};

const F_RING_INDIRECT: u64 = 1 << 28;
const F_RING_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// One ring as the front-end described it.
#[derive(Default)]
struct Vring {
    size: u16,
    addr: Option<RingAddr>,
    base: u16,
    kick: Option<Option<OwnedFd>>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    running: Option<RunningQueue>,
    // Heads of requests that were left unanswered when the ring stopped.
    unfinished: Vec<u16>,
}

/// See the module's charter. One value per connection.
pub(super) struct Frontend {
    device: Arc<Device>,
    max_queue_size: u16,
    drain_limit: Duration,
    mem_slots: bool,
    features: u64,
    protocol: u64,
    ram: Arc<GuestRam>,
    inflight: Option<InflightFile>,
    log: Option<Arc<Log>>,
    tracker: Option<WriteTracker>,
    notifier: Arc<Notifier>,
    rings: Vec<Vring>,
}

fn invalid(_: BadRing) -> VhostError {
    VhostError::InvalidParam
}

fn failed(error: Error) -> VhostError {
    match error.kind() {
        ErrorKind::InvalidInput => VhostError::InvalidParam,
        _ => VhostError::ReqHandlerError(std::io::Error::other(error)),
    }
}

impl Frontend {
    pub(super) fn new(device: Arc<Device>, options: &VhostUserOptions) -> Self {
        let &VhostUserOptions { max_queue_size, drain_limit, mem_slots, .. } = options;
        let queues = usize::from(device.identity.queues);
        Self {
            device,
            max_queue_size,
            drain_limit,
            mem_slots,
            features: 0,
            protocol: 0,
            ram: Arc::default(),
            inflight: None,
            log: None,
            tracker: None,
            notifier: Arc::default(),
            rings: std::iter::repeat_with(Vring::default).take(queues).collect(),
        }
    }

    /// What it knows of the disk's size.
    pub(super) fn notifier(&self) -> &Arc<Notifier> {
        &self.notifier
    }

    fn offered(&self) -> u64 {
        self.device.identity.features()
            | F_RING_INDIRECT
            | F_RING_EVENT_IDX
            | F_VERSION_1
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn ring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.rings.get_mut(index))
            .ok_or(VhostError::InvalidParam)
    }

    /// Who wants to know of written pages now.
    fn dirty(&self) -> Dirty {
        let log = self.log.clone().filter(|_| self.has(VhostUserVirtioFeatures::LOG_ALL.bits()));
        Dirty { log, tracker: self.tracker.clone() }
    }

    /// Has every page marked that is written from now on.
    pub(super) fn track_writes(&mut self, tracker: Option<WriteTracker>) {
        self.tracker = tracker;
        self.each_running(|_, state, dirty| state.dirty = dirty);
    }

    /// What the pages of a RAM file (device and inode number) were filled from.
    pub(super) fn filled(&self, file: (u64, u64)) -> FilledFrom {
        self.ram.filled(file)
    }

    fn each_running(&self, mut change: impl FnMut(&Vring, &mut State, Dirty)) {
        for ring in &self.rings {
            if let Some(running) = &ring.running {
                running.queue.with_state(|state| change(ring, state, self.dirty()));
            }
        }
    }

    /// Starts a ring if everything it needs was said.
    fn start_if_ready(&mut self, index: u32) -> VhostResult<()> {
        let needs_enable = self.has(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        let dirty = self.dirty();
        let (ram, event_idx) = (self.ram.clone(), self.has(F_RING_EVENT_IDX));
        let write_through = !self.has(blk::F_FLUSH);
        let device = self.device.clone();
        let queue_index = u16::try_from(index).map_err(|_| VhostError::InvalidParam)?;
        let size = self.ring(index)?.size;
        let mut inflight = self.inflight.as_ref().and_then(|file| file.queue(queue_index, size));
        let ring = self.ring(index)?;
        let ready = ring.running.is_none() && ring.kick.is_some() && (ring.enabled || !needs_enable);
        let (true, Some(addr)) = (ready, ring.addr) else { return Ok(()) };
        let mut virtqueue = Ring::new(&ram, size, addr, event_idx).map_err(invalid)?;
        let used_idx = virtqueue.used_idx();
        let carried = || device.handover.take(queue_index, size, ring.base, used_idx);
        let (again, next_avail) = match &mut inflight {
            Some(inflight) => {
                let found = inflight.recover(used_idx, carried).map_err(failed)?;
                (found.heads, found.next_avail.unwrap_or(ring.base))
            }
            None => (carried(), ring.base),
        };
        virtqueue.set_next_avail(next_avail);
        if !again.is_empty() {
            tracing::info!(queue = index, requests = again.len(), "doing requests again that were in flight");
        }
        let setup = Setup {
            ring: virtqueue,
            size,
            ram,
            inflight,
            again,
            dirty,
            kick: clone_fd(ring.kick.as_ref().and_then(Option::as_ref))?,
            call: clone_fd(ring.call.as_ref())?,
            err: clone_fd(ring.err.as_ref())?,
            write_through,
        };
        ring.running = Some(RunningQueue::start(device, queue_index, setup).map_err(failed)?);
        ring.unfinished.clear();
        self.device.handover.began();
        self.notifier.tell(self.device.slot.size_bytes());
        Ok(())
    }

    /// Stops a ring, if it runs; its base is where it would go on.
    fn stop_ring(&mut self, index: u32) -> VhostResult<()> {
        self.stop_ring_within(index, self.device.handover.limit(false))
    }

    /// The same; with a limit, requests that have not ended by then are left to be done again.
    fn stop_ring_within(&mut self, index: u32, cut_short: Option<Duration>) -> VhostResult<()> {
        if cut_short.is_some() {
            self.ask_all_to_stop();
        }
        let limit = cut_short.unwrap_or(self.drain_limit);
        let ring = self.ring(index)?;
        if let Some(running) = ring.running.take() {
            let stopped = running.stop(limit).map_err(failed)?;
            ring.base = stopped.next_avail;
            ring.unfinished = stopped.unfinished;
            let requests = ring.unfinished.len();
            if requests > 0 && cut_short.is_none() {
                tracing::warn!(queue = index, requests, "stopped with requests unanswered");
            }
        }
        Ok(())
    }

    /// Requests that stopped rings left unanswered; nothing if a ring runs.
    pub(super) fn outstanding(&self) -> Option<Vec<QueueIo>> {
        let mut queues = Vec::new();
        for (queue, ring) in (0..).zip(&self.rings) {
            if ring.running.is_some() {
                return None;
            }
            if !ring.unfinished.is_empty() {
                queues.push(QueueIo { queue, next_avail: ring.base, heads: ring.unfinished.clone() });
            }
        }
        Some(queues)
    }

    /// So that the limit is waited for once.
    fn ask_all_to_stop(&self) {
        for running in self.rings.iter().filter_map(|ring| ring.running.as_ref()) {
            running.ask_to_stop();
        }
    }

    /// Stops every ring: the front-end is gone.
    pub(super) fn stop_all(&mut self) {
        self.ask_all_to_stop();
        for index in 0..self.rings.len() {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            if let Err(error) = self.stop_ring(index) {
                tracing::warn!(%error, "stop ring of a front-end that is gone");
            }
        }
    }

    fn set_ram(&mut self, ram: GuestRam) -> VhostResult<()> {
        self.ram = Arc::new(ram);
        let ram = self.ram.clone();
        let event_idx = self.has(F_RING_EVENT_IDX);
        let mut result = Ok(());
        self.each_running(|_, state, _| {
            // The ring keeps the memory it was found in, which the new table must still have.
            state.ram = ram.clone();
        });
        for ring in &self.rings {
            if let (Some(_), Some(addr)) = (&ring.running, ring.addr)
                && Ring::new(&ram, ring.size, addr, event_idx).is_err()
            {
                result = Err(VhostError::InvalidParam);
            }
        }
        result
    }
}

fn clone_fd(fd: Option<&OwnedFd>) -> VhostResult<Option<OwnedFd>> {
    fd.map(OwnedFd::try_clone).transpose().map_err(VhostError::ReqHandlerError)
}

fn region_addr(region: &VhostUserMemoryRegion) -> RegionAddr {
    RegionAddr {
        gpa: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

const NOT_OURS: VhostError = VhostError::InvalidOperation("not a message for a block device");

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all();
        for ring in &mut self.rings {
            *ring = Vring::default();
        }
        self.inflight = None;
        self.log = None;
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !self.offered() != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.features = features;
        // QEMU switches LOG_ALL while rings run.
        let write_through = !self.has(blk::F_FLUSH);
        self.each_running(|_, state, dirty| {
            state.dirty = dirty;
            state.write_through = write_through;
        });
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        let mut ram = GuestRam::default();
        for (region, file) in regions.iter().zip(&files) {
            ram = ram.with(region_addr(region), file).map_err(failed)?;
        }
        self.set_ram(ram)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let max = self.max_queue_size;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= max);
        let ring = self.ring(index)?;
        if ring.running.is_some() {
            return Err(VhostError::InvalidParam);
        }
        ring.size = size.ok_or(VhostError::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> VhostResult<()> {
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addr = RingAddr { desc: descriptor, avail: available, used, used_log };
        let ring = self.ring(index)?;
        if let Some(running) = &ring.running {
            let same = ring.addr.is_some_and(|old| RingAddr { used_log, ..old } == addr);
            if !same {
                return Err(VhostError::InvalidParam);
            }
            running.queue.with_state(|state| state.ring.set_used_log(used_log));
        }
        ring.addr = Some(addr);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let ring = self.ring(index)?;
        ring.base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let recorded = self.inflight.is_some() && self.protocol & greeting::NEWER.bits() != 0;
        self.stop_ring_within(index, self.device.handover.limit(recorded))?;
        let ring = self.ring(index)?;
        ring.kick = None;
        ring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = u32::from(index);
        self.stop_ring(index)?;
        self.ring(index)?.kick = Some(fd.map(OwnedFd::from));
        self.start_if_ready(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let ring = self.ring(u32::from(index))?;
        ring.call = fd.map(OwnedFd::from);
        let call = clone_fd(ring.call.as_ref())?;
        if let Some(running) = &ring.running {
            running.queue.with_state(|state| state.set_call(call));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let ring = self.ring(u32::from(index))?;
        ring.err = fd.map(OwnedFd::from);
        let err = clone_fd(ring.err.as_ref())?;
        if let Some(running) = &ring.running {
            running.queue.with_state(|state| state.err = err);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        let slots = if self.mem_slots {
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        } else {
            VhostUserProtocolFeatures::empty()
        };
        Ok(greeting::PROTOCOL | greeting::NEWER | slots)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.device.identity.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.ring(index)?.enabled = enable;
        if enable { self.start_if_ready(index) } else { self.stop_ring(index) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        // QEMU asks for the whole structure it knows, fields of features that we do not have included: zeros.
        let size_bytes = self.device.slot.size_bytes();
        let mut space = self.device.identity.config(size_bytes).to_vec();
        let start = usize::try_from(offset).map_err(|_| VhostError::InvalidParam)?;
        let end =
            start.checked_add(size as usize).filter(|end| *end <= 4096).ok_or(VhostError::InvalidParam)?;
        space.resize(space.len().max(end), 0);
        if start == 0 && end >= 8 {
            self.notifier.told(size_bytes);
        }
        Ok(space.get(start..end).unwrap_or_default().to_vec())
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> VhostResult<()> {
        // The only field a guest could write is the cache mode, which we do not offer.
        Err(VhostError::InvalidOperation("the configuration cannot be written"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> VhostResult<()> {
        Err(NOT_OURS)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> VhostResult<File> {
        Err(NOT_OURS)
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        if asked.num_queues == 0
            || asked.num_queues > self.device.identity.queues
            || asked.queue_size > self.max_queue_size
        {
            return Err(VhostError::InvalidParam);
        }
        let (opened, file, bytes) =
            InflightFile::create(asked.num_queues, asked.queue_size).map_err(failed)?;
        self.inflight = Some(opened);
        Ok((VhostUserInflight::new(bytes, 0, asked.num_queues, asked.queue_size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> VhostResult<()> {
        let opened =
            InflightFile::open(&file, given.mmap_offset, given.mmap_size, given.num_queues, given.queue_size);
        self.inflight = Some(opened.map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        let ram = self.ram.with(region_addr(region), &file).map_err(failed)?;
        self.set_ram(ram)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let addr = region_addr(region);
        let ram = self.ram.without(addr.gpa, addr.size).ok_or(VhostError::InvalidParam)?;
        self.set_ram(ram)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> VhostResult<Option<File>> {
        Err(NOT_OURS)
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(NOT_OURS)
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::default())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        self.log = Some(Arc::new(Log::new(&file, log.mmap_offset, log.mmap_size).map_err(failed)?));
        self.each_running(|_, state, dirty| state.dirty = dirty);
        Ok(())
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.stop_all();
    }
}
