//! QEMUs that somebody started by hand are taken over, moved, refused, and left alone.
//!
//! Not here: the command lines in all their variety (unit tests of `whimbrel_host::guest::foreign`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::Context;
use crate::cmd::{self, cmd, output};
use crate::flight::Flight;
use crate::guest::APPEND;
use crate::lab::{self, Host, has_taps, port_args};
use crate::qmp::Qmp;

const SOON: Duration = Duration::from_secs(30);
/// Not a multiple of 256 KiB: QEMU 7.2 under TCG can move it in its own stream then.
const ODD_BYTES: u64 = (256 << 20) - 8192;
/// Debian's `games`.
const OTHER_USER: u32 = 5;
/// Starts its arguments with a filter under which userfaultfd(2), and the ioctl of /dev/userfaultfd, are not permitted.
const NO_USERFAULTFD: &str = r#"
import ctypes, os, struct, sys
def do(code, yes, no, k): return struct.pack("=HBBI", code, yes, no, k)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NR, SECOND_ARGUMENT = 0, 24
filter = b"".join([
    do(LOAD, 0, 0, NR), do(EQUAL, 4, 0, 323), do(EQUAL, 0, 2, 16),
    do(LOAD, 0, 0, SECOND_ARGUMENT), do(EQUAL, 1, 0, 0xAA00),
    do(RETURN, 0, 0, 0x7FFF0000), do(RETURN, 0, 0, 0x00050001),
])
buffer = ctypes.create_string_buffer(filter, len(filter))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(filter) // 8, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
for args in ((38, 1, 0, 0, 0), (22, 2, program, 0, 0)):
    assert libc.prctl(*args) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"#;
/// Memory and disk under steady load.
const LOAD: &str = "wg.mem_mib=64 wg.mem_rate=50 wg.disk=/data/records";

/// A QEMU that the scenario started, as a person would.
struct ByHand {
    child: Child,
    dir: PathBuf,
}

impl Drop for ByHand {
    fn drop(&mut self) {
        // It may have been ended by the agent that adopted it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ByHand {
    /// Starts QEMU on a host, with a QMP socket for the agent and one for us; `{dir}` in `args` is its directory.
    fn start(c: &Context<'_>, host: &Host, name: &str, args: &[&str]) -> Result<ByHand> {
        ByHand::start_as(c, host, name, args, Through::Nothing)
    }

    /// The same through another program, or as another user.
    fn start_as(c: &Context<'_>, host: &Host, name: &str, args: &[&str], through: Through) -> Result<ByHand> {
        let dir = host.dir().join("hand").join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let place = dir.to_string_lossy().into_owned();
        let mut command: Command = match through {
            Through::Nothing => host.command(&c.lab.qemu.system()),
            Through::Filter => {
                let mut command = host.command(Path::new("/usr/bin/python3"));
                command.args(["-c", NO_USERFAULTFD]).arg(c.lab.qemu.system());
                command
            }
            Through::User(user) => {
                std::os::unix::fs::chown(&dir, Some(user), Some(user)).context("give a directory away")?;
                let mut command = host.command(Path::new("setpriv"));
                command.args([format!("--reuid={user}"), format!("--regid={user}")]);
                command.arg("--clear-groups").arg(c.lab.qemu.system());
                command
            }
        };
        for args in [&["-display", "none", "-machine", "q35,accel=tcg", "-cpu", "qemu64"], args] {
            command.args(args.iter().map(|arg| arg.replace("{dir}", &place)));
        }
        for socket in ["qmp", "mine"] {
            command.args(["-qmp", &format!("unix:{place}/{socket}.sock,server=on,wait=off")]);
        }
        let log = fs::File::create(dir.join("qemu.log")).context("make QEMU's log")?;
        command.stdout(Stdio::null()).stderr(Stdio::from(log));
        let child = command.spawn().context("start QEMU by hand")?;
        let mut hand = ByHand { child, dir };
        let end = Instant::now() + SOON;
        while !hand.dir.join("mine.sock").exists() {
            if let Some(status) = hand.child.try_wait().context("look at QEMU")? {
                let said = fs::read(hand.dir.join("qemu.log")).unwrap_or_default();
                bail!("QEMU of {name} ended at once ({status}): {}", cmd::tail(&said, 5));
            }
            ensure!(Instant::now() < end, "QEMU of {name} makes no socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(hand)
    }

    fn qmp_path(&self) -> String {
        self.dir.join("qmp.sock").to_string_lossy().into_owned()
    }

    fn mine(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.join("mine.sock"), SOON)
    }

    fn must_run(&mut self) -> Result<()> {
        let ended = self.child.try_wait().context("look at QEMU")?;
        ensure!(ended.is_none(), "QEMU of {} ended: {ended:?}", self.dir.display());
        let status = self.mine()?.execute("query-status", json!({}))?;
        ensure!(status["status"] == "running", "its guest is {status}");
        Ok(())
    }
}

/// A tap on the guests' bridge of a host.
fn tap(host: &Host, name: &str) -> Result<()> {
    let ip = |args: &[&str]| cmd::run(&mut cmd("ip", &[&["-n", host.name()], args].concat()));
    ip(&["tuntap", "add", name, "mode", "tap"])?;
    ip(&["link", "set", name, "master", "br0", "up"])
}

/// What a test guest by hand is like.
struct Guest<'a> {
    name: &'a str,
    memory: &'a [&'a str],
    disk: &'a [&'a str],
    tap: &'a str,
    through: Through,
}

