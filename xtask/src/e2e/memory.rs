//! How much memory an agent takes: idle with a large sparse image, with a filled cache, while it moves a VM.
//!
//! Counted is what is resident of the agent's process, by mapping (`Rss` of `/proc/PID/smaps`), without the mappings
//! of VMs' RAM files: those pages are the guest's, and in RAM once however many map them. Code and libraries count.
//! `docs/memory.md` says what was measured.
//!
//! ```text
//!   image of 100 GiB, sparse ─▶ idle ─▶ agent anew ─▶ volume over it on a socket          each ≤ 60 MB
//!   image of 8 TiB, sparse ─▶ opened: growth per TiB of image      1 GiB of cache filled ─▶ growth per TiB cached
//!   VM of 1 GiB ─▶ moved to and fro in each mode, both agents looked at ten times a second  ≤ 200 MB
//! ```

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, IMAGE};
use crate::flight::Flight;
use crate::lab::{Host, Lab};

const MB: u64 = 1_000_000;
const IDLE_MAX: u64 = 60 * MB;
const MOVING_MAX: u64 = 200 * MB;
/// Bookkeeping of an open image is 3 bits per block of 128 KiB: 3 MiB. The rest of the limit is the allocator's.
const PER_TIB_MAX: u64 = 8 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const FILL: u64 = GIB;
/// An agent that did something settles.
const SETTLE: Duration = Duration::from_secs(3);
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// RAM of the VM that is moved.
const VM_MIB: u64 = 1024;
/// Half of it written to, and rewritten while it is moved.
const WORKLOAD: &str = "wg.mem_mib=512 wg.mem_rate=40 wg.disk=/data/records wg.disk_rate=100";

/// See the module's charter.
pub fn agent_memory(c: &Context<'_>) -> Result<()> {
    let lab = Lab::new("memory", 2, &c.lab.qemu, &c.lab.image)?;
    lab.start_cluster(c.program)?;
    let mut found = Findings::default();
    images(c, &lab, &mut found)?;
    moves(c, &lab, &mut found)?;
    found.verdict()
}

/// Lines for people, and what is over its limit.
#[derive(Default)]
struct Findings {
    over: Vec<String>,
}

impl Findings {
    fn bytes(&mut self, what: &str, bytes: u64, limit: u64) {
        println!("       {what:<58} {:>7.1} MB, limit {:.0}", bytes as f64 / 1e6, limit as f64 / 1e6);
        if bytes > limit {
            self.over.push(format!("{what}: {bytes} bytes, {limit} are the limit"));
        }
    }

    fn verdict(self) -> Result<()> {
        if !self.over.is_empty() {
            bail!("{}", self.over.join("; "));
        }
        Ok(())
    }
}

fn images(c: &Context<'_>, lab: &Lab, found: &mut Findings) -> Result<()> {
    let host = lab.hosts().first().context("a lab has hosts")?;
    found.bytes("fresh, in a cluster", settled(host)?, IDLE_MAX);
    publish(host, "large:1", &sparse(host, 100 * GIB, 64)?)?;
    found.bytes("published a sparse image of 100 GiB", settled(host)?, IDLE_MAX);
    host.kill_agent()?;
    host.start_agent(c.program)?;
    host.whimbrel(&["image", "show", "large:1"])?;
    let idle = settled(host)?;
    found.bytes("started anew", idle, IDLE_MAX);
    host.whimbrel(&["volume", "create", "large", "--image", "large:1"])?;
    host.whimbrel(&["volume", "attach", "large", "--export", "nbd"])?;
    host.whimbrel(&["image", "prefetch", "large:1"])?;
    let open = settled(host)?;
    found.bytes("a volume over it on a socket, what is stored cached", open, IDLE_MAX);
    host.whimbrel(&["volume", "detach", "large"])?;

    publish(host, "huge:1", &sparse(host, 8 * TIB, 8)?)?;
    let before = anew(c, host)?;
    host.whimbrel(&["image", "prefetch", "huge:1"])?;
    let per_tib = settled(host)?.saturating_sub(before) / 8;
    found.bytes("per TiB of an open image, of which 8 TiB were opened", per_tib, PER_TIB_MAX);

    publish(host, "full:1", &unique(host, FILL)?)?;
    let before = anew(c, host)?;
    host.whimbrel(&["image", "prefetch", "full:1"])?;
    let shown = host.whimbrel(&["image", "show", "full:1"])?;
    ensure!(shown["cached_bytes"].as_u64() == Some(FILL), "the cache holds {} bytes", shown["cached_bytes"]);
    // Buffers and threads of the fetching stay for a while; they do not grow with what is cached.
    let filled = settled(host)?;
    println!(
        "       of which buffers that the fetching left {:>26.1} MB",
        filled.saturating_sub(before) as f64 / 1e6
    );
    found.bytes("idle after 1 GiB came into the cache", filled, IDLE_MAX);
    // Cached by an earlier run of the agent: what remains is what caching costs.
    let before = anew(c, host)?;
    host.whimbrel(&["image", "show", "full:1"])?;
    let kept = settled(host)?.saturating_sub(before);
    found.bytes("1 GiB cached earlier, opened", kept, PER_TIB_MAX);
    Ok(())
}

