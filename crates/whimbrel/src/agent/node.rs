//! This host's part of a cluster: everything that runs once there is a certificate.
//!
//! ```text
//!   certificate ─► links ─► metadata ─► hosts' records followed ─► store ─► volumes ─► VMs ─► moves ─► port opened
//! ```
//!
//! Invariants
//! * The port opens only when everything that it serves stands.
//! * A metadata store that does not answer at start delays what needs a right, not the start itself.

mod hosts;
mod images;
mod vms;
mod volumes;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::AbortHandle;
use whimbrel_host::cluster::{self, Facts, Files, Hosts, Membership, Service};
use whimbrel_host::link::{LinkOptions, Links, Listening, Router};
use whimbrel_host::meta::{self, MetaStore, Opened};
use whimbrel_host::migrate::Migrations;
use whimbrel_host::store::convert::{ConvertConfig, Converter};
use whimbrel_host::store::{Store, StoreConfig};
use whimbrel_host::task::Tasks;
use whimbrel_host::vm::{VmConfig, Vms};
use whimbrel_host::volume::{SpaceWatch, Volumes};
use whimbrel_host::{Context as _, Error, ErrorKind, Result};
use whimbrel_wire::api::{ClusterInit, HostJoin};
use whimbrel_wire::meta::{ImageParent, ImageRecord, Space};
use whimbrel_wire::peer::cluster::MetaLocation;
use whimbrel_wire::{HostId, Name, Role};

use super::{Agent, forward};
use crate::config::Config;

/// A host says that it lives about this often.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(10);
/// Between two looks at the space for volumes.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// So long the API waits for VMs that ran before.
const PICK_UP_WAIT: Duration = Duration::from_secs(5);
/// A host that has not said so for this long is shown as silent, seconds.
pub const SILENT_AFTER_S: u64 = 30;

/// See the module's charter.
pub struct Node {
    /// This host.
    pub host: HostId,
    /// Connections to other hosts.
    pub links: Links,
    /// The metadata store.
    pub meta: Arc<dyn MetaStore>,
    /// Images.
    pub store: Arc<Store>,
    /// Volumes.
    pub volumes: Volumes,
    /// Virtual machines.
    pub vms: Vms,
    /// Moves.
    pub migrations: Migrations,
    /// Long work.
    pub tasks: Tasks,
    convert: Arc<Converter>,
    hosts: Hosts,
    membership: Membership,
    _listening: Listening,
    background: Mutex<Vec<AbortHandle>>,
}

/// Makes a cluster's files.
pub async fn init(config: &Config, request: ClusterInit) -> Result<()> {
    let (host, addresses) = (config.name.parse::<Name>()?, addresses(config)?);
    let location = if config.meta.etcd.is_empty() {
        MetaLocation::Sqlite { path: config.sqlite_path().to_string_lossy().into_owned() }
    } else {
        MetaLocation::Etcd { endpoints: config.meta.etcd.clone() }
    };
    let dir = files_dir(config);
    let membership = cluster::init(&dir, &request.name, &host, &addresses, location)?;
    let files = Files::open(&dir)?;
    let founded = async {
        let (_links, opened) = connect(config, &files, &membership)?;
        cluster::found(&*opened.store, &files, request.store).await
    };
    let founded = founded.await;
    if founded.is_err() {
        // Half a cluster is none.
        let _ = std::fs::remove_dir_all(&dir);
    }
    founded
}

/// Joins a cluster.
pub async fn join(config: &Config, request: HostJoin) -> Result<()> {
    let host = config.name.parse::<Name>()?;
    let action = || format!("join the cluster of {}", request.address);
    let address = tokio::net::lookup_host(&request.address).await.with_context(action)?.next();
    let address =
        address.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{}: no address", action())))?;
    cluster::join(&files_dir(config), address, &request.token, &host, &addresses(config)?).await?;
    Ok(())
}

/// Whether this host is in a cluster.
pub fn is_member(config: &Config) -> bool {
    Files::open(&files_dir(config)).is_ok()
}

fn files_dir(config: &Config) -> PathBuf {
    config.data_dir.join("cluster")
}

