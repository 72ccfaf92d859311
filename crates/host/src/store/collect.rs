//! Collection: removes from a repository what nothing refers to.
//!
//! ```text
//!   mark ─► in use: names of the repository, what the caller knows (volumes, names of the cluster), what is young
//!        ─► packs of those manifests ─► remove other manifests ─► new index ─► remove old indexes ─► remove other packs
//! ```
//!
//! Invariants: a manifest that cannot be read ends the collection before anything is removed: what it refers to is
//! not known. Stopped at any point, nothing refers to what is gone. Why a publisher is safe: see `guard`.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use whimbrel_wire::ImageId;
use whimbrel_wire::record::image::{
    ImageName, MANIFEST_HEADER_BYTES, MANIFESTS, ManifestHeader, NAME_BYTES_MAX, NAMES, PACKS, PackId,
    manifest_path,
};

use super::dedup::{Builder, Dedup, ENTRIES_AIM};
use super::guard::Mark;
use super::repo::{Listed, Repo};
use crate::error::{Context, Error, ErrorKind, Result};

/// What a collection removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Manifests that no name and no volume refers to.
    pub manifests: u64,
    /// Packs that no manifest refers to.
    pub packs: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// Collects `repo`. `in_use` is asked once nobody publishes any more; what is younger than `grace_s` stays.
/// `wait` is how long publishers are waited for.
pub async fn collect(
    repo: &Repo,
    index_dir: &Path,
    in_use: impl AsyncFnOnce() -> Result<HashSet<ImageId>>,
    grace_s: u64,
    wait: Duration,
) -> Result<Collected> {
    repo.check_writable()?;
    let mut mark = Mark::collecting(repo, wait).await?;
    let done = collect_marked(repo, &mut mark, index_dir, in_use, grace_s).await;
    mark.remove().await;
    done
}

async fn collect_marked(
    repo: &Repo,
    mark: &mut Mark<'_>,
    index_dir: &Path,
    in_use: impl AsyncFnOnce() -> Result<HashSet<ImageId>>,
    grace_s: u64,
) -> Result<Collected> {
    let now_s = mark.now_s().await?;
    let young = |listed: &Listed| listed.modified_s.saturating_add_unsigned(grace_s) > now_s;
    let mut keep = in_use().await?;
    keep.extend(named(repo).await?);

    let mut dead_manifests = Vec::new();
    let mut live_packs = HashSet::new();
    for listed in repo.list(MANIFESTS).await? {
        let Some(id) = last_part(&listed.path).and_then(|name| name.parse::<ImageId>().ok()) else {
            continue;
        };
        if keep.contains(&id) || young(&listed) {
            live_packs.extend(packs_of(repo, id).await?);
            mark.renew().await?;
        } else {
            dead_manifests.push(listed);
        }
    }
    let mut all_packs = HashSet::new();
    let mut dead_packs = Vec::new();
    for listed in repo.list(PACKS).await? {
        let Some(pack) = last_part(&listed.path).and_then(PackId::from_hex) else { continue };
        if live_packs.contains(&pack) || young(&listed) {
            all_packs.insert(pack);
        } else {
            dead_packs.push(listed);
        }
    }

    for listed in &dead_manifests {
        mark.renew().await?;
        repo.delete(&listed.path).await?;
    }
    rebuild_index(repo, mark, index_dir, &all_packs).await?;
    for listed in &dead_packs {
        mark.renew().await?;
        repo.delete(&listed.path).await?;
    }
    Ok(Collected {
        manifests: dead_manifests.len() as u64,
        packs: dead_packs.len() as u64,
        bytes: dead_manifests.iter().chain(&dead_packs).map(|listed| listed.size_bytes).sum(),
    })
}

fn last_part(path: &str) -> Option<&str> {
    path.rsplit('/').next()
}

/// What the repository's own names mean.
async fn named(repo: &Repo) -> Result<HashSet<ImageId>> {
    let mut found = HashSet::new();
    for listed in repo.list(NAMES).await? {
        let bytes = repo.get(&listed.path, NAME_BYTES_MAX as u64).await?;
        let name: ImageName = serde_json::from_slice(&bytes).map_err(|error| {
            Error::with_source(ErrorKind::Corrupt, format!("read {}", listed.path), error)
        })?;
        found.insert(name.id);
    }
    Ok(found)
}

/// The packs a manifest refers to.
async fn packs_of(repo: &Repo, id: ImageId) -> Result<Vec<PackId>> {
    let path = manifest_path(&id);
    let head = repo.range(&path, 0, MANIFEST_HEADER_BYTES as u64).await?;
    let header =
        ManifestHeader::decode(&head).map_err(Error::from).with_context(|| format!("read {path}"))?;
    if header.packs == 0 {
        return Ok(Vec::new());
    }
    let list = repo.range(&path, header.pack_at(0), header.packs * 32).await?;
    Ok(list.as_chunks::<32>().0.iter().map(|pack| PackId(*pack)).collect())
}

/// Replaces the indexes by merged ones that tell of `packs` only, if that changes anything.
async fn rebuild_index(
    repo: &Repo,
    mark: &mut Mark<'_>,
    index_dir: &Path,
    packs: &HashSet<PackId>,
) -> Result<()> {
    let old = Dedup::load(repo, index_dir).await?;
    let mut stale = old.names().len() > 1;
    let mut builder = Builder::default();
    let mut made = Vec::new();
    old.for_each(|hash, known| {
        if !packs.contains(&known.pack) {
            stale = true;
            return Ok(());
        }
        builder.add(hash, &known);
        if builder.len() >= ENTRIES_AIM {
            made.push(std::mem::take(&mut builder).finish());
        }
        Ok(())
    })?;
    if !stale {
        return Ok(());
    }
    if !builder.is_empty() {
        made.push(builder.finish());
    }
    let mut new_paths = HashSet::new();
    for (path, object) in made {
        mark.renew().await?;
        repo.put(&path, object).await?;
        new_paths.insert(path);
    }
    for listed in repo.list(whimbrel_wire::record::image::INDEXES).await? {
        if !new_paths.contains(&listed.path) {
            mark.renew().await?;
            repo.delete(&listed.path).await?;
        }
    }
    Ok(())
}
