//! What a completed flush promised and `kill -9` took away.
//!
//! The client writes numbered blocks and flushes if the device says that it needs flushes; what was answered before
//! the last completed flush (before the last answer, for a device that needs none) must be there when the disk is
//! served again.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::server::{Aio, Overlay, Server};
use super::{Bench, field};
use crate::cmd::{capture, cmd, dying_with_us, line};

/// Blocks written where the server is killed after the client has finished.
const FINISHED_BLOCKS: u64 = 500;
/// Blocks that no client finishes before the server is killed.
const ENDLESS_BLOCKS: u64 = 200_000;

/// Counts lost blocks: ours in several kills, qemu-storage-daemon's in one.
pub(super) fn measure(bench: &Bench, figures: &mut BTreeMap<String, f64>) -> Result<()> {
    let kills = if bench.quick { 8 } else { 200 };
    let (mut lost, mut promised) = (0, 0);
    for kill in 0..kills {
        let mut server = Server::ours(bench, "ours-crash", false)?;
        // The first after the last flush, as the peer's; the others in the middle of writing.
        let durable = if kill == 0 {
            promise(bench, &mut server, FINISHED_BLOCKS, None)?
        } else {
            let after = Duration::from_millis(30 + kill * 170 % 700);
            promise(bench, &mut server, ENDLESS_BLOCKS, Some(after))?
        };
        drop(server);
        let server = Server::ours_again(bench, "ours-crash", false)?;
        lost += missing(bench, &server, durable)?;
        promised += durable;
    }
    if promised < FINISHED_BLOCKS + kills {
        bail!(
            "only {promised} blocks were flushed in {kills} runs: the kills came too early to show anything"
        );
    }
    println!("{:<24} {lost} of {promised} flushed blocks lost in {kills} kills", "crash");
    figures.insert("crash_lost_flushes".into(), lost as f64);

    let mut server = Server::qsd_overlay(bench, Overlay::Clusters4k, Aio::Threads, false)?;
    let durable = promise(bench, &mut server, FINISHED_BLOCKS, None)?;
    drop(server);
    let server = Server::qsd_overlay_again(bench, Aio::Threads, false)?;
    let lost = missing(bench, &server, durable)?;
    println!("{:<24} {lost} of {durable} blocks lost that qemu-storage-daemon said need no flush", "crash");
    figures.insert("qsd_crash_lost_flushes".into(), lost as f64);
    Ok(())
}

/// Has the client write, kills the server (after a time, or when the client is done), and returns how many blocks
/// were promised.
fn promise(bench: &Bench, server: &mut Server, count: u64, kill_after: Option<Duration>) -> Result<u64> {
    let mut command = dying_with_us(bench.examples.join("drive_block"), &["crash", "--flush-every", "16"]);
    command.args(["--count", &count.to_string(), "--socket"]).arg(&server.socket).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", line(&command)))?;
    let mut output = BufReader::new(child.stdout.take().context("read what the client says")?);
    let mut said = String::new();
    output.read_line(&mut said).context("wait for the client to begin")?;
    if let Some(after) = kill_after {
        std::thread::sleep(after);
        server.kill();
    }
    output.read_to_string(&mut said).context("read what the client says")?;
    let status = child.wait()?;
    server.kill();
    if !status.success() {
        bail!("{} ended with {status}", line(&command));
    }
    Ok(field(&said, "/durable")? as u64)
}

fn missing(bench: &Bench, server: &Server, count: u64) -> Result<u64> {
    let socket = server.socket.to_string_lossy();
    let args = ["verify", "--count", &count.to_string(), "--socket", &socket];
    Ok(field(&capture(&mut cmd(bench.examples.join("drive_block"), &args))?, "/lost")? as u64)
}
