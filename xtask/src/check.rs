//! `cargo xtask test`, which is all of continuous integration: every stage runs even if an earlier one failed,
//! each is timed, and a summary closes the output.
//!
//! ```text
//!   packages ─▶ fmt, tidy, clippy, docs, deny ─▶ guests, QEMUs ─▶ tests, doc tests, simulator ─▶ end to end
//! ```
//!
//! Invariant: a stage that cannot run is a failed stage, never a silent one.
//!
//! Not here: the end-to-end scenarios (`e2e.rs`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cmd::{capture, cmd, find_program, output, run, tail};
use crate::install::{self, Purpose};
use crate::{e2e, fuzz, guest, paths, qemu, tidy};

/// What to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Soaks, long fuzzing, hundred-fold migrations too.
    pub long: bool,
    /// Never install packages.
    pub no_install: bool,
}

struct Outcome {
    name: &'static str,
    took: Duration,
    error: Option<String>,
}

type Stage = (&'static str, fn(&Options) -> Result<()>);

const STAGES: [Stage; 14] = [
    ("format", |_| run(&mut cargo(&["fmt", "--all", "--check"]))),
    ("tidy", |_| tidy::run()),
    ("clippy", |_| {
        run(&mut cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    }),
    ("docs", |_| {
        let mut c = cargo(&["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
        run(c.env("RUSTDOCFLAGS", "-D warnings"))
    }),
    ("dependencies", |_| deny()),
    ("qemu", |_| qemu::ensure_all().map(drop)),
    ("guest images", |_| guest::tiny().map(drop)),
    ("program", |_| build(false).map(drop)),
    ("command line docs", |_| tidy::cli_docs(&build(false)?, false)),
    ("tests", tests),
    ("doc tests", |_| run(&mut cargo(&["test", "--quiet", "--workspace", "--doc"]))),
    ("long fuzzing", |options| {
        if options.long {
            return fuzz::run_for(fuzz::SECONDS, "");
        }
        println!(
            "a few thousand inputs per target ran among the tests; --long gives each a minute, with coverage"
        );
        Ok(())
    }),
    ("simulator", simulator),
    ("end to end", end_to_end),
];

/// Runs every stage.
pub fn run_all(options: &Options) -> Result<()> {
    install::ensure(&[Purpose::Build, Purpose::Run, Purpose::Test], options.no_install)?;
    install::ensure_namespaces()?;
    let mut outcomes = Vec::new();
    for (name, stage) in STAGES {
        println!("── {name}");
        let started = Instant::now();
        let error = stage(options).err().map(|e| format!("{e:#}"));
        if let Some(e) = &error {
            eprintln!("── {name} FAILED: {e}");
        }
        outcomes.push(Outcome { name, took: started.elapsed(), error });
    }
    println!("\n── summary");
    for o in &outcomes {
        let verdict = if o.error.is_none() { "ok" } else { "FAILED" };
        println!("{:<18} {verdict:<7} {:>7.1} s", o.name, o.took.as_secs_f64());
    }
    let total: Duration = outcomes.iter().map(|o| o.took).sum();
    let failed: Vec<&str> = outcomes.iter().filter(|o| o.error.is_some()).map(|o| o.name).collect();
    println!("{:<18} {:<7} {:>7.1} s", "total", "", total.as_secs_f64());
    if !failed.is_empty() {
        bail!("{} of {} stages failed: {}", failed.len(), outcomes.len(), failed.join(", "));
    }
    println!("all {} stages passed", outcomes.len());
    Ok(())
}

fn cargo(args: &[&str]) -> Command {
    let mut c = cmd(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), args);
    c.current_dir(paths::workspace());
    c
}

/// Builds the product and gives its program.
pub fn build(release: bool) -> Result<PathBuf> {
    run(&mut if release {
        cargo(&["build", "--quiet", "--package", "whimbrel", "--release"])
    } else {
        // All of the workspace: a package alone takes other features of its dependencies, and the tests would
        // compile them again.
        cargo(&["build", "--quiet", "--workspace"])
    })?;
    Ok(paths::target().join(if release { "release" } else { "debug" }).join("whimbrel"))
}

/// A tool of cargo's, installed under `target/tools` if it is not on PATH.
pub fn tool(name: &str) -> Result<PathBuf> {
    let home = paths::target().join("tools");
    let own = home.join("bin").join(name);
    if own.exists() {
        return Ok(own);
    }
    if let Some(found) = find_program(name) {
        return Ok(found);
    }
    eprintln!("installing {name} under {}: a few minutes", home.display());
    let mut c = cargo(&["install", "--quiet", "--locked", "--root", &home.to_string_lossy(), name]);
    if name == "s3s-fs" {
        // The newest that the compiler we ask for can build; its program is optional.
        c.args(["--version", "0.14.1", "--features", "binary"]);
    }
    // A tool that runs for seconds need not be optimised for minutes; the store hashes what it is given.
    let opt_level = if name == "s3s-fs" { "1" } else { "0" };
    c.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", opt_level).env("CARGO_PROFILE_RELEASE_LTO", "off");
    c.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16").env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    c.env("CARGO_TARGET_DIR", home.join("build"));
    run(&mut c)?;
    // Sources and intermediate files of a tool are of no further use, and large.
    if let Err(e) = std::fs::remove_dir_all(home.join("build")) {
        eprintln!("remove {}: {e}", home.join("build").display());
    }
    Ok(own)
}

fn deny() -> Result<()> {
    let deny = tool("cargo-deny")?;
    let check = |what: &[&str]| {
        let mut c = cmd(&deny, &["--workspace", "--log-level", "error", "check", "--hide-inclusion-graph"]);
        c.args(what).current_dir(paths::workspace());
        c
    };
    run(&mut check(&["bans", "licenses", "sources"]))?;
    let out = output(&mut check(&["advisories"]))?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() {
        println!("checked bans, licences, sources and advisories");
    } else if ["failed to fetch", "failed to open advisory", "unable to fetch"]
        .iter()
        .any(|w| said.contains(w))
    {
        println!("checked bans, licences and sources; advisories not: their database cannot be reached");
    } else {
        bail!("cargo-deny found advisories:\n{}", tail(said.as_bytes(), 60));
    }
    Ok(())
}

fn tests(options: &Options) -> Result<()> {
    let nextest = tool("cargo-nextest")?;
    let home = paths::target().join("qemu");
    let (mut c, home) = if reachable_by_all(&home) || !install::is_root() {
        (cmd(nextest, &[]), home)
    } else {
        // Tests start QEMU as an unprivileged user, who cannot walk to a checkout in root's own directory.
        let mut c = cmd(
            "unshare",
            &["--mount", "sh", "-c", "mount --bind \"$1\" /mnt && shift && exec \"$@\"", "sh"],
        );
        c.arg(&home).arg(nextest);
        (c, PathBuf::from("/mnt"))
    };
    let programs =
        qemu::ensure_all()?.into_iter().map(|q| home.join(q.version.name()).join("bin/qemu-system-x86_64"));
    let programs: Vec<String> = programs.map(|p| p.display().to_string()).collect();
    c.args(["nextest", "run", "--workspace", "--profile", "ci"])
        .env("WHIMBREL_TEST_QEMU", programs.join(":"));
    if options.long {
        c.args(["--run-ignored", "all"]).env("WHIMBREL_LONG", "1");
    }
    c.env("WHIMBREL_TEST_S3S_FS", tool("s3s-fs")?);
    run(c.current_dir(paths::workspace()))
}

/// Whether every user may walk to this path.
fn reachable_by_all(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.ancestors().all(|p| p.metadata().is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}

fn simulator(options: &Options) -> Result<()> {
    let seeds = if options.long { "0..50000" } else { "0..1000" };
    build(false)?;
    run(&mut cmd(paths::target().join("debug/whimbrel-sim"), &["--seeds", seeds]))
}

fn end_to_end(options: &Options) -> Result<()> {
    let program = build(false)?;
    let mut failed = Vec::new();
    for (n, q) in qemu::ensure_all()?.iter().enumerate() {
        println!("── end to end, QEMU {}", q.version.name());
        let without: &[&str] = if n == 0 { &[] } else { &e2e::ANY_VERSION };
        if let Err(e) = end_to_end_on(q, &program, options.long, without) {
            eprintln!("{e:#}");
            failed.push(q.version.name());
        }
    }
    if !failed.is_empty() {
        bail!("failed on QEMU {}", failed.join(" and "));
    }
    Ok(())
}

/// In a process of its own, because that is what becomes the lab's first process.
fn end_to_end_on(q: &qemu::Qemu, program: &Path, long: bool, without: &[&str]) -> Result<()> {
    let mut c = cmd(paths::xtask()?, &["e2e", "--qemu"]);
    c.arg(q.version.name()).arg("--program").arg(program);
    c.args(without.iter().flat_map(|w| ["--without", w]));
    if long {
        c.arg("--long");
    }
    run(&mut c)
}

/// The kernel's release, such as `6.18.1`.
pub fn kernel_release() -> Result<String> {
    Ok(capture(&mut cmd("uname", &["-r"]))?.trim().to_owned())
}
