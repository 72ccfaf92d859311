//! The requests of one NBD connection.
//!
//! ```text
//!   socket ──many requests per read──▶ input ──▶ what the disk can do now ──▶ output ──one write──▶ socket
//!                                        └─ what waits ──▶ pool ──────────────────── own write ─────▲
//! ```
//!
//! The thread of the connection reads as much as there is, does what can be done without waiting, and sends the
//! answers together when its input is used up. What has to wait goes to the pool and is answered from there, later.
//!
//! Invariants
//! * At most [`MAX_WAITING`] requests and [`MAX_WAITING_BYTES`] of a connection wait; then its input waits.
//! * Answers are written whole, under one lock.
//!
//! Not here: the handshake.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::handshake::Agreed;
use super::proto::{self, REQUEST_BYTES, Request};
use super::{DeviceSlot, Export};
use crate::block_dev::{BlockDev, BlockRead};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::slot::Entered;

const INPUT_BYTES: usize = 256 << 10;
/// Output that is sent at once, even if there is more input.
const OUTPUT_BYTES: usize = 256 << 10;
/// Reads up to this go through the output buffer; larger ones get a buffer of their own.
const INLINE_BYTES: usize = 1 << 20;
const MAX_WAITING: usize = 256;
const MAX_WAITING_BYTES: usize = 64 << 20;
const MAX_EXTENTS: usize = 512;

/// What a connection's thread and its jobs in the pool share.
struct Line {
    export: Arc<Export>,
    agreed: Agreed,
    writer: Mutex<UnixStream>,
    waiting: Mutex<Waiting>,
    fewer: Condvar,
}

#[derive(Default)]
struct Waiting {
    requests: usize,
    bytes: usize,
}

/// Bytes read and not yet used: `start..end` of a buffer that is never cleared.
struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn available(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Reads until at least `wanted` bytes are there; `false` at the end of the stream.
    fn fill(&mut self, mut from: &UnixStream, wanted: usize) -> Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start + wanted > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < wanted {
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match from.read(room) {
                Ok(0) => return Ok(false),
                Ok(got) => self.end += got,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read requests"),
            }
        }
        Ok(true)
    }
}

/// Answers to be sent together: the first `len` bytes of a buffer that is never cleared.
struct Output {
    buffer: Vec<u8>,
    len: usize,
}

impl Output {
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.len + bytes;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        let start = std::mem::replace(&mut self.len, end);
        self.buffer.get_mut(start..end).unwrap_or_default()
    }

    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }
}

/// Serves requests until the client is gone.
pub(super) fn run(export: &Arc<Export>, stream: &UnixStream, agreed: Agreed) -> Result<()> {
    let line = Arc::new(Line {
        export: export.clone(),
        agreed,
        writer: Mutex::new(stream.try_clone().context("copy a connection")?),
        waiting: Mutex::default(),
        fewer: Condvar::new(),
    });
    let mut session = Session {
        line,
        stream,
        input: Input { buffer: vec![0; INPUT_BYTES], start: 0, end: 0 },
        output: Output { buffer: Vec::new(), len: 0 },
        payload: Vec::new(),
    };
    let result = session.serve();
    session.send()?;
    result
}

struct Session<'a> {
    line: Arc<Line>,
    stream: &'a UnixStream,
    input: Input,
    output: Output,
    // A write's data, if it did not fit into the input buffer.
    payload: Vec<u8>,
}

