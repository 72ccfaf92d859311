//! Formats by a real qemu-img, and files that name others.

use std::io::{IoSliceMut, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;

use tempfile::TempDir;

use super::*;

const MIB: usize = 1 << 20;

struct Bench {
    dir: TempDir,
    converter: Converter,
}

impl Bench {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        let mut config = ConvertConfig::new(&dir.path().join("work"));
        config.backing_dir = Some(dir.path().join("images"));
        Self { converter: Converter::new(config).unwrap(), dir }
    }
    fn image(&self, name: &str) -> PathBuf {
        self.dir.path().join("images").join(name)
    }
    fn open(&self, name: &str, format: Option<Format>) -> Result<Arc<dyn BlockRead>> {
        self.converter.open(&self.image(name), format, &mut |_, _| Ok(()))
    }
    /// A raw file: 1 MiB of data, a hole, data across a block's edge, a hole.
    fn raw(&self, name: &str) -> Vec<u8> {
        let mut bytes = vec![0u8; 16 * MIB];
        for (n, byte) in bytes[..MIB].iter_mut().enumerate() {
            *byte = (n * 7 % 251) as u8 + 1;
        }
        bytes[5 * MIB - 700..5 * MIB + 9000].fill(0x5a);
        let file = std::fs::File::create(self.image(name)).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&bytes[..MIB], 0).unwrap();
        file.write_all_at(&bytes[5 * MIB - 700..5 * MIB + 9000], 5 * MIB as u64 - 700).unwrap();
        bytes
    }
    fn qemu_img(&self, args: &[&str]) {
        let output =
            Command::new("qemu-img").args(args).current_dir(self.dir.path().join("images")).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    fn work_is_empty(&self) -> bool {
        std::fs::read_dir(self.dir.path().join("work/convert")).is_ok_and(|mut dir| dir.next().is_none())
    }
    fn refusal(&self, name: &str, format: Format) -> Error {
        let error = error_of(self.open(name, Some(format)));
        assert!(self.work_is_empty());
        error
    }
}

fn error_of<T>(result: Result<T>) -> Error {
    result.err().expect("an error")
}

fn all(disk: &dyn BlockRead) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size_bytes() as usize];
    disk.read(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    // What is said to be a hole reads as zeros.
    let mut at = 0;
    while at < disk.size_bytes() {
        let extent = disk.extent(at).unwrap();
        assert!(extent.length > 0);
        let end = (at + extent.length) as usize;
        assert!(extent.data || bytes[at as usize..end].iter().all(|byte| *byte == 0), "hole at {at}");
        at = end as u64;
    }
    bytes
}

#[test]
fn raw_files_are_read_as_they_are_with_their_holes() {
    let bench = Bench::new();
    let bytes = bench.raw("disk.img");
    let source = bench.open("disk.img", None).unwrap();
    assert_eq!(all(&*source), bytes);
    assert!(!source.extent(2 * MIB as u64).unwrap().data);
    // A length that is no multiple of 512 is rounded up with zeros.
    std::fs::write(bench.image("odd.raw"), b"whimbrel").unwrap();
    let odd = all(&*bench.open("odd.raw", None).unwrap());
    assert_eq!(
        (odd.len(), &odd[..8], odd[8..].iter().all(|byte| *byte == 0)),
        (512, b"whimbrel".as_slice(), true)
    );
    let mut beyond = [0; 512];
    assert!(source.read(source.size_bytes(), &mut [IoSliceMut::new(&mut beyond)]).is_err());
}

#[test]
fn every_format_goes_out_and_comes_back_the_same() {
    let bench = Bench::new();
    let bytes = bench.raw("disk.raw");
    let disk = bench.open("disk.raw", None).unwrap();
    for format in Format::ALL {
        let name = format!("out.{format}");
        let mut seen = 0;
        let export = |to: &Path, seen: &mut u64| {
            bench.converter.export(&*disk, to, &ExportAs::whole(format), &mut |done, _| {
                *seen = done;
                Ok(())
            })
        };
        export(&bench.image(&name), &mut seen).unwrap();
        assert_eq!(seen, bytes.len() as u64);
        let again = export(&bench.image(&name), &mut seen).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        let source = bench.open(&name, None).unwrap();
        assert!(all(&*source) == bytes, "{format}");
        assert!(!source.extent(8 * MIB as u64).unwrap().data, "{format}: holes stay holes");
    }
    assert!(bench.work_is_empty());
    assert_eq!(
        std::fs::read_dir(bench.dir.path().join("images")).unwrap().count(),
        5,
        "nothing partial is left"
    );
}

