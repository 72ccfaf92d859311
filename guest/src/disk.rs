//! The disk worker: numbered, checksummed records of 4 KiB in a ring, each flushed before it counts as
//! acknowledged, all of them read back past the page cache.
//!
//! ```text
//!   record n at slot n mod SLOTS = [ mark | number n | generation | checksum | payload from (n, generation) ]
//!   start: scan the ring, the highest valid number is what survived ("recovered")
//! ```
//!
//! Invariant: `acked` is raised only after fdatasync returned; a slot whose write was not acknowledged may hold
//! the older record of its ring position or the new one, any other content is an error.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::report::{Corrupt, Counters, Order};

pub const RECORD: usize = 4096;
const MARK: &[u8; 8] = b"whimrec1";

/// Works until the program ends; an I/O error is reported and ends the worker.
pub fn run(path: &Path, config: &Config, counters: &Counters, orders: &Receiver<Order>) {
    let outcome = Ring::open(path, config.disk_mib).and_then(|mut ring| ring.work(config, counters, orders));
    if let Err(e) = outcome {
        counters.disk_error(&format!("disk {}: {e}", path.display()));
        // Orders still get their answers, or the reporter would wait for them.
        for order in orders {
            if let Order::VerifyAll(done) = order {
                let _ = done.send(());
            }
        }
    }
}

struct Ring {
    file: File,
    slots: u64,
    next: u64,
    buffer: Aligned,
    writing: bool,
}

/// A page-aligned buffer, as O_DIRECT wants.
pub struct Aligned {
    bytes: Vec<u8>,
    first: usize,
}

impl Aligned {
    pub fn new() -> Aligned {
        let bytes = vec![0u8; 2 * RECORD];
        let first = bytes.as_ptr().align_offset(RECORD).min(RECORD);
        Aligned { bytes, first }
    }

    pub fn page(&mut self) -> &mut [u8] {
        &mut self.bytes[self.first..self.first + RECORD]
    }
}

impl Ring {
    fn open(path: &Path, mib: u64) -> io::Result<Ring> {
        let device = path.starts_with("/dev");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(!device)
            .truncate(false)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        let slots = mib * 256;
        if !device {
            file.set_len(slots * RECORD as u64)?;
            file.sync_all()?;
        }
        Ok(Ring { file, slots, next: 1, buffer: Aligned::new(), writing: true })
    }

    fn work(&mut self, config: &Config, counters: &Counters, orders: &Receiver<Order>) -> io::Result<()> {
        self.recover(counters)?;
        counters.ready.fetch_add(1, Relaxed);
        let mut read_at = 0;
        loop {
            while let Ok(order) = orders.try_recv() {
                self.obey(&order, counters)?;
            }
            let started = Instant::now();
            if self.writing {
                self.append(counters)?;
                self.check(self.next - 1, counters)?;
            }
            read_at += 1;
            self.check_slot(read_at % self.slots, counters)?;
            let pause = match config.disk_rate {
                0 if self.writing => Duration::ZERO,
                0 => Duration::from_millis(10),
                rate => Duration::from_micros(1_000_000 / rate).saturating_sub(started.elapsed()),
            };
            thread::sleep(pause);
        }
    }

    fn obey(&mut self, order: &Order, counters: &Counters) -> io::Result<()> {
        match order {
            Order::Writing(on) => self.writing = *on,
            Order::VerifyAll(done) => {
                for slot in 0..self.slots {
                    self.check_slot(slot, counters)?;
                }
                let _ = done.send(());
            }
            Order::Corrupt(Corrupt::Sector) if self.next > 1 => {
                // The newest record, so that it is not overwritten before somebody looks.
                let slot = (self.next - 1) % self.slots;
                self.file.read_exact_at(self.buffer.page(), slot * RECORD as u64)?;
                self.buffer.page()[1234] ^= 0x20;
                self.file.write_all_at(self.buffer.page(), slot * RECORD as u64)?;
                self.file.sync_data()?;
            }
            Order::Corrupt(_) | Order::Rate(_) => {}
        }
        Ok(())
    }

    /// Finds the newest record of an earlier run.
    fn recover(&mut self, counters: &Counters) -> io::Result<()> {
        let mut newest = 0;
        for slot in 0..self.slots {
            self.file.read_exact_at(self.buffer.page(), slot * RECORD as u64)?;
            let page = self.buffer.page();
            if page.iter().all(|b| *b == 0) {
                continue;
            }
            match parse(page) {
                Some(n) if n % self.slots == slot => newest = newest.max(n),
                _ => counters.disk_error(&format!("disk slot {slot}: holds no valid record at start")),
            }
        }
        counters.disk_recovered.store(newest, Relaxed);
        counters.disk_acked.store(newest, Relaxed);
        self.next = newest + 1;
        Ok(())
    }

    fn append(&mut self, counters: &Counters) -> io::Result<()> {
        let n = self.next;
        compose(n, self.buffer.page());
        self.file.write_all_at(self.buffer.page(), (n % self.slots) * RECORD as u64)?;
        self.file.sync_data()?;
        self.next += 1;
        counters.disk_acked.store(n, Relaxed);
        Ok(())
    }

    fn check_slot(&mut self, slot: u64, counters: &Counters) -> io::Result<()> {
        // The newest acknowledged number that falls on this slot.
        let newest = self.next - 1;
        let behind = (newest % self.slots + self.slots - slot) % self.slots;
        if newest > behind { self.check(newest - behind, counters) } else { Ok(()) }
    }

    /// Reads record `n` back; a bad one is counted, then rewritten.
    fn check(&mut self, n: u64, counters: &Counters) -> io::Result<()> {
        let at = (n % self.slots) * RECORD as u64;
        self.file.read_exact_at(self.buffer.page(), at)?;
        counters.records_verified.fetch_add(1, Relaxed);
        let found = parse(self.buffer.page());
        if found != Some(n) {
            let what = match found {
                Some(m) => format!("holds record {m}"),
                None => "is damaged".to_owned(),
            };
            counters.disk_error(&format!("disk record {n} at byte {at}: {what}"));
            compose(n, self.buffer.page());
            self.file.write_all_at(self.buffer.page(), at)?;
            self.file.sync_data()?;
        }
        Ok(())
    }
}

fn compose(n: u64, page: &mut [u8]) {
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in page.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        chunk.copy_from_slice(&x.to_le_bytes());
    }
    page[..8].copy_from_slice(MARK);
    page[8..16].copy_from_slice(&n.to_le_bytes());
    page[16..20].fill(0);
    let sum = crc32c::crc32c(page);
    page[16..20].copy_from_slice(&sum.to_le_bytes());
}

/// The number of a valid record.
fn parse(page: &[u8]) -> Option<u64> {
    let n = u64::from_le_bytes(page.get(8..16)?.try_into().ok()?);
    let mut expected = vec![0u8; RECORD];
    compose(n, &mut expected);
    (page == expected).then_some(n)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_record_is_recognised_and_one_flipped_bit_is_not() {
        let mut page = vec![0u8; RECORD];
        compose(77, &mut page);
        assert_eq!(parse(&page), Some(77));
        page[4095] ^= 1;
        assert_eq!(parse(&page), None);
    }
}
