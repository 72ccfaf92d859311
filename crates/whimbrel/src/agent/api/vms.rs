//! `/v1/vms`: handlers.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, State};
use whimbrel_host::{Error, ErrorKind};
use whimbrel_wire::Name;
use whimbrel_wire::api::{TaskStarted, Vm, VmAdopt, VmConsole, VmMigrate, VmRecover, VmRun, VmStop};

use super::{Agent, Answer, Caller, JsonBody, answer};

pub async fn list(State(agent): State<Arc<Agent>>) -> Answer<Vec<Vm>> {
    answer(agent.node()?.vms_list().await?)
}

pub async fn show(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<Vm> {
    answer(agent.node()?.vm_show(&name).await?)
}

pub async fn run(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Extension<Caller>,
    JsonBody(request): JsonBody<VmRun>,
) -> Answer<Vm> {
    let spec = &request.spec;
    let local_only = spec.kernel.is_some()
        || spec.initrd.is_some()
        || !spec.qemu_args.is_empty()
        || spec.foreign.is_some();
    if local_only && caller != Caller::Local {
        return Err(Error::new(
            ErrorKind::Denied,
            format!(
                "run vm {}: a kernel, an initrd and QEMU arguments are taken on the unix socket only",
                request.name
            ),
        )
        .into());
    }
    answer(agent.node()?.vm_run(request).await?)
}

pub async fn adopt(
    State(agent): State<Arc<Agent>>,
    JsonBody(request): JsonBody<VmAdopt>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.vm_adopt(request).await?)
}

pub async fn console(State(agent): State<Arc<Agent>>, Path(name): Path<Name>) -> Answer<VmConsole> {
    answer(agent.node()?.vm_console(&name).await?)
}

pub async fn stop(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<Option<VmStop>>,
) -> Answer<Vm> {
    answer(agent.node()?.vm_stop(&name, request.unwrap_or_default()).await?)
}

pub async fn migrate(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<VmMigrate>,
) -> Answer<TaskStarted> {
    answer(agent.node()?.vm_migrate(&name, request).await?)
}

pub async fn recover(
    State(agent): State<Arc<Agent>>,
    Path(name): Path<Name>,
    JsonBody(request): JsonBody<VmRecover>,
) -> Answer<Vm> {
    answer(agent.node()?.vm_recover(&name, request).await?)
}
