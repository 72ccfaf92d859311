//! Frames over any byte stream: see `wire::peer` for their form.
//!
//! Invariant: lengths are checked before anything is allocated.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use whimbrel_wire::WireError;
use whimbrel_wire::peer::{FrameHeader, FrameKind, HEADER_LEN, JSON_MAX, PAYLOAD_MAX};

use crate::error::{Context, Error, ErrorKind, Result};

/// A frame in memory.
#[derive(Debug)]
pub(crate) struct Frame {
    pub kind: FrameKind,
    pub request: u32,
    pub json: Bytes,
    pub payload: Bytes,
}

impl Frame {
    /// A frame, if its parts are not too long.
    pub fn new(kind: FrameKind, request: u32, json: impl Into<Bytes>, payload: Bytes) -> Result<Self> {
        let json = json.into();
        if json.len() > JSON_MAX || payload.len() > PAYLOAD_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "send a frame of {} bytes of JSON and {} of payload: at most {JSON_MAX} and {PAYLOAD_MAX} fit",
                    json.len(),
                    payload.len()
                ),
            ));
        }
        Ok(Self { kind, request, json, payload })
    }

    /// A frame without payload from what is known to be short.
    pub fn bare(kind: FrameKind, request: u32) -> Self {
        Self { kind, request, json: Bytes::new(), payload: Bytes::new() }
    }

    /// The frame that reports `error`; a text too long for a frame is cut.
    pub fn failed(request: u32, error: &Error) -> Self {
        let mut wire = error.to_wire();
        if wire.message.len() > 8_192 {
            wire.message = wire.message.chars().take(2_000).collect::<String>() + "…";
        }
        // A WireError is plain text and an enum: it can always be written.
        let json = serde_json::to_vec(&wire).unwrap_or_default();
        Self { kind: FrameKind::Failed, request, json: json.into(), payload: Bytes::new() }
    }

    /// The frame's JSON as a `T`.
    pub fn parse<T: DeserializeOwned>(&self, what: &str) -> Result<T> {
        serde_json::from_slice(&self.json)
            .map_err(|error| Error::with_source(ErrorKind::InvalidInput, format!("read {what}"), error))
    }

    /// The error that a `Failed` frame reports.
    pub fn error(&self) -> Error {
        match serde_json::from_slice::<WireError>(&self.json) {
            Ok(error) => error.into(),
            Err(_) => Error::new(ErrorKind::Internal, "the peer reported an error that cannot be read"),
        }
    }

    fn header(&self) -> [u8; HEADER_LEN] {
        #[expect(clippy::cast_possible_truncation, reason = "checked in new()")]
        let (json_len, payload_len) = (self.json.len() as u32, self.payload.len() as u32);
        FrameHeader { json_len, payload_len, request: self.request, kind: self.kind }.encode()
    }

    /// Appends header and JSON, and the payload too if it is short; returns whether a payload is still to be sent.
    pub fn stage(&self, into: &mut BytesMut) -> bool {
        into.put_slice(&self.header());
        into.put_slice(&self.json);
        let short = self.payload.len() <= STAGE_PAYLOAD_MAX;
        if short {
            into.put_slice(&self.payload);
        }
        !short
    }
}

/// Payloads up to this length are copied together with their header: a copy costs less than a system call.
const STAGE_PAYLOAD_MAX: usize = 16 << 10;

/// Writes a value as JSON.
pub(crate) fn to_json(value: &impl Serialize, what: &str) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, format!("write {what} as JSON"), error))
}

/// TLS alerts arrive as damaged data: give them the kind that they mean.
pub(crate) fn io_error(error: std::io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        return Error::with_source(ErrorKind::Denied, "check certificates", error)
            .hint("both hosts need certificates of the same cluster that have not ended or been revoked");
    }
    Error::with_source(crate::error::kind_of_io(&error), "exchange bytes", error)
}

/// Writes one frame and flushes it.
pub(crate) async fn write_frame(io: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> Result<()> {
    let mut staged = BytesMut::with_capacity(HEADER_LEN + frame.json.len());
    let more = frame.stage(&mut staged);
    io.write_all(&staged).await.map_err(io_error).context("send a frame")?;
    if more {
        io.write_all(&frame.payload).await.map_err(io_error).context("send a frame")?;
    }
    io.flush().await.map_err(io_error).context("send a frame")
}

/// Reads one frame; `None` if the peer closed the connection between frames.
pub(crate) async fn read_frame(io: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>> {
    let mut header = [0; HEADER_LEN];
    let first = io.read(&mut header).await.map_err(io_error).context("read a frame")?;
    if first == 0 {
        return Ok(None);
    }
    let rest = header.get_mut(first..).unwrap_or_default();
    io.read_exact(rest).await.map_err(io_error).context("read a frame")?;
    let header = FrameHeader::decode(&header)?;
    let json = read_bytes(io, header.json_len as usize).await?;
    let payload = read_bytes(io, header.payload_len as usize).await?;
    Ok(Some(Frame { kind: header.kind, request: header.request, json, payload }))
}

/// Reads exactly `length` bytes, which the caller has checked against a limit.
async fn read_bytes(io: &mut (impl AsyncRead + Unpin), length: usize) -> Result<Bytes> {
    if length == 0 {
        return Ok(Bytes::new());
    }
    let mut bytes = BytesMut::with_capacity(length);
    let mut limited = (&mut bytes).limit(length);
    while limited.has_remaining_mut() {
        if io.read_buf(&mut limited).await.map_err(io_error).context("read a frame")? == 0 {
            return Err(Error::new(ErrorKind::Unavailable, "read a frame: the connection ended inside it"));
        }
    }
    Ok(bytes.freeze())
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use futures_util::FutureExt as _;
    use whimbrel_wire::peer::{CallHead, Hello, Welcome};

    whimbrel_fuzz::fuzz! {
        /// A connection's bytes: frames, and what they carry.
        fn connection(bytes) seeds [{
            let mut staged = BytesMut::new();
            let json = to_json(&Hello { versions: vec![1], program: String::new(), open: None }, "a hello");
            let hello = Frame::new(FrameKind::Hello, 0, json.unwrap_or_default(), Bytes::from_static(b"payload"));
            hello.expect("a short frame").stage(&mut staged);
            Frame::bare(FrameKind::Ping, 3).stage(&mut staged);
            staged
        }] {
            let mut io = bytes;
            while let Ok(Some(frame)) = read_frame(&mut io).now_or_never().expect("bytes in memory do not wait") {
                let _ = (frame.parse::<Hello>(""), frame.parse::<Welcome>(""), frame.parse::<CallHead>(""));
                let _ = frame.error();
            }
        }
    }
}
