//! Finds QEMU and says which version it is, where its firmware lies and which accelerators work here.
//!
//! Invariant: an answer is cached per file (path, inode, change time), so that an upgrade of the package is seen.
//!
//! Not here: the command line of a VM (`launch`).

use std::collections::HashMap;
use std::env;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::process::Command;
use tokio::time::timeout;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::guest::qmp::Version;

/// The program's name in `PATH`.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest version that is supported.
pub const OLDEST: Version = Version { major: 7, minor: 2, micro: 0 };
const ASK_LIMIT: Duration = Duration::from_secs(10);
/// TCG takes a quarter of a second; a KVM that is emulated itself takes many and is of no use.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// A QEMU program on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBinary {
    /// Where it is.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// Directories for `-L`: set when it lies outside of /usr, where a package was unpacked by hand.
    pub firmware: Vec<PathBuf>,
}

impl fmt::Display for QemuBinary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU {} at {}", self.version, self.path.display())
    }
}

/// An accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accel {
    /// Translation: works everywhere.
    Tcg,
    /// The kernel's: needs a processor that lends itself to it, and rights on /dev/kvm.
    Kvm,
}

impl Accel {
    /// As `-accel` takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct CacheKey {
    path: PathBuf,
    inode: u64,
    changed_ns: (i64, i64),
    question: String,
}

static CACHE: LazyLock<Mutex<HashMap<CacheKey, String>>> = LazyLock::new(Mutex::default);
static PROBED: LazyLock<Mutex<HashMap<CacheKey, bool>>> = LazyLock::new(Mutex::default);

impl CacheKey {
    fn new(path: &Path, question: String) -> Result<Self> {
        let file = std::fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
        let changed_ns = (file.ctime(), file.ctime_nsec());
        Ok(Self { path: path.to_owned(), inode: file.ino(), changed_ns, question })
    }
}

impl QemuBinary {
    /// The program at `configured`, else the first one in `PATH`.
    pub async fn find(configured: Option<&Path>) -> Result<Self> {
        let path = match configured {
            Some(path) => path.to_owned(),
            None => in_path(env::var_os("PATH").unwrap_or_default().as_os_str()).ok_or_else(|| {
                Error::new(ErrorKind::Missing, format!("find {PROGRAM}: it is not in PATH"))
                    .hint("install the Debian package qemu-system-x86, or set qemu = \"/path\" in the configuration")
            })?,
        };
        let text = ask(&path, &["--version"]).await?;
        let version = parse_version(&text).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("read the version of {}: {text:?}", path.display()))
        })?;
        if version < OLDEST {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("use {}: version {version} is older than {OLDEST}", path.display()),
            ));
        }
        Ok(Self { firmware: firmware_of(&path), path, version })
    }

    /// The machine types it knows, names only.
    pub async fn machine_types(&self) -> Result<Vec<String>> {
        let text = ask(&self.path, &["-machine", "help"]).await?;
        let names = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        Ok(names.map(str::to_owned).collect())
    }

    /// The newest versioned q35 machine type: what a new VM gets, and keeps.
    pub async fn newest_machine(&self) -> Result<String> {
        let types = self.machine_types().await?;
        let newest = types.into_iter().filter_map(|name| {
            let (major, minor) = name.strip_prefix("pc-q35-")?.split_once('.')?;
            Some(((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?), name))
        });
        newest.max().map(|(_, name)| name).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("choose a machine type of {self}: it knows no q35"))
        })
    }

    /// The processor models it knows.
    pub async fn cpu_models(&self) -> Result<Vec<String>> {
        let text = ask(&self.path, &["-cpu", "help"]).await?;
        Ok(parse_cpu_models(&text))
    }

    /// Whether a machine really runs with `accel` here, and at a useful speed. Asked once per program.
    pub async fn accel_works(&self, accel: Accel) -> bool {
        if accel == Accel::Kvm && !Path::new("/dev/kvm").exists() {
            return false;
        }
        let accel = accel.as_str();
        let Ok(key) = CacheKey::new(&self.path, accel.to_owned()) else { return false };
        if let Some(&known) = PROBED.lock().get(&key) {
            return known;
        }
        let probe = self.probe(accel).await;
        if let Err(error) = &probe {
            tracing::info!(qemu = %self.path.display(), accel, %error, "accelerator does not work");
        }
        PROBED.lock().insert(key, probe.is_ok());
        probe.is_ok()
    }

    /// /dev/kvm may open and still not run anything: only a guest that ran and ended proves it. The firmware finds
    /// nothing to boot and ends the machine (`reboot-timeout`, `-no-reboot`).
    async fn probe(&self, accel: &str) -> Result<()> {
        let machine = format!("pc,accel={accel}");
        let mut args = vec!["-machine", &machine, "-m", "32M", "-nodefaults", "-no-user-config"];
        args.extend(["-display", "none", "-no-reboot", "-boot", "reboot-timeout=1"]);
        let firmware: Vec<_> = self.firmware.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        for path in &firmware {
            args.extend(["-L", path]);
        }
        run(&self.path, &args, PROBE_LIMIT).await.map(drop)
    }

    /// KVM if it works, else TCG.
    pub async fn best_accel(&self) -> Accel {
        if self.accel_works(Accel::Kvm).await { Accel::Kvm } else { Accel::Tcg }
    }
}

