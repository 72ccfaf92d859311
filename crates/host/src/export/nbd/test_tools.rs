//! The NBD server against clients that are not ours: libnbd's tools, QEMU's, fio.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use super::{NbdOptions, NbdServer};
use crate::block_dev::BlockRead;
use crate::export::DeviceSlot;
use crate::export::test_device::RamDevice;

const SIZE: usize = 16 << 20;

struct Bench {
    dir: tempfile::TempDir,
    device: Arc<RamDevice>,
    server: NbdServer,
}

impl Bench {
    fn start() -> Self {
        let mut device = RamDevice::new(SIZE);
        device.slow = Some((8 << 20..9 << 20, Duration::from_millis(2)));
        Self::with(device, NbdOptions { name: "disk".into(), ..NbdOptions::default() })
    }

    fn with(device: RamDevice, options: NbdOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Arc::new(device);
        let slot = DeviceSlot::active(device.clone());
        let server = NbdServer::start(&dir.path().join("nbd.sock"), slot, options).unwrap();
        Self { dir, device, server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    fn disk(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        self.device.read(0, &mut [std::io::IoSliceMut::new(&mut bytes)]).unwrap();
        bytes
    }
}

/// Runs a tool to its end; fails the test, saying what to install, if it is not there.
fn run(package: &str, program: &str, args: &[&str]) -> Output {
    // The system's Python has libnbd's module; another one may come first.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let output =
        Command::new("timeout").arg("120").arg(program).args(args).env("PATH", path).output().unwrap();
    assert_ne!(output.status.code(), Some(127), "{program} is missing: install the package {package}");
    output
}

fn run_ok(package: &str, program: &str, args: &[&str]) -> String {
    let output = run(package, program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn nbdinfo_sees_what_is_offered_and_where_data_is() {
    let bench = Bench::start();
    let write = format!("h.connect_uri('{}'); h.pwrite(b'x' * 65536, 1048576)", bench.uri());
    run_ok("python3-libnbd", "nbdsh", &["-c", &write]);
    let info = run_ok("libnbd-bin", "nbdinfo", &["--json", &bench.uri()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE as u64);
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_cache"] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(info["structured"], true);
    let map = run_ok("libnbd-bin", "nbdinfo", &["--json", "--map", &bench.uri()]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let runs: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|run| {
            let field = |name: &str| run[name].as_u64().unwrap();
            (field("offset"), field("length"), field("type"))
        })
        .collect();
    assert_eq!(runs, vec![(0, 1 << 20, 3), (1 << 20, 65536, 0), ((1 << 20) + 65536, (15 << 20) - 65536, 3)]);
    let list = run_ok(
        "libnbd-bin",
        "nbdinfo",
        &["--list", &format!("nbd+unix:///?socket={}", bench.socket().display())],
    );
    assert!(list.contains("export=\"disk\""), "{list}");
}

#[test]
fn every_command_does_what_it_says() {
    let bench = Bench::start();
    // At a place that is done at once, and at one that waits.
    let script = "
for at in (0, 8 << 20):
    h.pwrite(b'abcd' * 1024, at + 4096, nbd.CMD_FLAG_FUA)
    assert bytes(h.pread(4096, at + 4096)) == b'abcd' * 1024
    h.pwrite(b'q' * (3 << 20), at)
    assert bytes(h.pread(3 << 20, at)) == b'q' * (3 << 20)
    h.zero(8192, at + 512)
    h.trim(4096, at + 65536, nbd.CMD_FLAG_FUA)
    want = bytearray(b'q' * (3 << 20))
    want[512:512 + 8192] = bytes(8192)
    want[65536:65536 + 4096] = bytes(4096)
    assert bytes(h.pread(3 << 20, at)) == bytes(want)
    h.cache(1 << 20, at)
h.flush()
";
    let connect = format!("h.connect_uri('{}')", bench.uri());
    run_ok("python3-libnbd", "nbdsh", &["-c", &connect, "-c", script]);
    assert!(*bench.device.flushes.lock() >= 5);
}

#[test]
fn wrong_requests_fail_alone() {
    let mut device = RamDevice::new(SIZE);
    device.bad = 4096..8192;
    let bench = Bench::with(device, NbdOptions { name: "disk".into(), ..NbdOptions::default() });
    let script = "
h.set_strict_mode(0)
def fails(errno, f):
    try:
        f()
    except nbd.Error as error:
        assert error.errnum == errno, error
        return
    raise Exception('it worked')
import errno
fails(errno.EIO, lambda: h.pread(4096, 4096))
fails(errno.EIO, lambda: h.pwrite(b'x' * 4096, 4096))
fails(errno.EINVAL, lambda: h.pread(4096, (16 << 20) - 512))
fails(errno.ENOSPC, lambda: h.pwrite(b'x' * 4096, (16 << 20) - 512))
fails(errno.EINVAL, lambda: h.pread(100, 0))
fails(errno.EINVAL, lambda: h.pread(512, 100))
fails(errno.ENOSPC, lambda: h.zero(512, 1 << 62))
assert bytes(h.pread(512, 0)) == bytes(512)
";
    let connect = format!("h.connect_uri('{}')", bench.uri());
    run_ok("python3-libnbd", "nbdsh", &["-c", &connect, "-c", script]);
}

#[test]
fn a_read_only_export_is_not_written() {
    let options = NbdOptions { read_only: true, name: "disk".into(), ..NbdOptions::default() };
    let bench = Bench::with(RamDevice::new(SIZE), options);
    let info = run_ok("libnbd-bin", "nbdinfo", &["--json", &bench.uri()]);
    assert!(info.contains("\"is_read_only\": true"), "{info}");
    let script = format!("h.set_strict_mode(0); h.connect_uri('{}'); h.pwrite(b'x' * 512, 0)", bench.uri());
    let output = run("python3-libnbd", "nbdsh", &["-c", &script]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("Operation not permitted"));
    assert!(bench.disk().iter().all(|byte| *byte == 0));
}

#[test]
fn nbdcopy_copies_in_and_out_over_several_connections() {
    let bench = Bench::start();
    let (from, to) = (bench.dir.path().join("from"), bench.dir.path().join("to"));
    let content: Vec<u8> = (0..SIZE as u64).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 21) as u8).collect();
    std::fs::write(&from, &content).unwrap();
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    run_ok("libnbd-bin", "nbdcopy", &["--flush", "--connections=4", from, &bench.uri()]);
    assert!(bench.disk() == content);
    run_ok("libnbd-bin", "nbdcopy", &["--connections=4", &bench.uri(), to]);
    assert!(std::fs::read(to).unwrap() == content);
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    let bench = Bench::start();
    let uri = format!("--uri={}", bench.uri());
    let args = ["--name=v", "--ioengine=nbd", &uri, "--rw=randrw", "--bsrange=4k-64k", "--iodepth=32"];
    let verify = ["--verify=crc32c", "--size=16m", "--io_size=24m", "--fsync=64", "--verify_state_save=0"];
    run_ok("fio", "fio", &[&args[..], &verify[..]].concat());
}

#[test]
fn requests_wait_for_the_disk_and_the_service_ends_with_clients_connected() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let slot = DeviceSlot::standby(SIZE as u64);
    let server = NbdServer::start(&socket, slot.clone(), NbdOptions::default()).unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let reader = std::thread::spawn(move || {
        let script = format!("h.connect_uri('{uri}'); h.pread(4096, 0)");
        run_ok("python3-libnbd", "nbdsh", &["-c", &script])
    });
    std::thread::sleep(Duration::from_millis(200));
    assert!(!reader.is_finished());
    slot.activate(Arc::new(RamDevice::new(SIZE))).unwrap();
    reader.join().unwrap();
    let _idle = UnixStream::connect(&socket).unwrap();
    while server.connections() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    server.stop().unwrap();
    assert!(!socket.exists());
}

#[test]
fn who_connects_anew_sees_that_a_disk_became_larger_and_who_is_connected_works_on() {
    let bench = Bench::start();
    let script = format!(
        "
import time
old, new = {SIZE}, {}
assert h.get_size() == old
open('{}', 'w').close()
for _ in range(1000):
    other = nbd.NBD()
    other.connect_uri('{}')
    if other.get_size() > old:
        break
    time.sleep(0.01)
assert other.get_size() == new, other.get_size()
assert bytes(other.pread(new - old, old)) == bytes(new - old)
other.pwrite(b'z' * 4096, new - 4096)
other.flush()
assert h.get_size() == old
h.pwrite(b'y' * 4096, old - 4096)
assert bytes(other.pread(4096, old - 4096)) == b'y' * 4096
h.set_strict_mode(0)
assert bytes(h.pread(4096, new - 4096)) == b'z' * 4096
",
        2 * SIZE,
        bench.socket().with_extension("ready").display(),
        bench.uri()
    );
    let ready = bench.socket().with_extension("ready");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while !ready.exists() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            bench.device.grow(2 * SIZE);
            bench.server.slot().grow(2 * SIZE as u64);
        });
        let connect = format!("h.connect_uri('{}')", bench.uri());
        run_ok("python3-libnbd", "nbdsh", &["-c", &connect, "-c", &script]);
    });
}