/// `IP:PORT`s under which other hosts reach this one.
fn addresses(config: &Config) -> Result<Vec<String>> {
    if !config.advertise.is_empty() {
        return Ok(config.advertise.clone());
    }
    let listen: SocketAddr = config.listen.parse().map_err(|error| {
        Error::with_source(ErrorKind::InvalidInput, "read the configuration key `listen`", error)
    })?;
    if !listen.ip().is_unspecified() {
        return Ok(vec![listen.to_string()]);
    }
    let found = whimbrel_host::link::own_addresses()?;
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, listen.port()).to_string()).collect())
}

fn connect(config: &Config, files: &Files, membership: &Membership) -> Result<(Links, Opened)> {
    let links = Links::new(files.credentials(Role::Host)?, LinkOptions::default())?;
    let location = match &membership.meta {
        // A file that the configuration names is on this machine, shared by its agents.
        MetaLocation::Served { .. } if !config.meta.sqlite.as_os_str().is_empty() => {
            MetaLocation::Sqlite { path: config.meta.sqlite.to_string_lossy().into_owned() }
        }
        other => other.clone(),
    };
    let opened = meta::open(&location, &links, files)?;
    Ok((links, opened))
}

impl Node {
    /// Starts everything but the VMs that run already: see [`Node::pick_up`].
    pub async fn start(agent: &Arc<Agent>) -> Result<Arc<Self>> {
        let config = &agent.config;
        let files = Files::open(&files_dir(config))?;
        let membership = files.membership()?;
        let host = membership.name.clone();
        let (links, opened) = connect(config, &files, &membership)?;
        let meta = Arc::clone(&opened.store);
        let hosts = Hosts::default();
        let follow = tokio::spawn(cluster::follow_hosts(Arc::clone(&meta), links.clone(), hosts.clone()));
        let user = vm_user(&config.vm_user);
        let store =
            Store::open(store_config(config, &host), Arc::clone(&meta), Arc::new(links.clone())).await?;
        let run_dir = config.run_dir.join("volumes");
        let volumes = Volumes::new(
            host.clone(),
            &config.data_dir,
            run_dir,
            Arc::clone(&meta),
            Arc::clone(&store),
            links.clone(),
        )?;
        let vm_config = VmConfig {
            records_dir: config.data_dir.join("vms"),
            run_dir: config.run_dir.join("vms"),
            memory_dir: config.memory_dir.clone(),
            qemu: (config.qemu != "qemu-system-x86_64").then(|| PathBuf::from(&config.qemu)),
            user,
            write_tracking: config.write_tracking.into(),
        };
        let vms = Vms::new(host.clone(), vm_config, Arc::clone(&meta), volumes.clone())?;
        let migrations = Migrations::new(
            host.clone(),
            links.clone(),
            Arc::clone(&meta),
            vms.clone(),
            agent.tasks.clone(),
            config.memory.techniques(),
            config.data_dir.join("moves"),
        )?;
        let service = Service::new(Arc::clone(&meta), links.clone(), &files)?;
        let renew = tokio::spawn(cluster::keep_renewed(Arc::clone(&service), files.clone()));
        let router = router(agent, &service, &migrations, &volumes, &store, &opened);
        let listen: SocketAddr = config.listen.parse().map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, "read the configuration key `listen`", error)
        })?;
        let listening = links.listen(listen, router).await?;
        tracing::info!(%host, address = %listening.address(), cluster = %membership.cluster, "serving");
        let facts = Facts {
            addresses: addresses(config)?,
            version: env!("CARGO_PKG_VERSION").into(),
            platform: platform(&vms).await,
            space: None,
        };
        let announce = tokio::spawn(announce(Arc::clone(&meta), host.clone(), facts, volumes.clone()));
        let mut convert = ConvertConfig::new(&config.data_dir);
        convert.backing_dir =
            (!config.backing_dir.as_os_str().is_empty()).then(|| config.backing_dir.clone());
        if let Some((uid, gid)) = user {
            (convert.uid, convert.gid) = (uid, gid);
        }
        let background = [follow.abort_handle(), renew.abort_handle(), announce.abort_handle()];
        Ok(Arc::new(Self {
            host,
            links,
            meta,
            store,
            volumes,
            vms,
            migrations,
            tasks: agent.tasks.clone(),
            convert: Arc::new(Converter::new(convert)?),
            hosts,
            membership,
            _listening: listening,
            background: Mutex::new(background.into()),
        }))
    }

    /// Finds what an earlier process of this agent left running, and goes on with its moves. Goes on in the
    /// background if that takes longer than [`PICK_UP_WAIT`], as with a store that does not answer.
    pub async fn pick_up(self: &Arc<Self>) {
        let node = Arc::clone(self);
        let mut task = tokio::spawn(async move {
            let result = async {
                let unfinished = node.migrations.unfinished()?;
                node.migrations.recover().await?;
                node.vms.pick_up(&unfinished).await?;
                node.resume_removals().await
            };
            if let Err(error) = result.await {
                tracing::error!(%error, "not everything that ran before was picked up");
            }
        });
        self.background.lock().push(task.abort_handle());
        let _ = tokio::time::timeout(PICK_UP_WAIT, &mut task).await;
        let vms = self.vms.clone();
        let asking = tokio::spawn(async move { vms.ask_ahead().await });
        self.background.lock().push(asking.abort_handle());
    }

    /// Stops serving; VMs go on.
    pub async fn stop(&self) {
        for task in self.background.lock().drain(..) {
            task.abort();
        }
        self.volumes.detach_files().await;
        self.store.stop().await;
    }
}

