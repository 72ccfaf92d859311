//! What others wrote, read by us, and what we wrote, read by others: QEMU's tools and libvhdi's.

use std::process::{Command, Output};

use super::test::{Bench, MIB, Numbers, all, lay};

/// Runs a program in the bench's directory.
fn run(bench: &Bench, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    let output = command.args(args).current_dir(bench.dir.path()).output();
    output.unwrap_or_else(|error| panic!("run {program} (cargo xtask test installs it): {error}"))
}

fn must(bench: &Bench, program: &str, args: &[&str]) -> String {
    let output = run(bench, program, args);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {said}");
    said
}

/// A file as QEMU reads it.
fn by_qemu(bench: &Bench, name: &str) -> Vec<u8> {
    must(bench, "qemu-img", &["convert", "-f", "vhdx", "-O", "raw", name, "by-qemu.raw"]);
    std::fs::read(bench.path("by-qemu.raw")).unwrap()
}

/// A chain, uppermost first, as libvhdi reads it. Its library opens one file and is given its parent.
const LIBVHDI: &str = r"
import sys, pyvhdi
below, kept = None, []
for name in reversed(sys.argv[2:]):
    file = pyvhdi.file()
    kept.append(file)
    file.open(name)
    if below is not None:
        file.set_parent(below)
    below = file
with open(sys.argv[1], 'wb') as out:
    size, at = below.get_media_size(), 0
    while at < size:
        below.seek_offset(at, 0)
        piece = below.read_buffer(min(1 << 20, size - at))
        out.write(piece)
        at += len(piece)
";

fn by_libvhdi(bench: &Bench, chain: &[&str]) -> Result<Vec<u8>, String> {
    let args = [&["-c", LIBVHDI, "by-libvhdi.raw"], chain].concat();
    let output = run(bench, "/usr/bin/python3", &args);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(std::fs::read(bench.path("by-libvhdi.raw")).unwrap())
}

#[test]
fn files_that_qemu_wrote_are_read() {
    let bench = Bench::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for (name, options) in [
        ("small.vhdx", "subformat=dynamic,block_size=1M"),
        ("zero.vhdx", "subformat=dynamic,block_size=2M,block_state_zero=off"),
        ("large.vhdx", "subformat=dynamic,block_size=256M"),
        ("fixed.vhdx", "subformat=fixed,block_size=1M,log_size=4M"),
    ] {
        must(&bench, "qemu-img", &["create", "-q", "-f", "vhdx", "-o", options, name, "37M"]);
        let mut expected = vec![0; 37 * MIB];
        let mut args = vec!["-f".to_owned(), "vhdx".to_owned()];
        for (offset, bytes) in numbers.pieces(37 << 20, 12) {
            args.extend(["-c".to_owned(), format!("write -P {} {offset} {}", bytes[0], bytes.len())]);
            lay(&mut expected, &[(offset, bytes)]);
        }
        args.push(name.to_owned());
        must(&bench, "qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
        let disk = bench.open(name).unwrap();
        assert!(all(&disk) == expected, "{name}");
        assert!(by_qemu(&bench, name) == expected, "{name} by QEMU itself");
    }
}

/// QEMU is made to fail where it carries out what it has written into the log, and ends there: the log is all that knows
/// of the second write. Read-only, QEMU refuses such a file; libvhdi reads it as if nothing had been written.
#[test]
fn a_log_that_qemu_left_behind_is_replayed() {
    let bench = Bench::new();
    let options = "subformat=dynamic,block_size=1M";
    must(&bench, "qemu-img", &["create", "-q", "-f", "vhdx", "-o", options, "dirty.vhdx", "64M"]);
    must(&bench, "qemu-io", &["-f", "vhdx", "-c", "write -P 0x33 5M 64k", "dirty.vhdx"]);
    // The table of such a file begins at 2 MiB.
    let failing = r#"json:{"driver":"vhdx","file":{"driver":"blkdebug","inject-error":[
        {"event":"none","iotype":"write","sector":4096,"errno":5}],"image":{"driver":"file","filename":"dirty.vhdx"}}}"#;
    run(&bench, "qemu-io", &["-c", "write -P 0x44 20M 64k", "-c", "abort", failing]);
    let mut expected = vec![0; 64 * MIB];
    expected[5 * MIB..5 * MIB + (64 << 10)].fill(0x33);
    let stale = expected.clone();
    expected[20 * MIB..20 * MIB + (64 << 10)].fill(0x44);

    let refused = run(&bench, "qemu-img", &["convert", "-f", "vhdx", "-O", "raw", "dirty.vhdx", "x.raw"]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("log that needs to be replayed"),
        "no dirty log"
    );
    assert!(by_libvhdi(&bench, &["dirty.vhdx"]).unwrap() == stale, "libvhdi replays logs now");
    let before = std::fs::read(bench.path("dirty.vhdx")).unwrap();
    assert!(all(&bench.open("dirty.vhdx").unwrap()) == expected, "as after the replay");
    assert!(std::fs::read(bench.path("dirty.vhdx")).unwrap() == before, "the file was not touched");
    must(&bench, "qemu-img", &["check", "-q", "-f", "vhdx", "-r", "all", "dirty.vhdx"]);
    assert!(by_qemu(&bench, "dirty.vhdx") == expected, "QEMU's own replay");
    assert!(all(&bench.open("dirty.vhdx").unwrap()) == expected);
}

