//! Calls of the API that another host has to answer.
//!
//! ```text
//! request ?host=B at A ──► call `host.api` over the link ──► B's own router, as an operator ──► answer back
//! ```
//!
//! Invariant: what is forwarded runs at the other host with the access of an operator, never as its local socket:
//! file paths and QEMU arguments do not travel.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tower::ServiceExt as _;
use whimbrel_host::{Error, ErrorKind, Result};
use whimbrel_wire::{HostId, Role};

use super::Agent;
use super::api::{self, Caller};

/// The method's name.
pub const METHOD: &str = "host.api";

/// Short calls only; long work is a task.
const LIMIT: Duration = Duration::from_secs(100);

const BODY_MAX_BYTES: usize = 4 << 20;

/// A request on its way; the payload is its body.
#[derive(Debug, Serialize, Deserialize)]
pub struct Forwarded {
    method: String,
    path: String,
}

/// The answer; the payload is its body.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answered {
    status: u16,
}

/// Has `host` answer `request`.
pub async fn forward(agent: &Agent, host: &str, request: Request) -> Result<Response> {
    let host: HostId = host.parse()?;
    let params = Forwarded { method: request.method().to_string(), path: request.uri().path().to_owned() };
    let body = axum::body::to_bytes(request.into_body(), BODY_MAX_BYTES)
        .await
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read the request", error))?;
    call(agent, &host, &params, body).await
}

/// As [`forward`], for a call that this host makes itself.
pub async fn post<T: serde::de::DeserializeOwned>(
    node: &super::node::Node,
    host: &HostId,
    path: String,
    body: &impl Serialize,
) -> Result<T> {
    let body = serde_json::to_vec(body)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write the request", error))?;
    let params = Forwarded { method: "POST".into(), path };
    let (answer, bytes): (Answered, Bytes) =
        node.links.call(host, METHOD, &params, Bytes::from(body), LIMIT).await?;
    if answer.status != 200 {
        let error = serde_json::from_slice::<whimbrel_wire::WireError>(&bytes).map_err(|error| {
            Error::with_source(ErrorKind::Internal, format!("read the answer of host {host}"), error)
        })?;
        return Err(error.into());
    }
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::with_source(ErrorKind::Internal, format!("read the answer of host {host}"), error)
    })
}

async fn call(agent: &Agent, host: &HostId, params: &Forwarded, body: Bytes) -> Result<Response> {
    let node = agent.node()?;
    let (answer, bytes): (Answered, Bytes) = node.links.call(host, METHOD, params, body, LIMIT).await?;
    Response::builder()
        .status(answer.status)
        .header("content-type", "application/json")
        .body(Body::from(bytes))
        .map_err(|error| Error::with_source(ErrorKind::Internal, "forward the answer", error))
}

/// Answers a forwarded request.
pub async fn answer(agent: Arc<Agent>, params: Forwarded, body: Bytes) -> Result<(Answered, Bytes)> {
    let request = Request::builder()
        .method(params.method.as_str())
        .uri(params.path)
        .header("content-type", "application/json")
        .extension(Caller::Remote(Role::Operator))
        .body(Body::from(body))
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read the forwarded request", error))?;
    let response = match api::router(agent).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let status = response.status();
    let limit = if status == StatusCode::OK { BODY_MAX_BYTES } else { 64 << 10 };
    let bytes = axum::body::to_bytes(response.into_body(), limit)
        .await
        .map_err(|error| Error::with_source(ErrorKind::Internal, "answer the forwarded request", error))?;
    Ok((Answered { status: status.as_u16() }, bytes))
}
