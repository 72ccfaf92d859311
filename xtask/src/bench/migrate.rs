//! `bench migrate`: QEMU's own ways to move a VM, and ours, on the same guest, workload and link.
//!
//! ```text
//!   for each cell (workload × link), for each run:
//!     QEMU's VM boots on h1, moves to and fro: precopy, multifd, multifd+zstd, each with TLS (plain shown beside)
//!     our VM boots on h1, moves to h2
//! ```
//!
//! Rules: the target process is started beforehand on QEMU's side, so our step that starts it (`prepare`) is taken out
//! of our total, and shown; total is from the command to the first beat at the target; downtime is the longest silence of the beat less its period; bytes
//! are what both hosts' interfaces sent; the downtime limit is 100 ms for all; a move over 60 s did not finish.
//!
//! Not here: the hosts and links (`lab.rs`), our VM (`flight.rs`).

mod cell;
mod peer;
mod report;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Options, Side};
use crate::install::{self, Purpose};
use crate::lab::{self, Lab};
use crate::qemu::{self, Version};
use crate::{check, guest};
use cell::Cell;
use peer::{Method, Peer};
use report::{Run, Table};

/// A move that took longer did not finish.
const FINISH_LIMIT: Duration = Duration::from_secs(60);
/// For all.
const DOWNTIME_LIMIT_MS: u64 = 100;
const MEMORY_MIB: u64 = 1024;
const IMAGE: &str = "tiny:bench";

/// Runs the bench; inside and outside of the lab.
pub fn run(options: &Options) -> Result<()> {
    let cells = cell::choose(&options.cells)?;
    if !lab::inside() {
        install::ensure(&[Purpose::Build, Purpose::Run, Purpose::BenchMigrate], options.no_install)?;
        let program = if options.has(Side::Ours) { check::build(true)? } else { "none".into() };
        let qemu = qemu::ensure(Version::V10_0)?;
        let prepared = [
            ("WHIMBREL_BENCH_PROGRAM", program),
            ("WHIMBREL_BENCH_QEMU", qemu.bin),
            ("WHIMBREL_BENCH_DISK", guest::tiny()?.disk),
        ];
        return lab::enter(&prepared);
    }
    lab::enter(&[])?;
    let bin = lab::prepared("WHIMBREL_BENCH_QEMU")?;
    let qemu = qemu::Qemu { version: qemu::version_of(&bin)?, bin };
    let image = guest::Image { disk: lab::prepared("WHIMBREL_BENCH_DISK")?, ..guest::boot_files() };
    let lab = Lab::new("bench", 2, &qemu, &image)?;
    if options.has(Side::Ours) {
        lab.start_cluster(&lab::prepared("WHIMBREL_BENCH_PROGRAM")?)?;
        let (source, target) = lab.pair();
        source.publish(&lab.image.disk, IMAGE)?;
        target.whimbrel(&["image", "prefetch", IMAGE])?;
    }
    let mut table = Table::default();
    let rounds = if options.quick { 3 } else { 5 };
    for cell in &cells {
        lab.shape(cell.link)?;
        for round in 0..rounds {
            if options.has(Side::Peers) {
                peers(&lab, cell, round, &mut table)
                    .with_context(|| format!("QEMU's own, cell {}", cell.name))?;
            }
            if options.has(Side::Ours) {
                ours(&lab, cell, round, &mut table)
                    .with_context(|| format!("Whimbrel, cell {}", cell.name))?;
            }
        }
        table.print_cell(cell);
    }
    if options.has(Side::Ours) && cells.iter().any(|c| c.name == "mixed_1g") {
        cold(&lab, &cells, rounds, &mut table)?;
    }
    table.print_closing(&cells)
}

/// One boot of QEMU's VM, and a move by every method that still takes part.
fn peers(lab: &Lab, cell: &Cell, round: usize, table: &mut Table) -> Result<()> {
    let mut peer = Peer::boot(lab, cell)?;
    for method in Method::all() {
        // Plain ones are shown beside, not compared with: two runs are enough. What did not finish runs once.
        if (!method.tls && round >= 2) || table.unfinished(cell, &method.name()) {
            continue;
        }
        match peer.migrate(method)? {
            Some(run) => table.add(cell, &method.name(), run),
            None => {
                table.add_unfinished(cell, &method.name());
                // The guest stayed where it was, its target is gone: go on with a fresh one. The image has one writer.
                drop(peer);
                peer = Peer::boot(lab, cell)?;
            }
        }
    }
    peer.must_be_whole()
}

