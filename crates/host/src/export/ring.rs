//! The device's side of a split virtqueue in memory shared with a guest.
//!
//! ```text
//!  descriptor table   size × { gpa u64, len u32, flags u16, next u16 }        read
//!  available ring     flags u16, idx u16, size × head u16, used_event u16      read
//!  used ring          flags u16, idx u16, size × { id u32, len u32 }, avail_event u16   written
//! ```
//!
//! The three parts are looked up once, when the ring starts; a request costs no further look-up for them.
//!
//! Invariants
//! * Every byte is the guest's to change at any time: each field is read once, checked, and used from the copy.
//! * A chain that leaves its table, loops, leaves memory or has more than [`MAX_SEGMENTS`] parts is an error.
//!
//! Not here: what a request means (`blk`), when rings run (`queue`), what outlives the process (`inflight`).
#![expect(unsafe_code, reason = "rings lie in memory shared with the guest")]

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::guest_ram::{GuestRam, Seg};

/// Most parts of one request: what one vectored read of the system takes.
pub(super) const MAX_SEGMENTS: usize = 1024;

const DESC_BYTES: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Where the front-end says a ring is: addresses in its own process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RingAddr {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    /// Where the dirty log counts the used ring, if writes to it are to be logged.
    pub(super) used_log: Option<u64>,
}

/// Why a ring or a request cannot be used; the guest's or the front-end's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadRing(pub(super) &'static str);

/// The parts of one request, reused from request to request.
#[derive(Default)]
pub(super) struct Chain {
    /// What the guest gives, in order.
    pub(super) readable: Vec<Seg>,
    /// What the guest wants filled, in order.
    pub(super) writable: Vec<Seg>,
}

struct Desc {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A table of descriptors: the ring's own, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    start: *const u8,
    entries: u32,
}

impl Table {
    fn get(self, index: u16) -> Result<Desc, BadRing> {
        if u32::from(index) >= self.entries {
            return Err(BadRing("a descriptor outside its table"));
        }
        // SAFETY: `index < entries`, and the table's `entries * 16` bytes were looked up in one mapping.
        let at = unsafe { self.start.add(16 * usize::from(index)) };
        let (low, high) = if at.cast::<u64>().is_aligned() {
            // SAFETY: as above, and aligned; volatile because the guest may write at any time.
            unsafe { (ptr::read_volatile(at.cast::<u64>()), ptr::read_volatile(at.add(8).cast::<u64>())) }
        } else {
            // SAFETY: as above; bytes need no alignment.
            let bytes = unsafe { ptr::read_volatile(at.cast::<[u8; 16]>()) };
            let whole = u128::from_le_bytes(bytes);
            ((whole as u64).to_le(), ((whole >> 64) as u64).to_le())
        };
        let high = u64::from_le(high);
        Ok(Desc {
            gpa: u64::from_le(low),
            len: high as u32,
            flags: (high >> 32) as u16,
            next: (high >> 48) as u16,
        })
    }
}

/// See the module's charter.
pub(super) struct Ring {
    size: u16,
    table: Table,
    avail: *const u8,
    used: *mut u8,
    used_gpa: u64,
    used_log: Option<u64>,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    // The used index when the guest was last signalled, or found not to want it.
    signalled: u16,
    // Keeps the three parts mapped.
    _ram: Arc<GuestRam>,
}

