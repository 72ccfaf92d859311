//! Guest images for tests, demo and benchmarks, made from Debian packages and our own workload (`guest/`).
//!
//! ```text
//!   Debian cloud kernel ─┬─▶ vmlinuz                      both images boot with -kernel, -initrd, -append
//!   busybox-static ──────┼─▶ initrd.img (virtio modules, mounts /dev/vda, goes on to its /sbin/init)
//!   guest/ (static) ─────┼─▶ tiny.raw    busybox, our program: boots in seconds under TCG
//!   mmdebstrap ──────────┴─▶ debian.raw  Debian with systemd, our program as a service
//! ```
//!
//! Invariants: images are filled without mounting; everything is under `target/guest`, and rebuilt exactly when
//! an input changed. No privileges are needed, except for `debian.raw`.
//!
//! Not here: what the workload does (`guest/src/main.rs`), listening to it (`beat.rs`, `status.rs`).

mod cpio;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Pick, PrivateApt};
use crate::cmd::{capture, cmd, find_program, run};
use crate::paths;

/// Names of the workload's virtio-serial ports.
pub const BEAT_PORT: &str = "whimbrel.beat";
/// See [`BEAT_PORT`].
pub const STATUS_PORT: &str = "whimbrel.status";
/// Kernel settings every guest starts with; workload settings (`wg.KEY=VALUE`) come on top.
pub const APPEND: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable";

const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// In the order they have to be loaded.
const MODULES: [&str; 11] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
];
const TINY_BYTES: &str = "192M";
const DEBIAN_BYTES: &str = "1G";
/// Units of Debian's that a guest without consoles and without an hour to live does not need.
const MASKED: [&str; 5] = [
    "getty-static.service",
    "e2scrub_reap.service",
    "e2scrub_all.timer",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
];
/// Raised when a recipe in this file changes in a way that its inputs do not show.
const RECIPE: &str = "2";

/// What a VM is booted from.
#[derive(Clone, Debug)]
pub struct Image {
    /// For `-kernel`.
    pub kernel: PathBuf,
    /// For `-initrd`.
    pub initrd: PathBuf,
    /// Raw disk image, to be `/dev/vda`.
    pub disk: PathBuf,
}

fn home() -> PathBuf {
    paths::target().join("guest")
}

/// Where kernel and initrd lie once they are built; the disk is left empty.
pub fn boot_files() -> Image {
    Image { kernel: home().join("kernel/vmlinuz"), initrd: home().join("initrd.img"), disk: PathBuf::new() }
}

/// The small image: kernel, busybox and the workload.
pub fn tiny() -> Result<Image> {
    let (kernel, initrd, program) = common()?;
    let disk = home().join("tiny.raw");
    rebuild_if_changed(&disk, &[&program, &busybox()?], TINY_INIT, || {
        let root = home().join("tiny-root");
        remake_dir(&root)?;
        for dir in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "data", "etc", "usr/bin"] {
            fs::create_dir_all(root.join(dir)).context("make the root's directories")?;
        }
        install(&busybox()?, &root.join("bin/busybox"))?;
        install(&program, &root.join("usr/bin/whimbrel-guest"))?;
        for name in ["sh", "mount", "poweroff", "ls", "cat", "ip", "sync", "dd"] {
            symlink("busybox", root.join("bin").join(name)).context("link busybox")?;
        }
        write_script(&root.join("sbin/init"), TINY_INIT)?;
        make_ext4(&root, &disk, TINY_BYTES)
    })?;
    Ok(Image { kernel, initrd, disk })
}

/// The Debian image. Needs root and mmdebstrap the first time.
pub fn debian() -> Result<Image> {
    let (kernel, initrd, program) = common()?;
    let disk = home().join("debian.raw");
    rebuild_if_changed(&disk, &[&program], UNIT, || {
        let root = home().join("debian-root");
        remake_dir(&root)?;
        // Bootstrapped once; a changed workload only goes through the steps below.
        let base = home().join("debian-base.tar");
        if !base.exists() {
            bootstrap(&base)?;
        }
        capture(cmd("tar", &["--numeric-owner", "-xpf"]).arg(&base).arg("-C").arg(&root))?;
        for unit in MASKED {
            symlink("/dev/null", root.join("etc/systemd/system").join(unit)).context("mask a unit")?;
        }
        install(&program, &root.join("usr/bin/whimbrel-guest"))?;
        fs::write(root.join("etc/systemd/system/whimbrel-guest.service"), UNIT).context("write the unit")?;
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).context("make the target's directory")?;
        symlink("../whimbrel-guest.service", wants.join("whimbrel-guest.service"))
            .context("enable the unit")?;
        fs::write(root.join("etc/fstab"), "/dev/vda / ext4 rw,noatime 0 1\n").context("write fstab")?;
        fs::write(root.join("etc/hostname"), "whimbrel-guest\n").context("write hostname")?;
        fs::create_dir_all(root.join("data")).context("make /data")?;
        make_ext4(&root, &disk, DEBIAN_BYTES)
    })?;
    Ok(Image { kernel, initrd, disk })
}

