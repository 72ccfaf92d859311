//! Where things lie: everything that xtask makes is under the workspace's `target/` directory.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The root of the workspace that this xtask was built from.
pub fn workspace() -> PathBuf {
    // CARGO_MANIFEST_DIR is .../xtask; cargo sets it for `cargo run`, the built-in value serves direct starts.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target directory, which holds images, unpacked packages and tools too.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// This program's own file. Building the workspace may have put another one in its place since it was started.
pub fn xtask() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find xtask's own program")?;
    let name = own.to_string_lossy();
    Ok(name.strip_suffix(" (deleted)").map_or_else(|| own.clone(), PathBuf::from))
}