/// How a QEMU is started.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Through {
    /// By root.
    Nothing,
    /// [`NO_USERFAULTFD`].
    Filter,
    /// By another user.
    User(u32),
}

/// Boots the workload in a QEMU started by hand on the first host.
fn boot<'a>(c: &'a Context<'_>, guest: &Guest<'_>) -> Result<(ByHand, Flight<'a>)> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    // Not on every machine may everybody open /dev/net/tun.
    let net = has_taps() && !matches!(guest.through, Through::User(_));
    if net {
        tap(host, guest.tap)?;
    }
    let address = c.lab.guest_address();
    let append = if net { format!("{APPEND} {LOAD} wg.ip={address}") } else { format!("{APPEND} {LOAD}") };
    let (kernel, initrd) = (c.lab.image.kernel.to_string_lossy(), c.lab.image.initrd.to_string_lossy());
    let netdev = format!("tap,id=n0,ifname={},script=no,downscript=no", guest.tap);
    let ports = port_args("{dir}");
    let mut args =
        vec!["-nodefaults", "-smp", "2", "-kernel", &kernel, "-initrd", &initrd, "-append", &append];
    args.extend(guest.memory.iter().chain(guest.disk));
    if net {
        args.extend(["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:ad:0b:01"]);
    }
    args.extend(["-serial", "unix:{dir}/serial.sock,server=on,wait=off"]);
    args.extend(ports.iter().map(String::as_str));
    let hand = ByHand::start_as(c, host, guest.name, &args, guest.through)?;
    let sockets: Vec<PathBuf> = c
        .lab
        .hosts()
        .iter()
        .enumerate()
        .map(|(at, host)| if at == 0 { hand.dir.join("beat.sock") } else { host.vm_sockets(guest.name).beat })
        .collect();
    let flight =
        Flight::found(c.lab, 0, guest.name, &sockets, &hand.dir.join("status.sock")).with_context(|| {
            format!("QEMU says: {}", fs::read_to_string(hand.dir.join("qemu.log")).unwrap_or_default())
        })?;
    Ok((hand, flight))
}

/// A copy of the guest's disk in a format, where everybody may read it.
fn disk_copy(c: &Context<'_>, name: &str, format: &str) -> Result<PathBuf> {
    let file = c.lab.dir().join(format!("{name}.{format}"));
    let mut convert = cmd(c.lab.qemu.program("qemu-img"), &["convert", "-f", "raw", "-O", format]);
    cmd::run(convert.arg(&c.lab.image.disk).arg(&file))?;
    Ok(file)
}

