//! Work that waits for disks, on a thread that may wait.
//!
//! Invariant: an async thread never waits for a disk; whoever has such work hands it over here. Work that is begun
//! runs to its end even when nobody awaits it any more.
//!
//! Not here: threads that live for as long as a disk is served (`export`), loops of a whole transfer (`memory`).

use crate::error::{Error, ErrorKind, Result};

/// Runs `work` on a blocking thread. If it panics the error is `Internal` and says what was being done (`action`:
/// "verb + object").
pub async fn blocking<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::with_source(ErrorKind::Internal, action, error))?
}
