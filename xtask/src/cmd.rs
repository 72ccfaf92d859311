//! Running other programs: one way to start them, with the command line in every error.
//!
//! Invariant: a child that outlives the call is started through [`dying_with_us`], so that nothing is left
//! running when this process is killed.
//!
//! Not here: which programs exist on the machine (`install.rs`).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

/// The command as a person would type it.
pub fn line(cmd: &Command) -> String {
    let mut words = vec![cmd.get_program().to_string_lossy().into_owned()];
    words.extend(cmd.get_args().map(|a| {
        let a = a.to_string_lossy();
        if a.is_empty() || a.contains([' ', '"', '\'', '$', '*']) { format!("'{a}'") } else { a.into_owned() }
    }));
    words.join(" ")
}

/// Starts building a command without standard input.
pub fn cmd<S: AsRef<OsStr>>(program: S, args: &[&str]) -> Command {
    let mut c = Command::new(program);
    c.args(args).stdin(Stdio::null());
    c
}

/// Runs to the end with output passed on; an exit status other than 0 is an error.
pub fn run(cmd: &mut Command) -> Result<()> {
    let status = cmd.status().with_context(|| format!("start {}", line(cmd)))?;
    if !status.success() {
        bail!("{} ended with {status}", line(cmd));
    }
    Ok(())
}

/// Runs to the end and keeps the output; an exit status other than 0 is an error that carries the last lines
/// of standard error.
pub fn capture(cmd: &mut Command) -> Result<String> {
    let out = output(cmd)?;
    if !out.status.success() {
        bail!("{} ended with {}: {}", line(cmd), out.status, tail(&out.stderr, 12));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs to the end and keeps everything, whatever the status.
pub fn output(cmd: &mut Command) -> Result<Output> {
    cmd.stdout(Stdio::piped()).stderr(Stdio::piped());
    cmd.output().with_context(|| format!("start {}", line(cmd)))
}

/// The last `n` lines of a program's output.
pub fn tail(bytes: &[u8], n: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

/// A command that the kernel kills when this process's thread ends, however it ends.
pub fn dying_with_us<S: AsRef<OsStr>>(program: S, args: &[&str]) -> Command {
    let mut c = cmd("setpriv", &["--pdeathsig", "KILL", "--"]);
    c.arg(program).args(args);
    c
}

/// The first `name` on PATH or in the system's sbin directories.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(name)).find(|p| is_executable(p))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
