//! `bench block`: a volume served by us, and what serves disks elsewhere, under the same load on the same processor.
//!
//! ```text
//!   read   4k depth 1 · 4k depth 32 · 128k depth 8     our layer over a raw base │ qemu-storage-daemon, raw file
//!   write  4k depth 32, a flush after every 64         our layer, fresh          │ qcow2 overlay, fresh
//!   flush  4k over NBD, a flush after every write      our layer, fresh          │ qcow2 overlay, fresh
//!   nbd    4k depth 32 reads                           our layer                 │ nbdkit file
//!   crash  kill -9, serve again, count what a completed flush had promised and is not there
//! ```
//!
//! Rules: the driver is libblkio's over vhost-user (fio over NBD), it flushes if the device says that it needs it;
//! servers and clients share one processor, which is printed; the base is read right before every timed run; arms
//! take turns; writes are counted, not timed, each on a fresh overlay; the first run of an arm is thrown away; a
//! ratio is against the better of the peer's ways. In the write cells flushes are sent to qemu-storage-daemon
//! although it says that it needs none: without them it would be compared while it promises less.
//!
//! Not here: the load itself (`crates/host/examples/drive_block.rs`).

mod crash;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;

use super::{Options, median};
use crate::cmd::{capture, cmd, run as run_command};
use crate::install::{self, Purpose};
use crate::paths;
use crate::qemu::{self, Qemu, Version};
use server::{Aio, Overlay, Server};

const BASE_BYTES: u64 = 1 << 30;
/// Seconds of a timed read run.
const READ_SECONDS: &str = "1";

/// What every arm needs to know.
struct Bench {
    dir: PathBuf,
    base: PathBuf,
    qemu: Qemu,
    examples: PathBuf,
    /// Timed runs of an arm, after the one that is thrown away.
    runs: usize,
    quick: bool,
}

/// Runs the bench.
pub fn run(options: &Options) -> Result<()> {
    install::ensure(&[Purpose::Build, Purpose::BenchBlock], options.no_install)?;
    let mut build =
        cmd(env!("CARGO"), &["build", "--quiet", "--release", "--package", "whimbrel-host", "--examples"]);
    run_command(build.current_dir(paths::workspace()))?;
    let qemu = qemu::ensure(Version::V10_0)?;
    let dir = paths::target().join("bench-block");
    if dir.exists() {
        fs::remove_dir_all(&dir).context("remove what an earlier bench left")?;
    }
    fs::create_dir_all(&dir)?;
    let bench = Bench {
        base: make_base(&dir)?,
        dir,
        qemu,
        examples: paths::target().join("release/examples"),
        runs: if options.quick { 3 } else { 5 },
        quick: options.quick,
    };
    let cpu = pin()?;
    println!(
        "servers and clients share processor {cpu}; rates in thousands per second, medians of {}",
        bench.runs
    );
    let mut figures = BTreeMap::new();
    bench.reads(&mut figures)?;
    bench.writes(&mut figures)?;
    bench.flushed_writes(&mut figures)?;
    bench.nbd_reads(&mut figures)?;
    crash::measure(&bench, &mut figures)?;
    fs::remove_dir_all(&bench.dir).context("remove the bench's files")?;
    super::print_figures("block", &figures)
}

/// Moves this process, and with it all that it starts, to the last processor it may use.
fn pin() -> Result<usize> {
    let allowed = sched_getaffinity(None).context("ask for the processors")?;
    let cpu = (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu)).context("find a processor")?;
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one).context("stay on one processor")?;
    Ok(cpu)
}

/// A file without holes that does not compress.
fn make_base(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("base.raw");
    let mut file = fs::File::create(&path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = Vec::with_capacity(1 << 20);
    for _ in 0..BASE_BYTES >> 20 {
        chunk.clear();
        while chunk.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend(state.to_le_bytes());
        }
        file.write_all(&chunk).context("write the base")?;
    }
    file.sync_all().context("write the base")?;
    Ok(path)
}

