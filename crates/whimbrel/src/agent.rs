//! The host agent: starts everything, serves the API, stops cleanly.
//!
//! ```text
//!            ┌── no certificate: waits for `cluster init` or `host join`
//!  start ────┤                                   │
//!            └── certificate ──► Node: links, metadata, store, volumes, VMs ──► picks up what runs ──► serves
//! ```
//!
//! Invariants
//! * The agent may end at any moment: VMs go on, their disks' requests wait, and the next start picks them up.
//! * Without a cluster only `cluster init`, `host join`, tasks and metrics answer.
//!
//! Not here: what the calls do ([`node`]), who may call ([`api`]).

pub mod api;
mod forward;
mod node;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Extension;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use parking_lot::RwLock;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use whimbrel_host::link::PeerStream;
use whimbrel_host::task::Tasks;
use whimbrel_host::{Error, ErrorKind};
use whimbrel_wire::api::{ClusterInit, Host, HostJoin};

use crate::config::Config;
use api::Caller;
use node::Node;

/// The agent; one per process.
pub struct Agent {
    /// The effective configuration.
    pub config: Config,
    /// Long work.
    pub tasks: Tasks,
    node: RwLock<Option<Arc<Node>>>,
    /// `init` and `join` one at a time.
    joining: tokio::sync::Mutex<()>,
}

/// Runs the agent until SIGTERM or SIGINT.
pub async fn run(file: Option<&Path>) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("WHIMBREL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let config = Config::load(file)?;
    for dir in [&config.data_dir, &config.run_dir, &config.memory_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
    }
    let listener = listen(&config.socket)?;
    let agent = Arc::new(Agent {
        config,
        tasks: Tasks::default(),
        node: RwLock::new(None),
        joining: tokio::sync::Mutex::new(()),
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let api = api::router(Arc::clone(&agent)).layer(Extension(Caller::Local));
    if node::is_member(&agent.config) {
        agent.start_node().await?;
    } else {
        tracing::info!(
            "in no cluster yet: `whimbrel cluster init` makes one, `whimbrel host join` joins one"
        );
    }
    // Callers wait in the socket's queue until here, so that nobody sees a host without its VMs.
    let serve = tokio::spawn(async move { axum::serve(listener, api).await });
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
        result = serve => result.context("serve the API")?.context("serve the API")?,
    }
    tracing::info!("agent stops; VMs go on");
    let node = agent.node.write().take();
    if let Some(node) = node {
        node.stop().await;
    }
    let _ = std::fs::remove_file(&agent.config.socket);
    Ok(())
}

/// Binds the API's socket, mode 0600. A socket that somebody answers on belongs to another agent.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("listen on {}: another agent answers there", path.display()),
        )
        .hint("stop it, or give this one its own `run_dir` and `data_dir`")
        .into());
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("restrict {}", path.display()))?;
    Ok(listener)
}

impl Agent {
    /// This host's part of the cluster.
    pub fn node(&self) -> Result<Arc<Node>, Error> {
        self.node.read().clone().ok_or_else(|| {
            Error::new(ErrorKind::Missing, "use the cluster: this host is in none")
                .hint("`whimbrel cluster init` makes one, `whimbrel host join ADDR --token T` joins one")
        })
    }

    /// Makes a cluster with this host as its first member.
    pub async fn init(self: &Arc<Self>, request: ClusterInit) -> Result<Host, Error> {
        let _one = self.joining.lock().await;
        self.refuse_second()?;
        node::init(&self.config, request).await?;
        self.start_node().await?.host_self().await
    }

    /// Joins a cluster.
    pub async fn join(self: &Arc<Self>, request: HostJoin) -> Result<Host, Error> {
        let _one = self.joining.lock().await;
        self.refuse_second()?;
        node::join(&self.config, request).await?;
        self.start_node().await?.host_self().await
    }

    fn refuse_second(&self) -> Result<(), Error> {
        if node::is_member(&self.config) {
            return Err(Error::new(ErrorKind::AlreadyExists, "join a cluster: this host is in one already")
                .hint("to leave it: `whimbrel host remove` on another host, then empty the data directory"));
        }
        Ok(())
    }

    async fn start_node(self: &Arc<Self>) -> Result<Arc<Node>, Error> {
        let node = Node::start(self).await?;
        *self.node.write() = Some(Arc::clone(&node));
        node.pick_up().await;
        Ok(node)
    }

    /// All figures, as Prometheus reads them.
    pub fn metrics_text(&self) -> String {
        if let Ok(node) = self.node() {
            // Refreshes the gauges of the cache.
            node.store.figures();
        }
        whimbrel_host::metrics::text()
    }

    /// Serves the API to somebody who came over TLS.
    pub async fn serve_remote(self: Arc<Self>, stream: PeerStream) {
        let caller = Caller::Remote(stream.peer().role);
        let router = api::router(self).layer(Extension(caller));
        let service = TowerToHyperService::new(router);
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        if let Err(error) = connection.await {
            tracing::debug!(%error, "remote API connection ended");
        }
    }
}
