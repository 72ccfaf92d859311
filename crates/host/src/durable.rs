//! Small files that survive power loss: written beside, synced, renamed over.
//!
//! Invariant: a reader sees the old content or the new, whole; when [`replace`] has returned it is the new one,
//! also after power loss.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use crate::error::{Context as _, Result};

/// Replaces the content of `path` durably. Mode 0600.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, true)
}

/// Replaces the content of `path`; survives the end of the process, not necessarily power loss.
pub fn replace_fast(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, false)
}

fn write(path: &Path, bytes: &[u8], sync: bool) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let action = || format!("write {}", path.display());
    let beside = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .with_context(action)?;
    file.write_all(bytes).with_context(action)?;
    if sync {
        file.sync_all().with_context(action)?;
    }
    fs::rename(&beside, path).with_context(action)?;
    if sync && let Some(dir) = path.parent() {
        File::open(dir).and_then(|dir| dir.sync_all()).with_context(action)?;
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_last_content_is_read_and_nothing_is_left_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        replace(&path, b"one").unwrap();
        replace_fast(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace(&dir.path().join("none/b"), b"x").is_err());
    }
}
