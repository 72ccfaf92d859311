//! Eight hosts boot from one image at once, and the store hands out about what one host alone would have read.
//!
//! ```text
//!   image: the tiny system + 48 MiB that do not compress, read by every guest while it boots
//!   one host, own cluster ──boots──▶ bytes out of the store: ALONE
//!   eight hosts, own cluster, the same image, caches empty ──boot at once──▶ TOGETHER ≤ 1.1 × ALONE
//! ```
//!
//! The hosts have network and mount namespaces of their own, and no path in common: the store is S3 behind a proxy that
//! counts what leaves it, headers and repeated requests included. The agents' own counters must agree with that count.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use crate::beat::Receiver;
use crate::cmd::{capture, cmd, find_program, tail};
use crate::flight::console;
use crate::lab::{Host, Lab, S3, VmArgs};

const HOSTS: usize = 8;
const MEMORY_MIB: u64 = 96;
/// What guests read beside their system.
const DATA_MIB: u64 = 48;
const IMAGE: &str = "swarm:e2e";
/// From the command to the beats of all guests; eight emulated at once on two cores take their time.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// Blocks that were asked for ahead of a guest arrive after its beat.
const SETTLE: Duration = Duration::from_secs(2);
/// What the issue allows.
const RATIO_MAX: f64 = 1.1;
/// An answer's headers beside the block it carries.
const HEADERS_SHARE: f64 = 0.05;

/// What came of one boot.
struct Boots {
    /// Bytes that left the store, as the proxy counts them.
    store_bytes: u64,
    /// The same, as the agents count them: objects without headers.
    told_bytes: f64,
    /// From the commands to the first and to the last guest's beat.
    beats: (Duration, Duration),
    /// From the commands until all were carried out.
    commands: Duration,
    /// Per host, what its guest got: (store, peers, cache) as `image show` tells.
    read: Vec<(u64, u64, u64)>,
}

