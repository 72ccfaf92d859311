//! An attached volume in the hands of other people's NBD programs: libnbd's tools, fio, QEMU's, nbdkit.
//!
//! QEMU 7.2 speaks structured replies, QEMU 10.0 extended headers; libnbd's speak what their version knows. Every program
//! that is missing is a failure with the package's name.
//!
//! Not here: clients that break the rules on purpose (the host crate's tests), speed (`bench/block`).

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Context;
use crate::cmd::{capture, cmd, dying_with_us, find_program, line, output};
use crate::lab::Host;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
/// What hangs is ended, s.
const LIMIT_S: &str = "60";

/// A volume on a socket or a port, and what reaches it.
struct Attached<'a> {
    c: &'a Context<'a>,
    host: &'a Host,
    name: &'a str,
    place: String,
}

impl<'a> Attached<'a> {
    fn new(c: &'a Context<'a>, host: &'a Host, name: &'a str, options: &[&str]) -> Result<Attached<'a>> {
        let shown = host.whimbrel(&[&["volume", "attach", name, "--export", "nbd"], options].concat())?;
        let place = shown["exports"][0].as_str().context("attach says where")?.to_owned();
        Ok(Attached { c, host, name, place })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.name, self.place)
    }

    fn detach(self) -> Result<()> {
        self.host.whimbrel(&["volume", "detach", self.name]).map(drop)
    }

    fn qemu(&self, program: &str, args: &[&str]) -> Result<String> {
        let program = self.c.lab.qemu.program(program);
        capture(&mut limited(&program.to_string_lossy(), args))
    }

    /// Runs lines of Python with a connection `h`, that asked for `base:allocation`.
    fn nbdsh(&self, script: &str) -> Result<String> {
        let connect = format!("h.add_meta_context('base:allocation')\nh.connect_uri('{}')", self.uri());
        tool("nbdsh", &["-c", &connect, "-c", script])
    }
}

fn limited(program: &str, args: &[&str]) -> Command {
    let mut c = cmd("timeout", &[LIMIT_S, program]);
    c.args(args);
    // The system's Python has libnbd's module; another one may come first.
    c.env("PATH", format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default()));
    c
}

/// A program of a package that `install.rs` knows.
fn tool(program: &str, args: &[&str]) -> Result<String> {
    ensure!(find_program(program).is_some(), "{program} is missing: run `cargo xtask test` as root once");
    capture(&mut limited(program, args))
}

/// A file with data, zeros that were written, and holes.
fn patchwork(path: &Path) -> Result<()> {
    let what = || format!("write {}", path.display());
    let file = fs::File::create_new(path).with_context(what)?;
    file.set_len(SIZE).with_context(what)?;
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    for at in 0..SIZE / MIB {
        let mut block = vec![0_u8; MIB as usize];
        match at % 4 {
            0 => continue,
            1 => {}
            _ => {
                // The last quarter of every second block stays zeros.
                let end = if at % 4 == 2 { block.len() } else { block.len() * 3 / 4 };
                for place in block.iter_mut().take(end) {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    *place = (x >> 32) as u8;
                }
            }
        }
        file.write_all_at(&block, at * MIB).with_context(what)?;
    }
    Ok(())
}

fn same(one: &Path, other: &Path) -> Result<()> {
    capture(cmd("cmp", &[]).arg(one).arg(other)).map(drop).context("compare what was copied")
}

