//! A guest and its front-end in one, for tests: RAM in a file, rings written by hand, messages as QEMU sends them.
//!
//! Everything is read and written through the file, so that a test needs no pointers.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Guest physical address of the RAM.
pub(super) const GPA: u64 = 0x10_0000;
/// Address of the RAM in this "QEMU".
pub(super) const USER: u64 = 0x7f00_0000_0000;
/// Offset of the RAM in its file.
pub(super) const FILE_OFFSET: u64 = 0x2000;
/// Size of the RAM.
pub(super) const RAM_BYTES: u64 = 4 << 20;
/// Entries of the ring.
pub(super) const RING: u16 = 64;
/// Requests that fit in at once: three descriptors each.
pub(super) const SLOTS: u16 = RING / 3;

const AVAIL: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Where request `slot` keeps header, status (0x20), indirect table (0x100) and data (0x1000).
pub(super) fn area(slot: u16) -> u64 {
    0x1_0000 + u64::from(slot) * 0x8000
}

/// Where the data of request `slot` is, from the start of RAM.
pub(super) fn data(slot: u16) -> u64 {
    area(slot) + 0x1000
}

/// See the module's charter.
pub(super) struct Guest {
    pub(super) ram: File,
    pub(super) frontend: Option<Frontend>,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) inflight: Option<(VhostUserInflight, File)>,
    pub(super) features: u64,
    /// Whether it takes along what is in flight, as newer QEMUs do.
    pub(super) takes_along: bool,
    avail_idx: u16,
    used_seen: u16,
    /// Where the ring starts, if not at the used ring's index.
    base: Option<u16>,
}

