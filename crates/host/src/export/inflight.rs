//! The record of requests that were taken and not yet answered, kept in memory that outlives this process.
//!
//! The front-end holds the file and gives it to whoever serves the device next. Per queue (split-ring layout of the
//! vhost-user specification, native byte order):
//!
//! ```text
//!   0 features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 last_batch_head u16 │ 14 used_idx u16
//!  16 + 16·head:  inflight u8, 5 bytes, next u16, counter u64
//!
//!  take head:    counter, inflight = 1
//!  answer head:  last_batch_head = head → used ring's index + 1 → inflight = 0 → used_idx = used ring's index
//!                                       ▲ answered from here on
//! ```
//!
//! A process that dies between the last three leaves `used_idx` behind the ring's index: what the last batch lists
//! was answered, and its marks are cleared by the next process. Everything else that is marked is done again, in
//! the order in which it was taken.
//!
//! The file's content is not trusted: the front-end may have written anything.
#![expect(unsafe_code, reason = "the record is memory shared with the front-end")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::guest_ram::Mapping;
use crate::error::{Context, Error, ErrorKind, Result};

const HEADER_BYTES: u64 = 16;
const ENTRY_BYTES: u64 = 16;
const VERSION: u16 = 1;

/// Bytes that one queue of `queue_size` descriptors takes; a multiple of a cache line.
fn queue_bytes(queue_size: u16) -> u64 {
    (HEADER_BYTES + ENTRY_BYTES * u64::from(queue_size)).next_multiple_of(64)
}

/// The record of all queues of a device.
pub(super) struct InflightFile {
    map: Arc<Mapping>,
    queues: u16,
    queue_size: u16,
}

impl InflightFile {
    /// A new, empty record, and how many bytes it has.
    pub(super) fn create(queues: u16, queue_size: u16) -> Result<(Self, File, u64)> {
        let bytes = queue_bytes(queue_size) * u64::from(queues);
        let file = memfd_create("whimbrel-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .context("make in-flight record")?;
        ftruncate(&file, bytes).context("size in-flight record")?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .context("seal in-flight record")?;
        let file = File::from(file);
        let opened = Self::open(&file, 0, bytes, queues, queue_size)?;
        Ok((opened, file, bytes))
    }

    /// The record that a front-end kept.
    pub(super) fn open(file: &File, offset: u64, bytes: u64, queues: u16, queue_size: u16) -> Result<Self> {
        if bytes < queue_bytes(queue_size) * u64::from(queues) || !offset.is_multiple_of(64) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("open in-flight record of {bytes} bytes for {queues} queues of {queue_size}"),
            ));
        }
        Ok(Self { map: Arc::new(Mapping::new(file, offset, bytes)?), queues, queue_size })
    }

    /// The part of one queue; `None` if the record has none, or a smaller one.
    pub(super) fn queue(&self, index: u16, queue_size: u16) -> Option<Inflight> {
        if index >= self.queues || queue_size > self.queue_size {
            return None;
        }
        let offset = usize::try_from(queue_bytes(self.queue_size) * u64::from(index)).ok()?;
        Some(Inflight { map: self.map.clone(), offset, queue_size, counter: 0 })
    }
}

/// The record of one queue.
pub(super) struct Inflight {
    map: Arc<Mapping>,
    offset: usize,
    queue_size: u16,
    counter: u64,
}

/// What [`Inflight::recover`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    /// Requests to do again, in the order in which they were taken.
    pub(super) heads: Vec<u16>,
    /// The next entry of the available ring to take; `None` if the record was new and says nothing of it.
    pub(super) next_avail: Option<u16>,
}

impl Inflight {
    fn u16_at(&self, at: usize) -> &AtomicU16 {
        debug_assert!(self.offset + at + 2 <= self.map.len(), "inside the record");
        // SAFETY: callers stay inside the queue's part, which `open` checked to lie inside the mapping; offsets of
        // u16 fields are even, the part starts at a multiple of 64 from a page's start.
        unsafe { AtomicU16::from_ptr(self.map.as_ptr().add(self.offset + at).cast()) }
    }