/// A field of the JSON that a program printed last.
fn field(text: &str, pointer: &str) -> Result<f64> {
    let start = text.find('{').context("find JSON in what the client printed")?;
    let json: Value = serde_json::from_str(&text[start..]).context("read what the client printed")?;
    json.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("find {pointer} in {json}"))
}

/// Rates of the arms of one cell, run by run.
struct Cell {
    name: &'static str,
    rates: Vec<(String, Vec<f64>)>,
}

impl Cell {
    fn new(name: &'static str) -> Self {
        Self { name, rates: Vec::new() }
    }

    /// Adds a run; the first one of an arm does not count.
    fn add(&mut self, arm: &str, rate: f64) {
        match self.rates.iter_mut().find(|(name, _)| name == arm) {
            Some((_, rates)) => rates.push(rate),
            None => self.rates.push((arm.to_owned(), Vec::new())),
        }
    }

    /// Prints the cell; the ratio of our median to the best of the others'.
    fn close(&self) -> f64 {
        let mut best = f64::NAN;
        let mut ours = f64::NAN;
        for (arm, rates) in &self.rates {
            let middle = median(rates);
            let (low, high) = rates.iter().fold((f64::MAX, 0.0_f64), |(l, h), r| (l.min(*r), h.max(*r)));
            println!(
                "{:<24} {arm:<34} {:>9.2}   ({:.2} to {:.2})",
                self.name,
                middle / 1e3,
                low / 1e3,
                high / 1e3
            );
            if arm == OURS {
                ours = middle;
            } else if !arm.starts_with(BESIDE) {
                best = best.max(middle);
            }
        }
        println!("{:<24} whimbrel / best = {:.2}", self.name, ours / best);
        ours / best
    }
}

