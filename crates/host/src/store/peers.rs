//! Blocks between hosts: the client and the server side of `image.manifest`, `.bitmap`, `.have` and `.block`.
//!
//! ```text
//!   membership   holds/IMAGE/* in the metadata store ─► hello to each (bitmaps both ways) ─► Joined; again every 20 s
//!   tell_news    changes of the cache, gathered for 50 ms ─► image.have to all members
//!   serve        role (checked by the links) ─► domain ─► place among SERVING_MAX ─► upload limit ─► verified bytes
//! ```
//!
//! Invariants: what is served was verified since the start of this agent; a host that may not read the image's domain
//! learns nothing about it, not even whether it is here; serving is bounded in number and bytes per second, and
//! answers "busy" beyond.
//!
//! Not here: how calls travel (`link`), whom to ask (`engine::image::read`).

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;
use whimbrel_engine::image::read::{Class, Event};
use whimbrel_engine::image::{access, home};
use whimbrel_wire::meta::{HostRecord, key};
use whimbrel_wire::peer::block::{
    Bitmap, BitmapHello, BlockAnswer, BlockAsk, BlockReply, Have, MANIFEST_PART_BYTES, METHOD_BITMAP,
    METHOD_BLOCK, METHOD_HAVE, METHOD_MANIFEST, ManifestAsk, ManifestReply, runs,
};
use whimbrel_wire::{HostId, ImageId, Name};

use super::image::{Core, News, Obtained, stopped};
use super::images::{Images, Shared, alive};
use super::manifest::Manifest;
use super::repo::Repo;
use crate::blocking::blocking;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::link::{Links, Router};
use crate::metrics::metrics;

/// How many questions of peers are answered at once.
pub const SERVING_MAX: usize = 64;
/// For a hello and for news.
const HELLO_LIMIT: Duration = Duration::from_secs(1);
/// For a part of a manifest; a home may have to fetch it first.
const MANIFEST_LIMIT: Duration = Duration::from_secs(10);
/// How often hosts are looked for that have joined without our hearing of it.
const LOOK_AGAIN: Duration = Duration::from_secs(20);
/// News are gathered for so long.
const NEWS_PAUSE: Duration = Duration::from_millis(50);
/// How long the domains of a host are remembered.
const DOMAINS_KEPT: Duration = Duration::from_secs(10);
/// How long a home works for a peer before it says that it cannot.
const SERVE_LIMIT: Duration = Duration::from_secs(10);

/// How calls reach other hosts. The links implement it; tests put liars in its place.
#[async_trait]
pub trait PeerTransport: Send + Sync {
    /// Calls `method` on `host` with JSON parameters and a payload, and gives the result and its payload.
    async fn call(
        &self,
        host: &HostId,
        method: &'static str,
        params: Value,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<(Value, Bytes)>;
}

#[async_trait]
impl PeerTransport for Links {
    async fn call(
        &self,
        host: &HostId,
        method: &'static str,
        params: Value,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<(Value, Bytes)> {
        Links::call(self, host, method, &params, payload, deadline).await
    }
}

/// A call with its parameters and result as what they are.
pub async fn call<P: Serialize, R: DeserializeOwned>(
    peers: &dyn PeerTransport,
    host: &HostId,
    method: &'static str,
    params: &P,
    payload: Bytes,
    deadline: Duration,
) -> Result<(R, Bytes)> {
    let what = || format!("ask host {host} for {method}");
    let params = serde_json::to_value(params)
        .map_err(|error| Error::with_source(ErrorKind::Internal, what(), error))?;
    let limited = tokio::time::timeout(deadline, peers.call(host, method, params, payload, deadline));
    let (value, payload) = match limited.await {
        Ok(result) => result.with_context(what)?,
        Err(_) => return Err(Error::new(ErrorKind::TimedOut, what())),
    };
    let value = serde_json::from_value(value)
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, what(), error))?;
    Ok((value, payload))
}

