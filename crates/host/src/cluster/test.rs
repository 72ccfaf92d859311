//! Joining, renewing and removing, on real sockets.

use super::*;
use crate::link::{Links, Listening, PeerIdentity, Router};
use crate::meta::sqlite::SqliteStore;
use bytes::Bytes;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use tempfile::TempDir;
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(10);

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A member that listens and serves joins and renewals.
struct Node {
    files: Files,
    links: Links,
    listening: Listening,
    hosts: Hosts,
    tasks: JoinSet<()>,
}

struct Cluster {
    dir: TempDir,
    store: Arc<SqliteStore>,
    first: Node,
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn start(dir: &Path, store: &Arc<SqliteStore>, address: SocketAddr, life_s: u64) -> Node {
    let files = Files::open(dir).unwrap();
    let links = Links::new(files.credentials(Role::Host).unwrap(), LinkOptions::default()).unwrap();
    let service = Service::with_life(store.clone(), links.clone(), &files, life_s).unwrap();
    let router = Router::new()
        .call("host.who", |peer: PeerIdentity, _: (), _| async move { Ok((peer.to_string(), Bytes::new())) });
    let listening = links.listen(address, service.routes(router)).await.unwrap();
    let hosts = Hosts::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_hosts(store.clone(), links.clone(), hosts.clone()));
    tasks.spawn(keep_renewed(service, files.clone()));
    Node { files, links, listening, hosts, tasks }
}

async fn cluster_with_life(life_s: u64) -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&dir.path().join("meta.db")).unwrap();
    let address = free_address();
    let location = MetaLocation::Sqlite { path: dir.path().join("meta.db").display().to_string() };
    init(&dir.path().join("a"), &name("lab"), &name("a"), &[address.to_string()], location).unwrap();
    let files = Files::open(&dir.path().join("a")).unwrap();
    found(&*store, &files, None).await.unwrap();
    found(&*store, &files, None).await.unwrap();
    let first = start(&dir.path().join("a"), &store, address, life_s).await;
    Cluster { dir, store, first }
}

async fn cluster() -> Cluster {
    cluster_with_life(HOST_LIFE_S).await
}

impl Cluster {
    async fn token(&self, role: Role, life_s: u64) -> String {
        make_token(&*self.store, self.first.links.credentials(), role, life_s).await.unwrap().token
    }

    async fn join_at(&self, at: SocketAddr, host: &str, token: &str, own: SocketAddr) -> Result<Membership> {
        join(&self.dir.path().join(host), at, token, &name(host), &[own.to_string()]).await
    }

    async fn join(&self, host: &str, token: &str) -> Result<Membership> {
        self.join_at(self.first.listening.address(), host, token, free_address()).await
    }

    /// A further host, joined through `at` and running.
    async fn member(&self, host: &str, at: SocketAddr) -> Node {
        let own = free_address();
        let token = self.token(Role::Host, TOKEN_LIFE_S).await;
        self.join_at(at, host, &token, own).await.unwrap();
        start(&self.dir.path().join(host), &self.store, own, HOST_LIFE_S).await
    }
}

async fn who(from: &Links, to: &str) -> Result<String> {
    let answer = from.call::<(), String>(&name(to), "host.who", &(), Bytes::new(), SOON).await?;
    Ok(answer.0)
}

/// Repeats until it is so, for ten seconds.
async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within ten seconds: {what}");
}