/// One program's part; the file is what is copied in and out.
type Step = fn(&Attached<'_>, &Path) -> Result<()>;

/// See the module's charter.
pub(super) fn peers_tools_agree(c: &Context<'_>) -> Result<()> {
    let host = c.lab.hosts().first().context("a lab has hosts")?;
    let dir = c.lab.dir().join("nbd");
    fs::create_dir_all(&dir).context("make a directory")?;
    let source = dir.join("source.raw");
    patchwork(&source)?;
    let name = "tools";
    host.whimbrel(&["volume", "create", name, "--size", &format!("{}M", SIZE / MIB)])?;
    let disk = Attached::new(c, host, name, &[])?;
    let steps: [(&str, Step); 7] = [
        ("nbdinfo", |disk, _| told(disk)),
        ("nbdsh", |disk, _| commands(disk)),
        ("fio", |disk, _| verified(disk)),
        ("fio under limits", |disk, _| limited_rates(disk)),
        ("nbdcopy", copied),
        ("qemu-io and qemu-img", qemu),
        ("clients killed at work", |disk, source| killed(disk, source)),
    ];
    for (what, step) in steps {
        step(&disk, &source).with_context(|| what)?;
    }
    disk.detach()?;
    read_only(c, host, name, &source).context("a read-only export")?;
    over_tls(c, host, name, &source).context("over TLS")?;
    let check = host.whimbrel(&["volume", "check", name])?;
    ensure!(check["problems"].as_array().is_some_and(Vec::is_empty), "{check}");
    host.whimbrel(&["volume", "remove", name])?;
    fs::remove_dir_all(&dir).context("remove the copies")
}

fn told(disk: &Attached<'_>) -> Result<()> {
    let info: Value = serde_json::from_str(&tool("nbdinfo", &["--json", &disk.uri()])?)?;
    let export = &info["exports"][0];
    for can in ["flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache"] {
        ensure!(export[format!("can_{can}")] == true, "can_{can}: {info}");
    }
    ensure!(export["export-size"] == SIZE && export["is_read_only"] == false, "{info}");
    ensure!(export["block_size_minimum"] == 512 && export["block_size_preferred"] == 4096, "{info}");
    ensure!(info["structured"] == true && info["TLS"] == false, "{info}");
    let contexts = export["contexts"].as_array().map(Vec::len);
    ensure!(contexts == Some(1) && export["contexts"][0] == "base:allocation", "{info}");
    let list = tool("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", disk.place)])?;
    ensure!(list.contains(&format!("export=\"{}\"", disk.name)), "{list}");
    let map: Value = serde_json::from_str(&tool("nbdinfo", &["--json", "--map", &disk.uri()])?)?;
    ensure!(map[0]["length"] == SIZE && map[0]["type"] == 3, "an empty volume is one hole: {map}");
    let missing = output(&mut limited("nbdinfo", &[&format!("nbd+unix:///nope?socket={}", disk.place)]))?;
    ensure!(!missing.status.success(), "an export of another name was found");
    Ok(())
}

fn commands(disk: &Attached<'_>) -> Result<()> {
    disk.nbdsh(
        r"
import errno
M = 1 << 20
def status(offset, length):
    found = []
    def note(context, at, entries, error):
        assert context == 'base:allocation'
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, note)
    return found
h.pwrite(b'a' * M, 0, nbd.CMD_FLAG_FUA)
assert status(0, 2 * M) == [(M, 0), (M, 3)], status(0, 2 * M)
# Zeros that take room, and zeros that do not.
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)
assert status(65536, 65536) == [(65536, 0)]
h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert status(65536, 65536) == [(65536, 3)]
h.trim(65536, 131072, nbd.CMD_FLAG_FUA)
assert bytes(h.pread(3 * 65536, 65536)) == bytes(131072) + b'a' * 65536
# Chunks: a hole amid data; not where the client asks for one piece.
pieces = []
h.pread_structured(3 * 65536, 0, lambda buf, at, kind, error: pieces.append((len(buf), at, kind)))
assert sorted(pieces, key=lambda piece: piece[1]) == [
    (65536, 0, nbd.READ_DATA), (131072, 65536, nbd.READ_HOLE)], pieces
