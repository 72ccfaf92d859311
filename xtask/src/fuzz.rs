//! Long fuzzing: every target of the `fuzz` modules, each for a while, with coverage.
//!
//! ```text
//!   RUSTC_WORKSPACE_WRAPPER ─▶ our crates are built with edge counters, their dependencies are not built again
//!   nextest ─▶ each target a process of its own ─▶ target/fuzz/corpus/TARGET
//! ```
//!
//! Not here: how inputs are made, and why this way (`crates/fuzz`).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::cmd::{cmd, run};
use crate::{check, paths};

/// Crates with targets.
const PACKAGES: [&str; 3] = ["whimbrel-wire", "whimbrel-host", "whimbrel"];
/// Per target, unless told otherwise.
pub const SECONDS: u64 = 60;

/// In front of rustc, for our own crates: edge counters and compared constants, except in the fuzzer itself.
const WRAPPER: &str = r#"#!/bin/sh
case " $* " in *" --crate-name whimbrel_fuzz "*) exec "$@";; esac
exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-trace-compares
"#;

/// Fuzzes the targets whose name contains `only`, `seconds` each.
pub fn run_for(seconds: u64, only: &str) -> Result<()> {
    let home = paths::target().join("fuzz");
    let mut c = cmd(check::tool("cargo-nextest")?, &["nextest", "run", "--lib", "--bins", "--retries", "0"]);
    c.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    c.args(["--no-fail-fast", "--success-output", "final"]);
    // Longer than a target runs: what hangs says so itself.
    fs::create_dir_all(&home).context("make target/fuzz")?;
    let config = home.join("nextest.toml");
    let limit = seconds + 120;
    let text =
        format!("[profile.default]\nslow-timeout = {{ period = \"{limit}s\", terminate-after = 1 }}\n");
    fs::write(&config, text).context("write nextest's configuration")?;
    c.arg("--config-file").arg(&config);
    let chosen = if only.is_empty() { String::new() } else { format!(" & test({only})") };
    c.args(["-E", &format!("test(/(^|::)fuzz::/){chosen}")]);
    c.env("RUSTC_WORKSPACE_WRAPPER", wrapper(&home)?);
    c.env("WHIMBREL_FUZZ_S", seconds.to_string()).env("WHIMBREL_FUZZ_DIR", home.join("corpus"));
    run(c.current_dir(paths::workspace()))
}

fn wrapper(home: &std::path::Path) -> Result<PathBuf> {
    let path = home.join("rustc-with-coverage");
    // Cargo looks at its time: an old one stays as it is.
    if fs::read_to_string(&path).ok().as_deref() != Some(WRAPPER) {
        fs::write(&path, WRAPPER).context("write the compiler's wrapper")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("make it executable")?;
    }
    Ok(path)
}
