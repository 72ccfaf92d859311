//! The sending half of a connection of calls: urgent frames first, short ones together in one system call.

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::frame::Frame;
use crate::error::{Context, Result};

/// Stop gathering short frames beyond this many bytes.
const GATHER_BYTES: usize = 64 << 10;

/// Sends what arrives on the two queues until both are closed or the connection fails. `begin` is asked right
/// before a frame is written, and `false` drops it.
pub(super) async fn write_frames(
    mut io: impl AsyncWrite + Unpin,
    mut urgent: mpsc::Receiver<Frame>,
    mut normal: mpsc::Receiver<Frame>,
    begin: impl Fn(&Frame) -> bool,
) -> Result<()> {
    let mut staged = BytesMut::with_capacity(GATHER_BYTES);
    loop {
        let mut next = tokio::select! {
            biased;
            Some(frame) = urgent.recv() => Some(frame),
            frame = normal.recv() => match frame {
                Some(frame) => Some(frame),
                None => return Ok(()),
            },
        };
        while let Some(frame) = next {
            if begin(&frame) && frame.stage(&mut staged) {
                let mut both = staged.split().chain(frame.payload);
                io.write_all_buf(&mut both).await.context("send a frame")?;
            }
            let room = staged.len() < GATHER_BYTES;
            next = if room { urgent.try_recv().or_else(|_| normal.try_recv()).ok() } else { None };
        }
        if staged.has_remaining() {
            io.write_all(&staged).await.context("send frames")?;
            staged.clear();
        }
        io.flush().await.context("send frames")?;
    }
}
