//! The two QEMU versions that everything is tested with, side by side, without replacing what is installed.
//!
//! ```text
//!   system QEMU of that version? ──yes──▶ bin/ starts it
//!          │ no
//!          ▼
//!   private apt ─▶ download ─▶ dpkg -x ─▶ target/qemu/VERSION/root ─▶ bin/ wrappers (-L, library path)
//!          └─────▶ the version's own block tests ─▶ target/qemu/VERSION/source
//! ```
//!
//! Invariant: nothing is installed here; removing `target/qemu` removes every trace.
//!
//! Not here: starting virtual machines (the product does that; `bench/` for QEMU's own migrations).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, Pick, PrivateApt};
use crate::cmd::{capture, cmd, find_program};
use crate::paths;

/// The versions, oldest first.
pub const VERSIONS: [Version; 2] = [Version::V7_2, Version::V10_0];

/// Programs of a version that other code may call.
const PROGRAMS: [&str; 5] = ["qemu-system-x86_64", "qemu-img", "qemu-storage-daemon", "qemu-nbd", "qemu-io"];
const PACKAGES: [&str; 6] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils", "seabios", "ipxe-qemu"];
/// What comes out of the pinned suite rather than the newest one on offer.
const PINNED: &str = "qemu-* seabios ipxe-qemu";

/// Beside the programs: parts of the source.
const SOURCE: &str = "source";
/// Which parts: the block tests, and what they drive QEMU with.
const SOURCE_PARTS: [&str; 2] = ["tests/qemu-iotests", "python/qemu"];

/// A QEMU version under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Debian 12's own.
    V7_2,
    /// Debian 12's backport, Debian 13's own.
    V10_0,
}

impl Version {
    /// As in `7.2`.
    pub fn name(self) -> &'static str {
        match self {
            Version::V7_2 => "7.2",
            Version::V10_0 => "10.0",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Version::V7_2 => "7.2.",
            Version::V10_0 => "10.",
        }
    }

    /// The suite that holds this version, on a machine that runs `release`.
    fn suite(self, release: &str) -> String {
        match (self, release) {
            (Version::V7_2, _) => "bookworm".to_owned(),
            (Version::V10_0, "bookworm") => "bookworm-backports".to_owned(),
            (Version::V10_0, _) => "trixie".to_owned(),
        }
    }
}

/// A version that is ready to run.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Which one.
    pub version: Version,
    /// Directory with `qemu-system-x86_64`, `qemu-img`, `qemu-storage-daemon`, `qemu-nbd`, `qemu-io`.
    pub bin: PathBuf,
}

impl Qemu {
    /// The path of one of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// The emulator's path.
    pub fn system(&self) -> PathBuf {
        self.program("qemu-system-x86_64")
    }

    /// Where its block tests are, once [`ensure_block_tests`] has put them there.
    pub fn block_tests(&self) -> PathBuf {
        self.bin.with_file_name(SOURCE).join(SOURCE_PARTS[0])
    }
}

/// Makes `version` ready, fetching and unpacking its packages at the first call.
pub fn ensure(version: Version) -> Result<Qemu> {
    let home = paths::target().join("qemu").join(version.name());
    let bin = home.join("bin");
    if let Some(system) = system_programs(version) {
        for (name, path) in system {
            write_program(&bin.join(name), &format!("exec {} \"$@\"\n", path.display()))?;
        }
    } else {
        if !home.join("complete").exists() {
            unpack(version, &home)
                .with_context(|| format!("unpack QEMU {} under {}", version.name(), home.display()))?;
        }
        for name in PROGRAMS {
            write_program(&bin.join(name), &wrapper(name))?;
        }
    }
    let qemu = Qemu { version, bin };
    if version_of(&qemu.bin)? != version {
        bail!("{} is not QEMU {}", qemu.system().display(), version.name());
    }
    Ok(qemu)
}

/// Fetches the block tests of this version's source at the first call.
pub fn ensure_block_tests(qemu: &Qemu) -> Result<()> {
    let source = qemu.bin.with_file_name(SOURCE);
    if source.exists() {
        return Ok(());
    }
    let (uri, release) = apt::archive()?;
    let suite = qemu.version.suite(&release);
    eprintln!("fetching the source of QEMU {} from {suite}, for its block tests", qemu.version.name());
    let work = source.with_extension("new");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
    }
    let apt = PrivateApt::of_sources(&work.join("apt"), &uri, &suite)?;
    apt.update()?;
    let archive = apt.source("qemu", &work.join("archive"))?;
    let tree = work.join("tree");
    fs::create_dir_all(&tree).with_context(|| format!("create {}", tree.display()))?;
    let mut c = cmd("tar", &["--extract", "--xz", "--strip-components=1", "--wildcards", "--file"]);
    c.arg(&archive).arg("--directory").arg(&tree).args(SOURCE_PARTS.map(|part| format!("*/{part}")));
    capture(&mut c)?;
    fs::rename(&tree, &source).with_context(|| format!("put {} in place", source.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))
}