fn in_path(path: &std::ffi::OsStr) -> Option<PathBuf> {
    env::split_paths(path).map(|dir| dir.join(PROGRAM)).find(|file| file.is_file())
}

/// Debian builds some versions without relocation: unpacked elsewhere they look for firmware in /usr/share.
fn firmware_of(path: &Path) -> Vec<PathBuf> {
    let Some(prefix) = path.canonicalize().ok().and_then(|path| Some(path.parent()?.parent()?.to_owned()))
    else {
        return Vec::new();
    };
    if prefix == Path::new("/usr") || prefix == Path::new("/") {
        return Vec::new();
    }
    let known = ["share/qemu", "share/seabios", "lib/ipxe/qemu"];
    known.iter().map(|dir| prefix.join(dir)).filter(|dir| dir.is_dir()).collect()
}

fn parse_version(text: &str) -> Option<Version> {
    let number = text.split_once("version ")?.1;
    let end = number.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(number.len());
    let mut parts = number.get(..end)?.split('.').map(|part| part.parse().ok());
    Some(Version { major: parts.next()??, minor: parts.next()??, micro: parts.next().flatten().unwrap_or(0) })
}

fn parse_cpu_models(text: &str) -> Vec<String> {
    let models = text.lines().take_while(|line| !line.starts_with("Recognized"));
    let name =
        |line: &str| line.strip_prefix("x86 ").unwrap_or(line).split_whitespace().next().map(str::to_owned);
    models.skip(1).filter_map(name).collect()
}

/// Runs the program with `args` and returns what it prints; asked once per program.
async fn ask(path: &Path, args: &[&str]) -> Result<String> {
    let key = CacheKey::new(path, args.join("\0"))?;
    if let Some(answer) = CACHE.lock().get(&key) {
        return Ok(answer.clone());
    }
    let answer = run(path, args, ASK_LIMIT).await?;
    CACHE.lock().insert(key, answer.clone());
    Ok(answer)
}

async fn run(path: &Path, args: &[&str], limit: Duration) -> Result<String> {
    let action = || format!("run {} {}", path.display(), args.join(" "));
    let mut command = Command::new(path);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(limit, command.output())
        .await
        .map_err(|_| Error::new(ErrorKind::TimedOut, format!("{}: no end within {limit:?}", action())))?
        .with_context(action)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let words = format!("{}: {}: {}", action(), output.status, said.trim());
        return Err(Error::new(ErrorKind::Missing, words));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn versions_are_read_from_what_distributions_print() {
        let debian =
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022";
        assert_eq!(parse_version(debian), Some(Version { major: 7, minor: 2, micro: 22 }));
        let plain = "QEMU emulator version 10.0.2\n";
        assert_eq!(parse_version(plain), Some(Version { major: 10, minor: 0, micro: 2 }));
        assert_eq!(parse_version("qemu-img"), None);
    }

    #[test]
    fn processor_models_are_read_in_both_spellings() {
        let old = "Available CPUs:\nx86 486                   (alias)\nx86 qemu64  (x)\n\nRecognized CPUID flags:\n  3dnow";
        assert_eq!(parse_cpu_models(old), ["486", "qemu64"]);
        let new = "Available CPUs:\n  486     (alias)\n  max   all\n\nRecognized CPUID flags:\n";
        assert_eq!(parse_cpu_models(new), ["486", "max"]);
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;

    whimbrel_fuzz::fuzz! {
        /// What a program prints that is said to be QEMU.
        fn printed(bytes) seeds [
            b"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
            b"Available CPUs:\nx86 486  (alias configured)\n  qemu64\n\nRecognized CPUID flags:\n",
        ] {
            let text = String::from_utf8_lossy(bytes);
            let _ = (parse_version(&text), parse_cpu_models(&text));
        }
    }
}