pieces.clear()
h.pread_structured(3 * 65536, 0, lambda buf, at, kind, error: pieces.append((len(buf), at, kind)), nbd.CMD_FLAG_DF)
assert pieces == [(3 * 65536, 0, nbd.READ_DATA)], pieces
# What one connection flushed every other one sees.
h.pwrite(b'b' * 4096, 5 * M)
h.flush()
other = nbd.NBD()
other.set_export_name(h.get_export_name())
other.connect_unix('SOCKET')
assert bytes(other.pread(4096, 5 * M)) == b'b' * 4096
other.shutdown()
h.cache(M, 0)
h.set_strict_mode(0)
def fails(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, error
        return
    raise Exception('it worked')
size = h.get_size()
fails(errno.EINVAL, lambda: h.pread(512, size))
fails(errno.ENOSPC, lambda: h.pwrite(b'x' * 512, size))
fails(errno.ENOSPC, lambda: h.zero(1024, size - 512))
fails(errno.EINVAL, lambda: h.trim(1024, size - 512))
fails(errno.EINVAL, lambda: h.pread(100, 0))
fails(errno.ENOTSUP, lambda: h.zero(512, 512, nbd.CMD_FLAG_FAST_ZERO))
fails(errno.ENOTSUP, lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE))
fails(errno.EINVAL, lambda: h.trim(4096, 0, nbd.CMD_FLAG_DF))
assert bytes(h.pread(512, 0)) == b'a' * 512
"
        .replace("SOCKET", &disk.place)
        .as_str(),
    )?;
    Ok(())
}

fn verified(disk: &Attached<'_>) -> Result<()> {
    let uri = format!("--uri={}", disk.uri());
    let common = ["--name=v", "--ioengine=nbd", &uri, "--size=64m", "--verify_state_save=0"];
    let mixed = ["--rw=randrw", "--bsrange=512-128k", "--iodepth=32", "--io_size=96m"];
    let aligned = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--io_size=32m", "--fsync=32"];
    for args in [mixed.as_slice(), aligned.as_slice()] {
        tool("fio", &[&common[..], &["--verify=crc32c", "--do_verify=1"], args].concat())?;
    }
    Ok(())
}

/// All connections together get what the volume's limits say, at once after they change.
fn limited_rates(disk: &Attached<'_>) -> Result<()> {
    let uri = format!("--uri={}", disk.uri());
    let common =
        ["--name=l", "--ioengine=nbd", &uri, "--size=64m", "--rw=randread", "--iodepth=8", "--numjobs=2"];
    let took = |args: &[&str]| {
        let started = Instant::now();
        tool("fio", &[&common[..], args].concat())?;
        Ok::<_, anyhow::Error>(started.elapsed().as_secs_f64())
    };
    // 800 requests, and 20 MiB, in two seconds each.
    let few = ["--bs=4k", "--io_size=1600k"];
    let large = ["--bs=128k", "--io_size=10m"];
    let free = took(&few)? + took(&large)?;
    disk.host.whimbrel(&["volume", "limit", disk.name, "--iops", "400"])?;
    let paced = took(&few)?;
    let shown = disk.host.whimbrel(&["volume", "limit", disk.name, "--bandwidth", "80Mbit"])?;
    ensure!(shown["limits"]["bandwidth_bytes_s"] == 10_000_000, "the volume says {shown}");
    let shaped = took(&large)?;
    disk.host.whimbrel(&["volume", "limit", disk.name])?;
    let lifted = took(&few)? + took(&large)?;
    println!(
        "       800 requests at 400/s took {paced:.1} s, 20 MiB at 80 Mbit/s {shaped:.1} s, without limits {lifted:.1} s"
    );
    for (what, seconds) in [("requests", paced), ("bytes", shaped)] {
        ensure!((1.8..4.0).contains(&seconds), "two seconds' worth of {what} took {seconds:.2} s");
    }
    ensure!(free < 3.0 && lifted < 3.0, "without limits it took {free:.1} s and {lifted:.1} s");
    Ok(())
}

