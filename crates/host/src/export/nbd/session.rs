//! The requests of one NBD connection.
//!
//! ```text
//!   socket ──many requests per receive──▶ input ──▶ what can be done now ──▶ output ──one send──▶ socket
//!                                           │                                  ▲
//!                                           └─ what waits ──▶ pool ──▶ mailbox ┘
//! ```
//!
//! The connection's thread receives as much as there is, does what can be done without waiting (`read_now`,
//! `write_now`), straight between disk and buffers, and sends the answers together when its input is used up. The rest
//! goes to the pools, and comes back through the mailbox.
//!
//! A flush from a client that waits for its answer before it says more is done by this thread too: nobody else
//! would be served meanwhile, and two changes of thread are saved.
//!
//! Invariants
//! * At most [`WAITING_MAX`] requests and [`WAITING_BYTES_MAX`] of a connection wait; then its input waits.
//! * Answers are sent whole, one after the other, by one thread.
//! * Before the thread waits for the client, what was answered is sent.
//!
//! Not here: what a request may do (`engine::export::nbd`), the jobs of the pools (`job`).

mod buffer;
mod job;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use whimbrel_engine::export::nbd::{Agreed, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX, Work, admit};
use whimbrel_wire::nbd::request::StatusPayload;
use whimbrel_wire::nbd::{Command, Errno, Head, Headers, Request, reply};

use super::Export;
use super::line::{Line, Received};
use super::mailbox::{Answer, Mailbox, Outcome};
use crate::error::{Error, ErrorKind, Result};
use crate::export::pool::Pool;
use buffer::{INPUT_BYTES, Input, Output};
use job::Job;

/// Output that is sent at once, even if there is more input.
const OUTPUT_BYTES: usize = 256 << 10;
/// Reads up to this are done by the connection's thread, into the output; larger ones get a buffer of their own.
const INLINE_BYTES: u64 = 1 << 20;
/// Requests of a connection that may wait.
const WAITING_MAX: usize = 256;
/// What they may hold; more only if nothing else waits.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// Answers up to this are copied into the output; longer ones are sent as they are.
const COPIED_BYTES: usize = 64 << 10;
/// Ranges up to this are trimmed or zeroed at once: the cost is looking at the map.
const ZERO_NOW_BYTES: u64 = 1 << 30;
/// While the volume's limits hold a request up, answers of others go out so often.
const PACE_LOOK: std::time::Duration = std::time::Duration::from_millis(5);
/// Threads that flush.
const FLUSHERS: usize = 2;
/// Flushes that are handed on after one was found to keep other requests waiting.
const COMPANY: u32 = 64;

/// Serves requests until the client is gone.
pub(super) fn run(export: &Arc<Export>, line: Line, agreed: Agreed) -> Result<()> {
    let mut session = Session {
        line,
        agreed,
        input: Input::default(),
        output: Output::default(),
        payload: Vec::new(),
        mail: Arc::new(Mailbox::new()?),
        workers: Pool::new("nbd-wait", export.options.workers),
        flushers: Pool::new("nbd-flush", FLUSHERS),
        waiting: 0,
        waiting_bytes: 0,
        company: 0,
        export: export.clone(),
    };
    let result = session.serve();
    session.mail.close();
    session.line.close();
    result
}

struct Session {
    export: Arc<Export>,
    line: Line,
    agreed: Agreed,
    input: Input,
    output: Output,
    /// A write's data, if it does not fit into the input.
    payload: Vec<u8>,
    mail: Arc<Mailbox>,
    workers: Pool,
    /// Of their own, so that a flush does not wait behind reads that wait for other hosts.
    flushers: Pool,
    waiting: usize,
    waiting_bytes: usize,
    /// Flushes to hand on before one is tried here again.
    company: u32,
}

fn gone(what: &str) -> Error {
    Error::new(ErrorKind::Unavailable, format!("serve an NBD client: {what}"))
}

impl Session {
    fn serve(&mut self) -> Result<()> {
        let headers = self.agreed.headers();
        while !self.export.is_stopping() {
            if !self.receive(headers.bytes())? {
                return Ok(());
            }
            let Some(request) = Request::decode(headers, self.input.available()) else {
                return Err(Error::new(ErrorKind::InvalidInput, "read a request: it has no magic number"));
            };
            self.input.take(headers.bytes());
            if request.command == Command::Disconnect {
                return self.finish();
            }
            self.request(request, headers)?;
            if self.output.len() >= OUTPUT_BYTES {
                self.collect()?;
                self.send()?;
            }
        }
        Ok(())
    }

    /// Answers what is under way: the client asked for an end, not for a loss.
    fn finish(&mut self) -> Result<()> {
        while self.waiting > 0 && !self.export.is_stopping() {
            self.sleep(false);
            self.collect()?;
        }
        self.send()
    }

