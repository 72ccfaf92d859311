//! Publishing beside collecting, on stores that know no locks: each side shows a mark before it looks for the other's.
//!
//! ```text
//!   publisher                                    collector
//!   write publishing/UUID                        write collecting/UUID
//!   list collecting/ ── any? ──► remove mark,    list publishing/ ── any? ──► wait, mark kept, so that new
//!   │                            wait, again     │                            publishers wait; then give up
//!   read index, write packs,                     list manifests, names; find what nobody refers to
//!   index, manifest, name                        remove manifests, then index, then packs
//!   remove mark                                  remove mark
//! ```
//!
//! Why it is safe: marks are written before they are looked for, and listings show every write that has returned (S3
//! since 2020, file systems). So of a publisher and a collector that overlap, at least one sees the other. If the
//! publisher sees the collector it has read nothing yet; if the collector sees the publisher it has chosen nothing
//! yet. Collectors see each other the same way. A pack that a publisher reuses can therefore not be removed between
//! its look at the index and its manifest.
//!
//! Marks of the dead: a mark is renewed at least every `RENEW`; one that was not for `DEAD_S` (by the store's own
//! clock) is taken for dead. A publisher that could not renew for half that time stops by itself, before its manifest.
//!
//! Invariant: who holds a [`Mark`] and cannot renew it does not go on.

use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;
use whimbrel_wire::record::image::{COLLECTING, PUBLISHING};

use super::repo::Repo;
use crate::error::{Context, Error, ErrorKind, Result};

/// A mark is renewed when it is older than this.
const RENEW: Duration = Duration::from_secs(300);
/// A mark that was not renewed for so long belongs to nobody.
const DEAD_S: i64 = 3600;
/// How long one side waits for the other.
const WAIT: Duration = Duration::from_secs(120);

/// See the module's charter.
pub struct Mark<'a> {
    repo: &'a Repo,
    path: String,
    renewed: Instant,
}

impl<'a> Mark<'a> {
    /// Begins to publish: waits until nobody collects.
    pub async fn publishing(repo: &'a Repo) -> Result<Self> {
        let start = Instant::now();
        loop {
            let mark = Self::write(repo, PUBLISHING).await?;
            let others = mark.others(COLLECTING).await;
            match others {
                Ok(0) => return Ok(mark),
                Ok(_) => mark.remove().await,
                Err(error) => {
                    mark.remove().await;
                    return Err(error);
                }
            }
            if start.elapsed() > WAIT {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    format!("publish to {}: a collection is under way", repo.url()),
                )
                .hint("try again in a few minutes"));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Begins to collect: waits until nobody publishes, with the mark up.
    pub async fn collecting(repo: &'a Repo, wait: Duration) -> Result<Self> {
        let start = Instant::now();
        let mark = Self::write(repo, COLLECTING).await?;
        loop {
            let busy = match mark.others(PUBLISHING).await {
                Ok(publishers) => mark.others(COLLECTING).await.map(|others| (publishers, others)),
                Err(error) => Err(error),
            };
            match busy {
                Ok((0, 0)) => return Ok(mark),
                Ok((publishers, others)) if start.elapsed() > wait => {
                    mark.remove().await;
                    return Err(Error::new(
                        ErrorKind::Unavailable,
                        format!("collect {}: {publishers} publish and {others} collect", repo.url()),
                    )
                    .hint("try again when they are done"));
                }
                Ok(_) => tokio::time::sleep(Duration::from_millis(300)).await,
                Err(error) => {
                    mark.remove().await;
                    return Err(error);
                }
            }
        }
    }

    async fn write(repo: &'a Repo, prefix: &str) -> Result<Self> {
        let mark = Self { repo, path: format!("{prefix}/{}", Uuid::new_v4()), renewed: Instant::now() };
        repo.put(&mark.path, Bytes::from_static(b"{}")).await.context("leave a mark in the store")?;
        Ok(mark)
    }

    /// How many others have living marks under `prefix`. Dead ones are removed.
    async fn others(&self, prefix: &str) -> Result<usize> {
        let now = self.now_s().await?;
        let mut living = 0;
        for listed in self.repo.list(prefix).await? {
            if listed.path == self.path {
                continue;
            }
            if listed.modified_s + DEAD_S < now {
                tracing::warn!(mark = listed.path, store = self.repo.url(), "remove a dead mark");
                self.repo.delete(&listed.path).await?;
            } else {
                living += 1;
            }
        }
        Ok(living)
    }

    /// The store's clock: when our own mark was written, plus the time since then.
    pub async fn now_s(&self) -> Result<i64> {
        let prefix = self.path.split('/').next().unwrap_or_default();
        let own = self.repo.list(prefix).await?.into_iter().find(|listed| listed.path == self.path);
        let Some(own) = own else {
            return Err(Error::new(ErrorKind::Unavailable, "our mark in the store is gone"));
        };
        Ok(own.modified_s + i64::try_from(self.renewed.elapsed().as_secs()).unwrap_or(i64::MAX))
    }

    /// Renews the mark if it is time to, and fails if it may have been taken for dead.
    pub async fn renew(&mut self) -> Result<()> {
        if self.renewed.elapsed() > RENEW {
            let start = Instant::now();
            match self.repo.put(&self.path, Bytes::from_static(b"{}")).await {
                Ok(()) => self.renewed = start,
                Err(error) => tracing::warn!(%error, "renew the mark in the store"),
            }
        }
        if self.renewed.elapsed().as_secs() > DEAD_S.unsigned_abs() / 2 {
            return Err(Error::new(
                ErrorKind::TimedOut,
                "go on with the store: our mark could not be renewed for too long",
            ));
        }
        Ok(())
    }

    /// Takes the mark down. A failure is logged: the mark dies by itself.
    pub async fn remove(self) {
        if let Err(error) = self.repo.delete(&self.path).await {
            tracing::warn!(%error, mark = self.path, "take down our mark in the store");
        }
    }
}