#[test]
fn compressed_images_with_backing_files_in_the_allowed_directory_are_read() {
    let bench = Bench::new();
    let bytes = bench.raw("base.raw");
    bench.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "mid.qcow2"]);
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 0x77 3M 64k"])
        .arg(bench.image("top.qcow2"))
        .output()
        .unwrap();
    assert!(output.status.success());
    let mut expected = bytes.clone();
    expected[3 * MIB..3 * MIB + (64 << 10)].fill(0x77);
    // Only root may read them; the converter runs as somebody else all the same.
    for name in ["mid.qcow2", "top.qcow2"] {
        std::fs::set_permissions(bench.image(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    assert!(all(&*bench.open("top.qcow2", None).unwrap()) == expected);
    bench.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=ext.raw,data_file_raw=on",
        "data.qcow2",
        "4M",
    ]);
    assert_eq!(all(&*bench.open("data.qcow2", None).unwrap()).len(), 4 * MIB);
    assert!(bench.work_is_empty());
}

#[test]
fn names_in_an_image_that_lead_elsewhere_are_refused() {
    let bench = Bench::new();
    bench.raw("base.raw");
    let outside = bench.dir.path().join("secret.raw");
    std::fs::write(&outside, [1u8; 4096]).unwrap();
    std::os::unix::fs::symlink(&outside, bench.image("link.raw")).unwrap();
    let outside = outside.to_str().unwrap();
    let json =
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{outside}\"}}}}");
    for (name, backing) in [
        ("absolute.qcow2", outside),
        ("up.qcow2", "../secret.raw"),
        ("link.qcow2", "link.raw"),
        ("json.qcow2", json.as_str()),
        ("nbd.qcow2", "nbd://127.0.0.1/x"),
        ("file.qcow2", "file:base.raw"),
        ("missing.qcow2", "nothing.raw"),
    ] {
        bench.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name, "4M"]);
        let error = bench.refusal(name, Format::Qcow2);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{name}: {error}");
        assert!(error.to_string().contains("backing file"), "{name}: {error}");
    }
    // A data file elsewhere, in a header written over by hand: the name keeps its length.
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=0123456789012.raw", "data.qcow2", "4M"]);
    let mut bytes = std::fs::read(bench.image("data.qcow2")).unwrap();
    let at = bytes.windows(17).position(|window| window == b"0123456789012.raw").unwrap();
    bytes[at..at + 17].copy_from_slice(b"../../etc/passwd\0");
    std::fs::write(bench.image("data.qcow2"), &bytes).unwrap();
    assert!(bench.refusal("data.qcow2", Format::Qcow2).to_string().contains("data file"));
    bytes[at..at + 17].copy_from_slice(b"../././secret.raw");
    std::fs::write(bench.image("data.qcow2"), &bytes).unwrap();
    assert!(bench.refusal("data.qcow2", Format::Qcow2).to_string().contains("outside"));
    // The format of a backing file is not guessed.
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "guess.qcow2"]);
    let mut bytes = std::fs::read(bench.image("guess.qcow2")).unwrap();
    let at = bytes.windows(4).position(|window| window == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0x12;
    std::fs::write(bench.image("guess.qcow2"), &bytes).unwrap();
    assert!(bench.refusal("guess.qcow2", Format::Qcow2).to_string().contains("does not state the format"));
    // VMDK whose extents are other files.
    let flat =
        "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"/etc/passwd\" 0\n";
    std::fs::write(bench.image("flat.vmdk"), flat).unwrap();
    assert_eq!(bench.refusal("flat.vmdk", Format::Vmdk).kind(), ErrorKind::Unsupported);
    // Without a directory for them, backing files are refused altogether.
    let bare = Converter::new(ConvertConfig::new(&bench.dir.path().join("work"))).unwrap();
    bench.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "good.qcow2"]);
    let error = error_of(bare.open(&bench.image("good.qcow2"), None, &mut |_, _| Ok(())));
    assert!(error.to_string().contains("no directory"), "{error}");
}