fn copied(disk: &Attached<'_>, source: &Path) -> Result<()> {
    let out = source.with_extension("nbdcopy");
    let (from, to) = (source.to_string_lossy(), out.to_string_lossy());
    for connections in ["--connections=1", "--connections=4"] {
        tool("nbdcopy", &["--flush", connections, "--requests=32", &from, &disk.uri()])?;
        tool("nbdcopy", &[connections, &disk.uri(), &to])?;
        same(source, &out)?;
        fs::remove_file(&out).context("remove a copy")?;
    }
    // Through somebody else's server, which asks in its own way, and late.
    let proxy = source.with_extension("proxy");
    let socket = format!("socket={}", disk.place);
    let export = format!("export={}", disk.name);
    let mut nbdkit = dying_with_us("nbdkit", &["-f", "--filter=delay", "-U"]);
    nbdkit.arg(&proxy).args(["nbd", &socket, &export, "delay-read=2ms", "delay-write=2ms"]);
    let mut child = nbdkit.spawn().with_context(|| format!("start {}", line(&nbdkit)))?;
    let through = format!("nbd+unix:///?socket={}", proxy.display());
    let result = wait_for(&proxy).and_then(|()| tool("nbdcopy", &[&through, &to]));
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().context("wait for nbdkit's end")?;
    result?;
    same(source, &out)?;
    fs::remove_file(&out).context("remove a copy")
}

fn wait_for(path: &Path) -> Result<()> {
    for _ in 0..500 {
        if path.exists() {
            // Bound; listening follows at once.
            std::thread::sleep(Duration::from_millis(100));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("{} does not appear", path.display())
}

fn qemu(disk: &Attached<'_>, source: &Path) -> Result<()> {
    let uri = disk.uri();
    let io = |commands: &[&str]| {
        let args: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        disk.qemu("qemu-io", &[&["-f", "raw"][..], &args, &[&uri]].concat())
    };
    // Exact, then at odd places, which QEMU completes itself; several at once; durable ones.
    let said = io(&[
        "write -P 0x11 0 8M",
        "write -z -u 1M 1M",
        "write -P 0x22 100 5000",
        "write -f -P 0x33 3M 64k",
        "aio_write -P 0x44 4M 1M",
        "aio_write -P 0x55 5M 1M",
        "aio_flush",
        "discard 6M 1M",
        "flush",
        "read -P 0x11 0 100",
        "read -P 0x22 100 5000",
        "read -P 0 1M 1M",
        "read -P 0x33 3M 64k",
        "read -P 0x44 4M 1M",
        "read -P 0x55 5M 1M",
        "read -P 0x11 7M 1M",
    ])?;
    ensure!(!said.contains("verification failed") && !said.contains("error"), "{said}");
    let path = source.to_string_lossy();
    disk.qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &path, &uri])?;
    disk.qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path, &uri])?;
    let out = source.with_extension("qcow2");
    let out_path = out.to_string_lossy();
    disk.qemu("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &out_path])?;
    disk.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &path, &out_path])?;
    fs::remove_file(&out).context("remove a copy")?;
    let map: Value =
        serde_json::from_str(&disk.qemu("qemu-img", &["map", "--output=json", "-f", "raw", &uri])?)?;
    let runs = map.as_array().context("a map is a list")?;
    let data: u64 =
        runs.iter().filter(|run| run["data"] == true).filter_map(|run| run["length"].as_u64()).sum();
    let all: u64 = runs.iter().filter_map(|run| run["length"].as_u64()).sum();
    // Half of the blocks hold data, but for a quarter of every second one of them.
    let wanted = SIZE / MIB / 4 * (MIB + MIB * 3 / 4);
    ensure!(all == SIZE && data == wanted, "{data} bytes of data of {all}, {wanted} were written: {map}");
    Ok(())
}

/// Clients that die with requests under way leave what they had been told of, and others, alone.
fn killed(disk: &Attached<'_>, source: &Path) -> Result<()> {
    let uri = format!("--uri={}", disk.uri());
    for round in 0..4 {
        let offset = format!("--offset={}", SIZE / 2);
        let mut fio = dying_with_us("fio", &["--name=k", "--ioengine=nbd", &uri, "--rw=randrw", "--bs=64k"]);
        fio.args([
            "--thread",
            "--iodepth=64",
            "--size=16m",
            "--time_based",
            "--runtime=30",
            "--fsync=16",
            &offset,
        ]);
        fio.stdout(std::process::Stdio::null());
        let mut child = fio.spawn().with_context(|| format!("start {}", line(&fio)))?;
        std::thread::sleep(Duration::from_millis(600 + 150 * round));
        child.kill().context("kill fio")?;
        child.wait().context("wait for fio's end")?;
    }
    let out = source.with_extension("first-half");
    let script = format!("open('{}', 'wb').write(h.pread(32 << 20, 0))", out.display());
    disk.nbdsh(&script)?;
    let limit = (32 * MIB).to_string();
    capture(cmd("cmp", &["-n", &limit]).arg(source).arg(&out)).context("what no killed client wrote")?;
    fs::remove_file(&out).context("remove a copy")
}

