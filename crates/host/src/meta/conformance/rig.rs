//! The stores under test, and what can be done to them.

use async_trait::async_trait;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use whimbrel_wire::{Name, Role};

use super::{MetaStore, write};
use crate::cluster::Authority;
use crate::link::proxy::{Mode, Proxy};
use crate::link::{LinkOptions, Links, Listening, Router};
use crate::meta::etcd::{EtcdOptions, EtcdStore};
use crate::meta::remote::RemoteStore;
use crate::meta::serve;
use crate::meta::sqlite::SqliteStore;

/// Revisions that the file keeps for watches.
const KEEP: u64 = 200;

#[async_trait]
pub(super) trait Rig: Send + Sync {
    /// One more process that uses the store.
    async fn client(&self) -> Arc<dyn MetaStore>;
    /// Makes the wire between clients and store lose things; `false` if there is no wire.
    fn lose(&self, mode: Mode) -> bool;
    /// Whether the store is reached over a wire.
    fn is_remote(&self) -> bool;
    /// The store fails as hard as it can.
    async fn stop(&mut self);
    /// It is back, with its data.
    async fn start(&mut self);
    /// Forgets the past.
    async fn compact(&mut self, store: &dyn MetaStore);
}

async fn push_out(store: &dyn MetaStore) {
    for number in 0..KEEP + 70 {
        write(store, "push", number.to_string()).await;
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Several agents that share a file. Its outage: another process holds the lock.
pub(super) struct SqliteRig {
    dir: TempDir,
    /// A connection may be handed from thread to thread, but not shared.
    lock: parking_lot::Mutex<Option<rusqlite::Connection>>,
}

impl SqliteRig {
    pub async fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), lock: parking_lot::Mutex::default() }
    }
}

#[async_trait]
impl Rig for SqliteRig {
    async fn client(&self) -> Arc<dyn MetaStore> {
        SqliteStore::open_keeping(&self.dir.path().join("meta.db"), KEEP).unwrap()
    }

    fn lose(&self, _mode: Mode) -> bool {
        false
    }

    fn is_remote(&self) -> bool {
        false
    }

    async fn stop(&mut self) {
        let lock = rusqlite::Connection::open(self.dir.path().join("meta.db")).unwrap();
        lock.busy_timeout(Duration::from_secs(10)).unwrap();
        lock.execute_batch("BEGIN IMMEDIATE").unwrap();
        *self.lock.lock() = Some(lock);
    }

    async fn start(&mut self) {
        self.lock.lock().take().unwrap().execute_batch("ROLLBACK").unwrap();
    }

    async fn compact(&mut self, store: &dyn MetaStore) {
        push_out(store).await;
    }
}

/// The file served by one host to others. Its outage: the host's process is gone.
pub(super) struct ServedRig {
    dir: TempDir,
    authority: Authority,
    server: Links,
    address: SocketAddr,
    listening: Option<Listening>,
    proxy: Proxy,
}

impl ServedRig {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::generate(&name("test")).unwrap();
        let credentials = authority.credentials(Role::Host, &name("server")).unwrap();
        let server = Links::new(credentials, LinkOptions::default()).unwrap();
        let address = free_address();
        let proxy = Proxy::start(address).await;
        let mut rig = Self { dir, authority, server, address, listening: None, proxy };
        rig.start().await;
        rig
    }
}

#[async_trait]
impl Rig for ServedRig {
    async fn client(&self) -> Arc<dyn MetaStore> {
        let credentials = self.authority.credentials(Role::Host, &name("client")).unwrap();
        let links = Links::new(credentials, LinkOptions::default()).unwrap();
        links.set_addresses(&name("server"), vec![self.proxy.address()]);
        RemoteStore::new(links, name("server"))
    }

    fn lose(&self, mode: Mode) -> bool {
        self.proxy.set(mode);
        true
    }

    fn is_remote(&self) -> bool {
        true
    }

