//! The table of all routes: who may call, and what `/openapi.json` says of them.

use axum::extract::State;
use axum::http::Method;
use axum::response::Response;
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{ContentBuilder, Ref, Required, ResponseBuilder};
use whimbrel_wire::api as dto;

use super::Agent;

/// Who may call a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Any role but guests.
    Read,
    /// Operators, and the unix socket.
    Operate,
    /// The unix socket only: the request names files of this host or raw QEMU arguments.
    Local,
}

/// One route.
pub struct Route {
    method: Method,
    path: &'static str,
    access: Access,
    /// Name of the request's type, if it has a body.
    request: Option<&'static str>,
    /// Name of the answer's type; `[]` before it for a list.
    response: &'static str,
    summary: &'static str,
}

const fn route(
    method: Method,
    path: &'static str,
    access: Access,
    request: Option<&'static str>,
    response: &'static str,
    summary: &'static str,
) -> Route {
    Route { method, path, access, request, response, summary }
}

use Access::{Local, Operate, Read};

const GET: Method = Method::GET;
const POST: Method = Method::POST;
const DELETE: Method = Method::DELETE;

/// See the module's charter.
pub const ROUTES: &[Route] = &[
    route(GET, "/openapi.json", Read, None, "", "This document"),
    route(GET, "/metrics", Read, None, "", "Figures, as Prometheus reads them"),
    route(POST, "/v1/cluster", Local, Some("ClusterInit"), "Host", "Make a cluster"),
    route(POST, "/v1/cluster/token", Operate, Some("TokenMake"), "Token", "Make a join token"),
    route(GET, "/v1/hosts", Read, None, "[]Host", "All hosts"),
    route(POST, "/v1/hosts/join", Local, Some("HostJoin"), "Host", "Join a cluster"),
    route(GET, "/v1/hosts/{name}", Read, None, "Host", "One host"),
    route(DELETE, "/v1/hosts/{name}", Operate, None, "Host", "Remove a host: revoke its certificate"),
    route(POST, "/v1/hosts/{name}/drain", Operate, Some("HostDrain"), "Host", "Refuse or take new VMs"),
    route(GET, "/v1/links", Read, None, "[]Link", "Connections to other hosts"),
    route(GET, "/v1/links/{name}", Read, None, "Link", "The connection to one host"),
    route(GET, "/v1/tasks", Read, None, "[]Task", "All long work of this host"),
    route(GET, "/v1/tasks/{id}", Read, None, "Task", "One task"),
    route(POST, "/v1/tasks/{id}/cancel", Operate, None, "Task", "Ask a task to stop and undo what it did"),
    route(POST, "/v1/tasks/{id}/limit", Operate, Some("TaskLimit"), "Task", "Limit what a task sends"),
    route(GET, "/v1/events", Read, None, "", "Tasks as they change, as server-sent events"),
    route(GET, "/v1/images", Read, None, "[]Image", "All images"),
    route(POST, "/v1/images", Local, Some("ImagePublish"), "TaskStarted", "Publish a file of this host"),
    route(GET, "/v1/images/{image}", Read, None, "Image", "One image"),
    route(DELETE, "/v1/images/{image}", Operate, None, "Image", "Forget an image's name"),
    route(POST, "/v1/images/{image}/verify", Operate, Some("ImageCheck"), "TaskStarted", "Check every block"),
    route(POST, "/v1/images/{image}/prefetch", Operate, None, "TaskStarted", "Fetch the whole image"),
    route(
        POST,
        "/v1/images/{image}/export",
        Local,
        Some("Export"),
        "TaskStarted",
        "Write the image to a file",
    ),
    route(GET, "/v1/volumes", Read, None, "[]Volume", "All volumes"),
    route(POST, "/v1/volumes", Operate, Some("VolumeCreate"), "Volume", "Make a volume"),
    route(
        POST,
        "/v1/volumes/import",
        Local,
        Some("VolumeImport"),
        "TaskStarted",
        "Make a volume from a file",
    ),
    route(GET, "/v1/volumes/{name}", Read, None, "Volume", "One volume"),
    route(DELETE, "/v1/volumes/{name}", Operate, None, "Volume", "Delete a volume and its data"),
    route(POST, "/v1/volumes/{name}/check", Operate, None, "VolumeCheck", "Check all invariants; reads only"),
    route(
        POST,
        "/v1/volumes/{name}/resize",
        Operate,
        Some("VolumeResize"),
        "Volume",
        "Make it larger, while it is in use",
    ),
    route(
        POST,
        "/v1/volumes/{name}/snapshots",
        Operate,
        Some("VolumeSnapshot"),
        "Volume",
        "Take a snapshot, while it is in use",
    ),
    route(
        DELETE,
        "/v1/volumes/{name}/snapshots/{snapshot}",
        Operate,
        None,
        "TaskStarted",
        "Remove a snapshot: its blocks go into a neighbour",
    ),
    route(
        POST,
        "/v1/volumes/{name}/limit",
        Operate,
        Some("IoLimits"),
        "Volume",
        "Limit what its clients have of it; what is not named is not limited",
    ),
    route(
        POST,
        "/v1/volumes/{name}/relink",
        Operate,
        Some("VolumeRelink"),
        "Volume",
        "Accept that the content under a layer is not what it was made over",
    ),
    route(
        POST,
        "/v1/volumes/{name}/export",
        Local,
        Some("Export"),
        "TaskStarted",
        "Write the volume to a file",
    ),
    route(POST, "/v1/volumes/{name}/attach", Local, Some("VolumeAttach"), "Volume", "Show it on a socket"),
    route(POST, "/v1/volumes/{name}/detach", Operate, None, "Volume", "Take the socket away"),
    route(GET, "/v1/vms", Read, None, "[]Vm", "All virtual machines"),
    route(
        POST,
        "/v1/vms",
        Operate,
        Some("VmRun"),
        "Vm",
        "Start a VM (remotely: without paths and QEMU arguments)",
    ),
    route(POST, "/v1/vms/adopt", Local, Some("VmAdopt"), "TaskStarted", "Take over a running QEMU"),
    route(GET, "/v1/vms/{name}", Read, None, "Vm", "One VM"),
    route(GET, "/v1/vms/{name}/console", Local, None, "VmConsole", "Where its console is"),
    route(POST, "/v1/vms/{name}/stop", Operate, Some("VmStop"), "Vm", "Shut it down"),
    route(POST, "/v1/vms/{name}/migrate", Operate, Some("VmMigrate"), "TaskStarted", "Move it while it runs"),
    route(POST, "/v1/vms/{name}/recover", Operate, Some("VmRecover"), "Vm", "Take it over from a dead host"),
];