fn qmp_text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// RAM in a file of its owner's, disk a qcow2 on an implicit device: mode A, over three hosts.
pub fn adopted_in_mode_a(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let ram = host.dir().join("memory/owners.ram");
    let object = format!("memory-backend-file,id=mem,size=256M,mem-path={},share=on", ram.display());
    let disk =
        format!("file={},format=qcow2,if=virtio,cache=none", disk_copy(c, "hand-a", "qcow2")?.display());
    let memory = ["-m", "256M", "-object", &object, "-machine", "memory-backend=mem"];
    let guest = Guest {
        name: "hand-a",
        memory: &memory,
        disk: &["-drive", &disk],
        tap: "hand0",
        through: Through::Nothing,
    };
    let (mut hand, mut flight) = boot(c, &guest)?;
    let before = flight.counter("disk_acked")?;
    let task = host.whimbrel(&["vm", "adopt", "hand-a", "--qmp", &hand.qmp_path()])?;
    ensure!(task["state"] == "done", "the adoption ended as {task}");
    hand.must_run()?;
    let blocks = hand.mine()?.execute("query-block", json!({}))?;
    ensure!(qmp_text(&blocks, "/0/inserted/drv") == "nbd", "its disk is not on a volume: {blocks}");
    flight.must_be_whole().context("after the adoption")?;
    let shown = host.whimbrel(&["vm", "show", "hand-a"])?;
    let mode_a = shown["mode"] == "A";
    if !mode_a {
        println!("       mode A is not possible on this machine: {}", shown["mode_reasons"]);
    }
    // An agent that comes back finds it, its disk and its QMP.
    host.kill_agent()?;
    std::thread::sleep(Duration::from_millis(500));
    host.start_agent(c.program)?;
    let acked = flight.counter("disk_acked")?;
    ensure!(acked >= before, "acknowledged records went back from {before} to {acked}");
    let end = Instant::now() + SOON;
    while flight.counter("disk_acked")? < acked + 50 {
        ensure!(Instant::now() < end, "the disk did not come back after the agent did");
        std::thread::sleep(Duration::from_millis(100));
    }
    let options: &[&str] = if mode_a { &["--mode", "a", "--verify"] } else { &[] };
    for to in [1, 2] {
        let moved = flight.migrate(to, options).with_context(|| format!("move to host {}", to + 1))?;
        ensure!(moved.beat.resets == 0, "the guest started anew");
        flight.must_be_whole().with_context(|| format!("at host {}", to + 1))?;
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
        if to == 1 {
            ensure!(ram.exists(), "the RAM file of whoever started the VM was removed");
            let noted = moved.task["notes"].to_string();
            ensure!(noted.contains("owners.ram"), "nobody was told of the RAM file left behind: {noted}");
            ensure!(hand.child.try_wait()?.is_some(), "the QEMU that was moved away still runs");
        }
        println!("       adopted, moved to host {}: silence {:.0} ms", to + 1, moved.beat.longest_gap_ms);
    }
    fs::remove_file(&ram).context("remove the RAM file")?;
    flight.stop()
}