/// A fresh agent's memory, its images not open yet.
fn anew(c: &Context<'_>, host: &Host) -> Result<u64> {
    host.kill_agent()?;
    host.start_agent(c.program)?;
    settled(host)
}

fn publish(host: &Host, name: &str, file: &Path) -> Result<()> {
    host.publish(file, name)?;
    fs::remove_file(file).context("remove the published file")
}

/// A sparse file with `places` blocks of 128 KiB that hold something.
fn sparse(host: &Host, bytes: u64, places: u64) -> Result<PathBuf> {
    let path = host.dir().join("sparse.raw");
    let mut file = fs::File::create(&path).context("make a sparse file")?;
    file.set_len(bytes).with_context(|| format!("make a sparse file of {bytes} bytes"))?;
    for place in 0..places {
        file.seek(SeekFrom::Start(bytes / places * place)).context("fill a sparse file")?;
        file.write_all(&noise(place, 128 << 10)).context("fill a sparse file")?;
    }
    Ok(path)
}

/// A file without two equal blocks.
fn unique(host: &Host, bytes: u64) -> Result<PathBuf> {
    let path = host.dir().join("unique.raw");
    let mut file = fs::File::create(&path).context("make a large file")?;
    for part in 0..bytes >> 20 {
        file.write_all(&noise(part + 1000, 1 << 20)).context("fill a large file")?;
    }
    Ok(path)
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn moves(c: &Context<'_>, lab: &Lab, found: &mut Findings) -> Result<()> {
    let (a, b) = lab.pair();
    for host in [a, b] {
        host.kill_agent()?;
        host.start_agent(c.program)?;
    }
    a.publish(&lab.image.disk, IMAGE)?;
    let mut flight = Flight::start(lab, 0, "large-vm", IMAGE, VM_MIB, 2, WORKLOAD)?;
    let shown = flight.host()?.whimbrel(&["vm", "show", "large-vm"])?;
    let modes: &[&str] = if shown["mode"] == "a" || shown["mode"] == "A" { &["a", "b"] } else { &["b"] };
    if modes.len() == 1 {
        println!("       mode A is not possible on this machine, so not tried: {}", shown["mode_reasons"]);
    }
    for mode in modes {
        for to in [1, 0] {
            let sampler = Sampler::start(&[a, b])?;
            flight.migrate(to, &["--mode", mode])?;
            let [at_a, at_b] = sampler.end();
            let (source, target) = if to == 1 { (at_a, at_b) } else { (at_b, at_a) };
            found.bytes(&format!("source of a VM of 1 GiB, mode {mode}, at most"), source, MOVING_MAX);
            found.bytes(&format!("target of a VM of 1 GiB, mode {mode}, at most"), target, MOVING_MAX);
        }
    }
    flight.must_be_whole()?;
    flight.stop()
}

/// What the agent takes when it has settled.
fn settled(host: &Host) -> Result<u64> {
    let end = Instant::now() + SETTLE;
    let mut least = u64::MAX;
    while Instant::now() < end {
        thread::sleep(SAMPLE_EVERY);
        least = least.min(resident(host.agent_pid().context("the agent runs")?, &host.dir().join("memory"))?);
    }
    Ok(least)
}

/// Resident bytes of a process, without mappings of files in `ram_dir`.
fn resident(pid: u32, ram_dir: &Path) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the agent's mappings")?;
    let ram_dir = ram_dir.to_string_lossy();
    let (mut bytes, mut counts) = (0, true);
    for line in text.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib = kib.trim().trim_end_matches("kB").trim().parse::<u64>().context("read Rss")?;
            bytes += if counts { kib << 10 } else { 0 };
        } else if line.split(' ').next().is_some_and(|word| word.contains('-') && !word.contains(':')) {
            counts = !line.contains(&*ram_dir);
        }
    }
    ensure!(bytes > 0, "process {pid} has nothing resident");
    Ok(bytes)
}

/// Looks at two agents all the time.
struct Sampler {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<u64>>,
}

impl Sampler {
    fn start(hosts: &[&Host; 2]) -> Result<Sampler> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for host in hosts {
            let (stop, dir) = (Arc::clone(&stop), host.dir().join("memory"));
            let pid = host.agent_pid().context("the agent runs")?;
            threads.push(thread::spawn(move || {
                let mut most = 0;
                while !stop.load(Ordering::Relaxed) {
                    most = most.max(resident(pid, &dir).unwrap_or(0));
                    thread::sleep(SAMPLE_EVERY);
                }
                most
            }));
        }
        Ok(Sampler { stop, threads })
    }

    /// The most that each agent took.
    fn end(self) -> [u64; 2] {
        self.stop.store(true, Ordering::Relaxed);
        let mut most = self.threads.into_iter().map(|thread| thread.join().unwrap_or(0));
        [most.next().unwrap_or(0), most.next().unwrap_or(0)]
    }
}