/// Who may call `method path`, if there is such a route.
pub fn access(method: &Method, path: &str) -> Option<Access> {
    ROUTES.iter().find(|route| route.method == *method && route.path == path).map(|route| route.access)
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Whimbrel host agent",
        description = "Moves virtual machines between hosts while they run."
    ),
    components(schemas(
        dto::Vm,
        dto::VmRun,
        dto::VmAdopt,
        dto::VmMigrate,
        dto::VmConsole,
        dto::VmStop,
        dto::VmRecover,
        dto::Task,
        dto::TaskStarted,
        dto::Image,
        dto::ImagePublish,
        dto::ImageCheck,
        dto::Export,
        dto::Volume,
        dto::VolumeCreate,
        dto::VolumeImport,
        dto::VolumeAttach,
        dto::VolumeCheck,
        dto::VolumeLayer,
        dto::VolumeSnapshot,
        dto::VolumeRelink,
        dto::VolumeResize,
        dto::Host,
        dto::HostJoin,
        dto::HostDrain,
        dto::TaskLimit,
        dto::ClusterInit,
        dto::TokenMake,
        dto::Token,
        dto::Link,
        whimbrel_wire::WireError
    ))
)]
struct Schemas;

/// The API's document, made from the table.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = Schemas::openapi();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    for route in ROUTES {
        let method = match route.method {
            Method::POST => HttpMethod::Post,
            Method::DELETE => HttpMethod::Delete,
            _ => HttpMethod::Get,
        };
        document.paths.add_path_operation(route.path, vec![method], operation(route));
    }
    document
}

fn operation(route: &Route) -> utoipa::openapi::path::Operation {
    let json = |name: &str| {
        let schema: utoipa::openapi::RefOr<utoipa::openapi::Schema> = match name.strip_prefix("[]") {
            Some(name) => {
                utoipa::openapi::ArrayBuilder::new().items(Ref::from_schema_name(name)).build().into()
            }
            None => Ref::from_schema_name(name).into(),
        };
        ContentBuilder::new().schema(Some(schema)).build()
    };
    let mut ok = ResponseBuilder::new().description("done");
    if !route.response.is_empty() {
        ok = ok.content("application/json", json(route.response));
    }
    let error = ResponseBuilder::new().description("error").content("application/json", json("WireError"));
    let who = match route.access {
        Read => "Host, operator and reader certificates, and the unix socket.",
        Operate => "Operator certificates and the unix socket.",
        Local => "The unix socket only.",
    };
    let mut operation = OperationBuilder::new()
        .summary(Some(route.summary))
        .description(Some(who))
        .response("200", ok)
        .response("default", error);
    for name in route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
        operation = operation.parameter(
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .build(),
        );
    }
    operation = operation.parameter(
        ParameterBuilder::new()
            .name("host")
            .parameter_in(ParameterIn::Query)
            .description(Some("pass the call on to this host"))
            .build(),
    );
    if let Some(name) = route.request {
        operation = operation
            .request_body(Some(RequestBodyBuilder::new().content("application/json", json(name)).build()));
    }
    operation.build()
}

/// `GET /openapi.json`
pub async fn document(State(_agent): State<Arc<Agent>>) -> Response {
    let body = openapi().to_json().unwrap_or_default();
    super::text("application/json", body)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_type_that_the_table_names_is_described() {
        let document = openapi();
        let schemas = document.components.unwrap().schemas;
        for route in ROUTES {
            for name in [route.request.unwrap_or(""), route.response.trim_start_matches("[]")] {
                assert!(name.is_empty() || schemas.contains_key(name), "{name}");
            }
        }
    }

    #[test]
    fn what_names_files_is_local() {
        for route in ROUTES {
            if matches!(route.request, Some("ImagePublish" | "Export" | "VolumeImport" | "VmAdopt")) {
                assert_eq!(route.access, Local, "{}", route.path);
            }
            assert!(route.method != Method::GET || route.access != Operate, "{}", route.path);
        }
    }
}
