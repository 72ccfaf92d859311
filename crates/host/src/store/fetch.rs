//! Asking one source for one block, and checking what it gives.
//!
//! Invariant: [`Outcome::Verified`] is told only with bytes whose hash was just computed.
//!
//! Not here: which source comes next (`engine::image::read`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use whimbrel_engine::image::read::Outcome;
use whimbrel_wire::HostId;
use whimbrel_wire::peer::block::{BlockAnswer, BlockAsk, BlockReply, METHOD_BLOCK};

use super::cache::Loaded;
use super::image::Core;
use super::manifest::{Place, check_block, decode_block};
use super::peers::call;
use crate::error::{Context, Error, ErrorKind, Result};

/// What came of asking a source.
pub struct Arrival {
    /// For the engine.
    pub outcome: Outcome,
    /// The block, if it was verified.
    pub bytes: Option<Bytes>,
    /// It was copied from another image's cache, so this image's does not have it yet.
    pub sibling: bool,
    /// Why not.
    pub error: Option<Error>,
}

impl Arrival {
    fn good(bytes: Bytes) -> Self {
        Self { outcome: Outcome::Verified, bytes: Some(bytes), sibling: false, error: None }
    }

    fn bad(outcome: Outcome, error: Option<Error>) -> Self {
        Self { outcome, bytes: None, sibling: false, error }
    }

    fn failed(error: Error) -> Self {
        let outcome = if error.kind() == ErrorKind::Corrupt { Outcome::WrongHash } else { Outcome::Failed };
        Self::bad(outcome, Some(error))
    }
}

fn place_of(core: &Core, block: u64) -> Result<Place> {
    core.manifest.place(block)?.ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("fetch block {block} of image {}: it is zeros", core.id()),
        )
    })
}

/// Whether another image's cache on this host has an equal block.
pub fn in_sibling(core: &Core, block: u64) -> bool {
    let Some(images) = core.images.upgrade() else { return false };
    let others = images.open_except(core.id());
    if others.is_empty() {
        return false;
    }
    let Ok(Some(place)) = core.manifest.place(block) else { return false };
    others.iter().any(|other| {
        let found = other.hashes.find(&other.manifest, &place.hash, |block| other.cache.holds(block));
        matches!(found, Ok(Some(_)))
    })
}

/// From this host's disk: this image's cache, or an equal block of another image.
pub async fn from_cache(core: &Arc<Core>, block: u64) -> Arrival {
    let core = Arc::clone(core);
    let load = move || match core.cache.load(block) {
        Ok(Loaded::Good(bytes)) => Arrival::good(bytes),
        Ok(Loaded::Rotten) => Arrival::bad(Outcome::WrongHash, None),
        Ok(Loaded::Absent) => match sibling_copy(&core, block) {
            Some(bytes) => Arrival { sibling: true, ..Arrival::good(bytes) },
            None => Arrival::bad(Outcome::NotHave, None),
        },
        Err(error) => Arrival::bad(Outcome::Failed, Some(error)),
    };
    match tokio::task::spawn_blocking(load).await {
        Ok(arrival) => arrival,
        Err(error) => Arrival::failed(Error::with_source(ErrorKind::Internal, "read the cache", error)),
    }
}

fn sibling_copy(core: &Core, block: u64) -> Option<Bytes> {
    let place = core.manifest.place(block).ok()??;
    for other in core.images.upgrade()?.open_except(core.id()) {
        let here = |block| other.cache.holds(block);
        let Ok(Some(twin)) = other.hashes.find(&other.manifest, &place.hash, here) else { continue };
        // Rot in the other image is its own readers' and its scrub's business.
        if let Ok(Loaded::Good(bytes)) = other.cache.load(twin)
            && check_block(&place, &bytes).is_ok()
        {
            return Some(bytes);
        }
    }
    None
}

/// From another host's cache. `on_demand`: it is the block's home, and fetches it if it has to.
pub async fn from_peer(
    core: &Arc<Core>,
    block: u64,
    host: &HostId,
    on_demand: bool,
    limit: Duration,
) -> Arrival {
    let place = match place_of(core, block) {
        Ok(place) => place,
        Err(error) => return Arrival::bad(Outcome::Failed, Some(error)),
    };
    let ask = BlockAsk { image: core.id(), index: block, on_demand };
    let answer: Result<(BlockReply, Bytes)> =
        call(core.shared.peers.as_ref(), host, METHOD_BLOCK, &ask, Bytes::new(), limit).await;
    match answer {
        Ok((BlockReply { answer: BlockAnswer::NotHave }, _)) => Arrival::bad(Outcome::NotHave, None),
        Ok((BlockReply { answer: BlockAnswer::Busy }, _)) => Arrival::bad(Outcome::Busy, None),
        Ok((BlockReply { answer: BlockAnswer::Here }, bytes)) => match check_block(&place, &bytes) {
            Ok(()) => Arrival::good(bytes),
            Err(error) => Arrival::bad(Outcome::WrongHash, Some(error)),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Arrival::bad(Outcome::NotHave, Some(error)),
        // An error that a peer tells, of whatever kind, is not a wrong block.
        Err(error) => Arrival::bad(Outcome::Failed, Some(error)),
    }
}

/// From the seed store.
pub async fn from_seed(core: &Arc<Core>, block: u64, limit: Duration) -> Arrival {
    let fetch = async {
        let place = place_of(core, block)?;
        let path = place.pack.path();
        let stored = core.repo.range(&path, place.offset, place.stored_len).await?;
        decode_block(&place, stored)
            .with_context(|| format!("check bytes {} ff. of {path} of {}", place.offset, core.repo.url()))
    };
    match tokio::time::timeout(limit, fetch).await {
        Ok(Ok(bytes)) => Arrival::good(bytes),
        Ok(Err(error)) => Arrival::failed(error),
        Err(_) => Arrival::failed(Error::new(
            ErrorKind::TimedOut,
            format!("read {}: no answer in {} s", core.repo.url(), limit.as_secs()),
        )),
    }
}

/// Before somebody is called a liar: is it our own manifest that has changed on its disk?
pub async fn blame_the_manifest(core: &Arc<Core>, arrival: Arrival) -> Arrival {
    if arrival.outcome != Outcome::WrongHash {
        return arrival;
    }
    let manifest = Arc::clone(&core.manifest);
    let whole = tokio::task::spawn_blocking(move || manifest.recheck()).await;
    if matches!(whole, Ok(Ok(true))) {
        return arrival;
    }
    tracing::error!(image = %core.id(), "the manifest in the cache is damaged: restart the agent to fetch it again");
    Arrival::bad(
        Outcome::Failed,
        Some(Error::new(
            ErrorKind::Corrupt,
            format!("check a block of image {}: the manifest in this host's cache is damaged", core.id()),
        )),
    )
}