// SAFETY: the pointers are good as long as `_ram`, which the ring owns a share of; the ring has one owner at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// Looks up a ring of `size` entries.
    pub(super) fn new(
        ram: &Arc<GuestRam>,
        size: u16,
        addr: RingAddr,
        event_idx: bool,
    ) -> Result<Self, BadRing> {
        if !size.is_power_of_two() || size > 32768 {
            return Err(BadRing("a ring size that is no power of two"));
        }
        let entries = u64::from(size);
        let desc = ram.by_user(addr.desc, DESC_BYTES * entries);
        let avail = ram.by_user(addr.avail, 6 + 2 * entries);
        let used = ram.by_user(addr.used, 6 + 8 * entries);
        let (Some(desc), Some(avail), Some(used)) = (desc, avail, used) else {
            return Err(BadRing("a ring outside the guest's memory"));
        };
        let aligned = desc.ptr.cast::<u128>().is_aligned()
            && avail.ptr.cast::<u16>().is_aligned()
            && used.ptr.cast::<u32>().is_aligned();
        if !aligned {
            return Err(BadRing("a ring that is not aligned"));
        }
        let mut ring = Self {
            size,
            table: Table { start: desc.ptr, entries: u32::from(size) },
            avail: avail.ptr,
            used: used.ptr,
            used_gpa: used.gpa,
            used_log: addr.used_log,
            event_idx,
            next_avail: 0,
            next_used: 0,
            signalled: 0,
            _ram: ram.clone(),
        };
        ring.next_used = ring.used_idx();
        ring.signalled = ring.next_used;
        Ok(ring)
    }

    /// A field of the available ring, `at` bytes from its start.
    fn avail_u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: `new` looked up `6 + 2 * size` aligned bytes, callers pass even offsets inside them; atomics may
        // be shared with the guest.
        unsafe { AtomicU16::from_ptr(self.avail.cast_mut().add(at).cast()) }
    }

    /// A u16 field of the used ring, `at` bytes from its start.
    fn used_u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in `avail_u16`, with `6 + 8 * size` bytes.
        unsafe { AtomicU16::from_ptr(self.used.add(at).cast()) }
    }

    /// The used ring's index as it stands in memory.
    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le(self.used_u16(2).load(Ordering::Acquire))
    }

    /// The next entry of the available ring to take.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Sets the next entry of the available ring to take.
    pub(super) fn set_next_avail(&mut self, index: u16) {
        self.next_avail = index;
    }

    /// Where the used ring is, for marking pages: guest address, address in the log, bytes.
    pub(super) fn used_range(&self) -> (u64, Option<u64>, u64) {
        (self.used_gpa, self.used_log, 6 + 8 * u64::from(self.size))
    }

    /// Changes where the dirty log counts the used ring.
    pub(super) fn set_used_log(&mut self, used_log: Option<u64>) {
        self.used_log = used_log;
    }

    /// Whether the guest has made a request that was not taken yet.
    pub(super) fn has_more(&self) -> bool {
        u16::from_le(self.avail_u16(2).load(Ordering::Acquire)) != self.next_avail
    }

    /// Takes the head of the next request.
    pub(super) fn pop(&mut self) -> Result<Option<u16>, BadRing> {
        let idx = u16::from_le(self.avail_u16(2).load(Ordering::Acquire));
        let waiting = idx.wrapping_sub(self.next_avail);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(BadRing("more requests than the ring holds"));
        }
        let slot = usize::from(self.next_avail % self.size);
        let head = u16::from_le(self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(BadRing("a request whose head is outside the table"));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Collects the parts of the request at `head`, looking addresses up in `ram`.
    pub(super) fn chain(&self, ram: &GuestRam, head: u16, into: &mut Chain) -> Result<(), BadRing> {
        into.readable.clear();
        into.writable.clear();
        let mut table = self.table;
        let mut index = head;
        let mut steps = 0;
        let mut indirect = false;
        loop {
            let desc = table.get(index)?;
            if desc.flags & F_INDIRECT != 0 {
                if indirect || desc.flags & F_NEXT != 0 {
                    return Err(BadRing("an indirect table inside a table, or followed by something"));
                }
                table = indirect_table(ram, &desc)?;
                (index, steps, indirect) = (0, 0, true);
                continue;
            }
            add_part(ram, &desc, into)?;
            steps += 1;
            if desc.flags & F_NEXT == 0 {
                return Ok(());
            }
            if steps >= table.entries {
                return Err(BadRing("a chain that loops"));
            }
            index = desc.next;
        }
    }

    /// Writes the answer to `head`, without showing it yet: `len` bytes of its writable parts were written.
    pub(super) fn put_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used % self.size);
        let element = u64::from(head) | u64::from(len) << 32;
        // SAFETY: `slot < size`, so the 8 bytes lie inside the used ring that `new` looked up; it is aligned to 4
        // only, hence two stores; the guest reads them after the index that `publish` stores.
        unsafe {
            let at = self.used.add(4 + 8 * slot).cast::<u32>();
            ptr::write_volatile(at, (element as u32).to_le());
            ptr::write_volatile(at.add(1), ((element >> 32) as u32).to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest every answer put so far; returns the used ring's new index.
    pub(super) fn publish(&mut self) -> u16 {
        self.used_u16(2).store(self.next_used.to_le(), Ordering::Release);
        self.next_used
    }

    /// Whether the guest wants to be told of the answers since it was last asked.
    pub(super) fn wants_signal(&mut self) -> bool {
        if self.next_used == self.signalled {
            return false;
        }
        // The guest's wish must be read after our index was written: it writes its wish, then reads our index.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.signalled, self.next_used);
        if self.event_idx {
            let event = u16::from_le(self.avail_u16(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed));
            // vring_need_event: the wished-for index was passed since `old`.
            self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(old)
        } else {
            u16::from_le(self.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks to be kicked for the next request; `true` if one is there already.
    pub(super) fn ask_for_kicks(&self) -> bool {
        if self.event_idx {
            let avail_event = self.used_u16(4 + 8 * usize::from(self.size));
            avail_event.store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // The guest writes its index, then reads our wish: the other way round here.
        fence(Ordering::SeqCst);
        self.has_more()
    }

    /// Says that kicks are not needed for now. With the event index that is so after the first one anyway.
    pub(super) fn refuse_kicks(&self) {
        if !self.event_idx {
            self.used_u16(0).store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }
}

fn indirect_table(ram: &GuestRam, desc: &Desc) -> Result<Table, BadRing> {
    let bytes = u64::from(desc.len);
    if bytes == 0 || bytes % DESC_BYTES != 0 || bytes / DESC_BYTES > MAX_SEGMENTS as u64 {
        return Err(BadRing("an indirect table of a strange length"));
    }
    let seg = ram.run(desc.gpa, bytes).filter(|seg| seg.len as u64 == bytes);
    let seg = seg.ok_or(BadRing("an indirect table outside the guest's memory"))?;
    Ok(Table { start: seg.ptr, entries: desc.len / 16 })
}

fn add_part(ram: &GuestRam, desc: &Desc, into: &mut Chain) -> Result<(), BadRing> {
    let list = if desc.flags & F_WRITE != 0 {
        &mut into.writable
    } else if into.writable.is_empty() {
        &mut into.readable
    } else {
        return Err(BadRing("a readable part after a writable one"));
    };
    let (mut gpa, mut left) = (desc.gpa, u64::from(desc.len));
    while left > 0 {
        let seg = ram.run(gpa, left).ok_or(BadRing("a part outside the guest's memory"))?;
        if list.len() >= MAX_SEGMENTS {
            return Err(BadRing("a request of too many parts"));
        }
        list.push(seg);
        left -= seg.len as u64;
        gpa = gpa.wrapping_add(seg.len as u64);
    }
    Ok(())
}