    fn version(&self) -> &AtomicU16 {
        self.u16_at(8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.u16_at(10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.u16_at(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.u16_at(14)
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.queue_size, "heads are checked by the ring");
        16 + 16 * usize::from(head)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `u16_at`; a byte needs no alignment.
        unsafe { AtomicU8::from_ptr(self.map.as_ptr().add(self.offset + self.entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + 6)
    }

    fn order(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `u16_at`; entries start at multiples of 16, the counter 8 bytes into one.
        unsafe { AtomicU64::from_ptr(self.map.as_ptr().add(self.offset + self.entry(head) + 8).cast()) }
    }

    /// Notes that `head` was taken.
    pub(super) fn take(&mut self, head: u16) {
        self.order(head).store(self.counter, Ordering::Relaxed);
        self.mark(head).store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// To be called before the used ring's index is raised to answer `head`.
    pub(super) fn about_to_answer(&self, head: u16) {
        self.last_batch_head().store(head, Ordering::Release);
    }

    /// To be called after the used ring's index was raised to `used_idx`, which answered `head`.
    pub(super) fn answered(&self, head: u16, used_idx: u16) {
        self.mark(head).store(0, Ordering::Release);
        self.used_idx().store(used_idx, Ordering::Release);
    }

    /// Reads what an earlier process left, given the used ring's index, and makes the record good for this one. A new
    /// record begins with what was `carried` from another host, all of it or, if this process dies, nothing.
    pub(super) fn recover(
        &mut self,
        ring_used_idx: u16,
        carried: impl FnOnce() -> Vec<u16>,
    ) -> Result<Recovered> {
        if self.version().load(Ordering::Acquire) == 0 {
            self.desc_num().store(self.queue_size, Ordering::Relaxed);
            self.used_idx().store(ring_used_idx, Ordering::Relaxed);
            let heads = carried();
            // A process that died here may have marked some; the list says the same again.
            heads.iter().for_each(|head| self.take(*head));
            self.version().store(VERSION, Ordering::Release);
            return Ok(Recovered { heads, next_avail: None });
        }
        let version = self.version().load(Ordering::Relaxed);
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("read in-flight record of version {version}"),
            ));
        }
        self.clear_last_batch(ring_used_idx);
        let mut marked: Vec<(u64, u16)> = (0..self.queue_size)
            .filter(|head| self.mark(*head).load(Ordering::Relaxed) == 1)
            .map(|head| (self.order(head).load(Ordering::Relaxed), head))
            .collect();
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(order, _)| order.wrapping_add(1));
        let heads: Vec<u16> = marked.into_iter().map(|(_, head)| head).collect();
        let taken = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        Ok(Recovered { heads, next_avail: Some(ring_used_idx.wrapping_add(taken)) })
    }

    /// Clears the marks of a batch that was answered, but whose marks a dying process left.
    fn clear_last_batch(&self, ring_used_idx: u16) {
        let answered = ring_used_idx.wrapping_sub(self.used_idx().load(Ordering::Relaxed));
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        // Never more than the ring holds, whatever the record says.
        for _ in 0..answered.min(self.queue_size) {
            if head >= self.queue_size {
                break;
            }
            self.mark(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_idx().store(ring_used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A record after an orderly start with the ring's index at 0.
    fn started(size: u16) -> (InflightFile, Inflight) {
        let (file, _, _) = InflightFile::create(2, size).unwrap();
        let mut queue = file.queue(1, size).unwrap();
        assert_eq!(queue.recover(0, Vec::new).unwrap(), Recovered { heads: vec![], next_avail: None });
        (file, queue)
    }

    #[test]
    fn what_was_taken_and_not_answered_is_done_again_in_the_order_it_was_taken() {
        let (file, mut queue) = started(8);
        for head in [5, 2, 7, 0] {
            queue.take(head);
        }
        queue.about_to_answer(2);
        queue.answered(2, 1);
        let mut next = file.queue(1, 8).unwrap();
        let found = next.recover(1, Vec::new).unwrap();
        assert_eq!(found, Recovered { heads: vec![5, 7, 0], next_avail: Some(4) });
        // Later requests come after those done again.
        next.take(1);
        let again = file.queue(1, 8).unwrap().recover(1, Vec::new).unwrap();
        assert_eq!(again.heads, vec![5, 7, 0, 1]);
    }

    #[test]
    fn what_was_carried_from_another_host_is_in_a_new_record_and_in_no_other() {
        let (file, _, _) = InflightFile::create(1, 8).unwrap();
        let found = file.queue(0, 8).unwrap().recover(4, || vec![6, 1]).unwrap();
        assert_eq!(found, Recovered { heads: vec![6, 1], next_avail: None });
        let again = file.queue(0, 8).unwrap().recover(4, || panic!("the record has it")).unwrap();
        assert_eq!(again, Recovered { heads: vec![6, 1], next_avail: Some(6) });
    }

    #[test]
    fn an_answer_is_not_repeated_whenever_the_process_died_while_giving_it() {
        // Died before the ring's index was raised: not answered.
        let (file, mut queue) = started(8);
        queue.take(3);
        queue.about_to_answer(3);
        assert_eq!(file.queue(1, 8).unwrap().recover(0, Vec::new).unwrap().heads, vec![3]);
        // Died right after it: answered.
        let found = file.queue(1, 8).unwrap().recover(1, Vec::new).unwrap();
        assert_eq!(found, Recovered { heads: vec![], next_avail: Some(1) });
        // Died after the mark was cleared, before `used_idx`.
        let (file, mut queue) = started(8);
        queue.take(3);
        queue.about_to_answer(3);
        queue.mark(3).store(0, Ordering::Relaxed);
        assert_eq!(file.queue(1, 8).unwrap().recover(1, Vec::new).unwrap().heads, Vec::<u16>::new());
    }

    #[test]
    fn a_batch_that_another_implementation_left_is_cleared_along_its_list() {
        let (file, mut queue) = started(8);
        for head in [1, 4, 6] {
            queue.take(head);
        }
        queue.next(6).store(4, Ordering::Relaxed);
        queue.about_to_answer(6);
        let found = file.queue(1, 8).unwrap().recover(2, Vec::new).unwrap();
        assert_eq!(found, Recovered { heads: vec![1], next_avail: Some(3) });
    }

    #[test]
    fn a_record_full_of_rubbish_is_survived() {
        let (file, _, _) = InflightFile::create(1, 4).unwrap();
        let mut queue = file.queue(0, 4).unwrap();
        queue.version().store(VERSION, Ordering::Relaxed);
        queue.last_batch_head().store(60_000, Ordering::Relaxed);
        queue.used_idx().store(9, Ordering::Relaxed);
        for head in 0..4 {
            queue.mark(head).store(1, Ordering::Relaxed);
            queue.next(head).store(head, Ordering::Relaxed);
        }
        assert!(queue.recover(3, Vec::new).unwrap().heads.len() <= 4);
        queue.version().store(77, Ordering::Relaxed);
        assert!(queue.recover(3, Vec::new).is_err());
        assert!(file.queue(1, 4).is_none());
        assert!(file.queue(0, 8).is_none());
    }
}
