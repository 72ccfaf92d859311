//! Layers under a volume's writable one, which go ahead of it.
//!
//! Invariant: one that is here already, whole and with the same content, is not sent; one with other content that
//! something lies on refuses the move before anything is lost.

use tokio::io::AsyncWriteExt as _;
use whimbrel_wire::peer::migrate::{LayerHave, LayerHead};
use whimbrel_wire::{DiskId, ErrorKind, Name};

use super::super::data;
use super::{TargetSide, attempt_is_over};
use crate::blocking::blocking;
use crate::disk::LayerSpec;
use crate::error::{Context as _, Error, Result};
use crate::link::PeerStream;

impl TargetSide {
    /// Receives a layer under a volume's writable one, unless it is here.
    pub(super) async fn receive_lower(
        &self,
        mut stream: PeerStream,
        volume: Option<Name>,
        disk_id: DiskId,
    ) -> Result<()> {
        let what = || format!("receive layer {disk_id}");
        let _in_use = self.layers_in_use.read().await;
        if *self.over.borrow() {
            return Err(attempt_is_over());
        }
        let head: LayerHead = self.unless_over(data::read_json(&mut stream)).await?;
        let name = volume.filter(|_| head.disk_id == disk_id);
        let name =
            name.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{}: another came", what())))?;
        let record = self.volumes.read(&name).await?;
        if !record.layers.iter().any(|layer| layer.disk_id == disk_id) {
            let why = format!("{}: volume {name} does not lie on it", what());
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        let spec = LayerSpec::from(head);
        let volumes = self.shared.vms.volumes().clone();
        // Two VMs that come at once may lie on the same layer.
        let _one = self.shared.lower.lock().await;
        volumes.pin(&name, disk_id);
        let have = volumes.has_lower(&spec)?;
        data::write_json(&mut stream, &LayerHave { have }).await?;
        stream.flush().await.context("say which layers are here")?;
        if have {
            return Ok(());
        }
        let receiver = volumes.lower_receiver(&spec)?;
        let result = match self.take_chunks(&mut stream, receiver, &name).await? {
            Ok(received) => blocking("seal a received layer", move || received.seal()).await,
            Err(error) => Err(error),
        };
        data::write_result(&mut stream, &result).await?;
        result
    }
}
