//! What a target keeps beside its journal until the guest runs: whoever resumes it, this process or a later one, needs it.
//!
//! Invariant: everything is kept before the source is told that it arrived, and removed when the attempt is over.
//!
//! Not here: the journal itself (`migrate::journal`), RAM and layers, which are where the VM will have them.

use whimbrel_wire::peer::migrate::DiskIo;

use super::TargetSide;
use crate::error::{Context as _, Error, ErrorKind, Result};

/// The device state.
const STATE_FILE: &str = "device-state";
/// The requests to do again; absent if there are none.
const IO_FILE: &str = "outstanding-io";

impl TargetSide {
    pub(super) fn state_path(&self) -> std::path::PathBuf {
        self.shared.journal.attachment(self.offer.attempt, STATE_FILE)
    }

    fn io_path(&self) -> std::path::PathBuf {
        self.shared.journal.attachment(self.offer.attempt, IO_FILE)
    }

    pub(super) async fn remove_attachments(&self) {
        for path in [self.state_path(), self.io_path()] {
            let _ = tokio::fs::remove_file(path).await;
        }
    }

    /// Keeps the list of requests to do again: whoever resumes the guest, this process or a later one, needs it.
    pub(super) fn keep_outstanding(&self, outstanding: &[DiskIo]) -> Result<()> {
        if outstanding.is_empty() {
            return Ok(());
        }
        let bytes = serde_json::to_vec(outstanding)
            .map_err(|error| Error::with_source(ErrorKind::Internal, "keep the list of requests", error))?;
        crate::durable::replace_fast(&self.io_path(), &bytes)
    }

    pub(super) async fn outstanding(&self) -> Result<Vec<DiskIo>> {
        let bytes = match tokio::fs::read(self.io_path()).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context("read the list of requests to do again"),
        };
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::with_source(ErrorKind::Corrupt, "read the list of requests to do again", error)
        })
    }
}
