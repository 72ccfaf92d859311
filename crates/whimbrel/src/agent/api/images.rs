//! `/v1/images`: handlers.

use std::sync::Arc;

use axum::extract::{Path, State};
use whimbrel_wire::ImageRef;
use whimbrel_wire::api::{Export, Image, ImageCheck, ImagePublish, TaskStarted};

use super::{Agent, Answer, JsonBody, answer};

pub async fn list(State(agent): State<Arc<Agent>>) -> Answer<Vec<Image>> {
    answer(agent.node()?.images_list().await?)
}

pub async fn publish(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<ImagePublish>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.image_publish(request).await?)
}

pub async fn show(State(agent): State<Arc<Agent>>, Path(image): Path<ImageRef>) -> Answer<Image> {
    answer(agent.node()?.image_show(&image).await?)
}

pub async fn verify(
    State(agent): State<Arc<Agent>>,
    Path(image): Path<ImageRef>,
    JsonBody(request): JsonBody<Option<ImageCheck>>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.image_verify(&image, request.unwrap_or_default().store).await?)
}

pub async fn prefetch(State(agent): State<Arc<Agent>>, Path(image): Path<ImageRef>) -> Answer<TaskStarted> {
    answer(agent.node()?.image_prefetch(&image).await?)
}

pub async fn export(
    State(agent): State<Arc<Agent>>,
    Path(image): Path<ImageRef>,
    JsonBody(request): JsonBody<Export>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.image_export(&image, request).await?)
}

pub async fn remove(State(agent): State<Arc<Agent>>, Path(image): Path<ImageRef>) -> Answer<Image> {
    answer(agent.node()?.image_remove(&image).await?)
}