/// See the module's charter.
pub fn store_is_read_once(c: &Context<'_>) -> Result<()> {
    let work = c.lab.dir().join("swarm");
    fs::create_dir_all(&work).context("make the scenario's directory")?;
    let s3 = S3::start(&c.s3s_fs, &work.join("s3"))?;
    let alone = on_hosts(c, &s3, "alone", 1).context("one host")?;
    let together = on_hosts(c, &s3, "swarm", HOSTS).context("eight hosts")?;
    let ratio = together.store_bytes as f64 / alone.store_bytes as f64;
    println!(
        "       out of the store: one host {:.1} MiB, {HOSTS} hosts {:.1} MiB: {ratio:.3}; first and last beat after \
         {:.1} and {:.1} s, started within {:.1} s",
        mib(alone.store_bytes),
        mib(together.store_bytes),
        together.beats.0.as_secs_f64(),
        together.beats.1.as_secs_f64(),
        together.commands.as_secs_f64(),
    );
    for (n, (seed, peer, cache)) in together.read.iter().enumerate() {
        println!(
            "       h{}: {:.1} MiB from the store, {:.1} from peers, {:.1} from its cache",
            n + 1,
            mib(*seed),
            mib(*peer),
            mib(*cache)
        );
    }
    let least = DATA_MIB << 20;
    ensure!(
        alone.store_bytes >= least,
        "one host read {} bytes, its guest {least} at least",
        alone.store_bytes
    );
    for (n, (seed, peer, _)) in together.read.iter().enumerate() {
        ensure!(
            seed + peer >= least,
            "host {} fetched {} bytes, its guest read {least} at least",
            n + 1,
            seed + peer
        );
    }
    for boots in [&alone, &together] {
        let (counted, told) = (boots.store_bytes as f64, boots.told_bytes);
        ensure!(
            told <= counted && counted <= told * (1.0 + HEADERS_SHARE),
            "the agents count {told} bytes out of the store, the proxy {counted}"
        );
    }
    ensure!(ratio <= RATIO_MAX, "the store gave {ratio:.3} × what one host reads, {RATIO_MAX} is the limit");
    fs::remove_dir_all(&work).context("remove the scenario's directory")
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Boots a guest on each of `count` fresh hosts at once.
fn on_hosts(c: &Context<'_>, s3: &S3, name: &str, count: usize) -> Result<Boots> {
    let lab = Lab::new(name, count, &c.lab.qemu, &c.lab.image)?;
    lab.hide_hosts_from_each_other()?;
    lab.start_cluster_with(c.program, s3.url(), &S3::ENV)?;
    let first = lab.hosts().first().context("a lab has hosts")?;
    let source = make_image(&lab.image.disk, first.dir())?;
    first.publish(&source, IMAGE)?;
    fs::remove_file(&source).context("remove the published file")?;
    let (before, told_before) = (s3.sent_bytes(), told(&lab)?);
    let started = Instant::now();
    // Names are the cluster's, so each host has its own.
    let names: Vec<String> = (1..=count).map(|n| format!("boot-{n}")).collect();
    let receivers: Vec<Receiver> =
        lab.hosts().iter().zip(&names).map(|(h, n)| Receiver::on(&[h.vm_sockets(n).beat])).collect();
    at_once(lab.hosts(), |n| ["volume", "create", &names[n], "--image", IMAGE].map(str::to_owned).to_vec())?;
    at_once(lab.hosts(), |n| {
        let name = names[n].as_str();
        let workload = "wg.mem_mib=0 boot.read=/swarm.bin";
        VmArgs { name, volumes: &[name], memory_mib: MEMORY_MIB, vcpus: 1, workload, net: false }
            .words(&lab.image)
    })?;
    let commands = started.elapsed();
    let beats = wait_for_beats(&lab, &names, &receivers, started)?;
    std::thread::sleep(SETTLE);
    let mut read = Vec::new();
    for (host, name) in lab.hosts().iter().zip(&names) {
        let shown = host.whimbrel(&["image", "show", IMAGE])?;
        let of =
            |source: &str| shown["read_bytes"][source].as_u64().with_context(|| format!("read {source}"));
        read.push((of("seed")?, of("peer")?, of("cache")?));
        host.whimbrel(&["vm", "stop", name, "--force"])?;
    }
    Ok(Boots {
        store_bytes: s3.sent_bytes() - before,
        told_bytes: told(&lab)? - told_before,
        beats,
        commands,
        read,
    })
}

/// The agents' own count of what they got from the store.
fn told(lab: &Lab) -> Result<f64> {
    lab.hosts().iter().map(|h| h.metric("whimbrel_image_store_read_bytes_total")).sum()
}

/// The tiny system with a large file in it; the same bytes each time.
fn make_image(tiny: &Path, dir: &Path) -> Result<PathBuf> {
    let (data, disk) = (dir.join("swarm.bin"), dir.join("swarm.raw"));
    let mut random = blake3::Hasher::new_derive_key("whimbrel e2e swarm").finalize_xof();
    let mut file = fs::File::create(&data).context("make the large file")?;
    let mut part = vec![0; 1 << 20];
    for _ in 0..DATA_MIB {
        random.fill(&mut part);
        file.write_all(&part).context("write the large file")?;
    }
    capture(cmd("cp", &["--sparse=always"]).arg(tiny).arg(&disk))?;
    let debugfs = find_program("debugfs").context("find debugfs: install the package e2fsprogs")?;
    let write = format!("write {} /swarm.bin", data.display());
    capture(cmd(debugfs, &["-w", "-R", &write]).arg(&disk))?;
    fs::remove_file(&data).context("remove the large file")?;
    Ok(disk)
}

/// Carries out a command on every host at the same time.
fn at_once(hosts: &[Host], words: impl Fn(usize) -> Vec<String>) -> Result<()> {
    let mut children = Vec::new();
    for (n, host) in hosts.iter().enumerate() {
        let words = words(n);
        let mut c = host.cli(&words.iter().map(String::as_str).collect::<Vec<_>>());
        let child = c.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        children.push((host, words, child.context("start a command")?));
    }
    for (host, words, child) in children {
        let out = child.wait_with_output().context("wait for a command")?;
        if !out.status.success() {
            bail!("`{}` on {}: {}\n{}", words.join(" "), host.name(), tail(&out.stderr, 12), host.log_tail());
        }
    }
    Ok(())
}

/// Waits for every guest; from `started` to the first and to the last of them.
fn wait_for_beats(
    lab: &Lab,
    names: &[String],
    receivers: &[Receiver],
    started: Instant,
) -> Result<(Duration, Duration)> {
    let mut all = Vec::new();
    for ((host, name), receiver) in lab.hosts().iter().zip(names).zip(receivers) {
        let left = BOOT_LIMIT.saturating_sub(started.elapsed());
        let Some(at) = receiver.wait_for_source(0, left) else {
            bail!("vm {name} on {} sent no beat within {BOOT_LIMIT:?}: {}", host.name(), console(host, name));
        };
        all.push(at.saturating_duration_since(started));
    }
    let (first, last) = (all.iter().min(), all.iter().max());
    Ok((first.copied().unwrap_or_default(), last.copied().unwrap_or_default()))
}
