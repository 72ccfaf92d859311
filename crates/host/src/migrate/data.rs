//! Data streams beside memory: layers, and what ends the copy.
//!
//! ```text
//! migrate.layer   source: length u32 LE, chunk … │ 0, ship position (52 bytes)    target: 0 = durable │ length, error JSON
//!   on demand     source: length u32 LE, PullHead JSON, pieces of the map … │ 0         target: likewise
//! migrate.state   source: length u32 LE, StateHead JSON, device state             target: likewise
//! ```
//!
//! Invariants: every length is checked before memory is taken for it; a target answers only after what it answers
//! for is durable.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use whimbrel_wire::WireError;

use crate::error::{Context as _, Error, ErrorKind, Result};

/// Services of the streams.
pub mod service {
    /// Mode A: pages.
    pub const MEMORY: &str = "migrate.memory";
    /// One volume's layer.
    pub const LAYER: &str = "migrate.layer";
    /// What ends the copy.
    pub const STATE: &str = "migrate.state";
    /// Mode B: QEMU's own stream.
    pub const QEMU: &str = "migrate.qemu";
}

/// The longest piece of anything but device state, bytes.
pub const PIECE_MAX_BYTES: usize = 16 << 20;

/// Writes a piece with its length before it.
pub async fn write_piece(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| {
        Error::new(ErrorKind::InvalidInput, format!("send {} bytes in one piece", bytes.len()))
    })?;
    stream.write_all(&length.to_le_bytes()).await.context("send on a data stream")?;
    stream.write_all(bytes).await.context("send on a data stream")?;
    Ok(())
}

/// Reads a piece into `into`; false if it is empty.
pub async fn read_piece(stream: &mut (impl AsyncRead + Unpin), into: &mut Vec<u8>) -> Result<bool> {
    let length = stream.read_u32_le().await.context("receive on a data stream")? as usize;
    if length > PIECE_MAX_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("receive a piece of {length} bytes: too long"),
        ));
    }
    into.resize(length, 0);
    stream.read_exact(into).await.context("receive on a data stream")?;
    Ok(length > 0)
}

/// Writes a value as a piece of JSON.
pub async fn write_json(stream: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write a message", error))?;
    write_piece(stream, &bytes).await?;
    stream.flush().await.context("send on a data stream")
}

/// Reads a piece of JSON.
pub async fn read_json<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> Result<T> {
    let mut bytes = Vec::new();
    read_piece(stream, &mut bytes).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read a message", error))
}

/// Says how it went.
pub async fn write_result(stream: &mut (impl AsyncWrite + Unpin), result: &Result<()>) -> Result<()> {
    let error: Option<WireError> = result.as_ref().err().map(Error::to_wire);
    write_json(stream, &error).await
}

/// Hears how it went.
pub async fn read_result(stream: &mut (impl AsyncRead + Unpin)) -> Result<()> {
    match read_json::<Option<WireError>>(stream).await? {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn pieces_and_results_arrive_and_long_ones_are_refused() {
        let (mut a, mut b) = tokio::io::duplex(1 << 16);
        write_piece(&mut a, b"chunk").await.unwrap();
        write_piece(&mut a, b"").await.unwrap();
        write_result(&mut a, &Err(Error::new(ErrorKind::NoSpace, "write layer"))).await.unwrap();
        write_result(&mut a, &Ok(())).await.unwrap();
        a.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        let mut piece = Vec::new();
        assert!(read_piece(&mut b, &mut piece).await.unwrap());
        assert_eq!(piece, b"chunk");
        assert!(!read_piece(&mut b, &mut piece).await.unwrap());
        assert_eq!(read_result(&mut b).await.unwrap_err().kind(), ErrorKind::NoSpace);
        read_result(&mut b).await.unwrap();
        assert!(read_piece(&mut b, &mut piece).await.is_err());
    }
}
