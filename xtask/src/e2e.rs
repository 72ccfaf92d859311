//! End-to-end scenarios on real agents and real QEMU, emulated so that any machine can run them.
//!
//! ```text
//!   cargo xtask e2e --qemu 7.2 [SCENARIO…] ─▶ one lab of three hosts ─▶ each scenario: its own VM, its own verdict
//! ```
//!
//! Invariants: a scenario talks to the product as people do, over the command line; it fails with the ends of the
//! logs that explain it; hosts are left as they were found.
//!
//! Not here: measuring speed (`bench/`), the simulator's far larger number of faults (`crates/sim`).

mod adopt;
mod capture;
mod cold_block;
mod errors;
mod files;
mod formats;
mod iotests;
mod kill;
mod live;
mod memory;
mod nbd;
mod no_space;
mod on_demand;
mod resize;
mod scenario;
mod shorter;
mod snapshots;
mod swarm;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::lab::{self, Lab};
use crate::qemu::{self, Version};
use crate::{check, guest};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// QEMU version.
    pub qemu: Version,
    /// The product's program; built if not given.
    pub program: Option<PathBuf>,
    /// Only scenarios whose name contains one of these.
    pub only: Vec<String>,
    /// None whose name contains one of these.
    pub without: Vec<String>,
    /// More rounds.
    pub long: bool,
}

/// What a scenario may use.
pub struct Context<'a> {
    /// Three hosts in one cluster, the tiny image published as `tiny:e2e`.
    pub lab: &'a Lab,
    /// The product's program.
    pub program: &'a Path,
    /// QEMU of another version, if it is to be had.
    pub other_qemu: Option<qemu::Qemu>,
    /// Program of the object store that some scenarios read from.
    pub s3s_fs: PathBuf,
    /// More rounds.
    pub long: bool,
}

/// A name and what it does.
pub type Scenario = (&'static str, fn(&Context<'_>) -> Result<()>);

pub use scenario::ANY_VERSION;

/// The published image's name.
pub const IMAGE: &str = "tiny:e2e";

/// Runs the scenarios; inside and outside of the lab.
pub fn run(options: &Options) -> Result<()> {
    let chosen = choose(options)?;
    if !lab::inside() {
        let program = match &options.program {
            // Scenarios start it from directories of their own.
            Some(p) => std::path::absolute(p).context("find the program")?,
            None => check::build(false)?,
        };
        let image = guest::tiny()?;
        let all = qemu::ensure_all()?;
        let other = all.iter().find(|q| q.version != options.qemu).map(|q| q.bin.clone());
        let qemu = qemu::ensure(options.qemu)?;
        if chosen.iter().any(|(name, _)| *name == iotests::NAME) {
            iotests::fetch(&qemu)?;
        }
        let prepared = [
            ("WHIMBREL_E2E_PROGRAM", program),
            ("WHIMBREL_E2E_QEMU", qemu.bin),
            ("WHIMBREL_E2E_DISK", image.disk),
            ("WHIMBREL_E2E_S3S_FS", check::tool("s3s-fs")?),
            ("WHIMBREL_E2E_OTHER_QEMU", other.unwrap_or_default()),
        ];
        return lab::enter(&prepared);
    }
    lab::enter(&[])?;
    let program = lab::prepared("WHIMBREL_E2E_PROGRAM")?;
    let qemu = qemu::Qemu { version: options.qemu, bin: lab::prepared("WHIMBREL_E2E_QEMU")? };
    let image = guest::Image { disk: lab::prepared("WHIMBREL_E2E_DISK")?, ..guest::boot_files() };
    // The kill tests want a host that keeps the metadata and takes no part in moves.
    let lab = Lab::new("e2e", 3, &qemu, &image)?;
    lab.start_cluster(&program)?;
    lab.hosts().first().context("a lab has hosts")?.publish(&lab.image.disk, IMAGE)?;
    let s3s_fs = lab::prepared("WHIMBREL_E2E_S3S_FS")?;
    let other = lab::prepared("WHIMBREL_E2E_OTHER_QEMU")?;
    let other_qemu = if other.as_os_str().is_empty() {
        None
    } else {
        Some(qemu::Qemu { version: qemu::version_of(&other)?, bin: other })
    };
    let context = Context { lab: &lab, program: &program, other_qemu, s3s_fs, long: options.long };
    let mut failed = Vec::new();
    for (name, scenario) in &chosen {
        let started = Instant::now();
        let outcome = scenario(&context);
        let took = started.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("ok     {took:>6.1} s  {name}"),
            Err(e) => {
                println!("FAILED {took:>6.1} s  {name}: {e:#}");
                for host in lab.hosts() {
                    eprintln!("── {} says last:\n{}", host.name(), host.log_tail());
                }
                failed.push(*name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("{} of {} scenarios failed: {}", failed.len(), chosen.len(), failed.join(", "));
    }
    println!("all {} scenarios passed on QEMU {}", chosen.len(), options.qemu.name());
    Ok(())
}

/// The scenarios that the caller asked for.
fn choose(options: &Options) -> Result<Vec<Scenario>> {
    let chosen: Vec<Scenario> = scenario::ALL
        .into_iter()
        .filter(|(name, _)| options.only.is_empty() || options.only.iter().any(|o| name.contains(o.as_str())))
        .filter(|(name, _)| !options.without.iter().any(|o| name.contains(o.as_str())))
        .collect();
    if chosen.is_empty() {
        bail!("no scenario's name contains {:?}", options.only);
    }
    Ok(chosen)
}
