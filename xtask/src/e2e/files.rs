//! A volume as a file in the hands of programs that only know files: QEMU's, dd, cp, fio, mke2fs and debugfs.
//!
//! ```text
//!   attach ─▶ each program's part ─▶ a snapshot under fio ─▶ the agent killed under load ─▶ attached again ─▶ detach
//! ```
//!
//! An agent of the lab has mounts of its own, so everything that uses the file runs in them (`nsenter`). A process that
//! does nothing keeps them when the agent is killed: the next agent finds what the killed one left mounted.
//!
//! Not here: single system calls, silent sources, errors (the host crate's tests).

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Context;
use crate::cmd::{capture, dying_with_us, find_program, line, output};
use crate::lab::Host;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
const VOLUME: &str = "raw";
/// What hangs is ended, s.
const LIMIT_S: &str = "60";
/// How long a program may take to notice that the agent is dead.
const NOTICE_LIMIT: Duration = Duration::from_secs(10);

/// A volume that is shown as a file.
struct Shown<'a> {
    c: &'a Context<'a>,
    host: &'a Host,
    /// Keeps the mounts.
    keeper: u32,
    path: String,
}

impl<'a> Shown<'a> {
    fn attach(c: &'a Context<'a>, host: &'a Host, keeper: u32, options: &[&str]) -> Result<Shown<'a>> {
        let shown = host.whimbrel(&[&["volume", "attach", VOLUME, "--export", "fuse"], options].concat())?;
        let path = shown["exports"][0].as_str().context("attach says where")?.to_owned();
        Ok(Shown { c, host, keeper, path })
    }

    fn detach(self) -> Result<()> {
        self.host.whimbrel(&["volume", "detach", VOLUME]).map(drop)
    }

    /// A program that sees the file.
    fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let found = find_program(program);
        let found =
            found.with_context(|| format!("{program} is missing: run `cargo xtask test` as root once"))?;
        let mut c = in_mounts(self.keeper);
        c.args(["timeout", LIMIT_S]).arg(found).args(args);
        Ok(c)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        capture(&mut self.command(program, args)?)
    }

    /// The program must fail, and say these words.
    fn refused(&self, program: &str, args: &[&str], words: &str) -> Result<()> {
        let mut c = self.command(program, args)?;
        let out = output(&mut c)?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(!out.status.success() && said.contains(words), "{}: {}, {said:?}", line(&c), out.status);
        Ok(())
    }

    fn qemu(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut c = in_mounts(self.keeper);
        capture(c.args(["timeout", LIMIT_S]).arg(self.c.lab.qemu.program(program)).args(args))
    }
}

fn in_mounts(pid: u32) -> Command {
    let mut c = dying_with_us("nsenter", &["--target", &pid.to_string(), "--mount"]);
    c.arg("--");
    c
}

/// Does nothing in the mounts of an agent.
struct Keeper(Child);

