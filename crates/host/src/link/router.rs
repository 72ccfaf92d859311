//! What a host answers: methods and streams by name, each checked against the role table before it runs.
//!
//! ```text
//! let router = Router::new()
//!     .call("image.block", |peer, params: BlockRequest, _payload| async move { Ok((answer, bytes)) })
//!     .stream("migrate.memory", |peer, params: MemoryStart, offer| async move {
//!         let stream = offer.accept().await?;          // or return an error: the peer gets it
//!         …
//!     });
//! ```
//!
//! Invariant: a method that `engine::trust::role` does not know cannot be registered, so none is open by mistake.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use whimbrel_engine::trust::role;
use whimbrel_wire::peer::cluster::{JoinAnswer, JoinRequest};

use super::credentials::PeerIdentity;
use super::frame::to_json;
use super::serve::StreamOffer;
use super::stream::PeerStream;
use crate::error::{Error, ErrorKind, Result};

type CallHandler = Arc<
    dyn Fn(PeerIdentity, Box<RawValue>, Bytes) -> BoxFuture<'static, Result<(Vec<u8>, Bytes)>> + Send + Sync,
>;
type StreamHandler =
    Arc<dyn Fn(PeerIdentity, Box<RawValue>, StreamOffer) -> BoxFuture<'static, Result<()>> + Send + Sync>;
type HttpHandler = Arc<dyn Fn(PeerStream) -> BoxFuture<'static, ()> + Send + Sync>;
type JoinHandler =
    Arc<dyn Fn(SocketAddr, JoinRequest, Bytes) -> BoxFuture<'static, Result<JoinAnswer>> + Send + Sync>;

/// See the module's charter.
#[derive(Default, Clone)]
pub struct Router {
    calls: HashMap<&'static str, CallHandler>,
    streams: HashMap<&'static str, StreamHandler>,
    http: Option<HttpHandler>,
    join: Option<JoinHandler>,
}

fn params_of<P: DeserializeOwned>(method: &str, params: &RawValue) -> Result<P> {
    serde_json::from_str(params.get()).map_err(|error| {
        Error::with_source(ErrorKind::InvalidInput, format!("read the parameters of {method}"), error)
    })
}

/// Registering a method that no role may call, or twice, is a mistake of the program that its first start shows.
fn check_name(method: &str, taken: bool) {
    assert!(!role::allowed(method).is_empty(), "{method} stands in no rule of engine::trust::role");
    assert!(!taken, "{method} is registered twice");
}

impl Router {
    /// A router that answers nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers `method`: the handler gets who calls, the parameters and the payload, and returns the result and
    /// a payload. It runs to its end even if the caller goes away, so it limits its own waiting.
    ///
    /// # Panics
    /// If the role table does not know the method, or it is registered already.
    #[must_use]
    pub fn call<P, R, F, Fut>(mut self, method: &'static str, handler: F) -> Self
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize,
        F: Fn(PeerIdentity, P, Bytes) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(R, Bytes)>> + Send + 'static,
    {
        check_name(method, self.calls.contains_key(method));
        let erased: CallHandler = Arc::new(move |peer, params, payload| {
            let made = params_of(method, &params).map(|params| handler(peer, params, payload));
            Box::pin(async move {
                let (result, payload) = made?.await?;
                Ok((to_json(&result, "a result")?, payload))
            })
        });
        self.calls.insert(method, erased);
        self
    }

    /// Serves streams of `service`. What the handler returns before it has accepted the offer reaches the peer
    /// as the error of its request; afterwards errors are logged here, and the peer sees the stream end.
    ///
    /// # Panics
    /// As [`Router::call`].
    #[must_use]
    pub fn stream<P, F, Fut>(mut self, service: &'static str, handler: F) -> Self
    where
        P: DeserializeOwned + Send + 'static,
        F: Fn(PeerIdentity, P, StreamOffer) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        check_name(service, self.streams.contains_key(service));
        let erased: StreamHandler = Arc::new(move |peer, params, offer| {
            let made = params_of(service, &params).map(|params| handler(peer, params, offer));
            Box::pin(async move { made?.await })
        });
        self.streams.insert(service, erased);
        self
    }

    /// Hands connections of the remote API over; the role is in [`PeerStream::peer`] and checked per request by
    /// the handler with `engine::trust::role::may_request`.
    #[must_use]
    pub fn http<F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(PeerStream) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.http = Some(Arc::new(move |stream| Box::pin(handler(stream))));
        self
    }

    /// Answers those who join: no certificate yet, the token is in the request; the payload is their certificate
    /// request (DER).
    #[must_use]
    pub fn join<F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(SocketAddr, JoinRequest, Bytes) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<JoinAnswer>> + Send + 'static,
    {
        self.join = Some(Arc::new(move |from, request, payload| Box::pin(handler(from, request, payload))));
        self
    }

    pub(super) fn find_call(&self, peer: &PeerIdentity, method: &str) -> Result<&CallHandler> {
        allow(peer, method)?;
        self.calls.get(method).ok_or_else(|| unknown(method))
    }

    pub(super) fn find_stream(&self, peer: &PeerIdentity, service: &str) -> Result<&StreamHandler> {
        allow(peer, service)?;
        self.streams.get(service).ok_or_else(|| unknown(service))
    }

    pub(super) fn find_http(&self) -> Option<&HttpHandler> {
        self.http.as_ref()
    }

    pub(super) fn find_join(&self) -> Option<&JoinHandler> {
        self.join.as_ref()
    }
}

fn allow(peer: &PeerIdentity, method: &str) -> Result<()> {
    if role::may_call(peer.role, method) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Denied, format!("call {method:.64}: the role {} does not allow it", peer.role)))
}

fn unknown(method: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("call {method:.64}: this host does not know the method"))
        .hint("the peer's release may be newer than this one")
}
