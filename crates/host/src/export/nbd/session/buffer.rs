//! A connection's buffers: bytes received and not yet used, answers to be sent together. Neither is ever cleared:
//! zeroing what is overwritten anyway costs as much as copying it.

use std::ops::Range;

use whimbrel_wire::nbd::{Head, Replies, Request};

/// What is received at once, and the longest payload that stays in the input, bytes.
pub(super) const INPUT_BYTES: usize = 256 << 10;
/// Room beside the longest payload for headers.
const INPUT_ROOM: usize = INPUT_BYTES + (4 << 10);
/// Runs of zeros are looked for in this unit, bytes.
const ZERO_UNIT: usize = 4096;
/// Runs of zeros amid data that are worth a chunk of their own, bytes.
const HOLE_BYTES_MIN: usize = 16 << 10;

/// Bytes received and not yet used: a window of the buffer.
#[derive(Default)]
pub(super) struct Input {
    buffer: Vec<u8>,
    window: Range<usize>,
}

impl Input {
    pub(super) fn available(&self) -> &[u8] {
        self.buffer.get(self.window.clone()).unwrap_or_default()
    }

    /// Forgets the first `length` bytes.
    pub(super) fn take(&mut self, length: usize) {
        self.window.start = (self.window.start + length).min(self.window.end);
    }

    /// Room behind what is available, such that `wanted` bytes fit in all.
    pub(super) fn room(&mut self, wanted: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; INPUT_ROOM];
        }
        if self.window.is_empty() {
            self.window = 0..0;
        }
        if self.window.start + wanted > self.buffer.len() || self.window.end == self.buffer.len() {
            self.buffer.copy_within(self.window.clone(), 0);
            self.window = 0..self.window.len();
        }
        self.buffer.get_mut(self.window.end..).unwrap_or_default()
    }

    /// So many bytes of the room are available now.
    pub(super) fn received(&mut self, length: usize) {
        self.window.end = (self.window.end + length).min(self.buffer.len());
    }
}

/// Answers to be sent together: the first `len` bytes of the buffer.
#[derive(Default)]
pub(super) struct Output {
    buffer: Vec<u8>,
    len: usize,
}

impl Output {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.len + bytes;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        let start = std::mem::replace(&mut self.len, end);
        self.buffer.get_mut(start..end).unwrap_or_default()
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// Room for a read's answer in one chunk.
    pub(super) fn read(&mut self, replies: Replies, request: &Request) -> ReadRoom<'_> {
        let start = self.len;
        let head = Head::data(replies, request, request.offset, request.length, true);
        self.put(&head);
        let data = self.len;
        self.room(request.length as usize);
        ReadRoom { output: self, start, data, replies, request: *request }
    }

    /// Everything, for an answer that is sent by itself.
    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        self.buffer.truncate(self.len);
        self.buffer
    }
}

/// A read's answer in the making, at the end of the output: its head, and room for its data.
pub(super) struct ReadRoom<'a> {
    output: &'a mut Output,
    start: usize,
    data: usize,
    replies: Replies,
    request: Request,
}

impl ReadRoom<'_> {
    /// Where the disk's bytes go.
    pub(super) fn data(&mut self) -> &mut [u8] {
        self.output.buffer.get_mut(self.data..self.output.len).unwrap_or_default()
    }

    /// There is no answer after all.
    pub(super) fn give_back(self) {
        self.output.len = self.start;
    }

    /// The data is there. Unless it has to stay whole, runs of zeros become holes, in place: a hole's chunk is shorter
    /// than the zeros it stands for, so nothing is overwritten before it was moved.
    pub(super) fn keep(self, whole: bool) {
        if self.replies == Replies::Simple {
            return;
        }
        let (output, request) = (self.output, &self.request);
        let data = output.buffer.get(self.data..output.len).unwrap_or_default();
        let runs = runs(data, request.offset, whole);
        if let [(_, false)] = runs.as_slice() {
            return;
        }
        let end = data.len();
        let mut to = self.start;
        for (run, zero) in runs {
            let (offset, last) = (request.offset + run.start as u64, run.end == end);
            let length = run.len() as u64;
            let head = if zero {
                Head::hole(self.replies, request, offset, length as u32, last)
            } else {
                Head::data(self.replies, request, offset, length, last)
            };
            if let Some(room) = output.buffer.get_mut(to..to + head.len()) {
                room.copy_from_slice(&head);
            }
            to += head.len();
            if !zero {
                let from = self.data + run.start..self.data + run.end;
                output.buffer.copy_within(from, to);
                to += run.len();
            }
        }
        output.len = to;
    }
}