/// The workload as a static program; cargo decides whether it has to be built.
pub fn program() -> Result<PathBuf> {
    let triple = "x86_64-unknown-linux-gnu";
    let out = home().join("cargo");
    let mut c =
        cmd("cargo", &["build", "--quiet", "--release", "--package", "whimbrel-guest", "--target", triple]);
    c.arg("--target-dir").arg(&out).current_dir(paths::workspace());
    c.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static");
    c.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
    run(&mut c)?;
    Ok(out.join(triple).join("release/whimbrel-guest"))
}

fn common() -> Result<(PathBuf, PathBuf, PathBuf)> {
    fs::create_dir_all(home()).context("make target/guest")?;
    let program = program()?;
    let (kernel, modules) = kernel()?;
    let initrd = home().join("initrd.img");
    let modules_list = modules.join("modules.list");
    rebuild_if_changed(&initrd, &[&busybox()?, &modules_list], INIT, || make_initrd(&modules, &initrd))?;
    Ok((kernel, initrd, program))
}

fn busybox() -> Result<PathBuf> {
    find_program("busybox").context("find busybox: install the package busybox-static")
}

/// Unpacks Debian's cloud kernel at the first call; gives the kernel and the directory of its modules.
fn kernel() -> Result<(PathBuf, PathBuf)> {
    let dir = home().join("kernel");
    let (kernel, modules) = (dir.join("vmlinuz"), dir.join("modules"));
    if modules.join("modules.list").exists() {
        return Ok((kernel, modules));
    }
    remake_dir(&dir)?;
    let (uri, release) = apt::archive()?;
    eprintln!("fetching Debian's cloud kernel into {}", dir.display());
    let apt = PrivateApt::new(&dir.join("apt"), &uri, &[&release], KERNEL_PACKAGE, &release)?;
    apt.update()?;
    let name = apt.dependency(KERNEL_PACKAGE, "linux-image-")?;
    let pick = Pick { version: apt.candidate(&name)?, name };
    apt.download(&[pick], &dir.join("debs"))?;
    apt::unpack_all(&dir.join("debs"), &dir.join("root"))?;
    fs::copy(find_file(&dir.join("root/boot"), "vmlinuz-")?, &kernel).context("keep the kernel")?;
    fs::create_dir_all(&modules).context("make the module directory")?;
    let tree = dir.join("root/lib/modules");
    for name in MODULES {
        let found = capture(&mut cmd("find", &[&tree.to_string_lossy(), "-name", &format!("{name}.ko")]))?;
        let path = found.lines().next().with_context(|| format!("find kernel module {name}"))?;
        fs::copy(path, modules.join(format!("{name}.ko"))).with_context(|| format!("keep module {name}"))?;
    }
    for spent in ["debs", "apt", "root"] {
        fs::remove_dir_all(dir.join(spent)).with_context(|| format!("remove {spent}"))?;
    }
    fs::write(modules.join("modules.list"), MODULES.join("\n")).context("list the modules")?;
    Ok((kernel, modules))
}

fn find_file(dir: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("find {prefix}* in {}", dir.display()))
}

fn make_initrd(modules: &Path, initrd: &Path) -> Result<()> {
    let mut archive = cpio::Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.dir(dir);
    }
    archive.file("bin/busybox", 0o755, &fs::read(busybox()?).context("read busybox")?);
    for name in MODULES {
        let file = format!("{name}.ko");
        let bytes = fs::read(modules.join(&file)).with_context(|| format!("read module {name}"))?;
        archive.file(&format!("modules/{file}"), 0o644, &bytes);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("init", 0o755, INIT.replace("@MODULES@", &MODULES.join(" ")).as_bytes());
    fs::write(initrd, archive.finish()).with_context(|| format!("write {}", initrd.display()))
}