/// Private memory, a raw disk on a stated device, run by another user: mode B; from then on its RAM is a file, and mode A works.
pub fn adopted_in_mode_b(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let file = disk_copy(c, "hand-b", "raw")?;
    let node = format!(r#"{{"driver":"file","filename":"{}","node-name":"storage"}}"#, file.display());
    let disk = [
        "-blockdev",
        &node,
        "-blockdev",
        r#"{"driver":"raw","file":"storage","node-name":"format"}"#,
        "-device",
        r#"{"driver":"virtio-blk-pci","id":"virtio-disk0","drive":"format","bus":"pcie.0","addr":"0x8"}"#,
    ];
    let memory = format!("size={ODD_BYTES}b");
    // Neither root nor the user as whom VMs of ours run; a machine may let us be one user only.
    let user = (!lab::one_user_only()).then_some(OTHER_USER);
    std::os::unix::fs::chown(&file, user, user).context("give the disk away")?;
    let through = user.map_or(Through::Nothing, Through::User);
    let guest = Guest { name: "hand-b", memory: &["-m", &memory], disk: &disk, tap: "hand1", through };
    let (mut hand, mut flight) = boot(c, &guest)?;
    host.whimbrel(&["vm", "adopt", "hand-b", "--qmp", &hand.qmp_path()])?;
    hand.must_run()?;
    let shown = host.whimbrel(&["vm", "show", "hand-b"])?;
    ensure!(shown["mode"] == "B", "private memory cannot be moved in mode {}", shown["mode"]);
    let mut acked = flight.counter("disk_acked")?;
    for to in [1, 2, 1] {
        let moved = flight.migrate(to, &[]).with_context(|| format!("move to host {}", to + 1))?;
        ensure!(moved.beat.resets == 0, "the guest started anew");
        flight.must_be_whole().with_context(|| format!("at host {}", to + 1))?;
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
        acked = now;
        let mode = flight.host()?.whimbrel(&["vm", "show", "hand-b"])?["mode"].clone();
        println!(
            "       moved to host {}: silence {:.0} ms, mode from now on {mode}",
            to + 1,
            moved.beat.longest_gap_ms
        );
    }
    flight.stop()
}

/// A volume of ours on a vhost-user-blk device: it is not copied, and moves with the VM.
pub fn adopted_with_a_volume(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    host.whimbrel(&["volume", "create", "hand-v", "--image", super::IMAGE])?;
    let volume = host.whimbrel(&["volume", "attach", "hand-v", "--export", "vhost-user-blk"])?;
    let socket = qmp_text(&volume, "/exports/0");
    let ram = host.dir().join("memory/owners-v.ram");
    let object = format!("memory-backend-file,id=mem,size={ODD_BYTES},mem-path={},share=on", ram.display());
    let (size, chardev) = (format!("size={ODD_BYTES}b"), format!("socket,id=v0,path={socket},reconnect=1"));
    let memory = ["-m", &size, "-object", &object, "-machine", "memory-backend=mem"];
    let disk = ["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=v0,num-queues=2,id=root"];
    let guest =
        Guest { name: "hand-v", memory: &memory, disk: &disk, tap: "hand2", through: Through::Nothing };
    let (mut hand, mut flight) = boot(c, &guest)?;
    host.whimbrel(&["vm", "adopt", "hand-v", "--qmp", &hand.qmp_path()])?;
    hand.must_run()?;
    let shown = host.whimbrel(&["vm", "show", "hand-v"])?;
    ensure!(shown["volumes"] == json!(["hand-v"]), "its volumes are {}", shown["volumes"]);
    let refused = output(&mut host.cli(&["volume", "detach", "hand-v"]))?;
    ensure!(!refused.status.success(), "the disk of a running VM was detached");
    let mut acked = flight.counter("disk_acked")?;
    for to in [1, 2] {
        let moved = flight.migrate(to, &[]).with_context(|| format!("move to host {}", to + 1))?;
        flight.must_be_whole().with_context(|| format!("at host {}", to + 1))?;
        let now = flight.counter("disk_acked")?;
        ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
        acked = now;
        println!("       moved to host {}: silence {:.0} ms", to + 1, moved.beat.longest_gap_ms);
    }
    fs::remove_file(&ram).context("remove the RAM file")?;
    flight.stop()
}

/// Mode A is chosen where nobody may know that QEMU's filter forbids it, and mode B taken once it turns out.
pub fn falls_back_to_mode_b(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let second = c.lab.hosts().get(1).context("a lab has hosts")?;
    let ram = host.dir().join("memory/owners-f.ram");
    let object = format!("memory-backend-file,id=mem,size={ODD_BYTES},mem-path={},share=on", ram.display());
    let size = format!("size={ODD_BYTES}b");
    let memory = ["-m", &size, "-object", &object, "-machine", "memory-backend=mem"];
    let disk = format!("file={},format=raw,if=virtio", disk_copy(c, "hand-f", "raw")?.display());
    let disk = ["-drive", &disk];
    let guest =
        Guest { name: "hand-f", memory: &memory, disk: &disk, tap: "hand3", through: Through::Filter };
    let (mut hand, mut flight) = boot(c, &guest)?;
    host.kill_agent()?;
    host.start_agent_without_capability(c.program, "sys_admin")?;
    host.whimbrel(&["vm", "adopt", "hand-f", "--qmp", &hand.qmp_path()])?;
    hand.must_run()?;
    let shown = host.whimbrel(&["vm", "show", "hand-f"])?;
    if shown["mode"] != "A" {
        let reasons = shown["mode_reasons"].to_string();
        let opens = fs::File::open("/dev/userfaultfd").is_ok();
        ensure!(!opens, "mode A is not chosen though the filter cannot be asked about: {reasons}");
        println!("       mode A is not possible on this machine, so not fallen back from: {reasons}");
    }
    let acked = flight.counter("disk_acked")?;
    let asked = output(&mut host.cli(&["vm", "migrate", "hand-f", "--to", second.name(), "--mode", "a"]))?;
    ensure!(!asked.status.success(), "moved in mode A without a userfaultfd");
    hand.must_run().context("after a move in mode A that could not begin")?;
    let moved = flight.migrate(1, &[]).context("move it in whatever mode")?;
    let notes = moved.task["notes"].to_string();
    let told = notes.contains("moved in mode B, because mode A could not begin");
    ensure!(told || shown["mode"] != "A", "nobody was told of the fallback: {notes}");
    ensure!(moved.beat.resets == 0, "the guest started anew");
    flight.must_be_whole().context("at the second host")?;
    let now = flight.counter("disk_acked")?;
    ensure!(now >= acked, "acknowledged records went back from {acked} to {now}");
    println!("       fell back to mode B: silence {:.0} ms", moved.beat.longest_gap_ms);
    host.kill_agent()?;
    host.start_agent(c.program)?;
    fs::remove_file(&ram).context("remove the RAM file")?;
    flight.stop()
}

/// What is started, and the words that the refusal must hold.
type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a str]);