#[test]
fn files_that_we_wrote_are_read_by_qemu_and_libvhdi() {
    let bench = Bench::new();
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    for (name, size) in [("a.vhdx", (33 << 20) + 512), ("b.vhdx", 512), ("c.vhdx", 4 << 20)] {
        let pieces = numbers.pieces(size, 15);
        bench.write(name, size, None, &pieces);
        let mut expected = vec![0; size as usize];
        lay(&mut expected, &pieces);
        must(&bench, "qemu-img", &["check", "-q", "-f", "vhdx", name]);
        std::fs::write(bench.path("expected.raw"), &expected).unwrap();
        must(&bench, "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", "expected.raw", name]);
        assert!(by_libvhdi(&bench, &[name]).unwrap() == expected, "{name}");
        let said = must(&bench, "vhdiinfo", &[name]);
        assert!(
            said.contains("VHDX") && said.contains("Dynamic") && said.contains(&format!("{size} bytes")),
            "{said}"
        );
        // QEMU writes on, and the ids are its own from then on.
        let before = bench.open(name).unwrap().top().unwrap().header().clone();
        must(&bench, "qemu-io", &["-f", "vhdx", "-c", "read 0 512", name]);
        assert_eq!(*bench.open(name).unwrap().top().unwrap().header(), before, "reading changes nothing");
        must(&bench, "qemu-io", &["-f", "vhdx", "-c", "write -P 0x5a 0 512", name]);
        expected[..512].fill(0x5a);
        let disk = bench.open(name).unwrap();
        assert!(all(&disk) == expected, "{name}, written on by QEMU");
        let after = disk.top().unwrap().header();
        assert!(after.data_write_id != before.data_write_id && after.file_write_id != before.file_write_id);
    }
}

#[test]
fn chains_that_we_wrote_are_read_by_libvhdi_and_a_changed_parent_is_refused_by_both() {
    let bench = Bench::new();
    let size = 37 << 20;
    // The lowest file is QEMU's, as in practice it is somebody else's.
    must(&bench, "qemu-img", &["create", "-q", "-f", "vhdx", "-o", "block_size=8M", "base.vhdx", "37M"]);
    must(&bench, "qemu-io", &["-f", "vhdx", "-c", "write -P 0x11 1M 9M", "base.vhdx"]);
    let mut expected = vec![0; size as usize];
    expected[MIB..10 * MIB].fill(0x11);
    let mut numbers = Numbers(0xd1b5_4a32_d192_ed03);
    let mut chain = vec!["base.vhdx"];
    for name in ["one.vhdx", "two.vhdx"] {
        // Whole blocks, single sectors, and zeros over what is there.
        let mut pieces = numbers.pieces(size / 2, 10);
        pieces.push((20 << 20, vec![0x77; 4 << 20]));
        bench.write(name, size, chain.first().copied(), &pieces);
        lay(&mut expected, &pieces);
        chain.insert(0, name);
        assert!(all(&bench.open(name).unwrap()) == expected, "{name}");
        assert!(by_libvhdi(&bench, &chain).unwrap() == expected, "{name} by libvhdi");
        let said = must(&bench, "vhdiinfo", &[name]);
        assert!(said.contains("Differential") || said.contains("Differencing"), "{said}");
        assert!(said.contains("Parent identifier"), "{said}");
    }
    must(&bench, "qemu-io", &["-f", "vhdx", "-c", "write -P 0x99 30M 512", "base.vhdx"]);
    assert!(by_libvhdi(&bench, &chain).unwrap_err().contains("mismatch in identifier"));
    let error = bench.refusal("two.vhdx");
    assert_eq!(error.kind(), crate::error::ErrorKind::Refused, "{error}");
}
