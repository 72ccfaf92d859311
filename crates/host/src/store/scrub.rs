//! The background scrub: finds bit rot in the caches before a guest does.
//!
//! Goes round all open images, block by block, at a limited rate. A block whose hash no longer fits is dropped through
//! the same path as one found by a reader, and fetched again at once.
//!
//! Invariant: at most `scrub_bytes_s` bytes per second are read, in steps of one block.

use std::sync::{Arc, Weak};
use std::time::Duration;

use whimbrel_engine::image::read::Class;

use super::cache::Loaded;
use super::image::{Core, Obtained};
use super::images::Images;
use crate::blocking::blocking;
use crate::metrics::metrics;

/// Between two rounds, and while there is nothing to do.
const PAUSE: Duration = Duration::from_secs(30);

/// Runs until the store is gone.
pub async fn scrub(images: Weak<Images>, bytes_s: u64) {
    if bytes_s == 0 {
        return;
    }
    loop {
        tokio::time::sleep(PAUSE).await;
        let Some(cores) = images.upgrade().map(|images| images.open_ones()) else { return };
        for core in cores {
            scrub_image(&core, bytes_s).await;
            if images.strong_count() == 0 {
                return;
            }
        }
    }
}

/// Checks every block that the cache holds once.
pub async fn scrub_image(core: &Arc<Core>, bytes_s: u64) {
    let held = core.cache.held();
    for block in held.iter() {
        let started = tokio::time::Instant::now();
        let length = scrub_block(core, block).await;
        let share = Duration::from_secs_f64(length as f64 / bytes_s.max(1) as f64);
        tokio::time::sleep_until(started + share).await;
    }
}

/// Checks one block; how many bytes were read.
async fn scrub_block(core: &Arc<Core>, block: u64) -> usize {
    metrics().image_scrubbed_blocks.inc();
    let loaded = {
        let core = Arc::clone(core);
        blocking("read the cache", move || core.cache.load(block)).await
    };
    match loaded {
        Ok(Loaded::Good(bytes)) => return bytes.len(),
        Ok(Loaded::Absent) => {}
        Err(error) => tracing::warn!(%error, image = %core.id(), "scrub the cache"),
        // Asking for it finds the rot again, drops it, tells the peers, and fetches a good copy.
        Ok(Loaded::Rotten) => {
            core.cache.distrust(block);
            if let Obtained::Later(receiver) = core.obtain(block, Class::Fill, false)
                && let Ok(Err(error)) = receiver.await
            {
                tracing::warn!(%error, image = %core.id(), block, "fetch a rotten block again");
            }
        }
    }
    0
}
