//! `cargo xtask demo`: an image published, a real VM booted from it on one host, moved live to another.
//!
//! ```text
//!   packages, build, images, QEMU ─▶ two hosts ─▶ publish ─▶ boot on h1 ─▶ migrate to h2 ─▶ verify ─▶ table, JSON
//! ```
//!
//! Invariant: every figure is measured in this run; the program that runs is the one people install, over its
//! command line.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::check;
use crate::flight::Flight;
use crate::guest::{self, Image};
use crate::install::{self, Purpose};
use crate::lab::{self, Host, Lab};
use crate::qemu::{self, Version};
use crate::tcp::Client;

/// What to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// One JSON object as the last line.
    pub json: bool,
    /// The caller's own disk image instead of ours.
    pub image: Option<PathBuf>,
    /// Leave both hosts up.
    pub keep: bool,
    /// Never install packages.
    pub no_install: bool,
    /// The QEMU version; the newest one that is to be had otherwise.
    pub qemu: Option<Version>,
}

const MEMORY_MIB: u64 = 512;
const VCPUS: u32 = 2;
/// Memory written at 50 MiB/s, half of it random; the disk fsynced 100 times a second.
const WORKLOAD: &str = "wg.mem_mib=160 wg.mem_rate=50 wg.disk=/data/records wg.disk_rate=100";
const VM: &str = "web-1";
/// A foreign image gets this long to boot, since it has no way to say that it did.
const FOREIGN_BOOT: Duration = Duration::from_secs(25);

/// What was seen.
struct Outcome {
    mode: String,
    boot: Option<Duration>,
    total: Duration,
    downtime_ms: f64,
    gap_ms: Option<f64>,
    wire_bytes: u64,
    integrity_errors: u64,
    tcp_survived: Option<bool>,
}

/// Runs the demo; inside and outside of the lab.
pub fn run(options: &Options) -> Result<()> {
    if !lab::inside() {
        install::ensure(&[Purpose::Build, Purpose::Run], options.no_install)?;
        install::ensure_namespaces()?;
        eprintln!("building");
        let prepared = [
            ("WHIMBREL_DEMO_PROGRAM", check::build(true)?),
            ("WHIMBREL_DEMO_QEMU", choose_qemu(options)?.bin),
            ("WHIMBREL_DEMO_DISK", own_image()?.disk),
        ];
        return lab::enter(&prepared);
    }
    lab::enter(&[])?;
    let outcome = show(options)?;
    print(&outcome, options);
    if options.keep {
        explain_keep(options.json)?;
    }
    if outcome.integrity_errors > 0 || outcome.tcp_survived == Some(false) {
        bail!("the VM arrived damaged");
    }
    Ok(())
}

fn choose_qemu(options: &Options) -> Result<qemu::Qemu> {
    match options.qemu {
        Some(version) => qemu::ensure(version),
        None => qemu::ensure(Version::V10_0).or_else(|e| {
            eprintln!("QEMU 10.0 is not to be had ({e:#}); taking 7.2");
            qemu::ensure(Version::V7_2)
        }),
    }
}

fn own_image() -> Result<Image> {
    if install::is_root() {
        return guest::debian();
    }
    eprintln!(
        "not root: showing the small image instead of Debian's, which takes root to make; the hosts are in a user \
         namespace, where guests run as its only user"
    );
    guest::tiny()
}

fn show(options: &Options) -> Result<Outcome> {
    let program = lab::prepared("WHIMBREL_DEMO_PROGRAM")?;
    let bin = lab::prepared("WHIMBREL_DEMO_QEMU")?;
    let qemu = qemu::Qemu { version: qemu::version_of(&bin)?, bin };
    let image = Image { disk: lab::prepared("WHIMBREL_DEMO_DISK")?, ..guest::boot_files() };
    let lab = Lab::new("demo", 2, &qemu, &image)?;
    eprintln!(
        "two hosts, demo-h1 and demo-h2, QEMU {}, kernel {}",
        qemu.version.name(),
        check::kernel_release()?
    );
    lab.start_cluster(&program)?;
    let outcome = match &options.image {
        Some(file) => foreign(&lab, file)?,
        None => ours(&lab)?,
    };
    if options.keep {
        // Its hosts are to stay: nothing of it is taken down until the process ends.
        std::mem::forget(lab);
    }
    Ok(outcome)
}

fn ours(lab: &Lab) -> Result<Outcome> {
    let (source, target) = lab.pair();
    eprintln!("publishing {}", lab.image.disk.display());
    source.publish(&lab.image.disk, "debian:demo")?;
    eprintln!("booting {VM} from it on {}", source.name());
    let mut flight = Flight::start(lab, 0, VM, "debian:demo", MEMORY_MIB, VCPUS, WORKLOAD)?;
    let mut client = flight.address.as_deref().map(Client::connect);
    if client.is_none() {
        eprintln!(
            "this user may not open /dev/net/tun: the guest has no interface, so no TCP connection is shown"
        );
    }
    eprintln!("up after {:.1} s; moving it to {}", flight.boot.as_secs_f64(), target.name());
    std::thread::sleep(Duration::from_secs(2));
    let mode = mode_of(source)?;
    let moved = flight.migrate(1, &["--downtime-limit", "100ms"])?;
    eprintln!("it runs on {}; verifying every page and record", target.name());
    let integrity_errors = flight.verify()?;
    let running = target.whimbrel(&["vm", "show", VM])?;
    if running["host"] != target.name() {
        bail!("vm {VM} is said to be on {}, not on {}", running["host"], target.name());
    }
    Ok(Outcome {
        mode,
        boot: Some(flight.boot),
        total: moved.total,
        downtime_ms: moved.figure("downtime_ms").unwrap_or_else(|| moved.beat.downtime_ms()),
        gap_ms: Some(moved.beat.longest_gap_ms),
        wire_bytes: moved.task["wire_bytes"].as_u64().unwrap_or(moved.interface_bytes),
        integrity_errors,
        tcp_survived: client
            .as_mut()
            .map(|client| client.as_mut().is_ok_and(|client| client.echo("still there?").is_ok())),
    })
}

