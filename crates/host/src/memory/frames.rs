//! Reading and writing frames of the page stream, each wait limited.
//!
//! Not here: what frames mean (`wire::peer::memory`), order (`source`, `target`).

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use whimbrel_wire::peer::memory::{Control, Header, Kind};

use crate::error::{Context, Error, ErrorKind, Result};

/// Writes a control message and everything before it.
pub async fn write_control(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &Control,
    round: u32,
    limit: Duration,
) -> Result<()> {
    let mut bytes = Vec::new();
    message.put(&mut bytes, round)?;
    let write = async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    };
    timeout(limit, write)
        .await
        .map_err(|_| Error::new(ErrorKind::TimedOut, "write page stream: the other host takes nothing"))?
        .context("write page stream")
}

/// Reads a header; nothing is read beyond it.
pub async fn read_header(stream: &mut (impl AsyncRead + Unpin), limit: Duration) -> Result<Header> {
    let mut bytes = [0; Header::LENGTH];
    timeout(limit, stream.read_exact(&mut bytes))
        .await
        .map_err(|_| Error::new(ErrorKind::TimedOut, "read page stream: the other host is silent"))?
        .context("read page stream")?;
    Ok(Header::parse(&bytes)?)
}

/// Reads a body into `buffer`, which grows if it must; returns its length.
pub async fn read_body(
    stream: &mut (impl AsyncRead + Unpin),
    header: &Header,
    buffer: &mut Vec<u8>,
    limit: Duration,
) -> Result<usize> {
    if buffer.len() < header.body_len {
        buffer.resize(header.body_len, 0);
    }
    let body = buffer.get_mut(..header.body_len).unwrap_or(&mut []);
    timeout(limit, stream.read_exact(body))
        .await
        .map_err(|_| Error::new(ErrorKind::TimedOut, "read page stream: the other host is silent"))?
        .context("read page stream")?;
    Ok(header.body_len)
}

/// Reads a control message; `Refused` becomes the error it carries.
pub async fn read_control(stream: &mut (impl AsyncRead + Unpin), limit: Duration) -> Result<Control> {
    let header = read_header(stream, limit).await?;
    if header.kind != Kind::Control {
        return Err(Error::new(ErrorKind::Corrupt, "read page stream: pages where a message was due"));
    }
    let mut body = Vec::new();
    read_body(stream, &header, &mut body, limit).await?;
    match Control::parse(&header, &body)? {
        Control::Refused { error } => Err(error.into()),
        message => Ok(message),
    }
}
