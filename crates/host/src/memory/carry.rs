//! Carries bytes between a QEMU's socket and a link, both ways at once, encoded like pages.
//!
//! ```text
//!   QEMU ──► reader ──► encoder (blocking thread) ──► writer ──► link      outbound
//!   QEMU ◄── writer ◄── check, decode ◄──────────────────────── link      inbound
//! ```
//!
//! Invariants
//! * Bytes are handed on in order, none twice; the end of a direction is said (`BytesEnd`), so that a link that
//!   breaks is never taken for QEMU being done.
//! * At most [`QUEUE_CHUNKS`] pieces wait at each stage, so what QEMU measures as its link's rate is that of the
//!   link, give or take a few MiB.
//!
//! Not here: what the bytes mean, when QEMU sends (`stream`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use whimbrel_wire::peer::memory::{CHUNK_BYTES_MAX, Chunk, Control, Encoding, Kind, put_chunk};

use crate::codec::Decompressor;
use crate::codec::adaptive::{Adaptive, thread_cpu_s};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::frames::{read_body, read_header, write_control};
use crate::memory::limit::Limiter;
use crate::memory::pace::Pace;
use crate::memory::source::{joined, unexpected};

/// Pieces that may wait at each stage.
pub const QUEUE_CHUNKS: usize = 2;
/// The most bytes read from QEMU at once.
const READ_BYTES: usize = 256 << 10;
/// Shorter pieces are not worth compressing: commands, answers, ends.
const PACK_BYTES_MIN: usize = 4 << 10;

/// Bytes that passed, counted while they do.
#[derive(Debug, Default)]
pub struct Passed {
    /// Bytes of QEMU's own stream.
    pub raw_bytes: AtomicU64,
    /// Bytes on the link.
    pub wire_bytes: AtomicU64,
    /// Bytes per second that the link takes; 0 before it was measured.
    pub link_bytes_s: AtomicU64,
}

/// How bytes are carried.
#[derive(Clone, Debug)]
pub struct CarryOptions {
    /// The limit on bytes per second, outbound.
    pub limiter: Arc<Limiter>,
    /// How long the other side may take nothing.
    pub stall_limit: Duration,
    /// How long the link may be silent while QEMU waits.
    pub idle_limit: Duration,
}

/// Carries both directions until both have ended.
pub async fn carry<S: AsyncRead + AsyncWrite + Send>(
    qemu: tokio::net::UnixStream,
    link: S,
    options: &CarryOptions,
    passed: &Passed,
) -> Result<()> {
    let (mut from_qemu, mut to_qemu) = qemu.into_split();
    let (mut from_link, mut to_link) = tokio::io::split(link);
    let outbound = async {
        outbound(&mut from_qemu, &mut to_link, options, passed).await.context("carry QEMU's stream out")
    };
    let inbound =
        async { inbound(&mut from_link, &mut to_qemu, options).await.context("carry QEMU's stream in") };
    tokio::try_join!(outbound, inbound).map(|_| ())
}

async fn outbound(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    options: &CarryOptions,
    passed: &Passed,
) -> Result<()> {
    let mut pace = Pace::new(1, false);
    let chooser = pace.chooser();
    let (chunks, mut pieces) = mpsc::channel::<Vec<u8>>(QUEUE_CHUNKS);
    let (encoded, mut frames) = mpsc::channel::<(Vec<u8>, usize, f64)>(QUEUE_CHUNKS);
    let encoder = spawn_blocking(move || {
        let mut adaptive = Adaptive::new(chooser)?;
        let mut packed = vec![0; READ_BYTES];
        while let Some(raw) = pieces.blocking_recv() {
            let start_s = thread_cpu_s();
            let frame = encode(&raw, &mut adaptive, &mut packed)?;
            if encoded.blocking_send((frame, raw.len(), thread_cpu_s() - start_s)).is_err() {
                break;
            }
        }
        Ok::<_, Error>(())
    });
    let read = async {
        loop {
            // Not zeroed first: as much as QEMU has at hand is appended.
            let mut chunk = Vec::with_capacity(READ_BYTES);
            let got = from.read_buf(&mut chunk).await.context("read from QEMU")?;
            // A closed channel means that the encoder or the writer failed, and says so itself.
            if got == 0 || chunks.send(chunk).await.is_err() {
                drop(chunks);
                return Ok::<_, Error>(());
            }
        }
    };
    let write = async {
        while let Some((frame, raw_bytes, cpu_s)) = frames.recv().await {
            options.limiter.pass(frame.len()).await;
            let start = Instant::now();
            let write = async {
                to.write_all(&frame).await?;
                to.flush().await
            };
            timeout(options.stall_limit, write)
                .await
                .map_err(|_| Error::new(ErrorKind::TimedOut, "the other host takes nothing"))?
                .context("write to the other host")?;
            pace.wrote(frame.len(), start.elapsed(), cpu_s);
            passed.raw_bytes.fetch_add(raw_bytes as u64, Ordering::Relaxed);
            passed.wire_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
            passed.link_bytes_s.store(pace.link_bytes_s(), Ordering::Relaxed);
        }
        Ok::<_, Error>(())
    };
    tokio::try_join!(read, write)?;
    joined(encoder.await)?;
    write_control(to, &Control::BytesEnd, 0, options.stall_limit).await
}

fn encode(raw: &[u8], adaptive: &mut Adaptive, packed: &mut [u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::with_capacity(raw.len() + 64);
    if raw.len() >= PACK_BYTES_MIN
        && let Some(length) = adaptive.pack(raw.len(), raw, packed)?.length
        && let Some(payload) = packed.get(..length)
    {
        put_chunk(&mut frame, Encoding::Zstd, raw, payload);
    } else {
        put_chunk(&mut frame, Encoding::Raw, raw, raw);
    }
    Ok(frame)
}

async fn inbound(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    options: &CarryOptions,
) -> Result<()> {
    let mut decompressor = Decompressor::new()?;
    let (mut body, mut raw) = (Vec::new(), vec![0; CHUNK_BYTES_MAX]);
    loop {
        let header = read_header(from, options.idle_limit).await?;
        let len = read_body(from, &header, &mut body, options.stall_limit).await?;
        let body = body.get(..len).unwrap_or(&[]);
        if header.kind == Kind::Control {
            return match Control::parse(&header, body)? {
                Control::BytesEnd => {
                    // QEMU may be gone already: it closes its socket when it has what it needs.
                    let _ = to.shutdown().await;
                    Ok(())
                }
                Control::Refused { error } => Err(error.into()),
                other => Err(unexpected(&other)),
            };
        }
        let chunk = Chunk::parse(&header, body)?;
        let decoded = match chunk.encoding {
            Encoding::Zstd => {
                let raw = raw.get_mut(..chunk.raw_bytes).unwrap_or(&mut []);
                decompressor.decompress(chunk.payload, raw)?;
                &*raw
            }
            // The parser lets nothing through but raw bytes.
            _ => chunk.payload,
        };
        chunk.verify(decoded)?;
        timeout(options.stall_limit, to.write_all(decoded))
            .await
            .map_err(|_| Error::new(ErrorKind::TimedOut, "QEMU takes nothing"))?
            .context("write to QEMU")?;
    }
}