/// An image of the caller's: nothing of ours runs in it, so RAM is hashed at the pause on both sides, and the disk
/// is checked at the target.
fn foreign(lab: &Lab, file: &Path) -> Result<Outcome> {
    let (source, target) = lab.pair();
    let file = file.canonicalize().with_context(|| format!("find the image {}", file.display()))?;
    eprintln!("publishing {}", file.display());
    let format = match file.extension().and_then(|e| e.to_str()) {
        Some("qcow2") => "qcow2",
        Some("vhdx") => "vhdx",
        Some("vmdk") => "vmdk",
        _ => "raw",
    };
    source.whimbrel(&[
        "image",
        "publish",
        &file.to_string_lossy(),
        "--format",
        format,
        "--name",
        "own:demo",
    ])?;
    source.whimbrel(&["volume", "create", VM, "--image", "own:demo"])?;
    eprintln!("starting it on {}, and giving it {} s to boot", source.name(), FOREIGN_BOOT.as_secs());
    let (memory, vcpus) = (format!("{}M", 2 * MEMORY_MIB), VCPUS.to_string());
    source.whimbrel(&[
        "vm", "run", VM, "--volume", VM, "--memory", &memory, "--vcpus", &vcpus, "--accel", "tcg",
    ])?;
    std::thread::sleep(FOREIGN_BOOT);
    let mode = mode_of(source)?;
    let started = Instant::now();
    let task = source.whimbrel(&["vm", "migrate", VM, "--to", target.name(), "--verify"])?;
    let total = started.elapsed();
    target.whimbrel(&["vm", "stop", VM, "--force"])?;
    let check = target.whimbrel(&["volume", "check", VM])?;
    let problems = check["problems"].as_array().map_or(0, Vec::len) as u64;
    Ok(Outcome {
        mode,
        boot: None,
        total,
        downtime_ms: task["downtime_ms"].as_f64().context("read the task's downtime")?,
        gap_ms: None,
        wire_bytes: task["wire_bytes"].as_u64().context("read the task's bytes")?,
        // A RAM hash that differs fails the move itself.
        integrity_errors: problems,
        tcp_survived: None,
    })
}

fn mode_of(host: &Host) -> Result<String> {
    let vm = host.whimbrel(&["vm", "show", VM])?;
    if let Some(reasons) = vm["mode_reasons"].as_array().filter(|r| !r.is_empty()) {
        eprintln!("mode A is not possible here: {}", Value::from(reasons.clone()));
    }
    vm["mode"].as_str().map(str::to_uppercase).context("read the VM's mode")
}

fn print(o: &Outcome, options: &Options) {
    let bytes = MEMORY_MIB << 20;
    let or_none = |v: Option<String>| v.unwrap_or_else(|| "-".to_owned());
    let rows = [
        (
            "memory moved",
            format!("mode {} ({})", o.mode, if o.mode == "A" { "by the agents" } else { "QEMU's stream" }),
        ),
        ("boot to first beat", or_none(o.boot.map(|b| format!("{:.1} s", b.as_secs_f64())))),
        ("move, command to beat", format!("{:.2} s", o.total.as_secs_f64())),
        ("downtime", format!("{:.1} ms", o.downtime_ms)),
        ("longest silence outside", or_none(o.gap_ms.map(|g| format!("{g:.1} ms")))),
        ("memory", mib(bytes)),
        ("on the wire", mib(o.wire_bytes)),
        ("integrity errors", o.integrity_errors.to_string()),
        ("TCP connection", or_none(o.tcp_survived.map(|s| if s { "survived" } else { "LOST" }.to_owned()))),
    ];
    println!();
    for (what, value) in rows {
        println!("  {what:<24} {value}");
    }
    println!();
    if options.json {
        println!(
            "{}",
            json!({
                "ok": o.integrity_errors == 0 && o.tcp_survived != Some(false),
                "mode": o.mode,
                "boot_s": o.boot.map(|b| b.as_secs_f64()),
                "migrate_total_s": o.total.as_secs_f64(),
                "downtime_ms": o.downtime_ms,
                "guest_gap_ms": o.gap_ms,
                "wire_bytes": o.wire_bytes,
                "memory_bytes": if options.image.is_some() { 2 * bytes } else { bytes },
                "integrity_errors": o.integrity_errors,
                "tcp_survived": o.tcp_survived,
            })
        );
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn explain_keep(json: bool) -> Result<()> {
    let dir = lab::own_directory()?;
    let text = format!(
        "Both hosts stay up. From another shell:\n  nsenter --target PID --mount --net --pid    with PID as printed below, \
         plus one\n  {0} --socket {1}/demo/h1/run/agent.sock vm list\n  {0} --socket {1}/demo/h2/run/agent.sock vm \
         migrate {VM} --to demo-h1",
        lab::prepared("WHIMBREL_DEMO_PROGRAM")?.display(),
        dir.display(),
    );
    if json {
        eprintln!("{text}");
    } else {
        println!("{text}");
    }
    lab::keep_running(0)
}