impl Session<'_> {
    fn serve(&mut self) -> Result<()> {
        while !self.line.export.stop.load(Ordering::SeqCst) {
            if self.input.available().len() < REQUEST_BYTES {
                self.send()?;
                if !self.input.fill(self.stream, REQUEST_BYTES)? {
                    return Ok(());
                }
            }
            let header = self.input.available().first_chunk().and_then(Request::parse);
            let Some(request) = header else {
                return Err(Error::new(ErrorKind::InvalidInput, "read a request: it has no magic number"));
            };
            self.input.start += REQUEST_BYTES;
            if request.command == proto::CMD_DISC {
                return Ok(());
            }
            if request.command == proto::CMD_WRITE {
                self.write(request)?;
            } else {
                self.other(request)?;
            }
            if self.output.len >= OUTPUT_BYTES {
                self.send()?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        let ready = std::mem::take(&mut self.output.len);
        if ready == 0 {
            return Ok(());
        }
        let bytes = self.output.buffer.get(..ready).unwrap_or_default();
        self.line.writer.lock().write_all(bytes).context("send answers")
    }

    fn fail(&mut self, request: Request, errno: u32) {
        let reply = error_reply(self.line.agreed, request, errno);
        self.output.put(&reply);
    }

    fn write(&mut self, request: Request) -> Result<()> {
        if request.length > proto::MAX_PAYLOAD {
            return Err(Error::new(ErrorKind::InvalidInput, "take a write: it is too large"));
        }
        let length = request.length as usize;
        // The data must be taken off the line even if the request is refused.
        let in_buffer = length <= INPUT_BYTES;
        if in_buffer {
            if self.input.available().len() < length {
                self.send()?;
                if !self.input.fill(self.stream, length)? {
                    return Ok(());
                }
            }
        } else {
            self.take_payload(length)?;
        }
        let start = self.input.start;
        if in_buffer {
            self.input.start += length;
        }
        if let Some(errno) = refused(&self.line.export, request) {
            self.fail(request, errno);
            return Ok(());
        }
        let line = self.line.clone();
        let data = if in_buffer {
            self.input.buffer.get(start..start + length).unwrap_or_default()
        } else {
            &self.payload
        };
        let Some(device) = line.enter() else {
            self.fail(request, proto::ESHUTDOWN);
            return Ok(());
        };
        match device.write_now(request.offset, &[IoSlice::new(data)]) {
            Ok(true) if request.flags & proto::CMD_FLAG_FUA == 0 => {
                self.output.put(&simple_reply(request, 0));
            }
            // Durable before it is answered.
            Ok(true) => self.hand_on(request, 0, |device| device.flush()),
            Ok(false) => {
                let data = data.to_vec();
                let length = data.len();
                self.hand_on(request, length, move |device| {
                    device.write(request.offset, &[IoSlice::new(&data)])?;
                    flush_if_asked(device, request)
                });
            }
            Err(error) => self.fail(request, complain(&error)),
        }
        Ok(())
    }

    /// Reads a write's data that is larger than the input buffer.
    fn take_payload(&mut self, length: usize) -> Result<()> {
        self.send()?;
        self.payload.clear();
        let here = self.input.available();
        let part = here.len().min(length);
        self.payload.extend_from_slice(here.get(..part).unwrap_or_default());
        self.input.start += part;
        self.payload.resize(length, 0);
        let mut from = self.stream;
        from.read_exact(self.payload.get_mut(part..).unwrap_or_default()).context("read a write's data")
    }

    fn other(&mut self, request: Request) -> Result<()> {
        if let Some(errno) = refused(&self.line.export, request) {
            self.fail(request, errno);
            return Ok(());
        }
        let (offset, length) = (request.offset, u64::from(request.length));
        match request.command {
            proto::CMD_READ => return self.read(request),
            proto::CMD_FLUSH if self.line.export.slot.is_durable() => {
                self.output.put(&simple_reply(request, 0));
            }
            proto::CMD_FLUSH => self.hand_on(request, 0, |device| device.flush()),
            proto::CMD_TRIM => self.hand_on(request, 0, move |device| {
                device.discard(offset, length)?;
                flush_if_asked(device, request)
            }),
            proto::CMD_WRITE_ZEROES => self.hand_on(request, 0, move |device| {
                device.write_zeroes(offset, length)?;
                flush_if_asked(device, request)
            }),
            proto::CMD_CACHE => self.hand_on(request, 0, move |device| cache(device, offset, length)),
            proto::CMD_BLOCK_STATUS if self.line.agreed.allocation => self.block_status(request),
            _ => self.fail(request, proto::EINVAL),
        }
        Ok(())
    }

    fn read(&mut self, request: Request) -> Result<()> {
        let length = request.length as usize;
        if length > INLINE_BYTES {
            self.read_later(request);
            return Ok(());
        }
        let line = self.line.clone();
        let Some(device) = line.enter() else {
            self.fail(request, proto::ESHUTDOWN);
            return Ok(());
        };
        let before = self.output.len;
        let header = read_header(line.agreed, request);
        self.output.put(header.bytes());
        let into = self.output.room(length);
        match device.read_now(request.offset, &mut [IoSliceMut::new(into)]) {
            Ok(true) => {}
            Ok(false) => {
                self.output.len = before;
                self.read_later(request);
            }
            Err(error) => {
                self.output.len = before;
                self.fail(request, complain(&error));
            }
        }
        Ok(())
    }

    fn read_later(&mut self, request: Request) {
        let length = request.length as usize;
        self.wait_for_room(length);
        let line = self.line.clone();
        self.line.export.pool.submit(move || {
            let mut answer = read_header(line.agreed, request).bytes().to_vec();
            let start = answer.len();
            answer.resize(start + length, 0);
            let result = match line.reader() {
                Some(device) => {
                    let into = answer.get_mut(start..).unwrap_or_default();
                    device
                        .read(request.offset, &mut [IoSliceMut::new(into)])
                        .map_err(|error| complain(&error))
                }
                None => Err(proto::ESHUTDOWN),
            };
            if let Err(errno) = result {
                answer = error_reply(line.agreed, request, errno);
            }
            line.answer(&answer, length);
        });
    }

    /// Does something that may wait, and answers it from there.
    fn hand_on(
        &mut self,
        request: Request,
        bytes: usize,
        job: impl FnOnce(&dyn BlockDev) -> Result<()> + Send + 'static,
    ) {
        self.wait_for_room(bytes);
        let line = self.line.clone();
        self.line.export.pool.submit(move || {
            let errno = match line.enter() {
                Some(device) => job(&*device).err().map(|error| complain(&error)),
                None => Some(proto::ESHUTDOWN),
            };
            line.answer(&simple_reply(request, errno.unwrap_or(0)), bytes);
        });
    }

    /// Waits until there is room for one request more, of `bytes`. What was answered goes out first: the client may
    /// be waiting for it.
    fn wait_for_room(&mut self, bytes: usize) {
        let full = |waiting: &mut Waiting| {
            waiting.requests >= MAX_WAITING
                || (waiting.requests > 0 && waiting.bytes + bytes > MAX_WAITING_BYTES)
        };
        if full(&mut self.line.waiting.lock()) {
            // A connection that is gone is noticed by the next read.
            let _ = self.send();
        }
        let mut waiting = self.line.waiting.lock();
        self.line.fewer.wait_while(&mut waiting, full);
        waiting.requests += 1;
        waiting.bytes += bytes;
    }

    fn block_status(&mut self, request: Request) {
        let line = self.line.clone();
        let Some(device) = line.enter() else {
            return self.fail(request, proto::ESHUTDOWN);
        };
        match extents(&*device, request) {
            Ok(extents) => {
                let chunk = Chunk::new(request, proto::CHUNK_BLOCK_STATUS, 4 + 8 * extents.len());
                self.output.put(chunk.bytes());
                self.output.put(&proto::CONTEXT_ID.to_be_bytes());
                for (length, state) in extents {
                    self.output.put(&length.to_be_bytes());
                    self.output.put(&state.to_be_bytes());
                }
            }
            Err(error) => self.fail(request, complain(&error)),
        }
    }
}

impl Line {
    /// The disk; waits for it if it is not served, up to the export's patience. If the service ends meanwhile the
    /// client sees the connection closed, not an error: one that reconnects asks again.
    fn enter(&self) -> Option<Entered<'_>> {
        let slot: &DeviceSlot = &self.export.slot;
        if let Some(device) = slot.enter() {
            return Some(device);
        }
        let deadline = Instant::now() + self.export.options.disk_patience;
        loop {
            if let Some(device) = slot.enter_within(Duration::from_millis(100)) {
                return Some(device);
            }
            if self.export.stop.load(Ordering::SeqCst) {
                let _ = self.writer.lock().shutdown(Shutdown::Both);
                return None;
            }
            if Instant::now() > deadline {
                return None;
            }
        }
    }

    fn reader(&self) -> Option<Arc<dyn BlockDev>> {
        drop(self.enter()?);
        self.export.slot.reader()
    }

    /// Sends the answer of a request that waited.
    fn answer(&self, answer: &[u8], bytes: usize) {
        let mut writer = self.writer.lock();
        if writer.write_all(answer).is_err() {
            // Half an answer may be out: nothing after it would make sense.
            let _ = writer.shutdown(Shutdown::Both);
        }
        drop(writer);
        let mut waiting = self.waiting.lock();
        waiting.requests -= 1;
        waiting.bytes -= bytes;
        self.fewer.notify_one();
    }
}

