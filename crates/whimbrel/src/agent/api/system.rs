//! Cluster, hosts, links, tasks, metrics: handlers.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt as _};
use whimbrel_wire::HostId;
use whimbrel_wire::api::{ClusterInit, Host, HostDrain, HostJoin, Link, Task, TaskLimit, Token, TokenMake};

use super::{Agent, Answer, JsonBody, answer, text};

pub async fn cluster_init(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<ClusterInit>,
) -> Answer<Host> {
    answer(agent.init(request).await?)
}

pub async fn host_join(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<HostJoin>,
) -> Answer<Host> {
    answer(agent.join(request).await?)
}

pub async fn cluster_token(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<TokenMake>,
) -> Answer<Token> {
    answer(agent.node()?.token(request.role).await?)
}

pub async fn hosts(State(agent): State<Arc<Agent>>) -> Answer<Vec<Host>> {
    answer(agent.node()?.hosts().await?)
}

pub async fn host(State(agent): State<Arc<Agent>>, Path(name): Path<HostId>) -> Answer<Host> {
    answer(agent.node()?.host(&name).await?)
}

pub async fn host_drain(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<HostId>,
    JsonBody(request): JsonBody<HostDrain>,
) -> Answer<Host> {
    answer(agent.node()?.host_drain(&name, request.draining).await?)
}

pub async fn host_remove(State(agent): State<Arc<Agent>>, Path(name): Path<HostId>) -> Answer<Host> {
    answer(agent.node()?.host_remove(&name).await?)
}

pub async fn links(State(agent): State<Arc<Agent>>) -> Answer<Vec<Link>> {
    answer(agent.node()?.links_list().await?)
}

pub async fn link(State(agent): State<Arc<Agent>>, Path(name): Path<HostId>) -> Answer<Link> {
    answer(agent.node()?.link(&name).await?)
}

pub async fn tasks(State(agent): State<Arc<Agent>>) -> Answer<Vec<Task>> {
    answer(agent.tasks.list())
}

pub async fn task(State(agent): State<Arc<Agent>>, Path(id): Path<u64>) -> Answer<Task> {
    answer(agent.tasks.show(id)?)
}

pub async fn task_cancel(State(agent): State<Arc<Agent>>, Path(id): Path<u64>) -> Answer<Task> {
    agent.tasks.cancel(id)?;
    answer(agent.tasks.show(id)?)
}

pub async fn task_limit(
    State(agent): State<Arc<Agent>>,
    Path(id): Path<u64>,
    JsonBody(limit): JsonBody<TaskLimit>,
) -> Answer<Task> {
    agent.tasks.limit(id, limit.bandwidth_bytes_s)?;
    answer(agent.tasks.show(id)?)
}

/// All tasks once, and again whenever one changes.
pub async fn events(State(agent): State<Arc<Agent>>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let tasks = agent.tasks.clone();
    let changes = tasks.changes();
    let stream =
        futures_util::stream::unfold((tasks, changes, true), |(tasks, mut changes, first)| async move {
            if !first {
                changes.changed().await.ok()?;
                // A running task changes many times a second; people need less.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            changes.mark_unchanged();
            let list = tasks.list();
            Some((list, (tasks, changes, false)))
        })
        .map(|list| Ok(Event::default().event("tasks").json_data(list).unwrap_or_default()));
    Sse::new(stream).keep_alive(KeepAlive::default())
}

pub async fn metrics(State(agent): State<Arc<Agent>>) -> Response {
    text("text/plain; version=0.0.4", agent.metrics_text()).into_response()
}