/// Splits a read's data at runs of zeros that are worth it: `(run, whether it is zeros)`. Whole: all or nothing.
fn runs(data: &[u8], offset: u64, whole: bool) -> Vec<(Range<usize>, bool)> {
    let unit_start = (offset % ZERO_UNIT as u64) as usize;
    let mut found: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let end = (at + ZERO_UNIT - if at == 0 { unit_start } else { 0 }).min(data.len());
        let zero = is_zero(data.get(at..end).unwrap_or_default());
        match found.last_mut() {
            Some((run, of)) if *of == zero => run.end = end,
            _ => found.push((at..end, zero)),
        }
        at = end;
    }
    if let [_] = found.as_slice() {
        return found;
    }
    let mut merged: Vec<(Range<usize>, bool)> = Vec::new();
    for (run, zero) in found {
        let zero = zero && !whole && run.len() >= HOLE_BYTES_MIN;
        match merged.last_mut() {
            Some((last, of)) if *of == zero => last.end = run.end,
            _ => merged.push((run, zero)),
        }
    }
    merged
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;
    use whimbrel_wire::nbd::Command;

    use super::*;
    use crate::export::nbd::test_client::{Content, contents};

    proptest! {
        #[test]
        fn what_a_client_puts_together_is_what_was_read(
            blocks in prop::collection::vec((any::<bool>(), 1..12_usize), 1..8),
            offset in 0..16_u64,
            whole: bool,
            extended: bool,
            before in 0..100_usize,
        ) {
            let offset = offset * 512;
            let data: Vec<u8> =
                blocks.iter().flat_map(|(data, blocks)| vec![u8::from(*data) * 7; blocks * 2048]).collect();
            let replies = if extended { Replies::Extended } else { Replies::Structured };
            let request = Request {
                flags: 0,
                command: Command::Read,
                cookie: 5,
                offset,
                length: data.len() as u64,
            };
            let mut output = Output::default();
            output.put(&vec![1; before]);
            let mut room = output.read(replies, &request);
            room.data().copy_from_slice(&data);
            room.keep(whole);
            output.put(b"behind");
            let bytes = output.into_bytes();
            prop_assert_eq!(&bytes[bytes.len() - 6..], b"behind");
            let pieces = contents(replies, &request, &bytes[before..bytes.len() - 6]);
            let mut put_together = vec![0xff; data.len()];
            let mut covered = 0;
            for (at, piece) in &pieces {
                let at = usize::try_from(*at - offset).unwrap();
                let length = match piece {
                    Content::Data(bytes) => {
                        put_together[at..at + bytes.len()].copy_from_slice(bytes);
                        bytes.len()
                    }
                    Content::Hole(length) => {
                        put_together[at..at + *length as usize].fill(0);
                        *length as usize
                    }
                };
                covered += length;
            }
            prop_assert!(put_together == data);
            prop_assert_eq!(covered, data.len());
            prop_assert!(!whole || pieces.len() == 1);
        }

        #[test]
        fn input_keeps_what_was_not_used(steps in prop::collection::vec((1..9000_usize, 0..9000_usize), 1..200)) {
            let mut input = Input::default();
            let mut naive = std::collections::VecDeque::new();
            let mut next = 0_u8;
            for (receive, take) in steps {
                let wanted = naive.len() + 1;
                if wanted > INPUT_BYTES {
                    break;
                }
                let room = input.room(wanted);
                prop_assert!(!room.is_empty());
                let received = receive.min(room.len());
                for place in &mut room[..received] {
                    *place = next;
                    naive.push_back(next);
                    next = next.wrapping_add(1);
                }
                input.received(received);
                let take = take.min(naive.len());
                input.take(take);
                naive.drain(..take);
                prop_assert!(input.available().iter().eq(naive.iter()));
            }
        }
    }
}