#[test]
fn vhdx_files_are_written_over_others_and_read_through_them_where_that_is_allowed() {
    let bench = Bench::new();
    let mut bytes = bench.raw("disk.raw");
    let disk = bench.open("disk.raw", None).unwrap();
    let quiet: Progress<'_> = &mut |_, _| Ok(());
    let id = uuid::Uuid::from_u128(7);
    let base = ExportAs { disk_id: Some(id), ..ExportAs::whole(Format::Vhdx) };
    bench.converter.export(&*disk, &bench.image("base.vhdx"), &base, quiet).unwrap();
    // Data over data, over nothing, and zeros over data.
    bytes[100..5000].fill(0x33);
    bytes[9 * MIB..9 * MIB + 700].fill(0x44);
    bytes[MIB / 2..MIB].fill(0);
    std::fs::write(bench.image("changed.raw"), &bytes).unwrap();
    let changed = bench.open("changed.raw", None).unwrap();
    std::fs::create_dir(bench.image("sub")).unwrap();
    let child = bench.image("sub/child.vhdx");
    let over = |format, parent: &str| ExportAs {
        parent: Some(ParentFile { file: bench.image(parent), disk: None }),
        ..ExportAs::whole(format)
    };
    bench.converter.export(&*changed, &child, &over(Format::Vhdx, "base.vhdx"), quiet).unwrap();
    assert!(all(&*bench.open("sub/child.vhdx", None).unwrap()) == bytes);
    let opened = bench.converter.open_vhdx(&child).unwrap();
    assert!(opened.files().iter().all(|file| file.disk_id() == Some(id)), "one identity");
    let taken: u64 = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&child).unwrap()) * 512;
    assert!(taken < 512 << 10, "what changed takes {taken} bytes");
    // A chain of three: nothing changed, nothing is written.
    let same = bench.image("same.vhdx");
    bench.converter.export(&*changed, &same, &over(Format::Vhdx, "sub/child.vhdx"), quiet).unwrap();
    assert_eq!(bench.converter.open_vhdx(&same).unwrap().files().len(), 3);
    assert!(all(&*bench.open("same.vhdx", None).unwrap()) == bytes);
    // Another format, another size, no directory for parents, a parent outside of it.
    let to = bench.image("no.vhdx");
    let error = bench.converter.export(&*changed, &to, &over(Format::Raw, "base.vhdx"), quiet).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    std::fs::write(bench.image("small.raw"), [1; 512]).unwrap();
    let small = bench.open("small.raw", None).unwrap();
    let error = bench.converter.export(&*small, &to, &over(Format::Vhdx, "base.vhdx"), quiet).unwrap_err();
    assert!(error.to_string().contains("16777216"), "{error}");
    let names = std::fs::read_dir(bench.image("")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(
        names.into_iter().all(|name| !name.to_string_lossy().contains("no.vhdx")),
        "nothing partial is left"
    );
    let bare = Converter::new(ConvertConfig::new(&bench.dir.path().join("work"))).unwrap();
    let error = error_of(bare.open(&child, None, quiet));
    assert!(error.to_string().contains("no directory"), "{error}");
    assert!(bare.open(&bench.image("base.vhdx"), None, quiet).is_ok());
    std::fs::rename(bench.image("base.vhdx"), bench.dir.path().join("base.vhdx")).unwrap();
    std::os::unix::fs::symlink(bench.dir.path().join("base.vhdx"), bench.image("base.vhdx")).unwrap();
    assert!(
        error_of(bench.open("sub/child.vhdx", None)).to_string().contains("outside the allowed directory")
    );
}

#[test]
fn an_export_that_is_cancelled_leaves_nothing() {
    let bench = Bench::new();
    bench.raw("disk.raw");
    let disk = bench.open("disk.raw", None).unwrap();
    for format in Format::ALL {
        let to = bench.image(&format!("out.{format}"));
        let mut left = 3;
        let cancel = bench.converter.export(&*disk, &to, &ExportAs::whole(format), &mut |_, _| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(Error::new(ErrorKind::Cancelled, "stop")) }
        });
        assert_eq!(cancel.unwrap_err().kind(), ErrorKind::Cancelled, "{format}");
    }
    assert_eq!(std::fs::read_dir(bench.image("")).unwrap().count(), 1, "nothing partial is left");
    assert!(bench.work_is_empty());
}