impl Keeper {
    fn new(agent: u32) -> Result<Self> {
        let keeper =
            in_mounts(agent).args(["sleep", "600"]).spawn().context("start a process in the mounts")?;
        let keeper = Self(keeper);
        let of =
            |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).context("ask for a process's mounts");
        let end = Instant::now() + NOTICE_LIMIT;
        while of(keeper.0.id())? != of(agent)? {
            ensure!(Instant::now() < end, "nsenter does not enter");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(keeper)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    /// What is mounted of volumes as files.
    fn mounts(&self) -> Result<Vec<String>> {
        let path = format!("/proc/{}/mountinfo", self.pid());
        let all = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let ours = all.lines().filter(|line| line.contains("/volumes/files"));
        Ok(ours.map(str::to_owned).collect())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file with data and holes.
fn patchwork(path: &Path) -> Result<()> {
    let what = || format!("write {}", path.display());
    let file = fs::File::create_new(path).with_context(what)?;
    file.set_len(SIZE).with_context(what)?;
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (0..SIZE / MIB).filter(|at| at % 3 == 1) {
        let mut block = vec![0_u8; MIB as usize];
        for place in &mut block {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *place = (x >> 32) as u8 | 1;
        }
        file.write_all_at(&block, at * MIB).with_context(what)?;
    }
    Ok(())
}

/// One program's part; the file is what is copied in and out.
type Step = fn(&Shown<'_>, &Path) -> Result<()>;

/// See the module's charter.
pub(super) fn programs_take_it_for_a_file(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let dir = c.lab.dir().join("files");
    fs::create_dir_all(&dir).context("make a directory")?;
    let source = dir.join("source.raw");
    patchwork(&source)?;
    host.whimbrel(&["volume", "create", VOLUME, "--size", &format!("{}M", SIZE / MIB)])?;
    let keeper = Keeper::new(host.agent_pid().context("the agent runs")?)?;
    let shown = Shown::attach(c, host, keeper.pid(), &[])?;
    let steps: [(&str, Step); 6] = [
        ("what is refused", refusals),
        ("qemu-img", qemu),
        ("dd and cp", copied),
        ("fio", verified),
        ("mke2fs and debugfs", file_system),
        ("a snapshot under fio", snapshot),
    ];
    for (what, step) in steps {
        step(&shown, &source).with_context(|| what)?;
    }
    killed(&shown, &keeper, &source).context("the agent killed under load")?;
    shown.detach()?;
    ensure!(keeper.mounts()?.is_empty(), "left after a detach: {:?}", keeper.mounts()?);
    read_only(c, host, &keeper).context("read-only")?;
    stopped(c, host, &keeper).context("the agent stopped")?;
    let check = host.whimbrel(&["volume", "check", VOLUME])?;
    ensure!(check["problems"].as_array().is_some_and(Vec::is_empty), "{check}");
    host.whimbrel(&["volume", "remove", VOLUME])?;
    // The next scenarios find an agent as they know it.
    host.kill_agent()?;
    drop(keeper);
    host.start_agent(c.program)?;
    fs::remove_dir_all(&dir).context("remove the copies")
}

fn refusals(shown: &Shown<'_>, source: &Path) -> Result<()> {
    let path = shown.path.as_str();
    let told = shown.run("stat", &["--format", "%s %b %a %F", path])?;
    ensure!(told.trim() == format!("{SIZE} 0 600 regular file"), "{told}");
    shown.refused("cp", &[&source.to_string_lossy(), path], "Operation not permitted")?;
    shown.refused("truncate", &["--size=1M", path], "Operation not permitted")?;
    shown.refused("touch", &[&format!("{path}-other")], "Read-only file system")?;
    shown.refused("rm", &["-f", path], "Read-only file system")?;
    shown.refused("mv", &[path, &format!("{path}-other")], "Read-only file system")?;
    shown.refused(
        "dd",
        &["if=/dev/zero", &format!("of={path}"), "conv=notrunc", "bs=1M", "seek=96"],
        "No space",
    )
}

fn qemu(shown: &Shown<'_>, source: &Path) -> Result<()> {
    let (from, disk) = (source.to_string_lossy(), shown.path.as_str());
    shown.qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, disk])?;
    shown.qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, disk])?;
    let map = shown.qemu("qemu-img", &["map", "--output=json", "-f", "raw", disk])?;
    let map: Value = serde_json::from_str(&map)?;
    let runs = map.as_array().context("a map is a list")?;
    let sum = |data: bool| -> u64 {
        runs.iter().filter(|run| run["data"] == data).filter_map(|run| run["length"].as_u64()).sum()
    };
    ensure!(sum(true) == SIZE / 3 && sum(false) == SIZE - SIZE / 3, "a third is data: {map}");
    let blocks = shown.run("stat", &["--format", "%b", disk])?;
    ensure!(blocks.trim() == (SIZE / 3 / 512).to_string(), "{blocks} blocks");
    let out = source.with_extension("qcow2");
    let out_path = out.to_string_lossy();
    // Past the kernel's cache, several at once.
    let direct = ["convert", "-T", "none", "-f", "raw", "-O", "qcow2", "-W", disk, &out_path];
    shown.qemu("qemu-img", &direct)?;
    shown.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &from, &out_path])?;
    fs::remove_file(&out).context("remove a copy")?;
    let said = shown.qemu(
        "qemu-io",
        &[
            &["-f", "raw", "-d", "unmap"][..],
            &["-c", "write -P 0x22 1049000 5000", "-c", "write -P 0x33 2M 2M"],
            &["-c", "write -z -u 2M 1M", "-c", "discard 3M 1M", "-c", "flush"],
            &["-c", "read -P 0x22 1049000 5000", "-c", "read -P 0 2M 2M", disk],
        ]
        .concat(),
    )?;
    ensure!(!said.contains("failed") && !said.contains("error"), "{said}");
    Ok(())
}