/// A limit of bytes per second, with a burst of a tenth of a second.
pub struct Upload {
    bytes_s: u64,
    free_at: Mutex<Instant>,
}

impl Upload {
    /// `bytes_s` 0: no limit.
    pub fn new(bytes_s: u64) -> Self {
        Self { bytes_s, free_at: Mutex::new(Instant::now()) }
    }

    /// Reserves `bytes` and gives how long to wait before sending them; `None` if that is too long.
    fn reserve(&self, bytes: u64) -> Option<Duration> {
        if self.bytes_s == 0 {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let mut free_at = self.free_at.lock();
        let start = (*free_at).max(now.checked_sub(Duration::from_millis(100)).unwrap_or(now));
        let wait = start.saturating_duration_since(now);
        if wait > Duration::from_millis(500) {
            return None;
        }
        *free_at = start + Duration::from_secs_f64(bytes as f64 / self.bytes_s as f64);
        Some(wait)
    }
}

/// Gets the manifest from a peer if there is one, else from the store. Of hosts that open an image at once only the
/// manifest's home reads it from the store.
pub async fn fetch_manifest(
    shared: &Shared,
    id: &ImageId,
    repo: &Repo,
    path: &std::path::Path,
) -> Result<()> {
    let mut holders = shared.holders(id).await.unwrap_or_default();
    holders.sort_by_key(|(_, blocks)| *blocks == 0);
    let with_blocks = holders.iter().filter(|(_, blocks)| *blocks > 0).map(|(host, _)| host).take(3);
    let everybody = holders.iter().map(|(host, _)| host).chain([&shared.config.host]);
    let home = home::ranked(id, u64::MAX, everybody).into_iter().next();
    let home = home.filter(|home| **home != shared.config.host);
    for host in with_blocks.chain(home) {
        match manifest_from_peer(shared, id, host, path).await {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, image = %id, %host, "get the manifest from a peer"),
        }
    }
    Manifest::fetch(repo, *id, path).await
}

async fn manifest_from_peer(
    shared: &Shared,
    id: &ImageId,
    host: &HostId,
    path: &std::path::Path,
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let part_path = path.with_extension("peer");
    let file = std::fs::File::create(&part_path).context("make the manifest's file")?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    loop {
        let ask = ManifestAsk { image: *id, offset: at, length: MANIFEST_PART_BYTES };
        let (reply, bytes): (ManifestReply, Bytes) =
            call(shared.peers.as_ref(), host, METHOD_MANIFEST, &ask, Bytes::new(), MANIFEST_LIMIT).await?;
        if bytes.is_empty() || at + bytes.len() as u64 > reply.size_bytes {
            return Err(Error::new(ErrorKind::InvalidInput, format!("read a manifest from host {host}")));
        }
        hasher.update(&bytes);
        file.write_all_at(&bytes, at).context("write the manifest's file")?;
        at += bytes.len() as u64;
        if at == reply.size_bytes {
            break;
        }
    }
    if *hasher.finalize().as_bytes() != id.0 {
        return Err(Error::new(ErrorKind::Corrupt, format!("host {host} sent a wrong manifest")));
    }
    std::fs::rename(&part_path, path).context("rename the manifest's file")
}