fn store_config(config: &Config, host: &HostId) -> StoreConfig {
    StoreConfig {
        keep_after_peer_fetches: config.keep_after_fetches,
        upload_bytes_s: config.upload_limit_bytes_s,
        scrub_bytes_s: config.scrub_bytes_s,
        ..StoreConfig::new(&config.data_dir, host.clone())
    }
}

fn router(
    agent: &Arc<Agent>,
    service: &Arc<Service>,
    migrations: &Migrations,
    volumes: &Volumes,
    store: &Arc<Store>,
    opened: &Opened,
) -> Router {
    let (api, remote) = (Arc::clone(agent), Arc::clone(agent));
    let router = Router::new()
        .call(forward::METHOD, move |_peer, params, body| forward::answer(Arc::clone(&api), params, body))
        .http(move |stream| Arc::clone(&remote).serve_remote(stream));
    opened.routes(migrations.register(volumes.register(service.routes(store.register(router)))))
}

/// Says that this host lives, and how much space its volumes have; at once if that becomes short.
async fn announce(meta: Arc<dyn MetaStore>, host: HostId, mut facts: Facts, volumes: Volumes) {
    let (mut watch, mut promised_bytes) = (SpaceWatch::default(), 0);
    loop {
        match volumes.promised_bytes().await {
            Ok(bytes) => promised_bytes = bytes,
            Err(error) => tracing::debug!(%error, "cannot read what this host's volumes promise"),
        }
        facts.space = look(&mut watch, &volumes, promised_bytes);
        if let Err(error) = cluster::announce(&*meta, &host, &facts).await {
            tracing::warn!(%error, "cannot tell the cluster that this host lives");
        }
        let said = facts.space.map(|space| space.pressure);
        let again = tokio::time::Instant::now() + ANNOUNCE_EVERY;
        while tokio::time::Instant::now() < again {
            tokio::time::sleep(LOOK_EVERY).await;
            if look(&mut watch, &volumes, promised_bytes).map(|space| space.pressure) != said {
                break;
            }
        }
    }
}

fn look(watch: &mut SpaceWatch, volumes: &Volumes, promised_bytes: u64) -> Option<Space> {
    match watch.look(volumes, promised_bytes) {
        Ok(space) => Some(space),
        Err(error) => {
            tracing::warn!(%error, "cannot tell how much space volumes have");
            None
        }
    }
}

async fn platform(vms: &Vms) -> String {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    match vms.qemu().await {
        Ok(qemu) => format!("Linux {kernel}, QEMU {}", qemu.version),
        Err(error) => {
            tracing::warn!(%error, "no VM can be run here");
            format!("Linux {kernel}, no QEMU")
        }
    }
}

/// The unprivileged user's ids; none if this agent is not root and cannot change to another user.
fn vm_user(name: &str) -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = |wanted: &str| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == wanted).then_some(())?;
            let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
            Some((uid, gid))
        })
    };
    ids(name).or_else(|| {
        tracing::warn!(user = name, "the user for VMs does not exist; they run as nobody");
        ids("nobody")
    })
}

/// What lies under a volume made from an image.
fn parent_of(record: &ImageRecord) -> ImageParent {
    ImageParent { image: record.image.clone(), id: record.id, store_url: record.store_url.clone() }
}