#[tokio::test]
async fn init_keeps_keys_private_and_is_done_once() {
    let cluster = cluster().await;
    let dir = cluster.first.files.dir();
    for file in ["ca.key", "host.pem", "operator.pem"] {
        let mode = std::fs::metadata(dir.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let location = MetaLocation::Etcd { endpoints: vec![] };
    let again = init(dir, &name("lab"), &name("a"), &["127.0.0.1:1".into()], location.clone());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
    for bad in ["nowhere", "0.0.0.0:7000", "127.0.0.1:0", "host:7000"] {
        let wrong = init(&dir.join("x"), &name("lab"), &name("a"), &[bad.into()], location.clone());
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
    }
    let other = tempfile::tempdir().unwrap();
    init(other.path(), &name("lab"), &name("a"), &["127.0.0.1:1".into()], location).unwrap();
    let foreign = found(&*cluster.store, &Files::open(other.path()).unwrap(), None).await;
    assert_eq!(foreign.unwrap_err().kind(), ErrorKind::AlreadyExists);
}

#[tokio::test]
async fn a_host_joins_with_a_token_that_is_good_once() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    let stored = cluster.store.read(key::TOKENS).await.unwrap().items;
    let secret = token.parse::<JoinToken>().unwrap().secret().to_owned();
    assert_eq!(stored.len(), 1);
    assert!(!stored[0].key.contains(&secret) && !String::from_utf8_lossy(&stored[0].value).contains(&secret));
    let own = free_address();
    let membership = cluster.join_at(cluster.first.listening.address(), "b", &token, own).await.unwrap();
    assert_eq!((membership.role, membership.cluster.as_str()), (Role::Host, "lab"));
    assert!(matches!(&membership.meta, MetaLocation::Served { by } if by.name == name("a")));
    assert!(cluster.store.read(key::TOKENS).await.unwrap().items.is_empty());
    let b = start(&cluster.dir.path().join("b"), &cluster.store, own, HOST_LIFE_S).await;
    assert_eq!(who(&b.links, "a").await.unwrap(), "host b");
    eventually("a knows b", async || who(&cluster.first.links, "b").await.is_ok()).await;
    assert_eq!(cluster.first.hosts.member(&name("b")).unwrap().addresses, [own.to_string()]);
    // Used.
    let used = cluster.join("c", &token).await.unwrap_err();
    assert_eq!(used.kind(), ErrorKind::Denied, "{used}");
    assert!(!cluster.dir.path().join("c/cluster.json").exists());
    // The name is taken; the token survives that.
    let token = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    let other = tempfile::tempdir().unwrap();
    let at = cluster.first.listening.address();
    let taken = join(other.path(), at, &token, &name("b"), &["127.0.0.1:9".into()]).await;
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(cluster.join("c", &token).await.is_ok());
}

#[tokio::test]
async fn of_many_who_use_one_token_one_joins() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    let hosts: Vec<String> = (0..6).map(|number| format!("h{number}")).collect();
    let joins = hosts.iter().map(|host| cluster.join(host, &token));
    let joined = futures_util::future::join_all(joins).await;
    assert_eq!(joined.iter().filter(|it| it.is_ok()).count(), 1, "{joined:?}");
    assert_eq!(cluster.store.read(key::HOSTS).await.unwrap().items.len(), 2);
}

#[tokio::test]
async fn expired_foreign_and_damaged_tokens_are_refused() {
    let cluster = cluster().await;
    let expired = cluster.token(Role::Host, 0).await;
    assert_eq!(cluster.join("b", &expired).await.unwrap_err().kind(), ErrorKind::Denied);
    let good = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    assert_eq!(cluster.store.read(key::TOKENS).await.unwrap().items.len(), 1, "expired ones are forgotten");
    // A token of this cluster whose fingerprint is another authority's: the server is not believed.
    let (front, _) = good.rsplit_once('-').unwrap();
    let foreign = format!("{front}-{}", "ab".repeat(32));
    let refused = cluster.join("b", &foreign).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    assert_eq!(cluster.store.read(key::TOKENS).await.unwrap().items.len(), 1, "the secret was not sent");
    // Guessed: the right fingerprint and a wrong secret.
    let (_, print) = good.rsplit_once('-').unwrap();
    let guessed = format!("whimbrel-{}-{print}", "00".repeat(32));
    assert_eq!(cluster.join("b", &guessed).await.unwrap_err().kind(), ErrorKind::Denied);
    for damaged in ["", "whimbrel", &good[..40], &good.replace("whimbrel", "wimbrel")] {
        let error = cluster.join("b", damaged).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{damaged:?}");
    }
    assert!(cluster.join("b", &good).await.is_ok());
}

