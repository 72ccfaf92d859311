//! The repository's dedup indexes: which blocks it has, so that they are not uploaded again.
//!
//! Index objects are immutable and named by their hash; they are kept in a local directory and searched by `pread`.
//! Each publication that uploads blocks adds one or more; a collection merges them.
//!
//! Invariant: an index is a hint. A damaged one is skipped with a warning; that a pack is there and long enough is
//! checked before it is referred to.
//!
//! Not here: the layout (`wire::record::image`).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use whimbrel_wire::BlockHash;
use whimbrel_wire::record::image::{
    ENTRY_BYTES, Encoding, Entry, INDEX_HEADER_BYTES, INDEXES, IndexHeader, PackId,
};

use super::repo::Repo;
use super::sorted::{lower_bound, sort_key};
use crate::error::{Context, Error, ErrorKind, Result};

/// An index object is closed when it tells of so many blocks: 24 MiB.
pub const ENTRIES_AIM: usize = 512 << 10;
/// The largest index object that is read.
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// Where a block is that the repository has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its pack.
    pub pack: PackId,
    /// Where in the pack.
    pub offset: u32,
    /// How many bytes there.
    pub length: u32,
    /// How it stands there.
    pub encoding: Encoding,
}

/// All indexes of a repository.
pub struct Dedup {
    segments: Vec<Segment>,
}

struct Segment {
    path: PathBuf,
    file: File,
    header: IndexHeader,
}

impl Dedup {
    /// No index.
    pub fn none() -> Self {
        Self { segments: Vec::new() }
    }

    /// Brings the indexes of `repo` to `dir` and opens them; what `dir` has besides is removed.
    pub async fn load(repo: &Repo, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).context("make the directory of dedup indexes")?;
        let mut segments = Vec::new();
        let mut names = BTreeSet::new();
        for listed in repo.list(INDEXES).await? {
            let Some(name) = listed.path.strip_prefix(INDEXES).map(|name| name.trim_matches('/').to_owned())
            else {
                continue;
            };
            let Ok(hash) = name.parse::<BlockHash>() else { continue };
            let path = dir.join(&name);
            if !path.exists() {
                let bytes = repo.get(&listed.path, INDEX_BYTES_MAX).await?;
                if BlockHash::of(&bytes) != hash {
                    tracing::warn!(index = listed.path, store = repo.url(), "skip a damaged dedup index");
                    continue;
                }
                write_file(&path, &bytes)?;
            }
            match Segment::open(path) {
                Ok(segment) => segments.push(segment),
                Err(error) => tracing::warn!(%error, index = listed.path, "skip an unreadable dedup index"),
            }
            names.insert(name);
        }
        for entry in std::fs::read_dir(dir).context("list dedup indexes")?.flatten() {
            if entry.file_name().to_str().is_none_or(|name| !names.contains(name)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(Self { segments })
    }

    /// Where a block with this hash is.
    pub fn find(&self, hash: &BlockHash) -> Result<Option<Known>> {
        for segment in &self.segments {
            if let Some(known) = segment.find(hash)? {
                return Ok(Some(known));
            }
        }
        Ok(None)
    }

    /// The names of the index objects.
    pub fn names(&self) -> Vec<String> {
        let name = |segment: &Segment| Some(segment.path.file_name()?.to_str()?.to_owned());
        self.segments.iter().filter_map(name).collect()
    }

    /// Goes through all blocks of all indexes.
    pub fn for_each(&self, mut take: impl FnMut(BlockHash, Known) -> Result<()>) -> Result<()> {
        for segment in &self.segments {
            for number in 0..segment.header.entries {
                let entry = segment.entry(number)?;
                take(entry.hash, segment.known(&entry)?)?;
            }
        }
        Ok(())
    }
}

impl Segment {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).context("open a dedup index")?;
        let mut head = [0; INDEX_HEADER_BYTES];
        file.read_exact_at(&mut head, 0).context("read a dedup index")?;
        let header = IndexHeader::decode(&head)?;
        if file.metadata().context("read a dedup index")?.len() != header.file_bytes() {
            return Err(Error::new(ErrorKind::Corrupt, "read a dedup index: it is cut short"));
        }
        Ok(Self { path, file, header })
    }

    fn entry(&self, number: u64) -> Result<Entry> {
        let mut bytes = [0; ENTRY_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.header.entry_at(number)).context("read a dedup index")?;
        Ok(Entry::decode(&bytes, self.header.packs)?)
    }

    fn known(&self, entry: &Entry) -> Result<Known> {
        let mut pack = [0; 32];
        self.file
            .read_exact_at(&mut pack, self.header.pack_at(entry.pack.into()))
            .context("read a dedup index")?;
        Ok(Known { pack: PackId(pack), offset: entry.offset, length: entry.length, encoding: entry.encoding })
    }

    fn find(&self, hash: &BlockHash) -> Result<Option<Known>> {
        let count = self.header.entries;
        let key = sort_key(&hash.0);
        let mut at = lower_bound(count, key, |number| {
            let mut bytes = [0; 8];
            self.file
                .read_exact_at(&mut bytes, self.header.entry_at(number))
                .context("read a dedup index")?;
            Ok(u64::from_be_bytes(bytes))
        })?;
        while at < count {
            let entry = self.entry(at)?;
            if sort_key(&entry.hash.0) != key {
                break;
            }
            if entry.hash == *hash {
                return self.known(&entry).map(Some);
            }
            at += 1;
        }
        Ok(None)
    }
}

/// Gathers blocks for a new index object.
#[derive(Default)]
pub struct Builder {
    packs: Vec<PackId>,
    numbers: std::collections::HashMap<PackId, u32>,
    entries: Vec<Entry>,
}

impl Builder {
    /// Adds a block.
    pub fn add(&mut self, hash: BlockHash, known: &Known) {
        let next = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        let pack = *self.numbers.entry(known.pack).or_insert_with(|| {
            self.packs.push(known.pack);
            next
        });
        let Known { offset, length, encoding, .. } = *known;
        self.entries.push(Entry { hash, pack, offset, length, encoding });
    }

    /// Whether it has no block.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many blocks it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The object and its path.
    pub fn finish(mut self) -> (String, Bytes) {
        self.entries.sort_unstable_by_key(|entry| entry.hash);
        let header = IndexHeader { packs: self.packs.len() as u64, entries: self.entries.len() as u64 };
        let mut out = Vec::with_capacity(usize::try_from(header.file_bytes()).unwrap_or(0));
        out.extend_from_slice(&header.encode());
        for pack in &self.packs {
            out.extend_from_slice(&pack.0);
        }
        for entry in &self.entries {
            out.extend_from_slice(&entry.encode());
        }
        (format!("{INDEXES}/{}", BlockHash::of(&out)), Bytes::from(out))
    }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, bytes).context("write a dedup index")?;
    std::fs::rename(&part, path).context("rename a dedup index")
}