/// The error for a request that is wrong in itself.
fn refused(export: &Export, request: Request) -> Option<u32> {
    let writes = matches!(request.command, proto::CMD_WRITE | proto::CMD_TRIM | proto::CMD_WRITE_ZEROES);
    if writes && export.options.read_only {
        return Some(proto::EPERM);
    }
    if request.command == proto::CMD_FLUSH {
        return None;
    }
    let unit = u64::from(proto::MIN_BLOCK);
    let length = u64::from(request.length);
    let aligned = request.offset.is_multiple_of(unit) && length.is_multiple_of(unit);
    let inside = request.offset.checked_add(length).is_some_and(|end| end <= export.slot.size_bytes());
    let fits = request.command != proto::CMD_READ || request.length <= proto::MAX_PAYLOAD;
    match (aligned && fits && length > 0, inside) {
        (true, true) => None,
        (true, false) if writes => Some(proto::ENOSPC),
        _ => Some(proto::EINVAL),
    }
}

fn flush_if_asked(device: &dyn BlockDev, request: Request) -> Result<()> {
    if request.flags & proto::CMD_FLAG_FUA != 0 { device.flush() } else { Ok(()) }
}

/// Has the disk fetch a range that will be read soon.
fn cache(device: &dyn BlockDev, offset: u64, length: u64) -> Result<()> {
    let mut scratch = vec![0; INLINE_BYTES];
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let part = usize::try_from(end - at).map_or(INLINE_BYTES, |left| left.min(INLINE_BYTES));
        device.read(at, &mut [IoSliceMut::new(scratch.get_mut(..part).unwrap_or_default())])?;
        at += part as u64;
    }
    Ok(())
}