/// Joins the swarm of an image and stays in it.
pub async fn membership(core: Weak<Core>) {
    let mut told_blocks = None;
    let mut first = true;
    loop {
        let Some(strong) = alive(&core) else { return };
        let held = strong.cache.held_blocks();
        let all = held == strong.manifest.header().entries;
        let grown = told_blocks.is_none_or(|told| held >= told * 2 && held > told || all && held != told);
        if grown {
            match strong.shared.tell_holds(&strong.id(), held).await {
                Ok(()) => told_blocks = Some(held),
                Err(error) => tracing::debug!(%error, image = %strong.id(), "tell what this host has"),
            }
        }
        match strong.shared.holders(&strong.id()).await {
            Ok(holders) => greet(&strong, holders).await,
            Err(error) => tracing::debug!(%error, image = %strong.id(), "look for hosts with an image"),
        }
        if std::mem::take(&mut first) {
            strong.tell(Event::Joined);
        }
        drop(strong);
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Exchanges bitmaps with the hosts that are not members yet.
async fn greet(core: &Arc<Core>, holders: Vec<(HostId, u64)>) {
    let known: std::collections::HashSet<HostId> =
        core.with_reads(|reads, _| reads.swarm().members().cloned().collect());
    let fresh = holders.into_iter().map(|(host, _)| host).filter(|host| !known.contains(host));
    futures_util::stream::iter(fresh)
        .for_each_concurrent(16, |host| async move {
            match hello(core, &host).await {
                Ok(has) => core.tell(Event::Hello { host, has }),
                Err(error) => tracing::debug!(%error, %host, image = %core.id(), "exchange bitmaps"),
            }
        })
        .await;
}

async fn hello(core: &Core, host: &HostId) -> Result<Bitmap> {
    let blocks = core.manifest.blocks();
    let params = BitmapHello { image: core.id(), blocks };
    let own = Bytes::from(core.cache.held().to_bytes());
    let (reply, bytes): (BitmapHello, Bytes) =
        call(core.shared.peers.as_ref(), host, METHOD_BITMAP, &params, own, HELLO_LIMIT).await?;
    if reply.blocks != blocks {
        return Err(Error::new(ErrorKind::InvalidInput, format!("read the bitmap of host {host}")));
    }
    Ok(Bitmap::from_bytes(blocks, &bytes)?)
}

/// Tells all members what has changed in the cache.
pub async fn tell_news(core: Weak<Core>) {
    let mut failures: std::collections::HashMap<HostId, u32> = std::collections::HashMap::new();
    loop {
        let Some(strong) = alive(&core) else { return };
        let pause = Duration::from_secs(5);
        if strong.news.lock().is_empty()
            && tokio::time::timeout(pause, strong.news_came.notified()).await.is_err()
        {
            continue;
        }
        tokio::time::sleep(NEWS_PAUSE).await;
        let news = std::mem::take(&mut *strong.news.lock());
        let members: Vec<HostId> = strong.with_reads(|reads, _| reads.swarm().members().cloned().collect());
        for have in gather(&strong, &news) {
            send_news(&strong, &members, &have, &mut failures).await;
        }
    }
}

/// The news as messages, none too long.
fn gather(core: &Core, news: &News) -> Vec<Have> {
    let mut here = news.iter().filter(|(_, here)| **here).map(|(block, _)| *block).peekable();
    let mut gone = news.iter().filter(|(_, here)| !**here).map(|(block, _)| *block).peekable();
    let mut all = Vec::new();
    while here.peek().is_some() || gone.peek().is_some() {
        all.push(Have { image: core.id(), here: runs(&mut here), gone: runs(&mut gone), leaves: false });
    }
    all
}

async fn send_news(
    core: &Arc<Core>,
    members: &[HostId],
    have: &Have,
    failures: &mut std::collections::HashMap<HostId, u32>,
) {
    let sent = futures_util::stream::iter(members.iter().cloned())
        .map(|host| async move {
            let sent: Result<(Value, Bytes)> =
                call(core.shared.peers.as_ref(), &host, METHOD_HAVE, have, Bytes::new(), HELLO_LIMIT).await;
            (host, sent.is_ok())
        })
        .buffer_unordered(16);
    for (host, sent) in sent.collect::<Vec<_>>().await {
        let count = failures.entry(host.clone()).or_insert(0);
        *count = if sent { 0 } else { *count + 1 };
        // It would miss news; when it is back, whole bitmaps are exchanged again.
        if *count >= 3 {
            failures.remove(&host);
            core.tell(Event::Left { host });
        }
    }
}

/// Tells all members that this host answers no more.
pub async fn leave(core: &Arc<Core>) {
    let members: Vec<HostId> = core.with_reads(|reads, _| reads.swarm().members().cloned().collect());
    let have = Have { image: core.id(), here: Vec::new(), gone: Vec::new(), leaves: true };
    send_news(core, &members, &have, &mut std::collections::HashMap::new()).await;
}

/// Answers what other hosts ask.
pub struct Server {
    shared: Arc<Shared>,
    images: Arc<Images>,
    domains: Mutex<std::collections::HashMap<HostId, (Instant, Vec<Name>)>>,
}

impl Server {
    pub(super) fn new(shared: Arc<Shared>, images: Arc<Images>) -> Arc<Self> {
        Arc::new(Self { shared, images, domains: Mutex::default() })
    }

    /// Registers the methods.
    pub fn register(self: &Arc<Self>, router: Router) -> Router {
        let (a, b, c, d) = (Arc::clone(self), Arc::clone(self), Arc::clone(self), Arc::clone(self));
        router
            .call(METHOD_MANIFEST, move |peer, ask: ManifestAsk, _| {
                let server = Arc::clone(&a);
                async move { server.manifest(&peer.host, ask).await }
            })
            .call(METHOD_BITMAP, move |peer, hello: BitmapHello, payload| {
                let server = Arc::clone(&b);
                async move { server.bitmap(&peer.host, hello, &payload).await }
            })
            .call(METHOD_HAVE, move |peer, have: Have, _| {
                let server = Arc::clone(&c);
                async move { server.have(&peer.host, &have).await.map(|()| (Value::Null, Bytes::new())) }
            })
            .call(METHOD_BLOCK, move |peer, ask: BlockAsk, _| {
                let server = Arc::clone(&d);
                async move { server.block(&peer.host, ask).await }
            })
    }

    /// Answers a call of host `from`, for transports other than the links.
    pub async fn serve(
        &self,
        from: &HostId,
        method: &str,
        params: Value,
        payload: Bytes,
    ) -> Result<(Value, Bytes)> {
        match method {
            METHOD_MANIFEST => to_value(self.manifest(from, parse(params)?).await?),
            METHOD_BITMAP => to_value(self.bitmap(from, parse(params)?, &payload).await?),
            METHOD_HAVE => {
                let have: Have = parse(params)?;
                self.have(from, &have).await?;
                Ok((Value::Null, Bytes::new()))
            }
            METHOD_BLOCK => to_value(self.block(from, parse(params)?).await?),
            other => Err(Error::new(ErrorKind::InvalidInput, format!("answer {other}: no such method"))),
        }
    }

    /// The image, if `from` may read it.
    async fn image(&self, from: &HostId, id: &ImageId) -> Result<Arc<Core>> {
        // Whether it is not here or not theirs sounds the same from outside.
        let unknown = || Error::new(ErrorKind::NotFound, format!("find image {id}: it is not on this host"));
        let domain = self.images.domain(id).ok_or_else(unknown)?;
        if !access::may_read(&self.domains_of(from).await?, domain.as_ref()) {
            tracing::warn!(host = %from, image = %id, "a host asked for an image of another domain");
            return Err(unknown());
        }
        self.images.open_for_peer(id).await
    }

    async fn domains_of(&self, host: &HostId) -> Result<Vec<Name>> {
        let known = self.domains.lock().get(host).cloned();
        if let Some((at, domains)) = &known
            && at.elapsed() < DOMAINS_KEPT
        {
            return Ok(domains.clone());
        }
        let record_key = key::host(host);
        let found = match (self.shared.meta(self.shared.meta.get(&record_key)).await, known) {
            (Ok(item), _) => item.and_then(|item| serde_json::from_slice::<HostRecord>(&item.value).ok()),
            // The metadata store is away: what was true a moment ago has to do.
            (Err(_), Some((_, domains))) => return Ok(domains),
            (Err(error), None) => return Err(error),
        };
        let Some(record) = found.filter(|record| !record.revoked) else {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("serve host {host}: it is not of this cluster"),
            ));
        };
        self.domains.lock().insert(host.clone(), (Instant::now(), record.domains.clone()));
        Ok(record.domains)
    }

    async fn manifest(&self, from: &HostId, ask: ManifestAsk) -> Result<(ManifestReply, Bytes)> {
        let core = tokio::time::timeout(SERVE_LIMIT, self.image(from, &ask.image))
            .await
            .map_err(|_| Error::new(ErrorKind::TimedOut, "open the image for a peer"))??;
        let size_bytes = core.manifest.header().file_bytes();
        let length = ask.length.min(MANIFEST_PART_BYTES).min(size_bytes.saturating_sub(ask.offset));
        let bytes = blocking("read a manifest", move || core.manifest.part(ask.offset, length)).await?;
        Ok((ManifestReply { size_bytes }, bytes))
    }

    async fn bitmap(
        &self,
        from: &HostId,
        hello: BitmapHello,
        payload: &[u8],
    ) -> Result<(BitmapHello, Bytes)> {
        let core = self.image(from, &hello.image).await?;
        let blocks = core.manifest.blocks();
        if hello.blocks != blocks {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("read a bitmap of image {}: {} blocks, it has {blocks}", core.id(), hello.blocks),
            ));
        }
        let has = Bitmap::from_bytes(blocks, payload)?;
        core.tell(Event::Hello { host: from.clone(), has });
        Ok((hello, Bytes::from(core.cache.held().to_bytes())))
    }

    async fn have(&self, from: &HostId, have: &Have) -> Result<()> {
        // Only an open image cares.
        let Some(core) = self.images.get(&have.image) else { return Ok(()) };
        self.image(from, &have.image).await?;
        if have.leaves {
            core.tell(Event::Left { host: from.clone() });
            return Ok(());
        }
        let limit = whimbrel_wire::peer::block::RUNS_MAX;
        let (here, gone) = (have.here.iter(), have.gone.iter());
        core.tell(Event::Changed {
            host: from.clone(),
            here: here.take(limit).copied().collect(),
            gone: gone.take(limit).copied().collect(),
        });
        Ok(())
    }

    async fn block(&self, from: &HostId, ask: BlockAsk) -> Result<(BlockReply, Bytes)> {
        let reply = |answer, bytes| Ok((BlockReply { answer }, bytes));
        let core = self.image(from, &ask.image).await?;
        let Ok(_place) = self.shared.serving.try_acquire() else {
            return reply(BlockAnswer::Busy, Bytes::new());
        };
        let here = core.cache.holds(ask.index);
        if !core.manifest.is_stored(ask.index) || !here && !ask.on_demand {
            return reply(BlockAnswer::NotHave, Bytes::new());
        }
        let verified = {
            let core = Arc::clone(&core);
            blocking("read the cache", move || core.cache.verified_block(ask.index)).await?
        };
        let bytes = match verified {
            Some(bytes) => bytes,
            None => match core.obtain(ask.index, Class::Demand, !here) {
                Obtained::Now(bytes) => bytes,
                Obtained::Later(receiver) => match tokio::time::timeout(SERVE_LIMIT, receiver).await {
                    Ok(result) => result.unwrap_or_else(|_| Err(stopped()))?,
                    Err(_) => return reply(BlockAnswer::Busy, Bytes::new()),
                },
            },
        };
        match self.shared.upload.reserve(bytes.len() as u64) {
            Some(wait) => tokio::time::sleep(wait).await,
            None => return reply(BlockAnswer::Busy, Bytes::new()),
        }
        metrics().image_served_bytes.inc_by(bytes.len() as u64);
        reply(BlockAnswer::Here, bytes)
    }
}

fn parse<T: DeserializeOwned>(params: Value) -> Result<T> {
    serde_json::from_value(params)
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, "read the parameters", error))
}

fn to_value<T: Serialize>((value, bytes): (T, Bytes)) -> Result<(Value, Bytes)> {
    let value = serde_json::to_value(value)
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write the result", error))?;
    Ok((value, bytes))
}