/// Everything that cannot be taken over is named, and goes on.
pub fn refusals(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let file = c.lab.dir().join("small.raw");
    fs::write(&file, vec![7; 1 << 20]).context("make a disk")?;
    let (drive, small) = (format!("file={},format=raw", file.display()), ["-nodefaults", "-m", "65528k"]);
    let (ide, ro) = (format!("{drive},if=ide"), format!("{drive},if=virtio,readonly=on"));
    let (cd, limited) =
        (format!("{drive},media=cdrom"), format!("{drive},if=virtio,throttling.bps-total=1000000"));
    let table: [Case<'_>; 11] = [
        ("ide", &["-drive", &ide], &["-drive", "if=virtio"]),
        ("readonly", &["-drive", &ro], &["read-only", "virtio0"]),
        ("cdrom", &["-drive", &cd], &["small.raw", "medium"]),
        ("limits", &["-drive", &limited], &["limits of a drive"]),
        ("user", &["-netdev", "user,id=u0", "-device", "virtio-net-pci,netdev=u0"], &["-netdev user", "tap"]),
        (
            "tcp",
            &["-chardev", "socket,id=x,host=127.0.0.1,port=7,server=on,wait=off"],
            &["-chardev socket,id=x", "unix"],
        ),
        ("snapshot", &["-snapshot"], &["-snapshot"]),
        (
            "ivshmem",
            &["-object", "memory-backend-memfd,id=m,size=1M,share=on", "-device", "ivshmem-plain,memdev=m"],
            &["-device ivshmem"],
        ),
        (
            "nic",
            &[
                "-nic",
                "none",
                "-device",
                "usb-ehci,id=e",
                "-device",
                "usb-storage,bus=e.0,drive=s",
                "-drive",
                &format!("{drive},if=none,id=s"),
            ],
            &["usb-storage", "virtio-blk-pci"],
        ),
        ("two", &["-drive", &ide, "-netdev", "user,id=u1"], &["-netdev user", "if=virtio"]),
        ("plugged", &["-device", "pcie-root-port,id=rp,chassis=1"], &["late", "plugged in after the start"]),
    ];
    let mut wrong = Vec::new();
    // Scenarios share their hosts: no name may be that of another's VM.
    for (why, args, words) in table {
        let name = &format!("refused-{why}");
        let mut hand = ByHand::start(c, host, name, &[&small, args].concat())?;
        if why == "plugged" {
            let device = json!({ "driver": "virtio-rng-pci", "id": "late", "bus": "rp" });
            hand.mine()?.execute("device_add", device)?;
        }
        let out = output(&mut host.cli(&["vm", "adopt", name, "--qmp", &hand.qmp_path()]))?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.code() != Some(1) || words.iter().any(|word| !said.contains(word)) {
            wrong.push(format!("{name}: ended with {:?} and said {said:?}", out.status.code()));
        }
        hand.must_run().with_context(|| format!("after {name} was refused"))?;
    }
    let nothing = output(&mut host.cli(&["vm", "adopt", "nothing", "--qmp", "/nowhere/qmp.sock"]))?;
    let said = String::from_utf8_lossy(&nothing.stderr).into_owned();
    if nothing.status.success() || !said.contains("/nowhere/qmp.sock") {
        wrong.push(format!("a missing socket: {said:?}"));
    }
    let listed = host.whimbrel(&["vm", "list"])?;
    let refused = |vm: &&Value| vm["name"].as_str().is_some_and(|name| name.starts_with("refused-"));
    let there: Vec<&Value> = listed.as_array().into_iter().flatten().filter(refused).collect();
    ensure!(there.is_empty(), "refused and registered all the same: {there:?}");
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// A mirror that fails, one that is cancelled, and an agent that is killed while it mirrors: QEMU goes on with its own disk.
pub fn cut_short(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let file = c.lab.dir().join("large.raw");
    fs::write(&file, vec![9; 256 << 20]).context("make a disk")?;
    let bad = format!(
        r#"{{"driver":"raw","node-name":"d0","file":{{"driver":"blkdebug","image":{{"driver":"file","filename":"{}"}},"inject-error":[{{"event":"read_aio","errno":5,"sector":400000}}]}}}}"#,
        file.display()
    );
    let small = ["-nodefaults", "-m", "65528k"];
    let args = [&small[..], &["-blockdev", &bad, "-device", "virtio-blk-pci,drive=d0"]].concat();
    let mut hand = ByHand::start(c, host, "bad-disk", &args)?;
    let out = output(&mut host.cli(&["vm", "adopt", "bad-disk", "--qmp", &hand.qmp_path()]))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && said.contains("mirror"), "a disk that cannot be read: {said:?}");
    must_be_undone(host, &mut hand, "bad-disk")?;
    drop(hand);

    let good = format!("file={},format=raw,if=virtio", file.display());
    let mut hand = ByHand::start(c, host, "cut-short", &[&small[..], &["-drive", &good]].concat())?;
    let task = adopt_slowly(host, &hand, "cut-short")?;
    host.whimbrel(&["task", "cancel", &task])?;
    must_be_undone(host, &mut hand, "cut-short")?;
    let ended = host.whimbrel(&["task", "show", &task])?;
    ensure!(ended["state"] == "cancelled", "the adoption that was cancelled is {ended}");

    adopt_slowly(host, &hand, "cut-short")?;
    host.kill_agent()?;
    host.start_agent(c.program)?;
    must_be_undone(host, &mut hand, "cut-short")?;
    let task = host.whimbrel(&["vm", "adopt", "cut-short", "--qmp", &hand.qmp_path()])?;
    ensure!(task["state"] == "done", "the second adoption ended as {task}");
    host.whimbrel(&["vm", "stop", "cut-short", "--force"])?;
    ensure!(Path::new(&file).exists(), "the disk of whoever started the VM was removed");
    Ok(())
}