#[tokio::test]
async fn an_operator_joins_without_becoming_a_host() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Operator, TOKEN_LIFE_S).await;
    let dir = cluster.dir.path().join("laptop");
    let at = cluster.first.listening.address();
    let membership = join(&dir, at, &token, &name("anna"), &[]).await.unwrap();
    assert_eq!(membership.role, Role::Operator);
    let files = Files::open(&dir).unwrap();
    assert_eq!(files.credentials(Role::Operator).unwrap().me().host, name("anna"));
    assert_eq!(cluster.store.read(key::HOSTS).await.unwrap().items.len(), 1);
    let links = Links::new(files.credentials(Role::Operator).unwrap(), LinkOptions::default()).unwrap();
    links.set_addresses(&name("a"), vec![at]);
    assert_eq!(who(&links, "a").await.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn a_member_without_the_authority_forwards_joins() {
    let cluster = cluster().await;
    let b = cluster.member("b", cluster.first.listening.address()).await;
    let c = cluster.member("c", b.listening.address()).await;
    assert!(b.files.authority().unwrap().is_none());
    assert_eq!(who(&c.links, "a").await.unwrap(), "host c");
    eventually("c reaches b", async || who(&c.links, "b").await.is_ok()).await;
}

#[tokio::test]
async fn a_removed_host_is_cut_off_everywhere_and_may_join_again() {
    let cluster = cluster().await;
    let b = cluster.member("b", cluster.first.listening.address()).await;
    let c = cluster.member("c", cluster.first.listening.address()).await;
    eventually("b reaches c", async || who(&b.links, "c").await.is_ok()).await;
    let signer = name("a");
    assert_eq!(remove(&*cluster.store, &signer, &signer).await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(remove(&*cluster.store, &name("x"), &signer).await.unwrap_err().kind(), ErrorKind::NotFound);
    remove(&*cluster.store, &name("b"), &signer).await.unwrap();
    eventually("a and c refuse b", async || {
        who(&b.links, "a").await.is_err() && who(&b.links, "c").await.is_err()
    })
    .await;
    assert_eq!(cluster.first.hosts.member(&name("b")).unwrap_err().kind(), ErrorKind::NotFound);
    let facts = Facts::default();
    assert_eq!(announce(&*cluster.store, &name("b"), &facts).await.unwrap_err().kind(), ErrorKind::Denied);
    // Again, from an empty directory: the old certificate stays refused.
    let own = b.listening.address();
    let Node { links: old, listening, mut tasks, .. } = b;
    drop(listening);
    tasks.shutdown().await;
    let token = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    std::fs::remove_dir_all(cluster.dir.path().join("b")).unwrap();
    cluster.join_at(cluster.first.listening.address(), "b", &token, own).await.unwrap();
    let b = start(&cluster.dir.path().join("b"), &cluster.store, own, HOST_LIFE_S).await;
    assert_eq!(b.links.me().generation, 2);
    eventually("b is served again", async || {
        who(&b.links, "a").await.is_ok() && who(&b.links, "c").await.is_ok()
    })
    .await;
    assert!(who(&old, "a").await.is_err());
    drop(c);
}

#[tokio::test]
async fn certificates_renew_themselves_under_traffic() {
    // Every certificate that the authority signs from now on lives for three seconds.
    let cluster = cluster_with_life(3).await;
    let own = free_address();
    let token = cluster.token(Role::Host, TOKEN_LIFE_S).await;
    cluster.join_at(cluster.first.listening.address(), "b", &token, own).await.unwrap();
    let b = start(&cluster.dir.path().join("b"), &cluster.store, own, 3).await;
    let first = b.links.credentials().info();
    for _ in 0..140 {
        assert_eq!(who(&b.links, "a").await.unwrap(), "host b");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let now = b.links.credentials().info();
    assert!(now.not_after_s >= first.not_after_s + 4, "{} {}", now.not_after_s, first.not_after_s);
    // On disk too, and with a fresh connection.
    let on_disk = b.files.credentials(Role::Host).unwrap();
    let again = Links::new(on_disk, LinkOptions::default()).unwrap();
    again.set_addresses(&name("a"), vec![cluster.first.listening.address()]);
    assert_eq!(who(&again, "a").await.unwrap(), "host b");
}

#[tokio::test]
async fn a_host_tells_about_itself() {
    let cluster = cluster().await;
    let facts = Facts {
        addresses: vec!["127.0.0.1:7".into()],
        version: "9.9".into(),
        platform: "Linux 6.18, QEMU 10.0.2".into(),
        space: None,
    };
    announce(&*cluster.store, &name("a"), &facts).await.unwrap();
    eventually("the record is seen", async || {
        cluster.first.hosts.get(&name("a")).is_some_and(|it| it.version == "9.9" && it.seen_s > 0)
    })
    .await;
    assert_eq!(cluster.first.links.addresses(&name("a")), ["127.0.0.1:7".parse().unwrap()]);
}