/// The runs of a range, as `(length, state)`; the first one only if that was asked for.
fn extents(device: &dyn BlockRead, request: Request) -> Result<Vec<(u32, u32)>> {
    let end = request.offset + u64::from(request.length);
    let limit = if request.flags & proto::CMD_FLAG_REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
    let mut runs: Vec<(u32, u32)> = Vec::new();
    let mut at = request.offset;
    while at < end {
        let extent = device.extent(at)?;
        let length = extent.length.clamp(1, end - at);
        let state = if extent.data { 0 } else { proto::STATE_HOLE_ZERO };
        let short = u32::try_from(length).unwrap_or(u32::MAX);
        let full = runs.len() == limit;
        match runs.last_mut() {
            Some((total, last)) if *last == state => *total = total.saturating_add(short),
            _ if full => break,
            _ => runs.push((short, state)),
        }
        at += length;
    }
    Ok(runs)
}

fn complain(error: &Error) -> u32 {
    tracing::debug!(%error, "an NBD request failed");
    proto::errno(error.kind())
}

/// Header of a chunk that is the only one of its answer.
struct Chunk {
    raw: [u8; 28],
    len: usize,
}

impl Chunk {
    fn bytes(&self) -> &[u8] {
        self.raw.get(..self.len).unwrap_or_default()
    }

    fn start(parts: &[&[u8]]) -> Self {
        let mut chunk = Self { raw: [0; 28], len: 0 };
        for part in parts {
            if let Some(room) = chunk.raw.get_mut(chunk.len..chunk.len + part.len()) {
                room.copy_from_slice(part);
                chunk.len += part.len();
            }
        }
        chunk
    }

    fn new(request: Request, kind: u16, payload: usize) -> Self {
        Self::start(&[
            &proto::CHUNK_MAGIC.to_be_bytes(),
            &proto::CHUNK_DONE.to_be_bytes(),
            &kind.to_be_bytes(),
            &request.cookie.to_be_bytes(),
            &u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes(),
        ])
    }
}

/// What stands before a read's data.
fn read_header(agreed: Agreed, request: Request) -> Chunk {
    if !agreed.structured {
        return Chunk::start(&[&simple_reply(request, 0)]);
    }
    let head = Chunk::new(request, proto::CHUNK_OFFSET_DATA, 8 + request.length as usize);
    Chunk::start(&[head.bytes(), &request.offset.to_be_bytes()])
}

fn simple_reply(request: Request, errno: u32) -> [u8; 16] {
    let mut reply = [0; 16];
    let (magic, rest) = reply.split_at_mut(4);
    let (error, cookie) = rest.split_at_mut(4);
    magic.copy_from_slice(&proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
    error.copy_from_slice(&errno.to_be_bytes());
    cookie.copy_from_slice(&request.cookie.to_be_bytes());
    reply
}

/// The answer to a request that failed: a chunk where only chunks are allowed.
fn error_reply(agreed: Agreed, request: Request, errno: u32) -> Vec<u8> {
    let chunked = matches!(request.command, proto::CMD_READ | proto::CMD_BLOCK_STATUS);
    if !(agreed.structured && chunked) {
        return simple_reply(request, errno).to_vec();
    }
    let mut reply = Chunk::new(request, proto::CHUNK_ERROR, 6).bytes().to_vec();
    reply.extend(errno.to_be_bytes());
    reply.extend(0_u16.to_be_bytes());
    reply
}