/// Begins an adoption whose mirror takes minutes; its task.
fn adopt_slowly(host: &Host, hand: &ByHand, name: &str) -> Result<String> {
    let mut mine = hand.mine()?;
    let started = host.whimbrel(&["vm", "adopt", name, "--qmp", &hand.qmp_path(), "--no-wait"])?;
    let slow = json!({ "device": "whimbrel-mirror0", "speed": 1 << 20 });
    let end = Instant::now() + SOON;
    while mine.execute("block-job-set-speed", slow.clone()).is_err() {
        ensure!(Instant::now() < end, "no mirror was begun");
        std::thread::sleep(Duration::from_millis(2));
    }
    let jobs = mine.execute("query-block-jobs", json!({}))?;
    ensure!(
        jobs.pointer("/0/ready") == Some(&Value::Bool(false)),
        "the mirror was too fast to be cut short: {jobs}"
    );
    Ok(started["task"].as_u64().context("read the task's number")?.to_string())
}

/// QEMU as it was, nothing left in the records.
fn must_be_undone(host: &Host, hand: &mut ByHand, name: &str) -> Result<()> {
    let end = Instant::now() + SOON;
    loop {
        let vms = host.whimbrel(&["vm", "list"])?;
        let volumes = host.whimbrel(&["volume", "list"])?;
        let has = |list: &Value, wanted: &str| {
            list.as_array().into_iter().flatten().any(|one| one["name"].as_str() == Some(wanted))
        };
        if !has(&vms, name) && !has(&volumes, &format!("{name}-disk0")) {
            break;
        }
        ensure!(Instant::now() < end, "{name} was not undone: {vms} {volumes}");
        std::thread::sleep(Duration::from_millis(200));
    }
    hand.must_run()?;
    let mut mine = hand.mine()?;
    let blocks = mine.execute("query-block", json!({}))?;
    ensure!(qmp_text(&blocks, "/0/inserted/drv") == "raw", "its disk is not its own any more: {blocks}");
    let jobs = mine.execute("query-jobs", json!({}))?;
    ensure!(jobs.as_array().is_some_and(Vec::is_empty), "jobs are left: {jobs}");
    let nodes = mine.execute("query-named-block-nodes", json!({}))?.to_string();
    ensure!(!nodes.contains("whimbrel-disk"), "nodes are left: {nodes}");
    Ok(())
}
