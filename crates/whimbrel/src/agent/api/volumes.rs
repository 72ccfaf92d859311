//! `/v1/volumes`: handlers.

use std::sync::Arc;

use axum::extract::{Path, State};
use whimbrel_wire::api::{
    Export, TaskStarted, Volume, VolumeAttach, VolumeCheck, VolumeCreate, VolumeImport, VolumeRelink,
    VolumeResize, VolumeSnapshot,
};
use whimbrel_wire::meta::IoLimits;
use whimbrel_wire::{Name, SnapshotRef};

use super::{Agent, Answer, JsonBody, answer};

pub async fn list(State(agent): State<Arc<Agent>>) -> Answer<Vec<Volume>> {
    answer(agent.node()?.volumes_list().await?)
}

pub async fn create(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<VolumeCreate>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_create(request).await?)
}

pub async fn import(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<VolumeImport>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.volume_import(request).await?)
}

pub async fn show(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<Volume> {
    answer(agent.node()?.volume_show(&name).await?)
}

pub async fn check(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<VolumeCheck> {
    answer(agent.node()?.volume_check(&name).await?)
}

pub async fn snapshot(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<Option<VolumeSnapshot>>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_snapshot(&name, request.unwrap_or_default()).await?)
}

pub async fn limit(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(limits): JsonBody<IoLimits>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_limit(&name, limits).await?)
}

pub async fn resize(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<VolumeResize>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_resize(&name, &request).await?)
}

pub async fn snapshot_remove(
    State(agent): State<Arc<Agent>>,
    Path((volume, snapshot)): Path<(Name, Name)>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.snapshot_remove(SnapshotRef { volume, snapshot }).await?)
}

pub async fn relink(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<Option<VolumeRelink>>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_relink(&name, request.unwrap_or_default()).await?)
}

pub async fn export(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<Export>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.volume_export(&name, request).await?)
}

pub async fn attach(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<VolumeAttach>,
) -> Answer<Volume> {
    answer(agent.node()?.volume_attach(&name, &request).await?)
}

pub async fn detach(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<Volume> {
    answer(agent.node()?.volume_detach(&name).await?)
}

pub async fn remove(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<Volume> {
    answer(agent.node()?.volume_remove(&name).await?)
}