const OURS: &str = "whimbrel";
/// An arm that is shown and not compared with.
const BESIDE: &str = "beside: ";

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Reads the base, so that every arm finds it in the page cache.
    fn warm(&self) -> Result<()> {
        let mut file = fs::File::open(&self.base)?;
        let mut chunk = vec![0; 1 << 20];
        while file.read(&mut chunk).context("read the base")? > 0 {}
        Ok(())
    }

    /// Runs the vhost-user client and returns its rate.
    fn drive(&self, server: &Server, args: &[&str]) -> Result<f64> {
        let socket = server.socket.to_string_lossy();
        let mut all = args.to_vec();
        all.extend(["--socket", &socket]);
        field(&capture(&mut cmd(self.examples.join("drive_block"), &all))?, "/rate")
    }

    /// Runs fio over NBD and returns its rate of `kind` requests.
    fn fio(&self, uri: &str, kind: &str, args: &[&str]) -> Result<f64> {
        let uri = format!("--uri={uri}");
        let mut all = vec!["--name=bench", "--ioengine=nbd", "--output-format=json", "--bs=4k", &uri];
        all.extend(args);
        field(&capture(&mut cmd("fio", &all))?, &format!("/jobs/0/{kind}/iops"))
    }

    fn reads(&self, figures: &mut BTreeMap<String, f64>) -> Result<()> {
        let ours = Server::ours(self, "ours-read", false)?;
        let peers = Aio::ALL.map(|aio| {
            Server::qsd_raw(self, aio).map(|server| (format!("qemu-storage-daemon {aio}"), server))
        });
        let peers = peers.into_iter().collect::<Result<Vec<_>>>()?;
        let cells =
            [("read_4k_qd1", "4096", "1"), ("read_4k_qd32", "4096", "32"), ("read_128k", "131072", "8")];
        for (name, block, depth) in cells {
            let mut cell = Cell::new(name);
            let args = ["read", "--block", block, "--depth", depth, "--seconds", READ_SECONDS];
            for _ in 0..=self.runs {
                self.warm()?;
                cell.add(OURS, self.drive(&ours, &args)?);
                for (arm, server) in &peers {
                    self.warm()?;
                    cell.add(arm, self.drive(server, &args)?);
                }
            }
            figures.insert(format!("{name}_vs_qsd"), cell.close());
        }
        Ok(())
    }

    fn writes(&self, figures: &mut BTreeMap<String, f64>) -> Result<()> {
        let mut cell = Cell::new("write_4k_qd32");
        let count = if self.quick { "4096" } else { "8192" };
        let args = ["write", "--depth", "32", "--count", count, "--flush-every", "64", "--flush-always", "1"];
        for _ in 0..=self.runs {
            self.warm()?;
            let server = Server::ours(self, "ours-write", false)?;
            cell.add(OURS, self.drive(&server, &args)?);
            drop(server);
            for (overlay, aio) in Overlay::with_every_aio() {
                self.warm()?;
                let server = Server::qsd_overlay(self, overlay, aio, false)?;
                cell.add(&format!("qemu-storage-daemon {overlay} {aio}"), self.drive(&server, &args)?);
            }
        }
        figures.insert("write_4k_qd32_vs_qsd_qcow2".into(), cell.close());
        Ok(())
    }

    fn flushed_writes(&self, figures: &mut BTreeMap<String, f64>) -> Result<()> {
        let mut cell = Cell::new("flush_write_4k");
        let count = if self.quick { 500 } else { 1000 };
        let ios = format!("--number_ios={count}");
        let args = ["--rw=randwrite", "--iodepth=1", "--fsync=1", "--size=1g", &ios];
        let vhost_args =
            ["write", "--depth", "1", "--count", &count.to_string(), "--flush-every", "1"].map(str::to_owned);
        let vhost_args = vhost_args.each_ref().map(String::as_str);
        for _ in 0..=self.runs {
            self.warm()?;
            let server = Server::ours(self, "ours-flush", true)?;
            cell.add(OURS, self.fio(&server.nbd_uri(), "write", &args)?);
            cell.add(&format!("{BESIDE}whimbrel vhost-user"), self.drive(&server, &vhost_args)?);
            drop(server);
            for (overlay, aio) in Overlay::with_every_aio() {
                self.warm()?;
                let server = Server::qsd_overlay(self, overlay, aio, true)?;
                let rate = self.fio(&server.nbd_uri(), "write", &args)?;
                cell.add(&format!("qemu-storage-daemon nbd {overlay} {aio}"), rate);
            }
        }
        figures.insert("flush_write_4k_vs_qsd_nbd".into(), cell.close());
        Ok(())
    }

    fn nbd_reads(&self, figures: &mut BTreeMap<String, f64>) -> Result<()> {
        let mut cell = Cell::new("nbd_read_4k_qd32");
        let ours = Server::ours(self, "ours-nbd", true)?;
        let nbdkit = Server::nbdkit(self)?;
        let runtime = format!("--runtime={READ_SECONDS}");
        let args = ["--rw=randread", "--iodepth=32", "--time_based", "--size=1g", &runtime];
        for _ in 0..=self.runs {
            for (arm, server) in [(OURS, &ours), ("nbdkit file", &nbdkit)] {
                self.warm()?;
                cell.add(arm, self.fio(&server.nbd_uri(), "read", &args)?);
            }
        }
        figures.insert("nbd_read_4k_qd32_vs_nbdkit".into(), cell.close());
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_first_run_of_an_arm_does_not_count_and_the_best_peer_does() {
        let mut cell = Cell::new("test");
        for rate in [1.0, 300.0, 100.0, 200.0] {
            cell.add(OURS, rate);
        }
        for (arm, rate) in [("slow", 100.0), ("fast", 400.0), ("beside: x", 9000.0)] {
            for _ in 0..4 {
                cell.add(arm, rate);
            }
        }
        assert!((cell.close() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn figures_are_found_behind_what_a_program_says_first() {
        assert!(
            (field("fio: note\n{\"jobs\":[{\"read\":{\"iops\":12.5}}]}", "/jobs/0/read/iops").unwrap()
                - 12.5)
                .abs()
                < 1e-9
        );
        assert!(field("{}", "/rate").is_err());
    }
}