/// One boot of our VM and a move.
fn ours(lab: &Lab, cell: &Cell, round: usize, table: &mut Table) -> Result<()> {
    if table.unfinished(cell, report::OURS) {
        return Ok(());
    }
    let name = format!("{}-{round}", cell.name.replace('_', "-"));
    let run = our_move(lab, cell, &name, IMAGE)?;
    table.errors += run.errors;
    if run.total_s > FINISH_LIMIT.as_secs_f64() {
        table.add_unfinished(cell, report::OURS);
    } else {
        table.add(cell, report::OURS, run);
    }
    Ok(())
}

fn our_move(lab: &Lab, cell: &Cell, name: &str, image: &str) -> Result<Run> {
    let (source, target) = lab.pair();
    let mut flight = crate::flight::Flight::start(lab, 0, name, image, MEMORY_MIB, 1, &cell.workload())?;
    std::thread::sleep(cell::SETTLE);
    let pids: Vec<u32> = lab.hosts().iter().filter_map(lab::Host::agent_pid).collect();
    let cpu = |pids: &[u32]| pids.iter().map(|p| crate::cpu::overhead_s(*p)).sum::<f64>();
    let (cpu_before, back_before) = (cpu(&pids), lab.bytes_out(target)?);
    let limit = format!("{DOWNTIME_LIMIT_MS}ms");
    let moved = flight.migrate(1, &["--downtime-limit", &limit])?;
    let target_qemu = lab::qemu_pid(name)?;
    let cpu_s = cpu(&pids) - cpu_before + crate::cpu::overhead_s(target_qemu);
    let errors = flight.verify()?;
    if errors > 0 {
        eprintln!("{name}: {errors} integrity errors, at {}", source.name());
    }
    flight.stop()?;
    let prepare_ms = moved.task.pointer("/figures/prepare_ms").and_then(serde_json::Value::as_f64);
    let start_s = prepare_ms.context("find the time of step prepare in the task")? / 1e3;
    if std::env::var_os("WHIMBREL_BENCH_TASKS").is_some() {
        eprintln!("{name}: {}", moved.task);
    }
    Ok(Run {
        total_s: moved.total.as_secs_f64() - start_s,
        start_s,
        downtime_ms: moved.beat.downtime_ms(),
        bytes: (moved.interface_bytes + lab.bytes_out(target)? - back_before) as f64,
        cpu_s,
        errors,
    })
}

/// `mixed_1g` once more, with a target that holds nothing of the image.
fn cold(lab: &Lab, cells: &[Cell], rounds: usize, table: &mut Table) -> Result<()> {
    let Some(cell) = cells.iter().find(|c| c.name == "mixed_1g") else { return Ok(()) };
    lab.shape(cell.link)?;
    let (source, _) = lab.pair();
    for round in 0..rounds.min(3) {
        // A fresh image each time: different bytes, so that nothing of it is cached anywhere else.
        let file = lab.dir().join(format!("cold-{round}.raw"));
        crate::cmd::run(crate::cmd::cmd("cp", &["--sparse=always"]).arg(&lab.image.disk).arg(&file))?;
        salt(&file, round)?;
        let name = format!("tiny:cold-{round}");
        source.publish(&file, &name)?;
        std::fs::remove_file(&file).context("remove the copy")?;
        let run = our_move(lab, cell, &format!("cold-{round}"), &name)?;
        table.errors += run.errors;
        table.cold_total_s.push(run.total_s);
    }
    if table.cold_total_s.is_empty() {
        bail!("the cold cell did not run");
    }
    Ok(())
}

/// Makes a copy of an image differ, in a superblock field that only people read (the volume's name).
fn salt(file: &std::path::Path, round: usize) -> Result<()> {
    let label = format!("cold{round}");
    let tune = crate::cmd::find_program("tune2fs").context("find tune2fs of e2fsprogs")?;
    crate::cmd::run(
        crate::cmd::cmd(tune, &["-L", &label, "-U", "random"]).arg(file).stdout(std::process::Stdio::null()),
    )
}