fn same(one: &Path, other: &Path) -> Result<()> {
    capture(crate::cmd::cmd("cmp", &[]).arg(one).arg(other)).map(drop).context("compare what was copied")
}

fn copied(shown: &Shown<'_>, source: &Path) -> Result<()> {
    let (from, disk) = (source.to_string_lossy(), shown.path.as_str());
    let out = source.with_extension("copy");
    let to = out.to_string_lossy();
    for (unit, flags) in [("bs=1M", "conv=notrunc,fsync"), ("bs=70001", "conv=notrunc,fdatasync")] {
        // Nothing of what was there before.
        shown.run("fallocate", &["--punch-hole", "--offset", "0", "--length", &SIZE.to_string(), disk])?;
        shown.run("dd", &[&format!("if={from}"), &format!("of={disk}"), unit, flags, "status=none"])?;
        shown
            .run("dd", &[&format!("if={disk}"), &format!("of={to}"), unit, "iflag=direct", "status=none"])?;
        same(source, &out)?;
        fs::remove_file(&out).context("remove a copy")?;
    }
    shown.qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, disk])?;
    shown.run("cp", &["--sparse=auto", disk, &to])?;
    same(source, &out)?;
    let taken = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&out).context("look at a copy")?) * 512;
    ensure!(taken <= SIZE / 3 + 4 * MIB, "a copy takes {taken} bytes: holes were lost");
    fs::remove_file(&out).context("remove a copy")
}

fn verified(shown: &Shown<'_>, _: &Path) -> Result<()> {
    let file = format!("--filename={}", shown.path);
    let common =
        ["--name=v", &file, "--size=64m", "--verify=crc32c", "--do_verify=1", "--verify_state_save=0"];
    let deep = ["--ioengine=libaio", "--direct=1", "--iodepth=32", "--rw=randrw", "--bsrange=512-128k"];
    let odd = ["--ioengine=psync", "--rw=randwrite", "--bs=3000", "--io_size=8m", "--fdatasync=32"];
    let mapped = ["--ioengine=mmap", "--rw=randrw", "--bs=4k", "--io_size=16m", "--fsync=64"];
    for args in [&[&deep[..], &["--io_size=64m", "--fsync=64"]].concat()[..], &odd, &mapped] {
        shown.run("fio", &[&common[..], args].concat())?;
    }
    Ok(())
}

fn file_system(shown: &Shown<'_>, source: &Path) -> Result<()> {
    let (disk, from) = (shown.path.as_str(), source.with_extension("small"));
    fs::write(&from, (0..300_000_u32).flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>())
        .context("write a file")?;
    shown.run("mke2fs", &["-q", "-F", "-t", "ext4", disk])?;
    shown.run("debugfs", &["-w", "-R", &format!("write {} file", from.display()), disk])?;
    shown.run("e2fsck", &["-f", "-n", disk])?;
    let out = source.with_extension("dumped");
    shown.run("debugfs", &["-R", &format!("dump file {}", out.display()), disk])?;
    same(&from, &out)
}

/// Writes at depth without end.
fn load(shown: &Shown<'_>, seconds: &str) -> Result<Child> {
    let file = format!("--filename={}", shown.path);
    let mut fio =
        shown.command("fio", &["--name=k", &file, "--ioengine=libaio", "--direct=1", "--rw=randwrite"])?;
    fio.args([
        "--bsrange=512-64k",
        "--iodepth=16",
        "--offset=48m",
        "--size=40m",
        "--fsync=32",
        "--time_based",
    ]);
    fio.args(["--verify=crc32c", "--verify_state_save=0", "--verify_backlog=64", "--runtime", seconds]);
    fio.stdout(Stdio::null()).stderr(Stdio::null());
    fio.spawn().with_context(|| format!("start {}", line(&fio)))
}

