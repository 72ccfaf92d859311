//! Blocks between hosts: the client and the server side of `image.bitmap`, `image.have` and `image.block`.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;
use whimbrel_wire::HostId;

use crate::error::Result;

/// How calls reach other hosts. The links implement it; tests put liars in its place.
#[async_trait]
pub trait PeerTransport: Send + Sync {
    /// Calls `method` on `host` with JSON parameters and a payload, and gives the result and its payload.
    async fn call(
        &self,
        host: &HostId,
        method: &'static str,
        params: Value,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<(Value, Bytes)>;
}