/// The version of the programs in a directory.
pub fn version_of(bin: &Path) -> Result<Version> {
    let said = capture(&mut cmd(bin.join(PROGRAMS[0]), &["--version"]))?;
    VERSIONS.into_iter().find(|v| said.contains(&format!("version {}", v.prefix()))).with_context(|| {
        format!("recognise the QEMU that says {:?}", said.lines().next().unwrap_or_default())
    })
}

impl std::str::FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Version> {
        VERSIONS
            .into_iter()
            .find(|v| v.name() == name)
            .with_context(|| format!("know QEMU {name}: 7.2 or 10.0"))
    }
}

/// Every version that can be had here; the reason is printed for one that cannot. At least one is needed.
pub fn ensure_all() -> Result<Vec<Qemu>> {
    let mut ready = Vec::new();
    for version in VERSIONS {
        match ensure(version) {
            Ok(q) => ready.push(q),
            Err(e) => eprintln!("QEMU {} is not to be had on this machine: {e:#}", version.name()),
        }
    }
    if ready.is_empty() {
        bail!("no QEMU to test with");
    }
    Ok(ready)
}

/// The installed programs, if all of them are there and of this version.
fn system_programs(version: Version) -> Option<Vec<(&'static str, PathBuf)>> {
    let found: Vec<_> = PROGRAMS.iter().filter_map(|n| Some((*n, find_program(n)?))).collect();
    let system = found.iter().find(|(n, _)| *n == PROGRAMS[0])?;
    let said = capture(&mut cmd(&system.1, &["--version"])).ok()?;
    (found.len() == PROGRAMS.len() && said.contains(&format!("version {}", version.prefix())))
        .then_some(found)
}

fn unpack(version: Version, home: &Path) -> Result<()> {
    let (uri, release) = apt::archive()?;
    let suite = version.suite(&release);
    let mut suites = vec![release.as_str()];
    if suite != release {
        suites.push(&suite);
    }
    eprintln!("fetching QEMU {} from {suite} into {}", version.name(), home.display());
    let apt = PrivateApt::new(&home.join("apt"), &uri, &suites, PINNED, &suite)?;
    apt.update()?;
    let mut picks = apt.plan(&PACKAGES)?;
    // A package that is installed in this very version is not in the plan, but its files are needed too.
    for name in PACKAGES {
        if !picks.iter().any(|p| p.name == name) {
            picks.push(Pick { name: name.to_owned(), version: apt.candidate(name)? });
        }
    }
    let debs = home.join("debs");
    apt.download(&picks, &debs)?;
    let root = home.join("root");
    apt::unpack_all(&debs, &root)?;
    for spent in ["debs", "apt"] {
        fs::remove_dir_all(home.join(spent)).with_context(|| format!("remove {spent}"))?;
    }
    let list: String = picks.iter().map(|p| format!("{} {}\n", p.name, p.version)).collect();
    fs::write(home.join("complete"), list).context("record the unpacked packages")
}

/// A shell script that starts an unpacked program with its own libraries, modules and firmware, found beside the
/// script: the tree may be moved, or mounted elsewhere.
fn wrapper(name: &str) -> String {
    let firmware = if name == PROGRAMS[0] {
        "-L \"$root/usr/share/qemu\" -L \"$root/usr/share/seabios\" -L \"$root/usr/lib/ipxe/qemu\" "
    } else {
        ""
    };
    format!(
        "root=$(cd \"${{0%/*}}/../root\" && pwd)\nlib=$root/usr/lib/x86_64-linux-gnu\n\
         export LD_LIBRARY_PATH=\"$lib:$root/lib/x86_64-linux-gnu\" QEMU_MODULE_DIR=\"$lib/qemu\"\n\
         exec \"$root/usr/bin/{name}\" {firmware}\"$@\"\n"
    )
}

/// Writes an executable script unless it is there already with this content: a test beside us may be starting it.
fn write_program(path: &Path, body: &str) -> Result<()> {
    let script = format!("#!/bin/sh\n{body}");
    if fs::read_to_string(path).is_ok_and(|old| old == script) {
        return Ok(());
    }
    fs::create_dir_all(path.parent().context("a program has a directory")?)
        .context("create bin directory")?;
    let fresh = path.with_extension("new");
    fs::write(&fresh, script).with_context(|| format!("write {}", fresh.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).context("make executable")?;
    fs::rename(&fresh, path).with_context(|| format!("put {} in place", path.display()))
}