impl Guest {
    pub(super) fn new() -> Self {
        let ram = tempfile::tempfile_in("/dev/shm").unwrap();
        ram.set_len(FILE_OFFSET + RAM_BYTES).unwrap();
        Self {
            ram,
            frontend: None,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            inflight: None,
            features: !(1 << 29) & !(1 << 26),
            takes_along: false,
            avail_idx: 0,
            used_seen: 0,
            base: None,
        }
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, FILE_OFFSET + at).unwrap();
    }

    pub(super) fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_exact_at(&mut bytes, FILE_OFFSET + at).unwrap();
        bytes
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_exact_at(&mut bytes, FILE_OFFSET + at).unwrap();
        bytes
    }

    fn desc(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut raw = Vec::new();
        raw.extend((GPA + at).to_le_bytes());
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &raw);
    }

    /// Writes one raw descriptor of the ring's own table.
    pub(super) fn raw_desc(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.desc(0, index, gpa.wrapping_sub(GPA), len, flags, next);
    }

    /// Lays out a request of `kind` in `slot`, with `len` bytes of data that the device reads or `writes`.
    pub(super) fn lay_out(&self, slot: u16, kind: u32, sector: u64, len: u32, device_writes: bool) -> u16 {
        self.lay_out_in(0, 3 * slot, slot, kind, sector, len, device_writes);
        3 * slot
    }

    /// The same through an indirect table.
    pub(super) fn lay_out_indirect(
        &self,
        slot: u16,
        kind: u32,
        sector: u64,
        len: u32,
        device_writes: bool,
    ) -> u16 {
        let table = area(slot) + 0x100;
        self.lay_out_in(table, 0, slot, kind, sector, len, device_writes);
        let parts = if len == 0 { 2 } else { 3 };
        self.desc(0, 3 * slot, table, parts * 16, F_INDIRECT, 0);
        3 * slot
    }

    #[expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]
    fn lay_out_in(
        &self,
        table: u64,
        first: u16,
        slot: u16,
        kind: u32,
        sector: u64,
        len: u32,
        device_writes: bool,
    ) {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(area(slot), &header);
        self.put(area(slot) + 0x20, &[0xee]);
        self.desc(table, first, area(slot), 16, F_NEXT, first + 1);
        let mut status = first + 1;
        if len > 0 {
            let writes = if device_writes { F_WRITE } else { 0 };
            self.desc(table, first + 1, data(slot), len, F_NEXT | writes, first + 2);
            status = first + 2;
        }
        self.desc(table, status, area(slot) + 0x20, 1, F_WRITE, 0);
    }

    /// Shows the device the requests at `heads`, with or without a kick.
    pub(super) fn submit(&mut self, heads: &[u16], kick: bool) {
        for head in heads {
            self.put(AVAIL + 4 + 2 * u64::from(self.avail_idx % RING), &head.to_le_bytes());
            self.avail_idx = self.avail_idx.wrapping_add(1);
        }
        self.put(AVAIL + 2, &self.avail_idx.to_le_bytes());
        if kick {
            self.kick.write(1).unwrap();
        }
    }

    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.get(USED + 2))
    }

    /// The answers that are there: head and written length.
    pub(super) fn answers(&mut self) -> Vec<(u16, u32)> {
        let mut found = Vec::new();
        while self.used_seen != self.used_idx() {
            let at = USED + 4 + 8 * u64::from(self.used_seen % RING);
            let head = u32::from_le_bytes(self.get(at));
            found.push((u16::try_from(head).unwrap(), u32::from_le_bytes(self.get(at + 4))));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        found
    }

    /// Waits for `count` answers.
    pub(super) fn wait(&mut self, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut found = self.answers();
        while found.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} answers came", found.len());
            std::thread::sleep(Duration::from_micros(200));
            found.extend(self.answers());
        }
        found
    }

    pub(super) fn status(&self, slot: u16) -> u8 {
        let [status] = self.get(area(slot) + 0x20);
        status
    }

    /// Does one request and returns its status.
    pub(super) fn request(&mut self, slot: u16, kind: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        let head = self.lay_out(slot, kind, sector, len, device_writes);
        self.submit(&[head], true);
        let answers = self.wait(1);
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].0, head);
        self.status(slot)
    }

    /// Connects and starts the ring, as QEMU does when its device starts; as QEMU does after a lost connection, the
    /// ring's base is the used ring's index.
    pub(super) fn connect(&mut self, path: &Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut frontend = loop {
            match Frontend::connect(path, 1) {
                Ok(frontend) => break frontend,
                Err(error) => assert!(Instant::now() < deadline, "connect: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap() & self.features;
        frontend.set_features(features).unwrap();
        let offered = frontend.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        let newer = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        assert!(offered.contains(newer));
        frontend.set_protocol_features(if self.takes_along { offered } else { offered - newer }).unwrap();
        if self.inflight.is_none() {
            let asked = VhostUserInflight::new(0, 0, 1, RING);
            self.inflight = Some(frontend.get_inflight_fd(&asked).unwrap());
        }
        let (inflight, file) = self.inflight.as_ref().unwrap();
        frontend.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        self.start_ring(&mut frontend);
        self.frontend = Some(frontend);
    }

    /// Where the ring is.
    pub(super) fn ring_config(&self, logged: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: u32::from(logged),
            desc_table_addr: USER,
            used_ring_addr: USER + USED,
            avail_ring_addr: USER + AVAIL,
            log_addr: logged.then_some(GPA + USED),
        }
    }

    fn start_ring(&self, frontend: &mut Frontend) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: RAM_BYTES,
            userspace_addr: USER,
            mmap_offset: FILE_OFFSET,
            mmap_handle: self.ram.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        frontend.set_vring_num(0, RING).unwrap();
        frontend.set_vring_base(0, self.base.unwrap_or(self.used_idx())).unwrap();
        frontend.set_vring_addr(0, &self.ring_config(false)).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
    }

    /// Goes on with another device, as a QEMU that a VM was moved to: its ring starts where the last one stopped, with
    /// an in-flight record of its own.
    pub(super) fn move_to(&mut self, path: &Path, base: u16) {
        (self.frontend, self.inflight, self.base) = (None, None, Some(base));
        self.connect(path);
        self.base = None;
    }

    /// The same for one that brings the in-flight record.
    pub(super) fn move_along_to(&mut self, path: &Path, base: u16) {
        (self.frontend, self.base) = (None, Some(base));
        self.connect(path);
        self.base = None;
    }

    /// Starts the ring again after GET_VRING_BASE.
    pub(super) fn restart(&mut self) {
        let mut frontend = self.frontend.take().unwrap();
        self.start_ring(&mut frontend);
        self.frontend = Some(frontend);
    }
}