    /// Makes at least `wanted` bytes available, [`INPUT_BYTES`] at most; `false` at the end of the stream.
    fn receive(&mut self, wanted: usize) -> Result<bool> {
        while self.input.available().len() < wanted {
            self.collect()?;
            self.send()?;
            let alone = self.waiting == 0;
            match self.line.receive(self.input.room(wanted), !alone)? {
                Received::Bytes(length) => {
                    self.line.check_still_admitted()?;
                    self.input.received(length);
                }
                Received::Nothing => self.sleep(true),
                Received::End => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Waits for an answer of a request that waits, or, if `listening`, for the client.
    fn sleep(&mut self, listening: bool) {
        if !self.mail.prepare_to_sleep() {
            return;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(self.mail.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.line.as_fd(), PollFlags::IN),
        ];
        let count = if listening { 2 } else { 1 };
        // An interrupted poll is a look too many, nothing worse.
        let _ = poll(fds.get_mut(..count).unwrap_or_default(), None);
        self.mail.awake();
    }

    /// Takes answers out of the mailbox.
    fn collect(&mut self) -> Result<()> {
        if self.waiting == 0 {
            return Ok(());
        }
        for Answer { outcome, bytes } in self.mail.take() {
            self.waiting -= 1;
            self.waiting_bytes -= bytes;
            match outcome {
                Outcome::Reply(reply) if reply.len() <= COPIED_BYTES => self.output.put(&reply),
                Outcome::Reply(reply) => {
                    self.send()?;
                    self.line.send(&reply)?;
                }
                Outcome::Close => return Err(gone("the service ends")),
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        let result = match self.output.bytes() {
            [] => Ok(()),
            bytes => self.line.send(bytes),
        };
        self.output.clear();
        result
    }

    fn fail(&mut self, request: &Request, errno: Errno, why: &str) {
        self.output.put(&reply::error(self.agreed.replies, request, errno, why));
    }

    fn fail_with(&mut self, request: &Request, error: &Error) {
        let (errno, why) = job::complain(error);
        self.fail(request, errno, &why);
    }

    fn done(&mut self, request: &Request) {
        self.output.put(&Head::done(self.agreed.replies, request));
    }

    fn request(&mut self, request: Request, headers: Headers) -> Result<()> {
        let payload = request.payload_bytes(headers);
        if payload > u64::from(PAYLOAD_BYTES_MAX) {
            return Err(Error::new(ErrorKind::InvalidInput, "take a payload: it is too large"));
        }
        // It must be taken off the line even if the request is refused.
        let payload = usize::try_from(payload).unwrap_or(usize::MAX);
        let in_input = payload <= INPUT_BYTES;
        if in_input {
            if !self.receive(payload)? {
                return Err(gone("it is gone in the middle of a payload"));
            }
        } else {
            self.take_payload(payload)?;
        }
        let result = self.perform(&request, payload, in_input);
        if in_input {
            self.input.take(payload);
        } else if self.payload.capacity() as u64 > INLINE_BYTES {
            self.payload = Vec::new();
        }
        result
    }

    /// Reads a payload that is larger than the input.
    fn take_payload(&mut self, length: usize) -> Result<()> {
        self.payload.clear();
        self.payload.reserve_exact(length);
        while self.payload.len() < length {
            if !self.receive(1)? {
                return Err(gone("it is gone in the middle of a payload"));
            }
            let here = self.input.available();
            let part = here.len().min(length - self.payload.len());
            self.payload.extend_from_slice(here.get(..part).unwrap_or_default());
            self.input.take(part);
        }
        Ok(())
    }

    fn perform(&mut self, request: &Request, payload: usize, in_input: bool) -> Result<()> {
        self.pace(request)?;
        let export = self.export.clone();
        let data = if in_input {
            self.input.available().get(..payload).unwrap_or_default()
        } else {
            self.payload.as_slice()
        };
        let small = data.get(..data.len().min(StatusPayload::BYTES_MAX as usize)).unwrap_or_default();
        let work = match admit(&self.agreed, &export.offer(), request, small) {
            Ok(work) => work,
            Err(refusal) => {
                self.fail(request, refusal.errno, refusal.why);
                return Ok(());
            }
        };
        match work {
            Work::Read { whole } if request.length <= INLINE_BYTES => {
                let Some(device) = export.enter() else { return self.shut_out(request) };
                let mut room = self.output.read(self.agreed.replies, request);
                match device.read_now(request.offset, &mut [IoSliceMut::new(room.data())]) {
                    Ok(true) => room.keep(whole),
                    Ok(false) => {
                        room.give_back();
                        drop(device);
                        self.hand_on(request, request.length as usize, Job::Read { whole })?;
                    }
                    Err(error) => {
                        room.give_back();
                        self.fail_with(request, &error);
                    }
                }
                Ok(())
            }
            Work::Read { whole } => self.hand_on(request, request.length as usize, Job::Read { whole }),
            Work::Write { durable } => {
                let Some(device) = export.enter() else { return self.shut_out(request) };
                match device.write_now(request.offset, &[IoSlice::new(data)]) {
                    Ok(true) if !durable => self.done(request),
                    Ok(true) => {
                        drop(device);
                        return self.flush(request);
                    }
                    Ok(false) => {
                        let data = data.to_vec();
                        drop(device);
                        return self.hand_on(request, data.len(), Job::Write { data, durable });
                    }
                    Err(error) => self.fail_with(request, &error),
                }
                Ok(())
            }
            Work::Flush => self.flush(request),
            Work::Trim { durable } => self.zero(request, Job::Trim { durable }, durable),
            Work::Zero { as_data: false, durable } => {
                self.zero(request, Job::Zero { as_data: false, durable }, durable)
            }
            Work::Zero { as_data: true, durable } => {
                self.hand_on(request, job::PIECE_BYTES, Job::Zero { as_data: true, durable })
            }
            Work::Cache => self.hand_on(request, job::PIECE_BYTES, Job::Cache),
            Work::Status { length, one } => {
                self.hand_on(request, job::STATUS_BYTES, Job::Status { length, one })
            }
        }
    }

    /// Waits until the volume's limits let another request in.
    fn pace(&mut self, request: &Request) -> Result<()> {
        let moves = matches!(request.command, Command::Read | Command::Write);
        if !moves && !matches!(request.command, Command::Trim | Command::WriteZeroes) {
            return Ok(());
        }
        let export = self.export.clone();
        let pacer = export.slot.pacer();
        while let Some(wait) = pacer.wait() {
            // What was answered goes out first: the client may be waiting for it.
            self.collect()?;
            self.send()?;
            if export.is_stopping() {
                return Err(gone("the service ends"));
            }
            std::thread::sleep(wait.min(PACE_LOOK));
        }
        pacer.charge(if moves { request.length } else { 0 });
        Ok(())
    }

    /// The disk was not there for as long as a request waits.
    fn shut_out(&mut self, request: &Request) -> Result<()> {
        if self.export.is_stopping() {
            return Err(gone("the service ends"));
        }
        self.fail(request, Errno::Shutdown, job::NOT_SERVED);
        Ok(())
    }

    /// Whole blocks are trimmed or zeroed at once: that never waits for another host.
    fn zero(&mut self, request: &Request, job: Job, durable: bool) -> Result<()> {
        let block = u64::from(BLOCK_BYTES_PREFERRED);
        let whole = request.offset.is_multiple_of(block) && request.length.is_multiple_of(block);
        if durable || !whole || request.length > ZERO_NOW_BYTES {
            return self.hand_on(request, 0, job);
        }
        let export = self.export.clone();
        let Some(device) = export.enter() else { return self.shut_out(request) };
        let result = match job {
            Job::Trim { .. } => device.discard(request.offset, request.length),
            _ => device.write_zeroes(request.offset, request.length),
        };
        match result {
            Ok(()) => self.done(request),
            Err(error) => self.fail_with(request, &error),
        }
        Ok(())
    }

    /// Makes durable what was answered, and the request's own data.
    fn flush(&mut self, request: &Request) -> Result<()> {
        let export = self.export.clone();
        let followed = self.input.available().len() as u64 > request.payload_bytes(self.agreed.headers());
        if followed || self.waiting > 0 || self.company > 0 {
            self.company = self.company.saturating_sub(1);
            return self.hand_on(request, 0, Job::Flush);
        }
        // What was answered before goes out first.
        self.send()?;
        match export.enter_to_flush().map(|device| device.flush()) {
            Some(Ok(())) => self.done(request),
            Some(Err(error)) => self.fail_with(request, &error),
            // It is fenced, and nothing is left to make durable.
            None if export.slot.is_durable() => self.done(request),
            None => return self.shut_out(request),
        }
        self.look_for_company(request)
    }

    /// Finds out whether the client said something while this thread flushed.
    fn look_for_company(&mut self, request: &Request) -> Result<()> {
        // The request's own payload stays where it is until the request is done with.
        let kept = usize::try_from(request.payload_bytes(self.agreed.headers())).unwrap_or(usize::MAX);
        if kept >= INPUT_BYTES {
            return Ok(());
        }
        if let Received::Bytes(length) = self.line.receive(self.input.room(kept + 1), true)? {
            self.input.received(length);
            self.company = COMPANY;
        }
        Ok(())
    }

    /// Has something done that may wait; its answer comes through the mailbox. `bytes`: what it holds meanwhile.
    fn hand_on(&mut self, request: &Request, bytes: usize, job: Job) -> Result<()> {
        while self.waiting >= WAITING_MAX
            || (self.waiting > 0 && self.waiting_bytes + bytes > WAITING_BYTES_MAX)
        {
            // What was answered goes out first: the client may be waiting for it.
            self.collect()?;
            self.send()?;
            self.sleep(false);
            self.collect()?;
        }
        self.waiting += 1;
        self.waiting_bytes += bytes;
        let pool = if matches!(job, Job::Flush) { &self.flushers } else { &self.workers };
        let (export, mail) = (self.export.clone(), self.mail.clone());
        let (replies, request) = (self.agreed.replies, *request);
        pool.submit(move || {
            let outcome = job.run(&export, &mail, replies, &request);
            mail.post(Answer { outcome, bytes });
        });
        Ok(())
    }
}