fn read_only(c: &Context<'_>, host: &Host, name: &str, source: &Path) -> Result<()> {
    let disk = Attached::new(c, host, name, &["--read-only"])?;
    let info: Value = serde_json::from_str(&tool("nbdinfo", &["--json", &disk.uri()])?)?;
    let export = &info["exports"][0];
    ensure!(export["is_read_only"] == true && export["can_trim"] == false, "{info}");
    let refused = disk.nbdsh("h.set_strict_mode(0); h.pwrite(b'x' * 512, 0)");
    let said = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(said.contains("Operation not permitted"), "a write was answered with {said:?}");
    let limit = (32 * MIB).to_string();
    let out = source.with_extension("read-only");
    tool("nbdcopy", &[&disk.uri(), &out.to_string_lossy()])?;
    capture(cmd("cmp", &["-n", &limit]).arg(source).arg(&out)).context("compare what was copied")?;
    fs::remove_file(&out).context("remove a copy")?;
    disk.detach()
}

/// Certificates of a member, as QEMU and GnuTLS want them.
fn certificates(of: &Host, dir: &Path) -> Result<PathBuf> {
    let dir = dir.join(of.name());
    fs::create_dir_all(&dir).context("make a directory")?;
    let cluster = of.dir().join("data/cluster");
    for (from, to) in
        [("ca.pem", "ca-cert.pem"), ("host.pem", "client-cert.pem"), ("host.pem", "client-key.pem")]
    {
        fs::copy(cluster.join(from), dir.join(to))
            .with_context(|| format!("copy {from} of {}", of.name()))?;
    }
    Ok(dir)
}

fn over_tls(c: &Context<'_>, host: &Host, name: &str, source: &Path) -> Result<()> {
    let client = c.lab.hosts().get(1).context("a lab has hosts")?;
    let ip = host.peer_address().split(':').next().unwrap_or_default();
    let disk = Attached::new(c, host, name, &["--listen", &format!("{ip}:0")])?;
    let (_, port) = disk.place.rsplit_once(':').context("nbds://IP:PORT/NAME")?;
    let port = port.split('/').next().unwrap_or_default();
    let dir = source.parent().context("a file is in a directory")?;
    // Else QEMU demands "key encipherment" of keys that cannot encipher.
    let creds = format!(
        "tls-creds-x509,id=t0,endpoint=client,sanity-check=off,dir={}",
        certificates(client, dir)?.display()
    );
    let image = format!(
        "driver=nbd,server.type=inet,server.host={ip},server.port={port},export={name},tls-creds=t0,\
         tls-hostname={}",
        host.name()
    );
    let qemu_io = c.lab.qemu.program("qemu-io");
    let run = |args: &[&str]| {
        let mut command = client.command(Path::new("timeout"));
        command.arg(LIMIT_S).arg(&qemu_io).args(args);
        output(&mut command)
    };
    let write = ["-c", "write -f -P 0x77 0 4M", "-c", "read -P 0x77 0 4M", "-c", "write -z 0 4M"];
    let out = run(&[&["--object", &creds, "--image-opts", &image][..], &write].concat())?;
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    ensure!(out.status.success() && !said.contains("failed"), "{said}");
    // Without TLS nothing is told, not even whether the export exists.
    let plain = image.split(",tls-creds").next().unwrap_or_default();
    let out = run(&["--image-opts", plain, "-c", "read 0 512"])?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && said.contains("TLS"), "without TLS: {said:?}");
    disk.detach()
}