#[test]
fn files_that_are_cut_off_or_damaged_or_mislabelled_fail_with_words_that_help() {
    let bench = Bench::new();
    bench.raw("disk.raw");
    for format in [Format::Qcow2, Format::Vhdx, Format::Vmdk] {
        let name = format!("whole.{format}");
        bench.qemu_img(&["convert", "-f", "raw", "-O", format.as_str(), "disk.raw", &name]);
        let bytes = std::fs::read(bench.image(&name)).unwrap();
        let cut = format!("cut.{format}");
        for length in [0, 3, 100, 70_000, bytes.len() / 2, bytes.len() - (600 << 10)] {
            std::fs::write(bench.image(&cut), &bytes[..length]).unwrap();
            let error = bench.refusal(&cut, format);
            let good =
                matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::InvalidInput | ErrorKind::Unsupported);
            assert!(good, "{format} cut to {length}: {:?} {error}", error.kind());
            assert!(error.to_string().contains(&cut), "{error}");
        }
        // Random bytes where the tables are: an error or the wrong bytes, never a panic or a hang.
        for at in (0..bytes.len().min(4 << 20)).step_by(bytes.len() / 6) {
            let mut bad = bytes.clone();
            for (n, byte) in bad[at..].iter_mut().take(4096).enumerate() {
                *byte = (n * 31 + at) as u8;
            }
            std::fs::write(bench.image(&cut), &bad).unwrap();
            let _ = bench.open(&cut, Some(format));
        }
        // Another format than stated.
        let error = bench.refusal("disk.raw", format);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    std::fs::copy(bench.image("whole.qcow2"), bench.image("cloud.img")).unwrap();
    let error = error_of(bench.open("cloud.img", None));
    assert!(error.to_string().contains("begins like qcow2"), "{error}");
    assert!(bench.open("cloud.img", Some(Format::Raw)).is_ok(), "stated is stated");
    assert!(bench.open("whole.qcow2", Some(Format::Raw)).is_ok());
    assert!(bench.open("cloud.tar", None).is_err());
    assert_eq!(error_of(bench.open("nothing.raw", None)).kind(), ErrorKind::NotFound);
    assert!(bench.work_is_empty());
}

#[test]
fn a_conversion_that_takes_too_long_or_is_cancelled_ends_and_leaves_nothing() {
    let bench = Bench::new();
    bench.raw("disk.raw");
    bench.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let image = bench.image("disk.qcow2");
    let cancel =
        bench.converter.open(&image, None, &mut |_, _| Err(Error::new(ErrorKind::Cancelled, "stop")));
    assert_eq!(error_of(cancel).kind(), ErrorKind::Cancelled);
    let mut config = ConvertConfig::new(&bench.dir.path().join("work"));
    config.time_limit_s = 0;
    let hurried = Converter::new(config).unwrap().open(&image, None, &mut |_, _| Ok(()));
    assert!(hurried.is_err());
    assert!(bench.work_is_empty());
}

#[test]
fn what_a_crash_left_is_swept_and_what_is_in_use_is_not() {
    let bench = Bench::new();
    bench.raw("disk.raw");
    bench.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let in_use = bench.open("disk.qcow2", None).unwrap();
    let left = bench.dir.path().join("work/convert/left");
    std::fs::create_dir(&left).unwrap();
    std::fs::File::create(left.join("disk.raw")).unwrap().write_all(b"x").unwrap();
    let _ = Converter::new(ConvertConfig::new(&bench.dir.path().join("work"))).unwrap();
    assert!(!left.exists());
    assert_eq!(all(&*in_use).len(), 16 * MIB);
    assert!(!bench.work_is_empty());
    drop(in_use);
    assert!(bench.work_is_empty());
}

#[test]
fn the_converter_is_not_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // Its own report of the process is the only honest witness: a file that only root may read stays closed to it.
    let bench = Bench::new();
    let secret = bench.image("secret.raw");
    std::fs::write(&secret, [7u8; 4096]).unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let config = ConvertConfig::new(&bench.dir.path().join("work"));
    let path = secret.to_str().unwrap();
    let output = run::qemu_img(&config, &["info", "-f", "raw", path], &[], 1 << 20, &mut || Ok(())).unwrap();
    assert!(!output.status.success());
    assert!(output.complaint().contains("Permission denied"), "{}", output.complaint());
}
