//! How much space a host's volumes have left, looked at every few seconds and told before it is gone.
//!
//! ```text
//!   statvfs, records ─▶ Watch (engine) ─▶ gauges, a line in the log when the level changes, `host show`
//! ```
//!
//! Not here: when it counts as short (`engine::disk::pressure`), what a guest without space meets (`export`).

use std::path::Path;

use whimbrel_engine::disk::pressure::Watch;
use whimbrel_wire::meta::{Space, VolumeRecord, key};

use super::Volumes;
use crate::error::{Context as _, Result};
use crate::{clock, metrics, records};

/// All of a file system, and what of it may still be taken, bytes.
pub(crate) fn space_of(dir: &Path) -> Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    Ok((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Looks at the file system of this host's volumes.
#[derive(Debug, Default)]
pub struct SpaceWatch {
    watch: Watch,
}

impl SpaceWatch {
    /// A look; `promised_bytes` is what [`Volumes::promised_bytes`] said last.
    pub fn look(&mut self, volumes: &Volumes, promised_bytes: u64) -> Result<Space> {
        let dir = volumes.dir().root();
        let (total_bytes, free_bytes) = space_of(dir)?;
        let before = self.watch.level();
        let (pressure, full_in_s) = self.watch.look(clock::now().0, total_bytes, free_bytes);
        let (dir, level) = (dir.display(), pressure.as_str());
        if pressure > before {
            tracing::warn!(%dir, level, free_bytes, full_in_s, "space for volumes is running out; move VMs away or enlarge it");
        } else if pressure < before {
            tracing::info!(%dir, level, free_bytes, "space for volumes is back");
        }
        let gauges = metrics::metrics();
        let gauge = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        gauges.volume_space_bytes.set(gauge(total_bytes));
        gauges.volume_space_free_bytes.set(gauge(free_bytes));
        gauges.volume_space_promised_bytes.set(gauge(promised_bytes));
        gauges.volume_space_pressure.set(pressure as i64);
        Ok(Space { total_bytes, free_bytes, promised_bytes, pressure, full_in_s })
    }
}

impl Volumes {
    /// Sizes of the volumes that this host holds.
    pub async fn promised_bytes(&self) -> Result<u64> {
        let all = records::list::<VolumeRecord>(self.meta(), key::VOLUMES).await?;
        let mine = all.iter().filter(|record| record.value.right.holder == self.shared.host);
        Ok(mine.map(|record| record.value.size_bytes).sum())
    }
}
