//! Data streams beside memory: layers, and what ends the copy.
//!
//! ```text
//! migrate.layer   source: length u32 LE, form u8, chunk … │ 0, ShipSeal JSON      target: 0 = durable │ length, error JSON
//!                   form 0: a piece of the log; 1: its length u32 LE, one zstd frame
//!   on demand     source: length u32 LE, PullHead JSON, pieces of the map … │ 0         target: likewise
//! migrate.state   source: length u32 LE, StateHead JSON, device state             target: likewise
//! ```
//!
//! Invariants: every length is checked before memory is taken for it; a target answers only after what it answers
//! for is durable.

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use whimbrel_wire::WireError;

use crate::codec::Decompressor;
use crate::codec::adaptive::{self, Adaptive};
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

/// A chunk of a layer's log as it travels: its form, then what the form says.
#[derive(Debug)]
pub struct Chunk(Vec<u8>);

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;
/// Form and decoded length.
const ZSTD_HEAD_BYTES: usize = 5;
impl Chunk {
    /// Compresses a piece of a log if that pays; gives the processor time that was taken, seconds, too. Works for
    /// milliseconds.
    pub fn pack(log: &[u8], adaptive: &mut Adaptive) -> Result<(Self, f64)> {
        let mut bytes = vec![0; ZSTD_HEAD_BYTES + adaptive::room(log.len())];
        let packed = adaptive.pack(log.len(), log, bytes.get_mut(ZSTD_HEAD_BYTES..).unwrap_or_default())?;
        let Some(length) = packed.length else { return Ok((Self([&[PLAIN], log].concat()), packed.cpu_s)) };
        bytes.truncate(ZSTD_HEAD_BYTES + length);
        let raw_bytes = u32::try_from(log.len()).unwrap_or(u32::MAX).to_le_bytes();
        let head = std::iter::once(ZSTD).chain(raw_bytes);
        bytes.iter_mut().zip(head).for_each(|(byte, head)| *byte = head);
        Ok((Self(bytes), packed.cpu_s))
    }

    /// A chunk as it came.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The piece of the log; fails with kind `Corrupt`. Works for milliseconds.
    pub fn unpack(&self) -> Result<Cow<'_, [u8]>> {
        let bad = |what: &str| Error::new(ErrorKind::Corrupt, format!("receive a piece of a layer: {what}"));
        match self.0.split_first() {
            Some((&PLAIN, log)) => Ok(Cow::Borrowed(log)),
            Some((&ZSTD, rest)) => {
                let (length, packed) = rest.split_first_chunk().ok_or_else(|| bad("it has no length"))?;
                let length = u32::from_le_bytes(*length) as usize;
                if length > PIECE_MAX_BYTES {
                    return Err(bad(&format!("{length} bytes are too many")));
                }
                let mut log = vec![0; length];
                Decompressor::new()?.decompress(packed, &mut log)?;
                Ok(Cow::Owned(log))
            }
            _ => Err(bad("its form is not known")),
        }
    }

    /// The bytes that travel.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
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
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_chunk_comes_back_and_foreign_ones_fail(
            log in prop::collection::vec(any::<u8>(), 0..6000), zeros in 0usize..20_000, foreign in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let log = [log, vec![0; zeros]].concat();
            let chooser = crate::memory::pace::Pace::new(1, false).chooser();
            let (chunk, _) = Chunk::pack(&log, &mut Adaptive::new(chooser).unwrap()).unwrap();
            prop_assert!(chunk.bytes().len() <= log.len() + 1);
            prop_assert!(zeros < 10_000 || chunk.bytes().len() < log.len() - zeros / 2);
            let came = Chunk::new(chunk.bytes().to_vec());
            prop_assert_eq!(came.unpack().unwrap(), log);
            for form in [PLAIN, ZSTD, 2] {
                let _ = Chunk::new([&[form], &foreign[..]].concat()).unpack();
            }
        }
    }

    #[test]
    fn a_chunk_may_not_say_that_it_is_larger_than_a_piece() {
        let bytes = [&[ZSTD], &u32::MAX.to_le_bytes()[..], b"x"].concat();
        let error = Chunk::new(bytes).unpack().unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("too many"), "{error}");
    }

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