fn bootstrap(base: &Path) -> Result<()> {
    if !crate::install::is_root() {
        bail!("the Debian image is made by mmdebstrap as root: run as root, or use the tiny image");
    }
    let (uri, release) = apt::archive()?;
    eprintln!("bootstrapping Debian {release} into {}: about half a minute", base.display());
    let unfinished = base.with_extension("unfinished.tar");
    let mut c = cmd("mmdebstrap", &["--quiet", "--variant=minbase", "--include=systemd-sysv,iproute2,udev"]);
    c.arg("--aptopt=Acquire::Languages \"none\"");
    for left_out in ["man", "doc", "locale", "info"] {
        c.arg(format!("--dpkgopt=path-exclude=/usr/share/{left_out}/*"));
    }
    c.arg(&release).arg(&unfinished).arg(format!("deb {uri} {release} main"));
    run(&mut c)?;
    fs::rename(&unfinished, base).with_context(|| format!("put {} in place", base.display()))
}

/// Fills a new raw image from a directory; nothing is mounted.
fn make_ext4(root: &Path, disk: &Path, size: &str) -> Result<()> {
    let fresh = disk.with_extension("new");
    if fresh.exists() {
        fs::remove_file(&fresh).context("remove an unfinished image")?;
    }
    let mke2fs = find_program("mke2fs").context("find mke2fs: install the package e2fsprogs")?;
    let mut c: Command = cmd(mke2fs, &["-q", "-t", "ext4", "-L", "root", "-E", "root_owner=0:0", "-d"]);
    capture(c.arg(root).arg(&fresh).arg(size))?;
    fs::remove_dir_all(root).context("remove the directory the image was filled from")?;
    fs::rename(&fresh, disk).with_context(|| format!("put {} in place", disk.display()))
}

/// Runs `make` unless `product` stands beside a stamp of the same inputs.
fn rebuild_if_changed(
    product: &Path,
    inputs: &[&Path],
    recipe: &str,
    make: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut hash = blake3::Hasher::new();
    hash.update(RECIPE.as_bytes()).update(recipe.as_bytes());
    for input in inputs {
        hash.update(&fs::read(input).with_context(|| format!("read {}", input.display()))?);
    }
    let (stamp, now) = (product.with_extension("stamp"), hash.finalize().to_hex().to_string());
    if product.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == now) {
        return Ok(());
    }
    make().with_context(|| format!("make {}", product.display()))?;
    fs::write(&stamp, now).context("write the stamp")
}

fn remake_dir(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))
}

fn install(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copy {} into the image", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).context("make executable")
}

fn write_script(path: &Path, body: &str) -> Result<()> {
    fs::write(path, body).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("make executable")
}

/// The initrd's first program: modules, address, root disk.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
for m in @MODULES@; do $b insmod /modules/$m.ko || echo "no module $m"; done
for w in $($b cat /proc/cmdline); do
  case $w in wg.ip=*) ip=${w#wg.ip=};; wg.gw=*) gw=${w#wg.gw=};; esac
done
$b ip link set lo up
if [ -n "$ip" ] && [ -e /sys/class/net/eth0 ]; then
  $b ip addr add "$ip" dev eth0; $b ip link set eth0 up
  [ -n "$gw" ] && $b ip route add default via "$gw"
fi
n=0
until [ -b /dev/vda ]; do n=$((n+1)); [ $n -gt 500 ] && echo "no /dev/vda" && $b poweroff -f; $b usleep 10000; done
$b mount -t ext4 -o rw,noatime /dev/vda /root || $b poweroff -f
for d in dev proc sys; do $b mount -o move /$d /root/$d; done
exec $b switch_root /root /sbin/init
"#;

const TINY_INIT: &str = r#"#!/bin/sh
mount -t tmpfs run /run
for w in $(cat /proc/cmdline); do
  case $w in boot.read=*) cat "${w#boot.read=}" >/dev/null;; esac
done
echo "whimbrel: booted"
whimbrel-guest 2>&1
echo "whimbrel: the workload ended"
sync
poweroff -f
"#;

const UNIT: &str = "[Unit]
Description=Self-checking workload
After=local-fs.target

[Service]
ExecStart=/usr/bin/whimbrel-guest
StandardOutput=journal+console
Restart=no

[Install]
WantedBy=multi-user.target
";
