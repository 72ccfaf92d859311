//! A volume's file in the hands of other people's programs: fio, dd, cp.

use std::process::Command;

use super::test::{Bench, may_mount};
use crate::export::test_device::RamDevice;

const SIZE: usize = 16 << 20;

/// Runs a tool to its end; fails the test, saying what to install, if it is not there.
fn run_ok(package: &str, program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").arg("120").arg(program).args(args).output().unwrap();
    assert_ne!(output.status.code(), Some(127), "{program} is missing: install the package {package}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn fio_verifies_what_it_wrote_at_depth_and_at_odd_places() {
    if !may_mount() {
        return;
    }
    let mut device = RamDevice::new(SIZE);
    device.slow = Some((8 << 20..9 << 20, std::time::Duration::from_millis(1)));
    let (bench, _device) = Bench::with(device);
    let file = format!("--filename={}", bench.path().display());
    let common = ["--name=v", &file, "--size=16m", "--verify=crc32c", "--verify_state_save=0"];
    let kinds: [&[&str]; 3] = [
        &[
            "--ioengine=libaio",
            "--direct=1",
            "--iodepth=32",
            "--rw=randrw",
            "--bsrange=512-64k",
            "--fsync=64",
        ],
        &["--ioengine=psync", "--rw=randwrite", "--bs=3000", "--fdatasync=16", "--io_size=4m"],
        &["--ioengine=mmap", "--rw=randrw", "--bs=4k", "--fsync=64", "--io_size=8m"],
    ];
    for kind in kinds {
        run_ok("fio", "fio", &[&common[..], kind].concat());
    }
}

#[test]
fn dd_and_cp_take_it_for_a_file() {
    if !may_mount() {
        return;
    }
    let (bench, _device) = Bench::with(RamDevice::new(SIZE));
    let (disk, source) = (bench.path(), bench.dir.path().join("source"));
    let content: Vec<u8> = (0..SIZE as u64)
        .map(|at| if at >> 20 & 1 == 0 { 0 } else { (at.wrapping_mul(0x9e37_79b9) >> 21) as u8 | 1 })
        .collect();
    std::fs::write(&source, &content).unwrap();
    let arg = |name: &str, path: &std::path::Path| format!("{name}={}", path.display());
    let dd = |more: &[&str]| run_ok("coreutils", "dd", &[&["status=none"], more].concat());
    dd(&[&arg("if", &source), &arg("of", &disk), "bs=1000", "count=100", "conv=notrunc,fsync"]);
    dd(&[&arg("if", &source), &arg("of", &disk), "bs=1M", "conv=notrunc,sparse", "oflag=direct"]);
    let copy = bench.dir.path().join("copy");
    dd(&[&arg("if", &disk), &arg("of", &copy), "bs=64k", "iflag=direct"]);
    assert!(std::fs::read(&copy).unwrap() == content);
    std::fs::remove_file(&copy).unwrap();
    let (from, to) = (disk.to_str().unwrap(), copy.to_str().unwrap());
    run_ok("coreutils", "cp", &["--sparse=auto", from, to]);
    assert!(std::fs::read(&copy).unwrap() == content);
    let taken = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&copy).unwrap()) * 512;
    assert!(taken < 9 << 20, "{taken} bytes: holes were written");
}