    async fn stop(&mut self) {
        self.listening = None;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    async fn start(&mut self) {
        let store = SqliteStore::open_keeping(&self.dir.path().join("meta.db"), KEEP).unwrap();
        let router = serve::routes(&store, Router::new());
        self.listening = Some(self.server.listen(self.address, router).await.unwrap());
    }

    async fn compact(&mut self, store: &dyn MetaStore) {
        push_out(store).await;
    }
}

/// Debian's etcd with certificates of our authority. Its outage: `kill -9`.
pub(super) struct EtcdRig {
    dir: TempDir,
    address: SocketAddr,
    peer_address: SocketAddr,
    process: Option<Child>,
    proxy: Proxy,
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl EtcdRig {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::generate(&name("test")).unwrap();
        let (server, server_key) = authority.issue_service(&["127.0.0.1".into()], 3_600).unwrap();
        let subject = crate::cluster::Subject { role: Role::Host, name: name("client"), generation: 1 };
        let (client, client_key) = authority.issue(&subject, 3_600).unwrap();
        let write = |file: &str, text: &str| std::fs::write(dir.path().join(file), text).unwrap();
        write("ca.pem", authority.certificate_pem());
        write("server.pem", &server);
        write("server.key", &server_key);
        write("client.pem", &(client + &client_key));
        let (address, peer_address) = (free_address(), free_address());
        let proxy = Proxy::start(address).await;
        let mut rig = Self { dir, address, peer_address, process: None, proxy };
        rig.start().await;
        rig
    }

    fn options(&self, address: SocketAddr) -> EtcdOptions {
        EtcdOptions {
            endpoints: vec![format!("https://{address}")],
            ca: self.dir.path().join("ca.pem"),
            identity: self.dir.path().join("client.pem"),
        }
    }
}

#[async_trait]
impl Rig for EtcdRig {
    async fn client(&self) -> Arc<dyn MetaStore> {
        EtcdStore::new(self.options(self.proxy.address())).unwrap()
    }

    fn lose(&self, mode: Mode) -> bool {
        self.proxy.set(mode);
        true
    }

    fn is_remote(&self) -> bool {
        true
    }

    async fn stop(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    async fn start(&mut self) {
        let file = |name: &str| self.dir.path().join(name).display().to_string();
        let url = format!("https://{}", self.address);
        let peer_url = format!("http://{}", self.peer_address);
        let log = std::fs::File::create(self.dir.path().join("etcd.log")).unwrap();
        let process = Command::new("etcd")
            .args(["--name", "t", "--data-dir", &file("data")])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("t={peer_url}")])
            .args(["--cert-file", &file("server.pem"), "--key-file", &file("server.key")])
            .args(["--client-cert-auth", "--trusted-ca-file", &file("ca.pem")])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("etcd is installed (Debian package etcd-server)");
        self.process = Some(process);
        let direct = EtcdStore::new(self.options(self.address)).unwrap();
        for _ in 0..200 {
            if direct.get("x").await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let log = std::fs::read_to_string(self.dir.path().join("etcd.log")).unwrap();
        panic!("etcd does not start: {}", log.lines().rev().take(5).collect::<Vec<_>>().join("\n"));
    }

    async fn compact(&mut self, store: &dyn MetaStore) {
        let rev = store.read("").await.unwrap().rev;
        let pem = |name: &str| std::fs::read(self.dir.path().join(name)).unwrap();
        let tls = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(pem("ca.pem")))
            .identity(etcd_client::Identity::from_pem(pem("client.pem"), pem("client.pem")));
        let options = etcd_client::ConnectOptions::new().with_tls(tls);
        let url = format!("https://{}", self.address);
        let mut client = etcd_client::Client::connect([url], Some(options)).await.unwrap();
        client.compact(i64::try_from(rev).unwrap(), None).await.unwrap();
    }
}

impl Drop for EtcdRig {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
