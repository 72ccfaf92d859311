//! The HTTP API: JSON on the agent's unix socket, and over TLS for those with a client certificate.
//!
//! Charter: turn a request into one call of the [`Node`](super::node::Node), and its result into an answer. Who
//! may call what stands in one table, [`routes::ROUTES`], which is also where `/openapi.json` comes from; a route
//! that is not in the table is answered 404.
//!
//! ```text
//! request ─► forward (?host=OTHER) ─► allow (table, caller) ─► handler ─► Node
//! ```
//!
//! Invariants: file paths and raw QEMU arguments are taken from the local socket only; an error answer is a
//! `WireError` with the status of its kind.

mod images;
mod routes;
mod system;
mod vms;
mod volumes;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::de::DeserializeOwned;
use whimbrel_host::{Error, ErrorKind};
use whimbrel_wire::{Role, WireError};

use super::Agent;
pub use routes::Access;

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Somebody who may open the unix socket.
    Local,
    /// Somebody with a certificate of this role.
    Remote(Role),
}

/// The most that a request's body may be, bytes.
const BODY_MAX_BYTES: usize = 1 << 20;

/// The API of `agent`. Every request must carry a [`Caller`] extension; without one it counts as a stranger's.
pub fn router(agent: Arc<Agent>) -> Router {
    let v1 = Router::new()
        .route("/cluster", post(system::cluster_init))
        .route("/cluster/token", post(system::cluster_token))
        .route("/hosts", get(system::hosts))
        .route("/hosts/join", post(system::host_join))
        .route("/hosts/{name}", get(system::host).delete(system::host_remove))
        .route("/hosts/{name}/drain", post(system::host_drain))
        .route("/links", get(system::links))
        .route("/links/{name}", get(system::link))
        .route("/tasks", get(system::tasks))
        .route("/tasks/{id}", get(system::task))
        .route("/tasks/{id}/cancel", post(system::task_cancel))
        .route("/tasks/{id}/limit", post(system::task_limit))
        .route("/events", get(system::events))
        .route("/images", get(images::list).post(images::publish))
        .route("/images/{image}", get(images::show).delete(images::remove))
        .route("/images/{image}/verify", post(images::verify))
        .route("/images/{image}/prefetch", post(images::prefetch))
        .route("/images/{image}/export", post(images::export))
        .route("/volumes", get(volumes::list).post(volumes::create))
        .route("/volumes/import", post(volumes::import))
        .route("/volumes/{name}", get(volumes::show).delete(volumes::remove))
        .route("/volumes/{name}/check", post(volumes::check))
        .route("/volumes/{name}/resize", post(volumes::resize))
        .route("/volumes/{name}/snapshots", post(volumes::snapshot))
        .route("/volumes/{name}/snapshots/{snapshot}", delete(volumes::snapshot_remove))
        .route("/volumes/{name}/limit", post(volumes::limit))
        .route("/volumes/{name}/relink", post(volumes::relink))
        .route("/volumes/{name}/export", post(volumes::export))
        .route("/volumes/{name}/attach", post(volumes::attach))
        .route("/volumes/{name}/detach", post(volumes::detach))
        .route("/vms", get(vms::list).post(vms::run))
        .route("/vms/adopt", post(vms::adopt))
        .route("/vms/{name}", get(vms::show))
        .route("/vms/{name}/console", get(vms::console))
        .route("/vms/{name}/stop", post(vms::stop))
        .route("/vms/{name}/migrate", post(vms::migrate))
        .route("/vms/{name}/recover", post(vms::recover));
    Router::new()
        .nest("/v1", v1)
        .route("/openapi.json", get(routes::document))
        .route("/metrics", get(system::metrics))
        .route_layer(middleware::from_fn(allow))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&agent), forward))
        .fallback(|| async { Failure(Error::new(ErrorKind::NotFound, "find the page: there is none")) })
        .with_state(agent)
}

/// Refuses what the table does not allow this caller.
async fn allow(request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let Some(access) = routes::access(request.method(), path) else {
        return Failure(Error::new(
            ErrorKind::NotFound,
            format!("find {} {path}: there is none", request.method()),
        ))
        .into_response();
    };
    let caller = request.extensions().get::<Caller>().copied();
    let allowed = match (caller, access) {
        (Some(Caller::Local), _)
        | (Some(Caller::Remote(Role::Operator)), Access::Operate | Access::Read)
        | (Some(Caller::Remote(Role::Host | Role::Reader)), Access::Read) => true,
        (Some(Caller::Remote(_)) | None, _) => false,
    };
    if allowed {
        return next.run(request).await;
    }
    let who = caller.map_or_else(|| "a stranger".into(), |caller| format!("{caller:?}"));
    let error =
        Error::new(ErrorKind::Denied, format!("call {} {path}: not allowed to {who}", request.method()));
    Failure(match access {
        Access::Local => error.hint("this call is taken on the agent's unix socket only"),
        _ => error,
    })
    .into_response()
}

/// Passes a request for another host (`?host=NAME`) on to it.
async fn forward(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    let query = request.uri().query().unwrap_or("");
    let host = query.split('&').find_map(|pair| pair.strip_prefix("host="));
    let Some(host) = host.filter(|host| *host != agent.config.name) else {
        return next.run(request).await;
    };
    let caller = request.extensions().get::<Caller>().copied();
    // A certificate is good for the host it was shown to: only people at this host's socket, or operators, are
    // spoken for elsewhere.
    if !matches!(caller, Some(Caller::Local | Caller::Remote(Role::Operator))) {
        return Failure(Error::new(ErrorKind::Denied, "forward the call to another host: not allowed"))
            .into_response();
    }
    let host = host.to_owned();
    match super::forward::forward(&agent, &host, request).await {
        Ok(response) => response,
        Err(error) => Failure(error).into_response(),
    }
}

/// An error as an answer.
pub struct Failure(pub Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.kind().http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(self.0.to_wire())).into_response()
    }
}

/// What a handler returns.
pub type Answer<T> = Result<axum::Json<T>, Failure>;

/// Wraps a value as an answer.
pub fn answer<T>(value: T) -> Answer<T> {
    Ok(axum::Json(value))
}

/// A JSON body; an empty one counts as `null`. Errors are of kind `InvalidInput`.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        let bytes = axum::body::to_bytes(request.into_body(), BODY_MAX_BYTES)
            .await
            .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read the request", error))?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text)
            .map(Self)
            .map_err(|error| Failure(Error::with_source(ErrorKind::InvalidInput, "read the request", error)))
    }
}

/// Text with a content type.
pub fn text(content_type: &'static str, body: String) -> Response {
    ([(header::CONTENT_TYPE, content_type)], Body::from(body)).into_response()
}
