//! Calls of the agent's API over its unix socket.
//!
//! Invariant: an error answer of the agent comes back as the [`WireError`] it sent; an agent that cannot be
//! reached is `Unavailable` with words on how to start it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use whimbrel_wire::{ErrorKind, WireError};

/// See the module's charter.
pub struct Client {
    socket: PathBuf,
}

/// The most that an answer may be, bytes.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Answers to short calls come within this time; long work is a task.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

impl Client {
    /// A client of the agent that listens on `socket`. Connects at each call.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE path`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::POST, path, Bytes::from(serde_json::to_vec(body)?)).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<T> {
        let answer =
            tokio::time::timeout(ANSWER_LIMIT, self.exchange(method, path, body)).await.map_err(|_| {
                WireError::new(
                    ErrorKind::TimedOut,
                    format!("wait for the agent's answer: none within {ANSWER_LIMIT:?}"),
                )
            })??;
        serde_json::from_slice(&answer).context("read the agent's answer")
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Bytes> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            WireError::new(
                ErrorKind::Unavailable,
                format!("reach the agent at {}: {error}", self.socket.display()),
            )
            .hint("start it with `whimbrel agent`, or name its socket with --socket")
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "whimbrel")
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await.context("send the request to the agent")?;
        let status = response.status();
        let limited = http_body_util::Limited::new(response.into_body(), ANSWER_MAX_BYTES);
        let bytes = limited
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("read the agent's answer: {error}"))?
            .to_bytes();
        connection.abort();
        if status.is_success() {
            return Ok(bytes);
        }
        let error = serde_json::from_slice::<WireError>(&bytes).unwrap_or_else(|_| {
            WireError::new(
                ErrorKind::Internal,
                format!("call the agent: it answered {status}: {}", String::from_utf8_lossy(&bytes)),
            )
        });
        Err(error.into())
    }
}
