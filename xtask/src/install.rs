//! Debian packages, by purpose, and the one way they get onto the machine.
//!
//! ```text
//!   nothing missing ─────────────────────────▶ go on
//!   missing, root, not --no-install: list ───▶ apt-get (daemons kept from starting) ─▶ go on
//!   missing otherwise: print the exact line ─▶ exit status 3
//! ```
//!
//! Not here: QEMU, which is never installed but unpacked (`qemu.rs`).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};

use crate::cmd::{cmd, find_program, output, run};

/// Exit status when something is missing on this machine.
pub const MISSING_STATUS: u8 = 3;

const POLICY: &str = "/usr/sbin/policy-rc.d";
/// Package lists older than this are fetched anew before installing.
const LISTS_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// What packages are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Compiling the workspace.
    Build,
    /// Guest images and the hosts they run on.
    Run,
    /// What the tests compare with or start beside us.
    Test,
    /// Peers of `bench migrate` and its link shaping.
    BenchMigrate,
    /// Peers of `bench block`.
    BenchBlock,
}

impl Purpose {
    /// Packages and a program that proves each one present; none where the package has no program.
    fn packages(self) -> &'static [(&'static str, Option<&'static str>)] {
        match self {
            Purpose::Build => &[
                ("gcc", Some("cc")),
                ("libc6-dev", None),
                ("protobuf-compiler", Some("protoc")),
                ("libprotobuf-dev", None),
                ("ca-certificates", None),
            ],
            Purpose::Run => &[
                ("busybox-static", Some("busybox")),
                ("e2fsprogs", Some("mke2fs")),
                ("iproute2", Some("ip")),
                ("nftables", Some("nft")),
                ("util-linux", Some("unshare")),
                ("mmdebstrap", Some("mmdebstrap")),
            ],
            Purpose::Test => &[
                ("etcd-server", Some("etcd")),
                ("nbdkit", Some("nbdkit")),
                ("libnbd-bin", Some("nbdcopy")),
                ("python3-libnbd", Some("nbdsh")),
                ("fio", Some("fio")),
                ("openssl", Some("openssl")),
                ("qemu-utils", Some("qemu-img")),
                ("xz-utils", Some("xz")),
                ("libvhdi-utils", Some("vhdiinfo")),
                ("python3-libvhdi", None),
            ],
            Purpose::BenchMigrate => &[("openssl", Some("openssl")), ("ethtool", Some("ethtool"))],
            Purpose::BenchBlock => {
                &[("nbdkit", Some("nbdkit")), ("libnbd-bin", Some("nbdcopy")), ("fio", Some("fio"))]
            }
        }
    }
}

/// What is missing on this machine, with what would bring it.
#[derive(Debug)]
pub enum Missing {
    /// Debian packages.
    Packages(Vec<&'static str>),
    /// The right to make namespaces; what `unshare` said.
    Namespaces(String),
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Missing::Packages(packages) => {
                let line = install_line(&packages.join(" "));
                write!(f, "Debian packages are missing; as root, run:\n  {line}")
            }
            Missing::Namespaces(said) => write!(
                f,
                "several hosts on one machine take network and mount namespaces, which this user may not make \
                 ({said}); run this as root, or as root allow user namespaces:\n  \
                 sysctl -w user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1"
            ),
        }
    }
}

impl std::error::Error for Missing {}

fn install_line(packages: &str) -> String {
    format!("apt-get update && apt-get install -y --no-install-recommends {packages}")
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes sure that this process may make the namespaces of a lab. [`Missing`] is the error when it may not.
pub fn ensure_namespaces() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let out = output(&mut cmd(
        "unshare",
        &["--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "true"],
    ))?;
    if out.status.success() {
        return Ok(());
    }
    Err(Missing::Namespaces(String::from_utf8_lossy(&out.stderr).trim().to_owned()).into())
}

/// Makes sure that the packages of `purposes` are there. [`Missing`] is the error when they are not and may not
/// be installed.
pub fn ensure(purposes: &[Purpose], no_install: bool) -> Result<()> {
    let mut packages = Vec::new();
    for (package, program) in purposes.iter().flat_map(|p| p.packages()) {
        if !present(package, *program)? && !packages.contains(package) {
            packages.push(*package);
        }
    }
    if packages.is_empty() {
        return Ok(());
    }
    if no_install || !is_root() {
        return Err(Missing::Packages(packages).into());
    }
    eprintln!("installing what is missing: {}", packages.join(" "));
    if lists_are_old() {
        run(&mut cmd("apt-get", &["-q", "update"]))?;
    }
    let _quiet = Policy::put_in_place()?;
    let mut c = cmd("apt-get", &["-q", "install", "-y", "--no-install-recommends"]);
    c.args(&packages).env("DEBIAN_FRONTEND", "noninteractive");
    run(&mut c).with_context(|| format!("install packages; by hand: {}", install_line(&packages.join(" "))))
}

fn present(package: &str, program: Option<&str>) -> Result<bool> {
    if let Some(program) = program {
        return Ok(find_program(program).is_some());
    }
    let out = output(&mut cmd("dpkg-query", &["-W", "-f=${db:Status-Status}\n", package]))?;
    Ok(String::from_utf8_lossy(&out.stdout).lines().any(|l| l == "installed"))
}

fn lists_are_old() -> bool {
    let newest = fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten();
    let newest = newest
        .filter(|e| e.file_name().to_string_lossy().contains("Packages"))
        .filter_map(|e| e.metadata().ok()?.modified().ok())
        .max();
    newest.is_none_or(|t| SystemTime::now().duration_since(t).is_ok_and(|age| age > LISTS_MAX_AGE))
}

/// Keeps freshly installed daemons from starting, for as long as it lives.
struct Policy {
    ours: bool,
}

impl Policy {
    fn put_in_place() -> Result<Policy> {
        if Path::new(POLICY).exists() {
            // The machine has its own rule.
            return Ok(Policy { ours: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").context("keep daemons from starting")?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
            .context("make the policy executable")?;
        Ok(Policy { ours: true })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.ours
            && let Err(e) = fs::remove_file(POLICY)
        {
            eprintln!("remove {POLICY} by hand: {e}");
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_missing_is_told_with_the_exact_line() {
        let said = Missing::Packages(vec!["fio", "nbdkit"]).to_string();
        assert!(said.ends_with("apt-get install -y --no-install-recommends fio nbdkit"), "{said}");
    }

    #[test]
    fn a_present_program_and_an_absent_package_are_told_apart() {
        assert!(present("coreutils", Some("ls")).unwrap());
        assert!(!present("no-such-package-anywhere", None).unwrap());
    }
}
