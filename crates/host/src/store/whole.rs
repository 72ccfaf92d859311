//! Work on whole images: fetch all, check all, write all to another disk.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use whimbrel_engine::image::fill::Fill;
use whimbrel_engine::image::read::Class;
use whimbrel_wire::api::ImageVerify;
use whimbrel_wire::peer::block::Bitmap;

use super::cache::Loaded;
use super::fetch;
use super::image::{Core, Image, Obtained, stopped};
use crate::block_dev::{BlockDev, BlockRead};
use crate::blocking::blocking;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::task::TaskHandle;

/// Blocks under way at once.
const PARALLEL: usize = 16;
/// Bytes copied at once.
const COPY_BYTES: u64 = 1 << 20;
/// Bad blocks that a check lists.
const BAD_MAX: usize = 1000;
/// How long the seed may take for a block of a check.
const SEED_LIMIT: std::time::Duration = std::time::Duration::from_secs(15);

fn cancelled(what: &str) -> Error {
    Error::new(ErrorKind::Cancelled, format!("{what}: cancelled"))
}

/// Fetches every block that the cache lacks.
pub async fn prefetch(core: &Arc<Core>, task: &TaskHandle) -> Result<()> {
    let total = core.manifest.header().data_bytes;
    let mut fill = Fill::new(&core.id(), &core.shared.config.host, core.manifest.blocks());
    let mut asked = Bitmap::new(core.manifest.blocks());
    let mut coming = FuturesUnordered::new();
    loop {
        if task.is_cancelled() {
            return Err(cancelled("fetch the image"));
        }
        while coming.len() < PARALLEL {
            let wanted =
                |block: u64| core.manifest.is_stored(block) && !core.cache.holds(block) && !asked.has(block);
            let Some(block) = core.with_reads(|reads, now| fill.next(reads.swarm(), now, wanted)) else {
                break;
            };
            asked.insert(block);
            if let Obtained::Later(receiver) = core.obtain(block, Class::Fill, false) {
                coming.push(receiver);
            }
        }
        match coming.next().await {
            Some(Ok(block)) => block.map(|_| ())?,
            Some(Err(_)) => return Err(stopped()),
            None => break,
        }
        task.progress(core.cache.held_bytes(), total);
    }
    // The last blocks are still being written.
    let _ = core.writes.acquire_many(super::image::WRITES_MAX as u32).await;
    let held = core.cache.held_bytes();
    task.progress(held, total);
    if held < total {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!("fetch the image: {held} of {total} bytes fit into the cache"),
        )
        .hint(format!("make room under {}", core.shared.config.data_dir.display())));
    }
    Ok(())
}

/// Checks every block in the cache, or in the seed store.
pub async fn verify(core: &Arc<Core>, seed: bool, task: &TaskHandle) -> Result<ImageVerify> {
    let mut result = ImageVerify { checked_blocks: 0, bad_blocks: Vec::new() };
    let total = if seed { core.manifest.header().data_bytes } else { core.cache.held_bytes() };
    let blocks = core.manifest.stored_from(0).filter(|block| seed || core.cache.holds(*block));
    let mut checks = futures_util::stream::iter(blocks)
        .map(|block| async move {
            let bad = if seed { check_seed(core, block).await } else { check_cache(core, block).await };
            (block, bad)
        })
        .buffer_unordered(PARALLEL);
    while let Some((block, bad)) = checks.next().await {
        if task.is_cancelled() {
            return Err(cancelled("check the image"));
        }
        result.checked_blocks += 1;
        task.progress(
            result
                .checked_blocks
                .saturating_mul(u64::from(whimbrel_wire::record::image::BLOCK_BYTES))
                .min(total),
            total,
        );
        if let Some(why) = bad.filter(|_| result.bad_blocks.len() < BAD_MAX) {
            result.bad_blocks.push(format!("block {block}: {why}"));
        }
    }
    Ok(result)
}

async fn check_seed(core: &Arc<Core>, block: u64) -> Option<String> {
    let arrival = fetch::from_seed(core, block, SEED_LIMIT).await;
    match (arrival.bytes, arrival.error) {
        (Some(_), _) => None,
        (None, Some(error)) => Some(error.to_string()),
        (None, None) => Some("it could not be read".into()),
    }
}

async fn check_cache(core: &Arc<Core>, block: u64) -> Option<String> {
    let reader = Arc::clone(core);
    match blocking("read the cache", move || reader.cache.load(block)).await {
        Ok(Loaded::Good(_) | Loaded::Absent) => None,
        Ok(Loaded::Rotten) => {
            core.cache.distrust(block);
            Some("its bytes in this host's cache have changed; the next reader fetches it again".into())
        }
        Err(error) => Some(error.to_string()),
    }
}

/// Writes the image to `target`, which reads as zeros; on a thread that may wait.
pub fn export(image: &Image, target: &dyn BlockDev, task: &TaskHandle) -> Result<()> {
    let size = image.size_bytes();
    if target.size_bytes() < size {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("export the image: it has {size} bytes, the target {}", target.size_bytes()),
        ));
    }
    let mut buffer = vec![0; usize::try_from(COPY_BYTES).unwrap_or(0)];
    let mut at = 0;
    while at < size {
        if task.is_cancelled() {
            return Err(cancelled("export the image"));
        }
        let extent = image.extent(at)?;
        let length = extent.length.min(size - at);
        if extent.data {
            let length = length.min(COPY_BYTES);
            let part = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
            image.read(at, &mut [IoSliceMut::new(part)])?;
            target.write(at, &[IoSlice::new(part)]).context("write the exported disk")?;
            at += length;
        } else {
            at += length;
        }
        task.progress(at, size);
    }
    target.flush().context("flush the exported disk")
}
