//! Debian's package tools, used in two ways: installing onto the machine, and fetching packages from another
//! suite through a private configuration that never touches the machine's own.
//!
//! Invariant: no mirror is named here; addresses come from the machine's own apt configuration.
//!
//! Not here: which packages are needed for what (`install.rs`), QEMU's two versions (`qemu.rs`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cmd::{capture, cmd, output, tail};

/// The machine's release by its codename, such as `bookworm`.
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    text.lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))
        .map(|v| v.trim_matches('"').to_owned())
        .context("find VERSION_CODENAME in /etc/os-release: is this a Debian release?")
}

/// The address of the archive that the machine takes its release from, and the release's name.
pub fn archive() -> Result<(String, String)> {
    let release = codename()?;
    let text = capture(&mut cmd(
        "apt-get",
        &["indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"],
    ))?;
    let found = text.lines().find_map(|l| {
        let mut words = l.split_whitespace();
        (words.next()? == release && words.next()? == "main").then(|| words.next().map(str::to_owned))?
    });
    found.map(|uri| (uri, release)).context(
        "find the machine's Debian archive in apt's configuration: run `apt-get update` as root, then try again",
    )
}

/// A private apt: own sources, lists, cache and preferences under one directory, the machine's installed
/// packages and keys. Needs no privileges.
pub struct PrivateApt {
    dir: PathBuf,
}

/// One package that a simulated installation would unpack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Package name.
    pub name: String,
    /// Exact version.
    pub version: String,
}

impl PrivateApt {
    /// Sets up under `dir` with `suites` of `uri`; packages named in `pinned` come from `pin_suite` even if that
    /// means a downgrade.
    pub fn new(dir: &Path, uri: &str, suites: &[&str], pinned: &str, pin_suite: &str) -> Result<PrivateApt> {
        let sources: String = suites.iter().map(|s| format!("deb {uri} {s} main\n")).collect();
        let pin = format!("Package: {pinned}\nPin: release n={pin_suite}\nPin-Priority: 1001\n");
        PrivateApt::with(dir, &sources, &pin)
    }

    /// Sets up under `dir` for what the packages of one suite of `uri` are built from.
    pub fn of_sources(dir: &Path, uri: &str, suite: &str) -> Result<PrivateApt> {
        PrivateApt::with(dir, &format!("deb-src {uri} {suite} main\n"), "")
    }

    fn with(dir: &Path, sources: &str, preferences: &str) -> Result<PrivateApt> {
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("create {}", dir.display()))?;
        }
        let dir = dir.canonicalize().context("resolve the private apt directory")?;
        fs::write(dir.join("sources.list"), sources).context("write private apt sources")?;
        fs::write(dir.join("preferences"), preferences).context("write private apt preferences")?;
        Ok(PrivateApt { dir })
    }

    fn tool(&self, program: &str, args: &[&str]) -> Command {
        let mut c = cmd(program, &[]);
        let dir = self.dir.display();
        for option in [
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::Etc::preferences={dir}/preferences"),
            "Dir::Etc::preferencesparts=-".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            c.arg("-o").arg(option);
        }
        c.args(args).env("LC_ALL", "C");
        c
    }

    /// Fetches the package lists.
    pub fn update(&self) -> Result<()> {
        let out = output(&mut self.tool("apt-get", &["-q", "update"]))?;
        // apt reports an unreachable suite as a warning and status 0.
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if !out.status.success() || said.contains("Failed to fetch") {
            bail!("fetch package lists: {}", tail(&out.stderr, 6));
        }
        Ok(())
    }

    /// What installing `packages` would unpack on this machine, dependencies included.
    pub fn plan(&self, packages: &[&str]) -> Result<Vec<Pick>> {
        let mut c = self.tool("apt-get", &["-s", "--no-install-recommends", "--allow-downgrades", "install"]);
        let text = capture(c.args(packages))?;
        Ok(parse_plan(&text))
    }

    /// The version of `package` that the private sources would install.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let text = capture(&mut self.tool("apt-cache", &["policy", package]))?;
        text.lines()
            .find_map(|l| l.trim().strip_prefix("Candidate: "))
            .filter(|v| *v != "(none)")
            .map(str::to_owned)
            .with_context(|| format!("find package {package} in the private sources"))
    }

    /// The first dependency of `package` whose name starts with `prefix`.
    pub fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let text = capture(&mut self.tool("apt-cache", &["depends", package]))?;
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("find what {package} depends on"))
    }

    /// Downloads exactly these packages into `into`.
    pub fn download(&self, picks: &[Pick], into: &Path) -> Result<()> {
        fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
        let mut c = self.tool("apt-get", &["-q", "download"]);
        c.args(picks.iter().map(|p| format!("{}={}", p.name, p.version))).current_dir(into);
        capture(&mut c).map(drop)
    }

    /// Downloads what `package` is built from, as its authors published it, into `into`; gives the archive's path.
    pub fn source(&self, package: &str, into: &Path) -> Result<PathBuf> {
        fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
        let mut c = self.tool("apt-get", &["-q", "source", "--download-only", package]);
        let out = output(c.current_dir(into))?;
        // A newer upload takes the distribution's own changes off the mirror, which apt calls a failure; the archive
        // that they were made to stays. One that was cut short does not unpack.
        let entries = fs::read_dir(into).with_context(|| format!("list {}", into.display()))?;
        let found =
            entries.flatten().map(|e| e.path()).find(|p| p.to_string_lossy().ends_with(".orig.tar.xz"));
        found.with_context(|| format!("download the source of {package}: {}", tail(&out.stderr, 6)))
    }
}

/// Unpacks every `.deb` of a directory into `root`; maintainer scripts do not run.
pub fn unpack_all(debs: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    for entry in fs::read_dir(debs).with_context(|| format!("list {}", debs.display()))? {
        let path = entry.context("list packages")?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            capture(cmd("dpkg", &["-x"]).arg(&path).arg(root))?;
        }
    }
    Ok(())
}

/// Reads the `Inst` lines of `apt-get -s install`.
fn parse_plan(text: &str) -> Vec<Pick> {
    text.lines()
        .filter_map(|l| {
            let name = l.strip_prefix("Inst ")?.split_whitespace().next()?;
            let version = l.split_once('(')?.1.split_whitespace().next()?;
            Some(Pick { name: name.to_owned(), version: version.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_plan_lists_new_and_replaced_packages_with_the_version_to_come() {
        let text = "Inst libfoo (1.2-3 Debian:12/oldstable [amd64])\n\
                    Inst qemu-utils [1:10.0] (1:7.2+dfsg-7 Debian:12/oldstable [amd64])\n\
                    Conf libfoo (1.2-3 Debian:12/oldstable [amd64])\n";
        let picks = parse_plan(text);
        let pick = |n: &str, v: &str| Pick { name: n.into(), version: v.into() };
        assert_eq!(picks, [pick("libfoo", "1.2-3"), pick("qemu-utils", "1:7.2+dfsg-7")]);
    }
}
