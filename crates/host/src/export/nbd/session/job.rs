//! What is done by a connection's pools: requests that may wait for other hosts, stores, flushes, or take long.
//!
//! Invariant: long work enters the disk anew for every piece, so that a fence waits for one piece only, and ends when
//! its connection or the service does.

use std::io::{IoSlice, IoSliceMut};

use whimbrel_wire::nbd::{Errno, Head, Replies, Request, Run, STATE_HOLE, STATE_ZERO, reply};

use super::buffer::Output;
use crate::block_dev::{BlockDev, BlockRead};
use crate::error::{Error, ErrorKind, Result};
use crate::export::nbd::Export;
use crate::export::nbd::mailbox::{Mailbox, Outcome};
use crate::export::slot::Entered;

/// Unit of long work, bytes.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Most that one cache request fetches: the client only hopes.
const CACHE_BYTES_MAX: u64 = 1 << 30;
/// Runs of one answer to block status.
const RUNS_MAX: usize = 4096;
/// What such an answer takes, bytes.
pub(super) const STATUS_BYTES: usize = RUNS_MAX * 40;

/// What a client is told when the disk is with nobody, or with another host, for too long.
pub(super) const NOT_SERVED: &str = "the disk is not served here now";

/// One request's work.
pub(super) enum Job {
    Read { whole: bool },
    Write { data: Vec<u8>, durable: bool },
    Flush,
    Trim { durable: bool },
    Zero { as_data: bool, durable: bool },
    Cache,
    Status { length: u64, one: bool },
}

/// Why a job has no good answer.
enum Failure {
    Disk(Error),
    /// The disk is not served.
    Absent,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// The error number for what went wrong, and words for people.
pub(super) fn complain(error: &Error) -> (Errno, String) {
    tracing::debug!(%error, "an NBD request failed");
    let errno = match error.kind() {
        ErrorKind::NoSpace => Errno::NoSpace,
        ErrorKind::InvalidInput => Errno::Inval,
        ErrorKind::Refused => Errno::Perm,
        _ => Errno::Io,
    };
    (errno, error.to_string())
}

impl Job {
    /// Does it, waiting as long as it takes, and makes the answer.
    pub(super) fn run(self, export: &Export, mail: &Mailbox, replies: Replies, request: &Request) -> Outcome {
        let (offset, length) = (request.offset, request.length);
        let enter = || export.enter().ok_or(Failure::Absent);
        let result = match self {
            Self::Read { whole } => read(export, replies, request, whole),
            Self::Write { data, durable } => enter().and_then(|device| {
                device.write(offset, &[IoSlice::new(&data)])?;
                settle(&device, durable)
            }),
            Self::Flush => match export.enter_to_flush() {
                Some(device) => settle(&device, true),
                // It is fenced, and nothing is left to make durable.
                None if export.slot.is_durable() => Ok(None),
                None => Err(Failure::Absent),
            },
            Self::Trim { durable } => enter().and_then(|device| {
                device.discard(offset, length)?;
                settle(&device, durable)
            }),
            Self::Zero { as_data: false, durable } => enter().and_then(|device| {
                device.write_zeroes(offset, length)?;
                settle(&device, durable)
            }),
            Self::Zero { as_data: true, durable } => write_zeros(export, mail, offset, length)
                .and_then(|()| if durable { settle(&enter()?, true) } else { Ok(None) }),
            Self::Cache => cache(export, mail, offset, length),
            Self::Status { length, one } => status(export, replies, request, length, one),
        };
        match result {
            Ok(Some(reply)) => Outcome::Reply(reply),
            Ok(None) => Outcome::Reply(Head::done(replies, request).to_vec()),
            Err(Failure::Absent) if export.is_stopping() => Outcome::Close,
            Err(Failure::Absent) => {
                Outcome::Reply(reply::error(replies, request, Errno::Shutdown, NOT_SERVED))
            }
            Err(Failure::Disk(error)) => {
                let (errno, why) = complain(&error);
                Outcome::Reply(reply::error(replies, request, errno, &why))
            }
        }
    }
}

/// `None`: the plain answer.
type Done = Result<Option<Vec<u8>>, Failure>;

fn settle(device: &Entered<'_>, durable: bool) -> Done {
    if durable {
        device.flush()?;
    }
    Ok(None)
}

fn read(export: &Export, replies: Replies, request: &Request, whole: bool) -> Done {
    let device = export.reader().ok_or(Failure::Absent)?;
    let mut output = Output::default();
    let mut room = output.read(replies, request);
    device.read(request.offset, &mut [IoSliceMut::new(room.data())])?;
    room.keep(whole);
    Ok(Some(output.into_bytes()))
}

/// The pieces of a range.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = offset.saturating_add(length);
    (offset..end).step_by(PIECE_BYTES).map(move |at| (at, (end - at).min(PIECE_BYTES as u64) as usize))
}

fn write_zeros(export: &Export, mail: &Mailbox, offset: u64, length: u64) -> Result<(), Failure> {
    let zeros = vec![0; PIECE_BYTES.min(usize::try_from(length).unwrap_or(PIECE_BYTES))];
    for (at, part) in pieces(offset, length) {
        if mail.is_closed() || export.is_stopping() {
            return Err(Failure::Absent);
        }
        let device = export.enter().ok_or(Failure::Absent)?;
        device.write(at, &[IoSlice::new(zeros.get(..part).unwrap_or_default())])?;
    }
    Ok(())
}

/// Has the disk fetch a range that will be read soon.
fn cache(export: &Export, mail: &Mailbox, offset: u64, length: u64) -> Done {
    let mut scratch = vec![0; PIECE_BYTES.min(usize::try_from(length).unwrap_or(PIECE_BYTES))];
    for (at, part) in pieces(offset, length.min(CACHE_BYTES_MAX)) {
        if mail.is_closed() || export.is_stopping() {
            break;
        }
        let device = export.reader().ok_or(Failure::Absent)?;
        device.read(at, &mut [IoSliceMut::new(scratch.get_mut(..part).unwrap_or_default())])?;
    }
    Ok(None)
}

fn status(export: &Export, replies: Replies, request: &Request, length: u64, one: bool) -> Done {
    let device: std::sync::Arc<dyn BlockDev> = export.reader().ok_or(Failure::Absent)?;
    let runs = runs(&*device, request.offset, length, if one { 1 } else { RUNS_MAX })?;
    Ok(Some(reply::status(replies, request, &runs)))
}

/// The runs of a range, `limit` at most.
fn runs(device: &dyn BlockDev, offset: u64, length: u64, limit: usize) -> Result<Vec<Run>> {
    let end = offset + length;
    let mut runs: Vec<Run> = Vec::new();
    let mut at = offset;
    while at < end {
        let extent = BlockRead::extent(device, at)?;
        let length = extent.length.clamp(1, end - at);
        let state = if extent.data { 0 } else { STATE_HOLE | STATE_ZERO };
        let full = runs.len() == limit;
        match runs.last_mut() {
            Some(last) if last.state == state => last.length += length,
            _ if full => break,
            _ => runs.push(Run { length, state }),
        }
        at += length;
    }
    Ok(runs)
}