fn snapshot(shown: &Shown<'_>, _: &Path) -> Result<()> {
    let mut fio = load(shown, "5")?;
    for name in ["one", "two"] {
        std::thread::sleep(Duration::from_secs(1));
        shown.host.whimbrel(&["volume", "snapshot", VOLUME, "--name", name])?;
    }
    let status = fio.wait().context("wait for fio's end")?;
    ensure!(status.success(), "fio across snapshots: {status}");
    Ok(())
}

fn killed(shown: &Shown<'_>, keeper: &Keeper, source: &Path) -> Result<()> {
    let (from, disk) = (source.to_string_lossy(), shown.path.as_str());
    for round in 1..=3 {
        let (input, target) = (format!("if={from}"), format!("of={disk}"));
        shown.run("dd", &[&input, &target, "bs=1M", "count=48", "conv=notrunc,fsync", "status=none"])?;
        let mut fio = load(shown, "60")?;
        std::thread::sleep(Duration::from_millis(700 + 200 * round));
        shown.host.kill_agent()?;
        let end = Instant::now() + NOTICE_LIMIT;
        let status = loop {
            if let Some(status) = fio.try_wait().context("look after fio")? {
                break status;
            }
            ensure!(Instant::now() < end, "a program that used the file hangs");
            std::thread::sleep(Duration::from_millis(10));
        };
        ensure!(!status.success(), "fio did not notice that the agent is dead");
        shown.refused("stat", &[disk], "not connected")?;
        ensure!(!keeper.mounts()?.is_empty(), "the mount of a killed agent is gone by itself");
        shown.host.start_agent_in_mounts_of(shown.c.program, keeper.pid())?;
        ensure!(keeper.mounts()?.is_empty(), "a dead mount is left: {:?}", keeper.mounts()?);
        let again = Shown::attach(shown.c, shown.host, keeper.pid(), &[])?;
        ensure!(again.path == shown.path, "{} is now {}", shown.path, again.path);
        again.run("cmp", &["-n", &(48 * MIB).to_string(), &from, disk]).context("what was synced")?;
        let check = shown.host.whimbrel(&["volume", "check", VOLUME])?;
        ensure!(check["problems"].as_array().is_some_and(Vec::is_empty), "{check}");
    }
    Ok(())
}

fn read_only(c: &Context<'_>, host: &Host, keeper: &Keeper) -> Result<()> {
    let shown = Shown::attach(c, host, keeper.pid(), &["--read-only"])?;
    let to = format!("of={}", shown.path);
    shown.refused("dd", &["if=/dev/zero", &to, "conv=notrunc", "count=1"], "Read-only file system")?;
    shown.run("dd", &[&format!("if={}", shown.path), "of=/dev/null", "bs=1M", "status=none"])?;
    shown.detach()
}

/// An agent that ends as it is asked to leaves nothing mounted.
fn stopped(c: &Context<'_>, host: &Host, keeper: &Keeper) -> Result<()> {
    let shown = Shown::attach(c, host, keeper.pid(), &[])?;
    let to = format!("of={}", shown.path);
    shown.run("dd", &["if=/dev/zero", &to, "conv=notrunc", "bs=1M", "count=1", "status=none"])?;
    let pid = host.agent_pid().context("the agent runs")?;
    crate::cmd::run(&mut crate::cmd::cmd("kill", &["-TERM", &pid.to_string()]))?;
    if !host.wait_agent_end(NOTICE_LIMIT) {
        bail!("the agent does not end while a volume is a file:\n{}", host.log_tail());
    }
    ensure!(keeper.mounts()?.is_empty(), "left by an agent that ended: {:?}", keeper.mounts()?);
    host.start_agent_in_mounts_of(c.program, keeper.pid())
}
